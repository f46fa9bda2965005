"""Inputs of every kind, and small networks with the usual layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence


class Computed(nn.Module):
    """A module whose forward pass is a function of itself and its inputs."""

    def __init__(self, compute: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self, *args, **kwargs)


# Inputs.


def vectors(n: int = 3) -> Tensor:
    return torch.randn(n, 5)


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 5, 5)


def sequences(n: int = 3) -> Tensor:
    return torch.randn(n, 4, 6)


def tokens(n: int = 3) -> Tensor:
    return torch.randint(0, 7, (n, 4))


def pairs(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5), torch.randn(n, 4)


def named(n: int = 3) -> dict[str, Tensor]:
    return {"ids": tokens(n), "scale": torch.rand(n, 4)}


# Networks.


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6, bias),
        activation(),
        nn.Linear(6, 6, bias),
        activation(),
        nn.Linear(6, 2, bias),
    )


def around(
    layer: nn.Module, features: int, hidden: int = 6, flatten: bool = False
) -> nn.Module:
    """A layer with a linear layer before it and one after it."""
    middle = [nn.Tanh(), nn.Flatten()] if flatten else [nn.Tanh()]
    return nn.Sequential(nn.Linear(5, hidden), layer, *middle, nn.Linear(features, 2))


def convolution(*middle: nn.Module, features: int = 100) -> nn.Module:
    """Convolution, whatever is asked for, linear readout."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), *middle, nn.Flatten(), nn.Linear(features, 2)
    )


def settled(model: nn.Module) -> nn.Module:
    """Statistics and scales of BatchNorm as after some training, not 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


def resnet() -> nn.Module:
    def block(self: Any, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))

    return settled(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            Computed(
                block,
                conv1=nn.Conv2d(4, 4, 3, padding=1, bias=False),
                norm1=nn.BatchNorm2d(4),
                conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(4),
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )
    )


def batchnorm_frozen() -> nn.Module:
    """In training, except for the first BatchNorm."""

    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    return settled(
        nn.Sequential(
            nn.Linear(5, 6), Frozen(6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2)
        )
    )


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    options = {"batch_first": True} | options
    width = options.get("proj_size", 5) * (1 + options.get("bidirectional", False))
    return Computed(
        lambda self, x: self.head(self.cells(x)[0][:, -1]),
        cells=kind(6, 5, **options),
        head=nn.Linear(width, 2),
    )


def packed_sequences() -> nn.Module:
    """A recurrent layer that torch runs as a whole, without an axis of examples."""
    return Computed(
        lambda self, x: self.head(self.cells(pack_sequence([*x]))[1][0]),
        cells=nn.GRU(6, 5),
        head=nn.Linear(5, 2),
    )


def attention(**options: Any) -> nn.Module:
    return Computed(
        lambda self, x: self.head(
            self.attention(x, x, x, need_weights=self.weights)[0].mean(1)
        ),
        attention=nn.MultiheadAttention(6, 2, batch_first=True, **options),
        head=nn.Linear(6, 2),
        weights=False,
    )


def cross_attention() -> nn.Module:
    return Computed(
        lambda self, x: self.attention(self.query.expand(len(x), -1, -1), x, x)[0][
            :, 0, :2
        ],
        attention=nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True),
        query=nn.Parameter(torch.randn(1, 2, 4)),
    )


def transformer(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        6, 2, 8, dropout=0.3, batch_first=True, norm_first=norm_first
    )
    return Computed(
        lambda self, x: self.head(self.layer(x)[:, 0]),
        layer=layer,
        head=nn.Linear(6, 2),
    )


def embedding(**options: Any) -> nn.Module:
    return Computed(
        lambda self, ids: self.head(torch.tanh(self.embed(ids)).mean(1)),
        embed=nn.Embedding(7, 5, **options),
        head=nn.Linear(5, 2),
    )


def language_model() -> nn.Module:
    """The embedding is also the readout, in another module under another name."""
    model = Computed(
        lambda self, ids: self.decoder(self.mix(self.embed(ids).mean(1))),
        embed=nn.Embedding(7, 5),
        mix=nn.Linear(5, 5),
        decoder=nn.Linear(5, 7, bias=False),
    )
    model.decoder.weight = model.embed.weight
    return model
