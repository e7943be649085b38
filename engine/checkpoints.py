"""Files that are whole or not there, checkpoints read safely, weights that fit or are refused.

A file is written under a temporary name, flushed to disk and renamed, so a kill in the middle of a write
loses nothing. A checkpoint is what `torch.save` writes: a zip archive with a checksum for each entry, so
damage is found before use. It is read with `weights_only=True`, so a file from the internet cannot run
code.
"""

import argparse
import json
import math
import os
import re
import zipfile
import zlib
from pathlib import Path, PurePath
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from engine.settings import Vit

# What a checkpoint may hold besides tensors and plain values: the arguments of a training, and paths in them.
SAFE = [argparse.Namespace, *[(PurePath, f"pathlib{module}.{system}Path") for module in ("", "._local")
                              for system in ("Posix", "Windows")]]
# What a file is that is no checkpoint, by its first bytes.
SIGNS = {rb"(?s).{8}\{\"": "a safetensors file; save its weights once: "
         "torch.save(safetensors.torch.load_file('{}'), 'weights.pt')",
         rb"\s*<": "a web page",
         rb"version https://git-lfs": "a pointer of Git LFS (git lfs pull gets the file)",
         rb"PK\x03\x04": "a checkpoint that is cut short; get it again"}
# Under which keys others keep weights; and what no encoder needs: decoders, heads, projectors.
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "model_ema", "teacher")
NOT_NEEDED = re.compile("decoder|mask_token|head|fc|proj|predict|classifier")
# Public ViTs whose images have other means and deviations than ImageNet's (docs/weights.md), by a part of the
# file's path, or of a weight's name.
FSFM = "FSFM's", [.54822, .42341, .36547], [.27892, .24385, .23493]
FAMILIES = {"mae_face": ("MAE-Face's", [.49895, .41044, .36561], [.29708, .26990, .26526]),
            "rep_decoder": FSFM, "FS-VFM": FSFM, "VF2": FSFM,
            "augreg": ("timm augreg's", [.5, .5, .5], [.5, .5, .5])}


# ---- Writing

def write_file(path, write):
    """Whole or not at all: `write(file)` fills a temporary file, which is flushed and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, because `path` may already have the longest name allowed; with the rank, because the pids of
    # two machines may be the same.
    temporary = path.parent / f".{os.environ.get('RANK', 0)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        raise error.__context__ or error from None       # torch.save hides the system's, such as a full disk
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str):
    """Text as UTF-8, whole or not at all."""
    write_file(path, lambda file: file.write(text.encode()))


def write_array(path, array: np.ndarray):
    """A .npy file, whole or not at all."""
    # Given the file itself, NumPy hides the system's error, such as a full disk, behind one of its own.
    write_file(path, lambda file: np.save(SimpleNamespace(write=file.write), array))


# ---- Reading

def read_json(path):
    """What a JSON file holds; None if it is not there. Raises ValueError naming it if it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not the JSON that a stage has written ({error})") from None


def checksum(path) -> int:
    """CRC-32 of a file, read in blocks of 4 MB."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def read_checkpoint(path) -> dict:
    """A checkpoint as written by `torch.save`, tensors on the CPU.

    Raises ValueError naming the file and saying what it is if it is missing, truncated, damaged (each entry's
    checksum is compared) or of another kind, or if it holds objects that are not SAFE: a pickle can run any
    program when it is loaded."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # A flag that no checksum covers and that PyTorch would obey: "a folder".
                damaged = next((entry.filename for entry in archive.infolist() if entry.external_attr & 16),
                               archive.testzip())
            if damaged:
                raise ValueError(f"damaged (wrong checksum in {damaged}); use another copy")
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("made_of", {}), dict):
            raise ValueError(f"expected a dictionary of tensors, found {type(checkpoint).__name__}")
        return checkpoint
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such checkpoint, a file like best.pt (features: a folder)") from None
    except Exception as error:        # a foreign file is unpickled as far as it goes; that can raise anything
        raise ValueError(f"{path}: {what_is_wrong(path, error)}") from None


def what_is_wrong(path, error: Exception) -> str:
    """What a file is that is no checkpoint, and what to do."""
    refused = re.search(r"GLOBAL (\S+) ", str(error))
    if refused:
        return (f"holds a {refused[1]}, and to load that may run a program; if you trust it, load it once "
                "with torch.load(..., weights_only=False), and save its dictionary of tensors alone")
    if type(error) is ValueError:
        return str(error)
    with open(path, "rb") as file:
        start = file.read(64)
    found = next((kind.format(path) for sign, kind in SIGNS.items() if re.match(sign, start)), "")
    return f"not a whole, plain checkpoint, but {found or f'a file that begins with {start[:24]}'}"


# ---- Weights

def tensors_in(table: dict) -> dict:
    """The tensors of a dictionary or of one in it: under a key of WRAPPERS, else where there are most."""
    inner = {key: tensors_in(value) for key, value in table.items()
             if isinstance(value, dict) and "optim" not in str(key)}
    own = {name: value for name, value in table.items() if torch.is_tensor(value) and not value.is_quantized}
    return next((inner[key] for key in WRAPPERS if inner.get(key)), max([own, *inner.values()], key=len))


def find_weights(checkpoint: dict, known, source) -> tuple[dict, dict]:
    """The tensors of a checkpoint: what has the prefix that all names of the model have there, by its own
    names; and what has not. `known`: the first name of the model, or several that are tried in turn.
    Raises ValueError if there is no tensor."""
    weights = tensors_in(checkpoint)
    if not weights:
        raise ValueError(f"{source}: holds no weights, only {', '.join(map(str, [*checkpoint][:9]))}")
    for first in known:
        prefixes = {name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")}
        prefix = min(prefixes, key=len, default=None)
        if prefix is not None and all(longer.startswith(prefix) for longer in prefixes):
            inside = {name.removeprefix(prefix): value for name, value in weights.items()
                      if name.startswith(prefix)}
            return inside, {name: value for name, value in weights.items() if not name.startswith(prefix)}
    return weights, {}


def load_weights(model, weights, source):
    """Load by name, all of them; the model's `source` tells where they came from. Raises ValueError for NaN
    and infinity, and with the first missing and unexpected names and shapes that differ; the model must not
    be used then."""
    model.source = str(source)
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: NaN or infinity in {', '.join(broken[:3])}; use another copy, or one "
                         "from before its training diverged")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        differences = "\n".join(line[:300] for line in str(error).splitlines()[1:12])
        raise ValueError(f"{source}: a checkpoint of another architecture; use the configuration it was made "
                         f"with\n{differences}") from None


def load_vit(vit, path) -> str:
    """Fill a ViT, or a whole MAE, from our checkpoints or public ones (docs/weights.md); "none" leaves it
    random. -> what it starts from, and what was left out, made to fit or assumed.

    Raises ValueError if the file is not a whole checkpoint, if its ViT has other names or shapes (which are
    listed), or if its record tells of other heads, or other means of its images, than `vit` has.
    """
    if str(path) == "none":
        return "random weights, as asked"
    checkpoint, ours = read_checkpoint(path), vit.state_dict()
    record, usual = checkpoint.get("made_of", {}), Vit()
    weights, outside = find_weights(checkpoint, ["cls_token"], path)
    not_needed = [name for name in weights if name not in ours and NOT_NEEDED.search(name.split(".")[0])]
    # The reference MAE's fine-tuned ViTs have fc_norm in place of norm.
    missing = [name for name in ours if name.startswith("norm.") and "fc_norm.weight" in weights
               and name not in weights]
    left_out = sorted({name.split(".")[0] for name in [*not_needed, *outside]})
    said = (f"{path}; missing keys: {', '.join(missing) or 'none'}; unexpected keys, left out: "
            + (", ".join(left_out) or "none"))
    kept = {name: ours[name] for name in missing}
    kept |= {name: value for name, value in weights.items() if name not in not_needed}
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in ours and name in kept and kept[name].shape != ours[name].shape:
            said += f"; {name} of {kept[name].shape[1] - 1} patches made to fit {ours[name].shape[1] - 1}"
            kept[name] = resized(kept[name], vit.patch_embed.grid)
    load_weights(vit, kept, f"{path} (of stage {record['stage']})" if "stage" in record else path)

    # What no shape tells.
    heads, dim = vit.blocks[0].attn.heads, vit.norm.normalized_shape[0]
    family, mean, std = next((FAMILIES[sign] for sign in FAMILIES if sign in f"{path} {' '.join(weights)}"
                              and not record), ("most ViTs'", usual.mean, usual.std))
    ours = {"vit.heads": heads, "vit.mean": vit.mean, "vit.std": vit.std}
    if hasattr(vit, "decoder_blocks"):
        ours["pretrain.decoder_heads"] = vit.decoder_blocks[0].attn.heads
    told = ours | {"vit.mean": mean, "vit.std": std} | record.get("settings", {})
    other = " ".join(f"--set {name}={told[name]}" for name in ours if told[name] != ours[name])
    other = other.replace(", ", ",")
    if record and other:
        raise ValueError(f"{path}: its ViT was trained with other settings than this one; give it its own: "
                         + other)
    if not record and dim != 64 * heads:
        said += f"; assumed: {heads} heads of {dim // heads} numbers, as the file does not tell"
    if other:
        said += f"; warning: {family} images have another mean and deviation, {other}"
    return said


def resized(positions, grid):
    """Position embeddings of a square grid for another one, as in the reference MAE's fine-tuning; the cls
    token's stays. (1, 1 + M, D) -> (1, 1 + N, D). If M is no square they stay, and are refused."""
    M, D = positions.shape[1] - 1, positions.shape[2]
    side = math.isqrt(M)
    if side * side != M:
        return positions
    patches = positions[:, 1:].reshape(1, side, side, D).permute(0, 3, 1, 2)           # -> (1, D, side, side)
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False)        # -> (1, D, h, w)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)    # -> (1, 1 + N, D)
