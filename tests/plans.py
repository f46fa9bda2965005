"""What tests of plans share: inputs, a model with half a fast route, looks inside."""

import pytest
from networks import packed_sequences, vectors


@pytest.fixture
def x():
    return vectors(4).double()


def half_covered():
    """Of these parameters only those of the head have a fast route."""
    return packed_sequences().double()


def cut(plan):
    """The plan within ever less memory, as long as all of it is fast: each cut once."""
    seen, found = set(), []
    budget = 2**19  # more than any of these networks needs
    while not (smaller := plan.within(budget)).exact:
        shape = smaller.block, tuple(len(sweep) for sweep in smaller.sweeps)
        if shape not in seen:
            seen.add(shape)
            found.append(smaller)
        budget = int(budget * 0.85)
    return found


def in_parts(found):
    return found if isinstance(found, dict) else {"": found}
