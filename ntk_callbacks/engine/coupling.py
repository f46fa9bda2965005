"""Does the output of an example depend on its neighbors in the batch, or on chance?"""

import math
import warnings
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.backward import gradients_of
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size, map_tensors


def refuse_randomness(function: ModelFunction, x: Inputs) -> None:
    """Raise if two forward passes on the same inputs disagree.

    Args:
        function: The model as it is measured.
        x: A batch.

    Raises:
        UnsupportedModelError: If the outputs differ by more than round-off, at the
            parameters or beside them.
    """
    noisy = beside(function)
    _refuse_chance(forward(function, x), forward(function, x))
    _refuse_chance(_attempt(function, x, noisy), _attempt(function, x, noisy))


def _refuse_chance(first: Tensor | None, second: Tensor | None) -> None:
    """Raise if outputs for the same inputs differ; None is no output."""
    if first is None or second is None or _close(first, second):
        return
    gap = (first - second).abs().max().item()
    raise UnsupportedModelError(
        "two forward passes on the same inputs differ by up to "
        f"{gap:.3g}: the model draws random numbers even now, so its kernel is "
        'not defined. Measure with mode="eval", or set the drop probabilities to '
        "zero in what `output_fn` calls."
    )


def is_coupled(
    function: ModelFunction, x: Inputs, count: int | None = None, *, joint: bool = False
) -> bool:
    """Whether the output of an example changes when it is run without its neighbors.

    True for BatchNorm on batch statistics, batches that are one graph, contrastive
    outputs. Their kernel needs the joint batch. An example that cannot be run without
    the others counts as coupled: differentiating jointly is right in either case. Every
    example is tried, and beside the parameters too: the outputs of a head that starts
    at zero would tell nothing.

    Of n examples that are asked about, the first and the last are run alone, and all of
    them in √(2n) groups, each in two of them, no two in the same two: of any two
    each is once run without the other. Outputs far from 0 hide in their round-off what
    neighbors add to them, but not in their derivatives: those of two examples by one
    another are taken as well. Chance changes outputs too, so it is looked for by itself
    only where they change.

    Args:
        function: The model as it is measured.
        x: A batch.
        count: How many examples are asked about, the first ones; None for all.
        joint: The batch is joint in any case: only chance is looked for.

    Returns:
        Whether any of these depends on the rest of the batch.

    Raises:
        UnsupportedModelError: If the outputs depend on chance.
    """
    if batch_size(x) > 1 and not joint and not _changes(function, x, count):
        return False
    refuse_randomness(function, x)
    return joint or batch_size(x) > 1


def _changes(function: ModelFunction, x: Inputs, count: int | None) -> bool:
    n = count or batch_size(x)
    here, noisy = function.params | function.fixed, beside(function)
    joint_here, joint_noisy = forward(function, x), _attempt(function, x, noisy)
    # Beside the parameters it may not be there: as where equals are told apart.
    _refuse_chance(joint_here, forward(function, x))
    tries = [(here, joint_here, group) for group in ([0], [n - 1])]
    if joint_noisy is None:
        tries += [(here, joint_here, group) for group in _groups(n)]
    else:
        tries += [(noisy, joint_noisy, group) for group in _groups(n)]
    for params, joint, group in tries:
        part: Inputs = map_tensors(itemgetter(group), x)
        apart = _attempt(function, part, params)
        if apart is None or not _agree(apart, joint[group], _round_off(joint)):
            for _ in range(0 if apart is None else 2):
                # What happens rarely, as a dropped layer, happened in one of the two.
                _refuse_chance(apart, _attempt(function, part, params))
                _refuse_chance(joint, _attempt(function, x, params))
            return True
    return _derivatives_meet(function, here if joint_noisy is None else noisy, x, n)


def _derivatives_meet(
    function: ModelFunction, params: Params, x: Inputs, n: int
) -> bool:
    """Whether one of two examples has a derivative by the other's floating inputs."""
    sources: list[Tensor] = []
    ends = [0, (n if n > 1 else batch_size(x)) - 1]

    def source(tensor: Tensor) -> Tensor:
        pair = tensor[ends]
        if pair.is_floating_point() and pair.numel():
            sources.append(pair.requires_grad_())
        return pair

    def meet(outputs: Float[Tensor, "2 c"]) -> bool:
        gradient = gradients_of(outputs)
        direction = torch.linspace(1.0, 2.0, outputs.shape[1]).to(outputs)
        for i in range(min(n, 2)):
            rows = gradient(outputs[i] @ direction, sources)
            own, other = (max(row[k].abs().max() for row in rows) for k in (i, 1 - i))
            if other > torch.finfo(outputs.dtype).eps ** 0.5 * own:
                return True
        return False

    pair = map_tensors(source, x)
    if not sources or function.device.type == "meta":
        return False
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # as of numbers read from what has a graph
            return function.during(params, pair, meet)
    except Exception:  # a pair, or a graph, may not be allowed
        return False


def _groups(n: int) -> list[list[int]]:
    """Groups of examples such that of any two each is in one without the other."""
    # Each is in two groups, and no two in the same two: k groups have k (k - 1) / 2
    # pairs. Those of equal distance come one after another, so sizes are nearly equal.
    k = math.isqrt(2 * n) + 1
    k += k * (k - 1) // 2 < n
    pairs = [(i, (i + d) % k) for d in range(1, k // 2 + 1) for i in range(k)][:n]
    groups: list[list[int]] = [[] for _ in range(k)]
    for i, pair in enumerate(pairs):
        for group in pair:
            groups[group].append(i)
    return [group for group in groups if group]


def _round_off(joint: Float[Tensor, "n c"]) -> float:
    """What sums of a usual size leave where they cancel: an output may be near 0."""
    if joint.is_meta:
        return 0.0
    usual = torch.nan_to_num(joint.abs(), nan=0.0, posinf=0.0).flatten(1).amax(1)
    return float(64 * torch.finfo(joint.dtype).eps * usual.median())


def forward(
    function: ModelFunction, x: Inputs, params: Params | None = None
) -> Float[Tensor, "n c"]:
    """Outputs without a graph, also where `output_fn` takes derivatives itself."""
    params = function.params if params is None else params
    with warnings.catch_warnings():
        # Reentrant checkpointing warns where gradients are off.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        try:
            with torch.no_grad():
                return function(params, x).detach()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        return function(params, x).detach()


def _attempt(function: ModelFunction, x: Inputs, params: Params) -> Tensor | None:
    """Outputs, or None: a batch of one, or other parameters, may not be allowed."""
    try:
        return forward(function, x, params)
    except Exception:  # whatever a model raises
        return None


def beside(function: ModelFunction) -> Params:
    """The parameters with a tenth of their size, or 0.1 where they are 0, of noise."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + _noise(tensor, generator)
        for name, tensor in (function.params | function.fixed).items()
    }


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_meta or not tensor.is_floating_point():
        return torch.zeros_like(tensor)
    noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
    size = tensor.abs().mean()
    return noise.to(tensor) * torch.where(size > 0, 0.1 * size, 0.1)


def _agree(apart: Tensor, joint: Tensor, least: float) -> bool:
    """Whether each example is close, on its own scale."""
    if apart.shape != joint.shape:
        return False
    if apart.is_meta:
        return True
    scale = torch.nan_to_num(joint.abs(), nan=0.0, posinf=0.0).flatten(1).amax(1)
    tolerance = (scale * torch.finfo(joint.dtype).eps ** 0.5).clamp(min=least)
    same = (apart == joint) | (apart.isnan() & joint.isnan())
    return bool((same | ((apart - joint).abs() <= tolerance[:, None])).all())


def _close(first: Tensor, second: Tensor) -> bool:
    """Equal up to the round-off that another batch size or thread order causes."""
    if first.shape != second.shape:
        return False
    if first.is_meta:
        return True
    scale = torch.nan_to_num(second.abs(), nan=0.0, posinf=0.0).max()
    tolerance = float(scale) * torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=0.0, atol=tolerance, equal_nan=True)
