"""Synthetic data of the second paper, in the layouts of the 4th ABAW challenge (docs/data.md).

Two lists of frames with labels of all tasks (s-Aff-Wild2), over the videos that `synthetic.py` has drawn; and
two sets of faces in class folders, one in the clean style of a face generator, one in the style of the videos'
frames. All of it depends on the seed alone: the same bytes with any number of processes.

    python synthetic_abaw4.py                       # into data/demo/ABAW4; needs `python synthetic.py` before
    python synthetic_abaw4.py --sheet pair.png      # only a sheet: each class in both styles
"""

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

import synthetic
from checkpoints import write_text
from class_folders import CLASSES
from config import from_command_line
from distributed import launch
from frames import list_frames
from labels import AU, EXPR, EXPRESSIONS, VA
from s_aff_wild2 import FILES, HEADER
from settings import Synthetic
from synthetic import Video, videos
from synthetic_acting import CIRCUMPLEX, TRAIN, VAL, Acting, act, annotate, blend, spoil
from synthetic_face import State, draw_face, person

FOLDER = "ABAW4"               # below synthetic.root
DRAWN, REAL = 10, 11           # second number of a person's seed: nobody of the videos or the still faces
CLASS_FOLDERS = ("ANGRER", "DISGUST", "FEAR", "HAPPINESS", "SADNESS", "SURPRISE")     # as the challenge has it
CLASS_SHARES = (.18, .13, .12, .24, .17, .16)

# The lists
EVERY = 3                      # frames from one row to the next
HAS_VA, HAS_EXPR, HAS_AU = 0.70, 0.65, 0.70          # rows with labels of this task
ONE_MISSING = 0.03             # single AUs, or valence without arousal, among those
REPEATED, NO_IMAGE = 0.01, 0.01                      # rows that stand there twice; whose frame has no face


# ---- The lists of frames

def rows_of(root: Path, sizes: Synthetic, video: Video) -> list[str]:
    """The rows of one video: `<video>/00001.jpg`, valence, arousal, expression, 12 AUs.

    Acted and annotated with the random numbers of `synthetic.draw_video`, so the labels are those of its
    label files. Raises ValueError if the video is not drawn.
    """
    rng = np.random.default_rng([sizes.seed, video.split, video.number, 2])
    past = 4 if video.number % 5 == 2 else 0                     # as in draw_video
    va, expression, au = annotate(rng, act(rng, video.frames + past, video.first))
    folder = root / "Aff-Wild2/cropped_aligned" / video.name
    if not folder.is_dir():
        raise ValueError(f"{folder} not found; draw the videos first: python synthetic.py")
    numbers, _, _ = list_frames(folder)
    numbers = numbers[numbers <= video.frames]
    rng = np.random.default_rng([sizes.seed, video.split, video.number, 3])
    chosen = numbers[rng.integers(min(EVERY, len(numbers))):][::EVERY].tolist()
    gone = sorted({*range(1, video.frames + 1)} - {*numbers.tolist()})
    chosen += [number for number in gone if rng.random() < NO_IMAGE * len(chosen) / len(gone)]
    chosen += [number for number in chosen if rng.random() < REPEATED]
    rows = {number: row(rng, va[number - 1], expression[number - 1], au[number - 1]) for number in chosen}
    return [f"{video.name}/{number:05d}.jpg,{rows[number]}" for number in chosen]


def row(rng, va, expression, au) -> str:
    """15 labels, of which some are missing. Shape: va (2,), expression (), au (12,)."""
    va, au = [f"{value:.3f}" for value in va], [str(unit) for unit in au]
    if rng.random() < ONE_MISSING:
        va[rng.integers(2)] = str(VA.invalid)
    au = [str(AU.invalid) if rng.random() < ONE_MISSING else unit for unit in au]
    va = va if rng.random() < HAS_VA else [str(VA.invalid)] * 2
    expression = expression if rng.random() < HAS_EXPR else EXPR.invalid
    au = au if rng.random() < HAS_AU else [str(AU.invalid)] * 12
    return ",".join([*va, str(expression), *au])


# ---- The pair of styles

def class_face(sizes: Synthetic, kind: int, number: int) -> tuple[int, Image.Image]:
    """A face of another person each time: its class in CLASSES, and the image. kind: DRAWN or REAL."""
    p = person(np.random.default_rng([sizes.seed, kind, number]))
    rng = np.random.default_rng([sizes.seed, kind, number, 2])
    k = int(rng.choice(len(CLASSES), p=CLASS_SHARES))
    return k, (clean if kind == DRAWN else filmed)(rng, p, CLASSES[k])


def clean(rng, p, expression: str) -> Image.Image:
    """As a face generator draws: the whole expression, frontal, in flat light before an even wall, smooth and
    colourful."""
    state = State(rng.uniform(0.85, 1) * blend(rng, expression), scale=rng.uniform(1.22, 1.30), place=WALL,
                  brightness=1.1, contrast=1.1, noise=0.0)
    image = draw_face(p, state, rng).filter(ImageFilter.SMOOTH)
    return ImageEnhance.Color(image).enhance(1.8)


def filmed(rng, p, expression: str) -> Image.Image:
    """A single frame as in the videos: any strength, in any light, now and then covered or blurred."""
    strength = rng.uniform(0.6, 1)
    shown = strength * np.array(CIRCUMPLEX[expression]) + 0.16 * rng.standard_normal(2)
    acting = Acting(strength * blend(rng, expression)[None], np.array([EXPRESSIONS.index(expression)]),
                    np.zeros((1, 2)), shown[None].clip(-1, 1))
    return draw_face(p, next(spoil(rng, p, acting)), rng)


WALL = 35                      # a background of one colour


def counts(sizes: Synthetic) -> dict[int, int]:
    """How many faces of each kind."""
    return {DRAWN: sizes.faces * 3 // 8, REAL: sizes.faces // 5}


def draw_class_face(root: Path, sizes: Synthetic, kind: int, number: int):
    """Write one face into its class folder."""
    k, image = class_face(sizes, kind, number)
    folder = root / FOLDER / ("drawn" if kind == DRAWN else "real") / CLASS_FOLDERS[k]
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{number:05d}.jpg", quality=90)


# ---- All of it

def description(sizes: Synthetic) -> dict:
    """What the data depend on."""
    code = zlib.crc32(Path(__file__).read_bytes())
    return {**synthetic.description(sizes), "abaw4": code}


def claim(root: Path, sizes: Synthetic):
    """Raises ValueError if the folder holds other data: real data must not be overwritten."""
    folder, mark = root / FOLDER, root / FOLDER / "sizes.json"
    if folder.exists() and any(folder.iterdir()):
        held = json.loads(mark.read_text()) if mark.exists() else "data that is not synthetic"
        if held != description(sizes):
            raise ValueError(f"{folder} holds {held}, expected nothing or {description(sizes)}; draw into a "
                             "new folder (synthetic.root, and the paths under data), or delete this one")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(description(sizes)))
    (folder / "complete.json").unlink(missing_ok=True)


def is_complete(root, sizes: Synthetic) -> bool:
    """Has `make` finished here, with these sizes?"""
    try:
        return json.loads((Path(root) / FOLDER / "complete.json").read_text()) == description(sizes)
    except (OSError, ValueError):
        return False


def make(config, team):
    """Write everything with all processes of `team`. Raises ValueError if the folder holds other data, or if
    the videos are not drawn."""
    sizes, root = config.synthetic, Path(config.synthetic.root)
    problem = ""
    if team.rank == 0:
        try:
            claim(root, sizes)
        except ValueError as refusal:
            problem = str(refusal)
    problem = team.agree(problem)
    if problem:
        raise ValueError(problem)
    for kind, count in counts(sizes).items():
        for number in range(team.rank, count, team.world):
            draw_class_face(root, sizes, kind, number)
    if team.rank == 0:
        for split, file in zip((TRAIN, VAL), FILES):
            rows = [row for video in videos(sizes) if video.split == split for row in rows_of(root, sizes, video)]
            write_text(root / FOLDER / file, "\n".join([HEADER, *rows, ""]))
    team.wait()
    if team.rank == 0:
        write_text(root / FOLDER / "complete.json", json.dumps(description(sizes)))
    team.wait()


def make_sheet(config, team, path):
    """A row for each class: five clean faces, then five filmed ones."""
    sheet = Image.new("RGB", (10 * 112, 6 * 112))
    columns = {}
    for kind, left in ((DRAWN, 0), (REAL, 5)):
        for number in range(200):
            k, image = class_face(config.synthetic, kind, number)
            column = columns.setdefault((kind, k), [])
            if len(column) < 5:
                sheet.paste(image, ((left + len(column)) * 112, k * 112))
                column.append(number)
    sheet.save(path)


if __name__ == "__main__":
    sheet = {"metavar": "FILE", "help": "write only a contact sheet, a .png or .jpg file"}
    config, options = from_command_line(__doc__, sheet=sheet)
    if options.sheet is None:
        launch(make, config)
    else:
        launch(make_sheet, config, options.sheet)
