"""Faces in class folders, as in ABAW 4's challenge of learning from synthetic data: a network is trained on
faces that another network has drawn, and is scored on photographs.

The synthetic faces lie in one folder and the real ones in another. Each holds a folder for each class,
`ANGRER` (sic), `DISGUST`, `FEAR`, `HAPPINESS`, `SADNESS` and `SURPRISE`. A class is known by the name of its
folder, never by its place in a list. `cotex.py` is the method for these data.

    python class_folders.py FOLDER ...     # faces of each class, and what is left out
"""

import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from face_set import FOLDER_NAMES, FaceSet, need
from images import FaceImages, find_images, listed, random_crop, resize
from labels import EXPRESSIONS
from training import generator

CLASSES = EXPRESSIONS[1:7]        # Anger to Surprise are 0 to 5 here: one less than among all eight of ABAW
NAMES = "ANGRER (or ANGER), DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE"


def class_of(folder: str) -> int | None:
    """The class of a folder by its name, small letters or capitals; None if it is named after none."""
    label = FOLDER_NAMES.get(folder.lower(), 0) - 1
    return label if 0 <= label < len(CLASSES) else None


def class_folders(root) -> FaceSet:
    """The faces in the class folders of `root`, at any depth below them. `labels` are ABAW's (Anger 1 to
    Surprise 6), as in every FaceSet.

    Hidden folders, and files outside of the class folders, are left out. Raises ValueError if there is no
    class folder, a folder of another name, two folders of one class, or no image.
    """
    root = need(Path(root), f"give the folder that holds {NAMES}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds {NAMES}")
    found = sorted(entry.name for entry in os.scandir(root)
                   if entry.is_dir() and not entry.name.startswith("."))
    unknown = [name for name in found if class_of(name) is None]
    if unknown or not found:
        raise ValueError(f"{root}: found {', '.join(unknown[:5]) or 'no folder'}, expected {NAMES}; "
                         "give the folder that holds these class folders and no others")
    folder_of = {}
    for name in found:
        other = folder_of.setdefault(class_of(name), name)           # the first folder of this class
        if other != name:
            raise ValueError(f"{root}: both {other} and {name} hold {CLASSES[class_of(name)]}; "
                             "put their images into one folder")
    paths, labels, skipped = [], [], Counter()
    for path in find_images(root, skipped):
        folder, _, rest = os.fsdecode(path).partition("/")
        if not rest:
            skipped["not in a class folder"] += 1
        else:
            paths.append(path)
            labels.append(class_of(folder) + 1)
    if not paths:
        raise ValueError(f"{root}: no image in {', '.join(found)}; left out: {listed(skipped)}")
    return FaceSet(str(root), root, paths, labels, [True] * len(paths), skipped)


def describe(found: FaceSet) -> str:
    """Lines that tell what a set holds, to compare with the counts in docs/data.md."""
    counts = np.bincount(found.labels - 1, minlength=len(CLASSES))
    without = [name for name, count in zip(CLASSES, counts) if not count]
    text = (f"{found.name}: {len(found):,} images, "
            + ", ".join(f"{name} {count:,}" for name, count in zip(CLASSES, counts))
            + f"\n  left out: {listed(found.skipped)}")
    return text + (f"\n  without an image: {', '.join(without)}" if without else "")


class ClassFaces(FaceImages):
    """The faces of class folders. Item: uint8 image (size, size, 3), its class 0 to 5, and noise of the shape
    `noise`, numbers in [0, 1).

    In training, with a `seed`: a random crop and flip, and the noise (V, N) that hides patches from V views
    (`cotex.CoTEX`). Both are functions of (seed, epoch, sample); set `epoch` before each epoch.
    Without a seed, for validation: the whole image, and zeros for noise.
    """

    def __init__(self, found: FaceSet, size: int, seed: int | None = None, smallest_crop: float = 1.0,
                 noise: tuple[int, int] = (0, 0)):
        super().__init__(size, torch.zeros(0, dtype=torch.long), torch.zeros(0, *noise))
        self.found, self.seed, self.epoch = found, seed, 0
        self.smallest_crop, self.noise = smallest_crop, noise

    def __len__(self):
        return len(self.found)

    def where(self, i) -> str:
        return self.found.where(i)

    def item(self, i):
        image, label = self.found.read(i), self.found.labels[i] - 1
        if self.seed is None:
            return resize(image, self.size), label, np.zeros(self.noise, np.float32)
        rng = generator(self.seed, self.epoch, i)
        pixels = random_crop(image, self.size, rng, self.smallest_crop)
        return pixels, label, rng.random(self.noise, dtype=np.float32)


if __name__ == "__main__":
    text, problems = "", []
    for folder in sys.argv[1:]:
        try:
            text += describe(class_folders(folder)) + "\n"
        except (ValueError, OSError) as problem:
            problems.append(f"refused: {problem}")
    print(text, end="")                                              # in one piece, for `| head`
    print("".join(f"{problem}\n" for problem in problems), end="", file=sys.stderr)
    sys.exit(2 if problems else 0)
