"""The score of a trained segment model on the validation videos, as a table (paper §4.2, Table 1).

All labelled frames of all videos are pooled, each counted once, with any number of processes (`scoring.py`).
The model and its segments are built with the settings that its checkpoint carries.

    python evaluate.py --task au                  # score runs/demo/task_au/best.pt on the validation videos
    python evaluate.py --task va --config my.yaml --checkpoint somewhere/best.pt

Predictions made elsewhere are scored by the functions of `metrics.py`.
"""

from pathlib import Path

from checkpoints import read_checkpoint
from config import from_command_line
from labels import TASKS
from made_of import finished, like, missing, there
from reports import report, to_score
from scoring import (check_checkpoint, check_task, find_features, load_segment_model, score, shared_out,
                     stage_of)
from segments import open_videos
from splits import split


def main(config, team, task, checkpoint=""):
    """Score `checkpoint`, or this configuration's best.pt, on the validation videos."""
    path = Path(checkpoint or config.folder(stage_of(config, task)) / "best.pt")
    if not checkpoint:
        if not finished(path.parent):
            raise missing(path, f"train_task.py --task {task.name}", config)
        there(path, config)
    saved = read_checkpoint(path)
    check_task(path, saved, task)
    config, changed = like(saved.get("made_of"), config, path)
    for name, (_, was, now) in changed.items():
        team.say(f"  {name}={was} as in the checkpoint; the configuration has {now}")
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
    check_checkpoint(path, saved, origin, videos)
    model = load_segment_model(path, saved, config, task, dim, team)
    s = config.segments
    sums = score(model, shared_out(videos, team), videos, task, s.window, s.stride, config.task.batch, team)
    scored = to_score(videos, left_out, other_videos, task, origin, config)
    if "made_of" not in saved:
        scored = scored._replace(comparable=False)
        team.say(f"  warning: {path} does not tell what it was made of; "
                 "it may have been trained on these videos")
    team.say(report(task, sums, scored, path, config.task.fold))


if __name__ == "__main__":
    import pipeline
    config, options = from_command_line(
        __doc__, task={"choices": list(TASKS), "required": True, "help": "which labels"},
        checkpoint={"default": "", "metavar": "FILE", "help": "default: this configuration's best.pt"})
    pipeline.run("evaluate", config, TASKS[options.task], options.checkpoint)
