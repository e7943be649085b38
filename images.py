"""Face images: decoded safely, cropped, normalised for the ViT; image files in folders; the frames of videos.

Every stage reads pixels through this file: the same colours (RGB), the same resize filter (bicubic), the same
normalisation (ImageNet's mean and deviation, as in MAE). Images stay uint8 until they are on the device: a
batch crosses to the GPU at a quarter of the size of float32. `data.Images` makes the batches.

A video is a folder of frames, image files named by their number, counted from 1: 00001.jpg in Aff-Wild2, but
other copies have other extensions and another number of zeros, and tools write frame_0001.jpg and the like.
"""

import errno
import functools
import os
import re
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

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
READ = (f"images are read from {', '.join(EXTENSIONS)}; convert others (.heic, .avif) to one of these, and a "
        "video to frames: ffmpeg -i video.mp4 folder/%05d.jpg")
FEW = 4                        # frames more or less than labels: no sign of another frame rate
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
                bits = tags.get(TIFF.BITSPERSAMPLE, (16,))[0]
                if bits == 16 and np.asarray(image).max() < 4096:
                    raise ValueError("grey values of 16 bits, of which the highest 4 are not used; convert "
                                     "to 8 bits")
                grey = (np.asarray(image) >> bits - 8).astype(np.uint8)
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
    """(3, 1, 1) each. Kept: making them anew in each step would make the CPU wait for the GPU."""
    return torch.tensor([MEAN, STD], device=device)[..., None, None]


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with ImageNet's mean and deviation, on the same device."""
    mean, std = _mean_and_std(images.device)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std   # (B, H, W, 3) -> (B, 3, H, W)


def unnormalise(images: torch.Tensor, mean=MEAN, std=STD) -> np.ndarray:
    """The way back, for pictures: float (B, 3, H, W) -> uint8 (B, H, W, 3), clipped to a pixel's range."""
    mean, std = torch.tensor([mean, std], device=images.device)[..., None, None]     # two of (3, 1, 1)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).byte().cpu().numpy()           # (B, 3, H, W) -> (B, H, W, 3)


# ---- Image files in folders

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
                skipped["link out of the folder (copy with cp -rL, or give the folder it leads to)"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped[f"not an image file ({ending(entry.name)})"] += 1
            elif entry.is_symlink() and not os.path.isfile(entry.path):
                skipped["link to no file"] += 1
            else:
                found.append(os.fsencode(path))
    return sorted(found)


def ending(name: str) -> str:
    """What a file that is not read is counted as: .mp4."""
    return os.path.splitext(name)[1].lower() or "without extension"


def sizes(paths) -> str:
    """A checksum of the sizes of some files: other images of the same names have another."""
    found = [os.stat(path).st_size if os.path.exists(path) else "gone" for path in paths]
    return f"{zlib.crc32(''.join(f'{size} ' for size in found).encode()):08x}"


def listed(counts: Counter, most: int = 12) -> str:
    """What was counted, in one line, the most frequent first: "3 hidden, 1 link to no file"."""
    text = ", ".join(f"{count:,} {what}" for what, count in counts.most_common(most))
    return text + f", {len(counts) - most} more" * (len(counts) > most) or "nothing"


# ---- The frames of videos

class Files:
    """n image files below a folder, for `data.Images`: their `names` (n,), bytes, as there may be millions;
    the `numbers` (n,) of the frames that they are, rising, by default 1, 2, ..."""

    def __init__(self, folder, names, numbers=None):
        self.folder, self.names = str(folder), np.array(names, dtype=bytes)
        self.numbers = np.array(range(1, len(names) + 1) if numbers is None else numbers, dtype=np.int64)

    def __len__(self):
        return len(self.numbers)

    @property
    def last(self) -> int:
        """The number of the last frame; 0 without any."""
        return int(self.numbers.max(initial=0))

    def where(self, i) -> str:
        return os.path.join(self.folder, os.fsdecode(self.names[i]))

    def read(self, i) -> Image.Image:
        return read_image(self.where(i))


def numbered(names: list[str]) -> list[tuple[int, str]]:
    """(number, name) of names that differ in one number alone, frame_0001.jpg and frame_0002.jpg; of others
    nothing. In a single name the last number counts."""
    parts = [re.split("([0-9]+)", os.path.splitext(name)[0]) for name in names]      # frame_, 0001, ""
    k, *more = [k for k, of_all in enumerate(zip(*parts)) if len(set(of_all)) > 1] or [len(parts[0]) - 2]
    if more or len(set(map(len, parts))) > 1 or not all(re.fullmatch("0*[0-9]{1,7}", of[k]) for of in parts):
        return []
    return [(int(of[k]), name) for of, name in zip(parts, names)]


class VideoFrames(Files):
    """The frames in a folder, from the number `first`; {kind: how many} of what lies `beside`; the names of
    the `folders` in it; `plain`: are frames called 00001.jpg?

    Lists the folder once and opens no image. If most of its images are called otherwise than 00001.jpg, and
    differ in one number, that is the frame's. Raises ValueError if two files are the same frame, as
    00001.jpg and 1.png.
    """

    def __init__(self, folder, first: int = 1):
        listing = sorted(os.listdir(folder))
        shown = [name for name in listing if not name.startswith(".")]
        images = [name for name in shown if name.lower().endswith(EXTENSIONS)]
        others = [name for name in shown if not name.lower().endswith(EXTENSIONS)]
        self.folders = [name for name in others if os.path.isdir(os.path.join(folder, name))]
        found = [(int(match[1]), match[0]) for match in map(FRAME.fullmatch, images) if match]
        other = [name for name in images if not FRAME.fullmatch(name)]
        if len(other) > len(found):
            found = numbered(other) or found
        self.first, self.plain, names = first, any(FRAME.fullmatch(name) for _, name in found), {}
        for number, name in sorted(found):
            if names.setdefault(number, name) != name:
                raise ValueError(f"{folder}: {names[number]} and {name} are both frame {number}; remove one")
        numbers = [number for number in names if number >= first]
        super().__init__(folder, [os.fsencode(names[number]) for number in numbers], numbers)
        self.beside = Counter(ending(name) for name in others if name not in self.folders)
        self.beside.update({"hidden": len(listing) - len(shown), "folders": len(self.folders),
                            "with number 0": len(names) - len(numbers),
                            "images of other names": len(images) - len(found)})
        self.beside = +self.beside                                                 # of what there is any


def below(folder: VideoFrames, depth: int = 0) -> list[VideoFrames]:
    """The folders of videos below a folder, in order. One that holds folders but no 00001.jpg is entered; its
    own frames, called otherwise, are a video if there are any. A folder without both is given, too."""
    found = []
    for name in folder.folders:
        frames = VideoFrames(Path(folder.folder, name), folder.first)
        inner = [] if depth == DEEPEST or frames.plain else below(frames, depth + 1)
        found += inner
        if len(frames) or not inner:
            found.append(frames)
    return found


def passed_over(root, found: list[VideoFrames]) -> list[str]:
    """Lines about what was found below a root: what is taken for the number of a frame, what is not read."""
    named = [of for of in found if len(of) and not of.plain]
    beside = sum((of.beside for of in found), Counter())
    empty = [os.path.basename(of.folder) for of in found if not len(of)]
    alone = str(root) in [of.folder for of in found]                        # the root itself is a video
    loose = Counter(ending(path.name) for path in Path(root).glob("[!.]*") if path.is_file() and not alone)
    lines = [f"  in {len(named)} videos a number in the name is taken for the frame's, as {of.numbers[0]} in "
             f"{os.path.basename(of.where(0))}" for of in named[:1]]
    lines += [f"  not read, as no frame (00001.jpg, ...): {listed(beside)}"] if beside else []
    lines += [f"  not read, as in no video's folder: {listed(loose)} in {root}"] if loose else []
    lines += [f"  {READ}"] if loose or any(kind.startswith(".") for kind in beside) else []
    return lines + ([f"  {len(empty)} folders without a frame: {', '.join(empty[:5])}"] if empty else [])


def find_videos(roots) -> tuple[dict[str, VideoFrames], list[str]]:
    """{video: its frames}, sorted, of the folders below several roots (`data.frames`), and lines about what
    was passed over. A video that is in two roots is taken from the first that has frames of it.

    Raises ValueError for a root that is missing, for a video that is twice below it, if there is no frame,
    and if more than a tenth of a root's videos have an image of number 0: line i of a label file belongs to
    image i.
    """
    videos, lines = {}, []
    for root in map(Path, roots):
        if not root.is_dir():
            raise ValueError(f"data.frames: {root} is no folder; "
                             "expected one that holds a folder of face crops per video")
        found, here = below(VideoFrames(root)), {}
        for frames in filter(len, found):
            known = here.setdefault(os.path.basename(frames.folder), frames)
            if known is not frames:
                raise ValueError(f"data.frames: {known.folder} and {frames.folder} are frames of one video; "
                                 "remove one, or give their roots as two, the better one first")
        zero = [video for video, frames in here.items() if frames.beside["with number 0"]]
        if 10 * len(zero) > len(here):                 # where it has no face, a video lacks its number 0
            raise ValueError(f"{len(zero)} of {len(here)} videos have an image of number 0, such as "
                             f"{here[zero[0]].folder}; line 1 of a label file belongs to image 1, so labels "
                             "would meet the next frame: rename every frame n to n + 1")
        lines += passed_over(root, found)
        twice = len(here.keys() & videos.keys())
        for count, why in ((twice, "are in an earlier folder of data.frames too, and taken from there"),
                           (len(zero), f"have an image of number 0, without a label: {zero[:5]}")):
            lines += [f"  {count} videos of {root} {why}"] if count else []
        videos = here | videos
    if not videos:
        raise ValueError("\n".join([f"data.frames: no folder of frames in {list(map(str, roots))}; expected "
                                    "<video>/00001.jpg below it", *lines]))
    return dict(sorted(videos.items())), lines


def last_of(videos: dict[str, VideoFrames]) -> dict[str, int]:
    """{video: the number of its last frame}, for `check_ends`."""
    return {video: frames.last for video, frames in videos.items()}


def check_ends(ends: dict[str, int], rows: dict[str, int], low: float = 0.9, high: float = 1.1) -> list[str]:
    """Do videos end where their labels do? ends: {video: its last frame}, rows: {video: lines of its labels}.
    -> a line about those that do not, by more than a tenth. Raises ValueError if most end late, or most end
    early by the same factor: early by chance, as the last frames have no face, may be any."""
    ratios = {video: end / rows[video] for video, end in ends.items() if rows.get(video)}
    odd = [video for video, ratio in ratios.items()
           if not low <= ratio <= high and abs(ends[video] - rows[video]) > FEW]
    said = [f"  {len(odd)} of {len(ratios)} videos do not end where their labels do: " + ", ".join(
        f"{video} (frames to {ends[video]:,}, {rows[video]:,} labels)" for video in odd[:5])] if odd else []
    ratio = np.median([ratios[video] for video in odd] or [1])
    wrong = [video for video in odd if ratios[video] > 1 or abs(ratios[video] / ratio - 1) < 0.05]
    if 2 * len(wrong) > len(ratios) and (len(ratios) > 3 or not 0.55 < ratio < 1):
        raise ValueError(f"{said[0].strip()}\n{ratio:.2g} images for each label; line i of a label file "
                         "belongs to frame i: make one image of each, numbered from 1 (ffmpeg -i video.mp4 "
                         "folder/%05d.jpg)")
    return said
