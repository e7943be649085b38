"""The Vision Transformer that sees one face (paper §3.1): patches -> tokens -> blocks -> one feature vector.

Smallest part first: attention, MLP, block, patches, positions, model. Parameter names are those of the
reference MAE and of timm, so that their public ViT checkpoints load by name. Read `mae.py` next.

    python vit.py          # the parameter table of ViT-B/16

Shape letters, here and everywhere: B images or clips, T frames, N patch tokens, D width, H heads,
P patch side, C channels.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]      # mean and deviation, RGB, of values in [0, 1]


def attention(q, k, v):
    """Scaled dot-product attention, written out:  softmax(q kᵀ / √d) v   (Vaswani et al., eq. 1).

    Shape: q, k, v and the result are (B, H, N, d). This is the reader's version; the modules call PyTorch's
    fused kernel, which never stores the N x N weights. `tests/test_vit.py` shows that both agree.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])         # (B, H, N, d) -> (B, H, N, N)
    weights = scores.softmax(dim=-1)                                  # rows sum to 1
    return weights @ v                                                # (B, H, N, N) -> (B, H, N, d)


class Attention(nn.Module):
    """Multi-head self-attention. Each token's query q is compared with the key k of every token; the result
    is a mixture of their values v.

    Shape: (B, N, D) -> (B, N, D). `valid` and `dropout` are for temporal.py, where the tokens are frames:
    valid (B, N) is True for real ones, and padding is never attended to. Images have no padding.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)                                # with a bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, valid=None, dropout: float = 0.0):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)   # (B, N, 3D) -> (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # three of (B, H, N, d), d = D / H
        mask = None if valid is None else valid[:, None, None, :]         # (B, N) -> (B, 1, 1, N)
        dropout = dropout if self.training else 0.0
        # `if B`: a process's share of the last batch may be empty, which flash attention refuses.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout) if B else v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))              # (B, H, N, d) -> (B, N, D)


class MLP(nn.Module):
    """Two layers with GELU between (the exact one), for each token alone. Shape: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))           # (B, N, D) -> (B, N, hidden) -> (B, N, D)


def drop_path(branch, rate: float):
    """Stochastic depth: leave a residual branch out, for each sample anew (Huang et al. 2016, eq. 2 and 5).

        b / (1 - rate) · branch        b = 0 with probability `rate`, else 1

    Dividing by 1 - rate keeps the expectation, so evaluation takes the branch as it is.
    Shape: (B, N, D) -> (B, N, D). With rate 0 the branch itself; no random number is drawn then.
    """
    if rate == 0:
        return branch
    b = torch.rand(len(branch), 1, 1, device=branch.device) >= rate       # (B, 1, 1): one for each sample
    return branch * b / (1 - rate)


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Shape: (B, N, D) -> (B, N, D). In training, `drop_path` leaves each branch out with probability `rate`.
    """

    def __init__(self, dim: int, heads: int, rate: float = 0.0):
        super().__init__()
        self.rate = rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)                                      # the ViT's MLP ratio of 4

    def forward(self, x):
        rate = self.rate if self.training else 0.0
        x = x + drop_path(self.attn(self.norm1(x)), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)


class PatchEmbed(nn.Module):
    """Cut the image into P x P patches and project each to D numbers.

    A convolution whose stride is its kernel is exactly that: one matrix applied to every patch.
    Shape: (B, C, height, width) -> (B, N, D), N = (height / P) · (width / P), row by row.
    """

    def __init__(self, image_size: tuple[int, int], patch: int, channels: int, dim: int):
        super().__init__()
        self.grid = (image_size[0] // patch, image_size[1] // patch)
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)   # (B, D, h, w) -> (B, D, N) -> (B, N, D)


def sincos_positions(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embeddings with a zero row for the cls token. Shape: (1, 1 + N, D).

    The first half of the D numbers encodes the column, the second half the row (the reference MAE's order),
    each place as [sin(place · ω), cos(place · ω)] with ω_i = 10000^(-i / (D/4)), i = 0 … D/4 - 1. D must
    be a multiple of 4.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")    # (h, w)
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))    # (D/4,)
    quarters = []
    for place in (columns, rows):
        angle = place.flatten()[:, None] * omega                      # (h, w) -> (N, 1) -> (N, D/4)
        quarters += [angle.sin(), angle.cos()]
    patches = torch.cat(quarters, dim=1)                              # four of (N, D/4) -> (N, D)
    return torch.cat([torch.zeros(1, dim), patches]).float()[None]    # (N, D) -> (1 + N, D) -> (1, 1 + N, D)


def init_weights(module):
    """MAE's initialisation: Xavier-uniform matrices, zero biases. LayerNorm already starts at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@functools.cache
def from_imagenet(mean, std, device):
    """Scale and shift, two of (3, 1, 1), that turn an x of ImageNet's mean m and deviation s into
    (s x + m - mean) / std. Kept: making them anew in each step would make the CPU wait for the GPU."""
    m, s, mean, std = torch.tensor([*IMAGENET, mean, std], device=device)[..., None, None]
    return s / std, (m - mean) / std


class VisionTransformer(nn.Module):
    """The ViT, by default the paper's ViT-B/16 (§3.1). Image size 224 is the MAE's; the paper gives none.

    forward: images (B, C, height, width) -> tokens (B, 1 + N, D), the cls token first.
    features: images -> (B, D), one vector per face, 768 numbers by default: the mean of the patch tokens, or
    the cls token (the paper does not say which).
    drop_path: the rate at which the last block's branches are left out in training; it rises in a line from 0
    in the first block, as in the MAE's fine-tuning. Pre-training has none.
    mean, std: with which the images of its training were normalised, ImageNet's by default. Images come with
    ImageNet's in any case (images.py); `own` puts this ViT's in their place.
    Raises ValueError for an image size that is no whole number of patches, and for images of another size:
    the convolution would cut off what is left.
    """

    def __init__(self, image_size=224, patch: int = 16, channels: int = 3, dim: int = 768, depth: int = 12,
                 heads: int = 12, drop_path: float = 0.0, mean=IMAGENET[0], std=IMAGENET[1]):
        super().__init__()
        self.mean, self.std = list(mean), list(std)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"image_size={size}: expected multiples of patch={patch}")
        self.size, self.patch_embed = size, PatchEmbed(size, patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # A parameter and not a buffer because that is what public checkpoints hold; it is never trained.
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.patch_embed.grid), requires_grad=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]     # 0 in the first block
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))   # as the one matrix that it is
        nn.init.zeros_(self.patch_embed.proj.bias)

    def own(self, images):
        """Images of ImageNet's mean and deviation -> of this ViT's. Shape: (B, 3, H, W), unchanged."""
        if (self.mean, self.std) == IMAGENET:
            return images
        scale, shift = from_imagenet(tuple(self.mean), tuple(self.std), images.device)
        return images * scale + shift

    def embed(self, images):
        """Patch tokens with their positions, without cls. Shape: (B, C, height, width) -> (B, N, D)."""
        if tuple(images.shape[2:]) != self.size:
            raise ValueError(f"expected images (B, C, {self.size[0]}, {self.size[1]}), got "
                             f"{tuple(images.shape)}")
        return self.patch_embed(self.own(images)) + self.pos_embed[:, 1:]

    def encode(self, x):
        """Put the cls token in front and run the blocks. Shape: (B, N, D) -> (B, 1 + N, D).

        N may be any number of patch tokens: the MAE and masked CoTEX pass only the visible ones.
        """
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)  # (1, 1, D) -> (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, N, D) -> (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        return self.encode(self.embed(images))

    def features(self, images, token: str = "mean"):
        x = self(images)
        return x[:, 0] if token == "cls" else x[:, 1:].mean(dim=1)             # (B, 1 + N, D) -> (B, D)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = VisionTransformer()
    for name, part in model.named_children():
        print(f"{name:12s}{sum(p.numel() for p in part.parameters()):12,d} parameters")
    print(f"{'in all':12s}{sum(p.numel() for p in model.parameters()):12,d} parameters, "
          "cls token and positions included")
    image = torch.randn(1, 3, 224, 224)
    print(f"one 224 x 224 image becomes {tuple(model(image).shape)}: "
          "1 cls token and 14 x 14 patch tokens of 768 numbers")
