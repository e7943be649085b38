"""What EMMA and masked CoTEX gain by their ideas, by one command: each against what it should beat, with
several seeds.

    python systems.py --dry-run      # what would run, and how long
    python systems.py                # the demo; start it again to go on
    python systems.py --config my.yaml --seeds 5

EMMA is compared with the same network without the CNN's scores, and with three networks that learn one task
each. Masked CoTEX is compared with one ViT that sees as many tokens in training, with two views that see all
patches, with two that do not learn from each other, and with other mask ratios. A third table lays EMMA,
which sees single frames, beside the segment models of train_task.py, on the same validation videos.

The seeds are run.seed, run.seed + 1, ...; each is that of everything from the pre-training on. Runs are named
<run>_<system>_seed<s>, as in ablation.py. Writes systems.txt and systems.json beside the runs (run.out): mean
± deviation over the seeds, and for EMMA the difference to the whole system with its 95 % interval over the
validation videos. systems.json: {"run", "seeds", "emma": [{"title", "tasks": {task: {"scores", "mean",
"deviation", "difference", "interval"}}, "p_mtl": {...}}, ...], "cotex": [{"title", "scores", ...}, ...],
"time": [{"title", "tasks": {...}}, ...]}.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import emma_frames
import many_runs
import pipeline
from ablation import HEADS
from checkpoints import read_json, write_text
from config import from_command_line
from distributed import Team, choose_device
from emma import by_task
from labels import TASKS
from many_runs import Job
from scoring import read_sums, stage_of
from variants import (SEEDS, WHOLE, Variant, change_of, change_text, config_of, over_seeds, score_text,
                      scores_of, seeds_from)


class System(NamedTuple):
    """A row: one variant, or three, of which each has learned one task."""
    title: str
    variants: tuple[Variant, ...]


def emma_rows() -> list[System]:
    """EMMA, and what it is compared with."""
    alone = [Variant("", f"emma_{task}", (f"emma.weights={weights}",))
             for task, weights in zip(TASKS, ("[1,0,0]", "[0,1,0]", "[0,0,1]"))]
    return [System("EMMA", (WHOLE,) * 3),
            System("without the CNN", (Variant("", "emma_no_cnn", ("emma.cnn=none",)),) * 3),
            System("three networks, a task each", tuple(alone))]


def cotex_rows(config) -> list[System]:
    """Masked CoTEX, and what it is compared with."""
    c = config.cotex
    patches = (config.vit.image_size // config.vit.patch) ** 2
    share = c.views * (1 + int(patches * (1 - c.mask_ratio))) / (1 + patches)      # of a plain ViT's tokens
    epochs = max(1, round(c.epochs * share))
    plain = ("cotex.views=1", "cotex.mask_ratio=0")
    rows = [("masked CoTEX", WHOLE),
            (f"one plain ViT, as many tokens: {epochs} epochs",
             Variant("", "cotex_plain", (*plain, f"cotex.epochs={epochs}"))),
            (f"one plain ViT, {c.epochs} epochs", Variant("", "cotex_long", plain)),
            ("one masked view", Variant("", "cotex_one", ("cotex.views=1",))),
            ("two views without masks", Variant("", "cotex_r0", ("cotex.mask_ratio=0",))),
            ("two views without JS", Variant("", "cotex_no_js", ("cotex.js_weight=0",)))]
    rows += [(f"λ = {weight:g}", Variant("", f"cotex_js{weight:g}", (f"cotex.js_weight={weight:g}",)))
             for weight in (2, 16.7) if weight != c.js_weight]
    rows += [(f"mask ratio {r:g}", Variant("", f"cotex_r{r:g}", (f"cotex.mask_ratio={r:g}",)))
             for r in (0.5, 0.75, 0.9) if r != c.mask_ratio]
    return [System(title, (variant,)) for title, variant in rows]


# ---- What is to be run

def jobs_of(config, stage: str, rows: list[System], seed: int) -> list[Job]:
    """A stage of all rows with a seed, after what all of them take from the whole system's run."""
    whole, jobs = config_of(config, WHOLE, seed), []
    for need in pipeline.needs(stage, whole):
        if need not in pipeline.DRAWN or config.data.synthetic:
            jobs.append(Job(need, whole))
    variants = dict.fromkeys(variant for row in rows for variant in row.variants)
    return jobs + [Job(stage, config_of(config, variant, seed)) for variant in variants]


def all_jobs(config, seeds) -> list[Job]:
    """All trainings of both systems with all seeds, each once. Raises ValueError if there is no data for
    either."""
    jobs = []
    for seed in seeds:
        if config.data.s_aff_wild2:
            jobs += jobs_of(config, "train_emma", emma_rows(), seed)
        if config.data.drawn_faces:
            jobs += jobs_of(config, "train_cotex", cotex_rows(config), seed)
    if not jobs:
        raise ValueError("neither data.s_aff_wild2, for EMMA, nor data.drawn_faces, for masked CoTEX, is "
                         "given")
    once = {}
    for job in jobs:
        once.setdefault((job.stage, "" if job.stage in pipeline.DRAWN else job.config.run.name), job)
    return list(once.values())


# ---- What has come of it

def emma_sums(config, variant: Variant, seed: int) -> np.ndarray:
    """The sums of a trained EMMA's validation videos, (videos, 124)."""
    return np.array(read_json(config_of(config, variant, seed).folder("emma") / "video_sums.json")["sums"])


def with_changes(rows: list[dict]) -> list[dict]:
    """{"title", "tasks": {task: sums (seeds, videos, ...)}} -> scores in place of sums, and from the second
    row on the difference to the first."""
    found = []
    for row in rows:
        entry = {"title": row["title"], "tasks": {}}
        for name, sums in row["tasks"].items():
            first = rows[0]["tasks"][name]
            change = {"difference": None, "interval": None} if row is rows[0] else (
                change_of(sums, first, TASKS[name]))
            entry["tasks"][name] = scores_of(sums, TASKS[name]) | change
        found.append(entry)
    return found


def collect_emma(config, seeds) -> list[dict]:
    """The rows of EMMA's table, with P_MTL."""
    rows = []
    for system in emma_rows():
        tasks = {}
        for name, variant in zip(TASKS, system.variants):
            tasks[name] = np.stack([by_task(emma_sums(config, variant, seed))[name] for seed in seeds])
        rows.append({"title": system.title, "tasks": tasks})
    found = with_changes(rows)
    for row in found:
        totals = np.sum([row["tasks"][name]["scores"] for name in TASKS], axis=0)          # (3, seeds)
        row["p_mtl"] = over_seeds(totals)
    return found


def collect_cotex(config, seeds) -> list[dict]:
    """The rows of CoTEX's table."""
    rows = []
    for system in cotex_rows(config):
        folders = [config_of(config, system.variants[0], seed).folder("cotex") for seed in seeds]
        scores = [read_json(folder / "metrics.json")["val_macro_f1"] for folder in folders]
        rows.append({"title": system.title, **over_seeds(scores)})
    return rows


def collect_time(config, seeds) -> list[dict]:
    """The segment models beside EMMA, on all labelled frames of the validation videos; [] if a task is not
    trained with all seeds."""
    runs = [config_of(config, WHOLE, seed) for seed in seeds]
    if not all(Job("train_task", run, task).state == "finished" for run in runs for task in TASKS.values()):
        return []
    segment, single = {name: [] for name in TASKS}, {name: [] for name in TASKS}
    team = Team(0, 1, choose_device(config.run.device))
    for run in runs:
        trained = emma_frames.load(run.folder("emma") / "best.pt", run, team)
        for name, (others, of_emma) in emma_frames.video_sums(trained, TASKS.values()).items():
            names, sums = read_sums(run.folder(stage_of(run, TASKS[name])))
            both = [video for video in names if video in others]      # EMMA may have trained on some
            segment[name].append(sums[[names.index(video) for video in both]])
            single[name].append(of_emma[[others.index(video) for video in both]])
    rows = [{"title": "segment models, a task each", "tasks": segment},
            {"title": "EMMA, single frames", "tasks": single}]
    return with_changes([{**row, "tasks": {name: np.stack(sums) for name, sums in row["tasks"].items()}}
                         for row in rows])


# ---- In words

def table(titles, rows) -> list[str]:
    """A table in Markdown."""
    return [" | ".join(titles), "|".join(["---"] * len(titles)), *(" | ".join(row) for row in rows)]


def task_tables(rows: list[dict], first: str) -> list[str]:
    """Scores by task, then the differences to the first row."""
    more = "p_mtl" in rows[0]
    titles = [first, *HEADS.values()] + ["P_MTL"] * more
    scores = [[row["title"], *map(score_text, row["tasks"].values())]
              + ([score_text(row["p_mtl"])] if more else []) for row in rows]
    changes = [[row["title"], *map(change_text, row["tasks"].values())] for row in rows[1:]]
    return [*table(titles, scores), "", f"Difference to {rows[0]['title']}, with the 95 % interval over the "
            "validation videos", "", *table([first, *HEADS.values()], changes)]


def text_of(found: dict) -> str:
    """systems.txt."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [f"Run {found['run']}, seeds {seeds}: mean ± deviation over the seeds"]
    if found["emma"]:
        lines += ["", *task_tables(found["emma"], "EMMA")]
    if found["cotex"]:
        rows = [[row["title"], score_text(row)] for row in found["cotex"]]
        lines += ["", *table(["masked CoTEX", "macro F1 on real faces"], rows)]
    if found["time"]:
        lines += ["", *task_tables(found["time"], "validation videos")]
    return "\n".join(lines)


def main(config, options):
    """Run what is missing, then print and write the tables; with --dry-run only say what would run."""
    seeds = seeds_from(config, options.seeds)
    processes, jobs = many_runs.processes_for(config, options.processes), all_jobs(config, seeds)
    if options.dry_run:
        return print(many_runs.plan(jobs, processes))
    many_runs.run_all(jobs, processes)
    emma, cotex = config.data.s_aff_wild2, config.data.drawn_faces
    found = {"run": config.run.name, "seeds": list(seeds),
             "emma": collect_emma(config, seeds) if emma else [],
             "cotex": collect_cotex(config, seeds) if cotex else [],
             "time": collect_time(config, seeds) if emma else []}
    text, folder = text_of(found), Path(config.run.out)
    write_text(folder / "systems.json", json.dumps(found, indent=1))
    write_text(folder / "systems.txt", text + "\n")
    print(f"\n{text}\n\nwritten to {folder}/systems.txt and systems.json")


if __name__ == "__main__":
    many_runs.start(main, *from_command_line(__doc__, seeds=SEEDS, **many_runs.OPTIONS))
