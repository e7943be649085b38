"""ResNet-18 and DAN against a second implementation with public names (plain_cnn.py); DAN's losses by hand; a
step over processes; learning; which checkpoints are taken; and what train_cnn.py refuses."""

import math
import re
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from engine.config import load
from models import learn
from plain_cnn import public_dan, public_dan_shapes, random_weights, resnet_map, resnet_shapes
from processes import ALONE, in_team
from second_paper import train_cnn
from second_paper.cnn import (BatchNorm, DAN, DANWithCentres, ResNet18, affinity_loss, build, load_cnn,
                              load_trunk, partition_loss, translated)

SMALL = 2                                                            # width of the first stage
BOTH = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def filled(model):
    """-> the model in double precision with random values everywhere (new BatchNorms hide mistakes), these"""
    weights = random_weights(shapes(model))
    model.double().load_state_dict(weights)
    return model, weights


# ---- Names, shapes, numbers

def test_names_and_shapes_are_torchvisions_and_the_public_dans_275_after_the_map_of_names():
    with torch.device("meta"):
        resnet, dan = ResNet18(), DAN()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (resnet, dan, dan.trunk)]
    assert sizes == [11_689_512, 19_724_248, 11_176_512]
    assert shapes(resnet) == resnet_shapes() and list(shapes(resnet)) == list(resnet_shapes())
    theirs = {name: torch.zeros(shape, device="meta") for name, shape in public_dan_shapes().items()}
    assert {name: tuple(value.shape) for name, value in translated(theirs).items()} == shapes(dan)
    assert len(theirs) == 275 and len(shapes(resnet)) == 122


def test_weights_start_as_in_torchvision():
    torch.manual_seed(0)
    for name, p in [*ResNet18(10, 16).named_parameters(), *DAN(width=16).named_parameters()]:
        if p.ndim == 4:                                      # Kaiming-normal by the outputs
            deviation = math.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
            assert abs(p.std() / deviation - 1) < 4 / p.numel() ** 0.5 > abs(p.mean()) / deviation, name
        elif p.ndim == 1 and not re.search(r"fc|gate\.[03]", name):
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


# ---- The second implementation

@BOTH
def test_resnets_scores_are_those_of_the_network_written_out(training):
    torch.manual_seed(0)
    model, weights = filled(ResNet18(6, 4).train(training))
    images = torch.randn(3, 3, 70, 96, dtype=torch.double)
    features = resnet_map(weights, images, training=training)                        # (3, 32, 3, 3)
    expected = features.flatten(2).sum(2) / 9 @ weights["fc.weight"].T + weights["fc.bias"]
    scores = model(images)
    assert expected.std() > 0.1 and torch.allclose(scores, expected, rtol=1e-9, atol=1e-11)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@BOTH
def test_a_public_dan_gives_the_scores_of_its_own_network_in_our_order_of_classes(tmp_path, training):
    torch.manual_seed(0)
    weights = random_weights(public_dan_shapes(width=SMALL))
    as_found = {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}
    model, said = load_cnn(save(tmp_path / "dan.pth", as_found if training else as_saved(weights)))
    assert said == "the public DAN, its classes put into the order of ours"
    model, _ = model.double(), model.load_state_dict(translated(weights))            # no longer rounded
    images = torch.randn(5, 3, 70, 64, dtype=torch.double)
    scores, mean, heads = model.train(training).parts(images)
    expected, features, theirs = public_dan(weights, images, training)
    assert torch.allclose(mean, features.mean((2, 3)), rtol=1e-9, atol=1e-10)
    assert torch.allclose(heads, theirs, rtol=1e-9, atol=1e-9) and expected.std() > 0.1
    public = [0, 6, 5, 4, 1, 2, 3, 7]       # Neutral Anger Disgust Fear Happiness Sadness Surprise Other
    assert torch.allclose(scores, expected[:, public], rtol=1e-9, atol=1e-9)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in model.float().parts(images.float())] == [torch.float32] * 3


def test_affinity_is_the_mean_squared_distance_over_the_variance_of_the_centres():
    """Faces without a class change nothing, and have no gradient."""
    generator = torch.Generator().manual_seed(0)
    features, centres = torch.randn(12, 6, generator=generator, dtype=torch.double).split([7, 5])
    target = torch.tensor([0, 3, -1, 2, 3, -1, 1])                   # two classes are missing
    valid = target >= 0
    variance = sum(statistics.variance(centres[:, d].tolist()) for d in range(6))
    distances = [sum((features[i, d] - centres[k, d]).item() ** 2 for d in range(6))
                 for i, k in enumerate(target.tolist()) if k >= 0]
    expected = statistics.fmean(distances) / variance
    assert affinity_loss(features, target, valid, centres).item() == pytest.approx(expected, rel=1e-13)
    rubbish = features.masked_fill(~valid[:, None], math.nan)
    assert affinity_loss(rubbish, target, valid, centres).item() == pytest.approx(expected, rel=1e-13)
    features.requires_grad_(), centres.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, c: affinity_loss(g, target, valid, c), (features, centres))
    none = affinity_loss(features, target, torch.zeros_like(valid), centres)
    assert none == 0 and not any(g.any() for g in torch.autograd.grad(none, (features, centres)))


def test_partition_is_the_logarithm_of_1_plus_heads_over_their_mean_variance():
    heads = torch.randn(3, 4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    variances = [statistics.variance(heads[b, :, d].tolist()) for b in range(3) for d in range(5)]
    expected = math.log(1 + 4 / statistics.fmean(variances))
    assert partition_loss(heads).item() == pytest.approx(expected, rel=1e-13)
    assert torch.autograd.gradcheck(partition_loss, heads.requires_grad_())
    same = torch.ones(2, 4, 5, requires_grad=True)
    partition_loss(same).backward()
    assert partition_loss(same).isfinite() and same.grad.isfinite().all()
    assert partition_loss(torch.zeros(0, 4, 5)) == 0


# ---- Processes. A loss is summed over them before `backward`, and Team.parallel takes the mean of gradients

SHARDS = {2: [4, 3], 3: [0, 5, 2]}                                   # world size -> images on each rank


def step(part, team=ALONE):
    """A training step of DAN on a part of seven images. -> loss, gradients, BatchNorm's statistics"""
    torch.manual_seed(0)
    model = filled(DANWithCentres(DAN(width=SMALL)))[0]
    images, y = torch.randn(7, 3, 40, 40, dtype=torch.double), torch.tensor([0, 3, -1, 5, 1, 7, 2])[part]
    for _ in range(1 + team.rank):                                   # one process may have more to score
        model.eval()(images)
    ddp = team.parallel(model.train())
    loss = train_cnn.loss_of(ddp(images[part]), y)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("world", SHARDS)
def test_a_step_over_processes_is_that_of_one_with_the_whole_batch(world):
    ends = np.cumsum([0, *SHARDS[world]])
    loss, gradients, buffers = step(slice(0, 7))
    codes, results = in_team(world, lambda team: step(slice(*ends[team.rank:team.rank + 2]), team))
    assert codes == [0] * world
    for got, of_parameters, moved in results:
        assert got == pytest.approx(loss, rel=1e-11)
        for name, gradient in gradients.items():
            assert torch.allclose(of_parameters[name], gradient, rtol=1e-7, atol=1e-9), name
        assert all(torch.allclose(moved[name], value, rtol=1e-9) for name, value in buffers.items())


def far_from_0(team=None):
    """Channels of means to 40 deviations: as PyTorch normalises them, or as one of the processes does. Behind
    these some that are constant, which nothing may blow up."""
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x = x + torch.tensor([0, 3, 10, 40.])[:, None, None]
    x = torch.cat([x, (100.3 * torch.arange(16))[None, :, None, None].expand(8, -1, 5, 5)], dim=1)
    return BatchNorm(20)(x[team.rank::2]) if team else nn.BatchNorm2d(20)(x)


def test_over_processes_means_far_from_0_cost_few_digits_at_the_first_step():
    codes, results = in_team(2, lambda team: far_from_0(team).detach())
    assert codes == [0, 0]
    for rank, y in enumerate(results):
        assert torch.allclose(y[:, :4], far_from_0()[rank::2, :4], atol=2e-3) and y.isfinite().all()


@pytest.mark.parametrize("network", ["resnet18", "dan"])
def test_eight_random_images_are_learned_by_heart(network):
    torch.manual_seed(0)
    model, images, y = build(config_of(network, 8)), torch.randn(8, 3, 40, 40), torch.arange(8)
    learn(lambda: train_cnn.loss_of(model(images), y), model, steps=25, lr=3e-3)
    scores = model(images)[0] if network == "dan" else model(images)
    # log 8 = 2.08 at chance. DAN's last BatchNorm holds each score at deviation 1 for long.
    assert (scores.argmax(1) == y).all() and F.cross_entropy(scores, y) < (1.8 if network == "dan" else 0.2)


# ---- Weights

def config_of(network, width=SMALL):
    return load("configs/demo.yaml", [f"stills.network={network}", f"stills.width={width}"])


def save(path, state):
    torch.save(state, path)
    return path


def as_saved(weights):
    return {"iter": 10, "model_state_dict": weights, "optimizer_state_dict": {"param_groups": [{"lr": 1e-4}]}}


def ours(model, **change):
    """As train_cnn.py writes it."""
    weights = model if isinstance(model, dict) else model.state_dict()
    return {"model": weights, "made_of": {"stage": "stills", "settings": {}}, "epoch": 3} | change


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_only_a_file_with_torchvisions_names_fills_both_trunks_whatever_its_classes(tmp_path, key):
    weights = random_weights(resnet_shapes(7, SMALL), torch.float32)
    weights = {name: value for name, value in weights.items() if "num_b" not in name}    # as before 2018
    found = {f"{'module.' if key == 'model' else ''}{name}": value for name, value in weights.items()}
    path = save(tmp_path / "resnet.pt", found if key is None else {key: found, "epoch": 3})
    resnet, dan, images = build(config_of("resnet18")), build(config_of("dan")), torch.randn(2, 3, 64, 64)
    last = resnet.fc.weight.clone()
    for trunk in (resnet, dan.dan.trunk):
        assert load_trunk(trunk, path) == "left out: fc.weight, fc.bias"
        assert torch.allclose(trunk.eval().features(images), resnet_map(weights, images), atol=1e-3)
    assert torch.equal(resnet.fc.weight, last)
    weights.pop("layer2.0.bn1.bias")
    with pytest.raises(ValueError, match=r'(?s)other.pt: .*Missing key\(s\).* "layer2.0.bn1.bias"'):
        load_trunk(ResNet18(8, SMALL), save(tmp_path / "other.pt", weights))


@pytest.mark.parametrize("model, name", [(ResNet18(8, 4), "ResNet-18"),
                                         (DANWithCentres(DAN(8, 3, 4)), "DAN")])
def test_the_cnn_of_a_checkpoint_gives_the_scores_that_it_gave(tmp_path, model, name):
    images = torch.randn(3, 3, 40, 40)
    model.train()(images)                                            # moves the statistics of BatchNorm
    found, said = load_cnn(save(tmp_path / "cnn.pt", ours(model)))
    assert said == f"our own {name}, {tmp_path}/cnn.pt"
    assert torch.equal(found.eval()(images), getattr(model, "dan", model).eval()(images))


EIGHT = r"; expected a ResNet-18 or a DAN that scores 8 classes, Neutral, Anger, Dis"
FOREIGN = "not of train_cnn.py, so nobody knows the order of its classes; train one from it: --set stills.sta"


@pytest.mark.parametrize("state, message", [
    (lambda: random_weights(resnet_shapes(8, SMALL)), FOREIGN),
    (lambda: ours(ResNet18(8, SMALL), made_of={"stage": "emma"}), FOREIGN),
    (lambda: ours(ResNet18(7, SMALL)), rf"conv1.weight, .* fc.weight \(7, 16\){EIGHT}"),
    (lambda: as_saved(random_weights(public_dan_shapes(7, SMALL))), rf"fc.weight \(7, 16\){EIGHT}"),
    (lambda: ours(nn.Linear(2, 3)), rf"got weight, bias, ..., fc.weight \(0,\){EIGHT}"),
    (lambda: ours({"dan.trunk.conv1.weight": torch.zeros(2, 3, 5, 5), "fc.weight": torch.zeros(8, 16)}),
     rf"got trunk.conv1.weight, ..., fc.weight \(0,\){EIGHT}"),
    (lambda: ours({"conv1.weight": torch.zeros(2, 3, 7, 7), "fc.weight": torch.zeros(8, 16)}),
     r'another architecture(.|\n)*Missing key\(s\) in state_dict: "bn1.weight"'),
    (lambda: {"model": 3}, "holds no weights")])
def test_what_is_no_cnn_of_ours_and_no_public_dan_is_refused_by_its_name(tmp_path, state, message):
    with pytest.raises(ValueError, match=rf"(x\.pt: (.|\n)*)?{message}"):
        load_cnn(save(tmp_path / "x.pt", state()))


# ---- train_cnn.py

def faces_of(folder, labels, part):
    """AffectNet 2021 with a face of each label."""
    for place in ("images", "annotations"):
        (folder / f"{part}_set" / place).mkdir(parents=True)
    for n, label in enumerate(labels):
        Image.new("RGB", (8, 8), (20 * n,) * 3).save(folder / f"{part}_set/images/{n}.jpg")
        np.save(folder / f"{part}_set/annotations/{n}_exp.npy", np.array(str(label)))


@pytest.mark.parametrize("options, message", [
    (["stills.batch=1"], "got 9 training and 2 validation faces with an expression, stills.batch=1; exp"),
    (["data.affectnet_2021=unlabelled"], "none of 9 images has a label .*; looked for .*/0_exp.npy")])
def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 9), ("val", 2)):
        faces_of(tmp_path / "faces", [n % 8 for n in range(count)], part)
        faces_of(tmp_path / "unlabelled", [8] * count, part)
    (tmp_path / "my.yaml").write_text("vit: {image_size: 16, patch: 8}\nstills: {width: 2}\n")
    with pytest.raises(ValueError, match=message):
        train_cnn.main(load("my.yaml", ["data.affectnet_2021=faces", *options]), ALONE)
