"""Holds a plan against plain autograd, on the user's own model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ntk_callbacks._types import Inputs, Kernel, Params
from ntk_callbacks.engine.backward import gradients_of
from ntk_callbacks.engine.contraction import Contracted
from ntk_callbacks.engine.execution import contracted_term, run
from ntk_callbacks.engine.plan import Plan
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.engine.sides import ChangedModelError, Side
from ntk_callbacks.engine.terms import Term
from ntk_callbacks.layout import symmetric

_COMBINATIONS = 2  # of the outputs, drawn at random
_PORTION = 2**22  # numbers of a row of J that are held at a time
_SMALL = 2**16  # numbers of a row that may be copied


def failures(
    plan: Plan, problem: Problem, params: Params, x: Inputs, seed: int
) -> dict[str, str]:
    """The parameters whose kernel is not that of plain autograd.

    Every term is computed for random combinations of the outputs, and so are the
    gradients, by ordinary backward passes through the untouched model.

    Args:
        plan: The plan.
        problem: The kernel it is made for.
        params: Values of the parameters.
        x: Two examples.
        seed: Of the combinations.

    Returns:
        Parameter -> what was found; empty if the plan is right.
    """
    if not plan.names:
        return {}
    mix, found = _combinations(plan, problem, seed), _Found(plan, problem)
    found.add_all(params, x, mix)
    wrong: dict[str, str] = {}
    for own, error, explained in found.against_autograd(params, x, mix):
        if not explained:
            reason = f"its kernel was off by {error:.1e} in an audit"
            wrong |= dict.fromkeys(own, reason)
    return wrong


def audit_error(
    plan: Plan, problem: Problem, parts: dict[str, Kernel], seed: int
) -> float:
    """How far a measured kernel is from plain autograd, on two of its examples.

    Their block of the kernel is computed once more from these two examples alone, which
    tells whether others had an influence, and each term of it is held against plain
    autograd for random combinations of the outputs.

    Args:
        plan: The plan of the measurement.
        problem: What was computed.
        parts: The result.
        seed: Of the examples and the combinations.

    Returns:
        Largest error of an entry Θ[i, j] in units of √(Θ[i, i] Θ[j, j]): some round-off
        if all is well. NaN if the kernel is not finite, ∞ if the model has changed or
        autograd gives a finite one.
    """
    if plan.coupled:  # no two examples can be told from the others, nor a term
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(problem.sizes[0], generator=generator)[:2].sort().values
    some = replace(problem, x2=None).at(chosen.tolist())
    params = problem.function.params | problem.function.fixed
    mix, found = _combinations(plan, problem, seed), _Found(plan, problem)

    def seen(term: Term, sides: list[Side]) -> None:
        found.add(term, sides[0].mixed(term, mix))

    try:
        # One block: two examples fit whatever the budget, or a term is exact.
        whole_passes = seen if plan.batched else None  # else they may not be linear
        block = torch.stack(
            list(run(replace(plan, block=2), some, whole_passes).values())
        )
        if not plan.batched:
            found.add_all(params, some.x1, mix)
        errors = [
            math.inf if math.isnan(error) and not explained else error
            for _, error, explained in found.against_autograd(params, some.x1, mix)
        ]
    except ChangedModelError:  # since the kernel was measured
        return math.inf
    if problem.x2 is None:
        again = block.sum(0)
        whole = torch.stack(list(parts.values())).sum(0)
        place = chosen.to(whole.device)
        difference = whole[place][:, place] - again
        errors.append(_error(difference, _norms(again, problem.outputs)))
    worst = torch.tensor([0.0, *errors], dtype=torch.double)
    return float(worst.max())  # NaN if one of them is


def _combinations(plan: Plan, problem: Problem, seed: int) -> Tensor:
    """Of the outputs, `(c, o)`, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    c = plan.sizes.o
    mix = torch.randn(c, min(c, _COMBINATIONS), generator=generator)
    return mix.to(problem.function.device, problem.function.dtype)


@dataclass
class _Found:
    """What a plan gives for combinations of the outputs of two examples."""

    plan: Plan
    problem: Problem
    kernels: dict[str, Tensor] = field(default_factory=dict)
    covered: dict[str, set[str]] = field(default_factory=dict)
    """Parameter that a kernel is named after -> all those whose kernel it is."""

    def add_all(self, params: Params, x: Inputs, mix: Tensor) -> None:
        """Contract all terms, from passes of the combinations alone."""
        if not self.plan.terms:
            return
        plan, function = self.plan, self.problem.function
        side = Side(function, params, x, plan.places, list(plan.sizes_of), mix)
        side.differentiate(plan.terms, plan.at_once)
        for term in plan.terms:
            self.add(term, side)

    @torch.no_grad()
    def add(self, term: Term, side: Side) -> None:
        """Contract a term of the plan."""
        outputs, scale = self.problem.outputs, self.problem.scale
        kernel = contracted_term(term, [side], outputs, scale, self.plan.workspace)
        before = self.kernels.get(term.name, 0)
        self.kernels[term.name] = before + symmetric(kernel)
        self.covered.setdefault(term.name, set()).update(term.names)

    def against_autograd(
        self, params: Params, x: Inputs, mix: Tensor
    ) -> list[tuple[set[str], float, bool]]:
        """For each kernel: its parameters, error, whether round-off explains it."""
        names, outputs = self.plan.names, self.problem.outputs
        if not names:
            return []
        parts = _by_autograd(self.problem, params, x, names, mix)
        norms = {name: _norms(kernel, outputs) for name, kernel in parts.items()}
        whole = torch.stack(list(norms.values())).sum(0)
        known = set().union(*self.covered.values())
        unused = {name: {name} for name in names if name not in known}  # it seems
        eps = torch.finfo(self.problem.function.dtype).eps
        # A gradient that vanishes but for round-off is only known to that round-off.
        floor = 1e3 * eps**1.5 * whole
        result = []
        for name, own in (self.covered | unused).items():
            expected = torch.stack([parts[n] for n in sorted(own)]).sum(0)
            scale = torch.stack([norms[n] for n in sorted(own)]).sum(0)
            kernel = self.kernels.get(name, torch.zeros_like(expected))
            error = _error(kernel - expected, scale + floor)
            explained = error <= 10 * eps**0.5 or not expected.isfinite().all()
            result.append((own, error, bool(explained)))
        return result


def _by_autograd(
    problem: Problem, params: Params, x: Inputs, names: list[str], mix: Tensor
) -> dict[str, Tensor]:
    """The kernel of each parameter for combinations of f, by plain autograd."""
    function = problem.function
    leaves = {
        name: tensor.detach().requires_grad_(
            name in function.params or name in function.trained
        )
        for name, tensor in params.items()
    }

    def differentiate(outputs: Tensor) -> dict[str, Tensor]:
        row = gradients_of(outputs)
        parts: dict[str, Tensor] = {}
        for some in _portions(names, function.params):
            wanted = [leaves[name] for name in some]
            rows = [[row(f @ m, wanted) for f in outputs] for m in mix.mT]
            for index, name in enumerate(some):
                own = [[example[index].flatten() for example in o] for o in rows]
                parts[name] = _products(own, problem, name)
        return parts

    parts: dict[str, Tensor] = function.during(leaves, x, differentiate)
    return parts


def _portions(names: list[str], params: Params) -> Iterator[list[str]]:
    """Parameters whose rows are held at a time: differentiating again is cheap."""
    portion: list[str] = []
    size = 0
    for name in names:
        if portion and size + params[name].numel() > _PORTION:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += params[name].numel()
    yield portion


@torch.no_grad()
def _products(rows: list[list[Tensor]], problem: Problem, name: str) -> Tensor:
    """The kernel of a parameter from its rows, for each combination and example."""
    scale = problem.scale(name)
    o, n = len(rows), len(rows[0])
    right = [row for own in rows for row in own]
    left = right
    if scale is not None:
        left = [row * (scale if scale.ndim == 0 else scale.flatten()) for row in right]
    if right[0].numel() <= _SMALL:
        gram = torch.stack(left) @ torch.stack(right).mT
    else:  # without another copy of them
        gram = torch.stack([torch.stack([a @ b for b in right]) for a in left])
    kernel = gram.view(o, n, o, n).permute(1, 3, 0, 2)
    if problem.outputs == "full":
        return kernel
    diagonal = kernel.diagonal(dim1=2, dim2=3)
    return diagonal.sum(-1) if problem.outputs == "trace" else diagonal


def _norms(kernel: Kernel, outputs: Contracted) -> Tensor:
    """√(Θ[i, i] Θ[j, j]) for every entry, from the diagonals over the outputs too."""
    own = kernel.diagonal(dim1=0, dim2=1)
    if outputs == "full":
        root = own.diagonal(dim1=0, dim2=1).clamp(min=0).sqrt()  # (n, o)
        return root[:, None, :, None] * root[None, :, None, :]
    root = own.movedim(-1, 0).clamp(min=0).sqrt()
    return root[:, None] * root[None, :]


def _error(difference: Tensor, scale: Tensor) -> float:
    ratio = difference.abs() / scale
    ratio = torch.where((difference == 0) & (scale == 0), 0.0, ratio)
    return float(ratio.max())
