"""EMMA and masked CoTEX against what they should beat: which runs, and what is written."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import emma
import emma_frames
import fake_stages
import systems
import tiny
import variants
from config import load
from fake_stages import Finished, Ran, pretended, started
from intervals import difference_over_seeds
from labels import TASKS
from scoring import read_sums
from systems import all_jobs, cotex_rows, emma_rows
from test_splits import random_labels
from variants import short

COMMAND = ["systems.py", "--config", "my.yaml", "--processes", "1"]
EMMA = {"emma_no_cnn": "emma.cnn=none", "emma_va": "emma.weights=[1,0,0]",
        "emma_expr": "emma.weights=[0,1,0]", "emma_au": "emma.weights=[0,0,1]"}
COTEX = {"cotex_plain": "cotex.views=1 cotex.mask_ratio=0 cotex.epochs=3",
         "cotex_long": "cotex.views=1 cotex.mask_ratio=0", "cotex_one": "cotex.views=1",
         "cotex_r0": "cotex.mask_ratio=0", "cotex_no_js": "cotex.js_weight=0",
         "cotex_js2": "cotex.js_weight=2",
         "cotex_r0.5": "cotex.mask_ratio=0.5", "cotex_r0.9": "cotex.mask_ratio=0.9"}


def start(monkeypatch, *more, command=COMMAND):
    """What the script does, in this process. -> exit code"""
    return started(monkeypatch, systems, *command, *more)


def single_frames(path, tasks):
    """Stands for scoring EMMA on the videos: the segment model's sums, in another order, times 2, and without
    the first video, on which this EMMA was trained."""
    found = {}
    for task in tasks:
        names, sums = read_sums(Path(path).parents[1] / f"task_{task.name}")
        found[task.name] = names[:0:-1], 2 * sums[:0:-1]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Everything with two seeds, run once; the tasks are trained with both seeds already."""
    folder, said = tmp_path_factory.mktemp("systems"), io.StringIO()
    random_labels(folder / "labels", 0, count=9)
    (folder / "my.yaml").write_text("data: {labels: labels, s_aff_wild2: s, drawn_faces: d, real_faces: r}")
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        for run in ([], ["run.name=my_seed1", "run.base=my", "run.seed=1"]):
            given = [word for setting in run for word in ("--set", setting)]
            for stage in ("train_pretrain", "train_finetune", "extract_features"):
                assert fake_stages.pretend([f"{stage}.py", "--config", "my.yaml", *given]) == 0
            for task in TASKS:
                words = ["train_task.py", "--task", task, "--config", "my.yaml", *given]
                assert fake_stages.pretend(words) == 0
        patch.setattr(variants, "difference_over_seeds", partial(difference_over_seeds, rounds=60))
        patch.setattr(emma_frames, "load", lambda path, *ignored: path)
        patch.setattr(emma_frames, "video_sums", single_frames)
        with pretended(Ran()) as ran:
            assert start(patch, "--seeds", "2") == 0
    return Finished(folder, ran.short(), said.getvalue())


# ---- Which runs

def test_each_row_and_seed_is_a_run_that_takes_the_mae_and_the_cnn_over(finished):
    lines = []
    for seed, whole in ((0, "my"), (1, "my_seed1")):
        given = f" run={whole} run.base=my run.seed={seed}" if seed else ""
        lines += [f"train_stills{given}"]
        for system, stage in ((EMMA, "train_emma"), (COTEX, "train_cotex")):
            lines += [f"{stage}{given}"]
            lines += [f"{stage} run=my_{name}_seed{seed} run.base={whole} run.seed={seed} {settings}"
                      for name, settings in system.items()]
    assert finished.commands == lines
    runs = finished.folder / "runs"
    assert {path.name for path in (runs / "my_cotex_r0_seed1").iterdir()} == {"cotex"}


def test_the_plain_vit_sees_as_many_tokens_as_the_two_masked_views():
    config = load("configs/cotex.yaml")
    plain = cotex_rows(config)[1]
    assert plain.title == "one plain ViT, as many tokens: 3 epochs"          # 6 · 2 · (1 + 49) / (1 + 196)
    small = load("configs/cotex.yaml", ["vit.image_size=32", "cotex.epochs=10", "cotex.mask_ratio=0.5"])
    assert cotex_rows(small)[1].title == "one plain ViT, as many tokens: 12 epochs"    # 10 · 2 · (1 + 2) / 5
    config.cotex.mask_ratio = 0.0
    assert cotex_rows(config)[1].title == "one plain ViT, as many tokens: 12 epochs"


def test_only_what_there_is_data_for_is_compared(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.folder)
    stages = {job.stage for job in all_jobs(load("my.yaml", ["data.drawn_faces="]), range(2))}
    assert stages == {"train_pretrain", "train_stills", "train_emma"}
    stages = {job.stage for job in all_jobs(load("my.yaml", ["data.s_aff_wild2="]), range(2))}
    assert stages == {"train_pretrain", "train_cotex"}
    assert start(monkeypatch, "--set", "data.s_aff_wild2=", "--set", "data.drawn_faces=") == 2
    assert "neither data.s_aff_wild2, for EMMA, nor data.drawn_faces" in capsys.readouterr().err


def test_with_synthetic_data_everything_is_made_and_the_data_once(tmp_path, monkeypatch, capsys):
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    listed = [job.stage for job in all_jobs(load("tiny.yaml"), range(3))]
    assert listed[:4] == ["synthetic", "synthetic_abaw4", "train_pretrain", "train_stills"]
    counts = {stage: listed.count(stage) for stage in dict.fromkeys(listed)}
    assert counts == {"synthetic": 1, "synthetic_abaw4": 1, "train_pretrain": 3, "train_stills": 3,
                      "train_emma": 15, "train_cotex": 3 * len(cotex_rows(load("tiny.yaml")))}
    assert start(monkeypatch, "--dry-run", command=["systems.py", "--config", "tiny.yaml"]) == 0
    assert "0 of them finished" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]


# ---- What is written

def emma_sums(folder, run) -> np.ndarray:
    return np.array(json.loads((folder / f"runs/{run}/emma/video_sums.json").read_text())["sums"])


def test_the_file_holds_the_scores_of_each_system(finished):
    folder, found = finished.folder, json.loads((finished.folder / "runs/systems.json").read_text())
    assert found["run"] == "my" and found["seeds"] == [0, 1]
    assert [row["title"] for row in found["emma"]] == [row.title for row in emma_rows()]
    runs = {"EMMA": [["my", "my_seed1"]] * 3,
            "without the CNN": [["my_emma_no_cnn_seed0", "my_emma_no_cnn_seed1"]] * 3,
            "three networks, a task each": [[f"my_emma_{task}_seed{seed}" for seed in (0, 1)]
                                            for task in TASKS]}
    for row in found["emma"]:
        parts = np.array([[emma.score(emma_sums(folder, run).sum(axis=0))[k] for run in of_task]
                          for k, of_task in enumerate(runs[row["title"]])])                   # (3, seeds)
        for k, name in enumerate(TASKS):
            assert row["tasks"][name]["scores"] == pytest.approx(parts[k])
            change = row["tasks"][name]["mean"] - found["emma"][0]["tasks"][name]["mean"]
            if row["title"] != "EMMA":
                assert row["tasks"][name]["difference"] == pytest.approx(change)
        assert row["p_mtl"]["scores"] == pytest.approx(parts.sum(axis=0))
        assert row["p_mtl"]["mean"] == pytest.approx(parts.sum(axis=0).mean())
        assert row["p_mtl"]["deviation"] == pytest.approx(abs(np.diff(parts.sum(axis=0))[0]) / np.sqrt(2))
    for row, name in zip(found["cotex"], ["", *COTEX]):
        names = [f"my_{name}_seed{seed}" for seed in (0, 1)] if name else ["my", "my_seed1"]
        scores = [tiny.metrics(folder / "runs" / run / "cotex")["val_macro_f1"] for run in names]
        assert row["scores"] == scores
    segment, single = found["time"]
    for name, task in TASKS.items():             # the same videos in another order, each counted twice
        of_seeds = [read_sums(folder / f"runs/{run}/task_{name}")[1] for run in ("my", "my_seed1")]
        expected = [task.metric.score(sums[1:].sum(axis=0)).mean() for sums in of_seeds]
        assert segment["tasks"][name]["scores"] == pytest.approx(expected)
        assert single["tasks"][name]["scores"] == pytest.approx(segment["tasks"][name]["scores"])
        assert single["tasks"][name]["interval"] == pytest.approx([0, 0])


def test_the_tables_hold_every_row(finished):
    text = (finished.folder / "runs/systems.txt").read_text()
    assert text in finished.said + "\n" and "written to runs/systems.txt and systems.json" in finished.said
    found = json.loads((finished.folder / "runs/systems.json").read_text())
    for row in found["cotex"]:
        assert f"\n{row['title']} | {short(row['mean'])} ± {short(row['deviation'])}\n" in text
    for row in found["emma"]:
        cells = [f"{short(cell['mean'])} ± {short(cell['deviation'])}"
                 for cell in [*row["tasks"].values(), row["p_mtl"]]]
        assert " | ".join([row["title"], *cells]) in text
    assert "EMMA | VA mean CCC | Expr macro F1 | AU mean F1 | P_MTL" in text
    assert "EMMA, single frames | " in text


def test_without_the_segment_models_the_third_table_is_left_out(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    assert systems.collect_time(load("my.yaml"), range(3)) == []            # seed 2 is not trained
