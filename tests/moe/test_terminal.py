"""Reports as files: valid JSON, whatever the figures are."""

import json
from math import inf, nan

import pytest

from cachemoe.moe.terminal import save_report


def test_every_figure_that_is_not_finite_is_null_and_says_why(tmp_path):
    report = {"a": 1.5, "rows": [{"b": nan, "c": [1.0, inf, nan], "d": {"e": -inf}}, {"b": 2, "f": (3.0, None)}]}
    save_report(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    why = {"b": "nan: computed from figures that are not finite"}
    why["c"] = "inf: more than a float holds; nan: computed from figures that are not finite"
    first = {"b": None, "c": [1.0, None, None], "d": {"e": None, "not_finite": {"e": "-inf: less than a float holds"}}}
    expected = {"a": 1.5, "rows": [first | {"not_finite": why}, {"b": 2, "f": [3.0, None]}]}
    assert json.loads(text, parse_constant=pytest.fail) == expected
