"""Every test draws the same random numbers; a browser for those that look at pages."""

import os
import shutil

import pytest
import torch

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
