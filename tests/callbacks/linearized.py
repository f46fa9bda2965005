"""Runs with a monitor of the linearized network, and what it measured."""

from monitored import Plain, examples, fit, seeded
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from ntk_callbacks import Probe
from ntk_callbacks.callbacks.linearization import LinearizationMonitor

TAGS = {"output_distance", "loss", "loss_gap", "agreement", "parting_step"}

TWIN = {"twin_output_distance", "twin_loss", "twin_agreement", "twin_parting_step"}

ACCURACIES = {"network_accuracy", "after_kernel_accuracy", "initial_kernel_accuracy"}


def held_out():
    x, y = examples(20).tensors
    return Probe(x[12:], y[12:])


def monitor(every=2, *, twin=True, **settings):
    return LinearizationMonitor(6, every, twin=twin, on_error="raise", **settings)


def rows(used):
    """Step -> values without their group."""
    return {
        step: {tag.removeprefix("linear/"): value for tag, value in row.items()}
        for step, row in used.history
    }


def run(model, callbacks=(), **settings):
    seeded()
    return fit(model(), list(callbacks), **({"max_steps": 8} | settings))


class Linear(Plain):
    """Three features, two logits."""

    def __init__(self):
        super().__init__(nn.Linear(3, 2))

    def configure_optimizers(self):
        return AdamW(self.parameters(), 0.1, weight_decay=0.1)


def smoothed(logits, labels):
    return cross_entropy(logits, labels, label_smoothing=0.2)
