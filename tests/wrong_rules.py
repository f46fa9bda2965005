"""Rules that are wrong for a network: what each spoils, and who is told of it."""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from cases import in_double
from networks import (
    Computed,
    around,
    convolution,
    embedding,
    images,
    mlp,
    settled,
    tokens,
    vectors,
)
from oracles import each, ntk_by_loop
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks.engine.rules import RULES

OUTPUTS = ["full", "trace", "diagonal"]

# Sums of some hundred terms: round-off is near 100 ε; the normalizations lose a digit.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def expected(model, x, outputs="full", **arguments):
    """The kernel by the loop in float64, and what `outputs` keeps of it."""
    model = copy.deepcopy(model).double()
    full = ntk_by_loop(model, each(in_double, x), **arguments)
    diagonal = full.diagonal(dim1=2, dim2=3)
    return {"full": full, "trace": diagonal.mean(-1), "diagonal": diagonal}[outputs]


def moved(caplog):
    """The parameters that warnings say take an exact route."""
    found = set()
    for record in caplog.records:
        match = re.search(
            r"'(.*)' takes an exact route: its kernel was off by \d", record.message
        )
        if record.levelno == logging.WARNING and match:
            found.add(match[1])
    return found


# Rules. Each takes the right one and what a rule takes.


def too_large(right, call, input, weight, bias=None, *, shape):
    """1.01 times the gradient of the weights of one shape."""
    uses = right(call, input, weight, bias)
    if weight.shape == shape:
        use = uses[id(weight)]
        uses[id(weight)] = replace(use, right=lambda g: 1.01 * use.right(g))
    return uses


def without_padding(
    right, call, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
):
    return right(call, input, weight, bias, stride, 0, dilation, groups)


def without_a_position(right, call, input, weight, bias=None, *args):
    """The gradient of the bias misses the first row of every image."""
    uses = right(call, input, weight, bias, *args)
    use = uses[id(bias)]

    def rows(gradient):
        first = torch.zeros_like(gradient[:, :, :1])
        return use.rows(torch.cat([first, gradient[:, :, 1:]], 2))

    return uses | {id(bias): replace(use, rows=rows)}


def with_another_epsilon(right, call, input, shape, weight=None, bias=None, eps=1e-5):
    return right(call, input, shape, weight, bias, eps + 0.1)


def in_one_group(right, call, input, num_groups, weight=None, bias=None, eps=1e-5):
    return right(call, input, 1, weight, bias, eps)


def without_a_mean(right, call, input, mean, *args, **kwargs):
    return right(call, input, torch.zeros_like(mean), *args, **kwargs)


def of_the_token_before(right, call, input, weight, *args, **kwargs):
    return right(call, input.roll(1, 1), weight, *args, **kwargs)


def without_alpha(right, call, input, other, *, alpha=1):
    return right(call, input, other)


def without_beta(right, call, input, mat1, mat2, *, beta=1, alpha=1):
    return right(call, input, mat1, mat2)


@dataclass(frozen=True)
class Wrong:
    """A wrong rule, a network it concerns, and the parameters whose kernels it spoils.

    A bias that is contracted with its weight goes where the weight goes.
    """

    id: str
    function: Callable[..., Any]
    rule: Callable[..., Any]
    model: Callable[[], nn.Module]
    probe: Callable[[], Tensor]
    spoiled: set[str]

    def plant(self, monkeypatch):
        rule = partial(self.rule, RULES[self.function])
        monkeypatch.setitem(RULES, self.function, rule)


def shifted():
    return Computed(
        lambda self, x: self.head(
            torch.tanh(torch.add(self.stem(x), self.shift, alpha=0.5))
        ),
        stem=nn.Linear(5, 6),
        shift=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 2),
    )


def doubly_shifted():
    return Computed(
        lambda self, x: self.head(
            torch.tanh(torch.addmm(self.shift, x, self.weight, beta=2))
        ),
        weight=nn.Parameter(torch.randn(5, 6)),
        shift=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 2),
    )


WRONG = [
    Wrong(
        "linear_too_large",
        functional.linear,
        partial(too_large, shape=(2, 6)),
        mlp,
        vectors,
        {"4.weight", "4.bias"},
    ),
    Wrong(
        "conv_without_padding",
        functional.conv2d,
        without_padding,
        lambda: convolution(nn.ReLU()),
        images,
        {"0.weight"},
    ),
    Wrong(
        "bias_without_a_position",
        functional.conv2d,
        without_a_position,
        lambda: convolution(nn.ReLU()),
        images,
        {"0.bias"},
    ),
    Wrong(
        "layer_norm_with_another_epsilon",
        functional.layer_norm,
        with_another_epsilon,
        lambda: around(nn.LayerNorm(6), 6),
        vectors,
        {"1.weight"},
    ),
    Wrong(
        "group_norm_in_one_group",
        functional.group_norm,
        in_one_group,
        lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()),
        images,
        {"1.weight"},
    ),
    Wrong(
        "batch_norm_without_a_mean",
        functional.batch_norm,
        without_a_mean,
        lambda: settled(around(nn.BatchNorm1d(6), 6)),
        vectors,
        {"1.weight"},
    ),
    Wrong(
        "embedding_of_the_token_before",
        functional.embedding,
        of_the_token_before,
        embedding,
        tokens,
        {"embed.weight"},
    ),
    Wrong("add_without_alpha", torch.add, without_alpha, shifted, vectors, {"shift"}),
    Wrong(
        "addmm_without_beta",
        torch.addmm,
        without_beta,
        doubly_shifted,
        vectors,
        {"weight", "shift"},
    ),
]
