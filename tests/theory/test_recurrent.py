"""Recurrent networks: closed forms, and cells of torch with a thousand units."""

import math

import pytest
import torch
from torch import nn

from ntk_callbacks.theory import Gate, gru, lstm, mean_field, minimal_rnn, vanilla_rnn

N = 1000


def linear(gate, n=N):
    """Recurrent weights, input weights and bias with the scales of a gate."""
    w, u = torch.randn(2, n, n, dtype=torch.float64) / n**0.5
    b = gate.mean + gate.sigma_b * torch.randn(n, dtype=torch.float64)
    return gate.sigma_w * w, gate.sigma_x * u, b


def inputs(square, n=N):
    return square**0.5 * torch.randn(1, n, dtype=torch.float64)


def fill(cell, gates):
    """Scales of a torch cell, whose gates lie one below the other."""
    n = cell.hidden_size
    for k, gate in enumerate(gates):
        w, u, b = linear(gate, n)
        rows = slice(k * n, (k + 1) * n)
        cell.weight_hh.data[rows], cell.weight_ih.data[rows] = w, u
        cell.bias_ih.data[rows] = b
    cell.bias_hh.data.zero_()
    return cell


def block(function, state):
    """(1/n) tr B Bᵀ of ∂function/∂state, one row of a batch for each output."""
    n = state.shape[1]
    rows = state.detach().expand(n, -1).clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(function(rows).diagonal().sum(), rows)
    return jacobian.square().sum() / n


# Closed forms.


def test_vanilla_network_is_the_plain_one_with_a_driven_bias():
    gate = Gate(1.5, sigma_x=0.4, sigma_b=0.1)
    found = vanilla_rnn("tanh", gate, input_square=2.0)
    field = mean_field("tanh", 1.5, (0.16 * 2 + 0.01) ** 0.5)
    assert found.jacobian.item() == pytest.approx(field.chi.item(), rel=1e-12)
    assert (2.25 * found.square + 0.33).item() == pytest.approx(field.q.item())


@pytest.mark.parametrize("mean", [-1.0, 0.0, 2.0])
def test_gates_that_are_constant(mean):
    """u = sigmoid(mean): h is a moving average of the inputs."""
    u = 1 / (1 + math.exp(-mean))
    found = minimal_rnn(Gate(0.0, mean=mean), input_square=3.0)
    assert found.square.item() == pytest.approx(3 * (1 - u) ** 2 / (1 - u**2))
    assert found.jacobian.item() == pytest.approx(u**2)
    # A linear regime: tanh of small arguments.
    small = Gate(0.0, sigma_x=1e-3)
    found = gru(Gate(0.0), Gate(0.0, mean=mean), small)
    expected = 1e-6 * (1 - u) ** 2 / (1 - u**2)
    assert found.square.item() == pytest.approx(expected, rel=1e-5)
    assert found.jacobian.item() == pytest.approx(u**2)
    found = lstm(Gate(0.0), Gate(0.0, mean=mean), small, Gate(0.0))
    cell = 1e-6 / 4 / (1 - u**2)
    assert found.cell_square.item() == pytest.approx(cell, rel=1e-3)
    assert found.square.item() == pytest.approx(cell / 4, rel=1e-3)
    expected = torch.tensor([[0, u**2 / 4], [0, u**2]], dtype=torch.float64)
    assert torch.allclose(found.blocks, expected, rtol=1e-4)
    assert found.jacobian.item() == pytest.approx(0.625 * u**2, rel=1e-4)


def test_states_that_die():
    """Without inputs, a weak recurrent loop leaves nothing; its Jacobian is linear."""
    found = gru(Gate(1.0), Gate(1.0), Gate(0.8))
    assert found.square == 0
    # z = r = 1/2: 1/4 + (1/4) σ_n²/4.
    assert found.jacobian.item() == pytest.approx(0.25 + 0.64 / 16)
    found = lstm(Gate(1.0), Gate(1.0), Gate(0.8), Gate(1.0))
    assert found.square == found.cell_square == 0
    expected = torch.tensor([[0.04, 0.0625], [0.16, 0.25]], dtype=torch.float64)
    assert torch.allclose(found.blocks, expected, rtol=1e-9)


# Wide gates, which turn within a small part of a standard deviation.


def grid_mean(function, gate, square, input_square=1.0, points=2**16):
    """E function(a) over a gate's pre-activation, by the trapezoidal rule."""
    z = torch.linspace(-9, 9, points, dtype=torch.float64)
    weights = (-(z**2) / 2).exp()
    variance = gate.sigma_w**2 * square + gate.sigma_x**2 * input_square
    a = gate.mean + (variance + gate.sigma_b**2) ** 0.5 * z
    return ((function(a) * weights).sum() / weights.sum()).item()


def sigmoid_slope(a):
    return (a.sigmoid() * (-a).sigmoid()) ** 2


def tanh_slope(a):
    return (1 - a.tanh() ** 2) ** 2


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("sigma_w", [8.0, 30.0, 300.0])
def test_minimal_cells_with_wide_gates(sigma_w, mean):
    gate = Gate(sigma_w, sigma_x=1.0, sigma_b=0.2, mean=mean)
    found = minimal_rnn(gate)
    square = found.square.item()
    kept = grid_mean(lambda a: a.sigmoid() ** 2, gate, square)
    replaced = grid_mean(lambda a: (-a).sigmoid() ** 2, gate, square)
    assert kept * square + replaced == pytest.approx(square, rel=1e-9)
    stretched = (square + 1) * grid_mean(sigmoid_slope, gate, square)
    expected = kept + sigma_w**2 * stretched
    assert found.jacobian.item() == pytest.approx(expected, rel=1e-9)


def test_gru_cells_with_wide_gates():
    """Sums on a grid over the pre-activation of r and the candidate given r."""
    reset, update, candidate = Gate(25.0, 1.0), Gate(25.0, 1.0), Gate(40.0, 0.3, 0.1)
    found = gru(reset, update, candidate)
    square = found.square.item()
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weights = torch.softmax(-(z**2) / 2, 0)
    r = ((25**2 * square + 1) ** 0.5 * z).sigmoid()[:, None]
    echo = 40**2 * square
    total = 0.3**2 + 0.1**2 + r**2 * echo
    n = (total.sqrt() * z).tanh()
    # E (W h)² given the sum, of which it is r times a part.
    given = echo - (r * echo) ** 2 / total * (1 - z**2)
    slope = (1 - n**2) ** 2
    n_square, through, turned = (
        (weights @ part @ weights).item()
        for part in (n**2, slope * r**2, slope * given * (r * (1 - r)) ** 2)
    )
    kept = grid_mean(lambda a: a.sigmoid() ** 2, update, square)
    replaced = grid_mean(lambda a: (-a).sigmoid() ** 2, update, square)
    assert kept * square + replaced * n_square == pytest.approx(square, rel=1e-8)
    expected = (
        kept
        + 25**2 * (square + n_square) * grid_mean(sigmoid_slope, update, square)
        + replaced * (40**2 * through + 25**2 * turned)
    )
    assert found.jacobian.item() == pytest.approx(expected, rel=1e-8)


def test_lstm_cells_with_wide_gates():
    """Factors of the cell's row are independent: means on a grid multiply."""
    forget, others = Gate(25.0, 1.0, mean=1.5), Gate(25.0, 1.0)
    found = lstm(others, forget, others, others)
    square = found.square.item()
    kept = grid_mean(lambda a: a.sigmoid() ** 2, forget, square)
    let_in = grid_mean(lambda a: a.sigmoid() ** 2, others, square)
    g_square = grid_mean(lambda a: a.tanh() ** 2, others, square)
    cell_square = let_in * g_square / (1 - kept)
    assert found.cell_square.item() == pytest.approx(cell_square, rel=1e-8)
    by_hidden = 25**2 * (
        cell_square * grid_mean(sigmoid_slope, forget, square)
        + g_square * grid_mean(sigmoid_slope, others, square)
        + let_in * grid_mean(tanh_slope, others, square)
    )
    assert found.blocks[1, 1].item() == pytest.approx(kept, rel=1e-8)
    assert found.blocks[1, 0].item() == pytest.approx(by_hidden, rel=1e-4)


# Torch cells, weights and inputs drawn anew at each step, n = 1000.


@pytest.mark.slow
def test_minimal_cells():
    """Within 1 %, over 40 steps."""
    gate, square = Gate(2.0, 1.0, 0.1, 0.5), 1.3
    expected = minimal_rnn(gate, input_square=square)
    h, squares, jacobians = torch.zeros(1, N, dtype=torch.float64), [], []
    for step in range(55):
        (w, u, b), x = linear(gate), inputs(square)

        def cell(state, w=w, x=x, drive=x @ u.T + b):
            share = torch.sigmoid(state @ w.T + drive)
            return share * state + (1 - share) * x

        if step >= 15:
            squares.append(h.square().mean())
            jacobians.append(block(cell, h))
        h = cell(h)
    assert torch.stack(squares).mean() == pytest.approx(
        expected.square.item(), rel=0.03
    )
    found = torch.stack(jacobians).mean().item()
    assert found == pytest.approx(expected.jacobian.item(), rel=0.01)


def test_vanilla_cells():
    gate = Gate(1.4, 0.5, 0.1)
    expected = vanilla_rnn("tanh", gate, input_square=0.9)
    h, squares, jacobians = inputs(0.5), [], []
    for step in range(40):
        cell = fill(nn.RNNCell(N, N, dtype=torch.float64), [gate])
        x = inputs(0.9)
        if step >= 15:
            squares.append(h.square().mean())
        if step >= 15 and step % 3 == 0:
            state = h.detach()
            jacobians.append(block(lambda s, c=cell, x=x: c(x.expand(N, -1), s), state))
        h = cell(x, h).detach()
    assert torch.stack(squares).mean() == pytest.approx(
        expected.square.item(), rel=0.03
    )
    found = torch.stack(jacobians).mean().item()
    assert found == pytest.approx(expected.jacobian.item(), rel=0.02)


@pytest.mark.slow
def test_gru_cells():
    """Scales that give each of the four terms a share of several percent."""
    gates = (Gate(4.0, 1.0, 0.2), Gate(1.5, 0.7, 0.0, -1.0), Gate(4.0, 0.5, 0.1))
    expected = gru(*gates, input_square=0.8)
    h, squares, jacobians = inputs(0.5), [], []
    for step in range(45):
        cell = fill(nn.GRUCell(N, N, dtype=torch.float64), gates)
        x = inputs(0.8)
        if step >= 15:
            squares.append(h.square().mean())
            jacobians.append(block(lambda s, c=cell, x=x: c(x.expand(N, -1), s), h))
        h = cell(x, h).detach()
    found = torch.stack(squares).mean().item()
    assert found == pytest.approx(expected.square.item(), rel=0.03)
    found = torch.stack(jacobians).mean().item()
    assert found == pytest.approx(expected.jacobian.item(), rel=0.01)


@pytest.mark.slow
def test_lstm_cells():
    gates = (
        Gate(1.0, 1.0, 0.2, 0.3),
        Gate(1.5, 0.7, 0.0, 1.0),
        Gate(2.5, 0.5, 0.1),
        Gate(1.7, 0.4, 0.3, -0.2),
    )
    expected = lstm(*gates, input_square=0.8)
    h = c = torch.zeros(1, N, dtype=torch.float64)
    squares, blocks = [], []
    for step in range(45):
        cell = fill(nn.LSTMCell(N, N, dtype=torch.float64), gates)
        x = inputs(0.8)
        if step >= 30:
            squares.append(torch.stack([h.square().mean(), c.square().mean()]))
            for k in (0, 1):

                def of_hidden(s, k=k, cell=cell, x=x, c=c):
                    return cell(x.expand(N, -1), (s, c.expand(N, -1)))[k]

                def of_cell(s, k=k, cell=cell, x=x, h=h):
                    return cell(x.expand(N, -1), (h.expand(N, -1), s))[k]

                blocks += [block(of_hidden, h), block(of_cell, c)]
        with torch.no_grad():
            h, c = cell(x, (h, c))
    found = torch.stack(squares).mean(0)
    assert found[0].item() == pytest.approx(expected.square.item(), rel=0.05)
    assert found[1].item() == pytest.approx(expected.cell_square.item(), rel=0.05)
    means = torch.stack(blocks).view(-1, 2, 2).mean(0)
    assert torch.allclose(means, expected.blocks, rtol=0.03)


def test_cell_of_an_lstm_is_distributed_as_sampled():
    """A scalar cell in a given environment: 200 000 copies, 60 steps."""
    gates = (Gate(0.0, 2.0), Gate(0.0, 1.5, mean=1.5), Gate(0.0, 2.0), Gate(0.0))
    field = lstm(*gates)
    c = torch.zeros(200_000, dtype=torch.float64)
    for _ in range(60):
        i, f, g = (gate.mean + gate.sigma_x * torch.randn_like(c) for gate in gates[:3])
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    assert c.square().mean().item() == pytest.approx(field.cell_square.item(), rel=0.02)
    squashed = (c.tanh() ** 2).mean().item() / 4
    assert field.square.item() == pytest.approx(squashed, rel=0.01)
    flat = ((1 - c.tanh() ** 2) ** 2).mean()
    kept = field.blocks[0, 1] * 4
    assert 0 < kept < flat


# Arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate(-1.0), "sigma_w is -1.0"),
        (lambda: Gate(1.0, sigma_x=math.nan), "sigma_x is nan"),
        (lambda: Gate(1.0, mean=math.inf), "mean is inf"),
        (lambda: vanilla_rnn("tanh", Gate(1.0, mean=1.0)), "expected 0"),
        (lambda: vanilla_rnn("relu", Gate(2.0, sigma_b=1.0)), "diverges"),
        (lambda: vanilla_rnn("tan", Gate(1.0)), "expected one of"),
        (lambda: minimal_rnn(Gate(1.0), input_square=-1.0), "input_square is -1"),
        (lambda: gru(Gate(1.0), Gate(1.0), Gate(1.0, mean=1.0)), "expected 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
