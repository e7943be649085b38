"""EMMA: expressions, action units, valence and arousal of single frames, learned together.

The second paper's system for ABAW 4's multi-task challenge: network, losses and score are in `emma.py`, the
labels in `s_aff_wild2.py`. The ViT starts from the MAE of train_pretrain.py and is trained whole. The CNN of
train_stills.py stays as it is.

    python train_emma.py                                                    # the demo
    torchrun --nproc_per_node=2 train_emma.py --config my.yaml              # from configs/emma.yaml
    python train_emma.py --set run.name=no_cnn --set emma.cnn=none          # without the CNN, to compare
    python train_emma.py --set run.name=au_alone --set emma.weights=[0,0,1]      # one task alone

Writes to runs/<config>/emma: best.pt (vit.*, head.*, va_head.*, cnn.* under the key `model`, of the epoch
with the best validation score), last.pt, log.csv, curves.png, scores.txt, metrics.json, video_sums.json.

log.csv, one row per epoch: `loss` the sum of the three terms; `score` of the validation frames, P_MTL, the
sum of `va` (mean CCC), `expr` (macro F1) and `au` (mean F1, thresholds 0.5), each a column; `val_unreadable`
frames that could not be decoded; `gradient_norm` (before clipping), `lr` (the head's), `unreadable`,
`seconds` as in train_pretrain.py. A task of weight 0 is neither trained nor counted.

The batch is not cut into pieces: CCC is not a sum over pieces.
"""

import dataclasses
import json
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from checkpoints import load_vit, load_weights, read_checkpoint, write_text
from config import from_command_line
from distributed import all_sum
from emma import EMMA, LABELS, OUTPUTS, by_task, count, emma_losses
from frames import video_folders
from images import normalise
from labels import TASKS
from made_of import find_input, input_there, read_record, settings_of
from run import Run
from s_aff_wild2 import FILES, MultiTaskFrames, pos_weight, read_annotations
from score_table import score_table
from stills import load_cnn
from training import (adamw, augment, effective_batch, gradient_norm, seed_dropout,
                      set_learning_rate)
from validation import batches_of
from vit import VisionTransformer

SOURCE, CNN = ("emma.start", "pretrain"), ("emma.cnn", "stills")     # inputs: a setting, a stage


def main(config, team):
    """Train EMMA, or go on with it, until runs/<config>/emma is finished."""
    # configuration
    e, seed = config.emma, config.run.seed
    settings = settings_of(config, "synthetic", "vit", "emma", "run.seed")
    run = Run("emma", config, team, settings, SOURCE)
    trained = [task for task, weight in zip(TASKS.values(), e.weights) if weight]

    # data
    train, val = open_frames(config, team)
    cnn_path, cnn_found = find_cnn(config, team, run)
    found = {"training": train.fingerprint(), "validation": val.fingerprint(),
             "training videos": train.used, "cnn": cnn_found}
    if run.still_finished(found):
        return team.say(f"\n{(run.folder / 'scores.txt').read_text()}")
    team.say(f"  training: {train.summary()}\n  validation: {val.summary()}")

    # model and optimiser
    start, origin = find_input(config, team, *SOURCE, "last.pt", "train_pretrain.py")
    torch.manual_seed(seed)
    cnn = None
    if cnn_path:
        cnn, said = load_cnn(cnn_path)
        team.say(f"  CNN: {said}")
    model = EMMA(VisionTransformer(**dataclasses.asdict(config.vit), drop_path=e.drop_path), cnn)
    if e.start == "none":
        team.say("  the ViT starts from random weights, as asked")
    else:
        team.say(f"  the ViT starts from {start}; {load_vit(model.vit, start)}")
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    team.say(f"EMMA: {parameters:,} parameters to train, on {', '.join(task.name for task in trained)}, "
             f"{e.epochs} epochs; {effective_batch(e.batch, 1, team)}")
    ddp = team.parallel(model, config.run.compile)
    optimizer = adamw(nn.ModuleDict({"vit": model.vit, "head": model.head}), e.lr, e.betas, e.weight_decay,
                      e.layer_decay)
    optimizer.add_param_group({"params": model.va_head.parameters(), "weight_decay": 0.0})
    run.begin(model, optimizer, train, e.batch, e.epochs, found, origin)

    # loop
    weights = torch.tensor(e.weights, device=team.device)
    positives = pos_weight(train.labels).to(team.device)             # of each AU: negatives / positives
    for epoch in range(run.epoch, e.epochs):
        train.epoch = epoch
        model.train()
        for step, (images, labels, _, problems) in run.batches():
            set_learning_rate(optimizer, step, run.steps * e.epochs, e.warmup_epochs * run.steps, e.lr)
            optimizer.param_groups[-1]["lr"] = e.va_lr               # the VA head's has no schedule
            _, unreadable = run.count_readable(images, problems)
            seed_dropout(seed, epoch, run.step, team.rank)
            images, labels = (part.to(team.device, non_blocking=True) for part in (images, labels))
            optimizer.zero_grad(set_to_none=True)
            with team.autocast():
                outputs = ddp(normalise(images))                     # (B, 3, height, width) -> (B, 22)
            loss = (weights * emma_losses(outputs.float(), labels, positives)).sum()      # (3,) -> scalar
            loss.backward()                                          # of the whole batch, on every process
            norm = gradient_norm(model)
            if e.clip:
                clip_grads_with_norm_(model.parameters(), e.clip, norm)
            optimizer.step()
            run.end_step(loss, norm, unreadable=unreadable)
        batches = run.unless_stopped(batches_of(val, config, team))
        sums, val_unreadable = validate(model, batches, len(val.videos), team)
        run.obey_signals()
        scores = scores_of(sums, trained)
        run.keep_best(sum(scores.values()))
        run.end_epoch(", ".join(f"{name} {score:.3f}" for name, score in scores.items()),
                      score=sum(scores.values()), **scores, val_unreadable=val_unreadable)
    run.end()
    finish(run, model, trained, val, config, team)


# ---- Data

def open_frames(config, team) -> tuple[MultiTaskFrames, MultiTaskFrames]:
    """The training and the validation frames of s-Aff-Wild2. Raises ValueError if data.s_aff_wild2 is not
    given, or if a video is in both."""
    if not config.data.s_aff_wild2:
        raise ValueError(f"data.s_aff_wild2 is not given; it holds {' and '.join(FILES)}")
    videos, merged = video_folders(config.data.frames)
    for line in merged:
        team.say(line)
    train_file, val_file = (read_annotations(f"{config.data.s_aff_wild2}/{file}") for file in FILES)
    both = sorted(set(val_file.videos) & set(train_file.videos))
    if both:
        raise ValueError(f"{val_file.path}: {len(both)} of its videos are in {train_file.path} too, such as "
                         f"{', '.join(both[:5])}; a score on them says nothing")
    size = (config.vit.image_size,) * 2
    crop = partial(augment, size=size, seed=config.run.seed, smallest_crop=config.emma.smallest_crop)
    return (MultiTaskFrames(train_file, videos, config.vit.image_size, crop),
            MultiTaskFrames(val_file, videos, config.vit.image_size))


def find_cnn(config, team, run):
    """The CNN's checkpoint, or None, and what it is, for the record. EMMA's weights hold the CNN, so a
    finished EMMA stays valid without its file."""
    if config.emma.cnn == "none":
        return None, "none"
    if run.finished and not team.agree(input_there(config, *CNN)):
        return None, read_record(run.folder)["data"]["cnn"]
    path, record = find_input(config, team, *CNN, "best.pt", "train_stills.py")
    return path, f"checksum {record['checksum']}"


# ---- Scoring

@torch.no_grad()
def validate(model, batches, videos: int, team) -> tuple[np.ndarray, int]:
    """Over all processes: the sums of each video (videos, 124), and how many frames could not be read."""
    sums = np.zeros((videos, len(count(np.zeros((0, OUTPUTS)), np.zeros((0, LABELS))))))
    unreadable = 0
    model.eval()
    for images, labels, video, problems in batches:
        with team.autocast():
            outputs = model(normalise(images.to(team.device, non_blocking=True)))
        outputs, labels, video = outputs.float().cpu().numpy(), labels.numpy(), video.numpy()
        for v in np.unique(video):
            sums[v] += count(outputs[video == v], labels[video == v])
        unreadable += len(problems)
    return all_sum(torch.from_numpy(sums)).numpy(), int(all_sum(torch.tensor(unreadable)))


def scores_of(sums, trained) -> dict[str, float]:
    """The score of each trained task. Shape: sums (videos, 124)."""
    of_task = by_task(sums.sum(axis=0))
    return {task.name: float(task.metric.score(of_task[task.name]).mean()) for task in trained}


def finish(run, model, trained, val, config, team):
    """Score the best epoch's weights on every validation frame, and tell the score."""
    load_weights(model, read_checkpoint(run.folder / "best.pt")["model"], run.folder)
    sums, unreadable = validate(model, batches_of(val, config, team), len(val.videos), team)
    scores, of_task = scores_of(sums, trained), by_task(sums)
    chance = {task.name: task.metric.chance(of_task[task.name].sum(axis=0)).mean() for task in trained}
    names = " + ".join(f"{scores[task.name]:.3f} ({task.metric.name})" for task in trained)
    tables = [score_table(task, of_task[task.name], comparable=False) for task in trained]
    total = "P_MTL" if len(trained) == len(TASKS) else "score"
    text = "\n\n".join([*tables, f"{total} {sum(scores.values()):.3f} = {names}; chance "
                        f"{sum(chance.values()):.3f}; {len(val):,} validation frames, "
                        f"{unreadable:,} of them cannot be read"])
    if team.rank == 0:
        write_text(run.folder / "scores.txt", f"{text}\n")
        write_text(run.folder / "video_sums.json", json.dumps({"videos": val.videos, "sums": sums.tolist()}))
    run.finish({"score": sum(scores.values()), **scores, "chance": chance, "val_frames": len(val),
                "val_unreadable": unreadable},
               chance={"score": sum(chance.values()), **chance})
    team.say(f"\n{text}\nwritten to {run.folder}")


if __name__ == "__main__":
    import pipeline
    pipeline.run("train_emma", from_command_line(__doc__)[0])
