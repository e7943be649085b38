"""Files of predictions, by predict.py or for the challenge: read as they stand, and scored (paper §4.2).

NumPy only: predictions that were made elsewhere are scored without torch. Three kinds of file:

    predict.py's CSV        video,frame,...,valence,arousal,...    columns of other tasks are passed over
    predict.py's .jsonl     {"video": "136", "frame": 1, ...}      an object per line, with the same names
    a submission            image_location,valence,arousal         then a row per frame, with two values,
                            136/00001.jpg,0.5,-0.5                 or one class, or twelve 0 or 1

Rows may come in any order. The command that scores a file is in metrics.py; docs/scores.md explains what it
prints.
"""

import csv
import json
from array import array
from operator import itemgetter
from pathlib import Path

import numpy as np

from labels import Task, has_labels, label_files, read_labels, targets
from postprocessing import for_metric
from score_table import confusion, score_table
from submission_file import FRAME, header as header_of, some

HIGHEST_FRAME = 9_999_999


# ---- Rows: line, video, frame, and what stands there for the task

def csv_rows(file, path):
    """Yield (line on which the row begins, its fields), less the rows that are blank."""
    reader, line = csv.reader(file), 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not a row of a CSV: {error}") from None


def table_rows(rows, header: list[str], path, task: Task):
    """Yield the rows of predict.py's CSV, less those without a prediction, whose cells are empty."""
    wanted = ["video", "frame", *task.outputs]
    missing = [name for name in wanted if header.count(name) != 1]
    if missing:
        still = "; a table of single images (--still) has no videos" if "file" in header else ""
        raise ValueError(f"{path}, line 1: header is {','.join(header)[:200]!r}; expected one column each of "
                         f"{', '.join(missing)} for {task.name}, or a submission, whose header is "
                         f"{header_of(task)!r}{still}")
    cells_of, empty = itemgetter(*map(header.index, wanted)), ("",) * len(task.outputs)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} fields {','.join(row)[:80]!r}, "
                             f"expected {len(header)}, as many as in the header")
        video, frame, *cells = cells_of(row)
        if tuple(cells) != empty:
            yield line, video, frame, cells


def json_rows(file, path, task: Task):
    """Yield the rows of predict.py's JSON lines, less those without a prediction, where null stands."""
    wanted, nothing = ("video", "frame", *task.outputs), [None] * len(task.outputs)
    for line, text in enumerate(file, 1):
        try:
            row = json.loads(text)
            video, frame, *cells = [row[name] for name in wanted]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}, line {line}: {text.strip()[:80]!r}, expected a JSON object with "
                             f"{', '.join(wanted)} for {task.name}") from None
        if type(video) is not str or type(frame) is not int:
            raise ValueError(f"{path}, line {line}: video {str(video)[:80]!r}, frame {str(frame)[:80]!r}, "
                             "expected a name and a whole number")
        if cells != nothing:
            yield line, video, frame, cells


def submission_rows(rows, header: list[str], path, task: Task):
    """Yield the rows of a challenge submission. Each must be a prediction."""
    expected = header_of(task)
    if ",".join(header).lower() != expected.lower():
        raise ValueError(f"{path}, line 1: header is {','.join(header)[:200]!r}, expected "
                         f"{expected!r} for {task.name}")
    for line, row in rows:
        if len(row) != 1 + task.width:
            raise ValueError(f"{path}, line {line}: {len(row)} fields {','.join(row)[:80]!r}, "
                             f"expected {1 + task.width} for {task.name}")
        image = FRAME.fullmatch(row[0])
        if not image:
            raise ValueError(f"{path}, line {line}: {row[0][:80]!r} is not the name of a frame, "
                             "expected <video>/00001.jpg")
        yield line, image[1], image[2], row[1:]


# ---- A whole file

def read_predictions(path, task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{video: (numbers of its frames (n,), rising; values, float64 (n, K))}, videos in sorted order.

    Values: VA as they stand; probabilities of the classes, or of each action unit. A submission's class is
    one 1 among zeros, its action units are 0 or 1.

    Raises ValueError naming file and line: no UTF-8, nothing in it, a wrong header, too many or too few
    fields, text for a number, a value that the task does not have, a name that is no frame's, a frame twice.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return read_file(file, path, task)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; expected predictions as CSV or .jsonl") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def read_file(file, path: Path, task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `read_predictions` returns, from an open file."""
    submission = False
    if path.suffix == ".jsonl":
        rows = json_rows(file, path, task)
    else:
        rows = csv_rows(file, path)
        _, header = next(rows, (1, [""]))
        header = [name.strip() for name in header]
        submission = header[0].lower() == "image_location"
        rows = (submission_rows if submission else table_rows)(rows, header, path, task)
    place: dict[str, int] = {}                                               # of each video
    lines, videos, numbers, values = array("q"), array("q"), array("q"), array("d")     # 8 bytes an entry
    for line, video, number, cells in rows:
        try:
            numbers.append(int(number))
            values.extend(map(float, cells))
        except (ValueError, TypeError, OverflowError):
            text = ",".join(map(str, cells))
            raise ValueError(f"{path}, line {line}: frame {number!s:.20}, {text[:80]!r}, expected numbers"
                             ) from None
        lines.append(line)
        videos.append(place.setdefault(video, len(place)))
    if not lines:
        raise ValueError(f"{path}: no prediction in it; expected a row per frame, with values of {task.name}")
    lines, videos, numbers = np.array(lines), np.array(videos), np.array(numbers)       # each (rows,)
    values = np.array(values).reshape(len(lines), -1)                # (rows · K,) -> (rows, K), or (rows, 1)
    names = list(place)

    fits, expected = fitting(values, task, submission)
    wrong = np.flatnonzero(~fits)
    if len(wrong):
        row = ",".join(f"{value:g}" for value in values[wrong[0]])
        raise ValueError(f"{path}, line {lines[wrong[0]]}: {row}, expected {expected}")
    wrong = np.flatnonzero((numbers < 1) | (numbers > HIGHEST_FRAME) | (videos == place.get("", -1)))
    if len(wrong):
        raise ValueError(f"{path}, line {lines[wrong[0]]}: frame {numbers[wrong[0]]} of video "
                         f"{names[videos[wrong[0]]]!r}, expected a video's name and a number from 1")

    order = np.lexsort((numbers, videos))                                    # by video, then by number
    lines, videos, numbers, values = lines[order], videos[order], numbers[order], values[order]
    twice = np.flatnonzero((videos[1:] == videos[:-1]) & (numbers[1:] == numbers[:-1]))
    if len(twice):
        i = twice[0]
        raise ValueError(f"{path}, lines {lines[i]} and {lines[i + 1]}: both are frame {numbers[i]} of "
                         f"{names[videos[i]]}; expected each frame once")
    if submission and task.one_class:
        values = np.eye(len(task.outputs))[values[:, 0].astype(int)]         # (rows, 1) -> (rows, K), one-hot
    ends = np.searchsorted(videos, range(len(names) + 1))                    # of each video's rows
    return {name: (numbers[ends[k]:ends[k + 1]], values[ends[k]:ends[k + 1]])
            for name, k in sorted(place.items())}


def fitting(values: np.ndarray, task: Task, submission: bool) -> tuple[np.ndarray, str]:
    """Which rows have values that can be: mask (rows,), and what is expected of them, in words."""
    whole = submission and task.whole_numbers
    if submission:
        lowest, highest = task.lowest, task.highest
        expected = f"{'a whole number' if whole else 'numbers'} from {lowest} to {highest}"
        if task.invalid < lowest:
            expected += f"; {task.invalid} means that nobody annotated the frame, and is no prediction"
    elif task.whole_numbers:
        lowest, highest, expected = 0, 1, "probabilities from 0 to 1"
    else:
        lowest, highest, expected = -np.inf, np.inf, "finite numbers"
    fits = np.isfinite(values) & (values >= lowest) & (values <= highest)
    if whole:
        fits &= values == np.rint(values)
    return fits.all(axis=1), expected


# ---- Scored against labels

def find_labels(folder, task: Task) -> dict[str, Path]:
    """{video: its label file} of the validation set in Aff-Wild2's folder of annotations, or of all
    <video>.txt in any other folder. Raises ValueError if there is none."""
    if has_labels(folder, task):
        return label_files(folder, task)["Validation_Set"]
    files = sorted(file for file in Path(folder).glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise ValueError(f"--labels: {folder} holds neither {' or '.join(task.folders)} nor label files, "
                         "<video>.txt")
    return {file.name.removesuffix(".txt"): file for file in files}


def score_file(path, folder, task: Task) -> str:
    """Which videos are scored, both tables (score_table.py), and what is not scored and why.

    A frame is scored where it has a label and a prediction. Raises ValueError if there is no such frame, or
    if a file cannot be read as it should.
    """
    predictions, files = read_predictions(path, task), find_labels(folder, task)
    sums, missing, labelled, beyond = {}, {}, 0, 0
    for video, file in files.items():
        target, valid = targets(read_labels(file, task), task)               # (T, K), or (T,) of classes
        numbers, values = predictions.get(video, (np.zeros(0, int), np.zeros((0, len(task.outputs)))))
        within = numbers <= len(target)
        rows = numbers[within] - 1
        any_label = valid.reshape(len(valid), task.width).any(axis=1)        # (T,)
        labelled += any_label.sum()
        beyond += (~within).sum()
        without = any_label.sum() - any_label[rows].sum()
        if without:
            missing[video] = without
        if any_label[rows].any():
            sums[video] = task.metric.count(for_metric(values[within], task), target[rows], valid[rows])
    if not sums:
        raise ValueError("no frame has both a label and a prediction: "
                         f"{path} has videos {some(predictions)}; {folder} has labels of {some(files)}")
    each, scored = np.stack(list(sums.values())), labelled - sum(missing.values())
    lines = [f"{path}: {len(sums)} videos, {scored:,} labelled frames ({some(sums)})",
             score_table(task, each, comparable=False), "", confusion(task, each), ""]
    if missing:
        lines.append(f"not scored: {labelled - scored:,} of {labelled:,} labelled frames, in {len(missing)} "
                     f"of {len(files)} videos, have no prediction: "
                     + some(f"{video} ({frames:,})" for video, frames in missing.items()))
    unknown = {video: len(numbers) for video, (numbers, _) in predictions.items() if video not in files}
    if unknown:
        lines.append(f"not scored: {sum(unknown.values()):,} predictions of {len(unknown)} videos without "
                     f"labels: {some(unknown)}")
    if beyond:
        lines.append(f"not scored: {beyond:,} predictions past the last label of their video")
    return "\n".join(lines).rstrip()
