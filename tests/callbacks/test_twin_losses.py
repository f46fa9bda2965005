"""A training loss that is not the twin's is told of once; the same is never doubted."""

import pytest
import torch
from linearized import monitor, run, smoothed
from monitored import FloatPrecision, Plain, same
from torch import nn
from torch.nn.functional import cross_entropy


def other(loss, since=0, **settings):
    """Trained on a loss of outputs, labels and weights, from an epoch on."""

    class Module(Plain):
        def __init__(self):
            dropout, batchnorm = settings.get("dropout", 0.0), nn.Identity()
            if settings.get("batchnorm"):
                batchnorm = nn.BatchNorm1d(4)
            net = nn.Linear(3, 4), batchnorm, nn.Tanh(), nn.Dropout(dropout)
            super().__init__(nn.Sequential(*net, nn.Linear(4, 2)))

        def training_step(self, batch, batch_idx):
            x, y = batch
            if self.current_epoch < since:
                return super().training_step(batch, batch_idx)
            return loss(self(x), y, self)

    return Module


def mean(f, y, _):
    return cross_entropy(f, y)


LOSSES = {
    "sum": lambda f, y, _: cross_entropy(f, y, reduction="sum"),
    "smoothed": lambda f, y, _: smoothed(f, y),
    "weighted": lambda f, y, _: cross_entropy(f, y, torch.tensor([1.0, 1.1])),
    "penalty": lambda f, y, m: (
        mean(f, y, m) + 0.05 * sum(p.square().sum() for p in m.parameters())
    ),
    "augmented": lambda f, y, m: mean(f + 0.5 * torch.randn_like(f), y, m),
}

SETTINGS_OF_LOSSES = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2, "max_steps": 4},
    "bf16": {"precision": "bf16-true"},
}

OTHER = "learns something else than the network. On a batch after step"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("setting", SETTINGS_OF_LOSSES)
@pytest.mark.parametrize("batchnorm", [False, True])
def test_other_losses_are_told_of_once(loss, setting, batchnorm):
    model, used = other(LOSSES[loss], batchnorm=batchnorm), monitor(4)
    with pytest.warns(UserWarning, match=f"{OTHER} 0 .*loss_fn") as caught:
        watched = run(model, [used], **SETTINGS_OF_LOSSES[setting])
    assert len([w for w in caught if OTHER in str(w.message)]) == 1
    bare = run(model, **SETTINGS_OF_LOSSES[setting]).trace()
    same({**watched.trace(), "logged": bare["logged"]}, bare)


@pytest.mark.parametrize("given", [{}, {"batchnorm": True}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_the_same_loss_is_never_doubted(given, precision):
    """Nor any where dropout hides it."""
    run(other(mean, **given), [monitor(4)], precision=precision, max_steps=40)
    loss = (
        smoothed if "dropout" not in given else (lambda f, y: 3 * cross_entropy(f, y))
    )
    model = other(lambda f, y, _: smoothed(f, y), **given)
    run(model, [monitor(4, loss_fn=loss)], precision=precision, max_steps=8)


def test_losses_that_change_on_the_way_are_told_of():
    model = other(LOSSES["smoothed"], since=2)
    with pytest.warns(UserWarning, match=f"{OTHER} 9 "):
        run(model, [monitor(4)], max_steps=12)


def test_a_loss_is_looked_at_through_a_scaler():
    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return FloatPrecision("16-mixed", "cpu", scaler)

    run(other(mean), [monitor(4)], plugins=scaled())
    with pytest.warns(UserWarning, match=f"{OTHER} 0 "):
        run(other(LOSSES["sum"]), [monitor(4)], plugins=scaled())
