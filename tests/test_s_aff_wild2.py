"""s-Aff-Wild2: its label files, row by row, and their frames with partial labels."""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import s_aff_wild2
from datasets.s_aff_wild2 import (HEADER, LabelledFrames, describe, pos_weight, read_annotations,
                                  split_labels)
from images import find_videos
from labels import AU

NOTHING = ",-5,-5,-1" + ",-1" * 12
FULL = ",0.5,-0.25,4,1,0,0,1,0,0,0,0,0,0,1,0"


def write(path, *rows, header=HEADER, newline="\n"):
    path.write_bytes(newline.join([header, *rows, ""]).encode())
    return path


def row(frame, va=(-5, -5), expr=-1, aus=(-1,) * 12):
    return ",".join(map(str, [frame, *va, expr, *aus]))


def folders(root, videos):
    """{video: numbers}: frame n of each has the grey level 10 n. -> {video: its folder}"""
    for video, numbers in videos.items():
        (root / "frames" / video).mkdir(parents=True)
        for n in numbers:
            Image.linear_gradient("L").point(lambda x: x + 10 * n).save(root / f"frames/{video}/{n:05d}.jpg")
    return find_videos([root / "frames"])[0]


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
    va, expr, au = split_labels(found.labels)
    assert va.tolist() == [[0.5, -0.25], [-5, -5], [-5, 1]] and expr.tolist() == [4, -1, -1]
    assert au.shape == (3, 12) and au[0].tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]


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


def changed(column, text):
    """A whole row with one field replaced; column 0 is the frame."""
    fields = ("a/00002.jpg" + FULL).split(",")
    fields[column] = text
    return ",".join(fields)


OTHER = "a/1.jpg has other labels than in line 2; keep the right row"


@pytest.mark.parametrize("bad, message", [
    ("a/00002.jpg,0,0,1", "got 'a/00002.jpg,0,0,1', expected <video>/00001.jpg, VA from -1 to 1 (or -5), a "
     "class from 0 to 7 (or -1), 12 AUs of 0 or 1 (or -1)"),
    ("a/00002.jpg" + FULL + ",0", "got 'a/00002.jpg,0.5,"),
    *((changed(0, frame), f"got '{frame}") for frame in (
        "00002.jpg", "../00002.jpg", "./00002.jpg", "x/../a/00002.jpg", "a/face.jpg", "a/00000.jpg")),
    (changed(1, "high"), "could not convert string to float: 'high'"), (changed(2, "nan"), "got 'arousal"),
    (changed(1, "1.01"), "got 'valence 1.01', expected"), (changed(2, "-4"), "got 'arousal -4.0"),
    (changed(3, "8"), "got 'expression 8.0"), (changed(3, "-5"), "got 'expression -5.0"),
    (changed(3, "1.5"), "got 'expression 1.5"), (changed(15, "2"), "got 'AU26 2.0"),
    ("a/1.jpg" + FULL.replace("0.5", "0.51"), OTHER), ("a/1.jpg" + FULL[:-1] + "-1", OTHER)])
def test_a_fault_is_refused_with_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "a.txt", "a/00001.jpg" + FULL, bad, "a/00003.jpg" + FULL)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {message}")):
        read_annotations(path)


@pytest.mark.parametrize("content", ["", "a/00001.jpg" + FULL, "valence,arousal\n0,0\n",
                                     "image,arousal,valence,expression,aus\n"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"a.txt, line 1: header is .*, expected '{HEADER}'"):
        read_annotations(tmp_path / "a.txt")


# ---- What it holds

def test_the_weight_of_an_au_is_negatives_over_positives_or_1_where_one_of_both_is_missing():
    labels = np.full((100, 15), -1, np.float32)
    labels[:, 1:3] = 1                                                       # not of an AU
    for k in range(9):
        labels[:2 * k + 2, 3 + k] = 0
        labels[:k % 3 + 1, 3 + k] = 1
    labels[:5, 12], labels[:5, 13] = 0, 1                                    # AU24 never present, AU25 always
    expected = [(2 * k + 1 - k % 3) / (k % 3 + 1) for k in range(9)]
    weights = pos_weight(labels)
    assert weights.tolist() == pytest.approx([*expected, 1, 1, 1]) and weights.dtype == torch.float32


DESCRIBED = """\
{}: 5 frames of 2 videos, 4 of them with a label; 1 rows that repeat an earlier one
  va    2 frames, 2 more with one of both
  expr  2 frames: Neutral 0, Anger 0, Disgust 0, Fear 0, Happiness 1, Sadness 0, Surprise 0, Other 1
  au    2 frames, 1 more with some of them; present (weight of its positives): AU1 2 (0.50), AU2 1 (1.00), \
AU4 1 (1.00), AU6 1 (1.00), AU7 1 (1.00), AU10 1 (1.00), AU12 1 (1.00), AU15 1 (1.00), AU23 1 (1.00), \
AU24 1 (1.00), AU25 1 (1.00), AU26 1 (1.00)
"""


def test_the_command_describes_a_file_with_counts_made_by_hand_or_refuses_it(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.txt", row("a/00001.jpg", (0, 0), 4), row("a/00002.jpg", (0, -5), 7, (1,) * 12),
                 row("b/00001.jpg"), row("b/00002.jpg", (1, 1), -1, (0,) * 12),
                 row("b/00003.jpg", (-5, 1), aus=(1,) + (-1,) * 11), row("b/1.jpg", ("-5.0", -5)))
    assert describe(read_annotations(path)) + "\n" == DESCRIBED.format(path)
    monkeypatch.setattr(sys, "argv", ["s_aff_wild2", str(path), f"{tmp_path}/none.txt"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(s_aff_wild2.__file__, run_name="__main__")
    said, errors = capsys.readouterr()
    assert said == DESCRIBED.format(path) and errors.startswith("error: ") and "none.txt" in errors


# ---- Frames to train on

def test_only_frames_with_a_label_and_an_image_are_taken_and_the_rest_is_counted(tmp_path):
    videos = folders(tmp_path, {"a": [1, 3], "b": [2, 5], "unlabelled": [1]})
    rows = [row("b/00002.jpg", expr=3), row("a/00001.jpg", (0.5, -5)), row("a/00003.jpg"),
            row("a/00002.jpg", expr=1), row("ghost/00001.jpg", expr=2), row("ghost/2.jpg"),
            row("b/00002.jpg", expr=3)]
    frames = LabelledFrames(read_annotations(write(tmp_path / "a.txt", *rows)), videos)
    assert [frames.where(i) for i in range(len(frames))] == [
        str(tmp_path / "frames/b/00002.jpg"), str(tmp_path / "frames/a/00001.jpg")]
    assert [frames.read(i).getpixel((0, 0))[0] for i in (0, 1)] == [20, 10]
    assert frames.labels.tolist() == [[-5, -5, 3] + [-1] * 12, [0.5, -5, -1] + [-1] * 12]
    assert frames.videos == ["b", "a", "ghost"]
    assert frames.used == ["b", "a"] and frames.video.tolist() == [0, 1]
    assert frames.skipped == {"image not on disk": 2, "no label": 2, "repeats an earlier row": 1}
    assert frames.summary() == (
        "2 frames with a label and a face image in 2 videos; left out: 2 image not on disk, 2 no label, "
        "1 repeats an earlier row; videos without frames: ghost")
    whole = LabelledFrames(read_annotations(write(tmp_path / "b.txt", rows[0])), videos)
    assert whole.summary() == "1 frames with a label and a face image in 1 videos; left out: nothing"


def test_a_file_of_another_folder_or_without_any_label_is_refused(tmp_path):
    videos = folders(tmp_path, {"a": [1]})
    rows = ["a/00001.jpg" + FULL, *(f"b/{n:05d}.jpg" + FULL for n in range(1, 11))]
    assert len(LabelledFrames(read_annotations(write(tmp_path / "a.txt", *rows[:10])), videos)) == 1
    with pytest.raises(ValueError, match="a.txt: 11 frames with a label, 10 of them without an image, such "
                                         "as b/00001.jpg; check data.frames"):
        LabelledFrames(read_annotations(write(tmp_path / "a.txt", *rows)), videos)
    found = read_annotations(write(tmp_path / "a.txt", *[f"twice/{n}.jpg" + FULL for n in range(2, 11)]))
    with pytest.raises(ValueError, match="2 images for each label"):
        LabelledFrames(found, folders(tmp_path, {"twice": range(1, 21)}))
    for nothing in ([], ["a/00001.jpg" + NOTHING]):
        with pytest.raises(ValueError, match="a.txt: 0 frames with a label"):
            LabelledFrames(read_annotations(write(tmp_path / "a.txt", *nothing)), videos)
