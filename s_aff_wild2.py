"""s-Aff-Wild2: single frames of Aff-Wild2 with labels of all three tasks (ABAW 4, 7 and 11).

One text file holds the training frames, another the validation frames. A row is partly labelled: valence,
arousal, the expression and each action unit may be missing, each for itself. Reading order: the file, what
it holds, the images to train on. Layout, and counts to check a copy against: docs/data.md.

    python s_aff_wild2.py FILE     # what training_set_annotations.txt or validation_set_annotations.txt holds
"""

import math
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from face_set import MOST_MISSING
from frames import frame_number, list_frames
from images import FaceImages, listed, read_image, resize, sizes
from labels import AU, EXPR, VA, read_lines

# What stands in a row after the frame's path: a name, and the task whose codes it has.
COLUMNS = [*((name, VA) for name in VA.outputs), ("expression", EXPR), *((name, AU) for name in AU.outputs)]
FILES = "training_set_annotations.txt", "validation_set_annotations.txt"
HEADER = "image,valence,arousal,expression,aus"                  # `aus` stands for 12 columns
HEADERS = (HEADER.split(","), ["image", *(name.lower() for name, _ in COLUMNS)])


def split_labels(labels):
    """Labels as they stand in a row -> those of each task. An array or a tensor.

    Shape: (..., 15) -> valence and arousal (..., 2), expression (...), AUs (..., 12).
    """
    return labels[..., :2], labels[..., 2], labels[..., 3:]


# ---- A file

class Annotations(NamedTuple):
    """The n frames of a file, each once, in its order."""
    path: str
    videos: list[str]
    frames: np.ndarray             # (n, 2): which video, and the number of the frame in it, from 1
    labels: np.ndarray             # (n, 15) float32: valence, arousal, expression, 12 AUs; codes of labels.py
    repeated: int                  # rows that say again what an earlier one says


def read_row(line: str, where: str) -> tuple[str, int, list[float]]:
    """A row -> the video, the number of the frame, and its 15 labels. Raises ValueError for a fault."""
    fields = line.split(",")
    if len(fields) != 1 + len(COLUMNS):
        raise ValueError(f"{where}: {len(fields)} fields {line[:80]!r}, expected {1 + len(COLUMNS)}: "
                         "the frame, valence, arousal, an expression, 12 AUs")
    video, _, file = fields[0].strip().rpartition("/")
    number = frame_number(file)
    if not number or video in ("", ".", "..") or "/" in video:
        raise ValueError(f"{where}: got the frame {fields[0][:80]!r}, expected <video>/00001.jpg")
    labels = []
    for (name, task), field in zip(COLUMNS, fields[1:]):
        try:
            value = float(field)
        except ValueError:
            value = math.nan                                                 # which fits no range
        fits = task.lowest <= value <= task.highest or value == task.invalid
        if not fits or task is not VA and not value.is_integer():
            kind = "a number" if task is VA else "a whole number"
            raise ValueError(f"{where}: got {name} {field[:40]!r}, expected {kind} from {task.lowest} to "
                             f"{task.highest}, or {task.invalid} where it is not annotated")
        labels.append(value)
    return video, number, labels


def read_annotations(path) -> Annotations:
    """A file of s-Aff-Wild2: a header line, then a row per frame.

    Some rows of the real files are there twice; each is taken once. CRLF, a byte-order mark and blank lines
    at the end are accepted. Raises ValueError naming file and line for a wrong header, a short or long row, a
    row without a frame, text for a number, a value that the task does not have, and a frame that comes again
    with other labels; OSError naming the file if the disk fails.
    """
    lines = read_lines(path, HEADER)
    header = [name.strip().lower() for name in lines[0].split(",")] if lines else []
    if header not in HEADERS:
        raise ValueError(f"{path}, line 1: header is {','.join(header)[:200]!r}, expected {HEADER!r}")
    videos: dict[str, int] = {}
    rows: dict[tuple[int, int], tuple] = {}              # (which video, number) -> labels, line
    for at, line in enumerate(lines[1:], start=2):
        video, number, labels = read_row(line, f"{path}, line {at}")
        frame = videos.setdefault(video, len(videos)), number
        known, before = rows.setdefault(frame, (labels, at))
        if known != labels:
            raise ValueError(f"{path}, line {at}: frame {number} of {video} has other labels than in line "
                             f"{before}; keep the right one of the two rows")
    frames = np.array(list(rows), np.int32).reshape(-1, 2)
    labels = np.array([labels for labels, _ in rows.values()], np.float32).reshape(-1, len(COLUMNS))
    return Annotations(str(path), list(videos), frames, labels, len(lines) - 1 - len(rows))


# ---- What it holds

def annotated(labels) -> np.ndarray:
    """Where a label is not the code for a missing one. Shape: (n, 15) -> (n, 15) bool."""
    return labels != np.array([task.invalid for _, task in COLUMNS])


def au_counts(labels) -> tuple[np.ndarray, np.ndarray]:
    """Frames in which an AU is present, and absent. Shape: (n, 15) -> two of (12,)."""
    aus = split_labels(labels)[2]
    return (aus == 1).sum(axis=0), (aus == 0).sum(axis=0)


def pos_weight(labels) -> torch.Tensor:
    """The weight of each AU's positives in EMMA's loss: negatives / positives of the training file.

    An AU of which one of both is missing has weight 1: there is nothing to balance, and 0 or infinity would
    keep it from being learned. Shape: labels (n, 15) -> (12,).
    """
    positives, negatives = au_counts(labels)
    both = (positives > 0) & (negatives > 0)
    weights = np.where(both, negatives / np.maximum(positives, 1), 1.0)
    return torch.from_numpy(weights.astype(np.float32))


def describe(found: Annotations) -> str:
    """Lines that tell what a file holds, to compare with the counts in docs/data.md."""
    labels, given = found.labels, annotated(found.labels)
    va, expr, au = split_labels(given)
    classes = split_labels(labels)[1]
    positives, _ = au_counts(labels)
    expressions = ", ".join(f"{name} {(classes == k).sum():,}" for k, name in enumerate(EXPR.outputs))
    aus = ", ".join(f"{name} {positives[k]:,} ({weight:.2f})"
                    for k, (name, weight) in enumerate(zip(AU.outputs, pos_weight(labels).tolist())))
    partly = [(part.any(axis=1) & ~part.all(axis=1)).sum() for part in (va, au)]
    return (f"{found.path}: {len(labels):,} frames of {len(found.videos):,} videos, "
            f"{given.any(axis=1).sum():,} of them with a label; "
            f"{found.repeated:,} rows that repeat an earlier one\n"
            f"  va    {va.all(axis=1).sum():,} frames, {partly[0]:,} more with one of both\n"
            f"  expr  {expr.sum():,} frames: {expressions}\n"
            f"  au    {au.all(axis=1).sum():,} frames, {partly[1]:,} more with some of them; "
            f"present (weight of its positives): {aus}")


# ---- Images to train on

class MultiTaskFrames(FaceImages):
    """The frames of a file that have a label and a face image.

    Item: uint8 image (size, size, 3); its labels (15,) float32 with the codes of what is missing, see
    `split_labels`; which of `self.videos` it belongs to. `crop(image, sample, epoch)` cuts the image to size;
    without it the whole image is resized. `videos` {video: folder of its frames}, as frames.find_videos gives
    it. What is left out is counted in `skipped`, by its reason. Raises ValueError if nothing is left, or if
    nearly no image is there.
    """

    def __init__(self, found: Annotations, videos: dict[str, Path], size: int, crop=None):
        super().__init__(size, torch.zeros(0, len(COLUMNS)), torch.zeros(0, dtype=torch.long))
        self.crop, self.epoch, self.videos = crop, 0, found.videos
        self.folders, self.without_frames, there = [], [], np.zeros(len(found.frames), bool)
        for v, video in enumerate(found.videos):
            numbers, names = [], None
            if video in videos:
                numbers, names, _ = list_frames(videos[video])
            if not len(numbers):
                self.without_frames.append(video)
            self.folders.append(names)
            of_video = found.frames[:, 0] == v
            there[of_video] = np.isin(found.frames[of_video, 1], numbers)
        labelled = annotated(found.labels).any(axis=1)
        if not labelled.any():
            raise ValueError(f"{found.path}: none of its {len(labelled):,} frames has a label")
        absent = found.frames[labelled & ~there]
        self.absent = [f"{found.videos[v]}/{number:05d}.jpg" for v, number in absent[:4]]     # for messages
        if len(absent) > MOST_MISSING * labelled.sum():
            raise ValueError(f"{found.path}: {len(absent):,} of the {labelled.sum():,} images that it names "
                             f"are not there; looked for {self.absent[0]}; check data.frames")
        reasons = {"image not on disk": len(absent), "no label": int((~labelled).sum()),
                   "repeats an earlier row": found.repeated}
        self.skipped = Counter({reason: count for reason, count in reasons.items() if count})
        self.frames, self.labels = found.frames[labelled & there], found.labels[labelled & there]

    def fingerprint(self) -> str:
        """Which frames with which labels, for made_of.py; of the images the size of each video's first."""
        crc = zlib.crc32("\n".join(self.videos).encode())
        for part in (self.frames, self.labels):
            crc = zlib.crc32(part.tobytes(), crc)
        _, first = np.unique(self.frames[:, 0], return_index=True)           # the first row of each video
        images = sizes(self.where(i) for i in first)
        return f"{len(self):,} frames of {len(first)} videos, checksum {crc:08x}, sizes {images}"

    @property
    def used(self) -> list[str]:
        """The videos of which there are frames."""
        return [self.videos[v] for v in np.unique(self.frames[:, 0])]

    def summary(self) -> str:
        """How many frames of how many videos, and what is left out."""
        text = f"{len(self):,} frames with a label and a face image in {len(self.used)} videos"
        if self.skipped:
            text += f"; left out: {listed(self.skipped)}"
        if self.absent:
            text += f"; not on disk: {', '.join(self.absent[:3])}{', ...' if len(self.absent) > 3 else ''}"
        if self.without_frames:
            text += f"; videos without frames: {', '.join(self.without_frames)}"
        return text

    def __len__(self):
        return len(self.frames)

    def where(self, i) -> str:
        video, number = self.frames[i]
        return self.folders[video].path(number)

    def item(self, i):
        image = read_image(self.where(i))
        pixels = self.crop(image, i, self.epoch) if self.crop else resize(image, self.size)
        return pixels, self.labels[i], self.frames[i, 0]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(__doc__)
    refused = False
    for path in sys.argv[1:]:
        try:
            print(describe(read_annotations(path)))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            refused = True
    sys.exit(2 if refused else 0)
