"""Recurrent layers step by step: the numbers of torch's own, and a fast route."""

from itertools import product

import pytest
import torch
from cases import BY_ID, Case, recurrent, sequences
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine.recurrence import UNROLLED

KINDS = {
    "rnn": lambda *sizes, **options: nn.RNN(*sizes, **options),
    "rnn_relu": lambda *sizes, **o: nn.RNN(*sizes, nonlinearity="relu", **o),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "lstm_projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
}
CELLS = {
    "rnn": nn.RNNCell,
    "rnn_relu": lambda *sizes, **options: nn.RNNCell(
        *sizes, nonlinearity="relu", **options
    ),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}


class Taken(torch.overrides.TorchFunctionMode):
    """Calls the functions of `UNROLLED` in their place, and counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in UNROLLED:
            self.count += 1
            return UNROLLED[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def flattened(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for part in found for tensor in flattened(part)]


def same(module, *given):
    """Outputs, states and gradients by all parameters: torch's, and step by step."""
    expected = flattened(module(*given))
    with Taken() as taken:
        found = flattened(module(*given))
    assert taken.count == 1
    assert len(found) == len(expected)
    generator = torch.Generator().manual_seed(1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        direction = torch.randn(other.shape, generator=generator, dtype=torch.double)
        gradients = [
            torch.autograd.grad(
                (f * direction).sum(),
                list(module.parameters()),
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            for f in (one, other)
        ]
        assert any(gradient.any() for gradient in gradients[1])
        for mine, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bias", "bidirectional", "layers"),
    [*product((True, False), (True, False), (1, 2))],
)
def test_layers_are_those_of_torch(kind, bias, bidirectional, layers):
    module = KINDS[kind](
        *(3, 4, layers), bias=bias, bidirectional=bidirectional, batch_first=bias
    ).double()
    x = torch.randn(5, 6, 3, dtype=torch.double)
    same(module, x)
    _, states = module(x)
    same(module, x, tuple(map(torch.randn_like, states)) if "lstm" in kind else states)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_those_of_torch(kind, bias):
    cell = CELLS[kind](3, 4, bias=bias).double()
    x = torch.randn(5, 3, dtype=torch.double)
    same(cell, x)
    state = torch.randn(5, 4, dtype=torch.double)
    same(cell, x, (state, state.flip(0)) if kind == "lstm" else state)


class LearnedStart(nn.Module):
    """A GRU whose first state is a parameter."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.rnn = nn.GRU(6, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x, self.start.expand(-1, len(x), -1))[0][:, -1])


class Normalized(nn.Module):
    """An LSTM with a weight norm on the weight of its state."""

    def __init__(self):
        super().__init__()
        rnn = nn.LSTM(6, 4, batch_first=True)
        self.rnn = nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")

    def forward(self, x):
        return self.rnn(x)[0].mean(1)


class EveryStep(nn.Module):
    """Outputs at every step, of two layers that are called twice."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 6, 2, batch_first=True)

    def forward(self, x):
        return self.rnn(self.rnn(x)[0])[0].flatten(1)


COVERED = [
    Case("learned_start", LearnedStart, sequences),
    Case("weight_norm", Normalized, sequences),
    Case("every_step", EveryStep, sequences),
    Case("lstm", lambda: recurrent(nn.LSTM), sequences),
    Case("bidirectional", lambda: recurrent(nn.GRU, bidirectional=True), sequences),
]


@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.id)
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_recurrent_models_take_fast_routes_to_the_kernel_of_rows(case, outputs):
    model, x = case.build()
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.coverage == 1.0, plan
    found = empirical_ntk(model, x, outputs=outputs, route=plan)
    rows = empirical_ntk(model, x, outputs=outputs, route="rows")
    torch.testing.assert_close(found, rows, rtol=1e-9, atol=1e-9 * float(rows.max()))


def test_packed_sequences_take_an_exact_route_to_the_same_kernel():
    model, x = BY_ID["packed_sequences"].build()
    plan = plan_ntk(model, x)
    assert set(plan.exact) == {f"cells.{n}" for n, _ in model.cells.named_parameters()}
    torch.testing.assert_close(
        empirical_ntk(model, x, route=plan), empirical_ntk(model, x, route="rows")
    )


def test_dropout_between_layers_that_is_on_is_left_to_torch():
    rnn = nn.GRU(3, 4, 2, dropout=0.5)
    weights = rnn._flat_weights
    x, state = torch.randn(5, 2, 3), torch.zeros(2, 2, 4)
    given = (x, state, weights, True, 2, 0.5)
    assert UNROLLED[torch.gru](*given, True, False, False) is None
    assert len(UNROLLED[torch.gru](*given, False, False, False)) == 2


def test_arguments_may_be_named():
    rnn = nn.GRU(3, 4, batch_first=True).double()
    x, state = torch.randn(5, 6, 3).double(), torch.zeros(1, 5, 4).double()
    weights = rnn._flat_weights
    expected = torch.gru(x, state, weights, True, 1, 0.0, False, False, True)
    given = (x, state, weights, True, 1, 0.0, False)
    found = UNROLLED[torch.gru](*given, bidirectional=False, batch_first=True)
    torch.testing.assert_close(found, expected)
    cell = nn.GRUCell(3, 4).double()
    own = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    found = UNROLLED[torch.gru_cell](
        input=x[:, 0], hx=state[0], w_ih=own[0], w_hh=own[1], b_ih=own[2], b_hh=own[3]
    )
    torch.testing.assert_close(found, cell(x[:, 0], state[0]))


def test_long_sequences_are_left_to_torch():
    model = recurrent(nn.GRU).double()
    x = torch.randn(2, 300, 6, dtype=torch.double)
    assert plan_ntk(model, x[:, :256]).coverage == 1.0
    assert plan_ntk(model, x).exact.keys() == {
        f"cells.{name}" for name, _ in model.cells.named_parameters()
    }


def test_steps_whose_gradients_vanish_lie_as_the_others_do():
    """In float32 the first of many steps no longer reach the last output."""
    torch.manual_seed(0)
    model = recurrent(nn.GRU)
    for parameter in model.cells.parameters():
        parameter.data *= 0.1
    x = torch.randn(3, 200, 6)
    assert plan_ntk(model, x).coverage == 1.0
