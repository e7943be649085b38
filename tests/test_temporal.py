"""The segment model: its layer against PyTorch's, its published size, and that padding and neighbours
change nothing."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labels import TASKS
from temporal import TransformerLayer, SegmentModel, TransformerEncoder

TORCH_NAMES = {f"{ours}.{kind}": f"{theirs}{kind}"
               for ours, theirs in (("attn.qkv", "self_attn.in_proj_"), ("attn.proj", "self_attn.out_proj."),
                                    ("fc1", "linear1."), ("fc2", "linear2."),
                                    ("norm1", "norm1."), ("norm2", "norm2."))
               for kind in ("weight", "bias")}
PARTS = [dict(), dict(tcn=False), dict(transformer=False), dict(tcn=False, transformer=False),
         dict(causal=False)]


def shuffled(module):
    """Random values for all parameters: zero biases and unit LayerNorms would hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module


def tiny(**change):
    torch.manual_seed(0)
    sizes = dict(dim=6, outputs=3, channels=(5, 4), kernels=(3, 3), dilations=(1, 2), width=8, layers=2,
                 heads=2, hidden=7, head=5, dropout=0.3)
    return shuffled(SegmentModel(**(sizes | change))).double().eval()


# ---- The layer

def both_layers(dropout):
    torch.manual_seed(0)
    ours = shuffled(TransformerLayer(12, 3, 20, dropout)).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 20, dropout, activation="relu", batch_first=True,
                                        norm_first=False, dtype=torch.double)
    theirs.load_state_dict({TORCH_NAMES[name]: value for name, value in ours.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("padding", [False, True])
def test_a_layer_is_torchs_post_norm_encoder_layer_forward_and_backward(padding):
    ours, theirs = both_layers(dropout=0.0)
    x1 = torch.randn(2, 6, 12, dtype=torch.double, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]) if padding else None
    y1, y2 = ours(x1, valid), theirs(x2, src_key_padding_mask=None if valid is None else ~valid)
    real = torch.ones(2, 6, dtype=torch.bool) if valid is None else valid
    assert torch.allclose(y1[real], y2[real], rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y1)[real]
    (y1[real] * weights).sum().backward()
    (y2[real] * weights).sum().backward()
    assert torch.allclose(x1.grad, x2.grad, rtol=1e-10, atol=1e-11)
    for name, p in ours.named_parameters():
        expected = theirs.get_parameter(TORCH_NAMES[name]).grad
        assert torch.allclose(p.grad, expected, rtol=1e-10, atol=1e-11), name


def test_dropout_sits_in_the_same_four_places_as_in_torchs_layer():
    ours, theirs = both_layers(dropout=0.4)
    x = torch.randn(1, 6, 12, dtype=torch.double)        # one clip, because torch's layer draws for (T, B, D)
    torch.manual_seed(1)
    first = ours(x)
    torch.manual_seed(1)                                             # the same draws, if in the same order
    assert torch.allclose(first, theirs(x), rtol=1e-12, atol=1e-12) and not torch.allclose(first, ours(x))
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_the_transformer_does_not_know_the_order_of_frames():
    torch.manual_seed(0)
    transformer = TransformerEncoder(4, 8, layers=2, heads=2, hidden=8, dropout=0.0).double()
    x, order = torch.randn(2, 7, 4, dtype=torch.double), torch.randperm(7)
    assert torch.allclose(transformer(x)[:, order], transformer(x[:, order]), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(transformer(x)[:, :3], transformer(x[:, :3]))  # but it knows the other frames


# ---- The model

def test_the_papers_model_has_its_known_number_of_parameters():
    with torch.device("meta"):
        model = SegmentModel()
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts == {"tcn": 7_689_097, "transformer": 12_689_920, "head": 134_924}
    assert sum(parts.values()) == 20_513_941
    assert len(model.transformer.layers) == 8 and model.transformer.layers[0].attn.heads == 4


def test_the_model_is_tcn_then_transformer_then_head():
    model, x = tiny(), torch.randn(2, 9, 6, dtype=torch.double)
    h = model.transformer(model.tcn(x))
    first, norm, last = model.head
    h = F.layer_norm(F.linear(h, first.weight, first.bias), (5,), norm.weight, norm.bias)
    assert torch.allclose(model(x), F.linear(h, last.weight, last.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task, outputs", [("va", 2), ("expr", 8), ("au", 12)])
def test_each_task_has_its_number_of_outputs_per_frame(task, outputs):
    assert len(TASKS[task].outputs) == outputs
    assert tiny(outputs=outputs)(torch.zeros(2, 9, 6, dtype=torch.double)).shape == (2, 9, outputs)


def test_without_tcn_and_transformer_each_frame_is_on_its_own():
    model, x = tiny(tcn=False, transformer=False), torch.randn(1, 9, 6, dtype=torch.double)
    assert [name for name, _ in model.named_children()] == ["head"]
    assert torch.allclose(model(x)[:, 4:5], model(x[:, 4:5]), rtol=1e-12, atol=1e-13)
    assert torch.allclose(model(x.flip(1)), model(x).flip(1), rtol=1e-12, atol=1e-13)


def test_without_the_tcn_the_order_of_frames_is_lost():
    model, x = tiny(tcn=False), torch.randn(1, 9, 6, dtype=torch.double)
    assert [name for name, _ in model.named_children()] == ["transformer", "head"]
    assert torch.allclose(model(x.flip(1)), model(x).flip(1), rtol=1e-11, atol=1e-12)


def test_without_the_transformer_no_frame_sees_the_future():
    model, x = tiny(transformer=False), torch.randn(1, 20, 6, dtype=torch.double)
    assert [name for name, _ in model.named_children()] == ["tcn", "head"]
    changed = x.clone()
    changed[:, 12:] += 1
    assert torch.equal(model(changed)[:, :12], model(x)[:, :12])
    assert not torch.equal(model(changed)[:, 12:], model(x)[:, 12:])


# ---- Padding and neighbours

def segments():
    torch.manual_seed(1)
    valid = torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    return torch.randn(3, 12, 6, dtype=torch.double), valid, torch.randn(3, 12, 3, dtype=torch.double)


def outputs_and_gradients(model, x, valid, weights):
    """As a loss sees them: only real frames count."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x, valid)
    keep = slice(None) if valid is None else valid
    (y[keep] * weights[keep]).sum().backward()
    return y, x.grad, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_padded_segments_give_the_outputs_and_gradients_of_the_segments_alone(parts):
    model, (x, valid, weights) = tiny(**parts), segments()
    padded = x.masked_fill(~valid[..., None], math.nan)
    y, dx, gradients = outputs_and_gradients(model, padded, valid, weights)
    assert not dx[~valid].any()
    total = {name: 0 for name in gradients}
    for b, keep in enumerate(valid):
        alone = outputs_and_gradients(model, x[b:b + 1, keep], None, weights[b:b + 1, keep])
        assert torch.allclose(y[b, keep], alone[0][0], rtol=1e-10, atol=1e-11)
        assert torch.allclose(dx[b, keep], alone[1][0], rtol=1e-9, atol=1e-10)
        total = {name: total[name] + alone[2][name] for name in total}
    for name in total:
        assert torch.allclose(gradients[name], total[name], rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_garbage_in_padded_frames_changes_no_output_and_no_gradient(garbage, parts):
    model, (x, valid, weights) = tiny(**parts), segments()
    clean = outputs_and_gradients(model, x, valid, weights)
    dirty = outputs_and_gradients(model, x.masked_fill(~valid[..., None], garbage), valid, weights)
    assert torch.equal(clean[0][valid], dirty[0][valid]) and torch.equal(clean[1], dirty[1])
    assert all(torch.equal(clean[2][name], dirty[2][name]) for name in clean[2])


def test_a_segment_without_any_real_frame_harms_nobody():
    model, (x, valid, weights) = tiny(), segments()
    valid[2] = False
    y, dx, gradients = outputs_and_gradients(model, x, valid, weights)
    without = outputs_and_gradients(model, x[:2], valid[:2], weights[:2])
    assert torch.allclose(y[:2], without[0], rtol=1e-12, atol=1e-12) and not dx[2].any()
    for name in gradients:
        assert torch.allclose(gradients[name], without[2][name], rtol=1e-10, atol=1e-11), name


def test_a_mask_of_only_real_frames_is_no_mask():
    model, (x, valid, weights) = tiny(), segments()
    y, dx, gradients = outputs_and_gradients(model, x, torch.ones_like(valid), weights)
    plain = outputs_and_gradients(model, x, None, weights)
    assert torch.allclose(y, plain[0], rtol=1e-11, atol=1e-12)
    assert torch.allclose(dx, plain[1], rtol=1e-10, atol=1e-11)
    for name in gradients:
        assert torch.allclose(gradients[name], plain[2][name], rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("training", [False, True])
def test_a_segment_does_not_depend_on_the_others_in_its_batch(training):
    model, (x, valid, _) = tiny(dropout=0.0).train(training), segments()
    changed = x.clone()
    changed[1:] = 100 * torch.randn_like(changed[1:])
    assert torch.equal(model(x, valid)[0], model(changed, valid)[0])
    assert torch.allclose(model(x, valid)[:1], model(x[:1], valid[:1]), rtol=1e-11, atol=1e-12)
    assert not list(model.buffers())                                 # no running statistics


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_an_empty_batch_passes_forward_and_backward(masked, parts):
    model = tiny(**parts).train()
    valid = torch.zeros(0, 9, dtype=torch.bool) if masked else None
    y = model(torch.zeros(0, 9, 6, dtype=torch.double), valid)
    y.sum().backward()
    assert y.shape == (0, 9, 3) and all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---- Refusals

@pytest.mark.parametrize("parts", PARTS)
def test_inputs_of_another_shape_are_refused_with_or_without_the_tcn(parts):
    for shape in ((9, 6), (2, 9, 5), (2, 6, 9)):
        with pytest.raises(ValueError, match=r"expected \(B, T, 6\), got \(" + ", ".join(map(str, shape))):
            tiny(**parts)(torch.zeros(shape, dtype=torch.double))


@pytest.mark.parametrize("change, message", [
    (dict(heads=3), "dim=8 is not divisible by heads=3; try heads=1"),
    (dict(kernels=(3,)), "one entry per level is needed"),
    (dict(kernels=(4, 4), causal=False), "a centred kernel odd; try kernel=5")])
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


# ---- Learning

@pytest.mark.parametrize("parts", [dict(), dict(tcn=False), dict(transformer=False)], ids=str)
def test_a_handful_of_segments_is_learned_by_heart(parts):
    torch.manual_seed(0)
    model = SegmentModel(6, 4, channels=(16, 16), kernels=(3, 3), dilations=(1, 2), width=16, layers=2,
                         heads=2, hidden=16, head=16, dropout=0.0, **parts)
    x, valid = torch.randn(3, 12, 6), torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    labels = torch.randint(4, (3, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(x, valid)[valid], labels[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1                                                # log 4 = 1.39 at chance
