"""The checker of submissions: files that are right, and broken ones with the line that must be named."""

import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from labels import AU, EXPR, TASKS, VA
from submission_check import check
from submission_file import answers, header, read_template, write_rows
from tiny import ROOT

NAMES = [f"{video}/{frame:05d}.jpg" for video, frames in {
    "1-30-1280x720": (1, 2, 3, 6, 7), "video86_3_left": (2, 3), "video86_3_right": (1, 3), "2.5": (4, 1)
}.items() for frame in frames]
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def put(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def template_of(folder, task, names=NAMES):
    return read_template(put(folder / "template.txt", header(task), *(f"{name}," for name in names)), task)


def values(task, rng, frames):
    """Values in units, some of them out of range."""
    return rng.normal(0.2, 0.8, (frames, len(task.outputs)))


def right(folder, task, template):
    """The lines of a submission that is right, from random values."""
    rng, of_video = np.random.default_rng(0), {}
    for video in template.videos:
        of_video[video] = answers(values(task, rng, 9), task)[0]
    with open(folder / "right.txt", "wb") as file:
        write_rows(file, template, task, of_video)
    return (folder / "right.txt").read_text().splitlines()


def complaint(folder, task, lines, names=NAMES, ending="\n"):
    """What the checker says of these lines, the first of which is line 1."""
    (folder / "broken.txt").write_bytes("".join(line + ending for line in lines).encode())
    with pytest.raises(ValueError) as refusal:
        check(folder / "broken.txt", template_of(folder, task, names), task)
    start = f"{folder}/broken.txt, "
    assert str(refusal.value).startswith(start)
    return str(refusal.value).removeprefix(start).replace(f"{folder}/", "")


# ---- Files that are right

@of_each_task
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_what_is_written_is_right(tmp_path, task, ending):
    template = template_of(tmp_path, task)
    lines = right(tmp_path, task, template) + ["", " "]                           # blank lines at the end
    (tmp_path / "p.txt").write_bytes(ending.join(lines).encode())
    assert check(tmp_path / "p.txt", template, task) == (
        f"{tmp_path}/p.txt is right: 11 rows of 4 videos, in the order of {tmp_path}/template.txt")


@of_each_task
@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_for_a_template_in_any_order_is_right(tmp_path, task, seed):
    names = [NAMES[i] for i in np.random.default_rng(seed).permutation(len(NAMES))]
    template = template_of(tmp_path, task, names)
    put(tmp_path / "p.txt", *right(tmp_path, task, template))
    assert "is right: 11 rows" in check(tmp_path / "p.txt", template, task)


@pytest.mark.parametrize("task, row", [(VA, "-1,1"), (VA, " 0.5,+.5"), (VA, "1e-3,-0"), (EXPR, "7"),
                                       (EXPR, " 3 "), (AU, "0,1,0,1,0,1,0,1,0,1,0,1")])
def test_numbers_may_be_written_in_several_ways(tmp_path, task, row):
    template = template_of(tmp_path, task, NAMES[:1])
    assert check(put(tmp_path / "p.txt", header(task), f"{NAMES[0]},{row}"), template, task)


def test_equal_values_everywhere_are_remarked(tmp_path):
    rows = [f"{name},0" for name in NAMES]
    path = put(tmp_path / "p.txt", header(EXPR), *rows)
    assert check(path, template_of(tmp_path, EXPR), EXPR).endswith("; all have the same values")
    put(path, header(EXPR), *rows[:-1], f"{NAMES[-1]},1")
    assert "the same values" not in check(path, template_of(tmp_path, EXPR), EXPR)


def test_a_row_that_the_template_has_twice_is_wanted_twice(tmp_path):
    names = [*NAMES, NAMES[2]]
    template = template_of(tmp_path, VA, names)
    lines = right(tmp_path, VA, template)
    assert lines[3] == lines[-1]
    assert "12 rows" in check(put(tmp_path / "p.txt", *lines), template, VA)
    said = complaint(tmp_path, VA, lines[:-1], names)
    assert said.startswith(f"line 13: '{NAMES[2]}' is missing, line 13 of template.txt; the file ends here")
    said = complaint(tmp_path, VA, [*lines, lines[3]], names)
    assert said.startswith("line 14: '1-30-1280x720/00003.jpg' comes again; it is in line 4")


# ---- Files that are broken: what is done to the lines of a right one (lines[0] is line 1)

def replaced(line, old, new):
    def change(lines):
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)
    return change


def with_values(line, text):
    def change(lines):
        lines[line - 1] = lines[line - 1].split(",")[0] + text
    return change


def without(*numbers):
    def change(lines):
        for number in sorted(numbers, reverse=True):
            del lines[number - 1]
    return change


def swapped(a, b):
    def change(lines):
        lines[a - 1], lines[b - 1] = lines[b - 1], lines[a - 1]
    return change


def inserted(line, text=None, copy=0):
    def change(lines):
        lines.insert(line - 1, lines[copy - 1] if copy else text)
    return change


def both(*changes):
    def change(lines):
        for one in changes:
            one(lines)
    return change


def every(change, lines_from, lines_to):
    return both(*(change(line) for line in range(lines_from, lines_to + 1)))


HEADER = r"line 1: the header is "
BROKEN = {
    # the header
    "no header": (VA, without(1), HEADER + r"'1-30-1280x720/00001\.jpg,[^']*', expected '[a-z_,]+'$"),
    "the header of another task": (
        VA, replaced(1, "valence,arousal", ",".join(AU.outputs)), HEADER + ".*, that of --task au, "),
    "a header with a word missing": (VA, replaced(1, ",arousal", ""), HEADER + "'image_location,valence', e"),
    "an Expr header of two fields": (
        EXPR, replaced(1, ",".join(EXPR.outputs), "expression"),
        HEADER + r"'image_location,expression', expected 'image_location,Neutral,Anger,"),
    "a byte-order mark": (VA, replaced(1, "image", "\ufeffimage"), HEADER + r"'\\ufeffimage_location"),
    "a blank line on top": (VA, inserted(1, ""), HEADER + "''.*\n  1 more wrong line: 1 not in"),
    "an empty file": (VA, without(*range(1, 13)), HEADER + r"''.*\n  11 more rows of the template missing$"),
    # fields
    "a row with a value too few": (
        VA, with_values(4, ",0.5"), r"line 4: 2 fields '1-30-.*', expected 3: the frame and 2 numbers$"),
    "a semicolon for a comma": (
        VA, replaced(4, ",", ";"), r"line 4: 2 fields '1-30-.*\n  1 more row of the template missing$"),
    "an Expr row as wide as its header": (
        EXPR, with_values(5, ",0" * 8), r"line 5: 9 fields '1-30-.*', expected 2: the frame and 1 number$"),
    "a row that ends with a comma": (VA, with_values(3, ",0,0,"), r"line 3: 4 fields '.*,0,0,', expected 3"),
    "the template's own row": (AU, with_values(6, ","), r"line 6: 2 fields '.*,', expected 13: the frame"),
    "a blank line in the middle": (VA, inserted(7, ""), r"line 7: 1 fields '', expected 3"),
    # names
    "a video that the template does not have": (
        VA, replaced(7, "left", "top"),
        r"line 7: 'video86_3_top/00002\.jpg,.*'; the template has no such video\n  1 more row of the temp"),
    "a frame that the template does not list": (
        VA, replaced(9, "00001", "00002"), "line 9: 'video86_3_right/00002.*; the template has no such fr"),
    "a name with too few zeros": (VA, replaced(2, "00001", "1"), "line 2: .*the template has no such frame"),
    "a name with a blank": (VA, replaced(3, ".jpg", ".jpg "), r"line 3: .*jpg ' is no frame; expected a"),
    "a name without its video": (
        VA, every(lambda line: replaced(line, "1-30-1280x720/", ""), 2, 6),
        r"line 2: '00001\.jpg' is no frame; .*\n  4 more wrong lines: 4 not in the template\n  5 more rows "),
    "a number in place of a name": (EXPR, replaced(5, NAMES[3], "4"), r"line 5: '4' is no frame"),
    # count and order
    "a row twice": (
        VA, inserted(10, copy=4), r"line 10: '1-30-1280x720/00003\.jpg' comes again; it is in line 4, too$"),
    "a row twice, cut short": (
        VA, both(inserted(10, copy=4), with_values(10, ",0")), "line 10: 2 fields '1-30-1280x720/00003.jpg"),
    "rows missing near the start and at the end": (
        VA, without(4, 12), "line 4: '1-30-1280x720/00003.jpg' is missing, .*\n  1 more row of the template"),
    "a video twice": (
        EXPR, both(*(inserted(13, copy=line) for line in (6, 5, 4, 3, 2))),
        r"line 13: '1-30-1280x720/00001\.jpg' comes again; it is in line 2, too\n  4 more wrong lines: 4 "),
    "a row missing in the middle": (
        VA, without(5), r"line 5: '1-30-1280x720/00006\.jpg' is missing, line 5 of template\.txt$"),
    "the first row missing": (VA, without(2), r"line 2: '1-30-1280x720/00001\.jpg' is missing, line 2 of"),
    "the end missing": (
        VA, without(10, 11, 12),
        "line 10: 'video86_3_right/00003.jpg' is missing, line 10 of template.txt; the file ends here\n"
        "  2 more rows of the template missing$"),
    "two rows in each other's place": (
        VA, swapped(4, 8), r"line 4: 'video86_3_left/00003\.jpg' is in a wrong place; expected "
                           r"'1-30-1280x720/00003\.jpg'\n  1 more wrong line: 1 in a wrong place$"),
    "sorted, where the template is not": (
        VA, swapped(11, 12), r"line 11: '2\.5/00001\.jpg' is in a wrong place; expected '2\.5/00004\.jpg'"),
    "_left and _right in each other's place": (
        VA, both(swapped(7, 9), swapped(8, 10)),
        "line 7: 'video86_3_right/00001.*\n  3 more wrong lines: 3 in a wrong place$"),
    # values
    "a row left at -5": (VA, with_values(6, ",-5,-5"), "line 6: '.*,-5,-5', as in a template or a label"),
    "a frame that one number was forgotten of": (VA, with_values(6, ",0.1,-5.0"), r"line 6: .* -1 to 1$"),
    "an expression left at -1": (EXPR, with_values(3, ",-1"), r"line 3: .*,-1', as in .* number from 0 to 7"),
    "an expression left at -5": (EXPR, with_values(3, ",-5"), "line 3: .*,-5', as in a template or"),
    "action units left at -1": (AU, with_values(3, ",-1" * 12), "line 3: .*, as in a template or a label"),
    "text for a number": (VA, with_values(12, ",0,happy"), "line 12: '2.5/00001.jpg,0,happy'; expected a n"),
    "an empty value": (VA, with_values(12, ",0.1,"), r"line 12: .*; expected a number from -1 to 1"),
    "an expression by its name": (EXPR, with_values(2, ",Happiness"), "line 2: .*,Happiness'; expected a "),
    "an expression with a point": (EXPR, with_values(2, ",1.0"), "line 2: .*,1\\.0'; expected a whole"),
    "a probability for an action unit": (AU, with_values(7, ",0" * 11 + ",.7"), "line 7: .*; expected a "),
    "a number that only Python reads": (VA, with_values(7, ",0_1,0"), "line 7: .*,0_1,0'; expected a number"),
    "NaN": (VA, with_values(3, ",nan,0"), r"line 3: '.*,nan,0'; expected a number from -1 to 1$"),
    "infinity": (VA, with_values(3, ",0,-inf"), r"line 3: .*; expected a number from -1 to 1$"),
    "a little more than 1": (VA, with_values(8, ",1.0001,0"), "line 8: '.*,1.0001,0'; expected a number "),
    "a ninth expression": (EXPR, with_values(8, ",8"), "line 8: '.*,8'; expected a whole number from 0 to "),
    "an action unit of 2": (AU, with_values(8, ",0" * 11 + ",2"), "line 8: .*,2'; expected a whole number"),
    # several at once
    "several kinds": (
        VA, both(with_values(3, ",-5,-5"), with_values(4, ",x,0"), with_values(6, ",nan,0"),
                 with_values(5, ",2,0"), with_values(8, ",-5,0"), swapped(11, 12), replaced(10, ",", ",,")),
        r"line 3: .*\n  7 more wrong lines: 1 with a wrong number of fields, 2 in a wrong place, "
        "1 left at -5 or -1, 1 with text for a number, 1 with NaN or infinity, 1 out of range$"),
    "a missing row before a wrong one": (
        VA, both(with_values(8, ",7,7"), without(5)),
        r"line 5: '1-30-1280x720/00006\.jpg' is missing, .*\n  1 more wrong line: 1 out of range$"),
    "a wrong row before a missing one": (
        VA, both(with_values(3, ",7,7"), without(5)),
        r"line 3: .*\n  1 more row of the template missing$"),
}


@pytest.mark.parametrize("task, change, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_submission_is_refused_with_its_first_wrong_line(tmp_path, task, change, message):
    lines = right(tmp_path, task, template_of(tmp_path, task))
    change(lines)
    said = complaint(tmp_path, task, lines)
    assert re.match(message, said), said
    assert complaint(tmp_path, task, lines, ending="\r\n") == said


@of_each_task
@pytest.mark.parametrize("seed", range(20))
def test_one_change_anywhere_is_found_in_its_line_and_nothing_else_is_wrong(tmp_path, task, seed):
    rng, lines = np.random.default_rng(seed), right(tmp_path, task, template_of(tmp_path, task))
    line = int(rng.integers(2, len(lines) + 1))
    change = [with_values(line, ",-5" * task.width), with_values(line, ",x" * task.width),
              with_values(line, ",0" * (task.width + 1)), without(line),
              inserted(line, copy=line)][seed % 5]
    change(lines)
    found = line + 1 if seed % 5 == 4 else line
    said = complaint(tmp_path, task, lines)
    assert said.startswith(f"line {found}: ") and "more" not in said, said


@pytest.mark.parametrize("seed", range(5))
def test_rows_in_another_order_are_counted_as_a_list_would_count_them(tmp_path, seed):
    lines = right(tmp_path, VA, template_of(tmp_path, VA))
    order = np.random.default_rng(seed).permutation(len(NAMES))
    moved = [place for place, row in enumerate(order) if place != row]
    said = complaint(tmp_path, VA, [lines[0], *(lines[1 + row] for row in order)])
    first, count = moved[0], len(moved)
    assert said.startswith(f"line {2 + first}: '{NAMES[order[first]]}' is in a wrong place; "
                           f"expected '{NAMES[first]}'")
    assert f"\n  {count - 1} more wrong lines: {count - 1} in a wrong place" in said


# ---- The command

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_check_needs_no_torch_and_its_exit_code_tells(tmp_path):
    template_of(tmp_path, VA)
    lines = right(tmp_path, VA, template_of(tmp_path, VA))
    put(tmp_path / "broken.txt", *lines[:5], *lines[6:])
    command = [sys.executable, "-c", WITHOUT_TORCH, ROOT / "submission.py", "--task", "va", "--config",
               ROOT / "configs/demo.yaml", "--template", "template.txt", "--check"]
    ended = {name: subprocess.run([*command, name], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                                  capture_output=True, text=True) for name in ("right.txt", "broken.txt")}
    assert ended["right.txt"].returncode == 0
    assert ended["right.txt"].stdout == (
        "right.txt is right: 11 rows of 4 videos, in the order of template.txt\n")
    assert ended["broken.txt"].returncode == 2 and ended["broken.txt"].stdout == ""
    assert ended["broken.txt"].stderr == (
        "error: broken.txt, line 6: '1-30-1280x720/00007.jpg' is missing, line 6 of template.txt\n")


@pytest.mark.parametrize("options", [[], ["--out", "a.txt", "--check", "b.txt"]])
def test_writing_or_checking_must_be_chosen(tmp_path, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["submission.py", "--task", "va", "--template", "a", "--config",
                                      str(ROOT / "configs/demo.yaml"), *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "submission.py"), run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: give either --out, to write")
