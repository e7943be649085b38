"""Masked CoTEX against patches picked by hand, its loss by hand; what the views share; learning; and
what train_cotex.py refuses."""

import math
import re

import pytest
import torch
from PIL import Image

from engine.config import load
from models import learn
from processes import ALONE
from second_paper import train_cotex
from second_paper.cotex import CoTEX, cotex_loss

TINY = dict(image_size=(8, 12), patch=4, dim=16, depth=2, heads=2)              # N = 6 patches


def tiny(views=2, mask_ratio=0.5):
    """A model with random values for all parameters but the positions: a head near 0 would hide mistakes."""
    torch.manual_seed(0)
    model = CoTEX(6, views, mask_ratio, **TINY).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    return model


def batch(B=6, views=2):
    """images (B, 3, 8, 12), labels (B,), of which one is missing, noise (B, V, N)"""
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, 8, 12, generator=rng, dtype=torch.double)
    return images, torch.tensor([0, 5, -1, 2, 4, 1])[:B], torch.rand(B, views, 6, generator=rng)


# ---- The forward pass

def test_the_pair_of_vit_b_has_its_known_numbers_of_parameters_and_kept_patches():
    with torch.device("meta"):
        kept = [CoTEX(mask_ratio=ratio, depth=0).kept for ratio in (0, 0.5, 0.75, 0.9, 0.994)]
        sizes = [sum(p.numel() for p in CoTEX(views=views).parameters()) for views in (2, 1)]
    assert kept == [196, 98, 49, 19, 1] and sizes == [171_606_540, 85_798_656 + 768 * 6 + 6]


def by_hand(view, image, kept):
    """The logits of a view of one image: the patches `kept` (their numbers) are cut out, in image order."""
    vit, tokens = view.vit, [view.vit.cls_token[0, 0] + view.vit.pos_embed[0, 0]]
    for n in kept:
        top, left = 4 * (n // 3), 4 * (n % 3)
        pixels = image[:, top:top + 4, left:left + 4].flatten()
        projected = vit.patch_embed.proj.weight.flatten(1) @ pixels + vit.patch_embed.proj.bias
        tokens.append(projected + vit.pos_embed[0, 1 + n])
    x = torch.stack(tokens)[None]
    for block in vit.blocks:
        x = block(x)
    return view.head.weight @ vit.norm(x)[0, 0] + view.head.bias


@pytest.mark.parametrize("views, ratio, count", [(1, 0.5, 3), (3, 0.4, 3), (2, 0.75, 1), (2, 0, 6)])
def test_each_view_sees_the_patches_with_the_smallest_noise_of_its_own_in_evaluation_all(views, ratio, count):
    model, (images, _, noise) = tiny(views, ratio), batch(views=views)
    logits, whole = model(images, noise if ratio else None), model.eval()(images)
    assert logits.shape == (views, 6, 6) and torch.equal(whole, model(images, noise))
    for v, view in enumerate(model.views):
        for b in range(6):
            u = noise[b, v].tolist()
            kept = sorted(sorted(range(6), key=u.__getitem__)[:count])
            assert torch.allclose(logits[v, b], by_hand(view, images[b], kept), rtol=1e-10, atol=1e-12)
            assert torch.allclose(whole[v, b], by_hand(view, images[b], range(6)), rtol=1e-10, atol=1e-12)
    assert torch.allclose(model.classify(images).double(), whole.sum(0), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float().classify(images.float()).dtype == torch.float32


# ---- The loss

@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("weight", [0, 16.7])
def test_the_loss_is_the_mean_cross_entropy_of_the_views_and_their_divergence_by_hand(views, weight):
    logits = 2 * torch.randn(views, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    labels, total = batch()[1], 0.0
    for b in (0, 1, 3, 4, 5):                                        # image 2 has no label
        p = [logits[v, b].softmax(0).tolist() for v in range(views)]
        m = [sum(view[c] for view in p) / views for c in range(6)]
        total += sum(-math.log(view[labels[b]]) for view in p) / views
        total += weight * sum(view[c] * math.log(view[c] / m[c]) for view in p for c in range(6)) / views
    assert cotex_loss(logits, labels, labels >= 0, weight).item() == pytest.approx(total / 5, rel=1e-12)
    assert cotex_loss(logits, labels, labels >= 0, weight, 10).item() == pytest.approx(total / 10, rel=1e-12)


# ---- Refusals

@pytest.mark.parametrize("make, message", [
    (lambda: CoTEX(mask_ratio=-0.2, **TINY), "mask_ratio=-0.2 keeps 7 of the 6 patches"),
    (lambda: CoTEX(mask_ratio=0.9, **TINY), "mask_ratio=0.9 keeps 0 of the 6 patches, expected at least")])
def test_a_ratio_that_leaves_no_patch_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("options, message", [
    (["data.drawn_faces="], "data.drawn_faces='' and data.real_faces='real': expected two folders that hold"),
    (["data.real_faces="], "data.real_faces='': expected two folders that hold one for each of Anger, Dis"),
    (["data.real_faces=drawn/../drawn"], "share images"), (["data.real_faces=drawn/FEAR"], "share images")])
def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("drawn/FEAR", "real/FEAR"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    (tmp_path / "my.yaml").write_text("{data: {drawn_faces: drawn, real_faces: real}, cotex: {start: none},"
                                      " vit: {image_size: 16, patch: 8, dim: 8, depth: 1, heads: 2}}")
    with pytest.raises(ValueError, match=re.escape(message)):
        train_cotex.main(load("my.yaml", options), ALONE)


def test_six_images_are_learned_by_heart_and_the_views_come_to_agree():
    torch.manual_seed(0)
    model = CoTEX(**TINY | dict(dim=32), mask_ratio=0.5)
    images, labels, valid = torch.randn(6, 3, 8, 12), torch.arange(6), torch.ones(6, dtype=torch.bool)
    first = cotex_loss(model(images, torch.rand(6, 2, 6)), labels, valid, 16.7)
    assert first.item() == pytest.approx(math.log(6), abs=2e-4)      # all classes are equally likely
    last = learn(lambda: cotex_loss(model(images, torch.rand(6, 2, 6)), labels, valid, 1.0), model,
                 steps=120, lr=3e-3)                                 # other masks each time
    assert last < 0.4 * math.log(6) and (model.eval().classify(images).argmax(1) == labels).all()
    assert cotex_loss(model(images), labels, valid, 1.0) < 0.1 * math.log(6)
