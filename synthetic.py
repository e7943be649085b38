"""Drawn faces in the layouts of the real data sets, so that every stage runs, and has something to learn, with no real data.

A face is a person (what stays), a state (what moves: 12 action units, pose, light, cover, blur) and some fifty polygons.
A video is one person acting out expressions built from action units as in EMFACS, with the faults of real recordings: blur,
hands, missing faces, frames nobody annotated, annotators who react late. One frame is often not enough to tell; a second is.
Reading order: constants, Person, State, draw_face and its parts, the acting, the files.

    python synthetic.py --sheet faces.png        # a contact sheet: expressions, single action units, spoiled frames
    python synthetic.py --out data/demo          # all data sets, in about half a minute on one core
"""

import argparse
import csv
import dataclasses
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

AUS = (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26)      # the order of the label files, and of State.au
EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
SIDE = 112                     # pixels of a frame, as in cropped_aligned

# How hard the videos are. Times are in frames, at about 30 a second.
PERSON_SPREAD = 0.6            # how far neutral faces lie apart: at 1, one's resting brow is another's half-raised one
JITTER = 0.2                   # deviation of what a single frame shows of an action unit, around its true intensity
OCCLUSION_SHARE = 0.15         # frames with a hand, a scarf or a strand of hair over part of the face
BLUR_SHARE = 0.15              # frames blurred by motion or focus
FLICKER = 0.08                 # deviation of a single frame's brightness
SHAKE = 0.7                    # pixels by which the alignment of neighbouring frames differs
TWITCHES = 1.2                 # single action units per 100 frames that belong to no expression
AU_THRESHOLD = 0.35            # intensity from which an annotator marks an action unit
EXPR_THRESHOLD = 0.35          # the same for the envelope of an expression
LABEL_LAG = (8, 15)            # an annotator with a joystick follows the face this late
MOOD_SPREAD = 0.25             # deviation of a slow valence and arousal that no expression explains
VA_NOISE = 0.06                # deviation of the smooth error of a valence or arousal annotation

# Action units of each expression (EMFACS), variants side by side; then where it lies in (valence, arousal).
PROTOTYPES = {
    "Neutral": [{}],
    "Anger": [{4: 1, 7: .8, 23: .9}, {4: 1, 7: .7, 24: .9}, {4: .9, 7: .7, 10: .5, 23: .7, 25: .6}],
    "Disgust": [{4: .6, 10: 1, 15: .6}, {7: .7, 10: 1, 25: .5}, {4: .5, 10: .9, 15: .8}],
    "Fear": [{1: 1, 2: .6, 4: .7, 25: .7}, {1: .9, 2: .5, 4: .8, 7: .5, 25: .7, 26: .5}],
    "Happiness": [{6: .8, 12: 1}, {6: .9, 12: 1, 25: .8}, {6: .5, 12: .8, 25: .6, 26: .5}],
    "Sadness": [{1: .9, 4: .6, 15: .9}, {1: .8, 4: .5, 15: .8, 24: .5}],
    "Surprise": [{1: .9, 2: .9, 25: .8, 26: .9}, {1: .8, 2: 1, 25: .7, 26: .5}],
    "Other": [{1: .6, 24: .9}, {4: .8, 12: .8}, {10: .8, 25: .6, 26: .7}, {2: .9, 23: .9}, {7: .9, 26: .6}],
}
CIRCUMPLEX = {"Neutral": (0, 0), "Anger": (-.6, .65), "Disgust": (-.65, .3), "Fear": (-.45, .75), "Happiness": (.75, .35),
              "Sadness": (-.7, -.4), "Surprise": (.2, .8), "Other": (.05, .15)}
EPISODES = ("Other", "Happiness", "Fear", "Sadness", "Other", "Anger", "Surprise", "Disgust", "Other", "Happiness", "Fear",
            "Anger", "Sadness", "Surprise", "Disgust")     # dealt round and round, so that no class runs short in a split


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""
    train_videos: int = 28
    val_videos: int = 14
    frames: int = 400          # typical length of a video; the lengths differ
    faces: int = 4000          # still faces, over AffectNet 2017, AffectNet 2021, RAF-DB and FER2013 together
    seed: int = 0


# ---- A face. Coordinates: pixels of a 112-pixel frame, the origin between the cheekbones, x to the right, y down.

@dataclass(frozen=True)
class Person:
    """What stays the same from frame to frame. Lengths are pixels; a colour is (red, green, blue), 0-255."""
    skin: tuple
    hair: tuple
    iris: tuple
    lips: tuple
    style: int                 # of the hair: 0 bald, 1 short, 2 fringe, 3 parted, 4 long
    beard: float               # 0 none, 1 full
    moustache: bool
    glasses: bool
    width: float               # half of the head
    chin: float
    jaw: float                 # 1 is an oval, less is squarer
    brow: float                # height above the eye
    brow_tilt: float           # the outer end's height over the inner end's
    brow_thick: float
    eye_apart: float           # from the middle of the face to the middle of an eye
    eye_wide: float            # half of an eye
    eye_open: float            # the upper lid's height
    nose_wide: float           # half of the nose
    nose_long: float
    mouth: float               # half of the mouth
    lip: float                 # thickness of one lip
    corner: float              # where the lip corners rest: positive hangs down


def person(rng) -> Person:
    """Draw a person by lot. Neutral faces differ by as much as a weak action unit moves them."""
    def about(mean, deviation):
        return float(mean + PERSON_SPREAD * deviation * np.clip(rng.standard_normal(), -2, 2))

    tone, man = rng.random(), rng.random() < 0.5
    skin = mix(np.array((96, 62, 45)) + rng.uniform(-8, 8, 3), (246, 212, 188), tone)
    hair = [(24, 20, 18), (58, 38, 26), (106, 70, 40), (196, 160, 96), (140, 60, 32), (150, 148, 146)][rng.integers(6)]
    iris = [(60, 38, 22), (40, 28, 20), (70, 100, 130), (74, 104, 70), (96, 92, 84)][rng.integers(5)]
    lips = mix(skin, [(178, 60, 70), (130, 50, 50), (200, 110, 110)][rng.integers(3)], rng.uniform(0.4, 0.9))
    return Person(
        skin, hair, iris, lips, style=int(rng.integers(5)),
        beard=rng.uniform(0.4, 0.9) if man and rng.random() < 0.35 else 0.0, moustache=bool(man and rng.random() < 0.25),
        glasses=bool(rng.random() < 0.2), width=about(37, 1.8), chin=about(46, 2.2), jaw=about(0.88, 0.07),
        brow=about(11.5, 1.3), brow_tilt=about(0.5, 1.2), brow_thick=about(3.4, 0.6), eye_apart=about(17, 0.8),
        eye_wide=about(9, 0.7), eye_open=about(4.6, 0.5), nose_wide=about(6.5, 1), nose_long=about(10, 1.3),
        mouth=about(14.5, 1.5), lip=about(3.4, 0.7), corner=about(0.2, 1.1))


@dataclass
class State:
    """What one frame shows."""
    au: np.ndarray             # (12,) intensities in [0, 1], in the order of AUS
    valence: float = 0.0       # mood in [-1, 1]: lifts or drops the corners of the lips, without the folds of AU12 and AU15
    arousal: float = 0.0       # mood in [-1, 1]: wide or sleepy eyes
    blink: float = 0.0         # 1 is closed
    yaw: float = 0.0           # pixels by which the nose moves to the side
    roll: float = 0.0          # radians
    scale: float = 1.0
    shift: tuple = (0.0, 0.0)  # pixels
    place: int = 0             # which background
    brightness: float = 1.0
    contrast: float = 1.0
    cast: tuple = (1.0, 1.0, 1.0)   # colour of the light
    slope: tuple = (0.0, 0.0)  # grey levels by which the right, and the lower, border is brighter than the centre
    cover: tuple | None = None # an occlusion: ((n, 2) points, colour)
    blur: tuple = (0.0, 0.0)   # deviation along x and y, pixels
    noise: float = 3.0         # deviation of the sensor's noise, grey levels


ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)                       # (28, 2); the second half lies above, y < 0
TIMES = np.linspace(0, 1, 9)
BEZIER = np.stack([(1 - TIMES) ** 2, 2 * TIMES * (1 - TIMES), TIMES ** 2], 1)   # (9, 3) weights of three control points


def mix(a, b, share):
    """Colour a with a share of colour b."""
    return tuple(int(x + (y - x) * share) for x, y in zip(a, b))


def oval(x, y, rx, ry):
    """An ellipse around (x, y): (28, 2)."""
    return CIRCLE * (rx, ry) + (x, y)


def bend(a, b, c):
    """A parabola from a to c that passes through b half-way: (9, 2)."""
    a, b, c = np.array((a, b, c), float)
    return BEZIER @ np.stack([a, 2 * b - (a + c) / 2, c])


def between(upper, lower):
    """The area between two curves that both run the same way."""
    return np.concatenate([upper, lower[::-1]])


def head(p: Person, au):
    """Hair, neck, ears, head, forehead. As every part, yields (points, colour, line width or 0 to fill) from back to front."""
    a1, a2, a4, a26 = au[0], au[1], au[2], au[11]
    dark = mix(p.skin, (20, 0, 0), 0.6)
    if p.style == 4:
        yield oval(0, 4, p.width + 7, 60), p.hair, 0
    yield np.array([(-20, 30), (20, 30), (24, 80), (-24, 80)]), mix(p.skin, (20, 0, 0), 0.25), 0
    for s in (-1, 1):
        yield oval(s * p.width, -4, 4.5, 8), mix(p.skin, (120, 20, 20), 0.15), 0
    x, y = CIRCLE.T
    y = np.where(y < 0, 46, p.chin + 9 * a26) * y                            # AU26 lengthens the lower face
    outline = np.stack([p.width * np.sign(x) * np.abs(x) ** p.jaw, y], 1)
    yield outline, p.skin, 0
    if p.beard:
        edge = [(-0.72 * p.width, 8), (-17, 19), (0, 15), (17, 19), (0.72 * p.width, 8)]
        yield np.concatenate([outline[y > 4], edge]), mix(p.skin, p.hair, p.beard), 0
    if max(a1, a2) > 0.1:                                                    # raised brows fold the forehead
        for y in (-31, -36):
            yield bend((-8 - 12 * a2, y + 1), (0, y - 3 * a1), (8 + 12 * a2, y + 1)), mix(p.skin, dark, 0.7 * max(a1, a2)), 3
    if a4 > 0.1:                                                             # lowered ones the bridge of the nose
        for s in (-1, 1):
            yield bend((s * 2.5, -22), (s * 3.5, -17), (s * 2, -11)), mix(p.skin, dark, a4), 4
    if p.style:
        fringe, part = [(-38, 0), (-31, 0), (-36, 14), (-37, 6)][p.style - 1]
        crown = CIRCLE[14:] * (p.width + 2, 50)                              # from the left over the top to the right
        hairline = bend((p.width - 8, fringe + 5), (part, fringe - 4), (8 - p.width, fringe + 5))
        temple = np.array([(p.width - 1, -13), (p.width - 5, -22)])
        yield np.concatenate([crown, temple, hairline, temple[::-1] * (-1, 1)]), p.hair, 0


def eyes(p: Person, state: State):
    """Eyes, lids, cheeks and brows."""
    a1, a2, a4, a6, a7 = state.au[:5]
    dark, lid = mix(p.skin, (20, 0, 0), 0.6), mix(p.skin, (60, 20, 20), 0.14)
    wide = p.eye_open * (1 + 0.8 * state.arousal + 0.2 * a2) * (1 - state.blink)
    up, low = wide * (1 - 0.6 * a7), wide * 0.75 * (1 - 0.45 * a6) * (1 - 0.8 * a7)     # lids above and below the eye's axis
    for s in (-1, 1):
        x, y = s * p.eye_apart, -12.0
        inner, outer = (x - s * p.eye_wide, y + 0.7), (x + s * p.eye_wide, y - 0.3)
        upper, lower = bend(inner, (x, y - up), outer), bend(inner, (x, y + low), outer)
        yield between(upper, lower), (236, 232, 228), 0
        yield oval(x, y - 0.4, 4.4, 4.4), p.iris, 0
        yield oval(x, y - 0.4, 2, 2), (10, 8, 8), 0
        yield np.concatenate([upper, [(outer[0], y - 8), (inner[0], y - 8)]]), lid, 0    # lids cover what of the iris the slit
        yield np.concatenate([lower, [(outer[0], y + 6), (inner[0], y + 6)]]), p.skin, 0     # between them does not show
        yield upper, (40, 26, 22), 3
        yield lower, mix(p.skin, dark, 0.6 + 0.4 * a7), 2
        if a7 > 0.1:                                                         # AU7 tightens the lower lid
            yield lower + (0, 2), mix(p.skin, dark, 0.9 * a7), 4
        if a6 > 0.1:                                                         # AU6: a higher cheek, a bag, crow's feet
            crease = mix(p.skin, dark, 0.9 * a6)
            yield oval(x + s * 2, 6 - 3 * a6, 9, 5.5), mix(p.skin, (255, 150, 130), 0.5 * a6), 0
            yield bend((x - s * 7, y + 5), (x, y + 9 - 2 * a6), (x + s * 8, y + 4)), crease, 4
            for slope in (-2, 1, 4):
                yield np.array([(x + s * 11, y + 0.5 * slope), (x + s * 16, y + 1.4 * slope)]), crease, 3
        b = y - p.brow
        ridge = bend((x - s * (9 + 4 * a4), b + p.brow_tilt / 2 - 7.0 * a1 + 6.0 * a4),
                     (x - s, b - 1.5 - 3.5 * a1 - 4.5 * a2 + 4.0 * a4),
                     (x + s * 10, b + 1 - p.brow_tilt / 2 - 7.5 * a2 + 1.5 * a4))
        half = np.linspace(1, 0.45, 9)[:, None] * (0, p.brow_thick / 2)      # a brow is thicker inside
        yield between(ridge - half, ridge + half), mix(p.hair, (30, 22, 18), 0.5), 0


def nose_and_mouth(p: Person, state: State):
    """Nose, folds, moustache, lips and teeth."""
    a10, a12, a15, a23, a24, a25, a26 = state.au[5:]
    dark = mix(p.skin, (20, 0, 0), 0.6)
    wing, tip = p.nose_wide * (1 + 0.3 * a10), p.nose_long - 2 - 3 * a10
    yield bend((-2.5, -12), (-3.5, tip - 8), (-wing, tip)), mix(p.skin, dark, 0.3), 2
    yield oval(0, tip - 1.5, 0.55 * wing, 3), mix(p.skin, (255, 240, 225), 0.16), 0
    for s in (-1, 1):
        yield oval(s * 0.55 * wing, tip + 1.5, 1.9, 1.2), mix(p.skin, (10, 0, 0), 0.7), 0
        rim = bend((s * (wing + 0.3), tip - 3), (s * (wing + 1.2), tip), (s * (wing - 0.5), tip + 1.5))
        yield rim, mix(p.skin, dark, 0.4), 2

    half = p.mouth * (1 + 0.32 * a12 - 0.4 * a23 - 0.1 * a26)
    corner = 25 + p.corner - 8.0 * a12 + 7.5 * a15 - 4.0 * state.valence + 2 * a26
    thin = p.lip * (1 - 0.5 * a23) * (1 - 0.85 * a24)
    gap = 7 * a25 + a26 * (2 + 8 * a25)                                      # between the lips; AU26 alone opens them little
    top, bottom = 25 - 0.25 * gap - 4.5 * a10 - 0.6 * a12 + 2 * a26, 25 + 0.75 * gap + 1.5 * a12 + 2 * a26
    fold = max(a10, 0.8 * a12)
    for s in (-1, 1):
        if fold > 0.1:                                                       # nasolabial: from the nose around the mouth
            knee, foot = (s * (0.75 * half + 3), 16 - 3 * a10), (s * (half + 4), corner + 1)
            yield bend((s * (wing + 2), tip - 2 - 2 * a10), knee, foot), mix(p.skin, dark, 0.95 * fold), 4
        if a12 > 0.1:
            dimple = bend((s * (half + 1.5), corner - 2.5), (s * (half + 3), corner), (s * (half + 1.5), corner + 2.5))
            yield dimple, mix(p.skin, dark, a12), 3
        if a15 > 0.1:
            hook = bend((s * (half + 0.5), corner), (s * (half + 2.5), corner + 3), (s * (half + 1.5), corner + 7))
            yield hook, mix(p.skin, dark, a15), 4
        if a23 > 0.1:
            yield np.array([(s * (half + 2), 20), (s * (half + 3.5), 30)]), mix(p.skin, dark, 0.9 * a23), 4
        if a24 > 0.1:                                                        # pressed lips bunch the chin
            bulge = bend((s * 2, bottom + 8), (s * 7, bottom + 5), (s * 11, bottom + 8))
            yield bulge, mix(p.skin, dark, 0.9 * a24), 5

    left, right = (-half, corner), (half, corner)
    above, upper, lower = (bend(left, (0, y), right) for y in (top - thin, top, bottom))
    if p.moustache:
        yield between(bend(left, (0, top - thin - 4.5), right), above), mix(p.hair, p.skin, 0.2), 0
    yield between(above, upper), mix(p.lips, (40, 0, 0), 0.15), 0
    yield between(lower, bend(left, (0, bottom + 1.2 * thin), right)), p.lips, 0
    if gap > 0.6:
        yield between(upper, lower), (48, 14, 16), 0
        teeth = upper * (0.85, 1)
        yield between(teeth, teeth + (0, min(0.45 * gap, 3))), (232, 226, 214), 0
    else:
        yield upper, mix(p.lips, (20, 0, 0), 0.4 + 0.6 * a24), 3 + round(2 * a24)
    ball = p.chin - 8 + 9 * a26
    yield bend((-6, ball + 1), (0, ball), (6, ball + 1)), mix(p.skin, dark, 0.2), 2


@lru_cache(maxsize=64)
def background(place: int) -> Image.Image:
    """A wall, a gradient, or coloured blobs: 224 x 224."""
    rng, side = np.random.default_rng([place]), 2 * SIDE
    a, b = rng.integers(20, 230, (2, 3))
    ramp = np.linspace(0, 1, side)[:, None, None] * (rng.random() < 0.7)
    image = Image.fromarray(np.broadcast_to(a + (b - a) * ramp, (side, side, 3)).astype(np.uint8))
    for x, y, radius in rng.integers(0, side, (rng.integers(0, 9), 3)).tolist():
        colour = tuple(rng.integers(20, 230, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius / 3, y - radius / 3, x + radius / 3, y + radius / 3), fill=colour)
    return image


@lru_cache(maxsize=1)
def grain() -> np.ndarray:
    """Unit noise from which every frame cuts its own window: ten times faster than new noise for each."""
    return np.random.default_rng(1).standard_normal((256, 256, 3), np.float32)


def draw_face(p: Person, state: State, rng) -> Image.Image:
    """One frame: RGB, 112 x 112. `rng` places the sensor's noise, nothing else."""
    shapes = [*head(p, state.au), *eyes(p, state), *nose_and_mouth(p, state)]
    if p.glasses:
        for s in (-1, 1):
            rim = oval(s * p.eye_apart, -11, 11.5, 9)
            shapes.append((np.concatenate([rim, rim[:1]]), (30, 26, 28), 3))
        shapes.append((np.array([(-6.0, -12), (6, -12)]), (30, 26, 28), 3))
    if state.cover:
        shapes.append((*state.cover, 0))

    # Pose, for all points at once. Yaw slides the middle of the face and leaves the outline, as on a ball.
    xy = np.concatenate([points for points, _, _ in shapes])                 # (points, 2)
    xy[:, 0] += state.yaw * (1 - (xy[:, 0] / 46) ** 2 - (xy[:, 1] / 64) ** 2).clip(0, 1)
    c, s = np.cos(state.roll) * state.scale, np.sin(state.roll) * state.scale
    xy = 2 * (xy @ np.array([(c, s), (-s, c)]) + np.add(state.shift, SIDE / 2))     # drawn at twice the size, then halved

    image, end = background(state.place).copy(), 0
    pencil = ImageDraw.Draw(image)
    for points, colour, width in shapes:
        start, end = end, end + len(points)
        flat = xy[start:end].ravel().tolist()                                # x0, y0, x1, y1, ...
        pencil.line(flat, colour, width) if width else pencil.polygon(flat, colour)
    image = image.reduce(2)                                                  # (224, 224) -> (112, 112), edges smooth
    if max(state.blur) > 0:
        image = image.filter(ImageFilter.GaussianBlur(state.blur))

    # Light, then the sensor.
    gain = np.array(state.cast, np.float32) * np.float32(state.contrast * state.brightness)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    slope = np.float32(state.slope[0]) * ramp[None, :] + np.float32(state.slope[1]) * ramp[:, None]
    i, j = rng.integers(0, 256 - SIDE, 2)
    pixels = np.asarray(image, np.float32) * gain + np.float32(128 * (1 - state.contrast)) + slope[:, :, None]
    pixels += np.float32(state.noise) * grain()[i:i + SIDE, j:j + SIDE]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ---- Acting. An expression has an onset, a hold and an offset; a video is a few of them, with pauses.

@dataclass
class Acting:
    """The truth of a video of T frames, before anything spoils it."""
    au: np.ndarray             # (T, 12) intensities
    expression: np.ndarray     # (T,) index into EXPRESSIONS
    mood: np.ndarray           # (T, 2) valence and arousal that no expression explains
    shown: np.ndarray          # (T, 2) valence and arousal of the face: mood and expression


def blend(rng, expression: str) -> np.ndarray:
    """Action units of one showing of an expression, (12,): a variant, some of it weak, sometimes a unit too many."""
    variant = PROTOTYPES[expression][rng.integers(len(PROTOTYPES[expression]))]
    units = np.array([variant.get(unit, 0.0) for unit in AUS]) * rng.uniform(0.6, 1.15, 12)
    units[rng.random(12) < 0.1] *= 0.3
    if rng.random() < 0.3:
        units[rng.integers(12)] += rng.uniform(0.3, 0.7)
    return units.clip(0, 1)


def wander(rng, frames: int, width: float, rows: int) -> np.ndarray:
    """Smooth noise of unit deviation, (rows, frames): white noise under a Gaussian of `width` frames."""
    reach = int(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= np.sqrt((kernel ** 2).sum())
    return np.stack([np.convolve(row, kernel, "valid") for row in rng.standard_normal((rows, frames + 2 * reach))])


def envelope(frames: int, start: float, rise: float, hold: float, fall: float) -> np.ndarray:
    """0, a smooth rise to 1, a hold, a smooth fall: (frames,)."""
    ramp = np.interp(np.arange(frames), np.cumsum([start, rise, hold, fall]), [0, 1, 1, 0])
    return ramp * ramp * (3 - 2 * ramp)


def bursts(rng, frames: int, share: float, shortest: int, longest: int) -> list:
    """Stretches (start, stop), on average over `share` of the frames."""
    count = rng.poisson(share * frames * 2 / (shortest + longest))
    return [(a, min(a + n, frames)) for a, n in zip(rng.integers(0, frames, count).tolist(),
                                                   rng.integers(shortest, longest + 1, count).tolist())]


def episodes(frames: int) -> int:
    """How many expressions a video shows: one in about 100 frames."""
    return max(1, round(frames / 100))


def act(rng, frames: int, first: int) -> Acting:
    """Play expressions, from number `first` of EPISODES on, in any order and with pauses between them."""
    au, expression = np.zeros((frames, 12)), np.zeros(frames, int)
    mood = (MOOD_SPREAD * wander(rng, frames, 25, 2)).T.clip(-1, 1)          # (2, T) -> (T, 2)
    shown, habit = mood.copy(), rng.uniform(0.8, 1.15, 12)                   # habit: a person's own strength in each unit
    deal = [EPISODES[(first + i) % len(EPISODES)] for i in range(episodes(frames))]
    slot = frames / len(deal)
    for i, name in enumerate(rng.permutation(deal).tolist()):
        length, rise, fall = slot * rng.uniform(0.68, 0.95), rng.uniform(0.12, 0.25), rng.uniform(0.15, 0.3)
        start = slot * i + rng.uniform(0, slot - length)
        e = rng.uniform(0.7, 1.0) * envelope(frames, start, length * rise, length * (1 - rise - fall), length * fall)
        au += e[:, None] * habit * blend(rng, name)
        shown += e[:, None] * (CIRCUMPLEX[name] + 0.12 * rng.standard_normal(2))
        expression[e > EXPR_THRESHOLD] = EXPRESSIONS.index(name)
    for _ in range(rng.poisson(TWITCHES * frames / 100)):
        unit = rng.integers(12) if rng.random() < 0.7 else AUS.index(25)     # lips part most often, as in speech
        au[:, unit] += rng.uniform(0.4, 0.9) * envelope(frames, rng.uniform(0, frames), 4, rng.uniform(5, 30), 6)
    return Acting(au.clip(0, 1), expression, mood, shown.clip(-1, 1))


def annotate(rng, acting: Acting):
    """What annotators write down: valence and arousal (T, 2), expression (T,), action units (T, 12) of 0 and 1."""
    frames, lag = len(acting.au), int(rng.integers(LABEL_LAG[0], LABEL_LAG[1] + 1))
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 4) ** 2)                    # a joystick moves smoothly
    late = np.pad(acting.shown, ((lag + 12, 12), (0, 0)), "edge")[:frames + 24]
    va = np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in late.T], 1)     # (T, 2)
    va += VA_NOISE * wander(rng, frames, 10, 2).T
    return va.clip(-1, 1), acting.expression, (acting.au > AU_THRESHOLD).astype(int)


def cover(rng, p: Person):
    """A hand, a scarf or a strand of hair over part of the face: (points, colour)."""
    kind = rng.integers(3)
    if kind == 0:
        hand = oval(rng.uniform(-14, 14), rng.uniform(14, 34), rng.uniform(13, 22), rng.uniform(9, 14))
        return hand, mix(p.skin, (60, 20, 10), 0.15)
    if kind == 1:
        y = rng.uniform(12, 22)
        return np.array([(-60, y), (0, y - 4), (60, y + 4), (60, 70), (-60, 70)]), tuple(rng.integers(20, 220, 3).tolist())
    x, lean, half = rng.uniform(-25, 25), rng.uniform(-20, 20), rng.uniform(6, 13)
    return np.array([(x - half, -70), (x + half, -70), (x + lean + half, 5), (x + lean - half, 5)]), p.hair


def spoil(rng, p: Person, acting: Acting):
    """Yield the states of a video's frames: the acting, jittered, moved, lit, covered and blurred."""
    frames, place = len(acting.au), int(rng.integers(1000))
    tremor = JITTER * np.where(acting.au > 0.1, 1, 0.35)                     # a unit at rest trembles less
    au = (acting.au + tremor * rng.standard_normal((frames, 12))).clip(0, 1)
    energy = 0.25 + 0.6 * (acting.shown[:, 1] + 0.4).clip(0)                 # the aroused move more
    yaw, roll, dx, dy = wander(rng, frames, 12, 4) * energy
    size, dim, right, low = wander(rng, frames, 40, 4)
    shake, flicker = SHAKE * rng.standard_normal((frames, 2)), 1 + FLICKER * rng.standard_normal(frames) + 0.06 * dim
    turn, near, light = rng.normal(0, 1.5), rng.uniform(1.1, 1.18), rng.uniform(0.8, 1.15)
    contrast, cast, noise = rng.uniform(0.75, 1.1), tuple(rng.uniform(0.92, 1.08, 3)), rng.uniform(1, 6)
    covers, blurs, blinks = [None] * frames, [(0.0, 0.0)] * frames, np.zeros(frames)
    for a, b in bursts(rng, frames, OCCLUSION_SHARE, 5, 30):
        covers[a:b] = [cover(rng, p)] * (b - a)
    for a, b in bursts(rng, frames, BLUR_SHARE, 5, 25):
        blurs[a:b] = [[(5.0, 0.5), (0.5, 4.0), (2.5, 2.5), (4.0, 1.5)][rng.integers(4)]] * (b - a)
    for a, b in bursts(rng, frames, 0.04, 3, 5):
        blinks[a:b] = 1
    for t in range(frames):
        yield State(au[t], *acting.mood[t], blinks[t], turn + 2.5 * yaw[t], 0.04 * roll[t], near + 0.015 * size[t],
                    (dx[t] + shake[t, 0], dy[t] + shake[t, 1]), place, light * flicker[t], contrast, cast,
                    (20 * right[t], 12 * low[t]), covers[t], blurs[t], noise)


# ---- Files. `draw` writes a process's share of the pictures with the labels beside them; `index` the lists over all of them.

TASKS = {"VA": ("VA_Estimation_Challenge", "valence,arousal", "-5,-5"),      # folder, header, what an unlabelled frame gets
         "EXPR": ("EXPR_Classification_Challenge", ",".join(EXPRESSIONS), "-1"),
         "AU": ("AU_Detection_Challenge", ",".join(f"AU{unit}" for unit in AUS), ",".join(["-1"] * 12))}
TRAIN, VAL, STILL = range(3)   # the second number of a person's seed: nobody is in two of them

# The sets' own codes, in the order of EXPRESSIONS; Other is drawn for contempt, where a set has it.
AFFECTNET, RAF_DB, FER2013 = (0, 6, 5, 4, 1, 2, 3, 7), (7, 6, 3, 2, 4, 5, 1), (6, 0, 1, 2, 3, 4, 5)
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
FERPLUS_OF = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
SETS = {"AffectNet-2017": 0.40, "AffectNet-2021": 0.20, "RAF-DB": 0.25, "FER2013": 0.15}   # share of the still faces


@dataclass(frozen=True)
class Video:
    name: str
    split: int                 # TRAIN or VAL
    number: int                # within the split
    frames: int                # lines of a label file
    tasks: tuple               # keys of TASKS
    first: int                 # where its expressions start in EPISODES


def videos(sizes: Sizes) -> list:
    """All videos. The first three of a split have given lengths: a multiple of usual strides, very short, and longer."""
    out = []
    for split, count in ((TRAIN, sizes.train_videos), (VAL, sizes.val_videos)):
        first = 0
        for n in range(count):
            film = n - (n % 8 == 6)                                          # numbers 5 and 6 of 8 are two people in one film
            code = 2 * film + split + 1                                      # no film is in both splits
            name = [f"{code}-30-1280x720", f"{120 + code}", f"video{code}_3", f"{code}-60-1920x1080-2"][film % 4]
            name += {5: "_left", 6: "_right"}.get(n % 8, "")
            length = np.random.default_rng([sizes.seed, split, film, 1]).uniform(0.75, 1.5)
            frames = {0: sizes.frames, 1: min(73, sizes.frames), 2: sizes.frames * 3 // 2}.get(n, int(sizes.frames * length))
            tasks = {4: ("VA",), 7: ("AU",), 8: ("EXPR", "AU")}.get(n % 9, ("VA", "EXPR", "AU"))
            out.append(Video(name, split, n, frames, tasks, first))
            first += episodes(frames) * ("EXPR" in tasks)
    return out


def draw_video(root: Path, sizes: Sizes, video: Video) -> None:
    """Frames and label files of one video, with the faults of real ones: no face found, nobody annotated, too many images."""
    n, frames, folder = video.number, video.frames, root / "Aff-Wild2/cropped_aligned" / video.name
    p = person(np.random.default_rng([sizes.seed, video.split, n]))
    rng = np.random.default_rng([sizes.seed, video.split, n, 2])
    acting = act(rng, frames + 4 * (n % 5 == 2), video.first)                # some have images past the last label
    va, expression, au = annotate(rng, acting)
    lines = {"VA": [f"{v:.3f},{a:.3f}" for v, a in va], "EXPR": [str(k) for k in expression],
             "AU": [",".join(map(str, units)) for units in au]}
    for task in video.tasks:
        challenge, header, invalid = TASKS[task]
        for a, b in bursts(rng, frames, 0.08, 10, 50) if n % 4 else []:      # every fourth is annotated throughout
            lines[task][a:b] = [invalid] * (b - a)
        path = root / "Aff-Wild2/annotations" / challenge / ("Train_Set", "Validation_Set")[video.split] / f"{video.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        end = "\r\n" if n % 6 == 3 else "\n"                                 # both occur
        path.write_text(end.join([header, *lines[task][:frames], ""]), newline="")
    missing = {t for a, b in bursts(rng, frames, 0.06, 1, 20) for t in range(a, b)} if n % 3 != 1 else ()
    folder.mkdir(parents=True, exist_ok=True)
    for t, state in enumerate(spoil(rng, p, acting)):
        if t not in missing:
            draw_face(p, state, rng).save(folder / f"{t + 1:05d}.jpg", quality=90)


@dataclass
class Still:
    """A still face, before it is drawn. Each is another person."""
    set: str                   # key of SETS
    file: str                  # within the set; "" in FER2013, whose pixels lie in a CSV
    train: bool
    person: Person
    state: State
    expression: int            # index into EXPRESSIONS
    va: np.ndarray             # (2,)
    faced: bool                # False: the picture shows no face
    rng: np.random.Generator

    def image(self) -> Image.Image:
        return draw_face(self.person, self.state, self.rng) if self.faced else background(self.state.place).reduce(2)


def still(sizes: Sizes, number: int) -> Still:
    """The still face of a number below sizes.faces, the same one each time."""
    p = person(np.random.default_rng([sizes.seed, STILL, number]))
    rng = np.random.default_rng([sizes.seed, STILL, number, 2])
    group = list(SETS)[int((number >= np.round(np.cumsum([*SETS.values()]) * sizes.faces)).sum())]
    shares = np.array([.22, .12, .09, .1, .19, .12, .11, .05 * group.startswith("Affect")])
    k, strength = int(rng.choice(8, p=shares / shares.sum())), rng.uniform(0.6, 1)
    mood = MOOD_SPREAD * rng.standard_normal(2).clip(-3, 3)
    state = State(strength * blend(rng, EXPRESSIONS[k]), *mood, yaw=rng.normal(0, 3), roll=rng.normal(0, 0.06),
                  scale=rng.uniform(1.05, 1.22), shift=tuple(rng.normal(0, 2, 2)), place=int(rng.integers(1000)),
                  brightness=rng.uniform(0.7, 1.2), contrast=rng.uniform(0.7, 1.1), cast=tuple(rng.uniform(0.9, 1.1, 3)),
                  slope=tuple(rng.normal(0, 18, 2)), cover=cover(rng, p) if rng.random() < 0.07 else None,
                  blur=(1.2, 1.2) if rng.random() < 0.1 else (0.0, 0.0), noise=rng.uniform(1, 6))
    va = (strength * np.array(CIRCUMPLEX[EXPRESSIONS[k]]) + mood).clip(-1, 1)
    train, code = bool(rng.random() < 0.85), rng.bytes(28).hex()
    file = {"AffectNet-2017": f"Manually_Annotated_Images/{number % 7 + 1}/{code}.jpg",
            "AffectNet-2021": f"{'train' if train else 'val'}_set/images/{number}.jpg",
            "RAF-DB": f"basic/Image/aligned/{'train' if train else 'test'}_{number:05d}_aligned.jpg", "FER2013": ""}[group]
    faced = group in ("AffectNet-2021", "RAF-DB") or rng.random() >= 0.03
    return Still(group, file, train, p, state, k, va, faced, rng)


def claim(root: Path, sizes: Sizes, rank: int) -> None:
    """Refuse a folder with other data in it: real data must not be overwritten, nor two drawings mixed.

    Raises ValueError if `root` holds a data set that was not drawn, or a drawing of other sizes.
    """
    mark = root / "sizes.json"
    if any((root / name).exists() for name in ("Aff-Wild2", "FERPlus", *SETS)):
        held = json.loads(mark.read_text()) if mark.exists() else "data that was not drawn"
        if held != dataclasses.asdict(sizes):
            raise ValueError(f"{root} holds {held}, expected nothing or {dataclasses.asdict(sizes)}; "
                             "draw into a new folder, or delete this one")
    write_json(mark, sizes, rank)                                            # before any data: data without it is not ours
    (root / "complete.json").unlink(missing_ok=True)                         # until index has run again


def draw(root, sizes: Sizes, rank: int = 0, world: int = 1) -> None:
    """Write process `rank`'s share of the pictures. Shares are disjoint, and together the same bytes for any `world`.

    Drawing again with the same sizes writes the same files. Raises ValueError if `root` holds other data.
    """
    root = Path(root)
    claim(root, sizes, rank)
    for video in videos(sizes)[rank::world]:
        draw_video(root, sizes, video)
    for number in range(rank, sizes.faces, world):
        face = still(sizes, number)
        path = root / face.set / face.file
        if face.file:
            path.parent.mkdir(parents=True, exist_ok=True)
            face.image().resize((100, 100) if face.set == "RAF-DB" else (96, 96)).save(path, quality=90)
        if face.set == "AffectNet-2021":
            notes = path.parents[1] / "annotations"
            notes.mkdir(exist_ok=True)
            for label, value in (("exp", AFFECTNET[face.expression]), ("val", face.va[0]), ("aro", face.va[1])):
                np.save(notes / f"{number}_{label}.npy", np.array(str(value)))       # one string


def index(root, sizes: Sizes) -> None:
    """Write the lists over all pictures (one process, when every share is there), FER2013, and complete.json last of all."""
    root, affectnet, raf, fer, plus = Path(root), {True: [], False: []}, [], [], []
    for number in range(sizes.faces):
        face = still(sizes, number)
        k, rng = face.expression, face.rng
        if face.set == "AffectNet-2017":
            code = AFFECTNET[k] if rng.random() < 0.96 else int(rng.integers(8, 10))     # 8 None, 9 Uncertain
            code = code if face.faced else 10
            landmarks = ";".join(f"{x:.1f};{y:.1f}" for x, y in oval(48, 48, 30, 38))
            va = [f"{x:.6f}" for x in face.va] if code < 8 else [-2, -2]
            affectnet[face.train].append([face.file.split("/", 1)[1], 0, 0, 96, 96, landmarks, code, *va])
        elif face.set == "RAF-DB":
            raf.append([f"{Path(face.file).name.replace('_aligned', '')} {RAF_DB[k]}"])
        elif face.set == "FER2013":
            grey = np.asarray(face.image().convert("L").resize((48, 48)))
            usage = "Training" if face.train else ("PublicTest", "PrivateTest")[number % 2]
            fer.append([FER2013[k], " ".join(map(str, grey.ravel())), usage])
            shares = np.array([0.85 if name == FERPLUS_OF[k] else 0.15 / 8 for name in FERPLUS[:-1]] + [0.0])   # NF gets none
            votes = rng.multinomial(10, shares) if face.faced else np.eye(10, dtype=int)[-1] * 10
            plus.append([usage, f"fer{len(plus):07d}.png" if face.faced else "", *votes])
    columns = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
    write_rows(root / "AffectNet-2017/training.csv", [columns.split(","), *affectnet[True]])
    write_rows(root / "AffectNet-2017/validation.csv", [columns.split(","), *affectnet[False]])
    write_rows(root / "RAF-DB/basic/EmoLabel/list_patition_label.txt", raf)
    write_rows(root / "FER2013/fer2013.csv", [["emotion", "pixels", "Usage"], *fer])
    write_rows(root / "FERPlus/fer2013new.csv", [["Usage", "Image name", *FERPLUS], *plus])
    write_json(root / "complete.json", sizes)


def write_rows(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_json(path: Path, sizes: Sizes, rank: int = 0) -> None:
    """Under a temporary name, then renamed: nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{rank}")
    part.write_text(json.dumps(dataclasses.asdict(sizes)))
    os.replace(part, path)


def is_complete(root, sizes: Sizes) -> bool:
    """Has `index` finished here, with these sizes?"""
    try:
        return json.loads((Path(root) / "complete.json").read_text()) == dataclasses.asdict(sizes)
    except (OSError, ValueError):
        return False


def sheet() -> Image.Image:
    """A row per expression, a column per person; then each action unit alone, of two people; then a video's spoiled frames."""
    rng, people = np.random.default_rng(0), [person(np.random.default_rng([0, VAL, n])) for n in range(12)]
    rows = [[(p, State(0.95 * blend(rng, name))) for p in people] for name in EXPRESSIONS]
    rows += [[(p, State(unit)) for unit in np.eye(12)] for p in people[1:3]]
    spoiled = [state for state in spoil(rng, people[3], act(rng, 1000, 0)) if state.cover or max(state.blur) > 0]
    rows += [[(people[3], state) for state in spoiled[::len(spoiled) // 12][:12]]]
    out = Image.new("RGB", (12 * SIDE, len(rows) * SIDE))
    for y, row in enumerate(rows):
        for x, (p, state) in enumerate(row):
            out.paste(draw_face(p, state, rng), (x * SIDE, y * SIDE))
    return out


def make(config, team):
    """Draw everything with all processes of `team` (training.Team)."""
    sizes = Sizes(**{f.name: getattr(config.drawn, f.name) for f in dataclasses.fields(Sizes)})
    draw(config.drawn.root, sizes, team.rank, team.world)
    team.wait()
    if team.rank == 0:
        index(config.drawn.root, sizes)
    team.wait()


def provide(config, team):
    """With `data.drawn`, draw the data if it is not there yet; otherwise do nothing."""
    import training
    if config.data.drawn:
        sizes = Sizes(**{f.name: getattr(config.drawn, f.name) for f in dataclasses.fields(Sizes)})
        missing = "" if is_complete(config.drawn.root, sizes) else Path(config.drawn.root) / "complete.json"
        training.provide(config, team, missing, make, "python synthetic.py", DEMO_SECONDS)


DEMO_SECONDS = 20     # measured by benchmark.py on two cores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder to fill")
    parser.add_argument("--sheet", help="picture to write")
    for field in dataclasses.fields(Sizes):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    options = vars(parser.parse_args())
    folder, picture = options.pop("out"), options.pop("sheet")
    if picture:
        sheet().save(picture)
    if folder:
        draw(folder, Sizes(**options))
        index(folder, Sizes(**options))
