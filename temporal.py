"""The segment model: TCN -> Transformer encoder -> MLP, one output per frame (paper §3.2, §3.3, §3.3.1).

    f_i --TCN--> g_i --TransformerEncoder--> h_i --MLP--> y_i        f_i: the features of segment i, (T, D)

Sizes are from the authors' code; the paper gives none. Where it fixes something else than that code, see README.
Read after `tcn.py`; `train_task.py` trains this.

    python temporal.py     # the parameter table of the paper's model, and padding at work
"""

import torch
from torch import nn
from torch.nn import functional as F

from tcn import TemporalConvNet, hide
from vit import Attention

OUTPUTS = {"va": 2, "expr": 8, "au": 12}     # valence and arousal; 8 expressions; 12 action units


class EncoderLayer(nn.Module):
    """Post-norm Transformer layer, as in Vaswani et al.: x = norm(x + attention(x)), x = norm(x + ffn(x)), with ReLU.

    Shape: x (B, T, D), valid (B, T) or None -> (B, T, D).
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, valid=None):
        x = self.norm1(x + self.dropout(self.attn(x, valid, self.dropout.p)))
        return self.norm2(x + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x))))))


class TransformerEncoder(nn.Module):
    """h_i = TransformerEncoder(g_i) (§3.3): project to `width`, then `layers` layers of attention over the whole segment.

    No position encoding, as in the authors' code: the TCN below has already mixed order into the features.
    Shape: x (B, T, dim), valid (B, T) or None -> (B, T, width).
    """

    def __init__(self, dim: int, width: int, layers: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.project = nn.Linear(dim, width)           # the authors' 1x1 convolution is this layer
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(layers))

    def forward(self, x, valid=None):
        x = self.project(x)
        for layer in self.layers:
            x = layer(x, valid)
        return x


class SegmentModel(nn.Module):
    """Features of a segment -> one prediction per frame. Defaults: the paper's model, 20.5 M parameters.

    Shape: x (B, T, dim), valid (B, T) True for real frames, or None -> (B, T, outputs): valence and arousal as they are,
    logits for expressions and action units. Padded frames change no real frame's output; their own outputs mean nothing.
    `tcn=False` and `encoder=False` each take that part out (the ablation of the paper's final version); with both out, the
    head sees single frames.

    The head is Linear -> LayerNorm -> Linear. The authors' code has BatchNorm there, whose statistics would take in padded
    frames and would tie a segment's output to the others in its batch; the paper speaks of non-linear transformations, and
    this normalisation is the only one.
    """

    def __init__(self, dim: int = 768, outputs: int = 12, *, tcn: bool = True, channels=(768, 256, 128), kernels=(5, 5, 5),
                 dilations=(1, 2, 4), causal: bool = True, encoder: bool = True, width: int = 512, layers: int = 8,
                 heads: int = 4, hidden: int = 512, head: int = 256, dropout: float = 0.3):
        super().__init__()
        self.dim = dim
        self.tcn = TemporalConvNet(dim, channels, kernels, dilations, causal, dropout) if tcn else None
        dim = channels[-1] if tcn else dim
        self.encoder = TransformerEncoder(dim, width, layers, heads, hidden, dropout) if encoder else None
        dim = width if encoder else dim
        self.head = nn.Sequential(nn.Linear(dim, head), nn.LayerNorm(head), nn.Linear(head, outputs))

    def forward(self, x, valid=None):
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"expected (B, T, {self.dim}), got {tuple(x.shape)}")
        x = hide(x, valid)
        if self.tcn is not None:
            x = self.tcn(x, valid)                      # f_i -> g_i   (B, T, 768) -> (B, T, 128)
        if self.encoder is not None:
            x = self.encoder(x, valid)                  # g_i -> h_i   (B, T, 128) -> (B, T, 512)
        return self.head(x)                             # h_i -> y_i   (B, T, 512) -> (B, T, outputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = SegmentModel().eval()
    for name, part in model.named_children():
        print(f"{name:8s}{sum(p.numel() for p in part.parameters()):12,d} parameters")
    print(f"{'in all':8s}{sum(p.numel() for p in model.parameters()):12,d}")
    x, valid = torch.randn(1, 300, 768), torch.arange(300)[None] < 40
    short, padded = model(x[:, :40]), model(x, valid)[:, :40]
    print(f"a 40-frame tail alone and padded to 300 differ by at most {(short - padded).abs().max():.1e}")
