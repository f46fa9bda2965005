"""Runs with a monitor that predicts each step, and how right it was."""

from monitored import Plain, fit, seeded
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from ntk_callbacks.callbacks.prediction import PredictionMonitor

GROUP = "prediction/"

SCORES = {
    *("loss", "loss_change_actual", "loss_change_optimizer"),
    *("loss_change_gradient_flow", "loss_change_linearized", "explained"),
    *("output_cosine", "output_error", "step_error"),
}


def trained_with(make, base=Plain):
    """A module with an optimizer made from its parameters."""

    class Module(base):
        def configure_optimizers(self):
            return make(self)

    Module.__name__ = base.__name__
    return Module


def monitor(every=1, **settings):
    return PredictionMonitor(4, every, on_error="raise", **settings)


def rows(used):
    """Step -> scores without their group, of the steps that were predicted."""
    found = {step: shortened(row) for step, row in used.history}
    return {step: row for step, row in found.items() if "step_error" in row}


def shortened(row):
    return {tag.removeprefix(GROUP): value for tag, value in row.items()}


def run(model, used, **settings):
    seeded()
    return fit(model(), [used], **({"max_steps": 8} | settings))


def groups(module):
    first, last = module.net[0].parameters(), module.net[2].parameters()
    return [{"params": [*first], "lr": 3e-4}, {"params": [*last], "lr": 3e-5}]


OPTIMIZERS = {
    "sgd": lambda m: SGD(m.parameters(), 1e-3),
    "momentum": lambda m: SGD(m.parameters(), 1e-3, momentum=0.9),
    "nesterov": lambda m: SGD(m.parameters(), 1e-3, momentum=0.9, nesterov=True),
    "decay": lambda m: SGD(m.parameters(), 1e-3, weight_decay=0.5),
    "adam": lambda m: Adam(m.parameters(), 1e-4),
    "adamw": lambda m: AdamW(m.parameters(), 1e-4, weight_decay=0.5),
    "amsgrad, looped": lambda m: Adam(
        m.parameters(), 1e-4, amsgrad=True, foreach=False
    ),
    "fused": lambda m: AdamW(m.parameters(), 1e-4, fused=True),
    "rates by group": lambda m: AdamW(groups(m)),
    "rmsprop": lambda m: RMSprop(m.parameters(), 1e-5),
}


class OwnClipping(Plain):
    """Clips layer by layer, logs and counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def configure_gradient_clipping(self, optimizer, **_):
        self.calls += 1
        for layer in (self.net[0], self.net[2]):
            norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.02)
            self.log("norm", norm, on_step=True, on_epoch=True, reduce_fx="sum")
