"""The three task losses (paper §3.4) and those of EMMA and masked CoTEX, exact over any number of processes.

CCC is not a mean over frames, and valid frames lie unevenly over processes. So the mean of the losses that
the processes would find alone is a different loss. Here every loss is a function of sums, and the sums are
taken over all processes first (`all_sum`). The loss is the one of a single process with the whole batch, and
so is every gradient, once the processes have added theirs up (`distributed.Team.parallel`).

All take a validity mask of the target's shape; what stands in invalid entries, NaN included, changes nothing.
With no valid entry the loss is exactly 0 and so is its gradient.

    python losses.py       # each loss at chance, and on a perfect prediction
"""

import math

import torch
from torch.nn import functional as F

from distributed import all_sum


def _checked(pred, target, valid, expected):
    """The prediction, at least in float32: sums over 10,000 frames do not fit half precision.

    Raises ValueError unless target and mask have the shape `expected`.
    """
    if not target.shape == valid.shape == expected:
        raise ValueError(f"shapes do not fit: prediction {tuple(pred.shape)}, target {tuple(target.shape)}, "
                         f"mask {tuple(valid.shape)}; target and mask must be {tuple(expected)}")
    return _at_least_float32(pred)


def _at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ccc_loss(pred, target, valid):
    """Valence-arousal loss: 1 - CCC over all valid frames of the batch, added over the last dimension.

        CCC(x, y) = 2 cov(x, y) / (σ_x² + σ_y² + (μ_x - μ_y)²)      (1)
        L_VA = 1 - CCC                                              (2)

    The paper writes cov(x, y) = Σ (x - μ_x)(y - μ_y) in eq. 1. Taken literally this is wrong by a factor N:
    σ² is divided by the number N of frames, this is not. Here all three are divided by N (population
    statistics), as in the metric.
    The paper does not say how valence and arousal become one loss; they are added, as in the authors' code.

    Shape: all three (..., 2) -> scalar in [0, 4]. A dimension with no valid frame counts 0. Not a mean over
    frames, so it cannot be accumulated over pieces: a process passes its whole share of the batch at once.
    Raises ValueError if the shapes differ.
    """
    pred = _checked(pred, target, valid, pred.shape)
    frames = tuple(range(pred.ndim - 1))                                       # all dimensions but the last
    w = valid.to(pred.dtype)
    x, y = pred.masked_fill(~valid, 0), target.to(pred.dtype).masked_fill(~valid, 0)
    sums = torch.stack([w.sum(frames), x.sum(frames), y.sum(frames)])          # three of (..., 2) -> (3, 2)
    n, sum_x, sum_y = all_sum(sums)                                            # (3, 2) -> three of (2,)
    N = n.clamp(min=1)
    mu_x, mu_y = sum_x / N, sum_y / N
    # d/dμ Σ (x - μ)² = -2 Σ (x - μ) = 0 at the mean, the sum taken over all processes; in the same way
    # d/dμ_x Σ (x - μ_x)(y - μ_y) = -Σ (y - μ_y) = 0. So no gradient flows through the means here: detach
    # them. (Within one process the sums are not 0, so each process would otherwise add a wrong share.)
    dx, dy = (x - mu_x.detach()) * w, (y - mu_y.detach()) * w                  # two of (..., 2)
    moments = [(dx * dx).sum(frames), (dy * dy).sum(frames), (dx * dy).sum(frames)]   # three of (2,)
    var_x, var_y, cov = all_sum(torch.stack(moments)) / N                      # (3, 2) -> three of (2,)
    # eq. 1. Where both are the same constant, 0 / tiny = 0.
    ccc = 2 * cov / (var_x + var_y + (mu_x - mu_y) ** 2).clamp(min=1e-6)
    return ((1 - ccc) * (n > 0)).sum()                                         # eq. 2, (2,) -> scalar


def _mean(loss, valid, count):
    """1/N Σ_i of eq. 3 and 4 over the valid entries of all processes. With `count`, this piece's share: Σ_i
    over the piece, N = count."""
    total = (loss * valid).sum()                                               # (...) -> scalar
    if count is not None:
        return total / count
    sums = torch.stack([total, valid.sum().to(total.dtype)])                   # two scalars -> (2,)
    total, N = all_sum(sums)                                                   # (2,) -> two scalars
    return total / N.clamp(min=1)


def expr_loss(logits, target, valid, count=None):
    """Cross-entropy over the valid frames of the batch, all classes weighted alike.

        L_Expr = -1/N Σ_i Σ_{c=1}^M y_ic log(p_ic)      (3)

    y_ic is 1 if class c is the label of frame i, else 0; p_i = softmax(logits_i); N valid frames, M classes.

    Shape: (..., M) logits, (...) classes, (...) mask -> scalar.
    `count` is for a batch that is accumulated in pieces: N of the whole batch over all processes, at least 1.
    The result is then this piece's share, and nothing is sent. The shares of all pieces on all processes add
    up to the loss, and their gradients to its gradient.
    Raises ValueError if the shapes do not fit.
    """
    logits = _checked(logits, target, valid, logits.shape[:-1])
    logits = logits.masked_fill(~valid[..., None], 0).flatten(0, -2)           # (..., M) -> (frames, M)
    target = target.masked_fill(~valid, 0).flatten().long()                    # (...) -> (frames,)
    # -Σ_c y_ic log(p_ic): y_ic leaves -log(p_ic) of the labelled class c.
    loss = F.cross_entropy(logits, target, reduction="none")                   # (frames, M) -> (frames,)
    return _mean(loss, valid.flatten(), count)


def au_loss(logits, target, valid, count=None):
    """Binary cross-entropy over the valid entries of the batch, all action units weighted alike.

        L_AU = -1/N Σ_i [y_i · log(σ(x_i)) + (1 - y_i) · log(1 - σ(x_i))]      (4)

    x_i is the logit and y_i the label of entry i (one action unit in one frame); σ the sigmoid; N valid
    entries.

    Shape: all three (..., 12) -> scalar. Masked per entry, not per frame: a frame with eleven labelled AUs
    trains eleven outputs. `count` as in `expr_loss`. Raises ValueError if the shapes differ.
    """
    x = _checked(logits, target, valid, logits.shape).masked_fill(~valid, 0)
    y = target.to(x.dtype).masked_fill(~valid, 0)
    # -[y_i log(σ(x_i)) + (1 - y_i) log(1 - σ(x_i))], computed from x_i so that no log(0) occurs
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")          # (..., 12)
    return _mean(loss, valid, count)


# ---- EMMA and masked CoTEX

def weighted_au_loss(logits, target, valid, pos_weight, count=None):
    """EMMA's action units: binary cross-entropy, rare ones weighted up, added over the AUs of a frame.

        L_AU = -1/N Σ_i Σ_k [w_k · y_ik · log(σ(x_ik)) + (1 - y_ik) · log(1 - σ(x_ik))]

    y_ik is the label of AU k in frame i; N frames in which at least one AU is labelled. w_k = negatives /
    positives of AU k in the training file, so that both add the same at logit 0: a frame then costs
    2 ln 2 · Σ_k (1 - p_k) on average, p_k the share of positives.
    Unlike `au_loss`, added and not averaged over the AUs: the term is several times larger (EMMA's choice).

    Shape: logits, target, mask (..., K), pos_weight (K,) -> scalar. Masked per entry. `count` as in
    `expr_loss`. Raises ValueError if the shapes differ.
    """
    x = _checked(logits, target, valid, logits.shape).masked_fill(~valid, 0)
    if pos_weight.shape != logits.shape[-1:]:
        raise ValueError(f"pos_weight {tuple(pos_weight.shape)} does not fit logits {tuple(logits.shape)}; "
                         "expected a weight for each action unit")
    y, w = target.to(x.dtype).masked_fill(~valid, 0), pos_weight.to(x.dtype)
    loss = F.binary_cross_entropy_with_logits(x, y, pos_weight=w, reduction="none")      # (..., K)
    return _mean((loss * valid).sum(dim=-1), valid.any(dim=-1), count)                   # (..., K) -> (...)


def js_divergence(*logits):
    """Jensen-Shannon divergence between the predictions of several views of the same samples, in nats.

        JS(p_1, ..., p_V) = 1/V Σ_v Σ_c p_vc · log(p_vc / m_c),    m = 1/V Σ_v p_v

    p_v = softmax(logits_v). 0 where all views agree, at most log V where each is sure of another class.
    Computed from the logits, so that a probability of 0 has a finite gradient.

    Shape: V of (..., M) -> (...), one number for each sample. Raises ValueError if the shapes differ.
    """
    shapes = [tuple(view.shape) for view in logits]
    if len(set(shapes)) != 1:
        raise ValueError(f"views of shapes {shapes}; expected at least one, all of the same (..., classes)")
    log_p = torch.stack([_at_least_float32(view) for view in logits]).log_softmax(dim=-1)   # (V, ..., M)
    log_m = log_p.logsumexp(dim=0) - math.log(len(logits))                                  # (..., M)
    return (log_p.exp() * (log_p - log_m)).sum(dim=-1).mean(dim=0)                          # -> (...)


def js_loss(logits, valid, count=None):
    """CoTEX: the mean of `js_divergence` over the valid samples. Gradients flow into every view.

    Shape: a list of V of (..., M), (...) mask -> scalar in [0, log V]. `count` as in `expr_loss`.
    Raises ValueError if the shapes do not fit.
    """
    if any(view.shape[:-1] != valid.shape for view in logits):
        raise ValueError(f"shapes do not fit: views {[tuple(view.shape) for view in logits]}, mask "
                         f"{tuple(valid.shape)}; expected (..., classes) and (...)")
    views = [view.masked_fill(~valid[..., None], 0) for view in logits]
    return _mean(js_divergence(*views), valid, count)


if __name__ == "__main__":
    torch.manual_seed(0)
    va, expr = torch.rand(4, 300, 2) * 2 - 1, torch.randint(8, (4, 300))
    au = (torch.rand(4, 300, 12) < 0.2).float()
    rows = [("va", ccc_loss, va, va), ("expr", expr_loss, expr, F.one_hot(expr, 8) * 100.0),
            ("au", au_loss, au, au * 200 - 100)]
    for name, loss, target, perfect in rows:
        valid = torch.ones(target.shape, dtype=torch.bool)
        chance, best = loss(torch.zeros_like(perfect), target, valid), loss(perfect, target, valid)
        print(f"{name:5s}loss of a model that always outputs 0: {chance:.3f}, of a perfect one: {best:.3f}")
    sure, other = torch.tensor([100.0, 0, 0]), torch.tensor([0, 100.0, 0])
    print(f"JS   of two views that are sure of different classes: {js_divergence(sure, other):.3f}, "
          f"of the same: {js_divergence(sure, sure):.3f}")
