"""Table 1 by one command: which commands run in which order, what is run again, what is written."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fake_stages
import folds
import made_of
import many_runs
import pipeline
import tiny
import train_finetune
from config import load
from fake_stages import Finished, Ran, pretended, started
from intervals import interval
from labels import EXPR, TASKS
from processes import ALONE
from scoring import read_sums
from splits import scene, split
from test_splits import random_labels

COMMAND = ["folds.py", "--config", "my.yaml", "--processes", "1"]


def prepare(folder, tasks=TASKS):
    """my.yaml, real labels, and an encoder with features, as if they were finished."""
    random_labels(folder / "labels", 0, tasks, count=16)
    (folder / "my.yaml").write_text("data: {labels: labels}\nsegments: {window: 100, stride: 50}")
    with contextlib.chdir(folder):
        for stage in ("train_pretrain", "train_finetune", "extract_features"):
            assert fake_stages.pretend([f"{stage}.py", "--config", "my.yaml"]) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All folds, run once."""
    folder, said = prepare(tmp_path_factory.mktemp("finished")), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        with pretended(Ran()) as ran:
            assert start(patch) == 0
    return Finished(folder, ran.short(), said.getvalue())


def start(monkeypatch, *more, command=COMMAND):
    """What the script does, in this process. -> exit code"""
    return started(monkeypatch, folds, *command, *more, options={"shared-encoder": {"action": "store_true"}})


def of_fold(k: int) -> str:
    return f"run=my_fold{k} run.base=my finetune.fold={k} task.fold={k}"


OFFICIAL = [f"train_task {task}" for task in TASKS]
ALL = OFFICIAL + [f"{stage} {of_fold(k)}" for k in (1, 2, 3, 4)
                  for stage in ("train_finetune", "extract_features", *OFFICIAL)]


def test_each_fold_gets_an_encoder_of_its_own_and_takes_over_the_pre_training(finished):
    assert finished.commands == ALL
    runs = finished.folder / "runs"
    for k in (1, 2, 3, 4):
        record = made_of.read_record(runs / f"my_fold{k}/finetune")
        assert record["from"] == made_of.read_record(runs / "my/pretrain")
        trained = {scene(video) for video in made_of.tuned_on(record)}
        for task in TASKS:
            names, _ = read_sums(runs / f"my_fold{k}/task_{task}_fold{k}")
            assert not trained & {scene(name) for name in names}


def test_folds_1_to_4_score_each_video_once(finished):
    for task in TASKS:
        scored = [name for k in (1, 2, 3, 4)
                  for name in read_sums(finished.folder / f"runs/my_fold{k}/task_{task}_fold{k}")[0]]
        files = [path.stem for path in (finished.folder / "labels" / TASKS[task].folders[0]).rglob("*.txt")]
        assert sorted(scored) == sorted(files)


def test_what_is_finished_is_not_run_again(place, monkeypatch, capsys):
    with pretended(Ran()) as ran:
        ran.fails = "train_task expr run=my_fold2"
        assert start(monkeypatch) == 2
        assert ran.short() == ALL[:ALL.index(ran.short()[-1]) + 1]
        failed = ran.short()[-1]
        assert failed.startswith("train_task expr run=my_fold2")
        said = capsys.readouterr().err
        assert said.startswith("error: this command ended with code 2, its message is above")
        assert "train_task.py --task expr --config my.yaml --set run.name=my_fold2 " in said
        assert not (place / "runs/my/folds.json").exists()
        ran.commands, ran.fails = [], ""
        assert start(monkeypatch) == 0 and ran.short() == ALL[ALL.index(failed):]
        before = (place / "runs/my/folds.json").read_text()
        ran.commands = []
        assert start(monkeypatch) == 0 and ran.commands == []
    assert (place / "runs/my/folds.json").read_text() == before


def test_an_encoder_that_was_made_anew_leaves_no_fold_with_old_scores(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    record = made_of.read_record(tmp_path / "runs/my_fold3/finetune")
    (tmp_path / "runs/my_fold3/finetune/made_of.json").write_text(json.dumps({**record, "checksum": 1}))
    with pretended(Ran()) as ran:
        ran.fails = "my_fold3"
        assert start(monkeypatch) == 2
    assert ran.short() == [f"extract_features {of_fold(3)}"]     # stale: the real one says so, and refuses


def test_one_encoder_for_all_is_lent_with_a_warning_and_the_clean_score(place, monkeypatch, capsys):
    with pretended(Ran()) as ran:
        assert start(monkeypatch, "--shared-encoder") == 0
    assert ran.short() == OFFICIAL + [f"{task} task.fold={k}" for k in (1, 2, 3, 4) for task in OFFICIAL]
    said = capsys.readouterr().out
    assert said.startswith("warning: one encoder for all folds: it was fine-tuned on scenes that folds 1 to")
    found = json.loads((place / "runs/my/folds_shared.json").read_text())
    assert found["encoder"] == "shared" and not (place / "runs/my/folds.json").exists()
    tuned = {scene(video) for video in made_of.tuned_on(made_of.read_record(place / "runs/my/finetune"))}
    for name, task in found["tasks"].items():
        for row in task["folds"][1:]:
            names, sums = read_sums(place / row["folder"])
            unseen = [scene(video) not in tuned for video in names]
            assert sum(unseen) == len(names) - row["seen_videos"]
            clean = TASKS[name].metric.score(sums[unseen].sum(axis=0)).mean() if any(unseen) else None
            assert row["unseen"] == pytest.approx(clean) and (clean is None or f"{clean:.3f}" in said)
        seen = [row["seen_videos"] for row in task["folds"][1:]]
        assert sum(seen) >= 4 and any(row["unseen"] not in (None, row["score"]) for row in task["folds"])


@pytest.mark.parametrize("settings, stages", [
    (["features.checkpoint=runs/my/pretrain/last.pt"], []), (["task.features=runs/my/features"], [])])
def test_what_a_path_in_the_settings_gives_is_not_made_for_each_fold(place, monkeypatch, settings, stages):
    given = [word for setting in settings for word in ("--set", setting)]
    listed = folds.jobs_of(load("my.yaml", settings), list(TASKS.values()), shared=False)
    assert [job.stage for job in listed if job.stage == "train_finetune"] == stages
    with pretended(Ran()) as ran, pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_of, "given_record", lambda path: {"file": str(path)})
        patch.setattr(made_of, "stale", lambda *ignored: "")
        assert start(monkeypatch, *given) == 0
    assert not [line for line in ran.short() if line.startswith(("train_finetune", "extract_features"))]


@pytest.mark.parametrize("fold", [0, 3])
def test_fine_tuning_takes_the_videos_of_its_fold(place, monkeypatch, fold):
    class Taken(Exception):
        pass

    def instead(*files_and_more):
        raise Taken(list(files_and_more[0]))
    config = load("my.yaml", ["run.name=another", f"finetune.fold={fold}", "task.fold=1"])
    monkeypatch.setattr(train_finetune, "video_folders", lambda roots: ({}, []))
    monkeypatch.setattr(train_finetune, "ExprFrames", instead)
    with pytest.raises(Taken) as taken:
        train_finetune.main(config, ALONE)
    assert taken.value.args == (list(split("labels", EXPR, fold)[0]),)


# ---- With synthetic data, and without the first stages

def test_synthetic_data_and_what_the_run_lacks_are_made_first_and_once(tmp_path, monkeypatch, capsys):
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    listed = folds.jobs_of(load("tiny.yaml"), list(TASKS.values()), shared=False)
    assert [job.stage for job in listed[:5]] == ["synthetic", "train_pretrain", "train_finetune",
                                                 "extract_features", "train_task"]
    assert len(listed) == 4 + 3 + 4 * 5 and len({(job.title, str(job.config)) for job in listed}) == 27
    assert start(monkeypatch, "--dry-run", command=["folds.py", "--config", "tiny.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 28 and all(line.startswith("to be made") for line in lines[:-1])
    assert lines[-1].startswith("27 commands, 0 of them finished; 27 more of unknown length")
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]


def test_what_is_gone_but_no_longer_needed_is_not_made_again(tmp_path, monkeypatch):
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    there = {"extract_features"}
    monkeypatch.setattr(pipeline, "finished", lambda stage, config, task=None: stage in there)
    assert pipeline.unfinished("train_task", load("tiny.yaml")) == ["synthetic"]
    there |= {"synthetic", "train_pretrain"}
    assert pipeline.unfinished("train_task", load("tiny.yaml")) == []
    there.remove("extract_features")
    assert pipeline.unfinished("train_task", load("tiny.yaml")) == ["train_finetune", "extract_features"]
    there.clear()
    assert pipeline.unfinished("train_task", load("tiny.yaml", ["data.synthetic=false"])) == [
        "train_pretrain", "train_finetune", "extract_features"]
    assert pipeline.unfinished("train_emma", load("tiny.yaml", ["data.synthetic=false"])) == [
        "train_pretrain", "train_stills"]


def test_pre_training_that_is_gone_is_made_in_the_run_itself(tmp_path, monkeypatch):
    """Where fold 0 is finished, only the fine-tuning of the folds asks for it."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load("tiny.yaml")
    monkeypatch.setattr(folds.Job, "state", property(
        lambda job: "finished" if job.config is config and job.task else "to be made"))
    listed = folds.jobs_of(config, list(TASKS.values()), shared=False)
    assert [(job.stage, job.config.run.name) for job in listed[:3]] == [
        ("synthetic", "tiny"), ("train_pretrain", "tiny"), ("train_task", "tiny")]


def test_folds_of_another_split_than_todays_are_not_put_together(finished, tmp_path, monkeypatch):
    """Labels of a task that were added since deal all scenes anew."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    config = load("my.yaml")
    folds.collect(config, [EXPR], shared=False)
    path = tmp_path / "copy/runs/my_fold2/task_expr_fold2/video_sums.json"
    stored = json.loads(path.read_text())
    stored["videos"][0] = next(iter(split(tmp_path / "copy/labels", EXPR, 2)[0]))            # one of training
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"task_expr_fold2 was validated on .*, which fold 2 no longer"):
        folds.collect(config, [EXPR], shared=False)


def test_with_real_data_nothing_is_made_before_the_tasks(tmp_path, monkeypatch, capsys):
    random_labels(tmp_path / "labels", 0, count=10)
    (tmp_path / "my.yaml").write_text("data: {labels: labels}")
    monkeypatch.chdir(tmp_path)
    with pretended(Ran()) as ran:
        assert start(monkeypatch) == 2
    assert ran.short() == ["train_task va"] and "features not found" in capsys.readouterr().err


@pytest.mark.slow
def test_with_real_data_the_stage_itself_says_what_is_missing(tmp_path, monkeypatch):
    random_labels(tmp_path / "labels", 0)
    (tmp_path / "my.yaml").write_text("data: {labels: labels}")
    ended = subprocess.run([sys.executable, fake_stages.script("folds.py"), *COMMAND[1:]], cwd=tmp_path,
                           capture_output=True, text=True)
    assert ended.returncode == 2
    first, last, command = ended.stderr.splitlines()
    assert re.fullmatch(r"error: runs/my/features/metrics.json not found; make it with: python "
                        r".*extract_features.py --config my.yaml", first)
    assert last.startswith("error: this command ended with code 2, its message is above")
    assert command.strip().endswith("train_task.py --task va --config my.yaml")


def test_a_dry_run_tells_what_is_finished_and_how_long_the_rest_takes(place, monkeypatch, capsys):
    with pretended(Ran()) as ran:
        ran.fails = "train_task va run=my_fold1"
        start(monkeypatch)
        capsys.readouterr()
        ran.commands = []
        assert start(monkeypatch, "--dry-run") == 0 and ran.commands == []
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["finished"] * 5
    assert [line.split()[1] for line in lines[:5]] == [
        "runs/my/task_va", "runs/my/task_expr", "runs/my/task_au", "runs/my_fold1/finetune",
        "runs/my_fold1/features"]
    assert lines[5].split()[3:7] == ["12", "s", "python", lines[5].split()[6]]
    seconds = 3 * (45 + 6) + 12 * 12                            # fine-tunings, extractions, tasks
    assert last == f"23 commands, 5 of them finished; about {seconds / 60:.1f} min for 18 more"


# ---- What is written

def test_the_file_and_the_tables_hold_the_scores_of_each_fold(finished):
    place, said, folder = finished.folder, finished.said, finished.folder / "runs/my"
    found, text = json.loads((folder / "folds.json").read_text()), (folder / "folds.txt").read_text()
    assert text in said and "written to runs/my/folds.txt and folds.json" in said
    assert [found[key] for key in ("run", "encoder", "data", "comparable")] == [
        "my", "one per fold", "made-up data", True]
    for name, task in found["tasks"].items():
        scores = []
        for k, row in enumerate(task["folds"]):
            names, sums = read_sums(place / row["folder"])
            scores.append(TASKS[name].metric.score(sums.sum(axis=0)).mean())
            assert row["fold"] == k and row["score"] == pytest.approx(scores[-1])
            assert row["folder"] == (f"runs/my_fold{k}/task_{name}_fold{k}" if k else f"runs/my/task_{name}")
            assert row["validation_videos"] == len(names) and row["chance"] == 0.25
            assert row["paper"] == TASKS[name].paper["mean"][k]
            assert row["interval"] == pytest.approx([scores[-1] - 0.1, scores[-1] + 0.1])
            assert row["baseline"] == (None if k else TASKS[name].baseline["mean"])
            assert row["outputs"].keys() == set(TASKS[name].outputs)
            assert k == 0 or row["seen_videos"] == 0 and row["unseen"] == row["score"]
        assert task["mean"] == pytest.approx(np.mean(scores))
        assert task["deviation"] == pytest.approx(np.sqrt(np.var(scores) * 5 / 4))
        assert task["paper_mean"] == pytest.approx(np.mean(TASKS[name].paper["mean"]))
        table = text[text.index(f"{name} fold"):].split("\n\n")[0].splitlines()
        assert [line.split()[0] for line in table[1:]] == [*"01234", "mean", "deviation"]
        assert f"{task['mean']:.3f}" in table[-2] and f"{task['deviation']:.3f}" in table[-1]
        assert all(f"{score:.3f}" in line for score, line in zip(scores, table[1:]))
    for name, columns in (("va", "valence paper arousal paper "), ("expr", ""), ("au", "")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} fold")]
        assert " ".join(line.split()[2:]) in [f"{columns}ours 95 % {more}chance paper baseline"
                                              for more in ("", "unseen ")]
    assert max(map(len, text.splitlines())) <= 110


def test_the_papers_numbers_are_left_out_where_they_are_not_comparable(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/my_fold2/task_au_fold2/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "comparable": False}))
    assert start(monkeypatch) == 0
    text = (tmp_path / "runs/my/folds.txt").read_text()
    assert "paper" not in text and "baseline" not in text and "chance" in text
    assert json.loads((tmp_path / "runs/my/folds.json").read_text())["comparable"] is False


def test_a_task_without_labels_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, ("expr", "au")))
    with pretended(Ran()) as ran:
        assert start(monkeypatch) == 0
    assert not [line for line in ran.short() if " va" in line]
    assert list(json.loads((tmp_path / "runs/my/folds.json").read_text())["tasks"]) == ["expr", "au"]


@pytest.mark.parametrize("setting", ["task.fold=1", "finetune.fold=2"])
def test_a_fold_in_the_settings_is_refused(place, monkeypatch, capsys, setting):
    assert start(monkeypatch, "--set", setting) == 2
    assert capsys.readouterr().err == (
        "error: task.fold and finetune.fold are set by folds.py for each fold; leave them at 0\n")


# ---- Really

@pytest.mark.slow
def test_folds_of_real_stages_score_each_video_once_by_an_encoder_that_has_not_seen_it(tmp_path, monkeypatch):
    folder = tiny.write(tmp_path, synthetic={"train_videos": 9, "val_videos": 5})
    ran = []

    def run(job, processes):
        words = job.words(processes)
        tiny.done(folder, *[words[1].rpartition("/")[2], *words[2:]])
        ran.append(job.title)
        return 1
    monkeypatch.chdir(folder)
    monkeypatch.setattr(many_runs, "run", run)
    command = ["folds.py", "--config", "tiny.yaml", "--processes", "1"]
    assert start(monkeypatch, command=command) == 0
    assert len(ran) == 4 + 3 + 4 * 5
    found = json.loads((folder / "runs/tiny/folds.json").read_text())
    for name, task in found["tasks"].items():
        scored = []
        for row in task["folds"][1:]:
            names, sums = read_sums(folder / row["folder"])
            record = made_of.read_record(folder / row["folder"])
            trained = {scene(video) for video in made_of.tuned_on(record)}
            assert trained and not trained & {scene(video) for video in names} and row["seen_videos"] == 0
            assert row["score"] == pytest.approx(TASKS[name].metric.score(sums.sum(axis=0)).mean())
            low, high = interval(sums, TASKS[name].metric)[-1][1:]
            assert row["interval"] == pytest.approx([low, high])
            scored += names
        labels = folder / "data/Aff-Wild2/annotations" / TASKS[name].folders[0]
        assert sorted(scored) == sorted(path.stem for path in labels.rglob("*.txt"))
    monkeypatch.undo()
    before = tiny.content(folder / "runs")
    task = folder / "runs/tiny_fold2/task_va_fold2"
    for path in task.iterdir():
        path.unlink()
    with contextlib.chdir(folder):
        code, said = tiny.end(tiny.command(folder, fake_stages.script("folds.py"), *command[1:]))
    assert code == 0 and said.count("---- done in ") == 1 and "task_va_fold2/best.pt" in said
    after = tiny.content(folder / "runs")
    assert after.keys() == before.keys()
    assert after["tiny/folds.json"][0] == before["tiny/folds.json"][0]
