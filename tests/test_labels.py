"""The records of the three tasks, and Aff-Wild2's label files: read as they stand, invalid codes marked."""

import runpy
import sys

import numpy as np
import pytest

import labels
import losses
from labels import AU, AUS, EXPR, EXPRESSIONS, TASKS, VA, read_labels, targets
from metrics import BINARY_F1, CCC, CLASS_F1

HEADER = {"va": "valence,arousal",
          "expr": "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other",
          "au": "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"}


def write(path, *lines, end="\n", bom=""):
    path.write_bytes((bom + end.join([*lines, ""])).encode())
    return path


# ---- The records

def test_the_records_have_the_headers_folders_codes_and_sizes_of_aff_wild2():
    assert {name: ",".join(task.outputs) for name, task in TASKS.items()} == HEADER
    assert [TASKS[task.name] for task in (VA, EXPR, AU)] == [VA, EXPR, AU] == list(TASKS.values())
    assert VA.folders == ("VA_Estimation_Challenge",) and AU.folders == ("AU_Detection_Challenge",)
    assert EXPR.folders == ("EXPR_Classification_Challenge", "EXPR_Recognition_Challenge")
    ranges = [(task.lowest, task.highest, task.invalid, task.dtype) for task in (VA, EXPR, AU)]
    assert ranges == [(-1, 1, -5, np.float32), (0, 7, -1, np.int8), (0, 1, -1, np.int8)]
    assert [task.one_class for task in (VA, EXPR, AU)] == [False, True, False]
    assert [len(task.outputs) for task in (VA, EXPR, AU)] == [2, 8, 12]
    assert [task.width for task in (VA, EXPR, AU)] == [2, 1, 12]
    assert EXPR.outputs == EXPRESSIONS and AU.outputs == tuple(f"AU{number}" for number in AUS)


def test_each_task_is_trained_with_its_loss_and_scored_with_its_metric():
    assert [task.loss for task in (VA, EXPR, AU)] == ["ccc_loss", "expr_loss", "au_loss"]
    assert all(hasattr(losses, task.loss) for task in TASKS.values())
    assert [task.metric for task in (VA, EXPR, AU)] == [CCC, CLASS_F1, BINARY_F1]
    assert [task.epochs for task in (VA, EXPR, AU)] == [40, 10, 30]


def test_the_numbers_to_compare_with_are_those_of_table_1():
    assert VA.paper["valence"] == (.5385, .6404, .4926, .5863, .5403)
    assert VA.paper["arousal"] == (.6224, .5651, .6015, .6812, .6342)
    assert VA.paper["mean"] == pytest.approx([.58045, .60275, .54705, .63375, .58725], abs=1e-12)
    assert EXPR.paper == {"mean": (.4561, .4478, .4463, .4583, .4506)}
    assert AU.paper == {"mean": (.5762, .5566, .5018, .5556, .5819)}
    assert VA.baseline == {"valence": .24, "arousal": .20, "mean": .22}
    assert EXPR.baseline == {"mean": .23} and AU.baseline == {"mean": .39}
    for task in TASKS.values():                              # each number belongs to a line of the table
        assert set(task.paper) == set(task.baseline) <= {*task.outputs, "mean"}


# ---- Label files

@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("tail", [(), ("", " ", "")], ids=["", "blank lines"])
@pytest.mark.parametrize("task, rows, expected, dtype", [
    (VA, ["0.5,-0.25", "-5,-5", "1,-1", "-5.0,0.125"], [[.5, -.25], [-5, -5], [1, -1], [-5, .125]],
     np.float32),
    (EXPR, ["0", "7", "-1", "3"], [0, 7, -1, 3], np.int8),
    (AU, ["0,1,0,1,0,1,0,1,0,1,0,1", ",".join(["-1"] * 12), "1,-1,0,0,0,0,0,0,0,0,0,0"],
     [[0, 1] * 6, [-1] * 12, [1, -1] + [0] * 10], np.int8)], ids=["va", "expr", "au"])
def test_labels_are_read_as_they_stand_whatever_the_line_ends(tmp_path, task, rows, expected, dtype, end,
                                                              bom, tail):
    path = write(tmp_path / "v.txt", HEADER[task.name], *rows, *tail, end=end, bom=bom)
    read = read_labels(path, task)
    assert read.dtype == dtype and np.array_equal(read, expected)


def test_a_row_that_repeats_an_earlier_one_is_read_like_it(tmp_path):
    path = write(tmp_path / "v.txt", HEADER["expr"], *"3070370")
    assert read_labels(path, EXPR).tolist() == [3, 0, 7, 0, 3, 7, 0]
    rows = ["0,1", "0.5,0", "0,1", "-5,-5", "0.5,0"]
    expected = [[0, 1], [.5, 0], [0, 1], [-5, -5], [.5, 0]]
    assert read_labels(write(tmp_path / "v.txt", HEADER["va"], *rows), VA).tolist() == expected


def test_a_header_may_have_spaces_and_another_case_and_a_file_may_have_no_frames(tmp_path):
    assert read_labels(write(tmp_path / "v.txt", "Valence, Arousal", "0, 1"), VA).tolist() == [[0, 1]]
    for task, shape in ((VA, (0, 2)), (EXPR, (0,)), (AU, (0, 12))):
        assert read_labels(write(tmp_path / "v.txt", HEADER[task.name]), task).shape == shape


@pytest.mark.parametrize("task, labels, target, valid", [
    (VA, [[.5, -5], [-5, -5], [-1, 1]], [[.5, 0], [0, 0], [-1, 1]], [[1, 0], [0, 0], [1, 1]]),
    (EXPR, [0, -1, 7], [0, 0, 7], [1, 0, 1]),
    (AU, [[1, -1, 0]], [[1, 0, 0]], [[1, 0, 1]])], ids=["va", "expr", "au"])
def test_invalid_codes_become_target_0_and_not_valid(task, labels, target, valid):
    got_target, got_valid = targets(np.array(labels), task)
    assert got_valid.dtype == bool
    assert got_target.tolist() == target and got_valid.astype(int).tolist() == valid


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_targets_keep_the_type_of_the_labels(task):
    target, _ = targets(np.zeros((3, task.width), task.dtype), task)
    assert target.dtype == task.dtype


# ---- As a script

def called(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["labels.py", *map(str, arguments)])
    runpy.run_path(labels.__file__, run_name="__main__")
    return capsys.readouterr().out


def test_the_script_prints_each_record(monkeypatch, capsys):
    lines = called(monkeypatch, capsys).splitlines()
    assert [line.strip() for line in lines[1::2]] == list(HEADER.values())
    assert lines[2] == ("expr   8 outputs, macro F1, expr_loss, 10 epochs; "
                        "labels in EXPR_Classification_Challenge")


def test_the_script_says_what_a_label_file_holds_or_why_it_holds_nothing(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "v.txt", HEADER["va"], "0,0", "-5,0", "1,1", "-5,-5")
    assert called(monkeypatch, capsys, path).endswith(f"{path}: va, 4 frames, 2 of them fully labelled\n")
    with pytest.raises(SystemExit, match="^2$"):
        called(monkeypatch, capsys, tmp_path / "no.txt")
    assert capsys.readouterr().err.splitlines() == [f"refused: [Errno 2] No such file or directory: "
                                                    f"'{tmp_path}/no.txt'"]
    write(path, "valence,arousal,more")
    with pytest.raises(SystemExit, match="^2$"):
        called(monkeypatch, capsys, path)
    assert len(capsys.readouterr().err.splitlines()) == 3                            # why, for each task
