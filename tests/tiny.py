"""A very small configuration of all stages, and processes that run the scripts with it.

`run(folder, "train_task", "--task", "au", *TINY)` does what this command line does, in processes forked from
one that has imported PyTorch already. A hook is called there first, say to kill it at an exact moment.
"""

import contextlib
import csv
import faulthandler
import itertools
import json
import multiprocessing
import os
import pkgutil
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parent.parent
SECONDS = 120                 # after which processes that do not end are killed, and the test fails
STAGES = {"pretrain": ["train_pretrain"], "finetune": ["train_finetune"], "features": ["extract_features"],
          "task_au": ["train_task", "--task", "au"], "stills": ["second_paper.train_cnn"],
          "emma": ["second_paper.train_emma"], "cotex": ["second_paper.train_cotex"]}
TINY = ["--config", "tiny.yaml"]
TRAIN_AU = [*STAGES["task_au"], *TINY]
EACH_STEP = ["--set", "run.checkpoint_minutes=1e-9"]       # a checkpoint after every step

DEMO = (ROOT / "configs/demo.yaml").read_text().replace("data/demo", "data")       # for its section `data`
SETTINGS = """
synthetic: {root: data, train_videos: 4, val_videos: 3, frames: 40, faces: 60}
vit: {image_size: 16, patch: 8, dim: 8, depth: 2, heads: 2}
pretrain: {decoder_dim: 8, decoder_depth: 1, decoder_heads: 2, epochs: 2, batch: 17, lr: 0.003,
           warmup_epochs: 0.5}
finetune: {hidden: 8, dropout: 0.0, epochs: 2, every: 3, batch: 12, lr: 0.003, warmup_epochs: 0.5,
           layer_decay: 0.7, clip: 0.5}
features: {batch: 16}
segments: {window: 20, stride: 12}
temporal: {channels: [8], kernels: [3], dilations: [1], width: 8, layers: 1, heads: 2, hidden: 8, head: 8,
           dropout: 0.0}
task: {epochs: 2, batch: 3, lr: 0.003, warmup_epochs: 0.5}
stills: {network: resnet18, width: 2, epochs: 2, batch: 12, lr: 0.003}
emma: {epochs: 2, batch: 20, lr: 0.003, warmup_epochs: 0.5, drop_path: 0.0}
cotex: {epochs: 2, batch: 7, lr: 0.003, warmup_epochs: 0.5, drop_path: 0.0, mask_ratio: 0.5}
run: {workers: 0, device: cpu}
"""
# For `write`. The masks of dropout differ with the number of processes.
DROPOUT = {"finetune": {"dropout": 0.2, "drop_path": 0.3}, "temporal": {"dropout": 0.2},
           "emma": {"drop_path": 0.3}, "cotex": {"drop_path": 0.3}}


def write(folder, name="tiny.yaml", **changes) -> Path:
    """SETTINGS with changes like task={"lr": 1e-3}, as folder/name. -> folder"""
    settings = {"data": yaml.safe_load(DEMO)["data"], **yaml.safe_load(SETTINGS)}
    for section, fields in changes.items():
        settings[section].update(fields)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / name).write_text(yaml.safe_dump(settings))
    return Path(folder)


def copied(source, folder, without=()) -> Path:
    """`folder`, now a copy of `source`, less the run folders of the stages in `without`."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for stage in without:
        shutil.rmtree(folder / "runs/tiny" / stage)
    return folder


def ready(source, folder, stage) -> tuple[Path, Path]:
    """A copy of finished runs in which `stage` has not begun. -> the copy, the stage's folder in it"""
    return copied(source, folder, [stage]), folder / "runs/tiny" / stage


# ---- What a run has made

def content(folder) -> dict:
    """{file: its bytes} of all files below a folder but the locks, which are empty."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def weights(folder, file="last.pt") -> dict:
    return torch.load(folder / file, weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a: dict, b: dict) -> float:
    """The largest difference of two sets of weights, attention's key biases left out: one adds the same to
    all scores of a query, so its gradient is 0 but for rounding, of which Adam makes whole steps."""
    assert a.keys() == b.keys()
    differences = {name: (a[name].double() - b[name].double()).abs() for name in a}
    for name in differences:
        if name.endswith("qkv.bias"):
            differences[name].chunk(3)[1].zero_()
    return max(difference.max().item() for difference in differences.values())


def log(folder) -> list[dict]:
    """The rows of log.csv as numbers, less the seconds, which differ each time."""
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(row[name]) for name in row if name != "seconds"} for row in rows]


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def assert_same(folder, expected):
    """Two results, bit for bit: weights, log, metrics, features."""
    for path in expected.glob("*.*"):
        if path.name in ("last.pt", "best.pt"):
            assert same(weights(folder, path.name), weights(expected, path.name)), folder / path.name
        elif path.name == "log.csv":
            assert log(folder) == log(expected), folder / path.name
        elif path.suffix == ".npy" or path.name in ("metrics.json", "videos.json"):
            assert (folder / path.name).read_bytes() == path.read_bytes(), folder / path.name


# ---- Processes

server = multiprocessing.get_context("forkserver")
# The last is what an optimiser imports at its first step.
server.set_forkserver_preload(["pytest", "scoring", "pipeline", "datasets.synthetic", "torch._dynamo"])


class Job:
    """A script in `world` processes, from now until `end`."""

    def __init__(self, folder, *arguments, world=1, hook=None):
        self.output, self.processes = Path(folder) / f".said.{time.monotonic_ns()}", []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with contextlib.chdir(ROOT):                   # from where the server imports the modules, once
            for rank in range(world):
                everything = (folder, self.output, (rank, world, port), hook, arguments)
                self.processes.append(server.Process(target=_script, args=everything))
                self.processes[rank].start()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def end(self) -> tuple[list[int], str]:
        """-> exit codes, one per process, negative for a signal; what they wrote to stdout and stderr"""
        limit = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
        late = any(process.exitcode is None for process in self.processes)
        self.kill()
        said = self.output.read_text()
        self.output.unlink()
        assert not late, f"still running after {SECONDS} s:\n{said}"
        return [process.exitcode for process in self.processes], said


def _script(folder, output, place, hook, arguments):
    os.chdir(folder)
    rank, world, port = map(str, place)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port,
                      MASTER_ADDR="127.0.0.1")
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - 20)            # a process that does not end says where it is
    instead("engine.distributed.SECONDS_FOR_RANK_0", lambda seconds: 0.1)      # without torchrun, no need
    multiprocessing.set_start_method(None, force=True)    # a DataLoader's workers start as they do for a user
    become(hook, arguments)


def become(hook, arguments):
    """This process is now `python -m ARGUMENTS`."""
    sys.argv = list(arguments)
    sys.path.insert(0, str(ROOT))
    if hook:
        hook()
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def run(folder, *arguments, world=1, hook=None) -> tuple[list[int], str]:
    return Job(folder, *arguments, world=world, hook=hook).end()


def done(folder, *arguments, world=1, hook=None) -> str:
    """As `run`, for a run that must end well. -> what it said"""
    codes, said = run(folder, *arguments, world=world, hook=hook)
    assert not any(codes), said
    return said


def command(folder, *arguments) -> subprocess.Popen:
    """A python command in a process of its own, as a user starts it: for torchrun."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


# ---- Hooks

def instead(place: str, replace):
    """Put `replace(original)` where `place` ("engine.run.Run.end_step") says."""
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    setattr(owner, name, replace(getattr(owner, name)))


def before(place: str, count: int, act):
    """A hook's work: call `act()` before the `count`-th call of the function at `place`."""
    calls = itertools.count(1)

    def counting(original):
        def function(*arguments, **keywords):
            if next(calls) == count:
                act()
            return original(*arguments, **keywords)
        return function
    instead(place, counting)


def stop(place, count, number=signal.SIGKILL):
    """A hook: this process gets a signal before the `count`-th call of a function."""
    return partial(before, place, count, partial(signal.raise_signal, number))
