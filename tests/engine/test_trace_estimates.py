"""The trace of a kernel from products alone, exact and estimated."""

import pytest
import torch
from operators import MODELS, kernel_and_operator
from torch import nn

from ntk_callbacks.engine.matrix_free import trace_estimate
from ntk_callbacks.engine.products import TangentOperator


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
