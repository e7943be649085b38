"""Whole videos: predicted by segments, scored with each labelled frame once (paper §4.2, Table 1).

A frame that several segments cover gets the mean of their outputs; the authors' published numbers count it
several times. What is scored are the task's outputs as they are: no clipping, smoothing or mode filter,
which the authors' code has.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from checkpoints import load_weights
from distributed import Team, all_sum
from labels import Task, targets
from made_of import find_input, named, same, unlike
from segments import Video, pad, read_features, segments
from splits import scene
from temporal import SegmentModel

FEATURES = "task.features", "features"       # where a task's input is looked for: a setting, a stage


def stage_of(config, task: Task) -> str:
    """The name of a task's run folder: task_au, or task_au_fold1."""
    return f"task_{task.name}" + (f"_fold{config.task.fold}" if config.task.fold else "")


def find_features(config, team: Team) -> tuple[Path, dict]:
    """The folder of features that a task is trained and scored on, and its record (made_of.py).

    Raises ValueError if it is not made, or does not fit the settings.
    """
    path, record = find_input(config, team, *FEATURES, "metrics.json", "extract_features.py")
    return (path if config.task.features else path.parent), record


# ---- Prediction

@torch.no_grad()
def predict(model, features: np.ndarray, window: int, stride: int, batch: int, team: Team) -> np.ndarray:
    """The model's outputs for one whole video, overlapping segments averaged: (T, D) -> float32 (T, K).

    The segments of a video are its batches, whatever the number of processes, so the result does not depend
    on it.
    """
    cut = segments(len(features), window, stride)
    total, count = 0.0, np.zeros((len(features), 1), np.float32)
    for first in range(0, len(cut), batch):
        part = cut[first:first + batch]
        x = np.stack([pad(features[start:end], window) for start, end in part])          # (B, w, D)
        real = np.stack([pad(np.ones(end - start, bool), window) for start, end in part])   # (B, w)
        x, real = torch.from_numpy(x).to(team.device).float(), torch.from_numpy(real).to(team.device)
        with team.autocast():
            y = model(x, real).float().cpu().numpy()                                     # (B, w, K)
        if first == 0:
            total = np.zeros((len(features), y.shape[-1]), np.float32)
        for row, (start, end) in enumerate(part):
            total[start:end] += y[row, :end - start]
            count[start:end] += 1
    return total / count


def shared_out(videos: list[Video], team: Team) -> list[Video]:
    """This process's videos: longest first, so that no process waits long for another's last one."""
    return sorted(videos, key=lambda video: (-len(video.labels), video.name))[team.rank::team.world]


def score(model, mine, videos: list[Video], task: Task, window: int, stride: int, batch: int,
          team: Team) -> np.ndarray:
    """The sums of the task's metric for each of `videos`, over all processes: (videos, ...). `mine` are those
    that this process predicts (`shared_out`)."""
    nothing = np.zeros((0, len(task.outputs)))
    no_label = nothing[:, 0] if task.one_class else nothing
    empty = task.metric.count(nothing, no_label, no_label.astype(bool))
    sums = np.zeros((len(videos), *empty.shape))
    place = {video.name: i for i, video in enumerate(videos)}
    model.eval()
    for video in mine:
        features = read_features(video.features, 0, len(video.labels))
        outputs = predict(model, features, window, stride, batch, team)
        sums[place[video.name]] = task.metric.count(outputs, *targets(video.labels, task))
    model.train()
    return all_sum(torch.from_numpy(sums)).numpy()


# ---- Checkpoints

def check_checkpoint(path, saved: dict, features_record: dict, videos: list[Video]):
    """Raises ValueError if a checkpoint was trained on features of another ViT than these, or on scenes that
    would be scored. One without a record cannot be checked."""
    record = saved.get("made_of")
    if record is None:
        return
    if not same(record["from"], features_record):
        raise ValueError(f"{path}: trained on features of another ViT, {named(record['from'])}, not "
                         f"{named(features_record)}, which mean something else; give those it was trained "
                         "on, --set task.features=..., or their ViT, --set features.checkpoint=..."
                         f"{unlike(record['from'], features_record)}")
    trained = {scene(name) for name in record["data"]["training videos"]}
    known = [video.name for video in videos if scene(video.name) in trained]
    if known:
        raise ValueError(f"{path}: trained on {len(known)} of the {len(videos)} videos that would be scored "
                         f"({', '.join(known[:5])}); give the labels that it was trained with")


def check_task(path, saved: dict, task: Task):
    """Raises ValueError if a checkpoint is of another task."""
    stage = saved.get("made_of", {}).get("stage", f"task_{task.name}")
    if stage.split("_")[1:2] != [task.name]:
        raise ValueError(f"{path}: trained for {stage}, not for --task {task.name}")


def load_segment_model(path, saved: dict, config, task: Task, dim: int, team: Team) -> SegmentModel:
    """The segment model of a checkpoint, for features (frames, `dim`).

    Raises ValueError if it has other sizes (names and shapes are listed).
    """
    model = SegmentModel(dim, len(task.outputs), **dataclasses.asdict(config.temporal))
    load_weights(model, saved.get("model", saved), path)
    return model.to(team.device)
