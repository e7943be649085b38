"""From faces to features: the ViT with its expression head, and one feature per frame of a video (paper §3.1,
§3.2). What fine-tuning, extraction and prediction share."""

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
def video_features(vit, frames: VideoFrames, length: int, config, team, progress):
    """The features of one video of `length` frames. -> features float16 (T, D), noface bool (T,): True where
    there was no readable face image. Row i belongs to frame i + 1.

    A frame without a face has the feature of the frame before it (`fill_gaps`). Without any face, all
    features are 0. Images that cannot be read are named. `progress` (run.Progress) counts the frames.
    """
    noface, problems = np.ones(length, bool), []
    features = np.zeros((length, config.vit.dim), np.float16)
    batches = BatchSampler(range(len(frames)), config.features.batch, drop_last=False)
    for images, rows, unreadable in loader(frames, batches, config.run.workers, team):
        problems += unreadable
        if len(rows):
            with team.autocast():
                f = vit.features(normalise(images.to(team.device, non_blocking=True)),
                                 config.finetune.token)                               # (B, D)
            features[rows] = f.half().cpu().numpy()
            noface[rows] = False
        progress.add(len(rows) + len(unreadable))
    progress.add(length - len(frames))                               # the frames without an image
    if problems:
        more = f" and {len(problems) - 1} more of this video" if len(problems) > 1 else ""
        print(f"  left out: {problems[0]}{more}", flush=True)
    if not noface.all():
        fill_gaps(features, noface)
    return features, noface


def fill_gaps(features: np.ndarray, noface: np.ndarray):
    """Give each frame without a face the feature of the last frame before it that has one; at the start, of
    the first that has one. In place. Shape: features (T, D), noface (T,), not all True."""
    last = np.flatnonzero(~noface)[0]
    for t in range(len(features)):
        if noface[t]:
            features[t] = features[last]
        else:
            last = t
