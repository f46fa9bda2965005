"""Kernels of infinitely wide networks: what runs through the layers and comes out.

In a wide network the pre-activations of a layer are Gaussian, independent from unit to
unit; a layer is known by what it does to their covariance over inputs (NNGP) and to the
tangent kernel. A network is a function of `Covariances`, composed of small ones
(`ntk_callbacks.theory.layers`, `ntk_callbacks.theory.convolutional`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.layout import widened
from ntk_callbacks.theory.learning import check_choice

Pixels: TypeAlias = Literal["all", "same"]
"""Pairs of pixels to keep: all, or only a pixel with itself."""

_BLOCK = 2**22
"""Covariances held at a time: 32 MB for each intermediate result."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The two kernels of an infinitely wide network with one output.

    With c outputs the kernel of the outputs is the same times the identity (c × c).

    Args:
        nngp: Covariance of the outputs over initializations, (n1, n2), float64.
        ntk: Neural tangent kernel Θ = J Jᵀ, (n1, n2), float64.

    Example:
        >>> from ntk_callbacks.theory import dense, infinite_width_kernels
        >>> infinite_width_kernels(dense(2.0, 1.0), torch.ones(1, 3)).nngp
        tensor([[5.]], dtype=torch.float64)
    """

    nngp: Float[Tensor, "n1 n2"]
    ntk: Float[Tensor, "n1 n2"]


@dataclass(frozen=True, slots=True)
class Covariances:
    """What is known of one layer: its covariance over inputs and its tangent kernel.

    Args:
        nngp: Covariance between the inputs of the two sets: (n1, n2), followed for
            images by the pixel axes, once (a pixel with itself) or twice (pairs).
        ntk: Tangent kernel of the parameters so far, of the same shape.
        own1: Covariance of each input of the first set with itself, (n1, …).
        own2: The same of the second set, (n2, …).
        spatial: Number of pixel axes, 0 for vectors.
        fresh: Whether weights of its own made this layer independent of the
            input of the enclosing residual branch.

    Example:
        A layer of one's own, a factor of 2:

        >>> from dataclasses import replace
        >>> from ntk_callbacks.theory import infinite_width_kernels
        >>> def double(before):
        ...     names = ("nngp", "ntk", "own1", "own2")
        ...     return replace(before, **{k: 4 * getattr(before, k) for k in names})
        >>> infinite_width_kernels(double, torch.ones(1, 3)).nngp
        tensor([[4.]], dtype=torch.float64)
    """

    nngp: Float[Tensor, "n1 n2 ..."]
    ntk: Float[Tensor, "n1 n2 ..."]
    own1: Float[Tensor, "n1 ..."]
    own2: Float[Tensor, "n2 ..."]
    spatial: int = 0
    fresh: bool = False

    @property
    def paired(self) -> bool:
        """Whether pairs of different pixels are kept."""
        return self.nngp.ndim == 2 + 2 * self.spatial and self.spatial > 0

    def variances(self) -> tuple[Tensor, Tensor]:
        """Variances of both sets, shaped to be broadcast against `nngp`."""
        if not self.paired:
            return self.own1[:, None], self.own2[None]
        shape = self.own1.shape[1 : 1 + self.spatial]
        first, second = (_pixel_diagonal(own) for own in (self.own1, self.own2))
        ones = [1] * self.spatial
        return first.view(-1, 1, *shape, *ones), second.view(1, -1, *ones, *shape)

    def own_variances(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """For `own1` and `own2` the variances of both sides, to be broadcast."""
        if not self.paired:
            return (self.own1, self.own1), (self.own2, self.own2)
        shape, ones = self.own1.shape[1 : 1 + self.spatial], [1] * self.spatial
        first, second = (_pixel_diagonal(own) for own in (self.own1, self.own2))
        return (
            (first.view(-1, *shape, *ones), first.view(-1, *ones, *shape)),
            (second.view(-1, *shape, *ones), second.view(-1, *ones, *shape)),
        )


Layer: TypeAlias = Callable[[Covariances], Covariances]
"""A layer, or a whole network, as a map of covariances."""


def infinite_width_kernels(
    network: Layer,
    x1: Float[Tensor, "n1 ..."],
    x2: Float[Tensor, "n2 ..."] | None = None,
    *,
    pixels: Pixels = "all",
) -> Kernels:
    """NNGP and NTK of a network composed of layers, in blocks that fit into memory.

    Args:
        network: A layer or a composition, e.g. `sequential(dense(1.0), …)`; images have
            to be flattened or pooled on the way.
        x1: First inputs, (n1, d), or (n1, channels, height, width) and the like.
        x2: Second inputs; None for the symmetric kernels of `x1`.
        pixels: Pairs of pixels to follow: `"all"`, of which pooling has need, or
            `"same"`, enough for networks that end in `flatten`: (n·pixels²) numbers
            against (n·pixels).

    Returns:
        `Kernels(nngp, ntk)`, (n1, n2) each, float64; for `x2=None` symmetric to the
        last bit.

    Raises:
        ValueError: If the inputs do not match one another or the network, or are not
            finite.

    Example:
        >>> from ntk_callbacks.theory import (
        ...     activate, dense, infinite_width_kernels, sequential
        ... )
        >>> network = sequential(dense(1.0), activate("relu"), dense(1.0))
        >>> infinite_width_kernels(network, torch.eye(2)).ntk
        tensor([[0.5000, 0.0796],
                [0.0796, 0.5000]], dtype=torch.float64)

    References:
        Jacot, Gabriel and Hongler (2018), arXiv:1806.07572; Lee et al. (2018),
        arXiv:1711.00165; Novak et al. (2020), arXiv:1912.02803.
    """
    check_choice(Pixels, pixels=pixels)
    first = _checked("x1", x1)
    second = first if x2 is None else _checked("x2", x2)
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"x1 holds inputs of shape {tuple(first.shape[1:])}, x2 of "
            f"{tuple(second.shape[1:])}; expected the same."
        )
    places = math.prod(first.shape[2:]) ** (2 if pixels == "all" else 1)
    rows = max(1, math.isqrt(_BLOCK // max(places, 1)))
    nngp = first.new_empty(len(first), len(second))
    ntk = torch.empty_like(nngp)
    for i in range(0, len(first), rows):
        for j in range(0, len(second), rows):
            if x2 is None and j < i:
                continue
            a, b = slice(i, i + rows), slice(j, j + rows)
            found = network(input_covariances(first[a], second[b], pixels=pixels))
            if found.spatial:
                raise ValueError(
                    "the network ends with images; end it with flatten() or "
                    "global_average_pool() and a dense layer."
                )
            nngp[a, b], ntk[a, b] = found.nngp, found.ntk
    if x2 is None:
        nngp, ntk = (k.triu() + k.triu(1).mT for k in (nngp, ntk))
    return Kernels(nngp, ntk)


def input_covariances(
    x1: Float[Tensor, "n1 d ..."],
    x2: Float[Tensor, "n2 d ..."],
    *,
    pixels: Pixels = "all",
) -> Covariances:
    """Where a network begins: x·x'/d over the d features (channels) of each pixel.

    Args:
        x1: First inputs.
        x2: Second inputs, of the same shape but for their number.
        pixels: `"all"` or `"same"`.

    Returns:
        Covariances with no parameters yet, `ntk` = 0.
    """
    shape = x1.shape[2:]
    paired = bool(shape) and pixels == "all"
    first, second = (x.double().reshape(*x.shape[:2], -1).mT for x in (x1, x2))
    places = [*shape, *shape] if paired else shape
    nngp = _mean_products(first, second, "jq" if paired else "jp")
    nngp = nngp.reshape(len(x1), len(x2), *places)
    own1, own2 = (
        _mean_products(x, x, "iq" if paired else "ip").reshape(len(x), *places)
        for x in (first, second)
    )
    return Covariances(nngp, torch.zeros_like(nngp), own1, own2, len(shape))


def _mean_products(
    x: Float[Tensor, "i p d"], y: Float[Tensor, "j q d"], axes: str
) -> Tensor:
    """Mean over d of x[i, p] · y, whose own axes are named; exact where they agree."""
    # A derivative with a jump magnifies round-off near parallel inputs to its root,
    # 1e-8: there the product is taken from the difference of the directions.
    out = "".join(sorted({"i", "p", *axes}))
    product = torch.einsum(f"ipd,{axes}d->{out}", x, y) / x.shape[-1]
    variances = []
    for vectors, names in ((x, "ip"), (y, axes)):
        variance = vectors.square().mean(-1)
        view = [variance.shape[names.index(a)] if a in names else 1 for a in out]
        variances.append(variance.reshape(view).expand(product.shape))
    left, right = variances
    scale = (left * right).sqrt()
    close = scale - product.abs() < 1e-6 * scale
    if close.any():
        at = dict(zip(out, close.nonzero(as_tuple=True), strict=True))
        sign = product[close].sign()
        first = x[at["i"], at["p"]] / left[close].sqrt()[:, None]
        second = y[at[axes[0]], at[axes[1]]] / (sign * right[close].sqrt())[:, None]
        gap = (first - second).square().mean(-1)
        product[close] = sign * scale[close] * (1 - gap / 2)
    return product


def _checked(name: str, x: Tensor) -> Tensor:
    if x.ndim < 2 or not x.numel():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (n, d), or (n, channels, "
            "height, width) and the like, none of them 0."
        )
    if x.is_complex() or not x.isfinite().all():
        raise ValueError(f"{name} is complex or not finite, expected real numbers.")
    return widened(x)


def _pixel_diagonal(own: Tensor) -> Tensor:
    """(n, pixels…, pixels…) -> (n, pixels) where both pixels are the same."""
    n, places = len(own), math.isqrt(own[0].numel())
    return own.reshape(n, places, places).diagonal(dim1=1, dim2=2)
