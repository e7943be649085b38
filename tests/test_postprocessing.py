"""From outputs to what is told: units against closed forms, smoothing against a loop, thresholds."""

import runpy

import numpy as np
import pytest

import postprocessing
from labels import AU, EXPR, TASKS, VA
from postprocessing import Postprocessing, apply, for_metric, in_units, smoothed

of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def drawn(task, frames=50, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (frames, len(task.outputs)))


# ---- Units

def test_valence_and_arousal_are_told_as_they_are_in_float64():
    outputs = drawn(VA).astype(np.float32) * 10
    values = in_units(outputs, VA)
    assert values.dtype == np.float64 and np.array_equal(values, outputs)


def test_expressions_are_told_by_the_softmax():
    x = drawn(EXPR)
    p = in_units(x, EXPR)
    assert p == pytest.approx(np.exp(x) / np.exp(x).sum(axis=1, keepdims=True))
    assert p.sum(axis=1) == pytest.approx(np.ones(50)) and (p.argmax(axis=1) == x.argmax(axis=1)).all()
    two = np.full((1, 8), -1e9)
    two[0, :2] = 0, np.log(3)
    assert in_units(two, EXPR)[0, :3] == pytest.approx([1 / 4, 3 / 4, 0])


def test_action_units_are_told_by_the_sigmoid():
    x = drawn(AU)
    assert in_units(x, AU) == pytest.approx(1 / (1 + np.exp(-x)))
    assert in_units(np.zeros((1, 12)), AU).tolist() == [[0.5] * 12]


@pytest.mark.parametrize("task", [EXPR, AU], ids=["expr", "au"])
def test_no_output_is_too_large_for_a_probability(task):
    K = len(task.outputs)
    outputs = np.concatenate([np.full((1, K), value) for value in (1e4, -1e4, 1e300, -1e300)])
    outputs[:, 0] *= -1
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        p = in_units(outputs, task)
    assert np.isfinite(p).all() and (0 <= p).all() and (p <= 1).all()
    assert np.array_equal(p[:, 0], [0, 1, 0, 1])


# ---- Smoothing

@pytest.mark.parametrize("frames", [1, 2, 7, 40])
@pytest.mark.parametrize("k", [0, 1, 3, 10, 100])
def test_smoothing_is_the_mean_over_the_frames_around_each_one(frames, k):
    values = drawn(VA, frames)
    expected = [values[max(t - k, 0):t + k + 1].mean(axis=0) for t in range(frames)]
    assert smoothed(values, k) == pytest.approx(np.array(expected), abs=1e-12)


def test_smoothed_probabilities_are_probabilities_and_a_constant_stays():
    p = smoothed(in_units(drawn(EXPR), EXPR), 4)
    assert p.sum(axis=1) == pytest.approx(np.ones(50)) and (p >= 0).all()
    assert smoothed(np.full((9, 2), 0.3), 3) == pytest.approx(np.full((9, 2), 0.3))


def test_smoothing_does_not_drift_over_a_long_video_of_float32():
    values = np.full((50_000, 1), 0.1, np.float32)
    assert smoothed(values, 5) == pytest.approx(np.full((50_000, 1), np.float32(0.1)), abs=1e-9)


def test_a_smoothed_frame_depends_on_no_frame_beyond_k():
    values = drawn(VA, 30)
    changed = values.copy()
    changed[20:] += 1
    a, b = smoothed(values, 4), smoothed(changed, 4)
    assert a[:16] == pytest.approx(b[:16], abs=1e-12) and (a[16:] != b[16:]).all()


# ---- Thresholds, and what is scored

def test_an_action_unit_is_present_above_its_threshold():
    values = np.tile([[0.2], [0.5], [0.7]], (1, 12))
    assert np.array_equal(for_metric(values, AU) > 0, values > 0.5)
    thresholds = np.linspace(0, 1, 12)
    assert np.array_equal(for_metric(values, AU, thresholds) > 0, values > thresholds)


@pytest.mark.parametrize("task", [VA, EXPR], ids=["va", "expr"])
def test_thresholds_are_for_action_units_alone(task):
    values = drawn(task)
    assert for_metric(values, task, (0.1,) * len(task.outputs)) is values


@of_each_task
def test_without_postprocessing_the_outputs_themselves_are_scored(task):
    outputs = drawn(task)
    assert apply(outputs, task, Postprocessing()) is outputs


@of_each_task
def test_units_alone_change_no_decision(task):
    """Smoothing over no frame with thresholds of 0.5 decides as the outputs do."""
    outputs = drawn(task)
    scored = for_metric(in_units(outputs, task), task)
    if task is VA:
        assert np.array_equal(scored, outputs)
    elif task is EXPR:
        assert np.array_equal(scored.argmax(axis=1), outputs.argmax(axis=1))
    else:
        assert np.array_equal(scored > 0, outputs > 0)


def test_smoothing_is_of_probabilities_not_of_logits():
    outputs = np.array([[10.0] * 12, [-2.0] * 12, [-2.0] * 12])
    scored = apply(outputs, AU, Postprocessing(smooth=1))
    p = 1 / (1 + np.exp([-10.0, 2, 2]))
    assert scored[:, 0] + 0.5 == pytest.approx([p[:2].mean(), p.mean(), p[1:].mean()])
    assert (scored[1] < 0).all()                             # though the mean of the logits is above 0


def test_the_postprocessing_is_told_in_words():
    assert Postprocessing().text() == ""
    assert Postprocessing(smooth=5).text() == "mean over 5 frames before and after"
    both = Postprocessing(2, (0.25, 0.5)).text()
    assert both == "mean over 2 frames before and after, thresholds 0.25 0.50"


def test_the_script_shows_what_smoothing_does(capsys):
    runpy.run_path(postprocessing.__file__, run_name="__main__")
    errors = [float(line.split("off by ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert errors[0] == pytest.approx(0.3, abs=0.03) and min(errors[1:3]) < errors[0] / 2
