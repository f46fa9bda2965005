"""Distances of kernels and weights: closed forms, invariances, edges."""

import math

import pytest
import torch

from ntk_callbacks.metrics import (
    cosine_similarity,
    displacement,
    kernel_distance,
    relative_change,
    scale_change,
    shape_change,
)

KERNEL_METRICS = [relative_change, kernel_distance, scale_change, shape_change]
WEIGHT_METRICS = [displacement, cosine_similarity]


def positive(n=6):
    half = torch.randn(n, n, dtype=torch.float64)
    return half @ half.mT


def rotated(kernel):
    q = torch.linalg.qr(torch.randn_like(kernel))[0]
    return lambda other: q @ other @ q.mT


@pytest.mark.parametrize("metric", KERNEL_METRICS)
def test_no_change_is_exactly_zero(metric):
    kernel = positive()
    assert metric(kernel, kernel.clone()) == 0


@pytest.mark.parametrize("metric", KERNEL_METRICS)
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        metric(torch.ones(2, 2), torch.ones(2, 3))


@pytest.mark.parametrize("metric", KERNEL_METRICS)
def test_nan_kernels_give_nan(metric):
    kernel = positive(3)
    assert metric(kernel * torch.nan, kernel).isnan()
    assert metric(kernel, kernel * torch.nan).isnan()


@pytest.mark.parametrize("metric", KERNEL_METRICS)
def test_a_zero_reference_gives_no_number(metric):
    kernel = positive(3)
    assert not metric(kernel, torch.zeros_like(kernel)).isfinite()
    assert metric(torch.zeros_like(kernel), torch.zeros_like(kernel)).isnan()


@pytest.mark.parametrize("metric", KERNEL_METRICS)
def test_a_common_rotation_does_not_matter(metric):
    kernel, reference = positive(), positive()
    turn = rotated(kernel)
    value = metric(turn(kernel), turn(reference)).item()
    assert value == pytest.approx(metric(kernel, reference).item(), rel=1e-12)


@pytest.mark.parametrize("metric", KERNEL_METRICS)
def test_full_kernels_are_compared_entry_by_entry(metric):
    kernel = torch.randn(3, 3, 2, 2)
    reference = torch.randn(3, 3, 2, 2)
    flat = metric(kernel.flatten(), reference.flatten())
    assert metric(kernel, reference) == flat


def test_relative_change():
    kernel = positive()
    assert relative_change(1.5 * kernel, kernel).item() == pytest.approx(0.5)
    assert relative_change(0 * kernel, kernel) == 1
    change = relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert change.item() == pytest.approx(4 / 3)


def test_scale_and_shape_split_the_change_exactly():
    kernel, reference = positive(), positive()
    scale, shape = scale_change(kernel, reference), shape_change(kernel, reference)
    whole = relative_change(kernel, reference)
    assert (scale**2 + shape**2).item() == pytest.approx(whole.item() ** 2, rel=1e-12)
    # The multiple of Θ₀ nearest to Θ, by least squares over all entries.
    columns = reference.reshape(-1, 1)
    fitted = torch.linalg.lstsq(columns, kernel.reshape(-1, 1)).solution
    assert scale.item() == pytest.approx(fitted.item() - 1, rel=1e-12)
    left = (kernel - fitted * reference).norm() / reference.norm()
    assert shape.item() == pytest.approx(left.item(), rel=1e-12)


def test_growth_is_a_change_of_scale_alone():
    kernel = positive()
    assert scale_change(1.25 * kernel, kernel).item() == pytest.approx(0.25, rel=1e-14)
    assert shape_change(1.25 * kernel, kernel).item() == pytest.approx(0, abs=1e-15)
    assert scale_change(0.5 * kernel, kernel).item() == pytest.approx(-0.5, rel=1e-14)
    tiny = scale_change(kernel * (1 + 2**-50), kernel)
    assert tiny.item() == pytest.approx(2**-50, rel=0.2)  # 1 − 1 would be 0


def test_kernel_distance_is_one_minus_the_cosine():
    kernel, reference = positive(), positive()
    inner = (kernel * reference).sum() / (kernel.norm() * reference.norm())
    assert kernel_distance(kernel, reference).item() == pytest.approx(
        1 - inner.item(), rel=1e-12
    )


def test_kernel_distance_is_blind_to_scale_and_symmetric():
    kernel, reference = positive(), positive()
    distance = kernel_distance(kernel, reference).item()
    assert kernel_distance(5 * kernel, 0.1 * reference).item() == pytest.approx(
        distance
    )
    assert kernel_distance(reference, kernel).item() == pytest.approx(distance)


def test_kernel_distance_extremes():
    plus, minus = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert kernel_distance(plus, minus) == 1
    assert kernel_distance(plus, -plus) == 2


def test_kernel_distance_keeps_small_angles():
    # 1 − cos 1e-9 = 5e-19 drowns in 1 − 1 = 0, half the squared chord does not.
    angle = 1e-9
    turned = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    straight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    distance = kernel_distance(turned, straight).item()
    assert distance == pytest.approx(angle**2 / 2, rel=1e-6)


def test_displacement_over_all_tensors():
    reference = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    params = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([[2.5]])}
    moved = displacement(params, reference)
    assert moved.item() == pytest.approx((4 + 2.25) ** 0.5 / 5, rel=1e-14)
    assert moved.dtype == torch.float64
    assert displacement(reference, reference) == 0


def test_displacement_from_zero():
    zero, one = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    assert displacement(one, zero) == math.inf
    assert displacement(zero, zero).isnan()


def test_displacement_of_float32_weights_is_taken_in_float64():
    reference = {"a": torch.full((1000,), 1.0)}
    params = {"a": torch.nextafter(reference["a"], torch.tensor(2.0))}
    # All entries moved by one ulp, 2⁻²³.
    assert displacement(params, reference).item() == pytest.approx(2**-23, rel=1e-12)


def test_cosine_similarity():
    a = {"w": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0])}
    b = {"w": torch.tensor([1.0, 0.0]), "b": torch.tensor([-1.0])}
    assert cosine_similarity(a, a) == 1
    assert cosine_similarity(a, b) == 0
    opposite = {name: -3 * value for name, value in a.items()}
    assert cosine_similarity(opposite, a) == -1
    zero = {name: 0 * value for name, value in a.items()}
    assert cosine_similarity(zero, a).isnan()


def test_cosine_similarity_never_leaves_its_interval():
    for _ in range(50):
        params = {"w": torch.randn(7)}
        near = {"w": params["w"] * (1 + 1e-8)}
        assert -1 <= cosine_similarity(params, near) <= 1


@pytest.mark.parametrize("metric", WEIGHT_METRICS)
def test_order_of_names_does_not_matter_but_names_do(metric):
    params = {"a": torch.randn(3), "b": torch.randn(2)}
    reference = {"b": torch.randn(2), "a": torch.randn(3)}
    turned = dict(reversed(params.items()))
    assert metric(turned, reference).item() == pytest.approx(
        metric(params, reference).item(), rel=1e-14
    )
    with pytest.raises(ValueError, match=r"only one has \['b', 'c'\]"):
        metric(params, {"a": torch.randn(3), "c": torch.randn(2)})


@pytest.mark.parametrize("metric", WEIGHT_METRICS)
def test_nan_weights_give_nan(metric):
    params = {"a": torch.tensor([1.0, torch.nan])}
    assert metric(params, {"a": torch.ones(2)}).isnan()


@pytest.mark.parametrize("metric", WEIGHT_METRICS)
def test_half_precision_weights(metric):
    params = {"a": torch.tensor([1.0, 2.0]).bfloat16()}
    reference = {"a": torch.tensor([1.0, 1.0]).bfloat16()}
    exact = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, 1.0])}
    assert metric(params, reference) == metric(*exact)


def test_weights_of_other_shapes_are_refused_and_not_broadcast() -> None:
    for score in (displacement, cosine_similarity):
        with pytest.raises(ValueError, match=r"'w' has shape \(3,\).*\(1,\)"):
            score({"w": torch.ones(3)}, {"w": torch.ones(1)})
