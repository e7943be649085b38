"""What the extraction of features promises: an array and a mask per video, the same from any number of
processes, after a kill, and with images that are missing or broken."""

import os
import re
import shutil

import numpy as np
import pytest

import tiny
from labels import AU, label_files
from tiny import TINY, content, copied, done, metrics, ready, run, spoil

EXTRACT = ["extract_features.py", *TINY]
EIGHTH_BATCH = tiny.stop("vit.VisionTransformer.features", 8)      # killed then, with some of 7 videos done


def training_video(folder) -> str:
    """The name of a training video."""
    return list(label_files(folder / "data/Aff-Wild2/annotations", AU)["Train_Set"])[0]


# ---- The same by two processes, and after a kill

def test_two_processes_extract_the_features_of_one(finished, tmp_path):
    folder, b = ready(finished, tmp_path, "features")
    done(folder, *EXTRACT, world=2)
    a = finished / "runs/tiny/features"
    files = sorted(path.name for path in a.glob("*.npy"))
    assert files == sorted(path.name for path in b.glob("*.npy")) and len(files) == 2 * 7
    for name in files:
        assert np.load(a / name).astype(float) == pytest.approx(np.load(b / name).astype(float), abs=1e-3)
    assert metrics(a) == metrics(b)


def test_an_interrupted_extraction_leaves_the_videos_that_are_done_alone(finished, tmp_path):
    folder, whole = copied(finished, tmp_path), finished / "runs/tiny/features"
    features = folder / "runs/tiny/features"
    (features / "metrics.json").unlink()
    names = sorted(path.name for path in features.glob("*.npy") if not path.name.endswith(".noface.npy"))
    for name in names[:3]:
        (features / name).unlink()                     # its mask is written first, so it may be there
    (features / names[0].replace(".npy", ".noface.npy")).unlink()
    before = content(features)
    done(folder, *EXTRACT, world=2)
    after, expected = content(features), content(whole)
    for name in names:
        assert after[name][0] == expected[name][0]
    assert all(after[name] == before[name] for name in names[3:])
    assert metrics(features) == metrics(whole)


def test_a_kill_in_the_middle_of_a_video_leaves_no_half_array(finished, tmp_path):
    folder, features = ready(finished, tmp_path, "features")
    whole = finished / "runs/tiny/features"
    assert run(folder, *EXTRACT, hook=EIGHTH_BATCH).codes == [-9]
    halfway = [path for path in features.glob("[!.]*.npy") if not path.name.endswith(".noface.npy")]
    assert 0 < len(halfway) < 7
    assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in halfway)
    done(folder, *EXTRACT)
    after, expected = content(features), content(whole)
    assert after.keys() == expected.keys()
    assert all(after[name][0] == expected[name][0] for name in after if name.endswith(".npy"))


# ---- Videos that are gone, new, changed or lost

def test_an_extraction_does_not_go_on_with_fewer_videos_than_it_began_with(finished, tmp_path):
    """As when a disk is not mounted after a restart. Once it is finished, the images are no longer needed."""
    folder, features = ready(finished, tmp_path, "features")
    assert run(folder, *EXTRACT, hook=EIGHTH_BATCH).codes == [-9]
    video = sorted((folder / "data/Aff-Wild2/cropped_aligned").iterdir())[0]
    video.rename(folder / "away")
    codes, said = run(folder, *EXTRACT, world=2)
    assert codes == [2, 2]
    gone = f"features: 1 videos were there when this began and are gone: {video.name}; bring them back"
    assert gone in said
    (folder / "away").rename(video)
    done(folder, *EXTRACT)
    assert metrics(features) == metrics(finished / "runs/tiny/features")
    video.rename(folder / "away")
    assert "features is finished; nothing to do" in done(folder, *EXTRACT)


@pytest.mark.parametrize("world", [1, 2])
def test_new_changed_and_lost_videos_are_extracted_and_the_others_kept(finished, tmp_path, world):
    folder, whole = copied(finished, tmp_path), finished / "runs/tiny/features"
    features, frames = folder / "runs/tiny/features", folder / "data/Aff-Wild2/cropped_aligned"
    names = sorted(path.name for path in frames.iterdir())
    changed, masked, lost, *kept = names
    shutil.copytree(frames / kept[0], frames / "test_video")
    last = sorted((frames / changed).iterdir())[-1]
    shutil.copy(last, last.with_name("00099.jpg"))
    (features / f"{masked}.noface.npy").unlink(), (features / f"{lost}.npy").unlink()
    before = content(features)
    said = done(folder, *EXTRACT, world=world)
    assert "from 4 of 8 videos" in said
    after, expected = content(features), content(whole)
    assert len(np.load(features / f"{changed}.npy")) == 99
    for name in (f"{masked}.npy", f"{masked}.noface.npy", f"{lost}.npy"):
        made, expected_array = (np.load(place / name).astype(float) for place in (features, whole))
        assert made == pytest.approx(expected_array, abs=1e-3)
    assert (features / "test_video.npy").exists() and metrics(features)["videos"] == 8
    for name in kept:
        assert all(after[f"{name}{end}"] == before[f"{name}{end}"] for end in (".npy", ".noface.npy"))
    assert expected.keys() < after.keys()
    assert "features is finished; nothing to do" in done(folder, *EXTRACT)


def test_a_kill_while_new_videos_are_extracted_leaves_no_old_file_for_a_changed_video(finished, tmp_path):
    folder = copied(finished, tmp_path)
    features, frames = folder / "runs/tiny/features", folder / "data/Aff-Wild2/cropped_aligned"
    changed = sorted(path.name for path in frames.iterdir())[0]
    last = sorted((frames / changed).iterdir())[-1]
    shutil.copy(last, last.with_name("00099.jpg"))
    hook = tiny.stop("extract_features.extract", 1, after=False)
    assert run(folder, *EXTRACT, hook=hook).codes == [-9]
    assert not (features / f"{changed}.npy").exists() and not (features / "metrics.json").exists()
    assert "extracting 8 numbers per frame from 1 of 7 videos" in done(folder, *EXTRACT)
    assert len(np.load(features / f"{changed}.npy")) == 99


def test_a_video_that_was_extracted_may_go_while_another_is_new(finished, tmp_path):
    folder = copied(finished, tmp_path)
    features, frames = folder / "runs/tiny/features", folder / "data/Aff-Wild2/cropped_aligned"
    gone, *_, kept = sorted(path.name for path in frames.iterdir())
    shutil.copytree(frames / kept, frames / "test_video")
    shutil.rmtree(frames / gone)
    hook = tiny.stop("extract_features.extract", 1, after=False)
    assert run(folder, *EXTRACT, hook=hook).codes == [-9]
    done(folder, *EXTRACT)
    assert (features / f"{gone}.npy").exists() and metrics(features)["videos"] == 8


def test_an_extraction_that_was_killed_before_its_first_video_locks_nothing(finished, tmp_path):
    folder, _ = ready(finished, tmp_path, "features")
    hook = tiny.stop("extract_features.extract", 1, after=False)
    other = ["--set", "features.checkpoint=runs/tiny/finetune/last.pt"]
    assert run(folder, *EXTRACT, *other, hook=hook).codes == [-9]
    done(folder, *EXTRACT)


def test_a_machine_that_lacks_a_video_is_refused(finished, tmp_path):
    folder = copied(finished, tmp_path, ["features"])
    codes, said = run(folder, *EXTRACT, world=2, hook=lacks_one)
    assert all(codes)
    assert re.search(r"this machine has other data than the first one:\n"
                     r"  \S+: there {'frames': \d+, .*}, here None\n", said)


def lacks_one():
    def less(video_folders):
        return lambda roots: (dict(list(video_folders(roots)[0].items())[1:]), [])
    if os.environ["RANK"] == "1":
        tiny.instead("extract_features.video_folders", less)


@pytest.mark.parametrize("script", ["extract_features.py", "train_finetune.py"])
def test_where_merged_videos_come_from_is_said(finished, tmp_path, script):
    folder = copied(finished, tmp_path)
    frames = folder / "data/Aff-Wild2/cropped_aligned"
    frames.rename(folder / "away")
    frames.mkdir()
    (folder / "away").rename(frames / "cropped_aligned")
    said = done(folder, script, *TINY)
    assert "  7 video folders in data/Aff-Wild2/cropped_aligned/cropped_aligned" in said
    assert "is finished; nothing to do" in said


# ---- Missing and broken images

def test_a_frame_without_a_face_repeats_the_one_before_it_and_unlabelled_videos_have_features_too(
        finished, tmp_path):
    folder, place = ready(finished, tmp_path, "features")
    frames, video = folder / "data/Aff-Wild2/cropped_aligned", training_video(folder)
    shutil.copytree(frames / video, frames / "test_video")
    images = sorted((frames / "test_video").iterdir())
    last = int(images[-1].stem)
    for path in [*images[:2], images[9], images[10], images[20]]:
        path.unlink()
    spoil(images[11], "truncated")
    done(folder, *EXTRACT)
    features, noface = np.load(place / "test_video.npy"), np.load(place / "test_video.noface.npy")
    rows = [int(path.stem) - 1 for path in images]
    assert len(features) == last and noface[[rows[i] for i in (0, 1, 9, 10, 11, 20)]].all()
    for row in np.flatnonzero(noface):
        source = row - 1 if row > rows[1] else rows[2]
        assert np.array_equal(features[row], features[source])
    assert not np.array_equal(features[rows[8]], features[rows[12]])
    assert np.array_equal(features[~noface], np.load(place / f"{video}.npy")[:last][~noface])
    assert metrics(place)["videos"] == 8


def test_unreadable_images_cost_no_readable_one_of_a_later_batch(finished, tmp_path):
    folder, place = ready(finished, tmp_path, "features")
    video = training_video(folder)
    images = sorted((folder / "data/Aff-Wild2/cropped_aligned" / video).iterdir())
    for path in images[:5]:
        spoil(path, "truncated")
    done(folder, *EXTRACT, "--set", "features.batch=4")
    noface = np.load(place / f"{video}.noface.npy")
    assert not noface[[int(path.stem) - 1 for path in images[5:]]].any()
    assert noface[[int(path.stem) - 1 for path in images[:5]]].all()
