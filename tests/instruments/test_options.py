"""Options of the two instruments that have so many."""

import pytest

from ntk_callbacks import LinearizationOptions, NTKOptions
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.linearization import LinearizationInstrument

INSTRUMENTS = [
    (KernelInstrument, NTKOptions, LinearizationOptions()),
    (LinearizationInstrument, LinearizationOptions, NTKOptions()),
]


@pytest.mark.parametrize(("instrument", "kind", "other"), INSTRUMENTS)
def test_options_are_taken_as_they_are_or_the_default_ones(instrument, kind, other):
    given = kind(mode="train", name="other")
    assert instrument(options=given).options is given
    assert instrument().options == kind()


@pytest.mark.parametrize(("instrument", "kind", "other"), INSTRUMENTS)
@pytest.mark.parametrize("wrong", [{"mode": "train"}, {}, "train", None])
def test_anything_else_is_refused_by_name(instrument, kind, other, wrong):
    wrong = other if wrong is None else wrong
    message = (
        rf"expected {kind.__name__}\(…\), .* _target_: ntk_callbacks\.{kind.__name__}"
    )
    with pytest.raises(ValueError, match=message):
        instrument(options=wrong)
