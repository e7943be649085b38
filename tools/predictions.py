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
from array import array
from collections import Counter

import numpy as np

from labels import (TASKS, Task, for_metric, has_labels, label_files, read_labels, read_lines, split_name,
                    targets, text_files)
from metrics import confusion, score_table

MTL = "image,valence,arousal,expression,aus"                         # of all three tasks: s-Aff-Wild2


def header_of(*tasks: Task) -> str:
    """The first line of a submission, of one task or of all. That of expr has nine fields, its rows two."""
    return MTL if len(tasks) > 1 else ",".join(["image_location", *tasks[0].outputs])


def some(names) -> str:
    """The first five of these names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


# ---- Reading

def predicted(row: dict, task: Task) -> tuple[str, float, list[float]]:
    """(video, frame, values) of a row of predict.py; no values if all are empty. Raises ValueError."""
    cells = [row[name] for name in task.outputs]
    values = [float(cell) for cell in cells] if any(cells) else []
    if not all(0 <= value <= 1 if task.whole_numbers else math.isfinite(value) for value in values):
        raise ValueError("expected probabilities, or finite numbers")
    return row["video"], float(row["frame"]), values                           # 1.0, as pandas may write it


def read_predictions(path, task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{video: (numbers of its frames (n,), rising; values, float64 (n, K))}, videos in sorted order.

    Values: VA as they stand; probabilities of the classes, or of each action unit. A submission's class is
    one 1 among zeros, its action units are 0 or 1. A row whose values are all empty is no prediction.

    Raises ValueError naming file and line: no UTF-8, nothing in it, a wrong header, too many or too few
    fields, text for a number, a value that the task does not have, a name that is no frame's, a frame twice.
    """
    names, top = ["video", "frame", *task.outputs], header_of(task)
    right = f"{top!r}, or one column each of {', '.join(names)}"
    first, *lines = read_lines(path, right) or [""]
    header = [name.strip(' "') for name in first.split(",")]
    submission = ",".join(header).lower() == top.lower()
    if not submission and any(header.count(name) != 1 for name in names):
        raise ValueError(f"{path}, line 1: header is {','.join(header)[:200]!r}, expected {right}")
    expected = (f"a frame like 136/00001.jpg and {task.a_row}" if submission else
                f"one each of {', '.join(names)}: a video's name, a frame from 1, and "
                + ("probabilities from 0 to 1" if task.whole_numbers else "finite numbers"))
    videos: dict[str, dict[int, tuple]] = {}                   # video -> frame -> line, values
    for line, text in enumerate(lines, 2):
        try:
            fields = next(csv.reader([text.strip()]), [])
            if not fields:
                continue                                       # a blank line
            if submission:
                (video, frame), values = split_name(fields[0]), task.row(",".join(fields[1:]))
                values = np.eye(len(task.outputs))[values[0]] if task.one_class else values
            else:                                              # strict: as many fields as in the header
                video, frame, values = predicted(dict(zip(header, fields, strict=True)), task)
            if not (video and 1 <= frame <= 9_999_999 and frame == int(frame)):
                raise ValueError("expected a frame from 1")
        except (ValueError, csv.Error):
            raise ValueError(f"{path}, line {line}: {text.strip()[:80]!r}, expected {expected}") from None
        kept = line, array("d", values)                        # 8 bytes a value
        before, _ = videos.setdefault(video, {}).setdefault(int(frame), kept) if len(values) else kept
        if before != line:
            raise ValueError(f"{path}, lines {before} and {line}: both are frame {frame:g} of {video}, "
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
