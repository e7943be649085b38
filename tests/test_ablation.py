"""What each part is worth, by one command: which runs, what they take over, what is written."""

import contextlib
import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ablation
import fake_stages
import made_of
import many_runs
import scoring
import stages
import tiny
import variants
from ablation import all_jobs, rows_of
from config import load
from fake_stages import Finished, Ran, pretended, started
from intervals import difference, difference_over_seeds, drawn, drawn_scores
from labels import TASKS, VA, read_labels, targets
from scoring import read_sums
from temporal import SegmentModel
from test_splits import random_labels
from variants import config_of, short

ROUNDS = 60
COMMAND = ["ablation.py", "--config", "my.yaml", "--processes", "1"]
OWN = {"no_finetuning": ["extract_features"], "no_pretraining": ["train_finetune", "extract_features"]}
SETTINGS = {"no_finetuning": "features.checkpoint=runs/{whole}/pretrain/last.pt",
            "no_tcn": "temporal.tcn=false", "no_transformer": "temporal.transformer=false",
            "single_frames": "temporal.tcn=false temporal.transformer=false",
            "no_pretraining": "finetune.start=none", "centred": "temporal.causal=false"}
TRAIN = [f"train_task {task}" for task in TASKS]


def prepare(folder):
    """my.yaml, real labels, and an encoder with features, as if they were finished."""
    random_labels(folder / "labels", 0, count=9)
    (folder / "my.yaml").write_text("data: {labels: labels}\nsegments: {window: 100, stride: 50}")
    with contextlib.chdir(folder):
        for stage in ("train_pretrain", "train_finetune", "extract_features"):
            assert fake_stages.pretend([f"{stage}.py", "--config", "my.yaml"]) == 0
    return folder


def start(monkeypatch, *more, command=COMMAND):
    """What the script does, in this process. -> exit code"""
    return started(monkeypatch, ablation, *command, *more)


def not_merged(config, task, merge, tune, read=variants.sums_of):
    """Stands for a scoring without overlap: the stored sums, in another order, times 2."""
    names, sums = read(config, task, "mean")
    return (names, sums) if merge == "mean" else (names[::-1], 2 * sums[::-1])


def few_rounds(patch):
    """Draw fewer sets of videos, which is faster."""
    patch.setattr(variants, "difference_over_seeds", partial(difference_over_seeds, rounds=ROUNDS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole ablation with two seeds, run once."""
    folder, said = prepare(tmp_path_factory.mktemp("finished")), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "sums_of", not_merged)
        few_rounds(patch)
        with pretended(Ran()) as ran:
            assert start(patch, "--seeds", "2") == 0
    return Finished(folder, ran.short(), said.getvalue())


def expected(seeds) -> list[str]:
    """The commands, as `Ran.short` gives them."""
    lines = []
    for seed in seeds:
        whole = f"my_seed{seed}" if seed else "my"
        given = f" run={whole} run.base=my run.seed={seed}" if seed else ""
        own = ["train_pretrain", "train_finetune", "extract_features"] if seed else []
        lines += [f"{stage}{given}" for stage in own + TRAIN]
        for name, settings in SETTINGS.items():
            given = (f" run=my_{name}_seed{seed} run.base={whole} run.seed={seed} "
                     + settings.format(whole=whole))
            lines += [f"{stage}{given}" for stage in OWN.get(name, []) + TRAIN]
    return lines


# ---- Which runs

def test_each_row_and_seed_is_a_run_that_makes_only_what_differs(finished):
    assert finished.commands == expected([0, 1])
    runs = finished.folder / "runs"
    for seed, whole in ((0, "my"), (1, "my_seed1")):
        for name in SETTINGS:
            stages = {path.name for path in (runs / f"my_{name}_seed{seed}").iterdir()}
            assert stages == {"task_va", "task_expr", "task_au", *({"features"} if name in OWN else set()),
                              *({"finetune"} if name == "no_pretraining" else set())}
            links = made_of.chain(made_of.read_record(runs / f"my_{name}_seed{seed}/task_au"))
            mae = made_of.read_record(runs / whole / "pretrain")["checksum"]
            if name == "no_pretraining":
                assert links[-1] == made_of.RANDOM
            else:
                assert links[-1]["checksum"] == mae                     # of the whole system with this seed
            assert ("finetune" in [link.get("stage") for link in links]) == (name != "no_finetuning")


def test_the_rows_are_the_papers_four_and_four_more(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    rows = rows_of(load("my.yaml"))
    assert [row.title for row in rows[:4]] == ["nothing", "Expr fine-tuning", "TCN", "Transformer encoder"]
    assert [row.name for row in rows] == ["whole", *SETTINGS, "whole"] and rows[-1].merge == "none"


def test_a_system_that_sees_the_future_is_compared_with_one_that_does_not(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = load("my.yaml", ["temporal.causal=false"])
    (row,) = [row for row in rows_of(config) if row.name == "causal"]
    assert row.title == "the future: causal TCN" and config_of(config, row, 0).temporal.causal


def test_the_seeds_begin_with_that_of_the_run(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = load("my.yaml", ["run.seed=5"])
    listed = all_jobs(config, [VA], range(5, 7))
    assert listed[0].config is config and listed[0].title == "train_task va"
    assert {(job.config.run.seed, job.config.run.base) for job in listed} == {
        (5, ""), (5, "my"), (6, "my"), (6, "my_seed6")}


def test_a_given_mae_is_what_extracts_features_without_fine_tuning(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = load("my.yaml", ["finetune.start=mae.pth"])
    assert config_of(config, rows_of(config)[1], 1).features.checkpoint == "mae.pth"


def test_with_synthetic_data_everything_is_made_and_the_data_once(tmp_path, monkeypatch, capsys):
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    listed = [job.stage for job in all_jobs(load("tiny.yaml"), list(TASKS.values()), range(3))]
    assert listed[:4] == ["synthetic", "train_pretrain", "train_finetune", "extract_features"]
    counts = {stage: listed.count(stage) for stage in dict.fromkeys(listed)}
    assert counts == {"synthetic": 1, "train_pretrain": 3, "train_finetune": 6, "extract_features": 9,
                      "train_task": 7 * 3 * 3}
    assert start(monkeypatch, "--dry-run", command=["ablation.py", "--config", "tiny.yaml"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 82 and last.startswith("82 commands, 0 of them finished; 82 more of unknown length")
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]


def test_what_is_finished_is_not_run_again_and_a_failure_ends_it(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "sums_of", not_merged)
    few_rounds(monkeypatch)
    for run in ("my_no_pretraining_seed1", "my_centred_seed1", "ablation.json"):
        path = tmp_path / "runs" / run
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    left = [line for line in expected([0, 1]) if "no_pretraining_seed1" in line or "centred_seed1" in line]
    with pretended(Ran()) as ran:
        ran.fails = "extract_features run=my_no_pretraining_seed1"
        assert start(monkeypatch, "--seeds", "2") == 2
        assert ran.short() == left[:2] and "extract_features.py --config my.yaml" in capsys.readouterr().err
        assert not (tmp_path / "runs/ablation.json").exists()
        ran.commands, ran.fails = [], ""
        assert start(monkeypatch, "--seeds", "2") == 0 and ran.short() == left[1:]
        ran.commands = []
        assert start(monkeypatch) == 0 and ran.short() == expected([2])                 # one seed more
    assert json.loads((tmp_path / "runs/ablation.json").read_text())["seeds"] == [0, 1, 2]


# ---- What is written

def test_the_file_holds_scores_and_paired_differences(finished):
    found = json.loads((finished.folder / "runs/ablation.json").read_text())
    assert found["run"] == "my" and found["seeds"] == [0, 1]
    for name, task in TASKS.items():
        metric = task.metric

        def sums(row):
            runs = {"whole": ("my", "my_seed1")}.get(row, (f"my_{row}_seed0", f"my_{row}_seed1"))
            return [read_sums(finished.folder / "runs" / run / f"task_{name}") for run in runs]

        whole, times = sums("whole"), drawn(len(sums("whole")[0][0]), ROUNDS)
        for row in found["rows"][:-1]:
            cell, theirs = row["tasks"][name], sums(row["name"])
            scores = [metric.score(of_seed.sum(axis=0)).mean() for _, of_seed in theirs]
            assert cell["scores"] == pytest.approx(scores) and cell["mean"] == pytest.approx(np.mean(scores))
            assert cell["deviation"] == pytest.approx(abs(scores[0] - scores[1]) / np.sqrt(2))
            if row["name"] == "whole":
                assert cell["difference"] is None and cell["interval"] is None
                continue
            change = [np.mean([drawn_scores(part, metric, times).mean(axis=1) for _, part in system], axis=0)
                      for system in (theirs, whole)]
            assert cell["interval"] == pytest.approx(np.quantile(change[0] - change[1], (0.025, 0.975)))
            mean = found["rows"][0]["tasks"][name]["mean"]
            assert cell["difference"] == pytest.approx(np.mean(scores) - mean)
        last = found["rows"][-1]["tasks"][name]          # twice the sums in another order: the same scores
        assert last["difference"] == pytest.approx(0) and last["interval"] == pytest.approx([0, 0])


def test_the_tables_hold_every_row(finished):
    text = (finished.folder / "runs/ablation.txt").read_text()
    assert text in finished.said + "\n" and "written to runs/ablation.txt and ablation.json" in finished.said
    found = json.loads((finished.folder / "runs/ablation.json").read_text())
    scores, changes = (part.splitlines() for part in text.split("left out | ")[1:])
    assert scores[0] == changes[0] == "VA mean CCC | Expr macro F1 | AU mean F1"
    for row in found["rows"]:
        cells = [row["tasks"][name] for name in TASKS]
        assert " | ".join([row["title"], *(f"{short(cell['mean'])} ± {short(cell['deviation'])}"
                                           for cell in cells)]) in scores
    assert len([line for line in changes if line.count(" | ") == 3]) == len(found["rows"]) - 1
    cell = found["rows"][1]["tasks"]["au"]
    line = next(line for line in changes if line.startswith("Expr fine-tuning"))
    assert line.endswith(f"{short(cell['difference'], '+')} [{short(cell['interval'][0], '+')}, "
                         f"{short(cell['interval'][1], '+')}]")


@pytest.mark.parametrize("number, sign, text", [
    (0.6943, "", ".694"), (0.0004, "", ".000"), (-0.0126, "", "-.013"), (1.0, "", "1.000"),
    (0.02, "+", "+.020"), (-0.3, "+", "-.300"), (0, "+", "+.000"), (10.05, "", "10.050")])
def test_numbers_are_written_as_in_readme(number, sign, text):
    assert short(number, sign) == text


def test_runs_that_were_scored_on_other_videos_are_not_compared(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = load("my.yaml")

    def fewer(of_row, task, merge, tune):
        names, sums = read_sums(of_row.folder(f"task_{task.name}"))
        return (names[1:], sums[1:]) if "no_tcn" in of_row.run.name else (names, sums)
    monkeypatch.setattr(variants, "sums_of", fewer)
    with pytest.raises(ValueError, match="runs/my_no_tcn_seed0/task_va was scored on other videos"):
        ablation.collect(config, [VA], range(2))


def test_one_seed_is_refused(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.folder)
    assert start(monkeypatch, "--seeds", "1") == 2
    assert capsys.readouterr().err == "error: --seeds: got 1, expected 2 or more, as one has no deviation\n"


# ---- The difference over seeds

def random_sums(rng, *shape) -> np.ndarray:
    """Sums of random VA predictions. -> (*shape, 2, 6)"""
    sums = []
    for _ in range(int(np.prod(shape))):
        target = rng.normal(size=(30, 2))
        sums.append(VA.metric.count(target + rng.normal(size=(30, 2)), target, np.ones((30, 2), bool)))
    return np.array(sums).reshape(*shape, 2, 6)


def test_with_one_seed_it_is_the_difference_of_two_systems():
    ours, theirs = random_sums(np.random.default_rng(0), 2, 1, 12)
    assert difference_over_seeds(ours, theirs, VA.metric) == difference(ours[0], theirs[0], VA.metric)
    assert difference_over_seeds(ours, ours, VA.metric) == (0, 0, 0)


def test_seeds_are_averaged_and_neither_their_order_nor_their_number_has_to_agree():
    rng = np.random.default_rng(1)
    ours, theirs = random_sums(rng, 3, 12), random_sums(rng, 2, 12)
    found = difference_over_seeds(ours, theirs, VA.metric, 100)
    means = [np.mean([VA.metric.score(sums.sum(axis=0)).mean() for sums in system])
             for system in (ours, theirs)]
    assert found.value == pytest.approx(means[0] - means[1]) and found.low < found.value < found.high
    assert found == pytest.approx(difference_over_seeds(ours[::-1], theirs[::-1], VA.metric, 100))
    back = difference_over_seeds(theirs, ours, VA.metric, 100)
    assert back == pytest.approx((-found.value, -found.high, -found.low))


def test_systems_on_other_videos_are_refused():
    ours, theirs = random_sums(np.random.default_rng(2), 2, 2, 5)
    with pytest.raises(ValueError, match="compared on the same videos; got sums of .* and of"):
        difference_over_seeds(ours, theirs[:, :4], VA.metric)


# ---- Really

def test_without_overlap_each_frame_comes_from_one_segment(tmp_path, monkeypatch):
    """The last row, on features and weights as stages.py has them, against one segment after the other."""
    stages.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config, best = load("tiny.yaml"), Path("runs/tiny/task_va/best.pt")
    best.parent.mkdir()
    model = SegmentModel(stages.FEATURE_WIDTH, 2, **dataclasses.asdict(config.temporal))
    record = {"stage": "task_va", "settings": made_of.settings_of(config, "segments", "temporal", "task")}
    torch.save({"model": model.state_dict(), "made_of": record}, best)
    names, sums = variants.sums_of(config, VA, "none")
    assert names == [name for name, film in stages.FILMS.items() if film.split == "Validation_Set"
                     and film.images]
    trained = scoring.load(best)
    for name, found in zip(names, sums):
        labels = read_labels(f"labels/{VA.folders[0]}/Validation_Set/{name}.txt", VA)
        features = np.load(f"runs/tiny/features/{name}.npy")[:len(labels)]
        outputs = np.concatenate([trained.predict(features[first:first + 20])
                                  for first in range(0, len(features), 20)])
        assert np.allclose(found, VA.metric.count(outputs, *targets(labels, VA)))
    assert not np.allclose(sums, variants.sums_of(config, VA, "triangular")[1])


@pytest.mark.slow
def test_the_ablation_of_real_stages(tmp_path, monkeypatch):
    folder, ran = tiny.write(tmp_path, segments={"stride": 8}), []

    def run(job, processes):
        words = job.words(processes)
        tiny.done(folder, *[words[1].rpartition("/")[2], *words[2:]])
        ran.append(job.title)
        return 1
    monkeypatch.chdir(folder)
    monkeypatch.setattr(many_runs, "run", run)
    monkeypatch.setattr(many_runs, "labelled_tasks", lambda config: [VA])
    command = ["ablation.py", "--config", "tiny.yaml", "--processes", "1"]
    assert start(monkeypatch, "--seeds", "2", command=command) == 0
    counts = {stage: ran.count(stage) for stage in dict.fromkeys(ran)}
    assert counts == {"synthetic": 1, "train_pretrain": 2, "train_finetune": 4, "extract_features": 6,
                      "train_task va": 7 * 2}
    found = json.loads((folder / "runs/ablation.json").read_text())
    whole, *others = [row["tasks"]["va"] for row in found["rows"]]
    assert whole["scores"] == pytest.approx([tiny.metrics(folder / f"runs/{run}/task_va")["score"]
                                             for run in ("tiny", "tiny_seed1")])
    for cell in others:
        assert cell["difference"] == pytest.approx(cell["mean"] - whole["mean"])
        assert cell["scores"] != whole["scores"]
