"""Drawn data: the same bytes each time, the real layouts and faults, pictures that show what labels say."""

import contextlib
import io
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datasets import faces, synthetic
from datasets.s_aff_wild2 import FILES, read_annotations, split_labels
from datasets.synthetic import (SPLITS, STYLES, check_paths, draw_class_face, draw_still, draw_video,
                                frame_lists, is_complete, main, make, make_second, played, still_lists,
                                videos)
from datasets.synthetic_acting import LABEL_LAG, act, annotate
from datasets.synthetic_face import SIDE, State, draw_face, person
from engine.settings import Config, Data, Synthetic
from labels import AUS, TASKS, label_files, read_labels
from processes import ALONE, in_team

SMALL = Synthetic(seed=2, train_videos=9, val_videos=9, frames=45, faces=80)
TINY = Synthetic(seed=2, train_videos=4, val_videos=2, frames=12, faces=60)
MANY = Synthetic(seed=6, train_videos=9, val_videos=9, frames=80, faces=700)


def settings(folder, sizes=TINY, **changes) -> Config:
    return Config(synthetic=Synthetic(**{**vars(sizes), **changes, "root": str(folder)}))


def contents(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.*")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """-> the folder of data that are all drawn"""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    main(settings(folder, SMALL), ALONE)
    return folder


# ---- The same each time

def test_one_two_and_three_processes_write_the_same_bytes(tmp_path):
    trees = []
    for world in (1, 2, 3):
        config = settings(tmp_path / str(world))
        assert in_team(world, lambda team: main(config, team))[0] == [0] * world
        trees.append(contents(config.synthetic.root))
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) > 150


DRAWN = {
    "frames and labels": (3_258_148_117, lambda: (draw_video(SMALL, video) for video in videos(SMALL)[:4])),
    "labels": (3_929_270_956, lambda: (played(MANY, video)[2].items() for video in videos(MANY))),
    "still faces": (2_872_623_244, lambda: (draw_still(TINY, number) for number in range(60))),
    "lists of still faces": (3_008_893_896, lambda: [still_lists(MANY)]),
    "lists of frames": (1_076_580_017, lambda: [frame_lists(MANY)]),
    "class faces": (2_623_868_180, lambda: (draw_class_face(TINY, style, n) for style in STYLES
                                            for n in range(24)))}


@pytest.mark.parametrize("expected, draw", DRAWN.values(), ids=DRAWN)
def test_no_bit_of_what_is_drawn_has_changed(expected, draw):
    crc = 0
    for drawing in draw():
        for file, content in drawing:                            # pixels before JPEG, a text, an array
            content = content.encode() if isinstance(content, str) else np.asarray(content).tobytes()
            crc = zlib.crc32(content, zlib.crc32(file.encode(), crc))
    assert crc == expected


# ---- Complete, or refused

@pytest.mark.parametrize("second", [False, True])
def test_data_are_complete_only_after_the_lists_which_wait_for_all_pictures(tmp_path, monkeypatch, second):
    config, seen = settings(tmp_path), []
    draw, folder = (make_second, tmp_path / "ABAW4") if second else (make, tmp_path)
    if second:
        make(config, ALONE)
    lists = FILES if second else ["AffectNet-2017/training.csv", "FERPlus/fer2013new.csv"]
    assert not is_complete(config, second)
    draw(config, SimpleNamespace(rank=1, world=2, wait=lambda: None))
    share = len(contents(folder))                                # of the files, drawn by one of two processes
    draw(config, SimpleNamespace(rank=0, world=2, wait=lambda: seen.append(
        [is_complete(config, second), *((folder / name).exists() for name in lists)])))
    assert 0.3 < share / len(contents(folder)) < 0.7
    assert seen == [[False] * 3, [True] * 3] and not is_complete(settings(tmp_path, seed=3), second)
    monkeypatch.setattr(synthetic, "frame_lists" if second else "still_lists", lambda sizes: 1 / 0)
    with pytest.raises(ZeroDivisionError):                       # drawn again, and interrupted
        draw(config, ALONE)
    assert not is_complete(config, second) and is_complete(config) == second


def test_a_copy_elsewhere_is_complete_and_one_of_other_sizes_or_code_is_not(tmp_path, monkeypatch, root):
    drawn = settings(root, SMALL)
    (tmp_path / "complete.json").write_text((root / "complete.json").read_text())
    assert is_complete(drawn) and is_complete(drawn, second=True) and is_complete(settings(tmp_path, SMALL))
    with pytest.raises(ValueError, match="'train_videos': 9.*expected nothing or .*'train_videos': 4"):
        make(settings(root), ALONE)
    for folder in (tmp_path / "empty", root):
        with pytest.raises(ValueError, match="does not hold the videos .*first.* -m datasets.synthetic"):
            make_second(settings(folder), ALONE)
    monkeypatch.setattr(synthetic.zlib, "crc32", lambda code: len(code))
    assert not is_complete(drawn) and not is_complete(drawn, second=True)
    with pytest.raises(ValueError, match="holds {.*'code': .*expected nothing or {.*'code': .*; draw into"):
        make(drawn, ALONE)


@pytest.mark.parametrize("name", ["Aff-Wild2", "AffectNet-2017", "AffectNet-2021", "RAF-DB", "FER2013",
                                  "FERPlus", *(f"ABAW4/{name}" for name in (*FILES, "drawn", "real"))])
def test_real_data_are_refused_and_left_alone(tmp_path, name, root):
    second = name.startswith("ABAW4")
    if second:
        for mark in ("complete.json", "sizes.json"):
            (tmp_path / mark).write_text((root / mark).read_text())
    (tmp_path / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds data that is not synthetic, expected nothing or {'root': ''"):
        (make_second if second else make)(settings(tmp_path, SMALL), ALONE)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path, inside", [
    ("other", False), ("some/folder2/RAF-DB", False), ("some/folder/../real", False), ("/real", False),
    ("some/folder/a", True), ("{here}/some/folder/b", True), ("", True)])
def test_paths_must_lie_in_the_folder_of_the_drawn_data(path, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = path.format(here=tmp_path)
    for name, value in (("raf_db", path), ("frames", ["some/folder/a", path])):
        config = Config(data=Data(synthetic=True, **{name: value}), synthetic=Synthetic(root="some/folder"))
        expected = rf"^data\.{name}: {path} is not in some/folder \(synthetic\.root\)"
        with contextlib.nullcontext() if inside else pytest.raises(ValueError, match=expected):
            check_paths(config)
        config.data.synthetic = False                            # real data may lie anywhere
        check_paths(config)


# ---- Layouts and faults

def test_the_loaders_of_still_faces_read_every_set(root):
    for load, share, side, name in (
            (faces.affectnet_2017, 0.40, 96, "AffectNet-2017"), (faces.raf_db, 0.25, 100, "RAF-DB"),
            (faces.affectnet_2021, 0.20, 96, "AffectNet-2021"), (faces.fer2013, 0.15, 48, "FER2013")):
        found = load(root / name)
        assert 0.9 * share * SMALL.faces <= len(found) <= share * SMALL.faces
        assert set(found.labels.tolist()) <= set(range(-1, 8)) and {*found.training.tolist()} == {False, True}
        assert found.read(0).size == (side, side) and found.read(0).mode == "RGB"
    assert 0 <= len(found) - len(faces.fer2013(root / "FER2013", root / "FERPlus")) < 3     # what is no face
    for style, count in zip(STYLES, (30, 16)):
        assert len(faces.class_folders(root / "ABAW4" / STYLES[style])) == count
        file, image = next(draw_class_face(SMALL, style, 0))
        image.save(jpeg := io.BytesIO(), "JPEG", quality=90)
        assert (root / "ABAW4" / file).read_bytes() == jpeg.getvalue()


# ---- What is seen, and what is written about it

@pytest.mark.parametrize("unit", AUS)
def test_each_action_unit_alone_is_visible_where_it_acts_and_hardly_elsewhere(unit):
    # In rows: the eyes are at 44, the nose's tip at 64, the mouth at 81.
    upper = slice(0, 66) if unit == 6 else slice(0, 60)
    rows = upper if unit in (1, 2, 4, 6, 7) else slice(42, SIDE)
    for p in (person(np.random.default_rng(n)) for n in range(6)):
        acting, rest = (np.asarray(draw_face(p, State(au, noise=0.0), np.random.default_rng(0)), float)
                        for au in (np.eye(12)[AUS.index(unit)], np.zeros(12)))
        change = np.abs(acting - rest).mean(2)                   # (112, 112)
        assert change[rows].sum() > 0.97 * change.sum()
        small = np.asarray(Image.fromarray(change.astype(np.uint8)).resize((48, 48), Image.BOX), float)
        assert small.max() > 12, f"AU{unit} of {p} fades in a 48-pixel picture"


def test_nobody_is_in_two_splits_sets_or_styles(monkeypatch):
    seen, people, sizes = [], [], Synthetic(train_videos=8, val_videos=8, frames=5, faces=40)
    monkeypatch.setattr(synthetic, "draw_face", lambda p, *_: seen.append(p) or Image.new("RGB", (8, 8)))
    for drawing in (*(draw_video(sizes, video) for video in videos(sizes)),
                    *(draw_still(sizes, number, listed=number >= 34) for number in range(40)),   # FER2013's
                    *(draw_class_face(sizes, style, n) for style in STYLES for n in range(20))):
        assert len(list(drawing)) > 0 and len(set(seen)) <= 1
        people += set(seen)
        seen.clear()
    assert len(set(people)) == len(people) > 90


def test_valence_and_arousal_follow_the_face_late_and_other_labels_at_once():
    rng = np.random.default_rng(0)
    acting = act(rng, 3000, 0)
    labels = {name: rows.astype(float) for name, rows in annotate(rng, acting).items()}
    for i in (0, 1):
        match = [np.corrcoef(acting.shown[:3000 - lag, i], labels["va"][lag:, i])[0, 1] for lag in range(30)]
        assert LABEL_LAG[0] - 2 <= int(np.argmax(match)) <= LABEL_LAG[1] + 2 and max(match) > 0.95
    assert (labels["expr"][:, 0] == acting.expression).all()
    assert acting.au[labels["au"] == 1].min() > acting.au[labels["au"] == 0].max() > 0.3


# ---- The second paper's lists

def test_the_labels_of_the_lists_are_those_of_the_label_files(root):
    compared = dict.fromkeys(TASKS, 0)
    for split, file in zip(SPLITS, FILES):
        found = read_annotations(root / "ABAW4" / file)
        assert found.videos == [video.name for video in videos(SMALL) if video.split == split]
        for v, video in enumerate(found.videos):
            of_video = found.frames[:, 0] == v
            for task, labels in zip(TASKS.values(), split_labels(found.labels[of_video])):
                path = label_files(root / "Aff-Wild2/annotations", task)[SPLITS[split]].get(video)
                if path:
                    theirs = read_labels(path, task)[found.frames[of_video, 1] - 1].astype(np.float32)
                    both = (labels != task.invalid) & (theirs != task.invalid)
                    assert np.array_equal(labels[both], theirs[both])
                    compared[task.name] += both.sum()
                else:
                    assert (labels != task.invalid).any()        # a list has labels that no file has
    assert min(compared.values()) > 60
