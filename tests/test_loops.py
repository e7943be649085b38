"""Pre-training and fine-tuning against a plain loop: the same batches, schedule and loss, written out
without run.py, end with the same weights bit for bit, the same log.csv, metrics.json, pictures and printed
lines."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import pictures
import stages
from features import ExprClassifier
from images import normalise, random_crop, read_image, resize
from labels import EXPR, read_labels
from losses import expr_loss
from mae import MaskedAutoencoder
from metrics import class_f1
from plain import Plain, adamw, batches, crop_rng, loop_lines, not_said, seed_dropout
from stages import BROKEN_FACES, FACES, FILMS, checkpoint, is_drawn, log_lines, metrics, settings
from tiny import same
from vit import VisionTransformer

SIZE = (16, 16)
PATCHES = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What each stage reads."""
    return stages.write(tmp_path_factory.mktemp("loops"))


# ---- Pre-training

def still_faces(folder) -> list:
    """(path, readable) of all still faces."""
    names = [f"{name}/{number:03d}.png" for name, count in FACES.items() for number in range(count)]
    return [(folder / name, name not in BROKEN_FACES) for name in names]


def plain_pretrain(folder, config) -> Plain:
    p, seed, faces = config.pretrain, config.run.seed, still_faces(folder)
    torch.manual_seed(seed)
    model = MaskedAutoencoder(**asdict(config.vit), decoder_dim=8, decoder_depth=1, decoder_heads=2,
                              mask_ratio=0.5)
    plain = Plain(model, adamw(model, p), p, math.ceil(len(faces) / p.batch), p.epochs, "images")
    for epoch in range(p.epochs):
        for batch in batches(len(faces), p.batch, seed, epoch):
            images, noise, loss = [], [], 0
            for i in batch:
                path, readable = faces[i]
                if readable:
                    rng = crop_rng(seed, epoch, i)
                    images.append(random_crop(read_image(path), SIZE, rng, p.smallest_crop))
                    noise.append(rng.random(PATCHES, dtype=np.float32))
            images, noise = torch.tensor(np.stack(images)), torch.tensor(np.stack(noise))
            for x, u in zip(images.tensor_split(3), noise.tensor_split(3)):      # of 10, at most 4 at a time
                part = model(normalise(x), u)[0] * len(x) / len(images)
                part.backward()
                loss = loss + part.detach()
            plain.step(len(batch), loss)
        if epoch % 2 == 1 or epoch == 20:                                        # each 21 // 10, and the last
            plain.lines.append(f"  epoch {epoch + 1}/21  loss {plain.mean_loss():.4f}  "
                               f"(a plain grey picture: {grey(folder):.4f})")
        plain.end_epoch(len(BROKEN_FACES))
    return plain


def spread(folder, count: int) -> torch.Tensor:
    """`count` whole faces, from 4 · count places spread over all, less those that cannot be read."""
    faces = still_faces(folder)
    tried = [faces[int(place)] for place in np.linspace(0, len(faces) - 1, 4 * count)]
    shown = [resize(read_image(path), SIZE) for path, readable in tried if readable]
    chosen = [shown[int(place)] for place in np.linspace(0, len(shown) - 1, count)]
    return normalise(torch.tensor(np.stack(chosen)))


def grey(folder) -> float:
    """The loss of an image of ImageNet's mean colour."""
    return spread(folder, 32).square().mean().item()


def plain_reconstruction(model, folder, path):
    images, noise = spread(folder, 8), np.random.default_rng([1, 0]).random((8, PATCHES), dtype=np.float32)
    _, pred, mask = model(images, torch.tensor(noise))
    pictures.reconstruction(images, model, pred.detach(), mask, path)


def test_pre_training_is_the_plain_loop(made, tmp_path):
    config, out = settings(made), made / "runs/tiny/pretrain"
    stages.clean(out)
    said = stages.start(made, "train_pretrain.py")
    plain = plain_pretrain(made, config)
    assert same(checkpoint(out, "last.pt")["model"], plain.model.state_dict())
    assert log_lines(out) == ["epoch,lr,loss,gradient_norm,unreadable,seconds", *plain.rows]
    loss = float(plain.rows[-1].split(",")[2])
    assert metrics(out) == {"images": 23, "epochs": 21, "loss": loss, "unreadable": 3}
    numbers = sum(p.numel() for p in plain.model.parameters())
    assert loop_lines(said) == plain.lines
    assert not not_said(
        said, "  faces/a                         9 images", "  faces/b                        14 images",
        f"MAE of {numbers:,} parameters on 23 faces, 21 epochs; "
        "effective batch 10 = 4 x 3 accumulation x 1 processes, on cpu",
        f"pre-training is finished: loss {loss:.4f}, 3 unreadable images in the last epoch; "
        "see runs/tiny/pretrain/reconstruction.png")
    assert stages.files(out) == {"config.yaml", "made_of.json", "last.pt", "log.csv", "metrics.json",
                                 "curves.png", "reconstruction.png"}
    pictures.curves(out / "log.csv", tmp_path / "curves.png", {"loss": grey(made)})
    plain_reconstruction(plain.model, made, tmp_path / "reconstruction.png")
    for name in ("curves.png", "reconstruction.png"):
        assert is_drawn(out / name) and (out / name).read_bytes() == (tmp_path / name).read_bytes(), name


# ---- Fine-tuning

def labelled_frames(folder, part: str) -> list:
    """(path, class, readable) of each frame with a label and an image, in `part`: a folder of label files."""
    rows = []
    for name, film in sorted(FILMS.items()):
        if film.split == part and film.images:
            labels = read_labels(folder / "labels" / EXPR.folders[0] / part / f"{name}.txt", EXPR)
            for number in film.images:
                if number <= film.frames and labels[number - 1] != -1:
                    path = folder / "frames" / name / f"{number:05d}.jpg"
                    rows.append((path, int(labels[number - 1]), number not in film.broken))
    return rows


def count_unreadable(rows) -> int:
    return sum(not readable for _, _, readable in rows)


def f1_of(model, rows) -> np.ndarray:
    """F1 of each class, from whole frames one by one, as far as they can be read."""
    model.eval()
    pred, true = [], []
    for path, label, readable in rows:
        if readable:
            image = torch.tensor(resize(read_image(path), SIZE))[None]           # -> (1, 16, 16, 3)
            pred.append(int(model(normalise(image)).argmax()))
            true.append(label)
    return class_f1(pred, true)


def below(name: str) -> int:
    """How far under the head a parameter lies in the ViT of two blocks."""
    for start, layers in {"vit.blocks.1.": 1, "vit.blocks.0.": 2, "vit.cls_token": 3, "vit.pos_embed": 3,
                          "vit.patch_embed.": 3}.items():
        if name.startswith(start):
            return layers
    return 0


def plain_finetune(folder, config, start) -> Plain:
    """`start`: weights of the ViT, among others; None: random ones."""
    f, seed = config.finetune, config.run.seed
    rows, val = labelled_frames(folder, "Train_Set"), labelled_frames(folder, "Validation_Set")[::f.every]
    samples = math.ceil(len(rows) / f.every)
    torch.manual_seed(seed)
    vit = VisionTransformer(**asdict(config.vit), drop_path=f.drop_path)
    model = ExprClassifier(vit, "cls", f.hidden, f.dropout)
    if start:
        model.vit.load_state_dict({name: start[name] for name in model.vit.state_dict()})
    factors = {name: f.layer_decay ** below(name) for name, _ in model.named_parameters()}
    plain = Plain(model, adamw(model, f, factors), f, math.ceil(samples / f.batch), f.epochs, "images")
    for epoch in range(f.epochs):
        model.train()
        unreadable = 0
        for step, batch in enumerate(batches(samples, f.batch, seed, epoch)):
            images, classes, loss = [], [], 0
            for i in batch:
                path, label, readable = rows[(i * f.every + epoch % f.every) % len(rows)]
                unreadable += not readable
                if readable:
                    rng = crop_rng(seed, epoch, i)
                    images.append(random_crop(read_image(path), SIZE, rng, f.smallest_crop))
                    classes.append(label)
            images, classes = torch.tensor(np.stack(images)), torch.tensor(classes)
            seed_dropout(seed, epoch, step)
            for x, y in zip(images.tensor_split(3), classes.tensor_split(3)):
                part = expr_loss(model(normalise(x)), y, y >= 0, len(images))
                part.backward()
                loss = loss + part.detach()
            plain.step(len(batch), loss)
        f1 = f1_of(model, val).mean()
        best = plain.keep_best(f1)
        plain.lines.append(f"  epoch {epoch + 1}/{f.epochs}  loss {plain.mean_loss():.4f}  "
                           f"validation macro F1 of single frames {f1:.3f}{best}")
        plain.end_epoch(unreadable, f1, count_unreadable(val))
    return plain


def test_fine_tuning_is_the_plain_loop(made, tmp_path):
    config, out = settings(made), made / "runs/tiny/finetune"
    stages.clean(out)
    said = stages.start(made, "train_finetune.py")
    plain = plain_finetune(made, config, checkpoint(made / "runs/tiny/pretrain", "last.pt")["model"])
    best = checkpoint(out, "best.pt")
    assert same(checkpoint(out, "last.pt")["model"], plain.model.state_dict())
    assert same(best["model"], plain.best_weights) and best["score"] == pytest.approx(plain.best)
    assert best["epoch"] == plain.best_epoch
    assert 1 < plain.best_epoch < 5, "take another seed or learning rate"
    assert 0 < plain.clipped < plain.done, "take another finetune.clip"
    columns = "epoch,lr,loss,gradient_norm,unreadable,val_f1,val_unreadable,seconds"
    assert log_lines(out) == [columns, *plain.rows]
    numbers = sum(p.numel() for p in plain.model.parameters())
    plain.model.load_state_dict(plain.best_weights)
    rows, val = labelled_frames(made, "Train_Set"), labelled_frames(made, "Validation_Set")
    f1, unreadable = f1_of(plain.model, val), count_unreadable(val)
    scored = len(val) - unreadable
    assert metrics(out) == {"val_macro_f1": f1.mean(), "val_f1": f1.tolist(), "val_frames": scored,
                            "val_unreadable": unreadable, "train_frames": len(rows)}
    assert unreadable > count_unreadable(val[::3]) > 0
    assert loop_lines(said) == plain.lines
    assert not not_said(
        said,
        f"  training: {len(rows)} labelled frames with a face image in 5 videos; left out, no frames: 3",
        f"  validation: {len(val)} labelled frames with a face image in 2 videos; left out, no frames: 8",
        "  the ViT starts from runs/tiny/pretrain/last.pt; missing keys: none; unexpected keys, left out: "
        "decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, mask_token",
        f"fine-tuning {numbers:,} parameters for 5 epochs of {math.ceil(len(rows) / 3)} frames; "
        "effective batch 10 = 4 x 3 accumulation x 1 processes, on cpu",
        f"fine-tuning is finished: macro F1 {f1.mean():.3f} on {scored} single validation frames "
        f"({unreadable} more cannot be read), written to runs/tiny/finetune")
    assert stages.files(out) == {"config.yaml", "made_of.json", "last.pt", "best.pt", "log.csv",
                                 "metrics.json", "curves.png"}
    often = max(np.bincount([label for _, label, readable in val if readable])) / scored
    chance = {"loss": math.log(8), "val_f1": 2 * often / (1 + often) / 8}        # always the commonest class
    pictures.curves(out / "log.csv", tmp_path / "curves.png", chance)
    assert is_drawn(out / "curves.png")
    assert (out / "curves.png").read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_a_fine_tuning_from_random_weights_asks_for_no_pre_training(made):
    options = ["run.name=scratch", "finetune.start=none", "finetune.epochs=1"]
    said = stages.start(made, "train_finetune.py", *stages.overriding(options))
    plain = plain_finetune(made, settings(made, *options), None)
    assert same(checkpoint(made / "runs/scratch/finetune", "last.pt")["model"], plain.model.state_dict())
    assert "  the ViT starts from random weights, as asked" in said.splitlines()
