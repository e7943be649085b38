"""Metrics against plain formulas and counts by hand, for any number of classes or columns, and exact over any
split of the frames."""

import ast
import runpy

import numpy as np
import pytest

import metrics
from metrics import BINARY_F1, CCC, CLASS_F1, Metric, binary_f1, ccc, class_f1

# A metric with a number of dimensions, classes or columns: those of the three tasks, and others.
KINDS = {"CCC": (CCC, 2), "CCC of 3": (CCC, 3), "8 classes": (CLASS_F1, 8), "6 classes": (CLASS_F1, 6),
         "12 columns": (BINARY_F1, 12), "5 columns": (BINARY_F1, 5)}
of_each_kind = pytest.mark.parametrize("metric, K", KINDS.values(), ids=KINDS)


def draw(metric, K, frames, seed=0):
    """Outputs, targets and validity of `frames` frames, a fifth of the targets invalid and some whole frames
    too. The last class never occurs."""
    rng = np.random.default_rng(seed)
    outputs, shape = rng.normal(size=(frames, K)), (frames,) if metric is CLASS_F1 else (frames, K)
    if metric is CCC:
        target = rng.uniform(-1, 1, shape).astype(np.float32)
    elif metric is CLASS_F1:
        target = np.minimum(rng.geometric(0.3, shape) - 1, K - 2).astype(np.int8)
    else:
        target = (rng.random(shape) < 0.3).astype(np.int8)
    valid = rng.random(shape) > 0.2
    valid[::17] = False
    return outputs, np.where(valid, target, 0), valid


def called_alone(metric, outputs, target, valid):
    """What the function for predictions from elsewhere gives on the valid frames alone."""
    K = outputs.shape[1]
    if metric is CCC:
        return [ccc(outputs[valid[:, d], d], target[valid[:, d], d]) for d in range(K)]
    if metric is CLASS_F1:
        return class_f1(outputs[valid].argmax(1), target[valid], classes=K)
    return binary_f1(outputs > 0, np.where(valid, target, -1))


# ---- Called alone

def plain_ccc(x, y):
    """2 rho sigma_x sigma_y / (sigma_x^2 + sigma_y^2 + (mu_x - mu_y)^2), the form of Lin (1989)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    rho = np.corrcoef(x, y)[0, 1]
    return 2 * rho * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def counted_f1(pred, target):
    """F1 of two lists of booleans, one frame at a time."""
    tp = fp = fn = 0
    for p, t in zip(pred, target):
        tp, fp, fn = tp + (p and t), fp + (p and not t), fn + (t and not p)
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("pred, target, value", [
    ([1, 2, 3], [1, 2, 3], 1), ([1, 2, 3], [3, 2, 1], -1), ([-1, 0, 1], [0, 1, 2], 4 / 7),
    ([-2, 0, 2], [-1, 0, 1], 4 / 5), ([0, 0, 0], [-1, 0, 1], 0), ([.5, .5], [.5, .5], 0),
    ([.5, .5], [-.5, -.5], 0), ([1, 0, -1, 0], [0, 1, 0, -1], 0), ([.3], [.3], 0)])
def test_ccc_of_known_cases(pred, target, value):
    assert ccc(pred, target) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_ccc_is_lins_formula_and_symmetric(seed):
    rng = np.random.default_rng(seed)
    y = rng.uniform(-1, 1, 500)
    x = rng.uniform(-2, 2) * y + rng.normal(rng.uniform(-1, 1), rng.uniform(0, 1), 500)
    assert ccc(x, y) == pytest.approx(plain_ccc(x, y), abs=1e-12) == ccc(y, x)


def test_ccc_uses_population_statistics():
    x, y = np.arange(4), np.arange(4) + 1
    assert ccc(x, y) == pytest.approx(2 * 1.25 / (1.25 + 1.25 + 1), abs=1e-12)
    not_this = 2 * np.cov(x, y)[0, 1] / (x.var(ddof=1) + y.var(ddof=1) + 1)
    assert not_this == pytest.approx(10 / 13)


def test_f1_of_8_classes_counted_by_hand():
    #                        TP Anger  FN Anger    FP Anger   Fear never occurs and is never predicted
    target = np.array([1, 1, 1,        1, 1,       0, 0,      7])
    pred = np.array([1, 1, 1,          0, 7,       1, 0,      7])
    assert class_f1(pred, target) == pytest.approx([2 / 4, 6 / 9, 0, 0, 0, 0, 0, 2 / 3])


def test_f1_of_6_classes_counted_by_hand():
    target, pred = [0, 0, 5, 5, 5, 2], [0, 5, 5, 5, 0, 3]
    assert class_f1(pred, target, classes=6) == pytest.approx([2 / 4, 0, 0, 0, 0, 4 / 6])


def test_f1_of_12_columns_counted_by_hand():
    target, pred = np.zeros((6, 12), int), np.zeros((6, 12), int)
    target[:, 0], pred[:, 0] = [1, 1, 1, 0, 0, -1], [1, 1, 0, 1, 0, 1]  # TP 2, FN 1, FP 1; one does not count
    target[:, 1], pred[:, 1] = [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]   # TP 1, FP 5
    target[:, 2] = -1                                                   # nothing is labelled
    target[:, 3] = 1                                                    # always there, never predicted
    pred[:, 4] = 1                                                      # never there, always predicted
    target[:, 11], pred[:, 11] = 1, 1
    assert binary_f1(pred, target) == pytest.approx([4 / 6, 2 / 7] + [0] * 9 + [1])


def test_f1_of_5_columns_counted_by_hand():
    target = [[1, 0, 1, -1, 1], [1, 0, 0, 1, -1], [0, 1, 1, 1, 1]]
    pred = [[1, 0, 0, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    assert binary_f1(pred, target) == pytest.approx([2 / 3, 0, 2 / 4, 2 / 3, 2 / 3])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("K", [8, 6])
def test_f1_of_classes_equals_a_count_frame_by_frame(seed, K):
    outputs, target, valid = draw(CLASS_F1, K, 400, seed)
    pred, target = outputs[valid].argmax(1), target[valid]
    expected = [counted_f1(pred == k, target == k) for k in range(K)]
    assert class_f1(pred, target, classes=K) == pytest.approx(expected, abs=1e-12)
    assert class_f1(pred, target, classes=K)[K - 1] == 0                    # the last class never occurs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("K", [12, 5])
def test_f1_of_columns_equals_a_count_frame_by_frame(seed, K):
    outputs, target, valid = draw(BINARY_F1, K, 400, seed)
    expected = [counted_f1(outputs[valid[:, k], k] > 0, target[valid[:, k], k] == 1) for k in range(K)]
    pred = (outputs > 0).astype(int)
    assert binary_f1(pred, np.where(valid, target, -1)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_f1_does_not_depend_on_the_kind_of_integer(dtype):
    pred, target = np.array([0, 1, 7, 7], dtype), np.array([0, 1, 7, 1], dtype)
    assert class_f1(pred, target) == pytest.approx(class_f1(pred.tolist(), target.tolist()))
    pred, target = np.eye(12, dtype=dtype), np.ones((12, 12), dtype)
    assert binary_f1(pred, target) == pytest.approx([2 / 13] * 12)


@pytest.mark.parametrize("metric, pred, target, message", [
    (ccc, [1, 2], [1, 2, 3], r"two sequences of one length, got \(2,\) and \(3,\)"),
    (ccc, [[1, 2]], [[1, 2]], r"two sequences of one length, got \(1, 2\)"),
    (class_f1, [0, 1], [0, -1], "classes 0 to 7 of one length.*leave out frames labelled -1"),
    (class_f1, [0, 8], [0, 1], "classes 0 to 7"), (class_f1, [0], [0, 1], r"got \(1,\) and \(2,\)"),
    (class_f1, [0, 1.5], [0, 1], "classes 0 to 7"), (class_f1, [0, 1], [0, np.nan], "classes 0 to 7"),
    (class_f1, np.zeros((3, 8), int), np.zeros((3, 8), int), r"classes 0 to 7.*got \(3, 8\)"),
    (binary_f1, np.full((1, 12), .7), np.ones((1, 12)), "apply the threshold first"),
    (binary_f1, np.ones((1, 12)), np.full((1, 12), -5), r"two arrays \(T, K\) of 0 and 1"),
    (binary_f1, np.full((1, 12), -1), np.ones((1, 12)), r"two arrays \(T, K\) of 0 and 1"),
    (binary_f1, np.ones((2, 11)), np.ones((2, 12)), r"got \(2, 11\) and \(2, 12\)"),
    (binary_f1, np.ones(12), np.ones(12), r"got \(12,\)"),
    (binary_f1, np.ones((3, 12)), np.ones((2, 12)), r"got \(3, 12\) and \(2, 12\)")])
def test_a_metric_refuses_what_it_would_score_wrongly(metric, pred, target, message):
    with pytest.raises(ValueError, match=message):
        metric(pred, target)


@pytest.mark.parametrize("pred, target", [([0, 6], [0, 1]), ([0, 1], [0, 6])], ids=["pred", "target"])
def test_a_class_above_the_number_of_classes_is_refused(pred, target):
    with pytest.raises(ValueError, match="classes 0 to 5 of one length"):
        class_f1(pred, target, classes=6)


@pytest.mark.parametrize("pred, target", [
    ([.1, .2, .3], [.1, -5, .3]), ([np.nan, .2], [.1, .2]), ([.1, .2], [.1, np.inf])],
    ids=["code -5", "NaN", "infinity"])
def test_ccc_refuses_the_invalid_code_nan_and_infinity(pred, target):
    with pytest.raises(ValueError, match="-5|NaN|finite"):
        ccc(pred, target)


@pytest.mark.parametrize("pred", [[0.0, 1.0], [False, True]], ids=["float", "bool"])
def test_class_f1_takes_whole_numbers_of_another_type(pred):
    assert class_f1(pred, [0, 1]) == pytest.approx([1, 1, 0, 0, 0, 0, 0, 0])


# ---- Sums

def test_the_metrics_have_the_names_of_the_challenge():
    assert [metric.name for metric in (CCC, CLASS_F1, BINARY_F1)] == ["CCC", "macro F1", "mean F1"]
    assert all(isinstance(metric, Metric) for metric in (CCC, CLASS_F1, BINARY_F1))


def test_the_sums_are_those_that_the_documentation_names():
    x, y = np.array([[1.0], [2], [9]]), np.array([[3.0], [5], [9]])
    valid = np.array([[True], [True], [False]])
    assert CCC.count(x, y, valid).tolist() == [[2, 3, 8, 5, 34, 13]]             # n, Σx, Σy, Σx², Σy², Σxy
    outputs, target = np.eye(3)[[0, 0, 2, 2]], np.array([0, 1, 1, 1])            # (labelled, predicted)
    assert CLASS_F1.count(outputs, target, target >= 0).tolist() == [[1, 0, 0], [1, 0, 2], [0, 0, 0]]
    outputs, target = np.array([[-1], [1], [1], [-1], [-1], [-1], [1], [1.0], [1], [1]]), [0] * 3 + [1] * 7
    target = np.array(target)[:, None]
    assert BINARY_F1.count(outputs, target, target >= 0).tolist() == [[1, 2, 3, 4]]      # TN, FP, FN, TP


@of_each_kind
def test_the_sums_give_what_the_metric_gives_on_the_valid_frames_alone(metric, K):
    outputs, target, valid = draw(metric, K, 500)
    sums = metric.count(outputs, target, valid)
    assert sums.dtype == np.float64
    assert metric.score(sums) == pytest.approx(called_alone(metric, outputs, target, valid), abs=1e-12)


@of_each_kind
def test_any_split_over_any_number_of_processes_gives_the_same_scores(metric, K):
    outputs, target, valid = draw(metric, K, 999)
    whole = metric.count(outputs, target, valid)
    rng = np.random.default_rng(1)
    for processes in (1, 2, 3, 8):
        total, owner = 0, rng.integers(processes, size=999)
        for rank in range(processes):
            mine = rng.permutation(np.flatnonzero(owner == rank))
            cuts = np.sort(rng.integers(len(mine), size=3))
            for batch in [*np.split(mine, cuts), mine[:0]]:                              # one of them empty
                total = total + metric.count(outputs[batch], target[batch], valid[batch])
        assert metric.score(total) == pytest.approx(metric.score(whole), abs=1e-12)
        if metric is not CCC:
            assert np.array_equal(total, whole)


@of_each_kind
def test_what_is_predicted_for_an_invalid_label_is_never_counted(metric, K):
    outputs, target, valid = draw(metric, K, 300)
    sums = metric.count(outputs, target, valid)
    other = outputs.copy()
    other[~valid] = 1e6
    assert np.array_equal(sums, metric.count(other, target, valid))
    other = np.where(valid, target, target + 1)                                  # nor the label itself
    assert np.array_equal(sums, metric.count(outputs, other, valid))
    counted = {CCC: sums[:, 0], CLASS_F1: sums.sum(), BINARY_F1: sums.sum(axis=1)}[metric]
    assert np.array_equal(counted, valid.sum(axis=0))


@of_each_kind
def test_nothing_valid_scores_0_without_a_warning(metric, K):
    outputs, target, valid = draw(metric, K, 4)
    sums = metric.count(outputs, target, np.zeros_like(valid))
    sums = sums + metric.count(outputs[:0], target[:0], valid[:0])
    with np.errstate(all="raise"):
        assert not sums.any() and not metric.score(sums).any() and not metric.chance(sums).any()


@of_each_kind
def test_chance_is_the_best_constant_prediction(metric, K):
    outputs, target, valid = draw(metric, K, 500)
    constants = {CCC: [[0.0] * K, [.3] * K, [-.7] * K], CLASS_F1: np.eye(K), BINARY_F1: [[1] * K, [-1] * K]}
    each = []
    for constant in constants[metric]:
        each.append(metric.score(metric.count(np.tile(constant, (500, 1)), target, valid)))
    best = np.max(each, axis=0) if metric is BINARY_F1 else max(each, key=np.mean)
    chance = metric.chance(metric.count(outputs, target, valid))
    assert chance == pytest.approx(best, abs=1e-12) and chance.shape == (K,)
    assert (metric is CCC) == (best.sum() < 1e-12)


@of_each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_not_scored(metric, K, value):
    outputs, target, valid = draw(metric, K, 20)
    outputs[3, 1] = value
    with pytest.raises(ValueError, match="outputs are not finite"):
        metric.count(outputs, target, valid)


def test_the_threshold_of_an_action_unit_is_a_logit_above_0_exactly():
    outputs, target = np.tile([[-1e-9], [0.0], [1e-9]], 12), np.zeros((3, 12), int)
    sums = BINARY_F1.count(outputs, target, target == 0)
    assert sums[:, :2].tolist() == [[2, 1]] * 12


@pytest.mark.parametrize("constant", [0.1, 0.5, 1 / 3])
def test_two_equal_constants_score_0_whatever_the_rounding_of_their_sums(constant):
    x = np.full((1001, 1), constant)
    assert CCC.score(CCC.count(x, x, x < 1)).tolist() == [0] == [ccc(x[:, 0], x[:, 0])]


def test_a_spread_of_a_hundred_thousandth_is_no_constant():
    x = np.linspace(-1e-5, 1e-5, 101)[:, None]
    assert CCC.score(CCC.count(x, x, x < 1)) == pytest.approx(1) and ccc(x[:, 0], x[:, 0]) == pytest.approx(1)


# ---- On its own

def test_the_metrics_need_nothing_but_numpy():
    """The command that scores a file imports more, but no torch: test_prediction_files.py."""
    with open(metrics.__file__) as file:
        *tree, script = ast.parse(file.read()).body
    assert isinstance(script, ast.If)
    imported = set()
    for node in [node for part in tree for node in ast.walk(part)]:
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported - {"argparse", "sys", "typing", "collections.abc"} == {"numpy"}


def test_the_script_shows_that_constants_score_little_and_noisy_copies_much(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["metrics.py"])
    runpy.run_path(metrics.__file__, run_name="__main__")
    for line, limit in zip(capsys.readouterr().out.splitlines(), (0.01, 0.15, 0.4), strict=True):
        constant, noisy = [float(part.split()[-1]) for part in line.split(",")]
        assert constant < limit < noisy < 1
