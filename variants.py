"""A system with other settings, and with other seeds: which runs these are, and how they are compared.

A run with the settings of another, less some, takes over the stages that stay the same (run.base). Here are
the names and settings of such runs, their stages as jobs for `many_runs.py`, and their scores beside those of
the whole system. ablation.py leaves out parts, experiments.py tries ideas.
"""

import re
from functools import partial
from typing import NamedTuple

import numpy as np

import many_runs
import pipeline
import scoring
from distributed import Team, choose_device
from intervals import difference_over_seeds
from labels import Task
from many_runs import Job
from postprocessing import Postprocessing
from scoring import count_frames, find_features, load, read_sums, stage_of
from segments import open_videos
from splits import split
from tuning import choose


class Variant(NamedTuple):
    """A system that differs from the whole one. `own`: the stages before train_task.py that are not those of
    the whole system. `settings` may hold {mae} and {vit}, the checkpoints of the whole system."""
    title: str
    name: str                   # in the name of its runs
    settings: tuple = ()
    own: tuple = ()
    merge: str = "mean"         # how overlapping segments are merged; another one is only scored, not trained
    tune: bool = False          # smoothing and thresholds chosen on held-out videos; only scored as well

    @property
    def trained(self) -> bool:
        return self.merge == "mean" and not self.tune


WHOLE = Variant("nothing", "whole")


# ---- What is to be run

def settings_of(config, variant: Variant) -> list[str]:
    """The settings in which a variant differs from `config`, the whole system."""
    mae = config.finetune.start or pipeline.result("train_pretrain", config)
    vit = config.features.checkpoint or pipeline.result("train_finetune", config)
    return [setting.format(mae=mae, vit=vit) for setting in variant.settings]


def config_of(config, variant: Variant, seed: int):
    """The settings of a variant with a seed."""
    base = config.run.name
    whole = base if seed == config.run.seed else f"{base}_seed{seed}"
    if variant.name == WHOLE.name:
        if whole == base:
            return config
        return many_runs.other(config, f"run.name={whole}", f"run.base={base}", f"run.seed={seed}")
    settings = settings_of(config_of(config, WHOLE, seed), variant)
    return many_runs.other(config, f"run.name={base}_{variant.name}_seed{seed}", f"run.base={whole}",
                           f"run.seed={seed}", *settings)


def jobs_of(config, variant: Variant, tasks: list[Task], seed: int) -> list[Job]:
    """The stages of a variant with a seed, in the order in which they need each other."""
    if not variant.trained:
        return []
    changed = config_of(config, variant, seed)
    own = many_runs.own_stages(changed, *variant.own)
    if changed is config:
        own = many_runs.inputs("train_task", config)
    elif variant.name == WHOLE.name:
        own = many_runs.own_stages(changed, *pipeline.LENT)
    return [*own, *(Job("train_task", changed, task) for task in tasks)]


# ---- What has come of it

def sums_of(config, task: Task, merge: str = "mean", tune: bool = False) -> tuple[list[str], np.ndarray]:
    """The validation videos of a finished task and their sums (videos, ...), with segments merged so, and
    smoothing and thresholds tuned or not."""
    folder = config.folder(stage_of(config, task))
    if merge == "mean" and not tune:
        return read_sums(folder)
    path, team = folder / "best.pt", Team(0, 1, choose_device(config.run.device))
    trained = load(path, config, task, team)
    features, origin = find_features(config, team)
    train_files, val_files = split(config.data.labels, task, config.task.fold)
    videos = open_videos(val_files, features, task)[0]
    how = Postprocessing()
    if tune:
        how = choose(trained, open_videos(train_files, features, task)[0], origin, merge, path)
    sums = scoring.sums_of(trained, videos, merge, partial(count_frames, merge=merge, how=how))
    return [video.name for video in videos], sums


def sums_over_seeds(config, variant: Variant, task: Task, seeds, order=None) -> tuple[list[str], np.ndarray]:
    """The sums of a variant, (seeds, videos, ...), the videos in the given order or in that of the first
    seed. Raises ValueError if they are other videos."""
    found = []
    for seed in seeds:
        changed = config_of(config, variant, seed)
        names, sums = sums_of(changed, task, variant.merge, variant.tune)
        order = order or names
        if sorted(names) != sorted(order):
            raise ValueError(f"{changed.folder(stage_of(changed, task))} was scored on other videos than the "
                             "other runs, so they cannot be compared; begin another --set run.name=...")
        found.append(sums[[names.index(name) for name in order]])
    return order, np.stack(found)


def over_seeds(scores) -> dict:
    """{"scores", "mean", "deviation"} of a score per seed; the deviation of a sample, divided by n - 1."""
    return {"scores": list(map(float, scores)), "mean": np.mean(scores), "deviation": np.std(scores, ddof=1)}


def scores_of(sums: np.ndarray, task: Task) -> dict:
    """The same of a task's sums (seeds, videos, ...)."""
    return over_seeds([task.metric.score(of_seed.sum(axis=0)).mean() for of_seed in sums])


def change_of(sums: np.ndarray, others: np.ndarray, task: Task) -> dict:
    """{"difference", "interval"}: a system less another. Shape: both (seeds, videos, ...)"""
    change = difference_over_seeds(sums, others, task.metric)
    return {"difference": change.value, "interval": [change.low, change.high]}


# ---- In words

def seeds_from(config, count: int) -> range:
    """`count` seeds from that of the run on. Raises ValueError for less than two."""
    if count < 2:
        raise ValueError(f"--seeds: got {count}, expected 2 or more, as one has no deviation")
    return range(config.run.seed, config.run.seed + count)


def short(number: float, sign: str = "") -> str:
    """0.6943 -> ".694", as README has it; with sign "+": "+.694" or "-.694"."""
    return re.sub(r"\b0\.", ".", f"{number:{sign}.3f}")


def score_text(found: dict) -> str:
    """ ".694 ± .012" """
    return f"{short(found['mean'])} ± {short(found['deviation'])}"


def change_text(found: dict) -> str:
    """ "-.044 [-.061, -.020]" """
    low, high = found["interval"]
    return f"{short(found['difference'], '+')} [{short(low, '+')}, {short(high, '+')}]"


SEEDS = {"type": int, "default": 3, "metavar": "N", "help": "how many (default: %(default)s)"}
