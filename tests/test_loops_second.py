"""The second paper's trainings against a plain loop, as in test_loops.py: EMMA and masked CoTEX."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import stages
from cotex import CoTEX, cotex_loss
from emma import EMMA, by_task, count, emma_losses, score
from images import normalise, random_crop, read_image, resize
from labels import AU, EXPR, TASKS, VA
from metrics import class_f1
from plain import Plain, adamw, batches, crop_rng, loop_lines, not_said, seed_dropout
from stages import FILMS, checkpoint, is_drawn, log_lines, metrics, settings
from test_loops import PATCHES, SIZE, below
from tiny import same
from vit import VisionTransformer

CLASSES = {"ANGRER": 5, "DISGUST": 3, "FEAR": 4, "HAPPINESS": 6, "SADNESS": 2, "SURPRISE": 3}       # faces
BROKEN = ("drawn/ANGRER/002.png", "drawn/SURPRISE/000.png", "real/FEAR/001.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What each stage reads."""
    folder, rng = stages.write(tmp_path_factory.mktemp("loops")), np.random.default_rng(1)
    for name, faces in CLASSES.items():
        for number in range(faces):
            stages.write_image(folder / f"drawn/{name}/{number:03d}.png", rng)
            stages.write_image(folder / f"real/{name}/{number:03d}.png", rng)
    for path in BROKEN:
        (folder / path).write_bytes(b"no image")
    (folder / "abaw4").mkdir()
    for file, split in (("training", "Train_Set"), ("validation", "Validation_Set")):
        rows = "".join(f"{video}/{number:05d}.jpg,{','.join(map(str, labels(rng)))}\n"
                       for video, number in every_second_frame(split))
        (folder / f"abaw4/{file}_set_annotations.txt").write_text(
            f"image,valence,arousal,expression,{','.join(AU.outputs)}\n{rows}")
    return folder


def labels(rng) -> list:
    """15 labels, some of them missing; now and then all."""
    values = [*rng.uniform(-1, 1, 2).round(2), rng.integers(8), *rng.integers(0, 2, 12)]
    missing = [VA.invalid] * 2 + [EXPR.invalid] + [AU.invalid] * 12
    gone = rng.random(15) < rng.choice([0.2, 0.5, 1])
    return [code if no else value for value, code, no in zip(values, missing, gone)]


def every_second_frame(split: str) -> list:
    """(video, number) of the frames in a split's annotations."""
    return [(name, number) for name, film in FILMS.items() if film.split == split
            for number in (film.images or [])[::2]]


def start_of(view, folder):
    """Fill a ViT from the ready-made MAE."""
    weights = checkpoint(folder / "runs/tiny/pretrain", "last.pt")["model"]
    view.load_state_dict({name: weights[name] for name in view.state_dict()})


def whole(path) -> torch.Tensor:
    return normalise(torch.tensor(resize(read_image(path), SIZE))[None])        # -> (1, 3, 16, 16)


# ---- Masked CoTEX

def class_faces(folder) -> list:
    """(path, class, readable)"""
    return [(folder / name / f"{number:03d}.png", k, f"{folder.name}/{name}/{number:03d}.png" not in BROKEN)
            for k, (name, faces) in enumerate(CLASSES.items()) for number in range(faces)]


def f1_of(model, faces) -> np.ndarray:
    model.eval()
    shown = [(path, label) for path, label, readable in faces if readable]
    return class_f1([int(sum(view(whole(path)) for view in model.views).argmax()) for path, _ in shown],
                    [label for _, label in shown], classes=6)


def plain_cotex(folder, config) -> Plain:
    c, seed, faces = config.cotex, config.run.seed, class_faces(folder / "drawn")
    torch.manual_seed(seed)
    model = CoTEX(6, c.views, c.mask_ratio, **asdict(config.vit), drop_path=c.drop_path)
    for view in model.views:
        start_of(view.vit, folder)
    factors = {name: c.layer_decay ** below(name.split(".", 2)[2]) for name, _ in model.named_parameters()}
    plain = Plain(model, adamw(model, c, factors), c, math.ceil(len(faces) / c.batch), c.epochs, "images")
    for epoch in range(c.epochs):
        model.train()
        unreadable = 0
        for step, batch in enumerate(batches(len(faces), c.batch, seed, epoch)):
            images, classes, noise, loss = [], [], [], 0
            for i in batch:
                path, label, readable = faces[i]
                unreadable += not readable
                if readable:
                    rng = crop_rng(seed, epoch, i)
                    images.append(random_crop(read_image(path), SIZE, rng, c.smallest_crop))
                    noise.append(rng.random((c.views, PATCHES), dtype=np.float32))
                    classes.append(label)
            images, classes = torch.tensor(np.stack(images)), torch.tensor(classes)
            seed_dropout(seed, epoch, step)
            for x, y, u in zip(images.tensor_split(3), classes.tensor_split(3),
                               torch.tensor(np.stack(noise)).tensor_split(3)):
                part = cotex_loss(model(normalise(x), u), y, y >= 0, c.js_weight, len(images))
                part.backward()
                loss = loss + part.detach()
            plain.step(len(batch), loss)
        f1 = f1_of(model, class_faces(folder / "real")).mean()
        best = plain.keep_best(f1)
        plain.lines.append(f"  epoch {epoch + 1}/{c.epochs}  loss {plain.mean_loss():.4f}  "
                           f"macro F1 on real faces {f1:.3f}{best}")
        plain.end_epoch(unreadable, f1, 1)
    return plain


def test_masked_cotex_is_the_plain_loop(made):
    config, out = settings(made), made / "runs/tiny/cotex"
    said, plain = stages.start(made, "train_cotex.py"), plain_cotex(made, config)
    best = checkpoint(out, "best.pt")
    assert same(checkpoint(out, "last.pt")["model"], plain.model.state_dict())
    assert same(best["model"], plain.best_weights) and best["epoch"] == plain.best_epoch
    assert 0 < plain.clipped < plain.done, "take another cotex.clip"
    columns = "epoch,lr,loss,gradient_norm,unreadable,val_f1,val_unreadable,seconds"
    assert log_lines(out) == [columns, *plain.rows] and loop_lines(said) == plain.lines
    plain.model.load_state_dict(plain.best_weights)
    f1, found = f1_of(plain.model, class_faces(made / "real")), metrics(out)
    assert (found["val_f1"], found["val_macro_f1"]) == (f1.tolist(), f1.mean())
    assert (found["val_faces"], found["val_unreadable"]) == (22, 1) and np.sum(found["confusion"]) == 22
    numbers = sum(p.numel() for p in plain.model.parameters())
    assert not not_said(said, "  training: 23 drawn faces", "  validation: 23 real faces",
                        f"3 views of 2 of 4 patches, {numbers:,} parameters, 5 epochs; effective batch 10 = "
                        "4 x 3 accumulation x 1 processes, on cpu", "written to runs/tiny/cotex")
    assert stages.files(out) == {"config.yaml", "made_of.json", "last.pt", "best.pt", "log.csv",
                                 "metrics.json", "curves.png"} and is_drawn(out / "curves.png")


# ---- EMMA

def frames_of(folder, split: str, file: str) -> list:
    """(path, labels, video, readable) of the frames that have a label."""
    lines = (folder / f"abaw4/{file}_set_annotations.txt").read_text().splitlines()[1:]
    rows = []
    for line, (video, number) in zip(lines, every_second_frame(split)):
        values = list(map(float, line.split(",")[1:]))
        if values != [VA.invalid] * 2 + [EXPR.invalid] + [AU.invalid] * 12:
            rows.append((folder / f"frames/{video}/{number:05d}.jpg", values, video,
                         number not in FILMS[video].broken))
    return rows


def sums_of(model, rows) -> np.ndarray:
    """(124,)"""
    model.eval()
    shown = [(path, values) for path, values, _, readable in rows if readable]
    with torch.no_grad():
        outputs = np.concatenate([model(whole(path)).numpy() for path, _ in shown])
    return count(outputs, np.array([values for _, values in shown], np.float32))


def plain_emma(folder, config) -> Plain:
    e, seed = config.emma, config.run.seed
    rows, val = frames_of(folder, "Train_Set", "training"), frames_of(folder, "Validation_Set", "validation")
    aus = np.array([values[3:] for _, values, _, _ in rows])
    positives = torch.tensor((aus == 0).sum(axis=0) / (aus == 1).sum(axis=0), dtype=torch.float32)
    torch.manual_seed(seed)
    model = EMMA(VisionTransformer(**asdict(config.vit), drop_path=e.drop_path), None)
    start_of(model.vit, folder)
    factors = {name: e.layer_decay ** below(name) for name, _ in model.named_parameters()}
    optimizer = adamw(model, e, factors)
    for group in optimizer.param_groups[-4:]:                # the VA head's two matrices and two biases
        group.update({"fixed": e.va_lr, "weight_decay": 0})
    plain = Plain(model, optimizer, e, math.ceil(len(rows) / e.batch), e.epochs, "images")
    for epoch in range(e.epochs):
        model.train()
        unreadable = 0
        for step, batch in enumerate(batches(len(rows), e.batch, seed, epoch)):
            images, labelled = [], []
            for i in batch:
                path, values, _, readable = rows[i]
                unreadable += not readable
                if readable:
                    rng = crop_rng(seed, epoch, i)
                    images.append(random_crop(read_image(path), SIZE, rng, e.smallest_crop))
                    labelled.append(values)
            seed_dropout(seed, epoch, step)
            outputs = model(normalise(torch.tensor(np.stack(images))))
            va, expr, au = emma_losses(outputs, torch.tensor(labelled), positives)
            loss = va * 1.0 + expr * 0.5 + au * 0.25
            loss.backward()
            plain.step(len(batch), loss)
        parts = score(sums_of(model, val))
        best = plain.keep_best(sum(parts.tolist()))
        said = ", ".join(f"{name} {part:.3f}" for name, part in zip(TASKS, parts))
        plain.lines.append(f"  epoch {epoch + 1}/{e.epochs}  loss {plain.mean_loss():.4f}  {said}{best}")
        plain.end_epoch(unreadable, sum(parts.tolist()), *parts.tolist(),
                        sum(not readable for *_, readable in val))
    return plain


def test_emma_is_the_plain_loop(made):
    config, out = settings(made), made / "runs/tiny/emma"
    said, plain = stages.start(made, "train_emma.py"), plain_emma(made, config)
    best, val = checkpoint(out, "best.pt"), frames_of(made, "Validation_Set", "validation")
    assert same(checkpoint(out, "last.pt")["model"], plain.model.state_dict())
    assert same(best["model"], plain.best_weights) and best["epoch"] == plain.best_epoch
    assert 0 < plain.clipped < plain.done, "take another emma.clip"
    columns = "epoch,lr,loss,gradient_norm,unreadable,score,va,expr,au,val_unreadable,seconds"
    header, *rows = log_lines(out)
    assert header == columns and loop_lines(said) == plain.lines
    for row, expected in zip(rows, plain.rows, strict=True):        # CCC of a batch and of images one by one
        assert list(map(float, row.split(","))) == pytest.approx(list(map(float, expected.split(","))), 1e-5)
    plain.model.load_state_dict(plain.best_weights)
    sums, found = sums_of(plain.model, val), metrics(out)
    assert found["score"] == pytest.approx(score(sums).sum(), rel=1e-6)
    assert [found[name] for name in TASKS] == pytest.approx(score(sums).tolist(), rel=1e-6)
    stored = stages.json.loads((out / "video_sums.json").read_text())
    assert np.sum(stored["sums"], axis=0) == pytest.approx(sums, rel=1e-6)
    of_film = by_task(np.array(stored["sums"][stored["videos"].index("6")]))
    labelled = np.array([values for _, values, video, readable in val if video == "6" and readable])
    assert of_film["va"][0, 0] == (labelled[:, 0] != -5).sum()
    assert of_film["expr"].sum() == (labelled[:, 2] != -1).sum()
    assert of_film["au"][0].sum() == (labelled[:, 3] != -1).sum()
    assert (out / "scores.txt").read_text() in said
    assert stages.files(out) == {"config.yaml", "made_of.json", "last.pt", "best.pt", "log.csv", "scores.txt",
                                 "video_sums.json", "metrics.json", "curves.png"}
