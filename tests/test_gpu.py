"""What a GPU may do otherwise than the CPU. Most tests run without one, too: the CPU then computes in bf16,
or a card is only pretended (pretended_card.py).

    pytest -m gpu          # the GPU's half
"""

import contextlib
import csv
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine.distributed
import losses
import tiny
from engine.distributed import BACKENDS, Team, all_sum, choose_device
from engine.settings import Config, Finetune, Vit
from engine.training import in_pieces
from mae import MaskedAutoencoder
from models import MAE, SEGMENT, TCN, VIT, shuffled
from pretended_card import PretendedCard, pretend
from processes import CPU
from scoring import ExprClassifier
from second_paper.cnn import DAN, ResNet18, affinity_loss, partition_loss
from second_paper.cotex import CoTEX, cotex_loss
from second_paper.emma import EMMA, emma_losses
from tcn import TemporalConvNet
from temporal import SegmentModel
from tiny import EACH_STEP, STAGES, TINY, done, log, ready
from vit import VisionTransformer

CARDS = torch.cuda.device_count()
ON_CARD = [pytest.mark.gpu, pytest.mark.skipif(CARDS < 1, reason="PyTorch sees no CUDA GPU here")]
slow, on_gpu = partial(pytest.param, marks=pytest.mark.slow), partial(pytest.param, marks=ON_CARD)
PLACES = [("cpu", "bf16"), on_gpu("cuda", "float32"), on_gpu("cuda", "bf16")]
B, T, LARGE = 6, 50, VIT | {"image_size": 32}


# ---- Layers and losses

def images(height=8, width=12):
    return torch.randn(B, 3, height, width)


def real_frames():
    """Segments of 1 to T real frames: (B, T)."""
    return torch.arange(T) < torch.tensor([T, 1, 7, T, 30, 12])[:, None]


def some(*shape):
    """Which entries are valid; some are not."""
    return torch.rand(*shape) < 0.7


def emma_labels():
    labels = torch.cat([torch.rand(B * T, 2), torch.randint(8, (B * T, 1)), torch.randint(2, (B * T, 12))], 1)
    return labels.where(some(B * T, 15), torch.tensor([-5.0] * 2 + [-1.0] * 13))


def segments(**parts):
    return lambda: (SegmentModel(**SEGMENT, **parts), torch.randn(B, T, 6), real_frames())


def classifier():
    config = Config()
    config.vit = Vit(**{name: value for name, value in VIT.items() if name != "channels"})
    config.finetune = Finetune(token="mean", hidden=16, dropout=0.0, drop_path=0.0)
    return ExprClassifier(config)


# Each gives a model, or a loss, and what it takes; a loss learns the first of these.
MODELS = {
    "vit": lambda: (VisionTransformer(**VIT), images()),
    "mae": lambda: (MaskedAutoencoder(**MAE), images(), torch.rand(B, 6)),
    "mae, normalised": lambda: (MaskedAutoencoder(**MAE, norm_pix_loss=True), images(), torch.rand(B, 6)),
    "classifier": lambda: (classifier(), images()),
    "cotex": lambda: (CoTEX(**VIT), images(), torch.rand(B, 2, 6)),
    "emma": lambda: (EMMA(VisionTransformer(**LARGE), DAN(width=4), 16, 16), images(32, 32)),
    "resnet": lambda: (ResNet18(8, width=8), images(64, 64)),
    "dan": lambda: (shuffled(DAN(width=8)).float(), images(64, 64)),      # no head near 0, as after training
    "tcn": lambda: (TemporalConvNet(**TCN), torch.randn(B, T, 6), real_frames()),
    "segments": segments(), "segments, centred": segments(causal=False),
    "segments without tcn": segments(tcn=False), "segments without transformer": segments(transformer=False),
    "single frames": segments(tcn=False, transformer=False)}
LOSSES = {
    "ccc": lambda: (losses.ccc_loss, torch.randn(B, T, 2), torch.rand(B, T, 2) * 2 - 1, some(B, T, 2)),
    "expr": lambda: (losses.expr_loss, torch.randn(B, T, 8), torch.randint(8, (B, T)), some(B, T)),
    "au": lambda: (losses.au_loss, torch.randn(B, T, 12), torch.randint(2, (B, T, 12)), some(B, T, 12)),
    "js": lambda: (lambda z, valid: losses.js_loss(list(z), valid), 3 * torch.randn(2, B, 6), some(B)),
    "cotex": lambda: (lambda z, y, valid: cotex_loss(z, y, valid, 16.7), torch.randn(2, B, 6),
                      torch.randint(6, (B,)), some(B)),
    "emma": lambda: (emma_losses, torch.randn(B * T, 22), emma_labels(), torch.rand(12) * 9),
    "affinity": lambda: (affinity_loss, torch.randn(B, 4), torch.arange(B), some(B), torch.randn(8, 4)),
    "partition": lambda: (partition_loss, torch.randn(B, 4, 16))}
ALL = MODELS | {f"{name} loss": make for name, make in LOSSES.items()}
# How far outputs and gradient may be off. bf16 has 8 bits, so a rounding is 0.4 %. BatchNorm over 6 small
# maps, and the difference between DAN's heads, make ten times as much of it.
LIMITS = {"float32": (1e-5, 1e-4), "bf16": (0.02, 0.06)}


def computed(name, device: str, dtype: str) -> list[torch.Tensor]:
    """What a model or a loss gives, and the gradients, as one vector: on the CPU, in float32."""
    torch.manual_seed(0)
    model, *inputs = ALL[name]()
    inputs = [x.to(device) for x in inputs]
    learned = [inputs[0].requires_grad_()]
    if isinstance(model, nn.Module):
        learned = [parameter for parameter in model.to(device).parameters() if parameter.requires_grad]
    elif dtype == "bf16":
        inputs[0] = inputs[0].bfloat16()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
        outputs = model(*inputs)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs                     # the MAE's loss
    # A loss is float32. DAN's heads, of which one is, are so already.
    assert outputs.ndim or outputs.dtype == torch.float32 or name == "partition loss"
    outputs = outputs.float()
    scale = torch.linspace(0.5, 1.5, outputs.shape[-1] if outputs.ndim else 1, device=device)
    total = (outputs * scale).sum()               # all of one sign, so that no small difference is left over
    gradients = torch.autograd.grad(total, learned)
    return [outputs.detach().cpu(), torch.cat([gradient.flatten() for gradient in gradients]).cpu()]


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("name", ALL)
def test_a_layer_or_a_loss_gives_what_the_cpu_gives_in_float32(name, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")        # TF32 would round factors to 10 bits
    times = 10 if name in ("resnet", "dan", "emma") else 1
    given, expected = computed(name, device, dtype), computed(name, "cpu", "float32")
    for ours, exact, limit in zip(given, expected, LIMITS[dtype]):
        assert (ours - exact).norm() < times * limit * exact.norm()


@pytest.mark.filterwarnings("ignore:var")              # of no patch at all: the MAE normalises them
@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"dan", "resnet"}))         # BatchNorm needs a batch
def test_an_empty_share_gives_a_gradient_of_0_for_each_parameter(name, device, dtype):
    model, *inputs = MODELS[name]()
    model.to(device)
    empty = [x[:0].pin_memory() if device == "cuda" else x[:0] for x in inputs]
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
        outputs = model(*(x.to(device, non_blocking=True) for x in empty))
    total = (outputs[0] if isinstance(outputs, tuple) else outputs).sum()
    total.backward()
    assert total == 0
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- Whole runs

def in_bf16():
    """A hook: the CPU computes in bf16, as a GPU does."""
    tiny.instead("engine.distributed.Team.autocast",
                 lambda ours: lambda team: torch.autocast("cpu", torch.bfloat16))


def watch(refuse_waiting):
    """While a training takes steps Python may not wait. It may in an epoch's first, which sends constants,
    and in the second of several processes, in which DDP arranges its gradients anew."""
    def watched(batches):
        def function(run):
            for step, batch in enumerate(batches(run)):
                refuse_waiting(step >= min(2, run.team.world))
                yield batch
            refuse_waiting(False)
            print(f"{step} steps of {run.folder.name} were watched")
        return function
    tiny.instead("engine.run.Run.batches", watched)
    tiny.instead("engine.training.Progress.add", lambda add: lambda *ignored: None)    # a line reads the loss


def on_pretended_card():
    watch(partial(setattr, pretend(), "waiting_is_refused"))


def on_card():
    watch(lambda refuse: torch.cuda.set_sync_debug_mode("error" if refuse else "default"))


# run.device, and a hook.
WHERE = {"cpu": ("cpu", None), "bf16": ("cpu", in_bf16), "pretended": ("cuda", on_pretended_card),
         "card": ("cuda", on_card)}
DAN_ALONE = "stills+stills.network=dan"
TRAININGS = STAGES | {f"task_{name}": ["train_task", "--task", name] for name in ("va", "expr")}
TRAININGS |= {DAN_ALONE: [*STAGES["stills"], "--set", "stills.network=dan"]}


# Little is learned: a small model that learns much more ends elsewhere after any rounding. Images of 32, as
# PyTorch's CPU makes NaN of a convolution's gradient in bf16 where it strides over a single place.
LONGER = {"synthetic": {"train_videos": 8, "val_videos": 6, "frames": 100}, "task": {"epochs": 10},
          "vit": {"image_size": 32, "patch": 16}, "stills": {"width": 4, "epochs": 12, "lr": 0.01}}
ROUNDED = {"stills": 1.0, "emma": 0.2, "task_va": 0.1}       # BatchNorm and CCC make more of a rounding


def start(where, folder, *words, world=1) -> str:
    """A command there. -> what it said"""
    device, hook = WHERE[where]
    return done(folder, *words, *TINY, "--set", f"run.device={device}", hook=hook, world=world)


def train(where, folder, *stages, world=1):
    """Train these stages, and what they need. On a card their steps must be watched."""
    for stage in stages:
        said = start(where, folder, *TRAININGS[stage], world=world)
        watched = f"steps of {stage} were watched" in said and "\n0 steps" not in said
        assert watched or WHERE[where][0] == "cpu"


def assert_alike(folder, expected, *stages, limit=0.02):
    """The losses of each epoch."""
    for stage in stages:
        ours, exact = ([row["loss"] for row in log(place / "runs/tiny" / stage)]
                       for place in (folder, expected))
        assert ours == pytest.approx(exact, rel=ROUNDED.get(stage, limit)), stage


@pytest.mark.parametrize("stages", [("task_va", "emma", "cotex"), slow(("task_au", "task_expr", DAN_ALONE))])
def test_on_a_pretended_card_no_step_waits_and_no_tensor_lies_elsewhere(finished, tmp_path, stages):
    once = {"epochs": 1}
    folder = tiny.write(tmp_path, pretrain=once, finetune=once, task=once, stills=once, emma=once, cotex=once,
                        run={"largest_piece": 5})
    shutil.copytree(finished / "data", folder / "data")
    train("pretended", folder, *stages)


@pytest.mark.parametrize("where", [slow("bf16"), on_gpu("card")])
def test_all_trainings_learn_as_on_the_cpu_in_float32(tmp_path, where):
    exact = tiny.write(tmp_path / "cpu", **LONGER)
    ours = tiny.write(tmp_path / where, **LONGER, run={"workers": 1})
    for folder, place in ((exact, "cpu"), (ours, where)):
        train(place, folder, "task_au", "task_va", "task_expr", "emma", "cotex")
    stages = ("pretrain", "finetune", "task_au", "task_va", "task_expr", "stills", "emma", "cotex")
    assert_alike(ours, exact, *stages)
    for stage in stages:
        losses_of = [row["loss"] for row in log(ours / "runs/tiny" / stage)]
        assert losses_of[-1] < losses_of[0], stage


def predicted(where, folder) -> list:
    """Rows of (valence, Anger, AU1) of videos, of single images, and by EMMA; NaN where there is none."""
    for words in (["extract_features"], ["evaluate", "--task", "au"]):
        start(where, folder, *words)
    rows = []
    for options in ([], ["--still"], ["--emma", "runs/tiny/emma/best.pt"]):
        table, frames = folder / f"table{len(rows)}.csv", "data/Aff-Wild2/cropped_aligned"
        start(where, folder, "predict", "--frames", frames, "--out", f"{table}", *options)
        rows += [[float(row.get(column) or "nan") for column in ("valence", "Anger", "AU1")]
                 for row in csv.DictReader(table.read_text().splitlines())]
    return rows


@pytest.mark.parametrize("where, limit", [slow("pretended", 2e-6), on_gpu("card", 0.05)])
def test_a_card_predicts_what_the_cpu_does(finished, tmp_path, where, limit):
    folder = tiny.copied(finished, tmp_path / "cpu")
    train("cpu", folder, "emma")
    other = tiny.copied(folder, tmp_path / "other", ["features"])
    exact, ours = predicted("cpu", folder), predicted(where, other)
    assert np.isfinite(exact).any(axis=0).all()
    assert np.allclose(ours, exact, rtol=0, atol=limit, equal_nan=True)


def killed(begun):
    """A hook: the end before the third step ends; before, on a pretended card, if so begun."""
    if begun == "pretended":
        pretend()
    tiny.stop("engine.run.Run.end_step", 3)()


@pytest.mark.parametrize("begun, ended, limit", [
    slow("pretended", "cpu", 1e-5), slow("cpu", "pretended", 1e-5), on_gpu("card", "card", 0.02),
    on_gpu("card", "cpu", 0.02), on_gpu("cpu", "card", 0.02)])
def test_what_one_device_has_begun_another_goes_on_with(finished, tmp_path, begun, ended, limit):
    folder, _ = ready(finished, tmp_path, "finetune")
    words = [*TRAININGS["finetune"], *TINY, *EACH_STEP, "--set", f"run.device={WHERE[begun][0]}"]
    assert tiny.run(folder, *words, hook=partial(killed, begun))[0] == [-9]
    assert "going on from epoch 1, step 2" in start(ended, folder, *TRAININGS["finetune"])
    assert_alike(folder, finished, "finetune", limit=limit)


# ---- Several cards

@pytest.mark.gpu
@pytest.mark.skipif(CARDS < 2, reason="PyTorch sees fewer than two CUDA GPUs here")
def test_two_cards_train_as_one_does(tmp_path):
    for world in (1, 2):
        train("card", tiny.write(tmp_path / f"{world}"), "task_au", "emma", "cotex", world=world)
    assert_alike(tmp_path / "2", tmp_path / "1", "pretrain", "finetune", "task_au", "stills", "emma", "cotex")


def alone_but_adding_up(device: str):
    """A process that is alone, but does all that several do: what it adds up goes through gloo and NCCL."""
    engine.distributed.several = lambda: True
    team = Team(0, 2, choose_device(device))                       # DDP and messages of objects, too
    dist.init_process_group(BACKENDS[team.device.type], store=dist.HashStore(), rank=0, world_size=1)
    for place in {CPU, team.device}:                               # counts lie on the CPU, the loss does not
        x = torch.arange(3.0, device=place, requires_grad=True)
        (all_sum(x) ** 2).sum().backward()
        assert x.grad.tolist() == [0, 2, 4]
    assert team.agree({"a": 1}) == {"a": 1} and team.gather(5)[0] == 5
    team.wait()
    model, inputs, gradients = nn.Linear(3, 2), torch.randn(5, 3, device=team.device), []
    for ours in (team.parallel(model), model):                     # under DDP, and without
        model.zero_grad()
        for x, in in_pieces(ours, 2, inputs):
            all_sum(ours(x).square().sum()).backward()
        gradients.append(model.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4)
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
def test_a_process_alone_adds_up_through_the_backends_of_its_device(device):
    process = tiny.server.Process(target=alone_but_adding_up, args=(device,))
    process.start()
    process.join(tiny.SECONDS)
    process.kill()
    assert process.exitcode == 0


# ---- The pretended card itself

CANNOT = [
    lambda x: x + torch.ones(3), lambda x: torch.ones(2) @ x, lambda x: torch.stack([x, torch.ones(2, 3)]),
    lambda x: x[0].detach() * torch.ones(3), lambda x: nn.Linear(3, 1)(x),
    lambda x: nn.Linear(3, 1).to("cuda")(torch.ones(2, 3)), lambda x: x.numpy(), lambda x: np.asarray(x),
    lambda x: torch.zeros(()).add_(x.sum())]
WAITS = [
    lambda x: x.sum().item(), lambda x: float(x.sum()), lambda x: bool(x.sum() > 0), lambda x: x[x > 0],
    lambda x: x.cpu(), lambda x: torch.ones(3).to(x.device), lambda x: torch.tensor([1.0], device=x.device),
    lambda x: x.new_tensor([1.0])]
CAN = [
    lambda x: x * torch.tensor(2.0), lambda x: x + torch.zeros(2, 3, device=x.device),
    lambda x: x + torch.ones(2, 3).to(x.device, non_blocking=True), lambda x: x.to(torch.float64) + x,
    lambda x: x.to("cpu", non_blocking=True) + torch.ones(2, 3), lambda x: torch.ones(3).sum().item()]


@pytest.mark.parametrize("cases, waiting_is_refused, error", [
    (CANNOT, False, "on the card"), (WAITS, True, "Python waits"), (WAITS, False, None), (CAN, True, None)])
def test_the_pretended_card_refuses_what_a_card_cannot_do_and_waiting_if_told_so(
        cases, waiting_is_refused, error):
    for case in cases:
        with PretendedCard() as card:
            x = torch.ones(2, 3, device="cuda")
            card.waiting_is_refused = waiting_is_refused
            with pytest.raises(AssertionError, match=error) if error else contextlib.nullcontext():
                case(x)
