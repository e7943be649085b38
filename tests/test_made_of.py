"""What a result was made of: a stale one is refused, and what changes nothing is not; a run takes over the
stages of another that stay the same; a checkpoint is scored as it was trained."""

import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from checkpoints import checksum
from config import load
from labels import AU, EXPR, label_files
from made_of import (RANDOM, begun, chain, check, described, differences, find_input, finished,
                     given_record, like, named, place, read_record, same, settings_of, tuned_on,
                     unlike)
from processes import ALONE
from settings import Config
from splits import scene
from stages import overriding
from tiny import TINY, TRAIN_AU, content, copied, done, run

EVALUATE_AU = ["evaluate.py", "--task", "au", *TINY]


# ---- Records

def config_of(folder, *overrides) -> Config:
    """The defaults, as a run `mine` in `folder`, with overrides."""
    path = Path(folder) / "mine.yaml"
    path.write_text("{}")
    return load(path, [f"run.out={folder}", *overrides])


def made(config, stage: str, sections=(), source=None, before=None, data=None, checkpoint="") -> dict:
    """A finished stage in its run folder. -> its record"""
    folder = config.folder(stage)
    folder.mkdir(parents=True)
    record = {"stage": stage, "settings": settings_of(config, *sections), "input": source,
              "base": config.run.base, "data": data or {}, "from": before}
    if checkpoint:
        torch.save({"model": {}, "made_of": record, "stage": stage}, folder / checkpoint)
        record |= {"checkpoint": checkpoint, "checksum": checksum(folder / checkpoint)}
    (folder / "made_of.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text("{}")
    return record


def two_stages(config) -> dict:
    """Pre-training and fine-tuning. -> the record of the second"""
    first = made(config, "pretrain", ["pretrain"], checkpoint="last.pt")
    return made(config, "finetune", ["finetune"], {"setting": "finetune.start", "stage": "pretrain"}, first,
                {"training videos": ["a", "b_left"]}, "best.pt")


def test_settings_are_chosen_by_section_and_by_name_without_paths():
    assert settings_of(Config(), "segments", "run.seed") == {"segments.window": 300, "segments.stride": 200,
                                                             "run.seed": 0}
    assert settings_of(Config(), "task").keys() == (
        {f"task.{name}" for name in vars(Config().task)} - {"task.features"})
    assert settings_of(Config(), "data.raf_db", "data.folders") == {"data.raf_db": "not given",
                                                                    "data.folders": 0}
    assert settings_of(Config(), "synthetic") == {"data.synthetic": False}      # the rest does not matter
    synthetic = Config()
    synthetic.data.synthetic = True
    assert settings_of(synthetic, "synthetic")["synthetic.seed"] == 0
    assert "synthetic.root" not in settings_of(synthetic, "synthetic")


def test_a_record_tells_of_the_whole_chain(tmp_path):
    record = two_stages(config_of(tmp_path))
    assert [link["stage"] for link in chain(record)] == ["finetune", "pretrain"]
    features = {"stage": "features", "settings": {}, "from": record}
    assert tuned_on(features) == ["a", "b_left"] and tuned_on(record["from"]) == tuned_on(None) == []
    twice = {"stage": "finetune", "data": {"training videos": ["c"]}, "from": record}
    assert tuned_on(twice) == ["c", "a", "b_left"]                 # fine-tuned, and then fine-tuned again
    assert named(record) == f"finetune (checksum {record['checksum']})"
    assert named(features) == f"features from finetune (checksum {record['checksum']})"


def test_checkpoints_are_the_same_by_their_checksum_and_features_by_what_they_were_made_of():
    a, b = {"stage": "finetune", "checksum": 1, "settings": {}}, {"file": "x.pt", "checksum": 2}
    assert same(a, {"file": "elsewhere/best.pt", "checksum": 1}) and not same(a, b) and not same(a, RANDOM)
    features = {"stage": "features", "settings": {"finetune.token": "cls"}, "from": a}
    assert same(features, {**features, "data": {"more": 1}})
    assert not same(features, {**features, "from": b})
    assert not same(features, {**features, "settings": {"finetune.token": "mean"}})
    foreign = {"file": "made/elsewhere"}
    assert not same(features, foreign) and same(foreign, {"file": "moved"})        # nothing is known of those


def test_differences_are_named_with_their_stage_the_earliest_first(tmp_path):
    record = two_stages(config_of(tmp_path))
    assert differences(record, config_of(tmp_path)) == {}
    other = config_of(tmp_path, "finetune.lr=1", "pretrain.mask_ratio=0.5", "task.lr=1")
    assert differences(record, other) == {
        "pretrain.mask_ratio": ("pretrain", 0.75, 0.5), "finetune.lr": ("finetune", 1e-4, 1.0)}


def test_an_encoder_from_before_there_were_encoders_of_folds_is_that_of_fold_0(tmp_path):
    record = two_stages(config_of(tmp_path))
    old = {name: was for name, was in record["settings"].items() if name != "finetune.fold"}
    assert record["settings"]["finetune.fold"] == 0 and len(old) == len(record["settings"]) - 1
    path = tmp_path / "mine/finetune/made_of.json"
    path.write_text(json.dumps({**record, "settings": old}))
    check(path.parent, config_of(tmp_path))
    with pytest.raises(ValueError, match=r"finetune.fold: was 0, now 3 \(of stage finetune\)"):
        check(path.parent, config_of(tmp_path, "finetune.fold=3"))
    features = {"stage": "features", "settings": {}, "from": {**record, "settings": old},
                "input": {"setting": "features.checkpoint", "stage": "finetune"}}
    assert differences(features, config_of(tmp_path, "finetune.fold=1")) == {
        "finetune.fold": ("finetune", 0, 1)}
    of_fold_2 = {**record, "settings": {**old, "finetune.fold": 2}}
    said = unlike({**record, "settings": old}, of_fold_2)
    assert said == "\n  finetune.fold: was 0, now 2 (of stage finetune)"


def test_an_encoder_from_before_there_was_layer_decay_drop_path_and_clipping_had_none_of_them(tmp_path):
    record = two_stages(config_of(tmp_path))
    added = {"finetune.layer_decay": 1.0, "finetune.drop_path": 0.0, "finetune.clip": 0.0}
    old = {name: was for name, was in record["settings"].items() if name not in added}
    assert {**old, **added} == record["settings"] and len(old) == len(record["settings"]) - 3
    folder = tmp_path / "mine/finetune"
    (folder / "made_of.json").write_text(json.dumps({**record, "settings": old}))
    check(folder, config_of(tmp_path))
    for name, now in {"layer_decay": 0.65, "drop_path": 0.1, "clip": 0.05}.items():
        was = added[f"finetune.{name}"]
        with pytest.raises(ValueError, match=rf"finetune.{name}: was {was}, now {now} \(of stage finetune\)"):
            check(folder, config_of(tmp_path, f"finetune.{name}={now}"))


def test_a_start_that_a_setting_names_is_compared_by_its_checksum_not_by_its_settings(tmp_path):
    config = config_of(tmp_path)
    two_stages(config)
    shutil.copy(config.folder("pretrain") / "last.pt", tmp_path / "mae.pth")
    given = [f"finetune.start={tmp_path}/mae.pth", "pretrain.lr=1"]
    check(config.folder("finetune"), config_of(tmp_path, *given))
    torch.save({"model": {}}, tmp_path / "mae.pth")
    for start in (f"finetune.start={tmp_path}/mae.pth", "finetune.start=none"):
        with pytest.raises(ValueError, match=r"finetune was made from pretrain \(checksum \d+\), but .* now"):
            check(config.folder("finetune"), config_of(tmp_path, start))
    (tmp_path / "mae.pth").unlink()                                # no longer needed
    check(config.folder("finetune"), config_of(tmp_path, *given))


def test_an_input_that_is_gone_is_told_by_its_record(tmp_path):
    """Features whose ViT came from an MAE, and settings that ask for one without: though the ViT is gone."""
    config = config_of(tmp_path)
    record = two_stages(config)
    made(config, "features", [], {"setting": "features.checkpoint", "stage": "finetune"}, record)
    shutil.rmtree(config.folder("finetune"))
    check(config.folder("features"), config)
    with pytest.raises(ValueError, match=r"finetune was made from pretrain \(checksum \d+\), but none is now "
                                         r"random weights \(checksum 0\)"):
        check(config.folder("features"), config_of(tmp_path, "finetune.start=none"))


def test_a_start_that_is_no_longer_given_is_missed(tmp_path):
    """Also if the stage whose place it took has never been made."""
    config = config_of(tmp_path)
    start = {"setting": "finetune.start", "stage": "pretrain"}
    made(config, "finetune", ["finetune"], start, RANDOM, checkpoint="best.pt")
    check(config.folder("finetune"), config_of(tmp_path, "finetune.start=none"))
    with pytest.raises(ValueError, match=r"finetune was made from random weights \(checksum 0\), but "
                                         "finetune.start is now not given\ntwo ways on: give it, or"):
        check(config.folder("finetune"), config)


@pytest.mark.parametrize("text", ["{}", "[]", "3"])
def test_a_record_that_no_stage_has_written_is_refused(tmp_path, text):
    config = config_of(tmp_path)
    two_stages(config)
    (config.folder("finetune") / "made_of.json").write_text(text)
    with pytest.raises(ValueError, match="made_of.json: not the record that a stage has written"):
        found(config)


def test_an_earlier_stage_that_is_gone_is_no_reason_to_refuse_a_later_one(tmp_path):
    config = config_of(tmp_path)
    two_stages(config)
    shutil.rmtree(config.folder("pretrain"))
    check(config.folder("finetune"), config)


def test_the_whole_chain_on_disk_is_checked(tmp_path):
    """Fine-tuning fits the settings and was not touched; what it came from was made anew."""
    config = config_of(tmp_path)
    record = two_stages(config)
    made(config, "features", [], {"setting": "features.checkpoint", "stage": "finetune"}, record)
    check(config.folder("features"), config)
    other = {**record["from"], "checksum": 1}
    (config.folder("pretrain") / "made_of.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=rf"finetune was made from pretrain \(checksum "
                                         rf"{record['from']['checksum']}\), but .*pretrain is now pretrain "
                                         r"\(checksum 1\)\ntwo ways on: bring back what it was made"):
        check(config.folder("features"), config)


def test_the_chain_is_printed_with_each_setting_once(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path)
    record = two_stages(config)
    lines = list(described(record))
    assert lines[0] == f"finetune (checksum {record['checksum']})" and "training videos 2" in lines[1]
    assert lines[3] == f"pretrain (checksum {record['from']['checksum']})"
    assert "pretrain.lr 0.0005" in lines[4].replace("\n" + " " * 12, " ") and len(lines) == 5
    twice = {**record, "settings": {**record["settings"], "pretrain.lr": 0.0005}}
    assert list(described(twice)) == lines
    monkeypatch.setattr("sys.argv", ["made_of.py", str(config.folder("finetune")),
                                     str(config.folder("finetune") / "best.pt")])
    runpy.run_path(str(tiny.ROOT / "made_of.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith("\n".join(lines)) and said.count("pretrain.lr 0.0005") == 2


# ---- Finding the input

def found(config):
    return find_input(config, ALONE, "features.checkpoint", "finetune", "best.pt", "train_finetune.py")


def test_an_input_is_found_with_its_record(tmp_path, capsys):
    config = config_of(tmp_path)
    record = two_stages(config)
    assert found(config) == (config.folder("finetune") / "best.pt", record)
    path = tmp_path / "copy.pt"
    shutil.copy(config.folder("finetune") / "best.pt", path)
    assert found(config_of(tmp_path, f"features.checkpoint={path}")) == (path, given_record(path))
    assert given_record(path)["checksum"] == record["checksum"]
    assert tuned_on(given_record(path)) == ["a", "b_left"]         # the file tells what it was made of
    assert capsys.readouterr().out == ""


def test_an_input_that_is_missing_gone_or_another_file_is_refused_with_a_way_on(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match="best.pt not found; make it with: python .*train_finetune.py --con"):
        found(config)
    two_stages(config)
    path = config.folder("finetune") / "best.pt"
    path.rename(tmp_path / "kept.pt")
    with pytest.raises(ValueError, match="best.pt is gone, though its stage is finished; put a copy back, or "
                                         "begin a run of its own, --set run.name=NEW --set run.base=mine"):
        found(config)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="best.pt: not the file that the stage has written; put that back, "
                                         "or name this one with --set features.checkpoint="):
        found(config)


def test_a_run_takes_over_what_agrees_and_is_whole_in_its_base(tmp_path, capsys):
    base = config_of(tmp_path, "run.name=base")
    two_stages(base)
    settings = ["run.name=new", "run.base=base"]
    new = config_of(tmp_path, *settings, "task.lr=1")
    assert found(new)[0] == base.folder("finetune") / "best.pt"
    assert capsys.readouterr().out == (f"  finetune: taken from {base.folder('finetune')} (run.base), "
                                       "made with the same settings\n")
    other = config_of(tmp_path, *settings, "finetune.lr=1")
    assert place(other, "pretrain") == base.folder("pretrain")
    assert place(other, "finetune") == other.folder("finetune")
    other = config_of(tmp_path, *settings, "pretrain.lr=1")        # and so what comes after it
    assert [place(other, stage) for stage in ("pretrain", "finetune")] == [
        other.folder(stage) for stage in ("pretrain", "finetune")]
    new.folder("finetune").mkdir(parents=True)
    assert place(new, "finetune") == base.folder("finetune")       # an attempt that made nothing
    (new.folder("finetune") / "last.pt").touch()
    assert begun(new.folder("finetune")) and not finished(new.folder("finetune"))
    assert place(new, "finetune") == new.folder("finetune")        # its own has begun
    (base.folder("pretrain") / "last.pt").unlink()
    assert place(new, "pretrain") == new.folder("pretrain")        # not whole


def test_a_base_may_have_a_base(tmp_path):
    first = config_of(tmp_path, "run.name=first")
    two_stages(first)
    second = config_of(tmp_path, "run.name=second", "run.base=first")
    made(second, "task_au")
    third = config_of(tmp_path, "run.name=third", "run.base=second")
    assert place(third, "finetune") == first.folder("finetune")


def test_why_nothing_is_taken_from_a_base_is_said(tmp_path):
    two_stages(config_of(tmp_path, "run.name=base"))
    for settings, why in ((["run.base=bass"], r"run.base: there is no .*/bass/finetune"),
                          (["run.base=base", "finetune.lr=1"],
                           r"run.base: .*/base/finetune was made with other settings:\n  finetune.lr: was ")):
        with pytest.raises(ValueError, match=rf"(?s)best.pt not found; make it with: .*\n  {why}") as refusal:
            found(config_of(tmp_path, "run.name=new", *settings))
        assert "two ways on" not in str(refusal.value)


def test_the_settings_of_a_checkpoint_take_the_place_of_those_that_were_not_typed(tmp_path):
    record = two_stages(config_of(tmp_path, "finetune.lr=5e-4", "pretrain.mask_ratio=0.5"))
    config, changed = like(record, config_of(tmp_path, "task.lr=1"), "best.pt")
    assert (config.finetune.lr, config.pretrain.mask_ratio, config.task.lr) == (5e-4, 0.5, 1.0)
    assert changed.keys() == {"finetune.lr", "pretrain.mask_ratio"}
    with pytest.raises(ValueError, match="best.pt was made with other settings:\n  finetune.lr: was 0.0005, "
                                         "now 0.1 .of stage finetune.\nleave them out"):
        like(record, config_of(tmp_path, "finetune.lr=0.1"), "best.pt")
    config = config_of(tmp_path)
    assert like(None, config, "foreign.pt") == (config, {})


def with_data(config, **data):
    """With other data in the configuration file, which is no contradiction."""
    for name, path in data.items():
        setattr(config.data, name, path)
    return config


def test_the_data_of_pre_training_is_not_needed_to_use_a_checkpoint(tmp_path):
    sets = ["data.raf_db", "data.fer2013", "data.folders", "data.affectnet_crop"]
    there = config_of(tmp_path, "data.raf_db=/sets/raf", "data.folders=[/a,/b]", "data.affectnet_crop=true")
    record = {"stage": "pretrain", "settings": settings_of(there, *sets), "from": None}
    config, changed = like(record, with_data(config_of(tmp_path), fer2013="/sets/fer"), "best.pt")
    assert changed.keys() == set(sets) and differences(record, config) == {}


def test_whether_the_data_is_synthetic_is_a_matter_of_the_data_not_of_the_checkpoint(tmp_path):
    record = {"stage": "pretrain", "settings": {"data.synthetic": True, "pretrain.lr": 0.1}, "from": None}
    config, changed = like(record, config_of(tmp_path), "best.pt")
    assert not config.data.synthetic and changed.keys() == {"pretrain.lr"}


# ---- Whole runs

@pytest.mark.parametrize("changed, was, stage", [
    ("pretrain.mask_ratio=0.5", 0.75, "pretrain"), ("finetune.token=cls", "'mean'", "finetune"),
    ("vit.depth=3", 2, "pretrain"), ("synthetic.seed=5", 0, "pretrain")])
def test_a_changed_setting_of_an_earlier_stage_is_not_answered_with_the_old_score(
        finished, tmp_path, changed, was, stage):
    folder = copied(finished, tmp_path)
    before, (name, _, now) = content(folder), changed.partition("=")
    for command in [TRAIN_AU] if name == "synthetic.seed" else [TRAIN_AU, EVALUATE_AU]:
        codes, said = run(folder, *command, "--set", changed)
        assert codes == [2] and "was made with other settings:" in said
        assert re.search(rf"  {name}: was {was}, now '?{now}'? \(of stage {stage}\)\n", said)
    assert {file: row for file, row in content(folder).items() if file in before} == before


def test_what_was_made_from_an_earlier_result_that_was_made_anew_is_not_used(finished, tmp_path):
    folder = copied(finished, tmp_path, ["pretrain"])
    lower = ["--set", "pretrain.lr=1e-3"]
    done(folder, "train_pretrain.py", *TINY, *lower)
    for command, stage in ((["train_finetune.py", *TINY], "finetune"), (TRAIN_AU, "task_au"),
                           (["extract_features.py", *TINY], "features")):
        codes, said = run(folder, *command, *lower)
        assert codes == [2]
        assert f"runs/tiny/{stage} was made with other settings:\n  pretrain.lr: was 0.003" in said
        codes, said = run(folder, *command)                       # as it was: the chain on disk is broken
        assert codes == [2] and "runs/tiny/finetune was made from pretrain (checksum " in said


def test_a_task_is_not_trained_on_features_of_the_fine_tuning_before(finished, tmp_path):
    folder = copied(finished, tmp_path, ["finetune", "task_au"])
    done(folder, "train_finetune.py", *TINY, "--set", "finetune.start=none")
    codes, said = run(folder, *TRAIN_AU, "--set", "finetune.start=none")
    assert codes == [2] and "runs/tiny/features was made from finetune (checksum " in said
    again = ["--set", "finetune.start=none", "--set", "run.name=new", "--set", "run.base=tiny"]
    said = done(folder, *TRAIN_AU, *again)                        # the way on that the message names
    assert "finetune: taken from runs/tiny/finetune (run.base)" in said
    assert {path.name for path in (folder / "runs/new").iterdir()} == {"features", "task_au"}


def test_a_new_idea_about_the_temporal_model_takes_over_all_stages_before_it(finished, tmp_path):
    folder = copied(finished, tmp_path)
    idea = ["--set", "run.name=k5", "--set", "run.base=tiny", "--set", "temporal.kernels=[5]"]
    said = done(folder, *TRAIN_AU, *idea, world=2)
    assert "features: taken from runs/tiny/features (run.base), made with the same settings" in said
    assert {path.name for path in (folder / "runs/k5").iterdir()} == {"task_au"} and "missing" not in said
    idea = ["--set", "run.name=e1", "--set", "run.base=tiny", "--set", "finetune.epochs=1"]
    said = done(folder, *TRAIN_AU, *idea)
    assert "pretrain: taken from runs/tiny/pretrain" in said
    assert {path.name for path in (folder / "runs/e1").iterdir()} == {"finetune", "features", "task_au"}


def test_a_run_without_pre_training_takes_nothing_that_was_made_from_it(finished, tmp_path):
    folder = copied(finished, tmp_path)
    settings = ["run.name=scratch", "run.base=tiny", "finetune.start=none"]
    done(folder, *TRAIN_AU, *overriding(settings))
    assert {path.name for path in (folder / "runs/scratch").iterdir()} == {"finetune", "features", "task_au"}
    made_of = read_record(folder / "runs/scratch/task_au")
    assert chain(made_of)[-1] == RANDOM


def test_a_checkpoint_is_scored_with_the_settings_it_was_trained_with(finished, tmp_path):
    folder = copied(finished, tmp_path)
    idea = ["--set", "run.name=centred", "--set", "run.base=tiny", "--set", "temporal.causal=false",
            "--set", "segments.window=16"]
    done(folder, *TRAIN_AU, *idea)
    expected = (folder / "runs/centred/task_au/scores.txt").read_text()
    given = ["--checkpoint", "runs/centred/task_au/best.pt"]
    said = done(folder, *EVALUATE_AU, *given)
    assert expected in said and expected.count("\n") > 12
    assert "  temporal.causal=False as in the checkpoint; the configuration has True\n" in said
    codes, said = run(folder, *EVALUATE_AU, *given, "--set", "temporal.causal=true")
    assert codes == [2] and "temporal.causal: was False, now True (of stage task_au)\nleave them out" in said


def test_a_model_of_one_fold_is_not_scored_on_another(finished, tmp_path):
    folder = copied(finished, tmp_path)
    done(folder, *TRAIN_AU, "--set", "task.fold=1")
    given = ["--checkpoint", "runs/tiny/task_au_fold1/best.pt"]
    codes, said = run(folder, *EVALUATE_AU, *given, "--set", "task.fold=2")
    assert codes == [2] and "task.fold: was 1, now 2" in said
    expected = (folder / "runs/tiny/task_au_fold1/scores.txt").read_text()
    assert expected in done(folder, *EVALUATE_AU, *given)


def test_a_model_is_not_scored_where_other_labels_make_its_training_videos_validation(finished, tmp_path):
    folder = copied(finished, tmp_path)
    labels = folder / "data/Aff-Wild2/annotations/AU_Detection_Challenge"
    (labels / "Train_Set").rename(labels / "x")
    (labels / "Validation_Set").rename(labels / "Train_Set")
    (labels / "x").rename(labels / "Validation_Set")
    codes, said = run(folder, *EVALUATE_AU)
    assert codes == [2] and re.search("best.pt: trained on 4 of the 4 videos that would be scored", said)


def test_a_finished_task_whose_labels_have_changed_is_not_answered_with_the_old_score(finished, tmp_path):
    folder = copied(finished, tmp_path)
    labels = folder / "data/Aff-Wild2/annotations/AU_Detection_Challenge/Validation_Set"
    path = sorted(labels.iterdir())[0]
    path.write_text(path.read_text().replace(",0", ",1"))
    codes, said = run(folder, *TRAIN_AU)
    assert codes == [2]
    assert "runs/tiny/task_au was made from other data:\n  validation: was 3 videos, " in said


def test_another_set_of_faces_or_other_faces_are_not_answered_with_finished(finished, tmp_path):
    folder = copied(finished, tmp_path)
    more = ["--set", "data.folders=[data/RAF-DB]"]
    for command in (["train_pretrain.py", *TINY], TRAIN_AU):
        codes, said = run(folder, *command, *more)
        assert codes == [2] and "data.folders: was 0, now 1 (of stage pretrain)" in said
    next((folder / "data/RAF-DB").rglob("*.jpg")).unlink()
    path = next((folder / "data/Aff-Wild2/annotations/EXPR_Classification_Challenge/Train_Set").iterdir())
    path.write_text(path.read_text().replace("\n0", "\n1").replace("\n4", "\n5"))
    for script, data in (("train_pretrain.py", "data.raf_db: was 15 images"),
                         ("train_finetune.py", "training: was ")):
        codes, said = run(folder, script, *TINY)
        assert codes == [2] and f"was made from other data:\n  {data}" in said


def test_weights_that_were_deleted_are_missed_by_every_stage_that_needs_them(finished, tmp_path):
    folder = copied(finished, tmp_path)
    (folder / "runs/tiny/task_au/best.pt").unlink()
    for command in (TRAIN_AU, EVALUATE_AU):
        codes, said = run(folder, *command)
        assert codes == [2]
        assert ("runs/tiny/task_au/best.pt is gone, though its stage is finished; put a copy back, or begin"
                in said)


def test_paths_are_compared_by_where_they_lead_and_folders_may_be_moved(finished, tmp_path):
    folder = copied(finished, tmp_path / "a/b")
    (folder / "runs").rename(tmp_path / "moved")
    (folder / "data").rename(tmp_path / "data")
    labels, frames = tmp_path / "data/Aff-Wild2/annotations/", tmp_path / "data/Aff-Wild2/cropped_aligned/"
    sets = [f"data.{name}={tmp_path / path}/" for name, path in (
        ("affectnet_2017", "data/AffectNet-2017"), ("affectnet_2021", "data/AffectNet-2021"),
        ("raf_db", "data/RAF-DB"), ("fer2013", "data/FER2013"), ("ferplus", "data/FERPlus"),
        ("s_aff_wild2", "data/ABAW4"), ("drawn_faces", "data/ABAW4/drawn"),
        ("real_faces", "data/ABAW4/real"))]
    options = overriding([f"run.out={tmp_path}/moved", f"data.labels={labels}", f"data.frames=[{frames}]",
                      f"synthetic.root={tmp_path}/data/", *sets])
    for script in (["train_pretrain.py"], ["train_finetune.py"], ["extract_features.py"],
                   ["train_task.py", "--task", "au"]):
        assert "is finished; nothing to" in done(folder, *script, *TINY, *options)
    (tmp_path / "moved/tiny/finetune/metrics.json").unlink()       # and it goes on from there
    assert "going on from epoch 3" in done(folder, "train_finetune.py", *TINY, *options)


def test_a_failed_first_attempt_locks_nothing(finished, tmp_path):
    folder = copied(finished, tmp_path, ["pretrain"])
    codes, said = run(folder, "train_pretrain.py", *TINY, "--set", "data.synthetic=false", "--set",
                      "data.raf_db=nowhere", "--set", "pretrain.lr=1")
    assert codes == [2] and "data.raf_db: looked for nowhere" in said
    done(folder, "train_pretrain.py", *TINY)


def test_the_official_split_too_tells_which_videos_the_vit_has_seen(finished, tmp_path):
    """A validation video of the AUs is moved to the training videos of the expressions."""
    folder = copied(finished, tmp_path, ["finetune", "features", "task_au"])
    expr = label_files(folder / "data/Aff-Wild2/annotations", EXPR)
    video, path = sorted(expr["Validation_Set"].items())[0]
    path.rename(path.parent.parent / "Train_Set" / path.name)
    said = done(folder, *TRAIN_AU)
    assert "warning: 1 of these 3 videos show scenes on which the ViT was fine-tuned" in said
    metrics = json.loads((folder / "runs/tiny/task_au/metrics.json").read_text())
    assert metrics["seen_videos"] == 1
    assert video in tuned_on(read_record(folder / "runs/tiny/task_au")) and scene(video) == video
    text = (folder / "runs/tiny/task_au/scores.txt").read_text()
    assert re.search(r"mean F1 +ours +95 % +unseen +chance +paper +baseline +frames\n", text)
    assert text in done(folder, *EVALUATE_AU)


def test_what_was_made_from_synthetic_data_is_not_taken_for_real_data(finished, tmp_path):
    folder, real = copied(finished, tmp_path), ["--set", "data.synthetic=false"]
    codes, said = run(folder, *TRAIN_AU, *real)
    assert codes == [2] and "data.synthetic: was True, now False (of stage pretrain)" in said
    codes, said = run(folder, "extract_features.py", *TINY, *real, "--set", "run.name=mine", "--set",
                      "run.base=tiny")
    assert codes == [2]
    assert "runs/mine/finetune/best.pt not found" in said and "run.base: runs/tiny/finetune was made" in said


def test_other_images_under_the_same_names_are_other_data(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for path in (folder / "data/Aff-Wild2/cropped_aligned").rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b" " * 10)
    codes, said = run(folder, "train_finetune.py", *TINY)
    assert codes == [2] and "runs/tiny/finetune was made from other data:\n  training: was " in said
    assert "extracting 8 numbers per frame from 7 of 7 videos" in done(folder, "extract_features.py", *TINY)
    for path in (folder / "data/RAF-DB").rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b" " * 10)
    codes, said = run(folder, "train_pretrain.py", *TINY)
    assert codes == [2] and "data.raf_db: was 15 images, names " in said


def test_a_task_notices_that_the_features_of_its_videos_were_made_anew_from_other_images(finished, tmp_path):
    folder = copied(finished, tmp_path)
    video = sorted(label_files(folder / "data/Aff-Wild2/annotations", AU)["Validation_Set"])[0]
    for path in sorted((folder / "data/Aff-Wild2/cropped_aligned" / video).iterdir())[::2]:
        path.unlink()
    assert "from 1 of 7 videos" in done(folder, "extract_features.py", *TINY)
    codes, said = run(folder, *TRAIN_AU)
    assert codes == [2]
    assert "runs/tiny/task_au was made from other data:\n  validation: was 3 videos, " in said


def test_features_that_another_program_made_are_not_taken_for_ours_and_are_compared_by_value(
        finished, tmp_path):
    folder = copied(finished, tmp_path)
    foreign = folder / "foreign"
    foreign.mkdir()
    for path in (folder / "runs/tiny/features").glob("*.npy"):
        if "noface" not in path.name:
            np.save(foreign / path.name, np.ones_like(np.load(path)))
    given = ["--set", "task.features=foreign"]
    codes, said = run(folder, *TRAIN_AU, *given)
    assert codes == [2] and "runs/tiny/task_au was made from features from finetune (checksum " in said
    codes, said = run(folder, *EVALUATE_AU, *given)
    assert codes == [2] and "trained on features of another ViT" in said
    done(folder, *TRAIN_AU, *given, "--set", "run.name=f")
    np.save(foreign / path_of_one(folder), np.zeros_like(np.load(foreign / path_of_one(folder))))
    codes, said = run(folder, *TRAIN_AU, *given, "--set", "run.name=f")
    assert codes == [2] and "runs/f/task_au was made from other data:" in said


def path_of_one(folder) -> str:
    """The feature file of a training video."""
    return sorted(label_files(folder / "data/Aff-Wild2/annotations", AU)["Train_Set"])[0] + ".npy"


def test_a_checkpoint_that_tells_nothing_is_scored_with_a_warning_and_without_the_papers_numbers(
        finished, tmp_path):
    folder = copied(finished, tmp_path)
    weights = torch.load(folder / "runs/tiny/task_au/best.pt", weights_only=True)["model"]
    torch.save({"model": weights}, folder / "bare.pt")
    said = done(folder, *EVALUATE_AU, "--checkpoint", "bare.pt")
    assert "warning: bare.pt does not tell what it was made of; it may have been trained on" in said
    assert re.search(r"mean F1 +ours +95 % +chance +frames\n", said)


def test_the_features_of_validation_videos_are_enough_to_score(finished, tmp_path):
    folder = copied(finished, tmp_path)
    given = folder / "given"
    given.mkdir()
    for video in label_files(folder / "data/Aff-Wild2/annotations", AU)["Validation_Set"]:
        for end in (".npy", ".noface.npy"):
            shutil.copy(folder / f"runs/tiny/features/{video}{end}", given)
    for name in ("made_of.json", "videos.json"):
        shutil.copy(folder / "runs/tiny/features" / name, given)
    expected = (folder / "runs/tiny/task_au/scores.txt").read_text()
    assert expected in done(folder, *EVALUATE_AU, "--set", "task.features=given")


def test_a_finished_task_tells_its_score_though_its_features_are_gone(finished, tmp_path):
    folder = copied(finished, tmp_path, ["features"])
    said = done(folder, *TRAIN_AU)
    assert "runs/tiny/task_au is finished; its features are gone" in said and "mean F1" in said
