"""The linearized twin of a network, trained beside it by a copy of its optimizer."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_callbacks._types import Inputs, Mode, OutputFunction, Params
from ntk_callbacks.dynamics.linearize import LinearizedModel, linearize
from ntk_callbacks.dynamics.optimizer_copy import (
    follow_groups,
    optimizer_copy,
    refuse_closures,
    take_step,
)
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.guard import measuring, quietly
from ntk_callbacks.instruments.linearization_point import LinearizationPoint
from ntk_callbacks.instruments.probe_loss import (
    ProbeLoss,
    are_labels,
    loss_value,
    mean_cross_entropy,
    not_labels,
)
from ntk_callbacks.nested import map_tensors
from ntk_callbacks.outputs import call_model


class LinearizedTwin:
    """f₀ + J₀(θ − θ₀) with weights θ of its own, stepped whenever the network is.

    For each batch `accumulate`, before each step of the network's optimizer `step`. The
    twin is in full precision, whatever autocast or gradient scaler the network uses,
    and in one `mode` for good: no dropout, and BatchNorm with the statistics of θ₀
    (`"eval"`) or of the batch (`"train"`). A network with dropout or BatchNorm, which
    trains in another state than either, leaves its twin for that reason too.

    Args:
        loss_fn: `(outputs, targets) -> ()`; None for the mean cross-entropy of labels.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> twin = LinearizedTwin(nn.functional.mse_loss)
        >>> twin.expand(net, sgd, LinearizationPoint.of(net))
        >>> _ = twin.accumulate(net, torch.ones(1, 1), torch.zeros(1, 1))
        >>> twin.step(net, sgd)
        >>> net(torch.ones(1, 1)).square().sum().backward()
        >>> sgd.step()
        >>> torch.allclose(twin.parameters["weight"], net.weight)  # f is linear
        True
    """

    def __init__(
        self,
        loss_fn: ProbeLoss | None = None,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
    ) -> None:
        self.loss_fn, self.output_fn, self.mode = loss_fn, output_fn, mode
        self._network: LinearizedModel | None = None
        self._optimizer: Optimizer | None = None
        self._original: Optimizer | None = None
        self._restored: dict[str, Any] = {}
        self.lost = False
        """Whether it missed a batch or a step, so that it tells nothing any more."""

    @property
    def expanded(self) -> bool:
        """Whether it can be trained."""
        return self._network is not None

    @property
    def parameters(self) -> Params | None:
        """Its θ by name, without a graph; None before it was ever expanded."""
        if self._network is None:
            return self._restored.get("parameters")
        return {name: p.detach() for name, p in self._network.named_parameters()}

    def expand(
        self, model: nn.Module, optimizer: Optimizer, point: LinearizationPoint
    ) -> None:
        """Make the twin: at θ₀, or where a restored one was.

        Args:
            model: The network; left exactly as it was.
            optimizer: Trains it; is copied with its state.
            point: θ₀.

        Raises:
            UnsupportedModelError: If the network or its optimizer cannot be copied, or
                the optimizer needs a closure.
        """
        with measuring(model, self.mode):
            point.put_into(model)
            network = linearize(model, output_fn=self.output_fn, mode=self.mode)
        for name, value in self._restored.get("parameters", {}).items():
            network.get_parameter(name).data.copy_(value)
        self._network = network
        self.forget_gradients()
        own = self.follow(model, optimizer)
        if self._restored:
            own.load_state_dict(copy.deepcopy(self._restored["optimizer"]))
        self._restored = {}

    def follow(self, model: nn.Module, optimizer: Optimizer) -> Optimizer:
        """Step from now on by a copy of this optimizer, with the state that it has.

        Args:
            model: The network.
            optimizer: Trains it; left as it is.

        Returns:
            The copy.

        Raises:
            UnsupportedModelError: If it cannot be copied or needs a closure.
        """
        assert self._network is not None
        twins = dict(self._network.named_parameters())
        memo = {id(p): twins[name] for name, p in model.named_parameters()}
        try:
            refuse_closures(optimizer)
            with torch.inference_mode(False), torch.no_grad():
                own = optimizer_copy(optimizer, memo)
        except ValueError as error:
            raise UnsupportedModelError(
                f"the optimizer of the linearized twin: {error}"
            ) from error
        self._optimizer, self._original = own, optimizer
        return own

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether it steps by a copy of this optimizer, not of an earlier one."""
        return self._original is optimizer

    def accumulate(
        self,
        model: nn.Module,
        inputs: Inputs,
        targets: Tensor | None,
        weight: float = 1.0,
    ) -> Tensor:
        """Add the gradient of a batch.

        Args:
            model: The network, whose frozen layers are frozen here too; left exactly as
                it was, random generators included.
            inputs: Of the batch, as the network is called with them.
            targets: Of the batch.
            weight: Of its loss, one over the number of batches that make a step.

        Returns:
            The loss of the twin on the batch, without the weight and without a graph.

        Raises:
            UnsupportedModelError: If it is not known what the loss is.
        """
        network, _ = self._ready()
        for name, parameter in model.named_parameters():
            network.get_parameter(name).requires_grad_(parameter.requires_grad)
        with quietly(model):
            outputs = _called(network, inputs)
            loss_fn, y = self._loss(targets, outputs)
            loss = loss_value(loss_fn, outputs, y)
            if loss.requires_grad:
                (weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def network_loss(
        self, model: nn.Module, inputs: Inputs, targets: Tensor | None
    ) -> Tensor:
        """The loss of the network on a batch, in the state that it is in.

        Args:
            model: The network; call it inside a guard.
            inputs: Of the batch.
            targets: Of the batch.

        Returns:
            By the function that the twin trains on, with a graph.

        Raises:
            UnsupportedModelError: As `accumulate`.
        """
        # Copies, because a model may overwrite what it is given.
        given = map_tensors(Tensor.clone, inputs)
        outputs = (self.output_fn or call_model)(model, given)
        loss_fn, y = self._loss(targets, outputs)
        return loss_value(loss_fn, outputs, y)

    @property
    def gradients(self) -> Params:
        """What `accumulate` added up since the last step, by name."""
        network, _ = self._ready()
        return {
            name: p.grad for name, p in network.named_parameters() if p.grad is not None
        }

    def step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Step as the optimizer of the network is about to, and forget the gradients.

        Args:
            model: The network, before its step; left as it is.
            optimizer: Its optimizer, whose rates and other hyper-parameters hold.
            gradients: By name; default those accumulated, not clipped.
        """
        network, own = self._ready()
        found = self.gradients if gradients is None else gradients
        twins = dict(network.named_parameters())
        others = {id(p): twins[name] for name, p in model.named_parameters()}
        with torch.inference_mode(False), torch.no_grad():
            follow_groups(own, optimizer, others)
            for name, parameter in twins.items():
                parameter.grad = found.get(name)
            take_step(own, {parameter.device for parameter in twins.values()})
        self.forget_gradients()

    def _ready(self) -> tuple[LinearizedModel, Optimizer]:
        if self._network is None or self._optimizer is None:
            raise RuntimeError("LinearizedTwin: call expand(model, optimizer) first.")
        return self._network, self._optimizer

    def _loss(
        self, targets: Tensor | None, outputs: Tensor
    ) -> tuple[ProbeLoss, Tensor]:
        if targets is None:
            raise UnsupportedModelError(
                "the linearized twin cannot tell the targets in a batch, and trains on "
                "none. Expected batches (x, y), or mappings with an obvious key."
            )
        y = targets.to(outputs.device)
        y = y.to(outputs.dtype) if y.is_floating_point() else y
        if self.loss_fn is not None:
            return self.loss_fn, y
        if not are_labels(y, outputs):
            raise UnsupportedModelError(
                "the loss of the linearized twin is not known: "
                f"{not_labels(y, outputs)}. Pass the one that the network trains on "
                "as loss_fn."
            )
        return mean_cross_entropy, y

    def forget_gradients(self) -> None:
        """No step is made of what was accumulated."""
        for parameter in self._network.parameters() if self._network else ():
            parameter.grad = None

    def lose(self) -> None:
        """Stop for good: it missed a batch or a step."""
        self.load_state_dict({"lost": True, "weights": {}})

    def state_dict(self) -> dict[str, Any]:
        """Its weights and the state of its optimizer, copied, if it has any yet."""
        return {"lost": self.lost, "weights": self._weights()}

    def _weights(self) -> dict[str, Any]:
        if self._network is None or self._optimizer is None:
            return self._restored
        named = self._network.named_parameters()
        return {
            "parameters": {name: p.detach().clone() for name, p in named},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state at the next `expand`."""
        self._network = self._optimizer = self._original = None
        self.lost, self._restored = state["lost"], state["weights"]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or another process, makes the twin anew from its state."""
        live = dict.fromkeys(("_network", "_optimizer", "_original"))
        return {**vars(self), **live, "_restored": self._weights()}


def _called(network: nn.Module, inputs: Inputs) -> Tensor:
    if isinstance(inputs, Tensor):
        outputs: Tensor = network(inputs)
    elif isinstance(inputs, Mapping):
        outputs = network(**inputs)
    else:
        outputs = network(*inputs)
    return outputs
