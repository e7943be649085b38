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
from labels import AU, EXPR, TASKS, VA
from mae import MaskedAutoencoder

LEFT, RIGHT = 150, 1122                  # where a timeline's frames begin and end
FRAMES = (RIGHT - LEFT) // 3             # so many frames have three pixels each
RED, BLUE, WHITE = (200, 60, 50), (40, 100, 180), (255, 255, 255)


@pytest.fixture
def texts(monkeypatch):
    """All texts drawn from here on, in order: the string and the box that it fills."""
    drawn, draw_text = [], ImageDraw.ImageDraw.text

    def record(pen, xy, string, fill=None, font=None, anchor=None):
        left, top, right, bottom = pen.textbbox(xy, string, font, anchor)
        drawn.append(SimpleNamespace(string=string, left=left, top=top, right=right, bottom=bottom,
                                     x=(left + right) / 2, y=(top + bottom) / 2))
        draw_text(pen, xy, string, fill, font, anchor=anchor)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def found(texts, string: str) -> list:
    return [text for text in texts if text.string == string]


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)         # (height, width, 3)


def x_of(frame, T: int) -> int:
    return int(LEFT + (frame + 0.5) * (RIGHT - LEFT) / T)                  # T frames share the width equally


def is_colour(pixels, colour) -> np.ndarray:
    return (np.abs(pixels - np.array(colour)) <= 2).all(-1)                # (..., 3) -> (...)


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


def timeline(folder, task, faces, data) -> np.ndarray:
    pictures.timeline(task, faces, *data, folder / "t.png")
    return read(folder / "t.png")


def curves(folder, log: str, chance=None) -> np.ndarray:
    (folder / "log.csv").write_text(log)
    pictures.curves(folder / "log.csv", folder / "c.png", chance)
    return read(folder / "c.png")


def reconstruction_rows(path, norm_pix_loss: bool, predict):
    """The picture's three rows, the images, and which pixels are hidden; each two images side by side."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(32, 8, dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1,
                              decoder_heads=2, norm_pix_loss=norm_pix_loss)
    images = normalise(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    mask = torch.zeros(2, 16)                                              # 4 x 4 patches of 8 x 8 pixels
    mask[0, :12] = mask[1, 4:] = 1
    pictures.reconstruction(images, model, predict(model.patchify(images)), mask, path, side=32)
    left, right = read(path)[:, 110:142], read(path)[:, 146:178]
    sheet = np.concatenate([left, right], axis=1)
    hidden = np.kron(mask.reshape(2, 4, 4).numpy(), np.ones((8, 8))).astype(bool)
    return ([sheet[r * 36:r * 36 + 32] for r in range(3)],
            np.concatenate(unnormalise(images).astype(int), axis=1), np.concatenate(hidden, axis=1))


def test_a_reconstruction_shows_hidden_patches_as_predicted_and_visible_ones_as_they_were(tmp_path, texts):
    rows, pixels, hidden = reconstruction_rows(tmp_path / "r.png", False, torch.ones_like)
    mean, ones = (unnormalise(torch.full((1, 3, 1, 1), value))[0, 0, 0] for value in (0.0, 1.0))
    assert (rows[0] == pixels).all()
    assert (rows[1][hidden] == mean).all() and (rows[1][~hidden] == pixels[~hidden]).all()
    assert (rows[2][hidden] == ones).all() and (rows[2][~hidden] == pixels[~hidden]).all()
    assert [text.string for text in texts] == ["original", "masked", "reconstruction"]
    assert all(0 <= text.left and text.right <= 108 for text in texts)


def test_with_normalised_pixels_each_patch_gets_its_mean_and_deviation_back(tmp_path):
    def normalised(target):
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    rows, pixels, _ = reconstruction_rows(tmp_path / "r.png", True, normalised)
    assert np.abs(rows[2] - pixels).max() <= 1


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("T", [1, 7, 200, 600])
def test_no_text_of_a_timeline_overlaps_another_or_is_cut_off(task, T, tmp_path, texts):
    assert_texts_are_apart(texts, timeline(tmp_path, task, faces_at(range(0, T, 9)), video(task, T)))


def assert_texts_are_apart(texts, pixels):
    height, width, _ = pixels.shape
    texts = [text for text in texts if text.string]
    for i, a in enumerate(texts):
        assert 0 <= a.left and a.right <= width and 0 <= a.top and a.bottom <= height, f"{a} is cut off"
        for b in texts[:i]:
            beside = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
            assert beside, f"{a} and {b} overlap"


def test_a_face_stands_above_its_own_frame_and_is_left_out_if_it_would_overlap_the_last(tmp_path, texts):
    frames = [0, 10, 27, 48, 60, 210, 299]                                 # a face is as wide as 25 frames
    line = timeline(tmp_path, EXPR, faces_at(frames), video(EXPR, 300))[48]          # through the faces
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
    pixels = timeline(tmp_path, EXPR, [], (features, parts, labels, outputs))
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
    pictures.frame_axis(Image.new("RGB", (1180, 50)), 5, T)
    numbers = [text for text in texts if text.string.isdigit()]
    assert [int(text.string) for text in numbers] == list(range(0, T, step))
    assert all(abs(text.x - x_of(int(text.string), T)) <= 1.5 for text in numbers)
    assert found(texts, "frame, from 0")


def test_the_strips_of_expressions_have_the_colours_of_the_legend_at_each_frame(tmp_path, texts):
    features, parts, labels, outputs = video(EXPR, FRAMES)
    pixels = timeline(tmp_path, EXPR, [], (features, parts, labels, outputs))

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
    pixels = timeline(tmp_path, AU, [], (features, parts, labels, outputs))
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
    pixels = timeline(tmp_path, VA, [], (features, parts, labels, outputs))
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
            pictures.timeline(EXPR, [], features[:a], parts, labels[:b], outputs[:c], tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


def plot_of(texts, column: str):
    """Where a column is plotted: its texts below the x axis, and a function from a value to its y."""
    strings = [text.string for text in texts]
    place = strings.index(column)
    end = strings.index("epoch", place)
    low, high = texts[place + 1], texts[place + 3]                         # of the numbers on the y axis

    def y_of(value):
        share = (value - float(low.string)) / (float(high.string) - float(low.string))
        return round(low.y + share * (high.y - low.y))
    return texts[place + 4:end], y_of


def test_curves_pass_through_the_values_at_their_epochs(tmp_path, texts):
    pixels = curves(tmp_path, "epoch,loss,score\n1,4,0\n2,2,0.5\n3,1,1\n11,2,-1\n")
    for column, values in {"loss": [4, 2, 1, 2], "score": [0, 0.5, 1, -1]}.items():
        epochs, y_of = plot_of(texts, column)
        assert [text.string for text in epochs] == ["1", "3", "11"]
        first, middle, last = (text.x for text in epochs)
        assert middle - first == pytest.approx((last - first) / 5, abs=1.5)
        for epoch, value in zip([1, 2, 3, 11], values):
            x, y = round(first + (epoch - 1) / 10 * (last - first)), y_of(value)
            assert is_colour(pixels[y - 3:y + 4, x - 2:x + 3], BLUE).any()


@pytest.mark.parametrize("log, chance, expected", [
    ("epoch,loss,lr\n1,4,1e-6\n2,2,5e-7\n", {}, "loss 0 2 4 1 2 epoch lr 0 5e-07 1e-06 1 2 epoch"),
    ("epoch,score,none\n8,-1,0\n9,1,0\n", {}, "score -1 0 1 8 9 epoch none 0 0.5 1 8 9 epoch"),
    ("epoch,loss\n1,1\n2,0.5\n", {"loss": 5.0}, "loss 0 2.5 5 1 2 epoch chance"),
    ("epoch,loss\n1,1\n2,0.5\n", {"loss": -2.0}, "loss -2 -0.5 1 1 2 epoch chance"),
    ("epoch,loss\n1,1\n2,0.5\n", {"loss": 0.0}, "loss 0 0.5 1 1 2 epoch chance")])
def test_the_axes_hold_zero_all_values_and_the_chance_level(tmp_path, texts, log, chance, expected):
    assert_texts_are_apart(texts, curves(tmp_path, log, chance))
    assert " ".join(text.string for text in texts) == expected


@pytest.mark.parametrize("value", ["0.25", "0", "-3"])
def test_one_epoch_is_a_dot(tmp_path, texts, value):
    dot = is_colour(curves(tmp_path, f"epoch,loss\n7,{value}\n"), BLUE)
    [epoch], y_of = plot_of(texts, "loss")                                 # one number, of the epoch
    x, y = round(epoch.x), y_of(float(value))
    assert dot[y - 3:y + 4, x - 3:x + 4].sum() > 15 and dot.sum() == dot[y - 4:y + 5, x - 4:x + 5].sum()


def test_nan_leaves_a_gap_and_a_value_between_two_gaps_is_a_dot(tmp_path, texts):
    pixels = curves(tmp_path, "epoch,loss,empty\n1,2,nan\n2,2,nan\n3,nan,inf\n4,1,nan\n5,nan,nan\n")
    epochs, y_of = plot_of(texts, "loss")
    blue = is_colour(pixels, BLUE)
    step = (epochs[-1].x - epochs[0].x) / 4
    columns = np.flatnonzero(blue.any(0)) - epochs[0].x
    assert not ((columns > step + 3) & (columns < 3 * step - 4)).any() and (columns < 3 * step + 5).all()
    assert ((columns > 0) & (columns < step)).sum() >= step - 3
    assert blue[y_of(1), round(epochs[0].x + 3 * step)]


def test_the_chance_level_is_a_dashed_line_with_its_name(tmp_path, texts):
    pixels = curves(tmp_path, "epoch,loss,score\n1,1,0.1\n2,1,0.4\n", {"score": 0.25, "another": 3})
    [word] = found(texts, "chance")
    epochs, y_of = plot_of(texts, "score")
    assert epochs[0].x < word.x < epochs[-1].x and 0 < y_of(0.25) - word.y < 20
    line = is_colour(pixels[y_of(0.25) - 1:y_of(0.25) + 2], (120, 120, 120)).any(0)
    inside = line[round(epochs[0].x):round(epochs[-1].x)].astype(int)
    assert 0.4 < inside.mean() < 0.75 and np.abs(np.diff(inside)).sum() > 20         # drawn and not, in turn
    assert_texts_are_apart(texts, pixels)


BROKEN = {"empty": b"", "header only": b"epoch,loss\n", "a word": b"epoch,loss\n1,low\n",
          "short row": b"epoch,loss\n1\n", "uneven rows": b"epoch,loss\n1,2\n2\n",
          "long row": b"epoch,loss\n1,2,3\n", "no epoch": b"step,loss\n1,2\n", "only epochs": b"epoch\n1\n",
          "no number": b"epoch,loss\nnan,1\n", "not text": b"\xff\xfe\x00,1\n", "long": b"1" * 200_000}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_log_is_refused(content, tmp_path):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.csv: not the log of a run; expected a line with the names"):
        pictures.curves(tmp_path / "log.csv", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    def fails(file, form):
        file.write(b"half of")
        raise OSError(28, "No space left on device")
    pictures.save(Image.new("RGB", (5, 4), RED), tmp_path / "p.png")
    with pytest.raises(OSError, match="No space left"):
        pictures.save(SimpleNamespace(save=fails), tmp_path / "p.png")
    assert (read(tmp_path / "p.png") == RED).all() and [file.name for file in tmp_path.iterdir()] == ["p.png"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, arguments)])
    runpy.run_path(pictures.__file__, run_name="__main__")


def test_the_command_draws_a_run_or_an_example_or_says_what_it_takes(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.csv").write_text("epoch,loss\n1,4\n2,2\n")
    command(monkeypatch, tmp_path, tmp_path / "example.png")
    assert capsys.readouterr().out == f"{tmp_path}/curves.png\n{tmp_path}/example.png\n"
    assert is_colour(read(tmp_path / "curves.png"), BLUE).any()
    assert read(tmp_path / "example.png").shape[1] == 1180
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch)
    assert "usage: pictures.py" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"epoch,loss\n1,?\n"])
def test_the_command_refuses_a_run_without_a_readable_log_in_one_line(tmp_path, monkeypatch, capsys, content):
    if content is not None:
        (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {tmp_path}/log.csv: ") and said.count("\n") == 1
    assert ("cannot be read (No such file" in said) == (content is None)
