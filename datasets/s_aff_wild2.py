"""s-Aff-Wild2: single frames of Aff-Wild2 with labels of all three tasks (ABAW 4, 7 and 11).

Valence, arousal, the expression and each AU may be missing, each for itself. Layout and counts: docs/data.md.

    python -m datasets.s_aff_wild2 FILE     # what training_set_annotations.txt or validation_... holds
"""

import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from data import Frames
from datasets.faces import MOST_MISSING
from engine.config import print_all
from images import check_ends, last_of, listed
from labels import AU, EXPR, VA, read_lines, split_name

# What stands in a row after the frame's path: a name, and the task whose codes it has.
COLUMNS = [*((name, VA) for name in VA.outputs), ("expression", EXPR), *((name, AU) for name in AU.outputs)]
FILES = "training_set_annotations.txt", "validation_set_annotations.txt"
HEADER = "image,valence,arousal,expression,aus"              # `aus` stands for 12 columns, which may be named
HEADERS = HEADER, ",".join(["image", *(name.lower() for name, _ in COLUMNS)])


def split_labels(labels):
    """Labels of rows, an array or a tensor (..., 15) -> VA (..., 2), expression (...), AUs (..., 12)."""
    return labels[..., :2], labels[..., 2], labels[..., 3:]


def annotated(labels) -> np.ndarray:
    """Where a label is not the code for a missing one. Shape: (n, 15) -> (n, 15) bool."""
    return labels != np.array([task.invalid for _, task in COLUMNS])


def pos_weight(labels) -> torch.Tensor:
    """The weight of each AU's positives in EMMA's loss: negatives / positives, or 1 where one of both is
    missing, as 0 or infinity would keep the AU from being learned. Shape: (n, 15) -> (12,) float32."""
    negatives, positives = ((split_labels(labels)[2] == code).sum(axis=0) for code in (0, 1))
    both = (positives > 0) & (negatives > 0)
    return torch.from_numpy(np.where(both, negatives / np.maximum(positives, 1), 1).astype(np.float32))


class Annotations(NamedTuple):
    """The n frames of a file, each once, in its order."""
    path: str
    videos: list[str]
    frames: np.ndarray             # (n, 2): which video, and the number of the frame in it, from 1
    labels: np.ndarray             # (n, 15) float32: valence, arousal, expression, 12 AUs; codes of labels.py
    repeated: int                  # rows that say again what an earlier one says


def read_annotations(path) -> Annotations:
    """A file of s-Aff-Wild2: a header, then a row per frame; one that is there twice is taken once. Raises
    ValueError naming file and line for a wrong header, a row of another length, without a frame, or with a
    value that its task does not have, and for a frame that comes again with other labels."""
    lines, videos, rows = read_lines(path, HEADER) or [""], {}, {}
    if lines[0].lower().replace(" ", "") not in HEADERS:
        raise ValueError(f"{path}, line 1: header is {lines[0][:200]!r}, expected {HEADER!r}")
    for at, line in enumerate(lines[1:], start=2):
        try:
            name, *fields = line.split(",")
            (video, number), labels = split_name(name.strip()), [float(field) for field in fields]
            wrong = [f"{name} {x}" for x, (name, task) in zip(labels, COLUMNS) if x != task.invalid
                     and not (task.lowest <= x <= task.highest and (task is VA or x.is_integer()))]
            if wrong or len(labels) != len(COLUMNS) or not number or "/" in video or video in (".", ".."):
                raise ValueError(f"got {', '.join(wrong) or line[:80]!r}, expected <video>/00001.jpg, VA "
                                 "from -1 to 1 (or -5), a class from 0 to 7 (or -1), 12 AUs of 0 or 1 "
                                 "(or -1)")
            known, before = rows.setdefault((videos.setdefault(video, len(videos)), number), (labels, at))
            if known != labels:
                raise ValueError(f"{name} has other labels than in line {before}; keep the right row")
        except ValueError as error:
            raise ValueError(f"{path}, line {at}: {error}") from None
    frames = np.array(list(rows), np.int32).reshape(-1, 2)
    labels = np.array([labels for labels, _ in rows.values()], np.float32).reshape(-1, len(COLUMNS))
    return Annotations(str(path), list(videos), frames, labels, len(lines) - 1 - len(rows))


def describe(found: Annotations) -> str:
    """Lines that tell what a file holds, to compare with the counts in docs/data.md."""
    given, (_, classes, aus) = annotated(found.labels), split_labels(found.labels)
    va, expr, au = split_labels(given)
    partly = [(part.any(axis=1) & ~part.all(axis=1)).sum() for part in (va, au)]
    expressions = [f"{name} {(classes == k).sum():,}" for k, name in enumerate(EXPR.outputs)]
    weights = zip(AU.outputs, (aus == 1).sum(axis=0), pos_weight(found.labels).tolist())
    present = [f"{name} {count:,} ({weight:.2f})" for name, count, weight in weights]
    return (f"{found.path}: {len(given):,} frames of {len(found.videos):,} videos, {given.any(1).sum():,} of "
            f"them with a label; {found.repeated:,} rows that repeat an earlier one\n"
            f"  va    {va.all(axis=1).sum():,} frames, {partly[0]:,} more with one of both\n"
            f"  expr  {expr.sum():,} frames: {', '.join(expressions)}\n"
            f"  au    {au.all(axis=1).sum():,} frames, {partly[1]:,} more with some of them; "
            f"present (weight of its positives): {', '.join(present)}")


class LabelledFrames(Frames):
    """The frames of a file that have a label and a face image. `given`: {video: its VideoFrames}.

    `labels` (n, 15), with the codes of what is missing. `video` (n,): which of `videos`; `used`: those with
    frames. `skipped` {reason: count}. Raises ValueError if nothing, or nearly no image is there, or as
    `check_ends`."""

    def __init__(self, found: Annotations, given: dict):
        files = {video: given[video] for video in found.videos if video in given}
        self.without = [video for video in found.videos if video not in files]
        there, last = np.zeros(len(found.frames), bool), {}
        for v, video in enumerate(found.videos):
            of_video = found.frames[:, 0] == v
            numbers, last[video] = found.frames[of_video, 1], int(found.frames[of_video, 1].max())
            there[of_video] = np.isin(numbers, files[video].numbers if video in files else [])
        self.lines = check_ends(last_of(files), last, 0.55, 1.8)   # a list may end before its video
        labelled = annotated(found.labels).any(axis=1)
        absent = [f"{found.videos[v]}/{number:05d}.jpg" for v, number in found.frames[labelled & ~there]]
        if len(absent) > MOST_MISSING * labelled.sum() or not labelled.any():
            example = f", such as {absent[0]}; check data.frames" if absent else ""
            raise ValueError(f"{found.path}: {labelled.sum():,} frames with a label, {len(absent):,} of them "
                             f"without an image{example}")
        kept = labelled & there
        super().__init__(found.videos, list(map(files.get, found.videos)), found.frames[kept],
                         found.labels[kept])
        self.video = self.rows[:, 0]
        self.used = [found.videos[v] for v in np.unique(self.video)]
        self.skipped = +Counter({"image not on disk": len(absent), "no label": int((~labelled).sum()),
                                 "repeats an earlier row": found.repeated})

    def summary(self) -> str:
        """How many frames of how many videos, what is left out, and what is odd."""
        without = f"; videos without frames: {', '.join(self.without)}" if self.without else ""
        line = (f"{len(self):,} frames with a label and a face image in {len(self.used)} videos; left out: "
                f"{listed(self.skipped)}{without}")
        return "\n".join([line, *self.lines])


if __name__ == "__main__":
    print_all(describe(read_annotations(path)) for path in sys.argv[1:])
