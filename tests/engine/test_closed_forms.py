"""Kernels known without autograd: linear models, a fixed net, infinite width."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from one_of_a_kind import quick
from oracles import jacobian_by_differences, relative_error
from torch import nn

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.dynamics import max_learning_rate
from ntk_callbacks.engine.spectral import kernel_eigenvalues

TABLES = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "infinite_width.json").read_text()
)
ACTIVATIONS = {
    "relu": torch.relu,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "linear": lambda x: x,
    "hardtanh": nn.functional.hardtanh,
}


# Linear models.


@pytest.mark.parametrize("bias", [False, True])
def test_linear_model(bias):
    """f = Wx + b: Θ = (X Xᵀ + 1) ⊗ I, without a bias Θ = X Xᵀ ⊗ I."""
    x1 = torch.randn(5, 3, dtype=torch.float64)
    x2 = torch.randn(4, 3, dtype=torch.float64)
    ntk = empirical_ntk(nn.Linear(3, 2, bias).double(), x1, x2)
    expected = torch.kron(x1 @ x2.mT + bias, torch.eye(2, dtype=torch.float64))
    # One product of length 3.
    assert torch.allclose(as_matrix(ntk), expected, rtol=0, atol=1e-14)


def test_two_linear_layers():
    """f = V W x: Θ = X Xᵀ ⊗ V Vᵀ + X Wᵀ W Xᵀ ⊗ I."""
    x = torch.randn(5, 3, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 4, False), nn.Linear(4, 2, False)).double()
    w, v = net[0].weight.detach(), net[1].weight.detach()
    identity = torch.eye(2, dtype=torch.float64)
    expected = torch.kron(x @ x.mT, v @ v.mT)
    expected += torch.kron(x @ w.mT @ w @ x.mT, identity)
    assert torch.allclose(
        as_matrix(empirical_ntk(net, x)), expected, rtol=0, atol=1e-13
    )


def test_scalar_factor():
    """f = a·x: Θ = X Xᵀ for a parameter without axes."""

    class Factor(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x):
            return self.a * x

    x = torch.randn(5, 1, dtype=torch.float64)
    expected = x @ x.mT
    assert torch.allclose(as_matrix(empirical_ntk(Factor(), x)), expected, atol=1e-14)


def test_embedding_counts_shared_tokens():
    """f = Σ_t E[x_t]: Θ[i, j] is the number of pairs of equal tokens."""
    net = nn.EmbeddingBag(6, 2, mode="sum").double()
    x = torch.randint(0, 6, (4, 3))
    shared = (x[:, None, :, None] == x[None, :, None, :]).sum((2, 3)).double()
    assert torch.equal(empirical_ntk(net, x, outputs="trace"), shared)


# A finite net with known numbers.


@pytest.fixture
def fixed_net():
    """tanh(X W₁ᵀ) W₂ᵀ with weights that anyone can write down."""
    net = nn.Sequential(nn.Linear(3, 4, False), nn.Tanh(), nn.Linear(4, 2, False))
    net = net.double()
    net[0].weight.data = torch.cos(torch.arange(12.0).double()).view(4, 3)
    net[2].weight.data = torch.sin(0.7 * torch.arange(8.0).double()).view(2, 4)
    root = 2.0**0.5
    x = [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [-1, 0, 0], [0.5, -0.5, 0.5 * root]]
    return net, torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("route", ["auto", "vmap", "rows"])
def test_numbers_of_neural_tangents(fixed_net, route):
    """Numbers of neural-tangents 0.6.5 on jax 0.4.25 in float64, all digits."""
    net, x = fixed_net
    ntk = empirical_ntk(net, x, route=route)
    block = torch.tensor(
        [
            [2.604710277136877, -0.164942269062156],
            [-0.164942269062156, 2.590765466304683],
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(ntk[0, 1], block, rtol=0, atol=1e-13)
    total = ntk.diagonal(dim1=0, dim2=1).diagonal().sum().item()
    assert total == pytest.approx(24.162406425349126, abs=1e-12)
    traced = empirical_ntk(net, x, outputs="trace", route=route)  # (1/c) Σ, as there
    assert traced[0, 1].item() == pytest.approx(2.59773787172078, abs=1e-13)
    largest = kernel_eigenvalues(as_matrix(ntk))[0].item()
    assert largest == pytest.approx(9.413550200544615, abs=1e-12)
    # Its loss is ½ mean over N = 5 examples and c = 2 outputs: N·c times our limit.
    rate = max_learning_rate(ntk).item() * 10
    assert rate == pytest.approx(2.124596945246099, abs=1e-12)


def test_finite_differences(fixed_net):
    net, x = fixed_net
    expected = sum(
        torch.einsum("ikp,jlp->ijkl", jacobian, jacobian)
        for jacobian in (jacobian_by_differences(net, x, f"{k}.weight") for k in (0, 2))
    )
    # Central differences with step 1e-6: ε/step = 2e-10.
    assert relative_error(empirical_ntk(net, x), expected) < 1e-8


# Infinite width. One output f = Σ_s f_s/√S of S networks with their own weights has the
# kernel (1/S) Σ_s Θ_s: the mean over S initializations in one measurement.


class Committee(nn.Module):
    """S fully connected networks in NTK parametrization, summed and divided by √S."""

    def __init__(self, case, width, seeds=1):
        super().__init__()
        self.case, self.seeds = case, seeds
        sizes = [4, *[width] * case["depth"], 1]
        self.weights = nn.ParameterList(
            torch.randn(seeds, fan_out, fan_in, dtype=torch.float64)
            for fan_in, fan_out in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.randn(seeds, 1, fan_out, dtype=torch.float64) for fan_out in sizes[1:]
        )

    def forward(self, x):
        phi = ACTIVATIONS[self.case["activation"]]
        h = x.expand(self.seeds, *x.shape)
        for index, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            a = phi(h) if index else h
            h = self.case["sigma_w"] / w.shape[2] ** 0.5 * a @ w.mT
            h = h + self.case["sigma_b"] * b
        return h.sum(0) / self.seeds**0.5


def tabled(case):
    return torch.tensor(case["ntk"], dtype=torch.float64)


def inputs(name):
    return torch.tensor(TABLES["fully_connected"][name], dtype=torch.float64)


def case_id(case):
    width = f"sw{case['sigma_w']:.2f}_sb{case['sigma_b']}"
    return f"{case['activation']}_{width}_depth{case['depth']}"


FULLY_CONNECTED = TABLES["fully_connected"]["cases"]


@pytest.mark.parametrize(
    "case",
    quick(
        [c for c in FULLY_CONNECTED if c["depth"] == 1],
        "relu_sw1.41_sb0.1_depth1",
        "erf_sw1.50_sb0.3_depth1",
        ids=case_id,
    ),
)
def test_one_hidden_layer_has_the_infinite_kernel_on_average_at_any_width(case):
    # E Θ_n = Θ_∞ exactly for one hidden layer, so four neurons will do: 20 means over
    # 1000 networks each, and every entry within 4 standard errors.
    means = torch.stack(
        [
            empirical_ntk(Committee(case, 4, 1000), inputs("x"), outputs="trace")
            for _ in range(20)
        ]
    )
    error = means.std(0) / len(means) ** 0.5
    gap = means.mean(0) - tabled(case)
    assert error.norm() < 0.02 * tabled(case).norm()  # so that the test can tell
    assert (gap.abs() < 4 * error).all()


@pytest.mark.parametrize(
    "case", [c for c in FULLY_CONNECTED if c["depth"] == 3], ids=case_id
)
def test_wide_networks_approach_the_infinite_kernel(case):
    mean = empirical_ntk(Committee(case, 256, 40), inputs("x"), outputs="trace")
    # One network is off by at most 2.9/√n (seen: 1.8 to 2.9), the mean of 40 by √40
    # less; the bias of the width is near 1.2/n. Here 0.029 + 0.005; twice for luck.
    assert relative_error(mean, tabled(case)) < 0.07


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [c for c in FULLY_CONNECTED if c["depth"] == 3 and c["sigma_b"]],
    ids=case_id,
)
def test_very_wide_networks_are_closer(case):
    width, seeds = 1024, 12
    mean = sum(
        empirical_ntk(Committee(case, width), inputs("x"), outputs="trace")
        for _ in range(seeds)
    ).div(seeds)
    assert relative_error(mean, tabled(case)) < 0.04  # half of that at a fourth


class ConvolutionalNet(nn.Module):
    """3×3 convolutions in NTK parametrization; a readout of all pixels or the mean."""

    def __init__(self, case, width):
        super().__init__()
        self.head = case["head"]
        self.table = TABLES["convolutional"]
        sizes = [3, *[width] * case["depth"]]
        self.kernels = nn.ParameterList(
            torch.randn(fan_out, fan_in, 3, 3, dtype=torch.float64)
            for fan_in, fan_out in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.randn(width, 1, 1, dtype=torch.float64) for _ in self.kernels
        )
        features = width if self.head == "gap" else 16 * width
        self.readout = nn.Parameter(torch.randn(features, dtype=torch.float64))
        self.offset = nn.Parameter(torch.randn((), dtype=torch.float64))

    def forward(self, x):
        sigma_w, sigma_b = self.table["sigma_w"], self.table["sigma_b"]
        for w, b in zip(self.kernels, self.biases, strict=True):
            fan_in = w[0].numel()
            h = nn.functional.conv2d(x, w * (sigma_w / fan_in**0.5), padding=1)
            x = torch.relu(h + sigma_b * b)
        x = x.mean((2, 3)) if self.head == "gap" else x.flatten(1)
        return sigma_w / x.shape[1] ** 0.5 * x @ self.readout + sigma_b * self.offset


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case['head']}_depth{case['depth']}",
            marks=[pytest.mark.slow] * (case["depth"] > 1 or case["head"] == "flatten"),
        )
        for case in TABLES["convolutional"]["cases"]
    ],
)
def test_convolutional_networks_approach_the_infinite_kernel(case):
    images = TABLES["convolutional"]["images_nchw"]
    images = torch.tensor(images, dtype=torch.float64)
    width, seeds = 128, 20
    mean = sum(
        empirical_ntk(ConvolutionalNet(case, width), images, outputs="trace")
        for _ in range(seeds)
    ).div(seeds)
    # Seen with 256 channels and 20 seeds: within 0.04; √2 more at half the width.
    assert relative_error(mean, tabled(case)) < 0.057
