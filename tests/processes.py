"""Processes forked from the test's own, which has imported PyTorch already: what the tests of runs share."""

import os
import pickle
import signal
import socket
import traceback

import torch
import torch._dynamo             # imported by DDP and optimisers: here once, not in each forked process
import torch.distributed as dist

from distributed import Team, join

CPU = torch.device("cpu")
ALONE = Team(0, 1, CPU)
SECONDS = 60                  # after which a process is killed


def fork(work) -> int:
    """Start `work()` in a process of its own, which ends with what `work` exits with. -> its number"""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(SECONDS)
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def status(pid) -> int:
    """The exit status of a process; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work) -> int:
    """The exit status of `work()` in a process of its own."""
    return status(fork(work))


def in_team(world: int, work) -> tuple[list[int], list]:
    """`work(team)` in `world` processes with gloo. -> the exit statuses, what the processes returned"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, results = [], []
    for rank in range(world):
        reader, writer = os.pipe()
        started.append((fork(lambda: _member(rank, world, port, work, writer)), reader))
        os.close(writer)
    for _, reader in started:
        with open(reader, "rb") as file:
            content = file.read()
        results.append(pickle.loads(content) if content else None)
    return [status(pid) for pid, _ in started], results


def _member(rank, world, port, work, writer):
    os.environ.update({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}",
                       "LOCAL_WORLD_SIZE": f"{world}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"})
    result = work(join("cpu"))
    with open(writer, "wb") as file:
        pickle.dump(result, file)
    if dist.is_initialized():
        dist.destroy_process_group()
