"""Monitoring a loop of Lightning Fabric: instruments take what `fabric.setup` returns.

The loop owns the steps, mixed precision and devices are Fabric's, and an instrument
measures when it is told to: in the precision of the weights, whatever the loop trains
in, and without a trace on the training. One process measures; the others go on.
"""

import sys

import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import Probe, log_spaced
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.parameters import ParameterDriftInstrument
from ntk_callbacks.reporting.loggers import report


def main(fast: bool) -> None:
    """Train for 20 epochs, or for 1."""
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    fabric.seed_everything(0, verbose=False)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(digits)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
    data = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    loader = fabric.setup_dataloaders(data)

    logger = TensorBoardLogger("fabric", name=None, default_hp_metric=False)
    instruments = [KernelInstrument(), ParameterDriftInstrument()]
    for instrument in instruments:
        instrument.start(Probe(x[:64], y[:64]))
    schedule = log_spaced(5)  # steps 1, 2, 3, 4, 6, 10, 16, 25, …

    step = 0
    for _ in range(1 if fast else 20):
        for inputs, targets in loader:
            if fabric.is_global_zero and (step == 0 or schedule.due(step)):
                for instrument in instruments:
                    report(instrument.measure(model, step), [logger])
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            logger.log_metrics({"loss/train": loss.item()}, step=step)
            step += 1
    logger.save()
    print(f"loss {loss.item():.3f} after {step} steps")
    print(f"Look at the curves with: tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
