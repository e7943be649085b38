"""One synthetic face, made of about fifty polygons.

It stands in for real faces, none of which may be redistributed. A `Person` is what stays the same from frame
to frame, a `State` is what one frame shows: 12 action units, pose, light, cover, blur. An action unit moves
what it moves in a real face: AU1 lifts the inner brow, AU12 pulls the corners of the lips.
`synthetic_acting.py` lets such faces act, `synthetic.py` writes them to disk.

    python synthetic_face.py faces.png     # a sheet: each action unit alone, of four people
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from labels import AUS

SIDE = 112                     # pixels of a frame, as in cropped_aligned
PERSON_SPREAD = 0.6            # how much neutral faces differ: at 1, some rest as high as others half raise
LOW = 3.0                      # pixels by which the crop's centre lies below the cheekbones


# Coordinates: pixels of a 112-pixel frame, the origin between the cheekbones, x to the right, y down.

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


HAIR = ((24, 20, 18), (58, 38, 26), (106, 70, 40), (196, 160, 96), (140, 60, 32), (150, 148, 146))
IRIS = ((60, 38, 22), (40, 28, 20), (70, 100, 130), (74, 104, 70), (96, 92, 84))
LIPS = ((178, 60, 70), (130, 50, 50), (200, 110, 110))


def person(rng) -> Person:
    """A random person. Neutral faces differ by as much as a weak action unit moves them."""
    def about(mean, deviation):
        return float(mean + PERSON_SPREAD * deviation * np.clip(rng.standard_normal(), -2, 2))

    tone = rng.random()
    man = rng.random() < 0.5
    darkest = np.array((96, 62, 45)) + rng.uniform(-8, 8, 3)
    skin = mix(darkest, (246, 212, 188), tone)
    hair = HAIR[rng.integers(len(HAIR))]
    iris = IRIS[rng.integers(len(IRIS))]
    lips = mix(skin, LIPS[rng.integers(len(LIPS))], rng.uniform(0.4, 0.9))
    return Person(
        skin, hair, iris, lips, style=int(rng.integers(5)),
        beard=rng.uniform(0.4, 0.9) if man and rng.random() < 0.25 else 0.0,
        moustache=bool(man and rng.random() < 0.25), glasses=bool(rng.random() < 0.2),
        width=about(37, 1.8), chin=about(46, 2.2), jaw=about(0.88, 0.07),
        brow=about(11.5, 1.3), brow_tilt=about(0.5, 1.2), brow_thick=about(3.4, 0.6),
        eye_apart=about(17, 0.8), eye_wide=about(9, 0.7), eye_open=about(4.6, 0.5),
        nose_wide=about(6.5, 1), nose_long=about(10, 1.3),
        mouth=about(14.5, 1.5), lip=about(3.4, 0.7), corner=about(0.2, 1.1))


@dataclass
class State:
    """What one frame shows."""
    au: np.ndarray             # (12,) intensities in [0, 1], in the order of AUS
    valence: float = 0.0       # mood in [-1, 1]: lifts or drops the corners of the lips, without folds
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
    slope: tuple = (0.0, 0.0)  # grey levels from the centre to the right, and to the lower, border
    cover: tuple | None = None # an occlusion: ((n, 2) points, colour)
    blur: tuple = (0.0, 0.0)   # deviation along x and y, pixels
    noise: float = 3.0         # deviation of the sensor's noise, grey levels


ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)           # (28, 2); the second half has y < 0
TIMES = np.linspace(0, 1, 9)
BEZIER = np.stack([(1 - TIMES) ** 2, 2 * TIMES * (1 - TIMES), TIMES ** 2], 1)  # (9, 3): weights of 3 points


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
    """Hair, neck, ears, head, forehead.

    Like each part of a face, it yields shapes from back to front: (points, colour, line width or 0 to fill).
    """
    a1, a2, a4, a26 = au[0], au[1], au[2], au[11]
    dark = mix(p.skin, (20, 0, 0), 0.6)
    if p.style == 4:
        yield oval(0, 4, p.width + 7, 60), p.hair, 0
    yield np.array([(-20, 30), (20, 30), (24, 80), (-24, 80)]), mix(p.skin, (20, 0, 0), 0.25), 0
    for s in (-1, 1):
        yield oval(s * p.width, -4, 4.5, 8), mix(p.skin, (120, 20, 20), 0.15), 0
    x, y = CIRCLE.T
    y = np.where(y < 0, 46, p.chin + 9 * a26) * y                # AU26 lengthens the lower face
    outline = np.stack([p.width * np.sign(x) * np.abs(x) ** p.jaw, y], 1)
    yield outline, p.skin, 0
    if p.beard:
        edge = [(-0.72 * p.width, 8), (-17, 19), (0, 15), (17, 19), (0.72 * p.width, 8)]
        yield np.concatenate([outline[y > 4], edge]), mix(p.skin, p.hair, p.beard), 0
    if max(a1, a2) > 0.1:                                        # raised brows fold the forehead
        for y in (-31, -36):
            fold = bend((-8 - 12 * a2, y + 1), (0, y - 3 * a1), (8 + 12 * a2, y + 1))
            yield fold, mix(p.skin, dark, 0.7 * max(a1, a2)), 3
    if a4 > 0.1:                                                 # lowered brows fold the bridge of the nose
        for s in (-1, 1):
            yield bend((s * 2.5, -22), (s * 3.5, -17), (s * 2, -11)), mix(p.skin, dark, a4), 4
    if p.style:
        fringe, part = [(-38, 0), (-31, 0), (-36, 14), (-37, 6)][p.style - 1]  # y, and x of the parting
        crown = CIRCLE[14:] * (p.width + 2, 50)                  # from the left over the top to the right
        hairline = bend((p.width - 8, fringe + 5), (part, fringe - 4), (8 - p.width, fringe + 5))
        temple = np.array([(p.width - 1, -13), (p.width - 5, -22)])
        other_temple = temple[::-1] * (-1, 1)                    # mirrored, and run through backwards
        yield np.concatenate([crown, temple, hairline, other_temple]), p.hair, 0


def eyes(p: Person, state: State):
    """Eyes, lids, cheeks and brows."""
    a1, a2, a4, a6, a7 = state.au[:5]
    dark, lid = mix(p.skin, (20, 0, 0), 0.6), mix(p.skin, (60, 20, 20), 0.14)
    wide = p.eye_open * (1 + 0.8 * state.arousal + 0.2 * a2) * (1 - state.blink)
    up = wide * (1 - 0.6 * a7)                                   # the upper lid's height, and
    low = wide * 0.75 * (1 - 0.45 * a6) * (1 - 0.8 * a7)         # the lower lid's depth
    for s in (-1, 1):
        x, y = s * p.eye_apart, -12.0
        inner, outer = (x - s * p.eye_wide, y + 0.7), (x + s * p.eye_wide, y - 0.3)
        upper, lower = bend(inner, (x, y - up), outer), bend(inner, (x, y + low), outer)
        yield between(upper, lower), (236, 232, 228), 0
        yield oval(x, y - 0.4, 4.4, 4.4), p.iris, 0
        yield oval(x, y - 0.4, 2, 2), (10, 8, 8), 0
        # The lids cover the part of the iris that lies outside the slit between them.
        yield np.concatenate([upper, [(outer[0], y - 8), (inner[0], y - 8)]]), lid, 0
        yield np.concatenate([lower, [(outer[0], y + 6), (inner[0], y + 6)]]), p.skin, 0
        yield upper, (40, 26, 22), 3
        yield lower, mix(p.skin, dark, 0.6 + 0.4 * a7), 2
        if a7 > 0.1:                                             # AU7 tightens the lower lid
            yield lower + (0, 2), mix(p.skin, dark, 0.9 * a7), 4
        if a6 > 0.1:                                             # AU6: a higher cheek, a bag, crow's feet
            crease = mix(p.skin, dark, 0.9 * a6)
            yield oval(x + s * 2, 6 - 3 * a6, 9, 5.5), mix(p.skin, (255, 150, 130), 0.5 * a6), 0
            yield bend((x - s * 7, y + 5), (x, y + 9 - 2 * a6), (x + s * 8, y + 4)), crease, 4
            for slope in (-2, 1, 4):
                yield np.array([(x + s * 11, y + 0.5 * slope), (x + s * 16, y + 1.4 * slope)]), crease, 3
        b = y - p.brow
        ridge = bend((x - s * (9 + 4 * a4), b + p.brow_tilt / 2 - 7.0 * a1 + 6.0 * a4),
                     (x - s, b - 1.5 - 3.5 * a1 - 4.5 * a2 + 4.0 * a4),
                     (x + s * 10, b + 1 - p.brow_tilt / 2 - 7.5 * a2 + 1.5 * a4))
        half = np.linspace(1, 0.45, 9)[:, None] * (0, p.brow_thick / 2)  # a brow is thicker inside
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
    gap = 7 * a25 + a26 * (2 + 8 * a25)                          # AU26 alone hardly parts the lips
    top = 25 - 0.25 * gap - 4.5 * a10 - 0.6 * a12 + 2 * a26      # the upper lip's lower edge, and
    bottom = 25 + 0.75 * gap + 1.5 * a12 + 2 * a26               # the lower lip's upper edge
    fold = max(a10, 0.8 * a12)
    for s in (-1, 1):
        if fold > 0.1:                                           # nasolabial: from the nose around the mouth
            knee, foot = (s * (0.75 * half + 3), 16 - 3 * a10), (s * (half + 4), corner + 1)
            yield bend((s * (wing + 2), tip - 2 - 2 * a10), knee, foot), mix(p.skin, dark, 0.95 * fold), 4
        if a12 > 0.1:
            dimple = bend((s * (half + 1.5), corner - 2.5),
                          (s * (half + 3), corner),
                          (s * (half + 1.5), corner + 2.5))
            yield dimple, mix(p.skin, dark, a12), 3
        if a15 > 0.1:
            hook = bend((s * (half + 0.5), corner),
                        (s * (half + 2.5), corner + 3),
                        (s * (half + 1.5), corner + 7))
            yield hook, mix(p.skin, dark, a15), 4
        if a23 > 0.1:
            yield np.array([(s * (half + 2), 20), (s * (half + 3.5), 30)]), mix(p.skin, dark, 0.9 * a23), 4
        if a24 > 0.1:                                            # pressed lips bunch the chin
            bulge = bend((s * 2, bottom + 8), (s * 7, bottom + 5), (s * 11, bottom + 8))
            yield bulge, mix(p.skin, dark, 0.9 * a24), 5

    left, right = (-half, corner), (half, corner)
    above = bend(left, (0, top - thin), right)                   # four curves that bound the two lips
    upper = bend(left, (0, top), right)
    lower = bend(left, (0, bottom), right)
    below = bend(left, (0, bottom + 1.2 * thin), right)
    if p.moustache:
        yield between(bend(left, (0, top - thin - 4.5), right), above), mix(p.hair, p.skin, 0.2), 0
    yield between(above, upper), mix(p.lips, (40, 0, 0), 0.15), 0
    yield between(lower, below), p.lips, 0
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
    a, b = rng.integers(70, 180, (2, 3))
    ramp = np.linspace(0, 1, side)[:, None, None] * (rng.random() < 0.7)
    image = Image.fromarray(np.broadcast_to(a + (b - a) * ramp, (side, side, 3)).astype(np.uint8))
    for x, y, radius in rng.integers(0, side, (rng.integers(0, 9), 3)).tolist():
        colour = tuple(rng.integers(70, 180, 3).tolist())
        r = radius / 3
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return image


@lru_cache(maxsize=1)
def grain() -> np.ndarray:
    """Unit noise, (256, 256, 3). Each frame takes a window of it: ten times faster than new noise."""
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

    # Pose, for all points at once. Yaw moves the middle of the face but not its outline, as on a ball.
    xy = np.concatenate([points for points, _, _ in shapes])     # (points, 2)
    xy[:, 0] += state.yaw * (1 - (xy[:, 0] / 46) ** 2 - (xy[:, 1] / 64) ** 2).clip(0, 1)
    xy[:, 1] -= LOW
    c, s = np.cos(state.roll) * state.scale, np.sin(state.roll) * state.scale
    xy = xy @ np.array([(c, s), (-s, c)]) + np.add(state.shift, SIDE / 2)
    xy = 2 * xy                                                  # drawn at twice the size, then halved

    image = background(state.place).copy()
    pencil = ImageDraw.Draw(image)
    start = 0
    for points, colour, width in shapes:
        flat = xy[start:start + len(points)].ravel().tolist()    # (n, 2) -> x0, y0, x1, y1, ...
        start += len(points)
        if width:
            pencil.line(flat, colour, width)
        else:
            pencil.polygon(flat, colour)
    image = image.reduce(2)                                      # (224, 224) -> (112, 112), edges smooth
    if max(state.blur) > 0:
        image = image.filter(ImageFilter.GaussianBlur(state.blur))

    # Light, then the sensor.
    gain = np.array(state.cast, np.float32) * np.float32(state.contrast * state.brightness)  # (3,)
    grey = np.float32(128 * (1 - state.contrast))                # less contrast: nearer to middle grey
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    right, down = np.float32(state.slope)
    slope = right * ramp[None, :] + down * ramp[:, None]         # (112, 112)
    i, j = rng.integers(0, 256 - SIDE, 2)
    pixels = np.asarray(image, np.float32) * gain + grey + slope[:, :, None]  # (112, 112, 3)
    pixels += np.float32(state.noise) * grain()[i:i + SIDE, j:j + SIDE]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_sheet(rows: list, path) -> None:
    """Draw rows of (person, state) side by side into a .png or .jpg file.

    Raises ValueError for another kind of file, and if it cannot be written.
    """
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{path}: a contact sheet is a .png or .jpg file; try faces.png")
    rng = np.random.default_rng(0)
    out = Image.new("RGB", (len(rows[0]) * SIDE, len(rows) * SIDE))
    for y, row in enumerate(rows):
        for x, (p, state) in enumerate(row):
            out.paste(draw_face(p, state, rng), (x * SIDE, y * SIDE))
    try:
        out.save(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "faces.png"
    people = [person(np.random.default_rng(n)) for n in range(4)]
    states = [State(au) for au in [np.zeros(len(AUS)), *np.eye(len(AUS))]]
    try:
        save_sheet([[(p, state) for state in states] for p in people], path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
