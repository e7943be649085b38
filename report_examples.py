"""What a report shows of the validation videos: some videos, the worst segments, their faces.

A video has a score of its own, the mean over the outputs that are labelled in it: macro F1 would call each
class that does not occur a failure. Shown are the best, the median and the worst video of those that are
labelled for all trained tasks, in at least as many frames as a segment has.
"""

import difflib
from typing import NamedTuple

import numpy as np

from data import VideoFrames
from frames import find_videos
from labels import Task, targets
from metrics import CCC
from page import percent
from postprocessing import in_units
from scoring import Trained
from segments import Video, read_features, segments

FACE = 96                     # side of a thumbnail, in pixels


class Example(NamedTuple):
    """A validation video of one task, predicted."""
    name: str
    task: Task
    labels: np.ndarray        # (T, K), or (T,) where a label is one class; NaN = not annotated
    values: np.ndarray        # (T, K) in units (postprocessing.py)
    sums: np.ndarray          # of the task's metric
    labelled: int             # frames with a label
    score: float              # its own; NaN without a label


class Segment(NamedTuple):
    """A part of an example: frames start to end, counted from 0, end excluded."""
    example: Example
    start: int
    end: int
    error: float              # VA: root of the mean squared error; Expr, AU: share of wrong labels


# ---- Videos

def predicted(trained: Trained, video: Video) -> Example:
    """The outputs for one validation video beside its labels."""
    task = trained.task
    outputs = trained.predict(read_features(video.features, 0, len(video.labels)))            # (T, K)
    target, valid = targets(video.labels, task)
    sums = task.metric.count(outputs, target, valid)
    return Example(video.name, task, np.where(valid, target, np.nan), in_units(outputs, task), sums,
                   int(valid.reshape(-1, task.width).any(axis=1).sum()), own_score(task, sums))


def own_score(task: Task, sums: np.ndarray) -> float:
    """The mean score of the outputs that are labelled in this video; NaN if none is."""
    occurs = task.metric.labelled(sums)[:, 0] > 0                                             # (K,)
    return float(task.metric.score(sums)[occurs].mean()) if occurs.any() else np.nan


def chosen(examples: dict[str, dict[str, Example]], window: int, wanted=()) -> list[tuple[str, str]]:
    """(why, name) of the videos to show. examples: {task: {video: example}}; `wanted`: their names instead.

    Raises ValueError if a wanted video is not a validation video of any of the tasks.
    """
    names = sorted({name for videos in examples.values() for name in videos})
    if wanted:
        for name in wanted:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
                raise ValueError(f"--videos: {name!r} is none of the {len(names)} predicted validation "
                                 f"videos; nearest: {', '.join(near)}")
        return [("chosen", name) for name in dict.fromkeys(wanted)]

    def of(name):
        return [videos[name] for videos in examples.values() if name in videos]

    most = max((len(of(name)) for name in names), default=0)
    complete = [name for name in names if len(of(name)) == most and not np.isnan(score_of(of(name)))]
    long = [name for name in complete if all(example.labelled >= window for example in of(name))]
    order = sorted(long or complete, key=lambda name: -score_of(of(name)))
    if len(order) < 3:
        return list(zip(("best", "worst") if len(order) == 2 else ("only",), order))
    return [("best", order[0]), ("median", order[(len(order) - 1) // 2]), ("worst", order[-1])]


def score_of(examples: list[Example]) -> float:
    """The mean of a video's own scores over the tasks."""
    return float(np.mean([example.score for example in examples]))


# ---- Segments

def errors(example: Example) -> np.ndarray:
    """Of each label: VA the squared error, Expr and AU 1 where the prediction is wrong, NaN without a label.
    -> (T, K), or (T, 1) where a label is one class"""
    labels, values = example.labels, example.values
    if example.task.one_class:
        wrong = (values.argmax(axis=1) != labels)[:, None]                                    # (T,) -> (T, 1)
        return np.where(np.isnan(labels)[:, None], np.nan, wrong)
    if example.task.metric is CCC:
        return (values - labels) ** 2
    return np.where(np.isnan(labels), np.nan, (values > 0.5) != (labels > 0.5))


def worst_segments(examples, window: int, stride: int, count: int = 5) -> list[Segment]:
    """The segments with the largest errors, as the videos are cut for the model. None shares frames with a
    worse one, and of each at least half the frames of a window have a label."""
    found = []
    for example in examples:
        wrong = errors(example)
        for start, end in segments(len(wrong), window, stride):
            part = wrong[start:end]
            if (~np.isnan(part)).any(axis=1).sum() * 2 >= window:
                error = float(np.nanmean(part))
                error = error ** 0.5 if example.task.metric is CCC else error
                found.append(Segment(example, start, end, error))
    found.sort(key=lambda segment: (-segment.error, segment.example.name, segment.start))
    worst = []
    for segment in found:
        shares = any(other.example is segment.example and segment.start < other.end
                     and other.start < segment.end for other in worst)
        if not shares and len(worst) < count:
            worst.append(segment)
    return worst


def in_words(segment: Segment) -> list[str]:
    """What the labels say and what was predicted, over the labelled frames of a segment."""
    example, part = segment.example, slice(segment.start, segment.end)
    labels, values, names = example.labels[part], example.values[part], example.task.outputs
    if example.task.one_class:
        known = ~np.isnan(labels)
        words = []
        for what, classes in (("label", labels[known].astype(int)),
                              ("prediction", values[known].argmax(axis=1))):
            count = np.bincount(classes, minlength=len(names))
            words.append(f"{what} mostly {names[count.argmax()]} ({percent(count.max() / known.sum())})")
        return words
    known = ~np.isnan(labels)
    if example.task.metric is CCC:
        return [f"{name}: mean label {labels[known[:, k], k].mean():.2f}, "
                f"prediction {values[known[:, k], k].mean():.2f}"
                for k, name in enumerate(names) if known[:, k].any()]
    share = np.nan_to_num([errors(example)[part][known[:, k], k].mean() if known[:, k].any() else 0
                           for k in range(len(names))])
    return [f"{names[k]}: labelled in {percent(labels[known[:, k], k].mean())}, "
            f"predicted in {percent((values[known[:, k], k] > 0.5).mean())}"
            for k in np.argsort(-share, kind="stable")[:3] if share[k] > 0]


# ---- Faces

class Faces:
    """Thumbnails of the videos' frames. Where the frames lie elsewhere there are none: `problem` says why."""

    def __init__(self, roots):
        self.folders, self.opened, self.problem = {}, {}, ""
        try:
            self.folders = find_videos(roots)
        except (ValueError, OSError) as error:
            self.problem = str(error)

    def between(self, name: str, start: int, end: int, count: int) -> list[tuple]:
        """`count` frames, evenly spread over start to end: the one nearest to the middle of each part, as
        (its number, uint8 (FACE, FACE, 3)); (the middle's number, None) if the part has no readable face."""
        count = min(count, end - start)
        edges = start + np.arange(count + 1) * (end - start) // count
        return [self.nearest(name, int(a), int(b)) for a, b in zip(edges, edges[1:])]

    def nearest(self, name: str, start: int, end: int) -> tuple:
        """As above, for one part."""
        middle = (start + end - 1) // 2 + 1                                  # a number, counted from 1
        frames = self.frames(name)
        if frames is None:
            return middle, None
        inside = np.flatnonzero((frames.numbers > start) & (frames.numbers <= end))
        for i in sorted(inside, key=lambda i: abs(frames.numbers[i] - middle))[:5]:
            images, _, _ = frames.collate([frames[int(i)]])                  # none if it cannot be read
            if len(images):
                return int(frames.numbers[i]), images[0].numpy()
        return middle, None

    def frames(self, name: str) -> VideoFrames | None:
        if name not in self.opened:
            try:
                self.opened[name] = VideoFrames(self.folders[name], FACE)
            except (KeyError, ValueError, OSError):
                self.opened[name] = None
        return self.opened[name]
