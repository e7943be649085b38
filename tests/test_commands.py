"""Every command in README, in docs and in the header of a file is tried, and what these pages name exists.

A command that needs neither long nor much is run. Of the others, the arguments are parsed and the settings
loaded by the script itself; it is stopped where its work would begin.
"""

import ast
import configparser
import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import benchmark
import benchmark_device
import distributed
import pipeline
import synthetic
from config import load
from cnn import ResNet18
from dan import DAN
from distributed import Team
from labels import EXPR, TASKS, label_files
from settings import SETTINGS, Synthetic
from training import effective_batch, pieces, vit_bytes

ROOT = Path(__file__).parent.parent
MODULES = sorted(ROOT.glob("*.py"))
README = ROOT / "README.md"
CLUSTER = ROOT / "docs/cluster.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COMMAND = re.compile(r"(python|torchrun|pytest|pip|cp) ")

# What stands for a name in capitals, in the folder `place`.
EXAMPLES = {"images.py FILE": "data/Aff-Wild2/cropped_aligned/1-30-1280x720/00001.jpg",
            "labels.py FILE": "data/Aff-Wild2/annotations/AU_Detection_Challenge/Train_Set/1-30-1280x720.txt",
            "faces.py FOLDER": "data/RAF-DB",
            "class_folders.py FOLDER": "classes",
            "checkpoints.py FILE": "some.pt",
            "dan_weights.py FILE": "dan.pt",
            "evaluate.py FILE": "some.pt",
            "metrics.py FILE": "some.csv",
            "stills.py FILE": "stills.pt",
            "s_aff_wild2.py FILE": "training_set_annotations.txt",
            "metrics.py FOLDER": "data/Aff-Wild2/annotations",
            "predict.py FOLDER": "data/Aff-Wild2/cropped_aligned",
            "submission.py FILE": "template.txt",
            "made_of.py FILE": "some.pt",
            "made_of.py RUN_FOLDER": "runs/demo/task_au",
            "pictures.py RUN_FOLDER": "runs/some"}


# ---- Where the commands are

def header(path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def blocks(text: str) -> list[str]:
    """The lines of code blocks, fenced or indented; a line that ends with a backslash goes on."""
    text, lines, fenced = text.replace("\\\n", " "), [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return lines


def inline(text: str) -> list[str]:
    """What stands between backticks, outside of fenced blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def texts() -> list[str]:
    """What a reader finds: the pages, the headers of files, the comments on top of configurations."""
    found = [path.read_text() for path in PAGES] + [header(path) for path in MODULES]
    for path in CONFIGS:
        comments = [line[1:] for line in path.read_text().splitlines() if line.startswith("#")]
        found.append("\n".join(comments))
    return found


def commands() -> list[str]:
    """Each command once. A comment behind a command is no part of it."""
    found = []
    for text in texts():
        for code in blocks(text) + inline(text):
            if COMMAND.match(code):
                found += [shlex.join(shlex.split(part, comments=True)) for part in code.split(" && ")]
    return list(dict.fromkeys(found))


def words(path) -> str:
    """A page in one line."""
    return " ".join(path.read_text().split())


def fragments() -> list[str]:
    """The settings that stand alone, like `--set task.fold=1`."""
    every = {code for text in texts() for code in inline(text) if code.startswith("--set ")}
    return sorted(every - {"--set section.field=value"})


# ---- Trying them

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a new checkout, with a little data where configs/paper.yaml looks for it, and with
    my.yaml, a copy of that."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    paper = (ROOT / "configs/paper.yaml").read_text()
    (folder / "my.yaml").write_text(paper.replace("data:\n", "data:\n  s_aff_wild2: data/s-Aff-Wild2\n"))
    sizes = Synthetic(root=str(folder / "data"), train_videos=1, val_videos=1, frames=4, faces=10)
    synthetic.draw(sizes.root, sizes)
    synthetic.index(sizes.root, sizes)
    (folder / "classes/ANGRER").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "classes/ANGRER/1.jpg")
    torch.save({"model": {"weight": torch.zeros(3)}}, folder / "some.pt")
    torch.save({"model": DAN().state_dict()}, folder / "dan.pt")
    record = {"stage": "stills", "settings": {}}
    torch.save({"model": ResNet18(8, 2).state_dict(), "made_of": record}, folder / "stills.pt")
    [video] = label_files(folder / "data/Aff-Wild2/annotations", EXPR)["Validation_Set"]
    rows = ["image_location," + ",".join(EXPR.outputs), *[f"{video}/{n:05d}.jpg,0" for n in range(1, 5)]]
    (folder / "some.csv").write_text("\n".join(rows))
    (folder / "template.txt").write_text("136/00001.jpg,\n")
    rows = ["image,valence,arousal,expression,aus", "136/00001.jpg,0.5,-0.5,4" + ",0" * 12]
    (folder / "training_set_annotations.txt").write_text("\n".join(rows))
    (folder / "predictions.txt").write_text("image_location,valence,arousal\n136/00001.jpg,0.5,-0.5\n")
    (folder / "runs/some").mkdir(parents=True)
    (folder / "runs/some/log.csv").write_text("epoch,loss\n1,0.7\n2,0.6\n")
    for task, least in benchmark.PROMISED.items():
        results = folder / f"runs/demo/task_{task}"
        results.mkdir(parents=True)
        (results / "metrics.json").write_text(f'{{"score": {least}, "chance": 0}}')
    return folder


def start(place, script: str, arguments: list[str]) -> tuple[object, str, bool]:
    """Run a script in this process. -> exit code, what it said, whether it came as far as its long work."""
    said, argv, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGCHLD)
    work = [mock.patch.object(pipeline, "run"), mock.patch.object(benchmark_device, "main"),
            mock.patch.object(shutil, "rmtree"),                     # benchmark.py begins anew
            mock.patch.object(subprocess, "run", side_effect=SystemExit(0)),
            mock.patch.object(subprocess, "Popen", side_effect=SystemExit(0))]      # many_runs.py
    alone = script in ("emma_frames.py", "predict.py", "report.py", "submission.py")
    if alone or script in ("synthetic.py", "synthetic_abaw4.py") and "--sheet" not in arguments:
        work.append(mock.patch.object(distributed, "launch"))
    code = 0
    with contextlib.ExitStack() as stack:
        begun = [stack.enter_context(patch) for patch in work]
        stack.enter_context(contextlib.chdir(place))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        try:
            sys.argv = [str(ROOT / script), *arguments]
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = argv
            signal.signal(signal.SIGCHLD, handler)
    return code, said.getvalue(), any(function.called for function in begun)


def try_script(place, script: str, arguments: list[str]):
    assert (ROOT / script).is_file(), f"there is no {script}"
    arguments = [EXAMPLES.get(f"{script} {word}", word) for word in arguments if word != "..."]
    before = {(path, path.stat().st_mtime_ns) for path in place.iterdir()}
    code, said, begun = start(place, script, arguments)
    written = {(path, path.stat().st_mtime_ns) for path in place.iterdir()} - before
    assert code == 0, said
    assert said or begun or written, "it did nothing"


SLOW = ("python intervals.py", "python benchmark.py --scorer",               # a second or more each
        "python emma.py", "python dan.py", "python mae.py", "python vit.py")


@pytest.mark.parametrize("command", [pytest.param(command, marks=[pytest.mark.slow] * (command in SLOW))
                                     for command in commands()])
def test_a_command_that_a_reader_finds_works(place, command):
    program, *words = shlex.split(command)
    if program == "python":
        try_script(place, words[0], words[1:])
    elif program == "torchrun":
        launch = get_args_parser().parse_args(words)
        try_script(place, launch.training_script, launch.training_script_args)
    elif program == "pip":
        assert words[:1] == ["install"] and (ROOT / words[words.index("-r") + 1]).is_file()
    elif program == "cp":
        assert (ROOT / words[0]).is_file() and words[1:] == ["my.yaml"]
    elif program == "pytest":
        settings = configparser.ConfigParser()
        settings.read(ROOT / "pytest.ini")
        markers = [line.split(":")[0] for line in settings["pytest"]["markers"].split("\n")]
        assert "-m" not in words or words[words.index("-m") + 1] in markers
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))


@pytest.mark.parametrize("fragment", fragments())
def test_settings_that_a_reader_finds_are_accepted(place, fragment):
    overrides = [word for word in shlex.split(fragment) if word != "--set"]
    with contextlib.chdir(place):
        load("my.yaml", overrides)


def test_the_command_check_finds_a_wrong_script_argument_and_setting(place):
    for command in ("nowhere.py", "train_task.py --task gender", "train_task.py", "evaluate.py --seed 1",
                    "config.py --set task.speed=3", "config.py --config no.yaml"):
        script, *arguments = command.split()
        with pytest.raises(AssertionError):
            try_script(place, script, arguments)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_file_that_can_be_run_has_its_command_in_its_header(path):
    scripts = [word for code in blocks(header(path)) if COMMAND.match(code) for word in code.split()
               if word.endswith(".py")]
    runs = "__name__ == \"__main__\"" in path.read_text()
    assert set(scripts) == ({path.name} if runs else set())


# ---- What the pages say

def test_readmes_two_commands_are_those_of_ci():
    two = blocks(README.read_text())[:2]
    assert ["train_task.py" in two[0], "pytest" in two[1]] == [True, True]
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in ci if " && " in line] == [two[1], two[0]]


def test_readme_has_at_most_1100_words():
    assert len(README.read_text().split()) <= 1100


def test_readmes_table_and_the_page_of_all_files_name_every_file_once():
    pages = README.read_text() + (ROOT / "docs/files.md").read_text()
    rows = [line for line in pages.splitlines() if " | " in line]
    named = [name for row in rows for name in re.findall(r"`(\w+\.py)`", row)]
    assert sorted(named) == [path.name for path in MODULES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_settings_that_a_page_names_exist(page):
    sections = {name.split(".")[0] for name in SETTINGS}
    for code in inline(page.read_text()):
        if re.fullmatch(r"(tests/)?\w+\.py|configs/.*|docs/.*", code):
            assert (ROOT / code).exists(), code
        elif code.split(".")[0] in sections and re.fullmatch(r"\w+\.\w+(=\S+)?", code):
            assert code.split("=")[0] in SETTINGS or code == "config.yaml", code
        elif re.fullmatch(r"\w+\.\w+", code) and (ROOT / f"{code.split('.')[0]}.py").exists():
            module, name = code.split(".")
            assert name in ("csv", "json") or hasattr(importlib.import_module(module), name), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_number_is_missing_from_a_page(page):
    assert re.findall(r"@@\w+@@", page.read_text()) == []


def test_the_loss_at_chance_is_that_of_outputs_that_are_all_0():
    zero = ", ".join(f"{name} {TASKS[name.lower()].zero_loss:.3f}" for name in ("AU", "Expr", "VA"))
    assert f"({zero})" in words(ROOT / "docs/demo.md")


def test_the_memory_on_the_cluster_page_is_that_of_the_papers_pre_training_on_two_gpus():
    share = 1024 // 2
    batch = share * 224 * 224 * 3 + share * 196 * 4                        # images, and float32 noise
    memory = f"8 workers x 2 batches x {batch / 1e6:.0f} MB = {8 * 2 * batch / 1e9:.1f} GB per process"
    assert memory in words(CLUSTER)
    mae = vit_bytes(50, 768, 12) + vit_bytes(197, 512, 8)
    card = mock.Mock(total_memory=24e9)
    with (mock.patch.object(torch.cuda, "get_device_properties", return_value=card),
          mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True)):
        count = pieces(share, mae, 111_907_840, torch.device("cuda"))
    printed = effective_batch(1024, count, Team(0, 2, torch.device("cuda:0")))
    assert f"`{printed.split(', on ')[0]}` with two cards of 24 GB" in words(CLUSTER)


def test_the_promised_scores_are_those_that_are_checked():
    demo = words(ROOT / "docs/demo.md")
    va, expr, au = benchmark.PROMISED.values()
    assert f"VA ≥ {va:.2f}, Expr ≥ {expr:.2f}, AU ≥ {au:.2f}" in demo
    va, expr, au = benchmark.CONSTANT.values()
    assert f"at most {va:.2f}, {expr:.2f} and {au:.2f}" in demo


def test_the_papers_numbers_are_those_of_the_labels():
    rows = {}
    for line in (ROOT / "docs/choices.md").read_text().splitlines():
        title, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if title.endswith(", validation"):
            rows[title.removesuffix(", validation")] = [float(cell) for cell in cells]
    for title, task, name in (("valence CCC", "va", "valence"), ("arousal CCC", "va", "arousal"),
                              ("Expr F1", "expr", "mean"), ("AU F1", "au", "mean")):
        assert rows[title] == [*TASKS[task].paper[name], TASKS[task].baseline[name]]


def test_no_line_is_longer_than_110_characters():
    kept = [*MODULES, *ROOT.glob("tests/*.py"), *PAGES, *CONFIGS, ROOT / ".ci/run", ROOT / "pytest.ini"]
    long = [f"{path.name}:{number}" for path in kept
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert long == []
