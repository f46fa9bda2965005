"""Layers as maps of covariances, to be composed into networks.

    network = sequential(dense(1.5, 0.1), activate("tanh"), dense(1.5, 0.1))

In the NTK parametrization a layer is y = (σ_w/√n) W a + σ_b b with standard normal W, b
and n inputs of one unit; in the standard one y = W a + b with W ~ N(0, σ_w²/n) and
b ~ N(0, σ_b²). Both have the same NNGP. Their tangent kernels, with learning rates λ_W
and λ_b of weights and biases (1 unless said) and K = E a a' of the inputs:

    ntk        Θ' = λ_W σ_w² K + λ_b σ_b² + σ_w² Θ
    standard   Θ' = λ_W n K    + λ_b      + σ_w² Θ
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ntk_callbacks.theory.activations import Activation, elementwise
from ntk_callbacks.theory.expectations import pair_moment
from ntk_callbacks.theory.kernels import Covariances, Layer
from ntk_callbacks.theory.learning import Learning, check_not_negative


def dense(
    sigma_w: float, sigma_b: float = 0.0, *, learning: Learning | None = None
) -> Layer:
    """A fully connected layer; on images, one that acts on each pixel (1×1).

    Args:
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0; 0 leaves the bias out unless `learning` has one.
        learning: Parametrization and learning rates; None for NTK, all 1.

    Returns:
        Map of `Covariances`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> layer = dense(1.5, 0.1)

    References:
        Jacot, Gabriel and Hongler (2018), arXiv:1806.07572.
    """
    return weighted(lambda kernel: kernel, sigma_w, sigma_b, learning or Learning())


def weighted(
    weight_mean: Callable[[Tensor], Tensor],
    sigma_w: float,
    sigma_b: float,
    learning: Learning,
) -> Layer:
    """A layer of weights and a bias, given the mean of a kernel over shared weights.

    Args:
        weight_mean: What becomes of a covariance when all weights have variance 1/n:
            itself for a dense layer, the mean over the taps of a convolution.
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.
        learning: Parametrization and learning rates.

    Returns:
        Map of `Covariances`.

    Raises:
        ValueError: If a σ is negative or not finite.
    """
    check_not_negative(sigma_w=sigma_w, sigma_b=sigma_b)
    weight_gain, bias_gain = learning.gains(sigma_w, sigma_b)

    def layer(covariances: Covariances) -> Covariances:
        inputs = weight_mean(covariances.nngp)
        own1, own2 = (
            sigma_w**2 * weight_mean(own) + sigma_b**2
            for own in (covariances.own1, covariances.own2)
        )
        below = sigma_w**2 * weight_mean(covariances.ntk)
        return replace(
            covariances,
            nngp=sigma_w**2 * inputs + sigma_b**2,
            ntk=weight_gain * inputs + bias_gain + below,
            own1=own1,
            own2=own2,
            fresh=True,
        )

    return layer


def activate(activation: Activation) -> Layer:
    """An elementwise activation φ: K' = E φ(u) φ(v) and Θ' = E φ'(u) φ'(v) · Θ.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable.

    Returns:
        Map of `Covariances`.

    Raises:
        ValueError: If the activation is unknown.

    Example:
        >>> layer = activate("erf")
    """
    phi = elementwise(activation)

    def layer(covariances: Covariances) -> Covariances:
        variances = covariances.variances()
        own1, own2 = covariances.own_variances()
        slopes = pair_moment(phi, *variances, covariances.nngp, derivative=1)
        return replace(
            covariances,
            nngp=pair_moment(phi, *variances, covariances.nngp),
            ntk=slopes * covariances.ntk,
            own1=pair_moment(phi, *own1, covariances.own1),
            own2=pair_moment(phi, *own2, covariances.own2),
            fresh=False,
        )

    return layer


def sequential(*layers: Layer) -> Layer:
    """Layers one after the other.

    Args:
        *layers: Maps of `Covariances`, the first first.

    Returns:
        Their composition.

    Example:
        >>> network = sequential(dense(1.0), activate("relu"), dense(1.0))
    """

    def network(covariances: Covariances) -> Covariances:
        for layer in layers:
            covariances = layer(covariances)
        return covariances

    return network


def residual(branch: Layer) -> Layer:
    """A skip connection, h + branch(h): covariances and tangent kernels add up.

    They do because fresh weights make the branch uncorrelated with its input: the
    branch must end in weights of its own, `dense` or `convolution`.

    Args:
        branch: Map of `Covariances` that keeps their shape.

    Returns:
        Map of `Covariances`.

    Raises:
        ValueError: When it is run, if the branch does not end in fresh weights or
            changes the number of pixels.

    Example:
        >>> block = residual(sequential(activate("relu"), dense(1.0)))

    References:
        Yang and Schoenholz (2017), arXiv:1712.08969.
    """

    def layer(covariances: Covariances) -> Covariances:
        added = branch(replace(covariances, fresh=False))
        if not added.fresh:
            raise ValueError(
                "residual: the branch is correlated with the skip connection, because "
                "it ends in an activation or passes its input on; end it with dense() "
                "or convolution()."
            )
        if added.nngp.shape != covariances.nngp.shape:
            raise ValueError(
                f"residual: the branch turns covariances of shape "
                f"{tuple(covariances.nngp.shape)} into {tuple(added.nngp.shape)}, "
                "expected the same shape."
            )
        return replace(
            covariances,
            nngp=covariances.nngp + added.nngp,
            ntk=covariances.ntk + added.ntk,
            own1=covariances.own1 + added.own1,
            own2=covariances.own2 + added.own2,
        )

    return layer
