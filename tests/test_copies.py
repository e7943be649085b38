"""Copies of the still sets as people have them: other separators, prefixes, folders, headers; whole
photographs with a face box; a list of another folder; a disk that fails. And the script that counts them."""

import builtins
import errno
import io
import os
import runpy
import sys
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from settings import Config
from test_faces import (AFFECTNET_HEADER, affectnet_row, level, make_affectnet_2017, make_affectnet_2021,
                        make_fer2013, make_raf_db, save, settings, write)

import faces
from affectnet import affectnet_2017
from faces import load_faces
from fer2013 import fer2013
from images import find_images
from raf_db import raf_db
from synthetic import check_paths

IMAGES = "Manually_Annotated_Images"


# ---- AffectNet 2017

def affectnet_of(root, *files, images=("1/a.jpg",)):
    """A copy whose training list names `files`; on disk are `images`, each of grey level 50, and 9/v.png."""
    for name in images:
        save(root / IMAGES / name, 50)
    return make_affectnet_2017(root, training=[affectnet_row(file, 1) for file in files])


@pytest.mark.parametrize("file", [
    "1\\a.jpg", " 1/a.jpg ", f"{IMAGES}/1/a.jpg", f"{IMAGES}\\1\\a.jpg", f"C:\\faces\\{IMAGES}\\1\\a.jpg",
    f"/mnt/faces/{IMAGES}/1/a.jpg", f"../{IMAGES}/1/a.jpg", f"{IMAGES}/{IMAGES}/1/a.jpg"])
def test_a_listed_name_is_found_with_any_separators_and_folders_above_the_images(tmp_path, file):
    found = affectnet_2017(affectnet_of(tmp_path, file))
    assert found.paths.tolist() == [b"1/a.jpg", b"9/v.png"] and level(found.read(0)) == 50
    assert not found.skipped


@pytest.mark.parametrize("file", ["..\\a.jpg", f"{IMAGES}/../../a.jpg", f"{IMAGES}//etc/passwd",
                                  "/mnt/1/a.jpg", f"/mnt/other_{IMAGES}/1/a.jpg"])
def test_a_listed_name_that_leaves_the_images_is_refused_with_any_separators_and_prefix(tmp_path, file):
    with pytest.raises(ValueError, match="training.csv line 2: .* leaves its data root"):
        affectnet_2017(affectnet_of(tmp_path, file))


def test_a_list_of_which_more_than_9_in_10_images_are_absent_is_refused_with_an_example(tmp_path):
    absent = [f"{i}/gone.jpg" for i in range(9)]
    found = affectnet_2017(affectnet_of(tmp_path, "1/a.jpg", *absent))
    assert len(found) == 2 and found.skipped == {"image not on disk": 9}
    affectnet_of(tmp_path, "1/a.jpg", *absent, "99/gone.jpg")
    expected = (r"training.csv: 10 of the 11 images that it names are not there; looked for "
                rf".*{IMAGES}/0/gone.jpg; give the folder that holds them")
    with pytest.raises(ValueError, match=expected):
        affectnet_2017(tmp_path)


def test_each_list_is_judged_alone_and_rows_without_a_face_do_not_count(tmp_path):
    no_face = [affectnet_row(f"1/{i}.jpg", 10) for i in range(30)]
    make_affectnet_2017(tmp_path, training=no_face)
    assert affectnet_2017(tmp_path).skipped == {"not a face": 30}
    many = [affectnet_row("9/v.png", 1)] * 30
    make_affectnet_2017(tmp_path, training=many, validation=[affectnet_row("v/gone.jpg", 1)])
    with pytest.raises(ValueError, match="validation.csv: 1 of the 1 images"):
        affectnet_2017(tmp_path)


def test_the_lists_may_lie_in_their_own_folder_and_have_no_header(tmp_path):
    make_affectnet_2017(tmp_path)
    lists = tmp_path / "Manually_Annotated_file_lists"
    lists.mkdir()
    for name in ("training.csv", "validation.csv"):
        (tmp_path / name).rename(lists / name)
    write(lists / "validation.csv", affectnet_row("9/v.png", 1), affectnet_row("9/v.png", 2))
    found = affectnet_2017(tmp_path)
    assert len(found) == 12 and found.training.tolist() == [True] * 10 + [False] * 2
    assert found.labels.tolist()[-2:] == [4, 5]
    write(tmp_path / "validation.csv", AFFECTNET_HEADER, affectnet_row("9/v.png", 1))
    assert len(affectnet_2017(tmp_path)) == 11                       # a list in the root is taken first


def test_a_first_line_that_is_neither_header_nor_row_is_refused(tmp_path):
    make_affectnet_2017(tmp_path)
    write(tmp_path / "validation.csv", affectnet_row("9/v.png", "happy"))
    with pytest.raises(ValueError, match="validation.csv line 1: got the header '9/v.png,"):
        affectnet_2017(tmp_path)


def photographs(root, *boxes):
    """10 x 8 photographs, column x of grey level 20 x, with these face boxes (x, y, width, height)."""
    (root / IMAGES / "1").mkdir(parents=True)
    rows = []
    for i, box in enumerate(boxes):
        columns = np.tile(np.arange(10, dtype=np.uint8) * 20, (8, 1))
        Image.fromarray(columns).save(root / IMAGES / f"1/{i}.png")
        rows.append(f"1/{i}.png,{','.join(map(str, box))},,1,0,0")
    return make_affectnet_2017(root, training=rows)


def test_faces_are_cut_out_of_whole_photographs_by_their_box_only_if_that_is_asked_for(tmp_path):
    root = photographs(tmp_path, (2, 1, 3, 5), (-4, 6, 6, 9), ("1.0", "1.0", "2", "2"))
    write(root / "validation.csv", AFFECTNET_HEADER)
    whole, = load_faces(settings(affectnet_2017=root))
    assert [whole.read(i).size for i in range(3)] == [(10, 8)] * 3
    cut, = load_faces(settings(affectnet_2017=root, affectnet_crop=True))
    assert [cut.read(i).size for i in range(3)] == [(3, 5), (2, 2), (2, 2)]       # the second is clipped
    assert np.asarray(cut.read(0))[0, :, 0].tolist() == [40, 60, 80]
    assert np.asarray(cut.read(1))[0, :, 0].tolist() == [0, 20]


def test_a_photograph_without_a_usable_face_box_is_left_out_and_counted(tmp_path):
    boxes = [(0, 0, 0, 5), (0, 0, 5, -1), ("", "", "", ""), ("nan", 0, 5, 5), (0, 0, "inf", 5),
             (0, 0, 10 ** 12, 5)]
    found = affectnet_2017(photographs(tmp_path, (0, 0, 5, 5), *boxes), crop=True)
    assert found.paths.tolist() == [b"1/0.png", b"9/v.png"] and found.boxes.tolist()[0] == [0, 0, 5, 5]
    assert found.skipped == {"no usable face box": 6}
    assert len(affectnet_2017(tmp_path)) == 8                        # nobody asks for a box


@pytest.mark.parametrize("box", [(10, 0, 5, 5), (0, 8, 5, 5), (-5, 0, 5, 5), (400, 400, 200, 200)])
def test_a_face_box_outside_of_its_image_is_a_face_that_cannot_be_read(tmp_path, box):
    found = affectnet_2017(photographs(tmp_path, box), crop=True)
    expected = ("1/0.png: the face box .* lies outside of the image, 10 x 8 pixels; if the faces of this "
                "copy are cut out already, set data.affectnet_crop=false")
    with pytest.raises(ValueError, match=expected):
        found.read(0)


def test_the_crop_of_synthetic_faces_is_no_path_that_must_lie_among_them():
    config = Config()
    config.data.synthetic = config.data.affectnet_crop = True
    check_paths(config)


# ---- RAF-DB

def test_a_list_of_raf_db_may_name_the_aligned_files_themselves(tmp_path):
    make_raf_db(tmp_path)
    path = tmp_path / "EmoLabel/list_patition_label.txt"
    path.write_text(path.read_text().replace(".jpg", "_aligned.jpg"))
    found = raf_db(tmp_path)
    assert (found.name, len(found), found.skipped) == ("RAF-DB", 8, {"image not on disk": 1})
    assert found.where(0).endswith("Image/aligned/train_00001_aligned.jpg")


@pytest.mark.parametrize("ending", ["", "_aligned"])
def test_whole_photographs_of_raf_db_are_read_only_where_there_are_no_aligned_ones(tmp_path, ending):
    write(tmp_path / "EmoLabel/list_patition_label.txt", f"train_1{ending}.jpg 5")
    save(tmp_path / "Image/original/train_1.jpg", 30)
    found = raf_db(tmp_path)
    assert found.name == "RAF-DB, whole photographs (no Image/aligned)" and level(found.read(0)) == 30
    save(tmp_path / "Image/aligned/train_1_aligned.jpg", 60)
    found = raf_db(tmp_path)
    assert found.name == "RAF-DB" and level(found.read(0)) == 60


def test_a_list_of_raf_db_without_its_images_is_refused_with_an_example(tmp_path):
    make_raf_db(tmp_path)
    for path in (tmp_path / "Image/aligned").iterdir():
        path.unlink()
    expected = "label.txt: 9 of the 9 images .* looked for .*Image/aligned/train_00001_aligned.jpg; give"
    with pytest.raises(ValueError, match=expected):
        raf_db(tmp_path)


# ---- FER2013

@pytest.mark.parametrize("header, row", [
    ("emotion, Usage, pixels", "3, Training,{}"), ("emotion, Usage, pixels", '3, Training, "{}"'),
    ("Usage,pixels,emotion", "Training,{},3"), ('"emotion", "Usage", "pixels"', '"3", "Training", "{}"'),
    ('"emotion","Usage","pixels"', '"3","Training","{}"')])
def test_the_columns_of_fer2013_are_found_by_their_names(tmp_path, header, row):
    pixels = np.arange(2304) % 251
    path = write(tmp_path / "icml_face_data.csv", header, row.format(" ".join(map(str, pixels))))
    found = fer2013(path)
    assert found.labels.tolist() == [4] and found.training.tolist() == [True]
    assert np.array_equal(np.asarray(found.read(0))[..., 0], pixels.reshape(48, 48))


def fer_folders(root):
    for name in ("train/angry/1.png", "train/happy/2.png", "test/surprise/3.jpg", "test/neutral/4.png"):
        save(root / name, 40)
    return root


def test_fer2013_as_class_folders_is_read_with_labels_by_name(tmp_path):
    found, = load_faces(settings(fer2013=fer_folders(tmp_path)))
    assert found.name == "FER2013, class folders" and found.labels.tolist() == [0, 6, 1, 4]
    assert found.training.tolist() == [False, False, True, True] and level(found.read(0)) == 40


def test_ferplus_is_refused_with_class_folders_which_have_no_order(tmp_path):
    expected = ("data.fer2013 with data.ferplus: .* holds class folders of images, but FER.* in the order of "
                "fer2013.csv; give that file, or")
    with pytest.raises(ValueError, match=expected):
        load_faces(settings(fer2013=fer_folders(tmp_path), ferplus=tmp_path))


# ---- The script

def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["faces.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(faces.__file__, run_name="__main__")
    return end.value.code, capsys.readouterr().out


COUNTED = """\
AffectNet 2017: 11 images, 10 of them for training
  left out: 1 not a face
  sizes of 11: 11 6 x 4
  Neutral 1, Anger 1, Disgust 1, Fear 1, Happiness 2, Sadness 1, Surprise 1, Other 1, no label 2
AffectNet 2021: 9 images, 8 of them for training
  left out: nothing
  sizes of 9: 9 6 x 4
  Neutral 1, Anger 2, Disgust 1, Fear 1, Happiness 1, Sadness 1, Surprise 1, Other 1, no label 0
RAF-DB: 8 images, 7 of them for training
  left out: 1 image not on disk
  sizes of 8: 8 6 x 4
  Neutral 2, Anger 1, Disgust 1, Fear 1, Happiness 1, Sadness 1, Surprise 1, Other 0, no label 0
FER2013: 9 images, 7 of them for training \
(a complete copy: 28,709 Training, 3,589 PublicTest, 3,589 PrivateTest)
  left out: nothing
  sizes of 9: 9 48 x 48
  Neutral 1, Anger 2, Disgust 2, Fear 1, Happiness 1, Sadness 1, Surprise 1, Other 0, no label 0
"""


def every_set(root):
    """The `data` section of a configuration of all sets."""
    make_affectnet_2017(root / "a")
    make_affectnet_2021(root / "b")
    make_raf_db(root / "c/basic")
    make_fer2013(root / "d")
    names = {"affectnet_2017": "a", "affectnet_2021": "b", "raf_db": "c", "fer2013": "d"}
    return {setting: str(root / name) for setting, name in names.items()}


def test_the_script_counts_every_set_of_a_configuration_by_hand_made_counts(tmp_path, monkeypatch, capsys):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"data": every_set(tmp_path)}))
    assert run(monkeypatch, capsys, "--config", tmp_path / "my.yaml") == (0, COUNTED)


def test_the_script_goes_on_after_a_set_that_it_refuses_and_ends_with_code_2(tmp_path, monkeypatch, capsys):
    data = every_set(tmp_path) | {"affectnet_2021": str(tmp_path / "nowhere"), "raf_db": ""}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"data": data}))
    code, said = run(monkeypatch, capsys, "--config", tmp_path / "my.yaml")
    lines = said.splitlines()
    assert code == 2 and lines[4].startswith("refused: data.affectnet_2021: looked for ")
    assert [*lines[:4], *lines[5:]] == COUNTED.splitlines()[:4] + COUNTED.splitlines()[12:]
    (tmp_path / "my.yaml").write_text("{}")
    code, said = run(monkeypatch, capsys, "--config", tmp_path / "my.yaml")
    assert code == 2 and said.startswith("refused: data: no data set is given; set data.affectnet_2017")


def test_the_script_counts_any_folder_and_what_in_it_cannot_be_read(tmp_path, monkeypatch, capsys):
    save(tmp_path / "happy/a.png")
    write(tmp_path / "happy/b.png", "no image")
    assert run(monkeypatch, capsys, tmp_path) == (
        0, f"{tmp_path}: 2 images, 2 of them for training\n  left out: nothing\n"
           "  sizes of 2: 1 6 x 4, 1 not readable\n"
           "  Neutral 0, Anger 0, Disgust 0, Fear 0, Happiness 2, Sadness 0, Surprise 0, Other 0, "
           "no label 0\n")


# ---- Disks

class Failing(io.BytesIO):
    """A file on a disk that fails after the first line."""

    def readline(self, *ignored):
        if self.tell():
            raise OSError(errno.EIO, os.strerror(errno.EIO))         # in the middle, the system names no file
        return super().readline(*ignored)

    __next__ = readline

    def readlines(self, *ignored):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("setting, name", [("affectnet_2017", "training.csv"), ("fer2013", "fer2013.csv"),
                                           ("raf_db", "list_patition_label.txt")])
def test_a_disk_that_fails_in_the_middle_of_a_list_is_no_bad_list_and_the_file_is_named(
        tmp_path, monkeypatch, setting, name):
    data, real = settings(**{setting: every_set(tmp_path)[setting]}), open

    def failing(path, *arguments, **keywords):
        if str(path).endswith(name):
            return Failing(real(path, "rb").read())
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", failing)
    with pytest.raises(OSError, match=name) as error:
        load_faces(data)
    assert error.value.errno == errno.EIO


def test_a_folder_that_may_not_be_opened_is_a_refusal_under_its_setting(tmp_path, monkeypatch):
    def closed(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"data.folders\[0\]: .*Permission denied"):
        load_faces(settings(folders=[str(tmp_path)]))


def tree(root):
    """{path: when it was changed} of everything below root, folders too."""
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_nothing_is_written_into_the_data(tmp_path):
    data = settings(**every_set(tmp_path))
    before = tree(tmp_path)
    for found in load_faces(data):
        assert faces.describe(found) and found.read(0)
    assert tree(tmp_path) == before


def test_a_folder_of_100000_files_of_the_wrong_kind_is_one_count_and_takes_no_memory(tmp_path, monkeypatch):
    def entry(i):
        return SimpleNamespace(name=f"{i:06d}.npy", path=f"{tmp_path}/{i:06d}.npy", is_symlink=lambda: False,
                               is_dir=lambda follow_symlinks: False)

    monkeypatch.setattr(os, "scandir", lambda folder: (entry(i) for i in range(100_000)))
    tracemalloc.start()
    skipped = Counter()
    assert find_images(tmp_path, skipped) == [] and skipped == {"not an image file": 100_000}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6                                                # bytes
    with pytest.raises(ValueError) as refusal:
        load_faces(settings(folders=[str(tmp_path)]))
    assert str(refusal.value).count("\n") == 0 and len(str(refusal.value)) < 300
