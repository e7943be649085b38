"""Whole runs on a GPU: the pipeline against the CPU's, NCCL, two GPUs, killed and started again, and no step
that waits for the GPU. The CPU's half does the same with bf16 and gloo, and on a pretended card."""

import contextlib
import csv
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import distributed
import run
import stages
import tiny
from cards import DEVICES, ON_CARD, ON_TWO_CARDS
from distributed import BACKENDS, LONGEST, Team, all_sum, all_sum_inside, choose_device
from features import ExprClassifier
from images import FaceImages
from losses import expr_loss
from pretended_card import pretended_card
from processes import CPU
from test_loops_second import made  # noqa: F401, a fixture: what each stage reads
from test_predict import trained  # noqa: F401, a fixture: all that a prediction takes
from tiny import (EACH_STEP, ROOT, STAGES, TINY, TRAIN_AU, apart, assert_same, done, log_numbers, ready,
                  weights)
from training import in_pieces, loader
from vit import VisionTransformer

# Scores near chance. A small model that learns much more ends elsewhere after any rounding: with 30 epochs of
# the task at a learning rate of 1e-2, bf16 on the CPU moved the scores by up to 0.08.
LONGER = {"synthetic": {"train_videos": 8, "val_videos": 6, "frames": 100}, "finetune": {"epochs": 4},
          "task": {"epochs": 10}}
SCORES = {"finetune": "val_macro_f1", "task_va": "score", "task_expr": "score", "task_au": "score"}


# ---- The whole pipeline

def in_bf16():
    """A hook: the CPU computes in bf16, as a GPU does."""
    tiny.instead("distributed.Team.autocast", lambda ours: lambda team: torch.autocast("cpu", torch.bfloat16))


def everything(folder, hook=None) -> dict[str, float]:
    """All stages and tasks. -> their scores"""
    done(folder, *TRAIN_AU, hook=hook)
    for task in ("va", "expr"):
        done(folder, "train_task.py", "--task", task, *TINY, hook=hook)
    return {stage: tiny.metrics(folder / "runs/tiny" / stage)[score] for stage, score in SCORES.items()}


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
def test_the_whole_pipeline_scores_as_on_the_cpu_in_float32(tmp_path, device):
    cpu, hook = tiny.write(tmp_path / "float32", **LONGER), in_bf16 if device == "cpu" else None
    expected = everything(cpu)
    folder = tiny.write(tmp_path / "other", **LONGER, run={"device": device})
    scores = everything(folder, hook)
    print(expected, scores)
    assert scores == pytest.approx(expected, abs=0.02)
    ours, theirs = (log_numbers(place / "runs/tiny/pretrain") for place in (folder, cpu))
    assert ours == pytest.approx(theirs, rel=0.02)                     # the loss of each epoch, among others

    # The same weights give the same features.
    again = tiny.copied(cpu, tmp_path / "again", ["features"])
    done(again, "extract_features.py", *TINY, "--set", f"run.device={device}", hook=hook)
    files = sorted((cpu / "runs/tiny/features").glob("*.npy"))
    assert len(files) > 20
    for file in files:
        ours, theirs = (np.load(path).astype(float) for path in (again / file.relative_to(cpu), file))
        limit = 0 if file.name.endswith(".noface.npy") else 0.02
        assert np.linalg.norm(ours - theirs) <= limit * np.linalg.norm(theirs)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
def test_the_second_papers_trainings_end_near_those_of_the_cpu_in_float32(tmp_path, device):
    losses = []
    for name in ("float32", "other"):
        folder = tiny.write(tmp_path / name, run={"device": "cpu" if name == "float32" else device})
        hook = in_bf16 if name == "other" and device == "cpu" else None
        for script in ("train_emma.py", "train_cotex.py"):                 # and train_stills.py before them
            done(folder, script, *TINY, hook=hook)
        losses.append({stage: [float(row["loss"]) for row in tiny.log(folder / "runs/tiny" / stage)]
                       for stage in ("stills", "emma", "cotex")})
    print(losses)
    for stage, expected in losses[0].items():
        limit = 0.1 if stage == "stills" else 0.02          # BatchNorm makes much of a rounding: 4 % in bf16
        assert losses[1][stage] == pytest.approx(expected, rel=limit), stage


# ---- Processes

def train_in_a_group_of_one(device: str):
    """A process that is alone, but does all that several do: what it adds up goes through gloo and NCCL."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{tiny.free_port()}",
                       "RANK": "0", "WORLD_SIZE": "1"})
    distributed.several = lambda: True
    team = Team(0, 2, choose_device(device))               # DDP, object collectives and barriers too
    dist.init_process_group(BACKENDS[team.device.type], timeout=LONGEST)
    for place in {CPU, team.device}:                       # the counts of a step lie on the CPU, its loss not
        for add in (all_sum, all_sum_inside):
            x = torch.arange(3.0, device=place, requires_grad=True)
            total = add(x)
            (total * total).sum().backward()
            assert total.tolist() == [0, 1, 2] and x.grad.tolist() == [0, 2, 4]
    assert team.agree({"a": 1}) == {"a": 1}
    team.wait()

    torch.manual_seed(0)
    model = ExprClassifier(VisionTransformer(image_size=16, patch=8, dim=8, depth=2, heads=2), "mean", 8, 0.0)
    images, labels = torch.randn(5, 3, 16, 16, device=team.device), torch.arange(5, device=team.device)
    gradients = []
    for ours in (team.parallel(model), model):             # under DDP, and without
        model.zero_grad(set_to_none=True)
        for x, y in in_pieces(ours, 2, images, labels):
            with team.autocast():
                logits = ours(x)
            expr_loss(logits, y, y >= 0, 5).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for under_ddp, alone in zip(*gradients, strict=True):
        assert torch.allclose(under_ddp, alone, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_a_process_alone_adds_up_through_the_backends_of_its_device(device):
    process = tiny.server.Process(target=train_in_a_group_of_one, args=(device,))
    process.start()
    process.join(tiny.SECONDS)
    process.kill()
    assert process.exitcode == 0


def test_on_a_machine_with_two_gpus_the_second_process_takes_the_second_and_sums_with_nccl(monkeypatch):
    chosen, joined = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "_fresh_store", lambda: "store")
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **more: joined.append((given, more)))
    for name, value in {"RANK": 5, "WORLD_SIZE": 6, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, f"{value}")
    assert distributed.join() == Team(5, 6, torch.device("cuda", 1))
    assert chosen == [1]
    assert joined == [(("cpu:gloo,cuda:nccl",), {"store": "store", "rank": 5, "world_size": 6,
                                                 "timeout": LONGEST})]


@pytest.mark.parametrize("world", [pytest.param(1, marks=ON_CARD), pytest.param(2, marks=ON_TWO_CARDS)])
def test_torchrun_on_gpus_trains_as_one_process_does(tmp_path, world):
    """From nothing, as README gives it. In bf16 the gradient of each share is rounded before the sum."""
    one, several = (tiny.write(tmp_path / name, **LONGER, run={"device": "cuda"})
                    for name in ("one", "several"))
    done(one, *TRAIN_AU)
    script = [ROOT / TRAIN_AU[0], *TRAIN_AU[1:]]
    code, said = tiny.end(tiny.command(several, *tiny.torchrun(f"--nproc_per_node={world}"), *script))
    assert code == 0, said
    for stage in STAGES:
        ours, theirs = (log_numbers(place / "runs/tiny" / stage) for place in (several, one))
        print(stage, "differs by at most", abs(ours - theirs).max())
        assert ours == pytest.approx(theirs, rel=0.02, abs=0.02)


# ---- Killed and started again

def deterministic():
    """A hook: of several kernels PyTorch takes one that adds up in the same order each time."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def as_usual():
    """A hook that changes nothing."""


def killed(hook):
    """The hook and, after the third step, the end."""
    hook()
    tiny.stop("run.Run.end_step", 3)()


def deterministic_and_killed():
    killed(deterministic)


def as_usual_and_killed():
    killed(as_usual)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
@pytest.mark.parametrize("kernels, kill", [(deterministic, deterministic_and_killed),
                                           (as_usual, as_usual_and_killed)])
def test_killed_and_started_again_a_training_ends_with_the_same_bits(tmp_path, device, kernels, kill):
    """With deterministic kernels bit for bit. With the usual ones the difference is printed: pytest -rP."""
    whole = tiny.write(tmp_path / "whole", **tiny.DROPOUT, run={"device": device})
    done(whole, *TRAIN_AU, hook=kernels)
    for stage, script in STAGES.items():
        folder, place = ready(whole, tmp_path / stage, stage)
        command = [*script, *TINY, *EACH_STEP]
        assert tiny.run(folder, *command, hook=kill).codes == [-9]
        assert "going on from epoch" in done(folder, *command, hook=kernels)
        expected = whole / "runs/tiny" / stage
        difference = apart(weights(place), weights(expected))
        print(f"{stage} on {device}, {kernels.__name__}: weights differ by at most {difference:.1e}")
        if kernels is deterministic:
            assert_same(place, expected)
        assert difference < 0.01


# ---- No step waits for a card, and nothing mixes its tensors with the CPU's

class RealCard:
    """As PretendedCard: refuses to let Python wait, if told so."""

    def refuse_waiting(self, refuse: bool):
        torch.cuda.set_sync_debug_mode("error" if refuse else "default")


KINDS = {"pretended": pretended_card, "real": lambda: contextlib.nullcontext(RealCard())}
CARDS = ["pretended", pytest.param("real", marks=ON_CARD)]
NO_PINNED = pytest.mark.filterwarnings("ignore:'pin_memory' argument")                # for a pretended card


@contextlib.contextmanager
def watched(card):
    """In each step of a training but the first, in which constants go to the card, none may wait for it.
    -> the steps that were watched, as they come"""
    steps, batches = [], run.Run.batches

    def watch(self):
        for step, batch in batches(self):
            card.refuse_waiting(step > 0)
            yield step, batch
            card.refuse_waiting(False)
            steps.append(step)

    try:
        with mock.patch.object(run.Run, "batches", watch):
            with mock.patch.object(stages.Clock, "tick", lambda *ignored: None):     # a progress line waits
                yield steps
    finally:
        card.refuse_waiting(False)


def trained_on(kind: str, folder, *script) -> int:
    """Start a training on a card that is watched. -> the number of steps"""
    with KINDS[kind]() as card, watched(card) as steps:
        stages.start(folder, *script, "--set", "run.device=cuda")
    return len(steps)


def far_from(expected, folder, stage: str) -> float:
    """The largest difference between the weights of two runs."""
    difference = apart(*(weights(place / "runs/tiny" / stage) for place in (folder, expected)))
    print(f"{stage}: weights differ by at most {difference:.1e}")
    return difference


@NO_PINNED
@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "task_va", "task_expr", "task_au", "emma",
                                   "cotex"])
def test_no_step_waits_for_the_card(made, tmp_path, stage, kind):
    section, _, task = stage.partition("_")
    script = [f"train_{section}.py", *(["--task", task] if task else []), "--set", f"{section}.epochs=2"]
    cpu, card = (tiny.copied(made, tmp_path / name, [stage] if stage in stages.MADE else [])
                 for name in ("cpu", "card"))
    stages.start(cpu, *script)
    assert trained_on(kind, card, *script) >= 4
    assert kind == "real" or far_from(cpu, card, stage) < 1e-5                # bf16: by the scores, above


@NO_PINNED
@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("network, limit", [
    ("resnet18", 1e-5), ("dan", 0.01)])      # some of DAN's gradients are rounding, which Adam makes steps of
def test_no_step_on_labelled_still_faces_waits_for_the_card(tmp_path, network, limit, kind):
    cpu, card = (tiny.write(tmp_path / name, stills={"network": network}) for name in ("cpu", "card"))
    stages.start(cpu, "train_stills.py")
    assert trained_on(kind, card, "train_stills.py") >= 4
    assert kind == "real" or far_from(cpu, card, "stills") < limit


def predicted(folder, *more) -> np.ndarray:
    """Extract the features; predict tables of videos, of images and by EMMA. -> (rows of all, 3)"""
    stages.start(folder, "extract_features.py", *more)
    tables = []
    for table, options in (("run.csv", []), ("still.csv", ["--still"]),
                         ("emma.csv", ["--emma", "runs/tiny/emma/best.pt"])):
        stages.start(folder, "predict.py", "--frames", "frames", "--out", table, *options, *more)
        with open(folder / table, newline="") as file:
            tables += [[row.get(name) or "nan" for name in ("valence", "Anger", "AU1")]      # some have fewer
                       for row in csv.DictReader(file)]
    return np.array(tables, dtype=float)


@NO_PINNED
@pytest.mark.parametrize("kind", CARDS)
def test_a_card_predicts_what_the_cpu_does(trained, tmp_path, kind):
    stages.write_emma(trained)
    cpu, card = (tiny.copied(trained, tmp_path / name, ["features"]) for name in ("cpu", "card"))
    expected = predicted(cpu)
    with KINDS[kind]():
        ours = predicted(card, "--set", "run.device=cuda")
    assert np.isfinite(expected).any(axis=0).all()
    assert ours == pytest.approx(expected, abs={"pretended": 2e-6, "real": 0.05}[kind], nan_ok=True)


SCRIPTS = [["train_task.py", "--task", "au"], ["train_emma.py"], ["train_cotex.py"],      # and what they need
           ["evaluate.py", "--task", "au"], ["emma_frames.py"], ["report.py"]]


@NO_PINNED
@pytest.mark.parametrize("kind", [pytest.param("pretended", marks=pytest.mark.slow), CARDS[1]])
def test_every_script_comes_to_its_end_on_a_card(tmp_path, kind):
    folder = tiny.write(tmp_path, run={"device": "cuda"})
    with KINDS[kind]():
        said = [stages.start(folder, *script) for script in SCRIPTS]
    assert all("on cuda" in text for text in said[:3])
    for stage, score in {"task_au": "score", "stills": "val_macro_f1", "emma": "score",
                         "cotex": "val_macro_f1"}.items():
        assert math.isfinite(tiny.metrics(folder / "runs/tiny" / stage)[score])
    assert (folder / "runs/tiny/report.html").exists()


# ---- Nothing to read

class Unreadable(FaceImages):
    """Three images, none of which can be read."""

    def __init__(self):
        super().__init__(16, torch.zeros(0, 4))

    def __len__(self):
        return 3

    def item(self, i):
        raise ValueError("unreadable")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_an_image_and_an_empty_share_reach_the_gpu(device, workers):
    team = Team(0, 1, torch.device(device))
    for images, noise, problems in loader(Unreadable(), [[0, 1, 2], []], workers, team):
        on_device = images.to(team.device, non_blocking=True)
        assert on_device.shape == (0, 16, 16, 3) and noise.shape == (0, 4) and len(problems) in (0, 3)
