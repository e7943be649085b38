"""The house: which file may import which, what every file has, and that every setting is read."""

import ast
import dataclasses
import graphlib
import re
from pathlib import Path

import pytest

from engine.settings import SECTIONS

ROOT = Path(__file__).parent.parent
# From the bottom up. A file imports from lower floors only, or from its own folder.
FLOORS = ["engine", "metrics vit tcn images", "labels losses mae temporal", "data", "datasets pictures",
          "pipeline", "scoring", "second_paper.cnn second_paper.emma second_paper.cotex",
          "train_pretrain train_finetune extract_features train_task evaluate predict "
          "second_paper.train_cnn second_paper.train_emma second_paper.train_cotex", "tools"]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
# Not deeper, where a virtual environment in a checkout has its files.
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")])
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(), path)
         for path in FILES}
CODE = {name: tree for name, tree in TREES.items() if not name.startswith("tests.")}


def imports(tree) -> dict:
    """{a module of ours: whether all imports of it stand at the top of the file, in a `try` or not}"""
    found, top = {}, tree.body + sum([node.body for node in tree.body if isinstance(node, ast.Try)], [])
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
            node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name: found.get(name, True) and node in top for name in names if name in CODE}
    return found


def test_arrows_go_down_only_there_is_no_circle_and_no_stage_imports_another():
    for module, tree in CODE.items():
        for other, at_the_top in imports(tree).items():
            own, theirs = (FLOOR[name if name in FLOOR else name.split(".")[0]] for name in (module, other))
            in_folder = other.startswith(module.rpartition(".")[0] + ".") and "train_" not in other
            assert theirs < own or theirs == own and in_folder, f"{module} imports {other}"
            assert at_the_top, f"{module} imports {other} inside a function"
    graphlib.TopologicalSorter({module: imports(tree) for module, tree in CODE.items()}).prepare()


@pytest.mark.parametrize("path, tree", list(zip(FILES, TREES.values())), ids=TREES)
def test_no_file_is_long_no_line_is_long_and_every_public_name_has_a_docstring(path, tree):
    lines, is_test = path.read_text().splitlines(), path.parent.name == "tests"
    assert is_test or len(lines) <= 400
    assert [n for n, line in enumerate(lines, 1) if len(line) > 110] == [] and ast.get_docstring(tree)
    for node in tree.body if not is_test else []:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_every_setting_is_read_by_a_file_that_reads_its_section_or_by_what_all_trainings_share():
    read = {}
    for module in CODE.keys() - {"engine.config", "engine.settings"}:
        text = ast.unparse(CODE[module])
        whole = re.findall(r"asdict\(config\.(\w+)\)", text)
        read[module] = {field.name for section in whole for field in dataclasses.fields(SECTIONS[section])}
        read[module] |= set(re.findall(r"\.(\w+)", text)) | set(re.findall(r"getattr\(\w+, '(\w+)'", text))
    for section, kind in SECTIONS.items():
        there = [names for module, names in read.items()
                 if section in names or module in ("engine.run", "engine.training")]
        assert {field.name for field in dataclasses.fields(kind)} <= set().union(*there), section
