"""Every command in README, docs, configurations and headers of files works, and what these name exists.

Quick: a script parses the arguments and loads the settings itself; it is stopped where its work would begin.
Slow: the commands run to their end, with tiny settings in place of those of the configurations.
"""

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.run import get_args_parser

import tiny
from engine.settings import SECTIONS, SETTINGS, Pretrain, Run, Vit
from labels import AU, EXPR, VA
from tools import benchmark

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CODE = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")])
        if path.parent.name != "tests"]
COMMAND = re.compile(r"(python|torchrun|pytest|pip|cp|--set) ")
ALONE = "python mae.py", "python vit.py"               # seconds each
# What stands for names in capitals, and for files that a reader would have.
EXAMPLES = {
    "labels FILE": "labels/1.txt", "tools.predictions FILE": "expr.csv", "tools.predictions FOLDER": "labels",
    "tools.submission FILE": "template.txt", "tools.submission predictions.csv": "va.txt",
    "datasets.faces FOLDER": "data/RAF-DB", "predict FOLDER": "data/Aff-Wild2/cropped_aligned",
    "datasets.s_aff_wild2 FILE": "data/ABAW4/training_set_annotations.txt",
    "train_finetune finetune.start=FILE": "finetune.start=runs/demo/pretrain/last.pt",
    "pictures RUN_FOLDER": "runs/demo/task_au", "evaluate somewhere/best.pt": "runs/demo/task_va/best.pt",
    "second_paper.train_cnn stills.start=FILE": "stills.start=runs/demo/stills/best.pt"}
HEAD, ROWS = ",".join(EXPR.outputs), "image_location,valence,arousal\n124/00001.jpg,0.5,-0.5\n"
FILES = {"labels/1.txt": f"{HEAD}\n0\n1\n", "expr.csv": f"image_location,{HEAD}\n1/00001.jpg,0\n",
         "template.txt": "124/00001.jpg,\n", "va.txt": ROWS, "predictions.txt": ROWS}


# ---- Where the commands are

def header(path) -> str:
    """What stands at the top of a file."""
    text = path.read_text()
    return ast.parse(text).body[0].value.value if path in CODE else "\n".join(re.findall("(?m)^#(.*)", text))


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


TEXTS = [page.read_text() for page in PAGES] + [header(path) for path in CODE + CONFIGS]
LINES = [re.sub("^--set ", "python -m engine.config --set ", code) for text in TEXTS
         for code in blocks(text) + inline(text) if COMMAND.match(code)]
COMMANDS = dict.fromkeys(shlex.join(shlex.split(part, comments=True))
                         for line in LINES for part in line.split(" && "))
for named in ("python -m tools.predictions", "python -m engine.config --set section.field=value"):
    COMMANDS.pop(named, "")                                    # these are not meant to be typed


def script_of(command: str) -> tuple[str, list[str]]:
    """-> the module that a python or torchrun command starts, and its arguments"""
    program, *words = shlex.split(command)
    if program == "torchrun":
        given = get_args_parser().parse_args(words)
        words = ["-m"] * given.module + [given.training_script, *given.training_script_args]
    name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    return name, [EXAMPLES.get(f"{name} {word}", word) for word in arguments if word != "..."]


# ---- Trying them

def furnish(folder):
    (folder / "labels").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a new checkout, with my.yaml and the scores that are promised."""
    folder = tmp_path_factory.mktemp("place")
    furnish(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my.yaml").write_text((ROOT / "configs/paper.yaml").read_text())
    for task, (least, _) in benchmark.PROMISED.items():
        (folder / f"runs/demo/task_{task}").mkdir(parents=True)
        (folder / f"runs/demo/task_{task}/metrics.json").write_text(f'{{"score": {least}, "chance": 0}}')
    return folder


def begin(place, command: str) -> tuple[object, str]:
    """Run a script in this process until its work begins. -> exit code, what it said, or that it began"""
    module, arguments = script_of(command)
    file, said, code = ROOT / f"{module.replace('.', '/')}.py", io.StringIO(), 0
    stops = [mock.patch(name) for name in ("engine.distributed.launch", "pipeline.launch", "shutil.rmtree",
                                           "engine.config.print_all")]
    stops += [mock.patch(name, side_effect=SystemExit(0)) for name in ("engine.distributed.Team",
                                                                       "subprocess.Popen")]
    with (contextlib.ExitStack() as stack, contextlib.chdir(place), contextlib.redirect_stdout(said),
          contextlib.redirect_stderr(said), mock.patch("sys.argv", [str(file), *arguments])):
        begun = [stack.enter_context(stop) for stop in stops]
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return code, said.getvalue() or "its work began" * any(stop.called for stop in begun)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ALONE])
def test_a_command_that_a_reader_finds_is_accepted(place, command):
    program, *words = shlex.split(command)
    if program in ("pip", "cp"):
        assert all((ROOT / word).is_file() for word in words if "." in word and word != "my.yaml")
    elif program == "pytest":
        assert "-m" not in words or f"\n    {words[-1]}: " in (ROOT / "pytest.ini").read_text()
    else:
        code, said = begin(place, command)
        assert code == 0 and said, said


def test_a_wrong_script_argument_or_setting_is_found(place):
    for command in ("train_task.py", "evaluate.py --seed 1", "-m engine.config --set task.speed=3"):
        assert begin(place, f"python {command}")[0] == 2
    pytest.raises(FileNotFoundError, begin, place, "python nowhere.py")


@pytest.mark.slow
def test_every_command_runs_to_its_end_and_so_does_the_python_shell(tmp_path):
    tiny.write(tmp_path, run={"name": "demo"}, synthetic={"val_videos": 5},
               temporal={"channels": [8] * 3, "kernels": [3] * 3, "dilations": [1, 2, 4]})
    furnish(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("my.yaml", *[f"configs/{path.name}" for path in CONFIGS]):
        (tmp_path / name).write_text((tmp_path / "tiny.yaml").read_text())
    works = [script_of(command) for command in COMMANDS if command.startswith(("python", "torchrun"))]
    for module, arguments in sorted(works, key=lambda work: "train_" not in work[0]):
        (tmp_path / "predictions.csv.json").unlink(missing_ok=True)      # another command, another table
        (tmp_path / "predictions.csv").unlink(missing_ok=True)
        if module != "tools.benchmark":                        # tests/test_benchmark.py
            tiny.done(tmp_path, module, *arguments, *["--dry-run"] * (module == "tools.experiments"))
    with contextlib.chdir(tmp_path):
        exec(README.read_text().split("```python\n")[1].split("```")[0], names := {})
    assert names["va"].predict(names["features"]).shape == (len(names["features"]), 2)


# ---- What the pages say

@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_a_file_that_can_be_run_has_its_command_in_its_header(path):
    lines = [line.split(" #")[0] for line in blocks(header(path)) if COMMAND.match(line)]
    own = {".".join(path.relative_to(ROOT).with_suffix("").parts)}
    assert {script_of(line)[0] for line in lines} == (own if "__name__ ==" in path.read_text() else set())


def test_readmes_commands_are_those_of_ci_its_tree_names_every_file_of_code_once_and_the_pages_are_short():
    text, named, ci = README.read_text(), [], (ROOT / ".ci/run").read_text()
    assert [line for line in ci.splitlines() if " && " in line] == blocks(text)[1::-1]
    for line in text.split("## Reading order")[1].split("```")[1].splitlines():
        folder = "".join(re.findall(r"^\w+/", line))
        named += [folder + name for name in re.findall(r"\w+\.py", line)]
    assert sorted(named) == [str(path.relative_to(ROOT)) for path in CODE]
    count = [len(page.read_text().split()) for page in PAGES]
    assert count[0] <= 1100 and len(count[1:]) <= 9 and sum(count[1:]) <= 8000
    assert [line for page in PAGES for line in page.read_text().splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES + CODE + CONFIGS, ids=lambda path: path.name)
def test_links_files_settings_and_functions_that_are_named_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text) if page in PAGES else []
    assert [link for link in links if not (page.parent / link).exists()] == []
    for name in re.findall(r"docs/\w+\.\w+|configs/\w+\.yaml|tests/\w+\.py", text):
        assert (ROOT / name).exists(), name
    for code in inline(text) if page in PAGES else []:
        module, _, name = code.partition("=")[0].rpartition(".")
        file = ROOT / f"{module.replace('.', '/')}.py"
        if re.fullmatch(r"([\w.]+/)*\w+\.py", code):
            assert (ROOT / code).exists(), code
        elif module in SECTIONS and name.isidentifier():
            assert f"{module}.{name}" in SETTINGS, code
        elif name.isidentifier() and name not in ("json", "csv") and file.exists():
            assert hasattr(importlib.import_module(module), name), code


def test_the_numbers_on_the_pages_are_those_of_the_code():
    demo, running = (" ".join((ROOT / f"docs/{name}.md").read_text().split()) for name in ("demo", "running"))
    promised, constant = zip(*benchmark.PROMISED.values())
    assert f"(AU {AU.zero_loss:.3f}, Expr {EXPR.zero_loss:.3f}, VA {VA.zero_loss:.3f})" in demo
    assert "VA ≥ {:.2f}, Expr ≥ {:.2f}, AU ≥ {:.2f}".format(*promised) in demo
    assert "at most {:.2f}, {:.2f} and {:.2f}".format(*constant) in demo
    share, piece, side, workers = Pretrain().batch // 2, Run().largest_piece, Vit().image_size, Run().workers
    size = share * (3 * side ** 2 + 4 * (side // Vit().patch) ** 2)               # uint8, and float32 noise
    assert f"effective batch {2 * share} = {piece} x {share // piece} accumulation x 2 processes" in running
    memory = f"{size / 1e6:.0f} MB = {workers * 2 * size / 1e9:.1f} GB per process"
    assert f"{workers} workers x 2 batches x {memory}" in running
    rows = [line.split(" | ") for line in (ROOT / "docs/choices.md").read_text().splitlines()]
    for title, task, name in (("valence CCC", VA, "valence"), ("arousal CCC", VA, "arousal"),
                              ("Expr F1", EXPR, "mean"), ("AU F1", AU, "mean")):
        [cells] = [row[1:] for row in rows if row[0] == title]                    # validation/test
        assert [float(cell.split("/")[0]) for cell in cells] == [*task.paper[name], task.baseline[name]]
