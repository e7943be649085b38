"""One run of a stage: its folder, going on where it was, steps and epochs, progress, and how it stops.

A reader of the training loops may skip this file. The methods of `Run` stand in the order in which a loop
calls them. Its folder is never left half-written:

    config.yaml, made_of.json     all settings; what the result is made of (pipeline.py)
    log.csv                       a row per epoch
    last.pt, previous.pt          what a stopped run goes on from, and the one before it
    best.pt                       the weights of the best epoch
    metrics.json                  the result, written last: it marks the stage as finished
"""

import fcntl
import itertools
import json
import math
import os
import signal
import sys
import time

import torch

from engine.checkpoints import checksum, load_weights, read_checkpoint, write_file, write_text
from engine.config import as_yaml
from engine.distributed import STOP, Team, all_sum, on_stop
from engine.training import Progress, in_pieces, loader, seed_dropout, set_learning_rate, shares

OTHER_RUN = "a run of its own, --set run.name=NEW"           # the way on that loses nothing


class Run:
    """The folder of a stage's result, locked while this process lives, and the training that fills it.

    `record`: stage and settings (pipeline.py). `problem()`: why what lies there is not what this run would
    make, or "". Raises ValueError, on every process, with that, if another run uses the folder, or if it
    cannot be written. `finished`: there is nothing left to do. In a training: `epoch`, `step` of that epoch
    (both from 0), `best` score, `count` of readable images in the step's batch.
    """

    def __init__(self, folder, record: dict, config, team: Team, problem=lambda: ""):
        self.folder, self.record, self.config, self.team, self.damaged = folder, record, config, team, False
        found = ""
        if team.rank == 0:
            try:
                self._open()
                found = problem()
            except (ValueError, OSError) as error:
                found = str(error)
        found = team.agree(found)
        if found:
            raise ValueError(found)
        self.finished = team.agree((folder / "metrics.json").exists())

    def _open(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)      # the system lets go of it in any case
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another run is writing here; wait for it, or choose another "
                             "--set run.name=...") from None
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written and locked ({error.strerror}); choose "
                             "another place with --set run.out=...") from None
        for leftover in self.folder.glob(".*.tmp*"):
            leftover.unlink()                                # half-written files of a killed run

    # ---- The record

    def remember(self, data: dict, origin: dict | None):
        """Write what the result will be made of: the data read, and the record of the input. Rank 0 only."""
        self.record = {**self.record, "data": data, "from": origin}
        if self.team.rank == 0:
            write_text(self.folder / "config.yaml", as_yaml(self.config))
            write_text(self.folder / "made_of.json", json.dumps(self.record, indent=1))

    def same_on_all_machines(self, data):
        """Raises ValueError if `data` is not what rank 0 found, as when a disk is not mounted."""
        first = self.team.agree(data)
        if first != data:
            raise ValueError("this machine has other data than the first one:"
                             + changes(first, data, "there", "here"))

    def refuse_other_data(self, before: dict, now: dict):
        """Raises ValueError, naming each change, if the result began with other data than there is now."""
        if before != now:
            raise ValueError(f"{self.folder} was made from other data:{changes(before, now, 'was', 'now')}\n"
                             f"two ways on: bring back what it began with, or begin {OTHER_RUN}")

    def still_finished(self, data: dict) -> bool:
        """Is there nothing left to do? Says so. Raises ValueError if a finished result was made from other
        data than there is now, or if its weights are gone."""
        if self.finished:
            record = json.loads((self.folder / "made_of.json").read_text())
            self.refuse_other_data(record["data"], data)
            there(self.folder / record["checkpoint"])
            self.team.say(f"{self.folder} is finished; nothing to do")
        return self.finished

    def finish(self, metrics: dict):
        """Write metrics.json, which marks the stage as finished, before any process goes on; and before that,
        into the record, the checksum of the weights that later stages read."""
        if self.team.rank == 0:
            names = [name for name in ("best.pt", "last.pt") if (self.folder / name).exists()]
            if names:
                self.record |= {"checkpoint": names[0], "checksum": checksum(self.folder / names[0])}
            write_text(self.folder / "made_of.json", json.dumps(self.record, indent=1))
            write_text(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        self.team.wait()

    # ---- A training

    def begin(self, model, optimizer, dataset, section, data: dict, origin: dict | None = None,
              epochs: int = 0, cut: bool = False, unit: str = "images"):
        """Go on from the last checkpoint, or start. `section`: the settings with batch, epochs (unless
        given), lr, warmup_epochs; `data`: what there is to train on; `origin`: the record of the input;
        `cut`: batches are cut into pieces of at most run.largest_piece; `unit`: what `dataset` holds."""
        self.model, self.optimizer, self.dataset, self.section = model, optimizer, dataset, section
        self.unit, self.all_epochs = unit, epochs or section.epochs
        self.steps = math.ceil(len(dataset) / section.batch)
        self.share = math.ceil(section.batch / self.team.world)            # the most images of this process
        self.accumulation = math.ceil(self.share / self.config.run.largest_piece) if cut else 1
        self.epoch, self.step, self.best, self.is_best, self.sums = 0, 0, -math.inf, False, {}
        self.same_on_all_machines(data)
        saved = self._last_checkpoint()
        if saved is not None:
            self.refuse_other_data(saved.get("made_of", {}).get("data", {}), data)
            load_weights(model, saved["model"], self.folder)
            optimizer.load_state_dict(saved["optimizer"])
            self.epoch, self.step = saved["epoch"], saved["step"]
            self.best, self.sums = saved["best"], saved["sums"]
            self.team.say(f"going on from epoch {self.epoch + 1}, step {self.step}")
        self.remember(data, origin)
        self.received, self.asked = 0, 0.0                   # the signal that asked for a stop, and when
        self.before = on_stop(dict.fromkeys(STOP, self._remember))
        self.epoch_began = self.saved = time.time()
        self.cost = 0.0                                      # seconds for a checkpoint
        done = self.epoch * self.steps + self.step
        self.progress = Progress(self.steps * self.all_epochs - done, "steps", self.team)

    def effective_batch(self) -> str:
        """How a batch is spread, for the line that a stage prints."""
        return (f"effective batch {self.section.batch} = {math.ceil(self.share / self.accumulation)} x "
                f"{self.accumulation} accumulation x {self.team.world} processes, on {self.team.device}")

    def epochs(self):
        """The epochs that are left, counted from 0. The dataset is told each."""
        for self.epoch in range(self.epoch, self.all_epochs):
            self.dataset.epoch = self.epoch
            yield self.epoch

    def batches(self):
        """What is left of the epoch: this process's share of each batch. Before each, the learning rate and
        dropout's seed are set, and the readable images of the whole batch are counted: `count`, at least 1.
        A stop that a signal has asked for takes effect here, between two steps, on all processes together.
        """
        seed, samples, s = self.config.run.seed, len(self.dataset), self.section
        mine = shares(samples, s.batch, seed, self.epoch, self.team, first=self.step)
        for share in loader(self.dataset, mine, self.config.run.workers, self.team):
            readable, whole = self.obey_signals(len(share[0])), min(s.batch, samples - self.step * s.batch)
            self.count, self.unreadable = max(readable, 1), whole - readable
            set_learning_rate(self.optimizer, self.epoch * self.steps + self.step,
                              self.steps * self.all_epochs, s.warmup_epochs * self.steps, s.lr)
            seed_dropout(seed, self.epoch, self.step, self.team.rank)
            yield share

    def on_device(self, batch) -> list:
        """The tensors of a batch on the device, without waiting for the copy."""
        return [part.to(self.team.device, non_blocking=True) for part in batch]

    def pieces(self, ddp, *batch):
        """The pieces of a batch, on the device, for gradient accumulation."""
        return map(self.on_device, in_pieces(ddp, self.accumulation, *batch))

    def end_step(self, loss, norm):
        """After the optimiser step: sum up the epoch, tell the progress, save in time. `loss` is that of the
        whole batch, `norm` that of the gradient: both scalars on the device."""
        values = {"loss": loss.detach(), "gradient_norm": norm.detach(), "unreadable": self.unreadable}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in values.items()}
        self.step += 1
        if time.time() - self.saved > 60 * self.config.run.checkpoint_minutes:
            self.save()
        self.progress.add(1, lambda: (f"  epoch {self.epoch + 1}, mean loss "
                                      f"{self._checked_sums()['loss'] / self.step:.4f}"))

    def unless_stopped(self, items):
        """A validation's items, until a signal comes. Call `obey_signals` before using the result."""
        return itertools.takewhile(lambda item: not self.received, items)

    def keep_best(self, score: float):
        """Write best.pt if this epoch's score is the best so far (`is_best`, until the epoch ends)."""
        score = float(score)                                 # `read_checkpoint` refuses NumPy's numbers
        self._checked_sums()
        self.is_best = score > self.best
        if self.is_best:
            self.best = score
            self.write("best.pt", {"model": self.model.state_dict(), "epoch": self.epoch + 1, "score": score,
                                   "made_of": self.record})

    def load_best(self):
        """The weights of the best epoch, into the model."""
        load_weights(self.model, read_checkpoint(self.folder / "best.pt")["model"], self.folder)

    @property
    def shown(self) -> bool:
        """Is this epoch told of? Each tenth of the run is, and the last, and each that is the best so far."""
        return (self.is_best or self.epoch + 1 == self.all_epochs
                or (self.epoch + 1) % max(1, self.all_epochs // 10) == 0)

    def end_epoch(self, text: str = "", **columns):
        """Add the epoch's means and `columns` to log.csv, say them as `text` if it is to be told of, turn to
        the next epoch; save, if that takes less than 2 % of the time."""
        self.obey_signals()
        sums, at = self._checked_sums(), self.epoch + 1
        means = {name: sums[name] / self.steps for name in ("loss", "gradient_norm")}
        means |= {"unreadable": sums["unreadable"]} if self.unit == "images" else {}
        self.log({"epoch": at, "lr": self.optimizer.param_groups[0]["lr"], **means, **columns,
                  "seconds": round(time.time() - self.epoch_began, 2)})
        if self.shown:
            self.team.say(f"  epoch {at}/{self.all_epochs}  loss {means['loss']:.4f}  {text}"
                          + ("  (best so far)" if self.is_best else ""))
        self.epoch, self.step, self.sums, self.epoch_began, self.is_best = at, 0, {}, time.time(), False
        if time.time() - self.saved > 50 * self.cost:
            self.save()

    def end(self):
        """After the last epoch: save, obey a signal that came too late for a step, give the signals back."""
        self.save()
        self.obey_signals()
        on_stop(self.before)
        self.team.wait()                                     # best.pt is there for every process

    def _remember(self, number, frame):
        """SIGTERM or Ctrl-C: the first asks the training to save and end, a later one ends it at once. A
        scheduler and torchrun may both send the first one: a copy within a second is the same request."""
        if not self.received:
            self.received, self.asked = number, time.monotonic()
            self.team.say(f"{signal.Signals(number).name} received: finishing this step, then saving; "
                          "send it once more to end now and lose the steps since the last checkpoint")
        elif time.monotonic() - self.asked > 1:
            os._exit(128 + number)

    def obey_signals(self, number: int = 0) -> int:
        """If any process was asked to stop: save, say so, and end all with the exit code of an ended process.
        Every process must call this at the same place. -> the sum of `number` over them, by one message."""
        asked = [self.received == name for name in STOP]
        total, *asked = all_sum(torch.tensor([number, *asked])).tolist()
        for name, processes in zip(STOP, asked):
            if processes:
                self.save()
                at = self.epoch * self.steps + self.step
                self.team.say(f"stopped by {signal.Signals(name).name} after step {at:,}; "
                              "saved, start the same command again to go on")
                self.team.wait()
                sys.exit(128 + name)
        return total

    # ---- Checkpoints

    def save(self):
        """Write last.pt, unless a step's loss was not finite. Rank 0 decides alone when it is time."""
        began = time.time()
        self.write("last.pt", {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                               "epoch": self.epoch, "step": self.step, "best": self.best,
                               "sums": self._checked_sums(), "made_of": self.record})
        self.saved = time.time()
        self.cost = self.saved - began

    def write(self, name: str, state: dict):
        """Write a checkpoint, whole or not at all; an earlier last.pt becomes previous.pt. Rank 0 only."""
        if self.team.rank == 0:
            path = self.folder / name
            if name == "last.pt" and path.exists() and not self.damaged:
                os.replace(path, self.folder / "previous.pt")
            write_file(path, lambda file: torch.save(state, file))
            self.damaged = self.damaged and name != "last.pt"

    def _last_checkpoint(self) -> dict | None:
        """The last whole checkpoint; None before the first. A damaged one is named, the one before it used.
        Raises ValueError if all are damaged: someone should know before weeks of work begin again."""
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if not self.team.agree(path.exists()):
                continue
            checkpoint, problem = None, ""
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                problem = str(error)
            problems = [text for text in self.team.gather(problem) if text]
            if not problems:
                return checkpoint
            self.team.say(f"warning: {problems[0]}; trying the one before")
            self.damaged = True                              # not worth keeping as previous.pt
        if self.damaged:
            raise ValueError(f"{self.folder}: no checkpoint here is whole; put a copy in its place, or begin "
                             f"{OTHER_RUN}")
        return None

    def _checked_sums(self) -> dict:
        """The epoch's sums as plain numbers, which waits for the device. Raises ValueError if the loss or the
        gradient of a step was not finite, or no image was readable: such weights are never saved."""
        sums = {name: value.item() if torch.is_tensor(value) else value for name, value in self.sums.items()}
        if sums.get("unreadable") == len(self.dataset):
            raise ValueError(f"none of {len(self.dataset):,} images can be read; nothing to train on")
        if not all(map(math.isfinite, sums.values())):
            lr = self.optimizer.param_groups[0]["lr"]
            raise ValueError(f"epoch {self.epoch + 1}, up to step {self.step}: the sum of the losses is "
                             f"{sums['loss']}, of the gradient norms {sums['gradient_norm']}, at a learning "
                             f"rate of {lr:.2e}\n  the last checkpoint in {self.folder} is from before and "
                             "is kept; try a lower learning rate or a longer warm-up")
        return sums

    def log(self, row: dict):
        """Add one row to log.csv; rows of epochs that are done again go. The first row fixes the columns."""
        if self.team.rank == 0:
            path = self.folder / "log.csv"
            header, *rows = path.read_text().splitlines() if path.exists() else [",".join(row)]
            rows = [line for line in rows if int(line.split(",")[0]) < row["epoch"]]
            values = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()]
            write_text(path, "\n".join([header, *rows, ",".join(values)]) + "\n")


def there(path):
    """Raises ValueError if `path`, which a finished stage has written, is gone."""
    if not path.exists():
        raise ValueError(f"{path} is gone, though its stage is finished; put a copy back, or begin "
                         f"{OTHER_RUN}")


def changes(before: dict, now: dict, then_word: str, now_word: str) -> str:
    """A line for each entry in which two descriptions differ."""
    lines = ""
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        if a != b and isinstance(a, list) and isinstance(b, list):         # of videos
            gone, new = sorted(set(a) - set(b)), sorted(set(b) - set(a))
            lines += f"\n  {name}: {len(gone)} fewer {gone[:5]}, {len(new)} more {new[:5]}"
        elif a != b:
            lines += f"\n  {name}: {then_word} {a}, {now_word} {b}"
    return lines
