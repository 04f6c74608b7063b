"""HTML by functions: text is escaped wherever it comes in, and numbers read well."""

import math

import pytest

from idap.report import numbers
from idap.report.markup import Html, join, tag
from tests.report.runs import HOSTILE


def test_text_can_not_become_markup():
    found = tag("p", HOSTILE, tag("b", [HOSTILE, None, 3]), title=HOSTILE, data_name=HOSTILE)
    assert "<script" not in found and "<img" not in found
    assert found.count("<") == found.count(">") == 4
    assert 'title="&lt;script&gt;' in found and "&quot;&gt;&lt;img" in found


def test_elements_without_an_end_and_attributes_without_a_value():
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert tag("td", "", hidden=True, open=False, id=None, class_="a") == '<td hidden class="a"></td>'
    assert isinstance(join(["a", tag("b")]), Html)


@pytest.mark.parametrize("values", [[0.97, 0.93], [5.0], [0.0, 0.0], [-3.0, 8.0], [1e-9, 2e-9], [math.nan], []])
def test_a_linear_axis_holds_its_values_and_its_marks(values):
    axis = numbers.linear(values, room=0.05)
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 12
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert all(0 <= axis.place(value) <= 1 for value in values if math.isfinite(value))


@pytest.mark.parametrize("values", [[1e-9, 1.0], [0.5], [0.2, 0.3], [0.0], [], [3e5, 4e7], [math.inf, 1.0]])
def test_a_logarithmic_axis_holds_its_values_and_its_marks(values):
    axis = numbers.logarithmic(values)
    assert 0 < axis.low < axis.high
    assert len(axis.ticks) >= 1
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert axis.place(0.0) == 0


def test_numbers_that_are_none():
    assert (numbers.metric("loss", math.nan), numbers.metric("loss", -math.inf)) == ("not a number", "−inf")
    assert (numbers.time(math.nan), numbers.share(math.nan), numbers.small(math.nan)) == ("?", "?", "?")
    assert numbers.metric_change("accuracy", 0.9, 0.9) == "unchanged"
