"""Singular values by depth and by time of maps that are known on paper."""

import numpy as np
import pytest
import torch
from maps import CLOSE, measured
from torch import nn


def stretched(s):
    """x -> A₃ A₂ A₁ x, Aₗ diagonal: all singular values are on paper."""
    layers = [nn.Linear(4, 4, bias=False).double() for _ in s]
    for layer, diagonal in zip(layers, s, strict=True):
        layer.weight.data.copy_(torch.diag(torch.tensor(diagonal)))
    return nn.Sequential(*layers)


S = np.array([[1.0, 2.0, 2.0, 1.0], [3.0, 1.0, 1.0, 2.0], [1.0, 1.0, 4.0, 1.0]])


def test_by_depth_of_diagonal_layers():
    found = measured(stretched(S.tolist()), by="depth")
    squares = (S**2).mean(1)
    gaps = abs(S**2 / squares[:, None] - 1).max(1)
    scalars = {tag.removeprefix("jacobian/"): v for tag, v in found.scalars.items()}
    expected = {
        "step_mean_square": (squares[1] * squares[2]) ** 0.5,
        "step_singular_value_max": 4.0,
        "step_singular_value_min": 1.0,
        "step_isometry_gap": (gaps[1] + gaps[2]) / 2,
    }
    whole = measured(stretched(S.tolist())).scalars
    assert scalars == pytest.approx(
        expected | {k.removeprefix("jacobian/"): v for k, v in whole.items()}, **CLOSE
    )
    assert len(scalars) <= 12
    products = {
        "step": S[1:],
        "from_input": np.cumprod(S, 0),
        "to_output": np.stack([S[1] * S[2], S[2], np.ones(4)]),
    }
    for reach, s in products.items():
        for what, values in (
            ("mean_square", (s**2).mean(1)),
            ("singular_value_max", s.max(1)),
            ("singular_value_min", s.min(1)),
        ):
            vector = found.vectors[f"jacobian/{reach}_{what}_by_depth"]
            assert vector.tolist() == pytest.approx(values.tolist(), **CLOSE)


def test_one_layer_has_no_steps_which_is_told():
    net = stretched(S[:1].tolist())
    with pytest.warns(UserWarning, match=r"only one layer, '0'.*by=.time"):
        found = measured(net, by="depth")
    assert found.scalars == measured(net).scalars
    vector = found.vectors["jacobian/from_input_singular_value_max_by_depth"]
    assert vector.tolist() == pytest.approx([2.0], **CLOSE)


def test_numbers_of_every_layer_on_request():
    found = measured(
        stretched(S.tolist()), by="depth", per_layer=True, layers="[12]", name="j/x"
    ).scalars
    layers = {k.removeprefix("j/x_layers/"): v for k, v in found.items() if "_l" in k}
    assert len(layers) == 3 * (1 + 2 + 2)
    assert layers["step_mean_square/2"] == pytest.approx((S[2] ** 2).mean())
    assert layers["to_output_singular_value_max/1"] == pytest.approx(4.0)
    assert layers["from_input_singular_value_min/1"] == pytest.approx(
        (S[0] * S[1]).min()
    )


def test_only_the_first_examples_are_taken_inside():
    x = torch.randn(12, 4).double()
    x[8:] = 1e3  # tanh' is 0 there
    net = nn.Sequential(
        *stretched(S[:1].tolist()), nn.Tanh(), *stretched(S[1:2].tolist())
    )
    found = measured(net, x, by="depth").scalars
    first = measured(net, x[:8], by="depth").scalars
    assert found["jacobian/singular_value_min"] == 0
    for what in ("mean_square", "singular_value_min", "isometry_gap"):
        tag = f"jacobian/step_{what}"
        assert found[tag] == pytest.approx(first[tag], **CLOSE)


class Recurrent(nn.Module):
    """h' = a h + x, element by element: ∂h_T/∂h_t = a^(T − t)."""

    def __init__(self, a, tokens=False):
        super().__init__()
        self.embed = nn.Embedding(3, 2) if tokens else nn.Identity()
        self.rnn = nn.RNN(2, 2, nonlinearity="relu", batch_first=True, bias=False)
        self.double()
        self.rnn.weight_hh_l0.data.copy_(
            torch.diag(torch.tensor(a, dtype=torch.float64))
        )
        self.rnn.weight_ih_l0.data.copy_(torch.eye(2))

    def forward(self, x):
        return self.rnn(self.embed(x))[0][:, -1]


def test_by_time_of_a_diagonal_recursion():
    a = np.array([0.5, 0.9])
    x = torch.rand(3, 5, 2).double() + 0.1
    found = measured(Recurrent(a.tolist()), x, by="time")
    scalars = {
        tag.removeprefix("jacobian_time/").removesuffix("/rnn"): value
        for tag, value in found.scalars.items()
        if tag.startswith("jacobian_time/")
    }
    assert scalars == pytest.approx(
        {
            "step_mean_square": (a**2).mean(),
            "step_singular_value_max": 0.9,
            "step_singular_value_min": 0.5,
            "step_isometry_gap": 0.81 / (a**2).mean() - 1,
            "to_end_mean_square": (a**8).mean(),
            "to_end_growth": (a**8).mean() ** 0.25,
        },
        **CLOSE,
    )
    assert found.scalars["jacobian/singular_value_max"] > 0
    lags = np.array([4, 3, 2, 1])[:, None]
    vectors = {
        "to_end_mean_square": (a ** (2 * lags)).mean(1),
        "to_end_singular_value_max": 0.9 ** lags[:, 0],
        "step_singular_value_min": np.full(4, 0.5),
    }
    for what, values in vectors.items():
        vector = found.vectors[f"jacobian_time/{what}_by_time/rnn"]
        assert vector.tolist() == pytest.approx(values.tolist(), **CLOSE)


def test_of_integers_only_the_inside_is_measured():
    torch.manual_seed(0)
    net, ids = Recurrent([0.5, 0.9], tokens=True), torch.tensor([[0, 1, 2], [2, 1, 1]])
    net.embed.weight.data.abs_()
    found = measured(net, ids, by="time").scalars
    assert all(tag.startswith("jacobian_time/") for tag in found)
    assert found["jacobian_time/step_singular_value_max/rnn"] == pytest.approx(0.9)
