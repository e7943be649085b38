"""The challenge's metrics, how sure a score is, and its table (paper eq. 1, §4.2, Table 1). NumPy only.

    metrics.ccc(pred, target)                  two sequences (T,) -> one number
    metrics.class_f1(pred, target, classes=8)  class indices (T,) -> F1 of each class, the score is their mean
    metrics.binary_f1(pred, target)            0/1 arrays (T, K) -> F1 of each column, the score is their mean

After them come the same metrics from sums, the interval of a score, and the printed tables (docs/scores.md).
"""

from collections import namedtuple

import numpy as np

ROUNDS = 2000              # sets of videos that are drawn for an interval


def check(pred, target, dimensions: int, known: bool, expected: str):
    """Raises ValueError unless both have one shape, with so many dimensions, and their values are known."""
    if pred.ndim != dimensions or pred.shape != target.shape or not known:
        raise ValueError(f"expected two {expected}; got {pred.shape} and {target.shape}")


def ratio(top, bottom):
    """top / bottom, and 0 where a constant makes the bottom 0, up to rounding."""
    return top / np.where(bottom > 1e-12, bottom, np.inf)


def ccc(pred, target) -> float:
    """CCC(x, y) = 2 cov(x, y) / (σ_x² + σ_y² + (μ_x - μ_y)²) of two sequences (T,), eq. 1; population
    statistics. Two equal constants score 0. Raises ValueError for other shapes, NaN, infinity, and -5."""
    x, y = np.asarray(pred, dtype=np.float64), np.asarray(target, dtype=np.float64)
    known = np.isfinite(x).all() and np.isfinite(y).all() and not (y == -5).any()
    check(x, y, 1, known, "sequences of one length, without NaN, infinity, and frames labelled -5")
    mu_x, mu_y = x.mean(), y.mean()
    cov, var_x, var_y = ((x - mu_x) * (y - mu_y)).mean(), ((x - mu_x) ** 2).mean(), ((y - mu_y) ** 2).mean()
    return float(ratio(2 * cov, var_x + var_y + (mu_x - mu_y) ** 2))


def f1(tables) -> np.ndarray:
    """F1 = 2 P R / (P + R), precision P = TP / (TP + FP), recall R = TP / (TP + FN), of frames counted as
    [[TN, FP], [FN, TP]]: (..., 2, 2) -> (...). What never occurs and is never predicted scores 0."""
    FP, FN, TP = tables[..., 0, 1], tables[..., 1, 0], tables[..., 1, 1]
    return 2 * TP / np.maximum(2 * TP + FP + FN, 1)            # the same, without a division by P + R


def count_tables(said, there, valid) -> np.ndarray:
    """Frames [[TN, FP], [FN, TP]] of each column. Three bool (T, K) -> (K, 2, 2)"""
    cells = [~there & ~said, ~there & said, there & ~said, there & said]       # four of (T, K)
    return np.stack([(cell & valid).sum(axis=0) for cell in cells], axis=1).reshape(-1, 2, 2).astype(float)


def binary_f1(pred, target) -> np.ndarray:
    """F1 of each column of 0/1 arrays (T, K) -> (K,). Entries whose target is -1 are left out. Raises
    ValueError for other shapes and values."""
    pred, target = np.asarray(pred), np.asarray(target)
    known = np.isin(pred, (0, 1)).all() and np.isin(target, (-1, 0, 1)).all()
    check(pred, target, 2, known, "arrays (T, K) of 0 and 1, the threshold applied")
    return f1(count_tables(pred == 1, target == 1, target >= 0))


def class_f1(pred, target, classes: int = 8) -> np.ndarray:
    """F1 of each class from class indices (T,) -> (classes,). Raises ValueError for other shapes and for
    anything but the classes 0 to `classes` - 1."""
    pred, target = np.asarray(pred), np.asarray(target)
    known = np.isin(pred, range(classes)).all() and np.isin(target, range(classes)).all()
    check(pred, target, 1, known, f"sequences of classes 0 to {classes - 1}, without frames labelled -1")
    each = np.arange(classes)
    return binary_f1(pred[:, None] == each, target[:, None] == each)           # (T,) -> (T, classes)


# ---- The same from sums. Those of batches, videos and processes are added, and only then is the score taken

class Metric:
    """How a task is scored: `score(the sum of all count(...))`, one number for each of K outputs.

    count(outputs (T, K), target, valid) -> sums, float64; ValueError if an output is NaN or infinite
    score(sums)     (..., as counted) -> (..., K); the challenge takes their mean
    chance(sums)    -> (K,), the scores of the best constant prediction
    labelled(sums)  -> (K, 2), the labelled frames of each output, of how many labelled frames
    details(sums)   -> columns, each (K,), counts as whole numbers; `titles` names them, () by the outputs
    """


def finite(outputs) -> np.ndarray:
    """As float64. Raises ValueError if one is NaN, which would count as some class, or infinite."""
    outputs = np.asarray(outputs, dtype=np.float64)
    if not np.isfinite(outputs).all():
        raise ValueError("the model's outputs are not finite and cannot be scored")
    return outputs


class Concordance(Metric):
    """Sums (D, 6) over each dimension's valid frames: n, Σx, Σy, Σx², Σy², Σxy, where x is predicted."""
    name, titles = "CCC", ("label mean", "deviation", "prediction mean", "deviation", "Pearson's r")

    def count(self, outputs, target, valid):
        outputs, target, sums = finite(outputs), np.asarray(target, np.float64), []
        for d in range(outputs.shape[1]):
            x, y = outputs[valid[:, d], d], target[valid[:, d], d]
            sums.append([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
        return np.array(sums)

    def moments(self, sums):
        """μ_x, μ_y, σ_x², σ_y², cov(x, y): (..., D, 6) -> five (..., D)."""
        _, mu_x, mu_y, xx, yy, xy = np.moveaxis(sums, -1, 0) / np.maximum(sums[..., 0], 1)       # Σ / n
        return mu_x, mu_y, xx - mu_x ** 2, yy - mu_y ** 2, xy - mu_x * mu_y

    def score(self, sums):
        mu_x, mu_y, var_x, var_y, cov = self.moments(sums)
        return ratio(2 * cov, var_x + var_y + (mu_x - mu_y) ** 2)              # eq. 1, as in `ccc`

    def chance(self, sums):
        return np.zeros(len(sums))                             # a constant has no covariance with anything

    def labelled(self, sums):
        return sums[:, [0, 0]].astype(int)                     # each labelled frame has a value

    def details(self, sums):
        mu_x, mu_y, var_x, var_y, cov = self.moments(sums)     # these five numbers tell why a CCC is low
        sd_x, sd_y = np.sqrt(np.maximum(var_x, 0)), np.sqrt(np.maximum(var_y, 0))
        return [mu_y, sd_y, mu_x, sd_x, ratio(cov, sd_x * sd_y)]


class BinaryF1(Metric):
    """Sums (K, 2, 2), a confusion matrix [[TN, FP], [FN, TP]] per column, yes where the logit is above 0."""
    name, titles = "mean F1", ("TN", "FP", "FN", "TP", "precision", "recall")

    def count(self, outputs, target, valid):
        return count_tables(finite(outputs) > 0, np.asarray(target) > 0.5, valid)

    def tables(self, sums):
        """[[TN, FP], [FN, TP]] of each output: (..., K, 2, 2)."""
        return sums

    def score(self, sums):
        return f1(self.tables(sums))

    def chance(self, sums):
        labelled = sums.sum(axis=-1, keepdims=True)
        return max([self.score(labelled * k) for k in np.eye(sums.shape[-1])], key=np.mean)      # k: always k

    def labelled(self, sums):
        tables = self.tables(sums)
        return np.stack([tables[:, 1].sum(axis=1), tables.sum(axis=(1, 2))], axis=1).astype(int)

    def details(self, sums):
        TN, FP, FN, TP = sums.reshape(-1, 4).T.astype(int)
        return [TN, FP, FN, TP, TP / np.maximum(TP + FP, 1), TP / np.maximum(TP + FN, 1)]


class ClassF1(BinaryF1):
    """Sums (K, K), one confusion matrix: frames by (labelled, predicted) class. Target, valid are (T,)."""
    name, titles = "macro F1", ()

    def count(self, outputs, target, valid):
        predicted, sums = finite(outputs).argmax(axis=1), np.zeros((outputs.shape[1],) * 2)
        np.add.at(sums, (np.asarray(target)[valid].astype(int), predicted[valid]), 1)
        return sums

    def tables(self, sums):
        TP = np.diagonal(sums, axis1=-2, axis2=-1)             # (..., K), each class against all others
        FN, FP = sums.sum(axis=-1) - TP, sums.sum(axis=-2) - TP
        TN = sums.sum(axis=(-2, -1))[..., None] - TP - FN - FP
        return np.stack([TN, FP, FN, TP], axis=-1).reshape(*TP.shape, 2, 2)

    def details(self, sums):
        return list(sums.T.astype(int))


CCC, CLASS_F1, BINARY_F1 = Concordance(), ClassF1(), BinaryF1()


# ---- How sure a score is: a bootstrap over videos, because the frames of a video resemble each other

Interval = namedtuple("Interval", "value low high")            # a score, and the ends of its 95 % interval


def drawn_scores(sums: np.ndarray, metric: Metric) -> np.ndarray:
    """The scores of all videos, then of ROUNDS sets of as many, drawn with replacement: (videos, ...) ->
    (1 + ROUNDS, K). Each call draws the same sets. So two systems are compared on the same videos, and the
    interval of their difference is narrower than those of the two scores: both find the same videos hard."""
    videos = len(sums)
    times = np.random.default_rng(0).multinomial(videos, np.full(videos, 1 / videos), size=ROUNDS)
    drawn = np.tensordot(times, sums, axes=1)                  # (ROUNDS, videos) · (videos, ...)
    return np.concatenate([metric.score(sums.sum(axis=0))[None], metric.score(drawn)])


def around(scores: np.ndarray) -> Interval:
    """The first score, and the ends of the middle 95 % of the others (Efron's percentile interval)."""
    return Interval(float(scores[0]), *np.quantile(scores[1:], (0.025, 0.975)).tolist())


def interval(sums: np.ndarray, metric: Metric) -> list[Interval]:
    """The score of each output, and last their mean, with intervals. Shape: sums (videos, ...)."""
    scores = drawn_scores(sums, metric)
    return [around(column) for column in [*scores.T, scores.mean(axis=1)]]


def difference(ours: np.ndarray, theirs: np.ndarray, metric: Metric) -> Interval:
    """Our mean score less theirs, both averaged over seeds, on the same videos in the same order: both
    (seeds, videos, ...). The interval tells how sure the difference is for other videos, not for other
    seeds."""
    means = [np.mean([drawn_scores(sums, metric).mean(axis=1) for sums in system], axis=0)
             for system in (ours, theirs)]                     # two of (1 + ROUNDS,)
    return around(means[0] - means[1])


# ---- Tables. `task` is a record of labels.py, sums are (videos, ...)

def in_lines(head: str, names, columns) -> str:
    """A table as text: a line of titles, then a line per name. `columns`: title and cells of each; a cell is
    a text, a whole number, or a number that gets three decimals."""
    lines = [f"{name:10s}" for name in [head, *names]]
    for title, cells in columns:
        texts = [cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, (int, np.integer)) else
                 f"{cell:.3f}" for cell in (title, *cells)]
        width = max(map(len, texts)) + 2
        lines = [line + f"{text:>{width}s}" for line, text in zip(lines, texts, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def plain_table(metric: Metric, names, total: np.ndarray, sure=(), known=()) -> str:
    """Our scores and chance, a line per output and one of their mean; then which outputs no label has. Other
    columns stand after ours (`sure`) and after chance (`known`). Shape: `total` as counted."""
    scores, chance, there = metric.score(total), metric.chance(total), metric.labelled(total)[:, 0] > 0
    text = in_lines(metric.name, [*names, "mean"], [
        ("ours", [*scores, scores.mean()]), *sure, ("chance", [*chance, chance.mean()]), *known])
    others = f"; the mean of the others is {scores[there].mean():.3f}" if there.any() else ""
    gone = ", ".join(name for name, labelled in zip(names, there) if not labelled)
    return text + (f"\nnot among the labels, so 0 in the mean: {gone}{others}" if gone else "")


def score_table(task, sums: np.ndarray, unseen=None, fold: int = 0, comparable: bool = True) -> str:
    """A `plain_table` with intervals and labelled frames, at most 110 characters wide. unseen: mask
    (videos,), then the score of these videos alone stands beside. comparable: with the paper's numbers of
    this fold (Table 1) and, for fold 0, the challenge's baseline."""
    metric, total = task.metric, sums.sum(axis=0)
    ends = [f"[{low:.3f}, {high:.3f}]" if len(sums) > 1 else "-" for _, low, high in interval(sums, metric)]
    sure, known = [("95 %", ends)], []
    if unseen is not None:
        scores = metric.score(sums[unseen].sum(axis=0))
        sure.append(("unseen", [*scores, scores.mean()]))
    if comparable:
        paper = {name: folds[fold] for name, folds in task.paper.items()}
        for title, theirs in (("paper", paper), ("baseline", task.baseline if fold == 0 else {})):
            known.append((title, [theirs.get(name, "-") for name in [*task.outputs, "mean"]]))
    frames = [f"{part:,} of {whole:,}" if part < whole else part for part, whole in metric.labelled(total)]
    return plain_table(metric, task.outputs, total, sure, [*known, ("frames", [*frames, ""])])


def confusion(task, sums: np.ndarray) -> str:
    """What is taken for what: `details`. Of classes: frames by labelled (line) and predicted (column) one."""
    titles, details = task.metric.titles, task.metric.details(sums.sum(axis=0))
    return in_lines("" if titles else "label", task.outputs, zip(titles or task.outputs, details))


def numbers(task, sums: np.ndarray) -> dict:
    """The same for metrics.json. An interval is [low, high], or None if there is one video only; "frames" is
    what `labelled` gives; "confusion" has a list per output."""
    metric, total = task.metric, sums.sum(axis=0)
    scores, chance, frames = metric.score(total), metric.chance(total), metric.labelled(total)
    ends = [[low, high] if len(sums) > 1 else None for _, low, high in interval(sums, metric)]
    outputs = {name: {"interval": ends[k], "chance": float(chance[k]), "frames": frames[k].tolist()}
               for k, name in enumerate(task.outputs)}
    return {"metric": metric.name, "score": float(scores.mean()), "score_interval": ends[-1],
            **dict(zip(task.outputs, scores.tolist())), "chance": float(chance.mean()), "outputs": outputs,
            "confusion_columns": list(metric.titles or task.outputs),
            "confusion": [list(row) for row in zip(*[column.tolist() for column in metric.details(total)])]}
