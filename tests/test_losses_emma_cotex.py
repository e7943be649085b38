"""The losses of EMMA and masked CoTEX: closed forms, loops, masks, pieces, and 1 to 4 processes."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from losses import expr_loss, js_divergence, js_loss, weighted_au_loss
from processes import in_team

# Positives of the 12 AUs among the 103,316 training frames of s-Aff-Wild2 that have AU labels.
FRAMES = 103_316
POSITIVES = torch.tensor([18713, 8745, 20342, 30605, 41337, 38286, 26783, 2460, 2980, 5003, 70584, 10756.0])
SHARDS = {1: [6], 2: [4, 2], 3: [4, 2, 0], 4: [1, 2, 0, 3]}          # world size -> frames on each rank
PIECES = [1, 2, 5]


def au_batch(B=6):
    """(logits, target, valid, pos_weight): whole rows and single entries without a label."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, 12, generator=generator, dtype=torch.double)
    valid = torch.rand(B, 12, generator=generator) < 0.7
    valid[1::3] = False
    target = (torch.rand(B, 12, generator=generator) < 0.3).double().masked_fill(~valid, -1)
    return logits, target, valid, torch.rand(12, generator=generator, dtype=torch.double) * 9 + 1


def view_batch(B=6, V=2, M=6):
    """(logits of V views, valid)"""
    generator = torch.Generator().manual_seed(0)
    views = [2 * torch.randn(B, M, generator=generator, dtype=torch.double) for _ in range(V)]
    return views, torch.tensor([True, True, False, True, True, True])[:B]


def shares(values):
    """softmax of a list of numbers."""
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


# ---- AUs

def test_each_au_costs_2_ln_2_times_its_share_of_negatives_at_logit_0():
    target = torch.arange(FRAMES)[:, None] < POSITIVES                               # (FRAMES, 12)
    valid, weight = torch.ones_like(target), (FRAMES - POSITIVES) / POSITIVES
    loss = weighted_au_loss(torch.zeros(target.shape), target, valid, weight).item()
    assert loss == pytest.approx(2 * math.log(2) * (1 - POSITIVES / FRAMES).sum().item(), rel=1e-5)
    assert loss == pytest.approx(12.92, abs=0.005)


def test_the_au_loss_is_summed_over_labelled_aus_and_divided_by_the_frames_that_have_any():
    logits, target, valid, weight = au_batch()
    total = 0.0
    for i in range(6):
        for k in range(12):
            if valid[i, k]:
                sigma = 1 / (1 + math.exp(-logits[i, k]))
                y, w = target[i, k].item(), weight[k].item()
                total -= w * y * math.log(sigma) + (1 - y) * math.log(1 - sigma)
    assert valid.any(1).sum() == 4
    assert weighted_au_loss(logits, target, valid, weight).item() == pytest.approx(total / 4, rel=1e-13)


def test_frames_without_au_labels_change_neither_the_loss_nor_the_other_gradients():
    logits, target, valid, weight = au_batch()
    whole, few = logits.clone().requires_grad_(), logits[valid.any(1)].clone().requires_grad_()
    loss = weighted_au_loss(whole, target, valid, weight)
    same = weighted_au_loss(few, target[valid.any(1)], valid[valid.any(1)], weight)
    loss.backward(), same.backward()
    assert loss.item() == pytest.approx(same.item(), rel=1e-14)
    assert torch.allclose(whole.grad[valid.any(1)], few.grad, rtol=1e-13)
    assert not whole.grad[~valid].any() and whole.grad[valid].all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_what_stands_in_invalid_au_entries_changes_nothing(garbage):
    logits, target, valid, weight = au_batch()
    loss = weighted_au_loss(logits, target, valid, weight)
    other = weighted_au_loss(logits.masked_fill(~valid, garbage), target.masked_fill(~valid, garbage), valid,
                             weight)
    assert torch.equal(loss, other)


@pytest.mark.parametrize("B", [6, 0], ids=["no label", "no frame"])
@pytest.mark.parametrize("count", [(), (5,)])
def test_a_batch_without_au_labels_has_loss_0_and_zero_gradients(B, count):
    logits, target, valid, weight = au_batch(B)
    logits = torch.full_like(logits, math.nan).requires_grad_()
    loss = weighted_au_loss(logits, target, torch.zeros_like(valid), weight, *count)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("shape", [(11,), (1,), (), (6, 12)])
def test_weights_that_do_not_fit_the_aus_are_refused(shape):
    logits, target, valid, _ = au_batch()
    message = f"pos_weight {shape} does not fit logits (6, 12); expected a weight for each action unit"
    with pytest.raises(ValueError, match=re.escape(message)):
        weighted_au_loss(logits, target, valid, torch.ones(shape))
    with pytest.raises(ValueError, match="shapes do not fit"):
        weighted_au_loss(logits, target, valid.any(1), torch.ones(12))


# ---- JS

@pytest.mark.parametrize("V", [1, 2, 3])
def test_js_is_the_mean_divergence_of_the_views_from_their_mean(V):
    views, _ = view_batch(V=V)
    for i, got in enumerate(js_divergence(*views).tolist()):
        p = [shares(view[i].tolist()) for view in views]
        m = [sum(column) / V for column in zip(*p)]
        expected = sum(a * math.log(a / b) for row in p for a, b in zip(row, m)) / V
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert (js_divergence(*views) > 0.01).all() == (V > 1)


def test_js_of_two_views_is_the_mean_of_two_kullback_leibler_divergences():
    (z1, z2), _ = view_batch()
    p1, p2 = z1.softmax(-1), z2.softmax(-1)
    m = (p1 + p2) / 2
    kl = [F.kl_div(m.log(), p, reduction="none").sum(-1) for p in (p1, p2)]
    assert torch.allclose(js_divergence(z1, z2), (kl[0] + kl[1]) / 2, rtol=1e-12)


def test_js_is_0_for_equal_views_symmetric_and_deaf_to_what_softmax_does_not_hear():
    (z1, z2), _ = view_batch()
    assert js_divergence(z1, z1).abs().max() < 1e-15
    assert js_divergence(z1, z1 + 5).abs().max() < 1e-14
    assert js_divergence(z1.float(), z1.float()).abs().max() < 1e-6
    assert torch.allclose(js_divergence(z1, z2), js_divergence(z2, z1 - 3), rtol=1e-12)


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("size", [1e2, 1e6, 1e30])
def test_views_that_are_sure_of_different_classes_reach_log_v_with_finite_gradients(V, size):
    views = [(size * F.one_hot(torch.tensor([v]), 6)).requires_grad_() for v in range(V)]
    js = js_divergence(*views)
    js.sum().backward()
    assert js.item() == pytest.approx(math.log(V), rel=1e-6)
    assert all(view.grad.isfinite().all() for view in views)


def test_js_never_exceeds_log_2():
    z = torch.randn(2, 1000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for scale in (0.01, 1, 10, 100):
        js = js_divergence(*(scale * z))
        assert (js > -1e-15).all() and (js < math.log(2) + 1e-12).all()


def test_js_has_the_gradients_of_finite_differences_in_both_views():
    (z1, z2), valid = view_batch()
    z1.requires_grad_(), z2.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: js_loss([a, b], valid), (z1, z2))
    js_loss([z1, z2], valid).backward()
    for z in (z1, z2):
        assert z.grad[valid].all() and not z.grad[~valid].any()


def test_js_loss_is_the_mean_of_the_valid_samples():
    views, valid = view_batch()
    expected = js_divergence(*views)[valid].mean().item()
    assert js_loss(views, valid).item() == pytest.approx(expected, rel=1e-14)
    rubbish = [view.masked_fill(~valid[:, None], math.nan) for view in views]
    assert js_loss(rubbish, valid).item() == pytest.approx(expected, rel=1e-14)
    assert js_loss(views, torch.zeros_like(valid)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_views_give_the_float32_divergence_of_their_values(dtype):
    views = [view.to(dtype) for view in view_batch()[0]]
    js = js_divergence(*views)
    assert js.dtype == torch.float32 and torch.equal(js, js_divergence(*(view.float() for view in views)))


def test_views_that_do_not_fit_are_refused():
    views, valid = view_batch()
    with pytest.raises(ValueError, match=r"views of shapes \[\(6, 6\), \(5, 6\)\]; expected at least one"):
        js_divergence(views[0], views[1][:5])
    with pytest.raises(ValueError, match=r"views of shapes \[\]; expected at least one"):
        js_divergence()
    with pytest.raises(ValueError, match=r"views \[\(6, 6\), \(6, 6\)\], mask \(5,\); expected"):
        js_loss(views, valid[:5])


def test_gradient_descent_makes_two_views_agree():
    views = [view.requires_grad_() for view in view_batch()[0]]
    optimizer = torch.optim.Adam(views, lr=0.1)
    first = js_divergence(*views).mean().item()
    for _ in range(60):
        loss = js_divergence(*views).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 0.1 and loss < 0.01 * first


# ---- Pieces and processes

def three_losses(part, au_count=None, count=None):
    """EMMA's AUs, CoTEX's two cross-entropies and JS, on a part of the batch; -> loss, gradients."""
    logits, target, valid, weight = au_batch()
    (z1, z2), labelled = view_batch()
    classes = torch.arange(6)
    x, a, b = (tensor[part].clone().requires_grad_() for tensor in (logits, z1, z2))
    loss = weighted_au_loss(x, target[part], valid[part], weight, au_count)
    loss = loss + 3 * js_loss([a, b], labelled[part], count)
    loss = loss + sum(expr_loss(z, classes[part], labelled[part], count) for z in (a, b)) / 2
    loss.backward()
    return loss.item(), [x.grad, a.grad, b.grad]


def parts_of(sizes):
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


@pytest.mark.parametrize("pieces", PIECES)
def test_losses_and_gradients_of_pieces_add_up_to_the_whole_batchs(pieces):
    loss, gradients = three_losses(slice(0, 6))
    sizes = [len(part) for part in torch.arange(6).tensor_split(pieces)]
    counts = au_batch()[2].any(1).sum(), view_batch()[1].sum()
    found = [three_losses(part, *counts) for part in parts_of(sizes)]
    assert sum(share for share, _ in found) == pytest.approx(loss, rel=1e-14)
    for i, gradient in enumerate(gradients):
        assert torch.allclose(torch.cat([g[i] for _, g in found]), gradient, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_loss_and_gradients_are_those_of_one_process_with_the_whole_batch(world):
    loss, gradients = three_losses(slice(0, 6))
    parts = parts_of(SHARDS[world])
    codes, results = in_team(world, lambda team: three_losses(parts[team.rank]))
    assert codes == [0] * world
    for part, (got, found) in zip(parts, results):
        assert got == pytest.approx(loss, rel=1e-13)
        for ours, whole in zip(found, gradients):
            assert torch.allclose(ours, whole[part], rtol=1e-12, atol=1e-16)
