"""Drawn videos and still faces in the layouts of the real data sets, so that every stage runs, and has something to learn,
with no real data.

A video is one person acting out expressions built from action units as in EMFACS, with the faults of real recordings: blur,
hands, missing faces, frames nobody annotated, annotators who react late. One frame is often not enough to tell; a second is.
Everything depends on (seed, number of the video or face) alone: the same bytes each time, with any number of processes.
Read `drawing.py` first; then here: constants, the acting, the files.

    python synthetic.py                          # all data sets of the demo, into data/demo
    python synthetic.py --sheet faces.png        # only a contact sheet: expressions, single action units, spoiled frames
"""

import csv
import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import drawing
import training
from config import Drawn, from_command_line
from data import EXPRESSIONS
from drawing import AUS, SIDE, Person, State, background, draw_face, mix, oval, person

# How hard the videos are. Times are in frames, at about 10 a second: everything goes three times as fast as in real
# videos, so that a few thousand frames hold a few hundred expressions.
JITTER = 0.12                  # deviation of what a single frame shows of an action unit, around its true intensity
OCCLUSION_SHARE = 0.13         # frames with a hand, a scarf or a strand of hair over part of the face
BLUR_SHARE = 0.13              # frames blurred by motion or focus
FLICKER = 0.08                 # deviation of a single frame's brightness
SHAKE = 0.7                    # pixels by which the alignment of neighbouring frames differs
EPISODE = 36                   # frames from one expression to the next
TWITCHES = 1.2                 # single action units per 100 frames that belong to no expression
AU_THRESHOLD = 0.35            # intensity from which an annotator marks an action unit
EXPR_THRESHOLD = 0.35          # the same for the envelope of an expression
LABEL_LAG = (3, 6)             # an annotator with a joystick follows the face this late
MOOD_SPREAD = 0.16             # deviation of a slow valence and arousal that no expression explains
VA_NOISE = 0.05                # deviation of the smooth error of a valence or arousal annotation

# Action units of each expression (EMFACS), variants side by side; then where it lies in (valence, arousal).
PROTOTYPES = {
    "Neutral": [{}],
    "Anger": [{4: 1, 7: .9, 23: .95}, {4: 1, 7: .85, 24: .95}, {4: .95, 7: .85, 10: .75, 23: .85, 25: .8}],
    "Disgust": [{4: .8, 10: 1, 15: .8}, {7: .85, 10: 1, 25: .75}, {4: .75, 10: .95, 15: .9}],
    "Fear": [{1: 1, 2: .8, 4: .85, 25: .85}, {1: .95, 2: .75, 4: .9, 7: .75, 25: .85, 26: .75}],
    "Happiness": [{6: .9, 12: 1}, {6: .95, 12: 1, 25: .9}, {6: .75, 12: .9, 25: .8, 26: .75}],
    "Sadness": [{1: .95, 4: .8, 15: .95}, {1: .9, 4: .75, 15: .9, 24: .75}],
    "Surprise": [{1: .95, 2: .95, 25: .9, 26: .95}, {1: .9, 2: 1, 25: .85, 26: .75}],
    "Other": [{1: .8, 24: .95}, {4: .9, 12: .9}, {10: .9, 25: .8, 26: .85}, {2: .95, 23: .95}, {7: .95, 26: .8}],
}
CIRCUMPLEX = {"Neutral": (0, 0), "Anger": (-.6, .65), "Disgust": (-.65, .3), "Fear": (-.45, .75), "Happiness": (.75, .35),
              "Sadness": (-.7, -.4), "Surprise": (.2, .8), "Other": (.05, .15)}
EPISODES = ("Other", "Happiness", "Fear", "Sadness", "Other", "Anger", "Surprise", "Disgust", "Other", "Happiness", "Fear",
            "Anger", "Sadness", "Surprise", "Disgust")     # dealt round and round, so that no class runs short in a split

DEMO_SECONDS = 21     # measured by benchmark.py on two cores


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
    units = np.array([variant.get(unit, 0.0) for unit in AUS]) * rng.uniform(0.8, 1.15, 12)
    units[rng.random(12) < 0.07] *= 0.3
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
    """How many expressions a video shows."""
    return max(1, round(frames / EPISODE))


def act(rng, frames: int, first: int) -> Acting:
    """Play expressions, from number `first` of EPISODES on, in any order and with pauses between them."""
    au, expression = np.zeros((frames, 12)), np.zeros(frames, int)
    mood = (MOOD_SPREAD * wander(rng, frames, 10, 2)).T.clip(-1, 1)          # (2, T) -> (T, 2)
    shown, habit = mood.copy(), rng.uniform(0.8, 1.15, 12)                   # habit: a person's own strength in each unit
    deal = [EPISODES[(first + i) % len(EPISODES)] for i in range(episodes(frames))]
    slot = frames / len(deal)
    for i, name in enumerate(rng.permutation(deal).tolist()):
        length, rise, fall = slot * rng.uniform(0.68, 0.95), rng.uniform(0.12, 0.25), rng.uniform(0.15, 0.3)
        start = slot * i + rng.uniform(0, slot - length)
        e = rng.uniform(0.85, 1.0) * envelope(frames, start, length * rise, length * (1 - rise - fall), length * fall)
        au += e[:, None] * habit * blend(rng, name)
        shown += e[:, None] * (CIRCUMPLEX[name] + 0.12 * rng.standard_normal(2))
        expression[e > EXPR_THRESHOLD] = EXPRESSIONS.index(name)
    for _ in range(rng.poisson(TWITCHES * frames / 100)):
        unit = rng.integers(12) if rng.random() < 0.7 else AUS.index(25)     # lips part most often, as in speech
        au[:, unit] += rng.uniform(0.4, 0.9) * envelope(frames, rng.uniform(0, frames), 2, rng.uniform(2, 12), 3)
    return Acting(au.clip(0, 1), expression, mood, shown.clip(-1, 1))


def annotate(rng, acting: Acting):
    """What annotators write down: valence and arousal (T, 2), expression (T,), action units (T, 12) of 0 and 1."""
    frames, lag = len(acting.au), int(rng.integers(LABEL_LAG[0], LABEL_LAG[1] + 1))
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 2) ** 2)                    # a joystick moves smoothly
    late = np.pad(acting.shown, ((lag + 12, 12), (0, 0)), "edge")[:frames + 24]
    va = np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in late.T], 1)     # (T, 2)
    va += VA_NOISE * wander(rng, frames, 4, 2).T
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
    yaw, roll, dx, dy = wander(rng, frames, 5, 4) * energy
    size, dim, right, low = wander(rng, frames, 16, 4)
    shake, flicker = SHAKE * rng.standard_normal((frames, 2)), 1 + FLICKER * rng.standard_normal(frames) + 0.06 * dim
    turn, near, light = rng.normal(0, 1.5), rng.uniform(1.22, 1.32), rng.uniform(0.85, 1.1)
    contrast, cast, noise = rng.uniform(0.85, 1.1), tuple(rng.uniform(0.96, 1.04, 3)), rng.uniform(1, 4)
    covers, blurs, blinks = [None] * frames, [(0.0, 0.0)] * frames, np.zeros(frames)
    for a, b in bursts(rng, frames, OCCLUSION_SHARE, 2, 12):
        covers[a:b] = [cover(rng, p)] * (b - a)
    for a, b in bursts(rng, frames, BLUR_SHARE, 2, 10):
        blurs[a:b] = [[(5.0, 0.5), (0.5, 4.0), (2.5, 2.5), (4.0, 1.5)][rng.integers(4)]] * (b - a)
    for a, b in bursts(rng, frames, 0.04, 1, 3):
        blinks[a:b] = 1
    for t in range(frames):
        yield State(au[t], *acting.mood[t], blinks[t], turn + 2.5 * yaw[t], 0.04 * roll[t], near + 0.015 * size[t],
                    (dx[t] + shake[t, 0], dy[t] + shake[t, 1]), place, light * flicker[t], contrast, cast,
                    (10 * right[t], 8 * low[t]), covers[t], blurs[t], noise)


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
    """One video, before it is drawn."""
    name: str
    split: int                 # TRAIN or VAL
    number: int                # within the split
    frames: int                # lines of a label file
    tasks: tuple               # keys of TASKS
    first: int                 # where its expressions start in EPISODES


def videos(sizes: Drawn) -> list:
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
            frames = {0: sizes.frames, 1: min(73, sizes.frames), 2: sizes.frames * 3 // 2}.get(n, max(1, int(sizes.frames * length)))
            tasks = {4: ("VA",), 7: ("AU",), 8: ("EXPR", "AU")}.get(n % 9, ("VA", "EXPR", "AU"))
            out.append(Video(name, split, n, frames, tasks, first))
            first += episodes(frames) * ("EXPR" in tasks)
    return out


def draw_video(root: Path, sizes: Drawn, video: Video) -> None:
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


def still(sizes: Drawn, number: int) -> Still:
    """The still face of a number below sizes.faces, the same one each time."""
    p = person(np.random.default_rng([sizes.seed, STILL, number]))
    rng = np.random.default_rng([sizes.seed, STILL, number, 2])
    group = list(SETS)[int((number >= np.round(np.cumsum([*SETS.values()]) * sizes.faces)).sum())]
    shares = np.array([.22, .12, .09, .1, .19, .12, .11, .05 * group.startswith("Affect")])
    k, strength = int(rng.choice(8, p=shares / shares.sum())), rng.uniform(0.6, 1)
    mood = MOOD_SPREAD * rng.standard_normal(2).clip(-3, 3)
    state = State(strength * blend(rng, EXPRESSIONS[k]), *mood, yaw=rng.normal(0, 3), roll=rng.normal(0, 0.06),
                  scale=rng.uniform(1.18, 1.36), shift=tuple(rng.normal(0, 2, 2)), place=int(rng.integers(1000)),
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


def description(sizes: Drawn) -> dict:
    """What a drawing depends on: its sizes and the code that drew it."""
    code = b"".join(Path(module).read_bytes() for module in (drawing.__file__, __file__))
    return {**dataclasses.asdict(sizes), "root": "", "code": zlib.crc32(code)}


def claim(root: Path, sizes: Drawn, rank: int) -> None:
    """Refuse a folder with other data in it: real data must not be overwritten, nor two drawings mixed.

    Raises ValueError if `root` holds a data set that was not drawn, or a drawing of other sizes.
    """
    mark = root / "sizes.json"
    if any((root / name).exists() for name in ("Aff-Wild2", "FERPlus", *SETS)):
        held = json.loads(mark.read_text()) if mark.exists() else "data that was not drawn"
        if held != description(sizes):
            raise ValueError(f"{root} holds {held}, expected nothing or {description(sizes)}; "
                             "draw into a new folder (drawn.root, and the paths under data), or delete this one")
    write_json(mark, sizes, rank)                                            # before any data: data without it is not ours
    (root / "complete.json").unlink(missing_ok=True)                         # until index has run again


def draw(root, sizes: Drawn, rank: int = 0, world: int = 1) -> None:
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


def index(root, sizes: Drawn) -> None:
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
    """A CSV file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_json(path: Path, sizes: Drawn, rank: int = 0) -> None:
    """Under a temporary name, then renamed: nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{rank}")
    part.write_text(json.dumps(description(sizes)))
    os.replace(part, path)


def is_complete(root, sizes: Drawn) -> bool:
    """Has `index` finished here, with these sizes?"""
    try:
        return json.loads((Path(root) / "complete.json").read_text()) == description(sizes)
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
    draw(config.drawn.root, config.drawn, team.rank, team.world)
    team.wait()
    if team.rank == 0:
        index(config.drawn.root, config.drawn)
    team.wait()


def provide(config, team):
    """With `data.drawn`, draw the data if it is not there yet; otherwise do nothing.

    Raises ValueError if a path under `data` lies elsewhere: a stage would read other data than were drawn for it.
    """
    if config.data.drawn:
        root = os.path.abspath(config.drawn.root)
        for name, value in training.settings_of(config, "data", without=["data.drawn"]).items():
            for path in value if isinstance(value, list) else [value]:
                if path and not Path(os.path.abspath(path)).is_relative_to(root):
                    raise ValueError(f"{name}: {path} is not in {config.drawn.root} (drawn.root), where data.drawn=true draws; "
                                     "set both, or data.drawn=false to use your own data")
        missing = "" if is_complete(config.drawn.root, config.drawn) else Path(config.drawn.root) / "complete.json"
        training.provide(config, team, missing, make, "python synthetic.py", DEMO_SECONDS)


if __name__ == "__main__":
    config, options = from_command_line(__doc__, sheet={"metavar": "FILE", "help": "write a contact sheet instead"})
    if options.sheet:
        sheet().save(options.sheet)
    else:
        training.launch(make, config)
