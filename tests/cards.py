"""What the tests of the GPU share: each is written once and runs on the CPU too where that says something."""

import pytest
import torch

NO_CARD = "PyTorch sees no CUDA GPU here"
ON_CARD = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CARD)]
ON_TWO_CARDS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2,
                                                    reason="PyTorch sees fewer than two CUDA GPUs here")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CARD)]


def autocast(device: str, dtype: str):
    """As Team.autocast, for "float32" or "bf16", and on the CPU too."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")
