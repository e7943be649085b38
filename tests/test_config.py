"""Settings: the paper's numbers by default, typed, checked; all that is wrong is refused at once."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config import (BELOW_ONE, HIGHEST, MAY_BE_ZERO, as_yaml, from_command_line, load,
                           print_all, value_of)
from engine.settings import SECTIONS, SETTINGS, Config
from pipeline import INPUTS

ROOT = Path(__file__).parent.parent
PAPERS = """
vit: {image_size: 224, patch: 16, dim: 768, depth: 12, heads: 12}
pretrain: {decoder_dim: 512, decoder_depth: 8, decoder_heads: 16, mask_ratio: 0.75, norm_pix_loss: false,
           epochs: 500, batch: 1024, lr: 0.0005, betas: [0.9, 0.95], clip: 0.0}
finetune: {fold: 0, batch: 256, lr: 0.0001, betas: [0.9, 0.999], layer_decay: 1.0, drop_path: 0.0, clip: 0.0}
segments: {window: 300, stride: 200}
temporal: {channels: [768, 256, 128], kernels: [5, 5, 5], dilations: [1, 2, 4], causal: true, dropout: 0.3}
task: {fold: 0, epochs: 0, held_out: 0.0, batch: 32, lr: 0.00003, weight_decay: 0.00001, warmup_epochs: 1.0}
"""
REFUSED = {                                        # {what is expected: overrides that are something else}
    "a finite number": ["task.lr=fast", "task.lr=", "task.lr=true", "task.lr=.nan", "task.lr=" + "1" * 400],
    "a whole number": ["task.batch=1.0", "task.batch=true", "temporal.kernels=[3, x, 3]"],
    "true or false": ["temporal.tcn=1"], "text; put numbers in quotes": ["run.name=[a]", "run.name=12"],
    r"a list like \[1, 2\]": ["data.frames=a"], "one of mean, cls": ["finetune.token=Mean"],
    "more than 0": ["task.lr=0", "task.lr=-1e-4", "task.batch=0", "temporal.kernels=[3, 0, 3]", "vit.patch=0",
                    "pretrain.mask_ratio=0", "pretrain.betas=[-0.1, 0.9]", "finetune.layer_decay=0"],
    "0 or more": ["run.seed=-1", "task.weight_decay=-1", "task.epochs=-1", "emma.weights=[1, -1, 1]"],
    "a number below 1": ["temporal.dropout=1", "finetune.drop_path=1", "cotex.mask_ratio=1",
                         "emma.betas=[.9, 1]", "task.held_out=1"],
    "at most 1": ["pretrain.smallest_crop=1.5", "finetune.layer_decay=1.01"], "at most 4": ["task.fold=5"],
    "one that is not 0": ["emma.weights=[0,0,0]"], "3 numbers": ["emma.weights=[1, 1]", "vit.std=[1,1,1,1]"],
    "2 numbers": ["finetune.betas=[0.9]"], "2 or more": ["stills.width=1"],
    "a multiple of its 3 heads and of 4": ["vit.dim=18 --set vit.heads=3"],
    "a multiple of vit.patch=16": ["vit.image_size=225"],
    "a multiple of its 5 heads and of 4": ["vit.dim=768 --set vit.heads=5", "vit.dim=10 --set vit.heads=5",
                                           "pretrain.decoder_dim=512 --set pretrain.decoder_heads=5"],
    "one entry per level, as in kernels and dilations": [
        "temporal.channels=[] --set temporal.kernels=[] --set temporal.dilations=[]"],
    "a multiple of its 3 heads": ["temporal.width=512 --set temporal.heads=3"],
    "odd sizes with causal=false": ["temporal.kernels=[4, 4, 4] --set temporal.causal=no"]}
PROBLEMS = [
    "taks.lr: no such setting; nearest: task.lr", "task.batch: got 'many', expected a whole number",
    "run: expected settings below it, got", "1.a: no such setting",
    "segments.strde: no such setting; nearest: segments.stride", "zzz.qqq: no such setting",
    "--set oops: expected section.field=value", "task: no such setting; nearest: ",
    "--set run.name=2024-13-45: the value is not plain YAML", "--set run.name=[[[", "--set run.name=!!python",
    "segments.stride: got 301, expected at most segments.window=300, so that all frames are covered",
    "temporal.channels: got [768, 256, 128], expected one entry per level, as in kernels and dilations"]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.yaml").write_text("{}")
    return tmp_path / "mine.yaml"


def test_the_defaults_are_the_papers_numbers():
    papers = Config()
    for section, expected in yaml.safe_load(PAPERS).items():
        found = vars(getattr(papers, section))
        assert {name: found[name] for name in expected} == expected
        assert [type(found[name]) for name in expected] == list(map(type, expected.values()))
    papers.temporal.channels.append(1)
    assert papers.temporal.channels != Config().temporal.channels          # two configurations share no list


def test_every_setting_stands_beside_its_documentation_and_every_limit_has_a_setting():
    """A comment on the field's own line, or on that of the section which it is inherited from."""
    documented, section = set(), ""
    for line in (ROOT / "engine/settings.py").read_text().splitlines():
        section = line[6:].split("(")[0].rstrip(":") if line.startswith("class ") else section
        documented |= {(section, name) for name in re.findall(r"^    (\w+): .*  # .{6}", line)}
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            assert documented & {(of.__name__, field.name) for of in section.__mro__}, f"{name}.{field.name}"
    names = {*SETTINGS, *(name.split(".")[1] for name in SETTINGS)}
    assert names.issuperset([*MAY_BE_ZERO, *BELOW_ONE, *HIGHEST])


@pytest.mark.parametrize("override, value", {
    "task.lr=1e-4": 1e-4, "task.lr=2": 2.0, "task.lr=.5": .5, "run.seed=7": 7, "task.warmup_epochs=0": 0.0,
    "temporal.tcn=no": False, "temporal.channels=[ 8, 16,4 ]": [8, 16, 4], "task.held_out=0": 0.0,
    "data.frames=[a, b c/d]": ["a", "b c/d"], "data.frames=[]": [], "pretrain.betas=[0.5, 1e-3]": [.5, 1e-3],
    "task.features=": "", "run.name=null": "mine", "run.name='12'": "12", "run.name=größe 表情": "größe 表情",
    "data.labels=a=b": "a=b", "finetune.token=cls": "cls", "pretrain.smallest_crop=1.0": 1.0,
    "task.epochs=0": 0, "task.fold=4": 4, "finetune.layer_decay=1": 1.0, "cotex.js_weight=0": 0.0,
    "segments.stride=300": 300, "emma.weights=[0, 1, .5]": [0.0, 1.0, .5], "cotex.mask_ratio=0": 0.0,
    "finetune.clip=0": 0.0, "run.workers=0": 0, "temporal.kernels=[4, 4, 4]": [4, 4, 4]}.items())
def test_an_override_is_typed(file, override, value):
    got = value_of(load(file, [override]), override.split("=")[0])
    assert got == value and type(got) is type(value)


def test_the_command_line_wins_over_the_file_and_what_differs_is_known(file):
    file.write_text("task: {lr: 1.0e-3, batch: 4}\nsegments: {window: 10, stride: 5}")
    overrides = ["task.lr=2e-3", "segments.stride=7", "task.lr=3e-3", "task.batch=4", "data.frames=[a, b c]"]
    config = load(file, overrides)
    assert (config.task.lr, config.segments.window, config.segments.stride) == (3e-3, 10, 7)
    assert config.changed == {"data.frames": ["a", "b c"], "segments.stride": 7, "task.lr": 3e-3}
    assert shlex.split(config.words) == [str(file), *(word for text in overrides for word in ("--set", text))]


def test_a_tilde_is_the_home_folder_in_every_path(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {name for name, field in SETTINGS.items() if name.startswith("data.") and field.type is str}
    paths |= {*INPUTS, "synthetic.root", "run.out"}
    config = load(file, [f"{name}=~/x" for name in paths] + ["data.frames=[~/a, b~]"])
    assert {value_of(config, name) for name in paths} == {"/home/me/x"}
    assert config.data.frames == ["/home/me/a", "b~"]


def test_what_is_written_as_yaml_is_plain_and_reads_back_the_same(file):
    first = load(file, ["run.name='é [1]: x'", "task.lr=1e-7", "data.frames=['1e-4', ' x', 'no', '']",
                        "temporal.transformer=false", "finetune.start=none", "data.labels='2024-01-01'",
                        "pretrain.betas=[0.1, 0.30000000000000004]", "run.device=cpu"])
    for config in (first, *map(load, ROOT.glob("configs/*.yaml"))):
        file.write_text(as_yaml(config))
        assert load(file) == config and yaml.safe_load(as_yaml(config)) == dataclasses.asdict(config)


@pytest.mark.parametrize("expected, override", [(words, one) for words, of in REFUSED.items() for one in of])
def test_a_bad_value_is_refused_by_name_with_what_is_expected(file, expected, override):
    name = override.split("=")[0]
    with pytest.raises(ValueError, match=rf"(?s)\n  {name}: got .*expected {expected}(\n|$)"):
        load(file, override.split(" --set "))


def test_all_problems_are_reported_together_a_wrong_name_with_the_nearest_ones(file):
    file.write_text("taks: {lr: 1}\ntask: {batch: many}\nrun: 3\n1: {a: 2}")
    with pytest.raises(ValueError, match="mine.yaml: 13 problem.s. in the settings") as refusal:
        load(file, ["segments.strde=5", "zzz.qqq=1", "oops", "task=1", "run.name=2024-13-45",
                    "run.name=" + "[" * 1000, "run.name=!!python/object/apply:os.abort []",
                    "segments.stride=301", "temporal.kernels=[3]"])
    lines = str(refusal.value).splitlines()[1:]
    assert [line.strip()[:len(start)] for line, start in zip(lines, PROBLEMS, strict=True)] == PROBLEMS


@pytest.mark.parametrize("text, message", {
    "- a": "expected sections like 'task: {lr: 3e-5}', got list", "task:": "task: expected settings below it",
    "a: b: c": "not plain YAML", "? [a]\n: b": "not plain YAML", "\0": "not plain YAML",
    "run: {name: !!python/object/apply:os.mkdir [ran]}": "not plain YAML: could not determine"}.items())
def test_a_file_that_holds_no_settings_or_a_program_is_refused_by_name(file, text, message, monkeypatch):
    monkeypatch.chdir(file.parent)
    file.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)mine.yaml: .*{message}"):
        load(file)
    assert not (file.parent / "ran").exists()


def test_scripts_take_settings_and_own_arguments_and_bad_ones_end_with_code_2(monkeypatch, capsys, file):
    def started(*words):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", ["x.py", "--task", "au", *words])
        return from_command_line("what it does", task={"choices": ["va", "au"], "required": True})

    config, options = started("--config", str(file), "--set", "task.lr=1e-3", "--set", "run.seed=3")
    assert (config.task.lr, config.run.seed, config.run.name, options.task) == (1e-3, 3, "mine", "au")
    for words, message in ((["--set", "task.lrr=1"], "demo.yaml: .*task.lrr: no such setting; nearest: task"),
                           (["--config", "x"], r"x: cannot be read \(No such file .*; configurations here")):
        with pytest.raises(SystemExit, match="^2$"):
            started(*words)
        assert re.match(f"(?s)error: .*{message}", capsys.readouterr().err)


def test_lines_are_printed_until_one_is_refused_or_the_reader_has_seen_enough(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        print_all(int(text) for text in ("1", "two"))
    assert capsys.readouterr() == ("1\n", "error: invalid literal for int() with base 10: 'two'\n")
    shown = subprocess.run([f"{shlex.quote(sys.executable)} -m engine.config | head -n 1"], shell=True,
                           cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (shown.stdout, shown.stderr) == ("data:\n", "")
