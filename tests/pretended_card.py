"""A GPU that is only pretended: the CPU computes, and it is written down which tensors would lie on the card.

A real card refuses to compute with tensors of the CPU, and Python waits for it whenever it asks for a value.
Neither shows on the CPU. With this, whole trainings show both on any machine.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

import tiny

CARD = torch.device("cuda", 0)
IS_CUDA, DEVICE, DATA = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__, torch.Tensor.data.__set__
ACROSS = ("copy_", "_has_compatible_shallow_copy_type")                       # takes tensors of two devices
CONSTANTS = ("tensor", "as_tensor", "new_tensor")                             # numbers that are copied there
VALUES = ("item", "tolist", "nonzero", "argwhere", "unique", "bincount", "masked_select", "equal", "allclose",
          "__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__", "__format__")


class PretendedCard(TorchFunctionMode):
    """Inside, what is made on "cuda" or sent there, and all that comes of it, counts as lying on the card.

    Raises AssertionError where a card would refuse and, if `waiting_is_refused`, where Python would wait.
    """

    def __init__(self):
        super().__init__()
        self.there, self.waiting_is_refused = WeakTensorKeyDictionary(), False

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function.__name__
        tensors = tensors_in((arguments, keywords))
        card = any(self.there.get(x) for x in tensors)
        device = wanted(function, arguments, keywords)
        if function == IS_CUDA:
            return card
        if function == DEVICE:
            return CARD if card else function(*arguments)
        if function == DATA:                                         # how the parameters of a module move
            function(*arguments)
            return self.noted(arguments[0], self.there.get(arguments[1], False))
        if function == torch.Tensor.pin_memory:
            return arguments[0]
        waits = name in VALUES or name == "__getitem__" and any(x.dtype == torch.bool for x in tensors[1:])
        if device and tensors or name in CONSTANTS:
            across = name == "new_tensor" or card != (device == "cuda")
            waits = across and not keywords.get("non_blocking")
        elif card:
            in_place = name.startswith("__i") or name.endswith("_") and not name.startswith("__")
            others = [tuple(x.shape) for i, x in enumerate(tensors)
                      if (x.ndim or in_place and i == 0) and not self.there.get(x)]
            assert not others or name in ACROSS, f"{name}: on the card, and on the CPU of shape {others}"
            assert name not in ("numpy", "__array__"), f"{name}() of a tensor on the card"
        waits = waits and (card or device == "cuda")
        assert not (waits and self.waiting_is_refused), f"Python waits for the card: {name}"
        if device is None:
            return self.noted(function(*arguments, **keywords), card)
        outputs = function(*map(on_cpu, arguments), **{key: on_cpu(x) for key, x in keywords.items()})
        if tensors and outputs is tensors[0] and card != (device == "cuda"):
            outputs = outputs.clone()                                # one here, one there
        return self.noted(outputs, device == "cuda")

    def noted(self, outputs, card: bool):
        """The outputs, which lie on the card or do not."""
        for x in tensors_in(outputs):
            self.there[x] = card
        return outputs


def tensors_in(x) -> list[torch.Tensor]:
    """Those in lists, tuples and dictionaries: PyTorch's tree_leaves does the same, more slowly."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def wanted(function, arguments, keywords) -> str | None:
    """Where a call wants its result: "cuda", "cpu", or None if it does not say."""
    if function == torch.Tensor.cpu:
        return "cpu"
    named = [keywords.get("device"), *(arguments[1:] if function == torch.Tensor.to else ())]
    return next((torch.device(x).type for x in named if isinstance(x, (str, torch.device))), None)


def on_cpu(x):
    """An argument with the CPU in place of the card."""
    return "cpu" if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x


def pretend() -> PretendedCard:
    """From here on run.device=cuda means a pretended card, which has no bf16. For a process of its own."""
    tiny.instead("engine.distributed.choose_device", lambda ours: lambda wanted: CARD)
    tiny.instead("torch.cuda.is_bf16_supported", lambda theirs: lambda **asked: False)
    # PyTorch's C++ sees where they really are.
    tiny.instead("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype",
                 lambda theirs: lambda gradients: {(CARD, torch.float32): (gradients, None)})
    return PretendedCard().__enter__()
