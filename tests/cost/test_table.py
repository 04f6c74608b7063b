"""The latency table as data: what it says of a model, and what of a file is not believed."""

import copy
import json

import pytest

from idap.cost.latency import Curve, LatencyTable, positive_seconds, table_from

TABLE = LatencyTable(
    batch=4,
    device="cpu",
    threads=1,
    curves=(
        Curve((4, 8), (5.0, 9.0), (0.1, 0.2)),  # 1 + width
        Curve((5, 10), (10.0, 20.0), (0.3, 0.4)),
        Curve((2, 4, 8), (9.0, 9.0, 9.0), (0.0, 0.0, 0.0)),
    ),
    layers={"first": {"a": 0}, "second": {"a": 2, "b": 1}, "again": {"a": 0}},
    fixed={"head": 2.0},
    unmeasured=("cumsum",),
)


def test_a_group_takes_what_all_of_its_layers_take():
    assert TABLE.groups == ("a", "b")
    found = TABLE.curve("a")
    assert found.widths == (2, 4, 8)
    assert found.seconds == pytest.approx((19.0, 19.0, 27.0))
    assert found.spread == pytest.approx((0.2, 0.2, 0.4))


def test_narrower_groups_multiply():
    # "second" is 9 s by the curve of its first group, and half of that with half of b.
    assert TABLE.seconds({}) == TABLE.seconds({"a": 8, "b": 10}) == 9 + 9 + 9 + 2
    assert TABLE.seconds({"a": 4, "b": 5}) == pytest.approx(5 + 5 + 9 / 2 + 2)
    assert TABLE.seconds({"a": 4}, gone={"again", "head"}) == pytest.approx(5 + 9)


def test_seconds_of_a_unit_are_those_that_half_of_the_group_saves():
    assert TABLE.unit_seconds({"a": 8, "b": 10}) == pytest.approx({"a": (4 + 4) / 4, "b": 4.5 / 5})
    assert set(TABLE.unit_seconds({"a": 1, "b": 4})) == {"b"}
    unknown = TABLE.unit_seconds({"a": 8, "other": 10}, gone={"second"})
    assert unknown == pytest.approx(positive_seconds({"a": 2.0, "other": 0.0}))


def test_a_unit_of_which_no_layer_is_left_takes_nothing():
    assert TABLE.unit_seconds({"a": 8, "b": 10}, gone={"second"}) == pytest.approx({"a": 2.0})


def test_it_survives_a_file():
    assert table_from(json.loads(json.dumps(TABLE.to_json()))) == TABLE


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (("format",), 2, "expected format 1, found 2"),
        (("batch",), "4", "expected a whole number, found '4'"),
        (("curves", 0, "widths"), [8, 4], "expected ascending numbers"),
        (("curves", 0, "seconds"), [1.0], "seconds above 0 and a spread for each"),
        (("curves", 0, "seconds"), [0.0, 1.0], "seconds above 0"),
        (("curves", 0, "seconds"), [1.0, float("nan")], "expected seconds of at least 0, found nan"),
        (("curves", 0, "seconds"), [1.0, 10**400], "expected seconds of at least 0"),
        (("curves", 0, "spread"), [True, 1.0], "expected seconds of at least 0, found True"),
        (("curves",), {}, "expected a list"),
        (("layers", "first"), {"a": 3}, "layer 'first' has no curve"),
        (("layers", "first"), {}, "layer 'first' has no curve"),
        (("fixed",), {"head": -1}, "expected seconds of at least 0, found -1"),
        (("more",), 1, "expected the keys"),
    ],
)
def test_what_is_no_table_is_refused(place, value, what):
    data = copy.deepcopy(TABLE.to_json())
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises((TypeError, ValueError), match=what):
        table_from(data)
