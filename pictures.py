"""The pictures: reconstructions, training curves, one video from its frames to its predictions. Drawn with
Pillow, nothing else.

In this order: `reconstruction` · `curves`, with what plots need · `timeline`, with a function for each row.

    python pictures.py RUN_FOLDER      # draws the run's log.csv as RUN_FOLDER/curves.png
    python pictures.py example.png     # needs no data: the timeline of invented labels and predictions
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoints import write_file
from images import unnormalise
from labels import EXPR
from metrics import CCC

INK, DARK, GREY = (40, 40, 40), (120, 120, 120), (205, 205, 205)
LABEL, PREDICTION = (200, 60, 50), (40, 100, 180)      # red and blue, in every picture
UNKNOWN = (222, 222, 222)                              # frames that nobody annotated
CLASS_COLOURS = ((240, 222, 180), (200, 60, 50), (110, 140, 60), (120, 80, 150),
                 (250, 200, 50), (60, 100, 170), (240, 130, 50), (130, 95, 75))

WIDTH, LEFT, RIGHT, FACE = 1180, 150, 1122, 80         # of a timeline: frames begin at LEFT, end at RIGHT


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
    zoom = 4                                                               # drawn large, for smooth edges
    large = Image.new("L", (zoom * sheet.width, zoom * sheet.height))
    pen = ImageDraw.Draw(large)
    ys = y_of(values, box, low, high)
    known = np.isfinite(values)
    breaks = np.flatnonzero(known[1:] != known[:-1]) + 1                   # where a gap begins or ends
    for run in np.split(np.arange(len(values)), breaks):
        points = list(zip(zoom * xs[run], zoom * ys[run]))
        if known[run[0]] and len(run) > 1:
            pen.line(points, 255, 2 * zoom, joint="curve")
        elif known[run[0]]:
            pen.circle(points[0], 3 * zoom, fill=255)
    sheet.paste(colour, mask=large.reduce(zoom))


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


def timeline(task, faces, features, parts, labels, outputs, path):
    """One video of T frames, from top to bottom: faces, features, segments, labels and predictions, frames.

    task: a record of labels.py; it decides how labels and predictions are drawn.
    faces: (frame counted from 0, uint8 (h, w, 3)) in the order of frames; may be empty.
    features: float (T, D). parts: segments (start, end), end excluded.
    labels: (T, K), or (T,) where a label is one class; NaN = not annotated.
    outputs: (T, K), the values for the metric CCC, otherwise logits.
    Raises ValueError if features, labels and outputs differ in T.
    """
    T = len(features)
    if not T or len(labels) != T or len(outputs) != T:
        raise ValueError(f"{T} features, {len(labels)} labels, {len(outputs)} outputs: expected one a frame")
    sheet = Image.new("RGB", (WIDTH, 400 + 14 * len(parts) + 130 * len(task.outputs)), "white")
    y = draw_faces(sheet, 8, faces, T) if faces else 8
    y = draw_features(sheet, y, features)
    y = draw_segments(sheet, y, parts, T)
    if task.metric is CCC:
        y = draw_values(sheet, y, task, labels, outputs)
    elif task.one_class:
        y = draw_classes(sheet, y, task.outputs, labels, outputs)
    else:
        y = draw_units(sheet, y, task.outputs, labels, outputs)
    save(sheet.crop((0, 0, WIDTH, y)), path)                               # it was higher than needed


def x_of(frame, T: int):
    """The x of a frame's middle. Frame t of T fills the pixels from t / T to (t + 1) / T of the width."""
    return LEFT + (frame + 0.5) / T * (RIGHT - LEFT)


def row_title(sheet, y, text: str):
    """In the left column, its middle at y."""
    ImageDraw.Draw(sheet).text((6, y), text, INK, font(14), anchor="lm")


def band(sheet, top, height: int, colours):
    """A strip of one colour per frame. colours: uint8 (T, 3)."""
    strip = Image.fromarray(colours[None])                                 # (T, 3) -> (1, T, 3)
    sheet.paste(strip.resize((RIGHT - LEFT, height), Image.NEAREST), (LEFT, top))


def legend(sheet, y, entries):
    """Squares with names, from left to right. entries: (colour, name)."""
    pen = ImageDraw.Draw(sheet)
    x = LEFT
    for colour, name in entries:
        pen.rectangle((x, y, x + 13, y + 13), fill=colour, outline=GREY)
        pen.text((x + 19, y + 7), name, INK, font(12), anchor="lm")
        x += 19 + pen.textlength(name, font(12)) + 18
    return y + 22


def frame_axis(sheet, y, T: int):
    """Numbers of frames, counted from 0, at round distances."""
    pen = ImageDraw.Draw(sheet)
    row_title(sheet, y + 13, "frame, from 0")
    pen.line((LEFT, y, RIGHT, y), DARK)
    steps = [digit * 10 ** zeros for zeros in range(9) for digit in (1, 2, 5)]
    step = next(step for step in steps if T / step <= 12)
    for frame in range(0, T, step):
        x = x_of(frame, T)
        pen.line((x, y, x, y + 5), DARK)
        pen.text((x, y + 8), f"{frame}", INK, font(11), anchor="ma")
    return y + 34


def draw_faces(sheet, y, faces, T: int):
    """Each face above its own frame, with the frame's number; one that would cover the last is left out."""
    pen = ImageDraw.Draw(sheet)
    row_title(sheet, y + FACE / 2, "frames")
    free = 0                                                               # where the next face may begin
    for frame, face in faces:
        x = round(x_of(frame, T))
        left = x - FACE // 2
        if left < free:
            continue
        sheet.paste(Image.fromarray(face).resize((FACE, FACE)), (left, y))
        pen.line((x, y + FACE + 2, x, y + FACE + 7), DARK)
        pen.text((x, y + FACE + 9), f"{frame}", INK, font(11), anchor="ma")
        free = left + FACE + 4
    return y + FACE + 32


def draw_features(sheet, y, features):
    """A column per frame, a row per feature; grey is a feature's mean over the video."""
    height = 70
    row_title(sheet, y + height / 2, "features")
    spread = (features - features.mean(0)) / (features.std(0) + 1e-6)
    heat = (spread.T * 50 + 128).clip(0, 255).astype(np.uint8)             # (T, D) -> (D, T)
    sheet.paste(Image.fromarray(heat).resize((RIGHT - LEFT, height)), (LEFT, y))
    return y + height + 16


def draw_segments(sheet, y, parts, T: int):
    """A bar per segment, each one below the last, because neighbours overlap."""
    pen = ImageDraw.Draw(sheet)
    row_title(sheet, y + 4, "segments")
    for start, end in parts:
        left, right = x_of(start - 0.5, T), x_of(end - 0.5, T) - 1         # from edge to edge
        pen.rectangle((left, y, right, y + 8), fill=DARK)
        y += 14
    return y + 10


def draw_values(sheet, y, task, labels, outputs):
    """A plot with two curves for each output; grey where nobody annotated."""
    T, height = len(labels), 100
    low, high = task.lowest, task.highest
    pen = ImageDraw.Draw(sheet)
    xs = x_of(np.arange(T), T)
    for k, name in enumerate(task.outputs):
        box = (LEFT, y, RIGHT, y + height)
        row_title(sheet, y + 24, name)
        pen.text((6, y + 48), "label", LABEL, font(13), anchor="lm")
        pen.text((6, y + 66), "prediction", PREDICTION, font(13), anchor="lm")
        unknown = np.isnan(labels[:, k, None])                             # (T, K) -> (T, 1)
        band(sheet, y, height, np.where(unknown, UNKNOWN, 255).astype(np.uint8))         # -> (T, 3)
        axes(sheet, box, low, high)
        curve(sheet, box, xs, labels[:, k], low, high, LABEL)
        curve(sheet, box, xs, outputs[:, k], low, high, PREDICTION)
        y += height + 18
    y = frame_axis(sheet, y, T)
    return legend(sheet, y, [(LABEL, "label"), (PREDICTION, "prediction"), (UNKNOWN, "not annotated")])


def draw_classes(sheet, y, names, labels, outputs):
    """Two strips: the labelled class, and the class with the largest logit."""
    height = 28
    colours = [CLASS_COLOURS[k % len(CLASS_COLOURS)] for k in range(len(names))]
    palette = np.array([*colours, UNKNOWN], np.uint8)
    labelled = np.nan_to_num(labels, nan=-1).astype(int)                   # -1 is the palette's last: UNKNOWN
    predicted = outputs.argmax(axis=1)                                     # (T, K) -> (T,)
    for title, classes in (("label", labelled), ("prediction", predicted)):
        row_title(sheet, y + height / 2, title)
        band(sheet, y, height, palette[classes])                           # (T,) -> (T, 3)
        y += height + 6
    y = frame_axis(sheet, y + 4, len(labels))
    return legend(sheet, y, [*zip(colours, names), (UNKNOWN, "not annotated")])


def draw_units(sheet, y, names, labels, outputs):
    """Two strips for each output: the label, 0 or 1, above the predicted probability."""
    height = 12
    pen = ImageDraw.Draw(sheet)
    probabilities = (1 + np.tanh(outputs / 2)) / 2                         # = sigmoid(outputs), no overflow
    for k, name in enumerate(names):
        row_title(sheet, y + height, name)
        pen.text((LEFT - 6, y + 6), "label", LABEL, font(11), anchor="rm")
        band(sheet, y, height, shades(labels[:, k], LABEL))
        pen.text((LEFT - 6, y + height + 6), "prediction", PREDICTION, font(11), anchor="rm")
        band(sheet, y + height, height, shades(probabilities[:, k], PREDICTION))
        y += 2 * height + 7
    y = frame_axis(sheet, y + 4, len(labels))
    return legend(sheet, y, [(LABEL, "label: present"), (UNKNOWN, "not annotated"),
                             (PREDICTION, "prediction: the darker, the more probable")])


def shades(values, colour):
    """White for 0 to the full colour for 1. values: (T,), NaN = not annotated -> uint8 (T, 3)."""
    share = values[:, None]                                                # (T,) -> (T, 1)
    mixed = 255 + share * (np.array(colour) - 255)                         # (T, 1) and (3,) -> (T, 3)
    return np.where(np.isnan(share), UNKNOWN, mixed).round().astype(np.uint8)


def example(path):
    """A timeline of invented data: labels in blocks, predictions that are often right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(8, size=10).repeat(30).astype(float)             # (10,) -> (300,)
    outputs = 2 * np.eye(8)[labels.astype(int)] + rng.normal(size=(300, 8))
    features = outputs @ rng.normal(size=(8, 64))                          # (300, 8) -> (300, 64)
    labels[200:230] = np.nan
    timeline(EXPR, [], features, [(0, 150), (100, 250), (200, 300)], labels, outputs, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Curves of runs, or an example that needs no data.")
    parser.add_argument("path", nargs="+", type=Path, help="a run's folder, or a .png file for the example")
    for path in parser.parse_args().path:
        picture = path if path.suffix == ".png" else path / "curves.png"
        try:
            if picture == path:
                example(picture)
            else:
                curves(path / "log.csv", picture)
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        print(picture)
