"""What a plan is made from: the taps of a model, and where the examples lie in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.backward import graph_nodes
from ntk_callbacks.engine.batch_axis import BatchAxis
from ntk_callbacks.engine.factors import Call, Outer, Use, unexpanded
from ntk_callbacks.engine.recording import Recording, record
from ntk_callbacks.engine.rules import RULES, Rule, local, taken_apart
from ntk_callbacks.engine.tap_axes import axes_of_taps
from ntk_callbacks.engine.taps import Tap
from ntk_callbacks.engine.terms import Member
from ntk_callbacks.engine.views import View, roots, view_of
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size


@dataclass(frozen=True)
class Place:
    """What a plan remembers of a tap, to know it again.

    Args:
        function: Name of the torch function.
        shape: Shape of the output, with what one example takes of its batch axis;
            empty if no batch axis is known.
        sources: The parameters behind each slot, and the view where it is one.
        axis: Batch axis of the output; None if there is none, or it does not matter.
        rule: How its rows follow.
        split: Where the general rule decides, which arguments it takes apart.
    """

    function: str
    shape: tuple[int, ...]
    sources: tuple[tuple[tuple[str, ...], View | None], ...]
    axis: BatchAxis | None
    rule: Rule | None
    split: tuple[bool, ...] = ()


@dataclass
class Survey:
    """The taps of a model on a few examples, and the parameters that they cover.

    Args:
        recording: The forward pass.
        places: For each tap.
        calls: For each tap that matters.
        uses: For each tap, what is known of its slots.
        members: Parameter -> its uses.
        exact: Parameter -> why it has to take an exact route.
        live: Uses of a weight -> positions at which a gradient is not zero.
    """

    recording: Recording
    places: list[Place]
    calls: list[Call | None]
    uses: list[list[Use]]
    members: dict[str, list[Member]] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    live: dict[Member, int] = field(default_factory=dict)


def surveyed(
    function: ModelFunction, params: Params, x: Inputs, names: list[str]
) -> Survey:
    """Find out how each parameter acts on the outputs.

    Args:
        function: The model, whose examples do not depend on one another.
        params: Values of its parameters at which no contribution vanishes.
        x: At least two examples.
        names: The parameters to differentiate.

    Returns:
        What a plan needs to know.
    """
    recording = record(function, params, x, names)
    n = batch_size(x)
    reached, axes = axes_of_taps(function, params, x, recording)
    survey = Survey(recording, [], [], [])
    for name in _in_graph(recording):
        survey.exact[name] = "it is used by a function without a rule"
    for index, tap in enumerate(recording.taps):
        axis = axes[index]
        sources = tuple(
            _described(s, recording.parameters) for s in tap.sources.values()
        )
        touched = {name for names, _ in sources for name in names}
        uses: list[Use] = []
        rule = call = None
        if isinstance(axis, str):
            survey.exact |= dict.fromkeys(touched, axis)
            axis = None
        elif axis is not None:
            call = Call(tap, axis, n)
            rule, uses = _uses(call)
            if rule is None:
                name = getattr(tap.function, "__name__", str(tap.function))
                survey.exact |= dict.fromkeys(
                    touched, f"no rule fits its use in {name}"
                )
        survey.places.append(_place(tap, sources, axis, rule, n))
        survey.calls.append(call)
        survey.uses.append(uses)
        for slot, use in enumerate(uses):
            found, view = sources[slot]
            member, gradient = Member(index, slot, view), reached[index]
            if isinstance(use, Outer) and gradient is not None:
                survey.live[member] = _live(use.right(gradient))
            for name in found:
                survey.members.setdefault(name, []).append(member)
    return survey


def _live(g: Tensor) -> int:
    """Positions t of `(n, q, t, c)` at which an output depends on the weight."""
    return max(1, int((g != 0).any(3).any(0).any(0).sum()))


def _uses(call: Call) -> tuple[Rule | None, list[Use]]:
    """The rule that applies, and what it says of each slot."""
    for rule in (RULES.get(call.tap.function), local):
        if rule is None:
            continue
        try:
            uses = uses_of(call, rule)
            for use, source in zip(uses, call.tap.sources.values(), strict=True):
                rows = use.rows(source.detach().new_zeros(call.tap.shape))
                shape = (call.n, *unexpanded(source).shape)
                call.expect(rows.shape == shape, "rows of another shape")
            return rule, uses
        except Exception:  # a rule may fail in any way on arguments it does not know
            continue
    return None, []


def uses_of(call: Call, rule: Rule) -> list[Use]:
    """What a rule says of each slot of a tap.

    Args:
        call: The tap.
        rule: Its rule.

    Returns:
        A use for each slot.

    Raises:
        LookupError: If the rule does not apply.
    """
    tap = call.tap
    uses = rule(call, *tap.args, **tap.kwargs)
    call.expect(uses.keys() == tap.sources.keys(), "not every parameter has a rule")
    for key, use in uses.items():
        if isinstance(use, Outer):
            source = tap.sources[key]
            call.expect(unexpanded(source).shape == source.shape, "a repeated weight")
    return [uses[key] for key in tap.sources]


def _described(
    source: Tensor, parameters: Params
) -> tuple[tuple[str, ...], View | None]:
    names = tuple(roots(source, parameters))
    return names, view_of(source, parameters[names[0]]) if len(names) == 1 else None


def _place(
    tap: Tap,
    sources: tuple[tuple[tuple[str, ...], View | None], ...],
    axis: BatchAxis | None,
    rule: Rule | None,
    n: int,
) -> Place:
    shape: list[int] = []
    if axis is not None:
        shape = list(tap.shape)
        shape[axis.axis] //= n
    name = getattr(tap.function, "__name__", str(tap.function))
    # A mask of fixed size may have the length of the batch by chance.
    split = taken_apart(tap, axis) if rule is local and axis is not None else ()
    return Place(name, tuple(shape), sources, axis, rule, split)


def known_again(places: Sequence[Place], recording: Recording, n: int) -> bool:
    """Whether a forward pass has the taps that a plan was made for.

    Args:
        places: Those of the plan.
        recording: The forward pass.
        n: Its number of examples.

    Returns:
        False if the model does something else than it did then.
    """
    if len(places) != len(recording.taps):
        return False
    for place, tap in zip(places, recording.taps, strict=True):
        sources = tuple(
            _described(s, recording.parameters) for s in tap.sources.values()
        )
        if _place(tap, sources, place.axis, place.rule, n) != place:
            return False
        if place.axis is not None and tap.shape[place.axis.axis] % n:
            return False
    return True


def _in_graph(recording: Recording) -> Iterator[str]:
    """Parameters that autograd reaches past the taps."""
    names = {id(leaf): name for name, leaf in recording.parameters.items()}
    for node in graph_nodes(recording.outputs):
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            yield name
