"""Masked CoTEX: two ViTs learn expressions from drawn faces, and from each other; scored on photographs.

The second paper's system for ABAW 4's challenge of learning from synthetic data: network and loss are in
`cotex.py`, the faces in `class_folders.py`. Both views start from one MAE and see other patches of each face.

    python train_cotex.py                                           # the demo
    torchrun --nproc_per_node=2 train_cotex.py --config my.yaml     # from configs/cotex.yaml
    python train_cotex.py --set run.name=plain --set cotex.views=1 --set cotex.mask_ratio=0     # a plain ViT

Writes to runs/<config>/cotex: best.pt (views.0.*, views.1.* under the key `model`, of the epoch with the best
validation macro F1), last.pt, log.csv, curves.png, metrics.json.

log.csv, one row per epoch: `loss` mean cross-entropy of the views + λ · JS; `val_f1` macro F1 over the six
classes on the real faces, by the summed logits of all views; `val_unreadable` images of those that could not
be decoded; `gradient_norm` (before clipping), `lr` (the heads'), `unreadable`, `seconds` as in
train_pretrain.py.
"""

import dataclasses
import math
import os

import torch
from torch.nn.utils import clip_grads_with_norm_

from checkpoints import load_vit, load_weights, read_checkpoint
from class_folders import CLASSES, ClassFaces, class_folders
from config import from_command_line
from cotex import CoTEX, cotex_loss
from distributed import all_sum
from images import normalise
from made_of import find_input, settings_of
from metrics import CLASS_F1
from run import Run
from score_table import class_table
from training import (adamw, effective_batch, gradient_norm, in_pieces, pieces, seed_dropout,
                      set_learning_rate, vit_bytes)
from validation import batches_of, count_classes

SOURCE = "cotex.start", "pretrain"           # where the input is looked for: a setting, a stage


def open_faces(config):
    """The drawn faces, to train on, and the real ones, to score on: two FaceSets.

    Raises ValueError, naming the setting, if one of both is not given or not in class folders, or if they are
    the same folder, or one in the other.
    """
    given = {"data.drawn_faces": config.data.drawn_faces, "data.real_faces": config.data.real_faces}
    for name, path in given.items():
        if not path:
            raise ValueError(f"{name} is not given; it holds a folder for each of {', '.join(CLASSES)}")
    drawn, real = (os.path.realpath(path) for path in given.values())
    if os.path.commonpath([drawn, real]) in (drawn, real):
        raise ValueError(f"data.drawn_faces={config.data.drawn_faces} and data.real_faces="
                         f"{config.data.real_faces} share images; a score on faces that were trained on "
                         "says nothing, so give two folders apart")
    found = []
    for name, path in given.items():
        try:
            found.append(class_folders(path))
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return found


def main(config, team):
    """Train both views, or go on with it, until runs/<config>/cotex is finished."""
    # configuration
    c, seed = config.cotex, config.run.seed
    settings = settings_of(config, "synthetic", "vit", "cotex", "run.seed")
    run = Run("cotex", config, team, settings, SOURCE)

    # data
    drawn, real = open_faces(config)
    found = {"drawn faces": drawn.fingerprint(), "real faces": real.fingerprint()}
    if run.still_finished(found):
        return
    team.say(f"  training: {len(drawn):,} drawn faces\n  validation: {len(real):,} real faces")

    # model and optimiser
    start, origin = find_input(config, team, *SOURCE, "last.pt", "train_pretrain.py")
    torch.manual_seed(seed)
    model = CoTEX(len(CLASSES), c.views, c.mask_ratio, **dataclasses.asdict(config.vit),
                  drop_path=c.drop_path)
    if c.start == "none":
        team.say("  each view starts from random weights of its own, as asked")
    else:
        said = [load_vit(view.vit, start) for view in model.views]
        team.say(f"  each view starts from {start}; {said[0]}")
    size = config.vit.image_size
    train = ClassFaces(drawn, size, seed, c.smallest_crop, noise=(c.views, model.patches))
    val = ClassFaces(real, size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bytes_each = c.views * vit_bytes(model.kept + 1, config.vit.dim, config.vit.depth)
    share = math.ceil(c.batch / team.world)
    count = pieces(share, bytes_each, parameters, team.device, config.run.largest_piece)
    team.say(f"{c.views} views of {model.kept} of {model.patches} patches, {parameters:,} parameters, "
             f"{c.epochs} epochs; {effective_batch(c.batch, count, team)}")
    ddp = team.parallel(model, config.run.compile)
    optimizer = adamw(model, c.lr, c.betas, c.weight_decay, c.layer_decay)
    run.begin(model, optimizer, train, c.batch, c.epochs, found, origin)

    # loop
    for epoch in range(run.epoch, c.epochs):
        train.epoch = epoch
        model.train()
        for step, (images, labels, noise, problems) in run.batches():
            set_learning_rate(optimizer, step, run.steps * c.epochs, c.warmup_epochs * run.steps, c.lr)
            readable, unreadable = run.count_readable(images, problems)
            seed_dropout(seed, epoch, run.step, team.rank)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=team.device)
            for x, y, u in in_pieces(ddp, count, images, labels, noise):
                x, y, u = (part.to(team.device, non_blocking=True) for part in (x, y, u))
                with team.autocast():
                    logits = ddp(normalise(x), u)                                  # (V, B, M)
                part = cotex_loss(logits, y, y >= 0, c.js_weight, max(readable, 1))
                part.backward()
                loss += part.detach()
            loss = all_sum(loss)
            norm = gradient_norm(model)
            if c.clip:
                clip_grads_with_norm_(model.parameters(), c.clip, norm)
            optimizer.step()
            run.end_step(loss, norm, unreadable=unreadable)
        model.eval()
        batches = run.unless_stopped(batches_of(val, config, team))
        sums, val_unreadable = count_classes(model.classify, batches, len(CLASSES), team)
        run.obey_signals()
        f1 = CLASS_F1.score(sums).mean()
        run.keep_best(f1)
        run.end_epoch(f"macro F1 on real faces {f1:.3f}", val_f1=f1, val_unreadable=val_unreadable)
    run.end()
    finish(run, model, val, config, team)


def finish(run, model, val, config, team):
    """Score the best epoch's weights on every real face, and tell the score."""
    load_weights(model, read_checkpoint(run.folder / "best.pt")["model"], run.folder)
    model.eval()
    sums, unreadable = count_classes(model.classify, batches_of(val, config, team), len(CLASSES), team)
    f1, chance = CLASS_F1.score(sums), CLASS_F1.chance(sums)
    run.finish({"val_macro_f1": f1.mean(), "val_f1": f1.tolist(), "chance": chance.mean(),
                "confusion": sums.tolist(), "val_faces": int(sums.sum()), "val_unreadable": unreadable},
               chance={"loss": math.log(len(CLASSES)), "val_f1": chance.mean()})
    team.say(f"\nmasked CoTEX on {int(sums.sum()):,} real faces ({unreadable:,} more cannot be read)\n"
             f"{class_table(CLASSES, sums)}\nwritten to {run.folder}")


if __name__ == "__main__":
    import pipeline
    pipeline.run("train_cotex", from_command_line(__doc__)[0])
