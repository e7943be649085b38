"""Aff-Wild2 as it lies on disk: label codes, frames in several roots, splits and folds, segments, and what training reads."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import (ExprFrames, SegmentData, find_videos, frame_numbers, frame_path, label_files, open_videos, person_group,
                  read_features, read_labels, segments, split, targets)
from training import Batches, Team

HEADER = {"va": "valence,arousal", "expr": "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other",
          "au": "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"}
FOLDER = {"va": "VA_Estimation_Challenge", "expr": "EXPR_Classification_Challenge", "au": "AU_Detection_Challenge"}
NAMES = ["1-30-1280x720", "136", "28-30-1280x720-2_left", "28-30-1280x720-2_right", "28-30-1280x720-2", "video86_3", "clip.v2.final"]


def write(path, *lines, end="\n", bom=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((bom + end.join([*lines, ""])).encode())
    return path


def frame(folder, number, grey=0):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{number:05d}.jpg")


# --- labels -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("tail", [(), ("", " ", "")], ids=["", "blank lines"])
@pytest.mark.parametrize("task, rows, expected, dtype", [
    ("va", ["0.5,-0.25", "-5,-5", "1,-1", "-5.0,0.125"], [[.5, -.25], [-5, -5], [1, -1], [-5, .125]], np.float32),
    ("expr", ["0", "7", "-1", "3"], [0, 7, -1, 3], np.int8),
    ("au", ["0,1,0,1,0,1,0,1,0,1,0,1", ",".join(["-1"] * 12), "1,-1,0,0,0,0,0,0,0,0,0,0"],
     [[0, 1] * 6, [-1] * 12, [1, -1] + [0] * 10], np.int8)])
def test_labels_are_read_as_they_stand_whatever_the_line_ends(tmp_path, task, rows, expected, dtype, end, bom, tail):
    labels = read_labels(write(tmp_path / "v.txt", HEADER[task], *rows, *tail, end=end, bom=bom), task)
    assert labels.dtype == dtype and np.array_equal(labels, expected)


def test_a_header_may_have_spaces_and_another_case_and_a_file_may_have_no_frames(tmp_path):
    assert read_labels(write(tmp_path / "v.txt", "Valence, Arousal", "0, 1"), "va").tolist() == [[0, 1]]
    assert [read_labels(write(tmp_path / "v.txt", HEADER[t]), t).shape for t in HEADER] == [(0, 2), (0,), (0, 12)]


@pytest.mark.parametrize("task, labels, target, valid", [
    ("va", [[.5, -5], [-5, -5], [-1, 1]], [[.5, 0], [0, 0], [-1, 1]], [[1, 0], [0, 0], [1, 1]]),
    ("expr", [0, -1, 7], [0, 0, 7], [1, 0, 1]), ("au", [[1, -1, 0]], [[1, 0, 0]], [[1, 0, 1]])])
def test_invalid_codes_become_target_0_and_not_valid(task, labels, target, valid):
    got_target, got_valid = targets(np.array(labels), task)
    assert got_valid.dtype == bool and got_target.tolist() == target and got_valid.astype(int).tolist() == valid


@pytest.mark.parametrize("folder", ["EXPR_Classification_Challenge", "EXPR_Recognition_Challenge"])
def test_both_spellings_of_the_expr_folder_are_read_with_names_whole(tmp_path, folder):
    for name in NAMES:
        write(tmp_path / folder / "Train_Set" / f"{name}.txt", HEADER["expr"], "0")
    write(tmp_path / folder / "Validation_Set" / "v.txt", HEADER["expr"], "0")
    write(tmp_path / folder / "Train_Set" / "notes.md", "not a label file")
    files = label_files(tmp_path, "expr")
    assert list(files["Train_Set"]) == sorted(NAMES) and list(files["Validation_Set"]) == ["v"]
    assert all(file.name == f"{name}.txt" for name, file in files["Train_Set"].items())


def test_two_expr_folders_are_refused_because_one_of_them_would_be_ignored(tmp_path):
    for folder in data.FOLDERS["expr"]:
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="both .*EXPR_Classification_Challenge and .*EXPR_Recognition_Challenge exist; keep one"):
        label_files(tmp_path, "expr")


# --- frames -----------------------------------------------------------------------------------------------------------

def test_videos_of_several_roots_are_merged_and_the_first_root_with_frames_wins(tmp_path):
    first, second = tmp_path / "cropped_aligned", tmp_path / "cropped_aligned_new_50_vids"
    for name in NAMES:
        (first / name).mkdir(parents=True)
    for name in ("136", "new_right", NAMES[0]):
        (second / name).mkdir(parents=True)
    for frame in (first / "136/00001.jpg", second / "136/00001.jpg", second / NAMES[0] / "00001.jpg"):
        frame.touch()
    (first / "readme.txt").write_text("no video")
    videos = find_videos([first, str(second)])
    assert list(videos) == sorted([*NAMES, "new_right"])
    assert videos["136"] == first / "136" and videos["new_right"] == second / "new_right" and videos[NAMES[0]] == second / NAMES[0]


@pytest.mark.parametrize("inner", ["cropped_aligned/cropped_aligned", "new_50_vids/new_50_vids", "copy/cropped_aligned"])
def test_a_nested_folder_of_frames_is_entered(tmp_path, inner):
    for name in NAMES:
        (tmp_path / inner / name).mkdir(parents=True)
    videos = find_videos([tmp_path / inner.split("/")[0]])
    assert videos == {name: tmp_path / inner / name for name in sorted(NAMES)}


def test_frames_are_counted_from_1_by_their_five_digit_names_and_nothing_else_is(tmp_path):
    for name in ("00002.jpg", "00010.jpg", "00001.jpg", "123456.jpg", "3.jpg", "00003.png", "._00004.jpg", "00005.jpg.tmp", "mask.jpg", "9" * 30 + ".jpg"):
        (tmp_path / name).touch()
    assert frame_numbers(tmp_path).tolist() == [1, 2, 10, 123456]
    assert [frame_path("v", n).name for n in (1, 47434, 123456)] == ["00001.jpg", "47434.jpg", "123456.jpg"]


# --- splits and folds -------------------------------------------------------------------------------------------------

def label_tree(root, task="va", order=1):
    """40 videos of very different lengths; every fifth scene shows two people, one of them in the other official set."""
    rng, videos = np.random.default_rng(0), {}
    for i in range(40):
        names = [f"{i}-30_x.y_left", f"{i}-30_x.y_right", f"{i}-30_x.y"] if i % 5 == 0 else [f"{i}-30_x.y"]
        for k, name in enumerate(names):
            videos[name] = ("Train_Set" if (i + k) % 3 else "Validation_Set", int(rng.integers(1, 400)))
    for name, (part, frames) in list(videos.items())[::order]:
        write(root / FOLDER[task] / part / f"{name}.txt", HEADER[task], *["0,0"] * frames)
    return {name: part for name, (part, _) in videos.items()}


def test_fold_0_is_the_official_split(tmp_path):
    official = label_tree(tmp_path)
    train, val = split(tmp_path, "va", 0)
    assert {v: "Train_Set" for v in train} | {v: "Validation_Set" for v in val} == official
    assert all(file.parent.name == official[v] for v, file in (train | val).items())


def test_folds_1_to_4_partition_all_videos_and_keep_scenes_whole(tmp_path):
    official, held_out = label_tree(tmp_path), []
    for fold in (1, 2, 3, 4):
        train, val = split(tmp_path, "va", fold)
        assert not train.keys() & val.keys() and train.keys() | val.keys() == official.keys()
        assert not {person_group(v) for v in train} & {person_group(v) for v in val}
        held_out += val
    assert sorted(held_out) == sorted(official)      # each video is held out exactly once


def test_the_quarters_differ_by_no_more_than_one_scene(tmp_path):
    label_tree(tmp_path)
    parts = [split(tmp_path, "va", fold)[1] for fold in (1, 2, 3, 4)]
    scenes = {}
    for video, file in {v: f for part in parts for v, f in part.items()}.items():
        scenes[person_group(video)] = scenes.get(person_group(video), 0) + file.stat().st_size
    sizes = [sum(file.stat().st_size for file in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= max(scenes.values())


def test_the_longest_scenes_are_dealt_first(tmp_path):
    for name, frames in zip("abcdef", (4, 4, 4, 20, 20, 20)):          # with the header, 32 and 96 bytes
        write(tmp_path / FOLDER["va"] / ("Train_Set" if name < "d" else "Validation_Set") / f"{name}.txt", HEADER["va"], *["0,0"] * frames)
    assert sorted(map("".join, (split(tmp_path, "va", fold)[1] for fold in (1, 2, 3, 4)))) == ["abc", "d", "e", "f"]


def test_folds_do_not_depend_on_the_order_of_the_disk(tmp_path):
    label_tree(tmp_path / "a"), label_tree(tmp_path / "b", order=-1)
    for fold in range(5):
        a, b = split(tmp_path / "a", "va", fold), split(tmp_path / "b", "va", fold)
        assert [list(part) for part in a] == [list(part) for part in b]


@pytest.mark.parametrize("video, group", [("136_left", "136"), ("28-30-1280x720-2_right", "28-30-1280x720-2"), ("video86_3", "video86_3"),
                                          ("left", "left"), ("a_left_2", "a_left_2"), ("a_left_right", "a_left")])
def test_only_a_last_left_or_right_is_cut_from_a_name(video, group):
    assert person_group(video) == group


# --- segments ---------------------------------------------------------------------------------------------------------

CASES = [(n, w, s) for w in (1, 2, 3, 5, 8) for s in range(1, w + 1) for n in range(1, 40)]
CASES += [(n, 300, 200) for n in (1, 73, 199, 200, 201, 299, 300, 301, 400, 500, 501, 600, 4068, 47434)]
CASES += [(int(n), int(w), int(s)) for n, w in np.random.default_rng(0).integers(1, 3000, (300, 2)) for s in [1 + (n * 7919) % w]]


def paper(n, w, s):
    """§3.2 as written: starts (i - 1) s for i = 1 ... [n/s] + 1; then what adds no uncovered frame is dropped."""
    kept, covered = [], 0
    for i in range(1, n // s + 2):
        start, end = (i - 1) * s, min((i - 1) * s + w, n)
        if end > covered:
            kept.append((start, end))
            covered = end
    return kept


def test_segments_are_the_papers_without_the_empty_and_the_redundant():
    assert all(segments(*case) == paper(*case) for case in CASES)


def test_segments_cover_every_frame_are_never_empty_and_start_at_multiples_of_the_stride():
    for n, w, s in CASES:
        parts, seen = segments(n, w, s), np.zeros(n, int)
        for k, (start, end) in enumerate(parts):
            assert start == k * s and 0 <= start < end <= n and end - start <= w
            assert end - start == w or k == len(parts) - 1       # only the tail is short
            seen[start:end] += 1
        assert seen.min() >= 1
        seen[slice(*parts[-1])] -= 1
        assert seen.min() == 0                                   # without the last one a frame would be uncovered


@pytest.mark.parametrize("n, expected", [(1, [(0, 1)]), (300, [(0, 300)]), (301, [(0, 300), (200, 301)]), (400, [(0, 300), (200, 400)]),
                                         (600, [(0, 300), (200, 500), (400, 600)])])
def test_segments_of_the_papers_window_and_stride(n, expected):
    assert segments(n, 300, 200) == expected


@pytest.mark.parametrize("n, w, s", [(0, 3, 1), (-1, 3, 1), (5, 3, 0), (5, 3, 4), (5, 0, 0), (5, 3, -1)])
def test_impossible_segments_are_refused(n, w, s):
    with pytest.raises(ValueError, match=rf"segments\(n={n}, window={w}, stride={s}\): expected n >= 1 and 1 <= stride <= window"):
        segments(n, w, s)


# --- single frames ----------------------------------------------------------------------------------------------------

def expr_videos(root, labels, images):
    """labels {video: codes}, images {video: numbers} -> what ExprFrames takes. Frame n of each video has grey level 10 n."""
    files = {v: write(root / "labels" / f"{v}.txt", HEADER["expr"], *map(str, codes)) for v, codes in labels.items()}
    for video, numbers in images.items():
        for n in numbers:
            frame(root / "frames" / video, n, 10 * n)
    return files, find_videos([root / "frames"])


def test_only_frames_with_label_and_image_are_taken(tmp_path):
    frames = ExprFrames(*expr_videos(tmp_path, {"a_left": [3, -1, 0, 7], "b": [1, 2], "ghost": [5]},
                                     {"a_left": [1, 2, 4, 5, 6], "b": [2], "unlabelled": [1]}), size=8)
    # of a_left, 2 is invalid, 3 has no image, 5 and 6 lie past the last label; of b, 1 has no image
    assert [(frames.where(i).split("/")[-2:], frames[i][1]) for i in range(len(frames))] == [
        (["a_left", "00001.jpg"], 3), (["a_left", "00004.jpg"], 7), (["b", "00002.jpg"], 2)]
    assert frames.without_frames == ["ghost"]
    assert [frames[i][0].mean().round() for i in range(3)] == [10, 40, 20] and frames[0][0].shape == (8, 8, 3)


@pytest.mark.parametrize("count, every", [(12, 1), (12, 4), (3, 5), (1, 1), (11, 3), (13, 5)])
def test_every_frame_is_taken_in_some_epoch_and_none_twice_in_one(tmp_path, count, every):
    frames = ExprFrames(*expr_videos(tmp_path, {"a": [0] * count}, {"a": range(1, count + 1)}), size=8, every=every)
    seen = set()
    for frames.epoch in range(every):
        epoch = [frames.where(i) for i in range(len(frames))]
        assert len(set(epoch)) == len(epoch) <= -(-count // every)
        seen |= set(epoch)
    assert len(seen) == count


def test_each_epoch_takes_other_frames_and_the_crop_is_told_which(tmp_path):
    told = []
    frames = ExprFrames(*expr_videos(tmp_path, {"a": [0] * 6}, {"a": range(1, 7)}), size=8, every=3,
                        crop=lambda image, i, epoch: told.append((image.getpixel((0, 0))[0], i, epoch)) or np.zeros((8, 8, 3), np.uint8))
    for frames.epoch in (0, 1, 5):
        [frames[i] for i in range(len(frames))]
    assert told == [(10, 0, 0), (40, 1, 0), (20, 0, 1), (50, 1, 1), (30, 0, 5), (60, 1, 5)]


def test_an_unreadable_image_has_class_minus_1_and_stops_nothing(tmp_path):
    frames = ExprFrames(*expr_videos(tmp_path, {"a": [4, 5]}, {"a": [1, 2]}), size=8)
    (tmp_path / "frames/a/00001.jpg").write_bytes(b"\xff\xd8 cut short")
    images, classes = frames.collate([frames[0], frames[1]])
    assert classes.tolist() == [-1, 5] and images.shape == (2, 8, 8, 3) and images.dtype == torch.uint8


def test_an_empty_share_of_frames_is_a_batch_of_none(tmp_path):
    images, classes = ExprFrames(*expr_videos(tmp_path, {"a": [4]}, {"a": [1]}), size=8).collate([])
    assert images.shape == (0, 8, 8, 3) and images.dtype == torch.uint8 and classes.shape == (0,) and classes.dtype == torch.long


def test_brightness_classes_are_learned_from_single_frames(tmp_path):
    frames = ExprFrames(*expr_videos(tmp_path, {"a": [n // 3 for n in range(24)]}, {"a": range(1, 25)}), size=4)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    batches = Batches(len(frames), 24, 0, 0, Team(0, 1, torch.device("cpu")))
    images, classes = next(iter(DataLoader(frames, batch_sampler=batches, collate_fn=frames.collate)))
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images.float().mean((1, 2, 3))[:, None] / 128 - 1), classes)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# --- features and segments of videos ----------------------------------------------------------------------------------

LABELS = {"va": [[.1, .2], [-5, -5], [.3, -5], [.5, .6], [.7, .8]], "expr": [0, -1, 7, 3, 2],
          "au": [[1] * 12, [-1] * 12, [-1] + [0] * 11, [0] * 12, [0, 1] * 6]}


def features_of(root, frames, width=3, name="v"):
    root.mkdir(parents=True, exist_ok=True)
    array = np.arange(frames * width).reshape(frames, width).astype(np.float16)
    np.save(root / f"{name}.npy", array)
    return array


def labelled(root, task, codes, name="v"):
    rows = [",".join(map(str, row)) if isinstance(row, list) else str(row) for row in codes]
    return {name: write(root / "labels" / f"{name}.txt", HEADER[task], *rows)}


@pytest.mark.parametrize("task", LABELS)
def test_segments_are_padded_with_masked_zeros_and_invalid_codes_are_not_valid(tmp_path, task):
    array = features_of(tmp_path, 7)                                 # two frames more than labels: images past the last label
    videos, without, dim = open_videos(labelled(tmp_path, task, LABELS[task]), tmp_path, task)
    segment_data = SegmentData(videos, task, window=4, stride=3)
    assert (len(segment_data), dim, without) == (2, 3, []) and segment_data.where(1) == "v frames 4 to 5"
    codes = np.array(LABELS[task], np.float32)
    for i, (start, end) in enumerate([(0, 4), (3, 5)]):
        x, target, valid, frames = segment_data[i]
        real, known = end - start, codes[start:end] != (-5 if task == "va" else -1)
        assert x.dtype == np.float16 and np.array_equal(x[:real], array[start:end]) and not x[real:].any()
        assert frames.dtype == valid.dtype == bool and frames.tolist() == [True] * real + [False] * (4 - real)
        assert np.array_equal(valid[:real], known) and not valid[real:].any()
        assert np.array_equal(target[:real], np.where(known, codes[start:end], 0)) and not target[real:].any()
        assert valid.shape == target.shape == (4, *codes.shape[1:])


def test_a_batch_of_segments_and_an_empty_share_have_the_same_shapes_but_for_b(tmp_path):
    features_of(tmp_path, 5)
    segment_data = SegmentData(open_videos(labelled(tmp_path, "au", LABELS["au"]), tmp_path, "au")[0], "au", 4, 3)
    full, empty = segment_data.collate([segment_data[0], segment_data[1]]), segment_data.collate([])
    assert [tuple(t.shape) for t in full] == [(2, 4, 3), (2, 4, 12), (2, 4, 12), (2, 4)]
    assert [(0, *t.shape[1:], t.dtype) for t in full] == [(*t.shape, t.dtype) for t in empty]


def test_only_the_asked_frames_of_a_feature_file_are_read(tmp_path):
    array = features_of(tmp_path, 9)
    array[0] = np.nan
    np.save(tmp_path / "v.npy", array)
    assert np.array_equal(read_features(tmp_path / "v.npy", 2, 5), array[2:5])
    assert np.array_equal(read_features(tmp_path / "v.npy", 1), array[1:])
    np.save(tmp_path / "long.npy", np.zeros((47_434, 64), np.float16))      # 6 MB
    tracemalloc.start()
    read_features(tmp_path / "long.npy", 40_000, 40_300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_videos_without_features_or_without_frames_are_left_out_by_name(tmp_path):
    features_of(tmp_path, 5, name="clip.v2"), features_of(tmp_path, 5, name="empty")
    files = {k: f for name, n in (("clip.v2", 5), ("empty", 0), ("faceless", 1)) for k, f in labelled(tmp_path, "expr", [1] * n, name).items()}
    videos, without, dim = open_videos(files, tmp_path, "expr")
    assert [v.name for v in videos] == ["clip.v2"] and without == ["empty", "faceless"] and dim == 3


@pytest.mark.parametrize("frames, width", [(4, 3), (5, 4)], ids=["fewer frames than labels", "another width"])
def test_features_that_do_not_fit_labels_or_each_other_are_refused(tmp_path, frames, width):
    features_of(tmp_path, 5, name="a"), features_of(tmp_path, frames, width, name="b")
    files = labelled(tmp_path, "expr", [1] * 5, "a") | labelled(tmp_path, "expr", [1] * 5, "b")
    with pytest.raises(ValueError, match=rf"b\.npy: features are {frames} x {width}, expected at least 5 frames \(as .*b\.txt has\) x 3; delete"):
        open_videos(files, tmp_path, "expr")
