"""Files whole or not at all; checkpoints that are damaged, foreign or harmful; weights that do not fit."""

import argparse
import errno
import os
import pickle
import runpy
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
from checkpoints import (checksum, load_vit, load_weights, read_checkpoint, write_array, write_file,
                         write_text)
from mae import MaskedAutoencoder
from vit import VisionTransformer


def save(path, state):
    write_file(path, lambda file: torch.save(state, file))
    return path


# ---- Files

def test_a_file_is_flushed_to_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    path = tmp_path / "new/folder/é.txt"
    write_text(path, "größe")
    assert calls == ["fsync", "replace"] and path.read_bytes() == "größe".encode()
    assert list(path.parent.iterdir()) == [path]


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    def half(file):
        file.write(b"half")
        raise error

    write_text(tmp_path / "old", "whole")
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            write_file(tmp_path / name, half)
    assert list(tmp_path.iterdir()) == [tmp_path / "old"] and (tmp_path / "old").read_text() == "whole"


class Full:
    """A file on a full disk."""

    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_full_disk_is_told_as_such_also_by_pytorch_and_numpy(tmp_path, monkeypatch, library):
    """Both hide the system's error behind one of their own; `launch` says what to do about a full disk."""
    class Disk(Full):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("builtins.open", lambda *arguments: Disk())
    with pytest.raises(OSError) as full:
        if library == "torch":
            save(tmp_path / "last.pt", {"weights": torch.ones(9)})
        else:
            write_array(tmp_path / "features.npy", np.ones(9))
    assert full.value.errno == errno.ENOSPC


def test_the_temporary_file_has_a_short_name_that_tells_process_and_rank(tmp_path, monkeypatch):
    """The name may already be as long as the system allows, and two machines may share a folder and a pid."""
    path, found = tmp_path / ("x" * 255), []
    monkeypatch.setenv("RANK", "3")
    write_file(path, lambda file: found.extend(entry.name for entry in tmp_path.iterdir()))
    assert found == [f".3.{os.getpid()}.tmp"] and path.exists()


def test_an_array_reads_back_the_same(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_array(tmp_path / "a.npy", array)
    read = np.load(tmp_path / "a.npy")
    assert read.dtype == np.float16 and np.array_equal(read, array)


def test_a_checksum_is_that_of_the_whole_file_and_a_missing_one_is_refused(tmp_path):
    content = np.random.default_rng(0).bytes((1 << 22) + 5)                # more than one block
    (tmp_path / "a").write_bytes(content)
    assert checksum(tmp_path / "a") == zlib.crc32(content)
    with pytest.raises(ValueError, match="nowhere: cannot be read .No such file"):
        checksum(tmp_path / "nowhere")


# ---- Checkpoints

STATE = {"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.int8)},
         "epoch": 3, "name": "é", "none": [None, 1.5, True]}


def same(a, b):
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    return type(a) is type(b) and a == b


def test_a_checkpoint_reads_back_the_same_also_with_the_reference_maes_arguments(tmp_path):
    assert same(read_checkpoint(save(tmp_path / "a.pt", STATE)), STATE)
    arguments = argparse.Namespace(lr=1e-3, model="mae_vit_base_patch16")
    loaded = read_checkpoint(save(tmp_path / "b.pth", STATE | {"args": arguments}))
    assert loaded.pop("args") == arguments and same(loaded, STATE)
    with open(tmp_path / "c.pt", "wb") as file:               # the format of old checkpoints: no zip archive
        torch.save(STATE, file, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "c.pt"), STATE)


def test_a_checkpoint_that_is_missing_or_holds_no_dictionary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="last.pt: no such checkpoint"):
        read_checkpoint(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="a.pt: expected a dictionary of tensors, found Tensor"):
        read_checkpoint(save(tmp_path / "a.pt", torch.ones(2)))


def test_a_checkpoint_cut_short_anywhere_is_refused_by_name(tmp_path):
    path = save(tmp_path / "last.pt", STATE)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="last.pt"):
            read_checkpoint(path)


def test_one_flipped_bit_in_a_tensor_is_found_by_its_checksum(tmp_path):
    path = save(tmp_path / "last.pt", {"weights": torch.arange(64.0)})
    whole = path.read_bytes()
    start = whole.index(torch.arange(64.0).numpy().tobytes())
    for i, at in enumerate(range(start, start + 256, 5)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << i % 8]) + whole[at + 1:])
        with pytest.raises(ValueError, match="last.pt: damaged .wrong checksum in .*data/0"):
            read_checkpoint(path)


def test_a_checkpoint_with_any_byte_damaged_is_refused_or_reads_the_same(tmp_path):
    path = save(tmp_path / "last.pt", STATE)
    whole = path.read_bytes()
    # The archive's table of contents: 46 bytes an entry. There, bits 8 and 16 mean "compressed" and "a
    # folder".
    entries = [at for at in range(len(whole)) if whole[at:at + 4] == b"PK\1\2"]
    for at in [*range(0, len(whole), 29), *(start + i for start in entries for i in range(46))]:
        for bit in (8, 16):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            try:
                loaded = read_checkpoint(path)
            except ValueError:
                continue
            assert same(loaded, STATE), (at, bit)


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n", b"epoch,loss\n1,0.5\n", b"\x00" * 999,
                                     b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
                                     b"\x93NUMPY\x01\x00"])
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match="last.pt: not a whole, plain checkpoint"):
        read_checkpoint(tmp_path / "last.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes_are_no_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(150):
        (tmp_path / "last.pt").write_bytes(b"\x80\x02" + rng.bytes(rng.integers(1, 60)))
        with pytest.raises(ValueError, match="last.pt"):
            read_checkpoint(tmp_path / "last.pt")


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def in_the_old_format(state, file):
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
@pytest.mark.parametrize("write", [torch.save, in_the_old_format, pickle.dump], ids=["zip", "old", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_posing_as_a_checkpoint_runs_nothing(tmp_path, inside, write):
    evil = Evil(tmp_path / "ran")
    state = {"model": {"w": torch.ones(1)}, "optimizer": evil} if inside else evil
    write_file(tmp_path / "best.pt", lambda file: write(state, file))
    with pytest.raises(ValueError, match="best.pt: not a whole, plain checkpoint"):
        read_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "ran").exists()


# ---- Weights

def test_every_missing_unexpected_and_differing_name_is_listed():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {"a.weight": torch.ones(2, 4), "a.bias": torch.ones(2), "b.weight": torch.ones(2, 2),
               "c.weight": torch.ones(1)}
    with pytest.raises(ValueError) as refusal:
        load_weights(model, weights, "best.pt")
    first, *rest = str(refusal.value).splitlines()
    assert first == ("best.pt: a checkpoint of another architecture, 3 of 4 entries differ; "
                     "use the configuration it was made with")
    assert rest == ["  a.weight: file (2, 4), model (2, 3)", "  b.bias: missing in the file",
                    "  c.weight: not in the model"]
    assert same(dict(model.state_dict()), before)                           # nothing was loaded
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
    with pytest.raises(ValueError, match=r"40 of 40 entries differ(.|\n)*\.\.\. and 28 more$") as refusal:
        load_weights(many, {}, "x")
    assert len(str(refusal.value).splitlines()) == 1 + 12 + 1


def test_names_that_may_miss_or_be_ignored_are_reported_and_the_rest_is_loaded():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    weights = {"a.weight": torch.full((2, 3), 7.0), "a.bias": torch.zeros(2), "head.x": torch.ones(1)}
    missing, ignored = load_weights(model, weights, "x", may_miss=("norm.",), may_ignore=("head", "decoder"))
    assert (missing, ignored) == (["norm.weight", "norm.bias"], ["head.x"])
    assert (model["a"].weight == 7).all() and (model["norm"].weight == 1).all()


@pytest.mark.parametrize("weights", [{"weight": 3, "bias": torch.zeros(1)}, {1: torch.zeros(1)},
                                     [torch.zeros(1)], None], ids=lambda w: str(w)[:24])
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="best.pt: holds no weights"):
        load_weights(nn.Linear(2, 1), weights, "best.pt")
    with pytest.raises(ValueError, match="best.pt: holds no weights"):
        load_vit(small_vit(), save(tmp_path / "best.pt", {"model": weights}))


VIT = dict(image_size=16, patch=8, dim=8, depth=1, heads=2)


def small_vit():
    return VisionTransformer(**VIT)


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def test_a_vit_is_filled_from_our_pre_training_our_fine_tuning_and_files_of_the_reference_mae(tmp_path):
    mae = MaskedAutoencoder(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    weights = {name: torch.randn_like(value) for name, value in small_vit().state_dict().items()}
    head = {"head.weight": torch.ones(8, 8), "head.bias": torch.ones(8)}
    without_norm = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    fc_norm = {"fc_norm.weight": torch.ones(8), "fc_norm.bias": torch.ones(8)}
    none = "missing keys: none; unexpected keys, left out: "
    cases = {
        "plain": (weights, "none"),
        "pre-training": ({"model": dict(mae.state_dict()) | weights}, None),
        "fine-tuning": ({"model": prefixed(weights, "vit.") | prefixed(head, "head."), "epoch": 3}, "none"),
        "with a head": ({"model": weights | head}, "head"),
    }
    for name, (state, left_out) in cases.items():
        vit = small_vit()
        said = load_vit(vit, save(tmp_path / "a.pt", state))
        assert same(dict(vit.state_dict()), weights), name
        assert said.startswith(none) and (left_out is None or said == none + left_out), name
    said = load_vit(small_vit(), save(tmp_path / "a.pt", cases["pre-training"][0]))
    assert {word.strip() for word in said.removeprefix(none).split(",")} >= {"decoder_embed", "mask_token"}
    vit = small_vit()
    said = load_vit(vit, save(tmp_path / "a.pt", without_norm | fc_norm | head))
    assert said == "missing keys: norm.weight, norm.bias; unexpected keys, left out: fc_norm, head"
    assert (vit.norm.weight == 1).all() and torch.equal(vit.cls_token, weights["cls_token"])


def test_a_vit_of_another_size_or_without_its_norm_is_refused(tmp_path):
    wide = VisionTransformer(**VIT | {"dim": 12}).state_dict()
    with pytest.raises(ValueError, match=r"a.pt: a checkpoint of another(.|\n)*cls_token: file \(1, 1, 12\)"):
        load_vit(small_vit(), save(tmp_path / "a.pt", {"model": wide}))
    weights = {name: value for name, value in small_vit().state_dict().items() if "norm." not in name}
    with pytest.raises(ValueError, match="norm.weight: missing in the file"):
        load_vit(small_vit(), save(tmp_path / "a.pt", weights))


def test_the_header_command_tells_what_a_checkpoint_holds_or_why_it_is_refused(tmp_path, monkeypatch, capsys):
    good = [str(save(tmp_path / "a.pt", STATE)), str(save(tmp_path / "b.pt", {"model": torch.ones(3)}))]
    (tmp_path / "c.pt").write_bytes(b"text")
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *good, str(tmp_path / "c.pt")])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(checkpoints.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert err.startswith(f"refused: {tmp_path}/c.pt: not a whole, plain checkpoint")
    assert out == (f"{good[0]}: model, epoch, name, none\n  2 tensors of 14 numbers\n"
                   f"{good[1]}: model\n  1 tensors of 3 numbers\n")
