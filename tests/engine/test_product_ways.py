"""Which way J·v goes: forwards, backwards twice, or not at all."""

import copy

import pytest
import torch
from cases import BY_ID
from false_derivatives import Clamped, Wrong, through
from networks import Computed, attention, mlp, recurrent, sequences
from odd_networks import checkpointed
from oracles import relative_error
from tangents import (
    GRAD_IS_LOOKED_AT,
    TOLERANCE,
    dense,
    dense_of,
    operator_of,
    random,
    way_of,
)
from torch import nn

from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.engine.pushforward import WAYS
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction

pytestmark = GRAD_IS_LOOKED_AT


@pytest.mark.parametrize("parameters", ["block", "head", "stem"])
def test_some_parameters_of_a_reentrant_checkpoint(x, parameters, caplog):
    # Its forward mode gives zeros for the block without a word.
    model = checkpointed(True).double()
    names = [name for name, _ in model.named_parameters() if parameters in name]
    operator = TangentOperator(model, x, parameters=parameters)
    u, jacobian = random(8), dense(model, x, names=names)
    assert relative_error(operator.vjp(u), jacobian.mT @ u) < TOLERANCE
    if parameters == "head":  # nothing of it passes through the checkpoint
        assert way_of(operator, caplog) == "forward mode"
        product = operator.ntk_vp(u)
        assert relative_error(product, jacobian @ jacobian.mT @ u) < TOLERANCE
        return
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        operator.ntk_vp(u)


class WrongForward(Wrong):
    jvp_factor = 2.01


class Once(Wrong):
    """Knows one derivative, by backward only; a second one is silently zero."""

    jvp = torch.autograd.Function.jvp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def held_constant(hidden):
    with torch.no_grad():
        size = hidden.norm(dim=1, keepdim=True)
    return hidden / size


def reversed_gradient(hidden):
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: -gradient)
    return hidden * 1


def rescaled_by_frequency():
    return Computed(
        lambda self, ids: self.head(torch.tanh(self.embed(ids)).mean(1)),
        embed=nn.Embedding(7, 5, scale_grad_by_freq=True),
        head=nn.Linear(5, 2),
    ).double()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", ["mlp", "attention", "unused_parameter", "lstm"])
def test_every_way_gives_the_same(way, name):
    model, x = BY_ID[name].build()
    function = ModelFunction(model)
    tangents = [
        {name: torch.randn_like(p) for name, p in function.params.items()}
        for _ in range(2)
    ]
    found = way(function, x, tangents)
    for product, tangent in zip(found, tangents, strict=True):
        v = torch.cat([part.flatten() for part in tangent.values()])
        expected = dense_of(BY_ID[name]) @ v
        assert relative_error(product.flatten(), expected) < TOLERANCE
        assert not product.requires_grad


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "constant",
    [lambda model, x: torch.ones_like(x), lambda model, x: x * model.idle.sum()],
    ids=["of all", "of those measured"],
)
def test_every_way_gives_zeros_for_constants(way, constant, x):
    model = Computed(None, body=mlp(), idle=nn.Parameter(torch.ones(2)))
    function = ModelFunction(model, output_fn=constant, parameters="body")
    (product,) = way(function, x, [function.params])
    assert product.shape == (4, 5)
    assert not product.any()


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "transformer", "resnet"])
def test_forward_mode_is_used_where_it_goes(name, caplog):
    assert way_of(operator_of(BY_ID[name]), caplog) == "forward mode"


@pytest.mark.parametrize(
    "name", ["weight_norm", "spectral_norm_train", "old_style_function"]
)
def test_double_backward_is_used_where_forward_mode_does_not_go(name, caplog):
    assert way_of(operator_of(BY_ID[name]), caplog) == "double backward"


@pytest.mark.parametrize(
    "function", [held_constant, reversed_gradient, WrongForward.apply]
)
def test_double_backward_is_used_where_forward_mode_is_wrong(function, x, caplog):
    model = through(function)
    operator, jacobian = TangentOperator(model, x), dense(model, x)
    assert way_of(operator, caplog) == "double backward"
    v = random(operator.shape[1])
    assert relative_error(operator.jvp(v), jacobian @ v) < TOLERANCE


def barely_held_constant(hidden):
    with torch.no_grad():
        size = 1 + 1e-9 * hidden.norm(dim=1, keepdim=True)
    return hidden / size


def test_forward_mode_is_not_used_where_numbers_hardly_tell(x, caplog):
    operator = TangentOperator(through(barely_held_constant), x)
    assert way_of(operator, caplog) == "double backward"


def test_a_padding_row_among_many_is_not_moved(caplog):
    model = Computed(
        lambda self, ids: self.embed(ids).mean(1),
        embed=nn.Embedding(5000, 2, padding_idx=3),
    )
    operator = TangentOperator(model, torch.tensor([[1, 2, 3], [3, 7, 3]]))
    direction = {"embed.weight": torch.zeros(5000, 2)}
    direction["embed.weight"][3] = 1
    assert way_of(operator, caplog) == "double backward"
    assert not operator.jvp(direction).any()


def test_gradients_that_an_embedding_rescales_are_refused():
    # By how often a token occurs in the batch: no derivative of the outputs, and lost
    # in forward mode and in the second derivative.
    ids = torch.tensor([[0, 1, 1, 1], [0, 2, 3, 3]])
    operator = TangentOperator(rescaled_by_frequency(), ids, mode="train")
    with pytest.raises(UnsupportedModelError, match=r"masked or rescaled.*<u, J v> is"):
        operator.jvp(random(operator.shape[1]))


@pytest.mark.parametrize("function", [Wrong.apply, torch.tanh])
def test_right_derivatives_of_custom_functions_are_taken_forwards(function, x, caplog):
    assert way_of(TangentOperator(through(function), x), caplog) == "forward mode"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Clamped.apply, r"not by double backward \(<u, J v> is .* where <Jᵀu, v> is"),
        (
            Once.apply,
            r"not by forward mode \(You must .*not by double backward \(<u, J v> is",
        ),
    ],
)
def test_models_that_no_way_gets_right_are_refused(function, message, x):
    operator = TangentOperator(through(function), x)
    for product, size in ((operator.jvp, 1), (operator.ntk_vp, 0)):
        with pytest.raises(UnsupportedModelError, match=message):
            product(random(operator.shape[size]))
    assert operator.vjp(random(8)).isfinite().all()


def test_a_parameter_with_small_gradients_is_not_missed(x, caplog):
    """A thousandth of the others, and forward mode loses it."""

    class Lost(Wrong):
        jvp_factor = 0.0

    model = Computed(
        lambda self, x: self.body(x) + 1e-3 * Lost.apply(self.small),
        body=mlp(),
        small=nn.Parameter(torch.randn(2)),
    )
    assert way_of(TangentOperator(model, x), caplog) == "double backward"


def test_fused_attention_is_left_on(caplog):
    model, x = attention(), sequences()
    operator = TangentOperator(model, x)
    assert way_of(operator, caplog) == "forward mode"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_recurrent_layers_in_single_precision_go_backwards_twice(caplog):
    operator = TangentOperator(recurrent(nn.LSTM), sequences())
    assert way_of(operator, caplog) == "double backward"


def test_what_a_broken_model_decides_does_not_stay(x):
    model = through(WrongForward.apply)
    weights = copy.deepcopy(model.state_dict())
    operator = TangentOperator(model, x)
    with torch.no_grad():
        model.stem.weight.fill_(torch.nan)
    assert operator.jvp(random(operator.shape[1])).isnan().any()
    model.load_state_dict(weights)
    v = random(operator.shape[1])
    assert relative_error(operator.jvp(v), dense(model, x) @ v) < TOLERANCE
