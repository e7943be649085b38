"""Stage 3: one feature per frame with the fine-tuned ViT (paper §3.2: "visual features f_i").

    python extract_features.py                                          # the demo
    torchrun --nproc_per_node=2 extract_features.py --config my.yaml    # your copy of Aff-Wild2

Writes to runs/<config>/features, for each video: <video>.npy, float16 (frames, D), and <video>.noface.npy,
bool (frames,), True where there was no readable face image. Such a frame repeats the feature of the frame
before it (at the start: after it), in training, validation and test alike; the authors' code repeats in
training and uses zeros at test. Row i belongs to frame i + 1. Unlabelled (test) videos are extracted too.

A video is written under a temporary name and renamed when whole, so a stopped run goes on where it was.
videos.json lists all videos with what they were made from: a new or changed video, or one whose file was
lost, is extracted by the next start, and the others are kept. In memory are the features of one video, 1.5 kB
a frame with ViT-B, and the images that the workers (`run.workers`) read ahead: two batches of
`features.batch` each; without workers at most 256 MB of images (`data.Images`).
"""

import json
import zlib

import numpy as np

from data import noface_path
from engine.checkpoints import read_json, write_array, write_text
from engine.config import from_command_line
from engine.run import OTHER_RUN
from engine.training import Progress
from images import check_ends, find_videos, last_of, sizes
from labels import longest
from pipeline import begun, open_run, start
from scoring import extractor


def main(config, team):
    """Extract the features of all videos, or of those that are left, new or changed."""
    run = open_run("features", config, team)

    # data: what is there now, and what was when this began
    videos, lines = find_videos(config.data.frames)
    table, more = to_extract(config.data.labels, videos)
    run.same_on_all_machines(table)
    known = team.agree(begun(run.folder) and read_json(run.folder / "videos.json") or {})
    gone = sorted(video for video in known.keys() - table.keys() if "faces" not in known[video])
    if gone:                                        # not yet extracted, or not known to be
        raise ValueError(f"{run.folder}: {len(gone)} videos were there when this began and are gone: "
                         f"{', '.join(gone[:5])}; bring them back, or begin {OTHER_RUN}")
    left = []                                       # what is new, changed or lost, longest first
    for video in sorted(table, key=lambda video: (-table[video]["frames"], video)):
        before, path = known.get(video, {}), run.folder / f"{video}.npy"
        written = before.get("faces") == 0 or path.exists() and noface_path(path).exists()
        if before | table[video] != before or not written:
            left.append(video)
    left = team.agree(left)
    if run.finished and not left:
        return team.say(f"{run.folder} is finished; nothing to do")

    # model
    look, origin, said = extractor(config, team)
    run.remember({}, origin)
    known |= {video: table[video] for video in left}
    if team.rank == 0:                              # what is out of date goes, what is to be made is listed
        (run.folder / "metrics.json").unlink(missing_ok=True)
        for video in left:
            (run.folder / f"{video}.npy").unlink(missing_ok=True)
            noface_path(run.folder / f"{video}.npy").unlink(missing_ok=True)
        write_text(run.folder / "videos.json", json.dumps(known, indent=1))
    team.wait()

    # loop: what is left is shared anew, longest first, so that no process waits long for another's last video
    mine = left[team.rank::team.world]
    team.say("\n".join([*lines, *more, f"extracting {config.vit.dim} numbers per frame from {len(left)} of "
                        f"{len(table)} videos, {sum(table[video]['frames'] for video in left):,} frames, on "
                        f"{team.device}", f"  ViT from {said}"]))
    progress = Progress(sum(table[video]["frames"] for video in mine), "frames", team)
    for video in mine:
        path, length = run.folder / f"{video}.npy", table[video]["frames"]
        features, noface = look(videos[video], length, progress)
        if not noface.all():                        # nothing is written for a video without any face
            write_array(noface_path(path), noface)
            write_array(path, features)
    team.wait()
    finish(run, known)


def to_extract(labels, videos) -> tuple[dict[str, dict], list[str]]:
    """What there is to extract: {video: {"frames", "images", "names", "sizes"}}, and lines about what is odd.

    `frames`: its longest label file or its last image, whichever is later. `images`: how many there are.
    `names`: a checksum of their numbers. `sizes`: one of the sizes of the first and the last file. Raises
    ValueError as `check_ends`.
    """
    rows = longest(labels)
    table = {video: {"frames": max(frames.last, rows[video]), "images": len(frames),
                     "names": zlib.crc32(frames.numbers.tobytes()),
                     "sizes": sizes([frames.where(0), frames.where(-1)])} for video, frames in videos.items()}
    return table, check_ends(last_of(videos), rows)


def finish(run, table: dict):
    """Count the faces of each video, and mark the stage as finished."""
    if run.team.rank == 0:
        for video, row in table.items():
            path = noface_path(run.folder / f"{video}.npy")
            row["faces"] = int((~np.load(path)).sum()) if path.exists() else 0
        write_text(run.folder / "videos.json", json.dumps(table, indent=1))
    table = run.team.agree(table)
    frames = sum(row["frames"] for row in table.values())
    without = frames - sum(row["faces"] for row in table.values())
    empty = sum(row["faces"] == 0 for row in table.values())
    run.finish({"videos": len(table) - empty, "frames": frames, "frames_without_face": without,
                "videos_without_any_face": empty})
    run.team.say(f"features are finished: {frames:,} frames, {without:,} of them without a face image, "
                 f"in {run.folder}")


if __name__ == "__main__":
    start("features", main, from_command_line(__doc__)[0])
