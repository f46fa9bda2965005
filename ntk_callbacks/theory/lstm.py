"""How one step of a wide LSTM stretches its state, cell by cell of the pair (h, c).

c' = f c + i g and h' = o tanh(c'), as in `torch.nn.LSTMCell`. The cell is not Gaussian:
its stationary distribution is found on a grid, as the fixed point of the step itself.
Conventions are those of `ntk_callbacks.theory.recurrent`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.learning import check_not_negative
from ntk_callbacks.theory.recurrent import (
    Gate,
    Sigmoid,
    gate_nodes,
    stationary_square,
)

_POINTS = 401


@dataclass(frozen=True, slots=True)
class LSTMField:
    """The stationary state of an LSTM.

    Args:
        square: Mean square of h.
        cell_square: Mean square of c.
        blocks: (1/n) tr B Bᵀ of the four blocks of the step's Jacobian, (2, 2): rows
            for h', c', columns for h, c.
    """

    square: Float[Tensor, ""]
    cell_square: Float[Tensor, ""]
    blocks: Float[Tensor, "2 2"]

    @property
    def jacobian(self) -> Float[Tensor, ""]:
        """(1/2n) tr J Jᵀ of the step from (h, c) to (h', c')."""
        return self.blocks.sum() / 2


def lstm(
    input_gate: Gate,
    forget: Gate,
    candidate: Gate,
    output: Gate,
    *,
    input_square: float = 1.0,
) -> LSTMField:
    """The stationary state of an LSTM and how a step stretches it.

    With K = σ_f² c² f'² + σ_i² g² i'² + σ_g² i² g'², the blocks are

        ∂c'/∂c: E f²                             ∂c'/∂h: E K
        ∂h'/∂c: E o² E tanh'(c')² f²
        ∂h'/∂h: σ_o² E tanh(c')² E o'² + E o² E tanh'(c')² K

    Args:
        input_gate: Scales of i's pre-activation.
        forget: Scales of f's.
        candidate: Scales of g's, a hyperbolic tangent.
        output: Scales of o's.
        input_square: R ≥ 0, mean square of the inputs.

    Returns:
        `LSTMField(square, cell_square, blocks)`, float64, to about 1e-4.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> lstm(Gate(0.0), Gate(0.0), Gate(1.0), Gate(0.0)).blocks
        tensor([[0.0625, 0.0625],
                [0.2500, 0.2500]], dtype=torch.float64)

    References:
        Gilboa, Chang, Chen, Yang, Schoenholz, Chi and Pennington (2019),
        arXiv:1901.08987.
    """
    check_not_negative(input_square=input_square)
    gates = (input_gate, forget, candidate, output)

    def following(squares: Tensor) -> Tensor:
        found = [
            _Step.at(gates, square, input_square).hidden_square for square in squares
        ]
        return torch.stack(found)

    square = stationary_square(following, 1.0)
    step = _Step.at(gates, square, input_square)
    return LSTMField(square, step.cell_square, step.blocks())


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a stationary cell, given the mean square of h."""

    cell_square: Tensor
    cell: Tensor  # values of c, equally spaced, and their shares
    shares: Tensor
    added: Tensor  # values of i g with the same spacing
    added_shares: Tensor
    stretch: Tensor  # shares times σ_i² g² i'² + σ_g² i² g'²
    kept: Tensor  # values of f, their shares, and σ_f² f'²
    kept_shares: Tensor
    kept_stretch: Tensor
    o: Sigmoid
    by_output: float

    @classmethod
    def at(
        cls, gates: tuple[Gate, Gate, Gate, Gate], square: Tensor, input_square: float
    ) -> "_Step":
        rules = [_seen(*gate_nodes(gate, square, input_square)) for gate in gates[:3]]
        (i, i_shares), (f, f_shares), (g, g_shares) = rules
        by_input, by_forget, by_candidate, by_output = (g.sigma_w**2 for g in gates)
        i, f, g = i.sigmoid()[:, None], f.sigmoid(), g.tanh()
        shares = i_shares[:, None] * g_shares
        stretch = (
            by_input * (g * i * (1 - i)) ** 2 + by_candidate * (i * (1 - g**2)) ** 2
        )
        # The cell's mean square says how far the grid must reach.
        added_square = (shares * (i * g) ** 2).sum()
        cell_square = added_square / (1 - (f_shares * f**2).sum())
        largest = float((i * g).abs().max())
        reach = max(2 * largest + 12 * float(cell_square.sqrt()), 1e-6)
        cell = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
        spacing = 2 * reach / (_POINTS - 1)
        half = math.ceil(largest / spacing) + 2
        places = (i * g).flatten() / spacing + half
        added_shares, added_stretch = _binned(
            places, torch.stack([shares, shares * stretch]).flatten(1), 2 * half + 1
        )
        return cls(
            cell_square,
            cell,
            _stationary_shares(cell, f, f_shares, added_shares),
            spacing * torch.arange(-half, half + 1, dtype=torch.float64),
            added_shares,
            added_stretch,
            f,
            f_shares,
            by_forget * (f * (1 - f)) ** 2,
            Sigmoid.of(gates[3], square, input_square),
            by_output,
        )

    @property
    def hidden_square(self) -> Tensor:
        return self.o.square * (self.shares * self.cell.tanh() ** 2).sum()

    def blocks(self) -> Tensor:
        seen = self.shares.abs() > 1e-12
        cell, shares = self.cell[seen], self.shares[seen]
        # tanh'(c')² for each c f and each y, summed over y.
        slope = (
            1 - (cell[:, None, None] * self.kept[:, None] + self.added).tanh() ** 2
        ) ** 2
        flat, stretched = slope @ self.added_shares, slope @ self.stretch
        weights = shares[:, None] * self.kept_shares
        turned = cell[:, None] ** 2 * self.kept_stretch
        cell_by_cell = (self.kept_shares * self.kept**2).sum()
        cell_by_hidden = (weights * turned).sum() + self.stretch.sum()
        hidden_by_cell = (weights * flat * self.kept**2).sum()
        through = (weights * (turned * flat + stretched)).sum()
        squashed = (self.shares * self.cell.tanh() ** 2).sum()
        hidden_by_hidden = self.by_output * squashed * self.o.slope
        return torch.stack(
            [
                hidden_by_hidden + self.o.square * through,
                self.o.square * hidden_by_cell,
                cell_by_hidden,
                cell_by_cell,
            ]
        ).view(2, 2)


def _seen(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Without nodes that do not count: their number enters to the third power."""
    counts = weights > 1e-12
    return nodes[counts], weights[counts]


def _stationary_shares(
    grid: Tensor, forget: Tensor, forget_shares: Tensor, added_shares: Tensor
) -> Tensor:
    """Shares of the grid's values for c = f c + y in distribution."""
    count, half = len(grid), len(added_shares) // 2
    reach, spacing = grid[-1], grid[1] - grid[0]
    scaled = ((grid[:, None] * forget + reach) / spacing).flatten()
    rows = torch.arange(count).repeat_interleave(len(forget))
    index, split = _split(scaled, count)
    shares = forget_shares.repeat(count)[:, None] * split
    kept = torch.zeros(count * count, dtype=torch.float64)
    kept = kept.index_add(
        0, (rows[:, None] * count + index).flatten(), shares.flatten()
    )
    offset = torch.arange(count) - torch.arange(count)[:, None] + half
    inside = (offset >= 0) & (offset <= 2 * half)
    entering = torch.where(inside, added_shares[offset.clamp(0, 2 * half)], 0.0)
    step = kept.view(count, count) @ entering
    # π = π T, one of whose equations is implied by the others: Σ π = 1 instead.
    system = torch.eye(count, dtype=torch.float64) - step.mT
    system[count // 2] = 1.0
    right = torch.zeros(count, dtype=torch.float64)
    right[count // 2] = 1.0
    solution: Tensor = torch.linalg.solve(system, right)
    return solution


def _binned(places: Tensor, shares: Tensor, count: int) -> Tensor:
    """Shares at places, moved onto whole numbers from 0 to `count` − 1."""
    index, split = _split(places, count)
    total = torch.zeros(len(shares), count, dtype=torch.float64)
    return total.index_add(1, index.flatten(), (shares[..., None] * split).flatten(1))


def _split(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Four neighboring points for each place, and shares that keep three moments."""
    first = (places.floor().long() - 1).clamp(0, count - 4)
    t = (places - first)[:, None]
    points = torch.arange(4)
    shares = torch.ones(len(places), 4, dtype=torch.float64)
    for k in range(4):
        others = points != k
        shares[:, k] = ((t - points[others]) / (k - points[others])).prod(1)
    return first[:, None] + points, shares
