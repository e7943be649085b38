"""All pictures: reconstructions, the curves of a training, one video. Drawn with Pillow, nothing else.

    python pictures.py RUN_FOLDER      # draws the run's log.csv again, as RUN_FOLDER/curves.png
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.checkpoints import write_file
from engine.config import print_all
from images import unnormalise
from labels import TASKS, VA

INK, DARK, GREY = (40, 40, 40), (120, 120, 120), (205, 205, 205)
LABEL, PREDICTION, UNKNOWN = (200, 60, 50), (40, 100, 180), (222, 222, 222)    # apart for the colour-blind
WIDTH, LEFT, RIGHT = 1160, 110, 1110         # of a video's picture: its frames lie from LEFT to RIGHT
FACE, PLOT, STRIP = 80, 100, 12              # heights of what stands in its rows
font = ImageFont.load_default                # Pillow's own, at a size in pixels; it has ASCII only


def save(picture: Image.Image, path):
    """As PNG, whole or not at all. -> path"""
    write_file(path, lambda file: picture.save(file, "PNG"))
    return path


def write(sheet, x, y, words: str, size: int = 13, colour=INK, anchor: str = "la") -> float:
    """Words, of letters that the font lacks their codes; cut if they are too long. -> x of their end"""
    words = words.encode("unicode_escape").decode()
    while font(size).getlength(words) > sheet.width - 20:
        words = f"{words[:9 * len(words) // 10]}..."
    ImageDraw.Draw(sheet).text((x, y), words, colour, font(size), anchor)
    return x + font(size).getlength(words)


def plot(sheet, box, low: float, high: float, xs, lines, title: str = "", chance: float = np.nan):
    """Lines in a box (left, top, right, bottom) whose y axis runs from low to high, a dashed one at `chance`.

    lines: (values (3, n) at xs (n,), colour): a curve of the middle row in a pale band between the others.
    NaN leaves a gap, a value with no neighbour is a dot, values beyond the axis run along its edge.
    """
    left, top, right, bottom = box
    pen, zoom, scale = ImageDraw.Draw(sheet), 4, (bottom - top) / (high - low)
    pen.rectangle(box, outline=GREY)
    write(sheet, left, top - 4, title, anchor="ld")
    for value in (low, (low + high) / 2, high):
        y = bottom - (value - low) * scale
        pen.line((left, y, right, y), GREY)
        write(sheet, left - 6, y, f"{value:.3g}", 11, anchor="rm")
    if np.isfinite(chance):
        y = bottom - (chance - low) * scale
        for x in range(left, right, 8):
            pen.line((x, y, x + 4, y), DARK, 2)
        write(sheet, right - 4, y - 4, "chance", 11, DARK, "rd")
    for values, colour in lines:                                           # drawn large, for smooth edges
        large = Image.new("L", (zoom * sheet.width, zoom * (bottom - top + 8)))
        pen = ImageDraw.Draw(large)
        ys = zoom * (bottom - (np.clip(values, low, high) - low) * scale - top + 4)            # (3, n)
        for part in np.ma.clump_unmasked(np.ma.masked_invalid(values[1])):                     # between gaps
            least, points, largest = (list(zip(zoom * xs[part], y[part])) for y in ys)
            pen.polygon([*least, *largest[::-1]], 90)
            pen.line(points, 255, 2 * zoom, joint="curve")
            if len(points) == 1:
                pen.circle(points[0], 3 * zoom, fill=255)
        sheet.paste(colour, (0, top - 4), mask=large.reduce(zoom))


def reconstruction(images, model, pred, mask, path, side: int = 112):
    """Rows: original, masked, reconstruction; a column per image.

    images (B, 3, H, W) normalised; pred (B, N, P·P·3) and mask (B, N), 1 = hidden, from `MaskedAutoencoder`.
    The paper's decoder reconstructs the complete image. The loss uses its hidden patches only, and so does
    this picture: visible patches are shown as they were. With `norm_pix_loss` the model predicts patches
    without their mean and deviation. Those of the original are put back, or the picture would be noise.
    """
    original = model.patchify(model.own(images))             # (B, 3, H, W) -> (B, N, P·P·3)
    if model.norm_pix_loss:
        deviation = (original.var(-1, keepdim=True) + 1e-6).sqrt()
        pred = pred * deviation + original.mean(-1, keepdim=True)
    hidden = mask[..., None].bool()                          # (B, N) -> (B, N, 1)
    rows = {"original": original, "masked": original.masked_fill(hidden, 0.0),
            "reconstruction": pred.where(hidden, original)}
    left, step = 110, side + 4
    sheet = Image.new("RGB", (left + len(images) * step, len(rows) * step), "white")
    for r, (title, patches) in enumerate(rows.items()):
        write(sheet, 6, r * step + side // 2, title, 14, anchor="lm")
        shown = unnormalise(model.unpatchify(patches), model.mean, model.std)  # (B, N, P·P·3) -> (B, H, W, 3)
        for c, pixels in enumerate(shown):
            tile = Image.fromarray(pixels).resize((side, side), Image.NEAREST)
            sheet.paste(tile, (left + c * step, r * step))
    save(sheet, path)


def read_log(path) -> dict[str, np.ndarray]:
    """A log.csv as {column: values (epochs,)}. Raises ValueError if it is damaged, OSError if missing."""
    try:
        names, *rows = csv.reader(Path(path).read_text().splitlines())
        columns = dict(zip(names, np.array(rows, float).T, strict=True))   # text (epochs, columns)
        return {"epoch": columns.pop("epoch"), **columns}
    except (ValueError, KeyError, csv.Error) as error:
        raise ValueError(f"{path}: not the log of a run ({error})") from None


def curves(folder, chance={}) -> Path:
    """folder/log.csv as folder/curves.png, a small plot over the epochs of each column. -> its path
    chance: {column: its dashed line}. A y axis holds 0, all values and chance. Raises as `read_log`."""
    logged = read_log(Path(folder) / "log.csv")
    epochs = logged.pop("epoch")
    share = (epochs - epochs.min()) / np.ptp(epochs) if np.ptp(epochs) else np.full(len(epochs), 0.5)
    across, width, height = min(3, len(logged)), 340, 212                  # plots in a row; size of each
    sheet = Image.new("RGB", (width * across + 10, height * -(-len(logged) // across)), "white")
    for i, (column, values) in enumerate(logged.items()):
        left, top = i % across * width + 62, i // across * height + 28
        right, bottom, level = left + 264, top + 136, chance.get(column, np.nan)
        shown, xs = np.ma.masked_invalid([0, level, *values]), left + share * (right - left)
        plot(sheet, (left, top, right, bottom), shown.min(), shown.max() + (not shown.any()), xs,
             [(np.stack([values] * 3), PREDICTION)], column, level)
        for k in sorted({0, len(epochs) // 2, len(epochs) - 1}):
            ImageDraw.Draw(sheet).line((xs[k], bottom, xs[k], bottom + 4), DARK)
            write(sheet, xs[k], bottom + 6, f"{epochs[k]:.0f}", 11, anchor="ma")
        write(sheet, (left + right) / 2, bottom + 20, "epoch", 12, anchor="ma")
    return save(sheet, Path(folder) / "curves.png")


def columns(values, T: int, K: int) -> np.ndarray:
    """Least, mean and largest value of each column of pixels; one of a long video holds several frames. NaN
    is left out. values: (t, K), or classes (t,), which are 1 for their own output, else 0. -> (3, n, K)"""
    values, n = np.asarray(values, float), min(T, RIGHT - LEFT)
    if values.ndim == 1:
        values = np.where(np.isnan(values)[:, None], np.nan, values[:, None] == np.arange(K))  # -> (t, K)
    values = np.pad(values, ((0, T - len(values)), (0, 0)), constant_values=np.nan)            # (T, K)
    first = -(-np.arange(n) * T // n)                                      # frame i T / n, rounded up
    count = np.add.reduceat(np.isfinite(values).astype(float), first)
    mean = np.add.reduceat(np.nan_to_num(values), first) / np.where(count, count, np.nan)
    return np.stack([np.fmin.reduceat(values, first), mean, np.fmax.reduceat(values, first)])


def strip(sheet, y: int, height: int, shares, colour):
    """A row, white where a share is 0, in full colour where it is 1, grey where it is NaN. shares: (n,)"""
    mixed = 255 + shares[:, None] * (np.array(colour) - 255)               # (n,) -> (n, 3)
    mixed = np.where(np.isnan(mixed), UNKNOWN, mixed).round().astype(np.uint8)
    sheet.paste(Image.fromarray(mixed[None]).resize((RIGHT - LEFT, height), Image.NEAREST), (LEFT, y))
    ImageDraw.Draw(sheet).rectangle((LEFT - 1, y - 1, RIGHT, y + height), outline=GREY)


def axis(sheet, y: int, title: str, T: int, first: int, rate: float) -> int:
    """Round numbers below T frames: `first` below the first one, 1 more every `rate` frames. -> y below it"""
    steps = [digit * 10.0 ** n for n in range(0 if first else -3, 9) for digit in (1, 2, 5)]
    step = next(step for step in steps if T / rate <= 12 * step)
    write(sheet, 6, y + 12, title, anchor="lm")
    ImageDraw.Draw(sheet).line((LEFT, y, RIGHT, y), DARK)
    for number in sorted({first, *(step * np.arange(1, 1 + int((first + (T - 1) / rate) / step + 1e-6)))}):
        x = LEFT + ((number - first) * rate + 0.5) / T * (RIGHT - LEFT)
        ImageDraw.Draw(sheet).line((x, y, x, y + 5), DARK)
        write(sheet, x, y + 8, f"{number:.10g}", 11, anchor="ma")
    return y + 30


def draw_video(name: str, predictions: dict, labels={}, faces=(), noface=(), fps=None, note: str = ""):
    """A video from top to bottom: name, faces, frames without one, labels and predictions, axes. -> Image

    predictions, labels: {name of a task: values}; predictions are in units, (T, K), labels (T, K), or (T,)
    where a label is one class; NaN = none. What is shorter than the longest ends earlier. noface: bool (T,).
    faces: (frame from 1, uint8 (h, w, 3)) in order; one that would cover the last is left out.
    Raises ValueError if there is no frame.
    """
    T = max(map(len, [*predictions.values(), *labels.values(), noface]))
    if not T:
        raise ValueError(f"{name}: no frame to draw; expected predictions, labels or noface of some frames")
    n, sheet = min(T, RIGHT - LEFT), Image.new("RGB", (WIDTH, 1400), "white")       # n: columns of pixels
    xs = LEFT + (np.arange(n) + 0.5) / n * (RIGHT - LEFT)
    many = f", {T / n:.3g} to a column of pixels: their mean, and pale from the least to the largest"
    write(sheet, 6, 8, name, 17)
    write(sheet, 6, 32, f"frames: {T:,}{many if T > n else ''}{'; ' if note else ''}{note}")
    y, free = 58, 0                                                        # where the next face may begin
    for number, face in faces:
        x = round(LEFT + (number - 0.5) / T * (RIGHT - LEFT))
        if x - FACE // 2 >= free:
            sheet.paste(Image.fromarray(face).resize((FACE, FACE)), (x - FACE // 2, y))
            write(sheet, x, y + FACE + 4, f"{number}", 11, anchor="ma")
            free = x + FACE // 2 + 4
    y += FACE + 26 if free else 0
    noface = {"": np.asarray(noface)[:, None]} if len(noface) else {}
    for key, outputs in {"": ("no face",), **{task.name: task.outputs for task in TASKS.values()}}.items():
        series = [(columns(values[key], T, len(outputs)), colour) for values, colour in        # top to bottom
                  ((noface, DARK), (labels, LABEL), (predictions, PREDICTION)) if key in values]
        height = PLOT + 14 if key == "va" else STRIP * len(series)
        for k, output in enumerate(outputs if series else ()):
            write(sheet, 6, y + height / 2, output, anchor="lm")
            if key == "va":
                strip(sheet, y, PLOT, 0 * series[0][0][1, :, k], INK)      # grey where it is NaN
                plot(sheet, (LEFT - 1, y - 1, RIGHT, y + PLOT), VA.lowest, VA.highest, xs,
                     [(values[:, :, k], colour) for values, colour in series])
            for i, (values, colour) in enumerate(series if key != "va" else ()):
                strip(sheet, y + i * STRIP, STRIP, values[1, :, k], colour)
            y += height + (4 if k + 1 < len(outputs) else 14)
    y = axis(sheet, y, "frame", T, 1, 1)
    y = axis(sheet, y, "seconds", T, 0, fps) if fps else y
    x, meaning = LEFT, [("label", LABEL), ("prediction (a strip: the darker, the more probable)", PREDICTION),
                        ("not annotated, or not predicted", UNKNOWN)]
    for words, colour in meaning if labels else meaning[1:]:
        ImageDraw.Draw(sheet).rectangle((x, y, x + 13, y + 13), colour)
        x = write(sheet, x + 19, y + 7, words, 12, anchor="lm") + 18
    return sheet.crop((0, 0, WIDTH, y + 20))                               # it was higher than needed


if __name__ == "__main__":
    print_all(curves(folder) for folder in sys.argv[1:])
