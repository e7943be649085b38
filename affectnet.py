"""AffectNet (paper §4.1.1), both releases: two lists of files (2017), or a small file per label (2021).

`affectnet_2017` and `affectnet_2021` open a copy as a `face_set.FaceSet`. Layouts: docs/data.md.
"""

from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np

from face_set import Entry, FaceSet, code, from_lists, need, rows
from images import find_images

# Its own code -> ABAW class; -1 = a face without an expression label, None = no face: left out.
# From 0: Neutral Happy Sad Surprise Fear Disgust Anger Contempt None Uncertain No-Face
AFFECTNET = (0, 4, 5, 6, 3, 2, 1, 7, -1, -1, None)
AFFECTNET_COLUMNS = ["subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
                     "facial_landmarks", "expression", "valence", "arousal"]
IMAGES, LISTS = "Manually_Annotated_Images", "Manually_Annotated_file_lists"


def below_images(file: str) -> str:
    """A listed name as a path below Manually_Annotated_Images/: slashes for backslashes, and what stands
    before that folder, as in C:\\\\faces\\\\Manually_Annotated_Images\\\\1\\\\a.jpg, cut away."""
    file = file.strip().replace("\\", "/")
    _, above, rest = f"/{file}".rpartition(f"/{IMAGES}/")
    return rest if above else file


def face_box(fields: list[str]) -> tuple | None:
    """x, y, width, height as left, top, right, bottom in pixels. None if they are no box."""
    try:
        x, y, width, height = (int(float(field)) for field in fields)
    except (ValueError, OverflowError):                     # no numbers, or infinite
        return None
    sensible = width > 0 and height > 0 and max(map(abs, (x, y, width, height))) < 1_000_000
    return (x, y, x + width, y + height) if sensible else None


def affectnet_2017(root, crop: bool = False) -> FaceSet:
    """AffectNet, first release: two lists name files below Manually_Annotated_Images/.

    The lists lie in the root or in Manually_Annotated_file_lists/, with or without a header. `crop`: cut each
    face out by its list's box; an image without a usable box is left out and counted.
    """
    root = Path(root)
    hint = "give the folder that holds training.csv, validation.csv and Manually_Annotated_Images/"

    def entries(path):
        for line, _, fields in rows(path, AFFECTNET_COLUMNS, is_row=lambda first: first[6].isdigit()):
            where = f"{path} line {line}"
            label = AFFECTNET[code(fields[6], 0, 10, where)]
            yield Entry(where, below_images(fields[0]), label, path.name == "training.csv",
                        face_box(fields[1:5]) if crop else None)

    lists = {}
    for name in ("training.csv", "validation.csv"):
        in_folder = root / LISTS / name
        path = in_folder if in_folder.exists() and not (root / name).exists() else need(root / name, hint)
        lists[path] = entries(path)
    return from_lists("AffectNet 2017", need(root / IMAGES, hint), lists, boxes=crop)


class AffectNet2021(FaceSet):
    """Its labels lie in 290,000 small files, which are opened when `labels` is first asked for."""

    @cached_property
    def labels(self):
        labels = np.full(len(self), -1, dtype=np.int8)
        for i in range(len(self)):
            image = Path(self.where(i))
            try:
                with open(image.parents[1] / "annotations" / f"{image.stem}_exp.npy", "rb") as file:
                    value = np.lib.format.read_array(file, allow_pickle=False).item()       # "3", 3 or 3.0
                labels[i] = AFFECTNET[range(8).index(float(value))]
            except (FileNotFoundError, ValueError, TypeError, MemoryError):  # cut short, pickled, not 0 to 7
                self.skipped["annotation missing or broken (image kept)"] += 1
        return labels


def affectnet_2021(root) -> FaceSet:
    """AffectNet, second release: {train_set,val_set}/images/<id>.jpg and .../annotations/<id>_exp.npy."""
    root, skipped, paths = Path(root), Counter(), []
    for split in ("train_set", "val_set"):
        need(root / split / "images", "give the folder that holds train_set/images/ and val_set/images/")
        paths += find_images(root, skipped, f"{split}/images")
    training = [path.startswith(b"train_set/") for path in paths]
    return AffectNet2021("AffectNet 2021", root, paths, None, training, skipped)
