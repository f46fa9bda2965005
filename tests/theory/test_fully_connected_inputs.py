"""Any input there may be: in blocks, parallel, zero, flattened; others are refused."""

import inspect
import math

import pytest
import torch
from infinite_width import ROOT2, X

from ntk_callbacks.theory import (
    Learning,
    activate,
    dense,
    fully_connected,
    infinite_width_kernels,
    residual,
    sequential,
)
from ntk_callbacks.theory.activations import ACTIVATIONS
from ntk_callbacks.theory.learning import Parametrization, check_choice

# Properties.


@pytest.mark.parametrize("activation", ["relu", "tanh", "hard_tanh"])
def test_cross_kernels_are_blocks_of_the_symmetric_one(activation):
    arguments = {"depth": 2, "activation": activation, "sigma_w": 1.5, "sigma_b": 0.2}
    whole = fully_connected(X, **arguments)
    cross = fully_connected(X[:3], X[1:], **arguments)
    # Inputs 1 and 2 are in both: their kernels with themselves are exact too.
    assert torch.allclose(cross.nngp, whole.nngp[:3, 1:], rtol=0, atol=1e-13)
    assert torch.allclose(cross.ntk, whole.ntk[:3, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, torch.celu])
def test_symmetric_to_the_last_bit_and_positive(activation):
    x = torch.randn(25, 3)
    x = torch.cat([x, x[:5] * (1 + 1e-9)]).double()
    x[-1] = x[0]
    found = fully_connected(x, depth=2, activation=activation, sigma_w=1.4, sigma_b=0.1)
    for kernel in (found.nngp, found.ntk):
        assert kernel.dtype == torch.float64
        assert torch.equal(kernel, kernel.mT)
        eigenvalues = torch.linalg.eigvalsh(kernel)
        assert eigenvalues[0] > -1e-14 * eigenvalues[-1]
        # Two equal inputs, not merely nearly equal numbers.
        assert torch.allclose(kernel[-1], kernel[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("features", [10, 5000])
def test_parallel_inputs_lose_no_digits(features):
    """ReLU without biases is homogeneous: Θ(x, s x) = s Θ(x, x) for s > 0."""
    x = torch.randn(6, features, dtype=torch.float64)
    arguments = {"depth": 4, "activation": "relu", "sigma_w": ROOT2, "sigma_b": 0.0}
    own = fully_connected(x, **arguments).ntk.diagonal()
    for scale in (1.0, 0.3, 7.0):
        cross = fully_connected(x, scale * x, **arguments).ntk.diagonal()
        assert torch.allclose(cross, scale * own, rtol=1e-12)
    twice = fully_connected(torch.cat([x, x]), **arguments).ntk
    assert torch.allclose(twice[:6, 6:].diagonal(), own, rtol=1e-13)


def test_blocks_make_no_difference(monkeypatch):
    arguments = {"depth": 2, "activation": "tanh", "sigma_w": 1.5, "sigma_b": 0.2}
    x1, x2 = torch.randn(7, 3), torch.randn(5, 3)
    whole = fully_connected(x1, **arguments), fully_connected(x1, x2, **arguments)
    there = inspect.unwrap(infinite_width_kernels).__globals__
    monkeypatch.setitem(there, "_BLOCK", 4)
    parts = fully_connected(x1, **arguments), fully_connected(x1, x2, **arguments)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a.ntk, b.ntk, rtol=1e-13)
        assert torch.allclose(a.nngp, b.nngp, rtol=1e-13)


def test_images_are_flattened_and_depth_zero_is_linear():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    arguments = {"depth": 0, "activation": "relu", "sigma_w": 1.5, "sigma_b": 0.2}
    found = fully_connected(x, **arguments)
    expected = 1.5**2 * x.flatten(1) @ x.flatten(1).mT / 32 + 0.2**2
    assert torch.allclose(found.nngp, expected, rtol=1e-13)
    assert torch.allclose(found.ntk, expected, rtol=1e-13)


def test_an_input_of_zeros_has_the_kernel_of_the_biases():
    x = torch.zeros(2, 4)
    for activation in ("relu", "tanh"):
        found = fully_connected(
            x, depth=2, activation=activation, sigma_w=1.5, sigma_b=0.0
        )
        assert found.nngp.abs().max() < 1e-90
        assert found.ntk.abs().max() < 1e-90


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_w": -1.0}, "sigma_w is -1"),
        ({"sigma_b": -0.1}, "sigma_b is -0.1"),
        ({"sigma_w": math.nan}, "sigma_w is nan"),
        ({"sigma_b": math.inf}, "sigma_b is inf"),
        ({"activation": "swish2"}, "expected one of relu, leaky_relu"),
        ({"depth": -1}, "depth is -1"),
        ({"parametrization": "standard"}, "width is None"),
        ({"parametrization": "standard", "width": 0}, "width is 0, expected a whole"),
        ({"x1": torch.ones(4)}, r"x1 has shape \(4,\), expected one example to a row"),
        ({"x2": torch.ones(3)}, r"x2 has shape \(3,\), expected one example"),
        ({"x1": torch.tensor([[1.0, math.nan]])}, "x1 is complex or not finite"),
        ({"x2": torch.ones(3, 5)}, r"shape \(4,\), x2 of \(5,\)"),
        ({"x1": torch.ones(0, 4)}, r"x1 has shape \(0, 4\)"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x1": X, "depth": 1, "activation": "relu", "sigma_w": 1.0}
    with pytest.raises(ValueError, match=message):
        fully_connected(**{**arguments, "sigma_b": 0.0, **change})


def test_unknown_choices():
    # Without the type checks of this test run, as a user calls it.
    with pytest.raises(ValueError, match="is 'mup', expected one of ntk, standard"):
        check_choice(Parametrization, parametrization="mup")
    with pytest.raises(ValueError, match="pixels is 'some'"):
        inspect.unwrap(infinite_width_kernels)(dense(1.0), X, pixels="some")


def test_bad_layers():
    with pytest.raises(ValueError, match="fan_in is None"):
        Learning("standard")
    with pytest.raises(ValueError, match="weight_rate is -1"):
        Learning(weight_rate=-1.0)
    with pytest.raises(ValueError, match="without a bias"):
        dense(1.0, 0.1, learning=Learning(bias=False))
    with pytest.raises(ValueError, match="sigma_w is -1"):
        dense(-1.0)


@pytest.mark.parametrize(
    "branch",
    [activate("relu"), sequential(dense(1.0), activate("relu")), sequential()],
    ids=["activation", "ends_in_activation", "nothing"],
)
def test_branches_correlated_with_the_skip_connection_are_refused(branch):
    network = sequential(dense(1.0), residual(branch))
    with pytest.raises(ValueError, match="correlated with the skip connection"):
        infinite_width_kernels(network, X)


def test_nested_residuals():
    """x + (x + f(x)) is correlated; x + (h + f(h)) with h = W x is not."""
    inner = residual(sequential(activate("relu"), dense(1.0)))
    with pytest.raises(ValueError, match="correlated"):
        infinite_width_kernels(sequential(dense(1.0), residual(inner)), X)
    network = sequential(dense(1.0), residual(sequential(dense(1.0), inner)))
    found = infinite_width_kernels(network, X).nngp.diagonal()
    # 1 for the skip connection, 1 for h and ½ for f(h).
    assert torch.allclose(found, 2.5 * X.square().mean(1), rtol=1e-13)
