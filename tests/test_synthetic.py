"""Drawn data: the same bytes each time, the real layouts and faults, pictures that show what labels say."""

import contextlib
import io
import itertools
import shutil
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datasets import faces, synthetic
from datasets.s_aff_wild2 import FILES, read_annotations, split_labels
from datasets.synthetic import (COMPLETE, SPLITS, STYLES, check_paths, draw_class_face, draw_still,
                                draw_video, is_complete, lists_of, make, videos)
from datasets.synthetic_acting import LABEL_LAG, act, annotate
from datasets.synthetic_face import PIXELS, State, draw_face, person
from engine.settings import Config, Data, Synthetic
from labels import AUS, TASKS, label_files, read_labels
from processes import ALONE, in_team

SMALL = Synthetic(seed=2, train_videos=9, val_videos=9, frames=45, faces=80)
TINY = Synthetic(seed=2, train_videos=4, val_videos=2, frames=12, faces=60)
MANY = Synthetic(seed=6, train_videos=9, val_videos=9, frames=80, faces=200)


def settings(folder, sizes=TINY, **changes) -> Config:
    return Config(synthetic=Synthetic(**{**vars(sizes), **changes, "root": str(folder)}))


def contents(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.*")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """-> the folder of data that are all drawn"""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    make(settings(folder, SMALL), ALONE)
    return folder


# ---- The same each time

def test_one_two_and_three_processes_write_the_same_bytes(tmp_path):
    trees = []
    for world in (1, 2, 3):
        config = settings(tmp_path / str(world))
        assert in_team(world, lambda team: make(config, team))[0] == [0] * world
        trees.append(contents(config.synthetic.root))
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) > 150


def before_frames(video):
    return itertools.takewhile(lambda drawn: isinstance(drawn[1], (str, list)), draw_video(MANY, video))


DRAWN = {                          # checksums of files, then of lists, those of ABAW4 apart
    "frames and labels": (1_922_779_159, None, None, lambda: (draw_video(SMALL, video)
                                                                for video in [*videos(SMALL)][:4])),
    "labels": (587_207_251, None, 3_854_210_063, lambda: (before_frames(video) for video in videos(MANY))),
    "still faces": (2_573_489_907, None, None, lambda: (draw_still(TINY, number) for number in range(60))),
    "more": (None, 2_297_541_102, None, lambda: (draw_still(MANY, number) for number in range(200))),
    "class faces": (2_174_514_670, None, None, lambda: (draw_class_face(TINY, style, n) for style in STYLES
                                                        for n in range(24)))}


@pytest.mark.parametrize("files, stills, frames, draw", DRAWN.values(), ids=DRAWN)
def test_no_bit_of_what_is_drawn_has_changed(files, stills, frames, draw):
    drawn = [item for drawing in draw() for item in drawing]
    lists = [*lists_of(item for item in drawn if isinstance(item[1], list))]
    for expected, items in ((files, [item for item in drawn if not isinstance(item[1], list)]),
                            (stills, lists[:5]), (frames, lists[5:])):
        crc = 0
        for file, content in items:                              # pixels before JPEG, a text, an array
            content = content.encode() if isinstance(content, str) else np.asarray(content).tobytes()
            crc = zlib.crc32(content, zlib.crc32(file.removeprefix("ABAW4/").encode(), crc))
        assert expected in (None, crc)


# ---- Complete, or refused

def test_data_are_complete_only_after_the_lists_which_wait_for_all_pictures(tmp_path, monkeypatch):
    config, seen, rows = settings(tmp_path), [], {}

    def gather(rank, value):
        rows[rank] = value
        seen.append(marks())
        return [rows[0], rows[1]] if rank == 0 else []

    def marks():
        lists = "AffectNet-2017/training.csv", "FERPlus/fer2013new.csv", *(f"ABAW4/{file}" for file in FILES)
        return [is_complete(config), *((tmp_path / name).exists() for name in lists)]

    for rank in (1, 0):
        make(config, SimpleNamespace(rank=rank, world=2, gather=partial(gather, rank),
                                     wait=lambda: seen.append(marks())))
        share = len(contents(tmp_path)) if rank else share       # of the files, drawn by one of two processes
    assert 0.3 < share / len(contents(tmp_path)) < 0.7
    assert seen == [[False] * 5] * 3 + [[True] * 5] and not is_complete(settings(tmp_path, seed=3))
    before = contents(tmp_path)
    shutil.rmtree(tmp_path / "ABAW4")                            # the main data alone, as older versions drew
    assert not is_complete(config)
    make(config, ALONE)
    assert is_complete(config) and contents(tmp_path) == before
    monkeypatch.setattr(synthetic, "lists_of", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):                       # drawn again, and interrupted
        make(config, ALONE)
    assert not is_complete(config)


def test_a_copy_elsewhere_is_complete_and_one_of_other_sizes_or_code_is_not(tmp_path, monkeypatch, root):
    drawn = settings(root, SMALL)
    shutil.copytree((root / COMPLETE).parent, (tmp_path / COMPLETE).parent)
    assert is_complete(drawn) and is_complete(settings(tmp_path, SMALL))
    with pytest.raises(ValueError, match="'train_videos': 9.*expected nothing or .*'train_videos': 4"):
        make(settings(root), ALONE)
    monkeypatch.setattr(synthetic.zlib, "crc32", lambda code: len(code))
    assert not is_complete(drawn)
    with pytest.raises(ValueError, match="holds {.*'code': .*expected nothing or {.*'code': .*; draw into"):
        make(drawn, ALONE)


@pytest.mark.parametrize("name", ["Aff-Wild2", "AffectNet-2017", "AffectNet-2021", "RAF-DB", "FER2013",
                                  "FERPlus", *(f"ABAW4/{name}" for name in (*FILES, "drawn", "real"))])
def test_real_data_are_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds data that is not synthetic, expected nothing or {'root': ''"):
        make(settings(tmp_path, SMALL), ALONE)
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
        assert len(faces.class_folders(root / STYLES[style])) == count
        file, image = next(draw_class_face(SMALL, style, 0))
        image.save(jpeg := io.BytesIO(), "JPEG", quality=90)
        assert (root / file).read_bytes() == jpeg.getvalue()


# ---- What is seen, and what is written about it

@pytest.mark.parametrize("unit", AUS)
def test_each_action_unit_alone_is_visible_where_it_acts_and_hardly_elsewhere(unit):
    # In rows: the eyes are at 31, the nose's tip at 46, the mouth at 58.
    upper = slice(0, 47) if unit == 6 else slice(0, 43)
    rows = upper if unit in (1, 2, 4, 6, 7) else slice(30, PIXELS)
    for p in (person(np.random.default_rng(n)) for n in range(6)):
        acting, rest = (np.asarray(draw_face(p, State(au, noise=0.0), np.random.default_rng(0)), float)
                        for au in (np.eye(12)[AUS.index(unit)], np.zeros(12)))
        change = np.abs(acting - rest).mean(2)                   # (80, 80)
        assert change[rows].sum() > 0.97 * change.sum()
        small = np.asarray(Image.fromarray(change.astype(np.uint8)).resize((48, 48), Image.BOX), float)
        assert small.max() > 12, f"AU{unit} of {p} fades in a 48-pixel picture"


def test_nobody_is_in_two_splits_sets_or_styles(monkeypatch):
    seen, people, sizes = [], [], Synthetic(train_videos=8, val_videos=8, frames=5, faces=40)
    monkeypatch.setattr(synthetic, "draw_face", lambda p, *_: seen.append(p) or Image.new("RGB", (8, 8)))
    for drawing in (*(draw_video(sizes, video) for video in videos(sizes)),
                    *(draw_still(sizes, number) for number in range(40)),
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
