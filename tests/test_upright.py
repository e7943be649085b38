"""Photographs that lie on their side, as phones store them, are read upright. Their EXIF block says which way
up is; a broken one changes nothing."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

import images
from images import read_image

ORIENTATION = 0x0112                      # the tag's number
UPRIGHT = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
          5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT.T, 2), 8: np.rot90(UPRIGHT, -1)}


def encode(pixels, kind, exif) -> bytes:
    file, quality = io.BytesIO(), {"quality": 100} if kind == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, exif=exif, **quality)
    return file.getvalue()


def exif(orientation) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_read_upright_whichever_way_it_is_stored(kind, orientation):
    read = read_image(encode(STORED[orientation], kind, exif(orientation)))
    assert read.mode == "RGB" and read.size == (6, 4)
    assert np.abs(np.asarray(read)[..., 0].astype(int) - UPRIGHT).max() <= (3 if kind == "JPEG" else 0)


def test_a_16_bit_image_is_turned_too():
    read = read_image(encode(STORED[6].astype(np.uint16) * 257, "PNG", exif(6)))
    assert np.array_equal(np.asarray(read)[..., 0], UPRIGHT)


def test_a_tag_of_a_wrong_type_does_not_end_the_run():
    """The camera's name as a fraction, at which Pillow fails after it has turned the picture."""
    tags = struct.pack("<HHHIIHHIHHIII", 2, 271, 5, 1, 38, 274, 3, 1, 6, 0, 0, 1, 3)
    content = encode(STORED[6], "JPEG", b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags)
    assert np.abs(np.asarray(read_image(content))[..., 0].astype(int) - UPRIGHT).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\0\0no tags", b"MM\0*\0\0\0\x08\0", b"\xff" * 40, exif(9).tobytes(),
                                   exif(0).tobytes()])
def test_a_broken_exif_block_does_not_spoil_a_whole_picture(block):
    assert np.array_equal(np.asarray(read_image(encode(UPRIGHT, "PNG", block)))[..., 0], UPRIGHT)


def test_the_size_is_checked_before_a_photograph_is_decoded_to_be_turned(monkeypatch):
    content, decoded = encode(STORED[6], "JPEG", exif(6)), []
    monkeypatch.setattr(images, "MAX_PIXELS", 23)
    monkeypatch.setattr(images, "turn_upright", decoded.append)
    with pytest.raises(ValueError, match="4 x 6 pixels, at most 23 are read"):
        read_image(content)
    assert not decoded


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.jfif", "a.PNG", "a.bmp", "a.webp", "a.tif", "a.TIFF",
                                  "a.gif"])
def test_a_search_finds_every_kind_of_file_that_can_be_decoded(tmp_path, name):
    kind = Image.registered_extensions()[name[1:].lower()]
    Image.new("L", (5, 4), 7).save(tmp_path / name, kind)
    (tmp_path / "notes.txt").touch()
    skipped = images.Counter()
    found, = images.find_images(tmp_path, skipped)
    assert found.decode() == name and read_image(tmp_path / name).size == (5, 4)
    assert skipped == {"not an image file": 1}
