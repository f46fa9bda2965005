"""The peers that run on PyTorch: ours, what people write, and two libraries.

A peer takes a model and inputs, does what is done once (for ours: the plan), and gives
back the call that is timed together with facts about it. The kernel comes as
(n, n, c, c), or as a matrix whose rows are (example, output).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

Built = tuple[Callable[[], Any], dict[str, Any]]


def ours(model: nn.Module, x: Tensor, outputs: str = "full") -> Built:
    """`empirical_ntk` with a plan made before."""
    from ntk_callbacks import empirical_ntk, plan_ntk

    plan = plan_ntk(model, x, outputs=outputs)
    facts = {"flops": float(plan.flops), "plan": str(plan)}
    return lambda: empirical_ntk(model, x, outputs=outputs, route=plan), facts


def cold(model: nn.Module, x: Tensor) -> Built:
    """`empirical_ntk` as most will call it: planning and audit are timed."""
    from ntk_callbacks import empirical_ntk

    return lambda: empirical_ntk(model, x), {}


def rows(model: nn.Module, x: Tensor) -> Built:
    """J row by row with plain autograd, one example's graph at a time, then J Jᵀ."""
    params = list(model.parameters())

    def call() -> Tensor:
        c = model(x[:1]).shape[1]
        jacobian = x.new_empty(len(x), c, sum(p.numel() for p in params))
        for example, block in zip(x, jacobian, strict=True):
            for output, row in zip(model(example[None])[0], block, strict=True):
                gradients = torch.autograd.grad(output, params, retain_graph=True)
                torch.cat([g.flatten() for g in gradients], out=row)
        return jacobian.flatten(0, 1) @ jacobian.flatten(0, 1).mT

    return call, {}


def recipe(model: nn.Module, x: Tensor) -> Built:
    """The torch.func recipe; one product for each parameter, no slower than einsum."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, params, (example[None],)).squeeze(0)

    def call() -> Tensor:
        parts = vmap(jacrev(single), (None, 0))(params, x).values()
        blocks = (part.flatten(0, 1).flatten(1) for part in parts)
        return sum(block @ block.mT for block in blocks)

    return call, {}


def nngeometry(model: nn.Module, x: Tensor) -> Built:
    """Its Gram matrix, dense in function space; all examples in one batch."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import FMatDense
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection.from_model(model)
    loader = DataLoader(TensorDataset(x), batch_size=len(x))

    def call() -> Tensor:
        gram = GramMatrix(
            model,
            loader,
            function=lambda *batch: model(batch[0]),
            representation=FMatDense,
            layer_collection=layers,
        )
        kernel = gram.to_torch().detach().permute(1, 0, 3, 2)  # (c, n, c, n) before
        return kernel.flatten(2).flatten(0, 1)

    return call, {}


def curvlinops(model: nn.Module, x: Tensor) -> Built:
    """Columns of Jᵀ for one example at a time, then one product for each parameter.

    J (Jᵀ I) with operators on the whole batch costs n times as many backward passes.
    """
    from curvlinops import JacobianLinearOperator

    params = list(model.parameters())
    c = model(x[:1]).shape[1]
    target, identity = x.new_zeros(1, c), torch.eye(c, dtype=x.dtype)[None]

    def columns(example: Tensor) -> list[Tensor]:
        data = [(example[None], target)]
        jacobian = JacobianLinearOperator(
            model, params, data, check_deterministic=False, num_data=1
        )
        parts = jacobian.adjoint() @ [identity]
        return [part.detach().movedim(-1, 0).flatten(1) for part in parts]

    def call() -> Tensor:
        examples = [columns(example) for example in x]
        kernel = x.new_zeros(len(x) * c, len(x) * c)
        while examples[0]:  # a parameter at a time, so that J is held only once
            block = torch.cat([parts.pop() for parts in examples])
            kernel += block @ block.mT
        return kernel

    return call, {}


def floor(model: nn.Module, x: Tensor) -> Built:
    """What no route can avoid, measured: one forward and c backward passes, and GEMM.

    The backward passes go to the first layer's output only and compute no gradient of
    a parameter. They run one after another or batched: the faster counts.
    """
    model.requires_grad_(False)
    first = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    size = 2048
    a, b = torch.randn(2, size, size)
    leaves: list[Tensor] = []

    def start_here(module: nn.Module, args: Any, output: Tensor) -> None:
        leaves[:] = [output.requires_grad_()]

    first.register_forward_hook(start_here)

    def one_by_one() -> None:
        outputs = model(x).sum(0)
        for output in outputs:
            torch.autograd.grad(output, leaves, retain_graph=True)

    def batched() -> None:
        outputs = model(x)
        n, c = outputs.shape
        directions = torch.eye(c)[:, None].expand(c, n, c)
        torch.autograd.grad(outputs, leaves, directions, is_grads_batched=True)

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    trial = {way: min(seconds(way) for _ in range(3)) for way in (one_by_one, batched)}
    near = [way for way, took in trial.items() if took < 1.5 * min(trial.values())]

    def call() -> dict[str, float]:
        gemm = min(seconds(lambda: a @ b) for _ in range(3))
        passes = {way.__name__: seconds(way) for way in near}
        return {"flop_rate": 2 * size**3 / gemm} | passes

    return call, {"ways": [way.__name__ for way in near]}


BUILD: dict[str, Callable[[nn.Module, Tensor], Built]] = {
    "ours": ours,
    "cold": cold,
    "trace": lambda model, x: ours(model, x, "trace"),
    "diagonal": lambda model, x: ours(model, x, "diagonal"),
    "pseudo": lambda model, x: ours(model, x, "pseudo"),
    "rows": rows,
    "recipe": recipe,
    "nngeometry": nngeometry,
    "curvlinops": curvlinops,
    "floor": floor,
}
"""Key of the peer -> what builds it."""
