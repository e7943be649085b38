"""Temporal convolutional network: each frame takes in the frames before it (paper §3.2, g_i = TCN(f_i)).

A level is two dilated convolutions and a shortcut. The next level dilates twice as far, so the reach doubles
with the same kernel. Read after `vit.py`; `temporal.py` puts this under the Transformer encoder.

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
    """Weight-normalised 1-D convolution over time that keeps the length. The causal one is

        y_t = b + Σ_{i=0}^{k-1} W_i x_{t - d·i}

    k is the kernel size, d the dilation, each W_i a matrix; x is 0 before the first frame. (The paper gives
    no formula; the TCN literature does.) Not causal: the same window centred on frame t, so k must be odd.
    Shape: (B, T, D_in) -> (B, T, D_out), any T ≥ 1.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int, dilation: int, causal: bool):
        super().__init__()
        reach = (kernel - 1) * dilation                     # the largest d·i
        self.pad = (reach, 0) if causal else (reach // 2, reach // 2)
        conv = nn.Conv1d(dim_in, dim_out, kernel, dilation=dilation)
        # N(0, 0.01), drawn before weight_norm splits each output's weights into length g and direction v,
        # w = g · v / |v|. Drawn after, they would be overwritten by the first forward pass.
        nn.init.normal_(conv.weight, std=0.01)
        self.conv = weight_norm(conv)

    def forward(self, x):
        x = x.transpose(1, 2)                      # (B, T, D) -> (B, D, T), the layout Conv1d wants
        x = F.pad(x, self.pad)                     # (B, D, T) -> (B, D, T + reach)
        # y_t = b + Σ_i W_i x_{t - d·i}. PyTorch's weights start with the oldest frame, W_{k-1}.
        return self.conv(x).transpose(1, 2)        # (B, D, T + reach) -> (B, D_out, T) -> (B, T, D_out)


class Level(nn.Module):
    """Convolution -> PReLU -> dropout, twice, plus a shortcut -> PReLU. Shape: (B, T, D_in) -> (B, T, D_out).

    The shortcut is the input itself, or a linear layer for each frame if the widths differ. Padded frames
    must be 0 (`hide`) and come out as 0.
    """

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
        y = self.dropout(self.act1(self.conv1(x)))             # (B, T, D_in) -> (B, T, D_out)
        # Padded frames now hold the bias. 0 again, or the next convolution carries it into real frames.
        y = self.dropout(self.act2(self.conv2(hide(y, valid))))
        return hide(self.act3(y + self.shortcut(x)), valid)    # 0 again, for the next level


class TemporalConvNet(nn.Module):
    """g_i = TCN(f_i): levels of growing dilation (paper §3.2). Defaults: causal, with the sizes of the
    authors' code, 7.69 M parameters. That code has one kernel size where the paper says "different kernel
    sizes and dilation rates"; here each level has its own.

    Shape: x (B, T, dim), valid (B, T) True for real frames, or None -> (B, T, channels[-1]). Padded frames
    change no real frame and come out as zeros. `receptive_field` is in frames.
    """

    def __init__(self, dim: int = 768, channels=(768, 256, 128), kernels=(5, 5, 5), dilations=(1, 2, 4),
                 causal: bool = True, dropout: float = 0.3):
        super().__init__()
        sizes = zip([dim, *channels[:-1]], channels, kernels, dilations, strict=True)     # of each level
        self.levels = nn.ModuleList(Level(a, b, k, d, causal, dropout) for a, b, k, d in sizes)
        # Each of a level's two convolutions lets a frame see (k - 1) d frames further: 57 by default.
        self.receptive_field = 1 + sum(2 * (k - 1) * d for k, d in zip(kernels, dilations))

    def forward(self, x, valid=None):
        x = hide(x, valid)
        for level in self.levels:
            x = level(x, valid)                    # by default (B, T, 768), then (B, T, 256), (B, T, 128)
        return x


if __name__ == "__main__":
    for causal in (True, False):
        net = TemporalConvNet(dim=4, channels=(4, 4, 4), causal=causal).eval()
        x = torch.randn(1, 121, 4, requires_grad=True)
        y = x
        for depth, level in enumerate(net.levels, start=1):
            y = level(y)
            gradient, = torch.autograd.grad(y[0, 60].sum(), x, retain_graph=True)       # (1, T, D)
            seen = gradient[0].abs().sum(-1).nonzero().flatten()     # (1, T, D) -> (T,) -> frames where not 0
            print(f"causal={causal!s:5}  after level {depth}, "
                  f"frame 60 depends on frames {seen[0]} to {seen[-1]}")
        print(f"receptive field: {net.receptive_field} frames")
