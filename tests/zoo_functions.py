"""Parameters in single functions: sliced, looked up, computed from data."""

from collections.abc import Callable
from typing import Any

import torch
from networks import Computed, sequences, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional

Compute = Callable[[Any, Tensor], Tensor]


def between(compute: Compute, after: int = 6, **shapes: tuple[int, ...]) -> nn.Module:
    """A computation with random parameters between two linear layers."""
    return Computed(
        lambda self, x: self.head(torch.tanh(compute(self, self.stem(x)))),
        stem=nn.Linear(5, 6),
        head=nn.Linear(after, 2),
        **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()},
    )


def on_tokens(compute: Compute, after: int = 6, **shapes: tuple[int, ...]) -> nn.Module:
    """The same on sequences (n, 4, 6), averaged over time."""
    model = between(lambda self, x: compute(self, x).mean(1), after, **shapes)
    model.stem = nn.Linear(6, 6)
    return model


def in_place(self: Any, x: Tensor) -> Tensor:
    return x.mul_(self.gamma).add_(self.beta)


def partly_without_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(functional.linear(x, self.w))
    return gate * functional.linear(x, self.w)


def straight_through(self: Any, x: Tensor) -> Tensor:
    """A weight of ±1 whose gradient goes to the number behind it."""
    return functional.linear(x, self.w + (self.w.sign() - self.w).detach())


def sliced(self: Any, x: Tensor) -> Tensor:
    return torch.cat([x @ self.w[:3].t(), x @ self.w[1:4].t()], 1)


def chunked(self: Any, x: Tensor) -> Tensor:
    first, second = self.w.chunk(2)
    return functional.linear(x, self.w) + torch.cat(
        [x @ first.t(), torch.sin(x @ second.t())], 1
    )


def transposed_twice(self: Any, x: Tensor) -> Tensor:
    return functional.linear(x, self.w.t().t().contiguous()) + x @ self.w.mT.transpose(
        0, 1
    )


def written_into(self: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 6)
    out[:, :2] = self.token
    out[:, 2:] = x[:, 2:] * self.gain
    return out


def planes(self: Any, x: Tensor) -> Tensor:
    """Features looked up in a learned image, at places that depend on the input."""
    places = torch.sigmoid(x).view(len(x), 1, 3, 2)
    plane = self.plane.expand(len(x), -1, -1, -1)
    return functional.grid_sample(plane, places, align_corners=False).flatten(1)


def looked_up(look: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    return Computed(
        lambda self, ids: self.head(torch.tanh(look(self.table, ids)).mean(1)),
        table=nn.Parameter(torch.randn(7, 5)),
        head=nn.Linear(5, 2),
    )


def baddbmm(self: Any, x: Tensor) -> Tensor:
    return torch.baddbmm(self.bias, x, self.w.expand(len(x), -1, -1), beta=0.5)


USES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "where": (
        lambda: between(
            lambda self, x: torch.where(x > 0, self.above * x, self.below),
            above=(6,),
            below=(1, 6),
        ),
        vectors,
    ),
    "einsum": (
        lambda: on_tokens(
            lambda self, x: torch.einsum("bnd,de->bne", x, self.w), w=(6, 6)
        ),
        sequences,
    ),
    "einsum_heads": (
        lambda: on_tokens(
            lambda self, x: torch.einsum("bnd,hde,hek->bnk", x, self.v, self.o),
            v=(2, 6, 3),
            o=(2, 3, 6),
        ),
        sequences,
    ),
    "baddbmm": (lambda: on_tokens(baddbmm, bias=(1, 4, 6), w=(1, 6, 6)), sequences),
    "left_matmul": (
        lambda: on_tokens(lambda self, x: self.w @ x, w=(3, 4)),
        sequences,
    ),
    "tensordot": (
        lambda: on_tokens(
            lambda self, x: torch.tensordot(x, self.w, dims=([2], [1])), w=(6, 6)
        ),
        sequences,
    ),
    "in_place": (lambda: between(in_place, gamma=(6,), beta=(6,)), vectors),
    "addcmul": (
        lambda: between(
            lambda self, x: torch.addcmul(self.bias, x, self.gain), bias=(6,), gain=(6,)
        ),
        vectors,
    ),
    "addmv": (
        lambda: between(
            lambda self, x: torch.addmv(self.bias, x, self.w)[:, None],
            after=1,
            bias=(1,),
            w=(6,),
        ),
        vectors,
    ),
    "lerp": (
        lambda: between(
            lambda self, x: torch.lerp(x, self.target, torch.sigmoid(self.gate)),
            target=(6,),
            gate=(6,),
        ),
        vectors,
    ),
    "partly_without_grad": (lambda: between(partly_without_grad, w=(6, 6)), vectors),
    "straight_through": (lambda: between(straight_through, w=(6, 6)), vectors),
    "sliced": (lambda: between(sliced, w=(5, 6)), vectors),
    "chunked": (lambda: between(chunked, w=(6, 6)), vectors),
    "transposed": (lambda: between(lambda self, x: x @ self.w.t(), w=(6, 6)), vectors),
    "transposed_twice": (lambda: between(transposed_twice, w=(6, 6)), vectors),
    "concatenated": (
        lambda: between(
            lambda self, x: functional.linear(x, torch.cat([self.top, self.bottom])),
            top=(2, 6),
            bottom=(4, 6),
        ),
        vectors,
    ),
    "written_into": (lambda: between(written_into, token=(2,), gain=(4,)), vectors),
    "radial": (
        lambda: between(
            lambda self, x: (x[:, None] - self.centers).square().mean(2).neg().exp(),
            after=3,
            centers=(3, 6),
        ),
        vectors,
    ),
    "planes": (lambda: between(planes, plane=(1, 2, 4, 4)), vectors),
    "table_indexed": (lambda: looked_up(lambda table, ids: table[ids]), tokens),
    "table_index_select": (
        lambda: looked_up(
            lambda table, ids: table.index_select(0, ids.flatten()).view(len(ids), 4, 5)
        ),
        tokens,
    ),
}
