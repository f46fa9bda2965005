"""Fully connected and residual kernels against tables, exact facts and our engine."""

import inspect
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from oracles import relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.theory import (
    Learning,
    activate,
    dense,
    fully_connected,
    fully_connected_residual,
    infinite_width_kernels,
    residual,
    sequential,
)
from ntk_callbacks.theory.activations import ACTIVATIONS
from ntk_callbacks.theory.learning import Parametrization, check_choice

TABLES = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "nngp_and_ntk.json").read_text()
)
ROOT2 = math.sqrt(2)


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


X = tensor(TABLES["x"])
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


# Learning rates and the standard parametrization.


def test_learning_rate_tensor():
    """Roberts, Yaida and Hanin: Θ' = λ_b + λ_W E φφ + C_W E φ'φ' Θ with λ = 1.

    Three hidden layers, rates λ_W/n for the weights and λ_b for biases that start at
    0; numpy, 8 digits.
    """

    def layer(fan_in):
        learning = Learning("standard", fan_in, bias=True, weight_rate=1 / fan_in)
        return dense(ROOT2, learning=learning)

    hidden = [sequential(activate("relu"), layer(99)) for _ in range(3)]
    network = sequential(layer(4), *hidden)
    found = infinite_width_kernels(network, X[:2]).ntk
    expected = tensor([[5.0, 3.20762844], [3.20762844, 5.0]])
    assert torch.allclose(found, expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [108.5, 79.8441, 48.9131, 108.5, 139.8668, 560.0]),
        (2, [37.0278, 25.139, 22.9329, 37.0278, 43.9084, 186.9444]),
    ],
)
def test_default_initialization_of_torch(depth, expected):
    """nn.Linear: Var W = Var b = 1/(3 fan_in), width 512; numpy, 4 digits."""

    def layer(fan_in):
        learning = Learning("standard", fan_in)
        return dense(1 / math.sqrt(3), 1 / math.sqrt(3 * fan_in), learning=learning)

    hidden = [sequential(activate("relu"), layer(512)) for _ in range(depth)]
    network = sequential(layer(4), *hidden)
    found = infinite_width_kernels(network, 2 * X[:3]).ntk
    upper = found[tuple(torch.triu_indices(3, 3))]
    assert torch.allclose(upper, tensor(expected), rtol=0, atol=6e-5)


def test_standard_parametrization_is_weights_by_width_and_biases_by_one():
    """With rates σ_w²/n and σ_b² it is the kernel of the NTK parametrization."""

    def layer(fan_in, sigma_w=1.3, sigma_b=0.4):
        learning = Learning(
            "standard", fan_in, weight_rate=sigma_w**2 / fan_in, bias_rate=sigma_b**2
        )
        return dense(sigma_w, sigma_b, learning=learning)

    network = sequential(layer(4), activate("tanh"), layer(77), activate("tanh"))
    network = sequential(network, layer(77))
    expected = fully_connected(X, depth=2, activation="tanh", sigma_w=1.3, sigma_b=0.4)
    found = infinite_width_kernels(network, X)
    assert torch.allclose(found.ntk, expected.ntk, rtol=1e-13)
    assert torch.equal(found.nngp, expected.nngp)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_model_in_standard_parametrization(bias):
    """Θ = X Xᵀ, and 1 more with a bias, wherever the parameters are."""
    layer = nn.Linear(4, 1, bias=bias).double()
    for given in (bias, None) if not bias else (bias,):
        network = dense(0.7, learning=Learning("standard", 4, bias=given))
        found = infinite_width_kernels(network, X).ntk
        expected = empirical_ntk(layer, X, outputs="trace")
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


class StandardCommittee(nn.Module):
    """S networks 4 -> 5 -> 1 in standard parametrization, summed and divided by √S."""

    def __init__(self, seeds):
        super().__init__()
        shapes = {"w": (5, 4), "b": (1, 5), "v": (1, 5), "a": (1, 1)}
        scales = {"w": 1.3 / 4**0.5, "b": 0.4, "v": 1.3 / 5**0.5, "a": 0.4}
        for name, shape in shapes.items():
            draw = scales[name] * torch.randn(seeds, *shape, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(draw))

    def forward(self, x):
        h = torch.tanh(x @ self.w.mT + self.b)
        return (h @ self.v.mT + self.a).sum(0) / len(self.w) ** 0.5


def test_standard_parametrization_against_the_engine():
    """One hidden layer: the mean over networks is the formula at any width."""
    means = torch.stack(
        [empirical_ntk(StandardCommittee(200), X, outputs="trace") for _ in range(20)]
    )
    theory = fully_connected(
        X,
        depth=1,
        activation="tanh",
        sigma_w=1.3,
        sigma_b=0.4,
        parametrization="standard",
        width=5,
    ).ntk
    error = means.std(0) / len(means) ** 0.5
    assert error.norm() < 0.02 * theory.norm()  # so that the test can tell
    assert ((means.mean(0) - theory).abs() < 4 * error).all()


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
