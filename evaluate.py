"""The score of a trained model on the validation videos, as a table (paper §4.2, Table 1).

All labelled frames of all videos are pooled, each counted once, with any number of processes (`scoring.py`).
The model and its segments are built with the settings that its checkpoint carries.

    python evaluate.py --task au                  # score runs/demo/task_au/best.pt on the validation videos
    python evaluate.py --task va --config my.yaml --checkpoint somewhere/best.pt
    python evaluate.py --task au --set temporal.kernels=[5,5,5] --against      # beside the demo as it stands
    python evaluate.py --task au --set task.held_out=0.15 --tune               # smoothing
    python evaluate.py --checkpoint runs/demo/emma/best.pt                     # EMMA, each frame by itself

--against compares with the stored score of another run folder on the same videos, with the interval of the
difference (`metrics.py`); without a folder, with the configuration less its --set. --tune takes means over as
many frames as are best for the training videos that the run has held back (task.held_out). EMMA is scored on
all tasks that it has learned, unless --task names one; videos whose scene it was trained on are left out, and
named.

Predictions made elsewhere are scored by `python -m tools.predictions`.
"""

from pathlib import Path

import numpy as np

from data import Video, open_videos
from engine.checkpoints import read_checkpoint, read_json
from engine.config import from_command_line
from engine.distributed import launch
from engine.training import Progress
from images import check_ends, find_videos, last_of
from labels import TASKS, has_labels, longest, read_labels, scene, split, targets
from metrics import confusion, difference, score_table
from pipeline import find_input, finished, folder, lines_of, make, missing, tuned_on
from scoring import (HELD_OUT, best_smoothing, check_features, check_scenes, load, means_over, of_videos,
                     predict_videos, reasons, report, sums_of, to_score)
from second_paper import emma


def main(config, team, task, checkpoint="", tune=False, against=None):
    """Score `checkpoint`, or this configuration's best.pt, on the validation videos."""
    if not checkpoint and task is None:
        raise ValueError("--task: expected va, expr or au; without it, an EMMA is scored: --checkpoint FILE")
    path = Path(checkpoint or folder("task", config, task) / "best.pt")
    if not checkpoint:
        make("task", config, team, task)
        if not finished(path.parent):
            raise missing(path, f"train_task --task {task.name}", config)
    if read_checkpoint(path).get("made_of", {}).get("stage") == "emma":
        return evaluate_emma(path, config, team, task)

    # model
    trained = load(path, config, task, team)
    [task], config = trained.tasks, trained.config
    team.say(f"settings as in the checkpoint:{lines_of(trained.changed)}" if trained.changed else str(path))

    # data
    features, origin = find_input(config, team, "task.features")
    train_files, val_files = split(config.data.labels, task, config.task.fold)
    videos, left_out, _ = open_videos(val_files, features, task)
    try:
        others, _, _ = open_videos(train_files, features, task)
    except ValueError:                                       # those of the validation are enough to score
        others = []
    check_features(path, trained.record, origin)
    check_scenes(path, trained.record, videos)
    scored = to_score(videos, left_out, others, task, origin, config)

    # score
    k = 0
    if tune:
        names = trained.record["data"].get(HELD_OUT, [])
        held_out = [video for video in others if video.name in names]
        if not names or len(held_out) < len(names):
            raise ValueError(f"{path}: {len(names)} training videos were held back, of which {len(held_out)} "
                             "have labels and features here; train one with --set task.held_out=0.15")
        k = best_smoothing(predict_videos(trained.model, held_out, config, team), held_out, task)
        seen = to_score(held_out, {}, [], task, origin, config).seen
        team.say(f"chosen on {len(held_out)} held-out training videos: mean over {k} frames before and "
                 "after, as with --smooth of predict.py and tools.submission"
                 + (f"\n  {seen}, so they are easier than new videos" if seen else ""))
    outputs = means_over(predict_videos(trained.model, videos, config, team), task, k)
    sums = sums_of(outputs, videos, task)
    team.say(f"{report(task, sums, scored, path, config.task.fold)}\n\n{confusion(task, sums)}\n")
    if against is not None:
        config.changed = {}                                  # the folder of the configuration as it stands
        team.say(compare(task, sums, videos, Path(against or folder("task", config, task))))


def compare(task, sums, videos, other: Path) -> str:
    """Our score less that of another run folder on the same videos, in words."""
    metrics = read_json(other / "metrics.json") or {}
    if "video_sums" not in metrics or metrics["metric"] != task.metric.name:
        raise ValueError(f"{other}: no finished task with the sums of its videos; expected a folder like "
                         f"runs/demo/task_{task.name}")
    ours = dict(zip([video.name for video in videos], sums))
    theirs = dict(zip(metrics["videos"], np.array(metrics["video_sums"])))
    labelled = [{name: task.metric.labelled(of_video).tolist() for name, of_video in system.items()}
                for system in (ours, theirs)]
    differ = sorted(name for name in ours | theirs if labelled[0].get(name) != labelled[1].get(name))
    if differ:
        raise ValueError(f"{other} was scored on other videos, or with other labels, such as "
                         f"{', '.join(differ[:5])}; two systems are compared on the same ones")
    other_sums = np.stack([theirs[name] for name in ours])                     # in the order of our videos
    found = difference(sums[None], other_sums[None], task.metric)
    verdict = "ours is better" if found.low > 0 else "ours is worse" if found.high < 0 else (
        "the interval holds 0: these videos do not tell which is better")
    return (f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] against {other} "
            f"({task.metric.score(other_sums.sum(axis=0)).mean():.3f}, as its training ended), 95 % interval "
            f"over {len(videos)} videos; {verdict}")


# ---- EMMA

def evaluate_emma(path, config, team, task=None):
    """Print the score of each task that EMMA was trained on, or of one. Each video is read once for all."""
    trained = emma.load(path, config, team)
    tasks = [known for known in trained.tasks
             if task in (None, known) and has_labels(trained.config.data.labels, known)]
    if not tasks:
        raise ValueError(f"{path}: trained on {', '.join(known.name for known in trained.tasks)}; of none of "
                         f"these{f', or not of --task {task.name},' if task else ''} there are labels")
    team.say(f"{path}, each frame by itself{lines_of(trained.changed)}")
    for name, (videos, sums, left_out) in emma_sums(trained, tasks).items():
        without = f"\nleft out: {reasons(left_out)}" if left_out else ""
        team.say(f"\n{len(videos)} validation videos\n"
                 f"{score_table(TASKS[name], sums, comparable=False)}{without}")


def emma_sums(trained, tasks) -> dict[str, tuple[list[Video], np.ndarray, dict[str, str]]]:
    """{task name: its validation videos, their sums (videos, ...) over all processes, {video: why it is left
    out}}. A labelled frame without a face counts, with the outputs of the frame before it, as it does for a
    segment model. Raises ValueError if a task has no video left."""
    config, team, given = trained.config, trained.team, find_videos(trained.config.data.frames)[0]
    known = {scene(name) for name in tuned_on(trained.record) + trained.record["data"]["training videos"]}
    check_ends(last_of(given), longest(config.data.labels))
    seen, found = {}, {}                    # {video: outputs (T, 22), noface (T,)}, {task: what is returned}
    for task in tasks:
        videos, left_out = [], {}
        for name, file in split(config.data.labels, task, 0)[1].items():
            labels = read_labels(file, task)
            if scene(name) in known:
                left_out[name] = "EMMA was trained on its scene"
            elif not targets(labels, task)[1].any():
                left_out[name] = "no labels"
            elif name not in given:
                left_out[name] = "no frames"
            else:
                videos.append(Video(name, given[name].folder, labels))
        new = [video for video in videos if video.name not in seen]
        frames = sum(given[video.name].last for video in new)
        progress = Progress(frames // team.world, "frames", team)        # about what this process has to do
        seen |= of_videos(lambda video: trained.predict(given[video.name], given[video.name].last, progress),
                          new, team)
        left_out |= {video.name: "no readable face" for video in videos if seen[video.name][1].all()}
        videos = [video for video in videos if video.name not in left_out]
        if not videos:
            raise ValueError(f"no validation video of {task.name} can be scored: {reasons(left_out)}; check "
                             "data.frames")
        # mode="clip": labels after the last image count, with its outputs.
        outputs = {video.name: np.take(emma.outputs_of(task, seen[video.name][0]), range(len(video.labels)),
                                       axis=0, mode="clip") for video in videos}
        found[task.name] = videos, sums_of(outputs, videos, task), left_out
    return found


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__, task={"choices": list(TASKS), "help": "which labels"},
        checkpoint={"default": "", "metavar": "FILE", "help": "default: this configuration's best.pt"},
        tune={"action": "store_true", "help": "means over as many frames as suit held-out training videos"},
        against={"nargs": "?", "const": "", "metavar": "FOLDER", "help": "the difference to another result"})
    launch(main, config, TASKS.get(options.task), options.checkpoint, options.tune, options.against)
