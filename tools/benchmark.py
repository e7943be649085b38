"""How fast each stage is, and whether the demo keeps what is promised.

    python -m tools.benchmark --check          # the default: the finished demo's scores and the promised
    python -m tools.benchmark --device cpu     # each stage at the demo's sizes: runs/benchmark_cpu.md
    python -m tools.benchmark --device cuda    # at the paper's

A step has its stage's model, optimiser, clipping. Its loss is the MAE's, or the mean square of the outputs.
`plain`: attention written out, float32, AdamW not fused. What is compared is measured in turn, A B A B A B.
`share`: of what a large matrix product reaches. Where memory is too small, there are no numbers.
"""

import tempfile
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from data import Images
from datasets.faces import image_folder
from datasets.synthetic_face import State, draw_face, person
from engine.checkpoints import read_json, write_text
from engine.config import from_command_line, load
from engine.distributed import Team, launch
from engine.training import adamw, clip_gradient, loader
from images import normalise
from labels import AU
from scoring import ExprClassifier
from second_paper import cnn, cotex
from second_paper.emma import EMMA
from temporal import SegmentModel
from train_pretrain import build
from vit import VisionTransformer

# The demo scores this much or more, and the best constant prediction this much at most.
PROMISED = {"va": (0.68, 0.00), "expr": (0.68, 0.10), "au": (0.64, 0.35)}
# {device: configuration; images in a MAE step, in other steps; matrices; seconds for a way in a round}
SIZES = {"cuda": ("paper", (64, 1024, 256), 128, (8192, torch.bfloat16), 1.0),
         "cpu": ("demo", (16, 64), 32, (1024, torch.float32), 0.2)}


def check() -> bool:
    """Print each task's score of the demo beside the promised one, and what a constant prediction scores."""
    kept = {}
    for task, (least, most) in PROMISED.items():
        metrics = read_json(f"runs/demo/task_{task}/metrics.json") or dict(score=torch.nan, chance=torch.nan)
        kept[task] = metrics["score"] >= least and metrics["chance"] <= most
        print(f"{task:5s} {metrics['score']:.3f}, promised {least:.2f}; a constant {metrics['chance']:.3f}, "
              f"at most {most:.2f}: {'kept' if kept[task] else 'NOT KEPT'}")
    return all(kept.values())


def step_of(name: str, config, B: int, team: Team, plain: bool = False):
    """-> a function that makes a step of a training, or of the extraction, on B samples. -> its loss"""
    v, c, e, N = config.vit, config.cotex, config.emma, (config.vit.image_size // config.vit.patch) ** 2
    torch.manual_seed(0)
    images = torch.randint(0, 256, (B, v.image_size, v.image_size, 3), dtype=torch.uint8)
    frames = torch.randn(B, config.segments.window, v.dim).half()
    section, make, tensors = {
        "MAE": (config.pretrain, lambda: build(config), [images, torch.rand(B, N)]),
        "fine-tuning": (config.finetune, lambda: ExprClassifier(config), [images]),
        "extraction": (config.finetune, lambda: ExprClassifier(config).vit, [images]),
        "segments": (config.finetune, lambda: SegmentModel(v.dim, len(AU.outputs), **vars(config.temporal)),
                     [frames, frames[:, :, 0] < 1]),                    # the second: which frames are real
        "EMMA": (e, lambda: EMMA(VisionTransformer(**vars(v), drop_path=e.drop_path), cnn.DAN()), [images]),
        "CoTEX": (c, lambda: cotex.CoTEX(6, c.views, c.mask_ratio, **vars(v), drop_path=c.drop_path),
                  [images, torch.rand(B, c.views, N)]),
    }[name]
    model, training = make(), name != "extraction"
    ddp = team.parallel(model)
    optimizer = torch.optim.AdamW(model.parameters()) if plain else adamw(model, section)
    tensors = [part.pin_memory() if team.device.type == "cuda" else part for part in tensors]

    def step():
        optimizer.zero_grad(set_to_none=True)
        x, *others = [part.to(team.device, non_blocking=True) for part in tensors]
        with torch.set_grad_enabled(training), sdpa_kernel(SDPBackend.MATH) if plain else team.autocast():
            outputs = ddp(normalise(x) if x.ndim == 4 else x.float(), *others)
        if not training:
            return outputs[:, 0].half().cpu()
        loss = outputs[0] if name == "MAE" else outputs.float().square().mean()
        loss.backward()
        clip_gradient(model, section.clip)
        optimizer.step()
        return loss.detach()
    return step


def in_turn(builds: dict, seconds: float) -> dict:
    """{way: (median seconds of a call, GB at a GPU's peak)}, measured A B A B A B; without those for which a
    GPU's memory is too small. `builds`: {way: a function that makes the step}."""
    times, timers, peaks, threads = {way: [] for way in builds}, {}, {}, torch.get_num_threads()
    for way in [*builds] * 4:                                # the first time to build it and to become warm
        try:
            if way not in timers:
                others = torch.cuda.memory_allocated()
                timers[way] = Timer("step()", globals={"step": builds[way]()}, num_threads=threads)
                timers[way].timeit(2)
                peaks[way] = (torch.cuda.max_memory_allocated() - others) / 1e9
            elif timers[way]:
                times[way] += timers[way].blocked_autorange(min_run_time=seconds).times
        except torch.OutOfMemoryError:
            timers[way] = None
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
    return {way: (float(np.median(times[way])), peaks[way]) for way in builds if timers[way]}


def speed(config, team: Team):
    """Measure all, print it, and write it to runs/benchmark_<device>.md."""
    threads, lines = torch.get_num_threads(), []
    _, batches, B, (side, dtype), seconds = SIZES[team.device.type]
    a, b = torch.randn(2, side, side, device=team.device, dtype=dtype)
    best = 2 * side ** 3 / in_turn({"product": lambda: lambda: a @ b}, seconds)["product"][0]

    def say(text):
        lines.append(text.replace("nan", "-"))
        print(lines[-1], flush=True)

    def row(name, n, builds, flops=torch.nan):
        found = in_turn(builds, seconds)
        for way in builds:
            s, peak = found.get(way, (torch.nan, torch.nan))
            rate = n * flops / s
            say(f"| {name} | {way} | {n} | {1000 * s:,.2f} | {n / s:,.0f} | {rate / 1e12:.3g} "
                f"| {rate / best:.2f} | {peak or torch.nan:.3g} |")
    say(f"{torch.cuda.get_device_name() if a.is_cuda else 'CPU'}, {threads} threads; {best / 1e12:.3g} "
        "TFLOP/s\n\n| what | way | samples | ms | a second | TFLOP/s | share | peak GB |\n|" + "---|" * 8)
    for name, n in [*[("MAE", n) for n in batches], ("fine-tuning", B), ("extraction", B), ("EMMA", B),
                    ("CoTEX", B), ("segments", config.task.batch)]:
        with FlopCounterMode(display=False) as counter:
            step_of(name, config, 2, team, plain=True)()
        ways = {way: partial(step_of, name, config, n, team, way == "plain") for way in ("project", "plain")}
        row(name, n, ways, counter.get_total_flops() / 2)
    for pixels in (112, 224):
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(0)
            draw_face(person(rng), State(np.zeros(12)), rng).resize((pixels, pixels)).save(f"{folder}/1.jpg")
            face, many = Images(image_folder(folder), config.vit.image_size, seed=0), [[0] * 64] * 10 ** 6
            face.kept_pixels = np.inf                            # no more are kept: each is decoded
            row(f"JPEG {pixels}", 64, {"one core": lambda: lambda: [face[0] for _ in range(64)]})
            row(f"JPEG {pixels}", 64, {"all cores": lambda: loader(face, many, threads, team).__next__})
    write_text(f"runs/benchmark_{team.device.type}.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    config, options = from_command_line(__doc__, device={"choices": [*SIZES]}, check={"action": "store_true"})
    if options.device:
        launch(speed, load(f"configs/{SIZES[options.device][0]}.yaml", [f"run.device={options.device}"]))
    else:
        raise SystemExit(0 if check() else 1)
