"""scoring.py: whole videos predicted by segments, each labelled frame scored once; single images; which
checkpoints may be scored, and what is said of a score."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import Images, Video, noface_path, segments
from engine.config import Config
from engine.settings import Segments, Vit
from engine.training import Progress
from images import normalise
from labels import AU, EXPR, TASKS, VA
from metrics import binary_f1, ccc, class_f1
from processes import ALONE, in_team
from scoring import (HELD_OUT, best_smoothing, check_features, check_scenes, count_images, each_frame,
                     extractor, labelled_faces, load, means_over, of_videos, predict, reasons, report,
                     sums_of, to_score)
from temporal import SegmentModel
from vit import VisionTransformer

SMALL = dict(channels=[8], kernels=[3], dilations=[1], width=8, layers=1, heads=2, hidden=8, head=8)
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def counting(frames, dim=1):
    """Features of a video: frame t's is t. float16 holds whole numbers to 2,048."""
    return np.tile(np.arange(frames, dtype=np.float16)[:, None], (1, dim))


def drawn(task, frames, seed=0):
    """Outputs and labels of some frames, a fifth of the labels invalid."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    labels = {"va": rng.uniform(-1, 1, (frames, K)), "expr": rng.integers(0, 7, frames),
              "au": rng.random((frames, K)) < 0.3}[task.name].astype(task.dtype)
    labels[rng.random(labels.shape) < 0.2] = task.invalid
    return rng.normal(size=(frames, K)).astype(np.float32), labels


def alone(task, outputs, labels):
    """What the metric's own function gives."""
    if task is VA:
        return [ccc(outputs[labels[:, d] != -5, d], labels[labels[:, d] != -5, d]) for d in range(2)]
    if task is EXPR:
        return class_f1(outputs[labels >= 0].argmax(1), labels[labels >= 0])
    return binary_f1(outputs > 0, labels)


# ---- Whole videos

class Telltale(torch.nn.Module):
    """Output of a frame: its own number, and that of its segment's first frame; rubbish in the padding."""

    def __init__(self):
        super().__init__()
        self.dim, self.batches = 1, []

    def forward(self, x, valid):
        assert not x[~valid].any() and not torch.is_grad_enabled()
        self.batches.append(len(x))
        y = torch.stack([x[..., 0], x[:, :1, 0].expand(x.shape[:2])], dim=2)
        return y.masked_fill(~valid[..., None], 1e9)


@pytest.mark.parametrize("frames", [1, 73, 300, 301, 600, 1001])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_each_frame_gets_the_mean_of_the_segments_that_cover_it(frames, batch):
    model, parts = Telltale(), segments(frames, 300, 200)
    config = Config()
    config.segments, config.task.batch = Segments(300, 200), batch
    y = predict(model, config, ALONE, counting(frames))
    assert y.dtype == np.float32 and np.array_equal(y[:, 0], np.arange(frames))
    starts = [np.mean([start for start, end in parts if start <= t < end]) for t in range(frames)]
    assert y[:, 1] == pytest.approx(starts)
    assert max(model.batches) <= batch and sum(model.batches) == len(parts)


@of_each_task
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_labelled_frame_counts_once_whatever_the_number_of_processes(tmp_path, task, world):
    outputs, videos = {}, []
    for name, frames in (("b", 40), ("a", 40), ("c", 7), ("d", 90)):
        outputs[name], labels = drawn(task, frames, seed=len(videos))
        videos.append(Video(name, tmp_path / f"{name}.npy", labels))

    def work(team):
        seen = []
        found = of_videos(lambda video: seen.append(video.name) or outputs[video.name], videos, team)
        return seen, sums_of(found, videos, task)
    _, results = in_team(world, work) if world > 1 else (0, [work(ALONE)])
    assert sorted(sum((names for names, _ in results), [])) == ["a", "b", "c", "d"]
    assert results[0][0][0] == "d"                                          # the longest first
    one = task.metric.score(results[0][1].sum(axis=0))
    everything = np.concatenate([outputs[video.name] for video in videos])
    labels = np.concatenate([video.labels for video in videos])
    assert one == pytest.approx(alone(task, everything, labels), abs=1e-12)
    assert all(np.array_equal(sums, results[0][1]) for _, sums in results)


# ---- Single images

class Files:
    """Faces in memory, frames of a video; frame 5 cannot be read."""

    def __init__(self, *numbers):
        self.numbers = np.array(numbers)

    def __len__(self):
        return len(self.numbers)

    def where(self, i):
        return f"{self.numbers[i]}.jpg"

    def read(self, i):
        if self.numbers[i] == 5:
            raise ValueError("5.jpg: not a readable image")
        return Image.new("RGB", (8, 8), (30 * int(self.numbers[i]),) * 3)


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_a_frame_without_a_face_repeats_the_one_before_it_and_at_the_start_the_first(batch, capfd):
    config, progress = Config(), Progress(9, "frames", ALONE)
    config.vit.image_size, config.features.batch, config.run.workers = 8, batch, 0
    files = Files(2, 3, 5, 8)
    expected = {n: normalise(torch.full((1, 8, 8, 3), 30 * n, dtype=torch.uint8)).mean().item()
                for n in (2, 3, 8)}
    outputs, noface = each_frame(lambda x: x.mean(dim=(2, 3)), "", 3, np.float32, config, ALONE, files, 9,
                                 progress)
    assert noface.tolist() == [n not in expected for n in range(1, 10)] and progress.done == 9
    assert outputs.mean(axis=1) == pytest.approx([expected[n] for n in (2, 2, 3, 3, 3, 3, 3, 8, 8)], abs=1e-5)
    assert capfd.readouterr().out.count("left out: 5.jpg: not a readable image") == 1
    outputs, noface = each_frame(lambda x: x.mean(dim=(2, 3)) + 1, "", 3, np.float16, config, ALONE, Files(5),
                                 5, progress)
    assert noface.all() and not outputs.any() and outputs.dtype == np.float16


def test_outputs_that_are_not_finite_are_refused_also_if_only_float16_cannot_hold_them():
    config = Config()
    config.vit.image_size, config.run.workers = 8, 0
    for dtype, value in ((np.float32, math.nan), (np.float16, 7e4)):
        with pytest.raises(ValueError, match="a.pt: its outputs are not finite"):
            each_frame(lambda x: torch.full((len(x), 3), value), "a.pt", 3, dtype, config, ALONE, Files(2, 3),
                       3, Progress(3, "frames", ALONE))


@pytest.mark.parametrize("stage, told, token", [("finetune", "cls", "mean"), ("finetune", "mean", "cls"),
                                                ("emma", None, "mean"), ("cotex", None, "mean")])
def test_a_vit_whose_training_used_another_token_gives_no_features(tmp_path, stage, told, token):
    config, path = Config(), tmp_path / "best.pt"
    config.vit, config.features.checkpoint = Vit(16, 8, 8, 1, 2), str(path)
    vit, settings = VisionTransformer(**vars(config.vit)), {"finetune.token": told} if told else {}
    torch.save({"model": vit.state_dict(), "made_of": {"stage": stage, "settings": settings}}, path)
    config.finetune.token = token
    with pytest.raises(ValueError, match=f"of stage {stage}, .*--set finetune.token={told or 'cls'}"):
        extractor(config, ALONE)
    config.finetune.token = told or "cls"
    _, record, said = extractor(config, ALONE)
    assert record["stage"] == stage and said.endswith("unexpected keys, left out: none")


TRAINING = {"unless_stopped": iter, "obey_signals": lambda: None}           # one that is never asked to stop


@pytest.mark.parametrize("world", [1, 2])
def test_each_image_is_counted_once_by_its_class_and_what_cannot_be_read_is_counted_apart(world, capfd):
    config = Config()
    config.vit.image_size, config.features.batch, config.run.workers = 8, 2, 0
    labels = np.array([0, 1, 1, -1])

    def work(team, files=Files(1, 2, 5, 7)):
        images = Images(files, 8, [labels])
        return count_images(SimpleNamespace(config=config, team=team, **TRAINING), lambda x: (
            x.mean(dim=(2, 3))[:, :1] * torch.tensor([1.0, 0.0, -1.0])), images)
    _, results = in_team(world, work) if world > 1 else (0, [work(ALONE)])
    sums, unreadable = results[0]
    bright = [normalise(torch.full((1, 8, 8, 3), 30 * n, dtype=torch.uint8)).mean() > 0 for n in (1, 2)]
    expected = np.zeros((3, 3))
    for label, light in zip((0, 1), bright):
        expected[label, 0 if light else 2] += 1
    assert np.array_equal(sums, expected) and unreadable == 1
    with pytest.raises(ValueError, match="none of 2 images can be scored, such as 5.jpg"):
        work(ALONE, Files(5, 5))


# ---- Checkpoints

def checkpoint(folder, task, record=True, **changes):
    torch.manual_seed(0)
    model = SegmentModel(3, len(task.outputs), **SMALL)
    state = {"model": model.state_dict()}
    if record:
        settings = {f"temporal.{name}": value for name, value in SMALL.items()}
        state["made_of"] = {"stage": f"task_{task.name}", "data": {"training videos": ["a_left"]},
                            "from": None, "settings": settings | {"segments.window": 10,
                                                                  "segments.stride": 7}} | changes
    torch.save(state, folder / "best.pt")
    return folder / "best.pt", model.eval()


@of_each_task
def test_a_checkpoint_alone_predicts(tmp_path, task):
    path, model = checkpoint(tmp_path, task)
    trained = load(path)
    assert trained.tasks == [task] and trained.config.segments.window == 10
    assert trained.changed["segments.window"] == (f"task_{task.name}", 10, 300)
    expected = predict(model, trained.config, ALONE, counting(27, 3))
    assert np.array_equal(trained.predict(counting(27, 3)), expected)


@pytest.mark.parametrize("record, task, features, message", [
    ({}, VA, 0, "best.pt: of stage task_au, not a segment model for --task va"),
    ({"stage": "finetune"}, None, 0, "best.pt: of stage finetune, not a segment model"),
    (None, None, 0, "best.pt: of stage unknown, not a segment model"),
    ({"settings": {"temporal.width": 16}}, None, 0, "best.pt: a checkpoint of another arch.*mismatch for t"),
    ({}, AU, np.zeros((4, 5)), "best.pt: expected the features of a video, .T, 3., got .4, 5."),
    ({}, AU, np.zeros((0, 3)), "got .0, 3."), ({}, AU, np.zeros(3), "got .3,."),
    ({}, AU, np.full((4, 3), np.nan), "best.pt: its outputs are not finite")])
def test_what_is_no_segment_model_of_this_task_or_does_not_fit_it_is_refused(
        tmp_path, record, task, features, message):
    path, _ = checkpoint(tmp_path, AU, record is not None, **record or {})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(path, task=task).predict(features)


def test_a_model_is_not_scored_on_other_features_nor_on_scenes_that_it_was_trained_on(tmp_path):
    vit = {"stage": "finetune", "checksum": 5}
    features = {"stage": "features", "settings": {"a": 1}, "from": vit}
    record = {"from": features, "data": {"training videos": ["a_left"], HELD_OUT: ["b"]}}
    check_features("best.pt", record, {**features, "data": 3})
    with pytest.raises(ValueError, match="of another ViT, features from finetune .checksum 5., not "):
        check_features("best.pt", record, {**features, "from": {**vit, "checksum": 6}})

    def named(*names):
        return [Video(name, tmp_path, None) for name in names]
    check_scenes("best.pt", record, named("c", "bb"))
    with pytest.raises(ValueError, match="trained on 2 of the 3 videos that would be scored .a_right, b."):
        check_scenes("best.pt", record, named("a_right", "b", "c"))


# ---- What is said

def scored_video(folder, name, frames, faces=None):
    labels = np.zeros(frames, np.int8)
    labels[0] = -1
    if faces is not None:
        np.save(noface_path(folder / f"{name}.npy"), np.arange(frames + 2) >= faces)
    return Video(name, folder / f"{name}.npy", labels)


def test_the_papers_numbers_stand_only_beside_drawn_data_and_a_complete_copy(tmp_path, monkeypatch):
    videos, config = [scored_video(tmp_path, "a", 12, faces=8), scored_video(tmp_path, "b", 5)], Config()
    assert labelled_faces(videos[0], EXPR) == 7 and labelled_faces(videos[1], EXPR) == 4
    few = to_score(videos[:1], {}, videos[1:], EXPR, None, config)
    assert not few.comparable and "11 labelled frames with a face" in few.data
    task = type("Task", (), {**vars(EXPR), "labelled_faces": 11, "width": 1})()
    complete = to_score(videos[:1], {}, videos[1:], task, None, config)
    assert complete.comparable and complete.data == "Aff-Wild2"
    config.data.synthetic = True
    assert to_score(videos, {}, [], EXPR, None, config).comparable


@pytest.mark.parametrize("tuned_on, text, unseen", [
    ([], "", False), (["a_left"], "1 of these 2 videos show scenes", True),
    (["a", "b"], "so the score is too high", False)])
def test_videos_whose_scenes_the_vit_has_seen_are_told(tmp_path, tuned_on, text, unseen):
    videos = [scored_video(tmp_path, "a", 9), scored_video(tmp_path, "b_right", 9)]
    origin = {"stage": "features", "from": {"stage": "finetune", "data": {"training videos": tuned_on}}}
    scored = to_score(videos, {"c": "no features", "d": "no features"}, [], EXPR, origin, Config())
    outputs = {video.name: drawn(EXPR, 9)[0] for video in videos}
    said = report(EXPR, sums_of(outputs, videos, EXPR), scored, "best.pt", 0)
    assert text in said and ("unseen" in said) == unseen
    assert said.startswith("best.pt\n2 validation videos, 18 frames")
    assert said.endswith("left out: c, d (no features)")
    assert reasons({"a": "x", "b": "y", "c": "x"}) == "a, c (x); b (y)"


@of_each_task
def test_the_smoothing_is_the_best_of_those_tried(tmp_path, task):
    outputs, videos = {}, []
    for seed in range(3):
        noise, labels = drawn(task, 60, seed)
        signal = np.eye(8)[np.where(labels < 0, 0, labels)] if task.one_class else labels
        outputs[str(seed)] = (2 * np.where(signal < -1, 0, signal) + noise).astype(np.float32)
        videos.append(Video(str(seed), tmp_path, labels))

    def score(k):
        sums = sums_of(means_over(outputs, task, k), videos, task)
        return task.metric.score(sums.sum(axis=0)).mean()
    assert score(best_smoothing(outputs, videos, task)) == max(map(score, (0, 1, 2, 5, 10, 20, 50)))
    assert score(0) != score(10)
    assert score(0) == pytest.approx(np.mean(alone(task, np.concatenate(list(outputs.values())),
                                                       np.concatenate([video.labels for video in videos]))))
