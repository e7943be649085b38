"""FER2013 (paper §4.1.1), whose 48 x 48 faces lie in one CSV, and FER+, new labels for them.

`fer2013` opens a copy as a `face_set.FaceSet`; a copy as class folders of images is read too. Layouts:
docs/data.md.
"""

import csv
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from face_set import FaceSet, code, image_folder, need, rows

FER2013 = (1, 2, 3, 4, 5, 6, 0)      # from 0: Angry Disgust Fear Happy Sad Surprise Neutral, as ABAW classes
# FER+ in the order of its columns, which hold the votes of ten people.
FERPLUS = {"neutral": 0, "happiness": 4, "surprise": 6, "sadness": 5, "anger": 1, "disgust": 2, "fear": 3,
           "contempt": 7, "unknown": -1, "NF": -1}
FER2013_COLUMNS = ["emotion", "pixels", "Usage"]
FERPLUS_COLUMNS = ["Usage", "Image name", *FERPLUS]
FER2013_COUNTS = {"Training": 28_709, "PublicTest": 3_589, "PrivateTest": 3_589}     # rows by Usage
FERPLUS_NO_FACE = 173                                       # rows of FER+ without an image name


class Fer2013(FaceSet):
    """The pixels stay in the CSV: `rows` (n, 2) holds each row's offset in bytes and its line number.

    `column`: that of the pixels, from 0. `complete`: the rows of a complete copy, in words.
    """

    def __init__(self, name, path, rows, labels, training, skipped, column, complete):
        super().__init__(name, path, [], labels, training, skipped)
        self.rows, self.column, self.complete = rows, column, complete

    def fingerprint(self) -> str:
        return f"{len(self):,} images, rows {crc32(self.rows.tobytes()):08x}"

    def where(self, i) -> str:
        return f"{self.root} line {self.rows[i, 1]}"

    def read(self, i) -> Image.Image:
        with open(self.root, "rb") as file:                  # anew: forks and pickles share no position
            file.seek(self.rows[i, 0])
            line = file.readline()
        try:
            pixels = line.split(b",")[self.column].strip(b' "\r\n').split()
            grey = bytes(map(int, pixels))                   # raises ValueError outside 0-255
            return Image.frombytes("L", (48, 48), grey).convert("RGB")
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.where(i)}: expected 2,304 whole numbers from 0 to 255 as pixels "
                             f"({error})") from None


def csv_file(given, name: str) -> Path:
    """The file `name` itself, or in the folder given."""
    path = Path(given)
    return need(path / name if path.is_dir() else path, f"give {name} or the folder that holds it")


def fer2013(given, ferplus_path=None) -> FaceSet:
    """FER2013's 48 x 48 grey faces; with FER+, its labels instead, and without the rows that are no face.

    Each path is the CSV or the folder that holds it; FER2013 may also be a folder of class folders. One pass
    over fer2013.csv notes where each row starts.
    """
    if Path(given).is_dir() and not (Path(given) / "fer2013.csv").exists():
        return class_folders(given, ferplus_path)
    path = csv_file(given, "fer2013.csv")
    found, labels, usages = [], [], []
    for line, offset, (emotion, pixels, usage) in rows(path, FER2013_COLUMNS):
        where, usage = f"{path} line {line}", usage.strip()
        count = pixels.strip().count(" ") + 1
        if usage not in FER2013_COUNTS:
            raise ValueError(f"{where}: got the Usage {usage[:40]!r}, "
                             f"expected one of {', '.join(FER2013_COUNTS)}")
        if count != 48 * 48:
            raise ValueError(f"{where}: got {count} pixels, expected 2,304 with one space between two")
        found.append((offset, line))
        labels.append(FER2013[code(emotion, 0, 6, where)])
        usages.append(usage)
    name, skipped, face = "FER2013", {}, np.ones(len(found), dtype=bool)
    complete = ", ".join(f"{count:,} {usage}" for usage, count in FER2013_COUNTS.items())
    if ferplus_path:
        labels, face = ferplus(ferplus_path, path, usages)
        name, skipped = "FER2013 with FER+ labels", {"not a face": int((~face).sum())}
        complete += f", less {FERPLUS_NO_FACE} without a face"
    found = np.array(found, dtype=np.int64).reshape(-1, 2)           # (rows, 2), also if there are none
    training = np.array(usages) == "Training"
    return Fer2013(name, path, found[face], np.array(labels)[face], training[face], skipped,
                   pixel_column(path), complete)


def pixel_column(path) -> int:
    """Which column of fer2013.csv holds the pixels, from 0; `rows` has checked the header."""
    with open(path, encoding="utf-8-sig") as file:
        return [column.strip() for column in next(csv.reader(file, skipinitialspace=True))].index("pixels")


def class_folders(root, ferplus_path) -> FaceSet:
    """FER2013 as folders of images, train/angry/... and test/angry/...; labels by name.

    Raises ValueError if no folder is named after an expression, and with FER+, which needs the CSV's order.
    """
    found = image_folder(root)
    if not (found.labels >= 0).any():
        need(Path(root) / "fer2013.csv", "give fer2013.csv, the folder that holds it, or one of class "
                                         "folders (train/angry/..., test/angry/...)")
    if ferplus_path:
        raise ValueError(f"{root} holds class folders of images, but FER+ lists its labels in the order of "
                         'fer2013.csv; give that file, or set data.ferplus="" to take the folders\' labels')
    found.name = "FER2013, class folders"
    return found


def ferplus(given, fer_path: Path, usages: list[str]) -> tuple[list[int], np.ndarray]:
    """FER+'s labels for FER2013's rows, in their order, and (n,) whether the row is a face.

    The class with most of the ten votes is the label; -1 where two have equally many, or where "unknown" or
    "NF" (not a face) has the most.
    """
    path, labels, face = csv_file(given, "fer2013new.csv"), [], []
    for line, _, (usage, image, *columns) in rows(path, FERPLUS_COLUMNS):
        where, n = f"{path} line {line}", len(labels)
        if n < len(usages) and usage.strip() != usages[n]:
            raise ValueError(f"{where}: got the Usage {usage[:40]!r}, but the same row of {fer_path} has "
                             f"{usages[n]!r}; both files must be complete and in their first order")
        votes = [code(column, 0, 10, where) for column in columns]
        most = max(votes)
        label = list(FERPLUS.values())[votes.index(most)]
        labels.append(label if votes.count(most) == 1 else -1)
        face.append(image.strip() != "")                     # a row that is no face has no image name
    if len(labels) != len(usages):
        raise ValueError(f"{path} has {len(labels)} rows, {fer_path} has {len(usages)}; "
                         "both must list the same images")
    return labels, np.array(face, dtype=bool)
