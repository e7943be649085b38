"""EMMA: the network written out, what gets a gradient and what never moves, the score, a training of a few
frames, and what a checkpoint gives back."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import metrics
import pipeline
from datasets.s_aff_wild2 import FILES, HEADER
from engine.checkpoints import checksum
from engine.config import Config, load
from engine.training import Progress
from images import VideoFrames, normalise, resize
from labels import AU, EXPR, TASKS
from losses import ccc_loss, expr_loss, weighted_au_loss
from processes import ALONE
from second_paper import emma, train_emma
from second_paper.cnn import DAN, ResNet18
from second_paper.emma import EMMA, by_task, count, emma_losses, outputs_of, scores
from tiny import log
from vit import VisionTransformer

SIZE, D = 32, 16
WEIGHT = torch.linspace(0.5, 9, 12, dtype=torch.double)


def tiny(cnn=True):
    """In double precision, its BatchNorm statistics and weights all random."""
    torch.manual_seed(0)
    vit = VisionTransformer(SIZE, patch=16, dim=D, depth=2, heads=2)
    model = EMMA(vit, DAN(width=2) if cnn else None, hidden=12, va_hidden=10).double()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name != "vit.pos_embed":
            noise = torch.randn(value.shape, dtype=torch.double)
            value.copy_(noise.abs() + 0.5 if "running_var" in name else value + 0.2 * noise)
    return model


def pictures(B=8):
    return torch.randn(B, 3, SIZE, SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def batch(B=8, missing=()):
    """Labels (B, 15), each kind missing in some rows; those of the tasks in `missing` in all."""
    generator = torch.Generator().manual_seed(2)
    va = torch.rand(B, 2, generator=generator, dtype=torch.double) * 2 - 1
    expr = torch.randint(8, (B, 1), generator=generator).double()
    au = (torch.rand(B, 12, generator=generator) < 0.4).double()
    va[[1, 2]], va[3, 0], expr[[2, 5]], au[[4, 2]], au[6, 3:9] = -5, -5, -1, -1, -1
    for name, labels, code in (("va", va, -5), ("expr", expr, -1), ("au", au, -1)):
        if name in missing:
            labels[:] = code
    return torch.cat([va, expr, au], dim=1)


# ---- The network and its losses

def test_the_network_has_the_parameters_of_the_authors():
    with torch.device("meta"):
        model = EMMA(VisionTransformer(), DAN())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes == {"vit": 85_798_656, "head": 403_988, "cnn": 19_724_248, "va_head": 7_938}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("cnn", [True, False], ids=["with the CNN", "without"])
def test_the_forward_pass_is_the_one_written_out(cnn, training):
    model, images = tiny(cnn), pictures(3)
    w = model.state_dict()
    s = F.linear(model.vit(images)[:, 0], w["head.0.weight"], w["head.0.bias"]).clamp(min=0)
    s = F.linear(s, w["head.2.weight"], w["head.2.bias"])
    seen = s
    if cnn:
        reference = DAN(width=2).double().eval()
        reference.load_state_dict({name.removeprefix("cnn."): v for name, v in w.items() if "cnn." in name})
        seen = torch.cat([reference(images), s], dim=1)
    v = F.linear(seen, w["va_head.0.weight"], w["va_head.0.bias"]).clamp(min=0)
    v = F.linear(v, w["va_head.2.weight"], w["va_head.2.bias"])
    outputs = model.train(training)(images)
    for task, part in zip(TASKS.values(), (v, s[:, :8], s[:, 8:])):
        assert torch.allclose(outputs_of(task, outputs), part, rtol=1e-10, atol=1e-12)


def test_valence_and_arousal_teach_the_vit_the_scores_never_the_va_head_and_nothing_ever_the_cnn():
    for missing, without in (("expr", "au"), ("cnn.", "vit.pos")), (("va",), ("cnn.", "vit.pos", "va_head.")):
        model = tiny()
        before = {name: value.clone() for name, value in model.cnn.state_dict().items()}
        assert not any(p.requires_grad for p in model.cnn.parameters())
        model.cnn.requires_grad_(True)
        nn.Sequential(model).train()
        assert model.head.training and not any(part.training for part in model.cnn.modules())
        emma_losses(model(pictures()), batch(missing=missing), WEIGHT).sum().backward()
        for name, p in model.named_parameters():
            reached = p.grad is not None and p.grad.norm() > 1e-8
            assert reached != name.startswith(without), name
        assert all(torch.equal(value, before[name]) for name, value in model.cnn.state_dict().items())
    assert not EMMA(model.vit, DAN(width=2).train()).cnn.bn.training


def test_the_losses_are_those_of_three_tasks_without_missing_labels():
    torch.manual_seed(3)
    x, y = torch.randn(8, 22, dtype=torch.double), batch()
    expected = [ccc_loss(x[:, :2], y[:, :2], y[:, :2] != -5), expr_loss(x[:, 2:10], y[:, 2], y[:, 2] != -1),
                weighted_au_loss(x[:, 10:], y[:, 3:], y[:, 3:] != -1, WEIGHT)]
    assert emma_losses(x, y, WEIGHT).tolist() == [loss.item() for loss in expected]


# ---- The score

def test_the_three_parts_are_the_metrics_called_alone_of_all_batches_together_and_a_perfect_answer_has_3():
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.uniform(-1, 1, (400, 2)), rng.integers(8, size=(400, 1)),
                             rng.random((400, 12)) < 0.3], axis=1)
    classes = np.eye(8)[labels[:, 2].astype(int)]
    perfect = np.concatenate([labels[:, :2], classes, labels[:, 3:] - 0.5], axis=1)
    outputs = perfect + rng.normal(size=(400, 22))
    labels[:, :2][rng.random((400, 2)) < 0.1] = -5
    labels[:, 2:][rng.random((400, 13)) < 0.1] = -1
    known = labels[:, :3] != [-5, -5, -1]
    va = [metrics.ccc(outputs[known[:, d], d], labels[known[:, d], d]) for d in (0, 1)]
    expr = metrics.class_f1(outputs[known[:, 2], 2:10].argmax(1), labels[known[:, 2], 2])
    aus = metrics.binary_f1(outputs[:, 10:] > 0, labels[:, 3:])
    sums = sum(count(outputs[i:j], labels[i:j]) for i, j in ((399, 400), (0, 100), (100, 100), (100, 399)))
    assert sums.shape == (124,) == (emma.SUMS,) and by_task(np.stack([sums] * 3))["au"].shape == (3, 12, 2, 2)
    assert scores(sums, TASKS.values()) == pytest.approx(
        {"va": np.mean(va), "expr": expr.mean(), "au": aus.mean()}, rel=1e-12)
    assert sum(scores(count(perfect, labels), TASKS.values()).values()) == pytest.approx(3)


# ---- A training, and what its checkpoint gives back

SETTINGS = """
data: {frames: [frames], s_aff_wild2: lists}
vit: {image_size: 16, patch: 8, dim: 8, depth: 1, heads: 2}
features: {batch: 4}
emma: {start: none, cnn: cnn.pt, epochs: 2, batch: 5, lr: 0.01, drop_path: 0}
run: {workers: 0, device: cpu}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished EMMA; the second frame of c is no image, the third of d is missing. -> the folder"""
    rng, labels, rows = np.random.default_rng(0), batch(30).tolist(), ([], [])
    folder = tmp_path_factory.mktemp("emma")
    with contextlib.chdir(folder):
        for video, part, frames in (("a", 0, 9), ("b", 0, 8), ("c", 1, 7), ("d", 1, 6)):
            Path("frames", video).mkdir(parents=True)
            for name in [f"{video}/{k + 1:05d}.png" for k in range(frames)]:
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(f"frames/{name}")
                rows[part].append(",".join([name, *map(str, labels.pop())]))
        no_va = [re.sub(",.*?,.*?,", ",-5,-5,", row, count=1) for row in rows[1]]
        for place, first, second in (("lists", *rows), ("twice", rows[0], rows[0]), ("part", rows[0], no_va)):
            Path(place).mkdir()
            Path(place, FILES[0]).write_text("\n".join([HEADER, *first]))
            Path(place, FILES[1]).write_text("\n".join([HEADER, *second]))
        Path("frames/c/00002.png").write_bytes(b"no image")
        Path("frames/d/00003.png").unlink()
        for path, model in (("cnn.pt", ResNet18(8, 2)), ("dan.pt", DAN(8, 3, 4))):
            model(torch.randn(8, 3, 16, 16))                         # moves the statistics of BatchNorm
            torch.save({"model": model.state_dict(), "made_of": {"stage": "stills", "settings": {}}}, path)
        Path("my.yaml").write_text(SETTINGS)
        train_emma.main(load("my.yaml"), ALONE)
    return folder


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.chdir(made)
    return Path("runs/my/emma")


def test_a_training_tells_the_score_of_all_validation_frames(run):
    m, text = json.loads((run / "metrics.json").read_text()), (run / "scores.txt").read_text()
    total = scores(np.sum(m["video_sums"], axis=0), TASKS.values())
    assert {name: m[name] for name in TASKS} == total and m["score"] == sum(total.values())
    assert f"P_MTL {m['score']:.3f}, chance {sum(m['chance'].values()):.3f}; 11 validation frames, 1" in text
    found = [row["score"] for row in log(run)]
    assert m["score"] == pytest.approx(max(found), rel=1e-5) and len(set(found)) == 2


@pytest.mark.parametrize("cnn", ["cnn.pt", "dan.pt", "none"])
def test_the_checkpoint_gives_the_network_back_that_was_scored_and_each_frame_its_outputs(run, cnn):
    config = load("my.yaml", [f"emma.cnn={cnn}", "emma.epochs=1", "emma.weights=[0, 0.5, 1]"])
    train_emma.main(config, ALONE)
    path, alone = pipeline.folder("emma", config) / "best.pt", Config()
    alone.run.workers = 0
    trained, m = emma.load(path, alone), json.loads((path.parent / "metrics.json").read_text())
    assert trained.tasks == [EXPR, AU] and not trained.model.training
    assert trained.changed["vit.dim"] == ("emma", 8, 768)
    assert trained.record["data"]["cnn"] == f"checksum {'none' if cnn == 'none' else checksum(cnn)}"
    assert (m["videos"], m["val_unreadable"], list(m["chance"])) == (["c", "d"], 1, ["expr", "au"])
    lines = [line.split(",") for line in Path("lists", FILES[1]).read_text().splitlines()[1:]]
    labels = {name: [float(field) for field in fields] for name, *fields in lines}
    for video, last, sums in zip("cd", ([1, 1, 3, 4, 5, 6, 7, 7, 7], [1, 2, 2, 4, 5, 6]), m["video_sums"]):
        frames, rows = VideoFrames(Path("frames", video)), {}
        for k, number in enumerate(frames.numbers):
            if (video, number) != ("c", 2):                                      # no image
                image = torch.tensor(resize(frames.read(k), (16, 16)))[None]
                rows[number] = trained.model(normalise(image))[0].detach().numpy()
        of_video = np.array([labels[f"{video}/{number:05d}.png"] for number in rows])
        assert np.allclose(sums, count(np.stack(list(rows.values())), of_video), atol=1e-4)
        outputs, noface = trained.predict(frames, len(last), Progress(len(last), "frames", ALONE))
        assert outputs.dtype == np.float32 and np.allclose(outputs, [rows[k] for k in last], atol=1e-5)
        assert noface.tolist() == [k + 1 not in rows for k in range(len(last))]     # the face before, if any


def test_a_finished_emma_outlives_its_cnns_file_and_refuses_another_cnn(run, capsys):
    config = load("my.yaml")
    for here, there, message in (("cnn.pt", "x.pt", "its CNN is gone"), ("x.pt", "cnn.pt", "nothing to do")):
        Path(here).rename(there)
        train_emma.main(config, ALONE)
        said = capsys.readouterr().out
        assert message in said and (run / "scores.txt").read_text() in said
    config.emma.cnn = "dan.pt"
    with pytest.raises(ValueError, match="was made from other data:\n  cnn: was checksum"):
        train_emma.main(config, ALONE)


@pytest.mark.parametrize("option, message", [
    ("data.s_aff_wild2=", "data.s_aff_wild2 is not given; it holds training_set_annotations.txt and valid"),
    ("data.s_aff_wild2=twice", "twice/t.* and twice/v.* show one scene, .* 2 of 2 .* on: a, b. Rem"),
    ("data.s_aff_wild2=part", "part/validation.*: no frame with an image has a label of va; set the weight")])
def test_what_cannot_be_trained_is_refused(run, option, message):
    with pytest.raises(ValueError, match=message):
        train_emma.main(load("my.yaml", [option]), ALONE)


@pytest.mark.parametrize("spoil, message", [
    (lambda saved: saved.pop("made_of"), "of stage unknown; expected EMMA, as train_emma.py writes it, like"),
    (lambda saved: saved.update(model=[1]), "holds no weights"),
    (lambda saved: None, "made with other settings:\n  vit.depth: was 1, now 3")])
def test_what_is_no_emma_or_does_not_fit_is_refused(run, tmp_path, spoil, message):
    saved = torch.load(run / "best.pt")
    spoil(saved)
    torch.save(saved, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=rf"best\.pt:? (.|\n)*{message}"):
        emma.load(tmp_path / "best.pt", load("my.yaml", ["vit.depth=3"] if "depth" in message else []))
