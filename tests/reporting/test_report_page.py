"""The page of a report: its plots show the numbers, its words are the README's."""

import math
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from ntk_callbacks import load_history
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile
from ntk_callbacks.reporting.report_axis import number, step_axis, value_axis
from ntk_callbacks.reporting.report_groups import HEADINGS, grouped, of_a_part
from ntk_callbacks.reporting.report_meanings import meaning_of, meanings, readme, unit
from ntk_callbacks.reporting.report_page import report_page
from ntk_callbacks.reporting.report_plot import Curve, Labels, line_plot
from ntk_callbacks.reporting.report_style import STYLE

STEPS = [0, 5, 10, 20]
CURVES = {
    "ntk/trace": [8.0, 6.5, 9.25, 12.0],
    "ntk/condition_number": [3.0, 40.0, math.inf, 9000.0],
    "ntk/kernel_velocity": [math.nan, 0.5, 0.25, 0.125],
    "params/displacement": [0.0, 1e-6, 2e-6, 4e-6],
    "params_tensors/displacement/net.0.weight": [0.0, 0.1, 0.2, 0.3],
    "jacobian/log_std": [0.75, 0.75, 0.75, 0.75],
    "monitor/seconds": [0.1, 0.2, 0.1, 0.1],
    "mine/number": [-3.0, 2.0, -1.0, 5.0],
}


def history(folder, curves=CURVES, digest="a" * 64, scale=1.0):
    files = {}
    after = -1
    for i, step in enumerate(STEPS):
        for name in {tag.split("/")[0].split("_")[0] for tag in curves}:
            file = files.setdefault(name, HistoryFile(Path(folder, FOLDER), name))
            file.conventions = {"probe_digest": digest, "outputs": "full"}
            scalars = {
                tag: values[i] * scale
                for tag, values in curves.items()
                if tag.split("/")[0].split("_")[0] == name
            }
            vectors = {}
            if name == "ntk":
                vectors["ntk/eigenvalues_log10"] = torch.tensor([0.0, 2.0, 1.0]) + i
            file.append(Measurement(step, scalars, vectors), after)
        after = step
    return load_history(folder)


@pytest.fixture
def runs(tmp_path):
    return {
        "narrow": history(tmp_path / "a"),
        "wide": history(tmp_path / "b", scale=2.0),
    }


def figures(page):
    """Tag -> (its SVG, its caption)."""
    pattern = r"<figure><h3>([^<]*)</h3>(<svg.*?</svg>)<figcaption>(.*?)</figcaption>"
    found = re.findall(pattern, page)
    assert len({tag for tag, _, _ in found}) == len(found)
    return {tag: (ElementTree.fromstring(svg), text) for tag, svg, text in found}


def texts(svg):
    return [element.text for element in svg.iter("text")]


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


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("ntk/subspace_angle", "rad"),
        ("linear/twin_parting_step", "update"),
        ("signal/xi_c", "layers"),
        ("ntk/subspace_overlap", "no unit"),
    ],
)
def test_units_of_what_has_one(tag, expected):
    assert unit(tag) == expected


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


def test_headings_are_in_order_and_parts_are_folded(runs):
    page = report_page(runs)
    assert re.findall(r'<section id="(\w+)">', page) == [
        *("spectrum", "drift", "isometry", "parameters", "other", "cost")
    ]
    folded = page[page.index("curves of single parts") :]
    assert "params_tensors/displacement/net.0.weight" in folded
    assert {*grouped(CURVES)} <= {*HEADINGS}


def test_last_values_are_in_a_table(runs):
    page = report_page(runs)
    row = re.search(r"<tr><th>ntk/trace</th>(.*?)</tr>", page)[1]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == ["Σ λ", "≥ 0", "12", "24"]
    assert row.count('title="step 20"') == 2


def test_runs_that_lack_a_quantity(tmp_path):
    few = {"ntk/trace": CURVES["ntk/trace"]}
    runs = {"few": history(tmp_path / "a", few), "all": history(tmp_path / "b")}
    svg, _ = figures(report_page(runs))["params/displacement"]
    assert {c.get("class") for c in svg.iter("circle")} == {"run1"}
    row = re.search(r"<tr><th>params/displacement</th>(.*?)</tr>", report_page(runs))[1]
    assert "<td>–</td>" in row


def test_different_probes_are_pointed_out(tmp_path):
    same = {name: history(tmp_path / name) for name in "ab"}
    assert "compare with care" not in report_page(same)
    other = history(tmp_path / "c", digest="b" * 64)
    page = report_page({**same, "c": other})
    assert page.count("compare with care") == 1
    (warning,) = re.findall(r'<p class="warning">(.*?)</p>', page)
    assert warning.endswith("were measured on different examples: compare with care.")
    monitors = {f"{tag.split('/')[0].split('_')[0]}/…" for tag in CURVES}
    assert {*warning.partition(" were ")[0].split(", ")} == monitors


def test_one_monitor_with_other_examples_is_pointed_out(tmp_path):
    few = {"ntk/trace": CURVES["ntk/trace"]}
    runs = {name: history(tmp_path / name, few, digest=name * 64) for name in "ab"}
    page = report_page(runs)
    assert "ntk/… was measured on different examples: compare with care." in page


# One page, nothing else --------------------------------------------------------------


def test_page_fetches_nothing_and_runs_nothing(runs):
    # Pictures are part of the page.
    page = re.sub(
        r'src="data:image/png;base64,[\w+/=]+"', "", report_page(runs)
    ).lower()
    for word in ("http", "src=", "url(", "@import", "<script", "<link", "javascript:"):
        assert word not in page
    assert {*re.findall(r'href="(.)', page)} == {"#"}


def test_names_and_notes_are_escaped(tmp_path):
    name = """<script>alert("1")</script> & 'so' <b>"""
    page = report_page({name: history(tmp_path)}, {name: "<i>note</i>"})
    assert "<script" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;" in page
    svg, _ = figures(page)["ntk/trace"]
    assert any(name in circle.find("title").text for circle in svg.iter("circle"))


def test_every_plot_has_a_title_and_a_description_of_its_own(runs):
    page = report_page(runs)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len({*ids})
    for svg, _ in figures(page).values():
        assert svg.get("role") == "img"
        title, description = svg.get("aria-labelledby").split()
        assert svg.find("title").get("id") == title
        assert svg.find("desc").get("id") == description
        assert svg.find("title").text
        assert svg.find("desc").text


def test_more_runs_than_colors_are_told_apart_by_dashes(tmp_path):
    one = history(tmp_path)
    page = report_page({f"run {i}": one for i in range(10)})
    svg, _ = figures(page)["ntk/trace"]
    styles = [
        (p.get("class"), p.get("stroke-dasharray"))
        for p in svg.iter("path")
        if p.get("class", "").startswith("run")
    ]
    assert len({*styles}) == 10


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colors_can_be_seen_on_their_grounds(mode):
    """WCAG 2.2: 3:1 for curves, 4.5:1 for text."""
    light, dark = STYLE.split("@media (prefers-color-scheme:dark)")
    part = {"light": light, "dark": dark}[mode].replace("#fff;", "#ffffff;")
    colors = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", part))
    curves = [name for name in colors if name.startswith("run")]
    assert len(curves) == 8
    for ground in ("ground", "raised"):
        for name in (*curves, "ink", "soft"):
            pair = sorted([luminance(colors[name]), luminance(colors[ground])])
            contrast = (pair[1] + 0.05) / (pair[0] + 0.05)
            assert contrast >= (3 if name in curves else 4.5), (name, ground)


def test_no_run():
    with pytest.raises(ValueError, match="at least one run"):
        report_page({})


# Words -------------------------------------------------------------------------


def test_words_are_those_of_the_readme(runs):
    found = figures(report_page(runs))
    assert found["jacobian/log_std"][1] == (
        "0: dynamical isometry up to scale; ∞: singular, as behind a layer narrower "
        "than c and d; not where there are more than 1024 values of each example"
    )
    assert "0: dynamical isometry up to scale" in readme()


@pytest.mark.parametrize(
    "tag",
    [
        *(
            "ntk/trace",
            "ntk/eigenvalue_max",
            "ntk/eigenvalue_min",
            "ntk/kernel_distance",
        ),
        *("params/displacement", "params/path_length", "jacobian/singular_value_min"),
        *("ntk_test/trace", "ntk/train/trace", "jacobian_test/log_std"),
    ],
)
def test_every_tag_finds_its_row(tag):
    row = meaning_of(tag, meanings(readme()))
    assert row.formula
    assert row.range
    assert row.reading


def test_unknown_tags_find_none():
    table = meanings(readme())
    for tag in ("mine/trace", "ntkx/trace", "ntk/mine", "trace"):
        assert not meaning_of(tag, table).reading


def test_rows_with_escaped_bars_and_other_tables():
    text = (
        "| tag | formula | range | what |\n|---|---|---|---|\n"
        "| `a/b` | \\|x\\| | ≥ 0 | y |\n\n"
        "| experiment | a | b | c |\n|---|---|---|---|\n| `no/tag` | 1 | 2 | 3 |\n"
    )
    table = meanings(text)
    assert [*table] == ["a/b"]
    assert table["a/b"].formula == "|x|"


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


# Pictures ----------------------------------------------------------------------------


def pictures(page):
    """Title -> pixels (height, width, 3) of every embedded image."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page)
    return {
        title: np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGB"))
        for title, data in found
    }


def kept(folder, matrices):
    file = HistoryFile(Path(folder, FOLDER), "ntk", matrices=True)
    file.conventions = {"outputs": "full"}
    after = -1
    for step, matrix in matrices.items():
        vectors = {"ntk/eigenvalues_log10": torch.tensor([0.0, 1.0]) + step}
        found = {"ntk/kernel": torch.tensor(matrix)}
        file.append(Measurement(step, {"ntk/trace": 1.0}, vectors, found), after)
        after = step
    return load_history(folder)


def test_first_and_last_kernel_of_each_run_in_the_same_colors(tmp_path):
    steps = {0: [[1.0, 0.0], [0.0, 1.0]], 3: [[9.0, 9.0]] * 2, 7: [[2.0, 1.0]] * 2}
    runs = {
        "a<b": kept(tmp_path / "a", steps),
        "one": kept(tmp_path / "b", {0: [[5.0]]}),
    }
    found = pictures(report_page(runs))
    kernels = {title: image for title, image in found.items() if "kernel" in title}
    assert [*kernels] == [
        "ntk/kernel: a&lt;b, step 0",
        "ntk/kernel: a&lt;b, step 7",
        "ntk/kernel: one, step 0",
    ]
    first, last, _ = kernels.values()
    dark, yellow = (68, 1, 84), (253, 231, 37)
    side = first.shape[0] // 2
    assert tuple(first[0, side]) == dark  # 0, the smallest of both
    assert tuple(last[0, 0]) == yellow  # 2, the largest
    assert tuple(first[0, 0]) == tuple(last[0, side])  # 1 in both
    assert tuple(first[0, 0]) not in (dark, yellow)


def test_spectra_over_the_steps_of_each_run(tmp_path):
    steps = {step: [[1.0]] for step in (0, 3, 7)}
    runs = {"a": kept(tmp_path / "a", steps), "one": kept(tmp_path / "b", {0: [[5.0]]})}
    page = report_page(runs)
    assert "ntk/eigenvalues_log10 over the steps: a" in pictures(page)
    assert "over the steps: one" not in page  # a single step is no course


@pytest.mark.parametrize(
    "tag",
    [
        *("ntk_modules/trace/a", "ntk_modes/residual/1", "signal_layers/q/a"),
        *("features_layers/dead_units/a", "jacobian_time/step/a"),
        *("params_tensors/displacement/a", "prediction_classes/loss_change_actual/1"),
    ],
)
def test_quantities_of_single_parts_are_folded_away(tag):
    assert of_a_part(tag)
    assert not of_a_part(tag.replace("_", "/", 1))
