"""Submissions: each row of a template against its own frame's values, from a table and from a run; and the
checker, against files that are right and broken ones."""

import dataclasses
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import scoring
import tiny
from datasets.s_aff_wild2 import HEADER
from engine.config import load
from engine.distributed import Team
from files import ROOT, run_without, write
from labels import TASKS, VA, in_units, smoothed
from pipeline import given_record
from temporal import SegmentModel
from tools.predictions import header_of
from tools.submission import check, main, matched, read_template

TABLE = "video,frame,valence,arousal"
NAMED = {name: [task] for name, task in TASKS.items()} | {"mtl": list(TASKS.values())}     # what --task names
of_each_task = pytest.mark.parametrize("tasks", NAMED.values(), ids=NAMED)


def names_of(video, *frames):
    return [f"{video}/{frame:05d}.jpg" for frame in frames]


def start(folder, task, **options):
    """The command's main, with what it is given. -> the lines of the submission"""
    given = {"task": task, "template": folder / "t.txt", "out": folder / "p.txt", "check": "", "smooth": 0}
    options = Namespace(**given | {"predictions": "", "config": folder / "tiny.yaml", "set": []} | options)
    print(*main(options), sep="\n")
    return Path(options.out).read_text().splitlines()


# ---- From a table

@pytest.mark.parametrize("seed", range(10))
def test_any_template_gets_what_a_plain_search_for_each_frame_gives(tmp_path, seed):
    """Valence is the frame / 1000, arousal the video's place / 10; the table has gaps, the template too."""
    rng, names = np.random.default_rng(seed), []
    videos = ["2-30", "2-30_left", "2-30_right", "2-30-2", "2.30", "2.31", "video86_3", "left", "_right"]
    known = {video: sorted(rng.choice(30, rng.integers(1, 20), replace=False) + 1) for video in videos}
    for video in videos:
        names += names_of(video, *rng.choice(40, 5, replace=False))            # some copies count from 0
    names = [names[i] for i in rng.permutation(len(names))]
    write(tmp_path / "t.txt", header_of(VA), *(f"{name}," for name in names))
    write(tmp_path / "table.csv", TABLE,
        *(f"{video},{t},{t / 1000},{k / 10}" for k, video in enumerate(videos) for t in known[video]))
    top, *lines = start(tmp_path, "va", predictions=tmp_path / "table.csv")
    for line, name in zip(lines, names, strict=True):
        own, number = name.split("/")[0], int(name.split("/")[1][:5])
        frame = max((n for n in known[own] if n <= number), default=known[own][0])
        assert line == f"{name},{frame / 1000:.6f},{videos.index(own) / 10:.6f}"
    assert top == header_of(VA)


def test_what_is_not_as_usual_is_counted_and_said(tmp_path, capsys):
    names = names_of("a", 2, 1, 2, 9, 8) + names_of("b", 1, 5) + names_of("gone", 1, 2, 3)
    write(tmp_path / "t.txt", *names)
    write(tmp_path / "table.csv", TABLE, "a,1,2,0", "a,2,0,-3", "b,1,0,0")
    lines = start(tmp_path, "va", predictions=tmp_path / "table.csv")
    assert [line.split(",")[0] for line in lines[1:]] == names
    assert lines[1] == lines[3] == "a/00002.jpg,0.000000,-1.000000"
    assert lines[-1] == "gone/00003.jpg,0.000000,0.000000"
    assert capsys.readouterr().out.replace(f"{tmp_path}/", "") == """\
values of va from table.csv
  neutral values, because no face is known: 3 rows of gone (3)
  after a video's last frame, with its values: 3 rows of a (2), b (1)
p.txt is right: 10 rows of 3 videos, in the order of t.txt
"""


def test_a_video_is_found_by_its_whole_name_first_then_by_its_last_part():
    known = ["a/1", "1", "b/2", "3_left"]
    assert matched(["1", "a/1", "2", "c/3_left", "3", "3_right"], known, "t.csv") == {
        "1": "1", "a/1": "a/1", "2": "b/2", "c/3_left": "3_left"}
    with pytest.raises(ValueError, match="t.csv: the template's c/1 may be a/1 or 1, and"):
        matched(["c/1"], known, "t.csv")
    with pytest.raises(ValueError, match="t.csv: the template's c/2 may be b/2, and each may be"):
        matched(["2", "c/2"], known, "t.csv")


@pytest.mark.parametrize("options, message", [
    ({"out": ""}, "give either --out or --check"), ({"check": "b.txt"}, "give either --out or --check"),
    ({"smooth": -1}, "--smooth 0 or more"),
    ({"template": "other.txt"}, "none of its videos, 137, has values in table.csv"),
    ({"out": "t.txt"}, "--out: t.txt exists and is no submission"),
    ({"out": "notes.txt"}, "notes.txt exists and is no submission of --task va; delete it")])
def test_nothing_is_written_where_it_should_not_be(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "table.csv", TABLE, "9,1,0,0")
    write(tmp_path / "t.txt", header_of(VA), "9/1.jpg,0,0"), write(tmp_path / "other.txt", "137/1.jpg")
    write(tmp_path / "notes.txt", "my notes")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        start(Path(), "va", **{"predictions": "table.csv"} | options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_submission_is_made_again_whole_and_a_kill_leaves_the_former_one(tmp_path, monkeypatch):
    write(tmp_path / "table.csv", TABLE, "9,1,0,0"), write(tmp_path / "t.txt", "9/1.jpg")
    for content in (f"{header_of(VA)}\nold/00001.jpg,-5,-5\n", ""):
        (tmp_path / "p.txt").write_text(content)
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(Path, "replace", None)                               # the last step of writing
            start(tmp_path, "va", predictions=tmp_path / "table.csv")
        assert (tmp_path / "p.txt").read_text() == content
        made = start(tmp_path, "va", predictions=tmp_path / "table.csv")
        assert made == [header_of(VA), "9/1.jpg,0.000000,0.000000"] and len(list(tmp_path.iterdir())) == 3


# ---- From a run

@pytest.fixture
def run(tmp_path):
    """Three tasks with random weights, features made elsewhere, and a template. -> the configuration"""
    tiny.write(tmp_path, task={"features": f"{tmp_path}/features"}, run={"out": str(tmp_path)})
    config, rng = load(tmp_path / "tiny.yaml"), np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    for video, frames in (("1", 45), ("2_left", 7)):
        np.save(tmp_path / f"features/{video}.npy", rng.normal(size=(frames, 6)).astype(np.float16))
    names = [*names_of("1", *range(1, 48)), *names_of("a/2_left", 7, 1), "3/1.jpg", "4/1.jpg"]
    write(tmp_path / "t.txt", *names)
    for task in TASKS.values():
        folder = tmp_path / f"tiny/task_{task.name}"
        folder.mkdir(parents=True)
        model = SegmentModel(6, len(task.outputs), **dataclasses.asdict(config.temporal))
        record = {"stage": f"task_{task.name}", "from": given_record(tmp_path / "features")}
        torch.save({"model": model.state_dict(), "made_of": record}, folder / "best.pt")
        (folder / "metrics.json").write_text("{}")
    return config


@pytest.mark.parametrize("name, smooth", [*[(name, 0) for name in NAMED], ("va", 3)])
def test_each_row_is_what_the_trained_tasks_make_of_the_videos_features(run, tmp_path, name, smooth, capsys):
    top, *lines = start(tmp_path, name, smooth=smooth)
    said, expected = capsys.readouterr().out, [[] for _ in lines]
    assert top == (HEADER if name == "mtl" else header_of(TASKS[name])) and "3 rows" not in said
    for task in NAMED[name]:
        path, rows = tmp_path / f"tiny/task_{task.name}/best.pt", []
        trained = scoring.load(path, run, task, Team(0, 1, torch.device("cpu")))   # test_scoring.py
        for video, frames in (("1", [*range(45), 44, 44]), ("2_left", [6, 0])):
            outputs = trained.predict(np.load(tmp_path / f"features/{video}.npy").astype(np.float32))
            rows += list(smoothed(in_units(outputs, task), smooth)[frames])
        for line, row in zip(expected, [*rows, *np.zeros((2, len(task.outputs)))], strict=True):
            line += {"va": [*row.clip(-1, 1)], "expr": [row.argmax()], "au": [*(row > 0.5) * 1]}[task.name]
        assert f"values of {task.name} from {path} on the features in {tmp_path}/features" in said
    for line, values in zip(lines, expected, strict=True):
        assert np.array(line.split(",")[1:], float) == pytest.approx(np.array(values), abs=2e-6)


def test_a_run_that_is_not_finished_or_has_other_features_is_refused(run, tmp_path, monkeypatch):
    def refuse(path, record, origin):
        raise ValueError(f"{path}: trained on others than {origin['file']}")
    monkeypatch.setattr(scoring, "check_features", refuse)
    with pytest.raises(ValueError, match="best.pt: trained on others than .*/features"):
        start(tmp_path, "va")
    for name, state in (("metrics.json", "is of a stage that has not ended; go on"),
                        ("best.pt", "not found; make it")):
        (tmp_path / "tiny/task_va" / name).unlink()
        with pytest.raises(ValueError, match=f"task_va/best.pt {state} with: python .*train_task.py --task"):
            start(tmp_path, "va")
    assert not (tmp_path / "p.txt").exists()


# ---- Templates, and files that are right

@of_each_task
def test_both_kinds_of_template_with_any_line_ends_are_read_alike(tmp_path, tasks):
    width, top = sum(task.width for task in tasks), header_of(*tasks)
    tops = [top], [f"{top.partition(',')[0]},"], [top.upper()], ["image,au1,"][:len(tasks) - 1], []
    names = ["image/1.2_left/00002.png", "1.2_left/00001.JPG", "image/7/00001.jpg", "video86_3/00010.jpg"]
    for tail in (",0" * width, ",", "", ",-5" * width):
        for top in tops:
            for end, mark in (("\n", ""), ("\r\n", "\ufeff")):
                text = mark + end.join([*top, *(name + tail for name in names), "", ""])
                (tmp_path / "t.txt").write_bytes(text.encode())
                assert read_template(tmp_path / "t.txt", *tasks) == names


@pytest.mark.parametrize("lines, message", [
    ([header_of(VA)], "no rows; expected a line for each frame"),
    (["136/1.jpg" + ",-1" * 12], "line 1: '136/1.jpg,.* with 2 dummy values or none, below"),
    (["136/1.jpg", "image_location,", "2/1.jpg"], "line 2: 'image_location,', expected a frame")])
def test_a_broken_template_is_refused_with_its_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_template(write(tmp_path / "t.txt", *lines), VA)


NAMES = [*names_of("1-30-1280x720", 1, 2, 3, 6, 7), *names_of("video86_3_left", 2, 3),
         *names_of("video86_3_right", 1, 3), *names_of("2.5", 4, 1)]


def right(tasks, names=NAMES) -> list[str]:
    """The lines of a submission that is right, each row with other values."""
    value = {"va": lambda i: f"{i / 20:.6f},{-i / 20:.6f}", "expr": lambda i: f"{i % 8}",
             "au": lambda i: ",".join(f"{i:012b}")}
    return [header_of(*tasks), *(",".join([name, *[value[task.name](i) for task in tasks]])
                                 for i, name in enumerate(names))]


def told(folder, tasks, lines, names=NAMES, end="\n"):
    """What the checker says of these lines, the first of which is line 1."""
    write(folder / "t.txt", header_of(*tasks), *(f"{name}," for name in names))
    return check(write(folder / "p.txt", *lines, end=end), folder / "t.txt", *tasks).replace(f"{folder}/", "")


@of_each_task
def test_a_submission_that_is_right_is_called_so_in_any_order_of_the_template(tmp_path, tasks):
    for names in (NAMES, NAMES[::-1], [*NAMES, NAMES[2]]):
        for end in ("\n", "\r\n"):
            assert told(tmp_path, tasks, [*right(tasks, names), "", " "], names, end) == (
                f"p.txt is right: {len(names)} rows of 4 videos, in the order of t.txt")


# ---- Broken submissions

REST = {"va": ["", ",0.5", ",0,0,", ",0.1,-5.0", ",0,happy", ",0_1,0", ",nan,0", ",0,-1.0001"],
        "expr": [",-1", ",8", ",1.0", ",1_0", ",0" * 8, ","], "au": [",0" * 11 + ",.7", ",0" * 11, ",0" * 13],
        "mtl": [",0" * 14, ",0" * 16, ",0,0,8" + ",0" * 12, ",0" * 14 + ",2", ",-5,-5" + ",-1" * 13, ""]}
ROWS = {f"{name} {rest}": (name, [*lines[:5], NAMES[4] + rest, *lines[6:]], 6, 0)
        for name, each in REST.items() for lines in [right(NAMED[name])] for rest in each}
GOOD = right([VA])
TOP, ROW_4 = GOOD[0], GOOD[3]
BROKEN = {                                       # task, lines, the first wrong one, how many more are wrong
    "no header": ("va", GOOD[1:], 1, 11), "an empty file": ("va", [], 1, 11),
    "a byte-order mark": ("va", ["\ufeff" + TOP, *GOOD[1:]], 1, 0),
    "a blank line on top": ("va", ["", *GOOD], 1, 12), "a row after the end": ("va", [*GOOD, ROW_4], 13, 0),
    "too few zeros": ("va", [TOP, GOOD[1].replace("00001", "1"), *GOOD[2:]], 2, 0),
    "a row twice": ("va", [*GOOD[:9], ROW_4, *GOOD[9:]], 10, 3), "the end missing": ("va", GOOD[:9], 10, 2),
    "several": ("va", [*GOOD[:2], NAMES[1] + ",-5,-5", ROW_4, GOOD[4], NAMES[4] + ",x,0", *GOOD[6:11]], 3, 2)}


@pytest.mark.parametrize("name, lines, line, more", (ROWS | BROKEN).values(), ids=ROWS | BROKEN)
def test_a_broken_submission_is_refused_with_its_first_wrong_line(tmp_path, name, lines, line, more):
    found, tasks = repr(lines[line - 1][:80]) if line <= len(lines) else "the file ends", NAMED[name]
    a_row = ", ".join(task.a_row for task in tasks)
    wanted = [repr(header_of(*tasks)), *(f"{name!r} and {a_row}" for name in NAMES), "the file's end"]
    with pytest.raises(ValueError) as refusal:
        told(tmp_path, tasks, lines)
    assert str(refusal.value) == (
        f"{tmp_path}/p.txt, line {line}: {found}, expected {wanted[line - 1]}\n"
        f"  more lines that are wrong or out of place: {more} of {len(lines)}")


# ---- The command, where torch is not installed

def test_writing_from_a_table_and_checking_need_no_torch_and_no_configuration(tmp_path):
    called = partial(run_without, "torch", tmp_path, "tools.submission", "--task", "va", "--template=t.txt")
    write(tmp_path / "t.txt", "9/1.jpg", "9/2.jpg"), write(tmp_path / "table.csv", TABLE, "9,1,0,0")
    code, out, err = called("--out", "p.txt", "--predictions", "table.csv")
    assert (code, err) == (0, "") and "p.txt is right: 2 rows of 1 videos" in out
    write(tmp_path / "p.txt", *(tmp_path / "p.txt").read_text().splitlines()[:-1])
    code, out, err = called("--check", "p.txt")
    assert (code, out) == (2, "") and "error: p.txt, line 3: the file ends, expected" in err
    code, out, err = called("--out", "q.txt", "--config", ROOT / "configs/demo.yaml")
    assert (code, out) == (2, "") and err.startswith("error: the values of a run need torch")
