"""Randomness, batches, pieces, the learning rate and the optimiser against closed forms and loops."""

import contextlib
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.distributed import Team
from engine.training import (STOP, Progress, adamw, in_pieces, layers_of, loader, set_learning_rate, shares)
from processes import ALONE, CPU, in_child
from vit import VisionTransformer


@pytest.mark.parametrize("n, batch", [(1, 1), (1, 3), (7, 3), (9, 3), (33, 32), (100, 200)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_disjoint_and_make_up_the_batches_of_a_single_process(n, batch, world):
    alone = list(shares(n, batch, 0, 4, ALONE))
    of_ranks = [list(shares(n, batch, 0, 4, Team(rank, world, CPU))) for rank in range(world)]
    assert sorted(i for step in alone for i in step) == list(range(n))         # each sample once in an epoch
    assert list(map(len, alone)) == [min(batch, n - first) for first in range(0, n, batch)]    # may be short
    for step, parts in zip(alone, zip(*of_ranks, strict=True), strict=True):
        assert sorted(i for part in parts for i in part) == sorted(step)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1                # a share may be empty
    for first in range(len(alone) + 1):
        assert list(shares(n, batch, 0, 4, Team(world - 1, world, CPU), first)) == of_ranks[-1][first:]


class Squares(torch.utils.data.Dataset):
    """Item i is i². A batch also tells which process made it and which signals wait there."""
    def __getitem__(self, i):
        return i * i

    def collate(self, items):
        blocked = [int(number in signal.pthread_sigmask(signal.SIG_BLOCK, [])) for number in STOP]
        return torch.tensor(items), torch.zeros(0, 3), torch.tensor([os.getpid(), *blocked])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_puts_shares_together_in_order_in_workers_that_ignore_the_signals_of_a_stop(workers):
    order = list(shares(11, 4, 0, 0, Team(1, 2, CPU), first=1))
    batches = list(loader(Squares(), iter(order), workers, ALONE))
    assert [squares.tolist() for squares, *_ in batches] == [[i * i for i in share] for share in order]
    assert all(empty.shape == (0, 3) for _, empty, _ in batches)
    makers, *blocked = torch.stack([made for *_, made in batches]).T.tolist()
    assert (set(makers) == {os.getpid()}) if workers == 0 else (os.getpid() not in makers)
    assert len(set(makers)) == max(workers, 1) and blocked == [[int(workers > 0)] * 2] * 2
    assert not set(STOP) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_the_training_process_gets_a_signal_that_came_while_its_workers_started(monkeypatch):
    def iterate(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        raise OSError("no worker can be started")

    def work():
        with contextlib.suppress(OSError):
            loader(Squares(), [[0]], 0, ALONE)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", iterate)
    assert in_child(work) == -signal.SIGTERM


def test_ddp_sends_nothing_for_all_but_the_last_piece():
    silent = []

    @contextlib.contextmanager
    def no_sync():
        silent.append(True)
        yield
        silent.pop()

    for count in (1, 2, 5, 12):                            # more than there are samples, too
        pieces = in_pieces(SimpleNamespace(no_sync=no_sync), count, torch.zeros(9))
        assert [len(silent) for _ in pieces] == [1] * (count - 1) + [0]


def rates(steps, warmup, peak=2.0, **group):
    """The learning rates of a whole run."""
    optimizer, found = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **group}], lr=9.0), []
    for step in range(steps):
        set_learning_rate(optimizer, step, steps, warmup, peak)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_learning_rates_of_a_whole_run_are_those_of_the_closed_form():
    """Of 9 steps, 4 are warm-up: step 1 has a quarter of the peak, step 4 all of it. Half a cosine of 6 steps
    follows, less the sixth, whose rate would be 0. A warm-up that is longer than the run ends at the peak."""
    warm_up = [2 * step / 4 for step in (1, 2, 3, 4)]
    cosine = [2 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (1, 2, 3, 4, 5)]
    assert rates(9, 4) == pytest.approx(warm_up + cosine, rel=1e-12)
    assert rates(9, 4, factor=0.1) == pytest.approx([rate / 10 for rate in warm_up + cosine], rel=1e-12)
    assert rates(9, 4, fixed=0.3) == [0.3] * 9 and rates(4, 100) == pytest.approx([0.5, 1, 1.5, 2], rel=1e-12)
    for steps, warmup in [(1, 0), (1, 1), (2, 5), (10, 0), (100, 2.5)]:
        assert all(0 < rate <= 2 for rate in rates(steps, warmup))


def section(**settings):
    return SimpleNamespace(**{"lr": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.3} | settings)


def test_the_layers_of_a_vit_are_those_of_the_references_fine_tuning_in_each_of_two():
    """Its rule: cls token, positions and patch embedding 0, block i has i + 1, all else is the head's."""
    with torch.device("meta"):
        model = nn.ModuleDict({"a": VisionTransformer(), "b": VisionTransformer(), "head": nn.Linear(768, 8),
                               "decoder_blocks": nn.ModuleList([nn.Linear(2, 2)])})
    layers = layers_of(model)
    assert set(layers) == set(dict(model.named_parameters()))
    for name, layer in layers.items():
        _, part, number = f"{name}.".split(".", 3)[:3]
        bottom = part in ("cls_token", "pos_embed", "patch_embed")
        assert layer == (0 if bottom else int(number) + 1 if part == "blocks" else 13), name
    groups = adamw(model, section(layer_decay=0.65)).param_groups
    factors = [group.get("factor", 1.0) for group in groups]
    assert factors == pytest.approx([0.65 ** (k // 2) for k in range(2 * 14)], rel=1e-12)   # two for a layer
    assert factors[-1] == pytest.approx(0.0037, abs=5e-6)                  # as the docstring says
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)]: 13 - k // 2 for k, group in enumerate(groups) for p in group["params"]} == {
        name: layers[name] for name in names.values()}


def test_adamw_decays_matrices_only_and_leaves_out_what_is_frozen():
    model = VisionTransformer(image_size=16, patch=8, dim=16, depth=1, heads=2)
    decayed, rest = adamw(model, section(weight_decay=0.05)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"], set(decayed)) == (0.05, 0, set(rest))
    assert decayed["betas"] == rest["betas"] == (0.8, 0.9) and decayed["lr"] == rest["lr"] == 1e-3
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [name for name in trained if name.endswith("bias") or "norm" in name or name == "cls_token"]
    for group, names in ((rest, plain), (decayed, [name for name in trained if name not in plain])):
        assert [id(p) for p in group["params"]] == [id(trained[name]) for name in names]


def test_progress_tells_how_much_is_done_how_fast_and_how_long_it_takes(capsys, monkeypatch):
    """Every five seconds."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr("engine.training.time", SimpleNamespace(time=lambda: clock.now))
    progress = Progress(40_000, "frames", ALONE)
    for seconds, count in ((1, 100), (5, 400), (1, 1), (9, 19_499)):
        clock.now += seconds
        progress.add(count, lambda: f", {count} more")
    assert capsys.readouterr().out == ("  500 of 40,000 frames  83.33 frames/s  0:07:54 left, 400 more\n"
                                       "  20,000 of 40,000 frames  1,250.00 frames/s  0:00:16 left, 19499 "
                                       "more\n")
