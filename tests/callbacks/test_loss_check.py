"""Whether a monitor notices that labels are trained with another loss than it takes."""

import pytest
import torch
from monitored import Delicate, Plain, fit, loader, same, seeded
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.utils.data import DataLoader

from ntk_callbacks import NTKMonitor, NTKOptions, Probe

WEIGHTS = torch.tensor([3.0, 0.5])


def penalized(f, y):
    return cross_entropy(f, y) + 0.1 * f.square().mean()


OTHER_LOSSES = {
    "smoothed": lambda f, y: cross_entropy(f, y, label_smoothing=0.1),
    "weighted": lambda f, y: cross_entropy(f, y, weight=WEIGHTS.to(f)),
    "summed": lambda f, y: cross_entropy(f, y, reduction="sum"),
    "penalized": penalized,
    "squares": lambda f, y: mse_loss(f, one_hot(y, 2).to(f)),
}


class Trained(Plain):
    """With the loss that is given."""

    def __init__(self, loss_fn=cross_entropy, net=None):
        super().__init__(net)
        self.loss_fn = loss_fn

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss_fn(self(x), y)


def deep():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def monitor(*names, loss=None):
    options = NTKOptions(loss=loss, history=False)
    names = names or ("sharpness", "residual_modes")
    return NTKMonitor(6, 1, metrics=names, options=options, on_error="raise")


def run(module, watching=None, **settings):
    callbacks = [] if watching is None else [watching]
    return fit(module, callbacks, **({"max_steps": 3} | settings))


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_another_loss_is_told_once(name):
    seeded()
    module = Trained(OTHER_LOSSES[name])
    with pytest.warns(UserWarning, match=r"NTKMonitor: the training loss") as told:
        run(module, monitor(), max_steps=5)
    assert len([w for w in told if "the training loss" in str(w.message)]) == 1


@pytest.mark.parametrize("net", [None, deep], ids=["plain", "BatchNorm"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_nothing_is_told_of_the_loss_that_is_taken(net, settings):
    seeded()  # warnings are errors
    run(Trained(net=net and net()), monitor(), **settings)


def test_numbers_of_the_message():
    seeded()
    module = Trained(OTHER_LOSSES["summed"])
    x, y = next(iter(loader()))
    with torch.no_grad():
        mean = cross_entropy(module.net(x), y).item()
    with pytest.warns(UserWarning, match="the training loss") as told:
        run(module, monitor(), accumulate_grad_batches=2)
    (text,) = [str(w.message) for w in told if "the training loss" in str(w.message)]
    assert f"a batch is {3 * mean:.4g}," in text
    assert f"outputs on it {mean:.4g}." in text


@pytest.mark.parametrize(
    "watching",
    [
        lambda: monitor(loss="cross_entropy_mean"),  # confirmed
        lambda: monitor("trace", "max_learning_rate"),  # needs no loss
    ],
)
def test_nothing_is_told_where_no_loss_is_taken(watching):
    seeded()
    run(Trained(OTHER_LOSSES["weighted"]), watching())


def test_nothing_is_told_of_networks_with_chance():
    seeded()
    net = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    run(Trained(OTHER_LOSSES["weighted"], net), monitor())


def test_batches_of_another_kind_are_passed_over():
    class Odd(Trained):
        def training_step(self, batch, batch_idx):
            x, y = batch["many"]["things"]
            return cross_entropy(self(x), y)

    x, y = next(iter(loader(6, 6)))
    data = DataLoader([{"many": {"things": (x, y)}}] * 3, batch_size=None)
    options = NTKOptions(history=False)
    watching = NTKMonitor(
        Probe(x, y), 1, metrics=["sharpness"], options=options, on_error="raise"
    )
    seeded()
    found = run(Odd(), watching, train=data).recorder.measured()
    assert found[3]["ntk/sharpness"] > 0


@pytest.mark.parametrize("kind", [Trained, Delicate])
def test_training_is_bit_for_bit_the_same(kind):
    traces = []
    for watching in (None, monitor()):
        seeded()
        val = loader() if kind is Delicate else None
        traces.append(run(kind(), watching, val=val).trace())
    same(*traces)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_without_a_loss_leaves_the_check_to_the_next():
    class Skipping(Trained):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    seeded()
    with pytest.warns(UserWarning, match="the training loss"):
        run(Skipping(OTHER_LOSSES["weighted"]), monitor())
