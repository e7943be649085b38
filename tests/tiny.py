"""A very small configuration of all stages, and processes that run the scripts with it: what the end-to-end
tests share.

`run` starts a script as its command line does, but in processes forked from one that has imported PyTorch
already, which saves seconds each time. A hook is called there first: it replaces a function, say to kill
the process at an exact moment. As a script, this file does the same for torchrun, with the name of a
function below:

    torchrun --nproc_per_node=2 tests/tiny.py killed_once train_task.py --task au --config tiny.yaml
"""

import contextlib
import copy
import csv
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
SECONDS = 120                 # after which processes that do not end are killed, and the test fails
STAGES = {"pretrain": ["train_pretrain.py"], "finetune": ["train_finetune.py"],
          "task_au": ["train_task.py", "--task", "au"]}
# The trainings share what they promise (run.py), so one of them in the quick suite, all in the slow one.
QUICK_OR_SLOW = [pytest.param(stage, marks=[] if stage == "task_au" else pytest.mark.slow)
                 for stage in STAGES]
TINY = ["--config", "tiny.yaml"]
TRAIN_AU = [*STAGES["task_au"], *TINY]
EACH_STEP = ["--set", "run.checkpoint_minutes=1e-9"]       # a checkpoint after every step
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

SETTINGS = {
    "data": {"synthetic": True, "frames": ["data/Aff-Wild2/cropped_aligned"],
             "labels": "data/Aff-Wild2/annotations", "affectnet_2017": "data/AffectNet-2017",
             "affectnet_2021": "data/AffectNet-2021", "raf_db": "data/RAF-DB",
             "fer2013": "data/FER2013", "ferplus": "data/FERPlus", "s_aff_wild2": "data/ABAW4",
             "drawn_faces": "data/ABAW4/drawn", "real_faces": "data/ABAW4/real"},
    "synthetic": {"root": "data", "train_videos": 4, "val_videos": 3, "frames": 40, "faces": 60},
    "vit": {"image_size": 16, "patch": 8, "dim": 8, "depth": 2, "heads": 2},
    "pretrain": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "epochs": 2, "batch": 17,
                 "lr": 3e-3, "warmup_epochs": 0.5},
    "finetune": {"hidden": 8, "dropout": 0.0, "epochs": 2, "every": 3, "batch": 12, "lr": 3e-3,
                 "warmup_epochs": 0.5, "layer_decay": 0.7, "clip": 0.5},
    "features": {"batch": 16},
    "segments": {"window": 20, "stride": 12},
    "temporal": {"channels": [8], "kernels": [3], "dilations": [1], "width": 8, "layers": 1, "heads": 2,
                 "hidden": 8, "head": 8, "dropout": 0.0},
    "task": {"epochs": 2, "batch": 3, "lr": 3e-3, "warmup_epochs": 0.5},
    "stills": {"network": "resnet18", "width": 2, "epochs": 2, "batch": 12, "lr": 3e-3},
    "emma": {"epochs": 2, "batch": 30, "lr": 3e-3, "warmup_epochs": 0.5, "drop_path": 0.0},
    "cotex": {"epochs": 2, "batch": 7, "lr": 3e-3, "warmup_epochs": 0.5, "drop_path": 0.0, "mask_ratio": 0.5},
    "run": {"workers": 0},
}
# For `write`.
DROPOUT = {"finetune": {"dropout": 0.2, "drop_path": 0.3}, "temporal": {"dropout": 0.2},
           "emma": {"drop_path": 0.3}, "cotex": {"drop_path": 0.3}}


def write(folder, name="tiny.yaml", **changes) -> Path:
    """SETTINGS with changes like task={"lr": 1e-3}, as folder/name. -> folder"""
    settings = copy.deepcopy(SETTINGS)
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
    """A copy of a finished pipeline in which `stage` has not begun. -> the copy, the stage's folder in it"""
    return copied(source, folder, [stage]), folder / "runs/tiny" / stage


def spoil(path, kind):
    """Damage an image. Truncated: decoding breaks off in the middle. The others: nothing to decode."""
    path.write_bytes({"truncated": path.read_bytes()[:400], "empty": b"",
                      "no image": b"this is text, not an image\n" * 30}[kind])


# ---- What a run has made

def content(folder) -> dict:
    """{file: (its bytes, when it was written)} of all files below a folder but the locks, which are empty."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def weights(folder, file="last.pt") -> dict:
    return torch.load(folder / file, weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a: dict, b: dict) -> float:
    """The largest difference between two sets of weights, attention's key biases left out.

    A key bias adds the same to all scores of a query, which softmax takes away again: no output depends on
    it, its gradient is 0 but for rounding, and Adam, which divides a gradient by its size, makes steps of
    that rounding. Everything else is compared.
    """
    assert a.keys() == b.keys()
    worst = 0.0
    for name in a:
        difference = (a[name].double() - b[name].double()).abs()
        if name.endswith("qkv.bias"):
            queries, keys, values = difference.chunk(3)
            difference = torch.cat([queries, values])
        worst = max(worst, difference.max().item())
    return worst


def log(folder) -> list[dict]:
    """log.csv, less the seconds, which differ each time."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def log_numbers(folder) -> np.ndarray:
    """`log` as numbers, (rows, columns)."""
    return np.array([[float(value) for value in row.values()] for row in log(folder)])


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def assert_same(folder, expected):
    """Weights, log and metrics of two run folders, bit for bit."""
    assert same(weights(folder), weights(expected)), f"{folder}: other weights in last.pt"
    assert log(folder) == log(expected), f"{folder}: another log.csv"
    assert (folder / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes(), folder
    if (expected / "best.pt").exists():
        assert same(weights(folder, "best.pt"), weights(expected, "best.pt")), f"{folder}: best.pt differs"


# ---- Processes

server = multiprocessing.get_context("forkserver")
# The last is what an optimiser imports at its first step.
server.set_forkserver_preload(["pytest", "pipeline", "torch._dynamo"])


def _script(folder, output, environment, hook, arguments):
    """What a process does: become `python SCRIPT ARGUMENTS` in `folder`."""
    os.chdir(folder)
    os.environ.update(environment)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    instead("distributed.SECONDS_FOR_RANK_0", lambda seconds: 0.1)   # no torchrun is here to use them
    multiprocessing.set_start_method(None, force=True)    # a DataLoader's workers start as they do for a user
    become(hook, arguments)


def become(hook, arguments):
    sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
    sys.path.insert(0, str(ROOT))
    if hook:
        hook()
    runpy.run_path(sys.argv[0], run_name="__main__")


class Ended(NamedTuple):
    codes: list[int]           # one per process; negative for a signal
    said: str                  # what they wrote to stdout and stderr


class Job:
    """A script in `world` processes, from now until `end`."""

    def __init__(self, folder, *arguments, world=1, hook=None):
        self.output, self.processes = Path(folder) / f".said.{time.monotonic_ns()}", []
        port = free_port() if world > 1 else 0
        for rank in range(world):
            environment = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}",
                           "WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            everything = (folder, self.output, environment, hook, arguments)
            self.processes.append(server.Process(target=_script, args=everything))
        with contextlib.chdir(ROOT):                   # from where the server imports the modules, once
            for process in self.processes:
                process.start()

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def kill(self):
        for process in self.processes:
            process.kill()

    def end(self) -> Ended:
        limit = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
        late = any(process.exitcode is None for process in self.processes)
        self.kill()
        for process in self.processes:
            process.join()
        said = self.said()
        self.output.unlink(missing_ok=True)
        assert not late, f"still running after {SECONDS} s:\n{said}"
        return Ended([process.exitcode for process in self.processes], said)


def run(folder, *arguments, world=1, hook=None) -> Ended:
    return Job(folder, *arguments, world=world, hook=hook).end()


def done(folder, *arguments, world=1, hook=None) -> str:
    """As `run`, for a run that must end well. -> what it said"""
    codes, said = run(folder, *arguments, world=world, hook=hook)
    assert not any(codes), said
    return said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(folder, *arguments) -> subprocess.Popen:
    """A command in a process of its own, as a user starts it: for torchrun."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, env=os.environ | ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def end(process) -> tuple[int, str]:
    """-> exit code of a `command`, what it said"""
    try:
        said = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired as late:
        # Its workers may live on and hold the pipe open: do not wait for its end.
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {SECONDS} s:\n{(late.output or b'').decode()}") from None
    return process.returncode, said


def torchrun(*arguments) -> list:
    return ["-m", "torch.distributed.run", *arguments]


# ---- Hooks

def instead(place: str, replace):
    """Put `replace(original)` where `place` ("module.function" or "module.Class.method") says."""
    module, *path, name = place.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, replace(getattr(owner, name)))


def at(place: str, count: int, act, after=True):
    """Call `act(*arguments)` once, after or before the `count`-th call of the function at `place`."""
    calls = 0

    def counting(original):
        def function(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == count and not after:
                act(*arguments)
            result = original(*arguments, **keywords)
            if calls == count and after:
                act(*arguments)
            return result
        return function
    instead(place, counting)


def send(number, *ignored):
    os.kill(os.getpid(), number)


def stop(place, count, number=signal.SIGKILL, after=True):
    """A hook: this process gets a signal after (before) the `count`-th call of a function."""
    return partial(at, place, count, partial(send, number), after)


# ---- Hooks for torchrun: rank 1 acts after its second step

MIDDLE = 2


def killed_once():
    """The worker is killed; when torchrun has started it again, it is left alone."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at("run.Run.end_step", MIDDLE, partial(send, signal.SIGKILL))


def all_killed():
    """One worker kills torchrun and itself; the other follows when it has lost its parent."""
    parent = os.getppid()    # asked now: when this worker comes to act, the other may have killed it already

    def act(*ignored, **counts):
        if os.environ["RANK"] == "1":
            os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
        send(signal.SIGKILL)
    at("run.Run.end_step", MIDDLE, act)


def told_to_stop():
    """The worker tells torchrun to stop, as a scheduler does, and each worker waits until it hears of it."""
    def act(run, *ignored, **counts):
        if os.environ["RANK"] == "1":
            os.kill(os.getppid(), signal.SIGTERM)
        limit = time.monotonic() + 30
        while not run.signals.received and time.monotonic() < limit:
            time.sleep(0.01)
    at("run.Run.end_step", MIDDLE, act)


if __name__ == "__main__":
    become(globals()[sys.argv[1]], sys.argv[2:])
