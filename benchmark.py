"""The numbers in README, measured: time and memory of each stage of the demo, scores of the three tasks, and the ablation.

    python benchmark.py --check       # compare the scores of a finished demo with what README promises; code 1 if one falls short
    python benchmark.py --training    # cost of a checkpoint, and of a second process, at the paper's sizes (about 5 minutes)
    python benchmark.py               # everything from nothing into runs/benchmark.md and docs/pipeline.png (about 12 minutes on two cores)

The ablation takes one thing out at a time (Table 5 of the paper's final version, and two rows more): the temporal model's parts;
the Expr fine-tuning, so that the features are the MAE's; the pre-training, so that fine-tuning starts from random weights.
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

import torch
from PIL import Image, ImageDraw

import pictures
import training
from losses import au_loss
from mae import MaskedAutoencoder
from temporal import SegmentModel

PROMISED = {"va": 0.60, "expr": 0.50, "au": 0.65}
TASKS = tuple(PROMISED)
FEATURES = "task.features=runs/demo/features"
# Row -> (stages to run before the tasks, settings of those and of the tasks).
ABLATION = {
    "full": None,
    "no TCN": ([], [FEATURES, "temporal.tcn=false"]),
    "no temporal encoder": ([], [FEATURES, "temporal.encoder=false"]),
    "single frames (neither)": ([], [FEATURES, "temporal.tcn=false", "temporal.encoder=false"]),
    "no Expr fine-tuning": (["extract_features.py"], ["features.encoder=runs/demo/pretrain/last.pt"]),
    "no pre-training": (["train_finetune.py", "extract_features.py"], ["finetune.start=none"]),
}


def run(script, *arguments, processes: int = 2) -> tuple[float, float]:
    """Run one script as README does. -> seconds, peak memory of its largest process in GB (of all so far)."""
    command = ["torchrun", f"--nproc_per_node={processes}", script, *arguments]
    print("$", " ".join(command), flush=True)
    began = time.time()
    subprocess.run([str(Path(sys.executable).with_name("torchrun")), *command[1:]], check=True)
    return time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def score(name: str, task: str) -> float:
    """What a finished run has written into its metrics.json."""
    return json.loads(Path(f"runs/{name}/task_{task}/metrics.json").read_text())["score"]


def check() -> bool:
    """Print each task's score of the demo beside the promised one."""
    good = True
    for task, least in PROMISED.items():
        reached = score("demo", task)
        good &= reached >= least
        print(f"{task:5s} {reached:.3f}, promised {least:.2f}: {'reached' if reached >= least else 'NOT REACHED'}")
    return good


def measure():
    """The demo stage by stage, then the ablation; writes runs/benchmark.md."""
    shutil.rmtree("data/demo", ignore_errors=True)
    for name in ["demo", *(f"ablation_{i}" for i in range(len(ABLATION)))]:
        shutil.rmtree(Path("runs") / name, ignore_errors=True)
    lines = ["| stage | seconds |", "|---|---|"]
    for script, *arguments in (["synthetic.py"], ["train_pretrain.py"], ["train_finetune.py"], ["extract_features.py"],
                               ["train_task.py", "--task", "au"], ["train_task.py", "--task", "va"], ["train_task.py", "--task", "expr"]):
        seconds, memory = run(script, *arguments)
        lines.append(f"| {' '.join([script, *arguments])} | {seconds:.0f} |")
    lines += ["", f"Largest process: {memory:.2f} GB.", "", "| | VA mean CCC | Expr macro F1 | AU mean F1 |", "|---|---|---|---|"]
    for i, (row, change) in enumerate(ABLATION.items()):
        name = f"ablation_{i}" if change else "demo"
        if change:
            stages, settings = change
            flags = [f for s in [f"run.name={name}", *settings] for f in ("--set", s)]
            for stage in stages:
                run(stage, *flags)
            for task in TASKS:
                run("train_task.py", "--task", task, *flags)
        lines.append(f"| {row} | " + " | ".join(f"{score(name, task):.3f}" for task in TASKS) + " |")
    Path("runs/benchmark.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    compose(Path("runs/demo"), Path("docs/pipeline.png"))


def compose(run_folder: Path, path: Path):
    """README's picture: the reconstructions of pre-training above the timeline of one video."""
    parts = [("1  MAE pre-training on still faces: three quarters of each are hidden",
              Image.open(run_folder / "pretrain/reconstruction.png")),
             ("2  fine-tuned encoder: one feature per frame    3  segments through TCN and Transformer    4  AUs of each frame",
              Image.open(run_folder / "task_au/timeline.png"))]
    sheet = Image.new("RGB", (max(part.width for _, part in parts), sum(part.height + 50 for _, part in parts)), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for title, part in parts:
        pen.text((6, y + 14), title, pictures.INK, pictures.font(17))
        sheet.paste(part, (0, y + 44))
        y += part.height + 50
    pictures.save(sheet, path)


def segment_steps(steps: int = 2, batch: int = 32) -> float:
    """Seconds per optimiser step of the paper's segment model, `batch` segments of 300 frames shared among the processes."""
    team = training.start()
    torch.manual_seed(0)
    model = team.parallel(SegmentModel(768, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    x, y = torch.randn(batch, 300, 768)[team.rank::team.world], (torch.rand(batch, 300, 12) < 0.2)[team.rank::team.world].float()
    for step in range(steps + 1):                            # the first one is warm-up
        if step == 1:
            team.wait()
            began = time.time()
        optimizer.zero_grad(set_to_none=True)
        au_loss(model(x), y, torch.ones_like(y, dtype=torch.bool)).backward()
        optimizer.step()
    team.wait()
    return (time.time() - began) / steps


def measure_training(rounds: int = 3):
    """Two processes against one, a thread each, in turn; then the time to write a checkpoint against an epoch."""
    # Tensors above 32 MB, which only the single process has, are fresh pages of memory each time unless the C library keeps them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    seconds = {1: [], 2: []}
    for _ in range(rounds):
        for processes in seconds:
            command = [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={processes}", __file__, "--segment-steps"]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            seconds[processes].append(float(output.stdout.split()[-1]))
    ratios = sorted(a / b for a, b in zip(seconds[1], seconds[2]))
    print(f"segment model, 32 segments a step: {min(seconds[1]):.2f} s in one process, {min(seconds[2]):.2f} s in two; "
          f"ratio {ratios[rounds // 2]:.2f} (of {rounds} pairs: {ratios[0]:.2f} to {ratios[-1]:.2f})")
    for name, model, step in (("segment model", SegmentModel(768, 12), min(seconds[2])), ("MAE", MaskedAutoencoder(), None)):
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        times = []
        for _ in range(rounds):
            began = time.time()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            training.write_file("runs/benchmark.pt", lambda file: torch.save(state, file))
            times.append(time.time() - began)
        size = Path("runs/benchmark.pt").stat().st_size / 1e6
        Path("runs/benchmark.pt").unlink()
        # Aff-Wild2's VA training set: 1,653,900 frames at a stride of 200 are at least 8,270 segments, 259 steps of 32.
        share = f", {100 * sorted(times)[rounds // 2] / (259 * step):.2f} % of an epoch of 259 steps" if step else ""
        print(f"checkpoint of the {name}: {size:,.0f} MB in {sorted(times)[rounds // 2]:.2f} s, flushed to disk{share}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the finished demo's scores with README's promise")
    parser.add_argument("--training", action="store_true", help="only the cost of checkpoints and of a second process")
    parser.add_argument("--segment-steps", action="store_true", help=argparse.SUPPRESS)      # what --training runs
    options = parser.parse_args()
    if options.segment_steps:
        print(segment_steps()) if int(os.environ.get("RANK", 0)) == 0 else segment_steps()
    elif options.training:
        measure_training()
    elif options.check:
        sys.exit(0 if check() else 1)
    else:
        measure()
