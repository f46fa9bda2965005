"""The laws that every kernel obeys."""

import copy

import pytest
import torch
from cases import BY_ID
from networks import mlp
from oracles import TOLERANCE, jacobian_by_differences, relative_error
from torch import nn

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.layout import symmetric


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
