"""Predicted changes of a probe beside the real ones: the numbers of a prediction."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from ntk_callbacks.instruments.probe_loss import IGNORED, ProbeLoss, loss_value


@dataclass(frozen=True, slots=True)
class OutputChanges:
    """Every output of the probe before an update, and how it changed, in float64.

    Attributes:
        step: The update, counted from 1.
        outputs: f before it, `(n, c)`.
        actual: Δf as it came.
        optimizer: J Δθ for the step that the optimizer was to take.
        gradient_flow: −η J ∂L/∂θ = −η Θ(probe, batch) ∇_f L.
    """

    step: int
    outputs: Float[Tensor, "n c"]
    actual: Float[Tensor, "n c"]
    optimizer: Float[Tensor, "n c"]
    gradient_flow: Float[Tensor, "n c"]


def output_scores(changes: OutputChanges) -> dict[str, Tensor]:
    """How well the step of the optimizer, linearized, foretold the outputs.

    Args:
        changes: Of one update.

    Returns:
        `output_cosine`, ⟨Δf, JΔθ⟩/(‖Δf‖ ‖JΔθ‖) over all outputs of all examples, NaN if
        one is zero; `output_error`, ‖Δf − JΔθ‖/‖Δf‖.
    """
    actual, predicted = changes.actual.flatten(), changes.optimizer.flatten()
    lengths = actual.norm() * predicted.norm()
    return {
        "output_cosine": (actual @ predicted / lengths).clamp(-1.0, 1.0),
        "output_error": (actual - predicted).norm() / actual.norm(),
    }


def loss_scores(
    loss_fn: ProbeLoss, before: Tensor, after: Tensor, y: Tensor, changes: OutputChanges
) -> dict[str, Tensor]:
    """Real and predicted changes of the loss of the probe.

    Args:
        loss_fn: Of outputs and targets.
        before: Outputs before the update, in the shape of the model.
        after: Outputs after it.
        y: Targets.
        changes: Of this update.

    Returns:
        `loss_change_actual`, ΔL = L(f + Δf) − L(f); to first order ∇_f L · JΔθ
        `loss_change_optimizer` and −η ∇_f Lᵀ Θ ∇_f L `loss_change_gradient_flow`;
        `loss_change_linearized`, L(f + JΔθ) − L(f); and
        `explained`, 1 − |ΔL − ∇_f L · JΔθ| / |ΔL|.
    """
    with torch.enable_grad():
        f = before.detach().requires_grad_()
        start = loss_value(loss_fn, f, y)
        (gradient,) = torch.autograd.grad(start, f)
    slope, start = gradient.reshape_as(changes.outputs), start.detach()
    linear = before + changes.optimizer.view_as(before)
    with torch.no_grad():
        actual = loss_value(loss_fn, after, y) - start
        linearized = loss_value(loss_fn, linear, y) - start
    by_optimizer = (slope * changes.optimizer).sum()
    return {
        "loss_change_actual": actual,
        "loss_change_optimizer": by_optimizer,
        "loss_change_gradient_flow": (slope * changes.gradient_flow).sum(),
        "loss_change_linearized": linearized,
        "explained": 1 - (actual - by_optimizer).abs() / actual.abs(),
    }


def class_scores(labels: Tensor, changes: OutputChanges) -> dict[str, Tensor]:
    """What each class adds to the changes of the mean cross-entropy.

    Args:
        labels: Integer labels `(n,)` of the probe.
        changes: Of one update.

    Returns:
        `loss_change_actual/<label>`, `loss_change_optimizer/<label>` and
        `loss_change_gradient_flow/<label>` for the labels of the probe; over the labels
        they add up to the numbers of `loss_scores`.
    """
    known = labels != IGNORED
    y = labels[known].long()
    f = changes.outputs[known]
    actual, by_optimizer, by_flow = (
        change[known]
        for change in (changes.actual, changes.optimizer, changes.gradient_flow)
    )
    slope = f.softmax(1)
    slope[torch.arange(len(y), device=y.device), y] -= 1
    terms = {
        "actual": cross_entropy(f + actual, y, reduction="none")
        - cross_entropy(f, y, reduction="none"),
        "optimizer": (slope * by_optimizer).sum(1),
        "gradient_flow": (slope * by_flow).sum(1),
    }
    return {
        f"loss_change_{part}/{label}": values[y == label].sum() / len(y)
        for part, values in terms.items()
        for label in sorted(set(y.tolist()))
    }
