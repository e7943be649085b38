"""Synthetic faces that act: expressions that come and go, what annotators write down, what spoils a frame.

A person shows expressions built from action units as in EMFACS, with the faults of real recordings: blur,
hands before the face, annotators who react late. One frame is often not enough to tell the expression; a
second of them is. Read `synthetic_face.py` first. `synthetic.py` writes the videos to disk.

    python synthetic_acting.py     # one acted video as a table: what its annotators write down
"""

from dataclasses import dataclass

import numpy as np

from labels import AUS, EXPRESSIONS
from synthetic_face import Person, State, mix, oval, person

TRAIN, VAL, STILL = range(3)   # second number of a person's seed, so that nobody is in two of the groups

# How hard the videos are. Times are in frames, at about 10 a second. Everything is three times as fast as in
# real videos, so that a few thousand frames hold a few hundred expressions.
JITTER = 0.12                  # deviation of what one frame shows of an action unit from its true intensity
OCCLUSION_SHARE = 0.13         # frames with a hand, a scarf or a strand of hair over part of the face
BLUR_SHARE = 0.13              # frames blurred by motion or focus
BLINK_SHARE = 0.04             # frames with closed eyes
FLICKER = 0.08                 # deviation of a single frame's brightness
SHAKE = 0.7                    # pixels by which the alignment of neighbouring frames differs
EPISODE = 36                   # frames from one expression to the next
TWITCHES = 1.2                 # single action units per 100 frames that belong to no expression
AU_THRESHOLD = 0.35            # intensity from which an annotator marks an action unit
EXPR_THRESHOLD = 0.35          # the same for the envelope of an expression
LABEL_LAG = (3, 6)             # frames, at least and at most, by which an annotator's joystick is late
MOOD_SPREAD = 0.16             # deviation of a slow valence and arousal that no expression explains
VA_NOISE = 0.05                # deviation of the smooth error of a valence or arousal annotation
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
              {7: .95, 26: .8}],
}
# Expression -> (valence, arousal).
CIRCUMPLEX = {"Neutral": (0, 0), "Anger": (-.6, .65), "Disgust": (-.65, .3), "Fear": (-.45, .75),
              "Happiness": (.75, .35), "Sadness": (-.7, -.4), "Surprise": (.2, .8), "Other": (.05, .15)}
# Videos take their expressions from this list in turn, again and again, so that no split lacks a class.
EPISODES = ("Other", "Happiness", "Fear", "Sadness", "Other", "Anger", "Surprise", "Disgust", "Other",
            "Happiness", "Fear", "Anger", "Sadness", "Surprise", "Disgust")


@dataclass
class Acting:
    """The truth of a video of T frames, before anything spoils it."""
    au: np.ndarray             # (T, 12) intensities
    expression: np.ndarray     # (T,) index into EXPRESSIONS
    mood: np.ndarray           # (T, 2) valence and arousal that no expression explains
    shown: np.ndarray          # (T, 2) valence and arousal of the face: mood and expression


def blend(rng, expression: str) -> np.ndarray:
    """Action units of one showing of an expression, (12,): a variant, some of it weak, at times one unit
    more."""
    variants = PROTOTYPES[expression]
    variant = variants[rng.integers(len(variants))]
    units = np.array([variant.get(number, 0.0) for number in AUS])
    units *= rng.uniform(0.8, 1.15, 12)
    units[rng.random(12) < 0.07] *= 0.3
    if rng.random() < 0.3:
        units[rng.integers(12)] += rng.uniform(0.3, 0.7)
    return units.clip(0, 1)


def wander(rng, frames: int, width: float, rows: int) -> np.ndarray:
    """Smooth noise of unit deviation, (rows, frames): white noise under a Gaussian of `width` frames."""
    reach = int(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= np.sqrt((kernel ** 2).sum())
    noise = rng.standard_normal((rows, frames + 2 * reach))
    return np.stack([np.convolve(row, kernel, "valid") for row in noise])    # (rows, frames)


def envelope(frames: int, start: float, rise: float, hold: float, fall: float) -> np.ndarray:
    """0, a smooth rise to 1, a hold, a smooth fall: (frames,)."""
    corners = np.cumsum([start, rise, hold, fall])
    ramp = np.interp(np.arange(frames), corners, [0, 1, 1, 0])
    return ramp * ramp * (3 - 2 * ramp)


def bursts(rng, frames: int, share: float, shortest: int, longest: int) -> list:
    """Random stretches (start, stop) of frames that cover about `share` of them. They may overlap."""
    mean_length = (shortest + longest) / 2
    count = rng.poisson(share * frames / mean_length)
    starts = rng.integers(0, frames, count)
    lengths = rng.integers(shortest, longest + 1, count)
    stops = np.minimum(starts + lengths, frames)
    return list(zip(starts.tolist(), stops.tolist()))


def episodes(frames: int) -> int:
    """How many expressions a video shows."""
    return max(1, round(frames / EPISODE))


def act(rng, frames: int, first: int) -> Acting:
    """Play the expressions of EPISODES from number `first` on, in random order and with pauses between them.

    Each expression has an onset, a hold and an offset.
    """
    au = np.zeros((frames, 12))
    expression = np.zeros(frames, int)
    mood = MOOD_SPREAD * wander(rng, frames, 10, 2).T            # (2, T) -> (T, 2)
    mood = mood.clip(-1, 1)
    shown = mood.copy()
    habit = rng.uniform(0.8, 1.15, 12)                           # the person's own strength in each unit
    count = episodes(frames)
    names = [EPISODES[(first + i) % len(EPISODES)] for i in range(count)]
    slot = frames / count
    for i, name in enumerate(rng.permutation(names).tolist()):
        length = slot * rng.uniform(0.68, 0.95)
        rise = rng.uniform(0.12, 0.25)
        fall = rng.uniform(0.15, 0.3)
        start = slot * i + rng.uniform(0, slot - length)
        strength = rng.uniform(0.85, 1.0)
        e = strength * envelope(frames, start, length * rise, length * (1 - rise - fall), length * fall)
        au += e[:, None] * habit * blend(rng, name)              # (T, 1) * (12,) -> (T, 12)
        shown += e[:, None] * (CIRCUMPLEX[name] + 0.12 * rng.standard_normal(2))
        expression[e > EXPR_THRESHOLD] = EXPRESSIONS.index(name)
    for _ in range(rng.poisson(TWITCHES * frames / 100)):
        lips_part = rng.random() >= 0.7                          # most often of all, as in speech
        unit = AUS.index(25) if lips_part else rng.integers(12)
        strength = rng.uniform(0.4, 0.9)
        start = rng.uniform(0, frames)
        au[:, unit] += strength * envelope(frames, start, rise=2, hold=rng.uniform(2, 12), fall=3)
    return Acting(au.clip(0, 1), expression, mood, shown.clip(-1, 1))


def annotate(rng, acting: Acting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What annotators write down: valence and arousal (T, 2), expression (T,), action units (T, 12) of 0
    and 1."""
    frames = len(acting.au)
    lag = int(rng.integers(LABEL_LAG[0], LABEL_LAG[1] + 1))
    reach = 12
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / 2) ** 2)  # a joystick moves smoothly
    kernel /= kernel.sum()
    late = np.pad(acting.shown, ((lag + reach, reach), (0, 0)), "edge")
    late = late[:frames + 2 * reach]                             # its row reach + t is frame t - lag
    va = np.stack([np.convolve(column, kernel, "valid") for column in late.T], 1)    # (T, 2)
    va += VA_NOISE * wander(rng, frames, 4, 2).T
    return va.clip(-1, 1), acting.expression, (acting.au > AU_THRESHOLD).astype(int)


def cover(rng, p: Person):
    """A hand, a scarf or a strand of hair over part of the face: (points, colour)."""
    kind = ("hand", "scarf", "hair")[rng.integers(3)]
    if kind == "hand":
        hand = oval(rng.uniform(-14, 14), rng.uniform(14, 34), rng.uniform(13, 22), rng.uniform(9, 14))
        return hand, mix(p.skin, (60, 20, 10), 0.15)
    if kind == "scarf":
        y = rng.uniform(12, 22)
        scarf = np.array([(-60, y), (0, y - 4), (60, y + 4), (60, 70), (-60, 70)])
        return scarf, tuple(rng.integers(20, 220, 3).tolist())
    x, lean, half = rng.uniform(-25, 25), rng.uniform(-20, 20), rng.uniform(6, 13)
    strand = np.array([(x - half, -70), (x + half, -70), (x + lean + half, 5), (x + lean - half, 5)])
    return strand, p.hair


def spoil(rng, p: Person, acting: Acting):
    """Yield the states of a video's frames: the acting, jittered, moved, lit, covered and blurred."""
    frames = len(acting.au)
    # What differs from frame to frame.
    place = int(rng.integers(1000))
    tremor = JITTER * np.where(acting.au > 0.1, 1, 0.35)         # (T, 12): a unit at rest trembles less
    au = (acting.au + tremor * rng.standard_normal((frames, 12))).clip(0, 1)
    arousal = acting.shown[:, 1]
    energy = 0.25 + 0.6 * (arousal + 0.4).clip(0)                # (T,): the aroused move more
    yaw, roll, dx, dy = wander(rng, frames, 5, 4) * energy       # (4, T) -> four of (T,)
    size, dim, right, down = wander(rng, frames, 16, 4)
    shake = SHAKE * rng.standard_normal((frames, 2))
    flicker = 1 + FLICKER * rng.standard_normal(frames) + 0.06 * dim
    # What stays.
    turn = rng.normal(0, 1.5)
    near = rng.uniform(1.22, 1.32)
    light = rng.uniform(0.85, 1.1)
    contrast = rng.uniform(0.85, 1.1)
    cast = tuple(rng.uniform(0.96, 1.04, 3))
    noise = rng.uniform(1, 4)
    # What happens for a few frames.
    covers = [None] * frames
    for start, stop in bursts(rng, frames, OCCLUSION_SHARE, 2, 12):
        covers[start:stop] = [cover(rng, p)] * (stop - start)
    blurs = [(0.0, 0.0)] * frames
    for start, stop in bursts(rng, frames, BLUR_SHARE, 2, 10):
        blurs[start:stop] = [BLURS[rng.integers(len(BLURS))]] * (stop - start)
    blinks = np.zeros(frames)
    for start, stop in bursts(rng, frames, BLINK_SHARE, 1, 3):
        blinks[start:stop] = 1
    for t in range(frames):
        yield State(
            au[t], valence=acting.mood[t, 0], arousal=acting.mood[t, 1], blink=blinks[t],
            yaw=turn + 2.5 * yaw[t], roll=0.04 * roll[t], scale=near + 0.015 * size[t],
            shift=(dx[t] + shake[t, 0], dy[t] + shake[t, 1]), place=place,
            brightness=light * flicker[t], contrast=contrast, cast=cast,
            slope=(10 * right[t], 8 * down[t]), cover=covers[t], blur=blurs[t], noise=noise)


def sheet() -> list:
    """Rows of 12 (person, state): a row per expression; each action unit alone, of two people; spoiled
    frames."""
    rng = np.random.default_rng(0)
    people = [person(np.random.default_rng([0, VAL, n])) for n in range(12)]
    rows = [[(p, State(0.95 * blend(rng, name))) for p in people] for name in EXPRESSIONS]
    for p in people[1:3]:
        rows.append([(p, State(unit)) for unit in np.eye(12)])
    states = spoil(rng, people[3], act(rng, 1000, 0))
    spoiled = [state for state in states if state.cover or max(state.blur) > 0]
    every = len(spoiled) // 12
    rows.append([(people[3], state) for state in spoiled[::every][:12]])
    return rows


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    va, expression, au = annotate(rng, act(rng, 5 * EPISODE, 0))
    lines = ["frame  expression  valence  arousal  action units"]
    for t in range(0, len(va), 6):
        active = " ".join(str(number) for number, on in zip(AUS, au[t]) if on)
        name = EXPRESSIONS[expression[t]]
        lines.append(f"{t + 1:5d}  {name:10s}{va[t, 0]:9.2f}{va[t, 1]:9.2f}  {active}")
    print("\n".join(lines))
