"""ResNet-18, the convolutional network that sees one face (He et al. 2015, "Deep residual learning for image
recognition", table 1).

Smallest part first: BatchNorm, block, trunk, network. Parameter names and shapes are torchvision's, so that
public weights load by name. Read this file, then `dan.py`, which puts attention on the trunk.

    python cnn.py          # the parameter table, and the shapes on the way from an image to 1,000 scores

Images come as `images.normalise` makes them: RGB with ImageNet's mean and deviation, which is also what
torchvision's weights were trained with. Any image size will do: 224 x 224 gives a map of 7 x 7, 40 x 40 one
of 2 x 2.
"""

import torch
from torch import nn
from torch.nn import functional as F

from checkpoints import load_weights, read_checkpoint
from distributed import all_sum_inside, several


class BatchNorm(nn.Module):
    """Gives each channel mean 0 and variance 1, then a learned scale γ and shift β:

        y = γ · (x - μ) / √(σ² + ε) + β        (Ioffe & Szegedy 2015, algorithm 1)

    In training μ and σ² are those of the batch over all processes, so that two train as one would.
    (nn.BatchNorm takes each process's own; nn.SyncBatchNorm needs GPUs.) In evaluation they are running
    averages, of which a training step changes a tenth. Names and numbers are nn.BatchNorm's.

    Shape: (B, C) or (B, C, h, w), unchanged. A process may have B = 0 in training, but not all of them.
    A batch must be passed at once, not accumulated in pieces: each piece would have its own μ and σ².
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))      # only because public files have it

    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
        if not (self.training and several()):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                                self.momentum, self.eps)
        places = (0, 2, 3)[:x.ndim - 1]                                   # all dimensions but the channels
        shape = (1, -1) + (1,) * (x.ndim - 2)                             # (C,) as (1, C) or (1, C, 1, 1)
        z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        values = z.new_tensor([x.numel() // x.shape[1]])                  # of a channel, in this process
        sums = all_sum_inside(torch.cat([z.sum(places), values]))         # (C + 1,)
        N = sums[-1].detach()
        mu = sums[:-1] / N                                                # μ, (C,)
        centred = z - mu.view(shape)
        var = all_sum_inside((centred ** 2).sum(places)) / N              # σ², (C,)
        with torch.no_grad():
            self.running_mean.lerp_(mu, self.momentum)
            self.running_var.lerp_(var * N / (N - 1), self.momentum)      # unbiased, as in nn.BatchNorm
        scale = self.weight / (var + self.eps).sqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


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
            self.downsample = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False),
                                            BatchNorm(wide))

    def forward(self, x):
        around = x if self.downsample is None else self.downsample(x)             # -> (B, wide, h/s, w/s)
        y = torch.relu(self.bn1(self.conv1(x)))                                   # -> (B, wide, h/s, w/s)
        y = self.bn2(self.conv2(y))
        return torch.relu(y + around)


def stage(narrow: int, wide: int, stride: int) -> nn.Sequential:
    """Two blocks, of which the first may halve height and width."""
    return nn.Sequential(BasicBlock(narrow, wide, stride), BasicBlock(wide, wide, 1))


def init_weights(module):
    """torchvision's initialisation of a ResNet: Kaiming-normal convolutions, N(0, 2 / (output channels ·
    kernel area)). BatchNorm starts at 1 and 0, linear layers as PyTorch draws them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Trunk(nn.Module):
    """ResNet-18 up to its last map of features.

    Shape: images (B, 3, height, width) -> (B, D, ⌈height / 32⌉, ⌈width / 32⌉), D = 8 · width of the first
    stage, by default 512. A smaller `width` makes a smaller network with the same names.
    Raises ValueError for images that are not (B, 3, height, width).
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.dim = 8 * width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.apply(init_weights)

    def forward(self, images):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B, 3, height, width), got {tuple(images.shape)}")
        x = torch.relu(self.bn1(self.conv1(images)))  # (B, 3, height, width) -> (B, 64, height/2, width/2)
        x = self.maxpool(x)                           # -> (B, 64, height/4, width/4)
        x = self.layer1(x)
        x = self.layer2(x)                            # -> (B, 128, height/8, width/8)
        x = self.layer3(x)                            # -> (B, 256, height/16, width/16)
        return self.layer4(x)                         # -> (B, 512, height/32, width/32)


class ResNet18(Trunk):
    """The whole network: the mean of the map's positions, then one linear layer.

    Shape: images (B, 3, height, width) -> scores before the softmax (B, classes).
    """

    def __init__(self, classes: int = 1000, width: int = 64):
        super().__init__(width)
        self.fc = nn.Linear(self.dim, classes)

    def forward(self, images):
        x = super().forward(images)
        return self.fc(x.mean(dim=(2, 3)))            # (B, D, h, w) -> (B, D) -> (B, classes)


def load_trunk(trunk: Trunk, path) -> str:
    """Fill a trunk from a ResNet-18 with torchvision's names, whatever its classes. -> what was left out

    The file holds the names themselves, or has them under `model` or `state_dict`.
    Raises ValueError if it is not a whole checkpoint, or has other names or shapes (which are listed).
    """
    weights = read_checkpoint(path)
    weights = weights.get("model", weights.get("state_dict", weights))
    # Files of before 2018 lack these counters, which nothing here uses.
    counters = {name: value for name, value in trunk.state_dict().items()
                if name.endswith(".num_batches_tracked")}
    if isinstance(weights, dict):
        weights = counters | weights
    _, ignored = load_weights(trunk, weights, path, may_ignore=("fc.",))
    return f"left out: {', '.join(ignored) or 'nothing'}"


if __name__ == "__main__":
    torch.manual_seed(0)
    model = ResNet18().eval()
    for name, part in model.named_children():
        print(f"{name:12s}{sum(p.numel() for p in part.parameters()):12,d} parameters")
    print(f"{'in all':12s}{sum(p.numel() for p in model.parameters()):12,d} parameters")
    image = torch.randn(1, 3, 224, 224)
    print(f"\none 224 x 224 image becomes a map of {tuple(Trunk.forward(model, image).shape)}, "
          f"and that {tuple(model(image).shape)} scores")
