"""The folder of a stage's result: runs/<config name>/<stage>, with its settings, log and checkpoints.

A folder is used by one run at a time, is not mixed with other settings or other data, and is never left
half-written:

    config.yaml, settings.json    all settings; those that the result depends on
    log.csv                       a row per epoch
    last.pt, previous.pt          what a stopped run goes on from, and the one before it
    best.pt                       the weights of the best epoch
    metrics.json                  the result, written last: its presence marks the stage as finished
"""

import dataclasses
import errno
import fcntl
import json
import os

import torch

from checkpoints import read_checkpoint, write_file, write_text
from config import as_yaml
from distributed import Team, all_sum


def settings_of(config, *names) -> dict:
    """{"task.lr": 3e-5, ...} of sections or single "section.field"s: what a stage's result depends on."""
    flat = {}
    for section, fields in dataclasses.asdict(config).items():
        for field, value in fields.items():
            if section in names or f"{section}.{field}" in names:
                flat[f"{section}.{field}"] = value
    return flat


def missing(path, command: str, config) -> ValueError:
    """The refusal of a stage whose input is not there: names it, and the command that makes it."""
    return ValueError(f"{path} not found; make it with: {command} --config {config.run.source}")


class RunFolder:
    """runs/<config name>/<stage>, locked while this process lives.

    `settings`: what the stage's result depends on. Raises ValueError, on every process, if the folder was
    made with other settings (each is named), if another run uses it, or if it cannot be written.
    `finished`: there is nothing left to do.
    """

    def __init__(self, stage: str, config, team: Team, settings: dict):
        self.folder, self.team, self.config, self.damaged = config.folder(stage), team, config, False
        problem = ""
        if team.rank == 0:
            try:
                self._open(settings)
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = team.agree(problem)
        if problem:
            raise ValueError(problem)
        self.finished = team.agree((self.folder / "metrics.json").exists())

    def _open(self, settings):
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
        settings = json.loads(json.dumps(settings))          # as they will be read back: lists, not tuples
        known = self.folder / "settings.json"
        before = json.loads(known.read_text()) if known.exists() else settings
        names = sorted(before.keys() | settings.keys())
        changed = "".join(f"\n  {name}: was {before.get(name)!r}, now {settings.get(name)!r}"
                          for name in names if before.get(name) != settings.get(name))
        if changed:
            raise ValueError(f"{self.folder} was made with other settings; "
                             f"choose another --set run.name=..., or delete it{changed}")
        if not (self.folder / "metrics.json").exists():      # a finished run is left as it is
            write_text(known, json.dumps(settings, indent=1))
            write_text(self.folder / "config.yaml", as_yaml(self.config))

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

        `data`: what there is to train on, in numbers; a checkpoint holds the same under the key `data`.
        Raises ValueError if all checkpoints are damaged (someone should know before weeks of work begin
        again), and if `data` has changed since or is not what rank 0 found, as when a disk is not mounted.
        """
        first = self.team.agree(data)
        if first != data:
            raise ValueError(f"this machine has other data than the first one: {data}, there {first}")
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
            elif checkpoint.get("data", {}) != data:
                raise ValueError(f"{self.folder}: began with {checkpoint.get('data', {})}, found now {data}; "
                                 "bring back what it began with, or choose another --set run.name=..., "
                                 "or delete the folder")
            else:
                return checkpoint
        if self.damaged:
            raise ValueError(f"{self.folder}: no checkpoint here is whole; put a copy in its place, "
                             "or delete the folder to start from the beginning")
        return None

    def finish(self, metrics: dict):
        """Write metrics.json, which marks the stage as finished, before any process goes on."""
        if self.team.rank == 0:
            write_text(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        self.team.wait()
