"""What a network would be at infinite width, and how near a finite one comes.

At infinite width the tangent kernel is known before any weight is drawn. Here one sees
it for scikit-learn's digits: for a fully connected network, for one with an activation
of one's own, for residual convolutions; how well kernel regression with each reads new
images; and how fast the kernels of finite networks approach it.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_callbacks import empirical_ntk, metrics
from ntk_callbacks.theory import (
    activate,
    convolution,
    dense,
    flatten,
    fully_connected,
    infinite_width_kernels,
    residual,
    sequential,
)


def reading(ntk: torch.Tensor, targets: torch.Tensor, n: int) -> float:
    """Share of the images after the first n that regression on those reads right."""
    ridge = 1e-6 * ntk.diagonal().mean() * torch.eye(n)
    weights = torch.linalg.solve(ntk[:n, :n] + ridge, targets[:n])
    right = (ntk[n:, :n] @ weights).argmax(1) == targets[n:].argmax(1)
    return right.double().mean().item()


def main(fast: bool) -> None:
    """Fit 500 images, or 100, and look at networks of width up to 1024, or 64."""
    torch.manual_seed(0)
    n = 100 if fast else 500
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels[: n + 100] / 16).reshape(-1, 1, 8, 8)
    targets = nn.functional.one_hot(torch.tensor(digits[: n + 100])).double() - 0.1

    # Layers are functions of kernels: networks are composed as in torch.nn.
    wavy = activate(lambda x: x + torch.sin(3 * x) / 3)
    block = residual(sequential(activate("relu"), convolution(2**0.5, 0.1)))
    networks = {
        "erf": sequential(dense(1.5, 0.1), activate("erf"), dense(1.5, 0.1)),
        "my own": sequential(dense(1.5, 0.1), wavy, dense(1.5, 0.1)),
        "convolutions": sequential(
            *(convolution(2**0.5, 0.1), block, block, activate("relu")),
            *(flatten(), dense(1.0)),
        ),
    }
    for name, network in networks.items():
        flat = images if name == "convolutions" else images.flatten(1)
        ntk = infinite_width_kernels(network, flat, pixels="same").ntk
        right = reading(ntk, targets, n)
        print(f"{name}: kernel regression reads {right:.0%} of the new images right")

    # A finite network draws its kernel; the distance to the limit falls as 1/√width.
    few = images[:10].flatten(1)
    for width in (16, 64) if fast else (64, 256, 1024):
        scales = {"depth": 1, "activation": "relu", "sigma_w": 2**0.5, "sigma_b": 0.1}
        limit = fully_connected(few, **scales, parametrization="standard", width=width)
        changes = []
        for _ in range(10):
            net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 1))
            for layer in (net[0], net[2]):
                nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
                nn.init.normal_(layer.bias, std=0.1)
            found = empirical_ntk(net.double(), few, outputs="trace")
            changes.append(metrics.relative_change(found, limit.ntk))
        mean = torch.stack(changes).mean()
        print(f"width {width}: off the infinite kernel by {mean:.1%}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
