"""The masked autoencoder against a second implementation of it, and against loops: patches, masks, loss,
names, learning."""

import math

import pytest
import torch
from torch.nn import functional as F

from mae import MaskedAutoencoder
from vit import pair, sincos_positions

TINY = dict(image_size=(8, 12), patch=4, channels=3, dim=16, depth=2, heads=2,
            decoder_dim=12, decoder_depth=1, decoder_heads=3, mask_ratio=0.5)     # 3 of 6 patches are visible


def tiny(**change):
    torch.manual_seed(0)
    return MaskedAutoencoder(**(TINY | change))


def shuffled(model):
    """Random values for all parameters but the positions: zero biases and unit LayerNorms would hide
    mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    return model


# ---- Patches

@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [8, (8, 12), (12, 4)])
def test_patchify_and_unpatchify_undo_each_other_exactly(channels, size):
    model = tiny(channels=channels, image_size=size, mask_ratio=0.4)
    height, width = pair(size)
    images = torch.randn(2, channels, height, width)
    patches = torch.randn(2, height * width // 16, 16 * channels)
    assert model.patchify(images).shape == patches.shape
    assert torch.equal(model.unpatchify(model.patchify(images)), images)
    assert torch.equal(model.patchify(model.unpatchify(patches)), patches)


def test_patches_come_row_by_row_and_flatten_as_row_column_channel():
    model = tiny(image_size=(4, 6), patch=2, channels=3)
    row, column, channel = torch.arange(4.0), torch.arange(6.0), torch.arange(3.0)
    image = 100 * row[:, None] + 10 * column + channel[:, None, None]                    # (3, 4, 6)
    patches = model.patchify(image[None])
    assert patches[0, 0].tolist() == [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]
    assert patches[0, :, 0].tolist() == [0, 20, 40, 200, 220, 240]


# ---- Masking

@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75, 0.8, 0.9, 0.93])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_the_number_of_visible_patches_is_rounded_down(ratio, size):
    model = tiny(image_size=size, mask_ratio=ratio)
    N = model.pos_embed.shape[1] - 1
    images = torch.randn(2, 3, *pair(size))
    tokens, mask, restore = model.forward_encoder(images, torch.rand(2, N))
    assert model.visible == int(N * (1 - ratio)) and tokens.shape == (2, 1 + model.visible, 16)
    assert mask.sum(dim=1).tolist() == [N - model.visible] * 2 and set(mask.flatten().tolist()) == {0.0, 1.0}


def test_the_papers_model_shows_49_of_196_patches():
    with torch.device("meta"):
        assert MaskedAutoencoder().visible == 49


def test_the_patches_with_the_smallest_noise_are_kept_in_its_order():
    model, x = tiny(), torch.randn(2, 6, 5)
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.8, 0.7], [0.0, 0.99, 0.2, 0.98, 0.1, 0.97]])
    kept, mask, _ = model.random_masking(x, noise)
    assert mask.tolist() == [[0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]
    assert torch.equal(kept[0], x[0, [1, 3, 0]]) and torch.equal(kept[1], x[1, [0, 4, 2]])


def test_restore_puts_every_token_back_in_its_place():
    torch.manual_seed(0)
    model, x, noise = tiny(image_size=16, mask_ratio=0.75), torch.randn(3, 16, 5), torch.rand(3, 16)
    kept, mask, restore = model.random_masking(x, noise)
    for b in range(3):
        places = restore[b].tolist()
        assert sorted(places) == list(range(16))
        for n, place in enumerate(places):
            assert (place < 4) == (mask[b, n] == 0)
            assert place >= 4 or torch.equal(kept[b, place], x[b, n])


def test_the_same_noise_repeats_everything_and_other_noise_hides_other_patches():
    model, images = tiny(image_size=16, mask_ratio=0.75), torch.randn(2, 3, 16, 16)
    first, second = torch.rand(2, 2, 16)
    for a, b in zip(model(images, first), model(images, first)):
        assert torch.equal(a, b)
    assert not torch.equal(model(images, first)[2], model(images, second)[2])


def test_without_noise_each_image_and_each_call_gets_its_own_mask():
    torch.manual_seed(0)
    model, images = tiny(image_size=16, mask_ratio=0.75), torch.randn(2, 3, 16, 16)
    masks = torch.cat([model(images)[2] for _ in range(300)])
    assert len(masks.unique(dim=0)) > 300                            # of 1820 possible
    # Each place is hidden equally often; 0.08 is more than 4 deviations.
    assert (masks.mean(dim=0) - 0.75).abs().max() < 0.08


# ---- What the model sees

def test_hidden_pixels_reach_neither_the_encoder_nor_the_prediction():
    model, images, noise = tiny(), torch.randn(2, 3, 8, 12), torch.rand(2, 6)
    loss, pred, mask = model(images, noise)
    hidden = model.unpatchify(mask[..., None].expand(-1, -1, 48)).bool()
    for garbage in (1e6, math.nan):
        changed = images.masked_fill(hidden, garbage)
        other_loss, other_pred, other_mask = model(changed, noise)
        assert torch.equal(model.forward_encoder(changed, noise)[0], model.forward_encoder(images, noise)[0])
        assert torch.equal(other_pred, pred) and torch.equal(other_mask, mask)
        assert not torch.equal(other_loss, loss)


def test_every_visible_patch_and_only_those_move_the_prediction():
    model, noise = tiny().double(), torch.rand(1, 6)
    images = torch.randn(1, 3, 8, 12, dtype=torch.double, requires_grad=True)
    _, pred, mask = model(images, noise)
    gradient, = torch.autograd.grad(pred.square().sum(), images)
    assert ((model.patchify(gradient).abs().sum(-1) > 0) == (mask == 0)).all()


def test_visible_pixels_enter_the_loss_only_through_the_prediction():
    model, images = tiny(), torch.randn(2, 3, 8, 12)
    _, pred, mask = model(images, torch.rand(2, 6))
    hidden = model.unpatchify(mask[..., None].expand(-1, -1, 48)).bool()
    loss = model.forward_loss(images, pred, mask)
    assert torch.equal(model.forward_loss(torch.where(hidden, images, 1e6), pred, mask), loss)
    assert not torch.equal(model.forward_loss(torch.where(hidden, 1e6, images), pred, mask), loss)


# ---- Loss and the whole forward pass

@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_the_mean_squared_error_of_the_masked_pixels_by_hand(norm_pix_loss):
    torch.manual_seed(0)
    model = tiny(image_size=(4, 6), patch=2, mask_ratio=0.5, norm_pix_loss=norm_pix_loss)
    images, pred = torch.randn(2, 3, 4, 6), torch.randn(2, 6, 12)
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]])
    images[1, :, :2, 2:4] = 0.5                  # a flat patch, masked: 1e-6 keeps its deviation above 0
    errors = []
    for b in range(2):
        for n in range(6):
            if mask[b, n]:
                top, left = 2 * (n // 3), 2 * (n % 3)
                pixels = [images[b, c, top + i, left + j].item()
                          for i in range(2) for j in range(2) for c in range(3)]
                if norm_pix_loss:
                    mean = sum(pixels) / 12
                    deviation = math.sqrt(sum((p - mean) ** 2 for p in pixels) / 11 + 1e-6)
                    pixels = [(p - mean) / deviation for p in pixels]
                errors += [(p - q.item()) ** 2 for p, q in zip(pixels, pred[b, n])]
    assert model.forward_loss(images, pred, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-6)


def second_implementation(w, images, noise, P, heads, decoder_heads, visible, norm_pix_loss):
    """The MAE paper's forward pass in its other form: no shuffling. The visible patches, picked in image
    order, are encoded; the decoder's input is mask tokens everywhere, with the encoded patches written over
    the visible places. `w` is a state dict; one image after the other."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-6)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def run_blocks(x, name, heads):
        for i in range(len({key.split(".")[1] for key in w if key.startswith(name + ".")})):
            y = linear(norm(x, f"{name}.{i}.norm1"), f"{name}.{i}.attn.qkv")
            D, d, mixed = x.shape[1], x.shape[1] // heads, []
            for h in range(heads):
                q, k, v = (y[:, part * D + h * d:part * D + (h + 1) * d] for part in range(3))
                mixed.append(F.softmax(q @ k.T / d ** 0.5, dim=1) @ v)
            x = x + linear(torch.cat(mixed, dim=1), f"{name}.{i}.attn.proj")
            y = linear(norm(x, f"{name}.{i}.norm2"), f"{name}.{i}.mlp.fc1")
            x = x + linear(y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)), f"{name}.{i}.mlp.fc2")
        return x

    preds, errors = [], []
    for image, u in zip(images, noise.tolist()):
        height, width = image.shape[1:]
        patches = [image[:, r:r + P, c:c + P] for r in range(0, height, P) for c in range(0, width, P)]
        seen = sorted(sorted(range(len(u)), key=u.__getitem__)[:visible])
        kernel = w["patch_embed.proj.weight"].flatten(1)
        bias, positions = w["patch_embed.proj.bias"], w["pos_embed"][0]
        tokens = torch.stack([kernel @ patches[n].flatten() + bias + positions[1 + n] for n in seen])
        x = torch.cat([w["cls_token"][0] + positions[:1], tokens])
        x = linear(norm(run_blocks(x, "blocks", heads), "norm"), "decoder_embed")
        full = w["mask_token"][0].repeat(1 + len(u), 1)
        full[0], full[[1 + n for n in seen]] = x[0], x[1:]
        x = run_blocks(full + w["decoder_pos_embed"][0], "decoder_blocks", decoder_heads)
        preds.append(linear(norm(x, "decoder_norm"), "decoder_pred")[1:])
        for n in set(range(len(u))) - set(seen):
            pixels = patches[n].permute(1, 2, 0).flatten()           # (C, P, P) -> (P, P, C)
            if norm_pix_loss:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6) ** 0.5
            errors.append(((preds[-1][n] - pixels) ** 2).mean())
    return torch.stack(errors).mean(), torch.stack(preds)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("size, channels, ratio", [((8, 12), 3, 0.5), ((16, 16), 3, 0.75), ((12, 4), 1, 0.5)])
def test_a_second_implementation_gives_the_same_loss_prediction_and_gradients(size, channels, ratio,
                                                                              norm_pix_loss):
    model = tiny(image_size=size, channels=channels, mask_ratio=ratio, norm_pix_loss=norm_pix_loss)
    model = shuffled(model).double()
    N = model.pos_embed.shape[1] - 1
    images, noise = torch.randn(3, channels, *size, dtype=torch.double), torch.rand(3, N)
    w = {name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()}
    visible = int(N * (1 - ratio))
    expected_loss, expected_pred = second_implementation(w, images, noise, 4, 2, 3, visible, norm_pix_loss)
    loss, pred, _ = model(images, noise)
    assert torch.allclose(pred, expected_pred, rtol=1e-10, atol=1e-11)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    loss.backward()
    expected_loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, w[name].grad, rtol=1e-4, atol=1e-6), name


def test_in_float32_the_second_implementation_agrees_to_1e_5():
    model, images, noise = tiny(), torch.randn(2, 3, 8, 12), torch.rand(2, 6)
    loss, pred, _ = model(images, noise)
    expected_loss, expected_pred = second_implementation(model.state_dict(), images, noise, 4, 2, 3, 3, False)
    assert torch.allclose(pred, expected_pred, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)


def test_in_float64_the_loss_is_a_float64_loss():
    model, images, noise = tiny().double(), torch.randn(2, 3, 8, 12, dtype=torch.double), torch.rand(2, 6)
    loss, pred, mask = model(images, noise)
    by_hand = ((pred - model.patchify(images)) ** 2)[mask.bool()].mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-13)


def test_the_loss_of_a_batch_is_the_mean_of_its_images_losses():
    model, images, noise = tiny(), torch.randn(5, 3, 8, 12), torch.rand(5, 6)
    alone = [model(images[b:b + 1], noise[b:b + 1])[0].item() for b in range(5)]
    assert model(images, noise)[0].item() == pytest.approx(sum(alone) / 5, rel=1e-5)


def test_an_empty_batch_has_loss_zero_and_zero_gradients():
    model = tiny()
    loss, pred, mask = model(torch.zeros(0, 3, 8, 12), torch.zeros(0, 6))
    loss.backward()
    assert loss == 0 and pred.shape == (0, 6, 48) and mask.shape == (0, 6)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_under_mixed_precision_the_loss_is_float32_and_near_the_exact_one():
    model, images, noise = tiny(), torch.randn(2, 3, 8, 12), torch.rand(2, 6)
    exact = model(images, noise)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(images, noise)
    loss.backward()
    assert pred.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- Names and sizes

def test_the_papers_model_has_its_known_number_of_parameters():
    with torch.device("meta"):
        model = MaskedAutoencoder()
    assert sum(p.numel() for p in model.parameters()) == 111_907_840
    assert model.decoder_pos_embed.shape == (1, 197, 512)
    assert [block.attn.heads for block in model.blocks] == [12] * 12
    assert [block.attn.heads for block in model.decoder_blocks] == [16] * 8


def test_parameter_names_and_shapes_are_the_reference_maes():
    block = {"norm1.weight": (1,), "norm1.bias": (1,), "norm2.weight": (1,), "norm2.bias": (1,),
             "attn.qkv.weight": (3, 1), "attn.qkv.bias": (3,),
             "attn.proj.weight": (1, 1), "attn.proj.bias": (1,),
             "mlp.fc1.weight": (4, 1), "mlp.fc1.bias": (4,), "mlp.fc2.weight": (1, 4), "mlp.fc2.bias": (1,)}
    expected = {"cls_token": (1, 1, 16), "pos_embed": (1, 7, 16), "norm.weight": (16,), "norm.bias": (16,),
                "patch_embed.proj.weight": (16, 3, 4, 4), "patch_embed.proj.bias": (16,),
                "mask_token": (1, 1, 12), "decoder_pos_embed": (1, 7, 12),
                "decoder_embed.weight": (12, 16), "decoder_embed.bias": (12,),
                "decoder_norm.weight": (12,), "decoder_norm.bias": (12,),
                "decoder_pred.weight": (48, 12), "decoder_pred.bias": (48,)}
    for prefix, width in (("blocks.0", 16), ("blocks.1", 16), ("decoder_blocks.0", 12)):
        for name, shape in block.items():                            # in units of the width
            expected[f"{prefix}.{name}"] = tuple(width * side for side in shape)
    assert {name: tuple(value.shape) for name, value in tiny().state_dict().items()} == expected


def test_the_decoders_weights_start_as_in_mae():
    model = tiny(dim=64, decoder_dim=64, decoder_heads=2)
    for name, p in model.named_parameters():
        if "decoder" in name and name.endswith("bias"):
            assert not p.any(), name
        elif "decoder" in name and p.ndim == 2:                      # Xavier-uniform: up to √(6 / (in + out))
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
    assert 0.015 < model.mask_token.std() < 0.025


def test_both_position_tables_are_sines_and_stay_so():
    model = tiny()
    before = [p.clone() for p in (model.pos_embed, model.decoder_pos_embed)]
    assert torch.equal(before[0], sincos_positions(16, (2, 3)))
    assert torch.equal(before[1], sincos_positions(12, (2, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.randn(2, 3, 8, 12))[0].backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before[0]) and torch.equal(model.decoder_pos_embed, before[1])
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"pos_embed", "decoder_pos_embed"}


# ---- Refusals

@pytest.mark.parametrize("ratio, visible", [(0.9, 0), (1.0, 0), (0.0, 6), (-0.2, 7), (1.5, -3)])
def test_a_mask_that_leaves_nothing_visible_or_nothing_hidden_is_refused(ratio, visible):
    message = f"mask_ratio={ratio} leaves {visible} of 6 patches visible; at least one must be visible"
    with pytest.raises(ValueError, match=message):
        tiny(mask_ratio=ratio)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 8, 12\), got \(2, 3, 12, 8\)"):
        tiny()(torch.zeros(2, 3, 12, 8))


def test_noise_for_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match="noise"):
        tiny()(torch.zeros(2, 3, 8, 12), torch.rand(1, 6))


# ---- Learning

@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_four_images_are_learned_by_heart_whatever_is_hidden(norm_pix_loss):
    model = tiny(channels=1, dim=32, decoder_dim=32, decoder_heads=2, norm_pix_loss=norm_pix_loss)
    # Each image under four masks, which are new at each step.
    images = torch.randn(4, 1, 8, 12).repeat(4, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(250):
        loss, _, _ = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-20:]) / 20 < 0.05         # 1 is a grey guess
