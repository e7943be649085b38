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

import benchmark_recipe
import features
import train_pretrain
from benchmark_baseline import Own
from cotex import CoTEX, cotex_loss
from dan import DAN
from data import VideoFrames
from emma import EMMA, emma_losses
from face_set import image_folder
from images import normalise
from labels import AU
from losses import au_loss, expr_loss
from scoring import predict
from segments import segments
from synthetic_face import State, draw_face, person
from temporal import SegmentModel
from training import gradient_norm, loader
from vit import VisionTransformer

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


def matrix_product(way: Own, dtype, side: int) -> Work:
    """The product of two large matrices: what the device can do."""
    def build():
        a, b = (torch.randn(side, side, device=way.team.device, dtype=dtype) for _ in range(2))
        return lambda: torch.mm(a, b)
    kind = str(dtype).removeprefix("torch.")
    return Work(f"{kind} matrix product", way, f"{side} x {side}", "products", 1, build, 2 * side ** 3)


# ---- Steps of the trainings

def image_step(name: str, config, way: Own, batch: int, section, make, beside, loss, flops: int = 0,
               rate: str = "") -> Work:
    """A step of a training on images, the whole batch in one piece.

    `section`: the settings of its optimiser; `make()`: the model; `beside()`: the tensors (B, ...) that come
    with the images; `loss(forward, x, *tensors)`, where `forward` calls the model under autocast.
    """
    def build():
        model = way.place(make())
        call, optimizer = way.call(model), way.adamw(model, section)
        images = way.wait_images(random_images(batch, config.vit.image_size))
        waiting = [way.wait(tensor) for tensor in beside()]

        def forward(*inputs):
            with way.team.autocast():
                return call(*inputs)

        def step():
            optimizer.zero_grad(set_to_none=True)
            x, tensors = way.fetch_images(images), [way.fetch(tensor) for tensor in waiting]
            value = loss(forward, x, *tensors)
            value.backward()
            gradient_norm(model)
            optimizer.step()
            return value.detach()
        return step
    return Work(name, way, f"{batch} images", "images", batch, build, flops, rate=rate)


def mae_step(config, way: Own, batch: int) -> Work:
    """train_pretrain.py's."""
    N, _ = benchmark_recipe.patches(config.vit)
    return image_step("MAE step", config, way, batch, config.pretrain, lambda: train_pretrain.build(config),
                      lambda: [torch.rand(batch, N)], lambda forward, x, u: forward(x, u)[0],
                      benchmark_recipe.mae_step(config), rate="pretrain")


def finetune_step(config, way: Own, batch: int) -> Work:
    """train_finetune.py's."""
    def loss(forward, x, y):
        return expr_loss(forward(x), y, y >= 0, batch)
    return image_step("fine-tuning step", config, way, batch, config.finetune,
                      lambda: features.build(config), lambda: [torch.randint(0, 8, (batch,))], loss,
                      benchmark_recipe.finetune_step(config), rate="finetune")


def cotex_step(config, way: Own, batch: int) -> Work:
    """train_cotex.py's."""
    c, (N, _) = config.cotex, benchmark_recipe.patches(config.vit)

    def make():
        return CoTEX(6, c.views, c.mask_ratio, **vars(config.vit), drop_path=c.drop_path)

    def loss(forward, x, y, u):
        return cotex_loss(forward(x, u), y, y >= 0, c.js_weight, batch)
    return image_step("CoTEX step", config, way, batch, c, make,
                      lambda: [torch.randint(0, 6, (batch,)), torch.rand(batch, c.views, N)], loss,
                      benchmark_recipe.cotex_step(config, classes=6))


def emma_step(config, way: Own, batch: int) -> Work:
    """train_emma.py's, with DAN as its frozen CNN, whose cost is not counted here."""
    e = config.emma

    def make():
        return EMMA(VisionTransformer(**vars(config.vit), drop_path=e.drop_path), DAN())

    def labels():
        classes, aus = torch.randint(0, 8, (batch, 1)), torch.randint(0, 2, (batch, len(AU.outputs)))
        return [torch.cat([torch.rand(batch, 2), classes, aus], dim=1), torch.ones(len(AU.outputs))]

    def loss(forward, x, y, positives):
        return emma_losses(forward(x).float(), y, positives).sum()
    return image_step("EMMA step", config, way, batch, e, make, labels, loss)


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
    """The AU model of a configuration, with random weights."""
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

    def build():
        model = way.call(way.place(segment_model(config)).eval())
        x = np.random.default_rng(0).standard_normal((frames, config.vit.dim)).astype(np.float16)
        return lambda: predict(model, x, s.window, s.stride, config.task.batch, way.team)
    forward, _ = benchmark_recipe.segment_forward(config, len(AU.outputs))
    return Work("whole video", way, f"{frames:,} frames", "frames", frames, build,
                len(segments(frames, s.window, s.stride)) * forward // frames, waits=True, rate="videos")


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
                image, _ = faces[i % len(faces)]
                if way.name == "plain":
                    normalise(torch.tensor(image)[None])
        return step
    return Work(f"JPEG {side} x {side} to crop {size} x {size}", way, f"{count} images, 1 core", "images",
                count, build, waits=True)


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
    return Work(f"JPEG {side} x {side} to crop {size} x {size}", way,
                f"{batch * batches} images, all {CORES} cores", "images", batch * batches, build,
                waits=True, rate=rate)
