"""report.html of a made-up run, read as a browser reads it."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from engine.config import load
from files import label_file
from labels import TASKS, in_units, targets
from metrics import confusion, numbers
from tools import report

EVIL = "<script>alert(1)<script>&amp;\"'"                     # as the name of a video, so without a slash
VIDEOS = {"7": 20, EVIL: 33, "6": 45, "few labels": 30}       # frames; WINDOW / 2 labels
WINDOW, STRIDE = 12, 8


def read(path):
    """The tags, the texts and the cells of the tables of a page. Raises if an element is not closed."""
    page = ElementTree.fromstring(path.read_text(encoding="utf-8").replace("</img>", "</no end tag>"))
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in page.iter("tr")]
    return SimpleNamespace(tags=[*page.iter()], texts=[*page.itertext()], rows=rows)


def make(*videos):
    [out] = report.main(load("my.yaml"), SimpleNamespace(out="", videos=list(videos)))
    return read(out)


def write_stage(name: str, metrics: dict):
    """What a stage leaves behind, as far as the report reads it."""
    place = Path("runs/my") / name
    place.mkdir(parents=True)
    for file in ("scores.txt", "config.yaml", "made_of.json"):
        (place / file).write_text(f"{file} of {name}: <i> 'as it is'\n")
    (place / "metrics.json").write_text(json.dumps(metrics))
    for file in ("curves.png", "reconstruction.png")[name == "features":]:
        Image.new("RGB", (5, 4)).save(place / file)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, its frames and labels. -> {task: {video: (outputs, labels)}}, folder, page"""
    root, rng, videos = tmp_path_factory.mktemp("report"), np.random.default_rng(0), {}
    with contextlib.chdir(root):
        Path("my.yaml").write_text("data: {frames: [frames], labels: labels}\nrun: {out: runs}\n"
                                   f"segments: {{window: {WINDOW}, stride: {STRIDE}}}")
        for name, task in TASKS.items():
            K, videos[name] = len(task.outputs), {}
            for video, T in list(VIDEOS.items())[name == "au":]:           # au has one less
                labels = {"va": rng.uniform(-1, 1, (T, K)).round(2), "expr": rng.integers(0, K - 1, T),
                          "au": rng.integers(0, 2, (T, K))}[name]
                labels[6:10 if video != "few labels" else T] = task.invalid
                videos[name][video] = rng.normal(size=(T, K)).astype(np.float32), labels
                rows = [",".join(map(str, row)) for row in labels.reshape(T, -1).tolist()]
                label_file("labels", task, "Train_Set", f"T{video}", rows)
                label_file("labels", task, "Validation_Set", video, rows)
            sums = np.stack([task.metric.count(x, *targets(y, task)) for x, y in videos[name].values()])
            write_stage(f"task_{name}", {**numbers(task, sums), "video_sums": sums.tolist()})
            np.savez(f"runs/my/task_{name}/predictions.npz", **{v: x for v, (x, _) in videos[name].items()})
        for video in VIDEOS:
            (Path("frames") / video).mkdir(parents=True)
            Image.linear_gradient("L").save(f"frames/{video}/00001.png")
        for stage, m in {"pretrain": {"loss": 0.125}, "finetune": {"metric": "macro F1", "score": 0.7072,
                                                             "chance": 0.0625},
                         "features": {}, "emma": {"score": 1.9359, "chance": {"va": 0.0}}}.items():
            write_stage(stage, m)
        Path("runs/my/folds.txt").write_text("fold 3 <b> 0.512\n")
        return videos, root, make()


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """The working folder is a copy of the run, to be damaged."""
    shutil.copytree(made[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def test_the_page_shows_the_runs_numbers_names_stay_text_and_nothing_is_loaded(made):
    (_, root, page), widths = made, []
    for tag in page.tags:
        assert tag.tag not in ("script", "iframe", "object", "link", "base", "i", "b")
        assert set(tag.attrib) <= {"src", "alt", "href", "id", "name", "content", "charset", "lang", "open"}
        assert all(tag.get(name, "#").startswith(("#", "data:image/png;base64,")) for name in ("src", "href"))
        if tag.tag == "img":
            widths.append(Image.open(io.BytesIO(b64decode(tag.get("src").split(",")[1]))).width)
    assert EVIL in page.texts and not any(word in text for text in page.texts for word in ("url(", "http"))
    links = [tag.get("href")[1:] for tag in page.tags if tag.tag == "a"]
    assert links == [tag.get("id") for tag in page.tags if tag.tag == "section"] != []
    assert widths.count(1160) == 3 and widths.count(5) == 7 and widths.count(64) > 0    # videos, files, faces
    assert [tag.tag for tag in page.tags if "open" in tag.attrib] == ["details"] * 4    # scores, folds
    assert ["pretrain", "loss", "0.125", "-", "-"] in page.rows
    assert ["finetune", "macro F1", "0.707", "-", "0.062"] in page.rows
    assert ["emma", "score", "1.936", "-", "-"] in page.rows and "cotex" not in sum(page.rows, [])
    for name, task in TASKS.items():
        m = json.loads((root / f"runs/my/task_{name}/metrics.json").read_text())
        interval = "{:.3f} to {:.3f}".format(*m["score_interval"])
        row = [name, m["metric"], f"{m['score']:.3f}", interval, f"{m['chance']:.3f}"]
        assert row in page.rows and confusion(task, np.array(m["video_sums"])) in page.texts
    for text in ("scores.txt of task_va", "config.yaml of emma", "made_of.json of features"):
        assert f"{text}: <i> 'as it is'\n" in page.texts
    assert "fold 3 <b> 0.512\n" in page.texts and not any("Missing" in text for text in page.texts)


def test_the_videos_are_listed_by_their_own_score_and_their_worst_segments_by_the_error(made):
    own = {video: [np.nan] * 3 for video in VIDEOS}
    for i, (name, task) in enumerate(TASKS.items()):
        worst = []
        for video, (outputs, labels) in made[0][name].items():
            (target, valid), found = targets(labels, task), []
            sums = task.metric.count(outputs, target, valid)
            occurs = task.metric.labelled(sums)[:, 0] > 0                  # no frame shows the class "Other"
            own[video][i] = task.metric.score(sums)[occurs].mean()
            gap = in_units(outputs, task) - (np.eye(8)[target] if task.one_class else target)
            for start in range(0, len(gap) - WINDOW + STRIDE, STRIDE):
                end = min(start + WINDOW, len(gap))
                part = gap[start:end][valid.reshape(len(gap), -1)[start:end, 0]]
                if len(part) >= WINDOW / 2:
                    mean, error = part.mean(axis=0), f"{np.sqrt((part ** 2).mean()):.3f}"
                    words = [f"{task.outputs[k]} {abs(mean[k]):.2f} too {'high' if mean[k] > 0 else 'low'}"
                             for k in np.argsort(-abs(mean))[:2]]
                    found.append([name, video, f"{start + 1} to {end}", error, ", ".join(words)])
            worst += [max(found, key=lambda row: row[3])] if found else []
        rows = [row[:5] for row in made[2].rows if row[:1] == [name] and len(row) == 6]
        assert rows == sorted(worst, key=lambda row: row[3], reverse=True) and len(rows) == 4 - (name == "au")
    order = sorted(VIDEOS, key=lambda video: (video == "7", -np.mean(own[video])))
    assert [tag.text for tag in made[2].tags if tag.tag == "h3" and tag.text.endswith(" one")] == [
        f"{order[0]}, the best one", f"{order[1]}, the median one", f"{order[2]}, the worst one"]
    assert [row for row in made[2].rows if row and row[0] in VIDEOS] == [
        [video, *[f"{score:.3f}" for score in own[video]]] for video in order]


@pytest.mark.parametrize("kept", [["pretrain"], ["features", "task_au"], ["emma"], ["task_va", "task_expr"]])
def test_what_is_not_finished_is_named_with_its_command(copy, kept):
    for path in Path("runs/my").glob("*/metrics.json"):
        path.unlink() if path.parent.name not in kept else None
    lacks = {row[0]: row[1] for row in make().rows if len(row) == 2 and row[1].startswith("python ")}
    scripts = {"pretrain": "train_pretrain.py", "finetune": "train_finetune.py"}
    scripts |= {"features": "extract_features.py", **{task: f"train_task.py --task {task}" for task in TASKS}}
    assert lacks == {name: f"python {script} --config my.yaml" for name, script in scripts.items()
                     if name not in kept and f"task_{name}" not in kept}


def test_damaged_and_missing_files_are_named_and_the_rest_is_shown(copy):
    run, files = Path("runs/my"), {
        "task_au/metrics.json": b"[1, 2]", "task_va/predictions.npz": b"PK", "task_va/scores.txt": b"\xff",
        "pretrain/reconstruction.png": b"\x89PNG no picture", "task_expr/curves.png": None,
        "folds.txt": b"\xff"}
    for name, content in files.items():
        (run / name).unlink() if content is None else (run / name).write_bytes(content)
    Path("labels/AU_Detection_Challenge/Validation_Set/6.txt").write_text("AU1\n")
    Path("labels/EXPR_Classification_Challenge/Validation_Set/6.txt").unlink()
    shutil.rmtree("frames")
    page = make()
    damaged = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert {f"{run / name}" for name in files} <= set(damaged)
    assert "6.txt: header is" in damaged[f"{run}/task_au/predictions.npz"]
    assert "6: 45 frames were scored, but now 0 have labels" in damaged[f"{run}/task_expr/predictions.npz"]
    assert "data.frames" in damaged["['frames']"] and "scores.txt of task_au: <i> 'as it is'\n" in page.texts


def test_wanted_videos_are_shown_instead_and_unknown_ones_refused(copy, monkeypatch):
    Path("frames/7/1.jpg").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["x", "--config", "my.yaml", "--out", "r.html", "--videos", "7", EVIL])
    runpy.run_path(report.__file__, run_name="__main__")
    page, drawn = read(Path("r.html")), []
    titles = [tag.text.partition(", the ")[0] for tag in page.tags if tag.tag == "h3"]
    assert titles[3:5] == ["7", EVIL] and set(VIDEOS) - set(titles) == {"6", "few labels"}
    assert any("are both frame 1" in text for text in page.texts)
    Path("frames/7/1.jpg").unlink()
    monkeypatch.setattr(report, "draw_video", lambda *of, note: drawn.append(of) or Image.new("RGB", (4, 4)))
    make("6")
    [(name, values, labels, faces)] = drawn
    assert name == "6" and [number for number, _ in faces] == [1] and list(values) == list(labels) == [*TASKS]
    assert all(np.isnan(labels[task]).any() and not np.isnan(values[task]).any() for task in TASKS)
    with pytest.raises(ValueError, match="--videos: '66' is none of 4 scored videos; nearest: 6"):
        make("7", "66")
    shutil.rmtree("runs/my")
    with pytest.raises(ValueError, match="^runs/my: no stage is finished; begin with: python train_pretrain"):
        make()
