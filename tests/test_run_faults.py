"""A run ends with a message and code 2, its last checkpoint intact, when another run has its folder, when
settings or data have changed, and after a full disk, a loss that is not finite or a failing worker."""

import errno
import io
import math
import os
import re
import time
from functools import partial

import pytest
import torch

import checkpoints
import tiny
from tiny import (EACH_STEP, QUICK_OR_SLOW, STAGES, TINY, TRAIN_AU, Job, assert_same, content, done, ready,
                  run, stop)


# ---- A second run in the same folder

def held(folder, *ignored):
    """At the third step, wait until there is a file named go."""
    (folder / "waiting").touch()
    limit = time.monotonic() + 60
    while not (folder / "go").exists() and time.monotonic() < limit:
        time.sleep(0.01)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(undisturbed, tmp_path):
    folder, place = ready(undisturbed, tmp_path, "task_au")
    first = Job(folder, *TRAIN_AU, hook=partial(tiny.at, "run.Run.end_step", 3, partial(held, folder)))
    refusal = "error: runs/tiny/task_au: another run is writing here; wait for it, or choose another"
    try:
        limit = time.monotonic() + 60
        while not (folder / "waiting").exists():
            assert time.monotonic() < limit, first.said()
            time.sleep(0.01)
        before = content(place)
        for world in (1, 2):
            codes, said = run(folder, *TRAIN_AU, world=world)
            assert codes == [2] * world and refusal in said
        assert content(place) == before
    finally:
        (folder / "go").touch()
        assert first.end().codes == [0]
    assert_same(place, undisturbed / "runs/tiny/task_au")


# ---- Other settings, less data

@pytest.mark.parametrize("stage, field, old, new", [
    ("pretrain", "pretrain.lr", 0.003, 0.001), ("pretrain", "run.seed", 0, 1),
    ("finetune", "finetune.dropout", 0.2, 0.1), ("task_au", "task.batch", 3, 4)])
def test_a_changed_setting_is_refused_and_named(undisturbed, tmp_path, stage, field, old, new):
    folder, place = ready(undisturbed, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    assert run(folder, *command, hook=stop("run.Run.end_step", 2)).codes == [-9]
    before = content(place)
    codes, said = run(folder, *command, "--set", f"{field}={new}")
    assert codes == [2]
    assert said == (f"error: runs/tiny/{stage} was made with other settings:\n"
                    f"  {field}: was {old}, now {new} (of stage {stage})\n"
                    "two ways on: the earlier values, or a run of its own, --set run.name=NEW --set "
                    "run.base=tiny, which takes over the stages before it that stay the same\n")
    assert content(place) == before


def test_a_setting_that_does_not_change_the_result_is_no_reason_to_refuse(undisturbed, tmp_path):
    folder, place = ready(undisturbed, tmp_path, "task_au")
    done(folder, *TRAIN_AU, "--set", "task.features=", "--set", "run.checkpoint_minutes=3",
         "--set", "features.batch=1", "--set", "data.labels=data/../data/Aff-Wild2/annotations/")
    assert_same(place, undisturbed / "runs/tiny/task_au")


def test_a_run_does_not_go_on_with_less_data_than_it_began_with(undisturbed, tmp_path):
    """As when a disk is not mounted after a restart."""
    for stage, gone, changed in (("pretrain", "data/RAF-DB", "data.raf_db: was 15 images, names "),
                                 ("finetune", "data/Aff-Wild2/cropped_aligned", "training: was ")):
        folder, place = ready(undisturbed, tmp_path / stage, stage)
        command = [*STAGES[stage], *TINY, *EACH_STEP]
        assert run(folder, *command, hook=stop("run.Run.end_step", 2)).codes == [-9]
        kept = {name: file for name, (file, _) in content(place).items()}
        victim = next(path for path in sorted((folder / gone).rglob("*.jpg")))
        victim.rename(folder / "elsewhere")
        codes, said = run(folder, *command)
        assert codes == [2] and "two ways on: bring back what it began with" in said, said
        assert f"runs/tiny/{stage} was made from other data:\n  {changed}" in said
        assert {name: file for name, (file, _) in content(place).items()} == kept
        (folder / "elsewhere").rename(victim)
        done(folder, *command)
        assert_same(place, undisturbed / "runs/tiny" / stage)


# ---- A full disk

class Full(io.FileIO):
    """A file on a disk with 1000 bytes left."""
    room = 1000

    def write(self, block):
        Full.room -= len(block)
        if Full.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


def full_disk(buffered, fits=4):
    """After `fits` files that write_file has written, the disk is full. torch.save sees it in two ways."""
    count = 0

    def opened(path, mode="r", **keywords):
        nonlocal count
        count += mode == "wb"
        if mode != "wb" or count <= fits:
            return open(path, mode, **keywords)
        return io.BufferedWriter(Full(path, "w")) if buffered else Full(path, "w")
    checkpoints.open = opened


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "not buffered"])
@pytest.mark.parametrize("stage", QUICK_OR_SLOW)
def test_a_full_disk_stops_the_run_with_a_message_and_the_last_checkpoint_goes_on(
        undisturbed, tmp_path, stage, buffered):
    folder, place = ready(undisturbed, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    codes, said = run(folder, *command, hook=partial(full_disk, buffered))
    assert codes == [2] and "Traceback" not in said, said
    assert ("No space left on device; free some space and start the same command again, "
            "the last checkpoint is intact") in said
    steps = torch.load(place / "last.pt", weights_only=True)["step"]
    assert steps == 2 and not list(place.glob("*.tmp")) and not list(place.glob(".*.tmp"))
    assert "going on from epoch 1, step 2" in done(folder, *command)
    assert_same(place, undisturbed / "runs/tiny" / stage)


def test_a_full_disk_stops_an_extraction_with_a_message_and_the_videos_that_are_done_stay(
        undisturbed, tmp_path):
    folder, place = ready(undisturbed, tmp_path, "features")
    codes, said = run(folder, "extract_features.py", *TINY, hook=partial(full_disk, True, 6))
    assert codes == [2] and "Traceback" not in said
    assert "No space left on device; free some space and start the same command again" in said
    assert 2 <= len(list(place.glob("*.npy"))) < 2 * 7             # an array and a mask per video
    assert not list(place.glob(".*.tmp"))
    done(folder, "extract_features.py", *TINY)
    for path in (undisturbed / "runs/tiny/features").glob("*.npy"):
        assert (place / path.name).read_bytes() == path.read_bytes()


# ---- A loss that is not finite

@pytest.mark.parametrize("world, stage, section", [
    (1, "pretrain", "pretrain"), (1, "finetune", "finetune"), (1, "task_au", "task"),
    pytest.param(2, "pretrain", "pretrain", marks=pytest.mark.slow),
    pytest.param(2, "finetune", "finetune", marks=pytest.mark.slow), (2, "task_au", "task")])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_report_and_the_last_finite_checkpoint(
        undisturbed, tmp_path, world, stage, section):
    folder, place = ready(undisturbed, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP, "--set", f"{section}.lr=1e30"]
    for _ in range(2):             # the second time from the checkpoint, which is finite but hopeless
        codes, said = run(folder, *command, world=world)
        assert codes == [2] * world and "Traceback" not in said
        report = re.search(r"error: the loss is \S+, the gradient norm \S+ at epoch 1, step \d+, "
                           r"learning rate \S+; the (\d+) samples of this step are listed in (\S+)\n", said)
        assert report and "Two things to try: a lower learning rate" in said, said
        samples = (folder / report[2]).read_text().splitlines()
        assert len(samples) == int(report[1]) == tiny.SETTINGS[section]["batch"]
        assert all(re.search(r"\.jpg$|line \d+$|frames \d+ to \d+$", sample) for sample in samples)
        saved = torch.load(place / "last.pt", weights_only=True)
        assert all(value.isfinite().all() for value in saved["model"].values())
        assert math.isfinite(saved["sums"]["loss"])
        assert not (place / "metrics.json").exists()


# ---- A failing worker

def disk_error(*ignored):
    raise OSError("the disk is gone")


@pytest.mark.parametrize("world", [1, 2])
def test_a_worker_that_fails_ends_the_run(undisturbed, tmp_path, world):
    """The other workers are not waited for, and the other process says so in one line."""
    folder, _ = ready(undisturbed, tmp_path, "task_au")
    hook = partial(tiny.at, "segments.SegmentData.__getitem__", 2, disk_error)
    codes, said = run(folder, *TRAIN_AU, "--set", "run.workers=2", world=world, hook=hook)
    assert set(codes) <= {1, 2} and 2 in codes and "OSError: the disk is gone" in said
    ended = "error: another process of this run has ended; see its message or exit code"
    assert codes.count(1) == said.count(ended) and "RuntimeError" not in said
