"""One's own faces -> a table: valence, arousal, expression and action units of each frame (paper §3.2, §3.3).

    python predict.py --frames FOLDER --out predictions.csv                        # the demo's models
    torchrun --nproc_per_node=2 predict.py --config my.yaml --frames FOLDER --out predictions.csv --fps 25
    python predict.py --config my.yaml --frames FOLDER --out faces.jsonl --still   # each image for itself
    python predict.py --frames FOLDER --out predictions.csv --emma runs/demo/emma/best.pt

FOLDER holds the face crops of one video (00001.jpg, ...; numbers may be missing), or a folder of them per
video. Labels are not needed, only the run's fine-tuned ViT and its trained tasks; a task that is missing has
no columns. A row per frame, as CSV, or as JSON lines where the output's name ends in .jsonl:

    video               the folder's path below FOLDER; FOLDER's own name if the frames lie in it
    frame               from 1 to the last number, also where the image is missing
    time                seconds since frame 1; empty without --fps
    face                1, or 0 where there is no readable image: then the face before it counts (at the
                        start: the one after it); if the video has none at all, what follows is empty
    valence, arousal    unpleasant to pleasant, calm to excited: about -1 to 1, not clipped
    expression          the most probable of the eight that follow
    Neutral, ... Other  probabilities of the eight expressions: 0 to 1, their sum is 1
    AU1, ... AU26       probability that the action unit is active: 0 to 1, for each by itself

--smooth k takes the mean over k frames before and after each one. --picture draws a picture of each video,
predictions.csv.pictures/<video>.png, once the table is finished, so also of one that was made without.
--still takes each image below FOLDER for itself, whatever its name, and lets the fine-tuned ViT tell its
expression. Then `file`, the path below FOLDER, stands in place of video, frame and time. Valence, arousal
and action units, which need a video, are left out. Of an image that cannot be read, all but file and face is
empty.

--emma takes an EMMA of train_emma.py instead of the run's models. It sees every frame by itself, so with
--still valence, arousal and action units are there, too. A task that it was not trained on has no columns.

predictions.csv.json tells what the table was made of. The same command goes on with a killed run. In memory
are the features of one video, as in extract_features.py.
"""

import math
import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler

from config import from_command_line
from data import VideoFrames
from distributed import all_sum, launch
from frames import below, has_frames, list_frames
from images import FaceImages, find_images, listed, normalise, read_image, resize, sizes
from postprocessing import in_units, smoothed
from predict_models import Classifier, Emma, SegmentModels
from run import Progress
from table import Table, beside_a_table
from table_pictures import draw_missing
from training import loader

TOGETHER = 1000            # with --still, images that are written together


# ---- Values

def columns(tasks) -> list[str]:
    """The names of these tasks' columns, in order."""
    return [name for task in tasks for name in (["expression"] if task.one_class else []) + [*task.outputs]]


def cells(tasks, values: list) -> list:
    """What stands in `columns` for one frame. values: for each task (K,)."""
    row = []
    for task, of_task in zip(tasks, values):
        row += [task.outputs[of_task.argmax()]] if task.one_class else []
        row += of_task.tolist()
    return row


# ---- Videos

class Videos:
    """The videos of a folder, each a part of the table: `sizes` are their frames. Raises ValueError if there
    is no frame."""
    unit = "frames"

    def __init__(self, folder: Path, options):
        self.options, self.names, self.folders, self.sizes, self.numbers = options, [], [], [], []
        empty, beside, ends = [], Counter(), []
        itself = has_frames(folder)
        for path in [folder] if itself else below(folder):
            if beside_a_table(path):                         # --out may lie in the folder of the videos
                continue
            name = folder.resolve().name if itself else str(path.relative_to(folder))
            numbers, files, others = list_frames(path)
            beside.update(others)
            if not len(numbers):
                empty.append(name)
                continue
            self.names.append(name)
            self.folders.append(path)
            self.sizes.append(int(numbers[-1]))
            self.numbers.append((len(numbers), zlib.crc32(numbers.tobytes())))
            ends += [files.path(numbers[0]), files.path(numbers[-1])]
        lines = [f"  not read, as no frame (00001.jpg, ...): {listed(beside)}"] if beside else []
        if empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            lines.append(f"  left out, no frames: {', '.join(empty[:5])}{more}")
        if not self.names:
            lines.insert(0, f"--frames: no frame in {folder}; expected 00001.jpg, ... in it or in a folder "
                            "per video; images with other names need --still")
            raise ValueError("\n".join(lines))
        images, crc = sum(count for count, _ in self.numbers), zlib.crc32(repr(self.numbers).encode())
        self.found = {"videos": self.names, "images": f"{images:,}, checksum of their numbers {crc:08x}, "
                                                      f"sizes {sizes(ends)}"}
        self.text = "\n".join([f"{folder}: {len(self.names)} videos, {images:,} images", *lines])

    def fill_by(self, models, team):
        """Take the models that fill the table."""
        self.models, self.team = models, team
        self.header = ["video", "frame", "time", "face", *columns(models.tasks)]

    def rows(self, number: int, progress):
        """One video. -> its rows, one after the other, and noface (T,)"""
        length, o, tasks = self.sizes[number], self.options, self.models.tasks
        frames = VideoFrames(self.folders[number], self.models.config.vit.image_size)
        if self.numbers[number] != (len(frames), zlib.crc32(frames.numbers.tobytes())):
            raise ValueError(f"{self.folders[number]}: other frames than at the start; wait until all are "
                             "there, and give another --out")
        outputs, noface = self.models.video(frames, length, progress)                  # of a task (T, K)
        values = [smoothed(in_units(x, task), o.smooth) for task, x in zip(tasks, outputs)]
        nothing = [None] * (len(self.header) - 4)
        return ([self.names[number], t + 1, t / o.fps if o.fps else None, int(not noface[t]),
                 *(cells(tasks, [v[t] for v in values]) or nothing)] for t in range(length)), noface


# ---- Single images

class Stills(FaceImages):
    """All images below a folder, each for itself; a part of the table are TOGETHER of them. Item: uint8 image
    (size, size, 3), its number. Raises ValueError if there is no image."""
    unit = "images"

    def __init__(self, folder: Path, options):
        skipped = Counter()
        self.folder, self.files = folder, find_images(folder, skipped)
        if not self.files:
            raise ValueError(f"--frames: no image below {folder}, only {listed(skipped)}")
        firsts = range(0, len(self.files), TOGETHER)
        self.sizes = [min(TOGETHER, len(self.files) - first) for first in firsts]
        crc = zlib.crc32(b"\n".join(self.files))
        some = sizes(self.where(i) for i in range(0, len(self.files), 1 + len(self.files) // 100))
        self.found = {"images": f"{len(self.files):,}, checksum of their names {crc:08x}, sizes {some}"}
        lines = [f"  not read: {listed(skipped)}"] if skipped else []
        self.text = "\n".join([f"{folder}: {len(self.files):,} images", *lines])

    def fill_by(self, models, team):
        """Take the models that fill the table."""
        super().__init__(models.config.vit.image_size, torch.zeros(0, dtype=torch.long))
        self.models, self.team = models, team
        self.header = ["file", "face", *columns(models.tasks)]

    def __len__(self):
        return len(self.files)

    def where(self, i) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[i]))

    def item(self, i):
        return resize(read_image(self.where(i)), self.size), i

    @torch.no_grad()
    def rows(self, number: int, progress):
        """One part. -> its rows, one after the other, and noface (T,)"""
        first = number * TOGETHER
        taken = range(first, first + self.sizes[number])
        config, tasks, noface = self.models.config, self.models.tasks, np.ones(len(taken), bool)
        values = [np.zeros((len(taken), len(task.outputs)), np.float32) for task in tasks]
        batches = BatchSampler(taken, config.features.batch, drop_last=False)
        for images, numbers, unreadable in loader(self, batches, config.run.workers, self.team):
            for problem in unreadable:
                print(f"  left out: {problem}", flush=True)
            if len(numbers):
                with self.team.autocast():
                    outputs = self.models.images(normalise(images.to(self.team.device)))  # of a task (B, K)
                for of_task, task, x in zip(values, tasks, outputs):
                    of_task[numbers - first] = in_units(x.float().cpu().numpy(), task)
                noface[numbers - first] = False
            progress.add(len(numbers) + len(unreadable))
        nothing = [None] * len(columns(tasks))
        return ([os.fsdecode(self.files[i]), int(not noface[i - first]),
                 *(nothing if noface[i - first] else cells(tasks, [v[i - first] for v in values]))]
                for i in taken), noface


# ---- The script

def check_options(options):
    """Raises ValueError for options that make no sense, alone or together."""
    if not Path(options.frames).is_dir():
        raise ValueError(f"--frames: {options.frames} is no folder; expected one that holds the face crops "
                         "of a video, 00001.jpg, ..., or a folder of them per video")
    if not options.out or options.out.endswith("/") or Path(options.out).is_dir():
        raise ValueError(f"--out: got {options.out!r}, expected the name of a file, like predictions.csv")
    if options.smooth < 0:
        raise ValueError(f"--smooth: got {options.smooth}, expected 0 frames or more")
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise ValueError(f"--fps: got {options.fps}, expected frames per second, more than 0")
    if options.still and (options.smooth or options.fps or options.picture):
        raise ValueError("--still takes each image for itself; leave out --smooth, --fps and --picture, "
                         "which need a video")


def main(config, team, options):
    """Write the table, or go on with it, until it is finished; then the pictures."""
    check_options(options)
    source = (Stills if options.still else Videos)(Path(options.frames), options)
    if team.agree(source.found) != source.found:
        raise ValueError(f"{options.frames}: this process sees other images than the first one")
    team.say(source.text)
    if options.emma:
        models = Emma(options.emma, config, team)
    elif options.still:
        models = Classifier(config, team)
    else:
        models = SegmentModels(config, team)
    if models.synthetic:
        team.say("  warning: these models learned from synthetic faces; they say little about real ones")
    source.fill_by(models, team)
    record = {**models.record, "still": options.still, "smooth": options.smooth, "fps": options.fps,
              **source.found}
    table = Table(options.out, source.header, record, team)
    if not table.finished:
        make(table, source, team)
    else:
        team.say(f"{options.out} is finished" + ("" if options.picture else "; nothing to do"))
    if options.picture:
        draw_missing(table, source, options, team)


def make(table: Table, source, team):
    """Predict what the table lacks. What is left is shared out, longest first, so that no process waits long
    for another's last video."""
    sizes, unit = source.sizes, source.unit
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    left = team.agree([number for number in order if not table.part(number).exists()])
    mine = left[team.rank::team.world]
    team.say(f"predicting {sum(sizes[number] for number in left):,} of {sum(sizes):,} {unit}, "
             f"on {team.device}")
    progress, without = Progress(sum(sizes[number] for number in mine), unit, team), 0
    for number in mine:
        rows, noface = source.rows(number, progress)
        table.write(number, rows)
        without += int(noface.sum())
    without = int(all_sum(torch.tensor(without)))                  # when it is known, all parts are written
    table.join(len(sizes))
    team.wait()
    team.say(f"{table.path} is finished: {sum(sizes):,} rows; {without:,} of those made now are of {unit} "
             "without a readable face image")


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__,
        frames={"required": True, "metavar": "FOLDER", "help": "face crops of a video, or folders of them"},
        out={"required": True, "metavar": "FILE", "help": "the table: .jsonl for JSON lines, else CSV"},
        fps={"type": float, "metavar": "F", "help": "frames per second, for the column time"},
        smooth={"type": int, "default": 0, "metavar": "K", "help": "mean over K frames before and after"},
        picture={"action": "store_true", "help": "draw FILE.pictures/<video>.png, too"},
        still={"action": "store_true", "help": "each image for itself; without --emma, expressions only"},
        emma={"default": "", "metavar": "CHECKPOINT", "help": "predict with this EMMA, not with the run"})
    launch(main, config, options)
