"""Stage 4: the segment model on one task: valence-arousal, expressions or action units (paper §3.2-3.4, §4.1.2).

    torchrun --nproc_per_node=2 train_task.py --task au          # the demo, from nothing: draws, pre-trains, fine-tunes, ...
    python train_task.py --task va
    torchrun --nproc_per_node=2 train_task.py --task expr --config configs/paper.yaml --set task.fold=1

Writes to runs/<config>/task_<task> (task_<task>_fold<k> for a fold): best.pt (of the epoch with the best validation score) and
last.pt with the weights under the key `model`, log.csv, metrics.json. Ends with the score table of evaluate.py.

log.csv, one row per epoch: `loss` mean over the steps (VA: 2 minus both CCC; Expr, AU: cross-entropy per valid label); `score`
of whole validation videos (mean CCC, macro F1, mean F1); `gradient_norm`, `lr`, `seconds` as in train_pretrain.py.

The batch is not cut into pieces here: CCC is not a sum over pieces, and 32 segments of features take little memory.
"""

import dataclasses
import math
import time
from functools import partial

import torch

import evaluate
import extract_features
import pictures
import training
from config import from_command_line
from data import SegmentData, encoder_of, has_labels, label_files, open_videos, split
from losses import TASK_LOSS
from temporal import OUTPUTS, SegmentModel

DEMO_SECONDS = 21     # measured by benchmark.py on two cores


def stage(config, task: str) -> str:
    """The name of the run folder: task_au, or task_au_fold1."""
    return f"task_{task}" + (f"_fold{config.task.fold}" if config.task.fold else "")


def features_folder(config, team):
    """Where the features lie; extracted first if they are not there yet (drawn data), else an error that says how."""
    if config.task.features:
        return config.task.features
    folder = config.folder("features")
    training.provide(config, team, "" if (folder / "metrics.json").exists() else folder / "metrics.json", extract_features.main,
                     "python extract_features.py", extract_features.DEMO_SECONDS)
    return folder


def main(config, team, task):
    """Train on `task`, or go on with it, until runs/<config>/task_<task> is finished; then print its scores."""
    # configuration
    t, seed, epochs = config.task, config.run.seed, getattr(config.task, f"epochs_{task}")
    others = [f"task.epochs_{other}" for other in OUTPUTS if other != task]
    run = training.RunFolder(config.folder(stage(config, task)), config,
                             training.settings_of(config, "data.labels", "segments", "temporal", "task", "run.seed", without=others), team)
    if run.finished:
        team.say(f"{run.folder} is finished; nothing to train")
        return evaluate.main(config, team, task, "")

    # data
    features = features_folder(config, team)
    train_files, val_files = split(config.data.labels, task, t.fold)
    videos, train_without, dim = open_videos(train_files, features, task)
    val_videos, val_without, _ = open_videos(val_files, features, task)
    train = SegmentData(videos, task, config.segments.window, config.segments.stride)
    for name, part, without in (("training", videos, train_without), ("validation", val_videos, val_without)):
        team.say(f"  {name}: {len(part)} videos, {sum(len(v.labels) for v in part):,} frames"
                 + (f"; left out, no features: {', '.join(without)}" if without else ""))
    if t.fold and has_labels(config.data.labels, "expr"):
        tuned = set(label_files(config.data.labels, "expr")["Train_Set"])
        if seen := [v.name for v in val_videos if v.name in tuned]:
            team.say(f"  warning: {len(seen)} of {len(val_videos)} validation videos of fold {t.fold} were used to fine-tune the encoder, "
                     "so the score is too high")

    # model and optimiser
    torch.manual_seed(seed)
    model = SegmentModel(dim, OUTPUTS[task], **dataclasses.asdict(config.temporal))
    steps = math.ceil(len(train) / t.batch)
    team.say(f"{task}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} segments, "
             f"{epochs} epochs of {steps} steps; effective batch {t.batch} = {math.ceil(t.batch / team.world)} x 1 accumulation x {team.world} processes, on {team.device}")
    ddp = team.parallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, weight_decay=t.weight_decay)

    # resume
    at, best = {"epoch": 0, "step": 0, "loss": 0.0, "norm": 0.0}, -2.0
    encoder = encoder_of(features)
    found = {"segments": len(train), "validation frames": sum(len(v.labels) for v in val_videos), "encoder checksum": encoder}
    if (saved := run.resume(found)) is not None:
        training.load_weights(model, saved["model"], run.folder)
        optimizer.load_state_dict(saved["optimizer"])
        at, best = saved["at"], saved["best"]
        team.say(f"going on from epoch {at['epoch'] + 1}, step {at['step']}")
    run.cut_log(at["epoch"] + 1)

    def state():
        return {"kind": "task", "task": task, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "best": best, "at": training.plain(at), "data": found}

    watch = training.Watch(run, config, steps * epochs, state, "segments")

    # loop
    for epoch in range(at["epoch"], epochs):
        began = time.time()
        batches = training.Batches(len(train), t.batch, seed, epoch, team, first=at["step"])
        model.train()
        for step, batch in enumerate(training.loader(train, batches, config, team), start=at["step"]):
            x, target, valid, frames = (b.to(team.device, non_blocking=True) for b in batch)
            now = epoch * steps + step
            lr = training.set_learning_rate(optimizer, now, steps * epochs, t.warmup_epochs * steps, t.lr)
            training.seed_dropout(seed, epoch, step, team.rank)
            optimizer.zero_grad(set_to_none=True)
            with team.autocast():
                outputs = ddp(x.float(), frames)
            loss = TASK_LOSS[task](outputs, target, valid)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            at = {"epoch": epoch, "step": step + 1, "loss": at["loss"] + loss.detach(), "norm": at["norm"] + norm.detach()}
            watch.step(loss, norm, partial(batches.describe, step, lr, train.where), now + 1, t.batch)
        with watch.rest():
            mean = float(evaluate.scores(task, evaluate.score(model, val_videos, task, config, team)).mean())
        at = training.plain(at)
        run.log({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": at["loss"] / steps,
                 "gradient_norm": at["norm"] / steps, "score": mean, "seconds": round(time.time() - began, 2)})
        if mean > best or (epoch + 1) % max(1, epochs // 10) == 0:
            team.say(f"  epoch {epoch + 1}/{epochs}  loss {at['loss'] / steps:.4f}  validation {evaluate.METRIC[task]} {mean:.3f}"
                     + ("  (best so far)" if mean > best else ""))
        at = {"epoch": epoch + 1, "step": 0, "loss": 0.0, "norm": 0.0}
        if mean > best:
            best = mean
            run.save("best.pt", {"kind": "task", "task": task, "encoder checksum": encoder, "model": model.state_dict(),
                                 "epoch": epoch + 1, "score": best})
        watch.epoch()
    watch.end()

    # finish
    team.wait()
    model = evaluate.load_model(run.folder / "best.pt", config, task, dim, encoder, team)
    each = evaluate.report(model, val_videos, val_without, task, config, team, run.folder / "best.pt")
    if team.rank == 0:
        pictures.curves(run.folder / "log.csv", run.folder / "curves.png")
    evaluate.draw_timeline(model, val_videos, task, config, team, run.folder / "timeline.png")
    run.finish({"metric": evaluate.METRIC[task], "score": float(each.mean()), **dict(zip(evaluate.NAMES[task], each.tolist())),
                "validation_videos": len(val_videos), "left_out": val_without})
    team.say(f"pictures: {run.folder}/curves.png, {run.folder}/timeline.png")


if __name__ == "__main__":
    config, options = from_command_line(__doc__, task={"choices": list(OUTPUTS), "required": True, "help": "which labels to train on"})
    training.launch(main, config, options.task)
