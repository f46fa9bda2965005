"""Models that cannot be measured: each refusal says why and what to do."""

import pytest
import torch
from networks import Computed, mlp, resnet
from odd_networks import returning
from oracles import ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import TangentOperator, as_matrix, empirical_ntk
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.errors import UnsupportedModelError


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_that_is_left_on(x, mode):
    model = Computed(
        lambda self, x: nn.functional.dropout(self.body(x), 0.5), body=mlp()
    ).double()
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        empirical_ntk(model, x, mode=mode)


def test_dropout_that_follows_the_mode_is_fine_in_eval_only(x):
    model = Computed(
        lambda self, x: nn.functional.dropout(self.body(x), 0.5, self.training),
        body=mlp(),
    ).double()
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model.body, x)) < 1e-10
    with pytest.raises(UnsupportedModelError, match='mode="eval"'):
        empirical_ntk(model, x, mode="train")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(2), "lazy"),
        (nn.Linear(5, 2, dtype=torch.complex64), "complex"),
        (returning(lambda y: (y, y)), "2 tensors"),
        (returning(lambda y: {"a": y, "b": y}), r"a: \(4, 2\), b: \(4, 2\)"),
        (returning(lambda y: None), "0 tensors"),
        (returning(lambda y: y.argmax(1)), "int64"),
        (returning(lambda y: torch.complex(y, y)), "complex"),
        (returning(lambda y: y.mT), r"shape \(2, 4\) for 4 examples"),
        (returning(lambda y: y.sum()), r"shape \(\) for 4 examples"),
        (nn.ModuleDict({"body": nn.Linear(5, 2)}), "does not define `forward`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_measured(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        empirical_ntk(model, torch.randn(4, 5))


class Caching(nn.Module):
    """Doubles its weight once and for all, as models do that are made for inference."""

    def __init__(self, kept):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 5)), nn.Linear(6, 2)
        self.kept, self.cache, self.doubled = kept, {}, None

    def forward(self, x):
        if self.kept == "in_a_dict":
            weight = self.cache.setdefault("weight", 2 * self.weight)
        elif self.doubled is None:
            weight = self.doubled = 2 * self.weight
        else:
            weight = self.doubled
        return self.head(torch.tanh(x @ weight.t()))


@pytest.mark.parametrize("kept", ["in_a_dict", "as_an_attribute"])
@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_a_weight_that_is_computed_once_and_for_all(kept, route, x):
    model = Caching(kept).double()
    assert (
        relative_error(empirical_ntk(model, x, route=route), ntk_by_loop(model, x))
        < 1e-10
    )
    assert model.doubled is None
    assert not model.cache
    u = torch.eye(2 * len(x), dtype=torch.float64)
    products = TangentOperator(model, x).ntk_vp(u)
    expected = as_matrix(ntk_by_loop(model, x))
    assert relative_error(products, expected) < 1e-10


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modules_of_the_compiler_of_torch_jit():
    whole = torch.jit.script(nn.Linear(5, 2))
    inside = nn.Sequential(nn.Linear(5, 5), torch.jit.script(nn.Linear(5, 2)))
    for model, name in ((whole, "RecursiveScriptModule"), (inside, "1")):
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is compiled by"):
            empirical_ntk(model, torch.randn(4, 5))
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is compiled by"):
            TangentOperator(model, torch.randn(4, 5))


def test_a_program_whose_mode_is_fixed():
    class Exported(nn.Linear):
        """As `torch.export` makes them; exporting takes seconds."""

        def eval(self):
            raise NotImplementedError("Calling eval() is not supported yet.")

    with pytest.raises(UnsupportedModelError, match="the module it was made from"):
        empirical_ntk(Exported(5, 2), torch.randn(4, 5))


def test_sparse_parameters(x):
    model = Computed(
        lambda self, x: torch.sparse.mm(self.w, x.t()).t(),
        w=nn.Parameter(torch.eye(5).to_sparse()),
    )
    with pytest.raises(UnsupportedModelError, match="'w' is sparse"):
        empirical_ntk(model, x)


def test_vmap_refuses_coupled_examples():
    model, x = resnet().double(), torch.randn(3, 3, 5, 5, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="depends on the others"):
        empirical_ntk(model, x, mode="train", route="vmap")


def test_a_weight_that_is_used_behind_the_modules_back_is_not_missed(x):
    """A list of weights is no part of the module, so swapping them in does not help."""
    model = Computed(
        lambda self, x: x @ self.captured[0],
        weight=nn.Parameter(torch.randn(5, 2, dtype=x.dtype)),
    )
    model.captured = [model.weight]
    with pytest.raises(UnsupportedModelError, match="weight"):
        empirical_ntk(model, x)
