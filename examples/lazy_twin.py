"""How much of what a network learns is linear, and how to make all of it so.

A small network reads scikit-learn's digits. Beside it, on the same batches and with the
same optimizer, trains its linearized twin: f(x; θ₀) + J(x; θ₀)(θ − θ₀). Where the two
part, features are learned. Then the output is scaled by α and the loss by 1/α²: the
larger α, the less weights and kernel move: the network is lazy. At the end, the change
of the kernel in one step, foretold from derivatives.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ntk_callbacks import dynamics, empirical_ntk, metrics


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of the images that are read right."""
    with torch.no_grad():
        return (model(x).argmax(1) == labels).double().mean().item()


def main(fast: bool) -> None:
    """Train with AdamW for 200 steps, or 60; then at four scales of the output."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16).float(), torch.tensor(digits)
    x, new, y, new_y = images[:1000], images[1000:], labels[:1000], labels[1000:]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    twin = dynamics.linearize(net)

    optimizers = {m: torch.optim.AdamW(m.parameters(), 0.003) for m in (net, twin)}
    steps = 60 if fast else 200
    print("step   new images read right: network, twin   distance of their outputs")
    for step in range(steps + 1):
        if step % (steps // 4) == 0:
            with torch.no_grad():
                distance = (net(new) - twin(new)).norm() / net(new).norm()
            right = [accuracy(model, new, new_y) for model in (net, twin)]
            print(f"{step:4} {right[0]:28.3f} {right[1]:9.3f} {distance:19.3f}")
        batch = torch.randint(len(x), (100,))
        for model, optimizer in optimizers.items():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    x, targets = x[:50], nn.functional.one_hot(y[:50], 10).float()
    start = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    ntk = empirical_ntk(start, x)
    rate = dynamics.max_learning_rate(ntk).item() / 4
    print("\nalpha   loss   displacement   change of the kernel")
    for alpha in (1, 4, 16, 64):
        scaled = dynamics.scale_output(start, alpha)
        sgd = torch.optim.SGD(scaled.parameters(), rate / alpha**2)
        for _ in range(30 if fast else 100):
            sgd.zero_grad()
            loss = (scaled(x) - targets).square().sum() / 2
            loss.backward()
            sgd.step()
        pairs = zip(scaled.model.parameters(), start.parameters(), strict=True)
        way = sum((p - q).norm() ** 2 for p, q in pairs).sqrt().item()
        change = metrics.relative_change(empirical_ntk(scaled.model, x), ntk)
        print(f"{alpha:5} {loss.item():6.3f} {way:14.4f} {change.item():22.5f}")

    sgd = torch.optim.SGD(start.parameters(), rate / 4)
    ((start(x) - targets).square().sum() / 2).backward()
    step = dynamics.predicted_step(sgd, start)
    foretold = dynamics.kernel_change(start, step, x).norm() / ntk.norm()
    sgd.step()
    found = metrics.relative_change(empirical_ntk(start, x), ntk)
    print(f"\none step moves the kernel by {found:.3%}; foretold: {foretold:.3%}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
