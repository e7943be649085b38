"""The estimate by which a batch is cut into pieces (training.pieces), against what autograd keeps, and on a
GPU against the peak.

What is kept is counted at the paper's sizes without computing anything, on PyTorch's fake tensors, which have
a shape and a type only.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from cards import ON_CARD, autocast
from distributed import Team
from features import ExprClassifier
from images import normalise
from losses import au_loss, expr_loss
from mae import MaskedAutoencoder
from temporal import SegmentModel
from training import adamw, pieces, vit_bytes
from vit import VisionTransformer

SIZES = {"ViT-S": {"dim": 384, "heads": 6}, "ViT-B": {}, "ViT-L": {"dim": 1024, "depth": 24, "heads": 16}}
EVERYTHING = 10 ** 9               # images in a share: the largest piece is what fits
FRAME_KILOBYTES = 160              # of the segment model's activations, at most


# ---- What is trained: a model, a batch, its loss, and the estimate of one sample in bytes at 32 bits

def autoencoder(size):
    model = MaskedAutoencoder(**SIZES[size])
    return model, vit_bytes(model.visible + 1, *shape(model)) + vit_bytes(tokens(model) + 1, 512, 8)


def classifier(size):
    vit = VisionTransformer(**SIZES[size])
    return ExprClassifier(vit, "mean", 512, 0.1), vit_bytes(tokens(vit) + 1, *shape(vit))


def tokens(vit) -> int:
    return vit.pos_embed.shape[1] - 1


def shape(vit) -> tuple[int, int]:
    return vit.pos_embed.shape[2], len(vit.blocks)


def images_loss(model, count: int, device: str, dtype: str):
    """The loss of `count` images."""
    vit = getattr(model, "vit", model)
    height, width = (vit.patch_embed.proj.kernel_size[0] * side for side in vit.patch_embed.grid)
    images = torch.zeros(count, height, width, 3, dtype=torch.uint8, device=device)
    with autocast(device, dtype):
        if vit is model:
            return model(normalise(images), torch.rand(count, tokens(vit), device=device))[0]
        logits = model(normalise(images))
    labels = torch.zeros(count, dtype=torch.long, device=device)
    return expr_loss(logits, labels, labels == 0, count)


def segments_loss(model, count: int, window: int, device: str, dtype: str):
    """The loss of `count` segments."""
    x, target = torch.randn(count, window, 768, device=device), torch.zeros(count, window, 12, device=device)
    with autocast(device, dtype):
        outputs = model(x, torch.ones(count, window, dtype=torch.bool, device=device))
    return au_loss(outputs, target, target == 0)


def kept(model, loss, *arguments) -> int:
    """Bytes that autograd keeps for the backward pass of `loss(model, *arguments)`, less the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, *arguments)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


@pytest.fixture
def no_numbers(monkeypatch):
    """Tensors without numbers. ImageNet's mean is not kept meanwhile: another test would find it without."""
    def plain(images):
        return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    monkeypatch.setitem(globals(), "normalise", plain)
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("size", ["ViT-B", *(pytest.param(size, marks=pytest.mark.slow)
                                             for size in ("ViT-S", "ViT-L"))])
@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_the_estimate_is_what_autograd_keeps_for_an_image(no_numbers, make, size, dtype):
    model, estimate = make(size)
    two, four = (kept(model, images_loss, count, "cpu", dtype) for count in (2, 4))
    share = {"float32": 1, "bf16": 0.56}[dtype]
    assert share * estimate == pytest.approx((four - two) / 2, rel=0.06)
    # What does not depend on the images: autocast's copies of the weights.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * two - four <= {"float32": 0.01, "bf16": 2.01}[dtype] * parameters


@pytest.mark.parametrize("window", [1200, pytest.param(300, marks=pytest.mark.slow)])
def test_a_frame_takes_the_same_memory_in_segments_of_any_length(no_numbers, window):
    """Without dropout, with which the CPU's attention keeps N x N weights and a GPU's does not."""
    model = SegmentModel(dropout=0.0)
    two, four = (kept(model, segments_loss, count, window, "cpu", "bf16") for count in (2, 4))
    assert 60 < (four - two) / 2 / window / 1000 < FRAME_KILOBYTES


# ---- On a GPU

def peak(step) -> tuple[int, int]:
    """Bytes at the peak of a second step: in tensors, and taken from the GPU for them."""
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


@pytest.fixture
def card():
    torch.cuda.empty_cache()
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [pytest.param(size, marks=ON_CARD) for size in SIZES])
@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_the_largest_piece_fits_a_gpu_and_leaves_at_most_a_quarter_unused(card, make, size):
    team = Team(0, 1, card)
    model, estimate = make(size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = team.parallel(model)
    optimizer = adamw(model, 1e-4, (0.9, 0.95), 0.05)
    largest = EVERYTHING // pieces(EVERYTHING, estimate, parameters, card)

    def step():                                           # of two pieces: the gradients of the first are held
        optimizer.zero_grad(set_to_none=True)
        for count in (1, largest):
            images_loss(model, count, "cuda", "bf16").backward()
        optimizer.step()

    in_tensors, taken = peak(step)
    total = torch.cuda.get_device_properties(card).total_memory
    print(f"{make.__name__} {size}: pieces of {largest:,} images; estimate {0.8 * total / 1e9:.2f} GB, "
          f"peak {in_tensors / 1e9:.2f} GB, taken {taken / 1e9:.2f} of {total / 1e9:.2f} GB")
    assert 0.75 * total < taken < total


@pytest.mark.parametrize("window", [pytest.param(window, marks=ON_CARD) for window in (300, 600, 1200)])
def test_a_batch_of_32_segments_takes_little_memory_and_no_square_of_the_window(card, window):
    """Nothing is cut into pieces here (train_task.py), so the batch of the paper has to fit anywhere."""
    model = SegmentModel().to(card)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        segments_loss(model, 32, window, "cuda", "bf16").backward()
        optimizer.step()

    in_tensors, taken = peak(step)
    frames, parameters = 32 * window, sum(parameter.numel() for parameter in model.parameters())
    each = (in_tensors - 16 * parameters) / frames
    print(f"segments of {window} frames: peak {in_tensors / 1e9:.2f} GB, taken {taken / 1e9:.2f} GB, "
          f"{each / 1e3:.0f} kB a frame")
    assert taken < 2e9 * window / 300
    assert each < 1000 * FRAME_KILOBYTES
