"""Small models for the tests, and how they learn."""

import torch

VIT = dict(image_size=(8, 12), patch=4, channels=3, dim=16, depth=2, heads=2)             # 6 patches
MAE = VIT | dict(decoder_dim=12, decoder_depth=1, decoder_heads=3, mask_ratio=0.5)        # 3 of them visible
TCN = dict(dim=6, channels=(5, 4), kernels=(3, 3), dilations=(1, 2), dropout=0.0)
SEGMENT = TCN | dict(outputs=3, width=8, layers=2, heads=2, hidden=7, head=5)


def small(kind, sizes, **change):
    torch.manual_seed(0)
    return kind(**(sizes | change))


def shuffled(module):
    """Random values for all parameters, in double: zero biases and unit LayerNorms would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module.double()


def learn(loss_of_step, *models, steps: int, lr: float) -> float:
    """-> the mean loss of the last ten steps"""
    optimizer, losses = torch.optim.Adam([p for model in models for p in model.parameters()], lr=lr), []
    for _ in range(steps):
        losses.append(loss_of_step())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return sum(losses[-10:]).item() / 10
