"""tools/experiments.py with stages that only pretend: which commands run, what is shared, what tables say."""

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import labels
import metrics
import train_task
from engine import distributed
from engine.checkpoints import checksum
from engine.config import load
from files import label_file
from labels import EXPR, TASKS, scene, split
from pipeline import STAGES, find_input, folder, read_record, settings_of, tuned_on
from processes import ALONE
from second_paper import emma
from tools import experiments

FEATURES, AU, F1 = "extract_features", TASKS["au"].metric, EXPR.metric
LENT, TRAIN = ["train_pretrain", "train_finetune", FEATURES], [f"train_task {name}" for name in TASKS]
SUMS = {"va": (2, 6), "expr": (8, 8), "au": (12, 2, 2)}                     # of a video
SETTINGS = """{data: {labels: labels, s_aff_wild2: s, drawn_faces: d}, segments: {window: 100, stride: 50},
               vit: {image_size: 32}, cotex: {epochs: 10, mask_ratio: 0.5, js_weight: 2.0}}"""


def pretend(stage, config, task, origins):
    """What a finished stage leaves, with random scores; `origins`: the records of its inputs."""
    train, val = split("labels", task or EXPR, config.task.fold if task else config.finetune.fold)
    record = {"stage": f"{stage}_{task.name}" if task else stage, "settings": settings_of(stage, config),
              "data": {"training videos": list(train)}, "from": (origins or [None])[0]}
    place = folder(stage, config, task)
    path, rng = place / STAGES[stage].file, np.random.default_rng(zlib.crc32(str(place).encode()))
    place.mkdir(parents=True)
    torch.save({"made_of": record, "place": str(place)}, path)
    record |= {} if stage == "features" else {"checkpoint": path.name, "checksum": checksum(path)}
    (place / "made_of.json").write_text(json.dumps(record))
    sums = rng.uniform(1, 9, (len(val), *(SUMS[task.name] if task else [124])))
    found = {"videos": list(val), "video_sums": sums.tolist(), "score": rng.random(), "chance": 0.25,
             "score_interval": [0.125, 0.875], "comparable": True}
    if stage == "cotex":
        found = {"confusion": rng.integers(0, 9, (6, 6)).tolist()}
    (place / "metrics.json").write_text(json.dumps(found))


def single_frames(path, tasks):
    """Stands for EMMA on whole videos: without the first one, the others backwards, and twice the sums."""
    found = stored(path.parent.name.replace("emma", f"task_{tasks[0].name}"))
    videos = [SimpleNamespace(name=name) for name in found["videos"][:0:-1]]
    return {tasks[0].name: (videos, 2 * np.array(found["video_sums"])[:0:-1], {})}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which stages only pretend. -> `ran`: the commands, shortened; `fails`: the one that does"""
    state = SimpleNamespace(ran=[], drawn=[], fails=None, polls=1, most=0, running=0)
    def popen(words, stdout, stderr, env):
        with_torchrun = words[1:4] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        assert (stdout is None) == with_torchrun and stdout is stderr
        words = [word for word in words[4 if with_torchrun else 1:] if word != "-m"]
        script, *rest = [word.removesuffix(".py") for word in words]
        name, given = rest[1] if rest[0] == "--task" else "", rest[rest.index("--config") + 3::2]
        state.ran.append(" ".join([script.rpartition(".")[2], *[name] * bool(name), *given]))
        code, polls = 2 * (state.ran[-1] == state.fails), iter([None] * (state.polls - 1))
        stage = next(name for name, stage in STAGES.items() if stage.script == script)
        config = load("my.yaml", given)                       # the inputs must be there when it starts:
        origins = [] if code else [find_input(config, ALONE, name)[1] for name in STAGES[stage].inputs]
        state.running += 1
        state.most = max(state.most, state.running)
        def poll():
            try:
                return next(polls)
            except StopIteration:
                state.running -= 1
            if not code:
                pretend(stage, config, TASKS.get(name), origins)
            return code
        return SimpleNamespace(poll=poll, terminate=lambda: None, wait=lambda: code)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(distributed, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(SETTINGS)
    for (name, task), n in itertools.product(TASKS.items(), range(16)):                 # labelled videos
        label_file("labels", task, "Validation_Set" if n < 4 else "Train_Set", f"{name}{n}", ["0"])
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(metrics, "ROUNDS", 40)
    monkeypatch.setattr(np, "load", lambda path: path.parent.name)
    monkeypatch.setattr(labels, "read_labels", lambda file, task: file)
    monkeypatch.setattr(train_task, "draw_timeline", lambda outputs, videos, *_, note: state.drawn.append(
        (outputs, videos[0].name, videos[0].labels.stem, note)) or Image.new("RGB", (4, 3)))
    monkeypatch.setattr(emma, "load", lambda path, config, team: path)
    monkeypatch.setattr(evaluate, "emma_sums", single_frames)
    return state


def ended(words, refused=False) -> str:
    said, words = io.StringIO(), f"x {words} --config my.yaml".split()
    with mock.patch("sys.argv", words), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
            runpy.run_path(experiments.__file__, run_name="__main__")
    return said.getvalue()


def lines(stages, *settings) -> list[str]:
    return [" ".join([stage, *filter(None, settings)]) for stage in stages]


def stored(name) -> dict:
    path = Path("runs/my", name)
    return json.loads((path / "metrics.json" if path.is_dir() else path.with_suffix(".json")).read_text())


TENTH = "finetune.held_out=0.9 finetune.epochs=100"
TCN, TRANSFORMER, R = "temporal.tcn=false", "temporal.transformer=false", "cotex.mask_ratio="
ABLATION = [*LENT, *TRAIN, *lines([FEATURES, *TRAIN], "features.checkpoint=runs/my/pretrain/last.pt"),
            *lines(TRAIN, TCN), *lines(TRAIN, TRANSFORMER), *lines(TRAIN, TCN, TRANSFORMER),
            *lines(LENT[1:] + TRAIN, "finetune.start=none"), *lines(TRAIN, "temporal.causal=false"),
            *lines(LENT[1:] + TRAIN, TENTH), *lines(LENT[1:] + TRAIN, TENTH, "finetune.start=none")]
VA = ["temporal.kernels=[3, 3, 3]", "temporal.causal=false", TCN, "segments.window=33 segments.stride=16",
      "segments.stride=100"]
IDEAS = [*LENT, *TRAIN, *(f"{TRAIN[0]} {idea}" for idea in VA),
         *(f"{TRAIN[2]} {idea}" for idea in ("temporal.dropout=0", "task.lr=9e-05", "task.held_out=0.15"))]
COTEX = ["cotex.views=1", f"cotex.views=1 {R}0", f"cotex.views=1 {R}0 cotex.epochs=12",       # 10 · 2 · 3 / 5
         "cotex.js_weight=0"]
SYSTEMS = ["train_pretrain", "train_cnn", "train_emma", "train_emma emma.cnn=none",
           *(f"train_emma emma.weights=[{row}]" for row in ("1,0,0", "0,1,0", "0,0,1")), "train_cotex",
           *(f"train_cotex {row}" for row in COTEX), *LENT[1:], *TRAIN]


@pytest.mark.parametrize("table, expected", [("ablation", ABLATION), ("ideas", IDEAS), ("systems", SYSTEMS)])
def test_each_row_makes_only_what_differs_with_each_seed_and_what_is_done_is_left_out(here, table, expected):
    ended(f"{table} --seeds 2")
    assert [line for line in here.ran if "seed" not in line] == expected
    assert sorted(re.sub("[ +]run.seed=1", "", s) for s in here.ran) == sorted(expected * 2)
    here.ran.clear()
    ended(f"{table} --seeds 2")
    assert here.ran == []


def test_a_path_takes_the_place_of_a_stage_and_only_tasks_with_labels_are_run(here):
    shutil.rmtree("labels/VA_Estimation_Challenge")
    torch.save({"model": {}}, "vit.pt")
    ended("folds --set features.checkpoint=vit.pt")
    assert [line.split(" features")[0] for line in here.ran[:3]] == [FEATURES, *TRAIN[1:]]
    assert len(here.ran) == 11 and list(stored("folds")) == ["expr fold", "au fold"]
    rows = list(experiments.plan("ablation", load("my.yaml", ["finetune.start=a b.pt"]), range(1), {}))
    assert rows[2][2].features.checkpoint == "a b.pt"                     # without fine-tuning


def test_a_failure_ends_it_with_the_command_and_the_next_start_runs_the_rest(here):
    here.fails = f"{TRAIN[1]} {TCN}"
    command = f"torchrun --nproc_per_node=2 train_task.py --task expr --config my.yaml --set {TCN}"
    assert ended("ablation --seeds 2", True).endswith(f"code 2; start again to go on:\n  {command}\n")
    done, here.ran, here.fails = here.ran[:-1], [], None
    said = ended("all --seeds 2 --dry-run").splitlines()
    assert [len(said), len(set(said)), sum(line[:6] == "done  " for line in said)] == [126, 126, 9]
    assert here.ran == [] and not list(Path("runs/my").glob("*.txt"))
    ended("ablation --seeds 2")
    assert done + here.ran[:len(ABLATION) - len(done)] == ABLATION
    path = Path("runs/my/finetune/made_of.json")                          # an encoder that was made anew:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": 1}))
    here.ran, here.fails = [], FEATURES
    assert FEATURES in ended("ablation --seeds 2", True) and here.ran == [FEATURES]     # its stage says why


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_ends_all_when_the_stages_have_saved(monkeypatch, number):
    told, before = [], signal.getsignal(number)
    child = SimpleNamespace(poll=lambda: os.kill(os.getpid(), number), wait=lambda: told.append("has ended"),
                            terminate=lambda: told.append("to end"))
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: child)
    jobs = {name: experiments.Job(False, f"python {name}.py", set()) for name in "xyz"}
    with pytest.raises(ValueError, match="was stopped; start again to go on:\n  python x.py"):
        experiments.run(jobs, 2)
    assert told == ["to end"] * 2 + ["has ended"] * 2 and signal.getsignal(number) == before


@pytest.mark.parametrize("table, expected", [("ablation", ABLATION), ("systems", SYSTEMS)])
def test_without_a_gpu_two_run_at_a_time_each_when_what_it_reads_is_there(here, monkeypatch, table, expected):
    monkeypatch.setattr(distributed, "choose_device", lambda device: torch.device("cpu"))
    here.polls = 3
    ended(f"{table} --seeds 2")
    assert sorted(re.sub("[ +]run.seed=1", "", s) for s in here.ran) == sorted(expected * 2)
    assert here.most == 2


def test_of_two_at_a_time_the_one_that_fails_says_why_and_ends_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    codes = {"works": "here.mkdir(); time.sleep(60); (here / 'too late').touch()",
             "fails": "[time.sleep(0.1) for _ in range(300) if not here.exists()]; print(3 * threads); 1 / 0"}
    head = ("import os, pathlib, time; threads = os.environ['OMP_NUM_THREADS']; "
            f"here = pathlib.Path('{tmp_path}/x'); ")
    jobs = {name: experiments.Job(False, shlex.join(["python", "-c", head + code]), set())
            for name, code in codes.items()}
    with pytest.raises(ValueError, match="ended with code 1"):
        experiments.run(jobs, 2)
    said, threads = capsys.readouterr().out, str(max(1, os.cpu_count() // 2))
    assert "ZeroDivisionError" in said and f"\n{3 * threads}\n" in said and said.count("of 2$ python") == 2
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("words, refused", [
    ("nothing", "got 'nothing', --seeds 3; expected folds, "), ("ideas --seeds 1", "got 'ideas', --seeds 1"),
    ("ideas --shared-encoder", "'ideas_shared'"), ("--seeds 2", "got ''"),
    ("systems --set data.s_aff_wild2= --set data.drawn_faces=", "data for it")])
def test_what_makes_no_sense_is_refused_in_one_line(here, words, refused):
    said = ended(words, True)
    assert said.startswith("error: ") and refused in said and said.count("\n") == 1


def sums_of(place):                                                       # (seeds, videos, ...)
    return np.array([stored(place + seed)["video_sums"] for seed in ("", "+run.seed=1")])


def cell(ours, theirs, metric) -> list:
    scores = [metric.score(of_seed.sum(axis=0)).mean() for of_seed in ours]
    change = [] if ours is theirs else metrics.difference(ours, theirs, metric)
    return [sum(scores) / 2, abs(scores[0] - scores[1]) / np.sqrt(2), *change]      # √Σ(x - mean)² / (2 - 1)


def test_cells_are_mean_deviation_and_the_paired_difference_with_its_interval(here):
    said = ended("ablation --seeds 2")
    found, heads = stored("ablation")["ablation"], ("VA mean CCC", "Expr macro F1", "AU mean F1")
    for (name, task), head in zip(TASKS.items(), heads):
        whole, tcn = sums_of(f"task_{name}"), sums_of(f"task_{name}+temporal.tcn=false")
        assert found["nothing"][head] == pytest.approx(cell(whole, whole, task.metric))
        assert found["TCN"][head] == pytest.approx(cell(tcn, whole, task.metric))
    text = Path("runs/my/ablation.txt").read_text()
    assert text.startswith(f"ablation | {' | '.join(heads)}\n--- | --- | --- | ---\nnothing | ")
    assert experiments.markdown("t", {"a": {"x": [0.6943, 0, 0.3, -1, 0.0004], "y": []}}) == (
        "t | x\n--- | ---\na | .694 ± .000, +.300 [-1.000, +.000]")
    assert said.endswith(f"\n{text}\nwritten to runs/my/ablation.txt and .json\n") and len(found) == 9
    places = ["task_va+temporal.tcn=false+temporal.transformer=false", "task_va+temporal.transformer=false",
              "task_va"]
    scores = [[TASKS["va"].metric.score(np.array(sums)).mean() for sums in stored(place)["video_sums"]]
              for place in places]
    best = max(range(4), key=lambda v: min(scores[1][v] - scores[0][v], scores[2][v] - scores[1][v]))
    assert here.drawn[:3] == [(place, f"va{best}", f"va{best}", note)
                              for place, note in zip(places, experiments.SHOWN.values())]
    assert Image.open("runs/my/ablation_va.png").size == (4, 9) and len(here.drawn) == 9
    path = Path("runs/my/task_au+temporal.tcn=false+run.seed=1/metrics.json")
    path.write_text(path.read_text().replace('"au1"', '"x"'))
    assert "error: ablation, au: the rows were scored on different" in ended("ablation --seeds 2", True)


def test_an_idea_is_compared_on_its_own_task_and_each_system_in_its_part(here):
    ended("ideas --seeds 2")
    ended("systems --seeds 2")
    found, idea = stored("systems"), cell(sums_of("task_au+temporal.dropout=0"), sums_of("task_au"), AU)
    assert stored("ideas")["ideas"]["dropout of 0, au"] == {"AU mean F1": pytest.approx(idea)}
    emma_au, alone = [emma.by_task(sums_of(f"emma{row}"))["au"] for row in ("", "+emma.weights=0-0-1")]
    assert found["EMMA"]["a task alone, au"] == {"AU mean F1": pytest.approx(cell(alone, emma_au, AU))}
    faces = np.array([[stored(f"cotex+cotex.views=1{seed}")["confusion"]] for seed in ("", "+run.seed=1")])
    assert found["CoTEX"]["one masked view"]["F1 on real faces"] == pytest.approx(cell(faces, faces, F1))
    both = sums_of("task_au")[:, 1:]                                   # the videos that EMMA is scored on too
    first, second = (row["AU mean F1"] for row in found["time"].values())
    assert first == pytest.approx(cell(both, both, AU)) and second == pytest.approx([*first, 0, 0, 0])
    ended("systems --seeds 2 --set data.s_aff_wild2=")
    assert list(stored("systems")) == ["CoTEX"] and "EMMA" not in Path("runs/my/systems.txt").read_text()


@pytest.mark.parametrize("table", ["folds", "folds_shared"])
def test_folds_have_encoders_of_their_own_or_share_one_and_the_table_has_each_folds_numbers(here, table):
    shared, expected = table == "folds_shared", []
    ended("folds --shared-encoder" if shared else "folds")
    for k in range(5):
        fold = [f"finetune.fold={k}"] * (not shared) + [f"task.fold={k}"]
        expected += lines((LENT if k == 0 else [] if shared else LENT[1:]) + TRAIN, *fold)
    assert here.ran == expected
    for name, task in TASKS.items():
        rows, scores, paper = stored(table)[f"{name} fold"], [], task.paper["mean"]
        for k in range(5):
            place = f"task_{name}" + (f"+finetune.fold={k}" * (not shared) + f"+task.fold={k}") * (k > 0)
            found, tuned = stored(place), {scene(v) for v in tuned_on(read_record(f"runs/my/{place}"))}
            new = [n for n, video in enumerate(found["videos"]) if scene(video) not in tuned]
            unseen = task.metric.score(np.array(found["video_sums"])[new].sum(axis=0)).mean()
            assert rows[f"{k}"] == {
                "score": [found["score"], 0.125, 0.875], "unseen": pytest.approx([unseen] * bool(new)),
                "chance": [0.25], "paper": [paper[k]], "baseline": [task.baseline["mean"]] * (k == 0)}
            assert (len(new) == len(found["videos"])) == (not shared or name != "expr" or k == 0)
            scores.append(found["score"])
        assert rows["mean"]["score"] == pytest.approx([np.mean(scores), np.std(scores) * np.sqrt(5 / 4)])
        assert rows["mean"]["chance"] == [0.25, 0] and "baseline" not in rows["mean"]
    found |= {"comparable": False, "score_interval": None}                                   # of AU's fold 4
    Path("runs/my", place, "metrics.json").write_text(json.dumps(found))
    here.ran.clear()
    text = ended("folds --set task.fold=3" + (" --shared-encoder" if shared else " --set finetune.fold=2"))
    text = text.split("au fold")[1].splitlines()                          # both are set for each fold anyway
    assert here.ran == [] and text[0] == " | score | unseen | chance | paper | baseline"
    assert re.fullmatch(r"0 \| \.\d{3} \[\.125, \.875\] \| \.\d{3} \| \.250 \| \.576 \| \.390", text[2])
    assert re.fullmatch(r"4 \| \.\d{3} \| \.\d{3} \| \.250 \| - \| -", text[6])
