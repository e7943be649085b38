"""The challenge's files: write a submission, or check one. Templates and rules: docs/predict.md.

    python -m tools.submission --task va --template FILE --out predictions.txt                  # from the run
    python -m tools.submission --task va --template FILE --out predictions.txt --predictions predictions.csv
    python -m tools.submission --task va --template FILE --check predictions.txt                # anybody's

A template names the frames of the test set: each of its rows up to the first comma. They get their values in
the template's order, from the run's trained task and features, or from a table of predict.py. Valence and
arousal are clipped to -1 to 1; the expression is the most probable one; an action unit is 1 if its
probability is above 0.5. A row of --task mtl (s-Aff-Wild2) holds all of these. --check names the first wrong
line of a submission (then the exit code is 2); it reads no configuration.
"""

from collections import Counter
from contextlib import suppress
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np

from engine.config import load, options_of, print_all
from labels import NAME, TASKS, Task, in_units, read_lines, smoothed, split_name
from tools.predictions import header_of, read_predictions, some

try:
    import scoring
    from data import read_features
    from engine.distributed import Team, choose_device
    from pipeline import find_input, finished, folder, lines_of, missing
except ModuleNotFoundError:         # --check and --predictions serve where torch is not installed
    scoring = None


# ---- Templates, and what is checked

def read_template(path, *tasks: Task) -> list[str]:
    """The names of a template's frames, in its order; a header and dummy values may be there or not. Raises
    ValueError naming file and line if it is empty, of another task, or a row does not begin with a name."""
    top, width, names = header_of(*tasks), sum(task.width for task in tasks), []
    for number, line in enumerate(read_lines(path, top), 1):
        head, first = line.strip(", ").lower(), line.partition(",")[0].lower()
        if number == 1 and (head in ("image_location", top.lower()) or first == "image"):
            continue
        name, *values = [field.strip() for field in line.split(",")]
        if not NAME.fullmatch(name) or sum(map(bool, values)) not in (0, width):
            raise ValueError(f"{path}, line {number}: {line[:80]!r}, expected a frame like '136/00001.jpg,', "
                             f"with {width} dummy values or none, below {top!r}")
        names.append(name)
    if not names:
        raise ValueError(f"{path}: no rows; expected a line for each frame, like '136/00001.jpg,'")
    return names


def right(line: str | None, name: str | None, *tasks: Task) -> bool:
    """Is this the row of the frame `name`: with as many numbers as the tasks have, within their range?"""
    found, *fields = (line or "").split(",")
    rest = iter(fields)
    with suppress(ValueError):
        for task in tasks:
            task.row(",".join(islice(rest, task.width)))
        return found == name and not list(rest)
    return False


def check(path, template, *tasks: Task) -> str:
    """One sentence about a submission that is right: a header, then a row for each of the template's, in its
    order. Raises ValueError naming the first wrong line, what was found and expected, and how many more lines
    are wrong."""
    top, names = header_of(*tasks), read_template(template, *tasks)
    lines = read_lines(path, top, encoding="utf-8")            # as it stands: a byte-order mark is wrong
    pairs = list(zip_longest(lines, [top, *names]))            # None where one of them has ended
    wrong = [i for i, (line, name) in enumerate(pairs)
             if not (line == top == name or right(line, name, *tasks))]
    if wrong:
        line, name = pairs[wrong[0]]
        found = "the file ends" if line is None else repr(line[:80])
        a_row = ", ".join(task.a_row for task in tasks)
        wanted = "the file's end" if name is None else repr(name) + f" and {a_row}" * (name != top)
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
        fits = [video] if video in known else [name for name in known if Path(name).name == Path(video).name]
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
    if scoring is None:
        raise ValueError("the values of a run need torch; install it, or give --predictions")
    team = Team(0, 1, choose_device(config.run.device))
    path = folder("task", config, task) / "best.pt"
    if not finished(path.parent):
        raise missing(path, f"train_task --task {task.name}", config)
    trained = scoring.load(path, config, task, team)
    features, origin = find_input(trained.config, team, "task.features")
    scoring.check_features(path, trained.record, origin)
    known = {file.stem for file in features.glob("*.npy")}
    values = {video: in_units(trained.predict(read_features(features / f"{name}.npy")), task)
              for video, name in matched(videos, known, features).items()}
    return values, f"{path} on the features in {features}{lines_of(trained.changed)}"


# ---- Writing

def answers(values: np.ndarray, task: Task) -> list[str]:
    """What a submission says of values in units, (n, K): the text of each row."""
    if task.one_class:
        return [f"{k}" for k in values.argmax(axis=1)]
    if task.yes_or_no:
        return [",".join(f"{value:d}" for value in row) for row in (values > 0.5).astype(int)]
    return [",".join(f"{value:.6f}" for value in row) for row in values.clip(task.lowest, task.highest)]


def main(options):
    """Check a submission; or write one and check it. Yields lines: the sources, which rows have the values of
    no frame of their own, and what `check` says."""
    tasks = list(TASKS.values()) if options.task == "mtl" else [TASKS[options.task]]
    if bool(options.out) == bool(options.check) or options.smooth < 0:
        raise ValueError("give either --out or --check, and --smooth 0 or more")
    if options.check:
        yield check(options.check, options.template, *tasks)
        return
    out, top, names = Path(options.out), header_of(*tasks), read_template(options.template, *tasks)
    if out.exists() and (out.samefile(options.template) or read_lines(out, top)[:1] not in ([], [top])):
        raise ValueError(f"--out: {out} exists and is no submission of --task {options.task}; delete it, or "
                         "give another name")
    frames, columns = [split_name(name) for name in names], [names]
    videos, unknown, last = Counter(video for video, _ in frames), {}, Counter()
    given = options.predictions or load(options.config, options.set)
    for task in tasks:
        values, source = (of_table if options.predictions else of_run)(given, task, videos)
        unknown |= {video: count for video, count in videos.items() if video not in values}
        if not values:
            raise ValueError(f"{options.template}: none of its videos, {some(unknown)}, has values in "
                             f"{source}; is it the template of other videos?")
        yield f"values of {task.name} from {source}"
        of_each = dict.fromkeys(videos, np.zeros((1, len(task.outputs))))                # neutral
        of_each |= {video: smoothed(rows, options.smooth) for video, rows in values.items()}
        last |= Counter({video: len(rows) for video, rows in of_each.items()})           # the larger of each
        rows = [of_each[video][min(max(number, 1), len(of_each[video])) - 1]             # some count from 0
                for video, number in frames]
        columns.append(answers(np.stack(rows), task))
    lines = [top, *map(",".join, zip(*columns))]
    after = Counter(video for video, number in frames if video not in unknown and number > last[video])
    temporary = out.with_name(f".{out.name}.tmp")                              # whole or not at all
    temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    temporary.replace(out)
    for what, rows in (("neutral values, because no face is known", unknown),
                       ("after a video's last frame, with its values", after)):
        if rows:
            yield (f"  {what}: {sum(rows.values()):,} rows of "
                   + some(f"{video} ({count:,})" for video, count in rows.items()))
    yield check(out, options.template, *tasks)


if __name__ == "__main__":
    options = options_of(
        __doc__,
        task={"choices": [*TASKS, "mtl"], "required": True, "help": "mtl: all three in a row"},
        template={"required": True, "metavar": "FILE", "help": "names the frames, in order"},
        out={"default": "", "metavar": "FILE", "help": "the submission to write"},
        predictions={"default": "", "metavar": "FILE", "help": "values from this table, not from the run"},
        check={"default": "", "metavar": "FILE", "help": "a submission to check; nothing is written"},
        smooth={"type": int, "default": 0, "metavar": "K", "help": "mean over K frames before and after"})
    print_all(main(options))
