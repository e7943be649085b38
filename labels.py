"""What the three tasks do differently, in one record each, and their label files (paper §3.4, Table 1).

Valence-arousal (va), expressions (expr) and action units (au) differ in their label files, their loss,
their metric and the numbers to compare with. All of that stands here; another task is another record. Codes
of a label file:

    va    valence and arousal in [-1, 1]; -5 = not annotated
    expr  0 Neutral, 1 Anger, 2 Disgust, 3 Fear, 4 Happiness, 5 Sadness, 6 Surprise, 7 Other; -1 = invalid
    au    0 or 1 for each of 12 action units; -1 = invalid

NumPy only, like metrics.py: what reads and scores label files needs no torch.

    python labels.py       # the record of each task
    python labels.py FILE  # what a label file holds
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics import BINARY_F1, CCC, CLASS_F1, Metric

EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
AUS = (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26)      # numbers of the Facial Action Coding System


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


VALENCE = (.5385, .6404, .4926, .5863, .5403)          # Table 1
AROUSAL = (.6224, .5651, .6015, .6812, .6342)

VA = Task("va", ("valence", "arousal"), ("VA_Estimation_Challenge",), one_class=False,
          lowest=-1, highest=1, invalid=-5,
          dtype=np.float32, loss="ccc_loss", zero_loss=2.0, metric=CCC, epochs=40,
          labelled_faces=1_653_900 + 376_330,
          paper={"valence": VALENCE, "arousal": AROUSAL,
                 "mean": tuple((v + a) / 2 for v, a in zip(VALENCE, AROUSAL))},
          baseline={"valence": .24, "arousal": .20, "mean": .22})

EXPR = Task("expr", EXPRESSIONS, ("EXPR_Classification_Challenge", "EXPR_Recognition_Challenge"),
            one_class=True, lowest=0, highest=7, invalid=-1,
            dtype=np.int8, loss="expr_loss", zero_loss=math.log(8), metric=CLASS_F1, epochs=10,
            labelled_faces=585_317 + 280_532,
            paper={"mean": (.4561, .4478, .4463, .4583, .4506)}, baseline={"mean": .23})

AU = Task("au", tuple(f"AU{number}" for number in AUS), ("AU_Detection_Challenge",), one_class=False,
          lowest=0, highest=1, invalid=-1,
          dtype=np.int8, loss="au_loss", zero_loss=math.log(2), metric=BINARY_F1, epochs=30,
          labelled_faces=1_356_694 + 445_836,
          paper={"mean": (.5762, .5566, .5018, .5556, .5819)}, baseline={"mean": .39})

TASKS = {task.name: task for task in (VA, EXPR, AU)}


# ---- Label files

def has_labels(root, task: Task) -> bool:
    """Is there a folder of labels for this task? Some teams have those of one task only."""
    return any((Path(root) / name).is_dir() for name in task.folders)


def label_files(root, task: Task) -> dict[str, dict[str, Path]]:
    """{"Train_Set": {video: file}, "Validation_Set": {video: file}} of one task, videos in sorted order.

    Accepts every spelling of the task's folder. Raises ValueError naming what was looked for.
    """
    found = [Path(root) / name for name in task.folders if (Path(root) / name).is_dir()]
    if not root or not found:
        raise ValueError(f"data.labels: no {' or '.join(task.folders)} in {str(root)!r}; "
                         "set data.labels to the folder of annotations that holds it")
    if len(found) > 1:
        raise ValueError(f"data.labels: both {found[0]} and {found[1]} exist; "
                         "keep one, they hold the same labels")
    splits = {}
    for name in ("Train_Set", "Validation_Set"):
        files = sorted(file for file in (found[0] / name).glob("*.txt") if not file.name.startswith("."))
        if not files:
            raise ValueError(f"{found[0] / name}: no label files (<video>.txt); "
                             "the training and validation sets both need some")
        splits[name] = {file.name.removesuffix(".txt"): file for file in files}
    return splits


def read_lines(path, header: str) -> list[str]:
    """The lines of a text file, without blank ones at its end. CRLF and a byte-order mark are accepted.

    Raises ValueError with the header that is expected if it is no text; OSError naming the file if the disk
    fails.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:                            # in the middle of a file, the system does not name it
        raise OSError(error.errno, error.strerror, str(path)) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; expected a label file with the header {header}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_labels(path, task: Task) -> np.ndarray:
    """One label file: a header line, then a line per frame; line i belongs to frame i, counted from 1.

    -> (T, outputs), or (T,) where a label is one class; invalid codes stay in. CRLF and trailing blank
    lines are accepted. Raises ValueError naming file and line for a wrong header, a short or long row, text
    for a number, and a value that the task does not have; OSError naming the file if the disk fails.
    """
    lines = read_lines(path, ",".join(task.outputs))
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    if [name.lower() for name in header] != [name.lower() for name in task.outputs]:
        raise ValueError(f"{path}: header is {','.join(header)[:200]!r}, expected {','.join(task.outputs)!r}")
    number, kind = (float, "a number") if task.dtype is np.float32 else (int, "a whole number")
    labels = np.empty((len(lines) - 1, task.width), task.dtype)
    known: dict[str, list] = {}                      # AU lines repeat: half the time
    for i, line in enumerate(lines[1:]):
        if line not in known:
            fields = line.split(",")
            if len(fields) != task.width:
                raise ValueError(f"{path}, line {i + 2}: {len(fields)} values {line[:80]!r}, "
                                 f"expected {task.width}")
            try:
                row = [number(field) for field in fields]
            except ValueError:
                row = [np.nan]                                                # which fits no range
            if not all(task.lowest <= value <= task.highest or value == task.invalid for value in row):
                raise ValueError(f"{path}, line {i + 2}: {line[:80]!r}, expected {kind} from {task.lowest} "
                                 f"to {task.highest}, or {task.invalid}")
            known[line] = row
        labels[i] = known[line]
    return labels[:, 0] if task.one_class else labels


def targets(labels: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(target, valid) of the labels' shape: where the label is invalid, target is 0 and valid False."""
    valid = labels != task.invalid
    return np.where(valid, labels, 0), valid


if __name__ == "__main__":
    for task in TASKS.values():
        print(f"{task.name:5s}{len(task.outputs):3d} outputs, {task.metric.name}, {task.loss}, "
              f"{task.epochs} epochs; labels in {task.folders[0]}\n     {','.join(task.outputs)}")
    for path in sys.argv[1:]:
        refusals = []
        for task in TASKS.values():
            try:
                valid = targets(read_labels(path, task), task)[1].reshape(-1, task.width).all(axis=1)
                print(f"{path}: {task.name}, {len(valid):,} frames, {valid.sum():,} of them fully labelled")
            except ValueError as error:
                refusals.append(f"refused: {error}")
            except OSError as error:
                refusals = [f"refused: {error}"] * len(TASKS)
                break
        if len(refusals) == len(TASKS):                       # the file of no task: why not, for each
            print("\n".join(dict.fromkeys(refusals)), file=sys.stderr)
            sys.exit(2)
