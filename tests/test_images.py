"""Images of every kind become upright RGB or are refused by name; crops stay inside and repeat exactly;
normalising loses nothing; nothing outside of a root is read."""

import errno
import io
import itertools
import math
import os
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import images
from images import find_images, listed, normalise, random_crop, read_image, resize, sizes, unnormalise

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = GREY.astype("<u2") * 257                                              # the same in 16 bits, and in 12
TWELVE = np.array([(a * 16 << 12 | b * 16).to_bytes(3) for a, b in GREY.reshape(-1, 2).tolist()])
UPRIGHT = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
# How a camera stores UPRIGHT, by its EXIF orientation.
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
          5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT.T, 2), 8: np.rot90(UPRIGHT, -1)}


def noise(height=40, width=50):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def stored(tmp_path):
    """stored(image, array or bytes, kind): it is written to a file. -> the path"""
    def store(image, kind="PNG", **options):
        if isinstance(image, bytes):
            (tmp_path / "face.png").write_bytes(image)
        else:
            image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
            image.save(tmp_path / "face.png", kind, **options)
        return tmp_path / "face.png"
    return store


def read(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---- Reading

@pytest.mark.parametrize("kind, cut", [("PNG", 0), ("PNG", -400), ("JPEG", -400), ("WEBP", -400)])
def test_what_is_empty_or_cut_short_is_refused_by_name(stored, kind, cut):
    path = stored(noise(), kind)
    path.write_bytes(path.read_bytes()[:cut])
    for given in (path, str(path), os.fsencode(path)):
        with pytest.raises(ValueError, match="face.png: not a readable image"):
            read_image(given)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_disk_that_fails_is_no_broken_image(stored, monkeypatch, number):
    """A broken image is left out and the training goes on; this one comes back with the disk."""
    def fail(*arguments, **keywords):
        raise OSError(number, os.strerror(number))      # in the middle of a file, the system does not name it
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="face.png") as error:
        read_image(stored(noise()))
    assert error.value.errno == number


def test_a_missing_image_is_refused_by_name_and_a_folder_that_is_gone_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="video/face.png"):
        read_image("video/face.png")
    (tmp_path / "video").mkdir()
    for name in ("face.png", "video"):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            read_image(name)


def test_a_decompression_bomb_is_refused_from_its_header(stored, monkeypatch):
    path, width, height = stored(noise()), images.MAX_PIXELS // 8 + 1, 8
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=f"face.png: .*{width} x {height} pixels, at most 64,000,000; "):
        read_image(path)


def tiff(pixels, bits, sign=1, white=255):
    """A grey TIFF of 16 x 16 pixels. sign: 1 unsigned, 2 signed, 3 floats; white: the largest or 0."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: int(white > 0), 273: 122, 278: 16, 279: pixels.nbytes,
            339: sign}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + bytes(4) + pixels.tobytes()


def png(channels):
    """A PNG of 16 x 16 pixels, 16 bits a channel: 1 grey, 2 with alpha, 3 colours, each WIDE."""
    rows = np.insert(WIDE.repeat(channels, axis=1).astype(">u2").view("u1"), 0, 0, axis=1)
    file, header = io.BytesIO(), struct.pack(">IIBBBBB", 16, 16, 16, (0, 4, 2)[channels - 1], 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        PngImagePlugin.putchunk(file, kind, data)
    return b"\x89PNG\r\n\x1a\n" + file.getvalue()


@pytest.mark.parametrize("image, expected", [
    (Image.fromarray(GREY), GREY), (Image.fromarray(GREY > 99), 255 * (GREY > 99)),
    (Image.merge("RGBA", [*noise().split(), Image.new("L", (50, 40), 9)]), noise()),
    (Image.merge("LA", [Image.fromarray(GREY)] * 2), GREY), (png(1), GREY), (png(2), GREY), (png(3), GREY),
    (Image.merge("CMYK", [Image.fromarray(GREY), *[Image.new("L", (16, 16))] * 3]),
     np.dstack([255 - GREY, 0 * GREY + 255, 0 * GREY + 255])),
    (tiff(np.packbits(GREY > 99), 1, white=0), 255 * (GREY <= 99)), (tiff(TWELVE, 12), GREY),
    (tiff(GREY, 8), GREY), (tiff(GREY, 8, white=0), 255 - GREY), (tiff(GREY, 8, 2), "mode L"),
    (tiff(WIDE, 16), GREY), (tiff(WIDE, 16, white=0), 255 - GREY), (tiff(WIDE, 16, 2), "mode I"),
    (tiff(WIDE, 16, 3), "cannot identify"), (tiff(WIDE.astype("<f4"), 32, 3), "mode F"),
    (tiff(WIDE.astype("<u4"), 32), "grey values of mode I have no known range; convert to 8 bits without"),
    (tiff(WIDE.astype("<i4"), 32, 2), "mode I"),
    (Image.new("RGB", (9, 9), (1, 2, 3)), "face.png: one single colour; no face")])
def test_every_kind_of_pixel_becomes_rgb_by_its_range_or_is_refused(stored, monkeypatch, image, expected):
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 50)                       # as many as the largest has
    kind = "JPEG" if getattr(image, "mode", "") == "CMYK" else "PNG"
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(stored(image))
    else:
        expected = np.asarray(expected).reshape(-1, 1 if np.size(expected) == 256 else 3)
        assert np.abs(read(stored(image, kind)).reshape(-1, 3) - expected).max() <= 4 * (kind == "JPEG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_read_upright_whichever_way_it_is_stored(stored, kind, orientation):
    block, quality = Image.Exif(), {"quality": 100} if kind == "JPEG" else {}
    block[0x0112] = orientation
    path = stored(STORED[orientation], kind, exif=block, **quality)
    assert np.abs(read(path)[..., 0] - UPRIGHT).max() <= (3 if kind == "JPEG" else 0)
    if kind == "PNG":                                                        # 16 bits are turned too
        path = stored(STORED[orientation].astype(np.uint16) * 257, exif=block)
        assert np.array_equal(read(path)[..., 1], UPRIGHT)


# The camera's name as a fraction, at which Pillow fails after it has turned the picture.
WRONG_TYPE = struct.pack("<IHHHIIHHIHHIII", 8, 2, 271, 5, 1, 38, 274, 3, 1, 6, 0, 0, 1, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block, pixels", [
    (b"MM\0*\0\0\0\x08\0", UPRIGHT), (b"Exif\0\0II*\0" + WRONG_TYPE, STORED[6])])
def test_a_broken_exif_block_does_not_spoil_a_whole_picture(stored, block, pixels):
    assert np.array_equal(read(stored(pixels, exif=block))[..., 0], UPRIGHT)


# ---- Resizing and cropping

def test_resize_gives_height_by_width_by_pillows_bicubic_filter():
    expected = np.asarray(noise(40, 50).resize((24, 16), Image.BICUBIC))
    assert np.array_equal(resize(noise(40, 50), (16, 24)), expected) and expected.shape == (16, 24, 3)


def plain_crop(image, height, width, rng, smallest) -> np.ndarray:
    """A random crop, one number after the other."""
    area = rng.uniform(smallest, 1) * image.width * image.height
    bound = math.log(4 / 3) if smallest < 3 / 4 else -math.log(smallest)
    aspect = math.exp(rng.uniform(-abs(bound), abs(bound)))                          # width / height
    w = min(max(round(math.sqrt(area * aspect)), 1), image.width)
    h = min(max(round(math.sqrt(area / aspect)), 1), image.height)
    left = rng.integers(0, image.width - w, endpoint=True)
    top = rng.integers(0, image.height - h, endpoint=True)
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC, (left, top, left + w, top + h)))
    return np.fliplr(pixels) if rng.uniform() < 1 / 2 else pixels


@pytest.mark.parametrize("height, width", [(40, 40), (40, 50), (1, 1), (1, 300), (300, 1), (2, 3), (1, 2)])
def test_a_crop_is_the_one_that_its_generator_says_also_of_tiny_and_thin_images(height, width):
    image = noise(height, width)
    for smallest, seed in itertools.product((0.2, 0.81, 1.0), range(60)):
        crop = random_crop(image, (8, 6), np.random.default_rng(seed), smallest)
        expected = plain_crop(image, 8, 6, np.random.default_rng(seed), smallest)
        assert np.array_equal(crop, expected) and crop.dtype == np.uint8


# ---- Normalising

def test_normalise_takes_black_and_white_to_the_numbers_of_mae_channel_by_channel():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 5, 3)       # (B, H, W, 3)
    out = normalise(ends)
    assert out.shape == (2, 3, 4, 5) and out.dtype == torch.float32
    by_hand = torch.tensor([[-2.11790, -2.03571, -1.80444], [2.24891, 2.42857, 2.64000]])
    assert torch.allclose(out, by_hand[..., None, None], atol=1e-5)


def test_unnormalise_takes_every_value_of_a_pixel_back_exactly_and_clips_what_no_pixel_can_hold():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    pixels[1] = pixels[1].flip(0)
    back = unnormalise(normalise(pixels))
    assert back.dtype == np.uint8 and np.array_equal(back, pixels.numpy())
    for far, clipped in ((99.0, 255), (-99.0, 0)):
        assert unnormalise(torch.full((1, 3, 1, 1), far)).tolist() == [[[[clipped] * 3]]]


# ---- Image files in folders

def test_a_search_finds_every_image_in_one_order_and_counts_what_it_leaves_out(tmp_path, monkeypatch):
    root, kinds = tmp_path / "faces", Image.registered_extensions()
    found = [b"a.JPEG", b"a.PNG", b"a.jfif", b"a.jpg", b"b/a.bmp", b"b/a.gif", b"b/a.webp", b"b/c/a.TIFF",
             b"b/c/a.tif", b"within.jpg"]
    for folder in ("faces/b/c", "faces/.cache", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    for name in map(os.fsdecode, [*found[:-1], b"../outside/private.jpg"]):
        Image.fromarray(UPRIGHT).save(root / name, kinds[os.path.splitext(name)[1].lower()])
    for name in ("b/notes.txt", "jpg", "._a.jpg", "b/.hidden.png", ".cache/a.jpg"):
        (root / name).touch()
    for link, target in {"within.jpg": "a.jpg", "out.jpg": "../outside/private.jpg", "folder": "../outside",
                         "loop.jpg": "loop.jpg", "gone.jpg": "nothing.jpg", "to_folder.jpg": "b"}.items():
        (root / link).symlink_to(root / target)
    skipped, scandir = Counter(), os.scandir
    assert find_images(root, skipped) == found and find_images(root, Counter(), "b/c") == found[7:9]
    assert skipped == {"link out of the folder (copy with cp -rL, or give the folder it leads to)": 2,
                       "hidden": 3, "link to no file": 3, "not an image file (.txt)": 1,
                       "not an image file (without extension)": 1}
    assert all(read_image(os.path.join(os.fsencode(root), name)).size == (6, 4) for name in found)
    monkeypatch.setattr(os, "scandir", lambda path: sorted(scandir(path), key=lambda entry: entry.name)[::-1])
    assert find_images(root, Counter()) == found


def test_files_are_told_by_a_checksum_of_their_sizes_and_counts_are_listed_the_most_frequent_first(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    paths[0].write_bytes(b"1")
    paths[1].write_bytes(b"12")
    assert sizes(paths) == sizes(map(str, paths)) == f"{zlib.crc32(b'1 2 gone '):08x}"
    counts = Counter(a=1, b=2000, c=3)
    assert listed(counts) == "2,000 b, 3 c, 1 a" and listed(counts, 2) == "2,000 b, 3 c, 1 more"
    assert listed(counts, 3) == listed(counts) and listed(Counter()) == "nothing"
