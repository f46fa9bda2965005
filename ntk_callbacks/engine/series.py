"""The kernel of one model, measured again and again while it trains."""

import logging
from typing import Any

import torch
from torch import nn

from ntk_callbacks._types import Inputs, Kernel
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.audit import audit_error
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.engine.kernel import measured, new_plan
from ntk_callbacks.engine.plan import Plan
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.guard import measuring

_log = logging.getLogger(__name__)


class KernelSeries:
    """Plans once, and proves the plan anew at each measurement.

    Args:
        route: `"auto"`, or one of the exact routes.
    """

    def __init__(self, route: str = "auto") -> None:
        self.route = route
        self._plan: Plan | None = None

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
        with measuring(model, request.mode):
            problem = request.problem(model, x, None)
            if self.route != "auto":
                return ROUTES[self.route](problem), None
            plan = self._known_plan(problem) or new_plan(problem)
            parts, plan = measured(problem, plan)
            error = audit_error(plan, problem, parts, seed)
            if error > 10 * torch.finfo(problem.function.dtype).eps ** 0.5:
                _log.warning(
                    "%s: the kernel of step %d was off by %.1e in an audit; it is "
                    "planned and measured anew",
                    *(plan.model, seed, error),
                )
                parts, plan = measured(problem, new_plan(problem))
                error = audit_error(plan, problem, parts, seed)
            self._plan = plan
        return parts, error

    def _known_plan(self, problem: Problem) -> Plan | None:
        """The plan of the last measurement, unless layers were frozen since."""
        if self._plan is None:
            return None
        try:
            return self._plan.checked(problem)
        except ValueError:
            return None

    def __getstate__(self) -> dict[str, Any]:
        """A process that this is sent to plans for itself."""
        return {**vars(self), "_plan": None}
