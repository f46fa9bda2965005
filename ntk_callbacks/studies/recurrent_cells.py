"""Recurrent cells whose gates have given scales; how a step stretches their state."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntk_callbacks import theory
from ntk_callbacks.theory import Gate


class MinimalCell(nn.RNNCellBase):
    """h' = u h + (1 − u) x with u = sigmoid(W h + U x + b), elementwise.

    Args:
        input_size: Entries of x, as many as the state has.
        hidden_size: Units.

    References:
        Chen 2017, arXiv:1711.06788.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, bias=True, num_chunks=1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next state (n, hidden_size)."""
        linear = nn.functional.linear
        a = linear(h, self.weight_hh, self.bias_hh)
        u = torch.sigmoid(a + linear(x, self.weight_ih, self.bias_ih))
        return u * h + (1 - u) * x


CELLS: dict[str, Callable[[int, int], nn.RNNCellBase]] = {
    "vanilla": nn.RNNCell,
    "minimal": MinimalCell,
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}


@torch.no_grad()
def draw_(cell: nn.RNNCellBase, gates: list[Gate]) -> None:
    """Gaussian weights of the scales of each gate, in the order of torch.

    Args:
        cell: One of `CELLS`, in place.
        gates: One, of a GRU three (r, z, n), of an LSTM four (i, f, g, o).
    """
    n, m = cell.weight_hh.shape[1], cell.weight_ih.shape[1]
    parts: list[Tensor] = [cell.weight_hh, cell.weight_ih, cell.bias_ih]
    for gate, w, u, b in zip(gates, *(torch.split(p, n) for p in parts), strict=True):
        w.normal_(0, gate.sigma_w / n**0.5)
        u.normal_(0, gate.sigma_x / m**0.5)
        b.normal_(gate.mean, gate.sigma_b)
    cell.bias_hh.zero_()


def stretch(kind: str, gates: list[Gate], input_square: float) -> float:
    """(1/n) tr J Jᵀ of a step of the state, by theory; of an LSTM of the pair (h, c).

    Args:
        kind: One of `CELLS`.
        gates: Their scales.
        input_square: Mean square of the inputs.

    Returns:
        1 where gradients neither vanish nor explode.
    """
    if kind == "vanilla":
        found = theory.vanilla_rnn("tanh", gates[0], input_square=input_square)
        return float(found.jacobian)
    if kind == "minimal":
        return float(theory.minimal_rnn(gates[0], input_square=input_square).jacobian)
    if kind == "gru":
        r, z, n = gates
        return float(theory.gru(r, z, n, input_square=input_square).jacobian)
    i, f, g, o = gates
    return float(theory.lstm(i, f, g, o, input_square=input_square).jacobian)


class _Step(nn.Module):
    """One step as a map of the state, (h, c) side by side."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.cell, nn.LSTMCell):
            return torch.cat(self.cell(x, tuple(state.chunk(2, 1))), 1)
        following: Tensor = self.cell(x, state)
        return following


def measured_stretch(
    kind: str,
    gates: list[Gate],
    *,
    width: int,
    examples: int,
    skip: int,
    steps: int,
    input_square: float,
    device: str,
) -> float:
    """(1/n) tr J Jᵀ = E ‖Jᵀ z‖²/n of a step, weights drawn anew at every step.

    Args:
        kind: One of `CELLS`.
        gates: Their scales.
        width: Units, and entries of the inputs.
        examples: Sequences of random inputs, each with its own z of random signs.
        skip: Steps before the state is stationary.
        steps: That are measured after these.
        input_square: Mean square of the inputs.
        device: Where to compute.

    Returns:
        Mean over steps and examples.
    """
    step = _Step(CELLS[kind](width, width)).to(device)
    size = width * (2 if kind == "lstm" else 1)
    state = torch.zeros(examples, size, device=device)
    found = []
    for number in range(skip + steps):
        draw_(step.cell, gates)
        x = input_square**0.5 * torch.randn(examples, width, device=device)
        before = state.detach().requires_grad_()
        state = step(before, x)
        if number >= skip:
            signs = torch.randint(2, state.shape, device=device) * 2.0 - 1
            (row,) = torch.autograd.grad(state, before, signs)
            found.append(row.double().square().mean())
    return float(torch.stack(found).mean())


class Remembering(nn.Module):
    """A cell that reads a sequence, and a readout of its last state.

    Args:
        kind: One of `CELLS`.
        gates: Scales of its gates.
        inputs: Entries of an input, embedded with mean square about 1.
        width: Units.
        classes: Outputs.
    """

    def __init__(
        self, kind: str, gates: list[Gate], inputs: int, width: int, classes: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(inputs, width, bias=False)
        nn.init.normal_(self.embedding.weight)
        self.cell = CELLS[kind](width, width)
        draw_(self.cell, gates)
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (n, T, inputs) to logits (n, classes)."""
        drive = self.embedding(x)
        h = drive.new_zeros(len(x), self.cell.hidden_size)
        if isinstance(self.cell, nn.LSTMCell):
            state = h, h
            for t in range(x.shape[1]):
                state = self.cell(drive[:, t], state)
            h = state[0]
        else:
            for t in range(x.shape[1]):
                h = self.cell(drive[:, t], h)
        logits: Tensor = self.readout(h)
        return logits
