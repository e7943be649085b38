"""How sure a score is: the bootstrap over videos against known answers and against simulation."""

import numpy as np
import pytest

from intervals import Interval, difference, drawn, drawn_scores, interval
from labels import TASKS, targets
from metrics import BINARY_F1, CCC

of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def sums_of(task, videos, seed=0, noise=1.0):
    """Sums of `videos` videos with an offset each, their labels and outputs alike but for noise."""
    rng, labels_rng, sums, K = np.random.default_rng(seed), np.random.default_rng(99), [], len(task.outputs)
    for _ in range(videos):
        hidden = labels_rng.normal(0, 0.3, (60, K)) + labels_rng.normal(0, 0.2, K)
        labels = {"va": hidden, "expr": hidden.argmax(axis=1), "au": hidden > 0}[task.name]
        sums.append(task.metric.count(hidden + rng.normal(0, noise * 0.3, (60, K)), *targets(labels, task)))
    return np.stack(sums)


# ---- Drawing videos

def test_each_drawn_set_has_as_many_videos_and_each_video_is_drawn_once_on_average():
    times = drawn(20, rounds=4000)
    assert times.shape == (4000, 20) and (times.sum(axis=1) == 20).all()
    assert times.mean(axis=0) == pytest.approx(np.ones(20), abs=0.08)              # 5 deviations of the mean
    assert (times == 0).mean() == pytest.approx((1 - 1 / 20) ** 20, abs=0.01)      # a video is left out


def test_the_same_sets_are_drawn_each_time():
    assert np.array_equal(drawn(7), drawn(7)) and not np.array_equal(drawn(7), drawn(7, seed=1))


@of_each_task
def test_a_drawn_set_scores_what_its_videos_one_after_the_other_score(task):
    sums, times = sums_of(task, 5), drawn(5, rounds=20)
    scores = drawn_scores(sums, task.metric, times)
    assert scores.shape == (20, len(task.outputs))
    for row, counts in zip(scores, times):
        repeated = [sums[video] for video in range(5) for _ in range(counts[video])]
        assert row == pytest.approx(task.metric.score(sum(repeated)))


# ---- The interval

def test_the_interval_of_a_mean_is_that_of_the_textbook():
    """Each video has one frame, a hit or a miss with a false alarm, which adds 2 to F1's bottom. So F1
    is the share of hits, and its deviation is that of a binomial."""
    hits = np.arange(200) % 2                                             # F1 of each video: 0 or 1
    sums = np.stack([[[0, 1 - hit, 1 - hit, hit]] for hit in hits]).astype(float)
    value, low, high = interval(sums, BINARY_F1, rounds=4000)[-1]
    half = 1.96 * np.sqrt(0.5 * 0.5 / 200)
    assert value == 0.5 and (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


@of_each_task
def test_an_interval_holds_its_score_and_there_is_one_per_output_and_one_of_the_mean(task):
    sums = sums_of(task, 12)
    found = interval(sums, task.metric)
    scores = task.metric.score(sums.sum(axis=0))
    assert [each.value for each in found] == [*scores, scores.mean()]
    assert all(low < value < high for value, low, high in found)
    widths = [high - low for _, low, high in found]
    assert widths[-1] < np.mean(widths[:-1])                              # a mean is surer than its parts


@of_each_task
def test_an_interval_is_narrower_with_more_videos_and_of_no_width_with_one(task):
    few, many = (interval(sums_of(task, videos), task.metric, rounds=500)[-1] for videos in (5, 80))
    assert many.high - many.low < (few.high - few.low) / 2
    alone = interval(sums_of(task, 1), task.metric, rounds=50)
    assert all(value == low == high for value, low, high in alone)


def test_videos_that_are_all_alike_give_an_interval_of_no_width():
    sums = np.repeat(sums_of(TASKS["va"], 1), 6, axis=0)
    assert all(low == pytest.approx(high, abs=1e-12) for _, low, high in interval(sums, CCC, rounds=50))


@of_each_task
def test_the_order_of_videos_does_not_matter_but_for_which_sets_are_drawn(task):
    sums = sums_of(task, 15)
    for (value, low, high), other in zip(interval(sums, task.metric), interval(sums[::-1], task.metric)):
        assert value == pytest.approx(other.value, abs=1e-12)
        assert (low, high) == pytest.approx(other[1:], abs=0.15 * (high - low))


def test_frames_of_one_video_are_one_piece_of_evidence():
    """The same frames, cut into six times as many videos, would seem surer than they are."""
    rng, K = np.random.default_rng(0), 2
    pieces = []
    for _ in range(10):
        hidden = rng.normal(0, 0.3, (60, K)) + rng.normal(0, 0.2, K)
        off = hidden + rng.normal(0, 0.3, K)                              # the whole video is off alike
        pieces += [CCC.count(off[i::6], hidden[i::6], np.ones((10, K), bool)) for i in range(6)]
    pieces = np.stack(pieces)                                             # (60, 2, 6)
    whole = pieces.reshape(10, 6, K, 6).sum(axis=1)
    assert whole.sum() == pytest.approx(pieces.sum())
    of_videos, of_pieces = (interval(sums, CCC, rounds=1000)[-1] for sums in (whole, pieces))
    assert of_videos.high - of_videos.low > 1.5 * (of_pieces.high - of_pieces.low)


def test_the_interval_holds_the_true_score_about_as_often_as_it_says():
    """200 sets of 30 videos whose F1 is the mean of theirs, 0 or 1 with one half each: the truth is 0.5. Of
    95 %, 3 deviations are 4.6 %; that the interval is a little too narrow for few videos is the rest."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        hits = rng.integers(0, 2, 30)
        sums = np.stack([[[0, 1 - hit, 1 - hit, hit]] for hit in hits]).astype(float)
        _, low, high = interval(sums, BINARY_F1, rounds=200)[-1]
        held += low <= 0.5 <= high
    assert 0.86 <= held / 200 <= 0.99


# ---- The difference of two systems

@of_each_task
def test_a_system_differs_from_itself_by_exactly_0(task):
    sums = sums_of(task, 8)
    assert difference(sums, sums.copy(), task.metric) == Interval(0, 0, 0)


@of_each_task
def test_a_better_system_is_better_on_the_same_videos_and_the_other_way_round_the_sign_changes(task):
    good, bad = sums_of(task, 12, seed=1, noise=0.5), sums_of(task, 12, seed=2, noise=1.5)
    value, low, high = difference(good, bad, task.metric)
    means = [task.metric.score(sums.sum(axis=0)).mean() for sums in (good, bad)]
    assert value == means[0] - means[1] and 0 < low < value < high
    assert difference(bad, good, task.metric) == pytest.approx((-value, -high, -low))


def test_the_interval_of_a_difference_is_narrower_than_those_of_the_scores():
    ours, theirs = sums_of(TASKS["va"], 15, seed=1), sums_of(TASKS["va"], 15, seed=2)
    of_difference = difference(ours, theirs, CCC)
    width = of_difference.high - of_difference.low
    assert all(width < each.high - each.low for each in (interval(ours, CCC)[-1], interval(theirs, CCC)[-1]))


def test_systems_are_not_compared_on_other_videos():
    sums = sums_of(TASKS["au"], 5)
    with pytest.raises(ValueError, match=r"on the same videos; got sums of \(5, 12, 4\) and of \(4, 12, 4\)"):
        difference(sums, sums[:4], BINARY_F1)


def test_an_interval_is_told_in_three_digits():
    assert str(Interval(0.12345, -0.1, 0.4)) == "0.123 [-0.100, 0.400]"
