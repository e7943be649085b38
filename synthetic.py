"""Synthetic videos and still faces in the layouts of the real data sets.

With them every stage runs, and has something to learn, without real data. Everything depends on (seed, number
of the video or face) alone: the same bytes each time, with any number of processes.
Reading order: synthetic_face.py (one face), synthetic_acting.py (a video of it), synthetic_stills.py (the
static sets), then here: which videos there are, their files, and who draws what.

    python synthetic.py                          # all data sets of the demo, into data/demo
    python synthetic.py --sheet faces.png        # only a sheet: expressions, action units, spoiled frames
"""

import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import synthetic_acting
import synthetic_face
import synthetic_stills
from checkpoints import write_text
from config import from_command_line
from distributed import launch
from labels import TASKS
from settings import Synthetic
from synthetic_acting import TRAIN, VAL, act, annotate, bursts, episodes, spoil
from synthetic_face import draw_face, person, save_sheet
from synthetic_stills import SETS, draw_still, still, write_lists

SHORTEST = 73                  # frames of the shortest real video
NO_FACE_SHARE = 0.06           # frames without an image, because no face was found
UNANNOTATED_SHARE = 0.08       # frames that a task has no label for
SPLIT_FOLDERS = {TRAIN: "Train_Set", VAL: "Validation_Set"}


# ---- Videos. What is special about a video follows from its number, so that each fault occurs in each split.

@dataclass(frozen=True)
class Video:
    """One video, before it is drawn."""
    name: str
    split: int                 # TRAIN or VAL
    number: int                # within the split
    frames: int                # lines of a label file
    tasks: tuple               # keys of labels.TASKS
    first: int                 # where its expressions start in EPISODES


def film_name(split: int, film: int) -> str:
    """A name in one of the forms that real names have. No film is in both splits."""
    code = 2 * film + 1 if split == TRAIN else 2 * film + 2
    form = film % 4
    if form == 0:
        return f"{code}-30-1280x720"
    if form == 1:
        return f"{120 + code}"
    if form == 2:
        return f"video{code}_3"
    return f"{code}-60-1920x1080-2"


def film_length(sizes: Synthetic, split: int, film: int) -> int:
    """Frames of a film. The first three are a multiple of usual strides, very short, and longer."""
    if film == 0:
        return sizes.frames
    if film == 1:
        return min(SHORTEST, sizes.frames)
    if film == 2:
        return sizes.frames * 3 // 2
    share = np.random.default_rng([sizes.seed, split, film, 1]).uniform(0.75, 1.5)
    return max(1, int(sizes.frames * share))


def annotated_tasks(number: int) -> tuple:
    """The tasks that a video has labels for: most have all, a third of them some."""
    place = number % 9
    if place == 4:
        return ("va",)
    if place == 7:
        return ("au",)
    if place == 8:
        return ("expr", "au")
    return ("va", "expr", "au")


def videos(sizes: Synthetic) -> list:
    """All videos, those for training first."""
    out = []
    for split, count in ((TRAIN, sizes.train_videos), (VAL, sizes.val_videos)):
        first = 0
        for number in range(count):
            film, side = number, ""
            if number % 8 == 5:                                  # of each eight, two are people in one film
                side = "_left"
            if number % 8 == 6:
                film, side = number - 1, "_right"
            name = film_name(split, film) + side
            frames = film_length(sizes, split, film)
            tasks = annotated_tasks(number)
            out.append(Video(name, split, number, frames, tasks, first))
            if "expr" in tasks:
                first += episodes(frames)                        # so that all of EPISODES get labels
    return out


def draw_video(root: Path, sizes: Synthetic, video: Video) -> None:
    """Frames and label files of one video.

    Some have the faults of real ones: no face found, not annotated, more images than labels.
    """
    number = video.number
    p = person(np.random.default_rng([sizes.seed, video.split, number]))
    rng = np.random.default_rng([sizes.seed, video.split, number, 2])
    frames_past_the_labels = 4 if number % 5 == 2 else 0
    acting = act(rng, video.frames + frames_past_the_labels, video.first)
    write_labels(root, video, rng, *annotate(rng, acting))
    missing = set()                                              # numbers of the frames without a face
    if number % 3 != 1:
        for start, stop in bursts(rng, video.frames, NO_FACE_SHARE, 1, 20):
            missing.update(range(start, stop))
    folder = root / "Aff-Wild2/cropped_aligned" / video.name
    folder.mkdir(parents=True, exist_ok=True)
    for t, state in enumerate(spoil(rng, p, acting)):
        if t not in missing:
            draw_face(p, state, rng).save(folder / f"{t + 1:05d}.jpg", quality=90)


def write_labels(root: Path, video: Video, rng, va, expression, au) -> None:
    """The label files of one video, of its first video.frames frames. Some frames are not annotated."""
    lines = {"va": [f"{v:.3f},{a:.3f}" for v, a in va],
             "expr": [str(k) for k in expression],
             "au": [",".join(map(str, units)) for units in au]}
    line_end = "\r\n" if video.number % 6 == 3 else "\n"         # both occur
    for name in video.tasks:
        task = TASKS[name]
        of_task = lines[name][:video.frames]
        if video.number % 4 != 0:                                # every fourth is annotated throughout
            invalid = ",".join([str(task.invalid)] * task.width)
            for start, stop in bursts(rng, video.frames, UNANNOTATED_SHARE, 10, 50):
                of_task[start:stop] = [invalid] * (stop - start)
        folder = root / "Aff-Wild2/annotations" / task.folders[0] / SPLIT_FOLDERS[video.split]
        folder.mkdir(parents=True, exist_ok=True)
        text = line_end.join([",".join(task.outputs), *of_task, ""])
        (folder / f"{video.name}.txt").write_text(text, newline="")


# ---- All of it. `draw` writes a process's share of the pictures, with the labels beside them. `index` then
# writes the lists over all of them.

def description(sizes: Synthetic) -> dict:
    """What the data depend on: their sizes and the code that draws them. The folder may be moved."""
    modules = (synthetic_face.__file__, synthetic_acting.__file__, synthetic_stills.__file__, __file__)
    code = b"".join(Path(module).read_bytes() for module in modules)
    return {**dataclasses.asdict(sizes), "root": "", "code": zlib.crc32(code)}


def claim(root: Path, sizes: Synthetic) -> None:
    """Refuse a folder with other data in it: real data must not be overwritten, nor two sizes mixed.

    Raises ValueError if `root` holds a data set that was not drawn here, or one of other sizes.
    """
    mark = root / "sizes.json"
    if any((root / name).exists() for name in ("Aff-Wild2", "FERPlus", *SETS)):
        held = json.loads(mark.read_text()) if mark.exists() else "data that is not synthetic"
        if held != description(sizes):
            raise ValueError(f"{root} holds {held}, expected nothing or {description(sizes)}; draw into a "
                             "new folder (synthetic.root, and the paths under data), or delete this one")
    write_text(mark, json.dumps(description(sizes)))             # before any data: data without it is real
    (root / "complete.json").unlink(missing_ok=True)             # until index has run again


def draw(root, sizes: Synthetic, rank: int = 0, world: int = 1) -> None:
    """Write process `rank`'s share of the pictures. Shares are disjoint; together they are the same bytes for
    any number of processes `world`.

    Drawing again with the same sizes writes the same files. Raises ValueError if `root` holds other data.
    """
    root = Path(root)
    claim(root, sizes)
    for video in videos(sizes)[rank::world]:
        draw_video(root, sizes, video)
    for number in range(rank, sizes.faces, world):
        draw_still(root, still(sizes, number))


def index(root, sizes: Synthetic) -> None:
    """Write the lists over all pictures, then complete.json: in one process, when all shares are there."""
    root = Path(root)
    write_lists(root, sizes)
    write_text(root / "complete.json", json.dumps(description(sizes)))


def is_complete(root, sizes: Synthetic) -> bool:
    """Has `index` finished here, with these sizes?"""
    try:
        return json.loads((Path(root) / "complete.json").read_text()) == description(sizes)
    except (OSError, ValueError):
        return False


def check_paths(config) -> None:
    """With data.synthetic, every path under `data` must lie in synthetic.root.

    Raises ValueError if one lies elsewhere: a stage would read other data than were drawn for it.
    """
    if not config.data.synthetic:
        return
    root = os.path.abspath(config.synthetic.root)
    settings = dataclasses.asdict(config.data)
    del settings["synthetic"], settings["affectnet_crop"]        # all others are paths or lists of them
    for name, value in settings.items():
        paths = value if isinstance(value, list) else [value]
        for path in paths:
            if path and not Path(os.path.abspath(path)).is_relative_to(root):
                raise ValueError(
                    f"data.{name}: {path} is not in {config.synthetic.root} (synthetic.root), where "
                    "data.synthetic=true draws; set both, or data.synthetic=false to use your own data")


def make(config, team) -> None:
    """Draw everything into synthetic.root with all processes of `team` (distributed.Team).

    Raises ValueError if the folder holds other data.
    """
    sizes = config.synthetic
    draw(sizes.root, sizes, team.rank, team.world)
    team.wait()
    if team.rank == 0:
        index(sizes.root, sizes)
    team.wait()


def make_sheet(config, team, path) -> None:
    """Write a contact sheet. Raises ValueError if `path` is no .png or .jpg file, or cannot be written."""
    if team.rank == 0:
        save_sheet(synthetic_acting.sheet(), path)


if __name__ == "__main__":
    sheet = {"metavar": "FILE", "help": "write only a contact sheet, a .png or .jpg file"}
    config, options = from_command_line(__doc__, sheet=sheet)
    if options.sheet is None:
        launch(make, config)
    else:
        launch(make_sheet, config, options.sheet)
