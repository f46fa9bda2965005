"""Makes a plan for a model, and proves it on that model before it is used."""

import logging
import math
from dataclasses import replace

import torch

from ntk_callbacks.engine.audit import failures
from ntk_callbacks.engine.coupling import beside, forward, is_coupled
from ntk_callbacks.engine.factors import Outer
from ntk_callbacks.engine.plan import Plan, scaled_names
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.engine.recording import gradients_at
from ntk_callbacks.engine.survey import Survey, surveyed
from ntk_callbacks.engine.terms import Sizes, Term, overlapping, planned, with_biases
from ntk_callbacks.engine.views import extent
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.nested import examples

_log = logging.getLogger(__name__)


def planned_for(problem: Problem, *, proved: bool = True) -> Plan:
    """The cheapest plan that stands the audit.

    Args:
        problem: The kernel it is made for.
        proved: Whether it is held against autograd, at the parameters of the model and
            beside them; False for plans all of whose kernels are audited.

    Returns:
        A plan; parameters that no rule is right for are on an exact route.

    Raises:
        UnsupportedModelError: If a parameter is reached past its attribute, or the
            model draws random numbers.
    """
    function, model = problem.function, problem.function.name
    names = list(problem.groups)
    n1, n2 = problem.sizes
    coupled = [is_coupled(function, x, joint=problem.joint) for x in problem.sides]
    # An independent example has as many outputs as the whole batch, for less.
    enough = problem.x1 if any(coupled) else examples(problem.x1, 0, 1)
    c = forward(function, enough).shape[1]
    plan = Plan(
        model=model,
        sizes=Sizes(c, n1, n2, problem.x2 is None, problem.outputs),
        groups=problem.groups,
        scaled=scaled_names(problem),
        sizes_of={name: function.params[name].numel() for name in names},
        itemsize=function.dtype.itemsize,
        places=(),
        terms=(),
        exact={},
        joint=problem.joint,
        coupled=any(coupled),
        batched=False,
        widest=0.0,
        propagation=0.0,
        sweeps=(),
        block=max(n1, n2),
        budget=problem.budget,
    )
    if plan.coupled:
        return plan.all_exact("the examples depend on one another")
    pair = problem.at([0, -1]).x1
    try:
        noisy = beside(function)
        found = surveyed(function, noisy, pair, names)
        plan = replace(
            plan,
            places=tuple(found.places),
            terms=tuple(terms_of(found, problem, plan.sizes)),
            exact=found.exact,
            batched=found.recording.native,
            widest=_widest(found),
            propagation=_propagation(found),
        )
        if plan.at_once >= 2 and not _bears_batches(found):
            plan = replace(plan, batched=False)
        failed: dict[str, str] = {}
        del found  # its graph takes memory
        if proved and function.device.type != "meta":  # there, nothing can be compared
            for seed, params in enumerate((noisy, function.params | function.fixed)):
                failed |= failures(plan, problem, params, pair, seed)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model may break in any way when it is looked into
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.info("%s: no fast route (%s)", model, reason)
        return plan.all_exact(f"the model cannot be looked into: {reason}")
    for name, reason in failed.items():
        _log.warning("%s: %r takes an exact route: %s", model, name, reason)
    return plan.without(failed).within(problem.budget)


def terms_of(survey: Survey, problem: Problem, sizes: Sizes) -> list[Term]:
    """The cheapest terms for everything that the survey covers.

    Args:
        survey: The taps of the model.
        problem: The kernel.
        sizes: Its outputs and examples.

    Returns:
        The terms, last layers first, which is the order of a backward pass.
    """
    leaves, taps = survey.recording.parameters, survey.recording.taps
    groups, scaled = problem.groups, scaled_names(problem)
    terms = []
    for name, members in survey.members.items():
        if name in survey.exact:
            continue
        for part in overlapping(members):
            view = part[0].view
            alone = len(part) == 1 and view is not None
            size = math.prod(view.shape) if alone and view else extent(leaves[name])
            functions = [taps[member.tap].function for member in part]
            terms.append(
                planned(
                    name,
                    part,
                    functions,
                    survey.uses,
                    survey.live,
                    size,
                    name in scaled,
                    sizes,
                )
            )
    terms = with_biases(
        terms,
        survey.uses,
        lambda weight, bias: groups[weight] == groups[bias] and bias not in scaled,
    )
    return sorted(terms, key=lambda term: -max(term.taps))


def _outers(survey: Survey) -> list[Outer]:
    return [use for uses in survey.uses for use in uses if isinstance(use, Outer)]


def _widest(survey: Survey) -> float:
    """Numbers of an example in the largest tensor; 0 where all weights meet vectors."""
    wide = any(use.shape[1] > 1 for use in _outers(survey))
    return survey.recording.largest / len(survey.recording.outputs) if wide else 0.0


def _bears_batches(survey: Survey) -> bool:
    """Whether one backward pass for all outputs can be made."""
    outputs, taps = survey.recording.outputs, survey.recording.taps
    unit = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    try:
        gradients_at(taps, outputs.sum(0), unit)
    except RuntimeError:  # an operator that cannot be batched
        return False
    return True


def _propagation(survey: Survey) -> float:
    """Multiply-adds of the forward pass of one example through its weights."""
    return float(sum(math.prod(use.shape) for use in _outers(survey)))
