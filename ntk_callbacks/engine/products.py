"""Products with the parameter Jacobian J and the kernel Θ, without forming either.

Rows are example-major, as in `as_matrix`: row i·c + k is output k of example i. Columns
are the measured parameters, one after the other in the order of the model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk_callbacks._types import (
    Inputs,
    Mode,
    OutputFunction,
    ParameterFilter,
    Params,
    Scaling,
)
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.backward import graph_size
from ntk_callbacks.engine.coupling import is_coupled
from ntk_callbacks.engine.linearization import Linearization, examples_that_fit, split
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.engine.pushforward import Way
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring
from ntk_callbacks.nested import batch_size, examples, map_tensors

Vectors: TypeAlias = Float[Tensor, " _rows"] | Float[Tensor, "_rows k"]


class TangentOperator:
    """The parameter Jacobian J = ∂f/∂θ and the kernel Θ = J Λ Jᵀ as linear maps.

    A product costs a few passes through the model and the memory of one backward pass,
    whatever the size of J (m×p) and Θ (m×m), m = n·c. It is taken at the weights the
    model has at that moment, in the dtype of the parameters (float32 for half-precision
    models), and leaves the model exactly as it was (see `quietly`).

    Outside a `with` block each product prepares the model and puts everything back, at
    the price of a copy of the weights. Iterations do that once::

        with TangentOperator(model, x) as operator:
            for _ in range(100):
                u = operator.ntk_vp(u)
                u = u / u.norm()

    Inside, the model is in the state it is measured in: do nothing with it but take
    products. J·v comes from forward mode, or from double backward where forward mode
    cannot go or would be wrong; the first J·v finds out which, and holds it to
    ⟨u, J v⟩ = ⟨Jᵀu, v⟩ on this model.

    Args:
        model: Any module. Parameters shared by several modules count once.
        x: n inputs, as in `empirical_ntk`; copied. Examples that depend on one another
            are run jointly, others in chunks.
        parameters: None for those with `requires_grad`; a regular expression among
            those; or a predicate `(name, parameter)`. Chosen once, here.
        scaling: None, or for every measured parameter the diagonal of Λ ≥ 0: a number
            or a tensor of the parameter's shape. Part of Θ, not of J.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Working memory beside the vectors, in bytes or as `"2GiB"`;
            default a quarter of what the device has free.

    Attributes:
        n: Examples.
        c: Outputs of one example.
        shape: `(m, p)`, the shape of J.
        dtype: Of all vectors; those of another floating dtype are cast.
        device: Of all vectors.

    Raises:
        ValueError: If an argument is not understood or nothing is selected.
        UnsupportedModelError: If the model is random, or its outputs or parameters
            cannot be differentiated.
        MemoryBudgetError: If one example, or a joint batch, does not fit.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> operator = TangentOperator(net, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> operator.jvp(torch.tensor([1.0, 0.0]))
        tensor([1., 0.])
        >>> operator.ntk_vp(torch.tensor([1.0, 0.0]))
        tensor([5., 2.])

    References:
        Double backward: Townsend 2017, "A new trick for calculating Jacobian vector
        products". Costs: Novak et al. 2022, arXiv:2206.08720, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Inputs,
        *,
        parameters: ParameterFilter = None,
        scaling: Scaling | None = None,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
    ) -> None:
        request = Request(
            parameters=parameters,
            scaling=scaling,
            output_fn=output_fn,
            mode=mode,
            memory_budget=memory_budget,
        )
        self._model, self._mode, self._output_fn = model, mode, output_fn
        self._depth = 0
        self._way: Way | None = None
        with measuring(model, mode):
            problem = request.problem(model, x, None)
            function = problem.function
            self._shapes = {name: t.shape for name, t in function.params.items()}
            self.dtype, self.device = function.dtype, function.device
            self._x: Inputs = map_tensors(Tensor.clone, problem.x1)
            self.n = batch_size(self._x)
            self._joint = is_coupled(function, self._x, joint=problem.joint)
            measured = self._x if self._joint else examples(self._x, 0, 1)
            self.c, activations = graph_size(function, measured)
            self._scale = self._flat_scale(problem)
        self.shape = self.n * self.c, sum(t.numel() for t in self._shapes.values())
        half = problem.budget // 2
        self._chunk = examples_that_fit(self.n, self._joint, activations, half)
        self._columns = max(1, half // (self.shape[1] * self.dtype.itemsize))

    def _flat_scale(self, problem: Problem) -> Tensor | None:
        scales = [
            scale.to(self.device, self.dtype).expand(shape).reshape(-1)
            for name, shape in self._shapes.items()
            if (scale := problem.scale(name)) is not None
        ]
        return torch.cat(scales) if scales else None

    def __enter__(self) -> "TangentOperator":
        if self._depth == 0:
            with ExitStack() as stack:
                stack.enter_context(measuring(self._model, self._mode))
                function = ModelFunction(
                    self._model,
                    output_fn=self._output_fn,
                    parameters=lambda name, _: name in self._shapes,
                )
                self._at = Linearization(
                    function, self._x, self.n, self.c, self._chunk, self._joint
                )
                self._guard = stack.pop_all()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            del self._at
            self._guard.close()

    def jvp(self, v: Vectors | Params) -> Vectors:
        """J·v: how the outputs change along a direction in the space of parameters.

        Args:
            v: `(p,)`, a block `(p, k)`, or `{name: tensor}` with all measured names.

        Returns:
            `(m,)`, or `(m, k)` for a block.

        Raises:
            ValueError: If `v` does not fit the parameters.
            UnsupportedModelError: If no way of computing J·v is right on this model.
        """
        if isinstance(v, Mapping):
            v = self._flat(v)
        return self._product("jvp", v, self.shape[1], self._push)

    def vjp(self, u: Vectors) -> Vectors:
        """Jᵀ·u: the gradient of ⟨u, f⟩.

        Args:
            u: `(m,)`, or a block `(m, k)`.

        Returns:
            `(p,)`, or `(p, k)` for a block; `as_dict` gives it by parameter.

        Raises:
            ValueError: If `u` does not fit the outputs.
        """
        return self._product("vjp", u, self.shape[0], lambda rows: self._at.pull(rows))

    def ntk_vp(self, u: Vectors) -> Vectors:
        """Θ·u = J Λ Jᵀ u: minus how the outputs move when the loss gradient is u.

        Args:
            u: `(m,)`, or a block `(m, k)`.

        Returns:
            Of the shape of `u`.

        Raises:
            ValueError: If `u` does not fit the outputs.
            UnsupportedModelError: If no way of computing J·v is right on this model.
        """

        def product(rows: Tensor) -> Tensor:
            gradients = self._at.pull(rows)
            if self._scale is not None:
                gradients *= self._scale
            return self._push(gradients)

        return self._product("ntk_vp", u, self.shape[0], product)

    def quadratic_form(self, u: Vectors) -> Float[Tensor, ""] | Float[Tensor, " k"]:
        """uᵀΘu = ‖√Λ Jᵀu‖² ≥ 0, for one backward pass and no J·v.

        Args:
            u: `(m,)`, or a block `(m, k)`.

        Returns:
            One number for each column.

        Raises:
            ValueError: If `u` does not fit the outputs.
        """

        def product(rows: Tensor) -> Tensor:
            squares = self._at.pull(rows).square()
            if self._scale is not None:
                squares *= self._scale
            return squares.sum(1, keepdim=True)

        return self._product("quadratic_form", u, self.shape[0], product)[0]

    def diagonal(self) -> Float[Tensor, " m"]:
        """The diagonal of Θ: ‖√Λ ∂f_k(xᵢ)/∂θ‖², by one backward pass for each entry.

        Returns:
            m numbers ≥ 0.
        """
        with self:
            return self._at.squared_rows(self._scale)

    def as_dict(self, v: Float[Tensor, " p"]) -> Params:
        """A vector in the space of parameters as {name: tensor of its shape}.

        Args:
            v: p numbers, such as `vjp` gives.

        Returns:
            Views of `v`.
        """
        return split(v.contiguous(), self._shapes)

    def _push(self, rows: Tensor) -> Tensor:
        way = self._way
        if way is None:
            way, seen = self._at.agreeing_way()
            self._way = way if seen else None
        return self._at.push(rows, way)

    def _product(
        self, who: str, vectors: Tensor, size: int, product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`product` of rows `(k, size)`, a few at a time, for a vector or columns."""
        shape, dtype = tuple(vectors.shape), vectors.dtype
        if not (len(shape) in (1, 2) and shape[0] == size and dtype.is_floating_point):
            raise ValueError(
                f"TangentOperator.{who}: the vector is {shape} of {dtype}; expected "
                f"real numbers ({size},) or ({size}, k). J is {self.shape[0]}×"
                f"{self.shape[1]}: {self.n} examples × {self.c} outputs, "
                f"{self.shape[1]} parameters."
            )
        with self:
            rows = vectors.detach().to(self.device, self.dtype)
            rows = (rows[:, None] if rows.ndim == 1 else rows).mT
            # A copy also leaves inference mode behind for good.
            rows = rows.clone(memory_format=torch.contiguous_format)
            parts = [product(part) for part in torch.split(rows, self._columns)]
            result = torch.cat(parts).mT
        return result[:, 0] if vectors.ndim == 1 else result

    def _flat(self, v: Params) -> Float[Tensor, " p"]:
        """The inverse of `as_dict`."""
        missing = [name for name in self._shapes if name not in v]
        wrong = [n for n, t in v.items() if self._shapes.get(n) != t.shape]
        if missing or wrong:
            raise ValueError(
                "TangentOperator.jvp: the mapping needs a tensor of the parameter's "
                f"shape for each measured parameter; missing: {missing or 'none'}, not "
                f"measured or of another shape: {wrong or 'none'}."
            )
        return torch.cat(
            [v[name].to(self.device, self.dtype).reshape(-1) for name in self._shapes]
        )
