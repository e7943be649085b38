"""Synthetic data of the second paper, in the layouts of the 4th ABAW challenge (docs/data.md).

Two lists of frames with labels of all three tasks (s-Aff-Wild2), over the videos that `synthetic.py` has
drawn. And two sets of faces in class folders, in two styles: clean as a network draws them, and as in a frame
of a video. Everything depends on the seed alone: the same bytes with any number of processes.

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
from synthetic_acting import CIRCUMPLEX, MOOD_SPREAD, TRAIN, VAL, Acting, act, annotate, blend, spoil
from synthetic_face import SIDE, Person, State, draw_face, person

FOLDER = "ABAW4"               # below synthetic.root

# The lists. Each label is there or missing by chance, for itself.
EVERY = 3                      # frames with a face from one row to the next
HAS_VA, HAS_EXPR, HAS_AU = 0.70, 0.65, 0.70          # rows that have labels of this task
ONE_MISSING = 0.03             # of those: valence without arousal or the reverse; each AU missing alone
REPEATED = 0.01                # rows that are there twice
NO_IMAGE = 0.01                # rows whose frame is not there, because no face was found in it

# The pair of styles
DRAWN, REAL = 10, 11           # second number of a person's seed: nobody of the videos or the still faces
STYLES = {DRAWN: "drawn", REAL: "real"}
CLASS_FOLDERS = ("ANGRER", "DISGUST", "FEAR", "HAPPINESS", "SADNESS", "SURPRISE")    # as the challenge spells
CLASS_SHARES = (.18, .13, .12, .24, .17, .16)
WALL = 35                      # a background of one colour
ON_SHEET = 5                   # faces of each class and style on the contact sheet


# ---- The lists of frames

def rows_of(root: Path, sizes: Synthetic, video: Video) -> list[str]:
    """The rows of a drawn video: `<video>/00001.jpg`, valence, arousal, expression, 12 AUs.

    Acted and annotated with the random numbers of `synthetic.draw_video`: where a label file has a label of
    the frame, it is the same. A list also has labels of the tasks that the video has no file of.
    """
    rng = np.random.default_rng([sizes.seed, video.split, video.number, 2])
    frames_past_the_labels = 4 if video.number % 5 == 2 else 0
    va, expression, au = annotate(rng, act(rng, video.frames + frames_past_the_labels, video.first))
    numbers, _, _ = list_frames(root / "Aff-Wild2/cropped_aligned" / video.name)
    faces = numbers[numbers <= video.frames].tolist()            # not those after the last label
    if not faces:
        return []
    rng = np.random.default_rng([sizes.seed, video.split, video.number, 3])
    first = rng.integers(min(EVERY, len(faces)))
    chosen = faces[first::EVERY]
    gone = sorted(set(range(1, video.frames + 1)) - set(faces))
    chosen += [number for number in gone if rng.random() < NO_IMAGE * len(chosen) / len(gone)]
    chosen += [number for number in chosen if rng.random() < REPEATED]
    labels = {number: partly(rng, va[number - 1], expression[number - 1], au[number - 1])
              for number in chosen}                              # a row that repeats another has its labels
    return [f"{video.name}/{number:05d}.jpg,{labels[number]}" for number in chosen]


def partly(rng, va, expression, au) -> str:
    """The 15 labels of a row, of which some are missing. Shape: va (2,), expression (), au (12,)."""
    va, au = [f"{value:.3f}" for value in va], [str(unit) for unit in au]
    if rng.random() < ONE_MISSING:
        va[rng.integers(2)] = str(VA.invalid)
    au = [str(AU.invalid) if rng.random() < ONE_MISSING else unit for unit in au]
    if rng.random() >= HAS_VA:
        va = [str(VA.invalid)] * 2
    if rng.random() >= HAS_EXPR:
        expression = EXPR.invalid
    if rng.random() >= HAS_AU:
        au = [str(AU.invalid)] * 12
    return ",".join([*va, str(expression), *au])


def write_lists(root: Path, sizes: Synthetic) -> None:
    """The list of the training videos and that of the validation videos."""
    for split, file in zip((TRAIN, VAL), FILES):
        lines = [HEADER]
        for video in videos(sizes):
            if video.split == split:
                lines += rows_of(root, sizes, video)
        write_text(root / FOLDER / file, "\n".join([*lines, ""]))


# ---- The pair of styles

def counts(sizes: Synthetic) -> dict[int, int]:
    """How many faces of each style."""
    return {DRAWN: sizes.faces * 3 // 8, REAL: sizes.faces // 5}


def class_face(sizes: Synthetic, style: int, number: int) -> tuple[int, Image.Image]:
    """A face, of another person each time: its class in CLASSES, and the image."""
    p = person(np.random.default_rng([sizes.seed, style, number]))
    rng = np.random.default_rng([sizes.seed, style, number, 2])
    k = int(rng.choice(len(CLASSES), p=CLASS_SHARES))
    return k, (clean if style == DRAWN else filmed)(rng, p, CLASSES[k])


def clean(rng, p: Person, expression: str) -> Image.Image:
    """As a network draws: the whole expression, frontal, in flat light before an even wall, without noise,
    smooth, in strong colours."""
    state = State(rng.uniform(0.85, 1) * blend(rng, expression), scale=rng.uniform(1.22, 1.30), place=WALL,
                  brightness=1.1, contrast=1.1, noise=0.0)
    image = draw_face(p, state, rng).filter(ImageFilter.SMOOTH)
    return ImageEnhance.Color(image).enhance(1.8)


def filmed(rng, p: Person, expression: str) -> Image.Image:
    """As a frame of a video of one frame: any strength, pose, light, background and noise; rarely covered or
    blurred."""
    strength = rng.uniform(0.6, 1)
    shown = strength * np.array(CIRCUMPLEX[expression]) + MOOD_SPREAD * rng.standard_normal(2)
    acting = Acting(strength * blend(rng, expression)[None], np.array([EXPRESSIONS.index(expression)]),
                    np.zeros((1, 2)), shown[None].clip(-1, 1))
    return draw_face(p, next(spoil(rng, p, acting)), rng)


def draw_class_face(root: Path, sizes: Synthetic, style: int, number: int) -> None:
    """Write one face into its class folder."""
    k, image = class_face(sizes, style, number)
    folder = root / FOLDER / STYLES[style] / CLASS_FOLDERS[k]
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{number:05d}.jpg", quality=90)


# ---- All of it

def description(sizes: Synthetic) -> dict:
    """What the data depend on: what the videos depend on, and this file."""
    return {**synthetic.description(sizes), "abaw4": zlib.crc32(Path(__file__).read_bytes())}


def claim(root: Path, sizes: Synthetic) -> None:
    """Refuse to draw without the videos, or over other data, which may be real.

    Raises ValueError if `root` does not hold the videos of these sizes, or if ABAW4 in it holds anything but
    what is drawn here.
    """
    folder, mark = root / FOLDER, root / FOLDER / "sizes.json"
    if folder.is_dir() and any(folder.iterdir()):
        held = json.loads(mark.read_text()) if mark.exists() else "data that is not synthetic"
        if held != description(sizes):
            raise ValueError(f"{folder} holds {held}, expected nothing or {description(sizes)}; draw into a "
                             "new folder (synthetic.root, and the paths under data), or delete this one")
    if not synthetic.is_complete(root, sizes):
        raise ValueError(f"{root} does not hold the videos that the lists are about; draw them first, with "
                         "the same settings: python synthetic.py")
    folder.mkdir(exist_ok=True)
    write_text(mark, json.dumps(description(sizes)))             # before any data: data without it is real
    (folder / "complete.json").unlink(missing_ok=True)           # until all of it is there again


def is_complete(root, sizes: Synthetic) -> bool:
    """Has `make` finished here, with these sizes?"""
    try:
        return json.loads((Path(root) / FOLDER / "complete.json").read_text()) == description(sizes)
    except (OSError, ValueError):
        return False


def make(config, team) -> None:
    """Draw everything into ABAW4 in synthetic.root with all processes of `team` (distributed.Team).

    Raises ValueError, on each process, if the videos are not drawn or the folder holds other data.
    """
    root, sizes = Path(config.synthetic.root), config.synthetic
    refusal = ""
    if team.rank == 0:
        try:
            claim(root, sizes)
        except ValueError as error:
            refusal = str(error)
    refusal = team.agree(refusal)
    if refusal:
        raise ValueError(refusal)
    for style, count in counts(sizes).items():
        for number in range(team.rank, count, team.world):
            draw_class_face(root, sizes, style, number)
    team.wait()
    if team.rank == 0:
        write_lists(root, sizes)
        write_text(root / FOLDER / "complete.json", json.dumps(description(sizes)))
    team.wait()


def make_sheet(config, team, path) -> None:
    """Write a contact sheet, a row for each class: clean faces on the left, filmed ones on the right.

    Raises ValueError if `path` is no .png or .jpg file, or cannot be written.
    """
    if team.rank:
        return
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{path}: a contact sheet is a .png or .jpg file; try pair.png")
    out = Image.new("RGB", (2 * ON_SHEET * SIDE, len(CLASSES) * SIDE))
    for left, style in enumerate((DRAWN, REAL)):
        number, found = 0, [0] * len(CLASSES)
        while min(found) < ON_SHEET:
            k, image = class_face(config.synthetic, style, number)
            if found[k] < ON_SHEET:
                out.paste(image, ((left * ON_SHEET + found[k]) * SIDE, k * SIDE))
            number, found[k] = number + 1, found[k] + 1
    try:
        out.save(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    sheet = {"metavar": "FILE", "help": "write only a contact sheet, a .png or .jpg file"}
    config, options = from_command_line(__doc__, sheet=sheet)
    if options.sheet is None:
        launch(make, config)
    else:
        launch(make_sheet, config, options.sheet)
