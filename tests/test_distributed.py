"""Devices, processes and their sums, and how a run ends when something fails."""

import ctypes
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distributed
from distributed import Team, all_sum, choose_device, has_bf16, join, launch
from processes import ALONE, CPU, in_child, in_team
from settings import Config
from training import loader


# ---- Devices

@pytest.fixture
def gpus(monkeypatch):
    """A machine with this many GPUs and processes, of which this is number `local`."""
    def prepare(count, processes=1, local=0, mps=False):
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setenv("LOCAL_RANK", f"{local}")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{processes}")
        return chosen
    return prepare


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize("local", [0, 2])
def test_each_process_of_a_machine_takes_its_own_gpu(gpus, wanted, local):
    chosen = gpus(count=3, processes=3, local=local)
    assert choose_device(wanted) == torch.device("cuda", local)
    assert chosen == [local]


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_two_processes_on_a_machine_with_one_gpu_are_told_what_to_type(gpus, wanted):
    gpus(count=1, processes=2)
    with pytest.raises(ValueError, match=r"^2 processes, but this machine has 1 GPU\(s\); start with "
                                         "torchrun --nproc_per_node=1, or --set run.device=cpu$"):
        choose_device(wanted)


@pytest.mark.parametrize("wanted, count, processes, mps, expected", [
    ("cpu", 0, 1, False, "cpu"), ("cpu", 1, 1, False, "cpu"), ("cpu", 1, 2, True, "cpu"),
    ("auto", 0, 1, False, "cpu"), ("auto", 0, 2, False, "cpu"), ("auto", 0, 1, True, "cpu"),
    ("mps", 0, 1, True, "mps"), ("mps", 1, 1, True, "mps")])
def test_the_cpu_and_an_apple_gpu_are_used_where_asked_and_the_cpu_where_there_is_no_gpu(
        gpus, wanted, count, processes, mps, expected):
    chosen = gpus(count, processes, mps=mps)
    assert choose_device(wanted) == torch.device(expected)
    assert chosen == []


@pytest.mark.parametrize("wanted, processes, mps, message", [
    ("cuda", 1, False, "run.device: got cuda, but PyTorch sees no GPU here; try --set run.device=cpu"),
    ("mps", 1, False, "run.device: got mps, but PyTorch sees no Apple GPU here; try --set run.device=cpu"),
    ("mps", 2, True, "run.device: mps is one GPU, for one process; start the script with python")])
def test_a_device_that_is_not_there_is_refused(gpus, wanted, processes, mps, message):
    gpus(0, processes, mps=mps)
    with pytest.raises(ValueError, match=message):
        choose_device(wanted)


def test_a_refused_device_is_one_line_and_code_2(gpus, capsys):
    gpus(count=0)
    config = Config()
    config.run.device = "cuda"
    with pytest.raises(SystemExit) as end:
        launch(lambda config, team: None, config)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: run.device: got cuda, but PyTorch sees no GPU here")


@pytest.mark.parametrize("kind, major, expected", [
    ("cpu", 9, False), ("mps", 9, False), ("cuda", 7, False), ("cuda", 8, True), ("cuda", 9, True)])
def test_only_a_gpu_that_has_bf16_computes_in_it(gpus, monkeypatch, kind, major, expected):
    gpus(count=1)
    card = SimpleNamespace(major=major)          # of the compute capability: 7 = V100 or T4, 8 = A100
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    device, asked = torch.device(kind), []
    monkeypatch.setattr(torch, "autocast", lambda *kind, enabled: asked.append((*kind, enabled)))
    assert has_bf16(device) is expected
    Team(0, 1, device).autocast()
    assert asked == [(kind, torch.bfloat16, expected)]


# ---- Processes

def test_without_torchrun_a_process_is_alone():
    assert join("cpu") == Team(0, 1, CPU)
    assert not dist.is_initialized()
    x = torch.ones(3)
    assert all_sum(x) is x and ALONE.agree([5]) == [5] and ALONE.parallel(model := nn.Linear(1, 1)) is model
    ALONE.wait()


def test_processes_join_in_their_order_and_only_the_first_speaks_and_decides(capfd):
    def work(team):
        team.say(f"said by {team.rank}")
        began = time.monotonic()
        time.sleep(0.3 * team.rank)
        team.wait()
        return team, team.agree({"rank": team.rank}), time.monotonic() - began

    codes, results = in_team(3, work)
    assert codes == [0, 0, 0]
    assert [team for team, _, _ in results] == [Team(rank, 3, CPU) for rank in range(3)]
    assert [agreed for _, agreed, _ in results] == [{"rank": 0}] * 3
    assert all(seconds > 0.55 for _, _, seconds in results)                 # until the last one is there
    assert capfd.readouterr().out == "said by 0\n"


def test_the_sum_over_processes_keeps_what_it_was_given_and_lets_the_gradient_through():
    def work(team):
        x = torch.tensor([team.rank + 1.0, 10.0 * team.rank], requires_grad=True)
        total = all_sum(x)
        total.square().sum().backward()
        return x.tolist(), total.tolist(), x.grad.tolist()

    codes, results = in_team(3, work)
    assert codes == [0, 0, 0]
    assert results == [([rank + 1, 10 * rank], [6, 30], [12, 60]) for rank in range(3)]


def test_a_process_that_waits_after_a_restart_is_answered_although_a_dead_one_asked_before(monkeypatch):
    """torchrun keeps its store over restarts: the question of a dead process is still in it."""
    store, found = dist.HashStore(), {}
    store.set("question/1", "the dead one")

    def take_part(rank):
        found[rank] = distributed._fresh_store()

    monkeypatch.setattr(dist, "rendezvous",
                        lambda url: iter([(store, int(threading.current_thread().name), 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: prefix)
    threads = [threading.Thread(target=take_part, args=[rank], name=f"{rank}") for rank in (0, 1)]
    threads[0].start()
    store.get("answer/the dead one")                       # waits until the dead one has been answered
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1] == store.get("answer/the dead one").decode()


# ---- Gradients

def gradients(team, steps=3):
    """Of a batch of 22 samples, split over the processes: the gradients of `steps` equal steps."""
    torch.manual_seed(0)
    sizes = [5, 33, 17, 3]
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers)
    x = torch.randn(22, 5)
    ddp, found = team.parallel(model), []
    for _ in range(steps):
        model.zero_grad()
        ddp(x[team.rank::team.world]).square().sum().backward()
        found.append([parameter.grad.numpy().copy() for parameter in model.parameters()])
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_add_their_gradients_up_to_those_of_one(world):
    codes, results = in_team(world, gradients)
    assert codes == [0] * world
    expected = gradients(ALONE)[0]
    for each_step in results:
        for step in each_step:
            for ours, whole in zip(step, expected, strict=True):
                assert np.abs(ours - whole).max() < 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_step_has_the_same_bits_in_each_process_whenever_it_is_taken(world):
    """DDP rearranges what is sent together after the first step; a run that starts again has no first one."""
    codes, results = in_team(world, gradients)
    assert codes == [0] * world
    again = in_team(world, gradients)[1]
    for each_step in results + again:
        for step in each_step:
            for ours, first in zip(step, results[0][0], strict=True):
                assert np.array_equal(ours, first)


# ---- How a run ends

REFUSALS = [(ValueError("wrong header"), "error: wrong header\n"),
            (OSError(errno.EACCES, "Permission denied"), "error: [Errno 13] Permission denied\n"),
            (OSError(errno.ENOSPC, "No space left on device"),
             "No space left on device; free some space and start the same command again, "
             "the last checkpoint is intact\n")]


@pytest.mark.parametrize("error, message", REFUSALS, ids=["refusal", "no permission", "disk full"])
def test_a_refusal_is_one_line_and_code_2(capsys, error, message):
    config = Config()

    def main(given, team, task):
        assert (given, team.world, task) == (config, 1, "au")
        raise error

    with pytest.raises(SystemExit) as end:
        launch(main, config, "au")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.endswith(message)
    assert "Traceback" not in said and len(said.splitlines()) == 1


def test_a_full_gpu_is_one_line_that_says_what_to_make_smaller(capsys):
    def main(config, team):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                                     "capacity of 79.11 GiB of which 1.2 GiB is free. Including non-PyTorch")

    with pytest.raises(SystemExit) as end:
        launch(main, Config())
    assert end.value.code == ("error: CUDA out of memory. Tried to allocate 2.00 GiB; cut the batch into "
                              "smaller pieces with --set run.largest_piece=N, or make the batch smaller "
                              "where it is not cut: task.batch, emma.batch, stills.batch, features.batch")


@pytest.mark.parametrize("rank, seconds", [(0, []), (1, [2])])
def test_the_others_wait_before_they_repeat_what_the_first_has_said(monkeypatch, rank, seconds):
    def refuse(config, team):
        raise ValueError("wrong header")

    slept = []
    monkeypatch.setenv("RANK", f"{rank}")
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(SystemExit):
        launch(refuse, Config())
    assert slept == seconds


def test_another_process_that_has_died_is_told_in_one_line_and_other_errors_are_raised():
    def fail(config, team, text):
        raise RuntimeError(text)

    with pytest.raises(SystemExit, match="^error: another process of this run has ended; see its message"):
        launch(fail, Config(), "[gloo/pair.cc] Connection closed by peer [127.0.0.1]:4711")
    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        launch(fail, Config(), "mat1 and mat2 shapes cannot be multiplied")


def test_processes_that_lose_another_one_end_with_a_line(capfd):
    def main(config, team):
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_sum(torch.ones(1))

    def work(team):
        try:
            launch(main, Config())
        except SystemExit as end:
            return end.code

    codes, said = in_team(2, work)
    assert codes == [0, -signal.SIGKILL]
    assert said[0] == "error: another process of this run has ended; see its message or exit code"


def test_at_the_end_the_processes_have_parted_and_no_worker_is_left():
    def main(config, team, workers):
        signal.signal(signal.SIGCHLD, lambda *ignored: None)
        worker = multiprocessing.get_context("fork").Process(target=deaf)
        worker.start()
        workers.append(worker)

    def deaf():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    def work(team):
        workers = []
        launch(main, Config(), workers)
        workers[0].join(10)
        return workers[0].exitcode, dist.is_initialized(), signal.getsignal(signal.SIGCHLD)

    assert in_team(2, work) == ([0, 0], [(-signal.SIGKILL, False, signal.SIG_DFL)] * 2)


# ---- Shared memory

MESSAGE = ("error: a worker that reads data ran out of shared memory; start the container with a larger "
           "--shm-size, or read without workers: --set run.workers=0")


class Large(torch.utils.data.Dataset):
    """Batches of 3 MB."""

    def __getitem__(self, i):
        return torch.zeros(3_000_000, dtype=torch.uint8)

    def collate(self, items):
        return torch.stack(items), "a text"


class Killed(Large):
    """What happens where the memory is promised and not there."""

    def collate(self, items):
        os.kill(os.getpid(), signal.SIGBUS)


def read(config, team, dataset):
    for _ in loader(dataset, [[0], [1], [2], [3]], 2, team):
        pass


def test_a_worker_killed_by_a_bus_error_is_told_in_one_line(monkeypatch):
    # PyTorch sets its handler of SIGCHLD once in a process; `launch` of an earlier test has taken it back.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    with pytest.raises(SystemExit) as end:
        launch(read, Config(), Killed())
    assert end.value.code == MESSAGE


@pytest.mark.parametrize("text", [
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    "RuntimeError: unable to allocate shared memory(shm) for file </torch_23995_1511286330_0>: "
    "No space left on device (28)",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
    "out of shared memory. Please try to raise your shared memory limit."], ids=["error", "killed"])
def test_pytorchs_words_for_shared_memory_that_is_full_become_one_line(text):
    def fail(config, team):
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as end:
        launch(fail, Config())
    assert end.value.code == MESSAGE


def test_a_shared_memory_of_1_mb_ends_the_run_with_a_line_and_does_not_let_it_wait_for_ever(capfd):
    def work():
        new_namespace, nobody_allows_it = 0x20000, 77
        if ctypes.CDLL(None).unshare(new_namespace):
            raise SystemExit(nobody_allows_it)
        for command in (["mount", "--make-rprivate", "/"],
                        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]):
            if subprocess.run(command, capture_output=True).returncode:
                raise SystemExit(nobody_allows_it)
        try:
            launch(read, Config(), Large())
        except SystemExit as end:
            print(end.code, flush=True)
            raise SystemExit(1)

    code = in_child(work)
    if code == 77:
        pytest.skip("this user may not mount a small /dev/shm")
    assert code == 1 and capfd.readouterr().out == f"{MESSAGE}\n"


def test_a_file_name_of_no_encoding_can_be_printed():
    def work():
        sys.stdout.reconfigure(errors="strict")
        launch(lambda config, team: print("caf\udce9.jpg"), Config())
    assert in_child(work) == 0


def test_a_process_may_wait_a_day_for_the_others(monkeypatch):
    """The last one may have a long video to extract, where PyTorch would give up after half an hour."""
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: asked.update(settings))
    monkeypatch.setattr(distributed, "_fresh_store", lambda: "store")
    assert join("cpu").world == 2
    assert asked["timeout"].total_seconds() >= 24 * 3600 and asked["store"] == "store"
