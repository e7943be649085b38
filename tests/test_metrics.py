"""The metrics against counts frame by frame, sums over any split, intervals and tables against known ones."""

import dataclasses
import re

import numpy as np
import pytest

from labels import AU, EXPR, TASKS, VA, targets
from metrics import (BINARY_F1, CCC, CLASS_F1, binary_f1, ccc, class_f1, confusion, difference, drawn_scores,
                     numbers, plain_table, score_table)

# A metric with a number of dimensions, classes or columns: those of the three tasks, and others.
KINDS = {"CCC": (CCC, 2), "CCC of 3": (CCC, 3), "8 classes": (CLASS_F1, 8), "2 classes": (CLASS_F1, 2),
         "12 columns": (BINARY_F1, 12), "5 columns": (BINARY_F1, 5)}
of_each_kind = pytest.mark.parametrize("metric, K", KINDS.values(), ids=KINDS)


def draw(metric, K, frames, seed=0):
    """Outputs, targets and validity, a fifth of the targets invalid and some whole frames too. Of several
    classes the last never occurs."""
    rng = np.random.default_rng(seed)
    outputs, shape = rng.normal(size=(frames, K)), (frames,) if metric is CLASS_F1 else (frames, K)
    if metric is CCC:
        target = rng.uniform(-1, 1, shape).astype(np.float32)
    elif metric is CLASS_F1:
        target = np.minimum(rng.geometric(0.3, shape) - 1, max(K - 2, 1)).astype(np.int8)
    else:
        target = (rng.random(shape) < 0.3).astype(np.int8)
    valid = rng.random(shape) > 0.2
    valid[::17] = False
    return outputs, np.where(valid, target, 0), valid


# ---- Second implementations

def plain_ccc(x, y):
    """2 rho sigma_x sigma_y / (sigma_x^2 + sigma_y^2 + (mu_x - mu_y)^2), the form of Lin (1989)."""
    rho = np.corrcoef(x, y)[0, 1]
    return 2 * rho * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def counted_f1(pred, target):
    """F1 of two lists of booleans, one frame at a time."""
    tp = fp = fn = 0
    for p, t in zip(pred, target):
        tp, fp, fn = tp + (p and t), fp + (p and not t), fn + (t and not p)
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def plain_scores(metric, outputs, target, valid):
    """The scores of the valid frames, frame by frame."""
    K = outputs.shape[1]
    if metric is CCC:
        return [plain_ccc(outputs[valid[:, d], d], target[valid[:, d], d].astype(float)) for d in range(K)]
    if metric is CLASS_F1:
        said = outputs[valid].argmax(axis=1)
        return [counted_f1(said == k, target[valid] == k) for k in range(K)]
    return [counted_f1(outputs[valid[:, k], k] > 0, target[valid[:, k], k] == 1) for k in range(K)]


@of_each_kind
@pytest.mark.parametrize("seed", range(3))
def test_plain_functions_and_sums_score_what_a_count_frame_by_frame_scores(metric, K, seed):
    outputs, target, valid = draw(metric, K, 400, seed)
    expected = pytest.approx(plain_scores(metric, outputs, target, valid), abs=1e-12)
    sums = metric.count(outputs, target, valid)
    assert sums.dtype == np.float64 and metric.score(sums) == expected
    if metric is CCC:
        assert [ccc(outputs[valid[:, d], d], target[valid[:, d], d]) for d in range(K)] == expected
    elif metric is CLASS_F1:
        assert class_f1(outputs[valid].argmax(axis=1), target[valid], classes=K) == expected
    else:
        assert binary_f1(outputs > 0, np.where(valid, target, -1)) == expected


@pytest.mark.parametrize("metric, pred, target, message", [
    (ccc, [1, 2], [1, 2, 3], r"two sequences of one length, .*; got \(2,\) and \(3,\)"),
    (ccc, [[1, 2]], [[1, 2]], r"got \(1, 2\)"), (ccc, [.1, .2], [.1, -5], "frames labelled -5"),
    (ccc, [np.nan, .2], [.1, .2], "without NaN"), (ccc, [.1, .2], [.1, np.inf], "infinity"),
    (class_f1, [0, 1], [0, -1], "classes 0 to 7, without frames labelled -1"),
    (class_f1, [0, 8], [0, 1], "classes 0 to 7"), (class_f1, [0], [0, 1], r"got \(1,\) and \(2,\)"),
    (class_f1, np.eye(8, dtype=int), np.eye(8, dtype=int), r"got \(8, 8\)"),
    (lambda *a: class_f1(*a, classes=6), [0, 1], [0, 6], "classes 0 to 5"),
    (binary_f1, np.full((1, 12), .7), np.ones((1, 12)), "the threshold applied"),
    (binary_f1, np.ones((1, 2)), np.full((1, 2), -5), r"two arrays \(T, K\) of 0 and 1"),
    (binary_f1, np.full((1, 2), -1), np.ones((1, 2)), "of 0 and 1"), (binary_f1, [1], [1], r"got \(1,\)"),
    (binary_f1, np.ones((3, 2)), np.ones((2, 2)), r"got \(3, 2\) and \(2, 2\)")])
def test_what_would_be_scored_wrongly_is_refused(metric, pred, target, message):
    with pytest.raises(ValueError, match=message):
        metric(pred, target)


# ---- Sums

def test_the_sums_are_those_that_the_documentation_names():
    x, y = np.array([[1.0], [2], [9]]), np.array([[3.0], [5], [9]])
    assert CCC.count(x, y, x < 9).tolist() == [[2, 3, 8, 5, 34, 13]]             # n, Σx, Σy, Σx², Σy², Σxy
    outputs, target = np.eye(3)[[0, 0, 2, 2]], np.array([0, 1, 1, 1])            # (labelled, predicted)
    assert CLASS_F1.count(outputs, target, target >= 0).tolist() == [[1, 0, 0], [1, 0, 2], [0, 0, 0]]
    outputs, target = np.array([[-1], [1], [1], [-1], [-1], [-1], [1], [1.0], [1], [1]]), [0] * 3 + [1] * 7
    target = np.array(target)[:, None]
    assert BINARY_F1.count(outputs, target, target >= 0).tolist() == [[[1, 2], [3, 4]]]     # TN, FP, FN, TP
    outputs, target = np.array([[-1e-9], [0.0], [1e-9]]), np.zeros((3, 1), int)             # present: above 0
    assert BINARY_F1.count(outputs, target, target == 0).tolist() == [[[2, 1], [0, 0]]]


@of_each_kind
def test_chance_is_the_best_of_all_constant_predictions_tried_one_by_one(metric, K):
    outputs, target, valid = draw(metric, K, 500)
    chance, each = metric.chance(metric.count(outputs, target, valid)), [[0] * K]
    if metric is not CCC:
        constants = np.eye(K) if metric is CLASS_F1 else [[1] * K, [-1] * K]
        each = [plain_scores(metric, np.tile(constant, (500, 1)), target, valid) for constant in constants]
    assert chance == pytest.approx(max(each, key=np.mean), abs=1e-12) and chance.shape == (K,)


@of_each_kind
def test_nothing_valid_scores_0_without_a_warning_and_what_is_not_finite_is_refused(metric, K):
    outputs, target, valid = draw(metric, K, 4)
    with np.errstate(all="raise"):
        sums = metric.count(outputs, target, valid & False) + metric.count(outputs[:0], target[:0], valid[:0])
        assert not sums.any() and not metric.score(sums).any() and not metric.chance(sums).any()
        assert not np.any(metric.details(sums))
    for value in (np.nan, np.inf, -np.inf):
        outputs[3, 1] = value
        with pytest.raises(ValueError, match="outputs are not finite"):
            metric.count(outputs, target, valid)


@pytest.mark.parametrize("constant", [0.1, 0.5, 1 / 3])
def test_equal_constants_score_0_whatever_the_rounding_but_a_tiny_spread_is_no_constant(constant):
    x = np.full((1001, 1), constant)
    assert CCC.score(CCC.count(x, x, x < 1)).tolist() == [0] == [ccc(x[:, 0], x[:, 0])]
    x = np.linspace(-1e-5, 1e-5, 101)[:, None]
    assert CCC.score(CCC.count(x, x, x < 1)) == pytest.approx(1) and ccc(x[:, 0], x[:, 0]) == pytest.approx(1)


# ---- The tables

# What an earlier version wrote: new code must draw the same sets, and add in the same order.
TEXT = {
    "va": """\
CCC          ours            95 %  unseen  chance  paper  baseline  frames
valence     0.825  [0.814, 0.848]   0.814   0.000  0.538     0.240   1,447
arousal     0.828  [0.805, 0.884]   0.861   0.000  0.622     0.200   1,447
mean        0.827  [0.814, 0.866]   0.837   0.000  0.580     0.220

            label mean  deviation  prediction mean  deviation  Pearson's r
valence          0.187      0.308            0.191      0.365        0.837
arousal         -0.048      0.309           -0.040      0.365        0.840""",
    "expr": """\
macro F1     ours            95 %  unseen  chance  paper  baseline          frames
Neutral     0.612  [0.594, 0.721]   0.721   0.000      -         -    195 of 1,447
Anger       0.879  [0.638, 0.889]   0.638   0.873      -         -  1,120 of 1,447
Disgust     0.519  [0.400, 0.535]   0.400   0.000      -         -    132 of 1,447
mean        0.670  [0.586, 0.672]   0.586   0.291  0.456     0.230

label       Neutral  Anger  Disgust
Neutral         131     41       23
Anger            88    933       99
Disgust          14     29       89""",
    "au": """\
mean F1      ours            95 %  unseen  chance  paper  baseline        frames
AU1         0.828  [0.667, 0.849]   0.667   0.655      -         -  705 of 1,447
AU2         0.673  [0.500, 0.696]   0.500   0.340      -         -  296 of 1,447
mean        0.751  [0.583, 0.772]   0.583   0.497  0.576     0.390

               TN   FP   FN   TP  precision  recall
AU1           611  131  114  591      0.819   0.838
AU2         1,017  134   78  218      0.619   0.736"""}
OVER_SEEDS = {"va": (-0.00021497693763561365, -0.0029566974784615008, 0.020786925204685502),
              "expr": (-0.006355161904884388, -0.06456724653298951, 0.0003549796255003512),
              "au": (-0.006179845846572496, -0.03995438945766583, 0.0923601538480644)}
SMALL = [VA, dataclasses.replace(EXPR, outputs=EXPR.outputs[:3]),
         dataclasses.replace(AU, outputs=AU.outputs[:2])]
of_each_small_task = pytest.mark.parametrize("task", SMALL, ids=TASKS)


def some_sums(task, seed=0):
    """Sums of four videos of random numbers, those of TEXT."""
    rng, sums, K = np.random.default_rng(seed), [], len(task.outputs)
    for frames in (40, 90, 60, 1500):
        hidden = rng.normal(0, 0.3, (frames, K)) + rng.normal(0, 0.2, K)
        labels = {"va": hidden.clip(-1, 1), "expr": hidden.argmax(axis=1), "au": hidden > 0.2}[task.name]
        labels = labels.astype(task.dtype)
        labels[::7] = task.invalid
        outputs = hidden - 0.2 * (task.name == "au") + rng.normal(0, 0.2, (frames, K))
        sums.append(task.metric.count(outputs, *targets(labels, task)))
    return np.stack(sums)


def columns(table: str) -> dict[str, list[str]]:
    """{title: cells}, from titles and cells that two blanks or more part."""
    titles, *rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    rows = [row + [""] * (len(titles) - len(row)) for row in rows]
    return {title: list(cells) for title, cells in zip(titles, zip(*rows, strict=True), strict=True)}


@of_each_small_task
def test_the_tables_and_the_numbers_are_those_that_an_earlier_version_wrote(task):
    a, b, c = (some_sums(task, seed) for seed in range(3))
    table = score_table(task, a, unseen=np.array([True, False, True, False]))
    assert f"{table}\n\n{confusion(task, a)}" == TEXT[task.name]
    found = difference(np.stack([a, b]), np.stack([c, c, a]), task.metric)
    assert found == pytest.approx(OVER_SEEDS[task.name], abs=1e-13)
    ours, theirs = (drawn_scores(sums, task.metric).mean(axis=1) for sums in (a, b))      # on the same draws
    assert difference(a[None], b[None], task.metric)[1:] == tuple(np.quantile(
        ours[1:] - theirs[1:], (0.025, 0.975)))


@pytest.mark.parametrize("task, fold, column", [
    (VA, 1, ["0.640", "0.565", "0.603"]), (VA, 4, ["0.540", "0.634", "0.587"]),
    (EXPR, 2, ["-"] * 8 + ["0.446"]), (AU, 4, ["-"] * 12 + ["0.582"])], ids=["va", "va 4", "expr 2", "au 4"])
def test_a_fold_is_compared_with_its_own_column_of_table_1_and_with_no_baseline(task, fold, column):
    shown = columns(score_table(task, some_sums(task), fold=fold))
    assert shown["paper"] == column and set(shown["baseline"]) == {"-"}
    shown = columns(score_table(task, some_sums(task), comparable=False))
    assert list(shown) == [task.metric.name, "ours", "95 %", "chance", "frames"]


@pytest.mark.parametrize("task, occur, mean", [(EXPR, 5, "0.625"), (AU, 8, "0.667"), (VA, 1, "0.500")])
def test_a_perfect_score_of_what_occurs_is_told_beside_the_challenges_mean(task, occur, mean):
    values = np.random.default_rng(0).uniform(-1, 1, (99, occur if task is EXPR else len(task.outputs)))
    target = values.argmax(axis=1) if task is EXPR else values > 0 if task is AU else values
    outputs = np.pad(values, [(0, 0), (0, len(task.outputs) - values.shape[1])], constant_values=-9)
    valid = target < 9 if task is EXPR else values * 0 + np.arange(values.shape[1]) < occur
    sums, gone = task.metric.count(outputs, target, valid), ", ".join(task.outputs[occur:])
    *_, of_mean, last = score_table(task, sums[None]).splitlines()
    assert of_mean.split()[:2] == ["mean", mean]
    assert last == f"not among the labels, so 0 in the mean: {gone}; the mean of the others is 1.000"
    assert task is not EXPR or plain_table(CLASS_F1, EXPR.outputs, sums).splitlines()[-1] == last
    assert score_table(task, sums[None] * 0).endswith(f"in the mean: {', '.join(task.outputs)}")


@of_each_small_task
def test_the_numbers_of_metrics_json_are_those_of_the_tables_and_one_video_has_no_interval(task):
    sums, total = some_sums(task), some_sums(task).sum(axis=0)
    written, shown = numbers(task, sums), columns(score_table(task, sums))
    each = [written["outputs"][name] for name in task.outputs]
    assert [f"{written[name]:.3f}" for name in [*task.outputs, "score"]] == shown["ours"]
    assert [f"{output['chance']:.3f}" for output in [*each, written]] == shown["chance"]
    ends = [*(output["interval"] for output in each), written["score_interval"]]
    assert [f"[{low:.3f}, {high:.3f}]" for low, high in ends] == shown["95 %"]
    assert [output["frames"] for output in each] == task.metric.labelled(total).tolist()
    cells = [[f"{cell:,}" if type(cell) is int else f"{cell:.3f}" for cell in row]
             for row in written["confusion"]]
    assert cells == [line.split()[1:] for line in confusion(task, sums).splitlines()[1:]]
    assert written["confusion_columns"] == list(task.metric.titles or task.outputs)
    if task.name == "expr":
        assert columns(plain_table(CLASS_F1, task.outputs, total)) == {
            title: shown[title] for title in (written["metric"], "ours", "chance")}
    alone = numbers(task, sums[:1])
    assert {row["interval"] for row in alone["outputs"].values()} == {alone["score_interval"]} == {None}
    assert set(columns(score_table(task, sums[:1]))["95 %"]) == {"-"}
    assert "-" not in columns(score_table(task, sums[:2]))["95 %"]
