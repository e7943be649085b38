"""The challenge's files: write a submission, or check one. Templates and rules: docs/predict.md.

    python -m tools.submission --task va --template FILE --out predictions.txt                  # from the run
    python -m tools.submission --task va --template FILE --out predictions.txt --predictions predictions.csv
    python -m tools.submission --task va --template FILE --check predictions.txt                # anybody's

A template names the frames of the test set: each of its rows up to the first comma. They get their values in
the template's order, from the run's trained task and features, or from a table of predict.py. Valence and
arousal are clipped to -1 to 1; the expression is the most probable one; an action unit is 1 if its
probability is above 0.5. --check names the first wrong line of a submission (then the exit code is 2).
"""

from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np

from engine.config import from_command_line, print_all
from labels import TASKS, Task, in_units, read_lines, smoothed
from tools.predictions import FRAME, header_of, read_predictions, some, split_name

try:
    from data import extracted_videos, read_features
    from engine.distributed import Team, choose_device
    from engine.training import Progress
    from pipeline import finished, folder, lines_of, missing
    from scoring import check_features, find_features, load
except ModuleNotFoundError:         # --check and --predictions serve where torch is not installed
    load = None


# ---- Templates, and what is checked

def read_template(path, task: Task) -> list[str]:
    """The names of a template's frames, in its order; a header and dummy values may be there or not. Raises
    ValueError naming file and line if it is empty, of another task, or a row does not begin with a name."""
    top, names = header_of(task), []
    for number, line in enumerate(read_lines(path, top), 1):
        if number == 1 and line.strip(", ").lower() in ("image_location", top.lower()):
            continue
        name, *values = [field.strip() for field in line.split(",")]
        if not FRAME.fullmatch(name) or sum(map(bool, values)) not in (0, task.width):
            raise ValueError(f"{path}, line {number}: {line[:80]!r}, expected a frame like '136/00001.jpg,', "
                             f"with {task.width} dummy values for {task.name} or none, below {top!r}")
        names.append(name)
    if not names:
        raise ValueError(f"{path}: no rows; expected a line for each frame, like '136/00001.jpg,'")
    return names


def right(line: str | None, name: str | None, task: Task) -> bool:
    """Is this the row of the frame `name`: with as many numbers as the task has, within their range?"""
    found, _, numbers = (line or "").partition(",")
    try:
        return found == name and bool(task.row(numbers))
    except ValueError:
        return False


def check(path, template, task: Task) -> str:
    """One sentence about a submission that is right: a header, then a row for each of the template's, in its
    order. Raises ValueError naming the first wrong line, what was found and expected, and how many more lines
    are wrong."""
    top, names = header_of(task), read_template(template, task)
    lines = read_lines(path, top, encoding="utf-8")            # as it stands: a byte-order mark is wrong
    pairs = list(zip_longest(lines, [top, *names]))            # None where one of them has ended
    wrong = [i for i, (line, name) in enumerate(pairs)
             if not (line == top == name or right(line, name, task))]
    if wrong:
        line, name = pairs[wrong[0]]
        found = "the file ends" if line is None else repr(line[:80])
        wanted = "the file's end" if name is None else repr(name) + f" and {task.a_row}" * (name != top)
        raise ValueError(f"{path}, line {wrong[0] + 1}: {found}, expected {wanted}\n"
                         f"  more lines that are wrong or out of place: {len(wrong) - 1:,} of {len(lines):,}")
    videos = len({split_name(name)[0] for name in names})
    return f"{path} is right: {len(names):,} rows of {videos:,} videos, in the order of {template}"


# ---- Sources: -> {video of the template: values in units (T, K)} of those that are there, the source

def matched(videos, known, source) -> dict[str, str]:
    """{video of a template: its name among `known`}, less the videos that are not there. The folders above a
    video count only where both name them: cropped_aligned/136 is 136. Raises ValueError if one has several
    names, or two have the same."""
    found = {}
    for video in videos:
        last = video.rpartition("/")[2]
        fits = [video] if video in known else [name for name in known if name.rpartition("/")[2] == last]
        if len(fits) > 1 or set(fits) & set(found.values()):
            raise ValueError(f"{source}: the template's {video} may be {' or '.join(fits)}, and each may be "
                             "another of its videos; expected one name for each video")
        if fits:
            found[video] = fits[0]
    return found


def of_table(path, task: Task, videos):
    """From predict.py's table, or another submission. A frame without values gets those of the frame before
    it; at the start, those of the first."""
    table, values = read_predictions(path, task), {}
    for video, name in matched(videos, table, path).items():
        numbers, rows = table[name]
        before = np.searchsorted(numbers, np.arange(1, numbers[-1] + 1), side="right") - 1     # -1: none
        values[video] = rows[np.maximum(before, 0)]
    return values, path


def of_run(config, task: Task, videos):
    """From the run's trained task on its features; no frame is read again. Raises ValueError if one of the
    two is missing, stale, or does not fit the other."""
    if load is None:
        raise ValueError("the values of a run need torch; install it, or give --predictions")
    team = Team(0, 1, choose_device(config.run.device))
    path = folder("task", config, task) / "best.pt"
    if not finished(path.parent):
        raise missing(path, f"train_task --task {task.name}", config)
    trained = load(path, config, task, team)
    features, origin = find_features(trained.config, team)
    check_features(path, trained.record, origin)
    extracted = extracted_videos(features)
    if extracted is None:                                      # they were made elsewhere
        known = {file.stem for file in features.glob("*.npy")}
    else:
        known = {name for name, row in extracted.items() if row["faces"]}
    names, values = matched(videos, known, features), {}
    progress = Progress(len(names), "videos", team)
    for video, name in names.items():
        values[video] = in_units(trained.predict(read_features(features / f"{name}.npy")), task)
        progress.add(1)
    return values, f"{path} on the features in {features}{lines_of(trained.changed)}"


# ---- Writing

def answers(values: np.ndarray, task: Task) -> np.ndarray:
    """What a submission says of values in units: (T, K) -> (T, width)."""
    if task.one_class:
        return values.argmax(axis=1)[:, None]
    return (values > 0.5).astype(int) if task.yes_or_no else values.clip(task.lowest, task.highest)


def main(config, task: Task, options):
    """Check a submission; or write one and check it. Yields lines: the source, which rows have the values of
    no frame of their own, and what `check` says."""
    if bool(options.out) == bool(options.check) or options.smooth < 0:
        raise ValueError("give either --out or --check, and --smooth 0 or more")
    if options.check:
        yield check(options.check, options.template, task)
        return
    out, top, names = Path(options.out), header_of(task), read_template(options.template, task)
    if out.exists() and (out.samefile(options.template) or read_lines(out, top)[:1] not in ([], [top])):
        raise ValueError(f"--out: {out} exists and is no submission of --task {task.name}; delete it, or "
                         "give another name")
    videos = Counter(split_name(name)[0] for name in names)
    if options.predictions:
        values, source = of_table(options.predictions, task, videos)
    else:
        values, source = of_run(config, task, videos)
    unknown = {video: count for video, count in videos.items() if video not in values}
    if not values:
        raise ValueError(f"{options.template}: none of its videos, {some(unknown)}, has values in {source}; "
                         "is it the template of other videos?")
    yield f"values from {source}"

    said = {video: answers(smoothed(rows, options.smooth), task) for video, rows in values.items()}
    said |= dict.fromkeys(unknown, np.zeros((1, task.width), int))             # neutral
    lines, after, digits = [top], Counter(), "" if task.whole_numbers else ".6f"
    for name in names:
        video, number = split_name(name)
        row = said[video][min(max(number, 1), len(said[video])) - 1]           # some copies count from 0
        after[video] += number > len(said[video]) and video in values
        lines.append(",".join([name, *[f"{value:{digits}}" for value in row]]))
    temporary = out.with_name(f".{out.name}.tmp")                              # whole or not at all
    temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    temporary.replace(out)
    for what, rows in (("neutral values, because no face is known", unknown),
                       ("after a video's last frame, with its values", +after)):
        if rows:
            yield (f"  {what}: {sum(rows.values()):,} rows of "
                   + some(f"{video} ({count:,})" for video, count in rows.items()))
    yield check(out, options.template, task)


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__,
        task={"choices": list(TASKS), "required": True},
        template={"required": True, "metavar": "FILE", "help": "names the frames, in order"},
        out={"default": "", "metavar": "FILE", "help": "the submission to write"},
        predictions={"default": "", "metavar": "FILE", "help": "values from this table, not from the run"},
        check={"default": "", "metavar": "FILE", "help": "a submission to check; nothing is written"},
        smooth={"type": int, "default": 0, "metavar": "K", "help": "mean over K frames before and after"})
    print_all(main(config, TASKS[options.task], options))
