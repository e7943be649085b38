"""The pictures, read back: positions and colours are compared with where the data says they must be."""

import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
from drawn import assert_texts_are_apart, found, is_colour, read
from images import normalise, unnormalise
from mae import MaskedAutoencoder

RED, BLUE = (200, 60, 50), (40, 100, 180)


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


# What the three kinds of colour blindness leave of linear red, green and blue (Machado et al. 2009).
BLIND = {"none": np.eye(3),
         "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                    [-0.003882, -0.048116, 1.051998]],
         "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                    [-0.011820, 0.042940, 0.968881]],
         "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                    [0.004733, 0.691367, 0.303900]]}


def lab(colours, kind: str) -> np.ndarray:
    """CIELAB of colours (n, 3) as a reader sees them. 2 apart is just visible, 10 at a glance."""
    share = np.array(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(BLIND[kind]).T).clip(0, 1)
    xyz = seen @ np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]).T
    xyz /= (0.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("kind", BLIND)
def test_a_colour_blind_reader_can_tell_the_colours_apart(kind):
    classes = [*pictures.CLASS_COLOURS, (255, 255, 255)]
    for colours in ([*classes, pictures.UNKNOWN], [*classes, pictures.GREY],
                    [pictures.LABEL, pictures.PREDICTION, (255, 255, 255), pictures.GREY]):
        seen = lab(colours, kind)
        apart = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1000 * np.eye(len(seen))
        if pictures.UNKNOWN in colours:
            apart[-2:, -2:] = 1000                                   # white and UNKNOWN, two kinds of paper
        assert apart.min() >= 15, f"{kind}: {colours[apart.min(0).argmin()]}"


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


def test_the_command_draws_a_run_or_says_what_it_takes(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.csv").write_text("epoch,loss\n1,4\n2,2\n")
    command(monkeypatch, tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}/curves.png\n"
    assert is_colour(read(tmp_path / "curves.png"), BLUE).any()
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
