"""Masked autoencoder: rebuild a face of which three quarters are hidden, and so learn faces (paper §3.1).

Methods stand in the order the data flows: patchify -> random_masking -> forward_encoder -> forward_decoder
-> forward_loss. Semantics and parameter names are the reference MAE's, so that its public checkpoints load
and give the same numbers. Read `vit.py` first; `train_pretrain.py` trains this.

    python mae.py          # the shapes of one forward pass of the paper's model
"""

import torch
from torch import nn

from vit import IMAGENET, Block, VisionTransformer, init_weights, sincos_positions


def keep_some(x, noise, kept: int):
    """The `kept` tokens with the smallest noise, in the order of their noise. The encoder does not mind that
    they are shuffled: each token carries its position. Masked CoTEX hides patches in this way too.

    Shape: x (B, N, D), noise (B, N) -> (B, kept, D), order (B, N): all tokens by their noise. Raises
    ValueError for noise of another shape, of which `gather` would take what it needs.
    """
    if noise.shape != x.shape[:2]:
        raise ValueError(f"expected noise {tuple(x.shape[:2])} (images, patches), got {tuple(noise.shape)}")
    order = noise.argsort(dim=1)
    first = order[:, :kept, None].expand(-1, -1, x.shape[-1])                  # (B, N) -> (B, kept, D)
    return x.gather(1, first), order                                           # (B, N, D) -> (B, kept, D)


class MaskedAutoencoder(VisionTransformer):
    """A ViT encoder on the visible patches, a small ViT decoder on all. Defaults: the paper's ViT-B/16 with
    75 % hidden (§3.1) and the original MAE's decoder (the paper: "a ViT decoder"); 111,907,840 parameters.

    forward(images, noise) -> (loss, pred, mask)
        images (B, C, height, width), normalised;
        noise (B, N) in [0, 1): the N(1 - mask_ratio) patches with the smallest noise (rounded down) stay
        visible. The data give it, so that a resumed run hides the same patches;
        loss: scalar, the mean squared error of the hidden patches (the paper's "pixel-level L2");
        pred (B, N, P·P·C): the reconstruction as patches, of visible patches too (they carry no loss);
        mask (B, N): 1 = hidden, 0 = visible.
    norm_pix_loss: compare with pixels normalised by their patch's mean and deviation. The original MAE learns
    better features with it; this paper compares raw pixels. `pred` is no picture until both are put back.
    Raises ValueError for a mask_ratio that leaves no patch visible or none hidden.
    """

    def __init__(self, image_size=224, patch: int = 16, channels: int = 3, dim: int = 768, depth: int = 12,
                 heads: int = 12, decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16,
                 mask_ratio: float = 0.75, norm_pix_loss: bool = False, mean=IMAGENET[0], std=IMAGENET[1]):
        super().__init__(image_size, patch, channels, dim, depth, heads, mean=mean, std=std)
        self.grid, self.patch, self.channels = self.patch_embed.grid, patch, channels
        N, self.norm_pix_loss = self.grid[0] * self.grid[1], norm_pix_loss
        self.visible = int(N * (1 - mask_ratio))                               # patches the encoder sees
        if not 1 <= self.visible < N:
            raise ValueError(f"mask_ratio={mask_ratio} leaves {self.visible} of {N} patches visible; "
                             "at least one must be visible and one masked")
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch * patch * channels)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, images):
        """(B, C, height, width) -> (B, N, P·P·C): each patch flattened as (row, column, channel)."""
        B, (h, w), P, C = len(images), self.grid, self.patch, self.channels
        x = images.reshape(B, C, h, P, w, P)               # (B, C, height, width) -> (B, C, h, P, w, P)
        x = torch.einsum("bchpwq->bhwpqc", x)              # p and q: row and column inside the patch
        return x.reshape(B, h * w, P * P * C)              # -> (B, N, P·P·C)

    def unpatchify(self, patches):
        """(B, N, P·P·C) -> (B, C, height, width), the exact inverse of `patchify`."""
        B, (h, w), P, C = len(patches), self.grid, self.patch, self.channels
        x = patches.reshape(B, h, w, P, P, C)              # (B, N, P·P·C) -> (B, h, w, P, P, C)
        x = torch.einsum("bhwpqc->bchpwq", x)
        return x.reshape(B, C, h * P, w * P)               # -> (B, C, height, width)

    def random_masking(self, x, noise):
        """Keep the `visible` tokens with the smallest noise. If these are two of four:

            noise [.3, .9, .1, .5]    order [2, 0, 3, 1]    restore [1, 3, 0, 2]    mask [0, 1, 0, 1]

        The double argsort: sorting `order` gives its inverse, the place of each token in [kept, hidden]. With
        it one gather puts everything back.
        Shape: x (B, N, D), noise (B, N) -> kept (B, visible, D), mask (B, N), restore (B, N).
        """
        kept, order = keep_some(x, noise, self.visible)                        # (B, N, D) -> (B, visible, D)
        restore = order.argsort(dim=1)
        mask = (restore >= self.visible).float()
        return kept, mask, restore

    def forward_encoder(self, images, noise):
        """Encode the visible patches only. -> tokens (B, 1 + visible, D), mask (B, N), restore (B, N)."""
        kept, mask, restore = self.random_masking(self.embed(images), noise)
        return self.encode(kept), mask, restore

    def forward_decoder(self, x, restore):
        """Fill the gaps, put all in image order, predict pixels: (B, 1 + visible, D) -> (B, N, P·P·C)."""
        x = self.decoder_embed(x)                                              # D -> decoder's D
        B, _, D = x.shape
        gaps = self.mask_token.expand(B, restore.shape[1] - self.visible, -1)  # -> (B, N - visible, D)
        # Under autocast x is bf16; `cat` would make all of it float32 to fit the mask token.
        patches = torch.cat([x[:, 1:], gaps.to(x.dtype)], dim=1)               # -> (B, N, D), kept first
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, D))     # back in image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed     # cls in front: (B, 1 + N, D)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))                            # -> (B, 1 + N, P·P·C)
        return x[:, 1:]                                                        # cls predicts nothing

    def forward_loss(self, images, pred, mask):
        """Mean squared error over the hidden patches of the batch.

        The paper compares "the complete image" (§3.1). As in the original MAE, all are predicted here, but
        only the hidden ones count: copying what it has seen would teach the encoder little.
        """
        target = self.patchify(self.own(images))                               # (B, N, P·P·C)
        if self.norm_pix_loss:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)   # two of (B, N, 1)
            target = (target - mean) / (variance + 1e-6).sqrt()
        loss = (pred - target).square().mean(dim=-1)                           # (B, N, P·P·C) -> (B, N)
        return (loss * mask).sum() / mask.sum().clamp(min=1)                   # (B, N) -> scalar

    def forward(self, images, noise):
        tokens, mask, restore = self.forward_encoder(images, noise)
        pred = self.forward_decoder(tokens, restore)
        return self.forward_loss(images, pred, mask), pred, mask


if __name__ == "__main__":
    torch.manual_seed(0)
    model, images = MaskedAutoencoder(), torch.randn(2, 3, 224, 224)
    tokens, mask, restore = model.forward_encoder(images, torch.rand(2, 196))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, position embeddings included\n"
          f"images {tuple(images.shape)} -> patches {tuple(model.patchify(images).shape)}, "
          f"{int(mask[0].sum())} of 196 hidden\nencoder sees {tuple(tokens.shape)} (cls + visible), "
          f"decoder gives {tuple(model.forward_decoder(tokens, restore).shape)}")
