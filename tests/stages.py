"""One stage at a time in the test's own process, on random images, labels and features: what the tests of the
loops share.

Each stage finds its input ready-made (`write`), so that none of them needs another. The data has the faults
of real data: frames without an image, images that cannot be read, images past the last label, frames that
nobody annotated, videos without labels, without images, and without a folder.
"""

import contextlib
import dataclasses
import io
import json
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import run
import tiny
from checkpoints import checksum
from config import load
from emma import EMMA
from features import build as classifier
from images import normalise
from labels import TASKS
from made_of import read_record, settings_of
from train_pretrain import build as autoencoder
from vit import VisionTransformer

STEP_SECONDS = 6              # of an optimiser step, by the tests' clock; a progress line comes after 5
FACES = {"faces/a": 9, "faces/b": 14}                # images in each folder of still faces
BROKEN_FACES = ("faces/a/004.png", "faces/b/002.png", "faces/b/011.png")
FEATURE_WIDTH = 6
MADE = ("pretrain", "finetune")                      # trainings whose results `write` puts there ready-made
CHANGED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)      # signals whose handlers a stage changes


class Film(NamedTuple):
    """A video as it lies on disk."""
    split: str                 # folder of its label files; "" = it has none
    frames: int                # lines of a label file
    images: list | None        # numbers of the frames that have an image; None = it has no folder
    broken: tuple = ()         # those of them that cannot be read


FILMS = {
    "1": Film("Train_Set", 41, [*range(3, 30), *range(33, 44)], (3, 17, 33, 42)),    # 42 is past the labels
    "2_left": Film("Train_Set", 23, list(range(1, 24))),
    "2_right": Film("Train_Set", 20, list(range(1, 20)), (9,)),
    "3": Film("Train_Set", 8, []),                                                    # an empty folder
    "4": Film("Train_Set", 33, list(range(1, 34))),
    "5": Film("Train_Set", 16, list(range(1, 15))),
    "6": Film("Validation_Set", 45, [*range(1, 20), *range(22, 46)], (1, 22, 25, 31)),
    "7": Film("Validation_Set", 19, list(range(2, 20)), (19,)),
    "8": Film("Validation_Set", 6, None),
    "9": Film("", 0, list(range(2, 8)), (7,)),                                        # of the test set
    "95": Film("", 0, []),
    "96": Film("", 0, [1, 3], (1, 3)),                                              # no face at all
}

# None of these is a default, so that a stage which ignores one ends with other weights.
SETTINGS = {
    "data": {"synthetic": False, "frames": ["frames"], "labels": "labels", "affectnet_2017": "",
             "affectnet_2021": "", "raf_db": "", "fer2013": "", "ferplus": "", "folders": list(FACES),
             "s_aff_wild2": "abaw4", "drawn_faces": "drawn", "real_faces": "real"},
    "pretrain": {"mask_ratio": 0.5, "epochs": 21, "batch": 10, "lr": 4e-3,
                 "betas": [0.7, 0.9], "weight_decay": 0.3, "warmup_epochs": 1.4, "smallest_crop": 0.4},
    "finetune": {"token": "cls", "dropout": 0.3, "epochs": 5, "every": 3, "batch": 10, "lr": 2e-2,
                 "betas": [0.8, 0.95], "weight_decay": 0.4, "warmup_epochs": 0.7, "smallest_crop": 0.5,
                 "layer_decay": 0.6, "drop_path": 0.4, "clip": 1.3},
    "features": {"batch": 4},
    "temporal": {"dropout": 0.3, "causal": False},
    "task": {"epochs": 21, "batch": 4, "lr": 1e-2, "weight_decay": 0.2, "warmup_epochs": 1.3},
    "stills": {"width": 2, "epochs": 4, "batch": 5, "lr": 1e-2, "betas": [0.8, 0.95], "weight_decay": 0.3,
               "warmup_epochs": 0.7, "smallest_crop": 0.5},
    "emma": {"cnn": "none", "weights": [1.0, 0.5, 0.25], "epochs": 5, "batch": 10, "lr": 2e-2, "va_lr": 3e-3,
             "betas": [0.8, 0.95], "weight_decay": 0.4, "warmup_epochs": 0.7, "smallest_crop": 0.5,
             "layer_decay": 0.6, "drop_path": 0.4, "clip": 8.0},
    "cotex": {"views": 3, "mask_ratio": 0.5, "js_weight": 0.3, "epochs": 5, "batch": 10, "lr": 2e-2,
              "betas": [0.8, 0.95], "weight_decay": 0.4, "warmup_epochs": 0.7, "smallest_crop": 0.5,
              "layer_decay": 0.6, "drop_path": 0.4, "clip": 0.6},
    "run": {"seed": 3, "largest_piece": 4, "device": "cpu"},
}


def write(folder) -> Path:
    """tiny.yaml, still faces, frames and labels in `folder`, and what each stage reads of the one before it.
    -> folder"""
    tiny.write(folder, **SETTINGS)
    rng = np.random.default_rng(0)
    for name, count in FACES.items():
        for number in range(count):
            write_image(folder / name / f"{number:03d}.png", rng)
    for path in BROKEN_FACES:
        (folder / path).write_bytes(b"no image")
    for name, film in FILMS.items():
        write_film(folder, name, film, rng)
    torch.manual_seed(11)
    write_results(folder, settings(folder), rng)
    return folder


def write_image(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (22, 19, 3), dtype=np.uint8)).save(path)


def write_film(folder, name: str, film: Film, rng):
    """The frames of one video, and its label files of all tasks."""
    frames = folder / "frames" / name
    if film.images is not None:
        frames.mkdir(parents=True)
    for number in film.images or []:
        write_image(frames / f"{number:05d}.jpg", rng)
    for number in film.broken:
        (frames / f"{number:05d}.jpg").write_bytes((frames / f"{number:05d}.jpg").read_bytes()[:200])
    for task in TASKS.values() if film.split else []:
        labels = folder / "labels" / task.folders[0] / film.split
        labels.mkdir(parents=True, exist_ok=True)
        lines = [",".join(task.outputs)]
        for _ in range(film.frames):
            values = {"va": rng.uniform(-1, 1, 2).round(3), "expr": rng.integers(0, 8, 1),
                      "au": rng.integers(0, 2, 12)}[task.name]
            values[rng.random(len(values)) < 0.15] = task.invalid
            lines.append(",".join(map(str, values)))
        (labels / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_results(folder, config, rng):
    """Pre-training, fine-tuning and features, finished, with the records that tie each to the one before."""
    runs = folder / "runs/tiny"
    mae = write_result(runs / "pretrain", ["vit", "pretrain", "run.seed"], config, None, None,
                       {"last.pt": autoencoder(config)})
    tuned_on = [name for name, film in FILMS.items() if film.split == "Train_Set" and film.images]
    vit = write_result(runs / "finetune", ["vit", "finetune", "run.seed"], config,
                       {"setting": "finetune.start", "stage": "pretrain"}, mae,
                       {"last.pt": classifier(config), "best.pt": classifier(config)},
                       {"training videos": tuned_on})
    write_result(runs / "features", ["vit", "finetune.token"], config,
                 {"setting": "features.checkpoint", "stage": "finetune"}, vit, {})
    videos = {}
    for name, film in FILMS.items():
        if film.images is not None and film.frames:
            videos[name] = {"frames": film.frames, "images": len(film.images), "names": 0,
                            "faces": len(film.images)}
        if film.images:
            length = film.frames + 4
            features = rng.normal(size=(length, FEATURE_WIDTH))
            np.save(runs / f"features/{name}.npy", features.astype(np.float16))
            np.save(runs / f"features/{name}.noface.npy", ~np.isin(np.arange(1, length + 1), film.images))
    (runs / "features/videos.json").write_text(json.dumps(videos))


def write_result(stage: Path, sections, config, source, before, models: dict, data=None) -> dict:
    """A finished stage. -> its record"""
    stage.mkdir(parents=True)
    record = {"stage": stage.name, "settings": settings_of(config, *sections), "input": source,
              "data": data or {}, "from": before}
    for file, model in models.items():
        torch.save({"model": model.state_dict(), "made_of": record}, stage / file)
        record = {**record, "checkpoint": file, "checksum": checksum(stage / file)}
    (stage / "made_of.json").write_text(json.dumps(record))
    (stage / "metrics.json").write_text("{}")
    return record


def write_emma(folder, run_name="tiny", cnn=None, weights=(1.0, 0.5, 0.25), trained_on=("1", "4")) -> EMMA:
    """A finished EMMA with random weights, as train_emma.py leaves it in runs/<run_name>/emma. -> the network
    in evaluation mode"""
    config = settings(folder, f"emma.weights={list(weights)}")
    torch.manual_seed(7)
    model = EMMA(VisionTransformer(**dataclasses.asdict(config.vit)), cnn)
    with torch.no_grad():                                    # so that faces differ, in both directions
        model.head[2].weight.mul_(20)
        noise = torch.randint(256, (40, *2 * (config.vit.image_size,), 3), dtype=torch.uint8)
        model.head[2].bias -= model(normalise(noise))[:, 2:].mean(dim=0)
    write_result(folder / "runs" / run_name / "emma", ["synthetic", "vit", "emma", "run.seed"], config,
                 {"setting": "emma.start", "stage": "pretrain"}, read_record(folder / "runs/tiny/pretrain"),
                 {"best.pt": model}, {"training videos": list(trained_on)})
    return model.eval()


def clean(folder):
    """Take its ready-made results away from a stage that is to make them."""
    for path in folder.iterdir():
        path.unlink()


class Clock:
    """Stands for the module `time` in the stages: it goes on only when it is told to."""

    def __init__(self):
        self.now = 1e9

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return time.monotonic()

    def tick(self, *ignored):
        self.now += STEP_SECONDS


def overriding(settings) -> list[str]:
    """["run.name=x"] -> ["--set", "run.name=x"]"""
    return [word for setting in settings for word in ("--set", setting)]


def start(folder, *arguments) -> str:
    """Run a script in this process as its command line does, by a clock on which only optimiser steps take
    time. -> what it printed"""
    said, clock, argv = io.StringIO(), Clock(), sys.argv
    handlers = {number: signal.getsignal(number) for number in CHANGED}
    hook = register_optimizer_step_post_hook(clock.tick)
    try:
        sys.argv = [str(tiny.ROOT / arguments[0]), *arguments[1:], "--config", "tiny.yaml"]
        with contextlib.chdir(folder), contextlib.redirect_stdout(said):
            with mock.patch.object(run, "time", clock):
                runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        hook.remove()
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return said.getvalue()


def log_lines(folder) -> list[str]:
    return (folder / "log.csv").read_text().splitlines()


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def checkpoint(folder, name: str) -> dict:
    return torch.load(folder / name, weights_only=True)


def settings(folder, *overrides):
    """The configuration of tiny.yaml."""
    with contextlib.chdir(folder):
        return load("tiny.yaml", overrides)


def files(folder) -> set[str]:
    """The files in a folder, less the lock, and the checkpoint before the last, which may be there."""
    return {path.name for path in folder.iterdir()} - {".lock", "previous.pt"}


def is_drawn(path) -> bool:
    """A picture that opens and is not of one colour."""
    with Image.open(path) as picture:
        picture.load()
        return any(low != high for low, high in picture.convert("RGB").getextrema())
