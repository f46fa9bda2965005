"""What the kernel at initialization predicts of training, beside the training itself.

A network is trained on scikit-learn's digits by full-batch gradient descent. Before
its first step the kernel says which learning rate is too large, how the loss on seen
and new images will fall, and when to stop; the wider the network, the better. At the
end a step of AdamW, which the plain kernel takes for one of gradient descent.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from ntk_callbacks import TangentOperator, dynamics, empirical_ntk


def main(fast: bool) -> None:
    """Train a network of width 1024 on 60 images, or of 256 on 20."""
    torch.manual_seed(0)
    n, width = (20, 256) if fast else (60, 1024)
    steps = [0, 10, 100] if fast else [0, 10, 100, 1000]
    images, digits = load_digits(return_X_y=True)
    x, new = torch.tensor(images / 16)[: 2 * n].split(n)
    classes = nn.functional.one_hot(torch.tensor(digits)[: 2 * n], 10)
    y, new_y = classes.double().split(n)
    net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()

    ntk, cross = empirical_ntk(net, x), empirical_ntk(net, new, x)
    with torch.no_grad():
        f0, new_f0 = net(x), net(new)
    test = {"ntk_test": cross, "f0_test": new_f0}
    # The loss is ½ Σ (f − y)²; for a mean over N images both rates are N times larger.
    limit = dynamics.max_learning_rate(ntk).item()
    rate = limit / 2
    slow = dynamics.learning_steps(ntk, learning_rate=rate)[len(y) * 10 // 2]
    best = dynamics.early_stopping_time(ntk, f0, y, y_test=new_y, **test) / rate
    print(f"largest stable learning rate {limit:.4g}; training at half of it")
    print(f"half of the directions take more than {slow:.0f} steps")
    print(f"new images are predicted best after {best:.0f} steps")

    options = {"learning_rate": rate, "steps": steps}
    path = dynamics.gradient_descent(ntk, f0, y, **options, **test)
    sgd = torch.optim.SGD(net.parameters(), rate)
    print("steps   seen images: predicted, trained   new images: predicted, trained")
    for step in range(steps[-1] + 1):
        loss = (net(x) - y).square().sum() / 2
        if step in steps:
            with torch.no_grad():
                new_loss = (net(new) - new_y).square().sum() / 2
            i = steps.index(step)
            guess = (path.train[i] - y).square().sum() / 2
            new_guess = (path.test[i] - new_y).square().sum() / 2
            seen = f"{guess:22.3f} {loss.item():8.3f}"
            print(f"{step:5} {seen} {new_guess:22.3f} {new_loss:8.3f}")
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    adamw = torch.optim.AdamW(net.parameters(), 1e-4)
    adamw.zero_grad()
    (net(x) - y).square().sum().div(2).backward()
    step = dynamics.predicted_step(adamw, net)
    aware = TangentOperator(net, new).jvp(step).view(n, 10)
    residual = dynamics.loss_gradient(net(x), y)
    cross = empirical_ntk(net, new, x)
    plain = dynamics.output_change(cross, residual, learning_rate=1e-4)
    before = net(new).detach()
    adamw.step()
    change = net(new).detach() - before
    for name, guess in (("the plain kernel", plain), ("its own step", aware)):
        error = (guess - change).norm() / change.norm()
        print(f"a step of AdamW, predicted by {name}: {error:.1%} off")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])
