"""How sure a score is: a bootstrap over videos, not frames (Efron's percentile interval). NumPy only.

The frames of a video resemble each other, so a validation set of 76 videos is 76 pieces of evidence, not
376,000. A set of as many videos is drawn with replacement, many times, and scored each time: the score's 95 %
interval is what the middle 95 % of these sets reach. Two systems are compared on the same drawn sets: the
interval of their difference is narrower than those of the two scores, because both find the same videos hard.

    sums (videos, ...): those of `metrics.py`, of each video for itself

    python intervals.py      # how often the interval holds the true score, for 5 to 80 videos
"""

from typing import NamedTuple

import numpy as np

from metrics import CCC, Metric

ROUNDS = 2000


class Interval(NamedTuple):
    """A value, and the ends of its 95 % interval."""
    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def drawn(videos: int, rounds: int = ROUNDS, seed: int = 0) -> np.ndarray:
    """How often each video is in each drawn set. -> (rounds, videos), each row's sum is `videos`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(videos, np.full(videos, 1 / videos), size=rounds)


def drawn_scores(sums: np.ndarray, metric: Metric, times: np.ndarray) -> np.ndarray:
    """The scores of each drawn set. Shape: sums (videos, ...), times (rounds, videos) -> (rounds, K)."""
    totals = np.tensordot(times, sums, axes=1)                 # (rounds, videos) · (videos, ...)
    return np.stack([metric.score(total) for total in totals])


def middle(values: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95 %."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def interval(sums: np.ndarray, metric: Metric, rounds: int = ROUNDS) -> list[Interval]:
    """The score of each output, and last their mean, with intervals. Shape: sums (videos, ...)."""
    scores = metric.score(sums.sum(axis=0))                                        # (K,)
    values = drawn_scores(sums, metric, drawn(len(sums), rounds))                  # (rounds, K)
    each = [Interval(float(score), *middle(column)) for score, column in zip(scores, values.T)]
    return [*each, Interval(float(scores.mean()), *middle(values.mean(axis=1)))]


def difference(ours: np.ndarray, theirs: np.ndarray, metric: Metric, rounds: int = ROUNDS) -> Interval:
    """Our mean score less theirs, on the same videos in the same order. Shape: both (videos, ...)."""
    return difference_over_seeds(ours[None], theirs[None], metric, rounds)


def difference_over_seeds(ours: np.ndarray, theirs: np.ndarray, metric: Metric,
                          rounds: int = ROUNDS) -> Interval:
    """Our mean score less theirs, each trained with several seeds: the scores are averaged over the seeds,
    the videos are drawn. Shape: ours (seeds, videos, ...), theirs (seeds, videos, ...), the same videos in
    the same order.

    The interval tells how sure the difference is for other videos. It does not tell how much other seeds
    would change it: three of them are too few to say.
    """
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"two systems are compared on the same videos; got sums of {ours.shape[1:]} and of "
                         f"{theirs.shape[1:]}")
    times, values, means = drawn(ours.shape[1], rounds), [], []
    for system in (ours, theirs):
        seeds = [drawn_scores(sums, metric, times).mean(axis=1) for sums in system]      # of each (rounds,)
        values.append(np.mean(seeds, axis=0))
        means.append(np.mean([metric.score(sums.sum(axis=0)).mean() for sums in system]))
    return Interval(float(means[0] - means[1]), *middle(values[0] - values[1]))


if __name__ == "__main__":
    rng = np.random.default_rng(0)

    def videos(count):
        """Sums of videos of 40 to 400 frames, each with an offset and a noise of its own."""
        sums = []
        for frames in rng.integers(40, 400, count):
            label = np.sin(np.arange(frames) / 20 + rng.uniform(0, 6)) * 0.5 + rng.normal(0, 0.2)
            output = label + rng.normal(0, 0.3) + rng.normal(0, 0.2, frames)
            sums.append(CCC.count(output[:, None], label[:, None], np.ones((frames, 1), bool)))
        return np.stack(sums)

    truth = CCC.score(videos(20_000).sum(axis=0)).mean()
    print(f"CCC of endlessly many videos: {truth:.3f}")
    for count in (5, 10, 20, 40, 80):
        found = [interval(videos(count), CCC, rounds=400)[-1] for _ in range(200)]
        held = np.mean([low <= truth <= high for _, low, high in found])
        width = np.mean([high - low for _, low, high in found])
        print(f"{count:3d} videos: the 95 % interval is {width:.3f} wide and holds the true score in "
              f"{held:.0%} of 200 sets")
