"""What holds for every model of the method: gradients, empty shares, bf16, neighbours, refusals, names,
learning."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mae import MaskedAutoencoder
from models import MAE, SEGMENT, TCN, VIT, learn, shuffled, small
from tcn import TemporalConvNet
from temporal import SegmentModel
from vit import VisionTransformer, sincos_positions

# name -> class, sizes, the shape of one sample
MODELS = {"vit": (VisionTransformer, VIT, (3, 8, 12)),
          "vit of depth 1 and 4 channels": (VisionTransformer, VIT | dict(depth=1, channels=4), (4, 8, 12)),
          "mae": (MaskedAutoencoder, MAE, (3, 8, 12)),
          "mae, normalised pixels": (MaskedAutoencoder, MAE | dict(norm_pix_loss=True), (3, 8, 12)),
          "segments": (SegmentModel, SEGMENT, (9, 6)),
          "segments, centred": (SegmentModel, SEGMENT | dict(causal=False), (9, 6)),
          "segments without tcn": (SegmentModel, SEGMENT | dict(tcn=False), (9, 6)),
          "segments without transformer": (SegmentModel, SEGMENT | dict(transformer=False), (9, 6)),
          "single frames": (SegmentModel, SEGMENT | dict(tcn=False, transformer=False), (9, 6)),
          "tcn": (TemporalConvNet, TCN, (9, 6))}
each_model = pytest.mark.parametrize("kind, sizes, sample", MODELS.values(), ids=MODELS)


def samples(sample, B=3, dtype=torch.double):
    torch.manual_seed(1)
    return torch.randn(B, *sample, dtype=dtype)


def output(model, x):
    """(B, ...): of an MAE the prediction, with the same noise for each image."""
    if isinstance(model, MaskedAutoencoder):
        return model(x, torch.rand(6, generator=torch.Generator().manual_seed(0)).expand(len(x), -1))[1]
    return model(x)


def loss_of(model, x):
    if isinstance(model, MaskedAutoencoder):
        return model(x)[0]
    y = output(model, x)
    return (y * torch.linspace(0, 1, y.shape[-1])).sum()


@each_model
def test_gradients_reach_every_parameter_but_the_positions(kind, sizes, sample):
    model = shuffled(small(kind, sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss_of(model, 5 * samples(sample)).backward()                   # so that each PReLU sees both sides
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.endswith("pos_embed"), name
        assert p.grad is None if name.endswith("pos_embed") else p.grad.norm() > 0, name


@each_model
def test_a_sample_does_not_depend_on_the_others_in_its_batch_in_training_either(kind, sizes, sample):
    model, x = shuffled(small(kind, sizes)).train(), samples(sample)
    assert torch.allclose(output(model, x)[1:2], output(model, x[1:2]), rtol=1e-10, atol=1e-11)
    assert not list(model.buffers())                                 # no running statistics


@each_model
def test_inputs_of_another_shape_are_refused(kind, sizes, sample):
    expected = "images (B, {}, {}, {})" if len(sample) == 3 else "(B, T, {1})"
    for shape in ((2, *sample[::-1]), (2, *sample[:-1], sample[-1] + 1), sample, (1, 2, *sample)):
        message = f"expected {expected.format(*sample)}, got {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            small(kind, sizes)(torch.zeros(shape))


REFUSALS = [
    (VisionTransformer, VIT | dict(heads=3), "dim=16 is not divisible by heads=3; try heads=1"),
    (VisionTransformer, VIT | dict(dim=18),
     "dim=18 is not divisible by 4 (sine and cosine of row and column); try 20"),
    *[(VisionTransformer, VIT | dict(image_size=size),
       f"image_size={size} is not a multiple of patch=4; try image_size={fit}")
      for size, fit in [((10, 12), (8, 12)), ((8, 1), (8, 4))]],
    *[(VisionTransformer, VIT | dict(drop_path=rate), f"drop_path={rate}: expected 0 or more, and below 1")
      for rate in (-0.1, 1, math.nan)],
    *[(MaskedAutoencoder, MAE | dict(mask_ratio=ratio),
       f"mask_ratio={ratio} leaves {visible} of 6 patches visible; at least one must be visible")
      for ratio, visible in [(0.9, 0), (0.0, 6), (-0.2, 7)]],
    (SegmentModel, SEGMENT | dict(heads=3), "dim=8 is not divisible by heads=3; try heads=1"),
    *[(TemporalConvNet, TCN | change, "one entry per level is needed in each list, got channels=[")
      for change in (dict(kernels=(3,)), dict(dilations=()), dict(channels=(), kernels=(), dilations=()))],
    *[(TemporalConvNet, TCN | dict(kernels=(k, 3), dilations=(d, 1), causal=causal),
       f"kernel={k}, dilation={d}, causal={causal}: both must be at least 1, and a centred kernel odd; "
       f"try kernel={odd}") for k, d, causal, odd in [(0, 1, True, 1), (3, 0, True, 3), (4, 1, False, 5)]]]


@pytest.mark.parametrize("kind, sizes, message", REFUSALS)
def test_sizes_that_cannot_be_are_refused_with_some_that_can(kind, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**sizes)


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
    assert learn(lambda: model(images)[0], model, steps=220, lr=5e-3) < 0.07         # 1 is a grey guess


@pytest.mark.parametrize("parts", [dict(), dict(tcn=False), dict(transformer=False)], ids=str)
def test_a_handful_of_segments_is_learned_by_heart(parts):
    model = small(SegmentModel, SEGMENT, outputs=4, channels=(16, 16), width=16, hidden=16, head=16, **parts)
    x, valid = torch.randn(3, 12, 6), torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    labels = torch.randint(4, (3, 12))
    last = learn(lambda: F.cross_entropy(model(x, valid)[valid], labels[valid]), model, steps=120, lr=1e-2)
    assert last < 0.1                                                # log 4 = 1.39 at chance
