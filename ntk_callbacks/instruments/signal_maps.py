"""What mean-field theory makes of the measured signals, one layer at a time.

The maps are those of wide layers of independent weights (Poole et al. 2016), taken at
the σ_w and σ_b that each layer has now. They are applied only between two layers of
which the second is given exactly φ of what the first returns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.engine.signals import LayerSignal, SignalStatistics, mean_correlation
from ntk_callbacks.theory.activations import ACTIVATIONS, Activation, elementwise
from ntk_callbacks.theory.expectations import moment, pair_moment
from ntk_callbacks.theory.mean_field import mean_field

_EXAMPLES = 8  # pairs of these: quadrature for every pair of a probe takes seconds


@dataclass(frozen=True)
class MeanFieldComparison:
    """Measured beside predicted, by depth; NaN where no map leads to a layer.

    Args:
        q: Predicted mean squared pre-activation of each layer from the one before.
        c: Predicted mean correlation.
        chi: Predicted χ between successive layers.
        q_error: Mean of |q/q̂ − 1| over the outputs of all layers, for the first
            examples of the probe.
        c_error: The same of |c − ĉ|.
        xi_q: Predicted layers in which q settles, in a deep network of one φ with the
            mean σ_w² and σ_b² of the layers between the first and the last; NaN where
            nothing decays exponentially or there is no such network.
        xi_c: The same of c.
    """

    q: Float[Tensor, " l"]
    c: Float[Tensor, " l"]
    chi: Float[Tensor, " steps"]
    q_error: float
    c_error: float
    xi_q: float
    xi_c: float


def compared(
    found: SignalStatistics, activation: Activation | None
) -> MeanFieldComparison | None:
    """Mean-field predictions for the measured layers.

    Args:
        found: What was measured.
        activation: φ; None to recognize it from what layers return and are given.

    Returns:
        None where no two successive layers have φ alone between them.
    """
    pairs = list(zip(found.layers[:-1], found.layers[1:], strict=True))
    phis = [_between(first, second, activation) for first, second in pairs]
    mapped = [
        (i, phi, *pair)
        for i, (phi, pair) in enumerate(zip(phis, pairs, strict=True))
        if phi is not None
    ]
    if not mapped:
        return None
    q = torch.full((len(found.layers),), torch.nan, dtype=torch.float64)
    c, chi = q.clone(), q[1:].clone()
    errors = []
    for i, phi, first, second in mapped:
        try:
            covariance, chi[i] = _mapped(phi, first, second)
        except ValueError:  # overflow, or an activation that grows too fast
            continue
        there = second.covariance[: len(covariance), : len(covariance)]
        q[i + 1], measured = covariance.diagonal().mean(), there.diagonal().mean()
        c[i + 1] = mean_correlation(covariance)
        off_q = float((measured / q[i + 1] - 1).abs())
        off_c = abs(mean_correlation(there) - float(c[i + 1]))
        errors.append((second.units, off_q, off_c))
    # The last layer is read out by few units and often initialized otherwise.
    inner = [row for row in mapped if row[0] + 2 < len(found.layers)]
    xi = _depth_scales([phi for _, phi, _, _ in inner], [row[3] for row in inner])
    return MeanFieldComparison(q, c, chi, _mean(errors, 1), _mean(errors, 2), *xi)


def unpredicted(found: SignalStatistics) -> MeanFieldComparison:
    """The comparison where no map leads to any layer: NaN throughout.

    Args:
        found: What was measured.

    Returns:
        As `compared`.
    """
    q = torch.full((len(found.layers),), torch.nan, dtype=torch.float64)
    return MeanFieldComparison(q, q.clone(), q[1:].clone(), *[torch.nan] * 4)


def _depth_scales(
    phis: list[Activation], layers: list[LayerSignal]
) -> tuple[float, float]:
    """ξ_q and ξ_c of an endless network of such layers."""
    if len(set(phis)) != 1:
        return torch.nan, torch.nan
    w2, b2, q = (
        sum(values) / len(layers)
        for values in (
            [layer.sigma_w**2 for layer in layers],
            [layer.sigma_b**2 for layer in layers],
            [float(layer.covariance.diagonal().mean()) for layer in layers],
        )
    )
    try:
        field = mean_field(phis[0], w2**0.5, b2**0.5, q0=q)
    except ValueError:  # no signal, or an activation that grows too fast
        return torch.nan, torch.nan
    xi_q, xi_c = float(field.xi_q), float(field.xi_c)
    return _finite(xi_q), _finite(xi_c)


def _finite(xi: float) -> float:
    """NaN, which charts leave out, in place of the infinity that would stretch them."""
    return xi if xi < torch.inf else torch.nan


def _mean(errors: list[tuple[float, float, float]], column: int) -> float:
    """Weighted by the outputs of a layer: the scatter of a few would drown the rest."""
    total = sum(row[0] for row in errors)
    return sum(row[0] * row[column] for row in errors) / total if errors else torch.nan


def _between(
    first: LayerSignal, second: LayerSignal, activation: Activation | None
) -> Activation | None:
    """φ if it is all that happens between two layers, else None."""
    if first.sizes[1] != second.sizes[0] or second.sigma_w != second.sigma_w:
        return None
    known = list(ACTIVATIONS) if activation is None else [activation]
    for candidate in known:
        expected = _applied(elementwise(candidate), first.outputs)
        scale = float(expected.abs().max())
        if not 0 < scale < torch.inf:
            continue
        # Round-off; a BatchNorm that has not moved yet is off by 5e-6.
        if torch.allclose(second.inputs, expected, rtol=0.0, atol=2e-6 * scale):
            return candidate
    return None


def _applied(phi: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    with torch.no_grad():
        return phi(values.clone())


def _mapped(
    phi: Activation, first: LayerSignal, second: LayerSignal
) -> tuple[Float[Tensor, "m m"], Tensor]:
    """Covariances of the second layer, and χ, from the covariances of the first."""
    covariance = first.covariance[:_EXAMPLES, :_EXAMPLES]
    w2, b2 = second.sigma_w**2, second.sigma_b**2
    q = covariance.diagonal()
    i, j = torch.triu_indices(len(q), len(q), offset=1)
    mixed = torch.diag_embed(moment(phi, q))
    mixed[i, j] = mixed[j, i] = pair_moment(phi, q[i], q[j], covariance[i, j])
    return w2 * mixed + b2, w2 * moment(phi, q, derivative=1).mean()
