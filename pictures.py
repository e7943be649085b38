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
    """Pillow's own font at a size in pixels."""
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
        across = np.linspace(left, right, len(values))
        points = [(x, bottom - (np.clip(v, low, high) - low) / (high - low) * (bottom - top)) for x, v in zip(across, values)]
        for (p, a), (q, b) in zip(zip(points, values), zip(points[1:], values[1:])):
            if np.isfinite(a) and np.isfinite(b):
                pen.line((*p, *q), colour, 2)


CLASS_COLOURS = ((225, 225, 225), (200, 60, 50), (110, 140, 60), (120, 80, 150), (240, 190, 60), (60, 100, 170), (240, 130, 50),
                 (150, 120, 100))


def band(pen, box, colours):
    """A strip of one colour per frame in a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    for i, colour in enumerate(colours):
        pen.rectangle((left + i * (right - left) / len(colours), top, left + (i + 1) * (right - left) / len(colours), bottom), fill=colour)


def timeline(task, names, faces, features, parts, labels, outputs, path):
    """One video from frames to predictions: faces | features | segments | predictions over labels.

    faces: uint8 (h, w, 3) arrays spread over the video; features (T, D); parts: its segments (start, end); labels with target 0
    and NaN where not annotated, (T, 2), (T,) or (T, 12); outputs (T, K) as the task is scored: values, logits, logits.
    """
    left, right, T = 150, 1130, len(features)
    rows = {"va": 2 * 120, "expr": 110, "au": 12 * 24 + 30}[task]
    sheet = Image.new("RGB", (1150, 250 + 14 * len(parts) + rows), "white")
    pen, side = ImageDraw.Draw(sheet), (right - left) // max(11, len(faces))
    top = 225 + 14 * len(parts)                              # of the labels and predictions
    for text, y in (("frames", 45), ("features", 140), ("segments", 200), ("labels and", top), ("predictions", top + 16)):
        pen.text((6, y), text, INK, font(14))
    for i, face in enumerate(faces):
        sheet.paste(Image.fromarray(face).resize((side - 3, side - 3)), (left + i * side, 6))
    spread = (features - features.mean(0)) / (features.std(0) + 1e-6)
    heat = Image.fromarray((spread.T * 50 + 128).clip(0, 255).astype(np.uint8))                  # (D, T): a column per frame
    sheet.paste(heat.resize((right - left, 70)), (left, 115))
    for i, (start, end) in enumerate(parts):
        x0, x1 = (left + t / T * (right - left) for t in (start, end))
        pen.rectangle((x0, 200 + 14 * i, x1 - 1, 208 + 14 * i), fill=COLOURS[1])
    if task == "va":
        for i, name in enumerate(names):
            lines = {"prediction": outputs[:, i], "label": labels[:, i]}
            plot(pen, (left, top + 20 + 120 * i, right, top + 105 + 120 * i), lines, -1, 1, name)
    elif task == "expr":
        for row, classes in enumerate((labels, outputs.argmax(1))):
            colours = [CLASS_COLOURS[int(k)] if np.isfinite(k) else "white" for k in classes]
            band(pen, (left, top + 30 * row, right, top + 26 + 30 * row), colours)
        x = left
        for name, colour in zip(names, CLASS_COLOURS):
            pen.rectangle((x, top + 72, x + 14, top + 86), fill=colour)
            pen.text((x + 19, top + 71), name, INK, font(12))
            x += 30 + pen.textlength(name, font(12)) + 8
    else:
        for i, name in enumerate(names):
            y, shown = top + 24 * i, 1 / (1 + np.exp(-outputs[:, i]))
            pen.text((left - 44, y + 1), name, INK, font(12))
            for dy, values, colour in ((0, labels[:, i], COLOURS[0]), (10, shown, COLOURS[1])):
                fade = [tuple(int(255 + v * (c - 255)) for c in colour) if np.isfinite(v) else (245, 245, 245) for v in values]
                band(pen, (left, y + dy, right, y + dy + 8), fade)
        pen.text((left, top + 24 * 12), "red: labelled, blue: predicted probability", INK, font(12))
    save(sheet, path)


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
