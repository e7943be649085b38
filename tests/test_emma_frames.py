"""EMMA on whole videos: the network that a checkpoint gives back, the outputs of each frame, the sums of the
validation videos, and what is refused."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch

import emma_frames
import stages
import tiny
from cnn import ResNet18
from config import Config
from dan import DAN
from data import VideoFrames
from emma import EMMA, OUTPUTS
from emma_frames import load, outputs_of, video_sums
from images import normalise, read_image, resize
from labels import AU, EXPR, TASKS, VA, read_labels, targets
from made_of import read_record
from metrics import binary_f1, ccc, class_f1
from processes import ALONE, in_team
from run import Progress
from score_table import score_table
from segments import open_videos
from splits import split
from stages import FILMS, settings

CHECKPOINT = "runs/tiny/emma/best.pt"
ANY = Progress(1, "frames", ALONE)


def blurred(network):
    """The network after some training steps, as it were: statistics of BatchNorm that no new network has."""
    network.train()
    network(torch.randn(8, 3, 16, 16))
    return network.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The stages' random videos, one of them with 15 images past its labels, and three EMMAs. -> the folder,
    {run: EMMA}"""
    folder = stages.write(tmp_path_factory.mktemp("emma_frames"))
    for task in TASKS.values():
        file = folder / f"labels/{task.folders[0]}/Validation_Set/6.txt"
        file.write_text("\n".join(file.read_text().splitlines()[:1 + 30]))
    torch.manual_seed(5)
    return folder, {"tiny": stages.write_emma(folder),
                    "resnet": stages.write_emma(folder, "resnet", blurred(ResNet18(8, 2))),
                    "dan": stages.write_emma(folder, "dan", blurred(DAN(8, 3, 4)))}


# ---- The network

@pytest.mark.parametrize("run", ["tiny", "resnet", "dan"])
def test_a_checkpoint_alone_gives_the_network_back_bit_for_bit(made, run):
    folder, models = made
    trained, images = load(folder / f"runs/{run}/emma/best.pt"), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(trained.model(images), models[run](images))
    assert not any(part.training for part in trained.model.modules())
    assert trained.record["stage"] == "emma" and trained.tasks == list(TASKS.values())
    assert trained.config.emma.weights == [1.0, 0.5, 0.25]
    assert trained.changed["vit.dim"] == ("pretrain", 8, 768)


def test_the_parts_of_the_outputs_are_those_of_the_tasks():
    outputs = np.arange(2.0 * OUTPUTS).reshape(2, OUTPUTS)
    parts = [outputs_of(task, outputs) for task in TASKS.values()]
    assert np.array_equal(np.concatenate(parts, axis=1), outputs)
    assert [part.shape for part in parts] == [(2, len(task.outputs)) for task in TASKS.values()]


# ---- A video

@torch.no_grad()
def plain_outputs(folder, model: EMMA, name: str, length: int) -> np.ndarray:
    """The outputs of each frame of a video, one image at a time, gaps filled by their definition: (T, 22)."""
    film, rows = FILMS[name], [None] * length
    for number in sorted(set(film.images) - set(film.broken)):
        image = resize(read_image(folder / f"frames/{name}/{number:05d}.jpg"), (16, 16))
        rows[number - 1] = model(normalise(torch.tensor(image)[None]))[0].numpy()
    known = [t for t in range(length) if rows[t] is not None]
    return np.stack([rows[max([k for k in known if k <= t], default=known[0])] for t in range(length)])


@pytest.mark.parametrize("run", ["tiny", "dan"])
@pytest.mark.parametrize("name, length", [("1", 43), ("6", 45), ("7", 30), ("4", 33)])
def test_each_frame_has_what_the_network_gives_for_its_image_or_for_the_one_before(made, run, name, length):
    folder, models = made
    trained = load(folder / f"runs/{run}/emma/best.pt", settings(folder))
    outputs, noface = trained.predict(VideoFrames(folder / "frames" / name, 16), length, ANY)
    assert outputs.dtype == np.float32
    assert outputs == pytest.approx(plain_outputs(folder, models[run], name, length), abs=2e-5)
    there = set(FILMS[name].images) - set(FILMS[name].broken)
    assert noface.tolist() == [number not in there for number in range(1, length + 1)]
    assert len(np.unique(outputs[:, 0])) == len(there)               # frames differ, so no mix-up passes


def test_a_video_without_a_readable_face_has_outputs_of_0_and_says_so(made):
    folder, _ = made
    trained = load(folder / CHECKPOINT, settings(folder))
    outputs, noface = trained.predict(VideoFrames(folder / "frames/96", 16), 3, ANY)
    assert noface.all() and not outputs.any()


# ---- The validation videos

def sums_of(folder, task, *overrides, run="tiny", team=ALONE):
    with contextlib.chdir(folder):
        trained = load(f"runs/{run}/emma/best.pt", settings(folder, *overrides), team)
        return video_sums(trained, [task])[task.name]


def labels_of(folder, name, task) -> np.ndarray:
    return read_labels(folder / f"labels/{task.folders[0]}/Validation_Set/{name}.txt", task)


@pytest.mark.parametrize("run", ["tiny", "resnet"])
def test_the_sums_tell_the_scores_of_all_labelled_frames_taken_together(made, run):
    folder, models = made
    outputs, labels = [], {task: [] for task in TASKS}
    for name, length in (("6", 30), ("7", 19)):
        outputs.append(plain_outputs(folder, models[run], name, FILMS[name].frames)[:length])
        for task in TASKS.values():
            labels[task.name].append(labels_of(folder, name, task))
    outputs, labels = np.concatenate(outputs), {task: np.concatenate(parts) for task, parts in labels.items()}
    va, expr, au = labels.values()
    expected = {
        "va": [ccc(outputs[va[:, d] != VA.invalid, d], va[va[:, d] != VA.invalid, d]) for d in range(2)],
        "expr": class_f1(outputs[expr != EXPR.invalid, 2:10].argmax(axis=1), expr[expr != EXPR.invalid]),
        "au": binary_f1((outputs[:, 10:] > 0).astype(int), au)}
    assert len(set(outputs[:, 2:10].argmax(axis=1))) > 2 and AU.invalid in au
    for task in TASKS.values():
        names, sums = sums_of(folder, task, run=run)
        assert names == ["6", "7"] and len(sums) == 2
        assert task.metric.score(sums.sum(axis=0)) == pytest.approx(expected[task.name], abs=1e-5)


def test_videos_and_labelled_frames_are_those_that_a_segment_model_is_scored_on(made, tmp_path):
    folder = tiny.copied(made[0], tmp_path)
    for task in TASKS.values():                            # more reasons to be left out: no labels, no face
        place = folder / f"labels/{task.folders[0]}/Validation_Set"
        for name in ("95", "96"):
            (place / f"{name}.txt").write_text((place / "6.txt").read_text())
        (place / "9.txt").write_text(",".join(task.outputs) + "\n")
    table = json.loads((folder / "runs/tiny/features/videos.json").read_text())
    table |= {"95": {"frames": 45, "faces": 0}, "96": {"frames": 45, "faces": 0}}
    (folder / "runs/tiny/features/videos.json").write_text(json.dumps(table))
    for task in TASKS.values():
        names, sums = sums_of(folder, task)
        videos, _, _ = open_videos(split(folder / "labels", task, 0)[1], folder / "runs/tiny/features", task)
        assert names == [video.name for video in videos] == ["6", "7"]
        for of_video, video in zip(sums, videos):
            target, valid = targets(video.labels, task)
            outputs = np.random.default_rng(0).normal(size=(len(target), len(task.outputs)))
            theirs = task.metric.count(outputs, target, valid)
            assert np.array_equal(task.metric.labelled(of_video), task.metric.labelled(theirs))


def test_all_tasks_together_have_the_sums_of_each_alone_and_a_video_is_read_once(made, tmp_path, monkeypatch):
    folder, read = tiny.copied(made[0], tmp_path), []
    (folder / f"labels/{AU.folders[0]}/Validation_Set/7.txt").unlink()      # not every task has every video
    predict = emma_frames.Trained.predict

    def noted(trained, frames, length, progress):
        read.append(length)
        return predict(trained, frames, length, progress)
    monkeypatch.setattr(emma_frames.Trained, "predict", noted)
    with contextlib.chdir(folder):
        found = video_sums(load(CHECKPOINT, settings(folder), ALONE), TASKS.values())
    assert read == [45, 19]                                       # the frames of 6 and of 7
    for task in TASKS.values():
        names, sums = sums_of(folder, task)
        assert found[task.name][0] == names == (["6"] if task is AU else ["6", "7"])
        assert np.array_equal(found[task.name][1], sums)


def test_two_processes_give_the_sums_of_one_bit_for_bit(made):
    folder, _ = made
    codes, results = in_team(2, lambda team: sums_of(folder, AU, team=team))
    names, sums = sums_of(folder, AU)
    assert codes == [0, 0] and sums.any()
    for theirs in results:
        assert theirs[0] == names and np.array_equal(theirs[1], sums)


def test_a_scene_that_emma_or_its_vit_was_trained_on_is_left_out_and_named(made, tmp_path, capsys):
    folder = tiny.copied(made[0], tmp_path)
    for path in (*folder.glob("labels/*/Validation_Set/6.txt"), folder / "frames/6"):
        path.rename(path.with_name(path.name.replace("6", "6_right")))
    stages.write_emma(folder, "seen", trained_on=("1", "6_left"))
    names, sums = sums_of(folder, VA, run="seen")
    said = capsys.readouterr().out
    assert names == ["7"] and np.array_equal(sums, sums_of(folder, VA)[1][1:])
    assert "  left out of va: 6_right (EMMA was trained on its scene); 8 (no frames)\n" in said
    path = folder / CHECKPOINT
    saved = torch.load(path, weights_only=True)
    saved["made_of"]["from"] = {**read_record(folder / "runs/tiny/finetune"), "file": "tuned.pt"}
    saved["made_of"]["from"]["data"] = {"training videos": ["7_right", "6_left"]}
    torch.save(saved, path)
    with pytest.raises(ValueError, match="emma/best.pt: no validation video of va can be scored"):
        sums_of(folder, VA)
    assert "6_right, 7 (EMMA was trained on its scene)" in capsys.readouterr().out


# ---- The script

def test_the_script_prints_the_tables_of_the_tasks_that_emma_has_learned(made, tmp_path):
    folder, _ = made
    said = stages.start(folder, "emma_frames.py")
    head, *tables = said.strip().split("\n\n")
    lines = [line for line in head.splitlines() if "not a readable image" not in line]
    assert lines == ["runs/tiny/emma/best.pt, each frame by itself",
                     *(f"  left out of {task}: 8 (no frames)" for task in TASKS)]
    for task, table in zip(TASKS.values(), tables, strict=True):
        sums = sums_of(folder, task)[1]
        assert table.splitlines() == ["2 validation videos",
                                      *score_table(task, sums, comparable=False).splitlines()]
    stages.write_emma(folder, "one_task", weights=(0, 0, 1))
    said = stages.start(folder, "emma_frames.py", "--checkpoint", "runs/one_task/emma/best.pt")
    assert "mean F1" in said and "macro F1" not in said and "CCC" not in said
    assert "emma.weights=[0.0, 0.0, 1.0] as in runs/one_task/emma/best.pt; the configuration has" in said


def test_without_an_emma_the_script_names_the_command_that_trains_it(made, capsys):
    with pytest.raises(SystemExit, match="2"):
        stages.start(made[0], "emma_frames.py", "--set", "run.name=new")
    assert "runs/new/emma/best.pt not found; make it with: python " in capsys.readouterr().err


# ---- What is refused

def changed(change):
    """A function that spoils a checkpoint."""
    def spoil(path):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)
    return spoil


@pytest.mark.parametrize("spoil, overrides, message", [
    (lambda path: path.unlink(), [], "best.pt: no such checkpoint"),
    (lambda path: path.write_bytes(path.read_bytes()[:900]), [], "best.pt: not a whole, plain checkpoint"),
    (changed(lambda saved: saved.pop("made_of")), [],
     "best.pt: does not tell what it was made of; expected EMMA, as train_emma.py writes it, like runs/"),
    (changed(lambda saved: saved["made_of"].update(stage="finetune")), [],
     "best.pt: of stage finetune; expected EMMA"),
    (changed(lambda saved: saved["made_of"].update(stage="task_va")), [], "best.pt: of stage task_va; exp"),
    (changed(lambda saved: saved.update(model=[1])), [], "best.pt: holds no weights"),
    (changed(lambda saved: saved["model"].pop("va_head.0.bias")), [],
     "another architecture(.|\n)*va_head.0.bias: missing in the file"),
    (changed(lambda saved: saved["model"].update({"cnn.conv1.weight": torch.zeros(2, 3, 7, 7)})), [],
     "best.pt: got conv1.weight"),
    (changed(lambda saved: saved["made_of"]["settings"].update({"vit.dim": 12})), [],
     "best.pt: a checkpoint of another architecture(.|\n)*vit.cls_token: file"),
    (None, ["vit.depth=3"], "made with other settings:\n  vit.depth: was 2, now 3(.|\n)*leave them out"),
    (None, ["data.labels="], "data.labels: no VA_Estimation_Challenge in ''"),
    (None, ["data.frames=[nowhere]"], "data.frames: nowhere is no folder")])
def test_what_is_no_emma_or_does_not_fit_is_refused(made, tmp_path, spoil, overrides, message):
    folder, path = made[0], tmp_path / "best.pt"
    shutil.copy(folder / CHECKPOINT, path)
    if spoil:
        spoil(path)
    with contextlib.chdir(folder), pytest.raises(ValueError, match=message):
        video_sums(load(path, settings(folder, *overrides), ALONE), [VA])


def test_a_task_that_emma_was_not_trained_on_is_not_scored(made):
    stages.write_emma(made[0], "no_va", weights=(0, 1, 1))
    assert load(made[0] / "runs/no_va/emma/best.pt", Config()).tasks == [EXPR, AU]
    with pytest.raises(ValueError, match=r"trained without va \(emma.weights=\[0.0, 1.0, 1.0\]\)"):
        sums_of(made[0], VA, run="no_va")
