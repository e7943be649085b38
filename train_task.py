"""Stage 4: the segment model on one task: va, expr or au (paper §3.2 to 3.4, §4.1.2).

    torchrun --nproc_per_node=2 train_task.py --task au     # the demo, from nothing: draws, pre-trains, ...
    python train_task.py --task va
    torchrun --nproc_per_node=2 train_task.py --task expr --config my.yaml --set task.fold=1

Writes to runs/<config>/task_<task>: best.pt (of the epoch with the best validation score) and last.pt with
the weights under the key `model`, log.csv, predictions.npz (of the validation videos), scores.txt,
metrics.json, curves.png, timeline.png.

log.csv, one row per epoch: `loss` mean over the steps (VA: 2 minus both CCC; Expr, AU: cross-entropy per
valid label); `score` of whole validation videos, or held-out ones (mean CCC, macro F1, mean F1);
`gradient_norm`, `lr`, `seconds` as in train_pretrain.py.

The batch is not cut into pieces here: CCC is not a sum over pieces, and 32 segments of features take little
memory.
"""

import dataclasses

import numpy as np
import torch

import losses
import pictures
from data import SegmentData, fingerprint, open_videos, some_faces
from images import find_videos
from engine.checkpoints import write_file, write_text
from engine.config import from_command_line
from engine.training import clip_gradient
from labels import TASKS, hold_out, in_units, occurrences, something_to_learn, split, targets
from metrics import numbers
from pipeline import find_input, finished, folder, open_run, start
from scoring import HELD_OUT, predict_videos, reasons, report, sums_of, to_score
from temporal import SegmentModel


def main(config, team, task):
    """Train on a labels.Task, or go on with it, until its run folder is finished; print its scores."""
    t, s, seed, epochs = config.task, config.segments, config.run.seed, config.task.epochs or task.epochs
    run = open_run("task", config, team, task)
    there, stored = config.task.features or finished(folder("features", config)), run.folder / "scores.txt"
    if run.finished and not team.agree(there):
        return team.say(f"{run.folder} is finished; its features are gone\n\n{stored.read_text()}")

    # data
    train_files, val_files = split(config.data.labels, task, t.fold)
    features, origin = find_input(config, team, "task.features")
    train_files, held_out_files = hold_out(train_files, t.held_out)
    videos, left_out, dim = open_videos(train_files, features, task)
    val_videos, val_left_out, _ = open_videos(val_files, features, task)
    held_out = open_videos(held_out_files, features, task)[0] if held_out_files else []
    choose_on = held_out or val_videos                       # the best epoch is the one that is best on these
    found = {"training": fingerprint(videos), "validation": fingerprint(val_videos),
             "training videos": [video.name for video in videos]}
    if held_out:
        found |= {"held-out": fingerprint(held_out), HELD_OUT: [video.name for video in held_out]}
    if run.still_finished(found):
        return team.say(f"\n{stored.read_text()}")
    scored = to_score(val_videos, val_left_out, [*videos, *held_out], task, origin, config)
    for name, part, without in (("training", videos, left_out), ("validation", val_videos, val_left_out),
                                ("held out, to choose the epoch", held_out, {})):
        if part:
            team.say(f"  {name}: {len(part)} videos, {sum(len(video.labels) for video in part):,} frames"
                     + (f"; left out: {reasons(without)}" if without else "")
                     + f"\n    {occurrences(np.concatenate([video.labels for video in part]), task)}")
    something_to_learn(np.concatenate([video.labels for video in videos]), task)
    if scored.seen:
        team.say(f"  warning: {scored.seen}")

    # model and optimiser
    torch.manual_seed(seed)
    train = SegmentData(videos, task, s.window, s.stride)
    model = SegmentModel(dim, len(task.outputs), **dataclasses.asdict(config.temporal))
    ddp = team.parallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, weight_decay=t.weight_decay, fused=True)
    run.begin(model, optimizer, train, t, found, origin, epochs, unit="segments")
    team.say(f"{task.name}: {sum(weights.numel() for weights in model.parameters()):,} parameters, "
             f"{len(train):,} segments, {epochs} epochs of {run.steps} steps; {run.effective_batch()}")

    # loop
    loss_of = getattr(losses, task.loss)
    for epoch in run.epochs():
        model.train()
        for batch in run.batches():
            x, target, valid, real = run.on_device(batch)
            optimizer.zero_grad(set_to_none=True)
            with team.autocast():
                outputs = ddp(x.float(), real)                         # (B, w, D) -> (B, w, K)
            loss = loss_of(outputs, target, valid)                     # of the whole batch, on every process
            loss.backward()
            norm = clip_gradient(model, 0)
            optimizer.step()
            run.end_step(loss, norm)
        sums = sums_of(predict_videos(model, choose_on, config, team, run), choose_on, task)
        mean = task.metric.score(sums.sum(axis=0)).mean()             # (videos, ...) -> (...) -> (K,)
        run.keep_best(mean)
        run.end_epoch(f"{'held-out' if held_out else 'validation'} {task.metric.name} {mean:.3f}", score=mean)
    run.end()
    finish(run, task, scored)


def finish(run, task, scored):
    """Score the best epoch's weights on the validation videos, tell the score, and draw the pictures."""
    config, team, videos = run.config, run.team, scored.videos
    run.load_best()
    outputs = predict_videos(run.model, videos, config, team)
    sums = sums_of(outputs, videos, task)
    text, metrics = report(task, sums, scored, run.folder / "best.pt", config.task.fold), numbers(task, sums)
    metrics |= {"validation_videos": len(videos), "seen_videos": int((~scored.unseen).sum()),
                "left_out": scored.left_out, "data": scored.data, "comparable": scored.comparable,
                "videos": [video.name for video in videos], "video_sums": sums.tolist()}
    team.say(f"\n{text}")
    if team.rank == 0:
        write_text(run.folder / "scores.txt", f"{text}\n")
        write_file(run.folder / "predictions.npz", lambda file: np.savez(file, **outputs))
        pictures.curves(run.folder, {"loss": task.zero_loss, "score": metrics["chance"]})
        pictures.save(draw_timeline(outputs, videos, task, config), run.folder / "timeline.png")
    run.finish(metrics)
    team.say(f"pictures: {run.folder}/curves.png, {run.folder}/timeline.png")


def draw_timeline(outputs, videos, task, config, note: str = ""):
    """A picture of the validation video with most labels, at most its first 600 frames."""
    video = max(videos, key=lambda video: targets(video.labels[:600], task)[1].sum())
    target, valid = targets(video.labels[:600], task)
    T, faces = len(target), []
    try:
        shown = np.linspace(1, T, min(40, T)).astype(int)
        faces = some_faces(find_videos(config.data.frames)[0][video.name], shown, 112)
    except (ValueError, KeyError, OSError):
        pass            # features are enough to score; where the frames lie elsewhere, the picture lacks them
    return pictures.draw_video(video.name, {task.name: in_units(outputs[video.name][:T], task)},
                               {task.name: np.where(valid, target, np.nan)}, faces, note=note)


if __name__ == "__main__":
    config, options = from_command_line(__doc__, task={"choices": list(TASKS), "required": True,
                                                       "help": "which labels to train on"})
    start("task", main, config, TASKS[options.task])
