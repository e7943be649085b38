"""Stage 4: the segment model on one task: va, expr or au (paper §3.2 to 3.4, §4.1.2).

    torchrun --nproc_per_node=2 train_task.py --task au     # the demo, from nothing: draws, pre-trains, ...
    python train_task.py --task va
    torchrun --nproc_per_node=2 train_task.py --task expr --config my.yaml --set task.fold=1

Writes to runs/<config>/task_<task> (task_<task>_fold<k> for a fold): best.pt (of the epoch with the best
validation score) and last.pt with the weights under the key `model`, log.csv, scores.txt, metrics.json,
curves.png, timeline.png.

log.csv, one row per epoch: `loss` mean over the steps (VA: 2 minus both CCC; Expr, AU: cross-entropy per
valid label); `score` of whole validation videos, or held-out ones (mean CCC, macro F1, mean F1);
`gradient_norm`, `lr`, `seconds` as in train_pretrain.py.

The batch is not cut into pieces here: CCC is not a sum over pieces, and 32 segments of features take little
memory.
"""

import dataclasses

import torch

import losses
from checkpoints import write_text
from config import from_command_line
from labels import TASKS
from made_of import input_there, settings_of
from reports import data_text, draw_timeline, numbers, report, stored_scores, to_score
from run import Run
from scoring import (FEATURES, HELD_OUT, find_features, load, score, shared_out, stage_of, sums_of,
                     write_sums)
from segments import SegmentData, fingerprint, open_videos
from splits import hold_out, split
from temporal import SegmentModel
from training import effective_batch, fused, gradient_norm, seed_dropout, set_learning_rate


def main(config, team, task):
    """Train on a labels.Task, or go on with it, until its run folder is finished; print its scores."""
    # configuration
    t, s, seed, epochs = config.task, config.segments, config.run.seed, config.task.epochs or task.epochs
    settings = settings_of(config, "synthetic", "segments", "temporal", "task", "run.seed")
    run = Run(stage_of(config, task), config, team, settings, FEATURES)
    if run.finished and not team.agree(input_there(config, *FEATURES)):
        return team.say(f"{run.folder} is finished; its features are gone\n\n{stored_scores(run.folder)}")

    # data
    features, origin = find_features(config, team)
    train_files, val_files = split(config.data.labels, task, t.fold)
    train_files, held_out_files = hold_out(train_files, t.held_out)
    videos, train_left_out, dim = open_videos(train_files, features, task)
    val_videos, val_left_out, _ = open_videos(val_files, features, task)
    held_out, chosen_by = [], "validation"
    if held_out_files:
        held_out, left_out, _ = open_videos(held_out_files, features, task)
        train_left_out, chosen_by = train_left_out | left_out, "held-out"
    choose_on = held_out or val_videos                       # the best epoch is the one that is best on these
    found = {"training": fingerprint(videos), "validation": fingerprint(val_videos),
             "training videos": [video.name for video in videos]}
    if held_out:
        found |= {"held-out": fingerprint(held_out), HELD_OUT: [video.name for video in held_out]}
    if run.still_finished(found):
        return team.say(f"\n{stored_scores(run.folder)}")
    scored = to_score(val_videos, val_left_out, [*videos, *held_out], task, origin, config)
    team.say(data_text(videos, train_left_out, scored))
    if held_out:
        team.say(f"  held out, to choose the epoch: {len(held_out)} training videos")

    # model and optimiser
    torch.manual_seed(seed)
    train = SegmentData(videos, task, s.window, s.stride)
    model = SegmentModel(dim, len(task.outputs), **dataclasses.asdict(config.temporal))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ddp = team.parallel(model, config.run.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, weight_decay=t.weight_decay,
                                  fused=fused(model))
    run.begin(model, optimizer, train, t.batch, epochs, found, origin, unit="segments")
    team.say(f"{task.name}: {parameters:,} parameters, {len(train):,} segments, "
             f"{epochs} epochs of {run.steps} steps; {effective_batch(t.batch, 1, team)}")

    # loop
    loss_of = getattr(losses, task.loss)
    for epoch in range(run.epoch, epochs):
        model.train()
        for step, batch in run.batches():
            x, target, valid, real = [part.to(team.device, non_blocking=True) for part in batch]
            set_learning_rate(optimizer, step, run.steps * epochs, t.warmup_epochs * run.steps, t.lr)
            seed_dropout(seed, epoch, run.step, team.rank)
            optimizer.zero_grad(set_to_none=True)
            with team.autocast():
                outputs = ddp(x.float(), real)                         # (B, w, D) -> (B, w, K)
            loss = loss_of(outputs, target, valid)                     # of the whole batch, on every process
            loss.backward()
            norm = gradient_norm(model)
            optimizer.step()
            run.end_step(loss, norm)
        mine = run.unless_stopped(shared_out(choose_on, team))
        sums = score(model, mine, choose_on, task, s.window, s.stride, t.batch, team)
        run.obey_signals()
        mean = task.metric.score(sums.sum(axis=0)).mean()             # (videos, ...) -> (...) -> (K,)
        run.keep_best(mean)
        run.end_epoch(f"{chosen_by} {task.metric.name} {mean:.3f}", score=mean)
    run.end()
    finish(run, task, scored, config, team)


def finish(run, task, scored, config, team):
    """Score the best epoch's weights on the validation videos, tell the score, and draw the pictures."""
    best, videos = run.folder / "best.pt", scored.videos
    trained = load(best, config, task, team)
    sums = sums_of(trained, videos)
    write_sums(run.folder, videos, sums, team)
    text, metrics = report(task, sums, scored, best, config.task.fold), numbers(task, sums, scored)
    team.say(f"\n{text}")
    if team.rank == 0:
        write_text(run.folder / "scores.txt", f"{text}\n")
        draw_timeline(trained.model, videos, task, config, team, run.folder / "timeline.png")
    run.finish(metrics, chance={"loss": task.zero_loss, "score": metrics["chance"]})
    team.say(f"pictures: {run.folder}/curves.png, {run.folder}/timeline.png")


if __name__ == "__main__":
    import pipeline
    config, options = from_command_line(__doc__, task={"choices": list(TASKS), "required": True,
                                                       "help": "which labels to train on"})
    pipeline.run("train_task", config, TASKS[options.task])
