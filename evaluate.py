"""The score of a trained segment model on the validation videos, as a table (paper §4.2, Table 1).

All labelled frames of all videos are pooled, each counted once, with any number of processes (`scoring.py`).

    python evaluate.py --task au                  # score runs/demo/task_au/best.pt on the validation videos
    python evaluate.py --task va --config my.yaml --checkpoint somewhere/best.pt

Predictions made elsewhere are scored by the functions of `metrics.py`.
"""

from config import from_command_line
from data import split
from labels import TASKS
from run_folder import missing
from scoring import features_of, load_segment_model, report, score, shared_out, stage_of
from segments import open_videos


def main(config, team, task, checkpoint=""):
    """Score `checkpoint`, or this configuration's best.pt, on the validation videos."""
    features = features_of(config)
    path = checkpoint or config.folder(stage_of(config, task)) / "best.pt"
    if not checkpoint and not (path.parent / "metrics.json").exists():
        raise missing(path, f"python train_task.py --task {task.name}", config)
    files = split(config.data.labels, task, config.task.fold)[1]
    videos, without, dim = open_videos(files, features, task)
    model = load_segment_model(path, config, task, dim, features, team)
    s = config.segments
    sums = score(model, shared_out(videos, team), task, s.window, s.stride, config.task.batch, team)
    team.say(report(task, sums, videos, without, path, config))


if __name__ == "__main__":
    import pipeline
    config, options = from_command_line(
        __doc__, task={"choices": list(TASKS), "required": True, "help": "which labels"},
        checkpoint={"default": "", "metavar": "FILE", "help": "default: this configuration's best.pt"})
    pipeline.run("evaluate", config, TASKS[options.task], options.checkpoint)
