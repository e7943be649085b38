"""Synthetic still faces in the layouts of AffectNet (2017 and 2021), RAF-DB and FER2013 with FER+.

Each face is another person. A face depends on the seed and its number alone. Read `synthetic_acting.py`
first; `faces.py` reads what this file writes.

    python synthetic_stills.py     # how many of 1000 faces each set gets, by expression
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from labels import EXPRESSIONS
from settings import Synthetic
from synthetic_acting import CIRCUMPLEX, MOOD_SPREAD, STILL, blend, cover
from synthetic_face import Person, State, background, draw_face, oval, person

SETS = {"AffectNet-2017": 0.40, "AffectNet-2021": 0.20, "RAF-DB": 0.25, "FER2013": 0.15}  # of the faces
SHARES = (.22, .12, .09, .10, .19, .12, .11, .05)      # of each expression, in the order of EXPRESSIONS

# The sets' own codes, in the order of EXPRESSIONS. Contempt stands for Other, where a set has it.
AFFECTNET = (0, 6, 5, 4, 1, 2, 3, 7)
RAF_DB = (7, 6, 3, 2, 4, 5, 1)
FER2013 = (6, 0, 1, 2, 3, 4, 5)
FERPLUS_OF = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")

AFFECTNET_COLUMNS = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
                     "facial_landmarks", "expression", "valence", "arousal")
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown",
           "NF")              # what a tagger of FER+ may vote for; NF is "not a face"


@dataclass
class Still:
    """A still face, before it is drawn. Each is another person."""
    set: str                   # key of SETS
    number: int
    file: str                  # within the set; "" in FER2013, whose pixels lie in a CSV
    train: bool
    person: Person
    state: State
    expression: int            # index into EXPRESSIONS
    va: np.ndarray             # (2,)
    faced: bool                # False: the picture shows no face
    rng: np.random.Generator   # for what is drawn later

    def image(self) -> Image.Image:
        if self.faced:
            return draw_face(self.person, self.state, self.rng)
        return background(self.state.place).reduce(2)


def still(sizes: Synthetic, number: int) -> Still:
    """The still face of a number below sizes.faces, the same one each time."""
    p = person(np.random.default_rng([sizes.seed, STILL, number]))
    rng = np.random.default_rng([sizes.seed, STILL, number, 2])
    ends = np.round(np.cumsum(list(SETS.values())) * sizes.faces)
    name = next(name for name, end in zip(SETS, ends) if number < end)
    shares = np.array(SHARES)
    if not name.startswith("AffectNet"):
        shares[EXPRESSIONS.index("Other")] = 0                   # the other sets have no code for it
    k = int(rng.choice(8, p=shares / shares.sum()))
    strength = rng.uniform(0.6, 1)
    mood = MOOD_SPREAD * rng.standard_normal(2).clip(-3, 3)
    state = State(
        strength * blend(rng, EXPRESSIONS[k]), valence=mood[0], arousal=mood[1],
        yaw=rng.normal(0, 3), roll=rng.normal(0, 0.06), scale=rng.uniform(1.18, 1.36),
        shift=tuple(rng.normal(0, 2, 2)), place=int(rng.integers(1000)),
        brightness=rng.uniform(0.7, 1.2), contrast=rng.uniform(0.7, 1.1),
        cast=tuple(rng.uniform(0.9, 1.1, 3)), slope=tuple(rng.normal(0, 18, 2)),
        cover=cover(rng, p) if rng.random() < 0.07 else None,
        blur=(1.2, 1.2) if rng.random() < 0.1 else (0.0, 0.0), noise=rng.uniform(1, 6))
    va = (strength * np.array(CIRCUMPLEX[EXPRESSIONS[k]]) + mood).clip(-1, 1)
    train = bool(rng.random() < 0.85)
    code = rng.bytes(28).hex()
    faced = True
    if name == "AffectNet-2017":
        file = f"Manually_Annotated_Images/{number % 7 + 1}/{code}.jpg"
        faced = rng.random() >= 0.03
    elif name == "AffectNet-2021":
        file = f"{'train' if train else 'val'}_set/images/{number}.jpg"
    elif name == "RAF-DB":
        file = f"basic/Image/aligned/{'train' if train else 'test'}_{number:05d}_aligned.jpg"
    else:
        file = ""
        faced = rng.random() >= 0.03
    return Still(name, number, file, train, p, state, k, va, faced, rng)


def draw_still(root: Path, face: Still) -> None:
    """The picture of a face, and the labels that lie beside it in AffectNet 2021. Nothing for FER2013."""
    if not face.file:
        return
    path = root / face.set / face.file
    path.parent.mkdir(parents=True, exist_ok=True)
    side = 100 if face.set == "RAF-DB" else 96
    face.image().resize((side, side)).save(path, quality=90)
    if face.set == "AffectNet-2021":
        notes = path.parents[1] / "annotations"
        notes.mkdir(exist_ok=True)
        values = {"exp": AFFECTNET[face.expression], "val": face.va[0], "aro": face.va[1]}
        for name, value in values.items():
            np.save(notes / f"{face.number}_{name}.npy", np.array(str(value)))   # one string


def affectnet_row(face: Still) -> list:
    """A row of AffectNet 2017's lists. A few faces get 8 (None) or 9 (Uncertain); a picture without face is
    10."""
    code = AFFECTNET[face.expression]
    if face.rng.random() >= 0.96:
        code = int(face.rng.integers(8, 10))
    if not face.faced:
        code = 10
    file = face.file.removeprefix("Manually_Annotated_Images/")
    landmarks = ";".join(f"{x:.1f};{y:.1f}" for x, y in oval(48, 48, 30, 38))
    va = [f"{x:.6f}" for x in face.va] if code < 8 else [-2, -2]
    return [file, 0, 0, 96, 96, landmarks, code, *va]


def raf_row(face: Still) -> list:
    """A line of RAF-DB's list: `train_00001.jpg 5` for the file train_00001_aligned.jpg."""
    name = Path(face.file).name.replace("_aligned", "")
    return [f"{name} {RAF_DB[face.expression]}"]


def fer2013_row(face: Still, usage: str) -> list:
    """A row of FER2013: the class, 48 x 48 grey pixels, and the split."""
    grey = np.asarray(face.image().convert("L").resize((48, 48)))
    return [FER2013[face.expression], " ".join(map(str, grey.ravel())), usage]


def ferplus_row(face: Still, usage: str, row: int) -> list:
    """The row of FER+ for row number `row` of FER2013: the votes of ten taggers. No name if it is no face."""
    if not face.faced:
        return [usage, "", *(10 if name == "NF" else 0 for name in FERPLUS)]
    shares = {name: 0.15 / 8 for name in FERPLUS}
    shares[FERPLUS_OF[face.expression]] = 0.85
    shares["NF"] = 0.0
    votes = face.rng.multinomial(10, np.array(list(shares.values())))
    return [usage, f"fer{row:07d}.png", *votes]


def write_lists(root: Path, sizes: Synthetic) -> None:
    """The lists over all still faces, among them FER2013, whose pixels lie in its list."""
    training, validation, raf, fer, plus = [], [], [], [], []
    for number in range(sizes.faces):
        face = still(sizes, number)
        if face.set == "AffectNet-2017":
            rows = training if face.train else validation
            rows.append(affectnet_row(face))
        elif face.set == "RAF-DB":
            raf.append(raf_row(face))
        elif face.set == "FER2013":
            held_out = "PublicTest" if number % 2 == 0 else "PrivateTest"
            usage = "Training" if face.train else held_out
            fer.append(fer2013_row(face, usage))
            plus.append(ferplus_row(face, usage, row=len(plus)))
    write_rows(root / "AffectNet-2017/training.csv", [AFFECTNET_COLUMNS, *training])
    write_rows(root / "AffectNet-2017/validation.csv", [AFFECTNET_COLUMNS, *validation])
    write_rows(root / "RAF-DB/basic/EmoLabel/list_patition_label.txt", raf)
    write_rows(root / "FER2013/fer2013.csv", [("emotion", "pixels", "Usage"), *fer])
    write_rows(root / "FERPlus/fer2013new.csv", [("Usage", "Image name", *FERPLUS), *plus])


def write_rows(path: Path, rows) -> None:
    """A CSV file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    sizes = Synthetic(faces=1000)
    counts = {name: np.zeros(8, int) for name in SETS}
    for number in range(sizes.faces):
        face = still(sizes, number)
        counts[face.set][face.expression] += 1
    lines = [f"{'':16s}" + "".join(f"{name:>11s}" for name in EXPRESSIONS)]
    for name, count in counts.items():
        lines.append(f"{name:16s}" + "".join(f"{n:11d}" for n in count))
    print("\n".join(lines))
