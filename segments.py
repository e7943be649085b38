"""Feature files, and the segments that videos are cut into (paper §3.2, §4.1.2).

`extract_features.py` writes <video>.npy, float16 (frames, D): row i belongs to frame i + 1. A segment is a
window of w frames of it; segments start every s frames, overlap, and the last one is padded to the window.

    python segments.py     # how videos of some lengths are cut with the paper's w = 300, s = 200
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from checkpoints import read_json
from labels import Task, read_labels, targets

AGAIN = "delete it and run extract_features.py again"


def segments(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Cut n frames into half-open segments (start, end): starts 0, s, 2s, ..., the last one may be short.

    The paper's segment i holds the frames (i-1)s + 1 to (i-1)s + w, for i = 1 to [n/s] + 1. Read literally,
    that gives an empty one whenever s divides n, and others that only repeat covered frames. Ours stops at
    the first segment that reaches the end, so every frame is covered and none of the segments is redundant.
    The authors' code keeps full windows only: tails and short videos are lost, in validation too. Raises
    ValueError unless n >= 1 and 1 <= s <= w (§3.3: s <= w, so that no frame is left out).
    """
    if n < 1 or not 1 <= stride <= window:
        raise ValueError(f"segments(n={n}, window={window}, stride={stride}): "
                         "expected n >= 1 and 1 <= stride <= window")
    starts = range(0, max(n - window, 0) + stride, stride)
    return [(start, min(start + window, n)) for start in starts]


def pad(array: np.ndarray, window: int) -> np.ndarray:
    """Zeros after the last frame. Shape: (t, ...) -> (window, ...)."""
    padded = np.zeros((window, *array.shape[1:]), array.dtype)
    padded[:len(array)] = array
    return padded


# ---- Feature files

def noface_path(path) -> Path:
    """<video>.npy -> <video>.noface.npy: bool (frames,), True where there was no readable face image."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".npy") + ".noface.npy")


def read_features(path, start: int = 0, end: int | None = None) -> np.ndarray:
    """Frames start to end of a feature file, float16 (T, D). Memory-mapped: only these frames are read.

    Raises ValueError naming the file if it is no plain array, or holds NaN or infinity.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:     # the header is Python source: a broken one also raises SyntaxError
        raise ValueError(f"{path}: not a plain feature array ({error}); {AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.dtype.isnative:
        found = getattr(array, "dtype", "a zip archive")
        raise ValueError(f"{path}: not a plain feature array ({found}); {AGAIN}")
    if array.ndim != 2:
        raise ValueError(f"{path}: array of shape {array.shape}, expected (frames, D); {AGAIN}")
    part = np.array(array[start:end])
    if not np.isfinite(part).all():
        raise ValueError(f"{path}: NaN or infinity in frames {start + 1} to {start + len(part)}; {AGAIN}")
    return part


def feature_shape(path) -> tuple[int, int]:
    """(frames, D) of a feature file, from its header."""
    read_features(path, 0, 0)
    return np.load(path, mmap_mode="r", allow_pickle=False).shape


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
    one that was extracted is gone (videos.json tells), or if no video is left.
    """
    videos, left_out, lost, dim = [], {}, [], None
    extracted = extracted_videos(features)
    for name, file in files.items():
        labels, path = read_labels(file, task), Path(features) / f"{name}.npy"
        if not len(labels):
            left_out[name] = "no labels"
        elif extracted is not None and name not in extracted:
            left_out[name] = "no frames when features were extracted"
        elif extracted is not None and not extracted[name]["faces"]:
            left_out[name] = "no readable face"
        elif extracted is not None and not (path.exists() and noface_path(path).exists()):
            lost.append(name)
        elif not path.exists():
            left_out[name] = "no features"
        else:
            frames, width = feature_shape(path)
            dim = dim or width
            if width != dim or frames < len(labels):
                raise ValueError(f"{path}: features are {frames} x {width}, expected at least {len(labels)} "
                                 f"frames (as {file} has) x {dim}; "
                                 "run extract_features.py, which extracts changed videos anew")
            videos.append(Video(name, path, labels))
    if lost:
        raise ValueError(f"{features}: files of {len(lost)} videos that were extracted are gone: "
                         f"{', '.join(lost[:5])}; run extract_features.py, which makes what is missing")
    if not videos:
        raise ValueError(f"none of {len(files)} labelled videos has features in {features}; "
                         "run extract_features.py with the same data.frames")
    return videos, left_out, dim


def reasons(left_out: dict[str, str]) -> str:
    """{"a": "no labels", "b": "no labels"} -> "a, b (no labels)"."""
    groups: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        groups.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())


def fingerprint(videos: list[Video]) -> str:
    """Which videos with which labels and features, for made_of.py.

    Of features that are not from `extract_features.py` the first and the last frame tell. Those from there
    are told by what they were extracted from: made again, they may differ in the last digit.
    """
    crc, tables = 0, {}
    for video in videos:
        folder = video.features.parent
        if folder not in tables:
            tables[folder] = extracted_videos(folder) or {}
        made_from = repr(tables[folder].get(video.name)).encode()
        if video.name not in tables[folder]:
            array = np.load(video.features, mmap_mode="r", allow_pickle=False)
            made_from = array[:1].tobytes() + array[-1:].tobytes()
        crc = zlib.crc32(video.name.encode() + video.labels.tobytes() + made_from, crc)
    frames = sum(len(video.labels) for video in videos)
    return f"{len(videos)} videos, {frames:,} frames, checksum {crc:08x}"


def labelled_faces(videos: list[Video], task: Task) -> int:
    """Frames with a label and, as far as that is known, a face: what the counts of a copy are given in."""
    count = 0
    for video in videos:
        valid = targets(video.labels, task)[1].reshape(-1, task.width).all(axis=1)     # (T, ...) -> (T,)
        mask = noface_path(video.features)
        if mask.exists():
            valid &= ~np.load(mask)[:len(valid)]
        count += int(valid.sum())
    return count


# ---- To train on

class SegmentData(Dataset):
    """All segments of the training videos (§3.2), padded to the window.

    Item: features float16 (w, D), target (w, 2), (w,) or (w, 12), valid of the target's shape, frames (w,)
    True where real.
    """

    def __init__(self, videos: list[Video], task: Task, window: int, stride: int):
        self.videos, self.task, self.window, self.index = videos, task, window, []
        for video in videos:
            for start, end in segments(len(video.labels), window, stride):
                self.index.append((video, start, end))

    def __len__(self):
        return len(self.index)

    def where(self, i) -> str:
        video, start, end = self.index[i]
        return f"{video.name} frames {start + 1} to {end}"

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


if __name__ == "__main__":
    for n in (73, 300, 301, 400, 1000):
        cut = segments(n, window=300, stride=200)
        print(f"{n:5d} frames: {len(cut)} segments, frames " + ", ".join(f"{a + 1}-{b}" for a, b in cut))
