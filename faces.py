"""The sets of still faces that a configuration names, opened and counted (paper §4.1.1).

AffectNet (2017 and 2021), RAF-DB, FER2013 with or without FER+, any folder: any mix of them. Each becomes a
`face_set.FaceSet`.

    python faces.py --config my.yaml  # each set: how many faces, of which sizes and labels, what is left out
    python faces.py FOLDER ...        # the same for any folder of images
"""

import sys
from collections import Counter

from affectnet import affectnet_2017, affectnet_2021
from config import from_command_line
from face_set import FaceSet, image_folder
from fer2013 import fer2013
from images import listed
from labels import EXPRESSIONS
from raf_db import raf_db
from settings import Data

SIZES_OF = 100        # faces of a set are opened to see their sizes
# A set that cannot be opened is a mistake in the settings; any other OSError is a disk that fails.
REFUSALS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


def open_sets(data):
    """Yield (setting, its FaceSet, "") for each set that the `data` section gives a path for ("" = not used),
    or (setting, None, what is wrong with it)."""
    fer_setting = "data.fer2013 with data.ferplus" if data.ferplus else "data.fer2013"
    asked = [("data.affectnet_2017", data.affectnet_2017, lambda p: affectnet_2017(p, data.affectnet_crop)),
             ("data.affectnet_2021", data.affectnet_2021, affectnet_2021),
             ("data.raf_db", data.raf_db, raf_db),
             (fer_setting, data.fer2013, lambda p: fer2013(p, data.ferplus))]
    asked += [(f"data.folders[{i}]", folder, image_folder) for i, folder in enumerate(data.folders)]
    asked = [(setting, path, load) for setting, path, load in asked if path]
    if data.ferplus and not data.fer2013:
        yield "data.ferplus", None, ("FER+ holds labels for FER2013's images and no images of its own; "
                                     "set data.fer2013 too")
    elif not asked:
        yield "data", None, "no data set is given; set data.affectnet_2017, _2021, raf_db, fer2013 or folders"
    for setting, path, load in asked:
        found, problem = None, ""
        try:
            found = load(path)
            if not len(found):
                problem = f"no image found in {path}; left out: {dict(found.skipped)}"
        except REFUSALS as error:
            problem = str(error)
        yield setting, None if problem else found, problem


def load_faces(data) -> list[FaceSet]:
    """Every set that the `data` section gives a path for.

    Raises one ValueError with all problems, each beginning with its setting; also if no set is given, or
    one has no image. OSError if the disk fails.
    """
    sets, problems = [], []
    for setting, found, problem in open_sets(data):
        if problem:
            problems.append(f"{setting}: {problem}")
        else:
            found.setting = setting
            sets.append(found)
    if problems:
        raise ValueError("\n".join(problems))
    return sets


def describe(found: FaceSet) -> str:
    """Lines that tell what a set holds, to compare with a complete copy. Opens at most SIZES_OF images, and
    the labels of AffectNet 2021."""
    sizes = Counter()
    for i in range(0, len(found), 1 + len(found) // SIZES_OF):
        try:
            sizes["{} x {}".format(*found.read(i).size)] += 1
        except ValueError:
            sizes["not readable"] += 1
    labels = [f"{name} {(found.labels == k).sum():,}" for k, name in enumerate(EXPRESSIONS)]
    complete = f" (a complete copy: {found.complete})" if found.complete else ""
    return (f"{found.name}: {len(found):,} images, {found.training.sum():,} of them for training{complete}\n"
            f"  left out: {listed(found.skipped)}\n"
            f"  sizes of {sizes.total()}: {listed(sizes)}\n"
            f"  {', '.join(labels)}, no label {(found.labels < 0).sum():,}\n")


if __name__ == "__main__":
    configured = not sys.argv[1:] or sys.argv[1].startswith("-")
    data = from_command_line(__doc__)[0].data if configured else Data(folders=sys.argv[1:])
    text, refused = "", False
    for setting, found, problem in open_sets(data):
        text += f"refused: {setting}: {problem}\n" if problem else describe(found)
        refused = refused or bool(problem)
    print(text, end="")                                              # in one piece, for `| head`
    sys.exit(2 if refused else 0)
