"""EMMA: the network against a forward pass written out, its losses against sums, its score against the
metrics called alone; what gets a gradient, and what never moves."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metrics
from dan import DAN
from emma import EMMA, by_task, count, emma_losses, score, split_outputs
from labels import AU, EXPR
from losses import ccc_loss, expr_loss, weighted_au_loss
from processes import ALONE, in_team
from s_aff_wild2 import pos_weight
from test_s_aff_wild2 import POSITIVES
from vit import VisionTransformer

FRAMES = 103_316              # with AU labels, in the training file of s-Aff-Wild2
SIZE, D = 32, 16
WEIGHT = torch.linspace(0.5, 9, 12, dtype=torch.double)
SHARDS = {1: [8], 2: [5, 3], 3: [4, 4, 0], 4: [1, 3, 0, 4]}          # world size -> images on each rank


def tiny(cnn=True, **settings):
    """In double precision, its BatchNorm statistics and weights all random."""
    torch.manual_seed(0)
    vit = VisionTransformer(SIZE, patch=16, dim=D, depth=2, heads=2, **settings)
    model = EMMA(vit, DAN(width=2) if cnn else None, hidden=12, va_hidden=10).double()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name != "vit.pos_embed":
            noise = torch.randn(value.shape, dtype=torch.double)
            value.copy_(noise.abs() + 0.5 if "running_var" in name else value + 0.2 * noise)
    return model


def pictures(B=8):
    return torch.randn(B, 3, SIZE, SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def batch(B=8, missing=()):
    """Labels (B, 15), each kind missing in some rows; those of the tasks in `missing` in all."""
    generator = torch.Generator().manual_seed(2)
    va = torch.rand(B, 2, generator=generator, dtype=torch.double) * 2 - 1
    expr = torch.randint(8, (B, 1), generator=generator).double()
    au = (torch.rand(B, 12, generator=generator) < 0.4).double()
    va[[1, 2]], va[3, 0], expr[[2, 5]], au[[4, 2]], au[6, 3:9] = -5, -5, -1, -1, -1
    if "va" in missing:
        va[:] = -5
    if "expr" in missing:
        expr[:] = -1
    if "au" in missing:
        au[:] = -1
    return torch.cat([va, expr, au], dim=1)


def outputs_of(B=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(B, 22, dtype=torch.double, generator=generator).requires_grad_()


# ---- The network

def parameters(part):
    return sum(p.numel() for p in part.parameters())


def test_the_network_has_the_parameters_of_the_authors_and_trains_all_but_the_cnns():
    with torch.device("meta"):
        model, without = EMMA(VisionTransformer(), DAN()), EMMA(VisionTransformer(), None)
    assert parameters(model.vit) == 85_798_656 and parameters(model.cnn) == 19_724_248
    assert parameters(model.head) == parameters(without.head) == 768 * 512 + 512 + 512 * 20 + 20 == 403_988
    assert parameters(model.va_head) == 28 * 256 + 256 + 256 * 2 + 2 == 7_938
    assert parameters(without.va_head) == 20 * 256 + 256 + 256 * 2 + 2 and without.cnn is None
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vit.pos_embed", *(f"cnn.{name}" for name, _ in DAN(width=2).named_parameters())}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("cnn", [True, False], ids=["with the CNN", "without"])
def test_the_forward_pass_is_the_one_written_out(cnn, training):
    model, images = tiny(cnn), pictures(3)
    w = model.state_dict()
    reference = DAN(width=2).double().eval()
    z = model.vit.eval()(images)[:, 0]                                       # its last LayerNorm included
    last = w["vit.norm.weight"], w["vit.norm.bias"]
    assert torch.allclose(((z - last[1]) / last[0]).mean(1), torch.zeros(3, dtype=torch.double), atol=1e-12)
    s = F.linear(z, w["head.0.weight"], w["head.0.bias"]).clamp(min=0)
    s = F.linear(s, w["head.2.weight"], w["head.2.bias"])
    seen = s
    if cnn:
        reference.load_state_dict({name.removeprefix("cnn."): v for name, v in w.items() if "cnn." in name})
        seen = torch.cat([reference(images), s[:, :8], s[:, 8:]], dim=1)
    v = F.linear(seen, w["va_head.0.weight"], w["va_head.0.bias"]).clamp(min=0)
    v = F.linear(v, w["va_head.2.weight"], w["va_head.2.bias"])
    got = model.train(training)(images)
    assert got.shape == (3, 22) and torch.allclose(got, torch.cat([v, s], dim=1), rtol=1e-10, atol=1e-12)
    va, expr, au = split_outputs(got)
    assert torch.equal(va, got[:, :2]) and torch.equal(expr, got[:, 2:10]) and torch.equal(au, got[:, 10:])


def test_each_image_has_its_own_outputs_and_a_batch_of_none_has_none():
    model, images = tiny(), pictures()
    whole = model(images)
    for i in (0, 5):
        assert torch.allclose(model(images[i:i + 1])[0], whole[i], rtol=1e-9, atol=1e-11)
    empty = model(images[:0])
    emma_losses(empty, batch()[:0], WEIGHT).sum().backward()
    assert empty.shape == (0, 22) and not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", [True, False, "parent"])
def test_the_cnn_stays_in_evaluation_and_its_statistics_never_move(mode):
    model = tiny()
    before = {name: value.clone() for name, value in model.cnn.state_dict().items()}
    if mode == "parent":
        parent = nn.Sequential(model)
        parent.eval()
        parent.train()
    else:
        model.train(mode)
    assert not any(part.training for part in model.cnn.modules())
    assert model.vit.blocks[0].training == model.head.training == bool(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        emma_losses(model(pictures()), batch(), WEIGHT).sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.cnn.state_dict().items())
    assert all(p.grad is None for p in model.cnn.parameters())


def test_a_cnn_that_was_being_trained_is_frozen_when_it_is_given():
    cnn = DAN(width=2).train()
    EMMA(VisionTransformer(SIZE, dim=D, depth=1, heads=2), cnn)
    assert not cnn.training and not any(p.requires_grad for p in cnn.parameters())


def test_a_loop_that_unfreezes_everything_still_gives_the_cnn_no_gradient():
    model, images = tiny().requires_grad_(True), pictures().requires_grad_()
    emma_losses(model(images), batch(), WEIGHT).sum().backward()
    assert all(p.grad is None for p in model.cnn.parameters()) and images.grad.any()


def test_any_network_that_gives_eight_scores_will_do_and_its_scores_reach_valence_and_arousal_alone():
    class Level(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))[:, None] * torch.arange(8.0)
    model = EMMA(VisionTransformer(SIZE, dim=D, depth=1, heads=2), Level()).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    before = model(images)
    model.cnn.forward = lambda images: torch.full((len(images), 8), 3.0)
    after = model(images)
    assert torch.equal(before[:, 2:], after[:, 2:]) and (before[:, :2] != after[:, :2]).all()


@pytest.mark.parametrize("classes", [7, 9, 1])
def test_a_cnn_of_another_number_of_classes_is_refused(classes):
    model = EMMA(VisionTransformer(SIZE, dim=D, depth=1, heads=2), DAN(classes, width=2))
    message = f"the CNN gives scores (2, {classes}), expected (2, 8): a score for each of Neutral, Anger, Dis"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.randn(2, 3, SIZE, SIZE))


# ---- Gradients

def test_the_gradient_of_valence_and_arousal_reaches_the_vit_through_its_scores_and_never_the_cnn():
    model = tiny()
    images = pictures()
    emma_losses(model(images), batch(missing=("expr", "au")), WEIGHT).sum().backward()
    for name, p in model.named_parameters():
        if name.startswith("cnn.") or name == "vit.pos_embed":
            assert p.grad is None
        else:
            assert p.grad.norm() > 1e-8, name


def test_the_gradient_of_each_score_from_valence_and_arousal_is_the_chain_rule():
    """dL/ds = W3ᵀ (1[W3 [c | s] + b3 > 0] · W4ᵀ dL/dv), the columns of s."""
    model, images = tiny().eval(), pictures()
    target, valid = batch()[:, :2], batch()[:, :2] != -5
    s = model.head(model.vit.features(images, "cls")).detach().requires_grad_()
    model.head.forward = lambda z: s
    outputs = model(images)
    ccc_loss(outputs[:, :2], target, valid).backward()
    W3, b3, W4 = (model.state_dict()[f"va_head.{name}"] for name in ("0.weight", "0.bias", "2.weight"))
    v = outputs[:, :2].detach().requires_grad_()
    ccc_loss(v, target, valid).backward()
    hidden = torch.cat([model.cnn(images), s], dim=1).detach() @ W3.T + b3
    expected = (v.grad @ W4 * (hidden > 0)) @ W3                             # (8, 28)
    assert torch.allclose(s.grad, expected[:, 8:], rtol=1e-9, atol=1e-14) and s.grad.any(dim=0).all()


def test_the_scores_of_expressions_and_aus_give_the_va_head_no_gradient():
    model = tiny()
    emma_losses(model(pictures()), batch(missing=("va",)), WEIGHT).sum().backward()
    assert not any(p.grad.any() for p in model.va_head.parameters())
    assert all(p.grad.any() for p in model.head.parameters())


def test_missing_labels_have_exactly_zero_gradient_and_what_the_network_says_there_changes_nothing():
    outputs, labels = outputs_of(), batch()
    losses = emma_losses(outputs, labels, WEIGHT)
    losses.sum().backward()
    va, expr, au = split_outputs(outputs.grad)
    assert not va[labels[:, :2] == -5].any() and va[labels[:, :2] != -5].all()
    assert not expr[labels[:, 2] == -1].any() and expr[labels[:, 2] != -1].all()
    assert not au[labels[:, 3:] == -1].any() and au[labels[:, 3:] != -1].all()
    no_class = (labels[:, 2:3] == -1).expand(-1, 8)
    missing = torch.cat([labels[:, :2] == -5, no_class, labels[:, 3:] == -1], dim=1)
    for rubbish in (math.nan, math.inf, 1e30):
        assert torch.equal(emma_losses(outputs.masked_fill(missing, rubbish), labels, WEIGHT), losses)


# ---- The losses

def by_loops(outputs, labels):
    """The three terms with plain numbers."""
    terms, rows = [0.0, 0.0, 0.0], list(zip(outputs.tolist(), labels.tolist()))
    for d in (0, 1):
        x, y = zip(*[(row[d], label[d]) for row, label in rows if label[d] != -5])
        terms[0] += 1 - metrics.ccc(x, y)
    classes = [(row[2:10], int(label[2])) for row, label in rows if label[2] != -1]
    for logits, y in classes:
        terms[1] -= math.log(math.exp(logits[y]) / sum(map(math.exp, logits))) / len(classes)
    frames = [(row[10:], label[3:]) for row, label in rows if set(label[3:]) != {-1}]
    for logits, y in frames:
        for x, k, w in zip(logits, y, WEIGHT.tolist()):
            p = 1 / (1 + math.exp(-x))
            terms[2] -= {1: w * math.log(p), 0: math.log(1 - p), -1: 0}[k] / len(frames)
    return terms


def test_the_losses_are_three_sums_over_the_labels_that_are_there():
    outputs, labels = outputs_of(), batch()
    losses = emma_losses(outputs, labels, WEIGHT)
    assert losses.tolist() == pytest.approx(by_loops(outputs, labels), rel=1e-12)
    assert losses.tolist() == pytest.approx(
        [ccc_loss(outputs[:, :2], labels[:, :2], labels[:, :2] != -5).item(),
         expr_loss(outputs[:, 2:10], labels[:, 2], labels[:, 2] >= 0).item(),
         weighted_au_loss(outputs[:, 10:], labels[:, 3:], labels[:, 3:] >= 0, WEIGHT).item()], rel=1e-14)


def test_every_output_has_the_gradient_of_finite_differences():
    assert torch.autograd.gradcheck(lambda x: emma_losses(x, batch(), WEIGHT), outputs_of())


@pytest.mark.parametrize("missing", [("va",), ("expr",), ("au",), ("va", "au"),
                                     ("va", "expr", "au")], ids=str)
def test_a_term_without_any_label_in_the_batch_is_0_and_leaves_the_others_as_they_are(missing):
    outputs, whole = outputs_of(), emma_losses(outputs_of(), batch(), WEIGHT)
    losses = emma_losses(outputs, batch(missing=missing), WEIGHT)
    losses.sum().backward()
    for task, loss, other, grad in zip(("va", "expr", "au"), losses, whole, split_outputs(outputs.grad)):
        assert loss == (0 if task in missing else other) and bool(grad.any()) == (task not in missing)
    assert outputs.grad.isfinite().all()


def test_the_loss_of_outputs_that_are_all_0_is_2_plus_log_8_plus_12_92_with_the_counts_of_a_complete_copy():
    labels = torch.full((FRAMES, 15), -1.0)
    labels[:, 3:] = (torch.arange(FRAMES)[:, None] < torch.tensor(POSITIVES)).float()
    labels[:, :2], labels[:, 2] = torch.rand(FRAMES, 2), torch.arange(FRAMES) % 8
    va, expr, au = emma_losses(torch.zeros(FRAMES, 22), labels, pos_weight(labels.numpy())).tolist()
    assert va == pytest.approx(2, abs=1e-6) and expr == pytest.approx(math.log(8), rel=1e-5)
    assert au == pytest.approx(2 * math.log(2) * sum(1 - n / FRAMES for n in POSITIVES), rel=1e-5)
    assert au == pytest.approx(12.92, abs=0.005)


@pytest.mark.parametrize("outputs, labels", [((4, 20), (4, 15)), ((4, 22), (4, 14)), ((4, 22), (3, 15)),
                                             ((4, 22), (4, 22)), ((4, 3, 22), (4, 3, 15))], ids=str)
def test_shapes_that_do_not_fit_are_refused(outputs, labels):
    message = f"outputs {outputs}, labels {labels}; expected (B, 22) and (B, 15)"
    with pytest.raises(ValueError, match=re.escape(message)):
        emma_losses(torch.zeros(outputs), torch.zeros(labels), torch.ones(12))
    with pytest.raises(ValueError, match=re.escape(message)):
        count(np.zeros(outputs), np.zeros(labels))


def step(part, labels, team=ALONE):
    """A training step on a part of eight images. -> the three terms, gradients, BatchNorm's statistics"""
    model = tiny()
    ddp = team.parallel(model)
    losses = emma_losses(ddp(pictures()[part]), labels[part], WEIGHT)
    losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses.tolist(), gradients, dict(model.named_buffers())


def steps(team=ALONE, world=1):
    """With labels of all tasks, and without those of two, on this process's images."""
    ends = np.cumsum([0, *SHARDS[world]])
    part = slice(ends[team.rank], ends[team.rank + 1])
    return [step(part, batch(missing=missing), team) for missing in ((), ("va", "au"))]


@pytest.fixture(scope="module")
def alone():
    return steps()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_step_over_processes_is_that_of_one_with_the_whole_batch(alone, world):
    codes, results = in_team(world, lambda team: steps(team, world))
    assert codes == [0] * world
    for result in results:
        for (losses, gradients, buffers), (got, found, kept) in zip(alone, result):
            assert got == pytest.approx(losses, rel=1e-10)
            for name, whole in gradients.items():
                assert torch.allclose(found[name], whole, rtol=1e-7, atol=1e-10), name
            assert all(torch.equal(kept[name], value) for name, value in buffers.items())


# ---- The score

def answers(N=400):
    """Outputs and labels as arrays, each kind of label missing in a tenth of the frames."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.uniform(-1, 1, (N, 2)), rng.integers(8, size=(N, 1)),
                             rng.random((N, 12)) < 0.3], axis=1)
    outputs = rng.normal(size=(N, 22))
    outputs[:, :2] += labels[:, :2]
    labels[:, :2][rng.random((N, 2)) < 0.1] = -5
    labels[:, 2:][rng.random((N, 13)) < 0.1] = -1
    return outputs, labels


@pytest.mark.parametrize("thresholds", [0.5, 0.3, np.linspace(0.2, 0.8, 12)],
                         ids=["0.5", "0.3", "each its own"])
def test_the_three_parts_are_the_metrics_called_alone(thresholds):
    outputs, labels = answers()
    va = [metrics.ccc(outputs[:, d][labels[:, d] != -5], labels[:, d][labels[:, d] != -5]) for d in (0, 1)]
    known = labels[:, 2] != -1
    expr = metrics.class_f1(outputs[known, 2:10].argmax(1), labels[known, 2])
    said = 1 / (1 + np.exp(-outputs[:, 10:])) > thresholds                   # probabilities, not logits
    aus = metrics.binary_f1(said, labels[:, 3:])
    got = score(count(outputs, labels, thresholds))
    assert got == pytest.approx([np.mean(va), expr.mean(), aus.mean()], rel=1e-12)


def test_sums_of_batches_add_up_to_those_of_all_frames_in_any_order():
    outputs, labels = answers()
    whole = count(outputs, labels)
    parts = [count(outputs[i:j], labels[i:j]) for i, j in ((399, 400), (0, 100), (100, 100), (100, 399))]
    assert whole.shape == (124,) and np.allclose(sum(parts), whole, rtol=1e-12)
    assert {name: part.shape for name, part in by_task(whole).items()} == {
        "va": (2, 6), "expr": (8, 8), "au": (12, 4)}
    sums = by_task(whole)
    assert (sums["va"][:, 0] == (labels[:, :2] != -5).sum(0)).all()
    assert (sums["expr"].sum(1) == [(labels[:, 2] == k).sum() for k in range(8)]).all()
    assert (AU.metric.labelled(sums["au"])[:, 0] == (labels[:, 3:] == 1).sum(0)).all()


@pytest.mark.parametrize("thresholds", [0.5, 0.9, 0.01])
def test_a_perfect_prediction_scores_3_and_a_constant_what_chance_says(thresholds):
    _, labels = answers()
    classes = np.eye(8)[labels[:, 2].astype(int)]
    perfect = np.concatenate([labels[:, :2], classes, np.where(labels[:, 3:] == 1, 9, -9)], axis=1)
    parts = score(count(perfect, labels, thresholds))
    assert parts.tolist() == pytest.approx([1, 1, 1]) and parts.sum() == pytest.approx(3)
    constant = np.zeros_like(perfect)
    constant[:, 2 + np.bincount(labels[labels[:, 2] >= 0, 2].astype(int)).argmax()] = 1
    constant[:, 10:] = 9
    sums = count(constant, labels, thresholds)
    assert score(sums) == pytest.approx([0, EXPR.metric.chance(by_task(sums)["expr"]).mean(),
                                         AU.metric.chance(by_task(sums)["au"]).mean()])


def test_an_au_at_its_threshold_is_absent_and_thresholds_are_probabilities():
    labels = np.concatenate([np.full((2, 3), [-5, -5, -1]), np.ones((2, 12))], axis=1)
    outputs = np.zeros((2, 22))
    outputs[1, 10:] = 0.8                                                    # σ(0.8) = 0.69
    present = {t: by_task(count(outputs, labels, t))["au"][:, 3].tolist() for t in (0.49, 0.5, 0.68, 0.7)}
    assert present == {0.49: [2] * 12, 0.5: [1] * 12, 0.68: [1] * 12, 0.7: [0] * 12}


@pytest.mark.parametrize("thresholds", [0, 1, -0.1, math.nan, [0.5] * 11, [0.5] * 11 + [1.0],
                                        [[0.5] * 12]], ids=str)
def test_thresholds_that_are_no_probabilities_are_refused(thresholds):
    with pytest.raises(ValueError, match="expected one probability between 0 and 1, or one for each of 12"):
        count(*answers(), thresholds)


def test_outputs_that_are_not_finite_are_not_scored():
    outputs, labels = answers()
    outputs[7, 15] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        count(outputs, labels)


# ---- Learning

def test_a_handful_of_images_with_partial_labels_is_learned_by_heart():
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, SIZE, SIZE), batch().float()
    model = EMMA(VisionTransformer(SIZE, patch=16, dim=32, depth=2, heads=2, drop_path=0.1), DAN(width=2))
    weight = pos_weight(labels.numpy())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    first = score(count(model(images).detach().numpy(), labels.numpy()))
    for _ in range(60):
        losses = emma_losses(model(images), labels, weight)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    ccc, expr, au = score(count(model.eval()(images).detach().numpy(), labels.numpy()))
    classes = len(set(labels[:, 2].tolist()) - {-1})
    units = int((labels[:, 3:] == 1).any(dim=0).sum())                       # F1 is 0 where one never occurs
    assert first.sum() < 0.8 and ccc > 0.95 and (expr, au) == pytest.approx((classes / 8, units / 12))
