"""Every training beside a plain loop that is written out: the same batches, crops, schedule, loss and steps,
so the same weights bit for bit, the same best epoch, the same log.csv. Extraction frame by frame. And what
two processes make is what one makes.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional as F

import losses
import tiny
from data import SegmentData, Video
from engine.config import load
from files import label_file
from images import normalise, random_crop, read_image, resize
from labels import EXPR, TASKS, VA, read_labels
from mae import MaskedAutoencoder
from metrics import binary_f1, ccc, class_f1
from processes import ALONE
from scoring import ExprClassifier, predict
from second_paper.cnn import DAN, DANWithCentres, ResNet18, affinity_loss, partition_loss
from second_paper.cotex import CoTEX, cotex_loss
from second_paper.emma import EMMA, count, emma_losses, scores
from temporal import SegmentModel
from tiny import STAGES, TINY, apart, copied, done, log, metrics, same, weights
from vit import VisionTransformer

SIZE, PATCHES = (16, 16), 4
BROKEN = {"faces/03.png", "faces/11.png", "frames/a/00002.png", "frames/b/00005.png", "frames/c/00002.png",
          "drawn/ANGRER/02.png", "real/FEAR/01.png", "affectnet/Manually_Annotated_Images/t/03.png"}
VIDEOS = {"a": ("Train_Set", 13), "b": ("Train_Set", 24), "c": ("Validation_Set", 9),
          "d": ("Validation_Set", 17)}
CLASSES = ("ANGRER", "DISGUST", "FEAR", "HAPPINESS", "SADNESS", "SURPRISE")
AFFECTNET = {"t": [0, 1, 1, 2, 0, 0, 4, 2, 0, 1, 6, 0, 0, 7, -1], "v": [0, 1, 2, 4, 1, 7]}     # ABAW classes
THEIR_CODE = {0: 0, 1: 6, 2: 5, 3: 4, 4: 1, 5: 2, 6: 3, 7: 7, -1: 8}                     # AffectNet's of them
VIT = dict(image_size=16, patch=8, dim=8, depth=2, heads=2)
SETTINGS = {
    "data": {"frames": ["frames"], "labels": "labels", "folders": ["faces"], "s_aff_wild2": "abaw4",
             "drawn_faces": "drawn", "real_faces": "real"},
    "vit": VIT, "run": {"workers": 0, "device": "cpu", "seed": 3, "largest_piece": 4},
    "pretrain": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5, "epochs": 4,
                 "batch": 10, "lr": 3e-3, "warmup_epochs": 1.5, "clip": 0.27},
    "finetune": {"token": "cls", "hidden": 8, "dropout": 0.3, "epochs": 5, "every": 3, "batch": 6, "lr": 3e-3,
                 "warmup_epochs": 0.5, "layer_decay": 0.6, "drop_path": 0.4, "clip": 2.0},
    "features": {"batch": 5}, "segments": {"window": 8, "stride": 5},
    "temporal": {"channels": [8], "kernels": [3], "dilations": [2], "width": 8, "layers": 1, "heads": 2,
                 "hidden": 8, "head": 8, "dropout": 0.3},
    "task": {"epochs": 6, "batch": 3, "lr": 5e-3, "warmup_epochs": 0.7},
    "stills": {"width": 2, "epochs": 4, "batch": 5, "lr": 3e-3, "weight_decay": 0.1, "warmup_epochs": 0.5},
    "emma": {"start": "runs/my/pretrain/last.pt", "cnn": "none", "weights": [1, 0.5, 0.25], "epochs": 4,
             "batch": 8, "lr": 3e-3, "va_lr": 2e-3, "warmup_epochs": 0.5, "layer_decay": 0.6,
             "drop_path": 0.4, "clip": 6.0},
    "cotex": {"views": 3, "mask_ratio": 0.5, "js_weight": 2.0, "epochs": 4, "batch": 10, "lr": 3e-3,
              "warmup_epochs": 0.5, "layer_decay": 0.6, "drop_path": 0.4, "clip": 1.0},
}


# ---- What there is to read

def labels_of(task, frames, rng):
    """Rows of a label file, a fifth of them invalid."""
    rows = []
    for t in range(frames):
        values = {"va": rng.uniform(-1, 1, 2).round(2), "expr": [t // 4 % 3], "au": rng.integers(0, 2, 12)}
        row = values[task.name]
        rows.append(",".join([str(task.invalid)] * len(row) if rng.random() < 0.2 else map(str, row)))
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, lists, label files; and the MAE that later stages start from."""
    folder, rng = tmp_path_factory.mktemp("stages"), np.random.default_rng(0)

    def write(name):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (18, 20, 3), dtype=np.uint8)).save(path)
        if name in BROKEN:
            path.write_bytes(b"no image")
    for n in range(23):
        write(f"faces/{n:02d}.png")
    for k, name in enumerate(CLASSES):
        for n in range(3 + k % 2):
            write(f"drawn/{name}/{n:02d}.png")
            write(f"real/{name}/{n:02d}.png")
    for part, classes in AFFECTNET.items():
        rows = [f"{part}/{n:02d}.png,0,0,9,9,,{THEIR_CODE[k]},0,0\n" for n, k in enumerate(classes)]
        for n in range(len(classes)):
            write(f"affectnet/Manually_Annotated_Images/{part}/{n:02d}.png")
        (folder / f"affectnet/{'training' if part == 't' else 'validation'}.csv").write_text("".join(rows))
    lists = {split: ["image,valence,arousal,expression,aus"] for split in ("Train_Set", "Validation_Set")}
    for video, (split, frames) in VIDEOS.items():
        rows = {task.name: labels_of(task, frames, rng) for task in TASKS.values()}
        for number in range(1, frames + 3):                                     # two images past the labels
            if number != 4:
                write(f"frames/{video}/{number:05d}.png")
            if number % 2 and number <= frames:
                of_all = ",".join(rows[name][number - 1] for name in TASKS)
                lists[split].append(f"{video}/{number:05d}.png,{of_all}")
        for task in TASKS.values():
            label_file(folder / "labels", task, split, video, rows[task.name])
    (folder / "abaw4").mkdir()
    for split, file in (("Train_Set", "training"), ("Validation_Set", "validation")):
        (folder / f"abaw4/{file}_set_annotations.txt").write_text("\n".join(lists[split]))
    (folder / "my.yaml").write_text(yaml.safe_dump(SETTINGS))
    done(folder, "train_pretrain", "--config", "my.yaml")
    return folder


def settings(folder, *overrides):
    return load(folder / "my.yaml", overrides)


def readable(folder, rows):
    """Of rows (file, label ...) those whose image can be read, with it."""
    return [(read_image(folder / row[0]), *row[1:]) for row in rows if row[0] not in BROKEN]


def whole(image) -> torch.Tensor:
    return normalise(torch.tensor(resize(image, SIZE))[None])                   # -> (1, 3, 16, 16)


def expr_rows(folder, split):
    rows = []
    for video, (of, frames) in VIDEOS.items():
        labels = read_labels(folder / "labels" / EXPR.folders[0] / of / f"{video}.txt", EXPR)
        rows += [(f"frames/{video}/{n:05d}.png", int(labels[n - 1])) for n in range(1, frames + 1)
                 if of == split and n != 4 and labels[n - 1] >= 0]
    return rows


def emma_rows(folder, file):
    rows = []
    for line in (folder / f"abaw4/{file}_set_annotations.txt").read_text().splitlines()[1:]:
        name, *values = line.split(",")
        if set(map(float, values)) != {-5, -1} and not name.endswith("00004.png"):
            rows.append((f"frames/{name}", np.array(values, np.float32)))
    return rows


def class_rows(name):
    return [(f"{name}/{folder}/{n:02d}.png", k) for k, folder in enumerate(CLASSES) for n in range(3 + k % 2)]


def start_of(vit, folder):
    found = weights(folder / "runs/my/pretrain")
    vit.load_state_dict({name: found[name] for name in vit.state_dict()})


# ---- The plain loop

def below(name: str) -> int:
    """How far under the head a parameter lies, in a ViT of two blocks."""
    for start, layers in (("blocks.1.", 1), ("blocks.0.", 2), ("cls_token", 3), ("pos_embed", 3),
                          ("patch_embed.", 3)):
        if f".{start}" in f".{name}":
            return layers
    return 0


def plain_loop(stage, section, epochs, model, rows_of, batch_of, losses_of, score_of, seed=3):
    """Train as a stage should. rows_of(epoch): what the samples are; batch_of(rows, epoch, samples): the
    tensors of the readable ones; losses_of(*batch): the shares of the batch's loss, one after the other;
    score_of(model). -> the log, the best epoch with its weights, how many steps were clipped"""
    fixed = {id(p) for p in model.va_head.parameters()} if stage == "emma" else set()
    groups = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            without_decay = id(p) in fixed or p.squeeze().ndim < 2 and stage != "task"
            groups.append({"params": [p], "times": getattr(section, "layer_decay", 1) ** below(name),
                           "fixed": id(p) in fixed,
                           "weight_decay": 0 if without_decay else section.weight_decay})
    optimizer = torch.optim.AdamW(groups, betas=getattr(section, "betas", (0.9, 0.999)), fused=True)
    samples, done, clipped, best = len(rows_of(0)), 0, 0, (-math.inf, 0, None)
    steps = math.ceil(samples / section.batch)
    total, warmup, found = steps * epochs, section.warmup_epochs * steps, []
    for epoch in range(epochs):
        model.train()
        rows, order = rows_of(epoch), np.random.default_rng([2, seed, epoch]).permutation(samples)
        epoch_losses, norms, unreadable = [], [], 0
        for step in range(steps):
            chosen = order[step * section.batch:(step + 1) * section.batch].tolist()
            batch, missing = batch_of(rows, epoch, chosen)
            unreadable += missing
            state = np.random.SeedSequence([seed, epoch, step, 0]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(state) // 2)
            loss = 0
            for part in losses_of(*batch):
                part.backward()
                loss = loss + part.detach()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            if 0 < getattr(section, "clip", 0) < norm:
                clipped += 1
                for gradient in gradients:
                    gradient *= section.clip / (norm + 1e-6)
            done += 1
            t, w = done / (total + 1), warmup / (total + 1)
            rate = section.lr * (t / w if t < w else (1 + math.cos(math.pi * (t - w) / (1 - w))) / 2)
            for group in optimizer.param_groups:
                group["lr"] = section.va_lr if group["fixed"] else rate * group["times"]
            optimizer.step()
            optimizer.zero_grad()
            epoch_losses.append(loss)
            norms.append(norm)
        reached = score_of(model)
        if reached > best[0]:
            best = reached, epoch + 1, {name: value.clone() for name, value in model.state_dict().items()}
        found.append({"epoch": epoch + 1, "lr": rate, "loss": sum(epoch_losses).item() / steps,
                      "gradient_norm": sum(norms).item() / steps, "unreadable": unreadable, "score": reached})
    return SimpleNamespace(log=found, best=best, clipped=clipped, steps=total)


def cropped(folder, section, noise=None, with_label=True, seed=3):
    """-> batch_of: random crops, classes or labels, noise."""
    def batch_of(rows, epoch, chosen):
        columns, missing = [], 0
        for i in chosen:
            if rows[i][0] in BROKEN:
                missing += 1
                continue
            rng = np.random.default_rng([3, seed, epoch, i])
            item = [random_crop(read_image(folder / rows[i][0]), SIZE, rng, section.smallest_crop)]
            item += [rows[i][1]] if with_label else []
            item += [rng.random(noise, dtype=np.float32)] if noise else []
            columns.append(item)
        return [torch.tensor(np.stack(column)) for column in zip(*columns)], missing
    return batch_of


def in_threes(*batch):
    """Of 10 samples at most 4 at a time are three pieces, of 6 two."""
    return zip(*(part.tensor_split(3) for part in batch))


def f1_of(scores_of, rows, classes=8):
    """F1 of each class from whole images one by one."""
    predicted = [int(scores_of(whole(image)).argmax()) for image, _ in rows]
    return class_f1(predicted, [k for _, k in rows], classes)


# ---- The trainings. Each: a module, its overrides, and what gives the plain loop.

def pretrain(folder, config):
    p, rows = config.pretrain, [(f"faces/{n:02d}.png",) for n in range(23)]
    model = MaskedAutoencoder(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2, mask_ratio=0.5)

    def losses_of(images, noise):
        for x, u in in_threes(images, noise):
            yield model(normalise(x), u)[0] * len(x) / len(images)
    return plain_loop("pretrain", p, p.epochs, model, lambda epoch: rows,
                      cropped(folder, p, (PATCHES,), with_label=False), losses_of, lambda model: 0), model


def finetune(folder, config):
    f, rows = config.finetune, expr_rows(folder, "Train_Set")
    rows = rows if f.held_out == 0 else [row for row in rows if row[0].startswith("frames/a/")]
    val, samples = expr_rows(folder, "Validation_Set"), -(-len(rows) // f.every)
    model = ExprClassifier(config)                                              # draws the head's weights
    model.vit, model.head[2] = VisionTransformer(**VIT, drop_path=f.drop_path), nn.Dropout(f.dropout)
    start_of(model.vit, folder)

    def losses_of(images, classes):
        for x, y in zip(images.tensor_split(2), classes.tensor_split(2)):
            logits = model.head(model.vit(normalise(x))[:, 0])                  # of the cls token
            yield F.cross_entropy(logits, y, reduction="sum") / len(images)

    def rows_of(epoch):
        return [rows[(i * f.every + epoch % f.every) % len(rows)] for i in range(samples)]

    return plain_loop(
        "finetune", f, f.epochs, model, rows_of, cropped(folder, f), losses_of,
        lambda model: f1_of(model.eval(), readable(folder, val[::f.every])).mean()), model


def stills(folder, config):
    s, images = config.stills, "affectnet/Manually_Annotated_Images"
    model = DANWithCentres(DAN(width=2)) if s.network == "dan" else ResNet18(8, 2)
    val = readable(folder, [(f"{images}/v/{n:02d}.png", k) for n, k in enumerate(AFFECTNET["v"])])

    def balanced(epoch):
        rng, present = np.random.default_rng([2, 3, epoch]), sorted(set(AFFECTNET["t"]) - {-1})
        faces = {k: rng.permutation([n for n, of in enumerate(AFFECTNET["t"]) if of == k]).tolist()
                 for k in present}
        chosen = [(present[i % len(present)], i // len(present)) for i in range(14)]
        return [(f"{images}/t/{faces[k][place % len(faces[k])]:02d}.png", k) for k, place in chosen]

    def losses_of(x, y):
        if s.network == "dan":
            outputs, features, heads, _ = model(normalise(x))
            yield (F.cross_entropy(outputs, y) + affinity_loss(features, y, y >= 0, model.centres)
                   + partition_loss(heads))
        else:
            yield F.cross_entropy(model(normalise(x)), y)
    return plain_loop("stills", s, s.epochs, model, balanced, cropped(folder, s), losses_of,
                      lambda model: f1_of(getattr(model.eval(), "dan", model), val).mean()), model


def cotex(folder, config):
    c, real = config.cotex, readable(folder, class_rows("real"))
    model = CoTEX(6, c.views, c.mask_ratio, **VIT, drop_path=c.drop_path)
    for view in model.views:
        start_of(view.vit, folder)

    def losses_of(images, classes, noise):
        for x, y, u in in_threes(images, classes, noise):
            yield cotex_loss(model(normalise(x), u), y, y >= 0, c.js_weight, len(images))

    def score_of(model):
        return f1_of(lambda x: sum(view(x) for view in model.eval().views), real, 6).mean()
    return plain_loop("cotex", c, c.epochs, model, lambda epoch: class_rows("drawn"),
                      cropped(folder, c, (c.views, PATCHES)), losses_of, score_of), model


def emma(folder, config):
    e, rows = config.emma, emma_rows(folder, "training")
    val = readable(folder, emma_rows(folder, "validation"))
    aus = np.stack([labels[3:] for _, labels in rows])
    positives = torch.tensor((aus == 0).sum(axis=0) / (aus == 1).sum(axis=0), dtype=torch.float32)
    model = EMMA(VisionTransformer(**VIT, drop_path=e.drop_path), None)
    start_of(model.vit, folder)

    def losses_of(images, labels):
        yield emma_losses(model(normalise(images)), labels, positives) @ torch.tensor(e.weights)

    def p_mtl(model):
        model.eval()
        with torch.no_grad():
            outputs = np.concatenate([model(whole(image)).numpy() for image, _ in val])
        return sum(scores(count(outputs, np.stack([labels for _, labels in val])), TASKS.values()).values())
    return plain_loop("emma", e, e.epochs, model, lambda epoch: rows, cropped(folder, e), losses_of,
                      p_mtl), model


def task_loop(task):
    def loop(folder, config):
        t, sets = config.task, {"Train_Set": [], "Validation_Set": []}
        for video, (split, _) in VIDEOS.items():
            labels = read_labels(folder / "labels" / task.folders[0] / split / f"{video}.txt", task)
            sets[split].append(Video(video, folder / f"given/{video}.npy", labels))
        cut, val = SegmentData(sets["Train_Set"], task, 8, 5), sets["Validation_Set"]
        model = SegmentModel(8, len(task.outputs), **vars(config.temporal))

        def losses_of(x, target, valid, real):
            yield getattr(losses, task.loss)(model(x.float(), real), target, valid)

        def score_of(model):
            model.eval()
            features = [np.load(video.features)[:len(video.labels)] for video in val]
            outputs = np.concatenate([predict(model, config, ALONE, of_video) for of_video in features])
            labels = np.concatenate([video.labels for video in val])
            if task is VA:
                known = labels != -5
                return np.mean([ccc(outputs[known[:, d], d], labels[known[:, d], d]) for d in (0, 1)])
            return (class_f1(outputs[labels >= 0].argmax(1), labels[labels >= 0]) if task is EXPR
                    else binary_f1(outputs > 0, labels)).mean()
        return plain_loop("task", t, t.epochs, model, lambda epoch: cut,
                          lambda rows, epoch, chosen: (cut.collate([cut[i] for i in chosen]), 0), losses_of,
                          score_of), model
    return loop


TRAININGS = {                         # folder of the result: command line, overrides, plain loop, how exactly
    "pretrain": (["train_pretrain"], [], pretrain, 0),
    "finetune": (["train_finetune"], [], finetune, 0),
    "finetune+finetune.held_out=0.5": (["train_finetune"], ["finetune.held_out=0.5"], finetune, 0),
    "stills+stills.clip=30+stills.network=resnet18": (
        ["second_paper.train_cnn"], ["stills.network=resnet18", "stills.clip=30"], stills, 0),
    "stills": (["second_paper.train_cnn"], [], stills, 1e-4),                  # the terms are added otherwise
    "emma": (["second_paper.train_emma"], [], emma, 0),
    "cotex": (["second_paper.train_cotex"], [], cotex, 0),
    **{f"task_{name}": (["train_task", "--task", name], [], task_loop(task), 0)
       for name, task in TASKS.items()},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_the_plain_loop(made, name):
    words, overrides, plain, exact = TRAININGS[name]
    if "task" in name:
        overrides = ["task.features=given"]
        (made / "given").mkdir(exist_ok=True)
        for video, (_, frames) in VIDEOS.items():
            features = np.random.default_rng(frames).normal(size=(frames + 2, 8)).astype(np.float16)
            np.save(made / f"given/{video}.npy", features)
        name += "+task.features=given"
    elif "stills" in name:
        overrides = [*overrides, "data.affectnet_2017=affectnet"]
    elif name == "pretrain":
        overrides = ["run.out=again"]                                           # the fixture has made it too
    out = made / ("again" if name == "pretrain" else "runs") / "my" / name
    done(made, *words, "--config", "my.yaml", *(word for setting in overrides for word in ("--set", setting)))
    config = settings(made, *overrides)
    torch.manual_seed(config.run.seed)
    found, model = plain(made, config)
    last, rows = weights(out), log(out)
    if exact:
        assert apart(last, model.state_dict()) < exact
    else:
        assert same(last, model.state_dict())
    for row, expected in zip(rows, found.log, strict=True):
        reached = row.get("score", row.get("val_f1", 0))
        assert reached == pytest.approx(expected.pop("score"), rel=1e-5, abs=1e-6)
        kept = {key: row.get(key, 0) for key in expected}
        assert kept == pytest.approx(expected, rel=1e-3 if exact else 6e-6)
    if name != "pretrain":
        best = torch.load(out / "best.pt", weights_only=True)
        assert best["epoch"] == found.best[1] and best["score"] == pytest.approx(found.best[0], rel=1e-5)
        assert exact or same(best["model"], found.best[2])
    if "task" not in name and name != "stills":
        assert 0 < found.clipped < found.steps, "take another clip"
    assert (out / "metrics.json").exists() and (out / "curves.png").exists()
    assert (out / "reconstruction.png").exists() == (name == "pretrain")


def test_features_are_those_of_each_face_or_of_the_last_one_before_it(made):
    done(made, "train_finetune", "--config", "my.yaml")
    said = done(made, "extract_features", "--config", "my.yaml")
    model = ExprClassifier(settings(made))
    model.load_state_dict(weights(made / "runs/my/finetune", "best.pt"))
    model.eval()
    for video, (_, frames) in VIDEOS.items():
        found = np.load(made / f"runs/my/features/{video}.npy")
        noface, expected = np.load(made / f"runs/my/features/{video}.noface.npy"), []
        for number in range(1, frames + 3):
            name = f"frames/{video}/{number:05d}.png"
            missing = number == 4 or name in BROKEN
            assert noface[number - 1] == missing
            if not missing:
                with torch.no_grad():
                    feature = model.vit(whole(read_image(made / name)))[0, 0].numpy()
            expected.append(feature)
        assert len(found) == frames + 2 and found == pytest.approx(np.array(expected), abs=2e-3)
    assert "71 frames, 7 of them without a face image" in said
    said = done(made, "extract_features", "--config", "my.yaml")
    assert "is finished; nothing to do" in said


def test_two_processes_end_with_the_weights_of_one(finished, finished_by_two):
    for stage in ("pretrain", "finetune", "task_va", "task_expr", "task_au"):
        one, two = (folder / "runs/tiny" / stage for folder in (finished, finished_by_two))
        assert apart(weights(one), weights(two)) < 1e-5, stage
        assert [row.pop("epoch") for row in log(one)] == [row.pop("epoch") for row in log(two)]
        if stage != "pretrain":
            a, b = metrics(one), metrics(two)
            assert a.keys() == b.keys() and a.get("score", 0) == pytest.approx(b.get("score", 0), abs=2e-3)
    for path in sorted((finished / "runs/tiny/features").glob("*.npy")):
        other = np.load(finished_by_two / "runs/tiny/features" / path.name)
        assert np.load(path).astype(float) == pytest.approx(other.astype(float), abs=5e-3), path.name


def test_masked_cotex_ends_with_the_same_weights_in_two_processes(finished, tmp_path):
    for world in (1, 2):
        done(copied(finished, tmp_path / f"{world}"), *STAGES["cotex"], *TINY, world=world)
    assert apart(*(weights(tmp_path / f"{world}/runs/tiny/cotex") for world in (1, 2))) < 1e-5


def test_a_task_leaves_its_scores_predictions_and_pictures_and_tells_them_without_features(
        finished, tmp_path):
    for name, task in TASKS.items():
        out = finished / f"runs/tiny/task_{name}"
        found, lines = metrics(out), (out / "scores.txt").read_text().splitlines()
        sums = np.array(found["video_sums"])
        assert found["score"] == pytest.approx(task.metric.score(sums.sum(axis=0)).mean())
        assert lines[0] == f"runs/tiny/task_{name}/best.pt" and "synthetic data" in lines[1]
        with np.load(out / "predictions.npz") as outputs:
            assert sorted(outputs.files) == sorted(found["videos"])
            assert all(outputs[video].shape[1] == len(task.outputs) for video in outputs.files)
        assert Image.open(out / "timeline.png").width > 800
    assert found["comparable"] and found["validation_videos"] == len(found["videos"])
    folder = tiny.copied(finished, tmp_path, ["features"])
    said = done(folder, "train_task", "--task", "au", "--config", "tiny.yaml")
    assert "its features are gone" in said and "mean F1" in said


def test_pre_training_goes_on_with_another_mae_and_its_folder_and_record_tell_which(finished, tmp_path):
    folder, start = tiny.copied(finished, tmp_path), "runs/tiny/pretrain/last.pt"
    said = done(folder, "train_pretrain", *tiny.TINY, "--set", f"pretrain.start={start}", "--set",
                "pretrain.lr=1e-9", "--set", "pretrain.epochs=1")
    before = torch.load(folder / start, weights_only=True)["model"]
    path = next((folder / "runs/tiny").glob("pretrain+*pretrain.start=pretrain-last.pt*/last.pt"))
    after = torch.load(path, weights_only=True)
    assert f"from {start}; missing keys: none" in said and after["made_of"]["from"]["file"] == start
    assert all(torch.allclose(after["model"][name], weights, atol=1e-7) for name, weights in before.items())
