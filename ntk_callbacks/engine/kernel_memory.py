"""The kernels of one moment of a model, for a second instrument that wants the same."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ntk_callbacks._types import Inputs, Kernel
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.functional import select_parameters
from ntk_callbacks.nested import leaves, map_tensors, parts

_PLAIN = (bool, int, float, str, type(None))


@dataclass(slots=True)
class Answer:
    """A kernel that was asked for.

    Attributes:
        request: What was measured.
        names: The parameters that this meant.
        x: A copy of the inputs.
        seed: Of the audit.
        parts: The parts of the kernel.
        error: Its audited error.
    """

    request: Request
    names: list[str]
    x: Inputs
    seed: int
    parts: dict[str, Kernel]
    error: float | None


@dataclass(slots=True)
class KernelMemory:
    """Holds kernels as long as the model is what it was, to the last bit.

    A step number says nothing of the weights (two loops may count alike), nor does the
    version of a tensor (writing through `.data` leaves it). So the weights and buffers
    are copied and compared, and with them the training flags and the numbers, texts and
    switches that submodules hold as attributes; a kernel is given for the same request
    on equal inputs only. A NaN anywhere equals nothing.
    """

    _model: weakref.ref[nn.Module] | None = None
    _state: list[tuple[str, Any]] = field(default_factory=list)
    _answers: list[Answer] = field(default_factory=list)

    def recall(
        self, model: nn.Module, x: Inputs, request: Request, seed: int
    ) -> tuple[dict[str, Kernel], float | None] | None:
        """The kernel, if it was measured on this very model.

        Args:
            model: The model as it is now.
            x: The inputs.
            request: What is wanted.
            seed: Of the audit.

        Returns:
            Copies of the parts, and the audited error; None if it must be measured.
        """
        if request.scaling is not None or not self._still_holds(model):
            return None
        names = select_parameters(model, request.parameters)
        for answer in self._answers:
            asked = (answer.request, answer.names, answer.seed)
            if asked == (request, names, seed) and _equal(answer.x, x):
                copies = {name: part.clone() for name, part in answer.parts.items()}
                return copies, answer.error
        return None

    def keep(
        self,
        model: nn.Module,
        x: Inputs,
        request: Request,
        seed: int,
        found: tuple[dict[str, Kernel], float | None],
    ) -> None:
        """Keep a kernel, and forget those of other weights.

        Args:
            model: The model it was measured on, as it is now.
            x: The inputs.
            request: What was measured.
            seed: Of the audit.
            found: Parts of the kernel and its audited error.
        """
        if request.scaling is not None:  # that of an optimizer: it goes on with it
            return
        if not self._still_holds(model):
            self._model, self._answers = weakref.ref(model), []
            self._state = [
                (name, value.detach().clone() if isinstance(value, Tensor) else value)
                for name, value in _state(model)
            ]
        names = select_parameters(model, request.parameters)
        copy: Inputs = map_tensors(torch.clone, x)
        kernels, error = found
        mine = {name: part.clone() for name, part in kernels.items()}
        self._answers.append(Answer(request, names, copy, seed, mine, error))

    def _still_holds(self, model: nn.Module) -> bool:
        if self._model is None or self._model() is not model:
            return False
        now = _state(model)
        return [name for name, _ in now] == [name for name, _ in self._state] and all(
            _same(value, kept)
            for (_, value), (_, kept) in zip(now, self._state, strict=True)
        )


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything by which a model is known to be what it was."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    attributes = [
        (f"{path}.{name}", value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN)
    ]
    return [*tensors, *attributes]


def _same(value: Any, kept: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(kept, Tensor):
        alike = (value.dtype, value.device) == (kept.dtype, kept.device)
        return alike and torch.equal(value.detach(), kept)
    return type(value) is type(kept) and bool(value == kept)


def _equal(left: Inputs, right: Inputs) -> bool:
    """Batches of the same structure and numbers."""
    if type(left) is not type(right) or len(leaves(left)) != len(leaves(right)):
        return False
    if isinstance(left, dict) and isinstance(right, dict) and [*left] != [*right]:
        return False
    return all(
        _same(one, other) if isinstance(one, Tensor) else one is other
        for one, other in zip(parts(left), parts(right), strict=False)
    )
