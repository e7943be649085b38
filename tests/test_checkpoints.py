"""Files whole or not at all; checkpoints that are damaged, foreign or harmful; weights that do not fit."""

import argparse
import contextlib
import errno
import math
import os
import pickle
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.checkpoints import (checksum, find_weights, load_vit, load_weights, read_checkpoint, read_json,
                                write_array, write_file, write_text)
from mae import MaskedAutoencoder
from models import MAE, VIT, small
from tiny import same
from vit import VisionTransformer


def save(path, state, new_format=True):
    write_file(path, lambda file: torch.save(state, file, _use_new_zipfile_serialization=new_format))
    return path


def test_a_file_is_flushed_to_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Under a name that tells rank and process, as two machines may share a folder and a pid, and is short,
    as that of the file may already be as long as the system allows."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.listdir(path.parent)) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    path = tmp_path / "new/folder" / ("é" + "x" * 253)
    write_text(path, "größe")
    assert calls == [[f".3.{os.getpid()}.tmp"], "replace"] and path.read_bytes() == "größe".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    def half(file):
        file.write(b"half")
        raise error

    write_text(tmp_path / "old", "whole")
    with pytest.raises(type(error)):
        write_file(tmp_path / "old", half)
    assert list(tmp_path.iterdir()) == [tmp_path / "old"] and (tmp_path / "old").read_text() == "whole"


class Full(contextlib.nullcontext):
    """A file on a disk with 1000 bytes left."""
    room = 1000

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("write", [lambda path: save(path, {"weights": torch.ones(999)}),
                                   lambda path: write_array(path, np.ones(999))], ids=["torch", "numpy"])
def test_a_full_disk_is_told_as_such_also_by_pytorch_and_numpy(tmp_path, monkeypatch, write):
    """Both hide the system's error behind one of their own; `launch` says what to do about a full disk."""
    monkeypatch.setattr("builtins.open", lambda *arguments: Full(Full()))
    with pytest.raises(OSError, match=f"^.Errno {errno.ENOSPC}. full$"):
        write(tmp_path / "file")


def test_arrays_and_json_read_back_the_same_and_a_checksum_is_that_of_the_whole_file(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_array(tmp_path / "a.npy", array)
    read = np.load(tmp_path / "a.npy")
    assert read.dtype == np.float16 and np.array_equal(read, array)
    content = np.random.default_rng(0).bytes((1 << 22) + 5)                # more than one block
    (tmp_path / "b").write_bytes(content)
    assert checksum(tmp_path / "b") == zlib.crc32(content)
    write_text(tmp_path / "c.json", '{"a": [1]}')
    assert read_json(tmp_path / "c.json") == {"a": [1]} and read_json(tmp_path / "nowhere") is None
    for refused, message in ((lambda: read_json(tmp_path / "b"), "b: not the JSON that a stage has written"),
                             (lambda: checksum(tmp_path / "d"), "No such file or directory: .*d")):
        with pytest.raises((ValueError, OSError), match=message):
            refused()


STATE = {"model": {"a": torch.arange(64.0).reshape(8, 8), "b": torch.ones(2, dtype=torch.int8)},
         "epoch": 3, "name": "é", "none": [None, 1.5, True], "args": argparse.Namespace(lr=1e-3)}


def test_a_checkpoint_cut_short_is_refused_and_with_any_byte_damaged_too_or_it_reads_the_same(tmp_path):
    for new_format in (False, True):                           # also an old one, as of the reference MAE
        path = save(tmp_path / "last.pt", STATE, new_format)
        assert repr(read_checkpoint(path)) == repr(STATE)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="last.pt"):
            read_checkpoint(path)
    # The table of contents: 46 bytes an entry. In bytes 10 and 38, bits 8 and 16: "compressed", "a folder".
    entries = [at for at in range(len(whole)) if whole[at:at + 4] == b"PK\1\2"]
    weights = range(start := whole.index(STATE["model"]["a"].numpy().tobytes()), start + 256, 5)
    for at in [*range(0, len(whole), 61), *range(entries[0], entries[0] + 46), *weights,
               *(start + i for start in entries for i in (10, 38))]:
        for bit in (8, 16):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            try:
                assert repr(read_checkpoint(path)) == repr(STATE) and at not in weights, (at, bit)
            except ValueError as refusal:
                assert str(refusal).startswith(f"{path}: "), (at, bit)
                assert at not in weights or "damaged (wrong checksum in archive/data/0)" in str(refusal)


# Files that are no checkpoints, and what is said of them.
KINDS = {b"": "a file that begins with b''", b"hello, I am text\n": "a file that begins with b'hello",
         b"\x00" * 999: "a file that", b"PK\x03\x04": "a check.* cut short",
         b"\x89PNG\r\n\x1a\n": "a file that beg", b"<!DOCTYPE html><p>Sign in": "a web page",
         b"version https://git-lfs.github.com/spec/v1\noid": "a pointer of Git LFS .git lfs pull",
         b"\x80\0\0\0\0\0\0\0" + b'{"cls_token":': "a safetensors file; .*safetensors.torch.load_file"}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_another_kind_is_no_checkpoint_and_it_is_said_what_it_is(tmp_path):
    path, rng = tmp_path / "last.pt", np.random.default_rng(0)
    with pytest.raises(ValueError, match="last.pt: no such checkpoint"):
        read_checkpoint(path)
    for content in [*KINDS, *(b"\x80\x02" + rng.bytes(rng.integers(1, 60)) for _ in range(150))]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as refusal:
            read_checkpoint(path)
        kind = f"(not a whole, plain checkpoint, but )?{KINDS.get(content, '')}"
        assert re.match(f"{path}: {kind}", str(refusal.value))
    with pytest.raises(ValueError, match="last.pt: expected a dictionary of tensors, found Tensor"):
        read_checkpoint(save(path, torch.ones(2)))


class Evil:
    """A pickle that creates a file when it is loaded."""
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_runs_nothing_and_its_weights_can_be_saved_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, weights = Path("best.pt"), {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    layer = nn.Linear(1, 1)
    layer.load_state_dict(weights)
    for state, refused in (({"model": weights, "optimizer": Evil()}, "io.open"), (layer, "torch.nn.*Linear"),
                           ({"state_dict": weights, "best": np.float64(1)}, "numpy.*scalar"),
                           (weights | {"best": np.float64(1)}, "numpy.*scalar"),
                           ({"model": layer}, "torch.nn.*Linear")):
        for new_format in (True, False):
            save(path, state, new_format)
            with pytest.raises(ValueError, match=f"best.pt: holds a {refused}, and .* run a pr") as said:
                read_checkpoint(path)
            assert not (tmp_path / "ran").exists() and "\x1b" not in str(said.value)
        (tmp_path / "ran").unlink(missing_ok=True)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="best.pt: not a whole, plain checkpoint"):
        read_checkpoint(path)


def test_weights_that_do_not_fit_are_listed_by_name_and_none_or_such_that_are_not_finite_refused():
    weights = {"0.weight": torch.ones(2, 4), "0.bias": torch.ones(2), "c": torch.ones(1)}
    with pytest.raises(ValueError) as refusal:
        load_weights(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2, bias=False)), weights, "best.pt")
    for words in ("best.pt: a checkpoint of another architecture; use the configuration it was made with\n",
                  'Missing key(s) in state_dict: "1.weight"', 'state_dict: "c"', "mismatch for 0.weight"):
        assert words in str(refusal.value)
    for weights in ({"weight": 3}, {"model": [torch.zeros(1)]}, {"model": {}}):
        with pytest.raises(ValueError, match="best.pt: holds no weights, only (weight|model)"):
            find_weights(weights, [], "best.pt")
    for value in (math.nan, math.inf):
        weights = {"weight": torch.tensor([[1.0, value]]), "bias": torch.ones(1)}
        with pytest.raises(ValueError, match="best.pt: NaN or infinity in weight"):
            load_weights(nn.Linear(2, 1), weights, "best.pt")


DECODER = "decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, mask_token"
HEAD = {"head.weight": torch.ones(8, 16), "head.bias": torch.ones(8)}
NORM_GONE = HEAD | {"fc_norm.weight": torch.ones(16), "norm.weight": None, "norm.bias": None}
MORE = {name: torch.ones(2) for name in ("rep_decoder_blocks.0.w", "projector.0.w", "predictor.w")}
# Public ViTs and our own: how each is wrapped, its prefix, what lies beside its names, what is left out.
VITS = {"flat": (lambda w: w, "", {}, "none"), "ours": (lambda w: {"model": w}, "", "mae", DECODER),
        "fine-tuned": (lambda w: {"model": w, "epoch": 3}, "vit.", {"head.0.weight": torch.ones(8)}, "head"),
        "reference": (lambda w: {"model": w}, "", HEAD, "head"),
        "its mean pooling": (lambda w: w, "", NORM_GONE, "fc_norm, head"),
        "FMAE": (lambda w: {"model": w, "args": argparse.Namespace(out=Path("/a"))}, "", "mae", DECODER),
        "FSFM": (lambda w: {"model": w}, "", MORE, "predictor, projector, rep_decoder_blocks"),
        "UniGaze": (lambda w: {"model_state": w}, "vit.", {"gaze_fc.weight": torch.ones(2)}, "gaze_fc"),
        "EMMA": (lambda w: {"model": w}, "vit.", {"cnn.conv1.weight": torch.ones(1)}, "cnn"),
        "timm": (lambda w: {"state_dict": w | {"step": 3}}, "module.", {}, "none"),
        "DINO": (lambda w: {"student": {}, "teacher": w}, "backbone.", {"head.w": torch.ones(1)}, "head"),
        "nested": (lambda w: {"net": {"ema": w}, "optimizer": {"state": MORE | HEAD}}, "a.b.", {}, "none")}


@pytest.mark.parametrize("wrap, prefix, beside, left_out", VITS.values(), ids=VITS)
def test_a_vit_is_filled_from_ours_and_from_public_files_whatever_lies_around_its_weights(
        tmp_path, wrap, prefix, beside, left_out):
    vit, missing, warning = small(VisionTransformer, VIT), "none", ""
    weights = {name: torch.randn_like(value) for name, value in vit.state_dict().items()}
    saved = {f"{prefix}{name}": value for name, value in weights.items()}
    saved = small(MaskedAutoencoder, MAE).state_dict() | saved if beside == "mae" else saved | beside
    if beside is NORM_GONE:
        missing = "norm.weight, norm.bias"
        weights |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    if beside is MORE:
        warning = ("; warning: FSFM's images have another mean and deviation, --set vit.mean="
                   "[0.54822,0.42341,0.36547] --set vit.std=[0.27892,0.24385,0.23493]")
    saved = {name: value for name, value in saved.items() if value is not None}
    said = load_vit(vit, save(tmp_path / "a.pt", wrap(saved)))
    assert said == (f"{tmp_path}/a.pt; missing keys: {missing}; unexpected keys, left out: {left_out}; "
                    f"assumed: 2 heads of 8 numbers, as the file does not tell{warning}")
    assert same(dict(vit.state_dict()), weights)


def test_a_vit_of_other_names_or_settings_is_refused_and_positions_of_another_size_are_made_to_fit(tmp_path):
    def refused(state, message, kind=VisionTransformer, sizes=VIT):
        with pytest.raises(ValueError, match=f"(?s)augreg.pt.*{message}"):      # which says nothing of ours
            load_vit(small(kind, sizes), save(tmp_path / "augreg.pt", state))

    weights, mae = small(VisionTransformer, VIT).state_dict(), small(MaskedAutoencoder, MAE).state_dict()
    other = {f"visual.{name}": value for name, value in weights.items() if "norm" not in name}
    refused(other | {"visual.ln_pre.weight": torch.ones(1)}, "Missing.*blocks.0.norm1.*Unexpected.*ln_pre")
    refused(weights | {"prompt.weight": torch.ones(1)}, "another architecture.*Unexpected.*prompt")
    both = {f"views.{v}.vit.{name}": value for v in (0, 1) for name, value in weights.items()}
    refused({"model": both, "made_of": {"stage": "cotex"}}, "of stage cotex.*Missing.*cls_to.*Unexp.*views")
    refused(weights, "Missing.*decoder", MaskedAutoencoder, MAE)
    for name, value in (("vit.heads", 4), ("vit.mean", [.5, .5, .5]), ("vit.std", [.5, .5, .5])):
        refused({"model": weights, "made_of": {"stage": "finetune", "settings": {name: value}}},
                f"with other settings than this one; give it its own: --set {name}=")
    other = dict(mean=[.5, .5, .5], std=[.5, .5, .5])
    before = {"model": weights, "made_of": {"stage": "pretrain"}}         # of before there was vit.mean
    refused(before, "--set vit.mean=.0.485.*--set vit.std=.0.229", sizes=VIT | other)
    said = load_vit(small(VisionTransformer, VIT, **other), save(tmp_path / "FMAE.pth", weights))
    assert "warning: most ViTs' images have another mean and deviation, --set vit.mean=[0.485," in said
    told = {"model": mae, "made_of": {"stage": "pretrain", "settings": {"vit.heads": 2, "vit.dim": 16}}}
    assert "assumed" not in load_vit(small(MaskedAutoencoder, MAE), save(tmp_path / "a.pt", told))
    told["made_of"] = {"settings": {"pretrain.decoder_heads": 4}}
    refused(told, "--set pretrain.decoder_heads=4", MaskedAutoencoder, MAE)

    # A grid of 4 x 4 for one of 2 x 2. Bicubic interpolation keeps a plane; the cls token's position stays.
    plane = torch.arange(4.0)[:, None] + 10 * torch.arange(4.0)                                      # (4, 4)
    large = torch.cat([torch.full((1, 1, 16), 7.0), plane.reshape(1, 16, 1).expand(1, 16, 16)], dim=1)
    vit = VisionTransformer(**{**VIT, "image_size": 2 * VIT["patch"]})
    said = load_vit(vit, save(tmp_path / "mae_face.pt", weights | {"pos_embed": large}))
    assert "pos_embed of 16 patches made to fit 4" in said and "MAE-Face's images have" in said
    assert (vit.pos_embed[0, 0] == 7).all() and torch.allclose(
        vit.pos_embed[0, 1:, 0], torch.tensor([5.5, 25.5, 7.5, 27.5]), atol=1.2)          # less at the edges
    refused(weights | {"pos_embed": large[:, :-1]}, "mismatch for pos_embed")
