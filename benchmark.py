"""The times in README and docs, measured: the demo from nothing, a checkpoint, a second process. The scores
without a part are ablation.py's, those of the folds folds.py's.

    python benchmark.py --check       # the finished demo against what README promises
    python benchmark.py --training    # a checkpoint, and a second process, at the paper's sizes (5 minutes)
    python benchmark.py --scorer      # a million predictions scored (1 minute)
    python benchmark.py --prediction  # predictions beside extraction, on the demo's frames (1 minute)
    python benchmark.py --device cpu  # each stage beside a plain baseline (1 minute; docs/gpu.md)
    python benchmark.py --device cuda --compile       # the paper's sizes; and with torch.compile
    python benchmark.py               # the demo from nothing, into runs/benchmark.md, docs/pipeline.png
                                      # and docs/curves.png (about 5 minutes on two cores)
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import benchmark_device
import many_runs
import pictures
from checkpoints import write_file
from config import load
from distributed import join
from labels import AU, EXPR, TASKS, VA
from losses import au_loss
from mae import MaskedAutoencoder
from many_runs import Job
from temporal import SegmentModel

PROMISED = {"va": 0.60, "expr": 0.50, "au": 0.65}     # the demo scores this much or more,
CONSTANT = {"va": 0.00, "expr": 0.10, "au": 0.35}     # and the best constant prediction this much at most
STAGES = ("synthetic", "train_pretrain", "train_finetune", "extract_features")


def score(name: str, task: str, kind: str = "score") -> float:
    """The score that a finished run has written into its metrics.json, or kind="chance"."""
    return json.loads(Path(f"runs/{name}/task_{task}/metrics.json").read_text())[kind]


def check() -> bool:
    """Print each task's score of the demo beside the promised one, and what a constant prediction scores."""
    good = True
    for task, least in PROMISED.items():
        reached, chance = score("demo", task), score("demo", task, "chance")
        kept = reached >= least and chance <= CONSTANT[task]
        good = good and kept
        print(f"{task:5s} {reached:.3f}, promised {least:.2f}; a constant {chance:.3f}, "
              f"at most {CONSTANT[task]:.2f}: {'kept' if kept else 'NOT KEPT'}")
    return good


def measure():
    """The demo from nothing, in two processes; writes runs/benchmark.md and the pictures of README."""
    shutil.rmtree("data/demo", ignore_errors=True)
    shutil.rmtree("runs/demo", ignore_errors=True)
    config = load("configs/demo.yaml")
    jobs = [Job(stage, config) for stage in STAGES]
    jobs += [Job("train_task", config, task) for task in TASKS.values()]
    lines = ["| stage, in two processes | seconds |", "|---|---|"]
    for job in jobs:
        lines.append(f"| {job.title} | {many_runs.run(job, processes=2):.0f} |")
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    lines += ["", f"Largest process: {gigabytes:.2f} GB."]
    Path("runs/benchmark.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    compose(Path("runs/demo"), Path("docs/pipeline.png"))
    shutil.copy("runs/demo/task_au/curves.png", "docs/curves.png")


def compose(run_folder: Path, path: Path):
    """README's picture: the reconstructions of pre-training above the timeline of one video."""
    parts = [("1  MAE pre-training on still faces: three quarters of each are hidden",
              Image.open(run_folder / "pretrain/reconstruction.png")),
             ("2  fine-tuned ViT: one feature per frame    3  segments through TCN and Transformer    "
              "4  AUs of each frame", Image.open(run_folder / "task_au/timeline.png"))]
    width, height = max(part.width for _, part in parts), sum(part.height + 50 for _, part in parts)
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for title, part in parts:
        pen.text((6, y + 14), title, pictures.INK, pictures.font(17))
        sheet.paste(part, (0, y + 44))
        y += part.height + 50
    pictures.save(sheet, path)


def segment_steps(steps: int = 2, batch: int = 32) -> float:
    """Seconds per step of the paper's segment model, `batch` segments of 300 frames over all processes."""
    team = join()
    torch.manual_seed(0)
    model = team.parallel(SegmentModel(768, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    x, y = torch.randn(batch, 300, 768), (torch.rand(batch, 300, 12) < 0.2).float()
    x, y = x[team.rank::team.world].to(team.device), y[team.rank::team.world].to(team.device)
    valid = torch.ones_like(y, dtype=torch.bool)
    for step in range(steps + 1):                            # the first one is warm-up
        if step == 1:
            team.wait()
            began = time.time()
        optimizer.zero_grad(set_to_none=True)
        au_loss(model(x), y, valid).backward()
        optimizer.step()
    team.wait()
    seconds = (time.time() - began) / steps
    team.say(f"{seconds}")
    return seconds


def measure_second_process(rounds: int = 3) -> float:
    """Two processes against one, a thread each, in turn. -> seconds per step in two processes."""
    # Tensors above 32 MB, which only the single process has, are fresh memory pages each time unless the C
    # library keeps them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000",
                   "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    seconds = {1: [], 2: []}
    for _ in range(rounds):
        for processes in seconds:
            torchrun = str(Path(sys.executable).with_name("torchrun"))
            command = [torchrun, f"--nproc_per_node={processes}", __file__, "--segment-steps"]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            seconds[processes].append(float(output.stdout.split()[-1]))
    ratios = sorted(one / two for one, two in zip(seconds[1], seconds[2]))
    print(f"segment model, 32 segments a step: {min(seconds[1]):.2f} s in one process, "
          f"{min(seconds[2]):.2f} s in two; ratio {ratios[rounds // 2]:.2f} "
          f"(of {rounds} pairs: {ratios[0]:.2f} to {ratios[-1]:.2f})")
    return min(seconds[2])


def measure_checkpoints(step: float, rounds: int = 3):
    """The time to write a checkpoint, and its share of an epoch of steps that take `step` seconds."""
    for name, model in (("segment model", SegmentModel(768, 12)), ("MAE", MaskedAutoencoder())):
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        times = []
        for _ in range(rounds):
            began = time.time()
            write_file("runs/benchmark.pt", lambda file: torch.save(state, file))
            times.append(time.time() - began)
        size = Path("runs/benchmark.pt").stat().st_size / 1e6
        Path("runs/benchmark.pt").unlink()
        middle = sorted(times)[rounds // 2]
        # Aff-Wild2's VA training set: 1,653,900 frames at a stride of 200 are at least 8,270 segments, that
        # is, 259 steps of 32.
        share = ""
        if name == "segment model":
            share = f", {100 * middle / (259 * step):.2f} % of an epoch of 259 steps"
        print(f"checkpoint of the {name}: {size:,.0f} MB in {middle:.2f} s, flushed to disk{share}")


def measure_prediction(rounds: int = 3):
    """predict.py with all three tasks on the demo's frames, in turn with extract_features.py on the same:
    what the models behind the encoder, and writing the table, cost. Whole commands, one process."""
    extraction = ["extract_features.py", "--set", "run.name=benchmark", "--set", "run.base=demo", "--set",
                  "features.checkpoint=runs/demo/finetune/best.pt"]
    prediction = ["predict.py", "--frames", "data/demo/Aff-Wild2/cropped_aligned", "--out",
                  "runs/benchmark/predictions.csv"]
    ratios = []
    for _ in range(rounds):
        seconds = []
        for command in (extraction, prediction):
            began = time.time()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.time() - began)
        shutil.rmtree("runs/benchmark")
        ratios.append(seconds[1] / seconds[0])
        print(f"extraction {seconds[0]:.1f} s, prediction {seconds[1]:.1f} s: {ratios[-1]:.2f} times as long")
    print(f"median of {rounds} pairs: {sorted(ratios)[rounds // 2]:.2f}")


def measure_scorer(videos: int = 76, frames: int = 13_158):
    """Seconds that a core works for `metrics.py --task ...`, on a CSV of predict.py with all columns."""
    folder, rng = Path("runs/benchmark_scorer"), np.random.default_rng(0)
    table = rng.random((1000, 2 + 8 + 12))
    cells = [",".join([f"{v:.6f}" for v in row[:2]] + ["Neutral"] + [f"{v:.6f}" for v in row[2:]])
             for row in table]
    lines = [",".join(["video,frame,time,face", *VA.outputs, "expression", *EXPR.outputs, *AU.outputs])]
    for video in range(videos):
        lines += [f"{video}-30-1280x720,{t + 1},{t / 30:.6f},1,{cells[t % 1000]}" for t in range(frames)]
        labels = {"va": rng.uniform(-1, 1, (frames, 2)), "expr": rng.integers(0, 8, frames),
                  "au": rng.integers(0, 2, (frames, 12))}
        for task in TASKS.values():
            (folder / task.name).mkdir(parents=True, exist_ok=True)
            np.savetxt(folder / task.name / f"{video}-30-1280x720.txt", labels[task.name], delimiter=",",
                       fmt="%.3f" if task is VA else "%d", header=",".join(task.outputs), comments="")
    (folder / "predictions.csv").write_text("\n".join(lines))
    for task in TASKS:
        began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "metrics.py", "--task", task, "--predictions",
                        str(folder / "predictions.csv"), "--labels", str(folder / task)], check=True,
                       stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"metrics.py --task {task}: {videos * frames:,} frames in {work:.1f} s of one core, "
              f"{time.time() - began:.1f} s in all")
    shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the finished demo with README")
    parser.add_argument("--training", action="store_true", help="only checkpoints and a second process")
    parser.add_argument("--scorer", action="store_true", help="only metrics.py on a million predictions")
    parser.add_argument("--prediction", action="store_true", help="only predict.py beside the extraction")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only each stage's speed on this device")
    parser.add_argument("--compile", action="store_true", help="with --device: torch.compile too")
    parser.add_argument("--segment-steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.segment_steps:
        segment_steps()
    elif options.device:
        try:
            benchmark_device.main(options.device, options.compile)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    elif options.prediction:
        measure_prediction()
    elif options.training:
        measure_checkpoints(measure_second_process())
    elif options.scorer:
        measure_scorer()
    elif options.check:
        sys.exit(0 if check() else 1)
    else:
        measure()
