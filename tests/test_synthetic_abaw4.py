"""The second paper's synthetic data: lists whose labels are those of the videos, with every label missing at
times, and two styles of faces that differ in what they should differ in."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import synthetic
import synthetic_abaw4
import synthetic_face
import synthetic_stills
from class_folders import CLASSES, class_folders
from frames import frame_numbers
from labels import AUS, TASKS, label_files, read_labels
from processes import ALONE, in_team
from s_aff_wild2 import FILES, annotated, read_annotations, split_labels
from settings import Synthetic
from synthetic import videos
from synthetic_abaw4 import (CLASS_SHARES, DRAWN, HAS_AU, HAS_EXPR, HAS_VA, REAL, class_face, clean, counts,
                             filmed, is_complete, make, make_sheet)
from synthetic_acting import PROTOTYPES, STILL, TRAIN, VAL
from synthetic_face import SIDE, person

ROOT = Path(__file__).parent.parent
SMALL = Synthetic(seed=4, train_videos=18, val_videos=9, frames=60, faces=60)


def settings(folder, **changes) -> SimpleNamespace:
    """What `make` reads of a configuration."""
    return SimpleNamespace(synthetic=Synthetic(**{**vars(SMALL), **changes, "root": str(folder)}))


@pytest.fixture(scope="module")
def videos_only(tmp_path_factory):
    """The data of synthetic.py, with empty files for frames."""
    folder = tmp_path_factory.mktemp("videos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "spoil", lambda rng, p, acting: acting.au)
        patch.setattr(synthetic, "draw_face", lambda p, state, rng: SimpleNamespace(
            save=lambda path, quality: path.touch()))
        patch.setattr(synthetic_stills, "draw_face", lambda p, state, rng: Image.new("L", (8, 8)))
        synthetic.make(settings(folder), ALONE)
    return folder


@pytest.fixture(scope="module")
def root(videos_only, tmp_path_factory):
    """All of it, made by one process."""
    folder = copied(videos_only, tmp_path_factory.mktemp("made"))
    make(settings(folder), ALONE)
    return folder


@pytest.fixture(scope="module")
def lists(root):
    """What the file of each split holds."""
    return {split: read_annotations(root / "ABAW4" / file) for split, file in zip((TRAIN, VAL), FILES)}


def copied(videos_only, folder) -> Path:
    """A folder with the same videos, to draw into."""
    folder.mkdir(exist_ok=True)
    (folder / "Aff-Wild2").symlink_to(videos_only / "Aff-Wild2")
    for name in ("complete.json", "sizes.json"):
        shutil.copy(videos_only / name, folder / name)
    return folder


def content(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- The same each time

@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(root, videos_only, tmp_path, world):
    folder = copied(videos_only, tmp_path / "by_several")
    codes, _ = in_team(world, lambda team: make(settings(folder), team))
    assert codes == [0] * world and content(folder / "ABAW4") == content(root / "ABAW4")


def test_all_of_it_lies_in_one_folder_and_drawn_again_it_is_the_same(root):
    before = content(root)
    assert {name for name in before if "/" not in name} == {"complete.json", "sizes.json"}
    assert {path.name for path in root.iterdir()} == {"ABAW4", "Aff-Wild2", "complete.json", "sizes.json"}
    assert {path.name for path in (root / "ABAW4").iterdir()} == {*FILES, "drawn", "real", "complete.json",
                                                                  "sizes.json"}
    make(settings(root), ALONE)
    assert content(root) == before and is_complete(root, SMALL) and synthetic.is_complete(root, SMALL)


def test_another_seed_draws_other_people():
    (k, one), (_, again) = class_face(SMALL, DRAWN, 3), class_face(SMALL, DRAWN, 3)
    assert one.tobytes() == again.tobytes() and k in range(6)
    assert one.tobytes() != class_face(Synthetic(seed=1), DRAWN, 3)[1].tobytes()


# ---- The lists

def test_a_label_is_that_of_the_videos_label_file_and_videos_without_a_file_have_labels_too(root, lists):
    compared = {}
    for split, of_split in ((TRAIN, "Train_Set"), (VAL, "Validation_Set")):
        found = lists[split]
        for t, task in enumerate(TASKS.values()):
            files = label_files(root / "Aff-Wild2/annotations", task)[of_split]
            for v, video in enumerate(found.videos):
                of_video = found.frames[:, 0] == v
                ours = split_labels(found.labels[of_video])[t]
                if video not in files:
                    compared[task.name, "no file"] = (ours != task.invalid).any()
                    continue
                theirs = read_labels(files[video], task)[found.frames[of_video, 1] - 1].astype(np.float32)
                both = (ours != task.invalid) & (theirs != task.invalid)
                assert np.array_equal(ours[both], theirs[both]), (video, task.name)
                compared[task.name] = compared.get(task.name, 0) + both.sum()
    assert min(compared[task] for task in TASKS) > 100
    assert compared["va", "no file"] and compared["expr", "no file"] and compared["au", "no file"]


def test_no_video_is_in_both_lists_and_each_is_in_that_of_its_split(lists):
    for split, found in lists.items():
        assert found.videos == [video.name for video in videos(SMALL) if video.split == split]


def test_about_every_third_frame_with_a_face_has_a_row(root, lists):
    for split, found in lists.items():
        of_split = [video for video in videos(SMALL) if video.split == split]
        for v, video in enumerate(of_split):
            numbers = found.frames[found.frames[:, 0] == v, 1]
            assert numbers.max() <= video.frames
            faces = frame_numbers(root / "Aff-Wild2/cropped_aligned" / video.name)
            faces = faces[faces <= video.frames]
            places = np.flatnonzero(np.isin(faces, numbers))             # of the frames that have a row
            assert places[0] < 3 and len(faces) - places[-1] <= 3 and (np.diff(places) == 3).all()


def test_labels_are_missing_in_every_way_and_some_rows_come_twice_or_have_no_image(root, lists):
    labels = np.concatenate([found.labels for found in lists.values()])
    va, expr, au = split_labels(annotated(labels))
    ways = {(v.any(), e, a.any()) for v, e, a in zip(va, expr.tolist(), au)}
    assert len(ways) == 8, "all, none, each alone, each two"
    assert {tuple(row) for row in va} == {(a, b) for a in (False, True) for b in (False, True)}
    some = au.any(1) & ~au.all(1)
    assert some.any() and (~au[some]).any(0).all(), "each AU is missing alone"
    assert all(found.repeated > 0 for found in lists.values())
    rows = [row for file in FILES for row in (root / "ABAW4" / file).read_text().splitlines()[1:]]
    frames = {row.split(",")[0] for row in rows}
    absent = [frame for frame in frames if not (root / "Aff-Wild2/cropped_aligned" / frame).exists()]
    assert 0 < len(absent) < 0.03 * len(rows) and 0 < len(rows) - len(set(rows)) < 0.03 * len(rows)


def test_each_task_is_labelled_in_its_share_of_the_rows_and_every_class_and_unit_occurs(lists):
    labels = np.concatenate([found.labels for found in lists.values()])
    va, expr, au = split_labels(annotated(labels))
    for part, share in ((va.any(1), HAS_VA), (expr, HAS_EXPR), (au.any(1), HAS_AU)):
        assert abs(part.mean() - share) < 3 * np.sqrt(share * (1 - share) / len(labels)) < 0.07
    assert set(labels[expr, 2]) == set(range(8))
    assert all({0, 1} <= set(unit) for unit in labels[:, 3:].T)


def test_a_video_whose_frames_have_no_face_has_no_row(tmp_path):
    (tmp_path / "Aff-Wild2/cropped_aligned/1-30-1280x720").mkdir(parents=True)
    assert synthetic_abaw4.rows_of(tmp_path, SMALL, videos(SMALL)[0]) == []


# ---- The two styles

def test_both_styles_are_read_as_class_folders_with_their_counts(root):
    assert counts(Synthetic()) == {DRAWN: 1500, REAL: 800}
    for style, name in ((DRAWN, "drawn"), (REAL, "real")):
        found = class_folders(root / "ABAW4" / name)
        assert len(found) == counts(SMALL)[style] and not found.skipped
        for i in range(len(found)):
            k, image = class_face(SMALL, style, int(Path(found.where(i)).stem))
            assert found.labels[i] == 1 + k
        with Image.open(found.where(i)) as file:
            assert (file.format, file.mode, file.size) == ("JPEG", "RGB", (SIDE, SIDE))
        assert np.abs(np.asarray(found.read(i), float) - np.asarray(image)).mean() < 6      # as JPEG


@pytest.fixture(scope="module")
def planned():
    """{style: [(person, state, class) of each face of the demo]}, without the drawing."""
    seen = []

    def note(p, state, rng):
        seen.append((p, state))
        return Image.new("RGB", (8, 8))

    sizes, found = Synthetic(faces=1000), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_abaw4, "draw_face", note)
        for style, count in counts(sizes).items():
            classes = [class_face(sizes, style, number)[0] for number in range(count)]
            found[style] = [(p, state, k) for (p, state), k in zip(seen, classes)]
            seen.clear()
    return found


def test_nobody_is_in_both_styles_or_in_the_first_papers_data(planned):
    people = [p for faces in planned.values() for p, _, _ in faces]
    others = [person(np.random.default_rng([0, of, n])) for of in (TRAIN, VAL, STILL) for n in range(50)]
    assert len({*people, *others}) == len(people) + len(others)


def test_all_classes_occur_in_uneven_shares(planned):
    for faces in planned.values():
        shares = np.bincount([k for _, _, k in faces], minlength=6) / len(faces)
        assert np.abs(shares - CLASS_SHARES).max() < 0.07 and shares.max() > 1.4 * shares.min()


def test_a_face_shows_the_action_units_of_its_class_strongly_if_clean_and_weaker_if_filmed(planned):
    strength = {}
    for style, faces in planned.items():
        of_class = []
        for _, state, k in faces:
            units = {unit for variant in PROTOTYPES[CLASSES[k]] for unit in variant}
            of_class.append(state.au[[AUS.index(unit) for unit in units]].mean())
        strength[style] = np.mean(of_class)
    assert 0.75 * strength[DRAWN] < strength[REAL] < 0.92 * strength[DRAWN]


def test_pose_light_noise_and_background_vary_only_in_filmed_faces(planned):
    def spread(of):
        return [np.std([of(state) for _, state, _ in planned[style]]) for style in (DRAWN, REAL)]

    for of in (lambda s: s.yaw, lambda s: s.roll, lambda s: s.shift[0], lambda s: s.brightness,
               lambda s: s.noise, lambda s: s.slope[0], lambda s: s.place, lambda s: s.cast[0]):
        still, varied = spread(of)
        assert still < 1e-9 and varied > 0.01
    assert all(state.cover is None and max(state.blur) == 0 for _, state, _ in planned[DRAWN])
    assert any(state.cover is not None for _, state, _ in planned[REAL])


def test_clean_faces_have_less_noise_and_stronger_colours():
    def measured(style):
        rng, p = np.random.default_rng(5), person(np.random.default_rng(5))
        pixels = np.stack([np.asarray(style(rng, p, name), float) for name in CLASSES])    # (6, 112, 112, 3)
        # In most places neighbours differ by noise alone. The second difference of noise has √6 of its
        # deviation; the median of its size is 0.6745 deviations.
        noise = np.median(np.abs(np.diff(pixels, 2, axis=2))) / 0.6745 / np.sqrt(6)
        return noise, (pixels.max(-1) - pixels.min(-1)).mean()

    (smooth, strong), (grainy, dull) = measured(clean), measured(filmed)
    assert smooth < 0.3 and 1 < grainy < 4
    assert strong > 1.5 * dull


# ---- Refusals

def test_without_the_videos_of_these_sizes_nothing_is_drawn(videos_only, tmp_path):
    for folder, changes in ((tmp_path, {}), (videos_only, {"frames": 91}), (videos_only, {"seed": 1})):
        before = list(folder.iterdir())
        with pytest.raises(ValueError, match=r"does not hold the videos .*draw them first.* synthetic\.py$"):
            make(settings(folder, **changes), ALONE)
        assert list(folder.iterdir()) == before


def test_real_data_are_refused_by_every_process_and_left_alone(videos_only, tmp_path):
    folder = copied(videos_only, tmp_path / "real")
    (folder / "ABAW4").mkdir()
    (folder / "ABAW4/training_set_annotations.txt").write_text("real")

    def refused(team):
        with pytest.raises(ValueError, match="ABAW4 holds data that is not synthetic, expected nothing or"):
            make(settings(folder), team)

    refused(ALONE)
    assert in_team(2, refused)[0] == [0, 0]
    assert content(folder / "ABAW4") == {"training_set_annotations.txt": b"real"}


def test_data_of_other_drawing_code_are_neither_complete_nor_overwritten(videos_only, tmp_path):
    folder = copied(videos_only, tmp_path / "older")
    (folder / "ABAW4").mkdir()
    older = {**synthetic_abaw4.description(SMALL), "abaw4": 1}
    for name in ("sizes.json", "complete.json"):
        (folder / "ABAW4" / name).write_text(json.dumps(older))
    assert not is_complete(folder, SMALL)
    with pytest.raises(ValueError, match="holds {.*'abaw4': 1}, expected nothing or {.*delete this one"):
        make(settings(folder), ALONE)
    assert {path.name for path in (folder / "ABAW4").iterdir()} == {"sizes.json", "complete.json"}


def test_data_are_complete_only_at_the_end_and_only_for_their_sizes_and_the_videos_code(
        root, tmp_path, monkeypatch):
    assert is_complete(root, SMALL) and not is_complete(root, Synthetic())
    folder = copied(root, tmp_path / "stopped")
    shutil.copytree(root / "ABAW4", folder / "ABAW4")
    monkeypatch.setattr(synthetic_abaw4, "write_lists", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(settings(folder), ALONE)
    assert not is_complete(folder, SMALL)
    monkeypatch.setattr(synthetic, "description", lambda sizes: {"code": 1})
    assert not is_complete(root, SMALL)


# ---- The command

def command(monkeypatch, capsys, *arguments):
    """-> (exit code, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["synthetic_abaw4.py", *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "synthetic_abaw4.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_sheet_has_a_row_for_each_class_with_clean_faces_on_the_left(tmp_path, monkeypatch):
    path = tmp_path / "pair.png"
    monkeypatch.setattr(synthetic_abaw4, "ON_SHEET", 1)
    make_sheet(settings(tmp_path), ALONE, path)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (6 * SIDE, 2 * SIDE, 3)
    for left, style in ((0, DRAWN), (SIDE, REAL)):
        faces = [class_face(SMALL, style, number) for number in range(20)]
        for k in range(6):
            first = next(np.asarray(image) for of, image in faces if of == k)
            assert np.array_equal(pixels[k * SIDE:(k + 1) * SIDE, left:left + SIDE], first)


@pytest.mark.parametrize("name, reason", [("pair.xyz", "a .png or .jpg file"), ("", "a .png or .jpg file"),
                                          ("nowhere/pair.png", "No such file or directory"),
                                          ("pair.png", "")])
def test_the_command_writes_only_a_sheet_or_ends_in_one_line(name, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic_face, "draw_face", lambda p, state, rng: Image.new("RGB", (SIDE, SIDE)))
    monkeypatch.chdir(tmp_path)
    code, out, error = command(monkeypatch, capsys, "--config", ROOT / "configs/demo.yaml", "--sheet", name)
    written = [path.name for path in tmp_path.iterdir()]
    if reason:
        assert code == 2 and error.startswith(f"error: {name}: ") and reason in error and written == []
        assert error.count("\n") == 1
    else:
        assert (code, error, written) == (0, "", ["pair.png"])
    assert out == ""
