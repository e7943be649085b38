"""benchmark.py --device: what is counted, what is compared, and what the tables say."""

import dataclasses
import json
import math
import re
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark_device
import benchmark_measure
import benchmark_profile
import benchmark_recipe as recipe
import benchmark_steps as steps
from benchmark_baseline import Compiled, Own, Plain, PlainAttention
from benchmark_measure import Row, in_turn, timed
from benchmark_steps import Work
from config import load
from distributed import Team
from labels import TASKS
from pretended_card import CARD, pretended_card
from settings import Config
from vit import Attention

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TEAM = Team(0, 1, CPU)
OWN, PLAIN = Own(TEAM), Plain(TEAM)
SMALL = ["vit.image_size=24", "vit.dim=24", "vit.depth=2", "vit.heads=2", "pretrain.decoder_dim=16",
         "pretrain.decoder_depth=1", "pretrain.decoder_heads=2", "segments.window=12", "segments.stride=8",
         "temporal.channels=[8,8,6]", "temporal.width=8", "temporal.heads=2", "temporal.hidden=20",
         "temporal.layers=1", "temporal.head=10", "task.batch=3", "features.batch=4",
         "finetune.dropout=0", "temporal.dropout=0"]
STEPS = {"mae": lambda config, way: steps.mae_step(config, way, 4),
         "finetune": lambda config, way: steps.finetune_step(config, way, 4),
         "cotex": lambda config, way: steps.cotex_step(config, way, 4),
         "segment": steps.segment_step}


@pytest.fixture
def config():
    return load(str(ROOT / "configs/demo.yaml"), SMALL)


def product(side: int = 8) -> Work:
    return steps.matrix_product(OWN, torch.float32, side)


# ---- What is counted

@pytest.mark.parametrize("name", STEPS)
def test_a_steps_cost_is_what_pytorchs_counter_counts(config, name):
    work = STEPS[name](config, PLAIN)
    step = work.build()
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == work.count * work.flops > 0


@pytest.mark.parametrize("changed", [["temporal.tcn=false"], ["temporal.transformer=false"],
                                     ["temporal.tcn=false", "temporal.transformer=false"],
                                     ["temporal.channels=[24,24,24]"], ["temporal.kernels=[3,1,5]"]])
def test_the_segment_models_cost_follows_its_settings(changed):
    config = load(str(ROOT / "configs/demo.yaml"), [*SMALL, *changed])
    work = steps.segment_step(config, PLAIN)
    step = work.build()
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == work.count * work.flops


def test_a_forward_passs_cost_is_what_pytorchs_counter_counts(config):
    features, video = steps.extraction(config, PLAIN), steps.whole_video(config, PLAIN, 28)
    for work in (features, video):
        step = work.build()
        with FlopCounterMode(display=False) as counter:
            step()
        assert abs(counter.get_total_flops() - work.count * work.flops) < work.count     # rounded, a frame


def test_the_papers_mae_step_costs_58_gflop_an_image():
    assert recipe.mae_step(Config()) == 58_455_588_864
    assert recipe.mae_step(Config()) + recipe.patches(Config().vit)[1] == 58_686_799_872     # three forwards


# ---- The ways

@pytest.mark.parametrize("name", STEPS)
def test_the_baseline_computes_the_projects_loss_with_the_same_weights(config, name):
    losses = []
    for way in (OWN, PLAIN):
        torch.manual_seed(3)
        losses.append(STEPS[name](config, way).build()())
    assert losses[0].isfinite() and losses[0] > 0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_the_baselines_attention_is_the_projects_with_padding_too():
    torch.manual_seed(0)
    own, x, valid = Attention(8, 2).double(), torch.randn(3, 5, 8).double(), torch.arange(5)[None] < 4
    plain = PlainAttention(8, 2).double()
    plain.load_state_dict(own.state_dict())
    valid = valid.expand(3, 5)
    for mask in (None, valid):
        torch.testing.assert_close(own(x, mask), plain(x, mask))
    assert not torch.equal(plain(x, valid, 0.5), plain(x, valid))


def test_the_baseline_leaves_no_fused_attention_in_the_model_and_keeps_the_weights(config):
    model = steps.segment_model(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kinds = {type(module) for module in PLAIN.place(model).modules() if isinstance(module, Attention)}
    assert kinds == {PlainAttention}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert Attention.forward is not PlainAttention.forward


def test_the_baseline_is_exact_float32_and_puts_the_settings_back():
    parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [part.fp32_precision for part in parts]
    with pytest.raises(KeyError), PLAIN.precision():
        assert [part.fp32_precision for part in parts] == ["ieee", "ieee"]
        raise KeyError
    assert [part.fp32_precision for part in parts] == before != ["ieee", "ieee"]


def test_only_the_baseline_takes_images_that_were_normalised_on_the_host():
    images = steps.random_images(2, 4)
    waiting = [way.wait_images(images) for way in (OWN, PLAIN)]
    assert [tensor.dtype for tensor in waiting] == [torch.uint8, torch.float32]
    mine, theirs = OWN.fetch_images(waiting[0]), PLAIN.fetch_images(waiting[1])
    assert torch.equal(mine, theirs) and mine.shape == (2, 3, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segment"])                  # each takes 10 to 20 s to compile
def test_a_compiled_step_has_the_projects_loss(config, name):
    losses = []
    for way in (OWN, Compiled(TEAM)):
        torch.manual_seed(3)
        losses.append(STEPS[name](config, way).build()())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


# ---- Measuring

def test_works_are_measured_in_turn_after_two_calls_that_do_not_count(monkeypatch):
    calls = []

    def work(name):
        return Work(name, OWN, "", "images", 1, lambda: lambda: calls.append(name))
    monkeypatch.setattr(benchmark_measure, "ROUNDS", 2)
    rows = in_turn([work("a"), work("b")], product(), CPU, seconds=0)
    assert "".join(calls) == "aabb" + "abab"
    assert [len(row.seconds) for row in rows] == [2, 2]


def test_a_round_repeats_a_short_step_and_not_a_long_one(monkeypatch):
    monkeypatch.setattr(benchmark_measure, "timed", lambda step, calls, device, waits: [0.3] * calls)
    work = Work("a", OWN, "", "images", 6, lambda: lambda: None, flops=5)
    monkeypatch.setattr(benchmark_measure, "ROUNDS", 1)
    row, = in_turn([work], product(), CPU, seconds=1.0)
    assert len(row.seconds) == 3
    assert row.per_second == pytest.approx(20) and row.flops == pytest.approx(100)
    assert row.share == pytest.approx(100 / (2 * 8 ** 3 / 0.3))
    row, = in_turn([work], product(), CPU, seconds=0.1)
    assert len(row.seconds) == 1


def test_times_are_those_of_single_calls():
    pauses = iter([0.0, 0.05])
    first, second = timed(lambda: time.sleep(next(pauses)), 2, CPU, waits=False)
    assert first < 0.05 <= second


@pytest.fixture
def card(monkeypatch):
    """As much of torch.cuda as measuring needs, without a card: a clock in ms, bytes, a count of waits."""
    card = SimpleNamespace(clock=0.0, bytes=0, peak=0, waits=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = card.clock

        def elapsed_time(self, later):
            return later.at - self.at

    def synchronize():
        card.waits += 1
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: card.bytes)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: card.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(card, "peak", card.bytes))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return card


def test_on_a_card_times_are_taken_there_between_the_ends_of_steps_without_waiting_between(card):
    steps_take = iter([5.0, 7.0, 11.0])

    def step():
        card.clock += next(steps_take)
    assert timed(step, 3, torch.device("cuda"), waits=False) == [0.005, 0.007, 0.011]
    assert card.waits == 2


def test_on_a_card_a_peak_is_without_what_the_others_hold(card, monkeypatch):
    monkeypatch.setattr(benchmark_measure, "ROUNDS", 1)

    def work(name, holds, needs):
        def build():
            card.bytes += holds

            def step():
                card.clock += 1
                card.peak = max(card.peak, card.bytes + needs)
            return step
        return Work(name, OWN, "", "images", 1, build)
    works = [work("a", holds=100, needs=20), work("b", holds=1000, needs=300)]
    rows = in_turn(works, work("matrix", 10, 0), torch.device("cuda"), seconds=0)
    assert [row.memory for row in rows] == [120, 1300]


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (RuntimeError("unable to allocate shared memory(shm) for file"), "out of shared memory")])
@pytest.mark.parametrize("at_first", [True, False])
def test_a_size_for_which_memory_is_too_small_is_a_row_and_the_others_go_on(error, said, at_first):
    count = iter(range(100))

    def step():
        if at_first or next(count) > 3:
            raise error
    works = [Work("a", OWN, "9 images", "images", 9, lambda: step),
             Work("b", PLAIN, "9 images", "images", 9, lambda: lambda: None)]
    rows = in_turn(works, product(), CPU, seconds=0)
    assert rows[0].problem == said and rows[0].seconds == [] and rows[1].seconds
    line = benchmark_device.line(rows[0], rows)
    assert line == f"| a | project | 9 images | - | - | - | - | - | {said} |"


def test_another_error_is_not_taken_for_full_memory():
    def step():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        in_turn([Work("a", OWN, "", "images", 1, lambda: step)], product(), CPU, seconds=0)


# ---- The tables

def test_a_row_has_median_middle_half_rate_share_memory_and_how_many_times_as_fast():
    def row(way, seconds, **more):
        work = Work("MAE step", way, "64 images", "images", 64, None, flops=10 ** 9)
        return Row(work, seconds, matrix=128e9, **more)
    mine = row(OWN, [0.9, 1.0, 1.0, 1.2, 2.0], memory=1_234_000_000)
    plain, compiled = row(PLAIN, [2.5]), row(Compiled(TEAM), [0.8], first=12.34)
    rows = [mine, plain, compiled]
    assert benchmark_device.line(mine, rows) == ("| MAE step | project | 64 images | 1,000 (1,000 to 1,200) "
                                                 "| 64 images | 0.064 | 50 % | 1.23 | 2.50 x plain |")
    assert benchmark_device.line(plain, rows).endswith("| 25.6 images | 0.0256 | 20 % | - | |")
    assert benchmark_device.remarks(compiled, rows) == "1.25 x project, first call 12.3 s"
    assert all(line.count("|") == benchmark_device.HEADER.splitlines()[0].count("|")
               for line in (benchmark_device.line(one, rows) for one in rows))


def test_numbers_are_as_exact_as_a_reader_needs():
    assert [benchmark_device.number(x) for x in (None, 0.01234, 1.234, 99.94, 99.96, 1234.5)] == [
        "-", "0.0123", "1.23", "99.9", "100", "1,234"]


def test_names_of_kernels_and_operations_are_sorted_into_words():
    names = {"matrix products": ["aten::addmm", "aten::bmm", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT",
                                 "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
                                 "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>",
                                 "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32",
                                 "aten::convolution_backward"],
             "attention": ["pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "aten::_softmax",
                           "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)",
                           "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3",
                           "aten::_scaled_dot_product_flash_attention_for_cpu_backward"],
             "norms": ["void at::native::vectorized_layer_norm_kernel<float>", "aten::native_layer_norm",
                       "void at::native::GammaBetaBackwardCUDAKernelTemplate"],
             "optimiser": ["multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "aten::_fused_adamw_",
                           "Optimizer.step#AdamW.step"],
             "copies and gathers": ["Memcpy HtoD (Pinned -> Device)", "aten::copy_", "aten::cat",
                                    "void at::native::CatArrayBatchedCopy_contig", "aten::gather",
                                    "elementwise_kernel<direct_copy_kernel_cuda>", "Memset (Device)"],
             "GELU": ["aten::gelu", "vectorized_elementwise_kernel<GeluCUDAKernelImpl>"],
             benchmark_profile.REST: ["aten::add", "reduce_kernel<512, 1, MeanOps>"]}
    found = {title: {benchmark_profile.group(name) for name in some} for title, some in names.items()}
    assert found == {title: {title} for title in names}
    assert set(names) == {*benchmark_profile.GROUPS, benchmark_profile.REST}


def test_the_shares_of_a_profile_add_up_and_large_products_take_most():
    a = torch.randn(256, 256)
    found = benchmark_profile.shares(lambda: (a @ a).relu(), CPU)
    assert sum(found["groups"].values()) == pytest.approx(1)
    assert next(iter(found["groups"])) == "matrix products" and found["top"][0][0] == "aten::mm"
    assert found["seconds"] > 0
    assert "| matrix products |" in benchmark_profile.table(found)[2]


# ---- The recipe

def test_the_recipe_is_samples_over_the_slower_of_computing_and_reading(config):
    config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, epochs=7),
                                 finetune=dataclasses.replace(config.finetune, epochs=2, every=4),
                                 task=dataclasses.replace(config.task, epochs=0))
    counts = recipe.Counts(100, 41, 20, 600, {"va": (5, 30), "au": (6, 40)})
    rates = recipe.Rates(pretrain=50, finetune=11, extract=60, segments=4, videos=100, stills=35, crops=12)
    parts = recipe.recipe(config, counts, rates)
    assert [(part.samples, part.rate, part.bound_by) for part in parts] == [
        (700, 35, "reading images"), (22, 11, "computing"), (2 * 5 + 20, 60, "reading and computing"),
        (600, 60, "reading and computing"), (40 * 5, 4, "computing"), (41 * 30, 100, "computing"),
        (30 * 6, 4, "computing"), (31 * 40, 100, "computing")]
    assert [part.seconds for part in parts[:2]] == [20, 2]
    lines = benchmark_device.recipe_lines(parts)
    total = 20 + 2 + 0.5 + 10 + 50 + 12.3 + 45 + 12.4
    assert lines[-1] == f"| all | | | | {total / 60:.1f} min |"
    assert lines[2] == "| pre-training, 7 epochs | 700 images | 35 | reading images | 20 s |"


def test_a_rate_that_was_not_measured_leaves_its_part_open(config):
    rates = recipe.Rates(None, 1, 1, 1, 1, None, 1)
    parts = recipe.recipe(config, recipe.DEMO, rates)
    lines = benchmark_device.recipe_lines(parts)
    assert lines[2].endswith("| - | not measured | - |") and "all, 1 parts not measured" in lines[-1]


def test_the_recipes_rates_are_the_projects_and_of_the_largest_batch_that_is_not_above_the_recipes():
    def row(way, count, rate, seconds):
        return Row(Work("", way, "", "images", count, None, rate=rate), seconds)
    rows = [row(OWN, 10, "pretrain", [1.0]), row(OWN, 20, "pretrain", [1.0]),
            row(PLAIN, 20, "pretrain", [4.0]), row(OWN, 40, "pretrain", [1.0]),
            row(OWN, 6, "videos", [2.0]), row(OWN, 6, "crops", [])]
    rates = benchmark_device.rates_of(rows, batch=30)
    assert (rates.pretrain, rates.videos, rates.crops, rates.stills) == (20, 3, None, None)


def test_every_rate_of_the_recipe_is_measured_and_every_way_of_the_compared_rows(config, tmp_path):
    steps.draw_jpegs(tmp_path / "stills", 1, 96)
    steps.draw_jpegs(tmp_path / "video", 1, 112)
    ways = [OWN, PLAIN, Compiled(TEAM)]
    groups = list(benchmark_device.groups(config, benchmark_device.SIZES["cpu"], ways, tmp_path))
    works = [work for group in groups for work in group]
    assert {work.rate for work in works} - {""} == set(recipe.Rates.__dataclass_fields__)
    compared = [[work.way.name for work in group] for group in groups if len(group) > 1]
    assert compared.count(["project", "plain", "compiled"]) == 7 and compared.count(["project", "plain"]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_all_is_measured_on_a_card_and_no_step_of_the_projects_waits(config, card, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_measure, "ROUNDS", 1)
    small = dataclasses.replace(benchmark_device.SIZES["cuda"], mae=(4, 8), compared=8, finetune=2, video=10)
    steps.draw_jpegs(tmp_path / "stills", 3, 96)
    steps.draw_jpegs(tmp_path / "video", 10, 112)
    with pretended_card() as there:
        ways = [Own(Team(0, 1, CARD)), Plain(Team(0, 1, CARD))]
        matrix = steps.matrix_product(ways[0], torch.bfloat16, 8)
        for works in benchmark_device.groups(config, small, ways, tmp_path):
            rows = in_turn(works, matrix, CARD, seconds=0)
            assert all(row.seconds for row in rows), rows
            if ways[0] is works[0].way and not works[0].waits:
                step = works[0].build()
                step()
                there.refuse_waiting(True)
                step()
                there.refuse_waiting(False)


def test_the_papers_counts_are_those_of_the_data_page():
    page = (ROOT / "docs/data.md").read_text()
    numbers = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", page)}
    paper, config = recipe.PAPER, load(str(ROOT / "configs/paper.yaml"))
    assert {420_000, paper.faces - 420_000, paper.expr_frames, paper.expr_val_frames, 1_653_900,
            1_356_694, 927_210, *(frames for _, frames in paper.tasks.values())} <= numbers
    assert paper.frames == 1_653_900 + 376_330 + 927_210
    stride = config.segments.stride
    assert [segments for segments, _ in paper.tasks.values()] == [
        math.floor(frames / stride) for frames in (1_653_900, 585_317, 1_356_694)]
    assert set(paper.tasks) == set(recipe.DEMO.tasks) == set(TASKS)


# ---- The script

def test_a_card_that_is_not_there_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmark.py"), run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert said.err == ("error: --device cuda, but PyTorch sees no GPU here; "
                        "--device cpu measures the demo's sizes\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_table_is_printed_and_written_on_the_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark_measure, "ROUNDS", 1)
    small = dataclasses.replace(benchmark_device.SIZES["cpu"], mae=(4, 8), compared=8, finetune=4, video=100,
                                files=20, matrix=256, seconds=0.0)
    monkeypatch.setitem(benchmark_device.SIZES, "cpu", small)
    benchmark_device.main("cpu", out=tmp_path)
    text = (tmp_path / "benchmark_cpu.md").read_text()
    assert text in capsys.readouterr().out
    found = json.loads((tmp_path / "benchmark_cpu.json").read_text())
    assert len(found["rows"]) == text.count("| project |") + text.count("| plain |") == 22
    assert all(row["median_seconds"] > 0 and row["problem"] == "" for row in found["rows"])
    assert all(part["seconds"] > 0 for part in found["recipe"]) and len(found["recipe"]) == 10
    assert found["profile"]["groups"]["matrix products"] > 0.1
