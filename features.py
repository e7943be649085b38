"""From faces to features: the ViT with its expression head, and one feature per frame of a video (paper §3.1,
§3.2). What fine-tuning, extraction and prediction share. `each_frame` serves EMMA as well."""

import dataclasses

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler

from data import VideoFrames
from images import normalise
from labels import EXPR
from made_of import settings_of
from training import loader
from vit import VisionTransformer


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


def build(config) -> ExprClassifier:
    """The classifier of a configuration, with random weights."""
    f = config.finetune
    vit = VisionTransformer(**dataclasses.asdict(config.vit), drop_path=f.drop_path)
    return ExprClassifier(vit, f.token, f.hidden, f.dropout)


def feature_settings(config) -> dict:
    """The settings that features depend on, for their record (made_of.py)."""
    return settings_of(config, "synthetic", "vit", "finetune.token")


@torch.no_grad()
def each_frame(network, frames: VideoFrames, length: int, width: int, dtype, config, team, progress):
    """What a network gives for each frame of one video of `length` frames, every frame by itself.
    -> outputs of `dtype` (PyTorch's) as NumPy (T, width), noface bool (T,): True where there was no readable
    face image. Row i belongs to frame i + 1.

    network: images (B, 3, height, width) -> (B, width). A frame without a face has the outputs of the frame
    before it (`fill_gaps`). Without any face, all outputs are 0. Images that cannot be read are named.
    `progress` (run.Progress) counts the frames.
    """
    noface, problems = np.ones(length, bool), []
    outputs = torch.zeros(length, width, dtype=dtype).numpy()
    batches = BatchSampler(range(len(frames)), config.features.batch, drop_last=False)
    for images, rows, unreadable in loader(frames, batches, config.run.workers, team):
        problems += unreadable
        if len(rows):
            with team.autocast():
                of_batch = network(normalise(images.to(team.device)))                       # (B, width)
            outputs[rows] = of_batch.to(dtype).cpu().numpy()
            noface[rows] = False
        progress.add(len(rows) + len(unreadable))
    progress.add(length - len(frames))                               # the frames without an image
    if problems:
        more = f" and {len(problems) - 1} more of this video" if len(problems) > 1 else ""
        print(f"  left out: {problems[0]}{more}", flush=True)
    if not noface.all():
        fill_gaps(outputs, noface)
    return outputs, noface


def video_features(vit, frames: VideoFrames, length: int, config, team, progress):
    """The features of one video of `length` frames, by `each_frame`. -> float16 (T, D), noface bool (T,)"""
    def features(images):
        return vit.features(images, config.finetune.token)                                  # (B, D)
    return each_frame(features, frames, length, config.vit.dim, torch.float16, config, team, progress)


def fill_gaps(rows: np.ndarray, noface: np.ndarray):
    """Give each frame without a face the row of the last frame before it that has one; at the start, of the
    first that has one. In place. Shape: rows (T, D), noface (T,), not all True."""
    last = np.flatnonzero(~noface)[0]
    for t in range(len(rows)):
        if noface[t]:
            rows[t] = rows[last]
        else:
            last = t
