"""A batch of face images: order and types are kept, and what cannot be read is left out and named."""

import errno
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from images import FaceImages


class Flat(FaceImages):
    """Image i is 2 x 2, flat, of level i. Those in `broken` cannot be read. `beside(i)` stands beside it."""

    def __init__(self, empty, beside, broken=()):
        super().__init__(2, empty)
        self.value, self.broken = beside, broken

    def __len__(self):
        return 6

    def where(self, i):
        return f"face {i}"

    def item(self, i):
        if i in self.broken:
            raise ValueError(f"{self.where(i)}: not a readable image")
        return np.full((*self.size, 3), i, np.uint8), self.value(i)


def levels(images):
    return images[:, 0, 0, 0].tolist()


def test_a_batch_keeps_the_order_of_its_images_and_what_stands_beside_each():
    faces = Flat(torch.zeros(0, 3), lambda i: np.array([i, i + 0.5, -i], np.float32))
    images, beside, problems = faces.collate([faces[i] for i in (4, 0, 2)])
    assert images.dtype == torch.uint8 and images.shape == (3, 2, 2, 3) and levels(images) == [4, 0, 2]
    assert torch.equal(beside, torch.tensor([[4, 4.5, -4], [0, 0.5, 0], [2, 2.5, -2]]))
    assert problems == []


def test_what_cannot_be_read_is_left_out_of_its_batch_and_named():
    faces = Flat(torch.zeros(0, dtype=torch.long), lambda i: 10 * i, broken=(1, 3))
    assert faces[3] == "face 3: not a readable image"
    images, beside, problems = faces.collate([faces[i] for i in (3, 5, 1, 0)])
    assert levels(images) == [5, 0] and beside.tolist() == [50, 0]
    assert problems == ["face 3: not a readable image", "face 1: not a readable image"]


@pytest.mark.parametrize("empty", [torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 3)])
def test_a_batch_without_a_readable_image_has_the_shapes_and_types_of_an_empty_one(empty):
    faces = Flat(empty, None, broken=range(6))
    images, beside, problems = faces.collate([faces[i] for i in range(4)])
    assert images.shape == (0, 2, 2, 3) and images.dtype == torch.uint8
    assert beside.shape == empty.shape and beside.dtype == empty.dtype
    assert problems == [f"face {i}: not a readable image" for i in range(4)]


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.int8])
def test_numbers_of_any_type_become_one_tensor_of_the_type_asked_for(kind):
    faces = Flat(torch.zeros(0, dtype=torch.long), kind)
    _, beside, _ = faces.collate([faces[i] for i in (2, 1)])
    assert beside.dtype == torch.long and beside.tolist() == [2, 1]


def test_a_disk_that_fails_stops_the_batch():
    class Gone(Flat):
        def item(self, i):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.where(i))
    with pytest.raises(OSError, match="face 0"):
        Gone(torch.zeros(0), float)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_each_image_once_with_and_without_a_worker_process(workers):
    faces = Flat(torch.zeros(0, 1), lambda i: np.array([i], np.float32), broken=(4, 5))
    batches = list(DataLoader(faces, batch_size=2, num_workers=workers, collate_fn=faces.collate))
    assert [levels(images) for images, _, _ in batches] == [[0, 1], [2, 3], []]
    assert [beside.flatten().tolist() for _, beside, _ in batches] == [[0, 1], [2, 3], []]
    assert [len(problems) for _, _, problems in batches] == [0, 0, 2]
    if workers:
        assert all(part.is_shared() for images, beside, _ in batches[:2] for part in (images, beside))


def test_several_arrays_beside_an_image_become_a_tensor_each():
    class Labelled(Flat):
        def item(self, i):
            image, value = super().item(i)
            return image, value, np.full((2, 3), i / 2)

    faces = Labelled(torch.zeros(0, dtype=torch.long), lambda i: 10 * i, broken=(1,))
    faces.beside += (torch.zeros(0, 2, 3),)
    images, labels, noise, problems = faces.collate([faces[i] for i in (3, 1, 2)])
    assert levels(images) == [3, 2] and labels.tolist() == [30, 20] and len(problems) == 1
    assert torch.equal(noise, torch.tensor([1.5, 1.0])[:, None, None].expand(2, 2, 3))
    images, labels, noise, _ = faces.collate([])
    assert labels.shape == (0,) and noise.shape == (0, 2, 3) and noise.dtype == torch.float32
