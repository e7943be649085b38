"""The TCN against written-out sums and F.conv1d; what a frame can see, and what padding cannot do."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tcn import DilatedConv, Level, TemporalConvNet, hide

SHAPES = [dict(kernel=3, dilation=2, causal=True), dict(kernel=3, dilation=2, causal=False),
          dict(kernel=4, dilation=1, causal=True), dict(kernel=5, dilation=3, causal=False),
          dict(kernel=1, dilation=4, causal=True), dict(kernel=1, dilation=1, causal=False)]


def shuffled(module):
    """Random values for all parameters: at their start values equal lengths g = |v| and equal slopes would
    hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double()


def net(causal=True, **change):
    torch.manual_seed(0)
    sizes = dict(dim=4, channels=(6, 5), kernels=(3, 5), dilations=(1, 2), causal=causal, dropout=0.3)
    return shuffled(TemporalConvNet(**(sizes | change))).eval()


def tail(T, *lengths):
    """(B, T), True for the first `length` frames of each row."""
    return torch.arange(T) < torch.tensor(lengths)[:, None]


# ---- One convolution

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 9])
def test_a_convolution_is_the_written_out_sum_over_its_window(shape, T):
    torch.manual_seed(0)
    layer, x = shuffled(DilatedConv(3, 2, **shape)), torch.randn(2, T, 3, dtype=torch.double)
    bias = layer.conv.bias.tolist()
    g, v = (layer.conv.get_parameter(f"parametrizations.weight.original{i}").tolist() for i in (0, 1))
    k, d, causal = shape["kernel"], shape["dilation"], shape["causal"]
    y = layer(x)
    assert y.shape == (2, T, 2)
    for b in range(2):
        for t in range(T):
            for o in range(2):
                length = math.sqrt(sum(v[o][i][j] ** 2 for i in range(3) for j in range(k)))
                total = bias[o]
                for i in range(3):
                    for j in range(k):
                        frame = t - (k - 1 - j) * d if causal else t + (j - k // 2) * d
                        if 0 <= frame < T:
                            total += g[o][0][0] * v[o][i][j] / length * x[b, frame, i].item()
                assert y[b, t, o].item() == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_start_with_deviation_one_hundredth_and_keep_it_after_a_forward_pass(causal):
    torch.manual_seed(0)
    model = TemporalConvNet(64, channels=(64, 48), kernels=(5, 5), dilations=(1, 2), causal=causal)
    for _ in range(2):
        for level in model.levels:
            for conv in (level.conv1.conv, level.conv2.conv):
                assert conv.weight.std().item() == pytest.approx(0.01, rel=0.03)
                assert abs(conv.weight.mean()) < 3e-4
        model(torch.randn(2, 20, 64))
    assert model.levels[1].shortcut.weight.std().item() == pytest.approx(0.01, rel=0.06)


def test_the_length_of_a_weight_trains_apart_from_its_direction():
    torch.manual_seed(0)
    layer = DilatedConv(3, 2, kernel=3, dilation=1, causal=True).double()
    layer(torch.randn(1, 9, 3, dtype=torch.double)).square().sum().backward()
    g, v = (layer.conv.get_parameter(f"parametrizations.weight.original{i}") for i in (0, 1))
    assert g.shape == (2, 1, 1) and g.grad.abs().min() > 0
    along = (v.grad * v).sum(dim=(1, 2))                             # no gradient along the direction itself
    assert along.abs().max() < 1e-12 < v.grad.abs().max()


# ---- The whole network

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("channels", [(6, 5), (4, 4), (4, 7)], ids=str)
def test_the_network_is_f_conv1d_with_the_effective_weights(causal, channels):
    model, x = net(causal, channels=channels), torch.randn(2, 13, 4, dtype=torch.double)
    y = x.transpose(1, 2)                                            # (B, D, T) throughout
    for level, k, d in zip(model.levels, (3, 5), (1, 2)):
        z = y
        for conv, act in ((level.conv1.conv, level.act1), (level.conv2.conv, level.act2)):
            # Padded on both sides, so longer by the reach.
            z = F.conv1d(z, conv.weight, conv.bias, padding=(k - 1) * d, dilation=d)
            start = 0 if causal else (k - 1) * d // 2
            z = F.prelu(z[:, :, start:start + 13], act.weight)
        if y.shape[1] != z.shape[1]:
            y = F.conv1d(y, level.shortcut.weight[:, :, None], level.shortcut.bias)
        y = F.prelu(z + y, level.act3.weight)
    assert torch.allclose(model(x), y.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_equal_widths_have_a_shortcut_without_parameters():
    assert isinstance(Level(4, 4, 3, 1, True, 0.0).shortcut, nn.Identity)
    assert isinstance(Level(4, 5, 3, 1, True, 0.0).shortcut, nn.Linear)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels, dilations", [((5, 5, 5), (1, 2, 4)), ((3,), (1,)), ((3, 5), (2, 1)),
                                                ((1, 1), (1, 8)), ((7, 1, 3), (1, 2, 5))])
def test_the_receptive_field_is_what_the_gradient_reaches(kernels, dilations, causal):
    model = net(causal, channels=(4,) * len(kernels), kernels=kernels, dilations=dilations)
    T = 2 * model.receptive_field + 1
    x = torch.randn(1, T, 4, dtype=torch.double, requires_grad=True)
    t = T // 2
    gradient, = torch.autograd.grad(model(x)[0, t].sum(), x)
    seen = gradient[0].abs().sum(-1).nonzero().flatten()
    past, future = (model.receptive_field - 1, 0) if causal else ((model.receptive_field - 1) // 2,) * 2
    assert (seen[0], seen[-1]) == (t - past, t + future)


def test_the_papers_receptive_field_is_57_frames_and_its_size_7_689_097():
    with torch.device("meta"):
        model = TemporalConvNet()
    assert model.receptive_field == 57 == 1 + 2 * (5 - 1) * (2 ** 3 - 1)
    assert sum(p.numel() for p in model.parameters()) == 7_689_097


def test_no_frame_sees_the_future():
    model, x = net(causal=True), torch.randn(1, 30, 4, dtype=torch.double)
    for garbage in (5.0, math.inf, math.nan):
        changed = x.clone()
        changed[:, 17:] = garbage
        assert torch.equal(model(changed)[:, :17], model(x)[:, :17])
        assert not torch.equal(model(changed)[:, 17:], model(x)[:, 17:])


def test_a_centred_network_sees_the_future_and_is_symmetric_in_time():
    model, x = net(causal=False), torch.randn(1, 30, 4, dtype=torch.double)
    changed = x.clone()
    changed[:, 17] += 1
    difference = (model(changed) - model(x)).abs().sum(-1)[0]        # (1, T, D) -> (T,)
    assert difference.nonzero().flatten().tolist() == list(range(17 - 10, 17 + 11))
    before = model(x.flip(1)).flip(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("original1"):
                p.copy_(p.flip(2))                                   # the kernels backwards
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False])
def test_kernel_one_leaves_every_frame_alone(causal):
    model, x = net(causal, kernels=(1, 1)), torch.randn(2, 6, 4, dtype=torch.double)
    assert model.receptive_field == 1
    assert torch.allclose(model(x)[:, 2:3], model(x[:, 2:3]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_clips_shorter_than_the_kernel_keep_their_length(T, causal):
    model, x = net(causal), torch.randn(2, T, 4, dtype=torch.double)
    zeros = torch.zeros(2, 20, 4, dtype=torch.double)
    assert model(x).shape == (2, T, 5) and model(x).isfinite().all()
    padded = model(torch.cat([x, zeros], dim=1), tail(T + 20, T, T))
    assert torch.allclose(padded[:, :T], model(x), rtol=1e-12, atol=1e-13)


def test_dropout_follows_both_activations_and_acts_in_training_only():
    torch.manual_seed(0)
    level, x = shuffled(Level(4, 4, 3, 1, True, dropout=0.5)), torch.randn(2, 9, 4, dtype=torch.double)
    torch.manual_seed(1)
    y = level(x)
    torch.manual_seed(1)                                             # the same draws, if in the same places
    expected = F.dropout(level.act2(level.conv2(F.dropout(level.act1(level.conv1(x))))))
    assert torch.allclose(y, level.act3(expected + x), rtol=1e-12, atol=1e-13)
    level.eval()
    expected = level.act2(level.conv2(level.act1(level.conv1(x))))
    assert torch.allclose(level(x), level.act3(expected + x), rtol=1e-12, atol=1e-13)


# ---- Padding

def test_hide_zeroes_padded_frames_and_copies_the_others():
    x = torch.tensor([[[1.0, 2], [math.nan, math.inf]]])
    assert hide(x, torch.tensor([[True, False]])).tolist() == [[[1, 2], [0, 0]]]
    assert hide(x, None) is x


def padded_clips():
    """Real frames of three clips of 11, 4 and 0 frames, the second in the middle of its row."""
    torch.manual_seed(1)
    valid = tail(11, 11, 7, 0)
    valid[1, :3] = False
    return torch.randn(3, 11, 4, dtype=torch.double), valid, torch.randn(3, 11, 5, dtype=torch.double)


def outputs_and_gradients(model, x, valid, weights):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x, valid)
    (y if valid is None else y[valid]).mul(weights if valid is None else weights[valid]).sum().backward()
    return y, x.grad, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_garbage_in_padded_frames_changes_no_output_and_no_gradient(causal, garbage):
    model, (x, valid, weights) = net(causal), padded_clips()
    clean = outputs_and_gradients(model, x.masked_fill(~valid[..., None], 0), valid, weights)
    dirty = outputs_and_gradients(model, x.masked_fill(~valid[..., None], garbage), valid, weights)
    assert torch.equal(clean[0], dirty[0])
    assert not dirty[0][~valid].any()                                # padded frames come out as zeros
    assert torch.equal(clean[1], dirty[1]) and not dirty[1][~valid].any()
    assert all(torch.equal(clean[2][name], dirty[2][name]) for name in clean[2])


@pytest.mark.parametrize("causal", [True, False])
def test_a_level_alone_also_ignores_padded_frames(causal):
    torch.manual_seed(0)
    level, (x, valid, _) = shuffled(Level(4, 5, 3, 2, causal, 0.0)), padded_clips()
    dirty = level(x.masked_fill(~valid[..., None], math.nan), valid)
    assert torch.equal(dirty, level(x.masked_fill(~valid[..., None], 0), valid)) and not dirty[~valid].any()


@pytest.mark.parametrize("causal", [True, False])
def test_padded_clips_give_the_outputs_and_gradients_of_the_clips_alone(causal):
    model, (x, valid, weights) = net(causal), padded_clips()
    y, dx, gradients = outputs_and_gradients(model, x, valid, weights)
    total = {name: 0 for name in gradients}
    for b in range(2):
        alone = outputs_and_gradients(model, x[b:b + 1, valid[b]], None, weights[b:b + 1, valid[b]])
        assert torch.allclose(y[b, valid[b]], alone[0][0], rtol=1e-11, atol=1e-12)
        assert torch.allclose(dx[b, valid[b]], alone[1][0], rtol=1e-11, atol=1e-12)
        total = {name: total[name] + alone[2][name] for name in total}
    for name in total:
        assert torch.allclose(gradients[name], total[name], rtol=1e-10, atol=1e-11), name


# ---- Refusals

@pytest.mark.parametrize("kernel, dilation, causal, instead",
                         [(0, 1, True, 1), (3, 0, True, 3), (4, 1, False, 5)])
def test_a_window_that_cannot_be_is_refused_with_one_that_can(kernel, dilation, causal, instead):
    message = f"kernel={kernel}, dilation={dilation}, causal={causal}: .* try kernel={instead}$"
    with pytest.raises(ValueError, match=message):
        DilatedConv(2, 2, kernel, dilation, causal)


@pytest.mark.parametrize("change", [dict(channels=(4, 4, 4)), dict(kernels=(3,)), dict(dilations=()),
                                    dict(channels=(), kernels=(), dilations=())], ids=str)
def test_lists_of_different_lengths_are_refused(change):
    message = r"one entry per level is needed in each list, got channels=\[.*kernels=\[.*dilations=\["
    with pytest.raises(ValueError, match=message):
        net(**change)


@pytest.mark.parametrize("shape", [(7, 4), (2, 7, 5), (2, 4, 7), (1, 2, 7, 4)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, T, 4\), got \(" + ", ".join(map(str, shape))):
        net()(torch.zeros(shape, dtype=torch.double))


# ---- Learning

@pytest.mark.parametrize("dilation, reaches", [(5, True), (2, False)])
def test_it_learns_to_repeat_what_it_heard_ten_frames_ago_if_it_reaches_that_far(dilation, reaches):
    torch.manual_seed(0)
    net = TemporalConvNet(32, channels=(32,), kernels=(3,), dilations=(dilation,), dropout=0.0)
    model = nn.Sequential(nn.Linear(1, 32), net, nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        x = torch.randn(8, 60, 1)
        loss = F.mse_loss(model(x)[:, 10:], x[:, :-10])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (net.receptive_field > 10) == reaches
    assert loss < 0.05 if reaches else loss > 0.7                    # 1 at chance
