"""How one step of a wide recurrent network stretches its state.

A gate's pre-activation a = W h + U x + b is Gaussian: W has entries of variance σ_w²/n,
U of σ_x²/m, b of σ_b² around a mean; the inputs x are drawn anew at every step with
mean square R. As in the papers, weights count as drawn anew at every step too (untied):
a gate is independent of the state it acts on. What is returned belongs to the
stationary state, reached after many steps; (1/n) tr J Jᵀ of J = ∂h_t/∂h_{t−1} is 1
where gradients neither vanish nor explode.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.expectations import moment
from ntk_callbacks.theory.learning import check_not_negative
from ntk_callbacks.theory.mean_field import mean_field
from ntk_callbacks.theory.quadrature import gaussian_nodes
from ntk_callbacks.theory.roots import bracketed_root

_REACH = 8.0  # standard deviations


@dataclass(frozen=True, slots=True)
class Gate:
    """Scales of a pre-activation W h + U x + b.

    Args:
        sigma_w: σ_w ≥ 0 of the recurrent weights W.
        sigma_x: σ_x ≥ 0 of the input weights U.
        sigma_b: σ_b ≥ 0 of the bias.
        mean: Mean of the bias; large for a forget gate that starts open.

    Raises:
        ValueError: If a scale is negative or a number not finite.

    Example:
        >>> Gate(1.0, sigma_x=0.5).driven(input_square=2.0)
        0.5
    """

    sigma_w: float
    sigma_x: float = 0.0
    sigma_b: float = 0.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(
            sigma_w=self.sigma_w, sigma_x=self.sigma_x, sigma_b=self.sigma_b
        )
        if not math.isfinite(self.mean):
            raise ValueError(f"mean is {self.mean}, expected a finite number.")

    def driven(self, input_square: float) -> float:
        """Variance of U x + b."""
        return self.sigma_x**2 * input_square + self.sigma_b**2

    def variance(
        self, square: Float[Tensor, "..."], input_square: float
    ) -> Float[Tensor, "..."]:
        """Variance of the pre-activation for a state of the given mean square."""
        return self.sigma_w**2 * square + self.driven(input_square)


@dataclass(frozen=True, slots=True)
class RecurrentField:
    """The stationary state of a recurrent network.

    Args:
        square: Mean square of the state h.
        jacobian: (1/n) tr J Jᵀ of one step.
    """

    square: Float[Tensor, ""]
    jacobian: Float[Tensor, ""]


def vanilla_rnn(
    activation: Activation, gate: Gate, *, input_square: float = 1.0
) -> RecurrentField:
    """Recurrent network h' = φ(a): (1/n) tr J Jᵀ = σ_w² E φ'(a)².

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        gate: Scales of a; its mean must be 0.
        input_square: R ≥ 0, mean square of the inputs.

    Returns:
        `RecurrentField(square, jacobian)`, float64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> vanilla_rnn("tanh", Gate(1.5, sigma_b=0.05**0.5)).jacobian
        tensor(1.0923, dtype=torch.float64)

    References:
        Chen, Pennington and Schoenholz (2018), arXiv:1806.05394.
    """
    check_not_negative(input_square=input_square)
    _check_centered(gate)
    field = mean_field(activation, gate.sigma_w, math.sqrt(gate.driven(input_square)))
    if not field.q.isfinite():
        raise ValueError(
            f"the state of {activation!r} with {gate} diverges; expected a finite "
            "fixed point of the variance."
        )
    return RecurrentField(moment(activation, field.q), field.chi)


def minimal_rnn(update: Gate, *, input_square: float = 1.0) -> RecurrentField:
    """Minimal network h' = u h + (1 − u) x with u = sigmoid(a), elementwise.

    (1/n) tr J Jᵀ = E u² + σ_w² E (h − x)² E u'².

    Args:
        update: Scales of a.
        input_square: R ≥ 0, mean square of the (embedded, centered) inputs x.

    Returns:
        `RecurrentField(square, jacobian)`, float64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        An update gate that is always half open forgets by halves:

        >>> minimal_rnn(Gate(0.0)).jacobian
        tensor(0.2500, dtype=torch.float64)

    References:
        Chen, Pennington and Schoenholz (2018), arXiv:1806.05394.
    """
    check_not_negative(input_square=input_square)

    def following(square: Tensor) -> Tensor:
        u = Sigmoid.of(update, square, input_square)
        return u.square * square + u.complement * input_square

    square = stationary_square(following, input_square)
    u = Sigmoid.of(update, square, input_square)
    stretched = update.sigma_w**2 * (square + input_square) * u.slope
    return RecurrentField(square, u.square + stretched)


def gru(
    reset: Gate, update: Gate, candidate: Gate, *, input_square: float = 1.0
) -> RecurrentField:
    """Gated recurrent unit h' = (1 − z) n + z h with n = tanh(U x + b + r W h).

    The conventions of `torch.nn.GRUCell`, whose second bias of n is 0 here.
    (1/n) tr J Jᵀ = E z² + σ_z² E (h − n)² E z'²
                    + E (1 − z)² E n'² (σ_n² r² + σ_r² (W h)² r'²).

    Args:
        reset: Scales of r's pre-activation.
        update: Scales of z's.
        candidate: Scales of n's; its mean must be 0, its bias is outside r.
        input_square: R ≥ 0, mean square of the inputs.

    Returns:
        `RecurrentField(square, jacobian)`, float64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> gru(Gate(0.0), Gate(0.0), Gate(2.0)).jacobian
        tensor(0.5000, dtype=torch.float64)

    References:
        Gilboa, Chang, Chen, Yang, Schoenholz, Chi and Pennington (2019),
        arXiv:1901.08987.
    """
    check_not_negative(input_square=input_square)
    _check_centered(candidate)

    def inner(square: Tensor) -> tuple[Tensor, ...]:
        # E n², E n'² r² and E n'² (W h)² r'², over r and over n given r.
        a, weights = gate_nodes(reset, square, input_square)
        r = a.sigmoid()
        echo = (candidate.sigma_w**2 * square)[..., None]
        total = candidate.driven(input_square) + r**2 * echo
        s, density = saturating_nodes(total.sqrt())
        slope = (1 - s.tanh() ** 2) ** 2
        # (W h)² given the sum s: W h is a part of it.
        share = torch.where(total > 0, r * echo / total.clamp(min=1e-300), 0.0)
        given = (echo * (1 - r * share))[..., None] + (share[..., None] * s) ** 2
        parts = (s.tanh() ** 2, slope * (r**2)[..., None])
        turned = slope * given * ((r * (1 - r)) ** 2)[..., None]
        return tuple(
            (weights * (part * density).sum(-1)).sum(-1) for part in (*parts, turned)
        )

    def following(square: Tensor) -> Tensor:
        z = Sigmoid.of(update, square, input_square)
        return z.square * square + z.complement * inner(square)[0]

    square = stationary_square(following, 1.0)
    z = Sigmoid.of(update, square, input_square)
    candidate_square, through, turned = inner(square)
    return RecurrentField(
        square,
        z.square
        + update.sigma_w**2 * (square + candidate_square) * z.slope
        + z.complement * (candidate.sigma_w**2 * through + reset.sigma_w**2 * turned),
    )


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """E u², E (1 − u)² and E u'² of a gate u = sigmoid(a)."""

    square: Tensor
    complement: Tensor
    slope: Tensor

    @classmethod
    def of(cls, gate: Gate, square: Tensor, input_square: float) -> "Sigmoid":
        """For a state of the given mean squares."""
        a, weights = gate_nodes(gate, square, input_square)
        u = a.sigmoid()
        parts = (u**2, (1 - u) ** 2, (u * (1 - u)) ** 2)
        return cls(*((weights * part).sum(-1) for part in parts))


def saturating_nodes(
    deviation: Float[Tensor, "..."], mean: float = 0.0
) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m"]]:
    """Nodes and weights of a rule for a ~ N(mean, deviation²) in a sigmoid or a tanh.

    Panels end where these turn, too: in a wide gate they are steps, which a rule for
    the Gaussian alone would miss.

    Args:
        deviation: Standard deviations, 0 included.
        mean: Mean of a.

    Returns:
        Nodes a, and weights that sum to 1.
    """
    grid = torch.arange(-_REACH, _REACH + 1, 2.0, dtype=torch.float64)
    turns = 2.0 ** torch.arange(1.0, 6.0, dtype=torch.float64)
    turns = torch.cat([-turns.flip(0), turns.new_zeros(1), turns]) - mean
    cuts = (turns / deviation.clamp(min=1e-300)[..., None]).clamp(-_REACH, _REACH)
    breaks = torch.cat([grid.expand(*deviation.shape, -1), cuts], -1).sort(-1).values
    z, weights = gaussian_nodes(breaks, 12)
    return mean + deviation[..., None] * z, weights


def gate_nodes(
    gate: Gate, square: Float[Tensor, "..."], input_square: float
) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m"]]:
    """Nodes and weights of a rule for a gate's pre-activation."""
    return saturating_nodes(gate.variance(square, input_square).sqrt(), gate.mean)


def stationary_square(
    following: Callable[[Tensor], Tensor], largest: float
) -> Float[Tensor, ""]:
    """The mean square of the state that a large one falls to, step after step.

    Args:
        following: Mean square after a step, of that before; elementwise.
        largest: What it cannot exceed.

    Returns:
        The largest stable fixed point; 0 if there is none above 1e-8 of `largest`.
    """
    grid = largest * torch.logspace(-8, 0, 33, dtype=torch.float64)
    drift = following(grid) - grid
    kept = ((drift[:-1] > 0) & (drift[1:] <= 0)).nonzero()
    if not len(kept):
        return torch.zeros((), dtype=torch.float64)
    k = int(kept[-1])
    low, high = grid[k : k + 1], grid[k + 1 : k + 2]
    return bracketed_root(lambda q: following(q) - q, low, high, tolerance=1e-13)[0]


def _check_centered(gate: Gate) -> None:
    if gate.mean:
        raise ValueError(
            f"mean is {gate.mean}, expected 0: the state is to be symmetric about 0."
        )
