"""What each part is worth, by one command: the system without it, with several seeds (paper, Table 5 of its
final version, and four rows more).

    python ablation.py --dry-run      # what would run, and how long
    python ablation.py                # the demo; start it again to go on
    python ablation.py --config my.yaml --seeds 5

The seeds are run.seed, run.seed + 1, ...; each is that of everything from the pre-training on. The whole
system with the first seed is the run itself, with another <run>_seed<s>. Without a part it is
<run>_<part>_seed<s>, which takes over the stages that stay the same. The last row trains nothing: it scores
the whole system with segments that do not overlap.

Writes ablation.txt and ablation.json beside the runs (run.out). The first table has mean ± deviation over the
seeds (of a sample: divided by n - 1). The second has the difference to the whole system, both averaged over
the seeds, with its 95 % interval over the same drawn videos (`intervals.difference_over_seeds`).
ablation.json: {"run", "seeds", "rows": [{"title", "name", "merge", "tasks": {task: {"scores", "mean",
"deviation", "difference", "interval"}}}, ...]}; the first row is the whole system, without a difference.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import many_runs
import pipeline
from checkpoints import write_text
from config import from_command_line
from distributed import Team, choose_device
from intervals import difference_over_seeds
from labels import Task
from many_runs import Job
from scoring import count_frames, find_features, load, read_sums, score, stage_of
from segments import open_videos
from splits import split

WHOLE = "whole"
HEADS = {"va": "VA mean CCC", "expr": "Expr macro F1", "au": "AU mean F1"}


class Row(NamedTuple):
    """A row of the table. `own`: the stages before train_task.py that are not those of the whole system."""
    title: str
    name: str                   # in the name of its runs
    settings: tuple = ()
    own: tuple = ()
    merge: str = "mean"         # how overlapping segments are merged; another one is only scored, not trained


def rows_of(config) -> list[Row]:
    """The rows. The first is the whole system; the first four are the paper's."""
    return [
        Row("nothing", WHOLE),
        Row("Expr fine-tuning", "no_finetuning", ("features.checkpoint={mae}",), ("extract_features",)),
        Row("TCN", "no_tcn", ("temporal.tcn=false",)),
        Row("Transformer encoder", "no_transformer", ("temporal.transformer=false",)),
        Row("both: single frames", "single_frames", ("temporal.tcn=false", "temporal.transformer=false")),
        Row("pre-training", "no_pretraining", ("finetune.start=none",),
            ("train_finetune", "extract_features")),
        Row("causality: centred TCN", "centred", ("temporal.causal=false",)) if config.temporal.causal else
        Row("the future: causal TCN", "causal", ("temporal.causal=true",)),
        Row("merging: no overlap", WHOLE, merge="none"),
    ]


# ---- What is to be run

def config_of(config, row: Row, seed: int):
    """The settings of a row with a seed."""
    base = config.run.name
    whole = base if seed == config.run.seed else f"{base}_seed{seed}"
    if row.name == WHOLE:
        if whole == base:
            return config
        return many_runs.other(config, f"run.name={whole}", f"run.base={base}", f"run.seed={seed}")
    of_whole = config_of(config, Row("", WHOLE), seed)
    mae = config.finetune.start or pipeline.result("train_pretrain", of_whole)
    settings = [setting.format(mae=mae) for setting in row.settings]
    return many_runs.other(config, f"run.name={base}_{row.name}_seed{seed}", f"run.base={whole}",
                           f"run.seed={seed}", *settings)


def jobs_of(config, tasks: list[Task], seeds) -> list[Job]:
    """All stages of all rows with all seeds: the whole system first, in the order of the seeds."""
    jobs, rows = [], rows_of(config)
    for seed in seeds:
        for row in rows:
            if row.merge != "mean":
                continue                                             # nothing is trained
            of_row = config_of(config, row, seed)
            own = many_runs.own_stages(of_row, *row.own)
            if of_row is config:
                own = many_runs.inputs("train_task", config)
            elif row.name == WHOLE:
                own = many_runs.own_stages(of_row, *pipeline.LENT)
            jobs += [*own, *(Job("train_task", of_row, task) for task in tasks)]
    return jobs


# ---- What has come of it

def sums_of(config, task: Task, merge: str) -> tuple[list[str], np.ndarray]:
    """The validation videos of a finished task and their sums (videos, ...), with segments merged so."""
    folder = config.folder(stage_of(config, task))
    if merge == "mean":
        return read_sums(folder)
    team = Team(0, 1, choose_device(config.run.device))
    trained = load(folder / "best.pt", config, task, team)
    features, _ = find_features(config, team)
    videos = open_videos(split(config.data.labels, task, config.task.fold)[1], features, task)[0]
    s = config.segments
    stride = s.window if merge == "none" else s.stride
    sums = score(trained.model, videos, videos, task, s.window, stride, config.task.batch, team,
                 partial(count_frames, merge=merge))
    return [video.name for video in videos], sums


def sums_over_seeds(config, row: Row, task: Task, seeds, order=None) -> tuple[list[str], np.ndarray]:
    """The sums of a row, (seeds, videos, ...), the videos in the given order or in that of the first seed."""
    found = []
    for seed in seeds:
        of_row = config_of(config, row, seed)
        names, sums = sums_of(of_row, task, row.merge)
        order = order or names
        if sorted(names) != sorted(order):
            raise ValueError(f"{of_row.folder(stage_of(of_row, task))} was scored on other videos than the "
                             "other runs, so they cannot be compared; begin another --set run.name=...")
        found.append(sums[[names.index(name) for name in order]])
    return order, np.stack(found)


def collect(config, tasks: list[Task], seeds) -> dict:
    """What ablation.json holds."""
    rows = [{"title": row.title, "name": row.name, "merge": row.merge, "tasks": {}}
            for row in rows_of(config)]
    for task in tasks:
        order, whole = None, None
        for row, entry in zip(rows_of(config), rows):
            order, sums = sums_over_seeds(config, row, task, seeds, order)
            scores = [float(task.metric.score(of_seed.sum(axis=0)).mean()) for of_seed in sums]
            found = {"scores": scores, "mean": np.mean(scores), "deviation": np.std(scores, ddof=1),
                     "difference": None, "interval": None}
            if whole is None:
                whole = sums
            else:
                change = difference_over_seeds(sums, whole, task.metric)
                found |= {"difference": change.value, "interval": [change.low, change.high]}
            entry["tasks"][task.name] = found
    return {"run": config.run.name, "seeds": list(seeds), "rows": rows}


def short(number: float, sign: str = "") -> str:
    """0.6943 -> ".694", as README has it; with sign "+": "+.694" or "-.694"."""
    return re.sub(r"\b0\.", ".", f"{number:{sign}.3f}")


def text_of(found: dict, tasks: list[Task]) -> str:
    """ablation.txt: two tables in Markdown."""
    titles = ["left out", *(HEADS[task.name] for task in tasks)]
    head = [" | ".join(titles), "|".join(["---"] * len(titles))]
    scores, changes = list(head), list(head)
    for row in found["rows"]:
        cells = [row["tasks"][task.name] for task in tasks]
        scores.append(" | ".join([row["title"], *(f"{short(cell['mean'])} ± {short(cell['deviation'])}"
                                                  for cell in cells)]))
        if row is not found["rows"][0]:
            changes.append(" | ".join([row["title"], *(
                f"{short(cell['difference'], '+')} [{', '.join(short(end, '+') for end in cell['interval'])}]"
                for cell in cells)]))
    seeds = ", ".join(map(str, found["seeds"]))
    return "\n".join([f"Run {found['run']}, seeds {seeds}: mean ± deviation over the seeds", "", *scores, "",
                      "Difference to the whole system, with the 95 % interval over validation videos", "",
                      *changes])


def main(config, options):
    """Run what is missing, then print and write both tables; with --dry-run only say what would run."""
    if options.seeds < 2:
        raise ValueError(f"--seeds: got {options.seeds}, expected 2 or more, as one has no deviation")
    seeds = range(config.run.seed, config.run.seed + options.seeds)
    tasks = many_runs.labelled_tasks(config)
    processes, jobs = many_runs.processes_for(config, options.processes), jobs_of(config, tasks, seeds)
    if options.dry_run:
        return print(many_runs.plan(jobs, processes))
    many_runs.run_all(jobs, processes)
    found = collect(config, tasks, seeds)
    text, folder = text_of(found, tasks), Path(config.run.out)
    write_text(folder / "ablation.json", json.dumps(found, indent=1))
    write_text(folder / "ablation.txt", text + "\n")
    print(f"\n{text}\n\nwritten to {folder}/ablation.txt and ablation.json")


if __name__ == "__main__":
    seeds = {"type": int, "default": 3, "metavar": "N", "help": "how many (default: %(default)s)"}
    many_runs.start(main, *from_command_line(__doc__, seeds=seeds, **many_runs.OPTIONS))
