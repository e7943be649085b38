"""The three task losses over 1 to 4 real processes (gloo): loss and every gradient are the single process's
on the whole batch.

The shards are as uneven as they get: other sizes on each rank, rank 2 without any clip, rank 1 with and
without labels.
"""

import contextlib
import datetime
import gc
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import losses
from distributed import Team, all_sum
from labels import TASKS
from temporal import SegmentModel

SHARDS = {1: [6], 2: [4, 2], 3: [4, 2, 0], 4: [1, 2, 0, 3]}          # world size -> clips on each rank
CASES = {"va": ("va", 1), "expr": ("expr", 1), "au": ("au", 1),      # name -> task, pieces
         "expr in two pieces": ("expr", 2), "au in two pieces": ("au", 2)}
SILENT = {"no rank": (), "rank 1": (1,), "every rank": (0, 1, 2, 3)}  # who has clips but no valid label
T, D = 9, 5


def make_model(task):
    torch.manual_seed(0)
    return SegmentModel(D, len(TASKS[task].outputs), channels=(6, 4), kernels=(3, 3), dilations=(1, 2),
                        width=8, layers=1, heads=2, hidden=8, head=6, dropout=0.0).double()


def make_batch(task, world, silent):
    """(x, frames, target, valid) of all clips: padded frames hold NaN, invalid labels their code, `silent`
    ranks have no label."""
    torch.manual_seed(1)
    B, K = sum(SHARDS[world]), len(TASKS[task].outputs)
    frames = torch.arange(T) < torch.randint(3, T + 1, (B, 1))                           # (B, T)
    x = torch.randn(B, T, D, dtype=torch.double).masked_fill(~frames[..., None], torch.nan)
    rank_of_clip = torch.arange(world).repeat_interleave(torch.tensor(SHARDS[world]))    # (B,)
    labelled = torch.tensor([rank not in silent for rank in rank_of_clip.tolist()])
    may_be_valid = frames & labelled[:, None]                                            # (B, T)
    shape = (B, T) if task == "expr" else (B, T, K)
    valid = (torch.rand(shape) < 0.7) & (may_be_valid if task == "expr" else may_be_valid[..., None])
    if task == "va":
        target = torch.rand(shape) * 2 - 1
    elif task == "expr":
        target = torch.randint(8, shape)
    else:
        target = (torch.rand(shape) < 0.3).double()
    return x, frames, target.masked_fill(~valid, TASKS[task].invalid), valid


def backward(model, task, batch):
    x, frames, target, valid = batch
    loss = getattr(losses, TASKS[task].loss)(model(x, frames), target, valid)
    loss.backward()
    return loss.item()


def backward_in_pieces(model, task, batch, pieces, count, world):
    """As the training steps that accumulate: loss and gradients cross the network once, with the last
    piece."""
    total = 0.0
    for i, (x, frames, target, valid) in enumerate(zip(*(part.tensor_split(pieces) for part in batch))):
        silent = i < pieces - 1 and world > 1
        with model.no_sync() if silent else contextlib.nullcontext():
            share = getattr(losses, TASKS[task].loss)(model(x, frames), target, valid, count)
            share.backward()
        total = total + share.detach()
    return all_sum(total).item()


def result(model, loss):
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss, "gradients": gradients}


def run_case(case, silent, models, team):
    """Loss and gradients of one process, which has its shard of the batch."""
    task, pieces = CASES[case]
    batch = make_batch(task, team.world, SILENT[silent])
    shard = [part.split(SHARDS[team.world])[team.rank] for part in batch]
    model = models[task]
    model.zero_grad()
    if pieces == 1:
        return result(model, backward(model, task, shard))
    count = batch[3].sum().clamp(min=1)
    return result(model, backward_in_pieces(model, task, shard, pieces, count, team.world))


def worker(rank, folder):
    """One process, in every world size that has its rank: all cases with its shard. Results go to files."""
    torch.set_num_threads(1)
    gc.freeze()                                          # gc.collect need not look at what is imported
    for world in [w for w in SHARDS if rank < w]:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=60))
        team = Team(rank, world, torch.device("cpu"))
        models = {task: team.parallel(make_model(task)) for task in TASKS}
        results = {}
        for case in CASES:
            for silent in SILENT:
                results[case, silent] = run_case(case, silent, models, team)
        x = torch.tensor([rank + 1.0, 10.0 * rank], requires_grad=True)
        total = all_sum(x)
        total.square().sum().backward()
        results["all_sum"] = {"after": total.tolist(), "gradient": x.grad.tolist()}
        torch.save(results, folder / f"{world}.{rank}.pt")
        del models
        gc.collect()                                     # no DDP model may outlive its process group
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """world size -> the results of each rank. Processes start once for all; a failing one fails every test,
    with its traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    # Imported once, not once for each process; DDP needs torch._dynamo.
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])
    torch.multiprocessing.start_processes(worker, (folder,), nprocs=max(SHARDS), start_method="forkserver")
    return {world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)] for world in SHARDS}


@pytest.mark.parametrize("silent", ["no rank", "rank 1"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", SHARDS)
def test_loss_and_every_gradient_are_those_of_one_process_with_the_whole_batch(runs, world, case, silent):
    task = CASES[case][0]
    model = make_model(task)
    expected = result(model, backward(model, task, make_batch(task, world, SILENT[silent])))
    for got in (results[case, silent] for results in runs[world]):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert got["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert gradient.norm() > 1e-8, name                      # nothing to compare otherwise
            assert (got["gradients"][name] - gradient).norm() < 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_process_has_the_same_loss_and_gradients(runs, world, case):
    first, *others = (results[case, "no rank"] for results in runs[world])
    for other in others:
        assert other["loss"] == first["loss"]
        for name, gradient in other["gradients"].items():
            assert torch.equal(gradient, first["gradients"][name]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", SHARDS)
def test_a_batch_without_any_label_anywhere_has_loss_zero_and_zero_gradients(runs, world, case):
    for got in (results[case, "every rank"] for results in runs[world]):
        assert got["loss"] == 0 and not any(gradient.any() for gradient in got["gradients"].values())


@pytest.mark.parametrize("world", SHARDS)
def test_all_sum_adds_over_processes_and_leaves_each_its_own_share_of_the_gradient(runs, world):
    total = [sum(range(1, world + 1)), 10 * sum(range(world))]
    for got in (results["all_sum"] for results in runs[world]):
        assert got["after"] == total
        # d(total²) = 2 total, which no factor for the number of processes changes: DDP adds the shares.
        assert got["gradient"] == [2 * t for t in total]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_averaging_each_shards_own_loss_would_be_another_loss(world, task):
    """Why the losses are functions of sums, and that the batches above can tell."""
    x, frames, target, valid = make_batch(task, world, SILENT["rank 1"])
    outputs = make_model(task)(x, frames)
    shards = zip(*(part.split(SHARDS[world]) for part in (outputs, target, valid)))
    loss = getattr(losses, TASKS[task].loss)
    own = [loss(*shard).item() for shard in shards]
    assert abs(sum(own) / world - loss(outputs, target, valid).item()) > 0.05
