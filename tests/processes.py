"""Processes forked from the test's own, which has imported PyTorch already: for tests of several."""

import os
import pickle
import signal
import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch._dynamo             # imported by DDP and optimisers: here once, not in each forked process
import torch.distributed as dist

from engine.distributed import Team, join

CPU = torch.device("cpu")
ALONE = Team(0, 1, CPU)
SECONDS = 60                  # after which a process is killed


def in_child(work) -> int:
    """The exit status of `work()` in a process of its own; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def in_team(world: int, work) -> tuple[list[int], list]:
    """`work(team)` in `world` processes with gloo. -> the exit statuses, what the processes returned"""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}"}
        free.close()
        files = [Path(folder, f"{rank}") for rank in range(world)]
        pids = [fork(lambda: member(rank, where, work, files)) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        return codes, [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def member(rank, where, work, files):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(files), "LOCAL_WORLD_SIZE": len(files)}
    os.environ.update({name: f"{number}" for name, number in names.items()} | where)
    files[rank].write_bytes(pickle.dumps(work(join("cpu"))))
    if dist.is_initialized():
        dist.destroy_process_group()


def fork(work) -> int:
    pid, code = os.fork(), 1
    if pid:
        return pid
    try:
        signal.alarm(SECONDS)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    os._exit(code)
