"""Smoothing and thresholds, chosen on videos that are neither trained on nor scored (paper: silent; §4.2).

With task.held_out, train_task.py keeps a share of the training scenes back. Here each way of post-processing
is scored on them, and the best is taken:

    smoothing    the mean over k frames before and after, k = 0, 1, 2, 5, 10, 20, 50
    thresholds   of each action unit's probability: 0.05, 0.10, ..., 0.95

evaluate.py --tune uses it. Chosen on the scored videos, these numbers would only be luck.
"""

from functools import partial

import numpy as np

from labels import Task
from made_of import command
from postprocessing import Postprocessing, for_metric, in_units, smoothed
from scoring import HELD_OUT, merged, sums_of, unseen

SMOOTH = (0, 1, 2, 5, 10, 20, 50)
THRESHOLDS = sorted((round(0.05 * i, 2) for i in range(1, 20)), key=lambda threshold: abs(threshold - 0.5))


def thresholds_of(task: Task) -> list[float]:
    """The thresholds that are tried: 0.5 first, then the next to it, so that among equals these are taken."""
    return THRESHOLDS if task.yes_or_no else [0.5]


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


def choose(trained, training_videos, origin: dict, merge: str, path) -> Postprocessing:
    """Smoothing and thresholds that are best on the videos that the training has held back.

    Raises ValueError if it has held back none, or if they are not there.
    """
    names = trained.record["data"].get(HELD_OUT) if trained.record else None
    if not names:
        run = trained.config.run.name
        own = f"--set task.held_out=0.15 --set run.name={run}_held --set run.base={run}"
        script = command(f"train_task.py --task {trained.task.name}", trained.config)
        raise ValueError(f"{path}: trained on all training videos, so there is none to choose on; train one "
                         f"that holds some back: {script} {own}")
    videos = [video for video in training_videos if video.name in names]
    if len(videos) < len(names):
        raise ValueError(f"{path}: {len(names)} videos were held back, of which {len(videos)} have labels "
                         "and features here; bring back the others")
    sums = sums_of(trained, videos, merge, partial(count_ways, merge=merge)).sum(axis=0)
    how = best_way(trained.task, sums)
    seen = int((~unseen(names, origin)).sum())
    trained.team.say(f"chosen on {len(names)} held-out training videos: {how.text() or 'no post-processing'}"
                     + (f"\n  the ViT was fine-tuned on {seen} of them, so they are easier than new videos"
                        if seen else ""))
    return how
