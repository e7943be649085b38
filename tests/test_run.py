"""One run: where it is and goes on, what it prints and saves when, and how it stops."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from checkpoints import read_checkpoint
from distributed import Team
from processes import ALONE, CPU, in_child, in_team
from run import Run, Signals, clock, rate
from settings import Config
from training import Batches, adamw, seed_dropout, set_learning_rate

FINITE, NAN, INF = torch.tensor(0.5), torch.tensor(float("nan")), torch.tensor(float("inf"))


class Samples:
    """A regression of 22 samples."""

    def __init__(self, n=22):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return i

    def collate(self, items):
        return self.x[items], self.y[items]

    def where(self, i):
        return f"sample {i}"


def begun(folder, team=ALONE, model=None, optimizer=None, epochs=20, minutes=10.0) -> Run:
    """A run with 5 steps an epoch that has begun, or goes on."""
    config = Config()
    config.run.out, config.run.workers, config.run.checkpoint_minutes = str(folder), 0, minutes
    run = Run("run", config, team, {"task.lr": 3e-5})
    model = model or nn.Linear(4, 1)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.25)
    run.begin(model, optimizer, Samples(), 5, epochs, data={"samples": 22})
    return run


@pytest.fixture
def start(tmp_path):
    """`begun` in this test's folder; the signals go back to pytest afterwards."""
    before, runs = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}, []

    def start(*arguments, **settings):
        runs.append(begun(tmp_path, *arguments, **settings))
        runs[-1].lock.close()                               # another one may follow in the same folder
        return runs[-1]

    yield start
    for run in runs:
        run.signals.give_back()
    for number, handler in before.items():
        signal.signal(number, handler)


def last(folder):
    return read_checkpoint(folder / "run/last.pt")


# ---- Steps, epochs and what they leave behind

def test_an_epoch_yields_its_steps_and_shares_and_becomes_a_row_and_a_curve(start, tmp_path):
    run, steps = start(), []
    for epoch in range(2):
        assert (run.epoch, run.step) == (epoch, 0)
        expected = Batches(22, 5, 0, epoch, ALONE)
        for step, (x, y) in run.batches():
            steps.append(step)
            assert torch.equal(x, run.dataset.x[expected.share(step % 5)])
            run.end_step(torch.tensor(1.0 + step), torch.tensor(2.0), unreadable=step)
        assert run.means() == {"loss": 3 + 5 * epoch, "gradient_norm": 2, "unreadable": (10, 35)[epoch]}
        run.end_epoch()
    assert steps == list(range(10))
    run.end()
    run.finish({"score": 0.5}, {"loss": 2.0})
    header, *rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert header == "epoch,lr,loss,gradient_norm,unreadable,seconds"
    assert [row.rsplit(",", 1)[0] for row in rows] == ["1,0.25,3,2,10", "2,0.25,8,2,35"]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == {"score": 0.5}
    assert (tmp_path / "run/curves.png").stat().st_size > 1000
    assert last(tmp_path)["epoch"] == 2 and last(tmp_path)["sums"] == {}


def test_a_run_goes_on_where_it_was_saved_and_writes_the_rows_after_that_again(start, tmp_path, capsys):
    run = start()
    for epoch in range(2):
        for step, batch in run.batches():
            run.end_step(FINITE, FINITE, unreadable=1)
            if step == 6:
                run.keep_best(0.25)
                run.save()
        run.end_epoch()
        run.cost = math.inf                                  # no checkpoint after an epoch
    again = start()
    assert "going on from epoch 2, step 2" in capsys.readouterr().out
    assert (again.epoch, again.step, again.best) == (1, 2, 0.25)
    assert again.sums == {"loss": 1.0, "gradient_norm": 1.0, "unreadable": 2}
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 2
    step, (x, y) = next(again.batches())
    assert step == 7 and torch.equal(x, run.dataset.x[Batches(22, 5, 0, 1, ALONE).share(2)])
    assert torch.equal(again.model.weight, run.model.weight)


def test_only_a_better_score_replaces_the_best_weights(start, tmp_path):
    run = start()
    for score, better in [(-0.5, True), (0.25, True), (0.25, False), (0.1, False), (float("nan"), False),
                          (torch.tensor(0.75), True)]:
        run.keep_best(score)
        assert run.is_best == better
    best = read_checkpoint(tmp_path / "run/best.pt")
    assert best["score"] == 0.75 and best["epoch"] == 1
    assert best["made_of"] == run.record and run.record["data"] == {"samples": 22}
    assert torch.equal(best["model"]["weight"], run.model.weight)


def test_each_tenth_of_the_epochs_the_last_and_the_best_are_told_of(start, capsys):
    run = start(epochs=23)
    for epoch in range(23):
        run.sums = {"loss": 5 * 0.25, "gradient_norm": 5.0}
        if epoch == 4:
            run.keep_best(0.5)
        run.end_epoch("with words")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  epoch")]
    assert told == [f"  epoch {n}/23  loss 0.2500  with words" + ("  (best so far)" if n == 5 else "")
                    for n in (2, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 23)]


def test_images_that_cannot_be_read_are_named_in_the_first_epoch_and_counted_over_all_processes(capfd):
    def work(team):
        run = Run.__new__(Run)
        found = []
        for run.epoch in range(2):
            found.append(run.count_readable(range(3 + team.rank), [f"{team.rank}.jpg"] * 2 * team.rank))
        return found

    assert in_team(2, work) == ([0, 0], [[(7, 2), (7, 2)]] * 2)
    assert capfd.readouterr().out == 2 * "  left out: 1.jpg\n"


# ---- Progress

@pytest.mark.parametrize("count, seconds, text", [
    (8, 10, "0.8"), (95, 10, "9.5"), (100, 10, "10"), (12_345, 1, "12,345"), (1, 0, "1,000,000,000")])
def test_a_rate_has_a_decimal_below_ten(count, seconds, text):
    assert rate(count, seconds) == text


def test_a_clock_shows_hours_minutes_and_seconds():
    assert [clock(s) for s in (0, 59.9, 61, 3600, 100_000)] == ["0:00:00", "0:00:59", "0:01:01", "1:00:00",
                                                                "27:46:40"]


def test_the_progress_line_tells_step_loss_speed_and_time_left_every_five_seconds(start, capsys):
    run = start()
    batches = run.batches()
    next(batches)
    run.end_step(FINITE, FINITE)
    assert capsys.readouterr().out == ""
    next(batches)
    run.printed -= 10
    run.began -= 10
    run.end_step(FINITE, FINITE)                              # 2 steps, 10 samples in 10 s; 98 steps to go
    assert capsys.readouterr().out == "  step 2 of 100  loss 0.5000  1.0 images/s  0:08:10 left\n"


# ---- When a checkpoint is written

def test_checkpoints_are_saved_after_the_set_minutes(start, tmp_path):
    run = start(minutes=1)
    batches = run.batches()
    next(batches)
    run.end_step(FINITE, FINITE)
    assert not (tmp_path / "run/last.pt").exists()
    next(batches)
    run.saved -= 61
    run.end_step(FINITE, FINITE)
    assert last(tmp_path)["step"] == 2 and time.time() - run.saved < 10


def test_saving_after_each_epoch_takes_2_percent_of_the_time_at_most(start, monkeypatch):
    run, saved = start(epochs=40), []                         # of which the first three are not told of
    monkeypatch.setattr(run, "write", lambda name, state: saved.append(name))
    run.end_epoch()                                           # the first is not yet known to take any time
    run.cost, run.saved = 3.0, time.time() - 149
    run.end_epoch()
    assert len(saved) == 1
    run.saved = time.time() - 151
    run.end_epoch()
    assert len(saved) == 2 and run.cost < 1                   # measured anew
    run.cost, run.saved = 3.0, time.time()
    run.end()                                                 # the last one is always saved
    assert saved == ["last.pt"] * 3


# ---- A loss that is not finite

@pytest.mark.parametrize("loss, norm", [(NAN, FINITE), (FINITE, NAN), (INF, FINITE), (FINITE, -INF)])
@pytest.mark.parametrize("when", ["next step", "end of epoch", "save"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
        start, tmp_path, loss, norm, when):
    run = start()
    run.save()
    good = last(tmp_path)
    run.step = 3 if when == "end of epoch" else 0
    batches = run.batches()
    next(batches)
    run.end_step(FINITE, FINITE)
    next(batches)
    whole, at = run.order.whole(run.step), run.step + 1
    run.end_step(loss, norm)
    with pytest.raises(ValueError) as refused:
        if when == "next step":
            next(batches)
            run.end_step(FINITE, FINITE)
        elif when == "end of epoch":
            next(batches)
        else:
            run.save()
    text, path = str(refused.value), tmp_path / "run/not_finite.txt"
    assert text.startswith(
        f"the loss is {loss.item()}, the gradient norm {norm.item()} at epoch 1, step {at}, "
        f"learning rate 2.50e-01; the {len(whole)} samples of this step are listed in {path}\n")
    assert f"the last checkpoint in {tmp_path / 'run'} is from before and is kept. Two things to try" in text
    assert path.read_text().splitlines() == [f"sample {i}" for i in whole]
    assert len(whole) == (2 if when == "end of epoch" else 5)
    assert last(tmp_path)["step"] == good["step"] == 0


def test_the_list_of_samples_is_that_of_all_processes(tmp_path):
    def work(team):
        run = begun(tmp_path, team)
        next(run.batches())
        run.end_step(NAN, FINITE)
        try:
            run.check_finite()
        except ValueError:
            return run.order.whole(0), run.order.share(0)

    codes, [(whole, first), (_, second)] = in_team(2, work)
    assert codes == [0, 0] and sorted(first + second) == sorted(whole) and len(first) == 3
    assert (tmp_path / "run/not_finite.txt").read_text().splitlines() == [f"sample {i}" for i in whole]


# ---- Signals

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice, as a scheduler and torchrun do"])
def test_a_signal_is_answered_at_once_and_obeyed_after_the_step(tmp_path, capfd, number, code, times):
    def work():
        run = begun(tmp_path)
        batches = run.batches()
        next(batches)
        for i in range(times):
            threading.Timer(0.1 * (i + 1), os.kill, (os.getpid(), number)).start()
        torch.linalg.matrix_power(torch.eye(2000), 16)        # a long step, during which Python does not run
        print("the step ends", flush=True)
        run.end_step(FINITE, FINITE)
        next(batches)

    assert in_child(work) == code
    said = capfd.readouterr().out.splitlines()
    assert said == [f"{number.name} received: finishing this step, then saving; "
                    "send it once more to end now and lose the steps since the last checkpoint",
                    "the step ends",
                    f"stopped by {number.name} after step 1; saved, start the same command again to go on"]
    assert last(tmp_path)["step"] == 1


def test_a_second_signal_later_ends_the_run_at_once(tmp_path, capfd):
    def work():
        begun(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    began = time.time()
    assert in_child(work) == 130
    assert time.time() - began < 15 and "saved, start" not in capfd.readouterr().out
    assert not (tmp_path / "run/last.pt").exists()


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, capfd):
    def work(team):
        run = begun(tmp_path, team)
        for step, _ in run.batches():
            if (team.rank, step) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            run.end_step(FINITE, FINITE)

    assert in_team(2, work)[0] == [143, 143]
    assert capfd.readouterr().out.count("stopped by SIGTERM after step 3; saved") == 1
    assert last(tmp_path)["step"] == 3


def test_a_validation_ends_early_when_a_signal_comes(start):
    run, seen = start(), []
    for item in run.unless_stopped(range(5)):
        seen.append(item)
        if item == 2:
            run.signals.received = signal.SIGTERM
    assert seen == [0, 1, 2]


def test_a_signal_after_the_last_step_is_obeyed_and_then_signals_act_as_usual(tmp_path):
    def late():
        run = begun(tmp_path / "late")
        os.kill(os.getpid(), signal.SIGINT)
        run.end()

    def after():
        begun(tmp_path / "after").end()
        os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(late) == 130 and last(tmp_path / "late")["step"] == 0
    assert in_child(after) == -signal.SIGTERM


def test_bytes_of_other_signals_are_no_request_to_stop(tmp_path):
    def work():
        signals = Signals(Team(0, 1, CPU))
        signal.signal(signal.SIGUSR1, lambda *ignored: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        raise SystemExit(int(signals.received) + 7)

    assert in_child(work) == 7


# ---- All of it together

def train(folder, stop_after=None):
    """30 epochs of a small regression with dropout, as a stage trains. -> weights and final loss, or None"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.05), nn.ReLU(), nn.Linear(32, 1))
    optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.01)
    run = begun(folder, model=model, optimizer=optimizer, epochs=30)
    try:
        for epoch in range(run.epoch, 30):
            for step, (x, y) in run.batches():
                set_learning_rate(optimizer, step, 30 * run.steps, 5, 3e-2)
                seed_dropout(0, epoch, run.step, 0)
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                run.end_step(loss, FINITE)
                if step == stop_after:
                    run.signals.received = signal.SIGTERM
            run.end_epoch()
            run.cost = math.inf                               # no checkpoint after an epoch
        run.end()
    except SystemExit:
        run.signals.give_back()
        return None
    finally:
        run.lock.close()
    data = run.dataset
    return model.state_dict(), nn.functional.mse_loss(model.eval()(data.x), data.y).item()


def test_a_run_learns_and_one_stopped_anywhere_ends_with_the_same_bits(tmp_path):
    weights, loss = train(tmp_path / "whole")
    assert loss < 0.3                                         # about 14 at the start
    for stops in ([0], [4], [73], [149], [2, 3, 64, 140]):
        folder = tmp_path / str(stops)
        assert [train(folder, stop) for stop in stops] == [None] * len(stops)
        again = train(folder)[0]
        assert all(torch.equal(weights[name], again[name]) for name in weights)
