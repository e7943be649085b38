"""ResNet-18 and DAN written out with torch.nn.functional, from a dictionary of names and tensors: what the
tests of cnn.py and dan.py compare with. Names by rule, from what is public; nothing of the project is used.
"""

import torch
from torch.nn import functional as F

BLOCKS = [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]


# ---- Names and shapes, by rule

def bn_shapes(name, channels):
    shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def trunk_shapes(width=64, number=str):
    """torchvision's resnet18 without fc. `number` gives the first word of each name another spelling."""
    shapes = {f"{number('conv1')}.weight": (width, 3, 7, 7)} | bn_shapes(number("bn1"), width)
    for stage, block in BLOCKS:
        wide = width * 2 ** (stage - 1)
        narrow = wide // 2 if stage > 1 and block == 0 else wide
        name = f"{number(f'layer{stage}')}.{block}"
        shapes[f"{name}.conv1.weight"] = (wide, narrow, 3, 3)
        shapes |= bn_shapes(f"{name}.bn1", wide)
        shapes[f"{name}.conv2.weight"] = (wide, wide, 3, 3)
        shapes |= bn_shapes(f"{name}.bn2", wide)
        if narrow != wide:
            shapes[f"{name}.downsample.0.weight"] = (wide, narrow, 1, 1)
            shapes |= bn_shapes(f"{name}.downsample.1", wide)
    return shapes


def resnet_shapes(classes=1000, width=64):
    return trunk_shapes(width) | {"fc.weight": (classes, 8 * width), "fc.bias": (classes,)}


FEATURES = {"conv1": "features.0", "bn1": "features.1", "layer1": "features.4", "layer2": "features.5",
            "layer3": "features.6", "layer4": "features.7"}


def public_dan_shapes(classes=8, width=64):
    """The public DAN checkpoint: 4 heads."""
    D, shapes = 8 * width, trunk_shapes(width, FEATURES.get)
    for k in range(4):
        kernels = {"conv1x1": (1, 1), "conv_3x3": (3, 3), "conv_1x3": (1, 3), "conv_3x1": (3, 1)}
        for name, kernel in kernels.items():
            narrow, wide = (D, D // 2) if name == "conv1x1" else (D // 2, D)
            shapes[f"cat_head{k}.sa.{name}.0.weight"] = (wide, narrow, *kernel)
            shapes[f"cat_head{k}.sa.{name}.0.bias"] = (wide,)
            shapes |= bn_shapes(f"cat_head{k}.sa.{name}.1", wide)
        gate = f"cat_head{k}.ca.attention"
        shapes |= {f"{gate}.0.weight": (D // 16, D), f"{gate}.0.bias": (D // 16,)}
        shapes |= bn_shapes(f"{gate}.1", D // 16)
        shapes |= {f"{gate}.3.weight": (D, D // 16), f"{gate}.3.bias": (D,)}
    return shapes | {"fc.weight": (classes, D), "fc.bias": (classes,)} | bn_shapes("bn", classes)


def random_weights(shapes, seed=0, dtype=torch.double):
    """A tensor for each name: variances positive, the counters whole numbers, matrices of a usual size."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=dtype)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif name.endswith("running_var"):
            value = value.abs() + 0.5
        elif len(shape) > 1:
            value = value * (2 / value[0].numel()) ** 0.5
        elif name.endswith("weight"):
            value = 1 + 0.2 * value
        weights[name] = value
    return weights


# ---- The networks

def batch_norm(weights, name, x, training=False):
    """(x - mean) / deviation · weight + bias; in training the batch's own mean and deviation."""
    places = (0, 2, 3)[:x.ndim - 1] if x.ndim == 4 else (0,)
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    if training:
        mean, variance = x.mean(places), x.var(places, correction=0)
    else:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scale = weights[f"{name}.weight"] / (variance + 1e-5).sqrt()
    return (x - mean.view(shape)) * scale.view(shape) + weights[f"{name}.bias"].view(shape)


def resnet_map(weights, x, number=str, training=False):
    """Images (B, 3, height, width) -> the last map (B, D, h, w)."""
    x = F.conv2d(x, weights[f"{number('conv1')}.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(batch_norm(weights, number("bn1"), x, training)), 3, stride=2, padding=1)
    for stage, block in BLOCKS:
        name, stride = f"{number(f'layer{stage}')}.{block}", 2 if stage > 1 and block == 0 else 1
        y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = F.relu(batch_norm(weights, f"{name}.bn1", y, training))
        y = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1)
        y = batch_norm(weights, f"{name}.bn2", y, training)
        if f"{name}.downsample.0.weight" in weights:
            x = F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride)
            x = batch_norm(weights, f"{name}.downsample.1", x, training)
        x = F.relu(x + y)
    return x


def public_dan(weights, images, training=False):
    """-> scores (B, classes) in the order of the public checkpoint, the map (B, D, h, w), heads (B, 4, D)."""
    features, heads = resnet_map(weights, images, FEATURES.get, training), []
    for k in range(4):
        def conv(name, x):
            weight, bias = (weights[f"cat_head{k}.sa.{name}.0.{part}"] for part in ("weight", "bias"))
            padding = (weight.shape[2] // 2, weight.shape[3] // 2)
            y = F.conv2d(x, weight, bias, padding=padding)
            return batch_norm(weights, f"cat_head{k}.sa.{name}.1", y, training)
        y = conv("conv1x1", features)
        s = F.relu(conv("conv_3x3", y) + conv("conv_1x3", y) + conv("conv_3x1", y))
        g = torch.einsum("bdhw,bhw->bd", features, s.sum(1)) / features[0, 0].numel()
        gate, name = g, f"cat_head{k}.ca.attention"
        gate = gate @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
        gate = F.relu(batch_norm(weights, f"{name}.1", gate, training))
        gate = gate @ weights[f"{name}.3.weight"].T + weights[f"{name}.3.bias"]
        heads.append(g / (1 + torch.exp(-gate)))
    heads = torch.stack(heads, dim=1)                                                # (B, 4, D)
    heads = heads - heads.amax(dim=1, keepdim=True)                        # no exponential overflows
    heads = heads - heads.exp().sum(dim=1, keepdim=True).log()
    scores = heads.sum(dim=1) @ weights["fc.weight"].T + weights["fc.bias"]
    return batch_norm(weights, "bn", scores, training), features, heads
