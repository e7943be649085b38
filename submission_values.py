"""What a submission says of each video, and its writing. The command is submission.py's.

The values come from the run's trained task and its features: no frame is read again, because
extract_features.py has extracted the videos of the test set, too. Or they come from a table of predictions.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from checkpoints import write_file
from labels import Task
from made_of import finished, missing, there
from postprocessing import in_units, smoothed
from prediction_files import read_predictions
from run import Progress
from scoring import check_features, find_features, load, stage_of
from segments import extracted_videos, read_features
from submission_check import check
from submission_file import Template, answers, check_out, every_frame, read_template, some, write_rows



class Values(NamedTuple):
    """Where the values of a template's videos come from."""
    source: str                                        # in words
    of: Iterator[tuple[str, np.ndarray]]               # video, values in units (T, K)
    without: dict[str, str]                            # video -> why it has none


# ---- Which video is which

def last_part(video: str) -> str:
    """cropped_aligned/136 is 136."""
    return video.rpartition("/")[2]


def matched(videos, known, source) -> dict[str, str]:
    """{video of a template: its name among `known`, those of `source`}, less the videos that are not there.

    The folders above a video count only where both name them. Raises ValueError if one has several names, or
    two have the same.
    """
    names: dict[str, list[str]] = {}
    for name in known:
        names.setdefault(last_part(name), []).append(name)
    found = {video: [video] if video in known else names.get(last_part(video), []) for video in videos}
    found = {video: several for video, several in found.items() if several}
    for video, several in found.items():
        if len(several) > 1:
            raise ValueError(f"{source}: {several[0]} and {several[1]} may both be the template's {video}")
    owner: dict[str, str] = {}
    for video, (name,) in found.items():
        other = owner.setdefault(name, video)
        if other != video:
            raise ValueError(f"{source}: {name} may be the template's {other} or {video}")
    return {video: name for video, (name,) in found.items()}


# ---- Two sources

def of_run(config, team, task: Task, videos) -> Values:
    """The run's trained task on the run's features. Raises ValueError if one of the two is missing, stale, or
    does not fit the other."""
    path = config.folder(stage_of(config, task)) / "best.pt"
    if not finished(path.parent):
        raise missing(path, f"train_task.py --task {task.name}", config)
    there(path, config)
    trained = load(path, config, task, team)
    folder, origin = find_features(trained.config, team)
    check_features(path, trained.record, origin)
    extracted = extracted_videos(folder)
    known = extracted if extracted is not None else {file.stem for file in folder.glob("*.npy")}
    files, without = {}, {}
    names = matched(videos, known, folder)
    for video in videos:
        file = folder / f"{names.get(video)}.npy"
        if video not in names:
            without[video] = "no frames among the features"
        elif extracted is not None and not extracted[names[video]]["faces"]:
            without[video] = "no readable face"
        elif not file.exists():
            raise ValueError(f"{file} is gone; run extract_features.py, which extracts lost videos again")
        else:
            files[video] = file

    def values():
        progress = Progress(len(files), "videos", team)
        for video, file in files.items():
            yield video, in_units(trained.predict(read_features(file)), task)
            progress.add(1)
    changed = "".join(f"\n  {name}={was} as in the checkpoint; the configuration has {now}"
                      for name, (_, was, now) in trained.changed.items())
    return Values(f"{path} on the features in {folder}{changed}", values(), without)


def of_table(path, task: Task, videos) -> Values:
    """predict.py's table. Raises ValueError if it is none, or has no columns of the task."""
    table = read_predictions(path, task)
    names = matched(videos, table, path)
    without = {video: "not in the table" for video in videos if video not in names}
    return Values(str(path), ((video, every_frame(*table[name])) for video, name in names.items()), without)


# ---- Writing

def main(config, team, task: Task, options):
    """Write a submission, and check it. Raises ValueError if there is no video to predict."""
    check_out(options.out, options.template, task)
    if options.smooth < 0:
        raise ValueError(f"--smooth: got {options.smooth}, expected 0 frames or more")
    if team.world > 1:
        raise ValueError("a submission is written by one process; start it with python, not with torchrun")
    template = read_template(options.template, task)
    if options.predictions:
        values = of_table(options.predictions, task, template.videos)
    else:
        values = of_run(config, team, task, template.videos)
    if len(values.without) == len(template.videos):
        raise ValueError(f"{template.path}: none of its videos can be predicted: {named(values.without)}; is "
                         f"it the template of other videos? Values were looked for in {values.source}")
    print(f"{template.path}: {template.size()}\nvalues from {values.source}", flush=True)

    of_video, numbers, clipped, after = {}, 0, 0, Counter()
    for video, of_frames in values.of:
        of_video[video], outside = answers(smoothed(of_frames, options.smooth), task)
        numbers, clipped = numbers + of_video[video].size, clipped + outside
    write_file(options.out, lambda file: after.update(write_rows(file, template, task, of_video)))

    if clipped:
        print(f"  clipped to {task.lowest} to {task.highest}: {clipped:,} of {numbers:,} numbers")
    for line in remarks(template, task, values.without, after):
        print(line)
    print(check(options.out, template, task))


def remarks(template: Template, task: Task, without: dict, after: dict):
    """Yield a line about each kind of rows that are not as usual."""
    if template.again:
        more = sum(len(rows) - 1 for rows in template.again.values())
        yield f"  rows that the template has again: {more:,}, the first is {next(iter(template.again))}"
    if without:
        rows = sum(template.videos[video] for video in without)
        neutral = {"va": "0, 0", "expr": "Neutral", "au": "no action unit"}[task.name]
        yield f"  neutral values ({neutral}) for {rows:,} rows of {named(without)}"
    if after:
        videos = some([f"{video} ({count:,})" for video, count in after.items()])
        yield f"  after a video's last frame, with its values: {sum(after.values()):,} rows of {videos}"


def named(without: dict[str, str]) -> str:
    """{video: why} in words."""
    return some([f"{video} ({why})" for video, why in without.items()])
