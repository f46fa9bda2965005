"""The page of a report: one file, headings and tables, words from the README."""

import re

import numpy as np
import pages
import pytest
from pages import CURVES, figures, history

from ntk_callbacks.reporting.report_groups import HEADINGS, grouped, of_a_part
from ntk_callbacks.reporting.report_meanings import meaning_of, meanings, readme, unit
from ntk_callbacks.reporting.report_page import report_page
from ntk_callbacks.reporting.report_style import STYLE

runs = pages.runs


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


# Pictures ----------------------------------------------------------------------------


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
