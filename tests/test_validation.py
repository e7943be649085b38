"""Validation on single images: every image once, by any number of processes, and what is counted of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distributed import Team
from processes import ALONE, CPU
from validation import batches_of, count_classes

LABELS = [2, 0, -1, 1, 2, 2, 0]                    # of seven images; one has none
UNREADABLE = {4}


class Images:
    """Images of 2 x 2 pixels; image i is of the grey 40 · i."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, i):
        return i

    def collate(self, items):
        there = [i for i in items if i not in UNREADABLE]
        images = 40 * torch.tensor(there, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
        problems = [f"image {i}" for i in items if i in UNREADABLE]
        return images, torch.tensor([LABELS[i] for i in there]), problems


def batches(team):
    return batches_of(Images(), SimpleNamespace(features=SimpleNamespace(batch=2),
                                                run=SimpleNamespace(workers=0)), team)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_each_image_is_read_by_one_process(world):
    read = [int(image[0, 0, 0]) // 40 for rank in range(world)
            for images, *_ in batches(Team(rank, world, CPU)) for image in images]
    assert sorted(read) == [i for i in range(len(LABELS)) if i not in UNREADABLE]


def test_images_are_counted_by_label_and_prediction_and_those_without_either_are_left_out():
    def scores_of(images):
        return torch.eye(3)[(images[:, 0, 0, 0] > 0).long()]      # above ImageNet's mean, grey 124: 4, 5, 6

    sums, unreadable = count_classes(scores_of, batches(ALONE), 3, ALONE)
    assert unreadable == 1
    assert np.array_equal(sums, [[1, 1, 0], [1, 0, 0], [1, 1, 0]])
