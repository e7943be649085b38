"""A very small configuration of all stages, and processes that run the scripts with it: what the end-to-end tests share.

`run` starts a script as its command line does, but in a process forked from one that has imported PyTorch already, which saves
seconds each time. Its `hook` is called there first: it replaces a function of a module, say to kill the process at an exact
moment. As a script, this file does the same under torchrun:

    torchrun --nproc_per_node=2 tests/tiny.py worker_killed_once train_task.py --task au --config tiny.yaml
"""

import contextlib
import copy
import functools
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SECONDS = 120                 # after which a process that does not end is killed, and the test fails

SETTINGS = {
    "data": {"drawn": True, "frames": ["data/Aff-Wild2/cropped_aligned"], "labels": "data/Aff-Wild2/annotations",
             "affectnet_2017": "data/AffectNet-2017", "affectnet_2021": "data/AffectNet-2021", "raf_db": "data/RAF-DB",
             "fer2013": "data/FER2013", "ferplus": "data/FERPlus"},
    "drawn": {"root": "data", "train_videos": 4, "val_videos": 3, "frames": 40, "faces": 60},
    "encoder": {"image_size": 16, "patch": 8, "dim": 8, "depth": 1, "heads": 2},
    "pretrain": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "epochs": 2, "batch": 19, "lr": 3e-3, "warmup_epochs": 0.5},
    "finetune": {"hidden": 8, "dropout": 0.0, "epochs": 2, "every": 3, "batch": 12, "lr": 3e-3, "warmup_epochs": 0.5},
    "features": {"batch": 16},
    "segments": {"window": 20, "stride": 12},
    "temporal": {"channels": [8], "kernels": [3], "dilations": [1], "width": 8, "layers": 1, "heads": 2, "hidden": 8, "head": 8, "dropout": 0.0},
    "task": {"epochs_va": 2, "epochs_expr": 2, "epochs_au": 2, "batch": 3, "lr": 3e-3, "warmup_epochs": 0.5},
    "run": {"workers": 0},
}


def write(folder, name="tiny.yaml", **changes) -> Path:
    """SETTINGS as folder/name, with changes like task={"lr": 1e-3}."""
    settings = copy.deepcopy(SETTINGS)
    for section, fields in changes.items():
        settings[section].update(fields)
    path = Path(folder) / name
    path.write_text(yaml.safe_dump(settings))
    return path


def again(source, folder, *without) -> Path:
    """A copy of everything in `source`, less the run folders of the stages named in `without`."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for stage in without:
        shutil.rmtree(Path(folder) / "runs/tiny" / stage)
    return Path(folder)


def content(folder) -> dict:
    """{file: (its bytes, when it was written)} of a whole folder."""
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------- processes

@dataclass
class Ended:
    codes: list                # one per process, negative for a signal
    said: str                  # what they wrote to stdout and stderr

    @property
    def code(self):
        return self.codes[0]


server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["pytest", "train_task", "torch.nn.parallel", "torch.distributed.optim"])


def _script(folder, output, environment, hook, arguments):
    os.chdir(folder)
    os.environ.update(environment)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
    torch.set_num_threads(1)
    if hook:
        hook()
    runpy.run_path(sys.argv[0], run_name="__main__")


class Job:
    """A script in `world` processes. It goes on until `end` is called, which waits for it."""

    def __init__(self, folder, *arguments, world=1, hook=None):
        self.output = Path(folder) / f".said.{time.monotonic_ns()}"
        port = {} if world == 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(world):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **port}
            self.processes.append(server.Process(target=_script, args=(folder, self.output, environment, hook, arguments), daemon=True))
        with contextlib.chdir(ROOT):                   # the server imports the modules from where it starts
            for process in self.processes:
                process.start()

    def kill(self):
        for process in self.processes:
            process.kill()

    def end(self) -> Ended:
        limit = time.time() + SECONDS
        for process in self.processes:
            process.join(max(0, limit - time.time()))
        late = [p.pid for p in self.processes if p.exitcode is None]
        self.kill()
        for process in self.processes:
            process.join()
        said = self.output.read_text() if self.output.exists() else ""
        self.output.unlink(missing_ok=True)
        assert not late, f"still running after {SECONDS} s:\n{said}"
        return Ended([p.exitcode for p in self.processes], said)


def run(folder, *arguments, world=1, hook=None) -> Ended:
    """`python SCRIPT ARGUMENTS` with `folder` as the working directory."""
    return Job(folder, *arguments, world=world, hook=hook).end()


def finish(folder, *arguments, world=1, hook=None) -> str:
    """As `run`, for a run that must end well. -> what it said"""
    ended = run(folder, *arguments, world=world, hook=hook)
    assert not any(ended.codes), ended.said
    return ended.said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
