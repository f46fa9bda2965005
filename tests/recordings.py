"""Forward passes that are recorded, and looks inside the recording."""

import pytest
import torch
from cases import in_double
from networks import Computed, vectors
from oracles import TOLERANCE, each, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.engine.backward import graph_nodes
from ntk_callbacks.engine.recording import record
from ntk_callbacks.engine.survey import surveyed
from ntk_callbacks.functional import ModelFunction


def recorded(model, x):
    """The taps of a forward pass."""
    function = ModelFunction(model)
    params = function.params | function.fixed
    return record(function, params, each(in_double, x), list(function.params))


def surveyed_on(model, x):
    function = ModelFunction(model)
    params = function.params | function.fixed
    return surveyed(function, params, each(in_double, x), list(function.params))


def names(recording):
    return [tap.function.__name__ for tap in recording.taps]


def bypassing(recording):
    """Parameters that autograd reaches past the taps."""
    leaves = {id(leaf): name for name, leaf in recording.parameters.items()}
    nodes = graph_nodes(recording.outputs)
    found = {leaves.get(id(getattr(node, "variable", None))) for node in nodes}
    return found - {None}


def with_parameters(compute, **shapes):
    """A computation between two linear layers, in float64."""
    members = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return Computed(
        lambda self, x: self.head(torch.tanh(compute(self, self.stem(x)))),
        stem=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
        **members,
    ).double()


def check_kernel(model, x):
    ntk = empirical_ntk(model, x)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


@pytest.fixture
def x():
    return vectors().double()
