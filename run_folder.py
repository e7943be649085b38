"""The folder of a stage's result: runs/<config name>/<stage>, with its settings, log and checkpoints.

A folder is used by one run at a time, is not mixed with other settings or other data, and is never left
half-written:

    config.yaml, made_of.json     all settings; what the result is made of (made_of.py)
    log.csv                       a row per epoch
    last.pt, previous.pt          what a stopped run goes on from, and the one before it
    best.pt                       the weights of the best epoch
    metrics.json                  the result, written last: its presence marks the stage as finished
"""

import errno
import fcntl
import json
import os

import torch

import made_of
from checkpoints import checksum, read_checkpoint, write_file, write_text
from config import as_yaml
from distributed import Team, all_sum


class RunFolder:
    """runs/<config name>/<stage>, locked while this process lives.

    `settings`: what the stage's result depends on (`made_of.settings_of`). `source`: where its input is
    looked for, (setting, earlier stage). Raises ValueError, on every process, if something was made here with
    other settings or from another input (each is named), if another run uses the folder, or if it cannot be
    written. `finished`: there is nothing left to do.
    """

    def __init__(self, stage: str, config, team: Team, settings: dict, source: tuple[str, str] | None = None):
        self.folder, self.team, self.config, self.damaged = config.folder(stage), team, config, False
        self.record = {"stage": stage, "settings": settings, "input": None, "base": config.run.base}
        if source:
            self.record["input"] = {"setting": source[0], "stage": source[1]}
        problem = ""
        if team.rank == 0:
            try:
                self._open()
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = team.agree(problem)
        if problem:
            raise ValueError(problem)
        self.finished = team.agree(made_of.finished(self.folder))

    def _open(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written ({error.strerror}); "
                             "choose another place with --set run.out=...") from None
        try:
            # The system lets go of the lock however the process ends.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{self.folder}: another run is writing here; "
                                 "wait for it, or choose another --set run.name=...") from None
            raise ValueError(f"{self.folder}: cannot be locked ({error.strerror}), so a second run could "
                             "write here too; choose another place with --set run.out=...") from None
        for leftover in self.folder.glob(".*.tmp*"):
            leftover.unlink()                                # half-written files of a killed run
        if made_of.begun(self.folder):
            made_of.check(self.folder, self.config)

    def remember(self, data, origin: dict | None):
        """Write what the result will be made of: the data read, and the record of the input. Rank 0 only."""
        self.record = {**self.record, "data": data, "from": origin}
        if self.team.rank == 0:
            write_text(self.folder / "config.yaml", as_yaml(self.config))
            write_text(self.folder / "made_of.json", json.dumps(self.record, indent=1))

    def log(self, row: dict):
        """Add one row to log.csv, whole or not at all. The first row fixes the columns."""
        if self.team.rank == 0:
            path = self.folder / "log.csv"
            text = path.read_text() if path.exists() else ",".join(row) + "\n"
            values = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()]
            write_text(path, text + ",".join(values) + "\n")

    def last_row(self, column: str) -> float:
        """A number of the last row of log.csv."""
        header, *rows = (self.folder / "log.csv").read_text().splitlines()
        return float(rows[-1].split(",")[header.split(",").index(column)])

    def cut_log(self, epoch: int):
        """Drop the rows from `epoch` on (counted from 1): a run that goes on writes them again."""
        path = self.folder / "log.csv"
        if self.team.rank == 0 and path.exists():
            header, *rows = path.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",")[0]) < epoch]
            write_text(path, "".join(f"{line}\n" for line in [header, *kept]))

    def write(self, name: str, state: dict):
        """Write a checkpoint, whole or not at all; an earlier last.pt becomes previous.pt. Rank 0 only."""
        if self.team.rank == 0:
            path = self.folder / name
            write_file(self.folder / "new.pt", lambda file: torch.save(state, file))
            if name == "last.pt" and path.exists() and not self.damaged:
                os.replace(path, self.folder / "previous.pt")
            os.replace(self.folder / "new.pt", path)
            self.damaged = self.damaged and name != "last.pt"

    def resume(self, data: dict) -> dict | None:
        """The last whole checkpoint; None before the first. A damaged one is named, the one before it used.

        `data`: what there is to train on; a checkpoint holds the same in its record. Raises ValueError if
        all checkpoints are damaged (someone should know before weeks of work begin again), and if `data` has
        changed since or is not what rank 0 found, as when a disk is not mounted.
        """
        self.same_on_all_machines(data)
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if not self.team.agree(path.exists()):
                continue
            checkpoint, problem = None, ""
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                problem = str(error)
            unread = all_sum(torch.tensor(float(problem != "")))            # on how many processes
            if unread:
                problem = problem or f"{path}: not every process can read it"
                self.team.say(f"warning: {problem}; trying the one before")
                self.damaged = True                                         # not worth keeping as previous.pt
            else:
                self.refuse_other_data(data, checkpoint.get("made_of", {}).get("data", {}))
                return checkpoint
        if self.damaged:
            raise ValueError(f"{self.folder}: no checkpoint here is whole; put a copy in its place, or begin "
                             f"{made_of.other_run(self.config)}")
        return None

    def same_on_all_machines(self, data: dict):
        """Raises ValueError if `data` is not what rank 0 found."""
        first = self.team.agree(data)
        if first != data:
            raise ValueError("this machine has other data than the first one:"
                             + changes(first, data, "there", "here"))

    def refuse_other_data(self, now: dict, before: dict | None = None):
        """Raises ValueError, naming each change, if the result began with other data than there is now.
        `before`: by default what the record in the folder says."""
        if before is None:
            before = made_of.read_record(self.folder)["data"]
        if before != now:
            raise ValueError(f"{self.folder} was made from other data:{changes(before, now, 'was', 'now')}\n"
                             "two ways on: bring back what it began with, or begin "
                             f"{made_of.other_run(self.config)}")

    def still_finished(self, data: dict) -> bool:
        """Is there nothing left to do? Says so. Raises ValueError if a finished result was made from other
        data than there is now, or if its weights are gone."""
        if self.finished:
            self.refuse_other_data(data)
            made_of.there(self.folder / made_of.read_record(self.folder)["checkpoint"], self.config)
            self.team.say(f"{self.folder} is finished; nothing to do")
        return self.finished

    def finish(self, metrics: dict):
        """Write metrics.json, which marks the stage as finished, before any process goes on.

        The record gets the checksum of the weights that later stages read.
        """
        if self.team.rank == 0:
            names = [name for name in ("best.pt", "last.pt") if (self.folder / name).exists()]
            if names:
                self.record |= {"checkpoint": names[0], "checksum": checksum(self.folder / names[0])}
            write_text(self.folder / "made_of.json", json.dumps(self.record, indent=1))
            write_text(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        self.team.wait()


def changes(before: dict, now: dict, then_word: str, now_word: str) -> str:
    """A line for each entry in which two descriptions of data differ."""
    lines = ""
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        if a != b and isinstance(a, list) and isinstance(b, list):         # of videos
            gone, new = sorted(set(a) - set(b)), sorted(set(b) - set(a))
            lines += f"\n  {name}: {len(gone)} fewer {gone[:5]}, {len(new)} more {new[:5]}"
        elif a != b:
            lines += f"\n  {name}: {then_word} {a}, {now_word} {b}"
    return lines
