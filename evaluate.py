"""The score of a trained segment model on the validation videos, as a table (paper §4.2, Table 1).

All labelled frames of all videos are pooled, each counted once, with any number of processes (`scoring.py`).
The model and its segments are built with the settings that its checkpoint carries.

    python evaluate.py --task au                  # score runs/demo/task_au/best.pt on the validation videos
    python evaluate.py --task va --config my.yaml --checkpoint somewhere/best.pt
    python evaluate.py --task au --set run.name=k3 --against demo       # the difference, with its interval
    python evaluate.py --task expr --merge triangular                   # another mean where segments overlap
    python evaluate.py --task au --set run.name=held --tune             # smoothing and thresholds

--merge: frames that several segments cover get their mean, a mean that counts the middle of a segment more
(triangular), or are covered once (none: the segments follow each other). --tune chooses smoothing and
thresholds on the training videos that the run has held back (task.held_out; `tuning.py`). --against compares
with the stored score of another run, on the same videos (`intervals.py`).

Predictions made elsewhere are scored by `metrics.py`.
"""

from pathlib import Path

import numpy as np

from config import from_command_line
from intervals import difference
from labels import TASKS
from made_of import finished, missing, there
from postprocessing import Postprocessing
from reports import report, to_score
from scoring import (MERGING, check_features, check_scenes, count_as_authors, count_frames, find_features,
                     load, read_sums, stage_of, sums_of)
from score_table import confusion
from segments import open_videos
from splits import split
from tuning import choose


def main(config, team, task, checkpoint="", merge="mean", tune=False, against=""):
    """Score `checkpoint`, or this configuration's best.pt, on the validation videos."""
    # model
    path = Path(checkpoint or config.folder(stage_of(config, task)) / "best.pt")
    if not checkpoint:
        if not finished(path.parent):
            raise missing(path, f"train_task.py --task {task.name}", config)
        there(path, config)
    trained = load(path, config, task, team)
    config = trained.config
    if against:                                              # refused now rather than after the scoring
        read_sums(Path(config.run.out) / against / stage_of(config, task))
    for name, (_, was, now) in trained.changed.items():
        team.say(f"  {name}={was} as in the checkpoint; the configuration has {now}")

    # data
    try:
        features, origin = find_features(config, team)
    except ValueError as refusal:
        raise ValueError(f"{refusal}\n  or name the features that {path} was trained on: "
                         "--set task.features=...") from None
    train_files, val_files = split(config.data.labels, task, config.task.fold)
    videos, left_out, dim = open_videos(val_files, features, task)
    try:
        other_videos, _, _ = open_videos(train_files, features, task)
    except ValueError:                                       # those of the validation are enough to score
        other_videos = []
    check_features(path, trained.record, origin)
    check_scenes(path, trained.record, videos)
    if dim != trained.model.dim:
        raise ValueError(f"{path}: takes features of {trained.model.dim} numbers, those in {features} have "
                         f"{dim}; give those it was trained on, --set task.features=...")
    scored = to_score(videos, left_out, other_videos, task, origin, config)
    if trained.record is None:
        scored = scored._replace(comparable=False)
        team.say(f"  warning: {path} does not tell what it was made of; "
                 "it may have been trained on these videos")

    # score
    how = choose(trained, other_videos, origin, merge, path) if tune else Postprocessing()

    def count(*video):
        return np.stack([count_frames(*video, merge, how), count_as_authors(*video)])
    both = sums_of(trained, videos, merge, count)                                  # (videos, 2, ...)
    sums, authors = both[:, 0], both[:, 1]
    team.say(f"{report(task, sums, scored, path, config.task.fold)}\n\n{confusion(task, sums)}\n")
    if merge != "mean" or tune:
        team.say(f"merging: {merge}; post-processing: {how.text() or 'none'}")
    if merge != "none":
        team.say(f"authors' protocol: {task.metric.score(authors.sum(axis=0)).mean():.3f} (frames of "
                 "overlapping segments count twice, tails and short videos are lost; no post-processing)")
    if against:
        team.say(compare(task, sums, videos, against, config))


def compare(task, sums, videos, run_name: str, config) -> str:
    """Our score less that of another run on the same videos, in words."""
    folder = Path(config.run.out) / run_name / stage_of(config, task)
    names, theirs = read_sums(folder)
    mine = [video.name for video in videos]
    if sorted(mine) != sorted(names):
        other = sorted(set(mine) ^ set(names))
        raise ValueError(f"{folder} was scored on other videos, such as {', '.join(other[:5])}; two systems "
                         "are compared on the same ones")
    theirs = theirs[[names.index(name) for name in mine]]
    if not np.array_equal(task.metric.labelled(sums.sum(axis=0)), task.metric.labelled(theirs.sum(axis=0))):
        raise ValueError(f"{folder} was scored with other labels; train it again with these")
    found = difference(sums, theirs, task.metric)
    verdict = "ours is better" if found.low > 0 else "ours is worse" if found.high < 0 else (
        "the interval holds 0: these videos do not tell which is better")
    return (f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] against {run_name} "
            f"({task.metric.score(theirs.sum(axis=0)).mean():.3f}, as its training ended), 95 % interval "
            f"over {len(mine)} videos; {verdict}")


if __name__ == "__main__":
    import pipeline
    config, options = from_command_line(
        __doc__, task={"choices": list(TASKS), "required": True, "help": "which labels"},
        checkpoint={"default": "", "metavar": "FILE", "help": "default: this configuration's best.pt"},
        merge={"choices": list(MERGING), "default": "mean", "help": "frames that several segments cover"},
        tune={"action": "store_true", "help": "smoothing and thresholds, chosen on held-out training videos"},
        against={"default": "", "metavar": "RUN", "help": "another run's name: the difference to it"})
    pipeline.run("evaluate", config, TASKS[options.task], options.checkpoint, options.merge, options.tune,
                 options.against)
