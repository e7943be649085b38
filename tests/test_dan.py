"""DAN's parts against sums written out, its losses against loops over plain numbers, and what it learns."""

import math
import re
import statistics

import pytest
import torch
from torch.nn import functional as F

from cnn import Trunk
from dan import DAN, ChannelAttention, DANWithCentres, SpatialAttention, affinity_loss, partition_loss
from labels import EXPRESSIONS
from losses import expr_loss
from plain_cnn import random_weights
from processes import ALONE, in_team

D = 16


def filled(model, seed=0):
    """Double precision with random values everywhere; -> model, its names and tensors."""
    weights = random_weights({name: tuple(v.shape) for name, v in model.state_dict().items()}, seed)
    model.double().load_state_dict(weights)
    return model, weights


def normal(weights, name, values, training):
    """BatchNorm of one channel by its definition; `values` are those of the whole batch."""
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    if training:
        mean, variance = values.mean(), values.var(correction=0)
    return (values - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def each_channel(weights, name, x, training):
    """`normal` for each channel of (B, C, ...)."""
    channels = []
    for c in range(x.shape[1]):
        one = {key: value[c] for key, value in weights.items() if key.startswith(name) and value.ndim}
        channels.append(normal(one, name, x[:, c], training))
    return torch.stack(channels, dim=1)


def convolution(x, weight, bias):
    """Sum over the kernel's places of one matrix product each, on an image with zeros around."""
    rows, columns = weight.shape[2:]
    up, left = rows // 2, columns // 2
    B, C, h, w = x.shape
    wide = torch.zeros(B, C, h + rows - 1, w + columns - 1, dtype=x.dtype)
    wide[:, :, up:up + h, left:left + w] = x
    y = bias[None, :, None, None].expand(B, -1, h, w)
    for i in range(rows):
        for j in range(columns):
            y = y + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], wide[:, :, i:i + h, j:j + w])
    return y


# ---- Parts

@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_spatial_attention_is_the_map_times_the_sum_of_three_convolutions_of_a_narrower_map(training):
    torch.manual_seed(0)
    part, w = filled(SpatialAttention(D).train(training))
    x = torch.randn(3, D, 2, 3, dtype=torch.double)

    def conv_bn(name, x):
        y = convolution(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        return each_channel(w, f"{name}.1", y, training)

    y = conv_bn("conv1x1", x)
    s = sum(conv_bn(name, y) for name in ("conv_3x3", "conv_1x3", "conv_3x1")).clamp(min=0)
    a = sum(s[:, c] for c in range(D))
    assert y.shape == (3, D // 2, 2, 3) and a.std() > 0.1
    expected = torch.stack([x[:, c] * a for c in range(D)], dim=1)
    assert torch.allclose(part(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_channel_attention_is_the_mean_over_places_times_a_gate(training):
    torch.manual_seed(0)
    part, w = filled(ChannelAttention(2 * D).train(training))
    x = torch.randn(3, 2 * D, 2, 3, dtype=torch.double)
    g = sum(x[:, :, i, j] for i in range(2) for j in range(3)) / 6
    hidden = each_channel(w, "gate.1", g @ w["gate.0.weight"].T + w["gate.0.bias"], training)
    assert hidden.shape == (3, 2)                                            # D / 16
    gate = hidden.clamp(min=0) @ w["gate.3.weight"].T + w["gate.3.bias"]
    assert torch.allclose(part(x), g / (1 + (-gate).exp()), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_heads_compete_for_each_channel_and_are_summed_for_the_scores(training):
    torch.manual_seed(0)
    model, w = filled(DAN(classes=5, heads=3, width=2).train(training))
    images = torch.randn(4, 3, 64, 40, dtype=torch.double)
    scores, features, heads = model.parts(images)
    places = model.trunk(images)                                              # (4, D, 2, 2)
    assert torch.allclose(features, sum(places[:, :, i, j] for i in (0, 1) for j in (0, 1)) / 4, atol=1e-12)
    raw = [head.channel(head.spatial(places)) for head in model.heads]       # 3 of (4, D)
    most = torch.stack(raw).amax(0)                                        # larger exponentials overflow
    log_total = most + sum((h - most).exp() for h in raw).log()
    fused = sum(h - log_total for h in raw)
    for k, h in enumerate(raw):
        assert torch.allclose(heads[:, k], h - log_total, rtol=1e-9, atol=1e-10)
    expected = each_channel(w, "bn", fused @ w["fc.weight"].T + w["fc.bias"], training)
    assert torch.allclose(scores, expected, rtol=1e-9, atol=1e-9) and scores.std() > 0.1
    assert torch.allclose(heads.exp().sum(dim=1), torch.ones(4, D, dtype=torch.double), rtol=1e-12)


def test_attention_over_places_does_not_mind_the_size_of_the_map():
    part = filled(SpatialAttention(D).eval())[0]
    x = torch.randn(1, D, 7, 7, dtype=torch.double)
    assert torch.allclose(part(x)[:, :, 2:5, 2:5], part(x[:, :, 1:6, 1:6])[:, :, 1:4, 1:4], rtol=1e-10)


# ---- The network

def test_dan_has_its_known_number_of_parameters():
    with torch.device("meta"):
        model = DAN()
    assert sum(p.numel() for p in model.parameters()) == 19_724_248 and len(model.state_dict()) == 275
    assert sum(p.numel() for p in model.trunk.parameters()) == 11_176_512
    assert model.fc.out_features == len(EXPRESSIONS) and len(model.heads) == 4


@pytest.mark.parametrize("size", [(224, 224), (40, 40), (40, 72), (8, 8)])
def test_any_image_size_gives_eight_scores(size):
    model = DAN(width=2)
    assert model(torch.randn(2, 3, *size)).shape == (2, 8)
    assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 8)
    assert model(torch.zeros(0, 3, *size)).shape == (0, 8)


def test_in_training_the_last_batch_norm_gives_each_score_mean_0_and_deviation_1_whatever_the_features():
    torch.manual_seed(0)
    model, images = DAN(width=4), torch.randn(16, 3, 40, 40)
    for scale in (1, 100):
        scores = model(scale * images)
        assert torch.allclose(scores.mean(0), torch.zeros(8), atol=1e-4)
        assert torch.allclose(scores.std(0, correction=0), torch.ones(8), atol=0.05)


def test_evaluation_leaves_the_statistics_of_batch_norm_alone_and_training_moves_them():
    torch.manual_seed(0)
    model, images = DAN(width=2), torch.randn(4, 3, 40, 40)
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert len(before) == 3 * (20 + 4 * 5 + 1)
    model.eval()
    first = model(images)
    first.sum().backward()
    assert torch.equal(first, model(images))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model.train()(images)
    assert [name for name, value in model.named_buffers() if torch.equal(value, before[name])] == []


def test_every_parameter_has_a_gradient_from_the_cross_entropy_and_the_image_has_one():
    torch.manual_seed(0)
    model = filled(DAN(width=4))[0]
    images, labels = torch.randn(6, 3, 64, 64, dtype=torch.double), torch.tensor([0, 1, 2, 3, 4, 7])
    images.requires_grad_()
    F.cross_entropy(model(images), labels).backward()
    assert images.grad.any()
    for name, p in model.named_parameters():
        # A bias before a BatchNorm, which subtracts it again, has none.
        without = re.search(r"spatial\.\w+\.0\.bias|gate\.0\.bias|^fc\.bias", name)
        assert p.grad.abs().max() < 1e-12 if without else p.grad.abs().max() > 1e-9, name


def test_images_that_get_no_gradient_leave_a_frozen_network_without_one():
    model, images = DAN(width=2).eval().requires_grad_(False), torch.randn(2, 3, 40, 40)
    assert not model(images).requires_grad


@pytest.mark.parametrize("settings, message", [
    (dict(heads=1), "heads=1: the heads are compared with each other; give at least 2"),
    (dict(width=7), "width=7: the gate has width / 2 hidden units; try width=8"),
    (dict(width=0), "width=0: the gate has width / 2 hidden units; try width=2")])
def test_sizes_that_do_not_fit_are_refused_with_some_that_do(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DAN(**settings)


@pytest.mark.parametrize("B", [0, 1])
def test_a_training_batch_of_which_batch_norm_takes_no_deviation_is_refused(B):
    with pytest.raises(ValueError, match=rf"{B} image\(s\) in a training batch, at least 2 .* use larger"):
        DAN(width=2)(torch.zeros(B, 3, 40, 40))


# ---- The losses beside the cross-entropy

def batch(B=7, M=5, dim=6):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, dim, generator=generator, dtype=torch.double)
    target = torch.randint(M, (B,), generator=generator)
    valid = torch.tensor([True, False, True, True, False, True, True])[:B]
    centres = torch.randn(M, dim, generator=generator, dtype=torch.double)
    return features, target.masked_fill(~valid, -1), valid, centres


def affinity_of(features, target, valid, centres):
    """With plain numbers."""
    total, count = 0.0, 0
    for g, y, labelled in zip(features.tolist(), target.tolist(), valid.tolist()):
        if labelled:
            total += sum((a - b) ** 2 for a, b in zip(g, centres[y].tolist()))
            count += 1
    return total / count / sum(statistics.variance(column) for column in centres.T.tolist())


def test_affinity_is_the_mean_squared_distance_to_the_own_centre_over_the_variance_of_the_centres():
    assert affinity_loss(*batch()).item() == pytest.approx(affinity_of(*batch()), rel=1e-13)


def test_affinity_is_0_at_the_centres_and_does_not_mind_the_scale():
    features, target, valid, centres = batch()
    at = centres[target.clamp(min=0)]
    assert affinity_loss(at, target, valid, centres) == 0
    loss = affinity_loss(features, target, valid, centres).item()
    assert affinity_loss(10 * features, target, valid, 10 * centres).item() == pytest.approx(loss)


def test_affinity_has_the_gradients_of_finite_differences_and_none_for_a_face_without_a_class():
    features, target, valid, centres = batch()
    features.requires_grad_(), centres.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, c: affinity_loss(g, target, valid, c), (features, centres))
    affinity_loss(features, target, valid, centres).backward()
    assert not features.grad[~valid].any() and features.grad[valid].all() and centres.grad.all()


def test_what_stands_beside_a_missing_class_changes_nothing():
    features, target, valid, centres = batch()
    loss = affinity_loss(features, target, valid, centres)
    rubbish = features.masked_fill(~valid[:, None], math.nan)
    assert torch.equal(affinity_loss(rubbish, target.masked_fill(~valid, 99), valid, centres), loss)


@pytest.mark.parametrize("B", [7, 0], ids=["no class", "no face"])
def test_affinity_without_a_class_is_exactly_0_with_zero_gradients(B):
    features, target, valid, centres = batch(B)
    features.requires_grad_(), centres.requires_grad_()
    loss = affinity_loss(features, target, torch.zeros_like(valid), centres)
    loss.backward()
    assert loss == 0 and not features.grad.any() and not centres.grad.any()


@pytest.mark.parametrize("shapes", [((7, 6), (6,), (7,), (5, 6)), ((7, 6), (7,), (7, 1), (5, 6)),
                                    ((7, 6), (7,), (7,), (5, 4))])
def test_shapes_that_do_not_fit_are_refused_with_all_four(shapes):
    features, target, valid, centres = (torch.ones(shape) for shape in shapes)
    message = "features {}, target {}, mask {}, centres {}; expected".format(*shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        affinity_loss(features, target.long(), valid.bool(), centres)


def test_partition_is_the_logarithm_of_1_plus_heads_over_their_mean_variance():
    heads = torch.randn(3, 4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    variances = [statistics.variance(heads[b, :, d].tolist()) for b in range(3) for d in range(5)]
    expected = math.log(1 + 4 / statistics.fmean(variances))
    assert partition_loss(heads).item() == pytest.approx(expected, rel=1e-13)
    assert partition_loss(heads[:, [2, 0, 3, 1]]).item() == pytest.approx(expected, rel=1e-13)
    assert partition_loss(3 * heads) < partition_loss(heads)
    assert torch.autograd.gradcheck(partition_loss, heads.requires_grad_())


def test_partition_is_finite_for_heads_that_agree_and_0_without_a_face():
    same = torch.ones(2, 4, 5, requires_grad=True)
    loss = partition_loss(same)
    loss.backward()
    assert loss.isfinite() and same.grad.isfinite().all()
    assert partition_loss(torch.zeros(0, 4, 5)) == 0


def test_the_logarithm_of_the_softmax_leaves_the_variance_of_the_heads_as_it_is():
    heads = torch.randn(3, 4, 5, dtype=torch.double)
    assert torch.allclose(heads.log_softmax(1).var(1), heads.var(1), rtol=1e-10)


def test_both_losses_and_their_gradients_are_those_of_one_process_with_all_faces():
    heads = torch.randn(7, 4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    shards = [slice(0, 5), slice(5, 7), slice(7, 7)]

    def losses(part):
        features, target, valid, centres = batch()
        inputs = [features[part].clone(), centres.clone(), heads[part].clone()]
        g, c, h = (x.requires_grad_() for x in inputs)
        total = affinity_loss(g, target[part], valid[part], c) + partition_loss(h)
        total.backward()
        return total.item(), g.grad, c.grad, h.grad

    loss, of_features, of_centres, of_heads = losses(slice(0, 7))
    codes, results = in_team(3, lambda team: losses(shards[team.rank]))
    assert codes == [0, 0, 0]
    for part, (got, g, c, h) in zip(shards, results):
        assert got == pytest.approx(loss, rel=1e-13)
        assert torch.allclose(g, of_features[part], rtol=1e-12, atol=0)
        assert torch.allclose(h, of_heads[part], rtol=1e-12, atol=0)
    # Each process has its share, which Team.parallel adds up.
    assert torch.allclose(sum(c for _, _, c, _ in results), of_centres, rtol=1e-12, atol=1e-15)


def step(part, team=ALONE):
    """A training step on a part of six images. -> loss, gradients, BatchNorm's statistics"""
    torch.manual_seed(0)
    model = filled(DANWithCentres(DAN(width=2)))[0]
    images, labels = torch.randn(6, 3, 40, 40, dtype=torch.double), torch.tensor([0, 3, -1, 5, 1, 7])[part]
    ddp = team.parallel(model)
    scores, features, heads = ddp(images[part])
    loss = expr_loss(scores, labels, labels >= 0) + partition_loss(heads)
    loss = loss + affinity_loss(features, labels, labels >= 0, model.centres)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("shards", [[4, 2], [5, 0, 1]], ids=str)
def test_a_training_step_over_processes_is_that_of_one_with_the_whole_batch(shards):
    loss, gradients, buffers = step(slice(0, 6))
    ends = [sum(shards[:rank + 1]) for rank in range(len(shards))]
    parts = [slice(end - size, end) for size, end in zip(shards, ends)]
    codes, results = in_team(len(shards), lambda team: step(parts[team.rank], team))
    assert codes == [0] * len(shards)
    for got, found, statistics_found in results:
        assert got == pytest.approx(loss, rel=1e-11)
        for name, whole in gradients.items():
            assert torch.allclose(found[name], whole, rtol=1e-7, atol=1e-9), name
        for name, value in buffers.items():
            assert torch.allclose(statistics_found[name], value, rtol=1e-9), name


# ---- Learning

def test_eight_images_are_learned_by_heart_with_all_three_losses_and_the_centres_take_part():
    torch.manual_seed(0)
    model = DANWithCentres(DAN(width=8))
    images, labels, valid = torch.randn(8, 3, 40, 40), torch.arange(8), torch.ones(8, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = []
    for _ in range(30):
        scores, features, heads = model(images)
        row = [F.cross_entropy(scores, labels), affinity_loss(features, labels, valid, model.centres),
               partition_loss(heads)]
        optimizer.zero_grad()
        sum(row).backward()
        optimizer.step()
        rows.append([part.item() for part in row])
    first, last = rows[0], rows[-1]
    assert first[0] > 1.5 and (scores.argmax(1) == labels).all()     # log 8 = 2.08 at chance
    # BatchNorm holds each score at deviation 1, so the cross-entropy cannot come near 0 in a few steps.
    assert all(after < 0.8 * before for before, after in zip(first, last)), (first, last)


def test_a_head_looks_where_the_image_differs():
    """The attention of an untrained network over the map of a face in one corner is not flat."""
    torch.manual_seed(0)
    model, images = DAN(width=8).eval(), torch.zeros(1, 3, 224, 224)
    images[:, :, :64, :64] = torch.randn(1, 3, 64, 64)
    a = model.heads[0].spatial.weights(model.trunk(images))[0, 0]
    assert (a >= 0).all() and a[:2, :2].mean() > 1.2 * a[4:, 4:].mean()


def test_the_trunk_is_a_resnet18_without_its_last_layer():
    assert set(DAN(width=2).trunk.state_dict()) == set(Trunk(2).state_dict())
