"""Whole videos: predicted by segments, scored with each labelled frame once (paper §4.2, Table 1).

A frame that several segments cover gets the mean of their outputs; the authors' published numbers count it
several times. Unless evaluate.py is asked for more, the task's outputs are scored as they are: without the
clipping and the mode filter of the authors' code.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoints import check_names, load_weights, read_checkpoint, read_json, write_text
from distributed import Team, all_sum, choose_device
from labels import TASKS, Task, targets
from made_of import find_input, finished, like, named, same, tuned_on, unlike
from postprocessing import Postprocessing, apply
from segments import Video, pad, read_features, segments
from settings import Config
from splits import scene
from temporal import SegmentModel

FEATURES = "task.features", "features"       # where a task's input is looked for: a setting, a stage
HELD_OUT = "held-out videos"                 # where a record names the videos of task.held_out
# The first layer of a segment model: of the TCN; without one, of the Transformer; without both, of the head.
FIRST_WEIGHTS = ("tcn.levels.0.conv1.conv.parametrizations.weight.original1", "transformer.project.weight",
                 "head.0.weight")


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

def triangle(frames: int) -> np.ndarray:
    """1, 2, ..., 2, 1: a frame in the middle of a segment counts most, for it sees most around it."""
    return np.minimum(np.arange(1, frames + 1), np.arange(frames, 0, -1)).astype(np.float32)


# How segments that cover the same frame are merged: the weight of each frame of a segment. With "none"
# segments do not overlap.
MERGING = {"mean": lambda frames: np.ones(frames, np.float32), "triangular": triangle,
           "none": lambda frames: np.ones(frames, np.float32)}


@torch.no_grad()
def segment_outputs(model, features: np.ndarray, window: int, stride: int, batch: int, team: Team):
    """The model's outputs for each segment of one whole video, for itself. Shape: features (T, D)
    -> [(start, end), ...] of S segments, float32 (S, w, K), of which the padded frames mean nothing.

    The segments of a video are its batches, whatever the number of processes, so the result does not depend
    on it.
    """
    cut, outputs = segments(len(features), window, stride), []
    for first in range(0, len(cut), batch):
        part = cut[first:first + batch]
        x = np.stack([pad(features[start:end], window) for start, end in part])          # (B, w, D)
        real = np.stack([pad(np.ones(end - start, bool), window) for start, end in part])   # (B, w)
        x, real = torch.from_numpy(x).to(team.device).float(), torch.from_numpy(real).to(team.device)
        with team.autocast():
            outputs.append(model(x, real).float().cpu().numpy())                         # (B, w, K)
    return cut, np.concatenate(outputs)


def merged(cut, outputs: np.ndarray, frames: int, merge: str = "mean") -> np.ndarray:
    """One output per frame from those of the segments: (S, w, K) -> float32 (T, K)."""
    total = np.zeros((frames, outputs.shape[-1]), np.float32)
    weight = np.zeros((frames, 1), np.float32)
    for (start, end), y in zip(cut, outputs):
        w = MERGING[merge](end - start)[:, None]                                         # (t, 1)
        total[start:end] += w * y[:end - start]
        weight[start:end] += w
    return total / weight


def predict(model, features: np.ndarray, window: int, stride: int, batch: int, team: Team,
            merge: str = "mean") -> np.ndarray:
    """The model's outputs for one whole video, overlapping segments merged: (T, D) -> float32 (T, K)."""
    stride = window if merge == "none" else stride
    cut, outputs = segment_outputs(model, features, window, stride, batch, team)
    return merged(cut, outputs, len(features), merge)


def shared_out(videos: list, team: Team, length=lambda video: len(video.labels)) -> list:
    """This process's videos: longest first, so that no process waits long for another's last one."""
    return sorted(videos, key=lambda video: (-length(video), video.name))[team.rank::team.world]


def count_frames(task: Task, cut, outputs, target, valid, merge: str = "mean",
                 how: Postprocessing = Postprocessing()) -> np.ndarray:
    """The sums of a video's metric, each frame once. Shape: outputs (S, w, K), target and valid (T, ...)"""
    return task.metric.count(apply(merged(cut, outputs, len(target), merge), task, how), target, valid)


def count_as_authors(task: Task, cut, outputs, target, valid) -> np.ndarray:
    """The sums of a video's metric as the authors' published numbers count: full segments only, so that tails
    and short videos are lost, and a frame counts once for each segment that covers it. Arguments as above."""
    window = outputs.shape[1]
    full = [i for i, (start, end) in enumerate(cut) if end - start == window]
    frames = [t for i in full for t in range(*cut[i])]             # of all full segments, one after the other
    return task.metric.count(outputs[full].reshape(-1, outputs.shape[2]), target[frames], valid[frames])


def score(model, mine, videos: list[Video], task: Task, window: int, stride: int, batch: int, team: Team,
          count=count_frames) -> np.ndarray:
    """The sums of the task's metric for each of `videos`, over all processes: (videos, ...). `mine` are those
    that this process predicts (`shared_out`); `count` makes the sums of one."""
    nothing = np.zeros((0, window, len(task.outputs)), np.float32)
    no_label = nothing[:, 0, 0] if task.one_class else nothing[:, 0]
    empty = count(task, [], nothing, no_label, no_label.astype(bool))
    sums = np.zeros((len(videos), *empty.shape))
    place = {video.name: i for i, video in enumerate(videos)}
    model.eval()
    for video in mine:
        features = read_features(video.features, 0, len(video.labels))
        cut, outputs = segment_outputs(model, features, window, stride, batch, team)
        sums[place[video.name]] = count(task, cut, outputs, *targets(video.labels, task))
    model.train()
    return all_sum(torch.from_numpy(sums)).numpy()


# ---- The sums of a finished task, to compare with

def write_sums(folder: Path, videos: list[Video], sums: np.ndarray, team: Team):
    """video_sums.json: the sums of the metric of each validation video, from which any score follows. Rank 0
    only."""
    if team.rank:
        return
    names = [video.name for video in videos]
    write_text(folder / "video_sums.json", json.dumps({"videos": names, "sums": sums.tolist()}))


def read_sums(folder: Path) -> tuple[list[str], np.ndarray]:
    """The names of the validation videos of a finished task, and their sums (videos, ...). Raises ValueError
    if they are not there."""
    path = Path(folder) / "video_sums.json"
    stored = read_json(path) if finished(folder) else None
    if stored is None:
        raise ValueError(f"{path} not found; train_task.py writes it at the end of a training. If {folder} "
                         "is finished, an earlier version has made it: move it away and train again")
    return stored["videos"], np.array(stored["sums"])


# ---- Checkpoints

def unseen(names, record: dict | None) -> np.ndarray:
    """Mask (names,): the videos on whose scenes the ViT was not fine-tuned, by the record of its features or
    of what was made from them."""
    tuned = {scene(name) for name in tuned_on(record)}
    return np.array([scene(name) not in tuned for name in names], bool)


def check_features(path, record: dict | None, features_record: dict):
    """Raises ValueError if a checkpoint was trained on features of another ViT than these. One without a
    record cannot be checked."""
    if record is not None and not same(record["from"], features_record):
        raise ValueError(f"{path}: trained on features of another ViT, {named(record['from'])}, not "
                         f"{named(features_record)}, which mean something else; give those it was trained "
                         "on, --set task.features=..., or their ViT, --set features.checkpoint=..."
                         f"{unlike(record['from'], features_record)}")


def check_scenes(path, record: dict | None, videos: list[Video]):
    """Raises ValueError if a checkpoint was trained on scenes that would be scored."""
    if record is None:
        return
    trained = {scene(name) for name in record["data"]["training videos"] + record["data"].get(HELD_OUT, [])}
    known = [video.name for video in videos if scene(video.name) in trained]
    if known:
        raise ValueError(f"{path}: trained on {len(known)} of the {len(videos)} videos that would be scored "
                         f"({', '.join(known[:5])}); give the labels that it was trained with")


def check_task(path, record: dict | None, task: Task):
    """Raises ValueError if a checkpoint is of another task."""
    stage = record["stage"] if record else f"task_{task.name}"
    if stage.split("_")[1:2] != [task.name]:
        raise ValueError(f"{path}: trained for {stage}, not for --task {task.name}")


class Trained(NamedTuple):
    """A segment model with what its checkpoint carries: enough to predict, without the run that made it."""
    task: Task
    model: SegmentModel
    config: Config            # with the settings that the model was trained with
    team: Team
    record: dict | None       # what it was made of (made_of.py); None if the checkpoint does not tell
    changed: dict             # {setting: (stage, was, now)} of those that differ from the given configuration

    def predict(self, features: np.ndarray, merge: str = "mean") -> np.ndarray:
        """The outputs for one whole video, as its features lie on disk: float16 (T, D) -> float32 (T, K).

        VA: valence and arousal. Expr, AU: logits; `postprocessing.in_units` makes them probabilities. Raises
        ValueError for features of another shape or width, and for NaN and infinity.
        """
        dim = self.model.dim
        if np.ndim(features) != 2 or len(features) == 0 or features.shape[1] != dim:
            raise ValueError(f"expected the features of a video, (T, {dim}), got {np.shape(features)}")
        if not np.isfinite(features).all():
            raise ValueError("the features hold NaN or infinity; extract them again")
        s = self.config.segments
        return predict(self.model, features, s.window, s.stride, self.config.task.batch, self.team, merge)


def load(path, config: Config | None = None, task: Task | None = None, team: Team | None = None) -> Trained:
    """The segment model of a checkpoint, rebuilt from it alone: its settings and sizes are in it.

    `config` says what the checkpoint does not (run.device), and all that a checkpoint without a record lacks.
    Raises ValueError if it is no whole checkpoint, of another task than `task`, made with other settings than
    those given with --set, or if its weights do not fit (names and shapes are listed).
    """
    saved = read_checkpoint(path)
    record = saved.get("made_of")
    if record is None and (config is None or task is None):
        raise ValueError(f"{path}: does not tell what it was made of; give its configuration and its task")
    if task is None:
        stage, _, rest = record["stage"].partition("_")                  # task_au_fold1
        task = TASKS.get(rest.partition("_")[0])
        if stage != "task" or task is None:
            raise ValueError(f"{path}: of stage {record['stage']}, not of a task: no segment model")
    check_task(path, record, task)
    config, changed = like(record, config or Config(), path)
    team = team or Team(0, 1, choose_device("cpu"))
    weights = saved.get("model", saved)
    check_names(weights, path)
    model = SegmentModel(width_of(weights), len(task.outputs), **dataclasses.asdict(config.temporal))
    load_weights(model, weights, path)
    return Trained(task, model.to(team.device).eval(), config, team, record, changed)


def width_of(weights: dict) -> int:
    """D of the features that a segment model takes: its first layer's weights tell."""
    for name in FIRST_WEIGHTS:
        if name in weights:
            return weights[name].shape[1]
    return 1                                                 # no segment model, which `load_weights` will say


def sums_of(trained: Trained, videos: list[Video], merge: str = "mean", count=count_frames) -> np.ndarray:
    """What `count` makes of each video, over all processes: (videos, ...)."""
    s, team = trained.config.segments, trained.team
    stride = s.window if merge == "none" else s.stride
    return score(trained.model, shared_out(videos, team), videos, trained.task, s.window, stride,
                 trained.config.task.batch, team, count)
