"""The records of the tasks; label files as they stand; folds of scenes; units and smoothing."""

import numpy as np
import pytest

from files import label_file, write
from labels import (AU, EXPR, FOLDS, TASKS, VA, deal, for_metric, has_labels, hold_out, in_units, label_files,
                    read_labels, scene, smoothed, split, targets)

HEADER = {"va": "valence,arousal",
          "expr": "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other",
          "au": "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"}
ROWS = {"va": "0,0", "expr": "1", "au": ",".join("0" * 12)}


# ---- The records

def test_the_records_are_those_of_aff_wild2_and_of_table_1():
    assert [(name, ",".join(task.outputs)) for name, task in TASKS.items()] == [*HEADER.items()]
    assert [task.folders for task in (VA, EXPR, AU)] == [
        ("VA_Estimation_Challenge",), ("EXPR_Classification_Challenge", "EXPR_Recognition_Challenge"),
        ("AU_Detection_Challenge",)]
    ranges = [(task.lowest, task.highest, task.invalid, task.dtype) for task in (VA, EXPR, AU)]
    assert ranges == [(-1, 1, -5, np.float32), (0, 7, -1, np.int8), (0, 1, -1, np.int8)]
    assert [task.epochs for task in (VA, EXPR, AU)] == [40, 10, 30]
    assert [task.zero_loss for task in (VA, EXPR, AU)] == pytest.approx([2, 2.0794415, 0.6931472])
    assert VA.paper["valence"] == (.5385, .6404, .4926, .5863, .5403)
    assert VA.paper["arousal"] == (.6224, .5651, .6015, .6812, .6342)
    assert EXPR.paper == {"mean": (.4561, .4478, .4463, .4583, .4506)}
    assert AU.paper == {"mean": (.5762, .5566, .5018, .5556, .5819)}
    assert [task.labelled_faces for task in (VA, EXPR, AU)] == [2_030_230, 865_849, 1_802_530]


# ---- Label files

@pytest.mark.parametrize("end, bom, tail", [("\n", "", ()), ("\r\n", "\ufeff", ("", " ")), ("\r", "", ())])
@pytest.mark.parametrize("task, rows, expected", [
    (VA, ["0.5,-0.25", "-5,-5", "1,-1", "-5.0,0.125", "-5,-5"],
     [[.5, -.25], [-5, -5], [1, -1], [-5, .125], [-5, -5]]),
    (EXPR, ["0", "7", "-1", "3", "7", " 2"], [0, 7, -1, 3, 7, 2]),
    (AU, ["0,1,0,1,0,1,0,1,0,1,0,1", ",".join(["-1"] * 12), "1,-1,0,0,0,0,0,0,0,0,0,0"],
     [[0, 1] * 6, [-1] * 12, [1, -1] + [0] * 10])], ids=TASKS)
def test_labels_are_read_as_they_stand_and_invalid_codes_become_target_0_and_not_valid(
        tmp_path, task, rows, expected, end, bom, tail):
    read = read_labels(write(tmp_path / "v.txt", HEADER[task.name], *rows, *tail, end=end, bom=bom), task)
    assert read.dtype == task.dtype and np.array_equal(read, expected)
    (target, valid), known = targets(read, task), np.array(expected) != task.invalid
    assert target.dtype == task.dtype and np.array_equal(valid, known)
    assert np.array_equal(target, np.where(known, expected, 0))


def test_a_header_may_have_spaces_and_another_case_and_a_file_may_have_no_frames(tmp_path):
    assert read_labels(write(tmp_path / "v.txt", "Valence, Arousal", "0, 1"), VA).tolist() == [[0, 1]]
    for task, shape in ((VA, (0, 2)), (EXPR, (0,)), (AU, (0, 12))):
        assert read_labels(write(tmp_path / "v.txt", HEADER[task.name]), task).shape == shape


@pytest.mark.parametrize("content", ["\ufeffvalence".encode("utf-16-le"), b"\x93NUMPY\1\0",
                                     b"valence,arousal\n0,\xe9"])
def test_a_file_that_is_no_text_is_refused_with_the_header_that_is_expected(tmp_path, content):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(ValueError, match="v.txt: no text in UTF-8; expected one with the header valence,ar"):
        read_labels(tmp_path / "v.txt", VA)


@pytest.mark.parametrize("task, lines, message", [
    (VA, [], "header is '', expected 'valence,arousal'"),
    (VA, ["arousal,valence", "0,0"], "header is 'arousal,valence', expected 'valence,arousal'"),
    (VA, [HEADER["va"], "0,0", "0"], "line 3: '0', expected 2 numbers from -1 to 1, or -5"),
    (VA, [HEADER["va"], "0,0", "", "0,0"], "line 3: ''"),
    (VA, [HEADER["va"], "0,0", "nan,0", "nan,0"], "line 3: 'nan,0'"),
    (EXPR, [HEADER["expr"], "7", "8"], "line 3: '8', expected 1 whole number from 0 to 7, or -1"),
    (EXPR, [HEADER["expr"], "-5"], "line 2: '-5'"),
    (AU, [HEADER["au"], "2" + ",0" * 11], "line 2: '2,0.*expected 12 whole numbers from 0 to 1, or -1")])
def test_a_broken_label_file_is_refused_with_its_name_and_line(tmp_path, task, lines, message):
    path = write(tmp_path / "v.txt", *lines)
    with pytest.raises(ValueError, match=message) as refusal:
        read_labels(path, task)
    assert str(refusal.value).startswith(str(path))


def test_the_folder_of_a_task_is_found_under_every_spelling_or_what_is_missing_named(tmp_path, monkeypatch):
    for folder in EXPR.folders:
        for part, names in (("Train_Set", "ba"), ("Validation_Set", "c")):
            for name in names:
                write(tmp_path / folder / folder / part / f"{name}.txt", HEADER["expr"])
            write(tmp_path / folder / folder / part / "._a.txt", "left by another system")
        found = label_files(tmp_path / folder, EXPR)
        assert {part: list(files) for part, files in found.items()} == {"Train_Set": ["a", "b"],
                                                                        "Validation_Set": ["c"]}
        assert has_labels(tmp_path / folder, EXPR) and not has_labels(tmp_path / folder, VA)
    write(tmp_path / folder / EXPR.folders[0] / "Train_Set/x.txt")                     # a second spelling
    write(tmp_path / AU.folders[0] / "Train_Set/x.txt")
    monkeypatch.chdir(tmp_path / EXPR.folders[0])                                      # "" is not this folder
    for task, root, message in ((VA, tmp_path, "data.labels: 0 folders VA_Estimation_Challenge in .*; set "),
                                (EXPR, "", "data.labels: 0 folders EXPR_Classification_.* or EXPR_R.* in ''"),
                                (EXPR, tmp_path / folder, "data.labels: 2 folders EXPR_"),
                                (AU, tmp_path, r"AU_Detect.*: expected label files, .* found \[1, 0\]")):
        with pytest.raises(ValueError, match=message):
            label_files(root, task)


# ---- Folds

def random_labels(root, seed, tasks, count=40) -> dict[str, dict[str, str]]:
    """Label files of `count` scenes of very different lengths, some of two people, in the official sets of
    `tasks` at random, so that a scene is in both sets, in the training set of one task and the validation set
    of another, or in one task only. -> {task: {video: its official set}}"""
    rng, official = np.random.default_rng(seed), {name: {} for name in tasks}
    for i in range(count):
        endings = [("",), ("_left", "_right"), ("_left", "_right", ""), ("_right",)][rng.integers(4)]
        for video in [f"{i}-30_x.y{ending}" for ending in endings]:
            frames = int(rng.lognormal(3, 1)) + 1
            for name in tasks:
                part, rows = ("Train_Set", "Validation_Set")[rng.integers(2)], frames + int(rng.integers(3))
                if rng.random() < 0.7:
                    official[name][video] = part
                    label_file(root, TASKS[name], part, video, [*[ROWS[name]] * rows, "", " "])
    return official


def test_only_a_last_left_or_right_is_cut_from_a_name():
    for video, name in (("136_left", "136"), ("28-30-1280x720-2_right", "28-30-1280x720-2"), ("left", "left"),
                        ("video86_3", "video86_3"), ("a_left_2", "a_left_2"), ("a_left_right", "a_left")):
        assert scene(video) == name


@pytest.mark.parametrize("seed, tasks", [(0, [*TASKS]), (1, [*TASKS]), (2, ["va"]), (3, ["expr", "au"])])
def test_folds_validate_each_video_once_and_no_scene_is_on_both_sides_whatever_the_task(
        tmp_path, seed, tasks):
    official, held_out = random_labels(tmp_path, seed, tasks), {name: [] for name in tasks}
    for fold in FOLDS[1:]:
        sides = ([], [])
        for name in tasks:
            train, val = split(tmp_path, TASKS[name], fold)
            assert list(train) == sorted(train) and list(val) == sorted(val)
            assert {video: (file.parent.name, file.name) for video, file in (train | val).items()} == {
                video: (part, f"{video}.txt") for video, part in official[name].items()}
            sides[0].extend(map(scene, train)), sides[1].extend(map(scene, val))
            held_out[name] += val
        assert not set(sides[0]) & set(sides[1])
    assert all(sorted(held_out[name]) == sorted(official[name]) for name in tasks)
    task, (video, *_) = TASKS[name], official[name]
    for part in ("Train_Set", "Validation_Set"):
        write(tmp_path / task.folders[0] / part / f"{video}.txt", HEADER[name], ROWS[name])
    for fold in FOLDS:
        with pytest.raises(ValueError, match=rf"Train_Set/{video}.txt and .*Validation_Set/{video}.txt show "
                           rf"one scene, and .*; 1 of .* on: {video}. Remove one of the two files$"):
            split(tmp_path, task, fold)


@pytest.mark.parametrize("seed", range(5))
def test_each_scene_is_dealt_to_the_quarter_where_it_adds_least_to_the_squared_loads(seed):
    rng, loads = np.random.default_rng(seed), np.zeros((4, 3))
    frames = {name: {f"{i}": int(rng.lognormal(8, 1)) for i in range(100) if rng.random() < 0.7}
              for name in TASKS}
    share = {f"{i}": np.array([frames[name].get(f"{i}", 0) / sum(frames[name].values()) for name in TASKS])
             for i in range(100)}
    quarter = deal(frames)
    for name in sorted(quarter, key=lambda name: -share[name].sum()):
        squares = [((loads[k] + share[name]) ** 2 - loads[k] ** 2).sum() for k in range(4)]
        assert squares[quarter[name]] == pytest.approx(min(squares), rel=1e-9)
        loads[quarter[name]] += share[name]


def test_too_few_scenes_for_a_fold_are_refused(tmp_path):
    for part, video in (("Train_Set", "1"), ("Validation_Set", "2"), ("Validation_Set", "2_left")):
        write(tmp_path / VA.folders[0] / part / f"{video}.txt", HEADER["va"], "0,0")
    with pytest.raises(ValueError, match="fold 3 of 2 scenes leaves nothing to validate on; take fold 0, or"):
        split(tmp_path, VA, 3)
    (tmp_path / VA.folders[0] / "Train_Set/1.txt").rename(tmp_path / VA.folders[0] / "Train_Set/2_right.txt")
    for fold, message in ((1, "fold 1 of 1 scenes leaves nothing to train on"),
                          (0, "Train_Set/2_right.txt and .*Validation_Set/2.txt show one scene, .*; 2 of 2 "
                           ".* on: 2, 2_left. Remove one of the two files, or take folds")):
        with pytest.raises(ValueError, match=message):
            split(tmp_path, VA, fold)


def test_held_out_scenes_are_whole_large_and_small_alike(tmp_path):
    files = {f"{i:02d}{person}": write(tmp_path / f"{i:02d}{person}.txt", HEADER["va"], *["0,0"] * (i + 1))
             for i in range(20) for person in ("_left", "_right")}
    assert hold_out(files, 0) == (files, {})
    for share, taken in ((0.25, [18, 14, 10, 6, 2]), (0.1, [15, 5]), (0.15, [16, 10, 3])):
        kept, held = hold_out(files, share)
        assert sorted({int(scene(video)) for video in held}, reverse=True) == taken
        assert len(held) == 2 * len(taken) and kept | held == files and not kept.keys() & held.keys()
    for share, count in ((0.01, 0), (0.99, 20)):
        with pytest.raises(ValueError, match=f"^held_out={share} takes {count} of 20 training scenes; "):
            hold_out(files, share)


# ---- Units

def test_outputs_are_told_as_they_are_by_the_softmax_or_by_the_sigmoid_however_large():
    x = np.random.default_rng(0).normal(0, 2, (50, 8))
    assert in_units(x.astype(np.float32), VA).dtype == np.float64 and np.array_equal(in_units(x, VA), x)
    assert in_units(x, EXPR) == pytest.approx(np.exp(x) / np.exp(x).sum(axis=1, keepdims=True))
    assert in_units(x, AU) == pytest.approx(1 / (1 + np.exp(-x)))
    outputs = np.tile([[1e4], [-1e4], [1e300], [-1e300]], 8)
    outputs[:, 0] *= -1
    for task in (EXPR, AU):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            p = in_units(outputs, task)
        assert ((0 <= p) & (p <= 1)).all() and p[:, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
@pytest.mark.parametrize("k", [0, 1, 3, 100])
def test_smoothing_is_the_mean_over_the_frames_around_each_one(frames, k):
    values = np.random.default_rng(0).normal(0, 2, (frames, 2))
    expected = [values[max(t - k, 0):t + k + 1].mean(axis=0) for t in range(frames)]
    assert smoothed(values, k) == pytest.approx(np.array(expected), abs=1e-12)
    still = np.full((50_000, 1), np.float32(0.1))                              # sums in float32 would drift
    assert np.abs(smoothed(still, k) - still).max() < 1e-9


def test_an_action_unit_is_present_above_one_half():
    values = np.tile([[0.2], [0.5], [0.7]], (1, 12))
    assert np.array_equal(for_metric(values, AU) > 0, values > 0.5)
    assert all(for_metric(values, task) is values for task in (VA, EXPR))
