"""The same random numbers for every test, a browser for pages, a table of coverage."""

import os
import shutil

import pytest
import torch

SHARES = pytest.StashKey[dict[str, float]]()

# The tensors here are small: more threads make them slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def program(variable, *names):
    """Path of the first program that is installed; an environment variable wins."""
    return os.environ.get(variable) or next(
        filter(None, map(shutil.which, names)), None
    )


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, and without a network beyond this machine."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chrome = program("CHROME_BIN", "chromium", "chromium-browser", "google-chrome")
    driver = program("CHROMEDRIVER", "chromedriver", "chromium.chromedriver")
    if not (chrome and driver):
        pytest.skip("no Chrome or Chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1600",
        "--no-first-run",
        "--disable-sync",
        "--disable-extensions",
        "--disable-component-update",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    session = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield session
    finally:
        session.quit()


@pytest.fixture
def fast_shares(request):
    """Name of a model -> share of its parameters on fast routes; printed at the end."""
    return request.config.stash.setdefault(SHARES, {})


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["shares"] = session.config.stash.get(SHARES, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    shares = getattr(node, "workeroutput", {}).get("shares", {})
    node.config.stash.setdefault(SHARES, {}).update(shares)


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
