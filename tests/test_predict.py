"""One's own faces as a table: the rows against features and models taken step by step, single images, gaps,
what is refused, and what a kill leaves; EMMA in place of a run's models."""

import argparse
import contextlib
import csv
import json
import shutil
import signal
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import emma_frames
import predict
import predict_models
import scoring
import stages
import tiny
from checkpoints import checksum, read_checkpoint
from cnn import ResNet18
from data import VideoFrames
from distributed import Team
from emma import split_outputs
from features import build
from images import normalise, read_image, resize
from labels import EXPR, TASKS
from made_of import read_record
from postprocessing import smoothed
from prediction_files import score_file
from processes import in_child, in_team
from run import Progress
from score_table import score_table
from stages import FILMS, settings
from table import Table
from temporal import SegmentModel

ALONE = Team(0, 1, torch.device("cpu"))
VIDEOS = sorted(name for name, film in FILMS.items() if film.images)
OPTIONS = {"frames": "frames", "out": "all.csv", "fps": None, "smooth": 0, "still": False, "picture": False,
           "emma": ""}
VALUES = ["valence", "arousal", "expression", *EXPR.outputs, *TASKS["au"].outputs]


def write_task(folder, task, before=None):
    """A finished training of a task on the features of `folder`, or on others: `before` is their record."""
    config, runs = settings(folder), folder / "runs/tiny"
    before = before or read_record(runs / "features")
    model = SegmentModel(config.vit.dim, len(task.outputs), **asdict(config.temporal))
    stages.write_result(runs / f"task_{task.name}", ["segments", "temporal", "task", "run.seed"], config,
                        {"setting": "task.features", "stage": "features"}, before, {"best.pt": model},
                        {"training videos": ["1"]})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The stages' random data, fine-tuned and all three tasks trained, features extracted. -> the folder"""
    folder = stages.write(tmp_path_factory.mktemp("predict"))
    stages.clean(folder / "runs/tiny/features")
    stages.start(folder, "extract_features.py")
    for task in TASKS.values():
        write_task(folder, task)
    return folder


def start(folder, *overrides, team=ALONE, **options):
    """The main of predict.py. -> the table's path"""
    given = argparse.Namespace(**OPTIONS | options)
    with contextlib.chdir(folder):
        predict.main(settings(folder, *overrides), team, given)
    return folder / given.out


def read(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(trained):
    """The table of all videos, made as a user does."""
    stages.start(trained, "predict.py", "--frames", "frames", "--out", "all.csv", "--fps", "8")
    return read(trained / "all.csv")


def of_video(rows, name) -> list[dict]:
    return [row for row in rows if row["video"] == name]


def model_outputs(folder, name) -> dict[str, np.ndarray]:
    """{task: (T, K)} of a video, from the features that extract_features.py has written."""
    features = np.load(folder / f"runs/tiny/features/{name}.npy")
    config, outputs = settings(folder), {}
    for task in TASKS.values():
        model = SegmentModel(features.shape[1], len(task.outputs), **asdict(config.temporal)).eval()
        model.load_state_dict(read_checkpoint(folder / f"runs/tiny/task_{task.name}/best.pt")["model"])
        outputs[task.name] = scoring.predict(model, features, config.segments.window, config.segments.stride,
                                             config.task.batch, ALONE)
    return outputs


def as_text(outputs: dict) -> list[list[str]]:
    """What the table must say of a video, by the definitions of softmax and sigmoid."""
    va, expr, au = (torch.tensor(outputs[name]).double() for name in ("va", "expr", "au"))
    shares, active = torch.softmax(expr, dim=-1), torch.sigmoid(au)
    return [[*(f"{x:.6f}" for x in va[t]), EXPR.outputs[int(expr[t].argmax())],
             *(f"{x:.6f}" for x in shares[t]), *(f"{x:.6f}" for x in active[t])] for t in range(len(va))]


# ---- Videos

@pytest.mark.parametrize("name", ["1", "2_left", "4", "6", "7", "9"])        # images up to the last label
def test_a_row_holds_what_the_models_make_of_the_extracted_features(trained, rows, name):
    found = of_video(rows, name)
    assert [[row[column] for column in VALUES] for row in found] == as_text(model_outputs(trained, name))


def test_the_features_are_those_that_extraction_writes_bit_for_bit(trained):
    with mock.patch.object(scoring, "predict", side_effect=scoring.predict) as called:
        start(trained, frames="frames/6", out="spied.csv")
    extracted = np.load(trained / "runs/tiny/features/6.npy")
    assert len(called.call_args_list) == 3
    for call in called.call_args_list:
        assert call.args[1].dtype == np.float16 and np.array_equal(call.args[1], extracted)


def test_each_frame_up_to_the_last_has_a_row_in_order_with_gaps_marked(rows):
    assert list(rows[0]) == ["video", "frame", "time", "face", *VALUES]
    assert [(row["video"], int(row["frame"])) for row in rows] == [
        (name, frame) for name in VIDEOS for frame in range(1, max(FILMS[name].images) + 1)]
    for row in rows:
        film, frame = FILMS[row["video"]], int(row["frame"])
        assert row["face"] == str(int(frame in film.images and frame not in film.broken))
        assert float(row["time"]) == (frame - 1) / 8


def test_only_a_video_without_any_readable_face_has_empty_values(rows):
    assert len(of_video(rows, "96")) == 3
    assert all(row[column] == "" for row in of_video(rows, "96") for column in VALUES)
    assert all(row[column] for row in rows if row["video"] != "96" for column in VALUES)


def test_probabilities_are_from_0_to_1_and_the_expression_is_the_most_probable(rows):
    for row in rows:
        if row["video"] != "96":
            shares = {name: float(row[name]) for name in EXPR.outputs}
            assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
            assert shares[row["expression"]] == max(shares.values())
            assert all(0 <= float(row[name]) <= 1 for name in TASKS["au"].outputs)


def test_a_folder_of_frames_is_one_video_with_the_folders_name(trained, rows):
    found = read(start(trained, frames="frames/6/.", out="one.csv", fps=8.0))
    assert found == of_video(rows, "6")


def test_videos_in_folders_of_folders_are_named_by_their_path(trained, tmp_path, rows):
    for part, name in (("a", "6"), ("b", "6"), ("b", "4")):
        shutil.copytree(trained / "frames" / name, tmp_path / part / name)
    found = read(start(trained, frames=str(tmp_path), out="deep.csv", fps=8.0))
    assert list(dict.fromkeys(row["video"] for row in found)) == ["a/6", "b/4", "b/6"]
    assert of_video(found, "b/6") == [row | {"video": "b/6"} for row in of_video(rows, "6")]


def test_json_lines_hold_what_the_csv_holds(trained, rows):
    lines = start(trained, out="all.jsonl", fps=8.0).read_text().splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        found = json.loads(line)
        assert list(found) == list(row)
        for column, value in found.items():
            if isinstance(value, float):
                assert value == float(row[column])
            else:
                assert ("" if value is None else str(value)) == row[column]


def test_a_task_that_is_not_trained_has_no_columns_and_that_is_said(trained, tmp_path, rows, capsys):
    folder = tiny.copied(trained, tmp_path)
    (folder / "runs/tiny/task_expr/metrics.json").unlink()
    found = read(start(folder, out="two.csv", fps=8.0))
    assert "no columns of expr, which is not trained; to train it: python " in capsys.readouterr().out
    gone = ["expression", *EXPR.outputs]
    assert found == [{name: value for name, value in row.items() if name not in gone} for row in rows]


def test_videos_are_cut_as_the_checkpoint_was_trained_whatever_the_configuration_says(trained, tmp_path, rows,
                                                                                      capsys):
    folder = tiny.copied(trained, tmp_path)
    tiny.write(folder, **stages.SETTINGS, segments={"window": 9, "stride": 4})
    assert read(start(folder, frames="frames/6", out="six.csv", fps=8.0)) == of_video(rows, "6")
    said = capsys.readouterr().out
    assert "segments.window=20 as in runs/tiny/task_va/best.pt; the configuration has 9" in said


@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_smoothing_is_the_mean_over_k_frames_on_both_sides(k):
    values = np.random.default_rng(k).normal(size=(23, 3)).astype(np.float32)
    expected = [values[max(t - k, 0):t + k + 1].astype(float).mean(axis=0) for t in range(23)]
    assert smoothed(values, k) == pytest.approx(np.array(expected), abs=1e-6)
    assert np.array_equal(smoothed(values, 0), values)


def test_smoothing_is_applied_to_probabilities_within_a_video(trained, rows):
    found = read(start(trained, out="smooth.csv", smooth=2, fps=8.0))
    for name in VIDEOS:
        if name != "96":
            a, b = ([[float(row[column]) for column in VALUES if column != "expression"] for row in table]
                    for table in (of_video(rows, name), of_video(found, name)))
            expected = smoothed(np.array(a, np.float32), 2)
            assert np.array(b) == pytest.approx(expected, abs=2e-6)


# ---- Pictures

def pictures(table) -> dict[str, bytes]:
    folder = table.with_name(f"{table.name}.pictures")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_video_has_its_picture_which_the_table_does_not_depend_on(trained, tmp_path, rows):
    folder = tiny.copied(trained, tmp_path)
    plain = start(folder, out="plain.csv", fps=8.0)
    table = start(folder, out="with.csv", fps=8.0, picture=True)
    assert table.read_bytes() == plain.read_bytes() and pictures(plain) == {}
    assert sorted(pictures(table)) == sorted(f"{name}.png" for name in VIDEOS)
    records = [json.loads((folder / f"{name}.csv.json").read_text()) for name in ("plain", "with")]
    assert records[0] == records[1]


def test_pictures_can_be_asked_for_when_the_table_is_finished_and_are_the_same(trained, tmp_path, capsys):
    folder = tiny.copied(trained, tmp_path)
    drawn = pictures(start(folder, out="at_once.csv", picture=True))
    table = start(folder, out="later.csv")
    before = (table.read_bytes(), table.stat().st_mtime_ns)
    with mock.patch.object(predict_models, "video_features", side_effect=AssertionError):   # not made again
        start(folder, out="later.csv", picture=True)
        assert pictures(table) == drawn and (table.read_bytes(), table.stat().st_mtime_ns) == before
        (folder / "later.csv.pictures/6.png").unlink()
        capsys.readouterr()
        start(folder, out="later.csv", picture=True)
        said = capsys.readouterr().out
        assert f"drawing 1 of {len(VIDEOS)} pictures" in said and "warning" not in said
        start(folder, out="later.csv", picture=True)
        assert "later.csv.pictures has a picture of each video" in capsys.readouterr().out
    assert pictures(table) == drawn


def test_a_table_and_its_pictures_may_lie_in_the_folder_of_the_videos(trained, tmp_path):
    folder = tiny.copied(trained, tmp_path)
    shutil.copytree(folder / "frames/9", folder / "few/1")          # its picture is 1.png, like a frame
    shutil.copytree(folder / "frames/9", folder / "few/a/2")
    table = start(folder, frames="few", out="few/p.csv", picture=True)
    assert sorted(pictures(table)) == ["1.png", "a/2.png"]
    start(folder, frames="few", out="few/p.csv", picture=True)             # not refused for other videos
    assert {row["video"] for row in read(start(folder, frames="few", out="few/q.csv"))} == {"1", "a/2"}


# ---- Single images

def test_a_still_image_has_the_expression_that_the_fine_tuned_classifier_sees(trained, monkeypatch):
    monkeypatch.setattr(predict, "TOGETHER", 7)                              # more than one part
    found = read(start(trained, out="still.csv", still=True))
    names = sorted(str(path.relative_to(trained / "frames")) for path in trained.glob("frames/*/*.jpg"))
    assert [row["file"] for row in found] == names and list(found[0]) == ["file", "face", "expression",
                                                                          *EXPR.outputs]
    classifier = build(settings(trained)).eval()
    classifier.load_state_dict(read_checkpoint(trained / "runs/tiny/finetune/best.pt")["model"])
    for row in found[::5]:
        folder, name = row["file"].split("/")
        if int(name[:5]) in FILMS[folder].broken:
            assert row["face"] == "0" and not any(row[column] for column in list(row)[2:])
            continue
        pixels = resize(read_image(trained / "frames" / row["file"]), (16, 16))
        with torch.no_grad():
            shares = classifier(normalise(torch.tensor(pixels)[None]))[0].softmax(dim=0)
        assert row["face"] == "1" and row["expression"] == EXPR.outputs[int(shares.argmax())]
        assert [float(row[name]) for name in EXPR.outputs] == pytest.approx(shares.tolist(), abs=2e-6)
    assert {row["face"] for row in found} == {"0", "1"}


# ---- EMMA

@pytest.fixture(scope="module")
def with_emma(tmp_path_factory):
    """Videos and three checkpoints: EMMA, an EMMA that has learned action units alone, an MAE; no run, no
    labels. -> the folder"""
    made, folder = stages.write(tmp_path_factory.mktemp("made")), tmp_path_factory.mktemp("emma")
    torch.manual_seed(5)
    stages.write_emma(made, cnn=ResNet18(8, 2))
    stages.write_emma(made, "au", weights=(0, 0, 1))
    shutil.copy(made / "runs/tiny/emma/best.pt", folder / "emma.pt")
    shutil.copy(made / "runs/au/emma/best.pt", folder / "au.pt")
    shutil.copy(made / "runs/tiny/pretrain/last.pt", folder / "mae.pt")
    shutil.move(made / "frames", folder / "frames")
    shutil.move(made / "labels", folder / "put_aside")
    tiny.write(folder, **stages.SETTINGS, vit={"dim": 12})           # the checkpoint tells its own
    return folder


def texts_of(outputs) -> list[list[str]]:
    """What the table must say of EMMA's outputs (n, 22)."""
    return as_text(dict(zip(TASKS, split_outputs(outputs))))


def test_emma_fills_all_columns_of_videos_with_what_it_gives_for_each_frame(with_emma, capsys):
    rows = read(start(with_emma, out="all.csv", emma="emma.pt", fps=8.0))
    assert list(rows[0]) == ["video", "frame", "time", "face", *VALUES]
    said = capsys.readouterr().out
    assert "EMMA from emma.pt, each frame by itself" in said and "warning" not in said
    assert "vit.dim=8 as in emma.pt; the configuration has 12" in said
    trained = emma_frames.load(with_emma / "emma.pt", settings(with_emma))
    for name in VIDEOS:
        found, length = of_video(rows, name), max(FILMS[name].images)
        frames = VideoFrames(with_emma / "frames" / name, 16)
        outputs, noface = trained.predict(frames, length, Progress(1, "frames", ALONE))
        expected = [[""] * len(VALUES)] * length if noface.all() else texts_of(outputs)
        assert [[row[column] for column in VALUES] for row in found] == expected
        assert [row["face"] for row in found] == ["01"[not gone] for gone in noface]
    assert len({row["expression"] for row in rows}) > 3


def test_the_scores_of_emmas_table_are_those_of_its_evaluation(with_emma):
    table, labels = start(with_emma, out="scored.csv", emma="emma.pt"), with_emma / "put_aside"
    config = settings(with_emma, "data.labels=put_aside")
    with contextlib.chdir(with_emma):
        found = emma_frames.video_sums(emma_frames.load("emma.pt", config, ALONE), TASKS.values())
        for task in TASKS.values():
            _, sums = found[task.name]
            assert score_table(task, sums, comparable=False) in score_file(table, labels, task)


def test_emma_tells_everything_of_a_still_image(with_emma, monkeypatch):
    monkeypatch.setattr(predict, "TOGETHER", 7)                              # more than one part
    rows = read(start(with_emma, out="still.csv", emma="emma.pt", still=True))
    assert list(rows[0]) == ["file", "face", *VALUES]
    assert len(rows) == len(list(with_emma.glob("frames/*/*.jpg")))
    model = emma_frames.load(with_emma / "emma.pt").model
    for row in rows[::3]:
        film, name = row["file"].split("/")
        found = [row[column] for column in VALUES]
        if int(name[:5]) in FILMS[film].broken:
            assert row["face"] == "0" and not any(found)
            continue
        pixels = torch.tensor(resize(read_image(with_emma / "frames" / row["file"]), (16, 16)))
        with torch.no_grad():
            [expected] = texts_of(model(normalise(pixels[None])).numpy())
        assert row["face"] == "1" and found.pop(2) == expected.pop(2)
        assert list(map(float, found)) == pytest.approx(list(map(float, expected)), abs=1e-4)
    assert {row["face"] for row in rows} == {"0", "1"}


@pytest.mark.parametrize("still", [False, True])
def test_a_task_that_emma_was_not_trained_on_has_no_columns(with_emma, still, capsys):
    rows = read(start(with_emma, out=f"au{still}.csv", emma="au.pt", still=still))
    assert list(rows[0])[-12:] == list(TASKS["au"].outputs) and not {"valence", "expression"} & set(rows[0])
    said = capsys.readouterr().out
    assert all(f"no columns of {name}, which it was not trained on" in said for name in ("va", "expr"))


def test_the_record_names_emmas_checkpoint_and_another_one_is_not_mixed_in(with_emma):
    table = start(with_emma, frames="frames/9", out="nine.csv", emma="emma.pt")
    record = json.loads((with_emma / "nine.csv.json").read_text())
    assert record["emma"] == {"file": "emma.pt", "checksum": checksum(with_emma / "emma.pt")}
    before = table.read_bytes()
    shutil.copy(with_emma / "emma.pt", with_emma / "moved.pt")
    start(with_emma, frames="frames/9", out="nine.csv", emma="moved.pt")               # the same bytes
    with pytest.raises(ValueError, match=r"made, or begun, with something else:\n  emma: was .*'checksum'"):
        start(with_emma, frames="frames/9", out="nine.csv", emma="au.pt")
    assert table.read_bytes() == before


def test_killed_with_emma_it_goes_on_and_two_processes_write_what_one_does(with_emma, tmp_path):
    folder, options = tiny.copied(with_emma, tmp_path), {"emma": "emma.pt", "smooth": 2}
    for name in set(VIDEOS) - {"4", "6", "7"}:
        shutil.rmtree(folder / "frames" / name)
    one = start(folder, out="by1.csv", picture=True, **options)

    def killed():
        tiny.stop("os.fsync", 3, after=False)()          # the record, one video, the middle of a second
        start(folder, out="by2.csv", **options)
    assert in_child(killed) == -signal.SIGKILL
    assert len(list((folder / "by2.csv.parts").glob("[0-9]*"))) == 1 and not (folder / "by2.csv").exists()
    codes, _ = in_team(2, lambda team: start(folder, team=team, out="by2.csv", picture=True, **options))
    assert codes == [0, 0] and (folder / "by2.csv").read_bytes() == one.read_bytes()
    assert pictures(folder / "by2.csv") == pictures(one) and len(pictures(one)) == 3


@pytest.mark.parametrize("emma, overrides, message", [
    ("nowhere.pt", [], "nowhere.pt: no such checkpoint"),
    ("tiny.yaml", [], "tiny.yaml: not a whole, plain checkpoint"),
    ("mae.pt", [], "mae.pt: of stage pretrain; expected EMMA, as train_emma.py writes it"),
    ("emma.pt", ["vit.dim=16"], "emma.pt was made with other settings:\n  vit.dim: was 8, now 16")])
def test_what_is_no_emma_fills_no_table(with_emma, emma, overrides, message):
    for still in (False, True):
        with pytest.raises(ValueError, match=message):
            start(with_emma, *overrides, out="none.csv", emma=emma, still=still)
    assert not list(with_emma.glob("none.csv*"))


# ---- What is refused

def empty_folder(folder):
    (folder / "empty").mkdir()


def no_task(folder):
    for name in TASKS:
        shutil.rmtree(folder / f"runs/tiny/task_{name}")


def no_vit(folder):
    (folder / "runs/tiny/finetune/metrics.json").unlink()


def lost_task(folder):
    (folder / "runs/tiny/task_va/best.pt").unlink()


def other_vit(folder):
    shutil.rmtree(folder / "runs/tiny/task_au")
    before = read_record(folder / "runs/tiny/features")
    write_task(folder, TASKS["au"], before | {"from": before["from"] | {"checksum": 7}})


def foreign_table(folder):
    (folder / "all.csv").write_text("mine")


def other_table(folder):
    start(folder, frames="frames/9")


@pytest.mark.parametrize("change, options, message", [
    (None, {"frames": "nowhere"}, r"--frames: nowhere is no folder; expected one that holds the face crops"),
    (empty_folder, {"frames": "empty"}, r"--frames: no frame in empty; expected 00001.jpg, .* need --still"),
    (empty_folder, {"frames": "empty", "still": True}, r"--frames: no image below empty, only nothing"),
    (None, {"smooth": -1}, r"--smooth: got -1, expected 0 frames or more"),
    (None, {"fps": 0.0}, r"--fps: got 0.0, expected frames per second, more than 0"),
    (None, {"fps": float("nan")}, r"--fps: got nan"),
    (None, {"still": True, "smooth": 1}, r"--still takes each image for itself; leave out --smooth"),
    (None, {"still": True, "picture": True}, r"--still takes .*; leave out --smooth, --fps and --picture"),
    (no_task, {}, r"task_au/best.pt not found; make it with: python .*train_task.py --task au --config"),
    (no_vit, {}, r"finetune/best.pt not found; make it with: python .*train_finetune.py --config"),
    (lost_task, {}, r"task_va/best.pt is gone, though its stage is finished; put a copy back, or begin"),
    (other_vit, {}, r"task_au/best.pt: trained on features of another ViT, features from finetune \(checksum "
                    r"7\), not features from finetune .* or their ViT, --set features.checkpoint=..."),
    (foreign_table, {}, r"all.csv exists, and no all.csv.json tells what it was made of; delete it, or give"),
    (other_table, {"smooth": 3, "frames": "frames/9"}, r"(?s)all.csv was made, or begun, with something else:"
                                                       r"\n  smooth: was 0, now 3\ngive another --out"),
    (other_table, {"still": True, "frames": "frames/9"}, r"(?s)something else:.*still: was False, now True"),
    (other_table, {}, r"videos: 0 fewer \[\], \d+ more \['1'")])
def test_what_makes_no_sense_is_refused_with_the_way_on(trained, tmp_path, change, options, message):
    folder = tmp_path
    (folder / "tiny.yaml").write_text((trained / "tiny.yaml").read_text())
    shutil.copytree(trained / "runs", folder / "runs")
    (folder / "frames").symlink_to(trained / "frames")
    if change:
        change(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        start(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.glob("*.csv*")} == before


def test_a_checkpoint_of_other_weights_is_not_mixed_into_a_table_that_was_begun(trained, tmp_path):
    folder = tiny.copied(trained, tmp_path)
    start(folder, frames="frames/9", out="nine.csv").unlink()                # as if it was not whole yet
    shutil.rmtree(folder / "runs/tiny/task_va")
    write_task(folder, TASKS["va"])
    with pytest.raises(ValueError, match=r"nine.csv was made, or begun, with something else:\n  va: was"):
        start(folder, frames="frames/9", out="nine.csv")


# ---- Whole after a kill, and the same from two processes

def test_names_with_commas_quotes_and_of_no_encoding_come_back_from_the_table(tmp_path):
    table = Table(tmp_path / "t.csv", ["video", "x"], {"a": 1}, ALONE)
    names = ['a,b', 'c"d', "e\nf", "é", "\udcff"]
    table.write(0, [[name, 0.5] for name in names])
    table.join(1)
    assert [(row["video"], row["x"]) for row in read(tmp_path / "t.csv")] == [(name, "0.500000")
                                                                              for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.csv.json"]
    assert Table(tmp_path / "t.csv", ["video", "x"], {"a": 1}, ALONE).finished


def test_a_killed_run_goes_on_where_it_was_and_two_processes_write_the_table_of_one(finished, tmp_path):
    folder = tiny.copied(finished, tmp_path)
    frames, command = "data/Aff-Wild2/cropped_aligned", ["predict.py", *tiny.TINY, "--frames"]
    tiny.done(folder, *command, frames, "--out", "by1.csv", "--picture", world=1)
    kill = tiny.stop("os.fsync", 4, after=False)         # the record, two videos, the middle of a third
    assert tiny.run(folder, *command, frames, "--out", "by2.csv", hook=kill).codes == [-9]
    assert len(list((folder / "by2.csv.parts").glob("[0-9]*"))) == 2 and not (folder / "by2.csv").exists()
    said = tiny.done(folder, *command, frames, "--out", "by2.csv", "--picture", world=2)
    assert "  warning: these models learned from synthetic faces; they say little about real ones\n" in said
    total = len(read(folder / "by1.csv"))
    (line,) = [line for line in said.splitlines() if line.startswith("predicting ")]
    left = int(line.split()[1].replace(",", ""))
    assert 0 < left < total and f" of {total:,} frames" in line
    assert (folder / "by2.csv").read_bytes() == (folder / "by1.csv").read_bytes()
    assert not (folder / "by2.csv.parts").exists()
    assert pictures(folder / "by2.csv") == pictures(folder / "by1.csv") != {}
    before = tiny.content(folder)
    assert "by2.csv is finished; nothing to do" in tiny.done(folder, *command, frames, "--out", "by2.csv")
    assert tiny.content(folder) == before


@pytest.mark.parametrize("out", ["", "new/", "frames"])
def test_an_output_that_is_no_file_is_refused(trained, out):
    with pytest.raises(ValueError, match=f"--out: got '{out}', expected the name of a file"):
        start(trained, out=out)
    assert not (trained / "new").exists()


def test_frames_that_come_or_change_while_a_table_is_made_are_noticed(trained, tmp_path):
    shutil.copytree(trained / "frames/4", tmp_path / "4")
    source = predict.Videos(tmp_path, argparse.Namespace(**OPTIONS))
    source.models = SimpleNamespace(config=settings(trained), tasks=[])
    shutil.copy(tmp_path / "4/00033.jpg", tmp_path / "4/00034.jpg")
    with pytest.raises(ValueError, match="4: other frames than at the start; wait until all are there"):
        source.rows(0, None)
    (tmp_path / "4/00034.jpg").unlink()
    (tmp_path / "4/00033.jpg").write_bytes(b"another image")
    assert predict.Videos(tmp_path, argparse.Namespace(**OPTIONS)).found != source.found
    still = [predict.Stills(tmp_path, None).found]
    (tmp_path / "4/00001.jpg").write_bytes(b"another image")
    assert predict.Stills(tmp_path, None).found != still[0]


def test_the_predictions_of_a_validation_video_are_those_that_its_evaluation_scores(finished, tmp_path):
    folder = tiny.copied(finished, tmp_path)
    tiny.done(folder, "predict.py", *tiny.TINY, "--frames", "data/Aff-Wild2/cropped_aligned",
              "--out", "all.csv", "--set", "run.device=cpu")
    rows, compared = read(folder / "all.csv"), 0
    for name in dict.fromkeys(row["video"] for row in rows):
        found = of_video(rows, name)
        if len(np.load(folder / f"runs/tiny/features/{name}.npy")) == len(found):
            values = [[row[column] for column in VALUES] for row in found]
            assert values == as_text(model_outputs(folder, name))
            compared += 1
    assert compared >= 3
