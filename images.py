"""One face image: decoded safely, cropped, and turned into the numbers the encoder wants.

Every stage reads pixels through this file, so that pre-training, fine-tuning and feature extraction see the same
colours (RGB), the same resize filter (bicubic) and the same normalisation (ImageNet's mean and deviation, as in MAE).
Images stay uint8 until they are on the device: a batch crosses to the GPU at a quarter of the size of float32.

    python images.py FILE ...      # size and mean colour of each file, or why it is refused
"""

import errno
import functools
import io
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MEAN = (0.485, 0.456, 0.406)   # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64_000_000        # 8,000 x 8,000: above it a file is a mistake or a decompression bomb
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")    # by content, whatever the name says; Pillow knows 40 more
# Pillow's own complaints, and the system's when there is no such file.
NO_IMAGE = (None, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

Image.MAX_IMAGE_PIXELS = None  # the limit above is checked here, with a message that names the file


def read_image(source) -> Image.Image:
    """Decode one image as RGB.

    `source` is a path, or the bytes of a file. The size is read from the header and checked before any pixel is decoded.
    Raises ValueError naming the file if it is missing, empty, truncated, no image, or larger than MAX_PIXELS; OSError if the
    disk fails or is gone: a run that left such images out would train on what happens to be reachable.
    """
    name = "image in memory" if isinstance(source, bytes) else os.fsdecode(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                if image.mode.startswith("I;16"):       # 16-bit grey: Pillow would clip it at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
    except (OSError, SyntaxError, EOFError, ValueError, TypeError) as error:     # what Pillow raises for files that are none
        gone = isinstance(error, FileNotFoundError) and not os.path.isdir(os.path.dirname(name) or ".")       # with its folder
        if gone or getattr(error, "errno", None) not in NO_IMAGE:
            raise OSError(error.errno, error.strerror, name) from None
        raise ValueError(f"{name}: not a readable image ({error})") from None
    raise ValueError(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS:,} are read; shrink the image first")


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The whole image at `size` = (height, width), as uint8 (height, width, 3)."""
    return np.asarray(image if image.size == size[::-1] else image.resize(size[::-1], Image.BICUBIC))


def random_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator, smallest: float) -> np.ndarray:
    """Random resized crop and horizontal flip (§3.1; MAE's augmentation), as uint8 (height, width, 3).

    The crop covers a share of the image's area drawn from [smallest, 1] at an aspect ratio drawn from [3/4, 4/3], or a narrower
    range if `smallest` is above 3/4, clipped to the image. All randomness is in `rng`, so the same (seed, epoch, index) gives
    the same crop in any process.
    """
    width, height = image.size
    area = width * height * rng.uniform(smallest, 1.0)
    narrowest = np.log(max(3 / 4, smallest))
    aspect = np.exp(rng.uniform(narrowest, -narrowest))
    w = int(np.clip(round(np.sqrt(area * aspect)), 1, width))
    h = int(np.clip(round(np.sqrt(area / aspect)), 1, height))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    pixels = np.asarray(image.resize(size[::-1], Image.BICUBIC, box=(left, top, left + w, top + h)))
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


@functools.cache
def _mean_and_std(device):
    """(1, 3, 1, 1) each. Kept, because a new one each time would make the CPU wait for the GPU in each step."""
    return torch.tensor(MEAN, device=device).view(1, 3, 1, 1), torch.tensor(STD, device=device).view(1, 3, 1, 1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with ImageNet's mean and deviation, on the device the images are on."""
    mean, std = _mean_and_std(images.device)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std   # (B, H, W, 3) -> (B, 3, H, W)


def unnormalise(images: torch.Tensor) -> np.ndarray:
    """The way back, for pictures: float (B, 3, H, W) -> uint8 (B, H, W, 3), clipped to what a pixel can hold."""
    mean, std = _mean_and_std(images.device)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).byte().cpu().numpy()           # (B, 3, H, W) -> (B, H, W, 3)


def inside(root, name: str) -> Path:
    """`root/name`, refused if it is absolute, climbs out with `..`, or is a link that leads out of the root.

    For every file name that comes from a CSV or a list. Raises ValueError naming the entry.
    """
    path = Path(root) / name
    if (os.path.isabs(name) or ".." in Path(name).parts or "\0" in name
            or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))):
        raise ValueError(f"{name!r} leaves its data root {root}; entries must lie inside it")
    return path


if __name__ == "__main__":
    for file in sys.argv[1:]:
        try:
            image = read_image(file)
            print(f"{file}: {image.size[0]} x {image.size[1]}, mean colour {np.asarray(image).mean((0, 1)).round(1)}")
        except ValueError as refusal:
            print(f"refused: {refusal}")
