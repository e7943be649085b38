"""The work that benchmark_device.py measures: a step of each stage, and what feeds it.

A `Work` says what is measured and what one call of it counts. Its `build` makes everything that is needed and
gives back the step, a function without arguments. All weights and inputs are random: speed does not depend on
them. The steps repeat the loops of the stages (train_pretrain.py and so on) without the lines that count,
print and save.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import benchmark_recipe
import features
import train_pretrain
from benchmark_baseline import Own
from data import VideoFrames
from face_set import image_folder
from images import normalise
from labels import AU
from losses import au_loss, expr_loss
from scoring import predict
from synthetic_face import State, draw_face, person
from temporal import SegmentModel
from training import gradient_norm, loader

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass(frozen=True)
class Work:
    """One row of the table."""
    name: str                     # "MAE step"
    way: Own
    size: str                     # "64 images"
    unit: str                     # what is counted: images, frames, segments
    count: int                    # how many of them in one call
    build: Callable               # -> the step
    flops: int = 0                # for each of them; 0 = not counted
    waits: bool = False           # the step itself ends with results on the host
    rate: str = ""                # which of benchmark_recipe.Rates it gives


def random_images(count: int, size: int):
    """uint8 (B, size, size, 3)"""
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


# ---- Steps of the trainings

def mae_step(config, way: Own, batch: int) -> Work:
    """A step of train_pretrain.py, the whole batch in one piece."""
    def build():
        model = way.place(train_pretrain.build(config))
        forward = way.call(model)
        optimizer = way.adamw(model, config.pretrain)
        images = way.wait_images(random_images(batch, config.vit.image_size))
        noise = way.wait(torch.rand(batch, benchmark_recipe.patches(config.vit)[0]))

        def step():
            optimizer.zero_grad(set_to_none=True)
            x, u = way.fetch_images(images), way.fetch(noise)
            with way.team.autocast():
                loss, _, _ = forward(x, u)
            loss.backward()
            gradient_norm(model)
            optimizer.step()
            return loss.detach()
        return step
    return Work("MAE step", way, f"{batch} images", "images", batch, build,
                benchmark_recipe.mae_step(config), rate="pretrain")


def finetune_step(config, way: Own, batch: int) -> Work:
    """A step of train_finetune.py, the whole batch in one piece."""
    def build():
        model = way.place(features.build(config))
        forward = way.call(model)
        optimizer = way.adamw(model, config.finetune)
        images = way.wait_images(random_images(batch, config.vit.image_size))
        labels = way.wait(torch.randint(0, 8, (batch,)))

        def step():
            optimizer.zero_grad(set_to_none=True)
            x, y = way.fetch_images(images), way.fetch(labels)
            with way.team.autocast():
                logits = forward(x)
            loss = expr_loss(logits, y, y >= 0, batch)
            loss.backward()
            gradient_norm(model)
            optimizer.step()
            return loss.detach()
        return step
    return Work("fine-tuning step", way, f"{batch} images", "images", batch, build,
                benchmark_recipe.finetune_step(config), rate="finetune")


def segment_step(config, way: Own) -> Work:
    """A step of train_task.py for AUs, whose loss costs most. The last tenth of each segment is padding."""
    batch, window = config.task.batch, config.segments.window

    def build():
        model = way.place(segment_model(config))
        forward = way.call(model)
        optimizer = way.task_adamw(model, config.task)
        real = (torch.arange(window) < 0.9 * window).expand(batch, window).contiguous()
        x = torch.randn(batch, window, config.vit.dim).half()
        target = torch.randint(0, 2, (batch, window, len(AU.outputs))).float()
        valid = real[:, :, None].expand_as(target).contiguous()
        waiting = [way.wait(part) for part in (x, target, valid, real)]

        def step():
            x, target, valid, real = [way.fetch(part) for part in waiting]
            optimizer.zero_grad(set_to_none=True)
            with way.team.autocast():
                outputs = forward(x.float(), real)
            loss = au_loss(outputs, target, valid)
            loss.backward()
            gradient_norm(model)
            optimizer.step()
            return loss.detach()
        return step
    return Work("segment step", way, f"{batch} x {window} frames", "segments", batch, build,
                benchmark_recipe.segment_step(config, len(AU.outputs)), rate="segments")


def segment_model(config) -> SegmentModel:
    return SegmentModel(config.vit.dim, len(AU.outputs), **vars(config.temporal))


# ---- Features, whole videos

def extraction(config, way: Own) -> Work:
    """Features of images that are in memory already."""
    batch = config.features.batch

    def build():
        vit = way.place(features.build(config).vit).eval()
        compute = way.call(vit.features)
        images = way.wait_images(random_images(batch, config.vit.image_size))

        @torch.no_grad()
        def step():
            with way.team.autocast():
                f = compute(way.fetch_images(images), config.finetune.token)
            return f.half().cpu()
        return step
    return Work("extraction, from memory", way, f"{batch} images", "images", batch, build,
                benchmark_recipe.vit_forward(config.vit), waits=True)


def extraction_of_video(config, way: Own, folder: Path) -> Work:
    """A whole video as extract_features.py takes it: read by `run.workers`, computed, copied back."""
    frames = VideoFrames(folder, config.vit.image_size)

    def build():
        vit = way.place(features.build(config).vit).eval()
        silent = SimpleNamespace(add=lambda count: None)
        return lambda: features.video_features(vit, frames, len(frames), config, way.team, silent)
    return Work("extraction, with reading", way, f"{len(frames):,} frames, {config.run.workers} workers",
                "frames", len(frames), build, benchmark_recipe.vit_forward(config.vit), waits=True,
                rate="extract")


def whole_video(config, way: Own, frames: int) -> Work:
    """All segments of one video, merged into an output per frame, as in validation and prediction."""
    s = config.segments
    segments = -(-max(frames - s.window, 0) // s.stride) + 1

    def build():
        model = way.call(way.place(segment_model(config)).eval())
        x = np.random.default_rng(0).standard_normal((frames, config.vit.dim)).astype(np.float16)
        return lambda: predict(model, x, s.window, s.stride, config.task.batch, way.team)
    forward, _ = benchmark_recipe.segment_forward(config, len(AU.outputs))
    return Work("whole video", way, f"{frames:,} frames", "frames", frames, build,
                segments * forward // frames, waits=True, rate="videos")


# ---- What feeds them

def draw_jpegs(folder: Path, count: int, side: int):
    """`count` JPEG files 00001.jpg, ... of side x side pixels: 64 synthetic faces, again and again."""
    folder.mkdir(parents=True)
    faces = []
    for number in range(min(count, 64)):
        rng = np.random.default_rng(number)
        face = draw_face(person(rng), State(rng.random(len(AU.outputs)) / 2), rng).resize((side, side))
        face.save(folder / "one.jpg", quality=90)
        faces.append((folder / "one.jpg").read_bytes())
    (folder / "one.jpg").unlink()
    for number in range(count):
        (folder / f"{number + 1:05d}.jpg").write_bytes(faces[number % len(faces)])


def faces_in(config, folder: Path):
    """The JPEGs of a folder as pre-training reads them: decoded, cropped, flipped."""
    tokens = benchmark_recipe.patches(config.vit)[0]
    return train_pretrain.Faces([image_folder(folder)], config.vit.image_size, tokens, config.run.seed,
                                config.pretrain.smallest_crop)


def decoding(config, way: Own, folder: Path, side: int) -> Work:
    """JPEG to crop by one core. The plain way has it normalised there too."""
    count, size = 64, config.vit.image_size

    def build():
        faces = faces_in(config, folder)

        def step():
            for i in range(count):
                image, _ = faces[i]
                if way.name == "plain":
                    normalise(torch.tensor(image)[None])
        return step
    return Work(f"JPEG {side} x {side} to crop {size} x {size}", way, "1 core", "images", count, build,
                waits=True)


def decoding_by_all(config, way: Own, folder: Path, side: int, rate: str) -> Work:
    """The same by as many workers as there are cores, through the DataLoader of the trainings."""
    batch, batches, size = 64, 4 * CORES, config.vit.image_size

    def build():
        faces = faces_in(config, folder)
        order = np.resize(np.arange(len(faces)), batch)
        come = loader(faces, (order for _ in range(10 ** 9)), CORES, way.team)
        for _ in range(2 * CORES):                               # what the workers have read ahead
            next(come)

        def step():
            for _ in range(batches):
                next(come)
        return step
    return Work(f"JPEG {side} x {side} to crop {size} x {size}", way, f"all {CORES} cores", "images",
                batch * batches, build, waits=True, rate=rate)
