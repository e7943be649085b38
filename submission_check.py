"""Is a submission right? Each line against the template: header, count, order, names, numbers. NumPy only.

A line that is wrong in several ways is counted once, under the first of FAULTS that applies. Each line is
looked up by its name, so a row that is missing does not make those after it wrong.
"""

import math
from array import array

import numpy as np

from labels import Task
from submission_file import Template, header, numbered_lines, split_name, task_of

FAULTS = ("", "with a wrong number of fields", "not in the template", "that come again",
          "in a wrong place", "left at -5 or -1", "with text for a number", "with NaN or infinity",
          "out of range")
FINE, FIELDS, NAME, AGAIN, PLACE, LEFT, TEXT, NOT_FINITE, RANGE = range(len(FAULTS))
HEADER, MISSING, ROW = range(3)        # what is told first, if several are wrong in one line


# ---- One line by itself

def fault_of(values: list[str], task: Task) -> int:
    """What is wrong with the values of a row: one of FAULTS."""
    whole = task.whole_numbers
    for text in values:
        try:
            value = float(text)
        except ValueError:
            return TEXT
        plain = "_" not in text and (not whole or text.strip().lstrip("+-").isdecimal())    # not 1_0 or 1.0
        if plain and task.lowest <= value <= task.highest:
            continue
        if not math.isfinite(value):
            return NOT_FINITE
        if value in (-5, task.invalid):
            return LEFT
        return RANGE if plain else TEXT
    return FINE


def described(fault: int, line: str, template: Template, task: Task) -> str:
    """What is wrong with a line, in words."""
    start = line[:80]
    if fault == FIELDS:
        number = "1 number" if task.one_class else f"{task.width} numbers"
        return f"{line.count(',') + 1} fields {start!r}, expected {task.width + 1}: the frame and {number}"
    if fault == NAME:
        try:
            video, _ = split_name(line.partition(",")[0])
        except ValueError as error:
            return str(error)
        what = "frame" if video in template.videos else "video"
        return f"{start!r}; the template has no such {what}"
    kind = "a whole number" if task.whole_numbers else "a number"
    left = ", as in a template or a label file" if fault == LEFT else ""
    return f"{start!r}{left}; expected {kind} from {task.lowest} to {task.highest}"


def read_rows(lines, template: Template, task: Task):
    """The rows of a submission. -> the template's row of each, -1 if it has none, (n,); what is wrong with
    each by itself (n,); {fault: its first line described}; whether all rows have the same values."""
    rows, faults, first_of, values_of_first, alike = array("q"), array("b"), {}, None, True
    again = {name: iter(places) for name, places in template.again.items()}
    plain = set(map(str, range(task.lowest, task.highest + 1))) if task.whole_numbers else set()
    for _, line in lines:
        name, *values = line.split(",")
        row = template.rows.get(name, -1)
        if name in again:                                      # its next row, if there is one
            row = next(again[name], row)
        if len(values) != task.width:
            fault = FIELDS
        elif row < 0:
            fault = NAME
        elif plain.issuperset(values):                         # at once, because most lines are like this
            fault = FINE
        else:
            fault = fault_of(values, task)
        if fault and fault not in first_of:
            first_of[fault] = described(fault, line, template, task)
        rows.append(row)
        faults.append(fault)
        values_of_first = values_of_first or values
        alike = alike and values == values_of_first
    return np.array(rows, np.int64), np.array(faults, np.int8), first_of, alike


# ---- All lines together

def mark(rows: np.ndarray, faults: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mark in `faults` (n,) the lines that come again and those in a wrong place. rows: the template's row of
    each line, -1 if it has none, (n,). -> the rows that are there, in the template's order, and the lines in
    which they should stand; both (m,), lines counted from 0."""
    known = np.flatnonzero(rows >= 0)
    there, first = np.unique(rows[known], return_index=True)   # `first` in `known`: where each comes first
    places = np.sort(known[first])
    again = np.setdiff1d(known, places)
    moved = places[rows[places] != there]
    for lines, fault in ((again, AGAIN), (moved, PLACE)):
        faults[lines] = np.where(faults[lines] == FIELDS, FIELDS, fault)
    return there, places


def check(path, template: Template, task: Task) -> str:
    """One sentence about a submission that is right.

    Raises ValueError about one that is not: its first wrong line, how many more are wrong and how, and how
    many rows are missing.
    """
    lines = numbered_lines(path)
    _, top = next(lines, (1, ""))
    first_line, wrong = 2, []                                  # wrong: (line, what, in words)
    if top != header(task):
        other = task_of(top)
        of = f", that of --task {other.name}" if other not in (None, task) else ""
        wrong.append((1, HEADER, f"the header is {top[:80]!r}{of}, expected {header(task)!r}"))
        if top.partition(",")[0] in template.rows:             # it has no header: line 1 is a row
            first_line, lines = 1, numbered_lines(path)
    rows, faults, first_of, alike = read_rows(lines, template, task)
    there, places = mark(rows, faults)

    missing = np.setdiff1d(np.arange(len(template.names)), there)
    if len(missing):
        later = np.flatnonzero(rows > missing[0])
        place, end = (later[0], "") if len(later) else (len(rows), "; the file ends here")
        wrong.append((first_line + place, MISSING, f"{template.names[missing[0]]!r} is missing, line "
                      f"{template.first_line + missing[0]} of {template.path}{end}"))
    bad = np.flatnonzero(faults)
    if len(bad):
        i = bad[0]
        if faults[i] == AGAIN:
            before = first_line + np.flatnonzero(rows == rows[i])[0]
            said = f"{template.names[rows[i]]!r} comes again; it is in line {before}, too"
        elif faults[i] == PLACE:
            expected = template.names[there[np.searchsorted(places, i)]]
            said = f"{template.names[rows[i]]!r} is in a wrong place; expected {expected!r}"
        else:
            said = first_of[faults[i]]
        wrong.append((first_line + i, ROW, said))
    if wrong:
        line, what, said = min(wrong)
        if what == ROW:
            faults[bad[0]] = FINE                              # so that only the others are counted
        raise ValueError(f"{path}, line {line}: {said}{counted(faults, len(missing) - (what == MISSING))}")
    same = "; all have the same values" if alike and len(rows) > 1 else ""
    return f"{path} is right: {template.size()}, in the order of {template.path}{same}"


def counted(faults, missing: int) -> str:
    """Lines that count wrong rows, by what is wrong with them, and missing ones."""
    counts = np.bincount(faults, minlength=len(FAULTS))
    total, lines = int(counts[1:].sum()), []
    if total:
        each = ", ".join(f"{count:,} {text}" for count, text in zip(counts[1:], FAULTS[1:]) if count)
        lines.append(f"\n  {total:,} more wrong line{'s' if total > 1 else ''}: {each}")
    if missing:
        lines.append(f"\n  {missing:,} more row{'s' if missing > 1 else ''} of the template missing")
    return "".join(lines)
