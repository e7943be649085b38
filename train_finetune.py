"""Stage 2: fine-tuning the ViT on the expression frames of Aff-Wild2 (paper §3.1, §4.1.1).

The MAE's decoder is gone; fully connected layers take its place, and the whole ViT is trained
(`scoring.ExprClassifier`). Afterwards it is the feature extractor of every task. `finetune.fold` says whose
training videos it sees: those of the official split (0), or of a fold (1 to 4, labels.py).

    python train_finetune.py                                           # the demo
    torchrun --nproc_per_node=2 train_finetune.py --config my.yaml     # your copy of Aff-Wild2
    python train_finetune.py --set finetune.start=none                 # without MAE, to compare

`--set finetune.start=mae_pretrain_vit_base.pth` starts from a ViT-B/16 of the reference MAE, for a
configuration of that size. Writes to runs/<config>/finetune: best.pt (vit.* and head.* under the key
`model`, of the epoch with the best validation macro F1), last.pt, log.csv, curves.png, metrics.json.

log.csv, one row per epoch: `loss` cross-entropy of the training frames; `val_f1` macro F1 of single frames
of the validation videos, every `finetune.every`-th; `val_unreadable` frames of those that could not be
decoded; `gradient_norm` (before clipping), `lr` (the head's), `unreadable`, `seconds` as in
train_pretrain.py.
"""

from functools import partial

import torch

from data import Images, every_kth, expr_frames
from engine.checkpoints import load_vit
from engine.config import from_command_line
from engine.training import adamw, clip_gradient
from images import check_ends, find_videos, last_of, normalise
from labels import EXPR, hold_out, longest, something_to_learn, split
from losses import expr_loss
from pipeline import find_input, open_run, start
from scoring import ExprClassifier, count_images, finish_classes


def main(config, team):
    """Fine-tune, or go on with it, until runs/<config>/finetune is finished."""
    f, seed, size = config.finetune, config.run.seed, config.vit.image_size
    run = open_run("finetune", config, team)

    # data
    (videos, lines), files = find_videos(config.data.frames), split(config.data.labels, EXPR, f.fold)
    lines += check_ends(last_of(videos), longest(config.data.labels))
    files = hold_out(files[0], f.held_out)[0], files[1]
    (frames, notes), (val_frames, val_notes) = (expr_frames(of_part, videos) for of_part in files)
    found = {"training": frames.fingerprint(), "validation": val_frames.fingerprint(),
             "training videos": frames.videos}
    if run.still_finished(found):
        return
    for name, part, of_part in (("training", frames, notes), ("validation", val_frames, val_notes)):
        lines += [f"  {name}: {len(part):,} labelled frames with a face image in {len(part.videos)} videos",
                  *of_part]
    team.say("\n".join(lines))
    something_to_learn(frames.labels, EXPR)
    train = Images(frames, size, [frames.labels], seed, f.smallest_crop,
                   order=partial(every_kth, len(frames), f.every))
    val = Images(val_frames, size, [val_frames.labels], order=partial(every_kth, len(val_frames), f.every))

    # model and optimiser
    path, origin = find_input(config, team, "finetune.start")
    torch.manual_seed(seed)
    model = ExprClassifier(config)
    said = load_vit(model.vit, path)
    ddp = team.parallel(model)
    optimizer = adamw(model, f)
    run.begin(model, optimizer, train, f, found, origin, cut=True)
    team.say(f"  the ViT starts from {said}\n"
             f"fine-tuning {sum(weights.numel() for weights in model.parameters()):,} parameters for "
             f"{f.epochs} epochs of {len(train):,} frames; {run.effective_batch()}")

    # loop
    for epoch in run.epochs():
        model.train()
        for images, y in run.batches():
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=team.device)
            for x, y in run.pieces(ddp, images, y):
                with team.autocast():
                    logits = ddp(normalise(x))                           # (B, 3, H, W) -> (B, 8)
                part = expr_loss(logits, y, y >= 0, run.count)           # its share of the batch's mean
                part.backward()
                loss += part.detach()
            norm = clip_gradient(model, f.clip)
            optimizer.step()
            run.end_step(loss, norm)
        sums, unreadable = count_images(run, model.eval(), val)
        f1 = EXPR.metric.score(sums).mean()
        run.keep_best(f1)
        run.end_epoch(f"validation macro F1 of single frames {f1:.3f}", val_f1=f1, val_unreadable=unreadable)
    run.end()

    # finish: every validation frame
    finish_classes(run, model, Images(val_frames, size, [val_frames.labels]), EXPR.outputs, EXPR.zero_loss)


if __name__ == "__main__":
    start("finetune", main, from_command_line(__doc__)[0])
