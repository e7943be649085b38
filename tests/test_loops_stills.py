"""ResNet-18, DAN and a ViT on AffectNet's labels against a plain loop, as in test_loops.py."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import stages
from cnn import ResNet18
from dan import DAN, DANWithCentres, affinity_loss, partition_loss
from features import ExprClassifier
from images import normalise, random_crop, read_image, resize
from metrics import class_f1
from plain import Plain, adamw, batches, crop_rng, loop_lines, seed_dropout
from stages import checkpoint, log_lines, metrics, settings
from test_loops import SIZE, below
from tiny import same
from vit import VisionTransformer

AFFECTNET = (0, 6, 5, 4, 1, 2, 3, 7)                  # its codes of our classes
TRAINING, VALIDATION = [0, 1, 1, 2, 0, 0, 4, 2, 0, 1, 6, 0, 0, 7], [0, 1, 2, 4, 1, 7]      # classes
BROKEN = ("training/03.png", "validation/01.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """AffectNet's two lists, with a face for each row, some of which cannot be read."""
    folder, rng = stages.write(tmp_path_factory.mktemp("loops")), np.random.default_rng(2)
    for part, classes in (("training", TRAINING), ("validation", VALIDATION)):
        for n in range(len(classes)):
            stages.write_image(path_of(folder, part, n), rng)
        rows = [f"{part}/{n:02d}.png,0,0,9,9,,{AFFECTNET[k]},0,0\n" for n, k in enumerate(classes)]
        (folder / f"affectnet/{part}.csv").write_text("".join(rows))
    for file in BROKEN:
        (folder / "affectnet/Manually_Annotated_Images" / file).write_bytes(b"no image")
    return folder


def path_of(folder, part: str, n: int):
    return folder / f"affectnet/Manually_Annotated_Images/{part}/{n:02d}.png"


def is_readable(part: str, n: int) -> bool:
    return f"{part}/{n:02d}.png" not in BROKEN


def f1_of(scores_of, folder) -> np.ndarray:
    """F1 of each class, from whole faces one by one, as far as they can be read."""
    pred, true = [], []
    for n, k in enumerate(VALIDATION):
        if is_readable("validation", n):
            image = torch.tensor(resize(read_image(path_of(folder, "validation", n)), SIZE))[None]
            pred.append(int(scores_of(normalise(image)).argmax()))
            true.append(k)
    return class_f1(pred, true)


def balanced(seed: int, epoch: int) -> list[int]:
    """The face of each sample: the classes in turn, each through its faces in a shuffled order."""
    rng, present, faces = np.random.default_rng([2, seed, epoch]), sorted(set(TRAINING)), {}
    for k in present:
        faces[k] = rng.permutation([n for n, label in enumerate(TRAINING) if label == k]).tolist()
    chosen = []
    for i in range(len(TRAINING)):
        of_class = faces[present[i % len(present)]]
        chosen.append(of_class[i // len(present) % len(of_class)])
    return chosen


def plain_stills(folder, config) -> Plain:
    s, seed = config.stills, config.run.seed
    torch.manual_seed(seed)
    model = {"dan": lambda: DANWithCentres(DAN(width=2)), "resnet18": lambda: ResNet18(8, 2),
             "vit": lambda: ExprClassifier(VisionTransformer(**asdict(config.vit), drop_path=s.drop_path),
                                           "cls", config.finetune.hidden, 0.3)}[s.network]()
    factors = {name: s.layer_decay ** below(name) for name, _ in model.named_parameters()}
    plain = Plain(model, adamw(model, s, factors), s, math.ceil(len(TRAINING) / s.batch), s.epochs, "images")
    for epoch in range(s.epochs):
        model.train()
        unreadable, faces = 0, balanced(seed, epoch)
        for step, batch in enumerate(batches(len(TRAINING), s.batch, seed, epoch)):
            images, labels = [], []
            for i in batch:
                unreadable += not is_readable("training", faces[i])
                if is_readable("training", faces[i]):
                    image = read_image(path_of(folder, "training", faces[i]))
                    images.append(random_crop(image, SIZE, crop_rng(seed, epoch, i), s.smallest_crop))
                    labels.append(TRAINING[faces[i]])
            seed_dropout(seed, epoch, step)
            x, y = normalise(torch.tensor(np.stack(images))), torch.tensor(labels)
            if s.network == "dan":
                scores, features, heads = model(x)
                loss = F.cross_entropy(scores, y) + partition_loss(heads)
                loss = loss + affinity_loss(features, y, y >= 0, model.centres)
            else:
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            plain.step(len(batch), loss)
        model.eval()
        f1 = f1_of(getattr(model, "dan", model), folder).mean()
        best = plain.keep_best(f1)
        plain.lines.append(f"  epoch {epoch + 1}/{s.epochs}  loss {plain.mean_loss():.4f}  "
                           f"validation macro F1 {f1:.3f}{best}")
        plain.end_epoch(unreadable, f1, 1)
    return plain


@pytest.mark.parametrize("network, clip, more", [
    ("resnet18", 50, []), ("dan", 140, []), ("vit", 1.5, ["stills.layer_decay=0.6", "stills.drop_path=0.4"])])
def test_training_on_still_faces_is_the_plain_loop(made, network, clip, more):
    options = [f"run.name={network}", f"stills.network={network}", f"stills.clip={clip}",
               "data.affectnet_2017=affectnet", *more]
    config, out = settings(made, *options), made / f"runs/{network}/stills"
    said = stages.start(made, "train_stills.py", *stages.overriding(options))
    plain, best, last = plain_stills(made, config), checkpoint(out, "best.pt"), checkpoint(out, "last.pt")
    for name, value in plain.model.state_dict().items():        # the terms are added in another order
        assert torch.allclose(last["model"][name], value, atol=1e-4), name
    if network != "dan":
        assert same(last["model"], plain.model.state_dict())
        assert same(best["model"], plain.best_weights)
    assert best["epoch"] == plain.best_epoch
    assert 0 < plain.clipped < plain.done, "take another clip"
    columns = "epoch,lr,loss,gradient_norm,unreadable,val_f1,val_unreadable,seconds"
    assert log_lines(out)[0] == columns and len(loop_lines(said)) == len(plain.lines)
    for row, expected in zip(log_lines(out)[1:], plain.rows, strict=True):
        assert list(map(float, row.split(","))) == pytest.approx(list(map(float, expected.split(","))), 1e-4)
    plain.model.load_state_dict(plain.best_weights)
    f1 = f1_of(getattr(plain.model.eval(), "dan", plain.model), made)
    assert metrics(out)["val_f1"] == f1.tolist() and metrics(out)["val_faces"] == 5
    assert stages.files(out) == {"config.yaml", "made_of.json", "last.pt", "best.pt", "log.csv",
                                 "metrics.json", "curves.png"}


def test_a_step_with_fewer_than_two_readable_faces_is_left_out(made):
    options = ["run.name=pairs", "stills.network=resnet18", "stills.batch=2", "stills.epochs=1",
               "data.affectnet_2017=affectnet"]
    stages.start(made, "train_stills.py", *stages.overriding(options))
    row = log_lines(made / "runs/pairs/stills")[1].split(",")
    assert row[4] == "1" and math.isfinite(float(row[2]))            # one face of one pair is broken
    assert all(value.isfinite().all() for value in checkpoint(made / "runs/pairs/stills", "last.pt")["model"]
               .values())
