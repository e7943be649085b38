"""Videos on disk: where their folders lie, and which frames are in each (paper §4.1.2).

A frame is an image file named by its number, counted from 1: 00001.jpg in Aff-Wild2, but other copies have
other extensions and another number of zeros. `data.py` puts labels beside the frames.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import EXTENSIONS

FRAME = re.compile(r"0*([0-9]{1,7})(%s)" % "|".join(map(re.escape, EXTENSIONS)), re.IGNORECASE)
DEEPEST = 3        # levels of folders between a root and its videos, at most
KINDS = 20         # of files beside the frames that are told apart


# ---- The frames of one folder

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
                kind = kind_of(entry)
                beside[kind if kind in beside or len(beside) < KINDS else "of other kinds"] += 1
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


def kind_of(entry: os.DirEntry) -> str:
    """What a file that is no frame is counted as: its extension, mostly."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "folders"
    if FRAME.fullmatch(entry.name):
        return "with number 0"
    return os.path.splitext(entry.name)[1].lower() or "without extension"


def frame_numbers(folder) -> np.ndarray:
    """The numbers of the frames that have a face image, sorted: 00001.jpg is 1."""
    return list_frames(folder)[0]


def has_frames(folder) -> bool:
    """Is there a frame? Looks no further than the first, where `list_frames` reads all names."""
    with os.scandir(folder) as entries:
        return any(frame_number(entry.name) for entry in entries)


# ---- The folders of all videos

def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, less the hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries
                      if not entry.name.startswith(".") and entry.is_dir())


def below(root: Path, depth: int = 0):
    """Yield the folder of each video below the root. A folder that holds folders but no frames is entered."""
    for folder in subfolders(root):
        if depth < DEEPEST and not has_frames(folder) and subfolders(folder):
            yield from below(folder, depth + 1)
        else:
            yield folder


def in_root(root: Path) -> tuple[dict[str, Path], list[str]]:
    """{video: folder} of one root, and lines about what is not as usual there."""
    if not root.is_dir():
        raise ValueError(f"data.frames: {root} is no folder; "
                         "expected one that holds a folder of face crops per video")
    videos: dict[str, Path] = {}
    for folder in below(root):
        known = videos.get(folder.name)
        if known and has_frames(known) and has_frames(folder):
            raise ValueError(f"data.frames: {known} and {folder} are frames of one video, both below {root}; "
                             "remove one, or give the folders above them as two roots, the better one first")
        if known is None or not has_frames(known):
            videos[folder.name] = folder
    lines, shown = [], 5
    if has_frames(root):
        lines.append(f"  frames that lie in {root} itself, not in a folder of their video, are not read")
    holders = Counter(folder.parent for folder in videos.values())
    if set(holders) - {root}:
        lines += [f"  {count} video folders in {holder}" for holder, count in holders.most_common(shown)]
        if len(holders) > shown:
            lines.append(f"  the others in {len(holders) - shown} more folders below {root}")
    return videos, lines


def video_folders(roots) -> tuple[dict[str, Path], list[str]]:
    """What `find_videos` returns, and lines about what was merged or passed over on the way."""
    videos: dict[str, Path] = {}
    lines = []
    for root in map(Path, roots):
        found, about = in_root(root)
        lines += about
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
    """{video: folder of its frames}, sorted, over several roots. Folders of folders are entered, such as a
    nested cropped_aligned, so the root may also be the folder above two of them.

    A video that is in two roots is taken from the first that has frames of it. Raises ValueError for a root
    that is missing, for a video that is twice below one root, and when no video is found.
    """
    return video_folders(roots)[0]
