"""Both parametrizations draw the same function; closed forms, with standard errors."""

import math

import pytest
import torch
from torch.func import functional_call, jacrev, vmap

from ntk_callbacks.experiments import MLP, Conv2d, Linear

PARAMETRIZATIONS = ["standard", "ntk"]
DRAWS = 40_000  # independent output units of one layer
SIGMAS = 5.0  # a right answer is farther off once in 1.7 million


def assert_second_moment(products, expected, variance):
    """Mean of `products` within SIGMAS standard errors of what theory expects."""
    error = math.sqrt(variance / len(products))
    assert abs(products.mean().item() - expected) < SIGMAS * error


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("sigma_b", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_outputs_have_the_covariance_of_theory(kind, parametrization, sigma_b):
    scales = {"parametrization": parametrization, "sigma_w": 1.3, "sigma_b": sigma_b}
    if kind == "linear":
        layer = Linear(12, DRAWS, **scales)
        x = torch.randn(2, 12)
        y = layer(x).detach()
    else:
        layer = Conv2d(2, DRAWS, 3, **scales)
        images = torch.randn(2, 2, 3, 3)
        x = images.flatten(1)  # what the central pixel sees
        y = layer(images)[:, :, 1, 1].detach()
    covariance = 1.3**2 * (x @ x.T) / x.shape[1] + sigma_b**2
    (v0, c), (_, v1) = covariance.tolist()
    # Isserlis: Var(y y') = v v' + c² for centered normal variables.
    assert_second_moment(y[0] * y[0], v0, 2 * v0**2)
    assert_second_moment(y[0] * y[1], c, v0 * v1 + c**2)
    assert_second_moment(y[0], 0.0, v0)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_border_pixels_see_zeros(parametrization):
    layer = Conv2d(1, DRAWS, 3, parametrization=parametrization, sigma_w=1.0)
    corner = layer(torch.ones(1, 1, 3, 3))[0, :, 0, 0].detach()
    expected = 4 / 9  # four of the nine weights meet a pixel
    assert_second_moment(corner**2, expected, 2 * expected**2)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_signals_of_a_relu_network_follow_the_mean_field_map(parametrization):
    width, draws, sigma_w, sigma_b = 512, 40, 1.5, 0.5
    x = torch.randn(1, 10)
    q = sigma_w**2 * x.square().mean().item() + sigma_b**2
    for _ in range(2):
        q = sigma_w**2 * q / 2 + sigma_b**2
    squares = [
        MLP([10], width, width, 2, "relu", parametrization, sigma_w, sigma_b)(x)
        .detach()
        .square()
        .mean()
        for _ in range(draws)
    ]
    # Relative variance of a mean square: 2/width for the normal readout, and at most
    # 5/width for each layer of ReLUs, E φ⁴ / (E φ²)² - 1 = 5.
    assert_second_moment(torch.stack(squares), q, 12 / width * q**2)


def test_ntk_layers_equal_standard_ones_with_scaled_weights():
    # Small integers and a scale of 1/2 leave no room for rounding.
    scales = {"sigma_w": 2.0, "sigma_b": 0.5}
    for ntk, standard, x in [
        (
            Linear(16, 3, parametrization="ntk", **scales),
            Linear(16, 3, **scales),
            torch.randint(-9, 9, (5, 16)).float(),
        ),
        (
            Conv2d(4, 3, 2, parametrization="ntk", stride=2, **scales),
            Conv2d(4, 3, 2, stride=2, **scales),
            torch.randint(-9, 9, (5, 4, 6, 6)).float(),
        ),
    ]:
        with torch.no_grad():
            ntk.weight.copy_(torch.randint(-9, 9, ntk.weight.shape))
            ntk.bias.copy_(torch.randint(-9, 9, ntk.bias.shape))
            standard.weight.copy_(ntk.weight * 2.0 / 4.0)  # √fan_in = 4
            standard.bias.copy_(ntk.bias * 0.5)
        assert torch.equal(ntk(x), standard(x))


def test_gradients_carry_the_scale_of_the_forward_pass():
    layer = Linear(8, 3, parametrization="ntk", sigma_w=1.5, sigma_b=0.3).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    jacobian = vmap(
        jacrev(lambda p, one: functional_call(layer, p, (one,))), in_dims=(None, 0)
    )(params, x)
    eye = torch.eye(3, dtype=torch.float64)
    weight = torch.einsum("kl,nj->nklj", eye, x) * 1.5 / math.sqrt(8)
    torch.testing.assert_close(jacobian["weight"], weight)
    torch.testing.assert_close(jacobian["bias"], (0.3 * eye).expand(4, 3, 3))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_no_sigma_b_no_bias(parametrization):
    assert Linear(3, 2, parametrization=parametrization).bias is None
    assert Conv2d(3, 2, parametrization=parametrization).bias is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 3), "Linear: in_features is 0, expected a whole number"),
        (lambda: Linear(3, 2.5), r"Linear: out_features is 2\.5"),
        (lambda: Linear(3, True), "Linear: out_features is True"),
        (lambda: Conv2d(3, 2, 0), "Conv2d: kernel_size is 0"),
        (lambda: Conv2d(3, 2, padding=-1), "Conv2d: padding is -1"),
        (
            lambda: Linear(3, 2, parametrization="mup"),
            "parametrization is 'mup', expected one of standard, ntk",
        ),
        (lambda: Linear(3, 2, sigma_w=0.0), r"sigma_w is 0\.0, expected a positive"),
        (lambda: Linear(3, 2, sigma_w=math.nan), "sigma_w is nan"),
        (lambda: Conv2d(3, 2, sigma_b=-1.0), r"sigma_b is -1\.0, expected 0"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
