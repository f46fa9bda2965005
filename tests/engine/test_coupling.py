"""Examples that depend on one another are found, also where outputs tell nothing."""

import itertools

import pytest
import torch
from oracles import ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.engine.coupling import _groups, is_coupled
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction


class Grouped(nn.Module):
    """Only the two examples in the middle share their mean."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        groups = torch.tensor([0, *[1] * (len(x) - 2), 2])[: len(x)]
        means = [h[groups == group].mean(0) for group in groups.tolist()]
        return self.last(torch.stack(means))


def zero_head():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
    )
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    return net


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h - h.mean(0))


@pytest.mark.parametrize("factory", [Grouped, zero_head, Centered])
@pytest.mark.parametrize("route", ["auto", "rows"])
def test_coupled_examples_are_differentiated_jointly(factory, route):
    model = factory().double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    ntk = empirical_ntk(model, x, route=route)
    assert relative_error(ntk, ntk_by_loop(model, x)) < 1e-9


@pytest.mark.parametrize("factory", [Grouped, zero_head, Centered])
def test_vmap_refuses_coupled_examples(factory):
    with pytest.raises(UnsupportedModelError, match="depends on the others"):
        empirical_ntk(factory().eval(), torch.randn(5, 3), route="vmap")


def test_dropout_behind_a_head_of_zeros_is_found():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            nn.init.zeros_(self.last.weight)

        def forward(self, x):
            return self.last(nn.functional.dropout(self.first(x)))

    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        empirical_ntk(Drops().eval(), torch.randn(4, 3))


def test_an_output_near_zero_is_not_coupled():
    """Sums of thousands that cancel leave round-off, which the batch size changes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 1))
    x = torch.randn(40, 64)
    # Along a line between examples with outputs of both signs there is one of almost 0.
    low, high = x[net(x)[:, 0].argmin()], x[net(x)[:, 0].argmax()]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if net(middle) > 0 else (middle, high)
    x[:10] = middle
    function = ModelFunction(net)
    gaps = [(net(x[i : i + 1]) - net(x)[i]).abs() / net(x)[i].abs() for i in range(10)]
    assert max(gaps) > 1e-3  # else nothing is tested
    assert not is_coupled(function, x)


def test_weak_coupling_is_found():
    def forward(net, x):
        f = net(x)
        return f + 1e-2 * f.mean()

    net = nn.Linear(64, 1)
    x = torch.randn(8, 64)
    assert is_coupled(ModelFunction(net, output_fn=forward), x)


@pytest.mark.parametrize("route", ["auto", "rows"])
@pytest.mark.parametrize(("dtype", "offset"), [("float32", 300), ("float64", 1e6)])
def test_coupling_of_outputs_far_from_zero(dtype, offset, route):
    """Round-off of the outputs is larger than what neighbors change of them."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            nn.init.constant_(self.last.bias, offset)

        def forward(self, x):
            h = self.first(x)
            return self.last(torch.tanh(h - 0.1 * h.mean(0)))

    dtype = getattr(torch, dtype)
    model, x = Shifted().to(dtype), 0.3 * torch.randn(6, 3, dtype=dtype)
    ntk = empirical_ntk(model, x, route=route).double()
    assert relative_error(ntk, ntk_by_loop(model.double(), x.double())) < 1e-5


def test_outputs_far_from_zero_are_not_coupled():
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 1))
    nn.init.constant_(net[2].bias, 300)
    assert not is_coupled(ModelFunction(net), torch.randn(40, 64))


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_any_example_that_depends_on_any_other_is_found(n):
    """Also where all that it depends on is one example, and the head starts at zero."""
    net = nn.Linear(3, 2).double()
    nn.init.zeros_(net.weight)
    x = torch.randn(n, 3, dtype=torch.float64)

    def depends(i, j):
        def forward(net, batch):
            f = net(batch)
            (here,), (there,) = (
                (batch == x[k]).all(1).nonzero().tolist() or [None] for k in (i, j)
            )
            if here is None or there is None:
                return f
            return f.index_add(0, torch.tensor(here), f[there])

        return forward

    for i, j in itertools.permutations(range(n), 2):
        function = ModelFunction(net, output_fn=depends(i, j))
        assert is_coupled(function, x)
        assert is_coupled(function, x, count=n - 1) == (i < n - 1)
    assert not is_coupled(ModelFunction(net), x)


def test_independence_is_seen_in_few_passes():
    passes = []

    def forward(net, x):
        passes.append(len(x))
        return net(x)

    assert not is_coupled(
        ModelFunction(nn.Linear(3, 2), output_fn=forward), torch.randn(64, 3)
    )
    assert len(passes) <= 6 + 12  # 12 · 11 / 2 ≥ 64
    assert sum(passes) <= 5 * 64 + 4


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("route", ["auto", "rows"])
def test_chance_is_told_from_neighbors(n, mode, route):
    """Both change the output of an example; only one of them can be measured."""

    def noisy(net, x):
        return net(x) + torch.rand(len(x), 1)

    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        empirical_ntk(
            nn.Linear(3, 2), torch.randn(n, 3), output_fn=noisy, mode=mode, route=route
        )


@pytest.mark.parametrize("call", range(1, 24))
def test_what_happens_once_in_many_passes_is_chance(call):
    """As a layer that is dropped now and then: the pass in which it is tells of it."""
    calls = []

    def forward(net, x):
        calls.append(len(x))
        return net(x) + (1 if len(calls) == call else 0)

    function = ModelFunction(nn.Linear(3, 2), output_fn=forward)
    x = torch.randn(20, 3)
    passes = 3 + 2 + 7  # joint, alone, groups: 7 · 6 / 2 ≥ 20
    if call > passes:
        assert not is_coupled(function, x)
    else:
        with pytest.raises(UnsupportedModelError, match="draws random numbers"):
            is_coupled(function, x)


@pytest.mark.parametrize("route", ["auto", "rows"])
def test_chance_at_the_parameters_alone_is_found(route):
    """Ties of a gate that starts at zero are broken by chance; elsewhere are none."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.last = nn.Linear(3, 1), nn.Linear(3, 2)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

        def forward(self, x):
            gate = self.gate(x)
            tied = (gate == 0) & (torch.arange(len(x))[:, None] % 7 == 3)
            return self.last(x) * (1 + torch.where(tied, torch.rand_like(gate), gate))

    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        empirical_ntk(Tied().eval(), torch.randn(8, 3), route=route)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 21, 22, 500])
def test_of_any_two_each_is_in_a_group_without_the_other(n):
    groups = [set(group) for group in _groups(n)]
    for i in range(n):
        own = [group for group in groups if i in group]
        assert set.intersection(*own) == {i}
    assert len(groups) <= 2 + (2 * n) ** 0.5
