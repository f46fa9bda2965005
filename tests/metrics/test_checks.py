"""What metrics refuse, as a user calls them: without the shape checks of tests."""

import inspect

import pytest
import torch

from ntk_callbacks import metrics

LABELS = torch.tensor([0, 0, 1, 1])
BASIS = torch.eye(4)[:, :2]

SPECTRA = ("condition_number", "participation_ratio", "entropy_rank")
SINGULAR_VALUES = ("isometry_gap", "log_std", "mean_square")
PAIRS = ("kernel_distance", "relative_change", "scale_change", "shape_change")
KERNELS = {
    "cka": lambda kernel: call("cka", kernel, kernel),
    "class_blocks": lambda kernel: call("class_blocks", kernel, LABELS),
    "target_alignment": lambda kernel: call("target_alignment", kernel, LABELS),
    "top_directions": lambda kernel: call("top_directions", kernel, 1),
    "within_between_ratio": lambda kernel: call("within_between_ratio", kernel, LABELS),
}
BASES = ("principal_angles", "subspace_overlap")


def call(name, *arguments):
    return inspect.unwrap(getattr(metrics, name))(*arguments)


def test_every_public_metric_is_among_these():
    weights = {"cosine_similarity", "displacement"}
    known = {*SPECTRA, *SINGULAR_VALUES, *PAIRS, *KERNELS, *BASES, *weights}
    assert known | {"off_diagonal_share"} == set(metrics.__all__)


@pytest.mark.parametrize("shape", [(4, 4), (3, 2, 2), ()])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_kernel_is_no_spectrum(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: .*eigvalsh") as error:
        call(name, torch.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("name", [*SPECTRA, *SINGULAR_VALUES])
def test_an_empty_spectrum_says_whose_it_is(name):
    with pytest.raises(ValueError, match=rf"{name}: .*at least one value"):
        call(name, torch.zeros(0))


@pytest.mark.parametrize(
    "shape", [(4,), (), (4, 3), (3, 4), (4, 4, 2), (1, 4, 4), (4, 4, 2, 2)]
)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_other_axes_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: ") as error:
        KERNELS[name](torch.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (4, 4, 2, 3), (4,)])
def test_off_diagonal_share_needs_both_output_axes(shape):
    with pytest.raises(ValueError, match=r"off_diagonal_share: .*\(n1, n2, c, c\)"):
        call("off_diagonal_share", torch.ones(shape))


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_has_not_changed(name):
    with pytest.raises(ValueError, match=rf"{name}: .*\(0, 3\)"):
        call(name, torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("name", ["displacement", "cosine_similarity"])
def test_weights_that_are_none(name):
    with pytest.raises(ValueError, match="no weights"):
        call(name, {}, {})
    weights = {"w": torch.ones(2)}
    for pair in ((weights, {"w": torch.ones(2) * 1j}),) * 2:
        with pytest.raises(ValueError, match="'w' is complex"):
            call(name, *pair)
        with pytest.raises(ValueError, match="'w' is complex"):
            call(name, *reversed(pair))


@pytest.mark.parametrize(
    "name", sorted({*metrics.__all__} - {"cosine_similarity", "displacement"})
)
def test_imaginary_parts_are_not_dropped(name):
    tensor = (torch.eye(4) + 1j).to(torch.complex64)
    arguments = {
        **dict.fromkeys((*SPECTRA, *SINGULAR_VALUES), (tensor[0],)),
        **dict.fromkeys((*PAIRS, "cka"), (tensor, tensor)),
        **dict.fromkeys(BASES, (tensor[:, :2], tensor[:, :2])),
        **dict.fromkeys(("class_blocks", "target_alignment"), (tensor, LABELS)),
        "within_between_ratio": (tensor, LABELS),
        "top_directions": (tensor, 1),
        "off_diagonal_share": (tensor.expand(4, 4, 4, 4),),
    }
    with pytest.raises(ValueError, match=rf"{name}: .*complex64"):
        call(name, *arguments[name])


def test_complex_targets_are_no_classes():
    with pytest.raises(ValueError, match=r"target_alignment: .*complex64"):
        call("target_alignment", torch.eye(4), LABELS * 1j)


@pytest.mark.parametrize("name", ["class_blocks", "within_between_ratio"])
@pytest.mark.parametrize("shape", [(3,), (4, 2), (), (1, 4)])
def test_one_class_for_each_example(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: .*4 examples") as error:
        call(name, torch.eye(4), torch.zeros(shape).long())
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(3,), (), (1, 4)])
def test_targets_for_each_example(shape):
    for targets in (torch.zeros(shape), torch.zeros(shape).long()):
        with pytest.raises(ValueError, match=r"target_alignment: .*4 examples"):
            call("target_alignment", torch.eye(4), targets)


@pytest.mark.parametrize("name", BASES)
def test_bases_that_are_none(name):
    for other in (2 * BASIS, torch.ones(4, 2) / 2, BASIS + 0.01, torch.zeros(4, 2)):
        for pair in ((BASIS, other), (other, BASIS)):
            with pytest.raises(ValueError, match=rf"{name}: .*not orthonormal"):
                call(name, *pair)
    for wrong in (BASIS[:, 0], BASIS[None], BASIS.mT, torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"{name}: .*the same m×k"):
            call(name, wrong, wrong)
    with pytest.raises(ValueError, match=rf"{name}: .*\(4, 2\).*\(4, 1\)"):
        call(name, BASIS, BASIS[:, :1])


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bases_that_are_orthonormal_to_their_precision(name, dtype):
    torch.manual_seed(0)
    first, second = (torch.linalg.qr(torch.randn(50, 6).double()).Q for _ in range(2))
    expected = call(name, first.to(dtype).double(), second.to(dtype).double())
    found = call(name, first.to(dtype), second.to(dtype))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    mixed = call(name, first, second.to(dtype))
    assert mixed.dtype == torch.float64
    nothing = first * torch.nan
    assert call(name, nothing, second).isnan().all()


COUNTS = torch.tensor([[8, 3, 2, 1], [3, 9, 1, 2], [2, 1, 7, 4], [1, 2, 4, 6]])
OF_NUMBERS = {
    **dict.fromkeys((*SPECTRA, *SINGULAR_VALUES), lambda k: (k.diagonal(),)),
    **dict.fromkeys((*PAIRS, "cka"), lambda k: (k, k.mT.flip(0))),
    **dict.fromkeys(("class_blocks", "target_alignment"), lambda k: (k, LABELS)),
    "within_between_ratio": lambda k: (k, LABELS),
    "off_diagonal_share": lambda k: (k.view(2, 2, 2, 2),),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_small_integers_are_numbers_in_every_dtype(name, dtype):
    expected = call(name, *OF_NUMBERS[name](COUNTS.double()))
    found = call(name, *OF_NUMBERS[name](COUNTS.to(dtype)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
