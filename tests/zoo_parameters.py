"""Parameters in unusual places: shared, of graphs, of several inputs and uses."""

from typing import Any

import torch
from cases import Case
from networks import Computed, mlp, pairs, sequences, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from zoo_functions import USES, between, looked_up


def graphs(n: int = 3) -> tuple[Tensor, Tensor]:
    """Dense adjacency and features, a graph of 4 nodes for each example."""
    edges = (torch.rand(n, 4, 4) < 0.5).float()
    adjacency = edges.maximum(edges.mT).maximum(torch.eye(4))
    root = adjacency.sum(-1).rsqrt()
    return root[:, :, None] * adjacency * root[:, None], torch.randn(n, 4, 5)


def graph_convolution() -> nn.Module:
    """A X W for each graph, then a sum over its nodes."""

    def compute(self: Any, adjacency: Tensor, x: Tensor) -> Tensor:
        x = torch.relu(adjacency @ x @ self.first + self.bias)
        return self.head((adjacency @ (x @ self.second)).sum(1))

    return Computed(
        compute,
        first=nn.Parameter(torch.randn(5, 6)),
        bias=nn.Parameter(torch.randn(6)),
        second=nn.Parameter(torch.randn(6, 6)),
        head=nn.Linear(6, 2),
    )


class NodeClassifier(nn.Module):
    """One graph, whose nodes are the examples: each sees its neighbors."""

    def __init__(self) -> None:
        super().__init__()
        edges = [[0, 1, 1, 2, 2, 3, 3, 0], [1, 0, 2, 1, 3, 2, 0, 3]]
        self.register_buffer("edges", torch.tensor(edges))
        self.message, self.root = nn.Linear(5, 6, bias=False), nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        messages = self.message(x)[source]
        received = x.new_zeros(len(x), 6).index_add(0, target, messages)
        return self.head(torch.relu(self.root(x) + received / 2))


class NodeClassifierDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        ring = torch.eye(4) + torch.eye(4).roll(1, 0) + torch.eye(4).roll(-1, 0)
        self.register_buffer("adjacency", ring / 3)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.adjacency @ self.first(x))
        return self.adjacency @ self.second(hidden)


def attention_over_examples() -> nn.Module:
    """Coupled through the data alone, and for any number of examples."""

    def compute(self: Any, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
        return weights @ self.value(x)

    return Computed(
        compute, query=nn.Linear(5, 4), key=nn.Linear(5, 4), value=nn.Linear(5, 2)
    )


def hypernetwork() -> nn.Module:
    """The first input makes the weights that the second goes through."""

    def compute(self: Any, x: Tensor, context: Tensor) -> Tensor:
        weight, bias = self.make(context).split([20, 4], dim=1)
        hidden = torch.bmm(x[:, None], weight.view(-1, 5, 4)).squeeze(1) + bias
        return self.head(torch.tanh(hidden))

    return Computed(compute, make=nn.Linear(4, 24), head=nn.Linear(4, 2))


def equilibrium() -> nn.Module:
    """One block four times over, with the input injected every time."""

    def compute(self: Any, x: Tensor) -> Tensor:
        injected, z = self.inject(x), x.new_zeros(len(x), 6)
        for _ in range(4):
            z = self.norm(torch.tanh(self.block(z) + injected))
        return self.head(z)

    return Computed(
        compute,
        inject=nn.Linear(5, 6),
        block=nn.Linear(6, 6),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 2),
    )


def siamese() -> nn.Module:
    def compute(self: Any, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.encoder(a), self.encoder(b)
        return self.head(torch.cat([(left - right).abs(), left * right], 1))

    return Computed(compute, encoder=mlp(), head=nn.Linear(4, 2))


def twins(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5), torch.randn(n, 5)


def deep_sets() -> nn.Module:
    return Computed(
        lambda self, x: self.rho(torch.relu(self.phi(x)).sum(1)),
        phi=nn.Linear(6, 6),
        rho=nn.Linear(6, 2),
    )


def functional_bilinear() -> nn.Module:
    return Computed(
        lambda self, a, b: functional.bilinear(
            torch.tanh(self.stem(a)), b, self.w, self.b
        ),
        stem=nn.Linear(5, 3),
        w=nn.Parameter(torch.randn(2, 3, 4)),
        b=nn.Parameter(torch.randn(2)),
    )


def temperature() -> nn.Module:
    return Computed(
        lambda self, x: self.body(x) / self.temperature,
        body=mlp(),
        temperature=nn.Parameter(torch.tensor(1.7)),
    )


def similarity() -> nn.Module:
    """Cosines with class vectors, times a scale that is learned by its logarithm."""
    return Computed(
        lambda self, x: (
            self.log_scale.exp()
            * (
                functional.normalize(self.stem(x), dim=-1)
                @ functional.normalize(self.classes, dim=-1).t()
            )
        ),
        stem=nn.Linear(5, 6),
        classes=nn.Parameter(torch.randn(2, 6)),
        log_scale=nn.Parameter(torch.tensor(0.7)),
    )


PARAMETERS = [
    *(Case(id, model, probe) for id, (model, probe) in USES.items()),
    Case(
        "table_one_hot",
        lambda: looked_up(
            lambda table, ids: functional.one_hot(ids, 7).to(table) @ table
        ),
        tokens,
        vmap=False,
    ),
    Case("graph_convolution", graph_convolution, graphs),
    Case("graph_of_examples", NodeClassifier, lambda: vectors(4), vmap=False),
    Case(
        "graph_of_examples_dense", NodeClassifierDense, lambda: vectors(4), vmap=False
    ),
    Case("attention_over_examples", attention_over_examples, vectors, vmap=False),
    Case("hypernetwork", hypernetwork, pairs),
    Case("equilibrium", equilibrium, vectors),
    Case("siamese", siamese, twins),
    Case("deep_sets", deep_sets, sequences),
    Case("functional_bilinear", functional_bilinear, pairs),
    Case("temperature", temperature, vectors),
    Case("similarity", similarity, vectors),
    Case(
        "weight_norm_deep",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 6)),
            nn.Tanh(),
            parametrizations.weight_norm(nn.Linear(6, 2), dim=1),
        ),
        vectors,
    ),
    # Wrong under `jacrev`, where many gradients go through the backward pass at once.
    Case(
        "distances",
        lambda: between(
            lambda self, x: torch.cdist(x, self.centers), after=3, centers=(3, 6)
        ),
        vectors,
        vmap=False,
    ),
]
