"""Whole videos: predicted by segments, scored with each labelled frame once (paper §4.2, Table 1).

A frame that several segments cover gets the mean of their outputs; the authors' published numbers count it
several times. What is scored are the task's outputs as they are: no clipping, smoothing or mode filter,
which the authors' code has.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import pictures
from checkpoints import load_weights, read_checkpoint
from data import VideoFrames, find_videos
from distributed import Team, all_sum
from labels import Task, targets
from run_folder import missing
from segments import Video, checkpoint_of, pad, read_features, segments
from temporal import SegmentModel


def stage_of(config, task: Task) -> str:
    """The name of a task's run folder: task_au, or task_au_fold1."""
    return f"task_{task.name}" + (f"_fold{config.task.fold}" if config.task.fold else "")


def features_of(config) -> Path:
    """The folder of features that a task is trained and scored on. Raises ValueError if it is not made."""
    made = config.folder("features")
    if not config.task.features and not (made / "metrics.json").exists():
        raise missing(made / "metrics.json", "python extract_features.py", config)
    return Path(config.task.features or made)


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


def score(model, videos, task: Task, window: int, stride: int, batch: int, team: Team) -> np.ndarray:
    """The sums of the task's metric over all processes; `videos` are this process's (`shared_out`)."""
    nothing = np.zeros((0, len(task.outputs)))
    no_label = nothing[:, 0] if task.one_class else nothing
    sums = task.metric.count(nothing, no_label, no_label.astype(bool))
    model.eval()
    for video in videos:
        features = read_features(video.features, 0, len(video.labels))
        outputs = predict(model, features, window, stride, batch, team)
        sums = sums + task.metric.count(outputs, *targets(video.labels, task))
    model.train()
    return all_sum(torch.from_numpy(sums)).numpy()


# ---- Reports

def score_table(task: Task, sums, fold: int = 0) -> str:
    """Each output's score beside chance, the paper's (Table 1) and the challenge's baseline."""
    ours, chance = task.metric.score(sums), task.metric.chance(sums)
    lines = [f"{task.metric.name:14s}{'ours':>8s}{'chance':>8s}{'paper':>8s}{'baseline':>10s}"]
    for name, a, b in [*zip(task.outputs, ours, chance), ("mean", ours.mean(), chance.mean())]:
        paper = f"{task.paper[name][fold]:.3f}" if name in task.paper else "-"
        baseline = f"{task.baseline[name]:.3f}" if name in task.baseline and fold == 0 else "-"
        lines.append(f"{name:14s}{a:8.3f}{b:8.3f}{paper:>8s}{baseline:>10s}")
    return "\n".join(lines)


def report(task: Task, sums, videos: list[Video], without: list[str], checkpoint, config) -> str:
    """The score table with what it is about: the checkpoint, the videos, and those left out."""
    frames = sum(len(video.labels) for video in videos)
    data = "Aff-Wild2"
    if config.data.synthetic:
        data = "synthetic data; the paper's and the baseline's numbers are on Aff-Wild2"
    lines = [str(checkpoint), f"{len(videos)} validation videos, {frames:,} frames ({data})",
             score_table(task, sums, config.task.fold)]
    if without:
        lines.append(f"left out, no features: {', '.join(without)}")
    return "\n".join(lines)


def check_features(checkpoint, saved: dict, features):
    """Raises ValueError if `saved`, from the file `checkpoint`, was trained on features of another ViT than
    those in the folder `features`."""
    known, given = saved.get("checkpoint checksum"), checkpoint_of(features)
    if known and given and known != given:
        raise ValueError(f"{checkpoint}: trained on features of another ViT (checksum {known}, not {given}), "
                         "which mean something else; give those it was trained on, --set task.features=...")


def stored_scores(run_folder: Path, config) -> str:
    """The scores of a finished task. Raises ValueError as `check_features`, if there are features."""
    best = run_folder / "best.pt"
    check_features(best, read_checkpoint(best), config.task.features or config.folder("features"))
    return (run_folder / "scores.txt").read_text()


def load_segment_model(checkpoint, config, task: Task, dim: int, features, team: Team) -> SegmentModel:
    """The segment model of a checkpoint, for the features (frames, `dim`) in the folder `features`.

    Raises ValueError if it is of another task or other sizes (names and shapes listed), or was trained on
    features that another checkpoint extracted.
    """
    saved = read_checkpoint(checkpoint)
    if saved.get("task", task.name) != task.name:
        raise ValueError(f"{checkpoint}: trained for --task {saved['task']}, not {task.name}")
    check_features(checkpoint, saved, features)
    model = SegmentModel(dim, len(task.outputs), **dataclasses.asdict(config.temporal))
    load_weights(model, saved.get("model", saved), checkpoint)
    return model.to(team.device)


def draw_timeline(model, videos: list[Video], task: Task, config, team: Team, path, longest: int = 600):
    """timeline.png: the video with most labels, at most its first `longest` frames. Rank 0 only."""
    if team.rank:
        return
    labelled = {video.name: targets(video.labels[:longest], task)[1].sum() for video in videos}
    video = max(videos, key=lambda video: labelled[video.name])
    n, s = min(len(video.labels), longest), config.segments
    features = read_features(video.features, 0, len(video.labels))
    model.eval()
    outputs = predict(model, features, s.window, s.stride, config.task.batch, team)[:n]
    target, valid = targets(video.labels[:n], task)
    faces = []
    try:
        frames = VideoFrames(find_videos(config.data.frames)[video.name], size=112)
        shown = np.flatnonzero(frames.numbers <= n)
        shown = shown[np.linspace(0, len(shown) - 1, min(40, len(shown))).astype(int)]
        images, rows, _ = frames.collate([frames[i] for i in shown])                 # (B, 112, 112, 3), (B,)
        faces = list(zip(rows.tolist(), images.numpy()))
    except (ValueError, KeyError, OSError):
        pass            # features are enough to score; where the frames lie elsewhere, the picture lacks them
    pictures.timeline(task, faces, features[:n].astype(np.float32), segments(n, s.window, s.stride),
                      np.where(valid, target, np.nan), outputs, path)
