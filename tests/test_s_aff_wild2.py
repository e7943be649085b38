"""s-Aff-Wild2: its label files, row by row, and their frames with partial labels."""

import pickle
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import s_aff_wild2
from distributed import Team
from frames import find_videos
from labels import AU, EXPR, VA, targets
from s_aff_wild2 import (COLUMNS, HEADER, MultiTaskFrames, annotated, describe, pos_weight, read_annotations,
                         split_labels)
from training import loader

ALONE = Team(0, 1, torch.device("cpu"))
NOTHING = ",-5,-5,-1" + ",-1" * 12
FULL = ",0.5,-0.25,4,1,0,0,1,0,0,0,0,0,0,1,0"
# The classes and AUs of a complete copy: docs/data.md.
CLASSES = [23976, 4555, 3168, 3122, 18135, 7609, 5228, 24852]
POSITIVES = [18713, 8745, 20342, 30605, 41337, 38286, 26783, 2460, 2980, 5003, 70584, 10756]


def write(path, *rows, header=HEADER, newline="\n"):
    path.write_bytes(newline.join([header, *rows, ""]).encode())
    return path


def row(frame, va=(-5, -5), expr=-1, aus=(-1,) * 12):
    return ",".join(map(str, [frame, *va, expr, *aus]))


def images(root, videos):
    """{video: numbers}: frame n of each has the grey level 10 n. -> what MultiTaskFrames takes"""
    for video, numbers in videos.items():
        (root / "frames" / video).mkdir(parents=True)
        for n in numbers:
            Image.new("RGB", (8, 8), (10 * n,) * 3).save(root / f"frames/{video}/{n:05d}.jpg")
    return find_videos([root / "frames"])


# ---- The file

def test_each_row_is_a_frame_with_its_labels_in_the_order_of_the_file(tmp_path):
    path = write(tmp_path / "a.txt", "clip.v2_left/00012.jpg" + FULL, "136/00001.jpg" + NOTHING,
                 "clip.v2_left/00003.jpg,-5,1,-1,-1,1,0,-1,0,0,0,0,0,0,0,-1")
    found = read_annotations(path)
    assert found.videos == ["clip.v2_left", "136"] and found.path == str(path) and found.repeated == 0
    assert found.frames.tolist() == [[0, 12], [1, 1], [0, 3]]
    assert found.labels.dtype == np.float32 and found.labels.tolist() == [
        [0.5, -0.25, 4, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [-5, -5, -1] + [-1] * 12,
        [-5, 1, -1, -1, 1, 0, -1, 0, 0, 0, 0, 0, 0, 0, -1]]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_labels_of_a_row_are_split_in_three(tmp_path, kind):
    labels = kind(read_annotations(write(tmp_path / "a.txt", "a/1.jpg" + FULL, "a/2.jpg" + NOTHING)).labels)
    va, expr, au = split_labels(labels)
    assert va.tolist() == [[0.5, -0.25], [-5, -5]] and expr.tolist() == [4, -1]
    assert au.shape == (2, 12) and au[0].tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert len(COLUMNS) == VA.width + EXPR.width + AU.width == 15


@pytest.mark.parametrize("header", [HEADER, "Image, Valence,Arousal,Expression,AUs",
                                    "image,valence,arousal,expression," + ",".join(AU.outputs)])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_crlf_blank_lines_at_the_end_blanks_and_a_byte_order_mark_change_nothing(tmp_path, header, newline):
    plain = read_annotations(write(tmp_path / "a.txt", "a/00001.jpg" + FULL))
    path = write(tmp_path / "b.txt", " a/1.png " + FULL.replace(",", ", "), "", " ", header=header,
                 newline=newline)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    other = read_annotations(path)
    assert other.videos == plain.videos and (other.frames == plain.frames).all()
    assert (other.labels == plain.labels).all()


def test_the_very_same_row_again_is_dropped_and_counted_whatever_its_spelling(tmp_path):
    found = read_annotations(write(
        tmp_path / "a.txt", "a/00001.jpg" + FULL, "b/00001.jpg" + NOTHING, "a/00001.jpg" + FULL,
        "a/1.jpg" + FULL.replace("0.5", ".50"), "b/00001.jpg" + NOTHING.replace("-5", "-5.0")))
    assert found.frames.tolist() == [[0, 1], [1, 1]] and found.repeated == 3


@pytest.mark.parametrize("other", [FULL.replace("0.5", "0.51"), NOTHING, FULL[:-1] + "1", FULL[:-1] + "-1"])
def test_a_frame_with_two_different_rows_is_refused_with_both_lines(tmp_path, other):
    path = write(tmp_path / "a.txt", "b/00007.jpg" + NOTHING, "a/00007.jpg" + FULL, "a/7.jpg" + other)
    message = f"{path}, line 4: frame 7 of a has other labels than in line 3; keep the right one"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_annotations(path)


def changed(column, text):
    """A whole row with one field replaced; column 0 is the frame."""
    fields = ("a/00002.jpg" + FULL).split(",")
    fields[column] = text
    return ",".join(fields)


@pytest.mark.parametrize("bad, message", [
    ("a/00002.jpg,0,0,1", "4 fields 'a/00002.jpg,0,0,1', expected 16: the frame, valence, arousal"),
    ("a/00002.jpg" + FULL + ",0", "17 fields"), ("", "1 fields ''"),
    (changed(0, ""), "got the frame '', expected <video>/00001.jpg"),
    (changed(0, "00002.jpg"), "got the frame '00002.jpg'"),
    (changed(0, "/00002.jpg"), "got the frame '/00002.jpg'"),
    (changed(0, "../00002.jpg"), "got the frame '../"), (changed(0, "./00002.jpg"), "got the frame './"),
    (changed(0, "x/../a/00002.jpg"), "got the frame 'x/../a"),
    (changed(0, "a/face.jpg"), "got the frame 'a/face.jpg'"),
    (changed(0, "a/00000.jpg"), "got the frame"), (changed(0, "a/00002.txt"), "got the frame"),
    (changed(1, "high"), "got valence 'high', expected a number from -1 to 1, or -5 where it is not"),
    (changed(1, "1.01"), "got valence '1.01'"), (changed(2, "-4"), "got arousal '-4'"),
    (changed(2, "nan"), "got arousal 'nan'"), (changed(2, "inf"), "got arousal 'inf'"),
    (changed(2, ""), "got arousal ''"),
    (changed(3, "8"), "got expression '8', expected a whole number from 0 to 7, or -1"),
    (changed(3, "-5"), "got expression '-5'"), (changed(3, "1.5"), "got expression '1.5'"),
    (changed(3, "nan"), "got expression 'nan'"), (changed(3, "Anger"), "got expression 'Anger'"),
    (changed(4, "2"), "got AU1 '2', expected a whole number from 0 to 1, or -1"),
    (changed(15, "0.5"), "got AU26 '0.5'"), (changed(11, "-5"), "got AU15 '-5'")])
def test_a_fault_is_refused_with_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "a.txt", "a/00001.jpg" + FULL, bad, "a/00003.jpg" + FULL)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {message}")):
        read_annotations(path)


@pytest.mark.parametrize("content", ["", "a/00001.jpg" + FULL, "valence,arousal\n0,0\n",
                                     "image,arousal,valence,expression,aus\n",
                                     HEADER + "\n"], ids=["empty", "no header", "VA", "order", "none"])
def test_a_file_of_another_kind_is_refused_and_one_without_rows_has_none(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text(content)
    if content == HEADER + "\n":
        assert read_annotations(path).labels.shape == (0, 15)
        with pytest.raises(ValueError, match="none of its 0 frames has a label"):
            MultiTaskFrames(read_annotations(path), {}, size=8)
    else:
        with pytest.raises(ValueError, match=rf"a.txt, line 1: header is .*, expected '{HEADER}'"):
            read_annotations(path)


def test_an_image_or_a_folder_in_place_of_the_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=f"a.txt: not a text file; expected .* header {HEADER}"):
        read_annotations(tmp_path / "a.txt")
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(OSError, match=re.escape(str(path))):
            read_annotations(path)


# ---- What it holds

def labels_of(*aus):
    """Rows (n, 15) with these AUs of one column, the same in all 12."""
    labels = np.full((len(aus), 15), -1, np.float32)
    labels[:, 3:] = np.array(aus)[:, None]
    return labels


@pytest.mark.parametrize("aus, weight", [((1, 0, 0, 0, -1), 3), ((1, 1, 0), .5), ((0, 1), 1), ((0, 0), 1),
                                         ((1, 1), 1), ((-1, -1), 1), ((), 1)])
def test_the_weight_of_an_au_is_negatives_over_positives_or_1_where_one_of_both_is_missing(aus, weight):
    assert pos_weight(labels_of(*aus)).tolist() == [weight] * 12


def test_each_au_has_a_weight_of_its_own():
    labels = np.full((100, 15), -1, np.float32)
    for k in range(12):
        labels[:2 * k + 2, 3 + k] = 0
        labels[:k % 3 + 1, 3 + k] = 1
    expected = [(2 * k + 1 - k % 3) / (k % 3 + 1) for k in range(12)]
    expected[0] = 1.0                                                    # 1 positive, 1 negative
    weights = pos_weight(labels)
    assert weights.tolist() == pytest.approx(expected) and weights.dtype == torch.float32


def test_missing_labels_are_told_by_the_code_of_their_own_task():
    row = np.array([[-1, -5, -1, *[0, -1] * 6]], np.float32)             # a valence of -1 is a label
    assert annotated(row).tolist() == [[True, False, False, *[True, False] * 6]]
    for task, part in zip((VA, EXPR, AU), split_labels(row)):
        given = {"va": annotated(row)[:, :2], "expr": annotated(row)[:, 2], "au": annotated(row)[:, 3:]}
        assert (targets(part, task)[1] == given[task.name]).all()


DESCRIBED = """\
{}: 5 frames of 2 videos, 4 of them with a label; 1 rows that repeat an earlier one
  va    2 frames, 1 more with one of both
  expr  2 frames: Neutral 0, Anger 0, Disgust 0, Fear 0, Happiness 1, Sadness 0, Surprise 0, Other 1
  au    2 frames, 1 more with some of them; present (weight of its positives): AU1 2 (0.50), AU2 1 (1.00), \
AU4 1 (1.00), AU6 1 (1.00), AU7 1 (1.00), AU10 1 (1.00), AU12 1 (1.00), AU15 1 (1.00), AU23 1 (1.00), \
AU24 1 (1.00), AU25 1 (1.00), AU26 1 (1.00)
"""


def a_file(path):
    return write(path, row("a/00001.jpg", (0, 0), 4), row("a/00002.jpg", (0, -5), 7, (1,) * 12),
                 row("b/00001.jpg"), row("b/00002.jpg", (1, 1), -1, (0,) * 12),
                 row("b/00003.jpg", aus=(1,) + (-1,) * 11), row("b/00001.jpg"))


def test_a_file_is_described_with_counts_made_by_hand(tmp_path):
    path = a_file(tmp_path / "a.txt")
    assert describe(read_annotations(path)) + "\n" == DESCRIBED.format(path)


def test_the_script_prints_each_file_or_one_line_of_refusal(tmp_path, monkeypatch, capsys):
    path = a_file(tmp_path / "a.txt")
    for files, code in (([path], 0), ([path, tmp_path / "none.txt"], 2), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["s_aff_wild2.py", *map(str, files)])
        with pytest.raises(SystemExit, match=f"^{code}$"):
            runpy.run_path(s_aff_wild2.__file__, run_name="__main__")
        said, errors = capsys.readouterr()
        assert said == DESCRIBED.format(path) if files else "python s_aff_wild2.py FILE" in said
        assert errors.startswith("error: ") and "none.txt" in errors if code else not errors


def test_the_counts_of_a_complete_copy_on_the_page_are_those_that_sum_to_its_labelled_frames():
    page = open(s_aff_wild2.__file__.replace("s_aff_wild2.py", "docs/data.md")).read()
    for counts in (CLASSES, POSITIVES):
        assert "| " + " | ".join(f"{count:,}" for count in counts) + " |" in page
    assert f"EXPR {sum(CLASSES):,}, AU 103,316" in page


# ---- Images

def test_only_frames_with_a_label_and_an_image_are_taken_and_the_rest_is_counted(tmp_path):
    videos = images(tmp_path, {"a": [1, 3], "b": [2, 9], "unlabelled": [1]})
    rows = [row("b/00002.jpg", expr=3), row("a/00001.jpg", (0.5, -5)), row("a/00003.jpg"),
            row("a/00002.jpg", expr=1), row("ghost/00001.jpg", expr=2), row("b/00002.jpg", expr=3)]
    frames = MultiTaskFrames(read_annotations(write(tmp_path / "a.txt", *rows)), videos, size=4)
    assert [frames.where(i) for i in range(len(frames))] == [
        str(tmp_path / "frames/b/00002.jpg"), str(tmp_path / "frames/a/00001.jpg")]
    assert frames.skipped == {"image not on disk": 2, "no label": 1, "repeats an earlier row": 1}
    assert frames.summary() == (
        "2 frames with a label and a face image in 2 videos; left out: 2 image not on disk, 1 no label, "
        "1 repeats an earlier row; not on disk: a/00002.jpg, ghost/00001.jpg; videos without frames: ghost")
    (image, labels, video), (other, half, of) = frames[0], frames[1]
    assert frames.used == ["b", "a"] and (frames.videos[video], frames.videos[of]) == ("b", "a")
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8 and (image.mean(), other.mean()) == (20, 10)
    assert labels.tolist() == [-5, -5, 3] + [-1] * 12 and half.tolist() == [0.5, -5, -1] + [-1] * 12


def test_a_whole_copy_leaves_nothing_out_and_says_nothing_of_it(tmp_path):
    videos = images(tmp_path, {"a": [1]})
    frames = MultiTaskFrames(read_annotations(write(tmp_path / "a.txt", "a/1.jpg" + FULL)), videos, size=4)
    assert frames.summary() == "1 frames with a label and a face image in 1 videos" and not frames.skipped


def test_images_in_two_roots_and_of_other_names_are_found_by_their_number(tmp_path):
    for place in ("one/cropped_aligned/a", "two/b"):
        (tmp_path / place).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one/cropped_aligned/a/1.PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "two/b/000007.jpg")
    path = write(tmp_path / "a.txt", "b/00007.jpg" + FULL, "a/00001.jpg" + FULL)
    videos = find_videos([tmp_path / "one", tmp_path / "two"])
    frames = MultiTaskFrames(read_annotations(path), videos, size=8)
    assert [frames.where(i) for i in (0, 1)] == [str(tmp_path / "two/b/000007.jpg"),
                                                 str(tmp_path / "one/cropped_aligned/a/1.PNG")]
    assert frames[1][0].shape == (8, 8, 3) and pickle.loads(pickle.dumps(frames)).where(0) == frames.where(0)


def test_a_file_of_another_folder_is_refused_with_a_path_that_was_looked_for(tmp_path):
    videos = images(tmp_path, {"a": [1]})
    rows = ["a/00001.jpg" + FULL, *(f"b/{n:05d}.jpg" + FULL for n in range(1, 12))]
    found = read_annotations(write(tmp_path / "a.txt", *rows))
    with pytest.raises(ValueError, match="a.txt: 11 of the 12 images that it names are not there; looked for "
                                         "b/00001.jpg; check data.frames"):
        MultiTaskFrames(found, videos, size=8)
    rows = ["a/00001.jpg" + FULL, *(f"b/{n:05d}.jpg" + FULL for n in range(1, 10))]
    frames = MultiTaskFrames(read_annotations(write(tmp_path / "a.txt", *rows)), videos, size=8)
    assert len(frames) == 1 and "not on disk: b/00001.jpg, b/00002.jpg, b/00003.jpg, ...;" in frames.summary()


def test_a_file_without_any_label_is_refused(tmp_path):
    found = read_annotations(write(tmp_path / "a.txt", "a/00001.jpg" + NOTHING))
    with pytest.raises(ValueError, match="a.txt: none of its 1 frames has a label"):
        MultiTaskFrames(found, images(tmp_path, {"a": [1]}), size=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_has_images_labels_and_what_could_not_be_read(tmp_path, workers):
    videos = images(tmp_path, {"a": [1, 2, 3]})
    (tmp_path / "frames/a/00002.jpg").write_bytes(b"\xff\xd8 cut short")
    path = write(tmp_path / "a.txt", *(row(f"a/{n:05d}.jpg", (n / 10, -5), n) for n in (1, 2, 3)))
    frames = MultiTaskFrames(read_annotations(path), videos, size=8)
    (pixels, labels, of, problems), (none, no_labels, *_) = loader(frames, [[2, 1, 0], []], workers, ALONE)
    assert pixels.shape == (2, 8, 8, 3) and pixels.dtype == torch.uint8
    assert pixels.float().mean((1, 2, 3)).round().tolist() == [30, 10]
    assert labels.dtype == torch.float32 and of.tolist() == [0, 0]
    assert torch.allclose(labels[:, :3], torch.tensor([[0.3, -5, 3], [0.1, -5, 1]]))
    assert len(problems) == 1 and problems[0].startswith(f"{frames.where(1)}: not a readable image")
    assert none.shape == (0, 8, 8, 3) and no_labels.shape == (0, 15) and no_labels.dtype == torch.float32


def test_the_crop_is_told_sample_and_epoch(tmp_path):
    told = []

    def crop(image, sample, epoch):
        told.append((image.getpixel((0, 0))[0], sample, epoch))
        return np.full((8, 8, 3), 7, np.uint8)
    path = write(tmp_path / "a.txt", "a/00002.jpg" + FULL, "a/00001.jpg" + FULL)
    frames = MultiTaskFrames(read_annotations(path), images(tmp_path, {"a": [1, 2]}), size=8, crop=crop)
    for frames.epoch in (0, 3):
        assert [frames[i][0].mean() for i in (0, 1)] == [7, 7]
    assert told == [(20, 0, 0), (10, 1, 0), (20, 0, 3), (10, 1, 3)]


def test_another_label_frame_or_first_image_has_another_fingerprint(tmp_path):
    videos = images(tmp_path, {"a": [1, 2], "b": [1]})

    def fingerprint(*rows):
        return MultiTaskFrames(read_annotations(write(tmp_path / "a.txt", *rows)), videos, 8).fingerprint()
    rows = ["a/00001.jpg" + FULL, "b/00001.jpg" + FULL]
    same = fingerprint(*rows)
    assert same == fingerprint(*rows, rows[0]) and same.startswith("2 frames of 2 videos, checksum ")
    others = [fingerprint(rows[0], "b/00001.jpg" + NOTHING.replace("-1", "0", 1)), fingerprint(*rows[::-1]),
              fingerprint("a/00002.jpg" + FULL, rows[1]), fingerprint(rows[0])]
    Image.effect_noise((64, 64), 50).save(tmp_path / "frames/b/00001.jpg")
    assert len({same, *others, fingerprint(*rows)}) == 6
