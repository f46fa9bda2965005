"""Scaled and centered networks: where they start, and how lazily they learn."""

import copy
import inspect
import io
import math
from itertools import pairwise

import pytest
import torch
from cases import BY_ID, CASES
from oracles import call, each
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.dynamics import linearize, max_learning_rate, scale_output
from ntk_callbacks.errors import UnsupportedModelError

# In training, spectral normalization has a state that moves with every call.
CENTERED = [
    case
    for case in CASES
    if case.output_fn is call and case.id != "spectral_norm_train"
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", CENTERED, ids=lambda case: case.id)
def test_every_network_starts_at_zero_and_moves_alpha_times_as_far(case):
    model, x = case.build()
    scaled = scale_output(model, 4.0)
    # Where torch has other kernels for networks without gradients, to round-off.
    assert call(scaled, each(torch.clone, x)).abs().max() < 1e-14
    moved = copy.deepcopy(model)
    for name, parameter in moved.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        scaled.model.get_parameter(name).data.copy_(parameter.data)
    before = call(copy.deepcopy(model), each(torch.clone, x))
    expected = 4.0 * (call(moved, each(torch.clone, x)) - before)
    outputs = call(scaled, each(torch.clone, x))
    assert torch.allclose(outputs, expected, rtol=0, atol=1e-12)


def test_the_kernel_is_alpha_squared_times_as_large():
    model, x = BY_ID["cnn"].build()
    expected = 9 * empirical_ntk(model, x)
    found = empirical_ntk(scale_output(model, -3.0), x)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_dropout_drops_the_same_units_of_both_networks():
    model = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    scaled = scale_output(model.train(), 2.0)
    x = torch.randn(3, 5)
    assert not scaled(x).any()
    with torch.no_grad():
        scaled.model[2].bias += 1.0
    assert torch.allclose(scaled(x), torch.full((3, 2), 2.0), atol=1e-5)
    # Random numbers are drawn once, as by the model alone.
    torch.manual_seed(1)
    scaled(x)
    found = torch.rand(1)
    torch.manual_seed(1)
    model(x)
    assert torch.equal(found, torch.rand(1))


def test_running_statistics_of_both_networks_follow_their_batches():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).train()
    scaled = scale_output(model, 2.0)
    for _ in range(5):
        assert not scaled(torch.randn(4, 5)).any()
    assert scaled.initial[1].running_mean.any()
    scaled.eval()
    assert not scaled.initial.training
    assert not scaled(torch.randn(4, 5)).any()
    assert not model[1].running_mean.any()  # the model itself is a third one


def test_only_the_first_network_trains_and_the_state_goes_round():
    model, x = BY_ID["mlp"].build()
    scaled = scale_output(model, 2.0)
    assert not any(parameter.requires_grad for parameter in scaled.initial.parameters())
    adamw = torch.optim.AdamW(scaled.parameters(), 0.1, weight_decay=0.1)
    ((scaled(x) - 1) ** 2).sum().backward()
    adamw.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(scaled.initial.get_parameter(name), parameter)
        assert not torch.equal(scaled.model.get_parameter(name), parameter)
    other = scale_output(BY_ID["mlp"].model().double(), 2.0)
    other.load_state_dict(scaled.state_dict())
    assert torch.equal(other(x), scaled(x))
    file = io.BytesIO()
    torch.save(copy.deepcopy(scaled), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), scaled(x))


def test_gradients_by_the_inputs_are_those_of_both_networks():
    model, x = BY_ID["mlp"].build()
    scaled = scale_output(model, 2.0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(scaled(x).sum(), x)
    assert not gradient.any()


def test_the_twin_of_a_scaled_network_is_the_scaled_displacement():
    model, x = BY_ID["gru"].build()
    twin, plain = linearize(scale_output(model, 5.0)), linearize(model)
    for name, parameter in plain.named_parameters():
        step = torch.randn_like(parameter)
        parameter.data += step
        twin.get_parameter(f"model.{name}").data += step
    expected = 5.0 * (plain(x) - model(x))
    assert torch.allclose(twin(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, math.nan, math.inf])
def test_a_scale_without_sense_is_refused(alpha):
    with pytest.raises(ValueError, match=r"expected finite and not 0"):
        scale_output(nn.Linear(2, 1), alpha)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="the model is a function"):
        inspect.unwrap(scale_output)(lambda x: x, 1.0)
    layer = nn.Linear(2, 1)
    layer.graph = layer.weight * 2
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        scale_output(layer, 1.0)


class Tanh(nn.Module):
    """Two hidden layers in NTK parametrization, σ_w = 1.5, σ_b = 0.1."""

    def __init__(self, inputs, width):
        super().__init__()
        sizes = [inputs, width, width, 1]
        self.weights = nn.ParameterList(
            torch.randn(m, n, dtype=torch.float64) for n, m in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.randn(m, dtype=torch.float64) for m in sizes[1:]
        )

    def forward(self, x):
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.tanh(x) if layer else x
            x = 1.5 / w.shape[1] ** 0.5 * nn.functional.linear(x, w) + 0.1 * b
        return x


@pytest.mark.slow
def test_displacement_and_kernel_change_fall_as_one_over_alpha():
    """Slopes −1 ± 0.03 from α = 4 on; −0.999 and −1.003 were seen from 1 to 64."""
    x = torch.randn(12, 6, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * 6**0.5
    y = x[:, :1].sign()
    net = Tanh(6, 128)
    ntk = empirical_ntk(net, x, outputs="trace")
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    rate = 0.2 * max_learning_rate(ntk).item()
    alphas, distances, changes = [4.0, 8.0, 16.0, 32.0], [], []
    for alpha in alphas:
        scaled = scale_output(net, alpha)
        trained = list(scaled.model.parameters())
        sgd = torch.optim.SGD(trained, rate / alpha**2)
        for _ in range(300):
            sgd.zero_grad()
            ((scaled(x) - y) ** 2).sum().div(2).backward()
            sgd.step()
        end = torch.cat([p.detach().flatten() for p in trained])
        moved = empirical_ntk(scaled.model, x, outputs="trace")
        distances.append((end - start).norm().item())
        changes.append(((moved - ntk).norm() / ntk.norm()).item())
    for values in (distances, changes):
        for wide, narrow in pairwise(values):
            assert math.log2(narrow / wide) == pytest.approx(-1, abs=0.03)
