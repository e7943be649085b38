"""The models by which predict.py fills its table: a run's, or an EMMA.

    SegmentModels    videos: the run's ViT and its trained tasks
    Classifier       single images: the run's ViT with the expression head of its fine-tuning
    Emma             both: a checkpoint of train_emma.py, nothing of a run

Each of them has `tasks`, of which it has columns, in the order of labels.TASKS; `config`, with the settings
that it was trained with; `record`, what it is, for the record beside the table; `synthetic`, whether it
learned from drawn faces. Two methods give outputs, a list with an array (..., K) for each task:

    video(frames, length, progress) -> outputs of T = `length` frames, noface (T,)      [] without any face
    images(images) -> outputs of single images (B, 3, height, width)
"""

import dataclasses
from pathlib import Path

import torch

import emma_frames
from checkpoints import checksum, load_vit, load_weights, read_checkpoint
from features import build, feature_settings, video_features
from labels import EXPR, TASKS
from made_of import command, find_input, finished, like, missing, there
from scoring import Trained, check_features, load, stage_of
from vit import VisionTransformer


# ---- The models of a run

def find_vit(config, team) -> tuple[Path, dict]:
    """The fine-tuned checkpoint, as extract_features.py finds it, and its record (made_of.py)."""
    return find_input(config, team, "features.checkpoint", "finetune", "best.pt", "train_finetune.py")


def vit_record(path, origin: dict, config) -> dict:
    """What the fine-tuned ViT is, for the table's record."""
    return {"file": str(path), "checksum": origin["checksum"], "token": config.finetune.token}


def finished_tasks(config) -> dict[str, Path]:
    """{task name: its best.pt} of the run's tasks that are finished. Raises ValueError if one is gone."""
    paths = {task.name: config.folder(stage_of(config, task)) / "best.pt" for task in TASKS.values()}
    paths = {name: path for name, path in paths.items() if finished(path.parent)}
    for path in paths.values():
        there(path, config)
    return paths


def say_changed(trained, path, team):
    """Say which settings are the checkpoint's and not the configuration's."""
    for name, (_, was, now) in trained.changed.items():
        team.say(f"  {name}={was} as in {path}; the configuration has {now}")


def load_task(path, task, config, origin: dict, team) -> tuple[Trained, dict]:
    """A task's segment model, and what it is, for the table's record. `origin`: the record of the ViT. Raises
    ValueError if it needs another ViT's features."""
    trained = load(path, config, task, team)
    features = {"stage": "features", "settings": feature_settings(config), "from": origin}
    check_features(path, trained.record, features)
    say_changed(trained, path, team)
    s = trained.config.segments
    return trained, {"file": str(path), "checksum": checksum(path), "window": s.window, "stride": s.stride}


class SegmentModels:
    """The run's ViT and the segment models of its trained tasks. Raises ValueError if no task is trained."""

    def __init__(self, config, team):
        paths = finished_tasks(config)
        if not paths:
            raise missing(config.folder(stage_of(config, TASKS["au"])) / "best.pt",
                          "train_task.py --task au", config)
        path, origin = find_vit(config, team)
        vit = VisionTransformer(**dataclasses.asdict(config.vit))
        team.say(f"  ViT from {path}; {load_vit(vit, path)}")
        self.vit, self.config, self.team, self.models = vit.to(team.device).eval(), config, team, []
        self.record, self.synthetic = {"vit": vit_record(path, origin, config)}, config.data.synthetic
        for task in TASKS.values():
            if task.name in paths:
                trained, self.record[task.name] = load_task(paths[task.name], task, config, origin, team)
                self.models.append(trained)
            else:
                team.say(f"  no columns of {task.name}, which is not trained; to train it: "
                         + command(f"train_task.py --task {task.name}", config))
        self.tasks = [trained.task for trained in self.models]

    def video(self, frames, length: int, progress):
        features, noface = video_features(self.vit, frames, length, self.config, self.team, progress)
        return [trained.predict(features) for trained in self.models if not noface.all()], noface


class Classifier:
    """The classifier of expressions that the run's fine-tuning has trained."""
    tasks = [EXPR]

    def __init__(self, config, team):
        path, origin = find_vit(config, team)
        saved = read_checkpoint(path)
        self.config, _ = like(saved.get("made_of"), config, path)
        model = build(self.config)
        load_weights(model, saved.get("model", saved), path)
        self.model = model.to(team.device).eval()
        team.say(f"  expressions by {path}; no columns of va and au, which need a video")
        self.record, self.synthetic = {"vit": vit_record(path, origin, self.config)}, config.data.synthetic

    def images(self, images: torch.Tensor) -> list:
        return [self.model(images)]


# ---- EMMA

class Emma:
    """The EMMA of a checkpoint, for videos, frame by frame, and for single images. Needs nothing of a run.
    Raises ValueError as emma_frames.load."""

    def __init__(self, path, config, team):
        self.trained = emma_frames.load(path, config, team)
        self.config, self.tasks = self.trained.config, self.trained.tasks
        team.say(f"  EMMA from {path}, each frame by itself")
        say_changed(self.trained, path, team)
        for task in TASKS.values():
            if task not in self.tasks:
                team.say(f"  no columns of {task.name}, which it was not trained on")
        self.record = {"emma": {"file": str(path), "checksum": checksum(path)}}
        self.synthetic = self.trained.record["settings"]["data.synthetic"]

    def video(self, frames, length: int, progress):
        outputs, noface = self.trained.predict(frames, length, progress)                     # (T, 22)
        return [emma_frames.outputs_of(task, outputs) for task in self.tasks if not noface.all()], noface

    def images(self, images: torch.Tensor) -> list:
        outputs = self.trained.model(images)                                                 # (B, 22)
        return [emma_frames.outputs_of(task, outputs) for task in self.tasks]
