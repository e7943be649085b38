"""Batches of face images, the frames of videos, feature files, and the segments that videos are cut into
(paper §3.2, §4.1.2).

Which videos train and which validate: labels.py. Still faces: datasets/faces.py. Layouts, and counts to check
a copy against: docs/data.md.

    python data.py --config my.yaml      # what is found in your copy: videos, frames, labels per class
    python data.py                       # of the demo; and how videos are cut with w = 300, s = 200
"""

import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from engine.checkpoints import read_json
from engine.config import from_command_line, print_all
from engine.training import generator
from images import (Files, VideoFrames, check_ends, find_videos, last_of, listed, random_crop, resize,
                    sizes)
from labels import (EXPR, TASKS, Task, has_labels, label_files, longest, occurrences, read_labels, split,
                    targets)

KEPT_PIXELS = 64_000_000       # of the images that `Images` keeps: 256 MB
AGAIN = "delete it and run extract_features.py again"


# ---- Batches of images

class Frames(Files):
    """Single frames, n of several videos, with `labels` (n, ...): `rows` (n, 2) says which video, and which
    number in it."""

    def __init__(self, videos: list[str], folders: list[VideoFrames], rows: np.ndarray, labels: np.ndarray):
        self.videos, self.folders, self.labels = videos, folders, labels
        self.rows, self.numbers = rows, rows[:, 1]

    def where(self, i) -> str:
        video, number = self.rows[i]
        return self.folders[video].where(np.searchsorted(self.folders[video].numbers, number))

    def fingerprint(self) -> str:
        """Which frames with which labels, for the record; of the images the size of each video's first."""
        crc = zlib.crc32("\n".join(self.videos).encode())
        crc = zlib.crc32(self.rows.tobytes() + self.labels.tobytes(), crc)
        _, first = np.unique(self.rows[:, 0], return_index=True)             # the first row of each video
        return f"{len(self):,} frames, checksum {crc:08x}, sizes {sizes(self.where(i) for i in first)}"


def expr_frames(files: dict[str, Path], videos: dict[str, VideoFrames]) -> tuple[Frames, list[str]]:
    """The frames that have an expression label and an image, for fine-tuning (§3.1), and lines about the
    rest. Raises ValueError if there is no such frame."""
    found = {video: videos[video] for video in files if video in videos}
    labels, rows, classes = {video: read_labels(file, EXPR) for video, file in files.items()}, [], []
    for which, (video, frames) in enumerate(found.items()):
        labelled = np.flatnonzero(labels[video] != EXPR.invalid) + 1
        numbers = np.intersect1d(frames.numbers, labelled)
        rows.append(np.stack([np.full_like(numbers, which), numbers], axis=1).astype(np.int32))
        classes.append(labels[video][numbers - 1])
    without = [video for video in files if video not in found]
    lines = [f"  left out, no frames: {', '.join(without)}"] if without else []
    if not sum(map(len, rows)):
        raise ValueError(f"no frame has both an expression label and an image: {len(files)} label files, "
                         f"{len(without)} of them without frames; check data.labels and data.frames")
    return Frames(list(found), list(found.values()), np.concatenate(rows), np.concatenate(classes)), lines


class Images(Dataset):
    """Images, and what stands beside each, to train on or to go over.

    files: has len, where(i) -> a name for messages, read(i) -> a Pillow image. columns: arrays (n, ...).
    Item i of an epoch is row r = order(epoch)[i], by default r = i: uint8 (size, size, 3), then column[r] of
    each column, then noise, if its shape is given. With a `seed`, to train: a random crop of at least
    `smallest` of the image's area, flipped or not, and random noise in [0, 1), all a function of (seed,
    epoch, i). Without one: the whole image, and zeros. Run sets `epoch`. Without workers an image is decoded
    once and kept, until 256 MB are full.
    """

    def __init__(self, files, size: int, columns=(), seed: int | None = None, smallest: float = 1.0,
                 noise: tuple | None = None, order=None):
        self.files, self.size, self.columns, self.noise = files, (size, size), columns, noise
        self.seed, self.smallest, self.order, self.epoch = seed, smallest, order, 0
        self.kept, self.kept_pixels = {}, 0                      # {row: its image, decoded}

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int):
        self._epoch = epoch
        self.rows = range(len(self.files)) if self.order is None else self.order(epoch)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """The item; None if its image cannot be read, which is said in the first epoch."""
        r, rng = self.rows[i], generator(self.seed or 0, self.epoch, i)
        try:
            image = self.kept.get(r) or self.files.read(r)
        except ValueError as problem:
            if self.epoch == 0:
                print(f"  left out: {problem}", flush=True)
            return None
        if self.kept_pixels < KEPT_PIXELS and r not in self.kept and get_worker_info() is None:
            self.kept[r], self.kept_pixels = image, self.kept_pixels + image.width * image.height
        train = self.seed is not None
        pixels = random_crop(image, self.size, rng, self.smallest) if train else resize(image, self.size)
        return pixels, *self.beside(r, rng if train else None)

    def beside(self, r, rng=None) -> list:
        """What stands beside the image of row r: the columns, and noise from `rng` or zeros."""
        noise = [] if self.noise is None else [
            rng.random(self.noise, np.float32) if rng else np.zeros(self.noise, np.float32)]
        return [column[r] for column in self.columns] + noise

    def collate(self, items):
        """-> [images (B, size, size, 3) uint8, each column (B, ...), noise (B, ...)], of the readable ones; B
        may be 0. Integers become int64."""
        # As tensors, they cross to the training process in shared memory. As arrays they would go through a
        # pipe, and a worker whose parent was killed would be stuck in it for ever.
        readable = [item for item in items if item is not None]
        like = np.zeros((*self.size, 3), np.uint8), *self.beside(0)              # for a batch without any
        columns = [np.stack(column)[:len(readable)] for column in zip(*(readable or [like]))]
        tensors = [torch.from_numpy(column) for column in columns]
        return [x.long() if x.dtype in (torch.int8, torch.int32) else x for x in tensors]


def every_kth(n: int, k: int, epoch: int) -> np.ndarray:
    """An order of n rows for `Images`: each k-th, from another offset in each epoch, because neighbouring
    frames are all but equal. Rounded up, so that the last few have their turn."""
    return (np.arange(-(-n // k)) * k + epoch % k) % n


def some_faces(frames: VideoFrames, numbers, size: int) -> list[tuple[int, np.ndarray]]:
    """(number, uint8 (size, size, 3)) of those of a video's frames that are there and readable."""
    found = []
    for i in np.flatnonzero(np.isin(frames.numbers, numbers)):
        with suppress(ValueError):
            found.append((int(frames.numbers[i]), resize(frames.read(i), (size, size))))
    return found


# ---- Feature files

def noface_path(path) -> Path:
    """<video>.npy -> <video>.noface.npy: bool (frames,), True where there was no readable face image."""
    return Path(path).with_suffix(".noface.npy")


def open_features(path) -> np.ndarray:
    """A feature file, memory-mapped: (frames, D), of which only what is used is read. Raises ValueError that
    names it if it holds anything else."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:     # the header is Python source: a broken one raises more than ValueError
        problem = ValueError(f"{path}: not a plain feature array ({error}); {AGAIN}")
        raise error if isinstance(error, OSError) else problem from None
    if array.dtype.kind != "f" or not array.dtype.isnative or array.ndim != 2:
        raise ValueError(f"{path}: not a plain feature array ({array.dtype} {array.shape}), expected "
                         f"(frames, D); {AGAIN}")
    return array


def read_features(path, start: int = 0, end: int | None = None) -> np.ndarray:
    """Frames start to end of a feature file, float16 (T, D). Raises ValueError as `open_features`, and for
    NaN or infinity."""
    part = np.array(open_features(path)[start:end])
    if not np.isfinite(part).all():
        raise ValueError(f"{path}: NaN or infinity in frames {start + 1} to {start + len(part)}; {AGAIN}")
    return part


@dataclass
class Video:
    """One labelled video of one task, and the file that holds its features."""
    name: str
    features: Path
    labels: np.ndarray                 # as `read_labels` gives them


def extracted_videos(features) -> dict | None:
    """videos.json of a folder of features: {video: what it was extracted from}; None if they were made
    elsewhere. Raises ValueError if it is gone, or the extraction has not ended."""
    path = Path(features) / "videos.json"
    table = read_json(path)
    if table is None and (path.parent / "made_of.json").exists():
        raise ValueError(f"{path} is gone; put a copy back, or run extract_features.py for another "
                         "--set run.name=...")
    if table is not None and not all("faces" in row for row in table.values()):
        raise ValueError(f"{path.parent}: the extraction has not ended; run extract_features.py to go on")
    return table


def open_videos(files: dict[str, Path], features, task: Task) -> tuple[list[Video], dict[str, str], int]:
    """One split's videos with labels and features. -> videos, {name: why it is left out}, D.

    Raises ValueError if a feature array has another width than the first or fewer frames than its labels, if
    one that was extracted is gone (videos.json tells), or if no video is left, as where nothing is annotated.
    """
    videos, left_out, dim, extracted, ends = [], {}, None, extracted_videos(features), {}
    for name, file in files.items():
        labels, path = read_labels(file, task), Path(features) / f"{name}.npy"
        faces = path.exists() if extracted is None else extracted.get(name, {}).get("faces")
        if not targets(labels, task)[1].any():
            left_out[name] = "no labels"
        elif not faces:
            left_out[name] = ("no features" if extracted is None else "no readable face" if name in extracted
                              else "no frames when features were extracted")
        else:
            if extracted is not None and not (path.exists() and noface_path(path).exists()):
                raise ValueError(f"{path} or its .noface.npy was extracted and is gone; run "
                                 "extract_features.py, which makes what is missing")
            frames, width = open_features(path).shape
            dim = dim or width
            if width != dim or frames < len(labels):
                raise ValueError(f"{path}: features are {frames} x {width}, expected at least {len(labels)} "
                                 f"frames (as {file} has) x {dim}; "
                                 "run extract_features.py, which extracts changed videos anew")
            ends |= {name: frames} if extracted is None else {}        # else the extraction has checked them
            videos.append(Video(name, path, labels))
    check_ends(ends, {video.name: len(video.labels) for video in videos})
    if not videos:
        rows = sum(len(read_labels(file, task)) for file in files.values())
        raise ValueError(f"none of {rows:,} rows in {len(files)} label files, such as {file}, can be used: "
                         f"{listed(Counter(left_out.values()))}. Each needs a label of {task.name} other "
                         f"than {task.invalid} (not annotated), and features in {features}, as "
                         "extract_features.py makes them from data.frames")
    return videos, left_out, dim


def fingerprint(videos: list[Video]) -> str:
    """Which videos with which labels and features, for the record.

    Of features that are not from `extract_features.py` the first and the last frame tell. Those from there
    are told by what they were extracted from: made again, they may differ in the last digit.
    """
    crc, table = 0, extracted_videos(videos[0].features.parent) or {}
    for video in videos:
        made_from = repr(table.get(video.name)).encode()
        if video.name not in table:
            array = open_features(video.features)
            made_from = array[:1].tobytes() + array[-1:].tobytes()
        crc = zlib.crc32(video.name.encode() + video.labels.tobytes() + made_from, crc)
    frames = sum(len(video.labels) for video in videos)
    return f"{len(videos)} videos, {frames:,} frames, checksum {crc:08x}"


# ---- Segments

def segments(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Cut n frames into half-open segments (start, end): starts 0, s, 2s, ..., the last one may be short.

    The paper's segment i holds the frames (i-1)s + 1 to (i-1)s + w, for i = 1 to [n/s] + 1. Read literally,
    that gives an empty one whenever s divides n, and others that only repeat covered frames. Ours stops at
    the first segment that reaches the end, so every frame is covered (§3.3: s <= w) and none of the segments
    is redundant. The authors' code keeps full windows only: tails and short videos are lost, in validation
    too.
    """
    # The last start is the first from which the window reaches the end: n - w, or less than s behind it.
    starts = range(0, max(n - window, 0) + stride, stride)
    return [(start, min(start + window, n)) for start in starts]


def pad(array: np.ndarray, window: int) -> np.ndarray:
    """Zeros after the last frame. Shape: (t, ...) -> (window, ...)."""
    padded = np.zeros((window, *array.shape[1:]), array.dtype)         # np.pad takes ten times as long
    padded[:len(array)] = array
    return padded


class SegmentData(Dataset):
    """All segments of the training videos (§3.2), padded to the window.

    Item: features float16 (w, D), target (w, 2), (w,) or (w, 12), valid of the target's shape, frames (w,)
    True where real.
    """

    def __init__(self, videos: list[Video], task: Task, window: int, stride: int):
        self.task, self.window = task, window
        self.index = [(video, start, end) for video in videos
                      for start, end in segments(len(video.labels), window, stride)]

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        video, start, end = self.index[i]
        features = read_features(video.features, start, end)                         # (t, D), t <= w
        target, valid = targets(video.labels[start:end], self.task)
        real = np.ones(end - start, bool)
        return tuple(pad(array, self.window) for array in (features, target, valid, real))

    def collate(self, items):
        """A batch of items as tensors (B, w, ...); an empty share of a batch becomes tensors with B = 0."""
        columns = zip(*(items or [self[0]]))
        return [torch.from_numpy(np.stack(column))[:len(items)] for column in columns]


# ---- What is there

def describe(frames, labels, fold: int = 0):
    """Yield lines that tell what a copy of Aff-Wild2 holds, to compare with the counts in docs/data.md.

    Raises ValueError as `find_videos` and `split`, at its end as `check_ends`, and if a set has no labelled
    frame with a face image.
    """
    (found, lines), rows_of = find_videos(frames), longest(labels)
    yield f"{len(found)} videos with frames, {sum(map(len, found.values())):,} face images"
    yield from lines
    problems = []
    for task in [task for task in TASKS.values() if has_labels(labels, task)] or TASKS.values():
        split(labels, task, fold)
        for name, files in label_files(labels, task).items():
            rows = {video: read_labels(file, task) for video, file in files.items()}
            face = [np.isin(np.arange(1, len(of) + 1), found[video].numbers if video in found else [])
                    for video, of in rows.items()]
            without_frames = sum(video not in found for video in files)
            rows, face = np.concatenate(list(rows.values())), np.concatenate(face)
            valid = targets(rows, task)[1].reshape(-1, task.width)                 # (T, ...) -> (T, width)
            full, some = valid.all(axis=1), valid.any(axis=1)
            partly = some & ~full
            yield (f"{task.name:5s}{name:15s}{len(files):4d} videos, {len(rows):9,d} frames, "
                   f"{full.sum():9,d} fully labelled, {(full & face).sum():9,d} of them with a face; "
                   + (f"{partly.sum():,} more in part, {(partly & face).sum():,} with a face; "
                      if partly.any() else "") + f"{without_frames} videos without frames")
            if not (some & face).any():
                problems.append(f"{task.name}, {name}: no labelled frame has a face image ({some.sum():,} of "
                                f"{len(rows):,} have a label), so there is nothing to train on or to score")
            yield f"      {occurrences(rows, task)}"
    there = {video: int((found[video].numbers <= n).sum()) for video, n in rows_of.items() if video in found}
    yield (f"{sum(len(found[video]) - n for video, n in there.items()):,} images after the last label, "
           f"{sum(rows_of[video] - n for video, n in there.items()):,} lines of labels without an image")
    yield from check_ends(last_of(found), rows_of)
    if problems:
        raise ValueError("\n".join([*problems, "a label file is named after its video's folder"]))


if __name__ == "__main__":
    config = from_command_line(__doc__)[0]
    for n in (73, 300, 301, 400, 1000):
        cut = segments(n, window=300, stride=200)
        print(f"{n:5d} frames: {len(cut)} segments, frames " + ", ".join(f"{a + 1}-{b}" for a, b in cut))
    print_all(describe(config.data.frames, config.data.labels, config.task.fold))
