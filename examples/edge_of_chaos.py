"""Where a deep network can be trained: order, chaos, and the edge between them.

Mean-field theory says from σ_w and σ_b alone how many layers a signal survives (ξ) and
by what factor each layer multiplies a gradient (χ). Here one sees the phase diagram of
tanh, and what a network of width 300 does on either side of the edge and on it, beside
the singular values s of its input-output Jacobian that random matrix theory predicts.
"""

import sys

import torch
from torch import nn

from ntk_callbacks import input_singular_values, theory


def show_map(columns: int, rows: int) -> None:
    """Phases over σ_w (across) and σ_b (up), and how deep signals reach."""
    sigma_w = torch.linspace(0.6, 2.6, columns)
    sigma_b = torch.linspace(0.0, 0.6, rows).flip(0)
    found = theory.phase_diagram("tanh", sigma_w, sigma_b)
    print("order (.), chaos (*) and the edge (#: signals survive 30 layers or more)")
    for i, b in enumerate(sigma_b):
        marks = [
            "#" if found.xi_c[i, j] > 30 else "*" if found.is_chaotic[i, j] else "."
            for j in range(columns)
        ]
        print(f"σ_b {b:.2f} ", "".join(marks))
    print(f"σ_w from {sigma_w[0]:.1f} to {sigma_w[-1]:.1f}")


def network(depth: int, sigma_w: float, sigma_b: float, orthogonal: bool) -> nn.Module:
    """Layers of 300 tanh units with given scales."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(300, 300).double()
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gain=sigma_w)
        else:
            nn.init.normal_(layer.weight, std=sigma_w / 300**0.5)
        nn.init.normal_(layer.bias, std=sigma_b)
        layers += [nn.Tanh(), layer]
    return nn.Sequential(*layers)


def main(fast: bool) -> None:
    """Draw the map, then measure networks of 10 layers, or of 20."""
    torch.manual_seed(0)
    show_map(*((21, 3) if fast else (41, 7)))
    depth, sigma_b = (10, 0.2) if fast else (20, 0.2)
    edge = theory.critical_sigma_w("tanh", sigma_b).item()
    print(f"critical at σ_b = {sigma_b}: σ_w = {edge:.4f}")
    print("σ_w     weights     mean s², predicted   largest s², predicted")
    for sigma_w in (0.8 * edge, edge, 1.3 * edge):
        for weights in ("gaussian", "orthogonal"):
            expected = theory.jacobian_moments("tanh", sigma_w, sigma_b, depth, weights)
            q = theory.mean_field("tanh", sigma_w, sigma_b).q
            x = q.sqrt() * torch.randn(4, 300).double()
            net = network(depth, sigma_w, sigma_b, weights == "orthogonal")
            squares = input_singular_values(net, x) ** 2
            mean, largest = squares.mean(), squares.amax(1).mean()
            print(
                f"{sigma_w:.4f}  {weights:10} {mean:9.3g} {expected.mean:9.3g}", end=""
            )
            print(f"   {largest:9.3g} {expected.maximum:9.3g}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
