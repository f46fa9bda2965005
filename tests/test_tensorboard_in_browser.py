"""What a user sees: from an event file, through TensorBoard, to pixels in a browser."""

import io
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlencode
from urllib.request import urlopen

import event_files
import numpy as np
import pytest
from event_files import HISTOGRAMS, IMAGES, NTK_STEPS, SCALARS
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.support.ui import WebDriverWait

run = event_files.run

PATIENCE = 60  # seconds a page or a server may take on a busy machine

# TensorBoard itself.


def wait_for(condition, process, log):
    """Poll a server that is starting; its answer, or its log if it gives none."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if answer := condition():
                return answer
        except OSError:
            pass  # not listening yet
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard did not answer:\n{log.read_text()}")


def get(url, **query):
    with urlopen(f"{url}?{urlencode(query)}" if query else url, timeout=10) as answer:
        return answer.read()


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """Address of a TensorBoard that has read the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        *(sys.executable, "-m", "tensorboard.main", "--logdir", run.folder),
        *("--load_fast=false", "--host", "127.0.0.1", "--port", str(port)),
    ]
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as output,
        ended(subprocess.Popen(command, stdout=output, stderr=output)) as process,
    ):
        wait_for(
            # Images are the last thing the last measurement of the kernel writes.
            lambda: len(images_of(url, "ntk/kernel")) == len(NTK_STEPS),
            process,
            log,
        )
        yield url


def images_of(url, tag):
    address = f"{url}/data/plugin/images/images"
    return json.loads(get(address, run=".", tag=tag, sample=0))


def test_the_layout_is_written_once_and_every_chart_finds_a_curve(run, server):
    written = run.events.Tensors("custom_scalars__config__")
    assert len(written) == 1
    layout = json.loads(get(f"{server}/data/plugin/custom_scalars/layout"))
    assert [category["title"] for category in layout["category"]] == [
        *("spectrum", "drift", "isometry", "cost")
    ]
    tags = run.events.Tags()["scalars"]
    drawn = {
        pattern: [tag for tag in tags if re.match(pattern, tag)]
        for category in layout["category"]
        for chart in category["chart"]
        for pattern in chart["multiline"]["tag"]
    }
    on_demand = {pattern for pattern, found in drawn.items() if not found}
    assert all("sharpness" in pattern for pattern in on_demand), on_demand
    shown = {tag for found in drawn.values() for tag in found}
    assert {tag for tag in SCALARS if "_tensors/" not in tag} <= shown


@pytest.mark.parametrize(
    ("plugin", "expected"), [("scalars", SCALARS), ("histograms", HISTOGRAMS)]
)
def test_tensorboard_serves_every_curve_and_histogram(server, plugin, expected):
    address = f"{server}/data/plugin/{plugin}"
    tags = json.loads(get(f"{address}/tags"))["."]
    assert set(expected) <= set(tags)
    assert {
        tag: [
            step
            for _, step, _ in json.loads(get(f"{address}/{plugin}", run=".", tag=tag))
        ]
        for tag in expected
    } == expected


def test_tensorboard_serves_the_heat_maps(server, run):
    found = images_of(server, "ntk/kernel")
    assert [image["step"] for image in found] == NTK_STEPS
    address = f"{server}/data/plugin/images/individualImage"
    written = [event.encoded_image_string for event in run.events.Images("ntk/kernel")]
    assert [get(f"{address}?{image['query']}") for image in found] == written


# The browser.

# For every card of a page: its tag, and what is drawn in it. Dashboards hide both in
# nested shadow roots, which selectors alone do not enter.
CARDS = """
const [card, drawing] = arguments;
function* walk(root) {
  for (const element of root.querySelectorAll("*")) {
    yield element;
    if (element.shadowRoot) yield* walk(element.shadowRoot);
  }
}
const size = e => e.getTotalLength?.() ?? e.naturalWidth ?? e;
return [...walk(document)].filter(e => e.matches(card)).map(e => [
  e.tag ?? e.querySelector("tb-truncated-path")?.textContent,
  [...walk(e.shadowRoot ?? e)].filter(e => e.matches(drawing)).map(size),
]);
"""


def size(drawing):
    """Length of a path, width of an image; of a canvas how wide its curve is.

    Axes and grid of a chart are gray, the curve is in color. Its width is counted in
    columns that hold some, because TensorBoard draws a triangle where a value is NaN.
    """
    if isinstance(drawing, int | float):
        return drawing
    picture = Image.open(io.BytesIO(drawing.screenshot_as_png)).convert("RGB")
    in_color = np.ptp(np.asarray(picture).astype(int), axis=-1) > 20
    return int(in_color.any(axis=0).sum())


def sizes_drawn(browser, card, drawing):
    """Tag -> sizes of what its cards show."""
    found = {}
    for tag, drawings in browser.execute_script(CARDS, card, drawing):
        found.setdefault(tag, []).extend(map(size, drawings))
    return found


@pytest.fixture
def dashboard(browser, server, tmp_path):
    """Opens a dashboard, filtered by tags, and waits until they are drawn."""

    def show(name, tags):
        only = urlencode({"tagFilter": f"^({'|'.join(tags)})$"})
        browser.get("about:blank")  # a change after the # alone would not reload
        # The older dashboards read the filter after the #, Time Series before it.
        browser.get(f"{server}/?{only}&smoothing=0#{name}&{only}")

    def wait_until_drawn(card, drawing, expected, at_least):
        found = {}

        def all_there(_):
            found.update(sizes_drawn(browser, card, drawing))
            return all(
                sum(size >= at_least for size in found.get(tag, [])) >= count
                for tag, count in expected.items()
            )

        wait = WebDriverWait(
            browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException]
        )
        try:
            wait.until(all_there)
        except TimeoutException:
            pytest.fail(f"{card}: expected {expected} ≥ {at_least}, drawn is {found}")
        finally:
            browser.save_screenshot(tmp_path / f"{card}.png")

    return SimpleNamespace(show=show, wait_until_drawn=wait_until_drawn)


CURVES = ("ntk/trace", "params/displacement", "jacobian/log_std")

ONE_SLICE_PER_STEP = {tag: len(steps) for tag, steps in HISTOGRAMS.items()}


def test_time_series_shows_curves_spectra_and_kernel(dashboard):
    dashboard.show("timeseries", [*CURVES, *HISTOGRAMS, *IMAGES])
    dashboard.wait_until_drawn(
        "scalar-card", ".series-view canvas", dict.fromkeys(CURVES, 1), at_least=100
    )
    dashboard.wait_until_drawn(
        "histogram-card", ".histogram path", ONE_SLICE_PER_STEP, at_least=100
    )
    dashboard.wait_until_drawn("image-card", "img", {"ntk/kernel": 1}, at_least=256)


def test_scalars_dashboard_shows_curves(dashboard):
    dashboard.show("scalars", CURVES)
    dashboard.wait_until_drawn(
        "tf-scalar-card", "path.line", dict.fromkeys(CURVES, 1), at_least=100
    )


def test_histograms_dashboard_shows_spectra(dashboard):
    dashboard.show("histograms", HISTOGRAMS)
    dashboard.wait_until_drawn(
        "tf-histogram-loader", "path.outline", ONE_SLICE_PER_STEP, at_least=100
    )


def test_images_dashboard_shows_the_kernel(dashboard):
    dashboard.show("images", IMAGES)
    dashboard.wait_until_drawn(
        "tf-image-loader", "img", {"ntk/kernel": 1}, at_least=256
    )
