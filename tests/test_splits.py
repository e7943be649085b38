"""Which videos a fold trains on and validates on: folds 1 to 4 are one split of scenes over all tasks."""

import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest

import splits
from labels import AU, EXPR, TASKS, VA, label_files
from splits import count_rows, deal, scene, scene_frames, split
from test_data import label_file
from tiny import ROOT

ROWS = {"va": "0,0", "expr": "1", "au": ",".join("0" * 12)}
QUARTERS = (1, 2, 3, 4)


def random_labels(root, seed, tasks=TASKS, order=1, end="\n", count=40) -> dict[str, dict[str, str]]:
    """Label files of `count` scenes of very different lengths, some of two people, in the official sets of
    `tasks` at random, so that a scene is in both sets, in the training set of one task and the validation set
    of another, or in one task only. -> {task: {video: its official set}}"""
    rng, official = np.random.default_rng(seed), {name: {} for name in tasks}
    files = []
    for i in range(count):
        endings = [("",), ("_left", "_right"), ("_left", "_right", ""), ("_right",)][rng.integers(4)]
        for video in [f"{i}-30_x.y{ending}" for ending in endings]:
            frames = int(rng.lognormal(3, 1)) + 1
            for name in TASKS:
                part, has = ("Train_Set", "Validation_Set")[rng.integers(2)], rng.random() < 0.7
                if name in tasks and has:
                    official[name][video] = part
                    files.append((TASKS[name], part, video, frames + int(rng.integers(3))))
    for task, part, video, frames in files[::order]:
        text = end.join([",".join(task.outputs), *[ROWS[task.name]] * frames, "", " "])
        path = root / task.folders[0] / part / f"{video}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")
    return official


def scenes(videos) -> set[str]:
    return {scene(video) for video in videos}


# ---- One task

@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_fold_0_is_the_official_split(tmp_path, task):
    official = random_labels(tmp_path, 0)[task.name]
    train, val = split(tmp_path, task, 0)
    assert {v: "Train_Set" for v in train} | {v: "Validation_Set" for v in val} == official
    assert all(file.parent.name == official[v] for v, file in (train | val).items())


def test_the_longest_scenes_are_dealt_first(tmp_path):
    for name, frames in zip("abcdef", (4, 4, 4, 20, 20, 20)):
        part = "Train_Set" if name < "d" else "Validation_Set"
        label_file(tmp_path / VA.folders[0] / part / f"{name}.txt", VA, *["0,0"] * frames)
    held_out = ["".join(split(tmp_path, VA, fold)[1]) for fold in QUARTERS]
    assert held_out == ["d", "e", "f", "abc"]


def test_with_one_task_the_quarters_differ_by_no_more_than_one_scene():
    rng = np.random.default_rng(0)
    for _ in range(100):
        frames = {f"{i}": {"au": int(rng.lognormal(4, 1.5))} for i in range(rng.integers(4, 60))}
        quarter, loads = deal(frames), [0] * 4
        for name, of_scene in frames.items():
            loads[quarter[name]] += of_scene["au"]
        assert max(loads) - min(loads) <= max(of_scene["au"] for of_scene in frames.values())


@pytest.mark.parametrize("video, name", [
    ("136_left", "136"), ("28-30-1280x720-2_right", "28-30-1280x720-2"), ("video86_3", "video86_3"),
    ("left", "left"), ("a_left_2", "a_left_2"), ("a_left_right", "a_left")])
def test_only_a_last_left_or_right_is_cut_from_a_name(video, name):
    assert scene(video) == name


# ---- All tasks

@pytest.mark.parametrize("seed", range(3))
def test_folds_1_to_4_validate_each_video_of_each_task_once(tmp_path, seed):
    for name, official in random_labels(tmp_path, seed).items():
        held_out = []
        for fold in QUARTERS:
            train, val = split(tmp_path, TASKS[name], fold)
            assert not train.keys() & val.keys() and train.keys() | val.keys() == official.keys()
            assert list(train) == sorted(train) and list(val) == sorted(val)
            assert all(file.stem == video and file.exists() for video, file in (train | val).items())
            assert all(file.parent.parent.name == TASKS[name].folders[0] for file in train.values())
            held_out += val
        assert sorted(held_out) == sorted(official)


@pytest.mark.parametrize("seed", range(3))
def test_no_scene_is_on_both_sides_of_a_fold_whatever_the_task(tmp_path, seed):
    random_labels(tmp_path, seed)
    for fold in QUARTERS:
        parts = [split(tmp_path, task, fold) for task in TASKS.values()]
        trained = set().union(*(scenes(train) for train, _ in parts))
        validated = set().union(*(scenes(val) for _, val in parts))
        assert not trained & validated


def test_each_quarter_gets_about_a_quarter_of_each_task_and_some_scene_of_each():
    rng, worst = np.random.default_rng(1), []
    for _ in range(50):
        frames = {}
        for i in range(100):
            length = int(rng.lognormal(8, 1))
            frames[f"{i}"] = {name: length for name in TASKS if rng.random() < 0.7}
        quarter = deal(frames)
        assert quarter.keys() == frames.keys() and set(quarter.values()) == {0, 1, 2, 3}
        for task in TASKS:
            loads = np.zeros(4)
            for name, of_scene in frames.items():
                loads[quarter[name]] += of_scene.get(task, 0)
            largest = max(of_scene.get(task, 0) for of_scene in frames.values()) / loads.sum()
            worst.append(np.abs(loads / loads.sum() - 0.25).max() / largest)
            assert loads.min() > 0
    assert max(worst) < 1 and np.mean(worst) < 0.2       # in shares of the task's largest scene


def test_a_task_that_is_rare_is_still_dealt_to_all_quarters():
    frames = {f"{i}": {"va": 100} | ({"au": 1} if i < 4 else {}) for i in range(40)}
    quarter = deal(frames)
    assert {quarter[f"{i}"] for i in range(4)} == {0, 1, 2, 3}


@pytest.mark.parametrize("tasks", [("va",), ("expr", "au")])
def test_a_task_without_a_folder_of_labels_is_left_out(tmp_path, tasks):
    official = random_labels(tmp_path, 0, tasks)
    for name in tasks:
        held_out = [video for fold in QUARTERS for video in split(tmp_path, TASKS[name], fold)[1]]
        assert sorted(held_out) == sorted(official[name])
    with pytest.raises(ValueError, match="data.labels: no "):
        split(tmp_path, next(task for task in TASKS.values() if task.name not in tasks), 1)


def test_folds_depend_neither_on_the_order_of_the_disk_nor_on_line_ends(tmp_path):
    random_labels(tmp_path / "a", 0), random_labels(tmp_path / "b", 0, order=-1, end="\r\n")
    for task in TASKS.values():
        for fold in splits.FOLDS:
            a, b = split(tmp_path / "a", task, fold), split(tmp_path / "b", task, fold)
            assert [list(part) for part in a] == [list(part) for part in b]


def test_other_names_for_the_scenes_change_nothing_but_ties():
    rng = np.random.default_rng(2)
    frames = {f"{i:02d}": {"va": int(count), "au": int(count) // 2}
              for i, count in enumerate(rng.permutation(2000)[:30])}
    quarter, renamed = deal(frames), deal({f"x{name[::-1]}": row for name, row in frames.items()})
    assert renamed == {f"x{name[::-1]}": place for name, place in quarter.items()}


@pytest.mark.parametrize("content, rows", [
    (b"", 0), (b"valence,arousal", 0), (b"valence,arousal\n", 0), (b"valence,arousal\r\n0,0\r\n", 1),
    (b"valence,arousal\n0,0\n-5,-5\n\n  \n", 2), (b"valence,arousal\n0,0\n1,1", 2)])
def test_the_frames_of_a_label_file_are_its_rows(tmp_path, content, rows):
    (tmp_path / "a.txt").write_bytes(content)
    assert count_rows(tmp_path / "a.txt") == rows


def test_scenes_are_counted_over_people_and_official_sets(tmp_path):
    for part, video, frames in (("Train_Set", "7_left", 3), ("Validation_Set", "7_right", 4),
                                ("Train_Set", "7", 5), ("Train_Set", "8", 2)):
        label_file(tmp_path / AU.folders[0] / part / f"{video}.txt", AU, *[ROWS["au"]] * frames)
    for part, video in (("Train_Set", "8"), ("Validation_Set", "9_left")):
        label_file(tmp_path / EXPR.folders[1] / part / f"{video}.txt", EXPR, 1, 1, 1, 1)
    assert scene_frames(tmp_path) == {"7": {"au": 12}, "8": {"au": 2, "expr": 4}, "9": {"expr": 4}}


# ---- The command

def said_by_the_command(tmp_path, capsys, monkeypatch, labels) -> tuple[int, list[str], str]:
    (tmp_path / "my.yaml").write_text(f"data: {{labels: '{labels}'}}")
    monkeypatch.setattr(sys, "argv", ["splits.py", "--config", str(tmp_path / "my.yaml")])
    code = 0
    try:
        runpy.run_path(splits.__file__, run_name="__main__")
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_the_folds_are_printed_with_videos_and_frames_of_each_task(tmp_path, capsys, monkeypatch):
    random_labels(tmp_path / "labels", 0)
    code, (header, *rows, last), err = said_by_the_command(tmp_path, capsys, monkeypatch, tmp_path / "labels")
    assert code == 0 and err == "" and len(rows) == 15
    assert header.split() == ["fold", "task", "training", "validation", "its", "frames", "share"]
    for fold in splits.FOLDS:
        for task in TASKS.values():
            train, val = split(tmp_path / "labels", task, fold)
            frames, others = (sum(map(count_rows, part.values())) for part in (val, train))
            assert rows.pop(0).split() == [f"{fold}", task.name, f"{len(train)}", f"{len(val)}", f"{frames}",
                                           f"{frames / (frames + others):.1%}"]
    assert last.startswith(f"{len(scene_frames(tmp_path / 'labels'))} scenes over all tasks")


def test_folds_of_too_few_scenes_are_named_and_missing_labels_refused(tmp_path, capsys, monkeypatch):
    for part, video in (("Train_Set", "1"), ("Validation_Set", "2"), ("Validation_Set", "2_left")):
        label_file(tmp_path / VA.folders[0] / part / f"{video}.txt", VA, "0,0")
    code, lines, err = said_by_the_command(tmp_path, capsys, monkeypatch, tmp_path)
    assert code == 0 and err == "" and [line.split()[0] for line in lines[:-1]] == ["fold", *"01234"]
    assert lines[4].split(maxsplit=2)[2] == ("fold 3 of 2 scenes leaves nothing to validate on; take fold 0, "
                                             "or label more scenes")
    shutil.rmtree(tmp_path / VA.folders[0])
    code, lines, err = said_by_the_command(tmp_path, capsys, monkeypatch, tmp_path)
    assert code == 2 and err.startswith("error: data.labels: no VA_Estimation_Challenge in ")


def test_folds_need_no_torch():
    check = "import sys, splits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_an_unknown_fold_is_refused(tmp_path):
    random_labels(tmp_path, 0)
    for fold in (-1, 5, 0.5):
        with pytest.raises(ValueError, match=f"fold: got {fold}, expected 0 .official split. or 1 to 4"):
            split(tmp_path, VA, fold)


def test_the_official_sets_stay_as_they_are_on_disk(tmp_path):
    random_labels(tmp_path, 1)
    for task in TASKS.values():
        assert list(split(tmp_path, task, 0)) == list(label_files(tmp_path, task).values())
