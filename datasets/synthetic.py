"""Drawn data: videos and still faces in the layouts of the real data sets (docs/data.md).

With them every stage runs, and has something to learn, without real data. A picture depends on the seed and
its number alone: the same bytes each time, with any number of processes. Reading order: synthetic_face.py
(one face), synthetic_acting.py (a video of it), then here: videos, still faces, the second paper's faces.
What draws yields (file, content): a picture, a text, an array, or a row (a list of cells) for one of LISTS.

    python -m datasets.synthetic --config configs/demo.yaml     # draws everything
"""

import copy
import json
import os
import zlib
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import ImageEnhance, ImageFilter

from datasets.faces import (AFFECTNET, AFFECTNET_COLUMNS, CLASSES, FER2013, FER2013_COLUMNS, FERPLUS,
                            FERPLUS_COLUMNS, RAF_DB)
from datasets.s_aff_wild2 import FILES, HEADER
from datasets.synthetic_acting import (CIRCUMPLEX, EPISODE, MOOD_SPREAD, Acting, act, annotate, blend, cover,
                                       interrupt, spoil)
from datasets.synthetic_face import State, background, draw_face, oval, person
from engine.checkpoints import read_json, write_text
from engine.config import from_command_line
from engine.distributed import launch
from labels import EXPRESSIONS, TASKS

TRAIN, VAL, STILL, DRAWN, REAL = 0, 1, 2, 10, 11       # kinds of people: nobody is in two of them
SPLITS = {TRAIN: "Train_Set", VAL: "Validation_Set"}
STYLES = {DRAWN: "ABAW4/drawn", REAL: "ABAW4/real"}
# Sets of still faces: share of all, and their own codes.
SETS = {"AffectNet-2017": (0.40, AFFECTNET), "AffectNet-2021": (0.20, AFFECTNET), "RAF-DB": (0.25, RAF_DB),
        "FER2013": (0.15, FER2013)}
# {list: the cells of its first row}: what many drawings have rows in.
LISTS = {"AffectNet-2017/training.csv": AFFECTNET_COLUMNS, "AffectNet-2017/validation.csv": AFFECTNET_COLUMNS,
         "RAF-DB/basic/EmoLabel/list_patition_label.txt": [], "FER2013/fer2013.csv": FER2013_COLUMNS,
         "FERPlus/fer2013new.csv": FERPLUS_COLUMNS, **{f"ABAW4/{file}": [HEADER] for file in FILES}}
COMPLETE = "ABAW4/complete.json"                       # the mark lies in what older versions drew on demand
SHARES = (.22, .12, .09, .10, .19, .12, .11, .05)      # of each expression, in the order of EXPRESSIONS
CLASS_SHARES = (.18, .13, .12, .24, .17, .16)          # of CLASSES
# What a row says where nobody annotated.
UNKNOWN = {name: ",".join([str(task.invalid)] * task.width) for name, task in TASKS.items()}


def random(sizes, *numbers) -> np.random.Generator:
    """The random numbers of one thing: the kind of its person, its number, what they are for."""
    return np.random.default_rng([sizes.seed, *numbers])


# ---- Videos. What is special about a video follows from its number, so that each fault occurs in each split.

# Split, number in it, lines of a label file, tasks that have one, where its expressions start in EPISODES.
Video = namedtuple("Video", "name split number frames tasks first")


def videos(sizes):
    """Yield every Video, those for training first. `sizes`: the section `synthetic` of the settings."""
    for split, count in zip(SPLITS, (sizes.train_videos, sizes.val_videos)):
        first = 0
        for number in range(count):
            side = {5: "_left", 6: "_right"}.get(number % 8, "")         # of each eight, two are in one film
            film = number - (side == "_right")
            code = 2 * film + 1 + split                                  # no film is in both splits
            name = (f"{code}-30-1280x720", f"{code + 120}", f"video{code}_3",
                    f"{code}-60-1920x1080-2")[film % 4] + side
            # A multiple of usual strides; as short as the shortest real video; longer; then any.
            share = random(sizes, split, film, 1).uniform(0.75, 1.5)
            frames = {0: sizes.frames, 1: min(73, sizes.frames), 2: sizes.frames * 3 // 2}.get(
                film, max(1, int(sizes.frames * share)))
            tasks = {4: ("va",), 7: ("au",), 8: ("expr", "au")}.get(number % 9, tuple(TASKS))
            yield Video(name, split, number, frames, tasks, first)
            if "expr" in tasks:
                first += round(frames / EPISODE) or 1                    # so that all of EPISODES get labels


def draw_video(sizes, video: Video):
    """Label files, rows of s-Aff-Wild2, and frames.

    Some have the faults of real videos: more images than labels, not annotated, CRLF, no face found.
    """
    n, rng = video.number, random(sizes, video.split, video.number, 2)
    acting = act(rng, video.frames + (4 if n % 5 == 2 else 0), video.first)
    labels = annotate(rng, acting)
    for task in map(TASKS.get, video.tasks):
        lines = [",".join(row) for row in labels[task.name][:video.frames]]
        if n % 4:                                                # every fourth is annotated throughout
            interrupt(rng, lines, 0.08, 10, 50, lambda: UNKNOWN[task.name])
        file = f"Aff-Wild2/annotations/{task.folders[0]}/{SPLITS[video.split]}/{video.name}.txt"
        yield file, ("\r\n" if n % 6 == 3 else "\n").join([",".join(task.outputs), *lines, ""])
    found = [True] * video.frames                                # has a frame a face?
    if n % 3 != 1:
        interrupt(rng, found, 0.06, 1, 20, lambda: False)
    yield from draw_rows(sizes, video, labels, np.array(found))
    p = person(random(sizes, video.split, video.number))
    for t, state in enumerate(spoil(rng, p, acting)):
        if t >= video.frames or found[t]:
            yield f"Aff-Wild2/cropped_aligned/{video.name}/{t + 1:05d}.jpg", draw_face(p, state, rng)


def draw_rows(sizes, video: Video, labels: dict, found: np.ndarray):
    """The rows of s-Aff-Wild2, partly labelled frames: about every third frame that has a face.

    A row: `<video>/00001.jpg`, valence, arousal, expression, 12 AUs. The labels are those of the label files,
    and there are some of the tasks that a video has no file of. Each is there or missing by chance.
    labels: as `annotate` gives them; found: bool (T,).
    """
    faces, gone = np.flatnonzero(found), np.flatnonzero(~found)
    rng = random(sizes, video.split, video.number, 3)
    chosen = faces[rng.integers(min(3, len(faces) or 1))::3].tolist()
    chosen += [t for t in gone if rng.random() < 0.01 * len(chosen) / len(gone)]     # no image
    chosen += [t for t in chosen if rng.random() < 0.01]                             # come twice
    rows = {}
    for t in chosen:
        va, expr, au = (labels[name][t].tolist() for name in TASKS)
        if rng.random() < 0.03:                                  # valence without arousal, or the reverse
            va[rng.integers(2)] = "-5"
        au = ["-1" if rng.random() < 0.03 else unit for unit in au]
        rows[t] = [f"{video.name}/{t + 1:05d}.jpg"]
        for name, known, share in zip(TASKS, (va, expr, au), (0.70, 0.65, 0.70)):
            rows[t] += known if rng.random() < share else [UNKNOWN[name]]
    for t in chosen:
        yield f"ABAW4/{FILES[video.split]}", rows[t]


# ---- Still faces, each of another person

def draw_still(sizes, number: int):
    """The still face of a number below sizes.faces: its picture, and what its set has beside it."""
    p, rng = person(random(sizes, STILL, number)), random(sizes, STILL, number, 2)
    ends = np.round(np.cumsum([share for share, _ in SETS.values()]) * sizes.faces)
    name = list(SETS)[np.searchsorted(ends, number, "right")]    # the first whose end is above the number
    codes = {label: code for code, label in SETS[name][1].items()}
    shares = np.array([share if label in codes else 0 for label, share in enumerate(SHARES)])
    k = int(rng.choice(8, p=shares / shares.sum()))
    strength = rng.uniform(0.6, 1)
    mood = MOOD_SPREAD * rng.standard_normal(2).clip(-3, 3)
    state = State(
        strength * blend(rng, EXPRESSIONS[k]), mood, yaw=rng.normal(0, 3), roll=rng.normal(0, 0.06),
        scale=rng.uniform(1.18, 1.36), shift=rng.normal(0, 2, 2), place=int(rng.integers(1000)),
        brightness=rng.uniform(0.7, 1.2), contrast=rng.uniform(0.7, 1.1), cast=rng.uniform(0.9, 1.1, 3),
        slope=rng.normal(0, 18, 2), cover=cover(rng, p) if rng.random() < 0.07 else None,
        blur=(1.2, 1.2) if rng.random() < 0.1 else (0.0, 0.0), noise=rng.uniform(1, 6))
    va = (strength * np.array(CIRCUMPLEX[EXPRESSIONS[k]]) + mood).clip(-1, 1)
    train = rng.random() < 0.85
    file = f"{number % 7 + 1}/{rng.bytes(28).hex()}.jpg"         # in AffectNet 2017
    faced = name in ("AffectNet-2021", "RAF-DB") or rng.random() >= 0.03
    again = copy.deepcopy(rng)                                   # AffectNet's code takes the noise's numbers
    picture = draw_face(p, state, rng) if faced else background(state.place).reduce(2)
    if name == "AffectNet-2017":
        code = 10 if not faced else again.integers(8, 10) if again.random() >= 0.96 else codes[k]
        va = [f"{x:.6f}" for x in va] if code == codes[k] else [-2, -2]
        landmarks = ";".join(f"{x:.1f};{y:.1f}" for x, y in oval(48, 48, 30, 38))
        yield f"{name}/Manually_Annotated_Images/{file}", picture.resize((96, 96))
        yield (f"{name}/{'training' if train else 'validation'}.csv",
               [file, 0, 0, 96, 96, landmarks, code, *va])
    elif name == "AffectNet-2021":
        folder = f"{name}/{'train' if train else 'val'}_set"
        yield f"{folder}/images/{number}.jpg", picture.resize((96, 96))
        for label, value in (("exp", codes[k]), ("val", va[0]), ("aro", va[1])):
            yield f"{folder}/annotations/{number}_{label}.npy", np.array(str(value))     # one string
    elif name == "RAF-DB":
        file = f"{'train' if train else 'test'}_{number:05d}"
        yield f"{name}/basic/Image/aligned/{file}_aligned.jpg", picture.resize((100, 100))
        yield f"{name}/basic/EmoLabel/list_patition_label.txt", [f"{file}.jpg {codes[k]}"]
    else:                                                        # FER2013: its pixels lie in its list
        usage = "Training" if train else ("PublicTest", "PrivateTest")[number % 2]
        pixels = np.asarray(picture.convert("L").resize((48, 48))).ravel()
        yield f"{name}/fer2013.csv", [codes[k], " ".join(map(str, pixels)), usage]
        # The votes of ten people. A row without a face has no name.
        shares = [0.0 if vote == "NF" else 0.85 if of == k else 0.15 / 8 for vote, of in FERPLUS.items()]
        votes = rng.multinomial(10, shares) if faced else [0] * 9 + [10]
        image = f"fer{number - int(ends[2]):07d}.png" if faced else ""
        yield "FERPlus/fer2013new.csv", [usage, image, *votes]


def draw_class_face(sizes, style: int, number: int):
    """A face in its class folder, of another person each time.

    DRAWN is as a network draws: the whole expression, frontal, in flat light before an even wall, without
    noise, smooth, in strong colours. REAL is as a video of one frame: any strength, pose, light.
    """
    p, rng = person(random(sizes, style, number)), random(sizes, style, number, 2)
    name = CLASSES[rng.choice(len(CLASSES), p=CLASS_SHARES)]
    if style == DRAWN:
        state = State(rng.uniform(0.85, 1) * blend(rng, name), scale=rng.uniform(1.22, 1.30), place=35,
                      brightness=1.1, contrast=1.1, noise=0.0)
        image = ImageEnhance.Color(draw_face(p, state, rng).filter(ImageFilter.SMOOTH)).enhance(1.8)
    else:
        strength = rng.uniform(0.6, 1)
        shown = strength * np.array(CIRCUMPLEX[name]) + MOOD_SPREAD * rng.standard_normal(2)
        acting = Acting(strength * blend(rng, name)[None], None, np.zeros((1, 2)), shown[None].clip(-1, 1))
        image = draw_face(p, next(spoil(rng, p, acting)), rng)
    folder = "ANGRER" if name == "Anger" else name.upper()       # as the challenge spells
    yield f"{STYLES[style]}/{folder}/{number:05d}.jpg", image


# ---- All of it

def write(folder: Path, drawing) -> list:
    """Write what is drawn, (file, content), into a folder. -> the rows, which belong to LISTS"""
    rows = []
    for name, content in drawing:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            rows.append((name, content))
        elif isinstance(content, str):
            path.write_text(content, newline="")
        elif isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            content.save(path, quality=90)
    return rows


def lists_of(rows):
    """LISTS, from the rows (list, cells) of all drawings, in order."""
    lists = {file: [cells] if cells else [] for file, cells in LISTS.items()}
    for file, cells in rows:
        lists[file].append(cells)
    for file, table in lists.items():
        yield file, "".join(",".join(map(str, cells)) + "\n" for cells in table)


def description(sizes) -> dict:
    """What the data depend on: their sizes and the code that draws them. The folder may be moved."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("synthetic*.py")))
    return {**asdict(sizes), "root": "", "code": zlib.crc32(code)}


def is_complete(config) -> bool:
    """Is everything drawn with these settings?"""
    return read_json(Path(config.synthetic.root, COMPLETE)) == description(config.synthetic)


def make(config, team) -> None:
    """Draw everything into synthetic.root with all processes of `team`.

    Raises ValueError if the folder holds other data: real data must not be overwritten, nor two sizes mixed.
    """
    sizes, folder, expected = config.synthetic, Path(config.synthetic.root), description(config.synthetic)
    # In this order, as another process may be writing both just now.
    if any((folder / name).exists() for name in ("Aff-Wild2", "FERPlus", "ABAW4", *SETS)) and (
            held := read_json(folder / "sizes.json")) != expected:
        raise ValueError(f"{folder} holds {held or 'data that is not synthetic'}, expected nothing or "
                         f"{expected}; draw into a new folder (synthetic.root, and the paths under data), or "
                         "delete this one")
    write_text(folder / "sizes.json", json.dumps(expected))      # before any data: data without it is real
    (folder / COMPLETE).unlink(missing_ok=True)                  # until all of it is there again
    drawings = [draw_video(sizes, video) for video in videos(sizes)]
    drawings += [draw_still(sizes, number) for number in range(sizes.faces)]
    drawings += [draw_class_face(sizes, DRAWN, number) for number in range(sizes.faces * 3 // 8)]
    drawings += [draw_class_face(sizes, REAL, number) for number in range(sizes.faces // 5)]
    shares = team.gather([write(folder, drawing) for drawing in drawings[team.rank::team.world]])
    if team.rank == 0:                                           # now every process has drawn its share
        rows = [row for i in range(len(drawings)) for row in shares[i % team.world][i // team.world]]
        write(folder, lists_of(rows))
        write_text(folder / COMPLETE, json.dumps(expected))
    team.wait()


def check_paths(config) -> None:
    """Raises ValueError if a path under `data` does not lie in synthetic.root: a stage would read other data
    than are drawn for it."""
    root = os.path.abspath(config.synthetic.root)
    for name, value in asdict(config.data).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path and not Path(os.path.abspath(path)).is_relative_to(root):
                raise ValueError(
                    f"data.{name}: {path} is not in {config.synthetic.root} (synthetic.root), where "
                    "data.synthetic=true draws; set both, or data.synthetic=false to use your own data")


if __name__ == "__main__":
    launch(make, from_command_line(__doc__)[0])
