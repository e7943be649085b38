"""The pictures: reconstructions, training curves, a video's predictions over time. Drawn with Pillow, nothing else.

    python pictures.py RUN_FOLDER      # draws log.csv of a run as curves.png
"""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from images import unnormalise

INK, GREY, COLOURS = (40, 40, 40), (205, 205, 205), ((200, 60, 50), (40, 100, 180), (60, 140, 80), (150, 90, 170))


def save(picture: Image.Image, path):
    """As PNG, whole or not at all."""
    from training import write_file
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_file(path, lambda file: file.write(buffer.getvalue()))


def font(size: int):
    return ImageFont.load_default(size)


def reconstruction(images, model, pred, mask, path, side: int = 112):
    """Rows: original, masked, reconstruction (visible patches as they were, hidden ones predicted); a column per image.

    images (B, 3, H, W) normalised, pred (B, N, P·P·3), mask (B, N) from `MaskedAutoencoder`. With `norm_pix_loss` the model
    predicts patches without their mean and deviation: those of the original are put back, or the picture would be noise.
    """
    target = model.patchify(images)
    if model.norm_pix_loss:
        pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    hidden = mask[..., None].bool()
    rows = {"original": target, "masked": target.masked_fill(hidden, 0.0), "reconstruction": torch.where(hidden, pred, target)}
    sheet = Image.new("RGB", (110 + len(images) * (side + 4), 3 * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (title, patches) in enumerate(rows.items()):
        pen.text((6, r * (side + 4) + side // 2 - 8), title, INK, font(14))
        for c, pixels in enumerate(unnormalise(model.unpatchify(patches))):
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (110 + c * (side + 4), r * (side + 4)))
    save(sheet, path)


def plot(pen, box, lines: dict, low: float, high: float, title: str):
    """Curves in a box (left, top, right, bottom): {name: values}, NaN leaves a gap; the y axis runs from low to high."""
    left, top, right, bottom = box
    pen.rectangle(box, outline=GREY)
    pen.text((left, top - 18), title, INK, font(13))
    high = high if high > low else low + 1
    for value in (low, (low + high) / 2, high):
        y = bottom - (value - low) / (high - low) * (bottom - top)
        pen.line((left, y, right, y), GREY)
        pen.text((left - 46, y - 7), f"{value:.3g}", INK, font(11))
    x_name = right
    for (name, values), colour in reversed(list(zip(lines.items(), COLOURS))):
        x_name -= pen.textlength(name, font(12)) + 14
        pen.text((x_name, top - 18), name, colour, font(12))
        points = [(left + i / max(len(values) - 1, 1) * (right - left), bottom - (np.clip(v, low, high) - low) / (high - low) * (bottom - top))
                  for i, v in enumerate(values)]
        for (p, a), (q, b) in zip(zip(points, values), zip(points[1:], values[1:])):
            if np.isfinite(a) and np.isfinite(b):
                pen.line((*p, *q), colour, 2)


def curves(log, path):
    """log.csv as small plots, one per column, over the epochs."""
    rows = list(csv.DictReader(open(log, newline="")))
    columns = [c for c in (rows[0] if rows else []) if c != "epoch"]
    sheet = Image.new("RGB", (60 + 340 * min(3, len(columns)), 20 + 190 * -(-len(columns) // 3)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, column in enumerate(columns):
        values = [float(row[column]) for row in rows]
        x, y = 60 + i % 3 * 340, 30 + i // 3 * 190
        plot(pen, (x, y, x + 270, y + 140), {"": values}, min(min(values), 0), max(values), column)
    save(sheet, path)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        curves(Path(folder) / "log.csv", Path(folder) / "curves.png")
        print(Path(folder) / "curves.png")
