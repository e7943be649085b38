"""What is said of a trained model's score: its table, which videos it is of, and a picture of one video
(paper §4.2, Table 1).

A score is compared with the paper's only on synthetic data, which says so, and on a complete copy of
Aff-Wild2. Where the ViT was fine-tuned on scenes of the validation set, the score without them stands beside.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

import timeline
from data import VideoFrames
from distributed import Team
from frames import find_videos
from labels import Task, targets
from score_table import numbers as score_numbers, score_table
from scoring import predict, unseen
from segments import Video, labelled_faces, read_features, reasons, segments


class Scored(NamedTuple):
    """The videos that are scored, and what their score can be compared with."""
    videos: list[Video]
    left_out: dict[str, str]     # {video: why it is not scored}
    unseen: np.ndarray           # (videos,) bool: the ViT was not fine-tuned on this video's scene
    data: str                    # what the report calls the data
    comparable: bool             # with the paper's and the baseline's numbers

    @property
    def seen(self) -> int:
        """How many videos show scenes on which the ViT was fine-tuned."""
        return int((~self.unseen).sum())


def to_score(videos, left_out, other_videos, task: Task, origin: dict, config) -> Scored:
    """`videos` of the validation set, `other_videos` of the training set; `origin`: the features' record."""
    new = unseen([video.name for video in videos], origin)
    if config.data.synthetic:
        return Scored(videos, left_out, new, "synthetic data; the paper's and the baseline's numbers are "
                      "on Aff-Wild2", True)
    found, whole = labelled_faces([*videos, *other_videos], task), task.labelled_faces
    complete = abs(found - whole) <= 0.01 * whole
    data = "Aff-Wild2" if complete else (
        f"{found:,} labelled frames with a face in both sets, a complete Aff-Wild2 has {whole:,}; "
        "so the paper's numbers are left out")
    return Scored(videos, left_out, new, data, complete)


def data_text(videos: list[Video], left_out: dict[str, str], scored: Scored) -> str:
    """What a training is on, training `videos` and those that are `scored`, in lines to print."""
    lines = []
    for name, part, missing in (("training", videos, left_out),
                                ("validation", scored.videos, scored.left_out)):
        frames = sum(len(video.labels) for video in part)
        more = f"; left out: {reasons(missing)}" if missing else ""
        lines.append(f"  {name}: {len(part)} videos, {frames:,} frames{more}")
    if scored.seen:
        lines.append(f"  warning: {seen_text(scored)}")
    return "\n".join(lines)


def report(task: Task, sums, scored: Scored, checkpoint, fold: int) -> str:
    """The score table with what it is about: the checkpoint, the videos, those left out, those seen before.

    Shape: sums (videos, ...), as `score` gives them.
    """
    frames = sum(len(video.labels) for video in scored.videos)
    some = 0 < scored.seen < len(scored.videos)
    lines = [str(checkpoint), f"{len(scored.videos)} validation videos, {frames:,} frames ({scored.data})",
             score_table(task, sums, scored.unseen if some else None, fold, scored.comparable)]
    if scored.seen:
        lines.append(seen_text(scored) + (", so the score is too high" if not some else
                                          "; \"unseen\" is the score of the others alone"))
    if scored.left_out:
        lines.append(f"left out: {reasons(scored.left_out)}")
    return "\n".join(lines)


def numbers(task: Task, sums, scored: Scored) -> dict:
    """The score and what belongs to it, for metrics.json. Shape: sums (videos, ...)."""
    return {**score_numbers(task, sums), "validation_videos": len(scored.videos),
            "seen_videos": scored.seen, "left_out": scored.left_out, "data": scored.data,
            "comparable": scored.comparable}


def stored_scores(run_folder: Path) -> str:
    """The report of a finished task."""
    return (run_folder / "scores.txt").read_text()


def seen_text(scored: Scored) -> str:
    """Why a score may be too high, for the report and before a training."""
    return f"{scored.seen} of these {len(scored.videos)} videos show scenes on which the ViT was fine-tuned"


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
    timeline.draw(task, faces, features[:n].astype(np.float32), segments(n, s.window, s.stride),
                  np.where(valid, target, np.nan), outputs, path)
