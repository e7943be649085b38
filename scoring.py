"""Whole videos: predicted by segments, scored with each labelled frame once (paper §4.2, Table 1). And what
is scored on single images.

A frame that several segments cover gets the mean of their outputs; the authors' published numbers count it
several times. The outputs are scored as they are, unless evaluate.py is asked to tune: without the clipping
and the mode filter of the authors' code.
"""

import dataclasses
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler

from data import Images, Video, noface_path, pad, read_features, segments
from engine.checkpoints import find_weights, load_vit, load_weights, read_checkpoint
from engine.config import Config
from engine.distributed import Team
from engine.training import loader
from images import VideoFrames, normalise
from labels import EXPR, TASKS, Task, for_metric, in_units, scene, smoothed, targets
from metrics import CLASS_F1, plain_table, score_table
from pictures import curves
from pipeline import find_input, identity, like, named, tuned_on
from temporal import SegmentModel
from vit import VisionTransformer

ALONE = Team(0, 1, torch.device("cpu"))      # one process, without a GPU
HELD_OUT = "held-out videos"                 # where a record names the videos of task.held_out
# The first layer of a segment model: of the TCN; without one, of the Transformer; without both, of the head.
FIRST_WEIGHTS = ("tcn.levels.0.conv1.conv.parametrizations.weight.original1", "transformer.project.weight",
                 "head.0.weight")
SMOOTH = (0, 1, 2, 5, 10, 20, 50)            # frames before and after, tried by `best_smoothing`


# ---- Single images

class ExprClassifier(nn.Module):
    """What is fine-tuned (§3.1), with the sizes of a configuration: ViT -> one feature per face -> fully
    connected layers -> 8 logits: (B, 3, H, W) -> (B, 8)."""

    def __init__(self, config: Config):
        super().__init__()
        f, D = config.finetune, config.vit.dim
        self.vit = VisionTransformer(**dataclasses.asdict(config.vit), drop_path=f.drop_path)
        self.token = f.token
        self.head = nn.Sequential(nn.Linear(D, f.hidden), nn.GELU(), nn.Dropout(f.dropout),
                                  nn.Linear(f.hidden, len(EXPR.outputs)))

    def forward(self, images):
        return self.head(self.vit.features(images, self.token))        # (B, 3, H, W) -> (B, D) -> (B, 8)


@torch.no_grad()
def batch_outputs(network, images: Images, rows, config: Config, team: Team):
    """Yield what a network gives for the readable images of each batch of these rows, float32 (B, K), and
    each of their columns, all NumPy. `network`, in evaluation mode: normalised images (B, 3, height, width)
    -> (B, K)."""
    batches = BatchSampler(rows, config.features.batch, drop_last=False)
    for x, *columns in loader(images, batches, config.run.workers, team):
        if len(x):
            with team.autocast():
                outputs = network(normalise(x.to(team.device, non_blocking=True)))
            yield outputs.float().cpu().numpy(), *[column.numpy() for column in columns]


def count_classes(outputs, labels) -> np.ndarray:
    """Images by (label, predicted class): (B, classes), (B,) -> (classes, classes)."""
    return CLASS_F1.count(outputs, labels, labels >= 0)


def count_images(run, network, images: Images, count=count_classes):
    """In a training: the sum of count(outputs, *columns) over all images and processes, and how many images
    could not be read. Each is read by one process. `network`: as in `batch_outputs`. Raises ValueError if
    none can be read."""
    team, sums, readable = run.team, 0, 0
    mine = range(team.rank, len(images), team.world)
    for batch in run.unless_stopped(batch_outputs(network, images, mine, run.config, team)):
        sums = sums + count(*batch)
        readable += len(batch[0])
    run.obey_signals()
    sums, readable = map(sum, zip(*team.gather((sums, readable))))
    if not readable:
        raise ValueError(f"none of {len(images):,} images can be scored, such as {images.files.where(0)}")
    return sums, len(images) - readable


def finish_classes(run, network, images: Images, names, zero_loss: float):
    """The end of a training on classes `names`: the best epoch's weights on all `images`, curves.png with the
    loss of outputs that are all 0, metrics.json, and a table."""
    run.load_best()
    run.model.eval()
    sums, unreadable = count_images(run, network, images)
    f1, chance = CLASS_F1.score(sums), CLASS_F1.chance(sums).mean()
    if run.team.rank == 0:
        curves(run.folder, {"loss": zero_loss, "val_f1": chance})
    run.finish({"metric": CLASS_F1.name, "score": f1.mean(), **dict(zip(names, f1.tolist())),
                "chance": chance, "confusion": sums.tolist(), "val_images": int(sums.sum()),
                "val_unreadable": unreadable})
    run.team.say(f"\n{int(sums.sum()):,} single validation images ({unreadable:,} more cannot be read)\n"
                 f"{plain_table(CLASS_F1, names, sums)}\nwritten to {run.folder}")


def extractor(config: Config, team: Team) -> tuple[Callable, dict, str]:
    """What gives the features of videos, float16 (T, D): `each_frame`, by the ViT of the configuration; the
    ViT's record; what is to be said of it. Raises ValueError if its checkpoint is missing or does not fit,
    also if its training used another token than finetune.token."""
    path, record = find_input(config, team, "features.checkpoint")
    vit = VisionTransformer(**dataclasses.asdict(config.vit))
    said, stage, token = load_vit(vit, path), record.get("stage"), config.finetune.token
    trained = "cls" if stage in ("emma", "cotex") else record.get("settings", {}).get("finetune.token", token)
    if trained != token:
        raise ValueError(f"{path}: of stage {stage}, which trained its {trained} token; give --set "
                         f"finetune.token={trained}")
    network = partial(vit.to(team.device).eval().features, token=token)
    return partial(each_frame, network, path, config.vit.dim, np.float16, config, team), record, said


def check_finite(outputs, source: str):
    """Raises ValueError if outputs of the checkpoint `source` are NaN or infinite; so none is written."""
    if not np.isfinite(outputs).all():
        raise ValueError(f"{source}: its outputs are not finite, or too large for {outputs.dtype}: its "
                         "training has diverged, or what it was given is not finite; use another")


def each_frame(network, source, width: int, dtype, config: Config, team: Team, frames: VideoFrames,
               length: int, progress):
    """What a network gives for each frame of one video of T = `length` frames, every frame by itself.
    -> outputs of `dtype` (T, width), noface bool (T,): True where there was no readable face image. Row i
    belongs to frame i + 1. Raises ValueError if an output is NaN or infinite.

    network: as in `batch_outputs`; source: its checkpoint. A frame without a face has the outputs of the
    frame before it; at the start, of the first that has one. Without any face, all outputs are 0. `progress`
    (training.Progress) counts the frames.
    """
    noface, outputs = np.ones(length, bool), np.zeros((length, width), dtype)
    images = Images(frames, config.vit.image_size, [frames.numbers - 1])
    for of_batch, rows in batch_outputs(network, images, range(len(frames)), config, team):
        with np.errstate(over="ignore"):                             # what float16 cannot hold is refused
            outputs[rows] = of_batch
        noface[rows] = False
        progress.add(len(rows))
    check_finite(outputs, source)
    progress.add(int(noface.sum()))                                  # the frames without a readable image
    if not noface.all():
        # The last frame with a face up to each frame; before the first one, the first one.
        last = np.maximum.accumulate(np.where(noface, -1, np.arange(length)))
        outputs = outputs[np.where(last < 0, np.argmin(noface), last)]
    return outputs, noface


# ---- Whole videos

@torch.no_grad()
def predict(model, config: Config, team: Team, features: np.ndarray) -> np.ndarray:
    """The outputs of a segment model for one whole video, as its features lie on disk, the mean where
    segments overlap: float16 (T, D) -> float32 (T, K).

    VA: valence and arousal. Expr, AU: logits; `labels.in_units` makes them probabilities. Raises ValueError
    for features of another shape or width, and if an output is NaN or infinite, as where a feature is.
    The segments of a video are its batches, whatever the number of processes, so the result does not depend
    on it.
    """
    source = getattr(model, "source", "this model")
    if np.ndim(features) != 2 or features.shape[1] != model.dim or not len(features):
        raise ValueError(f"{source}: expected the features of a video, (T, {model.dim}), got "
                         f"{np.shape(features)}; give those it was trained on, --set task.features=...")
    window, batch, outputs = config.segments.window, config.task.batch, []
    cut = segments(len(features), window, config.segments.stride)
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
    mean = total / count
    check_finite(mean, source)
    return mean


def of_videos(look, videos: list[Video], team: Team, run=None) -> dict:
    """{video: look(video)} of all videos, on every process; each is looked at by one. `run`: a training,
    which may be asked to stop."""
    # The longest first, so that no process waits long for another's last one.
    mine = sorted(videos, key=lambda video: (-len(video.labels), video.name))[team.rank::team.world]
    found = {video.name: look(video) for video in (run.unless_stopped(mine) if run else mine)}
    if run:
        run.obey_signals()
    return {name: of_video for part in team.gather(found) for name, of_video in part.items()}


def predict_videos(model, videos: list[Video], config: Config, team: Team, run=None) -> dict[str, np.ndarray]:
    """{video: a segment model's outputs (T, K)} of some labelled videos: `predict`, `of_videos`."""
    model.eval()
    return of_videos(lambda video: predict(model, config, team,
                                           read_features(video.features, 0, len(video.labels))),
                     videos, team, run)


def sums_of(outputs: dict[str, np.ndarray], videos: list[Video], task: Task) -> np.ndarray:
    """The sums of the task's metric for each of `videos`: (videos, ...). `outputs`: {video: (T, K)}."""
    return np.stack([task.metric.count(outputs[video.name], *targets(video.labels, task))
                     for video in videos])


# ---- Checkpoints

class Trained(NamedTuple):
    """A model with what its checkpoint carries: enough to predict, without the run that made it."""
    tasks: list[Task]         # the one of a segment model; of EMMA those that it was trained on
    model: nn.Module
    config: Config            # with the settings that the model was trained with
    team: Team
    record: dict              # what it was made of (pipeline.py)
    changed: dict             # {setting: (stage, was, now)} of those that differ from the given configuration
    predict: Callable         # features of a video -> outputs: `predict`; of EMMA: `each_frame`


def load(path, config: Config | None = None, task: Task | None = None, team: Team = ALONE) -> Trained:
    """The segment model of a checkpoint, rebuilt from it alone: its settings and sizes are in it.

    `config` says what the checkpoint does not (run.device). Raises ValueError if it is no whole checkpoint,
    of another task than `task`, made with other settings than those given with --set, or if its weights do
    not fit (names and shapes are listed).
    """
    saved = read_checkpoint(path)
    record = saved.get("made_of", {})
    stage = record.get("stage", "unknown")
    name = stage.removeprefix("task_")
    if name not in TASKS or task not in (None, TASKS[name]):
        raise ValueError(f"{path}: of stage {stage}, not a segment model"
                         + (f" for --task {task.name}" if task else ""))
    task = TASKS[name]
    config, changed = like(record, config or Config(), path)
    weights, _ = find_weights(saved, FIRST_WEIGHTS, path)
    width = next((weights[name].shape[1] for name in FIRST_WEIGHTS if name in weights), 1)
    model = SegmentModel(width, len(task.outputs), **dataclasses.asdict(config.temporal))
    load_weights(model, weights, path)
    model.to(team.device).eval()
    return Trained([task], model, config, team, record, changed, partial(predict, model, config, team))


def check_features(path, record: dict, features_record: dict):
    """Raises ValueError if a checkpoint was trained on features of another ViT than these."""
    if identity(record["from"]) != identity(features_record):
        raise ValueError(f"{path}: trained on features of another ViT, {named(record['from'])}, not "
                         f"{named(features_record)}; give its own: --set task.features=..., or their ViT: "
                         "--set features.checkpoint=...")


def check_scenes(path, record: dict, videos):
    """Raises ValueError if a checkpoint was trained on scenes that would be scored."""
    trained = {scene(name) for name in record["data"]["training videos"] + record["data"].get(HELD_OUT, [])}
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
    seen: str                    # why the score may be too high; "" if it is not
    data: str                    # what the report calls the data
    comparable: bool             # with the paper's and the baseline's numbers


def to_score(videos, left_out, other_videos, task: Task, origin: dict, config: Config) -> Scored:
    """`videos` of the validation set, `other_videos` of the training set; `origin`: the features' record.

    The paper's numbers stand beside a score only on synthetic data, which says so, and on a complete copy of
    Aff-Wild2.
    """
    tuned = {scene(name) for name in tuned_on(origin)}
    unseen = np.array([scene(video.name) not in tuned for video in videos], bool)
    seen = (f"{(~unseen).sum()} of these {len(videos)} videos show scenes on which the ViT was fine-tuned"
            if not unseen.all() else "")
    found, whole = sum(labelled_faces(video, task) for video in [*videos, *other_videos]), task.labelled_faces
    comparable = config.data.synthetic or abs(found - whole) <= 0.01 * whole
    data = ("synthetic data; the paper's and the baseline's numbers are on Aff-Wild2" if config.data.synthetic
            else "Aff-Wild2" if comparable else f"{found:,} labelled frames with a face in both sets, a "
            f"complete Aff-Wild2 has {whole:,}; so the paper's numbers are left out")
    return Scored(videos, left_out, unseen, seen, data, comparable)


def labelled_faces(video: Video, task: Task) -> int:
    """Frames with a label and, as far as that is known, a face: what the counts of a copy are given in."""
    valid = targets(video.labels, task)[1].reshape(-1, task.width).all(axis=1)         # (T, ...) -> (T,)
    mask = noface_path(video.features)
    return int((valid & ~np.load(mask)[:len(valid)] if mask.exists() else valid).sum())


def reasons(left_out: dict[str, str]) -> str:
    """{"a": "no labels", "b": "no labels"} -> "a, b (no labels)"."""
    return "; ".join(f"{', '.join(name for name in left_out if left_out[name] == reason)} ({reason})"
                     for reason in dict.fromkeys(left_out.values()))


def report(task: Task, sums, scored: Scored, checkpoint, fold: int) -> str:
    """The score table with what it is about: the checkpoint, the videos, those left out, those seen before.

    Shape: sums (videos, ...), as `sums_of` gives them.
    """
    frames, some = sum(len(video.labels) for video in scored.videos), scored.seen and scored.unseen.any()
    lines = [str(checkpoint), f"{len(scored.videos)} validation videos, {frames:,} frames ({scored.data})",
             score_table(task, sums, scored.unseen if some else None, fold, scored.comparable)]
    if scored.seen:
        lines.append(scored.seen + ("; \"unseen\" is the score of the others alone" if some else
                                    ", so the score is too high"))
    if scored.left_out:
        lines.append(f"left out: {reasons(scored.left_out)}")
    return "\n".join(lines)


# ---- Smoothing

def best_smoothing(outputs: dict[str, np.ndarray], videos: list[Video], task: Task) -> int:
    """Of SMOOTH, the one with the best score on `videos`, which were neither trained on nor are scored:
    chosen on the scored ones, it would only be luck. Of equals the least."""
    return max(SMOOTH, key=lambda k: task.metric.score(
        sums_of(means_over(outputs, task, k), videos, task).sum(axis=0)).mean())


def means_over(outputs: dict[str, np.ndarray], task: Task, k: int) -> dict[str, np.ndarray]:
    """{video: outputs (T, K)}, the mean over k frames before and after each in units, as they are scored."""
    return {name: for_metric(smoothed(in_units(of_video, task), k), task)
            for name, of_video in outputs.items()}
