"""A network that learns the expressions of still faces: EMMA's CNN, or a ViT, on AffectNet's labels.

DAN by default; `stills.network` may be resnet18, its trunk alone, or vit. Every class comes equally often in
training (`stills.LabelledStills`). The second paper's EMMA takes the CNN and does not train it further.

    python train_stills.py                                                    # the demo's ResNet-18
    torchrun --nproc_per_node=2 train_stills.py --config my.yaml              # from configs/emma.yaml
    python train_stills.py --set run.name=dan --set stills.network=dan \\
        --set stills.start=runs/demo/stills/best.pt                           # DAN, from the trunk of that
    python train_stills.py --set run.name=vit --set stills.network=vit \\
        --set stills.start=runs/demo/pretrain/last.pt                         # a ViT, from its MAE

Writes to runs/<config>/stills: best.pt (under the key `model`, of the epoch with the best validation macro
F1), last.pt, log.csv, curves.png, metrics.json.

log.csv, one row per epoch: `loss` cross-entropy, for DAN with its two other losses; `val_f1` macro F1 of the
sets' own validation faces; `val_unreadable` faces of those that could not be decoded; `gradient_norm` (before
clipping), `lr`, `unreadable`, `seconds` as in train_pretrain.py.

The batch is not cut into pieces: BatchNorm and DAN's partition loss are no sums over pieces. A step in which
fewer than two faces can be read is left out, as may be the last one of an epoch.
"""

import torch
from torch.nn.utils import clip_grads_with_norm_

from checkpoints import load_weights, read_checkpoint
from config import from_command_line
from dan import affinity_loss, partition_loss
from images import normalise
from labels import EXPR, EXPRESSIONS
from losses import expr_loss
from made_of import given_record, settings_of
from run import Run
from score_table import class_table
from stills import LabelledStills, build, fill, labelled_sets
from training import adamw, effective_batch, gradient_norm, seed_dropout, set_learning_rate
from validation import batches_of, count_classes

SOURCE = "stills.start", ""                  # where the input is looked for: a setting, and no stage


def main(config, team):
    """Train the network, or go on with it, until runs/<config>/stills is finished."""
    # configuration
    s, seed = config.stills, config.run.seed
    sections = ("vit", "finetune.token", "finetune.hidden", "finetune.dropout") if s.network == "vit" else ()
    settings = settings_of(config, "synthetic", "stills", "run.seed", "vit.image_size", "data.affectnet_2017",
                           "data.affectnet_2021", "data.affectnet_crop", *sections)
    run = Run("stills", config, team, settings, SOURCE)

    # data
    train, val = open_faces(config)
    found = {"training": train.fingerprint(), "validation": val.fingerprint()}
    if run.still_finished(found):
        return
    team.say(f"  training: {train.summary()}\n  validation: {val.summary()}")
    if s.batch == 1:
        raise ValueError("stills.batch: got 1, expected 2 or more: BatchNorm takes a deviation over a batch")

    # model and optimiser
    given = s.start not in ("", "none")
    origin = given_record(s.start if given else "none")
    torch.manual_seed(seed)
    model = build(config)
    said = f"{s.start}; {fill(model, s.network, s.start)}" if given else "random weights"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    team.say(f"  start: {said}\n{s.network}: {parameters:,} parameters, {s.epochs} epochs of "
             f"{len(train):,} faces; {effective_batch(s.batch, 1, team)}")
    ddp = team.parallel(model)
    scores_of = model.dan if s.network == "dan" else model             # without what only its losses take
    optimizer = adamw(model, s.lr, s.betas, s.weight_decay, s.layer_decay)
    run.begin(model, optimizer, train, s.batch, s.epochs, found, origin)

    # loop
    nothing = torch.zeros((), device=team.device)
    for epoch in range(run.epoch, s.epochs):
        train.epoch = epoch
        model.train()
        for step, (images, labels, problems) in run.batches():
            set_learning_rate(optimizer, step, run.steps * s.epochs, s.warmup_epochs * run.steps, s.lr)
            readable, unreadable = run.count_readable(images, problems)
            if readable < 2:                                           # BatchNorm has no deviation of one
                run.end_step(nothing, nothing, unreadable=unreadable)
                continue
            seed_dropout(seed, epoch, run.step, team.rank)
            images, labels = (part.to(team.device, non_blocking=True) for part in (images, labels))
            optimizer.zero_grad(set_to_none=True)
            with team.autocast():
                outputs = ddp(normalise(images))
            if s.network == "dan":
                scores, features, heads = outputs                      # (B, 8), (B, D), (B, K, D)
                loss = (expr_loss(scores, labels, labels >= 0)
                        + affinity_loss(features, labels, labels >= 0, model.centres) + partition_loss(heads))
            else:
                loss = expr_loss(outputs, labels, labels >= 0)         # of the whole batch, on every process
            loss.backward()
            norm = gradient_norm(model)
            if s.clip:
                clip_grads_with_norm_(model.parameters(), s.clip, norm)
            optimizer.step()
            run.end_step(loss, norm, unreadable=unreadable)
        model.eval()
        batches = run.unless_stopped(batches_of(val, config, team))
        sums, val_unreadable = count_classes(scores_of, batches, len(EXPRESSIONS), team)
        run.obey_signals()
        f1 = EXPR.metric.score(sums).mean()
        run.keep_best(f1)
        run.end_epoch(f"validation macro F1 {f1:.3f}", val_f1=f1, val_unreadable=val_unreadable)
    run.end()
    finish(run, model, scores_of, val, config, team)


def open_faces(config) -> tuple[LabelledStills, LabelledStills]:
    """The labelled training and validation faces of all sets that are given."""
    sets, size = labelled_sets(config.data), config.vit.image_size
    return (LabelledStills(sets, True, size, config.run.seed, config.stills.smallest_crop),
            LabelledStills(sets, False, size))


def finish(run, model, scores_of, val, config, team):
    """Score the best epoch's weights on every validation face, and tell the score."""
    load_weights(model, read_checkpoint(run.folder / "best.pt")["model"], run.folder)
    model.eval()
    sums, unreadable = count_classes(scores_of, batches_of(val, config, team), len(EXPRESSIONS), team)
    f1, chance = EXPR.metric.score(sums), EXPR.metric.chance(sums)
    network = config.stills.network
    at_chance = {} if network == "dan" else {"loss": EXPR.zero_loss}      # DAN's loss has two terms more
    run.finish({"val_macro_f1": f1.mean(), "val_f1": f1.tolist(), "chance": chance.mean(),
                "val_faces": int(sums.sum()), "val_unreadable": unreadable},
               chance={**at_chance, "val_f1": chance.mean()})
    team.say(f"\n{network} on {int(sums.sum()):,} validation faces ({unreadable:,} more cannot be read)\n"
             f"{class_table(EXPRESSIONS, sums)}\nwritten to {run.folder}")


if __name__ == "__main__":
    import pipeline
    pipeline.run("train_stills", from_command_line(__doc__)[0])
