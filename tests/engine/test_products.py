"""J·v, Jᵀ·u and Θ·u against the Jacobian of the loop, and what they leave behind."""

import copy
import inspect
import logging
import re
from functools import cache

import pytest
import torch
from cases import (
    BY_ID,
    CASES,
    Computed,
    attention,
    checkpointed,
    mlp,
    recurrent,
    resnet,
    sequences,
    vectors,
)
from oracles import call, jacobian_by_loop, relative_error
from torch import nn
from zoo import ZOO

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.engine.linearization import examples_that_fit
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.engine.pushforward import WAYS
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.functional import ModelFunction

# Round-off of float64 over at most some thousand additions is below 1e-12; formulas
# that cancel (the normalizations) lose two or three digits more.
TOLERANCE = 1e-9

# torch.compile looks at the `.grad` of what enters the compiled part.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


def dense(model, x, output_fn=call, names=None):
    """J as a matrix: rows example-major, parameters one after the other."""
    blocks = jacobian_by_loop(model, x, output_fn, names)
    rows = {name: block.flatten(0, 1) for name, block in blocks.items()}
    return torch.cat([block.reshape(len(block), -1) for block in rows.values()], 1)


@cache
def dense_of(case):
    return dense(*case.build(), case.output_fn)


def operator_of(case, **options):
    model, x = case.build()
    output_fn = None if case.output_fn is call else case.output_fn
    return TangentOperator(model, x, output_fn=output_fn, mode=case.mode, **options)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# The numbers.

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


# Which way J·v goes.


class Wrong(torch.autograd.Function):
    """Twice its input forwards; what it says about its derivatives is up to a test."""

    backward_factor, jvp_factor = 2.0, 2.0

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @classmethod
    def backward(cls, ctx, gradient):
        return cls.backward_factor * gradient

    @classmethod
    def jvp(cls, ctx, tangent):
        return cls.jvp_factor * tangent


class WrongForward(Wrong):
    jvp_factor = 2.01


class Clamped(Wrong):
    """Its backward pass is not linear, so no J has it."""

    @staticmethod
    def backward(ctx, gradient):
        return (2 * gradient).clamp(-0.1, 0.1)


class Once(Wrong):
    """Knows one derivative, by backward only; a second one is silently zero."""

    jvp = torch.autograd.Function.jvp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def through(function):
    return Computed(
        lambda self, x: self.head(function(torch.tanh(self.stem(x)))),
        stem=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
    ).double()


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


def way_of(operator, caplog):
    with caplog.at_level(logging.INFO, "ntk_callbacks.engine.linearization"):
        operator.jvp(random(operator.shape[1]))
    (record,) = caplog.records
    return re.match(r"J·v by (\w+ \w+)", record.getMessage())[1]


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


# Precision.


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


# Memory.


class Sizes:
    """The model's outputs, and how many examples each call was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, x):
        self.seen.append(len(x))
        return model(x)


def smallest_budget(*arguments, **options):
    with pytest.raises(MemoryBudgetError) as refused:
        TangentOperator(*arguments, memory_budget=1, **options)
    need = float(re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))[1])
    return int(need * 1.01 * 2**20)  # the message has three digits


def test_a_small_budget_runs_independent_examples_in_chunks(net):
    x, sizes = random(7, 5), Sizes()
    budget = 2 * smallest_budget(net, x)
    operator = TangentOperator(net, x, memory_budget=budget, output_fn=sizes)
    jacobian, u, v = dense(net, x), random(14, 3), random(operator.shape[1], 3)
    sizes.seen.clear()
    assert relative_error(operator.vjp(u), jacobian.mT @ u) < TOLERANCE
    # The three gradients do not fit into the budget either: one after the other.
    assert sizes.seen == 3 * [2, 2, 2, 1]
    assert relative_error(operator.jvp(v), jacobian @ v) < TOLERANCE
    kernel = jacobian @ jacobian.mT
    assert relative_error(operator.ntk_vp(u), kernel @ u) < TOLERANCE
    assert relative_error(operator.diagonal(), kernel.diag()) < TOLERANCE
    assert max(sizes.seen) == 2


def test_a_large_budget_runs_all_examples_at_once(net, x):
    sizes = Sizes()
    operator = TangentOperator(net, x, output_fn=sizes)
    sizes.seen.clear()
    operator.vjp(random(8, 3))
    assert sizes.seen == [4]


def test_coupled_examples_are_never_cut_apart():
    case = BY_ID["batch_norm_untracked"]
    model, x = case.build()
    with pytest.raises(MemoryBudgetError, match=r"the joint batch needs .* fewer exam"):
        TangentOperator(model, x, memory_budget=1)
    operator = TangentOperator(model, x, memory_budget=smallest_budget(model, x))
    jacobian, u = dense_of(case), random(operator.shape[0])
    assert relative_error(operator.ntk_vp(u), jacobian @ jacobian.mT @ u) < TOLERANCE


def test_one_example_that_does_not_fit(net, x):
    with pytest.raises(MemoryBudgetError, match=r"one example needs at least .* MiB"):
        TangentOperator(net, x, memory_budget=1)


def test_graphs_are_counted_for_the_way_there_and_back():
    # Double backward holds three times what one backward pass does.
    assert examples_that_fit(5, False, 100, 300) == 1
    assert examples_that_fit(5, False, 100, 900) == 3
    assert examples_that_fit(5, False, 100, 9000) == 5
    for joint, budget in ((False, 299), (True, 1499)):
        with pytest.raises(MemoryBudgetError):
            examples_that_fit(5, joint, 100, budget)


def test_what_needs_no_graph_fits_any_budget():
    assert examples_that_fit(5, False, 0, 1) == 1
    assert examples_that_fit(5, False, 0, 5) == 5
    assert examples_that_fit(5, True, 100, 1500) == 5


# The surroundings.


class Counting(nn.Sequential):
    """Counts how often it is put into a mode."""

    prepared = 0

    def train(self, mode=True):
        type(self).prepared += 1
        return super().train(mode)


def test_a_with_block_prepares_the_model_once(x):
    model = Counting(*mlp()).double()
    operator = TangentOperator(model, x)
    u = random(8)
    Counting.prepared = 0
    with operator as opened:
        for _ in range(5):
            u = opened.ntk_vp(u)
            opened.vjp(u)
        assert opened.quadratic_form(u) > 0
    assert Counting.prepared == 1
    operator.ntk_vp(u)
    assert Counting.prepared == 2


def test_products_are_taken_at_the_present_weights(net, x):
    operator, u = TangentOperator(net, x), random(8)
    before = operator.ntk_vp(u)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    jacobian = dense(net, x)
    assert relative_error(operator.ntk_vp(u), jacobian @ jacobian.mT @ u) < TOLERANCE
    assert relative_error(before, operator.ntk_vp(u)) > 0.01


def test_products_follow_a_half_precision_model(x):
    net = mlp().bfloat16()
    operator, u = TangentOperator(net, x), random(8)
    before = operator.ntk_vp(u)
    with torch.no_grad():
        net[0].weight *= 2
    assert relative_error(before, operator.ntk_vp(u)) > 0.01


def test_the_parameters_are_chosen_once(net, x):
    operator, u = TangentOperator(net, x), random(8)
    expected = operator.vjp(u)
    net[0].requires_grad_(False)
    assert torch.equal(operator.vjp(u), expected)


def test_the_inputs_are_copied(net, x):
    operator, u = TangentOperator(net, x), random(8)
    expected = operator.vjp(u)
    x.zero_()
    assert torch.equal(operator.vjp(u), expected)


def test_overwritten_inputs_and_vectors_are_left_alone():
    model, x = BY_ID["input_overwritten"].build()
    operator, before = TangentOperator(model, x), x.clone()
    u = random(operator.shape[0])
    vector = u.clone()
    first = operator.ntk_vp(u)
    assert torch.equal(operator.ntk_vp(u), first)
    assert torch.equal(x, before)
    assert torch.equal(u, vector)


def flags():
    cuda = torch.backends.cuda
    return (
        torch.get_rng_state().tolist(),
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("name", ["resnet_train", "transformer", "lstm", "embedding"])
def test_no_trace_is_left(name):
    case = BY_ID[name]
    model, x = case.build()
    model.train()
    call(model, x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.to_dense().clone() for p in model.parameters()]
    identities = [id(p.grad) for p in model.parameters()]
    training = [module.training for module in model.modules()]
    before = flags()
    assert all(before[1:6])  # as torch starts; an earlier test may have left a trace
    with TangentOperator(model, x, mode=case.mode) as operator:
        operator.ntk_vp(random(operator.shape[0]).sign())
        operator.jvp(random(operator.shape[1]))
        operator.diagonal()
    # Not the draws of the test itself, which the guard takes back as well.
    random(operator.shape[0])
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    operator.ntk_vp(torch.ones(operator.shape[0]))
    assert flags() == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for p, gradient, identity in zip(
        model.parameters(), gradients, identities, strict=True
    ):
        assert id(p.grad) == identity
        assert torch.equal(p.grad.to_dense(), gradient)
        assert p.requires_grad
    assert [module.training for module in model.modules()] == training


def test_no_trace_is_left_by_a_refusal(x):
    model = through(Clamped.apply).train()
    before, operator = flags(), TangentOperator(model, x)
    with pytest.raises(UnsupportedModelError):
        operator.ntk_vp(torch.ones(8))
    assert flags() == before
    assert model.training
    assert operator.vjp(torch.ones(8)).isfinite().all()  # and it is still of use


@pytest.mark.parametrize("name", ["mlp", "lstm", "resnet_train", "attention"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_products_where_gradients_are_off(name, context):
    case = BY_ID[name]
    operator = operator_of(case)
    u, v = random(operator.shape[0]), random(operator.shape[1])
    expected = operator.ntk_vp(u), operator.jvp(v), operator.vjp(u)
    with context():
        inside = operator_of(case)
        u, v = u.clone(), v.clone()
        found = inside.ntk_vp(u), inside.jvp(v), inside.vjp(u)
        named = inside.jvp(inside.as_dict(v))
    for value, reference in zip((*found, named), (*expected, expected[1]), strict=True):
        assert torch.equal(value, reference)
        assert not value.requires_grad
        assert not value.is_inference()


def test_vectors_that_need_gradients_get_none(net, x):
    u = random(8).requires_grad_()
    assert not TangentOperator(net, x).ntk_vp(u).requires_grad
    for model in (net, checkpointed(True).double()):
        assert not TangentOperator(model, x).vjp(u).requires_grad
        assert u.grad is None


def test_measured_under_autocast_as_without(net, x):
    operator, u = TangentOperator(net, x), random(8)
    expected = operator.ntk_vp(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator.ntk_vp(u), expected)


def test_fused_attention_is_left_on(caplog):
    model, x = attention(), sequences()
    operator = TangentOperator(model, x)
    assert way_of(operator, caplog) == "forward mode"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_recurrent_layers_in_single_precision_go_backwards_twice(caplog):
    operator = TangentOperator(recurrent(nn.LSTM), sequences())
    assert way_of(operator, caplog) == "double backward"


@pytest.mark.parametrize("where", ["weights", "vector"])
def test_nan_stays_nan(where, net, x):
    u = random(8)
    if where == "weights":
        with torch.no_grad():
            net[0].weight[0, 0] = torch.nan
    else:
        u[0] = torch.nan
    operator = TangentOperator(net, x)
    assert operator.ntk_vp(u).isnan().any()
    assert operator.vjp(u).isnan().any()
    assert operator.quadratic_form(u).isnan()


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


# Refusals: each says what is wrong and what to do.


@pytest.mark.parametrize(
    ("product", "vector", "message"),
    [
        (
            "jvp",
            torch.ones(8),
            r"jvp: the vector is \(8,\) of .*; expected real .*92,\)",
        ),
        ("vjp", torch.ones(92), r"vjp: the vector is \(92,\) .* \(8,\) or \(8, k\)"),
        (
            "ntk_vp",
            torch.ones(7),
            r"\(7,\) .*J is 8×92: 4 examples × 2 outputs, 92 par",
        ),
        ("ntk_vp", torch.ones(8, 2, 2), r"\(8, 2, 2\)"),
        ("ntk_vp", torch.ones(2, 8), r"\(2, 8\)"),
        ("ntk_vp", torch.tensor(1.0), r"is \(\) of"),
        ("quadratic_form", torch.ones(8).int(), "int32; expected real numbers"),
        ("ntk_vp", torch.ones(8) * 1j, "complex64; expected real numbers"),
    ],
)
def test_vectors_that_do_not_fit(net, x, product, vector, message):
    operator = TangentOperator(net, x)
    # Without the type checks of this test run, as a user calls it.
    method = inspect.unwrap(getattr(TangentOperator, product))
    with pytest.raises(ValueError, match=message):
        method(operator, vector)


def test_mappings_that_do_not_fit(net, x):
    operator = TangentOperator(net, x)
    named = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    bias = named.pop("0.bias")
    with pytest.raises(ValueError, match=r"missing: \['0.bias'\], .*: none"):
        operator.jvp(named)
    with pytest.raises(ValueError, match=r"missing: none, .*\['0.bias'\]"):
        operator.jvp(named | {"0.bias": bias[:2]})
    with pytest.raises(ValueError, match=r"missing: none, .*\['typo'\]"):
        operator.jvp(named | {"0.bias": bias, "typo": bias})


def test_arguments_that_make_no_sense(net, x):
    with pytest.raises(ValueError, match="no example"):
        TangentOperator(net, x[:0])
    with pytest.raises(ValueError, match=r"missing: \['0.weight', "):
        TangentOperator(net, x, scaling={})
    with pytest.raises(ValueError, match="'a lot' is not understood"):
        TangentOperator(net, x, memory_budget="a lot")


def test_random_models_are_refused(x):
    model = Computed(lambda self, x: nn.functional.dropout(self.body(x)), body=mlp())
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        TangentOperator(model, vectors())


def test_a_weight_that_is_used_behind_the_modules_back_is_not_missed(x):
    model = Computed(
        lambda self, x: x @ self.captured[0], weight=nn.Parameter(random(5, 2))
    )
    model.captured = [model.weight]
    with pytest.raises(UnsupportedModelError, match="weight"):
        TangentOperator(model, x)


def test_train_mode_is_another_kernel():
    model, x = resnet().double(), BY_ID["resnet"].build()[1]
    u = random(6)
    train = TangentOperator(model, x, mode="train").ntk_vp(u)
    assert relative_error(train, TangentOperator(model, x).ntk_vp(u)) > 0.1
