"""The kernel's first-order change against finite differences and an exact example."""

import copy
import inspect

import pytest
import torch
from cases import BY_ID
from networks import Computed
from oracles import call, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.dynamics import kernel_change, predicted_step
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError

SMOOTH = [
    *("mlp", "prelu", "layer_norm", "batch_norm", "resnet", "gru", "lstm"),
    *("attention", "attention_cross", "embedding", "tied_weights", "called_twice"),
    *("used_directly", "bare_parameters", "parameter_list", "checkpoint"),
    *("weight_norm", "tuple_inputs", "dict_inputs", "dict_outputs"),
    *("resnet_train", "batch_norm_frozen_train", "branching"),
    *("derivative_outputs", "plain_derivative_outputs", "old_style_function"),
]


def direction(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator).double()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def moved(model, step, size):
    model = copy.deepcopy(model)
    for name, change in step.items():
        model.get_parameter(name).data += size * change
    return model


def by_differences(kernel, size=1e-5):
    """Central differences of fourth order of a function of ε at 0."""
    near, far = kernel(size) - kernel(-size), kernel(2 * size) - kernel(-2 * size)
    return (8 * near - far) / (12 * size)


@pytest.mark.parametrize("name", SMOOTH)
def test_change_is_that_of_finite_differences(name):
    case = BY_ID[name]
    model, x = case.build()
    step = direction(model)
    expected = by_differences(
        lambda size: ntk_by_loop(moved(model, step, size), x, output_fn=case.output_fn)
    )
    output_fn = None if case.output_fn is call else case.output_fn
    found = kernel_change(model, step, x, mode=case.mode, output_fn=output_fn)
    assert relative_error(found, expected) < 1e-6
    assert torch.equal(found, found.permute(1, 0, 3, 2))
    assert expected.norm() > 1e-2


def test_cross_kernels_contractions_scaling_and_selection():
    model, x = BY_ID["mlp"].build()
    new = torch.randn(4, 5, dtype=torch.float64)
    step = direction(model)
    scaling = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    scaling["0.bias"] = 2.0
    full = kernel_change(model, step, new, x, scaling=scaling)
    expected = by_differences(
        lambda size: ntk_by_loop(moved(model, step, size), new, x, scaling=scaling)
    )
    assert relative_error(full, expected) < 1e-6
    diagonal = full.diagonal(dim1=2, dim2=3)
    found = kernel_change(model, step, new, x, scaling=scaling, outputs="diagonal")
    assert torch.allclose(found, diagonal, rtol=0, atol=1e-12)
    found = kernel_change(model, step, new, x, scaling=scaling, outputs="trace")
    assert torch.allclose(found, diagonal.mean(2), rtol=0, atol=1e-12)

    # The kernel of one layer, while another one moves.
    step = {"2.weight": step["2.weight"]}
    found = kernel_change(model, step, x, parameters=r"^0\.")
    expected = by_differences(
        lambda size: ntk_by_loop(
            moved(model, step, size), x, names=["0.weight", "0.bias"]
        )
    )
    assert relative_error(found, expected) < 1e-6


def test_linear_in_the_step_and_zero_for_linear_models():
    model, x = BY_ID["attention"].build()
    one, two = direction(model, 1), direction(model, 2)
    both = {name: 2 * one[name] - two[name] for name in one}
    expected = 2 * kernel_change(model, one, x) - kernel_change(model, two, x)
    assert torch.allclose(kernel_change(model, both, x), expected, rtol=0, atol=1e-10)
    model, x = BY_ID["linear"].build()
    assert not kernel_change(model, direction(model), x).any()


class Product(nn.Module):
    """f = u·v/√n of one example: λ = (|u|² + |v|²)/n, and λ² − 4 f²/n is conserved."""

    def __init__(self, n):
        super().__init__()
        self.u = nn.Parameter(torch.randn(n, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(n, dtype=torch.float64))

    def forward(self, x):
        return (self.u @ self.v / len(self.u) ** 0.5) * x


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_the_exact_drift_of_a_product_of_two_vectors(n):
    """One step: λ' = λ − 4 η r f/n + η² r² λ/n, whose middle term is the change."""
    model, x, y, rate = Product(n), torch.ones(1, 1, dtype=torch.float64), 2.0, 0.1
    f = model(x).item()
    sizes = (model.u**2).sum() + (model.v**2).sum()
    before, r = (sizes / n).item(), f - y
    assert empirical_ntk(model, x).item() == pytest.approx(before, abs=1e-12)
    ((model(x) - y) ** 2).sum().div(2).backward()
    sgd = torch.optim.SGD(model.parameters(), rate)
    change = kernel_change(model, predicted_step(sgd, model), x)
    assert change.item() == pytest.approx(-4 * rate * r * f / n, abs=1e-12)
    sgd.step()
    after = before - 4 * rate * r * f / n + rate**2 * r**2 * before / n
    assert empirical_ntk(model, x).item() == pytest.approx(after, abs=1e-12)
    stepped = f - rate * before * r + rate**2 * r**2 * f / n
    assert model(x).item() == pytest.approx(stepped, abs=1e-12)


def test_gradient_flow_of_a_product_conserves_what_it_should():
    """λ∞ = √(λ₀² + 4 (y² − f₀²)/n), here by small steps."""
    model, x, y = Product(10), torch.ones(1, 1, dtype=torch.float64), 2.0
    f, before = model(x).item(), empirical_ntk(model, x).item()
    sgd = torch.optim.SGD(model.parameters(), 0.002 / before)
    for _ in range(6000):
        sgd.zero_grad()
        ((model(x) - y) ** 2).sum().div(2).backward()
        sgd.step()
    total = empirical_ntk(model, x).item()
    expected = (before**2 + 4 * (y**2 - f**2) / 10) ** 0.5
    assert model(x).item() == pytest.approx(y, abs=1e-4)
    assert total == pytest.approx(expected, rel=1e-3)


def test_small_budgets_give_the_same_numbers():
    model, x = BY_ID["mlp"].build()
    step = direction(model)
    expected = kernel_change(model, step, x)
    found = kernel_change(model, step, x, memory_budget="60kB")
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(MemoryBudgetError, match="at least"):
        kernel_change(model, step, x, memory_budget=100)


def test_the_model_stays_as_it_was():
    model, x = BY_ID["resnet_train"].build()
    state = copy.deepcopy(model.state_dict())
    kernel_change(model, direction(model), x, mode="train")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_bad_input_is_refused():
    model, x = BY_ID["frozen_layer"].build()
    with pytest.raises(ValueError, match=r"no parameter that this Sequential trains"):
        kernel_change(model, {"2.weight": torch.zeros(6, 6).double()}, x)
    with pytest.raises(ValueError, match=r"shape \(2,\); expected \(6, 5\)"):
        kernel_change(model, {"0.weight": torch.zeros(2).double()}, x)
    with pytest.raises(ValueError, match="the step is empty"):
        kernel_change(model, {}, x)
    with pytest.raises(ValueError, match="outputs='pseudo'"):
        inspect.unwrap(kernel_change)(model, direction(model), x, outputs="pseudo")
    noisy = Computed(
        lambda self, x: nn.functional.dropout(self.layer(x)), layer=nn.Linear(5, 2)
    ).double()
    with pytest.raises(UnsupportedModelError, match="random"):
        kernel_change(noisy, direction(noisy), x)
    model, x = BY_ID["checkpoint_reentrant"].build()
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        kernel_change(model, direction(model), x)


def test_errors_of_the_model_itself_are_told_as_they_are():
    """They have nothing to do with second derivatives."""
    net = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        kernel_change(net, {"weight": torch.ones(2, 3)}, torch.randn(4, 5))
    assert "differentiated twice" not in str(caught.value)
