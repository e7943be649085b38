"""Two runs beside each other (evaluate.py --against): the sign, the words, the same videos and labels."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluate import compare
from intervals import difference
from labels import TASKS, VA, targets
from segments import Video
from settings import Config

of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.run.out, config.run.name = str(tmp_path), "ours"
    return config


def videos(count: int) -> list[Video]:
    return [Video(f"v{i}", None, np.zeros(0)) for i in range(count)]


def sums_of(task, noise: float, seed: int = 0, count: int = 12) -> np.ndarray:
    """The sums of `count` videos; with more noise the outputs are worse, the labels stay. (videos, ...)"""
    rng, sums = np.random.default_rng(seed), []
    for _ in range(count):
        hidden = rng.normal(0, 0.4, (60, len(task.outputs)))
        labels = {"va": hidden.clip(-1, 1), "expr": hidden.argmax(axis=1), "au": hidden > 0}[task.name]
        outputs = hidden + noise * rng.normal(size=hidden.shape)
        sums.append(task.metric.count(outputs, *targets(labels.astype(task.dtype), task)))
    return np.stack(sums)


def store(config, task, names, sums):
    """What a finished run named "theirs" has written."""
    folder = Path(config.run.out) / f"theirs/task_{task.name}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").touch()
    (folder / "video_sums.json").write_text(json.dumps({"videos": names, "sums": sums.tolist()}))


@of_each_task
@pytest.mark.parametrize("ours, theirs, verdict", [(0.1, 0.8, "ours is better"), (0.8, 0.1, "ours is worse")])
def test_the_difference_is_ours_less_theirs_whatever_the_order_of_their_videos(
        config, task, ours, theirs, verdict):
    mine, other, order = sums_of(task, ours), sums_of(task, theirs), np.random.default_rng(1).permutation(12)
    store(config, task, [f"v{i}" for i in order], other[order])
    said = compare(task, mine, videos(12), "theirs", config)
    found = difference(mine, other, task.metric)
    assert said.startswith(f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] against theirs "
                           f"({task.metric.score(other.sum(axis=0)).mean():.3f}, ")
    assert said.endswith(f"over 12 videos; {verdict}") and (found.value > 0) == (verdict == "ours is better")


def test_where_the_interval_holds_0_no_run_is_called_better(config):
    store(config, VA, [f"v{i}" for i in range(12)], sums_of(VA, 0.3))
    said = compare(VA, sums_of(VA, -0.3), videos(12), "theirs", config)
    assert said.endswith("the interval holds 0: these videos do not tell which is better")


def test_other_videos_and_other_labels_are_not_compared(config):
    store(config, VA, [f"v{i}" for i in range(1, 13)], sums_of(VA, 0.3))
    with pytest.raises(ValueError, match="theirs/task_va was scored on other videos, such as v0, v12; two"):
        compare(VA, sums_of(VA, 0.3), videos(12), "theirs", config)
    fewer = sums_of(VA, 0.3)
    fewer[0, :, 0] -= 5                                     # five frames without a label
    with pytest.raises(ValueError, match="theirs/task_va was scored with other labels"):
        compare(VA, fewer, [Video(f"v{i}", None, np.zeros(0)) for i in range(1, 13)], "theirs", config)
