"""From a model's outputs to what is told: probabilities, smoothing, thresholds. NumPy only.

    outputs (T, K) --in_units--> VA as it is, else probabilities --smoothed--> --for_metric--> metrics.py

Nothing is smoothed unless asked for. Smoothing alone raises a score, so a table says when it was used.

    python postprocessing.py      # what the mean over some frames does to a noisy line
"""

from typing import NamedTuple

import numpy as np

from labels import Task


class Postprocessing(NamedTuple):
    """What is done with the outputs before they are scored. As it is, nothing."""
    smooth: int = 0                       # mean over this many frames before and after each one
    thresholds: tuple[float, ...] = ()    # of each action unit's probability; () = 0.5 for all

    def text(self) -> str:
        """In words, for tables; "" if nothing is done."""
        words = [f"mean over {self.smooth} frames before and after"] if self.smooth else []
        if self.thresholds:
            words.append("thresholds " + " ".join(f"{threshold:.2f}" for threshold in self.thresholds))
        return ", ".join(words)


def in_units(outputs: np.ndarray, task: Task) -> np.ndarray:
    """A model's outputs as they are told: valence and arousal as they are; probabilities of the classes,
    whose sum is 1; the probability of each action unit. Shape: (T, K) -> float64 (T, K)"""
    outputs = np.asarray(outputs, np.float64)
    if task.one_class:
        e = np.exp(outputs - outputs.max(axis=1, keepdims=True))       # softmax(x) = softmax(x - max)
        return e / e.sum(axis=1, keepdims=True)
    if task.yes_or_no:
        return 0.5 * (1 + np.tanh(0.5 * outputs))                      # the sigmoid, without overflow
    return outputs


def smoothed(values: np.ndarray, k: int) -> np.ndarray:
    """The mean over each frame and the k before and after it, fewer at the ends. Shape: (T, K)"""
    if k == 0:
        return values
    t = np.arange(len(values))
    first, end = np.maximum(t - k, 0), np.minimum(t + k + 1, len(values))
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    sums = np.concatenate([np.zeros_like(sums[:1]), sums])                     # (T, K) -> (T + 1, K)
    return ((sums[end] - sums[first]) / (end - first)[:, None])


def for_metric(values: np.ndarray, task: Task, thresholds=()) -> np.ndarray:
    """Values in units as `task.metric.count` wants them: an action unit is present above 0, a class is the
    largest. Shape: (T, K)"""
    if not task.yes_or_no:
        return values
    return values - (np.asarray(thresholds) if len(thresholds) else 0.5)


def apply(outputs: np.ndarray, task: Task, how: Postprocessing) -> np.ndarray:
    """A video's outputs -> what is scored. Without postprocessing, the outputs themselves. Shape: (T, K)"""
    if how == Postprocessing():
        return outputs
    return for_metric(smoothed(in_units(outputs, task), how.smooth), task, how.thresholds)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    line = np.sin(np.arange(1000) / 50)[:, None]                                    # (T, 1)
    noisy = line + rng.normal(0, 0.3, line.shape)
    for k in (0, 5, 20, 80):
        error = np.sqrt(((smoothed(noisy, k) - line) ** 2).mean())
        print(f"mean over {k:2d} frames before and after: off by {error:.3f} (root of the mean square)")
