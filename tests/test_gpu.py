"""Every model and every loss in bf16, and on a GPU in float32 too, against the CPU in float32.

    pytest -m gpu          # the GPU's half: of this file and of test_gpu_memory.py and test_gpu_runs.py
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dan
import losses
from cards import ON_CARD, autocast
from cnn import ResNet18
from cotex import CoTEX, cotex_loss
from dan import DAN
from emma import EMMA, emma_losses
from features import ExprClassifier
from mae import MaskedAutoencoder
from tcn import TemporalConvNet
from temporal import SegmentModel
from vit import VisionTransformer

VIT = {"image_size": 32, "patch": 8, "dim": 32, "depth": 2, "heads": 2}             # N = 16 patches
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
LEVELS = {"channels": (16, 8), "kernels": (5, 3), "dilations": (1, 2)}
LAYERS = {"width": 16, "layers": 2, "hidden": 16, "head": 16, "dropout": 0.0}
B, T = 6, 50


def images(side=32):
    return torch.randn(B, 3, side, side)


def real_frames():
    """Segments of 1 to T real frames: (B, T)."""
    return torch.arange(T) < torch.tensor([T, 1, 7, T, 30, 12])[:B, None]


def some(*shape):
    """Which entries are valid; some are not."""
    return torch.rand(*shape) < 0.7


class Autoencoder(MaskedAutoencoder):
    """The MAE's loss alone; its reconstruction is in it."""

    def forward(self, images, noise):
        return super().forward(images, noise)[0]


class Parts(DAN):
    """What DAN's losses take, with the losses themselves."""

    def forward(self, images):
        scores, features, heads = self.parts(images)
        centres = torch.linspace(-1, 1, 8 * features.shape[1], device=images.device).view(8, -1)
        target = torch.arange(len(images), device=images.device) % 8
        near = dan.affinity_loss(features, target, target >= 0, centres)
        return scores.mean() + near + dan.partition_loss(heads)


def dan_with_known_trunk():
    model = Parts(width=8)
    for parameter in model.parameters():           # no head is nearly 0, as none is after a training
        nn.init.normal_(parameter, std=0.2)
    return model


class Loss(nn.Module):
    """A loss as a model, whose only parameter is the prediction."""

    def __init__(self, loss, pred, *arguments):
        super().__init__()
        self.loss, self.pred, self.count = loss, nn.Parameter(pred), len(arguments)
        for i, argument in enumerate(arguments):
            self.register_buffer(f"argument{i}", argument)

    def forward(self):
        pred = self.pred.bfloat16() if torch.is_autocast_enabled(self.pred.device.type) else self.pred
        return self.loss(pred, *(getattr(self, f"argument{i}") for i in range(self.count)))


def emma_labels():
    labels = torch.cat([torch.rand(B * T, 2), torch.randint(8, (B * T, 1)), torch.randint(2, (B * T, 12))], 1)
    return labels.where(some(B * T, 15), torch.tensor([-5.0] * 2 + [-1.0] * 13))


# Each gives a model and what it takes.
MODELS = {
    "vit": lambda: (VisionTransformer(**VIT), images()),
    "mae": lambda: (Autoencoder(**VIT, **DECODER), images(), torch.rand(B, 16)),
    "mae, normalised": lambda: (Autoencoder(**VIT, **DECODER, norm_pix_loss=True), images(),
                                torch.rand(B, 16)),
    "classifier": lambda: (ExprClassifier(VisionTransformer(**VIT), "mean", 16, 0.0), images()),
    "cotex": lambda: (CoTEX(**VIT), images(), torch.rand(B, 2, 16)),
    "emma": lambda: (EMMA(VisionTransformer(**VIT), DAN(width=4), hidden=16, va_hidden=16), images()),
    "resnet": lambda: (ResNet18(8, width=8), images(64)),
    "dan": lambda: (dan_with_known_trunk(), images(64)),
    "tcn": lambda: (TemporalConvNet(12, (16, 8), (3, 5), (1, 2), True, 0.0), torch.randn(B, T, 12),
                    real_frames()),
    "segment model": lambda: (SegmentModel(12, 12, causal=False, **LEVELS, **LAYERS), torch.randn(B, T, 12),
                              real_frames()),
    "transformer alone": lambda: (SegmentModel(12, 2, tcn=False, **LAYERS), torch.randn(B, T, 12),
                                  real_frames())}
LOSSES = {
    "ccc": lambda: (losses.ccc_loss, torch.randn(B, T, 2), torch.rand(B, T, 2) * 2 - 1, some(B, T, 2)),
    "expr": lambda: (losses.expr_loss, torch.randn(B, T, 8), torch.randint(8, (B, T)), some(B, T)),
    "au": lambda: (losses.au_loss, torch.randn(B, T, 12), torch.randint(2, (B, T, 12)), some(B, T, 12)),
    "weighted au": lambda: (losses.weighted_au_loss, torch.randn(B, T, 12), torch.randint(2, (B, T, 12)),
                            some(B, T, 12), torch.rand(12) * 9),
    "js": lambda: (lambda z, valid: losses.js_loss(list(z), valid), 3 * torch.randn(2, B, 6), some(B)),
    "cotex": lambda: (lambda z, y, valid: cotex_loss(z, y, valid, 16.7), torch.randn(2, B, 6),
                      torch.randint(6, (B,)), some(B)),
    "emma": lambda: (lambda *given: emma_losses(*given).sum(), torch.randn(B * T, 22), emma_labels(),
                     torch.rand(12) * 9)}


def computed(make, device: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model gives, and the gradient of all its parameters as one vector: on the CPU, in float32."""
    torch.manual_seed(0)
    model, *inputs = make()
    model.to(device)
    with autocast(device, dtype):
        outputs = model(*(x.to(device) for x in inputs))
    outputs = outputs.float()
    weights = torch.linspace(0.5, 1.5, outputs.shape[-1] if outputs.ndim else 1, device=device)
    (outputs * weights).sum().backward()          # all of one sign, so that no small difference is left over
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return outputs.detach().cpu(), torch.cat(gradients).float().cpu()


def far(ours, expected) -> float:
    """The difference as a share of the length."""
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def no_tf32():
    """TF32 would round the factors of a float32 product to 10 bits, on a GPU only."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee"
    yield
    torch.backends.fp32_precision = before


# How far outputs and gradient may be off. bf16 has 8 bits, so a rounding is 0.4 %. BatchNorm over 6 small
# maps, and the difference between DAN's heads, make much of it.
LIMITS = {"float32": (1e-5, 1e-4), "bf16": (0.02, 0.06)}
WIDE = {("resnet", "bf16"): (0.06, 0.6), ("dan", "bf16"): (0.02, 0.6), ("emma", "bf16"): (0.1, 0.06),
        ("resnet", "float32"): (1e-4, 1e-3), ("dan", "float32"): (1e-4, 1e-3),
        ("emma", "float32"): (1e-4, 1e-4)}
PLACES = [("cpu", "bf16"), pytest.param("cuda", "float32", marks=ON_CARD),
          pytest.param("cuda", "bf16", marks=ON_CARD)]


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_what_the_cpu_gives_in_float32(name, device, dtype):
    ours, expected = computed(MODELS[name], device, dtype), computed(MODELS[name], "cpu", "float32")
    outputs, gradient = WIDE.get((name, dtype), LIMITS[dtype])
    assert far(ours[0], expected[0]) < outputs
    assert far(ours[1], expected[1]) < gradient


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_the_cpu_makes_of_float32(name, device, dtype):
    def make():
        return (Loss(*LOSSES[name]()),)

    ours, expected = computed(make, device, dtype), computed(make, "cpu", "float32")
    limit = {"float32": 1e-5, "bf16": 0.02}[dtype]
    assert far(ours[0], expected[0]) < limit
    assert far(ours[1], expected[1]) < limit


# ---- Nothing to learn from

@pytest.mark.filterwarnings("ignore:var")              # of no patch at all: the MAE normalises them
@pytest.mark.parametrize("device, dtype", [*PLACES, ("cpu", "float32")])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"dan"}))           # BatchNorm refuses a batch of 0
def test_an_empty_share_gives_a_gradient_of_0_for_each_parameter(name, device, dtype):
    model, *inputs = MODELS[name]()
    model.to(device)
    if name == "resnet":
        model.eval()
    with autocast(device, dtype):
        outputs = model(*(x[:0].to(device) for x in inputs))
    outputs.float().sum().backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad.count_nonzero() == 0


@pytest.mark.parametrize("device, dtype", [*PLACES, ("cpu", "float32")])
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"emma"}))          # EMMA's labels say what is valid
def test_a_batch_in_which_nothing_is_valid_costs_0(name, device, dtype):
    loss, pred, *arguments = LOSSES[name]()
    at = [i for i, argument in enumerate(arguments) if argument.dtype == torch.bool][0]
    arguments[at] = torch.zeros_like(arguments[at])
    model = Loss(loss, torch.full_like(pred, torch.nan), *arguments).to(device)
    with autocast(device, dtype):
        cost = model()
    cost.backward()
    assert cost == 0 and model.pred.grad.count_nonzero() == 0


# ---- What a GPU's matrix units are for

class Products(TorchDispatchMode):
    """Counts matrix products and convolutions by the type of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.kinds = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__
        if any(word in name for word in ("mm", "convolution", "attention")):
            tensors = [x for x in arguments if torch.is_tensor(x) and x.is_floating_point() and x.ndim > 1]
            self.kinds.setdefault(name, set()).update(x.dtype for x in tensors)
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("name", ["mae", "classifier", "segment model"])
def test_every_matrix_product_of_a_step_is_in_bf16_so_tf32_has_nothing_to_do(name):
    model, *inputs = MODELS[name]()
    with Products() as counted:
        with autocast("cpu", "bf16"):
            outputs = model(*inputs)
        outputs.float().sum().backward()
    # Besides q, k and v it takes the sums of the softmax, which are float32.
    del counted.kinds["_scaled_dot_product_flash_attention_for_cpu_backward.default"]
    assert len(counted.kinds) >= 3
    assert set.union(*counted.kinds.values()) == {torch.bfloat16}, counted.kinds
