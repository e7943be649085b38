"""Smoothing and thresholds, chosen on videos that are neither trained on nor scored (paper: silent; §4.2).

With task.held_out, train_task.py keeps a share of the training scenes back. Here each way of post-processing
is scored on them, and the best is taken:

    smoothing    the mean over k frames before and after, k = 0, 1, 2, 5, 10, 20, 50
    thresholds   of each action unit's probability: 0.05, 0.10, ..., 0.95

evaluate.py --tune uses it. Chosen on the scored videos, these numbers would only be luck.
"""

import numpy as np

from labels import Task
from postprocessing import Postprocessing, for_metric, in_units, smoothed
from scoring import merged

SMOOTH = (0, 1, 2, 5, 10, 20, 50)
THRESHOLDS = sorted((round(0.05 * i, 2) for i in range(1, 20)), key=lambda threshold: abs(threshold - 0.5))


def thresholds_of(task: Task) -> list[float]:
    """The thresholds that are tried: 0.5 first, then the next to it, so that among equals these are taken."""
    return THRESHOLDS if task.dtype is np.int8 and not task.one_class else [0.5]


def count_ways(task: Task, cut, outputs, target, valid, merge: str = "mean") -> np.ndarray:
    """The sums of a video in each way: (smoothings, thresholds, ...). Arguments: `scoring.count_frames`."""
    values = in_units(merged(cut, outputs, len(target), merge), task)                         # (T, K)
    sums = []
    for k in SMOOTH:
        smooth = smoothed(values, k)
        sums.append([task.metric.count(for_metric(smooth, task, [threshold]), target, valid)
                     for threshold in thresholds_of(task)])
    return np.array(sums)


def best_way(task: Task, sums: np.ndarray) -> Postprocessing:
    """The way with the best mean score; among equals the least smoothing, and thresholds next to 0.5. Each
    action unit has the threshold that is best for it. Shape: sums (smoothings, thresholds, ...)."""
    scores = np.array([[task.metric.score(way) for way in row] for row in sums])       # (S, thresholds, K)
    s = int(scores.max(axis=1).mean(axis=1).argmax())                # (S, thresholds, K) -> (S, K) -> (S,)
    tried = thresholds_of(task)
    chosen = tuple(tried[i] for i in scores[s].argmax(axis=0)) if len(tried) > 1 else ()
    return Postprocessing(SMOOTH[s], chosen)
