"""tools/benchmark.py: what is counted, compared and promised, and the whole table at tiny sizes."""

import itertools
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.config import load
from processes import ALONE
from tools import benchmark
from tools.benchmark import PROMISED, SIZES, adamw, check, cnn, in_turn, speed, step_of

SMALL = """vit.image_size=24 vit.patch=8 vit.dim=24 vit.depth=2 vit.heads=2 pretrain.decoder_dim=16
    pretrain.decoder_heads=2 pretrain.decoder_depth=1 finetune.dropout=0 finetune.hidden=10
    segments.window=12 segments.stride=8 temporal.dropout=0 task.batch=3"""
STEPS = ["MAE", "fine-tuning", "extraction", "EMMA", "CoTEX", "segments"]


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(cnn, "DAN", partial(cnn.DAN, width=2))
    return load("configs/demo.yaml", SMALL.split())


def transformer(n: int, D: int, layers: int) -> int:           # q, k, v, projection; MLP; q kᵀ, weights · v
    return layers * (n * (8 * D * D + 16 * D * D) + 4 * n * n * D)


def mae(patches, pixels, visible, D, depth, d, blocks) -> int:
    decoder = transformer(patches + 1, d, blocks) + 2 * (patches + 1) * d * pixels
    encoder = transformer(visible + 1, D, depth) + 2 * (visible + 1) * D * d
    return 3 * (encoder + decoder) + 2 * 2 * patches * pixels * D                   # images need no gradient

# Of one sample: 9 patches of 192 numbers, D = 24; a mask leaves two patches.
EMBED, VIT, VIEW = 2 * 9 * 192 * 24, transformer(10, 24, 2), transformer(3, 24, 2) + 2 * 24 * 6
BY_HAND = {"MAE": mae(9, 192, 2, 24, 2, 16, 1), "fine-tuning": 3 * (VIT + 2 * 10 * (24 + 8)) + 2 * EMBED,
           "extraction": VIT + EMBED, "CoTEX": 2 * (3 * VIEW + 2 * EMBED)}


@pytest.mark.parametrize("name", BY_HAND)
def test_pytorchs_counter_finds_the_matrix_products_of_a_step(config, name):
    with FlopCounterMode(display=False) as counter:
        step_of(name, config, 2, ALONE, plain=True)()
    assert counter.get_total_flops() == 2 * BY_HAND[name]
    assert mae(196, 768, 49, 768, 12, 512, 8) == 58_455_588_864              # docs/running.md


@pytest.mark.parametrize("name", STEPS)
def test_both_ways_compute_the_same_and_a_training_learns(config, name, monkeypatch):
    called, trains, clip = [], name != "extraction", 1.0 if name in ("EMMA", "CoTEX") else 0.0
    monkeypatch.setattr(benchmark, "adamw", lambda model, part: called.append("adamw") or adamw(model, part))
    monkeypatch.setattr(benchmark, "clip_gradient", lambda model, longest: called.append(longest))
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self, set_to_none: called.append(set_to_none))
    theirs, ours = step_of(name, config, 4, ALONE, plain=True)(), step_of(name, config, 4, ALONE)
    first, again, one = ours(), ours(), [True, clip] if trains else [True]
    torch.testing.assert_close(first, theirs, rtol=1e-5 if trains else 1e-3, atol=1e-6)
    assert torch.equal(first, again) != trains and first.isfinite().all() and not first.requires_grad
    assert called == [*one, "adamw", *one, *one] and (name != "MAE" or first > 1)


def clock(seconds):                                             # what is measured takes the next of these
    def timer(statement, globals, num_threads):
        assert statement == "step()" and num_threads == torch.get_num_threads()
        return mock.Mock(timeit=lambda number: globals["step"](), blocked_autorange=lambda min_run_time:
                         mock.Mock(got=globals["step"](), times=[next(seconds)]))
    return timer


def test_ways_are_measured_in_turn_and_one_that_is_too_large_has_no_numbers(monkeypatch):
    called, full = [], mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    a, b = partial(called.append, "a"), partial(called.append, "b")
    builds = {"a": lambda: a, "full": lambda: full, "b": lambda: b, "larger": full}
    monkeypatch.setattr(benchmark, "Timer", clock(iter([0.5, 7, 0.1, 20, 0.2, 8])))
    assert in_turn(builds, 0.2) == {"a": (0.2, 0), "b": (8, 0)} and called == ["a", "b"] * 4
    monkeypatch.undo()
    assert 0 < in_turn({"a": lambda: lambda: torch.zeros(9).sum()}, 0.001)["a"][0] < 1     # PyTorch's Timer


def test_the_whole_table_is_printed_and_written(config, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "cpu", ("demo", (3, 4), 2, (16, torch.float32), 0))
    monkeypatch.setattr(benchmark, "Timer", clock(iter([0.5] * 51 + [20] * 6)))             # JPEG 224 is slow
    monkeypatch.setattr(benchmark, "step_of", mock.Mock(side_effect=step_of))
    speed(config, ALONE)
    assert [call.args[4] for call in benchmark.step_of.call_args_list if call.args[4:]] == [False, True] * 7
    text = Path("runs/benchmark_cpu.md").read_text()
    assert text == capsys.readouterr().out
    rows = [line.strip("| ").replace(",", "").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    steps = itertools.product(zip(["MAE", *STEPS], "3422223"), ("project", "plain"))
    for row, ((name, n), way) in zip(rows[1:15], steps, strict=True):
        assert row[:5] == [name, way, n, "500.00", f"{2 * int(n)}"] and row[7] == "-"
        flops = 2 * int(n) * BY_HAND.get(name, 0)                                           # a second
        assert not flops or row[5:7] == [f"{flops / 1e12:.3g}", f"{flops / (2 * 2 * 16 ** 3):.2f}"]
    assert [" ".join(row) for row in rows[15:]] == [f"JPEG {jpeg} - - -" for jpeg in (
        "112 one core 64 500.00 128", "112 all cores 64 500.00 128",
        "224 one core 64 20000.00 3", "224 all cores 64 20000.00 3")]


def test_the_demo_is_checked_against_what_is_promised(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert not check() and capsys.readouterr().out.count("NOT KEPT") == 3                  # nothing is there
    for below, above in ((0, 0), (0.001, 0), (0, 0.001)):
        for task in PROMISED:
            a, b = PROMISED[task][0] - below * (task == "expr"), PROMISED[task][1] + above * (task == "au")
            benchmark.write_text(f"runs/demo/task_{task}/metrics.json", f'{{"score": {a}, "chance": {b}}}')
        assert check() == (below == above) and capsys.readouterr().out.count("NOT KEPT") == (below != above)
