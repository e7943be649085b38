"""One run, with a small regression in place of a stage: its folder, its record, where it goes on, what it
saves when, how it stops; and that it ends with the same bits when it was killed at any moment."""

import itertools
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny
from engine.checkpoints import checksum, read_checkpoint
from engine.config import load
from engine.distributed import Team, all_sum
from engine.run import Run
from engine.settings import Config
from engine.training import adamw, clip_gradient
from processes import ALONE, CPU, in_child, in_team
from tiny import assert_same, content

HALF, NAN, INF = map(torch.tensor, (0.5, math.nan, math.inf))
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


class Samples:
    """A regression of 22 samples, of which sample 3 cannot be read."""
    x = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return i

    def collate(self, items):
        readable = [i for i in items if i != 3]
        return self.x[readable], self.y[readable]


def opened(folder, team=ALONE, problem=lambda: "", minutes=10.0) -> Run:
    config = Config()
    config.run.workers, config.run.checkpoint_minutes = 0, minutes
    return Run(folder / "run", {"stage": "toy", "settings": {"a": 1}}, config, team, problem)


def begun(folder, team=ALONE, epochs=20, data=None, minutes=10.0) -> Run:
    """A run that has begun, or goes on, with 5 steps an epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 1))
    section = SimpleNamespace(batch=5, epochs=epochs, lr=0.02, warmup_epochs=0.2, betas=[0.9, 0.99],
                              weight_decay=0.01)
    run = opened(folder, team, minutes=minutes)
    run.begin(model, adamw(model, section), Samples(), section, data or {"samples": 22})
    return run


def train(folder, team=ALONE):
    """As a stage trains, with a checkpoint after each step."""
    run = begun(folder, team, epochs=2, minutes=0.0)
    ddp = team.parallel(run.model)
    for _ in run.epochs():
        run.model.train()
        for x, y in run.batches():
            run.optimizer.zero_grad()
            loss = all_sum((ddp(x) - y).square().sum() / run.count)
            loss.backward()
            norm = clip_gradient(run.model, 0)
            run.optimizer.step()
            run.end_step(loss, norm)
        with torch.no_grad():
            loss = (run.model.eval()(Samples.x) - Samples.y).square().mean().item()
        run.keep_best(-loss)
        run.end_epoch(score=-loss)
    run.end()
    run.finish({})


def last(folder, name="last.pt"):
    return read_checkpoint(folder / "run" / name)


@pytest.fixture(autouse=True)
def signals_act_as_before():
    before = signal.getsignal(TERM), signal.getsignal(INT)
    yield
    signal.signal(TERM, before[0]), signal.signal(INT, before[1])


# ---- The folder and the record

def test_a_folder_in_use_is_refused_until_it_is_free_and_one_that_cannot_be_locked(tmp_path, monkeypatch):
    def another():
        with pytest.raises(ValueError, match="run: another run is writing here; wait for it, or choose"):
            opened(tmp_path)

    run = opened(tmp_path)
    assert in_child(another) == 0
    run.lock.close()
    assert in_child(lambda: opened(tmp_path)) == 0
    monkeypatch.setattr("fcntl.lockf", lambda *ignored: os.listdir(tmp_path / "nowhere"))    # an OSError
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="run: cannot be written and locked .*; choose another place "):
            opened(folder)


def test_all_processes_are_refused_what_the_first_is_and_told_what_it_found(tmp_path):
    """The others neither look at the folder nor open it: it may be seen late on another machine."""
    def work(team):
        folder = tmp_path / "elsewhere" if team.rank else tmp_path
        with pytest.raises(ValueError, match="^asked 0$"):
            opened(folder, team, problem=lambda: f"asked {team.rank}")
        return opened(folder, team).finished

    opened(tmp_path).finish({})
    assert in_team(2, work) == ([0, 0], [True, True]) and not (tmp_path / "elsewhere").exists()


def test_half_written_files_are_removed_the_others_stay_and_other_ranks_write_nothing(tmp_path):
    opened(tmp_path)
    for name in (".0.123.tmp", ".1.99.tmp", "kept.tmp", "last.pt"):
        (tmp_path / "run" / name).write_text("half")
    run = opened(tmp_path)
    assert set(content(run.folder)) == {"kept.tmp", "last.pt"}
    run.log({"epoch": 2})
    before, run.team = content(run.folder), Team(1, 1, CPU)
    run.log({"epoch": 3}), run.write("last.pt", {}), run.remember({}, {}), run.finish({})
    assert content(run.folder) == before


def test_a_finished_result_has_its_data_its_input_and_the_checksum_of_its_weights(tmp_path):
    for name in ("last.pt", "best.pt"):                    # the best ones, where there are any
        run = opened(tmp_path)
        run.remember({"videos": 3}, {"stage": "before"})
        run.write(name, {"epoch": 1})
        run.finish({"score": 0.5})
        assert json.loads((run.folder / "made_of.json").read_text()) == {
            "stage": "toy", "settings": {"a": 1}, "data": {"videos": 3}, "from": {"stage": "before"},
            "checkpoint": name, "checksum": checksum(run.folder / name)}
    assert json.loads((run.folder / "metrics.json").read_text()) == {"score": 0.5}
    assert load(run.folder / "config.yaml").run.workers == 0
    run = opened(tmp_path)
    assert run.finished and run.still_finished({"videos": 3})
    with pytest.raises(ValueError, match="run was made from other data:\n  videos: was 3, now 4\ntwo ways"):
        run.still_finished({"videos": 4})
    (run.folder / "best.pt").unlink()
    with pytest.raises(ValueError, match="best.pt is gone, though its stage is finished; put a copy back"):
        run.still_finished({"videos": 3})


def test_other_data_than_a_run_began_with_or_than_the_first_machine_has_is_refused(tmp_path):
    began = {"training": "5 frames", "videos": ["a", "b"]}
    begun(tmp_path, data=began).save()
    with pytest.raises(ValueError) as refusal:
        begun(tmp_path, data={"training": "4 frames", "videos": ["a", "c", "d"]})
    assert str(refusal.value).splitlines() == [
        f"{tmp_path}/run was made from other data:", "  training: was 5 frames, now 4 frames",
        "  videos: 1 fewer ['b'], 2 more ['c', 'd']",
        "two ways on: bring back what it began with, or begin a run of its own, --set run.name=NEW"]
    new = tmp_path / "new"
    assert in_team(2, lambda team: begun(new, team, data={"frames": team.rank}))[0] == [1, 1]
    assert not (new / "run/made_of.json").exists()


# ---- Steps, epochs and what they leave behind

def test_an_epoch_becomes_a_row_and_a_checkpoint(tmp_path):
    before = signal.getsignal(TERM), signal.getsignal(INT)
    run = begun(tmp_path, epochs=2)
    for epoch in run.epochs():
        for step, _ in enumerate(run.batches()):
            run.end_step(torch.tensor(1.0 + 5 * epoch + step), torch.tensor(2.0))
        run.end_epoch(score=epoch / 3)
    run.end()
    header, *rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert header == "epoch,lr,loss,gradient_norm,unreadable,score,seconds"
    assert [row.split(",")[2:-1] for row in rows] == [["3", "2", "1", "0"], ["8", "2", "1", "0.333333"]]
    assert [last(tmp_path)[name] for name in ("epoch", "step", "sums")] == [2, 0, {}]
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == before              # they act as before again


def test_a_batch_is_cut_into_pieces_of_at_most_the_largest_one(tmp_path):
    run = begun(tmp_path)
    run.team, run.section.batch = SimpleNamespace(world=3, agree=lambda x: x, rank=1, device=CPU), 1000
    for cut, sizes, text in ((True, [112, 111, 111], "112 x 3"), (False, [334], "334 x 1")):
        run.begin(run.model, run.optimizer, run.dataset, run.section, {}, cut=cut, epochs=7)
        assert [len(x) for x, in run.pieces(run.model, torch.zeros(334, 4))] == sizes and run.all_epochs == 7
        assert run.effective_batch() == f"effective batch 1000 = {text} accumulation x 3 processes, on cpu"


def test_the_readable_images_of_a_batch_are_counted_over_all_processes(tmp_path, monkeypatch):
    """None count as one, as a mean is divided by it."""
    def work(team):
        run, found = begun(tmp_path, team), []
        for x, _ in run.batches():
            found.append((run.count, run.unreadable, len(x), torch.initial_seed()))
            run.step += 1
        return found

    codes, (first, second) = in_team(2, work)
    assert codes == [0, 0] and [step[:2] for step in first] == [step[:2] for step in second]
    for (count, unreadable, mine, seed), (*_, theirs, other), whole in zip(first, second, (5, 5, 5, 5, 2)):
        assert count == mine + theirs == whole - unreadable and seed != other       # dropout's
    monkeypatch.setattr(Samples, "collate", lambda *given: (Samples.x[:0], Samples.y[:0]))
    assert work(ALONE)[0][:3] == (1, 5, 0)


def test_only_a_better_score_replaces_the_best_weights_and_it_is_told_of(tmp_path, capsys):
    run = begun(tmp_path, epochs=23)
    scores = {0: -0.5, 1: 0.25, 2: 0.25, 3: math.nan, 4: torch.tensor(0.75), 5: 0.5}
    for run.epoch in range(23):
        run.sums = {"loss": torch.tensor(5 * 0.25), "gradient_norm": torch.tensor(5.0), "unreadable": 0}
        run.keep_best(scores.get(run.epoch, 0.0))
        assert run.is_best == (run.epoch in (0, 1, 4))
        assert run.is_best == (last(tmp_path, "best.pt")["epoch"] == run.epoch + 1)
        run.end_epoch("with words")
    best = last(tmp_path, "best.pt")
    assert best["score"] == 0.75 and best["made_of"] == run.record and run.record["data"] == {"samples": 22}
    assert capsys.readouterr().out.splitlines() == [
        f"  epoch {n}/23  loss 0.2500  with words" + "  (best so far)" * (n in (1, 2, 5))
        for n in (1, 2, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 23)]       # each tenth, the last, the best


def test_a_run_goes_on_where_it_was_saved_and_the_rows_after_that_are_dropped(tmp_path, capsys):
    run = begun(tmp_path)
    for epoch in range(13):
        run.log({"epoch": epoch + 1})
    run.epoch, run.step, run.best, run.sums = 11, 2, 0.25, {"loss": torch.tensor(1.0)}
    run.save()
    again = begun(tmp_path)
    assert capsys.readouterr().out == "going on from epoch 12, step 2\n"
    assert (again.epoch, again.step, again.best, again.sums) == (11, 2, 0.25, {"loss": 1.0})
    assert again.progress.total == 100 - 57                                # the steps of this start
    again.log({"epoch": 12})                                               # which was there, as was 13
    assert (tmp_path / "run/log.csv").read_text().split() == ["epoch", *map(str, range(1, 13))]


def test_checkpoints_are_saved_after_some_minutes_and_epochs_within_2_percent(tmp_path, monkeypatch, capsys):
    def write(name, state):
        saved.append((run.epoch, run.step))
        clock.now += 3                                                     # what a checkpoint takes

    clock = SimpleNamespace(now=1e9)
    for module in ("run", "training"):
        monkeypatch.setattr(f"engine.{module}.time", SimpleNamespace(time=lambda: clock.now))
    run, saved = begun(tmp_path, epochs=4), []
    run.write = write
    for seconds in (7, 149, 2, 601):
        for _ in run.batches():
            clock.now += seconds if run.step == 1 else 0
            run.end_step(torch.tensor(float(run.step)), HALF)
        run.end_epoch()
    run.end()
    assert saved == [(1, 0),        # the first is not yet known to take any time
                     (3, 0),        # after 50 times the 3 s of the last one
                     (3, 2),        # after 10 minutes
                     (4, 0)]        # the last is always saved
    assert ("  17 of 20 steps  0.02 steps/s  0:02:15 left  epoch 4, mean loss 0.5000\n"
            in capsys.readouterr().out)


@pytest.mark.parametrize("loss, norm", [(NAN, HALF), (HALF, INF)])
@pytest.mark.parametrize("act", [Run.save, Run.end_epoch, lambda run: run.keep_best(1.0)])
def test_weights_after_a_loss_that_is_not_finite_are_never_saved(tmp_path, loss, norm, act):
    run = begun(tmp_path)
    run.save()
    before, batches = content(run.folder), run.batches()
    for of_step in ((HALF, HALF), (loss, norm), (HALF, HALF)):
        next(batches)
        run.end_step(*of_step)
    sums = f"the sum of the losses is {loss.item() + 1}, of the gradient norms {norm.item() + 1}, at a lear"
    with pytest.raises(ValueError, match=f"^epoch 1, up to step 3: {sums}ning rate of 2.00e-02\n  the last"):
        act(run)
    run.sums["unreadable"] = 22
    with pytest.raises(ValueError, match="none of 22 images can be read; nothing to train on"):
        act(run)
    assert content(run.folder) == before


# ---- Signals

@pytest.mark.parametrize("number, times", [(INT, 1), (TERM, 2)])
def test_a_signal_is_answered_at_once_and_obeyed_after_the_step(tmp_path, capfd, number, times):
    """Also when it comes twice, as from a scheduler and torchrun."""
    def work():
        run = begun(tmp_path)
        for _ in run.batches():
            for _ in range(times):
                signal.raise_signal(number)
            print("the step ends", flush=True)
            run.end_step(HALF, HALF)

    assert in_child(work) == 128 + number
    assert capfd.readouterr().out.splitlines() == [
        f"{number.name} received: finishing this step, then saving; send it once more to end now and lose "
        "the steps since the last checkpoint", "the step ends",
        f"stopped by {number.name} after step 1; saved, start the same command again to go on"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, capfd):
    def work(team):
        run = begun(tmp_path, team)
        for _ in run.batches():
            if (team.rank, run.step) == (1, 2):
                signal.raise_signal(TERM)
            run.end_step(HALF, HALF)

    assert in_team(2, work)[0] == [143, 143] and last(tmp_path)["step"] == 3
    assert capfd.readouterr().out.count("stopped by SIGTERM after step 3; saved") == 1


def test_a_second_signal_later_or_one_after_the_last_step_ends_a_run_too(tmp_path):
    def second():
        run = begun(tmp_path / "second")
        signal.raise_signal(TERM)
        run.asked -= 1                                                     # a second later
        signal.raise_signal(INT)

    def in_validation():
        run = begun(tmp_path / "late")
        signal.raise_signal(INT)
        assert not list(run.unless_stopped(range(3)))
        run.end()

    assert in_child(second) == 130 and not (tmp_path / "second/run/last.pt").exists()
    assert in_child(in_validation) == 130 and last(tmp_path / "late")["step"] == 0


# ---- Checkpoints

def test_the_last_whole_checkpoint_is_used_and_a_damaged_one_is_named_and_not_kept(tmp_path, capsys):
    run = opened(tmp_path)
    for step in (1, 2, 3):
        run.write("last.pt", {"step": step})
        run.write("best.pt", {"step": -step})
        assert opened(tmp_path)._last_checkpoint() == {"step": step}
    assert last(tmp_path, "previous.pt") == {"step": 2} and last(tmp_path, "best.pt") == {"step": -3}
    assert capsys.readouterr().out == ""
    (run.folder / "last.pt").write_text("half")
    run = opened(tmp_path)
    assert run._last_checkpoint() == {"step": 2}
    said = capsys.readouterr().out
    assert "last.pt: not a whole, plain checkpoint" in said and "trying the one before" in said
    run.write("best.pt", {})                                               # says nothing about last.pt
    for step, before in ((4, 2), (5, 4)):                                  # the damaged one is not put aside
        run.write("last.pt", {"step": step})
        assert last(tmp_path, "previous.pt") == {"step": before}
    (run.folder / "last.pt").unlink()                                      # as killed between two renames
    assert opened(tmp_path)._last_checkpoint() == {"step": 4}
    (run.folder / "previous.pt").write_text("half")
    with pytest.raises(ValueError, match="run: no checkpoint here is whole; put a copy in its place, or beg"):
        opened(tmp_path)._last_checkpoint()


def test_a_checkpoint_that_another_process_cannot_read_is_used_by_none(tmp_path, capsys):
    """Else the processes would go on from different steps."""
    run, problems = opened(tmp_path), iter((["", "a broken cable"], ["", ""]))
    for step in (1, 2):
        run.write("last.pt", {"step": step})
    run.team = SimpleNamespace(agree=lambda x: x, gather=lambda problem: next(problems), say=print)
    assert run._last_checkpoint() == {"step": 1}
    assert "warning: a broken cable; trying the one before" in capsys.readouterr().out


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_killed_at_any_moment_of_a_write_a_run_ends_with_the_same_bits(tmp_path, monkeypatch, moment, stride):
    """A checkpoint has three moments: put the one before aside, flush the new one, give it its name."""
    def killed():
        tiny.before(moment, count, lambda: os.kill(os.getpid(), KILL))
        train(tmp_path / f"{count}")

    monkeypatch.setattr("os.fsync", lambda number: None)
    train(tmp_path / "whole")
    for count in itertools.count(1, stride):
        if in_child(killed) == 0:
            break
        train(tmp_path / f"{count}")
        assert_same(tmp_path / f"{count}/run", tmp_path / "whole/run")
    assert count > 15


def test_several_processes_of_which_one_is_killed_end_with_the_same_bits(tmp_path):
    """A sum of three depends on its order, so it must be the same in the first step after a restart."""
    def killed(team):
        if team.rank == 1:
            tiny.before("engine.run.Run.end_step", 8, lambda: os.kill(os.getpid(), KILL))
        train(tmp_path / "killed", team)

    assert in_team(3, lambda team: train(tmp_path / "whole", team))[0] == [0] * 3
    assert in_team(3, killed)[0][1] == -KILL
    assert in_team(3, lambda team: train(tmp_path / "killed", team))[0] == [0] * 3
    assert_same(tmp_path / "killed/run", tmp_path / "whole/run")
