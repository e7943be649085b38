"""Files that are whole or not there, checkpoints read safely, weights that fit or are refused.

A file is written under a temporary name, flushed to disk and renamed, so a kill in the middle of a write
loses nothing. A checkpoint is what `torch.save` writes: a zip archive with a checksum for each entry, so
damage is found before use. It is read with `weights_only=True`, so a file from the internet cannot run
code.
"""

import argparse
import json
import os
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch


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
        cause = error                          # torch.save hides the system's error, such as a full disk
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
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
    """CRC-32 of a file, read in blocks of 4 MB. Raises ValueError if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return crc


def read_checkpoint(path) -> dict:
    """A checkpoint as written by `torch.save`, tensors on the CPU.

    Raises ValueError naming the file if it is missing, truncated, damaged (each entry's checksum is
    compared), or holds anything but tensors and plain values: a pickle can run any program when it is
    loaded, so `weights_only=True` refuses it.
    """
    damaged = None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # A flag that no checksum covers and that PyTorch would obey: "a folder".
                flagged = [entry.filename for entry in archive.infolist() if entry.external_attr & 16]
                damaged = flagged[0] if flagged else archive.testzip()
        if not damaged:
            # The reference MAE saves its arguments as a Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:        # a foreign file is unpickled as far as it goes; that can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole, plain checkpoint ({reason})") from None
    if damaged:
        raise ValueError(f"{path}: damaged (wrong checksum in {damaged}); use another copy")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found {type(checkpoint).__name__}")
    return checkpoint


# ---- Weights

def check_names(weights, source):
    """Raises ValueError unless `weights` are a dictionary of names and tensors."""
    named_tensors = isinstance(weights, dict) and all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in weights.items())
    if not named_tensors:
        raise ValueError(f"{source}: holds no weights; expected a dictionary of names and tensors")


def load_weights(model, weights, source):
    """Load by name, all of them. Raises ValueError with the first missing and unexpected names and shapes
    that differ; the model must not be used then."""
    check_names(weights, source)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        differences = "\n".join(line[:300] for line in str(error).splitlines()[1:12])
        raise ValueError(f"{source}: a checkpoint of another architecture; use the configuration it was made "
                         f"with\n{differences}") from None


def load_vit(vit, path) -> str:
    """Fill a ViT from our pre-training or fine-tuning, or the reference MAE's. -> which names were not used.

    Raises ValueError if the file is not a whole checkpoint, or its ViT has other names or shapes (which are
    listed).
    """
    weights = read_checkpoint(path)
    weights = weights.get("model", weights)
    check_names(weights, path)
    ours = {name.removeprefix("vit."): value for name, value in weights.items() if name.startswith("vit.")}
    weights = ours or weights                          # fine-tuning puts the ViT's names under "vit."
    # MAE files bring a decoder; the reference's fine-tuned ViTs bring a head, and fc_norm in place of norm.
    left_out = {name for name in weights if name.startswith(("decoder", "mask_token", "head", "fc_norm"))}
    missing = {}
    if "fc_norm.weight" in weights:
        missing = {name: value for name, value in vit.state_dict().items()
                   if name.startswith("norm.") and name not in weights}
    kept = {name: value for name, value in weights.items() if name not in left_out}
    load_weights(vit, kept | missing, path)
    return (f"missing keys: {', '.join(missing) or 'none'}; unexpected keys, left out: "
            + (", ".join(sorted({name.split(".")[0] for name in left_out})) or "none"))
