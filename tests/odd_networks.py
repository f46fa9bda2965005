"""Small networks that use their weights, their inputs or autograd in odd ways."""

from collections.abc import Callable
from typing import Any

import torch
from networks import Computed, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
