"""What eigenpairs, trace and density from products alone have in common."""

import copy
import math

import pytest
import torch
from networks import mlp
from operators import kernel_and_operator, moments, operator_of, values
from oracles import relative_error
from tangents import Counting

from ntk_callbacks.engine.density import spectral_density
from ntk_callbacks.engine.matrix_free import top_eigenpairs, trace_estimate
from ntk_callbacks.engine.products import TangentOperator

ALL = [
    lambda operator, **options: top_eigenpairs(operator, 2, **options),
    lambda operator, **options: trace_estimate(operator, 4, **options),
    lambda operator, **options: spectral_density(operator, samples=2, **options),
]

NAMES = ["eigenpairs", "trace", "density"]


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
