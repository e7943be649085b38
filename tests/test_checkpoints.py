"""Files whole or not at all; checkpoints that are damaged, foreign or harmful; weights that do not fit."""

import argparse
import contextlib
import errno
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from engine.checkpoints import (checksum, load_vit, load_weights, read_checkpoint, read_json, write_array,
                                write_file, write_text)
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
                             (lambda: checksum(tmp_path / "d"), "d: cannot be read .No such file")):
        with pytest.raises(ValueError, match=message):
            refused()


STATE = {"model": {"a": torch.arange(64.0).reshape(8, 8), "b": torch.ones(2, dtype=torch.int8)},
         "epoch": 3, "name": "é", "none": [None, 1.5, True], "args": argparse.Namespace(lr=1e-3)}


def test_a_checkpoint_reads_back_the_same_also_an_old_one_and_one_of_the_reference_mae(tmp_path):
    for new_format in (True, False):
        assert repr(read_checkpoint(save(tmp_path / "a.pt", STATE, new_format))) == repr(STATE)


def test_a_checkpoint_cut_short_is_refused_and_with_any_byte_damaged_too_or_it_reads_the_same(tmp_path):
    path = save(tmp_path / "last.pt", STATE)
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path):
    path, rng = tmp_path / "last.pt", np.random.default_rng(0)
    with pytest.raises(ValueError, match="last.pt: no such checkpoint"):
        read_checkpoint(path)
    for content in [b"", b"hello, I am text\n", b"\x00" * 999, b"PK\x03\x04", b"\x89PNG\r\n\x1a\n",
                    *(b"\x80\x02" + rng.bytes(rng.integers(1, 60)) for _ in range(150))]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="last.pt: (not a whole, plain checkpoint|expected a diction)"):
            read_checkpoint(path)
    with pytest.raises(ValueError, match="last.pt: expected a dictionary of tensors, found Tensor"):
        read_checkpoint(save(path, torch.ones(2)))


class Evil:
    """A pickle that creates a file when it is loaded."""
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_posing_as_a_checkpoint_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "best.pt", {"model": {"w": torch.ones(1)}, "optimizer": Evil()}
    for write in (lambda: save(path, state), lambda: save(path, state, new_format=False),
                  lambda: path.write_bytes(pickle.dumps(Evil()))):
        write()
        with pytest.raises(ValueError, match="best.pt: not a whole, plain checkpoint"):
            read_checkpoint(path)
        assert not (tmp_path / "ran").exists()


def test_every_missing_unexpected_and_differing_name_is_listed():
    weights = {"0.weight": torch.ones(2, 4), "0.bias": torch.ones(2), "c": torch.ones(1)}
    with pytest.raises(ValueError) as refusal:
        load_weights(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2, bias=False)), weights, "best.pt")
    for words in ("best.pt: a checkpoint of another architecture; use the configuration it was made with\n",
                  'Missing key(s) in state_dict: "1.weight"', 'state_dict: "c"', "mismatch for 0.weight"):
        assert words in str(refusal.value)


def test_what_is_no_dictionary_of_tensors_is_refused():
    for weights in ({"weight": 3, "bias": torch.zeros(1)}, {1: torch.zeros(1)}, [torch.zeros(1)]):
        with pytest.raises(ValueError, match="best.pt: holds no weights; expected a dictionary of names and"):
            load_weights(nn.Linear(2, 1), weights, "best.pt")


def test_a_vit_is_filled_from_our_pre_training_our_fine_tuning_and_files_of_the_reference_mae(tmp_path):
    weights = small(VisionTransformer, VIT).state_dict()
    weights = {name: torch.randn_like(value) for name, value in weights.items()}
    mae = small(MaskedAutoencoder, MAE).state_dict()
    head = {"head.weight": torch.ones(8, 16), "head.bias": torch.ones(8)}
    fc_norm = {"fc_norm.weight": torch.ones(16), "fc_norm.bias": torch.ones(16)}
    no_norm = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    decoder = "decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, mask_token"
    tuned = {f"vit.{name}": value for name, value in weights.items()} | {"head.0.weight": torch.ones(8, 16)}
    for state, missing, left_out in [
            (weights, "none", "none"), ({"model": mae | weights}, "none", decoder),
            ({"model": tuned, "epoch": 3}, "none", "none"), ({"model": weights | head}, "none", "head"),
            (no_norm | fc_norm | head, "norm.weight, norm.bias", "fc_norm, head")]:
        vit = small(VisionTransformer, VIT)
        said = load_vit(vit, save(tmp_path / "a.pt", state))
        assert said == f"missing keys: {missing}; unexpected keys, left out: {left_out}"
        unit = {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
        assert same(dict(vit.state_dict()), weights if missing == "none" else weights | unit)
    for wrong, words in ((no_norm, "a checkpoint of another.*Missing.*norm.we"), ([1], "holds no weights")):
        with pytest.raises(ValueError, match=f"(?s)a.pt: {words}"):
            load_vit(vit, save(tmp_path / "a.pt", {"model": wrong}))
