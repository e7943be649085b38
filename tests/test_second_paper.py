"""EMMA's and masked CoTEX's trainings from end to end on the tiny configuration: one and two processes, kills
and restarts, inputs that changed, and what is refused."""

import json
import shutil

import numpy as np
import pytest

import tiny
from tiny import (EACH_STEP, TINY, Job, apart, assert_same, copied, done, log_numbers, metrics, ready, run,
                  stop, weights)

SCRIPTS = {"stills": "train_stills.py", "emma": "train_emma.py", "cotex": "train_cotex.py"}


def make(folder, world=1):
    """Both systems, made from nothing by two commands."""
    tiny.write(folder)
    done(folder, "train_emma.py", *TINY, world=world)
    done(folder, "train_cotex.py", *TINY, world=world)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> the folder"""
    return make(tmp_path_factory.mktemp("second"))


@pytest.fixture(scope="module")
def made_by_two(tmp_path_factory):
    """-> the folder"""
    return make(tmp_path_factory.mktemp("second"), world=2)


# ---- From nothing

def test_one_command_makes_emma_from_nothing_and_the_first_papers_chain_is_not_run(made):
    stages = {path.name for path in (made / "runs/tiny").iterdir()}
    assert stages == {"pretrain", "stills", "emma", "cotex"}
    scores = (made / "runs/tiny/emma/scores.txt").read_text()
    assert "P_MTL" in scores and "CCC" in scores and "AU26" in scores
    again = done(made, "train_emma.py", *TINY)
    assert "runs/tiny/emma is finished; nothing to do" in again and scores in again


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_train_as_one_does(made, made_by_two, stage):
    one, two = made / "runs/tiny" / stage, made_by_two / "runs/tiny" / stage
    assert apart(weights(one), weights(two)) < 2e-5
    assert log_numbers(one) == pytest.approx(log_numbers(two), rel=1e-4, abs=1e-5)
    assert metrics(one).keys() == metrics(two).keys()


def test_emma_scores_each_video_of_its_file_and_the_sums_tell_the_score(made):
    stored = json.loads((made / "runs/tiny/emma/video_sums.json").read_text())
    names = {line.split("/")[0] for line in
             (made / "data/ABAW4/validation_set_annotations.txt").read_text().splitlines()[1:]}
    assert set(stored["videos"]) == names and np.array(stored["sums"]).shape == (len(names), 124)


# ---- Killed and started again

MOMENTS = {"in_the_first_epoch": stop("run.Run.end_step", 2),
           "after_the_row_of_an_epoch": stop("run_folder.RunFolder.log", 1),
           "before_the_metrics": stop("run_folder.RunFolder.finish", 1, after=False)}


@pytest.fixture(scope="module")
def dropping(made, tmp_path_factory):
    """Both systems with drop path, without an interruption. -> the folder"""
    folder = copied(made, tmp_path_factory.mktemp("dropping"), ["emma", "cotex"])
    tiny.write(folder, **tiny.DROPOUT)
    done(folder, "train_emma.py", *TINY)
    done(folder, "train_cotex.py", *TINY)
    return folder


@pytest.mark.parametrize("stage", ["emma", pytest.param("cotex", marks=pytest.mark.slow)])
def test_killed_at_a_few_moments_and_started_again_it_ends_with_the_same_bits(dropping, tmp_path, stage):
    places = {moment: ready(dropping, tmp_path / moment, stage) for moment in MOMENTS}
    command = [SCRIPTS[stage], *TINY, *EACH_STEP]
    jobs = {moment: Job(places[moment][0], *command, hook=hook) for moment, hook in MOMENTS.items()}
    assert {moment: job.end().codes for moment, job in jobs.items()} == {moment: [-9] for moment in MOMENTS}
    for moment, (folder, place) in places.items():
        assert "going on from epoch" in done(folder, *command), moment
        assert_same(place, dropping / "runs/tiny" / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["emma", "cotex"])
def test_it_may_go_on_with_another_number_of_processes(made, tmp_path, stage):
    folder, place = ready(made, tmp_path, stage)
    command = [SCRIPTS[stage], *TINY, *EACH_STEP]
    for world, steps in ((2, 1), (1, 2), (3, None)):
        codes, said = run(folder, *command, world=world, hook=steps and stop("run.Run.end_step", steps))
        assert codes == [-9 if steps else 0] * world, said
    assert apart(weights(place), weights(made / "runs/tiny" / stage)) < 2e-5


# ---- Other inputs, other settings

def test_emma_outlives_its_cnns_file_and_refuses_another_cnn(made, tmp_path):
    folder = copied(made, tmp_path)
    shutil.move(folder / "runs/tiny/stills", folder / "put_aside")
    assert "is finished; nothing to do" in done(folder, "train_emma.py", *TINY)
    shutil.move(folder / "put_aside", folder / "runs/tiny/stills")
    other = ["--set", "emma.cnn=runs/tiny/stills/last.pt"]
    codes, said = run(folder, "train_emma.py", *TINY, *other)
    assert codes == [2] and "runs/tiny/emma was made from other data" in said
    assert "cnn: was checksum" in said and "Traceback" not in said


def test_a_variant_takes_the_mae_and_the_cnn_over_and_trains_without_either_if_asked(made, tmp_path):
    folder = copied(made, tmp_path)
    options = ["--set", "run.name=v", "--set", "run.base=tiny", "--set", "emma.epochs=1"]
    said = done(folder, "train_emma.py", *TINY, *options, "--set", "emma.weights=[0,0,1]")
    assert "pretrain: taken from runs/tiny/pretrain (run.base)" in said and "P_MTL" not in said
    assert "stills: taken from runs/tiny/stills (run.base)" in said
    assert "on au, 1 epochs" in said and set(metrics(folder / "runs/v/emma")["chance"]) == {"au"}
    options[1] = "run.name=w"
    said = done(folder, "train_emma.py", *TINY, *options, "--set", "emma.cnn=none", "--set",
                "emma.start=none")
    assert "the ViT starts from random weights, as asked" in said and "P_MTL" in said
    assert not any(name.startswith("cnn.") for name in weights(folder / "runs/w/emma"))


REFUSED = {
    "train_emma.py --set data.s_aff_wild2=": "data.s_aff_wild2 is not given; it holds training_set",
    "train_emma.py --set data.s_aff_wild2=data/nowhere": "data/nowhere/training_set_annotations.txt",
    "train_emma.py --set emma.cnn=none.pt": "none.pt: no such checkpoint",
    "train_emma.py --set emma.cnn=runs/tiny/pretrain/last.pt": "runs/tiny/pretrain/last.pt: ",
    "train_cotex.py --set data.drawn_faces=": "data.drawn_faces is not given; it holds a folder for each of",
    "train_cotex.py --set data.real_faces=": "data.real_faces is not given",
    "train_cotex.py --set data.real_faces=data/ABAW4/drawn": "share images; a score on faces that were",
    "train_cotex.py --set data.real_faces=data/ABAW4/drawn/FEAR": "share images",
    "train_cotex.py --set cotex.mask_ratio=0.9": "mask_ratio=0.9 keeps none of the 4 patches"}


def test_what_cannot_be_is_refused_in_one_line(made, tmp_path):
    folder = copied(made, tmp_path)
    jobs = {}
    for number, words in enumerate(REFUSED):
        script, *options = words.split()
        jobs[words] = Job(folder, script, *TINY, *options, "--set", f"run.name=r{number}", "--set",
                          "run.base=tiny")
    for words, job in jobs.items():
        codes, said = job.end()
        assert codes == [2] and "Traceback" not in said, said
        assert f"error: {REFUSED[words]}" in said or REFUSED[words] in said, (words, said)


def test_a_video_of_both_files_is_refused(made, tmp_path):
    folder = copied(made, tmp_path, ["emma"])
    for file in ("training", "validation"):
        path = folder / f"data/ABAW4/{file}_set_annotations.txt"
        header, row, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header, "both/00001.jpg" + row[row.index(","):], *rows]) + "\n")
    codes, said = run(folder, "train_emma.py", *TINY)
    assert codes == [2]
    assert "1 of its videos are in data/ABAW4/training_set_annotations.txt too, such as both" in said
