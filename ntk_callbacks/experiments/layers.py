"""Linear and convolutional layers in the standard and the NTK parametrization.

Both draw the same random function; they differ in what gradient descent moves. With
fan-in n (inputs of one output unit), entrywise:

    standard    y = W x + b                        W ~ N(0, σ_w²/n)   b ~ N(0, σ_b²)
    ntk         y = (σ_w/√n) W x + σ_b b           W ~ N(0, 1)        b ~ N(0, 1)

A step of plain gradient descent moves y by a factor σ_w²/n less in the NTK
parametrization, so its kernel stays finite as the width grows and its learning rate
does not shrink with the width: expect one larger by about n/σ_w². Adam, which ignores
the scale of a gradient, wants one larger by about √n/σ_w.

σ_b = 0 leaves the bias out in both, so that both train the same family of functions.
"""

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

Parametrization: TypeAlias = Literal["standard", "ntk"]
"""Where 1/√fan_in enters: the initial variance, or the forward pass."""


class Linear(nn.Module):
    """Affine map whose parametrization and initial scale are explicit.

    Computes the formulas of the module docstring with n = `in_features`. For an input
    of mean square q the outputs are, over draws of the layer, normal with mean 0 and
    variance σ_w² q + σ_b².

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        parametrization: `"standard"` or `"ntk"`.
        sigma_w: σ_w > 0, standard deviation of a weight times √n.
        sigma_b: σ_b ≥ 0, standard deviation of a bias; 0 leaves the bias out.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> Linear(64, 10, parametrization="ntk", sigma_w=2.0)
        Linear(64, 10, parametrization='ntk', sigma_w=2.0, sigma_b=0.0)

    References:
        Jacot, Gabriel and Hongler (2018), arXiv:1806.07572, section 2; Sohl-Dickstein,
        Novak, Schoenholz and Lee (2020), arXiv:2001.07301, on the two parametrizations.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        parametrization: Parametrization = "standard",
        sigma_w: float = 1.0,
        sigma_b: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(self, in_features=in_features, out_features=out_features)
        _check_scales(self, parametrization, sigma_w, sigma_b)
        self.in_features = in_features
        self.out_features = out_features
        self.parametrization = parametrization
        self.sigma_w = sigma_w
        self.sigma_b = sigma_b
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if sigma_b else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights and the bias anew from torch's global generator."""
        _draw(self.weight, self.bias, self.parametrization, self.sigma_w, self.sigma_b)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        if self.parametrization == "standard":
            return functional.linear(x, self.weight, self.bias)
        # The output is scaled, not the weight: the raw weight stays the argument of
        # one linear operation, which is what fast tangent-kernel rules look for.
        y = (
            self.sigma_w
            / math.sqrt(self.in_features)
            * functional.linear(x, self.weight)
        )
        return y if self.bias is None else y + self.sigma_b * self.bias

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, "
            f"parametrization={self.parametrization!r}, "
            f"sigma_w={self.sigma_w}, sigma_b={self.sigma_b}"
        )


class Conv2d(nn.Module):
    """Two-dimensional convolution whose parametrization and initial scale are explicit.

    Computes the formulas of the module docstring at every output pixel, with
    n = `in_channels · kernel_size²` and zeros outside of the image.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, in pixels.
        stride: Distance between neighboring output pixels, in input pixels.
        padding: Zeros added on each side, in pixels; None keeps the image size at
            stride 1 for an odd kernel, `kernel_size // 2`.
        parametrization: `"standard"` or `"ntk"`.
        sigma_w: σ_w > 0, standard deviation of a weight times √n.
        sigma_b: σ_b ≥ 0, standard deviation of a bias; 0 leaves the bias out.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> Conv2d(1, 8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 8, 8, 8])

    References:
        Arora et al. (2019), arXiv:1904.11955, section 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        parametrization: Parametrization = "standard",
        sigma_w: float = 1.0,
        sigma_b: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
        )
        if padding is not None:
            check_sizes(self, least=0, padding=padding)
        _check_scales(self, parametrization, sigma_w, sigma_b)
        self.fan_in = in_channels * kernel_size**2
        self.stride = stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.parametrization = parametrization
        self.sigma_w = sigma_w
        self.sigma_b = sigma_b
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if sigma_b else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights and the bias anew from torch's global generator."""
        _draw(self.weight, self.bias, self.parametrization, self.sigma_w, self.sigma_b)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h', w')."""
        if self.parametrization == "standard":
            return functional.conv2d(
                x, self.weight, self.bias, self.stride, self.padding
            )
        y = functional.conv2d(x, self.weight, None, self.stride, self.padding)
        y = self.sigma_w / math.sqrt(self.fan_in) * y
        return y if self.bias is None else y + self.sigma_b * self.bias[:, None, None]

    @override
    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, {kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, parametrization={self.parametrization!r}, "
            f"sigma_w={self.sigma_w}, sigma_b={self.sigma_b}"
        )


def check_sizes(owner: object, *, least: int = 1, **sizes: Any) -> None:
    """Refuse a size that is not a whole number of at least `least`.

    Args:
        owner: The object that was given the sizes; its class is named in the error.
        least: Smallest size allowed.
        **sizes: Argument name -> what was given.

    Raises:
        ValueError: If one of the sizes is not an integer or is too small.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(
                f"{type(owner).__name__}: {name} is {size!r}, "
                f"expected a whole number of at least {least}."
            )


def _check_scales(
    owner: nn.Module, parametrization: str, sigma_w: float, sigma_b: float
) -> None:
    name = type(owner).__name__
    if parametrization not in get_args(Parametrization):
        raise ValueError(
            f"{name}: parametrization is {parametrization!r}, "
            f"expected one of {', '.join(get_args(Parametrization))}."
        )
    if not 0 < sigma_w < math.inf:
        raise ValueError(f"{name}: sigma_w is {sigma_w}, expected a positive number.")
    if not 0 <= sigma_b < math.inf:
        raise ValueError(
            f"{name}: sigma_b is {sigma_b}, expected 0 (no bias) or a positive number."
        )


@torch.no_grad()
def _draw(
    weight: Tensor,
    bias: Tensor | None,
    parametrization: Parametrization,
    sigma_w: float,
    sigma_b: float,
) -> None:
    standard = parametrization == "standard"
    fan_in = weight[0].numel()
    weight.normal_(0.0, sigma_w / math.sqrt(fan_in) if standard else 1.0)
    if bias is not None:
        bias.normal_(0.0, sigma_b if standard else 1.0)
