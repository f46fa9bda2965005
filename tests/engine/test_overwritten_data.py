"""Data that a model overwrites after their use are not used as they are then."""

import logging

import pytest
import recordings
import torch
from oracles import TOLERANCE, ntk_by_loop, relative_error
from recordings import check_kernel, recorded, surveyed_on, with_parameters

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine.sides import ChangedModelError, Side
from ntk_callbacks.functional import ModelFunction

x = recordings.x


def overwritten_later(self, h):
    """Allowed: a sum does not need its terms for the backward pass."""
    y = h + self.p
    return torch.tanh(y) + h.mul_(2)


def test_data_that_is_overwritten_after_its_use(x):
    model = with_parameters(overwritten_later, p=6)
    recording = recorded(model, x)
    assert [tap.unchanged for tap in recording.taps] == [True, False, True]
    plan = plan_ntk(model, x)
    reason = "the model cannot be looked into: an input was overwritten after its use"
    assert plan.exact["p"] == reason
    check_kernel(model, x)


def test_a_side_refuses_what_was_overwritten(x):
    model = with_parameters(overwritten_later, p=6)
    survey = surveyed_on(model, x)
    function = ModelFunction(model)
    side = Side(function, function.params, x, survey.places, list(function.params))
    members = {name: found[0] for name, found in survey.members.items()}
    side.use(members["stem.weight"])
    with pytest.raises(ChangedModelError, match="overwritten after its use"):
        side.use(members["p"])


def test_a_model_that_starts_to_overwrite_is_planned_anew(x, caplog):
    def compute(self, h):
        y = h + self.p
        return torch.tanh(y) + (h.mul_(2) if self.overwrite else h * 2)

    model = with_parameters(compute, p=6)
    model.overwrite = False
    plan = plan_ntk(model, x)
    assert plan.coverage == 1.0
    model.overwrite = True
    with caplog.at_level(logging.INFO, "ntk_callbacks"):
        ntk = empirical_ntk(model, x, route=plan)
    assert "planned anew, because an input was overwritten after its use" in caplog.text
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE
