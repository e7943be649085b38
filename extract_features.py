"""Stage 3: one feature per frame with the fine-tuned encoder (paper §3.2: "visual features f_i").

    python extract_features.py
    torchrun --nproc_per_node=2 extract_features.py --config configs/paper.yaml

Writes to runs/<config>/features, for each video: <video>.npy, float16 (frames, D), and <video>.noface.npy, bool (frames,), True
where there was no readable face image. Such a frame repeats the feature of the frame before it (at the start: after it), in
training, validation and test alike; the authors' code repeats in training and uses zeros at test. Row i belongs to frame i + 1.

A video is written under a temporary name and renamed when whole, so a stopped run goes on where it was, with the videos that it
began with (last.pt tells how many); they are shared among the processes. In memory are the features of one video, 1.5 kB a frame
with ViT-B, and the batches of images that the workers (`run.workers`) have read ahead, two each.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import synthetic
import train_finetune
import training
from config import from_command_line
from data import COLUMNS, find_videos, frame_numbers, frame_path, has_labels, label_files, read_labels
from images import normalise, read_image, resize
from vit import VisionTransformer

DEMO_SECONDS = 9     # measured by benchmark.py on two cores


def video_lengths(config, videos) -> dict[str, int]:
    """Frames of each video: its longest label file or its last image, whichever is later. Unlabelled (test) videos count too."""
    lengths = {video: int(frame_numbers(folder).max(initial=0)) for video, folder in videos.items()}
    for task in COLUMNS:
        for files in label_files(config.data.labels, task).values() if has_labels(config.data.labels, task) else ():
            for video, file in files.items():
                if video in lengths:
                    lengths[video] = max(lengths[video], len(read_labels(file, task)))
    return {video: n for video, n in lengths.items() if n}


class Frames(Dataset):
    """The face images of one video. Item: (row, uint8 image (size, size, 3)), or (row, None) if it cannot be read."""

    def __init__(self, folder, size: int):
        self.folder, self.size, self.numbers = folder, (size, size), frame_numbers(folder)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        number = int(self.numbers[i])
        try:
            return number - 1, resize(read_image(frame_path(self.folder, number)), self.size)
        except ValueError:
            return number - 1, None

    @staticmethod
    def collate(items):
        """-> images (B, size, size, 3) uint8, their rows, rows of the images that cannot be read; B may be 0."""
        # As a tensor, images cross to this process in shared memory; as arrays, in a pipe, in which a worker whose parent was killed
        # would be stuck for ever.
        good = [image for _, image in items if image is not None]
        return (torch.from_numpy(np.stack(good)) if good else torch.zeros(0), [row for row, image in items if image is not None],
                [row for row, image in items if image is None])


@torch.no_grad()
def extract(encoder, folder, length: int, path, config, team) -> np.ndarray:
    """Write the features of one video to `path` and the mask of its frames without a face beside it. Returns the mask.

    Nothing is written for a video in which no frame has a readable face.
    """
    noface, unreadable = np.ones(length, bool), []
    features = np.zeros((length, config.encoder.dim), np.float16)
    frames = Frames(folder, config.encoder.image_size)
    for images, rows, bad in DataLoader(frames, config.features.batch, num_workers=config.run.workers, collate_fn=frames.collate):
        unreadable += bad
        if rows:
            with team.autocast():
                features[rows] = encoder.features(normalise(images.to(team.device)), config.finetune.token).half().cpu().numpy()
            noface[rows] = False
    if unreadable:
        print(f"  left out, not a readable image: {frame_path(folder, unreadable[0] + 1)}"
              + (f" and {len(unreadable) - 1} more of this video" if len(unreadable) > 1 else ""), flush=True)
    known, gaps = np.flatnonzero(~noface), np.flatnonzero(noface)
    if not len(known):
        return noface
    features[gaps] = features[known[np.searchsorted(known, gaps).clip(1) - 1]]     # the frame before; at the start the first known
    training.write_array(noface_path(path), noface)
    training.write_array(path, features)
    return noface


def noface_path(path: Path) -> Path:
    """<video>.npy -> <video>.noface.npy"""
    return path.with_name(f"{path.name[:-len('.npy')]}.noface.npy")


def main(config, team):
    """Extract the features of all videos, or of those that are left."""
    # configuration and input
    checkpoint = Path(config.features.encoder or config.folder("finetune") / "best.pt")
    if not config.features.encoder:
        training.provide(config, team, "" if (checkpoint.parent / "metrics.json").exists() else checkpoint, train_finetune.main,
                         "python train_finetune.py", train_finetune.DEMO_SECONDS)
    settings = training.settings_of(config, "data.frames", "data.labels", "drawn", "encoder", "features.encoder", "finetune.token")
    settings["encoder checksum"] = training.checksum(checkpoint)          # features of two encoders must not be mixed
    run = training.RunFolder(config.folder("features"), config, settings, team)
    if run.finished:
        return team.say(f"{run.folder} is finished; nothing to do")

    # data and model
    synthetic.provide(config, team)
    encoder = VisionTransformer(**dataclasses.asdict(config.encoder))
    keys = train_finetune.load_encoder(encoder, checkpoint)
    encoder = encoder.to(team.device).eval()
    videos = find_videos(config.data.frames)
    lengths = video_lengths(config, videos)
    found = {"videos": len(lengths), "frames": sum(lengths.values())}
    if run.resume(found) is None:
        run.save("last.pt", {"data": found})                 # compared by the next start

    # loop: what is left is shared anew, longest first, so that no process waits long for another's last video
    order = sorted(lengths, key=lambda v: (-lengths[v], v))
    left = team.agree([v for v in order if not (run.folder / f"{v}.npy").exists()])
    mine, kept = left[team.rank::team.world], [v for v in order if v not in left][team.rank::team.world]
    team.say(f"extracting {config.encoder.dim} numbers per frame from {len(left)} of {len(lengths)} videos, "
             f"{sum(lengths[v] for v in left):,} frames, on {team.device}")
    team.say(f"  encoder from {checkpoint}; {keys}")
    masks = [np.load(noface_path(run.folder / f"{v}.npy")) for v in kept]
    began = printed = time.time()
    done, total = 0, sum(lengths[v] for v in mine)
    for video in mine:
        masks.append(extract(encoder, videos[video], lengths[video], run.folder / f"{video}.npy", config, team))
        done += lengths[video]
        if time.time() - printed > 5:
            printed = time.time()
            rate = done / (printed - began)
            team.say(f"  {done:,} of {total:,} frames  {rate:,.0f} frames/s  {training.clock((total - done) / rate)} left")

    # finish
    counts = [sum(map(len, masks)), sum(mask.sum() for mask in masks), sum(mask.all() for mask in masks)]
    frames, without, empty = team.sum(counts).astype(int).tolist()
    run.finish({"videos": len(lengths) - empty, "frames": frames, "frames_without_face": without, "videos_without_any_face": empty})
    team.say(f"features are finished: {frames:,} frames, {without:,} of them without a face image, in {run.folder}")


if __name__ == "__main__":
    training.launch(main, from_command_line(__doc__)[0])
