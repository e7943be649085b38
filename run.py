"""One training: going on where it was, steps and epochs, progress, checkpoints, and how it stops.

A reader of the training loops may skip this file. Each loop calls it in one order:

    run = Run("pretrain", config, team, ...)      refuses a folder in use, or one made with other settings
    run.begin(model, optimizer, dataset, ...)     goes on from the last checkpoint, if there is one
    for epoch in range(run.epoch, epochs):
        for step, batch in run.batches():         this process's share; a stop takes effect between two steps
            run.end_step(loss, norm)              the epoch's sums, the progress line, a checkpoint in time
        run.keep_best(score)                      best.pt
        run.end_epoch(...)                        a row of log.csv, and a line
    run.end()                                     the last checkpoint
    run.finish({...})                             metrics.json, which marks the stage as finished
"""

import math
import os
import signal
import socket
import sys
import threading
import time

import torch

import pictures
from checkpoints import load_weights, write_text
from distributed import Team, all_sum
from run_folder import RunFolder
from training import STOP, Batches, load_optimizer, loader


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def rate(count: float, seconds: float) -> str:
    """Things per second, with a decimal where it matters."""
    speed = count / max(seconds, 1e-9)
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


class Progress:
    """A line every 5 seconds: how much of `total` is done (by this process), how fast, how long it takes."""

    def __init__(self, total: int, unit: str, team: Team):
        self.total, self.unit, self.team, self.done = total, unit, team, 0
        self.began = self.printed = time.time()

    def add(self, count: int):
        self.done += count
        now = time.time()
        if now - self.printed > 5:
            self.printed, seconds = now, now - self.began
            left = clock((self.total - self.done) * seconds / max(self.done, 1))
            self.team.say(f"  {self.done:,} of {self.total:,} {self.unit}  {rate(self.done, seconds)} "
                          f"{self.unit}/s  {left} left")


class Signals:
    """SIGTERM and Ctrl-C in a training: the first asks it to save and end, a later one ends it at once.

    A scheduler and torchrun may both send the first one: a copy within a second is the same request. Python
    runs a signal's handler between two steps of its own, which in a long operation comes late. So a thread
    watches the bytes that the system's handler writes (`signal.set_wakeup_fd`): it answers at once and
    knows when each one came.
    """

    def __init__(self, team: Team):
        self.team, self.received = team, 0
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        for number in STOP:
            signal.signal(number, self._remember)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _remember(self, number, frame):
        self.received = self.received or number

    def _watch(self):
        first = None
        while arrived := self.reader.recv(64):
            asked = [number for number in arrived if number in STOP]
            if asked and first is None:
                first, name = time.monotonic(), signal.Signals(asked[0]).name
                self._remember(asked[0], None)
                self.team.say(f"{name} received: finishing this step, then saving; "
                              "send it once more to end now and lose the steps since the last checkpoint")
            elif asked and time.monotonic() - first > 1:
                os._exit(128 + asked[0])

    def give_back(self):
        """Signals act as they did before the training."""
        signal.set_wakeup_fd(-1)
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
        self.reader.shutdown(socket.SHUT_RDWR)               # ends the thread


class Run(RunFolder):
    """A training's folder, and where it is: `epoch`, `step` of that epoch (both from 0), `best` score."""

    def begin(self, model, optimizer, dataset, batch: int, epochs: int, data: dict,
              origin: dict | None = None, unit: str = "images"):
        """Go on from the last checkpoint, or start. `data`: what there is to train on; `origin`: the record
        of the input (made_of.py). `unit`: what `dataset` holds, for the progress line."""
        self.model, self.optimizer, self.dataset = model, optimizer, dataset
        self.batch, self.steps, self.epochs, self.unit = batch, math.ceil(len(dataset) / batch), epochs, unit
        self.epoch, self.step, self.best, self.is_best, self.sums = 0, 0, -math.inf, False, {}
        saved = self.resume(data)
        self.remember(data, origin)
        if saved is not None:
            load_weights(model, saved["model"], self.folder)
            load_optimizer(optimizer, saved["optimizer"])
            self.epoch, self.step = saved["epoch"], saved["step"]
            self.best, self.sums = saved["best"], saved["sums"]
            self.team.say(f"going on from epoch {self.epoch + 1}, step {self.step}")
        self.cut_log(self.epoch + 1)
        self.signals = Signals(self.team)
        self.began = self.epoch_began = self.saved = self.printed = time.time()
        self.done, self.seen = 0, 0                          # steps and samples since the start
        self.cost = 0.0                                      # seconds for a checkpoint
        self.unchecked = None                                # the last step, not yet known to be finite

    def batches(self):
        """What is left of the epoch: yields (step of the whole run, this process's share of its batch).

        A stop that a signal has asked for takes effect here, between two steps, on all processes together.
        """
        seed, workers = self.config.run.seed, self.config.run.workers
        self.order = Batches(len(self.dataset), self.batch, seed, self.epoch, self.team, first=self.step)
        for share in loader(self.dataset, self.order, workers, self.team):
            self.obey_signals()
            yield self.epoch * self.steps + self.step, share
        self.check_finite()

    def count_readable(self, images, problems: list[str]) -> tuple[int, int]:
        """How many images of a step could and could not be read, on all processes."""
        if self.epoch == 0:
            for problem in problems:
                print(f"  left out: {problem}", flush=True)
        readable, unreadable = all_sum(torch.tensor([len(images), len(problems)])).tolist()
        return readable, unreadable

    def end_step(self, loss, gradient_norm, **counts):
        """After the optimiser step. `means` averages loss and gradient norm, and adds up `counts`."""
        self.check_finite()
        for name, value in {"loss": loss.detach(), "gradient_norm": gradient_norm.detach(), **counts}.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.seen += len(self.order.whole(self.step))
        self.step, self.done = self.step + 1, self.done + 1
        self._fetch(loss, gradient_norm)
        now = time.time()
        if now - self.saved > 60 * self.config.run.checkpoint_minutes:
            self.save()
        if now - self.printed > 5:
            self.printed, seconds = now, now - self.began
            at, steps = self.epoch * self.steps + self.step, self.steps * self.epochs
            speed, left = rate(self.seen, seconds), clock(seconds / self.done * (steps - at))
            self.team.say(f"  step {at:,} of {steps:,}  loss {loss.item():.4f}  "
                          f"{speed} {self.unit}/s  {left} left")

    def means(self) -> dict:
        """The epoch's mean loss and gradient norm, and its counts, as plain numbers. Waits for the device."""
        sums = self._plain_sums()
        return {name: value / self.steps if name in ("loss", "gradient_norm") else int(value)
                for name, value in sums.items()}

    def unless_stopped(self, items):
        """A validation's items, until a signal comes. Call `obey_signals` before using the result."""
        for item in items:
            if self.signals.received:
                return
            yield item

    def keep_best(self, score: float):
        """Write best.pt if this epoch's score is the best so far (`is_best`, until the epoch ends)."""
        score = float(score)                                 # `read_checkpoint` refuses NumPy's numbers
        self.is_best = score > self.best
        if self.is_best:
            self.best = score
            self.write("best.pt", {"model": self.model.state_dict(), "epoch": self.epoch + 1, "score": score,
                                   "made_of": self.record})

    @property
    def shown(self) -> bool:
        """Is this epoch told of? Each tenth of the run is, and the last, and each that is the best so far."""
        return (self.epoch + 1) % max(1, self.epochs // 10) == 0 or self.epoch + 1 == self.epochs

    def end_epoch(self, text: str = "", **columns):
        """Add the epoch's means and `columns` to log.csv, say them as `text` if it is to be told of, turn to
        the next epoch; save, if that takes less than 2 % of the time."""
        self.obey_signals()
        means, lr = self.means(), self.optimizer.param_groups[0]["lr"]
        seconds = round(time.time() - self.epoch_began, 2)
        self.log({"epoch": self.epoch + 1, "lr": lr, **means, **columns, "seconds": seconds})
        if self.shown or self.is_best:
            self.team.say(f"  epoch {self.epoch + 1}/{self.epochs}  loss {means['loss']:.4f}  {text}"
                          + ("  (best so far)" if self.is_best else ""))
        self.epoch, self.step, self.sums, self.epoch_began = self.epoch + 1, 0, {}, time.time()
        self.is_best = False
        if time.time() - self.saved > 50 * self.cost:
            self.save()

    def end(self):
        """After the last epoch: save, obey a signal that came too late for a step, give the signals back."""
        self.save()
        self.obey_signals()
        self.signals.give_back()
        self.team.wait()                                     # best.pt is there for every process

    def finish(self, metrics: dict, chance: dict | None = None):
        """Draw curves.png (`chance`: values at chance level, by column) and mark the stage as finished."""
        if self.team.rank == 0:
            pictures.curves(self.folder / "log.csv", self.folder / "curves.png", chance)
        super().finish(metrics)

    def save(self):
        """Write last.pt, unless the last step's loss was not finite. Rank 0 decides alone when it is time."""
        self.check_finite()
        began = time.time()
        self.write("last.pt", {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                               "epoch": self.epoch, "step": self.step, "best": self.best,
                               "sums": self._plain_sums(), "made_of": self.record})
        self.saved = time.time()
        self.cost = self.saved - began

    def obey_signals(self):
        """If any process was asked to stop: save, say so, and end all with the exit code of an ended process.

        Every process must call this at the same place.
        """
        mine = torch.tensor([float(self.signals.received == number) for number in STOP])
        asked = all_sum(mine)
        if asked.any():
            number = STOP[int(asked.argmax())]
            self.save()
            name, at = signal.Signals(number).name, self.epoch * self.steps + self.step
            self.team.say(f"stopped by {name} after step {at:,}; "
                          "saved, start the same command again to go on")
            self.team.wait()
            sys.exit(128 + number)

    def _plain_sums(self) -> dict:
        return {name: value.item() if torch.is_tensor(value) else value for name, value in self.sums.items()}

    def _fetch(self, loss, gradient_norm):
        """Start to copy the step's two numbers from the device: looked at a step later, without waiting."""
        values = torch.stack([loss.detach(), gradient_norm.detach()]).to("cpu", non_blocking=loss.is_cuda)
        arrived = None
        if loss.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        lr = self.optimizer.param_groups[0]["lr"]
        where = f"epoch {self.epoch + 1}, step {self.step}, learning rate {lr:.2e}"
        self.unchecked = values, arrived, where, self.order.whole(self.step - 1)

    def check_finite(self):
        """Refuse to go on after a step whose loss or gradient was not finite; list its samples in a file."""
        if self.unchecked is None:
            return
        values, arrived, where, samples = self.unchecked
        if arrived:
            arrived.synchronize()                # waits for the copy, not for what the GPU was given since
        self.unchecked = None
        if values.isfinite().all():
            return
        path = self.folder / "not_finite.txt"
        if self.team.rank == 0:
            write_text(path, "".join(f"{self.dataset.where(i)}\n" for i in samples))
        raise ValueError(f"the loss is {values[0]}, the gradient norm {values[1]} at {where}; "
                         f"the {len(samples)} samples of this step are listed in {path}\n"
                         f"  the last checkpoint in {self.folder} is from before and is kept. Two things to "
                         "try: a lower learning rate or a longer warm-up (as a run of another "
                         "--set run.name=...), and a look at those samples")
