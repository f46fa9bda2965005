"""Convolutional kernels against tables, limits and our engine."""

import inspect
import math

import pytest
import torch
from infinite_width import ROOT2, TABLES, tensor
from oracles import relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.theory import (
    Learning,
    activate,
    convolution,
    convolutional,
    dense,
    flatten,
    fully_connected,
    global_average_pool,
    infinite_width_kernels,
    residual,
    sequential,
)

NETWORK = TABLES["image_network"]

IMAGES = tensor(TABLES["images"])


def case_id(case):
    return f"{case['head']}_depth{case['depth']}"


# Tables.


@pytest.mark.parametrize("case", TABLES["convolutional"], ids=case_id)
def test_table(case):
    found = convolutional(IMAGES, depth=case["depth"], head=case["head"], **NETWORK)
    # Twelve digits after the point are given.
    assert torch.allclose(found.nngp, tensor(case["nngp"]), rtol=0, atol=6e-13)
    assert torch.allclose(found.ntk, tensor(case["ntk"]), rtol=0, atol=6e-13)


@pytest.mark.parametrize("case", TABLES["neural_tangents_convolutional"], ids=case_id)
def test_table_of_neural_tangents(case):
    found = convolutional(IMAGES, depth=case["depth"], head=case["head"], **NETWORK)
    assert torch.allclose(found.nngp, tensor(case["nngp"]), rtol=0, atol=1e-13)
    # Theirs takes the arccos of numbers near 1, which costs half of the digits.
    atol = 4e-9 if case["head"] == "flatten" else 1e-13
    assert torch.allclose(found.ntk, tensor(case["ntk"]), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (global_average_pool(), [0.170219109173, 0.168650020615, 0.173567239130]),
        (flatten(), [0.703398707123, 0.322673949920, 0.712724544767]),
    ],
    ids=["pool", "flatten"],
)
def test_numbers_of_neural_tangents(head, expected):
    """3×3, W_std √2, b_std 0.1, ReLU, then Dense(1, 0); version 0.6.5, 12 digits."""
    images = torch.cos(0.37 * torch.arange(96, dtype=torch.float64))
    images = images.reshape(2, 4, 4, 3).permute(0, 3, 1, 2)
    network = sequential(convolution(ROOT2, 0.1), activate("relu"), head, dense(1.0))
    ntk = infinite_width_kernels(network, images).ntk
    upper = ntk[tuple(torch.triu_indices(2, 2))]
    # The arccos of numbers near 1 costs neural-tangents digits on the diagonal.
    assert torch.allclose(upper, tensor(expected), rtol=0, atol=3e-9)
    assert upper[1].item() == pytest.approx(expected[1], abs=1e-12)


# Limits in which a convolution is something else.


@pytest.mark.parametrize("head", ["flatten", "pool"])
def test_an_image_of_one_pixel_is_a_vector(head):
    x = torch.randn(5, 7, dtype=torch.float64)
    arguments = {"depth": 2, "activation": "tanh", "sigma_w": 1.4, "sigma_b": 0.3}
    expected = fully_connected(x, **arguments)
    found = convolutional(x[:, :, None, None], kernel_size=1, head=head, **arguments)
    assert torch.allclose(found.nngp, expected.nngp, rtol=1e-13)
    assert torch.allclose(found.ntk, expected.ntk, rtol=1e-13)


def test_circular_pooled_kernels_ignore_shifts():
    images = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    shifted = images.roll((2, 1), (2, 3))
    arguments = {"depth": 2, "activation": "relu", "sigma_w": 1.4, "sigma_b": 0.1}
    arguments |= {"head": "pool", "padding_mode": "circular"}
    whole = convolutional(images, **arguments)
    moved = convolutional(shifted, images, **arguments)
    assert torch.allclose(whole.ntk, moved.ntk, rtol=1e-12)
    padded = {**arguments, "padding_mode": "zeros"}
    assert not torch.allclose(
        convolutional(images, **padded).ntk,
        convolutional(shifted, images, **padded).ntk,
        rtol=1e-3,
    )


def test_layers_after_pooling_know_the_variances():
    """Pooling and 1×1 layers on top: a network of vectors goes on."""
    network = sequential(
        convolution(ROOT2, 0.1),
        activate("relu"),
        global_average_pool(),
        dense(ROOT2, 0.1),
        activate("erf"),
        dense(1.0),
    )
    below = sequential(
        convolution(ROOT2, 0.1),
        activate("relu"),
        global_average_pool(),
        dense(ROOT2, 0.1),
    )
    k = infinite_width_kernels(below, IMAGES)
    q1, q2, q12 = k.nngp[0, 0], k.nngp[1, 1], k.nngp[0, 1]
    angle = 2 * q12 / ((1 + 2 * q1) * (1 + 2 * q2)).sqrt()
    nngp = (2 / math.pi) * torch.asin(angle)
    slope = (4 / math.pi) / ((1 + 2 * q1) * (1 + 2 * q2) - 4 * q12**2).sqrt()
    for found in (
        infinite_width_kernels(network, IMAGES),
        infinite_width_kernels(network, IMAGES, IMAGES),
    ):
        assert found.nngp[0, 1].item() == pytest.approx(nngp.item(), rel=1e-13)
        ntk = nngp + slope * k.ntk[0, 1]
        assert found.ntk[0, 1].item() == pytest.approx(ntk.item(), rel=1e-13)
    cross = infinite_width_kernels(network, IMAGES[:1], IMAGES[1:])
    assert cross.ntk.item() == pytest.approx(ntk.item(), rel=1e-13)


def test_standard_parametrization_counts_channels_times_taps():
    scale = {"sigma_w": 1.3, "sigma_b": 0.4}
    rates = {"weight_rate": 1.3**2 / 27, "bias_rate": 0.4**2}
    first = convolution(**scale, learning=Learning("standard", 27, **rates))
    rates["weight_rate"] = 1.3**2 / 160
    last = dense(**scale, learning=Learning("standard", 160, **rates))
    network = sequential(first, activate("relu"), flatten(), last)
    expected = convolutional(IMAGES, depth=1, activation="relu", **scale)
    found = infinite_width_kernels(network, IMAGES)
    assert torch.allclose(found.ntk, expected.ntk, rtol=1e-13)


# The engine, at finite width.


def test_residual_convolutions_with_stride_approach_the_infinite_kernel():
    """Standard parametrization, with the width in the theory as well."""
    width, seeds = 128, 12

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
            self.conv = nn.Conv2d(
                width, width, 3, padding=1, padding_mode="circular", bias=False
            )
            self.readout = nn.Linear(4 * width, 1)
            for p in (self.stem, self.conv, self.readout):
                p.weight.data.normal_(0, ROOT2 / p.weight[0].numel() ** 0.5)
                if p.bias is not None:
                    p.bias.data.normal_(0, 0.3)

        def forward(self, x):
            h = self.stem(x)
            return self.readout((h + self.conv(torch.relu(h))).flatten(1))

    def learning(fan_in):
        return Learning("standard", fan_in)

    block = sequential(
        activate("relu"),
        convolution(ROOT2, padding_mode="circular", learning=learning(9 * width)),
    )
    network = sequential(
        convolution(ROOT2, 0.3, stride=2, learning=learning(27)),
        residual(block),
        flatten(),
        dense(ROOT2, 0.3, learning=learning(4 * width)),
    )
    theory = infinite_width_kernels(network, IMAGES, pixels="same").ntk
    found = [
        empirical_ntk(Net().double(), IMAGES, outputs="trace") for _ in range(seeds)
    ]
    # One network is off by about 1.5/√128 = 0.13; the mean of twelve by 0.04.
    assert relative_error(sum(found) / seeds, theory) < 0.08


# What is refused.


def test_bad_input():
    arguments = {"depth": 1, "activation": "relu", "sigma_w": 1.0, "sigma_b": 0.0}
    with pytest.raises(ValueError, match="have no pixels"):
        convolutional(torch.ones(2, 3), **arguments)
    wide = sequential(convolution(1.0, kernel_size=5, padding=0), flatten())
    with pytest.raises(ValueError, match="4 pixels with the padding, a kernel of 5"):
        infinite_width_kernels(wide, IMAGES)
    pooled = sequential(convolution(1.0), global_average_pool())
    with pytest.raises(ValueError, match='pass pixels="all"'):
        infinite_width_kernels(pooled, IMAGES, pixels="same")
    with pytest.raises(ValueError, match="ends with images"):
        infinite_width_kernels(convolution(1.0), IMAGES)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\), x2 of \(3, 4, 5\)"):
        convolutional(IMAGES, torch.ones(2, 3, 4, 5), **arguments)
    with pytest.raises(ValueError, match="x2 is complex or not finite"):
        convolutional(IMAGES, IMAGES * torch.nan, **arguments)
    with pytest.raises(ValueError, match="sigma_w is -1"):
        convolution(-1.0)
    with pytest.raises(
        ValueError, match="stride is 0, expected a whole number of at least 1"
    ):
        convolution(1.0, stride=0)
    with pytest.raises(ValueError, match="depth is -2"):
        convolutional(IMAGES, **{**arguments, "depth": -2})
    with pytest.raises(ValueError, match="have no pixels"):
        infinite_width_kernels(sequential(flatten(), flatten()), IMAGES)


def test_unknown_choices():
    # Without the type checks of this test run, as a user calls it.
    arguments = {"depth": 1, "activation": "relu", "sigma_w": 1.0, "sigma_b": 0.0}
    with pytest.raises(ValueError, match="head is 'mean', expected one of flatten"):
        inspect.unwrap(convolutional)(IMAGES, **arguments, head="mean")
    with pytest.raises(ValueError, match="padding_mode is 'reflect'"):
        inspect.unwrap(convolution)(1.0, padding_mode="reflect")


def test_a_residual_branch_must_keep_the_pixels():
    branch = convolution(1.0, stride=2)
    network = sequential(convolution(1.0), residual(branch), flatten())
    with pytest.raises(ValueError, match="expected the same shape"):
        infinite_width_kernels(network, IMAGES)
