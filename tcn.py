"""Temporal convolutional network: each frame's feature learns from the frames before it (paper §3.2, g_i = TCN(f_i)).

A level is two dilated convolutions and a shortcut; the next level dilates twice as far, so the reach doubles while the number
of weights per level stays. Read after `vit.py`; `temporal.py` puts this under the Transformer encoder.

    python tcn.py          # which input frames each level's last frame depends on
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def hide(x, valid):
    """Zero the padded frames. x (B, T, D), valid (B, T) or None. What stood there, NaN included, is gone."""
    return x if valid is None else x.masked_fill(~valid[..., None], 0.0)


class DilatedConv(nn.Module):
    """Weight-normalised 1-D convolution over time that keeps the length. Shape: (B, T, D_in) -> (B, T, D_out), any T ≥ 1.

    Causal: frame t sees frames t, t-d, ..., t-(k-1)d, because zeros are added on the left only. Otherwise the same window is
    centred on t, and k must be odd.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int, dilation: int, causal: bool):
        super().__init__()
        if kernel < 1 or dilation < 1 or (not causal and kernel % 2 == 0):
            raise ValueError(f"kernel={kernel}, dilation={dilation}, causal={causal}: both must be at least 1, "
                             f"and a centred kernel odd; try kernel={max(1, kernel + (kernel + 1) % 2)}")
        reach = (kernel - 1) * dilation
        self.pad = (reach, 0) if causal else (reach // 2, reach // 2)
        conv = nn.Conv1d(dim_in, dim_out, kernel, dilation=dilation)
        # Draw the weights before weight_norm splits them into length and direction: drawn after, they would be overwritten by
        # the first forward pass, which is how the original TCN's N(0, 0.01) has no effect.
        nn.init.normal_(conv.weight, std=0.01)
        self.conv = weight_norm(conv)

    def forward(self, x):
        x = F.pad(x.transpose(1, 2), self.pad)     # (B, T, D) -> (B, D, T), the layout Conv1d wants, and longer by the reach
        return self.conv(x).transpose(1, 2)        # (B, D, T) -> (B, T, D)


class Level(nn.Module):
    """Convolution -> PReLU -> dropout, twice, plus a shortcut -> PReLU. Shape: (B, T, D_in) -> (B, T, D_out)."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, dilation: int, causal: bool, dropout: float):
        super().__init__()
        self.conv1 = DilatedConv(dim_in, dim_out, kernel, dilation, causal)
        self.conv2 = DilatedConv(dim_out, dim_out, kernel, dilation, causal)
        self.act1, self.act2, self.act3 = nn.PReLU(), nn.PReLU(), nn.PReLU()
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Linear(dim_in, dim_out) if dim_in != dim_out else nn.Identity()
        if dim_in != dim_out:
            nn.init.normal_(self.shortcut.weight, std=0.01)

    def forward(self, x, valid=None):
        y = self.dropout(self.act1(self.conv1(hide(x, valid))))
        y = self.dropout(self.act2(self.conv2(hide(y, valid))))
        return hide(self.act3(y + self.shortcut(x)), valid)


class TemporalConvNet(nn.Module):
    """Levels of growing dilation (paper §3.2; sizes from the authors' code, which use one kernel size where the paper says
    "different kernel sizes": here each level has its own).

    Shape: x (B, T, dim), valid (B, T) True for real frames, or None -> (B, T, channels[-1]). Padded frames change no real
    frame and come out as zeros. `receptive_field` is in frames.
    Raises ValueError if the three lists differ in length or x is not (B, T, dim).
    """

    def __init__(self, dim: int = 768, channels=(768, 256, 128), kernels=(5, 5, 5), dilations=(1, 2, 4),
                 causal: bool = True, dropout: float = 0.3):
        super().__init__()
        if not len(channels) == len(kernels) == len(dilations) > 0:
            raise ValueError(f"one entry per level is needed in each list, got channels={list(channels)}, "
                             f"kernels={list(kernels)}, dilations={list(dilations)}")
        self.dim = dim
        dims = [dim, *channels]
        self.levels = nn.ModuleList(Level(dims[i], dims[i + 1], kernels[i], dilations[i], causal, dropout)
                                    for i in range(len(channels)))
        # Each level holds two convolutions, and each lets a frame see (k - 1) d frames further: 57 for the paper's sizes.
        self.receptive_field = 1 + sum(2 * (k - 1) * d for k, d in zip(kernels, dilations))

    def forward(self, x, valid=None):
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"expected (B, T, {self.dim}), got {tuple(x.shape)}")
        x = hide(x, valid)
        for level in self.levels:
            x = level(x, valid)
        return x


if __name__ == "__main__":
    for causal in (True, False):
        net = TemporalConvNet(dim=4, channels=(4, 4, 4), causal=causal).eval()
        x = torch.randn(1, 121, 4, requires_grad=True)
        for depth in range(1, 4):
            y = x
            for level in net.levels[:depth]:
                y = level(y)
            seen = torch.autograd.grad(y[0, 60].sum(), x)[0][0].abs().sum(-1).nonzero().flatten()
            print(f"causal={causal!s:5}  after level {depth}, frame 60 depends on frames {seen[0]} to {seen[-1]}")
        print(f"receptive field: {net.receptive_field} frames")
