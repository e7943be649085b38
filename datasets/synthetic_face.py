"""One drawn face, made of about fifty polygons.

It stands in for real faces, none of which may be redistributed. A `Person` is what stays the same from frame
to frame, a `State` is what one frame shows: 12 action units, pose, light, cover, blur. An action unit moves
what it moves in a real face: AU1 lifts the inner brow, AU12 pulls the corners of the lips. Coordinates are
those of a frame of 112 x 112, as in cropped_aligned, the origin between the cheekbones, x to the right, y
down. Each part of a face is a list of shapes from back to front: (points (n, 2), colour, line width or 0 to
fill), or something false, such as None, where a shape is not seen. `au[12]` is AU12.
"""

from collections import namedtuple
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from labels import AUS

SIDE, PIXELS = 112, 80         # of a frame: in coordinates, and as drawn, enough for the demo's small ViT
HAIR = ((24, 20, 18), (58, 38, 26), (106, 70, 40), (196, 160, 96), (140, 60, 32), (150, 148, 146))
IRIS = ((60, 38, 22), (40, 28, 20), (70, 100, 130), (74, 104, 70), (96, 92, 84))
LIPS = ((178, 60, 70), (130, 50, 50), (200, 110, 110))
SHADE, FRAME = (20, 0, 0), (30, 26, 28)                          # of the skin; of glasses
FRINGES = ((0, 0), (-38, 0), (-31, 0), (-36, 14), (-37, 6))      # style of hair -> y, and x of the parting
# Mean and deviation over people. Widths are halves. With a jaw of 1 the head is an oval, with less it is
# squarer. A brow is high above the eye, and tilts up to its outer end; a positive corner hangs down. At rest,
# lids and corners differ by up to half of what an expression moves them: a frame does not tell one from the
# other.
LENGTHS = {"width": (37, 1.1), "chin": (46, 1.3), "jaw": (0.88, 0.04),
           "brow": (11.5, 0.8), "brow_tilt": (0.5, 0.7), "brow_thick": (3.4, 0.4),
           "eye_apart": (17, 0.5), "eye_wide": (9, 0.4), "eye_open": (4.6, 0.9),
           "nose_wide": (6.5, 0.6), "nose_long": (10, 0.8), "mouth": (14.5, 0.9), "lip": (3.4, 0.4),
           "corner": (0.2, 2.5)}
# What stays the same: colours (red, green, blue), 0-255; the style of the hair (0 bald, 1 short, 2 fringe,
# 3 parted, 4 long); a beard from 0 to 1; a moustache or not, glasses or not; LENGTHS.
Person = namedtuple("Person", ["skin", "hair", "iris", "lips", "style", "beard", "moustache", "glasses",
                               *LENGTHS])
# What one frame shows besides its action units, and what it is if nobody says otherwise.
PLAIN = {
    "mood": (0.0, 0.0),        # valence in [-1, 1] lifts or drops the corners of the lips, without folds;
                               # arousal in [-1, 1] makes wide or sleepy eyes
    "blink": 0.0,              # 1 is closed
    "yaw": 0.0,                # pixels by which the nose moves to the side
    "roll": 0.0,               # radians
    "scale": 1.0,
    "shift": (0.0, 0.0),       # pixels
    "place": 0,                # which background
    "brightness": 1.0,
    "contrast": 1.0,
    "cast": (1.0, 1.0, 1.0),   # colour of the light
    "slope": (0.0, 0.0),       # grey levels from the centre to the right, and to the lower, border
    "cover": None,             # an occlusion: ((n, 2) points, colour)
    "blur": (0.0, 0.0),        # deviation along x and y, pixels
    "noise": 3.0}              # deviation of the sensor's noise, grey levels
State = namedtuple("State", ["au", *PLAIN], defaults=PLAIN.values())    # au: (12,) in [0, 1], as in AUS

ANGLES, TIMES = np.linspace(0, 2 * np.pi, 28, endpoint=False), np.linspace(0, 1, 9)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)           # (28, 2); the second half has y < 0
# (9, 3): weights of three points, for points of the parabola through them that is at the second half-way.
PARABOLA = np.stack([(1 - TIMES) * (1 - 2 * TIMES), 4 * TIMES * (1 - TIMES), TIMES * (2 * TIMES - 1)], 1)
GRAIN = np.random.default_rng(1).standard_normal((256, 256, 3), np.float32)    # noise; a frame takes a window


def mix(a, b, share):
    """Colour a with a share of colour b."""
    return tuple(int(x + (y - x) * share) for x, y in zip(a, b))


def person(rng) -> Person:
    """A random person."""
    tone, man = rng.random(), rng.random() < 0.5
    skin = mix(np.array((96, 62, 45)) + rng.uniform(-8, 8, 3), (246, 212, 188), tone)
    return Person(
        skin, hair=HAIR[rng.integers(len(HAIR))], iris=IRIS[rng.integers(len(IRIS))],
        lips=mix(skin, LIPS[rng.integers(len(LIPS))], rng.uniform(0.4, 0.9)), style=int(rng.integers(5)),
        beard=rng.uniform(0.4, 0.9) if man and rng.random() < 0.25 else 0.0,
        moustache=man and rng.random() < 0.25, glasses=rng.random() < 0.1,
        **{name: float(mean + deviation * np.clip(rng.standard_normal(), -2, 2))
           for name, (mean, deviation) in LENGTHS.items()})


def oval(x, y, rx, ry):
    """An ellipse around (x, y): (28, 2)."""
    return CIRCLE * (rx, ry) + (x, y)


def bend(a, b, c):
    """A parabola from a to c that passes through b half-way: (9, 2)."""
    return PARABOLA @ np.array((a, b, c), float)


def between(upper, lower):
    """The area between two curves that both run the same way."""
    return np.concatenate([upper, lower[::-1]])


def fold(p: Person, strength, curve, darkness, width):
    """A fold of the skin: not seen up to a strength of 0.1, as dark as `darkness` at 1."""
    return strength > 0.1 and (curve, mix(p.skin, mix(p.skin, SHADE, 0.6), darkness * strength), width)


def mirrored(*shapes) -> list:
    """Shapes of the right half of the face, on both halves."""
    return [(points * (side, 1), colour, width)
            for side in (-1, 1) for points, colour, width in filter(None, shapes)]


def head(p: Person, au: dict) -> list:
    """Hair, neck, ears, head, forehead."""
    x, y = CIRCLE.T
    y = np.where(y < 0, 46, p.chin + 9 * au[26]) * y             # AU26 lengthens the lower face
    outline = np.stack([p.width * np.sign(x) * np.abs(x) ** p.jaw, y], 1)
    cheeks = [(-0.72 * p.width, 8), (-17, 19), (0, 15), (17, 19), (0.72 * p.width, 8)]
    forehead = [bend((-8 - 12 * au[2], y + 1), (0, y - 3 * au[1]), (8 + 12 * au[2], y + 1))
                for y in (-31, -36)]
    fringe, part = FRINGES[p.style]
    crown = CIRCLE[14:] * (p.width + 2, 50)                      # from the left over the top to the right
    hairline = bend((p.width - 8, fringe + 5), (part, fringe - 4), (8 - p.width, fringe + 5))
    temple = np.array([(p.width - 1, -13), (p.width - 5, -22)])  # the other is run through backwards
    return [
        p.style == 4 and (oval(0, 4, p.width + 7, 60), p.hair, 0),
        (np.array([(-20, 30), (20, 30), (24, 80), (-24, 80)]), mix(p.skin, SHADE, 0.25), 0),
        *mirrored((oval(p.width, -4, 4.5, 8), mix(p.skin, (120, 20, 20), 0.15), 0)),
        (outline, p.skin, 0),
        p.beard and (np.concatenate([outline[y > 4], cheeks]), mix(p.skin, p.hair, p.beard), 0),
        # Raised brows fold the forehead, lowered ones the bridge of the nose.
        *(fold(p, max(au[1], au[2]), curve, 0.7, 3) for curve in forehead),
        *mirrored(fold(p, au[4], bend((2.5, -22), (3.5, -17), (2, -11)), 1, 4)),
        p.style and (np.concatenate([crown, temple, hairline, temple[::-1] * (-1, 1)]), p.hair, 0)]


def eyes(p: Person, au: dict, arousal: float, blink: float) -> list:
    """Eyes, lids, cheeks and brows, computed for the right half of the face."""
    x, y, b = p.eye_apart, -12.0, -12.0 - p.brow
    wide = p.eye_open * (1 + 2.0 * arousal + 0.2 * au[2]) * (1 - blink)
    up = wide * (1 - 0.6 * au[7])                                # the upper lid's height, and
    low = wide * 0.75 * (1 - 0.45 * au[6]) * (1 - 0.8 * au[7])   # the lower lid's depth
    inner, outer = (x - p.eye_wide, y + 0.7), (x + p.eye_wide, y - 0.3)
    upper, lower = bend(inner, (x, y - up), outer), bend(inner, (x, y + low), outer)
    above, below = [(outer[0], y - 8), (inner[0], y - 8)], [(outer[0], y + 6), (inner[0], y + 6)]
    bag = bend((x - 7, y + 5), (x, y + 9 - 2 * au[6]), (x + 8, y + 4))
    feet = [np.array([(x + 11, y + 0.5 * slope), (x + 16, y + 1.4 * slope)]) for slope in (-2, 1, 4)]
    ridge = bend((x - (9 + 4 * au[4]), b + p.brow_tilt / 2 - 7.0 * au[1] + 6.0 * au[4]),
                 (x - 1, b - 1.5 - 3.5 * au[1] - 4.5 * au[2] + 4.0 * au[4]),
                 (x + 10, b + 1 - p.brow_tilt / 2 - 7.5 * au[2] + 1.5 * au[4]))
    half = np.linspace(1, 0.45, 9)[:, None] * (0, p.brow_thick / 2)      # a brow is thicker inside
    return mirrored(
        (between(upper, lower), (236, 232, 228), 0),
        (oval(x, y - 0.4, 4.4, 4.4), p.iris, 0),
        (oval(x, y - 0.4, 2, 2), (10, 8, 8), 0),
        # The lids cover the part of the iris that lies outside the slit between them.
        (np.concatenate([upper, above]), mix(p.skin, (60, 20, 20), 0.14), 0),
        (np.concatenate([lower, below]), p.skin, 0),
        (upper, (40, 26, 22), 3),
        # AU7 tightens the lower lid. AU6: a higher cheek, a bag, crow's feet.
        fold(p, 1, lower, 0.6 + 0.4 * au[7], 2),
        fold(p, au[7], lower + (0, 2), 0.9, 4),
        au[6] > 0.1 and (oval(x + 2, 6 - 3 * au[6], 9, 5.5), mix(p.skin, (255, 150, 130), 0.5 * au[6]), 0),
        fold(p, au[6], bag, 0.9, 4),
        *(fold(p, au[6], foot, 0.9, 3) for foot in feet),
        (between(ridge - half, ridge + half), mix(p.hair, (30, 22, 18), 0.5), 0))


def nose_and_mouth(p: Person, au: dict, valence: float) -> list:
    """Nose, folds, moustache, lips and teeth."""
    wing, tip = p.nose_wide * (1 + 0.3 * au[10]), p.nose_long - 2 - 3 * au[10]
    rim = bend((wing + 0.3, tip - 3), (wing + 1.2, tip), (wing - 0.5, tip + 1.5))

    half = p.mouth * (1 + 0.32 * au[12] - 0.4 * au[23] - 0.1 * au[26])
    corner = 25 + p.corner - 8.0 * au[12] + 7.5 * au[15] - 10.0 * valence + 2 * au[26]
    thin = p.lip * (1 - 0.5 * au[23]) * (1 - 0.85 * au[24])
    gap = 7 * au[25] + au[26] * (2 + 8 * au[25])                 # AU26 alone hardly parts the lips
    parted, pressed = gap > 0.6, au[24]
    top = 25 - 0.25 * gap - 4.5 * au[10] - 0.6 * au[12] + 2 * au[26]     # the upper lip's lower edge, and
    bottom = 25 + 0.75 * gap + 1.5 * au[12] + 2 * au[26]         # the lower lip's upper edge
    # Five curves from corner to corner: of the moustache, and four that bound the two lips.
    hairs, above, upper, lower, below = (bend((-half, corner), (0, y), (half, corner)) for y in (
        top - thin - 4.5, top - thin, top, bottom, bottom + 1.2 * thin))
    teeth = upper * (0.85, 1)

    # The nasolabial fold runs from the nose around the mouth. Pressed lips (AU24) bunch the chin.
    knee = (0.75 * half + 3, 16 - 3 * au[10])
    around = bend((wing + 2, tip - 2 - 2 * au[10]), knee, (half + 4, corner + 1))
    dimple = bend((half + 1.5, corner - 2.5), (half + 3, corner), (half + 1.5, corner + 2.5))
    hook = bend((half + 0.5, corner), (half + 2.5, corner + 3), (half + 1.5, corner + 7))
    tight = np.array([(half + 2, 20), (half + 3.5, 30)])
    bulge = bend((2, bottom + 8), (7, bottom + 5), (11, bottom + 8))
    ball = p.chin - 8 + 9 * au[26]
    return [
        fold(p, 1, bend((-2.5, -12), (-3.5, tip - 8), (-wing, tip)), 0.3, 2),
        (oval(0, tip - 1.5, 0.55 * wing, 3), mix(p.skin, (255, 240, 225), 0.16), 0),
        *mirrored((oval(0.55 * wing, tip + 1.5, 1.9, 1.2), mix(p.skin, (10, 0, 0), 0.7), 0),
                  fold(p, 1, rim, 0.4, 2)),
        *mirrored(fold(p, max(au[10], 0.8 * au[12]), around, 0.95, 4), fold(p, au[12], dimple, 1, 3),
                  fold(p, au[15], hook, 1, 4), fold(p, au[23], tight, 0.9, 4),
                  fold(p, pressed, bulge, 0.9, 5)),
        p.moustache and (between(hairs, above), mix(p.hair, p.skin, 0.2), 0),
        (between(above, upper), mix(p.lips, (40, 0, 0), 0.15), 0),
        (between(lower, below), p.lips, 0),
        parted and (between(upper, lower), (48, 14, 16), 0),
        parted and (between(teeth, teeth + (0, min(0.45 * gap, 3))), (232, 226, 214), 0),
        not parted and (upper, mix(p.lips, SHADE, 0.4 + 0.6 * pressed), 3 + round(2 * pressed)),
        fold(p, 1, bend((-6, ball + 1), (0, ball), (6, ball + 1)), 0.2, 2)]


@lru_cache(maxsize=64)
def background(place: int) -> Image.Image:
    """A wall, a gradient, or coloured blobs: 160 x 160."""
    rng, side = np.random.default_rng([place]), 2 * PIXELS
    a, b = rng.integers(70, 180, (2, 3))
    ramp = np.linspace(0, 1, side)[:, None, None] * (rng.random() < 0.7)
    image = Image.fromarray(np.broadcast_to(a + (b - a) * ramp, (side, side, 3)).astype(np.uint8))
    for x, y, radius in rng.integers(0, side, (rng.integers(0, 9), 3)).tolist():
        colour, r = tuple(rng.integers(70, 180, 3).tolist()), radius / 3
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return image


def draw_face(p: Person, state: State, rng) -> Image.Image:
    """One frame: RGB, 80 x 80. `rng` places the sensor's noise, nothing else."""
    zoom = 2 * PIXELS / SIDE                                     # drawn at twice the size, then halved
    au, (valence, arousal) = dict(zip(AUS, state.au)), state.mood
    rim = oval(p.eye_apart, -11, 11.5, 9)
    shapes = [shape for shape in (
        *head(p, au), *eyes(p, au, arousal, state.blink), *nose_and_mouth(p, au, valence),
        *mirrored(p.glasses and (np.concatenate([rim, rim[:1]]), FRAME, 3)),
        p.glasses and (np.array([(-6.0, -12), (6, -12)]), FRAME, 3),
        state.cover and (*state.cover, 0)) if shape]

    # Pose, for all points at once. Yaw moves the middle of the face but not its outline, as on a ball.
    xy = np.concatenate([points for points, _, _ in shapes])     # (points, 2)
    xy[:, 0] += state.yaw * (1 - (xy[:, 0] / 46) ** 2 - (xy[:, 1] / 64) ** 2).clip(0, 1)
    xy[:, 1] -= 3.0                                              # the crop's centre is below the cheekbones
    c, s = np.cos(state.roll) * state.scale, np.sin(state.roll) * state.scale
    xy = zoom * (xy @ np.array([(c, s), (-s, c)]) + np.add(state.shift, SIDE / 2))
    ends = np.cumsum([len(points) for points, _, _ in shapes])

    image = background(state.place).copy()
    pencil = ImageDraw.Draw(image)
    for (_, colour, width), points in zip(shapes, np.split(xy, ends[:-1])):
        flat = points.ravel().tolist()                           # (n, 2) -> x0, y0, x1, y1, ...
        if width:
            pencil.line(flat, colour, round(zoom / 2 * width))
        else:
            pencil.polygon(flat, colour)
    image = image.reduce(2)                                      # (160, 160) -> (80, 80), edges smooth
    if any(state.blur):
        image = image.filter(ImageFilter.GaussianBlur([zoom / 2 * deviation for deviation in state.blur]))

    # Light, then the sensor.
    gain = np.array(state.cast, np.float32) * np.float32(state.contrast * state.brightness)  # (3,)
    grey = np.float32(128 * (1 - state.contrast))                # less contrast: nearer to middle grey
    right, down = np.float32(state.slope)[:, None] * np.linspace(-1, 1, PIXELS, dtype=np.float32)   # (80,)
    i, j = rng.integers(0, 256 - PIXELS, 2)
    pixels = np.asarray(image, np.float32) * gain + grey
    pixels += (right + down[:, None])[:, :, None]                # (80, 80, 1) -> (80, 80, 3)
    pixels += np.float32(state.noise) * GRAIN[i:i + PIXELS, j:j + PIXELS]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
