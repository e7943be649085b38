"""The ways in which benchmark_device.py runs a step: the project's own, compiled, and a plain baseline.

A way says how images wait on the host and come to the device, in which precision is computed, what the model
and the optimiser are. The steps in benchmark_steps.py are written once, for any way. `Own` calls what the
stages call, so what is measured is what trains.
"""

import contextlib
import math

import torch
from torch import nn
from torch.nn import functional as F

import training
from distributed import Team
from images import normalise
from vit import Attention


class Own:
    """The project's: uint8 images, pinned, normalised on the device; fused attention; bf16 on a GPU."""
    name = "project"

    def __init__(self, team: Team):
        self.team = team

    def place(self, model: nn.Module):
        """The model, on the device."""
        return self.team.parallel(model)

    def call(self, function):
        """A model, or a function of one, as a step calls it."""
        return function

    def wait(self, tensor):
        """A tensor as it waits on the host: the DataLoader pins it for a GPU."""
        return tensor.pin_memory() if self.team.device.type == "cuda" else tensor

    def fetch(self, waiting):
        """To the device, without waiting for the copy."""
        return waiting.to(self.team.device, non_blocking=True)

    def wait_images(self, images):
        """uint8 (B, H, W, 3), as they wait on the host."""
        return self.wait(images)

    def fetch_images(self, waiting):
        """-> float32 (B, 3, H, W), normalised, on the device."""
        return normalise(self.fetch(waiting))

    def adamw(self, model, section):
        """The optimiser of pre-training and fine-tuning."""
        return training.adamw(model, section.lr, section.betas, section.weight_decay)

    def task_adamw(self, model, section):
        """The optimiser of the tasks, on a GPU in one kernel."""
        return torch.optim.AdamW(model.parameters(), lr=section.lr, weight_decay=section.weight_decay,
                                 fused=training.fused(model))

    def precision(self):
        """A context for all that is computed."""
        return contextlib.nullcontext()


class Compiled(Own):
    """The project's, through torch.compile."""
    name = "compiled"

    def call(self, function):
        return torch.compile(function)


# ---- The plain baseline

class PlainAttention(Attention):
    """softmax(q kᵀ / √d) v as it is written, with all n x n weights in memory. The same parameters."""

    def forward(self, x, valid=None, dropout: float = 0.0):
        B, N, D = x.shape
        q, k, v = self.split(x)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])         # (B, H, N, d) -> (B, H, N, N)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None, :], -math.inf)
        weights = F.dropout(scores.softmax(dim=-1), dropout, self.training)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))  # (B, H, N, d) -> (B, N, D)


class PlainTeam(Team):
    """A single process that computes in float32 on a GPU too."""

    def autocast(self):
        return contextlib.nullcontext()


class Plain(Own):
    """What PyTorch does if nothing more is said: attention written out, float32 without TF32, AdamW in its
    default form (not fused), float32 images from ordinary memory.

    The images wait normalised, because workers would have done that on the host beside the steps; what it
    costs them is a row of its own (benchmark_steps.py). So a step pays only for copying four times as much.
    """
    name = "plain"

    def __init__(self, team: Team):
        super().__init__(PlainTeam(team.rank, team.world, team.device))

    def place(self, model):
        for module in list(model.modules()):
            if type(module) is Attention:
                module.__class__ = PlainAttention                         # the weights stay as they are
        return model.to(self.team.device)

    def wait(self, tensor):
        return tensor

    def fetch(self, waiting):
        return waiting.to(self.team.device)

    def wait_images(self, images):
        return normalise(images)

    def fetch_images(self, waiting):
        return self.fetch(waiting)

    def adamw(self, model, section):
        return torch.optim.AdamW(model.parameters(), lr=section.lr, betas=tuple(section.betas),
                                 weight_decay=section.weight_decay, fused=False)

    def task_adamw(self, model, section):
        return torch.optim.AdamW(model.parameters(), lr=section.lr, weight_decay=section.weight_decay,
                                 fused=False)

    @contextlib.contextmanager
    def precision(self):
        matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        before = matrices.fp32_precision, convolutions.fp32_precision
        matrices.fp32_precision = convolutions.fp32_precision = "ieee"          # exact float32, no TF32
        try:
            yield
        finally:
            matrices.fp32_precision, convolutions.fp32_precision = before
