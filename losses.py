"""The three task losses (paper §3.4), exact over any number of processes.

CCC is not a mean over frames, and valid frames lie unevenly over processes, so averaging each process's own loss is a different
loss. Here every loss is a function of sums, and the sums are taken over all processes first. The value is the one a single
process would get on the whole batch, and after DDP has averaged the gradients, so is every gradient.

All take a validity mask of the target's shape; what stands in invalid entries, NaN included, changes nothing. With no valid
entry the loss is exactly 0 and so is its gradient.

    python losses.py       # each loss at chance, and on a perfect prediction
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F


class _AllSum(torch.autograd.Function):
    """Sum over processes. Backward: every process has the same loss L(S) of the sum S = S_1 + … + S_W, and its own share of
    the gradient is L'(S) · ∂S_r/∂θ. DDP then averages the shares, that is, adds them and divides by W: so multiply by W."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * dist.get_world_size()


def all_sum(x):
    """The sum of x over all processes; x itself in a single process. Any shape, the same on each process."""
    return _AllSum.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def _checked(pred, target, valid, expected):
    if tuple(pred.shape[:-1] if expected == "class" else pred.shape) != tuple(target.shape) or target.shape != valid.shape:
        raise ValueError(f"shapes do not fit: prediction {tuple(pred.shape)}, target {tuple(target.shape)}, "
                         f"mask {tuple(valid.shape)}; target and mask must be "
                         + ("the prediction's without its last dimension" if expected == "class" else "the prediction's"))
    if pred.dtype in (torch.float16, torch.bfloat16):
        pred = pred.float()                        # sums over 10,000 frames do not fit half precision
    return pred


def ccc_loss(pred, target, valid):
    """Valence-arousal loss (eq. 1, 2): the sum over the last dimension of 1 - CCC, taken over all valid frames of the batch.

        CCC(x, y) = 2 cov(x, y) / (σ_x² + σ_y² + (μ_x - μ_y)²)

    Population statistics (divided by N): the paper's eq. 1 leaves the covariance undivided, which would make CCC grow with N.
    Shape: all three (..., 2) → scalar in [0, 4]. A dimension with no valid frame counts 0. Not a mean over frames, so it
    cannot be accumulated over pieces of a batch: the whole batch goes in one call (per process).
    """
    pred = _checked(pred, target, valid, "value")
    frames = tuple(range(pred.ndim - 1))
    x, y = pred.masked_fill(~valid, 0), target.to(pred.dtype).masked_fill(~valid, 0)
    w = valid.to(pred.dtype)
    n, sum_x, sum_y = all_sum(torch.stack([w.sum(frames), x.sum(frames), y.sum(frames)]))
    n_safe = n.clamp(min=1)
    mu_x, mu_y = sum_x / n_safe, sum_y / n_safe
    # The means are held constant inside the centred moments. Their derivative there is exactly 0, because deviations from the
    # mean add up to 0 over all processes, though not within one.
    dx, dy = (x - mu_x.detach()) * w, (y - mu_y.detach()) * w
    var_x, var_y, cov = all_sum(torch.stack([(dx * dx).sum(frames), (dy * dy).sum(frames), (dx * dy).sum(frames)])) / n_safe
    ccc = 2 * cov / (var_x + var_y + (mu_x - mu_y) ** 2).clamp(min=1e-6)     # 0 / tiny = 0 when both are the same constant
    return ((1 - ccc) * (n > 0)).sum()


def expr_loss(logits, target, valid, count=None):
    """Cross-entropy over the valid frames of the batch (eq. 3). Shape: (..., K) logits, (...) classes, (...) mask → scalar.

    `count`: the valid frames of the whole batch over all processes, where the batch is accumulated in pieces. The result is then
    this piece's share: the shares of all pieces on all processes add up to the loss. Nothing is sent, so multiply by the number
    of processes before `backward`, since DDP averages.
    """
    logits = _checked(logits, target, valid, "class")
    logits = logits.masked_fill(~valid[..., None], 0)
    loss = F.cross_entropy(logits.flatten(0, -2), target.masked_fill(~valid, 0).flatten().long(), reduction="none")
    return _mean(loss, valid.flatten(), count)


def au_loss(logits, target, valid, count=None):
    """Binary cross-entropy over the valid entries of the batch (eq. 4). Shape: all three (..., 12) → scalar.

    Masked per entry, not per frame: a frame with eleven labelled AUs trains eleven outputs. `count` as in `expr_loss`.
    """
    logits = _checked(logits, target, valid, "value").masked_fill(~valid, 0)
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype).masked_fill(~valid, 0), reduction="none")
    return _mean(loss, valid, count)


def _mean(loss, valid, count):
    total = (loss * valid).sum()
    if count is not None:
        return total / count
    total, count = all_sum(torch.stack([total, valid.sum().to(total.dtype)]))
    return total / count.clamp(min=1)


TASK_LOSS = {"va": ccc_loss, "expr": expr_loss, "au": au_loss}


if __name__ == "__main__":
    torch.manual_seed(0)
    va, expr, au = torch.rand(4, 300, 2) * 2 - 1, torch.randint(8, (4, 300)), (torch.rand(4, 300, 12) < 0.2).float()
    ok = torch.ones(4, 300, dtype=torch.bool)
    pairs = {"va": ccc_loss(torch.zeros(4, 300, 2), va, ok[..., None].expand(-1, -1, 2)),
             "expr": expr_loss(torch.zeros(4, 300, 8), expr, ok),
             "au": au_loss(torch.zeros(4, 300, 12), au, ok[..., None].expand(-1, -1, 12))}
    best = {"va": ccc_loss(va, va, ok[..., None].expand(-1, -1, 2)),
            "expr": expr_loss(F.one_hot(expr, 8) * 100.0, expr, ok),
            "au": au_loss(au * 200 - 100, au, ok[..., None].expand(-1, -1, 12))}
    for task in pairs:
        print(f"{task:5s} loss of a model that always outputs 0: {pairs[task]:.3f}, of a perfect one: {best[task]:.3f}")
