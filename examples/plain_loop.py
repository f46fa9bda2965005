"""Monitoring a training loop written by hand: no Lightning, only instruments.

An instrument measures a model when it is told to and returns numbers, spectra and
matrices under the names they are logged by. TensorBoard then shows, beside the loss,
the groups `ntk`, `params` and `jacobian` while a network learns scikit-learn's digits:
measured densely at the start, where the kernel moves fastest.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ntk_callbacks import Probe, log_spaced
from ntk_callbacks.instruments.jacobian import JacobianInstrument
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.parameters import ParameterDriftInstrument
from ntk_callbacks.reporting.images import heat_map


def main(fast: bool) -> None:
    """Train for 500 steps, or for 10."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(digits)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters())

    instruments = [KernelInstrument(), ParameterDriftInstrument(), JacobianInstrument()]
    for instrument in instruments:
        instrument.start(Probe(x[:64], y[:64]))
    schedule = log_spaced(5)  # steps 1, 2, 3, 4, 6, 10, 16, 25, …

    with SummaryWriter() as writer:
        for step in range(10 if fast else 500):
            if step == 0 or schedule.due(step):
                for instrument in instruments:
                    found = instrument.measure(net, step)
                    for tag, value in found.scalars.items():
                        writer.add_scalar(tag, value, step)
                    for tag, vector in found.vectors.items():
                        writer.add_histogram(tag, vector, step, bins="auto")
                    for tag, matrix in found.matrices.items():
                        writer.add_image(tag, heat_map(matrix), step)
            batch = torch.randint(len(x), (64,))
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            writer.add_scalar("loss/train", loss.item(), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"loss {loss.item():.3f} after {step + 1} steps")
    print(f"Look at the curves with: tensorboard --logdir {writer.log_dir}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
