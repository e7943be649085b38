"""Schedule, shares of a batch, checkpoints whole or refused, the run folder, and how a run ends: what all scripts share."""

import argparse
import errno
import json
import math
import os
import pickle
import signal
import stat
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import training
from config import Config, load
from training import (Batches, RunFolder, Team, Watch, adamw, generator, learning_rate, load_weights, pieces, read_checkpoint,
                      seed_dropout, set_learning_rate, settings_of, vit_bytes, write_file, write_text)
from vit import VisionTransformer

CPU = torch.device("cpu")
ALONE = Team(0, 1, CPU)


def save(path, state):
    write_file(path, lambda file: torch.save(state, file))
    return path


def in_child(work) -> int:
    """The exit status of `work()` in a process of its own, killed after a minute; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def handlers():
    """Watch takes over the signals: give them back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- learning rate ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("progress, warmup, share", [
    (0, .2, 0), (.05, .2, .25), (.1, .2, .5), (.2, .2, 1), (.6, .2, .5), (.4, .2, .5 * (1 + math.cos(math.pi / 4))), (1, .2, 0),
    (0, 0, 1), (.5, 0, .5), (1, 0, 0), (.25, 1, .25), (.999, 1, .999)])
def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine(progress, warmup, share):
    assert learning_rate(progress, warmup, 3e-5) == pytest.approx(3e-5 * share, abs=1e-15)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 5), (10, 0), (10, 3), (1000, 1000), (100, 2.5)])
def test_no_step_has_a_learning_rate_of_0_and_none_is_above_the_peak(steps, warmup):
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}], 9.0)
    rates = [set_learning_rate(optimizer, step, steps, warmup, 2.0) for step in range(steps)]
    assert all(0 < rate <= 2 for rate in rates) and [group["lr"] for group in optimizer.param_groups] == rates[-1:] * 2
    top = rates.index(max(rates))
    assert np.all(np.diff(rates[:top + 1]) > 0) and np.all(np.diff(rates[top:]) < 0) and top <= warmup


# --- batches and randomness -------------------------------------------------------------------------------------------

def team(rank, world):
    return Team(rank, world, CPU)


@pytest.mark.parametrize("n", [1, 2, 7, 32, 33, 100])
@pytest.mark.parametrize("batch", [1, 3, 32, 200])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_disjoint_and_make_up_the_batches_of_a_single_process(n, batch, world):
    alone = list(Batches(n, batch, 0, 4, ALONE))
    shares = [list(Batches(n, batch, 0, 4, team(rank, world))) for rank in range(world)]
    assert sorted(i for step in alone for i in step) == list(range(n))                    # each sample once in an epoch
    assert [len(step) for step in alone] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)     # the short one is kept
    for step, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert sorted(i for part in parts for i in part) == sorted(step)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1                           # a share may be empty
    for first in range(len(alone) + 1):
        resumed = Batches(n, batch, 0, 4, team(world - 1, world), first)
        assert list(resumed) == shares[-1][first:] and len(resumed) == len(shares[-1]) - first
        assert [resumed.share(step) for step in range(first, len(alone))] == list(resumed)


def test_the_order_differs_by_epoch_and_seed_and_repeats_exactly():
    orders = {(seed, epoch): tuple(Batches(50, 50, seed, epoch, ALONE).share(0)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert all(tuple(Batches(50, 50, *key, ALONE).share(0)) == order for key, order in orders.items())


def test_dropout_depends_on_seed_epoch_step_and_rank_and_on_nothing_else():
    draws = {}
    for numbers in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]:
        seed_dropout(*numbers)
        first = torch.rand(4)
        torch.rand(99)
        seed_dropout(*numbers)
        assert torch.equal(first, torch.rand(4))
        draws[numbers] = tuple(first.tolist())
    assert len(set(draws.values())) == 5


def test_a_generator_is_a_function_of_its_numbers():
    a, b, c = (generator(*numbers).random(3).tolist() for numbers in [(3, 4, 5), (3, 4, 5), (3, 4, 6)])
    assert a == b != c


def test_the_order_of_an_epoch_and_the_crop_of_its_first_sample_draw_different_numbers():
    assert generator(3, 4).random(3).tolist() != generator(3, 4, 0).random(3).tolist()


# --- accumulation and optimiser ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("share, gigabytes, expected", [(1, .001, 1), (256, .001, 1), (500, .001, 1), (501, .001, 2), (1024, .01, 21), (8, .3, 8),
                                                        (8, .25, 4), (3, 99, 3)])
def test_a_share_is_cut_into_as_few_pieces_as_fit_half_a_gigabyte(share, gigabytes, expected):
    assert pieces(share, gigabytes * 1e9, 10 ** 6, CPU) == expected
    assert math.ceil(share / expected) * gigabytes <= 0.5 or expected == share


def test_on_a_gpu_the_weights_and_moments_are_held_besides_and_activations_are_half_as_large(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10e9))
    gpu = SimpleNamespace(type="cuda")
    assert pieces(100, 1e9, 0, gpu) == math.ceil(100 / 16)                    # 8 GB / 0.5 GB
    assert pieces(100, 1e9, 10 ** 8, gpu) == math.ceil(100 / 12)              # 1.6 GB less
    assert pieces(100, 1e9, 10 ** 9, gpu) == 100                              # too large in any case: one by one


@pytest.mark.parametrize("side, dim, depth", [(32, 64, 3), (64, 96, 2)])
def test_vit_bytes_is_what_autograd_keeps(side, dim, depth):
    model, kept = VisionTransformer(image_size=side, patch=8, dim=dim, depth=depth, heads=4), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor                # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.features(torch.randn(4, 3, side, side), "mean")
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) / 4
    assert vit_bytes((side // 8) ** 2 + 1, dim, depth) == pytest.approx(measured, rel=0.1)


def test_adamw_decays_matrices_only_and_leaves_out_what_is_frozen():
    model = VisionTransformer(image_size=16, patch=8, dim=16, depth=1, heads=2)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = adamw(model, 1e-3, [0.9, 0.95], 0.05).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"], decayed["betas"], rest["lr"]) == (0.05, 0, (0.9, 0.95), 1e-3)
    plain = {name for name in names.values() if name.endswith("bias") or "norm" in name or name == "cls_token"}
    assert {names[id(p)] for p in rest["params"]} == plain
    assert {names[id(p)] for p in decayed["params"]} == {name for name, p in model.named_parameters() if p.requires_grad} - plain


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_file_is_flushed_to_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    write_text(tmp_path / "new/folder/é.txt", "größe")
    assert calls == ["fsync", "replace"] and (tmp_path / "new/folder/é.txt").read_bytes() == "größe".encode()
    assert [p.name for p in (tmp_path / "new/folder").iterdir()] == ["é.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()], ids=repr)
def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    def half(file):
        file.write(b"half")
        raise error

    write_text(tmp_path / "old", "whole")
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            write_file(tmp_path / name, half)
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "whole"


STATE = {"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.int8)}, "epoch": 3, "name": "é", "none": [None, 1.5, True]}


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
    with open(tmp_path / "c.pt", "wb") as file:                               # the format of old checkpoints: no zip archive
        torch.save(STATE, file, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "c.pt"), STATE)


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
    entries = [at for at in range(len(whole)) if whole[at:at + 4] == b"PK\1\2"]     # the archive's table of contents, 46 bytes each
    for at in [*range(0, len(whole), 29), *(start + i for start in entries for i in range(46))]:
        for bit in (8, 16):                                                   # there, "compressed" and "a folder"
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            try:
                loaded = read_checkpoint(path)
            except ValueError:
                continue
            assert same(loaded, STATE), (at, bit)


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n", b"epoch,loss\n1,0.5\n", b"\x00" * 999, b"PK\x03\x04",
                                     b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"\x93NUMPY\x01\x00"])
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


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"model": {"w": torch.ones(1)}, "optimizer": evil}], ids=["alone", "inside"])
@pytest.mark.parametrize("write", [lambda s, f: torch.save(s, f), lambda s, f: torch.save(s, f, _use_new_zipfile_serialization=False),
                                   lambda s, f: pickle.dump(s, f)], ids=["zip", "old format", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_posing_as_a_checkpoint_runs_nothing(tmp_path, wrap, write):
    write_file(tmp_path / "best.pt", lambda file: write(wrap(Evil(tmp_path / "ran")), file))
    with pytest.raises(ValueError, match="best.pt: not a whole, plain checkpoint"):
        read_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "ran").exists()


# --- weights ----------------------------------------------------------------------------------------------------------

def test_every_missing_unexpected_and_differing_name_is_listed():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {"a.weight": torch.ones(2, 4), "a.bias": torch.ones(2), "b.weight": torch.ones(2, 2), "c.weight": torch.ones(1)}
    with pytest.raises(ValueError) as refusal:
        load_weights(model, weights, "best.pt")
    assert str(refusal.value).startswith("best.pt: a checkpoint of another architecture, 3 of 4 entries differ; use the configuration")
    assert str(refusal.value).splitlines()[1:] == ["  a.weight: file (2, 4), model (2, 3)", "  b.bias: missing in the file", "  c.weight: not in the model"]
    assert same(dict(model.state_dict()), before)                             # nothing was loaded
    many = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(20))
    with pytest.raises(ValueError, match=r"40 of 40 entries differ(.|\n)*\.\.\. and 28 more$"):
        load_weights(many, {}, "x")


def test_names_that_may_miss_or_be_ignored_are_reported_and_the_rest_is_loaded():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(2)})
    missing, ignored = load_weights(model, {"a.weight": torch.full((2, 3), 7.0), "a.bias": torch.zeros(2), "head.x": torch.ones(1)}, "x",
                                    may_miss=("norm.",), may_ignore=("head", "decoder"))
    assert (missing, ignored) == (["norm.weight", "norm.bias"], ["head.x"])
    assert (model["a"].weight == 7).all() and (model["norm"].weight == 1).all()


@pytest.mark.parametrize("weights", [{"weight": 3, "bias": torch.zeros(1)}, {1: torch.zeros(1)}, [torch.zeros(1)], None], ids=lambda w: str(w)[:24])
def test_what_is_no_dictionary_of_tensors_is_refused(weights):
    with pytest.raises(ValueError, match="best.pt"):
        load_weights(torch.nn.Linear(2, 1), weights, "best.pt")


# --- run folder -------------------------------------------------------------------------------------------------------

def run_folder(folder, settings=None, config=None):
    return RunFolder(folder / "run", config or Config(), settings or {"task.lr": 3e-5}, ALONE)


def test_a_run_folder_keeps_its_configuration_and_opens_again(tmp_path):
    config = Config()
    config.run.seed = 17
    run = run_folder(tmp_path, {"task.lr": 3e-5, "temporal.channels": (8, 8)}, config)
    assert not run.finished and load(run.folder / "config.yaml").run.seed == 17
    run.finish({"score": 0.5})
    run.lock.close()
    assert run_folder(tmp_path, {"task.lr": 3e-5, "temporal.channels": [8, 8]}).finished
    assert json.loads((run.folder / "metrics.json").read_text()) == {"score": 0.5}


def test_a_folder_in_use_is_refused_to_another_process_and_free_after_its_run_is_killed(tmp_path, capfd):
    def another():
        try:
            run_folder(tmp_path)
        except ValueError as refusal:
            print(refusal, flush=True)
            raise SystemExit(2)

    run = run_folder(tmp_path)
    assert in_child(another) == 2
    assert "run: another run is writing here; wait for it, or choose another --set run.name=..." in capfd.readouterr().out
    run.lock.close()
    held = []          # a child that is killed while it holds the folder
    assert in_child(lambda: held.append(run_folder(tmp_path)) or os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(another) == 0


def test_a_disk_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(ValueError, match="run: cannot be locked .No locks available.*choose another place with --set run.out="):
        run_folder(tmp_path)


def test_other_settings_in_the_same_folder_are_refused_and_each_is_named(tmp_path):
    run_folder(tmp_path, {"task.lr": 3e-5, "task.batch": 32, "run.seed": 0}).lock.close()
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError) as refusal:
        run_folder(tmp_path, {"task.lr": 1e-4, "task.batch": 32, "task.fold": 1})
    lines = str(refusal.value).splitlines()
    assert lines[0].endswith("run was made with other settings; choose another --set run.name=..., or delete it")
    assert lines[1:] == ["  run.seed: was 0, now None", "  task.fold: was None, now 1", "  task.lr: was 3e-05, now 0.0001"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == files


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    run = run_folder(tmp_path)
    run.finish({"score": 0.5})
    run.lock.close()
    files = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    config = Config()
    config.run.workers = 3
    assert run_folder(tmp_path, config=config).finished
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == files


def test_settings_are_chosen_by_section_and_by_name():
    assert settings_of(Config(), "segments", "run.seed", without=["segments.stride"]) == {"segments.window": 300, "run.seed": 0}
    assert settings_of(Config(), "task", without=["task.epochs_va"]).keys() == {f"task.{k}" for k in vars(Config().task)} - {"task.epochs_va"}


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def test_the_last_whole_checkpoint_is_resumed_and_a_damaged_one_is_named(tmp_path, capsys):
    run = run_folder(tmp_path)
    assert run.resume({}) is None
    for epoch in (1, 2, 3):
        run.save("last.pt", {"epoch": epoch})
        run.save("best.pt", {"epoch": -epoch})
        assert run.resume({}) == {"epoch": epoch}
    assert read_checkpoint(run.folder / "previous.pt") == {"epoch": 2} and read_checkpoint(run.folder / "best.pt") == {"epoch": -3}
    assert capsys.readouterr().out == ""
    damage(run.folder / "last.pt")
    assert run.resume({}) == {"epoch": 2}
    assert "last.pt: not a whole, plain checkpoint" in (said := capsys.readouterr().out) and "trying the one before" in said
    damage(run.folder / "previous.pt")
    with pytest.raises(ValueError, match="run: no checkpoint here is whole; put a copy in its place, or delete the folder"):
        run.resume({})
    assert "last.pt" in (said := capsys.readouterr().out) and "previous.pt" in said


def test_a_checkpoint_that_another_process_cannot_read_is_used_by_none(tmp_path, capsys):
    """Else the processes would go on from different steps."""
    run = run_folder(tmp_path)
    run.save("last.pt", {"epoch": 1}), run.save("last.pt", {"epoch": 2})
    failed = iter([1.0, 0.0])                                                 # how many processes fail: last.pt, previous.pt
    run.team = SimpleNamespace(rank=0, agree=lambda x: x, sum=lambda mine: [sum(mine) + next(failed)], say=print)
    assert run.resume({}) == {"epoch": 1} and "last.pt: not every process can read it" in capsys.readouterr().out


def test_a_save_that_fails_leaves_a_checkpoint_to_resume_from(tmp_path):
    run = run_folder(tmp_path)
    run.save("last.pt", {"epoch": 1})
    for _ in range(3):
        with pytest.raises(Exception, match="pickle"):
            run.save("last.pt", {"epoch": 2, "bad": lambda: 0})
        assert run.resume({}) == {"epoch": 1}
    assert not [p for p in run.folder.iterdir() if p.name.endswith(".tmp")]


def test_a_save_that_fails_after_a_damaged_checkpoint_keeps_the_good_one(tmp_path):
    run = run_folder(tmp_path)
    run.save("last.pt", {"epoch": 1}), run.save("last.pt", {"epoch": 2})
    damage(run.folder / "last.pt")
    assert run.resume({}) == {"epoch": 1}
    with pytest.raises(Exception, match="pickle"):
        run.save("last.pt", {"epoch": 2, "bad": lambda: 0})
    assert run.resume({}) == {"epoch": 1}


def test_a_resumed_run_writes_the_rows_after_its_checkpoint_again(tmp_path):
    run = run_folder(tmp_path)
    run.cut_log(1)                                                            # there is no log yet
    for epoch in range(1, 13):
        run.log({"epoch": epoch, "loss": 1 / 3, "score": 1e-9})
    run.cut_log(11)
    run.log({"epoch": 11, "loss": 2.0, "score": 0.0})
    rows = (run.folder / "log.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,score" and [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, 12))
    assert rows[1] == "1,0.333333,1e-09" and rows[-1] == "11,2,0"
    run.cut_log(1)
    assert (run.folder / "log.csv").read_text() == "epoch,loss,score\n"


@pytest.mark.parametrize("kind", ["below a file", "a file itself", "no permission"])
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "no permission":
        place.mkdir()
        place.chmod(stat.S_IRUSR | stat.S_IXUSR)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        (place if kind == "below a file" else tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="run: cannot be written .*; choose another place with --set run.out="):
        run_folder(place if kind != "a file itself" else tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    run = RunFolder.__new__(RunFolder)
    run.folder, run.team = tmp_path, team(1, 2)
    run.log({"epoch": 1}), run.cut_log(1), run.save("last.pt", {})
    assert list(tmp_path.iterdir()) == []


# --- a run ------------------------------------------------------------------------------------------------------------

FINITE, NOT = torch.tensor(0.5), torch.tensor(float("nan"))


def watch(run, minutes=10.0, state=lambda: {"step": 7}):
    config = Config()
    config.run.checkpoint_minutes = minutes
    return Watch(run, config, 100, state, "images")


@pytest.mark.parametrize("loss, norm", [(NOT, FINITE), (FINITE, NOT), (torch.tensor(float("inf")), FINITE), (FINITE, torch.tensor(float("-inf")))])
@pytest.mark.parametrize("when", ["next step", "save", "end"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, handlers, loss, norm, when):
    run = run_folder(tmp_path)
    w = watch(run, state=lambda: {"bad": 1})
    run.save("last.pt", {"good": 1})
    w.step(FINITE, FINITE, lambda: "the step before", 1, 8)
    w.step(loss, norm, lambda: "step 2 (epoch 1, lr 1e-3); this process's batch: a.jpg, b.jpg", 2, 8)
    with pytest.raises(ValueError, match=rf"(?s)the loss is {loss.item()}, the gradient norm {norm.item()} at step 2 .*a.jpg, b.jpg.*"
                                         "checkpoint in .*run is from before and is kept. Two things to try: a lower learning rate"):
        {"next step": lambda: w.step(FINITE, FINITE, lambda: "", 3, 8), "save": w.save, "end": w.end}[when]()
    assert run.resume({}) == {"good": 1}


def test_checkpoints_are_saved_after_the_set_minutes(tmp_path, handlers):
    run = run_folder(tmp_path)
    w = watch(run, minutes=1)
    w.step(FINITE, FINITE, lambda: "", 1, 8)
    assert run.resume({}) is None
    w.saved -= 61
    w.step(FINITE, FINITE, lambda: "", 2, 8)
    assert run.resume({}) == {"step": 7} and w.saved > w.began - 1


def test_saving_after_each_epoch_takes_2_percent_of_the_time_at_most(tmp_path, handlers):
    w = watch(run_folder(tmp_path))
    saved = []
    w.run.save = lambda name, state: saved.append(name)
    w.epoch()                                          # the first is not yet known to take any time
    w.cost, w.saved = 3.0, time.time() - 149
    w.epoch()
    assert len(saved) == 1
    w.saved = time.time() - 151
    w.epoch()
    assert len(saved) == 2 and w.cost < 1              # measured anew
    w.cost, w.saved = 3.0, time.time()
    w.end()                                            # the last one is always saved
    assert len(saved) == 3


def test_progress_tells_speed_and_time_left(tmp_path, handlers, capsys):
    w = watch(run_folder(tmp_path))
    w.step(FINITE, FINITE, lambda: "", 1, 8)
    assert capsys.readouterr().out == ""
    w.printed -= 10
    w.began -= 10
    w.step(FINITE, FINITE, lambda: "", 2, 8)                                  # 2 steps in 10 s, 98 to go
    assert capsys.readouterr().out == "  step 2 of 100  loss 0.5000  2 images/s  0:08:10 left\n"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice, as a scheduler and torchrun do"])
def test_a_signal_saves_says_so_and_ends_with_a_code(tmp_path, capfd, number, code, times):
    def work():
        w = watch(run_folder(tmp_path))
        w.step(FINITE, FINITE, lambda: "", 6, 8)
        if times == 2:                             # the copy comes while Python is busy with one long call
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        os.kill(os.getpid(), number)
        sum(range(100_000_000 * (times - 1)))
        w.step(FINITE, FINITE, lambda: "", 7, 8)

    assert in_child(work) == code
    assert f"stopped by {number.name} after step 7; saved, start the same command again to go on" in capfd.readouterr().out
    assert run_folder(tmp_path).resume({}) == {"step": 7}


def test_a_second_signal_later_ends_the_run_at_once(tmp_path):
    def work():
        w = watch(run_folder(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)
        w.signalled -= 2                                                      # seconds
        os.kill(os.getpid(), signal.SIGINT)
        w.save()

    assert in_child(work) == 130
    assert run_folder(tmp_path).resume({}) is None


def test_after_the_end_of_a_run_signals_act_as_usual(tmp_path):
    def work():
        watch(run_folder(tmp_path)).end()
        os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(work) == -signal.SIGTERM


@pytest.mark.parametrize("error, message", [(ValueError("wrong header"), "error: wrong header\n"),
                                            (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space and start "
                                             "the same command again, the last checkpoint is intact")], ids=["refusal", "disk full"])
def test_a_refusal_is_one_line_and_code_2(capsys, error, message):
    def stage(config, team, task):
        assert (config, team.world, task) == ("config", 1, "au")
        raise error

    with pytest.raises(SystemExit) as end:
        training.launch(stage, "config", "au")
    assert end.value.code == 2 and message in (said := capsys.readouterr().err) and "Traceback" not in said and len(said.splitlines()) == 1


def test_a_missing_input_is_made_with_drawn_data_and_named_otherwise(capsys):
    config, made = Config(), []
    config.run.source = "configs/mine.yaml"
    training.provide(config, ALONE, "", lambda *a: made.append(a), "python x.py", 60)
    with pytest.raises(ValueError, match="^runs/x/last.pt not found; make it with: python x.py --config configs/mine.yaml$"):
        training.provide(config, ALONE, "runs/x/last.pt", lambda *a: made.append(a), "python x.py", 60)
    assert made == []
    config.data.drawn = True
    training.provide(config, ALONE, "runs/x/last.pt", lambda *a: made.append(a), "python x.py", 60)
    assert made == [(config, ALONE)]
    assert "runs/x/last.pt is missing, so it is made first. The demo takes about 60 s" in capsys.readouterr().out


# --- all of it together -----------------------------------------------------------------------------------------------

def train(folder, stop_after=None):
    """3 epochs of a small regression with dropout, built from the pieces as the scripts build theirs."""
    run = run_folder(folder)
    torch.manual_seed(0)
    x = torch.randn(22, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(0.05), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer, steps, at = adamw(model, 1e-2, (0.9, 0.99), 0.01), 5, {"epoch": 0, "step": 0}
    if (saved := run.resume({})) is not None:
        load_weights(model, saved["model"], "last.pt")
        optimizer.load_state_dict(saved["optimizer"])
        at = saved["at"]
    for epoch in range(at["epoch"], 30):
        for step, batch in enumerate(Batches(22, 5, 0, epoch, ALONE, first=at["step"]), start=at["step"]):
            set_learning_rate(optimizer, epoch * steps + step, 30 * steps, 5, 3e-2)
            seed_dropout(0, epoch, step, 0)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if epoch * steps + step == stop_after:
                run.save("last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": {"epoch": epoch, "step": step + 1}})
                return run.lock.close()
        at = {"epoch": epoch + 1, "step": 0}
    run.lock.close()
    return model.state_dict(), torch.nn.functional.mse_loss(model.eval()(x), y).item()


def test_a_run_learns_and_one_stopped_anywhere_ends_with_the_same_bits(tmp_path):
    weights, loss = train(tmp_path / "whole")
    assert loss < 0.3                                                         # about 14 at the start
    for stops in ([0], [4], [73], [149], [2, 3, 64, 140]):
        folder = tmp_path / str(stops)
        for stop in stops:
            train(folder, stop)
        assert same(dict(train(folder)[0]), dict(weights))
