"""The Custom Scalars page: its charts name the curves that there are."""

import re

import pytest

from ntk_callbacks.reporting.report_meanings import meanings, readme
from ntk_callbacks.reporting.scalar_layout import CHARTS, scalar_layout

TAGS = [*meanings(readme())]  # every scalar of every monitor, see test_readme.py
NAMES = [
    name for charts in CHARTS.values() for tags in charts.values() for name in tags
]
# Of a scale that no other curve has, and on demand: a chart would be empty elsewhere.
ALONE = {
    *("linear/parting_step", "linear/twin_parting_step"),
    *("ntk/subspace_angle", "ntk/class_ratio", "ntk/batchnorm_gap"),
    "ntk/sharpness_ratio",
}


def alternatives(name):
    """Each name that a pattern spells out."""
    optional = re.sub(r"\(([^()]*)\)\?", r"(\1|)", name)
    found = re.search(r"\(([^()]*)\)", optional)
    if found is None:
        return [optional]
    words = [optional.replace(found[0], word, 1) for word in found[1].split("|")]
    return [word for part in words for word in alternatives(part)]


def test_alternatives_are_spelled_out():
    assert alternatives("a/(b|c)_x(_y)?") == ["a/b_x_y", "a/b_x", "a/c_x_y", "a/c_x"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_a_chart_is_that_of_a_curve(name):
    for pattern in alternatives(name):
        assert any(re.fullmatch(pattern, tag) for tag in TAGS), pattern


def test_every_curve_is_in_a_chart():
    layout = scalar_layout({tag.partition("/")[0] for tag in TAGS})
    patterns = [
        p for charts in layout.values() for _, ps in charts.values() for p in ps
    ]
    missing = {tag for tag in TAGS if not any(re.match(p, tag) for p in patterns)}
    assert missing == ALONE
