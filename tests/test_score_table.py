"""The table of a score and the confusion, from the sums of each video alone, against counts by hand."""

import re

import numpy as np
import pytest

from intervals import interval
from labels import AU, EXPR, TASKS, VA, targets
from metrics import binary_f1, ccc, class_f1
from score_table import class_table, confusion, numbers, score_table

of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def drawn(task, frames, seed):
    """Outputs and labels of one video, a fifth of the labels invalid, no frame of the last output's."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    labels = {"va": rng.uniform(-1, 1, (frames, K)), "expr": rng.integers(0, 7, frames),
              "au": rng.random((frames, K)) < 0.3}[task.name].astype(task.dtype)
    labels[rng.random(labels.shape) < 0.2] = task.invalid
    return rng.normal(size=(frames, K)) + labels.reshape(frames, -1), labels


def videos(task, count=4):
    return [drawn(task, 50 + 30 * seed, seed) for seed in range(count)]


def sums_of(task, pairs):
    return np.stack([task.metric.count(outputs, *targets(labels, task)) for outputs, labels in pairs])


def pooled(pairs):
    outputs, labels = zip(*pairs)
    return np.concatenate(outputs), np.concatenate(labels)


def score_of(task, outputs, labels):
    """By the functions that take predictions and labels themselves."""
    if task is VA:
        return np.array([ccc(outputs[labels[:, d] != -5, d], labels[labels[:, d] != -5, d]) for d in (0, 1)])
    if task is EXPR:
        return class_f1(outputs[labels >= 0].argmax(axis=1), labels[labels >= 0])
    return binary_f1(outputs > 0, labels)


def columns(table: str) -> dict[str, list[str]]:
    """{title: cells}, from titles and cells that two blanks or more part."""
    titles, *rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    rows = [row + [""] * (len(titles) - len(row)) for row in rows]
    return {title: list(cells) for title, cells in zip(titles, zip(*rows, strict=True), strict=True)}


def three_digits(scores):
    return [f"{score:.3f}" for score in [*scores, np.mean(scores)]]


# ---- The table

@of_each_task
def test_the_table_has_a_line_per_output_and_the_means_beside_chance_and_the_papers(task):
    pairs = videos(task)
    shown = columns(score_table(task, sums_of(task, pairs)))
    assert list(shown) == [task.metric.name, "ours", "95 %", "chance", "paper", "baseline", "frames"]
    assert shown[task.metric.name] == [*task.outputs, "mean"]
    assert shown["ours"] == three_digits(score_of(task, *pooled(pairs)))
    assert shown["chance"] == three_digits(task.metric.chance(sums_of(task, pairs).sum(axis=0)))
    means = {"va": ("0.580", "0.220"), "expr": ("0.456", "0.230"), "au": ("0.576", "0.390")}
    assert (shown["paper"][-1], shown["baseline"][-1]) == means[task.name]
    each = (["0.538", "0.622"], ["0.240", "0.200"]) if task is VA else [["-"] * len(task.outputs)] * 2
    assert (shown["paper"][:-1], shown["baseline"][:-1]) == tuple(each)


@of_each_task
def test_the_interval_stands_beside_each_score_and_their_mean(task):
    sums = sums_of(task, videos(task))
    expected = [f"[{low:.3f}, {high:.3f}]" for _, low, high in interval(sums, task.metric)]
    assert columns(score_table(task, sums))["95 %"] == expected
    assert len(set(expected)) > 2


@of_each_task
def test_one_video_says_nothing_about_others_so_it_has_no_interval(task):
    sums = sums_of(task, videos(task, 1))
    assert set(columns(score_table(task, sums))["95 %"]) == {"-"}
    written = numbers(task, sums)
    assert written["score_interval"] is None
    assert all(output["interval"] is None for output in written["outputs"].values())


@of_each_task
def test_the_frames_are_those_that_a_score_rests_on(task):
    pairs = videos(task)
    labels = pooled(pairs)[1]
    if task is VA:
        expected = [f"{(labels[:, d] != -5).sum():,}" for d in (0, 1)]
    elif task is EXPR:
        expected = [f"{(labels == k).sum():,} of {(labels >= 0).sum():,}" for k in range(8)]
    else:
        expected = [f"{(labels[:, k] == 1).sum():,} of {(labels[:, k] >= 0).sum():,}" for k in range(12)]
    assert columns(score_table(task, sums_of(task, pairs)))["frames"] == [*expected, ""]


@pytest.mark.parametrize("task, fold, column", [
    (VA, 1, ["0.640", "0.565", "0.603"]), (VA, 4, ["0.540", "0.634", "0.587"]),
    (EXPR, 2, ["-"] * 8 + ["0.446"]), (EXPR, 3, ["-"] * 8 + ["0.458"]),
    (AU, 2, ["-"] * 12 + ["0.502"]), (AU, 4, ["-"] * 12 + ["0.582"])],
    ids=["va 1", "va 4", "expr 2", "expr 3", "au 2", "au 4"])
def test_a_fold_is_compared_with_its_own_column_of_table_1_and_with_no_baseline(task, fold, column):
    shown = columns(score_table(task, sums_of(task, videos(task)), fold=fold))
    assert shown["paper"] == column
    assert set(shown["baseline"]) == {"-"}                   # the challenge's is on the official split alone


@of_each_task
def test_the_score_on_unseen_videos_stands_beside_and_the_papers_only_where_it_can_be_compared(task):
    pairs, unseen = videos(task), np.array([True, False, False, True])
    shown = columns(score_table(task, sums_of(task, pairs), unseen, comparable=False))
    assert list(shown) == [task.metric.name, "ours", "95 %", "unseen", "chance", "frames"]
    assert shown["unseen"] == three_digits(score_of(task, *pooled([pairs[0], pairs[3]]))) != shown["ours"]


def test_the_columns_of_a_table_stand_below_each_other():
    assert score_table(VA, np.zeros((3, 2, 6))) == """\
CCC          ours            95 %  chance  paper  baseline  frames
valence     0.000  [0.000, 0.000]   0.000  0.538     0.240       0
arousal     0.000  [0.000, 0.000]   0.000  0.622     0.200       0
mean        0.000  [0.000, 0.000]   0.000  0.580     0.220"""


@of_each_task
def test_a_table_of_a_complete_aff_wild2_is_at_most_110_characters_wide_without_blanks_at_the_end(task):
    sums = sums_of(task, videos(task)) * -1e5 if task is VA else sums_of(task, videos(task)) * 100_000
    lines = [*score_table(task, np.abs(sums), np.array([True] * 4)).splitlines(),
             *confusion(task, np.abs(sums)).splitlines()]
    assert max(map(len, lines)) <= 110 and all(line == line.rstrip() for line in lines)


def test_the_table_of_classes_has_chance_beside_each_f1_and_their_mean():
    shown = columns(class_table(["a", "b", "c"], np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])))
    # a: 6 hits, 2 misses; b: 2 hits, 2 false alarms. Chance: always a gives 2 · 8 / (8 + 10), always b
    # 2 · 2 / (2 + 10), and of c there is nothing.
    assert shown == {"macro F1": ["a", "b", "c", "mean"], "ours": ["0.857", "0.667", "0.000", "0.508"],
                     "chance": ["0.889", "0.000", "0.000", "0.296"]}


# ---- The confusion

def test_the_confusion_of_expressions_counts_frames_by_label_and_prediction():
    pairs = videos(EXPR)
    outputs, labels = pooled(pairs)
    predicted = outputs.argmax(axis=1)
    shown = columns(confusion(EXPR, sums_of(EXPR, pairs)))
    assert shown.pop("label") == list(EXPR.outputs) and list(shown) == list(EXPR.outputs)
    assert [[int(shown[there][label]) for there in EXPR.outputs] for label in range(8)] == [
        [((labels == label) & (predicted == k)).sum() for k in range(8)] for label in range(8)]


def test_the_confusion_of_action_units_counts_hits_and_misses_of_each():
    pairs = videos(AU)
    outputs, labels = pooled(pairs)
    said, valid = outputs > 0, labels >= 0
    hit, false = said & (labels == 1), said & (labels == 0)
    missed, rejected = ~said & (labels == 1), ~said & (labels == 0)
    shown = columns(confusion(AU, sums_of(AU, pairs)))
    assert list(shown) == ["", "TN", "FP", "FN", "TP", "precision", "recall"]
    for title, expected in (("TN", rejected), ("FP", false), ("FN", missed), ("TP", hit)):
        assert shown[title] == [str(count) for count in (expected & valid).sum(axis=0)]
    precision = hit.sum(axis=0) / (said & valid).sum(axis=0)
    recall = hit.sum(axis=0) / (labels == 1).sum(axis=0)
    assert shown["precision"] == [f"{value:.3f}" for value in precision]
    assert shown["recall"] == [f"{value:.3f}" for value in recall]


def test_the_confusion_of_valence_and_arousal_is_mean_deviation_and_correlation():
    pairs = videos(VA)
    outputs, labels = pooled(pairs)
    lines = confusion(VA, sums_of(VA, pairs)).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["", "label mean", "deviation", "prediction mean", "deviation",
                                             "Pearson's r"]
    for d, line in enumerate(lines[1:]):
        x, y = (values[labels[:, d] != -5, d].astype(float) for values in (outputs, labels))
        expected = [y.mean(), y.std(), x.mean(), x.std(), np.corrcoef(x, y)[0, 1]]
        assert line.split() == [VA.outputs[d], *[f"{value:.3f}" for value in expected]]


@of_each_task
def test_nothing_labelled_and_constants_give_zeros_and_no_warning(task):
    K = len(task.outputs)
    with np.errstate(all="raise"):
        for frames in (0, 7):
            labels = np.zeros((frames,) if task.one_class else (frames, K), task.dtype)
            sums = sums_of(task, [(np.zeros((frames, K)), labels)] * 2)
            assert "nan" not in score_table(task, sums) + confusion(task, sums) + str(numbers(task, sums))


# ---- metrics.json

@of_each_task
def test_the_numbers_are_those_of_the_two_tables(task):
    sums = sums_of(task, videos(task))
    written, intervals = numbers(task, sums), interval(sums, task.metric)
    shown, total = columns(score_table(task, sums)), sums.sum(axis=0)
    assert written["metric"] == task.metric.name and written["confusion_columns"][-1] in confusion(task, sums)
    assert [f"{written[name]:.3f}" for name in [*task.outputs, "score"]] == shown["ours"]
    each = written["outputs"]
    assert [f"{each[name]['chance']:.3f}" for name in task.outputs] == shown["chance"][:-1]
    assert f"{written['chance']:.3f}" == shown["chance"][-1]
    expected = [[low, high] for _, low, high in intervals[:-1]]
    assert [each[name]["interval"] for name in task.outputs] == expected
    assert written["score_interval"] == [intervals[-1].low, intervals[-1].high]
    assert [each[name]["frames"] for name in task.outputs] == task.metric.labelled(total).tolist()
    assert np.array_equal(np.array(written["confusion"]), np.stack(task.metric.details(total), axis=1))
