"""What the plain loops of the tests share: the order of samples, the learning rate, the optimiser, a step,
and what a loop leaves behind. It is written out, so that nothing depends on run.py or training.py."""

import math

import numpy as np
import torch

from stages import STEP_SECONDS


def batches(samples: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The samples of each step of an epoch; the last step may have fewer."""
    order = np.random.default_rng([2, seed, epoch]).permutation(samples)
    return [order[first:first + batch].tolist() for first in range(0, samples, batch)]


def crop_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    return np.random.default_rng([3, seed, epoch, sample])


def seed_dropout(seed: int, epoch: int, step: int):
    """`step` of the epoch, in a single process."""
    state = np.random.SeedSequence([seed, epoch, step, 0]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) // 2)


def adamw(model, settings, factors=None):
    """AdamW with weight decay on matrices only; `factors`: of the learning rate, by the parameter's name."""
    groups = [{"params": [p], "weight_decay": settings.weight_decay if p.squeeze().ndim > 1 else 0,
               "times": factors[name] if factors else 1} for name, p in model.named_parameters()
              if p.requires_grad]
    return torch.optim.AdamW(groups, betas=settings.betas)


def step_text(done: int, steps: int, seen: int, loss, unit: str) -> str:
    """The progress line after `done` steps with `seen` samples, each step STEP_SECONDS long."""
    speed, left = seen / (STEP_SECONDS * done), STEP_SECONDS * (steps - done)
    time_left = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return f"  step {done} of {steps}  loss {loss:.4f}  {speed:.1f} {unit}/s  {time_left} left"


class Plain:
    """A plain loop's optimiser steps, and what it leaves behind: `rows` of log.csv, the printed `lines` of
    steps and epochs, and the best epoch."""

    def __init__(self, model, optimizer, settings, steps: int, epochs: int, unit: str):
        self.model, self.optimizer, self.unit = model, optimizer, unit
        self.peak, self.warmup = settings.lr, settings.warmup_epochs * steps
        self.steps, self.epochs, self.done, self.seen, self.best = steps, epochs, 0, 0, -1.0
        self.rows, self.lines, self.losses, self.norms = [], [], [], []
        self.clip, self.clipped = getattr(settings, "clip", 0), 0            # steps with a shorter gradient

    def step(self, samples: int, loss):
        """Step along the gradient that there is. The learning rate is peak · t / w up to t = w, then half a
        cosine: the first step is t = 1 of the run's steps + 1, w is the number of warm-up steps."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        if 0 < self.clip < norm:
            for gradient in gradients:
                gradient *= self.clip / (norm + 1e-6)        # PyTorch's: never divides by 0
        self.clipped += int(0 < self.clip < norm)
        self.norms.append(norm)
        self.losses.append(loss.detach())
        self.done, self.seen, total = self.done + 1, self.seen + samples, self.steps * self.epochs
        t, w = self.done / (total + 1), self.warmup / (total + 1)
        cosine = (1 + math.cos(math.pi * (t - w) / (1 - w))) / 2
        self.rate = self.peak * t / w if t < w else self.peak * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("fixed", self.rate * group.get("times", 1))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lines.append(step_text(self.done, total, self.seen, loss, self.unit))

    def keep_best(self, score: float) -> str:
        """Among epochs with the same score the first is the best. -> what is said of this one"""
        if score <= self.best:
            return ""
        self.best, self.best_epoch = score, len(self.rows) + 1
        self.best_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        return "  (best so far)"

    def mean_loss(self) -> float:
        return sum(self.losses).item() / self.steps

    def end_epoch(self, *more):
        """`more`: what stands in the row between the gradient's norm and the seconds."""
        values = [len(self.rows) + 1, self.rate, self.mean_loss(), sum(self.norms).item() / self.steps, *more,
                  STEP_SECONDS * self.steps]
        self.rows.append(",".join(str(v) if isinstance(v, int) else f"{v:.6g}" for v in values))
        self.losses, self.norms = [], []


def loop_lines(said: str) -> list[str]:
    """What a stage has printed about its steps and epochs."""
    return [line for line in said.splitlines() if line.startswith(("  step ", "  epoch "))]


def not_said(said: str, *lines: str) -> list[str]:
    """Those of the lines that a stage has not printed."""
    return [line for line in lines if line not in said.splitlines()]
