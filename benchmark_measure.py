"""Times and memory of the work that benchmark_device.py compares, taken in turn.

Reading order: one row of the table, its time, its memory, a work that is ready to be measured, some in turn.
"""

import gc
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from benchmark_steps import Work
from distributed import OUT_OF_SHARED_MEMORY

ROUNDS = 3                           # A B A B A B: what is compared is measured in turn


@dataclass
class Row:
    """What was measured of a Work. `seconds`: of each call; `first`: of the first one, which prepares."""
    work: Work
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    memory: int | None = None        # bytes at the peak
    problem: str = ""
    matrix: float | None = None      # the matrix rate in the same rounds, in operations a second

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

    @property
    def share(self) -> float | None:
        """Of the matrix rate."""
        return self.flops / self.matrix if self.flops and self.matrix else None


def what_ran_out(error: RuntimeError) -> str:
    """For a row of the table: which memory was too small. Raises the error itself if it is another one."""
    said = f"{error} {error.__cause__}"
    if any(words in said for words in OUT_OF_SHARED_MEMORY):
        return "out of shared memory"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        return "out of memory"
    raise error


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
            self.row.problem, self.step = what_ran_out(error), None
            self.row.seconds, self.row.memory = [], None
        clean(self.device)                           # after the exception, whose traceback holds the tensors


def held(device) -> int:
    """Bytes of a GPU's memory that tensors hold now; 0 without a GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def wait(device):
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean(device):
    """Give memory of what is no longer needed back to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def in_turn(works: list[Work], matrix: Work, device, seconds: float) -> list[Row]:
    """Measure some works A B A B A B, so that what the machine does besides falls on all of them alike: on
    the product of two large matrices too, whose rate is what the device can do."""
    measured = [Measured(work, device) for work in (matrix, *works)]
    for _ in range(ROUNDS):
        for one in measured:
            one.round(seconds)
    product, *rows = [one.row for one in measured]
    for row in rows:
        row.matrix = product.flops
    del measured, one
    clean(device)
    return rows
