"""What multiplies rates and parameters where others put their factors.

Here a loss is the sum ½ Σ (f − y)² or −Σ log softmax(f)[y] over the examples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from ntk_callbacks.theory.learning import check_choice, check_counts, check_not_negative

Loss: TypeAlias = Literal[
    "half_sum",
    "half_mean",
    "mse_sum",
    "mse_mean",
    "neural_tangents",
    "cross_entropy_sum",
    "cross_entropy_mean",
    "cross_entropy_neural_tangents",
]
"""A loss by its normalization; see `loss_scale`."""


def loss_scale(loss: Loss, *, n: int, c: int = 1) -> float:
    """How often a loss contains the sums that kernels are used with here.

    Gradients are so many times as large, and training with learning rate η (or for
    time t) on the loss is training with `loss_scale · η` (or for `loss_scale · t`) on
    the sum; largest stable rates are divided by it.

    ======================== ================================ ===================
    `"half_sum"`             ½ Σ (f − y)²                     1
    `"half_mean"`            1/(2n) Σ (f − y)²                1/n
    `"mse_sum"`              `MSELoss(reduction="sum")`       2
    `"mse_mean"`             `MSELoss()`                      2/(n c)
    `"neural_tangents"`      ½ mean (f − y)²                  1/(n c)
    `"cross_entropy_sum"`    `CrossEntropyLoss("sum")`        1
    `"cross_entropy_mean"`   `CrossEntropyLoss()`             1/n
    `"cross_entropy_neural_  −mean (y log softmax(f))         1/(n c)
    tangents"`
    ======================== ================================ ===================

    Args:
        loss: Its name in the table. Cross-entropies are for classes; the means are
            over all that `CrossEntropyLoss` counts as examples.
        n: Examples of the batch.
        c: Outputs of one example.

    Returns:
        A number > 0.

    Raises:
        ValueError: If the loss is unknown or a size not positive.

    Example:
        The largest stable rate of `MSELoss` on 5 examples of 2 outputs, where that of
        ½ Σ (f − y)² is 0.2:

        >>> round(0.2 / loss_scale("mse_mean", n=5, c=2), 12)
        1.0
    """
    check_choice(Loss, loss=loss)
    check_counts(n=n, c=c)
    scales: dict[Loss, float] = {
        "half_sum": 1.0,
        "half_mean": 1 / n,
        "mse_sum": 2.0,
        "mse_mean": 2 / (n * c),
        "neural_tangents": 1 / (n * c),
        "cross_entropy_sum": 1.0,
        "cross_entropy_mean": 1 / n,
        "cross_entropy_neural_tangents": 1 / (n * c),
    }
    return scales[loss]


def ntk_parametrization_scaling(
    shapes: Mapping[str, Sequence[int]], *, sigma_w: float = 1.0, sigma_b: float = 1.0
) -> dict[str, float]:
    """Λ that makes the kernel of a standard network that of the NTK parametrization.

    W = (σ_w/√fan_in) w and b = σ_b β give the same function of other parameters, so
    that ∂f/∂w = (σ_w/√fan_in) ∂f/∂W: exactly, at every width and at every step,
    Θ_ntk = J Λ Jᵀ with Λ = σ_w²/fan_in for weights and σ_b² for biases. Pass it as
    `scaling` to `empirical_ntk`. Gradient descent in w with rate η is the same as
    descent in W with the rates η Λ; the kernel of the standard parametrization is that
    of the network in w with 1/Λ.

    Args:
        shapes: Parameter name -> its shape. Two axes and more are a weight, whose first
            axis are the outputs (`nn.Linear`, `nn.Conv2d`); one or none is a bias.
        sigma_w: σ_w ≥ 0 of the parametrization.
        sigma_b: σ_b ≥ 0.

    Returns:
        Parameter name -> Λ.

    Raises:
        ValueError: If a σ is negative or a weight has no input.

    Example:
        >>> shapes = {"weight": (3, 8), "bias": (3,)}
        >>> ntk_parametrization_scaling(shapes, sigma_w=2.0, sigma_b=0.5)
        {'weight': 0.5, 'bias': 0.25}

    References:
        Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; Sohl-Dickstein et al. 2020,
        arXiv:2001.07301 (both parametrizations).
    """
    check_not_negative(sigma_w=sigma_w, sigma_b=sigma_b)
    scaling = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:])
        if fan_in < 1:
            raise ValueError(f"{name!r} has shape {tuple(shape)}; expected inputs ≥ 1.")
        scaling[name] = sigma_w**2 / fan_in if len(shape) > 1 else sigma_b**2
    return scaling
