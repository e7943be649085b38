"""Which crop of a picture the ViT expects: drawn with a synthetic face, since real ones may not be shown.

Aff-Wild2's frames (`cropped_aligned`) are 112 x 112 pixels, RGB, cut out around the face and turned so that
the eyes are level. docs/predict.md shows this picture of it:

    python crop_picture.py docs/crop.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from labels import AUS
from pictures import INK, LABEL, PREDICTION, font, save
from synthetic_face import LOW, SIDE, State, eyes, head, nose_and_mouth, oval, person

SCENE = (430, 348)                       # pixels of the photograph
HEAD, SCALE, TILT = (245, 150), 0.85, 0.3      # the face's middle in it, its size, its turn in radians
ZOOM, SMOOTH = 4, 3                      # the photograph and the crops are drawn so much larger, then reduced
SIDES = 0.82                             # of the right crop: 1 / 1.22, a face's scale in the synthetic videos
SHOWN = 150                              # pixels of a crop on the sheet


def photograph() -> Image.Image:
    """A person in a room, whose head is tilted. ZOOM times SCENE pixels."""
    width, height = ZOOM * SCENE[0], ZOOM * SCENE[1]
    image = Image.new("RGB", (width, height), (196, 204, 200))
    pencil = ImageDraw.Draw(image)

    def box(left, top, right, bottom, colour):
        pencil.rectangle([ZOOM * edge for edge in (left, top, right, bottom)], colour)

    box(0, 280, 430, 348, (150, 120, 96))                                  # floor
    box(24, 24, 130, 170, (236, 236, 230))                                 # window: frame, panes, bar
    box(32, 32, 122, 162, (150, 190, 220))
    box(74, 32, 80, 162, (236, 236, 230))
    box(330, 70, 420, 78, (120, 90, 66))                                   # shelf, with books
    books = ((338, (160, 70, 60)), (350, (70, 110, 90)), (362, (220, 190, 110)), (386, (90, 90, 140)))
    for left, colour in books:
        box(left, 30, left + 10, 69, colour)
    x, y = HEAD
    body = np.concatenate([oval(x, y + 150, 92, 82)[14:], [(x + 92, 348), (x - 92, 348)]])
    pencil.polygon((ZOOM * body).ravel().tolist(), (70, 86, 120))
    p, state = person(np.random.default_rng(6)), State(np.zeros(len(AUS)))
    for points, colour, line in [*head(p, state.au), *eyes(p, state), *nose_and_mouth(p, state)]:
        flat = (ZOOM * in_scene(points)).ravel().tolist()                  # (n, 2) -> x0, y0, x1, y1, ...
        if line:
            pencil.line(flat, colour, round(line * ZOOM * SCALE / 2))      # widths are of twice the size
        else:
            pencil.polygon(flat, colour)
    return image


def in_scene(points):
    """Points of the face (pixels of a frame, from between its cheekbones) in the photograph. Shape: (n, 2)"""
    c, s = SCALE * np.cos(TILT), SCALE * np.sin(TILT)
    return np.asarray(points) @ np.array([(c, s), (-s, c)]) + HEAD


def corners(side: float = 1.0, turn: float = 0.0):
    """A square crop's corners in the photograph, from its upper left one against the clock. Shape: (4, 2)

    side: as a share of the right one. turn: radians by which it is turned away from the eyes' line."""
    half = SIDE / 2 * SIDES * side
    square = np.array([(-half, -half), (-half, half), (half, half), (half, -half)])
    c, s = np.cos(turn), np.sin(turn)
    return in_scene(square @ np.array([(c, s), (-s, c)]) + (0, LOW))


def cut(scene: Image.Image, square) -> Image.Image:
    """What lies in a square of the photograph, SMOOTH times as large as it is shown."""
    quad = (ZOOM * square).ravel().tolist()
    return scene.transform((SMOOTH * SHOWN, SMOOTH * SHOWN), Image.QUAD, quad, Image.BICUBIC)


def right_one(scene: Image.Image) -> Image.Image:
    """The crop as it should be, framed and ticked."""
    crop, last = cut(scene, corners()), SMOOTH * SHOWN - 1
    pen = ImageDraw.Draw(crop)
    pen.rectangle((0, 0, last, last), outline=PREDICTION, width=3 * SMOOTH)
    tick = np.array([(SHOWN - 36, SHOWN - 21), (SHOWN - 27, SHOWN - 12), (SHOWN - 11, SHOWN - 34)]) * SMOOTH
    pen.line(tick.ravel().tolist(), PREDICTION, 6 * SMOOTH, joint="curve")
    return crop.reduce(SMOOTH)


def wrong_one(scene: Image.Image, square) -> Image.Image:
    """A crop as it should not be, crossed out."""
    crop, last = cut(scene, square), SMOOTH * SHOWN - 1
    pen = ImageDraw.Draw(crop)
    pen.line((0, 0, last, last), LABEL, 3 * SMOOTH)
    pen.line((0, last, last, 0), LABEL, 3 * SMOOTH)
    return crop.reduce(SMOOTH)


def sheet() -> Image.Image:
    """The photograph with the right crop's outline, that crop, and three wrong ones."""
    scene = photograph()
    lines = [ZOOM * corner for corner in corners()]
    outlined = scene.copy()
    pen = ImageDraw.Draw(outlined)
    for start, end in zip(lines, lines[1:] + lines[:1]):
        pen.line((*start, *end), PREDICTION, 3 * ZOOM)

    left, step, second = SCENE[0] + 40, SHOWN + 24, SHOWN + 82             # of the crops; y of the second row
    picture = Image.new("RGB", (left + 3 * step - 14, second + SHOWN + 34), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((10, 8), "a frame of a video, or a photograph", INK, font(15))
    picture.paste(outlined.reduce(ZOOM), (10, 34))
    pen.text((left, 8), "right", INK, font(15))
    picture.paste(right_one(scene), (left, 34))
    words = ("the whole face, from above the", "brows to the chin; the eyes level;", "little background", "",
             "RGB, in Aff-Wild2 112 x 112;", "any other size is resized")
    for i, line in enumerate(words):
        pen.text((left + step, 40 + 22 * i), line, INK, font(15))

    pen.text((left, second - 26), "wrong", INK, font(15))
    wrong = {"too much around it": corners(2.1), "the eyes not level": corners(turn=-TILT),
             "a part of the face": corners(0.6)}
    for i, (text, square) in enumerate(wrong.items()):
        picture.paste(wrong_one(scene, square), (left + i * step, second))
        pen.text((left + i * step + SHOWN / 2, second + SHOWN + 6), text, INK, font(13), anchor="ma")
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The crop that the ViT expects.")
    parser.add_argument("picture", type=Path, help="a .png file")
    path = parser.parse_args().picture
    try:
        save(sheet(), path)
    except OSError as error:
        parser.exit(2, f"error: {error}\n")
    print(path)
