"""DAN and its trunk, ResNet-18: a network that learns expressions from still faces, for EMMA.

ResNet-18 (He et al. 2015, "Deep residual learning for image recognition", table 1) turns a face into a map.
DAN (Wen et al. 2021, "Distract your attention: multi-head cross attention network for facial expression
recognition") looks at the map with several heads, each with an attention of its own over places, then over
channels. Smallest part first; choices: docs/second_paper.md.

Letters: B images, D channels of the map F (512), h and w its sides (7 for an image of 224), K heads (the
paper's letter; 4), M classes. Public weights expect what `images.normalise` gives, as ours do.
"""

from collections import OrderedDict

import torch
from torch import nn

from engine.checkpoints import find_weights, load_weights, read_checkpoint
from engine.distributed import all_sum, several
from labels import EXPRESSIONS
from losses import at_least_float32

# The public DAN (MIT licence) counts the trunk's parts by their place in ResNet-18. Its classes are in
# AffectNet's order; its contempt is our Other.
PUBLIC_NAMES = {"features.0": "trunk.conv1", "features.1": "trunk.bn1", "features.4": "trunk.layer1",
                "features.5": "trunk.layer2", "features.6": "trunk.layer3", "features.7": "trunk.layer4"}
PUBLIC_NAMES |= {f"cat_head{k}.sa": f"heads.{k}.spatial" for k in range(4)}
PUBLIC_NAMES |= {f"cat_head{k}.ca": f"heads.{k}.channel" for k in range(4)}
PUBLIC_CLASS = ("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger", "Other")


# ---- ResNet-18, with torchvision's names and shapes

class BatchNorm(nn.BatchNorm2d):
    """Gives each channel mean 0 and variance 1, then a learned scale γ and shift β:

        y = γ · (x - μ) / √(σ² + ε) + β        (Ioffe & Szegedy 2015, algorithm 1)

    In training μ and σ² are those of the batch over all processes, so that two train as one would (PyTorch's
    SyncBatchNorm needs GPUs); in evaluation running averages, of which a training step changes a tenth.
    Shape: (B, C) or (B, C, h, w), unchanged. A process may have B = 0 in training, if others have 2 or more.
    A batch must be passed at once: accumulated in pieces, each would have its own μ and σ².
    """

    def _check_input_dim(self, x):
        """PyTorch's refuses (B, C) here."""

    def forward(self, x):
        if not (self.training and several()):
            return super().forward(x)
        self.num_batches_tracked += 1                                     # only because public files have it
        places = (0, 2, 3)[:x.ndim - 1]                                   # all dimensions but the channels
        shape = (1, -1) + (1,) * (x.ndim - 2)                             # (C,) as (1, C) or (1, C, 1, 1)
        # The sums of z = x - m and of z² give both, in one message: σ² = mean(z²) - mean(z)². Its rounding
        # error is some 1e-7 · mean(z)² / σ²: small with m, the running average, near μ, and at first with
        # m = 0, as the mean of what a new convolution gives is not far above its deviation.
        z = at_least_float32(x) - self.running_mean.view(shape)
        values = z.new_full((1,), x.numel() // x.shape[1])                # of a channel, in this process
        sums = all_sum(torch.cat([z.sum(places), (z * z).sum(places), values]))          # (2C + 1,)
        N = sums[-1].detach()
        mean, square = sums[:-1].view(2, -1) / N                          # μ - m and the mean of z², (C,)
        var = (square - mean ** 2).clamp(min=0)                           # σ², (C,)
        with torch.no_grad():
            self.running_mean += self.momentum * mean
            self.running_var.lerp_(var * N / (N - 1), self.momentum)      # unbiased, as in PyTorch's
        scale = self.weight / (var + self.eps).sqrt()
        return (z * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, and a way around them:  y = ReLU(BN(W2 ReLU(BN(W1 x))) + x)   (eq. 1).

    Where the shape changes, x goes through a 1 x 1 convolution W_s and BatchNorm first (eq. 2).
    Shape: (B, narrow, h, w) -> (B, wide, ⌈h / stride⌉, ⌈w / stride⌉).
    """

    def __init__(self, narrow: int, wide: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)    # BN has a bias of its own
        self.bn1 = BatchNorm(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(wide)
        self.downsample = None
        if stride != 1 or narrow != wide:
            self.downsample = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), BatchNorm(wide))

    def forward(self, x):
        around = x if self.downsample is None else self.downsample(x)             # -> (B, wide, h/s, w/s)
        y = torch.relu(self.bn1(self.conv1(x)))                                   # -> (B, wide, h/s, w/s)
        y = self.bn2(self.conv2(y))
        return torch.relu(y + around)


def init_weights(module):
    """torchvision's initialisation of a ResNet: Kaiming-normal convolutions, N(0, 2 / (output channels ·
    kernel area)). BatchNorm starts at 1 and 0, linear layers as PyTorch draws them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ResNet18(nn.Module):
    """The network. A smaller `width` of the first stage makes a smaller one with the same names.

    features: images (B, 3, height, width) -> map (B, D, ⌈height / 32⌉, ⌈width / 32⌉), D = 8 · width
    forward: images -> scores before the softmax (B, classes); with classes=0 there is no last layer for it.
    """

    def __init__(self, classes: int = 1000, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        narrow = width
        for i, wide in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
            first = BasicBlock(narrow, wide, 1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, BasicBlock(wide, wide, 1)))
            narrow = wide
        self.apply(init_weights)
        self.fc = nn.Linear(narrow, classes) if classes else None

    def features(self, images):
        x = torch.relu(self.bn1(self.conv1(images)))  # (B, 3, height, width) -> (B, 64, height/2, width/2)
        x = self.layer1(self.maxpool(x))              # -> (B, 64, height/4, width/4)
        x = self.layer2(x)                            # -> (B, 128, height/8, width/8)
        x = self.layer3(x)                            # -> (B, 256, height/16, width/16)
        return self.layer4(x)                         # -> (B, 512, height/32, width/32)

    def forward(self, images):
        return self.fc(self.features(images).mean(dim=(2, 3)))    # (B, D, h, w) -> (B, D) -> (B, classes)


# ---- DAN

def conv_bn(narrow: int, wide: int, *kernel: int) -> nn.Sequential:
    """A convolution that keeps height and width, then BatchNorm. Only public weights need its bias."""
    return nn.Sequential(nn.Conv2d(narrow, wide, kernel, padding="same"), BatchNorm(wide))


class SpatialAttention(nn.Module):
    """Where to look: the map F is multiplied by one number a for each place. Shape: (B, D, h, w), unchanged.

        y = BN(Conv1×1 F)                                         D -> D/2 channels
        s = ReLU(BN Conv3×3 y + BN Conv1×3 y + BN Conv3×1 y)      D/2 -> D
        a = Σ_channels s,    F' = F · a
    """

    def __init__(self, D: int):
        super().__init__()
        self.conv1x1 = conv_bn(D, D // 2, 1, 1)
        self.conv_3x3 = conv_bn(D // 2, D, 3, 3)
        self.conv_1x3 = conv_bn(D // 2, D, 1, 3)
        self.conv_3x1 = conv_bn(D // 2, D, 3, 1)

    def forward(self, F):
        y = self.conv1x1(F)                                                        # -> (B, D/2, h, w)
        s = torch.relu(self.conv_3x3(y) + self.conv_1x3(y) + self.conv_3x1(y))     # -> (B, D, h, w)
        return F * s.sum(dim=1, keepdim=True)                                      # a is (B, 1, h, w)


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


class DAN(nn.Module):
    """The network, by default the paper's, for the 8 expressions of `labels.EXPRESSIONS` in their order.

    forward: images (B, 3, height, width) -> scores before the softmax (B, M), on a scale set by BatchNorm.
    `width`: the channels of ResNet's first stage, D / 8; smaller makes everything smaller.
    The logarithm of the softmax leaves only the differences between the heads: where they agree, the scores
    do not depend on the face. So start a training from a trunk that knows faces (`load_trunk`).
    """

    def __init__(self, classes: int = len(EXPRESSIONS), heads: int = 4, width: int = 64):
        super().__init__()
        self.trunk, D = ResNet18(0, width), 8 * width
        self.heads = nn.ModuleList(nn.Sequential(OrderedDict(          # each (B, D, h, w) -> (B, D)
            spatial=SpatialAttention(D), channel=ChannelAttention(D))) for _ in range(heads))
        self.fc = nn.Linear(D, classes)
        self.bn = BatchNorm(classes)
        self.apply(init_weights)

    def parts(self, images):
        """Scores (B, M); GAP(F) (B, D), for `affinity_loss`; the heads (B, K, D), for `partition_loss`."""
        F = at_least_float32(self.trunk.features(images))              # (B, 3, height, width) -> (B, D, h, w)
        heads = torch.stack([head(F) for head in self.heads], dim=1)   # K of (B, D) -> (B, K, D)
        # Heads are sums over D channels, hundreds large: bf16 would round away what differs between them.
        with torch.autocast(F.device.type, enabled=False):
            heads = heads.log_softmax(dim=1)                           # the heads compete for each channel
            scores = self.bn(self.fc(heads.sum(dim=1)))                # (B, K, D) -> (B, D) -> (B, M)
        return scores, F.mean(dim=(2, 3)), heads

    def forward(self, images):
        return self.parts(images)[0]


class DANWithCentres(nn.Module):
    """What is trained: DAN, and a centre for each class (M, D), from N(0, 1). -> `DAN.parts`, the centres."""

    def __init__(self, dan: DAN):
        super().__init__()
        self.dan = dan
        self.centres = nn.Parameter(torch.randn(dan.fc.out_features, dan.fc.in_features))

    def forward(self, images):
        return *self.dan.parts(images), self.centres.clone()     # DDP must find its parameters in the outputs


# ---- DAN's losses beside the cross-entropy. Their sums are those of all processes, as in losses.py

def affinity_loss(features, target, valid, centres):
    """Faces of one class lie near their centre, and the centres far from each other.

        L_aff = 1/N Σ_i ‖g_i - c_{y_i}‖² / σ_c²,    σ_c² = Σ_d Var_m(c_md)

    g_i = GAP(F) of face i, y_i its class, N faces with a class; Var is the unbiased variance over the M
    classes. Shape: (B, D) features, (B,) classes, (B,) mask, (M, D) centres -> scalar; 0 if none is valid.
    """
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
    """
    B, K, D = heads.shape
    apart = heads - heads.mean(dim=1, keepdim=True)                                # (B, K, D)
    variance = (apart ** 2).sum(dim=1) / (K - 1)                                   # (B, K, D) -> (B, D)
    total, entries = all_sum(torch.stack([variance.sum(), variance.new_full((), B * D)]))
    v = total / entries.clamp(min=1)
    return torch.log(1 + K / v.clamp(min=1e-6)) * (entries > 0)


# ---- Weights: random, torchvision's, the public DAN's, our own

def build(config) -> nn.Module:
    """The network that stills.network names, with random weights: DAN with its centres, or a ResNet-18."""
    s = config.stills
    return DANWithCentres(DAN(width=s.width)) if s.network == "dan" else ResNet18(len(EXPRESSIONS), s.width)


def load_trunk(model: ResNet18, path) -> str:
    """Fill all but the last layer from a ResNet-18 with torchvision's names, whatever its classes. -> what is
    left out. Raises ValueError if the file is not that, with each name or shape that differs."""
    weights, outside = find_weights(read_checkpoint(path), ["conv1.weight"], path)
    kept = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    last = {name: value for name, value in model.state_dict().items() if name.startswith("fc.")}
    load_weights(model, kept | last, path)
    return f"left out: {', '.join([name for name in weights if name not in kept] + [*outside]) or 'nothing'}"


def translated(weights: dict) -> dict:
    """The public DAN's weights with our names, the rows of its last two layers in our order of classes."""
    ours, rows = {}, [PUBLIC_CLASS.index(name) for name in EXPRESSIONS]
    for name, value in weights.items():
        of_classes = name.startswith(("fc.", "bn.")) and value.shape[:1] == (len(rows),)
        *part, rest = name.split(".", 2)                               # cat_head0.sa, conv1x1.0.weight
        part = PUBLIC_NAMES.get(".".join(part), ".".join(part))
        ours[f"{part}.{rest.replace('attention', 'gate')}"] = value[rows] if of_classes else value
    return ours


def cnn_of(weights: dict, path) -> nn.Module:
    """A DAN or a ResNet-18, untrained, with the shapes of `weights`. ValueError if they are of neither."""
    first = weights.get("trunk.conv1.weight", weights.get("conv1.weight", torch.zeros(0)))
    last, M = weights.get("fc.weight", torch.zeros(0)), len(EXPRESSIONS)
    if first.shape[1:] != (3, 7, 7) or last.shape[:1] != (M,):
        raise ValueError(f"{path}: got {', '.join([*weights][:3])}, ..., fc.weight {tuple(last.shape)}; "
                         f"expected a ResNet-18 or a DAN that scores {M} classes, {', '.join(EXPRESSIONS)}")
    heads = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    return DAN(M, len(heads), len(first)) if heads else ResNet18(M, len(first))


def load_cnn(path) -> tuple[nn.Module, str]:
    """A CNN for EMMA, of train_cnn.py or the public DAN, its classes in our order. -> the network, what it is

    Raises ValueError if it is neither, scores other classes, or is a ResNet-18 of unknown order of classes.
    """
    checkpoint = read_checkpoint(path)
    weights, _ = find_weights(checkpoint, ["trunk.conv1.weight", "features.0.weight", "conv1.weight"], path)
    public = any(name.startswith("cat_head") for name in weights)
    if public:
        weights = translated(weights)
    elif checkpoint.get("made_of", {}).get("stage") != "stills":
        raise ValueError(f"{path}: not of train_cnn.py, so nobody knows the order of its classes; train one "
                         "from it: --set stills.start=...")
    model = cnn_of(weights, path)
    load_weights(model, weights, path)
    ours = f"our own {'DAN' if isinstance(model, DAN) else 'ResNet-18'}, {path}"
    return model, "the public DAN, its classes put into the order of ours" if public else ours
