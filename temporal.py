"""The segment model: TCN -> Transformer encoder -> MLP, one prediction per frame (paper §3.2, §3.3, §3.3.1).

    f_i --TCN--> g_i --TransformerEncoder--> h_i --MLP--> y_i        f_i: the features of segment i, (T, D)

The paper gives the dropout of 0.3 (§4.1.2) and no sizes; the sizes are those of the authors' code.
Read after `tcn.py`; `train_task.py` trains this.
"""

from torch import nn
from torch.nn import functional as F

from tcn import TemporalConvNet, hide
from vit import Attention


class TransformerLayer(nn.Module):
    """Post-norm Transformer layer with ReLU, as in Vaswani et al.:

        x = norm(x + attention(x))
        x = norm(x + ffn(x))

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
        hidden = self.dropout(F.relu(self.fc1(x)))                 # (B, T, D) -> (B, T, hidden)
        return self.norm2(x + self.dropout(self.fc2(hidden)))      # (B, T, hidden) -> (B, T, D)


class TransformerEncoder(nn.Module):
    """h_i = TransformerEncoder(g_i) (§3.3): project to `width`, then `layers` layers of attention over the
    whole segment.

    It sees one segment only; the paper lets segments overlap (§3.3), which shows some frames twice.
    No position encoding and no last LayerNorm, as in the authors' code: the TCN before it has already mixed
    the order of frames into the features.
    Shape: x (B, T, dim), valid (B, T) or None -> (B, T, width).
    """

    def __init__(self, dim: int, width: int, layers: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.project = nn.Linear(dim, width)           # the authors' 1 x 1 convolution is this layer
        self.layers = nn.ModuleList(TransformerLayer(width, heads, hidden, dropout) for _ in range(layers))

    def forward(self, x, valid=None):
        x = self.project(x)                            # (B, T, dim) -> (B, T, width)
        for layer in self.layers:
            x = layer(x, valid)
        return x


class SegmentModel(nn.Module):
    """Features of a segment -> one prediction per frame. Defaults: the paper's model, 20.51 M parameters: TCN
    7.69 M, Transformer 12.69 M, head 0.13 M.

    Shape: x (B, T, dim), valid (B, T) True for real frames, or None -> (B, T, outputs). `outputs` is 2 for
    valence and arousal, values as they are; 8 for expressions and 12 for action units, logits (§3.3.1, where
    T is l). Padded frames change no real frame's output; their own outputs mean nothing.
    `tcn=False` and `transformer=False` each take that part out (the ablation of the paper's final version);
    with both out, the head sees single frames.

    The head, the paper's MLP, is Linear -> LayerNorm -> Linear. The authors' code has BatchNorm there. Its
    statistics would take in padded frames, and a segment's output would depend on the others in its batch.
    The paper speaks of "non-linear transformations"; the normalisation is the only one here.
    """

    def __init__(self, dim: int = 768, outputs: int = 12, *, tcn: bool = True, channels=(768, 256, 128),
                 kernels=(5, 5, 5), dilations=(1, 2, 4), causal: bool = True, transformer: bool = True,
                 width: int = 512, layers: int = 8, heads: int = 4, hidden: int = 512, head: int = 256,
                 dropout: float = 0.3):
        super().__init__()
        self.dim = dim
        self.tcn = TemporalConvNet(dim, channels, kernels, dilations, causal, dropout) if tcn else None
        dim = channels[-1] if tcn else dim
        encoder = TransformerEncoder(dim, width, layers, heads, hidden, dropout) if transformer else None
        self.transformer = encoder
        dim = width if transformer else dim
        self.head = nn.Sequential(nn.Linear(dim, head), nn.LayerNorm(head), nn.Linear(head, outputs))

    def forward(self, x, valid=None):
        x = hide(x, valid)                              # NaN would pass attention: 0 · NaN = NaN
        if self.tcn is not None:
            x = self.tcn(x, valid)                      # f_i -> g_i   (B, T, 768) -> (B, T, 128)
        if self.transformer is not None:
            x = self.transformer(x, valid)              # g_i -> h_i   (B, T, 128) -> (B, T, 512)
        return self.head(x)                             # h_i -> y_i   (B, T, 512) -> (B, T, outputs)
