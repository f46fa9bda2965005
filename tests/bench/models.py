"""The networks, in PyTorch; `jax_peer` has the same ones, for the same weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.roster import SHAPES, Case


def mlp(outputs: int, width: int | None) -> nn.Module:
    """Four hidden layers, ReLU."""
    width = width or 1024
    layers: list[nn.Module] = []
    for size in [784, *[width] * 3]:
        layers += [nn.Linear(size, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _convolutions(channels: list[int], strides: list[int], outputs: int) -> nn.Module:
    """3×3 convolutions with ReLU, global average pooling and a readout."""
    layers: list[nn.Module] = []
    before = 3
    for after, stride in zip(channels, strides, strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
        before = after
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pool, nn.Linear(before, outputs))


def cnn(outputs: int, width: int | None) -> nn.Module:
    """Five convolutions, two of them with stride 2."""
    w = width or 64
    return _convolutions([w, w, 2 * w, 2 * w, 4 * w], [1, 1, 2, 1, 2], outputs)


def small_cnn(outputs: int, width: int | None) -> nn.Module:
    """Three convolutions, for the growth with N, c and p."""
    w = width or 32
    return _convolutions([w, w, 2 * w], [1, 2, 2], outputs)


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(h + self.shortcut(x))


def resnet(outputs: int, width: int | None) -> nn.Module:
    """ResNet-18 with a 3×3 stem; the running statistics are random, not 0 and 1."""
    w = width or 64
    blocks: list[nn.Module] = []
    before = w
    for after, stride in [(w, 1), (2 * w, 2), (4 * w, 2), (8 * w, 2)]:
        blocks += [_ResidualBlock(before, after, stride)]
        blocks += [_ResidualBlock(after, after, 1)]
        before = after
    model = nn.Sequential(
        nn.Conv2d(3, w, 3, 1, 1, bias=False),
        nn.BatchNorm2d(w),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, outputs),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model


class _EncoderBlock(nn.Module):
    heads = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        split = (n, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).reshape(split).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Encoder with pre-norm; class token and positions are bare parameters."""

    def __init__(self, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*(_EncoderBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, 32, 32) to logits (n, outputs)."""
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(outputs: int, width: int | None) -> nn.Module:
    """64 patches of 4×4 pixels and a class token."""
    return ViT(outputs, width or 128, depth=4)


NETWORKS: dict[str, Callable[[int, int | None], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "vit": vit,
    "small_cnn": small_cnn,
}


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """The network in evaluation mode and its inputs, the same in every process."""
    torch.manual_seed(0)
    model = NETWORKS[case.network](case.outputs, case.width).eval()
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(case.n, *SHAPES[case.network], generator=generator)
