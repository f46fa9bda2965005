"""Eigenpairs, trace and density from products alone, against dense answers."""

import copy
import math

import pytest
import torch
from cases import BY_ID
from networks import mlp
from one_of_a_kind import quick
from oracles import call, ntk_by_loop, relative_error
from tangents import Counting
from torch import nn

from ntk_callbacks import as_matrix
from ntk_callbacks.engine.density import spectral_density
from ntk_callbacks.engine.matrix_free import top_eigenpairs, trace_estimate
from ntk_callbacks.engine.products import TangentOperator

MODELS = [
    *("mlp", "cnn", "resnet", "resnet_train", "gru", "attention", "tied_weights"),
    *("embedding_padding", "weight_norm", "batch_norm_untracked", "frozen_layer"),
]


def kernel_and_operator(name):
    case = BY_ID[name]
    model, x = case.build()
    kernel = as_matrix(ntk_by_loop(model, x, output_fn=case.output_fn))
    output_fn = None if case.output_fn is call else case.output_fn
    return kernel, TangentOperator(model, x, output_fn=output_fn, mode=case.mode)


def operator_of(spectrum, c=1, dtype=torch.float64):
    """A linear model whose kernel has a known spectrum, each eigenvalue c times."""
    m = len(spectrum)
    rotation = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q
    x = rotation * spectrum.double().sqrt()
    return TangentOperator(nn.Linear(m, c, bias=False).to(dtype), x.to(dtype))


def power_law(m, exponent):
    return 100 * torch.arange(1, m + 1, dtype=torch.float64) ** -exponent


class Counted:
    """An operator that counts the products taken with it."""

    def __init__(self, operator):
        self.operator, self.columns = operator, 0
        whole = operator.ntk_vp

        def counted(u):
            self.columns += 1 if u.ndim == 1 else u.shape[1]
            return whole(u)

        operator.ntk_vp = counted


# Eigenpairs.


@pytest.mark.parametrize("name", MODELS)
def test_eigenpairs_are_those_of_the_kernel(name):
    kernel, operator = kernel_and_operator(name)
    expected = torch.linalg.eigvalsh(kernel).flip(0)
    for k in (1, 3, len(kernel)):
        found = top_eigenpairs(operator, k, tolerance=1e-9)
        assert found.converged
        # Round-off is relative to the largest one.
        assert (found.eigenvalues - expected[:k]).abs().max() < 1e-9 * expected[0]
        error = kernel @ found.eigenvectors - found.eigenvectors * found.eigenvalues
        assert error.norm(dim=0).max() < 2e-9 * expected[0]
        assert torch.allclose(found.residuals, error.norm(dim=0), atol=1e-12)
        gram = found.eigenvectors.mT @ found.eigenvectors
        assert torch.allclose(gram, torch.eye(k).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_spectra_from_fewer_products_than_columns(exponent, k, dtype):
    spectrum = power_law(200, exponent)
    operator = operator_of(spectrum, dtype=dtype)
    count = Counted(operator)
    found = top_eigenpairs(operator, k)
    assert found.converged
    # The tolerance bounds the residual; the error of λ is of second order in it. Below,
    # round-off of the largest eigenvalue.
    allowed = 1e-5 * spectrum[:k] + 8 * torch.finfo(dtype).eps * spectrum[0]
    assert ((found.eigenvalues - spectrum[:k]).abs() < allowed).all()
    assert found.eigenvalues.dtype == torch.float64
    assert found.eigenvectors.dtype == dtype
    assert count.columns <= 10 * k


@pytest.mark.parametrize("k", [1, 5, 12, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_copy_of_a_multiple_eigenvalue_is_missed(k, dtype):
    # Θ = X Xᵀ ⊗ I: every eigenvalue ten times. Iterations on one vector find some of
    # the copies and go on to smaller eigenvalues.
    spectrum = power_law(20, 1.0)
    found = top_eigenpairs(operator_of(spectrum, c=10, dtype=dtype), k)
    expected = spectrum.repeat_interleave(10)[:k]
    assert found.converged
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "spectrum",
    [[5.0] * 6, [3.0] + [0.0] * 5, [0.0] * 6],
    ids=["identity", "rank one", "zero"],
)
def test_degenerate_kernels(spectrum):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    found = top_eigenpairs(operator_of(spectrum), 4)
    assert found.converged
    assert torch.allclose(found.eigenvalues, spectrum[:4], rtol=0, atol=1e-12)
    gram = found.eigenvectors.mT @ found.eigenvectors
    assert torch.allclose(gram, torch.eye(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-4, 0.0])
@pytest.mark.parametrize(
    "spectrum",
    [[5.0, 4.0, 3.0, 2.0, 1.0] + [1e-3] * 35, [100 * 2.0**-i for i in range(40)]],
    ids=["cluster", "geometric"],
)
def test_vectors_stay_orthonormal_when_residuals_are_dependent(spectrum, tolerance):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    found = top_eigenpairs(operator_of(spectrum), 4, tolerance=tolerance)
    assert found.converged
    assert torch.allclose(found.eigenvalues, spectrum[:4], rtol=1e-7)
    gram = found.eigenvectors.mT @ found.eigenvectors
    assert torch.allclose(gram, torch.eye(4).double(), rtol=0, atol=1e-13)


def test_a_kernel_of_one_number():
    operator = TangentOperator(nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]]))
    found = top_eigenpairs(operator, 1)
    assert found.eigenvalues.item() == pytest.approx(25)
    assert found.eigenvectors.abs().item() == pytest.approx(1)
    assert found.converged


def test_too_few_products_are_said_not_to_converge():
    spectrum = power_law(200, 0.5)
    operator = operator_of(spectrum)
    count = Counted(operator)
    found = top_eigenpairs(operator, 4, max_products=10)
    assert count.columns == 10
    assert not found.converged
    assert found.residuals.max() > 1e-4 * spectrum[0]
    # The residual still bounds the distance to some eigenvalue.
    for value, residual in zip(found.eigenvalues, found.residuals, strict=True):
        assert (spectrum - value).abs().min() <= residual


def test_a_tighter_tolerance_gives_smaller_residuals():
    operator = operator_of(power_law(100, 0.5))
    loose = top_eigenpairs(operator, 3, tolerance=1e-2)
    tight = top_eigenpairs(operator, 3, tolerance=1e-8)
    assert tight.residuals.max() < 1e-8 * tight.eigenvalues[0]
    assert loose.residuals.max() > 1e-6 * loose.eigenvalues[0]


@pytest.mark.slow
def test_scaling_is_part_of_the_kernel():
    net, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    scaling = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    kernel = as_matrix(ntk_by_loop(net, x, scaling=scaling))
    operator = TangentOperator(net, x, scaling=scaling)
    top = top_eigenpairs(operator, 1, tolerance=1e-9).eigenvalues[0]
    assert relative_error(top, torch.linalg.eigvalsh(kernel)[-1]) < 1e-9
    assert trace_estimate(operator).value == pytest.approx(kernel.trace().item())
    density = spectral_density(operator, samples=64)
    spread = 2 * ((kernel**2).sum() - (kernel.diag() ** 2).sum())
    error = (spread / 64).sqrt().item() / 10
    assert abs(moments(density, [1])[0] - kernel.trace().item() / 10) < 4 * error
    assert error < 0.1 * kernel.trace().item() / 10


# Trace.


@pytest.mark.parametrize("name", [*MODELS, "checkpoint_reentrant"])
def test_the_exact_trace_is_that_of_the_kernel(name):
    kernel, operator = kernel_and_operator(name)
    found = trace_estimate(operator)
    assert found.value == pytest.approx(kernel.trace().item(), rel=1e-10)
    assert found.standard_error == 0


@pytest.mark.parametrize("name", [*MODELS, "checkpoint_reentrant"])
def test_the_estimated_trace_is_within_its_errors(name):
    kernel, operator = kernel_and_operator(name)
    samples = 200
    found = trace_estimate(operator, samples)
    off_diagonal = (kernel**2).sum() - (kernel.diag() ** 2).sum()
    error = (2 * off_diagonal / samples).sqrt().item()
    # A spread of 200 samples is itself known to 1/√400 = 5 %, some more for the tails
    # of few outputs.
    assert found.standard_error == pytest.approx(error, rel=0.3)
    assert abs(found.value - kernel.trace().item()) < 4 * found.standard_error


def test_the_estimated_trace_is_unbiased_and_its_errors_are_right():
    kernel, operator = kernel_and_operator("mlp")
    found = [trace_estimate(operator, 10, seed=seed) for seed in range(100)]
    values = torch.tensor([estimate.value for estimate in found])
    errors = torch.tensor([estimate.standard_error for estimate in found])
    trace = kernel.trace().item()
    assert abs(values.mean().item() - trace) < 4 * values.std().item() / 10
    assert errors.square().mean().sqrt().item() == pytest.approx(
        values.std().item(), rel=0.3
    )


def test_two_samples_tell_an_error():
    kernel, operator = kernel_and_operator("mlp")
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(2, (len(kernel), 2), generator=generator).double() * 2 - 1
    first, second = (z.mT @ kernel @ z).diag().tolist()
    found = trace_estimate(operator, 2, seed=3)
    assert found.value == pytest.approx((first + second) / 2)
    assert found.standard_error == pytest.approx(abs(first - second) / 2)


def test_errors_shrink_with_the_root_of_the_samples():
    _, operator = kernel_and_operator("resnet")
    few, many = (trace_estimate(operator, samples) for samples in (100, 1600))
    assert few.standard_error / many.standard_error == pytest.approx(4, rel=0.25)


def test_the_estimate_of_a_diagonal_kernel_is_exact():
    operator = TangentOperator(nn.Linear(3, 1, bias=False), torch.eye(3) * 2.0)
    found = trace_estimate(operator, 2)
    assert found.value == 12
    assert found.standard_error == 0


# Density.


def moments(density, orders):
    return [(density.weights * density.nodes**order).sum().item() for order in orders]


@pytest.mark.parametrize(
    "name", quick(["mlp", "resnet_train", "gru", "tied_weights"], "mlp")
)
def test_moments_are_those_of_the_eigenvalues(name):
    kernel, operator = kernel_and_operator(name)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    density = spectral_density(operator, samples=400 // len(kernel))
    assert density.weights.sum().item() == pytest.approx(1)
    # zᵀΘ^q z / m has the variance 2 (Σ_{i≠j} (Θ^q)ᵢⱼ²) / m² over random signs.
    for order, found in zip((1, 2, 3), moments(density, (1, 2, 3)), strict=True):
        power = torch.linalg.matrix_power(kernel, order)
        spread = 2 * ((power**2).sum() - (power.diag() ** 2).sum())
        error = (spread / (400 // len(kernel))).sqrt().item() / len(kernel)
        assert abs(found - (eigenvalues**order).mean().item()) < 4 * error + 1e-12


def test_moments_of_one_vector_are_exact():
    """Gauss quadrature with q nodes: 2q − 1 moments of the measure of that vector."""
    spectrum = power_law(50, 0.5)
    operator = operator_of(spectrum)
    identity = torch.eye(50, dtype=torch.float64)
    kernel = operator.ntk_vp(identity)
    density = spectral_density(operator, samples=1, steps=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    z = (torch.randint(2, (50,), generator=generator) * 2 - 1).double()
    for order, found in zip(range(10), moments(density, range(10)), strict=True):
        expected = (z @ torch.linalg.matrix_power(kernel, order) @ z).item() / 50
        assert found == pytest.approx(expected, rel=1e-9)
    next_one = (z @ torch.linalg.matrix_power(kernel, 10) @ z).item() / 50
    assert moments(density, [10])[0] != pytest.approx(next_one, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0.001, 0.01, 0.2, 1.0])
def test_the_density_integrates_to_one(dtype, width):
    operator = operator_of(power_law(60, 1.0), dtype=dtype)
    density = spectral_density(operator, width=width, samples=2)
    assert torch.trapezoid(density.density, density.grid).item() == pytest.approx(1)
    assert (density.density >= 0).all()
    assert density.grid.diff().min() > 0
    assert density.nodes.diff().min() >= 0
    # Smoothing keeps the mean and adds the variance of a Gaussian.
    first, second = (
        torch.trapezoid(density.density * density.grid**order, density.grid).item()
        for order in (1, 2)
    )
    mean, square = moments(density, [1, 2])
    added = (width * (density.nodes[-1] - density.nodes[0]).item()) ** 2
    assert first == pytest.approx(mean, rel=1e-3)
    assert second == pytest.approx(square + added, rel=1e-3)
    assert second - first**2 - (square - mean**2) == pytest.approx(added, rel=0.05)


def test_clusters_have_their_shares():
    spectrum = torch.tensor([10.0] * 5 + [4.0] * 15 + [1.0] * 30)
    density = spectral_density(operator_of(spectrum), samples=64, width=0.02)
    step = (density.grid[1] - density.grid[0]).item()
    for value, share in ((10, 0.1), (4, 0.3), (1, 0.6)):
        near = (density.grid - value).abs() < 1
        # The share of a cluster of r of m has the variance 2 r/m² at most, for each of
        # the 64 vectors: a standard error below 0.02.
        assert density.density[near].sum().item() * step == pytest.approx(
            share, abs=0.05
        )
        heavy = (density.nodes - value).abs() < 1e-6
        assert density.weights[heavy].sum().item() == pytest.approx(share, abs=0.05)
    between = (density.grid - 7).abs() < 1
    assert density.density[between].max() < 1e-6


@pytest.mark.slow
def test_a_semicircle_like_bulk_is_seen():
    """Marchenko–Pastur: the spectrum of X Xᵀ for random X is known in closed form."""
    n, d = 300, 600
    model = nn.Linear(d, 1, bias=False).double()
    x = torch.randn(n, d, dtype=torch.float64) / math.sqrt(d)
    density = spectral_density(
        TangentOperator(model, x), samples=10, steps=40, width=0.03
    )
    ratio = n / d
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    inside = (density.grid > low + 0.2) & (density.grid < high - 0.3)
    grid = density.grid[inside]
    root = ((high - grid) * (grid - low)).sqrt()
    expected = root / (2 * math.pi * ratio * grid)
    # Ten vectors and a finite matrix: a few per cent.
    assert relative_error(density.density[inside], expected) < 0.08


@pytest.mark.parametrize(
    ("spectrum", "mean"), [([3.0] * 4, 3), ([0.0] * 4, 0), ([2.0], 2)]
)
def test_densities_of_a_single_eigenvalue(spectrum, mean):
    density = spectral_density(operator_of(torch.tensor(spectrum)))
    assert torch.allclose(density.nodes, torch.full_like(density.nodes, mean))
    assert torch.trapezoid(density.density, density.grid).item() == pytest.approx(1)
    assert density.grid[density.density.argmax()].item() == pytest.approx(mean, abs=0.1)


# What they share.

ALL = [
    lambda operator, **options: top_eigenpairs(operator, 2, **options),
    lambda operator, **options: trace_estimate(operator, 4, **options),
    lambda operator, **options: spectral_density(operator, samples=2, **options),
]
NAMES = ["eigenpairs", "trace", "density"]


def values(result):
    fields = type(result).__dataclass_fields__
    return [torch.as_tensor(getattr(result, name)) for name in fields]


@pytest.mark.parametrize("measure", ALL, ids=NAMES)
def test_a_seed_decides(measure):
    _, operator = kernel_and_operator("mlp")
    first, again = values(measure(operator)), values(measure(operator))
    assert all(map(torch.equal, first, again))
    other = values(measure(operator, seed=1))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("measure", ALL, ids=NAMES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_measured_where_gradients_are_off(measure, context):
    _, operator = kernel_and_operator("mlp")
    expected = values(measure(operator))
    with context():
        found = values(measure(operator))
    for value, reference in zip(found, expected, strict=True):
        assert torch.equal(value, reference)
        assert not value.requires_grad


@pytest.mark.parametrize("measure", ALL, ids=NAMES)
def test_the_model_is_prepared_once_and_left_as_it_was(measure):
    model, x = Counting(*mlp()).double(), torch.randn(4, 5, dtype=torch.float64)
    model(x).sum().backward()
    operator = TangentOperator(model, x)
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    before, Counting.prepared = torch.get_rng_state(), 0
    measure(operator)
    assert Counting.prepared == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)
        assert p.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_model_gives_nan(value):
    model, x = mlp(), torch.randn(4, 5)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
        model[4].weight[0, 0] = value
    operator = TangentOperator(model, x)
    pairs = top_eigenpairs(operator, 2)
    assert not pairs.converged
    assert pairs.eigenvalues.isnan().all()
    assert pairs.eigenvectors.isnan().all()
    assert pairs.residuals.isnan().all()
    for estimate in (trace_estimate(operator), trace_estimate(operator, 4)):
        assert math.isnan(estimate.value)
    assert math.isnan(trace_estimate(operator, 4).standard_error)
    assert all(part.isnan().all() for part in values(spectral_density(operator)))


def test_single_precision_agrees_with_double():
    model, x = mlp(), torch.randn(6, 5)
    single = TangentOperator(model, x)
    double = TangentOperator(copy.deepcopy(model).double(), x)
    # Products carry a few ε = 1.2e-7 of the largest eigenvalue.
    pairs = [top_eigenpairs(operator, 3) for operator in (single, double)]
    assert relative_error(pairs[0].eigenvalues, pairs[1].eigenvalues) < 1e-5
    traces = [trace_estimate(operator).value for operator in (single, double)]
    assert traces[0] == pytest.approx(traces[1], rel=1e-5)
    means = [moments(spectral_density(op), [1, 2]) for op in (single, double)]
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_arguments_that_make_no_sense():
    operator = operator_of(torch.ones(6))
    for k in (0, -1, 7):
        with pytest.raises(
            ValueError, match=rf"k={k}; expected 1 to 6, .*6 examples ×"
        ):
            top_eigenpairs(operator, k)
    with pytest.raises(ValueError, match="max_products=3; expected at least k=4"):
        top_eigenpairs(operator, 4, max_products=3)
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"tolerance=.*; expected 0 or more"):
            top_eigenpairs(operator, 1, tolerance=tolerance)
    for samples in (0, 1, -3):
        with pytest.raises(ValueError, match=f"samples={samples}; expected at least 2"):
            trace_estimate(operator, samples)
    for wrong in (
        {"samples": 0},
        {"steps": 0},
        {"width": 0.0},
        {"width": 2.0},
        {"width": math.nan},
    ):
        with pytest.raises(ValueError, match=r"expected at least 1 sample and 1 step"):
            spectral_density(operator, **wrong)
