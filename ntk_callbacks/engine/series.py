"""The kernel of one model, measured again and again while it trains."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ntk_callbacks._types import Inputs, Kernel
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.audit import audit_error
from ntk_callbacks.engine.exact import by_route
from ntk_callbacks.engine.kernel import measured
from ntk_callbacks.engine.kernel_memory import KernelMemory
from ntk_callbacks.engine.plan import Plan
from ntk_callbacks.engine.planner import planned_for
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.guard import measuring

_log = logging.getLogger(__name__)


class KernelSeries:
    """Plans once for each request, and proves the plan anew at each measurement.

    Args:
        route: `"auto"`, or one of the exact routes.
    """

    def __init__(self, route: str = "auto") -> None:
        self.route = route
        self._plans: list[tuple[tuple[Any, ...], Plan]] = []
        self._memory: KernelMemory | None = None

    def measure(
        self, model: nn.Module, x: Inputs, request: Request, seed: int
    ) -> tuple[dict[str, Kernel], float | None]:
        """The kernel now.

        Args:
            model: Left exactly as it was.
            x: The same inputs each time.
            request: What is measured.
            seed: Of the examples that are audited.

        Returns:
            The parts of the kernel; and the audited error of an entry Θ[i, j] in units
            of √(Θ[i, i] Θ[j, j]), None for an exact route.
        """
        if self._memory is None:
            return self._measured(model, x, request, seed)
        found = self._memory.recall(model, x, request, seed)
        if found is None:
            found = self._measured(model, x, request, seed)
            self._memory.keep(model, x, request, seed, found)
        return found

    def remember(self) -> None:
        """Keep the kernels of the last weights, for others that will ask for the same.

        Costs one more copy of the weights. See `KernelMemory`.
        """
        if self._memory is None:
            self._memory = KernelMemory()

    def _measured(
        self, model: nn.Module, x: Inputs, request: Request, seed: int
    ) -> tuple[dict[str, Kernel], float | None]:
        with measuring(model, request.mode):
            problem = request.problem(model, x, None)
            if self.route != "auto":
                return by_route(self.route, problem), None
            plan = self._known_plan(request, problem)
            plan = plan or planned_for(problem, proved=False)  # the audit below does it
            parts, plan = measured(problem, plan)
            error = audit_error(plan, problem, parts, seed)
            limit = 10 * torch.finfo(problem.function.dtype).eps ** 0.5
            if error > limit:
                _log.warning(
                    "%s: the kernel of step %d was off by %.1e in an audit; it is "
                    "planned and measured anew",
                    *(plan.model, seed, error),
                )
                parts, plan = measured(problem, planned_for(problem))
                error = audit_error(plan, problem, parts, seed)
            if error > limit:  # for these examples, if not for those of the proof
                again = f"its kernel was off by {error:.1e} in an audit, again"
                parts, plan = measured(problem, plan.all_exact(again))
                error = audit_error(plan, problem, parts, seed)
            key = _key(request, problem)
            self._plans = [(k, p) for k, p in self._plans if k != key] + [(key, plan)]
        return parts, error

    def _known_plan(self, request: Request, problem: Problem) -> Plan | None:
        """The plan of the last such measurement, unless layers were frozen since."""
        key = _key(request, problem)
        for known, plan in self._plans:
            if known == key:
                try:
                    return plan.checked(problem)
                except ValueError:
                    return None
        return None

    def __getstate__(self) -> dict[str, Any]:
        """A process that this is sent to plans and measures for itself."""
        memory = None if self._memory is None else KernelMemory()
        return {**vars(self), "_plans": [], "_memory": memory}


def _key(request: Request, problem: Problem) -> tuple[Any, ...]:
    """What a plan is for: the request, whatever the numbers of its scaling."""
    return (
        *(request.outputs, request.by, request.parameters, request.output_fn),
        *(request.mode, request.memory_budget, request.scaling is None),
        *problem.sizes,
    )


def share_kernels(takers: Iterable[Any]) -> None:
    """Let instruments that need the same kernel measure it once.

    Those with an attribute `kernels`, a `KernelSeries`, take their kernels from the
    series of the first one with the same route from now on. The second that asks for
    the same kernel of the same model gets a copy of what the first one measured;
    whatever may have changed in between is compared to the last bit before that.

    Args:
        takers: Instruments, in the order in which they measure; those without kernels
            are left alone.

    Example:
        >>> from types import SimpleNamespace
        >>> one, two = (SimpleNamespace(kernels=KernelSeries()) for _ in range(2))
        >>> share_kernels([one, two])
        >>> one.kernels is two.kernels
        True
    """
    groups: dict[str, list[Any]] = {}
    for taker in takers:
        if isinstance(getattr(taker, "kernels", None), KernelSeries):
            groups.setdefault(taker.kernels.route, []).append(taker)
    for sharing in groups.values():
        first: KernelSeries = sharing[0].kernels
        if len(sharing) > 1:
            first.remember()
        for taker in sharing:
            taker.kernels = first
