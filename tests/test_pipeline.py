"""pipeline.py: where a result lies, what it was made of, when it is refused, and what is made first.

Stages here only pretend: `made` leaves the folder that a finished stage leaves.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import pipeline
from engine.checkpoints import checksum
from engine.config import load
from labels import TASKS
from pipeline import (STAGES, differs, find_input, finished, folder, identity, like, make, open_run,
                      read_record, results, settings_of, stale, tuned_on)
from processes import ALONE

SETTINGS = {"vit": {"image_size": 16, "patch": 8, "dim": 8, "depth": 2, "heads": 2},
            "pretrain": {"epochs": 2}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(yaml.safe_dump(SETTINGS))


def config_with(*overrides):
    return load("my.yaml", overrides)


def made(stage: str, config, task=None, number: float = 1.0, data=None, metrics=None) -> Path:
    """What a finished stage leaves: its record, weights of that number, metrics.json."""
    setting, before = next(iter(STAGES[stage].inputs.items()), ("", ""))
    origin = find_input(config, ALONE, setting)[1] if setting else None
    place = folder(stage, config, task)
    place.mkdir(parents=True, exist_ok=True)
    record = {"stage": f"{stage}_{task.name}" if task else stage, "settings": settings_of(stage, config),
              "data": data or {"training": "12 frames"}, "from": origin}
    if STAGES[stage].file.endswith(".pt"):
        torch.save({"model": {"x": torch.tensor(number)}, "made_of": record}, place / STAGES[stage].file)
        record |= {"checkpoint": STAGES[stage].file, "checksum": checksum(place / STAGES[stage].file)}
    else:
        (place / STAGES[stage].file).write_text("{}")
    (place / "made_of.json").write_text(json.dumps(record))
    (place / "metrics.json").write_text(json.dumps(metrics or {"score": number}))
    return place


def chain(*overrides, number: float = 1.0):
    """The stages from the pre-training to a task, each made unless it is there."""
    config = config_with(*overrides)
    for stage in ("pretrain", "finetune", "features"):
        if not finished(folder(stage, config)):
            data = {"training videos": ["1", "2_left"]} if stage == "finetune" else None
            made(stage, config, number=number, data=data)
    return config, made("task", config, TASKS["au"], number)


# ---- Folders

@pytest.mark.parametrize("stage, task, overrides, name", [
    ("pretrain", None, [], "pretrain"),
    ("task", "au", [], "task_au"),
    ("task", "au", ["temporal.kernels=[3,3,3]"], "task_au+temporal.kernels=3-3-3"),
    ("task", "va", ["task.lr=1e-4", "segments.stride=50"], "task_va+segments.stride=50+task.lr=0.0001"),
    ("task", "va", ["temporal.tcn=false"], "task_va+temporal.tcn=false"),
    ("features", None, ["finetune.lr=1e-3"], "features+finetune.lr=0.001"),
    ("task", "au", ["finetune.lr=1e-3", "run.seed=2"], "task_au+finetune.lr=0.001+run.seed=2"),
    ("pretrain", None, ["finetune.lr=1e-3"], "pretrain"),
    ("finetune", None, ["finetune.start=a/b/mae.pth"], "finetune+finetune.start=b-mae.pth"),
    ("finetune", None, ["finetune.start=a/mae.pth", "pretrain.lr=1"], "finetune+finetune.start=a-mae.pth"),
    ("task", "au", ["task.features=x/y z", "finetune.lr=1"], "task_au+task.features=x-y-z"),
    ("task", "au", ["run.workers=3", "run.device=cpu", "data.labels=x", "data.synthetic=true"], "task_au"),
    ("task", "au", ["task.lr=3e-5"], "task_au"),                     # the file's own value
    ("emma", None, ["stills.epochs=3"], "emma+stills.epochs=3"),
    ("emma", None, ["stills.epochs=3", "emma.cnn=none"], "emma+emma.cnn=none"),
    ("cotex", None, ["stills.epochs=3", "pretrain.epochs=3"], "cotex+pretrain.epochs=3"),
])
def test_a_folder_is_named_after_what_counts_and_differs_from_the_file(here, stage, task, overrides, name):
    assert folder(stage, config_with(*overrides), TASKS.get(task)) == Path("runs/my") / name


def test_a_long_name_is_hashed_and_other_settings_have_another_hash(here):
    long = [f"temporal.{key}=[{','.join(['300'] * 12)}]" for key in ("channels", "kernels", "dilations")]
    names = {folder("task", config_with(*long, f"task.lr={lr}"), TASKS["au"]).name for lr in (1, 2)}
    assert len(names) == 2 and all(len(name) < 40 for name in names)


# ---- What a result was made of

def test_a_record_holds_the_chain_and_the_videos_that_the_vit_was_tuned_on(here):
    config, task = chain()
    record = read_record(task)
    stages = [link.get("stage", link.get("file")) for link in pipeline.chain(record)]
    assert stages == ["task_au", "features", "finetune", "pretrain", "random weights"]
    assert tuned_on(record) == ["1", "2_left"]
    assert record["from"]["settings"].keys() >= {"vit.dim", "finetune.token", "data.synthetic"}
    assert "finetune.start" not in record["from"]["from"]["settings"]
    assert not stale(task, config) and not differs(task, record, config)


def test_results_are_the_same_by_their_weights_and_features_by_settings_and_weights(here):
    config, task = chain()
    features = read_record(folder("features", config))
    assert identity(features) == identity(json.loads(json.dumps({**features, "data": 3})))
    other = {**features, "from": {**features["from"], "checksum": 3}}
    assert identity(other) != identity(features)
    assert identity({**features, "settings": {}}) != identity(features)
    assert identity(None) is None and identity({"checksum": 5, "file": "a"}) == identity({"checksum": 5})


def changed_file(text: dict):
    def change(config):
        Path("my.yaml").write_text(yaml.safe_dump({**SETTINGS, **text}))
    return change


def made_anew(stage):
    return lambda config: made(stage, config, number=2.0)


def removed(name):
    return lambda config: (Path("runs/my") / name).unlink()


REFUSALS = {  # what happens after a finished chain; the message when the task's folder is opened again
    "an own setting": (changed_file({"task": {"lr": 1e-3}}),
                       "task.lr: was 3e-05, now 0.001 \\(of stage task_au\\)"),
    "a setting of the ViT": (changed_file({"finetune": {"lr": 1e-2}}),
                             "finetune.lr: was 0.0001, now 0.01 \\(of stage finetune\\)"),
    "a setting of the MAE": (changed_file({"pretrain": {"epochs": 3}}), "pretrain.epochs: was 2, now 3"),
    "the ViT was tuned again": (made_anew("finetune"), "was made from finetune .*is now finetune"),
    "the MAE was trained again": (made_anew("pretrain"), "was made from pretrain \\(checksum"),
    "drawn data is real now": (changed_file({"data": {"synthetic": True}}), "data.synthetic: was False"),
    "no record": (removed("task_au/made_of.json"), "made_of.json is missing"),
    "a damaged record": (lambda config: Path("runs/my/task_au/made_of.json").write_text("{}"),
                         "not the record that a stage has written"),
}


@pytest.mark.parametrize("change, message", REFUSALS.values(), ids=REFUSALS)
def test_what_does_not_agree_with_the_settings_is_refused_and_what_differs_is_named(here, change, message):
    config, _ = chain()
    change(config)
    with pytest.raises(ValueError, match=message):
        open_run("task", config_with(), ALONE, TASKS["au"])


@pytest.mark.parametrize("gone", ["pretrain", "finetune", "features"])
def test_an_earlier_stage_that_is_gone_is_told_by_its_record_here(here, gone):
    config, task = chain()
    (folder(gone, config) / "metrics.json").unlink()
    assert not stale(task, config)
    Path("my.yaml").write_text(yaml.safe_dump({**SETTINGS, "pretrain": {"epochs": 7}}))
    assert "pretrain.epochs: was 2, now 7" in stale(task, config_with())


def test_a_path_in_the_settings_is_compared_by_its_checksum_and_what_lies_before_it_is_its_own_affair(here):
    mae = Path("mae.pt")
    torch.save({"model": {"x": torch.ones(3)}}, mae)
    config = config_with("finetune.start=mae.pt")
    place = made("finetune", config)
    assert not stale(place, config)
    assert not stale(place, config_with("finetune.start=mae.pt", "pretrain.lr=1"))
    mae.rename("moved.pt")
    assert not stale(place, config_with("finetune.start=moved.pt"))           # asked of the same folder
    torch.save({"model": {}}, "moved.pt")
    assert "was made from mae.pt (checksum" in stale(place, config_with("finetune.start=moved.pt"))
    assert "is now not given" in stale(place, config_with())
    none = made("finetune", config_with("finetune.start=none"))
    assert not stale(none, config_with("finetune.start=none"))
    assert "random weights" in stale(none, config_with("finetune.start=moved.pt"))


def test_an_experiment_shares_the_stages_that_stay_the_same_and_is_announced(here, capsys):
    config, _ = chain()
    idea = config_with("temporal.kernels=[3,3,3]")
    assert find_input(idea, ALONE, "task.features")[0] == Path("runs/my/features")
    open_run("task", idea, ALONE, TASKS["au"])
    assert "new, differs from the configuration in temporal.kernels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lr=1/last.pt not found; make it with: python train_pretrain"):
        find_input(config_with("pretrain.lr=1"), ALONE, "finetune.start")


# ---- Inputs

@pytest.mark.parametrize("spoil, message", [
    (lambda place: (place / "metrics.json").unlink(), "has not ended; go on with: python train_finetune.py"),
    (lambda place: (place / "best.pt").unlink(), "best.pt is gone, though its stage is finished"),
    (lambda place: torch.save({}, place / "best.pt"), "not the file that the stage has written.*checkpoint="),
    (lambda place: changed_file({"finetune": {"lr": 3}})(None), "finetune.lr: was 0.0001, now 3.0"),
], ids=["not finished", "gone", "another file", "stale"])
def test_an_input_that_cannot_be_used_is_refused_with_a_way_on(here, spoil, message):
    config, _ = chain()
    spoil(folder("finetune", config))
    with pytest.raises(ValueError, match=message):
        find_input(config_with(), ALONE, "features.checkpoint")


def test_given_inputs_are_found_with_their_records(here):
    config, _ = chain()
    path, record = find_input(config_with("features.checkpoint=runs/my/finetune/best.pt"), ALONE,
                              "features.checkpoint")
    assert record["stage"] == "finetune" and record["checksum"] == checksum(path)
    assert find_input(config_with("finetune.start=none"), ALONE, "finetune.start")[1]["checksum"] == 0
    assert find_input(config, ALONE, "stills.start")[1]["checksum"] == 0
    with pytest.raises(ValueError, match="nowhere.pt: no such checkpoint"):
        find_input(config_with("finetune.start=nowhere.pt"), ALONE, "finetune.start")


def test_a_checkpoints_settings_take_the_place_of_those_that_were_not_typed(here):
    _, task = chain("temporal.kernels=[3,3,3]", "vit.depth=3")
    record = read_record(task)
    found, changed = like(record, config_with("run.workers=0"), "best.pt")
    assert found.temporal.kernels == [3, 3, 3] and found.vit.depth == 3
    assert changed["vit.depth"] == ("pretrain", 3, 2) and changed["temporal.kernels"][0] == "task_au"
    with pytest.raises(ValueError, match="(?s)vit.depth: was 3, now 1.*leave them out"):
        like(record, config_with("vit.depth=1"), "best.pt")
    assert like(None, found, "x") == (found, {})


# ---- Making what is missing

@pytest.fixture
def ran(monkeypatch, here):
    """The scripts that were run, in order; each makes its result."""
    names = []
    Path("my.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": {"synthetic": True}}))
    drawn = SimpleNamespace(check_paths=lambda config: None)
    drawn.is_complete = lambda config: "draw" in names
    drawn.make = lambda config, team: names.append("draw")
    monkeypatch.setitem(sys.modules, "datasets.synthetic", drawn)
    for stage, (script, *_) in STAGES.items():
        def main(config, team, task=None, stage=stage):
            names.append(stage + (f" {task.name}" if task else ""))
            made(stage, config, task)
        monkeypatch.setitem(sys.modules, script, SimpleNamespace(main=main))
    return names


FIRST = ["draw", "pretrain", "finetune", "features"]


@pytest.mark.parametrize("stage, overrides, expected", [
    ("pretrain", [], FIRST[:2]), ("features", [], FIRST), ("task", [], [*FIRST, "task au"]),
    ("finetune", ["finetune.start=none"], ["draw", "finetune"]),
    ("stills", [], ["draw", "stills"]),
    ("emma", [], ["draw", "pretrain", "stills", "emma"]),
    ("emma", ["emma.cnn=none"], ["draw", "pretrain", "emma"]),
    ("cotex", ["cotex.start=none"], ["draw", "cotex"]),
])
def test_with_drawn_data_all_that_is_missing_is_made_in_order_and_once(ran, stage, overrides, expected):
    config, task = config_with(*overrides), TASKS["au"] if stage == "task" else None
    real = config_with("data.synthetic=false")
    pipeline._start(real, ALONE, stage, lambda *given: ran.append(given[2:]), task)
    assert [ran.pop()] == [(task,) if task else ()] and ran == []
    make(stage, config, ALONE, task)
    assert ran == expected
    make(stage, config, ALONE, task)
    assert ran == expected
    if stage == "task":                                      # an experiment, and real data
        make("task", config_with("finetune.lr=1"), ALONE, task)
        make("task", config_with("data.synthetic=false", "finetune.lr=2"), ALONE, task)
        assert ran == [*expected, "finetune", "features", "task au"]


def test_every_result_is_listed_with_its_score_and_what_is_left_with_its_command(here):
    config, _ = chain()
    chain("task.lr=1e-3", number=0.25)
    made("finetune", config_with("finetune.lr=1"), metrics={"score": 0.5})
    (folder("features", config) / "metrics.json").write_text("{}")
    lines = [" ".join(line.split()) for line in results(config)]
    assert "0.250 runs/my/task_au+task.lr=0.001" in lines and "0.500 runs/my/finetune+finetune.lr=1" in lines
    assert "finished runs/my/features" in lines and "1.000 runs/my/task_au" in lines
    assert "to make runs/my/emma: python -m second_paper.train_emma --config my.yaml" in lines
    changed_file({"finetune": {"lr": 7.0}})(None)
    text = "\n".join(results(config_with()))
    assert "finetune.lr: was 0.0001, now 7.0" in text
