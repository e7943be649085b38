"""Stages that only pretend: they leave the records and results of the real ones, in no time. What the tests
of the scripts that train many runs share.

`pretended` takes the place of subprocess.Popen in many_runs.py. A pretended stage does what the real one does
with the settings and the records, so that made_of.py finds, lends and refuses its results as usual; scores
are drawn at random.
"""

import json
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

import emma
import made_of
import many_runs
import variants
from checkpoints import checksum
from config import load
from labels import EXPR, TASKS
from scoring import stage_of
from splits import split
from tiny import ROOT

# stage: its folder, what its result depends on, where its input is looked for
STAGES = {"train_pretrain": ("pretrain", ["synthetic", "vit", "pretrain", "run.seed"], None),
          "train_finetune": ("finetune", ["synthetic", "vit", "finetune", "run.seed"],
                             ("finetune.start", "pretrain")),
          "extract_features": ("features", ["synthetic", "vit", "finetune.token"],
                               ("features.checkpoint", "finetune")),
          "train_task": ("task", ["synthetic", "segments", "temporal", "task", "run.seed"],
                         ("task.features", "features")),
          "train_stills": ("stills", ["synthetic", "stills", "run.seed"], None),
          "train_emma": ("emma", ["synthetic", "vit", "emma", "run.seed"], ("emma.start", "pretrain")),
          "train_cotex": ("cotex", ["synthetic", "vit", "cotex", "run.seed"], ("cotex.start", "pretrain"))}
TOOK = {"train_pretrain": 90, "train_finetune": 45, "train_task": 12, "train_stills": 30, "train_emma": 40,
        "train_cotex": 20}                                                      # seconds, in log.csv
OTHERS_TOOK = 6
SEEDS = {"seeds": variants.SEEDS}                     # an option of most scripts of many runs


class Ran:
    """The commands so far, and which of them is to fail or to be stopped."""

    def __init__(self):
        self.commands, self.fails = [], ""

    def short(self) -> list[str]:
        """["train_task va run=my_fold1 task.fold=1", ...]: each command's stage, task and --set."""
        lines = []
        for words in self.commands:
            stage = Path(next(word for word in words if word.endswith(".py"))).stem
            task = [words[words.index("--task") + 1]] if "--task" in words else []
            given = [after for word, after in zip(words, words[1:]) if word == "--set"]
            lines.append(" ".join([stage, *task, *given]).replace("run.name=", "run="))
        return lines


class Finished(NamedTuple):
    """A script that has come to its end, and what it ran and said."""
    folder: Path
    commands: list[str]
    said: str


@contextmanager
def pretended(ran: Ran):
    """Inside, each command of many_runs.py is noted and pretends to run, for as long as TOOK says."""
    now = [0]

    class Process:
        def __init__(self, words):
            ran.commands.append(words)
            now[0] += TOOK.get(ran.short()[-1].split()[0], OTHERS_TOOK)
            self.code = 2 if ran.fails and ran.fails in ran.short()[-1] else pretend(words)

        def wait(self):
            return self.code

    clock = SimpleNamespace(time=lambda: now[0])
    with mock.patch.object(many_runs.subprocess, "Popen", Process):
        with mock.patch.object(many_runs, "time", clock):
            yield ran


def pretend(words) -> int:
    """Leave the result of a command in its run folder. -> exit code"""
    arguments = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    stage, given = Path(arguments[0]).stem, arguments[arguments.index("--config") + 1:]
    config = load(given[0], given[2::2])
    task = TASKS[arguments[2]] if arguments[1] == "--task" else None
    if stage in ("synthetic", "synthetic_abaw4", "evaluate"):
        return 0
    name, sections, source = STAGES[stage]
    folder = config.folder(stage_of(config, task) if task else name)
    record = {"stage": folder.name, "settings": made_of.settings_of(config, *sections), "input": None,
              "base": config.run.base, "data": {}, "from": None}
    if source:
        given = made_of.value(config, source[0])
        before = made_of.place(config, source[1])
        if not given and not made_of.finished(before):
            print(f"error: {before} not found", file=sys.stderr)
            return 2
        record |= {"input": {"setting": source[0], "stage": source[1]},
                   "from": made_of.given_record(given) if given else made_of.read_record(before)}
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {}
    if stage == "train_finetune":
        record["data"] = {"training videos": list(split(config.data.labels, EXPR, config.finetune.fold)[0])}
    if task:
        metrics = scored(folder, config, task, record)
    if stage == "train_emma":
        metrics = emma_scored(folder)
    if stage == "train_cotex":
        metrics = {"val_macro_f1": np.random.default_rng(zlib.crc32(str(folder).encode())).random()}
    if stage in TOOK:
        (folder / "log.csv").write_text(f"epoch,seconds\n1,{TOOK[stage] - 2}\n2,2\n")
        checkpoint = "last.pt" if stage == "train_pretrain" else "best.pt"
        torch.save({"model": {}, "made_of": record, "words": words}, folder / checkpoint)
        record |= {"checkpoint": checkpoint, "checksum": checksum(folder / checkpoint)}
    (folder / "made_of.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return 0


def emma_scored(folder) -> dict:
    """Sums of random outputs for five validation videos of EMMA."""
    rng, sums = np.random.default_rng(zlib.crc32(str(folder).encode())), []
    for _ in range(5):
        labels = np.concatenate([rng.uniform(-1, 1, (20, 2)), rng.integers(0, 8, (20, 1)),
                                 rng.integers(0, 2, (20, 12))], axis=1)
        sums.append(emma.count(rng.normal(size=(20, 22)), labels).tolist())
    stored = {"videos": [f"e{n}" for n in range(5)], "sums": sums}
    (folder / "video_sums.json").write_text(json.dumps(stored))
    return {"score": 1.0}


def scored(folder, config, task, record) -> dict:
    """Sums of random predictions for each validation video, and the metrics.json that goes with them."""
    train, val = split(config.data.labels, task, config.task.fold)
    record["data"] = {"training videos": list(train)}
    rng, sums = np.random.default_rng(zlib.crc32(str(folder).encode())), []
    for _ in val:
        outputs = rng.normal(size=(20, len(task.outputs)))
        target = rng.integers(0, 8, 20) if task.one_class else rng.integers(0, 2, outputs.shape)
        sums.append(task.metric.count(outputs, target, np.ones(target.shape, bool)))
    stored = {"videos": list(val), "sums": np.array(sums).tolist()}
    (folder / "video_sums.json").write_text(json.dumps(stored))
    tuned = {video.removesuffix("_left").removesuffix("_right") for video in made_of.tuned_on(record)}
    seen = [video.removesuffix("_left").removesuffix("_right") in tuned for video in val]
    scores = task.metric.score(np.sum(sums, axis=0))
    return {"metric": task.metric.name, "score": scores.mean(), **dict(zip(task.outputs, scores)),
            "score_interval": [scores.mean() - 0.1, scores.mean() + 0.1], "chance": 0.25,
            "validation_videos": len(val), "seen_videos": sum(seen), "left_out": {}, "data": "made-up data",
            "comparable": True}


def started(monkeypatch, module, *command, options=SEEDS) -> int:
    """What a script of many runs does, in this process. -> exit code"""
    monkeypatch.setattr(sys, "argv", list(command))
    try:
        many_runs.start(module.main, *module.from_command_line("", **options, **many_runs.OPTIONS))
    except SystemExit as end:
        return end.code
    return 0


def script(name: str) -> str:
    return str(ROOT / name)
