"""Nothing of a recording is left behind."""

import copy
import gc
import weakref

import pytest
import recordings
import torch
from networks import mlp
from recordings import recorded, with_parameters
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ntk_callbacks import empirical_ntk

x = recordings.x


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
