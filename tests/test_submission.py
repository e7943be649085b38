"""Submissions: each row of a template against its own frame's values, with every gap and in every order, from
a run and from a table; what is refused."""

import argparse
import contextlib
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch

import scoring
import stages
import submission_values
from checkpoints import read_checkpoint
from distributed import Team
from labels import AU, EXPR, TASKS, VA
from made_of import read_record
from postprocessing import in_units
from stages import settings
from submission_check import check
from submission_file import answers, every_frame, header, read_template, write_rows
from submission_values import matched
from temporal import SegmentModel

ALONE = Team(0, 1, torch.device("cpu"))
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def put(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def names_of(video, *frames):
    return [f"{video}/{frame:05d}.jpg" for frame in frames]


# ---- Rows, from values that tell of which video and frame they are

def telltale(frames, video=0):
    """Valence of frame t: t / 1000. Arousal: the video's number / 10."""
    return np.array([[t / 1000, video / 10] for t in frames])


def submitted(folder, names, of_video) -> list[tuple[str, int, int]]:
    """A submission for these names, from {video: (numbers, values)}. -> (name, frame, video) of each row, as
    its values tell"""
    template = read_template(put(folder / "t.txt", header(VA), *(f"{name}," for name in names)), VA)
    with open(folder / "p.txt", "wb") as file:
        write_rows(file, template, VA, {video: answers(every_frame(np.array(numbers), values), VA)[0]
                                        for video, (numbers, values) in of_video.items()})
    assert "is right" in check(folder / "p.txt", template, VA)
    rows = [line.split(",") for line in (folder / "p.txt").read_text().splitlines()[1:]]
    return [(name, round(1000 * float(a)), round(10 * float(b))) for name, a, b in rows]


def frames_of(folder, names, numbers) -> list[int]:
    """Of which frame the values in each row are, if a video has values for these numbers."""
    rows = submitted(folder, names, {"1-30-1280x720": (numbers, telltale(numbers, 3))})
    assert [name for name, _, _ in rows] == names and {video for _, _, video in rows} == {3}
    return [frame for _, frame, _ in rows]


def of_one(*frames):
    return names_of("1-30-1280x720", *frames)


def test_a_gap_in_the_templates_numbers_does_not_shift_what_follows(tmp_path):
    assert frames_of(tmp_path, of_one(1, 2, 5, 6, 9), range(1, 10)) == [1, 2, 5, 6, 9]


def test_a_frame_without_values_gets_those_of_the_frame_before_it_and_nothing_shifts(tmp_path):
    assert frames_of(tmp_path, of_one(1, 2, 3, 4, 5, 6, 7), [1, 2, 5, 7]) == [1, 2, 2, 2, 5, 5, 7]


def test_a_gap_at_the_start_gets_the_first_values_and_one_at_the_end_the_last(tmp_path):
    assert frames_of(tmp_path, of_one(1, 2, 3, 4, 5, 6), [3, 4]) == [3, 3, 3, 4, 4, 4]
    assert frames_of(tmp_path, of_one(0, 500), [3, 4]) == [3, 4]               # some copies count from 0


def test_gaps_are_not_filled_across_the_border_of_two_videos(tmp_path):
    names = names_of("136", 1, 2, 3, 4) + names_of("137", 1, 2, 3, 4)
    rows = submitted(tmp_path, names, {"136": ([1, 2], telltale([1, 2], 6)),
                                       "137": ([3, 4], telltale([3, 4], 7))})
    assert [(frame, video) for _, frame, video in rows] == [
        (1, 6), (2, 6), (2, 6), (2, 6), (3, 7), (3, 7), (3, 7), (4, 7)]


def test_videos_whose_names_differ_in_their_end_or_hold_dots_are_kept_apart(tmp_path):
    videos = ["2-30-640x360", "2-30-640x360_left", "2-30-640x360_right", "2-30-640x360-2", "2.30", "2.31",
              "video86_3", "video86", "left", "_right"]
    of_video = {video: ([1, 2], telltale([1, 2], number)) for number, video in enumerate(videos)}
    rows = submitted(tmp_path, [name for video in videos for name in names_of(video, 1, 2)], of_video)
    expected = [(t, k) for k in range(len(videos)) for t in (1, 2)]
    assert [(frame, video) for _, frame, video in rows] == expected


@pytest.mark.parametrize("order", ["descending", "interleaved", "by position", "at random"])
def test_rows_keep_the_templates_order_whatever_it_is(tmp_path, order):
    a, b = names_of("5_left", *range(1, 12)), names_of("5_right", *range(1, 12))
    names = {"descending": a[::-1] + b[::-1], "interleaved": [name for pair in zip(a, b) for name in pair],
             "by position": sorted(a + b, key=lambda name: name.split("/")[1]),
             "at random": [(a + b)[i] for i in np.random.default_rng(0).permutation(22)]}[order]
    numbers = range(1, 12)
    rows = submitted(tmp_path, names, {"5_left": (numbers, telltale(numbers, 1)),
                                       "5_right": (numbers, telltale(numbers, 2))})
    assert rows == [(name, int(name[-9:-4]), 1 + ("right" in name)) for name in names]


def test_a_video_without_any_frame_is_neutral_and_no_row_is_left_at_minus_5(tmp_path):
    for task, zeros in ((VA, "0.000000,0.000000"), (EXPR, "0"), (AU, ",".join("0" * 12))):
        path = put(tmp_path / "t.txt", header(task), *(name + ",-5" * task.width for name in of_one(2, 1)))
        template = read_template(path, task)
        with open(tmp_path / "p.txt", "wb") as file:
            after = write_rows(file, template, task, {"137": np.ones((3, task.width), task.dtype)})
        assert not after and (tmp_path / "p.txt").read_text().splitlines() == [
            header(task), *(f"{name},{zeros}" for name in of_one(2, 1))]


def test_the_expression_header_has_9_fields_and_its_rows_have_2(tmp_path):
    template = read_template(put(tmp_path / "t.txt", *of_one(1, 2)), EXPR)
    with open(tmp_path / "p.txt", "wb") as file:
        write_rows(file, template, EXPR, {"1-30-1280x720": np.array([[4], [7]], np.int8)})
    assert (tmp_path / "p.txt").read_bytes() == (
        b"image_location,Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other\n"
        b"1-30-1280x720/00001.jpg,4\n1-30-1280x720/00002.jpg,7\n")


@pytest.mark.parametrize("seed", range(10))
def test_any_template_gets_what_a_plain_search_for_each_frame_gives(tmp_path, seed):
    rng, of_video, names = np.random.default_rng(seed), {}, []
    for k, video in enumerate(["1", "1_left", "1_right", "a.b_c"]):
        numbers = np.sort(rng.choice(30, rng.integers(1, 20), replace=False) + 1)
        of_video[video] = numbers, telltale(numbers, k)
        names += names_of(video, *(rng.choice(40, 15, replace=False) + 1))
    names = [names[i] for i in rng.permutation(len(names))]
    for name, frame, video in submitted(tmp_path, names, of_video):
        own, number = name.split("/")[0], int(name.split("/")[1][:5])
        numbers = of_video[own][0]
        assert frame == max((n for n in numbers if n <= number), default=numbers[0])
        assert list(of_video)[video] == own


# ---- Answers

def test_valence_and_arousal_are_clipped_and_counted():
    values, clipped = answers(np.array([[-1.2, 0.3], [1, -1], [7, 1.0001]]), VA)
    assert values == pytest.approx(np.array([[-1, 0.3], [1, -1], [1, 1]])) and clipped == 3


def test_the_most_probable_class_and_units_above_one_half_are_told():
    assert answers(np.eye(8)[[3, 0, 7]] + 0.1, EXPR)[0].tolist() == [[3], [0], [7]]
    units = np.linspace(0, 1, 12)[None]
    assert answers(units, AU)[0].tolist() == [[0] * 6 + [1] * 6]
    assert answers(np.full((1, 12), 0.5), AU)[0].sum() == 0


# ---- Templates

@of_each_task
def test_both_kinds_of_template_with_any_line_ends_are_read_alike(tmp_path, task):
    names = ["1.2_left/00002.png", "1.2_left/00001.JPG", "cropped/7/00001.jpg", "video86_3/00010.jpg"]
    dummy = [f"{name}{',0' * task.width}" for name in names]
    sample = [f"{name}," for name in names]
    found = set()
    for rows in (dummy, sample, names, [f"{name},-5" + ",-5" * (task.width - 1) for name in names]):
        for top in ([header(task)], ["image_location,"], ["Image_Location"], []):
            for end, mark in (("\n", ""), ("\r\n", "\ufeff")):
                text = mark + end.join([*top, *rows, "", ""])
                (tmp_path / "t.txt").write_bytes(text.encode())
                template = read_template(tmp_path / "t.txt", task)
                assert template.first_line == 1 + len(top) and template.rows == dict(zip(names, range(4)))
                found.add((*template.names, *template.videos.items()))
    assert found == {(*names, ("1.2_left", 2), ("cropped/7", 1), ("video86_3", 1))}


# ---- From a run

ROWS = {"1": 47, "2_left": 27, "2_right": 24, "9": 4, "8": 3, "95": 2, "96": 5}       # of each video
FEATURES = {"1": 45, "2_left": 27, "2_right": 24, "9": 4}                 # 9 is shorter than the window
OPTIONS = {"template": "va.txt", "out": "p.txt", "smooth": 0, "predictions": ""}


def write_task(folder, task):
    """A finished training of a task on the features of `folder`."""
    config, runs = settings(folder), folder / "runs/tiny"
    model = SegmentModel(stages.FEATURE_WIDTH, len(task.outputs), **asdict(config.temporal))
    stages.write_result(runs / f"task_{task.name}", ["segments", "temporal", "task", "run.seed"], config,
                        {"setting": "task.features", "stage": "features"}, read_record(runs / "features"),
                        {"best.pt": model}, {"training videos": ["1"]})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three trained tasks and random features. 8 and 95 have no frames, 96 has no face. -> the folder"""
    folder = stages.write(tmp_path_factory.mktemp("submission"))
    features = folder / "runs/tiny/features"
    (features / "96.npy").unlink()
    extracted = {**{video: {"frames": frames, "faces": 1} for video, frames in FEATURES.items()},
                 "96": {"frames": 4, "faces": 0}}
    (features / "videos.json").write_text(json.dumps(extracted))
    names = [name for video, rows in ROWS.items() for name in names_of(video, *range(1, rows + 1))]
    for task in TASKS.values():
        write_task(folder, task)
        put(folder / f"{task.name}.txt", header(task), *(f"{name}," for name in names))
    return folder


def start(folder, task, *overrides, world=1, **options):
    """The main of the command. -> the lines of the submission"""
    given = argparse.Namespace(**OPTIONS | {"template": f"{task.name}.txt"} | options)
    with contextlib.chdir(folder):
        submission_values.main(settings(folder, *overrides), Team(0, world, torch.device("cpu")), task, given)
    return (folder / given.out).read_text().splitlines()


def expected(folder, task, smooth=0) -> list[str]:
    """The lines of the submission for the template of `trained`, from definitions."""
    config, lines = settings(folder), [header(task)]
    model = SegmentModel(stages.FEATURE_WIDTH, len(task.outputs), **asdict(config.temporal)).eval()
    model.load_state_dict(read_checkpoint(folder / f"runs/tiny/task_{task.name}/best.pt")["model"])
    for video, rows in ROWS.items():
        values = np.zeros((1, len(task.outputs)))
        if video in FEATURES:
            features = np.load(folder / f"runs/tiny/features/{video}.npy")
            assert len(features) == FEATURES[video]
            outputs = torch.from_numpy(scoring.predict(model, features, 20, 12, 4, ALONE)).double()
            in_units = {"va": lambda x: x, "expr": lambda x: x.softmax(1), "au": torch.sigmoid}[task.name]
            values = in_units(outputs)
            values = np.stack([values.numpy()[max(0, t - smooth):t + smooth + 1].mean(axis=0)
                               for t in range(len(values))])
        for frame in range(rows):
            row = values[min(frame, len(values) - 1)]
            told = {"va": lambda: [f"{x:.6f}" for x in row.clip(-1, 1)], "expr": lambda: [f"{row.argmax()}"],
                    "au": lambda: [f"{int(x > 0.5)}" for x in row]}[task.name]()
            lines.append(f"{video}/{frame + 1:05d}.jpg,{','.join(told)}")
    return lines


@of_each_task
@pytest.mark.parametrize("smooth", [0, 3])
def test_each_row_is_what_the_trained_task_makes_of_the_videos_features(trained, task, smooth, capsys):
    assert start(trained, task, smooth=smooth, out=f"{task.name}_p.txt") == expected(trained, task, smooth)
    neutral = {"va": "0, 0", "expr": "Neutral", "au": "no action unit"}[task.name]
    assert capsys.readouterr().out.splitlines() == [
        f"{task.name}.txt: 112 rows of 7 videos",
        f"values from runs/tiny/task_{task.name}/best.pt on the features in runs/tiny/features",
        f"  neutral values ({neutral}) for 10 rows of 8 (no frames among the features), "
        "95 (no frames among the features), 96 (no readable face)",
        "  after a video's last frame, with its values: 2 rows of 1 (2)",
        f"{task.name}_p.txt is right: 112 rows of 7 videos, in the order of {task.name}.txt"]


def test_outputs_beyond_1_are_clipped_and_counted(trained, monkeypatch, capsys):
    def predicted(self, features):
        return np.full((len(features), 2), [[1.5, -0.25]], np.float32)
    monkeypatch.setattr(scoring.Trained, "predict", predicted)
    lines = start(trained, VA, out="clipped.txt")
    assert set(line.split(",", 1)[1] for line in lines[1:]) == {"1.000000,-0.250000", "0.000000,0.000000"}
    assert "  clipped to -1 to 1: 100 of 200 numbers\n" in capsys.readouterr().out


def test_a_row_that_the_template_has_again_is_written_again_and_said(trained, capsys):
    names = names_of("9", 2, 1, 2)
    put(trained / "again.txt", *names)
    lines = start(trained, VA, template="again.txt", out="again_p.txt")
    assert [line.split(",")[0] for line in lines[1:]] == names and lines[1] == lines[3]
    assert "  rows that the template has again: 1, the first is 9/00002.jpg\n" in capsys.readouterr().out


def test_folders_above_a_video_do_not_matter_unless_they_tell_two_videos_apart(trained):
    put(trained / "deep.txt", *(f"cropped/{name}" for name in names_of("2_left", 1, 9)))
    lines = start(trained, VA, template="deep.txt", out="deep_p.txt")
    assert [line.removeprefix("cropped/") for line in lines[1:]] == [
        line for line in expected(trained, VA) if line.startswith(("2_left/00001", "2_left/00009"))]
    put(trained / "deep.txt", *names_of("a/9", 1), *names_of("b/9", 1))
    with pytest.raises(ValueError, match="features: 9 may be the template's a/9 or b/9"):
        start(trained, VA, template="deep.txt", out="deep_p.txt")


def test_a_video_is_found_by_its_whole_name_first_then_by_its_last_part():
    known = ["a/1", "1", "b/2", "3_left"]
    assert matched(["1", "a/1", "2", "c/3_left", "3", "3_right"], known, "t.csv") == {
        "1": "1", "a/1": "a/1", "2": "b/2", "c/3_left": "3_left"}
    with pytest.raises(ValueError, match="t.csv: a/1 and 1 may both be the template's c/1"):
        matched(["c/1"], known, "t.csv")
    with pytest.raises(ValueError, match="t.csv: b/2 may be the template's 2 or c/2"):
        matched(["2", "c/2"], known, "t.csv")


def test_features_that_were_made_elsewhere_serve_too(trained, tmp_path, capsys):
    for video in ("2_left", "9"):
        shutil.copy(trained / f"runs/tiny/features/{video}.npy", tmp_path)
    shutil.copy(trained / "runs/tiny/features/made_of.json", tmp_path)
    (tmp_path / "videos.json").write_text(json.dumps({video: {"faces": 1} for video in ("2_left", "9")}))
    lines = start(trained, VA, f"task.features={tmp_path}", out="elsewhere.txt")
    own = [line for line in expected(trained, VA) if line.startswith(("2_left/", "9/"))]
    assert [line for line in lines if line.startswith(("2_left/", "9/"))] == own
    assert "for 81 rows of 1 (no frames among the features), 2_right (no" in capsys.readouterr().out


# ---- From a table

@of_each_task
def test_the_table_of_predictions_gives_the_submission_of_the_run(trained, task, tmp_path, capsys):
    columns, rows = [name for each in TASKS.values() for name in each.outputs], []
    for video in FEATURES:
        cells = []
        for each in TASKS.values():
            trained_task = scoring.load(trained / f"runs/tiny/task_{each.name}/best.pt")
            features = np.load(trained / f"runs/tiny/features/{video}.npy")
            cells.append(in_units(trained_task.predict(features), each))
        for frame, values in enumerate(np.concatenate(cells, axis=1)):
            rows.append(f"{video},{frame + 1}," + ",".join(f"{value:.9f}" for value in values))
    put(tmp_path / "table.csv", "video,frame," + ",".join(columns), *rows, "96,1" + "," * len(columns))
    lines = start(trained, task, out=f"from_table_{task.name}.txt", predictions=str(tmp_path / "table.csv"))
    assert lines == expected(trained, task)
    said = capsys.readouterr().out
    assert "10 rows of 8 (not in the table), 95 (not in the table), 96 (not in the table)\n" in said


def test_gaps_in_a_table_are_filled_from_its_own_video_by_number(trained, tmp_path):
    put(tmp_path / "table.csv", "video,frame,valence,arousal", "9,3,0.3,0", "9,2,0.2,0", "10,1,.9,0",
        "7,9,.9,0")
    put(tmp_path / "t.txt", *names_of("9", 1, 2, 3, 4, 9))
    lines = start(trained, VA, template=str(tmp_path / "t.txt"), out=str(tmp_path / "p.txt"),
                  predictions=str(tmp_path / "table.csv"))
    assert [line.split(",")[1] for line in lines[1:]] == [f"0.{t}00000" for t in (2, 2, 3, 3, 3)]


def test_a_submission_may_serve_as_a_table_for_another_template(trained):
    lines = start(trained, EXPR, out="first.txt")
    put(trained / "fewer.txt", *(f"{line.split(',')[0]}," for line in lines[:0:-7]))
    again = start(trained, EXPR, template="fewer.txt", out="second.txt",
                  predictions=str(trained / "first.txt"))
    assert again == [lines[0], *lines[:0:-7]]


# ---- What is refused, and what is kept

def test_nothing_is_written_without_a_trained_task_fresh_features_or_a_known_video(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    put(tmp_path / "other.txt", *names_of("137", 1), *names_of("96", 1))
    runs = tmp_path / "runs/tiny"

    def refused(message, *overrides, **options):
        with pytest.raises(ValueError, match=message):
            start(tmp_path, VA, *overrides, out="none.txt", **options)
        assert not (tmp_path / "none.txt").exists()
    refused(r"other\.txt: none of its videos can be predicted: 137 \(no frames among the features\), 96 \(no "
            r"readable face\); is it the template of other videos\? .* runs/tiny/features",
            template="other.txt")
    refused("smooth: got -1, expected 0 frames or more", smooth=-1)
    refused("written by one process; start it with python", world=2)
    refused(r"(?s)made with other settings.*segments\.window: was 20, now 15", "segments.window=15")
    other = tmp_path / "features_of_another_vit"
    shutil.copytree(runs / "features", other)
    record = json.loads((other / "made_of.json").read_text())
    record["from"]["checksum"] = 1
    (other / "made_of.json").write_text(json.dumps(record))
    refused(r"best\.pt: trained on features of another ViT", f"task.features={other}")
    (runs / "features/9.npy").unlink()
    refused(r"features/9\.npy is gone; run extract_features\.py")
    shutil.copy(other / "made_of.json", runs / "features/made_of.json")
    refused(r"runs/tiny/features was made from finetune \(checksum 1\), but .*finetune is now")
    (runs / "features/metrics.json").unlink()
    refused(r"features/metrics\.json not found; make it with: python .*extract_features\.py")
    (runs / "task_va/best.pt").unlink()
    refused(r"task_va/best\.pt is gone, though its stage is finished")
    (runs / "task_va/metrics.json").unlink()
    refused(r"task_va/best\.pt not found; make it with: python .*train_task\.py --task va")


def test_a_submission_is_made_again_whole_and_any_other_file_is_left_alone(trained, tmp_path):
    out = tmp_path / "p.txt"
    first = start(trained, VA, out=str(out))
    put(out, header(VA), "old/00001.jpg,-5,-5")
    assert start(trained, VA, out=str(out)) == first
    out.write_text("")
    assert start(trained, VA, out=str(out)) == first
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    for content in (f"{header(EXPR)}\n".encode(), b"my notes\n", b"\xff\xfe", b"valence,arousal\n0,0\n"):
        out.write_bytes(content)
        with pytest.raises(ValueError, match=r"p\.txt exists and is no submission of --task va; delete"):
            start(trained, VA, out=str(out))
        assert out.read_bytes() == content


def test_a_kill_in_the_middle_of_writing_leaves_the_former_submission(trained, tmp_path, monkeypatch):
    out = tmp_path / "p.txt"
    start(trained, VA, out=str(out))
    before = out.read_bytes()

    def broken(file, *arguments):
        file.write(b"half")
        raise OSError("disk")
    monkeypatch.setattr(submission_values, "write_rows", broken)
    with pytest.raises(OSError, match="disk"):
        start(trained, VA, out=str(out))
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("out, message", [
    ("", "got '', expected the name of a file, like predictions.txt"), ("new/", "got 'new/', expected"),
    ("runs", "got 'runs', expected"), ("va.txt", "va.txt is the template itself; give another name"),
    ("./va.txt", "./va.txt is the template itself")])
def test_an_output_that_is_no_file_or_the_template_is_refused(trained, out, message):
    before = (trained / "va.txt").read_bytes()
    with pytest.raises(ValueError, match=f"--out: {message}"):
        start(trained, VA, out=out)
    assert (trained / "va.txt").read_bytes() == before and not (trained / "new").exists()
