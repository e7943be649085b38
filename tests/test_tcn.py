"""The TCN against written-out sums and F.conv1d; what a frame can see, and what padding cannot do."""

import math

import pytest
import torch
from torch.nn import functional as F

from models import TCN, shuffled, small
from tcn import DilatedConv, Level, TemporalConvNet

each_side = pytest.mark.parametrize("causal", [True, False])


@pytest.mark.parametrize("k, d, causal", [(3, 2, True), (3, 2, False), (4, 1, True), (5, 3, False),
                                          (1, 4, True), (1, 1, False)])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_a_convolution_is_the_written_out_sum_over_its_window(k, d, causal, T):
    layer, x = shuffled(DilatedConv(3, 2, k, d, causal)), torch.randn(2, T, 3, dtype=torch.double)
    g, v = layer.conv.parametrizations.weight.original0, layer.conv.parametrizations.weight.original1
    w = [g[o] * v[o] / math.sqrt(sum(number ** 2 for number in v[o].flatten().tolist())) for o in range(2)]
    y = layer(x)
    assert y.shape == (2, T, 2)
    for t in range(T):
        expected = layer.conv.bias.expand(2, 2).clone()                          # (B, D_out)
        for i in range(k):
            frame = t - d * i if causal else t + d * (k // 2 - i)
            if 0 <= frame < T:
                for o in range(2):
                    expected[:, o] += x[:, frame] @ w[o][:, k - 1 - i]           # W_i x_{t - d·i}
        assert torch.allclose(y[:, t], expected, rtol=1e-12, atol=1e-12)


@each_side
def test_weights_start_with_deviation_one_hundredth_and_keep_it_after_a_forward_pass(causal):
    model = small(TemporalConvNet, TCN, dim=64, channels=(64, 48), kernels=(5, 5), causal=causal)
    for _ in range(2):
        for level in model.levels:
            for conv in (level.conv1.conv, level.conv2.conv):
                assert conv.weight.std().item() == pytest.approx(0.01, rel=0.03)
                assert abs(conv.weight.mean()) < 3e-4
        model(torch.randn(2, 20, 64))
    assert model.levels[1].shortcut.weight.std().item() == pytest.approx(0.01, rel=0.06)


@each_side
@pytest.mark.parametrize("kernels, dilations", [((5, 5, 5), (1, 2, 4)), ((3,), (1,)), ((3, 5), (2, 1)),
                                                ((1, 1), (1, 8)), ((7, 1, 3), (1, 2, 5))])
def test_the_receptive_field_is_what_the_gradient_reaches(kernels, dilations, causal):
    model = shuffled(small(TemporalConvNet, TCN, channels=(4,) * len(kernels), kernels=kernels,
                           dilations=dilations, causal=causal))
    t = model.receptive_field
    x = torch.randn(1, 2 * t + 1, 6, dtype=torch.double, requires_grad=True)
    gradient, = torch.autograd.grad(model(x)[0, t].sum(), x)
    seen = gradient[0].abs().sum(-1).nonzero().flatten()
    past, future = (t - 1, 0) if causal else ((t - 1) // 2,) * 2
    assert (seen[0], seen[-1]) == (t - past, t + future)


@pytest.mark.parametrize("width", [4, 5])
def test_a_level_is_two_convolutions_and_a_shortcut_with_dropout_after_activations_in_training(width):
    level, x = shuffled(Level(4, width, 3, 1, True, dropout=0.5)), torch.randn(2, 9, 4, dtype=torch.double)
    shortcut = F.linear(x, level.shortcut.weight, level.shortcut.bias) if width == 5 else x
    torch.manual_seed(1)
    y = level(x)
    torch.manual_seed(1)                                             # the same draws, if in the same places
    expected = F.dropout(level.act2(level.conv2(F.dropout(level.act1(level.conv1(x))))))
    assert torch.allclose(y, level.act3(expected + shortcut), rtol=1e-12, atol=1e-13)
    level.eval()
    expected = level.act2(level.conv2(level.act1(level.conv1(x))))
    assert torch.allclose(level(x), level.act3(expected + shortcut), rtol=1e-12, atol=1e-13)
