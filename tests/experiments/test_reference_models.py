"""The reference networks: shapes, symmetries and sizes known from elsewhere."""

import pytest
import torch
from torch import nn

from ntk_callbacks.experiments import ACTIVATIONS, CNN, MLP, ResNet

MODELS = [MLP, CNN, ResNet]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_and_gradients_on_every_image_size(model, parametrization, shape):
    network = model(shape, 7, width=4, depth=1, parametrization=parametrization)
    logits = network(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_depth_counts_layers(model):
    def weights(depth):
        network = model((1, 8, 8), 10, width=4, depth=depth)
        return sum(p.ndim > 1 for p in network.parameters())

    per_step = 6 if model is ResNet else 1  # three stages of two convolutions
    assert weights(3) - weights(2) == per_step


def test_resnet_20_has_the_size_in_the_paper():
    network = ResNet((3, 32, 32), 10, width=16, depth=3)
    # He et al. (2015), Table 6: 20 layers, 0.27 million parameters.
    kernels = [p for p in network.parameters() if p.ndim == 4 and p.shape[-1] == 3]
    assert len(kernels) + 1 == 20
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) in {0.27, 0.28}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_by_name_is_its_callable(name):
    x = torch.randn(2, 1, 8, 8)
    by_name = MLP((1, 8, 8), 3, width=5, depth=1, activation=name)
    by_hand = MLP((1, 8, 8), 3, width=5, depth=1, activation=ACTIVATIONS[name])
    by_hand.load_state_dict(by_name.state_dict())
    assert torch.equal(by_name(x), by_hand(x))


def test_a_network_of_no_hidden_layer_is_linear():
    network = MLP([6], 2, depth=0, sigma_b=0.0).double()
    x, y = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(network(x + 3 * y), network(x) + 3 * network(y))


def test_a_cnn_does_not_mind_where_the_image_is():
    network = CNN((1, 16, 16), 5, width=6, depth=3, sigma_b=0.0).double()
    here, there = torch.zeros(2, 1, 1, 16, 16, dtype=torch.float64)
    patch = torch.randn(4, 4, dtype=torch.float64)
    here[0, 0, 4:8, 4:8] = patch
    there[0, 0, 8:12, 6:10] = patch  # still three pixels from every border
    torch.testing.assert_close(network(here), network(there))


def test_batch_norm_makes_a_resnet_blind_to_the_scale_of_its_convolutions():
    network = ResNet((1, 8, 8), 5, width=4).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64)
    before = network(x)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 4:
                p.mul_(3.0)
    torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((1, 8, 8), 10, width=-3), "MLP: width is -3, expected a whole"),
        (lambda: MLP((1, 8, 8), 10, depth=-1), "MLP: depth is -1.*at least 0"),
        (lambda: MLP((), 10), "MLP: in_shape is empty"),
        (lambda: CNN((1, 8, 8), 10, depth=0), "CNN: depth is 0"),
        (lambda: CNN((64,), 10), r"CNN: in_shape is \(64,\), expected \(channels, h"),
        (lambda: ResNet((1, 2, 2), 10), "ResNet: in_shape is 2.*at least 4"),
        (lambda: ResNet((1, 8, 8), 0), "ResNet: out_features is 0"),
        (
            lambda: MLP((4,), 2, activation="rleu"),
            "MLP: activation is 'rleu', expected one of relu, tanh, erf",
        ),
        (lambda: CNN((1, 8, 8), 2, activation=3), "CNN: activation is 3"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
