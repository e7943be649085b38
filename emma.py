"""EMMA: expression, action units, valence and arousal of a single frame, by one network (Li et al. 2022,
"Affective behaviour analysis using pretrained model with facial priori", 4th ABAW challenge).

A ViT, pre-trained as a masked autoencoder, gives scores for 8 expressions and 12 AUs. A CNN that has learned
expressions from AffectNet, and learns nothing here, gives 8 scores more. Valence and arousal come from these
28 scores alone. Reading order: network, losses, score. Labels: `s_aff_wild2.py`. Where abstract, published
code and this file differ: docs/choices.md.

    python emma.py         # the parameter table, the losses before training, the score of a perfect answer

Letters: B images, D width of the ViT (768).
"""

import numpy as np
import torch
from torch import nn

from dan import DAN
from labels import AU, EXPR, TASKS, VA
from losses import ccc_loss, expr_loss, weighted_au_loss
from s_aff_wild2 import COLUMNS, pos_weight, split_labels
from vit import VisionTransformer

CLASSES, UNITS = len(EXPR.outputs), len(AU.outputs)              # 8 and 12
OUTPUTS, LABELS = 2 + CLASSES + UNITS, len(COLUMNS)              # 22 and 15


def split_outputs(outputs):
    """What EMMA gives -> valence and arousal (..., 2), expressions (..., 8), AUs (..., 12). An array or a
    tensor, (..., 22)."""
    return outputs[..., :2], outputs[..., 2:2 + CLASSES], outputs[..., 2 + CLASSES:]


# ---- The network

class EMMA(nn.Module):
    """The network, by default with the widths of the authors' code.

        z = the ViT's cls token, after its last LayerNorm                              D
        s = W2 ReLU(W1 z + b1) + b2, for [8 expressions | 12 AUs]                      D -> 512 -> 20
        v = W4 ReLU(W3 [c | s] + b3) + b4, c = the CNN's scores of 8 expressions       28 -> 256 -> 2

    Shape: images (B, 3, height, width) -> (B, 22) = [valence, arousal | 8 expressions | 12 AUs], the scores
    before softmax and sigmoid. The gradient of valence and arousal reaches the ViT through s.

    `cnn` takes the same images and gives (B, 8) scores before the softmax, in the order of
    labels.EXPRESSIONS: `dan.DAN`, say. It is frozen here: no gradient, and evaluation mode whatever `train`
    says, so that the statistics of its BatchNorm stay as they are. Without it (None) v comes from s alone,
    to compare.
    Raises ValueError if the CNN gives something else.
    """

    def __init__(self, vit: VisionTransformer, cnn: nn.Module | None, hidden: int = 512,
                 va_hidden: int = 256):
        super().__init__()
        scores = CLASSES + UNITS
        self.vit = vit
        self.head = nn.Sequential(nn.Linear(vit.norm.normalized_shape[0], hidden), nn.ReLU(),
                                  nn.Linear(hidden, scores))
        self.cnn = cnn
        if cnn is not None:
            cnn.requires_grad_(False)
            scores += CLASSES
        self.va_head = nn.Sequential(nn.Linear(scores, va_hidden), nn.ReLU(), nn.Linear(va_hidden, 2))
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.cnn is not None:
            self.cnn.eval()
        return self

    def forward(self, images):
        z = self.vit.features(images, "cls")                     # (B, 3, height, width) -> (B, D)
        s = self.head(z)                                         # (B, D) -> (B, 20)
        if self.cnn is not None:
            with torch.no_grad():
                c = self.cnn(images)                             # (B, 3, height, width) -> (B, 8)
            if c.shape != (len(images), CLASSES):
                raise ValueError(f"the CNN gives scores {tuple(c.shape)}, expected {(len(images), CLASSES)}: "
                                 f"a score for each of {', '.join(EXPR.outputs)}")
            v = self.va_head(torch.cat([c, s], dim=1))           # (B, 28) -> (B, 2)
        else:
            v = self.va_head(s)                                  # (B, 20) -> (B, 2)
        return torch.cat([v, s], dim=1)                          # -> (B, 22)


# ---- The losses

def emma_losses(outputs, labels, pos_weight):
    """The three terms of EMMA's loss, which is their sum (weights 1, 1, 1).

        L = L_VA + L_Expr + L_AU        (1 - CCC_V) + (1 - CCC_A), cross-entropy, weighted BCE: losses.py

    A label that is missing (its code: -5, -1, -1) changes nothing. A term of which the batch has no label at
    all is 0, and so is its gradient. The CCC is no mean over frames, so a batch cannot be accumulated in
    pieces: each process passes its whole share at once, and the terms are those of the whole batch.

    Shape: outputs (B, 22), labels (B, 15) as in s_aff_wild2.py, pos_weight (12,) -> (3,), in the order of
    labels.TASKS: va, expr, au. Raises ValueError if the shapes do not fit.
    """
    check(outputs, labels)
    va, expr, au = split_outputs(outputs)
    true_va, true_expr, true_au = split_labels(labels)
    return torch.stack([ccc_loss(va, true_va, true_va != VA.invalid),
                        expr_loss(expr, true_expr, true_expr != EXPR.invalid),
                        weighted_au_loss(au, true_au, true_au != AU.invalid, pos_weight)])


def check(outputs, labels):
    """Raises ValueError if outputs or labels have another shape than EMMA's."""
    B = len(outputs)
    if outputs.shape != (B, OUTPUTS) or labels.shape != (B, LABELS):
        raise ValueError(f"shapes do not fit: outputs {tuple(outputs.shape)}, labels {tuple(labels.shape)}; "
                         f"expected (B, {OUTPUTS}) and (B, {LABELS})")


# ---- The score

def count(outputs, labels, thresholds=0.5) -> np.ndarray:
    """What the score is a function of, in one array: add those of batches and processes up.

    An AU counts as present where its probability σ(x) is above its threshold, which is where the logit x is
    above log(t / (1 - t)). `thresholds`: one t for all AUs, or 12, between 0 and 1.

    Shape: outputs (N, 22), labels (N, 15), both NumPy -> (124,), see `by_task`. Raises ValueError for shapes
    that do not fit, for thresholds outside of (0, 1), and for outputs that are not finite.
    """
    check(outputs, labels)
    t = np.asarray(thresholds, dtype=np.float64)
    if t.shape not in ((), (UNITS,)) or not ((0 < t) & (t < 1)).all():
        raise ValueError(f"thresholds {thresholds}: expected one probability between 0 and 1, "
                         f"or one for each of {UNITS} AUs")
    va, expr, au = split_outputs(outputs)
    outputs_of_task = va, expr, au - np.log(t / (1 - t))
    sums = []
    for task, x, y in zip(TASKS.values(), outputs_of_task, split_labels(labels)):
        sums.append(task.metric.count(x, y, y != task.invalid).ravel())
    return np.concatenate(sums)


def by_task(sums) -> dict[str, np.ndarray]:
    """The sums of each task, as its metric takes them (metrics.py): (..., 124) -> va (..., 2, 6),
    expr (..., 8, 8), au (..., 12, 4)."""
    va, expr, au = np.split(sums, [2 * 6, 2 * 6 + CLASSES ** 2], axis=-1)
    first = sums.shape[:-1]
    return {"va": va.reshape(*first, 2, 6), "expr": expr.reshape(*first, CLASSES, CLASSES),
            "au": au.reshape(*first, UNITS, 4)}


def score(sums) -> np.ndarray:
    """Mean CCC of valence and arousal, macro F1 of 8 expressions, mean F1 of 12 AUs. Shape: (124,) -> (3,).

    Their sum is the challenge's score, P_MTL; a perfect prediction has 3.
    """
    return np.array([TASKS[name].metric.score(part).mean() for name, part in by_task(sums).items()])


if __name__ == "__main__":
    torch.manual_seed(0)
    model = EMMA(VisionTransformer(), DAN())
    for name, part in model.named_children():
        frozen = ", frozen" if name == "cnn" else ""
        print(f"{name:12s}{sum(p.numel() for p in part.parameters()):12,d} parameters{frozen}")
    outputs = model(torch.randn(2, 3, 224, 224))
    print(f"two 224 x 224 images become {tuple(outputs.shape)}: valence, arousal | 8 expressions | 12 AUs")

    aus = (torch.rand(1000, UNITS) < 0.2).float()
    classes = torch.randint(CLASSES, (1000,))
    labels = torch.cat([torch.rand(1000, 2) * 2 - 1, classes[:, None], aus], dim=1)              # (1000, 15)
    terms = emma_losses(torch.zeros(1000, OUTPUTS), labels, pos_weight(labels.numpy()))
    print("losses of outputs that are all 0:", ", ".join(f"{name} {loss:.2f}"
                                                         for name, loss in zip(TASKS, terms)))
    perfect = torch.cat([labels[:, :2], torch.eye(CLASSES)[classes], aus - 0.5], dim=1)          # (1000, 22)
    print(f"P_MTL of a perfect answer: {score(count(perfect.numpy(), labels.numpy())).sum():.2f}")
