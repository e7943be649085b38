"""The masked autoencoder against a second implementation of it, and against loops (what all models promise:
test_models.py)."""

import pytest
import torch
from torch.nn import functional as F

from images import MEAN, STD, normalise
from mae import MaskedAutoencoder, keep_some
from models import MAE, shuffled, small
from vit import IMAGENET


@pytest.mark.parametrize("channels, size", [(1, 8), (3, (8, 12)), (4, (12, 4))])
def test_patchify_and_unpatchify_undo_each_other_exactly(channels, size):
    model = small(MaskedAutoencoder, MAE, channels=channels, image_size=size, mask_ratio=0.4)
    images = torch.randn(2, channels, *(4 * side for side in model.grid))
    patches = torch.randn(2, images[0, 0].numel() // 16, 16 * channels)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)
    assert torch.equal(model.patchify(model.unpatchify(patches)), patches)


def test_the_example_of_the_double_argsort():
    model = small(MaskedAutoencoder, MAE, image_size=8)                                  # 2 of 4 visible
    noise, x = torch.tensor([[0.3, 0.9, 0.1, 0.5]]), torch.randn(1, 4, 5)
    _, order = keep_some(x, noise, 2)
    kept, mask, restore = model.random_masking(x, noise)
    assert order.tolist() == [[2, 0, 3, 1]] and torch.equal(kept, x[:, [2, 0]])
    assert restore.tolist() == [[1, 3, 0, 2]] and mask.tolist() == [[0, 1, 0, 1]]


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
@pytest.mark.parametrize("size, channels, ratio", [((8, 12), 3, 0.6), ((16, 16), 3, 0.93), ((12, 4), 1, 0.5)])
def test_a_second_implementation_gives_the_same_loss_prediction_and_gradients(size, channels, ratio,
                                                                              norm_pix_loss):
    model = shuffled(small(MaskedAutoencoder, MAE, image_size=size, channels=channels, mask_ratio=ratio,
                           norm_pix_loss=norm_pix_loss))
    N = model.pos_embed.shape[1] - 1
    images, noise = torch.randn(3, channels, *size, dtype=torch.double), torch.rand(3, N)
    images[0] = 0.5                                                  # flat: 1e-6 keeps its deviation above 0
    w = {name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()}
    visible = int(N * (1 - ratio))
    expected_loss, expected_pred = second_implementation(w, images, noise, 4, 2, 3, visible, norm_pix_loss)
    loss, pred, _ = model(images, noise)
    assert torch.allclose(pred, expected_pred, rtol=1e-9, atol=1e-10)
    assert loss.dtype == torch.double and loss.item() == pytest.approx(expected_loss.item(), rel=1e-11)
    loss.backward()
    expected_loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad - w[name].grad).norm() < 1e-9 * max(w[name].grad.norm(), 1e-3), name


def test_images_of_another_mean_and_deviation_are_what_a_model_of_these_sees_and_rebuilds():
    own = {"mean": [.5, .4, .3], "std": [.3, .2, .1]}
    plain, other = (shuffled(small(MaskedAutoencoder, MAE, **numbers)) for numbers in ({}, own))
    pixels, noise = torch.rand(2, 8, 12, 3, dtype=torch.double), torch.rand(2, 6)
    imagenet, theirs = (((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
                        for mean, std in (IMAGENET, own.values()))
    for found, expected in zip(other(imagenet, noise), plain(theirs, noise)):
        assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(normalise((255 * pixels).byte()), imagenet.float(), atol=0.02)
    assert (tuple(IMAGENET[0]), tuple(IMAGENET[1])) == (MEAN, STD)
