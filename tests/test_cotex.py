"""Masked CoTEX against patches picked by hand, its loss against sums by hand, and what the views share and do
not share; pieces and processes; learning."""

import math
import re

import pytest
import torch

from checkpoints import load_vit
from cotex import CoTEX, cotex_loss
from losses import expr_loss
from mae import MaskedAutoencoder
from processes import ALONE, in_team
from training import adamw, in_pieces

TINY = dict(image_size=(8, 12), patch=4, dim=16, depth=2, heads=2)              # N = 6 patches
SHARDS = {1: [6], 2: [4, 2], 3: [4, 2, 0], 4: [1, 2, 0, 3]}          # world size -> images on each rank


def tiny(views=2, mask_ratio=0.5, **change):
    """A model with random values for all parameters but the positions: a head near 0 would hide mistakes."""
    torch.manual_seed(0)
    model = CoTEX(6, views, mask_ratio, **(TINY | change)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    return model


def batch(B=6, views=2, N=6):
    """images (B, 3, 8, 12), labels (B,), of which one is missing, noise (B, V, N)"""
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, 8, 12, generator=rng, dtype=torch.double)
    return images, torch.tensor([0, 5, -1, 2, 4, 1])[:B], torch.rand(B, views, N, generator=rng)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_classifier(vit, head, images):
    """The classifier without views and masks."""
    return head(vit.features(images, "cls"))


# ---- The forward pass

def test_the_pair_of_vit_b_has_its_known_number_of_parameters():
    with torch.device("meta"):
        pair, one = CoTEX(), CoTEX(views=1)
    assert sum(p.numel() for p in pair.parameters()) == 171_606_540
    assert sum(p.numel() for p in one.parameters()) == 85_798_656 + 768 * 6 + 6


@pytest.mark.parametrize("ratio, kept", [(0, 196), (0.5, 98), (0.75, 49), (0.9, 19), (0.994, 1)])
def test_the_number_of_kept_patches_of_a_vit_b_is_rounded_down(ratio, kept):
    with torch.device("meta"):
        model = CoTEX(mask_ratio=ratio, depth=1)
        seen = []
        for view in model.views:
            view.vit.blocks[0].register_forward_hook(lambda block, inputs, out: seen.append(inputs[0].shape))
        assert model(torch.zeros(2, 3, 224, 224), torch.zeros(2, 2, 196)).shape == (2, 2, 6)
    assert model.kept == kept and seen == [(2, 1 + kept, 768)] * 2


def by_hand(view, image, kept):
    """The logits of a view of one image: the patches `kept` (their numbers) are cut out, in image order."""
    vit, tokens = view.vit, [view.vit.cls_token[0, 0] + view.vit.pos_embed[0, 0]]
    kernel = vit.patch_embed.proj.weight.flatten(1)
    for n in kept:
        top, left = 4 * (n // 3), 4 * (n % 3)
        pixels = image[:, top:top + 4, left:left + 4].flatten()
        tokens.append(kernel @ pixels + vit.patch_embed.proj.bias + vit.pos_embed[0, 1 + n])
    x = torch.stack(tokens)[None]
    for block in vit.blocks:
        x = block(x)
    return view.head.weight @ vit.norm(x)[0, 0] + view.head.bias


@pytest.mark.parametrize("views, ratio, count",
                         [(1, 0.5, 3), (2, 0.5, 3), (3, 0.4, 3), (2, 0.75, 1), (2, 0, 6)])
def test_each_view_sees_the_patches_with_the_smallest_noise_of_its_own(views, ratio, count):
    model, (images, _, noise) = tiny(views, ratio), batch(views=views)
    logits = model(images, noise)
    assert logits.shape == (views, 6, 6)
    for v, view in enumerate(model.views):
        for b in range(6):
            u = noise[b, v].tolist()
            kept = sorted(sorted(range(6), key=u.__getitem__)[:count])
            assert torch.allclose(logits[v, b], by_hand(view, images[b], kept), rtol=1e-10, atol=1e-12)


def test_in_training_dropped_pixels_do_not_reach_their_view():
    model, (images, _, noise) = tiny(), batch()
    logits = model(images, noise)
    for v in range(2):
        rank = noise[:, v].argsort(1).argsort(1)                                     # (B, N)
        hidden = (rank >= 3).reshape(6, 2, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)
        other = model(images.masked_fill(hidden[:, None], math.nan), noise)
        assert torch.equal(other[v], logits[v]) and other[1 - v].isnan().any()


def test_the_same_noise_repeats_a_training_pass_and_other_noise_does_not():
    model, (images, _, noise) = tiny(mask_ratio=0.75), batch()
    first = model(images, noise)
    assert torch.equal(first, model(images, noise))
    assert not torch.equal(first, model(images, 1 - noise))
    swapped = model(images, noise.flip(1))
    assert all(not torch.equal(first[v], swapped[v]) for v in range(2))


def test_without_masks_a_training_pass_needs_no_noise_and_is_that_of_evaluation():
    model, (images, _, noise) = tiny(mask_ratio=0), batch()
    trained = model(images)
    assert torch.equal(trained, model(images, noise)) and torch.equal(trained, model.eval()(images))


def test_evaluation_sees_every_patch_of_every_image_and_repeats_itself():
    model, (images, _, noise) = tiny(mask_ratio=0.75).eval(), batch()
    logits = model(images.requires_grad_())
    for again in (model(images), model(images, noise)):
        assert torch.equal(logits, again)
    for view in logits:
        gradient, = torch.autograd.grad(view.square().sum(), images, retain_graph=True)
        assert gradient.all()
    for v, view in enumerate(model.views):
        assert torch.allclose(logits[v, 0], by_hand(view, images[0], range(6)), rtol=1e-10)


def test_scores_are_the_logits_of_all_views_added_up_in_any_order():
    model, (images, _, _) = tiny(views=3).eval(), batch()
    scores = model.classify(images)
    total = sum(plain_classifier(view.vit, view.head, images) for view in model.views)
    assert scores.shape == (6, 6) and torch.allclose(scores.double(), total, rtol=1e-5, atol=1e-6)
    model.views = torch.nn.ModuleList([model.views[v] for v in (2, 0, 1)])
    assert torch.allclose(model.classify(images), scores, rtol=1e-5, atol=1e-6)


def test_logits_are_added_up_and_not_probabilities():
    model, logits = tiny().eval(), torch.tensor([[20, 15, 0, 0, 0, 0], [0, 6, 5, 5, 5, 5]]).double()
    for view, bias in zip(model.views, logits):
        torch.nn.init.zeros_(view.head.weight)
        view.head.bias.data = bias
    assert model.classify(batch()[0])[0].tolist() == [20, 21, 5, 5, 5, 5]
    assert logits.softmax(1).sum(0).argmax() == 0


def test_one_view_without_masks_is_the_plain_classifier_to_the_bit():
    """Three training steps: logits, loss, weights."""
    images, labels, noise = batch(views=1)
    model, plain = tiny(1, 0), tiny(1, 0)
    vit, head = plain.views[0].vit, plain.views[0].head
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(3):
        logits, expected = model(images, noise), plain_classifier(vit, head, images)
        losses = [cotex_loss(logits, labels, labels >= 0, 16.7), expr_loss(expected, labels, labels >= 0)]
        assert torch.equal(logits[0], expected) and torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# ---- The loss

def shares(values):
    """softmax of a list of numbers."""
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("weight", [0, 0.5, 16.7])
def test_the_loss_is_the_mean_cross_entropy_of_the_views_and_their_divergence_by_hand(views, weight):
    logits = 2 * torch.randn(views, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    labels, total = batch()[1], 0.0
    for b in (0, 1, 3, 4, 5):                                        # image 2 has no label
        p = [shares(logits[v, b].tolist()) for v in range(views)]
        m = [sum(view[c] for view in p) / views for c in range(6)]
        total += sum(-math.log(view[labels[b]]) for view in p) / views
        js = sum(view[c] * math.log(view[c] / m[c]) for view in p for c in range(6)) / views
        assert 0 < js < math.log(views)
        total += weight * js
    assert cotex_loss(logits, labels, labels >= 0, weight).item() == pytest.approx(total / 5, rel=1e-12)


def test_a_new_model_gives_all_classes_the_same_chance():
    torch.manual_seed(0)
    model, (images, labels, noise) = CoTEX(**TINY, mask_ratio=0.5), batch()
    loss = cotex_loss(model(images.float(), noise), labels, labels >= 0, 16.7)
    assert loss.item() == pytest.approx(math.log(6), abs=2e-4)


@pytest.mark.parametrize("part", ["cross-entropy", "both", "JS"])
def test_gradients_flow_into_every_parameter_of_both_views(part):
    model, (images, labels, noise) = tiny(), batch()
    logits = model(images, noise)
    loss = cotex_loss(logits, labels, labels >= 0, 0.0 if part == "cross-entropy" else 2.0)
    if part == "JS":
        loss = loss - cotex_loss(logits, labels, labels >= 0, 0.0)
    loss.backward()
    assert all(gradient.norm() > 1e-8 for gradient in gradients(model).values())


def test_without_js_the_views_do_not_influence_each_other():
    images, labels, noise = batch()

    def of_view_0(weight, change):
        model = tiny()
        with torch.no_grad():
            model.views[1].head.bias[0] += change
        cotex_loss(model(images, noise), labels, labels >= 0, weight).backward()
        return gradients(model.views[0])

    alone = tiny(views=1)
    alone.views[0].load_state_dict(tiny().views[0].state_dict())
    cotex_loss(alone(images, noise[:, :1]), labels, labels >= 0, 0.0).backward()
    without, still_without = of_view_0(0.0, 0), of_view_0(0.0, 1)
    js, other_js = of_view_0(1.0, 0), of_view_0(1.0, 1)
    for name, gradient in gradients(alone.views[0]).items():
        assert torch.equal(without[name], still_without[name]), name
        assert torch.allclose(without[name], gradient / 2, rtol=1e-12, atol=1e-16), name
        assert not torch.allclose(js[name], other_js[name], rtol=1e-3), name


# ---- Pieces and processes

def step(part, team=ALONE, pieces=0):
    """A training step on a part of six images, in pieces (0: at once, and the loss counts the labels). -> the
    part's loss, gradients"""
    model, (images, labels, noise) = tiny(), batch()
    count = (labels >= 0).sum() if pieces else None
    ddp, total = team.parallel(model), 0.0
    for x, y, u in in_pieces(ddp, max(pieces, 1), images[part], labels[part], noise[part]):
        loss = cotex_loss(ddp(x, u), y, y >= 0, 16.7, count)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def close(found, whole):
    return all((found[name] - gradient).norm() < 1e-11 * gradient.norm() for name, gradient in whole.items())


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_add_up_to_the_step_with_the_whole_batch(pieces):
    loss, whole = step(slice(0, 6))
    share, found = step(slice(0, 6), pieces=pieces)
    assert share == pytest.approx(loss, rel=1e-13) and close(found, whole)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_step_over_processes_is_that_of_one_with_the_whole_batch(world):
    loss, whole = step(slice(0, 6))
    ends = [sum(SHARDS[world][:rank + 1]) for rank in range(world)]
    parts = [slice(end - size, end) for size, end in zip(SHARDS[world], ends)]
    codes, results = in_team(world, lambda team: [step(parts[team.rank], team, pieces) for pieces in (0, 2)])
    assert codes == [0] * world
    assert all(at_once[0] == pytest.approx(loss, rel=1e-13) for at_once, _ in results)
    assert sum(in_two[0] for _, in_two in results) == pytest.approx(loss, rel=1e-13)
    for at_once, in_two in results:
        assert close(at_once[1], whole) and close(in_two[1], whole)


def test_an_empty_share_has_loss_0_and_zero_gradients():
    model, (images, labels, noise) = tiny(), batch(0)
    loss = cotex_loss(model(images, noise), labels, labels >= 0, 16.7)
    loss.backward()
    assert loss == 0 and not any(gradient.any() for gradient in gradients(model).values())
    assert model.eval().classify(images).shape == (0, 6)


def test_under_mixed_precision_loss_and_scores_are_float32_and_near_the_exact_ones():
    model, (images, labels, noise) = tiny().float(), batch()
    images = images.float()
    exact = cotex_loss(model(images, noise), labels, labels >= 0, 1.0).item()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images, noise)
    loss = cotex_loss(logits, labels, labels >= 0, 1.0)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval().classify(images).dtype == torch.float32


# ---- With the rest

def test_both_views_start_from_one_mae(tmp_path):
    mae = MaskedAutoencoder(**TINY, decoder_dim=12, decoder_depth=1, decoder_heads=3, mask_ratio=0.5)
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pt")
    model = tiny(mask_ratio=0.5).float()
    for view in model.views:
        assert load_vit(view.vit, tmp_path / "mae.pt").startswith("missing keys: none")
    images, noise = torch.randn(2, 3, 8, 12), torch.rand(2, 6)
    with torch.no_grad():
        encoded = mae.forward_encoder(images, noise)[0][:, 0]
        logits = model(images, torch.stack([noise, noise], dim=1))
    for view, found in zip(model.views, logits):
        assert torch.equal(view.head(encoded), found)                # the MAE's own masking, to the bit


def test_layer_decay_and_drop_path_reach_each_view():
    model = tiny(drop_path=0.3)
    assert [[block.rate for block in view.vit.blocks] for view in model.views] == [[0, 0.3]] * 2
    groups = adamw(model, 1.0, (0.9, 0.999), 0.05, 0.65).param_groups
    factor = {p: group.get("factor", 1.0) for group in groups for p in group["params"]}
    for view in model.views:
        assert factor[view.head.weight] == factor[view.vit.norm.bias] == 1
        assert factor[view.vit.blocks[0].mlp.fc1.weight] == pytest.approx(0.65 ** 2)
        assert factor[view.vit.patch_embed.proj.weight] == pytest.approx(0.65 ** 3)


# ---- Refusals

@pytest.mark.parametrize("views", [0, -1])
def test_fewer_than_one_view_is_refused(views):
    with pytest.raises(ValueError, match=f"views={views}: expected at least 1; try views=2"):
        CoTEX(views=views, **TINY)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan])
def test_a_share_of_dropped_patches_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio={ratio}: expected 0 .* below 1; try mask_ratio=0.75"):
        CoTEX(mask_ratio=ratio, **TINY)


def test_a_mask_that_leaves_no_patch_is_refused():
    with pytest.raises(ValueError, match="mask_ratio=0.9 keeps none of the 6 patches"):
        CoTEX(mask_ratio=0.9, **TINY)


@pytest.mark.parametrize("shape", [None, (6, 6), (6, 1, 6), (6, 3, 6), (5, 2, 6), (6, 2, 5), (2, 6, 6)])
def test_noise_of_another_shape_and_none_in_training_are_refused(shape):
    noise = None if shape is None else torch.zeros(shape)
    message = f"expected noise (6, 2, 6), one number per image, view and patch, got {shape or 'none'}"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny()(batch()[0], noise)


def test_settings_that_no_vit_has_are_refused():
    with pytest.raises(TypeError, match="mask"):
        CoTEX(mask=0.5)
    with pytest.raises(ValueError, match="drop_path"):
        CoTEX(**TINY, drop_path=1)


def test_labels_of_another_shape_are_refused():
    logits, labels = torch.zeros(2, 6, 6), torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="shapes do not fit"):
        cotex_loss(logits, labels, labels >= 0, 1.0)


# ---- Learning

def test_six_images_are_learned_by_heart_and_the_views_come_to_agree():
    torch.manual_seed(0)
    model = CoTEX(**TINY | dict(dim=32), mask_ratio=0.5)
    images, labels, valid = torch.randn(6, 3, 8, 12), torch.arange(6), torch.ones(6, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = cotex_loss(model(images, torch.rand(6, 2, 6)), labels, valid, 1.0)     # other masks each time
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert loss < 0.4 * math.log(6) and (model.classify(images).argmax(1) == labels).all()
    assert cotex_loss(model(images), labels, valid, 1.0) < 0.1 * math.log(6)
    assert (model(images).argmax(2) == labels).all()                 # each view by itself
