"""Singular values of maps that are known on paper."""

import numpy as np
import pytest
import torch
from maps import CLOSE, Map, measured
from torch import nn

from ntk_callbacks.engine import segment_spectra
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.instruments import jacobian
from ntk_callbacks.instruments.jacobian import JacobianInstrument


def test_diagonal_map():
    s = np.array([3.0, 2.0, 1.0, 0.5])
    found = measured(Map(np.diag(s)))
    assert found.step == 7
    expected = {
        "jacobian/singular_value_max": 3.0,
        "jacobian/singular_value_min": 0.5,
        "jacobian/mean_square": (s**2).mean(),
        "jacobian/condition_number": 6.0,
        "jacobian/isometry_gap": 9 / (s**2).mean() - 1,
        "jacobian/log_std": np.log(s).std(),
    }
    assert found.scalars == pytest.approx(expected, **CLOSE)
    pooled = found.vectors["jacobian/singular_values_log10"].numpy()
    assert np.sort(pooled) == pytest.approx(np.sort(np.tile(np.log10(s), 3)))


def test_isometry():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    found = measured(Map(2 * q)).scalars
    expected = dict.fromkeys(("singular_value_max", "singular_value_min"), 2.0)
    expected |= {"mean_square": 4.0, "condition_number": 1.0, "log_std": 0.0}
    expected |= {"isometry_gap": 0.0}
    assert found == pytest.approx(
        {f"jacobian/{name}": value for name, value in expected.items()}, abs=1e-12
    )


@pytest.mark.parametrize("shape", [(2, 4), (6, 4), (1, 4)])
def test_rectangular_map(shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    s = np.linalg.svd(matrix, compute_uv=False)
    found = measured(Map(matrix)).scalars
    assert found["jacobian/singular_value_min"] == pytest.approx(s.min(), **CLOSE)
    gap = abs(s**2 / (s**2).mean() - 1).max()
    assert found["jacobian/isometry_gap"] == pytest.approx(gap, **CLOSE)
    assert found["jacobian/mean_square"] == pytest.approx((s**2).mean(), **CLOSE)
    assert found["jacobian/condition_number"] == pytest.approx(s.max() / s.min())


def test_examples_are_pooled_and_condition_numbers_are_their_median():
    """f(x) = x² has the Jacobian 2 diag(x), another for every example."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.scale * x**2

    x = np.array([[1.0, 2.0], [1.0, 8.0], [2.0, 12.0]])
    found = measured(Square(), torch.tensor(x)).scalars
    s = 2 * x
    expected = {
        "jacobian/singular_value_max": 24.0,
        "jacobian/singular_value_min": 2.0,
        "jacobian/mean_square": (s**2).mean(),
        "jacobian/condition_number": 6.0,
        "jacobian/isometry_gap": np.mean([3 / 5, 63 / 65, 140 / 148]),
        "jacobian/log_std": np.log(s).std(),
    }
    assert found == pytest.approx(expected, **CLOSE)


def test_images_are_flattened():
    s = np.array([3.0, 2.0, 1.0, 0.5])
    flat = measured(Map(np.diag(s))).scalars
    images = measured(Map(np.diag(s)), torch.randn(3, 1, 2, 2).double()).scalars
    assert images == pytest.approx(flat, **CLOSE)


def test_singular_map():
    found = measured(Map(np.diag([2.0, 0.0, 0.0, 0.0])))
    assert found.scalars["jacobian/condition_number"] == np.inf
    assert found.scalars["jacobian/log_std"] == np.inf
    assert found.scalars["jacobian/mean_square"] == pytest.approx(1.0)
    assert found.vectors["jacobian/singular_values_log10"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_directions_that_a_narrow_layer_leaves_out_are_round_off(dtype):
    net = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 6)).to(dtype)
    x = torch.randn(4, 8)
    found = measured(net, x)
    assert found.scalars["jacobian/singular_value_min"] == 0
    assert found.scalars["jacobian/condition_number"] == np.inf
    assert found.scalars["jacobian/log_std"] == np.inf
    spectrum = found.vectors["jacobian/singular_values_log10"]
    assert len(spectrum) == len(x) * 3
    assert spectrum.min() > -3


def test_nan_weights_give_nan_scalars():
    found = measured(Map(np.full((2, 4), np.nan)))
    assert all(np.isnan(value) for value in found.scalars.values())
    assert not len(found.vectors["jacobian/singular_values_log10"])


def test_dropout_is_off_and_its_scale_is_one():
    net = nn.Sequential(Map(np.eye(4)), nn.Dropout(0.5)).train()
    found = measured(net).scalars
    assert found["jacobian/mean_square"] == pytest.approx(1.0)
    assert net[1].training


def test_batchnorm_in_both_modes():
    net = nn.BatchNorm1d(4).double()
    with torch.no_grad():
        net.running_var.fill_(4.0)
    expected = 1 / np.sqrt(4 + net.eps)
    found = measured(net).scalars
    assert found["jacobian/singular_value_max"] == pytest.approx(expected)
    # In training mode the statistics move with an example: (1 − 1/n)/σ at x = μ.
    x = torch.tensor([[0.0], [3.0], [-3.0]], dtype=torch.float64)
    found = measured(nn.BatchNorm1d(1).double(), x, mode="train").scalars
    assert found["jacobian/singular_value_max"] == pytest.approx(
        (2 / 3) / np.sqrt(6 + net.eps)
    )


def test_output_fn_and_memory_budget():
    s = np.array([3.0, 2.0, 1.0, 0.5])
    net = Map(np.diag(s))
    whole = measured(net).scalars
    # 4 Jacobians of 4·4 float64 values at a time: one example after the other.
    assert measured(net, memory_budget=4 * 128).scalars == pytest.approx(whole)
    first = measured(net, output_fn=lambda model, x: model(x)[:, :1]).scalars
    assert first["jacobian/singular_value_max"] == pytest.approx(3.0)
    assert first["jacobian/condition_number"] == pytest.approx(1.0)


def test_frozen_networks_have_jacobians_too():
    net = Map(np.diag([3.0, 2.0, 1.0, 0.5])).requires_grad_(False)
    assert measured(net).scalars["jacobian/singular_value_max"] == pytest.approx(3.0)


def test_integers_are_refused():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=r"torch.int64.*`output_fn`"):
        measured(net, torch.ones(2, 2, dtype=torch.long))


def test_start_comes_first_and_nothing_is_kept():
    instrument = JacobianInstrument()
    with pytest.raises(RuntimeError, match=r"call start\(probe\) first"):
        instrument.measure(Map(np.eye(4)), 0)
    assert instrument.state_dict() == {}
    instrument.load_state_dict({})


def test_wide_maps_are_multiplied_with(monkeypatch):
    monkeypatch.setattr(jacobian, "_WIDEST", 3)
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 3)
    found = measured(Map(np.diag([3.0, 2.0, 1.0, 0.5])))
    assert not found.vectors
    squares = (9 + 4 + 1 + 0.25) / 4
    assert found.scalars == pytest.approx(
        {
            "jacobian/singular_value_max": 3.0,
            "jacobian/singular_value_min": 0.5,
            # Random signs tell the trace of a diagonal matrix exactly.
            "jacobian/mean_square": squares,
            "jacobian/condition_number": 6.0,
            "jacobian/isometry_gap": 9 / squares - 1,
        },
        rel=1e-9,
    )


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"by": "width"}, "by='width'.*depth, time"),
        ({"layers": "0"}, 'Pass by="depth"'),
        ({"per_layer": True}, 'Pass by="depth"'),
        ({"by": "depth", "layers": "["}, "no regular expression"),
        ({"mode": "test"}, "mode='test'"),
    ],
)
def test_arguments_are_checked_at_once(settings, what):
    with pytest.raises(ValueError, match=what):
        JacobianInstrument(**settings)
