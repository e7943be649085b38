"""The pretended card refuses what a real one refuses, and only that."""

import numpy as np
import pytest
import torch
from torch import nn

from pretended_card import pretended_card


@pytest.fixture
def card():
    with pretended_card() as card:
        card.refuse_waiting(True)
        yield card


@pytest.fixture
def x(card):
    """On the card."""
    return torch.ones(2, 3, device="cuda")


FORBIDDEN = {
    "other tensors": lambda x: x + torch.ones(3),
    "from the left": lambda x: torch.ones(2) @ x,
    "in a list": lambda x: torch.stack([x, torch.ones(2, 3)]),
    "behind a view": lambda x: x[0].detach() * torch.ones(3),
    "a model that stayed": lambda x: nn.Linear(3, 1)(x),
    "an input that stayed": lambda x: nn.Linear(3, 1).to("cuda")(torch.ones(2, 3)),
    "NumPy": lambda x: x.numpy(),
    "NumPy, by its own function": lambda x: np.asarray(x)}
WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "a mask": lambda x: x[x > 0],
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy to the card": lambda x: torch.ones(3).to(x.device),
    "a constant": lambda x: torch.tensor([1.0, 2.0], device=x.device)}
ALLOWED = {
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "two on the card": lambda x: x + torch.zeros(2, 3, device=x.device),
    "what is sent": lambda x: x + torch.ones(2, 3).to(x.device, non_blocking=True),
    "what is fetched": lambda x: x.to("cpu", non_blocking=True) + torch.ones(2, 3),
    "another type": lambda x: x.to(torch.float64) + x,
    "a value on the CPU": lambda x: torch.ones(3).sum().item()}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_card_cannot_do_is_refused(card, x, what):
    card.refuse_waiting(False)
    with pytest.raises(AssertionError, match="on the card"):
        FORBIDDEN[what](x)


@pytest.mark.parametrize("what", WAITS)
def test_waiting_is_refused_while_it_is_asked_to(card, x, what):
    with pytest.raises(AssertionError, match="a step waits"):
        WAITS[what](x)
    card.refuse_waiting(False)
    WAITS[what](x)


@pytest.mark.parametrize("what", ALLOWED)
def test_what_a_card_can_do_at_once_is_allowed(x, what):
    ALLOWED[what](x)


def test_a_model_that_was_moved_trains_on_the_card_and_its_weights_are_fetched(card, x):
    card.refuse_waiting(False)
    model = nn.Linear(3, 1).to("cuda")
    assert model.weight.is_cuda and model.weight.device == x.device
    model(x).sum().backward()
    assert model.weight.grad.is_cuda and model.weight.grad.cpu().tolist() == [[2, 2, 2]]
    there = model.weight.detach()
    assert there.cpu().numpy().shape == (1, 3) and there.is_cuda
