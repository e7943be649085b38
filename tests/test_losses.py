"""The three task losses in one process: closed forms, loops, masks that hide NaN, gradients, and pieces of
a batch."""

import math
import re
import statistics

import pytest
import torch
from torch.nn import functional as F

import losses
from distributed import all_sum
from labels import TASKS
from losses import au_loss, ccc_loss, expr_loss

WIDTH = {"va": 2, "expr": 8, "au": 12}                               # the prediction's last dimension


def batch(task, B=3, T=7, dtype=torch.double):
    """(prediction, target, valid) with about two thirds valid and the real data sets' codes where they are
    not."""
    generator = torch.Generator().manual_seed(0)
    K = WIDTH[task]
    pred = torch.randn(B, T, K, generator=generator, dtype=dtype)
    if task == "expr":
        target = torch.randint(8, (B, T), generator=generator)
        valid = torch.rand(B, T, generator=generator) < 0.65
        return pred, target.masked_fill(~valid, -1), valid
    valid = torch.rand(B, T, K, generator=generator) < 0.65
    if task == "va":
        target = torch.rand(B, T, 2, generator=generator, dtype=dtype) * 2 - 1
        return pred, target.masked_fill(~valid, -5), valid
    target = (torch.rand(B, T, 12, generator=generator) < 0.3).to(dtype)
    return pred, target.masked_fill(~valid, -1), valid


def loss_and_gradient(task, pred, target, valid, *more):
    pred = pred.clone().requires_grad_()
    loss = getattr(losses, TASKS[task].loss)(pred, target, valid, *more)
    loss.backward()
    return loss.detach(), pred.grad


def everywhere(x):
    return torch.ones(x.shape, dtype=torch.bool)


# ---- VA: 1 - CCC

def ccc_of(x, y):
    """ccc_loss of one pair of lists; the second dimension is a perfect prediction, which adds 0."""
    x, y = torch.tensor(x, dtype=torch.double), torch.tensor(y, dtype=torch.double)
    t = torch.linspace(-1, 1, len(x), dtype=torch.double)
    pred, target = torch.stack([x, t], -1), torch.stack([y, t], -1)
    return 1 - ccc_loss(pred, target, everywhere(pred)).item()


@pytest.mark.parametrize("x, y, ccc", [
    ([1, 2, 3], [1, 2, 3], 1), ([-1, 0, 1], [1, 0, -1], -1),
    ([1, 2, 3], [2, 4, 6], 4 / 11), ([.01, .02, .03], [.02, .04, .06], 4 / 11), ([1, 2, 3], [2, 3, 4], 4 / 7),
    ([0, 0, 1, 1], [0, 1, 0, 1], 0), ([0, 1], [0, 3], 3 / 7), ([5, 5, 5], [1, 2, 3], 0)])
def test_ccc_of_known_pairs(x, y, ccc):
    assert ccc_of(x, y) == pytest.approx(ccc, abs=1e-14)
    assert ccc_of(y, x) == pytest.approx(ccc, abs=1e-14)             # symmetric


@pytest.mark.parametrize("a, b", [(0, 1), (0, -1), (0.3, 1), (0, 0.5), (-2, 3), (1, -0.2)])
def test_ccc_of_a_line_has_a_closed_form(a, b):
    torch.manual_seed(0)
    y = torch.randn(50, dtype=torch.double)
    mean, variance = y.mean().item(), y.var(correction=0).item()
    expected = 2 * b * variance / ((1 + b ** 2) * variance + (a + (b - 1) * mean) ** 2)
    assert ccc_of((a + b * y).tolist(), y.tolist()) == pytest.approx(expected, abs=1e-13)


def test_va_loss_is_the_sum_of_one_minus_ccc_over_valence_and_arousal_each_over_its_own_valid_frames():
    pred, target, valid = batch("va")
    expected = 0.0
    for k in range(2):
        x, y = pred[..., k][valid[..., k]].tolist(), target[..., k][valid[..., k]].tolist()
        mx, my = statistics.fmean(x), statistics.fmean(y)
        cov = statistics.fmean((p - mx) * (q - my) for p, q in zip(x, y))
        expected += 1 - 2 * cov / (statistics.pvariance(x) + statistics.pvariance(y) + (mx - my) ** 2)
    assert not torch.equal(valid[..., 0], valid[..., 1])
    assert ccc_loss(pred, target, valid).item() == pytest.approx(expected, rel=1e-13)


def test_repeating_every_frame_leaves_the_ccc_loss_as_it_is():
    once = batch("va")
    thrice = [torch.cat([x] * 3) for x in once]
    assert ccc_loss(*thrice).item() == pytest.approx(ccc_loss(*once).item(), rel=1e-13)


def test_the_ccc_loss_does_not_mind_how_frames_are_divided_into_segments():
    whole = batch("va")
    flat = [x.flatten(0, 1) for x in whole]
    assert ccc_loss(*flat).item() == pytest.approx(ccc_loss(*whole).item(), rel=1e-13)


def test_the_ccc_loss_of_a_batch_is_not_the_mean_of_its_parts():
    whole = batch("va")
    parts = [ccc_loss(*(x[b] for x in whole)).item() for b in range(3)]
    assert abs(sum(parts) / 3 - ccc_loss(*whole).item()) > 0.01


def test_the_ccc_loss_lies_between_0_and_4():
    torch.manual_seed(0)
    y = torch.randn(2, 30, 2, dtype=torch.double)
    y -= y.mean(dim=(0, 1))
    assert ccc_loss(y, y, everywhere(y)).item() == pytest.approx(0, abs=1e-14)
    assert ccc_loss(-y, y, everywhere(y)).item() == pytest.approx(4)


def test_ccc_is_accurate_in_float32_far_from_zero():
    torch.manual_seed(0)
    x, y = 1000 + torch.randn(2, 4, 300, 2)
    exact = ccc_loss(x.double(), y.double(), everywhere(x)).item()
    assert ccc_loss(x, y, everywhere(x)).item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("valence, arousal", [(0, 7), (7, 0), (1, 7), (0, 0)])
def test_a_dimension_with_no_valid_frame_counts_nothing(valence, arousal):
    pred, target, _ = batch("va", B=1)
    valid = torch.arange(7)[None, :, None] < torch.tensor([valence, arousal])
    loss, gradient = loss_and_gradient("va", pred, target, valid)
    alone = 0.0
    for k in range(2):
        if valid[..., k].any():
            alone += ccc_loss(*(x[..., k:k + 1] for x in (pred, target, valid))).item()
    assert loss.item() == pytest.approx(alone, rel=1e-14)
    assert not gradient[~valid].any() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.double], ids=str)
@pytest.mark.parametrize("p, y", [(0.3, None), (None, -0.7), (0.3, -0.7), (0.25, 0.25)],
                         ids=["prediction", "target", "both", "both, the same"])
def test_what_does_not_vary_has_ccc_0_and_a_finite_gradient(p, y, dtype):
    pred, target, valid = batch("va", B=10, T=30, dtype=dtype)
    pred, target = (x if c is None else torch.full_like(x, c) for x, c in ((pred, p), (target, y)))
    loss, gradient = loss_and_gradient("va", pred, target, valid)
    assert loss.item() == pytest.approx(2, abs=1e-5)
    assert gradient.isfinite().all() and gradient.abs().sum() < 10


def test_the_same_constant_twice_has_a_small_gradient_whatever_the_constant():
    for constant in (0.1, 0.2, 0.3, 0.6, 0.7, 0.9):
        pred = torch.full((1, 300, 2), constant)
        _, gradient = loss_and_gradient("va", pred, pred.clone(), everywhere(pred))
        assert gradient.abs().sum() < 10


# ---- Expr and AU: cross-entropies

def test_cross_entropy_by_hand():
    log3 = math.log(3)
    logits = torch.tensor([[[0, log3], [0, log3], [9, 9]]], dtype=torch.double)          # 1/4 and 3/4, twice
    target, valid = torch.tensor([[0, 1, -1]]), torch.tensor([[True, True, False]])
    expected = (math.log(4) + math.log(4 / 3)) / 2
    assert expr_loss(logits, target, valid).item() == pytest.approx(expected, rel=1e-14)


def test_binary_cross_entropy_by_hand():
    log3 = math.log(3)
    logits = torch.tensor([[[0, log3, log3, 9]]], dtype=torch.double)                    # 1/2, 3/4, 3/4
    target, valid = torch.tensor([[[1.0, 1, 0, -1]]]), torch.tensor([[[True, True, True, False]]])
    expected = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert au_loss(logits, target, valid).item() == pytest.approx(expected, rel=1e-14)


def test_expr_loss_is_torchs_cross_entropy_of_the_valid_frames():
    logits, target, valid = batch("expr")
    expected = F.cross_entropy(logits[valid], target[valid]).item()
    assert expr_loss(logits, target, valid).item() == pytest.approx(expected, rel=1e-14)
    assert expr_loss(torch.zeros_like(logits), target, valid).item() == pytest.approx(math.log(8), rel=1e-14)


def test_au_loss_is_the_mean_over_valid_entries_in_a_loop():
    logits, target, valid = batch("au")
    terms = []
    for x, y in zip(logits[valid].tolist(), target[valid].tolist()):
        sigma = 1 / (1 + math.exp(-x))
        terms.append(-(y * math.log(sigma) + (1 - y) * math.log(1 - sigma)))             # eq. 4
    assert au_loss(logits, target, valid).item() == pytest.approx(sum(terms) / len(terms), rel=1e-13)
    assert au_loss(torch.zeros_like(logits), target, valid).item() == pytest.approx(math.log(2), rel=1e-14)


def test_a_frame_with_eleven_labelled_action_units_trains_eleven_outputs():
    logits, target, valid = batch("au")
    valid = everywhere(valid)
    valid[1, 3, 5] = False
    _, gradient = loss_and_gradient("au", logits, target.clamp(min=0), valid)
    assert (gradient != 0).sum() == 3 * 7 * 12 - 1 and gradient[1, 3, 5] == 0


@pytest.mark.parametrize("task", ["expr", "au"])
def test_huge_logits_keep_the_loss_and_gradient_finite(task):
    logits, target, valid = batch(task, dtype=torch.float32)
    loss, gradient = loss_and_gradient(task, 1e30 * logits, target, valid)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("task", ["expr", "au"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_losses_and_gradients_of_pieces_add_up_to_the_whole_batchs(task, pieces):
    whole = batch(task)
    loss, gradient = loss_and_gradient(task, *whole)
    count = whole[2].sum()
    parts = [loss_and_gradient(task, *part, count) for part in zip(*(x.tensor_split(pieces) for x in whole))]
    assert sum(part for part, _ in parts).item() == pytest.approx(loss.item(), rel=1e-14)
    assert torch.allclose(torch.cat([part for _, part in parts]), gradient, rtol=1e-13, atol=0)


# ---- All three

@pytest.mark.parametrize("task", TASKS)
def test_gradients_are_those_of_finite_differences(task):
    pred, target, valid = batch(task, B=2, T=4)
    loss = getattr(losses, TASKS[task].loss)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, valid), pred.requires_grad_())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_what_stands_in_invalid_entries_changes_nothing_and_gets_no_gradient(task, garbage):
    pred, target, valid = batch(task)
    loss, gradient = loss_and_gradient(task, pred, target, valid)
    mask = valid[..., None].expand_as(pred) if task == "expr" else valid
    rubbish = target.masked_fill(~valid, 99) if task == "expr" else target.masked_fill(~valid, garbage)
    other_loss, other_gradient = loss_and_gradient(task, pred.masked_fill(~mask, garbage), rubbish, valid)
    assert torch.equal(loss, other_loss) and torch.equal(gradient, other_gradient)
    assert not gradient[~mask].any() and gradient[mask].all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("B", [3, 0], ids=["all masked", "empty batch"])
def test_nothing_valid_gives_exactly_zero_and_zero_gradients(task, B):
    pred, target, valid = batch(task, B=B)
    pred = torch.full_like(pred, math.nan)
    more = [()] if task == "va" else [(), (5,)]
    for count in more:
        loss, gradient = loss_and_gradient(task, pred, target, torch.zeros_like(valid), *count)
        assert loss == 0 and gradient.shape == pred.shape and not gradient.any()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_predictions_give_the_float32_loss_of_their_values(task, dtype):
    pred, target, valid = batch(task, B=40, T=300, dtype=torch.float32)
    loss, gradient = loss_and_gradient(task, pred.to(dtype), target, valid)
    exact, exact_gradient = loss_and_gradient(task, pred.to(dtype).float(), target, valid)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)
    assert gradient.dtype == dtype and torch.equal(gradient, exact_gradient.to(dtype))


@pytest.mark.parametrize("task", TASKS)
def test_integer_and_double_targets_do_not_change_the_precision_of_the_loss(task):
    pred, target, valid = batch(task, dtype=torch.float32)
    loss = getattr(losses, TASKS[task].loss)
    assert loss(pred, target.double(), valid).dtype == torch.float32
    assert torch.equal(loss(pred, target.long(), valid), loss(pred, target.long().float(), valid))


@pytest.mark.parametrize("task, pred, target, valid, expected", [
    ("va", (2, 5, 2), (2, 5), (2, 5), (2, 5, 2)), ("va", (2, 5, 2), (2, 5, 2), (2, 5), (2, 5, 2)),
    ("va", (2, 5, 2), (2, 5, 1), (2, 5, 1), (2, 5, 2)), ("au", (2, 5, 12), (2, 5, 12), (2, 5, 1), (2, 5, 12)),
    ("au", (2, 5, 12), (5, 2, 12), (5, 2, 12), (2, 5, 12)), ("expr", (2, 5, 8), (2, 5, 8), (2, 5, 8), (2, 5)),
    ("expr", (2, 5, 8), (2, 5), (5,), (2, 5)), ("expr", (2, 5, 8), (10,), (10,), (2, 5))])
def test_shapes_that_do_not_fit_are_refused_with_all_three(task, pred, target, valid, expected):
    message = f"prediction {pred}, target {target}, mask {valid}; target and mask must be {expected}"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss = getattr(losses, TASKS[task].loss)
        loss(torch.zeros(pred), torch.zeros(target), torch.ones(valid, dtype=torch.bool))


def test_in_a_single_process_the_sum_over_processes_is_the_thing_itself():
    x = torch.randn(3)
    assert all_sum(x) is x


# ---- Learning

@pytest.mark.parametrize("task, goal", [("va", 0.02), ("expr", 0.05), ("au", 0.05)])
def test_gradient_descent_reaches_a_perfect_prediction(task, goal):
    torch.manual_seed(0)
    _, target, valid = batch(task)
    pred = (0.1 * torch.randn(3, 7, WIDTH[task], dtype=torch.double)).requires_grad_()
    optimizer = torch.optim.Adam([pred], lr=0.05)
    for _ in range(150):
        loss = getattr(losses, TASKS[task].loss)(pred, target, valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < goal
    if task == "va":
        # Not only correlated: of the same scale and mean.
        assert (pred - target)[valid].abs().mean() < 0.05
