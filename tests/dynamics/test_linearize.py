"""The linearized twin against the Jacobian by the loop, and its derivatives."""

import copy
import inspect

import pytest
import torch
from cases import BY_ID, CASES
from feature_models import FeatureModel, features
from networks import Computed, mlp, vectors
from oracles import call, each, input_jacobian_by_loop, jacobian_by_loop
from torch import nn
from twins import displaced, pulled

from ntk_callbacks import TangentOperator, empirical_ntk, input_jacobian
from ntk_callbacks.dynamics import linearize
from ntk_callbacks.errors import UnsupportedModelError

LINEARIZED = [case for case in CASES if case.id != "checkpoint_reentrant"]


def times(rows, vectors):
    """Σ over parameters of J·v, `(n, c)`."""
    return sum(
        (rows[name] * v).reshape(*rows[name].shape[:2], -1).sum(2)
        for name, v in vectors.items()
    )


# torch.compile looks at the `.grad` of what enters the compiled part: the oracle's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", LINEARIZED, ids=lambda case: case.id)
def test_every_network_is_expanded_as_the_loop_says(case):
    model, x = case.build()
    reference = copy.deepcopy(model)
    output_fn = None if case.output_fn is call else case.output_fn
    twin = linearize(model, output_fn=output_fn, mode=case.mode)
    assert [*dict(twin.named_parameters())] == [*dict(model.named_parameters())]
    jacobian = jacobian_by_loop(reference, x, case.output_fn)
    f0 = case.output_fn(copy.deepcopy(reference), each(torch.clone, x)).detach()

    steps = displaced(twin)
    outputs = call(twin, each(torch.clone, x))
    assert outputs.shape == f0.shape
    expected = f0.reshape(len(f0), -1) + times(jacobian, steps)
    assert torch.allclose(outputs.reshape_as(expected), expected, rtol=0, atol=1e-10)

    weights = torch.randn_like(expected)
    (outputs * weights.reshape_as(outputs)).sum().backward()
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        gradient = pulled(jacobian[name], weights)
        if parameter.grad is None:  # no path, as in the model itself
            assert not gradient.any()
        else:
            found = parameter.grad.to_dense()
            assert torch.allclose(found, gradient, rtol=0, atol=1e-10)


def test_a_model_that_is_linear_in_its_parameters_is_its_own_twin():
    model = FeatureModel(30)
    x = features(5, 2, 30)
    twin = linearize(model)
    step = displaced(twin, 10.0)
    model.theta.data += step["theta"]
    assert torch.allclose(twin(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["mlp", "gru", "attention", "resnet_train", "tied_weights", "dict_inputs"]
)
def test_the_kernel_of_a_twin_never_moves(name):
    case = BY_ID[name]
    model, x = case.build()
    twin = linearize(model, mode=case.mode)
    displaced(twin, 1.0)
    expected = empirical_ntk(model, x, mode=case.mode)
    found = empirical_ntk(twin, x, mode=case.mode)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    # J·v of the twin is the derivative of its own gradient: differentiated twice.
    operator = TangentOperator(twin, x, mode=case.mode)
    v = torch.randn(operator.shape[1], dtype=torch.float64)
    expected = TangentOperator(model, x, mode=case.mode).jvp(v)
    assert torch.allclose(operator.jvp(v), expected, rtol=0, atol=1e-10)


def test_second_derivatives_by_the_parameters_are_those_of_the_loss_alone():
    model, x = BY_ID["attention"].build()
    twin = linearize(model)
    displaced(twin)
    bias = twin.get_parameter("head.bias")
    weight = twin.get_parameter("attention.in_proj_weight")
    (gradient,) = torch.autograd.grad((twin(x) ** 4).sum(), bias, create_graph=True)
    (found,) = torch.autograd.grad(gradient[0], weight)
    rows = jacobian_by_loop(model, x)
    curvature = 12 * twin(x).detach() ** 2 * rows["head.bias"][..., 0]
    expected = pulled(rows["attention.in_proj_weight"], curvature)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "layer_norm", "resnet_train", "attention"])
def test_gradients_by_the_inputs_are_those_of_finite_differences(name):
    """Layer normalization too, whose third derivatives torch gets wrong."""
    case = BY_ID[name]
    model, x = case.build()
    twin = linearize(model, mode=case.mode)
    displaced(twin)
    weights = torch.randn(twin(x).shape, dtype=torch.float64)
    source = x.clone().requires_grad_()
    (twin(source) * weights).sum().backward()
    direction = torch.randn_like(x)

    def at(size):
        return (twin(x + size * direction) * weights).sum().item()

    slope = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 12e-4
    found = (source.grad * direction).sum().item()
    assert found == pytest.approx(slope, rel=1e-8)
    assert twin(source).requires_grad


def test_the_input_jacobian_of_a_twin_at_its_start_is_that_of_the_model():
    model, x = BY_ID["mlp"].build()
    twin = linearize(model)
    expected = input_jacobian_by_loop(model, x)
    assert torch.allclose(input_jacobian(twin, x), expected, rtol=0, atol=1e-10)
    displaced(twin)
    expected = input_jacobian_by_loop(twin, x)
    assert torch.allclose(input_jacobian(twin, x), expected, rtol=0, atol=1e-10)


def test_half_precision_and_autocast_are_computed_in_single_precision():
    torch.manual_seed(0)
    model, x = mlp(), vectors(4)
    twin = linearize(copy.deepcopy(model).bfloat16())
    outputs = twin(x.bfloat16())
    outputs.sum().backward()
    assert outputs.dtype == torch.float32
    assert {p.grad.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert torch.allclose(outputs, model(x), atol=2e-2)

    twin = linearize(model)
    expected = twin(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = twin(x)
        outputs.sum().backward()
    assert torch.equal(outputs, expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="the model is a function"):
        inspect.unwrap(linearize)(lambda x: x)
    with pytest.raises(ValueError, match="mode='other'"):
        inspect.unwrap(linearize)(nn.Linear(2, 1), mode="other")
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        linearize(nn.Linear(2, 1).requires_grad_(False))
    with pytest.raises(ValueError, match="not linearized yet"):
        linearize(linearize(nn.Linear(2, 1)))
    with pytest.raises(UnsupportedModelError, match="lazy"):
        linearize(nn.LazyLinear(1))
    with pytest.raises(UnsupportedModelError, match="complex"):
        linearize(nn.Linear(2, 1, dtype=torch.complex64))
    layer = nn.Linear(2, 1)
    layer.graph = layer.weight * 2
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        linearize(layer)


def test_what_cannot_be_expanded_is_refused_at_the_first_call():
    x = vectors(3)
    noisy = Computed(
        lambda self, x: nn.functional.dropout(self.layer(x)), layer=nn.Linear(5, 2)
    )
    with pytest.raises(UnsupportedModelError, match="random"):
        linearize(noisy)(x)
    two = Computed(lambda self, x: (self.layer(x), x), layer=nn.Linear(5, 2))
    with pytest.raises(UnsupportedModelError, match="output_fn"):
        linearize(two)(x)
    layer = nn.Linear(5, 2)
    hidden = Computed(lambda self, x: self.layer(x) + layer(x), layer=nn.Linear(5, 2))
    with pytest.raises(UnsupportedModelError, match="past its attributes"):
        linearize(hidden)(x)
    model, x = BY_ID["checkpoint_reentrant"].build()
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        linearize(model)(x)
