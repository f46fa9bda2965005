"""Which way each parameter is contracted, in what order, and what that costs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.engine.survey import Place
from ntk_callbacks.engine.terms import Sizes, Term

_SMALL_PASS = 2.0**25
"""Multiply-adds of a pass that takes longer than the calls it is made of."""

_AT_ONCE = 2.0**22
"""Numbers of a gradient by one tensor of all outputs, up to which they are formed."""

_LARGEST_WORKSPACE = 2**22
"""Numbers: larger blocks are hardly faster, they only take memory."""


@dataclass(frozen=True)
class Plan:
    """How `empirical_ntk` computes the kernel of a model; `print` shows it as a table.

    Args:
        model: Name of the model's class.
        sizes: Outputs and examples that it was made for.
        groups: Parameter -> the part of the kernel it adds to.
        scaled: Parameters whose Λ has an entry for each of their numbers.
        sizes_of: Numbers of each parameter.
        itemsize: Bytes of a number.
        places: The taps of the model.
        terms: The kernels that add up to the whole, last layers first.
        exact: Parameter -> why it takes an exact route.
        joint: Whether they were known to depend on one another.
        coupled: Whether the examples depend on one another.
        batched: Whether backward passes bear to be made as one: no code of users takes
            part in them, and no operator refuses.
        widest: Numbers of an example in the largest tensor of a pass; 0 for vectors.
        propagation: Multiply-adds of one forward pass, as far as the taps tell.
        sweeps: Terms that are contracted after the same backward passes.
        block: Examples that are treated at a time.
        budget: Bytes of working memory.

    Example:
        >>> from torch import nn, randn
        >>> from ntk_callbacks import plan_ntk
        >>> plan = plan_ntk(nn.Sequential(nn.Linear(3, 2)), randn(4, 3))
        >>> plan.flops  # two for each of 10 pairs: 3 for a aᵀ, 2·2·2 for g gᵀ
        220.0
        >>> plan.exact
        {}
    """

    model: str
    sizes: Sizes
    groups: dict[str, str]
    scaled: frozenset[str]
    sizes_of: dict[str, int]
    itemsize: int
    places: tuple[Place, ...]
    terms: tuple[Term, ...]
    exact: dict[str, str]
    joint: bool
    coupled: bool
    batched: bool
    widest: float
    propagation: float
    sweeps: tuple[tuple[Term, ...], ...]
    block: int
    budget: int

    @property
    def names(self) -> list[str]:
        """The parameters on fast routes."""
        return [name for name in self.sizes_of if name not in self.exact]

    @property
    def flops(self) -> float:
        """Floating-point operations of all contractions, two for a multiply-add."""
        return 2.0 * sum(term.work for term in self.terms)

    @property
    def workspace(self) -> int:
        """Numbers that a contraction may allocate at a time."""
        return max(1, min(self.budget // 16 // self.itemsize, _LARGEST_WORKSPACE))

    @property
    def at_once(self) -> float:
        """Examples up to which the backward passes of all outputs are made as one."""
        if not self.batched:
            return 0.0
        if not self.widest:
            return math.inf
        room = min(self.workspace, _AT_ONCE) / (self.sizes.o * self.widest)
        return min(room, _SMALL_PASS / max(1.0, self.propagation))

    @property
    def coverage(self) -> float:
        """Share of the numbers of all parameters that are on fast routes."""
        fast = sum(self.sizes_of[name] for name in self.names)
        return fast / sum(self.sizes_of.values())

    def checked(self, problem: Problem) -> "Plan":
        """The plan itself, if it was made for such a problem.

        Args:
            problem: What it is to be used for.

        Returns:
            This plan.

        Raises:
            ValueError: If it was made for other examples or arguments.
        """
        s = self.sizes
        asked = (*problem.sizes, problem.x2 is None, problem.outputs, problem.joint)
        if (
            asked == (s.n1, s.n2, s.symmetric, s.outputs, self.joint)
            and problem.groups == self.groups
            and scaled_names(problem) == self.scaled
        ):
            return self
        raise ValueError(
            f"route: this plan was made for {s.n1}×{s.n2} examples, "
            f"outputs={s.outputs!r} and {len(self.groups)} parameters of {self.model}; "
            f"asked for are {asked[0]}×{asked[1]}, {problem.outputs!r} and "
            f"{len(problem.groups)} parameters, perhaps with another by, mode or shape "
            "of scaling. Make a plan with the same arguments: plan_ntk(model, x, …)."
        )

    def all_exact(self, reason: str) -> "Plan":
        """The plan that takes an exact route for every parameter."""
        return replace(
            self, terms=(), sweeps=(), exact=dict.fromkeys(self.sizes_of, reason)
        )

    def without(self, failed: dict[str, str]) -> "Plan":
        """The plan with some parameters on an exact route.

        Args:
            failed: Parameter -> why.

        Returns:
            Another plan.
        """
        moved = {
            name
            for term in self.terms
            if failed.keys() & set(term.names)
            for name in term.names
        }
        beside = "it was planned together with one that does"
        exact = self.exact | dict.fromkeys(moved, beside) | failed
        kept = [term for term in self.terms if not moved & set(term.names)]
        return replace(self, terms=tuple(kept), exact=exact).within(self.budget)

    def within(self, budget: int) -> "Plan":
        """The plan cut so that it needs at most `budget` bytes of working memory.

        Args:
            budget: Bytes.

        Returns:
            The plan with other blocks of examples and other sweeps. Terms that fit
            for no two examples take an exact route, which cuts them further.
        """
        # The rest is for the workspace, for autograd itself, and for what an allocator
        # wastes; the guard holds a copy of the weights.
        weights = sum(self.sizes_of.values()) * self.itemsize
        room = max(0, budget - weights) // 6 // self.itemsize
        n = max(self.sizes.n1, self.sizes.n2)
        each = {term: term.kept / self.sizes.examples for term in self.terms}
        wide = {
            name: "it does not fit into the memory budget"
            for term in self.terms
            if 2 * each[term] > room
            for name in term.names
        }
        if wide:
            return replace(self, budget=budget).without(wide)
        largest = max(each.values(), default=0)
        if largest * self.sizes.examples <= room:
            block, together = n, self.sizes.examples
        else:
            block = max(1, int(room / (2 * largest)))
            together = 2 * block
        sweeps: list[list[Term]] = []
        free = 0.0
        for term in self.terms:
            need = each[term] * together
            if not sweeps or need > free:
                sweeps.append([])
                free = room
            sweeps[-1].append(term)
            free -= need
        return replace(
            self, sweeps=tuple(map(tuple, sweeps)), block=block, budget=budget
        )

    def __str__(self) -> str:
        """A table of parameters, routes, operations and bytes."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        s = self.sizes
        yield (
            f"{self.model}: {s.outputs} kernel of {s.n1}×{s.n2} examples, "
            f"{s.o} outputs, {sum(self.sizes_of.values()):,} parameters"
        )
        if self.coupled:
            yield "The examples depend on one another: all of it row by row, jointly."
            return
        width = max(len(name) for name in [*self.sizes_of, "contractions"])
        yield f"{'parameter':<{width}}  {'route':<12} {'MFLOP':>10} {'MiB':>8}"
        for term in self.terms:
            for name in term.names:
                own = name == term.name
                route = term.route if own else "with weight"
                work = f"{2 * term.work / 1e6:,.1f}" if own else ""
                kept = f"{term.kept * self.itemsize / 2**20:,.1f}" if own else ""
                yield f"{name:<{width}}  {route:<12} {work:>10} {kept:>8}"
        used = {name for term in self.terms for name in term.names} | self.exact.keys()
        for name in self.sizes_of.keys() - used:
            yield f"{name:<{width}}  {'unused':<12}"
        for name, reason in self.exact.items():
            yield f"{name:<{width}}  {'exact':<12} {'':>10} {'':>8}  {reason}"
        moved = 2 * self.propagation * s.examples
        dense = 2 * s.gram(sum(self.sizes_of.values()))
        yield f"{'contractions':<{width}}  {'':<12} {self.flops / 1e6:>10,.1f}"
        yield (
            f"{'1 forward and ' + str(s.o) + ' backward passes':<{width}}  "
            f"{moved * (1 + s.o) / 1e6:,.1f} MFLOP; together the floor"
        )
        yield (
            f"J Jᵀ alone would take {dense / 1e6:,.1f} MFLOP. {self.coverage:.1%} of "
            f"the parameters are on fast routes. Backward sweeps: {len(self.sweeps)}; "
            f"examples at a time: {self.block}; budget: {self.budget / 2**20:,.0f} MiB."
        )


def scaled_names(problem: Problem) -> frozenset[str]:
    """Parameters whose Λ has an entry for each of their numbers."""
    scales = {name: problem.scale(name) for name in problem.groups}
    return frozenset(n for n, s in scales.items() if s is not None and s.ndim > 0)
