"""Kernels that two instruments share: measured once, and never a stale one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.series import KernelSeries, share_kernels


class Counted(nn.Sequential):
    """Counts its forward passes."""

    passes = 0

    def forward(self, x):
        type(self).passes += 1
        return super().forward(x) * self.gain

    gain = 1.0


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def net():
    return Counted(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def sharing():
    series = KernelSeries()
    series.remember()
    return series


def passes(series, model, x=X, request=None, seed=0):
    """Forward passes that a measurement took, which is compared with a fresh one."""
    request = Request() if request is None else request
    fresh, error = KernelSeries().measure(model, x, request, seed)
    Counted.passes = 0
    found = series.measure(model, x, request, seed)
    assert found[1] == error
    assert found[0].keys() == fresh.keys()
    assert all(torch.equal(found[0][name], fresh[name]) for name in fresh)
    return Counted.passes


def test_the_same_again_takes_nothing():
    series, model = sharing(), net()
    assert passes(series, model) > 0
    assert passes(series, model) == 0
    assert passes(series, model, X.clone()) == 0
    assert passes(series, model, request=Request(by="module")) > 0
    assert passes(series, model, request=Request(by="module")) == 0
    assert passes(series, model) == 0


def test_one_instrument_alone_keeps_no_copy():
    series, model = KernelSeries(), net()
    assert passes(series, model) > 0
    assert passes(series, model) > 0


def change_data(model):
    model[0].weight.data[0, 0] += 1  # leaves the version of the parameter as it was


def change_value(model):
    with torch.no_grad():
        model[3].bias += 1
        model[0].weight[0, 0] *= 1 + 2**-20


def replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def freeze(model):
    model[0].weight.requires_grad_(False)


def move_statistics(model):
    model[1].running_var *= 2


def change_attribute(model):
    model.gain = 2.0


def change_epsilon(model):
    model[1].eps = 0.5


@pytest.mark.parametrize(
    "change",
    [
        change_data,
        change_value,
        replace_parameter,
        freeze,
        move_statistics,
        change_attribute,
        change_epsilon,
    ],
)
def test_whatever_changes_is_measured_anew(change):
    """At the same step: the number of a step says nothing."""
    series, model = sharing(), net()
    passes(series, model)
    change(model)
    assert passes(series, model) > 0
    assert passes(series, model) == 0


def test_other_models_inputs_requests_and_steps_are_measured():
    series, model = sharing(), net()
    passes(series, model)
    assert passes(series, copy.deepcopy(model)) > 0
    passes(series, model)
    assert passes(series, model, X + 1e-6) > 0
    assert passes(series, model, X[:3]) > 0
    assert passes(series, model, request=Request(outputs="trace")) > 0
    assert passes(series, model, request=Request(mode="train")) > 0
    assert passes(series, model, request=Request(output_fn=lambda m, x: m(x)[:, :1]))
    assert passes(series, model, seed=1) > 0
    scaling = dict.fromkeys(dict(model.named_parameters()), 2.0)
    for _ in range(2):  # an optimizer's: never kept
        assert passes(series, model, request=Request(scaling=scaling)) > 0


def test_frozen_flags_count_in_train_mode():
    series, model = sharing(), net()
    request = Request(mode="train")
    passes(series, model, request=request)
    model[1].eval()
    assert passes(series, model, request=request) > 0


def test_whoever_writes_into_a_kernel_writes_into_a_copy():
    series, model = sharing(), net()
    for _ in range(2):
        parts, _ = series.measure(model, X, Request(), 0)
        parts[""].zero_()
    assert passes(series, model) == 0


def test_nan_equals_nothing():
    series, model = sharing(), net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    for _ in range(2):
        Counted.passes = 0
        series.measure(model, X, Request(), 0)
        assert Counted.passes > 0


def test_copies_of_a_series_measure_for_themselves():
    series, model = sharing(), net()
    passes(series, model)
    for twin in (copy.deepcopy(series), pickle.loads(pickle.dumps(series))):
        assert passes(twin, model) > 0
        assert passes(twin, model) == 0


class Taker:
    def __init__(self, route="auto"):
        self.kernels = KernelSeries(route)


def test_instruments_with_the_same_route_share():
    one, two, rows, none = Taker(), Taker(), Taker("rows"), object()
    share_kernels([one, none, rows, two])
    assert one.kernels is two.kernels
    assert rows.kernels is not one.kernels
    model = net()
    assert passes(one.kernels, model) > 0
    assert passes(two.kernels, model) == 0
    for _ in range(2):
        Counted.passes = 0
        rows.kernels.measure(model, X, Request(), 0)
        assert Counted.passes > 0  # alone: nothing is kept
