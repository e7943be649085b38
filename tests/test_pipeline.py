"""All stages end to end on a very small configuration, by one command, with the same result from one process
and from two."""

import re
import shutil
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

import tiny
from config import load
from frames import find_videos
from labels import AU, label_files, read_labels
from tiny import (ROOT, STAGES, TINY, TRAIN_AU, Job, apart, content, copied, done, log, log_numbers, metrics,
                  run, same, weights)

TRAINED = ["pretrain", "finetune", "task_va", "task_expr", "task_au"]
FILES = {"pretrain": {"last.pt", "log.csv", "reconstruction.png"},
         "finetune": {"last.pt", "best.pt", "log.csv"},
         "features": {"videos.json"},
         "task_au": {"last.pt", "best.pt", "log.csv"}}


def numbers(value) -> list[float]:
    """All numbers in a value of metrics.json, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [] if isinstance(value, str) else [float(value)]


# ---- One command

@pytest.mark.parametrize("world", [1, 2])
def test_one_command_makes_every_promised_file_from_nothing(made_by_command, world):
    folder, _ = made_by_command[world]
    for stage, files in FILES.items():
        there = {path.name for path in (folder / "runs/tiny" / stage).iterdir()}
        assert files | {"config.yaml", "made_of.json", "metrics.json"} <= there
        assert not [name for name in there if name.endswith(".tmp")]
        resolved = load(folder / "runs/tiny" / stage / "config.yaml")
        assert resolved.task.batch == tiny.SETTINGS["task"]["batch"] and resolved.run.name == "tiny"
    Image.open(folder / "runs/tiny/pretrain/reconstruction.png").verify()
    for video, frames in find_videos([folder / "data/Aff-Wild2/cropped_aligned"]).items():
        features = np.load(folder / f"runs/tiny/features/{video}.npy")
        noface = np.load(folder / f"runs/tiny/features/{video}.noface.npy")
        assert features.dtype == np.float16 and features.shape == (len(noface), 8)
        assert np.isfinite(features).all() and noface.dtype == bool
        with_image = {int(path.stem) - 1 for path in frames.iterdir()}
        assert set(np.flatnonzero(~noface)) == with_image
    for stage in ("pretrain", "finetune", "task_au"):
        assert [row["epoch"] for row in log(folder / "runs/tiny" / stage)] == ["1", "2"]


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_missing_is_said_once_with_the_reason_and_the_command_that_makes_only_that(
        made_by_command, world):
    _, said = made_by_command[world]
    for missing, command in (("data/complete.json", "synthetic.py"),
                             ("runs/tiny/pretrain/last.pt", "train_pretrain.py"),
                             ("runs/tiny/finetune/best.pt", "train_finetune.py"),
                             ("runs/tiny/features/metrics.json", "extract_features.py")):
        begins = f"{missing} is missing, so it is made first."
        (line,) = [line for line in said.splitlines() if line.startswith(begins)]
        assert re.search(r"about \d+ s", line)
        assert line.endswith(f"Only this step: python {ROOT / command} --config tiny.yaml")
    assert f"x 1 accumulation x {world} processes" in said and "effective batch 17 = " in said
    assert "AU26" in said and "chance" in said and "Traceback" not in said


def test_started_again_each_stage_says_that_it_is_finished_and_changes_no_byte(finished, tmp_path):
    folder = copied(finished, tmp_path)
    before = content(folder)
    for stage, script in {**STAGES, "features": ["extract_features.py"]}.items():
        assert f"runs/tiny/{stage} is finished; nothing to" in done(folder, *script, *TINY)
    assert "mean F1" in done(folder, "evaluate.py", "--task", "au", *TINY, world=2)
    assert content(folder) == before


def test_another_task_uses_what_is_there(finished, tmp_path):
    folder = copied(finished, tmp_path, ["task_va"])
    before = content(folder)
    said = done(folder, "train_task.py", "--task", "va", *TINY)
    after = content(folder)
    assert "is missing" not in said and {file: after[file] for file in before} == before
    assert {file.split("/")[2] for file in after.keys() - before.keys()} == {"task_va"}


def test_a_fold_has_a_folder_of_its_own_and_warns_of_videos_that_the_vit_was_tuned_on(finished, tmp_path):
    folder = copied(finished, tmp_path)
    before = content(folder)
    said = done(folder, *TRAIN_AU, "--set", "task.fold=1")
    assert re.search(r"warning: \d of these \d videos show scenes on which the ViT was fine-tuned", said)
    after = content(folder)
    assert {file: after[file] for file in before} == before
    assert {file.split("/")[2] for file in after.keys() - before.keys()} == {"task_au_fold1"}
    assert metrics(folder / "runs/tiny/task_au_fold1")["validation_videos"] < 7
    said = done(folder, "evaluate.py", "--task", "au", *TINY, "--set", "task.fold=1")
    assert "task_au_fold1/best.pt" in said


def test_a_stage_gives_the_same_whether_it_made_its_input_or_found_it(finished, tmp_path):
    folder = tiny.write(tmp_path)
    shutil.copytree(finished / "data", folder / "data")
    for stage, script in STAGES.items():
        done(folder, *script, *TINY)
        assert same(weights(folder / "runs/tiny" / stage), weights(finished / "runs/tiny" / stage))


# ---- One process and two

@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_give_the_weights_metrics_and_log_of_one(finished, finished_by_two, stage):
    a, b = finished / "runs/tiny" / stage, finished_by_two / "runs/tiny" / stage
    assert apart(weights(a), weights(b)) < 1e-5
    if stage != "pretrain":
        assert apart(weights(a, "best.pt"), weights(b, "best.pt")) < 1e-5
    assert metrics(a).keys() == metrics(b).keys()
    assert numbers(metrics(a)) == pytest.approx(numbers(metrics(b)), abs=1e-5)
    assert log_numbers(a) == pytest.approx(log_numbers(b), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_last_batch_of_a_single_sample_changes_nothing(finished, tmp_path, stage):
    """In two processes, the second has an empty share then."""
    folder = copied(finished, tmp_path)
    inputs = ["--set", "finetune.start=runs/tiny/pretrain/last.pt",
              "--set", "task.features=runs/tiny/features"]
    if stage == "pretrain":
        samples = metrics(finished / "runs/tiny/pretrain")["images"]
    if stage == "finetune":
        samples = -(-metrics(finished / "runs/tiny/finetune")["train_frames"] // 3)
    if stage == "task_au":
        said = run(folder, *TRAIN_AU, *inputs, "--set", "run.name=count").said
        samples = int(re.search(r"(\d+) segments", said)[1])
    section = stage.split("_")[0]
    command = [*STAGES[stage], *TINY, *inputs, "--set", f"{section}.batch={samples - 1}"]
    jobs = [Job(folder, *command, "--set", f"run.name=by{world}", world=world) for world in (1, 2)]
    assert [job.end().codes for job in jobs] == [[0], [0, 0]]
    assert apart(weights(folder / "runs/by1" / stage), weights(folder / "runs/by2" / stage)) < 1e-5
    assert apart(weights(folder / "runs/by1" / stage), weights(folder / "runs/tiny" / stage)) > 1e-4


def keep_predictions(folder):
    """Each video's prediction goes to a file of its own, named after the number of processes, the process
    that made it and the video's features."""
    def keeping(segment_outputs):
        def function(model, features, window, stride, batch, team):
            cut, outputs = segment_outputs(model, features, window, stride, batch, team)
            path = folder / f"{team.world}.{team.rank}.{zlib.crc32(features.tobytes())}.npy"
            assert not path.exists(), "predicted twice"
            np.save(path, outputs)
            return cut, outputs
        return function
    tiny.instead("scoring.segment_outputs", keeping)


def test_each_video_is_predicted_once_by_any_number_of_processes_with_the_same_numbers(finished, tmp_path):
    folder, out = copied(finished, tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    command, hook = ["evaluate.py", "--task", "au", *TINY], partial(keep_predictions, out)
    tables = {world: done(folder, *command, world=world, hook=hook) for world in (1, 2, 5)}
    assert tables[1] == tables[2] == tables[5] and "mean " in tables[1]

    videos = set()
    for video, file in label_files(finished / "data/Aff-Wild2/annotations", AU)["Validation_Set"].items():
        features = np.load(finished / f"runs/tiny/features/{video}.npy")[:len(read_labels(file, AU))]
        videos.add(f"{zlib.crc32(features.tobytes())}")
    made_by = {world: {} for world in tables}          # {processes: {video: the process that predicted it}}
    for path in out.iterdir():
        world, rank, video = path.stem.split(".")
        made_by[int(world)][video] = rank
    assert all(made_by[world].keys() == videos for world in tables)
    assert set(made_by[2].values()) == {"0", "1"} and set(made_by[5].values()) == {"0", "1", "2"}
    assert len(list(out.iterdir())) == len(tables) * len(videos)
    for video in videos:
        alone = np.load(out / f"1.0.{video}.npy")
        for world in (2, 5):
            shared = np.load(out / f"{world}.{made_by[world][video]}.{video}.npy")
            assert shared == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_batch_in_three_pieces_gives_the_weights_of_the_whole_batch(finished, tmp_path, stage, world):
    folder, place = tiny.ready(finished, tmp_path, stage)
    share = -(-tiny.SETTINGS[stage]["batch"] // world)
    said = done(folder, *STAGES[stage], *TINY, "--set", f"run.largest_piece={-(-share // 3)}", world=world)
    assert f"x 3 accumulation x {world} processes" in said
    whole = finished / "runs/tiny" / stage
    assert apart(weights(place), weights(whole)) < 1e-5
    assert log_numbers(place) == pytest.approx(log_numbers(whole), rel=2e-5, abs=1e-6)


# ---- In a Python shell, and command lines

def test_readmes_lines_for_the_python_shell_predict_a_video(finished, monkeypatch, capsys):
    """With nothing but the checkpoint and the features; no labels, no configuration, no data."""
    monkeypatch.chdir(finished)
    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    path = sorted((finished / "runs/tiny/features").glob("*[0-9x].npy"))[0]
    named = re.search(r'np.load\("(.*?)"\)', lines)[1]
    shell = {}
    exec(lines.replace(named, str(path)).replace("runs/demo", "runs/tiny"), shell)
    features = np.load(path)
    assert features.dtype == np.float16 and len(lines.splitlines()) == 5
    values = shell["va"].predict(features)
    assert values.shape == (len(features), 2) and np.isfinite(values).all() and capsys.readouterr().out



@pytest.mark.parametrize("script", ["train_pretrain.py", "train_finetune.py", "extract_features.py",
                                    "train_task.py", "evaluate.py", "synthetic.py", "config.py"])
def test_every_script_explains_itself_and_refuses_wrong_settings_with_code_2(tmp_path, script):
    tiny.write(tmp_path)
    task = ["--task", "au"] if script in ("train_task.py", "evaluate.py") else []
    said = done(tmp_path, script, "--help")
    assert "--config FILE" in said and "--set SECTION.FIELD=VALUE" in said and f"python {script}" in said

    wrong = ["--set", "task.learning_rate=1", "--set", "finetune.epoch=3", "--set", "task.batch=x"]
    codes, said = run(tmp_path, script, *task, *TINY, *wrong)
    assert codes == [2] and "Traceback" not in said
    assert said.startswith("error: tiny.yaml: 3 problem(s) in the settings")
    assert "task.learning_rate: no such setting; nearest:" in said
    assert re.search("finetune.epoch: .*nearest: .*finetune.epochs", said)
    assert "task.batch: got 'x', expected a whole number" in said

    codes, said = run(tmp_path, script, *task, "--config", "configs/tyny.yaml")
    assert codes == [2] and "Traceback" not in said
    assert said.startswith("error: configs/tyny.yaml: cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize("script", ["train_task.py", "evaluate.py"])
def test_a_task_must_be_one_of_three(tmp_path, script):
    tiny.write(tmp_path)
    for arguments, message in (([], "arguments are required: --task"),
                               (["--task", "aus"], "choose from 'va', 'expr', 'au'")):
        codes, said = run(tmp_path, script, *TINY, *arguments)
        assert codes == [2] and message in said


def test_a_wrong_configuration_file_is_answered_with_those_that_there_are():
    codes, said = run(ROOT, "config.py", "--config", "configs/demmo.yaml")
    assert codes == [2] and "configs/demo.yaml" in said
