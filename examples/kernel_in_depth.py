"""Gradient descent looked at mode by mode, and how near the edge of stability.

Full-batch gradient descent on scikit-learn's digits. Along each of the top modes of the
kernel the gradient of the loss by the outputs should shrink by ∏(1 − ηsλ); what it does
is measured beside that. Meanwhile the sharpness of the loss moves against 2/η, the
largest that this learning rate can stand. No trainer: an instrument in a plain loop,
which is told of each step for the sake of its learning rate.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_callbacks import Probe
from ntk_callbacks.instruments.kernel import KernelInstrument

WANTED = ["residual_modes", "sharpness", "sharpness_limit", "sharpness_ratio"]
DRIFT = ["scale_change", "shape_change", "drift_noise_floor", "class_ratio"]


def main(fast: bool) -> None:
    """Train for 100 steps, or for 20."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:50] / 16).float(), torch.tensor(digits[:50])
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)

    instrument = KernelInstrument(metrics=WANTED + DRIFT)
    instrument.optimizers = [optimizer]  # learning rates, for the two predictions
    instrument.start(Probe(x, y))
    instrument.measure(net, 0)
    every = 5

    print("step  mode  decay measured (predicted)   sharpness / limit")
    for step in range(1, (20 if fast else 100) + 1):
        instrument.count_step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step % every == 0:
            found = instrument.measure(net, step).scalars
            for mode in (1, 2, 8):
                measured = found[f"ntk_modes/decay_measured/{mode}"]
                predicted = found[f"ntk_modes/decay_predicted/{mode}"]
                print(f"{step:4d}  {mode:4d}  {measured:.4f} ({predicted:.4f})", end="")
                print(f"   {found['ntk/sharpness_ratio']:.3f}" if mode == 1 else "")

    scale, shape = found["ntk/scale_change"], found["ntk/shape_change"]
    print(f"the kernel has grown by {scale:+.3f} along its start, {shape:.3f} is new;")
    print(f"other examples would change that by {found['ntk/drift_noise_floor']:.3f}")
    print(
        f"within classes it is {found['ntk/class_ratio']:.2f} times that between them"
    )


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
