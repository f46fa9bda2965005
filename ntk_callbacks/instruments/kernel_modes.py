"""The residual in the top modes of a kernel: how fast it decays, and should."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.dynamics.gauss_newton import curvature_factor
from ntk_callbacks.instruments.kernel_loss import LossTerms
from ntk_callbacks.layout import as_matrix, widened

MODES = 8
"""Top eigendirections that are reported."""


class ResidualModes:
    """Follows the residual r = ∂ℓ/∂f in the top modes of the kernel measured before.

    With H = B Bᵀ the curvature of the loss, gradient descent with rate η on s Σ ℓ moves
    r by −ηs HΘ r: components wᵀr along wᵀHΘ = μ wᵀ shrink by 1 − ηsμ in each step, as
    long as Θ and H stand still. For ½ (f − y)² these are the eigenvectors of Θ; else
    w = ΘBu/μ for those, u, of BᵀΘB.
    """

    def __init__(self) -> None:
        self._start: dict[str, Tensor] | None = None
        self._of: list[str] | None = None
        self._counted = 0

    def step(self, rate: float | None) -> None:
        """Note that an update with this learning rate is about to be made.

        Args:
            rate: η; None if it is not known.
        """
        if self._start is None:
            return
        eta = torch.nan if rate is None else rate
        left = self._start["left"] * (1 - eta * self._start["rates"])
        self._start = {**self._start, "left": left}
        self._counted += 1

    def measured(
        self,
        terms: LossTerms,
        ntk: Kernel,
        steps: int,
        rate: float | None,
        of: list[str] | None,
    ) -> dict[str, Tensor]:
        """Residuals and decays since the measurement before.

        Args:
            terms: The loss at the outputs now.
            ntk: Θ, with both output axes; its modes are those of the next time.
            steps: Updates since the measurement before.
            rate: η now; that of all of them, if `step` was not called. None if it is
                not known.
            of: The parameters of which Θ is the kernel, if they are just those that
                move; else None.

        Returns:
            For each mode k from 1, the largest eigenvalue: `residual/<k>`, |wᵀr|;
            `decay_measured/<k>`, wᵀr over what it was; `decay_predicted/<k>`, the
            product of 1 − ηsμ over the updates, if the learning rate is known and Θ is
            of what moves; NaN where the kernel before was of others (layers that thaw).
            At the first measurement the modes are those of its own kernel, the decays
            NaN.
        """
        now = _modes(terms, ntk)
        residual = terms.residual.reshape(-1).to(now["directions"])
        if self._start is None or self._start["directions"].shape != (
            now["directions"].shape
        ):
            along = now["directions"].mT @ residual
            decay = predicted = torch.full_like(along, torch.nan)
        else:
            old = {name: value.to(residual) for name, value in self._start.items()}
            along = old["directions"].mT @ residual
            decay = along / old["along"]
            predicted = old["left"]
            if not self._counted and rate is not None:
                predicted = (1 - rate * old["rates"]) ** steps
            if of != self._of:
                predicted = torch.full_like(decay, torch.nan)
        self._start = {**now, "along": now["directions"].mT @ residual}
        self._of, self._counted = of, 0
        found = {"residual": along.abs(), "decay_measured": decay}
        if rate is not None and of is not None:
            found["decay_predicted"] = predicted
        return {
            f"{what}/{k}": value
            for what, values in found.items()
            for k, value in enumerate(values, start=1)
        }

    def state_dict(self) -> dict[str, Any] | None:
        """Modes of the last kernel, the residual in them, and the decay predicted."""
        if self._start is None:
            return None
        return {**self._start, "counted": self._counted, "of": self._of}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state."""
        start = dict(state or {})
        self._counted, self._of = start.pop("counted", 0), start.pop("of", None)
        self._start = start or None


def _modes(terms: LossTerms, ntk: Kernel) -> dict[str, Tensor]:
    """The directions w, (m, k), the rates sμ, and what is left after no step: 1."""
    matrix = terms.weighted(ntk)
    k = min(MODES, len(matrix))
    if matrix.isfinite().all():
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0)[:k].clamp(min=0), vectors.flip(1)[:, :k]
    else:
        values = matrix.new_full((k,), torch.nan)
        vectors = matrix.new_full((len(matrix), k), torch.nan)
    directions = vectors
    if terms.kind != "mse":
        directions = _left_directions(terms, ntk, vectors) / values
        # Of a mode that does not move there is only round-off.
        still = values <= torch.finfo(ntk.dtype).eps * values[0]
        directions = directions.masked_fill(still, torch.nan)
    return {
        "directions": directions,
        "rates": terms.scale * values,
        "left": torch.ones_like(values),
    }


def _left_directions(
    terms: LossTerms, ntk: Kernel, vectors: Float[Tensor, "m k"]
) -> Float[Tensor, "m k"]:
    """ΘB of the eigenvectors."""
    theta = widened(as_matrix(terms.restricted(ntk)))
    outputs = terms.outputs.to(theta)
    factor = curvature_factor(outputs, loss=terms.kind)
    n, c = outputs.shape
    weighted = factor @ vectors.reshape(n, c, -1)
    return theta @ weighted.reshape(n * c, -1)
