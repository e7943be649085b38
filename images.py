"""Face images: decoded safely, cropped, normalised for the ViT; image files in folders; the frames of videos.

Every stage reads pixels through this file: the same colours (RGB), the same resize filter (bicubic), the same
normalisation (ImageNet's mean and deviation, as in MAE). Images stay uint8 until they are on the device: a
batch crosses to the GPU at a quarter of the size of float32. `data.Images` makes the batches.

A video is a folder of frames, image files named by their number, counted from 1: 00001.jpg in Aff-Wild2, but
other copies have other extensions and another number of zeros.
"""

import errno
import functools
import os
import re
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL import TiffImagePlugin as TIFF

MEAN = (0.485, 0.456, 0.406)   # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64_000_000        # 8,000 x 8,000: above it a file is a mistake or a decompression bomb
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")   # by content, whatever the name says
# The error numbers of Pillow's own complaints, and of the system's when there is no such file.
NO_IMAGE = (None, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Of the files that a search for images finds, in capitals or not.
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FRAME = re.compile(r"0*([0-9]{1,7})(%s)" % "|".join(map(re.escape, EXTENSIONS)), re.IGNORECASE)
DEEPEST = 3                    # levels of folders between a root and its videos, at most
Image.MAX_IMAGE_PIXELS = None  # the limit above is checked here, with a message that names the file


def read_image(path) -> Image.Image:
    """Decode one image as RGB, turned upright as its EXIF orientation says.

    The size is read from the header and checked before any pixel is decoded. Grey values are scaled by their
    own range. Raises ValueError naming the file if it is missing, empty, truncated, no image, larger than
    MAX_PIXELS, of grey values without a known range, or as `with_face` says; OSError if the disk fails or is
    gone: a run that left such images out would train on what happens to be reachable.
    """
    name = os.fsdecode(path)
    try:
        # Not by its path: Pillow 13 would map a TIFF that lies on its side to memory with swapped sides.
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,}; "
                                 "shrink it first")
            image.load()
            with suppress(Exception):           # a broken EXIF block can raise anything; the pixels are whole
                ImageOps.exif_transpose(image, in_place=True)
            tags = getattr(image, "tag_v2", {})                      # of a TIFF
            if image.mode in ("I", "F") or tags.get(TIFF.SAMPLEFORMAT) == (2,):        # 2: with a sign
                raise ValueError(f"grey values of mode {image.mode} have no known range; convert to 8 bits "
                                 "without a sign")
            if image.mode.startswith("I;16"):   # 12 or 16 bits: Pillow would clip them at 255
                grey = (np.asarray(image) >> tags.get(TIFF.BITSPERSAMPLE, (16,))[0] - 8).astype(np.uint8)
                white_is_zero = tags.get(TIFF.PHOTOMETRIC_INTERPRETATION) == 0
                image = Image.fromarray(255 - grey if white_is_zero else grey)
            image = image.convert("RGB")
    except (OSError, SyntaxError, EOFError, ValueError, TypeError) as error:   # Pillow's, for no image
        folder_gone = isinstance(error, FileNotFoundError) and not os.path.isdir(os.path.dirname(name) or ".")
        if folder_gone or getattr(error, "errno", None) not in NO_IMAGE:
            raise OSError(error.errno, error.strerror, name) from None
        raise ValueError(f"{name}: not a readable image ({error})") from None
    return with_face(image, name)


def with_face(image: Image.Image, name: str) -> Image.Image:
    """The RGB image. Raises ValueError naming it if it has one single colour, as where a tracker failed."""
    if all(darkest == brightest for darkest, brightest in image.getextrema()):
        raise ValueError(f"{name}: one single colour; no face")
    return image


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The whole image at `size` = (height, width), as uint8 (height, width, 3)."""
    return np.asarray(image.resize((size[1], size[0]), Image.BICUBIC))


def random_crop(image, size: tuple[int, int], rng: np.random.Generator, smallest: float) -> np.ndarray:
    """Random resized crop and horizontal flip (§3.1; MAE's augmentation), as uint8 (height, width, 3).

    The crop covers a share of the image's area drawn from [smallest, 1], at an aspect ratio drawn from
    [3/4, 4/3], or from [smallest, 1 / smallest] where that is narrower, and is clipped to the image. With
    smallest = 1 a square image is taken whole. All randomness is in `rng`: one (seed, epoch, index) gives
    one crop, in any process.
    """
    width, height = image.size
    area = width * height * rng.uniform(smallest, 1.0)
    widest = abs(np.log(max(3 / 4, smallest)))                          # of the logarithm of the aspect ratio
    aspect = np.exp(rng.uniform(-widest, widest))
    w = int(np.clip(round(np.sqrt(area * aspect)), 1, width))
    h = int(np.clip(round(np.sqrt(area / aspect)), 1, height))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    box = (left, top, left + w, top + h)
    pixels = np.asarray(image.resize((size[1], size[0]), Image.BICUBIC, box=box))
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


@functools.cache
def _mean_and_std(device):
    """(1, 3, 1, 1) each. Kept: making them anew in each step would make the CPU wait for the GPU."""
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)                  # (3,) -> (1, 3, 1, 1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with ImageNet's mean and deviation, on the same device."""
    mean, std = _mean_and_std(images.device)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std   # (B, H, W, 3) -> (B, 3, H, W)


def unnormalise(images: torch.Tensor) -> np.ndarray:
    """The way back, for pictures: float (B, 3, H, W) -> uint8 (B, H, W, 3), clipped to a pixel's range."""
    mean, std = _mean_and_std(images.device)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).byte().cpu().numpy()           # (B, 3, H, W) -> (B, H, W, 3)


# ---- Image files in folders

def leads_out(path, real_root: str) -> bool:
    """Does this path, its links followed, end outside of the root?"""
    return not Path(os.path.realpath(path)).is_relative_to(real_root)


def find_images(root: Path, skipped: Counter, below: str = "") -> list[bytes]:
    """All image files below root/below, as paths relative to root, sorted: one order on every machine.

    What is left out is counted in `skipped`, by its reason.
    """
    found, folders, real_root = [], [below], os.path.realpath(root)
    while folders:
        folder = folders.pop()
        for entry in os.scandir(root / folder):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):                           # ._face.jpg, .ipynb_checkpoints
                skipped["hidden"] += 1
            elif entry.is_symlink() and leads_out(entry.path, real_root):
                skipped["link out of the folder"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped["not an image file"] += 1
            elif entry.is_symlink() and not os.path.isfile(entry.path):
                skipped["link to no file"] += 1
            else:
                found.append(os.fsencode(path))
    return sorted(found)


def sizes(paths) -> str:
    """A checksum of the sizes of some files: other images of the same names have another."""
    found = [os.stat(path).st_size if os.path.exists(path) else "gone" for path in paths]
    return f"{zlib.crc32(''.join(f'{size} ' for size in found).encode()):08x}"


def listed(counts: Counter, most: int = 12) -> str:
    """What was counted, in one line, the most frequent first: "3 hidden, 1 link to no file"."""
    text = ", ".join(f"{count:,} {what}" for what, count in counts.most_common(most))
    return text + f", {len(counts) - most} more" * (len(counts) > most) or "nothing"


# ---- The frames of a video

class FrameFiles(NamedTuple):
    """How the files of a video's frames are called. Nearly always all alike, so that the names of millions of
    frames take no memory."""
    folder: str
    width: int                     # digits, filled up with zeros: 5 in 00001.jpg
    extension: str                 # .jpg
    others: dict[int, str]         # number -> name, where it is called otherwise

    def path(self, number: int) -> str:
        name = self.others.get(int(number)) or f"{number:0{self.width}d}{self.extension}"
        return os.path.join(self.folder, name)


def frame_number(name: str) -> int:
    """00001.jpg is 1. 0: this is not the name of a frame."""
    match = FRAME.fullmatch(name)
    return int(match[1]) if match else 0


def list_frames(folder) -> tuple[np.ndarray, FrameFiles, Counter]:
    """The numbers of the frames in a folder, sorted; how their files are called; what else lies there, as
    {kind: how many}. Lists the folder once and opens no image.

    Raises ValueError if two files are the same frame, as 00001.jpg and 1.png.
    """
    names, beside = {}, Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            number = frame_number(entry.name)
            if number == 0:
                beside["hidden" if entry.name.startswith(".") else "folders" if entry.is_dir()
                       else "with number 0" if FRAME.fullmatch(entry.name)
                       else os.path.splitext(entry.name)[1].lower() or "without extension"] += 1
            elif number in names:
                first, second = sorted((names[number], entry.name))
                raise ValueError(f"{folder}: {first} and {second} are both frame {number}; remove one")
            else:
                names[number] = entry.name
    numbers = np.array(sorted(names), dtype=np.int64)
    stem, extension = os.path.splitext(names[numbers[0]]) if names else ("00001", ".jpg")
    width = len(stem)
    others = {number: name for number, name in names.items() if name != f"{number:0{width}d}{extension}"}
    return numbers, FrameFiles(str(folder), width, extension, others), beside


def has_frames(folder) -> bool:
    """Is there a frame? Looks no further than the first, where `list_frames` reads all names."""
    with os.scandir(folder) as entries:
        return any(frame_number(entry.name) for entry in entries)


def below(root: Path, depth: int = 0):
    """Yield the folder of each video below the root. A folder that holds folders but no frames is entered."""
    with os.scandir(root) as entries:
        folders = sorted(root / entry.name for entry in entries
                         if not entry.name.startswith(".") and entry.is_dir())
    for folder in folders:
        inner = [] if depth == DEEPEST or has_frames(folder) else list(below(folder, depth + 1))
        yield from inner or [folder]


def video_folders(roots) -> tuple[dict[str, Path], list[str]]:
    """{video: folder of its frames}, sorted, over several roots, and lines about what was passed over.
    Folders of folders are entered, such as a nested cropped_aligned, so a root may be the folder above two.

    A video that is in two roots is taken from the first that has frames of it. Raises ValueError for a root
    that is missing, for a video that is twice below one root, and when no video is found.
    """
    videos, lines = {}, []
    for root in map(Path, roots):
        if not root.is_dir():
            raise ValueError(f"data.frames: {root} is no folder; "
                             "expected one that holds a folder of face crops per video")
        found: dict[str, Path] = {}
        for folder in below(root):
            known = found.setdefault(folder.name, folder)
            if known != folder and has_frames(folder):
                if has_frames(known):
                    raise ValueError(f"data.frames: {known} and {folder} are frames of one video; remove "
                                     "one, or give the folders above them as two roots, the better one first")
                found[folder.name] = folder
        if has_frames(root):
            lines.append(f"  frames that lie in {root} itself, not in a folder of their video, are not read")
        twice = {video for video in found if video in videos and has_frames(videos[video])}
        videos.update((video, folder) for video, folder in found.items() if video not in twice)
        if twice:
            lines.append(f"  {len(twice)} videos of {root} are in an earlier folder of data.frames too, "
                         "and taken from there")
    if not videos:
        raise ValueError(f"data.frames: no video folders in {list(map(str, roots)) or 'an empty list'}; "
                         "expected <video>/00001.jpg below it")
    return dict(sorted(videos.items())), lines


def find_videos(roots) -> dict[str, Path]:
    """`video_folders` without its lines."""
    return video_folders(roots)[0]
