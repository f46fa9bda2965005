"""Kernels, outputs and times that cannot be: an error that says what was expected."""

import inspect
import math

import pytest
import torch

from ntk_callbacks.dynamics import (
    contraction_factors,
    early_stopping_time,
    eigenmodes,
    gradient_descent,
    gradient_flow,
    kernel_regression,
    learning_steps,
    learning_times,
    loss_change,
    loss_gradient,
    max_learning_rate,
    output_change,
    parameter_distance,
)

Y = torch.tensor([1.0, -1.0])


def labels():
    return torch.tensor([0, 1])


# Each takes a kernel on two examples.
FUNCTIONS = {
    "gradient_flow": lambda ntk: gradient_flow(ntk, 0 * Y, Y, 1.0),
    "gradient_flow (cross-entropy)": lambda ntk: gradient_flow(
        ntk, torch.zeros(2, 2), labels(), 1.0, loss="cross_entropy"
    ),
    "gradient_descent": lambda ntk: gradient_descent(
        ntk, 0 * Y, Y, learning_rate=0.1, steps=3
    ),
    "gradient_descent (stepped)": lambda ntk: gradient_descent(
        ntk, 0 * Y, Y, learning_rate=[0.1] * 3, steps=3
    ),
    "kernel_regression": lambda ntk: kernel_regression(ntk, Y, torch.eye(2)),
    "kernel_regression (ridge)": lambda ntk: kernel_regression(
        ntk, Y, torch.eye(2), ridge=10.0
    ),
    "eigenmodes": eigenmodes,
    "learning_times": learning_times,
    "max_learning_rate": max_learning_rate,
    "contraction_factors": lambda ntk: contraction_factors(ntk, learning_rate=0.1),
    "learning_steps": lambda ntk: learning_steps(ntk, learning_rate=0.1),
    "parameter_distance": lambda ntk: parameter_distance(ntk, 0 * Y, Y),
    "early_stopping_time": lambda ntk: early_stopping_time(
        ntk, 0 * Y, Y, ntk_test=torch.eye(2), f0_test=0 * Y, y_test=Y
    ),
}
KERNELS = {
    "asymmetric": ([[1.0, 0.5], [0.0, 1.0]], "not symmetric"),
    "negative": ([[1.0, 2.0], [2.0, 1.0]], "eigenvalue -1 beside 3"),
    "nan": ([[1.0, math.nan], [math.nan, 1.0]], "not finite"),
    "infinite": ([[math.inf, 0.0], [0.0, 1.0]], "not finite"),
    "oblong": ([[1.0, 0.0]], "square matrix"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_kernel(name, kernel):
    values, message = KERNELS[kernel]
    with pytest.raises(ValueError, match=message) as raised:
        FUNCTIONS[name](torch.tensor(values))
    assert str(raised.value).startswith(name.split(" ")[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_round_off_is_forgiven(name):
    """A singular kernel in float32, slightly negative and slightly asymmetric."""
    ntk = torch.ones(2, 2)
    ntk[0, 1] += 3e-7
    FUNCTIONS[name](ntk)


# Without the type checks of this test run, as a user calls it.
BARE = {
    name: inspect.unwrap(function)
    for name, function in {
        "eigenmodes": eigenmodes,
        "learning_times": learning_times,
        "max_learning_rate": max_learning_rate,
    }.items()
}


@pytest.mark.parametrize("name", BARE)
def test_kernels_of_other_kinds_of_numbers(name):
    with pytest.raises(ValueError, match=f"{name}: ntk is of torch.complex64"):
        BARE[name](torch.eye(2) * 1j)
    with pytest.raises(
        ValueError, match=f"{name}: ntk is of torch.int64, expected real"
    ):
        BARE[name](torch.eye(2).long())


def test_outputs_and_targets_that_are_complex():
    flow, phased = inspect.unwrap(gradient_flow), Y * 1j
    with pytest.raises(ValueError, match="f0 is complex"):
        flow(torch.eye(2), phased, Y, 1.0)
    with pytest.raises(ValueError, match="y is complex"):
        flow(torch.eye(2), Y, phased, 1.0)
    with pytest.raises(ValueError, match="ntk_test is complex"):
        flow(torch.eye(2), Y, Y, 1.0, ntk_test=torch.eye(2) * 1j, f0_test=Y)


SHAPES = {
    "outputs": (lambda: gradient_flow(torch.eye(3), Y, Y, 1.0), r"\(3, 3\), the outp"),
    "targets": (
        lambda: gradient_flow(torch.eye(2), Y, torch.ones(3), 1.0),
        r"outputs have shape \(2,\), the targets \(3,\)",
    ),
    "labels for squared error": (
        lambda: gradient_flow(torch.eye(2), torch.zeros(2, 3), labels(), 1.0),
        "one_hot",
    ),
    "test kernel": (
        lambda: gradient_flow(
            torch.eye(2), Y, Y, 1.0, ntk_test=torch.ones(1, 3), f0_test=torch.ones(1)
        ),
        "2 columns",
    ),
    "test outputs": (
        lambda: gradient_flow(
            torch.eye(2), Y, Y, 1.0, ntk_test=torch.ones(1, 2), f0_test=torch.ones(2)
        ),
        "for each of its rows",
    ),
    "only one": (
        lambda: gradient_flow(torch.eye(2), Y, Y, 1.0, ntk_test=torch.ones(1, 2)),
        "belong together",
    ),
    "regression": (
        lambda: kernel_regression(torch.eye(2), Y, torch.eye(2), f0=Y),
        "belong together",
    ),
    "empty": (
        lambda: gradient_flow(torch.zeros(0, 0), Y[:0], Y[:0], 1.0),
        "at least one",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_fit(name):
    call, message = SHAPES[name]
    with pytest.raises(ValueError, match=message):
        call()


def flow(t, **options):
    return gradient_flow(torch.eye(2), 0 * Y, Y, t, **options)


def descent(**options):
    return gradient_descent(
        torch.eye(2), 0 * Y, Y, **{"learning_rate": 0.1, "steps": 3, **options}
    )


NUMBERS = {
    "negative time": (lambda: flow(-1.0), "times ≥ 0"),
    "no time": (lambda: flow([0.0, math.nan]), "times ≥ 0"),
    "a matrix of times": (lambda: flow(torch.ones(2, 2)), "list of times"),
    "no targets": (
        lambda: gradient_flow(torch.eye(2), 0 * Y, Y * math.nan, 1.0),
        "y has entries that are not finite",
    ),
    "no outputs": (
        lambda: gradient_flow(torch.eye(2), Y * math.nan, Y, 1.0),
        "f0 has entries",
    ),
    "logits at infinity": (
        lambda: gradient_flow(
            torch.eye(2), torch.zeros(2, 2), labels(), math.inf, loss="cross_entropy"
        ),
        "expected finite times",
    ),
    "no gradient": (lambda: loss_gradient(Y * math.nan, Y), "f has entries"),
    "no change": (
        lambda: loss_change(Y[:, None], Y[:, None], Y[:, None] * math.inf),
        "change has entries",
    ),
    "no kernel between": (
        lambda: output_change(torch.eye(2) * math.nan, Y),
        "ntk has entries",
    ),
    "no step": (lambda: output_change(torch.eye(2), Y * math.nan), "gradient has ent"),
    "negative time to move": (
        lambda: parameter_distance(torch.eye(2), Y, Y, -1.0),
        "times ≥ 0",
    ),
    "negative rate": (lambda: descent(learning_rate=-0.1), "number ≥ 0"),
    "no rate": (lambda: descent(learning_rate=math.nan), "number ≥ 0"),
    "too few rates": (lambda: descent(learning_rate=[0.1, 0.1]), "2 learning rates"),
    "negative steps": (lambda: descent(steps=-1), "whole number"),
    "broken steps": (lambda: descent(steps=torch.tensor(1.5)), "whole number"),
    "momentum": (lambda: descent(momentum=1.0), r"momentum must be in \[0, 1\)"),
    "too few batches": (lambda: descent(batches=[[0]]), "1 batches for 3 steps"),
    "foreign example": (lambda: descent(batches=[[2]] * 3), "the indices 0 … 1"),
    "empty batch": (lambda: descent(batches=[[]] * 3), "at least one example"),
    "a mask": (
        lambda: descent(batches=[torch.tensor([True, False])] * 3),
        "expected the indices",
    ),
    "negative ridge": (
        lambda: kernel_regression(torch.eye(2), Y, torch.eye(2), ridge=-1.0),
        "finite number ≥ 0",
    ),
    "fraction": (
        lambda: learning_steps(torch.eye(2), learning_rate=1.0, fraction=1.0),
        "in",
    ),
    "rate of contraction": (
        lambda: contraction_factors(torch.eye(2), learning_rate=-1.0),
        "expected ≥ 0",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range(name):
    call, message = NUMBERS[name]
    with pytest.raises(ValueError, match=message):
        call()
