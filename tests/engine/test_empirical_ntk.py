"""What the sides, outputs and modes of `empirical_ntk` mean."""

import copy
import inspect
import re

import pytest
import torch
from cases import BY_ID, UNWRAPPED_OUTPUTS
from networks import Computed, around, settled
from odd_networks import returning
from oracles import TOLERANCE, jacobian_by_differences, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.engine.exact import ROUTES


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
