"""One side of a kernel: a forward pass, and backward passes to its taps."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.contraction import Strand
from ntk_callbacks.engine.factors import Call, Lookup, Outer, Use
from ntk_callbacks.engine.survey import (
    Place,
    gradients_at,
    known_again,
    record,
    uses_of,
)
from ntk_callbacks.engine.terms import Member, Term
from ntk_callbacks.engine.views import extent, view_of
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size


class ChangedModelError(RuntimeError):
    """The model no longer does what it did when the plan was made."""


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
        self._gradients: dict[int, Tensor] = {}
        self._rows: dict[tuple[int, int], list[Tensor]] = {}

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

    def differentiate(self, terms: Sequence[Term], together: bool) -> None:
        """One backward pass for each output, to the taps of some terms.

        Args:
            terms: Those that are contracted next.
            together: Whether the passes are made as one.
        """
        members = [member for term in terms for member in term.members]
        direct = [m for term in terms if term.early for m in term.members]
        kept = {m.tap for term in terms if not term.early for m in term.members}
        taps = sorted({m.tap for m in members})
        self._rows = {(m.tap, m.slot): [] for m in direct}
        for k, gradients in enumerate(self._passes(taps, together)):
            by_tap = dict(zip(taps, gradients, strict=True))
            for tap in kept:
                if tap not in self._gradients:
                    # All at once: holding what autograd allocates piece by piece
                    # would leave holes in memory that nothing else fits into.
                    whole = by_tap[tap].new_empty(self.o, *by_tap[tap].shape)
                    self._gradients[tap] = whole
                self._gradients[tap][k] = by_tap[tap]
            for m in direct:
                rows = self.use(m).rows(by_tap[m.tap]).detach()
                self._rows[m.tap, m.slot].append(rows)

    def _passes(self, taps: list[int], together: bool) -> Iterator[list[Tensor]]:
        """For each output, the gradients by the outputs of the taps."""
        found = [self.recording.taps[tap] for tap in taps]
        sums = self.outputs.sum(0)  # the examples do not meet
        if together:
            unit = torch.eye(self.o, dtype=sums.dtype, device=sums.device)
            stacked = gradients_at(found, sums, unit)
            yield from map(list, zip(*(g.unbind(0) for g in stacked), strict=True))
        else:
            for number in sums:
                yield gradients_at(found, number)

    def strands(self, term: Term) -> list[Strand]:
        """The uses of a weight with their gradients."""
        found = []
        for member in term.members:
            use = self.use(member)
            assert isinstance(use, Outer)
            gradients = self._gradients[member.tap]
            found.append(Strand(use, [use.right(g) for g in gradients]))
        return found

    def lookups(self, term: Term) -> list[tuple[Lookup, list[Tensor]]]:
        """The uses of a table with their gradients."""
        found = []
        for member in term.members:
            use = self.use(member)
            assert isinstance(use, Lookup)
            gradients = self._gradients[member.tap]
            found.append((use, [use.right(g) for g in gradients]))
        return found

    def rows(self, term: Term) -> Tensor:
        """J of a parameter, `(o, n, numbers)`; as its view if it is used once."""
        if len(term.members) == 1 and term.members[0].view is not None:
            return self._rows_of(term.members[0]).reshape(self.o, self.n, -1)
        leaf = self.recording.parameters[term.name]
        j = leaf.new_zeros(self.o, self.n, extent(leaf))
        whole = view_of(leaf, leaf)
        for member in term.members:
            rows = self._rows_of(member)
            if member.view is not None:
                member.view.of(j).add_(rows)
                continue
            tap = self.recording.taps[member.tap]
            source = list(tap.sources.values())[member.slot]
            pulled = _pulled_back(source, leaf, rows.flatten(0, 1))
            assert whole is not None
            whole.of(j).add_(pulled.view(self.o, self.n, *leaf.shape))
        return j

    def _rows_of(self, member: Member) -> Tensor:
        """`(o, n, *shape of what the tap sees)`."""
        early = self._rows.get((member.tap, member.slot))
        if early is None:
            use = self.use(member)
            early = [use.rows(g) for g in self._gradients[member.tap]]
        return torch.stack(early)

    def forget(self) -> None:
        """Free the gradients of the last backward passes, and what came of them."""
        self._uses.clear()
        self._gradients.clear()
        self._rows.clear()


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
