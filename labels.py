"""What the three tasks do differently: records, label files, folds, units (paper §3.4, Table 1). NumPy only.

Valence-arousal (va), expressions (expr) and action units (au) differ in their label files, their loss, their
metric and the numbers to compare with. Another task is another record. Codes of a label file:

    va    valence and arousal in [-1, 1]; -5 = not annotated
    expr  0 Neutral, 1 Anger, 2 Disgust, 3 Fear, 4 Happiness, 5 Sadness, 6 Surprise, 7 Other; -1 = invalid
    au    0 or 1 for each of 12 action units; -1 = invalid
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics import BINARY_F1, CCC, CLASS_F1, Metric

EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
AUS = (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26)      # numbers of the Facial Action Coding System
FOLDS = range(5)
NAME = re.compile(r"(.+)/0*([0-9]{1,7})\.[A-Za-z]+")    # of a frame in a list: 2-30-640x360/00001.jpg


@dataclass(frozen=True)
class Task:
    """One task. Its label files are `<one of folders>/{Train_Set,Validation_Set}/<video>.txt`."""
    name: str                      # what --task calls it
    outputs: tuple[str, ...]       # the model's outputs, in order; also the header line of a label file
    folders: tuple[str, ...]       # spellings of the folder of its label files
    one_class: bool                # True: a label is the index of one output; False: a value for each output
    lowest: int                    # the smallest and
    highest: int                   # the largest value of a label,
    invalid: int                   # and what stands where nobody annotated
    dtype: type                    # of the labels in memory
    loss: str                      # the name of its function in losses.py
    zero_loss: float               # the loss when every output is 0: about where a training starts
    metric: Metric                 # metrics.py
    epochs: int                    # passes over the segments (paper: silent; the authors' code's)
    labelled_faces: int            # labelled frames with a face in a complete Aff-Wild2, both official sets
    paper: dict[str, tuple]        # Table 1, validation: name of an output or "mean" -> folds 0 to 4
    baseline: dict[str, float]     # the challenge's baseline on the official split (fold 0)

    @property
    def whole_numbers(self) -> bool:
        """Are its labels whole numbers: a class, or 0 and 1?"""
        return self.dtype is np.int8

    @property
    def yes_or_no(self) -> bool:
        """Is each of its outputs present or absent, as action units are?"""
        return self.whole_numbers and not self.one_class

    @property
    def width(self) -> int:
        """Values in a row of a label file."""
        return 1 if self.one_class else len(self.outputs)

    @property
    def a_row(self) -> str:
        """What a row holds, in words."""
        kind = ("whole number" if self.whole_numbers else "number") + "s" * (self.width > 1)
        return f"{self.width} {kind} from {self.lowest} to {self.highest}"

    def row(self, text: str, code: int | None = None) -> list:
        """The numbers of a row of a label file or of a submission. `code`: what may stand there besides.
        Raises ValueError if they are not as many, no such numbers, or out of range."""
        values = [(int if self.whole_numbers else float)(field) for field in text.split(",")]
        known = all(self.lowest <= value <= self.highest or value == code for value in values)
        if len(values) != self.width or not known or "_" in text or not text.isascii():    # 1_0 would be 10
            raise ValueError(f"expected {self.a_row}")
        return values


VALENCE = (.5385, .6404, .4926, .5863, .5403)          # Table 1
AROUSAL = (.6224, .5651, .6015, .6812, .6342)

VA = Task("va", ("valence", "arousal"), ("VA_Estimation_Challenge",), one_class=False,
          lowest=-1, highest=1, invalid=-5, dtype=np.float32, loss="ccc_loss", zero_loss=2.0, metric=CCC,
          epochs=40, labelled_faces=1_653_900 + 376_330,
          paper={"valence": VALENCE, "arousal": AROUSAL,
                 "mean": tuple((v + a) / 2 for v, a in zip(VALENCE, AROUSAL))},
          baseline={"valence": .24, "arousal": .20, "mean": .22})

EXPR = Task("expr", EXPRESSIONS, ("EXPR_Classification_Challenge", "EXPR_Recognition_Challenge"),
            one_class=True, lowest=0, highest=7, invalid=-1, dtype=np.int8, loss="expr_loss",
            zero_loss=math.log(8), metric=CLASS_F1, epochs=10, labelled_faces=585_317 + 280_532,
            paper={"mean": (.4561, .4478, .4463, .4583, .4506)}, baseline={"mean": .23})

AU = Task("au", tuple(f"AU{number}" for number in AUS), ("AU_Detection_Challenge",), one_class=False,
          lowest=0, highest=1, invalid=-1, dtype=np.int8, loss="au_loss", zero_loss=math.log(2),
          metric=BINARY_F1, epochs=30, labelled_faces=1_356_694 + 445_836,
          paper={"mean": (.5762, .5566, .5018, .5556, .5819)}, baseline={"mean": .39})

TASKS = {task.name: task for task in (VA, EXPR, AU)}


# ---- Label files

def has_labels(root, task: Task) -> bool:
    """Is there a folder of labels for this task? Some teams have those of one task only."""
    return any((Path(root) / name).is_dir() for name in task.folders)


def label_files(root, task: Task) -> dict[str, dict[str, Path]]:
    """{"Train_Set": {video: file}, "Validation_Set": {video: file}} of one task, videos in sorted order.
    Accepts every spelling of the task's folder. Raises ValueError naming what was looked for."""
    found = [Path(root) / name for name in task.folders if root and (Path(root) / name).is_dir()]
    if len(found) != 1:
        raise ValueError(f"data.labels: {len(found)} folders {' or '.join(task.folders)} in {str(root)!r}; "
                         "set data.labels to the folder of annotations that holds one")
    splits = {name: text_files(found[0] / name) for name in ("Train_Set", "Validation_Set")}
    if not all(splits.values()):
        raise ValueError(f"{found[0]}: expected label files, <video>.txt, in {' and '.join(splits)}, "
                         f"found {list(map(len, splits.values()))}")
    return splits


def text_files(folder) -> dict[str, Path]:
    """{video: file} of the files <video>.txt of a folder, in sorted order."""
    return {file.stem: file for file in sorted(Path(folder).glob("[!.]*.txt"))}


def read_lines(path, header: str, encoding: str = "utf-8-sig") -> list[str]:
    """The lines of a text file, without blank ones at its end. CRLF, CR and a byte-order mark are accepted.
    Raises ValueError with the header that is expected if it is no text in UTF-8."""
    try:
        return Path(path).read_text(encoding).rstrip().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text in UTF-8; expected one with the header {header}") from None


def split_name(name: str) -> tuple[str, int]:
    """'video86_3_left/00012.jpg' -> ('video86_3_left', 12). Raises ValueError for anything else."""
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"got {name[:80]!r}, expected a frame like 136/00001.jpg")
    return match[1], int(match[2])


def read_labels(path, task: Task) -> np.ndarray:
    """One label file: a header line, then a line per frame; line i belongs to frame i, counted from 1.

    -> (T, outputs), or (T,) where a label is one class; invalid codes stay in. Raises ValueError naming file
    and line for a wrong header, a short or long row, text for a number, and a value that the task does not
    have; OSError naming the file if the disk fails.
    """
    header, rows = ",".join(task.outputs), {}
    top, *lines = read_lines(path, header) or [""]
    if top.replace(" ", "").lower() != header.lower():
        raise ValueError(f"{path}: header is {top[:200]!r}, expected {header!r}")
    for line in dict.fromkeys(lines):                   # each once: AU lines repeat, so half the time
        try:
            rows[line] = task.row(line, task.invalid)
        except ValueError:
            raise ValueError(f"{path}, line {lines.index(line) + 2}: {line[:80]!r}, expected {task.a_row}, "
                             f"or {task.invalid}") from None
    labels = np.array([rows[line] for line in lines], task.dtype).reshape(-1, task.width)
    return labels[:, 0] if task.one_class else labels


def targets(labels: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(target, valid) of the labels' shape: where the label is invalid, target is 0 and valid False."""
    valid = labels != task.invalid
    return np.where(valid, labels, 0), valid


def occurrences(labels: np.ndarray, task: Task) -> str:
    """In how many frames each output has a value, is the class, or is present: "valence 400, arousal 0"."""
    sums = task.metric.count(np.zeros((len(labels), len(task.outputs))), *targets(labels, task))
    return ", ".join(f"{name} {n:,}" for name, (n, _) in zip(task.outputs, task.metric.labelled(sums)))


def something_to_learn(labels: np.ndarray, task: Task):
    """Raises ValueError if all labels of a training are the same, as in a template of zeros."""
    values = labels[labels != task.invalid]
    if len(values) and values.min() == values.max():
        raise ValueError(f"all {len(values):,} training labels of {task.name} are {values[0]}, so there is "
                         "nothing to learn; check data.labels")


# ---- Folds: which videos are trained on and which are validated on

def scene(video: str) -> str:
    """`<video>`, `<video>_left` and `<video>_right` show the same scene and stay on one side of a split."""
    return re.sub(r"_(left|right)$", "", video)


def frames_in(file) -> int:
    """The frames of a label file."""
    return max(len(read_lines(file, "of a label file")) - 1, 0)


def longest(root) -> Counter:
    """{video: frames of its longest label file, whatever the task}; nothing without labels."""
    frames = Counter()
    for task in [task for task in TASKS.values() if has_labels(root, task)]:
        for files in label_files(root, task).values():
            frames |= Counter({video: frames_in(file) for video, file in files.items()})
    return frames


def scene_frames(files: dict[str, Path]) -> Counter:
    """{scene: frames of its label files}"""
    frames = Counter()
    for video, file in files.items():
        frames[scene(video)] += frames_in(file)
    return frames


def deal(frames: dict[str, dict[str, int]]) -> dict[str, int]:
    """{task: {scene: frames}} -> {scene: its quarter, 0 to 3}: about a quarter of the frames of each task.

    A scene's share of a task is its part of all the task's frames; a quarter's load is the sum of its scenes'
    shares. The largest scene comes first. Each goes where it adds least to the sum of all squared loads:
    (load + share)² - load² = 2 load share + share², and share² is the same in every quarter.
    """
    scenes = sorted(set().union(*frames.values()))
    counts = np.array([[frames[task].get(name, 0) for task in sorted(frames)] for name in scenes], float)
    shares = counts / np.maximum(counts.sum(axis=0), 1)                        # (scenes, tasks)
    loads, quarter = np.zeros((4, len(frames))), {}
    for i in np.argsort(-shares.sum(axis=1), kind="stable"):
        k = int((loads * shares[i]).sum(axis=1).argmin())
        loads[k] += shares[i]
        quarter[scenes[i]] = k
    return quarter


def parted(files: dict[str, Path], taken: set[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of other scenes, and those of the scenes that are taken, both in sorted order."""
    parts = {}, {}
    for video in sorted(files):
        parts[scene(video) in taken][video] = files[video]
    return parts


def keep_apart(train: dict[str, Path], val: dict[str, Path], same, way_out: str):
    """Raises ValueError, naming two files and the way out, if same(video) is one for videos of both sets."""
    known = {same(video): file for video, file in train.items()}
    both = [video for video in val if same(video) in known]
    if both:
        raise ValueError(f"{known[same(both[0])]} and {val[both[0]]} show one scene, and a score on it "
                         f"says nothing; {len(both)} of {len(val)} validation videos would be trained on: "
                         f"{', '.join(both[:5])}. {way_out}")


def split(root, task: Task, fold: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """Training and validation label files of one task. Fold 0 is the official split, of each task for itself.

    Folds 1 to 4 (Table 1) pool both sets; fold k validates on the scenes of quarter k. The quarters are those
    of all tasks together, so one encoder serves a fold: no task's validation scene is among the videos that
    it was fine-tuned on. Raises ValueError if one of the two would be empty, and if a video is in both
    official sets or, which folds mend, a scene.
    """
    train, val = label_files(root, task).values()
    keep_apart(train, val, str, "Remove one of the two files")
    if fold == 0:
        keep_apart(train, val, scene, "Remove one of the two files, or take folds, which keep scenes whole: "
                   "--set task.fold=1 --set finetune.fold=1")
        return train, val
    official = {each.name: label_files(root, each) for each in TASKS.values() if has_labels(root, each)}
    quarter = deal({name: scene_frames(files["Train_Set"] | files["Validation_Set"])
                    for name, files in official.items()})
    train, val = parted(train | val, {name for name, k in quarter.items() if k == fold - 1})
    if not train or not val:
        scenes, purpose = len(set(map(scene, train | val))), "train" if val else "validate"
        raise ValueError(f"fold {fold} of {scenes} scenes leaves nothing to {purpose} on; take fold 0, or "
                         "label more scenes")
    return train, val


def hold_out(files: dict[str, Path], share: float) -> tuple[dict[str, Path], dict[str, Path]]:
    """A share of the scenes is taken out of the training's label files: -> those left, those held out. Large
    and small scenes alike: of the scenes in order of their size, the middle one of each group of 1 / share.
    Raises ValueError if none or all would be taken."""
    if share == 0:
        return files, {}
    size = scene_frames(files)
    order = sorted(size, key=lambda name: (-size[name], name))
    taken = {name for i, name in enumerate(order) if int((i + 1) * share + 0.5) > int(i * share + 0.5)}
    if not 0 < len(taken) < len(order):
        raise ValueError(f"held_out={share} takes {len(taken)} of {len(order)} training scenes; "
                         "give a share that takes one or more and leaves some")
    return parted(files, taken)


# ---- Units: outputs (T, K) --in_units--> VA as it is, else probabilities --smoothed--> --for_metric--> count

def in_units(outputs: np.ndarray, task: Task) -> np.ndarray:
    """A model's outputs as they are told: valence and arousal as they are; probabilities of the classes,
    whose sum is 1; the probability of each action unit. Shape: (T, K) -> float64 (T, K)"""
    outputs = np.asarray(outputs, np.float64)
    if task.one_class:
        e = np.exp(outputs - outputs.max(axis=1, keepdims=True))       # softmax(x) = softmax(x - max)
        return e / e.sum(axis=1, keepdims=True)
    if task.yes_or_no:
        return 0.5 * (1 + np.tanh(0.5 * outputs))                      # the sigmoid, without overflow
    return outputs


def smoothed(values: np.ndarray, k: int) -> np.ndarray:
    """The mean over each frame and the k before and after it, fewer at the ends. Shape: (T, K)"""
    if k == 0:
        return values
    t = np.arange(len(values))
    first, end = np.maximum(t - k, 0), np.minimum(t + k + 1, len(values))
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    sums = np.concatenate([np.zeros_like(sums[:1]), sums])             # (T, K) -> (T + 1, K)
    return (sums[end] - sums[first]) / (end - first)[:, None]


def for_metric(values: np.ndarray, task: Task) -> np.ndarray:
    """Values in units as `task.metric.count` wants them: an action unit is present above 0, a class is the
    largest. Shape: (T, K)"""
    return values - 0.5 if task.yes_or_no else values
