"""Minutes of random kills, left out of the quick suite:  pytest -m soak -s

All stages, one after another by one command, are killed with SIGKILL at moments that a seeded generator picks, in one process and
in two, and started again until they are done. The weights must be those of a run that nobody disturbed, bit for bit.
"""

import random
import shutil
import time

import pytest

import tiny
from tiny import STAGES, TINY, Job, done, same, weights

KILLS = 20


@pytest.mark.soak
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_twenty_times_at_random_moments_ends_with_the_same_bits(tmp_path, world):
    settings = {
        "pretrain": {"epochs": 200},
        "finetune": {"epochs": 120, "dropout": 0.2},
        "temporal": {"dropout": 0.2},
        "task": {"epochs": 120},
        "run": {"checkpoint_minutes": 0.002},
    }
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
        tiny.write(folder, **{**settings, "run": {"workers": 0, **settings["run"]}})
    began = time.time()
    done(calm, *STAGES["task_au"], *TINY, world=world)
    whole, random_moments, kills, starts = time.time() - began, random.Random(world), 0, 0
    shutil.copytree(calm / "data", killed / "data")
    while True:
        job, starts = Job(killed, *STAGES["task_au"], *TINY, world=world), starts + 1
        deadline = time.time() + random_moments.uniform(0.3, 0.3 + whole / KILLS)
        while kills < 2 * KILLS and time.time() < deadline and any(p.is_alive() for p in job.processes):
            time.sleep(0.005)
        if kills < 2 * KILLS and any(p.is_alive() for p in job.processes):
            job.kill()
            kills += 1
            [p.join() for p in job.processes]
            continue
        ended = job.end()
        assert not any(ended.codes), ended.said
        break
    print(
        f"\n{world} process(es): undisturbed {whole:.0f} s; {kills} kills, {starts} starts, {time.time() - began - whole:.0f} s"
    )
    assert kills >= KILLS, f"only {kills} kills before the run was done"
    for stage, file in (
        ("pretrain", "last.pt"),
        ("finetune", "best.pt"),
        ("task_au", "last.pt"),
        ("task_au", "best.pt"),
    ):
        assert same(weights(calm / "runs/tiny" / stage, file), weights(killed / "runs/tiny" / stage, file)), (
            stage,
            file,
        )
