"""One video as a timeline, from its frames to its labels and predictions: a function for each row of the
picture. `table_pictures.py` draws predictions without labels by the same rows.

    python timeline.py example.png     # needs no data: invented labels and predictions
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from labels import EXPR
from metrics import CCC
from pictures import (CLASS_COLOURS, DARK, GREY, INK, LABEL, PREDICTION, UNKNOWN, axes, curve, font, save)

WIDTH, LEFT, RIGHT, FACE = 1180, 150, 1122, 80         # frames begin at LEFT and end at RIGHT


def draw(task, faces, features, parts, labels, outputs, path):
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


def round_step(length, smallest) -> float:
    """1, 2 or 5 times a power of ten, at least `smallest`: at most 12 of them in `length`."""
    step, factors = smallest, itertools.cycle((2, 2.5, 2))             # 1, 2, 5, 10, ...
    while length / step > 12:
        step *= next(factors)
    return step


def axis(sheet, y, title: str, marks, T: int):
    """A line with marks: (frame counted from 0, text)."""
    pen = ImageDraw.Draw(sheet)
    row_title(sheet, y + 13, title)
    pen.line((LEFT, y, RIGHT, y), DARK)
    for frame, text in marks:
        x = x_of(frame, T)
        pen.line((x, y, x, y + 5), DARK)
        pen.text((x, y + 8), text, INK, font(11), anchor="ma")
    return y + 34


def frame_axis(sheet, y, T: int, first: int = 0):
    """Numbers of frames at round distances, and that of the first frame."""
    step = round(round_step(T, 1))
    frames = sorted({0, *range(-first % step, T, step)})
    return axis(sheet, y, f"frame, from {first}", [(frame, f"{frame + first}") for frame in frames], T)


def draw_faces(sheet, y, faces, T: int, first: int = 0):
    """Each face above its own frame, with the frame's number, which is `first` for the video's first frame.
    A face that would cover the last is left out."""
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
        pen.text((x, y + FACE + 9), f"{frame + first}", INK, font(11), anchor="ma")
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
    draw(EXPR, [], features, [(0, 150), (100, 250), (200, 300)], labels, outputs, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The timeline of invented labels and predictions.")
    parser.add_argument("picture", type=Path, help="a .png file")
    path = parser.parse_args().picture
    try:
        example(path)
    except OSError as error:
        parser.exit(2, f"error: {error}\n")
    print(path)
