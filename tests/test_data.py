"""Aff-Wild2 as it lies on disk: label files, and frames with their labels. The folders of the videos, and the
folds, have files of their own."""

import pickle
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import ExprFrames, VideoFrames, describe
from frames import find_videos
from distributed import Team
from labels import AU, EXPR, TASKS, VA, has_labels, label_files
from training import Batches

ALONE = Team(0, 1, torch.device("cpu"))
NAMES = ["1-30-1280x720", "136", "28-30-1280x720-2_left", "28-30-1280x720-2_right", "28-30-1280x720-2",
         "video86_3", "clip.v2.final"]


def label_file(path, task, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([",".join(task.outputs), *map(str, rows), ""]))
    return path


def frame(folder, number, grey=0, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(folder / f"{number:05d}.jpg")


# ---- Label files

@pytest.mark.parametrize("folder", ["EXPR_Classification_Challenge", "EXPR_Recognition_Challenge"])
def test_both_spellings_of_the_expr_folder_are_read_with_names_whole(tmp_path, folder):
    for name in NAMES:
        label_file(tmp_path / folder / "Train_Set" / f"{name}.txt", EXPR, 0)
    label_file(tmp_path / folder / "Validation_Set/v.txt", EXPR, 0)
    (tmp_path / folder / "Train_Set/notes.md").write_text("not a label file")
    (tmp_path / folder / "Train_Set/._136.txt").write_text("what a Mac leaves behind")
    files = label_files(tmp_path, EXPR)
    assert list(files["Train_Set"]) == sorted(NAMES) and list(files["Validation_Set"]) == ["v"]
    assert all(file.name == f"{name}.txt" for name, file in files["Train_Set"].items())
    assert [has_labels(tmp_path, task) for task in (VA, EXPR, AU)] == [False, True, False]


def test_two_expr_folders_are_refused_because_one_of_them_would_be_ignored(tmp_path):
    for folder in EXPR.folders:
        (tmp_path / folder).mkdir()
    message = "both .*EXPR_Classification_Challenge and .*EXPR_Recognition_Challenge exist; keep one"
    with pytest.raises(ValueError, match=message):
        label_files(tmp_path, EXPR)


# ---- Single frames

def expr_videos(root, labels, images):
    """labels {video: codes}, images {video: numbers} -> what ExprFrames takes. Frame n of each video has grey
    level 10 n."""
    files = {video: label_file(root / "labels" / f"{video}.txt", EXPR, *codes)
             for video, codes in labels.items()}
    for video, numbers in images.items():
        for n in numbers:
            frame(root / "frames" / video, n, 10 * n)
    return files, find_videos([root / "frames"])


def test_only_frames_with_label_and_image_are_taken(tmp_path):
    labels = {"a_left": [3, -1, 0, 7], "b": [1, 2], "ghost": [5]}
    images = {"a_left": [1, 2, 4, 5, 6], "b": [2], "unlabelled": [1]}
    frames = ExprFrames(*expr_videos(tmp_path, labels, images), size=8)
    # of a_left, 2 is invalid, 3 has no image, 5 and 6 lie past the last label; of b, 1 has no image
    found = [("/".join(frames.where(i).split("/")[-2:]), frames[i][1]) for i in range(len(frames))]
    assert found == [("a_left/00001.jpg", 3), ("a_left/00004.jpg", 7), ("b/00002.jpg", 2)]
    assert frames.without_frames == ["ghost"]
    assert [frames[i][0].mean().round() for i in range(3)] == [10, 40, 20] and frames[0][0].shape == (8, 8, 3)


def test_frames_of_any_name_are_read_and_their_names_take_no_memory(tmp_path):
    """Three videos of 400 frames each: 00001.jpg, 1.PNG, and both."""
    names = {"a": [f"{n:05d}.jpg" for n in range(1, 401)], "b": [f"{n}.PNG" for n in range(1, 401)]}
    names["c"] = [*names["a"][:200], *names["b"][200:]]
    files = {}
    for video in names:
        files[video] = label_file(tmp_path / f"labels/{video}.txt", EXPR, *[4] * 400)
        (tmp_path / "frames" / video).mkdir(parents=True)
        for name in names[video]:
            (tmp_path / "frames" / video / name).touch()
    frames = ExprFrames(files, find_videos([tmp_path / "frames"]), size=8)
    paths = [f"{tmp_path}/frames/{video}/{name}" for video in names for name in names[video]]
    assert [frames.where(i) for i in range(1200)] == paths
    assert [len(pickle.dumps(part)) < 300 for part in frames.folders] == [True, True, False]
    assert pickle.loads(pickle.dumps(frames)).where(1199) == paths[1199]     # as a spawned process gets them
    video = VideoFrames(tmp_path / "frames/c", size=8)
    assert [video.where(i) for i in range(400)] == paths[800:] and video.numbers[-1] == 400


@pytest.mark.parametrize("count, every", [(12, 1), (12, 4), (3, 5), (1, 1), (11, 3), (13, 5)])
def test_every_frame_is_taken_in_some_epoch_and_none_twice_in_one(tmp_path, count, every):
    files = expr_videos(tmp_path, {"a": [0] * count}, {"a": range(1, count + 1)})
    frames = ExprFrames(*files, size=8, every=every)
    seen = set()
    for frames.epoch in range(every):
        epoch = [frames.where(i) for i in range(len(frames))]
        assert len(set(epoch)) == len(epoch) <= -(-count // every)
        seen |= set(epoch)
    assert len(seen) == count


def test_each_epoch_takes_other_frames_and_the_crop_is_told_which(tmp_path):
    told = []

    def crop(image, sample, epoch):
        told.append((image.getpixel((0, 0))[0], sample, epoch))
        return np.full((8, 8, 3), sample, np.uint8)

    files = expr_videos(tmp_path, {"a": [0] * 6}, {"a": range(1, 7)})
    frames = ExprFrames(*files, size=8, every=3, crop=crop)
    for frames.epoch in (0, 1, 5):
        assert [int(frames[i][0].mean()) for i in range(len(frames))] == [0, 1]         # what crop gave
    assert told == [(10, 0, 0), (40, 1, 0), (20, 0, 1), (50, 1, 1), (30, 0, 5), (60, 1, 5)]


def test_an_unreadable_image_is_left_out_of_its_batch_and_named(tmp_path):
    frames = ExprFrames(*expr_videos(tmp_path, {"a": [4, 5]}, {"a": [1, 2]}), size=8)
    (tmp_path / "frames/a/00001.jpg").write_bytes(b"\xff\xd8 cut short")
    images, classes, problems = frames.collate([frames[0], frames[1]])
    assert images.shape == (1, 8, 8, 3) and images.dtype == torch.uint8 and 19 < images.float().mean() < 21
    assert classes.tolist() == [5] and classes.dtype == torch.long
    assert len(problems) == 1 and problems[0].startswith(f"{frames.where(0)}: not a readable image")


@pytest.mark.parametrize("empty", ["no share", "nothing readable"])
def test_an_empty_share_of_frames_is_a_batch_of_none(tmp_path, empty):
    frames = ExprFrames(*expr_videos(tmp_path, {"a": [4]}, {"a": [1]}), size=8)
    (tmp_path / "frames/a/00001.jpg").write_bytes(b"\xff\xd8 cut short")
    items = [frames[0]] if empty == "nothing readable" else []
    images, classes, problems = frames.collate(items)
    assert images.shape == (0, 8, 8, 3) and images.dtype == torch.uint8
    assert classes.shape == (0,) and classes.dtype == torch.long and len(problems) == len(items)


def test_brightness_classes_are_learned_from_single_frames(tmp_path):
    labels, images = {"a": [n // 3 for n in range(24)]}, {"a": range(1, 25)}
    frames = ExprFrames(*expr_videos(tmp_path, labels, images), size=4)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    batches = Batches(len(frames), 24, 0, 0, ALONE)
    loader = DataLoader(frames, batch_sampler=batches, collate_fn=frames.collate)
    images, classes, problems = next(iter(loader))
    x = images.float().mean((1, 2, 3))[:, None] / 128 - 1                   # (24, 4, 4, 3) -> (24, 1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), classes)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 and not problems


# ---- All frames of a video

def test_each_face_of_a_video_comes_with_its_row_and_gaps_stay_gaps(tmp_path):
    for n in (1, 3, 4, 9):
        frame(tmp_path / "v", n, 10 * n, size=(20, 12))
    frames = VideoFrames(tmp_path / "v", size=6)
    assert len(frames) == 4 and frames.where(2) == str(tmp_path / "v/00004.jpg")
    images, rows, problems = frames.collate([frames[i] for i in range(4)])
    assert rows.tolist() == [0, 2, 3, 8] and rows.dtype == torch.long        # row i belongs to frame i + 1
    assert images.shape == (4, 6, 6, 3) and images.dtype == torch.uint8 and not problems
    assert images.float().mean((1, 2, 3)).round().tolist() == [10, 30, 40, 90]


def test_an_unreadable_face_of_a_video_is_left_out_and_the_others_keep_their_rows(tmp_path):
    for n in (1, 2, 3):
        frame(tmp_path / "v", n, 10 * n)
    (tmp_path / "v/00002.jpg").write_bytes(b"\xff\xd8 cut short")
    frames = VideoFrames(tmp_path / "v", size=8)
    images, rows, problems = frames.collate([frames[i] for i in range(3)])
    assert rows.tolist() == [0, 2] and images.float().mean((1, 2, 3)).round().tolist() == [10, 30]
    assert len(problems) == 1 and problems[0].startswith(f"{tmp_path}/v/00002.jpg: not a readable image")
    images, rows, problems = frames.collate([])
    assert images.shape == (0, 8, 8, 3) and rows.shape == (0,) and rows.dtype == torch.long


# ---- What a copy holds

def a_copy(root, tasks):
    """Two training videos, one without frames, and one to validate on. Of 'a', frame 3 has no image and
    frame 6 no label."""
    def au(first, others):
        return f"{first}" + f",{others}" * 11

    rows = {"va": {"a": ["0,0", "0,-5", "0,0", "-5,-5", "1,1"], "ghost": ["0,0"], "b": ["1,1", "0,0"]},
            "expr": {"a": [0, -1, 4, 7, 7], "ghost": [7], "b": [1, -1]},
            "au": {"a": [au(1, 0), au(-1, 1), au(0, 0), au(1, 1), au(0, 1)], "ghost": [au(1, 0)],
                   "b": [au(-1, -1), au(0, 1)]}}
    for task in tasks:
        for video, codes in rows[task.name].items():
            part = "Validation_Set" if video == "b" else "Train_Set"
            label_file(root / "labels" / task.folders[0] / part / f"{video}.txt", task, *codes)
    for video, numbers in {"a": (1, 2, 4, 5, 6), "b": (1, 2), "test": (1,)}.items():
        for n in numbers:
            frame(root / "frames" / video, n)
    (root / "frames/nobody").mkdir()
    return [root / "frames"], root / "labels"


DESCRIBED = """\
3 videos with frames, 8 face images
va   Train_Set         2 videos,         6 frames,         4 fully labelled,         2 of them with a face; \
1 videos without frames
va   Validation_Set    1 videos,         2 frames,         2 fully labelled,         2 of them with a face; \
0 videos without frames
expr Train_Set         2 videos,         6 frames,         5 fully labelled,         3 of them with a face; \
1 videos without frames
      Neutral 1, Anger 0, Disgust 0, Fear 0, Happiness 1, Sadness 0, Surprise 0, Other 3
expr Validation_Set    1 videos,         2 frames,         1 fully labelled,         1 of them with a face; \
0 videos without frames
      Neutral 0, Anger 1, Disgust 0, Fear 0, Happiness 0, Sadness 0, Surprise 0, Other 0
au   Train_Set         2 videos,         6 frames,         5 fully labelled,         3 of them with a face; \
1 videos without frames
      AU1 3, AU2 3, AU4 3, AU6 3, AU7 3, AU10 3, AU12 3, AU15 3, AU23 3, AU24 3, AU25 3, AU26 3
au   Validation_Set    1 videos,         2 frames,         1 fully labelled,         1 of them with a face; \
0 videos without frames
      AU1 0, AU2 1, AU4 1, AU6 1, AU7 1, AU10 1, AU12 1, AU15 1, AU23 1, AU24 1, AU25 1, AU26 1
""".splitlines()


def test_a_copy_is_described_with_counts_made_by_hand(tmp_path):
    assert list(describe(*a_copy(tmp_path, TASKS.values()))) == DESCRIBED


def test_a_copy_with_the_labels_of_one_task_is_described_by_these(tmp_path):
    assert list(describe(*a_copy(tmp_path, [EXPR]))) == [DESCRIBED[0], *DESCRIBED[3:7]]


def test_a_copy_whose_label_files_hold_no_frames_is_described_too(tmp_path):
    frame(tmp_path / "frames/a", 1)
    for part in ("Train_Set", "Validation_Set"):
        label_file(tmp_path / AU.folders[0] / part / "a.txt", AU)
    lines = []
    with pytest.raises(ValueError, match="no labelled frame has a face image, so there is nothing to train"):
        lines.extend(describe([tmp_path / "frames"], tmp_path))
    assert "1 videos,         0 frames,         0 fully labelled" in lines[1]


def test_a_copy_without_labels_is_refused_with_what_was_looked_for(tmp_path):
    frame(tmp_path / "frames/a", 1)
    with pytest.raises(ValueError, match="data.labels: no VA_Estimation_Challenge in"):
        list(describe([tmp_path / "frames"], tmp_path))


def test_what_lies_beside_the_frames_is_counted_by_kind_and_full_folders_without_a_frame_are_named(tmp_path):
    (frames,), labels = a_copy(tmp_path, TASKS.values())
    for name in ("a/notes.txt", "a/B.TXT", "b/Thumbs.db", "nobody/face1.jpg", "nobody/face2.jpg",
                 "nobody/1.jpg2", "a/00000.jpg", "a/.hidden", "a/README"):
        (frames / name).touch()
    (frames / "a/landmarks").mkdir()
    first, beside, unread, *others = describe([frames], labels)
    heading, kinds = beside.split(": ")
    assert heading == "  not read, as no frame (00001.jpg, ...)"
    assert sorted(kinds.split(", ")) == ["1 .db", "1 .jpg2", "1 folders", "1 hidden", "1 with number 0",
                                         "1 without extension", "2 .jpg", "2 .txt"]
    assert unread == "  folders without a frame that are not empty: nobody (2 .jpg, 1 .jpg2)"
    assert [first, *others] == DESCRIBED


def test_the_script_prints_the_description_or_one_line_of_refusal(tmp_path, monkeypatch, capsys):
    (frames,), labels = a_copy(tmp_path, TASKS.values())
    (tmp_path / "my.yaml").write_text(f"data: {{frames: ['{frames}'], labels: '{labels}'}}")
    monkeypatch.setattr(sys, "argv", ["data.py", "--config", str(tmp_path / "my.yaml")])
    runpy.run_path(data.__file__, run_name="__main__")
    assert capsys.readouterr().out.splitlines() == DESCRIBED
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--set", "data.labels=nowhere"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(data.__file__, run_name="__main__")
    assert capsys.readouterr().err.startswith("error: data.labels: no VA_Estimation_Challenge in 'nowhere'")
