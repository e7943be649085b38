"""ResNet-18 and DAN written out from a dictionary of names and tensors. Names by rule, as they are public."""

import torch
from torch.nn import functional as F

BLOCKS = [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]
FEATURES = {"conv1": "features.0", "bn1": "features.1", "layer1": "features.4", "layer2": "features.5",
            "layer3": "features.6", "layer4": "features.7"}


def bn_shapes(name, channels):
    shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def resnet_shapes(classes=1000, width=64, number=str):
    """torchvision's resnet18. `number` gives the first word of each name another spelling."""
    shapes = {f"{number('conv1')}.weight": (width, 3, 7, 7)} | bn_shapes(number("bn1"), width)
    for stage, block in BLOCKS:
        wide = width * 2 ** (stage - 1)
        narrow = wide // 2 if stage > 1 and block == 0 else wide
        name = f"{number(f'layer{stage}')}.{block}"
        shapes |= {f"{name}.conv1.weight": (wide, narrow, 3, 3)} | bn_shapes(f"{name}.bn1", wide)
        shapes |= {f"{name}.conv2.weight": (wide, wide, 3, 3)} | bn_shapes(f"{name}.bn2", wide)
        if narrow != wide:
            name = f"{name}.downsample"
            shapes |= {f"{name}.0.weight": (wide, narrow, 1, 1)} | bn_shapes(f"{name}.1", wide)
    return shapes | {"fc.weight": (classes, 8 * width), "fc.bias": (classes,)}


def public_dan_shapes(classes=8, width=64):
    """The public DAN checkpoint: 4 heads."""
    D, shapes = 8 * width, resnet_shapes(classes, width, lambda name: FEATURES[name])
    for head in [f"cat_head{k}" for k in range(4)]:
        for part in ("conv1x1", "conv_3x3", "conv_1x3", "conv_3x1"):
            name, (narrow, wide) = f"{head}.sa.{part}", (D, D // 2) if part == "conv1x1" else (D // 2, D)
            kernel = int(part[-3]), int(part[-1])
            shapes |= {f"{name}.0.weight": (wide, narrow, *kernel), f"{name}.0.bias": (wide,)}
            shapes |= bn_shapes(f"{name}.1", wide)
        gate = f"{head}.ca.attention"
        shapes |= {f"{gate}.0.weight": (D // 16, D), f"{gate}.0.bias": (D // 16,)}
        shapes |= {f"{gate}.3.weight": (D, D // 16), f"{gate}.3.bias": (D,)} | bn_shapes(f"{gate}.1", D // 16)
    return shapes | bn_shapes("bn", classes)


def random_weights(shapes, dtype=torch.double):
    """A tensor for each name: variances positive, the counters whole numbers, matrices of a usual size."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator, dtype=dtype)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            weights[name] = weights[name].abs() + 0.5
        elif len(shape) > 1:
            weights[name] *= (2 / weights[name][0].numel()) ** 0.5
    return weights


def layer(weights, name, x, **how):
    """A convolution or a linear layer, with or without a bias."""
    weight = weights[f"{name}.weight"]
    return (F.conv2d if weight.ndim == 4 else F.linear)(x, weight, weights.get(f"{name}.bias"), **how)


def with_bn(weights, name, bn, x, training, **how):
    """The layer, then BatchNorm, PyTorch's, which must not move the statistics in `weights`."""
    mean, variance = (weights[f"{bn}.running_{part}"].clone() for part in ("mean", "var"))
    weight, bias = weights[f"{bn}.weight"], weights[f"{bn}.bias"]
    return F.batch_norm(layer(weights, name, x, **how), mean, variance, weight, bias, training)


def resnet_map(weights, x, number=str, training=False):
    """Images (B, 3, height, width) -> the last map (B, D, h, w)."""
    x = with_bn(weights, number("conv1"), number("bn1"), x, training, stride=2, padding=3)
    x = F.max_pool2d(F.relu(x), 3, stride=2, padding=1)
    for stage, block in BLOCKS:
        name, stride = f"{number(f'layer{stage}')}.{block}", 2 if stage > 1 and block == 0 else 1
        y = with_bn(weights, f"{name}.conv1", f"{name}.bn1", x, training, stride=stride, padding=1)
        y = with_bn(weights, f"{name}.conv2", f"{name}.bn2", F.relu(y), training, padding=1)
        if f"{name}.downsample.0.weight" in weights:
            x = with_bn(weights, f"{name}.downsample.0", f"{name}.downsample.1", x, training, stride=stride)
        x = F.relu(x + y)
    return x


def public_dan(weights, images, training=False):
    """-> scores (B, classes) in the order of the public checkpoint, the map (B, D, h, w), heads (B, 4, D)."""
    features, heads = resnet_map(weights, images, FEATURES.get, training), []
    for k in range(4):
        sa, gate = f"cat_head{k}.sa", f"cat_head{k}.ca.attention"
        y = with_bn(weights, f"{sa}.conv1x1.0", f"{sa}.conv1x1.1", features, training)
        s = sum(with_bn(weights, f"{sa}.{part}.0", f"{sa}.{part}.1", y, training, padding="same")
                for part in ("conv_3x3", "conv_1x3", "conv_3x1")).relu()
        g = torch.einsum("bdhw,bhw->bd", features, s.sum(1)) / features[0, 0].numel()
        hidden = F.relu(with_bn(weights, f"{gate}.0", f"{gate}.1", g, training))
        heads.append(g * layer(weights, f"{gate}.3", hidden).sigmoid())
    heads = torch.stack(heads, dim=1).log_softmax(dim=1)                             # (B, 4, D)
    return with_bn(weights, "fc", "bn", heads.sum(1), training), features, heads
