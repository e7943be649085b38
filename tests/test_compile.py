"""run.compile: torch.compile of the model in a training, which changes nothing but the speed.

All tests but one compile with a backend that runs PyTorch's own kernels, which takes seconds; that one as a
training does.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo import lookup_backend

import stages
import tiny
from distributed import Compiled
from processes import ALONE, in_team
from stages import checkpoint
from test_gpu import MODELS, far
from training import in_pieces

TRAINED = ["mae", "classifier", "segment model"]


@pytest.fixture
def quickly(monkeypatch):
    """Compile with PyTorch's own kernels. -> how often something was compiled"""
    calls, kernels = SimpleNamespace(count=0), lookup_backend("aot_eager")

    def count(graph, inputs):
        calls.count += 1
        return kernels(graph, inputs)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch.compiler.reset()
    return calls


def loss_and_gradient(model, parameters, inputs):
    for parameter in parameters:
        parameter.grad = None
    loss = model(*inputs).square().sum()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def same_with_and_without(name):
    torch.manual_seed(0)
    model, *inputs = MODELS[name]()
    names, parameters = list(model.state_dict()), list(model.parameters())
    fast = ALONE.parallel(model, compiled=True)
    for share in (inputs, [x[:2] for x in inputs], [x[:0] for x in inputs]):
        ours, expected = (loss_and_gradient(m, parameters, share) for m in (fast, model))
        if len(share[0]):
            assert far(ours[0], expected[0]) < 1e-5 and far(ours[1], expected[1]) < 1e-5
        else:
            assert ours[0] == expected[0] == 0 and ours[1].count_nonzero() == 0
    assert list(model.state_dict()) == names
    assert not any("_orig_mod" in name for name in names)


def test_what_is_compiled_is_called_for_all_but_an_empty_share(monkeypatch):
    """Nothing is really compiled here."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model: lambda *given: calls.append(given) or model(*given))
    model = torch.nn.Bilinear(2, 3, 4)
    fast, plain = ALONE.parallel(model, compiled=True), ALONE.parallel(model)
    assert isinstance(fast, Compiled) and plain is model
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    for a, b in in_pieces(fast, 7, x, y):                    # two of the pieces are empty
        assert torch.equal(fast(a, b), model(a, b))
    assert [len(a) for a, b in calls] == [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINED, "emma", "cotex"])
def test_a_compiled_model_has_the_same_loss_gradient_and_names(quickly, name):
    same_with_and_without(name)
    assert quickly.count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae"])        # each takes about 20 s to compile
def test_a_compiled_model_has_the_same_loss_gradient_and_names_with_its_own_kernels(name):
    same_with_and_without(name)


SHORT = {"pretrain": ["pretrain.epochs=2"], "task_au": ["task.epochs=2", "temporal.dropout=0"],
         "finetune": ["finetune.epochs=2", "finetune.dropout=0", "finetune.drop_path=0"]}


@pytest.mark.slow
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_compiled_training_has_the_losses_of_a_plain_one_and_the_same_names_in_its_files(
        quickly, tmp_path, stage):
    inputs = stages.write(tmp_path / "inputs")
    places = []
    for compiles in ("false", "true"):
        folder = tiny.copied(inputs, tmp_path / compiles, [stage] if stage in stages.MADE else [])
        settings = stages.overriding([*SHORT[stage], f"run.compile={compiles}"])
        stages.start(folder, *tiny.STAGES[stage], *settings)
        places.append(folder / "runs/tiny" / stage)
    plain, fast = (checkpoint(place, "last.pt") for place in places)
    assert list(fast["model"]) == list(plain["model"])
    assert fast["made_of"] == plain["made_of"]
    assert quickly.count
    assert tiny.log_numbers(places[1]) == pytest.approx(tiny.log_numbers(places[0]), rel=1e-3)


def two_processes(team):
    """-> the gradients of two batches. Of the first, one process has two images and the other none."""
    torch.manual_seed(0)
    model, images = MODELS["classifier"]()
    ddp, gradients = team.parallel(model, compiled=True), []
    for batch in (images[:2], images):
        share = batch[:len(batch) * (team.rank == 0)] if len(batch) == 2 else batch[team.rank::2]
        model.zero_grad(set_to_none=True)
        for x, in in_pieces(ddp, 2, share):
            ddp(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).numpy())
    return gradients


@pytest.mark.slow
def test_two_compiled_processes_add_up_the_gradient_of_one(quickly):
    torch.manual_seed(0)
    model, images = MODELS["classifier"]()
    codes, results = in_team(2, two_processes)
    assert codes == [0, 0]
    for i, batch in enumerate((images[:2], images)):
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected = loss_and_gradient(model, parameters, [batch])[1]
        for gradients in results:
            assert far(torch.from_numpy(gradients[i]), expected) < 1e-5
