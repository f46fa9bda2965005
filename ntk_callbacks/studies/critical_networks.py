"""Critical networks whose first layer is φ: their spectra, and how fast they learn."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks import input_singular_values, theory
from ntk_callbacks.engine.spectral import singular_values
from ntk_callbacks.experiments.initializations import critical_
from ntk_callbacks.studies.study import Result
from ntk_callbacks.studies.tasks import digits

# φ, and the σ_b² of its critical point; without a bias where there is but one.
ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "linear": (nn.Identity, 0.0),
    "relu": (nn.ReLU, 0.0),
    "tanh": (nn.Tanh, 0.01),
    "hard_tanh": (nn.Hardtanh, 0.05),
}


def spectrum(
    *,
    activation: str,
    weights: str,
    depths: list[int],
    width: int,
    compare: bool,
    device: str,
) -> Result:
    """Squared singular values s² of the first L layers, from the variance they keep.

    Args:
        activation: φ.
        weights: `"gaussian"` or `"orthogonal"`.
        depths: Values of L, the last the largest.
        width: Units of all layers and of the input.
        compare: Whether the engine's own answer is asked for too, at the smallest L.
        device: Where to compute.

    Returns:
        For each L the mean, the variance over the squared mean, and the largest s²; all
        s² of the deepest; the relative distance from the engine's.
    """
    sigma_b = ACTIVATIONS[activation][1] ** 0.5
    q = float(theory.critical_point(activation, sigma_b).q)
    x = q**0.5 * torch.randn(1, width, device=device)
    net = _network(activation, weights, depths[-1], width, x)
    by_depth = []
    for depth in depths:
        squares = _squares(net[: 2 * depth], x)
        mean = squares.mean()
        by_depth.append(
            {
                "mean": float(mean),
                "spread": float(squares.var(correction=0) / mean**2),
                "largest": float(squares.max()),
            }
        )
    result: Result = {"by_depth": by_depth, "squares": squares.tolist()}
    if compare:
        direct = input_singular_values(net[: 2 * depths[0]], x)[0, 0] ** 2
        result["engine_difference"] = abs(float(direct) / by_depth[0]["largest"] - 1)
    return result


def isometry_gap(*, weights: str, depth: int, width: int, device: str) -> Result:
    """Largest |s − 1| of a deep linear network, in float64.

    Args:
        weights: `"orthogonal"`, for it to be small.
        depth: Layers.
        width: Their units.
        device: Where to compute.

    Returns:
        The gap.
    """
    x = torch.randn(1, width, dtype=torch.float64, device=device)
    net = _network("linear", weights, depth, width, x)
    return {"gap": float((input_singular_values(net, x) - 1).abs().max())}


def training(
    *,
    weights: str,
    depth: int,
    width: int,
    examples: int,
    learning_rates: list[float],
    steps: int,
    learned: float,
    device: str,
) -> Result:
    """Losses of one deep tanh network from each learning rate, until it has learned.

    Args:
        weights: `"gaussian"` or `"orthogonal"`.
        depth: Hidden layers.
        width: Their units.
        examples: Digits, all of them in every update.
        learning_rates: Of plain gradient descent on the mean cross-entropy.
        steps: Updates at most.
        learned: Loss below which it stops.
        device: Where to compute.

    Returns:
        Losses before each update, for each learning rate.
    """
    x, labels = digits(examples, device=device, dtype=torch.float32)
    hidden = [nn.Linear(width if i else x.shape[1], width) for i in range(depth)]
    net = nn.Sequential(
        *[part for layer in hidden for part in (layer, nn.Tanh())],
        nn.Linear(width, 10),
    ).to(x)
    critical_(
        net, "tanh", sigma_b=ACTIVATIONS["tanh"][1] ** 0.5, weights=_kind(weights)
    )
    start = {name: value.clone() for name, value in net.state_dict().items()}
    curves = []
    for rate in learning_rates:
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), rate)
        losses: list[float] = []
        for _ in range(steps + 1):
            loss = functional.cross_entropy(net(x), labels)
            losses.append(float(loss.detach()))
            if not learned <= losses[-1] < 100:  # or it has diverged
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        curves.append(losses)
    return {"losses": curves}


def _network(
    activation: str, weights: str, depth: int, width: int, like: Tensor
) -> nn.Sequential:
    """Layers φ, W, b: what it is given is the first pre-activation."""
    module, bias_variance = ACTIVATIONS[activation]
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [module(), nn.Linear(width, width, bias=bias_variance > 0)]
    net = nn.Sequential(*layers).to(like)
    critical_(net, activation, sigma_b=bias_variance**0.5, weights=_kind(weights))
    return net


def _kind(weights: str) -> Any:
    """A literal, out of the name of a job's parameter."""
    return weights


def _squares(net: nn.Module, x: Tensor) -> Tensor:
    """All s² from one backward pass: of the k-th copy of x the k-th output counts."""
    copies = x.expand(x.shape[1], -1).clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(net(copies).diagonal().sum(), copies)
    return singular_values(jacobian[None])[0].square().cpu()
