"""The scripts themselves, killed or stopped and started again, by hand or by torchrun, end with the bits of
a run that nobody disturbed. What they share is tested in test_run.py. As a script: what torchrun starts."""

import os
import random
import signal
import sys
import time
from functools import partial

import pytest

import tiny
from tiny import (EACH_STEP, STAGES, TINY, TRAIN_AU, Job, apart, assert_same, done, log, ready, run, stop,
                  weights)

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
# One start after another in one folder: the signal that ends it, before this call of this function.
STARTS = [(KILL, "engine.run.Run.end_step", 1), (KILL, "engine.run.Run.end_step", 3),
          (TERM, "engine.run.Run.end_step", 1),
          (TERM, "engine.run.Run.obey_signals", 1),        # in the validation
          (KILL, "engine.run.Run.log", 1),                 # before the row of an epoch
          (INT, "engine.run.Run.log", 1),                  # between two epochs
          (KILL, "engine.run.Run.end_step", 2),            # in the second epoch
          (INT, "engine.run.Run.log", 1),                  # after the last step
          (KILL, "engine.run.Run.end", 1), (KILL, "engine.run.Run.finish", 1)]
SLOW, SOAK = pytest.mark.slow, pytest.mark.soak
TRAININGS = ("task_au", "pretrain", "finetune", "stills", "emma", "cotex")
# Of all stages with 1, 2 and 3 processes these are slow, the others soak.
OFTEN = {("task_au", 1), ("pretrain", 1), ("finetune", 3)} | {(stage, 2) for stage in TRAININGS}
CASES = [("task_au", 1, STARTS[3::6]),
         *(pytest.param(stage, world, STARTS, marks=SLOW if (stage, world) in OFTEN else SOAK)
           for stage in TRAININGS for world in (1, 2, 3))]


@pytest.fixture(scope="session")
def everything(undisturbed):
    """`undisturbed` with the second paper's stages."""
    for stage in ("emma", "cotex"):
        done(undisturbed, *STAGES[stage], *TINY)
    return undisturbed


def disturbed(world, number, function, count):
    """A hook: all processes are killed, or the last one is told to stop."""
    if number == KILL or int(os.environ["RANK"]) == world - 1:
        stop(function, count, number)()


@pytest.mark.parametrize("stage, world, starts", CASES)
def test_killed_and_stopped_at_many_moments_a_stage_ends_with_the_same_bits(
        request, tmp_path, stage, world, starts):
    """Of several processes one is told to stop; the others stop after the same step."""
    source = request.getfixturevalue("everything" if stage in ("stills", "emma", "cotex") else "undisturbed")
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    folder, place = ready(source, tmp_path / "disturbed", stage)
    expected = source / "runs/tiny" / stage
    if world > 1:
        calm, expected = ready(source, tmp_path / "calm", stage)
        done(calm, *command, world=world)
    for i, (number, *moment) in enumerate(starts):
        codes, said = run(folder, *command, world=world, hook=partial(disturbed, world, number, *moment))
        assert codes == [128 + number] * world or number == KILL and -KILL in codes and 0 not in codes, said
        assert number == KILL or f"stopped by {number.name} after step" in said
        assert "going on from epoch" in said or i < 2
    done(folder, *command, world=world)
    assert_same(place, expected)


def test_a_run_may_go_on_with_another_number_of_processes(finished, tmp_path):
    folder, place = ready(finished, tmp_path, "task_au")
    for world, steps in ((2, 3), (1, 0)):
        codes, said = run(folder, *TRAIN_AU, *EACH_STEP, world=world,
                          hook=steps and stop("engine.run.Run.end_step", steps))
        assert codes == [-KILL if steps else 0] * world, said
    expected = finished / "runs/tiny/task_au"
    assert apart(weights(place), weights(expected)) < 1e-5
    for ours, theirs in zip(log(place), log(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)


def group_told():
    """As a scheduler, torchrun and a terminal send their signal: to the whole process group."""
    os.setsid()
    tiny.before("engine.run.Run.end_step", 2, lambda: os.killpg(0, TERM))


def test_workers_that_read_ahead_and_are_told_to_stop_too_change_nothing(undisturbed, tmp_path):
    folder, place = ready(undisturbed, tmp_path, "finetune")
    command = [*STAGES["finetune"], *TINY, "--set", "run.workers=2"]
    codes, said = run(folder, *command, hook=group_told)
    assert codes == [128 + TERM] and "worker" not in said and "after step 2; saved" in said
    done(folder, *command)
    assert_same(place, undisturbed / "runs/tiny/finetune")


# ---- Under torchrun

def killed_once():
    """A worker is killed after its second step, and left alone when it is started again."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        stop("engine.run.Run.end_step", 3)()


def told_to_stop():
    """A worker tells torchrun to stop, as a scheduler does, and each gives it time to pass that on."""
    def act():
        if os.environ["RANK"] == "1":
            os.kill(os.getppid(), TERM)
        time.sleep(5)
    tiny.before("engine.run.Run.end_step", 1, act)


@SLOW
@pytest.mark.parametrize("hooks, words, agents", [
    (["told_to_stop", "killed_once"], "--nproc_per_node=2", 1),
    (["killed_once"], "--nproc_per_node=1 --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:2941", 2)])
def test_torchrun_passes_a_stop_on_and_starts_its_processes_again_when_one_has_died(
        undisturbed_by_two, undisturbed, tmp_path, hooks, words, agents):
    folder, place = ready(undisturbed, tmp_path, "task_au")
    for hook in hooks:
        torchrun = ["-m", "torch.distributed.run", "--max_restarts=3", *words.split()]
        command = [*torchrun, __file__, hook, *TRAIN_AU, *EACH_STEP]
        started = [tiny.command(folder, *command) for _ in range(agents)]
        said = "".join(agent.communicate(timeout=tiny.SECONDS)[0] for agent in started)
        assert all((agent.returncode == 0) == (hook == "killed_once") for agent in started), said
        assert "stopped by SIGTERM after step 1; saved" in said or "going on from epoch" in said, said
    assert_same(place, undisturbed_by_two)


# ---- For many minutes: pytest -m soak -s

@SOAK
@pytest.mark.parametrize("world", [1, 2])
def test_all_stages_killed_twenty_times_at_random_moments_end_with_the_same_bits(tmp_path, world):
    sizes = {"pretrain": {"epochs": 200}, "finetune": {"epochs": 120, "dropout": 0.2},
             "task": {"epochs": 120}, "temporal": {"dropout": 0.2}, "run": {"checkpoint_minutes": 0.002}}
    calm, folder = tiny.write(tmp_path / "calm", **sizes), tiny.write(tmp_path / "killed", **sizes)
    began, moments, kills = time.time(), random.Random(world), 0
    done(calm, *TRAIN_AU, world=world)
    seconds = time.time() - began
    while not (folder / "runs/tiny/task_au/metrics.json").exists():
        job = Job(folder, *TRAIN_AU, world=world)
        job.processes[0].join(moments.uniform(0.3, 0.3 + seconds / 20))
        kills += job.processes[0].is_alive()
        job.kill()
    print(f"\n{world} process(es): undisturbed {seconds:.0f} s; {kills} kills, {time.time() - began:.0f} s")
    done(folder, *TRAIN_AU, world=world)
    assert kills >= 20
    for stage in ("pretrain", "finetune", "task_au"):
        assert_same(folder / "runs/tiny" / stage, calm / "runs/tiny" / stage)


if __name__ == "__main__":
    tiny.become(globals()[sys.argv[1]], sys.argv[2:])
