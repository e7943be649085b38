"""Tables of many runs, each by one command: Table 1 of the paper, its ablation, ideas, the second paper.

    python -m tools.experiments ablation --dry-run        # the demo: which commands would run, which are done
    python -m tools.experiments folds --config my.yaml    # or ablation, ideas, systems, all; again to go on

A row is the configuration with other settings, trained with the seeds run.seed, run.seed + 1, ..., those of
everything from pre-training on (folds: one). Each stage runs as a command of its own, if it is not finished:
on GPUs one after the other, on all of them; on a CPU two at a time, each with half of the cores, and only
what one that fails has said is shown.
Writes runs/<config>/<table>.txt, in Markdown, and .json: mean ± deviation over the seeds (divided by n - 1),
then the difference to the first row with its 95 % interval over the same drawn videos. And, of the ablation,
ablation_<task>.png, a video in which each part shows what it adds.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data import Video
from datasets.synthetic import is_complete
from engine.checkpoints import read_json, write_text
from engine.config import Config, from_command_line, load, print_all, value_of
from engine.distributed import STOP, Team, choose_device, on_stop
from evaluate import emma_sums
from labels import FOLDS, TASKS, has_labels, read_labels, scene, split
from metrics import difference
from pictures import save
from pipeline import STAGES, command, finished, folder, read_record, stale, tuned_on
from second_paper import emma
from train_task import draw_timeline

PARTS = {"folds": ["folds"], "folds_shared": ["folds_shared"], "ablation": ["ablation"], "ideas": ["ideas"],
         "systems": ["EMMA", "CoTEX", "time"]}                       # {table: its parts}
HEADS = {"va": "VA mean CCC", "expr": "Expr macro F1", "au": "AU mean F1", "faces": "F1 on real faces"}
FRAMES, DRAWN = "EMMA, each frame by itself", "drawn data"
# The rows that one picture shows under each other, and what it calls them.
SHOWN = {"both: single frames": "single frames", "Transformer encoder": "with the TCN",
         "nothing": "with the TCN and the Transformer encoder"}
STAGE = {"EMMA": "emma", "CoTEX": "cotex", FRAMES: "emma"}           # of a part, or a row; the others': task
# By how many numbers a cell has: mean ± deviation, a score with its interval, with that of a difference.
CELLS = {0: "-", 1: "{:.3f}", 2: "{:.3f} ± {:.3f}", 3: "{:.3f} [{:.3f}, {:.3f}]",
         5: "{:.3f} ± {:.3f}, {:+.3f} [{:+.3f}, {:+.3f}]"}


def rows_of(part: str, c: Config) -> dict[str, str]:
    """{title: settings, words of --set} of a part of a table. A row is of all tasks, unless its title ends
    with one. The first row is the whole system, whose configuration, with one seed, is `c`."""
    mae = shlex.quote(str(c.finetune.start or folder("pretrain", c) / "last.pt"))
    k = [3 if size > 3 else 5 for size in c.temporal.kernels]
    dropout = 0 if c.temporal.dropout else 0.3
    few = f"finetune.held_out=0.9 finetune.epochs={10 * c.finetune.epochs}"      # and as many steps
    w, s, x, N = c.segments.window, c.segments.stride, c.cotex, (c.vit.image_size // c.vit.patch) ** 2
    # In these epochs a plain ViT sees as many tokens, 1 + N a face, as the masked views see in theirs.
    epochs = max(1, round(x.epochs * x.views * (1 + int(N * (1 - x.mask_ratio))) / (1 + N)))
    return {
        "folds": {f"{k}": f"finetune.fold={k} task.fold={k}" for k in FOLDS},
        "folds_shared": {f"{k}": f"task.fold={k}" for k in FOLDS},
        "ablation": {
            "nothing": "", "Expr fine-tuning": f"features.checkpoint={mae}", "TCN": "temporal.tcn=false",
            "Transformer encoder": "temporal.transformer=false",
            "both: single frames": "temporal.tcn=false temporal.transformer=false",
            "pre-training": "finetune.start=none",
            "causality: centred TCN": "temporal.causal=false",
            "the future: causal TCN": "temporal.causal=true", "nine tenths of fine-tuning's videos": few,
            "these, and pre-training": f"{few} finetune.start=none"},
        "ideas": {
            "nothing": "", f"kernels of {k[0]} frames, va": f"'temporal.kernels={k}'",
            "centred TCN, va": "temporal.causal=false", "no position in time, va": "temporal.tcn=false",
            "segments a third as long, va": f"segments.window={w // 3} segments.stride={s // 3}",
            "no overlap of segments, va": f"segments.stride={w}",
            f"dropout of {dropout:g}, au": f"temporal.dropout={dropout:g}",
            "learning rate times 3, au": f"task.lr={3 * c.task.lr:g}",
            "epoch chosen on held-out videos, au": "task.held_out=0.15"},
        "EMMA": {"EMMA": "", "without the CNN": "emma.cnn=none", "a task alone, va": "emma.weights=[1,0,0]",
                 "a task alone, expr": "emma.weights=[0,1,0]", "a task alone, au": "emma.weights=[0,0,1]"},
        "CoTEX": {
            "masked CoTEX": "", "one masked view": "cotex.views=1",
            "one plain ViT, as many epochs": "cotex.views=1 cotex.mask_ratio=0",
            "one plain ViT, as many tokens": f"cotex.views=1 cotex.mask_ratio=0 cotex.epochs={epochs}",
            "λ = 0: views that do not listen": "cotex.js_weight=0", "r = 0.5": "cotex.mask_ratio=0.5"},
        "time": {"segment models": "", FRAMES: ""}}[part]


class Job(NamedTuple):
    """What makes a result: is it done, its command, the folders of what it needs, or DRAWN."""
    done: bool
    command: str
    needs: set


def add(jobs: dict, stage: str, config: Config, task: str = ""):
    """Add a result to `jobs`, {folder: Job}, after what it needs. -> its folder"""
    place = folder(stage, config, TASKS[task] if stage == "task" else None)
    if place not in jobs:
        done = finished(place) and not stale(place, config)          # a stale one is refused by its stage
        needs = {DRAWN}
        for setting, before in STAGES[stage].inputs.items():
            given = value_of(config, setting)
            if given:
                needs.add(Path(given).parent)                        # of another job, or nobody's
            elif before and not done:
                needs.add(add(jobs, before, config))
        script = STAGES[stage].script + f" --task {task}" * (stage == "task")
        jobs[place] = Job(done, command(script, config), needs)
    return place


def plan(part: str, config: Config, seeds, jobs: dict):
    """Add what a part of a table needs to `jobs`, seed after seed. Yields title, task, configuration, folder
    of each result. Left out: what there is no data for, and rows that change nothing here."""
    data, (path, *given) = config.data, shlex.split(config.words)
    labelled = [name for name in TASKS if data.synthetic or has_labels(data.labels, TASKS[name])]
    tasks = {"EMMA": data.s_aff_wild2 and TASKS, "time": data.s_aff_wild2 and labelled,
             "CoTEX": data.drawn_faces and ["faces"]}.get(part, labelled)
    for seed in seeds[:1] if "folds" in part else seeds:
        ours = given[1::2] + [f"run.seed={seed}"] * (seed != config.run.seed)
        whole = load(path, ours)
        for title, settings in rows_of(part, whole).items():
            words, stage = shlex.split(settings), STAGE.get(title) or STAGE.get(part, "task")
            changed, only = load(path, ours + words), title.rpartition(", ")[2]
            for name in tasks if not words or changed != whole or "folds" in part else []:
                if name == only or only not in TASKS:
                    yield title, name, changed, add(jobs, stage, changed, name)


def run(jobs: dict[str, Job], at_once: int):
    """Run the commands that are left, `at_once` of them at a time, each when what it needs is there. Raises
    ValueError when one ends badly, and on a signal; the others save and end first."""
    left, running, stopped = [place for place, job in jobs.items() if not job.done], {}, []
    count, before = len(left), on_stop(dict.fromkeys(STOP, lambda number, frame: stopped.append(number)))
    threads = {} if at_once == 1 else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // at_once))}
    try:
        while left or running:
            ready = [place for place in left if not jobs[place].needs & {*left, *running}]
            for place in ready[:at_once - len(running)]:
                left.remove(place)
                print(f"\n{count - len(left)} of {count}$ {jobs[place].command}", flush=True)
                script, *words = shlex.split(jobs[place].command)
                module = ["-m", "torch.distributed.run"] if script == "torchrun" else []
                said = None if at_once == 1 else tempfile.TemporaryFile()      # two at a time would mix
                running[place] = said, subprocess.Popen([sys.executable, *module, *words], stdout=said,
                                                        stderr=said, env=threads | os.environ)
            time.sleep(0.1)
            for place, (said, process) in [*running.items()]:
                code = process.poll()
                if code or stopped:
                    if said and code:
                        said.seek(0)
                        print(said.read().decode(errors="replace")[-4000:])
                    what = f"ended with code {code}" if code else "was stopped"
                    raise ValueError(f"this command {what}; start again to go on:\n  {jobs[place].command}")
                if code == 0:
                    del running[place]
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        on_stop(before)


def compared(part: str, planned: list) -> dict:
    """{part: {row: {task: mean, deviation, difference to the first row and its interval}}}. Raises ValueError
    if rows were scored on other videos. EMMA may have been trained on some: `time` leaves them out."""
    found, sums = {}, {}                          # sums: {task: {row: [{video: its sums} of each seed]}}
    for title, name, config, place in planned:
        metrics = read_json(place / "metrics.json")              # CoTEX's faces count as one video
        names, values = metrics.get("videos", ["all"]), metrics.get("video_sums", [metrics.get("confusion")])
        if title == FRAMES:
            trained = emma.load(place / "best.pt", config, Team(0, 1, choose_device(config.run.device)))
            videos, values, _ = emma_sums(trained, [TASKS[name]])[name]
            names = [video.name for video in videos]
        elif part == "EMMA":
            values = emma.by_task(np.array(values))[name]
        sums.setdefault(name, {}).setdefault(title, []).append(dict(zip(names, values)))
    for name, rows in sums.items():
        every, first, metric = sum(rows.values(), []), next(iter(rows)), TASKS.get(name, TASKS["expr"]).metric
        videos = [video for video in every[0] if all(video in of_seed for of_seed in every)]
        if part != "time" and max(map(len, every)) > len(videos):
            raise ValueError(f"{part}, {name}: the rows were scored on different videos, so they cannot be "
                             "compared; begin another --set run.name=NEW")
        for title in rows:
            rows[title] = np.array([[of_seed[video] for video in videos] for of_seed in rows[title]])
            scores = [metric.score(of_seed.sum(axis=0)).mean() for of_seed in rows[title]]
            cell = found.setdefault(title, {})[HEADS[name]] = [np.mean(scores), np.std(scores, ddof=1)]
            if title != first and len(videos) > 1:
                cell += difference(rows[title], rows[first], metric)
    return {part: found}


def folds(part: str, planned: list) -> dict:
    """{task: {fold: {column: numbers}}}, and a row with mean and deviation over the folds."""
    found = {}
    for fold, name, _, place in planned:
        metrics, task, seen = read_json(place / "metrics.json"), TASKS[name], tuned_on(read_record(place))
        new = ~np.isin([scene(video) for video in metrics["videos"]], [scene(video) for video in seen])
        unseen, comparable = np.array(metrics["video_sums"])[new].sum(axis=0), metrics["comparable"]
        found.setdefault(f"{name} fold", {})[fold] = {
            "score": [metrics["score"], *(metrics["score_interval"] or [])],
            "unseen": [task.metric.score(unseen).mean()] if new.any() else [], "chance": [metrics["chance"]],
            "paper": [task.paper["mean"][int(fold)]] if comparable else [],
            "baseline": [task.baseline["mean"]] if comparable and fold == "0" else []}
    for rows in found.values():
        columns = {name: [row[name][0] for row in rows.values() if row[name]] for name in rows["0"]}
        rows["mean"] = {name: [np.mean(numbers), np.std(numbers, ddof=1)]
                        for name, numbers in columns.items() if len(numbers) == len(FOLDS)}
    return found


def parts(planned: list, name: str):
    """What each part of the system adds to the one before, in a video: the one in which the weaker of both
    steps gains most. -> a picture: single frames, then with the TCN, then with the Transformer encoder too"""
    task, found = TASKS[name], {}
    for title, of_task, config, place in planned:
        if title in SHOWN and of_task == name:
            found.setdefault(title, (place, read_json(place / "metrics.json")))        # of the first seed
    found = [found[title] for title in SHOWN]
    scores = np.array([[task.metric.score(np.array(sums)).mean() for sums in metrics["video_sums"]]
                       for _, metrics in found])                         # (3, videos)
    video = found[0][1]["videos"][np.diff(scores, axis=0).min(axis=0).argmax()]
    labels = read_labels(split(config.data.labels, task, config.task.fold)[1][video], task)
    drawn = [draw_timeline(np.load(place / "predictions.npz"), [Video(video, place, labels)], task, config,
                           note=note) for (place, _), note in zip(found, SHOWN.values())]
    sheet = Image.new("RGB", (drawn[0].width, sum(picture.height for picture in drawn)), "white")
    for i, picture in enumerate(drawn):
        sheet.paste(picture, (0, i * picture.height))
    return sheet


def markdown(heading: str, rows: dict) -> str:
    """{row: {column: numbers}} as a table with cells like ".694 ± .012, +.016 [+.006, +.025]"."""
    columns = list(dict.fromkeys(name for row in rows.values() for name, cell in row.items() if cell))
    lines = [[heading, *columns], ["---"] * (1 + len(columns))]
    for title, row in rows.items():
        cells = [row.get(name, []) for name in columns]
        lines.append([title, *[CELLS[len(cell)].format(*cell).replace("0.", ".") for cell in cells]])
    return "\n".join(map(" | ".join, lines))


def main(config: Config, table: str, options):
    """Yield the commands; or run those that are left, write the tables, and yield them."""
    tables = [name for name in PARTS if name == table or table == "all" and name != "folds_shared"]
    jobs, seeds = {}, range(config.run.seed, config.run.seed + options.seeds)
    planned = {part: list(plan(part, config, seeds, jobs)) for name in tables for part in PARTS[name]}
    if not any(planned.values()) or options.seeds < 2:
        raise ValueError(f"got {table!r}, --seeds {options.seeds}; expected {', '.join(PARTS)} or all, data "
                         "for it, and 2 seeds or more, as one has no deviation")
    if config.data.synthetic and not all(job.done for job in jobs.values()):
        jobs = {DRAWN: Job(is_complete(config), command("datasets.synthetic", config), set()), **jobs}
    device = choose_device(config.run.device).type
    if device == "cuda":
        started = f"torchrun --nproc_per_node={torch.cuda.device_count()}"
        jobs = {place: job._replace(command=job.command.replace("python", started, 1))
                for place, job in jobs.items()}
    if options.dry_run:
        yield from (f"{'done' if job.done else 'to do':7s}{job.command}" for job in jobs.values())
    else:
        run(jobs, 2 if device == "cpu" else 1)
    for name in [] if options.dry_run else tables:
        path, found = folder("task", config).parent / f"{name}.txt", {}
        for part in [part for part in PARTS[name] if planned[part]]:
            found |= (folds if "folds" in part else compared)(part, planned[part])
        text = "\n\n".join(markdown(*item) for item in found.items())
        for task in dict.fromkeys(row[1] for row in planned["ablation"]) if name == "ablation" else ():
            save(parts(planned[name], task), path.with_name(f"ablation_{task}.png"))
        write_text(path, f"{text}\n")
        write_text(path.with_suffix(".json"), json.dumps(found, indent=1))
        yield f"\n{text}\n\nwritten to {path} and .json"


if __name__ == "__main__":
    table = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    config, options = from_command_line(__doc__, **{
        "seeds": {"type": int, "default": 3, "metavar": "N", "help": "how many (default: %(default)s)"},
        "shared-encoder": {"action": "store_true", "help": "folds: one for all, less clean"},
        "dry-run": {"action": "store_true", "help": "only say what would run"}})
    print_all(main(config, table + "_shared" * options.shared_encoder, options))
