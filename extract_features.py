"""Stage 3: one feature per frame with the fine-tuned ViT (paper §3.2: "visual features f_i").

    python extract_features.py                                          # the demo
    torchrun --nproc_per_node=2 extract_features.py --config my.yaml    # your copy of Aff-Wild2

Writes to runs/<config>/features, for each video: <video>.npy, float16 (frames, D), and <video>.noface.npy,
bool (frames,), True where there was no readable face image. Such a frame repeats the feature of the frame
before it (at the start: after it), in training, validation and test alike; the authors' code repeats in
training and uses zeros at test. Row i belongs to frame i + 1. Unlabelled (test) videos are extracted too.

A video is written under a temporary name and renamed when whole, so a stopped run goes on where it was,
with the videos that it began with (last.pt tells how many); they are shared among the processes. In memory
are the features of one video, 1.5 kB a frame with ViT-B, and the images that the workers (`run.workers`)
read ahead: two batches of `features.batch` each.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler

from checkpoints import checksum, load_vit, write_array
from config import from_command_line
from data import VideoFrames, find_videos, frame_numbers, has_labels, label_files
from distributed import all_sum
from images import normalise
from labels import TASKS, read_labels
from run import clock, rate
from run_folder import RunFolder, missing, settings_of
from segments import noface_path
from training import loader
from vit import VisionTransformer


def video_lengths(labels, videos) -> dict[str, int]:
    """Frames of each video: its longest label file or its last image, whichever is later."""
    lengths = {video: int(frame_numbers(folder).max(initial=0)) for video, folder in videos.items()}
    for task in TASKS.values():
        if not has_labels(labels, task):
            continue
        for files in label_files(labels, task).values():
            for video, file in files.items():
                if video in lengths:
                    lengths[video] = max(lengths[video], len(read_labels(file, task)))
    return {video: length for video, length in lengths.items() if length}


def fill_gaps(features: np.ndarray, noface: np.ndarray):
    """Give each frame without a face the feature of the last frame before it that has one; at the start, of
    the first that has one. In place. Shape: features (T, D), noface (T,), not all True."""
    last = np.flatnonzero(~noface)[0]
    for t in range(len(features)):
        if noface[t]:
            features[t] = features[last]
        else:
            last = t


@torch.no_grad()
def extract(vit, frames: VideoFrames, length: int, path, config, team) -> np.ndarray:
    """Write a video's features to `path`, beside it the mask (T,) of frames without a face. -> mask

    Nothing is written for a video in which no frame has a readable face.
    """
    noface, problems = np.ones(length, bool), []
    features = np.zeros((length, config.vit.dim), np.float16)
    batches = BatchSampler(range(len(frames)), config.features.batch, drop_last=False)
    for images, rows, unreadable in loader(frames, batches, config.run.workers, team):
        problems += unreadable
        if len(rows):
            with team.autocast():
                f = vit.features(normalise(images.to(team.device)), config.finetune.token)      # (B, D)
            features[rows] = f.half().cpu().numpy()
            noface[rows] = False
    if problems:
        more = f" and {len(problems) - 1} more of this video" if len(problems) > 1 else ""
        print(f"  left out: {problems[0]}{more}", flush=True)
    if not noface.all():
        fill_gaps(features, noface)
        write_array(noface_path(path), noface)
        write_array(path, features)
    return noface


def main(config, team):
    """Extract the features of all videos, or of those that are left."""
    # configuration and input
    checkpoint = Path(config.features.checkpoint or config.folder("finetune") / "best.pt")
    if not config.features.checkpoint and not (checkpoint.parent / "metrics.json").exists():
        raise missing(checkpoint, "python train_finetune.py", config)
    settings = settings_of(config, "data.frames", "data.labels", "synthetic", "vit", "features.checkpoint",
                           "finetune.token")
    settings["checkpoint checksum"] = checksum(checkpoint)    # features of two checkpoints must not be mixed
    run = RunFolder("features", config, team, settings)
    if run.finished:
        return team.say(f"{run.folder} is finished; nothing to do")

    # data and model
    vit = VisionTransformer(**dataclasses.asdict(config.vit))
    keys = load_vit(vit, checkpoint)
    vit = vit.to(team.device).eval()
    videos = find_videos(config.data.frames)
    lengths = video_lengths(config.data.labels, videos)
    found = {"videos": len(lengths), "frames": sum(lengths.values())}
    if run.resume(found) is None:
        run.write("last.pt", {"data": found})                   # compared by the next start

    # loop: what is left is shared anew, longest first, so that no process waits long for another's last video
    order = sorted(lengths, key=lambda video: (-lengths[video], video))
    left = team.agree([video for video in order if not (run.folder / f"{video}.npy").exists()])
    mine = left[team.rank::team.world]
    kept = [video for video in order if video not in left][team.rank::team.world]
    size = config.vit.image_size
    ahead = 2 * max(config.run.workers, 1) * config.features.batch * size * size * 3 / 1e6
    team.say(f"extracting {config.vit.dim} numbers per frame from {len(left)} of {len(lengths)} videos, "
             f"{sum(lengths[video] for video in left):,} frames, on {team.device}; "
             f"at most {ahead:,.0f} MB of images wait in each process")
    team.say(f"  ViT from {checkpoint}; {keys}")
    masks = [np.load(noface_path(run.folder / f"{video}.npy")) for video in kept]
    began = printed = time.time()
    done, total = 0, sum(lengths[video] for video in mine)
    for video in mine:
        frames = VideoFrames(videos[video], size)
        masks.append(extract(vit, frames, lengths[video], run.folder / f"{video}.npy", config, team))
        done += lengths[video]
        if time.time() - printed > 5:
            printed, seconds = time.time(), time.time() - began
            left_over = clock((total - done) * seconds / done)
            team.say(f"  {done:,} of {total:,} frames  {rate(done, seconds)} frames/s  {left_over} left")

    # finish
    counts = torch.zeros(3, dtype=torch.int64)       # frames, frames without a face, videos without any face
    for mask in masks:
        counts += torch.tensor([len(mask), int(mask.sum()), int(mask.all())])
    frames, without, empty = all_sum(counts).tolist()
    run.finish({"videos": len(lengths) - empty, "frames": frames, "frames_without_face": without,
                "videos_without_any_face": empty})
    team.say(f"features are finished: {frames:,} frames, {without:,} of them without a face image, "
             f"in {run.folder}")


if __name__ == "__main__":
    import pipeline
    pipeline.run("extract_features", from_command_line(__doc__)[0])
