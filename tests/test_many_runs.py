"""Running the stages of many runs as commands: signals, failures, what is finished, how long it takes."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import many_runs
import pipeline
from config import load
from labels import AU, EXPR, TASKS
from many_runs import Job, estimate, in_words, known_seconds, other, own_stages, plan, processes_for, run
from test_data import label_file
from tiny import ROOT

CHILD = """
import os, signal, sys, time
code = int(os.environ.get("CODE", 0))
def stopped(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
print(sys.argv[1:], os.environ.get("WORLD_SIZE"), flush=True)
open("begun", "w").close()
end = time.monotonic() + 20
while "WAIT" in os.environ and not os.path.exists("go") and time.monotonic() < end:
    time.sleep(0.01)
sys.exit(code)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with my.yaml, in which the stage `train_task` is a short program."""
    (tmp_path / "my.yaml").write_text("")
    (tmp_path / "train_task.py").write_text(CHILD)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(many_runs, "HERE", tmp_path)
    with contextlib.chdir(tmp_path):
        yield tmp_path


def job(*settings) -> Job:
    return Job("train_task", load("my.yaml", settings), AU)


# ---- Commands

def test_a_command_is_what_one_types(here):
    settings = ["run.name=a b", "temporal.kernels=[3,3,3]"]
    assert job(*settings).words(1) == ["python", "train_task.py", "--task", "au", "--config", "my.yaml",
                                       "--set", "run.name=a b", "--set", "temporal.kernels=[3,3,3]"]
    assert Job("extract_features", load("my.yaml")).words(3) == [
        "torchrun", "--nproc_per_node=3", "extract_features.py", "--config", "my.yaml"]


def test_a_command_runs_with_its_words_and_is_printed_first(here, capfd):
    assert 0 < run(job("run.name=a b"), processes=1) < 30
    assert capfd.readouterr().out.splitlines() == [
        "$ python train_task.py --task au --config my.yaml --set 'run.name=a b'",
        "['--task', 'au', '--config', 'my.yaml', '--set', 'run.name=a b'] None"]


def test_two_processes_are_started_by_torchrun(here):
    with mock.patch.object(many_runs.subprocess, "Popen") as popen:
        popen.return_value.wait.return_value = 0
        run(job(), processes=2)
    (words,), _ = popen.call_args
    assert words[1:] == ["-m", "torch.distributed.run", "--nproc_per_node=2", "train_task.py", "--task", "au",
                         "--config", "my.yaml"]


def test_a_command_that_fails_is_named_with_its_code(here, monkeypatch):
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(ValueError) as refusal:
        run(job(), processes=1)
    assert str(refusal.value) == (
        "this command ended with code 3, its message is above; what was finished before is kept:\n"
        "  python train_task.py --task au --config my.yaml")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_when_the_stage_has_saved(here, monkeypatch, capfd, number):
    """Ctrl-C reaches the stage by itself; here nobody sends it, so the stage ends well, and then all ends."""
    monkeypatch.setenv("WAIT", "1")

    def interrupt():
        while not (here / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:
            time.sleep(0.05)
            (here / "go").touch()
    before, helper = signal.getsignal(number), threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(SystemExit) as end:
        run(job(), processes=1)
    helper.join()
    out, err = capfd.readouterr()
    assert end.value.code == 128 + number and err == "stopped; start the same command again to go on\n"
    assert ("saved" in out) == (number == signal.SIGTERM)
    assert signal.getsignal(number) == before


def test_a_refusal_ends_with_one_line_and_code_2(capsys):
    def refuse(*arguments):
        raise ValueError(f"got {arguments}")
    with pytest.raises(SystemExit) as end:
        many_runs.start(refuse, 1, 2)
    assert end.value.code == 2 and capsys.readouterr().err == "error: got (1, 2)\n"


# ---- Settings and stages

def test_another_run_has_the_same_settings_but_those_that_are_given(here):
    config = load("my.yaml", ["task.lr=1e-4", "run.name=a", "task.lr=2e-4"])
    changed = other(config, "run.name=b", "finetune.fold=2")
    assert changed.run.source == "my.yaml --set task.lr=1e-4 --set task.lr=2e-4 --set run.name=b " \
                                 "--set finetune.fold=2"
    assert (changed.task.lr, changed.run.name, changed.finetune.fold) == (2e-4, "b", 2)
    assert config.run.name == "a" and config.finetune.fold == 0


@pytest.mark.parametrize("settings, stages", [
    ([], ["train_finetune", "extract_features"]), (["task.features=f"], []),
    (["features.checkpoint=vit.pt"], ["extract_features"]),
    (["finetune.start=none"], ["train_finetune", "extract_features"])])
def test_a_path_in_the_settings_takes_the_place_of_a_stage(here, settings, stages):
    config = load("my.yaml", settings)
    assert [job.stage for job in own_stages(config, "train_finetune", "extract_features")] == stages


def test_tasks_without_labels_are_left_out_unless_there_are_none_yet(here):
    config = load("my.yaml", ["data.labels=labels"])
    assert many_runs.labelled_tasks(config) == list(TASKS.values())
    label_file(here / "labels" / EXPR.folders[0] / "Train_Set/a.txt", EXPR, 1)
    assert many_runs.labelled_tasks(config) == [EXPR]


@pytest.mark.parametrize("device, gpus, wanted, processes", [
    ("auto", 0, None, 2), ("auto", 4, None, 4), ("cpu", 4, None, 2), ("cuda", 1, None, 1),
    ("mps", 0, None, 1), ("auto", 4, 3, 3), ("cpu", 0, 1, 1)])
def test_a_process_per_gpu_or_two_or_as_many_as_are_asked_for(here, device, gpus, wanted, processes):
    with mock.patch.object(torch.cuda, "device_count", return_value=gpus):
        assert processes_for(load("my.yaml", [f"run.device={device}"]), wanted) == processes


def test_less_than_one_process_is_refused(here):
    with pytest.raises(ValueError, match="--processes: got 0, expected 1 or more"):
        processes_for(load("my.yaml"), 0)


# ---- How long

def finish(folder, log: str = ""):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    if log:
        (folder / "log.csv").write_text(log)


def test_the_time_of_a_stage_is_that_of_the_same_stage_where_it_is_finished(here):
    finish(here / "runs/my/task_au", "epoch,loss,seconds\n1,0.5,10\n2,0.4,20.5\n")
    finish(here / "runs/my/finetune")                                               # does not tell
    finish(here / "runs/my/pretrain", "epoch,loss\n1,0.5\n")                        # nor this
    jobs = [job(), job("run.name=b"), Job("train_task", load("my.yaml"), EXPR)]
    known = known_seconds(jobs)
    assert known == {"train_task au": 30.5}
    assert [estimate(of, known) for of in jobs] == [30.5, 30.5, None]
    assert estimate(Job("train_finetune", load("my.yaml")), known) is None


def test_the_demos_times_are_known():
    config = load(ROOT / "configs/demo.yaml")
    for stage, seconds in pipeline.DEMO_SECONDS.items():
        assert estimate(Job(stage, config), {}) == seconds


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (119, "119 s"), (120, "2.0 min"), (7199, "120.0 min"), (7200, "2.0 h"), (1e6, "277.8 h")])
def test_times_are_told_in_a_unit_that_fits(seconds, words):
    assert in_words(seconds) == words


def test_the_plan_tells_finished_and_stale_ones_and_times(here):
    finish(here / "runs/my/task_au", "epoch,seconds\n1,70\n")
    jobs = [job(), job("run.name=b"), Job("train_task", load("my.yaml"), EXPR)]
    states = iter(["finished", "stale", "to be made"])
    with mock.patch.object(pipeline, "state", side_effect=lambda *ignored: next(states)):
        lines = plan(jobs, 1).splitlines()
    command = "python train_task.py --task {} --config my.yaml"
    assert [line.split(maxsplit=1) for line in lines[:1]] == [["finished", "runs/my/task_au"]]
    assert lines[1].split() == ["stale", "70", "s", *command.format("au").split(), "--set", "run.name=b"]
    assert lines[2].split() == ["to", "be", "made", "unknown", *command.format("expr").split()]
    assert lines[3] == (
        "3 commands, 1 of them finished; about 70 s for 1 more; 1 more of unknown length: none of this kind "
        "is finished here; a stale one will be refused, with its reason")


def test_only_what_is_not_finished_is_run_in_order(here, capsys):
    states, ran = {"a": "finished", "b": "stale", "c": "finished", "d": "to be made"}, []
    jobs = [SimpleNamespace(state=state, name=name, folder=Path(name)) for name, state in states.items()]
    with mock.patch.object(many_runs, "run", side_effect=lambda job, processes: ran.append(job.name) or 3):
        many_runs.run_all(jobs, 1)
    assert ran == ["b", "d"]
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        "---- 2 of 4", "---- done in 3 s", "---- 4 of 4", "---- done in 3 s"]


def test_a_stage_keeps_how_long_its_command_took_unless_that_was_only_the_rest(here, capsys):
    whole, rest, data = (job(f"run.name={name}") for name in ("whole", "rest", "data"))
    rest.folder.mkdir(parents=True)
    (rest.folder / "last.pt").touch()                                    # it was stopped before

    def run(job, processes):
        if job is not data:                                              # what is drawn has no metrics.json
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "metrics.json").write_text("{}")
            (job.folder / "log.csv").write_text("epoch,seconds\n1,3\n")
        return 21.34
    with mock.patch.object(many_runs, "run", run):
        many_runs.run_all([whole, rest, data], 1)
    assert (whole.folder / "seconds.txt").read_text() == "21.3\n"
    assert not (data.folder / "seconds.txt").exists()
    assert [many_runs.seconds_of(each.folder) for each in (whole, rest, data)] == [21.3, 3, None]


def test_options_of_a_script_come_before_the_settings(here):
    assert Job("evaluate", load("my.yaml"), AU, ("--merge", "none")).words(1) == [
        "python", "evaluate.py", "--task", "au", "--merge", "none", "--config", "my.yaml"]
