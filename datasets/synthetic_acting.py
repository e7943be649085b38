"""Drawn faces that act: expressions that come and go, what annotators write down, what spoils a frame.

A person shows expressions built from action units as in EMFACS, with the faults of real recordings: blur,
hands before the face, annotators who react late. What each part of the system is for is built in:

    a frame is blurred, covered, or in mid-blink            its neighbours tell: the TCN
    the corners of one person's lips hang, another's lids   the rest of the segment tells what is the face,
    are wide, and so look like weak action units            what is expression: the Transformer encoder

Times are in frames, at about 10 a second. Everything is five times as fast as in real videos, so that 20,000
frames hold 800 expressions of 200 people. Read `synthetic_face.py` first.
"""

from collections import namedtuple

import numpy as np

from datasets.synthetic_face import Person, State, mix, oval
from labels import AUS, EXPRESSIONS

EPISODE = 24                   # frames from one expression to the next
MARKED = 0.35                  # intensity of an action unit, or share of an expression, that annotators mark
LABEL_LAG = (2, 4)             # frames, at least and at most, by which an annotator's joystick is late
MOOD_SPREAD = 0.2              # deviation of a mood: valence and arousal that no expression explains
BLURS = ((5.0, 0.5), (0.5, 4.0), (2.5, 2.5), (4.0, 1.5))     # deviations along x and y, pixels

# Expression -> its variants (EMFACS); a variant is action unit -> intensity.
PROTOTYPES = {
    "Neutral": [{}],
    "Anger": [{4: 1, 7: .9, 23: .95}, {4: 1, 7: .85, 24: .95}, {4: .95, 7: .85, 10: .75, 23: .85, 25: .8}],
    "Disgust": [{4: .8, 10: 1, 15: .8}, {7: .85, 10: 1, 25: .75}, {4: .75, 10: .95, 15: .9}],
    "Fear": [{1: 1, 2: .8, 4: .85, 25: .85}, {1: .95, 2: .75, 4: .9, 7: .75, 25: .85, 26: .75}],
    "Happiness": [{6: .9, 12: 1}, {6: .95, 12: 1, 25: .9}, {6: .75, 12: .9, 25: .8, 26: .75}],
    "Sadness": [{1: .95, 4: .8, 15: .95}, {1: .9, 4: .75, 15: .9, 24: .75}],
    "Surprise": [{1: .95, 2: .95, 25: .9, 26: .95}, {1: .9, 2: 1, 25: .85, 26: .75}],
    "Other": [{1: .8, 24: .95}, {4: .9, 12: .9}, {10: .9, 25: .8, 26: .85}, {2: .95, 23: .95},
              {7: .95, 26: .8}]}
# Expression -> (valence, arousal).
CIRCUMPLEX = {"Neutral": (0, 0), "Anger": (-.6, .65), "Disgust": (-.65, .3), "Fear": (-.45, .75),
              "Happiness": (.75, .35), "Sadness": (-.7, -.4), "Surprise": (.2, .8), "Other": (.05, .15)}
# Videos take their expressions from this list in turn, again and again, so that no split lacks a class.
EPISODES = ("Other", "Happiness", "Fear", "Sadness", "Other", "Anger", "Surprise", "Disgust", "Other",
            "Happiness", "Fear", "Anger", "Sadness", "Surprise", "Disgust")


# The truth of a video of T frames, before anything spoils it: intensities (T, 12), index into EXPRESSIONS
# (T,), valence and arousal (T, 2) that no expression explains, and those of the face: mood and expression.
Acting = namedtuple("Acting", "au expression mood shown")


def blend(rng, expression: str) -> np.ndarray:
    """Action units of one showing of an expression, (12,): a variant, some weak, at times one more."""
    variants = PROTOTYPES[expression]
    variant = variants[rng.integers(len(variants))]
    units = np.array([variant.get(number, 0.0) for number in AUS]) * rng.uniform(0.8, 1.15, 12)
    units[rng.random(12) < 0.07] *= 0.3
    if rng.random() < 0.3:
        units[rng.integers(12)] += rng.uniform(0.5, 0.9)
    return units.clip(0, 1)


def wander(rng, frames: int, width: float, rows: int) -> np.ndarray:
    """Smooth noise of unit deviation, (rows, frames): white noise under a Gaussian of `width` frames."""
    reach = int(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= np.sqrt((kernel ** 2).sum())
    noise = rng.standard_normal((rows, frames + 2 * reach))
    return np.stack([np.convolve(row, kernel, "valid") for row in noise])


def envelope(frames: int, *times) -> np.ndarray:
    """0, a smooth rise to 1, a hold, a smooth fall; `times`: how long each lasts. Shape: (frames,)."""
    ramp = np.interp(np.arange(frames), np.cumsum(times), [0, 1, 1, 0])
    return ramp * ramp * (3 - 2 * ramp)


def interrupt(rng, values: list, share: float, shortest: int, longest: int, other) -> list:
    """`values`, one for each frame, with other() in random stretches that cover about `share` of them."""
    count = rng.poisson(share * len(values) / ((shortest + longest) / 2))
    starts = rng.integers(0, len(values), count).tolist()        # stretches may overlap
    for start, length in zip(starts, rng.integers(shortest, longest + 1, count).tolist()):
        values[start:start + length] = [other()] * len(values[start:start + length])
    return values


def act(rng, frames: int, first: int) -> Acting:
    """Play the expressions of EPISODES from number `first` on, in random order, with pauses between them."""
    au, expression = np.zeros((frames, 12)), np.zeros(frames, int)
    mood = (MOOD_SPREAD * wander(rng, frames, 15, 2).T).clip(-1, 1)      # (2, T) -> (T, 2)
    shown = mood.copy()
    habit = rng.uniform(0.8, 1.15, 12)                           # the person's own strength in each unit
    count = round(frames / EPISODE) or 1
    names = [EPISODES[(first + i) % len(EPISODES)] for i in range(count)]
    slot = frames / count
    for i, name in enumerate(rng.permutation(names).tolist()):
        length = slot * rng.uniform(0.68, 0.95)
        rise, fall = rng.uniform(0.12, 0.25), rng.uniform(0.15, 0.3)
        start = slot * i + rng.uniform(0, slot - length)
        strength = rng.uniform(0.9, 1.0)
        e = strength * envelope(frames, start, length * rise, length * (1 - rise - fall), length * fall)
        au += e[:, None] * habit * blend(rng, name)              # (T, 1) * (12,) -> (T, 12)
        shown += e[:, None] * (CIRCUMPLEX[name] + 0.08 * rng.standard_normal(2))
        expression[e > MARKED] = EXPRESSIONS.index(name)
    for _ in range(rng.poisson(1.2 * frames / 100)):             # single units that belong to no expression
        unit = AUS.index(25) if rng.random() >= 0.7 else rng.integers(12)    # the lips part most often
        strength, start = rng.uniform(0.6, 0.9), rng.uniform(0, frames)
        au[:, unit] += strength * envelope(frames, start, 2, rng.uniform(2, 8), 3)
    return Acting(au.clip(0, 1), expression, mood, shown.clip(-1, 1))


def annotate(rng, acting: Acting) -> dict[str, np.ndarray]:
    """What annotators write down, as text: {"va": (T, 2), "expr": (T, 1), "au": (T, 12)}."""
    lag, reach = int(rng.integers(LABEL_LAG[0], LABEL_LAG[1] + 1)), 12
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / 2) ** 2)      # a joystick moves smoothly
    late = np.pad(acting.shown, ((lag + reach, reach), (0, 0)), "edge")[:-lag]     # row reach is frame -lag
    va = np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in late.T])
    va += 0.05 * wander(rng, len(acting.au), 4, 2)               # (2, T), with a smooth error
    return {"va": np.char.mod("%.3f", va.T.clip(-1, 1)),
            "expr": np.char.mod("%d", acting.expression[:, None]),
            "au": np.char.mod("%d", acting.au > MARKED)}


def cover(rng, p: Person):
    """A hand, a scarf or a strand of hair over part of the face: (points, colour)."""
    kind = rng.integers(3)
    if kind == 0:
        hand = oval(rng.uniform(-14, 14), rng.uniform(14, 34), rng.uniform(13, 22), rng.uniform(9, 14))
        return hand, mix(p.skin, (60, 20, 10), 0.15)
    if kind == 1:
        y = rng.uniform(12, 22)
        scarf = np.array([(-60, y), (0, y - 4), (60, y + 4), (60, 70), (-60, 70)])
        return scarf, tuple(rng.integers(20, 220, 3).tolist())
    x, lean, half = rng.uniform((-25, -20, 6), (25, 20, 13))
    return np.array([(x - half, -70), (x + half, -70), (x + lean + half, 5), (x + lean - half, 5)]), p.hair


def spoil(rng, p: Person, acting: Acting):
    """Yield the states of a video's frames: the acting, jittered, moved, lit, covered and blurred."""
    frames, place = len(acting.au), int(rng.integers(1000))
    # What differs from frame to frame: intensities (a unit at rest trembles less), pose (the aroused move
    # more, and frames are aligned one by one), light.
    tremor = 0.12 * np.where(acting.au > 0.1, 1, 0.35)           # (T, 12)
    au = (acting.au + tremor * rng.standard_normal((frames, 12))).clip(0, 1)
    energy = 0.25 + 0.6 * (acting.shown[:, 1] + 0.4).clip(0)     # (T,)
    yaw, roll, *sway = wander(rng, frames, 4, 4) * energy        # (4, T); sway: x and y
    size, dim, right, down = wander(rng, frames, 16, 4)
    sway = np.transpose(sway) + 0.7 * rng.standard_normal((frames, 2))   # (2, T) -> (T, 2)
    flicker = 1 + 0.08 * rng.standard_normal(frames) + 0.06 * dim
    # What stays.
    turn, near = rng.normal(0, 1.5), rng.uniform(1.22, 1.32)
    light, contrast = rng.uniform(0.85, 1.1, 2)
    cast, noise = tuple(rng.uniform(0.96, 1.04, 3)), rng.uniform(1, 4)
    # What happens for some frames: in which share of them, for how many at least and at most.
    covers = interrupt(rng, [None] * frames, 0.10, 2, 9, lambda: cover(rng, p))
    blurs = interrupt(rng, [(0.0, 0.0)] * frames, 0.10, 2, 8, lambda: BLURS[rng.integers(len(BLURS))])
    blinks = interrupt(rng, [0.0] * frames, 0.04, 1, 3, lambda: 1.0)
    for t in range(frames):
        yield State(
            au[t], mood=acting.mood[t], blink=blinks[t], yaw=turn + 2.5 * yaw[t], roll=0.04 * roll[t],
            scale=near + 0.015 * size[t], shift=sway[t], place=place, brightness=light * flicker[t],
            contrast=contrast, cast=cast, slope=(10 * right[t], 8 * down[t]), cover=covers[t], blur=blurs[t],
            noise=noise)
