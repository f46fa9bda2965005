"""Initializations: what they set, what it does to signals, and what they refuse."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ntk_callbacks import input_singular_values
from ntk_callbacks.experiments import (
    critical_,
    delta_orthogonal_,
    scaled_orthogonal_,
)
from ntk_callbacks.theory import critical_point


def chain(*widths, activation=nn.Tanh, bias=True):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


# What is set.


def test_gaussian_weights_and_biases_have_their_deviations():
    net = chain(300, 400, 500)
    assert critical_(net, "tanh", sigma_b=0.3) is net
    sigma_w = critical_point("tanh", 0.3).sigma_w.item()
    for layer, fan_in in ((net[0], 300), (net[2], 400)):
        found = layer.weight.std().item() * fan_in**0.5
        assert found == pytest.approx(sigma_w, rel=0.01)
        assert layer.bias.std().item() == pytest.approx(0.3, rel=0.15)


def test_convolutions_count_their_taps():
    conv = nn.Conv2d(64, 96, 3)
    critical_(conv, nn.ReLU())
    assert conv.weight.std().item() * (64 * 9) ** 0.5 == pytest.approx(2**0.5, rel=0.01)
    assert (conv.bias == 0).all()


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_scaled_orthogonal_weights(shape):
    weight = scaled_orthogonal_(torch.empty(shape, dtype=torch.float64), 1.3)
    outputs, inputs = shape
    scale = 1.3 * max(1, outputs / inputs) ** 0.5
    assert (torch.linalg.svdvals(weight) - scale).abs().max() < 1e-14
    # The mean square of outputs, for inputs of mean square 1.
    assert (weight**2).sum().item() / outputs == pytest.approx(1.69)


def test_orthogonal_matrices_are_uniform():
    """Of Haar's measure: mean 0, E W₁₁² = 1/n, E W₁₁⁴ = 3/(n (n + 2))."""
    draws = torch.stack(
        [
            scaled_orthogonal_(torch.empty(3, 3, dtype=torch.float64))
            for _ in range(4000)
        ]
    )
    for entry in (draws[:, 0, 0], draws[:, 2, 1]):
        assert abs(entry.mean()) < 4 * (1 / 3 / 4000) ** 0.5
        assert entry.square().mean().item() == pytest.approx(1 / 3, rel=0.06)
        assert entry.pow(4).mean().item() == pytest.approx(1 / 5, rel=0.08)
    signs = torch.linalg.det(draws).sign().mean()
    assert abs(signs) < 4 / 4000**0.5


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_delta_orthogonal_weights(kind):
    weight = kind(3, 5, 3).double().weight
    assert delta_orthogonal_(weight, 0.7) is weight
    center = weight.detach().flatten(2)[:, :, 3 ** (weight.ndim - 2) // 2]
    assert weight.count_nonzero() == center.count_nonzero() == 15
    expected = 0.49 * 5 / 3 * torch.eye(3, dtype=torch.float64)
    assert (center.mT @ center - expected).abs().max() < 1e-14


def test_generator_is_the_only_source_of_randomness():
    weights = []
    for _ in range(2):
        before = torch.get_rng_state()
        net = chain(4, 4, 4)
        torch.set_rng_state(before)
        for kind in ("gaussian", "orthogonal"):
            critical_(
                net,
                "tanh",
                sigma_b=0.1,
                weights=kind,
                generator=torch.Generator().manual_seed(7),
            )
            weights.append(nn.utils.parameters_to_vector(net.parameters()))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(11)
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions(dtype):
    net = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3)).to(dtype)
    for kind in ("gaussian", "orthogonal"):
        critical_(net, "relu", weights=kind)
        assert net[0].weight.dtype == net[1].weight.dtype == dtype
        assert net[0].weight.isfinite().all()


def test_norms_keep_what_they_are_and_others_are_named():
    norms = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm((4, 4)))
    before = [p.clone() for p in norms[1:].parameters()]
    critical_(norms, "relu")
    assert all(map(torch.equal, before, norms[1:].parameters()))
    net = nn.Sequential(nn.Embedding(3, 4), nn.MultiheadAttention(4, 1))
    kept = net[0].weight.clone()
    with pytest.warns(UserWarning, match=r"left as they are: 0\.weight, 1\.in_proj"):
        critical_(net, "relu")
    assert torch.equal(net[0].weight, kept)


# What it does.


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_deep_linear_networks_of_convolutions_are_isometries(padding):
    layers = [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode=padding, bias=False).double()
        for _ in range(10)
    ]
    net = critical_(nn.Sequential(*layers), "linear", weights="orthogonal")
    s = input_singular_values(net, torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert (s - 1).abs().max() < 1e-12
    # Gaussian kernels of the same σ_w are far from it.
    critical_(net, "linear")
    s = input_singular_values(net, torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert s.max() / s.min() > 1e3


def test_deep_tanh_networks_keep_signals_and_gradients():
    """Depth 30 at criticality: q near q*, mean square singular value near 1."""
    net = chain(*[300] * 31)
    sigma_b = 0.05**0.5
    point = critical_point("tanh", sigma_b)
    x = torch.randn(1, 300, dtype=torch.float64)
    x = x * ((point.q - sigma_b**2).sqrt() / point.sigma_w)  # q* after one layer
    for kind in ("gaussian", "orthogonal"):
        critical_(net, "tanh", sigma_b=sigma_b, weights=kind)
        h = net(x).detach()
        assert h.square().mean().item() == pytest.approx(point.q.item(), rel=0.4)
        mean = input_singular_values(net, x).square().mean() / point.sigma_w**2
        assert 0.25 < mean < 4


def test_mean_squares_pass_through_any_shape():
    """Orthogonal layers of any widths keep the mean square of a random signal."""
    net = chain(200, 400, 400, 100, 300, activation=nn.Identity)
    critical_(net, "linear", weights="orthogonal")
    x = torch.randn(500, 200, dtype=torch.float64)
    ratio = net(x).square().mean() / x.square().mean()
    assert ratio.item() == pytest.approx(1, rel=0.05)


# What is refused, and that nothing is changed then.


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def refused(net, message, *, activation="relu", **options):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        critical_(net, activation, **options)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_layers_that_cannot_be_initialized_are_refused():
    refused(nn.ReLU(), "holds no nn.Linear")
    refused(chain(3, 3, bias=False), "has no bias", activation="tanh", sigma_b=0.2)
    orthogonal = {"weights": "orthogonal"}
    few = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(8, 4, 3))
    refused(few, r"critical_: 1: 8 inputs and 4 outputs.*gaussian", **orthogonal)
    refused(nn.Conv2d(4, 4, 2), "no center tap", **orthogonal)
    refused(nn.Conv2d(4, 4, 3, groups=2), "grouped", **orthogonal)
    wrapped = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(wrapped, "weight", Doubled())
    refused(wrapped, "computed from others")
    with pytest.raises(ValueError, match="no shape yet"):
        critical_(nn.LazyLinear(3), "relu")


def test_scales_without_a_critical_point_are_refused():
    refused(chain(3, 3), "critical at sigma_b=0 only", sigma_b=0.1)
    refused(chain(3, 3), "sigma_b is -1", sigma_b=-1.0)
    refused(chain(3, 3), "sigma_b is nan", sigma_b=math.nan)
    refused(chain(3, 3), "activation is 'tan'", activation="tan")
    refused(chain(3, 3), "weights is 'uniform'", weights="uniform")


def test_weights_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 3, 3\) torch.float32"):
        scaled_orthogonal_(torch.empty(3, 3, 3))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        scaled_orthogonal_(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3, 3\) torch.float32"):
        delta_orthogonal_(torch.empty(3, 3))
    with pytest.raises(ValueError, match="3 inputs and 2 outputs"):
        delta_orthogonal_(torch.empty(2, 3, 3))
