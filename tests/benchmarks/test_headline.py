"""The first table and the pictures: means over seeds, the earlier protocol where today's has nothing."""

from xml.etree import ElementTree

import pytest

from benchmarks.headline import EARLIER, PROTOCOL, Point, cell, corrections, criteria, headline, point
from benchmarks.plots import FEWER, LEFT, SCALES, SERIES, TOP, Field, Line, picture, pictures


def row(**changed):
    base = {"network": "resnet56", "target": "1/3", "method": "idap: filters", "protocol": PROTOCOL, "seed": 0}
    return base | {"macs_ratio": 3.0, "before": 80.0, "after": 90.0} | changed


def original(network):
    return {"network": network, "target": "original", "method": "original", "protocol": PROTOCOL, "accuracy": 93.19}


def quality(criterion, value, **changed):
    base = {"subject": "resnet56", "task": "inner macs 1/3", "ranking": "global", "power": 0.0, "seed": 0}
    return (
        base
        | {"criterion": criterion, "corrected": "least squares", "cuts": 1, "samples": 512}
        | {"quality": value}
        | changed
    )


def test_a_point_is_the_mean_over_seeds():
    rows = [row(), row(seed=1, after=91.0), row(protocol=EARLIER, after=10.0)]
    assert point(rows, "resnet56", "1/3", "idap: filters") == Point(3.0, 80.0, 90.5, seeds=2, earlier=False)


def test_the_earlier_protocol_stands_in_and_is_marked():
    found = point([row(protocol=EARLIER)], "resnet56", "1/3", "idap: filters")
    assert found is not None and found.earlier
    assert cell(found) == "80.0 → **90.0** †"


def test_nothing_measured_is_an_empty_cell():
    assert point([row()], "resnet20", "1/3", "idap: filters") is None
    assert cell(None) == "–"


def test_the_first_table_ends_with_the_original():
    found = headline([row(), original("resnet56"), original("resnet20")])
    assert "| idap, filters alone | – | 80.0 → **90.0** | – | – |" in found
    assert found[-2] == "| original | 93.2 | 93.2 | 93.2 | 93.2 |"


def test_criteria_rank_as_they_do_by_default_and_rivals_get_their_better_ranking():
    places = [(subject, task) for subject in ("resnet56", "resnet20") for task in ("inner macs 1/2", "inner macs 1/3")]
    rows = []
    for subject, task in places:
        at = {"subject": subject, "task": task}
        rows += [
            quality("paper", 70.0, power=1.0, **at),
            quality("paper", 99.0, **at),
            quality("innovation", 80.0, **at),
        ]
        rows += [
            quality("torch-pruning fpgm", 60.0, **at),
            quality("torch-pruning fpgm", 65.0, ranking="uniform", **at),
        ]
    found = criteria(rows)
    assert found[2:5] == [
        "| `innovation` | score | 80.00 | 80.00 | 80.00 | 80.00 |",
        "| `paper` | score per MAC | 70.00 | 70.00 | 70.00 | 70.00 |",
        "| torch-pruning fpgm | the better of two | 65.00 | 65.00 | 65.00 | 65.00 |",
    ]


def test_corrections_end_with_the_default():
    found = corrections([quality("innovation", 87.0), quality("innovation", 17.0, corrected="none")])
    assert found[2:4] == ["| none |  | 17.00 |  |  |", "| least squares |  | 87.00 |  |  |"]


@pytest.mark.parametrize("file", pictures(), ids=lambda file: file.name)
def test_the_committed_pictures_are_those_of_the_results(file):
    assert file.read_text(encoding="utf-8") == pictures()[file], "run python benchmarks/plots.py"


@pytest.mark.parametrize("file", pictures(), ids=lambda file: file.name)
def test_every_mark_lies_in_its_field(file):
    marks = [node for node in ElementTree.parse(file).iter() if node.get("transform")]
    assert len(marks) >= 2 * 2 * len(SERIES)
    for node in marks:
        x, y = map(float, node.attrib["transform"].removeprefix("translate(").removesuffix(")").split())
        if list(node):  # those of the legend have no title
            assert LEFT <= x <= 860 and TOP <= y <= TOP + 264


def test_the_axes_put_numbers_in_their_places():
    field = Field(LEFT, "net", SCALES["cut"]["resnet56"], 93.0, ())
    assert field.x(FEWER[0]) == LEFT
    assert field.y(100) == TOP
    assert field.y(50) == TOP + 132


def test_words_of_a_picture_are_escaped():
    line = Line("fpgm", "square", "a < b", ((2.0, 50.0, True),))
    drawn = picture("x & y", "z", [Field(LEFT, "net", (0, 100, 20), 93.0, (line,))], ["n < m"])
    assert "hollow" in drawn
    assert {"x & y", "n < m"} <= {node.text for node in ElementTree.fromstring(drawn).iter()}
