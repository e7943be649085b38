"""Masked CoTEX: co-training of two ViTs for expressions in single faces (Li, Sun, Liu & Han 2022, "Affective
behaviour analysis using pretrained model with facial priori").

Both ViTs start from one MAE. In training each sees other patches of the same face, so that they learn from
different evidence, and a term of the loss draws their predictions together. Together they then see whole
faces. Smallest part first: view, model, loss. Read `vit.py` and `mae.py` before this file.

B images, V views, N patches, D width, M classes; r: the share of patches that a view drops.
"""

import torch
from torch import nn

from losses import expr_loss, js_loss
from mae import keep_some
from vit import VisionTransformer


class View(nn.Module):
    """A ViT and one linear layer on its cls token (after the last LayerNorm).

    Shape: images (B, C, height, width) -> logits (B, M). With noise (B, N), only the `kept` patches with the
    smallest noise are seen: the others are dropped, as in the MAE's encoder.
    The linear layer starts near 0, as in the MAE's fine-tuning: all classes are then equally likely.
    """

    def __init__(self, vit: VisionTransformer, classes: int):
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.norm.normalized_shape[0], classes)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, noise=None, kept: int = 0):
        x = self.vit.embed(images)                           # (B, C, height, width) -> (B, N, D)
        if noise is not None:
            x, _ = keep_some(x, noise, kept)                 # (B, N, D) -> (B, kept, D)
        return self.head(self.vit.encode(x)[:, 0])           # -> (B, 1 + kept, D) -> (B, D) -> (B, M)


class CoTEX(nn.Module):
    """`views` ViTs with weights of their own; `vit`: their settings, those of a VisionTransformer. By default
    two ViT-B/16 and the 6 classes of the synthetic-data challenge, 171,606,540 parameters. One view with
    mask_ratio 0 is a plain classifier. Each ViT is filled by itself: `load_vit(view.vit, path)`.

    forward: images (B, C, height, width), noise (B, V, N) in [0, 1) -> the logits of each view (V, B, M).
        In training each view keeps the int(N(1 - r)) patches with the smallest noise of its own, r =
        `mask_ratio`. The data give the noise with each image, so that nothing here is random. Evaluation sees
        all patches and takes no notice of noise; so does training with r = 0.
    classify: images -> scores (B, M), the logits of all views added up. Call eval() first.
    Raises ValueError for an r that leaves no patch.
    """

    def __init__(self, classes: int = 6, views: int = 2, mask_ratio: float = 0.75, **vit):
        super().__init__()
        self.views = nn.ModuleList(View(VisionTransformer(**vit), classes) for _ in range(views))
        height, width = self.views[0].vit.patch_embed.grid
        self.patches = height * width                                          # N
        self.kept = int(self.patches * (1 - mask_ratio))
        if not 1 <= self.kept <= self.patches:
            raise ValueError(f"mask_ratio={mask_ratio} keeps {self.kept} of the {self.patches} patches, "
                             "expected at least one; try mask_ratio=0.75, or 0 to drop none")

    def forward(self, images, noise=None):
        if not self.training or self.kept == self.patches:
            return torch.stack([view(images) for view in self.views])          # V of (B, M) -> (V, B, M)
        logits = [view(images, noise[:, v], self.kept) for v, view in enumerate(self.views)]
        return torch.stack(logits)                                             # V of (B, M) -> (V, B, M)

    def classify(self, images):
        return self(images).float().sum(dim=0)                                 # (V, B, M) -> (B, M)


def cotex_loss(logits, target, valid, js_weight: float, N=None):
    """Each view learns the labels, and all views learn to agree.

        L = 1/V Σ_v L_Expr(z_v, y) + λ · JS(p_1, ..., p_V),    p_v = softmax(z_v)

    Both are means over the valid samples (losses.py); λ = `js_weight`. The authors' code has λ = 100 and
    averages JS over the 6 classes too, where it is added up here: their λ is 100 / 6. With one view JS is 0.
    Shape: logits (V, B, M), classes (B,), mask (B,) -> scalar. N is given for pieces, as in `expr_loss`.
    Raises ValueError if the shapes do not fit.
    """
    views = torch.stack([expr_loss(view, target, valid, N) for view in logits])          # (V,)
    return views.mean() + js_weight * js_loss(logits, valid, N)
