"""The input-output Jacobian against closed forms and the loop over single numbers."""

import pytest
import torch
from cases import BY_ID
from networks import Computed, mlp
from odd_networks import checkpointed
from oracles import call, input_jacobian_by_loop, relative_error
from torch import nn

from ntk_callbacks import input_jacobian, input_singular_values
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError

TOLERANCE = 1e-10  # float64 round-off is near 1e-15, the normalizations enlarge it

LOOPED = [
    "mlp",
    "relu_inplace",
    "input_overwritten",
    "prelu",
    "cnn",
    "max_pool",
    "resnet",
    "resnet_train",
    "batch_norm_untracked",
    "spectral_norm_train",
    "gru",
    "attention",
    "transformer",
    "bare_parameters",
    "tuple_inputs",
    "dict_inputs",
    "frozen_layer",
    "checkpoint",
    "checkpoint_reentrant",
    "compiled_eager",
    "old_style_function",
    "branching",
    "derivative_outputs",
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", LOOPED)
def test_jacobian_is_that_of_the_loop(name):
    case = BY_ID[name]
    model, x = case.build()
    output_fn = None if case.output_fn is call else case.output_fn
    if name == "derivative_outputs":  # detaches its inputs, by intention
        model, output_fn = model[:2], second_order
    expected = input_jacobian_by_loop(model, x, output_fn or call)
    jacobian = input_jacobian(model, x, output_fn=output_fn, mode=case.mode)
    assert relative_error(jacobian, expected) < TOLERANCE


def second_order(model, x):
    """∂(Σu)/∂x: a derivative inside the function that is differentiated."""
    with torch.enable_grad():
        if not x.requires_grad:
            x = x.requires_grad_()
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]


def test_linear_map():
    layer = nn.Linear(3, 2).double()
    jacobian = input_jacobian(layer, torch.randn(4, 3))
    assert torch.equal(jacobian, layer.weight.detach().expand(4, 2, 3))


def test_deep_orthogonal_linear_network_is_an_isometry():
    layers = [nn.Linear(16, 16, bias=False).double() for _ in range(32)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    values = input_singular_values(nn.Sequential(*layers), torch.randn(3, 16))
    # Each of 32 products adds some ε = 2e-16.
    assert (values - 1).abs().max() < 1e-12


def test_delta_orthogonal_convolutions_are_an_isometry():
    """Xiao et al. 2018: only the center tap is set, to an orthogonal matrix."""
    layers = [nn.Conv2d(4, 4, 3, padding=1, bias=False).double() for _ in range(8)]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.orthogonal_(layer.weight.data[:, :, 1, 1])
    values = input_singular_values(nn.Sequential(*layers), torch.randn(2, 4, 3, 3))
    assert values.shape == (2, 36)
    assert (values - 1).abs().max() < 1e-12


def test_relu_switches_rows_off():
    layer = nn.Linear(3, 3, bias=False).double()
    nn.init.eye_(layer.weight)
    x = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -2.0, -3.0]])
    jacobian = input_jacobian(nn.Sequential(layer, nn.ReLU()), x)
    assert torch.equal(jacobian, torch.diag_embed((x > 0).double()))


def test_singular_values_are_sorted_and_those_of_the_jacobian():
    model, x = BY_ID["cnn"].build()
    values = input_singular_values(model, x)
    expected = torch.linalg.svdvals(input_jacobian(model, x))
    assert values.shape == (3, 2)
    assert (values.diff(dim=1) <= 0).all()
    assert relative_error(values, expected) < TOLERANCE


def test_inputs_of_any_shape_are_flattened():
    model, x = BY_ID["cnn"].build()
    assert input_jacobian(model, x).shape == (3, 2, 75)


def test_of_several_inputs_the_floating_ones_are_taken_in_order():
    model, (a, b) = BY_ID["tuple_inputs"].build()
    jacobian = input_jacobian(model, (a, b))
    first = input_jacobian(Computed(lambda self, a: self.two(a, b), two=model), a)
    assert jacobian.shape == (3, 2, 9)
    # One example at a time does not fit the fixed partner: joint, but the same numbers.
    assert relative_error(jacobian[..., :5], first) < TOLERANCE


def test_an_input_that_is_not_used_has_a_zero_derivative():
    model = Computed(lambda self, a, b: self.body(a), body=mlp()).double()
    jacobian = input_jacobian(model, (torch.randn(3, 5), torch.randn(3, 4)))
    assert jacobian[..., :5].abs().min() > 0
    assert not jacobian[..., 5:].any()


def test_constant_outputs_have_a_zero_derivative():
    jacobian = input_jacobian(
        mlp(), torch.randn(3, 5), output_fn=lambda model, x: torch.ones(len(x), 2)
    )
    assert not jacobian.any()


def test_frozen_models_are_measured():
    model = mlp().double().requires_grad_(False)
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = input_jacobian_by_loop(model, x)
    assert relative_error(input_jacobian(model, x), expected) < TOLERANCE


def test_integer_inputs_are_refused():
    model, ids = BY_ID["embedding"].build()
    with pytest.raises(UnsupportedModelError, match="no derivative by integers"):
        input_jacobian(model, ids)


def test_random_outputs_are_refused():
    model = Computed(lambda self, x: nn.functional.dropout(self.body(x)), body=mlp())
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        input_singular_values(model, torch.randn(3, 5))


def test_no_example():
    with pytest.raises(ValueError, match="no example"):
        input_jacobian(mlp(), torch.randn(0, 5))


@pytest.mark.parametrize("name", ["mlp", "resnet_train"])
def test_a_small_budget_gives_the_same_values(name):
    case = BY_ID[name]
    model, x = case.build()
    whole = input_singular_values(model, x, mode=case.mode)
    one = 2 * x[0].numel() * 8  # bytes of the Jacobian of one example
    small = input_singular_values(model, x, mode=case.mode, memory_budget=4 * one)
    assert relative_error(small, whole) < TOLERANCE
    with pytest.raises(MemoryBudgetError, match="budget is"):
        input_singular_values(model, x, mode=case.mode, memory_budget=4 * one - 1)
    assert input_jacobian(model, x, mode=case.mode, memory_budget=3 * one).shape[0] == 3
    with pytest.raises(MemoryBudgetError, match="3 examples"):
        input_jacobian(model, x, mode=case.mode, memory_budget=3 * one - 1)


def test_nan_weights_give_nan_not_a_crash():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    x = torch.randn(3, 5)
    assert input_jacobian(model, x).isnan().any()
    assert input_singular_values(model, x).isnan().all()


def test_an_overflow_spoils_only_its_own_example():
    model = nn.Sequential(Computed(lambda self, x: x.exp()), nn.Linear(2, 2).double())
    values = input_singular_values(model, torch.tensor([[1.0, 2.0], [1.0, 1e4]]))
    assert values[0].isfinite().all()
    assert values[1].isnan().all()


def test_inputs_and_gradients_are_left_as_they_were():
    model, x = BY_ID["input_overwritten"].build()
    before = x.clone()
    x.requires_grad_()
    jacobian = input_jacobian(model, x)
    assert torch.equal(x, before)
    assert x.grad is None
    assert not jacobian.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_measured_where_gradients_are_off(context):
    model, x = BY_ID["mlp"].build()
    expected = input_jacobian(model, x)
    with context():
        assert torch.equal(input_jacobian(model, x.clone()), expected)


def test_half_precision_models_are_measured_in_float32():
    model, x = mlp().bfloat16(), torch.randn(3, 5)
    jacobian = input_jacobian(model, x)
    assert jacobian.dtype == torch.float32
    expected = input_jacobian_by_loop(model.double(), x.double())
    assert relative_error(jacobian.double(), expected) < 1e-5  # float32 round-off
    assert input_singular_values(model.bfloat16(), x).dtype == torch.float64


def test_reentrant_checkpoint_at_the_very_front():
    model = checkpointed(True).double()
    model.stem = nn.Identity()
    model.block[0] = nn.Linear(5, 6).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = input_jacobian_by_loop(model, x)
    assert relative_error(input_jacobian(model, x), expected) < TOLERANCE
