"""A table that is written piece by piece and survives a kill: what predict.py writes.

The rows of a part (a video) lie in OUT.parts/<number>, whole or not there, until all parts are made. Then
they are joined to OUT. OUT.json tells from the beginning what the table is made of, so that the same command
goes on with it, and another one is refused.
"""

import csv
import io
import json
import os
import shutil
from pathlib import Path

from checkpoints import read_json, write_file, write_text
from run_folder import changes


class Table:
    """CSV, or JSON lines where the name `path` ends in .jsonl. `record`: what it is made of, as JSON can hold
    it; the entries "file" of its dictionaries are not compared.

    Raises ValueError, on every process, if there is a table, or the beginning of one, that is made of
    something else, or that nothing tells about. `finished`: there is nothing left to do.
    """

    def __init__(self, path, header: list[str], record: dict, team):
        self.path, self.header, self.team = Path(path), header, team
        self.json = self.path.suffix == ".jsonl"
        self.folder, self.record = Path(f"{path}.parts"), Path(f"{path}.json")
        self.made_of = json.loads(json.dumps(record))
        problem = ""
        if team.rank == 0:
            try:
                self.open(self.made_of)
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = team.agree(problem)
        if problem:
            raise ValueError(problem)
        self.finished = team.agree(self.path.exists())

    def open(self, now: dict):
        before = read_json(self.record)
        if before is None and (self.path.exists() or self.folder.exists()):
            there = self.path if self.path.exists() else self.folder
            raise ValueError(f"{there} exists, and no {self.record} tells what it was made of; delete it, or "
                             "give another --out")
        if before is not None and without_paths(before) != without_paths(now):
            raise ValueError(f"{self.path} was made, or begun, with something else:"
                             f"{changes(without_paths(before), without_paths(now), 'was', 'now')}\n"
                             f"give another --out, or delete {self.record}, {self.folder} and {self.path}")
        if self.path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)         # a kill came after the table was whole
        else:
            write_text(self.record, json.dumps(now, indent=1))
            self.folder.mkdir(exist_ok=True)
            for leftover in self.folder.glob(".*.tmp"):            # half-written files of a killed run
                leftover.unlink()

    def part(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def write(self, number: int, rows):
        """The rows of one part, lists of text, whole numbers, floats and None, one after the other."""
        write_file(self.part(number), lambda file: self.write_rows(file, rows))

    def write_rows(self, file, rows):
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        for row in rows:
            if self.json:
                row = [round(value, 6) if isinstance(value, float) else value for value in row]
                text.write(json.dumps(dict(zip(self.header, row))) + "\n")
            else:
                table.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in row])
        text.flush()
        text.detach()                                              # `file` stays open, for `write_file`

    def join(self, count: int):
        """The finished table, from its `count` parts. Rank 0 only."""
        def write(file):
            if not self.json:
                self.write_rows(file, [self.header])
            for number in range(count):
                with open(self.part(number), "rb") as part:
                    shutil.copyfileobj(part, file)
        if self.team.rank == 0:
            write_file(self.folder / "whole", write)
            os.replace(self.folder / "whole", self.path)
            shutil.rmtree(self.folder)

    def read(self):
        """Yield the rows of the finished table, as lists in the order of the header: of CSV as text, of JSON
        lines as they were written. Raises ValueError if it is something else."""
        with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            try:
                rows = (list(json.loads(line).values()) for line in file) if self.json else csv.reader(file)
                if not self.json and next(rows, None) != self.header:
                    raise ValueError("its first line does not name the columns")
                yield from rows
            except (ValueError, AttributeError, csv.Error) as error:
                raise ValueError(f"{self.path}: not the table that was made ({error}); put a copy back, or "
                                 f"delete it and {self.record}") from None


def beside_a_table(folder: Path) -> bool:
    """Does this folder, or one above it, hold the parts or the pictures of a table?"""
    return any(path.suffix in (".parts", ".pictures") and path.with_suffix(".json").exists()
               for path in (folder, *folder.parents))


def without_paths(record: dict) -> dict:
    """A checkpoint may be moved: its checksum tells whether it is the same."""
    return {name: {k: v for k, v in entry.items() if k != "file"} if isinstance(entry, dict) else entry
            for name, entry in record.items()}
