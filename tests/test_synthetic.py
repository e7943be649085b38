"""Synthetic data is the same each time, has the real layouts and faults, and shows what its labels say."""

import csv
import hashlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import faces
import synthetic
import synthetic_acting
import synthetic_stills
from affectnet import AFFECTNET_COLUMNS
from distributed import Team
from fer2013 import FERPLUS
from labels import AUS, EXPRESSIONS, TASKS
from settings import Config, Data, Synthetic
from synthetic import check_paths, draw, draw_video, index, is_complete, make, videos
from synthetic_acting import LABEL_LAG, STILL, TRAIN, VAL, act, annotate, spoil
from synthetic_face import SIDE, State, draw_face, eyes, person
from synthetic_stills import still

ROOT = Path(__file__).parent.parent
SMALL = Synthetic(train_videos=9, val_videos=3, frames=45, faces=60)
TINY = Synthetic(train_videos=2, val_videos=1, frames=6, faces=20)
ALONE = Team(rank=0, world=1, device=None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    draw(folder, SMALL)
    index(folder, SMALL)
    return folder


def contents(folder: Path) -> dict:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def label_file(root, video, task):
    split = {TRAIN: "Train_Set", VAL: "Validation_Set"}[video.split]
    folder = root / "Aff-Wild2/annotations" / TASKS[task].folders[0] / split
    header, *rows = (folder / f"{video.name}.txt").read_text().splitlines()
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
    assert still(TINY, 3).person != still(Synthetic(faces=20, seed=1), 3).person


def test_data_are_complete_only_after_the_index_and_only_for_their_sizes(tmp_path):
    assert not is_complete(tmp_path, TINY)
    draw(tmp_path, TINY)
    assert not is_complete(tmp_path, TINY)
    index(tmp_path, TINY)
    assert is_complete(tmp_path, TINY) and not is_complete(tmp_path, SMALL)
    draw(tmp_path, TINY)                                    # again: incomplete until indexed again
    assert not is_complete(tmp_path, TINY)


def test_make_draws_all_of_it_into_the_folder_of_the_settings(tmp_path):
    sizes = Synthetic(root=str(tmp_path / "made"), train_videos=1, val_videos=1, frames=3, faces=8)
    make(SimpleNamespace(synthetic=sizes), ALONE)
    draw(tmp_path / "drawn", sizes)
    index(tmp_path / "drawn", sizes)
    assert is_complete(sizes.root, sizes) and contents(tmp_path / "made") == contents(tmp_path / "drawn")


def test_a_folder_with_data_of_other_sizes_or_with_real_data_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="'train_videos': 9.*'train_videos': 2.*new folder"):
        draw(root, TINY)
    assert is_complete(root, SMALL)
    (tmp_path / "RAF-DB").mkdir()
    with pytest.raises(ValueError, match="holds data that is not synthetic"):
        draw(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == [tmp_path / "RAF-DB"]


# ---- The paths of the settings.

def settings(**data) -> Config:
    """A configuration with synthetic data in some/folder."""
    return Config(data=Data(synthetic=True, **data), synthetic=Synthetic(root="some/folder"))


@pytest.mark.parametrize("path", ["other", "some/folder2/RAF-DB", "some/folder/../real", "/real"])
def test_a_path_outside_the_folder_of_the_synthetic_data_is_refused(path):
    with pytest.raises(ValueError, match=rf"^data\.raf_db: {path} is not in some/folder \(synthetic\.root\)"):
        check_paths(settings(raf_db=path))
    with pytest.raises(ValueError, match=rf"^data\.frames: {path} is not in some/folder \(synthetic\.root\)"):
        check_paths(settings(frames=["some/folder/a", path]))


def test_paths_in_the_folder_and_unused_ones_are_accepted_and_with_real_data_all_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside = str(tmp_path / "some/folder/RAF-DB")
    check_paths(settings(frames=["some/folder/a", "some/folder/b"], raf_db=inside, fer2013=""))
    real = settings(raf_db="/real", frames=["/real"])
    real.data.synthetic = False
    check_paths(real)


# ---- The layouts.

def test_frames_are_112_pixel_colour_jpegs_with_five_digits(root):
    for video in videos(SMALL):
        for file in (root / "Aff-Wild2/cropped_aligned" / video.name).iterdir():
            assert len(file.stem) == 5 and file.suffix == ".jpg" and int(file.stem) >= 1
    with Image.open(file) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))


def test_label_files_have_the_real_headers_and_a_line_per_frame(root):
    headers = {"va": "valence,arousal",
               "expr": "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other",
               "au": "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"}
    for video in videos(SMALL):
        for task in video.tasks:
            header, values = label_file(root, video, task)
            assert header == headers[task] and len(values) == video.frames
            valid = values[values[:, 0] != {"va": -5, "expr": -1, "au": -1}[task]]
            lowest, highest = {"va": (-1, 1), "expr": (0, 7), "au": (0, 1)}[task]
            assert len(valid) and valid.min() >= lowest and valid.max() <= highest
            assert task == "va" or (valid == valid.round()).all()


def test_the_faults_of_real_videos_all_occur(root):
    plan = videos(SMALL)
    for task, code in (("va", -5), ("expr", -1), ("au", -1)):
        values = [label_file(root, v, task)[1] for v in plan if task in v.tasks]       # each (T, width)
        invalid = [(of_video == code).all(1).any() for of_video in values]
        assert any(invalid) and not all(invalid)
    numbers = {v: frame_numbers(root, v) for v in plan}
    complete = [set(range(1, v.frames + 1)) <= set(numbers[v]) for v in plan]
    assert any(complete) and not all(complete), "every video misses faces, or none does"
    assert any(numbers[v][-1] > v.frames for v in plan), "no image past the last label"
    ends = [b"\r\n" in file.read_bytes() for file in (root / "Aff-Wild2/annotations").rglob("*.txt")]
    assert any(ends) and not all(ends)


def test_the_plan_has_short_videos_whole_strides_pairs_and_missing_tasks():
    plan = videos(Synthetic())
    for split in (TRAIN, VAL):
        of_split = [v for v in plan if v.split == split]
        assert [v.frames for v in of_split[:3]] == [180, 73, 270]
        assert {v.tasks for v in of_split} == {("va", "expr", "au"), ("va",), ("au",), ("expr", "au")}
        left, right = of_split[5], of_split[6]
        assert left.name.removesuffix("_left") == right.name.removesuffix("_right")
        assert left.name != right.name and left.frames == right.frames
    assert len({v.name for v in plan}) == len(plan) == 96
    assert {"1-30-1280x720", "124", "video5_3", "7-60-1920x1080-2"} <= {v.name for v in plan}


def test_the_loaders_of_static_faces_read_every_set(root):
    sets = [faces.affectnet_2017(root / "AffectNet-2017"), faces.affectnet_2021(root / "AffectNet-2021"),
            faces.raf_db(root / "RAF-DB"), faces.fer2013(root / "FER2013", root / "FERPlus")]
    planned = [still(SMALL, n) for n in range(SMALL.faces)]
    for got, name in zip(sets, synthetic_stills.SETS):
        assert len(got) == sum(face.set == name and face.faced for face in planned)
        assert got.read(0).mode == "RGB"
    assert sorted(sets[2].labels) == sorted(face.expression for face in planned if face.set == "RAF-DB")


def test_the_lists_of_static_faces_have_the_real_columns_and_the_rows_nobody_can_use(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_stills, "draw_face", lambda p, state, rng: Image.new("RGB", (SIDE, SIDE)))
    index(tmp_path, Synthetic(faces=1500))
    rows = [*csv.DictReader(open(tmp_path / "AffectNet-2017/training.csv"))]
    assert list(rows[0]) == AFFECTNET_COLUMNS
    assert {row["expression"] for row in rows} >= {"7", "8", "9", "10"}
    assert all((row["valence"] == "-2") == (int(row["expression"]) >= 8) for row in rows)
    fer = [*csv.DictReader(open(tmp_path / "FER2013/fer2013.csv"))]
    plus = [*csv.DictReader(open(tmp_path / "FERPlus/fer2013new.csv"))]
    assert list(fer[0]) == ["emotion", "pixels", "Usage"] and len(fer[0]["pixels"].split()) == 48 * 48
    assert list(plus[0]) == ["Usage", "Image name", *FERPLUS]
    assert [row["Usage"] for row in fer] == [row["Usage"] for row in plus]
    assert {row["Usage"] for row in fer} == {"Training", "PublicTest", "PrivateTest"}
    nameless = [row for row in plus if not row["Image name"]]
    assert nameless and all(row["NF"] == "10" for row in nameless)
    assert all(sum(int(row[name]) for name in FERPLUS) == 10 for row in plus)


# ---- What is seen, and what is written about it.

@pytest.mark.parametrize("unit", AUS)
def test_each_action_unit_alone_is_visible_where_it_acts_and_hardly_elsewhere(unit):
    # In rows: the eyes are at 44, the nose's tip at 64, the mouth at 81.
    upper = slice(0, 66) if unit == 6 else slice(0, 60)
    rows = upper if unit in (1, 2, 4, 6, 7) else slice(42, SIDE)
    for p in map(someone, range(6)):
        acting, rest = picture(p, np.eye(12)[AUS.index(unit)]), picture(p, np.zeros(12))
        change = np.abs(acting - rest).mean(2)              # (112, 112)
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
    for state in (dict(yaw=4.0), dict(roll=0.1), dict(shift=(3.0, 0.0)), dict(brightness=0.8),
                  dict(blur=(3.0, 1.0))):
        assert np.abs(picture(p, rest, **state) - neutral).mean() > 1
    first, again, other = (draw_face(p, State(rest), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_nobody_is_in_two_videos_or_in_a_video_and_a_static_set(tmp_path, monkeypatch):
    seen = []

    def note_person(p, state, rng):
        seen.append(p)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(synthetic, "draw_face", note_person)
    people = [still(TINY, n).person for n in range(TINY.faces)]
    sizes = Synthetic(train_videos=8, val_videos=8, frames=5)
    for video in videos(sizes):
        seen.clear()
        draw_video(tmp_path, sizes, video)
        assert len(set(seen)) == 1
        people.append(seen[0])
    assert len(set(people)) == len(people) and STILL not in (TRAIN, VAL)


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_every_expression_has_a_share_and_neutral_and_other_the_largest(split):
    played = [act(np.random.default_rng(v.number), v.frames, v.first) for v in videos(Synthetic())
              if v.split == split and "expr" in v.tasks]
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
    alone = np.abs(shown - true)[active]
    together = np.abs(over_fifteen_frames(shown) - over_fifteen_frames(true))[active]
    assert alone.mean() > 0.7 * synthetic_acting.JITTER and together.mean() < 0.4 * alone.mean()
    covered = np.array([state.cover is not None for state in states])
    blurred = np.array([max(state.blur) > 0 for state in states])
    assert 0.1 < (covered | blurred).mean() < 0.5 and min(covered.mean(), blurred.mean()) > 0.05


# ---- The commands.

def command(monkeypatch, capsys, script, *arguments):
    """-> (exit code, stdout, stderr) of a script."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


SHEETS = {"synthetic.py": ["--config", ROOT / "configs/demo.yaml", "--sheet"], "synthetic_face.py": []}


@pytest.mark.parametrize("script, columns, rows", [("synthetic.py", 12, 8 + 2 + 1),
                                                   ("synthetic_face.py", 13, 4)])
def test_a_contact_sheet_is_one_picture_of_all_faces(script, columns, rows, tmp_path, monkeypatch, capsys):
    path = tmp_path / "faces.png"
    assert command(monkeypatch, capsys, script, *SHEETS[script], path) == (0, "", "")
    with Image.open(path) as image:
        assert image.size == (columns * SIDE, rows * SIDE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", SHEETS)
@pytest.mark.parametrize("name, reason", [("faces.xyz", "a .png or .jpg file"), ("", "a .png or .jpg file"),
                                          ("nowhere/faces.png", "No such file or directory"),
                                          ("folder.png", "Is a directory")])
def test_a_sheet_that_cannot_be_written_ends_in_one_line(script, name, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(synthetic_acting, "sheet", lambda: [[(someone(), State(np.zeros(12)))]])
    monkeypatch.chdir(tmp_path)
    code, out, error = command(monkeypatch, capsys, script, *SHEETS[script], name)
    assert code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith(f"error: {name}: ") and reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("script, words", [("synthetic_acting.py", "frame  expression  valence  arousal"),
                                           ("synthetic_stills.py", "RAF-DB")])
def test_the_files_in_between_show_themselves_as_a_table(script, words, monkeypatch, capsys):
    code, out, error = command(monkeypatch, capsys, script)
    assert code == 0 and error == "" and words in out
