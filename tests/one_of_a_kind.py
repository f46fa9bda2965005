"""Cases of one kind, most of which take long: the fast suite keeps some of them."""

import pytest


def quick(values, *kept, ids=str):
    """Parameters of a test, slow but for those that are kept.

    Args:
        values: All cases.
        kept: Names of those that the fast suite runs too.
        ids: Value -> its name.
    """
    names = [ids(value) for value in values]
    unknown = {*kept} - {*names}
    assert not unknown, f"there is no case {unknown} in {names}"
    return [
        pytest.param(value, id=name, marks=[pytest.mark.slow] * (name not in kept))
        for value, name in zip(values, names, strict=True)
    ]
