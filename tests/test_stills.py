"""Labelled still faces, the balanced order of an epoch, the networks that learn them, and which checkpoints
EMMA takes as its CNN."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import made_of
import tiny
from cnn import ResNet18
from config import Config, load
from dan import DAN, DANWithCentres
from face_set import FaceSet
from features import ExprClassifier
from images import random_crop, read_image
from plain import crop_rng
from plain_cnn import public_dan_shapes, random_weights, resnet_shapes
from processes import ALONE
from settings import Vit
from stages import overriding
from stills import LabelledStills, build, cnn_of, fill, labelled_sets, load_cnn
from tiny import TINY, copied, done, log, log_numbers, metrics, run, weights
from training import loader

LABELS = [0] * 9 + [1] * 4 + [4] * 2 + [7]                       # of the training faces: 4 classes occur


def face_set(root, labels, training, name="a"):
    """A FaceSet of grey faces, the n-th of grey level n."""
    (root / name).mkdir(parents=True)
    for n in range(len(labels)):
        Image.new("RGB", (8, 8), (n,) * 3).save(root / name / f"{n:02d}.png")
    return FaceSet(name, root / name, [f"{n:02d}.png".encode() for n in range(len(labels))], labels, training,
                   {})


@pytest.fixture
def sets(tmp_path):
    """Two sets; in the second three faces validate, and one of them has no label."""
    return [face_set(tmp_path, LABELS, [True] * len(LABELS)),
            face_set(tmp_path, [2, 2, -1, 0, -1], [False, False, False, True, True], "b")]


def classes_of(faces) -> list[int]:
    return [int(faces.row(i)[2]) for i in range(len(faces))]


# ---- Faces

def test_training_and_validation_faces_with_a_label_are_taken_and_the_rest_is_counted(sets):
    train, val = LabelledStills(sets, True, 8, seed=0), LabelledStills(sets, False, 8)
    assert len(train) == len(LABELS) + 1 and train.skipped == {"no expression label": 1}
    assert classes_of(val) == [2, 2] and val.skipped == {"no expression label": 1}
    assert val.where(1).endswith("b/01.png") and val[1][0].shape == (8, 8, 3) and val[1][0].mean() == 1
    assert train.summary() == ("17 faces (Neutral 10, Anger 4, Disgust 0, Fear 0, Happiness 2, Sadness 0, "
                               "Surprise 0, Other 1); left out: 1 no expression label")


def test_an_epoch_has_every_class_equally_often_and_goes_through_each_classs_faces_in_turn(sets):
    faces = LabelledStills(sets, True, 8, seed=3)
    orders = []
    for faces.epoch in range(3):
        assert np.bincount(classes_of(faces), minlength=8).tolist() == [5, 4, 0, 0, 4, 0, 0, 4]
        assert classes_of(faces) == [[0, 1, 4, 7][i % 4] for i in range(17)]
        of_class = {k: [faces.where(i) for i in range(17) if faces.row(i)[2] == k] for k in (0, 1, 4, 7)}
        assert len(set(of_class[0])) == 5 and len(set(of_class[1])) == 4          # none twice while it lasts
        assert sorted(of_class[4]) == sorted(2 * [*set(of_class[4])])             # two faces, each twice
        assert of_class[7] == 4 * of_class[7][:1]
        orders.append(faces.order.tolist())
    assert orders[0] != orders[1] != orders[2]
    again = LabelledStills(sets, True, 8, seed=3)
    again.epoch = 1
    assert again.order.tolist() == orders[1]
    assert LabelledStills(sets, True, 8, seed=4).order.tolist() != orders[0]


def test_over_the_epochs_every_face_has_its_turn(sets):
    faces, seen = LabelledStills(sets, True, 8, seed=0), set()
    for faces.epoch in range(12):
        seen |= {faces.where(i) for i in range(len(faces))}
    assert len(seen) == 17


def test_a_training_face_is_cropped_by_seed_epoch_and_sample_and_a_batch_tells_what_is_broken(sets):
    faces = LabelledStills(sets, True, 4, seed=5, smallest_crop=0.3)
    faces.epoch = 2
    for i in (0, 9):
        expected = random_crop(read_image(faces.where(i)), (4, 4), crop_rng(5, 2, i), 0.3)
        assert np.array_equal(faces[i][0], expected)
    with open(faces.where(0), "wb") as file:
        file.write(b"no image")
    images, labels, problems = next(loader(faces, [[0, 1]], 0, ALONE))
    assert len(images) == 1 and labels.tolist() == [1] and problems[0].startswith(faces.where(0))


def test_other_labels_or_other_faces_have_another_fingerprint(sets, tmp_path):
    before = LabelledStills(sets, True, 8, seed=0).fingerprint()
    sets[0].labels[0] = 3
    changed = LabelledStills(sets, True, 8, seed=0).fingerprint()
    assert before.startswith("17 faces, checksum ") and changed != before


def test_no_set_and_a_part_without_a_label_are_refused(sets):
    with pytest.raises(ValueError, match="no labelled still faces: give data.affectnet_2017 or data."):
        labelled_sets(Config().data)
    with pytest.raises(ValueError, match="a: no validation face has an expression label; left out: nothing"):
        LabelledStills(sets[:1], False, 8)


# ---- Networks

def config_of(network: str, width: int = 2):
    config = Config()
    config.stills.network, config.stills.width = network, width
    config.vit = Vit(image_size=16, patch=8, dim=8, depth=1, heads=2)
    return config


def ours(path, model, stage="stills"):
    """A checkpoint as train_stills.py writes it."""
    record = {"stage": stage, "settings": {}}
    torch.save({"model": model.state_dict(), "made_of": record} if stage else model.state_dict(), path)
    return path


def test_the_network_is_the_one_that_was_asked_for():
    assert type(build(config_of("resnet18"))) is ResNet18 and type(build(config_of("vit"))) is ExprClassifier
    dan = build(config_of("dan"))
    assert type(dan) is DANWithCentres and dan.centres.shape == (8, 16)
    assert sum(p.numel() for p in build(config_of("dan", 64)).dan.parameters()) == 19_724_248


def test_both_cnns_start_from_a_resnet18_and_the_vit_from_a_vit(tmp_path):
    trunk = ours(tmp_path / "trunk.pt", ResNet18(5, 2))
    saved = torch.load(trunk, weights_only=True)["model"]
    for network, of in (("resnet18", lambda model: model), ("dan", lambda model: model.dan.trunk)):
        model = build(config_of(network))
        assert fill(model, network, trunk) == "left out: fc.weight, fc.bias"
        assert torch.equal(of(model).layer4[1].conv2.weight, saved["layer4.1.conv2.weight"])
    other = build(config_of("vit"))
    model = build(config_of("vit"))
    fill(model, "vit", ours(tmp_path / "vit.pt", other))
    assert torch.equal(model.vit.patch_embed.proj.weight, other.vit.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="trunk.pt"):
        fill(model, "vit", trunk)


@pytest.mark.parametrize("width, heads", [(2, 4), (4, 3)])
def test_the_cnn_of_a_checkpoint_gives_the_scores_that_it_gave(tmp_path, width, heads):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 40, 40)
    for model, scores, name in ((ResNet18(8, width), lambda m: m(images), "ResNet-18"),
                                (DANWithCentres(DAN(8, heads, width)), lambda m: m.dan(images), "DAN")):
        with torch.no_grad():
            for _ in range(3):
                model.train()(images)                              # moves the statistics of BatchNorm
            found, said = load_cnn(ours(tmp_path / "cnn.pt", model))
            assert said == f"our own {name}, {tmp_path}/cnn.pt"
            assert torch.equal(found.eval()(images), scores(model.eval()))


def test_the_public_dan_is_taken_with_its_classes_in_our_order(tmp_path):
    torch.save({"model_state_dict": random_weights(public_dan_shapes())}, tmp_path / "dan.pth")
    model, said = load_cnn(tmp_path / "dan.pth")
    assert type(model) is DAN and said == "the public DAN, its classes put into the order of ours"


@pytest.mark.parametrize("make, message", {
    "foreign": (lambda: ours("cnn.pt", ResNet18(8, 2), stage=""),
                "cnn.pt: not of train_stills.py, so the order of its 8 classes is unknown; train one from "
                "it: --set stills.start="),
    "of another stage": (lambda: ours("cnn.pt", ResNet18(8, 2), stage="emma"), "not of train_stills.py"),
    "of seven classes": (lambda: ours("cnn.pt", ResNet18(7, 2)),
                         r"cnn.pt: a network of 7 classes, expected 8 \(Neutral, Anger"),
    "a DAN of seven classes": (lambda: ours("cnn.pt", DANWithCentres(DAN(7, 4, 2))), "network of 7 classes"),
    "a ViT": (lambda: ours("cnn.pt", build(config_of("vit"))),
              "cnn.pt: got vit.cls_token, .*expected the weights of a ResNet-18 or of a DAN"),
    "torn": (lambda: open("cnn.pt", "wb").write(b"PK half"), "cnn.pt"),
    "absent": (lambda: None, "cnn.pt"),
    "with a shape that does not fit": (lambda: ours("cnn.pt", wrong()), r"layer1.0.bn1.weight: file \(3,\)")
}.values())
def test_what_is_no_cnn_of_ours_is_refused(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make()
    with pytest.raises(ValueError, match=message):
        load_cnn("cnn.pt")


OURS = {"stage": "stills"}


def resnet(**changed):
    return ResNet18(8, 2).state_dict() | {name.replace("_", "."): value for name, value in changed.items()}


def without(start):
    weights = DANWithCentres(DAN(width=2)).state_dict()
    return {name: value for name, value in weights.items() if not name.startswith(start)}


@pytest.mark.parametrize("state, message", [
    (lambda: {"model": 3, "made_of": OURS}, "holds no weights"),
    (lambda: {"model": [1]}, "holds no weights"),
    (lambda: {1: torch.zeros(2)}, "holds no weights"),
    (lambda: {"model_state_dict": {}}, "got nothing"),
    (lambda: {"model": resnet(), "made_of": 3}, "not of train_stills.py"),
    (lambda: {"model": resnet(conv1_weight=torch.zeros(())), "made_of": OURS}, "got conv1.weight, bn1"),
    (lambda: {"model": resnet(conv1_weight=torch.zeros(2, 3, 3, 3)), "made_of": OURS}, "got conv1.weight"),
    (lambda: {"model": resnet(fc_weight=torch.zeros(())), "made_of": OURS}, "got conv1.weight, bn1.weight"),
    (lambda: {"model": without("dan.heads"), "made_of": OURS}, "got trunk.conv1.weight"),
    (lambda: {"model": without(("dan.heads.1", "dan.heads.2", "dan.heads.3")), "made_of": OURS}, "got trunk"),
    (lambda: {"model": without("dan.bn."), "made_of": OURS}, "another architecture(.|\n)*bn.weight: missing"),
    (lambda: {"model": without("-") | {"dan.trunk.conv1.weight": torch.zeros(3, 3, 7, 7)}, "made_of": OURS},
     "width=3: the gate")])
def test_a_file_that_is_almost_a_cnn_is_refused_by_its_name(tmp_path, state, message):
    torch.save(state(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: (.|\n)*{message}"):
        load_cnn(tmp_path / "x.pt")


def wrong():
    model = ResNet18(8, 2)
    model.layer1[0].bn1.weight = torch.nn.Parameter(torch.ones(3))
    return model


def test_an_empty_network_is_built_from_names_and_shapes_alone():
    of_dan = {name: torch.zeros(shape) for name, shape in DAN(8, 2, 2).state_dict().items()
              for shape in [shape.shape]}
    assert len(cnn_of(of_dan, "x").heads) == 2 and cnn_of(of_dan, "x").trunk.dim == 16
    of_resnet = {name: torch.zeros(shape) for name, shape in resnet_shapes(8, 4).items()}
    assert cnn_of(of_resnet, "x").dim == 32


# ---- The stage

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("stills"))
    done(folder, "train_stills.py", *TINY)
    return folder


def test_every_network_is_trained_by_the_same_command(made, tmp_path):
    folder = copied(made, tmp_path)
    trunk = "stills.start=runs/tiny/stills/best.pt"
    for name, start in {"dan": trunk, "vit": "stills.start=none"}.items():
        said = done(folder, "train_stills.py", *TINY, "--set", f"run.name={name}", "--set",
                    f"stills.network={name}", "--set", start)
        place = folder / f"runs/{name}/stills"
        assert f"{name} on " in said and "chance" in said and len(log(place)) == 2
        assert 0 <= metrics(place)["val_macro_f1"] <= 1 and (place / "curves.png").exists()
    assert "dan.heads.3.spatial.conv1x1.0.weight" in weights(folder / "runs/dan/stills")
    assert load_cnn(folder / "runs/dan/stills/best.pt")[1].startswith("our own DAN")


def test_another_start_is_refused_and_the_same_one_elsewhere_is_not(made, tmp_path):
    folder = copied(made, tmp_path)
    assert "nothing to do" in done(folder, "train_stills.py", *TINY, "--set", "stills.start=none")
    start = ["--set", "run.name=x", "--set", "run.base=", "--set", "stills.start=runs/tiny/stills/last.pt"]
    codes, said = run(folder, "train_stills.py", *TINY, *start[4:])
    assert codes == [2] and "made from random weights (checksum 0), but runs/tiny/stills/last.pt is" in said
    done(folder, "train_stills.py", *TINY, *start)
    assert made_of.chain(made_of.read_record(folder / "runs/x/stills"))[1]["stage"] == "stills"
    (folder / "runs/tiny/stills/last.pt").rename(folder / "moved.pt")
    for same in (start, [*start[:4], "--set", "stills.start=moved.pt"]):         # gone; or moved
        assert "is finished; nothing to do" in done(folder, "train_stills.py", *TINY, *same)
    for other in ([], ["--set", "stills.start=runs/tiny/stills/best.pt"]):
        codes, said = run(folder, "train_stills.py", *TINY, *start[:4], *other)
        assert codes == [2] and "was made from runs/tiny/stills/last.pt (checksum " in said


def test_a_cnn_of_another_start_is_not_taken_from_the_base(made):
    for start, taken in (("", "tiny"), ("runs/tiny/stills/last.pt", "new")):
        with contextlib.chdir(made):
            config = load("tiny.yaml", ["run.name=new", "run.base=tiny", f"stills.start={start}"])
            assert made_of.place(config, "stills") == Path(f"runs/{taken}/stills")


def test_a_batch_of_one_is_refused(made, tmp_path):
    codes, said = run(copied(made, tmp_path), "train_stills.py", *TINY, "--set", "run.name=one", "--set",
                      "stills.batch=1")
    assert codes == [2] and "stills.batch: got 1, expected 2 or more" in said


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet18", "dan"])
def test_a_step_with_fewer_than_two_readable_faces_changes_nothing(made, tmp_path, network):
    """Half of the images are broken and three make a batch, so this occurs often; in one process and two."""
    rows = {}
    for world in (1, 2):
        folder = copied(made, tmp_path / str(world), ["stills"])
        for path in sorted((folder / "data").glob("AffectNet*/**/*.jpg"))[::2]:
            tiny.spoil(path, "empty")
        options = [f"stills.network={network}", "stills.batch=3", "stills.epochs=1", "stills.lr=1e-9"]
        done(folder, "train_stills.py", *TINY, *overriding(options), world=world)
        place = folder / "runs/tiny/stills"
        assert all(value.isfinite().all() for value in weights(place).values())
        rows[world] = log_numbers(place)
        assert rows[world][0][4] > 5, "few are unreadable"
        steps = int(next(v for k, v in weights(place).items() if k.endswith("bn1.num_batches_tracked")))
        assert steps < 11, "no step was left out"
    for place in rows[1], rows[2]:
        place[:, 3] = 0               # the gradient's norm: through BatchNorm over two faces rounding grows
    assert rows[1] == pytest.approx(rows[2], rel=1e-4)


def test_killed_and_started_again_it_ends_with_the_same_bits(made, tmp_path):
    folder = copied(made, tmp_path, ["stills"])
    command = ["train_stills.py", *TINY, *tiny.EACH_STEP]
    assert run(folder, *command, hook=tiny.stop("run.Run.end_step", 5)).codes == [-9]
    assert "going on from epoch" in done(folder, *command)
    tiny.assert_same(folder / "runs/tiny/stills", made / "runs/tiny/stills")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["dan", "vit"])
def test_two_processes_train_as_one_does(made, tmp_path, network):
    """Two steps: DAN's gradients are so steep here that rounding grows from step to step."""
    rows = []
    for world in (1, 2):
        folder = copied(made, tmp_path / str(world), ["stills"])
        done(folder, "train_stills.py", *TINY, "--set", f"stills.network={network}", "--set",
             "finetune.dropout=0", "--set", "stills.batch=100", world=world)
        rows.append(log_numbers(folder / "runs/tiny/stills"))
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
