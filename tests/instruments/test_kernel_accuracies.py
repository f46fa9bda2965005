"""Accuracies of kernel regression against solves by rows."""

import copy
import math

import numpy as np
import pytest
import torch
from instrumented import LABELS, inputs, network
from linearizations import jacobian_by_rows, measured
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from ntk_callbacks import Probe
from ntk_callbacks.instruments.after_kernel import kernel_accuracy
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions


def traced_by_rows(net, x):
    rows = jacobian_by_rows(net, x).view(len(x), 3, -1).numpy()
    return np.einsum("ikp,jkp->ij", rows, rows) / 3


def solved(ntk, labels, held_out, ridge):
    n = len(labels)
    y = np.full((n, 3), -1 / 3)
    y[range(n), labels] += 1
    theta = ntk[:n, :n]
    shifted = theta + ridge * np.trace(theta) / n * np.eye(n)
    predicted = ntk[n:, :n] @ np.linalg.solve(shifted, y)
    return float((predicted.argmax(1) == held_out.numpy()).mean())


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_accuracies_against_a_solve(ridge):
    x, new = inputs(12, 1), inputs(40, 2)
    rule = torch.randn(3, 3, dtype=torch.float64)
    y, new_y = (x @ rule).argmax(1), (new @ rule).argmax(1)
    net = network()
    instrument = LinearizationInstrument(
        held_out=Probe(new, new_y), options=LinearizationOptions(ridge=ridge)
    )
    instrument.start(Probe(x, y))
    before = measured(instrument, net, 0)
    start = copy.deepcopy(net)
    optimizer = Adam(net.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    found = measured(instrument, net, 10)
    both = torch.cat([x, new])
    expected = {
        "network_accuracy": (net(new).argmax(1) == new_y).double().mean().item(),
        "after_kernel_accuracy": solved(traced_by_rows(net, both), y, new_y, ridge),
        "initial_kernel_accuracy": solved(traced_by_rows(start, both), y, new_y, ridge),
    }
    assert {k: found[k] for k in expected} == expected
    assert before["after_kernel_accuracy"] == expected["initial_kernel_accuracy"]
    assert len(set(expected.values())) == 3  # so that none passes for another
    assert min(expected.values()) > 0.4


def test_accuracy_counts_labeled_examples():
    ntk = torch.eye(3).repeat(2, 2).double()  # each held-out one is like one of probe
    labels = torch.tensor([0, 1, -100])
    asked = torch.tensor([0, 0, -100])
    assert kernel_accuracy(ntk, labels, asked, 2, ridge=1.0) == 0.5
    assert math.isnan(kernel_accuracy(ntk, labels, labels * 0 - 100, 2, ridge=0.0))


def test_inputs_of_several_tensors_are_joined():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, a, b):
            return self.net(a + b)

    net, x, new = Sum(), inputs(5, 1), inputs(5, 2)
    found = []
    for split in (lambda z: {"a": z, "b": 0 * z}, lambda z: (z - 1, 0 * z + 1)):
        instrument = LinearizationInstrument(held_out=Probe(split(new), LABELS))
        instrument.start(Probe(split(x), LABELS))
        found.append(measured(instrument, net, 0)["after_kernel_accuracy"])
    both = torch.cat([x, new])
    assert found == [solved(traced_by_rows(net.net, both), LABELS, LABELS, 1e-3)] * 2
