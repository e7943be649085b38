"""Data sets of still faces (paper §4.1.1): AffectNet (2017 and 2021), RAF-DB, FER2013, FER+, any folder.

Pre-training reads pixels only; the labels, in ABAW's order whatever the set's own codes are, wait for a
classifier. None of these sets may be redistributed, so nothing is copied: a FaceSet holds file names (for
FER2013, positions in its CSV) and opens one face at a time.

    python faces.py                # the counts to check a copy of FER2013 against
    python faces.py FOLDER ...     # how many faces, of which sizes and labels, and what was left out
"""

import csv
import os
import sys
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from images import find_images, inside, read_image
from labels import EXPRESSIONS

# Each set's own code -> ABAW class; -1 = a face without an expression label, None = no face: left out.
# AffectNet from 0: Neutral Happy Sad Surprise Fear Disgust Anger Contempt None Uncertain No-Face
AFFECTNET = (0, 4, 5, 6, 3, 2, 1, 7, -1, -1, None)
RAF_DB = (6, 3, 2, 4, 5, 1, 0)       # from 1: Surprise Fear Disgust Happiness Sadness Anger Neutral
FER2013 = (1, 2, 3, 4, 5, 6, 0)      # from 0: Angry Disgust Fear Happy Sad Surprise Neutral
# FER+ in the order of its columns, which hold the votes of ten people.
FERPLUS = {"neutral": 0, "happiness": 4, "surprise": 6, "sadness": 5, "anger": 1, "disgust": 2, "fear": 3,
           "contempt": 7, "unknown": -1, "NF": -1}
FOLDER_NAMES = {name.lower(): label for label, name in enumerate(EXPRESSIONS)}
FOLDER_NAMES |= {"angry": 1, "angrer": 1, "disgusted": 2, "fearful": 3, "happy": 4, "sad": 5, "surprised": 6,
                 "contempt": 7}
HELD_OUT = {"val", "valid", "validation", "val_set", "test", "test_set", "publictest", "privatetest"}

AFFECTNET_COLUMNS = ["subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
                     "facial_landmarks", "expression", "valence", "arousal"]
FER2013_COLUMNS = ["emotion", "pixels", "Usage"]
FERPLUS_COLUMNS = ["Usage", "Image name", *FERPLUS]
FER2013_COUNTS = {"Training": 28_709, "PublicTest": 3_589, "PrivateTest": 3_589}     # rows by Usage


class FaceSet:
    """n faces of one data set, each in a file of its own below `root`.

    `paths` are relative to the root, in one array of bytes, whose memory worker processes share after a fork.
    Reading one of a list of strings would change its reference count, which copies the memory page.
    """

    def __init__(self, name, root, paths, labels, training, skipped):
        self.name, self.root = name, str(root)
        self.paths = np.array(paths, dtype=np.bytes_)
        if labels is not None:
            self.labels = np.array(labels, dtype=np.int8)   # (n,) ABAW class 0-7, or -1 = no expression label
        self.training = np.array(training, dtype=bool)      # (n,) the set's own training split
        self.skipped = Counter(skipped)                     # reason -> how many rows or files were left out

    def __len__(self):
        return len(self.training)

    def fingerprint(self) -> str:
        """Number and names of the faces, for made_of.py: other ones have another."""
        return f"{len(self):,} images, names {zlib.crc32(self.paths.tobytes()):08x}"

    def where(self, i) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def read(self, i) -> Image.Image:
        """Face i as RGB. ValueError naming the file (and line) if it is none; OSError if the disk fails."""
        return read_image(self.where(i))


def need(path: Path, hint: str) -> Path:
    """The path, if it is there. Raises ValueError with the hint if not."""
    if not path.exists():
        raise ValueError(f"looked for {path}, which is not there; {hint}")
    return path


def csv_file(given, name: str) -> Path:
    """The file `name` itself, or in the folder given."""
    path = Path(given)
    return need(path / name if path.is_dir() else path, f"give {name} or the folder that holds it")


def code(text, lowest: int, highest: int, where: str) -> int:
    """A label code as a number. Raises ValueError if it is none, or out of range."""
    if text.strip() not in map(str, range(lowest, highest + 1)):
        raise ValueError(f"{where}: got {text[:40]!r}, expected a whole number from {lowest} to {highest}")
    return int(text)


def rows(path: Path, columns: list[str]):
    """Yield (line number, offset in bytes, fields) for each row of a CSV; blank lines are passed over.

    Raises ValueError for another header, and for a short or a long row.
    """
    with open(path, "rb") as file:
        reader = csv.reader(line.decode("utf-8-sig", "surrogateescape") for line in file)
        try:
            header = [field.strip() for field in next(reader, [])]
            if header != columns:
                raise ValueError(f"{path} line 1: got the header {','.join(header)[:200]!r}, "
                                 f"expected {','.join(columns)!r}")
            offset = file.tell()
            for fields in reader:
                if len(fields) == len(columns):
                    yield reader.line_num, offset, fields
                elif len(fields) > 1 or "".join(fields).strip():         # all but a blank line
                    raise ValueError(f"{path} line {reader.line_num}: got {len(fields)} fields, "
                                     f"expected {len(columns)}")
                offset = file.tell()
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def files_in(root: Path, folder: str) -> dict[str, bool]:
    """{name: whether it is a link} of the files in root/folder. Raises ValueError if that leaves the root."""
    directory = inside(root, folder)
    if not directory.is_dir():
        return {}
    return {entry.name: entry.is_symlink() for entry in os.scandir(directory) if entry.is_file()}


def from_list(name: str, root: Path, entries) -> FaceSet:
    """The set whose list names its files. `entries`: (where in the list, file below root, label, training).

    A file that is absent is left out and counted. Raises ValueError if an entry leaves the root. Looking at
    each of 420,000 files takes long on a network disk: each folder is listed once, and only links resolved.
    """
    folders, skipped, paths, labels, trains = {}, Counter(), [], [], []
    for where, file, label, training in entries:
        folder, base = os.path.split(file)
        try:
            if folder not in folders:
                folders[folder] = files_in(root, folder)
            if folders[folder].get(base):                            # a link, which may lead anywhere
                inside(root, file)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if label is None:
            skipped["not a face"] += 1
        elif base not in folders[folder]:
            skipped["image not on disk"] += 1
        else:
            paths.append(os.fsencode(file))
            labels.append(label)
            trains.append(training)
    return FaceSet(name, root, paths, labels, trains, skipped)


def affectnet_2017(root) -> FaceSet:
    """AffectNet, first release: two lists name files below Manually_Annotated_Images/."""
    hint = "give the folder that holds training.csv, validation.csv and Manually_Annotated_Images/"
    lists = [need(Path(root) / name, hint) for name in ("training.csv", "validation.csv")]

    def entries():
        for path in lists:
            for line, _, fields in rows(path, AFFECTNET_COLUMNS):
                where = f"{path} line {line}"
                label = AFFECTNET[code(fields[6], 0, 10, where)]
                yield where, fields[0], label, path.name == "training.csv"

    return from_list("AffectNet 2017", need(Path(root) / "Manually_Annotated_Images", hint), entries())


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
            except (OSError, ValueError, TypeError, MemoryError):    # missing, cut short, pickled, not 0 to 7
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


def raf_db(root) -> FaceSet:
    """RAF-DB's basic set, aligned faces. `train_1.jpg 5` in its list is Image/aligned/train_1_aligned.jpg."""
    root = Path(root) / "basic" if (Path(root) / "basic").is_dir() else Path(root)
    hint = "give the folder that holds basic/, or basic/ itself with EmoLabel/ and Image/aligned/ in it"
    path = need(root / "EmoLabel" / "list_patition_label.txt", hint)   # (sic)

    def entries():
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                where, fields = f"{path} line {number}", line.split()
                if not fields:
                    continue
                if len(fields) != 2 or not fields[0].startswith(("train_", "test_")):
                    raise ValueError(f"{where}: got {line.strip()[:80]!r}, expected a line like "
                                     "'train_00001.jpg 5'; the name begins with train_ or test_")
                stem, extension = os.path.splitext(fields[0])
                label = RAF_DB[code(fields[1], 1, 7, where) - 1]
                yield where, f"{stem}_aligned{extension}", label, stem.startswith("train_")

    return from_list("RAF-DB", need(root / "Image" / "aligned", hint), entries())


class Fer2013(FaceSet):
    """The pixels stay in the CSV: `rows` (n, 2) holds each row's offset in bytes and its line number."""

    def __init__(self, name, path, rows, labels, training, skipped):
        super().__init__(name, path, [], labels, training, skipped)
        self.rows = rows

    def fingerprint(self) -> str:
        return f"{len(self):,} images, rows {zlib.crc32(self.rows.tobytes()):08x}"

    def where(self, i) -> str:
        return f"{self.root} line {self.rows[i, 1]}"

    def read(self, i) -> Image.Image:
        with open(self.root, "rb") as file:                  # anew: forks and pickles share no position
            file.seek(self.rows[i, 0])
            line = file.readline()
        try:
            pixels = line.split(b",")[1].strip(b'"').split()
            grey = bytes(map(int, pixels))                   # raises ValueError outside 0-255
            return Image.frombytes("L", (48, 48), grey).convert("RGB")
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.where(i)}: expected 2,304 whole numbers from 0 to 255 as pixels "
                             f"({error})") from None


def fer2013(csv_path, ferplus_path=None) -> FaceSet:
    """FER2013's 48 x 48 grey faces; with FER+, its labels instead, and without the rows that are no face.

    Each path is the CSV or the folder that holds it. One pass over fer2013.csv notes where each row starts.
    """
    path = csv_file(csv_path, "fer2013.csv")
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
    if ferplus_path:
        labels, face = ferplus(ferplus_path, path, usages)
        name, skipped = "FER2013 with FER+ labels", {"not a face": int((~face).sum())}
    found = np.array(found, dtype=np.int64).reshape(-1, 2)           # (rows, 2), also if there are none
    training = np.array(usages) == "Training"
    return Fer2013(name, path, found[face], np.array(labels)[face], training[face], skipped)


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


def image_folder(root) -> FaceSet:
    """Any folder of images, flat or nested.

    The label is that of the nearest folder named after an expression, else -1. A folder's position says
    nothing: alphabetical order is no data set's order of codes. What lies in a folder called val or test (or
    the like) is not training.
    """
    root, skipped = need(Path(root), "give a folder of images"), Counter()
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the images")
    paths, labels, training = find_images(root, skipped), [], []
    for path in paths:
        folders = os.fsdecode(os.path.dirname(path)).lower().split("/")
        named = [folder for folder in folders if folder in FOLDER_NAMES]
        labels.append(FOLDER_NAMES[named[-1]] if named else -1)
        training.append(HELD_OUT.isdisjoint(folders))
    return FaceSet(str(root), root, paths, labels, training, skipped)


def load_faces(data) -> list[FaceSet]:
    """Every set that the `data` section of the configuration gives a path for ("" = not used).

    Raises one ValueError with all problems, each beginning with its setting; also if no set is given, or
    one has no image.
    """
    fer_setting = "data.fer2013 with data.ferplus" if data.ferplus else "data.fer2013"
    asked = [("data.affectnet_2017", data.affectnet_2017, affectnet_2017),
             ("data.affectnet_2021", data.affectnet_2021, affectnet_2021),
             ("data.raf_db", data.raf_db, raf_db),
             (fer_setting, data.fer2013, lambda path: fer2013(path, data.ferplus))]
    asked += [(f"data.folders[{i}]", folder, image_folder) for i, folder in enumerate(data.folders)]
    sets, problems = [], []
    if data.ferplus and not data.fer2013:
        problems.append("data.ferplus: FER+ holds labels for FER2013's images and no images of its own; "
                        "set data.fer2013 too")
    for setting, path, load in asked:
        try:
            if path:
                sets.append(load(path))
                sets[-1].setting = setting
                if not len(sets[-1]):
                    raise ValueError(f"no image found in {path}; left out: {dict(sets[-1].skipped)}")
        except (ValueError, OSError) as error:               # OSError: a folder that may not be opened
            problems.append(f"{setting}: {error}")
    if not sets and not problems:
        problems.append("no data set is given; set data.affectnet_2017, _2021, raf_db, fer2013 or folders")
    if problems:
        raise ValueError("\n".join(problems))
    return sets


if __name__ == "__main__":
    text = f"A complete fer2013.csv has so many rows: {FER2013_COUNTS}\n"
    for folder in sys.argv[1:]:
        try:
            faces = image_folder(folder)
            some = range(0, len(faces), 1 + len(faces) // 100)       # at most 100 are opened
            sizes = Counter("{} x {}".format(*faces.read(i).size) for i in some)
            labels = Counter(EXPRESSIONS[label] if label >= 0 else "no label" for label in faces.labels)
            text += f"{folder}: {len(faces):,} images, {faces.training.sum():,} of them for training\n"
            text += f"  left out: {dict(faces.skipped)}\n  sizes of {len(some)}: {dict(sizes)}\n"
            text += f"  labels: {dict(labels)}\n"
        except (ValueError, OSError) as refusal:
            text += f"refused: {refusal}\n"
    print(text, end="")                                              # in one piece, for `| head`
    sys.exit(2 if "refused:" in text else 0)
