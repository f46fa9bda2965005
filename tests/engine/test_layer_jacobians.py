"""Jacobians between layers against products of matrices written by hand."""

import math

import pytest
import torch
from layer_jacobians import agree, by_hand, close, mlp, x_of
from torch import nn

from ntk_callbacks import input_jacobian
from ntk_callbacks.engine import segment_spectra
from ntk_callbacks.engine.layer_jacobians import (
    input_spectra,
    jacobian_by_depth,
    layer_jacobian,
)


def test_multilayer_perceptron_is_a_product_of_matrices():
    net, x = mlp(), x_of(4, 5)
    (w1, w2, w3), d1, d2 = by_hand(net, x)
    products = {
        ("0", "2"): w2 @ d1,
        ("2", "4"): w3 @ d2,
        ("0", "4"): w3 @ d2 @ w2 @ d1,
        (None, "0"): w1.expand(4, 7, 5),
        (None, "2"): w2 @ d1 @ w1,
        ("0", None): w3 @ d2 @ w2 @ d1,
        (None, None): w3 @ d2 @ w2 @ d1 @ w1,
        ("4", None): torch.eye(3).double().expand(4, 3, 3),
    }
    for (start, end), expected in products.items():
        close(layer_jacobian(net, x, start, end), expected)
    close(layer_jacobian(net, x), input_jacobian(net, x))
    assert not layer_jacobian(net, x, "4", "0").any()  # nothing leads backwards


def test_singular_values_by_depth():
    net, x = mlp(), x_of(4, 5)
    (w1, w2, w3), d1, d2 = by_hand(net, x)
    found = jacobian_by_depth(net, x)
    assert found.names == ("0", "2", "4")
    agree(found.step, [w2 @ d1, w3 @ d2])
    agree(found.from_input, [w1.expand(4, 7, 5), w2 @ d1 @ w1, w3 @ d2 @ w2 @ d1 @ w1])
    agree(
        found.to_output,
        [w3 @ d2 @ w2 @ d1, w3 @ d2, torch.eye(3).double().expand(4, 3, 3)],
    )
    assert found.step.formed.all()
    s = torch.linalg.svdvals(w2 @ d1)
    close(found.step.condition_number[0], s[:, 0] / s[:, -1])
    gram = (w2 @ d1) @ (w2 @ d1).mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    gap = torch.linalg.matrix_norm(gram / scale - torch.eye(6), ord=2)
    close(found.step.isometry_gap[0], gap)
    few = jacobian_by_depth(net, x, count=2)
    close(few.step.largest, found.step.largest[:, :2])
    chosen = jacobian_by_depth(net, x, layers="[04]")
    agree(chosen.step, [w3 @ d2 @ w2 @ d1])


def dense(convolution, *shape):
    """The matrix of a convolution, column by column: it is linear, no derivative."""
    units = torch.eye(math.prod(shape)).double().reshape(-1, *shape)
    with torch.no_grad():
        return (convolution(units) - convolution(0 * units)).flatten(1).mT


@pytest.fixture
def images():
    torch.manual_seed(2)
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, stride=2)),
        *(nn.Flatten(), nn.Linear(16, 2)),
    ).double()
    return net, x_of(3, 2, 4, 4)


def test_convolutions_are_their_dense_matrices(images):
    net, x = images
    with torch.no_grad():
        slopes = torch.diag_embed((1 - net[0](x).tanh() ** 2).flatten(1))
    first, second = dense(net[0], 2, 4, 4), dense(net[2], 3, 4, 4)
    close(layer_jacobian(net, x, "0", "2"), second @ slopes)
    close(layer_jacobian(net, x, None, "2"), second @ slopes @ first)
    agree(
        jacobian_by_depth(net, x).step,
        [second @ slopes, net[4].weight.expand(3, 2, 16)],
    )


def test_wide_layers_agree_with_their_formed_jacobians(images, monkeypatch):
    net, x = images
    exact = jacobian_by_depth(net, x)
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    wide = jacobian_by_depth(net, x)
    assert not wide.step.formed.any()
    for one, other in ((wide.step, exact.step), (wide.to_output, exact.to_output)):
        torch.testing.assert_close(one.largest, other.largest, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.smallest, other.smallest, rtol=1e-5, atol=1e-12)
        # 16 vectors: √(2/16r) of scatter, r = 2 for the narrowest.
        torch.testing.assert_close(one.mean_square, other.mean_square, rtol=0.5, atol=0)
    torch.testing.assert_close(
        wide.step.mean_square[0], exact.step.mean_square[0], rtol=0.2, atol=0
    )
    assert wide.from_input.largest.isnan().all()
    torch.testing.assert_close(
        wide.from_input.mean_square, exact.from_input.mean_square, rtol=0.5, atol=0
    )


def test_estimates_of_the_mean_square_have_no_bias(monkeypatch):
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    monkeypatch.setattr(segment_spectra, "_SAMPLES", 400)
    net, x = mlp(), x_of(2, 5)
    (w1, w2, _), d1, _ = by_hand(net, x)
    exact = (w2 @ d1 @ w1).square().sum((1, 2)) / 5
    # √(2/400) = 7 % at most, less for more than one direction.
    found = input_spectra(net[:3], x).mean_square[0]
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)


def test_orthogonal_networks_are_isometries_however_wide(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Linear(40, 40, bias=False).double() for _ in range(3)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=1.5)
    net, x = nn.Sequential(*layers), x_of(3, 40)
    for widest in (256, 4):
        monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", widest)
        found = jacobian_by_depth(net, x)
        assert found.step.isometry_gap.abs().max() < 1e-10
        assert (found.step.largest - 1.5).abs().max() < 1e-10
        assert (found.to_output.smallest[0] - 1.5**2).abs().max() < 1e-10
        assert input_spectra(net, x).isometry_gap.abs().max() < 1e-10


def test_a_smallest_value_that_is_not_found_is_nan(monkeypatch):
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 4)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).double()
    step = jacobian_by_depth(net, x_of(2, 300)).step
    assert step.smallest.isnan().all()
    assert step.isometry_gap.isnan().all()
    s = torch.linalg.svdvals(net[1].weight)[0].detach()
    torch.testing.assert_close(step.largest, s.expand(1, 2), rtol=1e-5, atol=0)
