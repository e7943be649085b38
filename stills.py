"""Still faces with expression labels (AffectNet), and the networks that learn them: ResNet-18, DAN, a ViT.

What train_stills.py makes, EMMA takes: a CNN that scores the 8 expressions of a face (`load_cnn`).

    python stills.py FILE ...      # whether EMMA takes a checkpoint as its CNN, and what it is
"""

import dataclasses
import sys
import zlib
from collections import Counter

import numpy as np
import torch
from torch import nn

from checkpoints import check_names, load_vit, load_weights, read_checkpoint
from cnn import ResNet18, Trunk, load_trunk
from config import print_all
from dan import DAN, DANWithCentres
from dan_weights import load_dan
from faces import load_faces
from features import ExprClassifier
from images import FaceImages, listed, random_crop, resize
from labels import EXPRESSIONS
from training import generator
from vit import VisionTransformer

CLASSES = len(EXPRESSIONS)


# ---- Faces

def labelled_sets(data) -> list:
    """AffectNet's sets that the `data` section gives: FaceSets with labels. Raises ValueError without any,
    and for one that cannot be opened, naming its setting."""
    if not (data.affectnet_2017 or data.affectnet_2021):
        raise ValueError("no labelled still faces: give data.affectnet_2017 or data.affectnet_2021")
    return load_faces(dataclasses.replace(data, raf_db="", fer2013="", ferplus="", folders=[]))


class LabelledStills(FaceImages):
    """The faces of several sets that have one of the 8 expression labels: those of their training part, or
    the others. Item: uint8 image (size, size, 3), its class.

    In training, with a `seed`: class-balanced sampling. An epoch has as many samples as there are faces;
    sample i is of class i mod K, and each class goes through its own faces in a shuffled order, again and
    again. So each of the K classes that occur comes equally often. Random crop and flip. Faces and crop are
    functions of (seed, epoch, sample); set `epoch` before each epoch.
    Without a seed, for validation: every face once, whole.
    Raises ValueError if no face is left.
    """

    def __init__(self, sets, training: bool, size: int, seed: int | None = None, smallest_crop: float = 1.0):
        super().__init__(size, torch.zeros(0, dtype=torch.long))
        self.sets, self.seed, self.smallest_crop = sets, seed, smallest_crop
        self.skipped, rows = Counter(), []
        for s, found in enumerate(sets):
            part = found.training == training
            kept = np.flatnonzero(part & (found.labels >= 0))
            if part.sum() > len(kept):
                self.skipped["no expression label"] += int(part.sum() - len(kept))
            rows.append(np.stack([np.full(len(kept), s), kept, found.labels[kept]], axis=1))
        # (faces, 3): which set, which face of it, which class. An array, because worker processes share it.
        self.rows = np.concatenate(rows).astype(np.int32)
        if not len(self.rows):
            names = ", ".join(found.name for found in sets)
            raise ValueError(f"{names}: no {'training' if training else 'validation'} face has an expression "
                             f"label; left out: {listed(self.skipped)}")
        self.epoch = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int):
        self._epoch = epoch
        self.order = np.arange(len(self.rows)) if self.seed is None else self.balanced(epoch)

    def balanced(self, epoch: int) -> np.ndarray:
        """The row of each sample of an epoch: (faces,)."""
        classes, rng = np.unique(self.rows[:, 2]), generator(self.seed, epoch)
        order = np.zeros(len(self.rows), np.int64)
        for place, k in enumerate(classes):
            of_class = rng.permutation(np.flatnonzero(self.rows[:, 2] == k))
            samples = order[place::len(classes)]                                   # a view
            samples[:] = np.resize(of_class, len(samples))                         # repeats what is too short
        return order

    def fingerprint(self) -> str:
        """Which faces with which labels, for made_of.py."""
        sets = ", ".join(f"{found.name} {found.fingerprint()}" for found in self.sets)
        return f"{len(self):,} faces, checksum {zlib.crc32(self.rows.tobytes()):08x}, of {sets}"

    def summary(self) -> str:
        """How many faces of each class, and what is left out."""
        counts = np.bincount(self.rows[:, 2], minlength=CLASSES)
        text = ", ".join(f"{name} {count:,}" for name, count in zip(EXPRESSIONS, counts))
        left_out = f"; left out: {listed(self.skipped)}" if self.skipped else ""
        return f"{len(self):,} faces ({text}){left_out}"

    def __len__(self):
        return len(self.rows)

    def row(self, i):
        return self.rows[self.order[i]]

    def where(self, i) -> str:
        s, face, _ = self.row(i)
        return self.sets[s].where(face)

    def item(self, i):
        s, face, label = self.row(i)
        image = self.sets[s].read(face)
        if self.seed is None:
            return resize(image, self.size), label
        return random_crop(image, self.size, generator(self.seed, self.epoch, i), self.smallest_crop), label


# ---- Networks

def build(config) -> nn.Module:
    """The network that stills.network names, with random weights: images (B, 3, height, width) -> scores
    (B, 8); DAN, with the centres of its affinity loss, gives what `DAN.parts` does."""
    s = config.stills
    if s.network == "vit":
        vit = VisionTransformer(**dataclasses.asdict(config.vit), drop_path=s.drop_path)
        return ExprClassifier(vit, config.finetune.token, config.finetune.hidden, config.finetune.dropout)
    return DANWithCentres(DAN(width=s.width)) if s.network == "dan" else ResNet18(CLASSES, s.width)


def fill(model, network: str, path) -> str:
    """Start from a checkpoint: of a ResNet-18, less its last layer, for both CNNs; of an MAE or a ViT for the
    ViT. -> what was left out"""
    if network == "vit":
        return load_vit(model.vit, path)
    if network == "dan":
        return load_trunk(model.dan.trunk, path)
    trunk = Trunk(len(model.conv1.weight))
    said = load_trunk(trunk, path)
    model.load_state_dict(trunk.state_dict(), strict=False)            # all but fc
    return said


def cnn_of(weights: dict, path) -> nn.Module:
    """The network with random weights that has the names and shapes of `weights`: a ResNet-18, or a DAN.

    Raises ValueError if it is neither, or scores another number of classes.
    """
    check_names(weights, path)
    is_dan = "trunk.conv1.weight" in weights
    heads = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    first = weights.get("trunk.conv1.weight" if is_dan else "conv1.weight")
    last = weights.get("fc.weight")
    fits = first is not None and first.shape[1:] == (3, 7, 7) and last is not None and last.ndim == 2
    if not fits or is_dan and len(heads) < 2:
        names = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(f"{path}: got {names}, ...; expected the weights of a ResNet-18 or of a DAN that "
                         "scores expressions")
    if len(last) != CLASSES:
        raise ValueError(f"{path}: a network of {len(last)} classes, expected {CLASSES} "
                         f"({', '.join(EXPRESSIONS)}); use a checkpoint that was trained on these")
    try:
        return DAN(CLASSES, len(heads), len(first)) if is_dan else ResNet18(CLASSES, len(first))
    except ValueError as problem:                                      # a width that DAN does not have
        raise ValueError(f"{path}: {problem}") from None


def load_cnn(path) -> tuple[nn.Module, str]:
    """The CNN of a checkpoint, for EMMA: of train_stills.py, or the public DAN. -> the network, what it is

    It scores the expressions in the order of labels.EXPRESSIONS. Raises ValueError if the file is not a whole
    checkpoint, is neither of both, has another number of classes, or is a ResNet-18 of someone else: nobody
    knows the order of its classes.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("model_state_dict", checkpoint.get("model", checkpoint))
    check_names(weights, path)
    if any(name.startswith("cat_head") for name in weights):
        model = DAN()
        return model, load_dan(model, path)
    of_dan = {name.removeprefix("dan."): value for name, value in weights.items() if name.startswith("dan.")}
    weights = of_dan or weights                             # beside "dan." are the centres
    model = cnn_of(weights, path)
    record = checkpoint.get("made_of")
    if not isinstance(record, dict) or record.get("stage") != "stills":
        raise ValueError(f"{path}: not of train_stills.py, so the order of its {CLASSES} classes is unknown; "
                         "train one from it: --set stills.start=...")
    load_weights(model, weights, path)
    return model, f"our own {'DAN' if of_dan else 'ResNet-18'}, {path}"


if __name__ == "__main__":
    print_all(f"{path}: {load_cnn(path)[1]}" for path in sys.argv[1:])
