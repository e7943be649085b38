"""The challenge's metrics, exact over any number of processes, and the score of a trained model as a table (paper §4.2).

All labelled frames of all videos are pooled, each counted once. A frame that several segments cover gets the mean of their
outputs; the authors' published numbers count it several times.

    python evaluate.py --task au                  # score runs/demo/task_au/best.pt on the validation videos
    python evaluate.py --task va --config configs/paper.yaml --checkpoint somewhere/best.pt

Call the metrics alone:  evaluate.ccc(pred, target) · evaluate.expr_f1(pred, target) · evaluate.au_f1(pred, target)
"""

import dataclasses

import numpy as np
import torch

import pictures
import training
from config import from_command_line
from data import AUS, EXPRESSIONS, encoder_of, find_videos, frame_numbers, frame_path, open_videos, read_features, segments, split, targets
from images import read_image, resize
from temporal import OUTPUTS, SegmentModel

NAMES = {"va": ("valence", "arousal"), "expr": EXPRESSIONS, "au": AUS}
METRIC = {"va": "CCC", "expr": "macro F1", "au": "mean F1"}
# Validation set, official split: the paper's Table 1 (fold 0) and the challenge's baseline, beside it.
PAPER = {"va": {"valence": 0.5385, "arousal": 0.6224, "mean": 0.5805}, "expr": {"mean": 0.4561}, "au": {"mean": 0.5762}}
BASELINE = {"va": {"valence": 0.24, "arousal": 0.20, "mean": 0.22}, "expr": {"mean": 0.23}, "au": {"mean": 0.39}}


# ------------------------------------------------------------------------------------------------------------ metrics

class Tally:
    """The sums that a metric is a function of: add them up over batches and processes, then call `scores` once.

    va: (2, 6) count, Σx, Σy, Σx², Σy², Σxy of each dimension; expr: (8, 8) frames by (label, prediction); au: (12, 4) frames by
    2·label + prediction. float64, exact to far below what is reported.
    """

    def __init__(self, task: str):
        self.task, self.sums = task, np.zeros({"va": (2, 6), "expr": (8, 8), "au": (12, 4)}[task])

    def add(self, outputs, labels):
        """outputs (T, K) of the model: values or logits; labels (T, 2), (T,) or (T, 12) with their invalid codes.

        Raises ValueError for an output that is NaN or infinite, which would count as one class or another.
        """
        outputs, labels = np.asarray(outputs, dtype=np.float64), np.asarray(labels)
        if not np.isfinite(outputs).all():
            raise ValueError("the model's outputs are not finite and cannot be scored")
        target, valid = targets(labels, self.task)
        if self.task == "va":
            for d in range(2):
                x, y = outputs[valid[:, d], d], target[valid[:, d], d].astype(np.float64)
                self.sums[d] += len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()
        elif self.task == "expr":
            np.add.at(self.sums, (target[valid], outputs[valid].argmax(axis=1)), 1)
        else:
            for k in range(12):       # an AU is present where sigmoid(logit) > 0.5, that is, logit > 0
                self.sums[k] += np.bincount((2 * target[valid[:, k], k] + (outputs[valid[:, k], k] > 0)).astype(int), minlength=4)


def scores(task: str, sums) -> np.ndarray:
    """CCC of valence and arousal (2,), F1 per expression (8,) or F1 per AU (12,) from a Tally's sums.

    A CCC of two equal constants is 0, and so is the F1 of a class that neither occurs nor is predicted.
    """
    if task == "va":
        n, x, y, xx, yy, xy = np.maximum(sums[:, 0], 1), *sums[:, 1:].T
        var_x, var_y, cov = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - x * y / n ** 2
        bottom = var_x + var_y + (x / n - y / n) ** 2                      # population statistics, as in the loss
        return 2 * cov / np.where(bottom > 1e-12, bottom, np.inf)
    if task == "expr":
        hit, labelled, predicted = np.diag(sums), sums.sum(axis=1), sums.sum(axis=0)
    else:
        hit, labelled, predicted = sums[:, 3], sums[:, 2] + sums[:, 3], sums[:, 1] + sums[:, 3]
    return 2 * hit / np.maximum(labelled + predicted, 1)                   # F1 = 2 TP / (2 TP + FN + FP)


def ccc(pred, target) -> float:
    """Concordance correlation coefficient (eq. 1) of two sequences (T,), with population statistics."""
    pred, target = np.asarray(pred, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if pred.ndim != 1 or pred.shape != target.shape:
        raise ValueError(f"expected two sequences of one length, got {pred.shape} and {target.shape}")
    if not np.isfinite(pred).all() or not np.isfinite(target).all() or (target == -5).any():
        raise ValueError("expected finite values, got NaN or infinity, or frames labelled -5 (not annotated); leave those out")
    x, y = pred - pred.mean(), target - target.mean()
    bottom = (x * x).mean() + (y * y).mean() + (pred.mean() - target.mean()) ** 2
    return float(2 * (x * y).mean() / bottom) if bottom > 1e-12 else 0.0


def expr_f1(pred, target) -> np.ndarray:
    """F1 of each of the 8 expressions from class indices (T,); leave out frames labelled -1. The score is their mean."""
    pred, target = np.asarray(pred), np.asarray(target)
    if pred.ndim != 1 or pred.shape != target.shape or not np.isin(pred, range(8)).all() or not np.isin(target, range(8)).all():
        raise ValueError(f"expected two sequences of classes 0 to 7 of one length, got {pred.shape} and {target.shape}; "
                         "leave out frames labelled -1")
    sums = np.zeros((8, 8))
    np.add.at(sums, (target.astype(int), pred.astype(int)), 1)
    return scores("expr", sums)


def au_f1(pred, target) -> np.ndarray:
    """Binary F1 of each of the 12 AUs from 0/1 arrays (T, 12); entries whose target is -1 are left out. The score is their mean."""
    pred, target = np.asarray(pred), np.asarray(target)
    if pred.shape != target.shape or pred.shape[1:] != (12,) or not np.isin(pred, (0, 1)).all() or not np.isin(target, (-1, 0, 1)).all():
        raise ValueError(f"expected two arrays (T, 12) of 0 and 1, got {pred.shape} and {target.shape}; apply the threshold first")
    tally = Tally("au")
    tally.add(pred - 0.5, target)
    return scores("au", tally.sums)


def chance(task: str, sums) -> np.ndarray:
    """What the best constant prediction scores: any constant for VA, the most frequent expression, every AU always on."""
    if task == "va":
        return np.zeros(2)
    constant = np.zeros_like(sums)
    if task == "expr":
        constant[:, sums.sum(axis=1).argmax()] = sums.sum(axis=1)
    else:
        constant[:, 1], constant[:, 3] = sums[:, 0] + sums[:, 1], sums[:, 2] + sums[:, 3]
    return scores(task, constant)


# --------------------------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(model, video, config, team) -> np.ndarray:
    """The model's outputs for one whole video, float32 (T, K): overlapping segments averaged per frame.

    The segments of a video are its batches, whatever the number of processes, so the result does not depend on it.
    """
    n, w = len(video.labels), config.segments.window
    parts = segments(n, w, config.segments.stride)
    total, count = 0.0, np.zeros((n, 1), np.float32)
    for first in range(0, len(parts), config.task.batch):
        batch = parts[first:first + config.task.batch]
        x = torch.zeros(len(batch), w, model.dim)
        valid = torch.zeros(len(batch), w, dtype=torch.bool)
        for row, (start, end) in enumerate(batch):
            x[row, :end - start] = torch.from_numpy(read_features(video.features, start, end))
            valid[row, :end - start] = True
        with team.autocast():
            y = model(x.to(team.device), valid.to(team.device)).float().cpu().numpy()
        if first == 0:
            total = np.zeros((n, y.shape[-1]), np.float32)
        for row, (start, end) in enumerate(batch):
            total[start:end] += y[row, :end - start]
            count[start:end] += 1
    return total / count


def score(model, videos, task, config, team) -> np.ndarray:
    """The sums of `Tally` over the videos, each scored by one process: longest first, so that none is late."""
    tally = Tally(task)
    model.eval()
    for video in sorted(videos, key=lambda v: (-len(v.labels), v.name))[team.rank::team.world]:
        tally.add(predict(model, video, config, team), video.labels)
    model.train()
    return team.sum(tally.sums)


def table(task: str, sums, title: str) -> str:
    """The score of each class, AU or dimension beside chance, and their mean beside the paper's and the baseline's."""
    ours, guess = scores(task, sums), chance(task, sums)
    lines = [title, f"{METRIC[task]:14s}{'ours':>8s}{'chance':>8s}{'paper':>8s}{'baseline':>10s}"]
    for name, a, b in [*zip(NAMES[task], ours, guess), ("mean", ours.mean(), guess.mean())]:
        paper, baseline = PAPER[task].get(name), BASELINE[task].get(name)
        lines.append(f"{name:14s}{a:8.3f}{b:8.3f}" + (f"{paper:8.3f}{baseline:10.3f}" if paper else f"{'-':>8s}{'-':>10s}"))
    return "\n".join(lines)


def draw_timeline(model, videos, task, config, team, path, longest: int = 600):
    """timeline.png: one validation video from frames to predictions, at most its first `longest` frames. Rank 0 only."""
    if team.rank:
        return
    model.eval()
    video = max(videos, key=lambda v: min(int(targets(v.labels, task)[1].sum()), longest * v.labels[0].size))
    n = min(len(video.labels), longest)
    outputs, (target, valid) = predict(model, video, config, team)[:n], targets(video.labels[:n], task)
    faces = []
    try:
        folder = find_videos(config.data.frames)[video.name]
        numbers = [number for number in frame_numbers(folder) if number <= n]
        for i in np.linspace(0, len(numbers) - 1, min(11, len(numbers))).astype(int):
            faces.append(resize(read_image(frame_path(folder, numbers[i])), (112, 112)))
    except (ValueError, KeyError, OSError):
        pass            # features are enough to score: the frames may lie on another machine, and then the picture lacks them
    pictures.timeline(task, NAMES[task], faces, read_features(video.features, 0, n).astype(np.float32),
                      segments(n, config.segments.window, config.segments.stride), np.where(valid, target, np.nan), outputs, path)


def load_model(checkpoint, config, task: str, dim: int, encoder: int | None, team) -> SegmentModel:
    """The segment model of a checkpoint, for features (frames, `dim`) of the encoder with checksum `encoder`.

    Raises ValueError if it is of another task or other sizes (names and shapes listed), or was trained on another encoder's features.
    """
    saved = training.read_checkpoint(checkpoint)
    if saved.get("task", task) != task:
        raise ValueError(f"{checkpoint}: trained for --task {saved['task']}, not {task}")
    known = saved.get("encoder checksum")
    if known and encoder and known != encoder:
        raise ValueError(f"{checkpoint}: trained on features of another encoder (checksum {known}, not {encoder}), "
                         "which mean something else; give the features it was trained on, --set task.features=...")
    model = SegmentModel(dim, OUTPUTS[task], **dataclasses.asdict(config.temporal))
    training.load_weights(model, saved.get("model", saved), checkpoint)
    return model.to(team.device)


def report(model, videos, without, task, config, team, checkpoint) -> np.ndarray:
    """Score the model on whole videos and print the table. Returns the scores, as `scores` does."""
    sums = score(model, videos, task, config, team)
    frames = sum(len(v.labels) for v in videos)
    data = "drawn data; the paper's and the baseline's numbers are on Aff-Wild2" if config.data.drawn else "Aff-Wild2"
    team.say("\n" + table(task, sums, f"{checkpoint}\n{len(videos)} validation videos, {frames:,} frames ({data})"))
    if without:
        team.say(f"left out, no features: {', '.join(without)}")
    return scores(task, sums)


def main(config, team, task, checkpoint):
    """Score `checkpoint`, or this configuration's best.pt, on the validation videos."""
    import train_task                                     # it imports this file for its validation
    features = train_task.features_folder(config, team)
    stage = train_task.stage(config, task)
    path = checkpoint or config.folder(stage) / "best.pt"
    if not checkpoint:
        training.provide(config, team, "" if (path.parent / "metrics.json").exists() else path, lambda c, t: train_task.main(c, t, task),
                         f"python train_task.py --task {task}", train_task.DEMO_SECONDS)
    videos, without, dim = open_videos(split(config.data.labels, task, config.task.fold)[1], features, task)
    report(load_model(path, config, task, dim, encoder_of(features), team), videos, without, task, config, team, path)


if __name__ == "__main__":
    config, options = from_command_line(__doc__, task={"choices": list(OUTPUTS), "required": True, "help": "which labels"},
                                        checkpoint={"default": "", "metavar": "FILE", "help": "default: this configuration's best.pt"})
    training.launch(main, config, options.task, options.checkpoint)
