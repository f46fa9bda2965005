"""What is recorded of a forward pass, and where the examples lie in it."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from cases import (
    BY_ID,
    Computed,
    attention,
    convolution,
    images,
    in_double,
    mlp,
    packed_sequences,
    sequences,
    tokens,
    transformer,
    vectors,
)
from oracles import TOLERANCE, each, ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine.backward import graph_nodes
from ntk_callbacks.engine.batch_axis import BatchAxis, located
from ntk_callbacks.engine.recording import gradients_at, record
from ntk_callbacks.engine.sides import ChangedModelError, Side
from ntk_callbacks.engine.survey import surveyed
from ntk_callbacks.functional import ModelFunction


def recorded(model, x):
    """The taps of a forward pass."""
    function = ModelFunction(model)
    params = function.params | function.fixed
    return record(function, params, each(in_double, x), list(function.params))


def surveyed_on(model, x):
    function = ModelFunction(model)
    params = function.params | function.fixed
    return surveyed(function, params, each(in_double, x), list(function.params))


def names(recording):
    return [tap.function.__name__ for tap in recording.taps]


def bypassing(recording):
    """Parameters that autograd reaches past the taps."""
    leaves = {id(leaf): name for name, leaf in recording.parameters.items()}
    nodes = graph_nodes(recording.outputs)
    found = {leaves.get(id(getattr(node, "variable", None))) for node in nodes}
    return found - {None}


def with_parameters(compute, **shapes):
    """A computation between two linear layers, in float64."""
    members = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return Computed(
        lambda self, x: self.head(torch.tanh(compute(self, self.stem(x)))),
        stem=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
        **members,
    ).double()


def check_kernel(model, x):
    ntk = empirical_ntk(model, x)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


@pytest.fixture
def x():
    return vectors().double()


# What is a tap.


def test_calls_that_take_parameters_together_with_data(x):
    recording = recorded(BY_ID["layer_norm"].build()[0], x)
    assert names(recording) == ["linear", "layer_norm", "linear"]
    by_id = {id(leaf): name for name, leaf in recording.parameters.items()}
    sources = [[by_id[id(s)] for s in tap.sources.values()] for tap in recording.taps]
    assert sources == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias"],
        ["3.weight", "3.bias"],
    ]
    assert not bypassing(recording)


TAPS = {
    "add": (lambda self, h: h + self.p, ["add"]),
    "reflected": (lambda self, h: self.p - h, ["sub"]),
    "quotient": (lambda self, h: self.p / (2 + torch.tanh(h)), ["div"]),
    "mul_in_place": (lambda self, h: h.mul_(self.p), ["mul_"]),
    "augmented": (lambda self, h: _augmented(h, self.p), ["add_"]),
    "where": (lambda self, h: torch.where(h > 0, h, self.p * h), ["mul"]),
    "into_a_view": (lambda self, h: _into_a_view(h, self.p), ["add_"]),
}


def _augmented(h, p):
    h = h.clone()
    h += p
    return h


def _into_a_view(h, p):
    h = h.clone()
    h.view(-1, 2, 3).add_(p.view(2, 3))
    return h


@pytest.mark.parametrize("name", TAPS)
def test_arithmetic_with_data(name, x):
    compute, middle = TAPS[name]
    model = with_parameters(compute, p=6)
    found = names(recorded(model, x))
    assert found == ["linear", *middle, "linear"]
    check_kernel(model, x)


def test_an_argument_is_kept_as_it_was_before_it_is_overwritten(x):
    model = with_parameters(lambda self, h: h.mul_(self.p), p=6)
    recording = recorded(model, x)
    linear, product, _ = recording.taps
    before = functional.linear(*linear.args)
    assert torch.equal(product.args[0], before)
    assert product.unchanged


def test_arguments_are_detached(x):
    for tap in recorded(mlp().double(), x).taps:
        for tensor in (*tap.args, *tap.kwargs.values()):
            assert not tensor.requires_grad


# What is not.


def nothing_to_do_with_data(self, h):
    w = torch.nn.functional.normalize(self.w, dim=0) @ self.u
    return h * 2 + 0 * w.detach().sum()


def under_no_grad(self, h):
    with torch.no_grad():
        shift = h @ self.w
    return h + shift


def detached(self, h):
    return h @ self.w.detach() + h


def compared(self, h):
    return h * (h > self.p)


def rounded(self, h):
    """An integer comes out; nothing flows back."""
    return h * torch.bucketize(h.detach(), self.p.sort().values.detach())


@pytest.mark.parametrize(
    ("compute", "shapes"),
    [
        (nothing_to_do_with_data, {"w": (6, 6), "u": (6, 6)}),
        (under_no_grad, {"w": (6, 6)}),
        (detached, {"w": (6, 6)}),
        (compared, {"p": 6}),
        (rounded, {"p": 6}),
    ],
)
def test_calls_from_which_no_gradient_returns(compute, shapes, x):
    model = with_parameters(compute, **shapes)
    recording = recorded(model, x)
    assert names(recording) == ["linear", "linear"]
    assert not bypassing(recording)
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def written_over(self, h):
    w = self.w.repeat(len(h), 1, 1)
    return (h[:, None] @ w.mul_(h[:, :, None])).squeeze(1)


def assigned(self, h):
    w = self.w.repeat(len(h), 1, 1)
    w[:, 0] = h
    return (h[:, None] @ w).squeeze(1)


def through_complex_numbers(self, h):
    return torch.fft.fft(h).mul(torch.complex(self.p, self.q)).real


def of_several_results(self, h):
    return torch.aminmax(h * self.p, dim=1, keepdim=True).max * h


@pytest.mark.parametrize(
    ("compute", "names_in_graph"),
    [
        (written_over, {"w"}),
        (assigned, {"w"}),
        (through_complex_numbers, {"p", "q"}),
    ],
)
def test_what_is_no_tap_stays_in_the_graph(compute, names_in_graph, x):
    shapes = {"w": (6, 6), "p": 6, "q": 6}
    model = with_parameters(compute, **shapes)
    assert names_in_graph <= bypassing(recorded(model, x))
    assert names_in_graph <= plan_ntk(model, x).exact.keys()
    check_kernel(model, x)


def test_cells_of_several_results_stay_in_the_graph():
    model, x = packed_sequences().double(), sequences().double()
    assert bypassing(recorded(model, x)) == {
        f"cells.{name}" for name, _ in model.cells.named_parameters()
    }
    model, x = with_parameters(of_several_results, p=6), vectors().double()
    assert names(recorded(model, x)) == ["linear", "mul", "linear"]
    check_kernel(model, x)


# Weights that are computed from parameters.


DERIVED = {
    "transposed": (lambda self, h: h @ self.w.mT, {"w": (6, 6)}, {"w"}),
    "sliced": (lambda self, h: h @ self.w[:6, 1:], {"w": (8, 7)}, {"w"}),
    "chunked": (lambda self, h: h @ self.w.chunk(2)[1], {"w": (12, 6)}, {"w"}),
    "expanded": (lambda self, h: h + self.p.expand(len(h), 6), {"p": (1, 6)}, {"p"}),
    "squared": (lambda self, h: h @ (self.w**2), {"w": (6, 6)}, {"w"}),
    "of_two": (
        lambda self, h: h @ (self.w * self.p),
        {"w": (6, 6), "p": 6},
        {"w", "p"},
    ),
    "normalized": (
        lambda self, h: h @ functional.normalize(self.w, dim=0),
        {"w": (6, 6)},
        {"w"},
    ),
}


@pytest.mark.parametrize("name", DERIVED)
def test_weights_that_are_computed_from_parameters(name, x):
    compute, shapes, sources = DERIVED[name]
    model = with_parameters(compute, **shapes)
    survey = surveyed_on(model, x)
    assert len(survey.recording.taps) == 3
    ((found, view),) = survey.places[1].sources
    assert set(found) == sources
    assert (view is None) == (name in {"squared", "of_two", "normalized"})
    assert not survey.exact
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_parametrizations(x):
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model = nn.Sequential(
            wrap(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)
        ).double()
        recording = recorded(model.eval(), x)
        assert names(recording) == ["linear", "linear"]
        assert plan_ntk(model, x).coverage == 1.0
        check_kernel(model.eval(), x)


def test_a_token_that_is_copied_for_every_example():
    """`repeat` copies where `expand` does not."""

    def compute(self, x):
        token = self.token.repeat(len(x), 1, 1)
        return self.head(torch.tanh(torch.cat([token, self.stem(x)], 1)).mean(1))

    model = Computed(
        compute,
        token=nn.Parameter(torch.randn(1, 1, 6)),
        stem=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    ).double()
    x = sequences().double()
    check_kernel(model, x)
    assert plan_ntk(model, x).exact.keys() <= {"token"}  # the others do not suffer


# Functions written in Python are opened.


def test_attention_is_opened():
    model, x = attention().double(), sequences().double()
    found = names(recorded(model, x))
    assert "multi_head_attention_forward" not in found
    assert found.count("linear") == 3  # input and output of the attention, head
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_a_transformer_is_opened():
    model, x = transformer().double().eval(), sequences().double()
    found = names(recorded(model, x))
    assert set(found) == {"linear", "layer_norm"}
    assert plan_ntk(model, x).coverage == 1.0


def test_einsum_is_opened(x):
    model = with_parameters(
        lambda self, h: torch.einsum("nd,cd->nc", h, self.w), w=(6, 6)
    )
    assert "einsum" in names(recorded(model, x))[1]
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_known_functions_are_not_opened(x):
    recording = recorded(BY_ID["layer_norm"].build()[0], x)
    assert recording.taps[1].function is functional.layer_norm
    model = convolution(nn.GroupNorm(2, 4)).double()
    recording = recorded(model, images())
    assert recording.taps[1].function is functional.group_norm


# Data that is overwritten after its use.


def overwritten_later(self, h):
    """Allowed: a sum does not need its terms for the backward pass."""
    y = h + self.p
    return torch.tanh(y) + h.mul_(2)


def test_data_that_is_overwritten_after_its_use(x):
    model = with_parameters(overwritten_later, p=6)
    recording = recorded(model, x)
    assert [tap.unchanged for tap in recording.taps] == [True, False, True]
    plan = plan_ntk(model, x)
    reason = "the model cannot be looked into: an input was overwritten after its use"
    assert plan.exact["p"] == reason
    check_kernel(model, x)


def test_a_side_refuses_what_was_overwritten(x):
    model = with_parameters(overwritten_later, p=6)
    survey = surveyed_on(model, x)
    function = ModelFunction(model)
    side = Side(function, function.params, x, survey.places, list(function.params))
    members = {name: found[0] for name, found in survey.members.items()}
    side.use(members["stem.weight"])
    with pytest.raises(ChangedModelError, match="overwritten after its use"):
        side.use(members["p"])


def test_a_model_that_starts_to_overwrite_is_planned_anew(x, caplog):
    def compute(self, h):
        y = h + self.p
        return torch.tanh(y) + (h.mul_(2) if self.overwrite else h * 2)

    model = with_parameters(compute, p=6)
    model.overwrite = False
    plan = plan_ntk(model, x)
    assert plan.coverage == 1.0
    model.overwrite = True
    with caplog.at_level(logging.INFO, "ntk_callbacks"):
        ntk = empirical_ntk(model, x, route=plan)
    assert "planned anew, because an input was overwritten after its use" in caplog.text
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


# Inputs that are no floating point numbers.


def test_a_table_in_front_of_everything():
    """Nothing before the first tap has a gradient; its output has one all the same."""
    model, x = BY_ID["embedding"].build()
    recording = recorded(model, x)
    assert names(recording) == ["embedding", "linear"]
    gradients = gradients_at(recording.taps, recording.outputs.sum())
    assert all(gradient.any() for gradient in gradients)
    assert recording.taps[0].args[0].dtype == torch.long
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_ids_that_no_two_examples_share():
    model = nn.Sequential(nn.Embedding(20, 5), nn.Flatten(), nn.Linear(20, 2)).double()
    x = torch.arange(12).view(3, 4)
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


@pytest.mark.parametrize("ids", [[[0, 1], [1, 2]], [[3, 3], [3, 3]]])
def test_a_table_that_is_indexed(ids):
    model = Computed(
        lambda self, ids: self.head(torch.tanh(self.table[ids]).flatten(1)),
        table=nn.Parameter(torch.randn(4, 5)),
        head=nn.Linear(10, 2),
    ).double()
    x = torch.tensor(ids) - 4  # counted from the end
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_flags_and_masks_beside_the_data():
    def compute(self, x, mask, scale):
        h = torch.tanh(self.stem(x)).masked_fill(mask[:, :, None], 0.0)
        return self.head(h.sum(1)) * (self.gain * scale[:, None])

    model = Computed(
        compute,
        stem=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
        gain=nn.Parameter(torch.randn(2)),
    ).double()
    x = sequences().double(), tokens() > 3, torch.tensor([1, 2, 3])
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


# Where the examples lie.


N, T = 2, 3
LAYOUTS = {
    # name: (from (N, T, 4) to the layout, its batch axis)
    "first": (lambda y: y, BatchAxis(0)),
    "second": (lambda y: y.transpose(0, 1), BatchAxis(1)),
    "last": (lambda y: y.movedim(0, -1), BatchAxis(2)),
    "major": (lambda y: y.flatten(0, 1), BatchAxis(0)),
    "minor": (lambda y: y.transpose(0, 1).flatten(0, 1), BatchAxis(0, minor=True)),
    "major_inside": (lambda y: y.movedim(2, 0).flatten(1), BatchAxis(1)),
    "minor_inside": (
        lambda y: y.permute(2, 1, 0).flatten(1),
        BatchAxis(1, minor=True),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_batch_axis_of_a_layout(name):
    laid_out, axis = LAYOUTS[name]
    y = torch.randn(N, T, 4)
    gradients = []
    for i in range(N):
        own = torch.zeros_like(y)
        own[i] = y[i]
        gradients.append(laid_out(own))
    assert located(gradients) == axis
    tensor = laid_out(y)
    first = axis.first(tensor, N)
    for i in range(N):
        assert torch.equal(
            first[i].flatten().sort().values, y[i].flatten().sort().values
        )
        example = axis.example(tensor, N, i)
        assert torch.equal(example, laid_out(y[i : i + 1]))
    assert first.data_ptr() == tensor.data_ptr()  # a view


def test_no_batch_axis():
    y = torch.randn(N, T, 4)
    assert located([y, y]) is None  # every example everywhere
    assert located([torch.zeros_like(y), y]) is None  # unknown of the first
    own = [torch.zeros(3, 3), torch.zeros(3, 3)]
    own[0][0, 0], own[1][2, 2] = 1.0, 1.0
    assert located(own) is None  # no axis holds two examples
    with pytest.raises(LookupError, match=r"axis 1 of shape \(2, 3, 4\) holds no 2 ex"):
        BatchAxis(1).first(y, N)
    with pytest.raises(LookupError, match="axis 3"):
        BatchAxis(3).first(y, N)


def windows(x):
    """(n, 4, 6) to two windows of each example, `(2·n, 2, 6)`."""
    return x.reshape(len(x) * 2, 2, 6)


AXES = {
    "sequence_first": (
        lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1).flatten(1),
        BatchAxis(1),
    ),
    "windows": (
        lambda self, x: self.layer(windows(x)).reshape(len(x), -1),
        BatchAxis(0),
    ),
    "time_by_time": (
        lambda self, x: (
            self.layer(x.transpose(0, 1).reshape(-1, 6))
            .view(4, len(x), 6)
            .transpose(0, 1)
        ).flatten(1),
        BatchAxis(0, minor=True),
    ),
    "one_axis_more": (
        lambda self, x: self.layer(x[None, :, :, None]).squeeze(0).flatten(1),
        BatchAxis(1),
    ),
}


@pytest.mark.parametrize("name", AXES)
def test_the_batch_axis_inside_a_network(name):
    compute, axis = AXES[name]
    model = Computed(
        lambda self, x: self.head(torch.tanh(compute(self, x))),
        layer=nn.Linear(6, 6),
        head=nn.Linear(24, 2),
    ).double()
    for n in (2, 5):
        x = sequences(n).double()
        survey = surveyed_on(model, x)
        assert [place.axis for place in survey.places] == [axis, BatchAxis(0)]
        assert plan_ntk(model, x).coverage == 1.0
        check_kernel(model, x)


def test_attention_works_sequence_first():
    axes = [
        place.axis for place in surveyed_on(attention().double(), sequences()).places
    ]
    assert BatchAxis(1) in axes


# Nothing is left behind.


def failing(where, when):
    """An output function that raises from some call on, and the calls so far."""
    calls = []

    def output_fn(model, x):
        calls.append(len(x))
        late = len(calls) > when
        if late and where == "before":
            raise ZeroDivisionError("in the model")
        y = model(x)
        if late and where == "after":
            raise ZeroDivisionError("in the model")
        return y

    return output_fn, calls


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_model_that_raises_leaves_no_mode_behind(where, x):
    model = mlp().double()
    output_fn, calls = failing("nowhere", 0)
    empirical_ntk(model, x, output_fn=output_fn)
    assert len(calls) > 10
    for when in {0, 1, *range(2, len(calls), 3), len(calls) - 1}:
        # In the checks, in planning, in the audit, in the kernel itself.
        with pytest.raises(ZeroDivisionError, match="in the model"):
            empirical_ntk(model, x, output_fn=failing(where, when)[0])
        assert not _get_current_function_mode_stack()
        assert torch.is_grad_enabled()
        assert not any(p.grad is not None for p in model.parameters())


def wrong_heads(self, h):
    return functional.multi_head_attention_forward(h, h, h, 6, 7, *[self.w] * 8)


def wrong_shape(self, h):
    return functional.linear(h, self.w[:, :2])


@pytest.mark.parametrize(
    ("compute", "error"),
    [
        (wrong_heads, AssertionError),  # raised inside a function that is opened
        (wrong_shape, RuntimeError),  # raised by torch itself
        (lambda self, h: {}[self], KeyError),
    ],
)
def test_a_recording_that_raises_leaves_no_mode_behind(compute, error, x):
    model = with_parameters(compute, w=(6, 6))
    with pytest.raises(error):
        recorded(model, x)
    assert not _get_current_function_mode_stack()


class Counting(TorchFunctionMode):
    """Somebody else's mode."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_of_someone_else_stays(x):
    model, counting = mlp().double(), Counting()
    expected = empirical_ntk(model, x)
    with counting:
        assert torch.equal(empirical_ntk(model, x), expected)
        assert _get_current_function_mode_stack() == [counting]
    assert counting.calls > 0


def test_nothing_of_a_recording_is_kept_alive(x):
    model = copy.deepcopy(mlp().double())
    recording = recorded(model, x)
    watched = [
        weakref.ref(tensor)
        for tap in recording.taps
        for tensor in (*tap.args, *tap.sources.values())
    ]
    assert all(reference() is not None for reference in watched)
    del recording
    gc.collect()
    assert not any(reference() is not None for reference in watched)


def test_the_parameters_of_the_model_are_not_touched(x):
    model = mlp().double()
    before = {name: (p, p._version) for name, p in model.named_parameters()}
    empirical_ntk(model, x)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert p.requires_grad
        assert p.grad is None
