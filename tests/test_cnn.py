"""ResNet-18 against a second forward pass and torchvision's names; public weights for the trunk; learning."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from checkpoints import write_file
from cnn import BasicBlock, BatchNorm, ResNet18, Trunk, load_trunk
from plain_cnn import batch_norm, random_weights, resnet_map, resnet_shapes, trunk_shapes
from processes import in_team

SMALL = 4                                                            # width of the first stage


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def filled(model, seed=0):
    """The model in double precision with random values everywhere: at their start values BatchNorms would
    hide mistakes."""
    weights = random_weights(shapes(model), seed)
    model.double().load_state_dict(weights)
    return model, weights


def save(path, state):
    write_file(path, lambda file: torch.save(state, file))
    return path


# ---- Names, shapes, numbers

def test_names_and_shapes_are_those_of_torchvisions_resnet18_in_their_order():
    with torch.device("meta"):
        model = ResNet18()
    assert shapes(model) == resnet_shapes() and list(shapes(model)) == list(resnet_shapes())
    assert len(shapes(model)) == 122
    assert sum(p.numel() for p in model.parameters()) == 11_689_512


@pytest.mark.parametrize("size, sides", [((224, 224), (7, 7)), ((40, 40), (2, 2)), ((33, 64), (2, 2)),
                                         ((48, 96), (2, 3)), ((1, 1), (1, 1))])
def test_any_image_size_gives_a_map_of_a_32th_rounded_up(size, sides):
    model = ResNet18(classes=5, width=2).eval()
    assert Trunk.forward(model, torch.zeros(2, 3, *size)).shape == (2, 16, *sides)
    assert model(torch.zeros(2, 3, *size)).shape == (2, 5)
    assert model(torch.zeros(0, 3, *size)).shape == (0, 5)


# ---- BatchNorm

SHARDS = {2: [4, 3], 3: [5, 2, 0], 4: [0, 1, 0, 6]}                 # world size -> images on each rank


def normalised(part, training=True):
    """Two steps of a 1-d and a 2-d BatchNorm on a part of seven images: outputs, gradients, statistics."""
    generator, found = torch.Generator().manual_seed(0), []
    for shape in ((7, 3), (7, 3, 2, 4)):
        layer, _ = filled(BatchNorm(3).train(training))
        for _ in range(2):
            x = 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.double)
            weights = torch.randn(shape, generator=generator, dtype=torch.double)
            x = x[part].clone().requires_grad_()
            y = layer(x)
            (y * y * weights[part]).sum().backward()
            found.append({"y": y.detach(), "x": x.grad})
        found.append({"shares": torch.stack([layer.weight.grad, layer.bias.grad]),
                      "same": torch.stack([layer.running_mean, layer.running_var]),
                      "steps": layer.num_batches_tracked})
    return found


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_batch_norm_is_pytorchs_with_its_names_and_its_running_averages(training):
    torch.manual_seed(0)
    for theirs, shape in ((nn.BatchNorm1d(3), (5, 3)), (nn.BatchNorm2d(3), (5, 3, 2, 4))):
        ours, weights = filled(BatchNorm(3).train(training))
        theirs.double().train(training).load_state_dict(weights)
        for _ in range(2):
            x = 2 + 3 * torch.randn(shape, dtype=torch.double)
            assert torch.equal(ours(x), theirs(x))
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("world", SHARDS)
def test_batch_norm_over_processes_is_that_of_one_with_the_whole_batch(world):
    ends = [sum(SHARDS[world][:rank + 1]) for rank in range(world)]
    parts = [slice(end - size, end) for size, end in zip(SHARDS[world], ends)]
    whole = normalised(slice(0, 7))
    codes, results = in_team(world, lambda team: normalised(parts[team.rank]))
    assert codes == [0] * world
    for i, expected in enumerate(whole):
        for part, found in zip(parts, results):
            for name in expected.keys() & {"x", "y"}:
                assert torch.allclose(found[i][name], expected[name][part], rtol=1e-10, atol=1e-12), name
            for name in expected.keys() & {"same", "steps"}:
                assert torch.allclose(found[i][name], expected[name], rtol=1e-12), name
        if "shares" in expected:                                     # which Team.parallel adds up
            total = sum(found[i]["shares"] for found in results)
            assert torch.allclose(total, expected["shares"], rtol=1e-10)


def test_processes_do_not_wait_for_each_other_in_evaluation():
    """One process may have more images to score than another."""
    def one_calls_twice(team):
        return [normalised(slice(0, 7), training=False)[0]["y"] for _ in range(1 + team.rank)]
    codes, results = in_team(2, one_calls_twice)
    assert codes == [0, 0] and torch.equal(results[1][1], results[0][0])


# ---- A second forward pass

@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("narrow, wide, stride", [(3, 3, 1), (3, 6, 2), (3, 5, 1), (4, 4, 2)])
def test_a_block_is_two_convolutions_and_a_way_around_them(narrow, wide, stride, training):
    block, weights = filled(BasicBlock(narrow, wide, stride).train(training))
    x = torch.randn(4, narrow, 7, 6, dtype=torch.double)
    y = F.conv2d(x, weights["conv1.weight"], stride=stride, padding=1)
    y = F.conv2d(F.relu(batch_norm(weights, "bn1", y, training)), weights["conv2.weight"], padding=1)
    y = batch_norm(weights, "bn2", y, training)
    assert (block.downsample is None) == (narrow == wide and stride == 1)
    if block.downsample is not None:
        x_around = F.conv2d(x, weights["downsample.0.weight"], stride=stride)
        y = y + batch_norm(weights, "downsample.1", x_around, training)
    else:
        y = y + x
    assert torch.allclose(block(x), F.relu(y), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_scores_are_those_of_the_network_written_out(training):
    torch.manual_seed(0)
    model, weights = filled(ResNet18(classes=6, width=SMALL).train(training))
    images = torch.randn(3, 3, 70, 96, dtype=torch.double)
    features = resnet_map(weights, images, training=training)                        # (3, 32, 3, 3)
    expected = features.flatten(2).sum(2) / 9 @ weights["fc.weight"].T + weights["fc.bias"]
    assert expected.std() > 0.1
    assert torch.allclose(model(images), expected, rtol=1e-9, atol=1e-11)


def test_an_image_does_not_depend_on_the_others_in_evaluation_and_does_in_training():
    model, images = filled(ResNet18(classes=3, width=SMALL))[0], torch.randn(4, 3, 40, 40).double()
    model.eval()
    assert torch.allclose(model(images)[:1], model(images[:1]), rtol=1e-11, atol=1e-12)
    model.train()
    assert not torch.allclose(model(images)[:2], model(images[:2]), atol=1e-3)


# ---- Training

def test_evaluation_leaves_the_statistics_of_batch_norm_alone_and_training_moves_them():
    model, images = ResNet18(classes=3, width=SMALL), torch.randn(4, 3, 40, 40)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.eval()(images).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model.train()(images)
    assert not any(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    model = ResNet18(classes=3, width=SMALL)
    (model(torch.randn(4, 3, 64, 64)) * torch.randn(4, 3)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weights_start_as_in_torchvision():
    torch.manual_seed(0)
    for name, p in ResNet18(classes=10, width=32).named_parameters():
        if p.ndim == 4:                                      # Kaiming-normal by the outputs
            deviation = math.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
            assert abs(p.std() / deviation - 1) < 0.05 and abs(p.mean()) < 0.1 * deviation, name
        elif p.ndim == 1 and not name.startswith("fc"):
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_eight_random_images_are_learned_by_heart():
    torch.manual_seed(0)
    model, images, labels = ResNet18(classes=8, width=8), torch.randn(8, 3, 40, 40), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1                                                # log 8 = 2.08 at chance


# ---- Public weights

@pytest.mark.parametrize("key", [None, "model", "state_dict"])
@pytest.mark.parametrize("classes", [1000, 7])
def test_a_file_with_torchvisions_names_fills_the_trunk_whatever_its_classes(tmp_path, key, classes):
    weights = random_weights(resnet_shapes(classes, SMALL), dtype=torch.float32)
    path = save(tmp_path / "resnet.pt", weights if key is None else {key: weights, "epoch": 3})
    trunk = Trunk(SMALL).eval()
    assert load_trunk(trunk, path) == "left out: fc.weight, fc.bias"
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(trunk(images), resnet_map(weights, images), rtol=1e-4, atol=1e-4)


def test_an_old_file_without_batch_norms_counters_is_read(tmp_path):
    weights = random_weights(trunk_shapes(SMALL), dtype=torch.float32)
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(old) == len(weights) - 20
    trunk = Trunk(SMALL)
    assert load_trunk(trunk, save(tmp_path / "old.pt", old)) == "left out: nothing"
    assert torch.equal(trunk.layer4[1].bn2.running_var, weights["layer4.1.bn2.running_var"])


def changed(change):
    """The names of a small trunk's file after a change."""
    weights = random_weights(trunk_shapes(SMALL), dtype=torch.float32)
    return change(weights) or weights


@pytest.mark.parametrize("change, message", [
    (lambda w: {name: value for name, value in w.items() if name != "layer2.0.bn1.bias"},
     r"1 of 120 entries differ; .*\n  layer2\.0\.bn1\.bias: missing in the file"),
    (lambda w: w.update({"layer5.0.conv1.weight": torch.zeros(1)}), r"layer5\.0\.conv1\.weight: not in the"),
    (lambda w: w.update({"conv1.weight": torch.zeros(64, 3, 7, 7)}),
     r"conv1\.weight: file \(64, 3, 7, 7\), model \(4, 3, 7, 7\)"),
    (lambda w: {"model": 3}, "holds no weights; expected a dictionary of names and tensors"),
    (lambda w: {"arch": "resnet18"}, "holds no weights; expected a dictionary of names and tensors")])
def test_a_file_of_another_network_is_refused_and_nothing_is_loaded(tmp_path, change, message):
    path, trunk = save(tmp_path / "other.pt", changed(change)), Trunk(SMALL)
    before = [p.clone() for p in trunk.parameters()]
    with pytest.raises(ValueError, match=rf"other\.pt: (.|\n)*{message}"):
        load_trunk(trunk, path)
    assert all(torch.equal(p, old) for p, old in zip(trunk.parameters(), before, strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 40, 40), (3, 40, 40), (2, 40, 40, 3), (2, 4, 40, 40)])
def test_images_of_another_shape_are_refused(shape):
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"expected images \(B, 3, height, width\), got \({got}\)"):
        Trunk(SMALL)(torch.zeros(shape))


def test_batch_norms_have_pytorchs_epsilon_and_momentum():
    norms = [part for part in Trunk(SMALL).modules() if isinstance(part, BatchNorm)]
    assert len(norms) == 20 and {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
