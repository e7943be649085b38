"""Masked CoTEX: two ViTs learn expressions from drawn faces and from each other; scored on photographs.

    python -m second_paper.train_cotex                                           # the demo
    torchrun --nproc_per_node=2 -m second_paper.train_cotex --config my.yaml     # from configs/cotex.yaml
    python -m second_paper.train_cotex --set cotex.views=1 --set cotex.mask_ratio=0         # a plain ViT

Both start from one MAE and see other patches of each face (cotex.py). Writes to runs/<config>/cotex: best.pt
(views.0.*, views.1.* under the key `model`, of the epoch with the best `val_f1`), last.pt, log.csv,
curves.png, metrics.json. log.csv: `loss` mean cross-entropy of the views + λ · JS; `val_f1` macro F1 of the
real faces, by the summed logits; `val_unreadable` of these; the rest as in train_pretrain.py.
"""

import dataclasses
import math
import os

import torch

from data import Images
from datasets.faces import CLASSES, class_folders
from engine.checkpoints import load_vit
from engine.config import from_command_line
from engine.training import adamw, clip_gradient
from images import normalise
from metrics import CLASS_F1
from pipeline import find_input, open_run, start
from scoring import count_images, finish_classes
from second_paper.cotex import CoTEX, cotex_loss


def main(config, team):
    """Train both views, or go on with it, until runs/<config>/cotex is finished."""
    c, seed, size, data = config.cotex, config.run.seed, config.vit.image_size, config.data
    run = open_run("cotex", config, team)

    # data
    given = f"data.drawn_faces={data.drawn_faces!r} and data.real_faces={data.real_faces!r}"
    if not (data.drawn_faces and data.real_faces):
        raise ValueError(f"{given}: expected two folders that hold one for each of {', '.join(CLASSES)}")
    places = [os.path.realpath(path) for path in (data.drawn_faces, data.real_faces)]
    if os.path.commonpath(places) in places:
        raise ValueError(f"{given} share images; a score on faces that were trained on says nothing")
    drawn, real = class_folders(data.drawn_faces), class_folders(data.real_faces)
    found = {"drawn faces": drawn.fingerprint(), "real faces": real.fingerprint()}
    if run.still_finished(found):
        return

    # model and optimiser
    path, origin = find_input(config, team, "cotex.start")
    torch.manual_seed(seed)
    vit = dataclasses.asdict(config.vit)
    model = CoTEX(len(CLASSES), c.views, c.mask_ratio, drop_path=c.drop_path, **vit)
    said = [load_vit(view.vit, path) for view in model.views][0]
    train = Images(drawn, size, [drawn.labels - 1], seed, c.smallest_crop, noise=(c.views, model.patches))
    val = Images(real, size, [real.labels - 1])                          # Anger, 1 of ABAW's eight, is 0 here
    ddp = team.parallel(model)
    optimizer = adamw(model, c)
    run.begin(model, optimizer, train, c, found, origin, cut=True)
    team.say(f"  {len(drawn):,} drawn faces, {len(real):,} real ones\n  each view from {said}\n"
             f"{c.views} views of {model.kept} of {model.patches} patches, {c.epochs} epochs; "
             f"{run.effective_batch()}")

    # loop
    for epoch in run.epochs():
        model.train()
        for batch in run.batches():
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=team.device)
            for x, y, u in run.pieces(ddp, *batch):
                with team.autocast():
                    logits = ddp(normalise(x), u)                        # (V, B, M)
                part = cotex_loss(logits, y, y >= 0, c.js_weight, run.count)   # of the whole batch's loss
                part.backward()
                loss += part.detach()
            norm = clip_gradient(model, c.clip)
            optimizer.step()
            run.end_step(loss, norm)
        sums, unreadable = count_images(run, model.eval().classify, val)
        f1 = CLASS_F1.score(sums).mean()
        run.keep_best(f1)
        run.end_epoch(f"macro F1 on real faces {f1:.3f}", val_f1=f1, val_unreadable=unreadable)
    run.end()

    # finish
    finish_classes(run, model.classify, val, CLASSES, math.log(len(CLASSES)))


if __name__ == "__main__":
    start("cotex", main, from_command_line(__doc__)[0])
