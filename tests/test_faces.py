"""Every set of still faces against tiny copies in the real layouts: what each holds, written out by
hand; copies that differ and are read alike; what is refused; all sets as one list, in balance, counted."""

import errno
import os
import re
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from datasets import faces
from datasets.faces import (AFFECTNET_COLUMNS, FERPLUS, affectnet_2017, affectnet_2021, class_folders,
                            fer2013, image_folder, joined, labelled_sets, load_faces, raf_db)
from engine.config import Config
from files import write

IMAGES = "Manually_Annotated_Images"
AFFECTNET_HEADER = ",".join(AFFECTNET_COLUMNS)
LIST = "basic/EmoLabel/list_patition_label.txt"
FERPLUS_HEADER = ",".join(["Usage", "Image name", *FERPLUS])
FLAT = " ".join(["7"] * 2303 + ["8"])


def save(path, grey=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (6, 4), grey)
    image.putpixel((5, 3), grey + 1)                # one single colour would be no face
    image.save(path, "PNG")


def level(face):
    """The grey level of all pixels but one, which says which image it is."""
    _, colour = max(face.getcolors())
    assert face.mode == "RGB" and len(set(colour)) == 1
    return colour[0]


def affectnet_row(file, expression, box=(1, 2, 30, 30)):
    return f"{file},{','.join(map(str, box))},1.0;2.0;3.0,{expression},0.1,-0.2"


def make_affectnet_2017(root, *training):
    """Training rows of the codes 0 to 10, all on disk, or those given; and one validation row, of a face."""
    for code in range(11):
        save(root / IMAGES / f"{code % 3}/t{code}.jpg", code)
    save(root / IMAGES / "9/v.png", 99)
    training = training or [affectnet_row(f"{code % 3}/t{code}.jpg", code) for code in range(11)]
    write(root / "training.csv", AFFECTNET_HEADER, *training)
    write(root / "validation.csv", AFFECTNET_HEADER, affectnet_row("9/v.png", 1))
    return root


def make_affectnet_2021(root):
    for split, codes in (("train_set", range(8)), ("val_set", [6.0])):
        for code in codes:
            save(root / split / f"images/{code}.jpg", int(code) + 10 * (split == "val_set"))
            note = root / split / f"annotations/{code}_exp.npy"
            note.parent.mkdir(exist_ok=True)
            np.save(note, np.array(str(code) if code % 2 else code))                    # as text, or a number
    return root


def make_raf_db(root, place="aligned", ending="_aligned"):
    names = [f"train_{code:05d} {code}" for code in range(1, 8)] + ["test_0001 7", "train_00099 1"]
    for grey, name in enumerate(names[:-1]):
        save(root / f"basic/Image/{place}/{name.split()[0]}{ending}.jpg", grey)
    write(root / LIST, *(name.replace(" ", ".jpg ") for name in names), "", end="\r\n")
    return root


def make_fer2013(root):
    """Eight training rows with the codes 0 to 6 and one of each test part; row i is flat grey of level 10 i.
    FER+ votes for another class each; its last rows are no face, and a tie."""
    usages = ["Training"] * 8 + ["PublicTest", "PrivateTest"]
    votes = [",".join(["8" if k == i else "0" for k in range(9)] + ["2"]) for i in range(8)]
    votes += ["0," * 9 + "10", "5,5" + ",0" * 8]
    write(root / "fer2013.csv", "emotion,pixels,Usage",
          *(f"{i % 7},{f'{10 * i} ' * 2303}1,{usage}" for i, usage in enumerate(usages)))
    write(root / "fer2013new.csv", FERPLUS_HEADER,
          *(f"{usage},{'' if i == 8 else 'fer.png'},{votes[i]}" for i, usage in enumerate(usages)))
    return root


def make_folder(root, names=("Val/d.bmp", "e.gif", "f.jpg", "test/sad/c.jpeg", "train/happy/b.JPG",
                             "train/happy/person 1/a.png", "sad/ANGRER/g.png")):
    for grey, name in enumerate(names):
        save(root / name, grey)
    save(root / ".cache/happy/g.jpg")
    write(root / "notes.txt", "hello")
    return root


# How each set is made and read, and what is left out; then of its faces in their order: the grey level, which
# says which image it is, ABAW's class, and whether it is for training.
SETS = {
    "AffectNet 2017": (make_affectnet_2017, affectnet_2017, {"not a face": 1}, [*range(10), 99],
                       [0, 4, 5, 6, 3, 2, 1, 7, -1, -1, 4], [True] * 10 + [False]),
    "AffectNet 2021": (make_affectnet_2021, affectnet_2021, {}, [*range(8), 16], [0, 4, 5, 6, 3, 2, 1, 7, 1],
                       [True] * 8 + [False]),
    "RAF-DB": (make_raf_db, raf_db, {"image not on disk": 1}, [*range(8)], [6, 3, 2, 4, 5, 1, 0, 0],
               [True] * 7 + [False]),
    "RAF-DB, whole photographs (no Image/aligned)": (
        lambda root: make_raf_db(root, "original", "") / "basic", raf_db, {"image not on disk": 1},
        [*range(8)], [6, 3, 2, 4, 5, 1, 0, 0], [True] * 7 + [False]),
    "FER2013": (make_fer2013, fer2013, {}, [*range(0, 100, 10)], [1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
                [True] * 8 + [False] * 2),
    "FER2013 with FER+ labels": (make_fer2013, lambda root: fer2013(root, root), {"not a face": 1},
                                 [*range(0, 80, 10), 90], [0, 4, 6, 5, 1, 2, 3, 7, -1], [True] * 8 + [False]),
    "folder": (make_folder, image_folder, {"hidden": 1, "not an image file (.txt)": 1}, [0, 1, 2, 6, 3, 4, 5],
               [-1, -1, -1, 1, 5, 4, 4], [False, True, True, True, False, True, True]),
    "class folders": (lambda root: make_folder(root, ["ANGRER/1.png", "DISGUST/1.png", "surprise/a/1.png"]),
                      class_folders, {"hidden": 1, "not an image file (.txt)": 1}, [0, 1, 2], [1, 2, 6],
                      [True] * 3)}


def assert_holds(found, skipped, levels, labels, training):
    assert found.skipped == skipped and found.labels.tolist() == labels
    assert found.training.tolist() == training
    assert [level(found.read(i)) for i in range(len(found))] == levels


@pytest.mark.parametrize("name", SETS)
def test_a_set_holds_its_faces_with_their_labels_in_the_order_of_its_list(tmp_path, name):
    make, read, *expected = SETS[name]
    found = read(make(tmp_path))
    assert_holds(found, *expected)
    assert found.names.dtype.kind == "S" and found.labels.dtype == np.int8
    assert found.name in (name, str(tmp_path))


# ---- Copies that differ

TRAINING, VALIDATION = ("AffectNet 2017", "training.csv"), ("AffectNet 2017", "validation.csv")
OTHER_HEADER = ",".join([*AFFECTNET_COLUMNS[6::-1], *AFFECTNET_COLUMNS[7:]])
OLD_ROW, OTHER_ROW = affectnet_row("9/v.png", 1), "1,1.0;2.0;3.0,30,30,2,1,9/v.png,0.1,-0.2"
QUOTED = "emotion", '"emotion"', ",", '", "', "ing\n", 'ing"\r\n'
ALIKE = [                                  # a set, one of its files, where that is then, texts replaced in it
    (*TRAINING, "training.csv", "\n", "\r\n \r\n", "sub", "\ufeffsub"),
    (*TRAINING, "Manually_Annotated_file_lists/training.csv", AFFECTNET_HEADER + "\n", ""),
    (*VALIDATION, "validation.csv", AFFECTNET_HEADER, OTHER_HEADER, OLD_ROW, OTHER_ROW),
    (*VALIDATION, "validation.csv", "9/v", f" C:\\{IMAGES}\\{IMAGES}\\9\\v"),
    ("RAF-DB", LIST, LIST, ".jpg", "_aligned.jpg", "\r", ""),
    ("FER2013", "fer2013.csv", "fer2013.csv", *QUOTED), ("FER2013", "fer2013.csv", "train.csv"),
    ("FER2013", "fer2013.csv", "fer2013.csv", "emotion,pixels,Usage\n", ""),
    ("FER2013", "fer2013.csv", "icml_face_data.csv", "emotion,pixels,Usage", "emotion, pixels, Usage"),
    ("FER2013 with FER+ labels", "fer2013.csv", "icml_face_data.csv")]


@pytest.mark.parametrize("name, file, place, changes", [(*row[:3], row[3:]) for row in ALIKE])
def test_copies_that_differ_are_read_alike(tmp_path, name, file, place, changes):
    make, read, *expected = SETS[name]
    text = (make(tmp_path) / file).read_bytes().decode()
    for old, new in zip(changes[::2], changes[1::2]):
        text = text.replace(old, new)
    (tmp_path / file).unlink()
    write(tmp_path / place, text, end="")
    assert_holds(read(tmp_path), *expected)


def test_a_train_csv_without_usage_is_all_for_training_and_one_of_other_columns_is_not_read(tmp_path):
    write(tmp_path / "train.csv", "emotion,pixels", f"3,{FLAT}", f"0,{FLAT}")
    assert_holds(fer2013(tmp_path), {}, [7, 7], [4, 1], [True, True])
    assert_holds(fer2013(tmp_path / "train.csv"), {}, [7, 7], [4, 1], [True, True])
    write(tmp_path / "train.csv", "image,label", "happy/a.png,1")
    save(tmp_path / "test/happy/a.png", 5)
    assert_holds(fer2013(tmp_path), {"not an image file (.csv)": 1}, [5], [4], [False])


def test_the_nearest_folder_named_after_an_expression_gives_the_label_whatever_its_case(tmp_path):
    expected = {"ANGRER": 1, "Angry": 1, "Contempt": 7, "disgusted": 2, "fearful": 3, "neutral": 0, "sad": 5,
                "surprised": 6, "other": 7, "3": 5, "banana": 5}
    for name in expected:
        save(tmp_path / "sad" / name / "a.jpg")
    found = fer2013(tmp_path)                                      # which may be class folders of images
    assert {Path(found.where(i)).parent.name: found.labels[i] for i in range(len(found))} == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse a file name that is not UTF-8")
def test_a_file_name_of_any_bytes_is_read(tmp_path):
    save(tmp_path / "ünï.png", 3)
    os.rename(tmp_path / "ünï.png", os.path.join(os.fsencode(tmp_path), b"odd\xff.png"))
    assert level(image_folder(tmp_path).read(0)) == level(joined([image_folder(tmp_path)]).read(0)) == 3


# ---- What is left out, and what is refused

LINK = "link out of the folder (copy with cp -rL, or give the folder it leads to)"


def test_what_is_not_there_or_in_both_lists_is_counted_without_a_look_at_each(tmp_path, monkeypatch):
    gone = ["../training.csv", "/etc/passwd", "out.jpg", *(f"{i}/gone.jpg" for i in range(15))]
    rows = [affectnet_row(file, 1) for file in ["1/t1.jpg", "9/v.png", *gone]]
    make_affectnet_2017(tmp_path, *rows)
    (tmp_path / IMAGES / "out.jpg").symlink_to(tmp_path / "training.csv")
    looked, scandir, realpath = [], os.scandir, os.path.realpath
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: looked.append(str(path)) or scandir(path))
        patch.setattr(os.path, "realpath", lambda path: looked.append(f"real {path}") or realpath(path))
        found = affectnet_2017(tmp_path)
    assert len(looked) == len(set(looked)) == 7    # 0, 1, 2, 9 and above them; root and link resolved
    left_out = {LINK: 1, "in both lists": 1, "image not on disk": 18}
    assert_holds(found, left_out, [1, 99], [4, 4], [True, False])
    no_face = affectnet_row("1/t1.jpg", 10)                                                   # does not count
    make_affectnet_2017(tmp_path, *rows, affectnet_row("gone.jpg", 1), no_face)
    with pytest.raises(ValueError, match=rf"19 of the 21 images .* looked for .*{IMAGES}/../tr.*; give"
                                         rf" .*; left out of this folder: 1 {re.escape(LINK)}$"):
        affectnet_2017(tmp_path)


def affectnet(root, row, header=AFFECTNET_HEADER):
    make_affectnet_2017(root)
    write(root / "training.csv", header, affectnet_row("9/v.png", 1), row)
    return affectnet_2017(root)


def plus(root, change):
    lines = (make_fer2013(root) / "fer2013new.csv").read_text().splitlines()
    write(root / "fer2013new.csv", *change(lines))
    return fer2013(root, root)


def classes(root, names):
    for name in names.split():
        save(root / name)
    return class_folders(root if names != "a.png" else root / "a.png")


COMPLETE = "both must be complete and in their first order"


@pytest.mark.parametrize("read, bad, message", [
    (partial(affectnet, header="file,x"), "", "training.csv line 1: got 'file,x', expected subDirectory_fil"),
    (affectnet, affectnet_row("1/a.jpg", 1) + ",5", r"training.csv line 3: got .*\(ValueError: zip"),
    (affectnet, AFFECTNET_HEADER, "csv line 3: got 'sub"),
    (affectnet, affectnet_row("9/v.png", 11), r"training.csv line 3: .*\(KeyError: '11'\)"),
    (plus, lambda rows: [*rows[:-1], rows[-1][:-1] + "x"], "new.csv line 11: .*invalid literal for int"),
    (plus, lambda rows: rows[:-1], f"new.csv: 9 rows that do not fit the 10 of .*fer2013.csv .*{COMPLETE}"),
    (plus, lambda rows: [rows[0], *rows[:0:-1]], COMPLETE),
    (classes, "FEAR/1.png NEUTRAL/1.png", r"found .*NEUTRAL/1.png; give the folder that holds ANGRER \(or "
     r"ANGER\), DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE and no others"),
    (classes, "contempt/1.png", "found contempt/1.png;"), (classes, "1.png FEAR/1.png", "found 1.png; give"),
    (classes, "FEAR/1.png x/suprise/a/1.png", r"found x/suprise/a/1.png \(suprise: is surprise meant\?\); g"),
    (classes, "Anger_/1.png", r"found Anger_/1.png \(anger_: is anger meant\?\); give"),
    (classes, "", "found no image; give"), (classes, "a.png", "found no image; give")])
def test_bad_data_is_refused_with_a_message_that_names_it(tmp_path, read, bad, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, bad)


# ---- Faces

def test_faces_are_cut_out_by_their_box_clipped_to_the_image_if_that_is_asked_for_and_possible(tmp_path):
    boxes = [(2, 1, 3, 5), (-4, 6, 6, 9), ("1.0", "1.0", "2", "2"), (8, 7, 10, 1),              # read
             (10, 0, 5, 5), (0, 8, 5, 5), (-5, 0, 5, 5), (0, -5, 5, 5),                         # outside
             (0, 0, 0, 5), (0, 0, 5, 0), (0, 0, -1, 5), ("",) * 4, ("nan", 0, 5, 5), (10 ** 12, 0, 5, 5)]
    make_affectnet_2017(tmp_path, *(affectnet_row(f"1/{i}.png", 1, box) for i, box in enumerate(boxes)))
    for i in range(len(boxes)):             # 10 x 8 pixels, column x of grey level 20 x
        picture = np.tile(np.arange(10, dtype=np.uint8) * 20, (8, 1))
        Image.fromarray(picture).save(tmp_path / IMAGES / f"1/{i}.png")
    found = affectnet_2017(tmp_path, crop=True)
    assert [found.read(i).size for i in range(4)] == [(3, 5), (2, 2), (2, 2), (2, 1)]
    assert [np.asarray(found.read(i))[0, :, 0].tolist() for i in (0, 1)] == [[40, 60, 80], [0, 20]]
    for i in range(4, 8):
        with pytest.raises(ValueError, match=f"1/{i}.png: 10 x 8 pixels, outside of the face box .*=false"):
            found.read(i)
    assert found.skipped == {"no usable face box": 6}
    for crop, size, n in ((True, (3, 5), 9), (False, (10, 8), 15)):
        found, = load_faces(replace(Config().data, affectnet_2017=str(tmp_path), affectnet_crop=crop))
        assert found.read(0).size == size and len(found) == n


def test_affectnet_2021_opens_labels_if_they_are_asked_for_and_keeps_images_whose_label_is_broken(tmp_path):
    notes = make_affectnet_2021(tmp_path) / "train_set/annotations"
    (notes / "0_exp.npy").unlink()
    (notes / "1_exp.npy").write_bytes((notes / "1_exp.npy").read_bytes()[:40])
    (notes / "2_exp.npy").write_bytes(b"")
    np.save(notes / "3_exp.npy", np.array(3, dtype=object), allow_pickle=True)    # a pickle could run code
    for i, wrong in {4: 10, 5: 3.5, 6: [1, 2], 7: float("nan")}.items():
        np.save(notes / f"{i}_exp.npy", np.array(wrong))
    assert affectnet_2021(tmp_path).labels.tolist() == [-1] * 8 + [1]
    assert affectnet_2021(tmp_path, labels=False).labels.tolist() == [-1] * 9


@pytest.mark.parametrize("part, example", [("train", "8 .*notations/0"), ("val", "1 .*notations/6.0")])
def test_where_the_labels_of_affectnet_2021_should_lie_is_said_where_they_are_needed(tmp_path, part, example):
    data = replace(Config().data, affectnet_2021=str(make_affectnet_2021(tmp_path)))
    assert {*labelled_sets(data)[0].labels} == {*range(8)} and {*load_faces(data)[0].labels} == {-1}
    assert "Anger 2, Disgust 1" in next(faces.describe(data))
    (tmp_path / f"{part}_set/annotations").rename(tmp_path / "notes")
    with pytest.raises(ValueError, match=f"^data.affectnet_2021: none of {example}_exp.npy; lay"):
        labelled_sets(data)
    assert len(load_faces(data)[0]) == 9 and f"no label {example[0]}" in next(faces.describe(data))
    (tmp_path / f"{part}_set/images").rename(tmp_path / "images")     # no image, so no label is missing
    (tmp_path / f"{part}_set/images").mkdir()
    assert len(labelled_sets(data)[0]) == 9 - int(example[0])


def test_fer2013s_pixels_run_from_left_to_right_and_stay_in_the_csv(tmp_path):
    pixels = np.arange(2304) % 251
    broken = [f"7 {first} {FLAT[4:]},0,Training" for first in ("256", "-1", "x", "1.5", "")]
    path = write(tmp_path / "fer2013.csv", "pixels,emotion,Usage", f"{' '.join(map(str, pixels))},0,Training",
                 *broken, f"{'7 ' * 2303}7,3,Training", f"{FLAT},3,Training")
    found = fer2013(tmp_path)
    assert np.array_equal(np.asarray(found.read(0))[..., 0], pixels.reshape(48, 48))
    assert level(found.read(-1)) == 7
    for i in range(1, 6):
        with pytest.raises(ValueError, match=f"fer2013.csv line {i + 2} .*expected 2,304 whole numbers"):
            found.read(i)
    with pytest.raises(ValueError, match="fer2013.csv line 8 .*: one single colour; no face"):
        found.read(6)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="fer2013.csv"):         # not a broken row, which is left out
        found.read(0)
    with pytest.raises(ValueError, match="line 1: got .* 2303 pixels, not 2,304 with one space between two"):
        fer2013(write(path, f"0,{FLAT[2:]},Training"))


def test_other_names_boxes_or_sizes_have_another_fingerprint_and_another_place_has_the_same(tmp_path):
    found, same, boxed, _ = (image_folder(make_folder(tmp_path / name)) for name in "abcd")
    assert found.fingerprint() == same.fingerprint() and found.fingerprint().startswith("7 images, names ")
    boxed.boxes = boxed.boxes + 1
    (tmp_path / "b/f.jpg").write_bytes(b"another size")
    (tmp_path / "d/f.jpg").rename(tmp_path / "d/g.jpg")
    assert len({one.fingerprint() for one in (found, same, boxed, image_folder(tmp_path / "d"))}) == 4


# ---- All sets

def settings(root, **given):
    """The `data` section of a configuration of every set."""
    sets = {"affectnet_2017": make_affectnet_2017, "affectnet_2021": make_affectnet_2021,
            "raf_db": make_raf_db, "fer2013": make_fer2013}
    every = {name: str(make(root / name)) for name, make in sets.items()}
    return replace(Config().data, **every | {"folders": [str(make_folder(root / "e"))]} | given)


def test_several_sets_are_one_list_in_the_order_of_the_settings(tmp_path):
    sets = load_faces(settings(tmp_path, folders=[f"{tmp_path}/e"] * 2))
    whole, parts = joined(sets), [(found, i) for found in sets for i in range(len(found))]
    assert [found.setting for found in sets] == ["data.affectnet_2017", "data.affectnet_2021", "data.raf_db",
                                                 "data.fer2013", "data.folders[0]", "data.folders[1]"]
    assert len(whole) == len(parts) == 52
    for place, (found, i) in enumerate(parts):
        assert whole.where(place) == found.where(i) and level(whole.read(place)) == level(found.read(i))
        assert (whole.labels[place], whole.training[place]) == (found.labels[i], found.training[i])
    assert [found.name for found in labelled_sets(settings(tmp_path))] == ["AffectNet 2017", "AffectNet 2021"]


@pytest.mark.parametrize("setting, image, file", [
    ("raf_db", "train/1/a.png", "/EmoLabel/list_patition_label.txt"), ("ferplus", "h/a.png", "/fer2013.csv"),
    ("affectnet_2017", "Train/happy/a.png", "/training.csv"), ("affectnet_2021", "val/0/a.png", "t/images")])
def test_a_copy_as_class_folders_is_refused_with_a_way_to_read_it(tmp_path, setting, image, file):
    save(tmp_path / image)
    with pytest.raises(ValueError, match=rf"^data.*{file}'; layouts: .*; this looks like class folders "
                                         rf"\(.*/{image}\): data.folders reads it to pre-train"):
        load_faces(replace(Config().data, **{setting: str(tmp_path)}))


def test_all_problems_are_told_at_once_each_after_its_setting(tmp_path):
    gone = str(tmp_path / "gone")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.jpg").symlink_to(tmp_path / "f.jpg")
    names = ("affectnet_2017", "affectnet_2021", "raf_db", "fer2013", "ferplus")
    folders = [gone, f"{tmp_path}/e", f"{tmp_path}/links", f"{tmp_path}/e/f.jpg"]
    with pytest.raises(ValueError) as refusal:
        load_faces(settings(tmp_path, folders=folders, **dict.fromkeys(names, gone)))
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "data.affectnet_2017", "data.affectnet_2021", "data.raf_db", "data.fer2013", "data.folders[0]",
        "data.folders[2]", "data.folders[3]"]
    assert all(line.endswith("; layouts: docs/data.md") for line in lines)
    assert all("No such file or directory" in line for line in lines[:5]) and "Not a directory" in lines[6]
    assert f"no image found in {tmp_path}/links; left out: 1 {LINK}; lay" in lines[5]
    with pytest.raises(ValueError, match="data: no data set is given; set data.affectnet_2017"):
        load_faces(Config().data)
    with pytest.raises(ValueError, match="no labelled still faces: give data.affectnet_2017 or data."):
        labelled_sets(Config().data)
    with pytest.raises(ValueError, match="data.fer2013: .*No such file .*fer2013.csv"):        # FER+ alone
        load_faces(replace(Config().data, ferplus=str(tmp_path)))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_fails_is_no_wrong_setting_but_a_folder_that_may_not_be_opened_is(
        tmp_path, monkeypatch, number):
    def fail(folder):
        raise OSError(number, os.strerror(number), str(folder))
    data = settings(tmp_path)
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ValueError if number == errno.EACCES else OSError, match=os.strerror(number)):
        load_faces(data)


COUNTED = """\
{}: 7 images, 5 for training
  left out: 1 hidden, 1 not an image file (.txt)
  sizes of 7: 6 6 x 4, 1 not readable
  Neutral 0, Anger 1, Disgust 0, Fear 0, Happiness 2, Sadness 1, Surprise 0, Other 0, no label 3
"""


def test_the_command_counts_every_set_of_a_configuration_or_any_folder(tmp_path, monkeypatch, capsys):
    folder = str(make_folder(tmp_path / "e"))
    (tmp_path / "e/e.gif").write_text("no image")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"data": {"folders": [folder]}}))
    for words in (["--config", f"{tmp_path}/my.yaml"], [folder]):
        monkeypatch.setattr(sys, "argv", ["faces", *words])
        runpy.run_path(faces.__file__, run_name="__main__")
        assert capsys.readouterr().out == COUNTED.format(folder)
