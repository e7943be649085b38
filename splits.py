"""Which videos a fold trains on and which it validates on (paper Table 1). No torch is needed.

Fold 0 is the official split, of each task for itself. Folds 1 to 4 are one split of all scenes for all tasks:
a scene is in the same quarter for every task, so one encoder serves a fold, and no task's validation scene
is among the videos that it was fine-tuned on.

    python splits.py --config my.yaml      # the folds of your copy: videos, frames and share of each task
"""

import re
from pathlib import Path

from config import from_command_line, print_all
from labels import TASKS, Task, has_labels, label_files

FOLDS = range(5)


def scene(video: str) -> str:
    """`<video>`, `<video>_left` and `<video>_right` show the same scene and stay on one side of a split."""
    return re.sub(r"_(left|right)$", "", video)


def pooled_files(root, task: Task) -> dict[str, Path]:
    """{video: label file} of both official sets."""
    files = label_files(root, task)
    return files["Train_Set"] | files["Validation_Set"]


def count_rows(file: Path) -> int:
    """The frames of a label file: its lines without the header and blank ones."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:                            # in the middle of a file, the system does not name it
        raise OSError(error.errno, error.strerror, str(file)) from None
    return max(sum(1 for line in lines if line.strip()) - 1, 0)


def scene_frames(root) -> dict[str, dict[str, int]]:
    """{scene: {task: frames, that is rows of its label files}} of every task that has a folder of labels."""
    frames = {}
    for task in TASKS.values():
        if has_labels(root, task):
            for video, file in pooled_files(root, task).items():
                of_scene = frames.setdefault(scene(video), {})
                of_scene[task.name] = of_scene.get(task.name, 0) + count_rows(file)
    return frames


def deal(frames: dict[str, dict[str, int]]) -> dict[str, int]:
    """{scene: its quarter, 0 to 3}, so that each quarter gets about a quarter of the frames of each task.

    A scene's share of a task is its part of all the task's frames; a quarter's load is the sum of its scenes'
    shares. The largest scene comes first. Each goes where it adds least to the sum of all squared loads:
    (load + share)² - load² = 2 load share + share², and share² is the same in every quarter.
    """
    total = {}
    for of_scene in frames.values():
        for task, count in of_scene.items():
            total[task] = total.get(task, 0) + count
    shares = {name: {task: count / max(total[task], 1) for task, count in sorted(of_scene.items())}
              for name, of_scene in frames.items()}
    loads, quarter = [dict.fromkeys(total, 0.0) for _ in range(4)], {}
    for name in sorted(shares, key=lambda name: (-sum(shares[name].values()), name)):
        added = [sum(load[task] * share for task, share in shares[name].items()) for load in loads]
        quarter[name] = added.index(min(added))
        for task, share in shares[name].items():
            loads[quarter[name]][task] += share
    return quarter


def split(root, task: Task, fold: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """Training and validation label files of one task. Fold 0 is the official split. Fold k of 1 to 4
    (Table 1) pools both sets and validates on the scenes of quarter k, which `deal` has made of all tasks.

    Raises ValueError for another fold, and if one of the two would be empty.
    """
    if fold not in FOLDS:
        raise ValueError(f"fold: got {fold}, expected 0 (official split) or 1 to 4")
    if fold == 0:
        files = label_files(root, task)
        return files["Train_Set"], files["Validation_Set"]
    files, quarter = pooled_files(root, task), deal(scene_frames(root))
    train = {video: files[video] for video in sorted(files) if quarter[scene(video)] != fold - 1}
    val = {video: files[video] for video in sorted(files) if quarter[scene(video)] == fold - 1}
    if not train or not val:
        purpose, scenes = "train" if val else "validate", {scene(video) for video in files}
        raise ValueError(f"fold {fold} of {len(scenes)} scenes leaves nothing to {purpose} on; "
                         "take fold 0, or label more scenes")
    return train, val


def hold_out(files: dict[str, Path], share: float) -> tuple[dict[str, Path], dict[str, Path]]:
    """A share of the scenes is taken out of the training's label files: -> those left, those held out.

    Large and small scenes alike: of the scenes in order of their size, the middle one of each group of
    1 / share. Raises ValueError if none or all would be taken.
    """
    if share == 0:
        return files, {}
    size: dict[str, int] = {}
    for video, file in files.items():
        size[scene(video)] = size.get(scene(video), 0) + count_rows(file)
    order = sorted(size, key=lambda name: (-size[name], name))
    taken = {name for i, name in enumerate(order) if int((i + 1) * share + 0.5) > int(i * share + 0.5)}
    if not 0 < len(taken) < len(order):
        raise ValueError(f"task.held_out={share} takes {len(taken)} of {len(order)} training scenes; "
                         "give a share that takes one or more and leaves some")
    kept = {video: file for video, file in files.items() if scene(video) not in taken}
    return kept, {video: file for video, file in files.items() if scene(video) in taken}


def describe(root):
    """Yield a line for each fold and task. Raises ValueError if there are no label files."""
    tasks = [task for task in TASKS.values() if has_labels(root, task)] or list(TASKS.values())
    yield f"{'fold':6s}{'task':6s}{'training':>10s}{'validation':>12s}{'its frames':>12s}{'share':>8s}"
    for fold in FOLDS:
        for task in tasks:
            try:
                train, val = split(root, task, fold)
            except ValueError as refusal:
                if fold == 0:
                    raise
                yield f"{fold:<6d}{task.name:6s}{refusal}"               # too few scenes for four quarters
                continue
            frames = sum(count_rows(file) for file in val.values())
            whole = frames + sum(count_rows(file) for file in train.values())
            yield (f"{fold:<6d}{task.name:6s}{len(train):10,d}{len(val):12,d}{frames:12,d}"
                   f"{frames / max(whole, 1):8.1%}")
    yield (f"{len(scene_frames(root)):,} scenes over all tasks; folds 1 to 4 validate each of them once, "
           "in every task")


if __name__ == "__main__":
    config = from_command_line(__doc__)[0]
    print_all(describe(config.data.labels))
