"""The losses: closed forms, loops, masks that hide NaN, gradients, and a batch in pieces or on processes."""

import contextlib
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses import au_loss, ccc, ccc_loss, expr_loss, js_loss, weighted_au_loss
from processes import ALONE, in_team

WEIGHT = torch.linspace(1, 9, 12, dtype=torch.double)
# name -> the loss, outputs per frame (of JS two views of 6 classes), the data sets' code for no label
LOSSES = {"va": (ccc_loss, 2, -5), "expr": (expr_loss, 8, -1), "au": (au_loss, 12, -1),
          "emma au": (lambda x, y, valid: weighted_au_loss(x, y, valid, WEIGHT), 12, -1),
          "js": (lambda x, y, valid, *N: js_loss(x.chunk(2, dim=-1), valid, *N), 12, -1)}
IN_PIECES = "expr", "js"                              # what a training accumulates
each_loss = pytest.mark.parametrize("name", LOSSES)


def batch(name, B=6, T=7, dtype=torch.double):
    """(prediction, target, valid): about two thirds valid, of frames or of single entries."""
    _, K, code = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    shape = (B, T) if name in ("expr", "js") else (B, T, K)
    valid = torch.rand(shape, generator=generator) < 0.65
    target = torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1
    if name == "expr":
        target = torch.randint(8, shape, generator=generator)
    elif name != "va":
        target = (target > 0.4).to(dtype)
    return torch.randn(B, T, K, generator=generator, dtype=dtype), target.masked_fill(~valid, code), valid


def loss_and_gradient(name, pred, *more):
    pred = pred.clone().requires_grad_()
    loss = LOSSES[name][0](pred, *more)
    loss.backward()
    return loss.detach(), pred.grad


def frames_of(name, valid):
    """The N that a loss divides by."""
    return (valid.any(dim=-1) if name == "emma au" else valid).sum().item()


# ---- Closed forms and loops

@pytest.mark.parametrize("x, y, expected", [
    ([1, 2, 3], [1, 2, 3], 1), ([-1, 0, 1], [1, 0, -1], -1), ([.01, .02, .03], [.02, .04, .06], 4 / 11),
    ([1, 2, 3], [2, 4, 6], 4 / 11), ([1, 2, 3], [2, 3, 4], 4 / 7), ([0, 0, 1, 1], [0, 1, 0, 1], 0),
    ([0, 1], [0, 3], 3 / 7), ([5, 5, 5], [1, 2, 3], 0), ([2, 2], [2, 2], 0)])
def test_ccc_of_known_pairs_and_the_loss_is_one_minus_it(x, y, expected):
    x, y = torch.tensor(x, dtype=torch.double), torch.tensor(y, dtype=torch.double)
    assert ccc(x, y) == pytest.approx(expected, abs=1e-14) == ccc(y, x)
    loss = ccc_loss(x[:, None], y[:, None], torch.ones(len(x), 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(1 - expected, abs=1e-14)


def test_va_loss_is_the_sum_of_one_minus_ccc_over_valence_and_arousal_each_over_its_own_valid_frames():
    pred, target, valid = batch("va")
    expected = sum(1 - ccc(pred[..., k][valid[..., k]], target[..., k][valid[..., k]]).item() for k in (0, 1))
    assert ccc_loss(pred, target, valid).item() == pytest.approx(expected, rel=1e-13)
    parts = [ccc_loss(pred[b], target[b], valid[b]).item() for b in range(6)]
    assert abs(sum(parts) / 6 - expected) > 0.01                     # it is no mean over parts
    arousal = 1 - ccc(pred[..., 1][valid[..., 1]], target[..., 1][valid[..., 1]]).item()
    for frames in (0, 1):                       # no frame of a dimension counts 0, one has a CCC of 0
        valid[..., 0] = torch.arange(42).view(6, 7) < frames
        assert ccc_loss(pred, target, valid).item() == pytest.approx(frames + arousal, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.double], ids=str)
@pytest.mark.parametrize("p, y", [(0.3, None), (None, -0.7), (0.3, -0.7), (0.1, 0.1), (0.7, 0.7)])
def test_what_does_not_vary_has_ccc_0_and_a_small_gradient(p, y, dtype):
    pred, target, valid = batch("va", B=10, T=30, dtype=dtype)
    pred, target = (x if c is None else torch.full_like(x, c) for x, c in ((pred, p), (target, y)))
    loss, gradient = loss_and_gradient("va", pred, target, valid)
    assert loss.item() == pytest.approx(2, abs=1e-5)
    assert gradient.isfinite().all() and gradient.abs().sum() < 10


def test_ccc_is_accurate_in_float32_far_from_zero():
    torch.manual_seed(0)
    x, y, valid = *(1000 + torch.randn(2, 4, 300, 2)), torch.ones(4, 300, 2, dtype=torch.bool)
    assert ccc_loss(x, y, valid).item() == pytest.approx(ccc_loss(x.double(), y, valid).item(), rel=1e-3)


def test_the_cross_entropies_are_written_out_means_of_valid_frames_and_entries():
    z, c, valid = batch("expr")
    p = z.exp() / z.exp().sum(dim=-1, keepdim=True)
    terms = [-math.log(p[i, t, c[i, t]]) for i, t in valid.nonzero().tolist()]
    assert expr_loss(z, c, valid).item() == pytest.approx(sum(terms) / len(terms), rel=1e-13)
    x, y, valid = batch("au")
    valid[0] = False                                                 # frames without any label
    positive, negative = y * (1 + (-x).exp()).log(), (1 - y) * (1 + x.exp()).log()       # -log of σ, of 1 - σ
    expected = (positive + negative)[valid].mean().item()
    assert au_loss(x, y, valid).item() == pytest.approx(expected, rel=1e-13)
    expected = (WEIGHT * positive + negative)[valid].sum().item() / frames_of("emma au", valid)
    assert LOSSES["emma au"][0](x, y, valid).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("V", [1, 2, 3])
def test_js_is_the_mean_divergence_of_the_views_from_their_mean(V):
    views = 2 * torch.randn(V, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    p = views.softmax(dim=-1)
    expected = (p * (p / p.mean(dim=0)).log()).sum(dim=-1).mean(dim=0)
    for i in range(5):
        one = js_loss(views[:, [i]], torch.tensor([True]))
        assert one.item() == pytest.approx(expected[i].item(), rel=1e-12, abs=1e-15)
    assert (expected > 0.01).all() == (V > 1)
    sure = 100 * F.one_hot(torch.arange(V), 6)[:, None]              # each view of another class
    assert js_loss(sure.double(), torch.tensor([True])).item() == pytest.approx(math.log(V), rel=1e-12)
    valid = torch.tensor([True, True, False, True, False])
    assert js_loss(views, valid).item() == pytest.approx(expected[valid].mean().item(), rel=1e-12, abs=1e-15)


# ---- What all promise

@each_loss
def test_gradients_are_those_of_finite_differences(name):
    pred, target, valid = batch(name, B=2, T=4)
    assert LOSSES[name][0](pred.half(), target, valid).dtype == torch.float32           # bf16: test_gpu.py
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, target, valid), pred.requires_grad_())


@each_loss
@pytest.mark.parametrize("garbage", [math.nan, -math.inf, 1e300])
def test_what_stands_in_invalid_entries_changes_nothing_and_gets_no_gradient(name, garbage):
    pred, target, valid = batch(name)
    loss, gradient = loss_and_gradient(name, pred, target, valid)
    counts = valid if valid.shape == pred.shape else valid[..., None].expand_as(pred)
    rubbish = target.masked_fill(~valid, 99 if name == "expr" else garbage)
    other, other_gradient = loss_and_gradient(name, pred.masked_fill(~counts, garbage), rubbish, valid)
    assert torch.equal(loss, other) and torch.equal(gradient, other_gradient)
    assert not gradient[~counts].any() and gradient[counts].all()


@each_loss
@pytest.mark.parametrize("B", [3, 0], ids=["all masked", "empty batch"])
def test_nothing_valid_gives_exactly_zero_and_zero_gradients(name, B):
    pred, target, valid = batch(name, B=B)
    for N in [(), (5,)] if name in IN_PIECES else [()]:
        loss, gradient = loss_and_gradient(name, pred * math.nan, target, torch.zeros_like(valid), *N)
        assert loss == 0 and gradient.shape == pred.shape and not gradient.any()


@pytest.mark.parametrize("name", ["expr", "au", "emma au", "js"])
def test_huge_logits_keep_the_loss_and_gradient_finite(name):
    pred, target, valid = batch(name, dtype=torch.float32)
    loss, gradient = loss_and_gradient(name, 1e30 * pred, target, valid)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("name, pred, target, valid, expected", [
    ("va", (2, 5, 2), (2, 5), (2, 5), (2, 5, 2)), ("va", (2, 5, 2), (2, 5, 2), (2, 5), (2, 5, 2)),
    ("au", (2, 5, 12), (2, 5, 12), (2, 5, 1), (2, 5, 12)), ("expr", (2, 5, 8), (2, 5, 8), (2, 5, 8), (2, 5)),
    ("expr", (2, 5, 8), (2, 5), (5,), (2, 5)), ("expr", (2, 5, 8), (10,), (2, 5), (2, 5)),
    ("emma au", (2, 5, 12), (2, 5, 12), (2, 5), (2, 5, 12)), ("js", (2, 5, 12), (2, 5), (5,), (2, 5))])
def test_shapes_that_do_not_fit_are_refused(name, pred, target, valid, expected):
    with pytest.raises(ValueError, match=re.escape(f"needs target and mask of {expected}, got [(")):
        LOSSES[name][0](torch.zeros(pred), torch.zeros(target), torch.ones(valid, dtype=torch.bool))


# ---- Pieces and processes

SHARES = {1: [6], 2: [4, 2], 3: [3, 0, 3]}                           # processes -> clips on each
# In how many pieces; how many of the six clips are labelled: with 3, the last process has no label.
CASES = [(name, pieces, labelled) for name in LOSSES for pieces in (1, 2, 4) for labelled in (6, 3, 0)
         if pieces == 1 or name in IN_PIECES]


def split_loss(team, name, pieces, labelled):
    """The loss, added up over pieces, and its gradient, on one of the processes."""
    pred, target, valid = batch(name)
    valid[labelled:] = False
    N = max(1, frames_of(name, valid))
    # A model whose outputs for each clip are its parameters, so that their gradient is the loss's own.
    model, total = team.parallel(nn.Embedding.from_pretrained(pred.flatten(1), freeze=False)), 0.0
    clips = torch.arange(6).split(SHARES[team.world])[team.rank]
    for i, piece in enumerate(clips.tensor_split(pieces)):
        waits = i < pieces - 1 and team.world > 1
        with model.no_sync() if waits else contextlib.nullcontext():
            outputs = model(piece).unflatten(1, pred.shape[1:])
            loss = LOSSES[name][0](outputs, target[piece], valid[piece], *([N] if pieces > 1 else []))
            loss.backward()
        total += loss.item()
    return total, next(model.parameters()).grad


@pytest.mark.parametrize("world", SHARES)
def test_loss_and_gradient_are_those_of_one_process_with_the_whole_batch(world):
    def work(team):
        return [split_loss(team, *case) for case in CASES]

    codes, found = in_team(world, work)
    assert codes == [0] * world
    for rank in range(world):
        for (name, pieces, labelled), (loss, gradient) in zip(CASES, found[rank], strict=True):
            expected, whole = split_loss(ALONE, name, 1, labelled)
            assert abs(loss - expected) <= 4e-16 * expected, (name, pieces, labelled, rank)
            assert (gradient - whole).norm() <= 6e-16 * whole.norm(), (name, pieces, labelled, rank)
            assert torch.equal(gradient, found[0][CASES.index((name, pieces, labelled))][1])
            assert (expected == 0) == (labelled == 0) == (not whole.any())
