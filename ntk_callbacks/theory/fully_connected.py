"""Infinitely wide fully connected networks, plain and residual."""

from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.kernels import Kernels, Layer, infinite_width_kernels
from ntk_callbacks.theory.layers import activate, dense, residual, sequential
from ntk_callbacks.theory.learning import (
    Learning,
    Parametrization,
    check_counts,
    check_depth,
)


def fully_connected(
    x1: Float[Tensor, "n1 ..."],
    x2: Float[Tensor, "n2 ..."] | None = None,
    *,
    depth: int,
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    parametrization: Parametrization = "ntk",
    width: int | None = None,
) -> Kernels:
    """NNGP and NTK of a fully connected network of infinite width.

    K¹ = Θ¹ = σ_w² x·x'/d + σ_b²; with (u, v) ~ N(0, Kˡ),
    Kˡ⁺¹ = σ_w² E φ(u) φ(v) + σ_b² and Θˡ⁺¹ = Kˡ⁺¹ + σ_w² E φ'(u) φ'(v) Θˡ.
    In the standard parametrization Θ is the leading behavior at a large finite width.

    Args:
        x1: First inputs, (n1, …), flattened to (n1, d).
        x2: Second inputs; None for the symmetric kernels of `x1`.
        depth: Number of hidden layers; 0 is a linear model.
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0 of every layer.
        sigma_b: σ_b ≥ 0 of every layer; 0 leaves the biases out.
        parametrization: `"ntk"` or `"standard"`.
        width: Units of the hidden layers, for the standard parametrization.

    Returns:
        `Kernels(nngp, ntk)` of one output, (n1, n2) each, float64.

    Raises:
        ValueError: If an argument is out of range or the inputs do not match.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0]])
        >>> fully_connected(
        ...     x, depth=3, activation="relu", sigma_w=2**0.5, sigma_b=0.0
        ... ).ntk
        tensor([[2.0000, 0.9761],
                [0.9761, 2.0000]], dtype=torch.float64)

    References:
        Jacot, Gabriel and Hongler (2018), arXiv:1806.07572; Lee et al. (2018),
        arXiv:1711.00165; Lee et al. (2019), arXiv:1902.06720.
    """
    check_depth(depth)
    if parametrization == "standard" and depth and width is None:
        raise ValueError(
            "width is None; the kernel of the standard parametrization grows with the "
            "width: give the number of units of a hidden layer."
        )
    if width is not None:
        check_counts(width=width)
    first, second = _flat("x1", x1), None if x2 is None else _flat("x2", x2)

    def layer(fan_in: int | None) -> Layer:
        return dense(sigma_w, sigma_b, learning=Learning(parametrization, fan_in))

    hidden = [sequential(activate(activation), layer(width)) for _ in range(depth)]
    network = sequential(layer(first.shape[1]), *hidden)
    return infinite_width_kernels(network, first, second)


def fully_connected_residual(
    x1: Float[Tensor, "n1 ..."],
    x2: Float[Tensor, "n2 ..."] | None = None,
    *,
    depth: int,
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    branch_sigma_w: float = 1.0,
    branch_sigma_b: float = 0.0,
) -> Kernels:
    """NNGP and NTK of a residual network h ← h + V φ(W h + b) + a, NTK parametrization.

    A dense layer (σ_w, σ_b), `depth` such blocks with W, b of (σ_w, σ_b) and V, a of
    the branch's own scales, and a linear readout (1, 0).

    Args:
        x1: First inputs, (n1, …), flattened to (n1, d).
        x2: Second inputs; None for the symmetric kernels of `x1`.
        depth: Number of residual blocks.
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0 of the first layer and of W.
        sigma_b: σ_b ≥ 0 of the first layer and of b.
        branch_sigma_w: σ_v ≥ 0 of V.
        branch_sigma_b: σ_a ≥ 0 of a.

    Returns:
        `Kernels(nngp, ntk)` of one output, (n1, n2) each, float64.

    Raises:
        ValueError: If an argument is out of range or the inputs do not match.

    Example:
        Each block multiplies the variance of a ReLU network by 1 + σ_v² σ_w²/2:

        >>> import torch
        >>> fully_connected_residual(
        ...     torch.ones(1, 4), depth=2, activation="relu", sigma_w=1.0, sigma_b=0.0
        ... ).nngp
        tensor([[2.2500]], dtype=torch.float64)

    References:
        Yang and Schoenholz (2017), arXiv:1712.08969.
    """
    check_depth(depth)
    first, second = _flat("x1", x1), None if x2 is None else _flat("x2", x2)
    block = residual(
        sequential(
            dense(sigma_w, sigma_b),
            activate(activation),
            dense(branch_sigma_w, branch_sigma_b),
        )
    )
    network = sequential(dense(sigma_w, sigma_b), *[block] * depth, dense(1.0))
    return infinite_width_kernels(network, first, second)


def _flat(name: str, x: Tensor) -> Float[Tensor, "n d"]:
    if x.ndim < 2:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected one example to a row, (n, d)."
        )
    return x.flatten(1)
