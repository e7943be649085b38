"""Scoring a network on single images: what the trainings on single images share.

Each image is read by one process, and a score is taken from sums over all of them, so every image counts
once.
"""

import numpy as np
import torch
from torch.utils.data import BatchSampler

from distributed import all_sum
from images import normalise
from metrics import CLASS_F1
from training import loader


def batches_of(dataset, config, team):
    """Batches of this process's share of a dataset (images.FaceImages)."""
    mine = range(team.rank, len(dataset), team.world)
    batches = BatchSampler(mine, config.features.batch, drop_last=False)
    return loader(dataset, batches, config.run.workers, team)


@torch.no_grad()
def count_classes(scores_of, batches, classes: int, team) -> tuple[np.ndarray, int]:
    """Over all processes: images by (label, predicted class), (classes, classes), and how many could not be
    read. `scores_of`: normalised images (B, 3, height, width) -> scores (B, classes), in evaluation mode. In
    a batch an image's class comes first after the images."""
    sums, unreadable = np.zeros((classes, classes)), 0
    for images, labels, *_, problems in batches:
        with team.autocast():
            scores = scores_of(normalise(images.to(team.device, non_blocking=True)))
        labels = labels.numpy()
        sums += CLASS_F1.count(scores.float().cpu().numpy(), labels, labels >= 0)
        unreadable += len(problems)
    return all_sum(torch.from_numpy(sums)).numpy(), int(all_sum(torch.tensor(unreadable)))
