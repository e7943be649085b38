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
from functools import cached_property, partial
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from engine.config import Config, from_command_line, print_all
from engine.training import generator
from images import EXTENSIONS, find_images, leads_out, listed, read_image, sizes, with_face
from labels import EXPRESSIONS

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
HELD_OUT = {"val", "valid", "validation", "val_set", "test", "test_set", "publictest", "privatetest"}
CLASSES = EXPRESSIONS[1:7]           # of class folders: Anger to Surprise
AFFECTNET_COLUMNS = ["subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
                     "facial_landmarks", "expression", "valence", "arousal"]
FER2013_COLUMNS, FERPLUS_COLUMNS = ["emotion", "pixels", "Usage"], ["Usage", "Image name", *FERPLUS]
TRAINING = {"Training": True, "PublicTest": False, "PrivateTest": False, "train": True, "test": False}
MOST_MISSING = 0.9                   # of the images of a list; if more are, it is not the list of this folder
WHOLE = (0, 0, 999_999, 999_999)     # the box of an image that is a face already
UNREAD = -2                          # the label lies in a file beside the image, and is read when asked for


class Faces:
    """n faces of one data set, given as (path, label, training, box) of each.

    `paths` (n,), relative to `root`, are one array of bytes, whose memory worker processes share. `training`
    (n,) bool: the set's own split. `boxes` (n, 4): left, top, right, bottom of a face in its photograph, in
    pixels. `skipped` {reason: how many are left out}.
    """

    def __init__(self, name: str, root, faces: list, skipped=()):
        paths, codes, training, boxes = zip(*faces) if faces else [()] * 4
        self.name, self.root, self.skipped = name, str(root), +Counter(skipped)
        self.paths, self.codes = np.array(paths, np.bytes_), np.array(codes, np.int8)
        self.training, self.boxes = np.array(training, bool), np.array(boxes, np.int32)

    def __len__(self):
        return len(self.paths)

    @cached_property
    def labels(self) -> np.ndarray:
        """(n,) int8: ABAW class; -1 = none, also if AffectNet 2021's file is missing, broken or pickled."""
        for i in np.flatnonzero(self.codes == UNREAD):
            image, self.codes[i] = Path(self.where(i)), -1
            with suppress(FileNotFoundError, EOFError, ValueError, LookupError, TypeError, AttributeError):
                value = np.load(image.parents[1] / "annotations" / f"{image.stem}_exp.npy").item()
                self.codes[i] = AFFECTNET[f"{float(value):g}"]                             # of "3", 3 or 3.0
        return self.codes

    def where(self, i) -> str:
        """The file of face i, or its file and line."""
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def read(self, i) -> Image.Image:
        """Face i as RGB. ValueError naming its file (and line) if it is none; OSError if the disk fails."""
        where, (left, top, right, bottom) = self.where(i), self.boxes[i].tolist()
        image = read_image(where) if where.lower().endswith(EXTENSIONS) else read_row(where)
        box = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"{where}: {image.width} x {image.height} pixels, outside of the face box "
                             f"{self.boxes[i]}; in a copy of cut-out faces set data.affectnet_crop=false")
        return with_face(image.crop(box), where)

    def fingerprint(self) -> str:
        """Number, names and boxes of the faces, and the sizes of some files, wherever they lie."""
        names = crc32(self.boxes.tobytes(), crc32(self.paths.tobytes()))
        some = sizes(self.where(i) for i in range(0, len(self), 1 + len(self) // 100))
        return f"{len(self):,} images, names {names:08x}, sizes {some}"


def joined(sets: list[Faces]) -> Faces:
    """Several sets as one, for `data.Images`."""
    whole = Faces("all", "", [])
    whole.paths = np.concatenate([np.char.add(os.fsencode(f"{found.root}/"), found.paths) for found in sets])
    for column in ("codes", "training", "boxes"):
        setattr(whole, column, np.concatenate([getattr(found, column) for found in sets]))
    return whole


# ---- A list of faces

def rows(path, columns: list[str], take, separator=","):
    """Yield take(place, *fields) of each row, the fields in the order of `columns`, whatever the header's is;
    a list may have none. Place: the line, and the row's offset in the file. Raises ValueError naming file and
    line for other fields, and for an error of `take`."""
    header, end = columns, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            text = line.decode("utf-8-sig", "surrogateescape").strip()
            fields = [field.strip(' "') for field in text.split(separator)]
            if number == 1 and set(columns) <= set(fields):
                header = fields
            elif text:
                try:
                    row = dict(zip(header, fields, strict=True))
                    yield take(f"line {number} at byte {start}", *[row[column] for column in columns])
                except (LookupError, ValueError) as error:
                    raise ValueError(f"{path} line {number}: got {text[:80]!r}, expected {','.join(columns)} "
                                     f"({type(error).__name__}: {error})") from None


def on_disk(name: str, root: Path, entries: list) -> Faces:
    """The set of a list: of each face its file below `root`, label, training, box.

    What is no face, absent, or has None for a box is left out and counted. Raises ValueError if a file leaves
    the root, and if nearly all are absent. To look at each of 420,000 files takes long on a network disk:
    each folder is listed once, and links are resolved only if one leads out.
    """
    links = Counter()
    there = set(find_images(root, links))
    named = [face for face in entries if face[1] is not None]
    found = [face for face in named if face[0] in there]
    faces = [face for face in found if face[3] is not None]
    absent = [os.fsdecode(face[0]) for face in named if face[0] not in there]
    for file in absent:
        climbs = os.path.isabs(file) or ".." in file.split("/")
        if climbs or links["link out of the folder"] and leads_out(root / file, os.path.realpath(root)):
            raise ValueError(f"{file!r} leaves its data root {root}; entries must lie inside it")
    if len(absent) > MOST_MISSING * len(named):
        raise ValueError(f"{len(absent):,} of the {len(named):,} images that the list names are not there; "
                         f"looked for {root}/{absent[0]}; give their folder, or a list of those you have")
    skipped = {"not a face": len(entries) - len(named), "image not on disk": len(absent),
               "no usable face box": len(found) - len(faces)}
    return Faces(name, root, faces, skipped)


# ---- The reader of each set

def affectnet_2017(root, crop: bool = False) -> Faces:
    """AffectNet, first release. `crop`: cut each face out by its list's box."""
    def take(training, _, file, x, y, width, height, landmarks, expression, *va):
        # Some copies have C:\faces\Manually_Annotated_Images\1\a.jpg for 1/a.jpg.
        file = f"/{file}".replace("\\", "/").rpartition(f"/{images.name}/")[2].removeprefix("/")
        box = face_box(x, y, width, height) if crop else WHOLE
        return os.fsencode(file), AFFECTNET[expression], training, box

    images, entries = Path(root) / "Manually_Annotated_Images", []
    for name in ("training.csv", "validation.csv"):
        path = Path(root) / name
        path = path if path.exists() else path.parent / "Manually_Annotated_file_lists" / name
        entries += rows(path, AFFECTNET_COLUMNS, partial(take, name == "training.csv"))
    return on_disk("AffectNet 2017", images, entries)


def face_box(*fields: str) -> tuple | None:
    """x, y, width, height as left, top, right, bottom, in pixels. None if they are no box."""
    if not all(re.fullmatch(r"-?\d{1,6}(\.\d*)?", field) for field in fields):
        return None
    x, y, width, height = (int(float(field)) for field in fields)
    return (x, y, x + width, y + height) if width > 0 and height > 0 else None


def affectnet_2021(root) -> Faces:
    """AffectNet, second release. Its labels lie in 290,000 small files, which are opened when asked for."""
    faces, skipped = [], Counter()
    for split in ("train_set", "val_set"):
        found = find_images(Path(root), skipped, f"{split}/images")
        faces += [(path, UNREAD, split == "train_set", WHOLE) for path in found]
    return Faces("AffectNet 2021", root, faces, skipped)


def raf_db(root) -> Faces:
    """RAF-DB's basic set. `train_1.jpg 5` or `train_1_aligned.jpg 5` is Image/aligned/train_1_aligned.jpg or,
    where there is no Image/aligned/, the whole photograph, Image/original/train_1.jpg."""
    def take(_, file, label):
        stem, extension = os.path.splitext(file)
        file = os.fsencode(stem.removesuffix("_aligned") + ending + extension)
        return file, RAF_DB[label], TRAINING[stem.partition("_")[0]], WHOLE

    root = Path(root) / "basic" if (Path(root) / "basic").is_dir() else Path(root)
    name, images, ending = "RAF-DB", root / "Image/aligned", "_aligned"
    if not images.is_dir() and (root / "Image/original").is_dir():
        name, images, ending = "RAF-DB, whole photographs (no Image/aligned)", root / "Image/original", ""
    entries = rows(root / "EmoLabel/list_patition_label.txt", ["name", "label"], take, None)           # (sic)
    return on_disk(name, images, list(entries))


def fer2013(path, ferplus="") -> Faces:
    """FER2013's 48 x 48 grey faces; with FER+, its labels instead, and without the rows that are no face.

    Each path is the CSV or the folder that holds it; FER2013 may be class folders of images too. FER+'s label
    has most of the ten votes; it is -1 where two have equally many, or where "unknown" or "NF" has the most.
    """
    def take(place, emotion, pixels, usage):
        if pixels.count(" ") != 48 * 48 - 1:
            raise ValueError(f"{pixels.count(' ') + 1} pixels, not 2,304 with one space between two")
        return f"{csv.name} {place}".encode(), FER2013[emotion], TRAINING[usage], WHOLE

    def vote(_, usage, image, *votes):
        votes = list(map(int, votes))
        most = [label for label, count in zip(FERPLUS.values(), votes) if count == max(votes)]
        label = most[0] if len(most) == 1 else -1
        return label if image else None, TRAINING[usage]         # a row that is no face has no image name

    if not ferplus and Path(path).is_dir() and not (Path(path) / "fer2013.csv").exists():
        return image_folder(path)
    csv, plus = (Path(given) / name if Path(given).is_dir() else Path(given)
                 for given, name in ((path, "fer2013.csv"), (ferplus, "fer2013new.csv")))
    faces, name = list(rows(csv, FER2013_COLUMNS, take)), "FER2013"
    if ferplus:
        voted, name = list(rows(plus, FERPLUS_COLUMNS, vote)), "FER2013 with FER+ labels"
        if [training for _, training in voted] != [training for _, _, training, _ in faces]:
            raise ValueError(f"{plus}: {len(voted)} rows that do not fit the {len(faces)} of {csv} and their "
                             "Usage; both must be complete and in their first order")
        faces = [(place, label, *rest) for (place, _, *rest), (label, _) in zip(faces, voted)]
    kept = [face for face in faces if face[1] is not None]
    return Faces(name, csv.parent, kept, {"not a face": len(faces) - len(kept)})


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


def image_folder(root) -> Faces:
    """Any folder of images, flat or nested. The nearest folder named after an expression gives the label, if
    there is one. What lies in a folder called val or test (or the like) is not training."""
    faces, skipped = [], Counter()
    for path in find_images(Path(root), skipped):
        folders = os.fsdecode(os.path.dirname(path)).lower().split("/")
        named = [-1, *(FOLDER_NAMES[folder] for folder in folders if folder in FOLDER_NAMES)]
        faces.append((path, named[-1], HELD_OUT.isdisjoint(folders), WHOLE))
    return Faces(str(root), root, faces, skipped)


def class_folders(root) -> Faces:
    """Faces in folders called ANGRER (sic), DISGUST, ...: ABAW 4's challenge of learning from drawn faces.
    Raises ValueError if there are none, or if one lies elsewhere."""
    found = image_folder(root) if Path(root).is_dir() else Faces("", root, [])
    strange = np.flatnonzero((found.labels < 1) | (found.labels > len(CLASSES)))
    if len(strange) or not len(found):
        example = found.where(strange[0]) if len(strange) else "no image"
        raise ValueError(f"{root}: found {example}; give the folder that holds ANGRER (or ANGER), DISGUST, "
                         "FEAR, HAPPINESS, SADNESS, SURPRISE and no others")
    return found


# ---- The sets of a configuration

def load_faces(data) -> list[Faces]:
    """Every set that the `data` section names, with its `setting`. Raises one ValueError with all problems,
    each after its setting; also if no set is given, or one has no image. OSError if the disk fails."""
    given = [("data.affectnet_2017", data.affectnet_2017, partial(affectnet_2017, crop=data.affectnet_crop)),
             ("data.affectnet_2021", data.affectnet_2021, affectnet_2021),
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
    if problems or not sets:
        raise ValueError("\n".join(problems) or "data: no data set is given; set data.affectnet_2017, "
                         "affectnet_2021, raf_db, fer2013 or folders")
    return sets


def labelled_sets(data) -> list[Faces]:
    """AffectNet's sets that the `data` section names. Raises ValueError as load_faces does."""
    if not (data.affectnet_2017 or data.affectnet_2021):
        raise ValueError("no labelled still faces: give data.affectnet_2017 or data.affectnet_2021")
    return load_faces(replace(data, raf_db="", fer2013="", ferplus="", folders=[]))


def balanced_order(labels, seed: int):
    """Class-balanced sampling, for `data.Images`: a function epoch -> (n,) rows; n of the labels are not -1.

    Sample i is of class i mod K of the K classes that occur, and each class goes through its own rows in a
    shuffled order, again and again. So each comes equally often.
    """
    of_class = [np.flatnonzero(labels == k) for k in np.unique(labels[labels >= 0])]
    n, K = sum(map(len, of_class)), len(of_class)

    def order_of(epoch: int) -> np.ndarray:
        rng, order = generator(seed, epoch), np.zeros(n, np.int64)
        for k, rows in enumerate(of_class):
            samples = order[k::K]                                                # a view
            samples[:] = np.resize(rng.permutation(rows), len(samples))          # repeats what is too short
        return order
    return order_of


def describe(data):
    """Yield what each set holds, to compare with a complete copy. Opens some 100 images of it."""
    for found in load_faces(data):
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
