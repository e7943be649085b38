"""What the training loops share: batches, randomness, accumulation, optimiser (paper §4.1).

Nothing random is ever saved, because everything random is a function of numbers that are known anyway: the
order of an epoch of (seed, epoch); the crop, the flip and the MAE mask of a sample of (seed, epoch,
sample); dropout and drop path of (seed, epoch, step, rank). Step 700 is the same whether a run reached it in
one go or after three crashes.

    python training.py     # the learning rate of the paper's task training, and how a batch is cut up
"""

import contextlib
import math
import re
import signal
from functools import partial

import numpy as np
import torch

from distributed import Team
from images import random_crop

STOP = (signal.SIGTERM, signal.SIGINT)       # what tells a run to save and end


# ---- Randomness and batches

def generator(*numbers) -> np.random.Generator:
    """Random numbers that depend on nothing but `numbers`, in practice (seed, epoch, sample)."""
    # With the length, because NumPy takes (3, 4) and (3, 4, 0) for the same seed.
    return np.random.default_rng([len(numbers), *numbers])


def seed_dropout(seed: int, epoch: int, step: int, rank: int):
    """Dropout and drop path draw from PyTorch's global generators: set them anew at each step."""
    state = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> 1))


def augment(image, sample: int, epoch: int, size: tuple[int, int], seed: int, smallest_crop: float):
    """The random crop and flip of a sample in an epoch: uint8 (size, size, 3). For a dataset's `crop`."""
    return random_crop(image, size, generator(seed, epoch, sample), smallest_crop)


class Batches(torch.utils.data.Sampler):
    """This process's share of each batch of an epoch, from step `first` on: for DataLoader's `batch_sampler`.

    Every sample once per epoch, for any number of processes; the last batch may be short, and a share may
    be empty. PyTorch's DistributedSampler repeats or drops samples to make the shares even, which changes
    loss and result.
    """

    def __init__(self, samples: int, batch: int, seed: int, epoch: int, team: Team, first: int = 0):
        self.samples, self.batch, self.team, self.first = samples, batch, team, first
        self.order = generator(seed, epoch).permutation(samples)

    def __len__(self):
        return math.ceil(self.samples / self.batch) - self.first

    def whole(self, step: int) -> list[int]:
        """The samples of a step on all processes."""
        return self.order[step * self.batch:(step + 1) * self.batch].tolist()

    def share(self, step: int) -> list[int]:
        """The samples of a step on this process."""
        return self.whole(step)[self.team.rank::self.team.world]

    def __iter__(self):
        return (self.share(step) for step in range(self.first, self.first + len(self)))


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
        if torch.is_tensor(part):
            part.share_memory_()
    return batch


# ---- Gradient accumulation

def vit_bytes(tokens: int, dim: int, depth: int) -> float:
    """Activations that a ViT keeps for the backward pass of one image, in bytes at 32 bits.

    Per token and block about 17 numbers of width D: two norms in and out, q, k, v, attention out,
    projection, the MLP's hidden layer before and after GELU (4 D each), and the two residual sums.
    """
    return 4 * 17 * tokens * dim * depth


def pieces(share: int, bytes_each: float, parameters: int, device, largest: int = 0) -> int:
    """Into how many pieces a process cuts its share of a batch so that it fits: gradient accumulation.

    `bytes_each`: activations of one sample at 32 bits. Under bf16 they take a little more than half,
    because the sums of norms and residuals stay at 32 bits. Held besides: weights, gradients and AdamW's
    two moments, 16 bytes a parameter. Without a GPU half a gigabyte is used, so that a demo fits beside
    other programs. `largest`: run.largest_piece, which replaces the estimate unless it is 0.
    """
    if device.type == "cuda":
        room = 0.8 * torch.cuda.get_device_properties(device).total_memory - 16 * parameters
        bytes_each = 0.56 * bytes_each
    else:
        room = 0.5e9
    fits = largest or int(room / bytes_each)
    return math.ceil(share / max(1, min(share, fits)))


def effective_batch(batch: int, pieces: int, team: Team) -> str:
    """How a batch is spread, for the line that a stage prints."""
    largest = math.ceil(math.ceil(batch / team.world) / pieces)
    return (f"effective batch {batch} = {largest} x {pieces} accumulation x {team.world} processes, "
            f"on {team.device}")


def in_pieces(ddp, count: int, *tensors):
    """Cut a batch into `count` pieces: `for x, y in in_pieces(ddp, 4, images, labels)`.

    Call `backward` for each piece. DDP sends gradients with the last one only, so they cross the network
    once.
    """
    cut = [tensor.tensor_split(count) for tensor in tensors]
    for i in range(count):
        wait = i < count - 1 and hasattr(ddp, "no_sync")               # a plain model sends nothing
        with ddp.no_sync() if wait else contextlib.nullcontext():
            yield tuple(parts[i] for parts in cut)


def gradient_norm(model) -> torch.Tensor:
    """The length of the gradient over all parameters: a scalar on the model's device."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


# ---- Optimiser

def learning_rate(progress: float, warmup: float, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to 0. `progress`, `warmup`: shares of the run in [0, 1].

    A function of the step alone, so a resumed run has nothing to restore.
    """
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))


def set_learning_rate(optimizer, step: int, steps: int, warmup_steps: float, peak: float) -> float:
    """Set and return the learning rate of step `step` of `steps`, counted from 0 over the whole run.

    A group that has a factor (`adamw`) gets lr · factor.
    """
    lr = learning_rate((step + 1) / (steps + 1), min(warmup_steps, steps) / (steps + 1), peak)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    return lr


def layers_of(model) -> dict[str, int]:
    """The layer of each parameter, by name: 0 for a ViT's patch embedding and cls token, 1 to depth for its
    blocks, depth + 1 for its last norm and for all that is no part of a ViT. There may be several ViTs, of
    one depth."""
    layers = {}
    for name, _ in model.named_parameters():
        block = re.search(r"\bblocks\.(\d+)\.", name)
        if block:
            layers[name] = int(block[1]) + 1
        elif re.search(r"\b(patch_embed|cls_token|pos_embed)\b", name):
            layers[name] = 0
    top = max(layers.values(), default=0) + 1
    return {name: layers.get(name, top) for name, _ in model.named_parameters()}


def adamw(model, lr: float, betas, weight_decay: float, layer_decay: float = 1.0):
    """AdamW with weight decay on matrices only, not on biases, norms and tokens.

    With layer_decay below 1, the lower layers of a ViT learn more slowly, since pre-training has taught them
    what all images need. `set_learning_rate` multiplies the learning rate of a layer by

        factor = layer_decay^(depth + 1 - layer)        ViT-B, 0.65: 1 for the head, 0.0037 for layer 0

    The head's groups come first, because log.csv shows the learning rate of the first group.
    """
    layers = layers_of(model)
    top = max(layers.values())
    factors = {name: layer_decay ** (top - layer) for name, layer in layers.items()}
    groups = []
    for factor in sorted(set(factors.values()), reverse=True):
        trained = [p for name, p in model.named_parameters() if p.requires_grad and factors[name] == factor]
        matrices = [p for p in trained if p.squeeze().ndim > 1]
        rest = [p for p in trained if p.squeeze().ndim <= 1]
        more = {} if factor == 1 else {"factor": factor}     # without decay, groups as in older checkpoints
        groups += [{"params": matrices, "weight_decay": weight_decay, **more},
                   {"params": rest, "weight_decay": 0.0, **more}]
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas))


if __name__ == "__main__":
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps = 40 * 259                               # 40 epochs of Aff-Wild2's VA segments in batches of 32
    for step in (0, 129, 258, steps // 4, steps // 2, steps - 1):
        lr = set_learning_rate(optimizer, step, steps, warmup_steps=259, peak=3e-5)
        print(f"step {step + 1:6,d} of {steps:,}: learning rate {lr:.2e}")
    cpu = Team(0, 2, torch.device("cpu"))
    count = pieces(512, vit_bytes(50, 768, 12) + vit_bytes(197, 512, 8), 112_000_000, cpu.device)
    print("MAE pre-training of ViT-B in half a gigabyte:", effective_batch(1024, count, cpu))
    print("the batches of an epoch of 10 samples, 4 at a time, in the second of two processes:",
          list(Batches(10, 4, 0, 0, Team(1, 2, cpu.device))))
