"""A GPU that is only pretended: the CPU computes, and it is written down which tensors would lie on the card.

A real card refuses to compute with tensors of the CPU, and Python waits for it whenever it asks for a value.
Neither shows on the CPU. With this a whole training shows both, on any machine.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

import distributed
import training

CARD = torch.device("cuda", 0)
THERE = WeakTensorKeyDictionary()                  # the tensors on the card; also of constants that are kept
IS_CUDA, DEVICE, DATA = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__, torch.Tensor.data.__set__
ACROSS = ("copy_", "_has_compatible_shallow_copy_type")                       # takes tensors of two devices
VALUES = ("item", "tolist", "nonzero", "unique", "masked_select", "equal", "allclose", "__bool__", "__int__",
          "__float__", "__index__", "__contains__", "__repr__", "__format__")     # Python waits for these


class PretendedCard(TorchFunctionMode):
    """Inside, what is made on "cuda" or sent there, and all that comes of it, counts as lying on the card.

    Raises AssertionError where a card would refuse and, if told so, where Python would wait for it.
    """

    waiting_is_refused = False

    def refuse_waiting(self, refuse: bool):
        self.waiting_is_refused = refuse

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        tensors = [x for x in tree_leaves((arguments, keywords)) if torch.is_tensor(x)]
        card = any(x in THERE for x in tensors)
        if function == IS_CUDA:
            return card
        if function == DEVICE:
            return CARD if card else function(*arguments)
        if function == DATA:                                         # how the parameters of a module move
            noted(arguments[0], arguments[1] in THERE)
            return function(*arguments)
        if function == torch.Tensor.pin_memory:
            return arguments[0]
        name, device = function.__name__, device_in(function, arguments, keywords)
        if device:
            outputs = function(*here(arguments), **here(keywords))
            if tensors or name == "tensor":
                self.check_copy(card, device, keywords.get("non_blocking", False))
            if card != (device == "cuda") and tensors and outputs is tensors[0]:
                outputs = outputs.clone()                            # one here, one there
            return noted(outputs, device == "cuda")
        if card:
            self.check(name, tensors)
        return noted(function(*arguments, **keywords), card)

    def check_copy(self, card: bool, device: str, without_waiting: bool):
        assert without_waiting or not self.waiting_is_refused or card == (device == "cuda"), (
            f"a step waits for a copy to {device}")

    def check(self, name: str, tensors):
        assert name not in ("numpy", "__array__"), f"{name}() of a tensor on the card"
        others = [tuple(x.shape) for x in tensors if x.ndim and x not in THERE]
        assert not others or name in ACROSS, f"{name}: on the card, and on the CPU of shape {others}"
        masked = name == "__getitem__" and any(x.dtype == torch.bool for x in tensors[1:])
        assert not self.waiting_is_refused or not (masked or name in VALUES), (
            f"a step waits for the value of a tensor: {name}")


def noted(outputs, card: bool):
    """The outputs, which lie on the card or do not."""
    for x in tree_leaves(outputs):
        if torch.is_tensor(x) and card:
            THERE[x] = True
        elif torch.is_tensor(x) and x in THERE:
            del THERE[x]
    return outputs


def device_in(function, arguments, keywords) -> str | None:
    """Where a call wants its result: "cuda", "cpu", or None if it does not say."""
    if function == torch.Tensor.cpu:
        return "cpu"
    named = [keywords.get("device"), *(arguments[1:] if function == torch.Tensor.to else ())]
    found = [torch.device(x).type for x in named if isinstance(x, (str, torch.device))]
    return found[0] if found and found[0] in ("cpu", "cuda") else None


def here(arguments):
    """The same with the CPU in place of the card."""
    def on_cpu(x):
        return "cpu" if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x
    return tree_map(on_cpu, arguments)


class Event:
    """A moment on the card, where each step takes a millisecond."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, later) -> float:
        return 1.0


@contextlib.contextmanager
def pretended_card():
    """Inside, run.device=cuda means a pretended card, which has no bf16. -> PretendedCard"""
    replaced = {(distributed, "choose_device"): lambda wanted="auto": CARD,
                (distributed, "has_bf16"): lambda device: False, (training, "has_bf16"): lambda device: False,
                (distributed.Team, "autocast"): lambda team: contextlib.nullcontext(),
                (torch.cuda, "get_device_properties"): lambda device: SimpleNamespace(total_memory=80e9),
                (torch.cuda, "Event"): Event,
                # PyTorch's C++ sees where they really are.
                (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype"):
                    lambda gradients: {(CARD, torch.float32): (gradients, None)}}
    with contextlib.ExitStack() as stack:
        for (place, name), function in replaced.items():
            stack.enter_context(mock.patch.object(place, name, function))
        yield stack.enter_context(PretendedCard())
