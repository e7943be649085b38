"""How fast each stage is on this machine, with a GPU or without, beside a plain baseline: the work behind
benchmark.py's --device, told in docs/gpu.md.

On a GPU the paper's sizes are measured, on the CPU the demo's, so that the script itself is proven anywhere.
How each row is measured: benchmark_measure.py; what: benchmark_steps.py.
"""

import datetime
import json
import multiprocessing
import platform
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import benchmark_profile
import benchmark_recipe
import benchmark_steps as steps
from benchmark_baseline import Compiled, Own, Plain
from benchmark_measure import Row, in_turn
from benchmark_steps import CORES
from checkpoints import write_text
from config import load
from distributed import join
from many_runs import in_words

ROOT = Path(__file__).parent
MATRIX_TYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""
    config: str
    counts: benchmark_recipe.Counts
    mae: tuple                       # images a step
    compared: int                    # the one of them at which the ways are compared
    finetune: int
    stills: int                      # side of a still face on disk, in pixels
    video: int                       # frames
    files: int                       # still faces
    matrix: int                      # side of the matrices that give the matrix rate
    seconds: float                   # for each row in each round


SIZES = {"cuda": Sizes("paper.yaml", benchmark_recipe.PAPER, (64, 128, 256, 512, 1024), 256, 128, 224,
                       video=4068, files=2048, matrix=8192, seconds=1.0),
         "cpu": Sizes("demo.yaml", benchmark_recipe.DEMO, (16, 64), 64, 32, 96,
                      video=180, files=256, matrix=1024, seconds=0.4)}


# ---- The table

HEADER = ("| what | way | size | ms a call, median (middle half) | a second | TFLOP/s | share of matrix rate "
          "| peak GB | remarks |\n|---|---|---|---|---|---|---|---|---|")


def number(value: float | None) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123, 1,235."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def remarks(row: Row, rows: list[Row]) -> str:
    """How many times as fast it is as the other ways, and its first call, if that took long."""
    said = []
    for other in rows:
        same = (other.work.name, other.work.size) == (row.work.name, row.work.size)
        if same and other.seconds and row.seconds:
            if (row.work.way.name, other.work.way.name) in (("project", "plain"), ("compiled", "project")):
                said.append(f"{other.median / row.median:.2f} x {other.work.way.name}")
    if row.work.way.name == "compiled" and row.seconds:
        said.append(f"first call {row.first:.1f} s")
    return row.problem or ", ".join(said)


def line(row: Row, rows: list[Row]) -> str:
    """A row of the Markdown table."""
    work, spread = row.work, "-"
    if row.seconds:
        low, high = np.percentile(row.seconds, (25, 75))
        spread = f"{number(1000 * row.median)} ({number(1000 * low)} to {number(1000 * high)})"
    rate = "-" if row.per_second is None else f"{number(row.per_second)} {work.unit}"
    tera, share = "-", "-"
    if row.share:
        tera, share = number(row.flops / 1e12), f"{100 * row.share:.0f} %"
    memory = number(None if row.memory is None else row.memory / 1e9)
    cells = [work.name, work.way.name, work.size, spread, rate, tera, share, memory, remarks(row, rows)]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def recipe_lines(parts: list) -> list[str]:
    """The second table: each stage of the recipe, and the sum."""
    lines = ["| part | how much | a second | bound by | time |", "|---|---|---|---|---|"]
    lines += [f"| {part.stage} | {part.samples:,} {part.unit} | {number(part.rate)} | {part.bound_by} "
              f"| {'-' if part.seconds is None else in_words(part.seconds)} |" for part in parts]
    known = [part.seconds for part in parts if part.seconds is not None]
    missing = "" if len(known) == len(parts) else f", {len(parts) - len(known)} parts not measured"
    return [*lines, f"| all{missing} | | | | {in_words(sum(known))} |"]


def rates_of(rows: list[Row], batch: int) -> benchmark_recipe.Rates:
    """The project's rates. Pre-training's is that of the largest measured batch up to `batch`."""
    found = dict.fromkeys(benchmark_recipe.Rates.__dataclass_fields__)
    for row in rows:
        too_large = row.work.rate == "pretrain" and row.work.count > batch
        if row.work.way.name == "project" and row.work.rate and row.seconds and not too_large:
            found[row.work.rate] = row.per_second
    return benchmark_recipe.Rates(**found)


def profiled(rows: list[Row], sizes: Sizes) -> int:
    """The batch of the MAE step that is profiled: the compared one, or the largest below it that fits; 0 if
    none does."""
    batches = [row.work.count for row in rows if row.work.rate == "pretrain" and row.seconds]
    return max((batch for batch in batches if batch <= sizes.compared), default=0)


# ---- All of it

def groups(config, sizes: Sizes, ways: list, folder: Path):
    """What is measured in turn, group by group."""
    own = ways[0]
    for batch in sizes.mae:
        yield [steps.mae_step(config, way, batch) for way in (ways if batch == sizes.compared else [own])]
    yield [steps.finetune_step(config, way, sizes.finetune) for way in ways]
    yield [steps.extraction(config, way) for way in ways]
    yield [steps.extraction_of_video(config, own, folder / "video")]
    yield [steps.segment_step(config, way) for way in ways]
    yield [steps.whole_video(config, way, sizes.video) for way in ways]
    yield [steps.emma_step(config, way, sizes.finetune) for way in ways]
    yield [steps.cotex_step(config, way, sizes.compared) for way in ways]
    for name, side, rate in (("stills", sizes.stills, "stills"), ("video", 112, "crops")):
        yield [steps.decoding(config, way, folder / name, side) for way in ways[:2]]
        yield [steps.decoding_by_all(config, own, folder / name, side, rate)]


def machine(device) -> str:
    """What it was measured on, in a line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return (f"{name}, {CORES} CPU cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
            f"Python {platform.python_version()}, NumPy {np.__version__}")


def as_dict(row: Row) -> dict:
    """A row for the JSON file: all that the table has, and each call's seconds."""
    work = row.work
    return {"what": work.name, "way": work.way.name, "size": work.size, "unit": work.unit,
            "count": work.count, "seconds": row.seconds, "first_seconds": row.first,
            "median_seconds": row.median, "per_second": row.per_second, "flops_each": work.flops,
            "flops_per_second": row.flops, "matrix_flops_per_second": row.matrix,
            "share_of_matrix_rate": row.share, "peak_bytes": row.memory, "problem": row.problem}


def main(device: str, compiled: bool = False, out="runs"):
    """Measure, print, and write <out>/benchmark_<device>.md and .json.

    Raises ValueError if PyTorch sees no GPU and one is asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU here; "
                         "--device cpu measures the demo's sizes")
    began, sizes, team = time.time(), SIZES[device], join(device)
    config = load(str(ROOT / "configs" / sizes.config))
    own = Own(team)
    ways = [own, Plain(team)] + [Compiled(team)] * compiled
    lines, rows = [], []

    def say(text):
        lines.append(text)
        print(text, flush=True)

    say(f"# `python benchmark.py --device {device}{' --compile' * compiled}`\n\n{machine(team.device)}\n")
    say(f"Models: configs/{sizes.config}.\n\n{HEADER}")
    matrix = steps.matrix_product(own, MATRIX_TYPE[device], sizes.matrix)
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps.draw_jpegs(Path(folder) / "stills", sizes.files, sizes.stills)
            steps.draw_jpegs(Path(folder) / "video", sizes.video, 112)
            for works in groups(config, sizes, ways, Path(folder)):
                measured = in_turn(works, matrix, team.device, sizes.seconds)
                rows += measured
                for row in measured:
                    say(line(row, measured))
    finally:                            # after an error there may be workers, which ignore SIGTERM
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    lowest, highest = min(row.matrix for row in rows), max(row.matrix for row in rows)
    say(f"\nMatrix rate: {matrix.name}, {matrix.size}, measured beside each group of rows: "
        f"{number(lowest / 1e12)} to {number(highest / 1e12)} TFLOP/s.")
    say(f"\n## The whole recipe of configs/{sizes.config} at these rates\n")
    parts = benchmark_recipe.recipe(config, sizes.counts, rates_of(rows, config.pretrain.batch))
    say("\n".join(recipe_lines(parts)))
    shares, batch = {}, profiled(rows, sizes)
    if batch:
        say(f"\n## Where the time of a MAE step of {batch} images goes\n")
        shares = benchmark_profile.shares(steps.mae_step(config, own, batch).build(), team.device)
        say("\n".join(benchmark_profile.table(shares)))
    say(f"\nMeasured on {datetime.date.today()} in {in_words(time.time() - began)}.")
    path = Path(out) / f"benchmark_{device}.md"
    write_text(path, "\n".join(lines) + "\n")
    found = {"machine": machine(team.device), "rows": [as_dict(row) for row in rows],
             "recipe": [vars(part) | {"seconds": part.seconds} for part in parts], "profile": shares}
    write_text(path.with_suffix(".json"), json.dumps(found, indent=1))
    print(f"written to {path} and {path.with_suffix('.json')}")
