"""EMMA on whole videos, each frame by itself: its outputs, and their score on the validation videos.

A segment model (evaluate.py) sees a frame among its neighbours. Both are scored on the same videos and the
same frames, so the difference shows what time adds.

    python emma_frames.py                      # the score of runs/demo/emma/best.pt
    python emma_frames.py --config my.yaml --checkpoint somewhere/best.pt

A video is left out, and named, if EMMA or the ViT that it started from was trained on its scene.
"""

import dataclasses
from pathlib import Path
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
    path: str | Path          # of the checkpoint
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
    return Trained(path, model.to(team.device).eval(), tasks, config, team, record, changed)


# ---- The score on the validation videos

class Video(NamedTuple):
    """A validation video of one or more tasks."""
    name: str
    frames: VideoFrames
    labels: dict[str, np.ndarray]        # {task name: as `read_labels` gives them}

    @property
    def length(self) -> int:
        """Up to the last image and the last label."""
        return max(int(self.frames.numbers[-1]), *map(len, self.labels.values()))


def open_videos(trained: Trained, tasks) -> tuple[list[Video], dict[str, dict[str, str]]]:
    """The official validation videos of some tasks, each once, and {task name: {video: why it is left
    out}}."""
    config, record, videos = trained.config, trained.record, {}
    folders, left_out = find_videos(config.data.frames), {task.name: {} for task in tasks}
    seen = {scene(name) for name in record["data"]["training videos"] + tuned_on(record)}
    for task in tasks:
        for name, file in split(config.data.labels, task, 0)[1].items():
            if scene(name) in seen:
                left_out[task.name][name] = "EMMA was trained on its scene"
                continue
            if name not in videos:
                frames = VideoFrames(folders[name], config.vit.image_size) if name in folders else []
                videos[name] = Video(name, frames, {})
            labels = read_labels(file, task)
            if len(labels) and len(videos[name].frames):
                videos[name].labels[task.name] = labels
            else:
                left_out[task.name][name] = "no frames" if len(labels) else "no labels"
    return [video for video in videos.values() if video.labels], left_out


def video_sums(trained: Trained, tasks) -> dict[str, tuple[list[str], np.ndarray]]:
    """{task name: the names of its validation videos, the sums of its metric for each of them (videos, ...)},
    over all processes. Each video is read once for all tasks.

    A labelled frame without a face counts, with the outputs of the frame before it, as it does for a segment
    model. Says which videos are left out. Raises ValueError if EMMA was not trained on a task, or if one has
    no video left.
    """
    for task in tasks:
        if task not in trained.tasks:
            raise ValueError(f"{trained.path}: trained without {task.name} "
                             f"(emma.weights={trained.config.emma.weights})")
    (videos, left_out), team = open_videos(trained, tasks), trained.team
    place = {video.name: i for i, video in enumerate(videos)}
    sums = {task.name: np.zeros((len(videos), *nothing_counted(task).shape)) for task in tasks}
    faces, mine = np.zeros(len(videos)), shared_out(videos, team, lambda video: video.length)
    progress = Progress(sum(video.length for video in mine), "frames", team)
    for video in mine:
        outputs, noface = trained.predict(video.frames, video.length, progress)                   # (T, 22)
        faces[place[video.name]] = (~noface).sum()
        for name, labels in video.labels.items():
            of_task = outputs_of(TASKS[name], outputs)[:len(labels)]                              # (T, K)
            sums[name][place[video.name]] = TASKS[name].metric.count(of_task, *targets(labels, TASKS[name]))
    faces, found = all_sum(torch.from_numpy(faces)).numpy(), {}
    for task in tasks:
        of_task = all_sum(torch.from_numpy(sums[task.name])).numpy()
        labelled = [i for i, video in enumerate(videos) if task.name in video.labels]
        scored = [i for i in labelled if faces[i]]
        left_out[task.name] |= {videos[i].name: "no readable face" for i in labelled if not faces[i]}
        if left_out[task.name]:
            team.say(f"  left out of {task.name}: {reasons(left_out[task.name])}")
        if not scored:
            raise ValueError(f"{trained.path}: no validation video of {task.name} can be scored; check "
                             "data.frames")
        found[task.name] = [videos[i].name for i in scored], of_task[scored]
    return found


def nothing_counted(task: Task) -> np.ndarray:
    """The sums of no frame at all."""
    outputs = np.zeros((0, len(task.outputs)))
    target = outputs[:, 0] if task.one_class else outputs
    return task.metric.count(outputs, target, target.astype(bool))


def main(config, team, checkpoint=""):
    """Print the score of each task that EMMA was trained on and that has labels here."""
    path = checkpoint or config.folder("emma") / "best.pt"
    if not checkpoint and not finished(path.parent):
        raise missing(path, "train_emma.py", config)
    trained = load(path, config, team)
    for name, (_, was, now) in trained.changed.items():
        team.say(f"  {name}={was} as in {path}; the configuration has {now}")
    tasks = [task for task in trained.tasks if has_labels(config.data.labels, task)] or trained.tasks
    team.say(f"{path}, each frame by itself")
    for name, (names, sums) in video_sums(trained, tasks).items():
        team.say(f"\n{len(names)} validation videos\n{score_table(TASKS[name], sums, comparable=False)}")


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__, checkpoint={"default": "", "metavar": "FILE", "help": "default: the run's emma/best.pt"})
    launch(main, config, options.checkpoint)
