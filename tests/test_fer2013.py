"""FER2013 and FER+ against tiny files in the real layout: labels, rows, refusals, and what worker processes
need."""

import pickle
import tracemalloc

import numpy as np
import pytest
from test_faces import level, make_fer2013, settings, write
from torch.utils.data import DataLoader, Dataset

from faces import load_faces
from fer2013 import FER2013_COUNTS, fer2013
from labels import EXPRESSIONS

FERPLUS_HEADER = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
FLAT = " ".join(["7"] * 2304)


def make_ferplus(folder, rows=9):
    """A vote for each of seven classes; then a row that is no face, and a tie."""
    votes = [[8 if column == chosen else 0 for column in range(9)] + [2] for chosen in range(7)]
    votes += [[0] * 9 + [10], [5, 5, 0, 0, 0, 0, 0, 0, 0, 0]]
    usages = ["Training"] * 7 + ["PublicTest", "PrivateTest"]
    names = [f"fer{i:07d}.png" for i in range(7)] + ["", "fer0000008.png"]
    lines = [",".join([usage, name, *map(str, vote)]) for usage, name, vote in zip(usages, names, votes)]
    return write(folder / "fer2013new.csv", FERPLUS_HEADER, *lines[:rows])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_fer2013_maps_each_code_and_reads_each_row(tmp_path, end):
    found = fer2013(make_fer2013(tmp_path, end=end))
    assert [EXPRESSIONS[label] for label in found.labels] == [
        "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Neutral", "Anger", "Disgust"]
    assert found.training.tolist() == [True] * 7 + [False] * 2
    assert [level(found.read(i)) for i in range(9)] == [10 * i for i in range(9)]
    assert found.rows[0].tolist() == [len("emotion,pixels,Usage" + end), 2]         # offset in bytes, line
    assert found.read(0).size == (48, 48) and found.where(8).endswith("fer2013.csv line 10")
    assert len(fer2013(tmp_path)) == 9 and not found.skipped     # the folder will do as well as the file


def test_fer2013_pixels_run_from_left_to_right_and_then_down(tmp_path):
    pixels = np.arange(2304) % 251
    row = " ".join(map(str, pixels))
    path = write(tmp_path / "fer2013.csv", "emotion,pixels,Usage", f'0,"{row}",Training')
    assert np.array_equal(np.asarray(fer2013(path).read(0))[..., 0], pixels.reshape(48, 48))


def test_ferplus_gives_the_labels_and_counts_each_image_once(tmp_path):
    make_fer2013(tmp_path)
    make_ferplus(tmp_path)
    found, = load_faces(settings(fer2013=tmp_path, ferplus=tmp_path))
    assert [EXPRESSIONS[label] for label in found.labels[:7]] == [
        "Neutral", "Happiness", "Surprise", "Sadness", "Anger", "Disgust", "Fear"]
    assert found.labels[7] == -1 and len(found) == 8     # the tie is kept without a label, "no face" left out
    assert found.skipped == {"not a face": 1}
    assert level(found.read(7)) == 80 and found.where(7).endswith("line 10")
    assert found.training.tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("votes, label", [
    ("0,0,0,0,0,0,0,6,2,2", 7), ("1,1,0,0,0,0,0,0,8,0", -1), ("4,0,0,0,0,0,0,0,0,6", -1),
    ("0,0,0,0,0,0,0,0,0,0", -1), ("3,3,0,0,4,0,0,0,0,0", 1), ("4,0,0,0,0,0,4,2,0,0", -1)])
def test_the_class_with_most_votes_wins_and_contempt_is_other(tmp_path, votes, label):
    write(tmp_path / "fer2013.csv", "emotion,pixels,Usage", f"3,{FLAT},Training")
    write(tmp_path / "fer2013new.csv", FERPLUS_HEADER, f"Training,fer0.png,{votes}")
    assert fer2013(tmp_path, tmp_path).labels.tolist() == [label]


def test_ferplus_alone_is_refused_because_it_holds_no_images(tmp_path):
    with pytest.raises(ValueError, match="data.ferplus: .* no images of its own; set data.fer2013 too"):
        load_faces(settings(ferplus=make_ferplus(tmp_path)))


def test_ferplus_of_another_length_or_order_is_refused(tmp_path):
    make_fer2013(tmp_path)
    make_ferplus(tmp_path, rows=8)
    with pytest.raises(ValueError, match=r"fer2013new.csv has 8 rows, .*fer2013.csv has 9"):
        fer2013(tmp_path, tmp_path)
    path = make_ferplus(tmp_path)
    lines = path.read_text().splitlines()
    write(path, *lines, lines[-1])
    with pytest.raises(ValueError, match="has 10 rows, .* has 9"):
        fer2013(tmp_path, tmp_path)
    write(path, lines[0], *reversed(lines[1:]))
    expected = "line 2: got the Usage 'PrivateTest', but the same row of .* has 'Training'"
    with pytest.raises(ValueError, match=expected):
        fer2013(tmp_path, tmp_path)


@pytest.mark.parametrize("row, message", [
    (f"x,{FLAT},Training", "line 2: got 'x', expected a whole number from 0 to 6"),
    (f"7,{FLAT},Training", "line 2: got '7', expected a whole number from 0 to 6"),
    (f"0,{FLAT}", "line 2: got 2 fields, expected 3"),
    (f"0,{FLAT},Training,1", "line 2: got 4 fields, expected 3"),
    (f"0,{FLAT[2:]},Training", "line 2: got 2303 pixels, expected 2,304"),
    (f"0,{FLAT},Test", "line 2: got the Usage 'Test', expected one of Training, PublicTest, PrivateTest"),
])
def test_a_broken_row_of_fer2013_is_refused_when_it_is_indexed(tmp_path, row, message):
    with pytest.raises(ValueError, match="fer2013.csv " + message):
        fer2013(write(tmp_path / "fer2013.csv", "emotion,pixels,Usage", row))
    with pytest.raises(ValueError, match="fer2013.csv line 1: got the header"):
        fer2013(write(tmp_path / "fer2013.csv", row))


@pytest.mark.parametrize("first", ["256", "-1", "x", "1.5", ""])
def test_a_broken_pixel_is_refused_when_it_is_read(tmp_path, first):
    rows = f"0,{FLAT},Training", f"0,7 {first} {FLAT[4:]},Training"
    path = write(tmp_path / "fer2013.csv", "emotion,pixels,Usage", *rows)
    found = fer2013(path)
    assert level(found.read(0)) == 7
    with pytest.raises(ValueError, match="fer2013.csv line 3: expected 2,304 whole numbers from 0 to 255"):
        found.read(1)


def test_a_fer2013_that_is_gone_is_no_broken_row(tmp_path):
    """A row that cannot be read is left out; without the file all would be, and training would go on."""
    path = make_fer2013(tmp_path)
    found = fer2013(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="fer2013.csv"):
        found.read(0)


def test_indexing_5000_rows_keeps_no_pixels_in_memory(tmp_path):
    path = tmp_path / "fer2013.csv"
    with open(path, "w") as file:
        file.write("emotion,pixels,Usage\n")
        file.writelines([f"3,{FLAT},Training\n"] * 5000)
    size = path.stat().st_size
    tracemalloc.start()
    found = fer2013(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 5000 and level(found.read(4999)) == 7
    path.unlink()
    assert size > 22e6 and peak < 2.5e6 and kept < 0.25e6        # bytes


class Levels(Dataset):
    def __init__(self, found):
        self.found = found

    def __len__(self):
        return len(self.found)

    def __getitem__(self, i):
        return level(self.found.read(i))


def test_fer2013_is_read_by_a_forked_worker_process_after_the_parent_has_read(tmp_path):
    make_fer2013(tmp_path)
    found = fer2013(tmp_path)
    assert level(found.read(3)) == 30
    loader = DataLoader(Levels(found), batch_size=9, num_workers=1, multiprocessing_context="fork")
    assert next(iter(loader)).tolist() == [10 * i for i in range(9)]


def test_fer2013_is_read_from_a_pickle_which_is_what_a_spawned_worker_process_gets(tmp_path):
    make_fer2013(tmp_path)
    found = fer2013(tmp_path)
    assert level(found.read(3)) == 30
    copy = pickle.loads(pickle.dumps(found))
    assert [level(copy.read(i)) for i in range(9)] == [10 * i for i in range(9)]
    assert (copy.labels == found.labels).all() and copy.where(8) == found.where(8)


def test_a_missing_ferplus_is_reported_under_its_setting(tmp_path):
    make_fer2013(tmp_path)
    expected = "data.ferplus: looked for .*fer2013new.csv, which is not there; give fer2013new.csv"
    with pytest.raises(ValueError, match=expected):
        load_faces(settings(fer2013=tmp_path, ferplus=tmp_path))


def test_a_complete_fer2013_has_35887_rows():
    assert sum(FER2013_COUNTS.values()) == 35_887
