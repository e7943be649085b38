"""Table 1 of the paper by one command: three tasks on folds 0 to 4, each fold with an encoder of its own.

What is missing is trained by the stages' own commands. Fold 0 is the run itself. Fold k of 1 to 4 is the run
<run>_fold<k>, which takes over the pre-training: its encoder is fine-tuned on the fold's training videos, so
that it has seen no scene that the fold validates (splits.py).

    python folds.py --config my.yaml --dry-run      # what would run, and how long
    python folds.py --config my.yaml                # start it again to go on
    python folds.py --config my.yaml --shared-encoder      # one encoder for all folds: less work, seen scenes

Writes runs/<run>/folds.txt and folds.json (with --shared-encoder: folds_shared.txt, folds_shared.json).
folds.json: {"encoder", "data", "comparable", "tasks": {task: {"metric", "folds": [{"fold", "folder", "score",
"interval", "unseen", "chance", "paper", "baseline", "outputs", "validation_videos", "seen_videos"}, ...],
"mean", "deviation", "paper_mean", "paper_deviation"}}}. A deviation is that of a sample (divided by n - 1).
"""

import json
from pathlib import Path

import numpy as np

import made_of
import many_runs
from checkpoints import read_json, write_text
from config import from_command_line
from labels import TASKS, Task
from many_runs import Job
from score_table import in_lines
from scoring import read_sums, stage_of, unseen
from splits import FOLDS, split

SHARED = ("one encoder for all folds: it was fine-tuned on scenes that folds 1 to 4 validate, so\n"
          "their scores are too high; \"unseen\" is the score of the other videos alone")


# ---- What is to be run

def config_of(config, fold: int, shared: bool):
    """The settings of a fold: the run's own for fold 0, those of a run that is based on it for the others."""
    if fold == 0:
        return config
    if shared:
        return many_runs.other(config, f"task.fold={fold}")
    return many_runs.other(config, f"run.name={config.run.name}_fold{fold}", f"run.base={config.run.name}",
                           f"finetune.fold={fold}", f"task.fold={fold}")


def jobs_of(config, tasks: list[Task], shared: bool) -> list[Job]:
    """All stages of all folds, in the order in which they need each other; first what the run lacks."""
    official, others = [Job("train_task", config, task) for task in tasks], []
    for fold in FOLDS[1:]:
        of_fold = config_of(config, fold, shared)
        if not shared:
            others += many_runs.own_stages(of_fold, "train_finetune", "extract_features")
        others += [Job("train_task", of_fold, task) for task in tasks]
    first = []
    for job in [*official, *others]:                     # what they take from the run itself is made there
        if job.state != "finished" and (job.config is config or job.stage == "train_finetune"):
            first += [need for need in many_runs.inputs(job.stage, config) if need not in first]
    return [*first, *official, *others]


# ---- What has come of it

def score_of(config, task: Task) -> dict:
    """A finished task of one fold, as folds.json has it."""
    fold, folder = config.task.fold, config.folder(stage_of(config, task))
    metrics = read_json(folder / "metrics.json")             # older ones lack what is asked for with `get`
    return {"fold": fold, "folder": str(folder), "score": metrics["score"],
            "interval": metrics.get("score_interval"),
            "unseen": unseen_score(folder, task) if metrics["seen_videos"] else metrics["score"],
            "chance": metrics["chance"], "paper": task.paper["mean"][fold],
            "baseline": task.baseline["mean"] if fold == 0 else None,
            "outputs": {name: metrics[name] for name in task.outputs},
            "validation_videos": metrics["validation_videos"], "seen_videos": metrics["seen_videos"],
            "data": metrics.get("data", ""), "comparable": metrics.get("comparable", config.data.synthetic)}


def unseen_score(folder: Path, task: Task) -> float | None:
    """The score of the videos on whose scenes the encoder was not fine-tuned; None if there is none, or if
    the task is from before there was a video_sums.json."""
    if not (folder / "video_sums.json").exists():
        return None
    names, sums = read_sums(folder)
    new = unseen(names, made_of.read_record(folder))
    return float(task.metric.score(sums[new].sum(axis=0)).mean()) if new.any() else None


def check_fold(config, task: Task):
    """Raises ValueError if a finished task was validated on videos that are not this fold's any more: labels
    of another task, added since, deal all scenes anew."""
    folder = config.folder(stage_of(config, task))
    if not (folder / "video_sums.json").exists():
        return
    names, _ = read_sums(folder)
    strange = sorted(set(names) - split(config.data.labels, task, config.task.fold)[1].keys())
    if strange:
        raise ValueError(f"{folder} was validated on {', '.join(strange[:5])}, which fold {config.task.fold} "
                         "no longer validates: the label files have changed since. Train all folds again, as "
                         "those of another --set run.name=...")


def collect(config, tasks: list[Task], shared: bool) -> dict:
    """What folds.json holds."""
    found = {"run": config.run.name, "encoder": "shared" if shared else "one per fold", "tasks": {}}
    configs = [config_of(config, fold, shared) for fold in FOLDS]
    for task in tasks:
        folds = [score_of(of_fold, task) for of_fold in configs]
        for of_fold in configs:
            check_fold(of_fold, task)
        ours, papers = [row["score"] for row in folds], [row["paper"] for row in folds]
        found["tasks"][task.name] = {
            "metric": task.metric.name, "folds": folds,
            "mean": np.mean(ours), "deviation": np.std(ours, ddof=1),
            "paper_mean": np.mean(papers), "paper_deviation": np.std(papers, ddof=1)}
    rows = [row for task in found["tasks"].values() for row in task["folds"]]
    return {**found, "data": rows[0]["data"], "comparable": all(row["comparable"] for row in rows)}


def table(task: Task, folds: list[dict], comparable: bool) -> str:
    """The scores of one task, a line per fold, then mean and deviation over the folds."""
    def column(title, numbers):
        numbers, cells = list(numbers), [title]
        if None not in numbers:
            numbers += [np.mean(numbers), np.std(numbers, ddof=1)]
        cells += ["-" if number is None else f"{number:.3f}" for number in numbers]
        return cells + ["-"] * (len(folds) + 3 - len(cells))

    columns = []
    for name in task.paper:
        ours = [row["score"] if name == "mean" else row["outputs"][name] for row in folds]
        columns.append(column("ours" if name == "mean" else name, ours))
        if name == "mean":
            columns.append(["95 %", *["-" if row["interval"] is None else "[{:.3f}, {:.3f}]".format(
                *row["interval"]) for row in folds], "", ""])
            if any(row["seen_videos"] for row in folds):
                columns.append(column("unseen", (row["unseen"] for row in folds)))
            columns.append(column("chance", (row["chance"] for row in folds)))
        if comparable:
            columns.append(column("paper", task.paper[name]))
    if comparable:
        columns.append(column("baseline", (row["baseline"] for row in folds)))
    names = [f"{fold} official" if fold == 0 else f"{fold}" for fold in FOLDS]
    return in_lines(f"{task.name} fold", [*names, "mean", "deviation"], columns)


def text_of(found: dict) -> str:
    """folds.txt: a table per task, and what it is about."""
    rows = [row for task in found["tasks"].values() for row in task["folds"]]
    parts = [table(TASKS[name], task["folds"], found["comparable"]) for name, task in found["tasks"].items()]
    metrics = ", ".join(f"{name} {task['metric']}" for name, task in found["tasks"].items())
    notes = [f"run {found['run']}, {metrics}; 95 %: interval over the fold's videos", found["data"]]
    if found["encoder"] == "shared":
        notes.append(f"warning: {SHARED}")
    elif any(row["seen_videos"] for row in rows):
        notes.append("\"unseen\" is the score without videos of scenes that the encoder was fine-tuned on")
    return "\n\n".join([*parts, "\n".join(notes)])


def main(config, options):
    """Run what is missing, then print and write the table; with --dry-run only say what would run."""
    if config.task.fold or config.finetune.fold:
        raise ValueError("task.fold and finetune.fold are set by folds.py for each fold; leave them at 0")
    tasks, shared = many_runs.labelled_tasks(config), options.shared_encoder
    processes, jobs = many_runs.processes_for(config, options.processes), jobs_of(config, tasks, shared)
    if shared:
        print(f"warning: {SHARED}")
    if options.dry_run:
        return print(many_runs.plan(jobs, processes))
    many_runs.run_all(jobs, processes)
    found = collect(config, tasks, shared)
    text, name = text_of(found), "folds_shared" if shared else "folds"
    folder = Path(config.run.out) / config.run.name
    write_text(folder / f"{name}.json", json.dumps(found, indent=1))
    write_text(folder / f"{name}.txt", text + "\n")
    print(f"\n{text}\n\nwritten to {folder}/{name}.txt and {name}.json")


if __name__ == "__main__":
    shared = {"action": "store_true", "help": "one encoder for all folds, which has seen validation scenes"}
    many_runs.start(main, *from_command_line(__doc__, **{"shared-encoder": shared}, **many_runs.OPTIONS))
