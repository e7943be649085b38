"""All stages end to end on a very small configuration: from one command, from two processes, from broken
and missing input."""

import argparse
import json
import os
import re
import shutil
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import faces
import tiny
import train_pretrain
from config import load
from data import find_videos, label_files
from distributed import Team
from labels import AU, EXPR, read_labels
from tiny import ROOT, STAGES, TINY, Job, apart, content, copied, done, log, run, same, weights

TASKS = ("va", "expr", "au")
TRAINED = ["pretrain", "finetune", *(f"task_{task}" for task in TASKS)]
FILES = {
    "pretrain": {"last.pt", "log.csv", "reconstruction.png"},
    "finetune": {"last.pt", "best.pt", "log.csv"},
    "features": {"last.pt"},
    "task_au": {"last.pt", "best.pt", "log.csv"},
}
TRAIN_AU = ["train_task.py", "--task", "au", *TINY]


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def numbers(value) -> list[float]:
    """All numbers in the values of metrics.json or log.csv."""
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [n for v in value for n in numbers(v)]
        if isinstance(value, list)
        else []
        if isinstance(value, str)
        else [float(value)]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{processes: (folder, what was said)}: everything made from nothing by one command, as README gives
    it."""
    folders = {world: tiny.write(tmp_path_factory.mktemp(f"by{world}")) for world in (1, 2)}
    script = [ROOT / TRAIN_AU[0], *TRAIN_AU[1:]]
    jobs = {
        1: tiny.command(folders[1], *script),
        2: tiny.command(folders[2], *tiny.torchrun("--nproc_per_node=2"), *script),
    }
    ended = {world: tiny.end(job) for world, job in jobs.items()}
    for code, said in ended.values():
        assert code == 0, said
    return {world: (folders[world], ended[world][1]) for world in folders}


@pytest.fixture(scope="module")
def one(made):
    """All stages and all tasks, in one process. Shared: work on a copy."""
    for task in ("va", "expr"):
        done(made[1][0], "train_task.py", "--task", task, *TINY)
    return made[1][0]


@pytest.fixture(scope="module")
def two(made):
    """The same in two processes."""
    for task in ("va", "expr"):
        done(made[2][0], "train_task.py", "--task", task, *TINY, world=2)
    return made[2][0]


# --- one command -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 2])
def test_one_command_makes_every_promised_file_from_nothing(made, world):
    folder = made[world][0]
    for stage, files in FILES.items():
        there = {p.name for p in (folder / "runs/tiny" / stage).iterdir()}
        assert files | {"config.yaml", "metrics.json"} <= there and not [
            name for name in there if name.endswith(".tmp")
        ]
        resolved = load(folder / "runs/tiny" / stage / "config.yaml")
        assert resolved.task.batch == tiny.SETTINGS["task"]["batch"] and resolved.run.name == "tiny"
    Image.open(folder / "runs/tiny/pretrain/reconstruction.png").verify()
    for video, frames in find_videos([folder / "data/Aff-Wild2/cropped_aligned"]).items():
        features, noface = (
            np.load(folder / f"runs/tiny/features/{video}{end}") for end in (".npy", ".noface.npy")
        )
        assert (
            features.dtype == np.float16
            and features.shape == (len(noface), 8)
            and noface.dtype == bool
            and np.isfinite(features).all()
        )
        with_image = {int(p.stem) - 1 for p in frames.iterdir()}
        assert set(np.flatnonzero(~noface)) == with_image
    for stage in ("pretrain", "finetune", "task_au"):
        assert [row["epoch"] for row in log(folder / "runs/tiny" / stage)] == ["1", "2"]


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_missing_is_said_once_with_the_reason_and_the_command_that_makes_only_that(made, world):
    said = made[world][1]
    for missing, command in (
        ("data/complete.json", "synthetic.py"),
        ("runs/tiny/pretrain/last.pt", "train_pretrain.py"),
        ("runs/tiny/finetune/best.pt", "train_finetune.py"),
        ("runs/tiny/features/metrics.json", "extract_features.py"),
    ):
        (line,) = [
            line
            for line in said.splitlines()
            if line.startswith(f"{missing} is missing, so it is made first.")
        ]
        assert re.search(r"about \d+ s", line) and line.endswith(
            f"Only this step: python {command} --config tiny.yaml"
        )
    assert f"x 1 accumulation x {world} processes" in said and "effective batch 17 = " in said
    assert "AU26" in said and "chance" in said and "Traceback" not in said


def test_started_again_each_stage_says_that_it_is_finished_and_changes_no_byte(one, tmp_path):
    folder = copied(one, tmp_path)
    before = content(folder)
    for stage, script in {**STAGES, "features": ["extract_features.py"]}.items():
        assert f"runs/tiny/{stage} is finished; nothing to" in done(folder, *script, *TINY)
    assert "mean F1" in done(folder, "evaluate.py", "--task", "au", *TINY, world=2)
    assert content(folder) == before


def test_another_task_uses_what_is_there(one, tmp_path):
    folder = copied(one, tmp_path, ["task_va"])
    before = content(folder)
    said = done(folder, "train_task.py", "--task", "va", *TINY)
    after = content(folder)
    assert "is missing" not in said and {k: after[k] for k in before} == before
    assert {k.split("/")[2] for k in after.keys() - before.keys()} == {"task_va"}


def test_a_stage_gives_the_same_whether_it_made_its_input_or_found_it(one, tmp_path):
    folder = tiny.write(tmp_path)
    shutil.copytree(one / "data", folder / "data")
    for stage, script in STAGES.items():
        done(folder, *script, *TINY)
        assert same(weights(folder / "runs/tiny" / stage), weights(one / "runs/tiny" / stage))


# --- one process and two ---------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_give_the_weights_metrics_and_log_of_one(one, two, stage):
    a, b = one / "runs/tiny" / stage, two / "runs/tiny" / stage
    assert apart(weights(a), weights(b)) < 1e-5
    if stage != "pretrain":
        assert apart(weights(a, "best.pt"), weights(b, "best.pt")) < 1e-5
    assert metrics(a).keys() == metrics(b).keys() and numbers(metrics(a)) == pytest.approx(
        numbers(metrics(b)), abs=1e-6
    )
    for mine, theirs in zip(log(a), log(b), strict=True):
        assert [float(v) for v in mine.values()] == pytest.approx(
            [float(v) for v in theirs.values()], rel=2e-5, abs=1e-6
        )


@pytest.mark.parametrize("stage", STAGES)
def test_a_last_batch_of_a_single_sample_changes_nothing(one, tmp_path, stage):
    """In two processes, the second has an empty share then."""
    folder = copied(one, tmp_path)
    section = stage.split("_")[0]
    samples = {
        "pretrain": metrics(one / "runs/tiny/pretrain")["images"],
        "finetune": -(-metrics(one / "runs/tiny/finetune")["train_frames"] // 3),
    }
    if stage == "task_au":
        samples[stage] = int(
            re.search(
                r"(\d+) segments",
                run(
                    folder, *TRAIN_AU, "--set", "run.name=count", "--set", "task.features=runs/tiny/features"
                ).said,
            )[1]
        )
    options = [
        "--set",
        f"{section}.batch={samples[stage] - 1}",
        "--set",
        "finetune.start=runs/tiny/pretrain/last.pt",
        "--set",
        "task.features=runs/tiny/features",
    ]
    jobs = [
        Job(folder, *STAGES[stage], *TINY, *options, "--set", f"run.name=by{world}", world=world)
        for world in (1, 2)
    ]
    assert [job.end().codes for job in jobs] == [[0], [0, 0]]
    assert apart(weights(folder / "runs/by1" / stage), weights(folder / "runs/by2" / stage)) < 1e-5
    assert apart(weights(folder / "runs/by1" / stage), weights(folder / "runs/tiny" / stage)) > 1e-4


def test_two_processes_extract_the_features_of_one(one, tmp_path):
    folder = copied(one, tmp_path, ["features"])
    done(folder, "extract_features.py", *TINY, world=2)
    a, b = one / "runs/tiny/features", folder / "runs/tiny/features"
    files = sorted(p.name for p in a.glob("*.npy"))
    assert files == sorted(p.name for p in b.glob("*.npy")) and len(files) == 2 * 7
    for name in files:
        assert np.load(a / name).astype(float) == pytest.approx(np.load(b / name).astype(float), abs=1e-3)
    assert metrics(a) == metrics(b)


def keep_predictions(folder):
    """Each video's prediction goes to a file of its own, named after the process that made it and its
    features."""
    def keeping(predict):
        def function(model, features, window, stride, batch, team):
            outputs = predict(model, features, window, stride, batch, team)
            path = folder / f"{team.world}.{team.rank}.{zlib.crc32(features.tobytes())}.npy"
            assert not path.exists(), "predicted twice"
            np.save(path, outputs)
            return outputs
        return function
    tiny.instead("scoring.predict", keeping)


def test_each_video_is_predicted_once_by_any_number_of_processes_with_the_same_numbers(one, tmp_path):
    folder, out = copied(one, tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    command = ["evaluate.py", "--task", "au", *TINY]
    tables = {
        world: done(folder, *command, world=world, hook=partial(keep_predictions, out)) for world in (1, 2, 5)
    }
    assert tables[1] == tables[2] == tables[5] and "mean " in tables[1]
    videos = set()
    for video, file in label_files(one / "data/Aff-Wild2/annotations", AU)["Validation_Set"].items():
        features = np.load(one / f"runs/tiny/features/{video}.npy")[:len(read_labels(file, AU))]
        videos.add(f"{zlib.crc32(features.tobytes())}")
    by = {
        world: dict(reversed(p.name.removesuffix(".npy").split(".")[1:]) for p in out.glob(f"{world}.*.npy"))
        for world in tables
    }
    assert (
        all(by[world].keys() == videos for world in tables)
        and set(by[2].values()) == {"0", "1"}
        and set(by[5].values()) == {"0", "1", "2"}
    )
    assert len(list(out.iterdir())) == len(tables) * len(videos)
    for video in videos:
        alone = np.load(out / f"1.0.{video}.npy")
        for world in (2, 5):
            assert np.load(out / f"{world}.{by[world][video]}.{video}.npy") == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_batch_in_three_pieces_gives_the_weights_of_the_whole_batch(one, tmp_path, stage, world):
    folder = copied(one, tmp_path, [stage])
    share = -(-tiny.SETTINGS[stage]["batch"] // world)
    said = done(folder, *STAGES[stage], *TINY, "--set", f"run.largest_piece={-(-share // 3)}", world=world)
    assert f"x 3 accumulation x {world} processes" in said
    assert apart(weights(folder / "runs/tiny" / stage), weights(one / "runs/tiny" / stage)) < 1e-5
    for mine, whole in zip(log(folder / "runs/tiny" / stage), log(one / "runs/tiny" / stage), strict=True):
        assert [float(v) for v in mine.values()] == pytest.approx(
            [float(v) for v in whole.values()], rel=2e-5, abs=1e-6
        )


# --- command lines ---------------------------------------------------------------------------------------

SCRIPTS = [
    "train_pretrain.py",
    "train_finetune.py",
    "extract_features.py",
    "train_task.py",
    "evaluate.py",
    "synthetic.py",
    "config.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_and_refuses_wrong_settings_with_code_2(tmp_path, script):
    tiny.write(tmp_path)
    task = ["--task", "au"] if script in ("train_task.py", "evaluate.py") else []
    said = done(tmp_path, script, "--help")
    assert "--config FILE" in said and "--set SECTION.FIELD=VALUE" in said and f"python {script}" in said
    codes, said = run(
        tmp_path,
        script,
        *task,
        *TINY,
        "--set",
        "task.learning_rate=1",
        "--set",
        "finetune.epoch=3",
        "--set",
        "task.batch=x",
    )
    assert (
        codes == [2]
        and said.startswith("error: tiny.yaml: 3 problem(s) in the settings")
        and "Traceback" not in said
    )
    assert "task.learning_rate: no such setting; nearest:" in said and re.search(
        "finetune.epoch: .*nearest: .*finetune.epochs", said
    )
    assert "task.batch: got 'x', expected a whole number" in said
    codes, said = run(tmp_path, script, *task, "--config", "configs/tyny.yaml")
    assert (
        codes == [2]
        and said.startswith("error: configs/tyny.yaml: cannot be read")
        and "Traceback" not in said
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize("script", ["train_task.py", "evaluate.py"])
def test_a_task_must_be_one_of_three(tmp_path, script):
    tiny.write(tmp_path)
    for arguments, message in (
        ([], "arguments are required: --task"),
        (["--task", "aus"], "choose from 'va', 'expr', 'au'"),
    ):
        codes, said = run(tmp_path, script, *TINY, *arguments)
        assert codes == [2] and message in said


def test_a_wrong_configuration_file_is_answered_with_those_that_there_are():
    codes, said = run(ROOT, "config.py", "--config", "configs/demmo.yaml")
    assert codes == [2] and "configs/demo.yaml" in said


# --- missing input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "script, missing, maker, without, world",
    [
        ("train_finetune.py", "pretrain/last.pt", "train_pretrain.py", ["pretrain", "finetune"], 2),
        ("extract_features.py", "finetune/best.pt", "train_finetune.py", ["finetune", "features"], 1),
        ("train_task.py", "features/metrics.json", "extract_features.py", ["features", "task_au"], 1),
        ("evaluate.py", "features/metrics.json", "extract_features.py", ["features"], 1),
        ("evaluate.py", "task_au/best.pt", "train_task.py --task au", ["task_au"], 1),
    ],
)
def test_with_real_data_a_missing_input_is_an_error_that_names_it_and_the_command_that_makes_it(
    one, tmp_path, script, missing, maker, without, world
):
    folder = copied(one, tmp_path, without)
    tiny.write(folder, data={"synthetic": False})
    task = ["--task", "au"] if script in ("train_task.py", "evaluate.py") else []
    codes, said = run(folder, script, *task, *TINY, world=world)
    assert codes == [2] * world and "Traceback" not in said
    assert f"error: runs/tiny/{missing} not found; make it with: python {maker} --config tiny.yaml\n" in said
    assert not (folder / "runs/tiny" / without[0] / "log.csv").exists()


def test_real_data_runs_through_stage_by_stage(one, tmp_path):
    """data.synthetic is no part of what a result depends on: a copy of the data gives the same weights."""
    folder = copied(one, tmp_path, ["task_au"])
    for stage in ("pretrain", "finetune", "features"):
        shutil.rmtree(folder / "runs/tiny" / stage)
    (folder / "data/complete.json").unlink()
    tiny.write(folder, data={"synthetic": False})
    for script in ("train_pretrain.py", "train_finetune.py", "extract_features.py"):
        done(folder, script, *TINY)
    assert "(Aff-Wild2)" in done(folder, *TRAIN_AU)
    assert same(weights(folder / "runs/tiny/task_au"), weights(one / "runs/tiny/task_au"))


# --- broken input ----------------------------------------------------------------------------------------

def spoil(path, kind):
    """Truncated: decoding breaks off in the middle. The others: nothing to decode."""
    path.write_bytes(
        {
            "truncated": path.read_bytes()[:400],
            "empty": b"",
            "no image": b"this is text, not an image\n" * 30,
        }[kind]
    )


def test_broken_images_among_the_still_faces_are_counted_and_left_out(one, tmp_path):
    folder = copied(one, tmp_path, ["pretrain"])
    faces = sorted((folder / "data").glob("RAF-DB/**/*.jpg")) + sorted(
        (folder / "data").glob("AffectNet*/**/*.jpg")
    )
    for path, kind in zip(faces[::7], ("truncated", "empty", "no image")):
        spoil(path, kind)
    assert "3 unreadable images in the last epoch" in done(folder, "train_pretrain.py", *TINY)
    assert [row["unreadable"] for row in log(folder / "runs/tiny/pretrain")] == ["3", "3"] and metrics(
        folder / "runs/tiny/pretrain"
    )["unreadable"] == 3
    alone = weights(folder / "runs/tiny/pretrain")
    shutil.rmtree(folder / "runs/tiny/pretrain")
    done(folder, "train_pretrain.py", *TINY, world=2)
    assert (
        apart(weights(folder / "runs/tiny/pretrain"), alone) < 1e-5
        and metrics(folder / "runs/tiny/pretrain")["unreadable"] == 3
    )


def test_no_picture_is_drawn_of_faces_that_cannot_be_read(tmp_path):
    face_set = faces.FaceSet("gone", tmp_path, [b"a.jpg", b"b.jpg"], None, [True, True], {})
    unreadable = train_pretrain.Faces([face_set], 8, 4, 0, 0.5)
    train_pretrain.draw_reconstruction(
        None, unreadable, Team(0, 1, torch.device("cpu")), tmp_path / "picture.png"
    )
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_in_which_nothing_can_be_read_is_left_out(one, tmp_path, world):
    """With one image per step, some processes and some whole steps have none."""
    folder = copied(one, tmp_path, ["pretrain", "finetune"])
    stills = sorted((folder / "data").glob("RAF-DB/**/*.jpg"))
    frames = sorted((folder / "data/Aff-Wild2/cropped_aligned/1-30-1280x720").iterdir())
    for path in stills[:5] + frames[:5]:
        spoil(path, "empty")
    small = [
        "--set",
        "pretrain.batch=2",
        "--set",
        "finetune.batch=2",
        "--set",
        "pretrain.epochs=1",
        "--set",
        "finetune.epochs=1",
        "--set",
        "finetune.every=1",
    ]
    done(folder, "train_finetune.py", *TINY, *small, world=world)
    for stage in ("pretrain", "finetune"):
        assert log(folder / "runs/tiny" / stage)[0]["unreadable"] == "5"
        assert all(value.isfinite().all() for value in weights(folder / "runs/tiny" / stage).values())


def test_broken_frames_and_videos_without_any_are_reported_and_training_goes_on(one, tmp_path):
    folder = copied(one, tmp_path, ["finetune", "features", "task_au"])
    frames, names = (
        folder / "data/Aff-Wild2/cropped_aligned",
        label_files(folder / "data/Aff-Wild2/annotations", EXPR),
    )
    spoiled, absent, faceless = list(names["Train_Set"])[:3]
    emptied = list(names["Validation_Set"])[0]
    for path, kind in zip(sorted((frames / spoiled).iterdir())[::4], ("truncated", "empty", "no image")):
        spoil(path, kind)
    shutil.rmtree(frames / absent)
    for path in (frames / faceless).iterdir():
        spoil(path, "no image")
    for path in (frames / emptied).iterdir():
        path.unlink()
    said = done(folder, "train_finetune.py", *TINY, "--set", "finetune.every=1")
    assert f"left out, no frames: {absent}" in said and f"left out, no frames: {emptied}" in said
    labelled = [int(p.stem) for p in (frames / faceless).iterdir()]
    assert (
        all(int(row["unreadable"]) >= 3 for row in log(folder / "runs/tiny/finetune")) and len(labelled) > 3
    )
    said = done(folder, "extract_features.py", *TINY, "--set", "finetune.every=1")
    first = sorted((frames / spoiled).iterdir())[0].name
    assert re.search(rf"left out: \S+/{spoiled}/{first}: not a readable image .* and 2 more of this video", said)
    assert f"and {len(labelled) - 1} more of this video" in said
    assert metrics(folder / "runs/tiny/features")["videos_without_any_face"] == 2
    there = {p.name for p in (folder / "runs/tiny/features").glob("*.npy")}
    assert (
        not {f"{video}.npy" for video in (absent, faceless, emptied)} & there
        and f"{spoiled}.npy" in there
        and len(there) == 2 * 4
    )
    said = done(folder, *TRAIN_AU, "--set", "finetune.every=1")
    assert (
        f"left out, no features: {', '.join(sorted([absent, faceless]))}" in said
        and f"left out, no features: {emptied}" in said
    )
    assert (
        metrics(folder / "runs/tiny/task_au")["left_out"] == [emptied]
        and metrics(folder / "runs/tiny/task_au")["validation_videos"] == 2
    )
    assert f"left out, no features: {emptied}" in done(folder, "evaluate.py", "--task", "au", *TINY)


# --- features --------------------------------------------------------------------------------------------

def test_an_interrupted_extraction_leaves_the_videos_that_are_done_alone(one, tmp_path):
    folder = copied(one, tmp_path)
    features = folder / "runs/tiny/features"
    (features / "metrics.json").unlink()
    names = sorted(p.name for p in features.glob("*.npy") if not p.name.endswith(".noface.npy"))
    for name in names[:3]:
        (features / name).unlink()                     # its mask is written first, so it may be there
    (features / names[0].replace(".npy", ".noface.npy")).unlink()
    before = content(features)
    done(folder, "extract_features.py", *TINY, world=2)
    after = content(features)
    for name in names:
        assert after[name][0] == content(one / "runs/tiny/features")[name][0]
    assert all(after[name] == before[name] for name in names[3:]) and metrics(features) == metrics(
        one / "runs/tiny/features"
    )


def test_a_kill_in_the_middle_of_a_video_leaves_no_half_array(one, tmp_path):
    folder = copied(one, tmp_path, ["features"])
    codes, said = run(
        folder, "extract_features.py", *TINY, hook=tiny.stop("vit.VisionTransformer.features", 8)
    )
    assert codes == [-9]
    features, whole = folder / "runs/tiny/features", one / "runs/tiny/features"
    halfway = sorted(p.name for p in features.glob("[!.]*.npy") if not p.name.endswith(".noface.npy"))
    assert 0 < len(halfway) < 7 and all(
        (features / name).read_bytes() == (whole / name).read_bytes() for name in halfway
    )
    done(folder, "extract_features.py", *TINY)
    after, expected = content(features), content(whole)
    assert after.keys() == expected.keys() and all(
        after[name][0] == expected[name][0] for name in after if name.endswith(".npy")
    )


def test_a_frame_without_a_face_repeats_the_one_before_it_and_unlabelled_videos_have_features_too(
    one, tmp_path
):
    folder = copied(one, tmp_path, ["features"])
    frames = folder / "data/Aff-Wild2/cropped_aligned"
    video = list(label_files(folder / "data/Aff-Wild2/annotations", AU)["Train_Set"])[0]
    shutil.copytree(frames / video, frames / "test_video")
    images = sorted((frames / "test_video").iterdir())
    last = int(images[-1].stem)
    for path in [*images[:2], images[9], images[10], images[20]]:
        path.unlink()
    spoil(images[11], "truncated")
    done(folder, "extract_features.py", *TINY)
    features, noface = (
        np.load(folder / f"runs/tiny/features/test_video{end}") for end in (".npy", ".noface.npy")
    )
    rows = [int(path.stem) - 1 for path in images]
    assert len(features) == last and noface[[rows[i] for i in (0, 1, 9, 10, 11, 20)]].all()
    for row in np.flatnonzero(noface):
        source = row - 1 if row > rows[1] else rows[2]
        assert np.array_equal(features[row], features[source])
    assert not np.array_equal(features[rows[8]], features[rows[12]])
    assert np.array_equal(
        features[~noface], np.load(folder / f"runs/tiny/features/{video}.npy")[:last][~noface]
    )
    assert metrics(folder / "runs/tiny/features")["videos"] == 8


def test_an_extraction_does_not_go_on_with_other_videos_than_it_began_with(one, tmp_path):
    """Less, when a disk is not mounted; more, when the videos were still being unpacked. All or nothing, on
    each machine."""
    folder = copied(one, tmp_path, ["features"])
    frames, features = folder / "data/Aff-Wild2/cropped_aligned", folder / "runs/tiny/features"
    assert run(
        folder, "extract_features.py", *TINY, hook=tiny.stop("vit.VisionTransformer.features", 8)
    ).codes == [-9]
    video = sorted(frames.iterdir())[0]
    video.rename(folder / "away")
    codes, said = run(folder, "extract_features.py", *TINY, world=2)
    assert codes == [2, 2] and re.search(
        r"features: began with {'videos': 7, 'frames': (\d+)}, found now {'videos': 6, .*; bring back what it began with",
        said,
    )
    (folder / "away").rename(video)
    done(folder, "extract_features.py", *TINY)
    assert metrics(features) == metrics(one / "runs/tiny/features")
    video.rename(folder / "away")
    assert "features is finished; nothing to do" in done(folder, "extract_features.py", *TINY)


def test_a_machine_that_lacks_a_video_is_refused(one, tmp_path):
    folder = copied(one, tmp_path, ["features"])
    codes, said = run(folder, "extract_features.py", *TINY, world=2, hook=lacks_one)
    assert all(codes) and "this machine has other data than the first one: {'videos': 6, " in said


def lacks_one():
    if os.environ["RANK"] == "1":
        tiny.instead(
            "extract_features.find_videos", lambda found: lambda roots: dict(list(found(roots).items())[1:])
        )


def test_unreadable_images_cost_no_readable_one_of_a_later_batch(one, tmp_path):
    folder = copied(one, tmp_path, ["features"])
    frames = folder / "data/Aff-Wild2/cropped_aligned"
    images = sorted(
        (frames / list(label_files(folder / "data/Aff-Wild2/annotations", AU)["Train_Set"])[0]).iterdir()
    )
    for path in images[:5]:
        spoil(path, "truncated")
    done(folder, "extract_features.py", *TINY, "--set", "features.batch=4")
    noface = np.load(folder / f"runs/tiny/features/{images[0].parent.name}.noface.npy")
    assert (
        not noface[[int(path.stem) - 1 for path in images[5:]]].any()
        and noface[[int(path.stem) - 1 for path in images[:5]]].all()
    )


# --- checkpoints -----------------------------------------------------------------------------------------

def test_fine_tuning_starts_from_our_pre_training_a_file_of_the_reference_mae_or_nothing(one, tmp_path):
    folder = copied(one, tmp_path)
    mae = weights(one / "runs/tiny/pretrain")
    encoder = {k: v for k, v in mae.items() if not k.startswith(("decoder", "mask_token"))}
    arguments = argparse.Namespace(
        model="mae_vit_base_patch16", mask_ratio=0.75, norm_pix_loss=True, output_dir="x"
    )
    torch.save(
        {"model": mae, "args": arguments, "epoch": 799, "optimizer": {}, "scaler": {}},
        folder / "reference.pth",
    )
    torch.save({"model": encoder}, folder / "encoder.pth")
    said, results = {}, {}
    for name, start in {
        "reference": "reference.pth",
        "encoder": "encoder.pth",
        "ours": "runs/tiny/finetune/best.pt",
        "nothing": "none",
    }.items():
        said[name] = done(
            folder,
            "train_finetune.py",
            *TINY,
            "--set",
            f"finetune.start={start}",
            "--set",
            f"run.name={name}",
        )
        results[name] = weights(folder / f"runs/{name}/finetune")
    default = weights(one / "runs/tiny/finetune")
    assert same(results["reference"], default) and same(results["encoder"], default)
    assert apart(results["nothing"], default) > 1e-3 and apart(results["ours"], default) > 1e-3
    assert (
        "starts from reference.pth; missing keys: none; unexpected keys, left out: decoder_blocks, decoder_embed"
        in said["reference"]
    )
    assert "starts from encoder.pth; missing keys: none; unexpected keys, left out: none" in said["encoder"]
    assert "starts from random weights, as asked" in said["nothing"]


def test_fine_tuning_does_not_go_on_from_another_start(one, tmp_path):
    folder = copied(one, tmp_path, ["finetune"])
    assert run(
        folder,
        "train_finetune.py",
        *TINY,
        "--set",
        "run.checkpoint_minutes=1e-9",
        hook=tiny.stop("run.Run.end_step", 2),
    ).codes == [-9]
    shutil.rmtree(folder / "runs/tiny/pretrain")
    done(folder, "train_pretrain.py", *TINY, "--set", "pretrain.lr=1e-3")
    codes, said = run(folder, "train_finetune.py", *TINY)
    assert codes == [2] and "finetune: began with {" in said and "'start checksum': " in said


def test_a_checkpoint_of_another_architecture_is_refused_and_what_differs_listed(one, tmp_path):
    folder = copied(one, tmp_path)
    start = ["--set", "run.name=other", "--set", "finetune.start=runs/tiny/pretrain/last.pt"]
    for change, lines, world in (
        ("vit.dim=12", ["blocks.0.norm1.weight: file (8,), model (12,)"], 2),
        ("vit.depth=2", ["12 of 30 entries differ", "blocks.1.norm1.weight: missing in the file"], 1),
    ):
        codes, said = run(folder, "train_finetune.py", *TINY, *start, "--set", change, world=world)
        assert (
            codes == [2] * world
            and "error: runs/tiny/pretrain/last.pt: a checkpoint of another architecture" in said
        )
        assert all(line in said for line in lines) and "Traceback" not in said
        shutil.rmtree(folder / "runs/other")
    codes, said = run(folder, "evaluate.py", "--task", "au", *TINY, "--set", "temporal.width=4")
    assert (
        codes == [2]
        and "another architecture" in said
        and "transformer.project.weight: file (8, 8), model (4, 8)" in said
    )


def test_a_checkpoint_of_another_task_is_refused(one, tmp_path):
    folder = copied(one, tmp_path)
    checkpoint = "runs/tiny/task_au/best.pt"
    codes, said = run(folder, "evaluate.py", "--task", "va", *TINY, "--checkpoint", checkpoint)
    assert codes == [2] and said == f"error: {checkpoint}: trained for --task au, not va\n"
    assert checkpoint in done(folder, "evaluate.py", "--task", "au", *TINY, "--checkpoint", checkpoint)
    codes, said = run(
        folder, "evaluate.py", "--task", "au", *TINY, "--checkpoint", "runs/tiny/pretrain/last.pt"
    )
    assert codes == [2] and "runs/tiny/pretrain/last.pt" in said and "Traceback" not in said


def test_a_model_is_neither_scored_nor_trained_on_with_features_of_another_vit(one, tmp_path):
    folder = copied(one, tmp_path, ["features"])
    done(folder, "extract_features.py", *TINY, "--set", "features.checkpoint=runs/tiny/pretrain/last.pt")
    command = ["--set", "features.checkpoint=runs/tiny/pretrain/last.pt"]
    codes, said = run(folder, "evaluate.py", "--task", "au", *TINY, *command)
    assert (
        codes == [2]
        and "error: runs/tiny/task_au/best.pt: trained on features of another ViT (checksum " in said
    )
    codes, said = run(folder, *TRAIN_AU, *command)
    assert (
        codes == [2]
        and "is finished; nothing to train" in said
        and "trained on features of another ViT" in said
    )
    (folder / "runs/tiny/task_au/metrics.json").unlink()
    codes, said = run(folder, *TRAIN_AU, *command, world=2)
    assert codes == [2, 2] and "runs/tiny/task_au: began with {" in said and "'checkpoint checksum': " in said


def test_labels_of_one_task_are_enough(one, tmp_path):
    folder = copied(one, tmp_path)
    for other in ("VA_Estimation_Challenge", "EXPR_Classification_Challenge"):
        shutil.rmtree(folder / "data/Aff-Wild2/annotations" / other)
    assert "task_au_fold1/best.pt" in done(folder, *TRAIN_AU, "--set", "task.fold=1")
    said = done(folder, "data.py", *TINY)
    assert (
        re.search(r"\nau +Train_Set +4 videos, .* of them with a face; 0 videos without frames\n", said)
        and "va" not in said
    )


# --- folds -----------------------------------------------------------------------------------------------

def test_a_fold_has_a_folder_of_its_own_and_warns_of_videos_that_the_vit_was_tuned_on(one, tmp_path):
    folder = copied(one, tmp_path)
    before = content(folder)
    said = done(folder, *TRAIN_AU, "--set", "task.fold=1")
    assert re.search(
        r"warning: (\d) of \1 validation videos of fold 1 were used to fine-tune the ViT|warning: \d of \d validation videos of fold 1",
        said,
    )
    after = content(folder)
    assert {k: after[k] for k in before} == before and {
        k.split("/")[2] for k in after.keys() - before.keys()
    } == {"task_au_fold1"}
    assert metrics(folder / "runs/tiny/task_au_fold1")["validation_videos"] < 7
    assert "task_au_fold1/best.pt" in done(
        folder, "evaluate.py", "--task", "au", *TINY, "--set", "task.fold=1"
    )
