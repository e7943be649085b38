"""Aff-Wild2: frames with their labels, and what a copy of it holds (paper §4.1.2).

The folders of the videos are found in `frames.py`, which videos train and which validate in `splits.py`; the
still-face sets of pre-training are in `faces.py`, the features of whole videos in `segments.py`.
Layouts, and counts to check a copy against: docs/data.md.

    python data.py --config my.yaml      # what is found in your copy: videos, frames, labels per class
"""

import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from config import from_command_line, print_all
from frames import list_frames, video_folders
from images import FaceImages, listed, read_image, resize, sizes
from labels import EXPR, TASKS, has_labels, label_files, read_labels, targets

# ---- Images to train on

class ExprFrames(FaceImages):
    """Single frames with an expression label and a face image, for fine-tuning (§3.1).

    Item: uint8 image (size, size, 3) and its class. Neighbouring frames are all but equal, so an epoch
    takes each `every`-th frame, from another offset each time. `crop(image, sample, epoch)` cuts the image
    to size; without it the whole image is resized.
    """

    def __init__(self, files: dict[str, Path], videos: dict[str, Path], size: int, every: int = 1, crop=None):
        super().__init__(size, torch.zeros(0, dtype=torch.long))
        self.every, self.crop, self.epoch = every, crop, 0
        self.videos, self.folders, self.without_frames, rows = [], [], [], []
        for video, file in files.items():
            labels = read_labels(file, EXPR)
            numbers = np.zeros(0, np.int64)
            if video in videos:
                numbers, names, _ = list_frames(videos[video])
            if not len(numbers):
                self.without_frames.append(video)
                continue
            numbers = numbers[numbers <= len(labels)]
            classes = labels[numbers - 1]
            numbers, classes = numbers[classes != EXPR.invalid], classes[classes != EXPR.invalid]
            rows.append(np.stack([np.full(len(numbers), len(self.folders)), numbers, classes], axis=1))
            self.videos.append(video)
            self.folders.append(names)
        # (frames, 3): which video, which number, which class. An array, because worker processes share it.
        self.rows = np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 3), np.int32)
        if not len(self.rows):
            raise ValueError("no frame has both an expression label and an image: "
                             f"{len(files)} label files, {len(self.without_frames)} of them without frames; "
                             "check data.labels and data.frames")

    def fingerprint(self) -> str:
        """Which frames with which labels, for made_of.py; of the images the size of each video's first."""
        crc = zlib.crc32(self.rows.tobytes(), zlib.crc32("\n".join(self.videos).encode()))
        _, first = np.unique(self.rows[:, 0], return_index=True)             # the first row of each video
        images = sizes(self.folders[video].path(number) for video, number, _ in self.rows[first])
        return f"{len(self.rows):,} frames of {len(self.videos)} videos, checksum {crc:08x}, sizes {images}"

    def summary(self) -> str:
        """How many frames of how many videos, and which videos are left out."""
        left_out = f"; left out, no frames: {', '.join(self.without_frames)}" if self.without_frames else ""
        return (f"{len(self.rows):,} labelled frames with a face image in {len(self.folders)} videos"
                f"{left_out}")

    def __len__(self):
        return math.ceil(len(self.rows) / self.every)    # rounded up, so that the last few have their turn

    def row(self, i):
        return self.rows[(i * self.every + self.epoch % self.every) % len(self.rows)]

    def where(self, i) -> str:
        video, number, _ = self.row(i)
        return self.folders[video].path(number)

    def item(self, i):
        image = read_image(self.where(i))
        pixels = self.crop(image, i, self.epoch) if self.crop else resize(image, self.size)
        return pixels, self.row(i)[2]


class VideoFrames(FaceImages):
    """One video's face images. Item: uint8 image (size, size, 3), its row (number - 1)."""

    def __init__(self, folder, size: int):
        super().__init__(size, torch.zeros(0, dtype=torch.long))
        self.numbers, self.files, _ = list_frames(folder)

    def __len__(self):
        return len(self.numbers)

    def where(self, i) -> str:
        return self.files.path(self.numbers[i])

    def item(self, i):
        return resize(read_image(self.where(i)), self.size), self.numbers[i] - 1


# ---- What is there

def describe_frames(frames) -> tuple[dict[str, np.ndarray], list[str]]:
    """{video: numbers of its frames} of all videos that have some, and lines about what was found.

    Raises ValueError if no folder holds a frame.
    """
    videos, lines = video_folders(frames)
    numbers, beside, unread = {}, Counter(), []
    for video, folder in videos.items():
        found, _, others = list_frames(folder)
        beside.update(others)
        if len(found):
            numbers[video] = found
        elif others:
            unread.append(f"{video} ({listed(others, 3)})")
    if beside:
        lines.append(f"  not read, as no frame (00001.jpg, ...): {listed(beside)}")
    if unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        lines.append(f"  folders without a frame that are not empty: {', '.join(unread[:5])}{more}")
    if not numbers:
        raise ValueError("\n".join([f"data.frames: {len(videos)} folders, none of which holds a frame; "
                                    "expected <video>/00001.jpg", *lines]))
    count = sum(map(len, numbers.values()))
    return numbers, [f"{len(numbers)} videos with frames, {count:,} face images", *lines]


def describe(frames, labels):
    """Yield lines that tell what a copy of Aff-Wild2 holds, to compare with the counts in docs/data.md.

    Raises ValueError, at its end, if no labelled frame has a face image.
    """
    numbers, lines = describe_frames(frames)
    yield from lines
    tasks, usable = [task for task in TASKS.values() if has_labels(labels, task)] or list(TASKS.values()), 0
    for task in tasks:
        for name, files in label_files(labels, task).items():
            rows, with_face = [], []
            for video, file in files.items():
                rows.append(read_labels(file, task))
                with_face.append(np.isin(np.arange(1, len(rows[-1]) + 1), numbers.get(video, [])))
            rows, with_face = np.concatenate(rows), np.concatenate(with_face)
            valid = targets(rows, task)[1].reshape(-1, task.width).all(axis=1)     # (T, ...) -> (T,)
            usable += (valid & with_face).sum()
            without_frames = sum(video not in numbers for video in files)
            yield (f"{task.name:5s}{name:15s}{len(files):4d} videos, {len(rows):9,d} frames, "
                   f"{valid.sum():9,d} fully labelled, {(valid & with_face).sum():9,d} of them with a face; "
                   f"{without_frames} videos without frames")
            if task.whole_numbers:
                counts = [(rows == k).sum() if task.one_class else (rows[:, k] == 1).sum()
                          for k in range(len(task.outputs))]
                yield "      " + ", ".join(f"{name} {count:,}" for name, count in zip(task.outputs, counts))
    if not usable:
        raise ValueError("no labelled frame has a face image, so there is nothing to train on; "
                         "a label file is named after its video's folder")


if __name__ == "__main__":
    config = from_command_line(__doc__)[0]
    print_all(describe(config.data.frames, config.data.labels))
