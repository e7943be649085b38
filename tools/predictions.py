"""Files of predictions: read as they stand, and scored against label files (paper §4.2). NumPy only.

    predict.py's CSV        video,frame,...,valence,arousal,...    columns of other tasks are passed over
    a submission            image_location,valence,arousal         then a row per frame, with two values,
                            136/00001.jpg,0.5,-0.5                 or one class, or twelve 0 or 1

Rows may come in any order. FOLDER is Aff-Wild2's annotations (then its validation set is scored), or it holds
label files <video>.txt. docs/scores.md explains what is printed.

    python -m tools.predictions --task expr --predictions FILE --labels FOLDER
"""

import argparse
import csv
import math
import re
from array import array
from collections import Counter

import numpy as np

from labels import (TASKS, Task, for_metric, has_labels, label_files, read_labels, read_lines, targets,
                    text_files)
from metrics import confusion, score_table

MTL = "image,valence,arousal,expression,aus"                         # of all three tasks: s-Aff-Wild2
FRAME = re.compile(r"(.+)/0*([0-9]{1,7})\.[A-Za-z]+")                # a row's name: 2-30-640x360/00001.jpg


def header_of(*tasks: Task) -> str:
    """The first line of a submission, of one task or of all. That of expr has nine fields, its rows two."""
    return MTL if len(tasks) > 1 else ",".join(["image_location", *tasks[0].outputs])


def split_name(name: str) -> tuple[str, int]:
    """'video86_3_left/00012.jpg' -> ('video86_3_left', 12). Raises ValueError for anything else."""
    match = FRAME.fullmatch(name)
    if not match:
        raise ValueError("expected a frame like 136/00001.jpg")
    return match[1], int(match[2])


def some(names) -> str:
    """The first five of these names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


# ---- Reading

def submitted(text: str, task: Task):
    """(video, frame, values) of a row of a submission. Raises ValueError."""
    name, _, cells = text.partition(",")
    values = task.row(cells)
    return *split_name(name), np.eye(len(task.outputs))[values[0]] if task.one_class else values


def predicted(row: dict, task: Task):
    """(video, frame, values) of a row of predict.py; no values if all are empty. Raises ValueError."""
    cells, frame = [row[name] for name in task.outputs], float(row["frame"])   # 1.0, as pandas may write it
    values = [float(cell) for cell in cells] if any(cells) else []
    known = all(0 <= value <= 1 if task.whole_numbers else math.isfinite(value) for value in values)
    if not known or not row["video"] or not frame.is_integer():
        raise ValueError("expected a video's name, a frame and its values")
    return row["video"], int(frame), values


def rows_of(path, task: Task):
    """Yield (line, video, frame, values) of each prediction. Raises as `read_predictions`."""
    names, top = ["video", "frame", *task.outputs], header_of(task)
    right = f"{top!r}, or one column each of {', '.join(names)}"
    first, *lines = read_lines(path, right) or [""]
    header = [name.strip() for name in first.split(",")]
    submission = ",".join(header).lower() == top.lower()
    if not submission and any(header.count(name) != 1 for name in names):
        raise ValueError(f"{path}, line 1: header is {','.join(header)[:200]!r}, expected {right}")
    expected = (f"a frame like 136/00001.jpg and {task.a_row}" if submission else
                f"one each of {', '.join(names)}: a video's name, a frame from 1, and "
                + ("probabilities from 0 to 1" if task.whole_numbers else "finite numbers"))
    for line, text in enumerate(lines, 2):
        if not text.strip():
            continue
        try:
            if submission:
                row = submitted(text, task)
            else:                                              # strict: as many fields as in the header
                row = predicted(dict(zip(header, next(csv.reader([text])), strict=True)), task)
            if not 1 <= row[1] <= 9_999_999:
                raise ValueError("expected a frame from 1")
        except (ValueError, csv.Error):
            raise ValueError(f"{path}, line {line}: {text.strip()[:80]!r}, expected {expected}") from None
        if len(row[2]):
            yield line, *row


def read_predictions(path, task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{video: (numbers of its frames (n,), rising; values, float64 (n, K))}, videos in sorted order.

    Values: VA as they stand; probabilities of the classes, or of each action unit. A submission's class is
    one 1 among zeros, its action units are 0 or 1. A row whose values are all empty is no prediction.

    Raises ValueError naming file and line: no UTF-8, nothing in it, a wrong header, too many or too few
    fields, text for a number, a value that the task does not have, a name that is no frame's, a frame twice.
    """
    videos: dict[str, dict[int, tuple]] = {}                   # video -> frame -> line, values
    for line, video, number, values in rows_of(path, task):
        kept = line, array("d", values)                        # 8 bytes a value
        before, _ = videos.setdefault(video, {}).setdefault(number, kept)
        if before != line:
            raise ValueError(f"{path}, lines {before} and {line}: both are frame {number} of {video}, "
                             "expected each frame once")
    if not videos:
        raise ValueError(f"{path}: no prediction in it; expected a row per frame, with values of {task.name}")
    return {video: (np.array(sorted(frames)), np.array([frames[number][1] for number in sorted(frames)]))
            for video, frames in sorted(videos.items())}


# ---- Scoring

def score_file(path, folder, task: Task) -> str:
    """Which videos are scored, both tables (metrics.py), and what is not scored and why. A frame is scored
    where it has a label and a prediction. Raises ValueError if there is none, or a file cannot be read."""
    files = label_files(folder, task)["Validation_Set"] if has_labels(folder, task) else text_files(folder)
    if not files:
        raise ValueError(f"--labels: {folder} holds neither {' or '.join(task.folders)} nor label files, "
                         "<video>.txt")
    predictions, sums, scored, missing = read_predictions(path, task), {}, 0, Counter()
    beyond = Counter({video: len(numbers) for video, (numbers, _) in predictions.items()})
    for video, file in files.items():
        target, valid = targets(read_labels(file, task), task)                 # (T, K), or (T,) of classes
        any_label = valid.reshape(len(valid), task.width).any(axis=1)          # (T,)
        numbers, values = predictions.get(video, (np.zeros(0, int), np.zeros((0, len(task.outputs)))))
        within = numbers <= len(target)
        rows = numbers[within] - 1
        beyond[video] -= len(rows)
        missing[video] = any_label.sum() - any_label[rows].sum()
        if any_label[rows].any():
            scored += any_label[rows].sum()
            sums[video] = task.metric.count(for_metric(values[within], task), target[rows], valid[rows])
    if not sums:
        raise ValueError("no frame has both a label and a prediction: "
                         f"{path} has videos {some(predictions)}; {folder} has labels of {some(files)}")
    each = np.stack(list(sums.values()))
    lines = [f"{path}: {len(sums)} videos, {scored:,} labelled frames ({some(sums)})",
             score_table(task, each, comparable=False), "", confusion(task, each), ""]
    for what, frames in (("labelled frames without a prediction", +missing),           # +: those above 0
                         ("predictions of frames that no label file has", +beyond)):
        if frames:
            lines.append(f"not scored: {sum(frames.values()):,} {what}: "
                         + some(f"{video} ({count:,})" for video, count in frames.items()))
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--predictions", required=True, metavar="FILE")
    parser.add_argument("--labels", required=True, metavar="FOLDER")
    options = parser.parse_args()
    try:
        print(score_file(options.predictions, options.labels, TASKS[options.task]))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
