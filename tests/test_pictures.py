"""The pictures, read back: positions and colours are compared with where the data says they must be."""

import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import pictures
from images import normalise, unnormalise
from labels import AU, EXPR, TASKS
from mae import MaskedAutoencoder
from pictures import DARK, LABEL, LEFT, PREDICTION, RIGHT, UNKNOWN, draw_video

FRAMES = (RIGHT - LEFT) // 4             # so many frames have four pixels each


@pytest.fixture
def texts(monkeypatch):
    """All texts drawn from here on, in order: the string and the box that it fills."""
    drawn, draw_text = [], ImageDraw.ImageDraw.text

    def record(pen, xy, string, fill=None, font=None, anchor=None):
        left, top, right, bottom = pen.textbbox(xy, string, font, anchor)
        box = {"left": left, "top": top, "right": right, "bottom": bottom}
        text = SimpleNamespace(string=string, x=(left + right) / 2, y=(top + bottom) / 2, **box)
        drawn.extend([text] if string else [])
        draw_text(pen, xy, string, fill, font, anchor=anchor)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def found(texts, string: str) -> list:
    return [text for text in texts if text.string == string]


def read(picture) -> np.ndarray:
    picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
    return np.asarray(picture).astype(int)                                 # (height, width, 3)


def is_colour(pixels, colour) -> np.ndarray:
    return (np.abs(pixels - np.array(colour)) <= 2).all(-1)                # (..., 3) -> (...)


def assert_texts_are_apart(texts, pixels):
    height, width, _ = pixels.shape
    for i, a in enumerate(texts):
        assert 0 <= a.left and a.right <= width and 0 <= a.top and a.bottom <= height, f"{a} is cut off"
        for b in texts[:i]:
            assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top, (a, b)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_reconstruction_shows_hidden_patches_as_predicted_and_visible_ones_as_they_were(
        norm_pix_loss, tmp_path, texts):
    model = MaskedAutoencoder(32, 8, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1,
                              decoder_heads=2, norm_pix_loss=norm_pix_loss,
                              **{"mean": [.5, .4, .3], "std": [.2, .3, .4]} if norm_pix_loss else {})
    images, mask = normalise(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)), torch.zeros(2, 16)
    mask[0, :12] = mask[1, 4:] = 1                                         # 4 x 4 patches of 8 x 8 pixels
    original = model.patchify(model.own(images))
    shown = pred = original + 0.2
    if norm_pix_loss:                           # the original's mean and deviation are given back to it
        pred = (shown - original.mean(-1, keepdim=True)) / (original.var(-1, keepdim=True) + 1e-6).sqrt()
    pictures.reconstruction(images, model, pred, mask, tmp_path / "r.png", side=32)
    sheet, pixels = read(tmp_path / "r.png"), unnormalise(images)
    for i, left in enumerate((110, 146)):
        hidden = np.kron(mask[i].reshape(4, 4).numpy(), np.ones((8, 8)))[..., None]
        predicted = unnormalise(model.unpatchify(shown), model.mean, model.std)[i]
        grey = unnormalise(0 * images, model.mean, model.std)[i]
        for r, row in enumerate([pixels[i], grey, predicted]):
            expected = np.where(hidden, row, pixels[i].astype(int))
            assert np.abs(sheet[36 * r:36 * r + 32, left:left + 32] - expected).max() <= 1
    assert [text.string for text in texts if text.right <= 108] == ["original", "masked", "reconstruction"]


def curves(folder, log: str, chance={}) -> np.ndarray:
    (folder / "log.csv").write_text(log)
    return read(pictures.curves(folder, chance))


def plot_of(texts, column: str):
    """Where a column is plotted: its epochs below the x axis, and a function from a value to its y."""
    place = [text.string for text in texts].index(column)
    end = [text.string for text in texts].index("epoch", place)
    low, high = texts[place + 1], texts[place + 3]                         # of the numbers on the y axis

    def y_of(value):
        share = (value - float(low.string)) / (float(high.string) - float(low.string))
        return round(low.y + share * (high.y - low.y))
    return [text for text in texts[place + 4:end] if text.string != "chance"], y_of


def test_curves_pass_through_their_values_nan_leaves_a_gap_and_chance_is_dashed(tmp_path, texts):
    pixels = curves(tmp_path, "epoch,a,b\n1,2,0\n2,2,0.5\n3,nan,1\n4,1,1\n5,nan,0\n11,nan,-1\n", {"b": -0.5})
    blue = is_colour(pixels, PREDICTION)
    for column, values in {"a": [2, 2, None, 1], "b": [0, 0.5, 1, 1, 0, -1]}.items():
        epochs, y_of = plot_of(texts, column)
        first, middle, last = (text.x for text in epochs)
        step = (last - first) / 10
        assert middle - first == pytest.approx(3 * step, abs=1.5)
        for epoch, value in enumerate(values):
            x = round(first + step * (epoch if epoch < 5 else 10))
            assert value is None or blue[y_of(value) - 2:y_of(value) + 3, x - 2:x + 3].any()
        if column == "a":                                                  # at epoch 4 stands a dot
            drawn = np.flatnonzero(blue[:, :round(last) + 3].any(0)) - first
            assert not ((drawn > step + 3) & (drawn < 3 * step - 4)).any() and (drawn < 3 * step + 5).all()
            assert ((drawn > 0) & (drawn < step)).sum() >= step - 3
            assert blue[y_of(1) - 3:y_of(1) + 4, :round(last)].sum() > 15
    [word] = found(texts, "chance")
    assert first < word.x < last and 0 < y_of(-0.5) - word.y < 20
    line = is_colour(pixels[y_of(-0.5) - 1:y_of(-0.5) + 2, round(first):round(last)], DARK).any(0)
    assert 0.4 < line.mean() < 0.75 and np.abs(np.diff(line.astype(int))).sum() > 20    # drawn and not


@pytest.mark.parametrize("log, chance, expected", [
    ("loss,lr\n1,4,1e-6\n3,2,5e-7\n11,2,0\n", {}, "loss 0 2 4 1 3 11 epoch lr 0 5e-07 1e-06 1 3 11 epoch"),
    ("a,b,c,d\n8,-1,0,nan,1\n9,1,0,inf,1\n", {"b": np.nan},
     "a -1 0 1 8 9 epoch b 0 0.5 1 8 9 epoch c 0 0.5 1 8 9 epoch d 0 0.5 1 8 9 epoch"),
    ("loss\n7,-3\n", {}, "loss -3 -1.5 0 7 epoch"), ("a,b\n1,1,1\n2,1,0\n", {"a": 5.0, "b": -2.0, "c": 3},
     "a 0 2.5 5 chance 1 2 epoch b -2 -0.5 1 chance 1 2 epoch")])
def test_the_axes_hold_zero_all_values_and_the_chance_level(tmp_path, texts, log, chance, expected):
    assert_texts_are_apart(texts, curves(tmp_path, f"epoch,{log}", chance))
    assert " ".join(text.string for text in texts) == expected


@pytest.mark.parametrize("content", [
    b"", b"epoch,loss\n1,low\n", b"1" * 200_000, b"epoch,loss\n1,2,3\n", b"epoch,loss\n1\n", b"\xff"])
def test_the_command_refuses_a_broken_log(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "log.csv").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(pictures.__file__, run_name="__main__")
    assert "log.csv: not the log of a run (" in capsys.readouterr().err


def x_of(number, T: int) -> int:
    return int(LEFT + (number - 0.5) / T * (RIGHT - LEFT))                 # the middle; frames count from 1


def values_of(T: int) -> tuple[dict, dict]:
    """Predictions of the three tasks, and labels with a gap, of T frames."""
    rng = np.random.default_rng(T)
    labels = {"va": rng.uniform(-1, 1, (T, 2)), "expr": 1.0 * rng.integers(8, size=T),
              "au": 1.0 * rng.integers(2, size=(T, 12))}
    for values in labels.values():
        values[T // 3:T // 2] = np.nan
    return {name: rng.uniform(0, 1, (T, len(task.outputs))) for name, task in TASKS.items()}, labels


@pytest.mark.parametrize("labelled", [True, False], ids=["with labels", "alone"])
@pytest.mark.parametrize("task", [EXPR, AU], ids=["expr", "au"])
def test_each_output_has_a_strip_of_its_labels_above_one_of_its_probabilities(task, labelled, texts):
    """The others are shorter than the longest, and end earlier."""
    predictions, labels = ({task.name: values[task.name]} for values in values_of(FRAMES))
    values = predictions[task.name] = predictions[task.name][:200 if labelled else FRAMES]
    values[7], noface = np.nan, np.isin(np.arange(150), [0, *range(40, 60), 100])
    pixels = read(draw_video("v", predictions, labels if labelled else {}, noface=noface))
    label = labels[task.name] if task is AU else np.array([
        [np.nan if np.isnan(k) else float(k == i) for i in range(8)] for k in labels["expr"]])
    rows = {("no face", 0): (noface, DARK)}
    for k, name in enumerate(task.outputs):
        rows[name, 6 * labelled] = values[:, k], PREDICTION
        rows |= {(name, -6): (label[:, k], LABEL)} if labelled else {}
    for (name, below), (row, colour) in rows.items():
        line = pixels[round(found(texts, name)[0].y + below)]
        for t, value in enumerate([*row, *[np.nan] * (FRAMES - len(row))]):
            expected = UNKNOWN if np.isnan(value) else 255 + value * (np.array(colour) - 255)
            assert np.abs(line[x_of(t + 1, FRAMES)] - expected).max() <= 1, (name, t)
    for word, colour in (("label", LABEL), ("prediction", PREDICTION), ("not", UNKNOWN)):  # the legend
        marks = [text for text in texts if text.string.split()[0] == word]
        assert len(marks) == (labelled or word != "label")
        assert all(is_colour(pixels[int(mark.y), int(mark.left) - 12], colour) for mark in marks)


def test_valence_and_arousal_pass_through_their_values_and_gaps_are_grey(texts):
    labels, outputs = np.tile([0.5, -0.75], (FRAMES, 1)), np.tile([-0.25, 0.25], (FRAMES, 1))
    outputs[200:] = 3.0                                                    # drawn at the edge, not outside
    labels[100:150] = outputs[20:30] = np.nan
    pixels = read(draw_video("v", {"va": outputs}, {"va": labels}))
    for k in (0, 1):
        top, bottom = found(texts, "1")[k].y, found(texts, "-1")[k].y          # of the numbers on its y axis

        def drawn(value, t, colour):
            y = round(bottom - (value + 1) / 2 * (bottom - top))
            return is_colour(pixels[y - 2:y + 3, x_of(t + 1, FRAMES)], colour).any()

        assert all(drawn(labels[t, k], t, LABEL) for t in (1, 98, 151, 240))
        assert all(drawn(outputs[0, k], t, PREDICTION) for t in (1, 120, 198)) and drawn(1.0, 220, PREDICTION)
        for first, last, colour in ((101, 150, UNKNOWN), (2, 100, (255, 255, 255))):
            assert (pixels[int(top) + 10, x_of(first, FRAMES):x_of(last, FRAMES)] == colour).all()


@pytest.mark.parametrize("tasks", [(), ("va",), ("expr", "au"), ("va", "au")])
def test_only_what_is_given_is_drawn_from_top_to_bottom_and_no_frame_is_refused(tasks, texts):
    predictions = {task: values_of(30)[0][task] for task in tasks}
    draw_video("v", predictions, noface=np.zeros(30), fps=5, note="a note")
    names = [name for task in tasks for name in TASKS[task].outputs]
    rows = [text for text in texts if text.left == texts[0].left]
    assert [row.string for row in rows] == ["v", "frames: 30; a note", "no face", *names, "frame", "seconds"]
    assert [row.y for row in rows] == sorted(row.y for row in rows)
    with pytest.raises(ValueError, match="a video: no frame to draw; expected predictions, labels or noface"):
        draw_video("a video", {"va": np.zeros((0, 2))})


def test_a_face_stands_above_its_own_frame_and_is_left_out_if_it_would_overlap_the_last(texts):
    shown = {1: True, 10: False, 30: True, 48: False, 60: True, 210: True, 300: True}     # 24 frames wide
    faces = [(number, np.full((30, 20, 3), (255, 10 + i, 90), np.uint8)) for i, number in enumerate(shown)]
    line = read(draw_video("v", {"va": np.zeros((300, 2))}, faces=faces))[80]             # through the faces
    for number, face in faces:
        columns = np.flatnonzero((line == face[0, 0]).all(-1))
        numbers = [text.x for text in found(texts, str(number)) if text.y < 160]
        assert len(columns) == 80 * shown[number] == 80 * len(numbers)
        for x in [*numbers, (columns.min() + columns.max()) / 2] if shown[number] else []:
            assert abs(x - x_of(number, 300)) <= 1.5


@pytest.mark.parametrize("T, fps, title, numbers", [
    (1, 0, "frame", [1]), (240, 0, "frame", [1, *range(20, 241, 20)]),
    (241, 9, "frame", [1, *range(50, 241, 50)]), (1, 25, "seconds", [0]), (251, 25, "seconds", range(11)),
    (4, 10, "seconds", [i / 20 for i in range(7)]), (20_000, 29.97, "seconds", range(0, 601, 100))])
def test_frames_from_1_and_seconds_from_0_stand_at_round_distances(T, fps, title, numbers, texts):
    draw_video("v", {}, noface=np.zeros(T), fps=fps)
    place = [text.string for text in texts].index(title) + 1
    marks, after = texts[place:place + len(numbers)], texts[place + len(numbers)]
    assert [float(text.string) for text in marks] == list(numbers) and not after.string[0].isdigit()
    frames = [number * fps + 1 if title == "seconds" else number for number in numbers]
    assert all(abs(text.x - x_of(frame, T)) <= 1.5 for text, frame in zip(marks, frames))


@pytest.mark.parametrize("T", [1, 7, 300, 20_000])
@pytest.mark.parametrize("name, note", [("", ""), ("видео\n\udcff" * 90, "é" * 300)])
def test_no_text_overlaps_another_or_is_cut_off(T, name, note, texts):
    faces = [(number, np.zeros((9, 9, 3), np.uint8)) for number in range(1, T + 1, max(1, T // 40))]
    picture = draw_video(name, *values_of(T), faces, np.zeros(T, bool), 25, note)
    assert_texts_are_apart(texts, read(picture))
    assert picture.width == pictures.WIDTH and all(text.string.isascii() for text in texts)


@pytest.mark.parametrize("T", [1, 999, 1000, 1001, 1999, 2000, 47_434])
def test_a_column_of_a_long_video_has_the_least_the_mean_and_the_largest_of_its_frames(T):
    values, n = np.random.default_rng(T).normal(size=(T, 1)), min(T, 1000)
    values[T // 3:T // 2] = np.nan
    columns, of_frame = pictures.columns(values, T, 1), np.arange(T) * n // T          # each frame is in one
    assert columns.shape == (3, n, 1)
    for i in range(0, n, 37):
        part = [value for value in values[of_frame == i, 0] if not np.isnan(value)]
        expected = [min(part), sum(part) / len(part), max(part)] if part else [np.nan] * 3
        assert columns[:, i, 0] == pytest.approx(expected, nan_ok=True)


def test_one_frame_in_20000_is_seen(texts):
    at, values = 12_345, {"va": np.zeros((20_000, 2)), "au": np.zeros((20_000, 12))}
    values["va"][at, 0], values["au"][at, 2] = 0.9, 1
    pixels = read(draw_video("v", values))
    top, bottom = found(texts, "1")[0].y, found(texts, "-1")[0].y
    spike = pixels[round(bottom - 1.7 / 2 * (bottom - top)), LEFT:RIGHT]   # pale, far above the mean
    assert np.flatnonzero((spike < 255).any(-1)) == pytest.approx([at // 20], abs=1.5)
    mean = pixels[round(found(texts, "AU4")[0].y), LEFT + at // 20]
    assert np.abs(mean - (255 + 1 / 20 * (np.array(PREDICTION) - 255))).max() <= 1
    assert texts[1].string.startswith("frames: 20,000, 20 to a column of pixels: their mean, and pale ")
