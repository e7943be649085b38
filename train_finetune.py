"""Stage 2: fine-tuning the encoder on Aff-Wild2 expression frames (paper §3.1, §4.1.1). The decoder is gone; fully connected
layers take its place, and the whole encoder is trained. Afterwards it is the feature extractor of every task.

    python train_finetune.py
    torchrun --nproc_per_node=2 train_finetune.py --config configs/paper.yaml
    python train_finetune.py --set finetune.start=mae_pretrain_vit_base.pth     # the reference MAE's published encoder
    python train_finetune.py --set finetune.start=none                          # from random weights, to see what MAE gives

Writes to runs/<config>/finetune: best.pt (encoder.* and head.* under the key `model`, of the epoch with the best validation
macro F1), last.pt, log.csv, metrics.json.

log.csv, one row per epoch: `loss` cross-entropy of the training frames; `val_f1` macro F1 of single frames of the validation
videos, every `finetune.every`-th; `gradient_norm`, `lr`, `unreadable`, `seconds` as in train_pretrain.py.
"""

import contextlib
import dataclasses
import math
import time
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler

import evaluate
import synthetic
import train_pretrain
import training
from config import from_command_line
from data import ExprFrames, find_videos, split
from images import normalise, random_crop
from losses import all_sum, expr_loss
from vit import VisionTransformer

DEMO_SECONDS = 69     # measured by benchmark.py on two cores


class ExprClassifier(nn.Module):
    """ViT -> one feature per face -> fully connected layers -> 8 logits. Shape: images (B, 3, H, W) -> (B, 8)."""

    def __init__(self, encoder: VisionTransformer, token: str, hidden: int, dropout: float):
        super().__init__()
        self.encoder, self.token = encoder, token
        dim = encoder.norm.normalized_shape[0]
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 8))

    def forward(self, images):
        return self.head(self.encoder.features(images, self.token))


def build(config) -> ExprClassifier:
    """The classifier of a configuration, with random weights."""
    f = config.finetune
    return ExprClassifier(VisionTransformer(**dataclasses.asdict(config.encoder)), f.token, f.hidden, f.dropout)


def augment(image, index, epoch, size, seed, smallest_crop):
    """The random crop and flip of sample `index` in `epoch`: uint8 (size, size, 3)."""
    return random_crop(image, size, training.generator(seed, epoch, index), smallest_crop)


def load_encoder(encoder, path) -> str:
    """Fill the encoder from our pre-training, our fine-tuning, or a reference MAE file; says which names were not used.

    Raises ValueError if the file is not a whole checkpoint, or its encoder has other names or shapes (which are listed).
    """
    weights = training.read_checkpoint(path)
    weights = weights.get("model", weights)
    if any(k.startswith("encoder.") for k in weights):
        weights = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    # MAE files bring a decoder; the reference's fine-tuned ViTs a head, and fc_norm in place of norm.
    missing, unused = training.load_weights(encoder, weights, path, may_miss=("norm.",) if "fc_norm.weight" in weights else (),
                                            may_ignore=("decoder", "mask_token", "head", "fc_norm"))
    unused = sorted({k.split(".")[0] for k in unused})
    return f"missing keys: {', '.join(missing) or 'none'}; unexpected keys, left out: {', '.join(unused) or 'none'}"


def main(config, team):
    """Fine-tune, or go on with it, until runs/<config>/finetune is finished."""
    # configuration
    f, seed = config.finetune, config.run.seed
    settings = training.settings_of(config, "data.frames", "data.labels", "drawn", "encoder", "finetune", "run.seed")
    run = training.RunFolder(config.folder("finetune"), config, settings, team)
    if run.finished:
        return team.say(f"{run.folder} is finished; nothing to do")

    # data
    synthetic.provide(config, team)
    start = f.start or config.folder("pretrain") / "last.pt"
    if not f.start:
        training.provide(config, team, "" if (start.parent / "metrics.json").exists() else start, train_pretrain.main,
                         "python train_pretrain.py", train_pretrain.DEMO_SECONDS)
    videos, (train_files, val_files) = find_videos(config.data.frames), split(config.data.labels, "expr", 0)
    size = config.encoder.image_size
    crop = partial(augment, size=(size, size), seed=seed, smallest_crop=f.smallest_crop)
    train = ExprFrames(train_files, videos, size, f.every, crop)
    val = ExprFrames(val_files, videos, size, f.every)
    for name, part in (("training", train), ("validation", val)):
        team.say(f"  {name}: {len(part.rows):,} labelled frames with a face image in {len(part.folders)} videos"
                 + (f"; left out, no frames: {', '.join(part.without_frames)}" if part.without_frames else ""))

    # model and optimiser
    torch.manual_seed(seed)
    model = build(config)
    if start == "none":
        team.say("  the encoder starts from random weights, as asked")
    else:
        team.say(f"  the encoder starts from {start}; {load_encoder(model.encoder, start)}")
    share, parameters = math.ceil(f.batch / team.world), sum(x.numel() for x in model.parameters())
    tokens = math.prod(model.encoder.patch_embed.grid) + 1
    pieces = training.pieces(share, training.vit_bytes(tokens, config.encoder.dim, config.encoder.depth), parameters, team.device)
    steps = math.ceil(len(train) / f.batch)
    team.say(f"fine-tuning {parameters:,} parameters for {f.epochs} epochs of {len(train):,} frames; "
             f"effective batch {f.batch} = {math.ceil(share / pieces)} x {pieces} accumulation x {team.world} processes, on {team.device}")
    ddp = team.parallel(model)
    optimizer = training.adamw(model, f.lr, (0.9, 0.999), f.weight_decay)

    # resume
    at, best = {"epoch": 0, "step": 0, "loss": 0.0, "norm": 0.0, "unreadable": 0}, -1.0
    found = {"training frames": len(train.rows), "validation frames": len(val.rows),
             "start checksum": training.checksum(start) if start != "none" else None}
    if (saved := run.resume(found)) is not None:
        training.load_weights(model, saved["model"], run.folder)
        optimizer.load_state_dict(saved["optimizer"])
        at, best = saved["at"], saved["best"]
        team.say(f"going on from epoch {at['epoch'] + 1}, step {at['step']}")
    run.cut_log(at["epoch"] + 1)

    def state():
        return {"kind": "finetune", "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "best": best, "at": training.plain(at), "data": found}

    watch = training.Watch(run, config, steps * f.epochs, state, "images")

    # loop
    for epoch in range(at["epoch"], f.epochs):
        began = time.time()
        train.epoch = epoch
        batches = training.Batches(len(train), f.batch, seed, epoch, team, first=at["step"])
        model.train()
        for step, (images, labels) in enumerate(training.loader(train, batches, config, team), start=at["step"]):
            now = epoch * steps + step
            lr = training.set_learning_rate(optimizer, now, steps * f.epochs, f.warmup_epochs * steps, f.lr)
            labels = labels.to(team.device, non_blocking=True)
            counts = all_sum(torch.stack([(labels >= 0).sum(), (labels < 0).sum()]).float())
            training.seed_dropout(seed, epoch, step, team.rank)
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for i, (x, y) in enumerate(zip(images.tensor_split(pieces), labels.tensor_split(pieces))):
                quiet = team.world > 1 and i < pieces - 1
                with ddp.no_sync() if quiet else contextlib.nullcontext():
                    x = normalise(x.to(team.device, non_blocking=True))
                    with team.autocast():
                        logits = ddp(x)
                    part = expr_loss(logits, y, y >= 0, counts[0].clamp(min=1))
                    (part * team.world).backward()         # DDP averages the gradients over the processes: make it a sum
                loss = loss + part.detach()
            loss = all_sum(loss)
            norm = torch.nn.utils.get_total_norm([q.grad for q in model.parameters() if q.grad is not None])
            optimizer.step()
            at = {"epoch": epoch, "step": step + 1, "loss": at["loss"] + loss, "norm": at["norm"] + norm.detach(),
                  "unreadable": at["unreadable"] + counts[1]}
            watch.step(loss, norm, partial(batches.describe, step, lr, train.where), now + 1, f.batch)
        with watch.rest():
            f1 = validate(model, val, config, team)
        at = training.plain(at)
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": at["loss"] / steps,
               "gradient_norm": at["norm"] / steps, "val_f1": f1.mean(), "unreadable": int(at["unreadable"]), "seconds": round(time.time() - began, 2)}
        run.log(row)
        team.say(f"  epoch {epoch + 1}/{f.epochs}  loss {row['loss']:.4f}  validation macro F1 of single frames {f1.mean():.3f}"
                 + ("  (best so far)" if f1.mean() > best else ""))
        at = {"epoch": epoch + 1, "step": 0, "loss": 0.0, "norm": 0.0, "unreadable": 0}
        if f1.mean() > best:
            best = float(f1.mean())
            run.save("best.pt", {"kind": "finetune", "model": model.state_dict(), "epoch": epoch + 1, "score": best})
        watch.epoch()
    watch.end()

    # finish
    team.wait()
    training.load_weights(model, training.read_checkpoint(run.folder / "best.pt")["model"], run.folder)
    val.every = 1
    f1 = validate(model, val, config, team)
    run.finish({"val_macro_f1": float(f1.mean()), "val_f1": f1.tolist(), "val_frames": len(val.rows), "train_frames": len(train.rows)})
    team.say(f"fine-tuning is finished: macro F1 {f1.mean():.3f} on all {len(val.rows):,} single validation frames, "
             f"written to {run.folder}")


@torch.no_grad()
def validate(model, val, config, team) -> np.ndarray:
    """F1 per expression (8,) over the frames of `val`, each read by exactly one process."""
    batches = BatchSampler(range(team.rank, len(val), team.world), config.features.batch, drop_last=False)
    tally = evaluate.Tally("expr")
    model.eval()
    for images, labels in training.loader(val, batches, config, team):
        with team.autocast():
            logits = model(normalise(images.to(team.device, non_blocking=True)))
        tally.add(logits.float().cpu().numpy(), labels.numpy())
    model.train()
    return evaluate.scores("expr", team.sum(tally.sums))


if __name__ == "__main__":
    training.launch(main, from_command_line(__doc__)[0])
