"""The Vision Transformer that sees one face: patches -> tokens -> attention blocks -> one feature vector (paper §3.1).

Smallest part first: attention, MLP, block, patches, positions, model. Parameter names are those of the reference MAE and of
timm, so that their public ViT checkpoints load by name. Read this file, then `mae.py`, which pre-trains it.

    python vit.py          # the parameter table of ViT-B/16 and the attention of one random image

Shape letters, here and everywhere: B images or clips, T frames, N patch tokens, D width, H heads, P patch side, C channels.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def pair(size) -> tuple[int, int]:
    """224 -> (224, 224); (height, width) stays as it is."""
    return (size, size) if isinstance(size, int) else tuple(size)


def attention(q, k, v):
    """Scaled dot-product attention, written out:  softmax(q kᵀ / √d) v   (Vaswani et al., eq. 1).

    Shape: q, k, v and the result are (B, H, N, d). This is the reader's version; the modules call PyTorch's fused kernel,
    which never stores the N x N weights. `tests/test_vit.py` shows that both agree.
    """
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)   # (B, H, N, N), rows sum to 1
    return weights @ v


class Attention(nn.Module):
    """Multi-head self-attention: every token asks (q) every token (k) and takes a mixture of their values (v).

    Shape: (B, N, D) -> (B, N, D). `valid` (B, N), True where a token is real: padding is never attended to.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}; try heads={math.gcd(dim, heads)}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, valid=None, dropout: float = 0.0):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)   # (B, N, 3D) -> (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # three of (B, H, N, d)
        mask = None if valid is None else valid[:, None, None, :]         # (B, 1, 1, N): the same keys for each query
        dropout = dropout if self.training else 0.0
        # A process may have an empty share of the last batch, which flash attention refuses.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout) if B else v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))              # (B, H, N, d) -> (B, N, D)


class MLP(nn.Module):
    """Two layers applied to each token alone. Shape: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)). Shape: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cut the image into P x P patches and project each to D numbers.

    A convolution whose stride is its kernel is exactly that: one matrix applied to every patch.
    Shape: (B, C, height, width) -> (B, N, D), N = (height / P) · (width / P), row by row.
    """

    def __init__(self, image_size: tuple[int, int], patch: int, channels: int, dim: int):
        super().__init__()
        if image_size[0] % patch or image_size[1] % patch:
            fit = tuple(max(patch, round(side / patch) * patch) for side in image_size)
            raise ValueError(f"image_size={image_size} is not a multiple of patch={patch}; try image_size={fit}")
        self.expected = (channels, *image_size)
        self.grid = (image_size[0] // patch, image_size[1] // patch)
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images):
        if tuple(images.shape[1:]) != self.expected:
            raise ValueError(f"expected images (B, {', '.join(map(str, self.expected))}), got {tuple(images.shape)}")
        return self.proj(images).flatten(2).transpose(1, 2)   # (B, D, h, w) -> (B, D, N) -> (B, N, D)


def sincos_positions(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embeddings with a zero row for the cls token. Shape: (1, 1 + N, D).

    The first half of the channels encodes the column and the second half the row (the reference MAE's order), each as
    [sin(p ω), cos(p ω)] with ω_i = 10000^(-i / (D/4)), i = 0 … D/4 - 1.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not divisible by 4 (sine and cosine of row and column); try {dim + 4 - dim % 4}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    halves = []
    for position in (columns, rows):
        angle = position.flatten()[:, None] * omega                 # (N, D/4)
        halves += [angle.sin(), angle.cos()]
    return torch.cat([torch.zeros(1, dim), torch.cat(halves, dim=1)]).float()[None]


def init_weights(module):
    """MAE's initialisation: Xavier-uniform matrices, zero biases. LayerNorm already starts at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """ViT encoder, by default ViT-B/16 at 224 (paper §3.1).

    forward: images (B, C, height, width) -> tokens (B, 1 + N, D), the cls token first, after the last LayerNorm.
    features: images -> (B, D), one vector per face: the mean of the patch tokens, or the cls token.
    Raises ValueError for sizes that do not divide and for images of another shape.
    """

    def __init__(self, image_size=224, patch: int = 16, channels: int = 3, dim: int = 768, depth: int = 12, heads: int = 12):
        super().__init__()
        self.patch_embed = PatchEmbed(pair(image_size), patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # A parameter and not a buffer because that is what public checkpoints hold; it is never trained.
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.patch_embed.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))   # as the matrix it is, not as a convolution
        nn.init.zeros_(self.patch_embed.proj.bias)

    def embed(self, images):
        """Patch tokens with their positions, without cls. Shape: (B, C, height, width) -> (B, N, D)."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, x):
        """Put the cls token in front and run the blocks. Any number of patch tokens: MAE passes only the visible ones."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)                                        # (B, N, D) -> (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        return self.encode(self.embed(images))

    def features(self, images, token: str = "mean"):
        x = self(images)
        return x[:, 0] if token == "cls" else x[:, 1:].mean(dim=1)            # (B, 1 + N, D) -> (B, D)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = VisionTransformer()
    for name, part in model.named_children():
        print(f"{name:12s}{sum(p.numel() for p in part.parameters()):12,d} parameters")
    print(f"{'in all':12s}{sum(p.numel() for p in model.parameters()):12,d} parameters, cls token and positions included")
    tokens = model(torch.randn(1, 3, 224, 224))
    print(f"one 224 x 224 image becomes {tuple(tokens.shape)}: 1 cls token and 14 x 14 patch tokens of 768 numbers")
