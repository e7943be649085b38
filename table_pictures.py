"""The pictures beside a table of predictions: one for each video, with all its tasks above one another.

A picture is drawn from the rows of the finished table, and a few frames are read again to show faces. So it
is drawn in the same way after a kill, and when the table was made long ago. A picture is at most as wide as
972 frames: of a longer video, a column of pixels shows several frames (`Columns`).

    python table_pictures.py example.png     # needs no data: invented predictions of 4,000 frames
"""

import argparse
import json
import zlib
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from checkpoints import write_file
from data import VideoFrames
from labels import AU, EXPR, TASKS, VA
from pictures import CLASS_COLOURS, DARK, GREY, INK, PREDICTION, axes, curve, font, y_of
from run import Progress
from table import Table, without_paths
from timeline import (FACE, LEFT, RIGHT, WIDTH, axis, band, draw_faces, frame_axis, legend, round_step,
                      row_title, x_of)

MADE_OF = "made of"        # the entry of a PNG file that tells which table it belongs to
PALE = (170, 200, 235)     # from the least to the largest value of a column
ROW = 13                   # height of an expression's or an action unit's strip


class Predicted(NamedTuple):
    """What a table says of one video of T frames."""
    name: str
    noface: np.ndarray             # bool (T,): no readable face image
    values: dict[str, np.ndarray]  # {name of a column: float32 (T,)}; NaN where the table has nothing
    classes: np.ndarray            # (T,) index of the expression; -1: none


# ---- Many frames in few pixels

class Columns:
    """T frames in at most as many columns as a timeline has pixels: each column shows the next few frames."""

    def __init__(self, T: int):
        self.T, self.n = T, min(T, RIGHT - LEFT)
        first = -(-np.arange(self.n + 1) * T // self.n)                    # i T / n, rounded up
        self.starts, self.counts = first[:-1], np.diff(first)              # (n,) each

    def mean(self, values):
        """(T,) -> (n,)"""
        return np.add.reduceat(values.astype(np.float64), self.starts) / self.counts

    def least(self, values):
        """(T,) -> (n,)"""
        return np.minimum.reduceat(values, self.starts)

    def largest(self, values):
        """(T,) -> (n,)"""
        return np.maximum.reduceat(values, self.starts)


# ---- One picture

def draw(video: Predicted, faces, fps=None, smooth: int = 0) -> Image.Image:
    """A video's predictions, from top to bottom: name, faces, frames without a face, valence and arousal,
    expression, action units, frames, seconds if `fps` is given.

    faces: (frame counted from 0, uint8 (h, w, 3)) in the order of frames; may be empty.
    """
    T = len(video.noface)
    columns = Columns(T)
    sheet = Image.new("RGB", (WIDTH, 1000), "white")
    gaps = columns.mean(video.noface)                                      # (n,) share without a face
    paper = inked(np.full((columns.n, 3), 255.0), gaps, GREY)              # (n, 3)
    y = draw_title(sheet, 8, video, smooth)
    y = draw_faces(sheet, y, faces, T, first=1) if faces else y
    y = draw_gaps(sheet, y, gaps)
    notes = [(GREY, "no readable face image: the face before it counts")] if gaps.any() else []
    if video.noface.all():
        notes = [(GREY, "no readable face image: nothing is predicted")]
    else:
        for name in [name for name in VA.outputs if name in video.values]:
            y = draw_value(sheet, y, name, columns, video.values[name], paper)
        if (video.classes >= 0).any():
            y = draw_expressions(sheet, y, columns, video.classes, paper)
        if AU.outputs[0] in video.values:
            y = draw_units(sheet, y, columns, video.values, paper)
            notes.append((PREDICTION, "action unit: the darker, the more probable"))
        if columns.n < T:
            notes.append((PALE, f"a column of pixels shows {T / columns.n:.3g} frames: mean, least and "
                                "largest"))
    y = frame_axis(sheet, y + 2, T, first=1)
    y = seconds_axis(sheet, y, T, fps) if fps else y
    y = legend(sheet, y, notes) if notes else y
    return sheet.crop((0, 0, WIDTH, y + 4))                                # it was higher than needed


def inked(paper, share, colour):
    """Paper, coloured as far as a share of 0 to 1 says. paper: (n, 3), share: (n,) -> (n, 3)"""
    return paper + share[:, None] * (np.array(colour) - paper)


def strip(sheet, y, height: int, colours):
    """A band of float colours (n, 3) with a line around it."""
    band(sheet, y, height, colours.round().astype(np.uint8))
    ImageDraw.Draw(sheet).rectangle((LEFT, y, RIGHT, y + height), outline=GREY)


def draw_title(sheet, y, video: Predicted, smooth: int):
    """The video's name, how many frames it has, and what was done with them."""
    pen = ImageDraw.Draw(sheet)
    name = video.name.encode("unicode_escape").decode()                    # the font has no more than ASCII
    while pen.textlength(name, font(17)) > WIDTH - 20:
        name = f"{name[:9 * len(name) // 10]}..."
    text = f"frames: {len(video.noface):,}; without a readable face image: {video.noface.sum():,}"
    if smooth:
        text += f"; values: mean over {smooth} frames before and after each one"
    pen.text((6, y), name, INK, font(17), anchor="la")
    pen.text((6, y + 24), text, INK, font(13), anchor="la")
    return y + 50


def draw_gaps(sheet, y, gaps):
    """A strip that is dark where there is no face. gaps: (n,) share of a column's frames"""
    row_title(sheet, y + 5, "no face")
    strip(sheet, y, 10, inked(np.full((len(gaps), 3), 255.0), gaps, DARK))
    return y + 24


def draw_value(sheet, y, name: str, columns: Columns, values, paper):
    """Valence or arousal as a curve. values: (T,)"""
    height = 100
    box, low, high = (LEFT, y, RIGHT, y + height), VA.lowest, VA.highest
    row_title(sheet, y + height / 2, name)
    strip(sheet, y, height, paper)
    axes(sheet, box, low, high)
    xs = x_of(np.arange(columns.n), columns.n)
    if columns.n < columns.T:
        pen = ImageDraw.Draw(sheet)
        ends = np.stack([columns.least(values), columns.largest(values)])
        for x, (bottom, top) in zip(xs, y_of(ends, box, low, high).T):     # (2, n) -> (n, 2)
            pen.line((x, bottom, x, top), PALE)
    curve(sheet, box, xs, columns.mean(values), low, high, PREDICTION)
    return y + height + 18


def draw_expressions(sheet, y, columns: Columns, classes, paper):
    """A strip for each expression, coloured where it is the most probable. classes: (T,)"""
    row_title(sheet, y + 4 * ROW, "expression")
    pen = ImageDraw.Draw(sheet)
    for k, name in enumerate(EXPR.outputs):
        pen.text((LEFT - 6, y + ROW / 2), name, INK, font(11), anchor="rm")
        strip(sheet, y, ROW, inked(paper, columns.mean(classes == k), CLASS_COLOURS[k]))
        y += ROW
    return y + 18


def draw_units(sheet, y, columns: Columns, values: dict, paper):
    """A strip for each action unit, the darker, the more probable. values: {name: (T,)}"""
    row_title(sheet, y + 6 * ROW, "action units")
    pen = ImageDraw.Draw(sheet)
    for name in AU.outputs:
        pen.text((LEFT - 6, y + ROW / 2), name, INK, font(11), anchor="rm")
        strip(sheet, y, ROW, inked(paper, columns.mean(values[name]), PREDICTION))
        y += ROW
    return y + 12


def seconds_axis(sheet, y, T: int, fps: float):
    """Seconds since the first frame, at round distances."""
    last = (T - 1) / fps
    step = round_step(T / fps, 0.001)
    marks = [(i * step * fps, f"{i * step:.10g}") for i in range(int(last / step + 1e-6) + 1)]
    return axis(sheet, y, "seconds", marks, T)


def nearest_faces(noface) -> np.ndarray:
    """Frames, counted from 0, whose faces are shown: as many as there is room for, evenly spread, or those
    next to that. noface: (T,) -> sorted, no more than 11"""
    T, room = len(noface), (RIGHT - LEFT) // (FACE + 4)
    wanted = (np.arange(room) + 0.5) / room * T - 0.5
    there = np.flatnonzero(~noface)                                        # (F,)
    if not len(there):
        return there
    return np.unique(there[np.abs(there[:, None] - wanted).argmin(axis=0)])


# ---- The pictures of a table

def read_faces(folder, noface) -> list:
    """The faces to show, as `draw` wants them. folder: of the video's frames"""
    frames = VideoFrames(folder, FACE)
    places = np.flatnonzero(np.isin(frames.numbers, nearest_faces(noface) + 1))
    images, rows, _ = frames.collate([frames[i] for i in places])         # (B, 80, 80, 3), (B,)
    return list(zip(rows.tolist(), images.numpy()))


def changed(table: Table, found: str) -> ValueError:
    """What to say of a table that is not as it was written."""
    return ValueError(f"{table.path}: {found}; the table was changed after it was made: put a copy back, or "
                      f"delete it and {table.record} to make it again, or leave out --picture")


def read_video(table: Table, rows, name: str, T: int) -> Predicted:
    """The next T of the table's rows. Raises ValueError if they are not those of the video."""
    names = [name for task in TASKS.values() for name in task.outputs if name in table.header]
    places = [table.header.index(column) for column in names]
    expression = table.header.index("expression") if "expression" in table.header else None
    noface, values, classes = np.ones(T, bool), np.full((T, len(names)), np.nan, np.float32), np.full(T, -1)
    for t in range(T):
        row = next(rows, None)
        try:
            if row[0] != name or int(row[1]) != t + 1:
                raise ValueError
            noface[t] = int(row[3]) == 0
            values[t] = [np.nan if row[i] in ("", None) else float(row[i]) for i in places]
            if expression is not None and row[expression]:
                classes[t] = EXPR.outputs.index(row[expression])
        except (ValueError, TypeError, IndexError):
            found = "no more rows" if row is None else row[:4]
            raise changed(table, f"expected frame {t + 1} of {name!r}, found {found}") from None
    if np.isnan(values).any() and not noface.all():
        raise changed(table, f"values of {name!r} are missing")
    return Predicted(name, noface, dict(zip(names, values.T)), classes)


def made_of(path) -> str | None:
    """Which table a picture belongs to; None if there is no picture."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(MADE_OF)
    except (OSError, SyntaxError, ValueError):
        return None


def draw_missing(table: Table, videos, options, team):
    """The pictures that are not there yet, or that belong to another table, shared out over the processes.

    videos: with `names`, `folders` (of their frames) and `sizes` (frames), in the order of the table.
    options: with `fps` and `smooth`. Raises ValueError if the table was changed.
    """
    folder = Path(f"{table.path}.pictures")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a folder for the pictures; move the file away")
    paths = [folder / f"{name}.png" for name in videos.names]
    mark = f"{zlib.crc32(json.dumps(without_paths(table.made_of), sort_keys=True).encode()):08x}"
    left = []
    if team.rank == 0:
        for leftover in folder.rglob(".*.tmp"):                            # half-written by a killed run
            leftover.unlink()
        left = [number for number, path in enumerate(paths) if made_of(path) != mark]
    left = team.agree(left)
    if not left:
        return team.say(f"{folder} has a picture of each video")
    team.say(f"drawing {len(left):,} of {len(paths):,} pictures, {folder}/<video>.png")
    mine, rows, info = left[team.rank::team.world], table.read(), PngInfo()
    info.add_text(MADE_OF, mark)
    progress, at = Progress(len(mine), "pictures", team), 0
    for number in mine:
        for _ in islice(rows, sum(videos.sizes[at:number])):
            pass                                                           # the rows of videos before it
        video = read_video(table, rows, videos.names[number], videos.sizes[number])
        picture = draw(video, read_faces(videos.folders[number], video.noface), options.fps, options.smooth)
        write_file(paths[number], lambda file: picture.save(file, "PNG", pnginfo=info))
        progress.add(1)
        at = number + 1
    team.wait()
    team.say(f"{folder}: the pictures are drawn")


def example(T: int = 4000) -> Image.Image:
    """Invented predictions: slow waves, expressions in blocks, a gap."""
    rng, t = np.random.default_rng(0), np.arange(T)
    classes = rng.integers(len(EXPR.outputs), size=-(-T // 150)).repeat(150)[:T]
    noface = (t > 0.6 * T) & (t < 0.7 * T)
    values = {name: 0.8 * np.sin(t / (90 + 40 * k)) + rng.normal(0, 0.1, T)
              for k, name in enumerate(VA.outputs)}
    values |= {name: (np.sin(t / (60 + 15 * k)) ** 4).clip(0, 1) for k, name in enumerate(AU.outputs)}
    return draw(Predicted("an example", noface, values, classes), [], fps=25)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The picture of invented predictions.")
    parser.add_argument("picture", type=Path, help="a .png file")
    path = parser.parse_args().picture
    try:
        write_file(path, lambda file: example().save(file, "PNG"))
    except OSError as error:
        parser.exit(2, f"error: {error}\n")
    print(path)
