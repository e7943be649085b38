"""Broken and hostile input, all of it in one table: what is wrong, and the message that says so. Nothing of
it may run or be lost.

Each refusal is a ValueError, which the scripts print as one line and exit code 2. A broken image among many
is no refusal: it is left out of its batch and named (test_data.py, test_faces.py). What can be wrong with a
copy of Aff-Wild2 and with features is in test_bad_aff_wild2.py, with s-Aff-Wild2 in test_s_aff_wild2.py,
with prediction files in test_bad_predictions.py.
"""

import os
import pickle
import struct
import zlib

import pytest
import torch

import checkpoints
import config
import faces
import synthetic
from class_folders import class_folders
from cnn import ResNet18
from distributed import Team
from images import inside, read_image
from labels import AU, EXPR, VA
from run_folder import RunFolder
from s_aff_wild2 import HEADER, read_annotations
from settings import Config, Data
from stills import load_cnn
from submission_check import check
from submission_file import check_out, read_template

COLUMNS = ("subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,"
             "valence,arousal")
FER = "emotion,pixels,Usage"
ALONE = Team(0, 1, torch.device("cpu"))


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
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))


def listed(name):
    """A name from a list, in a data root that has a link out of it."""
    def call(d):
        put(d / "secret.jpg"), put(d / "set/a.jpg")
        (d / "set/link.jpg").symlink_to(d / "secret.jpg")
        return inside(d / "set", name.format(d))
    return call


def affectnet(*rows, header=COLUMNS):
    def call(d):
        (d / "Manually_Annotated_Images").mkdir()
        put(d / "training.csv", "\n".join([header, *rows])), put(d / "validation.csv", COLUMNS)
        return faces.affectnet_2017(d)
    return call


def fer(*rows, header=FER):
    return lambda d: faces.fer2013(put(d / "fer2013.csv", "\n".join([header, *rows])))


def raf(line):
    def call(d):
        put(d / "basic/EmoLabel/list_patition_label.txt", line)
        (d / "basic/Image/aligned").mkdir(parents=True)
        return faces.raf_db(d)
    return call


def checkpoint(state, write=torch.save, load=checkpoints.read_checkpoint):
    def call(d):
        checkpoints.write_file(d / "best.pt", lambda file: write(state, file))
        return load(d / "best.pt")
    return call


def checkpoint_bytes(change):
    def call(d):
        checkpoints.write_file(d / "best.pt", lambda file: torch.save({"w": torch.arange(64.0)}, file))
        return checkpoints.read_checkpoint(put(d / "best.pt", change((d / "best.pt").read_bytes())))
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


def elsewhere(d):
    return synthetic.check_paths(config.load("configs/demo.yaml", [f"synthetic.root={d}/new"]))


def other_architecture(d):
    weights = {"weight": torch.zeros(2, 4), "scale": torch.zeros(2)}
    return checkpoints.load_weights(torch.nn.Linear(3, 2), weights, "best.pt")


def run_folder(out, settings):
    resolved = Config()
    resolved.run.out, resolved.run.name = str(out), "mine"
    return RunFolder("run", resolved, ALONE, settings)


def used_folder(d):
    run = run_folder(d, {"task.lr": 1})
    run.remember({}, None)
    run.finish({})
    run.lock.close()
    return run_folder(d, {})


def template(content, task=VA):
    return lambda d: read_template(put(d / "t.txt", content), task)


def frames(*rows):
    """A list of s-Aff-Wild2."""
    return lambda d: read_annotations(put(d / "t.txt", "\n".join([HEADER, *rows])))


def checked(content, task=VA):
    """A submission for a template of one frame. What else can be wrong is in test_submission_check.py."""
    def call(d):
        return check(put(d / "p.txt", content), read_template(put(d / "t.txt", "136/00001.jpg,"), task), task)
    return call


def template_as_output(d):
    return check_out(f"{d}/t.txt", put(d / "t.txt", "136/00001.jpg,"), VA)


NOT_AN_IMAGE = "face.png: not a readable image"
WHOLE = r"best\.pt: not a whole, plain checkpoint"
LEAVES = "leaves its data root"

TABLE = {
    # images
    "an empty image file": (image(b""), NOT_AN_IMAGE),
    "a text file called .png": (image("hello"), NOT_AN_IMAGE),
    "an image cut short": (image(bomb(10, 10)[:40]), NOT_AN_IMAGE),
    "an image without its pixels": (image(bomb(10, 10)), NOT_AN_IMAGE),
    "an image that is not there": (lambda d: read_image(d / "face.png"), NOT_AN_IMAGE),
    "a 20,000 x 20,000 image": (
        image(bomb(20_000, 20_000)), "face.png: .* pixels.*shrink the image first"),
    "an image one pixel wide and far too long": (
        image(bomb(1, 64_000_001)), "face.png: 1 x 64000001 pixels, at most 64,000,000 are read"),
    # names in lists
    "a listed name that climbs out": (listed("../secret.jpg"), r"'\.\./secret\.jpg' " + LEAVES),
    "a listed name that climbs out and back": (listed("../set/a.jpg"), LEAVES),
    "an absolute name in a list": (listed("{}/set/a.jpg"), LEAVES),
    "a listed link that leads out": (listed("link.jpg"), r"'link\.jpg' " + LEAVES),
    "a CSV with a name that climbs out": (
        affectnet("../../etc/passwd,0,0,1,1,,0,0,0"), r"training\.csv line 2: .* " + LEAVES),
    "a CSV with an absolute name": (
        affectnet("/etc/passwd,0,0,1,1,,0,0,0"), r"training\.csv line 2: .* " + LEAVES),
    # lists of still faces
    "a CSV with another header": (
        affectnet(header="file,label"),
        r"training\.csv line 1: got the header 'file,label', expected 'subDirectory_filePath,"),
    "a CSV with text for a label": (
        affectnet("a/b.jpg,0,0,1,1,,happy,0,0"),
        r"training\.csv line 2: got 'happy', expected a whole number from 0 to 10"),
    "a CSV with a label out of range": (
        affectnet("a/b.jpg,0,0,1,1,,11,0,0"),
        r"training\.csv line 2: got '11', expected a whole number from 0 to 10"),
    "a CSV with a short row": (
        affectnet("a/b.jpg,0,0"), r"training\.csv line 2: got 3 fields, expected 9"),
    "an empty CSV": (
        fer(header=""), r"fer2013\.csv line 1: got the header '', expected 'emotion,pixels,Usage'"),
    "FER2013 with too few pixels": (
        fer("0,1 2 3,Training"), r"fer2013\.csv line 2: got 3 pixels, expected 2,304"),
    "RAF-DB with text for a label": (
        raf("train_1.jpg five"), "line 1: got 'five', expected a whole number from 1 to 7"),
    "RAF-DB with a name that climbs out": (raf("train_/../../../x.jpg 5"), "line 1: .* " + LEAVES),
    "a list of other images": (
        affectnet(*[f"a/{i}.jpg,0,0,1,1,,0,0,0" for i in range(11)]),
        r"training\.csv: 11 of the 11 images that it names are not there; looked for .*Images/a/0\.jpg"),
    "RAF-DB's list without its images": (
        raf("train_1.jpg 5"), r"label\.txt: 1 of the 1 images .* looked for .*aligned/train_1_aligned\.jpg"),
    "a CSV without a header and with a wrong row": (
        affectnet(header="a/b.jpg,0,0,1,1,,11,0,0"), r"training\.csv line 1: got '11', expected a whole"),
    "a Windows name in a CSV that climbs out": (
        affectnet("C:\\x\\..\\..\\b.jpg,0,0,1,1,,0,0,0"), r"training\.csv line 2: .* " + LEAVES),
    "FER+ with class folders": (
        lambda d: faces.fer2013(put(d / "happy/a.jpg").parents[1], d),
        r"holds class folders of images, but FER\+ lists its labels in the order of fer2013\.csv"),
    "a folder with neither FER2013 nor class folders": (
        lambda d: faces.fer2013(put(d / "a.jpg").parent), r"looked for .*fer2013\.csv, which is not there"),
    "a face data set that is not there": (
        lambda d: faces.affectnet_2017(d / "none"), r"looked for .*none/training\.csv, which is not there"),
    "a face folder without images": (
        lambda d: faces.load_faces(Data(folders=[str(d)])), r"data\.folders\[0\]: no image found in"),
    "no face data set at all": (
        lambda d: faces.load_faces(Data()), "no data set is given; set data.affectnet_2017"),
    # checkpoints
    "a checkpoint that is not there": (
        lambda d: checkpoints.read_checkpoint(d / "best.pt"), r"best\.pt: no such checkpoint"),
    "a folder as a checkpoint": (
        lambda d: checkpoints.read_checkpoint(d), "not a whole, plain checkpoint"),
    "an empty checkpoint": (checkpoint_bytes(lambda content: b""), WHOLE),
    "a checkpoint cut short": (checkpoint_bytes(lambda content: content[:-100]), WHOLE),
    "half a checkpoint": (checkpoint_bytes(lambda content: content[:len(content) // 2]), WHOLE),
    "a flipped bit in a checkpoint": (
        checkpoint_bytes(flip), r"best\.pt: damaged \(wrong checksum in .*data/0\); use another copy"),
    "a text file as a checkpoint": (checkpoint_bytes(lambda content: b"hello"), WHOLE),
    "a table as a checkpoint": (checkpoint_bytes(lambda content: b"epoch,loss\n1,0.5\n"), WHOLE),
    "a pickle as a checkpoint": (
        checkpoint(Evil(), lambda state, file: pickle.dump(state, file, 2)), WHOLE),
    "a hostile pickle in a checkpoint": (checkpoint({"model": Evil()}), WHOLE),
    "a checkpoint that is one tensor": (
        checkpoint(torch.ones(3)), r"best\.pt: expected a dictionary of tensors, found Tensor"),
    "a checkpoint of another architecture": (
        other_architecture, r"(?s)best\.pt: .*another architecture, 3 of 2 entries differ.*"
                            r"weight: file \(2, 4\), model \(2, 3\).*bias: missing in the file.*"
                            "scale: not in the model"),
    # the second paper's
    "a class folder of another name": (
        lambda d: class_folders(put(d / "banana/1.jpg").parents[1]),
        "found banana, expected ANGRER .* give the folder that holds these class folders and no others"),
    "two folders of one class": (
        lambda d: class_folders(put(put(d / "ANGRER/1.jpg").parents[1] / "angry/1.jpg").parents[1]),
        "both ANGRER and angry hold Anger; put their images into one folder"),
    "class folders without an image": (
        lambda d: class_folders(put(d / "FEAR/list.txt").parents[1]), "no image in FEAR; left out: 1"),
    "a list of frames with a row of another length": (
        frames("a/1.jpg,0,0,1"), r"t\.txt, line 2: 4 fields .*, expected 16"),
    "a list of frames that says a frame twice": (
        frames("a/1.jpg,0,0,1" + ",0" * 12, "a/1.jpg,0,0,2" + ",0" * 12),
        r"t\.txt, line 3: frame 1 of a has other labels than in line 2; keep the right one"),
    "a list of frames with a class that there is not": (
        frames("a/1.jpg,0,0,8" + ",0" * 12), r"t\.txt, line 2: got expression '8', expected a whole number"),
    "a CNN of another class count": (
        checkpoint({"model": ResNet18(7, 2).state_dict(), "made_of": {"stage": "stills"}}, load=load_cnn),
        r"best\.pt: a network of 7 classes, expected 8 \(Neutral, Anger"),
    "a CNN with classes in an unknown order": (
        checkpoint({"model": ResNet18(8, 2).state_dict()}, load=load_cnn),
        r"best\.pt: not of train_stills\.py, so the order of its 8 classes is unknown"),
    "a ViT as EMMA's CNN": (
        checkpoint({"model": {"vit.cls_token": torch.zeros(3)}}, load=load_cnn),
        r"best\.pt: got vit\.cls_token, .*expected the weights of a ResNet-18 or of a DAN"),
    # templates and submissions of the challenge
    "an empty template": (template(""), r"t\.txt: no rows; expected a line for each frame, like "),
    "a template of a header alone": (template("image_location,valence,arousal\r\n\r\n"), r"t\.txt: no rows"),
    "a template that is not there": (
        lambda d: read_template(d / "none.txt", VA), r"none\.txt: cannot be read \(No such file"),
    "a folder as a template": (lambda d: read_template(d, VA), r"cannot be read \(Is a directory\)"),
    "a binary file as a template": (template(b"136/00001.jpg\xff"), r"t\.txt: not a text file; expected"),
    "a template of another task": (
        template("image_location,valence,arousal\n136/00001.jpg,-5,-5\n", EXPR),
        r"t\.txt, line 1: the template of --task va, not of --task expr"),
    "a template of another task without a header": (
        template("136/00001.jpg" + ",-1" * 12), r"t\.txt, line 1: 12 dummy values, expected 2 for --task va"),
    "a label file as a template": (
        template("valence,arousal\n0,0\n"), r"t\.txt, line 1: 'valence' is no frame; expected a name like"),
    "a list of videos as a template": (template("136\n137\n"), r"t\.txt, line 1: '136' is no frame"),
    "a template with a row without a frame": (
        template("136/00001.jpg,\n136/,\n"), r"t\.txt, line 2: '136/' is no frame; expected a name like"),
    "a template with a blank line in the middle": (
        template("136/00001.jpg,\n\n136/00002.jpg,"), r"t\.txt, line 2: '' is no frame"),
    "the template as the output": (template_as_output, r"--out: .*t\.txt is the template itself"),
    "a binary file as a submission": (checked(b"\x89PNG\xff"), r"p\.txt: not a text file"),
    "an empty submission": (checked(""), r"p\.txt, line 1: the header is '', expected 'image_loc"),
    "a submission of another task": (
        checked("image_location,valence,arousal\n136/00001.jpg,0,0", AU),
        r"p\.txt, line 1: the header is .*, that of --task va, expected 'image_location,AU1,AU2"),
    # settings and run folder
    "a YAML tag": (
        settings("run: !!python/object/apply:os._exit [66]"),
        "(?s)my.yaml: not plain YAML: could not determine a constructor for the tag"),
    "a YAML tag in an override": (
        settings("{}", "run.name=!!python/object/apply:os._exit [66]"),
        "--set run.name=.*: the value is not plain YAML"),
    "a YAML file that is a list": (settings("[1, 2]"), "my.yaml: expected sections like .*, got list"),
    "a binary file as settings": (settings(b"\xff\xfe\x00"), "my.yaml: not plain YAML"),
    "an unknown setting": (
        settings("task: {learning_rate: 1}"), "task.learning_rate: no such setting; nearest: "),
    "a fold number out of range": (
        settings("task: {fold: 5}"), r"task\.fold: got 5, expected 0 \(official split\) or 1 to 4"),
    "a fold number below 0": (settings("{}", "task.fold=-1"), r"task\.fold: got -1, expected 0"),
    "a path outside the synthetic data": (
        elsewhere, r"data\.frames: data/demo/Aff-Wild2/cropped_aligned is not in .*new \(synthetic\.root\)"),
    "a folder with a run of other settings": (
        used_folder, r"(?s)run was made with other settings.*task\.lr: was 1, now 3e-05 \(of stage run\)"),
    "an output folder that cannot be written": (
        lambda d: run_folder(put(d / "file"), {}),
        r"file/mine/run: cannot be written .*; choose another place with --set run\.out="),
}


@pytest.mark.parametrize("call, message", [pytest.param(*row, id=what) for what, row in TABLE.items()])
def test_bad_input_is_refused_with_a_message_that_names_it(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
