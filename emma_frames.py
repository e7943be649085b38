"""EMMA on whole videos, each frame by itself: its outputs, and their score on the validation videos.

A segment model (evaluate.py) sees a frame among its neighbours. Both are scored on the same videos and the
same frames, so the difference shows what time adds.

    python emma_frames.py                      # the score of runs/demo/emma/best.pt
    python emma_frames.py --config my.yaml --checkpoint somewhere/best.pt

A video is left out, and named, if EMMA or the ViT that it started from was trained on its scene.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from checkpoints import check_names, load_weights, read_checkpoint
from config import from_command_line
from data import VideoFrames
from distributed import Team, all_sum, choose_device, launch
from emma import EMMA, OUTPUTS, split_outputs
from features import each_frame
from frames import find_videos
from labels import TASKS, Task, has_labels, read_labels, targets
from made_of import finished, like, missing, tuned_on
from run import Progress
from score_table import score_table
from scoring import shared_out
from segments import reasons
from settings import Config
from splits import scene, split
from stills import cnn_of
from vit import VisionTransformer


class Trained(NamedTuple):
    """EMMA with what its checkpoint carries: enough to predict, without the run that made it."""
    model: EMMA
    tasks: list[Task]         # those that it was trained on; what it gives for others means nothing
    config: Config            # with the settings that it was trained with
    team: Team
    record: dict              # what it was made of (made_of.py)
    changed: dict             # {setting: (stage, was, now)} of those that differ from the given configuration

    def predict(self, frames: VideoFrames, length: int, progress) -> tuple[np.ndarray, np.ndarray]:
        """A video of T = `length` frames -> float32 (T, 22), noface (T,), as features.each_frame says."""
        return each_frame(self.model, frames, length, OUTPUTS, torch.float32, self.config, self.team,
                          progress)


def outputs_of(task: Task, outputs):
    """What EMMA gives for one task. An array or a tensor, (..., 22) -> (..., K)."""
    return dict(zip(TASKS, split_outputs(outputs)))[task.name]


def load(path, config: Config | None = None, team: Team | None = None) -> Trained:
    """The EMMA of a checkpoint, rebuilt from it alone: the ViT by its settings, the CNN by its weights.
    `config` says what the checkpoint does not (run.device, data).

    Raises ValueError if it is no whole checkpoint, not EMMA's, made with other settings than those given with
    --set, or if its weights do not fit (names and shapes are listed).
    """
    saved = read_checkpoint(path)
    record, weights = saved.get("made_of") or {}, saved.get("model", saved)
    if record.get("stage") != "emma":
        found = f"of stage {record['stage']}" if record else "does not tell what it was made of"
        raise ValueError(f"{path}: {found}; expected EMMA, as train_emma.py writes it, like "
                         "runs/<config>/emma/best.pt")
    check_names(weights, path)
    config, changed = like(record, config or Config(), path)
    team = team or Team(0, 1, choose_device("cpu"))
    cnn = {name.removeprefix("cnn."): entry for name, entry in weights.items() if name.startswith("cnn.")}
    model = EMMA(VisionTransformer(**dataclasses.asdict(config.vit)), cnn_of(cnn, path) if cnn else None)
    load_weights(model, weights, path)
    tasks = [task for task, weight in zip(TASKS.values(), config.emma.weights) if weight]
    return Trained(model.to(team.device).eval(), tasks, config, team, record, changed)


# ---- The score on the validation videos

class Video(NamedTuple):
    """A validation video of a task."""
    name: str
    frames: VideoFrames
    labels: np.ndarray        # as `read_labels` gives them


def open_videos(trained: Trained, task: Task) -> tuple[list[Video], dict[str, str]]:
    """The official validation videos of a task, and {name: why it is left out}."""
    config, record, videos, left_out = trained.config, trained.record, [], {}
    folders = find_videos(config.data.frames)
    seen = {scene(name) for name in record["data"]["training videos"] + tuned_on(record)}
    for name, file in split(config.data.labels, task, 0)[1].items():
        labels = read_labels(file, task)
        frames = VideoFrames(folders[name], config.vit.image_size) if name in folders else []
        if scene(name) in seen:
            left_out[name] = "EMMA was trained on its scene"
        elif not len(labels) or not len(frames):
            left_out[name] = "no frames" if len(labels) else "no labels"
        else:
            videos.append(Video(name, frames, labels))
    return videos, left_out


def video_sums(path, config: Config, task: Task, team: Team) -> tuple[list[str], np.ndarray]:
    """The names of the validation videos, and the sums of the task's metric for each of them, (videos, ...),
    over all processes. A labelled frame without a face counts, with the outputs of the frame before it, as it
    does for a segment model. Says which videos are left out. Raises ValueError if EMMA was not trained on the
    task, or if no video is left."""
    trained = load(path, config, team)
    if task not in trained.tasks:
        raise ValueError(f"{path}: trained without {task.name} (emma.weights={trained.config.emma.weights})")
    videos, left_out = open_videos(trained, task)
    mine, place = shared_out(videos, team), {video.name: i for i, video in enumerate(videos)}
    progress = Progress(sum(len(video.labels) for video in mine), "frames", team)
    nothing = np.zeros((0, len(task.outputs)))
    no_label = nothing[:, 0] if task.one_class else nothing
    empty = task.metric.count(nothing, no_label, no_label.astype(bool))
    sums, faces = np.zeros((len(videos), *empty.shape)), np.zeros(len(videos))
    for video in mine:
        length = max(len(video.labels), int(video.frames.numbers[-1]))
        outputs, noface = trained.predict(video.frames, length, progress)
        outputs = outputs_of(task, outputs)[:len(video.labels)]                        # (T, 22) -> (T, K)
        sums[place[video.name]] = task.metric.count(outputs, *targets(video.labels, task))
        faces[place[video.name]] = (~noface).sum()
    sums, faces = (all_sum(torch.from_numpy(part)).numpy() for part in (sums, faces))
    left_out |= {video.name: "no readable face" for video in videos if not faces[place[video.name]]}
    if left_out:
        team.say(f"  left out: {reasons(left_out)}")
    if not faces.any():
        raise ValueError(f"{path}: no validation video of {task.name} can be scored; check data.frames")
    return [video.name for video in videos if faces[place[video.name]]], sums[faces > 0]


def main(config, team, checkpoint=""):
    """Print the score of each task that EMMA was trained on and that has labels here."""
    path = checkpoint or config.folder("emma") / "best.pt"
    if not checkpoint and not finished(path.parent):
        raise missing(path, "train_emma.py", config)
    trained = load(path, config, team)
    for name, (_, was, now) in trained.changed.items():
        team.say(f"  {name}={was} as in {path}; the configuration has {now}")
    for task in [task for task in trained.tasks if has_labels(config.data.labels, task)] or trained.tasks:
        team.say(f"\n{path}, each frame by itself")
        names, sums = video_sums(path, config, task, team)
        team.say(f"{len(names)} validation videos\n{score_table(task, sums, comparable=False)}")


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__, checkpoint={"default": "", "metavar": "FILE", "help": "default: the run's emma/best.pt"})
    launch(main, config, options.checkpoint)
