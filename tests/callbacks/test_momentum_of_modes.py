"""Decays predicted under momentum in Lightning: resumed, scheduled, untouched."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from monitored import Plain, Recorder, examples, fit, same, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import NTKMonitor, NTKOptions, Probe

X = examples().tensors[0].double()
Y = torch.stack([X.sum(1), X.square().sum(1)], 1)


class Cycled(Plain):
    """Linear, on all examples at once, under a rate and a momentum that both move."""

    def __init__(self):
        super().__init__(nn.Linear(3, 2).double())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(X), Y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.2, total_steps=20)
        return [sgd], [{"scheduler": cycle, "interval": "step"}]


def run(callbacks, **settings):
    data = DataLoader(TensorDataset(X.repeat(2, 1), Y.repeat(2, 1)), batch_size=len(X))
    seeded()
    return fit(Cycled(), callbacks, train=data, **({"max_steps": 9} | settings))


def modes(every):
    return NTKMonitor(
        Probe(X, Y),
        every,
        metrics=["residual_modes"],
        options=NTKOptions(loss="mse_mean", history=False),
        on_error="raise",
    )


def test_training_is_bit_for_bit_the_same():
    bare, watched = run([]), run([modes(2)])
    same(bare.trace(), watched.trace())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.filterwarnings("ignore:Be aware.*add the following.*ModelCheckpoint")
def test_unbroken_and_resumed_in_the_middle_of_an_interval(tmp_path):
    unbroken = run([modes(4)]).recorder.measured()
    for step in (4, 8, 9):
        for k in range(1, 9):
            measured = unbroken[step][f"ntk_modes/decay_measured/{k}"]
            if unbroken[step][f"ntk_modes/residual/{k}"] > 1e-6:
                predicted = unbroken[step][f"ntk_modes/decay_predicted/{k}"]
                assert predicted == pytest.approx(measured, rel=1e-6)
                assert k > 1 or abs(predicted - 1) > 0.1
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    run([modes(4), saver], max_steps=6, enable_checkpointing=True)
    recorder = Recorder()
    checkpoint = str(tmp_path / "step=6.ckpt")
    run([modes(4)], logger=recorder, ckpt_path=checkpoint)
    resumed = recorder.measured()
    assert [*resumed] == [8, 9]
    for step, row in resumed.items():
        same(row, unbroken[step], f"step {step}")
