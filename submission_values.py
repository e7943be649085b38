"""What a submission says of each video, and its writing: from the run's own features and trained task.

No frame is read again: extract_features.py has extracted the videos of the test set, too. What a video's
frames get where something is missing is in docs/submission.md. The command is submission.py's.
"""

from collections import Counter
from pathlib import Path

from checkpoints import write_file
from labels import Task
from made_of import finished, missing, there
from postprocessing import in_units, smoothed
from run import Progress
from scoring import check_features, find_features, load, stage_of
from segments import extracted_videos, read_features
from submission_check import check
from submission_file import Template, answers, check_out, read_template, write_rows

SHOWN = 5                  # names in a line


def last_part(video: str) -> str:
    """A template may name the folders above a video: cropped_aligned/136 is 136."""
    return video.rpartition("/")[2]


def feature_files(folder: Path, videos) -> tuple[dict[str, Path], dict[str, str]]:
    """{video: its features}, and {video: why it has none}. Raises ValueError if some are gone that were
    extracted, or if two videos would have the same."""
    extracted, paths, without = extracted_videos(folder), {}, {}
    for name, count in Counter(map(last_part, videos)).items():
        if count > 1:
            raise ValueError(f"the template has {count} videos called {name!r} in different folders; the "
                             f"features in {folder} do not tell them apart")
    for video in videos:
        name = last_part(video)
        path = folder / f"{name}.npy"
        if extracted is not None and name not in extracted:
            without[video] = "no frames when features were extracted"
        elif extracted is not None and not extracted[name]["faces"]:
            without[video] = "no readable face"
        elif extracted is None and not path.exists():
            without[video] = "no features"
        elif not path.exists():
            raise ValueError(f"{path} is gone; run extract_features.py, which extracts lost videos again")
        else:
            paths[video] = path
    return paths, without


def of_run(config, team, task: Task, template: Template):
    """The run's trained task on its features. -> a generator of (video, values in units (T, K)), how many
    videos, {video: why it has no values}, where they come from.

    Raises ValueError if one of the two is missing, stale, or does not fit the other.
    """
    path = config.folder(stage_of(config, task)) / "best.pt"
    if not finished(path.parent):
        raise missing(path, f"train_task.py --task {task.name}", config)
    there(path, config)
    trained = load(path, config, task, team)
    folder, origin = find_features(trained.config, team)
    check_features(path, trained.record, origin)
    paths, without = feature_files(folder, template.videos)

    def values():
        progress = Progress(len(paths), "videos", team)
        for video, file in paths.items():
            yield video, in_units(trained.predict(read_features(file)), task)
            progress.add(1)
    changed = "".join(f"\n  {name}={was} as in the checkpoint; the configuration has {now}"
                      for name, (_, was, now) in trained.changed.items())
    return values(), len(paths), without, f"{path} on the features in {folder}{changed}"


def main(config, team, task: Task, options):
    """Write a submission, and check it. Raises ValueError if there is no video to predict."""
    check_out(options.out, options.template, task)
    if options.smooth < 0:
        raise ValueError(f"--smooth: got {options.smooth}, expected 0 frames or more")
    if team.world > 1:
        raise ValueError("a submission is written by one process; start it with python, not with torchrun")
    template = read_template(options.template, task)
    values, count, without, source = of_run(config, team, task, template)
    if not count:
        raise ValueError(f"{template.path}: none of its {len(template.videos)} videos can be predicted, "
                         f"such as {named(without)}; is it a template for other videos?")
    print(f"{template.path}: {len(template.names):,} rows of {len(template.videos):,} videos\n"
          f"values from {source}", flush=True)

    of_video, numbers, clipped = {}, 0, 0
    for video, of_frames in values:
        of_video[video], outside = answers(smoothed(of_frames, options.smooth), task)
        numbers, clipped = numbers + of_video[video].size, clipped + outside
    written = Counter()
    write_file(options.out, lambda file: written.update(write_rows(file, template, task, of_video)))

    for line in remarks(template, task, without, written, numbers, clipped):
        print(line)
    print(check(options.out, template, task))


def remarks(template: Template, task: Task, without: dict, after: dict, numbers: int, clipped: int):
    """Yield a line about each thing that is not as usual."""
    if template.again:
        more = sum(len(rows) - 1 for rows in template.again.values())
        yield f"  rows that the template has again: {more:,}, such as {next(iter(template.again))}"
    if without:
        rows = sum(template.videos[video] for video in without)
        neutral = {"va": "valence 0, arousal 0", "expr": "0, Neutral", "au": "no action unit"}[task.name]
        yield f"  neutral values ({neutral}) for {rows:,} rows of videos without any: {named(without)}"
    if after:
        each = ", ".join(f"{video} ({count:,})" for video, count in list(after.items())[:SHOWN])
        more = f" and {len(after) - SHOWN} more" if len(after) > SHOWN else ""
        yield (f"  rows after a video's last frame, with the values of that frame: "
               f"{sum(after.values()):,}, of {each}{more}")
    if clipped:
        yield f"  clipped to {task.lowest} to {task.highest}: {clipped:,} of {numbers:,} numbers"


def named(without: dict[str, str]) -> str:
    """{video: why} in words, the first few."""
    each = ", ".join(f"{video} ({why})" for video, why in list(without.items())[:SHOWN])
    return each + (f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "")
