"""Broken and hostile input, all of it in one table: what is wrong, and the message that says so. Nothing of it may run or be lost.

Each refusal is a ValueError, which the scripts print as one line and exit code 2. Single broken images among many are no refusal
but a counted skip (test_data.py, test_faces.py). At the end, what looks odd and must work: names of any language and length.
"""

import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import extract_features
import faces
import synthetic
import training
from images import inside, read_image

VA, AU = "valence,arousal", "AU1,AU2,AU4,AU6,AU7,AU10,AU12,AU15,AU23,AU24,AU25,AU26"
EXPR = "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"
AFFECTNET = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
FER = "emotion,pixels,Usage"
ALONE = training.Team(0, 1, torch.device("cpu"))


def put(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def image(content):
    return lambda d: read_image(put(d / "face.png", content))


def bomb(width, height):
    """A PNG of some 60 bytes whose header promises width x height pixels."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def listed(name):
    """A name from a list, in a data root that has a link out of it."""
    def call(d):
        put(d / "secret.jpg"), put(d / "set/a.jpg")
        (d / "set/link.jpg").symlink_to(d / "secret.jpg")
        return inside(d / "set", name.format(d))
    return call


def affectnet(*rows, header=AFFECTNET):
    def call(d):
        (d / "Manually_Annotated_Images").mkdir()
        put(d / "training.csv", "\n".join([header, *rows])), put(d / "validation.csv", AFFECTNET)
        return faces.affectnet_2017(d)
    return call


def fer(*rows, header=FER):
    return lambda d: faces.fer2013(put(d / "fer2013.csv", "\n".join([header, *rows])))


def raf(line):
    def call(d):
        put(d / "basic/EmoLabel/list_patition_label.txt", line), (d / "basic/Image/aligned").mkdir(parents=True)
        return faces.raf_db(d)
    return call


def labels(task, content):
    return lambda d: data.read_labels(put(d / "v.txt", content), task)


def features(array, **options):
    def call(d):
        np.save(d / "v.npy", array, **options)
        return data.read_features(d / "v.npy")
    return call


def feature_bytes(content):
    return lambda d: data.read_features(put(d / "v.npy", content))


def changed_features(change):
    def call(d):
        np.save(d / "v.npy", np.zeros((9, 9)))
        return data.read_features(put(d / "v.npy", change((d / "v.npy").read_bytes())))
    return call


def npz(d):
    with open(d / "v.npy", "wb") as file:
        np.savez(file, a=np.zeros((3, 4)))
    return data.read_features(d / "v.npy")


def two_videos(frames, width):
    """Video b has 5 labels, and `frames` x `width` features beside a's 5 x 3."""
    def call(d):
        np.save(d / "a.npy", np.zeros((5, 3), np.float16)), np.save(d / "b.npy", np.zeros((frames, width), np.float16))
        return data.open_videos({v: put(d / f"{v}.txt", f"{EXPR}\n" + "0\n" * 5) for v in "ab"}, d, "expr")
    return call


def checkpoint(state, write=torch.save):
    def call(d):
        training.write_file(d / "best.pt", lambda file: write(state, file))
        return training.read_checkpoint(d / "best.pt")
    return call


def checkpoint_bytes(change):
    def call(d):
        training.write_file(d / "best.pt", lambda file: torch.save({"w": torch.arange(64.0)}, file))
        return training.read_checkpoint(put(d / "best.pt", change((d / "best.pt").read_bytes())))
    return call


def flip(content):
    at = content.index(torch.arange(64.0).numpy().tobytes()) + 100
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


class Evil:
    """A pickle that would end the tests when it is loaded."""

    def __reduce__(self):
        return os._exit, (66,)


def settings(text="{}", *overrides):
    return lambda d: config.load(put(d / "my.yaml", text), overrides)


def tree(train=("a",), val=("b",), folder="VA_Estimation_Challenge"):
    def call(d):
        for part, videos in (("Train_Set", train), ("Validation_Set", val)):
            (d / folder / part).mkdir(parents=True)
            for video in videos:
                put(d / folder / part / f"{video}.txt", VA)
        return data.label_files(d, "va")
    return call


def fold(number):
    """Two labelled videos, which fill two of the four quarters."""
    return lambda d: (tree()(d), data.split(d, "va", number))


def no_frames(d):
    (d / "frames/b").mkdir(parents=True)
    return data.ExprFrames({"a": put(d / "a.txt", f"{EXPR}\n0"), "b": put(d / "b.txt", f"{EXPR}\n-1")}, data.find_videos([d / "frames"]), 8)


def elsewhere(d):
    return synthetic.provide(config.load("configs/demo.yaml", [f"drawn.root={d}/new"]), ALONE)


def other_architecture(d):
    return training.load_weights(torch.nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "scale": torch.zeros(2)}, "best.pt")


def used_folder(d):
    training.RunFolder(d / "run", config.Config(), {"task.lr": 1}, ALONE).lock.close()
    return training.RunFolder(d / "run", config.Config(), {"task.lr": 2}, ALONE)


NOT_AN_IMAGE = "face.png: not a readable image"
PLAIN = r"v\.npy: not a plain feature array .*; delete it and run extract_features.py again"
WHOLE = r"best\.pt: not a whole, plain checkpoint"
LEAVES = "leaves its data root"

TABLE = {
    # images
    "an empty image file": (image(b""), NOT_AN_IMAGE),
    "a text file called .png": (image("hello"), NOT_AN_IMAGE),
    "an image cut short": (image(bomb(10, 10)[:40]), NOT_AN_IMAGE),
    "an image without its pixels": (image(bomb(10, 10)), NOT_AN_IMAGE),
    "an image that is not there": (lambda d: read_image(d / "face.png"), NOT_AN_IMAGE),
    "a 20,000 x 20,000 image": (image(bomb(20_000, 20_000)), "face.png: .* pixels.*shrink the image first"),
    "an image one pixel wide and far too long": (image(bomb(1, 64_000_001)), "face.png: 1 x 64000001 pixels, at most 64,000,000 are read"),
    # names in lists
    "a listed name that climbs out": (listed("../secret.jpg"), r"'\.\./secret\.jpg' " + LEAVES),
    "a listed name that climbs out and back": (listed("../set/a.jpg"), LEAVES),
    "an absolute name in a list": (listed("{}/set/a.jpg"), LEAVES),
    "a listed link that leads out": (listed("link.jpg"), r"'link\.jpg' " + LEAVES),
    "a CSV with a name that climbs out": (affectnet("../../etc/passwd,0,0,1,1,,0,0,0"), r"training\.csv line 2: .* " + LEAVES),
    "a CSV with an absolute name": (affectnet("/etc/passwd,0,0,1,1,,0,0,0"), r"training\.csv line 2: .* " + LEAVES),
    # lists of still faces
    "a CSV with another header": (affectnet(header="file,label"), r"training\.csv line 1: got the header 'file,label', expected 'subDirectory_filePath,"),
    "a CSV with text for a label": (affectnet("a/b.jpg,0,0,1,1,,happy,0,0"), r"training\.csv line 2: got 'happy', expected a whole number from 0 to 10"),
    "a CSV with a label out of range": (affectnet("a/b.jpg,0,0,1,1,,11,0,0"), r"training\.csv line 2: got '11', expected a whole number from 0 to 10"),
    "a CSV with a short row": (affectnet("a/b.jpg,0,0"), r"training\.csv line 2: got 3 fields, expected 9"),
    "an empty CSV": (fer(header=""), r"fer2013\.csv line 1: got an empty file, expected 'emotion,pixels,Usage'"),
    "FER2013 with too few pixels": (fer("0,1 2 3,Training"), r"fer2013\.csv line 2: got 3 pixels, expected 2,304"),
    "RAF-DB with text for a label": (raf("train_1.jpg five"), "line 1: got 'five', expected a whole number from 1 to 7"),
    "RAF-DB with a name that climbs out": (raf("train_/../../../x.jpg 5"), "line 1: .* " + LEAVES),
    "a face data set that is not there": (lambda d: faces.affectnet_2017(d / "none"), r"looked for .*none/training\.csv, which is not there"),
    "a face folder without images": (lambda d: faces.load_faces(config.Data(folders=[str(d)])), r"data\.folders\[0\]: no image found in"),
    "no face data set at all": (lambda d: faces.load_faces(config.Data()), "no data set is given; set data.affectnet_2017"),
    # label files
    "a label file with another header": (labels("va", "valence;arousal\n0,0"), r"v\.txt: header is 'valence;arousal', expected 'valence,arousal'"),
    "a label file of another task": (labels("au", f"{EXPR}\n0"), r"v\.txt: header is 'Neutral,.*', expected 'AU1,"),
    "a label file without a header": (labels("va", "0.1,0.2\n"), r"v\.txt: header is '0\.1,0\.2'"),
    "an empty label file": (labels("expr", ""), r"v\.txt: header is '', expected 'Neutral,Anger"),
    "a binary file as labels": (labels("va", b"\xff\xd8\xff\xe0\x80"), r"v\.txt: not a text file; expected a label file with the header valence,arousal"),
    "a label row too short": (labels("au", f"{AU}\n" + "0," * 10 + "0"), r"v\.txt, line 2: 11 values .*, expected 12"),
    "a label row too long": (labels("va", f"{VA}\n0,0\n0,0,0"), r"v\.txt, line 3: 3 values '0,0,0', expected 2"),
    "two classes in one row": (labels("expr", f"{EXPR}\n1,2"), r"v\.txt, line 2: 2 values '1,2', expected 1"),
    "a blank line between labels": (labels("expr", f"{EXPR}\n1\n\n2"), r"v\.txt, line 3: '', expected a whole number from -1 to 7"),
    "text for a valence": (labels("va", f"{VA}\n0,high"), r"v\.txt, line 2: '0,high', expected a number from -1 to 1, or -5"),
    "a fraction for a class": (labels("expr", f"{EXPR}\n1.5"), r"v\.txt, line 2: '1\.5', expected a whole number from -1 to 7"),
    "a class that does not exist": (labels("expr", f"{EXPR}\n0\n8"), r"v\.txt, line 3: '8', expected a whole number from -1 to 7"),
    "another task's invalid code": (labels("expr", f"{EXPR}\n-5"), r"v\.txt, line 2: '-5', expected a whole number from -1 to 7"),
    "an action unit of 2": (labels("au", f"{AU}\n" + "0," * 11 + "2"), r"v\.txt, line 2: .*, expected a whole number from -1 to 1"),
    "a valence out of range": (labels("va", f"{VA}\n1.01,0"), r"v\.txt, line 2: '1\.01,0', expected a number from -1 to 1, or -5"),
    "half an invalid code": (labels("va", f"{VA}\n-2.5,0"), r"v\.txt, line 2: '-2\.5,0', expected a number from -1 to 1, or -5"),
    "NaN for a valence": (labels("va", f"{VA}\n0,nan"), r"v\.txt, line 2: '0,nan', expected a number from -1 to 1"),
    "infinity for a valence": (labels("va", f"{VA}\n-inf,0"), r"v\.txt, line 2: '-inf,0', expected a number from -1 to 1"),
    "a line of a million characters": (labels("va", f"{VA}\n" + "9" * 10 ** 6), r"^.{0,400}v\.txt, line 2: 1 values '9{80}', expected 2$"),
    # data sets
    "no label folder": (lambda d: data.label_files(d, "va"), r"data\.labels: no VA_Estimation_Challenge in .*; set data\.labels"),
    "label folder not set": (lambda d: data.label_files("", "expr"), r"data\.labels: no EXPR_Classification_Challenge or EXPR_Recognition_Challenge in ''"),
    "0 training videos": (tree(train=()), r"Train_Set: no label files \(<video>\.txt\)"),
    "0 validation videos": (tree(val=()), r"Validation_Set: no label files \(<video>\.txt\); the training and validation sets both need some"),
    "a root of frames that is not there": (lambda d: data.find_videos([d / "none"]), r"data\.frames: .*none is no folder"),
    "a root of frames without videos": (lambda d: data.find_videos([d]), r"data\.frames: no video folders in .*; expected <video>/00001\.jpg below it"),
    "no root of frames": (lambda d: data.find_videos([]), r"data\.frames: no video folders in an empty list"),
    "no frame with label and image": (no_frames, "no frame has both an expression label and an image: 2 label files, 2 of them without frames"),
    "no labelled video with features": (lambda d: data.open_videos({"a": put(d / "a.txt", f"{VA}\n0,0")}, d, "va"),
                                        "none of 1 labelled videos has features in .*; run extract_features.py"),
    "a path outside the drawn data": (elsewhere, r"data\.frames: data/demo/Aff-Wild2/cropped_aligned is not in .*new \(drawn\.root\)"),
    "a fold number out of range": (settings("task: {fold: 5}"), r"task\.fold: got 5, expected 0 \(official split\) or 1 to 4"),
    "a fold number below 0": (settings("{}", "task.fold=-1"), r"task\.fold: got -1, expected 0"),
    "a fold number out of range, asked of split": (fold(5), "fold: got 5, expected 0"),
    "0 validation videos in a fold": (fold(4), "fold 4 of 2 scenes leaves nothing to validate on; take fold 0, or label at least 4 scenes"),
    # features
    "features with NaN": (features(np.array([[0, 1], [0, np.nan]], np.float16)), r"v\.npy: NaN or infinity in frames 1 to 2; delete it"),
    "features with infinity": (features(np.array([[0, -np.inf]], np.float16)), r"v\.npy: NaN or infinity in frames 1 to 1"),
    "features of one dimension": (features(np.zeros(5, np.float16)), r"v\.npy: array of shape \(5,\), expected \(frames, D\)"),
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
    "a feature header that is no Python": (changed_features(lambda content: content.replace(b"}", b"(")), PLAIN),
    "a settings.json beside features that is cut short": (lambda d: data.encoder_of(put(d / "settings.json", '{"enc').parent),
                                                          r"settings\.json: not what extract_features\.py wrote"),
    "features of another width": (two_videos(5, 4), r"b\.npy: features are 5 x 4, expected at least 5 frames .* x 3; delete the folder"),
    "fewer features than labels": (two_videos(4, 3), r"b\.npy: features are 4 x 3, expected at least 5 frames \(as .*b\.txt has\) x 3"),
    # checkpoints
    "a checkpoint that is not there": (lambda d: training.read_checkpoint(d / "best.pt"), r"best\.pt: no such checkpoint"),
    "a folder as a checkpoint": (lambda d: training.read_checkpoint(d), "not a whole, plain checkpoint"),
    "an empty checkpoint": (checkpoint_bytes(lambda content: b""), WHOLE),
    "a checkpoint cut short": (checkpoint_bytes(lambda content: content[:-100]), WHOLE),
    "half a checkpoint": (checkpoint_bytes(lambda content: content[:len(content) // 2]), WHOLE),
    "a flipped bit in a checkpoint": (checkpoint_bytes(flip), r"best\.pt: damaged \(wrong checksum in .*data/0\); use another copy"),
    "a text file as a checkpoint": (checkpoint_bytes(lambda content: b"hello"), WHOLE),
    "a table as a checkpoint": (checkpoint_bytes(lambda content: b"epoch,loss\n1,0.5\n"), WHOLE),
    "a pickle as a checkpoint": (checkpoint(Evil(), lambda state, file: pickle.dump(state, file, 2)), WHOLE),
    "a hostile pickle in a checkpoint": (checkpoint({"model": Evil()}), WHOLE),
    "a checkpoint that is one tensor": (checkpoint(torch.ones(3)), r"best\.pt: expected a dictionary of tensors, found Tensor"),
    "a checkpoint of another architecture": (other_architecture, r"(?s)best\.pt: .*another architecture, 3 of 2 entries differ.*"
                                             r"weight: file \(2, 4\), model \(2, 3\).*bias: missing in the file.*scale: not in the model"),
    # settings and run folder
    "a YAML tag": (settings("run: !!python/object/apply:os._exit [66]"), "(?s)my.yaml: not plain YAML: could not determine a constructor for the tag"),
    "a YAML tag in an override": (settings("{}", "run.name=!!python/object/apply:os._exit [66]"), "--set run.name=.*: the value is not plain YAML"),
    "a YAML file that is a list": (settings("[1, 2]"), "my.yaml: expected sections like .*, got list"),
    "a binary file as settings": (settings(b"\xff\xfe\x00"), "my.yaml: not plain YAML"),
    "an unknown setting": (settings("task: {learning_rate: 1}"), "task.learning_rate: no such setting; nearest: "),
    "a folder with a run of other settings": (used_folder, r"(?s)run was made with other settings.*task\.lr: was 1, now 2"),
    "an output folder that cannot be written": (lambda d: training.RunFolder(put(d / "file") / "run", config.Config(), {}, ALONE),
                                                r"file/run: cannot be written .*; choose another place with --set run\.out="),
}


@pytest.mark.parametrize("call, message", [*(pytest.param(*row, id=what) for what, row in TABLE.items())])
def test_bad_input_is_refused_with_a_message_that_names_it(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


# --- odd, but right ---------------------------------------------------------------------------------------------------

class Brightness:
    """Stands for the encoder: the feature of a face is its mean."""

    def features(self, images, token):
        return images.mean((2, 3))


@pytest.mark.parametrize("name", ["1-30-1280x720", "видео 86_3_left", "表情.v2", "naïve", "a'b\"c", "x" * 240, "é" * 120], ids=lambda name: name[:20])
def test_a_name_in_any_language_and_of_any_length_works_from_labels_to_features(tmp_path, name):
    for part in ("Train_Set", "Validation_Set"):
        put(tmp_path / "EXPR_Classification_Challenge" / part / f"{name}.txt", f"{EXPR}\n0\n1\n2\n")
    (tmp_path / "frames" / name).mkdir(parents=True)
    for n in (1, 3):
        Image.new("RGB", (8, 8), (50 * n,) * 3).save(tmp_path / "frames" / name / f"{n:05d}.jpg")
    videos, files = data.find_videos([tmp_path / "frames"]), data.split(tmp_path, "expr", 0)[0]
    assert list(videos) == list(files) == [name]
    assert data.ExprFrames(files, videos, 8)[1][1] == 2

    settings = config.Config()
    settings.encoder.image_size, settings.encoder.dim, settings.run.workers = 8, 3, 0
    settings.run.out, settings.run.name = str(tmp_path / "runs"), name
    run = training.RunFolder(settings.folder("features"), settings, {"run.name": name}, ALONE)
    mask = extract_features.extract(Brightness(), videos[name], 3, run.folder / f"{name}.npy", settings, ALONE)
    run.save("last.pt", {"video": name})
    assert mask.tolist() == [False, True, False] and run.resume({}) == {"video": name}
    (video,), without, dim = data.open_videos(files, run.folder, "expr")
    part = data.SegmentData([video], "expr", 4, 3)
    x, target, valid, frames = part[0]
    assert (video.name, without, dim, part.where(0)) == (name, [], 3, f"{name} frames 1 to 3")
    assert np.array_equal(x[1], x[0]) and x[2, 0] > x[0, 0] and target.tolist() == [0, 1, 2, 0]
