"""A wide network while it trains, beside what its kernel at the start said of it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ntk_callbacks import dynamics, metrics
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.layout import as_matrix
from ntk_callbacks.studies.descent import half_square
from ntk_callbacks.studies.study import Result

_RATE = 0.2  # of the largest stable learning rate: no mode is gone after one step
_DRAWN = 60  # moments of a curve


def decay_rate(residual: Tensor, left: float = math.exp(-2)) -> float:
    """Rate at which a residual decays, by least squares of log |r| over the steps.

    Args:
        residual: At each step from the start, (steps + 1,), positive.
        left: Up to the first step at which no more than this share is left.

    Returns:
        Rate per step; NaN if there are not two steps.
    """
    below = (residual <= left * residual[0]).nonzero()
    end = int(below[0]) if len(below) else len(residual) - 1
    if end < 1:
        return math.nan
    logs = residual[: end + 1].log()
    steps = torch.arange(end + 1).to(logs)
    steps = steps - steps.mean()
    return -float((steps * logs).sum() / steps.square().sum())


def mode_decay(
    model: nn.Module, x: Tensor, y: Tensor, *, count: int, steps: int
) -> Result:
    """Train, and follow the residual in the modes of the kernel at the start.

    Args:
        model: Of one output; trained in place.
        x: Inputs (n, d).
        y: Targets (n, 1).
        count: How many of the modes, the largest eigenvalues first.
        steps: Of full-batch gradient descent.

    Returns:
        For each mode its `shares` of the norm of the residual at the start, rates per
        step `measured` and `predicted`, and `curves` of what is left at `moments`.
    """
    kernel = as_matrix(empirical_ntk(model, x))
    modes = dynamics.eigenmodes(kernel)
    rate = _RATE * float(dynamics.max_learning_rate(kernel))
    outputs, _ = _descent(model, x, y, x[:0], rate, steps)
    residuals = modes.components((outputs - y)[..., 0].mT).abs()  # mode, step
    shares = residuals[:, 0] / residuals[:, 0].norm()
    factors = dynamics.contraction_factors(kernel, learning_rate=rate)
    moments = _moments(steps)
    change = metrics.relative_change(as_matrix(empirical_ntk(model, x)), kernel)
    return {
        "eigenvalues": modes.eigenvalues[:count].tolist(),
        "shares": shares[:count].tolist(),
        "measured": [decay_rate(r) for r in residuals[:count]],
        "predicted": (-factors[:count].log()).tolist(),
        "moments": moments,
        "curves": (residuals[:count, moments] / residuals[:count, :1]).tolist(),
        "kernel_change": float(change),
    }


def early_stopping(
    model: nn.Module, x: Tensor, y: Tensor, seen: Tensor, y_seen: Tensor, *, steps: int
) -> Result:
    """Train on some examples, and follow the mean squared error on others.

    Args:
        model: Of one output; trained in place.
        x: Inputs (n, d).
        y: Targets (n, 1).
        seen: Inputs that are held out.
        y_seen: Their targets.
        steps: Of full-batch gradient descent.

    Returns:
        `best_step`, with the least error, and `predicted_step`; the `best_error`, the
        error that the network has at the predicted step (`error_there`) and at the
        last (`last_error`); errors at `moments`, measured and predicted.
    """
    kernel = as_matrix(empirical_ntk(model, x))
    cross = as_matrix(empirical_ntk(model, seen, x))
    rate = _RATE * float(dynamics.max_learning_rate(kernel))
    train, test = _descent(model, x, y, seen, rate, steps)
    start: dict[str, Any] = {"ntk_test": cross, "f0_test": test[0]}
    time = dynamics.early_stopping_time(kernel, train[0], y, y_test=y_seen, **start)
    moments = _moments(steps)
    predicted = dynamics.gradient_descent(
        kernel, train[0], y, learning_rate=rate, steps=moments, **start
    )
    assert predicted.test is not None
    errors = (test - y_seen).square().mean((1, 2))
    stop = float(time) / rate
    best = int(errors.argmin())
    change = metrics.relative_change(as_matrix(empirical_ntk(model, x)), kernel)
    found = {
        "train": train[moments] - y,
        "test": test[moments] - y_seen,
        "train_predicted": predicted.train - y,
        "test_predicted": predicted.test - y_seen,
    }
    return {
        "best_step": best,
        "predicted_step": stop,
        "best_error": float(errors[best]),
        "error_there": float(errors[min(steps, round(min(stop, steps)))]),
        "last_error": float(errors[-1]),
        "moments": moments,
        **{k: v.square().mean((1, 2)).tolist() for k, v in found.items()},
        "kernel_change": float(change),
    }


def _descent(
    model: nn.Module, x: Tensor, y: Tensor, seen: Tensor, rate: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Outputs on x and on seen before each step and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    train, test = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        outputs = model(x)
        train.append(outputs.detach())
        with torch.no_grad():
            test.append(model(seen))
        if step < steps:
            half_square(outputs, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return torch.stack(train), torch.stack(test)


def _moments(steps: int) -> list[int]:
    """Steps that are drawn, as many in each decade."""
    late = torch.logspace(0, math.log10(max(steps, 1)), _DRAWN).round().long().tolist()
    return sorted({0, *late})
