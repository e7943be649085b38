"""Devices, processes and their sums, and how a run ends when something fails."""

import ctypes
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine import distributed
from engine.distributed import Team, all_sum, choose_device, join, launch, several
from engine.training import loader
from processes import ALONE, CPU, in_child, in_team

CONFIG = SimpleNamespace(run=SimpleNamespace(device="cpu"))


# ---- Devices

@pytest.mark.parametrize("wanted, gpus, processes, mps, expected", [
    ("auto", 3, 3, False, "cuda:2"), ("cpu", 1, 2, True, "cpu"), ("auto", 0, 2, True, "cpu"),
    ("mps", 1, 1, True, "mps"),
    ("cuda", 1, 2, False, "2 processes, but this machine has 1 GPU(s); start with torchrun "
     "--nproc_per_node=1, or --set run.device=cpu"),
    ("cuda", 0, 1, False, "run.device: got cuda, but PyTorch sees no such GPU here (mps: or there "),
    ("mps", 0, 1, False, "run.device: got mps, but PyTorch sees no such GPU here (mps: or there "),
    ("mps", 0, 2, True, "run.device: got mps, but PyTorch sees no such GPU here (mps: or there ")])
def test_each_process_takes_its_own_gpu_and_a_device_that_is_not_there_is_refused(
        monkeypatch, wanted, gpus, processes, mps, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{processes}")
    if " " not in expected:
        assert choose_device(wanted) == torch.device(expected) and chosen == [2] * ("cuda" in expected)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        choose_device(wanted)


@pytest.mark.parametrize("kind, capability, expected", [
    ("cpu", 9, False), ("cuda", 7, False), ("cuda", 8, True)])         # 7 = V100 or T4, 8 = A100
def test_only_a_gpu_that_has_bf16_computes_in_it(monkeypatch, kind, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card, asked = SimpleNamespace(major=capability), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch, "autocast", lambda *kind, enabled: asked.append((*kind, enabled)))
    Team(0, 1, torch.device(kind)).autocast()
    assert asked == [(kind, torch.bfloat16, expected)]


# ---- Processes

def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")                            # as in some containers
    assert join("cpu") == Team(0, 1, CPU) and not several() and not dist.is_initialized()
    x, model = torch.ones(3), nn.Linear(1, 1)
    assert all_sum(x) is x and ALONE.agree([5]) == [5] and ALONE.gather([5]) == [[5]]
    assert ALONE.parallel(model) is model
    ALONE.wait()


def test_processes_join_in_their_order_and_only_the_first_speaks_and_decides(capfd):
    def work(team):
        team.say(f"said by {team.rank}")
        began = time.monotonic()
        time.sleep(0.2 * team.rank)
        team.wait()
        waited = time.monotonic() - began
        return team, team.agree({"rank": team.rank}), team.gather(team.rank * [5]), several(), waited

    codes, found = in_team(3, work)
    assert codes == [0, 0, 0] and capfd.readouterr().out == "said by 0\n"
    for rank in range(3):
        assert found[rank][:4] == (Team(rank, 3, CPU), {"rank": 0}, [[], [5], [5, 5]], True)
        assert found[rank][4] > 0.35                                 # until the last one is there


def test_the_sum_over_processes_leaves_what_it_was_given_and_the_gradients_of_others_alone():
    def work(team):
        x, y = torch.tensor([team.rank + 1.0, 5.0]).requires_grad_(), torch.zeros(2).requires_grad_()
        other, total = y.exp(), all_sum(x)
        (3 * (total + other)).sum().backward()
        return x.tolist(), total.tolist(), x.grad.tolist(), y.grad.tolist()

    assert in_team(3, work)[1] == [([rank + 1, 5], [6, 15], [9, 9], [3, 3]) for rank in range(3)]


def test_a_process_that_waits_after_a_restart_is_answered_although_a_dead_one_asked_before(monkeypatch):
    """torchrun keeps its store over restarts: the question of a dead process is still in it."""
    store, found = dist.HashStore(), {}
    store.set("question/1", "the dead one")
    monkeypatch.setattr(dist, "rendezvous",
                        lambda url: iter([(store, int(threading.current_thread().name), 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: prefix)
    threads = [threading.Thread(target=lambda rank=rank: found.update({rank: distributed._fresh_store()}),
                                name=f"{rank}", daemon=True) for rank in (0, 1)]
    threads[0].start()
    store.get("answer/the dead one")                       # waits until the dead one has been answered
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1] == store.get("answer/the dead one").decode()


@pytest.mark.parametrize("given", [
    "RANK=1, no LOCAL_RANK, no WORLD_SIZE", "no RANK, no LOCAL_RANK, WORLD_SIZE=2", "no RANK, LOCAL_RANK=1",
    "RANK=0, no LOCAL_RANK, WORLD_SIZE=2, MASTER_ADDR=a, MASTER_PORT=1",
    "RANK=1, LOCAL_RANK=1, WORLD_SIZE=1, MASTER_ADDR=a, MASTER_PORT=1"])
def test_an_environment_that_is_only_partly_torchruns_is_refused(monkeypatch, given):
    for name, value in re.findall(r"(\w+)=(\w+)", given):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^the environment has {given}.*; start with torchrun"):
        join("cpu")


def test_a_process_may_wait_a_day_for_the_others_as_for_a_long_video(monkeypatch):
    asked = {}
    for name in distributed.TORCHRUN:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: asked.update(settings))
    monkeypatch.setattr(distributed, "_fresh_store", lambda: "store")
    assert join("cpu").world == 2 and asked["store"] == "store"
    assert asked["timeout"].total_seconds() >= 24 * 3600


# ---- Gradients

class Centred(nn.Module):
    """The mean of the whole batch is taken off, as in BatchNorm."""

    def forward(self, x):
        sums = all_sum(torch.cat([x.sum(dim=0), torch.tensor([len(x)])]))
        return x - sums[:-1] / sums[-1]


def steps(team):
    """Loss and gradients at each of three equal steps with 22 samples, split over the processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), Centred(), nn.Linear(33, 17)).double()
    ddp, x, found = team.parallel(model), torch.randn(22, 5, dtype=torch.double), []
    for _ in range(3):
        ddp.zero_grad()
        loss = all_sum(ddp(x[team.rank::team.world]).exp().sum()).log()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in ddp.parameters())])
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_processes_have_the_gradients_of_one_in_the_same_bits_at_each_step_and_after_a_restart(world):
    """DDP rearranges what is sent together after the first step; a run that starts again has no first one."""
    first, *others = sum(in_team(world, steps)[1] + in_team(world, steps)[1], [])
    for step in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, step, strict=True))
    for ours, whole in zip(first, steps(ALONE)[0], strict=True):
        assert (ours - whole).norm() < 1e-13 * whole.norm()


# ---- How a run ends

LOST = "error: another process of this run has ended; see its message or exit code"
MEMORY = ("error: a worker that reads data ran out of shared memory; start the container with a larger "
          "--shm-size, or read without workers: --set run.workers=0")
# What is raised, the exit code or with code 1 the text that Python prints, what else is printed.
ENDS = [(ValueError("wrong header"), 2, "error: wrong header\n"),
        (OSError(errno.EACCES, "Permission denied"), 2, "error: [Errno 13] Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: [Errno 28] No space left; free some space and "
         "start the same command again, the last checkpoint is intact\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"),
         "error: the GPU's memory is full; try a smaller --set run.largest_piece=N, or a smaller batch where "
         "it is not cut: task.batch, emma.batch, stills.batch, features.batch", ""),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_23_4>"), MEMORY, ""),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), MEMORY, "")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error, code, said", ENDS)
def test_an_end_that_a_user_can_help_is_one_line_that_others_do_not_repeat(monkeypatch, capsys, error, code,
                                                                           said, rank):
    def main(config, team, task):
        assert (config, team, task) == (CONFIG, Team(rank, 1, CPU), "au")
        raise error

    slept = []
    monkeypatch.setattr(distributed, "join", lambda device: Team(rank, 1, torch.device(device)))
    monkeypatch.setenv("RANK", f"{rank}")
    monkeypatch.setattr(distributed, "STOP", ())                     # the test's own signals stay
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(SystemExit) as end:
        launch(main, CONFIG, "au")
    assert end.value.code == code and capsys.readouterr().err == said
    assert slept == [2] * (rank == 1 and code == 2)                  # torchrun ends them meanwhile
    with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes cannot be multiplied"):
        launch(lambda config, team: torch.ones(2, 3) @ torch.ones(2, 3), CONFIG)


def test_processes_that_lose_another_one_end_with_a_line():
    def work(team):
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(SystemExit) as end:
            launch(lambda config, team: all_sum(torch.ones(1)), CONFIG)
        return end.value.code

    assert in_team(2, work) == ([0, -signal.SIGKILL], [LOST, None])


def test_at_the_end_the_processes_have_parted_and_no_worker_is_left():
    def main(config, team, workers):
        signal.signal(signal.SIGCHLD, lambda *ignored: None)
        workers.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)))
        workers[0].start()

    def work(team):
        workers = []
        launch(main, CONFIG, workers)
        workers[0].join(10)
        same = list(map(signal.getsignal, distributed.STOP)) == before
        return workers[0].exitcode, dist.is_initialized(), signal.getsignal(signal.SIGCHLD), same

    before = list(map(signal.getsignal, distributed.STOP))
    assert in_team(2, work) == ([0, 0], [(-signal.SIGKILL, False, signal.SIG_DFL, True)] * 2)


def test_a_file_name_of_no_encoding_can_be_printed():
    def work():
        sys.stdout.reconfigure(errors="strict")
        launch(lambda config, team: print("caf\udce9.jpg"), CONFIG)
    assert in_child(work) == 0


def test_a_shared_memory_of_1_mb_ends_the_run_with_a_line_and_does_not_let_it_wait_for_ever(capfd):
    def work():
        new_namespace, nobody_allows_it = 0x20000, 77
        small = "mount --make-rprivate / && mount -t tmpfs -o size=1m tmpfs /dev/shm"
        if (ctypes.CDLL(None).unshare(new_namespace)
                or subprocess.run(small, shell=True, capture_output=True).returncode):
            raise SystemExit(nobody_allows_it)
        data = torch.zeros(3, 3_000_000, dtype=torch.uint8)                  # 3 MB each
        data.collate = lambda items: [torch.stack(items)]
        with pytest.raises(SystemExit) as end:
            launch(lambda config, team: list(loader(data, [[0], [1], [2]], 2, team)), CONFIG)
        print(end.value.code, flush=True)

    code = in_child(work)
    if code == 77:
        pytest.skip("this user may not mount a small /dev/shm")
    assert code == 0 and capfd.readouterr().out == f"{MEMORY}\n"
