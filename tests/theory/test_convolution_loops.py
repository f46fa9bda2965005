"""Convolutional kernels against loops over pairs of images and of pixels."""

import itertools
import math

import pytest
import torch

from ntk_callbacks.theory import (
    activate,
    convolution,
    dense,
    flatten,
    global_average_pool,
    infinite_width_kernels,
    sequential,
)


def relu_pair(q1, q2, q12):
    """E φ φ and E φ' φ' of ReLU by the angle."""
    if q1 * q2 == 0:
        return 0.0, 0.25
    cosine = max(-1.0, min(1.0, q12 / math.sqrt(q1 * q2)))
    angle = math.acos(cosine)
    value = math.sqrt(q1 * q2) * (math.sin(angle) + (math.pi - angle) * cosine)
    return value / (2 * math.pi), (math.pi - angle) / (2 * math.pi)


def kernels_by_loop(images, layers, head):
    """NNGP and NTK with ReLU; `layers` of (kernel_size, stride, padding, mode)."""
    sigma_w2, sigma_b2 = 1.7, 0.2
    n, channels, *shape = images.shape
    pixels = list(itertools.product(*map(range, shape)))
    k, theta = {}, {}
    for i, j in itertools.product(range(n), repeat=2):
        for a, b in itertools.product(pixels, repeat=2):
            product = images[i][(slice(None), *a)] @ images[j][(slice(None), *b)]
            k[i, j, a, b] = product.item() / channels
            theta[i, j, a, b] = 0.0
    for number, (size, stride, padding, mode) in enumerate(layers):
        if number:
            k, theta = after_relu(k, theta)
        after = [(s + 2 * padding - size) // stride + 1 for s in shape]
        out = list(itertools.product(*map(range, after)))
        taps = list(itertools.product(range(size), repeat=len(shape)))
        k2, theta2 = {}, {}
        for i, j in itertools.product(range(n), repeat=2):
            for a, b in itertools.product(out, repeat=2):
                total = total_theta = 0.0
                for tap in taps:
                    at = [
                        tuple(
                            stride * p + t - padding
                            for p, t in zip(pixel, tap, strict=True)
                        )
                        for pixel in (a, b)
                    ]
                    if mode == "circular":
                        at = [
                            tuple(p % s for p, s in zip(pixel, shape, strict=True))
                            for pixel in at
                        ]
                    total += k.get((i, j, *at), 0.0) / len(taps)
                    total_theta += theta.get((i, j, *at), 0.0) / len(taps)
                k2[i, j, a, b] = sigma_w2 * total + sigma_b2
                theta2[i, j, a, b] = k2[i, j, a, b] + sigma_w2 * total_theta
        k, theta, shape = k2, theta2, after
    k, theta = after_relu(k, theta)
    pixels = list(itertools.product(*map(range, shape)))
    pairs = list(itertools.product(pixels, repeat=2))
    if head == "flatten":
        pairs = [(a, a) for a in pixels]
    nngp, ntk = torch.zeros(2, n, n, dtype=torch.float64)
    for i, j in itertools.product(range(n), repeat=2):
        value = sum(k[i, j, a, b] for a, b in pairs) / len(pairs)
        below = sum(theta[i, j, a, b] for a, b in pairs) / len(pairs)
        nngp[i, j] = sigma_w2 * value + sigma_b2
        ntk[i, j] = nngp[i, j] + sigma_w2 * below
    return nngp, ntk


def after_relu(k, theta):
    values = {
        (i, j, a, b): relu_pair(k[i, i, a, a], k[j, j, b, b], q12)
        for (i, j, a, b), q12 in k.items()
    }
    return (
        {key: value for key, (value, _) in values.items()},
        {key: slope * theta[key] for key, (_, slope) in values.items()},
    )


LAYERS = {
    "zeros": [(3, 1, 1, "zeros"), (3, 1, 1, "zeros")],
    "circular": [(3, 1, 1, "circular"), (3, 1, 1, "circular")],
    "valid": [(3, 1, 0, "zeros"), (2, 1, 0, "zeros")],
    "stride": [(3, 2, 1, "zeros"), (3, 2, 1, "circular")],
    "wide_stride": [(2, 3, 2, "circular")],
    "one_by_one": [(1, 1, 0, "zeros"), (1, 2, 0, "zeros")],
}


def composed(layers, head):
    parts = []
    for size, stride, padding, mode in layers:
        parts += [
            convolution(
                math.sqrt(1.7),
                math.sqrt(0.2),
                kernel_size=size,
                stride=stride,
                padding=padding,
                padding_mode=mode,
            ),
            activate("relu"),
        ]
    last = flatten() if head == "flatten" else global_average_pool()
    return sequential(*parts, last, dense(math.sqrt(1.7), math.sqrt(0.2)))


@pytest.mark.parametrize("head", ["flatten", "pool"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(4, 5), (6,)], ids=["plane", "line"])
def test_loops_over_pixels(name, head, shape):
    images = torch.randn(3, 2, *shape, dtype=torch.float64)
    nngp, ntk = kernels_by_loop(images, LAYERS[name], head)
    network = composed(LAYERS[name], head)
    for pixels in ("all", "same") if head == "flatten" else ("all",):
        found = infinite_width_kernels(network, images, pixels=pixels)
        assert torch.allclose(found.nngp, nngp, rtol=1e-12)
        # The loop's arccos keeps eight digits on the diagonal.
        assert torch.allclose(found.ntk, ntk, rtol=1e-7)
        cross = infinite_width_kernels(network, images[:1], images, pixels=pixels)
        assert torch.allclose(cross.nngp, nngp[:1], rtol=1e-12)
        assert torch.allclose(cross.ntk, ntk[:1], rtol=1e-7)


def test_three_dimensions():
    images = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64)
    layers = [(3, 1, 1, "circular")]
    nngp, ntk = kernels_by_loop(images, layers, "pool")
    found = infinite_width_kernels(composed(layers, "pool"), images)
    assert torch.allclose(found.nngp, nngp, rtol=1e-12)
    assert torch.allclose(found.ntk, ntk, rtol=1e-7)
