"""The networks every route must get right: small enough for the loop, and odd."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from oracles import call, each
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A network small enough for the oracle, and the inputs to probe it with."""

    id: str
    model: Callable[[], nn.Module]
    probe: Callable[[], Any]
    mode: str = "eval"
    output_fn: Callable[[nn.Module, Any], Tensor] = call
    vmap: bool = True
    """Whether `torch.func` can differentiate it one example at a time."""

    def build(self) -> tuple[nn.Module, Any]:
        """Network and inputs in float64, the network in the mode it is measured in."""
        torch.manual_seed(0)
        model = self.model().double().train(self.mode == "train")
        return model, each(in_double, self.probe())


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class Computed(nn.Module):
    """A module whose forward pass is a function of itself and its inputs."""

    def __init__(self, compute: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self, *args, **kwargs)


class Cube(torch.autograd.Function):
    """x³ in the older style, without `setup_context`: `torch.func` cannot enter it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


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


def called_twice() -> nn.Module:
    return Computed(
        lambda self, x: self.head(torch.tanh(self.inner(torch.tanh(self.inner(x))))),
        inner=nn.Linear(5, 5),
        head=nn.Linear(5, 2),
    )


def used_directly() -> nn.Module:
    """Weights that never see their module's `forward`, one of them used thrice."""

    def compute(self: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.inner.weight, self.inner.bias))
        penalty = (self.inner.weight**2).sum() * x.sum(1, keepdim=True)
        return hidden @ self.inner.weight[:, :2] + penalty

    return Computed(compute, inner=nn.Linear(5, 6))


def class_token() -> nn.Module:
    def compute(self: Any, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.mix(x)[0][:, 0]) * self.scale

    return Computed(
        compute,
        token=nn.Parameter(torch.randn(1, 1, 6)),
        position=nn.Parameter(torch.randn(5, 6)),
        scale=nn.Parameter(torch.tensor(1.7)),
        mix=nn.GRU(6, 6, batch_first=True, bidirectional=True),
        head=nn.Linear(12, 2),
    )


def parameter_list() -> nn.Module:
    return Computed(
        lambda self, x: sum(torch.tanh(x @ w) * self.gains[f"g{i}"] for i, w in
                            enumerate(self.weights)),
        weights=nn.ParameterList(torch.randn(5, 2) for _ in range(3)),
        gains=nn.ParameterDict({f"g{i}": torch.randn(2) for i in range(3)}),
    )  # fmt: skip


def frozen_layer() -> nn.Module:
    model = mlp()
    model[2].requires_grad_(False)
    return model


def unused_parameter() -> nn.Module:
    return Computed(
        lambda self, x: self.body(x), body=mlp(), idle=nn.Parameter(torch.randn(3))
    )


def checkpointed(use_reentrant: bool) -> nn.Module:
    return Computed(
        lambda self, x: self.head(
            checkpoint(self.block, self.stem(x), use_reentrant=use_reentrant)
        ),
        stem=nn.Linear(5, 6),
        block=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()),
        head=nn.Linear(6, 2),
    )


def returning(wrap: Callable[[Tensor], Any]) -> nn.Module:
    return Computed(lambda self, x: wrap(self.body(x)), body=mlp())


def two_inputs() -> nn.Module:
    return Computed(
        lambda self, a, b: torch.tanh(self.left(a)) * self.right(b),
        left=nn.Linear(5, 2),
        right=nn.Linear(4, 2),
    )


def keyword_inputs() -> nn.Module:
    return Computed(
        lambda self, *, ids, scale: self.head(
            (torch.tanh(self.embed(ids)) * scale[..., None]).mean(1)
        ),
        embed=nn.Embedding(7, 5),
        head=nn.Linear(5, 2),
    )


def branching() -> nn.Module:
    def compute(self: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.head(hidden if x[:, 0].sum().item() > 0 else 2 * hidden)

    # One example at a time takes another branch than the batch: coupled.
    return Computed(compute, inner=nn.Linear(5, 6), head=nn.Linear(6, 2))


def hooked() -> nn.Module:
    """A forward hook that reads a number out, as monitoring hooks do."""
    model, seen = mlp(), []

    def read(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output.mean().item())

    model[1].register_forward_hook(read)
    return model


def compiled(backend: str) -> nn.Module:
    model = mlp()
    model[2] = torch.compile(model[2], backend=backend)
    return model


def overwriting() -> nn.Module:
    """Normalizes the batch it was given in place."""
    return Computed(
        lambda self, x: self.body(x.sub_(x.mean(1, keepdim=True)).mul_(2)), body=mlp()
    )


def time_derivative(model: nn.Module, x: Tensor) -> Tensor:
    """∂u/∂x of a network u, as the residual of a differential equation needs it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u - slope[:, :2]


def plain_time_derivative(model: nn.Module, x: Tensor) -> Tensor:
    """The same by someone who counts on gradients being enabled."""
    x = x.detach().requires_grad_()
    u = model(x)
    return u - torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :2]


CASES = [
    Case("linear", lambda: nn.Linear(5, 2), vectors),
    Case("mlp", mlp, vectors),
    Case("mlp_no_bias", lambda: mlp(bias=False), vectors),
    Case("mlp_single_output", lambda: returning(lambda y: y[:, 0]), vectors),
    Case("mlp_on_sequences", lambda: nn.Linear(6, 2), sequences),
    Case("relu_inplace", lambda: mlp(partial(nn.ReLU, inplace=True)), vectors),
    Case("input_overwritten", overwriting, vectors),
    Case("prelu", lambda: mlp(nn.PReLU), vectors, vmap=False),
    Case("bilinear", lambda: nn.Bilinear(5, 4, 2), pairs),
    Case("cnn", lambda: convolution(nn.ReLU()), images),
    Case("max_pool", lambda: convolution(nn.MaxPool2d(2), features=16), images),
    Case(
        "conv_grouped_dilated",
        lambda: convolution(
            nn.Conv2d(4, 6, 2, dilation=2, groups=2), nn.ReLU(), features=54
        ),
        images,
    ),
    Case(
        "conv_depthwise_strided",
        lambda: convolution(nn.Conv2d(4, 4, 3, 2, groups=4), nn.Tanh(), features=16),
        images,
    ),
    Case(
        "conv_reflect",
        lambda: convolution(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        images,
    ),
    Case(
        "conv_transpose",
        lambda: convolution(
            nn.ConvTranspose2d(4, 2, 3, 2, output_padding=1), features=288
        ),
        images,
    ),
    Case(
        "conv_1d",
        lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 3)),
        sequences,
    ),
    Case("layer_norm", lambda: around(nn.LayerNorm(6), 6), vectors),
    Case(
        "layer_norm_on_sequences",
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)),
        sequences,
    ),
    Case("rms_norm", lambda: around(nn.RMSNorm(6), 6), vectors),
    Case("group_norm", lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()), images),
    Case(
        "instance_norm",
        lambda: convolution(nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
        images,
    ),
    Case("batch_norm", lambda: settled(around(nn.BatchNorm1d(6), 6)), vectors),
    Case("resnet", resnet, images),
    Case("resnet_train", resnet, images, mode="train", vmap=False),
    Case("batch_norm_frozen_train", batchnorm_frozen, vectors, "train", vmap=False),
    # Without running statistics, BatchNorm uses those of the batch in eval mode too.
    Case(
        "batch_norm_untracked",
        lambda: settled(around(nn.BatchNorm1d(6, track_running_stats=False), 6)),
        vectors,
        vmap=False,
    ),
    Case(
        "batch_norm_untracked_images",
        lambda: settled(
            convolution(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        ),
        images,
        vmap=False,
    ),
    Case("lstm", lambda: recurrent(nn.LSTM), sequences, vmap=False),
    Case(
        "lstm_bidirectional",
        lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3),
        sequences,
        vmap=False,
    ),
    Case("gru", lambda: recurrent(nn.GRU), sequences, vmap=False),
    Case("rnn", lambda: recurrent(nn.RNN), sequences, vmap=False),
    Case("packed_sequences", packed_sequences, sequences, vmap=False),
    Case("attention", attention, sequences),
    Case("attention_no_bias", lambda: attention(bias=False), sequences),
    Case("attention_cross", cross_attention, sequences),
    Case("transformer", transformer, sequences),
    Case("transformer_norm_first", lambda: transformer(True), sequences),
    Case("embedding", embedding, tokens),
    Case("embedding_padding", lambda: embedding(padding_idx=2), tokens),
    Case("embedding_sparse", lambda: embedding(sparse=True), tokens, vmap=False),
    Case("tied_weights", language_model, tokens),
    Case("called_twice", called_twice, vectors),
    Case("used_directly", used_directly, vectors),
    Case("bare_parameters", class_token, sequences, vmap=False),
    Case("parameter_list", parameter_list, vectors),
    Case("frozen_layer", frozen_layer, vectors),
    Case("unused_parameter", unused_parameter, vectors),
    Case("checkpoint", lambda: checkpointed(False), vectors, vmap=False),
    Case("checkpoint_reentrant", lambda: checkpointed(True), vectors, vmap=False),
    Case("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(5, 2)), vectors),
    Case(
        "spectral_norm",
        lambda: parametrizations.spectral_norm(nn.Linear(5, 2)),
        vectors,
    ),
    Case(
        "spectral_norm_train",
        lambda: parametrizations.spectral_norm(nn.Linear(5, 2)),
        vectors,
        mode="train",
        vmap=False,
    ),
    Case("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(5, 2)), vectors),
    Case(
        "old_style_function",
        lambda: nn.Sequential(
            nn.Linear(5, 6), Computed(lambda _, x: Cube.apply(x)), nn.Linear(6, 2)
        ),
        vectors,
        vmap=False,
    ),
    Case("branching", branching, vectors, vmap=False),
    Case("hook_reads_item", hooked, vectors, vmap=False),
    Case("compiled_eager", lambda: compiled("eager"), vectors),
    Case("compiled_aot", lambda: compiled("aot_eager"), vectors),
    Case("tuple_inputs", two_inputs, pairs),
    Case("dict_inputs", keyword_inputs, named),
    Case(
        "dict_outputs",
        lambda: returning(lambda y: {"logits": y, "features": y**2}),
        vectors,
        output_fn=lambda model, x: model(x)["logits"],
    ),
    Case("derivative_outputs", mlp, vectors, output_fn=time_derivative, vmap=False),
    Case(
        "plain_derivative_outputs",
        mlp,
        vectors,
        output_fn=plain_time_derivative,
        vmap=False,
    ),
]

BY_ID = {case.id: case for case in CASES}

UNWRAPPED_OUTPUTS = {
    "logits": lambda y: {"logits": y, "features": y**2},
    "only_tensor": lambda y: {"scores": y, "loss": None},
    "tuple_of_one": lambda y: (y, None),
    "namespace": lambda y: SimpleNamespace(logits=y, hidden=y),
}
"""Results of `forward` that stand for one tensor."""
