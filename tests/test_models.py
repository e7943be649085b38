"""What holds for every model of the method: refusals, names, learning (gradients, bf16: test_gpu.py)."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mae import MaskedAutoencoder
from models import MAE, SEGMENT, VIT, learn, small
from temporal import SegmentModel
from vit import VisionTransformer, sincos_positions

REFUSALS = [
    *[(VisionTransformer, VIT | dict(image_size=size), f"image_size={size}: expected multiples of patch=4")
      for size in [(10, 12), (8, 1)]],
    *[(MaskedAutoencoder, MAE | dict(mask_ratio=ratio),
       f"mask_ratio={ratio} leaves {visible} of 6 patches visible; at least one must be visible")
      for ratio, visible in [(0.9, 0), (0.0, 6), (-0.2, 7)]]]


@pytest.mark.parametrize("kind, sizes, message", REFUSALS)
def test_sizes_that_cannot_be_are_refused(kind, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**sizes)


@pytest.mark.parametrize("kind, sizes", [(VisionTransformer, VIT), (MaskedAutoencoder, MAE)])
def test_images_and_noise_of_another_shape_are_refused(kind, sizes):
    model, given = small(kind, sizes), [torch.rand(2, 6)] * (kind is MaskedAutoencoder)
    for shape in ((2, 3, 9, 13), (2, 3, 12, 8), (2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"expected images \(B, C, 8, 12\), got"):
            model(torch.zeros(shape), *given)
    for shape in ((1, 6), (2, 5), (2, 6, 1)) if given else ():
        with pytest.raises(ValueError, match=r"expected noise \(2, 6\) \(images, patches\), got"):
            model(torch.zeros(2, 3, 8, 12), torch.rand(shape))


# ---- Names and sizes, which checkpoints of others and of earlier versions have

def named(shapes: dict) -> dict:
    """A weight of each shape, and its bias as long as the weight has rows."""
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in shapes.items() for kind in ("weight", "bias")}


def block(name, D, hidden, mlp=".mlp"):
    """Of a Transformer. The ViT's names are those of the reference MAE and of timm."""
    return named({f"{name}.norm1": (D,), f"{name}.attn.qkv": (3 * D, D), f"{name}.attn.proj": (D, D),
                  f"{name}.norm2": (D,), f"{name}{mlp}.fc1": (hidden, D), f"{name}{mlp}.fc2": (D, hidden)})


def level(name, D_in, D_out):
    """Of the TCN."""
    shapes = named({f"{name}.shortcut": (D_out, D_in)}) | {f"{name}.act{i}.weight": (1,) for i in (1, 2, 3)}
    for conv, D in (("conv1", D_in), ("conv2", D_out)):
        shapes |= {f"{name}.{conv}.conv.parametrizations.weight.original0": (D_out, 1, 1),
                   f"{name}.{conv}.conv.parametrizations.weight.original1": (D_out, D, 3),
                   f"{name}.{conv}.conv.bias": (D_out,)}
    return shapes


MAE_NAMES = {"cls_token": (1, 1, 16), "pos_embed": (1, 7, 16), "mask_token": (1, 1, 12),
             "decoder_pos_embed": (1, 7, 12), **block("blocks.0", 16, 64), **block("blocks.1", 16, 64),
             **block("decoder_blocks.0", 12, 48), **named({"patch_embed.proj": (16, 3, 4, 4), "norm": (16,)}),
             **named({"decoder_embed": (12, 16), "decoder_norm": (12,), "decoder_pred": (48, 12)})}
SEGMENT_NAMES = {**level("tcn.levels.0", 6, 5), **level("tcn.levels.1", 5, 4),
                 **block("transformer.layers.0", 8, 7, ""), **block("transformer.layers.1", 8, 7, ""),
                 **named({"transformer.project": (8, 4), "head.0": (5, 8), "head.1": (5,), "head.2": (3, 5)})}


@pytest.mark.parametrize("kind, sizes, names", [(MaskedAutoencoder, MAE, MAE_NAMES),
                                                (SegmentModel, SEGMENT, SEGMENT_NAMES)])
def test_parameters_have_the_names_and_shapes_of_the_reference_mae_and_of_old_checkpoints(kind, sizes, names):
    assert {name: tuple(value.shape) for name, value in small(kind, sizes).state_dict().items()} == names


def test_the_papers_models_have_their_known_numbers_of_parameters():
    def parameters(part):
        return sum(p.numel() for p in part.parameters())

    with torch.device("meta"):
        vit, mae, segments = VisionTransformer(), MaskedAutoencoder(), SegmentModel()
    assert (parameters(vit), parameters(mae), parameters(segments)) == (85_798_656, 111_907_840, 20_513_941)
    assert [parameters(part) for part in segments.children()] == [7_689_097, 12_689_920, 134_924]
    assert vit.pos_embed.shape == (1, 197, 768) and mae.decoder_pos_embed.shape == (1, 197, 512)
    assert mae.visible == 49 and segments.tcn.receptive_field == 57
    assert [block.attn.heads for block in mae.blocks] == [12] * 12
    assert [block.attn.heads for block in mae.decoder_blocks] == [16] * 8
    assert [layer.attn.heads for layer in segments.transformer.layers] == [4] * 8


def test_weights_start_as_in_mae():
    model = small(MaskedAutoencoder, MAE, dim=64, depth=1, decoder_dim=64, decoder_heads=2)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.ndim in (2, 4):                                       # Xavier-uniform: up to √(6 / (in + out))
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert abs(p.std() * math.sqrt(3) - bound) < 0.03 * bound, name
        else:
            assert torch.equal(p, sincos_positions(64, (2, 3))) if "pos" in name else 0.015 < p.std() < 0.025
    assert [p.requires_grad for p in model.parameters()].count(False) == 2       # both position tables


# ---- Learning

@pytest.mark.parametrize("token", ["mean", "cls"])
def test_eight_random_images_are_learned_by_heart(token):
    model, head = small(VisionTransformer, VIT), nn.Linear(16, 8)
    images, labels = torch.randn(8, 3, 8, 12), torch.arange(8)
    last = learn(lambda: F.cross_entropy(head(model.features(images, token)), labels), model, head,
                 steps=90, lr=5e-3)
    assert last < 0.1                                                # log 8 = 2.08 at chance


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_four_images_are_rebuilt_by_heart_whatever_is_hidden(norm_pix_loss):
    model = small(MaskedAutoencoder, MAE, channels=1, dim=32, decoder_dim=32, decoder_heads=2,
                  norm_pix_loss=norm_pix_loss)
    images = torch.randn(4, 1, 8, 12).repeat(4, 1, 1, 1)             # each under four masks, new at each step
    assert learn(lambda: model(images, torch.rand(16, 6))[0], model, steps=220, lr=5e-3) < 0.07      # grey: 1


@pytest.mark.parametrize("parts", [dict(), dict(tcn=False), dict(transformer=False)], ids=str)
def test_a_handful_of_segments_is_learned_by_heart(parts):
    model = small(SegmentModel, SEGMENT, outputs=4, channels=(16, 16), width=16, hidden=16, head=16, **parts)
    x, valid = torch.randn(3, 12, 6), torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    labels = torch.randint(4, (3, 12))
    last = learn(lambda: F.cross_entropy(model(x, valid)[valid], labels[valid]), model, steps=120, lr=1e-2)
    assert last < 0.1                                                # log 4 = 1.39 at chance
