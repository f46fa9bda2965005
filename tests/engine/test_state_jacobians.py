"""Jacobians between states against recursions written by hand, and theory."""

import pytest
import torch
from layer_jacobians import x_of
from networks import Computed
from torch import nn

from ntk_callbacks.engine import segment_spectra, state_jacobians
from ntk_callbacks.engine.state_jacobians import jacobian_by_time
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.theory.recurrent import Gate, gru, vanilla_rnn

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def outputs(model, x):
    return model(x)[0]


def rnn_steps(w, u, b, x, h):
    """∂h_{t+1}/∂h_t = diag(1 − h_{t+1}²) W of h' = tanh(W h + U x + b)."""
    steps = []
    for t in range(x.shape[1]):
        h = torch.tanh(h @ w.mT + x[:, t] @ u.mT + b)
        steps.append((1 - h**2)[..., None] * w)
    return steps


def gru_steps(w, u, b, x, h):
    """The derivative of torch's GRU by its state, gate by gate."""
    size = h.shape[1]
    w_r, w_z, w_n = w.split(size)
    steps = []
    for t in range(x.shape[1]):
        a = x[:, t] @ u.mT + b[0]
        a_r, a_z, a_n = a.split(size, 1)
        b_r, b_z, b_n = b[1].split(size)
        r = torch.sigmoid(a_r + h @ w_r.mT + b_r)
        z = torch.sigmoid(a_z + h @ w_z.mT + b_z)
        inner = h @ w_n.mT + b_n
        n = torch.tanh(a_n + r * inner)
        slope = (1 - n**2) * (1 - z)
        steps.append(
            torch.diag_embed(z)
            + ((h - n) * z * (1 - z))[..., None] * w_z
            + (slope * r)[..., None] * w_n
            + (slope * inner * r * (1 - r))[..., None] * w_r
        )
        h = (1 - z) * n + z * h
    return steps


def lstm_steps(w, u, b, x, h, c):
    """The derivative of (h', c') by (h, c)."""
    size = h.shape[1]
    w_i, w_f, w_g, w_o = w.split(size)
    steps = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ u.mT + h @ w.mT + b.sum(0)).split(size, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_by_c = torch.diag_embed(f)
        c_by_h = (
            (c * f * (1 - f))[..., None] * w_f
            + (g * i * (1 - i))[..., None] * w_i
            + (i * (1 - g**2))[..., None] * w_g
        )
        c = f * c + i * g
        through = (o * (1 - c.tanh() ** 2))[..., None]
        h_by_h = (c.tanh() * o * (1 - o))[..., None] * w_o + through * c_by_h
        upper = torch.cat([h_by_h, through * c_by_c], 2)
        steps.append(torch.cat([upper, torch.cat([c_by_h, c_by_c], 2)], 1))
        h = o * c.tanh()
    return steps


def expected_of(module, x, start=None):
    w, u = module.weight_hh_l0.detach(), module.weight_ih_l0.detach()
    b = torch.stack([module.bias_ih_l0, module.bias_hh_l0]).detach()
    h = x.new_zeros(len(x), module.hidden_size) if start is None else start
    if isinstance(module, nn.LSTM):
        return lstm_steps(w, u, b, x, h, torch.zeros_like(h))
    if isinstance(module, nn.GRU):
        return gru_steps(w, u, b, x, h)
    return rnn_steps(w, u, b.sum(0), x, h)


def s_of(matrices):
    s = torch.linalg.svdvals(torch.stack(matrices))
    return s.square().mean(2), s[..., 0], s[..., -1]


def agree(spectra, matrices):
    found = spectra.mean_square, spectra.largest, spectra.smallest
    for left, right in zip(found, s_of(matrices), strict=True):
        torch.testing.assert_close(left, right, **CLOSE)


def to_end(steps):
    """∂z_T/∂z_t, t = 1 … T − 1: products of what follows the state z_t."""
    products = [steps[-1]]
    for step in steps[-2:0:-1]:
        products.insert(0, products[0] @ step)
    return products


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_are_unrolled(kind, batch_first):
    torch.manual_seed(0)
    module = kind(3, 4, batch_first=batch_first).double()
    x = x_of(2, 5, 3)

    def output_fn(model, x):
        return (
            model(x)[0] if batch_first else model(x.transpose(0, 1))[0].transpose(0, 1)
        )

    (found,) = jacobian_by_time(module, x, output_fn=output_fn).values()
    steps = expected_of(module, x)
    assert found.length == 5
    assert found.times.tolist() == [1, 2, 3, 4]
    agree(found.step, steps[1:])
    agree(found.to_end, to_end(steps))


def test_a_given_first_state_is_kept():
    torch.manual_seed(0)
    net = Computed(
        lambda self, x, h: self.rnn(x, h[None])[0], rnn=nn.RNN(3, 4, batch_first=True)
    ).double()
    x, h = x_of(2, 3, 3), x_of(2, 4, seed=5)
    found = jacobian_by_time(net, (x, h))["rnn"]
    agree(found.step, expected_of(net.rnn, x, h)[1:])


class Loop(nn.Module):
    """A cell in a loop of the user's own; `feed` hands the state on to the input."""

    def __init__(self, cell, feed=False):
        super().__init__()
        self.cell, self.feed = cell.double(), feed

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            given = x[:, t]
            if self.feed and state is not None:
                given = given + state[:, :3]
            state = self.cell(given, state)
        return state[0] if isinstance(state, tuple) else state


def cell_of(module, kind):
    cell = kind(3, 4).double()
    for name, parameter in cell.named_parameters():
        parameter.data.copy_(getattr(module, f"{name}_l0"))
    return cell


@pytest.mark.parametrize(
    ("kind", "cell"),
    [(nn.RNN, nn.RNNCell), (nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)],
)
def test_cells_in_a_loop_are_the_same(kind, cell):
    torch.manual_seed(0)
    module = kind(3, 4, batch_first=True).double()
    x = x_of(2, 4, 3)
    found = jacobian_by_time(Loop(cell_of(module, cell)), x)["cell"]
    steps = expected_of(module, x)
    agree(found.step, steps[1:])
    agree(found.to_end, to_end(steps))


def test_states_that_come_back_as_inputs_count():
    torch.manual_seed(0)
    net, x = Loop(nn.RNNCell(3, 4), feed=True), x_of(2, 3, 3)
    w = net.cell.weight_hh.detach().clone()
    w[:, :3] += net.cell.weight_ih.detach()
    bias = (net.cell.bias_ih + net.cell.bias_hh).detach()
    steps = rnn_steps(w, net.cell.weight_ih.detach(), bias, x, x.new_zeros(2, 4))
    agree(jacobian_by_time(net, x)["cell"].step, steps[1:])


def test_modules_called_step_by_step_are_not_unrolled():
    torch.manual_seed(0)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            _, h = self.rnn(x[:, t : t + 1], h)
        return h[0]

    net = Computed(forward, rnn=nn.RNN(3, 4, batch_first=True)).double()
    x = x_of(2, 4, 3)
    agree(jacobian_by_time(net, x)["rnn"].step, expected_of(net.rnn, x)[1:])


def test_states_of_several_layers_are_one_state():
    torch.manual_seed(0)
    module = nn.RNN(3, 4, num_layers=2, batch_first=True).double()
    x = x_of(2, 3, 3)
    (found,) = jacobian_by_time(module, x, output_fn=outputs).values()
    first = expected_of(module, x)
    hidden, _ = module(x)
    lower, _ = nn.RNN(3, 4, batch_first=True).double(), None
    lower.load_state_dict(
        {k: v for k, v in module.state_dict().items() if k.endswith("l0")}
    )
    h1 = lower(x)[0].detach()
    w, u = module.weight_hh_l1.detach(), module.weight_ih_l1.detach()
    steps = []
    for t in range(1, 3):
        slope = (1 - hidden[:, t].detach() ** 2)[..., None]
        upper = torch.cat([first[t], torch.zeros(2, 4, 4).double()], 2)
        below = torch.cat([slope * (u @ first[t]), slope * w], 2)
        steps.append(torch.cat([upper, below], 1))
    assert h1.shape == (2, 3, 4)
    agree(found.step, steps)


def test_long_times_are_thinned_and_both_ends_stay(monkeypatch):
    monkeypatch.setattr(state_jacobians, "_MOST_TIMES", 4)
    torch.manual_seed(0)
    module, x = nn.RNN(3, 4, batch_first=True).double(), x_of(2, 11, 3)
    (found,) = jacobian_by_time(module, x, output_fn=outputs, count=1).values()
    assert found.times.tolist() == [1, 4, 7, 10]
    steps = [step[:1] for step in expected_of(module, x)]
    agree(found.step, [steps[t] for t in (1, 4, 7, 10)])
    agree(found.to_end, [to_end(steps)[t - 1] for t in (1, 4, 7, 10)])


def test_wide_states_go_by_products(monkeypatch):
    torch.manual_seed(0)
    module, x = nn.GRU(3, 12, batch_first=True).double(), x_of(2, 4, 3)
    (exact,) = jacobian_by_time(module, x, output_fn=outputs).values()
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    (wide,) = jacobian_by_time(module, x, output_fn=outputs).values()
    for end in ("largest", "smallest"):
        torch.testing.assert_close(
            getattr(wide.step, end), getattr(exact.step, end), rtol=1e-5, atol=0
        )
    assert wide.to_end.largest.isnan().all()
    torch.testing.assert_close(
        wide.to_end.mean_square, exact.to_end.mean_square, rtol=0.3, atol=0
    )


def test_one_step_is_that_of_mean_field_theory(monkeypatch):
    """Wide networks of random weights, after the state has become stationary."""
    monkeypatch.setattr(state_jacobians, "_MOST_TIMES", 2)
    torch.manual_seed(0)
    width, generator = 120, torch.Generator().manual_seed(2)
    x = torch.randn(4, 8, width, generator=generator)

    def gaussian(parameter, gates):
        for block, scale in zip(parameter.data.chunk(len(gates)), gates, strict=True):
            block.normal_(std=scale / parameter.shape[1] ** 0.5 if scale else 0.0)

    def last_step(module):
        for name, parameter in module.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
        found = jacobian_by_time(module, x, output_fn=lambda m, x: m(x)[0][:, -1:, :1])
        (spectra,) = found.values()
        return float(spectra.step.mean_square[-1].mean())

    rnn = nn.RNN(width, width, batch_first=True)
    gaussian(rnn.weight_hh_l0, [1.3])
    gaussian(rnn.weight_ih_l0, [0.5])
    theory = vanilla_rnn("tanh", Gate(1.3, sigma_x=0.5)).jacobian
    # Sums over 120 units of random weights: 5 % or so of scatter.
    assert last_step(rnn) == pytest.approx(float(theory), rel=0.1)
    cell = nn.GRU(width, width, batch_first=True)
    scales = [1.0, 1.5, 1.2]
    gaussian(cell.weight_hh_l0, scales)
    gaussian(cell.weight_ih_l0, [0.5] * 3)
    gates = [Gate(scale, sigma_x=0.5) for scale in scales]
    assert last_step(cell) == pytest.approx(float(gru(*gates).jacobian), rel=0.1)


def test_modules_are_chosen_and_left_as_they_were():
    torch.manual_seed(0)
    net = Computed(
        lambda self, x: self.two(self.one(x)[0])[0],
        one=nn.RNN(3, 4, batch_first=True),
        two=nn.GRU(4, 2, batch_first=True),
    ).double()
    x = x_of(2, 3, 3)
    assert [*jacobian_by_time(net, x)] == ["one", "two"]
    assert [*jacobian_by_time(net, x, layers="tw")] == ["two"]
    assert [*jacobian_by_time(net, x, layers=nn.RNN)] == ["one"]
    assert [*jacobian_by_time(net, x, layers=lambda name, _: name == "two")] == ["two"]
    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_what_has_no_states_is_refused():
    x = x_of(2, 3, 3)

    def fails(what, module, x=x, output_fn=outputs, **settings):
        with pytest.raises(UnsupportedModelError, match=what):
            jacobian_by_time(module, x, output_fn=output_fn, **settings)

    rnn = nn.RNN(3, 4, batch_first=True).double()
    fails("bidirectional", nn.GRU(3, 4, batch_first=True, bidirectional=True).double())
    fails("has no recurrent module; it has none", nn.Linear(3, 4).double())
    fails("chosen by layers='lstm'", rnn, layers="lstm")
    fails("one step only", rnn, x[:, :1])
    fails("does not call", rnn, output_fn=lambda m, x: x @ m.weight_ih_l0.mT)

    def packed(m, x):
        lengths = torch.tensor([3, 2])
        given = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return m(given)[1][0]

    fails("packed", rnn, output_fn=packed)
    # Examples merged with something else: no state for each.
    fails("without one entry", rnn, output_fn=lambda m, x: m(x.repeat(2, 1, 1))[0][:2])

    class Doubled(nn.RNN):
        def forward(self, x, hx=None):
            return super().forward(x.flip(1), hx)

    with pytest.raises(UnsupportedModelError, match="not those of torch"):
        jacobian_by_time(Doubled(3, 4, batch_first=True).double(), x, output_fn=outputs)
