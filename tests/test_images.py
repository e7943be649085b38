"""Images of every kind become RGB or are refused by name; crops stay inside and repeat exactly; normalising
loses nothing. Batches have a file of their own."""

import errno
import io
import os
import runpy
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import images as module
from images import MAX_PIXELS, MEAN, STD, inside, normalise, random_crop, read_image, resize, unnormalise

RESIZE = Image.Image.resize


def encode(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height=40, width=50):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp():
    """Dark at the left, bright at the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))).convert("RGB")


def empty_png(width, height) -> bytes:
    """A PNG of some 60 bytes whose header promises width x height pixels."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)      # 8 bits, RGB
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---- Reading

def test_a_path_and_the_bytes_of_a_file_give_the_same_pixels(tmp_path):
    image = noise()
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encode(image)):
        read = read_image(source)
        assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("content", [
    None, b"", b"not an image at all\n", encode(noise())[:-400], encode(noise(), "JPEG")[:-400],
    encode(noise())[:20], encode(noise(), "WEBP")[:-400]],
    ids=["missing", "empty", "text", "cut PNG", "cut JPEG", "cut header", "cut WEBP"])
def test_a_missing_empty_truncated_or_foreign_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "face.png"
    if content is not None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^image in memory: not a readable image"):
            read_image(content)
    with pytest.raises(ValueError, match="face.png: not a readable image"):
        read_image(path)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_disk_that_fails_is_no_broken_image(monkeypatch, number):
    """A broken image is left out and the training goes on; this one comes back with the disk."""
    def fail(*arguments, **keywords):
        raise OSError(number, os.strerror(number))      # in the middle of a file, the system does not name it
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="face.png"):
        read_image("face.png")


def test_a_disk_that_is_gone_is_no_missing_image(tmp_path):
    with pytest.raises(ValueError, match="face.png: not a readable image"):
        read_image(tmp_path / "face.png")
    with pytest.raises(FileNotFoundError, match="video/face.png"):
        read_image(tmp_path / "video/face.png")


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(tmp_path)


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (MAX_PIXELS // 8 + 1, 8), (1, MAX_PIXELS + 1)])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(empty_png(width, height))
    with pytest.raises(ValueError, match="bomb.png: .* pixels.*at most 64,000,000 .*shrink the image first"):
        read_image(path)


def test_an_image_of_just_the_limit_is_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 40 * 50)
    assert read_image(encode(noise(40, 50))).size == (50, 40)
    with pytest.raises(ValueError, match="51 x 40 pixels, at most 2,000 are read"):
        read_image(encode(noise(40, 51)))


def test_grey_images_become_three_equal_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with_alpha = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (16, 16), 9)])
    for image in (Image.fromarray(grey), with_alpha):
        read = read_image(encode(image))
        assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.stack([grey] * 3, axis=-1))
    bits = read_image(encode(Image.fromarray(grey > 99)))
    assert np.array_equal(np.asarray(bits)[..., 1], np.where(grey > 99, 255, 0))


def test_an_alpha_channel_is_dropped_and_the_colours_stay():
    image = noise()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert np.array_equal(np.asarray(read_image(encode(image))), np.asarray(noise()))


def test_a_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert np.asarray(read_image(encode(image))).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk_ink_becomes_light():
    cyan = read_image(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert cyan.mode == "RGB" and np.abs(np.asarray(cyan).astype(int) - (0, 255, 255)).max() <= 4


def test_sixteen_bit_images_become_rgb():
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    read = read_image(encode(deep))
    assert read.mode == "RGB" and read.size == (16, 16)


def test_sixteen_bit_images_keep_their_shades():
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    assert np.array_equal(np.asarray(read_image(encode(deep)))[..., 0].ravel(), np.arange(256))


# ---- Resizing and cropping

def test_resize_gives_height_by_width_and_leaves_the_right_size_alone():
    assert resize(noise(40, 50), (16, 24)).shape == (16, 24, 3)
    assert resize(noise(40, 50), (16, 24)).dtype == np.uint8
    assert resize(noise(40, 50), (50, 40)).shape == (50, 40, 3)
    assert np.array_equal(resize(noise(40, 50), (40, 50)), np.asarray(noise(40, 50)))


def test_resize_keeps_the_picture_upright():
    small = resize(ramp(), (8, 16)).astype(int)
    assert (np.diff(small[..., 0], axis=1) > 0).all() and np.ptp(small[..., 0], axis=0).max() == 0


def test_the_same_generator_gives_the_same_crop_and_another_gives_another():
    crops = [random_crop(noise(), (16, 16), np.random.default_rng(seed), 0.2) for seed in (1, 1, 2)]
    assert crops[0].shape == (16, 16, 3) and crops[0].dtype == np.uint8
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])


@pytest.fixture
def boxes(monkeypatch):
    """The boxes (left, top, right, bottom) that random_crop has cut out of images."""
    boxes = []

    def watched(image, size, how, box):
        boxes.append(box)
        return RESIZE(image, size, how, box=box)

    monkeypatch.setattr(Image.Image, "resize", watched)
    return boxes


def test_crops_stay_inside_reach_every_border_and_keep_to_their_share_and_shape(monkeypatch):
    boxes, tiny = [], Image.new("RGB", (4, 4))
    monkeypatch.setattr(Image.Image, "resize", lambda image, *_, box: boxes.append(box) or tiny)
    rng, image = np.random.default_rng(0), noise(300, 300)
    for _ in range(2000):
        random_crop(image, (4, 4), rng, 0.2)
    left, top, right, bottom = np.array(boxes).T
    width, height = right - left, bottom - top
    share, aspect = width * height / 300 ** 2, width / height
    assert left.min() == top.min() == 0 and right.max() == bottom.max() == 300
    assert 0.195 < share.min() < 0.22 and 0.95 < share.max() <= 1
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35
    assert abs(share.mean() - 0.59) < 0.02      # below (0.2 + 1) / 2, because crops are clipped to the image


def test_a_crop_of_at_least_everything_is_the_whole_image(boxes):
    image = noise(40, 40)
    for seed in range(20):
        crop = random_crop(image, (40, 40), np.random.default_rng(seed), 1.0)
        assert np.array_equal(crop, image) or np.array_equal(crop[:, ::-1], image)
    assert set(boxes) == {(0, 0, 40, 40)}


def test_a_crop_of_at_least_everything_is_a_square_of_that_area_clipped_to_the_image(boxes):
    for seed in range(20):
        assert random_crop(noise(40, 50), (8, 8), np.random.default_rng(seed), 1.0).shape == (8, 8, 3)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (45, 40)          # sqrt(40 * 50) = 44.7
        assert 0 <= left and right <= 50 and top == 0


def test_a_crop_of_nearly_everything_has_nearly_the_shape_of_a_square(boxes):
    for seed in range(200):
        random_crop(noise(100, 100), (8, 8), np.random.default_rng(seed), 0.81)
    shapes = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.8 < min(shapes) < 0.86 and 1.16 < max(shapes) < 1.25          # 0.81 to 1 / 0.81, clipped


def test_half_of_the_crops_are_mirrored():
    crops = [random_crop(ramp(), (4, 4), np.random.default_rng(seed), 0.5).astype(int)
             for seed in range(400)]
    mirrored = sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in crops)
    assert 160 < mirrored < 240                 # 200 expected, deviation 10


@pytest.mark.parametrize("height, width", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_and_thin_images_are_resized_and_cropped(height, width):
    for seed in range(50):
        assert random_crop(noise(height, width), (8, 6), np.random.default_rng(seed), 0.2).shape == (8, 6, 3)
    assert resize(noise(height, width), (8, 6)).shape == (8, 6, 3)


def test_a_crop_is_the_bicubic_resize_of_its_box(boxes):
    for seed in range(8):
        crop = random_crop(noise(), (12, 9), np.random.default_rng(seed), 0.2)
        plain = np.asarray(RESIZE(noise(), (9, 12), Image.BICUBIC, box=boxes[-1]))
        assert np.array_equal(crop, plain) or np.array_equal(crop, plain[:, ::-1])


def test_the_last_column_and_row_can_be_cropped_alone(boxes):
    for seed in range(60):
        random_crop(noise(1, 2), (2, 2), np.random.default_rng(seed), 0.2)
        random_crop(noise(2, 1), (2, 2), np.random.default_rng(seed), 0.2)
    assert {(0, 0, 1, 1), (1, 0, 2, 1), (0, 1, 1, 2)} <= set(boxes)      # left, top, right, bottom


def test_one_pixel_fills_the_crop_with_its_colour():
    crop = random_crop(Image.new("RGB", (1, 1), (1, 2, 3)), (5, 7), np.random.default_rng(0), 0.2)
    assert (crop == (1, 2, 3)).all() and crop.shape == (5, 7, 3)


# ---- Normalising

def test_normalise_is_the_written_out_formula_for_each_channel():
    images = torch.randint(0, 256, (2, 3, 5, 3), dtype=torch.uint8)                 # (B, H, W, 3)
    out = normalise(images)
    assert out.shape == (2, 3, 3, 5) and out.dtype == torch.float32
    for c in range(3):
        expected = (images[..., c].double() / 255 - MEAN[c]) / STD[c]
        assert torch.allclose(out[:, c], expected.float(), atol=1e-6)


def test_black_and_white_become_the_numbers_that_imagenets_mean_and_deviation_give():
    """Worked out by hand: (0 - 0.485) / 0.229, ..., (1 - 0.406) / 0.225, as in the MAE's checkpoints."""
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    expected = torch.tensor([[-2.11790, -2.03571, -1.80444], [2.24891, 2.42857, 2.64000]])
    assert torch.allclose(normalise(images).flatten(1), expected, atol=1e-5)


def test_unnormalise_takes_every_value_of_a_pixel_back_exactly():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    images[1] = images[1].flip(0)
    back = unnormalise(normalise(images))
    assert back.dtype == np.uint8 and np.array_equal(back, images.numpy())


def test_unnormalise_clips_what_no_pixel_can_hold():
    assert unnormalise(torch.full((1, 3, 1, 1), 99.0)).tolist() == [[[[255] * 3]]]
    assert unnormalise(torch.full((1, 3, 1, 1), -99.0)).tolist() == [[[[0] * 3]]]


# ---- Names that come from a list

@pytest.mark.parametrize("name", ["/etc/passwd", "..", "../a.jpg", "a/../../b.jpg", "a/../b.jpg",
                                  "folder_out/x.jpg", "file_out.jpg", "sibling/x.jpg"])
def test_a_name_that_leaves_its_root_is_refused(tmp_path, name):
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "data2").mkdir()                     # its path begins with the root's own
    (tmp_path / "x.jpg").touch()
    (root / "folder_out").symlink_to(tmp_path)
    (root / "file_out.jpg").symlink_to(tmp_path / "x.jpg")
    (root / "sibling").symlink_to(tmp_path / "data2")
    expected = "leaves its data root .*data; entries must lie inside it"
    with pytest.raises(ValueError, match=expected) as refusal:
        inside(root, name)
    assert repr(name) in str(refusal.value)


def test_an_absolute_name_is_refused_even_if_it_points_into_the_root(tmp_path):
    with pytest.raises(ValueError, match="leaves its data root"):
        inside(tmp_path, str(tmp_path / "a.jpg"))


def test_names_and_links_within_the_root_are_let_through_also_if_the_root_is_a_link(tmp_path):
    root = tmp_path / "data"
    (root / "1").mkdir(parents=True)
    (root / "1/a..b.jpg").touch()
    (root / "link.jpg").symlink_to(root / "1/a..b.jpg")
    (tmp_path / "alias").symlink_to(root)
    for base in (root, tmp_path / "alias", str(root)):
        for name in ("1/a..b.jpg", "link.jpg", "not/there.jpg"):
            assert inside(base, name) == type(root)(base) / name


# ---- The script

def test_the_script_describes_what_it_reads_and_refuses_the_rest_with_code_2(monkeypatch, capsys, tmp_path):
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["images.py", "nowhere.jpg", "a.png", "no/folder.jpg"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(module.__file__, run_name="__main__")
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == "a.png: 5 x 4, mean colour [1. 2. 3.]\n"
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["refused", "refused"]
    assert "nowhere.jpg" in shown.err and "no/folder.jpg" in shown.err


def test_the_script_alone_shows_the_range_of_the_numbers(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["images.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(module.__file__, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "black becomes [-2.118 -2.036 -1.804] (red, green, blue)",
        "white becomes [2.249 2.429 2.64 ] (red, green, blue)"]
