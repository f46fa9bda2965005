"""Infinitely wide convolutional networks in any number of spatial dimensions.

A convolution turns the covariance K(a, a') of the pixels a of one image and a' of
another into σ_w²/kᵈ Σ_b K(a + b, a' + b) + σ_b², the sum over the taps b. A network
that ends in `flatten` sees only pairs of the same pixel; pooling mixes all pairs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.kernels import (
    Covariances,
    Kernels,
    Layer,
    infinite_width_kernels,
)
from ntk_callbacks.theory.layers import activate, dense, sequential, weighted
from ntk_callbacks.theory.learning import (
    Learning,
    check_choice,
    check_counts,
    check_depth,
)

Head: TypeAlias = Literal["flatten", "pool"]
"""A readout of all pixels, or of their mean."""

PaddingMode: TypeAlias = Literal["zeros", "circular"]
"""What lies outside of an image, by the names of `torch.nn.Conv2d`."""


def convolution(
    sigma_w: float,
    sigma_b: float = 0.0,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int | None = None,
    padding_mode: PaddingMode = "zeros",
    learning: Learning | None = None,
) -> Layer:
    """A convolution with a square kernel, as `torch.nn.Conv2d` computes it.

    Args:
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.
        kernel_size: Taps k along each dimension.
        stride: Distance between neighboring output pixels.
        padding: Pixels added on each side, 0 for none; None keeps the size at stride 1
            for an odd kernel, `kernel_size // 2`.
        padding_mode: `"zeros"` or `"circular"`.
        learning: Parametrization and learning rates, None for NTK, all 1; `fan_in` is
            channels · kᵈ.

    Returns:
        Map of `Covariances`.

    Raises:
        ValueError: If an argument is out of range; when it is run, if there are no
            pixels or fewer than the kernel needs.

    Example:
        >>> layer = convolution(2**0.5, 0.1, stride=2)

    References:
        Arora et al. (2019), arXiv:1904.11955, section 4; Novak et al. (2019),
        arXiv:1810.05148.
    """
    check_counts(kernel_size=kernel_size, stride=stride)
    around = kernel_size // 2 if padding is None else padding
    if not isinstance(around, int) or around < 0:
        raise ValueError(
            f"padding is {padding!r}, expected a whole number of at least 0."
        )
    check_choice(PaddingMode, padding_mode=padding_mode)

    def tap_mean(kernel: Tensor, spatial: int, paired: bool) -> Tensor:
        for axis in range(-spatial, 0):
            # Both pixels of a pair move together.
            axes = (axis, axis - spatial) if paired else (axis,)
            for one in axes:
                kernel = _padded(kernel, one, around, padding_mode)
            kernel = _window_mean(kernel, axes, kernel_size, stride)
        return kernel

    learning = learning or Learning()
    # Arguments out of range are refused now, not when the layer is run.
    weighted(lambda kernel: kernel, sigma_w, sigma_b, learning)

    def layer(covariances: Covariances) -> Covariances:
        _check_pixels(covariances, "convolution")

        def mean(kernel: Tensor) -> Tensor:
            return tap_mean(kernel, covariances.spatial, covariances.paired)

        return weighted(mean, sigma_w, sigma_b, learning)(covariances)

    return layer


def flatten() -> Layer:
    """All pixels of all channels as features: the mean over each pixel with itself.

    Returns:
        Map of `Covariances` from images to vectors.

    Example:
        >>> head = sequential(flatten(), dense(1.0))
    """

    def layer(covariances: Covariances) -> Covariances:
        _check_pixels(covariances, "flatten")
        spatial, paired = covariances.spatial, covariances.paired

        def same_pixel_mean(kernel: Tensor) -> Tensor:
            if paired:
                places = math.prod(kernel.shape[-spatial:])
                lead = kernel.shape[: -2 * spatial]
                kernel = kernel.reshape(*lead, places, places)
                return kernel.diagonal(dim1=-2, dim2=-1).mean(-1)
            return kernel.flatten(-spatial).mean(-1)

        return _without_pixels(covariances, same_pixel_mean)

    return layer


def global_average_pool() -> Layer:
    """The mean over all pixels of a channel: the mean over all pairs of pixels.

    Returns:
        Map of `Covariances` from images to vectors.

    Raises:
        ValueError: When it is run, if there are no pixels, or no pairs of them.

    Example:
        >>> head = sequential(global_average_pool(), dense(1.0))
    """

    def layer(covariances: Covariances) -> Covariances:
        _check_pixels(covariances, "global_average_pool")
        if not covariances.paired:
            raise ValueError(
                "global_average_pool needs the covariances of different pixels: pass "
                'pixels="all".'
            )
        axes = tuple(range(-2 * covariances.spatial, 0))
        return _without_pixels(covariances, lambda kernel: kernel.mean(axes))

    return layer


def convolutional(
    x1: Float[Tensor, "n1 channels ..."],
    x2: Float[Tensor, "n2 channels ..."] | None = None,
    *,
    depth: int,
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    head: Head = "flatten",
    kernel_size: int = 3,
    stride: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> Kernels:
    """NNGP and NTK of a convolutional network with infinitely many channels.

    `depth` convolutions with activations, a head and a dense readout, every layer with
    the same scales, in NTK parametrization; the convolutions are those of
    `convolution` with its default padding. Other networks are composed, see
    `ntk_callbacks.theory.layers`.

    Args:
        x1: First images, (n1, channels, height, width); one or three pixel axes too.
        x2: Second images; None for the symmetric kernels of `x1`.
        depth: Number of convolutions.
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0 of every layer.
        sigma_b: σ_b ≥ 0 of every layer.
        head: `"flatten"`, a readout of all pixels, or `"pool"`, of their mean. Pooling
            follows all pairs of pixels: time and memory grow by the number of pixels.
        kernel_size: Taps along each dimension.
        stride: Stride of every convolution.
        padding_mode: `"zeros"` or `"circular"`.

    Returns:
        `Kernels(nngp, ntk)` of one output, (n1, n2) each, float64.

    Raises:
        ValueError: If an argument is out of range or the inputs do not match.

    Example:
        >>> images = torch.ones(1, 3, 4, 4)
        >>> convolutional(
        ...     images, depth=1, activation="relu", sigma_w=1.0, sigma_b=0.0
        ... ).nngp
        tensor([[0.3472]], dtype=torch.float64)

    References:
        Arora et al. (2019), arXiv:1904.11955 (CNTK, with pooling and without).
    """
    check_depth(depth)
    check_choice(Head, head=head)
    block = sequential(
        convolution(
            sigma_w,
            sigma_b,
            kernel_size=kernel_size,
            stride=stride,
            padding_mode=padding_mode,
        ),
        activate(activation),
    )
    pooled = head == "pool"
    network = sequential(
        *[block] * depth,
        global_average_pool() if pooled else flatten(),
        dense(sigma_w, sigma_b),
    )
    return infinite_width_kernels(network, x1, x2, pixels="all" if pooled else "same")


def _padded(kernel: Tensor, axis: int, around: int, mode: PaddingMode) -> Tensor:
    size = kernel.shape[axis]
    if mode == "circular":
        index = torch.arange(-around, size + around, device=kernel.device)
        return kernel.index_select(axis, index % size)
    shape = list(kernel.shape)
    shape[axis] = around
    nothing = kernel.new_zeros(shape)
    return torch.cat([nothing, kernel, nothing], axis)


def _window_mean(
    kernel: Tensor, axes: tuple[int, ...], window: int, stride: int
) -> Tensor:
    size = kernel.shape[axes[0]]
    if size < window:
        raise ValueError(
            f"convolution: {size} pixels with the padding, a kernel of {window}."
        )
    total = kernel.new_zeros(())
    for tap in range(window):
        end = size - window + tap + 1
        index = torch.arange(tap, end, stride, device=kernel.device)
        part = kernel
        for axis in axes:
            part = part.index_select(axis, index)
        total = total + part
    return total / window


def _check_pixels(covariances: Covariances, name: str) -> None:
    if not covariances.spatial:
        raise ValueError(
            f"{name}: the inputs have no pixels; expected (n, channels, height, width) "
            "and the like, and no flatten() before."
        )


def _without_pixels(
    covariances: Covariances, mean: Callable[[Tensor], Tensor]
) -> Covariances:
    return replace(
        covariances,
        nngp=mean(covariances.nngp),
        ntk=mean(covariances.ntk),
        own1=mean(covariances.own1),
        own2=mean(covariances.own2),
        spatial=0,
    )
