"""The plots of a report show the numbers, on axes that can be read."""

import math
import re

import numpy as np
import pages
import pytest
from pages import STEPS, figures, texts

from ntk_callbacks.reporting.report_axis import number, step_axis, value_axis
from ntk_callbacks.reporting.report_page import report_page
from ntk_callbacks.reporting.report_plot import Curve, Labels, line_plot

runs = pages.runs


def labels_of(svg, anchor):
    """(position, value) of the labels of one axis, read as a person reads them."""
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")

    def value(text):
        if text.startswith("10") and len(text) > 2 and text[2] in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹":
            return 10.0 ** int(text[2:].translate(superscripts))
        return float(text.replace("−", "-"))

    key = "y" if anchor == "end" else "x"
    return [
        (float(element.get(key)), value(element.text))
        for element in svg.iter("text")
        if element.get("text-anchor") == anchor
        and not element.get("class")
        and element.text
        and "×" not in element.text
    ]


def read_off(svg, color):
    """Values of the marks of one run, by their places between the labels."""
    ticks = labels_of(svg, "end")
    places, values = map(np.array, zip(*ticks, strict=True))
    logarithmic = any(
        "⁰" in t or "¹" in t or "⁻" in t for t in texts(svg) if t[:2] == "10"
    )
    values = np.log10(values) if logarithmic else values
    # Labels are 4 below the middle of their letters.
    slope, offset = np.polyfit(places - 4, values, 1)
    cy = np.array(
        [float(c.get("cy")) for c in svg.iter("circle") if c.get("class") == color]
    )
    found = slope * cy + offset
    return (10.0**found if logarithmic else found)[::-1]


def test_marks_lie_where_the_labels_say(runs):
    found = figures(report_page(runs))
    for tag, wanted in (
        ("ntk/trace", [8.0, 6.5, 9.25, 12.0]),
        ("ntk/condition_number", [3.0, 40.0, 9000.0]),
        ("mine/number", [-3.0, 2.0, -1.0, 5.0]),
        ("jacobian/log_std", [0.75] * 4),
        ("ntk/kernel_velocity", [0.5, 0.25, 0.125]),
    ):
        svg, _ = found[tag]
        for color, scale in (("run0", 1), ("run1", 2)):
            values = read_off(svg, color)
            np.testing.assert_allclose(values, np.array(wanted) * scale, rtol=0.03)


def test_marks_lie_over_their_steps(runs):
    svg, _ = figures(report_page(runs))["ntk/trace"]
    places, values = map(np.array, zip(*labels_of(svg, "middle"), strict=True))
    slope, offset = np.polyfit(places, values, 1)
    steps = [
        slope * float(circle.get("cx")) + offset
        for circle in svg.iter("circle")
        if circle.get("class") == "run0"
    ]
    np.testing.assert_allclose(steps[::-1], STEPS, atol=0.05)


def test_marks_say_the_values(runs):
    svg, _ = figures(report_page(runs))["ntk/trace"]
    said = [circle.find("title").text for circle in svg.iter("circle")]
    assert "narrow: 9.25 at 10" in said
    assert "wide: 24 at 20" in said
    assert len(said) == 8


def test_axes_have_units_and_are_logarithmic_over_two_decades(runs):
    found = figures(report_page(runs))
    assert "10²" in texts(found["ntk/condition_number"][0])
    assert not {"10⁰", "10⁻¹"} & {*texts(found["jacobian/log_std"][0])}
    assert "λ_max/λ_min [no unit]" in texts(found["ntk/condition_number"][0])
    assert "time of the measurement [s]" in texts(found["monitor/seconds"][0])
    assert "completed optimizer updates" in texts(found["ntk/trace"][0])
    assert any("[1/update]" in t for t in texts(found["ntk/kernel_velocity"][0]))
    assert "×10⁻⁶" in texts(found["params/displacement"][0])


def test_what_is_not_finite_leaves_a_gap_that_is_told(runs):
    svg, caption = figures(report_page(runs))["ntk/condition_number"]
    (path,) = [p.get("d") for p in svg.iter("path") if p.get("class") == "run0"]
    assert path.count("M") == 2
    assert "Not drawn: 2 values that are undefined or ∞." in caption


def test_a_single_gap_is_told_in_the_singular(runs):
    page = report_page({"narrow": runs["narrow"]})
    _, caption = figures(page)["ntk/kernel_velocity"]
    assert "Not drawn: 1 value that is undefined or ∞." in caption


def test_marks_say_late_steps_to_the_last_digit():
    curve = Curve(0, "run", [0, 1_234_567], [1.0, 2.0])
    assert ">run: 2 at 1234567<" in line_plot([curve], Labels("t", "d", "x", "y"), "p")


def test_spectra_are_drawn_first_and_last(runs):
    svg, _ = figures(report_page(runs))["ntk/eigenvalues_log10"]
    kinds = [p.get("class") for p in svg.iter("path") if "run" in p.get("class")]
    assert kinds == ["run0 faint", "run0", "run1 faint", "run1"]
    said = [circle.find("title").text for circle in svg.iter("circle")]
    assert "narrow, step 20: 100000 at 1" in said  # the largest comes first
    assert "narrow, step 20: 1000 at 3" in said


# Axes --------------------------------------------------------------------------

SPANS = [
    *([0.2, 1.0], [0.99995, 1.0], [0.0, 1e-9], [1e7, 5e7], [-3.0, 5.0], [-1e-6, 1e-6]),
    *([5.0], [0.0], [-2.0], [1e300], [1e-12, 3.0], [0.7, 90.0], [1e-300, 1e300]),
    *([-5.0, -4.0], [-5.0, -0.1], [1.0, 1.0 + 1e-13], [0.15, 20.0], [2.0, 999.0]),
    *([1.797e308], [-1.797e308, 1.797e308], [1.0, 1.7e308], [-5e-324], [5e-324, 1.0]),
    *([1e-320, 1e-310], [0.0, 5e-324], [-1e-320, 1.7e308], [-1.7e308, -1.0]),
]


@pytest.mark.parametrize("values", SPANS, ids=str)
def test_axis_holds_its_values_and_has_readable_ticks(values):
    axis = value_axis(values)
    for value in values:
        assert -1e-9 <= axis.position(value) <= 1 + 1e-9
    assert 2 <= len(axis.ticks) <= 9
    labels = [label for _, label in axis.ticks]
    assert len({*labels}) == len(labels)
    assert max(map(len, labels)) <= 8
    places = [axis.position(value) for value, _ in axis.ticks]
    assert places == sorted(places)
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([0, 1], ["0", "1"]),
        ([7], ["7"]),
        ([0, 1, 2, 5, 10, 100, 1000], ["0", "1", "10", "100", "1k"]),
        ([0, 250_000, 500_000], ["0", "100k", "200k", "300k", "400k", "500k"]),
    ],
)
def test_steps_are_labeled_by_whole_numbers(steps, labels):
    assert [label for _, label in step_axis(steps).ticks] == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12345.678, "12346"),
        (0.00012345, "0.0001234"),
        (-1.5e-7, "−1.5×10⁻⁷"),
        (2e10, "2×10¹⁰"),
        (math.inf, "∞"),
        (math.nan, "undefined"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_long_curves_are_thinned_and_keep_their_extremes():
    steps = [float(i) for i in range(50_000)]
    values = [math.sin(i / 500) for i in range(50_000)]
    values[12_345], values[33_333] = 9.0, -7.0
    svg = line_plot([Curve(0, "run", steps, values)], Labels("t", "d", "x", "y"), "k")
    assert len(svg) < 60_000
    drawn = re.search(r'class="run0" d="([^"]*)"', svg)[1]
    places = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn)]
    # -7 and 9 span 16; an axis has a margin of 4 % at both ends.
    height = 270 - 36 - 44
    assert max(places) - min(places) == pytest.approx(height / 1.08, abs=0.2)


def test_nothing_finite_is_said():
    svg = line_plot([Curve(0, "r", [0.0], [math.nan])], Labels("t", "d", "x", "y"), "k")
    assert "no finite value yet" in svg
