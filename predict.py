"""One's own faces -> a table: valence, arousal, expression and action units of each frame (paper §3.2, §3.3).

    python predict.py --frames FOLDER --out predictions.csv                        # the demo's models
    torchrun --nproc_per_node=2 predict.py --config my.yaml --frames FOLDER --out predictions.csv --fps 25
    python predict.py --config my.yaml --frames FOLDER --out faces.csv --still     # each image for itself
    python predict.py --frames FOLDER --out predictions.csv --emma runs/demo/emma/best.pt

FOLDER holds the face crops of one video (00001.jpg, ...; numbers may be missing), or a folder of them per
video. Labels are not needed, only the run's fine-tuned ViT and its trained tasks; a task that is missing has
no columns. A row per frame: video, frame, time, face (0 where there is no readable image), valence, arousal,
expression and its eight probabilities, the probability of each action unit. docs/predict.md explains them.

--still takes each image below FOLDER for itself, whatever its name, and lets the fine-tuned ViT tell its
expression: the columns are file, face and the expressions. --emma takes an EMMA, which sees every frame by
itself: with --still, too, it has all tasks.

predictions.csv.json tells what the table was made of. The same command goes on with a killed run: the rows of
a video lie in predictions.csv.parts, whole or not there, until all are made.
"""

import csv
import io
import json
import os
import re
import shutil
import zlib
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import pictures
from data import some_faces
from engine.checkpoints import checksum, load_weights, read_checkpoint, read_json, write_file, write_text
from engine.config import from_command_line
from engine.distributed import all_sum, launch
from engine.run import changes
from engine.training import Progress
from images import READ, Files, VideoFrames, below, find_images, listed, passed_over, sizes
from labels import EXPR, TASKS, in_units, smoothed
from pipeline import command, find_input, finished, folder, like, lines_of, missing, settings_of
from scoring import ExprClassifier, check_features, each_frame, extractor, load
from second_paper import emma

TOGETHER = 1000            # with --still, images that are written together


# ---- The models. Each function gives
# look: files of T frames, T, progress -> what it saw (T, D), noface (T,)
# heads: {a task's name: (T, D) -> its outputs (T, K)}
# the configuration with the settings that they were trained with, and the record that tells which they are

def segment_models(config, team):
    """Videos: the run's ViT and its trained tasks. Raises ValueError if no task is trained."""
    look, origin, said = extractor(config, team)
    team.say(f"  ViT from {said}")
    heads, record = {}, {"vit": {"checksum": origin["checksum"], "token": config.finetune.token}}
    features = {"stage": "features", "settings": settings_of("features", config), "from": origin}
    for task in TASKS.values():
        path = folder("task", config, task) / "best.pt"
        if not finished(path.parent):
            team.say(f"  no columns of {task.name}, which is not trained to its end; to do so: "
                     + command(f"train_task --task {task.name}", config))
            continue
        trained = load(path, config, task, team)
        check_features(path, trained.record, features)
        if trained.changed:
            team.say(f"  settings as in {path}:{lines_of(trained.changed)}")
        heads[task.name] = trained.predict
        record[task.name] = {"checksum": checksum(path), **vars(trained.config.segments)}
    if not heads:
        raise missing(path, f"train_task --task {task.name}", config)
    return look, heads, config, record


def emma_model(path, config, team):
    """Each frame or image by itself: the EMMA of a checkpoint."""
    trained = emma.load(path, config, team)
    heads = {task.name: partial(emma.outputs_of, task) for task in trained.tasks}
    team.say(f"  {path}, each frame by itself; columns of {', '.join(heads)}")
    return trained.predict, heads, trained.config, {"emma": {"checksum": checksum(path)}}


def expression_model(config, team):
    """Each image by itself: the ViT with the expression head of its fine-tuning."""
    path, origin = find_input(config, team, "features.checkpoint")
    saved = read_checkpoint(path)
    config, _ = like(saved.get("made_of"), config, path)
    model = ExprClassifier(config)
    load_weights(model, saved.get("model", saved), path)
    team.say(f"  {path}, each frame by itself; columns of {EXPR.name}")
    look = partial(each_frame, model.to(team.device).eval(), path, len(EXPR.outputs), np.float32)
    return (partial(look, config, team), {EXPR.name: np.asarray}, config,
            {"vit": {"checksum": origin["checksum"], "token": config.finetune.token}})


# ---- What is predicted, in parts: a video, or TOGETHER single images. `parts`: {name: its files}

def videos_in(root: Path) -> tuple[dict[str, Files], list[str]]:
    """The videos of a folder, and lines about what was found. The rows of a video whose images count from 0
    count from 1, as label files and submissions do. Raises ValueError if there is no frame."""
    ours, top = re.compile(r"\.(parts|pictures)(/|$)"), VideoFrames(root, first=0)   # --out may lie there too
    inside = {os.path.relpath(of.folder, root): of for of in ([] if top.plain else below(top))}
    found = {name: of for name, of in inside.items() if not ours.search(name)} or {root.resolve().name: top}
    parts = {name: files for name, files in found.items() if len(files)}
    lines = [f"{root}: {len(parts)} videos, {sum(map(len, parts.values())):,} images"]
    lines += passed_over(root, list(found.values()))
    if not parts:
        raise ValueError("\n".join(["--frames: no frame found; expected 00001.jpg, ..., or names that differ "
                                    "in one number, in the folder or in a folder per video; images with "
                                    "other names need --still", *lines]))
    sparse = [name for name, files in parts.items() if files.last > 1000 + 10 * len(files)]
    if sparse:
        raise ValueError(f"--frames: {sparse[0]} has {len(parts[sparse[0]])} images, numbered up to "
                         f"{parts[sparse[0]].last:,}; expected a video's frames; for single images, --still")
    from_0 = [name for name, files in parts.items() if files.numbers[0] == 0]
    from_0 = list(parts) if 10 * len(from_0) > len(parts) else from_0
    for name in from_0:
        parts[name].numbers += 1
    lines += [f"  {len(from_0)} videos count their images from 0, such as {name}: image 0 is frame 1 of the "
              "table, at time 0, and line 1 of a label file or submission" for name in from_0[:1]]
    return parts, lines


def stills_in(root: Path) -> tuple[dict[str, Files], list[str]]:
    """All images below a folder, TOGETHER in a part. Raises ValueError if there is none."""
    skipped = Counter()
    names = find_images(root, skipped)
    if not names:
        raise ValueError(f"--frames: no image below {root}, only {listed(skipped)}; {READ}")
    parts = {str(first): Files(root, names[first:first + TOGETHER])
             for first in range(0, len(names), TOGETHER)}
    return parts, [f"{root}: {len(names):,} images; not read: {listed(skipped)}"]


def fingerprint(parts: dict) -> dict:
    """What there is to predict, for the record."""
    crc, some = 0, []
    for files in parts.values():
        names = [] if isinstance(files, VideoFrames) else files.names.tolist()
        crc = zlib.crc32(files.numbers.tobytes() + b"|".join(names), crc)
        some += [files.where(i) for i in range(0, len(files), 1 + len(files) // 10)]
    return {"parts": list(parts), "images": f"{sum(map(len, parts.values())):,}, checksum {crc:08x}, sizes "
                                            f"{sizes(some)}"}


# ---- The table

def is_finished(path: Path, record: dict, team) -> bool:
    """Is the table there? Otherwise write down what it will be made of. Raises ValueError if it, or its
    beginning, is made of something else, or of nobody knows what."""
    told, folder = Path(f"{path}.json"), Path(f"{path}.parts")
    before, now = read_json(told), json.loads(json.dumps(record))
    if before != now and (path.exists() or folder.exists()):
        differs = changes(before, now, "was", "now") if before else f" no {told} tells with what"
        raise ValueError(f"{path} was made, or begun, with something else:{differs}\n"
                         f"give another --out, or delete {told}, {folder} and {path}")
    there = team.agree(path.exists())
    if team.rank == 0 and not there:
        write_text(told, json.dumps(now, indent=1))
    return there


def rows_of(name: str, files, values: dict, noface, options) -> bytes:
    """The rows of a part, from values {task: (T, K)}. They are empty where nothing is known: at an image that
    cannot be read, in a video without any face."""
    known = ~noface if options.still else np.full(len(noface), not noface.all())
    text, columns = io.StringIO(), []
    table = csv.writer(text, lineterminator="\n")
    for task, v in values.items():
        if TASKS[task].one_class:
            columns.append([TASKS[task].outputs[k] for k in v.argmax(axis=1)])
        columns += np.char.mod("%.6f", v).T.tolist()
    for t, row in enumerate(zip(*columns)):
        time = f"{t / options.fps:.6f}" if options.fps else ""
        frame = [os.fsdecode(files.names[t])] if options.still else [name, t + 1, time]
        table.writerow([*frame, int(not noface[t]), *(row if known[t] else [""] * len(row))])
    return text.getvalue().encode("utf-8", "surrogateescape")       # names may hold bytes of no encoding


# ---- The script

def check_options(options):
    """Make --fps a number. Raises ValueError for options that make no sense, alone or together."""
    with suppress(ValueError, ArithmeticError):                    # ArithmeticError: of 1/0
        options.fps = options.fps and float(Fraction(options.fps))
    out, smooth, fps = options.out, options.smooth, options.fps
    for wrong, message in [
            (not Path(options.frames).is_dir(),
             f"--frames: {options.frames} is no folder; expected one that holds the face crops of a video, "
             "00001.jpg, ..., or a folder of them per video"),
            (not out.lower().endswith(".csv") or Path(out).is_dir(),
             f"--out: got {out!r}, expected the name of a CSV file, like predictions.csv"),
            (smooth < 0, f"--smooth: got {smooth}, expected 0 frames or more"),
            (fps is not None and not (isinstance(fps, float) and fps > 0),
             f"--fps: got {fps}, expected frames per second, more than 0, like 25 or 30000/1001"),
            (options.still and (smooth or fps or options.picture),
             "--still takes each image for itself; leave out --smooth, --fps, --picture: they need a video")]:
        if wrong:
            raise ValueError(message)


def main(config, team, options):
    """Write the table, or go on with it, until it is finished and the pictures are drawn."""
    check_options(options)

    # frames
    parts, lines = (stills_in if options.still else videos_in)(Path(options.frames))
    found = fingerprint(parts)
    if team.agree(found) != found:
        raise ValueError(f"{options.frames}: this process sees other images than the first one")
    team.say("\n".join(lines))

    # models
    of_run = expression_model if options.still else segment_models
    look, heads, config, record = (emma_model(options.emma, config, team) if options.emma
                                   else of_run(config, team))
    if config.data.synthetic:
        team.say("  warning: these models learned from synthetic faces; they say little about real ones")

    # table
    path = Path(options.out)
    header = ["file", "face"] if options.still else ["video", "frame", "time", "face"]
    for task in map(TASKS.get, heads):
        header += ["expression"] * task.one_class + [*task.outputs]
    record |= {"still": options.still, "smooth": options.smooth, "fps": options.fps, **found}
    there = is_finished(path, record, team)

    # loop: parts that lack rows or a picture, longest first, so that no process waits long for another's last
    frames = {name: files.last for name, files in parts.items()}
    rows = {name: Path(f"{path}.parts/{number:06d}") for number, name in enumerate(parts)}
    images = {name: Path(f"{path}.pictures/{name}.png") for name in parts}
    lacking = [name for name in parts if not (there or rows[name].exists())
               or options.picture and not images[name].exists()]
    left = team.agree(sorted(lacking, key=lambda name: -frames[name]))
    if there and not left:
        return team.say(f"{path} is finished; nothing to do")
    team.say(f"predicting {sum(map(frames.get, left)):,} of {sum(frames.values()):,} frames, "
             f"on {team.device}")
    mine, without = left[team.rank::team.world], 0
    progress = Progress(sum(map(frames.get, mine)), "frames", team)
    for name in mine:
        seen, noface = look(parts[name], frames[name], progress)
        values = {task: smoothed(in_units(head(seen), TASKS[task]), options.smooth)
                  for task, head in heads.items()}                                    # (T, K) each
        if options.picture:
            shown = np.linspace(1, frames[name], min(60, frames[name])).astype(int)
            note = f"mean over {options.smooth} frames before and after each one" if options.smooth else ""
            picture = pictures.draw_video(name, {} if noface.all() else values, {},
                                          some_faces(parts[name], shown, 80), noface, options.fps, note)
            pictures.save(picture, images[name])
        if not there:                                # after its picture: a part that is there needs nothing
            of_part = rows_of(name, parts[name], values, noface, options)
            write_file(rows[name], lambda file: file.write(of_part))
        without += int(noface.sum())
    without = int(all_sum(torch.tensor(without)))                  # when it is known, all parts are written
    if team.rank == 0 and not there:
        top = ",".join(header).encode() + b"\n"
        write_file(path, lambda file: file.writelines(chain([top], map(Path.read_bytes, rows.values()))))
        shutil.rmtree(f"{path}.parts", ignore_errors=True)
    team.say(f"{path} is finished: {sum(frames.values()):,} rows; {without:,} of those predicted now "
             "are of frames without a readable face image")


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__,
        frames={"required": True, "metavar": "FOLDER", "help": "face crops of a video, or folders of them"},
        out={"required": True, "metavar": "FILE", "help": "the table, a .csv"},
        fps={"metavar": "F", "help": "frames per second, 25 or 30000/1001, for the column time"},
        smooth={"type": int, "default": 0, "metavar": "K", "help": "mean over K frames before and after"},
        picture={"action": "store_true", "help": "draw FILE.pictures/<video>.png, too"},
        still={"action": "store_true", "help": "each image for itself; without --emma, expressions only"},
        emma={"default": "", "metavar": "CHECKPOINT", "help": "predict with this EMMA, not with the run"})
    launch(main, config, options)
