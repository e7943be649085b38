"""The challenge's files: the rows of a template, and those of a submission. NumPy only.

    image_location,valence,arousal                 va: two numbers from -1 to 1
    image_location,Neutral,Anger,...,Other         expr: one class, 0 to 7; 9 fields here, 2 in each row
    image_location,AU1,AU2,...,AU26                au: twelve of 0 or 1
    2-30-640x360/00001.jpg,0.5,-0.5

A template names the frames that a submission must hold, each row up to its first comma; what follows are
dummy values, or nothing. A frame's number is the one in its name, never its place in a list.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labels import TASKS, Task

SHOWN = 5                                                      # names in a message
FRAME = re.compile(r"(.+)/0*([0-9]{1,7})\.[A-Za-z]+")          # the last slash parts the video from the frame


# ---- Rows

def header(task: Task) -> str:
    """The first line of a submission."""
    return ",".join(["image_location", *task.outputs])


def task_of(line: str) -> Task | None:
    """The task whose header this is."""
    line = line.strip().lower()
    return next((task for task in TASKS.values() if line == header(task).lower()), None)


def split_name(name: str) -> tuple[str, int]:
    """'video86_3_left/00012.jpg' -> ('video86_3_left', 12). Raises ValueError for anything else."""
    match = FRAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name[:80]!r} is no frame; expected a name like '2-30-640x360/00001.jpg'")
    return match[1], int(match[2])


def some(names) -> str:
    """The first of these names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def numbered_lines(path):
    """Yield (number, line) of a text file, without line ends (also CRLF) and without blank lines at its end.

    Raises ValueError naming the file if it cannot be read as text.
    """
    blank = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    blank += 1
                    continue
                yield from ((number - blank + i, "") for i in range(blank))
                blank = 0
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; expected rows like "
                         "'2-30-640x360/00001.jpg,...'") from None


# ---- Templates

class Template(NamedTuple):
    """The rows of a template, in its order."""
    path: str
    names: list[str]               # of all rows
    rows: dict[str, int]           # name -> its first row, counted from 0
    again: dict[str, list[int]]    # name -> all of its rows, where it has more than one
    videos: dict[str, int]         # video -> how many rows it has
    first_line: int                # of the file: 2 after a header, else 1

    def size(self) -> str:
        """How many rows of how many videos, in words."""
        rows, videos = len(self.names), len(self.videos)
        return f"{rows:,} row{'s' * (rows > 1)} of {videos:,} video{'s' * (videos > 1)}"


def read_template(path, task: Task) -> Template:
    """A template of either kind, with or without a header, with CRLF and a byte-order mark or without.

    Raises ValueError naming file and line if it is empty, of another task, or a row does not begin with the
    name of a frame.
    """
    names, rows, again, videos, first_line = [], {}, {}, Counter(), 1
    for number, line in numbered_lines(path):
        line = line.removeprefix("\ufeff") if number == 1 else line
        name, _, values = line.partition(",")
        name = name.strip()
        if number == 1 and name.lower() == "image_location":
            other = task_of(line)
            if other and other is not task:
                raise ValueError(f"{path}, line 1: the template of --task {other.name}, not of --task "
                                 f"{task.name}")
            first_line = 2
            continue
        try:
            video, _ = split_name(name)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        given = sum(bool(value.strip()) for value in values.split(","))
        if not names and given not in (0, task.width):
            raise ValueError(f"{path}, line {number}: {given} dummy values, expected {task.width} for --task "
                             f"{task.name}, or none; is it the template of another task?")
        row = rows.setdefault(name, len(names))
        if row != len(names):
            again.setdefault(name, [row]).append(len(names))
        names.append(name)
        videos[video] += 1
    if not names:
        raise ValueError(f"{path}: no rows; expected a line for each frame, like '2-30-640x360/00001.jpg,'")
    return Template(str(path), names, rows, again, dict(videos), first_line)


# ---- Writing

def check_out(out, template, task: Task):
    """Raises ValueError if `out` cannot be written, or if that would destroy something else than a submission
    of this task."""
    path = Path(out)
    if not out or out.endswith("/") or path.is_dir():
        raise ValueError(f"--out: got {out!r}, expected the name of a file, like predictions.txt")
    if not path.exists():
        return
    if Path(template).exists() and path.samefile(template):
        raise ValueError(f"--out: {out} is the template itself; give another name")
    try:
        _, first = next(numbered_lines(path), (1, ""))
    except ValueError:
        first = "not text"
    if first not in ("", header(task)):
        raise ValueError(f"--out: {out} exists and is no submission of --task {task.name}; delete it, or "
                         "give another name")


def every_frame(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values of frames 1 to the last: a frame without any gets those of the frame before it that has
    some, at the start those of the first. Shape: numbers (n,) ascending, values (n, K) -> (T, K)"""
    frames = np.arange(1, numbers[-1] + 1)
    before = np.searchsorted(numbers, frames, side="right") - 1         # -1: none before it
    return values[np.maximum(before, 0)]


def answers(values: np.ndarray, task: Task) -> tuple[np.ndarray, int]:
    """What a submission says of values in units (postprocessing.py), and how many numbers were clipped.
    Shape: (T, K) -> (T, width)"""
    if task.one_class:
        return values.argmax(axis=1)[:, None].astype(np.int8), 0
    if task.yes_or_no:
        return (values > 0.5).astype(np.int8), 0
    outside = (values < task.lowest) | (values > task.highest)
    return values.clip(task.lowest, task.highest), int(outside.sum())


def write_rows(file, template: Template, task: Task, of_video: dict[str, np.ndarray]) -> Counter:
    """A submission, into a file that is open for bytes. `of_video`: {video: answers of frames 1 to T}, each
    (T, width). -> {video: how many of its rows lie after its last frame}

    A frame after the last has the answers of the last. A video that is not there has neutral ones: 0.
    """
    neutral, after = np.zeros((1, task.width), task.dtype), Counter()
    value = "{:.6f}" if task.dtype is np.float32 else "{}"
    row = ",".join(["{}"] + [value] * task.width) + "\n"
    file.write(f"{header(task)}\n".encode())
    for name in template.names:
        video, number = split_name(name)
        rows = of_video.get(video, neutral)
        if number > len(rows) and video in of_video:
            after[video] += 1
        place = min(max(number, 1), len(rows)) - 1
        file.write(row.format(name, *rows[place].tolist()).encode())
    return after
