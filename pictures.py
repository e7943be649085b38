"""The pictures of a training, its reconstructions and its curves, and what all pictures share: colours,
font, a plot with axes. Drawn with Pillow, nothing else. `timeline.py` goes on with videos.

    python pictures.py RUN_FOLDER      # draws the run's log.csv as RUN_FOLDER/curves.png
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoints import write_file
from images import unnormalise

INK, DARK, GREY = (40, 40, 40), (120, 120, 120), (205, 205, 205)
LABEL, PREDICTION = (200, 60, 50), (40, 100, 180)      # red and blue, in every picture
UNKNOWN = (222, 222, 222)                              # frames that nobody annotated
CLASS_COLOURS = ((160, 195, 255), (165, 35, 0), (5, 165, 100), (235, 75, 175),       # a colour-blind reader
                 (255, 205, 45), (5, 65, 190), (200, 125, 5), (35, 40, 60))          # can tell them apart


def save(picture: Image.Image, path):
    """As PNG, whole or not at all."""
    write_file(path, lambda file: picture.save(file, "PNG"))


def font(size: int):
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)


def reconstruction(images, model, pred, mask, path, side: int = 112):
    """Rows: original, masked, reconstruction; a column per image.

    images (B, 3, H, W) normalised; pred (B, N, P·P·3) and mask (B, N), 1 = hidden, from `MaskedAutoencoder`.
    The paper's decoder reconstructs the complete image. The loss uses its hidden patches only, and so does
    this picture: visible patches are shown as they were. With `norm_pix_loss` the model predicts patches
    without their mean and deviation. Those of the original are put back, or the picture would be noise.
    """
    original = model.patchify(images)                        # (B, 3, H, W) -> (B, N, P·P·3)
    if model.norm_pix_loss:
        deviation = (original.var(-1, keepdim=True) + 1e-6).sqrt()
        pred = pred * deviation + original.mean(-1, keepdim=True)
    hidden = mask[..., None].bool()                          # (B, N) -> (B, N, 1)
    rows = {"original": original,
            "masked": original.masked_fill(hidden, 0.0),
            "reconstruction": torch.where(hidden, pred, original)}
    left, step = 110, side + 4
    sheet = Image.new("RGB", (left + len(images) * step, len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (title, patches) in enumerate(rows.items()):
        pen.text((6, r * step + side // 2), title, INK, font(14), anchor="lm")
        pictures = unnormalise(model.unpatchify(patches))    # (B, N, P·P·3) -> (B, H, W, 3)
        for c, pixels in enumerate(pictures):
            tile = Image.fromarray(pixels).resize((side, side), Image.NEAREST)
            sheet.paste(tile, (left + c * step, r * step))
    save(sheet, path)


def y_of(value, box, low: float, high: float):
    """The y of a value in a box (left, top, right, bottom) whose y axis runs from low to high."""
    _, top, _, bottom = box
    return bottom - (np.clip(value, low, high) - low) / (high - low) * (bottom - top)


def axes(sheet, box, low: float, high: float, title: str = ""):
    """An empty plot in a box (left, top, right, bottom): title above, three numbers on the y axis."""
    left, top, right, _ = box
    pen = ImageDraw.Draw(sheet)
    pen.rectangle(box, outline=GREY)
    pen.text((left, top - 4), title, INK, font(13), anchor="ld")
    for value in (low, (low + high) / 2, high):
        y = y_of(value, box, low, high)
        pen.line((left, y, right, y), GREY)
        pen.text((left - 6, y), f"{value:.3g}", INK, font(11), anchor="rm")


def curve(sheet, box, xs, values, low: float, high: float, colour):
    """values (n,) at xs (n,) in a box. NaN leaves a gap; a value with no neighbour is drawn as a dot."""
    zoom, margin = 4, 4                                                    # drawn large, for smooth edges
    left, top, right, bottom = box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin
    large = Image.new("L", (zoom * (right - left), zoom * (bottom - top)))
    pen = ImageDraw.Draw(large)
    xs, ys = xs - left, y_of(values, box, low, high) - top
    known = np.isfinite(values)
    breaks = np.flatnonzero(known[1:] != known[:-1]) + 1                   # where a gap begins or ends
    for run in np.split(np.arange(len(values)), breaks):
        points = list(zip(zoom * xs[run], zoom * ys[run]))
        if known[run[0]] and len(run) > 1:
            pen.line(points, 255, 2 * zoom, joint="curve")
        elif known[run[0]]:
            pen.circle(points[0], 3 * zoom, fill=255)
    sheet.paste(colour, (left, top), mask=large.reduce(zoom))


def read_log(path) -> dict[str, np.ndarray]:
    """A log.csv as {column: values (epochs,)}. Raises ValueError if it is missing, empty or damaged."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        values = np.array(rows, float).reshape(len(rows), len(names))      # text -> (epochs, columns)
        columns = dict(zip(names, values.T))
        if not rows or len(columns) < 2 or not np.isfinite(columns["epoch"]).all():
            raise ValueError
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, csv.Error):
        raise ValueError(f"{path}: not the log of a run; expected a line with the names of columns, epoch "
                         "among them, and a line of numbers for each epoch") from None
    return columns


def curves(log, path, chance: dict[str, float] | None = None):
    """log.csv as small plots over the epochs, one for each column; chance {column: value} is a dashed line.

    Raises ValueError if the log is missing, empty or damaged.
    """
    columns = read_log(log)
    epochs = columns.pop("epoch")
    across, width, height = 3, 340, 212                                    # plots in a row; size of each
    down = -(-len(columns) // across)                                      # rounded up
    sheet = Image.new("RGB", (width * min(across, len(columns)) + 10, height * down), "white")
    for i, (column, values) in enumerate(columns.items()):
        x, y = i % across * width, i // across * height
        box = (x + 62, y + 28, x + width - 14, y + 164)
        curve_plot(sheet, box, column, epochs, values, (chance or {}).get(column, np.nan))
    save(sheet, path)


def curve_plot(sheet, box, title: str, epochs, values, chance: float):
    """One column of a log. Its y axis holds 0, the values, and the chance level if that is not NaN."""
    left, _, right, bottom = box
    shown = np.array([0, chance, *values])
    shown = shown[np.isfinite(shown)]
    low, high = shown.min(), shown.max()
    high = high if high > low else low + 1
    axes(sheet, box, low, high, title)
    pen = ImageDraw.Draw(sheet)
    span = np.ptp(epochs)                                                  # last - first
    share = (epochs - epochs.min()) / span if span else np.full(len(epochs), 0.5)
    xs = left + share * (right - left)
    for i in sorted({0, len(epochs) // 2, len(epochs) - 1}):
        pen.line((xs[i], bottom, xs[i], bottom + 4), DARK)
        pen.text((xs[i], bottom + 6), f"{epochs[i]:.0f}", INK, font(11), anchor="ma")
    pen.text(((left + right) / 2, bottom + 20), "epoch", INK, font(12), anchor="ma")
    if np.isfinite(chance):
        y = y_of(chance, box, low, high)
        for x in range(left, right, 8):
            pen.line((x, y, x + 4, y), DARK, 2)
        pen.text((right - 4, y - 4), "chance", DARK, font(11), anchor="rd")
    curve(sheet, box, xs, values, low, high, PREDICTION)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The curves of runs.")
    parser.add_argument("folder", nargs="+", type=Path, metavar="RUN_FOLDER")
    for folder in parser.parse_args().folder:
        try:
            curves(folder / "log.csv", folder / "curves.png")
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        print(folder / "curves.png")
