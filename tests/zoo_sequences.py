"""State spaces, cells, experts, adapters and spectra: sequences beside attention."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from networks import Computed, sequences, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional
from zoo_language import RMSNorm, ids
from zoo_vision import awake


class MambaMixer(nn.Module):
    """Selective state space: what is written, kept and read depends on the input."""

    def __init__(self, width: int = 8, inner: int = 12, state: int = 3) -> None:
        super().__init__()
        self.rank, self.state = 2, state
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        decay = torch.arange(1.0, state + 1).expand(inner, -1)
        self.A_log = nn.Parameter(decay.log().contiguous())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        for layer in (self.x_proj, self.dt_proj, self.conv1d):
            nn.init.normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        x, gate = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        x = functional.silu(self.conv1d(x)[..., :time]).transpose(1, 2)
        sizes = [self.rank, self.state, self.state]
        dt, B, C = self.x_proj(x).split(sizes, dim=-1)
        dt = functional.softplus(self.dt_proj(dt))
        A = -torch.exp(self.A_log)
        kept = torch.exp(dt[..., None] * A)
        written = dt[..., None] * B[:, :, None] * x[..., None]
        hidden = torch.zeros_like(kept[:, 0])
        read = []
        for t in range(time):
            hidden = kept[:, t] * hidden + written[:, t]
            read.append((hidden * C[:, t, None]).sum(-1))
        y = torch.stack(read, dim=1) + x * self.D
        return self.out_proj(y * functional.silu(gate.transpose(1, 2)))


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mixers = nn.ModuleList(MambaMixer() for _ in range(2))
        self.norms = nn.ModuleList(RMSNorm() for _ in range(2))
        self.norm_f = RMSNorm()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return functional.linear(self.norm_f(x)[:, -1], self.embed.weight)


class Adapted(nn.Module):
    """LoRA: a frozen layer and the product of two thin ones beside it."""

    def __init__(self, before: int, after: int, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(before, after).requires_grad_(False)
        self.lora_A = nn.Linear(before, 2, bias=False)
        self.lora_B = nn.Linear(2, after, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.merged = merged
        self.scaling = 8 / 2

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling
        delta = self.lora_B.weight @ self.lora_A.weight
        return functional.linear(
            x, self.base.weight + self.scaling * delta, self.base.bias
        )


def lora(merged: bool) -> nn.Module:
    return awake(
        nn.Sequential(
            Adapted(5, 6, merged), nn.Tanh(), Adapted(6, 6, merged), nn.Linear(6, 2)
        )
    )


class Experts(nn.Module):
    """Each token goes through the one expert that its router prefers."""

    def __init__(self, width: int, scatter: str) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))
            for _ in range(3)
        )
        self.scatter = scatter

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            if self.scatter == "mask":
                mask = chosen == index
                out[mask] = expert(flat[mask]) * weight[mask, None]
            else:
                (places,) = torch.where(chosen == index)
                routed = expert(flat[places]) * weight[places, None]
                out.index_add_(0, places, routed)
        return out.view_as(x)


def mixture(scatter: str) -> nn.Module:
    return awake(
        Computed(
            lambda self, x: self.head((x + self.experts(self.norm(x))).mean(1)),
            norm=nn.LayerNorm(6),
            experts=Experts(6, scatter),
            head=nn.Linear(6, 2),
        )
    )


def sequence_first() -> nn.Module:
    """The batch is axis 1 from beginning to end."""
    return awake(
        Computed(
            lambda self, x: self.head(self.layers(self.embed(x.transpose(0, 1)))[-1]),
            embed=nn.Linear(6, 8),
            layers=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 12, batch_first=False),
                2,
                enable_nested_tensor=False,
            ),
            head=nn.Linear(8, 2),
        )
    )


def unrolled(kind: type[nn.RNNCellBase]) -> nn.Module:
    """A cell in a loop over time, from a learned state."""

    def compute(self: Any, x: Tensor) -> Tensor:
        state = self.start.expand(len(x), -1)
        cell_state = torch.zeros_like(state)
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                state, cell_state = self.cell(step, (state, cell_state))
            else:
                state = self.cell(step, state)
        return self.head(state)

    return awake(
        Computed(
            compute,
            start=nn.Parameter(torch.zeros(1, 5)),
            cell=kind(6, 5),
            head=nn.Linear(5, 2),
        )
    )


def bag(**options: Any) -> nn.Module:
    return awake(
        nn.Sequential(nn.EmbeddingBag(7, 5, **options), nn.Tanh(), nn.Linear(5, 2))
    )


def weighted_bag() -> nn.Module:
    return Computed(
        lambda self, ids, scale: self.head(self.bag(ids, per_sample_weights=scale)),
        bag=nn.EmbeddingBag(7, 5, mode="sum"),
        head=nn.Linear(5, 2),
    )


def weighted_tokens(n: int = 3) -> tuple[Tensor, Tensor]:
    return tokens(n), torch.rand(n, 4)


def mixing(mix: Callable[[Any, Tensor], Tensor], **parameters: Tensor) -> nn.Module:
    """Some mixing over time between two linear layers."""
    return Computed(
        lambda self, x: self.head(torch.tanh(mix(self, self.stem(x))).mean(1)),
        stem=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
        **{name: nn.Parameter(tensor) for name, tensor in parameters.items()},
    )


def global_filter(self: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    spectrum = spectrum * torch.view_as_complex(self.filter)
    return torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")


def complex_rotary(self: Any, x: Tensor) -> Tensor:
    angle = torch.outer(torch.arange(x.shape[1]), self.frequency)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


SEQUENCES = [
    Case("mamba", lambda: awake(Mamba()), ids),
    Case("lora", lambda: lora(merged=False), vectors),
    Case("lora_merged", lambda: lora(merged=True), vectors),
    Case("experts_masked", lambda: mixture("mask"), lambda: sequences(6), vmap=False),
    Case("experts_indexed", lambda: mixture("add"), lambda: sequences(6), vmap=False),
    Case("sequence_first", sequence_first, sequences),
    Case("rnn_cell", lambda: unrolled(nn.RNNCell), sequences, vmap=False),
    Case("gru_cell", lambda: unrolled(nn.GRUCell), sequences, vmap=False),
    Case("lstm_cell", lambda: unrolled(nn.LSTMCell), sequences, vmap=False),
    Case("embedding_bag", bag, tokens),
    Case("embedding_bag_max", lambda: bag(mode="max"), tokens),
    Case("embedding_bag_weighted", weighted_bag, weighted_tokens),
    Case(
        "fourier_filter",
        lambda: mixing(global_filter, filter=torch.randn(3, 6, 2)),
        sequences,
    ),
    Case(
        "complex_rotary",
        lambda: mixing(complex_rotary, frequency=torch.tensor([1.0, 0.3, 0.1])),
        sequences,
    ),
    # `torch.func` is wrong about PReLU where n = c; the bag must be exact anyway.
    Case(
        "embedding_bag_prelu",
        lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.PReLU(4), nn.Linear(4, 2)),
        lambda: tokens(2),
        vmap=False,
    ),
]
