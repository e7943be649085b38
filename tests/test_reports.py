"""What is reported of a score: which videos its table is of, and the picture of a video."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reports
from distributed import Team
from labels import EXPR, VA, targets
from reports import Scored, draw_timeline, numbers, report, to_score
from score_table import numbers as score_numbers, score_table
from scoring import predict
from segments import Video, segments
from settings import Config

ALONE = Team(0, 1, torch.device("cpu"))


def sums_of(task, seed=0):
    """The sums of 300 random frames, a fifth of the labels invalid."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    labels = {"va": rng.uniform(-1, 1, (300, K)), "expr": rng.integers(0, 7, 300),
              "au": rng.random((300, K)) < 0.3}[task.name].astype(task.dtype)
    labels[rng.random(labels.shape) < 0.2] = task.invalid
    return task.metric.count(rng.normal(size=(300, K)), *targets(labels, task))


# ---- The report

def scored(seen=(), left_out=None, data="Aff-Wild2", comparable=True) -> Scored:
    """Two videos, of which `seen` show scenes on which the ViT was fine-tuned."""
    videos = [Video(name, Path(), np.zeros((n, 2))) for name, n in (("a", 1000), ("b", 234))]
    return Scored(videos, left_out or {}, np.array([video.name not in seen for video in videos]), data,
                  comparable)


def each_video():
    return np.stack([sums_of(VA), sums_of(VA, seed=1)])


def test_a_report_says_which_checkpoint_which_videos_and_what_is_left_out():
    sums, left_out = each_video(), {"ghost": "no labels", "136_left": "no labels"}
    lines = report(VA, sums, scored(left_out=left_out), Path("runs/best.pt"), 2).splitlines()
    assert lines[:2] == ["runs/best.pt", "2 validation videos, 1,234 frames (Aff-Wild2)"]
    assert lines[2:6] == score_table(VA, sums, fold=2).splitlines() and "0.547" in lines[5]
    assert lines[6:] == ["left out: ghost, 136_left (no labels)"]


def test_a_report_says_how_many_videos_the_vit_has_seen_and_scores_the_others_alone():
    sums = each_video()
    lines = report(VA, sums, scored(seen="a"), Path("best.pt"), 0).splitlines()
    assert lines[2:6] == score_table(VA, sums, np.array([False, True])).splitlines()
    assert lines[6:] == ["1 of these 2 videos show scenes on which the ViT was fine-tuned; \"unseen\" is the "
                         "score of the others alone"]
    lines = report(VA, sums, scored(seen="ab"), Path("best.pt"), 0).splitlines()
    assert "unseen" not in lines[2]
    assert lines[6:] == ["2 of these 2 videos show scenes on which the ViT was fine-tuned, so the score is "
                         "too high"]


def test_the_numbers_of_a_report_are_those_of_the_score_and_of_its_videos():
    left_out = {"ghost": "no labels"}
    assert numbers(VA, each_video(), scored(seen="a", left_out=left_out)) == {
        **score_numbers(VA, each_video()), "validation_videos": 2, "seen_videos": 1, "left_out": left_out,
        "data": "Aff-Wild2", "comparable": True}


def to_score_of(tmp_path, frames, synthetic=False, tuned=()):
    """`to_score` of videos a_left and b, of which all `frames` frames have labels and faces."""
    config = Config()
    config.data.synthetic = synthetic
    videos = [Video(name, tmp_path / f"{name}.npy", np.zeros(n, np.int8)) for name, n in frames.items()]
    origin = {"stage": "features", "from": {"stage": "finetune", "data": {"training videos": list(tuned)}}}
    return to_score(videos[:1], {}, videos[1:], EXPR, origin, config)


def test_the_papers_numbers_stand_only_beside_synthetic_data_and_a_complete_copy(tmp_path):
    whole = EXPR.labelled_faces
    assert whole == 585_317 + 280_532
    for frames, comparable in ((whole, True), (whole - whole // 101, True), (whole - whole // 99, False),
                               (2 * whole, False)):
        found = to_score_of(tmp_path, {"a": 1, "b": frames - 1})
        assert found.comparable == comparable
        assert found.data == "Aff-Wild2" if comparable else "a complete Aff-Wild2 has 865,849" in found.data
    found = to_score_of(tmp_path, {"a": 1, "b": 2}, synthetic=True)
    assert found.comparable and found.data.startswith("synthetic data; the paper's")


def test_frames_without_a_face_do_not_count_towards_a_complete_copy(tmp_path):
    np.save(tmp_path / "b.noface.npy", np.arange(EXPR.labelled_faces) % 2 == 0)
    assert not to_score_of(tmp_path, {"a": 1, "b": EXPR.labelled_faces}).comparable


def test_a_scene_counts_as_seen_whoever_of_it_the_vit_was_tuned_on(tmp_path):
    frames = {"a_left": 1, "b": 2}
    assert to_score_of(tmp_path, frames, tuned=["a_right"]).unseen.tolist() == [False]
    assert to_score_of(tmp_path, frames, tuned=["a"]).unseen.tolist() == [False]
    assert to_score_of(tmp_path, frames, tuned=["b", "a2"]).unseen.tolist() == [True]


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
    """A call that draws the timeline of videos -> the arguments that `timeline.draw` was given."""
    def draw(videos, task, team=ALONE, frames=(tmp_path / "frames",), **keywords):
        given, config = [], Config()
        monkeypatch.setattr(reports.timeline, "draw", lambda *arguments: given.append(arguments))
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
