"""Aff-Wild2 on disk: labels, frames, splits and folds, segments, and the two data sets that training reads.

The still-face sets of pre-training are in `faces.py`. Layouts, label codes and counts to check a copy against: README, "Data".

    python data.py --config configs/paper.yaml      # what is found in your copy: videos, frames, labels per class
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from images import read_image, resize

EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
AUS = ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU23", "AU24", "AU25", "AU26")
COLUMNS = {"va": ("valence", "arousal"), "expr": EXPRESSIONS, "au": AUS}      # the header line of a label file
FOLDERS = {"va": ("VA_Estimation_Challenge",), "au": ("AU_Detection_Challenge",),
           "expr": ("EXPR_Classification_Challenge", "EXPR_Recognition_Challenge")}
INVALID = {"va": -5, "expr": -1, "au": -1}


# ------------------------------------------------------------------------------------------------------------- labels

def read_labels(path, task: str) -> np.ndarray:
    """One label file: a header line, then a line per frame; line i belongs to frame i, counted from 1.

    -> va: (T, 2) float32 in [-1, 1] or -5; expr: (T,) int8, 0 to 7 or -1; au: (T, 12) int8, 0, 1 or -1.
    CRLF and trailing blank lines are accepted. Raises ValueError naming file and line for a wrong header, a short or long row,
    text for a number, and a value that the task does not have.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; expected a label file with the header {','.join(COLUMNS[task])}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    header = tuple(name.strip() for name in lines[0].split(",")) if lines else ()
    if tuple(name.lower() for name in header) != tuple(name.lower() for name in COLUMNS[task]):
        raise ValueError(f"{path}: header is {','.join(header)[:200]!r}, expected {','.join(COLUMNS[task])!r}")
    width = 1 if task == "expr" else len(COLUMNS[task])
    kind, highest = (float, 1) if task == "va" else (int, 7 if task == "expr" else 1)
    allowed = "a number from -1 to 1, or -5" if task == "va" else f"a whole number from -1 to {highest}"
    values = np.empty((len(lines) - 1, width), np.float32 if task == "va" else np.int8)
    for i, line in enumerate(lines[1:]):
        fields = line.split(",")
        if len(fields) != width:
            raise ValueError(f"{path}, line {i + 2}: {len(fields)} values {line[:80]!r}, expected {width}")
        try:
            row = [kind(field) for field in fields]
        except ValueError:
            raise ValueError(f"{path}, line {i + 2}: {line[:80]!r}, expected {allowed}") from None
        if not all(-1 <= v <= highest or v == INVALID[task] for v in row):      # NaN fits nothing
            raise ValueError(f"{path}, line {i + 2}: {line[:80]!r}, expected {allowed}")
        values[i] = row
    return values[:, 0] if task == "expr" else values


def has_labels(root, task: str) -> bool:
    """Is there a folder of labels for this task? Some teams have those of one task only."""
    return any((Path(root) / name).is_dir() for name in FOLDERS[task])


def label_files(root, task: str) -> dict[str, dict[str, Path]]:
    """{"Train_Set": {video: file}, "Validation_Set": {video: file}} of one task, videos in sorted order.

    Accepts both spellings of the EXPR folder. Raises ValueError naming what was looked for.
    """
    found = [Path(root) / name for name in FOLDERS[task] if (Path(root) / name).is_dir()]
    if not root or not found:
        raise ValueError(f"data.labels: no {' or '.join(FOLDERS[task])} in {str(root)!r}; "
                         "set data.labels to the folder of annotations that holds it")
    if len(found) > 1:
        raise ValueError(f"data.labels: both {found[0]} and {found[1]} exist; keep one, they hold the same labels")
    splits = {}
    for split in ("Train_Set", "Validation_Set"):
        files = sorted(f for f in (found[0] / split).glob("*.txt") if not f.name.startswith("."))
        if not files:
            raise ValueError(f"{found[0] / split}: no label files (<video>.txt); the training and validation sets both need some")
        splits[split] = {file.name[:-len(".txt")]: file for file in files}
    return splits


# ------------------------------------------------------------------------------------------------------------- frames

def find_videos(roots) -> dict[str, Path]:
    """{video: folder of its frames} over several roots, sorted. A nested cropped_aligned/cropped_aligned is entered.

    A video that is in two roots is taken from the first that has frames of it.
    Raises ValueError for a root that is missing, or when no video is found.
    """
    videos: dict[str, Path] = {}
    for root in map(Path, roots):
        if not root.is_dir():
            raise ValueError(f"data.frames: {root} is no folder; expected one that holds a folder of face crops per video")
        nested = [root / name for name in (root.name, "cropped_aligned") if (root / name).is_dir()]
        for entry in sorted(p for folder in nested[:1] or [root] for p in folder.iterdir()
                            if p.is_dir() and not p.name.startswith(".")):
            if entry.name not in videos or not len(frame_numbers(videos[entry.name])):
                videos[entry.name] = entry
    if not videos:
        raise ValueError(f"data.frames: no video folders in {list(map(str, roots)) or 'an empty list'}; "
                         "expected <video>/00001.jpg below it")
    return dict(sorted(videos.items()))


def frame_numbers(folder) -> np.ndarray:
    """The numbers of the frames that have a face image, sorted: 00001.jpg is 1."""
    names = (entry.name for entry in os.scandir(folder))
    numbers = sorted(int(name[:-4]) for name in names if re.fullmatch(r"\d{5}\.jpg|[1-9]\d{5,6}\.jpg", name))
    return np.array([n for n in numbers if n > 0], dtype=np.int64)


def frame_path(folder, number: int) -> Path:
    """cropped_aligned/<video>/00001.jpg"""
    return Path(folder) / f"{number:05d}.jpg"


# --------------------------------------------------------------------------------------------------- splits and folds

def person_group(video: str) -> str:
    """`<video>`, `<video>_left` and `<video>_right` show the same scene and stay on one side of a split."""
    return re.sub(r"_(left|right)$", "", video)


def split(root, task: str, fold: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """Training and validation label files of one task. Fold 0 is the official split; fold k of 1 to 4 (Table 1) pools both
    sets and validates on a quarter of the videos, groups kept whole, quarters balanced in the size of their label files."""
    if not 0 <= fold <= 4:
        raise ValueError(f"fold: got {fold}, expected 0 (official split) or 1 to 4")
    files = label_files(root, task)
    if fold == 0:
        return files["Train_Set"], files["Validation_Set"]
    pooled = files["Train_Set"] | files["Validation_Set"]
    groups: dict[str, list[str]] = {}
    for video in sorted(pooled):
        groups.setdefault(person_group(video), []).append(video)
    size = {group: sum(pooled[v].stat().st_size for v in videos) for group, videos in groups.items()}
    part, filled = {}, [0, 0, 0, 0]
    for group in sorted(groups, key=lambda g: (-size[g], g)):            # largest first, always into the emptiest quarter
        part[group] = int(np.argmin(filled))
        filled[part[group]] += size[group]
    held_out = {v for group, videos in groups.items() if part[group] == fold - 1 for v in videos}
    if not 0 < len(held_out) < len(pooled):
        raise ValueError(f"fold {fold} of {len(groups)} scenes leaves nothing to {'train' if held_out else 'validate'} on; "
                         "take fold 0, or label at least 4 scenes")
    return {v: f for v, f in pooled.items() if v not in held_out}, {v: f for v, f in pooled.items() if v in held_out}


def segments(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Cut n frames into half-open segments (start, end), starts 0, s, 2s, ... (§3.2), the last one as short as what is left.

    The paper's formula gives [n/s] + 1 segments: an empty one whenever s divides n, and others that only repeat covered frames.
    Ours stops at the first segment that reaches the end, so every frame is covered and none of the segments is redundant.
    """
    if n < 1 or not 1 <= stride <= window:
        raise ValueError(f"segments(n={n}, window={window}, stride={stride}): expected n >= 1 and 1 <= stride <= window")
    starts = range(0, max(n - window, 0) + stride, stride)
    return [(start, min(start + window, n)) for start in starts]


# ----------------------------------------------------------------------------------------------- data sets to train on

class ExprFrames(Dataset):
    """Single frames with an expression label and a face image, for fine-tuning (§3.1).

    Item: (uint8 image (size, size, 3), class). An unreadable image gives class -1, which no loss and no metric counts.
    Neighbouring frames are all but equal, so an epoch takes each `every`-th frame, from another offset each time.
    `crop(image, index, epoch)` cuts the image to size; without it the whole image is resized. `where(i)` names the file.
    """

    def __init__(self, files: dict[str, Path], videos: dict[str, Path], size: int, every: int = 1, crop=None):
        self.size, self.every, self.crop, self.epoch = (size, size), every, crop, 0
        self.folders, self.without_frames, rows = [], [], []
        for video, file in files.items():
            labels, numbers = read_labels(file, "expr"), frame_numbers(videos[video]) if video in videos else []
            if not len(numbers):
                self.without_frames.append(video)
                continue
            numbers = numbers[(numbers >= 1) & (numbers <= len(labels))]
            numbers = numbers[labels[numbers - 1] >= 0]
            rows.append(np.stack([np.full(len(numbers), len(self.folders)), numbers, labels[numbers - 1]], axis=1))
            self.folders.append(str(videos[video]))
        # (frames, 3): which folder, which number, which class. Arrays, because worker processes share them without copying.
        self.rows = np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 3), np.int32)
        if not len(self.rows):
            raise ValueError(f"no frame has both an expression label and an image: {len(files)} label files, "
                             f"{len(self.without_frames)} of them without frames; check data.labels and data.frames")

    def __len__(self):
        return -(-len(self.rows) // self.every)          # rounded up, so that the last few have their turn too

    def row(self, i):
        return self.rows[(i * self.every + self.epoch % self.every) % len(self.rows)]

    def where(self, i) -> str:
        folder, number, _ = self.row(i)
        return str(frame_path(self.folders[folder], number))

    def __getitem__(self, i):
        try:
            image = read_image(self.where(i))
        except ValueError:
            return np.zeros((*self.size, 3), np.uint8), -1
        pixels = self.crop(image, i, self.epoch) if self.crop else resize(image, self.size)
        return pixels, int(self.row(i)[2])

    def collate(self, items):
        """-> uint8 images (B, size, size, 3), classes (B,); also for an empty share of a batch."""
        images = np.stack([image for image, _ in items]) if items else np.zeros((0, *self.size, 3), np.uint8)
        return torch.from_numpy(images), torch.tensor([label for _, label in items], dtype=torch.long)


@dataclass
class Video:
    """One video of one task: its labels, and the file that holds its features."""
    name: str
    features: Path
    labels: np.ndarray                 # (T, 2), (T,) or (T, 12), as `read_labels` gives them


AGAIN = "delete it and run extract_features.py again"


def read_features(path, start: int = 0, end: int | None = None) -> np.ndarray:
    """Frames start to end of a feature file, float16 (T, D). Memory-mapped: only these frames are read.

    Raises ValueError naming the file if it is no plain array, or holds NaN or infinity.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:           # the header is Python source: a broken one also raises SyntaxError or TokenError
        raise ValueError(f"{path}: not a plain feature array ({error}); {AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.dtype.isnative:
        raise ValueError(f"{path}: not a plain feature array ({getattr(array, 'dtype', 'a zip archive')}); {AGAIN}")
    if array.ndim != 2:
        raise ValueError(f"{path}: array of shape {array.shape}, expected (frames, D); {AGAIN}")
    part = np.array(array[start:end])
    if not np.isfinite(part).all():
        raise ValueError(f"{path}: NaN or infinity in frames {start + 1} to {start + len(part)}; {AGAIN}")
    return part


def open_videos(files: dict[str, Path], features, task: str) -> tuple[list[Video], list[str], int]:
    """Labels and features of the videos of one split. -> videos, names of those without features (no frame had a face), D.

    Raises ValueError if a feature array has another width than the first or fewer frames than its labels, or if none is left.
    """
    videos, without, dim = [], [], None
    for name, file in files.items():
        labels, path = read_labels(file, task), Path(features) / f"{name}.npy"
        if not path.exists() or not len(labels):
            without.append(name)
            continue
        frames, width = read_shape(path)
        dim = dim or width
        if width != dim or frames < len(labels):
            raise ValueError(f"{path}: features are {frames} x {width}, expected at least {len(labels)} frames (as {file} has) x {dim}; "
                             "delete the folder and run extract_features.py again")
        videos.append(Video(name, path, labels))
    if not videos:
        raise ValueError(f"none of {len(files)} labelled videos has features in {features}; "
                         "run extract_features.py with the same data.frames")
    return videos, without, dim


def encoder_of(features) -> int | None:
    """The checksum of the encoder that extracted the features in a folder; None if extract_features.py did not make it."""
    settings = Path(features) / "settings.json"
    try:
        return json.loads(settings.read_text()).get("encoder checksum") if settings.exists() else None
    except ValueError as error:
        raise ValueError(f"{settings}: not what extract_features.py wrote ({error})") from None


def read_shape(path) -> tuple[int, int]:
    """(frames, D) of a feature file, from its header."""
    read_features(path, 0, 0)
    return np.load(path, mmap_mode="r", allow_pickle=False).shape


def targets(labels: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """(target, valid) from labels as they stand in the file: invalid codes become target 0 and valid False."""
    valid = labels != INVALID[task]
    return np.where(valid, labels, 0), valid


class SegmentData(Dataset):
    """All segments of the training videos (§3.2), padded to the window.

    Item: features float16 (w, D), target (w, 2), (w,) or (w, 12), valid of the target's shape, frames (w,) True where real.
    """

    def __init__(self, videos: list[Video], task: str, window: int, stride: int):
        self.videos, self.task, self.window = videos, task, window
        self.index = [(v, *part) for v, video in enumerate(videos) for part in segments(len(video.labels), window, stride)]

    def __len__(self):
        return len(self.index)

    def where(self, i) -> str:
        v, start, end = self.index[i]
        return f"{self.videos[v].name} frames {start + 1} to {end}"

    def __getitem__(self, i):
        v, start, end = self.index[i]
        target, valid = targets(self.videos[v].labels[start:end], self.task)
        item = (read_features(self.videos[v].features, start, end), target, valid, np.ones(end - start, bool))
        return tuple(np.pad(a, [(0, self.window - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in item)

    def collate(self, items):
        """A batch of items as tensors; an empty share of a batch becomes tensors with B = 0."""
        batch = [torch.from_numpy(np.stack(column)) for column in zip(*(items or [self[0]]))]
        return [column[:len(items)] for column in batch]


if __name__ == "__main__":
    from config import from_command_line
    settings = from_command_line(__doc__)[0].data
    try:
        images = {video: frame_numbers(folder) for video, folder in find_videos(settings.frames).items()}
        images = {video: numbers for video, numbers in images.items() if len(numbers)}
        print(f"{len(images)} videos with frames, {sum(map(len, images.values())):,} face images")
        for task in [task for task in COLUMNS if has_labels(settings.labels, task)] or COLUMNS:
            for name, files in label_files(settings.labels, task).items():
                labels = {video: read_labels(file, task) for video, file in files.items()}
                faces = [np.isin(np.arange(1, len(labels[video]) + 1), images.get(video, [])) for video in labels]
                labels, faces = np.concatenate([*labels.values()]), np.concatenate(faces)
                valid = targets(labels, task)[1].reshape(len(labels), -1).all(axis=1)
                print(f"{task:5s}{name:15s}{len(files):4d} videos, {len(labels):9,d} frames, {valid.sum():9,d} fully labelled, "
                      f"{(valid & faces).sum():9,d} of them with a face; {sum(v not in images for v in files)} videos without frames")
                if task == "expr":
                    print("      per class: " + ", ".join(f"{e} {(labels == i).sum():,}" for i, e in enumerate(EXPRESSIONS)))
                if task == "au":
                    print("      positive: " + ", ".join(f"{a} {(labels[:, i] == 1).sum():,}" for i, a in enumerate(AUS)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
