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
from pathlib import Path

import many_runs
from checkpoints import write_text
from config import from_command_line
from labels import Task
from many_runs import Job
from variants import (SEEDS, WHOLE, Variant, change_of, change_text, jobs_of, score_text, scores_of,
                      seeds_from, sums_over_seeds)

HEADS = {"va": "VA mean CCC", "expr": "Expr macro F1", "au": "AU mean F1"}


def rows_of(config) -> list[Variant]:
    """The rows. The first is the whole system; the first four are the paper's."""
    return [
        WHOLE,
        Variant("Expr fine-tuning", "no_finetuning", ("features.checkpoint={mae}",), ("extract_features",)),
        Variant("TCN", "no_tcn", ("temporal.tcn=false",)),
        Variant("Transformer encoder", "no_transformer", ("temporal.transformer=false",)),
        Variant("both: single frames", "single_frames", ("temporal.tcn=false", "temporal.transformer=false")),
        Variant("pre-training", "no_pretraining", ("finetune.start=none",),
                ("train_finetune", "extract_features")),
        Variant("causality: centred TCN", "centred", ("temporal.causal=false",)) if config.temporal.causal
        else Variant("the future: causal TCN", "causal", ("temporal.causal=true",)),
        Variant("merging: no overlap", WHOLE.name, merge="none"),
    ]


def all_jobs(config, tasks: list[Task], seeds) -> list[Job]:
    """All stages of all rows with all seeds: the whole system first, in the order of the seeds."""
    rows = rows_of(config)
    return [job for seed in seeds for row in rows for job in jobs_of(config, row, tasks, seed)]


def collect(config, tasks: list[Task], seeds) -> dict:
    """What ablation.json holds."""
    rows = [{"title": row.title, "name": row.name, "merge": row.merge, "tasks": {}}
            for row in rows_of(config)]
    for task in tasks:
        order, whole = None, None
        for row, entry in zip(rows_of(config), rows):
            order, sums = sums_over_seeds(config, row, task, seeds, order)
            whole = sums if row == WHOLE else whole
            change = {"difference": None, "interval": None} if row == WHOLE else change_of(sums, whole, task)
            entry["tasks"][task.name] = scores_of(sums, task) | change
    return {"run": config.run.name, "seeds": list(seeds), "rows": rows}


def text_of(found: dict, tasks: list[Task]) -> str:
    """ablation.txt: two tables in Markdown."""
    titles = ["left out", *(HEADS[task.name] for task in tasks)]
    head = [" | ".join(titles), "|".join(["---"] * len(titles))]
    scores, changes = list(head), list(head)
    for row in found["rows"]:
        cells = [row["tasks"][task.name] for task in tasks]
        scores.append(" | ".join([row["title"], *map(score_text, cells)]))
        if row is not found["rows"][0]:
            changes.append(" | ".join([row["title"], *map(change_text, cells)]))
    seeds = ", ".join(map(str, found["seeds"]))
    return "\n".join([f"Run {found['run']}, seeds {seeds}: mean ± deviation over the seeds", "", *scores, "",
                      "Difference to the whole system, with the 95 % interval over validation videos", "",
                      *changes])


def main(config, options):
    """Run what is missing, then print and write both tables; with --dry-run only say what would run."""
    seeds, tasks = seeds_from(config, options.seeds), many_runs.labelled_tasks(config)
    processes, jobs = many_runs.processes_for(config, options.processes), all_jobs(config, tasks, seeds)
    if options.dry_run:
        return print(many_runs.plan(jobs, processes))
    many_runs.run_all(jobs, processes)
    found = collect(config, tasks, seeds)
    text, folder = text_of(found, tasks), Path(config.run.out)
    write_text(folder / "ablation.json", json.dumps(found, indent=1))
    write_text(folder / "ablation.txt", text + "\n")
    print(f"\n{text}\n\nwritten to {folder}/ablation.txt and ablation.json")


if __name__ == "__main__":
    many_runs.start(main, *from_command_line(__doc__, seeds=SEEDS, **many_runs.OPTIONS))
