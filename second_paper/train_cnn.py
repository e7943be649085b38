"""EMMA's CNN learns the expressions of AffectNet's faces: DAN, or its trunk alone (stills.network=resnet18).

    python -m second_paper.train_cnn                                            # the demo's ResNet-18
    torchrun --nproc_per_node=2 -m second_paper.train_cnn --config my.yaml      # from configs/emma.yaml
    python -m second_paper.train_cnn --set stills.network=dan --set stills.start=runs/demo/stills/best.pt

Writes to runs/<config>/stills: best.pt (under the key `model`, of the epoch with the best `val_f1`), last.pt,
log.csv, curves.png, metrics.json. log.csv: `loss` cross-entropy, for DAN with its two other losses; `val_f1`
macro F1 of the sets' own validation faces; `val_unreadable` of these; the rest as in train_pretrain.py. The
batch is not cut into pieces: BatchNorm and the partition loss are no sums over pieces.
"""

import math
from functools import partial
from zlib import crc32

import numpy as np
import torch

from data import Images
from datasets.faces import balanced_order, joined, labelled_sets
from engine.config import from_command_line
from engine.training import adamw, clip_gradient
from images import normalise
from labels import EXPR, EXPRESSIONS
from losses import expr_loss
from pipeline import find_input, open_run, start
from scoring import count_images, finish_classes
from second_paper.cnn import affinity_loss, build, load_trunk, partition_loss


def main(config, team):
    """Train the network, or go on with it, until runs/<config>/stills is finished."""
    s, seed, size, dan = config.stills, config.run.seed, config.vit.image_size, config.stills.network == "dan"
    run = open_run("stills", config, team)

    # data
    sets = labelled_sets(config.data)
    faces = joined(sets)
    found = {face_set.setting: face_set.fingerprint() for face_set in sets}
    found["labels"] = f"checksum {crc32(faces.labels.tobytes()):08x}"
    if run.still_finished(found):
        return
    order = partial(balanced_order, np.where(faces.training, faces.labels, -1), seed)
    train = Images(faces, size, [faces.labels], seed, s.smallest_crop, order=order)
    rows = np.flatnonzero(~faces.training & (faces.labels >= 0))
    val = Images(faces, size, [faces.labels])
    val.rows = rows
    if min(len(train), len(val), s.batch) < 2:                         # BatchNorm has no deviation of one
        raise ValueError(f"got {len(train)} training and {len(val)} validation faces with an expression, "
                         f"stills.batch={s.batch}; expected at least 2 of each")

    # model and optimiser
    path, origin = find_input(config, team, "stills.start")
    torch.manual_seed(seed)
    model = build(config)
    cnn, trunk = (model.dan, model.dan.trunk) if dan else (model, model)
    said = "random weights" if str(path) == "none" else f"{path}; {load_trunk(trunk, path)}"
    ddp = team.parallel(model)
    optimizer = adamw(model, s)
    run.begin(model, optimizer, train, s, found, origin)
    team.say(f"  {len(train):,} training faces, {len(val):,} validation faces\n  {s.network} from {said}\n"
             f"{s.epochs} epochs; {run.effective_batch()}")

    # loop
    for epoch in run.epochs():
        model.train()
        for batch in run.batches():
            images, y = run.on_device(batch)
            loss = norm = torch.zeros((), device=team.device)
            if run.count > 1:                                          # else the step is left out
                optimizer.zero_grad(set_to_none=True)
                with team.autocast():
                    outputs = ddp(normalise(images))
                loss = loss_of(outputs, y)                             # of the whole batch, on every process
                loss.backward()
                norm = clip_gradient(model, s.clip)
                optimizer.step()
            run.end_step(loss, norm)
        sums, unreadable = count_images(run, cnn.eval(), val)
        f1 = EXPR.metric.score(sums).mean()
        run.keep_best(f1)
        run.end_epoch(f"validation macro F1 {f1:.3f}", val_f1=f1, val_unreadable=unreadable)
    run.end()

    # finish
    finish_classes(run, cnn, val, EXPRESSIONS, math.nan if dan else EXPR.zero_loss)


def loss_of(outputs, y):
    """Cross-entropy; of what DANWithCentres gives with DAN's two losses."""
    if torch.is_tensor(outputs):
        return expr_loss(outputs, y, y >= 0)
    scores, features, heads, centres = outputs                         # (B, 8), (B, D), (B, K, D), (8, D)
    loss = expr_loss(scores, y, y >= 0) + affinity_loss(features, y, y >= 0, centres)
    return loss + partition_loss(heads)


if __name__ == "__main__":
    start("stills", main, from_command_line(__doc__)[0])
