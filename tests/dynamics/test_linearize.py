"""The linearized twin against the Jacobian by the loop, closed forms and training."""

import copy
import inspect
import io

import pytest
import torch
from cases import BY_ID, CASES
from feature_models import FeatureModel, features
from networks import Computed, mlp, settled, vectors
from oracles import call, each, input_jacobian_by_loop, jacobian_by_loop
from torch import nn

from ntk_callbacks import TangentOperator, empirical_ntk, input_jacobian
from ntk_callbacks.dynamics import gradient_descent, linearize
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.layout import as_matrix

LINEARIZED = [case for case in CASES if case.id != "checkpoint_reentrant"]


def displaced(twin, size=0.1):
    """Moves the trained parameters; returns by how much."""
    steps = {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            steps[name] = size * torch.randn_like(parameter)
            parameter.data += steps[name]
    return steps


def times(rows, vectors):
    """Σ over parameters of J·v, `(n, c)`."""
    return sum(
        (rows[name] * v).reshape(*rows[name].shape[:2], -1).sum(2)
        for name, v in vectors.items()
    )


def pulled(row, weights):
    """Jᵀu of one parameter."""
    weights = weights.reshape(*weights.shape, *[1] * (row.ndim - 2))
    return (row * weights).sum((0, 1))


# torch.compile looks at the `.grad` of what enters the compiled part: the oracle's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", LINEARIZED, ids=lambda case: case.id)
def test_every_network_is_expanded_as_the_loop_says(case):
    model, x = case.build()
    reference = copy.deepcopy(model)
    output_fn = None if case.output_fn is call else case.output_fn
    twin = linearize(model, output_fn=output_fn, mode=case.mode)
    assert [*dict(twin.named_parameters())] == [*dict(model.named_parameters())]
    jacobian = jacobian_by_loop(reference, x, case.output_fn)
    f0 = case.output_fn(copy.deepcopy(reference), each(torch.clone, x)).detach()

    steps = displaced(twin)
    outputs = call(twin, each(torch.clone, x))
    assert outputs.shape == f0.shape
    expected = f0.reshape(len(f0), -1) + times(jacobian, steps)
    assert torch.allclose(outputs.reshape_as(expected), expected, rtol=0, atol=1e-10)

    weights = torch.randn_like(expected)
    (outputs * weights.reshape_as(outputs)).sum().backward()
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        gradient = pulled(jacobian[name], weights)
        if parameter.grad is None:  # no path, as in the model itself
            assert not gradient.any()
        else:
            found = parameter.grad.to_dense()
            assert torch.allclose(found, gradient, rtol=0, atol=1e-10)


def test_a_model_that_is_linear_in_its_parameters_is_its_own_twin():
    model = FeatureModel(30)
    x = features(5, 2, 30)
    twin = linearize(model)
    step = displaced(twin, 10.0)
    model.theta.data += step["theta"]
    assert torch.allclose(twin(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)]
)
def test_sgd_on_the_twin_follows_the_closed_form(momentum, nesterov):
    model, x = BY_ID["mlp"].build()
    new = vectors(4).double()
    y = torch.randn(3, 2, dtype=torch.float64)
    twin = linearize(model)
    ntk, cross = empirical_ntk(model, x), empirical_ntk(model, new, x)
    rate = 0.5 / torch.linalg.eigvalsh(as_matrix(ntk))[-1].item()
    expected = gradient_descent(
        ntk,
        model(x).detach(),
        y,
        learning_rate=rate,
        steps=[100],
        momentum=momentum,
        nesterov=nesterov,
        ntk_test=cross,
        f0_test=model(new).detach(),
    )
    sgd = torch.optim.SGD(twin.parameters(), rate, momentum=momentum, nesterov=nesterov)
    for _ in range(100):
        sgd.zero_grad()
        ((twin(x) - y) ** 2).sum().div(2).backward()
        sgd.step()
    assert torch.allclose(twin(x), expected.train[0], rtol=0, atol=1e-10)
    assert torch.allclose(twin(new), expected.test[0], rtol=0, atol=1e-10)
    assert (twin(x) - model(x)).abs().max() > 0.1  # it went somewhere


def test_adam_on_the_twin_is_adam_on_the_features():
    """Adam as Kingma and Ba write it, on f = f₀ + Φ v with the rows Φ of the loop."""
    model, x = BY_ID["cnn"].build()
    y = torch.randn(3, 2, dtype=torch.float64)
    rows = jacobian_by_loop(model, x)
    phi = torch.cat([rows[name].flatten(2) for name in rows], 2).flatten(0, 1)
    f0 = model(x).detach().flatten()
    v = torch.zeros(phi.shape[1], dtype=torch.float64)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    twin = linearize(model)
    adam = torch.optim.Adam(twin.parameters(), 0.01, betas=(0.8, 0.95), eps=1e-6)
    for step in range(1, 21):
        adam.zero_grad()
        ((twin(x) - y) ** 2).sum().div(2).backward()
        adam.step()
        gradient = phi.T @ (f0 + phi @ v - y.flatten())
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        size = (second / (1 - 0.95**step)).sqrt() + 1e-6
        v = v - 0.01 * first / (1 - 0.8**step) / size
    assert torch.allclose(twin(x).flatten(), f0 + phi @ v, rtol=0, atol=1e-10)


def test_closures_and_groups_of_optimizers_work():
    model, x = BY_ID["mlp"].build()
    y = torch.randn(3, 2, dtype=torch.float64)
    twin = linearize(model)
    lbfgs = torch.optim.LBFGS(twin.parameters(), max_iter=200, tolerance_grad=1e-12)

    def closure():
        lbfgs.zero_grad()
        loss = ((twin(x) - y) ** 2).sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert torch.allclose(twin(x), y, rtol=0, atol=1e-5)  # as many parameters as needed

    biases = [p for name, p in twin.named_parameters() if name.endswith("bias")]
    before = copy.deepcopy(twin.state_dict())
    sgd = torch.optim.SGD([{"params": biases, "lr": 0.1}], lr=1.0)
    (twin(x) ** 2).sum().backward()
    sgd.step()
    for name, tensor in twin.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == (name.endswith("bias") and "linearization" not in name)


@pytest.mark.parametrize(
    "name", ["mlp", "gru", "attention", "resnet_train", "tied_weights", "dict_inputs"]
)
def test_the_kernel_of_a_twin_never_moves(name):
    case = BY_ID[name]
    model, x = case.build()
    twin = linearize(model, mode=case.mode)
    displaced(twin, 1.0)
    expected = empirical_ntk(model, x, mode=case.mode)
    found = empirical_ntk(twin, x, mode=case.mode)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    # J·v of the twin is the derivative of its own gradient: differentiated twice.
    operator = TangentOperator(twin, x, mode=case.mode)
    v = torch.randn(operator.shape[1], dtype=torch.float64)
    expected = TangentOperator(model, x, mode=case.mode).jvp(v)
    assert torch.allclose(operator.jvp(v), expected, rtol=0, atol=1e-10)


def test_second_derivatives_by_the_parameters_are_those_of_the_loss_alone():
    model, x = BY_ID["attention"].build()
    twin = linearize(model)
    displaced(twin)
    bias = twin.get_parameter("head.bias")
    weight = twin.get_parameter("attention.in_proj_weight")
    (gradient,) = torch.autograd.grad((twin(x) ** 4).sum(), bias, create_graph=True)
    (found,) = torch.autograd.grad(gradient[0], weight)
    rows = jacobian_by_loop(model, x)
    curvature = 12 * twin(x).detach() ** 2 * rows["head.bias"][..., 0]
    expected = pulled(rows["attention.in_proj_weight"], curvature)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "layer_norm", "resnet_train", "attention"])
def test_gradients_by_the_inputs_are_those_of_finite_differences(name):
    """Layer normalization too, whose third derivatives torch gets wrong."""
    case = BY_ID[name]
    model, x = case.build()
    twin = linearize(model, mode=case.mode)
    displaced(twin)
    weights = torch.randn(twin(x).shape, dtype=torch.float64)
    source = x.clone().requires_grad_()
    (twin(source) * weights).sum().backward()
    direction = torch.randn_like(x)

    def at(size):
        return (twin(x + size * direction) * weights).sum().item()

    slope = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 12e-4
    found = (source.grad * direction).sum().item()
    assert found == pytest.approx(slope, rel=1e-8)
    assert twin(source).requires_grad


def test_the_input_jacobian_of_a_twin_at_its_start_is_that_of_the_model():
    model, x = BY_ID["mlp"].build()
    twin = linearize(model)
    expected = input_jacobian_by_loop(model, x)
    assert torch.allclose(input_jacobian(twin, x), expected, rtol=0, atol=1e-10)
    displaced(twin)
    expected = input_jacobian_by_loop(twin, x)
    assert torch.allclose(input_jacobian(twin, x), expected, rtol=0, atol=1e-10)


def test_a_model_stays_as_it_was():
    """Bit by bit, and so do the generators; the twin moves without the model."""
    case = BY_ID["resnet_train"]
    model, x = case.build()
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    rng = torch.get_rng_state()
    twin = linearize(model, mode="train")
    twin(x).sum().backward()
    twin.eval()
    with torch.no_grad():
        twin(x)
    displaced_by_nothing = torch.get_rng_state()
    assert torch.equal(rng, displaced_by_nothing)
    displaced(twin)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_and_the_mode_of_a_twin_are_fixed():
    torch.manual_seed(0)
    model = settled(
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh())
    ).double()
    x = vectors(4).double()
    evaluated, batchwise = linearize(model.train()), linearize(model, mode="train")
    buffers = copy.deepcopy(dict(batchwise.named_buffers()))
    for twin in (evaluated, batchwise):
        outputs = [twin.train()(x), twin.eval()(x), twin(x)]
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    for name, buffer in batchwise.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert torch.allclose(evaluated(x), model.eval()(x), rtol=0, atol=1e-14)
    model[1].train()
    assert torch.allclose(batchwise(x), model(x), rtol=0, atol=1e-14)
    assert not torch.allclose(batchwise(x), evaluated(x), atol=1e-2)


def test_tied_and_frozen_parameters_stay_so():
    model, x = BY_ID["tied_weights"].build()
    twin = linearize(model)
    assert twin.get_parameter("embed.weight") is twin.get_parameter("decoder.weight")
    assert len(list(twin.parameters())) == len(list(model.parameters()))

    model, x = BY_ID["frozen_layer"].build()
    twin = linearize(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in twin.named_parameters()} == flags
    adamw = torch.optim.AdamW(twin.parameters(), 0.1, weight_decay=0.5)
    (twin(x) ** 2).sum().backward()
    adamw.step()
    for name, parameter in twin.named_parameters():
        moved = not torch.equal(parameter, model.get_parameter(name))
        assert moved == flags[name]


def test_a_parameter_counts_after_it_was_trained_and_frozen():
    model, x = BY_ID["mlp"].build()
    twin = linearize(model)
    displaced(twin)
    before = twin(x).detach()
    twin.get_parameter("2.weight").requires_grad_(False)
    assert torch.allclose(twin(x), before, rtol=0, atol=1e-14)
    twin.requires_grad_(False)
    assert torch.allclose(twin(x), before, rtol=0, atol=1e-14)
    with torch.inference_mode():
        assert torch.allclose(twin(x), before, rtol=0, atol=1e-14)
    twin.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(twin(x), model(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "gru", "tied_weights", "resnet", "attention"])
def test_twins_can_be_copied_saved_moved_and_loaded(name):
    model, x = BY_ID[name].build()
    twin = linearize(model)
    displaced(twin)
    expected = twin(x).detach()

    twice = copy.deepcopy(twin)
    assert torch.equal(twice(x), expected)
    displaced(twice)
    assert torch.equal(twin(x), expected)

    other = linearize(BY_ID[name].model().double())
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), expected)
    names = {f"linearization_point.{name}" for name, _ in model.named_parameters()}
    assert names <= set(twin.state_dict())
    assert set(model.state_dict()) <= set(twin.state_dict())

    low = each(lambda t: t.float() if t.is_floating_point() else t, x)
    assert torch.allclose(call(twin.float(), low).double(), expected, atol=1e-4)
    kept = {tensor.dtype for tensor in twin.linearization_point.buffers()}
    assert kept == {torch.float32}
    elsewhere = twin.to("meta")
    assert all(tensor.is_meta for tensor in elsewhere.state_dict().values())


class Root(nn.Module):
    """Parameters and buffers of the outermost module, which the twin shares."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2))
        self.register_buffer("scale", torch.rand(2))
        self.register_buffer("shift", torch.rand(2), persistent=False)

    def forward(self, x):
        return torch.tanh(x @ self.weight) * self.scale + self.shift


def test_the_outermost_module_moves_and_loads_too():
    model, x = Root(), vectors(3)
    twin = linearize(model).double()
    assert {t.dtype for t in twin.state_dict().values()} == {torch.float64}
    assert torch.allclose(twin(x.double()), model.double()(x.double()))
    names = {"weight", "scale", "linearization_point.weight"}
    assert set(twin.state_dict()) == names
    other = linearize(Root()).double()
    displaced(other)
    other.shift.copy_(twin.shift)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x.double()), other(x.double()))


def test_a_twin_can_be_pickled():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.GRU(6, 3, batch_first=True))
    twin = linearize(model, output_fn=_first)
    x = torch.randn(2, 4, 5)
    displaced(twin)
    expected = twin(x).detach()
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected)
    loaded.double()(x.double()).sum().backward()
    displaced(loaded)
    assert not torch.allclose(loaded(x.double()).float(), expected)


def _first(model, x):
    return model(x)[0]


def test_half_precision_and_autocast_are_computed_in_single_precision():
    torch.manual_seed(0)
    model, x = mlp(), vectors(4)
    twin = linearize(copy.deepcopy(model).bfloat16())
    outputs = twin(x.bfloat16())
    outputs.sum().backward()
    assert outputs.dtype == torch.float32
    assert {p.grad.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert torch.allclose(outputs, model(x), atol=2e-2)

    twin = linearize(model)
    expected = twin(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = twin(x)
        outputs.sum().backward()
    assert torch.equal(outputs, expected)


def test_a_twin_is_called_as_its_model_and_leaves_the_inputs_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x, *, scale, mask=None):
            x.mul_(scale)
            y = torch.tanh(self.layer(x))
            return y if mask is None else y * mask

    model, x = Mixed().double(), vectors(3).double()
    twin = linearize(model)
    kept, mask = x.clone(), torch.ones(1, 2, dtype=torch.float64)
    expected = model(x.clone(), scale=2.0, mask=3 * mask)
    assert torch.allclose(twin(x, scale=2.0, mask=3 * mask), expected)
    assert torch.equal(x, kept)
    expected = model(x.clone(), scale=3.0)
    assert torch.allclose(twin(x=x, scale=3.0), expected)


def test_a_token_sequence_keeps_its_shape():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)).double()
    twin = linearize(model)
    assert twin(torch.randint(7, (3, 4))).shape == (3, 4, 7)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="the model is a function"):
        inspect.unwrap(linearize)(lambda x: x)
    with pytest.raises(ValueError, match="mode='other'"):
        inspect.unwrap(linearize)(nn.Linear(2, 1), mode="other")
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        linearize(nn.Linear(2, 1).requires_grad_(False))
    with pytest.raises(ValueError, match="not linearized yet"):
        linearize(linearize(nn.Linear(2, 1)))
    with pytest.raises(UnsupportedModelError, match="lazy"):
        linearize(nn.LazyLinear(1))
    with pytest.raises(UnsupportedModelError, match="complex"):
        linearize(nn.Linear(2, 1, dtype=torch.complex64))
    layer = nn.Linear(2, 1)
    layer.graph = layer.weight * 2
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        linearize(layer)


def test_what_cannot_be_expanded_is_refused_at_the_first_call():
    x = vectors(3)
    noisy = Computed(
        lambda self, x: nn.functional.dropout(self.layer(x)), layer=nn.Linear(5, 2)
    )
    with pytest.raises(UnsupportedModelError, match="random"):
        linearize(noisy)(x)
    two = Computed(lambda self, x: (self.layer(x), x), layer=nn.Linear(5, 2))
    with pytest.raises(UnsupportedModelError, match="output_fn"):
        linearize(two)(x)
    layer = nn.Linear(5, 2)
    hidden = Computed(lambda self, x: self.layer(x) + layer(x), layer=nn.Linear(5, 2))
    with pytest.raises(UnsupportedModelError, match="past its attributes"):
        linearize(hidden)(x)
    model, x = BY_ID["checkpoint_reentrant"].build()
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        linearize(model)(x)
