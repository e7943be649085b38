"""Ideas and their outcome: which runs, whom each is compared with, what is written, what the page says."""

import contextlib
import io
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import experiments
import fake_stages
import made_of
import many_runs
import tiny
import variants
from config import load
from experiments import command, ideas_of, verdict
from fake_stages import Ran, pretended, started
from intervals import difference_over_seeds
from labels import AU, EXPR, VA
from scoring import read_sums
from test_ablation import prepare
from test_commands import blocks
from tiny import ROOT
from variants import WHOLE, Variant

ROUNDS = 40
COMMAND = ["experiments.py", "--config", "my.yaml", "--processes", "1"]
PAGE = ROOT / "docs/experiments.md"
LENT = ["train_pretrain", "train_finetune", "extract_features"]


def start(monkeypatch, *more, command=COMMAND):
    """What the script does, in this process. -> exit code"""
    return started(monkeypatch, experiments, *command, *more)


def stored_sums(config, task, merge, tune, read=variants.sums_of):
    """Stands for a scoring with other merging or with tuning: as stored, in another order; tuned, twice the
    last video as well."""
    names, sums = read(config, task)
    if tune:
        sums[-1] *= 2
    return (names, sums) if merge == "mean" and not tune else (names[::-1], sums[::-1])


class Finished(NamedTuple):
    folder: Path
    ran: Ran
    said: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All ideas with two seeds, run once."""
    folder, said = prepare(tmp_path_factory.mktemp("finished")), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        faked(patch)
        with pretended(Ran()) as ran:
            assert start(patch, "--seeds", "2") == 0
    return Finished(folder, ran, said.getvalue())


def faked(patch):
    patch.setattr(variants, "sums_of", stored_sums)
    patch.setattr(variants, "difference_over_seeds", partial(difference_over_seeds, rounds=ROUNDS))


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of the finished runs, to be changed."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    faked(monkeypatch)
    return tmp_path


def written(folder) -> list[dict]:
    return json.loads((folder / "runs/experiments.json").read_text())["ideas"]


# ---- Which runs

def test_each_idea_is_run_on_its_task_alone_after_the_whole_system_with_its_seed(finished):
    lines = finished.ran.short()
    assert lines[:3] == ["train_task va", "train_task expr", "train_task au"]
    second = next(i for i, line in enumerate(lines) if "seed1" in line)
    whole = " run=my_seed1 run.base=my run.seed=1"
    assert lines[second:second + 6] == [f"{stage}{whole}" for stage in LENT + lines[:3]]
    for seed, base in ((0, "my"), (1, "my_seed1")):
        begin = f"run=my_{{}}_seed{seed} run.base={base} run.seed={seed}"
        expected = [f"train_task va {begin.format('k3')} temporal.kernels=[3,3,3]",
                    f"train_task va {begin.format('centred')} temporal.causal=false",
                    f"train_task va {begin.format('no_tcn')} temporal.tcn=false",
                    f"train_task va {begin.format('short')} segments.window=33 segments.stride=16",
                    f"train_task va {begin.format('apart')} segments.stride=100",
                    f"train_task au {begin.format('no_dropout')} temporal.dropout=0",
                    f"train_task au {begin.format('fast')} task.lr=9e-05",
                    f"train_task au {begin.format('held')} task.held_out=0.15"]
        token = f"{begin.format('token')} finetune.token=cls features.checkpoint=runs/{base}/finetune/best.pt"
        mask = f"{begin.format('mask')} pretrain.mask_ratio=0.5"
        expected += [f"{line} {token}" for line in ("extract_features", "train_task expr")]
        expected += [f"{line} {mask}" for line in (*LENT, "train_task expr")]
        first = 3 if seed == 0 else second + 6
        assert lines[first:first + len(expected)] == expected
    assert len(lines) == 3 + 6 + 2 * 14 + 2


def test_an_idea_takes_over_what_stays_the_same(finished):
    runs = finished.folder / "runs"
    for run, own in (("my_k3_seed1", {"task_va"}), ("my_token_seed1", {"features", "task_expr"}),
                     ("my_mask_seed1", {"pretrain", "finetune", "features", "task_expr"})):
        assert {path.name for path in (runs / run).iterdir()} == own
    links = made_of.chain(made_of.read_record(runs / "my_token_seed1/task_expr"))
    assert [link["settings"].get("finetune.token") for link in links[1:3]] == ["cls", "mean"]
    assert links[2]["checksum"] == made_of.read_record(runs / "my_seed1/finetune")["checksum"]


def test_what_ablation_has_finished_is_not_trained_again(copied, monkeypatch):
    """The whole systems, and two ideas, are the same runs."""
    for name in ("k3", "short", "apart", "no_dropout", "fast", "held", "token", "mask"):
        for seed in (0, 1):
            shutil.rmtree(copied / f"runs/my_{name}_seed{seed}")
    assert start(monkeypatch, "--dry-run", "--seeds", "2") == 0
    with pretended(Ran()) as ran:
        assert start(monkeypatch, "--seeds", "2") == 0
    trained = [line for line in ran.short() if not line.startswith("evaluate")]
    assert len(trained) == 2 * 12 and not re.search("no_tcn|centred", " ".join(trained))


def test_only_what_is_scored_is_run_again(copied, monkeypatch, finished):
    before = written(copied)
    with pretended(Ran()) as ran:
        assert start(monkeypatch, "--seeds", "2") == 0
    assert [words[1:] for words in ran.commands] == [words[1:] for words in finished.ran.commands[-2:]]
    for old, new in zip(before, written(copied)):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}


def test_what_needs_no_training_is_scored_by_evaluate_beside_the_same_run(finished):
    merged, tuned = (shlex.join(words[1:]) for words in finished.ran.commands[-2:])
    assert merged.endswith("evaluate.py --task va --merge triangular --against my --config my.yaml")
    run = "my_held_seed0"
    assert f"evaluate.py --task au --tune --against {run} --config my.yaml --set run.name={run} " in tuned


def test_a_failure_ends_it_with_the_command(copied, monkeypatch, capsys):
    shutil.rmtree(copied / "runs/my_mask_seed1")
    (copied / "runs/experiments.json").unlink()
    with pretended(Ran()) as ran:
        ran.fails = "train_finetune run=my_mask_seed1"
        assert start(monkeypatch, "--seeds", "2") == 2
    assert len(ran.commands) == 2 and "train_finetune.py --config my.yaml" in capsys.readouterr().err
    assert not (copied / "runs/experiments.json").exists()


def test_a_task_without_labels_has_no_ideas(copied, monkeypatch):
    for task in (EXPR, AU):
        shutil.rmtree(copied / "labels" / task.folders[0])
    with pretended(Ran()):
        assert start(monkeypatch, "--seeds", "2") == 0
    assert {row["task"] for row in written(copied)} == {"va"}


def test_with_synthetic_data_everything_is_made_and_the_data_once(tmp_path, monkeypatch, capsys):
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert start(monkeypatch, "--dry-run", command=["experiments.py", "--config", "tiny.yaml"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * (3 + 3 + 14) and last.startswith("61 commands, 0 of them finished")
    assert [line.count("synthetic.py") for line in lines] == [1] + [0] * 60
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]


def test_one_seed_is_refused(copied, monkeypatch, capsys):
    assert start(monkeypatch, "--seeds", "1") == 2
    assert capsys.readouterr().err == "error: --seeds: got 1, expected 2 or more, as one has no deviation\n"


# ---- What is written

def test_each_idea_is_compared_with_the_system_that_lacks_only_it(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    rows, runs = written(finished.folder), finished.folder / "runs"
    for row, idea in zip(rows, ideas_of(load("my.yaml")), strict=True):
        def sums(name):
            whole = name in ("whole", "nothing")
            folders = [("my", "my_seed1") if whole else (f"my_{name}_seed0", f"my_{name}_seed1")][0]
            return np.array([read_sums(runs / folder / f"task_{row['task']}")[1] for folder in folders])

        others, ours = sums("held" if idea.variant.tune else "whole"), sums(row["name"])
        if idea.variant.tune:
            ours[:, -1] *= 2
        metric = idea.task.metric
        scores = [[metric.score(of_seed.sum(axis=0)).mean() for of_seed in part] for part in (ours, others)]
        assert row["scores"] == pytest.approx(scores[0]) and row["mean"] == pytest.approx(np.mean(scores[0]))
        assert row["against"]["scores"] == pytest.approx(scores[1])
        assert row["deviation"] == pytest.approx(np.std(scores[0]) * np.sqrt(2))
        change = difference_over_seeds(ours, others, metric, ROUNDS)
        assert [row["difference"], *row["interval"]] == pytest.approx(list(change))
        assert row["verdict"] == verdict(row["interval"])
    assert rows[5]["difference"] == 0 and rows[5]["title"].startswith("triangular")
    assert rows[9]["difference"] != 0 and rows[9]["against"]["title"] == rows[8]["title"]


@pytest.mark.parametrize("interval, word", [
    ([0.001, 0.2], "helps"), ([-0.2, -0.001], "hurts"), ([-0.1, 0.1], "unclear"), ([0, 0.1], "unclear"),
    ([-0.1, 0], "unclear"), ([0, 0], "unclear")])
def test_the_verdict_is_open_where_the_interval_holds_0(interval, word):
    assert verdict(interval) == word


def test_the_table_has_the_form_of_the_page(finished):
    text = (finished.folder / "runs/experiments.txt").read_text()
    assert text in finished.said and "written to runs/experiments.txt and experiments.json" in finished.said
    head, rule, *lines = text.splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {9} and max(map(len, lines)) <= 110
    for number, (line, row) in enumerate(zip(lines, written(finished.folder), strict=True), 1):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:3] == [str(number), row["title"], row["task"]] and cells[6] == row["verdict"]
        found = [float(word) for word in re.findall(r"[-+]?\d*\.\d+", " ".join(cells[3:6]))]
        against = row["against"]
        assert found == pytest.approx([against["mean"], against["deviation"], row["mean"], row["deviation"],
                                       row["difference"], *row["interval"]], abs=6e-4)
        assert cells[7] == f"{row['seconds']:.0f}"


def test_the_seconds_are_those_of_all_commands_of_the_first_seed(copied, monkeypatch):
    stages = {"my_token_seed0/features": "5.5", "my_token_seed0/task_expr": "20.25",
              "my_token_seed1/features": "100", "my_k3_seed0/task_va": "17"}
    for folder, seconds in stages.items():
        (copied / "runs" / folder / "seconds.txt").write_text(seconds)
    (copied / "runs/my_mask_seed0/features/seconds.txt").unlink()            # it has no log.csv either
    (copied / "runs/my_short_seed0/task_va/seconds.txt").unlink()
    with pretended(Ran()):
        assert start(monkeypatch, "--seeds", "2") == 0
    seconds = {row["name"]: row["seconds"] for row in written(copied)}
    assert [seconds[name] for name in ("token", "k3", "mask")] == [25.75, 17, None]
    assert seconds["short"] == fake_stages.TOOK["train_task"]                 # from log.csv
    (line,) = [line for line in (copied / "runs/experiments.txt").read_text().splitlines() if "mask" in line]
    assert line.endswith(" | - |")


# ---- The page

def demo():
    return load(ROOT / "configs/demo.yaml")


def shown(monkeypatch) -> list[str]:
    """The commands of all ideas, as a reader types them where the project is."""
    monkeypatch.chdir(ROOT)
    config = load("configs/demo.yaml")
    return [command(config, idea, 2) for idea in ideas_of(config)]


def test_the_page_has_the_commands_of_the_ideas_in_their_order(monkeypatch):
    def plain(text):
        return " ".join(shlex.split(text))
    listed = [plain(line) for line in blocks(PAGE.read_text())]
    assert listed[1:13] == [plain(line) for line in shown(monkeypatch)]
    numbers = re.findall(r"^\*\*(\d+)\.\*\* ", PAGE.read_text(), re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 13)]


def test_the_pages_table_names_the_ideas_in_their_order():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert [row[1] for row in rows] == [idea.variant.title for idea in ideas_of(demo())]
    assert [row[2].removesuffix(" |") for row in rows] == [idea.task.name for idea in ideas_of(demo())]


def test_every_idea_changes_a_setting_of_the_demo_or_how_it_is_scored():
    config = demo()
    for idea in ideas_of(config):
        settings = variants.settings_of(config, idea.variant)
        changed = many_runs.other(config, *settings)
        for setting in settings:
            section, field = setting.partition("=")[0].split(".")
            assert getattr(getattr(changed, section), field) != getattr(getattr(config, section), field)
        assert idea.variant.settings or not idea.variant.trained


def test_a_readers_command_for_another_configuration_names_it_and_its_base(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = load("my.yaml", ["run.out=there"])
    first = shlex.split(command(config, ideas_of(config)[0], 1))
    assert first[2:] == ["--task", "va", "--config", "my.yaml", "--set", "run.out=there",
                         "--set", "run.name=k3", "--set", "run.base=my", "--set", "temporal.kernels=[3,3,3]"]
    assert command(config, ideas_of(config)[5], 2).endswith(
        "evaluate.py --task va --merge triangular --against my --config my.yaml --set run.out=there")


# ---- Variants

def test_a_given_vit_is_the_one_that_an_idea_uses(finished, monkeypatch):
    monkeypatch.chdir(finished.folder)
    config = load("my.yaml", ["features.checkpoint=vit.pt"])
    idea = next(idea for idea in ideas_of(config) if idea.variant.name == "token")
    assert variants.settings_of(config, idea.variant) == ["finetune.token=cls", "features.checkpoint=vit.pt"]


def test_only_a_variant_with_settings_of_its_own_is_trained():
    tuned, merged = Variant("", "held", tune=True), WHOLE._replace(merge="none")
    assert [variant.trained for variant in (WHOLE, tuned, merged)] == [True, False, False]
    assert variants.jobs_of(demo(), tuned, [VA], 0) == []


# ---- Really

@pytest.mark.slow
def test_the_experiments_of_real_stages(tmp_path, monkeypatch):
    folder = tiny.write(tmp_path, synthetic={"train_videos": 12, "val_videos": 4}, segments={"stride": 8})
    said = {}

    def run(job, processes):
        words = job.words(processes)
        said[job.config.run.name, job.title] = tiny.done(folder, words[1].rpartition("/")[2], *words[2:])
        return 1.5
    monkeypatch.chdir(folder)
    monkeypatch.setattr(many_runs, "run", run)
    command = ["experiments.py", "--config", "tiny.yaml", "--processes", "1"]
    assert start(monkeypatch, "--seeds", "2", command=command) == 0
    rows = written(folder)
    assert len(rows) == len(ideas_of(load("tiny.yaml")))
    for row in rows:
        if row["task"] in ("va", "expr") and row["name"] not in ("whole", "k3"):    # tiny has kernels of 3
            assert row["scores"] != row["against"]["scores"], row["title"]
        if row["name"] not in ("whole", "held"):
            runs = [folder / f"runs/tiny_{row['name']}_seed{seed}/task_{row['task']}" for seed in (0, 1)]
            assert row["scores"] == pytest.approx([tiny.metrics(run)["score"] for run in runs])
    assert rows[0]["difference"] == 0 and rows[0]["seconds"] == 1.5 and rows[11]["seconds"] == 6
    for row, run in ((rows[5], "tiny"), (rows[9], "tiny_held_seed0")):              # as evaluate.py says it
        (line,) = re.findall(r"([-+]\d\.\d+) \[.*\] against ", said[run, f"evaluate {row['task']}"])
        assert float(line) == pytest.approx(row["scores"][0] - row["against"]["scores"][0], abs=6e-4)
