"""One side of a kernel: a forward pass, and backward passes to its taps."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.contraction import Strand
from ntk_callbacks.engine.factors import Call, Direct, Lookup, Outer, Use
from ntk_callbacks.engine.recording import gradients_at, record
from ntk_callbacks.engine.survey import Place, known_again, uses_of
from ntk_callbacks.engine.terms import Member, Term
from ntk_callbacks.engine.views import extent, view_of
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size


class ChangedModelError(RuntimeError):
    """The model no longer does what it did when the plan was made."""


_Held: TypeAlias = tuple[int, int, bool]
"""Tap, slot, and whether rows were formed early."""


@dataclass(frozen=True)
class _Form:
    """What is held of a gradient.

    Args:
        of: The gradient by one output -> what is held.
        batched: Whether it can be found for several outputs at once.
    """

    of: Callable[[Tensor], Tensor]
    batched: bool = True

    def of_all(self, stacked: Tensor) -> list[Tensor]:
        """The same for the gradients by all outputs, `(o, …)`."""
        if self.batched:
            try:
                return list(torch.vmap(self.of)(stacked).detach().unbind(0))
            except RuntimeError:  # an operator that cannot be batched
                pass
        return [self.of(gradient).detach() for gradient in stacked]


def _held(term: Term, member: Member) -> _Held:
    """Parameters that share a slot, as those of a weight norm, share what is held."""
    return member.tap, member.slot, term.early


class Side:
    """The inputs of one side of a kernel: a forward pass, and gradients at its taps.

    Args:
        function: The model.
        params: Values of its parameters.
        x: The inputs.
        places: The taps of the plan.
        names: The parameters to differentiate.
        mix: `(c, o)`: takes o combinations of the outputs in place of them.

    Raises:
        ChangedModelError: If the taps are not those of the plan.
    """

    def __init__(
        self,
        function: ModelFunction,
        params: Params,
        x: Inputs,
        places: Sequence[Place],
        names: list[str],
        mix: Tensor | None = None,
    ) -> None:
        self.n = batch_size(x)
        self.recording = record(function, params, x, names)
        if not known_again(places, self.recording, self.n):
            raise ChangedModelError("the taps differ from those of the plan")
        outputs = self.recording.outputs
        self.outputs = outputs if mix is None else outputs @ mix
        self.o = self.outputs.shape[1]
        self._places = places
        self._uses: dict[int, list[Use]] = {}
        self._held: dict[_Held, list[Tensor]] = {}
        self._needed: dict[_Held, int] = {}

    def use(self, member: Member) -> Use:
        """How the gradients of a tap become rows of J."""
        if member.tap not in self._uses:
            place, tap = self._places[member.tap], self.recording.taps[member.tap]
            assert place.axis is not None
            assert place.rule is not None
            if not tap.unchanged:
                raise ChangedModelError("an input was overwritten after its use")
            call = Call(tap, place.axis, self.n)
            self._uses[member.tap] = uses_of(call, place.rule)
        return self._uses[member.tap][member.slot]

    def differentiate(self, terms: Sequence[Term], at_once: float) -> None:
        """One backward pass for each output, to the taps of some terms.

        Args:
            terms: Those that are contracted next.
            at_once: Number of examples up to which the passes are made as one.
        """
        forms: dict[int, dict[_Held, _Form]] = {}
        for term in terms:
            for member in term.members:
                place = _held(term, member)
                forms.setdefault(member.tap, {})[place] = self._form(term, member)
                self._needed[place] = self._needed.get(place, 0) + 1
        taps = [self.recording.taps[tap] for tap in forms]
        sums = self.outputs.sum(0)  # the examples do not meet
        if self.n <= at_once and self.recording.native:  # hooks may come later
            unit = torch.eye(self.o, dtype=sums.dtype, device=sums.device)
            stacked = gradients_at(taps, sums, unit)
            for own in reversed(forms.values()):
                gradient = stacked.pop()  # freed before the next one is copied
                for place, form in own.items():
                    self._held[place] = form.of_all(gradient)
            return
        for number in sums:
            gradients = gradients_at(taps, number)
            for own in reversed(forms.values()):
                gradient = gradients.pop()
                for place, form in own.items():
                    found = form.of(gradient).detach()
                    self._held.setdefault(place, []).append(found)

    def _form(self, term: Term, member: Member) -> "_Form":
        """What is held of a gradient until the term is contracted."""
        if term.route == "rows" and not term.early:
            return _Form(lambda gradient: gradient)
        use = self.use(member)
        if isinstance(use, Direct):
            return _Form(use.rows, batched=not use.derived)
        if term.early:
            return _Form(use.rows)
        # Positions before channels: products with a are fastest so.
        return _Form(lambda gradient: use.right(gradient).contiguous())

    def mixed(self, term: Term, mix: Tensor) -> "Side":
        """The same for combinations of the outputs, `(c, o)`, of one term."""
        side = copy(self)
        side.o, side._held = mix.shape[1], {}
        for member in term.members:
            place = _held(term, member)
            held = torch.stack(self._held[place])
            side._held[place] = list(torch.tensordot(mix.mT, held, 1))
        return side

    def strands(self, term: Term) -> list[Strand]:
        """The uses of a weight with their gradients."""
        found = []
        for member in term.members:
            use = self.use(member)
            assert isinstance(use, Outer)
            strand = Strand(use, self._held[_held(term, member)])
            found.append(strand.shortened() if term.sparse else strand)
        return found

    def lookups(self, term: Term) -> list[tuple[Lookup, Tensor]]:
        """The uses of a table with their gradients."""
        found = []
        for member in term.members:
            use = self.use(member)
            assert isinstance(use, Lookup)
            found.append((use, torch.stack(self._held[_held(term, member)])))
        return found

    def rows(self, term: Term) -> Tensor:
        """J of a parameter, `(o, n, numbers)`; as its view if it is used once."""
        if len(term.members) == 1 and term.members[0].view is not None:
            rows = self._rows_of(term, term.members[0])
            return rows.reshape(self.o, self.n, -1)
        leaf = self.recording.parameters[term.name]
        j = leaf.new_zeros(self.o, self.n, extent(leaf))
        whole = view_of(leaf, leaf)
        for member in term.members:
            rows = self._rows_of(term, member)
            if member.view is not None:
                member.view.of(j).add_(rows)
                continue
            tap = self.recording.taps[member.tap]
            source = list(tap.sources.values())[member.slot]
            pulled = _pulled_back(source, leaf, rows.flatten(0, 1))
            assert whole is not None
            whole.of(j).add_(pulled.view(self.o, self.n, *leaf.shape))
        return j

    def _rows_of(self, term: Term, member: Member) -> Tensor:
        """`(o, n, *shape of what the tap sees)`."""
        held = self._held[_held(term, member)]
        if not term.early:
            held = [self.use(member).rows(gradient) for gradient in held]
        return torch.stack(held)

    def forget(self, term: Term) -> None:
        """Free the gradients of a term that no other one needs."""
        for member in term.members:
            self._uses.pop(member.tap, None)
            place = _held(term, member)
            self._needed[place] -= 1
            if not self._needed[place]:
                del self._needed[place], self._held[place]


def _pulled_back(source: Tensor, leaf: Tensor, rows: Tensor) -> Tensor:
    """Rows by a tensor that is computed from a parameter -> rows by the parameter."""
    with torch.enable_grad():
        try:
            (found,) = torch.autograd.grad(
                source, [leaf], rows, retain_graph=True, is_grads_batched=True
            )
        except RuntimeError:  # an operator that cannot be batched
            found = torch.stack(
                [
                    torch.autograd.grad(source, [leaf], row, retain_graph=True)[0]
                    for row in rows
                ]
            )
    return found
