"""Feature files and segments: the paper's cut without the empty and the redundant, zeros after the last
frame, and nothing but the asked frames read."""

import json
import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import segments as module
from labels import AU, EXPR, TASKS, VA
from segments import (SegmentData, Video, feature_shape, fingerprint, labelled_faces, noface_path,
                      open_videos, pad, read_features, reasons, segments)

# ---- Cutting

CASES = [(n, w, s) for w in (1, 2, 3, 5, 8) for s in range(1, w + 1) for n in range(1, 40)]
CASES += [(n, 300, 200)
          for n in (1, 73, 199, 200, 201, 299, 300, 301, 400, 500, 501, 600, 4068, 47434)]
CASES += [(int(n), int(w), 1 + int(n * 7919 % w))
          for n, w in np.random.default_rng(0).integers(1, 3000, (300, 2))]


def paper(n, w, s):
    """§3.2 as written: starts (i - 1) s for i = 1 ... [n/s] + 1; then what adds no uncovered frame is
    dropped."""
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
        assert seen.min() == 0                          # without the last one a frame would be uncovered


@pytest.mark.parametrize("n, expected", [
    (1, [(0, 1)]), (300, [(0, 300)]), (301, [(0, 300), (200, 301)]), (400, [(0, 300), (200, 400)]),
    (600, [(0, 300), (200, 500), (400, 600)])])
def test_segments_of_the_papers_window_and_stride(n, expected):
    assert segments(n, 300, 200) == expected


@pytest.mark.parametrize("n, w, s", [(0, 3, 1), (-1, 3, 1), (5, 3, 0), (5, 3, 4), (5, 0, 0), (5, 3, -1)])
def test_impossible_segments_are_refused(n, w, s):
    message = rf"segments\(n={n}, window={w}, stride={s}\): expected n >= 1 and 1 <= stride <= window"
    with pytest.raises(ValueError, match=message):
        segments(n, w, s)


@pytest.mark.parametrize("t", [0, 1, 4, 6])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, bool])
def test_pad_is_numpys_padding_with_zeros_after_the_last_frame(t, shape, dtype):
    array = (np.random.default_rng(0).normal(size=(t, *shape)) * 9).astype(dtype)
    padded = pad(array, 6)
    expected = np.pad(array, [(0, 6 - t)] + [(0, 0)] * len(shape))
    assert padded.dtype == dtype and padded.shape == (6, *shape) and np.array_equal(padded, expected)


def test_more_frames_than_the_window_are_not_cut_silently():
    with pytest.raises(ValueError):
        pad(np.ones((7, 3)), 6)


# ---- Feature files

LABELS = {"va": [[.1, .2], [-5, -5], [.3, -5], [.5, .6], [.7, .8]], "expr": [0, -1, 7, 3, 2],
          "au": [[1] * 12, [-1] * 12, [-1] + [0] * 11, [0] * 12, [0, 1] * 6]}


def features_of(root, frames, width=3, name="v"):
    array = np.arange(frames * width).reshape(frames, width).astype(np.float16)
    np.save(root / f"{name}.npy", array)
    return array


def labelled(root, task, codes, name="v"):
    rows = [",".join(map(str, row)) if isinstance(row, list) else str(row) for row in codes]
    path = root / "labels" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([",".join(task.outputs), *rows, ""]))
    return {name: path}


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


def test_what_is_read_is_a_copy_that_outlives_and_does_not_change_its_file(tmp_path):
    array = features_of(tmp_path, 4)
    part = read_features(tmp_path / "v.npy", 0, 2)
    part[:] = 0
    assert part.dtype == np.float16 and np.array_equal(np.load(tmp_path / "v.npy"), array)


def test_the_refusal_of_nan_names_the_frames_that_were_asked_for(tmp_path):
    array = features_of(tmp_path, 9)
    array[6, 1] = np.nan
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(ValueError, match=r"v\.npy: NaN or infinity in frames 5 to 8; delete it and run"):
        read_features(tmp_path / "v.npy", 4, 8)


def test_the_shape_of_a_feature_file_is_frames_by_width_even_where_the_values_are_broken(tmp_path):
    np.save(tmp_path / "v.npy", np.full((7, 5), np.nan, np.float16))
    assert feature_shape(tmp_path / "v.npy") == (7, 5)


def test_a_file_that_cannot_be_reached_is_an_error_of_the_disk_not_of_the_features(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_features(tmp_path / "none.npy")


@pytest.mark.parametrize("name", ["136", "clip.v2.final", "a.npy"])
def test_the_mask_of_frames_without_a_face_lies_beside_the_features(name):
    assert noface_path(f"runs/features/{name}.npy") == Path(f"runs/features/{name}.noface.npy")


# ---- Labelled videos

def test_of_features_made_elsewhere_videos_without_features_or_without_labels_are_left_out(tmp_path):
    features_of(tmp_path, 5, name="clip.v2"), features_of(tmp_path, 5, name="empty")
    files = {}
    for name, n in (("clip.v2", 5), ("empty", 0), ("faceless", 1)):
        files |= labelled(tmp_path, EXPR, [1] * n, name)
    (video,), left_out, dim = open_videos(files, tmp_path, EXPR)
    assert (video.name, video.features, dim) == ("clip.v2", tmp_path / "clip.v2.npy", 3)
    assert video.labels.tolist() == [1] * 5
    assert left_out == {"empty": "no labels", "faceless": "no features"}


def extracted(root, **faces):
    """videos.json as the extraction leaves it: the number of faces of each video."""
    (root / "videos.json").write_text(json.dumps({name: {"faces": n} for name, n in faces.items()}))


def test_a_video_without_a_face_is_left_out_and_one_whose_file_is_gone_is_refused(tmp_path):
    files = {}
    for name in ("a", "b", "faceless", "late", "lost"):
        files |= labelled(tmp_path, EXPR, [1] * 5, name)
    for name in ("a", "b", "lost"):
        features_of(tmp_path, 5, name=name)
        np.save(noface_path(tmp_path / f"{name}.npy"), np.zeros(5, bool))
    extracted(tmp_path, a=5, b=4, faceless=0, lost=2)
    videos, left_out, _ = open_videos(files, tmp_path, EXPR)
    assert [video.name for video in videos] == ["a", "b", "lost"]
    assert left_out == {"faceless": "no readable face", "late": "no frames when features were extracted"}
    for gone in ("lost.npy", "b.noface.npy"):
        (tmp_path / gone).rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"files of 1 videos that were extracted are gone: {gone[:-4]}"
                                             .replace(".noface", "")
                                             + "; run extract_features.py, which makes what is missing"):
            open_videos(files, tmp_path, EXPR)
        (tmp_path / "elsewhere").rename(tmp_path / gone)


def test_what_is_left_out_is_told_by_its_reason():
    assert reasons({"a": "no labels", "b": "no readable face", "c": "no labels"}) == (
        "a, c (no labels); b (no readable face)")
    assert reasons({}) == ""


def test_other_labels_or_other_videos_have_another_fingerprint(tmp_path):
    for name in "abc":
        features_of(tmp_path, 5, name=name)

    def of(*named):
        return fingerprint([Video(name, tmp_path / f"{name}.npy", np.array(labels))
                            for name, labels in named])
    one = of(("a", [1, 2]), ("b", [3]))
    assert one.startswith("2 videos, 3 frames, checksum ") and one == of(("a", [1, 2]), ("b", [3]))
    others = [of(("a", [1, 2])), of(("a", [1, 3]), ("b", [3])), of(("a", [1, 2]), ("c", [3])),
              of(("b", [3]), ("a", [1, 2]))]
    assert len({one, *others}) == 5
    features_of(tmp_path, 6, name="b")                              # its last frame is another
    assert of(("a", [1, 2]), ("b", [3])) != one
    extracted(tmp_path, a=5, b=5)                                   # of ours, what they were made from tells
    ours = of(("a", [1, 2]), ("b", [3]))
    features_of(tmp_path, 5, name="b")
    assert of(("a", [1, 2]), ("b", [3])) == ours
    extracted(tmp_path, a=5, b=4)
    assert of(("a", [1, 2]), ("b", [3])) != ours


def test_features_whose_extraction_has_not_ended_or_whose_list_is_gone_are_refused(tmp_path):
    features_of(tmp_path, 5, name="a")
    files = labelled(tmp_path, EXPR, [1] * 5, "a")
    (tmp_path / "videos.json").write_text('{"a": {"frames": 5}}')
    with pytest.raises(ValueError, match="the extraction has not ended; run extract_features.py to go"):
        open_videos(files, tmp_path, EXPR)
    (tmp_path / "videos.json").rename(tmp_path / "made_of.json")
    with pytest.raises(ValueError, match="videos.json is gone; put a copy back"):
        open_videos(files, tmp_path, EXPR)


@pytest.mark.parametrize("task, count", [(VA, 2), (EXPR, 3), (AU, 2)], ids=TASKS)
def test_labelled_frames_with_a_face_are_counted(tmp_path, task, count):
    """Fully labelled are the frames 0, 3, 4 of VA, 0, 2, 3, 4 of Expr, 0, 3, 4 of the AUs; 3 has no face."""
    features_of(tmp_path, 7)
    videos = open_videos(labelled(tmp_path, task, LABELS[task.name]), tmp_path, task)[0]
    assert labelled_faces(videos, task) == count + 1                # nothing is known of faces
    np.save(tmp_path / "v.noface.npy", np.arange(7) == 3)
    assert labelled_faces(videos, task) == count


@pytest.mark.parametrize("frames, width", [(4, 3), (5, 4)], ids=["fewer frames than labels", "another width"])
def test_features_that_do_not_fit_labels_or_each_other_are_refused(tmp_path, frames, width):
    features_of(tmp_path, 5, name="a"), features_of(tmp_path, frames, width, name="b")
    files = labelled(tmp_path, EXPR, [1] * 5, "a") | labelled(tmp_path, EXPR, [1] * 5, "b")
    message = (rf"b\.npy: features are {frames} x {width}, expected at least 5 frames "
               r"\(as .*b\.txt has\) x 3; run extract_features.py, which")
    with pytest.raises(ValueError, match=message):
        open_videos(files, tmp_path, EXPR)


# ---- Segments to train on

@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_segments_are_padded_with_masked_zeros_and_invalid_codes_are_not_valid(tmp_path, task):
    array = features_of(tmp_path, 7)                # two frames more than labels: images past the last label
    codes = LABELS[task.name]
    videos, left_out, dim = open_videos(labelled(tmp_path, task, codes), tmp_path, task)
    segment_data = SegmentData(videos, task, window=4, stride=3)
    assert (len(segment_data), dim, left_out) == (2, 3, {}) and segment_data.where(1) == "v frames 4 to 5"
    codes = np.array(codes, np.float32)
    for i, (start, end) in enumerate([(0, 4), (3, 5)]):
        x, target, valid, frames = segment_data[i]
        real, known = end - start, codes[start:end] != (-5 if task is VA else -1)
        assert x.dtype == np.float16 and np.array_equal(x[:real], array[start:end]) and not x[real:].any()
        assert frames.dtype == valid.dtype == bool
        assert frames.tolist() == [True] * real + [False] * (4 - real)
        assert np.array_equal(valid[:real], known) and not valid[real:].any()
        assert np.array_equal(target[:real], np.where(known, codes[start:end], 0)) and not target[real:].any()
        assert valid.shape == target.shape == (4, *codes.shape[1:])


def test_the_segments_of_several_videos_follow_each_other(tmp_path):
    features_of(tmp_path, 6, name="a"), features_of(tmp_path, 4, name="b")
    files = labelled(tmp_path, EXPR, [1] * 6, "a") | labelled(tmp_path, EXPR, [2] * 4, "b")
    segment_data = SegmentData(open_videos(files, tmp_path, EXPR)[0], EXPR, window=4, stride=2)
    where = [segment_data.where(i) for i in range(len(segment_data))]
    assert where == ["a frames 1 to 4", "a frames 3 to 6", "b frames 1 to 4"]
    assert [segment_data[i][1][0] for i in range(3)] == [1, 1, 2]


def test_a_batch_of_segments_and_an_empty_share_have_the_same_shapes_but_for_b(tmp_path):
    array = features_of(tmp_path, 5)
    videos = open_videos(labelled(tmp_path, AU, LABELS["au"]), tmp_path, AU)[0]
    segment_data = SegmentData(videos, AU, window=4, stride=3)
    full = segment_data.collate([segment_data[0], segment_data[1]])
    empty = segment_data.collate([])
    assert [tuple(t.shape) for t in full] == [(2, 4, 3), (2, 4, 12), (2, 4, 12), (2, 4)]
    assert [(0, *t.shape[1:], t.dtype) for t in full] == [(*t.shape, t.dtype) for t in empty]
    assert full[0].dtype == torch.float16 and full[3].dtype == full[2].dtype == torch.bool
    assert np.array_equal(full[0][0], array[:4]) and np.array_equal(full[0][1, :2], array[3:])


def test_the_script_shows_how_videos_of_some_lengths_are_cut(capsys):
    runpy.run_path(module.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "73 frames: 1 segments, frames 1-73"
    assert lines[2].strip() == "301 frames: 2 segments, frames 1-300, 201-301"
