"""The three task losses over 1 to 4 real processes (gloo): loss and every gradient are the single process's on the whole batch.

The shards are as uneven as they get: other sizes on each rank, rank 2 without any clip, rank 1 with and without labels.
"""

import contextlib
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from losses import TASK_LOSS, all_sum
from temporal import OUTPUTS, SegmentModel

SHARDS = {1: [6], 2: [4, 2], 3: [4, 2, 0], 4: [1, 2, 0, 3]}          # world size -> clips on each rank
CASES = {"va": ("va", 1), "expr": ("expr", 1), "au": ("au", 1), "expr in two pieces": ("expr", 2), "au in two pieces": ("au", 2)}
SILENT = {"no rank": (), "rank 1": (1,), "every rank": (0, 1, 2, 3)}  # who has clips but no valid label
T, D = 9, 5


def make_model(task):
    torch.manual_seed(0)
    return SegmentModel(D, OUTPUTS[task], channels=(6, 4), kernels=(3, 3), dilations=(1, 2), width=8, layers=1, heads=2, hidden=8,
                        head=6, dropout=0.0).double()


def make_batch(task, world, silent):
    """(x, frames, target, valid) of all clips: padded frames hold NaN, invalid labels their code, `silent` ranks have no label."""
    torch.manual_seed(1)
    B, K = sum(SHARDS[world]), OUTPUTS[task]
    frames = torch.arange(T) < torch.randint(3, T + 1, (B, 1))
    x = torch.randn(B, T, D, dtype=torch.double).masked_fill(~frames[..., None], torch.nan)
    labelled = torch.tensor([rank not in silent for rank, clips in enumerate(SHARDS[world]) for _ in range(clips)])
    shape = (B, T) if task == "expr" else (B, T, K)
    valid = (torch.rand(shape) < 0.7) & (frames & labelled[:, None]).view(B, T, *[1] * (len(shape) - 2))
    target = {"va": torch.rand(shape) * 2 - 1, "expr": torch.randint(8, shape), "au": (torch.rand(shape) < 0.3).double()}[task]
    return x, frames, target.masked_fill(~valid, -5 if task == "va" else -1), valid


def backward(model, task, batch):
    x, frames, target, valid = batch
    loss = TASK_LOSS[task](model(x, frames), target, valid)
    loss.backward()
    return loss.item()


def backward_in_pieces(model, task, batch, pieces, count, world):
    """As the training steps that accumulate: loss and gradients cross the network once, with the last piece."""
    total = 0.0
    for i, (x, frames, target, valid) in enumerate(zip(*(part.tensor_split(pieces) for part in batch))):
        with model.no_sync() if i < pieces - 1 else contextlib.nullcontext():
            share = TASK_LOSS[task](model(x, frames), target, valid, count)
            (share * world).backward()
        total = total + share.detach()
    return all_sum(total).item()


def result(model, loss):
    return {"loss": loss, "gradients": {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}}


def worker(rank, folder):
    """One process, in every world size that has its rank: all cases with its shard. Results go to files."""
    torch.set_num_threads(1)
    for world in [w for w in SHARDS if rank < w]:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=60))
        results = {}
        for case, (task, pieces) in CASES.items():
            for silent in SILENT:
                batch = make_batch(task, world, SILENT[silent])
                model = DistributedDataParallel(make_model(task))
                shard = [part.split(SHARDS[world])[rank] for part in batch]
                loss = (backward(model, task, shard) if pieces == 1 else
                        backward_in_pieces(model, task, shard, pieces, batch[3].sum().clamp(min=1), world))
                results[case, silent] = result(model, loss)
        x = torch.tensor([rank + 1.0, 10.0 * rank], requires_grad=True)
        total = all_sum(x)
        total.square().sum().backward()
        results["all_sum"] = {"after": total.tolist(), "gradient": x.grad.tolist()}
        torch.save(results, folder / f"{world}.{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """world size -> the results of each rank. Processes start once for all; a failing one fails every test, with its traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (folder,), nprocs=max(SHARDS))
    return {world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)] for world in SHARDS}


@pytest.mark.parametrize("silent", ["no rank", "rank 1"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", SHARDS)
def test_loss_and_every_gradient_are_those_of_one_process_with_the_whole_batch(runs, world, case, silent):
    task = CASES[case][0]
    model = make_model(task)
    expected = result(model, backward(model, task, make_batch(task, world, SILENT[silent])))
    for got in (results[case, silent] for results in runs[world]):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-10) and got["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert gradient.norm() > 1e-8, name                      # nothing to compare otherwise
            assert (got["gradients"][name] - gradient).norm() < 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_process_has_the_same_loss_and_gradients(runs, world, case):
    first, *others = (results[case, "no rank"] for results in runs[world])
    for other in others:
        assert other["loss"] == first["loss"]
        assert all(torch.equal(gradient, first["gradients"][name]) for name, gradient in other["gradients"].items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", SHARDS)
def test_a_batch_without_any_label_anywhere_has_loss_zero_and_zero_gradients(runs, world, case):
    for got in (results[case, "every rank"] for results in runs[world]):
        assert got["loss"] == 0 and not any(gradient.any() for gradient in got["gradients"].values())


@pytest.mark.parametrize("world", SHARDS)
def test_all_sum_adds_over_processes_and_its_gradient_is_what_ddps_mean_needs(runs, world):
    total = [sum(range(1, world + 1)), 10 * sum(range(world))]
    for got in (results["all_sum"] for results in runs[world]):
        assert got["after"] == total
        assert got["gradient"] == [world * 2 * t for t in total]     # d(total²) = 2 total, times W, which DDP divides by


@pytest.mark.parametrize("task", TASK_LOSS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_averaging_each_shards_own_loss_would_be_another_loss(world, task):
    """Why the losses are functions of sums, and that the batches above can tell."""
    x, frames, target, valid = make_batch(task, world, SILENT["rank 1"])
    outputs = make_model(task)(x, frames)
    own = [TASK_LOSS[task](*shard).item() for shard in zip(*(part.split(SHARDS[world]) for part in (outputs, target, valid)))]
    assert abs(sum(own) / world - TASK_LOSS[task](outputs, target, valid).item()) > 0.05
