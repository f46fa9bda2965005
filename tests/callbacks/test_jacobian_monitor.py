"""JacobianMonitor inside networks, in real runs: nothing changes, failures are said."""

import pytest
import torch
from monitored import Delicate, Plain, fit, loader, same, seeded
from torch import nn

from ntk_callbacks import JacobianMonitor


class Recurrent(Plain):
    """A recurrent network on sequences of three numbers."""

    def __init__(self):
        super().__init__(nn.GRU(1, 2, batch_first=True))

    def forward(self, x):
        return self.net(x[..., None])[0][:, -1]


def run(kind, callbacks=(), **settings):
    seeded()
    return fit(kind(), list(callbacks), **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "tag"),
    [
        (Delicate, {"by": "depth"}, "jacobian/step_mean_square"),
        (
            Delicate,
            {"by": "depth", "mode": "train", "per_layer": True},
            "jacobian_layers/to_output_mean_square/net.0",
        ),
        (Recurrent, {"by": "time"}, "jacobian_time/to_end_growth/net"),
    ],
    ids=["depth", "train", "time"],
)
def test_training_is_the_same_to_the_last_bit(kind, settings, tag):
    data = {"train": loader(12, shuffle=True), "val": loader(6)}
    if kind is Recurrent:
        data.pop("val")
    monitor = JacobianMonitor(4, 4, on_error="raise", **settings)
    monitored = run(kind, [monitor], **data)
    assert monitored.recorder.steps(tag) == [0, 4, 8]
    same(monitored.trace(), run(kind, **data).trace())


def test_what_has_no_states_warns_and_training_goes_on():
    with pytest.warns(UserWarning, match=r"no recurrent module.*by=.depth"):
        done = run(Plain, [JacobianMonitor(4, 1, by="time")])
    assert not done.recorder.measured()
    same(done.trace(), run(Plain).trace())


def test_state_keys_tell_monitors_apart():
    keys = {
        JacobianMonitor(**settings).state_key
        for settings in ({}, {"by": "depth"}, {"by": "time"})
    }
    assert len(keys) == 3


def test_logged_is_what_the_weights_say():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    done = run(Plain, [JacobianMonitor(x, 4, by="depth", on_error="raise")])
    net = done.model.net
    slopes = torch.diag_embed(1 - net[0](x).detach().double().tanh() ** 2)
    s = torch.linalg.svdvals(net[2].weight.detach().double() @ slopes)
    found = done.recorder.measured()[8]
    assert found["jacobian/step_mean_square"] == pytest.approx(
        float(s.square().mean()), rel=1e-5
    )
    assert found["jacobian/step_singular_value_max"] == pytest.approx(
        float(s.max()), rel=1e-5
    )
