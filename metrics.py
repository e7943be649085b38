"""The challenge's metrics from counts that add up: CCC and F1, of any number of classes (paper eq. 1, §4.2).

A metric is a function of sums over frames. The sums of batches, videos and processes are added, and only
then is the score taken. So every labelled frame counts once. NumPy only: this file scores any predictions.

    metrics.ccc(pred, target)                  two sequences (T,) -> one number
    metrics.class_f1(pred, target, classes=8)  class indices (T,) -> F1 of each class, the score is their mean
    metrics.binary_f1(pred, target)            0/1 arrays (T, K) -> F1 of each column, the score is their mean

    python metrics.py      # what constants and noisy copies of random labels score
    python metrics.py --task expr --predictions FILE --labels FOLDER      # scores a file (docs/scores.md)
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Metric(NamedTuple):
    """How a task is scored: `score(the sum of all count(...))`, one number per output."""
    name: str
    count: Callable            # outputs (T, K), target, valid -> sums, float64
    score: Callable            # sums -> scores (K,); the challenge takes their mean
    chance: Callable           # sums -> scores (K,) of the best constant prediction
    labelled: Callable         # sums -> (K, 2): labelled frames of this output, of how many labelled frames
    details: Callable          # sums -> columns, each (K,); counts are whole numbers
    titles: tuple              # of these columns; () = they are predictions of output 0, 1, ...


def finite(outputs) -> np.ndarray:
    """outputs as float64. Raises ValueError for NaN or infinity, which would count as some class."""
    outputs = np.asarray(outputs, dtype=np.float64)
    if not np.isfinite(outputs).all():
        raise ValueError("the model's outputs are not finite and cannot be scored")
    return outputs


# ---- CCC, for valence and arousal

def ccc_count(outputs, target, valid) -> np.ndarray:
    """n, Σx, Σy, Σx², Σy², Σxy of each dimension over its valid frames. Shape: three (T, D) -> (D, 6)."""
    outputs = finite(outputs)
    sums = np.zeros((outputs.shape[1], 6))
    for d in range(len(sums)):
        x = outputs[valid[:, d], d]
        y = np.asarray(target)[valid[:, d], d].astype(np.float64)
        sums[d] = len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()
    return sums


def ccc_score(sums) -> np.ndarray:
    """CCC(x, y) = 2 cov(x, y) / (σ_x² + σ_y² + (μ_x - μ_y)²) of each dimension (eq. 1): (D, 6) -> (D,).

    Population statistics (divided by N), as in the loss. Two equal constants, and no valid frame at all,
    score 0.
    """
    n, x, y, xx, yy, xy = sums.T                   # each (D,)
    n = np.maximum(n, 1)
    mu_x, mu_y = x / n, y / n
    var_x, var_y = xx / n - mu_x ** 2, yy / n - mu_y ** 2
    cov = xy / n - mu_x * mu_y
    bottom = var_x + var_y + (mu_x - mu_y) ** 2
    return 2 * cov / np.where(bottom > 1e-12, bottom, np.inf)


def ccc_chance(sums) -> np.ndarray:
    """A constant has no covariance with anything."""
    return np.zeros(len(sums))


def ccc_labelled(sums) -> np.ndarray:
    """Each labelled frame has a value of the dimension. Shape: (D, 6) -> (D, 2)."""
    return np.stack([sums[:, 0], sums[:, 0]], axis=1).astype(int)


def ccc_details(sums) -> list[np.ndarray]:
    """Mean and deviation of the labels, of the predictions, and Pearson's correlation. Five of (D,).

    CCC is the correlation times a factor, at most 1, that is lower the more mean and deviation differ. So
    these numbers tell why a CCC is low.
    """
    n, x, y, xx, yy, xy = sums.T                   # each (D,); x are the predictions, y the labels
    n = np.maximum(n, 1)
    mu_x, mu_y = x / n, y / n
    sd_x = np.sqrt(np.maximum(xx / n - mu_x ** 2, 0))
    sd_y = np.sqrt(np.maximum(yy / n - mu_y ** 2, 0))
    bottom = sd_x * sd_y
    return [mu_y, sd_y, mu_x, sd_x, (xy / n - mu_x * mu_y) / np.where(bottom > 1e-12, bottom, np.inf)]


# ---- F1 of classes, for expressions

def class_count(outputs, target, valid) -> np.ndarray:
    """Frames by (labelled class, predicted class). Logits (T, K), classes (T,), mask (T,) -> (K, K)."""
    predicted = finite(outputs).argmax(axis=1)
    classes = outputs.shape[1]
    sums = np.zeros((classes, classes))
    np.add.at(sums, (np.asarray(target)[valid].astype(int), predicted[valid]), 1)
    return sums


def f1(hit, labelled, predicted) -> np.ndarray:
    """F1 = 2 P R / (P + R), precision P = TP / (TP + FP), recall R = TP / (TP + FN).

    That is 2 TP / (2 TP + FP + FN), which needs no division by P + R.

    hit = TP, labelled = TP + FN, predicted = TP + FP. A class that neither occurs nor is predicted scores 0.
    """
    return 2 * hit / np.maximum(labelled + predicted, 1)


def class_score(sums) -> np.ndarray:
    """F1 of each class. Shape: (K, K) -> (K,)."""
    return f1(np.diag(sums), sums.sum(axis=1), sums.sum(axis=0))


def class_chance(sums) -> np.ndarray:
    """Always the most frequent class. Shape: (K, K) -> (K,)."""
    labelled = sums.sum(axis=1)
    constant = np.zeros_like(sums)
    constant[:, labelled.argmax()] = labelled
    return class_score(constant)


def class_labelled(sums) -> np.ndarray:
    """Frames labelled as the class, and as any. Shape: (K, K) -> (K, 2)."""
    return np.stack([sums.sum(axis=1), np.full(len(sums), sums.sum())], axis=1).astype(int)


def class_details(sums) -> list[np.ndarray]:
    """The confusion matrix: a column per predicted class, in it the frames of each labelled class."""
    return list(sums.T.astype(int))


# ---- F1 of yes or no, for action units

def binary_count(outputs, target, valid) -> np.ndarray:
    """True and false negatives and positives TN, FP, FN, TP of each column. Shape: three (T, K) -> (K, 4).

    Present is where sigmoid(logit) > 0.5, that is, where the logit is above 0.
    """
    said = finite(outputs) > 0
    labelled = np.asarray(target) > 0.5
    pairs = [~labelled & ~said, ~labelled & said, labelled & ~said, labelled & said]      # four of (T, K)
    return np.stack([(pair & valid).sum(axis=0) for pair in pairs], axis=1).astype(np.float64)


def binary_score(sums) -> np.ndarray:
    """F1 of each column. Shape: (K, 4) -> (K,)."""
    _, false_positive, false_negative, hit = sums.T
    return f1(hit, hit + false_negative, hit + false_positive)


def binary_chance(sums) -> np.ndarray:
    """Every column always present. Shape: (K, 4) -> (K,)."""
    labelled = sums[:, 2] + sums[:, 3]
    return f1(labelled, labelled, sums.sum(axis=1))


def binary_labelled(sums) -> np.ndarray:
    """Frames in which the column is labelled 1, and labelled at all. Shape: (K, 4) -> (K, 2)."""
    return np.stack([sums[:, 2] + sums[:, 3], sums.sum(axis=1)], axis=1).astype(int)


def binary_details(sums) -> list[np.ndarray]:
    """TN, FP, FN, TP, precision TP / (TP + FP) and recall TP / (TP + FN); 0 / 0 is 0. Six of (K,)."""
    _, false_positive, false_negative, hit = sums.T
    precision = hit / np.maximum(hit + false_positive, 1)
    recall = hit / np.maximum(hit + false_negative, 1)
    return [*sums.T.astype(int), precision, recall]


CCC = Metric("CCC", ccc_count, ccc_score, ccc_chance, ccc_labelled, ccc_details,
             ("label mean", "deviation", "prediction mean", "deviation", "Pearson's r"))
CLASS_F1 = Metric("macro F1", class_count, class_score, class_chance, class_labelled, class_details, ())
BINARY_F1 = Metric("mean F1", binary_count, binary_score, binary_chance, binary_labelled, binary_details,
                   ("TN", "FP", "FN", "TP", "precision", "recall"))


# ---- To be called alone

def ccc(pred, target) -> float:
    """Concordance correlation coefficient (eq. 1) of two sequences (T,). Leave out frames labelled -5.

    Raises ValueError for other shapes, NaN, infinity, and the code -5.
    """
    pred, target = np.asarray(pred, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if pred.ndim != 1 or pred.shape != target.shape:
        raise ValueError(f"expected two sequences of one length, got {pred.shape} and {target.shape}")
    if not np.isfinite(pred).all() or not np.isfinite(target).all() or (target == -5).any():
        raise ValueError("expected finite values, got NaN or infinity, or frames labelled -5 "
                         "(not annotated), which must be left out")
    x, y = pred - pred.mean(), target - target.mean()
    bottom = (x * x).mean() + (y * y).mean() + (pred.mean() - target.mean()) ** 2
    return float(2 * (x * y).mean() / bottom) if bottom > 1e-12 else 0.0


def class_f1(pred, target, classes: int = 8) -> np.ndarray:
    """F1 of each class from class indices (T,) -> (classes,). The score is their mean.

    Raises ValueError for other shapes and for anything but the classes 0 to `classes` - 1.
    """
    pred, target = np.asarray(pred), np.asarray(target)
    known = np.isin(pred, range(classes)).all() and np.isin(target, range(classes)).all()
    if pred.ndim != 1 or pred.shape != target.shape or not known:
        raise ValueError(f"expected two sequences of classes 0 to {classes - 1} of one length, "
                         f"got {pred.shape} and {target.shape}; leave out frames labelled -1")
    outputs = np.eye(classes)[pred.astype(int)]                                      # (T, classes), one-hot
    return class_score(class_count(outputs, target, np.ones(len(target), bool)))


def binary_f1(pred, target) -> np.ndarray:
    """F1 of each column of 0/1 arrays (T, K). Entries whose target is -1 are left out.

    The score is their mean. Raises ValueError for other shapes and values: apply the threshold first.
    """
    pred, target = np.asarray(pred), np.asarray(target)
    known = np.isin(pred, (0, 1)).all() and np.isin(target, (-1, 0, 1)).all()
    if pred.ndim != 2 or pred.shape != target.shape or not known:
        raise ValueError(f"expected two arrays (T, K) of 0 and 1, got {pred.shape} and {target.shape}; "
                         "apply the threshold first")
    return binary_score(binary_count(pred.astype(np.float64) - 0.5, target, target >= 0))


def demonstration():
    """What constants and noisy copies of random labels score."""
    rng = np.random.default_rng(0)
    path, noise = np.sin(np.arange(1000) / 50), rng.normal(0, 0.3, 1000)
    classes, units = rng.choice(8, 1000, p=[.3, .05, .05, .05, .2, .1, .05, .2]), rng.random((1000, 12)) < 0.2
    wrong = rng.random(1000) < 0.3
    noisy_classes = np.where(wrong, (classes + 1) % 8, classes)
    print(f"CCC       of a constant {ccc(np.zeros(1000), path):.3f}, "
          f"of the path with noise {ccc(path + noise, path):.3f}")
    print(f"macro F1  of the most frequent class {class_f1(np.zeros(1000, int), classes).mean():.3f}, "
          f"with 30 % of the frames wrong {class_f1(noisy_classes, classes).mean():.3f}")
    print(f"mean F1   of every action unit always on {binary_f1(np.ones_like(units), units).mean():.3f}, "
          f"with 30 % of the frames wrong {binary_f1(units ^ wrong[:, None], units).mean():.3f}")


if __name__ == "__main__":
    from labels import TASKS                               # which imports this file
    from prediction_files import score_file
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), help="which labels")
    parser.add_argument("--predictions", metavar="FILE", help="predict.py's CSV or .jsonl, or a submission")
    parser.add_argument("--labels", metavar="FOLDER",
                        help="Aff-Wild2's annotations (then its validation set), or label files <video>.txt")
    options = parser.parse_args()
    given = [options.task, options.predictions, options.labels]
    if not any(given):
        demonstration()
    elif not all(given):
        parser.error("a file is scored with --task, --predictions and --labels; give all three, or none")
    else:
        try:
            print(score_file(options.predictions, options.labels, TASKS[options.task]))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
