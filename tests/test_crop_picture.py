"""The picture of the right crop: each crop is what it says, and docs shows the picture that is drawn."""

import runpy
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import crop_picture
from crop_picture import SIDES, TILT, ZOOM, corners, cut, in_scene
from drawn import assert_texts_are_apart

DOCS = Path(__file__).parent.parent / "docs"
EYES = np.array([(-17, -12), (17, -12)])         # of a face, from between its cheekbones


def in_crop(points, square):
    """Where points of the face lie in a crop: (0, 0) is its upper left corner, (1, 1) its lower right one."""
    origin, down, right = square[0], square[1] - square[0], square[3] - square[0]
    return (in_scene(points) - origin) @ np.linalg.inv(np.stack([right, down]))


def test_in_the_right_crop_the_eyes_are_level_and_the_face_is_whole():
    left, right = in_crop(EYES, corners())
    assert abs(left[1] - right[1]) < 1e-9
    assert abs(left[0] + right[0] - 1) < 1e-9 and 0.25 < left[1] < 0.5
    brows_and_chin = in_crop(np.array([(0, -28), (0, 46)]), corners())
    assert (brows_and_chin > 0).all() and (brows_and_chin < 1.01).all()


def test_the_wrong_crops_are_wrong_as_they_say():
    left, right = in_crop(EYES, corners(2.1))
    assert right[0] - left[0] < 0.2                                        # a small face
    left, right = in_crop(EYES, corners(turn=-TILT))
    assert abs(left[1] - right[1]) > 0.1                                   # a tilted one
    assert in_crop(np.array([(0, 46)]), corners(0.6))[0, 1] > 1            # without its chin


def test_a_crop_shows_what_lies_in_its_corners():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    scene = coarse.resize((ZOOM * 430, ZOOM * 348), Image.BICUBIC)
    crop = np.asarray(cut(scene, corners())).astype(int)
    side, pixels = len(crop), np.asarray(scene).astype(int)
    for x, y in rng.uniform(0.05, 0.95, (20, 2)):
        square = corners()
        point = square[0] + x * (square[3] - square[0]) + y * (square[1] - square[0])
        column, row = (ZOOM * point).astype(int)
        assert np.abs(crop[int(y * side), int(x * side)] - pixels[row, column]).max() <= 12
    assert 0 < SIDES < 1


def test_the_command_draws_the_picture_of_the_docs(tmp_path, monkeypatch, capsys, texts):
    monkeypatch.setattr(sys, "argv", ["crop_picture.py", str(tmp_path / "crop.png")])
    runpy.run_path(crop_picture.__file__, run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path}/crop.png\n"
    drawn, kept = (np.asarray(Image.open(folder / "crop.png")).astype(int) for folder in (tmp_path, DOCS))
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 2    # another Pillow may differ
    assert_texts_are_apart(texts, drawn)
