"""Files of predictions are read as they stand and scored; the scorer needs NumPy alone."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metrics
from labels import AU, EXPR, TASKS, VA
from metrics import binary_f1, ccc, class_f1
from prediction_files import read_predictions, score_file

ROOT = Path(__file__).parent.parent
COLUMNS = ["video", "frame", "time", "face", *VA.outputs, "expression", *EXPR.outputs, *AU.outputs]
FRAMES = {"136": [1, 2, 4], "28-30-1280x720-2_left": [3], "a,b/c": [7, 1_000]}
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def outputs(task, seed=0) -> dict[str, np.ndarray]:
    """{video: values (n, K)} of FRAMES, as predict.py tells them, with six decimals."""
    rng, found = np.random.default_rng(seed), {}
    for video, frames in FRAMES.items():
        values = rng.dirichlet(np.ones(8), len(frames)) if task is EXPR else rng.random(
            (len(frames), len(task.outputs)))
        found[video] = np.round(values * 2 - 1 if task is VA else values, 6)
    return found


def table(videos=FRAMES, without=()) -> list[dict]:
    """The rows of predict.py's table; `without`: a video in which no image could be read."""
    values, rows = {task.name: outputs(task) for task in TASKS.values()}, []
    for video, frames in videos.items():
        for i, frame in enumerate(frames):
            row = dict.fromkeys(COLUMNS) | {"video": video, "frame": frame, "face": 1}
            if video not in without:
                row["expression"] = "Neutral"
                for task in TASKS.values():
                    row |= dict(zip(task.outputs, values[task.name][video][i].tolist()))
            rows.append(row)
    return rows


def write_csv(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_lines(path, *lines, end="\n"):
    path.write_bytes((end.join(lines) + end).encode())
    return path


def submission(path, task, rows, **keywords):
    """rows: {"136/00001.jpg": what stands behind it}"""
    return write_lines(path, ",".join(["image_location", *task.outputs]),
                       *[f"{name},{cells}" for name, cells in rows.items()], **keywords)


def assert_are(found, expected: dict, frames=FRAMES):
    """The videos in sorted order, and what of them was read."""
    assert list(found) == sorted(expected)
    for video, (numbers, values) in found.items():
        assert numbers.dtype.kind == "i" and numbers.tolist() == frames[video]
        assert values.dtype == np.float64 and np.array_equal(values, expected[video])


# ---- Reading

@of_each_task
@pytest.mark.parametrize("write", [write_csv, write_jsonl], ids=["csv", "jsonl"])
def test_predict_pys_tables_are_read_back_number_by_number(tmp_path, task, write):
    path = tmp_path / ("p.jsonl" if write is write_jsonl else "p.csv")
    assert_are(read_predictions(write(path, table()), task), outputs(task))


@of_each_task
@pytest.mark.parametrize("write", [write_csv, write_jsonl], ids=["csv", "jsonl"])
def test_the_order_of_rows_does_not_matter(tmp_path, task, write):
    rows = table()
    np.random.default_rng(0).shuffle(rows)
    path = tmp_path / ("p.jsonl" if write is write_jsonl else "p.csv")
    assert_are(read_predictions(write(path, rows), task), outputs(task))


def test_columns_may_stand_in_any_order_and_those_of_other_tasks_are_passed_over(tmp_path):
    for columns in (COLUMNS[::-1], ["video", "frame", *AU.outputs], [*AU.outputs, "note", "frame", "video"]):
        assert_are(read_predictions(write_csv(tmp_path / "p.csv", table(), columns), AU), outputs(AU))


@pytest.mark.parametrize("write", [write_csv, write_jsonl], ids=["csv", "jsonl"])
def test_frames_without_a_face_in_their_whole_video_are_no_predictions_of_0(tmp_path, write):
    path = tmp_path / ("p.jsonl" if write is write_jsonl else "p.csv")
    found = read_predictions(write(path, table(without=["136"])), VA)
    assert_are(found, {video: values for video, values in outputs(VA).items() if video != "136"})


@pytest.mark.parametrize("write", [write_csv, write_jsonl], ids=["csv", "jsonl"])
def test_predictions_of_0_are_predictions(tmp_path, write):
    rows = [row | dict.fromkeys(AU.outputs, 0) for row in table()]
    path = tmp_path / ("p.jsonl" if write is write_jsonl else "p.csv")
    found = read_predictions(write(path, rows), AU)
    assert_are(found, {video: np.zeros((len(frames), 12)) for video, frames in FRAMES.items()})


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("task, cells, values", [
    (VA, ["0.5,-0.25", "-1,1"], [[.5, -.25], [-1, 1]]),
    (EXPR, ["3", "0"], np.eye(8)[[3, 0]]),
    (AU, ["0,1,0,1,0,1,0,1,0,1,0,1", ",".join("0" * 12)], [[0, 1] * 6, [0] * 12])], ids=TASKS)
def test_submissions_are_read_whatever_the_line_ends(tmp_path, task, cells, values, end, bom):
    path = submission(tmp_path / "predictions.txt", task,
                      {"2-30-640x360/00010.jpg": cells[1], "2-30-640x360/9.PNG": cells[0]}, end=end)
    path.write_bytes(bom.encode() + path.read_bytes() + end.encode())                  # a blank last line
    [(video, (numbers, read))] = read_predictions(path, task).items()
    assert video == "2-30-640x360" and numbers.tolist() == [9, 10] and np.array_equal(read, values)


def test_a_submissions_path_is_split_at_its_last_slash(tmp_path):
    names = {"video86_3/00001.jpg": 1, "a.b/c_right/00002.jpg": 2, "3/00003.jpeg": 3}
    found = read_predictions(submission(tmp_path / "p.txt", EXPR, names), EXPR)
    assert {video: numbers.tolist() for video, (numbers, _) in found.items()} == {
        "3": [3], "a.b/c_right": [2], "video86_3": [1]}


# ---- Scoring

def write_labels(folder, task, videos: dict):
    """Label files; {video: labels (T, K) or (T,)}"""
    folder.mkdir(parents=True, exist_ok=True)
    for video, labels in videos.items():
        rows = [",".join(f"{value:g}" for value in np.atleast_1d(row)) for row in labels]
        write_lines(folder / f"{video}.txt", ",".join(task.outputs), *rows)
    return folder


def drawn(task, frames, seed):
    """Values and labels of a video, a third of the labels invalid."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    values = np.round(rng.random((frames, K)), 6)
    labels = {"va": np.round(rng.uniform(-1, 1, (frames, K)), 3), "expr": rng.integers(0, 8, frames),
              "au": rng.integers(0, 2, (frames, K))}[task.name]
    labels[rng.random(labels.shape) < 0.3] = task.invalid
    return values, labels


def rows_of(task, video, values, first=1):
    return [{"video": video, "frame": first + i, **dict(zip(task.outputs, row.tolist()))}
            for i, row in enumerate(values)]


def mean_score(task, values, labels) -> str:
    """By the functions that take predictions and labels themselves."""
    if task is VA:
        return f"{np.mean([ccc(*[a[labels[:, d] != -5, d] for a in (values, labels)]) for d in (0, 1)]):.3f}"
    if task is EXPR:
        return f"{class_f1(values[labels >= 0].argmax(axis=1), labels[labels >= 0]).mean():.3f}"
    return f"{binary_f1(values > 0.5, labels).mean():.3f}"


def shown_mean(text: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith("mean  ")]
    return line.split()[1]


@of_each_task
def test_a_file_is_scored_as_the_metric_scores_its_frames(tmp_path, task):
    videos = {video: drawn(task, 40 + seed, seed) for seed, video in enumerate("cab")}
    labels = write_labels(tmp_path / "labels", task, {video: known for video, (_, known) in videos.items()})
    path = write_csv(tmp_path / "p.csv", [row for video, (values, _) in videos.items()
                                          for row in rows_of(task, video, values)],
                     ["video", "frame", *task.outputs])
    text = score_file(path, labels, task)
    expected = mean_score(task, *[np.concatenate(part) for part in zip(*videos.values())])
    assert shown_mean(text) == expected and "not scored" not in text and "paper" not in text
    frames = sum((known != task.invalid).reshape(len(known), -1).any(axis=1).sum()
                 for _, known in videos.values())
    assert text.splitlines()[0] == f"{path}: 3 videos, {frames} labelled frames (a, b, c)"


@of_each_task
def test_a_submission_scores_what_its_decisions_score(tmp_path, task):
    values, labels = drawn(task, 60, 0)
    folder = write_labels(tmp_path / "labels", task, {"136": labels})
    cells = {"va": [f"{v},{a}" for v, a in values[:, :2]], "expr": values.argmax(axis=1),
             "au": [",".join(map(str, row)) for row in (values > 0.5).astype(int)]}[task.name]
    path = submission(tmp_path / "p.txt", task, {f"136/{i:05d}.jpg": c for i, c in enumerate(cells, 1)})
    assert shown_mean(score_file(path, folder, task)) == mean_score(task, values, labels)


@of_each_task
def test_only_frames_with_a_label_and_a_prediction_count_and_the_others_are_told(tmp_path, task):
    values, labels = drawn(task, 60, 0)
    labels[:10] = task.invalid
    folder = write_labels(tmp_path / "labels", task, {"a": labels, "b": labels[10:13], "c": labels[:10]})
    rows = rows_of(task, "a", values[5:40], first=6) + rows_of(task, "unknown", values[:7])
    text = score_file(write_csv(tmp_path / "p.csv", rows, ["video", "frame", *task.outputs]), folder, task)
    assert shown_mean(text) == mean_score(task, values[10:40], labels[10:40])
    any_label = (labels != task.invalid).reshape(60, -1).any(axis=1)
    a, b = any_label[40:].sum(), any_label[10:13].sum()
    total = any_label.sum() + b
    assert (f"not scored: {a + b} of {total} labelled frames, in 2 of 3 videos, have no prediction: "
            f"a ({a}), b ({b})") in text
    assert "not scored: 7 predictions of 1 videos without labels: unknown" in text
    assert text.splitlines()[0].endswith(f"p.csv: 1 videos, {total - a - b} labelled frames (a)")


def test_predictions_past_the_last_label_are_counted_and_not_scored(tmp_path):
    values, labels = drawn(VA, 20, 0)
    folder = write_labels(tmp_path / "labels", VA, {"a": labels[:15]})
    path = write_csv(tmp_path / "p.csv", rows_of(VA, "a", values), ["video", "frame", *VA.outputs])
    text = score_file(path, folder, VA)
    assert shown_mean(text) == mean_score(VA, values[:15], labels[:15])
    assert text.endswith("not scored: 5 predictions past the last label of their video")


def test_at_most_five_videos_are_named(tmp_path):
    videos = {f"v{k}": [0] for k in range(9)}
    folder = write_labels(tmp_path / "labels", EXPR, videos)
    text = score_file(submission(tmp_path / "p.txt", EXPR, {"v8/1.jpg": 0, "v7/1.jpg": 0}), folder, EXPR)
    assert text.endswith("in 7 of 9 videos, have no prediction: v0 (1), v1 (1), v2 (1), v3 (1), v4 (1) and 2 "
                         "more")


def test_of_aff_wild2s_annotations_the_validation_set_is_scored(tmp_path):
    root = tmp_path / "annotations/EXPR_Recognition_Challenge"
    write_labels(root / "Train_Set", EXPR, {"a": [0, 0]})
    write_labels(root / "Validation_Set", EXPR, {"b": [1, 2, 3]})
    path = submission(tmp_path / "p.txt", EXPR, {"a/1.jpg": 0, "b/1.jpg": 1, "b/2.jpg": 2, "b/3.jpg": 4})
    text = score_file(path, tmp_path / "annotations", EXPR)
    assert text.startswith(f"{path}: 1 videos, 3 labelled frames (b)\n")
    assert "2 videos" not in text and "1 predictions of 1 videos without labels: a" in text
    assert shown_mean(text) == f"{2 / 8:.3f}"


def test_predictions_of_other_videos_are_refused_and_both_sides_are_named(tmp_path):
    folder = write_labels(tmp_path / "labels", EXPR, {"a": [0], "b": [-1]})
    for rows in ({"c/1.jpg": 0}, {"a/2.jpg": 0}, {"b/1.jpg": 0}):   # another video, frame; nothing annotated
        path = submission(tmp_path / "p.txt", EXPR, rows)
        with pytest.raises(ValueError, match="no frame has both a label and a prediction: .*p.txt has "
                                             rf"videos {list(rows)[0][0]}; .*labels has labels of a, b"):
            score_file(path, folder, EXPR)


def test_a_folder_without_labels_and_labels_of_another_task_are_refused(tmp_path):
    path = submission(tmp_path / "p.txt", EXPR, {"a/1.jpg": 0})
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"--labels: .* holds neither EXPR_Class.* nor label files"):
            score_file(path, folder, EXPR)
    folder = write_labels(tmp_path / "va", VA, {"a": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="a.txt: header is 'valence,arousal', expected 'Neutral,"):
        score_file(path, folder, EXPR)


# ---- The command

def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
    runpy.run_path(metrics.__file__, run_name="__main__")


@pytest.mark.parametrize("arguments", [["--task", "va"], ["--task", "va", "--labels", "x"],
                                       ["--predictions", "x", "--labels", "x"], ["--task", "gender"]])
def test_the_command_needs_all_three_arguments_or_none(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit, match="^2$"):
        called(monkeypatch, *arguments)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [("", "p.csv, line 1: header is ''"), (None, "No such file")])
def test_what_cannot_be_scored_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        (tmp_path / "p.csv").write_text(content)
    with pytest.raises(SystemExit, match="^2$"):
        called(monkeypatch, "--task", "va", "--predictions", tmp_path / "p.csv", "--labels", tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_command_needs_neither_torch_nor_anything_else_but_numpy(tmp_path):
    for name in ("torch", "PIL", "yaml", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} must not be imported')")
    videos = {video: drawn(AU, 30, seed) for seed, video in enumerate("ab")}
    folder = write_labels(tmp_path / "labels", AU, {video: known for video, (_, known) in videos.items()})
    rows = [row for video, (values, _) in videos.items() for row in rows_of(AU, video, values)]
    path = write_csv(tmp_path / "p.csv", rows, ["video", "frame", *AU.outputs])
    command = [sys.executable, str(ROOT / "metrics.py"), "--task", "au", "--predictions", str(path),
               "--labels", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == score_file(path, folder, AU) + "\n"
    with pytest.raises(subprocess.CalledProcessError):               # the stand-in does stop who needs torch
        subprocess.run([sys.executable, "-c", "import torch"], check=True, capture_output=True,
                       env={"PYTHONPATH": str(tmp_path)})
