"""`quietly`: harm to a model is done inside on purpose, and nothing is left outside."""

import copy

import guarded
import torch
from guarded import assert_bits, bits
from networks import resnet
from torch import nn

from ntk_callbacks import empirical_ntk, input_jacobian, quietly

model = guarded.model

# Weights and buffers.


def test_parameters_changed_in_place_are_restored(model):
    before = bits(model)
    with quietly(model), torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert_bits(model, before)


def test_parameters_whose_data_were_replaced_are_restored(model):
    before = bits(model)
    storage = model.head.weight.data_ptr()
    with quietly(model):
        model.head.weight.data = torch.zeros(7, 7)
        model.body[0].weight.data = model.body[0].weight.data.double()
    assert_bits(model, before)
    assert model.head.weight.data_ptr() == storage  # an optimizer sees the same memory


def test_parameters_whose_data_became_a_view_of_themselves_are_restored(model):
    # The memory is the same, its shape and strides are not.
    before = bits(model)
    with quietly(model):
        model.head.weight.data = model.head.weight.data.t()
        model.body[0].weight.data = model.body[0].weight.data.view(-1)
    assert_bits(model, before)
    assert model.head.weight.stride() == (4, 1)


def test_the_parameter_objects_are_the_same_afterwards(model):
    objects = dict(model.named_parameters())
    with quietly(model):
        model.head.weight = nn.Parameter(torch.zeros(4, 4))
        del model.body[0].bias
        model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        model.body.append(nn.Linear(4, 4))
    after = dict(model.named_parameters())
    assert list(after) == list(objects)
    assert all(after[name] is p for name, p in objects.items())


def test_tied_parameters_stay_tied(model):
    with quietly(model):
        model.tied = nn.Parameter(torch.zeros(4, 4))
        assert model.tied is not model.head.weight
    assert model.tied is model.head.weight


def test_a_module_that_was_cast_inside_comes_back(model):
    before = bits(model)
    with quietly(model):
        model.double()
        model.bfloat16()
    assert_bits(model, before)


def test_buffers_and_plain_tensors_are_restored(model):
    before = bits(model)
    seen, plain = model.seen, model.plain
    with quietly(model):
        model.train()(torch.randn(5, 3))  # moves the statistics of BatchNorm
        model.seen += 1
        model.plain.mul_(0)
        model.body[1].running_mean = torch.full((4,), 9.0)
        model.plain = None
    assert_bits(model, before)
    assert model.seen is seen
    assert not seen.any()
    assert model.plain is plain
    assert plain.all()


def test_buffers_of_a_measurement_in_train_mode_are_restored(model):
    before = bits(model)
    # `Odd` draws no random number once dropout is held still.
    empirical_ntk(model, torch.randn(5, 3), mode="train")
    assert_bits(model, before)
    assert model.calls == 0


def test_nan_weights_are_restored_too(model):
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with quietly(model), torch.no_grad():
        model.head.weight.fill_(1.0)
    assert model.head.weight[0, 0].isnan()


# Gradients.


def test_half_accumulated_gradients_are_hidden_and_restored(model):
    model(torch.randn(5, 3)).sum().backward()
    objects = {name: p.grad for name, p in model.named_parameters()}
    values = {n: g.clone() for n, g in objects.items() if g is not None}
    with quietly(model):
        assert all(p.grad is None for p in model.parameters())
        model(torch.randn(5, 3)).sum().backward()
        model.zero_grad()
    for name, p in model.named_parameters():
        assert p.grad is objects[name], name
        if name in values:
            assert torch.equal(p.grad, values[name]), name
    assert len(values) == 5


def test_gradients_that_were_none_are_none(model):
    with quietly(model):
        model(torch.randn(5, 3)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_plain_tensors_are_restored(model):
    model.plain = torch.ones(3, requires_grad=True)
    with quietly(model):
        (model.plain**2).sum().backward()
        model.plain.requires_grad_(False)
    assert model.plain.grad is None
    assert model.plain.requires_grad


def test_requires_grad_is_restored(model):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not all(before.values())
    with quietly(model):
        for p in model.parameters():
            p.requires_grad_(not p.requires_grad)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_graph_that_is_still_held_stays_usable():
    """A measurement between forward and backward changes no gradient by a bit."""
    gradients = []
    for measured in (False, True):
        torch.manual_seed(1)
        model = resnet().train()
        loss = model(torch.randn(4, 3, 5, 5)).square().sum()
        if measured:
            empirical_ntk(model, torch.randn(3, 3, 5, 5), mode="train")
            input_jacobian(model, torch.randn(3, 3, 5, 5))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_graph_survives_harm_that_goes_past_autograd(model):
    x = torch.randn(5, 3)
    model.body[2].p = 0.0
    expected = torch.autograd.grad(model(x).sum(), model.head.weight)[0]
    loss = model(x).sum()
    with quietly(model):
        model.head.weight.data.zero_()
    assert torch.equal(torch.autograd.grad(loss, model.head.weight)[0], expected)


# Flags, attributes, hooks.


def test_training_flags_are_restored_one_by_one(model):
    model.body[1].eval()  # frozen, in a model that is training
    before = [part.training for part in model.modules()]
    for harm in (model.eval, model.train):
        with quietly(model):
            harm()
        assert [part.training for part in model.modules()] == before
    assert len(set(before)) == 2


def test_attributes_are_restored(model):
    before = {k: copy.copy(v) for k, v in vars(model).items() if k[0] != "_"}
    objects = {k: v for k, v in vars(model).items() if k[0] != "_"}
    with quietly(model):
        model.calls += 5
        model.extra = "new"
        model.cache["b"] = 2
        model.cache["a"] = 0
        model.history.clear()
        model.tags.add("y")
        model.recent.extend([3, 4])
        model.head.in_features = 99
        model.head.scratch = torch.ones(2)
        del model.body[2].p
    after = {k: v for k, v in vars(model).items() if k[0] != "_"}
    assert after.keys() == before.keys()
    for name, value in objects.items():
        assert after[name] is value, name
    for name in ("calls", "cache", "history", "tags", "recent"):
        assert after[name] == before[name], name
    assert model.recent.maxlen == 3
    assert model.head.in_features == 4
    assert not hasattr(model.head, "scratch")
    assert model.body[2].p == 0.5


def test_sparse_buffers_do_not_stand_in_the_way():
    model = nn.Linear(3, 3)
    graph = torch.eye(3).to_sparse()
    model.register_buffer("graph", graph)
    with quietly(model):
        model.graph = None
    assert model.graph is graph


def test_hooks_that_were_added_are_gone_and_those_removed_are_back(model):
    calls = []
    kept = model.head.register_forward_hook(lambda *_: calls.append("kept"))
    with quietly(model):
        kept.remove()
        model.head.register_forward_hook(lambda *_: calls.append("added"))
        model.register_forward_pre_hook(lambda *_: calls.append("before"))
        model.body.register_full_backward_hook(lambda *_: calls.append("backward"))
    model(torch.randn(5, 3)).sum().backward()
    assert calls == ["kept"]
