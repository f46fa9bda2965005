"""Networks for images, videos and signals: torchvision's, and what else is built.

The torchvision networks are the real builders with weights drawn at random; only the
images are small.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Case
from networks import Computed, settled
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision import models, ops


def awake(model: nn.Module) -> nn.Module:
    """No parameter at a constant, where it would hide a factor or a contribution."""
    with torch.no_grad():
        for parameter in settled(model).parameters():
            if parameter.min() == parameter.max():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pixels(size: int = 8, n: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(n, 3, size, size)


def signals(n: int = 3) -> Tensor:
    return torch.randn(n, 4, 9)


def volumes(n: int = 2) -> Tensor:
    return torch.randn(n, 2, 4, 6, 6)


def videos(n: int = 3) -> Tensor:
    return torch.randn(n, 4, 3, 6, 6)


def trained(model: nn.Module) -> nn.Module:
    """Weights and statistics with which every layer of a deep network matters."""
    with torch.no_grad():
        for parameter in awake(model).parameters():
            if parameter.ndim > 1 and parameter.std() < 0.05:
                parameter.mul_(4)
        norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(torch.randn(8, 3, 32, 32))
    return model


def of_torchvision(builder: Callable[..., nn.Module]) -> nn.Module:
    return trained(builder(weights=None, num_classes=2))


def shallow_vit() -> nn.Module:
    """ViT-B/32 with 2 of its 12 blocks."""
    return models.VisionTransformer(
        image_size=64,
        patch_size=32,
        num_layers=2,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        num_classes=2,
    )


def pooled(*layers: nn.Module, channels: int) -> nn.Module:
    """Layers, average over all positions, linear readout."""
    return awake(
        nn.Sequential(
            *layers,
            Computed(lambda _, x: x.flatten(2).mean(2)),
            nn.Linear(channels, 2),
        )
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(self.pool(x)))))


class UNet(nn.Module):
    """Two scales; the upsampled features meet those they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = self.block(3, 4)
        self.down2 = self.block(4, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.fuse = self.block(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(functional.max_pool2d(fine, 2))
        return self.out(self.fuse(torch.cat([self.up(coarse), fine], 1)))


class StandardizedConv2d(nn.Conv2d):
    """The filter is brought to mean 0 and variance 1 in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class DropPath(nn.Module):
    """Stochastic depth by hand: a residual branch that is there or not."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.training:
            keep = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.8)
            y = y.div(0.8) * keep
        return x + y


class InPlaceResidual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += x
        return functional.relu_(y)


def conv_3d() -> nn.Module:
    norm = nn.BatchNorm3d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return pooled(
        nn.Conv3d(2, 4, 3, stride=(1, 2, 2), padding=1, bias=False),
        norm,
        nn.ReLU(),
        nn.ConvTranspose3d(4, 3, 2),
        nn.SiLU(),
        channels=3,
    )


def frame_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2)
    )


def frames_batch_major() -> nn.Module:
    def compute(self: Any, x: Tensor) -> Tensor:
        y = self.encoder(x.flatten(0, 1)).flatten(1)
        return self.head(torch.tanh(y.unflatten(0, x.shape[:2])).mean(1))

    return awake(Computed(compute, encoder=frame_encoder(), head=nn.Linear(4, 2)))


def frames_time_major() -> nn.Module:
    def compute(self: Any, x: Tensor) -> Tensor:
        n, time = x.shape[:2]
        y = self.encoder(x.transpose(0, 1).flatten(0, 1)).flatten(1)
        return self.head(torch.tanh(y.view(time, n, -1)).mean(0))

    return awake(Computed(compute, encoder=frame_encoder(), head=nn.Linear(4, 2)))


def mixer() -> nn.Module:
    """MLP-Mixer: linear over the tokens, then over the channels."""

    def compute(self: Any, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))

    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))

    return awake(
        Computed(
            compute,
            patches=nn.Conv2d(3, 6, 4, 4),
            norm1=nn.LayerNorm(6),
            tokens=mlp(4),
            norm2=nn.LayerNorm(6),
            channels=mlp(6),
            head=nn.Linear(6, 2),
        )
    )


def prelu_per_channel() -> nn.Module:
    return pooled(conv(), nn.PReLU(4), nn.Conv2d(4, 4, 3), channels=4)


def conv(channels: int = 4, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return kind(3, channels, 3, padding=1)


VISION = [
    Case(
        "squeeze_excite",
        lambda: pooled(conv(), nn.ReLU(), SqueezeExcite(4, 2), channels=4),
        pixels(),
    ),
    Case(
        "unet",
        lambda: awake(nn.Sequential(UNet(), nn.AdaptiveAvgPool2d(2))),
        pixels(),
    ),
    Case(
        "unet_train",
        lambda: awake(nn.Sequential(UNet(), nn.AdaptiveAvgPool2d(2))),
        pixels(),
        mode="train",
        vmap=False,
    ),
    Case("conv_3d", conv_3d, volumes),
    Case(
        "separable_conv_1d",
        lambda: pooled(
            nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
            nn.Conv1d(4, 6, 1),
            nn.GELU(),
            nn.Conv1d(6, 12, 3, groups=6),
            nn.Tanh(),
            channels=12,
        ),
        signals,
    ),
    Case(
        "conv_transpose_1d_grouped",
        lambda: pooled(
            nn.Conv1d(4, 4, 3),
            nn.Tanh(),
            nn.ConvTranspose1d(4, 6, 3, 2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            channels=6,
        ),
        signals,
    ),
    Case(
        "conv_asymmetric",
        lambda: pooled(
            nn.Conv2d(3, 4, (1, 3), (2, 1), padding="valid"),
            nn.ReLU6(),
            nn.Conv2d(4, 4, (3, 1), padding="same"),
            nn.Hardswish(),
            channels=4,
        ),
        pixels(),
    ),
    Case(
        "weight_standardized_conv",
        lambda: pooled(
            conv(kind=StandardizedConv2d), nn.GroupNorm(2, 4), nn.ReLU(), channels=4
        ),
        pixels(),
    ),
    Case(
        "spectral_norm_conv",
        lambda: pooled(
            parametrizations.spectral_norm(conv()), nn.LeakyReLU(0.2), channels=4
        ),
        pixels(),
    ),
    Case(
        "weight_norm_conv",
        lambda: pooled(parametrizations.weight_norm(conv()), nn.ELU(), channels=4),
        pixels(),
    ),
    Case("prelu_per_channel", prelu_per_channel, pixels(n=3), vmap=False),
    Case(
        "stochastic_depth",
        lambda: pooled(
            conv(),
            DropPath(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())),
            ops.StochasticDepth(0.2, "row"),
            channels=4,
        ),
        pixels(),
    ),
    Case(
        "residual_in_place",
        lambda: pooled(
            conv(), InPlaceResidual(nn.Conv2d(4, 4, 3, padding=1)), channels=4
        ),
        pixels(),
    ),
    Case("mixer", mixer, pixels()),
    Case("frames_batch_major", frames_batch_major, videos),
    Case("frames_time_major", frames_time_major, videos),
    # As many examples as outputs: the nested vmap mixes them up instead of failing.
    Case("prelu_as_many_examples_as_outputs", prelu_per_channel, pixels(), vmap=False),
]

VISION_SLOW = [
    Case("resnet18", partial(of_torchvision, models.resnet18), pixels(32)),
    Case(
        "mobilenet_v3_small",
        partial(of_torchvision, models.mobilenet_v3_small),
        pixels(32),
    ),
    Case("densenet121", partial(of_torchvision, models.densenet121), pixels(32)),
    Case("vit_b_32_of_2_blocks", lambda: trained(shallow_vit()), pixels(64)),
    Case("swin_v2_t", partial(of_torchvision, models.swin_v2_t), pixels(32)),
    Case("convnext_tiny", partial(of_torchvision, models.convnext_tiny), pixels(32)),
]
