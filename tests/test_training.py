"""Randomness, batches, pieces, the learning rate and the optimiser against closed forms and loops."""

import contextlib
import math
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distributed import Team
from processes import ALONE, CPU, in_child
from training import (STOP, Batches, adamw, effective_batch, generator, gradient_norm, in_pieces, layers_of,
                      learning_rate, load_optimizer, loader, pieces, seed_dropout, set_learning_rate,
                      vit_bytes)
from vit import VisionTransformer


# ---- Randomness and batches

def team(rank, world):
    return Team(rank, world, CPU)


@pytest.mark.parametrize("n", [1, 2, 7, 32, 33, 100])
@pytest.mark.parametrize("batch", [1, 3, 32, 200])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_disjoint_and_make_up_the_batches_of_a_single_process(n, batch, world):
    alone = list(Batches(n, batch, 0, 4, ALONE))
    shares = [list(Batches(n, batch, 0, 4, team(rank, world))) for rank in range(world)]
    assert sorted(i for step in alone for i in step) == list(range(n))         # each sample once in an epoch
    full, rest = divmod(n, batch)
    assert [len(step) for step in alone] == [batch] * full + [rest] * (rest > 0)        # a short one is kept
    for step, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert sorted(i for part in parts for i in part) == sorted(step)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1                # a share may be empty
    for first in range(len(alone) + 1):
        resumed = Batches(n, batch, 0, 4, team(world - 1, world), first)
        assert list(resumed) == shares[-1][first:]
        assert len(resumed) == len(shares[-1]) - first
        assert [resumed.share(step) for step in range(first, len(alone))] == list(resumed)
        assert [resumed.whole(step) for step in range(len(alone))] == alone    # of all processes


def test_the_order_differs_by_epoch_and_seed_and_repeats_exactly():
    def order(seed, epoch):
        return tuple(Batches(50, 50, seed, epoch, ALONE).share(0))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert all(order(*numbers) == drawn for numbers, drawn in orders.items())


def test_dropout_depends_on_seed_epoch_step_and_rank_and_on_nothing_else():
    draws = {}
    for numbers in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]:
        seed_dropout(*numbers)
        first = torch.rand(4)
        torch.rand(99)
        seed_dropout(*numbers)
        assert torch.equal(first, torch.rand(4))
        draws[numbers] = tuple(first.tolist())
    assert len(set(draws.values())) == 5


def test_a_generator_is_a_function_of_its_numbers():
    a, b, c = (generator(*numbers).random(3).tolist() for numbers in [(3, 4, 5), (3, 4, 5), (3, 4, 6)])
    assert a == b != c


def test_the_order_of_an_epoch_and_the_crop_of_its_first_sample_draw_different_numbers():
    assert generator(3, 4).random(3).tolist() != generator(3, 4, 0).random(3).tolist()


class Squares(torch.utils.data.Dataset):
    """Item i is i². A batch also tells which process made it, and holds an empty tensor."""

    def __getitem__(self, i):
        return i * i

    def collate(self, items):
        return torch.tensor(items), torch.zeros(0, 3), os.getpid(), torch.tensor(items).is_shared()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_puts_each_share_together_in_order_in_as_many_workers_as_asked(workers):
    order = Batches(11, 4, 0, 0, team(1, 2), first=1)
    batches = list(loader(Squares(), order, workers, ALONE))
    assert [squares.tolist() for squares, *_ in batches] == [[i * i for i in share] for share in order]
    assert all(empty.shape == (0, 3) for _, empty, *_ in batches)
    makers = {maker for _, _, maker, _ in batches}
    assert (makers == {os.getpid()}) if workers == 0 else (os.getpid() not in makers and len(makers) == 2)
    # The worker shares it itself, so that an error of shared memory reaches the training.
    assert all(squares.is_shared() == (workers > 0) for squares, *_ in batches)


class Masks(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return STOP[i] in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def collate(self, items):
        return torch.tensor(items)


def test_workers_ignore_the_signals_that_stop_a_run_and_the_training_process_does_not():
    batches = loader(Masks(), [[0, 1]], 1, ALONE)
    assert next(batches).tolist() == [True, True]
    assert not set(STOP) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_the_training_process_gets_a_signal_that_came_while_its_workers_started(monkeypatch):
    def iterate(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        raise OSError("no worker can be started")

    def work():
        with contextlib.suppress(OSError):
            loader(Masks(), [[0]], 0, ALONE)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", iterate)
    assert in_child(work) == -signal.SIGTERM


# ---- Gradient accumulation

@pytest.mark.parametrize("share, gigabytes, expected", [
    (1, .001, 1), (256, .001, 1), (500, .001, 1), (501, .001, 2), (1024, .01, 21), (8, .3, 8), (8, .25, 4),
    (3, 99, 3)])
def test_a_share_is_cut_into_as_few_pieces_as_fit_half_a_gigabyte(share, gigabytes, expected):
    assert pieces(share, gigabytes * 1e9, 10 ** 6, CPU) == expected
    assert math.ceil(share / expected) * gigabytes <= 0.5 or expected == share


@pytest.fixture
def ten_gigabytes(monkeypatch):
    """A GPU of 10 GB, with bf16 or without."""
    def prepare(bf16: bool):
        memory = SimpleNamespace(total_memory=10e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        return SimpleNamespace(type="cuda")
    return prepare


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("share, largest, expected", [
    (100, 1, 100), (100, 7, 15), (100, 50, 2), (100, 99, 2), (100, 100, 1), (100, 101, 1), (1, 7, 1)])
def test_a_largest_piece_of_the_settings_replaces_the_estimate(ten_gigabytes, kind, share, largest, expected):
    ten_gigabytes(bf16=True)
    for bytes_each in (1.0, 1e12):                            # everything would fit, and nothing
        assert pieces(share, bytes_each, 10 ** 8, SimpleNamespace(type=kind), largest) == expected


def test_on_a_gpu_the_weights_and_moments_are_held_besides_and_activations_take_0_56(ten_gigabytes):
    gpu = ten_gigabytes(bf16=True)
    assert pieces(100, 1e9, 0, gpu) == math.ceil(100 / 14)                  # 8 GB / 0.56 GB = 14.3
    assert pieces(120, 1e9, 130_000_000, gpu) == 12                         # 2.34 GB less: 10.1
    assert pieces(120, 1e9, 140_000_000, gpu) == math.ceil(120 / 9)         # 2.52 GB less: 9.8
    assert pieces(100, 1e9, 10 ** 9, gpu) == 100                            # too large in any case
    assert pieces(8000, 1e6 / 0.56, 0, gpu) == 1                            # 8,000 pieces of 1 MB fill 8 GB
    assert pieces(8000, 1.001e6 / 0.56, 0, gpu) == 2


def test_a_gpu_without_bf16_computes_in_float32_and_needs_the_memory_of_that(ten_gigabytes):
    gpu = ten_gigabytes(bf16=False)
    assert pieces(80, 1e9, 0, gpu) == 10                                    # 8 GB / 1 GB
    assert pieces(80, 1e9, 10 ** 8, gpu) == math.ceil(80 / 6)               # 1.6 GB less: 6.4


@pytest.mark.parametrize("side, dim, depth", [(32, 64, 3), (64, 96, 2)])
def test_vit_bytes_is_what_autograd_keeps(side, dim, depth):
    model, kept = VisionTransformer(image_size=side, patch=8, dim=dim, depth=depth, heads=4), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor     # held: its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.features(torch.randn(4, 3, side, side), "mean")
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) / 4
    assert vit_bytes((side // 8) ** 2 + 1, dim, depth) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("here, there", [(None, True), (True, None), (None, None)])
def test_an_optimiser_of_another_device_goes_on_with_the_kernels_of_this_one(here, there):
    """`fused` belongs to the device and not to the run, as does the place where a step is counted."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    ours, theirs = (torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=fused) for fused in (here, there))
    layer(torch.ones(3)).sum().backward()
    theirs.step()
    moments = {i: state["exp_avg"].clone() for i, state in theirs.state_dict()["state"].items()}
    load_optimizer(ours, theirs.state_dict())
    ours.step()
    state = ours.state_dict()
    assert [group["fused"] for group in state["param_groups"]] == [here]
    for i, parameter in enumerate(layer.parameters()):
        assert state["state"][i]["step"] == 2
        assert torch.allclose(state["state"][i]["exp_avg"], 0.9 * moments[i] + 0.1 * parameter.grad)


@pytest.mark.parametrize("batch, count, world, text", [
    (1024, 4, 2, "effective batch 1024 = 128 x 4 accumulation x 2 processes, on cpu"),
    (10, 2, 3, "effective batch 10 = 2 x 2 accumulation x 3 processes, on cpu"),
    (7, 1, 1, "effective batch 7 = 7 x 1 accumulation x 1 processes, on cpu")])
def test_the_effective_batch_is_told_by_its_largest_piece(batch, count, world, text):
    assert effective_batch(batch, count, team(0, world)) == text


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole_batch(count):
    x, y = torch.randn(7, 3, dtype=torch.double), torch.randint(2, (7,))
    whole, cut = classifier(), classifier()
    nn.functional.cross_entropy(whole(x), y, reduction="sum").backward()
    seen = []
    for part_x, part_y in in_pieces(cut, count, x, y):
        nn.functional.cross_entropy(cut(part_x), part_y, reduction="sum").backward()
        seen.append((part_x, part_y))
    assert len(seen) == count
    assert torch.equal(torch.cat([a for a, _ in seen]), x)
    assert torch.equal(torch.cat([b for _, b in seen]), y)
    assert max(len(a) for a, _ in seen) == math.ceil(7 / count)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ddp_sends_nothing_for_all_but_the_last_piece(count):
    class DDP:
        silent = False

        @contextlib.contextmanager
        def no_sync(self):
            self.silent = True
            yield
            self.silent = False

    ddp = DDP()
    silent = [ddp.silent for _ in in_pieces(ddp, count, torch.zeros(9))]
    assert silent == [True] * (count - 1) + [False]


def test_the_gradient_norm_is_the_length_of_all_gradients_together():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(1, 1)])
    model[0].weight.grad, model[0].bias.grad = torch.tensor([[2.0, -3.0]]), torch.tensor([6.0])
    assert gradient_norm(model).item() == 7                                # √(4 + 9 + 36); the rest has none


# ---- Learning rate and optimiser

@pytest.mark.parametrize("progress, warmup, share", [
    (0, .2, 0), (.05, .2, .25), (.1, .2, .5), (.2, .2, 1), (.6, .2, .5),
    (.4, .2, .5 * (1 + math.cos(math.pi / 4))), (1, .2, 0),
    (0, 0, 1), (.5, 0, .5), (1, 0, 0), (.25, 1, .25), (.999, 1, .999)])
def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine(progress, warmup, share):
    assert learning_rate(progress, warmup, 3e-5) == pytest.approx(3e-5 * share, abs=1e-15)


def two_groups():
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=9.0)


@pytest.mark.parametrize("steps, warmup", [
    (1, 0), (1, 1), (2, 5), (10, 0), (10, 3), (1000, 1000), (100, 2.5)])
def test_no_step_has_a_learning_rate_of_0_and_none_is_above_the_peak(steps, warmup):
    optimizer = two_groups()
    rates = [set_learning_rate(optimizer, step, steps, warmup, 2.0) for step in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
    assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
    top = rates.index(max(rates))
    assert np.all(np.diff(rates[:top + 1]) > 0) and np.all(np.diff(rates[top:]) < 0) and top <= warmup


def test_the_learning_rates_of_a_whole_run_are_those_of_the_closed_form():
    """Of 9 steps, 4 are warm-up: step 1 has a quarter of the peak, step 4 all of it. Half a cosine of 6 steps
    follows, less the sixth, whose rate would be 0."""
    optimizer = two_groups()
    rates = [set_learning_rate(optimizer, step, 9, 4, 2.0) for step in range(9)]
    warm_up = [2 * step / 4 for step in (1, 2, 3, 4)]
    cosine = [2 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (1, 2, 3, 4, 5)]
    assert rates == pytest.approx(warm_up + cosine, rel=1e-12)


def test_a_warm_up_longer_than_the_run_ends_at_the_peak():
    optimizer = two_groups()
    rates = [set_learning_rate(optimizer, step, 4, 100, 2.0) for step in range(4)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0], rel=1e-12)


class Tower(nn.Module):
    """The names of a ViT's three kinds of layers, with a linear layer for each: depth 1."""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.head = nn.Linear(2, 3), nn.Linear(3, 2)
        self.blocks = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x):
        return self.head(torch.tanh(self.blocks[0](torch.tanh(self.patch_embed(x)))))


def test_the_layers_of_a_vit_are_those_of_the_references_fine_tuning():
    """Its rule: cls token, positions and patch embedding 0, block i has i + 1, all else is the head's."""
    with torch.device("meta"):
        model = nn.ModuleDict({"vit": VisionTransformer(), "head": nn.Linear(768, 8)})
    layers = layers_of(model)
    assert set(layers) == set(dict(model.named_parameters()))
    for name, layer in layers.items():
        part = name.split(".")
        if part[1] in ("cls_token", "pos_embed", "patch_embed"):
            assert layer == 0, name
        else:
            assert layer == (int(part[2]) + 1 if part[1] == "blocks" else 13), name
    groups = adamw(model, 1e-3, (0.9, 0.999), 0.05, layer_decay=0.65).param_groups
    factors = [group.get("factor", 1.0) for group in groups]
    assert factors == pytest.approx([0.65 ** (k // 2) for k in range(2 * 14)], rel=1e-12)   # two for a layer
    assert factors[-1] == pytest.approx(0.0037, abs=5e-6)                                   # 0.65 ** 13
    names = {id(p): name for name, p in model.named_parameters()}
    of_layer = {names[id(p)]: 13 - k // 2 for k, group in enumerate(groups) for p in group["params"]}
    assert of_layer == {name: layer for name, layer in layers.items() if name != "vit.pos_embed"}


def test_layers_are_counted_in_each_of_two_vits_and_a_decoder_is_none():
    two = nn.ModuleList(VisionTransformer(image_size=16, patch=8, dim=8, depth=3, heads=2) for _ in range(2))
    two.append(nn.ModuleDict({"decoder_blocks": nn.ModuleList([nn.Linear(2, 2)])}))
    layers = layers_of(two)
    for i in range(2):
        assert (layers[f"{i}.cls_token"], layers[f"{i}.patch_embed.proj.bias"]) == (0, 0)
        assert [layers[f"{i}.blocks.{b}.mlp.fc1.weight"] for b in range(3)] == [1, 2, 3]
        assert layers[f"{i}.norm.weight"] == 4
    assert layers["2.decoder_blocks.0.weight"] == 4


def test_steps_with_layer_decay_are_adamw_written_out_with_a_learning_rate_for_each_layer():
    torch.manual_seed(0)
    model, beta1, beta2, decay = Tower().double(), 0.8, 0.9, 0.3
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    factor = {"head": 1, "blocks": 0.5, "patch_embed": 0.25}
    optimizer = adamw(model, 9.0, (beta1, beta2), decay, layer_decay=0.5)
    for t in range(1, 5):
        lr = set_learning_rate(optimizer, t - 1, 4, 2, 0.1)
        assert lr == pytest.approx([0.05, 0.1, 0.075, 0.025][t - 1], rel=1e-12)
        optimizer.zero_grad()
        model(torch.randn(5, 2, dtype=torch.double)).square().sum().backward()
        for name, p in model.named_parameters():
            own, g = lr * factor[name.split(".")[0]], p.grad
            if p.ndim == 2:
                w[name] -= own * decay * w[name]
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g ** 2
            w[name] -= own * m[name] / (1 - beta1 ** t) / ((v[name] / (1 - beta2 ** t)).sqrt() + 1e-8)
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, w[name], rtol=1e-10, atol=1e-12), name


def test_the_logged_learning_rate_is_the_heads():
    """run.py logs that of the first group."""
    model = Tower()
    optimizer = adamw(model, 9.0, (0.9, 0.99), 0.1, layer_decay=0.5)
    assert set_learning_rate(optimizer, 1, 4, 2, 0.1) == optimizer.param_groups[0]["lr"] == 0.1
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(model.head.weight)}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_without_layer_decay_the_optimiser_is_the_one_of_earlier_checkpoints():
    model = Tower()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    earlier = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                 {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95))
    ours = adamw(model, 1e-3, [0.9, 0.95], 0.05)
    assert ours.state_dict() == earlier.state_dict()
    for a, b in zip(ours.param_groups, earlier.param_groups, strict=True):
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]


def test_an_optimiser_that_goes_on_keeps_its_factors():
    first, second = (adamw(Tower(), 1e-3, (0.9, 0.95), 0.05, layer_decay=0.5) for _ in range(2))
    set_learning_rate(first, 0, 4, 2, 0.1)
    second.load_state_dict(first.state_dict())
    set_learning_rate(second, 1, 4, 2, 0.1)
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_adamw_decays_matrices_only_and_leaves_out_what_is_frozen():
    model = VisionTransformer(image_size=16, patch=8, dim=16, depth=1, heads=2)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = adamw(model, 1e-3, [0.9, 0.95], 0.05).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0)
    assert decayed["betas"] == rest["betas"] == (0.9, 0.95) and decayed["lr"] == rest["lr"] == 1e-3
    plain = {name for name in names.values()
             if name.endswith("bias") or "norm" in name or name == "cls_token"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)] for p in rest["params"]} == plain
    assert {names[id(p)] for p in decayed["params"]} == trained - plain
