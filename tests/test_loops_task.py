"""Task training against a plain loop: the same batches, schedule and loss, written out without run.py, end
with the same weights bit for bit, the same log.csv, scores and pictures; evaluate.py prints these scores."""

import contextlib
import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import losses
import pictures
import stages
from labels import AU, EXPR, TASKS, VA, Task, read_labels, targets
from made_of import read_record
from metrics import binary_f1, ccc, class_f1
from plain import Plain, batches, loop_lines, not_said, seed_dropout
from postprocessing import Postprocessing
from processes import ALONE
from reports import draw_timeline
from scoring import HELD_OUT, count_frames, load, predict, segment_outputs
from segments import SegmentData, Video, labelled_faces
from settings import Config
from splits import scene, split
from stages import FILMS, checkpoint, is_drawn, log_lines, metrics, settings
from temporal import SegmentModel
from tiny import same
from tuning import best_way, count_ways

FOLDS = {"va": 0, "expr": 4, "au": 0}
EPOCHS = {"va": 0, "expr": 10, "au": 21}             # 0 asks for the task's own
OWN_EPOCHS = 40                                      # VA's
ZERO_LOSS = {"va": 2, "expr": math.log(8), "au": math.log(2)}     # of a model that always outputs 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Labels, and features that fit them."""
    return stages.write(tmp_path_factory.mktemp("tasks"))


def with_features(folder, files, task) -> list[Video]:
    return [Video(name, folder / f"runs/tiny/features/{name}.npy", read_labels(file, task))
            for name, file in files.items() if FILMS[name].images]


def outputs_of(model, videos) -> np.ndarray:
    """A model's outputs for the labelled frames of all videos: (T, K)"""
    model.eval()
    return np.concatenate([predict(model, np.load(video.features)[:len(video.labels)], 20, 12, 4, ALONE)
                           for video in videos])


def scores_of(task, outputs, labels) -> np.ndarray:
    """Shape: outputs (T, K), labels (T, K) or (T,) -> (K,)"""
    valid = labels != task.invalid
    if task is EXPR:
        return class_f1(outputs[valid].argmax(axis=1), labels[valid])
    if task is AU:
        return binary_f1(outputs > 0, labels)
    return np.array([ccc(outputs[valid[:, d], d], labels[valid[:, d], d]) for d in (0, 1)])


def chance_of(task, labels) -> np.ndarray:
    """The scores of the commonest class, and of action units that are always there. A constant's CCC is 0."""
    if task is VA:
        return np.zeros(2)
    constant = np.ones((len(labels), len(task.outputs)))
    if task is EXPR:
        constant[:, np.bincount(labels[labels >= 0]).argmax()] = 2
    return scores_of(task, constant, labels)


def columns(lines: list[str]) -> dict[str, list[str]]:
    """The columns of a score table: {title: cells}. The first is titled with the metric."""
    titles, *rows = [re.split(r"\s{2,}", line) for line in lines]
    rows = [row + [""] * (len(titles) - len(row)) for row in rows]                   # no frames of the mean
    return {title: list(cells) for title, cells in zip(titles, zip(*rows, strict=True), strict=True)}


def three_digits(scores) -> list[str]:
    return [f"{score:.3f}" for score in [*scores, scores.mean()]]


def plain_task(task, config, epochs: int, train, val) -> Plain:
    t, seed = config.task, config.run.seed
    cut, labels = SegmentData(train, task, 20, 12), np.concatenate([video.labels for video in val])
    torch.manual_seed(seed)
    model = SegmentModel(stages.FEATURE_WIDTH, len(task.outputs), **asdict(config.temporal))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=t.weight_decay)
    plain = Plain(model, optimizer, t, math.ceil(len(cut) / t.batch), epochs, "segments")
    for epoch in range(epochs):
        model.train()
        for step, batch in enumerate(batches(len(cut), t.batch, seed, epoch)):
            x, target, valid, real = cut.collate([cut[i] for i in batch])
            seed_dropout(seed, epoch, step)
            loss = getattr(losses, task.loss)(model(x.float(), real), target, valid)
            loss.backward()
            plain.step(len(batch), loss)
        score = scores_of(task, outputs_of(model, val), labels).mean()
        best = plain.keep_best(score)
        if best or (epoch + 1) % (epochs // 10) == 0 or epoch + 1 == epochs:
            plain.lines.append(f"  epoch {epoch + 1}/{epochs}  loss {plain.mean_loss():.4f}  "
                               f"validation {task.metric.name} {score:.3f}{best}")
        plain.end_epoch(score)
    return plain


class Trained(NamedTuple):
    """A task training in the folder `out`, and the plain loop beside it."""
    task: Task
    fold: int
    arguments: list            # of the command line
    config: Config
    out: Path
    name: str                  # of the run folder, as it is printed
    said: str
    files: tuple               # label files for training and validation
    train: list                # of Video
    val: list
    labels: np.ndarray         # of all validation videos that have features
    plain: Plain               # with the best epoch's weights in its model
    last_weights: dict
    scores: np.ndarray         # of the best epoch
    chance: np.ndarray


@pytest.fixture(scope="module", params=TASKS)
def trained(made, request):
    task, fold, epochs = TASKS[request.param], FOLDS[request.param], EPOCHS[request.param]
    options = [f"task.fold={fold}", f"task.epochs={epochs}"]
    config, name = settings(made, *options), f"runs/tiny/task_{task.name}" + (f"_fold{fold}" if fold else "")
    arguments = ["--task", task.name, *stages.overriding(options)]
    said = stages.start(made, "train_task.py", *arguments)
    files = split(made / "labels", task, fold)
    train, val = (with_features(made, part, task) for part in files)
    plain = plain_task(task, config, epochs or OWN_EPOCHS, train, val)
    last_weights = {key: value.clone() for key, value in plain.model.state_dict().items()}
    plain.model.load_state_dict(plain.best_weights)
    labels = np.concatenate([video.labels for video in val])
    scores = scores_of(task, outputs_of(plain.model, val), labels)
    return Trained(task, fold, arguments, config, made / name, name, said, files, train, val, labels, plain,
                   last_weights, scores, chance_of(task, labels))


def left_out(files) -> dict[str, str]:
    """{video: why it is not scored}: it has an empty folder, or none."""
    return {video: "no readable face" if FILMS[video].images is not None
            else "no frames when features were extracted" for video in files if not FILMS[video].images}


def in_words(left_out: dict) -> str:
    return "; ".join(f"{video} ({reason})" for video, reason in left_out.items())


def unseen(videos) -> list[Video]:
    """Those that the ViT was not fine-tuned on."""
    return [video for video in videos if FILMS[video.name].split != "Train_Set"]


def test_task_training_is_the_plain_loop(trained):
    plain, best = trained.plain, checkpoint(trained.out, "best.pt")
    assert same(checkpoint(trained.out, "last.pt")["model"], trained.last_weights)
    assert same(best["model"], plain.best_weights) and best["score"] == pytest.approx(plain.best)
    assert best["made_of"]["stage"] == trained.out.name
    assert best["epoch"] == plain.best_epoch < plain.epochs, "take another seed or learning rate"
    assert log_lines(trained.out) == ["epoch,lr,loss,gradient_norm,score,seconds", *plain.rows]
    assert loop_lines(trained.said) == plain.lines


def test_a_task_training_ends_with_the_scores_of_its_best_epoch_and_evaluation_finds_them(made, trained):
    task, val, missing = trained.task, trained.val, left_out(trained.files[1])
    seen, expected = len(val) - len(unseen(val)), {"ours": trained.scores, "chance": trained.chance}
    if seen:
        expected["unseen"] = scores_of(task, outputs_of(trained.plain.model, unseen(val)),
                                       np.concatenate([video.labels for video in unseen(val)]))
    each = {name: pytest.approx(score) for name, score in zip(task.outputs, trained.scores)}
    written = metrics(trained.out)
    for name in ("score_interval", "outputs", "confusion_columns", "confusion"):     # test_score_table.py
        written.pop(name)
    data = written.pop("data")
    assert written == {
        "metric": task.metric.name, "score": pytest.approx(trained.scores.mean()), **each,
        "chance": pytest.approx(trained.chance.mean()), "validation_videos": len(val), "seen_videos": seen,
        "left_out": missing, "comparable": False}
    text = (trained.out / "scores.txt").read_text().splitlines()
    assert f"({data})" in text[1] and data.endswith("so the paper's numbers are left out")
    assert text[0] == f"{trained.name}/best.pt"
    assert re.fullmatch(rf"{len(val)} validation videos, {len(trained.labels)} frames \(\d+ labelled frames "
                        r"with a face in both sets, a complete Aff-Wild2 has [\d,]+; so the paper's numbers "
                        r"are left out\)", text[1])
    last = [f"{seen} of these {len(val)} videos show scenes on which the ViT was fine-tuned; "
            "\"unseen\" is the score of the others alone"] if seen else []
    last += [f"left out: {in_words(missing)}"] if missing else []
    shown = columns(text[2:4 + len(task.outputs)])
    assert shown[task.metric.name] == [*task.outputs, "mean"]
    assert shown.keys() == {task.metric.name, "95 %", "frames", *expected}      # nothing of the paper's
    assert {title: shown[title] for title in expected} == {
        title: three_digits(scores) for title, scores in expected.items()}
    assert text[4 + len(task.outputs):] == last
    drawn = f"pictures: {trained.name}/curves.png, {trained.name}/timeline.png"
    assert trained.said.splitlines()[-len(text) - 2:] == ["", *text, drawn]
    assert stages.start(made, "evaluate.py", *trained.arguments).splitlines()[:len(text)] == text
    assert stages.start(made, "train_task.py", *trained.arguments).splitlines() == [
        f"{trained.name} is finished; nothing to do", "", *text, ""]


def test_with_held_out_scenes_the_best_epoch_is_the_best_on_them_and_they_count_as_training_data(made):
    options = ["task.held_out=0.4", "task.epochs=6", "run.name=held", "run.base=tiny"]
    said = stages.start(made, "train_task.py", "--task", "va", *stages.overriding(options))
    train, val = (with_features(made, part, VA) for part in split(made / "labels", VA, 0))
    out = made / "runs/held/task_va"
    held = [video for video in train if video.name in read_record(out)["data"][HELD_OUT]]
    assert {scene(video.name) for video in held} == {"1", "5"}              # of 2, 1, 4, 5 and 3, by length
    assert f"  held out, to choose the epoch: {len(held)} training videos\n" in said
    model = SegmentModel(stages.FEATURE_WIDTH, 2, **asdict(settings(made).temporal))
    best = checkpoint(out, "best.pt")
    model.load_state_dict(best["model"])
    scores = [scores_of(VA, outputs_of(model, part), np.concatenate([video.labels for video in part])).mean()
              for part in (held, val)]
    assert best["score"] == pytest.approx(scores[0], abs=1e-5) != pytest.approx(scores[1], abs=1e-3)
    assert metrics(out)["score"] == pytest.approx(scores[1], abs=1e-5)
    frames = labelled_faces([*train, *val], VA)
    assert f"({frames:,} labelled frames with a face in both sets" in (out / "scores.txt").read_text()


def test_tuning_scores_the_validation_videos_in_the_way_that_is_best_on_the_held_out_ones(made):
    options = stages.overriding(["task.held_out=0.4", "task.epochs=6", "run.name=held", "run.base=tiny"])
    stages.start(made, "train_task.py", "--task", "au", *options)
    train, val = (with_features(made, part, AU) for part in split(made / "labels", AU, 0))
    trained, names = load(made / "runs/held/task_au/best.pt"), read_record(made / "runs/held/task_au")["data"]
    held = [video for video in train if video.name in names[HELD_OUT]]

    def total(videos, count):
        features = [np.load(video.features)[:len(video.labels)] for video in videos]
        outputs = [segment_outputs(trained.model, x, 20, 12, 4, ALONE) for x in features]
        return sum(count(AU, *y, *targets(video.labels, AU)) for y, video in zip(outputs, videos))
    how = best_way(AU, total(held, count_ways))
    tuned, plain = (AU.metric.score(total(val, partial(count_frames, how=each))).mean()
                    for each in (how, Postprocessing()))
    assert f"{tuned:.3f}" != f"{plain:.3f}", "take another seed: tuning changes nothing"
    said = stages.start(made, "evaluate.py", "--task", "au", *options, "--tune")
    assert f"{tuned:.3f}" == re.search(r"mean +(\S+) +\[", said)[1] and how.text() in said
    assert stages.start(made, "evaluate.py", "--task", "au", *options).count(f"{plain:.3f}")


@pytest.mark.parametrize("merge", ["triangular", "none"])
def test_evaluation_merges_segments_as_it_is_asked(made, trained, merge):
    trained.plain.model.eval()
    features = [np.load(video.features)[:len(video.labels)] for video in trained.val]
    outputs = np.concatenate([predict(trained.plain.model, x, 20, 12, 4, ALONE, merge) for x in features])
    expected = scores_of(trained.task, outputs, trained.labels).mean()
    said = stages.start(made, "evaluate.py", *trained.arguments, "--merge", merge)
    assert f"{expected:.3f}" == re.search(r"mean +(\S+) +\[", said)[1]
    assert f"merging: {merge}; post-processing: none" in said
    assert ("authors' protocol" in said) == (merge != "none")


def test_a_task_training_says_what_it_trains_on(trained):
    task, plain = trained.task, trained.plain
    numbers = sum(p.numel() for p in plain.model.parameters())
    segments = len(SegmentData(trained.train, task, 20, 12))
    lines = [f"{task.name}: {numbers:,} parameters, {segments} segments, {plain.epochs} epochs of "
             f"{plain.steps} steps; effective batch 4 = 4 x 1 accumulation x 1 processes, on cpu"]
    for title, files, videos in (("training", trained.files[0], trained.train),
                                 ("validation", trained.files[1], trained.val)):
        missing, frames = left_out(files), sum(len(video.labels) for video in videos)
        lines.append(f"  {title}: {len(videos)} videos, {frames} frames"
                     + (f"; left out: {in_words(missing)}" if missing else ""))
    tuned = len(trained.val) - len(unseen(trained.val))
    if tuned:
        lines.append(f"  warning: {tuned} of these {len(trained.val)} videos show scenes on which the ViT "
                     "was fine-tuned")
    assert not not_said(trained.said, *lines)
    assert ("warning" in trained.said) == (tuned > 0) == (trained.fold > 0)


def test_a_task_training_leaves_every_promised_file_and_draws_its_pictures(made, trained, tmp_path):
    out, levels = trained.out, {"loss": ZERO_LOSS[trained.task.name], "score": trained.chance.mean()}
    assert stages.files(out) == {"config.yaml", "made_of.json", "last.pt", "best.pt", "log.csv",
                                 "metrics.json", "scores.txt", "video_sums.json", "curves.png",
                                 "timeline.png"}
    pictures.curves(out / "log.csv", tmp_path / "curves.png", levels)
    with contextlib.chdir(made):
        draw_timeline(trained.plain.model, trained.val, trained.task, trained.config, ALONE,
                      tmp_path / "timeline.png")
    for name in ("curves.png", "timeline.png"):
        assert is_drawn(out / name) and (out / name).read_bytes() == (tmp_path / name).read_bytes(), name
