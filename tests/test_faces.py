"""The loaders against tiny files in the real layout: labels, splits, counts, refusals. FER2013 has a file of
its own."""

import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from affectnet import affectnet_2017, affectnet_2021
from face_set import image_folder
from faces import load_faces
from labels import EXPRESSIONS
from raf_db import raf_db

AFFECTNET_HEADER = ("subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,"
                    "expression,valence,arousal")


def save(path, grey=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), grey).save(path)


def write(path, *lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(end.join([*lines, ""]).encode())
    return path


def settings(**given):
    data = dict(affectnet_2017="", affectnet_crop=False, affectnet_2021="", raf_db="", fer2013="", ferplus="",
                folders=[])
    for name, value in given.items():
        data[name] = str(value) if isinstance(value, os.PathLike) else value
    return SimpleNamespace(**data)


def level(face):
    """The one grey level of a flat image, which says which image it is."""
    assert face.mode == "RGB"
    (_, colour), = face.getcolors()
    return colour[0]


def make_fer2013(folder, end="\n"):
    """Seven training rows with the codes 0-6 and one of each test part; row i is flat grey of level 10 i."""
    usages = ["Training"] * 7 + ["PublicTest", "PrivateTest"]
    lines = [f"{i % 7},{' '.join([str(10 * i)] * 2304)},{usage}" for i, usage in enumerate(usages)]
    return write(folder / "fer2013.csv", "emotion,pixels,Usage", *lines, end=end)


# ---- AffectNet 2017

def affectnet_row(file, expression):
    return f"{file},1,2,30,30,1.0;2.0;3.0,{expression},0.1,-0.2"


def make_affectnet_2017(root, training=None, validation=None, end="\n"):
    """Training rows with the codes 0-10 in order, all on disk, and one validation row."""
    if training is None:
        training = [affectnet_row(f"{code % 3}/t{code}.jpg", code) for code in range(11)]
        for code in range(11):
            save(root / "Manually_Annotated_Images" / f"{code % 3}" / f"t{code}.jpg", code)
    save(root / "Manually_Annotated_Images/9/v.png", 99)
    write(root / "training.csv", AFFECTNET_HEADER, *training, end=end)
    write(root / "validation.csv", AFFECTNET_HEADER, *(validation or [affectnet_row("9/v.png", 1)]), end=end)
    return root


def test_affectnet_2017_maps_each_code_and_leaves_out_no_face_rows(tmp_path):
    found = affectnet_2017(make_affectnet_2017(tmp_path))
    assert found.name == "AffectNet 2017" and len(found) == 11
    names = [EXPRESSIONS[label] if label >= 0 else None for label in found.labels]
    assert names == ["Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger", "Other",
                     None, None, "Happiness"]
    assert found.labels.dtype == np.int8
    assert found.training.tolist() == [True] * 10 + [False]
    assert found.skipped == {"not a face": 1}
    assert level(found.read(10)) == 99 and found.where(10).endswith("9/v.png")


def test_affectnet_2017_leaves_out_and_counts_images_that_are_not_on_disk(tmp_path):
    make_affectnet_2017(tmp_path)
    (tmp_path / "Manually_Annotated_Images/1/t4.jpg").unlink()
    rows = affectnet_row("9/v.png", 1), affectnet_row("77/none.jpg", 2)
    write(tmp_path / "validation.csv", AFFECTNET_HEADER, *rows)
    found = affectnet_2017(tmp_path)
    assert len(found) == 10 and found.skipped == {"not a face": 1, "image not on disk": 2}


def test_affectnet_2017_scans_each_folder_once(tmp_path, monkeypatch):
    make_affectnet_2017(tmp_path)
    scanned, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: scanned.append(folder) or scandir(folder))
    affectnet_2017(tmp_path)
    assert len(scanned) == 4      # the folders 0, 1, 2 and 9


def test_carriage_returns_a_byte_order_mark_and_blank_lines_change_nothing(tmp_path):
    make_affectnet_2017(tmp_path, end="\r\n")
    path = tmp_path / "training.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n  \r\n\r\n")
    assert len(affectnet_2017(tmp_path)) == 11


@pytest.mark.parametrize("lines, message", [
    (["file,x"], r"line 1: got the header 'file,x', expected 'subDirectory_filePath,"),
    ([], r"line 1: got the header '', expected 'subDirectory_filePath,"),
    (["", AFFECTNET_HEADER], r"line 1: got the header ''"),
    ([AFFECTNET_HEADER, "1/a.jpg,1,2"], r"line 2: got 3 fields, expected 9"),
    ([AFFECTNET_HEADER, affectnet_row("1/a.jpg", 1) + ",5"], r"line 2: got 10 fields, expected 9"),
    ([AFFECTNET_HEADER, ",,,"], r"line 2: got 4 fields, expected 9"),
    ([AFFECTNET_HEADER, affectnet_row("1/a.jpg", 1), affectnet_row("1/a.jpg", "happy")],
     r"line 3: got 'happy'"),
    ([AFFECTNET_HEADER, affectnet_row("1/a.jpg", 11)],
     r"line 2: got '11', expected a whole number from 0 to 10"),
    ([AFFECTNET_HEADER, affectnet_row("1/a.jpg", "")],
     r"line 2: got '', expected a whole number from 0 to 10"),
    ([AFFECTNET_HEADER, affectnet_row("../a.jpg", 1)], r"line 2: '\.\.' leaves its data root"),
    ([AFFECTNET_HEADER, affectnet_row("1/../../a.jpg", 1)], r"line 2: .* leaves its data root"),
    ([AFFECTNET_HEADER, affectnet_row("/a.jpg", 1)], r"line 2: .* leaves its data root"),
    ([AFFECTNET_HEADER, affectnet_row("/etc/passwd", 1)], r"line 2: .* leaves its data root"),
])
def test_a_broken_list_is_refused_with_its_file_and_line(tmp_path, lines, message):
    make_affectnet_2017(tmp_path, training=[])
    (tmp_path / "training.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="training.csv " + message):
        affectnet_2017(tmp_path)


def test_a_listed_link_that_leads_out_of_the_root_is_refused(tmp_path):
    root = make_affectnet_2017(tmp_path / "set", training=[affectnet_row("1/link.jpg", 1)])
    save(tmp_path / "private.jpg")
    (root / "Manually_Annotated_Images/1").mkdir()
    (root / "Manually_Annotated_Images/1/link.jpg").symlink_to(tmp_path / "private.jpg")
    with pytest.raises(ValueError, match=r"training.csv line 2: '1/link.jpg' leaves its data root"):
        affectnet_2017(root)
    (root / "Manually_Annotated_Images/2").symlink_to(tmp_path)
    write(root / "training.csv", AFFECTNET_HEADER, affectnet_row("2/private.jpg", 1))
    with pytest.raises(ValueError, match=r"training.csv line 2: '2' leaves its data root"):
        affectnet_2017(root)


# ---- AffectNet 2021

def make_affectnet_2021(root):
    for code in range(8):
        save(root / f"train_set/images/{code}.jpg", code)
        (root / "train_set/annotations").mkdir(exist_ok=True)
        label = str(code) if code % 2 else code
        np.save(root / f"train_set/annotations/{code}_exp.npy", np.array(label))
    save(root / "val_set/images/3.jpg", 33)
    (root / "val_set/annotations").mkdir()
    np.save(root / "val_set/annotations/3_exp.npy", np.array([6.0]))
    return root


def test_affectnet_2021_maps_text_and_numbers_alike(tmp_path):
    found = affectnet_2021(make_affectnet_2021(tmp_path))
    assert found.labels.tolist() == [0, 4, 5, 6, 3, 2, 1, 7, 1] and found.labels.dtype == np.int8
    assert found.training.tolist() == [True] * 8 + [False]
    assert level(found.read(8)) == 33 and not found.skipped


def test_affectnet_2021_opens_no_annotation_until_labels_are_asked_for(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an annotation was opened")
    monkeypatch.setattr(np.lib.format, "read_array", refuse)
    found = affectnet_2021(make_affectnet_2021(tmp_path))
    assert len(found) == 9 and level(found.read(5)) == 5
    with pytest.raises(AssertionError, match="was opened"):
        found.labels


def test_affectnet_2021_keeps_images_whose_annotation_is_missing_broken_or_pickled(tmp_path):
    make_affectnet_2021(tmp_path)
    notes = tmp_path / "train_set/annotations"
    (notes / "0_exp.npy").unlink()
    (notes / "1_exp.npy").write_bytes((notes / "1_exp.npy").read_bytes()[:40])
    (notes / "2_exp.npy").write_bytes(b"")
    np.save(notes / "3_exp.npy", np.array(3, dtype=object), allow_pickle=True)    # a pickle could run code
    np.save(notes / "4_exp.npy", np.array(8))
    np.save(notes / "5_exp.npy", np.array(3.5))
    np.save(notes / "6_exp.npy", np.array([1, 2]))
    np.save(notes / "7_exp.npy", np.array(float("nan")))
    found = affectnet_2021(tmp_path)
    assert found.labels.tolist() == [-1] * 8 + [1]
    assert found.skipped == {"annotation missing or broken (image kept)": 8}


# ---- RAF-DB

def make_raf_db(basic):
    lines = [f"train_{code:05d}.jpg {code}" for code in range(1, 8)]
    lines += ["test_0001.jpg 7", "train_00099.jpg 1"]
    for code in range(1, 8):
        save(basic / f"Image/aligned/train_{code:05d}_aligned.jpg", code)
    save(basic / "Image/aligned/test_0001_aligned.jpg", 70)
    write(basic / "EmoLabel/list_patition_label.txt", *lines, "", end="\r\n")


@pytest.mark.parametrize("given", ["", "basic"])
def test_raf_db_is_read_from_its_root_or_from_basic(tmp_path, given):
    make_raf_db(tmp_path / "basic")
    found = raf_db(tmp_path / given)
    assert [EXPRESSIONS[label] for label in found.labels] == [
        "Surprise", "Fear", "Disgust", "Happiness", "Sadness", "Anger", "Neutral", "Neutral"]
    assert found.training.tolist() == [True] * 7 + [False]
    assert level(found.read(7)) == 70
    assert found.skipped == {"image not on disk": 1}


@pytest.mark.parametrize("line, message", [
    ("train_00001.jpg", "line 1: got 'train_00001.jpg', expected a line like"),
    ("train_00001.jpg 5 6", "line 1: got .* expected a line like"),
    ("face_00001.jpg 5", "line 1: got .* begins with train_ or test_"),
    ("train_00001.jpg 0", "line 1: got '0', expected a whole number from 1 to 7"),
    ("train_00001.jpg 8", "line 1: got '8', expected a whole number from 1 to 7"),
    ("train_00001.jpg five", "line 1: got 'five'"),
    ("train_/../../../../secret.jpg 5", "line 1: .* leaves its data root"),
])
def test_a_broken_line_of_raf_db_is_refused(tmp_path, line, message):
    make_raf_db(tmp_path)
    write(tmp_path / "EmoLabel/list_patition_label.txt", line)
    with pytest.raises(ValueError, match="list_patition_label.txt " + message):
        raf_db(tmp_path)


# ---- Any folder

def test_class_folders_are_mapped_by_name_whatever_their_case(tmp_path):
    expected = {"ANGRER": 1, "Angry": 1, "anger": 1, "Contempt": 7, "DISGUST": 2, "fear": 3, "Happy": 4,
                "happiness": 4, "neutral": 0, "SADNESS": 5, "sad": 5, "surprise": 6, "other": 7,
                "3": -1, "banana": -1}
    for name in expected:
        above = tmp_path / "sad" if expected[name] >= 0 else tmp_path      # of two, the nearest folder counts
        save(above / name / "a.jpg")
    found = image_folder(tmp_path)
    names = [os.path.basename(os.path.dirname(found.where(i))) for i in range(len(found))]
    assert dict(zip(names, found.labels.tolist(), strict=True)) == expected


def test_nested_folders_give_split_and_label_and_other_files_are_counted(tmp_path):
    for name in ("train/happy/b.JPG", "train/happy/person 1/a.png", "test/sad/c.jpeg", "Val/d.bmp", "e.webp",
                 "f.jpg"):
        save(tmp_path / name)
    save(tmp_path / ".cache/happy/g.jpg")
    write(tmp_path / "train/notes.txt", "hello")
    found = image_folder(tmp_path)
    names = [os.path.relpath(found.where(i), tmp_path) for i in range(6)]
    assert list(zip(names, found.labels.tolist(), found.training.tolist())) == [
        ("Val/d.bmp", -1, False), ("e.webp", -1, True), ("f.jpg", -1, True), ("test/sad/c.jpeg", 5, False),
        ("train/happy/b.JPG", 4, True), ("train/happy/person 1/a.png", 4, True)]
    assert len(found) == 6 and found.skipped == {"hidden": 1, "not an image file": 1}
    assert all(found.read(i).size == (6, 4) for i in range(6))


def test_the_order_does_not_depend_on_the_order_of_the_disk(tmp_path, monkeypatch):
    for i in (3, 11, 2, 1):
        save(tmp_path / f"{i % 2}/{i}.png")
    first = image_folder(tmp_path).paths.tolist()
    scandir = os.scandir

    def backwards(folder):
        return sorted(scandir(folder), key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", backwards)
    assert image_folder(tmp_path).paths.tolist() == first == sorted(first)


def test_links_that_lead_out_are_left_out_and_links_within_are_read(tmp_path):
    save(tmp_path / "outside/private.jpg")
    root = tmp_path / "faces"
    save(root / "a.jpg", 5)
    (root / "out.jpg").symlink_to(tmp_path / "outside/private.jpg")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "within.jpg").symlink_to(root / "a.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "gone.jpg").symlink_to(root / "nothing.jpg")
    found = image_folder(root)
    assert found.paths.tolist() == [b"a.jpg", b"within.jpg"] and level(found.read(1)) == 5
    assert found.skipped == {"link out of the folder": 2, "link to no file": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse a file name that is not UTF-8")
def test_paths_are_one_array_of_bytes_and_a_name_of_any_bytes_is_read(tmp_path):
    save(tmp_path / "ünï.png", 3)
    odd = os.path.join(os.fsencode(tmp_path), b"odd\xff.png")
    with open(tmp_path / "ünï.png", "rb") as source, open(odd, "wb") as copy:
        copy.write(source.read())
    found = pickle.loads(pickle.dumps(image_folder(tmp_path)))
    assert found.paths.dtype.kind == "S" and found.paths.nbytes == 2 * len("ünï.png".encode())
    assert [level(found.read(i)) for i in range(2)] == [3, 3]


def test_an_unreadable_image_is_listed_and_refused_with_its_name_when_it_is_read(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.jpg: not a readable image"):
        image_folder(tmp_path).read(0)


# ---- Any mix of them

def test_any_mix_of_sets_is_loaded_in_one_order(tmp_path):
    make_affectnet_2017(tmp_path / "a")
    make_affectnet_2021(tmp_path / "b")
    make_raf_db(tmp_path / "c/basic")
    make_fer2013(tmp_path / "d")
    save(tmp_path / "e/happy/x.jpg")
    save(tmp_path / "f/y.jpg")
    data = settings(affectnet_2017=tmp_path / "a", affectnet_2021=tmp_path / "b", raf_db=tmp_path / "c",
                    fer2013=tmp_path / "d/fer2013.csv", folders=[str(tmp_path / "e"), str(tmp_path / "f")])
    sets = load_faces(data)
    assert [(found.name, len(found)) for found in sets[:4]] == [
        ("AffectNet 2017", 11), ("AffectNet 2021", 9), ("RAF-DB", 8), ("FER2013", 9)]
    assert [found.name for found in sets[4:]] == data.folders
    for found in sets:
        assert len(found.labels) == len(found.training) == len(found)
        assert found.read(len(found) - 1).mode == "RGB"


def test_all_missing_paths_are_reported_at_once_with_their_settings(tmp_path):
    gone, empty = str(tmp_path / "gone"), tmp_path / "empty"
    empty.mkdir()
    data = settings(affectnet_2017=gone, affectnet_2021=gone, raf_db=gone, fer2013=gone,
                    folders=[gone, str(empty)])
    with pytest.raises(ValueError) as refusal:
        load_faces(data)
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "data.affectnet_2017", "data.affectnet_2021", "data.raf_db", "data.fer2013",
        "data.folders[0]", "data.folders[1]"]
    assert all("which is not there; give " in line for line in lines[:5])
    assert "looked for" in lines[2] and "list_patition_label.txt" in lines[2]
    assert "no image found" in lines[5]


def test_no_set_at_all_and_a_set_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no data set is given; set data.affectnet_2017"):
        load_faces(settings())
    (tmp_path / "Manually_Annotated_Images").mkdir()
    write(tmp_path / "training.csv", AFFECTNET_HEADER, affectnet_row("1/a.jpg", 1))
    write(tmp_path / "validation.csv", AFFECTNET_HEADER)
    with pytest.raises(ValueError, match="data.affectnet_2017: .*training.csv: 1 of the 1 images"):
        load_faces(settings(affectnet_2017=tmp_path))
    write(tmp_path / "training.csv", AFFECTNET_HEADER, affectnet_row("1/a.jpg", 10))
    with pytest.raises(ValueError, match="data.affectnet_2017: no image found .*'not a face': 1"):
        load_faces(settings(affectnet_2017=tmp_path))
