"""Settings: the paper's numbers by default, documented and read, typed and checked, refused all at once with
the nearest name."""

import ast
import dataclasses
import io
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml

import config
from config import as_yaml, from_command_line, load
from settings import Config

ROOT = Path(config.__file__).parent
FIELDS = {f"{s.name}.{f.name}": f for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)}


def get(settings, name):
    section, field = name.split(".")
    return getattr(getattr(settings, section), field)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.yaml").write_text("{}")
    return tmp_path / "mine.yaml"


# ---- Defaults and documentation

@pytest.mark.parametrize("name, value", {
    # ViT-B/16, and the original MAE's decoder
    "vit.image_size": 224, "vit.patch": 16, "vit.dim": 768, "vit.depth": 12, "vit.heads": 12,
    "pretrain.decoder_dim": 512, "pretrain.decoder_depth": 8, "pretrain.decoder_heads": 16,
    "pretrain.mask_ratio": 0.75, "pretrain.norm_pix_loss": False, "pretrain.epochs": 500,
    "pretrain.batch": 1024, "pretrain.lr": 5e-4, "pretrain.betas": [0.9, 0.95],
    "finetune.batch": 256, "finetune.lr": 1e-4, "finetune.betas": [0.9, 0.999],
    "segments.window": 300, "segments.stride": 200,
    "temporal.channels": [768, 256, 128], "temporal.kernels": [5, 5, 5], "temporal.dilations": [1, 2, 4],
    "temporal.causal": True, "temporal.tcn": True, "temporal.transformer": True, "temporal.dropout": 0.3,
    "task.batch": 32, "task.lr": 3e-5, "task.weight_decay": 1e-5, "task.warmup_epochs": 1.0,
    "task.fold": 0, "task.epochs": 0,
    "run.device": "auto", "run.largest_piece": 0, "data.synthetic": False}.items())
def test_the_default_is_the_papers_number(name, value):
    assert get(Config(), name) == value and type(get(Config(), name)) is type(value)


def test_what_the_paper_does_not_mention_is_off_unless_it_is_asked_for(file):
    f = Config().finetune
    assert (f.layer_decay, f.drop_path, f.clip) == (1.0, 0.0, 0.0)
    f = load(file, ["finetune.layer_decay=0.65", "finetune.drop_path=0.1", "finetune.clip=0.05"]).finetune
    assert (f.layer_decay, f.drop_path, f.clip) == (0.65, 0.1, 0.05)
    f = load(file, ["finetune.layer_decay=1", "finetune.drop_path=0", "finetune.clip=0"]).finetune
    assert f == Config().finetune


def test_two_configurations_share_no_list():
    Config().temporal.channels.append(1), Config().data.frames.append("x")
    assert Config().temporal.channels == [768, 256, 128] and Config().data.frames == []


def test_every_setting_stands_beside_its_documentation():
    """A comment that begins on the field's own line."""
    text = (ROOT / "settings.py").read_text()
    comments = {token.start[0]: token.string.lstrip("# ")
                for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT}
    documented = set()
    for c in ast.parse(text).body:
        if not isinstance(c, ast.ClassDef) or c.name == "Config":
            continue
        assert ast.get_docstring(c), c.name
        for field in c.body:
            if isinstance(field, ast.AnnAssign):
                assert len(comments.get(field.lineno, "")) > 5, f"{c.name}.{field.target.id}"
                documented.add((c.name, field.target.id))
    fields = {(section.type.__name__, field.name)
              for section in dataclasses.fields(Config) for field in dataclasses.fields(section.type)}
    assert documented == fields


def test_every_setting_is_read_somewhere():
    read = set()
    for file in ROOT.glob("*.py"):
        text = file.read_text()
        tree = ast.parse(text)
        if file.name == "config.py":        # filling and checking a setting is not using it
            continue
        read |= {a.attr for a in ast.walk(tree)
                 if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Load)}
        for section in re.findall(r"asdict\((?:\w+\.)*(vit|temporal)\)", text):
            read |= {f.name for f in dataclasses.fields(type(getattr(Config(), section)))}
    assert [name for name in FIELDS if name.split(".")[1] not in read] == []


def test_each_name_with_a_limit_of_its_own_is_the_name_of_a_setting():
    names = set(FIELDS) | {name.split(".")[1] for name in FIELDS}
    assert names.issuperset([*config.MAY_BE_ZERO, *config.BELOW_ONE, *config.AT_MOST_ONE])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_configuration_that_is_shipped_loads_under_its_own_name(path):
    settings = load(path)
    assert settings.run.name == path.stem and settings.run.source == str(path)
    assert settings.folder("pretrain") == Path("runs") / path.stem / "pretrain"


# ---- Reading

def test_an_empty_file_gives_the_defaults_under_the_files_name(file):
    expected = Config()
    expected.run.name, expected.run.source = "mine", str(file)
    for text in ("", "{}", "# nothing\n", "\ufeff{}"):
        file.write_text(text)
        assert load(file) == expected


@pytest.mark.parametrize("override, value", {
    "task.lr=1e-4": 1e-4, "task.lr=2": 2.0, "task.lr=.5": .5, "run.seed=7": 7, "task.warmup_epochs=0": 0.0,
    "temporal.tcn=false": False, "temporal.tcn=no": False,
    "temporal.channels=[8]": [8], "temporal.channels=[ 8, 16,4 ]": [8, 16, 4],
    "data.frames=[a, b c/d]": ["a", "b c/d"], "data.frames=[]": [],
    "pretrain.betas=[0.5, 1e-3]": [.5, 1e-3], "finetune.betas=[0.5, 1e-3]": [.5, 1e-3],
    "task.features=": "", "task.features=''": "", "run.name=null": "mine", "run.name='12'": "12",
    "run.name=größe 表情": "größe 表情", "data.labels=a=b": "a=b",
    "finetune.token=cls": "cls", "run.device=cpu": "cpu", "run.device=mps": "mps",
    "pretrain.smallest_crop=1.0": 1.0, "task.epochs=0": 0, "task.epochs=3": 3,
    "emma.weights=[0, 1, 0.5]": [0.0, 1.0, 0.5], "cotex.mask_ratio=0": 0.0, "cotex.js_weight=0": 0.0,
    "run.largest_piece=0": 0, "run.largest_piece=16": 16}.items())
def test_an_override_is_typed(file, override, value):
    kinds = {"temporal.channels=[8]": ["temporal.kernels=[5]", "temporal.dilations=[1]"]}.get(override, [])
    got = get(load(file, [override, *kinds]), override.split("=")[0])
    assert got == value and type(got) is type(value)


def test_the_command_line_wins_over_the_file_and_the_last_override_over_the_first(file):
    file.write_text("task: {lr: 1.0e-3, batch: 4}\nsegments: {window: 10, stride: 5}")
    settings = load(file, ["task.lr=2e-3", "segments.stride=7", "task.lr=3e-3"])
    assert (settings.task.lr, settings.task.batch) == (3e-3, 4)
    assert (settings.segments.window, settings.segments.stride) == (10, 7)


def test_a_suggested_command_repeats_what_the_user_typed(file):
    overrides = ["task.lr=1e-3", "data.frames=[a, b c]"]
    words = shlex.split(load(file, overrides).run.source)
    assert words == [str(file), "--set", overrides[0], "--set", overrides[1]]


def test_a_tilde_is_the_home_folder_in_every_path_and_in_nothing_else(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {name for name, field in FIELDS.items() if name.startswith("data.") and field.type is str}
    paths |= {"synthetic.root", "run.out", "finetune.start", "features.checkpoint", "task.features"}
    file.write_text("data: {frames: ['~/a', b~, ~/c], folders: ['~']}\nrun: {name: ~/mine}")
    settings = load(file, [f"{name}=~/x" for name in paths])
    assert {get(settings, name) for name in paths} == {"/home/me/x"}
    assert settings.data.frames == ["/home/me/a", "b~", "/home/me/c"]
    assert settings.data.folders == ["/home/me"]
    assert settings.run.name == "~/mine" and "data.labels=~/x" in settings.run.source


def test_what_is_written_as_yaml_reads_back_the_same(file):
    first = load(file, ["run.name='é [1]: x'", "task.lr=1e-7", "data.frames=['1e-4', ' x', 'no', 'null', '']",
                        "temporal.transformer=false", "finetune.start=none", "data.labels='2024-01-01'",
                        "pretrain.betas=[0.1, 0.30000000000000004]", "run.device=cpu"])
    copy = file.with_name("copy.yaml")
    copy.write_text(as_yaml(first))
    second = load(copy)
    assert second.run.source == str(copy)
    second.run.source = first.run.source
    assert second == first and as_yaml(second) == as_yaml(first)


# ---- Refusals

@pytest.mark.parametrize("override, message", {
    "task.lrr=1": r"task\.lrr: no such setting; nearest: task\.lr",
    "tasks.lr=1": r"tasks\.lr: no such setting; nearest: task\.lr",
    "segments.widow=1": r"segments\.widow: no such setting; nearest: segments\.window",
    "zzz.qqq=1": r"zzz\.qqq: no such setting$",
    "a.b.c=1": r"a\.b\.c: no such setting",
    "task=1": "--set task=1: expected section.field=value",
    "task.lr": "--set task.lr: expected section.field=value",
    "run.name=[": r"--set run\.name=\[: the value is not plain YAML",
    "task.lr=fast": "task.lr: got 'fast', expected a finite number",
    "task.lr=": "task.lr: got '', expected a finite number",
    "task.lr=null": "task.lr: got None, expected a finite number",
    "task.lr=true": "task.lr: got True, expected a finite number",
    "task.lr=.nan": "task.lr: got nan, expected a finite number",
    "task.lr=1e999": "task.lr: got inf, expected a finite number",
    "task.lr=0": "task.lr: got 0.0, expected more than 0",
    "task.lr=-1e-4": "task.lr: got -0.0001, expected more than 0",
    "task.weight_decay=-1": "task.weight_decay: got -1.0, expected 0 or more",
    "task.batch=1.0": "task.batch: got 1.0, expected a whole number",
    "task.batch=true": "task.batch: got True, expected a whole number",
    "task.batch=0": "task.batch: got 0, expected more than 0",
    "run.seed=-1": "run.seed: got -1, expected 0 or more",
    "run.name=[a]": r"run\.name: got \['a'\], expected text",
    "temporal.tcn=1": "temporal.tcn: got 1, expected true or false",
    "temporal.tcn=flase": "temporal.tcn: got 'flase', expected true or false",
    "data.frames=a": "data.frames: got 'a', expected a list like",
    "temporal.kernels=[3, x, 3]": "temporal.kernels: got 'x', expected a whole number",
    "temporal.kernels=[3]": "temporal.channels, kernels and dilations: expected lists of one length",
    "temporal.kernels=[3, 0, 3]": "temporal.kernels: got 0, expected more than 0",
    "finetune.token=Mean": "finetune.token: got 'Mean', expected one of mean, cls; nearest: mean",
    "temporal.dropout=1": "temporal.dropout: got 1.0, expected a share below 1",
    "pretrain.mask_ratio=1": "pretrain.mask_ratio: got 1.0, expected a share below 1",
    "pretrain.smallest_crop=1.5": "pretrain.smallest_crop: got 1.5, expected a share of at most 1",
    "pretrain.betas=[0.9]": r"pretrain\.betas: got \[0\.9\], expected two numbers below 1",
    "pretrain.betas=[0.9, 1.0]": r"pretrain\.betas: got \[0\.9, 1\.0\], expected two numbers below 1",
    "finetune.betas=[0.9]": r"finetune\.betas: got \[0\.9\], expected two numbers below 1",
    "finetune.betas=[1.0, 0.9]": r"finetune\.betas: got \[1\.0, 0\.9\], expected two numbers below 1",
    "finetune.betas=[-0.1, 0.9]": "finetune.betas: got -0.1, expected more than 0",
    "finetune.layer_decay=0": "finetune.layer_decay: got 0.0, expected more than 0",
    "finetune.layer_decay=1.01": "finetune.layer_decay: got 1.01, expected a share of at most 1",
    "finetune.drop_path=1": "finetune.drop_path: got 1.0, expected a share below 1",
    "finetune.drop_path=-0.1": "finetune.drop_path: got -0.1, expected 0 or more",
    "finetune.clip=-1": "finetune.clip: got -1.0, expected 0 or more",
    "finetune.clip=.inf": "finetune.clip: got inf, expected a finite number",
    "pretrain.mask_ratio=0": "pretrain.mask_ratio: got 0.0, expected more than 0",
    "cotex.mask_ratio=1": "cotex.mask_ratio: got 1.0, expected a share below 1",
    "cotex.views=0": "cotex.views: got 0, expected more than 0",
    "emma.betas=[0.9]": r"emma\.betas: got \[0\.9\], expected two numbers below 1",
    "emma.weights=[1, 1]": r"emma\.weights: got \[1\.0, 1\.0\], expected three numbers, of VA, Expr and AU",
    "emma.weights=[0, 0, 0]": r"emma\.weights: got \[0\.0, 0\.0, 0\.0\], expected .*, not all 0",
    "emma.weights=[1, -1, 1]": "emma.weights: got -1.0, expected 0 or more",
    "stills.network=DAN": "stills.network: got 'DAN', expected one of dan, resnet18, vit",
    "segments.stride=301": r"segments\.stride: got 301 > segments\.window=300",
    "vit.image_size=225": r"vit\.image_size: got 225, expected a multiple of vit\.patch=16",
    "vit.heads=5": r"vit\.dim: got 768, expected a multiple of its 5 heads",
    "pretrain.decoder_heads=5": r"decoder_dim: got 512, expected a multiple of its 5 heads and of 4",
    "temporal.heads=3": r"temporal\.width: got 512, expected a multiple of its 3 heads",
    "task.fold=5": r"task\.fold: got 5, expected 0 \(official split\) or 1 to 4",
    "task.fold=-1": "task.fold: got -1, expected 0 or more",
    "task.epochs=-1": "task.epochs: got -1, expected 0 or more",
    "pretrain.epochs=0": "pretrain.epochs: got 0, expected more than 0",
    "finetune.epochs=0": "finetune.epochs: got 0, expected more than 0",
    "run.largest_piece=-1": "run.largest_piece: got -1, expected 0 or more",
    "run.device=gpu": "run.device: got 'gpu', expected one of auto, cpu, cuda, mps; nearest: cpu",
    "data.drawn=true": r"data\.drawn: no such setting",
    "encoder.dim=96": r"encoder\.dim: no such setting; nearest: .*decoder_dim"}.items())
def test_a_bad_override_is_refused(file, override, message):
    with pytest.raises(ValueError, match=f"(?s)mine.yaml: [0-9]+ problem.*{message}"):
        load(file, [override])


def test_centred_kernels_must_be_odd(file):
    assert load(file, ["temporal.kernels=[4, 4, 4]"])
    expected = r"temporal\.kernels: got \[4, 4, 4\], expected odd sizes with causal=false"
    with pytest.raises(ValueError, match=expected):
        load(file, ["temporal.kernels=[4, 4, 4]", "temporal.causal=false"])


def test_segments_may_touch_without_overlap(file):
    assert load(file, ["segments.stride=300"]).segments.stride == 300


def test_the_widths_of_position_embeddings_must_be_multiples_of_4(file):
    with pytest.raises(ValueError, match=r"vit\.dim: got 6, expected a multiple of its 3 heads and of 4"):
        load(file, ["vit.dim=6", "vit.heads=3"])
    assert load(file, ["temporal.width=6", "temporal.heads=3"])


def test_unknown_names_and_wrong_types_are_reported_together(file):
    file.write_text("taks: {lr: 1}\ntask: {lrr: 1, batch: many}\nrun: 3\n1: {a: 2}")
    with pytest.raises(ValueError) as refusal:
        load(file, ["finetune.token=clss", "segments.strde=5", "oops"])
    for part in (f"{file}: 8 problem(s)", "taks: no such section; nearest: task",
                 "task.lrr: no such setting; nearest: task.lr",
                 "task.batch: got 'many'", "run: expected settings below it, got 3", "1: no such section",
                 "finetune.token: got 'clss', expected one of mean, cls",
                 "segments.strde: no such setting; nearest: segments.stride",
                 "--set oops: expected section.field=value"):
        assert part in str(refusal.value)


def test_values_out_of_range_are_reported_together_with_unknown_names(file):
    with pytest.raises(ValueError) as refusal:
        load(file, ["task.lrr=1", "task.fold=9", "task.batch=x", "run.seed=-1"])
    for part in ("task.lrr: no such setting", "task.fold: got 9", "task.batch: got 'x'", "run.seed: got -1"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("override, name", [
    ("vit.patch=0", "vit.patch"), ("task.lr=" + "1" * 400, "task.lr"),
    ("run.name=2024-13-45", "run.name"), ("run.name=" + "[" * 3000, "run.name")],
    ids=["patch of 0", "400 digits", "month 13", "3000 brackets"])
def test_a_value_at_the_edge_is_refused_by_name(file, override, name):
    with pytest.raises(ValueError, match=name):
        load(file, [override])


@pytest.mark.parametrize("text, message", [
    ("- a\n- b", "expected sections like 'task: {lr: 3e-5}', got list"),
    ("task:", "task: expected settings below it, got None"),
    ("a: b: c", "not plain YAML"), ("task: {lr: [1}", "not plain YAML"), ("? [a]\n: b", "not plain YAML"),
    (b"\xff\xfe\x00", "not plain YAML")])
def test_a_file_that_holds_no_settings_is_refused_by_name(file, text, message):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"(?s)mine.yaml: .*{message}"):
        load(file)


@pytest.mark.parametrize("tag", [
    "!!python/object/apply:os.system ['touch {0}']", "!!python/object/apply:pathlib.Path.touch [{0}]",
    "!!python/name:os.system", "!!python/object/new:os.system ['touch {0}']"])
def test_a_yaml_tag_runs_nothing(file, tag):
    target = file.with_name("touched")
    tag = tag.format(target)
    with pytest.raises(ValueError, match=r"--set run\.name=.*: the value is not plain YAML"):
        load(file, [f"run.name={tag}"])
    file.write_text(f"run:\n  name: {tag}")
    expected = "(?s)mine.yaml: not plain YAML: could not determine a constructor for the tag"
    with pytest.raises(ValueError, match=expected):
        load(file)
    assert not target.exists()


def test_a_missing_file_is_refused_with_those_that_are_there(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/there.yaml").touch()
    monkeypatch.chdir(tmp_path)
    expected = (r"configs/other.yaml: cannot be read \(No such file or directory\); "
                "configurations here: configs/there.yaml")
    with pytest.raises(ValueError, match=expected):
        load("configs/other.yaml")


# ---- The command line

def test_scripts_take_settings_and_their_own_arguments(monkeypatch, file):
    monkeypatch.setattr("sys.argv", ["script.py", "--config", str(file), "--task", "au",
                                     "--set", "task.lr=1e-3", "--set", "run.seed=3"])
    settings, options = from_command_line("what it does", task={"choices": ["va", "au"], "required": True})
    assert (settings.task.lr, settings.run.seed, settings.run.name, options.task) == (1e-3, 3, "mine", "au")


def test_bad_settings_end_with_code_2_and_one_message(monkeypatch, capsys, file):
    monkeypatch.setattr("sys.argv", ["script.py", "--config", str(file), "--set", "task.lrr=1"])
    with pytest.raises(SystemExit) as end:
        from_command_line("what it does")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "error: " in error and "nearest: task.lr" in error and "Traceback" not in error


def test_the_yaml_of_a_run_is_plain():
    assert yaml.safe_load(as_yaml(Config())) == dataclasses.asdict(Config())


def test_a_reader_that_has_seen_enough_meets_no_traceback():
    shown = subprocess.run([f"{shlex.quote(sys.executable)} config.py | head -n 1"], shell=True, cwd=ROOT,
                           capture_output=True, text=True, timeout=60)
    assert (shown.stdout, shown.stderr) == ("data:\n", "")
