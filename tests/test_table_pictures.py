"""The pictures beside a table, read back: what is drawn where, and that none is missing, doubled or out of
date."""

import argparse
import contextlib
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import table_pictures
from distributed import Team
from drawn import assert_texts_are_apart, found, is_colour
from labels import AU, EXPR, TASKS, VA
from pictures import CLASS_COLOURS, DARK, GREY, PREDICTION
from table import Table
from table_pictures import Columns, Predicted, draw, draw_missing, nearest_faces

ALONE = Team(0, 1, torch.device("cpu"))
LEFT, RIGHT = 150, 1122                  # where a picture's frames begin and end
FRAMES = (RIGHT - LEFT) // 3             # so many frames have three pixels each
PLAIN = argparse.Namespace(fps=None, smooth=0)


def predicted(T: int, tasks=("va", "expr", "au"), noface=(), name="a video") -> Predicted:
    """Random values of T frames, of these tasks; `noface`: frames without a face."""
    rng, values = np.random.default_rng(T), {}
    if "va" in tasks:
        values |= {name: rng.uniform(-1, 1, T) for name in VA.outputs}
    if "expr" in tasks:
        values |= {name: rng.random(T) for name in EXPR.outputs}
    if "au" in tasks:
        values |= {name: rng.random(T) for name in AU.outputs}
    classes = rng.integers(8, size=T) if "expr" in tasks else np.full(T, -1)
    gone = np.isin(np.arange(T), list(noface))
    if gone.all():
        values, classes = {name: np.full(T, np.nan) for name in values}, np.full(T, -1)
    return Predicted(name, gone, values, classes)


def pixels_of(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)                                 # (height, width, 3)


def x_of(frame, T: int) -> int:
    return int(LEFT + (frame + 0.5) * (RIGHT - LEFT) / T)                  # T frames share the width equally


def row_of(texts, pixels, name: str) -> np.ndarray:
    """The line of pixels beside a name."""
    [text] = found(texts, name)
    assert text.right < LEFT
    return pixels[round(text.y)]


# ---- One picture

def test_each_expression_has_a_strip_with_its_name_coloured_where_it_is_predicted(texts):
    video = predicted(FRAMES)
    pixels = pixels_of(draw(video, []))
    for k, name in enumerate(EXPR.outputs):
        line = row_of(texts, pixels, name)
        for t in range(FRAMES):
            expected = CLASS_COLOURS[k] if video.classes[t] == k else (255, 255, 255)
            assert tuple(line[x_of(t, FRAMES)]) == expected


def test_each_action_unit_has_a_strip_the_darker_the_more_probable(texts):
    video = predicted(FRAMES)
    pixels = pixels_of(draw(video, []))
    for name in AU.outputs:
        line = row_of(texts, pixels, name)
        for t in range(FRAMES):
            shade = 255 + video.values[name][t] * (np.array(PREDICTION) - 255)
            assert np.abs(line[x_of(t, FRAMES)] - shade).max() <= 1


def test_valence_and_arousal_are_curves_between_minus_one_and_one_and_stay_inside(texts):
    values = {"valence": np.full(FRAMES, 0.5), "arousal": np.linspace(-3, 3, FRAMES)}
    pixels = pixels_of(draw(Predicted("v", np.zeros(FRAMES, bool), values, np.full(FRAMES, -1)), []))
    for k, name in enumerate(VA.outputs):
        top, bottom = found(texts, "1")[k].y, found(texts, "-1")[k].y
        assert top < found(texts, name)[0].y < bottom
        for t in (3, 150, 320):
            y = round(bottom - (np.clip(values[name][t], -1, 1) + 1) / 2 * (bottom - top))
            blue = is_colour(pixels[:, x_of(t, FRAMES)], PREDICTION)
            assert blue[y - 3:y + 4].any()
            assert not blue[round(top) - 10:y - 4].any() and not blue[y + 4:round(bottom) + 10].any()


def test_where_there_is_no_face_the_paper_is_grey_and_the_strip_dark(texts):
    gone = [0, *range(40, 60), 100]
    video = predicted(FRAMES, noface=gone)
    video.classes[:] = 3
    pixels = pixels_of(draw(video, []))
    strip, unused = row_of(texts, pixels, "no face"), row_of(texts, pixels, "Neutral")
    plot = pixels[round(found(texts, "1")[0].y) + 4]                       # the upper end of valence's plot
    for t in range(FRAMES):
        x = x_of(t, FRAMES)
        assert tuple(strip[x]) == (DARK if t in gone else (255, 255, 255))
        assert tuple(unused[x]) == (GREY if t in gone else (255, 255, 255))
    gap, beside = plot[x_of(40, FRAMES):x_of(59, FRAMES)], plot[x_of(62, FRAMES):x_of(98, FRAMES)]
    for part, colour in ((gap, GREY), (beside, (255, 255, 255))):          # but for the curve
        assert is_colour(part, colour).mean() > 0.6
    assert found(texts, f"frames: {FRAMES}; without a readable face image: {len(gone)}")


@pytest.mark.parametrize("tasks", [("va",), ("expr",), ("au",), ("va", "au")])
def test_a_task_that_is_not_trained_is_not_drawn(tasks, texts):
    draw(predicted(30, tasks), [])
    strings = {text.string for text in texts}
    for task in TASKS.values():
        there = {name in strings for name in task.outputs}
        assert there == {task.name in tasks}


def test_a_video_without_a_face_shows_no_values(texts):
    picture = draw(predicted(20, noface=range(20)), [], fps=10)
    strings = {text.string for text in texts}
    assert not strings & {*VA.outputs, *EXPR.outputs, *AU.outputs} and picture.height < 250
    assert "no readable face image: nothing is predicted" in strings


@pytest.mark.parametrize("T", [1, 3, 300, 20_000])
@pytest.mark.parametrize("tasks, noface, name", [
    (("va", "expr", "au"), [0], "a/video"), (("au",), [], "é\n\udcff" * 90), (("va",), range(20_000), "")])
def test_no_text_overlaps_another_or_is_cut_off(T, tasks, noface, name, texts):
    faces = [(frame, np.zeros((9, 9, 3), np.uint8)) for frame in nearest_faces(np.zeros(T, bool))]
    assert_texts_are_apart(texts, pixels_of(draw(predicted(T, tasks, noface, name), faces, fps=25, smooth=5)))


@pytest.mark.parametrize("T, fps", [(1, 25), (3, 25), (300, 25), (20_000, 29.97), (7, 0.1)])
def test_seconds_stand_below_their_frames(T, fps, texts):
    table_pictures.seconds_axis(Image.new("RGB", (1180, 50)), 5, T, fps)
    marks = [text for text in texts if text.string != "seconds"]
    assert marks[0].string == "0" and len(marks) <= 13 and (T == 1 or len(marks) > 1)
    for text in marks:
        frame = float(text.string) * fps
        assert frame <= T - 1 + 1e-6 and abs(text.x - (LEFT + (frame + 0.5) * 972 / T)) <= 1.5


def test_smoothing_is_told(texts):
    draw(predicted(5), [], smooth=7)
    assert found(texts, "frames: 5; without a readable face image: 0; values: mean over 7 frames before and "
                        "after each one")


# ---- Long videos

@pytest.mark.parametrize("T", [1, 5, 971, 972, 973, 1945, 47_434])
def test_each_frame_is_in_one_column_and_no_column_is_empty(T):
    columns, values = Columns(T), np.random.default_rng(T).normal(size=T)
    assert columns.n == min(T, 972) and columns.counts.sum() == T and columns.counts.min() >= 1
    assert np.ptp(columns.counts) <= 1
    of_frame = np.arange(T) * columns.n // T
    for i in {0, columns.n // 2, columns.n - 1}:
        part = values[of_frame == i]
        found = [method(values)[i] for method in (columns.mean, columns.least, columns.largest)]
        assert found == pytest.approx([part.mean(), part.min(), part.max()])


def test_one_frame_in_20000_is_seen(texts):
    T, at = 20_000, 12_345
    values = {name: np.zeros(T) for name in (*VA.outputs, *AU.outputs)}
    values["valence"][at], values["AU4"][at] = 0.9, 1
    classes = np.zeros(T, int)
    classes[at] = 5
    pixels = pixels_of(draw(Predicted("v", np.arange(T) == 3, values, classes), []))
    count = (np.arange(T) * 972 // T == at * 972 // T).sum()               # frames in its column of pixels
    x = LEFT + at * 972 // T
    top, bottom = found(texts, "1")[0].y, found(texts, "-1")[0].y
    spike = pixels[round(bottom - 1.8 / 2 * (bottom - top)), LEFT:RIGHT]
    assert np.flatnonzero(is_colour(spike, table_pictures.PALE)) + LEFT == pytest.approx([x], abs=1)
    for name, colour in (("AU4", PREDICTION), ("Sadness", CLASS_COLOURS[5])):
        line = row_of(texts, pixels, name)[LEFT + 1:RIGHT]
        assert np.abs(line[x - LEFT - 1] - (255 + (np.array(colour) - 255) / count)).max() <= 1
        assert np.flatnonzero(~is_colour(line, (255, 255, 255))) + LEFT + 1 == pytest.approx([x], abs=1)


def test_a_long_video_has_a_picture_of_the_same_size():
    assert draw(predicted(47_434), []).width == draw(predicted(300), []).width
    assert draw(predicted(47_434), []).height == draw(predicted(300, noface=[0]), []).height


# ---- Which faces

@pytest.mark.parametrize("T", [1, 3, 11, 500, 47_434])
def test_the_faces_shown_are_few_have_a_face_and_are_spread_over_the_video(T):
    rng = np.random.default_rng(T)
    for noface in (np.zeros(T, bool), rng.random(T) < 0.9, np.arange(T) < T - 1):
        frames = nearest_faces(noface)
        assert len(frames) <= 11 and (np.diff(frames) > 0).all() and not noface[frames].any()
        assert len(frames) or noface.all()
    assert len(nearest_faces(np.zeros(T, bool))) == min(T, 11)
    assert len(nearest_faces(np.ones(T, bool))) == 0


# ---- The pictures of a table

ODD = ["a", "b/a,\"quoted\"", "c\nd\udcff", "empty"]
LENGTHS = [4, 7, 1100, 3]


@pytest.fixture(params=["t.csv", "t.jsonl"])
def made(tmp_path, request):
    """A finished table of four videos, with the frames of them. -> what draw_missing wants"""
    rng = np.random.default_rng(0)
    table = Table(tmp_path / request.param, ["video", "frame", "time", "face", "valence", "arousal",
                                             *predict.columns([EXPR])], {"made": "of"}, ALONE)
    folders = [tmp_path / "frames" / name for name in ODD]
    for number, (name, folder, T) in enumerate(zip(ODD, folders, LENGTHS)):
        folder.mkdir(parents=True)
        shown = [t for t in range(T) if name != "empty" and t % 3 != 1][:30]
        for t in shown:
            Image.new("RGB", (9, 9), (200, t, 90)).save(folder / f"{t + 1:05d}.png")
        values = [None] * 11
        rows = []
        for t in range(T):
            if name != "empty":
                shares = rng.dirichlet(np.ones(8))
                values = [*rng.normal(size=2).tolist(), EXPR.outputs[shares.argmax()], *shares.tolist()]
            rows.append([name, t + 1, None, int(t in shown), *values])
        table.write(number, rows)
    table.join(len(ODD))
    return table, SimpleNamespace(names=ODD, folders=folders, sizes=LENGTHS)


def pictures(table) -> dict[str, bytes]:
    folder = table.path.with_name(f"{table.path.name}.pictures")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_video_has_a_picture_named_as_the_video_whatever_its_name(made):
    draw_missing(*made, PLAIN, ALONE)
    assert sorted(pictures(made[0])) == sorted(f"{name}.png" for name in ODD)


def test_the_picture_shows_the_rows_of_its_own_video(made, monkeypatch):
    seen = []

    def spy(video, faces, *how):
        seen.append((video, faces, how))
        return Image.new("RGB", (4, 4))
    monkeypatch.setattr(table_pictures, "draw", spy)
    draw_missing(*made, argparse.Namespace(fps=8.0, smooth=2), ALONE)
    assert [video.name for video, _, _ in seen] == ODD
    rows = list(made[0].read())
    for (video, faces, how), T in zip(seen, LENGTHS):
        own, rows = rows[:T], rows[T:]
        assert how == (8.0, 2) and video.noface.tolist() == [int(row[3]) == 0 for row in own]
        if video.name != "empty":
            assert list(video.values) == [*VA.outputs, *EXPR.outputs]
            assert video.values["arousal"] == pytest.approx([float(row[5]) for row in own])
            assert [EXPR.outputs[k] for k in video.classes] == [row[6] for row in own]
            assert faces and all(not video.noface[t] and (image[0, 0] == (200, t, 90)).all()
                                 for t, image in faces)
        else:
            assert not faces and all(np.isnan(values).all() for values in video.values.values())


@pytest.mark.parametrize("made", ["t.csv"], indirect=True)
def test_two_processes_draw_the_pictures_of_one(made, tmp_path):
    table, videos = made
    draw_missing(table, videos, PLAIN, ALONE)
    alone = pictures(table)
    for name in alone:
        (tmp_path / f"{table.path.name}.pictures" / name).unlink()
    agreed, counts = [], []

    class Half(Team):
        def agree(self, value):
            agreed.append(value) if self.rank == 0 else None
            return agreed[0]

        def wait(self):
            counts.append(len(pictures(table)))
    for rank in (0, 1):
        draw_missing(table, videos, PLAIN, Half(rank, 2, torch.device("cpu")))
    assert pictures(table) == alone and counts == [2, 4]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [0, 1, 3])
@pytest.mark.parametrize("made", ["t.csv"], indirect=True)
def test_a_killed_run_goes_on_and_no_picture_is_missing_or_drawn_twice(made, monkeypatch, kill_at):
    table, videos = made
    write, calls = table_pictures.write_file, []

    def killing(path, how):
        calls.append(path)
        if len(calls) == kill_at + 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / ".0.99.tmp").write_bytes(b"half")
            raise Killed
        write(path, how)
    monkeypatch.setattr(table_pictures, "write_file", killing)
    with pytest.raises(Killed):
        draw_missing(table, videos, PLAIN, ALONE)
    assert len(pictures(table)) == kill_at + 1                             # with the one that is half there
    draw_missing(table, videos, PLAIN, ALONE)
    assert sorted(pictures(table)) == sorted(f"{name}.png" for name in ODD) and len(calls) == len(ODD) + 1
    draw_missing(table, videos, PLAIN, ALONE)
    assert len(calls) == len(ODD) + 1


@pytest.mark.parametrize("made", ["t.csv"], indirect=True)
def test_a_picture_of_an_earlier_table_or_a_damaged_one_is_drawn_again(made, tmp_path):
    table, videos = made
    draw_missing(table, videos, PLAIN, ALONE)
    drawn, folder = pictures(table), tmp_path / f"{table.path.name}.pictures"
    (folder / "a.png").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(folder / "empty.png")
    draw_missing(table, videos, PLAIN, ALONE)
    assert pictures(table) == drawn
    table.made_of = {"made": "of", "smooth": 3}
    draw_missing(table, videos, argparse.Namespace(fps=None, smooth=3), ALONE)
    assert all(drawn[name] != picture for name, picture in pictures(table).items())


@pytest.mark.parametrize("change, message", [
    (lambda head, a, b, rest: [head, a, rest], r"expected frame 2 of 'a', found \['a', '3', '', '1'\]"),
    (lambda head, a, b, rest: [head, b, rest], r"expected frame 1 of 'a', found \['a', '2'"),
    (lambda head, a, b, rest: [head, a], r"expected frame 2 of 'a', found no more rows"),
    (lambda head, a, b, rest: [head.replace("valence", "v"), a, b, rest], r"not the table that was made"),
    (lambda head, a, b, rest: [head, a, "a,2,,1,,,,,,,,,,,\n", rest], r"values of 'a' are missing"),
    (lambda head, a, b, rest: [head, a, "a,2,,1\n", rest], r"expected frame 2 of 'a', found \['a', '2'"),
    (lambda head, a, b, rest: [head, a, b.replace(",0,", ",0,high"), rest], r"expected frame 2 of"),
    (lambda head, a, b, rest: [head, head, a, b, rest], r"expected frame 1 of 'a', found \['video'"),
    (lambda head, a, b, rest: [], r"not the table that was made \(its first line does not name the col")])
@pytest.mark.parametrize("made", ["t.csv"], indirect=True)
def test_a_table_that_was_edited_is_refused(made, change, message):
    table, videos = made
    with open(table.path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = "".join(change(file.readline(), file.readline(), file.readline(), file.read()))
    table.path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"t.csv: {message}"):
        draw_missing(table, videos, PLAIN, ALONE)
    assert pictures(table) == {}


@pytest.mark.parametrize("made", ["t.csv"], indirect=True)
def test_a_file_in_place_of_the_folder_is_refused(made, tmp_path):
    (tmp_path / "t.csv.pictures").write_text("mine")
    with pytest.raises(ValueError, match="t.csv.pictures: found a file, expected a folder for the pictures"):
        draw_missing(*made, PLAIN, ALONE)


def test_the_command_draws_an_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table_pictures.py", str(tmp_path / "example.png")])
    with contextlib.suppress(SystemExit):
        runpy.run_path(table_pictures.__file__, run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path}/example.png\n"
    assert Image.open(tmp_path / "example.png").size[0] == 1180
