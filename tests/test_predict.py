"""predict.py, evaluate.py and extract_features.py by their commands, on the finished tiny runs."""

import csv
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data import Video
from engine.checkpoints import read_checkpoint
from evaluate import compare
from labels import EXPR, TASKS, in_units, smoothed, targets
from metrics import difference
from scoring import load
from tiny import TINY, content, copied, done, metrics, run, stop

FRAMES = "data/Aff-Wild2/cropped_aligned"
PREDICT = ["predict", *TINY, "--frames", FRAMES, "--out", "p.csv"]


@pytest.fixture(scope="module")
def here(finished, tmp_path_factory):
    """A copy of all finished stages, whose frames are spoiled a little after the training: one missing in the
    middle, one broken at the start, a video without a readable face, an empty folder, a file that is no
    frame."""
    folder = copied(finished, tmp_path_factory.mktemp("predict"))
    frames = folder / FRAMES
    videos = sorted(path for path in frames.iterdir())
    first = videos[0]
    numbers = sorted(int(path.stem) for path in first.iterdir())
    (first / f"{numbers[9]:05d}.jpg").unlink()
    (first / f"{numbers[0]:05d}.jpg").write_bytes(b"no image")
    (first / "notes.txt").write_text("x")
    (frames / "blind").mkdir()
    for number in (1, 2, 3):
        (frames / "blind" / f"{number:05d}.jpg").write_bytes(b"no image")
    (frames / "empty").mkdir()
    (folder / "other.csv").write_text("mine")
    done(folder, *PREDICT)
    return folder


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_per_frame_has_what_the_models_give_for_its_features(here):
    rows = rows_of(here / "p.csv")
    videos = sorted(path.name for path in (here / FRAMES).iterdir() if path.name != "empty")
    assert list(dict.fromkeys(row["video"] for row in rows)) == videos
    models = {name: load(here / f"runs/tiny/task_{name}/best.pt") for name in TASKS}
    for video in videos:
        mine = [row for row in rows if row["video"] == video]
        numbers = {int(path.stem) for path in (here / FRAMES / video).glob("*.jpg")}
        assert [int(row["frame"]) for row in mine] == list(range(1, max(numbers) + 1))
        broken = {1} if video == videos[0] else {1, 2, 3} if video == "blind" else set()
        assert [int(row["frame"]) for row in mine if row["face"] == "1"] == sorted(numbers - broken)
        assert {row["time"] for row in mine} == {""}
        if video == "blind":
            assert all(row[name] == "" for row in mine for name in ("valence", "expression", "Anger", "AU26"))
        elif video != videos[0]:                                    # its features are those of the extraction
            features = np.load(here / f"runs/tiny/features/{video}.npy")
            for task in TASKS.values():
                values = in_units(models[task.name].predict(features), task)[:len(mine)]
                found = np.array([[float(row[name]) for name in task.outputs] for row in mine])
                longer = len(features) != len(mine)                 # labels go on: the last segment differs
                assert longer or found == pytest.approx(values, abs=2e-6)
            best = [EXPR.outputs[np.argmax([float(row[name]) for name in EXPR.outputs])] for row in mine]
            assert [row["expression"] for row in mine] == best


def test_what_was_found_is_said_and_more_processes_write_the_same_table(here):
    said = done(here, *PREDICT[:-1], "again.csv")
    for words in ("8 videos, ", "1 .txt", "1 folders without a frame: empty"):
        assert words in said
    assert "learned from synthetic faces" in said and "left out: " in said and "no readable face" not in said
    assert "rows; " in said and (here / "again.csv").read_bytes() == (here / "p.csv").read_bytes()
    assert "is finished; nothing to do" in done(here, *PREDICT[:-1], "again.csv")
    for world in (2, 3):
        done(here, *PREDICT[:-1], f"by{world}.csv", world=world)
        assert (here / f"by{world}.csv").read_bytes() == (here / "p.csv").read_bytes()


def test_time_and_smoothing(here):
    done(here, *PREDICT[:-1], "smooth.csv", "--fps", "30000/1001", "--smooth", "2")
    rows, plain = rows_of(here / "smooth.csv"), rows_of(here / "p.csv")
    assert [row["frame"] for row in rows] == [row["frame"] for row in plain]
    assert [row["time"] for row in rows[:3]] == ["0.000000", "0.033367", "0.066733"]
    video = [row for row in rows if row["video"] == rows[0]["video"]]
    for name in ("valence", "Fear", "AU12"):
        values = np.array([[float(row[name])] for row in plain[:len(video)]])
        assert [float(row[name]) for row in video] == pytest.approx(smoothed(values, 2)[:, 0], abs=2e-6)


@pytest.mark.parametrize("count, number", [(1, signal.SIGKILL), (3, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_killed_prediction_goes_on_and_makes_no_video_twice(here, tmp_path, count, number):
    folder = copied(here, tmp_path)
    (folder / "p.csv").unlink(), (folder / "p.csv.json").unlink()
    codes, said = run(folder, *PREDICT, hook=stop("engine.checkpoints.write_file", 1 + count, number))
    assert codes == [-number if number == signal.SIGKILL else 128 + number] and "Traceback" not in said
    assert number == signal.SIGKILL or said.endswith(
        f"stopped by {number.name}; what is finished is kept, start the same command again to go on\n")
    assert len(list((folder / "p.csv.parts").glob("0*"))) == count - 1                         # record first
    kept = content(folder / "p.csv.parts")
    codes, _ = run(folder, *PREDICT, hook=stop("pathlib.Path.read_bytes", 4))                  # while joining
    assert codes == [-signal.SIGKILL] and kept.items() <= content(folder / "p.csv.parts").items()
    assert "predicting 0 of " in done(folder, *PREDICT)
    assert (folder / "p.csv").read_bytes() == (here / "p.csv").read_bytes()
    assert not (folder / "p.csv.parts").exists()


def test_each_image_for_itself(here):
    done(here, *PREDICT[:-1], "still.csv", "--still")
    rows = rows_of(here / "still.csv")
    assert list(rows[0]) == ["file", "face", "expression", *EXPR.outputs]
    assert [row["file"] for row in rows] == sorted(
        str(path.relative_to(here / FRAMES)) for path in (here / FRAMES).rglob("*.jpg"))
    unread = [row for row in rows if row["face"] == "0"]
    assert len(unread) == 4 and all(row["expression"] == row["Anger"] == "" for row in unread)
    for row in rows:
        assert row in unread or sum(float(row[name]) for name in EXPR.outputs) == pytest.approx(1, abs=1e-5)
    video, _, file = rows[-1]["file"].rpartition("/")                  # its feature, through the head
    x = torch.tensor(np.load(here / f"runs/tiny/features/{video}.npy")[int(file[:-4]) - 1]).float()
    w = read_checkpoint(here / "runs/tiny/finetune/best.pt")["model"]
    x = F.gelu(x @ w["head.0.weight"].T + w["head.0.bias"]) @ w["head.3.weight"].T + w["head.3.bias"]
    assert [float(rows[-1][name]) for name in EXPR.outputs] == pytest.approx(x.softmax(0).tolist(), abs=1e-3)


def test_pictures_are_drawn_also_later_and_none_twice(here, tmp_path):
    folder = copied(here, tmp_path)
    done(folder, *PREDICT, "--picture")
    drawn = content(folder / "p.csv.pictures")
    assert {name[:-4] for name in drawn} == {row["video"] for row in rows_of(folder / "p.csv")}
    assert all(Image.open(path).width > 800 for path in (folder / "p.csv.pictures").iterdir())
    (folder / "p.csv.pictures/blind.png").unlink()
    assert "predicting 3 of " in done(folder, *PREDICT, "--picture")
    assert content(folder / "p.csv.pictures") == drawn
    assert (folder / "p.csv").read_bytes() == (here / "p.csv").read_bytes()
    (folder / "p.csv").unlink(), (folder / "p.csv.json").unlink()
    done(folder, *PREDICT, "--picture", world=2)                # a picture and its rows by one prediction
    assert (folder / "p.csv").read_bytes() == (here / "p.csv").read_bytes()


def test_the_frames_of_one_video_may_lie_in_the_folder_itself_beside_what_was_made_of_them(here, tmp_path):
    folder = copied(here, tmp_path)
    video = max((folder / FRAMES).glob("*_*"))
    out = ["--frames", str(video.relative_to(folder)), "--out", f"{video.relative_to(folder)}.csv"]
    done(folder, *PREDICT, *out, "--picture")
    expected = [row for row in rows_of(here / "p.csv") if row["video"] == video.name]
    assert rows_of(f"{video}.csv") == expected
    said = done(folder, *PREDICT[:-1], "all.csv")               # its pictures are no video
    assert "8 videos, " in said and "1 folders without a frame: empty" in said


def test_images_that_tools_name_from_0_have_the_rows_of_the_same_images_from_1(here, tmp_path):
    folder = copied(here, tmp_path)
    video = max((folder / FRAMES).glob("*_*"))
    for path in video.iterdir():
        renamed = folder / "own" / video.name / f"frame_det_00_{int(path.stem) - 1:06d}.jpg"
        renamed.parent.mkdir(parents=True, exist_ok=True)
        path.rename(renamed)
    (folder / "own/face.heic").touch()
    said = done(folder, *PREDICT[:-3], "own", "--out", "own.csv")
    expected = [row for row in rows_of(here / "p.csv") if row["video"] == video.name]
    assert rows_of(folder / "own.csv") == expected
    assert "image 0 is frame 1 of the table" in said and "1 .heic in own\n  images are read from .jpg" in said


@pytest.mark.parametrize("options, message", [
    (["--frames", "nowhere"], "--frames: nowhere is no folder"),
    (["--frames", "data/RAF-DB"], "no frame found; expected 00001.jpg.*need --still"),
    *[(["--out", name], f"--out: got '{name}', expected the name of a CSV file")
      for name in ("runs", "p.json", "p.tsv", "p.jsonl", "p.csv/")],
    (["--smooth", "-1"], "--smooth: got -1"),
    *[(["--fps", text], f"--fps: got {text}.*, expected frames per second, more than 0, like 25 or 30000/10")
      for text in ("0", "-25", "abc", "1/0", "nan", "inf")],
    (["--out", "other.csv"], "was made, or begun, with something else: no other.csv.json tells with what"),
    (["--still", "--picture"], "--still takes each image for itself"),
    (["--smooth", "3"], "made, or begun, with something else:\n  smooth: was 0, now 3"),
    (["--emma", "runs/tiny/task_au/best.pt"], "of stage task_au; expected EMMA"),
    (["--set", "features.checkpoint=runs/tiny/pretrain/last.pt"], "best.pt not found"),
    (["--set", "temporal.width=4"], "task_au.temporal.width=4/best.pt not found"),
])
def test_what_cannot_be_predicted_is_refused_in_one_line(here, options, message):
    codes, said = run(here, *PREDICT, *options)
    assert codes == [2] and re.search(f"error: .*{message}", said, re.DOTALL), said


# ---- Evaluation

@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_finds_the_scores_of_the_training(finished, world):
    for name in TASKS:
        said = done(finished, "evaluate", "--task", name, *TINY, world=world)
        assert (finished / f"runs/tiny/task_{name}/scores.txt").read_text() in said
    assert "TN" in said and "precision" in said


def test_an_experiment_is_compared_with_the_configuration_as_it_stands(finished, tmp_path):
    folder = copied(finished, tmp_path)
    idea = ["--task", "au", *TINY, "--set", "task.held_out=0.4"]
    said = done(folder, "train_task", *idea)
    assert "new, differs from the configuration in task.held_out" in said
    assert "held out, to choose the epoch" in said
    best, plain = (read_checkpoint(folder / f"runs/tiny/task_au{of}/best.pt")
                   for of in ("+task.held_out=0.4", ""))
    held, trained = (set(best["made_of"]["data"][f"{kind} videos"]) for kind in ("held-out", "training"))
    assert held and trained and not held & trained
    assert held | trained == set(plain["made_of"]["data"]["training videos"])
    assert content(folder / "runs/tiny/features") == content(finished / "runs/tiny/features")
    ours = metrics(folder / "runs/tiny/task_au+task.held_out=0.4")["score"]
    theirs = metrics(folder / "runs/tiny/task_au")["score"]
    assert plain["score"] == pytest.approx(theirs) and best["score"] != pytest.approx(ours)   # on held-out
    for against in (["--against"], ["--against", "runs/tiny/task_au"]):
        said = done(folder, "evaluate", *idea, *against)
        found = re.search(r"([+-][.\d]+) \[.*\] against runs/tiny/task_au \(([.\d]+)", said)
        assert float(found[1]) == pytest.approx(ours - theirs, abs=6e-4)
        assert float(found[2]) == pytest.approx(theirs, abs=6e-4)
    said = done(folder, "evaluate", *idea, "--tune", "--against")
    assert f"chosen on {len(held)} held-out training videos: mean over " in said


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_difference_is_ours_less_theirs_whatever_the_order_of_their_videos(tmp_path, task):
    rng, sums, videos = np.random.default_rng(0), [], [Video(f"v{i}", None, None) for i in range(12)]
    hidden = rng.normal(0, 0.4, (12, 60, len(task.outputs)))
    labels = {"va": hidden, "expr": hidden.argmax(axis=2), "au": hidden > 0}[task.name].astype(task.dtype)
    for noise in (0.1, 0.8):                                               # ours is better
        outputs = hidden + noise * rng.normal(size=hidden.shape)
        counted = zip(outputs, *targets(labels, task))
        sums.append(np.stack([task.metric.count(*of_video) for of_video in counted]))
    order = rng.permutation(12)

    def stored(sums, **names):
        found = {"metric": task.metric.name, "videos": [names.get(f"v{i}", f"v{i}") for i in order],
                 "video_sums": sums[order].tolist()}
        (tmp_path / "metrics.json").write_text(json.dumps(found))
        return tmp_path
    found = difference(*np.stack(sums)[:, None], task.metric)
    assert compare(task, sums[0], videos, stored(sums[1])) == (
        f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] against {tmp_path} "
        f"({task.metric.score(sums[1].sum(axis=0)).mean():.3f}, as its training ended), 95 % interval "
        "over 12 videos; ours is better")
    assert compare(task, sums[1], videos, stored(sums[0])).endswith("; ours is worse")
    assert compare(task, sums[0], videos, stored(sums[0])).endswith("do not tell which is better")
    with pytest.raises(ValueError, match="on other videos, or with other labels, such as v12, v3; two"):
        compare(task, sums[0], videos, stored(sums[1], v3="v12"))
    sums[1][3] *= 2
    with pytest.raises(ValueError, match="on other videos, or with other labels, such as v3; two"):
        compare(task, sums[0], videos, stored(sums[1]))


@pytest.mark.parametrize("words, message", [
    (["--task", "au", "--against", "runs/tiny/pretrain"], "no finished task with the sums of its videos"),
    (["--task", "au", "--against", "runs/tiny/task_va"], "no finished task with the sums of its videos"),
    (["--task", "au", "--tune"], "0 training videos were held back.*--set task.held_out=0.15"),
    (["--task", "va", "--checkpoint", "runs/tiny/task_au/best.pt"], "of stage task_au, not a segment model"),
    (["--task", "au", "--checkpoint", "gone.pt"], "gone.pt"),
    ([], "--task: expected va, expr or au"),
    (["--task", "au", "--checkpoint", "runs/tiny/task_au/best.pt", "--set", "segments.window=30"],
     "was made with other settings:\n  segments.window: was 20, now 30"),
])
def test_what_cannot_be_evaluated_is_refused_in_one_line(finished, words, message):
    codes, said = run(finished, "evaluate", *words, *TINY)
    assert codes == [2] and re.search(f"error: .*({message})", said, re.DOTALL), said


def test_a_model_is_not_scored_where_other_labels_make_its_training_videos_validation(finished, tmp_path):
    folder = copied(finished, tmp_path)
    place = folder / "data/Aff-Wild2/annotations/AU_Detection_Challenge"
    moved = sorted((place / "Train_Set").iterdir())[0]
    moved.rename(place / "Validation_Set" / moved.name)
    codes, said = run(folder, "evaluate", "--task", "au", *TINY)
    assert codes == [2] and "trained on 1 of the" in said and moved.stem in said
    codes, said = run(folder, "train_task", "--task", "au", *TINY)
    assert codes == [2] and "was made from other data" in said and "fewer" in said


def test_emma_is_scored_on_whole_videos_each_read_once(finished, tmp_path):
    folder = copied(finished, tmp_path)
    done(folder, "second_paper.train_emma", *TINY, "--set", "emma.cnn=none")
    path = "runs/tiny/emma+emma.cnn=none/best.pt"
    said = done(folder, "evaluate", "--checkpoint", path, *TINY)
    assert [line.split()[0] for line in said.splitlines() if "95 %" in line] == ["CCC", "macro", "mean"]
    by_two = done(folder, "evaluate", "--checkpoint", path, *TINY, world=2)
    assert said.splitlines()[-1] == by_two.splitlines()[-1]
    one = done(folder, "evaluate", "--task", "expr", "--checkpoint", path, *TINY)
    assert "macro F1" in one and "CCC" not in one
    done(folder, *PREDICT, "--emma", path)
    done(folder, *PREDICT[:-1], "still.csv", "--still", "--emma", path)
    table = {(row["video"], row["frame"]): row["valence"] for row in rows_of(folder / "p.csv")}
    for row in rows_of(folder / "still.csv"):
        video, _, file = row["file"].rpartition("/")
        assert float(table[video, str(int(file[:-4]))]) == pytest.approx(float(row["valence"]), abs=2e-6)


# ---- Extraction

def test_new_changed_and_lost_videos_are_extracted_and_the_others_kept(finished, tmp_path):
    folder = copied(finished, tmp_path)
    out, frames = folder / "runs/tiny/features", folder / FRAMES
    names = sorted(path.name for path in frames.iterdir())
    shutil.copytree(frames / names[0], frames / "new")
    (frames / "blind").mkdir()
    (frames / "blind/00001.jpg").write_bytes(b"no image")
    last = max((frames / names[1]).iterdir())
    last.unlink()
    (out / f"{names[2]}.noface.npy").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    codes, said = run(folder, "extract_features", *TINY, hook=stop("engine.checkpoints.write_array", 3))
    assert codes == [-signal.SIGKILL]
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    done(folder, "extract_features", *TINY)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    changed = {name.split(".")[0] for name in after if after[name] != before.get(name)}
    assert changed == {"new", names[1], names[2]}
    assert sum(after[name] == kept[name] != before.get(name) for name in kept) == 2    # made before the kill
    assert np.array_equal(np.load(out / "new.npy"), np.load(out / f"{names[0]}.npy"))
    assert not list(out.glob("blind*"))                                         # a video without any face
    shutil.rmtree(frames / "new")
    assert "nothing to do" in done(folder, "extract_features", *TINY)           # a video that was done may go


def test_an_extraction_does_not_go_on_with_fewer_videos_than_it_began_with(finished, tmp_path):
    folder = copied(finished, tmp_path, ["features"])
    told = stop("engine.checkpoints.write_array", 3, signal.SIGINT)
    codes, said = run(folder, "extract_features", *TINY, hook=told)
    assert codes == [130] and "stopped by SIGINT; what is finished" in said and "Traceback" not in said
    gone = sorted((folder / FRAMES).iterdir())[-1]
    shutil.rmtree(gone)
    codes, said = run(folder, "extract_features", *TINY)
    assert codes == [2] and f"1 videos were there when this began and are gone: {gone.name}" in said
