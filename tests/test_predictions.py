"""Files of predictions: read as they stand, broken ones refused with their line, scored with NumPy alone."""

import csv
import re
from functools import partial

import numpy as np
import pytest

from files import run_without, write
from labels import AU, EXPR, TASKS, VA, for_metric, targets
from tools.predictions import read_predictions, score_file

COLUMNS = ["video", "frame", "time", "face", *VA.outputs, "expression", *EXPR.outputs, *AU.outputs]
FRAMES = {"136": [1, 2], "28-30-1280x720-2_left": [3], "a,b/c": [1, 2, 4, 1_000]}
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def outputs(task) -> dict[str, np.ndarray]:
    """{video: values (n, K)} of FRAMES, as predict.py tells them, with six decimals."""
    rng, found = np.random.default_rng(0), {}
    for video, frames in FRAMES.items():
        values = rng.random((len(frames), len(task.outputs)))
        found[video] = np.round(values * 2 - 1 if task is VA else values, 6)
    return found


def table() -> list[dict]:
    """The rows of predict.py's table."""
    rows = []
    for video, frames in FRAMES.items():
        for i, frame in enumerate(frames):
            rows.append(dict.fromkeys(COLUMNS) | {"video": video, "frame": frame, "face": 1})
            for task in TASKS.values():
                rows[-1] |= dict(zip(task.outputs, outputs(task)[video][i].tolist()))
    return rows


def write_table(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader(), writer.writerows(rows)
    return path


def submission(path, task, rows, **keywords):
    """rows: {"136/00001.jpg": what stands behind it}"""
    return write(path, ",".join(["image_location", *task.outputs]),
                       *[f"{name},{cells}" for name, cells in rows.items()], **keywords)


# ---- Reading

@of_each_task
@pytest.mark.parametrize("kind", [int, float])                            # pandas may write frame 1 as 1.0
def test_predict_pys_tables_are_read_as_they_stand_and_frames_without_values_left_out(tmp_path, task, kind):
    rows = [row | dict.fromkeys(task.outputs) if row["video"] == "136" else row for row in table()]
    rows = [row | {"frame": kind(row["frame"])} for row in rows]
    np.random.default_rng(0).shuffle(rows)
    path = write_table(tmp_path / "p.csv", rows, ["note", *COLUMNS[::-1]])     # columns in any order, too
    found = read_predictions(path, task)
    assert list(found) == sorted(FRAMES.keys() - {"136"})
    for video, (numbers, values) in found.items():
        assert numbers.dtype.kind == "i" and numbers.tolist() == FRAMES[video]
        assert values.dtype == np.float64 and np.array_equal(values, outputs(task)[video])


@pytest.mark.parametrize("task, cells, values", [
    (VA, ["0.5,-0.25", "-1,1"], [[.5, -.25], [-1, 1]]),
    (EXPR, ["3", "0"], np.eye(8)[[3, 0]]),
    (AU, ["0,1,0,1,0,1,0,1,0,1,0,1", ",".join("0" * 12)], [[0, 1] * 6, [0] * 12])], ids=TASKS)
def test_submissions_are_read_whatever_the_line_ends_and_names_split_at_the_last_slash(
        tmp_path, task, cells, values):
    rows = {"b.c/2_left/00010.jpg": cells[1], "b.c/2_left/9.PNG": cells[0], "1/47434.jpeg": cells[0]}
    for end, bom in (("\n", ""), ("\r\n", "\ufeff"), ("\r", "")):
        path = submission(tmp_path / "predictions.txt", task, rows, end=end)
        path.write_bytes(bom.encode() + path.read_bytes() + end.encode())              # a blank last line
        found = read_predictions(path, task)
        assert {video: numbers.tolist() for video, (numbers, _) in found.items()} == {
            "1": [47434], "b.c/2_left": [9, 10]}
        assert np.array_equal(found["b.c/2_left"][1], values)


# ---- Broken files

VA_TABLE, AU_TABLE = (",".join(["video", "frame", *task.outputs]) for task in (VA, AU))
EXPR_SENT = ",".join(["image_location", *EXPR.outputs])
ZEROS = ",".join("0" * 11)
# The file, its task, a header and a right row, what is expected of a row, and rows that are broken.
ROWS = [
    ("p.csv", VA, [VA_TABLE, "a,9999999,0,0"],
     "one each of video, frame, valence, arousal: a video's name, a frame from 1, and finite numbers",
     ["a,2,0", "a,2,0,0,", "a,one,0,0", f"a,{'9' * 30},0,0", "a,0,0,0", ",2,0,0", "a,2,0.5,", "a,2,nan,0",
      "a,2,0,-inf", "a,2,inf,0", "a,1.5,0,0", "a,nan,0,0", "a,inf,0,0", "a,,0,0", '"' + "a" * 200_000]),
    ("p.csv", AU, [AU_TABLE, f"a,1,1,{ZEROS}"], "a frame from 1, and probabilities from 0 to 1",
     [f"a,2,1.5,{ZEROS}", f"a,2,-.1,{ZEROS}"]),
    ("p.txt", EXPR, [EXPR_SENT, "136/00001.jpg,7"], "136/00001.jpg and 1 whole number from 0 to 7",
     ["136/2.jpg,8", "00002.jpg,1", "136/face.jpg,1", "136/00000.jpg,1", "136/00002,1"])]


@pytest.mark.parametrize("name, task, lines, expected, row", [
    pytest.param(*kind, row, id=f"{name} {task.name} {row[:30]}") for *kind, rows in ROWS
    for name, task in [kind[:2]] for row in rows])
def test_a_broken_row_is_refused_with_its_file_and_line(tmp_path, name, task, lines, expected, row):
    path = write(tmp_path / name, *lines)
    assert len(read_predictions(path, task)) == 1
    write(path, *lines, row, *lines[-1:])
    with pytest.raises(ValueError) as refusal:
        read_predictions(path, task)
    assert str(refusal.value).startswith(f"{path}, line {len(lines) + 1}: {row[:80]!r}, expected ")
    assert expected in str(refusal.value)


HEADER = "line 1: header is "
FILES = {
    "an empty file": (VA, "p.csv", [], f"{HEADER}'', expected 'image_.*one column each of video, frame, v"),
    "rows without any prediction": (VA, "p.csv", [VA_TABLE, "a,1,,"], "no prediction in it"),
    "a column twice": (VA, "p.csv", [VA_TABLE + ",valence", "a,1,0,0,0"], f"{HEADER}.*one column each of"),
    "a submission of another task": (VA, "p.txt", [EXPR_SENT, "a/1.jpg,1"], f"{HEADER}.*'image_location,val"),
    "no text": (VA, "p.csv", ["v\0i\0d\0e\0o\0"], HEADER),
    "a long first line": (VA, "p.csv", ['"' + "a" * 200_000], HEADER),
    "a frame twice": (VA, "p.csv", [VA_TABLE, "a,1,0,0", "b,1,0,0", "a,1,1,1"],
                      "lines 2 and 4: both are frame 1 of a, expected each frame once")}


@pytest.mark.parametrize("task, name, lines, message", FILES.values(), ids=FILES)
def test_a_broken_file_is_refused_with_its_name(tmp_path, task, name, lines, message):
    path = write(tmp_path / name, *lines)
    with pytest.raises(ValueError, match=message) as refusal:
        read_predictions(path, task)
    assert str(refusal.value).startswith(str(path)) and len(str(refusal.value)) < 1000


# ---- Scoring

def write_labels(folder, task, videos: dict):
    """Label files; {video: labels (T, K) or (T,)}"""
    folder.mkdir(parents=True, exist_ok=True)
    for video, labels in videos.items():
        rows = [",".join(f"{value:g}" for value in np.atleast_1d(row)) for row in labels]
        write(folder / f"{video}.txt", ",".join(task.outputs), *rows)
    return folder


def drawn(task, frames, seed):
    """Values and labels of a video, a third of the labels invalid."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    values = np.round(rng.random((frames, K)), 6)
    labels = rng.integers(task.lowest, task.highest + 1, frames if task.one_class else (frames, K))
    labels[rng.random(labels.shape) < 0.3] = task.invalid
    return values, labels


def rows_of(task, video, values, first=1):
    return [{"video": video, "frame": first + i, **dict(zip(task.outputs, row.tolist()))}
            for i, row in enumerate(values)]


def assert_mean(text, task, values, labels):
    """The table's last line has what the metric gives on these frames (test_metrics.py)."""
    sums = task.metric.count(for_metric(values, task), *targets(labels, task))
    assert re.search(r"^mean {2,}(\S+)", text, re.MULTILINE)[1] == f"{task.metric.score(sums).mean():.3f}"


@of_each_task
def test_only_frames_with_a_label_and_a_prediction_count_and_the_others_are_told(tmp_path, task):
    values, labels = drawn(task, 60, 0)
    labels[:10] = task.invalid
    known = {"a": labels, "d": labels[:10], **{f"b{k}": labels[10:13] for k in range(6)}, "c": labels[20:30]}
    folder = tmp_path / "labels"                                     # Aff-Wild2's: only its validation set
    write_labels(folder / task.folders[-1] / "Validation_Set", task, known)
    write_labels(folder / task.folders[-1] / "Train_Set", task, {"unknown": labels})
    rows = [*rows_of(task, "a", values[5:40], first=6), *rows_of(task, "unknown", values[:7]),
            *rows_of(task, "c", values[20:35])]
    text = score_file(write_table(tmp_path / "p.csv", rows), folder, task)
    scored = [np.concatenate([array[10:40], array[20:30]]) for array in (values, labels)]
    any_label = (labels != task.invalid).reshape(60, -1).any(axis=1)
    a, b, total = any_label[40:].sum(), any_label[10:13].sum(), any_label.sum() + any_label[20:30].sum()
    assert_mean(text, task, *scored)
    assert text.splitlines()[0].endswith(f"p.csv: 2 videos, {total - a} labelled frames (a, c)")
    assert text.endswith(
        f"\n\nnot scored: {a + 6 * b} labelled frames without a prediction: "
        f"a ({a}), b0 ({b}), b1 ({b}), b2 ({b}), b3 ({b}) and 2 more\n"
        "not scored: 12 predictions of frames that no label file has: c (5), unknown (7)")


def test_predictions_of_other_videos_and_folders_without_labels_are_refused(tmp_path):
    folder = write_labels(tmp_path / "labels", EXPR, {"a": [0], "b": [-1]})
    for rows in ({"c/1.jpg": 0}, {"a/2.jpg": 0}, {"b/1.jpg": 0}):   # another video, frame; nothing annotated
        path = submission(tmp_path / "p.txt", EXPR, rows)
        with pytest.raises(ValueError, match="no frame has both a label and a prediction: .*p.txt has "
                                             rf"videos {list(rows)[0][0]}; .*labels has labels of a, b"):
            score_file(path, folder, EXPR)
    for empty in (tmp_path / "nowhere", write_labels(tmp_path / "empty", EXPR, {})):
        with pytest.raises(ValueError, match=r"--labels: .* holds neither EXPR_Class.* nor label files"):
            score_file(path, empty, EXPR)


# ---- The command, where only NumPy is installed

def test_the_command_scores_a_file_without_torch_or_says_why_not(tmp_path):
    values, labels = drawn(AU, 30, 0)
    folder = write_labels(tmp_path / "labels", AU, {"a": labels})
    path = write_table(tmp_path / "p.csv", rows_of(AU, "a", values))
    arguments = ["--task", "au", "--labels", folder, "--predictions"]
    called = partial(run_without, "torch PIL yaml", tmp_path, "tools.predictions")
    assert called(*arguments, path) == (0, score_file(path, folder, AU) + "\n", "")
    code, out, err = called(*arguments, tmp_path / "none.csv")
    assert (code, out) == (2, "") and re.match(r"error: .*No such file.*none.csv'\n$", err)
    code, out, err = called(*arguments[:-1])
    assert (code, out) == (2, "") and "the following arguments are required: --predictions" in err
