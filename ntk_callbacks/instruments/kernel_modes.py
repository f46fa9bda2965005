"""The residual in the top modes of a kernel: how fast it decays, and should."""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.dynamics.gauss_newton import curvature_factor
from ntk_callbacks.instruments.kernel_descent import Descent
from ntk_callbacks.instruments.kernel_loss import LossTerms
from ntk_callbacks.layout import as_matrix, widened

MODES = 8
"""Top eigendirections that are reported."""


class ResidualModes:
    """Follows the residual r = ∂ℓ/∂f in the top modes of the kernel measured before.

    With H = B Bᵀ the curvature of the loss, gradient descent with rate η on s Σ ℓ moves
    r by −ηs HΘ r: components wᵀr along wᵀHΘ = μ wᵀ shrink by 1 − ηsμ in each step, as
    long as Θ and H stand still. For ½ (f − y)² these are the eigenvectors of Θ; else
    w = ΘBu/μ for those, u, of BᵀΘB. Momentum adds to each wᵀr the velocity wᵀHJv of
    the optimizer's v; see `Descent`.
    """

    def __init__(self) -> None:
        self._start: dict[str, Tensor] | None = None
        self._of: list[str] | None = None
        self._counted = 0
        self._begins = self._told = False

    def step(self, rule: Descent | None, share: float = 1.0) -> None:
        """Note that an update by this rule is about to be made.

        Args:
            rule: None if it is not known.
            share: What part of the gradient it goes by; 0 if it is skipped.
        """
        if self._start is None:
            return
        self._counted += 1
        if not share:
            return
        rule = rule or Descent(torch.nan)
        moving = (self._start[name] for name in ("left", "velocity", "rates"))
        left, velocity = rule.after(*moving, share=share, begins=self._begins)
        self._start = {**self._start, "left": left, "velocity": velocity}
        self._begins = self._begins and not rule.momentum

    def measured(
        self,
        terms: LossTerms,
        ntk: Kernel,
        steps: int,
        rule: Descent | None,
        of: list[str] | None,
        moving: Float[Tensor, " m"] | None,
    ) -> dict[str, Tensor]:
        """Residuals and decays since the measurement before.

        Args:
            terms: The loss at the outputs now.
            ntk: Θ, with both output axes; its modes are those of the next time.
            steps: Updates since the measurement before.
            rule: What the next update goes by; all of them, if `step` was not called.
                None if it is not known.
            of: The parameters of which Θ is the kernel, if they are just those that
                move; else None.
            moving: HJv of the optimizer's momentum v, NaN if it is not known; None if
                there is no v yet.

        Returns:
            For each mode k from 1, the largest eigenvalue: `residual/<k>`, |wᵀr|;
            `decay_measured/<k>`, wᵀr over what it was; `decay_predicted/<k>`, the same
            by the rule of the updates, if that is known and Θ is of what moves; NaN
            where the kernel before was of others (layers that thaw), or HJv not known.
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
            if not self._counted and rule is not None:
                predicted, _ = rule.after(
                    *(old["left"], old["velocity"], old["rates"]),
                    begins=self._begins,
                    times=steps,
                )
            if of != self._of:
                predicted = torch.full_like(decay, torch.nan)
        start = now["directions"].mT @ residual
        velocity = torch.zeros_like(start)
        if moving is not None:
            velocity = now["directions"].mT @ moving.to(start) / start
        self._start = {**now, "along": start, "velocity": velocity}
        self._of, self._counted, self._begins = of, 0, moving is None
        found = {"residual": along.abs(), "decay_measured": decay}
        if rule is not None and of is not None:
            found["decay_predicted"] = predicted
        return {
            f"{what}/{k}": value
            for what, values in found.items()
            for k, value in enumerate(values, start=1)
        }

    def tell_unknown(self, error: Exception) -> None:
        """Say once that momentum cannot be taken into account.

        Args:
            error: Why J·v could not be had.
        """
        if not self._told:
            self._told = True
            warnings.warn(
                "NTKMonitor: decay_predicted is NaN, for want of what momentum does to "
                f"the outputs. {error}",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any] | None:
        """Modes of the last kernel, the residual in them, and the decay predicted."""
        if self._start is None:
            return None
        others = {"counted": self._counted, "of": self._of, "begins": self._begins}
        return {**self._start, **others}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state."""
        start = dict(state or {})
        self._counted, self._of = start.pop("counted", 0), start.pop("of", None)
        self._begins = start.pop("begins", False)
        if start and "velocity" not in start:  # of earlier versions
            start["velocity"] = torch.full_like(start["left"], torch.nan)
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
