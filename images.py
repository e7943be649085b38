"""Face images: decoded safely, cropped, put into batches, and turned into the numbers the ViT takes.

Every stage reads pixels through this file, so that pre-training, fine-tuning and feature extraction see
the same colours (RGB), the same resize filter (bicubic) and the same normalisation (ImageNet's mean and
deviation, as in MAE). Images stay uint8 until they are on the device: a batch crosses to the GPU at a
quarter of the size of float32. Reading order: one image, a batch of them, normalising, which
files may be read.

    python images.py               # the numbers that black and white become
    python images.py FILE ...      # size and mean colour of each file, or why it is refused
"""

import errno
import functools
import io
import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

MEAN = (0.485, 0.456, 0.406)   # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64_000_000        # 8,000 x 8,000: above it a file is a mistake or a decompression bomb
# By content, whatever the name says; Pillow knows 40 more.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
# The error numbers of Pillow's own complaints, and of the system's when there is no such file.
NO_IMAGE = (None, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

# Of the files that a search for images finds, in capitals or not.
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")

Image.MAX_IMAGE_PIXELS = None  # the limit above is checked here, with a message that names the file


def turn_upright(image: Image.Image) -> None:
    """Turn a photograph as its EXIF orientation says: a phone stores it as its sensor lay. In place."""
    image.load()
    if any(key in image.info for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")):
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:        # a broken EXIF block can raise anything, and the picture itself is whole
            pass


def read_image(source) -> Image.Image:
    """Decode one image as RGB, upright.

    `source` is a path, or the bytes of a file. The size is read from the header and checked before any pixel
    is decoded. Raises ValueError naming the file if it is missing, empty, truncated, no image, or larger than
    MAX_PIXELS; OSError if the disk fails or is gone: a run that left such images out would train on what
    happens to be reachable.
    """
    in_memory = isinstance(source, bytes)
    name = "image in memory" if in_memory else os.fsdecode(source)
    try:
        with Image.open(io.BytesIO(source) if in_memory else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                turn_upright(image)
                if image.mode.startswith("I;16"):       # 16-bit grey: Pillow would clip it at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
    except (OSError, SyntaxError, EOFError, ValueError, TypeError) as error:   # Pillow's, for no image
        folder = os.path.dirname(name) or "."
        folder_gone = isinstance(error, FileNotFoundError) and not os.path.isdir(folder)
        if folder_gone or getattr(error, "errno", None) not in NO_IMAGE:
            raise OSError(error.errno, error.strerror, name) from None
        raise ValueError(f"{name}: not a readable image ({error})") from None
    raise ValueError(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS:,} are read; "
                     "shrink the image first")


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The whole image at `size` = (height, width), as uint8 (height, width, 3)."""
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.BICUBIC)
    return np.asarray(image)


def random_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator,
                smallest: float) -> np.ndarray:
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


class FaceImages(torch.utils.data.Dataset):
    """Face images, each with one or more arrays beside it (MAE noise, a label, a row).

    One rule for what cannot be read: it is left out of its batch and named. A subclass gives `__len__`,
    `where`, `item`, and `beside`: for each array an empty tensor of the shape and type of what stands beside
    B = 0 images, like torch.zeros(0, 196) or torch.zeros(0, dtype=torch.long).
    """

    def __init__(self, size: int, *beside: torch.Tensor):
        self.size, self.beside = (size, size), beside

    def where(self, i) -> str:
        """The file of sample i, and its place in it, for messages."""
        raise NotImplementedError

    def item(self, i):
        """uint8 image (size, size, 3), and the arrays or numbers beside it. ValueError if it cannot be
        read."""
        raise NotImplementedError

    def __getitem__(self, i):
        """The item, or, where it cannot be read, the message that says so."""
        try:
            return self.item(i)
        except ValueError as problem:
            return str(problem)

    def collate(self, items):
        """-> images (B, size, size, 3) uint8, each array beside them (B, ...), problems: list[str]. B may
        be 0."""
        problems = [item for item in items if isinstance(item, str)]
        readable = [item for item in items if not isinstance(item, str)]
        if not readable:
            return torch.zeros((0, *self.size, 3), dtype=torch.uint8), *self.beside, problems
        # As tensors, they cross to the training process in shared memory. As arrays they would go through a
        # pipe, and a worker whose parent was killed would be stuck in it for ever.
        images, *columns = [torch.from_numpy(np.stack(column)) for column in zip(*readable, strict=True)]
        beside = [column.to(empty.dtype) for column, empty in zip(columns, self.beside, strict=True)]
        return images, *beside, problems                                # (B, size, size, 3), (B, ...), ...


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


def inside(root, name: str) -> Path:
    """`root/name`, refused if it is absolute, climbs out with `..`, or is a link that leads out of the root.

    For every file name that comes from a CSV or a list. Raises ValueError naming the entry.
    """
    path = Path(root) / name
    climbs = os.path.isabs(name) or ".." in Path(name).parts or "\0" in name
    if climbs or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{name!r} leaves its data root {root}; entries must lie inside it")
    return path


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
            elif entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(real_root):
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
    """A checksum of the sizes of some files, for made_of.py: other images of the same names have others."""
    crc = 0
    for path in paths:
        size = os.stat(path).st_size if os.path.exists(path) else "gone"
        crc = zlib.crc32(f"{size} ".encode(), crc)
    return f"{crc:08x}"


def listed(counts: Counter, most: int = 12) -> str:
    """What was counted, in one line, the most frequent first: "3 hidden, 1 link to no file"."""
    parts = [f"{count:,} {what}" for what, count in counts.most_common(most)]
    more = [f"{len(counts) - most} more"] if len(counts) > most else []
    return ", ".join(parts + more) or "nothing"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for name, level in (("black", 0), ("white", 255)):
            pixel = torch.full((1, 1, 1, 3), level, dtype=torch.uint8)
            print(f"{name} becomes", normalise(pixel).flatten().numpy().round(3), "(red, green, blue)")
    refused = False
    for file in sys.argv[1:]:
        try:
            image = read_image(file)
            colour = np.asarray(image).mean((0, 1)).round(1)            # (H, W, 3) -> (3,)
            print(f"{file}: {image.size[0]} x {image.size[1]}, mean colour {colour}")
        except (ValueError, OSError) as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            refused = True
    sys.exit(2 if refused else 0)
