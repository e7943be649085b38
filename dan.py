"""DAN, a convolutional network for expressions in single faces (Wen et al. 2021, "Distract your attention:
multi-head cross attention network for facial expression recognition").

ResNet-18 turns a face into a map. Four heads look at the map, each with an attention of its own over places
and then over channels. Two losses beside the cross-entropy draw the faces of one class together (affinity)
and the heads apart (partition). Smallest part first: the attentions, head, network, losses. Public weights:
`dan_weights.py`.

    python dan.py          # the parameter table, and where one head looks in a random image

Letters: B images, D channels of the map F (512), h and w its sides (7 and 7 for a face of 224 x 224), K heads
(the paper's letter; 4), M classes. Images come as `images.normalise` makes them, with ImageNet's mean and
deviation: public DAN weights expect the same. Initialisation: `cnn.init_weights`.
"""

import torch
from torch import nn

from cnn import BatchNorm, Trunk, init_weights
from distributed import all_sum
from labels import EXPRESSIONS


# ---- The network

def conv_bn(narrow: int, wide: int, kernel: tuple[int, int]) -> nn.Sequential:
    """A convolution that keeps height and width, then BatchNorm. Its bias has no effect before BatchNorm, but
    public weights have one."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(nn.Conv2d(narrow, wide, kernel, padding=padding), BatchNorm(wide))


class SpatialAttention(nn.Module):
    """Where to look: the map F is multiplied by one number a for each place.

        y = BN(Conv1×1 F)                                         D -> D/2 channels
        s = ReLU(BN Conv3×3 y + BN Conv1×3 y + BN Conv3×1 y)      D/2 -> D
        a = Σ_channels s,    F' = F · a

    Shape: (B, D, h, w) -> (B, D, h, w).
    """

    def __init__(self, D: int):
        super().__init__()
        self.conv1x1 = conv_bn(D, D // 2, (1, 1))
        self.conv_3x3 = conv_bn(D // 2, D, (3, 3))
        self.conv_1x3 = conv_bn(D // 2, D, (1, 3))
        self.conv_3x1 = conv_bn(D // 2, D, (3, 1))

    def weights(self, F):
        """a of each place. Shape: (B, D, h, w) -> (B, 1, h, w), none of it negative."""
        y = self.conv1x1(F)                                                        # -> (B, D/2, h, w)
        s = torch.relu(self.conv_3x3(y) + self.conv_1x3(y) + self.conv_3x1(y))     # -> (B, D, h, w)
        return s.sum(dim=1, keepdim=True)                                          # -> (B, 1, h, w)

    def forward(self, F):
        return F * self.weights(F)                                                 # F' = F · a


class ChannelAttention(nn.Module):
    """What to look for: the mean g of the map is multiplied by a gate between 0 and 1 for each channel.

        g = GAP(F'),    gate = sigmoid(W2 ReLU(BN(W1 g))),    h = g · gate        D -> D/16 -> D

    GAP is the mean over the places of a map. Shape: (B, D, h, w) -> (B, D).
    """

    def __init__(self, D: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(D, D // 16), BatchNorm(D // 16), nn.ReLU(),
                                  nn.Linear(D // 16, D), nn.Sigmoid())

    def forward(self, F):
        g = F.mean(dim=(2, 3))                                                     # (B, D, h, w) -> (B, D)
        return g * self.gate(g)


class Head(nn.Module):
    """One head: attention over places, then over channels. Shape: (B, D, h, w) -> (B, D)."""

    def __init__(self, D: int):
        super().__init__()
        self.spatial = SpatialAttention(D)
        self.channel = ChannelAttention(D)

    def forward(self, F):
        return self.channel(self.spatial(F))


class DAN(nn.Module):
    """The network, by default the paper's, for the 8 expressions of `labels.EXPRESSIONS` in their order.

    forward: images (B, 3, height, width) -> scores before the softmax (B, M).
    parts: images -> the scores, and what the two losses of a training take.
    `width`: the channels of ResNet's first stage, D / 8; smaller makes everything smaller.
    The last BatchNorm sets the scale of the scores, so they can stand beside those of another network.
    Raises ValueError for images of another shape, for fewer than 2 in training (of which BatchNorm takes the
    deviation), and for sizes that do not fit. As with BatchNorm, a process passes its whole share of a
    training batch at once.
    """

    def __init__(self, classes: int = len(EXPRESSIONS), heads: int = 4, width: int = 64):
        super().__init__()
        if heads < 2:
            raise ValueError(f"heads={heads}: the heads are compared with each other; give at least 2")
        if width < 2 or width % 2:
            raise ValueError(f"width={width}: the gate has width / 2 hidden units; "
                             f"try width={width + width % 2 if width > 0 else 2}")
        self.trunk = Trunk(width)
        self.heads = nn.ModuleList(Head(self.trunk.dim) for _ in range(heads))
        self.fc = nn.Linear(self.trunk.dim, classes)
        self.bn = BatchNorm(classes)
        self.apply(init_weights)

    def parts(self, images):
        """Scores (B, M); GAP(F) (B, D), for `affinity_loss`; the heads (B, K, D), for `partition_loss`."""
        if self.training:
            B = int(all_sum(torch.tensor(len(images))))                # over all processes
            if B < 2:
                raise ValueError(f"{B} image(s) in a training batch, at least 2 are needed for BatchNorm; "
                                 "use larger batches, or call eval() first")
        F = self.trunk(images)                                         # (B, 3, height, width) -> (B, D, h, w)
        heads = torch.stack([head(F) for head in self.heads], dim=1)   # K of (B, D) -> (B, K, D)
        heads = heads.log_softmax(dim=1)                               # the heads compete for each channel
        scores = self.bn(self.fc(heads.sum(dim=1)))                    # (B, K, D) -> (B, D) -> (B, M)
        return scores, F.mean(dim=(2, 3)), heads

    def forward(self, images):
        return self.parts(images)[0]


class DANWithCentres(nn.Module):
    """What a training optimises: the network, and a centre for each class, drawn from N(0, 1).

    forward: images -> what `DAN.parts` gives. `affinity_loss` takes the centres, (M, D).
    """

    def __init__(self, dan: DAN):
        super().__init__()
        self.dan = dan
        self.centres = nn.Parameter(torch.randn(dan.fc.out_features, dan.fc.in_features))

    def forward(self, images):
        return self.dan.parts(images)


# ---- The losses beside the cross-entropy

def affinity_loss(features, target, valid, centres):
    """Faces of one class lie near their centre, and the centres far from each other.

        L_aff = 1/N Σ_i ‖g_i - c_{y_i}‖² / σ_c²,    σ_c² = Σ_d Var_m(c_md)

    g_i = GAP(F) of face i, y_i its class, N faces with a class; Var is the unbiased variance over the M
    classes. Shape: (B, D) features, (B,) classes, (B,) mask, (M, D) centres -> scalar; 0 if no face is valid.
    N and the sum are those of all processes, as in losses.py. Raises ValueError if the shapes do not fit.
    """
    shapes = [tuple(x.shape) for x in (features, target, valid, centres)]
    B, D = features.shape
    if shapes[1:3] != [(B,), (B,)] or shapes[3][1:] != (D,):
        raise ValueError("shapes do not fit: features {}, target {}, mask {}, centres {}; expected (B, D), "
                         "(B,), (B,), (classes, D)".format(*shapes))
    g = features.to(centres.dtype).masked_fill(~valid[:, None], 0)
    c = centres[target.masked_fill(~valid, 0).long()]                              # (M, D) -> (B, D)
    variance = centres.var(dim=0).sum()                                            # (M, D) -> scalar
    # Divided before the sum over processes: each process then has its share of the variance's gradient.
    distance = ((g - c) ** 2).sum(dim=1) / variance                                # (B, D) -> (B,)
    total, N = all_sum(torch.stack([(distance * valid).sum(), valid.sum().to(g.dtype)]))
    return total / N.clamp(min=1)


def partition_loss(heads):
    """The heads see different things: it falls as they move apart.

        L_part = log(1 + K / v),    v = 1/(N D) Σ_i Σ_d Var_k(h_ikd)

    Var is the unbiased variance over the K heads; N faces. Shape: (B, K, D) -> scalar; 0 without a face.
    v is that of all processes. Not a mean over faces, so it cannot be accumulated over pieces.
    """
    B, K, D = heads.shape
    apart = heads - heads.mean(dim=1, keepdim=True)                                # (B, K, D)
    variance = (apart ** 2).sum(dim=1) / (K - 1)                                   # (B, K, D) -> (B, D)
    total, entries = all_sum(torch.stack([variance.sum(), variance.new_tensor(B * D)]))
    v = total / entries.clamp(min=1)
    return torch.log(1 + K / v.clamp(min=1e-6)) * (entries > 0)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = DAN()
    for name, part in model.named_children():
        print(f"{name:12s}{sum(p.numel() for p in part.parameters()):12,d} parameters")
    print(f"{'in all':12s}{sum(p.numel() for p in model.parameters()):12,d} parameters")
    model.eval()
    F = model.trunk(torch.randn(1, 3, 224, 224))                        # (1, 512, 7, 7)
    a = model.heads[0].spatial.weights(F)[0, 0]                         # (1, 1, 7, 7) -> (7, 7)
    print("\nattention of head 0 over the 7 x 7 places, before any training (1.0 = the mean)")
    for row in a / a.mean():
        print("".join(f"{weight:6.2f}" for weight in row))
