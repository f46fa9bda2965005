"""Reference classifiers: a perceptron, a convolutional and a residual network.

All take images (n, channels, height, width) and return logits (n, out_features); σ_w
and σ_b are those of `ntk_callbacks.experiments.layers`, shared by every layer.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks.experiments.layers import (
    Conv2d,
    Linear,
    Parametrization,
    check_sizes,
)

Activation: TypeAlias = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "sin": torch.sin,
    "identity": lambda x: x,
}
"""Name -> elementwise function; anywhere a name is taken, a callable is too."""


class MLP(nn.Module):
    """Fully connected network: `depth` hidden layers of `width` units and a readout.

    Computes h₀ = x flattened, hₗ = φ(layerₗ(hₗ₋₁)), logits = readout(h_depth).

    Args:
        in_shape: Shape of one input without the batch, e.g. `(1, 8, 8)`; flattened.
        out_features: Number of logits.
        width: Units of every hidden layer.
        depth: Number of hidden layers; 0 is a linear model.
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        parametrization: `"standard"` or `"ntk"`, see `layers`.
        sigma_w: σ_w; √2 keeps the scale of ReLU signals over depth.
        sigma_b: σ_b; 0 leaves every bias out.

    Raises:
        ValueError: If an argument is outside its range or an activation is unknown.

    Example:
        >>> MLP((1, 8, 8), 10, width=32, depth=1)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        width: int = 128,
        depth: int = 2,
        activation: str | Activation = "relu",
        parametrization: Parametrization = "standard",
        sigma_w: float = math.sqrt(2),
        sigma_b: float = 0.1,
    ) -> None:
        super().__init__()
        if not in_shape:
            raise ValueError("MLP: in_shape is empty, expected at least one axis.")
        for size in in_shape:
            check_sizes(self, in_shape=size)
        check_sizes(self, width=width, out_features=out_features)
        check_sizes(self, least=0, depth=depth)
        self.activation = _activation(self, activation)
        layer = _with_scales(Linear, parametrization, sigma_w, sigma_b)
        sizes = [math.prod(in_shape), *[width] * depth]
        self.hidden = nn.ModuleList(layer(a, b) for a, b in pairwise(sizes))
        self.readout = layer(sizes[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, *in_shape) to logits (n, out_features)."""
        h = x.flatten(1)
        for layer in self.hidden:
            h = self.activation(layer(h))
        logits: Tensor = self.readout(h)
        return logits


class CNN(nn.Module):
    """Convolutional network: `depth` 3×3 layers, global average pooling and a readout.

    Every convolution has stride 1 and zero padding, so that one set of weights fits
    images of any size; one output pixel sees 2·depth + 1 input pixels across.

    Args:
        in_shape: Channels, height and width of an image.
        out_features: Number of logits.
        width: Channels of every hidden layer.
        depth: Number of convolutions, at least 1.
        activation: A name in `ACTIVATIONS` or an elementwise callable.
        parametrization: `"standard"` or `"ntk"`, see `layers`.
        sigma_w: σ_w; √2 keeps the scale of ReLU signals over depth.
        sigma_b: σ_b; 0 leaves every bias out.

    Raises:
        ValueError: If an argument is outside its range or an activation is unknown.

    Example:
        >>> CNN((1, 8, 8), 10, width=4)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        width: int = 32,
        depth: int = 3,
        activation: str | Activation = "relu",
        parametrization: Parametrization = "standard",
        sigma_w: float = math.sqrt(2),
        sigma_b: float = 0.1,
    ) -> None:
        super().__init__()
        channels = _image_channels(self, in_shape)
        check_sizes(self, width=width, depth=depth, out_features=out_features)
        self.activation = _activation(self, activation)
        conv = _with_scales(Conv2d, parametrization, sigma_w, sigma_b)
        self.convolutions = nn.ModuleList(
            conv(width if i else channels, width) for i in range(depth)
        )
        self.readout = _with_scales(Linear, parametrization, sigma_w, sigma_b)(
            width, out_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to logits (n, out_features)."""
        for layer in self.convolutions:
            x = self.activation(layer(x))
        logits: Tensor = self.readout(x.mean(dim=(2, 3)))
        return logits


class ResNet(nn.Module):
    """Residual network for small images: three stages of `depth` basic blocks.

    A 3×3 stem without pooling, then stages of `width`, 2·`width` and 4·`width`
    channels; the second and third halve the image. A block is conv, batch norm, φ,
    conv, batch norm, plus the shortcut, then φ; the shortcut is a 1×1 convolution with
    batch norm wherever the shape changes. Works from 4×4 pixels up: 8×8 digits, 32×32
    CIFAR.

    Convolutions have no bias, and batch norm undoes their scale: σ_w there sets only
    how fast a step turns the weights, and σ_b acts in the readout alone.

    Args:
        in_shape: Channels, height and width of an image.
        out_features: Number of logits.
        width: Channels of the first stage.
        depth: Blocks of every stage; 3 is the ResNet-20 of He et al. at width 16.
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        parametrization: `"standard"` or `"ntk"`, see `layers`.
        sigma_w: σ_w of every convolution and of the readout.
        sigma_b: σ_b of the readout; 0 leaves its bias out.

    Raises:
        ValueError: If an argument is outside its range or an activation is unknown.

    Example:
        >>> ResNet((1, 8, 8), 10, width=4, depth=1)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    References:
        He, Zhang, Ren and Sun (2015), arXiv:1512.03385, section 4.2.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        width: int = 16,
        depth: int = 1,
        activation: str | Activation = "relu",
        parametrization: Parametrization = "standard",
        sigma_w: float = math.sqrt(2),
        sigma_b: float = 0.1,
    ) -> None:
        super().__init__()
        channels = _image_channels(self, in_shape, least=4)
        check_sizes(self, width=width, depth=depth, out_features=out_features)
        self.activation = _activation(self, activation)
        conv = _with_scales(Conv2d, parametrization, sigma_w, 0.0)
        self.stem = nn.Sequential(conv(channels, width), nn.BatchNorm2d(width))
        blocks: list[nn.Module] = []
        before = width
        for stage in range(3):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                after = width * 2**stage
                blocks.append(
                    _ResidualBlock(conv, before, after, stride, self.activation)
                )
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.readout = _with_scales(Linear, parametrization, sigma_w, sigma_b)(
            before, out_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to logits (n, out_features)."""
        h = self.blocks(self.activation(self.stem(x)))
        logits: Tensor = self.readout(h.mean(dim=(2, 3)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(
        self,
        conv: Callable[..., nn.Module],
        before: int,
        after: int,
        stride: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = conv(before, after, stride=stride)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = conv(after, after)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(
                conv(before, after, 1, stride=stride), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(h)) + self.shortcut(x))


def _with_scales(
    layer: Callable[..., nn.Module],
    parametrization: Parametrization,
    sigma_w: float,
    sigma_b: float,
) -> Callable[..., nn.Module]:
    return partial(
        layer, parametrization=parametrization, sigma_w=sigma_w, sigma_b=sigma_b
    )


def _activation(owner: nn.Module, activation: Any) -> Activation:
    found = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if not callable(found):
        raise ValueError(
            f"{type(owner).__name__}: activation is {activation!r}, "
            f"expected one of {', '.join(ACTIVATIONS)}, or an elementwise callable."
        )
    return found


def _image_channels(owner: nn.Module, in_shape: Sequence[int], least: int = 1) -> int:
    if len(in_shape) != 3:
        raise ValueError(
            f"{type(owner).__name__}: in_shape is {tuple(in_shape)}, "
            "expected (channels, height, width)."
        )
    check_sizes(owner, in_shape=in_shape[0])
    for size in in_shape[1:]:
        check_sizes(owner, least=least, in_shape=size)
    return in_shape[0]
