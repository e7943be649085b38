"""The timeline of a video, read back: positions and colours are compared with where the data says they must
be."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image

import timeline
from drawn import assert_texts_are_apart, found, is_colour, read
from labels import AU, EXPR, TASKS, VA

LEFT, RIGHT = 150, 1122                  # where a timeline's frames begin and end
FRAMES = (RIGHT - LEFT) // 3             # so many frames have three pixels each
RED, BLUE, WHITE = (200, 60, 50), (40, 100, 180), (255, 255, 255)


def x_of(frame, T: int) -> int:
    return int(LEFT + (frame + 0.5) * (RIGHT - LEFT) / T)                  # T frames share the width equally


def video(task, T: int):
    """features, segments, labels with a gap, outputs, of T frames."""
    rng = np.random.default_rng(0)
    K = len(task.outputs)
    labels = {"va": rng.uniform(-1, 1, (T, K)),
              "expr": rng.integers(K, size=T).astype(float),
              "au": rng.integers(2, size=(T, K)).astype(float)}[task.name]
    labels[T // 3:T // 2] = np.nan
    parts = [(start, min(start + 120, T)) for start in range(0, T, 80)]
    outputs = rng.normal(size=(T, K)).astype(np.float32)
    return rng.normal(size=(T, 16)).astype(np.float32), parts, labels, outputs


def faces_at(frames) -> list:
    """A face for each frame, each of another colour."""
    colours = [(255, 10 + 7 * i, 255 - 7 * i) for i in range(len(frames))]
    return [(frame, np.full((30, 20, 3), colour, np.uint8)) for frame, colour in zip(frames, colours)]


def drawn_timeline(folder, task, faces, data) -> np.ndarray:
    timeline.draw(task, faces, *data, folder / "t.png")
    return read(folder / "t.png")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("T", [1, 7, 200, 600])
def test_no_text_of_a_timeline_overlaps_another_or_is_cut_off(task, T, tmp_path, texts):
    assert_texts_are_apart(texts, drawn_timeline(tmp_path, task, faces_at(range(0, T, 9)), video(task, T)))


def test_a_face_stands_above_its_own_frame_and_is_left_out_if_it_would_overlap_the_last(tmp_path, texts):
    frames = [0, 10, 27, 48, 60, 210, 299]                                 # a face is as wide as 25 frames
    line = drawn_timeline(tmp_path, EXPR, faces_at(frames), video(EXPR, 300))[48]    # through the faces
    for frame, face in faces_at(frames):
        columns = np.flatnonzero(is_colour(line, face[0, 0]))
        numbers = [text for text in found(texts, str(frame)) if text.y < 110]
        if frame in (10, 48):
            assert len(columns) == len(numbers) == 0
        else:
            assert len(columns) == 80 and abs(columns.mean() - x_of(frame, 300)) <= 1
            assert len(numbers) == 1 and abs(numbers[0].x - x_of(frame, 300)) <= 1.5
            assert numbers[0].bottom < found(texts, "features")[0].y - 35   # where the features begin


def test_features_and_segments_lie_above_their_frames(tmp_path, texts):
    features, _, labels, outputs = video(EXPR, 300)
    features[:] = 9
    features[75:150] = 11
    parts = [(0, 100), (80, 180), (160, 300)]
    pixels = drawn_timeline(tmp_path, EXPR, [], (features, parts, labels, outputs))
    line = pixels[int(found(texts, "features")[0].y), :, 0]
    assert (line[x_of(76, 300):x_of(148, 300)] > 180).all()
    assert (line[x_of(1, 300):x_of(73, 300)] < 120).all()
    assert (line[x_of(151, 300):x_of(298, 300)] < 120).all()
    for i, (start, end) in enumerate(parts):
        line = pixels[int(found(texts, "segments")[0].y) + 14 * i, LEFT:]
        columns = np.flatnonzero(is_colour(line, (120, 120, 120)))
        assert abs(columns[0] - start * 3.24) <= 1 and abs(columns[-1] - (end * 3.24 - 1)) <= 1


@pytest.mark.parametrize("T, step", [(7, 1), (300, 50), (240, 20), (600, 50), (100_000, 10_000)])
def test_the_axis_numbers_frames_at_round_distances(T, step, texts):
    timeline.frame_axis(Image.new("RGB", (1180, 50)), 5, T)
    numbers = [text for text in texts if text.string.isdigit()]
    assert [int(text.string) for text in numbers] == list(range(0, T, step))
    assert all(abs(text.x - x_of(int(text.string), T)) <= 1.5 for text in numbers)
    assert found(texts, "frame, from 0")


@pytest.mark.parametrize("T, numbers", [
    (1, [1]), (3, [1, 2, 3]), (20, [1, *range(2, 21, 2)]), (100, [1, *range(10, 101, 10)]),
    (47_434, [1, *range(5000, 47_434, 5000)])])
def test_an_axis_from_1_has_1_and_the_round_numbers(T, numbers, texts):
    timeline.frame_axis(Image.new("RGB", (1180, 50)), 5, T, first=1)
    drawn = [text for text in texts if text.string.isdigit()]
    assert [int(text.string) for text in drawn] == numbers
    assert all(abs(text.x - x_of(int(text.string) - 1, T)) <= 1.5 for text in drawn)
    assert found(texts, "frame, from 1")


def test_the_strips_of_expressions_have_the_colours_of_the_legend_at_each_frame(tmp_path, texts):
    features, parts, labels, outputs = video(EXPR, FRAMES)
    pixels = drawn_timeline(tmp_path, EXPR, [], (features, parts, labels, outputs))

    def legend(name):
        text = found(texts, name)[0]
        return tuple(pixels[int(text.y), int(text.left) - 12])

    colours = [legend(name) for name in EXPR.outputs]
    assert len({*colours, legend("not annotated"), WHITE}) == 10
    [label], [prediction] = found(texts, "label"), found(texts, "prediction")
    assert label.right < LEFT and prediction.right < LEFT and label.y < prediction.y
    for t in range(FRAMES):
        expected = legend("not annotated") if np.isnan(labels[t]) else colours[int(labels[t])]
        assert tuple(pixels[int(label.y), x_of(t, FRAMES)]) == expected
        assert tuple(pixels[int(prediction.y), x_of(t, FRAMES)]) == colours[outputs[t].argmax()]


def test_the_strips_of_action_units_show_the_label_above_the_probability(tmp_path, texts):
    features, parts, labels, outputs = video(AU, FRAMES)
    outputs[5], outputs[6] = 1000.0, -1000.0                               # exp(1000) would be infinite
    pixels = drawn_timeline(tmp_path, AU, [], (features, parts, labels, outputs))
    label_rows, prediction_rows = found(texts, "label"), found(texts, "prediction")
    assert len(label_rows) == len(prediction_rows) == 12
    for k, name in enumerate(AU.outputs):
        [title] = found(texts, name)
        assert title.y - 10 < label_rows[k].y < title.y < prediction_rows[k].y < title.y + 10
        for t in range(FRAMES):
            label = {0: WHITE, 1: RED}.get(labels[t, k], (222, 222, 222))
            probability = 1 / (1 + np.exp(-np.clip(outputs[t, k], -50, 50)))
            shade = 255 + probability * (np.array(BLUE) - 255)
            assert tuple(pixels[int(label_rows[k].y), x_of(t, FRAMES)]) == label
            assert np.abs(pixels[int(prediction_rows[k].y), x_of(t, FRAMES)] - shade).max() <= 1


def test_valence_and_arousal_are_curves_on_an_axis_from_minus_one_to_one(tmp_path, texts):
    features, parts, _, outputs = video(VA, FRAMES)
    labels = np.tile([0.5, -0.75], (FRAMES, 1))
    outputs[:] = [-0.25, 0.25]
    outputs[200:] = 3.0                                                    # drawn at the edge, not outside
    labels[100:150] = np.nan
    pixels = drawn_timeline(tmp_path, VA, [], (features, parts, labels, outputs))
    for k, name in enumerate(VA.outputs):
        top, bottom = found(texts, "1")[k].y, found(texts, "-1")[k].y
        assert top < found(texts, name)[0].y < bottom
        assert top < found(texts, "label")[k].y < found(texts, "prediction")[k].y < bottom

        def drawn(value, frame, colour):
            y = round(bottom - (value + 1) / 2 * (bottom - top))
            return is_colour(pixels[y - 2:y + 3, x_of(frame, FRAMES)], colour).any()

        assert all(drawn(labels[t, k], t, RED) for t in (1, 98, 151, 322))
        assert not any(drawn(labels[0, k], t, RED) for t in range(101, 149))
        assert (pixels[int(top) + 10, x_of(101, FRAMES):x_of(148, FRAMES)] == 222).all()
        assert (pixels[int(top) + 10, x_of(10, FRAMES):x_of(90, FRAMES)] == 255).all()
        assert all(drawn(outputs[0, k], t, BLUE) for t in (1, 120, 198)) and drawn(1.0, 300, BLUE)


def test_a_timeline_needs_as_many_labels_and_outputs_as_features(tmp_path):
    features, parts, labels, outputs = video(EXPR, 20)
    for a, b, c in ((19, 20, 20), (20, 19, 20), (20, 20, 19), (0, 0, 0)):
        with pytest.raises(ValueError, match=f"{a} features, {b} labels, {c} outputs: expected one a frame"):
            timeline.draw(EXPR, [], features[:a], parts, labels[:b], outputs[:c], tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


def test_the_command_draws_an_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timeline.py", str(tmp_path / "example.png")])
    runpy.run_path(timeline.__file__, run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path}/example.png\n"
    assert read(tmp_path / "example.png").shape[1] == 1180
