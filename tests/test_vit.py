"""The ViT against PyTorch's attention and against loops (its blocks, written out again: test_mae.py)."""

import math

import pytest
import torch
from torch.nn import functional as F

from models import VIT, shuffled, small
from vit import Block, VisionTransformer, attention, drop_path, sincos_positions


def test_written_out_attention_is_torchs_fused_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 5, dtype=torch.double)
    assert torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.9])
def test_drop_path_leaves_out_whole_samples_and_enlarges_the_others(rate):
    torch.manual_seed(0)
    branch = torch.randn(4000, 2, 3, dtype=torch.double)
    dropped = drop_path(branch, rate)
    out = (dropped == 0).all(dim=(1, 2))
    assert dropped.dtype == torch.double and drop_path(branch.bfloat16(), rate).dtype == torch.bfloat16
    assert torch.allclose(dropped[~out], branch[~out] / (1 - rate), rtol=1e-15, atol=0)
    assert abs(out.double().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / 4000)         # 4 deviations


@pytest.mark.parametrize("depth, rate, rates", [(12, 0.11, [i / 100 for i in range(12)]), (2, 0.4, [0, 0.4]),
                                                (1, 0.4, [0]), (3, 0.0, [0, 0, 0])])
def test_the_rate_of_drop_path_rises_in_a_line_from_the_first_block_to_the_last(depth, rate, rates):
    model = small(VisionTransformer, VIT, depth=depth, drop_path=rate)
    assert [block.rate for block in model.blocks] == pytest.approx(rates, abs=1e-12)


def test_a_block_draws_for_each_of_its_two_branches_anew():
    """Each sample ends as one of four: with both branches, one, the other, or none."""
    block, x = shuffled(Block(8, heads=2, rate=0.5)), torch.randn(1, 3, 8, dtype=torch.double)
    expected = {}
    for first in (0, 2):
        y = x + first * block.attn(block.norm1(x))
        expected |= {(first, second): y + second * block.mlp(block.norm2(y)) for second in (0, 2)}
    seen = [case for out in block(x.expand(64, -1, -1)) for case, y in expected.items()
            if torch.allclose(out, y[0], rtol=1e-10, atol=1e-12)]
    assert len(seen) == 64 and set(seen) == set(expected)


def test_drop_path_is_off_in_evaluation_and_at_rate_0_where_no_random_number_is_drawn():
    model, plain = (shuffled(small(VisionTransformer, VIT, drop_path=rate)) for rate in (0.5, 0.0))
    images, state = torch.randn(6, 3, 8, 12, dtype=torch.double), torch.get_rng_state()
    expected = plain(images)
    assert torch.equal(model.eval()(images), expected) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(model.train()(images), expected)


@pytest.mark.parametrize("dim, grid", [(16, (3, 3)), (24, (5, 2)), (4, (1, 3)), (768, (14, 14))])
def test_positions_are_the_formula_column_first_then_row_and_zero_for_cls(dim, grid):
    table = [[0.0] * dim]
    for row in range(grid[0]):
        for column in range(grid[1]):
            table.append([f(place / 10000 ** (i / (dim // 4))) for place in (column, row)
                          for f in (math.sin, math.cos) for i in range(dim // 4)])
    positions = sincos_positions(dim, grid)
    assert positions.shape == (1, 1 + grid[0] * grid[1], dim) and positions.dtype == torch.float32
    assert torch.allclose(positions[0].double(), torch.tensor(table, dtype=torch.double), rtol=0, atol=1e-7)


@pytest.mark.parametrize("change", [{}, dict(image_size=8, channels=1), dict(image_size=(12, 4), channels=7)])
def test_the_model_is_patches_plus_positions_behind_cls_then_blocks_then_norm(change):
    model = shuffled(small(VisionTransformer, VIT, **change))
    size = (change.get("channels", 3), *(4 * side for side in model.patch_embed.grid))
    images = torch.randn(2, *size, dtype=torch.double)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    x = F.layer_norm(model.blocks[1](model.blocks[0](x)), (16,), model.norm.weight, model.norm.bias, 1e-6)
    assert torch.allclose(model(images), x, rtol=1e-11, atol=1e-11)
    mean = sum(x[:, 1 + n] for n in range(x.shape[1] - 1)) / (x.shape[1] - 1)
    assert torch.allclose(model.features(images), mean, rtol=1e-11, atol=1e-11)
    assert torch.allclose(model.features(images, token="cls"), x[:, 0], rtol=1e-11, atol=1e-11)
