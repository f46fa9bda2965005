"""`quietly`: harm is done inside on purpose, and nothing of it is left outside."""

# ruff: noqa: NPY002 (the legacy generator of NumPy is what data sets draw from)
import contextlib
import copy
import random
from collections import deque

import numpy.random
import pytest
import torch
from cases import BY_ID, resnet
from torch import nn

from ntk_callbacks import empirical_ntk, input_jacobian, quietly


class Odd(nn.Module):
    """Holds one of everything a module can hold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 4, bias=False)
        self.tied = self.head.weight
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.plain = torch.ones(3)
        self.calls = 0
        self.cache = {"a": 1}
        self.history = [1, 2]
        self.tags = {"x"}
        self.recent = deque([1, 2], maxlen=3)
        self.frozen_bias = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x))


@pytest.fixture
def model():
    return Odd().train()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bits(model, before):
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype, name


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


# Random numbers and process-wide settings.


def test_generators_of_python_numpy_and_torch_are_restored(model):
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with quietly(model):
        draw()
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        model.train()(torch.randn(5, 3))  # dropout draws
    assert draw() == expected


@pytest.fixture
def settings():
    """Process-wide settings; put back in case a test finds a leak."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = False
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("settings")
def test_default_dtype_is_restored(model):
    torch.set_default_dtype(torch.float64)
    with quietly(model):
        torch.set_default_dtype(torch.float32)
    assert torch.get_default_dtype() == torch.float64


@pytest.mark.usefixtures("settings")
def test_deterministic_flags_are_restored(model):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    with quietly(model):
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision_is_full_inside_and_restored(model, precision):
    torch.set_float32_matmul_precision(precision)
    own = torch.backends.cuda.matmul.allow_tf32
    with quietly(model):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("medium")
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == own


@pytest.mark.usefixtures("settings")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9"
)
def test_precision_of_single_operators_is_restored(model):
    backends = torch.backends
    chosen = {
        backends.cuda.matmul: "ieee",
        backends.cudnn.conv: "tf32",
        backends.cudnn.rnn: "ieee",
        backends.mkldnn.matmul: "bf16",
        backends.mkldnn.conv: "none",
    }
    before = {operator: operator.fp32_precision for operator in chosen}
    own = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        for operator, precision in chosen.items():
            operator.fp32_precision = precision
        with quietly(model):
            inside = {operator.fp32_precision for operator in chosen}
        after = {operator: operator.fp32_precision for operator in chosen}
    finally:
        for operator, precision in before.items():
            operator.fp32_precision = precision
    assert inside == {"ieee"}
    assert after == chosen
    # The older switches, which nobody can read while operators differ.
    assert (backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == own


def test_gradients_are_enabled_and_autocast_is_off_inside(model):
    with torch.no_grad(), quietly(model):
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        with quietly(model):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            model(torch.randn(5, 3)).sum().backward()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with quietly(model):
            assert not torch.is_autocast_enabled("cpu")
            assert model(torch.randn(5, 3)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("check_nan", [True, False])
def test_anomaly_detection_is_off_inside_and_restored(model, check_nan):
    with torch.autograd.set_detect_anomaly(True, check_nan=check_nan):
        with quietly(model):
            assert not torch.is_anomaly_enabled()
        assert torch.is_anomaly_enabled()
        assert torch.is_anomaly_check_nan_enabled() is check_nan
    with quietly(model):
        torch.autograd.set_detect_anomaly(True)
    assert not torch.is_anomaly_enabled()


def test_gradient_mode_is_restored_whatever_happens_inside(model):
    with quietly(model):
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()


# Exceptions and nesting.


def everything(model):
    """All the harm of the tests above."""
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        model.seen += 1
    model.head.weight.data = torch.zeros(1)
    model.calls = 99
    model.head.register_forward_hook(lambda *_: None)
    torch.rand(3)
    random.random()
    numpy.random.rand()


@pytest.mark.parametrize(
    "context",
    [contextlib.nullcontext, torch.no_grad, torch.inference_mode],
    ids=["plain", "no_grad", "inference_mode"],
)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_restored_after_an_exception_and_in_every_gradient_mode(model, context, error):
    before, state = bits(model), torch.get_rng_state()
    python, legacy = random.getstate(), numpy.random.get_state()[1].copy()
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, context(), quietly(model):
        everything(model)
        if error:
            raise error
    assert_bits(model, before)
    assert all(part.training for part in model.modules())
    assert model.calls == 0
    assert not model.head._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert (numpy.random.get_state()[1] == legacy).all()
    assert torch.is_grad_enabled()


def test_nested(model):
    before = bits(model)
    with quietly(model):
        with quietly(model):
            everything(model)
        assert_bits(model, before)
        everything(model)
    assert_bits(model, before)
    assert model.training


def test_only_a_part_of_a_model(model):
    before = bits(model.head)
    with quietly(model.head), torch.no_grad():
        model.head.weight.zero_()
        model.body[0].weight.zero_()
    assert_bits(model.head, before)
    assert not model.body[0].weight.any()  # not asked for


def test_a_model_without_anything():
    with quietly(nn.Identity()):
        pass


# torch.compile looks at the `.grad` of what enters the compiled part.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "name", ["spectral_norm", "weight_norm", "lstm", "tied_weights", "compiled_eager"]
)
def test_modules_with_state_of_their_own(name):
    model, x = BY_ID[name].build()
    model.train()
    before = bits(model)
    expected = model(x)
    after_one_call = bits(model)
    model.load_state_dict(before)
    with quietly(model):
        model.eval()
        for p in model.parameters():
            p.data = p.data * 2
        model(x)
    assert_bits(model, before)
    assert torch.equal(model(x), expected)
    assert_bits(model, after_one_call)


def test_optimizers_go_on_as_if_nothing_had_happened():
    """Two runs, one measured after every step: equal to the last bit."""
    final = []
    for measured in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(8, 2),
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(5):
            x = torch.randn(6, 4)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if measured:
                empirical_ntk(model, x[:3], mode="train", outputs="trace")
                input_jacobian(model, x[:3])
            optimizer.step()
        final.append(bits(model) | {"draw": torch.rand(3)})
    for name, value in final[0].items():
        assert torch.equal(value, final[1][name]), name


@pytest.mark.parametrize(("layer", "enabled"), [(nn.GRU, False), (nn.Linear, True)])
def test_recurrent_layers_are_measured_without_cudnn(layer, enabled):
    """Promise: cuDNN differentiates them in training mode only, so it is set aside."""
    seen = set()

    def output_fn(model, x):
        seen.add(torch.backends.cudnn.enabled)
        result = model(x)
        return result[0] if isinstance(result, tuple) else result

    x = torch.randn(2, 3, 4)
    empirical_ntk(layer(4, 2), x, output_fn=output_fn, outputs="trace")
    assert seen == {enabled}
    assert torch.backends.cudnn.enabled
