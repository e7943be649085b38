"""The table of a score: each output, its 95 % interval, chance, frames, the paper's numbers (paper Table 1).

All of it comes from the sums of `metrics.py`, kept for each video, (videos, ...): their total gives the
scores, and drawing videos gives the intervals (`intervals.py`). NumPy only. docs/scores.md explains the
columns.

    python score_table.py      # both tables of made-up predictions of 20 videos, for each task
"""

import numpy as np

from intervals import interval
from labels import TASKS, Task, targets
from metrics import class_chance, class_score


def in_lines(head: str, names, columns: list[list[str]]) -> str:
    """A table as text: a line of titles, then a line per name. `columns`: title and cells of each."""
    lines = [f"{name:10s}" for name in [head, *names]]
    for column in columns:
        width = max(map(len, column)) + 2
        lines = [line + f"{cell:>{width}s}" for line, cell in zip(lines, column)]
    return "\n".join(line.rstrip() for line in lines)


def score_table(task: Task, sums: np.ndarray, unseen=None, fold: int = 0, comparable: bool = True) -> str:
    """A line per output and one of their mean, at most 110 characters wide. Shape: sums (videos, ...).

    unseen: mask (videos,), then the score of these videos alone stands beside. comparable: with the paper's
    numbers of this fold (Table 1) and, for fold 0, the challenge's baseline.
    """
    total, names = sums.sum(axis=0), [*task.outputs, "mean"]

    def with_mean(scores):
        return [f"{score:.3f}" for score in [*scores, scores.mean()]]

    def known(numbers):
        return ["-" if number is None else f"{number:.3f}" for number in numbers]

    columns = [["ours", *with_mean(task.metric.score(total))],
               ["95 %", *[f"[{i.low:.3f}, {i.high:.3f}]" if len(sums) > 1 else "-"
                          for i in interval(sums, task.metric)]]]
    if unseen is not None:
        columns += [["unseen", *with_mean(task.metric.score(sums[unseen].sum(axis=0)))]]
    columns += [["chance", *with_mean(task.metric.chance(total))]]
    if comparable:
        columns += [["paper", *known(task.paper[name][fold] if name in task.paper else None
                                     for name in names)],
                    ["baseline", *known(task.baseline.get(name) if fold == 0 else None for name in names)]]
    columns += [["frames", *[f"{part:,}" if part == whole else f"{part:,} of {whole:,}"
                             for part, whole in task.metric.labelled(total)], ""]]
    return in_lines(task.metric.name, names, columns)


def class_table(names, sums: np.ndarray) -> str:
    """F1 of classes beside chance, where images belong to no videos. Shape: sums (K, K)"""
    columns = [[title, *[f"{score:.3f}" for score in [*scores, scores.mean()]]]
               for title, scores in (("ours", class_score(sums)), ("chance", class_chance(sums)))]
    return in_lines("macro F1", [*names, "mean"], columns)


def confusion(task: Task, sums: np.ndarray) -> str:
    """What is taken for what. Shape: sums (videos, ...).

    VA: mean and deviation of labels and predictions, Pearson's correlation; Expr: frames by labelled (line)
    and predicted class (column); AU: true and false negatives and positives, precision, recall.
    """
    columns = [[title, *[f"{cell:,}" if column.dtype.kind == "i" else f"{cell:.3f}" for cell in column]]
               for title, column in zip(task.metric.titles or task.outputs,
                                        task.metric.details(sums.sum(axis=0)))]
    return in_lines("" if task.metric.titles else "label", task.outputs, columns)


def numbers(task: Task, sums: np.ndarray) -> dict:
    """The same for metrics.json. Shape: sums (videos, ...). An interval is [low, high], or None if there is
    one video only; "frames" is what `Metric.labelled` gives; "confusion" has a list per output."""
    metric, total = task.metric, sums.sum(axis=0)
    scores, chance, frames = metric.score(total), metric.chance(total), metric.labelled(total)
    intervals = [[i.low, i.high] if len(sums) > 1 else None for i in interval(sums, metric)]
    outputs = {name: {"interval": intervals[k], "chance": float(chance[k]), "frames": frames[k].tolist()}
               for k, name in enumerate(task.outputs)}
    return {"metric": metric.name, "score": float(scores.mean()), "score_interval": intervals[-1],
            **dict(zip(task.outputs, scores.tolist())), "chance": float(chance.mean()), "outputs": outputs,
            "confusion_columns": list(metric.titles or task.outputs),
            "confusion": [list(row) for row in zip(*[column.tolist() for column in metric.details(total)])]}


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for task in TASKS.values():
        sums, K = [], len(task.outputs)
        for frames in rng.integers(100, 2000, 20):
            hidden = rng.normal(0, 0.3, (frames, K)) + rng.normal(0, 0.2, K)
            labels = {"va": hidden.clip(-1, 1), "expr": hidden.argmax(axis=1), "au": hidden > 0.2}[task.name]
            outputs = hidden - (0.2 if task.name == "au" else 0) + rng.normal(0, 0.2, (frames, K))
            sums.append(task.metric.count(outputs, *targets(labels, task)))
        print(score_table(task, np.stack(sums)), confusion(task, np.stack(sums)), sep="\n\n", end="\n\n\n")
