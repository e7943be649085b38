"""A run that is stopped by SIGTERM or SIGINT saves and says so, and when it is started again it ends with the
weights of an undisturbed one."""

import os
import re
import shutil
import signal
from functools import partial

import pytest

import tiny
from tiny import (QUICK_OR_SLOW, STAGES, TINY, TRAIN_AU, apart, assert_same, copied, done, ready, run, stop,
                  weights)

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def only(rank, hook):
    """`hook`, in one of the processes."""
    if os.environ["RANK"] == str(rank):
        hook()


# ---- In a step, and between two epochs

@pytest.mark.parametrize("stage", QUICK_OR_SLOW)
def test_a_stopped_run_saves_says_so_and_goes_on_to_the_same_bits(undisturbed, tmp_path, stage):
    """SIGTERM and SIGINT, in a step, in the last step of an epoch, and between two epochs; without
    checkpoints of its own."""
    folder, place = ready(undisturbed, tmp_path, stage)
    command = [*STAGES[stage], *TINY]
    for number, code, function, count in ((signal.SIGTERM, 143, "run.Run.end_step", 2),
                                          (signal.SIGINT, 130, "run.Run.end_step", 1),
                                          (signal.SIGTERM, 143, "run_folder.RunFolder.log", 1)):
        codes, said = run(folder, *command, hook=stop(function, count, number))
        assert codes == [code] and "Traceback" not in said
        assert re.search(rf"stopped by {number.name} after step \d+; saved, "
                         "start the same command again to go on", said)
        assert (place / "last.pt").exists() and not (place / "metrics.json").exists()
    assert "going on from epoch" in done(folder, *command)
    assert_same(place, undisturbed / "runs/tiny" / stage)


@pytest.mark.parametrize("stage", QUICK_OR_SLOW)
def test_stopped_in_the_last_step_of_an_epoch_a_run_goes_on_to_the_same_bits(undisturbed, tmp_path, stage):
    folder, place = ready(undisturbed, tmp_path, stage)
    command = [*STAGES[stage], *TINY]
    said = run(folder, *command, hook=stop("run_folder.RunFolder.log", 1, signal.SIGTERM)).said
    last = int(re.search(r"after step (\d+)", said)[1]) - 1         # that stop was in the step after it
    shutil.rmtree(place)
    codes, said = run(folder, *command, hook=stop("run.Run.end_step", last, signal.SIGTERM, after=False))
    assert codes == [143] and f"stopped by SIGTERM after step {last};" in said
    done(folder, *command)
    assert_same(place, undisturbed / "runs/tiny" / stage)


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_stop_after_the_last_step_of_a_stage_is_not_forgotten(undisturbed, tmp_path, number, code):
    """The next stage must not begin: a scheduler would kill it."""
    folder = copied(undisturbed, tmp_path, ["finetune", "features", "task_au"])
    codes, said = run(folder, *TRAIN_AU, hook=stop("run_folder.RunFolder.log", 2, number))
    assert codes == [code] and f"stopped by {number.name}" in said and "extracting" not in said
    done(folder, *TRAIN_AU)
    assert_same(folder / "runs/tiny/task_au", undisturbed / "runs/tiny/task_au")


# ---- In a validation

@pytest.mark.parametrize("stage, validated, before", [("finetune", "vit.VisionTransformer.features", 5),
                                                      ("task_au", "scoring.segment_outputs", 0)])
@pytest.mark.parametrize("world, calls", [(1, 2), (2, 1), (1, 0)], ids=["one process", "two", "just before"])
def test_stopped_in_a_validation_a_run_does_not_wait_for_its_end(
        finished, tmp_path, stage, validated, before, world, calls):
    """torchrun and schedulers kill what is still there after half a minute, and a validation may take longer.

    `before`: how often the function is called in the five steps of the first epoch.
    """
    folder, place = ready(finished, tmp_path, stage)
    command = [*STAGES[stage], *TINY]
    hook = stop(validated, before + calls, signal.SIGTERM)
    if not calls:
        hook = stop("run.Run.unless_stopped", 1, signal.SIGTERM, after=False)
    codes, said = run(folder, *command, world=world, hook=hook)
    assert codes == [143] * world and "stopped by SIGTERM after step 5; saved" in said
    assert not (place / "log.csv").exists() and not (place / "best.pt").exists()
    assert "going on from epoch 1, step " in done(folder, *command)
    assert apart(weights(place), weights(finished / "runs/tiny" / stage)) < 1e-5


def test_one_process_of_two_that_is_told_to_stop_in_a_validation_stops_both(
        undisturbed_by_two, undisturbed, tmp_path):
    """The one that does not save must not leave before the other has."""
    folder, place = ready(undisturbed, tmp_path, "task_au")
    hook = partial(only, 1, stop("scoring.segment_outputs", 1, signal.SIGTERM))
    codes, said = run(folder, *TRAIN_AU, world=2, hook=hook)
    assert codes == [143, 143] and said.count("; saved, start the same command again") == 1
    done(folder, *TRAIN_AU, world=2)
    assert_same(place, undisturbed_by_two)


# ---- One process of two, and DataLoader's workers

def test_one_process_of_two_that_is_told_to_stop_stops_both(undisturbed_by_two, undisturbed, tmp_path):
    folder, place = ready(undisturbed, tmp_path, "task_au")
    hook = partial(only, 1, stop("run.Run.end_step", 4, signal.SIGTERM, after=False))
    codes, said = run(folder, *TRAIN_AU, world=2, hook=hook)
    assert codes == [143, 143] and said.count("stopped by SIGTERM after step 4; saved") == 1
    done(folder, *TRAIN_AU, world=2)
    assert_same(place, undisturbed_by_two)


@pytest.mark.parametrize("number, code", SIGNALS)
def test_workers_that_are_told_to_stop_too_go_on_until_the_run_has_saved(
        undisturbed_by_two, undisturbed, tmp_path, number, code):
    """A scheduler, torchrun and a terminal all send their signal to the whole process group."""
    folder, place = ready(undisturbed, tmp_path, "task_au")
    hook = partial(group_told, number)
    codes, said = run(folder, *TRAIN_AU, "--set", "run.workers=2", world=2, hook=hook)
    assert codes == [code] * 2 and "worker" not in said
    assert said.count(f"stopped by {number.name} after step 4; saved") == 1
    done(folder, *TRAIN_AU, world=2)
    assert_same(place, undisturbed_by_two)


def group_told(number):
    os.setsid()
    tiny.at("run.Run.end_step", 4, lambda *ignored: os.killpg(0, number), after=False)
