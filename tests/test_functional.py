"""The pure function behind every measurement, and the batches it takes."""

import inspect
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from cases import BY_ID
from networks import Computed, mlp
from torch import nn

from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction, select_parameters
from ntk_callbacks.nested import (
    batch_size,
    examples,
    leaves,
    map_tensors,
    replace_leaves,
)
from ntk_callbacks.outputs import call_model

NAMES = [
    "mlp",
    "resnet",
    "lstm",
    "attention",
    "tied_weights",
    "dict_inputs",
    "tuple_inputs",
]


# The function.


@pytest.mark.parametrize("name", NAMES)
def test_function_is_the_model_at_its_own_parameters(name):
    model, x = BY_ID[name].build()
    function = ModelFunction(model)
    outputs = call_model(model, x)
    # Attention takes another path without gradients: equal up to the last bits.
    assert torch.allclose(function(function.params, x), outputs.flatten(1), 1e-13)
    assert torch.allclose(function({}, x), outputs.flatten(1), 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_function_at_other_parameters(name):
    model, x = BY_ID[name].build()
    function = ModelFunction(model)
    doubled = {key: 2 * value for key, value in function.params.items()}
    outputs = function(doubled, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.allclose(outputs, call_model(model, x).flatten(1), 1e-13)


def test_parameters_that_are_not_given_keep_their_value():
    model, x = BY_ID["mlp"].build()
    function = ModelFunction(model, parameters="weight")
    assert sorted(function.params) == ["0.weight", "2.weight", "4.weight"]
    assert sorted(function.fixed) == ["0.bias", "2.bias", "4.bias"]
    outputs = function({"0.weight": torch.zeros_like(model[0].weight)}, x)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(outputs, model(x))


def test_the_model_is_whole_again_after_a_call():
    model, x = BY_ID["lstm"].build()
    objects = list(model.parameters())
    function = ModelFunction(model)
    function({k: torch.zeros_like(v) for k, v in function.params.items()}, x)
    after = list(model.parameters())
    assert all(a is b for a, b in zip(after, objects, strict=True))
    with pytest.raises(RuntimeError):
        function(function.params, x[..., :2])
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))


def test_buffers_do_not_move():
    model, x = BY_ID["resnet_train"].build()
    before = [buffer.clone() for buffer in model.buffers()]
    ModelFunction(model)({}, x)
    after = list(model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_pseudo_outputs_are_the_normalized_sum():
    model, x = BY_ID["mlp"].build()
    outputs = ModelFunction(model, pseudo=True)({}, x)
    assert torch.allclose(outputs, model(x).sum(1, keepdim=True) / 2**0.5)


def test_inputs_are_moved_to_the_precision_of_the_parameters():
    function = ModelFunction(mlp().bfloat16())
    batch = {
        "x": torch.zeros(2, 5).double(),
        "ids": torch.zeros(2).long(),
        "flag": True,
    }
    prepared = function.prepare(batch)
    assert prepared["x"].dtype == torch.float32
    assert prepared["ids"].dtype == torch.int64
    assert prepared["flag"] is True


def test_inputs_of_inference_mode_are_copied_out_of_it():
    function = ModelFunction(mlp())
    with torch.inference_mode():
        x = torch.zeros(2, 5)
    assert x.is_inference()
    assert not function.prepare(x).is_inference()


# Selecting parameters.


def test_selection_keeps_the_order_of_the_model():
    model = mlp()
    assert select_parameters(model, None) == [
        name for name, _ in model.named_parameters()
    ]
    assert select_parameters(model, r"^[02]\..*bias") == ["0.bias", "2.bias"]
    assert select_parameters(model, lambda name, p: p.numel() == 2) == ["4.bias"]


def test_tied_parameters_are_selected_once():
    model, _ = BY_ID["tied_weights"].build()
    assert select_parameters(model, None).count("embed.weight") == 1
    assert "decoder.weight" not in select_parameters(model, None)


def test_expressions_select_among_what_is_trained():
    model = mlp()
    model[0].requires_grad_(False)
    assert "0.weight" not in select_parameters(model, "weight")
    assert "0.weight" in select_parameters(model, lambda name, p: True)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("[", r"^parameters='\[' is no regular expression: unterminated character set"),
        (["w"], r"^parameters=\['w'\] .*expected a text, not a list"),
        ([], r"^parameters=\[\] .*expected a text, not a list"),
        (0, r"^parameters=0 .*expected a text, not a int"),
    ],
)
def test_what_selects_no_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(select_parameters)(mlp(), parameters)


def test_nothing_selected():
    with pytest.raises(ValueError, match=r"parameters='norm'.*0\.weight, 0\.bias"):
        select_parameters(mlp(), "norm")


# Calling a model.


def test_tuples_are_arguments_and_mappings_keywords():
    model = Computed(lambda self, a, b=0: a - b)
    a, b = torch.ones(2), torch.tensor([3.0, 4.0])
    assert torch.equal(call_model(model, (a, b)), a - b)
    assert torch.equal(call_model(model, [a, b]), a - b)
    assert torch.equal(call_model(model, {"b": b, "a": a}), a - b)
    assert torch.equal(call_model(model, a), a)


def test_hooks_of_the_model_run():
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(3, 2)
    assert torch.equal(
        call_model(model, x), 2 * nn.functional.linear(x, *model.parameters())
    )


@dataclass(slots=True)
class SlottedOutput:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    unset: torch.Tensor = field(init=False)


@dataclass
class OpenOutput:
    scores: torch.Tensor
    loss: None = None


class MappingOutput(OrderedDict):
    """As in transformers: a mapping that leaves out what is None."""


@pytest.mark.parametrize(
    "wrap",
    [
        SlottedOutput,
        lambda y: SlottedOutput(y, y**2),
        OpenOutput,
        lambda y: MappingOutput(logits=y, hidden=y**2),
    ],
    ids=["slots", "slots_logits", "dataclass", "mapping"],
)
def test_records_stand_for_their_tensor(wrap):
    model, x = nn.Linear(2, 2), torch.randn(3, 2)
    wrapped = Computed(lambda self, x: wrap(self.body(x)), body=model)
    assert torch.equal(call_model(wrapped, x), model(x))


def test_a_record_of_many_tensors_is_told_by_its_fields():
    @dataclass(slots=True)
    class Two:
        a: torch.Tensor
        b: torch.Tensor

    model = Computed(lambda self, x: Two(x, x))
    with pytest.raises(
        UnsupportedModelError, match=r"Two with 2 tensors \(a: \(3,\), b"
    ):
        call_model(model, torch.zeros(3))


class OfOneBatch(nn.Linear):
    def forward(self, batch):
        return super().forward(batch["x"])


@pytest.mark.parametrize(
    ("x", "given"),
    [
        ({"x": torch.ones(2, 3), "z": torch.ones(2)}, "the keywords x, z"),
        ((torch.ones(2, 3), torch.ones(2)), "2 inputs"),
    ],
)
def test_inputs_that_forward_does_not_take(x, given):
    with pytest.raises(UnsupportedModelError, match=rf"with {given}.*output_fn"):
        call_model(OfOneBatch(3, 1), x)
    model = ModelFunction(
        OfOneBatch(3, 1), output_fn=lambda model, x: model({"x": x["x"]})
    )
    assert model({}, {"x": torch.ones(2, 3)}).shape == (2, 1)


def test_an_output_fn_that_does_not_return_one_tensor():
    def of(outputs):
        model = ModelFunction(nn.Linear(3, 1), output_fn=lambda model, x: outputs(x))
        return model({}, torch.ones(2, 3))

    with pytest.raises(
        UnsupportedModelError, match=r"output_fn returned a tuple with 2 tensors \(0: "
    ):
        of(lambda x: (x, x))
    with pytest.raises(UnsupportedModelError, match="output_fn returned a NoneType"):
        of(lambda x: None)
    assert of(lambda x: {"value": x}).shape == (2, 3)


def test_type_errors_of_the_model_itself_are_told_as_they_are():
    model = Computed(lambda self, x: self.layer(x) + "no", layer=nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"unsupported operand|must be Tensor"):
        call_model(model, torch.ones(2, 3))


def test_a_model_without_forward():
    with pytest.raises(UnsupportedModelError, match="output_fn=lambda"):
        call_model(nn.ModuleList([nn.Linear(2, 2)]), torch.zeros(1, 2))


# Batches.

Pair = namedtuple("Pair", "first second")
NESTED = {
    "a": torch.arange(3),
    "b": (Pair(torch.arange(3) + 10, None), [torch.zeros(3)]),
}


def test_leaves_come_in_the_order_of_the_structure():
    assert [leaf[0].item() for leaf in leaves(NESTED)] == [0, 10, 0]


def test_map_keeps_the_structure_and_what_is_no_tensor():
    mapped = map_tensors(lambda tensor: tensor + 1, NESTED)
    assert mapped["b"][0].second is None
    assert isinstance(mapped["b"][0], Pair)
    assert isinstance(mapped["b"][1], list)
    assert [leaf[0].item() for leaf in leaves(mapped)] == [1, 11, 1]
    assert NESTED["a"][0] == 0


def test_leaves_can_be_replaced():
    fresh = [leaf + 5 for leaf in leaves(NESTED)]
    replaced = replace_leaves(NESTED, fresh)
    assert all(a is b for a, b in zip(leaves(replaced), fresh, strict=True))


def test_examples_are_cut_from_every_tensor():
    part = examples(NESTED, 1, 3)
    assert [leaf.tolist() for leaf in leaves(part)] == [[1, 2], [11, 12], [0, 0]]


def test_batch_size():
    assert batch_size(NESTED) == 3
    assert batch_size(torch.zeros(0, 2)) == 0
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        batch_size((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match="same leading dimension"):
        batch_size([torch.tensor(1.0)])
    with pytest.raises(ValueError, match="list without any"):
        batch_size([])
