"""How far do signals get? Three random networks beside mean-field theory.

In a wide network of random weights the size q of the pre-activations and the
correlation c of two inputs settle layer by layer, and gradients grow by χ per layer on
their way back. Ordered networks (χ < 1) forget what set two inputs apart, chaotic ones
(χ > 1) what they had in common; at the edge of chaos both survive depth.
"""

import sys

import torch
from torch import nn

from ntk_callbacks import Probe, signal_statistics
from ntk_callbacks.instruments.signal import SignalInstrument


def network(width: int, depth: int, sigma_w: float, sigma_b: float) -> nn.Sequential:
    """Random tanh network with W ~ N(0, σ_w²/width) and b ~ N(0, σ_b²)."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.weight, std=sigma_w / width**0.5)
        nn.init.normal_(layer.bias, std=sigma_b)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def main(fast: bool) -> None:
    """Networks of width 1000, or of width 200."""
    torch.manual_seed(0)
    width, depth, sigma_b = 200 if fast else 1000, 16, 0.05**0.5
    x = torch.randn(width) + 0.5 * torch.randn(8, width)

    for phase, sigma_w in {"ordered": 0.9, "critical": 1.327, "chaotic": 2.0}.items():
        net = network(width, depth, sigma_w, sigma_b)
        found = signal_statistics(net, x)  # found.q, found.c, found.chi by depth

        # What SignalMonitor logs while a network trains: the same, beside what theory
        # makes of each layer from the one before it.
        instrument = SignalInstrument()
        instrument.start(Probe(x))
        measurement = instrument.measure(net, 0)
        by_depth = {
            what: measurement.vectors[f"signal/{what}_mean_field_by_depth"]
            for what in ("q", "c", "chi")
        }
        print(f"{phase}: sigma_w = {sigma_w}")
        print("  layer      q (theory)      c (theory)    chi (theory)")
        for layer in (1, 3, 7, 14):
            numbers = "".join(
                f" {getattr(found, what)[layer]:6.3f} ({theory[layer]:6.3f})"
                for what, theory in by_depth.items()
            )
            print(f"  {layer + 1:5d}{numbers}")
        growth = measurement.scalars["signal/chi"] ** (depth - 1)
        print(f"  squared gradients grow {growth:.3g} times on their way back")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
