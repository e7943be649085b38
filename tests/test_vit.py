"""The ViT against PyTorch's own layers and against loops: attention, block, patches, positions, names and
learning."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vit import (MLP, Attention, Block, PatchEmbed, VisionTransformer, attention, drop_path, pair,
                 sincos_positions)

TINY = dict(image_size=(8, 12), patch=4, channels=3, dim=16, depth=2, heads=2)
BLOCK_TO_TORCH = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "self_attn.out_proj",
                  "mlp.fc1": "linear1", "mlp.fc2": "linear2"}


def torch_names(module) -> dict:
    """Our Block's parameter -> the name that nn.TransformerEncoderLayer has for it."""
    names = {}
    for kind in ("weight", "bias"):
        names[f"attn.qkv.{kind}"] = f"self_attn.in_proj_{kind}"
        for ours, theirs in BLOCK_TO_TORCH.items():
            names[f"{ours}.{kind}"] = f"{theirs}.{kind}"
    assert set(names) == set(dict(module.named_parameters()))
    return names


def shuffled(module):
    """Give every parameter a random value: at their start values zero biases and unit LayerNorms would hide
    mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


# ---- Attention

def test_written_out_attention_is_torchs_fused_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 5, dtype=torch.double)
    assert torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-14)


def test_written_out_attention_is_a_mixture_with_softmax_weights():
    q, k = torch.tensor([[[[2.0, 0, 0, 0]]]]), torch.tensor([[[[math.log(3.0), 0, 0, 0], [0, 0, 0, 0]]]])
    # The scores are log 3 and 0 after / √4, so the weights are 3/4 and 1/4.
    assert attention(q, k, torch.tensor([[[[10.0], [2.0]]]])).item() == pytest.approx(8.0)
    assert attention(q, k, torch.eye(2)).flatten().tolist() == pytest.approx([3 / 4, 1 / 4])


def test_the_attention_module_is_written_out_attention_between_two_linear_layers():
    torch.manual_seed(0)
    module, x = shuffled(Attention(12, heads=3)).double(), torch.randn(2, 5, 12, dtype=torch.double)
    q, k, v = (F.linear(x, w, b) for w, b in zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)))
    heads = [attention(*(y[:, None, :, h * 4:h * 4 + 4] for y in (q, k, v)))[:, 0] for h in range(3)]
    expected = F.linear(torch.cat(heads, dim=-1), module.proj.weight, module.proj.bias)
    assert torch.allclose(module(x), expected, rtol=1e-12, atol=1e-14)


def test_attention_with_padding_is_attention_without_it():
    torch.manual_seed(0)
    module, x = Attention(8, heads=2).double(), torch.randn(2, 6, 8, dtype=torch.double)
    valid = torch.tensor([[True] * 4 + [False] * 2, [False, True, True, False, True, True]])
    padded = module(x, valid)
    for b in range(2):
        assert torch.allclose(padded[b, valid[b]], module(x[b:b + 1, valid[b]])[0], rtol=1e-12, atol=1e-14)
    other = module(torch.where(valid[..., None], x, 1e6), valid)
    assert torch.equal(other[valid], padded[valid])


def test_attention_drops_out_only_in_training():
    torch.manual_seed(0)
    module, x = Attention(8, heads=2), torch.randn(1, 6, 8)
    assert not torch.equal(module(x, dropout=0.5), module(x))
    assert torch.equal(module(x, dropout=0.0), module(x))
    module.eval()
    assert torch.equal(module(x, dropout=0.5), module(x))


# ---- Block

def test_a_block_is_torchs_pre_norm_encoder_layer_forward_and_backward():
    torch.manual_seed(0)
    ours = shuffled(Block(12, heads=3)).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
                                        batch_first=True, norm_first=True, dtype=torch.double)
    names = torch_names(ours)
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x = torch.randn(2, 5, 12, dtype=torch.double)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = ours(x1), theirs(x2)
    assert torch.allclose(y1, y2, rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(y1)
    (y1 * weights).sum().backward()
    (y2 * weights).sum().backward()
    assert torch.allclose(x1.grad, x2.grad, rtol=1e-11, atol=1e-12)
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, theirs.get_parameter(names[name]).grad, rtol=1e-11, atol=1e-12), name


def test_layer_norms_have_the_reference_epsilon():
    norms = [m for m in VisionTransformer(**TINY).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {1e-6}


def test_a_block_does_not_know_the_order_of_its_tokens():
    torch.manual_seed(0)
    block, x, order = Block(8, heads=2).double(), torch.randn(2, 7, 8, dtype=torch.double), torch.randperm(7)
    assert torch.allclose(block(x)[:, order], block(x[:, order]), rtol=1e-12, atol=1e-13)


def test_the_mlp_sees_each_token_alone():
    torch.manual_seed(0)
    mlp, x = MLP(4, 16).double(), torch.randn(1, 3, 4, dtype=torch.double)
    assert torch.allclose(mlp(x)[:, 1:2], mlp(x[:, 1:2]), rtol=1e-12, atol=1e-14)


# ---- Drop path

def test_drop_path_leaves_out_whole_samples_and_enlarges_the_others():
    torch.manual_seed(0)
    branch = torch.randn(400, 3, 5, dtype=torch.double)
    dropped = drop_path(branch, 0.2)
    for out, whole in zip(dropped, branch):
        assert not out.any() or torch.allclose(out, whole / 0.8, rtol=1e-15, atol=0)
    out = dropped.flatten(1).any(dim=1).logical_not().double().mean().item()
    assert abs(out - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 400)                   # 4 deviations of a share of 400


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    branch = torch.tensor([2.0, -3.0]).expand(40_000, 1, 2)
    for rate in (0.1, 0.5, 0.9):
        error = (drop_path(branch, rate).mean(dim=0) - branch[0]).abs() / branch[0].abs()
        assert error.max() < 4 * math.sqrt(rate / (1 - rate) / 40_000)       # 4 deviations of the mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_drop_path_keeps_the_type_and_takes_an_empty_share(dtype):
    assert drop_path(torch.ones(2, 3, 4, dtype=dtype), 0.5).dtype == dtype
    assert drop_path(torch.ones(0, 3, 4, dtype=dtype), 0.5).shape == (0, 3, 4)


@pytest.mark.parametrize("depth, rate, rates", [
    (12, 0.11, [i / 100 for i in range(12)]), (4, 0.3, [0, 0.1, 0.2, 0.3]), (2, 0.4, [0, 0.4]), (1, 0.4, [0]),
    (3, 0.0, [0, 0, 0])])
def test_the_rate_of_drop_path_rises_in_a_line_from_the_first_block_to_the_last(depth, rate, rates):
    model = VisionTransformer(**(TINY | dict(depth=depth)), drop_path=rate)
    assert [block.rate for block in model.blocks] == pytest.approx(rates, abs=1e-12)


def test_a_block_draws_for_each_of_its_two_branches_anew():
    """Each sample ends as one of four: with both branches, one, the other, or none."""
    torch.manual_seed(0)
    block, x = shuffled(Block(8, heads=2, rate=0.5)).double(), torch.randn(1, 3, 8, dtype=torch.double)
    both = set()
    for first in (0, 2):
        y = x + first * block.attn(block.norm1(x))
        both |= {(first, second, y + second * block.mlp(block.norm2(y))) for second in (0, 2)}
    seen = [(first, second) for out in block(x.expand(64, -1, -1))
            for first, second, expected in both if torch.allclose(out, expected[0], rtol=1e-10, atol=1e-12)]
    assert len(seen) == 64 and set(seen) == {(0, 0), (0, 2), (2, 0), (2, 2)}


def test_drop_path_is_off_in_evaluation_and_at_rate_0_where_no_random_number_is_drawn():
    torch.manual_seed(0)
    model, images = shuffled(VisionTransformer(**TINY, drop_path=0.5)), torch.randn(6, 3, 8, 12)
    plain = VisionTransformer(**TINY)
    plain.load_state_dict(model.state_dict())                              # drop path has no parameters
    state = torch.get_rng_state()
    expected = plain.train()(images)
    assert torch.equal(model.eval()(images), expected) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(model.train()(images), expected)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan])
def test_a_rate_of_drop_path_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=f"drop_path={rate}: expected 0 or more, and below 1"):
        VisionTransformer(**TINY, drop_path=rate)


# ---- Patches and positions

@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 4)])
def test_patch_embedding_is_one_matrix_applied_to_each_patch(channels, size):
    torch.manual_seed(0)
    embed = shuffled(PatchEmbed(size, 4, channels, 10)).double()
    images = torch.randn(2, channels, *size, dtype=torch.double)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)             # (B, C·P·P, N) -> (B, N, C·P·P)
    expected = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert torch.allclose(embed(images), expected, rtol=1e-12, atol=1e-13)


def test_patches_are_numbered_row_by_row():
    embed = PatchEmbed((8, 12), 4, 1, 1)
    nn.init.constant_(embed.proj.weight, 1 / 16)
    nn.init.zeros_(embed.proj.bias)
    image = torch.arange(6.0).reshape(1, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.allclose(embed(image).flatten(), torch.arange(6.0), atol=1e-5)


@pytest.mark.parametrize("dim, grid", [(16, (3, 3)), (16, (2, 5)), (24, (5, 2)), (4, (1, 3)),
                                       (768, (14, 14))])
def test_positions_are_the_formula_column_first_then_row_and_zero_for_cls(dim, grid):
    table = [[0.0] * dim]
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [(p, p / 10000 ** (i / (dim // 4))) for p in (column, row) for i in range(dim // 4)]
            of_column, of_row = ([a for _, a in angles[:dim // 4]], [a for _, a in angles[dim // 4:]])
            table.append([f(a) for half in (of_column, of_row) for f in (math.sin, math.cos) for a in half])
    positions = sincos_positions(dim, grid)
    assert positions.shape == (1, 1 + grid[0] * grid[1], dim) and positions.dtype == torch.float32
    assert torch.allclose(positions[0].double(), torch.tensor(table, dtype=torch.double), rtol=0, atol=1e-7)
    assert len(positions[0].unique(dim=0)) == 1 + grid[0] * grid[1]     # no two places look the same


# ---- Model

def test_parameter_names_and_shapes_are_those_of_the_reference_mae_and_timm():
    model = VisionTransformer(image_size=(8, 12), patch=4, channels=3, dim=16, depth=1, heads=2)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        "cls_token": (1, 1, 16), "pos_embed": (1, 7, 16),
        "patch_embed.proj.weight": (16, 3, 4, 4), "patch_embed.proj.bias": (16,),
        "blocks.0.norm1.weight": (16,), "blocks.0.norm1.bias": (16,),
        "blocks.0.attn.qkv.weight": (48, 16), "blocks.0.attn.qkv.bias": (48,),
        "blocks.0.attn.proj.weight": (16, 16), "blocks.0.attn.proj.bias": (16,),
        "blocks.0.norm2.weight": (16,), "blocks.0.norm2.bias": (16,),
        "blocks.0.mlp.fc1.weight": (64, 16), "blocks.0.mlp.fc1.bias": (64,),
        "blocks.0.mlp.fc2.weight": (16, 64), "blocks.0.mlp.fc2.bias": (16,),
        "norm.weight": (16,), "norm.bias": (16,)}


def test_vit_base_has_its_known_number_of_parameters():
    with torch.device("meta"):
        model = VisionTransformer()
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 and len(model.blocks) == 12
    assert model.pos_embed.shape == (1, 197, 768)


@pytest.mark.parametrize("channels, size", [(1, 8), (3, (8, 12)), (4, (12, 4)), (7, (4, 4))])
def test_any_channel_count_and_image_shape_gives_cls_and_one_token_per_patch(channels, size):
    model = VisionTransformer(**(TINY | dict(image_size=size, channels=channels)))
    height, width = pair(size)
    images = torch.randn(2, channels, height, width)
    assert model(images).shape == (2, 1 + height * width // 16, 16)
    assert model.features(images).shape == model.features(images, "cls").shape == (2, 16)


def test_the_model_is_patches_plus_positions_behind_cls_then_blocks_then_norm():
    torch.manual_seed(0)
    model, images = shuffled(VisionTransformer(**TINY)).double(), torch.randn(2, 3, 8, 12, dtype=torch.double)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    x = F.layer_norm(model.blocks[1](model.blocks[0](x)), (16,), model.norm.weight, model.norm.bias, 1e-6)
    assert torch.allclose(model(images), x, rtol=1e-12, atol=1e-12)
    mean = sum(x[:, n] for n in range(1, 7)) / 6
    assert torch.allclose(model.features(images), mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(model.features(images, token="cls"), x[:, 0], rtol=1e-12, atol=1e-12)


def test_an_images_tokens_do_not_depend_on_the_others_in_its_batch():
    torch.manual_seed(0)
    model, images = VisionTransformer(**TINY).double(), torch.randn(3, 3, 8, 12, dtype=torch.double)
    assert torch.allclose(model(images)[1:2], model(images[1:2]), rtol=1e-12, atol=1e-13)


def test_moving_a_patch_changes_the_features():
    torch.manual_seed(0)
    model, images = VisionTransformer(**TINY).double(), torch.randn(1, 3, 8, 12, dtype=torch.double)
    assert not torch.allclose(model.features(images), model.features(images.roll(4, dims=3)), atol=1e-6)


def test_positions_never_train_and_everything_else_does():
    torch.manual_seed(0)
    model, images = VisionTransformer(**TINY), torch.randn(2, 3, 8, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = model.pos_embed.clone()
    (model(images) * torch.randn(2, 7, 16)).sum().backward()
    optimizer.step()
    assert model.pos_embed.grad is None and torch.equal(model.pos_embed, before)
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == ["pos_embed"]


def test_weights_start_as_in_mae():
    torch.manual_seed(0)
    model = VisionTransformer(32, 4, 3, dim=64, depth=1, heads=2)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.ndim in (2, 4):                                       # Xavier-uniform: up to √(6 / (in + out))
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert abs(p.std() * math.sqrt(3) - bound) < 0.03 * bound, name
    assert 0.015 < model.cls_token.std() < 0.025


# ---- Refusals

@pytest.mark.parametrize("change, message", [
    (dict(heads=3), "dim=16 is not divisible by heads=3; try heads=1"),
    (dict(image_size=(10, 12)),
     r"image_size=\(10, 12\) is not a multiple of patch=4; try image_size=\(8, 12\)"),
    (dict(image_size=(8, 3)),
     r"image_size=\(8, 3\) is not a multiple of patch=4; try image_size=\(8, 4\)"),
    (dict(dim=18, heads=2), r"dim=18 is not divisible by 4 .*; try 20")])
def test_sizes_that_do_not_divide_are_refused_with_sizes_that_do(change, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**(TINY | change))


@pytest.mark.parametrize("shape", [(2, 3, 12, 8), (2, 1, 8, 12), (3, 8, 12), (2, 3, 8, 8), (2, 8, 12, 3)])
def test_images_of_another_shape_are_refused(shape):
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 8, 12\), got \(" + got):
        VisionTransformer(**TINY)(torch.zeros(shape))


# ---- Learning

@pytest.mark.parametrize("token", ["mean", "cls"])
def test_eight_random_images_are_learned_by_heart(token):
    torch.manual_seed(0)
    model, head = VisionTransformer(**TINY), nn.Linear(16, 8)
    images, labels = torch.randn(8, 3, 8, 12), torch.arange(8)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(120):
        loss = F.cross_entropy(head(model.features(images, token)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1                                                # log 8 = 2.08 at chance
