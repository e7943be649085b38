"""The three task losses (paper §3.4), and below them those of EMMA and masked CoTEX (second_paper/).

Each takes a validity mask of the target's shape: what stands in invalid entries, NaN included, changes
nothing. With no valid entry the loss is exactly 0 and so is its gradient.

A batch may lie on several processes, with more valid frames on one than on another: the mean of their own
losses would be another loss. So each adds up its frames, `all_sum` adds over the processes, and only then is
divided. Loss and gradients are those of one process with the whole batch (engine/distributed.py).
"""

import math

import torch
from torch.nn import functional as F

from engine.distributed import all_sum


def ccc(x, y):
    """The concordance correlation coefficient of a prediction x and its labels y, as in the paper:

        CCC(x, y) = 2 cov(x, y) / (σ_x² + σ_y² + (μ_x - μ_y)²)      (1)

    1 only if x = y: unlike a correlation it also asks for the same mean and the same deviation. The paper
    writes cov(x, y) = Σ (x - μ_x)(y - μ_y). Taken literally this is wrong by a factor N: σ² is divided by the
    number N of frames, this is not. Here all three are divided by N, as in the metric.
    Shape: two of (T,) -> scalar in [-1, 1]; 0 for two equal constants.
    """
    mu_x, mu_y = x.mean(), y.mean()
    var_x, var_y = ((x - mu_x) ** 2).mean(), ((y - mu_y) ** 2).mean()          # σ_x², σ_y²
    cov = ((x - mu_x) * (y - mu_y)).mean()
    return 2 * cov / (var_x + var_y + (mu_x - mu_y) ** 2).clamp(min=1e-6)


def ccc_loss(pred, target, valid):
    """Valence-arousal loss: L_VA = 1 - CCC (eq. 2) over all valid frames of the batch. `ccc`, but from sums.

    The paper does not say how valence and arousal become one loss; they are added, as in the authors' code.
    Shape: all three (..., 2) -> scalar in [0, 4]. A dimension with no valid frame counts 0. Not a mean over
    frames, so it cannot be accumulated over pieces: a process passes its whole share of the batch at once.
    Raises ValueError if the shapes differ.
    """
    pred = _checked(pred, pred.shape, target, valid)
    axes = tuple(range(pred.ndim - 1))                                         # all dimensions but the last
    w = valid.to(pred.dtype)                                                   # 1 if valid, else 0
    x, y = pred.masked_fill(~valid, 0), target.to(pred.dtype).masked_fill(~valid, 0)
    sums = torch.stack([w.sum(axes), x.sum(axes), y.sum(axes)])                # three of (..., 2) -> (3, 2)
    frames, sum_x, sum_y = all_sum(sums)                                       # (3, 2) -> three of (2,)
    N = frames.clamp(min=1)
    mu_x, mu_y = sum_x / N, sum_y / N
    # d/dμ Σ (x - μ)² = -2 Σ (x - μ) = 0 at the mean, and in the same way d/dμ_x Σ (x - μ_x)(y - μ_y) = 0:
    # no gradient flows through μ here, so detach it.
    dx, dy = (x - mu_x.detach()) * w, (y - mu_y.detach()) * w                  # two of (..., 2)
    moments = [(dx * dx).sum(axes), (dy * dy).sum(axes), (dx * dy).sum(axes)]  # three of (2,)
    var_x, var_y, cov = all_sum(torch.stack(moments)) / N                      # (3, 2) -> three of (2,)
    CCC = 2 * cov / (var_x + var_y + (mu_x - mu_y) ** 2).clamp(min=1e-6)       # eq. 1
    return ((1 - CCC) * (frames > 0)).sum()                                    # eq. 2, (2,) -> scalar


def expr_loss(logits, target, valid, N=None):
    """Cross-entropy over the valid frames of the batch, all classes weighted alike.

        L_Expr = -1/N Σ_i Σ_{c=1}^M y_ic log(p_ic)      (3)

    y_ic is 1 if class c is the label of frame i, else 0; p_i = softmax(logits_i); N valid frames, M classes.
    Shape: (..., M) logits, (...) classes, (...) mask -> scalar.
    To accumulate a batch in pieces, give the N of the whole batch on all processes, at least 1. The result is
    the sum over this piece, divided by N; those of all pieces add up to the loss, and so do their gradients.
    Every process must have as many pieces. Raises ValueError if the shapes do not fit.
    """
    logits = _checked(logits, logits.shape[:-1], target, valid)
    logits = logits.masked_fill(~valid[..., None], 0).flatten(0, -2)           # (..., M) -> (frames, M)
    target = target.masked_fill(~valid, 0).flatten().long()                    # (...) -> (frames,)
    # -Σ_c y_ic log(p_ic): y_ic leaves -log(p_ic) of the labelled class c.
    loss = F.cross_entropy(logits, target, reduction="none")                   # (frames, M) -> (frames,)
    return _mean(loss, valid.flatten(), N)


def au_loss(logits, target, valid):
    """Binary cross-entropy over the valid entries of the batch, all action units weighted alike.

        L_AU = -1/N Σ_i [y_i · log(σ(x_i)) + (1 - y_i) · log(1 - σ(x_i))]      (4)

    x_i is the logit and y_i the label of entry i (one action unit in one frame); σ the sigmoid; N valid
    entries.
    Shape: all three (..., 12) -> scalar. Masked per entry, not per frame: a frame with eleven labelled AUs
    trains eleven outputs. Raises ValueError if the shapes differ.
    """
    x = _checked(logits, logits.shape, target, valid).masked_fill(~valid, 0)
    y = target.to(x.dtype).masked_fill(~valid, 0)
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")          # (..., 12); never log(0)
    return _mean(loss, valid)


# ---- EMMA and masked CoTEX

def weighted_au_loss(logits, target, valid, pos_weight):
    """EMMA's action units: binary cross-entropy, rare ones weighted up, added over the AUs of a frame.

        L_AU = -1/N Σ_i Σ_k [w_k · y_ik · log(σ(x_ik)) + (1 - y_ik) · log(1 - σ(x_ik))]

    y_ik is the label of AU k in frame i; N frames in which at least one AU is labelled. w_k = negatives /
    positives of AU k in the training file, so that both add the same at logit 0: a frame then costs
    2 ln 2 · Σ_k (1 - p_k) on average, p_k the share of positives.
    Unlike `au_loss`, added and not averaged over the AUs: the term is several times larger (EMMA's choice).
    Shape: logits, target, mask (..., K), pos_weight (K,) -> scalar. Masked per entry. Raises ValueError if
    the first three shapes differ.
    """
    x = _checked(logits, logits.shape, target, valid).masked_fill(~valid, 0)
    y, w = target.to(x.dtype).masked_fill(~valid, 0), pos_weight.to(x.dtype)
    loss = F.binary_cross_entropy_with_logits(x, y, pos_weight=w, reduction="none")      # (..., K)
    return _mean((loss * valid).sum(dim=-1), valid.any(dim=-1))                          # (..., K) -> (...)


def js_loss(logits, valid, N=None):
    """CoTEX: how far the predictions of V views of the same samples differ, the mean of the Jensen-Shannon
    divergence over the N valid samples, in nats.

        JS(p_1, ..., p_V) = 1/V Σ_v Σ_c p_vc · log(p_vc / m_c),    m = 1/V Σ_v p_v

    p_v = softmax(logits_v). 0 where all views agree, at most log V where each is sure of another class.
    Computed from the logits, so that a probability of 0 has a finite gradient. Gradients reach every view.
    Shape: V of (..., M), (...) mask -> scalar in [0, log V]. Given N: as in `expr_loss`. Raises ValueError if
    the shapes do not fit the mask's.
    """
    views = [_checked(view, view.shape[:-1], valid).masked_fill(~valid[..., None], 0) for view in logits]
    log_p = torch.stack(views).log_softmax(dim=-1)                                          # (V, ..., M)
    log_m = log_p.logsumexp(dim=0) - math.log(len(logits))                                  # (..., M)
    JS = (log_p.exp() * (log_p - log_m)).sum(dim=-1).mean(dim=0)                            # -> (...)
    return _mean(JS, valid, N)


def at_least_float32(x):
    """Half precision as float32, because sums over 10,000 frames do not fit it; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _checked(pred, shape, *others):
    """The prediction, at least in float32. Raises ValueError unless all others have this shape."""
    if any(other.shape != shape for other in others):
        got = [tuple(other.shape) for other in others]
        raise ValueError(f"prediction {tuple(pred.shape)} needs target and mask of {tuple(shape)}, got {got}")
    return at_least_float32(pred)


def _mean(loss, valid, N=None):
    """1/N Σ_i over the valid entries i of all processes. Given N: of this piece on all processes."""
    total = (loss * valid).sum()                                               # (...) -> scalar
    if N is not None:
        return all_sum(total / N)
    sums = torch.stack([total, valid.sum().to(total.dtype)])                   # two scalars -> (2,)
    total, N = all_sum(sums)                                                   # (2,) -> two scalars
    return total / N.clamp(min=1)
