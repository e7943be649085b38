"""Stage 2: fine-tuning the ViT on the expression frames of Aff-Wild2 (paper §3.1, §4.1.1).

The MAE's decoder is gone; fully connected layers take its place, and the whole ViT is trained. Afterwards
it is the feature extractor of every task. `finetune.fold` says whose training videos it sees: those of the
official split (0), or of a fold (1 to 4, splits.py; folds.py runs them all).

    python train_finetune.py                                           # the demo
    torchrun --nproc_per_node=2 train_finetune.py --config my.yaml     # your copy of Aff-Wild2
    python train_finetune.py --set run.name=scratch --set finetune.start=none     # without MAE, to compare

`--set finetune.start=mae_pretrain_vit_base.pth` starts from a ViT-B/16 of the reference MAE, for a
configuration of that size. Writes to runs/<config>/finetune: best.pt (vit.* and head.* under the key
`model`, of the epoch with the best validation macro F1), last.pt, log.csv, curves.png, metrics.json.

log.csv, one row per epoch: `loss` cross-entropy of the training frames; `val_f1` macro F1 of single frames
of the validation videos, every `finetune.every`-th; `val_unreadable` frames of those that could not be
decoded; `gradient_norm` (before clipping), `lr` (the head's), `unreadable`, `seconds` as in
train_pretrain.py.
"""

import math
from functools import partial

import torch
from torch.nn.utils import clip_grads_with_norm_

from checkpoints import load_vit, load_weights, read_checkpoint
from config import from_command_line
from data import ExprFrames
from distributed import all_sum
from features import build
from frames import video_folders
from images import normalise
from labels import EXPR
from losses import expr_loss
from made_of import find_input, settings_of
from run import Run
from splits import split
from training import (adamw, augment, effective_batch, gradient_norm, in_pieces, pieces, seed_dropout,
                      set_learning_rate, vit_bytes)
from validation import batches_of, count_classes

SOURCE = "finetune.start", "pretrain"        # where the input is looked for: a setting, a stage


def main(config, team):
    """Fine-tune, or go on with it, until runs/<config>/finetune is finished."""
    # configuration
    f, seed = config.finetune, config.run.seed
    settings = settings_of(config, "synthetic", "vit", "finetune", "run.seed")
    run = Run("finetune", config, team, settings, SOURCE)

    # data
    train, val = open_frames(config, team)
    found = {"training": train.fingerprint(), "validation": val.fingerprint(),
             "training videos": train.videos}
    if run.still_finished(found):
        return
    team.say(f"  training: {train.summary()}\n  validation: {val.summary()}")

    # model and optimiser
    start, origin = find_input(config, team, *SOURCE, "last.pt", "train_pretrain.py")
    torch.manual_seed(seed)
    model = build(config)
    if f.start == "none":
        team.say("  the ViT starts from random weights, as asked")
    else:
        team.say(f"  the ViT starts from {start}; {load_vit(model.vit, start)}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bytes_each = vit_bytes(math.prod(model.vit.patch_embed.grid) + 1, config.vit.dim, config.vit.depth)
    count = pieces(math.ceil(f.batch / team.world), bytes_each, parameters, team.device,
                   config.run.largest_piece)
    team.say(f"fine-tuning {parameters:,} parameters for {f.epochs} epochs of {len(train):,} frames; "
             f"{effective_batch(f.batch, count, team)}")
    ddp = team.parallel(model, config.run.compile)
    optimizer = adamw(model, f.lr, f.betas, f.weight_decay, f.layer_decay)
    run.begin(model, optimizer, train, f.batch, f.epochs, found, origin)

    # loop
    for epoch in range(run.epoch, f.epochs):
        train.epoch = epoch
        model.train()
        for step, (images, labels, problems) in run.batches():
            set_learning_rate(optimizer, step, run.steps * f.epochs, f.warmup_epochs * run.steps, f.lr)
            readable, unreadable = run.count_readable(images, problems)
            seed_dropout(seed, epoch, run.step, team.rank)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=team.device)
            for x, y in in_pieces(ddp, count, images, labels):
                x, y = x.to(team.device, non_blocking=True), y.to(team.device, non_blocking=True)
                with team.autocast():
                    logits = ddp(normalise(x))
                part = expr_loss(logits, y, y >= 0, max(readable, 1))    # its share of the whole batch's mean
                part.backward()
                loss += part.detach()
            loss = all_sum(loss)
            norm = gradient_norm(model)
            if f.clip:
                clip_grads_with_norm_(model.parameters(), f.clip, norm)
            optimizer.step()
            run.end_step(loss, norm, unreadable=unreadable)
        batches = run.unless_stopped(batches_of(val, config, team))
        sums, val_unreadable = count_classes(model.eval(), batches, len(EXPR.outputs), team)
        run.obey_signals()
        f1 = EXPR.metric.score(sums).mean()
        run.keep_best(f1)
        run.end_epoch(f"validation macro F1 of single frames {f1:.3f}", val_f1=f1,
                      val_unreadable=val_unreadable)
    run.end()
    finish(run, model, train, val, config, team)


def open_frames(config, team) -> tuple[ExprFrames, ExprFrames]:
    """The training and the validation frames, every `finetune.every`-th of both."""
    f, size = config.finetune, config.vit.image_size
    videos, merged = video_folders(config.data.frames)
    for line in merged:
        team.say(line)
    train_files, val_files = split(config.data.labels, EXPR, f.fold)
    crop = partial(augment, size=(size, size), seed=config.run.seed, smallest_crop=f.smallest_crop)
    return (ExprFrames(train_files, videos, size, f.every, crop),
            ExprFrames(val_files, videos, size, f.every))


def finish(run, model, train, val, config, team):
    """Score the best epoch's weights on every validation frame."""
    load_weights(model, read_checkpoint(run.folder / "best.pt")["model"], run.folder)
    val.every = 1
    sums, unreadable = count_classes(model.eval(), batches_of(val, config, team), len(EXPR.outputs), team)
    f1, scored = EXPR.metric.score(sums), int(sums.sum())
    run.finish({"val_macro_f1": f1.mean(), "val_f1": f1.tolist(), "val_frames": scored,
                "val_unreadable": unreadable, "train_frames": len(train.rows)},
               chance={"loss": EXPR.zero_loss, "val_f1": EXPR.metric.chance(sums).mean()})
    team.say(f"fine-tuning is finished: macro F1 {f1.mean():.3f} on {scored:,} single validation frames "
             f"({unreadable:,} more cannot be read), written to {run.folder}")


if __name__ == "__main__":
    import pipeline
    pipeline.run("train_finetune", from_command_line(__doc__)[0])
