"""Weights for DAN: the public AffectNet checkpoint, with its names and classes, or those of our own training.

The public checkpoint is one file of DAN's authors (MIT licence), trained on AffectNet's 8 expressions. It
names the same parts differently and has the classes in AffectNet's order; both are translated here, by name.

    python dan_weights.py          # the map of names and of classes
    python dan_weights.py FILE     # whether a checkpoint fits, and the scores that it gives a grey image
"""

import sys

import torch

from checkpoints import check_names, load_weights, read_checkpoint
from dan import DAN
from images import normalise
from labels import EXPRESSIONS

# Beginnings of names. The public checkpoint counts the trunk's parts by their place in ResNet-18.
PUBLIC_NAMES = {"features.0": "trunk.conv1", "features.1": "trunk.bn1",
                "features.4": "trunk.layer1", "features.5": "trunk.layer2",
                "features.6": "trunk.layer3", "features.7": "trunk.layer4"}
PUBLIC_NAMES |= {f"cat_head{k}.sa": f"heads.{k}.spatial" for k in range(4)}
PUBLIC_NAMES |= {f"cat_head{k}.ca.attention": f"heads.{k}.channel.gate" for k in range(4)}
# Inside these parts, and in fc and bn, the names are the same.

# Its classes in their order (AffectNet's), and which of them is each of ours.
PUBLIC_CLASSES = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
PUBLIC_CLASS = {"Neutral": "neutral", "Anger": "anger", "Disgust": "disgust", "Fear": "fear",
                "Happiness": "happy", "Sadness": "sad", "Surprise": "surprise", "Other": "contempt"}


def our_name(name: str) -> str:
    """cat_head0.sa.conv1x1.0.weight -> heads.0.spatial.conv1x1.0.weight; unknown names stay as they are."""
    for theirs, ours in PUBLIC_NAMES.items():
        if name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


@torch.no_grad()
def reorder_classes(model: DAN):
    """Put the rows of the last two layers, in the public order of the classes, into that of EXPRESSIONS."""
    rows = [PUBLIC_CLASSES.index(PUBLIC_CLASS[name]) for name in EXPRESSIONS]
    for entry in (model.fc.weight, model.fc.bias, model.bn.weight, model.bn.bias,
                  model.bn.running_mean, model.bn.running_var):
        entry.copy_(entry[rows])


def load_dan(model: DAN, path) -> str:
    """Fill a DAN from our own training or from the public AffectNet checkpoint. -> which of the two it is

    The scores come out in the order of EXPRESSIONS either way. Raises ValueError if the file is not a whole
    checkpoint, is a plain ResNet, has another number of classes, or other names or shapes (which are listed).
    """
    checkpoint = read_checkpoint(path)
    keys = [key for key in ("model_state_dict", "model", "state_dict") if key in checkpoint]
    weights = checkpoint[keys[0]] if keys else checkpoint
    check_names(weights, path)
    public = any(name.startswith("cat_head") for name in weights)
    if public:
        weights = {our_name(name): value for name, value in weights.items()}
    else:                                              # our training puts the network's names under "dan."
        ours = {name.removeprefix("dan."): value for name, value in weights.items()
                if name.startswith("dan.")}
        weights = ours or weights
    if "layer1.0.conv1.weight" in weights:
        raise ValueError(f"{path}: a ResNet without DAN's heads; expected a whole DAN. A ResNet-18 can only "
                         "be the trunk from which a training starts")
    found, expected = weights.get("fc.bias", model.fc.bias), model.fc.bias
    if found.shape != expected.shape:
        raise ValueError(f"{path}: a network of {found.numel()} classes, expected {len(expected)} "
                         f"({', '.join(EXPRESSIONS)}); use a checkpoint that was trained on these")
    load_weights(model, weights, path)
    if public:
        reorder_classes(model)
        return "the public DAN, its classes put into the order of ours"
    return "our own DAN"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for theirs, ours in PUBLIC_NAMES.items():
            print(f"{theirs:24s}-> {ours}")
        for k, name in enumerate(EXPRESSIONS):
            print(f"score {PUBLIC_CLASSES.index(PUBLIC_CLASS[name])}, {PUBLIC_CLASS[name]:13s}"
                  f"-> score {k}, {name}")
    for path in sys.argv[1:]:
        model = DAN().eval()
        try:
            print(f"{path}: {load_dan(model, path)}")
        except ValueError as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            sys.exit(2)
        grey = normalise(torch.full((1, 224, 224, 3), 128, dtype=torch.uint8))
        scores = zip(EXPRESSIONS, model(grey)[0].tolist())             # (1, 8) -> (8,)
        print("scores of a grey image:", ", ".join(f"{name} {score:.2f}" for name, score in scores))
