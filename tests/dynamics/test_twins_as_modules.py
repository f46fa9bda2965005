"""A twin is a module: copied, saved, moved, pickled, called as its model is."""

import copy
import io

import pytest
import torch
from cases import BY_ID
from networks import settled, vectors
from oracles import call, each
from torch import nn
from twins import displaced

from ntk_callbacks.dynamics import linearize


def test_a_model_stays_as_it_was():
    """Bit by bit, and so do the generators; the twin moves without the model."""
    case = BY_ID["resnet_train"]
    model, x = case.build()
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    rng = torch.get_rng_state()
    twin = linearize(model, mode="train")
    twin(x).sum().backward()
    twin.eval()
    with torch.no_grad():
        twin(x)
    displaced_by_nothing = torch.get_rng_state()
    assert torch.equal(rng, displaced_by_nothing)
    displaced(twin)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_and_the_mode_of_a_twin_are_fixed():
    torch.manual_seed(0)
    model = settled(
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh())
    ).double()
    x = vectors(4).double()
    evaluated, batchwise = linearize(model.train()), linearize(model, mode="train")
    buffers = copy.deepcopy(dict(batchwise.named_buffers()))
    for twin in (evaluated, batchwise):
        outputs = [twin.train()(x), twin.eval()(x), twin(x)]
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    for name, buffer in batchwise.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert torch.allclose(evaluated(x), model.eval()(x), rtol=0, atol=1e-14)
    model[1].train()
    assert torch.allclose(batchwise(x), model(x), rtol=0, atol=1e-14)
    assert not torch.allclose(batchwise(x), evaluated(x), atol=1e-2)


def test_tied_and_frozen_parameters_stay_so():
    model, x = BY_ID["tied_weights"].build()
    twin = linearize(model)
    assert twin.get_parameter("embed.weight") is twin.get_parameter("decoder.weight")
    assert len(list(twin.parameters())) == len(list(model.parameters()))

    model, x = BY_ID["frozen_layer"].build()
    twin = linearize(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in twin.named_parameters()} == flags
    adamw = torch.optim.AdamW(twin.parameters(), 0.1, weight_decay=0.5)
    (twin(x) ** 2).sum().backward()
    adamw.step()
    for name, parameter in twin.named_parameters():
        moved = not torch.equal(parameter, model.get_parameter(name))
        assert moved == flags[name]


def test_a_parameter_counts_after_it_was_trained_and_frozen():
    model, x = BY_ID["mlp"].build()
    twin = linearize(model)
    displaced(twin)
    before = twin(x).detach()
    twin.get_parameter("2.weight").requires_grad_(False)
    assert torch.allclose(twin(x), before, rtol=0, atol=1e-14)
    twin.requires_grad_(False)
    assert torch.allclose(twin(x), before, rtol=0, atol=1e-14)
    with torch.inference_mode():
        assert torch.allclose(twin(x), before, rtol=0, atol=1e-14)
    twin.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(twin(x), model(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "gru", "tied_weights", "resnet", "attention"])
def test_twins_can_be_copied_saved_moved_and_loaded(name):
    model, x = BY_ID[name].build()
    twin = linearize(model)
    displaced(twin)
    expected = twin(x).detach()

    twice = copy.deepcopy(twin)
    assert torch.equal(twice(x), expected)
    displaced(twice)
    assert torch.equal(twin(x), expected)

    other = linearize(BY_ID[name].model().double())
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), expected)
    names = {f"linearization_point.{name}" for name, _ in model.named_parameters()}
    assert names <= set(twin.state_dict())
    assert set(model.state_dict()) <= set(twin.state_dict())

    low = each(lambda t: t.float() if t.is_floating_point() else t, x)
    assert torch.allclose(call(twin.float(), low).double(), expected, atol=1e-4)
    kept = {tensor.dtype for tensor in twin.linearization_point.buffers()}
    assert kept == {torch.float32}
    elsewhere = twin.to("meta")
    assert all(tensor.is_meta for tensor in elsewhere.state_dict().values())


class Root(nn.Module):
    """Parameters and buffers of the outermost module, which the twin shares."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2))
        self.register_buffer("scale", torch.rand(2))
        self.register_buffer("shift", torch.rand(2), persistent=False)

    def forward(self, x):
        return torch.tanh(x @ self.weight) * self.scale + self.shift


def test_the_outermost_module_moves_and_loads_too():
    model, x = Root(), vectors(3)
    twin = linearize(model).double()
    assert {t.dtype for t in twin.state_dict().values()} == {torch.float64}
    assert torch.allclose(twin(x.double()), model.double()(x.double()))
    names = {"weight", "scale", "linearization_point.weight"}
    assert set(twin.state_dict()) == names
    other = linearize(Root()).double()
    displaced(other)
    other.shift.copy_(twin.shift)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x.double()), other(x.double()))


def test_a_twin_can_be_pickled():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.GRU(6, 3, batch_first=True))
    twin = linearize(model, output_fn=_first)
    x = torch.randn(2, 4, 5)
    displaced(twin)
    expected = twin(x).detach()
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected)
    loaded.double()(x.double()).sum().backward()
    displaced(loaded)
    assert not torch.allclose(loaded(x.double()).float(), expected)


def _first(model, x):
    return model(x)[0]


def test_a_twin_is_called_as_its_model_and_leaves_the_inputs_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x, *, scale, mask=None):
            x.mul_(scale)
            y = torch.tanh(self.layer(x))
            return y if mask is None else y * mask

    model, x = Mixed().double(), vectors(3).double()
    twin = linearize(model)
    kept, mask = x.clone(), torch.ones(1, 2, dtype=torch.float64)
    expected = model(x.clone(), scale=2.0, mask=3 * mask)
    assert torch.allclose(twin(x, scale=2.0, mask=3 * mask), expected)
    assert torch.equal(x, kept)
    expected = model(x.clone(), scale=3.0)
    assert torch.allclose(twin(x=x, scale=3.0), expected)


def test_a_token_sequence_keeps_its_shape():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)).double()
    twin = linearize(model)
    assert twin(torch.randint(7, (3, 4))).shape == (3, 4, 7)
