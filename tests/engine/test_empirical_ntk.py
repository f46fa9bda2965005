"""What the arguments of `empirical_ntk` mean, and the laws every kernel obeys."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch
from cases import (
    BY_ID,
    UNWRAPPED_OUTPUTS,
    Computed,
    around,
    checkpointed,
    mlp,
    resnet,
    returning,
    settled,
)
from oracles import TOLERANCE, jacobian_by_differences, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import TangentOperator, as_matrix, empirical_ntk
from ntk_callbacks.engine.arguments import check_selection, parameter_groups
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.layout import symmetric


def exponents(model, x):
    """Outputs as a user's own function, with two trailing axes."""
    y = model(x)
    return torch.stack([y, y**2], -1)


# Shapes, sides, outputs.


@pytest.mark.parametrize(
    ("name", "route"),
    [
        (name, route)
        for name in ("mlp", "resnet_train", "gru", "dict_inputs")
        for route in ("auto", *ROUTES)
        if route != "vmap" or BY_ID[name].vmap  # the others: see test_routes
    ],
)
def test_cross_kernel(name, route):
    case = BY_ID[name]
    model, x1 = case.build()
    x2 = {k: v[:2] for k, v in x1.items()} if isinstance(x1, dict) else x1[:2] + 0.1
    ntk = empirical_ntk(model, x1, x2, mode=case.mode, route=route)
    assert relative_error(ntk, ntk_by_loop(model, x1, x2)) < TOLERANCE


def test_cross_kernel_with_itself_is_the_kernel(net, x):
    ntk, cross = empirical_ntk(net, x), empirical_ntk(net, x, x)
    assert relative_error(cross, ntk) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("second", [False, True])
def test_outputs(net, x, route, second):
    x2 = torch.randn(3, 5, dtype=torch.float64) if second else None
    full = ntk_by_loop(net, x, x2)
    c = full.shape[-1]
    expected = {
        "full": full,
        "diagonal": torch.stack([full[:, :, k, k] for k in range(c)], -1),
        "trace": sum(full[:, :, k, k] for k in range(c)) / c,
        "pseudo": full.sum((2, 3)) / c,  # f ↦ Σ f_k/√c takes both axes with 1/√c
    }
    for outputs, value in expected.items():
        ntk = empirical_ntk(net, x, x2, outputs=outputs, route=route)
        assert relative_error(ntk, value) < TOLERANCE, outputs


def test_pseudo_kernel_is_that_of_the_summed_output(net, x):
    def summed(model, x):
        return model(x).sum(1) / 2**0.5

    expected = empirical_ntk(net, x, output_fn=summed)[..., 0, 0]
    assert relative_error(empirical_ntk(net, x, outputs="pseudo"), expected) < TOLERANCE


def test_trailing_axes_are_flattened_into_c(net, x):
    ntk = empirical_ntk(net, x, output_fn=exponents)
    assert ntk.shape == (4, 4, 4, 4)
    assert relative_error(ntk, ntk_by_loop(net, x, output_fn=exponents)) < TOLERANCE


@pytest.mark.parametrize("wrap", UNWRAPPED_OUTPUTS.values(), ids=UNWRAPPED_OUTPUTS)
def test_a_result_that_stands_for_one_tensor_is_unwrapped(wrap, x):
    model = returning(wrap).double()
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model.body, x)) < 1e-10


def test_nested_inputs(net, x):
    model = Computed(
        lambda self, batch: self.body(batch["a"][0] + batch["b"]), body=net
    )
    nested = ({"a": [x / 2], "b": x / 2},)
    assert relative_error(empirical_ntk(model, nested), ntk_by_loop(net, x)) < TOLERANCE


def test_flags_beside_the_tensors_of_a_batch_pass_through(net, x):
    model = Computed(
        lambda self, x, negate=False, mask=None: -self.body(x) if negate else 0 * x,
        body=net,
    )
    ntk = empirical_ntk(model, {"x": x, "negate": True, "mask": None})
    assert relative_error(ntk, ntk_by_loop(net, x)) < TOLERANCE


def test_as_matrix_is_example_major():
    ntk = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    matrix = as_matrix(ntk)
    for i in range(2):
        for j in range(3):
            for k in range(2):
                for m in range(2):
                    assert matrix[i * 2 + k, j * 2 + m] == ntk[i, j, k, m]


def test_as_matrix_of_a_diagonal_kernel_is_block_diagonal():
    diagonal = torch.randn(2, 3, 2)
    matrix = as_matrix(diagonal).view(2, 2, 3, 2)
    assert torch.equal(matrix[:, 0, :, 0], diagonal[..., 0])
    assert torch.equal(matrix[:, 1, :, 1], diagonal[..., 1])
    assert not matrix[:, 0, :, 1].any()


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3, 4), (1, 1, 1, 1, 1)])
def test_as_matrix_of_no_kernel(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"{shape}; expected (n1, n2, c, c)")
    ):
        inspect.unwrap(as_matrix)(torch.zeros(shape))


def test_as_matrix_leaves_a_traced_kernel():
    traced = torch.randn(2, 3)
    assert as_matrix(traced) is traced


# Which parameters, and the split into parts.


@pytest.mark.parametrize("name", ["mlp", "resnet", "resnet_train", "tied_weights"])
@pytest.mark.parametrize(
    "by", ["module", "parameter", {"a": r"0\.|embed", "b": "bias"}]
)
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_parts_add_up_to_the_whole(name, by, outputs):
    case = BY_ID[name]
    if by not in ("module", "parameter"):
        by = {"a": by["a"], "b": "bias"} if name == "mlp" else {"a": by["a"]}
    model, x = case.build()
    whole = empirical_ntk(model, x, outputs=outputs, mode=case.mode)
    parts = empirical_ntk(model, x, outputs=outputs, mode=case.mode, by=by)
    assert len(parts) > 1
    assert relative_error(sum(parts.values()), whole) < TOLERANCE


def test_each_part_is_the_kernel_of_its_parameters(net, x):
    parts = empirical_ntk(net, x, by="parameter")
    assert list(parts) == [name for name, _ in net.named_parameters()]
    for name, part in parts.items():
        alone = empirical_ntk(net, x, parameters=rf"^{re.escape(name)}$")
        assert relative_error(part, alone) < TOLERANCE
        assert relative_error(part, ntk_by_loop(net, x, names=[name])) < TOLERANCE


def test_parts_by_module_are_named_after_the_module(net, x):
    net.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=x.dtype)))
    parts = empirical_ntk(net, x, by="module")
    assert list(parts) == ["", "0", "2", "4"]
    assert not parts[""].any()  # nothing uses the parameter at the top


def test_first_matching_pattern_takes_a_parameter_and_rest_the_others(net, x):
    parts = empirical_ntk(net, x, by={"first": r"^0\.", "biases": "bias"})
    expected = {
        "first": ["0.weight", "0.bias"],
        "biases": ["2.bias", "4.bias"],
        "rest": ["2.weight", "4.weight"],
    }
    assert parts.keys() == expected.keys()
    for part, names in expected.items():
        assert relative_error(parts[part], ntk_by_loop(net, x, names=names)) < 1e-10


def test_parameters_by_expression_and_predicate(net, x):
    expected = ntk_by_loop(net, x, names=["0.weight", "2.weight", "4.weight"])
    by_name = empirical_ntk(net, x, parameters="weight")
    by_shape = empirical_ntk(net, x, parameters=lambda name, p: p.ndim == 2)
    assert relative_error(by_name, expected) < TOLERANCE
    assert relative_error(by_shape, expected) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_only_a_predicate_reaches_frozen_parameters(net, x, route):
    whole = ntk_by_loop(net, x)
    net[2].requires_grad_(False)
    unfrozen = ntk_by_loop(net, x)
    assert relative_error(empirical_ntk(net, x, route=route), unfrozen) < TOLERANCE
    everything = empirical_ntk(net, x, route=route, parameters=lambda name, p: True)
    assert relative_error(everything, whole) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", "rows"])
@pytest.mark.parametrize("parameters", ["block", "head", "stem"])
def test_some_parameters_of_a_reentrant_checkpoint(x, route, parameters):
    # A reentrant checkpoint silently gives no gradient unless an input needs one.
    plain, reentrant = checkpointed(False).double(), checkpointed(True).double()
    reentrant.load_state_dict(plain.state_dict())
    names = [name for name, _ in plain.named_parameters() if parameters in name]
    ntk = empirical_ntk(reentrant, x, parameters=parameters, route=route)
    assert relative_error(ntk, ntk_by_loop(plain, x, names=names)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_behind_a_frozen_layer_learns_nothing(x):
    # torch warns, and training would not move the block: the kernel says so too.
    model = checkpointed(True).double()
    model.stem.requires_grad_(False)
    ntk = empirical_ntk(model, x)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE
    assert relative_error(ntk, empirical_ntk(model, x, parameters="head")) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_scaling_by_numbers_and_tensors(net, x, route):
    scaling = {
        name: torch.rand_like(p) if p.ndim == 2 else 0.1 * (index + 1)
        for index, (name, p) in enumerate(net.named_parameters())
    }
    scaling["2.weight"][0] = 0.0  # a dead row of Λ is allowed
    ntk = empirical_ntk(net, x, scaling=scaling, route=route)
    assert relative_error(ntk, ntk_by_loop(net, x, scaling=scaling)) < TOLERANCE


def test_scaling_is_the_step_of_preconditioned_gradient_descent(net, x):
    """f changes by −Θ_Λ ∂L/∂f when θ changes by −Λ ∂L/∂θ, to first order."""
    y, rate = torch.randn(4, 2, dtype=x.dtype), 1e-6
    scaling = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    ntk = as_matrix(empirical_ntk(net, x, scaling=scaling))
    before = net(x)
    ((before - y) ** 2).sum().div(2).backward()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p -= rate * scaling[name] * p.grad
    predicted = -rate * ntk @ (before - y).flatten()
    # The step's second order is left: relative to the first it is of order 1e-6.
    assert relative_error((net(x) - before).flatten(), predicted) < 1e-4


# Train mode.


def test_train_mode_leaves_running_statistics_and_is_another_kernel():
    model, x = BY_ID["resnet_train"].build()
    before = copy.deepcopy(model.state_dict())
    train = empirical_ntk(model, x, mode="train")
    evaluated = empirical_ntk(model, x, mode="eval")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert relative_error(train, evaluated) > 0.1
    # `mode` decides, not the state the model was left in.
    assert torch.equal(empirical_ntk(model.eval(), x, mode="train"), train)
    assert not model.training


def test_train_mode_passes_finite_differences_through_the_joint_batch():
    model, x = BY_ID["batch_norm"].build()
    model.train()
    expected = sum(
        torch.einsum("ikp,jlp->ijkl", jacobian, jacobian)
        for jacobian in (
            jacobian_by_differences(model, x, name)
            for name, _ in model.named_parameters()
        )
    )
    # Central differences in float64 with step 1e-6 are good to about 1e-9.
    assert relative_error(empirical_ntk(model, x, mode="train"), expected) < 1e-6


def test_train_mode_keeps_the_flags_of_a_model_in_training(x):
    model = settled(around(nn.BatchNorm1d(6), 6)).double().train()
    model[1].eval()  # frozen, as in fine-tuning
    evaluated = empirical_ntk(model, x, mode="eval")
    assert relative_error(empirical_ntk(model, x, mode="train"), evaluated) < 1e-10
    model.train()
    assert relative_error(empirical_ntk(model, x, mode="train"), evaluated) > 0.1


@pytest.mark.parametrize("name", ["transformer", "lstm_bidirectional"])
def test_train_mode_holds_dropout_still(name):
    model, x = BY_ID[name].build()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.5
    kernel = empirical_ntk(model.train(), x, mode="train")
    assert relative_error(kernel, empirical_ntk(model, x, mode="eval")) < 1e-9


# Memory.


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("mlp", "full"),
        ("mlp", "trace"),
        ("mlp", "diagonal"),
        ("batch_norm_untracked", "full"),
        ("tuple_inputs", "full"),
        ("cnn", "trace"),
    ],
)
@pytest.mark.parametrize("route", ["auto", "rows"])
def test_the_smallest_budget_gives_the_same_kernel(name, outputs, route):
    model, x = BY_ID[name].build()
    arguments = {"outputs": outputs, "route": route}
    whole = empirical_ntk(model, x, **arguments)
    with pytest.raises(MemoryBudgetError) as refused:
        empirical_ntk(model, x, **arguments, memory_budget=1)
    need = re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))
    smallest = int(float(need[1]) * 1.01 * 2**20)  # the message has three digits
    ntk = empirical_ntk(model, x, **arguments, memory_budget=smallest)
    assert relative_error(ntk, whole) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", "rows"])
def test_the_smallest_budget_gives_the_same_cross_kernel_in_parts(net, x, route):
    arguments = {"x2": x[:3] + 1, "by": "module", "route": route}
    scaling = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    whole = empirical_ntk(net, x, **arguments, scaling=scaling)
    with pytest.raises(MemoryBudgetError) as refused:
        empirical_ntk(net, x, **arguments, memory_budget=1)
    need = float(re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))[1])
    budget = int(need * 1.01 * 2**20)
    parts = empirical_ntk(net, x, **arguments, scaling=scaling, memory_budget=budget)
    assert parts.keys() == whole.keys()
    for name, part in parts.items():
        assert relative_error(part, whole[name]) < TOLERANCE


def test_a_small_budget_on_a_reentrant_checkpoint(x):
    model = checkpointed(True).double()
    budget = 4 * 1024  # several passes over the parameters
    ntk = empirical_ntk(model, x, memory_budget=budget)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


def test_budget_as_text(net, x):
    expected = empirical_ntk(net, x)
    assert torch.equal(empirical_ntk(net, x, memory_budget="1 GiB"), expected)


# Laws.


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal", "pseudo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_to_the_last_bit_and_positive(outputs, dtype):
    model = mlp().to(dtype)
    x = torch.randn(40, 5, dtype=dtype)  # more rows than one block of a product
    matrix = as_matrix(empirical_ntk(model, x, outputs=outputs))
    assert torch.equal(matrix, matrix.mT)
    eigenvalues = torch.linalg.eigvalsh(matrix.double())
    # Each entry is off by some ε·Θ_ii, so an eigenvalue by no more than that times m.
    floor = -len(matrix) * torch.finfo(dtype).eps * eigenvalues.max()
    assert eigenvalues.min() > floor


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 3), (5, 5, 3, 3)])
def test_the_upper_triangle_is_mirrored(shape):
    # Products of matrices may differ in the last bit from their mirror image, on some
    # devices; here the two halves differ entirely.
    kernel = torch.randn(shape)
    matrix, before = as_matrix(symmetric(kernel)), as_matrix(kernel)
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(matrix.triu(), before.triu())


def test_permuting_the_examples_permutes_the_kernel(net, x):
    order = torch.tensor([2, 0, 3, 1])
    ntk, permuted = empirical_ntk(net, x), empirical_ntk(net, x[order])
    assert relative_error(permuted, ntk[order][:, order]) < TOLERANCE


def test_permuting_the_examples_permutes_a_joint_kernel():
    model, x = BY_ID["resnet_train"].build()
    order = torch.tensor([2, 0, 1])
    ntk = empirical_ntk(model, x, mode="train")
    permuted = empirical_ntk(model, x[order], mode="train")
    assert relative_error(permuted, ntk[order][:, order]) < TOLERANCE


def test_kernel_of_a_part_of_the_probe_is_a_block(net, x):
    assert relative_error(
        empirical_ntk(net, x[1:3]), empirical_ntk(net, x)[1:3, 1:3]
    ) < (TOLERANCE)


def test_rescaling_a_relu_network(x):
    """All weights times α: f(αθ) = α^L f(θ), so Θ(αθ) = α^(2(L−1)) Θ(θ)."""
    net = mlp(nn.ReLU, bias=False).double()
    ntk = empirical_ntk(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p *= 1.3
    assert relative_error(empirical_ntk(net, x), 1.3 ** (2 * 2) * ntk) < TOLERANCE


def test_scaling_the_outputs_scales_the_kernel_squared(net, x):
    ntk = empirical_ntk(net, x, output_fn=lambda model, x: 3 * model(x))
    assert relative_error(ntk, 9 * empirical_ntk(net, x)) < TOLERANCE


def test_linear_maps_of_the_outputs_act_on_both_output_axes(net, x):
    a = torch.randn(3, 2, dtype=x.dtype)
    ntk = empirical_ntk(net, x, output_fn=lambda model, x: model(x) @ a.mT)
    expected = torch.einsum("kp,ijpq,lq->ijkl", a, empirical_ntk(net, x), a)
    assert relative_error(ntk, expected) < TOLERANCE


def test_dead_parameters_add_nothing(net, x):
    ntk = empirical_ntk(net, x)
    net.register_parameter("dead", nn.Parameter(torch.randn(50, dtype=x.dtype)))
    for route in ["auto", *ROUTES]:
        assert relative_error(empirical_ntk(net, x, route=route), ntk) < TOLERANCE


def test_constant_outputs_have_a_zero_kernel(x):
    for route in ["auto", *ROUTES]:
        ntk = empirical_ntk(
            mlp().double(),
            x,
            route=route,
            output_fn=lambda model, x: torch.ones_like(x),
        )
        assert ntk.shape == (4, 4, 5, 5)
        assert not ntk.any()


def test_tied_weights_add_their_gradients(x):
    """Θ of a tied weight is that of J_a + J_b, not Θ_a + Θ_b."""
    tied, untied = mlp().double(), mlp().double()
    tied[0] = nn.Linear(5, 5).double()
    tied[2] = nn.Linear(5, 5).double()
    tied[4] = nn.Linear(5, 2).double()
    tied[2].weight = tied[0].weight
    untied = copy.deepcopy(tied)
    untied[2].weight = nn.Parameter(tied[0].weight.detach().clone())
    jacobians = [
        jacobian_by_differences(untied, x, name) for name in ("0.weight", "2.weight")
    ]
    shared = sum(jacobians)
    expected = torch.einsum("ikp,jlp->ijkl", shared, shared)
    ntk = empirical_ntk(tied, x, parameters=r"0\.weight")
    assert relative_error(ntk, expected) < 1e-6  # finite differences


# Precision and surroundings.


def test_float32_agrees_with_float64():
    model, x = mlp(), torch.randn(6, 5)
    ntk = empirical_ntk(model, x)
    assert ntk.dtype == torch.float32
    expected = empirical_ntk(copy.deepcopy(model).double(), x.double())
    # Gradients carry a few ε = 1.2e-7, and there is no cancellation to enlarge it.
    assert relative_error(ntk.double(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "resnet", "resnet_train", "attention", "lstm"])
def test_half_precision_models_are_measured_in_float32(name, dtype):
    case = BY_ID[name]
    model, x = case.build()
    model = model.to(dtype)
    ntk = empirical_ntk(model, x.float(), mode=case.mode)
    assert ntk.dtype == torch.float32
    assert next(model.parameters()).dtype == dtype
    # The same rounded weights in float64; the rest is float32 round-off, which the
    # normalizations enlarge.
    expected = ntk_by_loop(model.double(), x)
    assert relative_error(ntk.double(), expected) < 1e-4


def test_inputs_of_another_precision_are_cast(net, x):
    assert torch.equal(
        empirical_ntk(net, x.float()), empirical_ntk(net, x.float().double())
    )


@pytest.mark.parametrize("name", ["mlp", "gru", "resnet_train", "checkpoint_reentrant"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_measured_where_gradients_are_off(name, context):
    case = BY_ID[name]
    model, x = case.build()
    expected = empirical_ntk(model, x, mode=case.mode)
    with context():
        ntk = empirical_ntk(model, x, mode=case.mode)
        inference = empirical_ntk(model, x.clone(), mode=case.mode)
    assert torch.equal(ntk, expected)
    assert torch.equal(inference, expected)
    assert not ntk.is_inference()
    assert not ntk.requires_grad


def test_a_model_that_was_made_in_inference_mode(x):
    with torch.inference_mode():
        model = mlp().double()
    assert relative_error(
        empirical_ntk(model, x, parameters=lambda name, p: True),
        ntk_by_loop(_copied(model), x),
    ) < (TOLERANCE)


def _copied(model):
    fresh = mlp().double()
    with torch.no_grad():
        for p, value in zip(fresh.parameters(), model.parameters(), strict=True):
            p.copy_(value.clone())
    return fresh


def test_measured_under_autocast_as_without(net, x):
    expected = empirical_ntk(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(empirical_ntk(net, x), expected)


def test_measured_twice_is_equal_to_the_last_bit(net, x):
    assert torch.equal(empirical_ntk(net, x), empirical_ntk(net, x))


def test_the_inputs_are_left_as_they_were():
    model, x = BY_ID["input_overwritten"].build()
    before = x.clone()
    empirical_ntk(model, x)
    assert torch.equal(x, before)


def test_inputs_that_need_gradients_get_none(net, x):
    x.requires_grad_()
    assert not empirical_ntk(net, x).requires_grad
    assert x.grad is None


def test_nan_weights_give_nan_not_an_error(net, x):
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    for route in ["auto", *ROUTES]:
        assert empirical_ntk(net, x, route=route).isnan().any()


# Refusals: each says what is wrong and what to do.


def test_unknown_choices(net, x):
    # Without the type checks of this test run, as a user calls it.
    kernel = inspect.unwrap(empirical_ntk)
    with pytest.raises(ValueError, match="outputs='all'; expected one of full"):
        kernel(net, x, outputs="all")
    with pytest.raises(ValueError, match="mode='test'; expected one of eval, train"):
        kernel(net, x, mode="test")
    with pytest.raises(ValueError, match="route='fast'; expected one of auto"):
        kernel(net, x, route="fast")
    with pytest.raises(ValueError, match="by='layer'; expected"):
        inspect.unwrap(parameter_groups)(["0.weight"], "layer")


def test_arguments_that_make_no_sense(net, x):
    with pytest.raises(ValueError, match="'conv' of 'a' takes no parameter"):
        empirical_ntk(net, x, by={"a": "conv"})
    with pytest.raises(ValueError, match="'a lot' is not understood"):
        empirical_ntk(net, x, memory_budget="a lot")
    with pytest.raises(ValueError, match="must be positive"):
        empirical_ntk(net, x, memory_budget=0)
    with pytest.raises(ValueError, match="no example"):
        empirical_ntk(net, x[:0])
    with pytest.raises(ValueError, match="same leading dimension"):
        empirical_ntk(net, (x, x[:2]))


def test_scaling_that_does_not_fit(net, x):
    scaling = dict.fromkeys((name for name, _ in net.named_parameters()), 1.0)
    with pytest.raises(ValueError, match=r"missing: \['0.bias'\]"):
        empirical_ntk(
            net, x, scaling={k: v for k, v in scaling.items() if k != "0.bias"}
        )
    with pytest.raises(ValueError, match=r"not measured: \['typo'\]"):
        empirical_ntk(net, x, scaling=scaling | {"typo": 1.0})
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        empirical_ntk(net, x, scaling=scaling | {"0.bias": torch.ones(3)})
    for value in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            empirical_ntk(net, x, scaling=scaling | {"0.bias": value})


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"parameters": "["}, r"parameters='\[' is no regular .*: unterminated"),
        ({"parameters": ["w"]}, r"parameters=\['w'\] .*expected a text, not a list"),
        ({"by": {"a": "["}}, r"by\['a'\]='\[' is no regular .*: unterminated"),
        ({"by": {"a": None}}, r"by\['a'\]=None .*expected a text"),
        ({"by": "layer"}, "by='layer'; expected None, 'module'"),
        ({"by": ["module"]}, r"by=\['module'\]; expected None, 'module'"),
        (
            {"output_fn": "net"},
            r"output_fn must be callable \(model, x\) -> \(n, \.\.\.\)",
        ),
    ],
)
def test_a_selection_is_refused_with_and_without_a_model(net, x, selection, message):
    # Without the type checks of this test run, as a user calls it.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(check_selection)(**selection)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(empirical_ntk)(net, x, **selection)
    if "by" in selection:
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(parameter_groups)(["0.weight"], selection["by"])


def test_a_selection_that_may_fit_some_model():
    check_selection()
    check_selection("weight", "module", lambda model, x: model(x))
    check_selection(lambda name, p: True, {"a": r"^0\."})


def test_scaling_of_another_kind(net, x):
    kernel = inspect.unwrap(empirical_ntk)
    scaling = dict.fromkeys((name for name, _ in net.named_parameters()), 1.0)
    for wrong in (0.1, torch.ones(3), [1.0]):
        with pytest.raises(ValueError, match=r"scaling is a .*; expected a mapping of"):
            kernel(net, x, scaling=wrong)
    with pytest.raises(
        ValueError, match=r"scaling\['0.bias'\] is 'big'; expected a num"
    ):
        kernel(net, x, scaling=scaling | {"0.bias": "big"})


def test_memory_budgets_are_whole_numbers():
    memory, cpu = inspect.unwrap(memory_bytes), torch.device("cpu")
    assert memory(np.int64(2**20), cpu) == 2**20
    for wrong in (1.5, 2e9, True, [1], "2 lots", "-1"):
        with pytest.raises(
            ValueError, match=r"is not understood; expected a whole num"
        ):
            memory(wrong, cpu)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_that_is_left_on(x, mode):
    model = Computed(
        lambda self, x: nn.functional.dropout(self.body(x), 0.5), body=mlp()
    ).double()
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        empirical_ntk(model, x, mode=mode)


def test_dropout_that_follows_the_mode_is_fine_in_eval_only(x):
    model = Computed(
        lambda self, x: nn.functional.dropout(self.body(x), 0.5, self.training),
        body=mlp(),
    ).double()
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model.body, x)) < 1e-10
    with pytest.raises(UnsupportedModelError, match='mode="eval"'):
        empirical_ntk(model, x, mode="train")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(2), "lazy"),
        (nn.Linear(5, 2, dtype=torch.complex64), "complex"),
        (returning(lambda y: (y, y)), "2 tensors"),
        (returning(lambda y: {"a": y, "b": y}), r"a: \(4, 2\), b: \(4, 2\)"),
        (returning(lambda y: None), "0 tensors"),
        (returning(lambda y: y.argmax(1)), "int64"),
        (returning(lambda y: torch.complex(y, y)), "complex"),
        (returning(lambda y: y.mT), r"shape \(2, 4\) for 4 examples"),
        (returning(lambda y: y.sum()), r"shape \(\) for 4 examples"),
        (nn.ModuleDict({"body": nn.Linear(5, 2)}), "does not define `forward`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_measured(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        empirical_ntk(model, torch.randn(4, 5))


class Caching(nn.Module):
    """Doubles its weight once and for all, as models do that are made for inference."""

    def __init__(self, kept):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 5)), nn.Linear(6, 2)
        self.kept, self.cache, self.doubled = kept, {}, None

    def forward(self, x):
        if self.kept == "in_a_dict":
            weight = self.cache.setdefault("weight", 2 * self.weight)
        elif self.doubled is None:
            weight = self.doubled = 2 * self.weight
        else:
            weight = self.doubled
        return self.head(torch.tanh(x @ weight.t()))


@pytest.mark.parametrize("kept", ["in_a_dict", "as_an_attribute"])
@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_a_weight_that_is_computed_once_and_for_all(kept, route, x):
    model = Caching(kept).double()
    assert (
        relative_error(empirical_ntk(model, x, route=route), ntk_by_loop(model, x))
        < 1e-10
    )
    assert model.doubled is None
    assert not model.cache
    u = torch.eye(2 * len(x), dtype=torch.float64)
    products = TangentOperator(model, x).ntk_vp(u)
    expected = as_matrix(ntk_by_loop(model, x))
    assert relative_error(products, expected) < 1e-10


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modules_of_the_compiler_of_torch_jit():
    whole = torch.jit.script(nn.Linear(5, 2))
    inside = nn.Sequential(nn.Linear(5, 5), torch.jit.script(nn.Linear(5, 2)))
    for model, name in ((whole, "RecursiveScriptModule"), (inside, "1")):
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is compiled by"):
            empirical_ntk(model, torch.randn(4, 5))
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is compiled by"):
            TangentOperator(model, torch.randn(4, 5))


def test_a_program_whose_mode_is_fixed():
    class Exported(nn.Linear):
        """As `torch.export` makes them; exporting takes seconds."""

        def eval(self):
            raise NotImplementedError("Calling eval() is not supported yet.")

    with pytest.raises(UnsupportedModelError, match="the module it was made from"):
        empirical_ntk(Exported(5, 2), torch.randn(4, 5))


def test_sparse_parameters(x):
    model = Computed(
        lambda self, x: torch.sparse.mm(self.w, x.t()).t(),
        w=nn.Parameter(torch.eye(5).to_sparse()),
    )
    with pytest.raises(UnsupportedModelError, match="'w' is sparse"):
        empirical_ntk(model, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_inputs(net):
    for x in (
        torch.eye(5).to_sparse(),
        torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)]),
    ):
        with pytest.raises(UnsupportedModelError, match="sparse or nested"):
            empirical_ntk(net, x)


def test_complex_inputs(net):
    with pytest.raises(UnsupportedModelError, match="inputs are torch"):
        empirical_ntk(net, torch.randn(4, 5, dtype=torch.complex128))


def test_no_parameter_to_measure(net, x):
    with pytest.raises(ValueError, match="parameters='conv'"):
        empirical_ntk(net, x, parameters="conv")
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        empirical_ntk(net, x)
    with pytest.raises(ValueError, match="0 parameters: none"):
        empirical_ntk(nn.Tanh(), x)


def test_vmap_refuses_coupled_examples():
    model, x = resnet().double(), torch.randn(3, 3, 5, 5, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="depends on the others"):
        empirical_ntk(model, x, mode="train", route="vmap")


def test_a_weight_that_is_used_behind_the_modules_back_is_not_missed(x):
    """A list of weights is no part of the module, so swapping them in does not help."""
    model = Computed(
        lambda self, x: x @ self.captured[0],
        weight=nn.Parameter(torch.randn(5, 2, dtype=x.dtype)),
    )
    model.captured = [model.weight]
    with pytest.raises(UnsupportedModelError, match="weight"):
        empirical_ntk(model, x)
