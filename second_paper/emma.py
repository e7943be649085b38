"""EMMA: expression, action units, valence and arousal of a single frame, by one network (Li et al. 2022,
"Affective behaviour analysis using pretrained model with facial priori", 4th ABAW challenge).

A ViT, pre-trained as a masked autoencoder, gives scores for 8 expressions and 12 AUs. A CNN that has learned
expressions from AffectNet, and learns nothing here, gives 8 scores more. Valence and arousal come from these
28 scores alone. Where abstract, published code and this file differ: docs/choices.md.
"""

import dataclasses
from functools import partial

import numpy as np
import torch
from torch import nn

from datasets.s_aff_wild2 import split_labels
from engine.checkpoints import find_weights, load_weights, read_checkpoint
from engine.config import Config
from engine.distributed import Team
from labels import AU, EXPR, TASKS, VA, Task
from losses import ccc_loss, expr_loss, weighted_au_loss
from pipeline import like
from scoring import ALONE, Trained, each_frame
from second_paper.cnn import cnn_of
from vit import VisionTransformer

CLASSES, UNITS = len(EXPR.outputs), len(AU.outputs)              # 8 and 12
OUTPUTS, SUMS = 2 + CLASSES + UNITS, 2 * 6 + CLASSES ** 2 + 4 * UNITS        # 22 and 124


def split_outputs(outputs):
    """What EMMA gives, (..., 22) -> valence and arousal (..., 2), expressions (..., 8), AUs (..., 12)."""
    return outputs[..., :2], outputs[..., 2:2 + CLASSES], outputs[..., 2 + CLASSES:]


def outputs_of(task: Task, outputs):
    """What EMMA gives for one task: (..., 22) -> (..., K)."""
    return dict(zip(TASKS, split_outputs(outputs)))[task.name]


class EMMA(nn.Module):
    """The network, by default with the widths of the authors' code.

        z = the ViT's cls token, after its last LayerNorm                              D = 768
        s = W2 ReLU(W1 z + b1) + b2, for [8 expressions | 12 AUs]                      D -> 512 -> 20
        v = W4 ReLU(W3 [c | s] + b3) + b4, c = the CNN's scores of 8 expressions       28 -> 256 -> 2

    Shape: images (B, 3, height, width) -> (B, 22) = [valence, arousal | 8 expressions | 12 AUs], the scores
    before softmax and sigmoid. The gradient of valence and arousal reaches the ViT through s.
    `cnn`: images -> (B, 8) scores before the softmax, in the order of labels.EXPRESSIONS. It is frozen: no
    gradient, and evaluation mode whatever `train` says, so that the statistics of its BatchNorm stay as they
    are. If it is None, v comes from s alone, to compare.
    """

    def __init__(self, vit: VisionTransformer, cnn: nn.Module | None, hidden=512, va_hidden=256):
        super().__init__()
        D, scores = vit.norm.normalized_shape[0], CLASSES + UNITS
        self.vit = vit
        self.head = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, scores))
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
        if self.cnn is None:
            v = self.va_head(s)                                  # (B, 20) -> (B, 2)
        else:
            with torch.no_grad():
                c = self.cnn(images)                             # (B, 3, height, width) -> (B, 8)
            v = self.va_head(torch.cat([c, s], dim=1))           # (B, 28) -> (B, 2)
        return torch.cat([v, s], dim=1)                          # -> (B, 22)


# ---- The losses

def emma_losses(outputs, labels, pos_weight):
    """The three terms of EMMA's loss, which is their sum (weights 1, 1, 1).

        L = L_VA + L_Expr + L_AU        (1 - CCC_V) + (1 - CCC_A), cross-entropy, weighted BCE: losses.py

    A label that is missing (its code: -5, -1, -1) changes nothing. A term of which the batch has no label at
    all is 0, and so is its gradient. A process passes its whole share of a batch at once, as for `ccc_loss`.

    Shape: outputs (B, 22), labels (B, 15) as in s_aff_wild2.py, pos_weight (12,) -> (3,), in the order of
    labels.TASKS: va, expr, au. Raises ValueError if the shapes do not fit.
    """
    va, expr, au = split_outputs(outputs)
    true_va, true_expr, true_au = split_labels(labels)
    return torch.stack([ccc_loss(va, true_va, true_va != VA.invalid),
                        expr_loss(expr, true_expr, true_expr != EXPR.invalid),
                        weighted_au_loss(au, true_au, true_au != AU.invalid, pos_weight)])


# ---- The score

def count(outputs, labels) -> np.ndarray:
    """What the score is a function of, in one array, to be added up over batches and processes. An AU is said
    to be present where its logit is above 0, its probability above 0.5. Raises ValueError for NaN, infinity.

    Shape: outputs (N, 22), labels (N, 15), both NumPy -> (124,), see `by_task`.
    """
    parts = zip(TASKS.values(), split_outputs(outputs), split_labels(labels))
    return np.concatenate([task.metric.count(x, y, y != task.invalid).ravel() for task, x, y in parts])


def by_task(sums) -> dict[str, np.ndarray]:
    """The sums of each task, as its metric takes them: (..., 124) -> va (..., 2, 6), expr (..., 8, 8),
    au (..., 12, 2, 2)."""
    parts = np.split(sums, [2 * 6, 2 * 6 + CLASSES ** 2], axis=-1)
    shapes = (2, 6), (CLASSES, CLASSES), (UNITS, 2, 2)
    return {name: part.reshape(*sums.shape[:-1], *shape) for name, part, shape in zip(TASKS, parts, shapes)}


def scores(sums, tasks) -> dict[str, float]:
    """Mean CCC of valence and arousal, macro F1 of 8 expressions, mean F1 of 12 AUs, of sums (124,). Together
    they are the challenge's score, P_MTL; a perfect prediction has 3."""
    return {task.name: float(task.metric.score(by_task(sums)[task.name]).mean()) for task in tasks}


# ---- What a checkpoint gives back

def load(path, config: Config | None = None, team: Team = ALONE) -> Trained:
    """The EMMA of a checkpoint, rebuilt from it alone: the ViT by its settings, the CNN by its weights. Its
    `predict`: VideoFrames, T, progress -> float32 (T, 22), noface (T,), as scoring.each_frame says.
    Raises ValueError if it is not EMMA's, or was made with other settings than those given with --set."""
    saved = read_checkpoint(path)
    record = saved.get("made_of", {})
    if record.get("stage") != "emma":
        raise ValueError(f"{path}: of stage {record.get('stage', 'unknown')}; expected EMMA, as train_emma.py"
                         " writes it, like runs/<config>/emma/best.pt")
    weights, _ = find_weights(saved, ["vit.cls_token"], path)
    config, changed = like(record, config or Config(), path)
    of_cnn = {name.removeprefix("cnn."): entry for name, entry in weights.items() if name.startswith("cnn.")}
    vit = VisionTransformer(**dataclasses.asdict(config.vit))
    model = EMMA(vit, cnn_of(of_cnn, path) if of_cnn else None)
    load_weights(model, weights, path)
    model.to(team.device).eval()
    tasks = [task for task, weight in zip(TASKS.values(), config.emma.weights) if weight]
    return Trained(tasks, model, config, team, record, changed,
                   partial(each_frame, model, path, OUTPUTS, np.float32, config, team))
