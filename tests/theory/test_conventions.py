"""Other libraries' kernels, rates and parametrizations against their own numbers."""

import inspect
import math
from typing import get_args

import pytest
import torch
from feature_models import FeatureModel, features, kernel
from infinite_width import ROOT2, tensor
from torch import nn
from torch.func import functional_call, jacrev, vmap

from ntk_callbacks import as_matrix, dynamics, empirical_ntk
from ntk_callbacks.theory import (
    from_neural_tangents,
    from_torch_func,
    loss_scale,
    ntk_parametrization_scaling,
    to_neural_tangents,
    to_torch_func,
)
from ntk_callbacks.theory.scales import Loss

X = tensor(
    [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [-1, 0, 0], [0.5, -0.5, ROOT2 / 2]]
)
Y = tensor([[1, 0], [0, 1], [1, 1], [-1, 0], [0, -1]])


def tanh_net():
    """f = tanh(x W₁ᵀ) W₂ᵀ with W₁ = cos(arange(12)), W₂ = sin(0.7 arange(8))."""
    net = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)
    ).double()
    net[0].weight.data = torch.arange(12.0).double().cos().view(4, 3)
    net[2].weight.data = (0.7 * torch.arange(8.0).double()).sin().view(2, 4)
    return net


# neural-tangents 0.6.5, jax 0.4.25, float64, on this network.
NT_ENTRY = [
    [2.604710277136877, -0.164942269062156],
    [-0.164942269062156, 2.590765466304683],
]
NT_TRACED, NT_LARGEST, NT_RATE = 2.59773787172078, 9.413550200544615, 2.124596945246099
NT_TOTAL_TRACE = 24.162406425349126
NT_START = [-0.3773378808053503, 0.5810448199336467]
# Time -> outputs of the first example, and the loss ½ mean, with learning rate 1.
NT_MSE = {
    1.0: ([0.30226213138776675, 0.38872752930326415], 0.1837320676409081),
    10.0: ([0.8183399212832343, 0.2671394138094457], 0.10746166261227937),
    100.0: ([0.7585154304705766, 0.07093290508655836], 0.035128235798220456),
}
# The same for −mean(one-hot · log softmax), to its tolerance of about 1e-7.
NT_ENTROPY = {
    1.0: ([-0.0036334181, 0.2114194670], 0.3166918033),
    10.0: ([0.6545046284, -0.4356796920], 0.1696332958),
}


def test_numbers_of_neural_tangents():
    ntk = empirical_ntk(tanh_net(), X)
    full = to_neural_tangents(ntk, trace_axes=())
    assert torch.allclose(full[0, 1], tensor(NT_ENTRY), rtol=0, atol=1e-13)
    traced = to_neural_tangents(ntk)
    assert traced[0, 1].item() == pytest.approx(NT_TRACED, abs=1e-13)
    assert torch.equal(traced, to_neural_tangents(ntk, trace_axes=(1,)))
    ours = empirical_ntk(tanh_net(), X, outputs="trace")
    assert torch.allclose(traced, ours, rtol=0, atol=1e-13)
    diagonal = to_neural_tangents(ntk, trace_axes=(), diagonal_axes=(-1,))
    expected = tensor([NT_ENTRY[0][0], NT_ENTRY[1][1]])
    assert torch.allclose(diagonal[0, 1], expected, rtol=0, atol=1e-13)
    matrix = as_matrix(ntk)
    assert matrix.trace().item() == pytest.approx(NT_TOTAL_TRACE, abs=1e-12)
    largest = torch.linalg.eigvalsh(matrix)[-1].item()
    assert largest == pytest.approx(NT_LARGEST, abs=1e-12)
    rate = dynamics.max_learning_rate(ntk) / loss_scale("neural_tangents", n=5, c=2)
    assert rate.item() == pytest.approx(NT_RATE, abs=1e-12)


def test_training_times_of_neural_tangents():
    net = tanh_net()
    ntk, f0 = empirical_ntk(net, X), net(X).detach()
    assert torch.allclose(f0[0], tensor(NT_START), rtol=0, atol=1e-14)
    scale = loss_scale("neural_tangents", n=5, c=2)
    times = [scale * t for t in NT_MSE]
    path = dynamics.gradient_flow(ntk, f0, Y, tensor(times)).train
    for outputs, (first, loss) in zip(path, NT_MSE.values(), strict=True):
        assert torch.allclose(outputs[0], tensor(first), rtol=0, atol=1e-12)
        found = scale * ((outputs - Y) ** 2).sum().item() / 2
        assert found == pytest.approx(loss, abs=1e-12)

    labels = torch.tensor([0, 1, 0, 1, 0])
    scale = loss_scale("cross_entropy_neural_tangents", n=5, c=2)
    times = [scale * t for t in NT_ENTROPY]
    path = dynamics.gradient_flow(
        ntk, f0, labels, tensor(times), loss="cross_entropy"
    ).train
    for outputs, (first, loss) in zip(path, NT_ENTROPY.values(), strict=True):
        assert torch.allclose(outputs[0], tensor(first), rtol=0, atol=1e-6)
        total = nn.functional.cross_entropy(outputs, labels, reduction="sum")
        assert scale * total.item() == pytest.approx(loss, abs=1e-6)


def numbered(n1, n2, *shape):
    """A kernel whose entry says where it belongs, as outputs (…, h, c) say it."""
    return (
        torch.arange(math.prod((n1, n2, *shape, *shape)))
        .double()
        .view(n1, n2, *shape, *shape)
    )


def test_axes_of_several_outputs_stand_side_by_side():
    entries = numbered(2, 3, 4, 5)  # i, j, h, c, h', c'
    ntk = entries.reshape(2, 3, 20, 20)
    full = to_neural_tangents(ntk, (4, 5), trace_axes=())
    assert full.shape == (2, 3, 4, 4, 5, 5)
    mean = to_neural_tangents(ntk, (4, 5), trace_axes=(-1,))
    mixed = to_neural_tangents(ntk, (4, 5), trace_axes=(1,), diagonal_axes=(2,))
    for i, j, h, k, c, m in [
        (1, 2, 3, 0, 4, 1),
        (0, 1, 2, 2, 0, 3),
        (1, 0, 1, 3, 2, 2),
    ]:
        assert full[i, j, h, k, c, m] == entries[i, j, h, c, k, m]
        expected = sum(entries[i, j, h, a, k, a] for a in range(5)) / 5
        assert mean[i, j, h, k] == pytest.approx(expected.item())
        expected = sum(entries[i, j, a, c, a, c] for a in range(4)) / 4
        assert mixed[i, j, c] == pytest.approx(expected.item())
    traced = to_neural_tangents(ntk, (4, 5), trace_axes=(-2, -1))
    assert torch.allclose(traced, ntk.diagonal(dim1=2, dim2=3).mean(2))
    assert torch.equal(from_neural_tangents(full, (4, 5), trace_axes=()), ntk)
    assert torch.equal(from_neural_tangents(traced, (4, 5), trace_axes=(1, 2)), traced)


def recipe(net, x1, x2, compute):
    """The recipe of torch.func's tutorial, in its words: contract the Jacobians."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def single(params, x):
        return functional_call(net, params, (x[None],))[0]

    jacobians = [
        [j.flatten(2) for j in vmap(jacrev(single), (None, 0))(params, x).values()]
        for x in (x1, x2)
    ]
    equation = {"full": "Naf,Mbf->NMab", "trace": "Naf,Maf->NM"}
    equation["diagonal"] = "Naf,Maf->NMa"
    return sum(
        torch.einsum(equation[compute], one, two)
        for one, two in zip(*jacobians, strict=True)
    )


@pytest.mark.parametrize("compute", ["full", "trace", "diagonal"])
def test_kernels_of_the_torch_func_recipe(compute):
    net = tanh_net()
    theirs = recipe(net, X, X[:3], compute)
    full = empirical_ntk(net, X, X[:3])
    assert torch.allclose(to_torch_func(full, compute), theirs, rtol=0, atol=1e-13)
    ours = empirical_ntk(net, X, X[:3], outputs=compute)
    found = from_torch_func(theirs, compute, c=2)
    assert torch.allclose(found, ours, rtol=0, atol=1e-13)
    if compute == "trace":
        assert theirs[0, 1].item() == pytest.approx(2 * NT_TRACED, abs=1e-13)
        assert theirs[0, 1].item() == pytest.approx(5.19547574344156, abs=1e-13)


# Our own sum for every loss of torch, and the loss itself.
LOSSES = {
    "half_sum": lambda f, y: ((f - y) ** 2).sum() / 2,
    "half_mean": lambda f, y: ((f - y) ** 2).sum(1).mean() / 2,
    "mse_sum": nn.MSELoss(reduction="sum"),
    "mse_mean": nn.MSELoss(),
    "neural_tangents": lambda f, y: 0.5 * ((f - y) ** 2).mean(),
    "cross_entropy_sum": nn.CrossEntropyLoss(reduction="sum"),
    "cross_entropy_mean": nn.CrossEntropyLoss(),
    "cross_entropy_neural_tangents": lambda f, y: (
        -(f.log_softmax(1) * nn.functional.one_hot(y, f.shape[1])).mean()
    ),
}


def test_every_loss_is_tested():
    assert set(LOSSES) == set(get_args(Loss))


@pytest.mark.parametrize("name", LOSSES)
def test_a_rate_on_a_loss_is_a_scaled_rate_on_the_sum(name):
    """Twenty steps of SGD on a model linear in its parameters, to 1e-12."""
    n, c, rate = 6, 3, 0.3
    model, x = FeatureModel(40), features(n, c, 40)
    entropy = name.startswith("cross_entropy")
    y = torch.randint(c, (n,)) if entropy else torch.randn(n, c).double()
    scale = loss_scale(name, n=n, c=c)
    sgd = torch.optim.SGD(model.parameters(), rate)
    expected = model(x).detach()
    for _ in range(20):
        gradient = dynamics.loss_gradient(
            expected, y, loss="cross_entropy" if entropy else "mse"
        )
        expected = expected + dynamics.output_change(
            kernel(x, x), gradient, learning_rate=scale * rate
        )
        sgd.zero_grad()
        LOSSES[name](model(x), y).backward()
        sgd.step()
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


def test_largest_rates_are_divided_by_the_scale():
    model, x = FeatureModel(40), features(4, 2, 40)
    y = torch.zeros(4, 2, dtype=torch.float64)
    limit = dynamics.max_learning_rate(kernel(x, x)).item()
    for factor, converges in ((0.98, True), (1.02, False)):
        trained = FeatureModel(40)
        trained.load_state_dict(model.state_dict())
        rate = factor * limit / loss_scale("mse_mean", n=4, c=2)
        sgd = torch.optim.SGD(trained.parameters(), rate)
        start = nn.functional.mse_loss(trained(x), y).item()
        for _ in range(300):
            sgd.zero_grad()
            loss = nn.functional.mse_loss(trained(x), y)
            loss.backward()
            sgd.step()
        assert (loss.item() < start) == converges


class NTKNet(nn.Module):
    """A convolution and a linear layer, W = σ_w/√fan_in w and b = σ_b β."""

    def __init__(self, sigma_w, sigma_b):
        super().__init__()
        self.sigma_w, self.sigma_b = sigma_w, sigma_b
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(2, 36, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self, x):
        kernel = self.sigma_w / 27**0.5 * self.kernel
        x = nn.functional.conv2d(x, kernel, self.sigma_b * self.shift)
        weight = self.sigma_w / 6 * self.weight
        return nn.functional.linear(
            torch.tanh(x).flatten(1), weight, self.sigma_b * self.bias
        )


def standard_twin(net):
    """The same function with plain weights."""
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
    ).double()
    plain[0].weight.data = net.sigma_w / 27**0.5 * net.kernel.data
    plain[0].bias.data = net.sigma_b * net.shift.data
    plain[3].weight.data = net.sigma_w / 6 * net.weight.data
    plain[3].bias.data = net.sigma_b * net.bias.data
    return plain


def test_kernels_of_both_parametrizations_are_each_others_exactly():
    net = NTKNet(1.5, 0.3)
    plain, x = standard_twin(net), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    scaling = ntk_parametrization_scaling(shapes, sigma_w=1.5, sigma_b=0.3)
    found = empirical_ntk(plain, x, scaling=scaling)
    assert torch.allclose(found, empirical_ntk(net, x), rtol=1e-12)

    names = dict(zip(scaling, dict(net.named_parameters()), strict=True))
    inverse = {names[name]: 1 / scale for name, scale in scaling.items()}
    found = empirical_ntk(net, x, scaling=inverse)
    assert torch.allclose(found, empirical_ntk(plain, x), rtol=1e-12)


def test_descent_in_one_parametrization_is_descent_with_other_rates_in_the_other():
    net = NTKNet(1.5, 0.3)
    plain, x = standard_twin(net), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    scaling = ntk_parametrization_scaling(shapes, sigma_w=1.5, sigma_b=0.3)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    groups = [
        {"params": [p], "lr": 0.1 * scaling[name]}
        for name, p in plain.named_parameters()
    ]
    other = torch.optim.SGD(groups)
    for _ in range(10):
        for model, optimizer in ((net, sgd), (plain, other)):
            optimizer.zero_grad()
            ((model(x) - 1) ** 2).sum().div(2).backward()
            optimizer.step()
    assert torch.allclose(net(x), plain(x), rtol=0, atol=1e-12)


def test_bad_input_is_refused():
    ntk = torch.zeros(2, 2, 6, 6)
    with pytest.raises(ValueError, match=r"output_shape=\(2, 2\) has 4 entries"):
        to_neural_tangents(ntk, (2, 2))
    with pytest.raises(ValueError, match=r"trace_axes=\(0,\); expected axes 1 to 2"):
        to_neural_tangents(ntk, (2, 3), trace_axes=(0,))
    with pytest.raises(ValueError, match="name an axis twice"):
        to_neural_tangents(ntk, (2, 3), trace_axes=(-1,), diagonal_axes=(2,))
    with pytest.raises(ValueError, match="expected none or all"):
        from_neural_tangents(torch.zeros(2, 2, 2, 2), (2, 3))
    with pytest.raises(ValueError, match=r"followed by \(2, 2, 3, 3\)"):
        from_neural_tangents(ntk, (2, 3), trace_axes=())
    with pytest.raises(ValueError, match="compute is 'sum', expected one of full"):
        inspect.unwrap(to_torch_func)(ntk, "sum")
    with pytest.raises(ValueError, match=r"c=2; expected \(n1, n2\) followed by"):
        from_torch_func(ntk, "full", c=2)
    with pytest.raises(ValueError, match="loss is 'mse', expected one of half_sum"):
        inspect.unwrap(loss_scale)("mse", n=2)
    with pytest.raises(ValueError, match="n is 0, expected a whole number"):
        loss_scale("half_sum", n=0)
    bare = inspect.unwrap(to_neural_tangents), inspect.unwrap(to_torch_func)
    for shape in [(), (2, 2), (2, 2, 3, 2), (2, 2, 1, 1, 3)]:
        for convert in bare:
            with pytest.raises(ValueError, match=r"expected full, \(n1, n2, c"):
                convert(torch.ones(shape))
    with pytest.raises(ValueError, match="sigma_w is -1"):
        ntk_parametrization_scaling({"w": (2, 3)}, sigma_w=-1.0)
    with pytest.raises(ValueError, match="expected inputs"):
        ntk_parametrization_scaling({"w": (2, 0)})
