"""How fast each stage is on this machine, with a GPU or without, beside a plain baseline: the work behind
benchmark.py's --device, told in docs/gpu.md.

On a GPU the paper's sizes are measured, on the CPU the demo's, so that the script itself is proven anywhere.
Reading order: sizes, measuring one row, measuring some in turn, the table, all of it.
"""

import datetime
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import benchmark_profile
import benchmark_recipe
import benchmark_steps as steps
from benchmark_baseline import Compiled, Own, Plain
from benchmark_steps import CORES, Work
from checkpoints import write_text
from config import load
from distributed import join

ROOT = Path(__file__).parent
ROUNDS = 3                           # A B A B A B: what is compared is measured in turn
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


# ---- One row

@dataclass
class Row:
    """What was measured of a Work. `seconds`: of each call; `first`: of the first one, which prepares."""
    work: Work
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    memory: int | None = None        # bytes at the peak
    problem: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def per_second(self) -> float | None:
        return self.work.count / self.median if self.seconds else None

    @property
    def flops(self) -> float | None:
        """Floating-point operations a second."""
        return self.per_second * self.work.flops if self.seconds and self.work.flops else None


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def timed(step, calls: int, device, waits: bool) -> list[float]:
    """Seconds of each call. On a GPU the times are taken there, between the ends of two steps, so what the
    GPU waits for Python is in them; a step that ends on the host is timed there."""
    if device.type == "cuda" and not waits:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


class Memory:
    """The peak of memory while something runs, in bytes. `held`: what others hold at the time, on a GPU.
    Without a GPU it is the whole process's, where the system tells (Linux)."""

    def __init__(self, device, held: int):
        self.cuda, self.held, self.told = device.type == "cuda", held, True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.told = False

    def peak(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.held
        lines = Path("/proc/self/status").read_text().splitlines() if self.told else []
        kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        return 1024 * kilobytes[0] if kilobytes else None


class Measured:
    """A Work that is built and warm, or has failed for want of memory; `round` measures it once more."""

    def __init__(self, work: Work, device):
        self.row, self.device, self.step = Row(work), device, None
        torch.manual_seed(0)
        before = held(device)
        self._try(self._warm_up)
        self.mine = held(device) - before

    def _warm_up(self):
        self.step = self.row.work.build()
        began = time.perf_counter()
        self.step()
        wait(self.device)
        self.row.first = time.perf_counter() - began
        self.step()
        wait(self.device)

    def round(self, seconds: float):
        """At least one call, about `seconds` long."""
        if self.step:
            self._try(lambda: self._measure(seconds))

    def _measure(self, seconds: float):
        memory = Memory(self.device, held(self.device) - self.mine)
        waits = self.row.work.waits
        one = timed(self.step, 1, self.device, waits)
        calls = int(min(20, seconds / max(one[0], 1e-9)))
        self.row.seconds += one + (timed(self.step, calls - 1, self.device, waits) if calls > 1 else [])
        peak = memory.peak()
        self.row.memory = peak if peak is None else max(peak, self.row.memory or 0)

    def _try(self, action):
        try:
            with self.row.work.way.precision():
                return action()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.row.problem, self.step, self.row.seconds = "out of memory", None, []
        clean(self.device)                           # after the exception, whose traceback holds the tensors


def held(device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_turn(works: list[Work], device, seconds: float) -> list[Row]:
    """Measure some works A B A B A B, so that what the machine does besides falls on all of them alike."""
    measured = [Measured(work, device) for work in works]
    for _ in range(ROUNDS):
        for one in measured:
            one.round(seconds)
    rows = [one.row for one in measured]
    del measured, one
    clean(device)
    return rows


def matrix_rate(way: Own, dtype, side: int, seconds: float) -> float:
    """Floating-point operations a second of a large product of two matrices: what the device can do."""
    device = way.team.device
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    work = Work("matrix product", way, f"{side} x {side}", "products", 1, lambda: lambda: torch.mm(a, b),
                2 * side ** 3)
    return in_turn([work], device, seconds)[0].flops


# ---- The table

HEADER = ("| what | way | size | ms, median (middle half) | a second | TFLOP/s | share of matrix rate "
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


def line(row: Row, rows: list[Row], matrix: float) -> str:
    """A row of the Markdown table."""
    work, spread = row.work, "-"
    if row.seconds:
        low, high = np.percentile(row.seconds, (25, 75))
        spread = f"{number(1000 * row.median)} ({number(1000 * low)} to {number(1000 * high)})"
    rate = "-" if row.per_second is None else f"{number(row.per_second)} {work.unit}"
    tera, share = "-", "-"
    if row.flops:
        tera, share = number(row.flops / 1e12), f"{100 * row.flops / matrix:.0f} %"
    memory = number(None if row.memory is None else row.memory / 1e9)
    cells = [work.name, work.way.name, work.size, spread, rate, tera, share, memory, remarks(row, rows)]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def clock(seconds: float | None) -> str:
    """0.4 s, 95 s, 12 min, 5.3 h: as exact as a reader needs it."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def recipe_lines(parts: list) -> list[str]:
    """The second table: each stage of the recipe, and the sum."""
    lines = ["| part | how much | a second | bound by | time |", "|---|---|---|---|---|"]
    lines += [f"| {part.stage} | {part.samples:,} {part.unit} | {number(part.rate)} | {part.bound_by} "
              f"| {clock(part.seconds)} |" for part in parts]
    known = [part.seconds for part in parts if part.seconds is not None]
    missing = "" if len(known) == len(parts) else f", {len(parts) - len(known)} parts not measured"
    return [*lines, f"| all{missing} | | | | {clock(sum(known))} |"]


def rates_of(rows: list[Row], batch: int) -> benchmark_recipe.Rates:
    """The project's rates. Pre-training's is that of the largest measured batch up to `batch`."""
    found = dict.fromkeys(benchmark_recipe.Rates.__dataclass_fields__)
    for row in rows:
        too_large = row.work.rate == "pretrain" and row.work.count > batch
        if row.work.way.name == "project" and row.work.rate and row.seconds and not too_large:
            found[row.work.rate] = row.per_second
    return benchmark_recipe.Rates(**found)


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
    for name, side, rate in (("stills", sizes.stills, "stills"), ("video", 112, "crops")):
        yield [steps.decoding(config, way, folder / name, side) for way in ways[:2]]
        yield [steps.decoding_by_all(config, own, folder / name, side, rate)]


def machine(device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return (f"{name}, {CORES} CPU cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
            f"Python {platform.python_version()}, NumPy {np.__version__}")


def as_dict(row: Row, matrix: float) -> dict:
    """A row for the JSON file: all that the table has, and each call's seconds."""
    work = row.work
    return {"what": work.name, "way": work.way.name, "size": work.size, "unit": work.unit, "count": work.count,
            "seconds": row.seconds, "first_seconds": row.first, "median_seconds": row.median,
            "per_second": row.per_second, "flops_each": work.flops, "flops_per_second": row.flops,
            "share_of_matrix_rate": row.flops and row.flops / matrix, "peak_bytes": row.memory,
            "problem": row.problem}


def main(device: str, compiled: bool = False, out="runs"):
    """Measure, print, and write <out>/benchmark_<device>.md and .json.

    Raises ValueError if PyTorch sees no GPU and one is asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU here; --device cpu measures the demo's sizes")
    began, sizes, team = time.time(), SIZES[device], join(device)
    config = load(str(ROOT / "configs" / sizes.config))
    own = Own(team)
    ways = [own, Plain(team)] + [Compiled(team)] * compiled
    lines, rows = [], []

    def say(text):
        lines.append(text)
        print(text, flush=True)

    say(f"# `python benchmark.py --device {device}{' --compile' * compiled}`\n\n{machine(team.device)}\n")
    dtype = MATRIX_TYPE[device]
    matrix = matrix_rate(own, dtype, sizes.matrix, sizes.seconds)
    say(f"Matrix rate, {sizes.matrix} x {sizes.matrix}, {str(dtype).removeprefix('torch.')}: "
        f"{number(matrix / 1e12)} TFLOP/s. Models: configs/{sizes.config}.\n\n{HEADER}")
    with tempfile.TemporaryDirectory() as folder:
        steps.draw_jpegs(Path(folder) / "stills", sizes.files, sizes.stills)
        steps.draw_jpegs(Path(folder) / "video", sizes.video, 112)
        for works in groups(config, sizes, ways, Path(folder)):
            measured = in_turn(works, team.device, sizes.seconds)
            rows += measured
            for row in measured:
                say(line(row, measured, matrix))
    say(f"\n## The whole recipe of configs/{sizes.config} at these rates\n")
    parts = benchmark_recipe.recipe(config, sizes.counts, rates_of(rows, config.pretrain.batch))
    say("\n".join(recipe_lines(parts)))
    say(f"\n## Where the time of a MAE step of {sizes.compared} images goes\n")
    shares = benchmark_profile.shares(steps.mae_step(config, own, sizes.compared).build(), team.device)
    say("\n".join(benchmark_profile.table(shares)))
    say(f"\nMeasured on {datetime.date.today()} in {clock(time.time() - began)}.")
    path = Path(out) / f"benchmark_{device}.md"
    write_text(path, "\n".join(lines) + "\n")
    found = {"machine": machine(team.device), "matrix_flops_per_second": matrix,
             "rows": [as_dict(row, matrix) for row in rows],
             "recipe": [vars(part) | {"seconds": part.seconds} for part in parts], "profile": shares}
    write_text(path.with_suffix(".json"), json.dumps(found, indent=1))
    print(f"written to {path} and {path.with_suffix('.json')}")
