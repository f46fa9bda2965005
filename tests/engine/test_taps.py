"""What is recorded of a forward pass, and what stays in the graph."""

import pytest
import recordings
import torch
from cases import BY_ID
from networks import (
    attention,
    convolution,
    images,
    mlp,
    packed_sequences,
    sequences,
    transformer,
    vectors,
)
from recordings import bypassing, check_kernel, names, recorded, with_parameters
from torch import nn
from torch.nn import functional

from ntk_callbacks import plan_ntk

x = recordings.x

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
