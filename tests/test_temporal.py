"""The segment model: its layer against PyTorch's, its parts, and that padding changes nothing."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import SEGMENT, shuffled, small
from temporal import SegmentModel, TransformerLayer

TORCH_NAMES = {f"{ours}.{kind}": f"{theirs}{kind}"
               for ours, theirs in (("attn.qkv", "self_attn.in_proj_"), ("attn.proj", "self_attn.out_proj."),
                                    ("fc1", "linear1."), ("fc2", "linear2."),
                                    ("norm1", "norm1."), ("norm2", "norm2."))
               for kind in ("weight", "bias")}
PARTS = [dict(), dict(tcn=False), dict(transformer=False), dict(tcn=False, transformer=False),
         dict(causal=False)]


def both_layers(dropout):
    ours = shuffled(TransformerLayer(12, 3, 20, dropout))
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


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_the_model_is_tcn_then_transformer_then_head_less_what_is_taken_out(parts):
    model, x = shuffled(small(SegmentModel, SEGMENT, **parts)), torch.randn(2, 9, 6, dtype=torch.double)
    y = x
    if parts.get("tcn", True):
        y = model.tcn(y)
    if parts.get("transformer", True):
        y = F.linear(y, model.transformer.project.weight, model.transformer.project.bias)
        for layer in model.transformer.layers:
            y = layer(y)
    first, norm, last = model.head
    y = F.layer_norm(F.linear(y, first.weight, first.bias), (5,), norm.weight, norm.bias)
    assert torch.allclose(model(x), F.linear(y, last.weight, last.bias), rtol=1e-12, atol=1e-12)
    expected = [name for name in ("tcn", "transformer", "head") if parts.get(name, True)]
    assert [name for name, _ in model.named_children()] == expected


@pytest.mark.parametrize("causal, pads", [(True, [(2, 0), (4, 0)]), (False, [(1, 1), (2, 2)])])
def test_the_settings_reach_the_parts(causal, pads):
    model = small(SegmentModel, SEGMENT, dropout=0.37, causal=causal)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.37}
    assert [level.conv1.pad for level in model.tcn.levels] == pads
    assert [level.conv2.pad for level in model.tcn.levels] == pads


def segments():
    torch.manual_seed(1)
    valid = torch.arange(12) < torch.tensor([12, 7, 1, 0])[:, None]
    valid[1, :2] = False                                             # real frames in the middle of the row
    return torch.randn(4, 12, 6, dtype=torch.double), valid, torch.randn(4, 12, 3, dtype=torch.double)


def outputs_and_gradients(model, x, valid, weights):
    """As a loss sees them: only real frames count."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x, valid)
    keep = slice(None) if valid is None else valid
    (y[keep] * weights[keep]).sum().backward()
    return y, x.grad, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_padded_segments_give_the_outputs_and_gradients_of_the_segments_alone(parts, garbage):
    model, (x, valid, weights) = shuffled(small(SegmentModel, SEGMENT, **parts)), segments()
    x = x.masked_fill(~valid[..., None], garbage)
    y, dx, gradients = outputs_and_gradients(model, x, valid, weights)
    assert not dx[~valid].any()
    g = torch.zeros(1) if model.tcn is None else model.tcn(x, valid)
    assert g.isfinite().all() and (model.tcn is None or not g[~valid].any())     # zeros at padded frames
    total = {name: 0 for name in gradients}
    for b, keep in enumerate(valid[:3]):                             # the last one has no real frame
        alone = outputs_and_gradients(model, x[b:b + 1, keep], None, weights[b:b + 1, keep])
        assert torch.allclose(y[b, keep], alone[0][0], rtol=1e-10, atol=1e-11)
        assert torch.allclose(dx[b, keep], alone[1][0], rtol=1e-9, atol=1e-10)
        total = {name: total[name] + alone[2][name] for name in total}
    for name in total:
        assert torch.allclose(gradients[name], total[name], rtol=1e-8, atol=1e-10), name
