"""Parts of a plan: the kernels that add up, and what each way to contract one costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from ntk_callbacks.engine.contraction import Contracted
from ntk_callbacks.engine.factors import Direct, Lookup, Outer, Use
from ntk_callbacks.engine.rules import RULES
from ntk_callbacks.engine.views import View

Route: TypeAlias = Literal["materialized", "paired", "factored", "lookup", "rows"]


@dataclass(frozen=True)
class Member:
    """One use of a parameter.

    Args:
        tap: Index of the tap.
        slot: Which of the parameters of the tap.
        view: What the tap sees of it; None if it sees something computed from it.
    """

    tap: int
    slot: int
    view: View | None


@dataclass(frozen=True)
class Sizes:
    """Numbers that decide what a contraction costs: outputs and examples."""

    o: int
    n1: int
    n2: int
    symmetric: bool
    outputs: Contracted

    @property
    def examples(self) -> int:
        """Examples whose rows are needed."""
        return self.n1 if self.symmetric else self.n1 + self.n2

    @property
    def pairs(self) -> float:
        """Pairs of examples whose products are needed."""
        return (
            self.n1 * (self.n1 + 1) / 2 if self.symmetric else float(self.n1 * self.n2)
        )

    def gram(self, columns: int) -> float:
        """Multiply-adds of J₁ J₂ᵀ."""
        each = self.o**2 if self.outputs == "full" else self.o
        return self.pairs * each * columns


@dataclass(frozen=True)
class Term:
    """One of the kernels that add up: that of a parameter, or of a weight and its bias.

    Args:
        name: The parameter.
        members: All its uses that overlap.
        route: How it is contracted.
        work: Multiply-adds.
        kept: Numbers that are held until it is contracted.
        early: Whether its rows of J are formed as soon as a gradient is there, which
            is then not held.
        bias: The bias that is contracted with it.
        sparse: Whether some positions of its gradients seem to be always zero.
    """

    name: str
    members: tuple[Member, ...]
    route: Route
    work: float
    kept: int
    early: bool = False
    bias: str | None = None
    sparse: bool = False

    @property
    def names(self) -> list[str]:
        """The parameters whose kernel this is."""
        return [self.name] if self.bias is None else [self.name, self.bias]

    @property
    def taps(self) -> set[int]:
        """Indices of the taps whose gradients it needs."""
        return {member.tap for member in self.members}


def overlapping(members: list[Member]) -> list[list[Member]]:
    """Groups of uses that share no number of the parameter with one another."""
    if any(member.view is None for member in members):
        return [members]
    groups: dict[View, list[Member]] = {}
    for member in members:
        assert member.view is not None
        groups.setdefault(member.view, []).append(member)
    if len(groups) > 1:
        places = torch.cat([view.places() for view in groups])
        if len(torch.unique(places)) < len(places):
            return [members]
    return list(groups.values())


def planned(
    name: str,
    members: list[Member],
    functions: list[Callable[..., Any]],
    uses: list[list[Use]],
    live: dict[Member, int],
    size: int,
    scaled: bool,
    sizes: Sizes,
) -> Term:
    """The cheapest term for uses of one parameter that overlap.

    Args:
        name: The parameter.
        members: Its uses.
        functions: The torch function of each.
        uses: For each tap, what is known of its parameters.
        live: Positions at which gradients are not zero, where that is known.
        size: Numbers of the parameter.
        scaled: Whether Λ has an entry for each number of the parameter.
        sizes: Examples and outputs of the kernel; the calls may have others.

    Returns:
        The term with its route.
    """
    found = [uses[member.tap][member.slot] for member in members]
    own = tuple(members)
    kinds = {
        (RULES.get(function), use.shape[0], *use.shape[2:])
        for function, use in zip(functions, found, strict=True)
        if isinstance(use, Outer)
    }
    views = {member.view for member in members}
    same = len(views) == 1 and None not in views
    if same and all(isinstance(use, Outer) for use in found) and len(kinds) == 1:
        outers = [use for use in found if isinstance(use, Outer)]
        ts = [live.get(m, use.shape[1]) for m, use in zip(own, outers, strict=True)]
        return _outer(name, own, outers, ts, scaled, sizes)
    if same and all(isinstance(use, Lookup) for use in found) and not scaled:
        tables = [use for use in found if isinstance(use, Lookup)]
        t, c = sum(use.ids.shape[1] for use in tables), tables[0].table[1]
        kept = sizes.o * sizes.examples * t * c
        shared = min(tables[0].table[0], t * max(sizes.n1, sizes.n2))
        return Term(name, own, "lookup", sizes.gram(c * shared), kept)
    work, kept = sizes.gram(size), sizes.o * sizes.examples * size
    early = all(isinstance(use, Direct) for use in found)
    for use in found:
        each, held = _rows_cost(use)
        work += sizes.o * sizes.examples * each
        kept += 0 if early else sizes.o * sizes.examples * held
    return Term(name, own, "rows", work, kept, early)


def _outer(
    name: str,
    members: tuple[Member, ...],
    uses: list[Outer],
    live: list[int],
    scaled: bool,
    sizes: Sizes,
) -> Term:
    q, _, c, d = uses[0].shape
    t, whole = sum(live), sum(use.shape[1] for use in uses)
    o, n = sizes.o, sizes.examples
    costs: dict[Route, float] = {
        "materialized": o * n * q * t * c * d + sizes.gram(q * c * d)
    }
    if q == 1 and not scaled:
        if sizes.outputs != "full":
            costs["paired"] = sizes.pairs * t * t * (d + o * c)
        elif t == 1:
            costs["paired"] = sizes.pairs * (d + o * o * c)
        else:
            costs["factored"] = sizes.pairs * (t * t * (d + o * c) + o * o * t * c)
    route = min(costs, key=lambda key: costs[key])
    if route == "materialized" and len(uses) == 1 and 4 * d < t:
        # The rows are smaller than the gradient that they are made of.
        return Term(name, members, "rows", costs[route], o * n * q * c * d, True)
    kept = o * n * q * whole * c
    return Term(name, members, route, costs[route], kept, sparse=t < whole)


def _rows_cost(use: Use) -> tuple[int, int]:
    """Multiply-adds and size of the gradient, for each output of each example."""
    if isinstance(use, Direct):
        return use.output, use.output
    if isinstance(use, Lookup):
        t, c = use.ids.shape[1], use.table[1]
        return t * c, t * c
    q, t, c, d = use.shape
    return q * t * c * d, q * t * c


def with_biases(
    terms: list[Term],
    uses: list[list[Use]],
    together: Callable[[str, str], bool],
) -> list[Term]:
    """Contract each bias with its weight where that is a constant beside a aᵀ.

    Args:
        terms: What is planned so far.
        uses: For each tap, what is known of its parameters.
        together: Whether a weight and a bias may be contracted together.

    Returns:
        The terms without those biases that found their weight.
    """
    count: dict[str, int] = {}
    for term in terms:
        count[term.name] = count.get(term.name, 0) + 1
    biases = {
        frozenset(term.taps): term
        for term in terms
        if count[term.name] == 1
        and len(term.taps) == len(term.members)
        and all(_is_bias(uses[m.tap][m.slot]) for m in term.members)
    }
    merged, gone = [], set()
    for term in terms:
        bias = biases.get(frozenset(term.taps))
        if (
            term.route in ("paired", "factored")
            and bias is not None
            and len(term.taps) == len(term.members)
            and together(term.name, bias.name)
        ):
            term = replace(term, bias=bias.name)
            gone.add(bias.name)
        merged.append(term)
    return [term for term in merged if term.name not in gone]


def _is_bias(use: Use) -> bool:
    return isinstance(use, Direct) and use.bias
