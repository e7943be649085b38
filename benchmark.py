"""The numbers in README, measured: time and memory of each stage of the demo, scores of the three tasks, and the ablation.

    python benchmark.py --check       # compare the scores of a finished demo with what README promises; code 1 if one falls short
    python benchmark.py               # everything from nothing into runs/benchmark.md and docs/pipeline.png (about 12 minutes on two cores)

The ablation takes one thing out at a time (Table 5 of the paper's final version, and two rows more): the temporal model's parts;
the Expr fine-tuning, so that the features are the MAE's; the pre-training, so that fine-tuning starts from random weights.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

import pictures

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
    total = 0.0
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
    parts = [("1  MAE pre-training on still faces: three quarters of each are hidden", Image.open(run_folder / "pretrain/reconstruction.png")),
             ("2  fine-tuned encoder: one feature per frame    3  segments through TCN and Transformer    4  AUs of each frame",
              Image.open(run_folder / "task_au/timeline.png"))]
    sheet = Image.new("RGB", (max(part.width for _, part in parts), sum(part.height + 50 for _, part in parts)), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for title, part in parts:
        pen.text((6, y + 14), title, pictures.INK, pictures.font(17))
        sheet.paste(part, (0, y + 44))
        y += part.height + 50
    pictures.save(sheet, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the finished demo's scores with README's promise")
    if parser.parse_args().check:
        sys.exit(0 if check() else 1)
    measure()
