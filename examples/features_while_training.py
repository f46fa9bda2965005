"""What a rich network does to its features, and a lazy one does not.

A ReLU network reads scikit-learn's digits twice from the same start: as it is, and with
its output scaled by α = 30 and its learning rate by 1/α², which makes it lazy. The
rich one moves the features that its last layer reads: their
Gram matrix (the conjugate kernel) changes and turns to the classes, and activations
cross the elbows of their gates. The lazy one nearly keeps all three: it learns as if it
were linear in its weights.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_callbacks import Probe, dynamics, empirical_ntk
from ntk_callbacks.instruments.features import FeatureInstrument


def main(fast: bool) -> None:
    """Train both by full-batch gradient descent for 200 steps, or for 1000."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:100] / 16).float(), torch.tensor(digits[:100])
    targets = nn.functional.one_hot(y, 10).float()
    start = nn.Sequential(
        *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )
    rate = dynamics.max_learning_rate(empirical_ntk(start, x)).item() / 4

    print("step network      loss   alignment gained   kernel changed   gates flipped")
    for name, alpha in (("rich", 1), ("lazy", 30)):
        net = dynamics.scale_output(start, alpha)  # a copy, minus what it starts with
        features = FeatureInstrument()
        features.start(Probe(x, y))
        optimizer = torch.optim.SGD(net.parameters(), rate / alpha**2)
        for step in range(201 if fast else 1001):
            loss = (net(x) - targets).square().sum() / 2
            if step % 100 == 0:
                found = features.measure(net.model, step).scalars
                alignment = found["features/target_alignment"]
                first = alignment if step == 0 else first
                print(
                    f"{step:4} {name:>7} {loss.item():9.3f} {alignment - first:18.4f} "
                    f"{found['features/relative_change']:16.4f} "
                    f"{found['features/pattern_change']:15.4f}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
