"""Training a linearized twin follows closed forms and the features."""

import copy

import pytest
import torch
from cases import BY_ID
from networks import vectors
from oracles import jacobian_by_loop

from ntk_callbacks import empirical_ntk
from ntk_callbacks.dynamics import gradient_descent, linearize
from ntk_callbacks.layout import as_matrix


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
