"""What cannot be measured is said, with what to do; the training does not notice."""

import re

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from monitored import Plain, examples, fit, loader
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset
from unmeasurable import (
    NoForward,
    Tokens,
    TwoLoaders,
    TwoResults,
    refused,
    token_loader,
    warned,
)

from ntk_callbacks import JacobianMonitor, NTKMonitor, NTKOptions, ParameterDriftMonitor
from ntk_callbacks.errors import MemoryBudgetError, ProbeError, UnsupportedModelError


class Triples(Plain):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


def triple_loader():
    x, y = examples().tensors
    return DataLoader(TensorDataset(x, y, y), batch_size=3)


class Complex(Plain):
    def forward(self, x):
        return torch.complex(self.net(x), self.net(x))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).abs().mean()


class Noisy(Plain):
    """Draws random numbers in evaluation too."""

    def forward(self, x):
        return self.net(x + torch.randn_like(x))


REFUSALS = {
    "more examples than there are": (
        Plain,
        lambda: NTKMonitor(13),
        "hold 12 examples, fewer than the 13 asked for. Ask for at most 12",
        {},
    ),
    "a memory budget nothing fits into": (
        Plain,
        lambda: NTKMonitor(4, options=NTKOptions(memory_budget="10B")),
        "MemoryBudgetError.*the budget is .*Raise `memory_budget`",
        {},
    ),
    "a memory budget for Jacobians": (
        Plain,
        lambda: JacobianMonitor(4, memory_budget=10),
        "MemoryBudgetError.*Raise `memory_budget`",
        {},
    ),
    "derivatives by tokens": (
        Tokens,
        lambda: JacobianMonitor(4),
        "torch.int64.*pass them as the inputs and an `output_fn`",
        {"train": token_loader},
    ),
    "two results": (
        TwoResults,
        lambda: NTKMonitor(4),
        re.escape("`output_fn=lambda model, x: model(x)[0]`"),
        {},
    ),
    "no forward": (
        NoForward,
        lambda: JacobianMonitor(4),
        re.escape("`output_fn=lambda module, x: module.net(x)`"),
        {},
    ),
    "complex outputs": (Complex, lambda: NTKMonitor(4), "real and imaginary parts", {}),
    "random outputs": (Noisy, lambda: NTKMonitor(4), "draws random numbers", {}),
    "loaders in a dict": (
        TwoLoaders,
        lambda: NTKMonitor(4),
        r"Build the probe yourself: Probe\(inputs, targets\)",
        {"train": lambda: {"first": loader(), "second": loader(6)}},
    ),
    "a combined loader": (
        TwoLoaders,
        lambda: JacobianMonitor(4),
        r"Build the probe yourself: Probe\(inputs, targets\)",
        {"train": lambda: CombinedLoader({"first": loader(), "second": loader(6)})},
    ),
    "batches of three": (
        Triples,
        lambda: NTKMonitor(4),
        r"expected \(x, y\).*Build the probe yourself",
        {"train": triple_loader},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_at_once_with_a_way_out(case):
    """Modes 20 and 29 among them."""
    model, monitor, what, settings = REFUSALS[case]
    loaders = {}
    if "train" in settings:
        torch.manual_seed(1)
        loaders["train"] = settings["train"]()
    refused(model, monitor, what, **loaders)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_raises_if_asked_for(case):
    model, make, _, settings = REFUSALS[case]
    monitor = make()
    monitor.failures.on_error = "raise"
    kinds = (MemoryBudgetError, ProbeError, UnsupportedModelError)
    with pytest.raises(kinds):
        fit(model(), [monitor], **{k: v() for k, v in settings.items()})


# Models that are not ready -----------------------------------------------------------


class Lazy(Plain):
    """Without shapes until the first batch."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", [NTKMonitor, JacobianMonitor])
def test_lazy_modules_are_refused(kind):
    """Mode 31."""
    refused(Lazy, lambda: kind(4, 2), "'net.0.weight' is lazy.*Run one batch")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_drift_from_their_first_shape_on():
    run, texts = warned(Lazy, lambda: ParameterDriftMonitor(2))
    assert len(texts) == 1
    assert "uninitialized" in texts[0].lower() or "lazy" in texts[0]
    measured = run.recorder.measured()
    assert [*measured] == [2, 4, 6, 8]
    assert measured[2]["params/displacement"] == 0.0


def test_nothing_to_train():
    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.free = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            return self.free * mse_loss(self(batch[0]), torch.zeros(3, 2))

    chosen = NTKMonitor(4, 2, parameters="net", on_error="raise")
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        fit(Frozen(), [chosen])
    by_hand = NTKMonitor(
        4, 2, parameters=lambda name, p: name.startswith("net"), on_error="raise"
    )
    assert [*fit(Frozen(), [by_hand]).recorder.measured()] == [0, 2, 4, 6, 8]
