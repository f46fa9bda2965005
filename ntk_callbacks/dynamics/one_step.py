"""What one step does to outputs and loss, to first and second order."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import finite
from ntk_callbacks.dynamics.losses import LossName, loss_named
from ntk_callbacks.layout import as_matrix

Split: TypeAlias = Literal["example", "output"] | Tensor | None


def output_change(
    ntk: Float[Tensor, "..."],
    gradient: Float[Tensor, "..."],
    *,
    learning_rate: float = 1.0,
) -> Float[Tensor, "..."]:
    """First-order change of any outputs by one step of gradient descent, −η Θ ∇_f L.

    Θ is the kernel between what is watched (a probe, another head, a derivative of the
    network: anything `output_fn` can return) and the batch that is stepped on; ∇_f L
    is the gradient of its loss by its outputs (`loss_gradient`, divided by N for a
    mean). Exact for a model linear in its parameters. For other optimizers measure the
    preconditioned kernel, `scaling=optimizer_scaling(optimizer, model)`, with η = 1; or
    push `predicted_step` through the model with `TangentOperator.jvp`, which takes
    momentum, weight decay and clipping along.

    Args:
        ntk: Θ(watched, batch): `(n1, n, c, c)`, `(n1, n, c)`, a matrix `(rows, n·c)`,
            or `(rows, n)` for outputs that share one kernel.
        gradient: ∇_f L, `(n, c)` or flat.
        learning_rate: η ≥ 0.

    Returns:
        Change in float64: `(n1, c)` for a kernel with output axes, `(rows,)` for a
        matrix, `(rows, c)` for a shared one.

    Raises:
        ValueError: If the kernel does not act on the gradient, η is negative, or
            something is not finite.

    Example:
        >>> output_change(torch.eye(2), torch.tensor([1.0, -2.0]), learning_rate=0.5)
        tensor([-0.5000,  1.0000], dtype=torch.float64)
    """
    if not 0 <= learning_rate < torch.inf:
        raise ValueError(
            f"output_change: learning_rate={learning_rate}; expected a finite number "
            "≥ 0."
        )
    matrix = as_matrix(finite("output_change", "ntk", ntk))
    g = finite("output_change", "gradient", gradient).to(matrix.device)
    if g.numel() == matrix.shape[1]:
        change = -learning_rate * (matrix @ g.reshape(-1))
        return change.view(ntk.shape[0], ntk.shape[-1]) if ntk.ndim > 2 else change
    if ntk.ndim == 2 and g.ndim == 2 and len(g) == matrix.shape[1]:
        return -learning_rate * (matrix @ g)
    raise ValueError(
        f"output_change: a kernel of shape {tuple(ntk.shape)} and a gradient of shape "
        f"{tuple(gradient.shape)}; expected Θ(watched, batch) with {g.numel()} columns "
        "as a matrix, or one for each example."
    )


@dataclass(frozen=True, slots=True)
class LossChange:
    """Change of a summed loss in orders of the change of the outputs, in float64.

    Attributes:
        first: ∇_f L · Δf; with Δf = −ηΘ∇_f L this is −η ∇_f Lᵀ Θ ∇_f L.
        second: ½ Δfᵀ ∇²_f L Δf; with it the sum is exact for squared error.

    Example:
        >>> f, y = torch.zeros(1, 1), torch.ones(1, 1)
        >>> step = loss_change(f, y, torch.full((1, 1), 2.0))
        >>> step.first.item(), step.second.item(), step.total.item()
        (-2.0, 2.0, 0.0)
    """

    first: Float[Tensor, "..."]
    second: Float[Tensor, "..."]

    @property
    def total(self) -> Float[Tensor, "..."]:
        """Both orders together."""
        return self.first + self.second


def loss_change(
    f: Float[Tensor, "n c"],
    y: Num[Tensor, "..."],
    change: Float[Tensor, "_n _c"],
    *,
    loss: LossName = "mse",
    by: Split = None,
) -> LossChange:
    """How the loss changes when the outputs do: which examples and classes gain.

    To second order in Δf, which is all there is for ½ Σ (f − y)²; with the predicted
    change −ηΘr it gives −η rᵀΘr + η²/2 rᵀΘ²r. (`Eigenmodes.loss_change` splits that by
    eigendirection.)

    Args:
        f: Outputs before the step.
        y: Targets `(n, c)`; for cross-entropy integer labels `(n,)` or probabilities.
        change: Δf, predicted (`output_change`) or measured.
        loss: `"mse"`, ½ Σ (f − y)², or `"cross_entropy"`, summed over the examples.
        by: None for the whole sum; `"example"`; `"output"`, the c terms of the loss
            (their sum over the examples); or integer labels `(n,)`: a sum for each
            class.

    Returns:
        First- and second-order part: a number, or `(n,)`, `(c,)` or `(classes,)`
        numbers that add up to it.

    Raises:
        ValueError: If shapes do not fit, something is not finite, or `by` is none of
            these.

    Example:
        >>> f, y = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> loss_change(f, y, torch.tensor([[1.0, 0.0]])).total
        tensor(-0.5000, dtype=torch.float64)
    """
    who = "loss_change"
    part = loss_named(who, loss)
    outputs, delta = finite(who, "f", f), finite(who, "change", change)
    targets = part.targets(who, outputs, y)
    if delta.shape != outputs.shape:
        raise ValueError(
            f"{who}: the outputs have shape {tuple(f.shape)}, their change "
            f"{tuple(change.shape)}; expected the same shape."
        )
    delta = delta.to(outputs.device)
    first = part.gradient(outputs, targets) * delta
    second = part.curvature(outputs, delta) * delta / 2
    return LossChange(_split(first, by), _split(second, by))


def _split(terms: Tensor, by: Split) -> Tensor:
    if by is None:
        return terms.sum()
    if isinstance(by, Tensor):
        if by.shape != terms.shape[:1] or by.is_floating_point() or (by < 0).any():
            raise ValueError(
                f"loss_change: by is a tensor of shape {tuple(by.shape)} and "
                f"{by.dtype}; expected {len(terms)} integer labels ≥ 0."
            )
        labels = by.to(terms.device).long()
        classes = int(labels.max()) + 1 if len(labels) else 0
        return terms.new_zeros(classes).index_add_(0, labels, terms.sum(1))
    if by == "example":
        return terms.sum(1)
    if by == "output":
        return terms.sum(0)
    raise ValueError(
        f"loss_change: by={by!r}; expected None, 'example', 'output' or integer labels."
    )
