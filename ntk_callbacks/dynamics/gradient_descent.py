"""Training step by step, as a constant kernel predicts it."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import (
    FunctionSpace,
    Trajectory,
    float64,
    refuse_negative,
)
from ntk_callbacks.dynamics.losses import Loss, LossName, loss_named
from ntk_callbacks.dynamics.modes import spectrum
from ntk_callbacks.dynamics.stability import check_momentum

Steps: TypeAlias = int | Sequence[int] | Tensor
Batches: TypeAlias = Sequence[Sequence[int] | Tensor]


def gradient_descent(
    ntk: Float[Tensor, "..."],
    f0: Float[Tensor, "..."],
    y: Num[Tensor, "..."],
    *,
    learning_rate: float | Sequence[float] | Tensor,
    steps: Steps,
    momentum: float = 0.0,
    nesterov: bool = False,
    loss: LossName = "mse",
    batches: Batches | None = None,
    ntk_test: Float[Tensor, "..."] | None = None,
    f0_test: Float[Tensor, "..."] | None = None,
) -> Trajectory:
    """Outputs after some steps of `torch.optim.SGD` with a constant kernel.

    Exactly what a model linear in its parameters does. With g = ∇_f L at step k, b the
    momentum buffer in function space (zero before the first step)::

        b ← β b + g,    f ← f − η Θ b    (Nesterov: f ← f − η Θ (g + β b))

    and the same with Θ(test, train) on the test set. At one learning rate for all
    steps on ½ Σ (f − y)² it is computed in closed form, by powers of a 3×3 matrix for
    each eigendirection; otherwise step by step. Above `max_learning_rate` it diverges.

    For a loss that is s times the sum over the examples multiply the learning rate by
    s: 1/N for means over N examples (of the batch), 2/(N·c) for `MSELoss`.

    Args:
        ntk: Θ on the training set: `(n, n, c, c)`, `(n, n, c)`, a matrix `(n·c, n·c)`,
            or `(n, n)` for outputs that share one kernel.
        f0: Outputs before training, `(n, c)`, or flat.
        y: Targets of the shape of `f0`; for cross-entropy integer labels `(n,)` or
            probabilities `(n, c)`.
        learning_rate: η ≥ 0, or one for each step.
        steps: How many steps, or several such numbers (`range(101)`: all up to 100).
        momentum: β in [0, 1).
        nesterov: Nesterov's momentum instead of the heavy ball.
        loss: `"mse"`, ½ Σ (f − y)², or `"cross_entropy"`, −Σ log softmax(f)[y].
        batches: For each step the indices of the examples it sees; all by default. An
            index that occurs twice counts twice.
        ntk_test: Θ(test, train), one row for each output that is watched.
        f0_test: The watched outputs before training.

    Returns:
        Outputs in float64, of the shapes of `f0` and `f0_test`, with a leading axis if
        several numbers of steps were asked for.

    Raises:
        ValueError: If the kernel is not symmetric and positive semi-definite, shapes
            do not fit, something is not finite, a rate, momentum or number of steps is
            out of range, or there are fewer rates or batches than steps.

    Example:
        >>> ntk, y = torch.eye(2).double(), torch.tensor([1.0, -1.0]).double()
        >>> gradient_descent(ntk, y * 0, y, learning_rate=0.5, steps=[1, 2]).train
        tensor([[ 0.5000, -0.5000],
                [ 0.7500, -0.7500]], dtype=torch.float64)

    References:
        Lee et al. 2019, arXiv:1902.06720, section 2.2 and supplement (momentum).
    """
    who = "gradient_descent"
    check_momentum(momentum)
    space = FunctionSpace.of(who, ntk, f0, ntk_test, f0_test)
    part = loss_named(who, loss)
    targets = part.targets(who, space.outputs(space.f0), y)
    counts, scalar = _counts(steps)
    rates = _rates(learning_rate, max(counts, default=0))
    pair = (momentum, nesterov)
    if loss == "mse" and batches is None and rates.ndim == 0:
        train, test = _closed_form(space, targets, rates.item(), counts, pair)
    else:
        refuse_negative(who, space.ntk, space.precision)
        weights = _batch_weights(batches, len(targets), max(counts, default=0))
        train, test = _by_steps(space, targets, part, rates, counts, pair, weights)
    return space.trajectory(train, test, scalar)


def _closed_form(
    space: FunctionSpace,
    targets: Tensor,
    rate: float,
    counts: list[int],
    momentum: tuple[float, bool],
) -> tuple[Tensor, Tensor]:
    """Each mode by itself: residual r, buffer b and the sum S of all b so far."""
    modes = spectrum("gradient_descent", space.ntk, space.precision)
    beta, nesterov = momentum
    # The direction of a step is d = a r + e b in terms of the state before it.
    a, e = (1 + beta, beta**2) if nesterov else (1.0, beta)
    x = rate * modes.eigenvalues
    one = torch.ones_like(x)
    step = torch.stack(
        [
            torch.stack([1 - a * x, -e * x, 0 * one], -1),
            torch.stack([one, beta * one, 0 * one], -1),
            torch.stack([a * one, e * one, one], -1),
        ],
        1,
    )
    state = torch.stack([one, 0 * one, 0 * one], -1)[:, :, None]
    done, reached = 0, {}
    for count in sorted(set(counts)):
        state = torch.linalg.matrix_power(step, count - done) @ state
        done, reached[count] = count, state[:, 2, 0]
    if not counts:
        pushed = x.new_zeros(0, len(x))
    else:
        pushed = rate * torch.stack([reached[count] for count in counts])
    to_learn = modes.directions.mT @ (space.columns(targets) - space.f0)
    learned = pushed[:, :, None] * to_learn
    train = modes.directions @ (modes.eigenvalues[:, None] * learned)
    test = space.ntk_test @ modes.directions @ learned
    return space.f0 + train, space.f0_test + test


def _by_steps(
    space: FunctionSpace,
    targets: Tensor,
    loss: Loss,
    rates: Tensor,
    counts: list[int],
    momentum: tuple[float, bool],
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    beta, nesterov = momentum
    m, last = len(space.ntk), max(counts, default=0)
    kernel = torch.cat([space.ntk, space.ntk_test])
    f = torch.cat([space.f0, space.f0_test])
    buffer = torch.zeros_like(space.f0)
    wanted = set(counts)
    reached = {0: f}
    for index, rate in enumerate(rates.expand(last).tolist()):
        gradient = loss.gradient(space.outputs(f[:m]), targets)
        if weights is not None:
            seen = weights[index].to(gradient)
            gradient = gradient * seen.view(-1, *[1] * (gradient.ndim - 1))
        gradient = space.columns(gradient)
        buffer = beta * buffer + gradient
        direction = gradient + beta * buffer if nesterov else buffer
        f = f - rate * (kernel @ direction)
        if index + 1 in wanted:
            reached[index + 1] = f
    path = torch.stack([reached[count] for count in counts]) if counts else f[None][:0]
    return path[:, :m], path[:, m:]


def _counts(steps: Steps) -> tuple[list[int], bool]:
    counts = torch.as_tensor(
        steps if isinstance(steps, int | float | Tensor) else list(steps)
    )
    whole = not counts.is_floating_point() or not counts.numel()
    if counts.ndim > 1 or not whole or (counts < 0).any():
        raise ValueError(
            f"gradient_descent: steps={steps!r}; expected one whole number ≥ 0, or a "
            "list of them."
        )
    return counts.reshape(-1).tolist(), counts.ndim == 0


def _rates(learning_rate: float | Sequence[float] | Tensor, last: int) -> Tensor:
    rates = float64(learning_rate)
    if rates.ndim > 1 or not (rates.isfinite() & (rates >= 0)).all():
        raise ValueError(
            f"gradient_descent: learning_rate={learning_rate!r}; expected one finite "
            "number ≥ 0, or one for each step."
        )
    if rates.ndim and len(rates) < last:
        raise ValueError(
            f"gradient_descent: {len(rates)} learning rates for {last} steps; expected "
            "one for each step, or a single one."
        )
    return rates[:last] if rates.ndim else rates


def _batch_weights(batches: Batches | None, n: int, last: int) -> Tensor | None:
    """How often each step sees each example, (steps, n)."""
    if batches is None:
        return None
    if len(batches) < last:
        raise ValueError(
            f"gradient_descent: {len(batches)} batches for {last} steps; expected one "
            "for each step."
        )
    weights = torch.zeros(last, n, dtype=torch.float64)
    for row, batch in zip(weights, batches[:last], strict=True):
        indices = torch.as_tensor(batch).cpu()
        whole = not (indices.is_floating_point() or indices.dtype == torch.bool)
        inside = indices.numel() and indices.min() >= 0 and indices.max() < n
        if indices.ndim != 1 or not (whole and inside):
            raise ValueError(
                f"gradient_descent: the batch {batch!r}; expected the indices "
                f"0 … {n - 1} of at least one example."
            )
        row.index_add_(0, indices.long(), torch.ones(len(indices), dtype=row.dtype))
    return weights
