"""Videos on disk: frames of any name, folders in folders, several roots."""

import os
import runpy
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
from test_data import EXPR, NAMES, frame, label_file

import data
from frames import find_videos, frame_numbers, list_frames, video_folders
from labels import VA, read_labels
from splits import split


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# ---- The frames of one folder

def test_frames_are_counted_from_1_and_nothing_else_is_one(tmp_path):
    touch(tmp_path, "00002.jpg", "00010.jpg", "00001.jpg", "123456.jpg", "1234567.jpg")
    touch(tmp_path, "00000.jpg", "._00004.jpg", "00005.jpg.tmp", "mask.jpg", "12345678.jpg",
          "9" * 30 + ".jpg", "-7.jpg", "8 .jpg", "00009_1.jpg", "11.npy", "١٢.jpg")
    assert frame_numbers(tmp_path).tolist() == [1, 2, 10, 123456, 1234567]


@pytest.mark.parametrize("names", [
    ["00001.jpg", "00002.jpg", "00010.jpg", "123456.jpg"], ["00001.JPG", "00002.JPG"],
    ["00003.jpeg", "00012.jpeg"], ["000001.png", "000002.png"], ["1.jpg", "2.jpg", "10.jpg", "47434.jpg"],
    ["001.bmp", "1000.bmp"], ["1.webp"], ["0001.tif"]])
def test_frames_may_have_any_number_of_zeros_and_any_extension_of_an_image(tmp_path, names):
    touch(tmp_path, *names)
    numbers, files, beside = list_frames(tmp_path)
    assert [files.path(number) for number in numbers] == [f"{tmp_path}/{name}" for name in names]
    assert not beside and not files.others                   # one pattern says the names of all


def test_frames_of_different_patterns_in_one_folder_keep_their_names(tmp_path):
    names = ["00001.jpg", "00002.JPG", "3.png", "004.jpg", "00005.jpg"]
    touch(tmp_path, *names)
    numbers, files, _ = list_frames(tmp_path)
    assert numbers.tolist() == [1, 2, 3, 4, 5] and files.others == {2: "00002.JPG", 3: "3.png", 4: "004.jpg"}
    assert [files.path(number) for number in numbers] == [f"{tmp_path}/{name}" for name in names]


@pytest.mark.parametrize("first, second", [("00001.jpg", "00001.png"), ("00001.jpg", "1.jpg"),
                                           ("00001.JPG", "00001.jpg")])
def test_two_files_of_one_frame_are_refused_with_both_names(tmp_path, first, second):
    touch(tmp_path, first, second)
    with pytest.raises(ValueError, match=f"{tmp_path}: {first} and {second} are both frame 1; remove one"):
        frame_numbers(tmp_path)


def test_a_folder_is_listed_once_and_no_frame_is_looked_at(tmp_path, monkeypatch):
    listed = []

    def scandir(folder):
        listed.append(folder)
        return FakeFolder(f"{n:05d}.jpg" for n in range(1, 4))   # its entries have a name and nothing else

    monkeypatch.setattr(os, "scandir", scandir)
    assert frame_numbers(tmp_path).tolist() == [1, 2, 3] and listed == [tmp_path]


class FakeFolder:
    """What os.scandir gives: entries, in a block that closes the folder."""

    def __init__(self, names, **attributes):
        self.entries = (SimpleNamespace(name=name, **attributes) for name in names)

    def __enter__(self):
        return self.entries

    def __exit__(self, *ignored):
        pass


@pytest.mark.slow
def test_100000_files_that_are_no_frames_take_no_memory_and_few_kinds(tmp_path, monkeypatch):
    for kinds in (1, 100_000):
        names = (f"{n}.x{n % kinds}" for n in range(100_000))
        monkeypatch.setattr(os, "scandir", lambda folder: FakeFolder(names, is_dir=lambda: False))
        tracemalloc.start()
        numbers, _, beside = list_frames(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(numbers) == 0 and beside.total() == 100_000 and len(beside) == min(kinds, 21)
        assert peak < 1e5                                            # bytes


# ---- The folders of all videos

def test_videos_of_several_roots_are_merged_and_the_first_root_with_frames_wins(tmp_path):
    first, second = tmp_path / "cropped_aligned", tmp_path / "cropped_aligned_new_50_vids"
    for name in NAMES:
        (first / name).mkdir(parents=True)
    for name in ("136", "new_right", NAMES[0]):
        (second / name).mkdir(parents=True)
    touch(tmp_path, first / "136/00001.jpg", second / "136/00001.jpg", second / NAMES[0] / "00001.jpg")
    touch(first, "readme.txt", ".cache/x/00001.jpg")
    videos, lines = video_folders([first, str(second)])
    assert list(videos) == sorted([*NAMES, "new_right"])
    assert videos["136"] == first / "136" and videos["new_right"] == second / "new_right"
    assert videos[NAMES[0]] == second / NAMES[0]
    assert lines == [f"  1 videos of {second} are in an earlier folder of data.frames too, and taken from "
                     "there"]


@pytest.mark.parametrize("inner", ["cropped_aligned/cropped_aligned", "new_50_vids/new_50_vids",
                                   "copy/cropped_aligned", "a/cropped_aligned/cropped_aligned", "a/b/c"])
def test_nested_folders_of_videos_are_entered_and_named(tmp_path, inner):
    for name in NAMES:
        (tmp_path / inner / name).mkdir(parents=True)
    videos, lines = video_folders([tmp_path / inner.split("/")[0]])
    assert videos == {name: tmp_path / inner / name for name in sorted(NAMES)}
    assert lines == [f"  7 video folders in {tmp_path / inner}"]


def test_the_siblings_of_a_nested_folder_are_videos_too(tmp_path):
    touch(tmp_path, "cropped_aligned/a/1.jpg", "cropped_aligned/b/1.jpg", "c/1.jpg", "d_left/00001.png")
    videos, lines = video_folders([tmp_path])
    inner = tmp_path / "cropped_aligned"
    assert {name: folder.parent for name, folder in videos.items()} == {
        "a": inner, "b": inner, "c": tmp_path, "d_left": tmp_path}
    assert sorted(lines) == [f"  2 video folders in {tmp_path}", f"  2 video folders in {inner}"]


def test_the_folder_above_two_roots_gives_the_videos_of_both(tmp_path):
    touch(tmp_path, "cropped_aligned/a/00001.jpg", "cropped_aligned_new_50_vids/b/00001.jpg")
    videos, lines = video_folders([tmp_path])
    assert list(videos) == ["a", "b"] and len(lines) == 2


def test_a_video_that_is_twice_below_one_root_is_refused_and_one_without_frames_gives_way(tmp_path):
    touch(tmp_path, "cropped_aligned/136/00001.jpg", "136/readme.txt", "new/136/00001.txt")
    assert find_videos([tmp_path])["136"] == tmp_path / "cropped_aligned/136"
    touch(tmp_path, "new/136/00001.jpg")
    expected = (f"data.frames: {tmp_path}/cropped_aligned/136 and {tmp_path}/new/136 are frames of one "
                f"video, both below {tmp_path}; remove one, or give the folders above them as two roots")
    with pytest.raises(ValueError, match=expected):
        find_videos([tmp_path])
    roots = [tmp_path / "new", tmp_path / "cropped_aligned"]
    assert find_videos(roots)["136"] == tmp_path / "new/136"


def test_folders_inside_of_a_video_are_no_videos_and_a_link_in_a_circle_ends(tmp_path):
    touch(tmp_path, "a/00001.jpg", "a/masks/00001.png")
    assert list(find_videos([tmp_path])) == ["a"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/circle").symlink_to(tmp_path / "empty")
    assert set(find_videos([tmp_path])) == {"a", "circle"}


def test_a_video_is_known_by_its_first_frame_and_not_listed_whole(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.txt")
    looked = []

    def names():
        for n in range(1, 1000):
            looked.append(n)
            yield f"{n:05d}.jpg"

    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: FakeFolder(names()) if str(folder).endswith("/a")
                        else real(folder))
    assert list(find_videos([tmp_path])) == ["a"] and looked == [1]


def test_frames_in_the_root_itself_are_named(tmp_path):
    touch(tmp_path, "00001.jpg", "a/00001.jpg")
    videos, lines = video_folders([tmp_path])
    assert list(videos) == ["a"]
    assert lines == [f"  frames that lie in {tmp_path} itself, not in a folder of their video, are not read"]


# ---- What data.py says of it

def run(monkeypatch, capsys, root, labels):
    monkeypatch.setattr(sys, "argv", ["data.py", "--set", f"data.frames=['{root}']",
                                      "--set", f"data.labels='{labels}'"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(data.__file__, run_name="__main__")
    shown = capsys.readouterr()
    return end.value.code, shown.out, shown.err


def expr_labels(root, *videos):
    for part in ("Train_Set", "Validation_Set"):
        for video in videos:
            label_file(root / EXPR.folders[0] / part / f"{video}.txt", EXPR, 1, 2)
    return root


def test_a_copy_without_a_frame_ends_with_code_2_and_what_lies_there_instead(tmp_path, monkeypatch, capsys):
    touch(tmp_path / "frames", "a/1.npy", "a/2.npy", "b/x/y/z/w/00001.jpg")
    code, out, said = run(monkeypatch, capsys, tmp_path / "frames", expr_labels(tmp_path / "labels", "a"))
    assert (code, out) == (2, "")
    assert said.splitlines() == [
        "error: data.frames: 2 folders, none of which holds a frame; expected <video>/00001.jpg",
        f"  1 video folders in {tmp_path}/frames", f"  1 video folders in {tmp_path}/frames/b/x/y",
        "  not read, as no frame (00001.jpg, ...): 2 .npy, 1 folders",
        "  folders without a frame that are not empty: a (2 .npy), z (1 folders)"]


def test_a_copy_whose_labels_have_other_names_than_its_videos_ends_with_code_2(tmp_path, monkeypatch, capsys):
    frame(tmp_path / "frames/a", 1)
    labels = expr_labels(tmp_path / "labels", "b")
    code, out, said = run(monkeypatch, capsys, tmp_path / "frames", labels)
    assert code == 2 and out.startswith("1 videos with frames, 1 face images\nexpr Train_Set")
    assert said == ("error: no labelled frame has a face image, so there is nothing to train on; "
                    "a label file is named after its video's folder\n")


def test_nothing_is_written_into_the_data(tmp_path):
    frame(tmp_path / "frames/a", 1)
    expr_labels(tmp_path / "labels", "a")

    def tree():
        return {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}

    before = tree()
    list(data.describe([tmp_path / "frames"], tmp_path / "labels"))
    files, videos = split(tmp_path / "labels", EXPR, 0)[0], find_videos([tmp_path / "frames"])
    assert data.ExprFrames(files, videos, 8)[0][1] == 1 and data.VideoFrames(videos["a"], 8)[0]
    assert tree() == before


def test_a_disk_that_fails_in_the_middle_of_a_label_file_is_no_bad_file_and_the_file_is_named(
        tmp_path, monkeypatch):
    path = label_file(tmp_path / "a.txt", VA, "0,0")

    def fail(*ignored, **keywords):
        raise OSError(5, os.strerror(5))             # in the middle of a file, the system does not name it

    monkeypatch.setattr(type(path), "read_text", fail)
    with pytest.raises(OSError, match=f"{path}") as error:
        read_labels(path, VA)
    assert error.value.errno == 5
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        read_labels(tmp_path / "b.txt", VA)
