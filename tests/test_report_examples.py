"""Which videos and segments a report shows, against plain loops, and the faces beside them."""

import numpy as np
import pytest
from PIL import Image

from labels import AU, EXPR, TASKS, VA, targets
from report_examples import Example, Faces, chosen, errors, in_words, own_score, predicted, worst_segments
from segments import Video, segments

WINDOW, STRIDE = 10, 7


def example(task, name="v", T=40, seed=0, known=0.8, labels=None, values=None) -> Example:
    """Random labels, of which a share is known, and random predictions; or the given ones."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    if labels is None:
        labels = {"va": rng.uniform(-1, 1, (T, K)), "expr": rng.integers(0, K, T).astype(float),
                  "au": (rng.random((T, K)) < 0.4).astype(float)}[task.name]
        labels[rng.random(labels.shape) > known] = np.nan
    values = rng.random((T, K)) if values is None else values
    sums = task.metric.count(values - (0.5 if task is AU else 0), np.nan_to_num(labels), ~np.isnan(labels))
    labelled = int((~np.isnan(labels)).reshape(len(labels), -1).any(axis=1).sum())
    return Example(name, task, labels, values, sums, labelled, own_score(task, sums))


# ---- Videos

def test_a_videos_own_score_leaves_out_classes_that_do_not_occur_in_it():
    labels, values = np.array([0, 0, 3, 3.0]), np.eye(8)[[0, 3, 3, 3]]
    found = example(EXPR, labels=labels, values=values)
    f1 = [2 * 1 / (2 + 1), 2 * 2 / (3 + 2)]                  # of class 0 and class 3
    assert found.score == pytest.approx(np.mean(f1)) and found.labelled == 4
    assert np.isnan(example(EXPR, known=0).score)
    labels = np.array([[1, 0, np.nan] * 4] * 5, float)       # units 1, 4, 7 and 10 occur
    assert example(AU, T=5, labels=labels, values=np.ones((5, 12))).score == 1.0


def test_a_predicted_video_is_what_the_model_says_beside_its_labels(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(12, dtype=np.float16).reshape(6, 2))      # longer than the labels

    class Trained:
        task = VA

        @staticmethod
        def predict(features):
            assert features.shape == (4, 2)
            return features.astype(np.float32) / 10
    labels = np.array([[0.1, -5], [0.2, 0.3], [-5, -5], [1, 1]], np.float32)
    found = predicted(Trained, Video("v", tmp_path / "v.npy", labels))
    assert np.allclose(found.values, np.arange(8).reshape(4, 2) / 10, atol=1e-3)
    assert np.array_equal(np.isnan(found.labels), labels == -5) and found.labelled == 3
    assert np.allclose(found.sums, VA.metric.count(found.values, *targets(labels, VA)), atol=1e-4)


def scored(**scores) -> dict:
    """{name: an example with this score}."""
    return {name: example(VA, name)._replace(score=score, labelled=labelled)
            for name, (score, labelled) in scores.items()}


def test_the_best_the_median_and_the_worst_video_are_chosen_among_the_long_ones_of_all_tasks():
    va = scored(a=(0.9, 50), b=(0.1, 50), c=(0.5, 50), d=(0.3, 50), short=(1.0, 9), only_va=(1.0, 50))
    au = scored(a=(0.7, 50), b=(0.1, 50), c=(0.6, 50), d=(0.7, 50), short=(1.0, 50))
    assert chosen({"va": va, "au": au}, WINDOW) == [("best", "a"), ("median", "c"), ("worst", "b")]
    assert chosen({"va": scored(x=(0.5, 1))}, WINDOW) == [("only", "x")]
    assert chosen({"va": scored(x=(0.1, 1), y=(0.2, 1))}, WINDOW) == [("best", "y"), ("worst", "x")]
    assert chosen({"va": scored(x=(np.nan, 0))}, WINDOW) == chosen({}, WINDOW) == []


def test_wanted_videos_are_chosen_and_unknown_ones_refused_with_the_nearest():
    va = scored(**{"video5_3": (0.5, 1), "136_left": (0.5, 1)})
    assert chosen({"va": va}, WINDOW, ["video5_3", "136_left", "video5_3"]) == [
        ("chosen", "video5_3"), ("chosen", "136_left")]
    with pytest.raises(ValueError, match=r"--videos: 'video5' is none of the 2 .* nearest: video5_3$"):
        chosen({"va": va}, WINDOW, ["video5"])


# ---- Segments

@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_errors_are_those_of_a_plain_loop(task):
    found = example(task)
    wrong = errors(found)
    for t, row in enumerate(found.labels.reshape(len(found.labels), -1)):
        for k, label in enumerate(row):
            value = found.values[t, k] if task is not EXPR else found.values[t].argmax()
            expected = {"va": (value - label) ** 2, "expr": float(value != label),
                        "au": float((value > 0.5) != (label == 1))}[task.name]
            assert wrong[t, k] == pytest.approx(np.nan if np.isnan(label) else expected, nan_ok=True)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_worst_segments_are_the_worst_that_do_not_overlap_and_have_labels(task):
    examples = [example(task, f"v{i}", T=15 + 9 * i, seed=i, known=0.4) for i in range(8)]
    worst = worst_segments(examples, WINDOW, STRIDE, count=12)
    left = []
    for found in examples:
        for start, end in segments(len(found.labels), WINDOW, STRIDE):
            part = errors(found)[start:end]
            if (~np.isnan(part).all(axis=1)).sum() >= WINDOW / 2:
                error = part[~np.isnan(part)].mean()
                left.append((np.sqrt(error) if task is VA else error, found.name, start, end))
    for segment in worst:                                    # each one is the worst of those that are left
        error, name, start, end = max(left, key=lambda row: row[0])
        assert segment.error == pytest.approx(error)
        name, start, end = segment.example.name, segment.start, segment.end       # of equal errors, any
        left = [row for row in left if row[1] != name or row[2] >= end or row[3] <= start]
    assert len(worst) == 12 and worst_segments([], WINDOW, STRIDE) == []
    assert worst_segments([example(task, known=0.0)], WINDOW, STRIDE) == []


def test_a_segment_in_words():
    values = np.tile([[0.5, -0.25]], (4, 1))
    labels = np.array([[0.1, np.nan], [0.3, np.nan], [np.nan, np.nan], [9, 9]])
    (segment,) = worst_segments([example(VA, labels=labels[:3], values=values[:3])], 3, 3)
    assert in_words(segment) == ["valence: mean label 0.20, prediction 0.50"]
    labels, values = np.array([5, 5, 0, np.nan]), np.eye(8)[[0, 0, 0, 7]]
    (segment,) = worst_segments([example(EXPR, labels=labels, values=values)], 4, 4)
    assert in_words(segment) == ["label mostly Sadness (67 %)", "prediction mostly Neutral (100 %)"]
    labels, values = np.zeros((4, 12)), np.zeros((4, 12))
    labels[:, 0], values[:1, 0], values[:2, 2] = 1, 1, 0.9
    labels[:, 3] = np.nan
    (segment,) = worst_segments([example(AU, labels=labels, values=values)], 4, 4)
    assert in_words(segment) == ["AU1: labelled in 100 %, predicted in 25 %",
                                 "AU4: labelled in 0 %, predicted in 50 %"]


# ---- Faces

@pytest.fixture
def frames(tmp_path):
    """Frames 1, 2, 3, 8 and 9 of video v, each of another grey; 8 is broken."""
    folder = tmp_path / "frames/v"
    folder.mkdir(parents=True)
    for n in (1, 2, 3, 8, 9):
        Image.new("RGB", (8, 8), (20 * n,) * 3).save(folder / f"{n:05d}.jpg", quality=100)
    (folder / "00008.jpg").write_bytes(b"broken")
    return tmp_path / "frames"


def test_faces_are_the_nearest_to_the_middles_of_equal_parts(frames):
    found = Faces([frames]).between("v", 0, 12, 4)           # frames 1-3, 4-6, 7-9, 10-12
    assert [number for number, _ in found] == [2, 5, 9, 11]
    assert [pixels is not None for _, pixels in found] == [True, False, True, False]
    assert found[0][1].shape == (96, 96, 3) and abs(int(found[0][1].mean()) - 40) < 3
    assert [number for number, _ in Faces([frames]).between("v", 1, 3, 8)] == [2, 3]


@pytest.mark.parametrize("roots, name", [([], "v"), (["gone"], "v"), (None, "other")])
def test_without_its_frames_a_video_has_no_faces(frames, roots, name):
    faces = Faces([frames] if roots is None else roots)
    assert faces.between(name, 0, 4, 2) == [(1, None), (3, None)]
    assert bool(faces.problem) == (roots is not None)
