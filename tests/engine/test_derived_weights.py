"""Weights that are computed from parameters are recorded as weights."""

import pytest
import recordings
import torch
from networks import Computed, sequences
from recordings import check_kernel, names, recorded, surveyed_on, with_parameters
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ntk_callbacks import plan_ntk

x = recordings.x

DERIVED = {
    "transposed": (lambda self, h: h @ self.w.mT, {"w": (6, 6)}, {"w"}),
    "sliced": (lambda self, h: h @ self.w[:6, 1:], {"w": (8, 7)}, {"w"}),
    "chunked": (lambda self, h: h @ self.w.chunk(2)[1], {"w": (12, 6)}, {"w"}),
    "expanded": (lambda self, h: h + self.p.expand(len(h), 6), {"p": (1, 6)}, {"p"}),
    "squared": (lambda self, h: h @ (self.w**2), {"w": (6, 6)}, {"w"}),
    "of_two": (
        lambda self, h: h @ (self.w * self.p),
        {"w": (6, 6), "p": 6},
        {"w", "p"},
    ),
    "normalized": (
        lambda self, h: h @ functional.normalize(self.w, dim=0),
        {"w": (6, 6)},
        {"w"},
    ),
}


@pytest.mark.parametrize("name", DERIVED)
def test_weights_that_are_computed_from_parameters(name, x):
    compute, shapes, sources = DERIVED[name]
    model = with_parameters(compute, **shapes)
    survey = surveyed_on(model, x)
    assert len(survey.recording.taps) == 3
    ((found, view),) = survey.places[1].sources
    assert set(found) == sources
    assert (view is None) == (name in {"squared", "of_two", "normalized"})
    assert not survey.exact
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_parametrizations(x):
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model = nn.Sequential(
            wrap(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)
        ).double()
        recording = recorded(model.eval(), x)
        assert names(recording) == ["linear", "linear"]
        assert plan_ntk(model, x).coverage == 1.0
        check_kernel(model.eval(), x)


def test_a_token_that_is_copied_for_every_example():
    """`repeat` copies where `expand` does not."""

    def compute(self, x):
        token = self.token.repeat(len(x), 1, 1)
        return self.head(torch.tanh(torch.cat([token, self.stem(x)], 1)).mean(1))

    model = Computed(
        compute,
        token=nn.Parameter(torch.randn(1, 1, 6)),
        stem=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    ).double()
    x = sequences().double()
    check_kernel(model, x)
    assert plan_ntk(model, x).exact.keys() <= {"token"}  # the others do not suffer
