"""What a stage starts from: an input that is missing, broken or made for another model is left out and
counted, or refused with a message that names it."""

import argparse
import re
import shutil

import pytest
import torch

import faces
import tiny
import train_pretrain
from distributed import Team
from labels import EXPR, label_files
from tiny import (EACH_STEP, TINY, TRAIN_AU, apart, copied, done, log, metrics, ready, run, same, spoil, stop,
                  weights)

SCORE_AU = ["evaluate.py", "--task", "au", *TINY]
ALL_FRAMES = ["--set", "finetune.every=1"]


# ---- Missing input, and data that was not drawn

@pytest.mark.parametrize("script, missing, maker, without, world", [
    ("train_finetune.py", "pretrain/last.pt", "train_pretrain.py", ["pretrain", "finetune"], 2),
    ("extract_features.py", "finetune/best.pt", "train_finetune.py", ["finetune", "features"], 1),
    ("train_task.py", "features/metrics.json", "extract_features.py", ["features", "task_au"], 1),
    ("evaluate.py", "features/metrics.json", "extract_features.py", ["features"], 1),
    ("evaluate.py", "task_au/best.pt", "train_task.py --task au", ["task_au"], 1)])
def test_with_real_data_a_missing_input_is_an_error_that_names_it_and_the_command_that_makes_it(
        finished, tmp_path, script, missing, maker, without, world):
    folder = copied(finished, tmp_path, without)
    tiny.write(folder, data={"synthetic": False})
    task = ["--task", "au"] if script in ("train_task.py", "evaluate.py") else []
    codes, said = run(folder, script, *task, *TINY, world=world)
    assert codes == [2] * world and "Traceback" not in said
    command = f"python {tiny.ROOT / maker} --config tiny.yaml\n"
    assert f"error: runs/tiny/{missing} not found; make it with: {command}" in said
    assert not (folder / "runs/tiny" / without[0] / "log.csv").exists()


def test_real_data_runs_through_stage_by_stage(finished, tmp_path):
    """data.synthetic is no part of what a result depends on: a copy of the data gives the same weights."""
    folder = copied(finished, tmp_path, ["pretrain", "finetune", "features", "task_au"])
    (folder / "data/complete.json").unlink()
    tiny.write(folder, data={"synthetic": False})
    for script in ("train_pretrain.py", "train_finetune.py", "extract_features.py"):
        done(folder, script, *TINY)
    said = done(folder, *TRAIN_AU)
    assert "a complete Aff-Wild2 has 1,802,530; so the paper's numbers are left out" in said
    assert same(weights(folder / "runs/tiny/task_au"), weights(finished / "runs/tiny/task_au"))


def test_labels_of_one_task_are_enough(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for other in ("VA_Estimation_Challenge", "EXPR_Classification_Challenge"):
        shutil.rmtree(folder / "data/Aff-Wild2/annotations" / other)
    assert "task_au_fold1/best.pt" in done(folder, *TRAIN_AU, "--set", "task.fold=1")
    said = done(folder, "data.py", *TINY)
    assert re.search(r"\nau +Train_Set +4 videos, .* of them with a face; 0 videos without frames\n", said)
    assert "va" not in said


# ---- Broken images

def test_broken_images_among_the_still_faces_are_counted_and_left_out(finished, tmp_path):
    folder, place = ready(finished, tmp_path, "pretrain")
    stills = [*sorted((folder / "data").glob("RAF-DB/**/*.jpg")),
              *sorted((folder / "data").glob("AffectNet*/**/*.jpg"))]
    for path, kind in zip(stills[::7], ("truncated", "empty", "no image")):
        spoil(path, kind)
    assert "3 unreadable images in the last epoch" in done(folder, "train_pretrain.py", *TINY)
    assert [row["unreadable"] for row in log(place)] == ["3", "3"] and metrics(place)["unreadable"] == 3
    alone = weights(place)
    shutil.rmtree(place)
    done(folder, "train_pretrain.py", *TINY, world=2)
    assert apart(weights(place), alone) < 1e-5 and metrics(place)["unreadable"] == 3


def test_no_picture_is_drawn_of_faces_that_cannot_be_read(tmp_path):
    face_set = faces.FaceSet("gone", tmp_path, [b"a.jpg", b"b.jpg"], None, [True, True], {})
    unreadable, alone = train_pretrain.Faces([face_set], 8, 4, 0, 0.5), Team(0, 1, torch.device("cpu"))
    train_pretrain.draw_reconstruction(None, unreadable, alone, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_in_which_nothing_can_be_read_is_left_out(finished, tmp_path, world):
    """With one image per step, some processes and some whole steps have none."""
    folder = copied(finished, tmp_path, ["pretrain", "finetune"])
    stills = sorted((folder / "data").glob("RAF-DB/**/*.jpg"))
    frames = sorted((folder / "data/Aff-Wild2/cropped_aligned/1-30-1280x720").iterdir())
    for path in stills[:5] + frames[:5]:
        spoil(path, "empty")
    small = ["--set", "pretrain.batch=2", "--set", "finetune.batch=2",
             "--set", "pretrain.epochs=1", "--set", "finetune.epochs=1"]
    done(folder, "train_finetune.py", *TINY, *small, *ALL_FRAMES, world=world)
    for stage in ("pretrain", "finetune"):
        assert log(folder / "runs/tiny" / stage)[0]["unreadable"] == "5"
        assert all(value.isfinite().all() for value in weights(folder / "runs/tiny" / stage).values())


def test_broken_frames_and_videos_without_any_are_reported_and_training_goes_on(finished, tmp_path):
    folder = copied(finished, tmp_path, ["finetune", "features", "task_au"])
    frames, runs = folder / "data/Aff-Wild2/cropped_aligned", folder / "runs/tiny"
    names = label_files(folder / "data/Aff-Wild2/annotations", EXPR)
    spoiled, absent, faceless = list(names["Train_Set"])[:3]
    emptied = list(names["Validation_Set"])[0]
    for path, kind in zip(sorted((frames / spoiled).iterdir())[::4], ("truncated", "empty", "no image")):
        spoil(path, kind)
    shutil.rmtree(frames / absent)
    for path in (frames / faceless).iterdir():
        spoil(path, "no image")
    for path in (frames / emptied).iterdir():
        path.unlink()
    unreadable = len(list((frames / faceless).iterdir()))

    said = done(folder, "train_finetune.py", *TINY, *ALL_FRAMES)
    assert f"left out, no frames: {absent}" in said and f"left out, no frames: {emptied}" in said
    assert all(int(row["unreadable"]) >= 3 for row in log(runs / "finetune")) and unreadable > 3

    said = done(folder, "extract_features.py", *TINY, *ALL_FRAMES)
    first = sorted((frames / spoiled).iterdir())[0].name
    assert re.search(rf"left out: \S+/{spoiled}/{first}: not a readable image .* "
                     "and 2 more of this video", said)
    assert f"and {unreadable - 1} more of this video" in said
    assert metrics(runs / "features")["videos_without_any_face"] == 2
    there = {path.name for path in (runs / "features").glob("*.npy")}
    assert not {f"{video}.npy" for video in (absent, faceless, emptied)} & there
    assert f"{spoiled}.npy" in there and len(there) == 2 * 4

    said = done(folder, *TRAIN_AU, *ALL_FRAMES)
    for video, reason in ((absent, "no frames when features were extracted"), (faceless, "no readable face"),
                          (emptied, "no readable face")):
        assert re.search(rf"left out: .*{video} \({reason}\)", said)
    assert metrics(runs / "task_au")["left_out"] == {emptied: "no readable face"}
    assert metrics(runs / "task_au")["validation_videos"] == 2
    assert f"left out: {emptied} (no readable face)" in done(folder, *SCORE_AU)


# ---- Checkpoints and features that do or do not fit

def test_fine_tuning_starts_from_our_pre_training_a_file_of_the_reference_mae_or_nothing(finished, tmp_path):
    folder = copied(finished, tmp_path)
    mae = weights(finished / "runs/tiny/pretrain")
    arguments = argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75, norm_pix_loss=True,
                                   output_dir="x")
    reference = {"model": mae, "args": arguments, "epoch": 799, "optimizer": {}, "scaler": {}}
    torch.save(reference, folder / "reference.pth")
    encoder = {k: v for k, v in mae.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, folder / "encoder.pth")

    starts = {"reference": "reference.pth", "encoder": "encoder.pth", "ours": "runs/tiny/finetune/best.pt",
              "nothing": "none"}
    said, results = {}, {}
    for name, start in starts.items():
        options = ["--set", f"finetune.start={start}", "--set", f"run.name={name}"]
        said[name] = done(folder, "train_finetune.py", *TINY, *options)
        results[name] = weights(folder / f"runs/{name}/finetune")
    default = weights(finished / "runs/tiny/finetune")
    assert same(results["reference"], default) and same(results["encoder"], default)
    assert apart(results["nothing"], default) > 1e-3 and apart(results["ours"], default) > 1e-3
    assert ("starts from reference.pth; missing keys: none; unexpected keys, left out: "
            "decoder_blocks, decoder_embed") in said["reference"]
    assert "starts from encoder.pth; missing keys: none; unexpected keys, left out: none" in said["encoder"]
    assert "starts from random weights, as asked" in said["nothing"]


def test_fine_tuning_does_not_go_on_from_another_start(finished, tmp_path):
    folder = copied(finished, tmp_path, ["finetune"])
    codes, _ = run(folder, "train_finetune.py", *TINY, *EACH_STEP, hook=stop("run.Run.end_step", 2))
    assert codes == [-9]
    shutil.rmtree(folder / "runs/tiny/pretrain")
    done(folder, "train_pretrain.py", *TINY, "--set", "pretrain.lr=1e-3")
    codes, said = run(folder, "train_finetune.py", *TINY)
    assert codes == [2]
    assert re.match(r"error: runs/tiny/finetune was made from pretrain \(checksum \d+\), but "
                    r"runs/tiny/pretrain is now pretrain \(checksum \d+\)\n"
                    r"  pretrain.lr: was 0.003, now 0.001", said)


def test_a_checkpoint_of_another_architecture_is_refused_and_what_differs_listed(finished, tmp_path):
    folder = copied(finished, tmp_path)
    start = ["--set", "run.name=other", "--set", "finetune.start=runs/tiny/pretrain/last.pt"]
    for change, lines, world in (
            ("vit.dim=12", ["blocks.0.norm1.weight: file (8,), model (12,)"], 2),
            ("vit.depth=3", ["12 of 42 entries differ", "blocks.2.norm1.weight: missing in the file"], 1)):
        codes, said = run(folder, "train_finetune.py", *TINY, *start, "--set", change, world=world)
        assert codes == [2] * world and "Traceback" not in said
        assert "error: runs/tiny/pretrain/last.pt: a checkpoint of another architecture" in said
        assert all(line in said for line in lines)
        shutil.rmtree(folder / "runs/other")


def test_a_checkpoint_of_another_task_is_refused(finished, tmp_path):
    folder = copied(finished, tmp_path)
    checkpoint = "runs/tiny/task_au/best.pt"
    codes, said = run(folder, "evaluate.py", "--task", "va", *TINY, "--checkpoint", checkpoint)
    assert codes == [2] and said == f"error: {checkpoint}: trained for task_au, not for --task va\n"
    assert checkpoint in done(folder, *SCORE_AU, "--checkpoint", checkpoint)
    codes, said = run(folder, *SCORE_AU, "--checkpoint", "runs/tiny/pretrain/last.pt")
    assert codes == [2] and "runs/tiny/pretrain/last.pt" in said and "Traceback" not in said


def test_a_model_is_neither_scored_nor_trained_on_with_features_of_another_vit(finished, tmp_path):
    folder = copied(finished, tmp_path, ["features"])
    other = ["--set", "features.checkpoint=runs/tiny/pretrain/last.pt"]
    done(folder, "extract_features.py", *TINY, *other)
    codes, said = run(folder, *SCORE_AU, *other)
    assert codes == [2]
    assert re.match(r"error: runs/tiny/task_au/best.pt: trained on features of another ViT, features from "
                    r"finetune \(checksum \d+\), not features from runs/tiny/pretrain/last.pt \(check", said)
    refusal = (r"error: runs/tiny/task_au was made from features from finetune \(checksum \d+\), but "
               r"runs/tiny/features is now features from runs/tiny/pretrain/last.pt \(checksum \d+\)\n")
    codes, said = run(folder, *TRAIN_AU, *other)
    assert codes == [2] and re.match(refusal, said)
    (folder / "runs/tiny/task_au/metrics.json").unlink()
    codes, said = run(folder, *TRAIN_AU, *other, world=2)
    assert codes == [2, 2] and re.search(refusal, said)
