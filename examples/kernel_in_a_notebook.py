"""The tangent kernel of a network, cell by cell, without a trainer.

The kernel Θ(x, x′) = ∂f(x)/∂θ · ∂f(x′)/∂θ says how much a gradient step on x′ moves the
output at x. Here one sees the kernel of an untrained network on scikit-learn's digits:
its shape, how fast its eigenvalues fall off, which layer adds what, how well it already
tells the classes apart, and what it predicts for images it was not fitted to.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_callbacks import as_matrix, empirical_ntk, metrics


def main(fast: bool) -> None:
    """Look at the kernel of 200 images, or of 40."""
    torch.manual_seed(0)
    n = 40 if fast else 200
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(digits)
    seen, seen_y, new, new_y = x[:n], y[:n], x[n : 2 * n], y[n : 2 * n]
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    ntk = empirical_ntk(net, seen)
    print("kernel, examples × examples × outputs × outputs:", tuple(ntk.shape))
    share = metrics.off_diagonal_share(ntk)
    print(f"between different outputs (0 for infinite width): {share:.2%}")

    matrix = as_matrix(ntk)
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)
    shared = metrics.participation_ratio(eigenvalues)
    print("as a matrix, one row for each output:", tuple(matrix.shape))
    print(f"eigenvalues from {eigenvalues[0]:.4g} down to {eigenvalues[-1]:.3g}")
    print(f"directions that share the trace: {shared:.0f} of {len(eigenvalues)}")

    for name, part in empirical_ntk(net, seen, by="module", outputs="trace").items():
        aligned = metrics.target_alignment(part, seen_y)
        print(f"layer {name}: trace {part.trace():.4g}, target alignment {aligned:.2f}")

    # Where training on the squared loss would end if the kernel stood still: kernel
    # regression, Θ(new, seen) Θ(seen, seen)⁻¹ applied to the targets.
    traced = empirical_ntk(net, seen, outputs="trace")
    cross = empirical_ntk(net, new, seen, outputs="trace")
    targets = nn.functional.one_hot(seen_y, 10) - 0.1
    ridge = 1e-3 * traced.diagonal().mean() * torch.eye(n)
    predicted = (cross @ torch.linalg.solve(traced + ridge, targets)).argmax(1)
    right = (predicted == new_y).float().mean()
    print("kernel between new and seen images:", tuple(cross.shape))
    print(f"kernel regression reads {right:.0%} of the new images right")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
