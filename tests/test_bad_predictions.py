"""Broken prediction files, in a table like that of test_bad_input.py: what is wrong, and the message that
names the file and the line. The scorer's other refusals are in test_prediction_files.py."""

import re

import pytest

from labels import AU, EXPR, VA
from prediction_files import read_predictions

ROW, ZEROS = "136/00001.jpg", ",".join("0" * 12)
SUBMITTED_VA, SUBMITTED_EXPR, SUBMITTED_AU = (",".join(["image_location", *task.outputs])
                                             for task in (VA, EXPR, AU))
VA_TABLE = "video,frame,valence,arousal"
REFUSED = {
    "an empty file": (VA, "p.csv", [],
        r"p\.csv, line 1: header is ''; expected one column each of video, fr"),
    "a header alone": (VA, "p.csv", [VA_TABLE], r"p\.csv: no prediction in it; expected a row per frame"),
    "a submission's header alone": (AU, "p.txt", [SUBMITTED_AU], r"p\.txt: no prediction in it"),
    "rows without any prediction": (VA, "p.csv", [VA_TABLE, "a,1,,"], r"p\.csv: no prediction in it"),
    "empty JSON lines": (VA, "p.jsonl", [], r"p\.jsonl: no prediction in it"),
    "a file that is no table": (EXPR, "p.csv", ["hello"],
        r"line 1: header is 'hello'; .* or a submission, w"),
    "a table of another task": (AU, "p.csv", [VA_TABLE, "a,1,0,0"],
        r"line 1: .* column each of AU1, .* for au"),
    "a table without frames": (VA, "p.csv", ["video,valence,arousal", "a,0,0"],
        r"one column each of frame for"),
    "a column twice": (VA, "p.csv", [VA_TABLE + ",valence", "a,1,0,0,0"],
        r"one column each of valence for va"),
    "a table of single images": (
        EXPR, "p.csv", ["file,face," + ",".join(EXPR.outputs)],
        r"table of single images \(--still\) has no vid"),
    "a submission of another task": (
        VA, "p.txt", [SUBMITTED_EXPR, ROW + ",1"],
        r"line 1: header is 'image_location,Neutral.*valence,arousal'"),
    "action units in another order": (
        AU, "p.txt", [SUBMITTED_AU.replace("AU1,AU2", "AU2,AU1"), f"{ROW},{ZEROS}"], "line 1: header is"),
    "a short row": (VA, "p.csv", [VA_TABLE, "a,1,0,0", "a,2,0"],
        r"line 3: 3 fields 'a,2,0', expected 4, as ma"),
    "a long row": (VA, "p.csv", [VA_TABLE, "a,1,0,0,"], r"line 2: 5 fields .*, expected 4"),
    "a row of the template": (VA, "p.txt", [SUBMITTED_VA, ROW + ","],
        r"line 2: 2 fields .* expected 3 for va"),
    "a class for each header field": (
        EXPR, "p.txt", [SUBMITTED_EXPR, ROW + ",0,0,0,1,0,0,0,0"],
        r"line 2: 9 fields .* expected 2 for expr"),
    "no class": (EXPR, "p.txt", [SUBMITTED_EXPR, ROW + ","], r"line 2: frame 1, '', expected numbers"),
    "text for a number": (VA, "p.csv", [VA_TABLE, "a,1,0,high"],
        r"line 2: frame 1, '0,high', expected numbers"),
    "text for a frame": (VA, "p.csv", [VA_TABLE, "a,one,0,0"], r"line 2: frame one, '0,0', expected numbers"),
    "half a frame": (VA, "p.csv", [VA_TABLE, "a,1.5,0,0"], r"line 2: frame 1\.5, .* expected numbers"),
    "a frame beyond all numbers": (VA, "p.csv", [VA_TABLE, f"a,{'9' * 30},0,0"], r"line 2: frame 9{20},"),
    "frame 0": (VA, "p.csv", [VA_TABLE, "a,1,0,0", "a,0,0,0"], r"line 3: frame 0 of video 'a', expected"),
    "a frame of eight digits": (VA, "p.csv", [VA_TABLE, "a,10000000,0,0"],
        r"line 2: frame 10000000 of video"),
    "no video": (VA, "p.csv", [VA_TABLE, "a,1,0,0", ",1,0,0"], r"line 3: frame 1 of video ''"),
    "half a prediction": (VA, "p.csv", [VA_TABLE, "a,1,0.5,"], r"line 2: frame 1, '0\.5,', expected numbers"),
    "NaN": (VA, "p.csv", [VA_TABLE, "a,1,0,0", "a,2,nan,0"], r"line 3: nan,0, expected finite numbers"),
    "infinity": (VA, "p.csv", [VA_TABLE, "a,1,0,-inf"], r"line 2: 0,-inf, expected finite numbers"),
    "a logit for a probability": (
        AU, "p.csv", ["video,frame," + ",".join(AU.outputs), f"a,1,{ZEROS}", f"a,2,{ZEROS[:-1]}1.5"],
        r"line 3: 0,.*,1\.5, expected probabilities from 0 to 1"),
    "valence beyond 1": (VA, "p.txt", [SUBMITTED_VA, ROW + ",0,1.001"],
        r"line 2: 0,1.001, expected numbers from "),
    "a code left over": (
        VA, "p.txt", [SUBMITTED_VA, ROW + ",-5,-5"],
        r"line 2: -5,-5, .* -1 to 1; -5 means that nobody annotated"),
    "class 8": (EXPR, "p.txt", [SUBMITTED_EXPR, ROW + ",8"],
        r"line 2: 8, expected a whole number from 0 to 7"),
    "class -1": (EXPR, "p.txt", [SUBMITTED_EXPR, ROW + ",-1"],
        r"line 2: -1, .* -1 means that nobody annotated"),
    "a class and a half": (EXPR, "p.txt", [SUBMITTED_EXPR, ROW + ",1.5"],
        r"line 2: 1\.5, expected a whole number"),
    "a probability in a submission": (
        AU, "p.txt", [SUBMITTED_AU, f"{ROW},{ZEROS[:-1]}0.5"],
        r"line 2: 0,.*,0\.5, expected a whole number from 0"),
    "an image without a video": (
        EXPR, "p.txt", [SUBMITTED_EXPR, "00001.jpg,1"], r"line 2: '00001\.jpg' is not the name of a frame"),
    "a name without a number": (EXPR, "p.txt", [SUBMITTED_EXPR, "136/face.jpg,1"],
        r"line 2: '136/face\.jpg' is"),
    "image 0": (EXPR, "p.txt", [SUBMITTED_EXPR, "136/00000.jpg,1"],
        "line 2: frame 0 of video '136', expected a video's name and a number from 1"),
    "a name without an extension": (EXPR, "p.txt", [SUBMITTED_EXPR, "136/00001,1"],
        r"line 2: '136/00001' is not"),
    "a frame twice": (
        VA, "p.csv", [VA_TABLE, "a,1,0,0", "b,1,0,0", "a,1,1,1"],
        r"lines 2 and 4: both are frame 1 of a; exp"),
    "a frame twice under two names": (
        EXPR, "p.txt", [SUBMITTED_EXPR, ROW + ",1", "136/1.png,1"],
        r"lines 2 and 3: both are frame 1 of 136"),
    "a quote that does not end": (
        VA, "p.csv", [VA_TABLE, "a,1,0,0", '"a,2,0,0', "a,3,0,0"], r"line 3: 1 fields"),
    "a quote around everything": (
        VA, "p.csv", [VA_TABLE, '"' + "a" * 200_000], r"line 2: not a row of a CSV: field larger than"),
    "JSON that is none": (VA, "p.jsonl", ['{"video": "a"'],
        r"line 1: '{\"video\": \"a\"', expected a JSON obj"),
    "JSON that is a list": (VA, "p.jsonl", ["[1, 2]"],
        r"line 1: .* expected a JSON object with video, frame, v"),
    "JSON without the task": (
        VA, "p.jsonl", ['{"video": "a", "frame": 1}'],
        r"line 1: .* with video, frame, valence, arousal for va"),
    "JSON without end": (VA, "p.jsonl", ["[" * 100_000], r"^.{0,300}line 1: '\[{80}', expected"),
    "half a frame in JSON": (
        VA, "p.jsonl", ['{"video": "a", "frame": 1.5, "valence": 0, "arousal": 0}'],
        r"line 1: .* a whole number"),
    "a number for a video": (
        VA, "p.jsonl", ['{"video": 3, "frame": 1, "valence": 0, "arousal": 0}'],
        r"line 1: video '3', .* a name"),
    "half a prediction in JSON": (
        VA, "p.jsonl", ['{"video": "a", "frame": 1, "valence": null, "arousal": 0}'],
        r"line 1: frame 1, 'None,0'"),
    "NaN in JSON": (
        VA, "p.jsonl", ['{"video": "a", "frame": 1, "valence": NaN, "arousal": 0}'],
        r"line 1: nan,0, expected f"),
}


@pytest.mark.parametrize("task, name, lines, message", [pytest.param(*row, id=what)
                                                        for what, row in REFUSED.items()])
def test_a_broken_file_is_refused_with_its_name_and_line(tmp_path, task, name, lines, message):
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message) as refusal:
        read_predictions(path, task)
    assert str(refusal.value).startswith(str(path)) and len(str(refusal.value)) < 1000


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.txt"])
@pytest.mark.parametrize("content", [b"\xff\xfev\x00i\x00", b"video,frame\n\xe9,1\n", bytes(range(256))])
def test_a_file_that_is_no_utf_8_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not UTF-8 text"):
        read_predictions(tmp_path / name, VA)
