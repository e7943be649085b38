"""data.py: frames on disk, batches of images, feature files, segments."""

import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import (Frames, Images, SegmentData, Video, describe, expr_frames, fingerprint, noface_path,
                  open_videos, read_features, segments, some_faces)
from engine.training import generator, loader
from files import label_file
from images import READ, VideoFrames, check_ends, find_videos, passed_over, random_crop, resize
from labels import AU, EXPR, TASKS, VA
from processes import ALONE


def draw(folder, numbers, size: int = 8):
    """Grey frames, as bright as their number says."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image = Image.linear_gradient("L").resize((size, size)).point(lambda x: x // 16 + 10 * number)
        image.save(Path(folder) / f"{number:05d}.jpg")


# ---- Frames on disk

@pytest.mark.parametrize("names, numbers", [
    ("0000123.jpeg 1.PNG 9999999.bmp", [123, 1, 9999999]), ("00001.jpg a2.jpg", [1]), ("12345678.jpg", []),
    ("frame_0001.jpg frame_0020.JPG frame_7.png", [1, 20, 7]), ("frame2.png frame10.png", [2, 10]),
    ("frame_det_00_000001.bmp frame_det_00_000012.bmp", [1, 12]), ("00001_0.jpg 00002_0.jpg", [1, 2]),
    ("2x4-out-003.jpg", [3]), ("a_01_0001.jpg a_01_0002.jpg a_02_0001.jpg", []), ("a1.jpg b2.jpg", []),
    ("a1.jpg face.jpg", []), ("x12345678.jpg x12345679.jpg", []), ("face.jpg face.png", []),
    ("1.txt 1.jpg.tmp 1xjpg", []), ("١٢.jpg", [])])
def test_a_frame_is_named_by_its_number_or_by_the_one_in_which_names_differ(tmp_path, names, numbers):
    for name in names.split():
        (tmp_path / name).touch()
    frames = VideoFrames(tmp_path)
    found = {int(n): os.path.basename(frames.where(i)) for i, n in enumerate(frames.numbers)}
    assert found == dict(sorted(zip(numbers, names.split())))


def test_what_lies_beside_frames_is_counted_by_kind_and_two_files_of_a_frame_are_refused(tmp_path):
    names = "00001.jpg .DS_Store 00000.jpg notes.txt raw cover.jpg a.heic".split()
    for name in [*names, "other/frame_00.jpg", "other/frame_01.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    kinds = ["hidden", "with number 0", ".txt", ".heic", "without extension", "folders"]
    assert VideoFrames(tmp_path).beside == dict.fromkeys([*kinds, "images of other names"], 1)
    assert VideoFrames(tmp_path, 0).numbers.tolist() == [0, 1]
    lines = passed_over(tmp_path, [VideoFrames(tmp_path), VideoFrames(tmp_path / "other")])
    assert lines[0] == "  in 1 videos a number in the name is taken for the frame's, as 1 in frame_01.jpg"
    assert "2 with number 0" in lines[1] and "read from .jpg, .jpeg" in lines[2] and "ffmpeg -i" in lines[2]
    for name, before in (("1.png", "00001.jpg"), ("other/frame_1.png", "frame_01.jpg")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{before} and .*1.png are both frame 1; remove one"):
            VideoFrames((tmp_path / name).parent)


def test_folders_of_folders_are_entered_and_the_first_root_with_frames_of_a_video_is_taken(tmp_path):
    for folder in ("a/cropped/x", "a/y", "a/y/masks", "a/1/2/3/deep", "a/1/2/3/4/too_deep", "a/new/twice",
                   "b/x", "b/z", "b"):
        draw(tmp_path / folder, [1])
    for folder in ("a/z", "a/.hidden", "a/cropped/twice", "a/new/x", "a/loop"):
        (tmp_path / folder).mkdir()
    for name in ("a/fig_1.png", "a/video.mp4", "a/new/twice/frame_1.png", "a/new/fig_1.png"):
        (tmp_path / name).touch()
    (tmp_path / "a/loop/circle").symlink_to(tmp_path / "a/loop")
    videos, lines = find_videos([tmp_path / "a", tmp_path / "b"])
    assert {name: os.path.relpath(frames.folder, tmp_path) for name, frames in videos.items()} == {
        "deep": "a/1/2/3/deep", "new": "a/new", "twice": "a/new/twice", "x": "a/cropped/x", "y": "a/y",
        "z": "b/z"}
    assert [line.replace(str(tmp_path), "") for line in lines] == [
        "  in 1 videos a number in the name is taken for the frame's, as 1 in fig_1.png",
        "  not read, as no frame (00001.jpg, ...): 5 folders, 1 images of other names",
        "  not read, as in no video's folder: 1 .png, 1 .mp4 in /a", f"  {READ}",
        "  5 folders without a frame: 4, twice, circle, x, z",
        "  not read, as in no video's folder: 1 .jpg in /b", f"  {READ}",
        "  1 videos of /b are in an earlier folder of data.frames too, and taken from there"]


@pytest.mark.parametrize("make, roots, message", [
    (lambda root: None, ["nowhere"], "nowhere is no folder; expected one that holds a folder"),
    (lambda root: (root / "a").mkdir(), ["a"], "no folder of frames in"),
    (lambda root: [draw(root / f"a/{part}/x", [1]) for part in "pq"], ["a"],
     "p/x and .*q/x are frames of one video"),
], ids=["missing", "empty", "twice"])
def test_roots_that_cannot_be_right_are_refused(tmp_path, make, roots, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_videos([tmp_path / root for root in roots])


# ---- Frames with labels

def test_only_frames_with_a_label_and_an_image_are_fine_tuned_on(tmp_path):
    for video in range(9):
        draw(tmp_path / f"frames/{video}", [1])
    draw(tmp_path / "frames/a", [0, 2, 3, 4, 6])                           # 6 is past the labels
    draw(tmp_path / "frames/b", [1])
    rows = {"a": ["0", "1", "-1", "3", "4"], "b": ["7"], "c": ["2"]}
    files = {video: label_file(tmp_path, EXPR, "Train_Set", video, rows[video]) for video in rows}
    videos, lines = find_videos([tmp_path / "frames"])
    assert lines == ["  not read, as no frame (00001.jpg, ...): 1 with number 0",
                     f"  1 videos of {tmp_path}/frames have an image of number 0, without a label: ['a']"]
    frames, lines = expr_frames(files, videos)
    assert [frames.where(i)[-11:] for i in range(3)] == ["a/00002.jpg", "a/00004.jpg", "b/00001.jpg"]
    assert frames.labels.tolist() == [1, 3, 7] and frames.videos == ["a", "b"]
    assert lines == ["  left out, no frames: c"]
    with pytest.raises(ValueError, match="1 label files, 1 of them without frames; check data.labels"):
        expr_frames({"c": files["c"]}, {})


def test_the_fingerprint_tells_other_labels_other_frames_and_other_images(tmp_path):
    def found(numbers=(1, 2), classes=(0, 1), size=8, video="a"):
        draw(tmp_path / f"{numbers}{size}" / video, numbers, size)
        rows = np.stack([np.zeros(2, int), numbers], axis=1)
        folder = VideoFrames(tmp_path / f"{numbers}{size}" / video)
        return Frames([video], [folder], rows, np.array(classes)).fingerprint()
    assert len({found(), found((1, 3)), found(classes=(0, 2)), found(size=20), found(video="b")}) == 5


@pytest.mark.parametrize("ends, wrong", [
    ([40, 44, 41, 36], None), ([40, 80, 41], None), ([33], None), ([33, 30], None), ([1320], "33 images"),
    ([80, 82, 40], "2 images for each label"), ([8, 40, 8], "0.2 images"), ([20], "0.5 images"),
    ([33, 34, 33, 40], "0.82 images"), ([50], "1.2 images"),
    ([50, 30, 56, 66], "1.3 images"), ([40, 20, 25, 30], None), ([40, 28, 28], None)])
def test_videos_that_end_elsewhere_than_their_labels_are_named_if_few_else_refused(ends, wrong):
    ends = {f"v{i}": end for i, end in enumerate(ends)}
    with pytest.raises(ValueError, match=wrong) if wrong else nullcontext():
        odd = [f"{name} (frames to {end}, 40 labels)" for name, end in ends.items() if not 35 < end < 45]
        assert "".join(check_ends(ends, dict.fromkeys(ends, 40))).endswith(", ".join(odd))


@pytest.mark.parametrize("name", ["{:05d}.jpg", "f_{}.png"])
def test_images_that_count_from_0_are_refused(tmp_path, name):
    for path in [tmp_path / "a b" / video / name.format(n) for video in "xy" for n in range(11)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    files = {video: label_file(tmp_path, EXPR, "Train_Set", video, ["0"] * 11) for video in "xy"}
    with pytest.raises(ValueError, match="2 of 2 videos have an image of number 0, such as .*/x; line 1 of"):
        expr_frames(files, find_videos([tmp_path / "a b"])[0])


# ---- Batches of images

class Pixels:
    """Six images in memory; some cannot be read."""
    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 6

    def read(self, i):
        if i in self.broken:
            raise ValueError(f"image {i}: not a readable image")
        return Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 12, 3), dtype=np.uint8))


COLUMNS = [np.arange(6, dtype=np.int8) * 2, np.arange(12, dtype=np.float32).reshape(6, 2)]


def test_without_a_seed_an_item_is_the_whole_image_its_columns_and_zeros_and_a_batch_may_be_empty():
    images = Images(Pixels(), 8, COLUMNS, noise=(2, 3))
    pixels, a, b, noise = full = images.collate([images[4], images[1]])
    assert torch.equal(pixels[1], torch.from_numpy(resize(Pixels().read(1), (8, 8)).copy()))
    assert a.tolist() == [8, 2] and a.dtype == torch.long and b.tolist() == [[8, 9], [2, 3]]
    assert noise.shape == (2, 2, 3) and not noise.any()
    for items in ([], [None]):                                              # no share; nothing readable
        of = [(len(part), part.shape[1:], part.dtype) for part in images.collate(items)]
        assert of == [(0, part.shape[1:], part.dtype) for part in full]


def backwards(epoch):
    return np.arange(6)[::-1]


@pytest.mark.parametrize("seed", [0, 7])
def test_with_a_seed_crop_and_noise_are_functions_of_seed_epoch_and_sample(seed):
    images = Images(Pixels(), 8, seed=seed, smallest=0.5, noise=(4,), order=backwards)
    images.epoch = 3
    pixels, noise = images[2]                                               # row 3
    rng = generator(seed, 3, 2)
    assert np.array_equal(pixels, random_crop(Pixels().read(3), (8, 8), rng, 0.5))
    assert np.array_equal(noise, rng.random(4, dtype=np.float32))
    images.epoch = 4
    assert not np.array_equal(images[2][1], noise)
    assert np.array_equal(pickle.loads(pickle.dumps(images))[2][1], images[2][1])       # as a spawned worker


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_left_out_and_said_in_the_first_epoch(workers, capfd):
    images = Images(Pixels(broken=(1, 2)), 8, COLUMNS, seed=0)
    for epoch in (0, 1):
        images.epoch = epoch
        found = [batch[1].tolist() for batch in loader(images, [[0, 1, 5], [2], []], workers, ALONE)]
        assert found == [[0, 10], [], []]
    assert capfd.readouterr().out.count("left out: image 1: not a readable image") == 1


def test_an_image_is_decoded_once_until_enough_are_kept(monkeypatch):
    read, files = [], Pixels()
    files.read = lambda i: read.append(i) or Pixels.read(files, i)
    monkeypatch.setattr("data.KEPT_PIXELS", 200)                           # two images of 9 x 12 pixels
    images = Images(files, 8)
    for i in (0, 1, 2, 0, 1, 2):
        assert np.array_equal(images[i][0], resize(Pixels.read(files, i), (8, 8)))
    assert read == [0, 1, 2, 2]


def test_some_faces_are_those_that_are_there_and_readable(tmp_path):
    draw(tmp_path / "v", [1, 3, 5])
    (tmp_path / "v/00003.jpg").write_bytes(b"no image")
    (first, _), (last, face) = some_faces(VideoFrames(tmp_path / "v"), [1, 2, 3, 5, 9], 4)
    assert (first, last) == (1, 5) and face.shape == (4, 4, 3) and abs(int(face.mean()) - 58) < 3


# ---- Feature files

@pytest.mark.parametrize("content, message", [
    (b"\x93NUMPY\x01\x00\x10\x00{[(" + b" " * 13, "not a plain feature array"),
    (np.arange(6), "int64 .6,.*expected .frames, D."), (np.zeros(5, np.float16), "float16 .5,."),
    (np.zeros((2, 3), ">f4"), "not a plain feature array"),
    (np.full((4, 2), -np.inf, np.float16), "NaN or infinity in frames 1 to 4"),
], ids=["broken header", "integers", "one dimension", "other byte order", "infinity"])
def test_a_feature_file_that_is_none_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "v.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=f"v.npy: .*{message}.*extract_features.py again"):
        read_features(path)
    with pytest.raises(OSError):
        read_features(tmp_path / "gone.npy")


def extracted(tmp_path, lengths: dict):
    """Features and label files of some videos. -> {video: label file}"""
    files = {}
    for video, (labels, frames) in lengths.items():
        files[video] = label_file(tmp_path, VA, "Train_Set", video, ["0.5,-0.5"] * labels)
        if frames:
            features = np.random.default_rng(0).random((frames, 3)).astype(np.float16)
            np.save(tmp_path / f"{video}.npy", features)
            np.save(noface_path(tmp_path / f"{video}.npy"), np.zeros(frames, bool))
    return files


def test_videos_are_opened_with_their_labels_and_those_left_out_are_told_with_a_reason(tmp_path):
    files = extracted(tmp_path, {"表情.v2": (4, 6), "b": (3, 3), "c": (0, 2), "d": (2, 0), "e": (1, 1)})
    label_file(tmp_path, VA, "Train_Set", "e", ["-5,-5"])
    videos, left_out, dim = open_videos(files, tmp_path, VA)
    assert [(video.name, len(video.labels)) for video in videos] == [("表情.v2", 4), ("b", 3)] and dim == 3
    assert left_out == {"c": "no labels", "d": "no features", "e": "no labels"}
    rows = {"表情.v2": {"faces": 6}, "b": {"faces": 0}, "c": {"faces": 1}}
    (tmp_path / "videos.json").write_text(json.dumps(rows))
    videos, left_out, _ = open_videos(files, tmp_path, VA)
    assert [video.name for video in videos] == ["表情.v2"] and left_out == {
        "b": "no readable face", "c": "no labels", "e": "no labels",
        "d": "no frames when features were extracted"}
    (tmp_path / "表情.v2.noface.npy").unlink()
    with pytest.raises(ValueError, match="表情.v2.npy or its .noface.npy was extracted and is gone; run"):
        open_videos(files, tmp_path, VA)


@pytest.mark.parametrize("change, message", [
    (lambda root: np.save(root / "b.npy", np.zeros((3, 5), np.float16)), "b.npy: features are 3 x 5"),
    (lambda root: np.save(root / "b.npy", np.zeros((2, 3), np.float16)), "b.npy: features are 2 x 3"),
    (lambda root: [np.save(root / f"{video}.npy", np.zeros((60, 3), np.float16)) for video in "ab"],
     r"2 of 2 videos do not end .*: a .frames to 60, 4 labels.*\n18 images for each"),
    (lambda root: [path.unlink() for path in root.glob("*.npy")], "none of 7 rows .*: 2 no features. Ea"),
    (lambda root: [label_file(root, VA, "Train_Set", video, ["-5,-5"] * 3) for video in "ab"],
     "none of 6 rows in 2 label files, such as .*/b.txt, can be used: 2 no labels. Each needs a label o"),
    (lambda root: (root / "videos.json").write_text('{"a": {}}'), "the extraction has not ended"),
    (lambda root: (root / "made_of.json").write_text("{}"), "videos.json is gone; put a copy back"),
], ids=["another width", "too short", "too long", "none", "no labels", "not ended", "table gone"])
def test_features_that_do_not_fit_are_refused(tmp_path, change, message):
    files = extracted(tmp_path, {"a": (4, 6), "b": (3, 3)})
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_videos(files, tmp_path, VA)


def test_the_fingerprint_of_videos_tells_labels_and_what_the_features_were_made_from(tmp_path):
    files = extracted(tmp_path, {"a": (4, 6)})

    def found(sizes=""):
        if sizes:
            (tmp_path / "videos.json").write_text(json.dumps({"a": {"faces": 6, "sizes": sizes}}))
        return fingerprint(open_videos(files, tmp_path, VA)[0])
    before = found()
    np.save(tmp_path / "a.npy", np.zeros((6, 3), np.float16))
    assert found() != before                                               # of unknown origin: by value
    made = found("x")
    np.save(tmp_path / "a.npy", np.ones((6, 3), np.float16))
    assert found() == made != found("y")                                   # extracted again; from others
    files["a"].write_text(files["a"].read_text().replace("0.5", "0.4", 1))
    assert found("x") != made


# ---- Segments

def test_every_frame_is_covered_and_no_segment_is_redundant():
    for n in range(1, 40):
        for window in (1, 2, 5, 8):
            for stride in range(1, window + 1):
                cut = segments(n, window, stride)
                assert set().union(*(range(*part) for part in cut)) == set(range(n))
                assert len(cut) == 1 or set().union(*(range(*part) for part in cut[:-1])) != set(range(n))
                assert all(end - start == window for start, end in cut[:-1])
    assert segments(301, 300, 200) == [(0, 300), (200, 301)] and segments(73, 300, 200) == [(0, 73)]


@pytest.mark.parametrize("task, row", [(VA, [0.5, -5]), (EXPR, 3), (AU, [1] * 11 + [-1])], ids=TASKS)
def test_a_segment_holds_features_targets_masks_and_which_frames_are_real(tmp_path, task, row):
    features = np.arange(21, dtype=np.float16).reshape(7, 3)
    np.save(tmp_path / "a.npy", features)
    labels = np.array([row] * 7, task.dtype)
    data = SegmentData([Video("a", tmp_path / "a.npy", labels)], task, 4, 3)
    x, target, valid, real = data.collate([data[0], data[1]])
    assert len(data) == 2 and x.shape == (2, 4, 3) and x.dtype == torch.float16
    assert torch.equal(x[1], torch.from_numpy(features[3:7])) and real.all()
    assert torch.equal(valid, target != 0) and valid.any()
    short = SegmentData([Video("a", tmp_path / "a.npy", labels[:2])], task, 4, 3)
    x, _, valid, real = short.collate([short[0]])
    assert real.tolist() == [[True, True, False, False]] and not x[0, 2:].any() and not valid[0, 2:].any()
    assert [part.shape for part in short.collate([])] == [(0, *part.shape) for part in short[0]]


# ---- What is there

def test_a_copy_is_described_with_counts_made_by_hand_or_refused_if_it_cannot_be_used(tmp_path):
    draw(tmp_path / "frames/a", [1, 2, 4])
    draw(tmp_path / "frames/b", [1])
    (tmp_path / "frames/e").mkdir()
    (tmp_path / "frames/e/x.bin").write_bytes(b"")
    for split, video in (("Train_Set", "a"), ("Validation_Set", "b")):
        label_file(tmp_path, EXPR, split, video, ["0", "-1", "3"])
        label_file(tmp_path, EXPR, split, f"{video} is gone", ["7"])
        label_file(tmp_path, VA, split, video, ["1,-5", "-5,-5", "0.5,-5"])      # valence only
    lines = list(describe([tmp_path / "frames"], tmp_path))
    assert lines[:2] == ["2 videos with frames, 4 face images",
                         "  not read, as no frame (00001.jpg, ...): 1 .bin"]
    assert lines[3] == "  1 folders without a frame: e"
    assert [" ".join(line.split()) for line in lines[4:6]] == [
        "va Train_Set 1 videos, 3 frames, 0 fully labelled, 0 of them with a face; 2 more in part, 1 with a "
        "face; 0 videos without frames", "valence 2, arousal 0"]
    assert " ".join(lines[8].split()) == ("expr Train_Set 2 videos, 4 frames, 3 fully labelled, 1 of them "
                                          "with a face; 1 videos without frames")
    assert lines[9].startswith("      Neutral 1, Anger 0, Disgust 0, Fear 1") and len(lines) == 13
    assert lines[12] == "1 images after the last label, 3 lines of labels without an image"
    label_file(tmp_path, VA, "Validation_Set", "b", ["-5,-5", "-5,-5"])
    (tmp_path / "frames/a/00001.jpg").unlink()
    (tmp_path / "none/a").mkdir(parents=True)
    for frames, message in (("none", "no folder of frames in .*\n  1 folders without a frame: a"), (
            "frames", r"va, Train_Set: no labelled frame has a face image .2 of 3 have .*\nva, Valid.*"
            r".0 of 2 have .*\nexpr, Train_Set: .*.3 of 4 have a label.*\na label file")):
        with pytest.raises(ValueError, match=message):
            list(describe([tmp_path / frames], tmp_path))
    label_file(tmp_path, VA, "Train_Set", "b", ["0,0"])
    with pytest.raises(ValueError, match="Train_Set/b.txt and .*Validation_Set/b.txt show one scene"):
        list(describe([tmp_path / "frames"], tmp_path))
