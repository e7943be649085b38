"""Whole videos: predicted by segments, scored with each labelled frame once (paper §4.2, Table 1). And what
is scored on single images.

A frame that several segments cover gets the mean of their outputs; the authors' published numbers count it
several times. The outputs are scored as they are, unless evaluate.py is asked to tune: without the clipping
and the mode filter of the authors' code.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler

from data import Images, Video, noface_path, pad, read_features, segments
from engine.checkpoints import find_weights, load_vit, load_weights, read_checkpoint
from engine.config import Config
from engine.distributed import Team, all_sum
from engine.training import loader
from images import normalise
from labels import EXPR, TASKS, Task, for_metric, in_units, scene, smoothed, targets
from metrics import CLASS_F1, plain_table, score_table
from pictures import curves
from pipeline import find_input, identity, like, named, tuned_on
from temporal import SegmentModel
from vit import VisionTransformer

HELD_OUT = "held-out videos"                 # where a record names the videos of task.held_out
# The first layer of a segment model: of the TCN; without one, of the Transformer; without both, of the head.
FIRST_WEIGHTS = ("tcn.levels.0.conv1.conv.parametrizations.weight.original1", "transformer.project.weight",
                 "head.0.weight")
SMOOTH = (0, 1, 2, 5, 10, 20, 50)            # frames before and after, tried by `tuned`
THRESHOLDS = sorted((round(0.05 * i, 2) for i in range(1, 20)), key=lambda threshold: abs(threshold - 0.5))


# ---- Single images

class ExprClassifier(nn.Module):
    """ViT -> one feature per face -> fully connected layers -> 8 logits: (B, 3, H, W) -> (B, 8)."""

    def __init__(self, vit: VisionTransformer, token: str, hidden: int, dropout: float):
        super().__init__()
        self.vit, self.token = vit, token
        dim, classes = vit.norm.normalized_shape[0], len(EXPR.outputs)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout),
                                  nn.Linear(hidden, classes))

    def forward(self, images):
        return self.head(self.vit.features(images, self.token))        # (B, 3, H, W) -> (B, D) -> (B, 8)


def expr_classifier(config: Config) -> ExprClassifier:
    """The classifier of a configuration, with random weights: what is fine-tuned (§3.1)."""
    f = config.finetune
    vit = VisionTransformer(**dataclasses.asdict(config.vit), drop_path=f.drop_path)
    return ExprClassifier(vit, f.token, f.hidden, f.dropout)


def batches_of(images: Images, rows, config: Config, team: Team):
    """Batches of these rows of a dataset, to go over without training."""
    batches = BatchSampler(rows, config.features.batch, drop_last=False)
    return loader(images, batches, config.run.workers, team)


@torch.no_grad()
def count_images(network, images: Images, sums, add, config: Config, team: Team, run=None):
    """`sums` over all images and processes, NumPy (...), and how many images could not be read.

    `network`, in evaluation mode: normalised images (B, 3, height, width) -> outputs (B, K). `add(sums,
    outputs, *columns)` adds those of a batch and of the columns of `images`, all NumPy. Each image is read by
    one process. `run`: a training, which may be asked to stop. Raises ValueError if none can be read.
    """
    mine = range(team.rank, len(images), team.world)
    readable, batches = 0, batches_of(images, mine, config, team)
    for x, *columns in run.unless_stopped(batches) if run else batches:
        with team.autocast():
            outputs = network(normalise(x.to(team.device, non_blocking=True)))
        add(sums, outputs.float().cpu().numpy(), *[column.numpy() for column in columns])
        readable += len(x)
    if run:
        run.obey_signals()
    readable = int(all_sum(torch.tensor(readable)))
    if not readable:
        raise ValueError(f"none of {len(images):,} images can be scored, such as {images.files.where(0)}")
    return all_sum(torch.from_numpy(sums)).numpy(), len(images) - readable


def count_classes(network, images: Images, classes: int, config: Config, team: Team, run=None):
    """As `count_images`: the images by (label, predicted class), (classes, classes). The column of `images`
    is the class."""
    def add(sums, scores, labels):
        sums += CLASS_F1.count(scores, labels, labels >= 0)
    return count_images(network, images, np.zeros((classes, classes)), add, config, team, run)


def finish_classes(run, network, images: Images, names, config: Config, team: Team, zero_loss: float):
    """The end of a training on classes `names`: the best epoch's weights on all `images`, curves.png with the
    loss of outputs that are all 0, metrics.json, and a table."""
    run.load_best()
    run.model.eval()
    sums, unreadable = count_classes(network, images, len(names), config, team)
    f1, chance = CLASS_F1.score(sums), CLASS_F1.chance(sums).mean()
    if team.rank == 0:
        curves(run.folder, {"loss": zero_loss, "val_f1": chance})
    run.finish({"metric": CLASS_F1.name, "score": f1.mean(), **dict(zip(names, f1.tolist())),
                "chance": chance, "confusion": sums.tolist(), "val_images": int(sums.sum()),
                "val_unreadable": unreadable})
    team.say(f"\n{int(sums.sum()):,} single validation images ({unreadable:,} more cannot be read)\n"
             f"{plain_table(CLASS_F1, names, sums)}\nwritten to {run.folder}")


def extractor(config: Config, team: Team) -> tuple[VisionTransformer, dict, str]:
    """The ViT that gives the features, on the device; its record; what is to be said of it. Raises ValueError
    if its checkpoint is missing or does not fit, also if its training used another token than finetune.token.
    """
    path, record = find_input(config, team, "features.checkpoint")
    vit = VisionTransformer(**dataclasses.asdict(config.vit))
    said, stage, token = load_vit(vit, path), record.get("stage"), config.finetune.token
    trained = "cls" if stage in ("emma", "cotex") else record.get("settings", {}).get("finetune.token", token)
    if trained != token:
        raise ValueError(f"{path}: of stage {stage}, which trained its {trained} token; give --set "
                         f"finetune.token={trained}")
    return vit.to(team.device).eval(), record, said


def check_finite(outputs, source: str):
    """Raises ValueError if outputs of the checkpoint `source` are NaN or infinite; so none is written."""
    if not np.isfinite(outputs).all():
        raise ValueError(f"{source}: its outputs are not finite, or too large for {outputs.dtype}; use one "
                         "of a training that has not diverged")


@torch.no_grad()
def each_frame(network, source: str, frames, length: int, width: int, dtype, config: Config, team: Team,
               progress):
    """What a network gives for each frame of one video of `length` frames, every frame by itself.
    -> outputs of `dtype` (PyTorch's) as NumPy (T, width), noface bool (T,): True where there was no readable
    face image. Row i belongs to frame i + 1. Raises ValueError if an output is NaN or infinite.

    network: images (B, 3, height, width) -> (B, width); source: its checkpoint. frames: images.VideoFrames. A
    frame without a face has the outputs of the frame before it; at the start, of the first that has one.
    Without any face, all outputs are 0. `progress` (training.Progress) counts the frames.
    """
    noface, outputs = np.ones(length, bool), torch.zeros(length, width, dtype=dtype).numpy()
    images = Images(frames, config.vit.image_size, [frames.numbers - 1])
    for x, rows in batches_of(images, range(len(frames)), config, team):
        if len(rows):
            with team.autocast():
                of_batch = network(normalise(x.to(team.device, non_blocking=True)))         # (B, width)
            outputs[rows] = of_batch.to(dtype).cpu().numpy()
            check_finite(outputs[rows], source)
            noface[rows] = False
        progress.add(len(rows))
    progress.add(length - int((~noface).sum()))                      # the frames without a readable image
    if not noface.all():
        # The last frame with a face up to each frame; before the first one, the first one.
        last = np.maximum.accumulate(np.where(noface, -1, np.arange(length)))
        outputs = outputs[np.where(last < 0, np.argmin(noface), last)]
    return outputs, noface


def video_features(vit, frames, length: int, config: Config, team: Team, progress):
    """The features of one video of `length` frames, by `each_frame`. -> float16 (T, D), noface bool (T,)"""
    def network(images):
        return vit.features(images, config.finetune.token)
    return each_frame(network, vit.source, frames, length, config.vit.dim, torch.float16, config, team,
                      progress)


# ---- Whole videos

@torch.no_grad()
def predict(model, features: np.ndarray, window: int, stride: int, batch: int, team: Team) -> np.ndarray:
    """The model's outputs for one whole video, the mean where segments overlap: (T, D) -> float32 (T, K).

    The segments of a video are its batches, whatever the number of processes, so the result does not depend
    on it.
    """
    cut, outputs = segments(len(features), window, stride), []
    for first in range(0, len(cut), batch):
        part = cut[first:first + batch]
        x = np.stack([pad(features[start:end], window) for start, end in part])             # (B, w, D)
        real = np.stack([pad(np.ones(end - start, bool), window) for start, end in part])   # (B, w)
        x, real = torch.from_numpy(x).to(team.device).float(), torch.from_numpy(real).to(team.device)
        with team.autocast():
            outputs.extend(model(x, real).float().cpu().numpy())                             # B times (w, K)
    total = np.zeros((len(features), outputs[0].shape[-1]), np.float32)
    count = np.zeros((len(features), 1), np.float32)
    for (start, end), y in zip(cut, outputs):
        total[start:end] += y[:end - start]
        count[start:end] += 1
    return total / count


def shared_out(videos: list[Video], team: Team) -> list[Video]:
    """This process's videos: longest first, so that no process waits long for another's last one."""
    return sorted(videos, key=lambda video: (-len(video.labels), video.name))[team.rank::team.world]


def predict_videos(model, videos, s, batch: int, team: Team) -> dict[str, np.ndarray]:
    """{video: outputs (T, K)} of some labelled videos. `s`: the section `segments`."""
    model.eval()
    return {video.name: predict(model, read_features(video.features, 0, len(video.labels)), s.window,
                                s.stride, batch, team) for video in videos}


def sums_of(outputs: dict[str, np.ndarray], videos: list[Video], task: Task, team: Team,
            change=lambda outputs: outputs) -> np.ndarray:
    """The sums of the task's metric for each of `videos`: (videos, ...). `outputs`: of those that this
    process has predicted; `change` makes of a video's what is scored."""
    mine = {video.name: task.metric.count(change(outputs[video.name]), *targets(video.labels, task))
            for video in videos if video.name in outputs}
    sums = {name: of_video for part in team.gather(mine) for name, of_video in part.items()}
    return np.stack([sums[video.name] for video in videos])


def read_predictions(path) -> dict[str, np.ndarray]:
    """{video: a model's outputs (T, K)} of predictions.npz. Raises ValueError naming a file that is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:                         # a damaged archive can raise anything
        raise ValueError(f"{path}: not the predictions that a training has written ({error})") from None


# ---- Checkpoints

class Trained(NamedTuple):
    """A segment model with what its checkpoint carries: enough to predict, without the run that made it."""
    task: Task
    model: SegmentModel
    config: Config            # with the settings that the model was trained with
    team: Team
    record: dict | None       # what it was made of (pipeline.py); None if the checkpoint does not tell
    changed: dict             # {setting: (stage, was, now)} of those that differ from the given configuration

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The outputs for one whole video, as its features lie on disk: float16 (T, D) -> float32 (T, K).

        VA: valence and arousal. Expr, AU: logits; `labels.in_units` makes them probabilities. Raises
        ValueError for features of another shape or width, and for NaN and infinity.
        """
        dim = self.model.dim
        if np.ndim(features) != 2 or len(features) == 0 or features.shape[1] != dim:
            raise ValueError(f"expected the features of a video, (T, {dim}), got {np.shape(features)}")
        if not np.isfinite(features).all():
            raise ValueError("the features hold NaN or infinity; extract them again")
        s = self.config.segments
        outputs = predict(self.model, features, s.window, s.stride, self.config.task.batch, self.team)
        check_finite(outputs, self.model.source)
        return outputs


def load(path, config: Config | None = None, task: Task | None = None, team: Team | None = None) -> Trained:
    """The segment model of a checkpoint, rebuilt from it alone: its settings and sizes are in it.

    `config` says what the checkpoint does not (run.device), and all that a checkpoint without a record lacks.
    Raises ValueError if it is no whole checkpoint, of another task than `task`, made with other settings than
    those given with --set, or if its weights do not fit (names and shapes are listed).
    """
    saved = read_checkpoint(path)
    record = saved.get("made_of")
    if record is None and (config is None or task is None):
        raise ValueError(f"{path}: does not tell what it was made of; give its configuration and its task")
    if record is not None:
        stage = record["stage"].partition("_fold")[0]                   # in older ones: task_au_fold1
        fitting = [each for each in TASKS.values() if stage == f"task_{each.name}" and task in (None, each)]
        if not fitting:
            raise ValueError(f"{path}: of stage {record['stage']}, not a segment model"
                             + (f" for --task {task.name}" if task else ""))
        task = fitting[0]
    config, changed = like(record, config or Config(), path)
    team = team or Team(0, 1, torch.device("cpu"))
    weights, _ = find_weights(saved, FIRST_WEIGHTS, path)
    width = next((weights[name].shape[1] for name in FIRST_WEIGHTS if name in weights), 1)
    model = SegmentModel(width, len(task.outputs), **dataclasses.asdict(config.temporal))
    load_weights(model, weights, path)
    return Trained(task, model.to(team.device).eval(), config, team, record, changed)


def find_features(config: Config, team: Team) -> tuple[Path, dict]:
    """The folder of features that a task is trained and scored on, and its record.

    Raises ValueError if it is not made, or does not fit the settings.
    """
    path, record = find_input(config, team, "task.features")
    return (path if config.task.features else path.parent), record


def check_features(path, record: dict | None, features_record: dict):
    """Raises ValueError if a checkpoint was trained on features of another ViT than these. One without a
    record cannot be checked."""
    if record is not None and identity(record["from"]) != identity(features_record):
        raise ValueError(f"{path}: trained on features of another ViT, {named(record['from'])}, not "
                         f"{named(features_record)}, which mean something else; give those it was trained "
                         "on, --set task.features=..., or their ViT, --set features.checkpoint=...")


def check_scenes(path, record: dict | None, videos):
    """Raises ValueError if a checkpoint was trained on scenes that would be scored."""
    data = record["data"] if record else {}
    trained = {scene(name) for name in data.get("training videos", []) + data.get(HELD_OUT, [])}
    known = [video.name for video in videos if scene(video.name) in trained]
    if known:
        raise ValueError(f"{path}: trained on {len(known)} of the {len(videos)} videos that would be scored "
                         f"({', '.join(known[:5])}); give the labels that it was trained with")


# ---- What is said of a score

class Scored(NamedTuple):
    """The videos that are scored, and what their score can be compared with."""
    videos: list[Video]
    left_out: dict[str, str]     # {video: why it is not scored}
    unseen: np.ndarray           # (videos,) bool: the ViT was not fine-tuned on this video's scene
    data: str                    # what the report calls the data
    comparable: bool             # with the paper's and the baseline's numbers

    def seen_text(self) -> str:
        """Why the score may be too high; "" if it is not."""
        seen = int((~self.unseen).sum())
        text = f"{seen} of these {len(self.videos)} videos show scenes on which the ViT was fine-tuned"
        return text if seen else ""


def to_score(videos, left_out, other_videos, task: Task, origin: dict | None, config: Config) -> Scored:
    """`videos` of the validation set, `other_videos` of the training set; `origin`: the features' record.

    The paper's numbers stand beside a score only on synthetic data, which says so, and on a complete copy of
    Aff-Wild2.
    """
    seen = {scene(name) for name in tuned_on(origin)}
    unseen = np.array([scene(video.name) not in seen for video in videos], bool)
    if config.data.synthetic:
        return Scored(videos, left_out, unseen, "synthetic data; the paper's and the baseline's numbers are "
                      "on Aff-Wild2", True)
    found, whole = sum(labelled_faces(video, task) for video in [*videos, *other_videos]), task.labelled_faces
    if abs(found - whole) <= 0.01 * whole:
        return Scored(videos, left_out, unseen, "Aff-Wild2", True)
    return Scored(videos, left_out, unseen, f"{found:,} labelled frames with a face in both sets, a complete "
                  f"Aff-Wild2 has {whole:,}; so the paper's numbers are left out", False)


def labelled_faces(video: Video, task: Task) -> int:
    """Frames with a label and, as far as that is known, a face: what the counts of a copy are given in."""
    valid = targets(video.labels, task)[1].reshape(-1, task.width).all(axis=1)         # (T, ...) -> (T,)
    mask = noface_path(video.features)
    return int((valid & ~np.load(mask)[:len(valid)] if mask.exists() else valid).sum())


def reasons(left_out: dict[str, str]) -> str:
    """{"a": "no labels", "b": "no labels"} -> "a, b (no labels)"."""
    groups = {reason: [name for name in left_out if left_out[name] == reason]
              for reason in left_out.values()}
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())


def report(task: Task, sums, scored: Scored, checkpoint, fold: int) -> str:
    """The score table with what it is about: the checkpoint, the videos, those left out, those seen before.

    Shape: sums (videos, ...), as `sums_of` gives them.
    """
    frames, new = sum(len(video.labels) for video in scored.videos), scored.unseen
    some = new.any() and not new.all()
    lines = [str(checkpoint), f"{len(scored.videos)} validation videos, {frames:,} frames ({scored.data})",
             score_table(task, sums, scored.unseen if some else None, fold, scored.comparable)]
    if scored.seen_text():
        lines.append(scored.seen_text() + (", so the score is too high" if not some else
                                           "; \"unseen\" is the score of the others alone"))
    if scored.left_out:
        lines.append(f"left out: {reasons(scored.left_out)}")
    return "\n".join(lines)


# ---- Smoothing and thresholds

def tuned(task: Task, outputs: dict[str, np.ndarray], videos: list[Video], team: Team):
    """The smoothing and, of action units, the thresholds with the best score on `videos`, which were neither
    trained on nor are scored: chosen on the scored ones, they would only be luck. Among equals the least
    smoothing and the threshold next to 0.5. -> frames before and after, thresholds: see `changed_by`"""
    tried, best = THRESHOLDS if task.yes_or_no else [0.5], (-1.0, 0, ())
    for k in SMOOTH:
        scores = np.stack([task.metric.score(sums_of(outputs, videos, task, team, changed_by(task, k, (t,))
                                                     ).sum(axis=0)) for t in tried])       # (thresholds, K)
        thresholds = tuple(tried[i] for i in scores.argmax(axis=0)) if len(tried) > 1 else ()
        best = max(best, (float(scores.max(axis=0).mean()), k, thresholds), key=lambda way: way[0])
    return best[1:]


def changed_by(task: Task, k: int, thresholds: tuple):
    """-> what makes of a video's outputs (T, K) what is scored after smoothing and with thresholds."""
    return lambda outputs: for_metric(smoothed(in_units(outputs, task), k), task, thresholds)
