"""What the training loops share: batches, randomness, accumulation, optimiser, progress (paper §4.1).

Nothing random is ever saved, because everything random is a function of numbers that are known anyway: the
order of an epoch of (seed, epoch); the crop, the flip and the MAE mask of a sample of (seed, epoch,
sample); dropout and drop path of (seed, epoch, step, rank). Step 700 is the same whether a run reached it in
one go or after three crashes.
"""

import contextlib
import datetime
import math
import re
import signal
import time
from functools import partial

import numpy as np
import torch

from engine.distributed import STOP, Team


# ---- Randomness and batches

def generator(*numbers) -> np.random.Generator:
    """Random numbers that depend on nothing but `numbers`, in practice (seed, epoch, sample)."""
    # With the length, because NumPy takes (3, 4) and (3, 4, 0) for the same seed.
    return np.random.default_rng([len(numbers), *numbers])


def seed_dropout(seed: int, epoch: int, step: int, rank: int):
    """Dropout and drop path draw from PyTorch's global generators: set them anew at each step."""
    state = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> 1))


def shares(samples: int, batch: int, seed: int, epoch: int, team: Team, first: int = 0):
    """Yield this process's share of each batch of an epoch, lists of indices, from step `first` on.

    Every sample once per epoch, for any number of processes; the last batch may be short, and a share may
    be empty. PyTorch's DistributedSampler repeats or drops samples to make the shares even, which changes
    loss and result.
    """
    order = generator(seed, epoch).permutation(samples)
    for start in range(first * batch, samples, batch):
        yield order[start:start + batch][team.rank::team.world].tolist()


def loader(dataset, batches, workers: int, team: Team):
    """PyTorch's DataLoader, started: goes over `batches` (lists of indices), put together by `collate`.

    With workers, each reads two batches ahead, in shared memory. Raises RuntimeError if that is full.
    """
    collate = partial(_in_shared_memory, dataset.collate) if workers else dataset.collate
    ready = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                        collate_fn=collate, pin_memory=team.device.type == "cuda")
    # A scheduler sends SIGTERM, and a terminal Ctrl-C, to the workers too, and the training still needs
    # them for its last step. What is blocked when they start stays blocked in them; this process gets it
    # after `finally`.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        return iter(ready)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)


def _in_shared_memory(collate, items):
    """What a worker does: the batch of these items, its tensors in shared memory.

    PyTorch would move them there later, in a thread of the worker. When the memory is full, an error in
    that thread is only printed, and the training would wait for the batch for ever.
    """
    batch = collate(items)
    for part in batch:
        part.share_memory_()
    return batch


# ---- Steps

def in_pieces(ddp, count: int, *tensors):
    """Cut a batch into `count` pieces: `for x, y in in_pieces(ddp, 4, images, labels)`. Call `backward` for
    each. DDP sends gradients with the last one only, so they cross the network once."""
    cut = zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)
    for i, piece in enumerate(cut):
        wait = i < count - 1 and hasattr(ddp, "no_sync")               # a plain model sends nothing
        with ddp.no_sync() if wait else contextlib.nullcontext():
            yield piece


def clip_gradient(model, longest: float) -> torch.Tensor:
    """The length of the gradient over all parameters, a scalar on the model's device. If it is above
    `longest`, the gradient is shortened to that; 0 = never."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), longest or math.inf)


# ---- Optimiser

def set_learning_rate(optimizer, step: int, steps: int, warmup_steps: float, peak: float):
    """Set the learning rate of step `step` of `steps`, counted from 0 over the whole run: linear warm-up to
    `peak`, then half a cosine to 0. A function of the step alone, so a resumed run has nothing to restore. A
    group that has a factor (`adamw`) gets lr · factor; one with a fixed learning rate keeps it."""
    # The n steps divide the run into n + 1 parts, so that neither the first nor the last has rate 0.
    t, warmup = (step + 1) / (steps + 1), min(warmup_steps, steps) / (steps + 1)         # shares of the run
    lr = peak * t / warmup if t < warmup else (
        peak * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup))))
    for group in optimizer.param_groups:
        group["lr"] = group.get("fixed", lr * group.get("factor", 1.0))


def layers_of(model) -> dict[str, int]:
    """The layer of each parameter, by name: 0 for a ViT's patch embedding and cls token, 1 to depth for its
    blocks, depth + 1 for its last norm and for all that is no part of a ViT. There may be several ViTs, of
    one depth."""
    layers = {}
    for name, _ in model.named_parameters():
        block = re.search(r"\bblocks\.(\d+)\.", name)
        below = re.search(r"\b(patch_embed|cls_token|pos_embed)\b", name)
        layers[name] = int(block[1]) + 1 if block else 0 if below else math.inf
    top = 1 + max((layer for layer in layers.values() if layer < math.inf), default=0)
    return {name: min(layer, top) for name, layer in layers.items()}


def adamw(model, section):
    """AdamW by the settings of a section, with weight decay on matrices only, not on biases, norms, tokens.

    With layer_decay below 1, the lower layers of a ViT learn more slowly, since pre-training has taught them
    what all images need. `set_learning_rate` multiplies the learning rate of a layer by

        factor = layer_decay^(depth + 1 - layer)        ViT-B, 0.65: 1 for the head, 0.0037 for layer 0

    The head's groups come first, because log.csv shows the learning rate of the first group.
    """
    layers = layers_of(model)
    top = max(layers.values())
    factors = {name: getattr(section, "layer_decay", 1.0) ** (top - layer) for name, layer in layers.items()}
    groups = []
    for factor in sorted(set(factors.values()), reverse=True):
        for is_matrix in (True, False):
            trained = [p for name, p in model.named_parameters() if p.requires_grad
                       and factors[name] == factor and (p.squeeze().ndim > 1) == is_matrix]
            decay = section.weight_decay * is_matrix
            groups.append({"params": trained, "factor": factor, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=section.lr, betas=tuple(section.betas), fused=True)


# ---- Progress

class Progress:
    """A line every 5 seconds: how much of `total` is done (by this process), how fast, how long it takes."""

    def __init__(self, total: int, unit: str, team: Team):
        self.total, self.unit, self.team, self.done = total, unit, team, 0
        self.began = self.printed = time.time()

    def add(self, count: int, more=str):
        """`more()`: what else is to be said; it may wait for the device."""
        self.done += count
        now = time.time()
        if now - self.printed > 5:
            self.printed, seconds = now, now - self.began
            left = datetime.timedelta(seconds=int((self.total - self.done) * seconds / max(self.done, 1)))
            self.team.say(f"  {self.done:,} of {self.total:,} {self.unit}  {self.done / seconds:,.2f} "
                          f"{self.unit}/s  {left} left{more()}")
