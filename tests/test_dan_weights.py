"""A made-up checkpoint with the public DAN's names: its scores, the order of its classes, and what is
refused."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from affectnet import AFFECTNET
from checkpoints import write_file
from dan import DAN
from dan_weights import PUBLIC_CLASS, PUBLIC_CLASSES, load_dan, our_name
from labels import EXPRESSIONS
from plain_cnn import public_dan, public_dan_shapes, random_weights, resnet_shapes

SMALL = 2                                                            # width of the first stage


def save(path, state):
    write_file(path, lambda file: torch.save(state, file))
    return path


def public(classes=8, width=SMALL, dtype=torch.float32):
    return random_weights(public_dan_shapes(classes, width), dtype=dtype)


def as_saved(weights):
    """The public file holds the optimiser's state too."""
    optimizer = {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {"iter": 10, "model_state_dict": weights, "optimizer_state_dict": optimizer}


# ---- The public checkpoint

def test_the_public_names_and_shapes_are_ours_after_the_map_of_names_all_275():
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in DAN().state_dict().items()}
    theirs = public_dan_shapes()
    assert len(theirs) == 275
    assert {our_name(name): shape for name, shape in theirs.items()} == ours


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_public_checkpoint_gives_the_scores_of_its_own_network_in_our_order_of_classes(tmp_path, training):
    torch.manual_seed(0)
    weights = public(dtype=torch.double)
    model = DAN(width=SMALL).double().train(training)
    said = load_dan(model, save(tmp_path / "dan.pth", as_saved(weights)))
    assert said == "the public DAN, its classes put into the order of ours"
    images = torch.randn(5, 3, 70, 64, dtype=torch.double)
    expected, features, heads = public_dan(weights, images, training)
    scores, mean, ours = model.parts(images)
    assert torch.allclose(mean, features.mean((2, 3)), rtol=1e-9, atol=1e-10)
    assert torch.allclose(ours, heads, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.1
    for name, column in zip(EXPRESSIONS, scores.T):
        theirs = PUBLIC_CLASSES.index(PUBLIC_CLASS[name])
        assert torch.allclose(column, expected[:, theirs], rtol=1e-9, atol=1e-9), name


def test_the_names_alone_are_enough(tmp_path):
    model = DAN(width=SMALL)
    assert load_dan(model, save(tmp_path / "dan.pth", public())).startswith("the public DAN")


def test_classes_are_matched_by_name_and_as_affectnets_labels_are():
    assert PUBLIC_CLASSES == ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
    assert sorted(PUBLIC_CLASS) == sorted(EXPRESSIONS)
    assert sorted(PUBLIC_CLASS.values()) == sorted(PUBLIC_CLASSES)
    for theirs, ours in zip(PUBLIC_CLASSES, AFFECTNET):              # its codes are in this order
        assert PUBLIC_CLASS[EXPRESSIONS[ours]] == theirs
    alike = {name: word for name, word in PUBLIC_CLASS.items() if word[:3] != name[:3].lower()}
    assert alike == {"Other": "contempt"}


def test_a_face_that_the_public_network_calls_happy_is_happiness(tmp_path):
    weights = public()
    weights["bn.bias"] = 1000.0 * (torch.arange(8) == 1)             # its class 1 wins always
    model = DAN(width=SMALL).eval()
    load_dan(model, save(tmp_path / "dan.pth", as_saved(weights)))
    assert EXPRESSIONS[model(torch.randn(1, 3, 40, 40)).argmax()] == "Happiness"


# ---- Our own

@pytest.mark.parametrize("prefix", ["", "dan."])
def test_our_own_checkpoint_is_read_as_it_is(tmp_path, prefix):
    torch.manual_seed(0)
    source, model, images = DAN(width=SMALL), DAN(width=SMALL), torch.randn(3, 3, 40, 40)
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    if prefix:
        weights["centres"] = torch.zeros(8, 16)
    assert load_dan(model, save(tmp_path / "best.pt", {"model": weights, "epoch": 3})) == "our own DAN"
    assert torch.equal(model.eval()(images), source.eval()(images))


def test_a_public_checkpoint_once_loaded_and_saved_is_our_own_and_not_reordered_again(tmp_path):
    first, second, images = DAN(width=SMALL).eval(), DAN(width=SMALL).eval(), torch.randn(3, 3, 40, 40)
    load_dan(first, save(tmp_path / "dan.pth", as_saved(public())))
    load_dan(second, save(tmp_path / "ours.pt", {"model": first.state_dict()}))
    assert torch.equal(second(images), first(images))


# ---- Refusals

def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


CLASSES = ("a network of 7 classes, expected 8 (Neutral, Anger, Disgust, Fear, Happiness, Sadness, Surprise, "
           "Other); use a checkpoint that was trained on these")
PLAIN = "a ResNet without DAN's heads; expected a whole DAN. A ResNet-18 can only be the trunk"


@pytest.mark.parametrize("state, message", [
    (as_saved(public(classes=7)), CLASSES),
    ({"model": DAN(classes=7, width=SMALL).state_dict()}, CLASSES),
    (as_saved(without(public(), "cat_head2.sa.conv_1x3.1.running_var")),
     "heads.2.spatial.conv_1x3.1.running_var: missing in the file"),
    (as_saved(without(public(), "fc.bias")), "fc.bias: missing in the file"),
    (as_saved(without(public(), "bn.num_batches_tracked")), "bn.num_batches_tracked: missing in the file"),
    (as_saved(public() | {"cat_head4.ca.attention.0.bias": torch.zeros(1)}),
     "cat_head4.ca.attention.0.bias: not in the model"),
    (as_saved(public() | {"features.2.weight": torch.zeros(1)}), "features.2.weight: not in the model"),
    (as_saved(public() | {"bn.weight": torch.ones(7)}), "bn.weight: file (7,), model (8,)"),
    (as_saved(public(width=4)), "trunk.conv1.weight: file (4, 3, 7, 7), model (2, 3, 7, 7)"),
    (random_weights(resnet_shapes(8, SMALL)), PLAIN),
    ({"state_dict": random_weights(resnet_shapes(1000, SMALL))}, PLAIN),
    ({"model_state_dict": 3}, "holds no weights; expected a dictionary of names and tensors"),
    ({"model": {"weight": torch.zeros(3)}}, "of another architecture, 276 of 275 entries differ"),
    ({"model": {}}, "of another architecture, 275 of 275 entries differ")])
def test_what_is_no_dan_of_eight_classes_is_refused_and_nothing_is_loaded(tmp_path, state, message):
    torch.manual_seed(0)
    model = DAN(width=SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = save(tmp_path / "other.pth", state)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: (.|\n)*{re.escape(message)}"):
        load_dan(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_dan(DAN(width=SMALL), tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")           # what a dead link leaves behind
    with pytest.raises(ValueError, match=r"page\.pth: not a whole, plain checkpoint"):
        load_dan(DAN(width=SMALL), tmp_path / "page.pth")


def test_the_command_says_what_was_refused_and_ends_with_2(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "resnet.pth", random_weights(resnet_shapes(8, SMALL)))
    monkeypatch.setattr(sys, "argv", ["dan_weights.py", str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parent.parent / "dan_weights.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"refused: {path}: a ResNet without DAN's heads")
