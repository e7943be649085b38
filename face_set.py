"""One set of still faces (paper §4.1.1): its files, labels and split, and the lists that name its files.

AffectNet, RAF-DB and FER2013 (`affectnet.py`, `raf_db.py`, `fer2013.py`) share this. Any folder of images
is a set too. None of these sets may be redistributed, so nothing is copied: a FaceSet holds file names and
opens one face at a time. Pre-training reads pixels only; the labels, in ABAW's order whatever the set's own
codes are, wait for a classifier. `faces.py` opens all sets of a configuration.
"""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image

from images import find_images, inside, read_image, sizes
from labels import EXPRESSIONS

# If more than this share of the images that a list names is missing, it is not the list of this folder.
MOST_MISSING = 0.9
FOLDER_NAMES = {name.lower(): label for label, name in enumerate(EXPRESSIONS)}
FOLDER_NAMES |= {"angry": 1, "angrer": 1, "disgusted": 2, "fearful": 3, "happy": 4, "sad": 5, "surprised": 6,
                 "contempt": 7}
HELD_OUT = {"val", "valid", "validation", "val_set", "test", "test_set", "publictest", "privatetest"}


class FaceSet:
    """n faces of one data set, each in a file of its own below `root`.

    `paths` are relative to the root, in one array of bytes, whose memory worker processes share after a fork.
    Reading one of a list of strings would change its reference count, which copies the memory page.
    `boxes` (n, 4): left, top, right, bottom of the face in its photograph, in pixels, which is then cut out;
    None = the images are faces already.
    """
    complete = ""                                           # the counts of a complete copy, where known

    def __init__(self, name, root, paths, labels, training, skipped, boxes=None):
        self.name, self.root = name, str(root)
        self.paths = np.array(paths, dtype=np.bytes_)
        if labels is not None:
            self.labels = np.array(labels, dtype=np.int8)   # (n,) ABAW class 0-7, or -1 = no expression label
        self.training = np.array(training, dtype=bool)      # (n,) the set's own training split
        self.skipped = Counter(skipped)                     # reason -> how many rows or files were left out
        self.boxes = None if boxes is None else np.array(boxes, dtype=np.int32)

    def __len__(self):
        return len(self.training)

    def fingerprint(self) -> str:
        """Number, names and boxes of the faces, and the sizes of some files, for made_of.py: other faces have
        another."""
        boxes = b"" if self.boxes is None else self.boxes.tobytes()
        some = sizes(self.where(i) for i in range(0, len(self), 1 + len(self) // 100))
        return f"{len(self):,} images, names {crc32(boxes, crc32(self.paths.tobytes())):08x}, sizes {some}"

    def where(self, i) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def read(self, i) -> Image.Image:
        """Face i as RGB. ValueError naming the file (and line) if it is none; OSError if the disk fails."""
        image = read_image(self.where(i))
        return image if self.boxes is None else self.cut(image, i)

    def cut(self, image, i) -> Image.Image:
        """The part of the image that lies in its face box. Raises ValueError if there is none."""
        left, top, right, bottom = self.boxes[i].tolist()
        box = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"{self.where(i)}: the face box ({left}, {top}) to ({right}, {bottom}) lies "
                             f"outside of the image, {image.width} x {image.height} pixels; if the faces of "
                             "this copy are cut out already, set data.affectnet_crop=false")
        return image.crop(box)


# ---- Lists of files

class Entry(NamedTuple):
    """One row of a list."""
    where: str                     # the list and the line, for messages
    file: str                      # below the root of the images
    label: int | None              # ABAW class, -1 = no expression label, None = not a face
    training: bool
    box: tuple | None = None       # left, top, right, bottom of the face; None = the list has no usable one


def need(path: Path, hint: str) -> Path:
    """The path, if it is there. Raises ValueError with the hint if not."""
    if not path.exists():
        raise ValueError(f"looked for {path}, which is not there; {hint}")
    return path


def code(text, lowest: int, highest: int, where: str) -> int:
    """A label code as a number. Raises ValueError if it is none, or out of range."""
    if text.strip() not in map(str, range(lowest, highest + 1)):
        raise ValueError(f"{where}: got {text[:40]!r}, expected a whole number from {lowest} to {highest}")
    return int(text)


def rows(path: Path, columns: list[str], is_row=None):
    """Yield (line number, offset in bytes, fields) for each row of a CSV; blank lines are passed over.

    The header may name the columns in any order; the fields come in the order of `columns`. `is_row(fields)`
    says of the first line whether it is a row already, for files without a header. Raises ValueError for
    another header, and for a short or a long row; OSError naming the file if the disk fails.
    """
    with open(path, "rb") as file:
        lines = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        reader = csv.reader(lines, skipinitialspace=True)
        try:
            header = [field.strip() for field in next(reader, [])]
            if is_row and len(header) == len(columns) and is_row(header):
                yield 1, 0, header
                header = columns
            if sorted(header) != sorted(columns):
                raise ValueError(f"{path} line 1: got the header {','.join(header)[:200]!r}, "
                                 f"expected {','.join(columns)!r}")
            order = [header.index(column) for column in columns]
            offset = file.tell()
            for fields in reader:
                if len(fields) == len(columns):
                    yield reader.line_num, offset, [fields[i] for i in order]
                elif len(fields) > 1 or "".join(fields).strip():         # all but a blank line
                    raise ValueError(f"{path} line {reader.line_num}: got {len(fields)} fields, "
                                     f"expected {len(columns)}")
                offset = file.tell()
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: {error}") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def files_in(root: Path, folder: str) -> dict[str, bool]:
    """{name: whether it is a link} of the files in root/folder. Raises ValueError if that leaves the root."""
    directory = inside(root, folder)
    if not directory.is_dir():
        return {}
    return {entry.name: entry.is_symlink() for entry in os.scandir(directory) if entry.is_file()}


def from_lists(name: str, root: Path, lists: dict, boxes: bool = False) -> FaceSet:
    """The set whose lists name its files. `lists`: {path of a list: its entries}.

    A file that is absent is left out and counted; with `boxes`, so is one without a usable face box. Raises
    ValueError if an entry leaves the root, and for a list of which nearly all images are absent. Looking at
    each of 420,000 files takes long on a network disk: each folder is listed once, and only links resolved.
    """
    folders, skipped, kept = {}, Counter(), []
    for path, entries in lists.items():
        named, absent, example = 0, 0, ""
        for entry in entries:
            folder, base = os.path.split(entry.file)
            try:
                if folder not in folders:
                    folders[folder] = files_in(root, folder)
                if folders[folder].get(base):                        # a link, which may lead anywhere
                    inside(root, entry.file)
            except ValueError as error:
                raise ValueError(f"{entry.where}: {error}") from None
            if entry.label is None:
                skipped["not a face"] += 1
                continue
            named += 1
            if base not in folders[folder]:
                absent += 1
                example = example or os.path.join(root, entry.file)
            elif boxes and entry.box is None:
                skipped["no usable face box"] += 1
            else:
                kept.append((os.fsencode(entry.file), entry.label, entry.training, entry.box))
        if absent > MOST_MISSING * named:
            raise ValueError(f"{path}: {absent:,} of the {named:,} images that it names are not there; "
                             f"looked for {example}; give the folder that holds them, or a list of "
                             "those that you have")
        if absent:
            skipped["image not on disk"] += absent
    paths, labels, training, found = zip(*kept) if kept else ((), (), (), ())
    return FaceSet(name, root, paths, labels, training, skipped, found if boxes else None)


# ---- Any folder

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
