"""J·v, Jᵀ·u and Θ·u against the Jacobian of the loop."""

import copy

import pytest
import torch
from cases import BY_ID, CASES
from networks import mlp, resnet
from oracles import relative_error
from tangents import GRAD_IS_LOOKED_AT, TOLERANCE, dense, dense_of, operator_of, random
from zoo import ZOO

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.errors import UnsupportedModelError

pytestmark = GRAD_IS_LOOKED_AT

# Neither a second derivative nor a forward mode, in torch itself.
REFUSED = {
    "checkpoint_reentrant": "use_reentrant=False",
    "embedding_bag": "_embedding_bag",
    "embedding_bag_max": "_embedding_bag",
    "embedding_bag_prelu": "_embedding_bag",
    "embedding_bag_weighted": "_embedding_bag",
}


@pytest.mark.parametrize("case", [*CASES, *ZOO], ids=lambda case: case.id)
def test_products_are_those_of_the_loop(case):
    operator, jacobian = operator_of(case), dense_of(case)
    m, p = jacobian.shape
    assert operator.shape == (m, p)
    assert operator.n * operator.c == m
    u, v = random(m), random(p)
    with operator:
        assert relative_error(operator.vjp(u), jacobian.mT @ u) < TOLERANCE
        if case.id in REFUSED:
            with pytest.raises(UnsupportedModelError, match=REFUSED[case.id]):
                operator.jvp(v)
            return
        assert relative_error(operator.jvp(v), jacobian @ v) < TOLERANCE
        expected = jacobian @ (jacobian.mT @ u)
        assert relative_error(operator.ntk_vp(u), expected) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_diagonal_and_quadratic_forms_are_those_of_the_loop(case):
    operator, jacobian = operator_of(case), dense_of(case)
    u = random(len(jacobian), 3)
    diagonal = (jacobian**2).sum(1)
    assert relative_error(operator.diagonal(), diagonal) < TOLERANCE
    forms = ((jacobian.mT @ u) ** 2).sum(0)
    assert relative_error(operator.quadratic_form(u), forms) < TOLERANCE
    alone = operator.quadratic_form(u[:, 0])
    assert alone.shape == ()
    assert relative_error(alone, forms[0]) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "resnet_train", "gru", "embedding_padding"])
def test_all_columns_at_once_are_the_matrices(name):
    operator, jacobian = operator_of(BY_ID[name]), dense_of(BY_ID[name])
    m, p = operator.shape
    identity = torch.eye(m, dtype=torch.float64)
    kernel = operator.ntk_vp(identity)
    assert relative_error(operator.jvp(torch.eye(p).double()), jacobian) < TOLERANCE
    assert relative_error(operator.vjp(identity), jacobian.mT) < TOLERANCE
    assert relative_error(kernel, jacobian @ jacobian.mT) < TOLERANCE
    assert relative_error(kernel, kernel.mT) < TOLERANCE
    assert torch.linalg.eigvalsh(kernel).min() > -TOLERANCE * kernel.norm()


def test_the_kernel_is_that_of_empirical_ntk(net, x):
    expected = as_matrix(empirical_ntk(net, x))
    kernel = TangentOperator(net, x).ntk_vp(torch.eye(8).double())
    assert relative_error(kernel, expected) < TOLERANCE


def test_no_column_and_one_column(net, x):
    operator = TangentOperator(net, x)
    m, p = operator.shape
    u, v = random(m, 1), random(p, 1)
    assert operator.ntk_vp(u[:, :0]).shape == (m, 0)
    assert operator.vjp(u[:, :0]).shape == (p, 0)
    assert torch.equal(operator.ntk_vp(u)[:, 0], operator.ntk_vp(u[:, 0]))
    assert torch.equal(operator.jvp(v)[:, 0], operator.jvp(v[:, 0]))


def test_directions_by_name(net, x):
    operator = TangentOperator(net, x)
    flat = random(operator.shape[1])
    named = operator.as_dict(flat)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert {name: part.shape for name, part in named.items()} == shapes
    expected = dense(net, x) @ flat
    assert relative_error(operator.jvp(named), expected) < TOLERANCE
    shuffled = {name: named[name] for name in sorted(named, reverse=True)}
    assert relative_error(operator.jvp(shuffled), expected) < TOLERANCE


def test_the_gradient_of_a_loss_by_name(net, x):
    residual = random(4, 2)
    found = TangentOperator(net, x).vjp(residual.flatten())
    (net(x) * residual).sum().backward()
    for name, part in TangentOperator(net, x).as_dict(found).items():
        assert relative_error(part, net.get_parameter(name).grad) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "resnet_train", "tied_weights"])
def test_scaling(name):
    case = BY_ID[name]
    model, _ = case.build()
    scaling = {
        n: torch.rand_like(p) if p.ndim == 2 else 0.1 * (i + 1)
        for i, (n, p) in enumerate(model.named_parameters())
    }
    operator = operator_of(case, scaling=scaling)
    jacobian, u = dense_of(case), random(operator.shape[0])
    factors = torch.cat(
        [
            torch.as_tensor(scaling[n], dtype=torch.float64).expand(p.shape).flatten()
            for n, p in model.named_parameters()
        ]
    )
    kernel = jacobian * factors @ jacobian.mT
    assert relative_error(operator.ntk_vp(u), kernel @ u) < TOLERANCE
    assert relative_error(operator.diagonal(), kernel.diag()) < TOLERANCE
    assert relative_error(operator.quadratic_form(u), u @ kernel @ u) < TOLERANCE
    # J itself is not scaled.
    assert relative_error(operator.vjp(u), jacobian.mT @ u) < TOLERANCE


def test_some_parameters(net, x):
    net[2].requires_grad_(False)
    names = ["0.weight", "4.weight"]
    operator = TangentOperator(net, x, parameters="weight")
    u, jacobian = random(8), dense(net, x, names=names)
    assert list(operator.as_dict(operator.vjp(u))) == names
    assert relative_error(operator.ntk_vp(u), jacobian @ jacobian.mT @ u) < TOLERANCE
    frozen = TangentOperator(net, x, parameters=lambda name, p: name == "2.weight")
    jacobian = dense(net.requires_grad_(True), x, names=["2.weight"])
    assert relative_error(frozen.ntk_vp(u), jacobian @ jacobian.mT @ u) < TOLERANCE


def test_constant_outputs_have_zero_products(net, x):
    operator = TangentOperator(net, x, output_fn=lambda model, x: torch.ones_like(x))
    assert not operator.ntk_vp(random(20)).any()
    assert not operator.vjp(random(20)).any()
    assert not operator.diagonal().any()


def test_outputs_of_another_precision(x):
    model = mlp()
    operator = TangentOperator(model, x, output_fn=lambda m, x: m(x).double())
    assert operator.ntk_vp(random(8)).dtype == torch.float32
    jacobian, u = dense(copy.deepcopy(model).double(), x), random(8)
    expected = jacobian @ jacobian.mT @ u
    assert relative_error(operator.ntk_vp(u).double(), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "cnn", "resnet", "resnet_train", "attention", "transformer"),
        *("lstm", "lstm_bidirectional", "gru", "rnn", "embedding_padding"),
        *("layer_norm", "batch_norm", "checkpoint", "tied_weights", "weight_norm"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(name, dtype):
    case = BY_ID[name]
    model, x = case.build()
    model = model.to(dtype)
    operator = TangentOperator(model, x, mode=case.mode)
    jacobian = dense(copy.deepcopy(model).double(), x)
    u, v = random(operator.shape[0]), random(operator.shape[1])
    # The same weights in float64; the rest is round-off of float32, which the
    # normalizations enlarge.
    for found, expected in (
        (operator.jvp(v), jacobian @ v),
        (operator.vjp(u), jacobian.mT @ u),
        (operator.ntk_vp(u), jacobian @ (jacobian.mT @ u)),
    ):
        assert found.dtype == operator.dtype == torch.float32
        assert relative_error(found.double(), expected) < 1e-4
    assert next(model.parameters()).dtype == dtype


def test_train_mode_is_another_kernel():
    model, x = resnet().double(), BY_ID["resnet"].build()[1]
    u = random(6)
    train = TangentOperator(model, x, mode="train").ntk_vp(u)
    assert relative_error(train, TangentOperator(model, x).ntk_vp(u)) > 0.1
