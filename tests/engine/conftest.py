"""Prints the share of each model's parameters that is on fast routes."""

import pytest

SHARES = pytest.StashKey[dict[str, float]]()


@pytest.fixture
def fast_shares(request):
    """Name of a model -> share of its parameters; printed when all tests are done."""
    return request.config.stash.setdefault(SHARES, {})


def pytest_terminal_summary(terminalreporter, config):
    shares = config.stash.get(SHARES, {})
    if not shares:
        return
    whole = sum(share == 1 for share in shares.values())
    terminalreporter.section("parameters on fast routes")
    terminalreporter.line(f"all of them in {whole} of {len(shares)} models; in others:")
    for name, share in sorted(shares.items(), key=lambda item: item[1]):
        if share < 1:
            terminalreporter.line(f"{share:7.1%}  {name}")
