"""Class folders: classes by name, refusals, counts; what stands beside an image; the way into CoTEX."""

import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from class_folders import CLASSES, ClassFaces, class_folders, describe
from cotex import CoTEX, cotex_loss
from distributed import Team
from images import random_crop, read_image
from plain import crop_rng
from training import Batches, loader

ALONE = Team(0, 1, torch.device("cpu"))
FOLDERS = ("ANGRER", "DISGUST", "FEAR", "HAPPINESS", "SADNESS", "SURPRISE")


def save(path, grey=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


def make(root, counts=(2, 1, 1, 1, 1, 1)):
    """Faces in the six folders, of different grey levels, 10 apart."""
    grey = 0
    for folder, count in zip(FOLDERS, counts):
        (root / folder).mkdir(parents=True)
        for n in range(count):
            save(root / folder / f"{n}.png", grey)
            grey += 10
    return root


def classes_by_folder(root):
    faces = ClassFaces(class_folders(root), size=8)
    return {faces.where(i).split("/")[-2]: int(faces[i][1]) for i in range(len(faces))}


# ---- Classes and counts

def test_the_classes_are_0_to_5_in_the_challenges_order(tmp_path):
    assert CLASSES == ("Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise")
    assert classes_by_folder(make(tmp_path)) == {folder: k for k, folder in enumerate(FOLDERS)}


def test_a_class_is_known_by_the_name_of_its_folder_in_any_case_and_not_by_its_place(tmp_path):
    for folder in ("surprise", "Fear", "anger"):
        save(tmp_path / folder / "1.jpg")
    assert classes_by_folder(tmp_path) == {"surprise": 5, "Fear": 2, "anger": 0}


def test_images_are_found_at_any_depth_and_the_first_folder_says_the_class(tmp_path):
    save(tmp_path / "SADNESS/happy/person 1/a.JPG", 50)
    found = class_folders(tmp_path)
    faces = ClassFaces(found, size=8)
    assert found.labels.tolist() == [5] and faces[0][1] == 4         # Sadness, in ABAW's order and here
    assert faces.where(0) == f"{tmp_path}/SADNESS/happy/person 1/a.JPG"


def test_images_are_counted_per_class_and_a_class_without_one_is_named(tmp_path):
    make(tmp_path, (3, 0, 2, 0, 1, 1))
    save(tmp_path / "cover.jpg")
    save(tmp_path / ".cache/FEAR/1.jpg")
    (tmp_path / "FEAR/notes.txt").write_text("no image")
    (tmp_path / "HAPPINESS").rmdir()
    lines = describe(class_folders(tmp_path)).splitlines()
    assert lines == [f"{tmp_path}: 7 images, Anger 3, Disgust 0, Fear 2, Happiness 0, Sadness 1, Surprise 1",
                     "  left out: 1 hidden, 1 not an image file, 1 not in a class folder",
                     "  without an image: Disgust, Happiness"]
    assert describe(class_folders(make(tmp_path / ".cache/other"))).count("\n") == 1


@pytest.mark.parametrize("name", ["NEUTRAL", "other", "contempt", "0", "train", "ANGRYER"])
def test_a_folder_that_is_no_class_is_refused_with_the_names_of_those_that_are(tmp_path, name):
    save(make(tmp_path) / name / "1.jpg")
    message = (rf"{tmp_path}: found {name}, expected ANGRER \(or ANGER\), DISGUST, FEAR, HAPPINESS, SADNESS, "
               "SURPRISE; give the folder that holds these class folders and no others")
    with pytest.raises(ValueError, match=message):
        class_folders(tmp_path)


def test_a_folder_without_folders_a_file_and_a_missing_folder_are_refused(tmp_path):
    save(tmp_path / "1.jpg")
    with pytest.raises(ValueError, match="found no folder, expected ANGRER"):
        class_folders(tmp_path)
    with pytest.raises(ValueError, match="1.jpg is a file; give the folder that holds ANGRER"):
        class_folders(tmp_path / "1.jpg")
    with pytest.raises(ValueError, match="gone, which is not there; give the folder that holds ANGRER"):
        class_folders(tmp_path / "gone")


def test_two_folders_of_one_class_are_refused(tmp_path):
    save(make(tmp_path) / "ANGER/1.jpg")
    with pytest.raises(ValueError, match="both ANGER and ANGRER hold Anger; put their images into one"):
        class_folders(tmp_path)


def test_class_folders_that_are_all_empty_are_refused(tmp_path):
    (make(tmp_path, (0,) * 6) / "FEAR/notes.txt").write_text("")
    with pytest.raises(ValueError, match="no image in ANGRER, DISGUST, .*; left out: 1 not an image file"):
        class_folders(tmp_path)


def test_the_command_counts_good_folders_and_refuses_bad_ones(tmp_path, monkeypatch, capsys):
    make(tmp_path / "good")
    save(tmp_path / "bad/banana/1.jpg")
    monkeypatch.setattr(sys, "argv", ["class_folders.py", f"{tmp_path}/bad", f"{tmp_path}/good"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("class_folders", run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.startswith(f"refused: {tmp_path}/bad: found banana")
    assert said.out.startswith(f"{tmp_path}/good: 7 images, Anger 2, Disgust 1")


# ---- Images and noise

def detailed(root, count=6):
    """Images in which a crop shows: 12 x 12 of random pixels."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 12, 12, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (root / FOLDERS[i]).mkdir(parents=True)
        Image.fromarray(image).save(root / FOLDERS[i] / "1.png")
    return class_folders(root)


@pytest.mark.parametrize("seed", [7, 0])
def test_crop_and_noise_are_a_function_of_seed_epoch_and_sample(tmp_path, seed):
    found = detailed(tmp_path)
    faces = ClassFaces(found, 8, seed, smallest_crop=0.5, noise=(2, 4))
    for faces.epoch in (0, 3):
        for i in (5, 0, 5):
            rng = crop_rng(seed, faces.epoch, i)
            pixels = random_crop(read_image(found.where(i)), (8, 8), rng, 0.5)
            image, label, noise = faces[i]
            assert label == i and np.array_equal(image, pixels)
            assert noise.dtype == np.float32 and np.array_equal(noise, rng.random((2, 4), dtype=np.float32))


def test_views_have_noise_of_their_own_and_one_view_has_that_of_the_first(tmp_path):
    found = detailed(tmp_path)
    _, _, two = ClassFaces(found, 8, seed=7, smallest_crop=0.5, noise=(2, 196))[0]
    image, _, one = ClassFaces(found, 8, seed=7, smallest_crop=0.5, noise=(1, 196))[0]
    assert np.array_equal(two[:1], one) and not np.isclose(two[0], two[1]).all()
    assert np.array_equal(image, ClassFaces(found, 8, seed=7, smallest_crop=0.5)[0][0])


def test_validation_takes_the_whole_image_in_every_epoch_and_no_noise(tmp_path):
    found = detailed(tmp_path)
    faces = ClassFaces(found, 12)
    for faces.epoch in (0, 1):
        image, label, noise = faces[2]
        assert np.array_equal(image, np.asarray(Image.open(found.where(2)))) and label == 2
        assert noise.shape == (0, 0)
    assert ClassFaces(found, 6)[0][0].shape == (6, 6, 3)


def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    found = class_folders(make(tmp_path))
    (tmp_path / "FEAR/0.png").write_bytes(b"cut short")
    faces = ClassFaces(found, 8, seed=0, noise=(2, 4))
    images, labels, noise, problems = faces.collate([faces[i] for i in (0, 3, 6)])
    assert [images.shape, noise.shape, labels.tolist()] == [(2, 8, 8, 3), (2, 2, 4), [0, 5]]
    assert [images.dtype, labels.dtype, noise.dtype] == [torch.uint8, torch.long, torch.float32]
    assert torch.equal(noise[1], torch.from_numpy(faces[6][2])) and len(problems) == 1
    assert problems[0].startswith(f"{tmp_path}/FEAR/0.png: not a readable image")


@pytest.mark.parametrize("indices", [[], [3]], ids=["no share", "nothing readable"])
def test_an_empty_batch_has_the_shapes_of_a_full_one(tmp_path, indices):
    faces = ClassFaces(class_folders(make(tmp_path)), 8, seed=0, noise=(2, 4))
    (tmp_path / "FEAR/0.png").unlink()
    images, labels, noise, problems = faces.collate([faces[i] for i in indices])
    assert images.shape == (0, 8, 8, 3) and labels.shape == (0,) and noise.shape == (0, 2, 4)
    assert len(problems) == len(indices) and labels.dtype == torch.long


def items(faces, first=0, workers=0, team=ALONE):
    """What a process gets of epoch 2, in batches of 4, from step `first` on: {class: (image, noise)}. Each
    class has one image."""
    batches = loader(faces, Batches(6, 4, 7, 2, team, first), workers, team)
    return {int(y): (x, u) for images, labels, noise, _ in batches for x, y, u in zip(images, labels, noise)}


@pytest.mark.parametrize("world, first, workers", [(2, 0, 0), (3, 0, 0), (4, 0, 0), (1, 1, 0), (2, 1, 1)])
def test_processes_and_restarts_do_not_change_an_images_noise(tmp_path, world, first, workers):
    faces = ClassFaces(detailed(tmp_path), 8, seed=7, smallest_crop=0.5, noise=(2, 4))
    faces.epoch, found = 2, {}
    for rank in range(world):
        found |= items(faces, first, workers, Team(rank, world, ALONE.device))
    whole = items(faces)
    assert len(whole) == 6 and len(found) == 6 - 4 * first
    for k, (image, noise) in found.items():
        assert torch.equal(image, whole[k][0]) and torch.equal(noise, whole[k][1])


def test_a_batch_goes_through_masked_cotex(tmp_path):
    torch.manual_seed(0)
    model = CoTEX(image_size=8, patch=4, dim=16, depth=1, heads=2, mask_ratio=0.5)
    faces = ClassFaces(detailed(tmp_path), 8, seed=7, smallest_crop=0.5, noise=(2, model.patches))
    (images, labels, noise, _), = loader(faces, Batches(6, 6, 7, 0, ALONE), 0, ALONE)
    logits = model(images.permute(0, 3, 1, 2) / 255, noise)
    loss = cotex_loss(logits, labels, labels >= 0, 16.7, len(labels))
    loss.backward()
    assert logits.shape == (2, 6, 6) and loss.isfinite()
