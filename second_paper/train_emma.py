"""EMMA learns expressions, action units, valence and arousal of single frames together, from partial labels.

    python -m second_paper.train_emma                                          # the demo, from nothing
    torchrun --nproc_per_node=2 -m second_paper.train_emma --config my.yaml    # from configs/emma.yaml
    python -m second_paper.train_emma --set emma.cnn=none                      # without the CNN, to compare
    python -m second_paper.train_emma --set emma.weights=[0,0,1]               # one task alone

The ViT starts from an MAE; the CNN, of train_cnn.py, stays as it is (emma.py). Writes to runs/<config>/emma:
best.pt (vit.*, head.*, va_head.*, cnn.* under the key `model`, of the epoch with the best `score`), last.pt,
log.csv, curves.png, scores.txt, metrics.json. log.csv, one row per epoch: `loss` the sum of three terms;
`score` of the validation frames, P_MTL, the sum of `va` (mean CCC), `expr` (macro F1) and `au` (mean F1);
`val_unreadable` of these frames; the rest as in train_pretrain.py. A task of weight 0 is neither trained nor
counted. The batch is not cut into pieces: CCC is not a sum over pieces.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pictures
from data import Images
from datasets.s_aff_wild2 import (FILES, LabelledFrames, annotated, pos_weight, read_annotations,
                                  split_labels)
from engine.checkpoints import load_vit, write_text
from engine.config import from_command_line
from engine.training import adamw, clip_gradient
from images import find_videos, normalise
from labels import TASKS, keep_apart, scene
from metrics import score_table
from pipeline import find_input, folder, open_run, start
from scoring import count_images
from second_paper.cnn import load_cnn
from second_paper.emma import EMMA, SUMS, by_task, count, emma_losses, scores
from vit import VisionTransformer


def main(config, team):
    """Train EMMA, or go on with it, until runs/<config>/emma is finished."""
    e, seed, size = config.emma, config.run.seed, config.vit.image_size
    tasks = [task for task, weight in zip(TASKS.values(), e.weights) if weight]
    run = open_run("emma", config, team)
    stored, cnn_file = run.folder / "scores.txt", Path(e.cnn or folder("stills", config) / "best.pt")
    if run.finished and e.cnn != "none" and not team.agree(cnn_file.exists()):     # best.pt holds the CNN too
        return team.say(f"{run.folder} is finished; its CNN is gone\n\n{stored.read_text()}")

    # data
    (frames, val_frames), lines = labelled_frames(config.data, tasks)
    cnn_file, cnn_record = find_input(config, team, "emma.cnn")
    cnn_size = cnn_record.get("settings", {}).get("vit.image_size", size)
    if cnn_size != size:
        raise ValueError(f"{cnn_file}: learned from images of {cnn_size} pixels, vit.image_size is {size}")
    found = {"training": frames.fingerprint(), "validation": val_frames.fingerprint(),
             "training videos": frames.used, "cnn": f"checksum {cnn_record.get('checksum') or 'none'}"}
    if run.still_finished(found):
        return team.say(f"\n{stored.read_text()}")
    train = Images(frames, size, [frames.labels], seed, e.smallest_crop)
    val = Images(val_frames, size, [val_frames.labels, val_frames.video])

    # model and optimiser
    path, origin = find_input(config, team, "emma.start")
    torch.manual_seed(seed)
    cnn, cnn_said = (None, "none") if e.cnn == "none" else load_cnn(cnn_file)
    model = EMMA(VisionTransformer(**dataclasses.asdict(config.vit), drop_path=e.drop_path), cnn)
    said = load_vit(model.vit, path)
    ddp = team.parallel(model)
    optimizer = adamw(nn.ModuleDict({"vit": model.vit, "head": model.head}), e)
    optimizer.add_param_group({"params": model.va_head.parameters(), "weight_decay": 0.0, "fixed": e.va_lr})
    run.begin(model, optimizer, train, e, found, origin)
    team.say("\n".join([*lines, f"  CNN: {cnn_said}", f"  the ViT starts from {said}",
                        f"EMMA on {', '.join(task.name for task in tasks)}, {e.epochs} epochs; "
                        + run.effective_batch()]))

    # loop
    weights = torch.tensor(e.weights, device=team.device)
    positives = pos_weight(frames.labels).to(team.device)                # of each AU: negatives / positives
    for epoch in run.epochs():
        model.train()
        for batch in run.batches():
            images, labels = run.on_device(batch)
            optimizer.zero_grad(set_to_none=True)
            with team.autocast():
                outputs = ddp(normalise(images))                         # (B, 3, height, width) -> (B, 22)
            loss = (weights * emma_losses(outputs.float(), labels, positives)).sum()     # of the whole batch
            loss.backward()
            norm = clip_gradient(model, e.clip)
            optimizer.step()
            run.end_step(loss, norm)
        sums, unreadable = validate(run, val)
        of_task = scores(sums.sum(axis=0), tasks)
        run.keep_best(sum(of_task.values()))
        text = ", ".join(f"{name} {score:.3f}" for name, score in of_task.items())
        run.end_epoch(text, score=sum(of_task.values()), **of_task, val_unreadable=unreadable)
    run.end()
    finish(run, val, tasks)


def labelled_frames(data, tasks) -> tuple[list[LabelledFrames], list[str]]:
    """The frames to train on and those to validate on, and lines about them. Raises ValueError for files that
    share a video, or that have no label of one of the tasks at a frame with an image."""
    if not data.s_aff_wild2:
        raise ValueError(f"data.s_aff_wild2 is not given; it holds {' and '.join(FILES)}")
    videos, lines = find_videos(data.frames)
    files = [read_annotations(f"{data.s_aff_wild2}/{name}") for name in FILES]
    keep_apart(*(dict.fromkeys(file.videos, file.path) for file in files), str, "Remove the rows of one")
    both = sorted(set(map(scene, files[0].videos)) & set(map(scene, files[1].videos)))
    if both:
        lines.append(f"  warning: both files show {len(both)} scenes, such as {both[0]}: a score on them is "
                     "too high")
    parts = [LabelledFrames(file, videos) for file in files]
    for kind, file, part in zip(("training", "validation"), files, parts):
        lines.append(f"  {kind}: {part.summary()}")
        known = dict(zip(TASKS, split_labels(annotated(part.labels))))
        gone = [task.name for task in tasks if not known[task.name].any()]
        if gone:
            raise ValueError(f"{file.path}: no frame with an image has a label of {', '.join(gone)}; set the "
                             "weight of these in emma.weights to 0")
    return parts, lines


def validate(run, val: Images) -> tuple[np.ndarray, int]:
    """Over all processes: the sums of each video (videos, 124), and how many frames could not be read."""
    def count_videos(outputs, labels, video):
        sums = np.zeros((len(val.files.videos), SUMS))
        for v in np.unique(video):
            sums[v] = count(outputs[video == v], labels[video == v])
        return sums
    return count_images(run, run.model.eval(), val, count_videos)


def finish(run, val: Images, tasks):
    """Score the best epoch's weights on every validation frame, tell the score, and draw the curves."""
    run.load_best()
    sums, unreadable = validate(run, val)
    of_task, parts = scores(sums.sum(axis=0), tasks), by_task(sums)
    chance = {task.name: task.metric.chance(parts[task.name].sum(axis=0)).mean() for task in tasks}
    total, at_chance = sum(of_task.values()), sum(chance.values())
    text = "\n\n".join([*(score_table(task, parts[task.name], comparable=False) for task in tasks),
                        f"{'P_MTL' if len(tasks) == 3 else 'score'} {total:.3f}, chance {at_chance:.3f}; "
                        f"{len(val):,} validation frames, {unreadable:,} of them cannot be read"])
    if run.team.rank == 0:
        write_text(run.folder / "scores.txt", f"{text}\n")
        pictures.curves(run.folder, {"score": at_chance, **chance})
    run.finish({"score": total, **of_task, "chance": chance, "val_frames": len(val),
                "val_unreadable": unreadable, "videos": val.files.videos, "video_sums": sums.tolist()})
    run.team.say(f"\n{text}\nwritten to {run.folder}")


if __name__ == "__main__":
    start("emma", main, from_command_line(__doc__)[0])
