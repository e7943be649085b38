"""Every set of still faces as one list (paper §4.1.1): AffectNet, RAF-DB, FER2013 and FER+, any folder.

Nothing is copied: a set holds names and opens one face at a time. Labels are in ABAW's order, whatever the
set's own codes are. Reading order: a set, a list, the reader of each set (layouts: docs/data.md), all sets.

    python -m datasets.faces --config my.yaml     # each set: how many faces, sizes, labels, what is left out
    python -m datasets.faces FOLDER ...           # the same for any folder of images
"""

import os
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from engine.config import Config, from_command_line, print_all
from engine.training import generator
from images import EXTENSIONS, Files, find_images, listed, read_image, sizes, with_face
from labels import EXPRESSIONS, read_lines

# Each set's own codes as ABAW classes; -1 = a face without an expression label, None = no face: left out.
# From 0: Neutral Happy Sad Surprise Fear Disgust Anger Contempt None Uncertain No-Face
AFFECTNET = dict(zip("0 1 2 3 4 5 6 7 8 9 10".split(), (0, 4, 5, 6, 3, 2, 1, 7, -1, -1, None)))
RAF_DB = dict(zip("1234567", (6, 3, 2, 4, 5, 1, 0)))   # Surprise Fear Disgust Happiness Sadness Anger Neutral
FER2013 = dict(zip("0123456", (1, 2, 3, 4, 5, 6, 0)))  # Angry Disgust Fear Happy Sad Surprise Neutral
FERPLUS = {"neutral": 0, "happiness": 4, "surprise": 6, "sadness": 5, "anger": 1, "disgust": 2, "fear": 3,
           "contempt": 7, "unknown": -1, "NF": -1}     # columns that hold the votes of ten people
FOLDER_NAMES = {name.lower(): label for label, name in enumerate(EXPRESSIONS)}
FOLDER_NAMES |= {"angry": 1, "angrer": 1, "disgusted": 2, "fearful": 3, "happy": 4, "sad": 5, "surprised": 6,
                 "contempt": 7}
CLASSES = EXPRESSIONS[1:7]           # of class folders: Anger to Surprise
# The parts of a set, as its folders, rows or files call them: is it for training?
PARTS = {part: part.startswith("train") for part in (
    "train training train_set val valid validation val_set test test_set publictest privatetest".split())}
AFFECTNET_COLUMNS = ["subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
                     "facial_landmarks", "expression", "valence", "arousal"]
FER2013_COLUMNS, FERPLUS_COLUMNS = ["emotion", "pixels", "Usage"], ["Usage", "Image name", *FERPLUS]
MOST_MISSING = 0.9                   # of the images of a list; if more are, it is not the list of this folder
WHOLE = (0, 0, 999_999, 999_999)     # the box of an image that is a face already


class Faces(Files):
    """n faces of one data set, given as (name, label, training, box) of each.

    `names` (n,) below `folder`: files, or rows of one. `labels` (n,) int8: ABAW class, -1 = none. `training`
    (n,) bool: the set's own split. `boxes` (n, 4): left, top, right, bottom of a face in its photograph, in
    pixels. `skipped` {reason: how many are left out}, which counts those given with None for a label or a box
    too.
    """

    def __init__(self, name: str, folder, faces: list, skipped=()):
        kept = [face for face in faces if None not in face]
        left = ["not a face" if face[1] is None else "no usable face box" for face in faces if None in face]
        names, labels, training, boxes = zip(*kept) if kept else [()] * 4
        super().__init__(folder, names)
        self.name, self.skipped = name, +Counter(skipped) + Counter(left)
        self.labels, self.training = np.array(labels, np.int8), np.array(training, bool)
        self.boxes = np.array(boxes, np.int32)

    def read(self, i) -> Image.Image:
        """Face i as RGB. ValueError naming its file (and line) if it is none; OSError if the disk fails."""
        where = self.where(i)
        image = read_image(where) if where.lower().endswith(EXTENSIONS) else read_row(where)
        box = self.boxes[i].clip(0, [image.width, image.height] * 2).tolist()
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"{where}: {image.width} x {image.height} pixels, outside of the face box "
                             f"{self.boxes[i]}; in a copy of cut-out faces set data.affectnet_crop=false")
        return with_face(image.crop(box), where)

    def fingerprint(self) -> str:
        """Number, names and boxes of the faces, and the sizes of some files, wherever they lie."""
        names = crc32(self.boxes.tobytes(), crc32(self.names.tobytes()))
        some = sizes(self.where(i) for i in range(0, len(self), 1 + len(self) // 100))
        return f"{len(self):,} images, names {names:08x}, sizes {some}"


def joined(sets: list[Faces]) -> Faces:
    """Several sets as one, for `data.Images`."""
    faces = []
    for found in sets:
        columns = [column.tolist() for column in (found.names, found.labels, found.training, found.boxes)]
        faces += [(os.fsencode(f"{found.folder}/") + name, *rest) for name, *rest in zip(*columns)]
    return Faces("all", "", faces)


# ---- A list of faces

def rows(path, columns: list[str], take, separator=","):
    """Yield take(place, {column: field}) of each row. A list may have no header; it has these columns then.
    Place: file, line, and the row's offset in the file. Raises ValueError naming file and line for a row of
    another length, and for an error of `take`."""
    header, name = columns, Path(path).name
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig", "surrogateescape").strip()
            fields = [field.strip(' "') for field in text.split(separator)]
            if "\r" in text:
                raise ValueError(f"{path}: its lines end as on an old Mac (CR); save it with LF")
            if number == 1 and columns[0] in fields:
                header = fields
            elif text:
                try:
                    place = f"{name} line {number} at byte {file.tell() - len(line)}"
                    yield take(place, dict(zip(header, fields, strict=True)))
                except (LookupError, ValueError) as error:
                    if number == 1:
                        read_lines(path, ",".join(columns))            # which says what is no text
                    raise ValueError(f"{path} line {number}: got {text[:80]!r}, expected {','.join(columns)} "
                                     f"({type(error).__name__}: {error})") from None


def first(*paths: Path) -> Path:
    """The first of these that is there; if none is, the first."""
    return next(filter(Path.exists, paths), paths[0])


def on_disk(name: str, root: Path, entries: list) -> Faces:
    """The set of a list: of each face its file below `root`, label, training, box.

    What is no face or not there is left out and counted, also where a link or `..` leads out of the root; and
    so is a training face that is in the validation list too. Raises ValueError if nearly all are absent. Each
    folder is listed once: to look at each of 420,000 files takes long on a network disk.
    """
    left_out = Counter()
    there = set(find_images(root, left_out))
    held_out = {file for file, _, training, _ in entries if not training}
    named = [face for face in entries if face[1] is not None]
    once = [face for face in named if not (face[2] and face[0] in held_out)]
    absent = [os.fsdecode(face[0]) for face in once if face[0] not in there]
    if len(absent) > MOST_MISSING * len(once):
        raise ValueError(f"{len(absent):,} of the {len(once):,} images that the list names are not there; "
                         f"looked for {root}/{absent[0]}; give their folder, or a list of those you have; "
                         f"left out of this folder: {listed(left_out)}")
    left_out.update({"not a face": len(entries) - len(named), "in both lists": len(named) - len(once),
                     "image not on disk": len(absent)})
    return Faces(name, root, [face for face in once if face[0] in there], left_out)


# ---- The reader of each set

def affectnet_2017(root, crop: bool = False) -> Faces:
    """AffectNet, first release. `crop`: cut each face out by its list's box."""
    def take(place, row):
        # Some copies have C:\faces\Manually_Annotated_Images\1\a.jpg for 1/a.jpg.
        file = "/" + row["subDirectory_filePath"].replace("\\", "/")
        file = file.rpartition(f"/{images.name}/")[2].removeprefix("/")
        box, fields = WHOLE, [row[column] for column in AFFECTNET_COLUMNS[1:5]]
        if crop:
            numbers = all(re.fullmatch(r"-?\d{1,6}(\.\d*)?", field) for field in fields)
            x, y, width, height = (int(float(field)) for field in fields) if numbers else [0] * 4
            box = (x, y, x + width, y + height) if width > 0 and height > 0 else None       # None: no box
        return os.fsencode(file), AFFECTNET[row["expression"]], place.startswith("training"), box

    root, entries = Path(root), []
    images = root / "Manually_Annotated_Images"
    for name in ("training.csv", "validation.csv"):
        path = first(root / name, root / "Manually_Annotated_file_lists" / name)
        entries += rows(path, AFFECTNET_COLUMNS, take)
    return on_disk("AffectNet 2017", images, entries)


def affectnet_2021(root, labels: bool = True) -> Faces:
    """AffectNet, second release. `labels`: open the 290,000 small files that hold them."""
    found = image_folder(root, ["train_set/images", "val_set/images"])
    found.name = "AffectNet 2021"
    for i in range(len(found) if labels else 0):
        # A file that is missing, broken or pickled holds no label.
        with suppress(FileNotFoundError, EOFError, ValueError, LookupError, TypeError, AttributeError):
            code = float(np.load(annotation(found.where(i))).item())                       # of "3", 3 or 3.0
            found.labels[i] = AFFECTNET[f"{code:g}"]
    return found


def annotation(image: str) -> Path:
    """The file that holds the expression of an image of AffectNet 2021."""
    return Path(image).parents[1] / "annotations" / f"{Path(image).stem}_exp.npy"


def raf_db(root) -> Faces:
    """RAF-DB's basic set. `train_1.jpg 5` or `train_1_aligned.jpg 5` is Image/aligned/train_1_aligned.jpg or,
    where there is no Image/aligned/, the whole photograph, Image/original/train_1.jpg."""
    def take(_, row):
        stem, extension = os.path.splitext(row["name"])
        file = os.fsencode(stem.removesuffix("_aligned") + ending + extension)
        return file, RAF_DB[row["label"]], PARTS[stem.partition("_")[0]], WHOLE

    root = first(Path(root) / "basic", Path(root))
    images = first(root / "Image/aligned", root / "Image/original")
    ending = "_aligned" if images.name == "aligned" else ""
    name = "RAF-DB" if ending else "RAF-DB, whole photographs (no Image/aligned)"
    entries = rows(root / "EmoLabel/list_patition_label.txt", ["name", "label"], take, None)           # (sic)
    return on_disk(name, images, list(entries))


def fer2013(path, ferplus="") -> Faces:
    """FER2013's 48 x 48 grey faces; with FER+, its labels instead, and without the rows that are no face.

    Each path is the CSV or the folder that holds it; FER2013 may be class folders of images too. FER+'s label
    has most of the ten votes; it is -1 where two have equally many, or where "unknown" or "NF" has the most.
    """
    def take(place, row):
        blanks = row["pixels"].count(" ")
        if blanks != 48 * 48 - 1:
            raise ValueError(f"{blanks + 1} pixels, not 2,304 with one space between two")
        training = PARTS[row.get("Usage", "training").lower()]         # a train.csv may not say it
        return place.encode(), FER2013[row["emotion"]], training, WHOLE

    def vote(_, row):
        votes = {name: int(row[name]) for name in FERPLUS}
        most = [name for name in FERPLUS if votes[name] == max(votes.values())]
        label = FERPLUS[most[0]] if len(most) == 1 else -1
        return label if row["Image name"] else None, PARTS[row["Usage"].lower()]       # no face has no name

    lists = [Path(path, name) for name in ("fer2013.csv", "icml_face_data.csv", "train.csv")]
    csv = first(*lists) if Path(path).is_dir() else Path(path)
    if csv == lists[2]:
        with csv.open("rb") as file:
            csv = csv if b"pixels" in file.readline() else lists[0]            # some other data set's
    if not (ferplus or csv.exists()):
        return image_folder(path)
    faces = list(rows(csv, FER2013_COLUMNS, take))
    if ferplus:
        plus = first(Path(ferplus, "fer2013new.csv"), Path(ferplus))
        voted = list(rows(plus, FERPLUS_COLUMNS, vote))
        if [training for _, training in voted] != [training for _, _, training, _ in faces]:
            raise ValueError(f"{plus}: {len(voted)} rows that do not fit the {len(faces)} of {csv} and their "
                             "Usage; both must be complete and in their first order")
        faces = [(place, label, *rest) for (place, _, *rest), (label, _) in zip(faces, voted)]
    return Faces("FER2013 with FER+ labels" if ferplus else "FER2013", csv.parent, faces)


def read_row(where: str) -> Image.Image:
    """A face of FER2013, from its CSV. Opened anew each time: forks and pickles share no position."""
    path, offset = re.fullmatch(r"(.*) line \d+ at byte (\d+)", where).groups()
    with open(path, "rb") as file:
        file.seek(int(offset))
        pixels = max(file.readline().split(b","), key=len).strip(b' "\r\n')              # the longest field
    try:
        return Image.frombytes("L", (48, 48), bytes(map(int, pixels.split()))).convert("RGB")
    except ValueError as error:
        raise ValueError(f"{where}: expected 2,304 whole numbers from 0 to 255 ({error})") from None


def image_folder(root, below=("",)) -> Faces:
    """Any folder of images, flat or nested, or what is below these folders in it. The nearest folder named
    after an expression gives the label, if there is one; pre-training needs none, so other names are as good.
    What lies in a folder called val or test (or the like) is not training."""
    faces, skipped = [], Counter()
    for path in [path for folder in below for path in find_images(Path(root), skipped, folder)]:
        folders = os.fsdecode(os.path.dirname(path)).lower().split("/")
        label = [-1, *(FOLDER_NAMES[folder] for folder in folders if folder in FOLDER_NAMES)][-1]
        faces.append((path, label, all(PARTS.get(folder, True) for folder in folders), WHOLE))
    return Faces(str(root), root, faces, skipped)


def class_folders(root) -> Faces:
    """Faces in folders called ANGRER (sic), DISGUST, ...: ABAW 4's challenge of learning from drawn faces.
    Raises ValueError if there are none, or if one lies elsewhere, say in a folder called nearly so."""
    found = image_folder(root) if Path(root).is_dir() else Faces("", root, [])
    strange = found.names[(found.labels < 1) | (found.labels > len(CLASSES))]
    if len(strange) or not len(found):
        example = os.fsdecode(strange[0]) if len(strange) else "no image"
        near = [f" ({folder}: is {name} meant?)" for folder in example.lower().split("/")[:-1]
                for name in get_close_matches(folder, FOLDER_NAMES, 1) if name != folder]
        raise ValueError(f"{root}: found {example}{''.join(near)}; give the folder that holds ANGRER (or "
                         "ANGER), DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE and no others")
    return found


# ---- The sets of a configuration

def load_faces(data, labels: bool = False) -> list[Faces]:
    """Every set that the `data` section names, with its `setting`; `labels`: those of AffectNet 2021 too.

    Raises one ValueError with all problems, each after its setting; also if no set is given, or one has no
    image. OSError if the disk fails."""
    given = [("data.affectnet_2017", data.affectnet_2017, partial(affectnet_2017, crop=data.affectnet_crop)),
             ("data.affectnet_2021", data.affectnet_2021, partial(affectnet_2021, labels=labels)),
             ("data.raf_db", data.raf_db, raf_db),
             ("data.fer2013", data.fer2013 or data.ferplus, partial(fer2013, ferplus=data.ferplus)),
             *((f"data.folders[{i}]", folder, image_folder) for i, folder in enumerate(data.folders))]
    sets, problems = [], []
    for setting, path, read in [one for one in given if one[1]]:
        try:
            sets.append(read(path))
            sets[-1].setting = setting
            if not len(sets[-1]):
                raise ValueError(f"no image found in {path}; left out: {listed(sets[-1].skipped)}")
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            problems.append(f"{setting}: {error}; layouts: docs/data.md")
            other_layout = isinstance(error, FileNotFoundError) and Path(path).is_dir()
            found = image_folder(path) if other_layout else []
            if len(found):
                problems[-1] += (f"; this looks like class folders ({found.where(0)}): data.folders reads it "
                                 "to pre-train; there a name like happy is a label, and a number is none")
    if problems or not sets:
        raise ValueError("\n".join(problems) or "data: no data set is given; set data.affectnet_2017, "
                         "affectnet_2021, raf_db, fer2013 or folders")
    return sets


def labelled_sets(data) -> list[Faces]:
    """AffectNet's sets that the `data` section names. Raises ValueError as load_faces does, and if no face of
    a part of the second release has a label."""
    if not (data.affectnet_2017 or data.affectnet_2021):
        raise ValueError("no labelled still faces: give data.affectnet_2017 or data.affectnet_2021")
    sets = load_faces(replace(data, raf_db="", fer2013="", ferplus="", folders=[]), labels=True)
    found = sets[-1]
    for part in (found.training, ~found.training) if data.affectnet_2021 else ():
        if part.any() and (found.labels[part] < 0).all():
            raise ValueError(f"data.affectnet_2021: none of {part.sum():,} images has a label from 0 to 7; "
                             f"looked for {annotation(found.where(part.argmax()))}; layouts: docs/data.md")
    return sets


def balanced_order(labels, seed: int, epoch: int) -> np.ndarray:
    """Class-balanced sampling, an order for `data.Images`: (n,) rows; n of the labels are not -1.

    Sample i is of class i mod K of the K classes that occur, and each class goes through its own rows in a
    shuffled order, again and again. So each comes equally often.
    """
    of_class = [np.flatnonzero(labels == k) for k in np.unique(labels[labels >= 0])]
    rng, order, K = generator(seed, epoch), np.zeros((labels >= 0).sum(), np.int64), len(of_class)
    for k, rows in enumerate(of_class):                           # np.resize repeats what is too short
        order[k::K] = np.resize(rng.permutation(rows), len(order[k::K]))
    return order


def describe(data):
    """Yield what each set holds, to compare with a complete copy. Opens some 100 images of it."""
    for found in load_faces(data, labels=True):
        opened = Counter()
        for i in range(0, len(found), 1 + len(found) // 100):
            try:
                opened["{} x {}".format(*found.read(i).size)] += 1
            except ValueError:
                opened["not readable"] += 1
        labels = [f"{name} {(found.labels == k).sum():,}" for k, name in enumerate(EXPRESSIONS)]
        yield (f"{found.name}: {len(found):,} images, {found.training.sum():,} for training\n"
               f"  left out: {listed(found.skipped)}\n  sizes of {opened.total()}: {listed(opened)}\n"
               f"  {', '.join(labels)}, no label {(found.labels < 0).sum():,}")


if __name__ == "__main__":
    folders = [folder for folder in sys.argv[1:] if not sys.argv[1].startswith("-")]
    data = replace(Config().data, folders=folders) if folders else from_command_line(__doc__)[0].data
    print_all(describe(data))
