"""The table at the end of a run: complete, aligned, and honest about gaps."""

import math

from ntk_callbacks.reporting.summary import summary_table


def cells(table):
    """Rows of a table as lists of its three columns."""
    return [
        [cell.strip() for cell in line.split("   ") if cell.strip()]
        for line in table.splitlines()
    ]


def test_first_and_last_value_of_every_quantity_with_their_steps():
    history = [
        (0, {"ntk/trace": 1.0, "ntk/entropy_rank": 4.0}),
        (5, {"ntk/trace": 7.0, "ntk/entropy_rank": 9.0}),
        (10, {"ntk/trace": 2.5, "ntk/entropy_rank": 3.0}),
    ]
    assert cells(summary_table([history])) == [
        ["quantity", "first (step)", "last (step)"],
        ["ntk/trace", "1 (0)", "2.5 (10)"],
        ["ntk/entropy_rank", "4 (0)", "3 (10)"],
    ]


def test_columns_are_aligned():
    history = [
        (0, {"a": 1.0, "a/much/longer_name": -1.25e-12}),
        (123456, {"a": 2.0, "a/much/longer_name": 98765.4321}),
    ]
    assert summary_table([history]).splitlines() == [
        "quantity              first (step)          last (step)",
        "a                            1 (0)           2 (123456)",
        "a/much/longer_name   -1.25e-12 (0)   9.877e+04 (123456)",
    ]


def test_several_histories_follow_one_another():
    kernel = [(0, {"ntk/trace": 1.0}), (4, {"ntk/trace": 2.0})]
    params = [(0, {"params/displacement": 0.0}), (3, {"params/displacement": 0.5})]
    assert cells(summary_table([kernel, [], params]))[1:] == [
        ["ntk/trace", "1 (0)", "2 (4)"],
        ["params/displacement", "0 (0)", "0.5 (3)"],
    ]


def test_the_same_quantity_of_two_monitors_has_two_rows():
    first = [(0, {"ntk/trace": 1.0})]
    second = [(0, {"ntk/trace": 5.0})]
    assert cells(summary_table([first, second]))[1:] == [
        ["ntk/trace", "1 (0)", "1 (0)"],
        ["ntk/trace", "5 (0)", "5 (0)"],
    ]


def test_a_quantity_that_comes_late_or_goes_early_says_so():
    history = [(0, {"gone": 1.0}), (5, {"gone": 2.0, "late": 3.0}), (9, {"late": 4.0})]
    assert cells(summary_table([history]))[1:] == [
        ["gone", "1 (0)", "2 (5)"],
        ["late", "3 (5)", "4 (9)"],
    ]


def test_values_that_are_not_finite_are_shown():
    history = [(0, {"velocity": math.nan}), (7, {"velocity": math.inf})]
    assert cells(summary_table([history]))[1:] == [["velocity", "nan (0)", "inf (7)"]]


def test_a_history_that_starts_late_shows_where():
    history = [(1000, {"ntk/trace": 3.0}), (2000, {"ntk/trace": 4.0})]
    assert cells(summary_table([history]))[1:] == [
        ["ntk/trace", "3 (1000)", "4 (2000)"]
    ]


def test_a_resumed_history_goes_on():
    saved = [(0, {"ntk/trace": 1.0}), (10, {"ntk/trace": 2.0})]
    resumed = [*saved, (20, {"ntk/trace": 3.0})]
    assert cells(summary_table([resumed]))[1:] == [["ntk/trace", "1 (0)", "3 (20)"]]


def test_an_iterator_of_histories_is_read_once():
    histories = iter([[(0, {"a": 1.0})], [(0, {"b": 2.0})]])
    assert len(summary_table(histories).splitlines()) == 3


def test_without_measurements_the_table_says_so():
    for histories in ([], [[]], [[], []], [[(0, {})]]):
        assert summary_table(histories) == "No measurement was taken."
