"""Ideas that a reader can try, each one command on the finished demo, and what came of them over some seeds.

    python experiments.py --dry-run      # what would run, and how long
    python experiments.py                # the demo; start it again to go on
    python experiments.py --config my.yaml --seeds 5

docs/experiments.md has the commands. Here each is run with the seeds run.seed, run.seed + 1, ... as
<run>_<idea>_seed<s>. The whole systems, and the ideas that ablation.py has too, are the same runs.

Writes experiments.txt, the table of docs/experiments.md, and experiments.json beside the runs (run.out):
{"run", "seeds", "processes", "ideas": [{"title", "name", "task", "command", "seconds", "scores", "mean",
"deviation", "against": {"title", "scores", "mean", "deviation"}, "difference", "interval", "verdict"}, ...]}.
`difference` and `interval` as in ablation.py. `seconds`: of the commands of the first seed.
"""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

import many_runs
from checkpoints import write_text
from config import from_command_line
from labels import TASKS, Task
from many_runs import Job
from pipeline import LENT
from variants import (SEEDS, WHOLE, Variant, change_of, change_text, config_of, jobs_of, score_text,
                      scores_of, seeds_from, settings_of, sums_over_seeds)

DEMO = "configs/demo.yaml"               # what --config is by default, and it has run.base: demo


class Idea(NamedTuple):
    """A variant, shown on one task, beside another one that lacks only the idea."""
    task: Task
    variant: Variant
    against: Variant = WHOLE


def ideas_of(config) -> list[Idea]:
    """The ideas, each on a task that may show it."""
    va, expr, au = TASKS.values()
    s, t = config.segments, config.temporal
    token = "mean" if config.finetune.token == "cls" else "cls"
    kernels = ",".join("3" for _ in t.kernels)
    held = Variant("epoch chosen on held-out videos", "held", ("task.held_out=0.15",))
    tuned = held._replace(title="smoothing and thresholds tuned", tune=True)
    return [
        Idea(va, Variant("kernels of 3 frames", "k3", (f"temporal.kernels=[{kernels}]",))),
        Idea(va, Variant("centred TCN", "centred", ("temporal.causal=false",))),
        Idea(va, Variant("no position in time at all", "no_tcn", ("temporal.tcn=false",))),
        Idea(va, Variant("segments a third as long", "short", (f"segments.window={s.window // 3}",
                                                          f"segments.stride={s.stride // 3}"))),
        Idea(va, Variant("no overlap of segments", "apart", (f"segments.stride={s.window}",))),
        Idea(va, Variant("triangular weights in merging", WHOLE.name, merge="triangular")),
        Idea(au, Variant("no dropout", "no_dropout", ("temporal.dropout=0",))),
        Idea(au, Variant("learning rate times 3", "fast", (f"task.lr={3 * config.task.lr:g}",))),
        Idea(au, held),
        Idea(au, tuned, against=held),
        Idea(expr, Variant(f"{token} token as feature", "token",
                           (f"finetune.token={token}", "features.checkpoint={vit}"), ("extract_features",))),
        Idea(expr, Variant("mask ratio 0.5", "mask", ("pretrain.mask_ratio=0.5",), LENT)),
    ]


# ---- What is to be run

def all_jobs(config, ideas: list[Idea], seeds) -> list[Job]:
    """All stages of all ideas with all seeds: the whole system first, in the order of the seeds."""
    tasks = [task for task in TASKS.values() if task in [idea.task for idea in ideas]]
    jobs = []
    for seed in seeds:
        jobs += jobs_of(config, WHOLE, tasks, seed)
        for idea in ideas:
            jobs += jobs_of(config, idea.variant, [idea.task], seed)
    return jobs


def scoring_job(config, idea: Idea) -> Job:
    """evaluate.py for an idea that needs no training, beside the stored score of the same run."""
    of_run = config_of(config, idea.variant, config.run.seed)
    options = ("--tune",) if idea.variant.tune else ("--merge", idea.variant.merge)
    return Job("evaluate", of_run, idea.task, (*options, "--against", of_run.run.name))


def command(config, idea: Idea, processes: int) -> str:
    """What a reader types to try an idea, with a short name for its run."""
    variant, whole = idea.variant, config.run.name
    of_demo = config.run.source == DEMO
    given = [] if of_demo else ["--config", *shlex.split(config.run.source)]
    if variant.name != WHOLE.name:
        given += ["--set", f"run.name={variant.name}"]
        given += [] if of_demo else ["--set", f"run.base={whole}"]
    if not variant.trained:
        words = scoring_job(config, idea).words(1)
        against = whole if variant.name == WHOLE.name else variant.name
        words = words[:words.index("--against")] + ["--against", against]
    else:
        words = Job("train_task", config, idea.task).words(processes)
        words = words[:words.index("--config")]
        given += [word for setting in settings_of(config, variant) for word in ("--set", setting)]
    return shlex.join([*words, *given])


# ---- What has come of it

def seconds_of(config, idea: Idea) -> float | None:
    """How long the commands of an idea took with the first seed; None if that is not known. One that trains
    nothing is run for this."""
    if not idea.variant.trained:
        return many_runs.run(scoring_job(config, idea), processes=1)
    jobs = jobs_of(config, idea.variant, [idea.task], config.run.seed)
    seconds = [many_runs.seconds_of(job.folder) for job in jobs]
    return None if None in seconds else sum(seconds)


def verdict(interval) -> str:
    """What the interval of a difference says."""
    low, high = interval
    return "helps" if low > 0 else "hurts" if high < 0 else "unclear"


def collect(config, ideas: list[Idea], seeds, processes: int) -> dict:
    """What experiments.json holds."""
    rows = []
    for idea in ideas:
        order, others = sums_over_seeds(config, idea.against, idea.task, seeds)
        _, sums = sums_over_seeds(config, idea.variant, idea.task, seeds, order)
        change = change_of(sums, others, idea.task)
        rows.append({"title": idea.variant.title, "name": idea.variant.name, "task": idea.task.name,
                     "command": command(config, idea, processes), "seconds": seconds_of(config, idea),
                     **scores_of(sums, idea.task), **change, "verdict": verdict(change["interval"]),
                     "against": {"title": idea.against.title, **scores_of(others, idea.task)}})
    return {"run": config.run.name, "seeds": list(seeds), "processes": processes, "ideas": rows}


def text_of(found: dict) -> str:
    """experiments.txt: the table of docs/experiments.md."""
    lines = ["| | idea | task | without | with it | difference, 95 % | verdict | seconds |", "|---" * 8 + "|"]
    for i, row in enumerate(found["ideas"], 1):
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(f"| {i} | {row['title']} | {row['task']} | {score_text(row['against'])} "
                     f"| {score_text(row)} | {change_text(row)} | {row['verdict']} | {seconds} |")
    return "\n".join(lines)


def main(config, options):
    """Run what is missing, then print and write the table; with --dry-run only say what would run."""
    seeds, tasks = seeds_from(config, options.seeds), many_runs.labelled_tasks(config)
    ideas = [idea for idea in ideas_of(config) if idea.task in tasks]
    processes, jobs = many_runs.processes_for(config, options.processes), all_jobs(config, ideas, seeds)
    if options.dry_run:
        return print(many_runs.plan(jobs, processes))
    many_runs.run_all(jobs, processes)
    found = collect(config, ideas, seeds, processes)
    text, folder = text_of(found), Path(config.run.out)
    write_text(folder / "experiments.json", json.dumps(found, indent=1))
    write_text(folder / "experiments.txt", text + "\n")
    print(f"\n{text}\n\nwritten to {folder}/experiments.txt and experiments.json")


if __name__ == "__main__":
    many_runs.start(main, *from_command_line(__doc__, seeds=SEEDS, **many_runs.OPTIONS))
