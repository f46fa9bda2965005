"""Arguments that make no sense: each refusal says what is wrong and what to do."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.engine.arguments import check_selection, parameter_groups
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.errors import UnsupportedModelError


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
