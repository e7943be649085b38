"""Minutes of random kills, left out of the quick suite:  pytest -m soak -s

All stages, one after another by one command, are killed with SIGKILL at moments that a seeded generator
picks, in one process and in two, and started again until they are done. The weights must be those of a run
that nobody disturbed, bit for bit.
"""

import random
import shutil
import time

import pytest

import tiny
from tiny import TRAIN_AU, Job, done, same, weights

KILLS = 20
SETTINGS = {"pretrain": {"epochs": 200}, "finetune": {"epochs": 120, "dropout": 0.2},
            "temporal": {"dropout": 0.2}, "task": {"epochs": 120},
            "run": {"workers": 0, "checkpoint_minutes": 0.002}}


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_twenty_times_at_random_moments_ends_with_the_same_bits(tmp_path, world):
    calm, killed = tiny.write(tmp_path / "calm", **SETTINGS), tiny.write(tmp_path / "killed", **SETTINGS)
    began = time.time()
    done(calm, *TRAIN_AU, world=world)
    whole, random_moments, kills, starts = time.time() - began, random.Random(world), 0, 0
    shutil.copytree(calm / "data", killed / "data")
    while True:
        job, starts = Job(killed, *TRAIN_AU, world=world), starts + 1
        deadline = time.time() + random_moments.uniform(0.3, 0.3 + whole / KILLS)
        while kills < 2 * KILLS and time.time() < deadline and any(p.is_alive() for p in job.processes):
            time.sleep(0.005)
        if kills < 2 * KILLS and any(p.is_alive() for p in job.processes):
            job.kill()
            kills += 1
            for process in job.processes:
                process.join()
            continue
        ended = job.end()
        assert not any(ended.codes), ended.said
        break
    print(f"\n{world} process(es): undisturbed {whole:.0f} s; {kills} kills, {starts} starts, "
          f"{time.time() - began - whole:.0f} s")
    assert kills >= KILLS, f"only {kills} kills before the run was done"
    for stage, file in (("pretrain", "last.pt"), ("finetune", "best.pt"),
                        ("task_au", "last.pt"), ("task_au", "best.pt")):
        expected = weights(calm / "runs/tiny" / stage, file)
        assert same(expected, weights(killed / "runs/tiny" / stage, file)), (stage, file)
