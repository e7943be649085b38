"""Drawn data is the same each time, lies in the real layouts with the real faults, and shows what its labels say."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import faces
import synthetic
from synthetic import AUS, EXPRESSIONS, LABEL_LAG, SIDE, STILL, TASKS, TRAIN, VAL, Drawn, State
from drawing import eyes
from synthetic import act, annotate, draw, draw_face, draw_video, index, is_complete, person, spoil, still, videos

SMALL = Drawn(train_videos=9, val_videos=3, frames=90, faces=120)
TINY = Drawn(train_videos=2, val_videos=1, frames=12, faces=30)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    draw(folder, SMALL)
    index(folder, SMALL)
    return folder


def contents(folder: Path) -> dict:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def labels(root, video, task):
    split = {TRAIN: "Train_Set", VAL: "Validation_Set"}[video.split]
    text = (root / "Aff-Wild2/annotations" / TASKS[task][0] / split / f"{video.name}.txt").read_text()
    header, *rows = text.splitlines()
    return header, np.array([row.split(",") for row in rows], float)


def frame_numbers(root, video):
    return sorted(int(f.stem) for f in (root / "Aff-Wild2/cropped_aligned" / video.name).iterdir())


def someone(n=0):
    return person(np.random.default_rng([7, n]))


def picture(p, au, **state) -> np.ndarray:
    return np.asarray(draw_face(p, State(au, noise=0.0, **state), np.random.default_rng(0)), float)


# ---- The same each time.

def test_one_process_and_two_write_the_same_bytes(tmp_path):
    for folder, world in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        for rank in reversed(range(world)):
            draw(folder, TINY, rank, world)
        index(folder, TINY)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_shares_of_two_processes_are_disjoint(tmp_path):
    for rank in (0, 1):
        draw(tmp_path / str(rank), TINY, rank, world=2)
    shared = contents(tmp_path / "0").keys() & contents(tmp_path / "1").keys()
    assert shared == {"sizes.json"}


def test_another_seed_draws_other_people():
    assert still(TINY, 3).person == still(TINY, 3).person
    assert still(TINY, 3).person != still(Drawn(faces=30, seed=1), 3).person


def test_a_drawing_is_complete_only_after_the_index_and_only_for_its_sizes(tmp_path):
    assert not is_complete(tmp_path, TINY)
    draw(tmp_path, TINY)
    assert not is_complete(tmp_path, TINY)
    index(tmp_path, TINY)
    assert is_complete(tmp_path, TINY) and not is_complete(tmp_path, SMALL)
    draw(tmp_path, TINY)                                    # drawn again: incomplete until indexed again
    assert not is_complete(tmp_path, TINY)


def test_a_folder_with_a_drawing_of_other_sizes_or_with_real_data_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="'train_videos': 9.*'train_videos': 2.*new folder"):
        draw(root, TINY)
    (tmp_path / "RAF-DB").mkdir()
    with pytest.raises(ValueError, match="was not drawn"):
        draw(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == [tmp_path / "RAF-DB"]


# ---- The layouts.

def test_frames_are_112_pixel_colour_jpegs_with_five_digits(root):
    for video in videos(SMALL):
        for file in (root / "Aff-Wild2/cropped_aligned" / video.name).iterdir():
            assert len(file.stem) == 5 and file.suffix == ".jpg" and int(file.stem) >= 1
    with Image.open(file) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))


def test_label_files_have_the_real_headers_and_a_line_per_frame(root):
    headers = {"VA": "valence,arousal", "EXPR": "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other",
               "AU": "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"}
    for video in videos(SMALL):
        for task in video.tasks:
            header, values = labels(root, video, task)
            assert header == headers[task] and len(values) == video.frames
            valid = values[values[:, 0] != {"VA": -5, "EXPR": -1, "AU": -1}[task]]
            lowest, highest = {"VA": (-1, 1), "EXPR": (0, 7), "AU": (0, 1)}[task]
            assert len(valid) and valid.min() >= lowest and valid.max() <= highest
            assert task == "VA" or (valid == valid.round()).all()


def test_the_faults_of_real_videos_all_occur(root):
    plan = videos(SMALL)
    invalid = {task: [(labels(root, v, task)[1] == code).all(1).any() for v in plan if task in v.tasks]
               for task, code in (("VA", -5), ("EXPR", -1), ("AU", -1))}
    assert all(any(found) and not all(found) for found in invalid.values())
    assert any(set(range(1, v.frames + 1)) - set(frame_numbers(root, v)) for v in plan), "no face is missing"
    assert any(set(range(1, v.frames + 1)) <= set(frame_numbers(root, v)) for v in plan), "every video misses faces"
    assert any(frame_numbers(root, v)[-1] > v.frames for v in plan), "no image past the last label"
    ends = [b"\r\n" in file.read_bytes() for file in (root / "Aff-Wild2/annotations").rglob("*.txt")]
    assert any(ends) and not all(ends)


def test_the_plan_has_short_videos_whole_strides_pairs_and_missing_tasks():
    plan = videos(Drawn())
    for split in (TRAIN, VAL):
        of_split = [v for v in plan if v.split == split]
        assert [v.frames for v in of_split[:3]] == [180, 73, 270]
        assert {v.tasks for v in of_split} == {("VA", "EXPR", "AU"), ("VA",), ("AU",), ("EXPR", "AU")}
        left, right = of_split[5], of_split[6]
        assert left.name.removesuffix("_left") == right.name.removesuffix("_right") and left.frames == right.frames
    assert len({v.name for v in plan}) == len(plan) == 96
    assert {"1-30-1280x720", "124", "video5_3", "7-60-1920x1080-2"} <= {v.name for v in plan}


def test_the_loaders_of_static_faces_read_every_set(root):
    sets = [faces.affectnet_2017(root / "AffectNet-2017"), faces.affectnet_2021(root / "AffectNet-2021"),
            faces.raf_db(root / "RAF-DB"), faces.fer2013(root / "FER2013", root / "FERPlus")]
    drawn = [still(SMALL, n) for n in range(SMALL.faces)]
    for got, name in zip(sets, synthetic.SETS):
        assert len(got) == sum(face.set == name and face.faced for face in drawn)
        assert got.read(0).mode == "RGB"
    truth = [face.expression for face in drawn if face.set == "RAF-DB"]
    assert sorted(sets[2].labels) == sorted(truth)


def test_the_lists_of_static_faces_have_the_real_columns_and_the_rows_nobody_can_use(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "draw_face", lambda p, state, rng: Image.new("RGB", (SIDE, SIDE)))
    index(tmp_path, Drawn(faces=1500))
    rows = [*csv.DictReader(open(tmp_path / "AffectNet-2017/training.csv"))]
    assert list(rows[0]) == faces.AFFECTNET_COLUMNS and {row["expression"] for row in rows} >= {"7", "8", "9", "10"}
    fer, plus = ([*csv.DictReader(open(tmp_path / f))] for f in ("FER2013/fer2013.csv", "FERPlus/fer2013new.csv"))
    assert list(fer[0]) == ["emotion", "pixels", "Usage"] and len(fer[0]["pixels"].split()) == 48 * 48
    assert list(plus[0]) == ["Usage", "Image name", *faces.FERPLUS]
    assert [row["Usage"] for row in fer] == [row["Usage"] for row in plus]
    assert {row["Usage"] for row in fer} == {"Training", "PublicTest", "PrivateTest"}
    nameless = [row for row in plus if not row["Image name"]]
    assert nameless and all(row["NF"] == "10" for row in nameless)
    assert all(sum(int(row[name]) for name in faces.FERPLUS) == 10 for row in plus)


# ---- What is seen, and what is written about it.

@pytest.mark.parametrize("unit", AUS)
def test_each_action_unit_alone_is_visible_where_it_acts_and_hardly_elsewhere(unit):
    upper = slice(0, 66) if unit == 6 else slice(0, 60)     # rows; the eyes are at 44, the nose's tip at 64, the mouth at 81
    rows = upper if unit in (1, 2, 4, 6, 7) else slice(42, SIDE)
    for p in map(someone, range(6)):
        change = np.abs(picture(p, np.eye(12)[AUS.index(unit)]) - picture(p, np.zeros(12))).mean(2)   # (112, 112)
        assert change[rows].sum() > 0.97 * change.sum()
        small = np.asarray(Image.fromarray(change.astype(np.uint8)).resize((48, 48), Image.BOX), float)
        assert small.max() > 12, f"AU{unit} of {p} fades in a 48-pixel picture"


@pytest.mark.parametrize("unit, way", [(1, -1), (2, -1), (4, 1)])
def test_brows_move_by_three_pixels_or_more(unit, way):
    def brow(au):
        return list(eyes(someone(), State(au)))[-1][0]      # the last thing drawn

    moved = brow(np.eye(12)[AUS.index(unit)]) - brow(np.zeros(12))
    assert (way * moved[:, 1]).max() >= 3 and (way * moved[:, 1]).min() > -0.5


def test_pose_light_and_blur_change_the_picture_and_noise_comes_from_the_generator_alone():
    p, rest = someone(), np.zeros(12)
    neutral = picture(p, rest)
    for state in (dict(yaw=4.0), dict(roll=0.1), dict(shift=(3.0, 0.0)), dict(brightness=0.8), dict(blur=(3.0, 1.0))):
        assert np.abs(picture(p, rest, **state) - neutral).mean() > 1
    first, again, other = (np.asarray(draw_face(p, State(rest), np.random.default_rng(seed))) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_nobody_is_in_two_videos_or_in_a_video_and_a_static_set(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(synthetic, "draw_face", lambda p, state, rng: seen.append(p) or Image.new("RGB", (8, 8)))
    people = [still(TINY, n).person for n in range(TINY.faces)]
    for video in videos(sizes := Drawn(train_videos=8, val_videos=8, frames=5)):
        seen.clear()
        draw_video(tmp_path, sizes, video)
        assert len(set(seen)) == 1
        people.append(seen[0])
    assert len(set(people)) == len(people) and STILL not in (TRAIN, VAL)


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_every_expression_has_a_share_and_neutral_and_other_the_largest(split):
    played = [act(np.random.default_rng(v.number), v.frames, v.first) for v in videos(Drawn())
              if v.split == split and "EXPR" in v.tasks]
    shares = np.bincount(np.concatenate([acting.expression for acting in played]), minlength=8)
    shares = shares / shares.sum()
    assert shares.min() > 0.05
    assert {EXPRESSIONS[k] for k in np.argsort(shares)[-2:]} == {"Neutral", "Other"}


def test_valence_and_arousal_follow_the_face_late():
    rng = np.random.default_rng(0)
    acting = act(rng, 3000, 0)
    va = annotate(rng, acting)[0]
    for i in (0, 1):
        match = [np.corrcoef(acting.shown[:len(va) - lag, i], va[lag:, i])[0, 1] for lag in range(30)]
        assert LABEL_LAG[0] - 2 <= int(np.argmax(match)) <= LABEL_LAG[1] + 2 and max(match) > 0.95


def test_single_frames_are_spoiled_and_fifteen_frames_of_them_is_less_so():
    rng = np.random.default_rng(0)
    acting = act(rng, 3000, 0)
    states = list(spoil(rng, someone(), acting))
    shown, true = np.array([state.au for state in states]), acting.au
    def over_fifteen_frames(au):
        return np.stack([np.convolve(unit, np.ones(15) / 15, "same") for unit in au.T], 1)

    active = (true > 0.3) & (true < 0.7)                    # nearer to 0 and 1, what is shown is cut off
    alone, together = np.abs(shown - true)[active], np.abs(over_fifteen_frames(shown) - over_fifteen_frames(true))[active]
    assert alone.mean() > 0.7 * synthetic.JITTER and together.mean() < 0.4 * alone.mean()
    spoiled = np.mean([state.cover is not None or max(state.blur) > 0 for state in states])
    assert 0.1 < spoiled < 0.5
