"""Fully connected and residual kernels against tables, exact facts and our engine."""

from itertools import pairwise

import pytest
import torch
from infinite_width import ROOT2, TABLES, X, tensor
from oracles import relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.theory import (
    activate,
    dense,
    fully_connected,
    fully_connected_residual,
    infinite_width_kernels,
    residual,
    sequential,
)

POINTS = tensor(
    [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [-1, 0, 0], [0.5, -0.5, 0.5 * ROOT2]]
)


def case_id(case):
    scales = f"sw{case['sigma_w']:.2f}_sb{case['sigma_b']}"
    return f"{case['activation']}_{scales}_depth{case['depth']}"


def kernels(case, x1, x2=None):
    names = ("depth", "activation", "sigma_w", "sigma_b")
    return fully_connected(x1, x2, **{name: case[name] for name in names})


# Tables.


@pytest.mark.parametrize("case", TABLES["fully_connected"], ids=case_id)
def test_table(case):
    found = kernels(case, X)
    # Twelve digits after the point are given.
    assert torch.allclose(found.nngp, tensor(case["nngp"]), rtol=0, atol=6e-13)
    assert torch.allclose(found.ntk, tensor(case["ntk"]), rtol=0, atol=2e-12)


@pytest.mark.parametrize("case", TABLES["neural_tangents"], ids=case_id)
def test_table_of_neural_tangents(case):
    found = kernels(case, X)
    assert torch.allclose(found.nngp, tensor(case["nngp"]), rtol=1e-13, atol=1e-14)
    assert torch.allclose(found.ntk, tensor(case["ntk"]), rtol=1e-13, atol=1e-13)


# numpy quadrature; x = (1,0,0,0), x' = (.6,.8,0,0): K(x,x), K(x,x'), Θ(x,x), Θ(x,x').
DEPTHS = """
relu 1.4142 0.0 2 0.50000000 0.36671689 1.50000000 0.77220815
relu 1.4142 0.0 5 0.50000000 0.41660831 3.00000000 1.34979669
relu 1.4142 0.1 2 0.53000000 0.39585955 1.56000000 0.82463722
relu 1.4142 0.1 5 0.56000000 0.47468235 3.21000000 1.51548464
erf 1.5000 0.3 2 1.11425173 0.73756666 3.64343647 2.06059925
erf 1.5000 0.3 5 1.21458359 0.76186997 10.67586972 4.03637924
tanh 1.5000 0.3 2 0.88979767 0.61291011 2.70527974 1.64223994
tanh 1.5000 0.3 5 0.95508523 0.67436157 6.41697761 3.27425409
gelu 1.5000 0.1 2 0.44694959 0.28368175 1.41095555 0.74004321
gelu 1.5000 0.1 5 0.26291770 0.17565480 1.74163166 0.79020337
linear 1.0000 0.0 2 0.25000000 0.15000000 0.75000000 0.45000000
linear 1.0000 0.0 5 0.25000000 0.15000000 1.50000000 0.90000000
hard_tanh 1.5000 0.3 2 1.27403454 0.82380125 4.59810296 2.35492128
hard_tanh 1.5000 0.3 5 1.39040375 0.79865225 17.86019419 4.41842695
"""


@pytest.mark.parametrize("row", DEPTHS.split("\n")[1:-1])
def test_table_by_depth(row):
    name, sigma_w, sigma_b, depth, *numbers = row.split()
    sigma_w = ROOT2 if sigma_w == "1.4142" else float(sigma_w)
    found = fully_connected(
        X[:2],
        depth=int(depth),
        activation=name,
        sigma_w=sigma_w,
        sigma_b=float(sigma_b),
    )
    values = torch.stack([found.nngp[0], found.ntk[0]]).flatten()
    assert torch.allclose(values, tensor([*map(float, numbers)]), rtol=0, atol=6e-9)


def test_numbers_of_neural_tangents_with_a_readout_of_its_own():
    """neural-tangents 0.6.5 on jax 0.4.25 in float64, twelve digits."""
    network = sequential(dense(ROOT2), activate("relu"), dense(1.0))
    found = infinite_width_kernels(network, POINTS)
    nngp = [0.333333333333, 0.225849189256, 0.106103295395, 0, 0.202999260348]
    ntk = [0.666666666667, 0.366815742195, 0.106103295395, 0, 0.314110371459]
    spectrum = [
        *(0.137572224590, 0.506491099342, 0.604237990716),
        *(0.723721220343, 1.361310798343),
    ]
    assert torch.allclose(found.nngp[0], tensor(nngp), rtol=0, atol=1e-12)
    assert torch.allclose(found.ntk[0], tensor(ntk), rtol=0, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(found.ntk)
    assert torch.allclose(eigenvalues, tensor(spectrum), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "nngp", "ntk"),
    [
        (
            {"depth": 3, "activation": "relu", "sigma_w": ROOT2, "sigma_b": 0.1},
            None,
            "2.766666666667 1.385409006646 0.774668791423 "
            "0.491778164740 1.239427206555",
        ),
        (
            {"depth": 2, "activation": "erf", "sigma_w": 1.5, "sigma_b": 0.05},
            "1.014701462019 0.550223542876 0.007884334293 "
            "-0.993739938419 0.453007073941",
            "3.659715988972 1.727297723412 0.016141261100 "
            "-3.583536899886 1.397354047481",
        ),
        (
            {"depth": 1, "activation": "gelu", "sigma_w": 1.5, "sigma_b": 0.1},
            None,
            "1.455869336478 0.808595178782 0.138846511882 "
            "-0.258541095125 0.674187917110",
        ),
        (
            {"depth": 2, "activation": "linear", "sigma_w": 1.0, "sigma_b": 0.0},
            None,
            "1 0.6 0 -1 0.5",
        ),
    ],
    ids=lambda value: value["activation"] if isinstance(value, dict) else "",
)
def test_numbers_of_neural_tangents(arguments, nngp, ntk):
    """neural-tangents 0.6.5 on jax 0.4.25 in float64, twelve digits."""
    found = fully_connected(POINTS, **arguments)
    for kernel, row in ((found.nngp, nngp), (found.ntk, ntk)):
        if row:
            expected = tensor([float(number) for number in row.split()])
            assert torch.allclose(kernel[0], expected, rtol=0, atol=1e-12)


def test_residual_numbers_of_neural_tangents():
    """Dense(1, 0) -> x + Dense(√2, 0.1)(relu x) -> Dense(1, 0); version 0.6.5."""
    block = residual(sequential(activate("relu"), dense(ROOT2, 0.1)))
    network = sequential(dense(1.0), block, dense(1.0))
    found = infinite_width_kernels(network, POINTS)
    nngp = [0.676666666667, 0.435849189255, 0.116103295395]
    nngp += [-0.323333333333, 0.379665927015]
    ntk = [1.686666666667, 1.012664931451, 0.232206590789]
    ntk += [-0.646666666667, 0.870442965140]
    assert torch.allclose(found.nngp[0], tensor(nngp), rtol=0, atol=1e-11)
    assert torch.allclose(found.ntk[0], tensor(ntk), rtol=0, atol=1e-11)


def test_spectra_of_neural_tangents():
    """The same, and a linear network's kernel Θ = 3 X Xᵀ/3 of rank 3."""
    scales = {"sigma_w": ROOT2, "sigma_b": 0.1}
    deep = fully_connected(POINTS, depth=3, activation="relu", **scales).ntk
    expected = [1.059512844816, 1.856670510969, 2.096874531493]
    expected += [2.506151254923, 6.314124191132]
    found = torch.linalg.eigvalsh(deep)
    assert torch.allclose(found, tensor(expected), rtol=0, atol=2e-12)
    arguments = {"depth": 2, "activation": "linear", "sigma_w": 1.0, "sigma_b": 0.0}
    linear = fully_connected(POINTS, **arguments).ntk
    assert torch.allclose(linear, POINTS @ POINTS.mT, rtol=0, atol=1e-14)
    assert torch.linalg.matrix_rank(linear) == 3


# Exact facts.


@pytest.mark.parametrize(("activation", "sigma_w"), [("relu", ROOT2), ("linear", 1.0)])
@pytest.mark.parametrize("depth", [0, 1, 2, 4, 30])
def test_homogeneous_networks_on_the_diagonal(activation, sigma_w, depth):
    """Θ(x, x) = (L + 1) σ_w² |x|²/d, and E φ² halves what ReLU's σ_w² doubles."""
    found = fully_connected(
        X, depth=depth, activation=activation, sigma_w=sigma_w, sigma_b=0.0
    )
    expected = sigma_w**2 * X.square().mean(1)
    assert torch.allclose(found.nngp.diagonal(), expected, rtol=1e-13)
    assert torch.allclose(found.ntk.diagonal(), (depth + 1) * expected, rtol=1e-13)


def test_residual_networks_grow_by_a_known_factor():
    """ReLU: (1 + σ_v² σ_w²/2) a block, for the variance."""
    found = fully_connected_residual(
        X,
        depth=5,
        activation="relu",
        sigma_w=1.2,
        sigma_b=0.0,
        branch_sigma_w=0.9,
    )
    start = 1.2**2 * X.square().mean(1)
    expected = start * (1 + 0.9**2 * 1.2**2 / 2) ** 5
    assert torch.allclose(found.nngp.diagonal(), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(10, 6.776798), pytest.param(100, 84.449479, marks=pytest.mark.slow)],
)
def test_residual_variance_of_tanh_by_depth(depth, expected):
    """Variance after blocks with all scales 1: numpy quadrature, 7 digits."""
    x = torch.ones(1, 3, dtype=torch.float64)
    found = fully_connected_residual(
        x, depth=depth, activation="tanh", sigma_w=1.0, sigma_b=0.0
    )
    assert found.nngp.item() == pytest.approx(expected, abs=2e-6)


# The engine, at finite width.


class Committee(nn.Module):
    """S residual networks in NTK parametrization, summed and divided by √S."""

    def __init__(self, width, depth, seeds):
        super().__init__()
        self.seeds, self.depth = seeds, depth
        sizes = [4, width, *[width] * (2 * depth), 1]
        self.weights = nn.ParameterList(
            torch.randn(seeds, b, a, dtype=torch.float64) for a, b in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.randn(seeds, 1, b, dtype=torch.float64) for b in sizes[1:]
        )

    def layer(self, index, x, sigma_w, sigma_b):
        w, b = self.weights[index], self.biases[index]
        return sigma_w / w.shape[2] ** 0.5 * x @ w.mT + sigma_b * b

    def forward(self, x):
        h = self.layer(0, x.expand(self.seeds, *x.shape), 1.2, 0.3)
        for block in range(self.depth):
            inner = torch.tanh(self.layer(2 * block + 1, h, 1.2, 0.3))
            h = h + self.layer(2 * block + 2, inner, 0.8, 0.1)
        return self.layer(2 * self.depth + 1, h, 1.0, 0.0).sum(0) / self.seeds**0.5


def test_residual_networks_approach_the_infinite_kernel():
    theory = fully_connected_residual(
        X,
        depth=3,
        activation="tanh",
        sigma_w=1.2,
        sigma_b=0.3,
        branch_sigma_w=0.8,
        branch_sigma_b=0.1,
    )
    mean = empirical_ntk(Committee(128, 3, 30), X, outputs="trace")
    # One network is off by about 2/√128 = 0.18; the mean of 30 by 0.03.
    assert relative_error(mean, theory.ntk) < 0.06
