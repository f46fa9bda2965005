"""The model of a measurement, for what needs more of it than one kernel."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ntk_callbacks._types import Inputs, Kernel, Mode, Outputs, Params
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.engine.series import KernelSeries
from ntk_callbacks.guard import measuring
from ntk_callbacks.instruments.kernel_loss import LossOfKernel
from ntk_callbacks.instruments.kernel_stability import StabilityLimit, stability_limit
from ntk_callbacks.layout import widened


@dataclass(frozen=True)
class KernelSource:
    """What a kernel was measured on; each method leaves the model as it was.

    Args:
        model: The model as it is now.
        inputs: Of the probe.
        request: What was measured.
        kernels: Where kernels come from.
        step: Completed updates.
        optimizers: Those that train the model, as far as they are known.
        loss: The loss that is trained.
    """

    model: nn.Module
    inputs: Inputs
    request: Request
    kernels: KernelSeries
    step: int
    optimizers: Sequence[Optimizer] = ()
    loss: LossOfKernel = field(default_factory=lambda: LossOfKernel(None))

    def outputs(self) -> Float[Tensor, "n c"]:
        """The outputs f on the probe, in float64."""
        with measuring(self.model, self.request.mode), torch.no_grad():
            problem = self.request.problem(self.model, self.inputs, None)
            return widened(problem.function({}, problem.x1))

    def kernel(
        self,
        *,
        mode: Mode | None = None,
        outputs: Outputs | None = None,
        scaling: dict[str, float | Tensor] | None = None,
    ) -> Kernel:
        """The kernel in another mode, of other outputs, or preconditioned.

        Args:
            mode: `"eval"` or `"train"`; None for that of the request.
            outputs: As in `empirical_ntk`; None for those of the request.
            scaling: As in `empirical_ntk`.

        Returns:
            A kernel of the parameters of the request, whole.
        """
        request = replace(
            self.request,
            by=None,
            mode=mode or self.request.mode,
            outputs=outputs or self.request.outputs,
            scaling=scaling,
        )
        parts, _ = self.kernels.measure(self.model, self.inputs, request, self.step)
        return parts[""]

    def push(self, v: Params) -> Float[Tensor, "n c"]:
        """J·v in float64: how the outputs change along a direction of the parameters.

        Args:
            v: By name, a tensor for each parameter of the request.

        Returns:
            The change of all outputs.

        Raises:
            UnsupportedModelError: If no way of computing J·v is right on this model.
            MemoryBudgetError: If one example, or a joint batch, does not fit.
        """
        request = self.request
        operator = TangentOperator(
            self.model,
            self.inputs,
            parameters=request.parameters,
            output_fn=request.output_fn,
            mode=request.mode,
            memory_budget=request.memory_budget,
        )
        return widened(operator.jvp(v)).view(operator.n, operator.c)

    def has_batch_statistics(self) -> bool:
        """Whether a layer normalizes otherwise when it trains than when it does not."""
        return any(
            isinstance(module, _NormBase) and module.running_mean is not None
            for module in self.model.modules()
        )

    def stability(self) -> StabilityLimit | None:
        """Where the optimizers become unstable."""
        return stability_limit(self.optimizers, self.model, self.request.parameters)
