"""What is reported of a score: the table beside the paper's numbers, the checkpoint it is of, the picture of
a video."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scoring
from checkpoints import write_file
from config import Config
from distributed import Team
from labels import AU, EXPR, TASKS, VA, targets
from scoring import (check_features, draw_timeline, features_of, load_segment_model, predict, report,
                     score_table, stage_of)
from segments import Video, segments
from temporal import SegmentModel

ALONE = Team(0, 1, torch.device("cpu"))
SMALL = dict(channels=(8, 8), kernels=(3, 3), dilations=(1, 2), width=16, layers=1, heads=2, hidden=16,
             head=8)
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def sums_of(task):
    """The sums of 300 random frames, a fifth of the labels invalid."""
    rng, K = np.random.default_rng(0), len(task.outputs)
    labels = {"va": rng.uniform(-1, 1, (300, K)), "expr": rng.integers(0, 7, 300),
              "au": rng.random((300, K)) < 0.3}[task.name].astype(task.dtype)
    labels[rng.random(labels.shape) < 0.2] = task.invalid
    return task.metric.count(rng.normal(size=(300, K)), *targets(labels, task))


# ---- Folders and reports

def test_a_task_has_a_run_folder_for_each_fold_and_reads_the_runs_features_or_given_ones(tmp_path):
    config, made = Config(), tmp_path / "mine/features"
    config.run.out, config.run.name, config.run.source = str(tmp_path), "mine", "my.yaml"
    made.mkdir(parents=True)
    with pytest.raises(ValueError, match="features/metrics.json not found; make it with: "
                                         "python extract_features.py --config my.yaml"):
        features_of(config)
    (made / "metrics.json").touch()
    assert stage_of(config, AU) == "task_au" and features_of(config) == made
    config.task.fold, config.task.features = 3, "elsewhere/features"
    assert stage_of(config, VA) == "task_va_fold3" and features_of(config) == Path("elsewhere/features")


@of_each_task
def test_the_table_has_a_line_per_class_and_the_means_beside_the_papers(task):
    sums = sums_of(task)
    ours, chance = task.metric.score(sums), task.metric.chance(sums)
    header, *lines, mean = [line.split() for line in score_table(task, sums).splitlines()]
    assert header == [*task.metric.name.split(), "ours", "chance", "paper", "baseline"]
    assert [line[0] for line in lines] == list(task.outputs) and mean[0] == "mean"
    assert [line[1:3] for line in lines] == [[f"{a:.3f}", f"{b:.3f}"] for a, b in zip(ours, chance)]
    beside = {"va": ["0.580", "0.220"], "expr": ["0.456", "0.230"], "au": ["0.576", "0.390"]}[task.name]
    assert mean[1:] == [f"{ours.mean():.3f}", f"{chance.mean():.3f}", *beside]
    if task is VA:
        assert [line[3:] for line in lines] == [["0.538", "0.240"], ["0.622", "0.200"]]
    else:
        assert all(line[3:] == ["-", "-"] for line in lines)


@pytest.mark.parametrize("task, fold, column", [
    (VA, 1, ["0.640", "0.565", "0.603"]), (VA, 4, ["0.540", "0.634", "0.587"]),
    (EXPR, 2, ["-"] * 8 + ["0.446"]), (EXPR, 3, ["-"] * 8 + ["0.458"]),
    (AU, 2, ["-"] * 12 + ["0.502"]), (AU, 4, ["-"] * 12 + ["0.582"])],
    ids=["va 1", "va 4", "expr 2", "expr 3", "au 2", "au 4"])
def test_a_fold_is_compared_with_its_own_column_of_table_1_and_with_no_baseline(task, fold, column):
    lines = [line.split() for line in score_table(task, sums_of(task), fold).splitlines()[1:]]
    assert [line[3] for line in lines] == column
    assert all(line[4] == "-" for line in lines)             # the challenge's is on the official split alone


def test_the_columns_of_a_table_stand_below_each_other():
    sums = np.zeros((2, 6))
    assert score_table(VA, sums) == """\
CCC               ours  chance   paper  baseline
valence          0.000   0.000   0.538     0.240
arousal          0.000   0.000   0.622     0.200
mean             0.000   0.000   0.580     0.220"""


@pytest.mark.parametrize("synthetic, without", [(True, []), (False, ["ghost", "136_left"])])
def test_a_report_says_which_checkpoint_which_videos_and_what_is_left_out(synthetic, without):
    config, sums = Config(), sums_of(VA)
    config.data.synthetic, config.task.fold = synthetic, 2
    videos = [Video(f"{n}", Path(), np.zeros((n, 2))) for n in (1000, 234)]
    lines = report(VA, sums, videos, without, Path("runs/best.pt"), config).splitlines()
    data = "Aff-Wild2"
    if synthetic:
        data = "synthetic data; the paper's and the baseline's numbers are on Aff-Wild2"
    assert lines[:2] == ["runs/best.pt", f"2 validation videos, 1,234 frames ({data})"]
    assert lines[2:6] == score_table(VA, sums, fold=2).splitlines() and "0.547" in lines[5]
    assert lines[6:] == (["left out, no features: ghost, 136_left"] if without else [])


# ---- Checkpoints

def small_config():
    config = Config()
    for name, value in SMALL.items():
        setattr(config.temporal, name, value)
    return config


def saved(path, state):
    write_file(path, lambda file: torch.save(state, file))
    return path


def test_a_checkpoint_of_another_task_or_size_is_refused(tmp_path):
    config, model = small_config(), SegmentModel(5, 12, **SMALL)
    path = saved(tmp_path / "best.pt", {"task": "au", "model": model.state_dict()})
    loaded = load_segment_model(path, config, AU, 5, tmp_path, ALONE)
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="best.pt: trained for --task au, not va"):
        load_segment_model(path, config, VA, 5, tmp_path, ALONE)
    shapes = r"(?s)best.pt: a checkpoint of another architecture.*file \(8, 5, 3\), model \(8, 6, 3\)"
    with pytest.raises(ValueError, match=shapes):
        load_segment_model(path, config, AU, 6, tmp_path, ALONE)


def test_weights_alone_are_a_checkpoint_of_any_task_that_they_fit(tmp_path):
    model = SegmentModel(5, 12, **SMALL)
    path = saved(tmp_path / "weights.pt", model.state_dict())
    loaded = load_segment_model(path, small_config(), AU, 5, tmp_path, ALONE)
    assert torch.equal(loaded.head[2].weight, model.head[2].weight)
    with pytest.raises(ValueError, match="another architecture"):
        load_segment_model(path, small_config(), VA, 5, tmp_path, ALONE)


@pytest.mark.parametrize("trained_on, given, fits", [(7, 7, True), (7, 8, False), (7, None, True),
                                                     (None, 8, True), (None, None, True)])
def test_a_model_takes_features_of_the_vit_it_was_trained_on_or_of_an_unknown_one(tmp_path, trained_on, given,
                                                                                  fits):
    """Unknown: features that were copied elsewhere, or that another program made."""
    if given:
        (tmp_path / "settings.json").write_text(json.dumps({"checkpoint checksum": given}))
    weights = SegmentModel(5, 12, **SMALL).state_dict()
    state = {"task": "au", "checkpoint checksum": trained_on, "model": weights}
    path = saved(tmp_path / "best.pt", state)
    for check in (lambda: load_segment_model(path, small_config(), AU, 5, tmp_path, ALONE),
                  lambda: check_features(path, state, tmp_path)):
        refused = pytest.raises(ValueError, match="another ViT .checksum 7, not 8.*--set task.features=")
        with contextlib.nullcontext() if fits else refused:
            check()


# ---- The picture of a video

class StartOfSegment(torch.nn.Module):
    """Both outputs of a frame: the feature of its segment's first frame."""

    def forward(self, x, valid):
        return x[:, :1].expand(-1, x.shape[1], 2)


def counting(frames):
    """Features of a video: frame t's is t."""
    return np.arange(frames, dtype=np.float16)[:, None]


def video(folder, name, labels):
    """Its features go on for five frames more than its labels, which must not matter."""
    np.save(folder / f"{name}.npy", counting(len(labels) + 5))
    return Video(name, folder / f"{name}.npy", labels)


@pytest.fixture
def pictured(tmp_path, monkeypatch):
    """A call that draws the timeline of videos -> the arguments that `pictures.timeline` was given."""
    def draw(videos, task, team=ALONE, frames=(tmp_path / "frames",), **keywords):
        given, config = [], Config()
        monkeypatch.setattr(scoring.pictures, "timeline", lambda *arguments: given.append(arguments))
        config.segments.window, config.segments.stride = 10, 7
        config.data.frames = [str(root) for root in frames]
        model = StartOfSegment()
        draw_timeline(model, videos, task, config, team, tmp_path / "timeline.png", **keywords)
        assert not given or not model.training                            # drawn without dropout
        return given[0] if given else None
    return draw


def face(folder, number):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number,) * 3).save(folder / f"{number:05d}.jpg", quality=100)


def va_labels(frames, known):
    """Labels of `frames` frames of which the first `known` are annotated."""
    labels = np.full((frames, 2), -5, np.float32)
    labels[:known] = np.linspace(-1, 1, known)[:, None]
    return labels


def test_the_timeline_shows_the_video_with_most_labels_and_its_faces_above_their_frames(tmp_path, pictured):
    videos = [video(tmp_path, "a", va_labels(40, 12)), video(tmp_path, "b", va_labels(23, 20)),
              video(tmp_path, "c", va_labels(30, 2))]
    for n in (1, 2, 5, 23, 24):                               # 24: past the last label
        face(tmp_path / "frames/b", n)
    task, faces, features, parts, labels, outputs, path = pictured(videos, VA)
    assert task is VA and path == tmp_path / "timeline.png"
    assert [(row, round(pixels.mean())) for row, pixels in faces] == [(0, 1), (1, 2), (4, 5), (22, 23)]
    assert all(pixels.shape == (112, 112, 3) for _, pixels in faces)
    assert features.dtype == np.float32 and np.array_equal(features, counting(23))
    assert parts == segments(23, 10, 7)
    assert np.array_equal(labels[:20], videos[1].labels[:20]) and np.isnan(labels[20:]).all()
    assert np.array_equal(outputs, predict(StartOfSegment(), counting(23), 10, 7, 4, ALONE))


def test_a_long_video_is_shown_by_its_first_frames_with_at_most_40_faces(tmp_path, pictured):
    for n in range(1, 61):
        face(tmp_path / "frames/long", n)
    videos = [video(tmp_path, "long", va_labels(60, 60)), video(tmp_path, "short", va_labels(45, 44))]
    _, faces, features, parts, labels, outputs, _ = pictured(videos, VA, longest=50)
    rows = [row for row, _ in faces]
    assert len(faces) == 40 and rows[0] == 0 and rows[-1] == 49 and sorted(set(rows)) == rows
    assert len(features) == len(labels) == len(outputs) == 50 and parts == segments(50, 10, 7)
    assert outputs[49, 0] == np.mean([42, 49])                # predicted with the frames that come after
    # Only the labels that would be shown count: the other video is the better one where fewer frames fit.
    videos[0].labels[:20] = -5
    assert len(pictured(videos, VA, longest=50)[2]) == 45


def test_a_broken_image_leaves_one_face_out_of_the_timeline(tmp_path, pictured):
    for n in (1, 2, 3):
        face(tmp_path / "frames/v", n)
    (tmp_path / "frames/v/00002.jpg").write_bytes(b"\xff\xd8 cut short")
    faces = pictured([video(tmp_path, "v", va_labels(5, 5))], VA)[1]
    assert [row for row, _ in faces] == [0, 2]


@pytest.mark.parametrize("frames", ["no root", "a root that is gone", "another video", "no image"])
def test_without_its_frames_a_video_is_drawn_without_faces(tmp_path, pictured, frames):
    face(tmp_path / "other/someone", 1)
    (tmp_path / "empty/v").mkdir(parents=True)
    roots = {"no root": [], "a root that is gone": [tmp_path / "gone"], "another video": [tmp_path / "other"],
             "no image": [tmp_path / "empty"]}[frames]
    faces = pictured([video(tmp_path, "v", va_labels(5, 5))], VA, frames=roots)[1]
    assert faces == []


def test_only_rank_0_draws(tmp_path, pictured):
    assert pictured([video(tmp_path, "v", va_labels(5, 5))], VA, Team(1, 2, torch.device("cpu"))) is None
