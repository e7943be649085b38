"""What can be wrong with a copy of Aff-Wild2 and with features, in one table, and the message that says so.
At the end, what looks odd and must work: names of any language and length.

Each refusal is a ValueError, which the scripts print as one line and exit code 2. The other input is in
test_bad_input.py.
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import data
import extract_features
import segments
import splits
from distributed import Team
from frames import find_videos
from labels import AU, EXPR, VA, read_labels
from run import Progress
from run_folder import RunFolder
from settings import Config

VA_HEADER, EXPR_HEADER = "valence,arousal", "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"
ALONE = Team(0, 1, torch.device("cpu"))


def put(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def whole(task, content):
    """A label file of these bytes."""
    return lambda d: read_labels(put(d / "v.txt", content), task)


def labels(task, *lines):
    """A label file with the task's header and these lines."""
    return whole(task, "\n".join([",".join(task.outputs), *lines]))


def features(array, **options):
    def call(d):
        np.save(d / "v.npy", array, **options)
        return segments.read_features(d / "v.npy")
    return call


def feature_bytes(content):
    return lambda d: segments.read_features(put(d / "v.npy", content))


def changed_features(change):
    def call(d):
        np.save(d / "v.npy", np.zeros((9, 9)))
        return segments.read_features(put(d / "v.npy", change((d / "v.npy").read_bytes())))
    return call


def npz(d):
    with open(d / "v.npy", "wb") as file:
        np.savez(file, a=np.zeros((3, 4)))
    return segments.read_features(d / "v.npy")


def two_videos(frames, width):
    """Video b has 5 labels, and `frames` x `width` features beside a's 5 x 3."""
    def call(d):
        np.save(d / "a.npy", np.zeros((5, 3), np.float16))
        np.save(d / "b.npy", np.zeros((frames, width), np.float16))
        files = {video: put(d / f"{video}.txt", EXPR_HEADER + "\n0" * 5) for video in "ab"}
        return segments.open_videos(files, d, EXPR)
    return call


def no_features(d):
    return segments.open_videos({"a": put(d / "a.txt", f"{VA_HEADER}\n0,0")}, d, VA)


def cut_videos(d):
    put(d / "videos.json", '{"a": ')
    return no_features(d)


class Evil:
    """A pickle that would end the tests when it is loaded."""

    def __reduce__(self):
        return os._exit, (66,)


def tree(train=("a",), val=("b",)):
    def call(d):
        for part, videos in (("Train_Set", train), ("Validation_Set", val)):
            (d / "VA_Estimation_Challenge" / part).mkdir(parents=True)
            for video in videos:
                put(d / "VA_Estimation_Challenge" / part / f"{video}.txt", VA_HEADER)
        return data.label_files(d, VA)
    return call


def fold(number):
    """Two labelled videos, which fill two of the four quarters."""
    return lambda d: (tree()(d), splits.split(d, VA, number))


def frames_of(*names):
    """What data.py says of a root that holds these files."""
    def call(d):
        for name in names:
            put(d / "frames" / name)
        return list(data.describe([d / "frames"], d))
    return call


def no_frames(d):
    (d / "frames/b").mkdir(parents=True)
    files = {"a": put(d / "a.txt", f"{EXPR_HEADER}\n0"), "b": put(d / "b.txt", f"{EXPR_HEADER}\n-1")}
    return data.ExprFrames(files, find_videos([d / "frames"]), 8)


PLAIN = r"v\.npy: not a plain feature array .*; delete it and run extract_features.py again"
CLASS = "expected a whole number from 0 to 7, or -1"
VALUE = "expected a number from -1 to 1, or -5"

TABLE = {
    # label files
    "a label file with another header": (
        whole(VA, "valence;arousal\n0,0"),
        r"v\.txt: header is 'valence;arousal', expected 'valence,arousal'"),
    "a label file of another task": (
        whole(AU, f"{EXPR_HEADER}\n0"), r"v\.txt: header is 'Neutral,.*', expected 'AU1,"),
    "a label file without a header": (whole(VA, "0.1,0.2\n"), r"v\.txt: header is '0\.1,0\.2'"),
    "an empty label file": (whole(EXPR, ""), r"v\.txt: header is '', expected 'Neutral,Anger"),
    "a binary file as labels": (
        whole(VA, b"\xff\xd8\xff\xe0\x80"),
        r"v\.txt: not a text file; expected a label file with the header valence,arousal"),
    "a label row too short": (
        labels(AU, "0," * 10 + "0"), r"v\.txt, line 2: 11 values .*, expected 12"),
    "a label row too long": (
        labels(VA, "0,0", "0,0,0"), r"v\.txt, line 3: 3 values '0,0,0', expected 2"),
    "two classes in one row": (labels(EXPR, "1,2"), r"v\.txt, line 2: 2 values '1,2', expected 1"),
    "a blank line between labels": (labels(EXPR, "1", "", "2"), r"v\.txt, line 3: '', " + CLASS),
    "text for a valence": (labels(VA, "0,high"), r"v\.txt, line 2: '0,high', " + VALUE),
    "a fraction for a class": (labels(EXPR, "1.5"), r"v\.txt, line 2: '1\.5', " + CLASS),
    "a class that does not exist": (labels(EXPR, "0", "8"), r"v\.txt, line 3: '8', " + CLASS),
    "a class below the invalid code": (labels(EXPR, "-2"), r"v\.txt, line 2: '-2', " + CLASS),
    "another task's invalid code": (labels(EXPR, "-5"), r"v\.txt, line 2: '-5', " + CLASS),
    "an action unit of 2": (
        labels(AU, "0," * 11 + "2"), r"v\.txt, line 2: .*, expected a whole number from 0 to 1, or -1"),
    "a valence out of range": (labels(VA, "1.01,0"), r"v\.txt, line 2: '1\.01,0', " + VALUE),
    "half an invalid code": (labels(VA, "-2.5,0"), r"v\.txt, line 2: '-2\.5,0', " + VALUE),
    "NaN for a valence": (labels(VA, "0,nan"), r"v\.txt, line 2: '0,nan', " + VALUE),
    "infinity for a valence": (labels(VA, "-inf,0"), r"v\.txt, line 2: '-inf,0', " + VALUE),
    "a line of a million characters": (
        labels(VA, "9" * 10 ** 6), r"^.{0,400}v\.txt, line 2: 1 values '9{80}', expected 2$"),
    # data sets
    "no label folder": (
        lambda d: data.label_files(d, VA),
        r"data\.labels: no VA_Estimation_Challenge in .*; set data\.labels"),
    "label folder not set": (
        lambda d: data.label_files("", EXPR),
        r"data\.labels: no EXPR_Classification_Challenge or EXPR_Recognition_Challenge in ''"),
    "0 training videos": (tree(train=()), r"Train_Set: no label files \(<video>\.txt\)"),
    "0 validation videos": (
        tree(val=()), r"Validation_Set: no label files \(<video>\.txt\); "
                      "the training and validation sets both need some"),
    "a root of frames that is not there": (
        lambda d: find_videos([d / "none"]), r"data\.frames: .*none is no folder"),
    "a root of frames without videos": (
        lambda d: find_videos([d]),
        r"data\.frames: no video folders in .*; expected <video>/00001\.jpg below it"),
    "no root of frames": (lambda d: find_videos([]), r"data\.frames: no video folders in an empty list"),
    "two files of one frame": (
        frames_of("a/00001.jpg", "a/1.png"), r"frames/a: 00001\.jpg and 1\.png are both frame 1; remove one"),
    "a video twice below one root": (
        frames_of("cropped_aligned/a/1.jpg", "new/a/1.jpg"),
        "cropped_aligned/a and .*new/a are frames of one video, both below .*frames; remove one, or"),
    "folders of videos too deep": (
        frames_of("1/2/3/4/a/00001.jpg"), "data.frames: 1 folders, none of which holds a frame; expected"),
    "frames under names that are no numbers": (
        frames_of("a/face_1.jpg"), r"(?s)none of which holds a frame.*not empty: a \(1 \.jpg\)"),
    "no frame with label and image": (
        no_frames, "no frame has both an expression label and an image: "
                   "2 label files, 2 of them without frames"),
    "a fold number out of range, asked of split": (fold(5), "fold: got 5, expected 0"),
    "a fold number below 0, asked of split": (fold(-1), "fold: got -1, expected 0"),
    "0 validation videos in a fold": (
        fold(4), "fold 4 of 2 scenes leaves nothing to validate on; take fold 0, or label more scenes"),
    # features
    "no labelled video with features": (
        no_features, "none of 1 labelled videos has features in .*; run extract_features.py"),
    "features with NaN": (
        features(np.array([[0, 1], [0, np.nan]], np.float16)),
        r"v\.npy: NaN or infinity in frames 1 to 2; delete it"),
    "features with infinity": (
        features(np.array([[0, -np.inf]], np.float16)), r"v\.npy: NaN or infinity in frames 1 to 1"),
    "features of one dimension": (
        features(np.zeros(5, np.float16)), r"v\.npy: array of shape \(5,\), expected \(frames, D\)"),
    "features with objects": (features(np.array([[None]]), allow_pickle=True), PLAIN),
    "features with a hostile pickle": (features(np.array([[Evil()]]), allow_pickle=True), PLAIN),
    "a pickle called .npy": (feature_bytes(pickle.dumps(Evil())), PLAIN),
    "a text file called .npy": (feature_bytes("hello"), PLAIN),
    "an empty feature file": (feature_bytes(""), PLAIN),
    "a feature file cut short": (changed_features(lambda content: content[:-9]), PLAIN),
    "a zip of arrays called .npy": (npz, PLAIN),
    "features that are text": (features(np.array([["a"]])), PLAIN),
    "features in another byte order": (features(np.zeros((2, 2), ">f2")), PLAIN),
    "features that are dates": (features(np.zeros((2, 2), "M8[s]")), PLAIN),
    "a feature header that is no Python": (
        changed_features(lambda content: content.replace(b"}", b"(")), PLAIN),
    "a videos.json beside features that is cut short": (
        cut_videos, r"videos\.json: not the JSON that a stage has written"),
    "features of another width": (
        two_videos(5, 4),
        r"b\.npy: features are 5 x 4, expected at least 5 frames .* x 3; run extract_features.py, which"),
    "fewer features than labels": (
        two_videos(4, 3),
        r"b\.npy: features are 4 x 3, expected at least 5 frames \(as .*b\.txt has\) x 3"),
}


@pytest.mark.parametrize("call, message", [pytest.param(*row, id=what) for what, row in TABLE.items()])
def test_bad_input_is_refused_with_a_message_that_names_it(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


# ---- Odd, but right

class Brightness:
    """Stands for the ViT: the feature of a face is its mean."""

    def features(self, images, token):
        return images.mean((2, 3))                                       # (B, 3, H, W) -> (B, 3)


NAMES = ["1-30-1280x720", "видео 86_3_left", "表情.v2", "naïve", "a'b\"c", "x" * 240, "é" * 120]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:20])
def test_a_name_in_any_language_and_of_any_length_works_from_labels_to_features(tmp_path, name):
    for part in ("Train_Set", "Validation_Set"):
        path = tmp_path / "EXPR_Classification_Challenge" / part / f"{name}.txt"
        put(path, f"{EXPR_HEADER}\n0\n1\n2\n")
    (tmp_path / "frames" / name).mkdir(parents=True)
    for n in (1, 3):
        Image.new("RGB", (8, 8), (50 * n,) * 3).save(tmp_path / "frames" / name / f"{n:05d}.jpg")
    videos, files = find_videos([tmp_path / "frames"]), splits.split(tmp_path, EXPR, 0)[0]
    assert list(videos) == list(files) == [name]
    assert data.ExprFrames(files, videos, 8)[1][1] == 2

    config = Config()
    config.vit.image_size, config.vit.dim, config.run.workers = 8, 3, 0
    config.run.out, config.run.name = str(tmp_path / "runs"), name
    run = RunFolder("features", config, ALONE, {"run.name": name})
    frames, path = data.VideoFrames(videos[name], 8), run.folder / f"{name}.npy"
    extract_features.extract(Brightness(), frames, 3, path, config, ALONE, Progress(3, "frames", ALONE))
    run.remember({}, None)
    run.write("last.pt", {"video": name, "made_of": run.record})
    assert np.load(segments.noface_path(path)).tolist() == [False, True, False]
    assert run.resume({})["video"] == name
    put(run.folder / "videos.json", json.dumps({name: {"faces": 2}}))
    (video,), left_out, dim = segments.open_videos(files, run.folder, EXPR)
    part = segments.SegmentData([video], EXPR, 4, 3)
    x, target, valid, real = part[0]
    assert (video.name, left_out, dim, part.where(0)) == (name, {}, 3, f"{name} frames 1 to 3")
    assert np.array_equal(x[1], x[0]) and x[2, 0] > x[0, 0] and target.tolist() == [0, 1, 2, 0]
    assert valid.tolist() == real.tolist() == [True, True, True, False]
