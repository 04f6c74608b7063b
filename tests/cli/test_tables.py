"""The closing table says what changed, in units that people read."""

import io

import pytest
from rich.console import Console

from idap.cli.tables import Comparison, comparison_table

FULL = Comparison(
    parameters=(269_722, 130_000),
    macs=(40_551_424, 20_200_000),
    metric_name="accuracy",
    val=(0.92, 0.9234),
    test=(0.9173, 0.9101),
    latency=(0.0102, 0.0051),
    batch=128,
)


def rows(numbers):
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison_table(numbers))
    return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]


def test_every_number():
    shown = [" ".join(row) for row in rows(FULL)]
    assert shown[0] == "before after change"
    assert shown[2:] == [
        "parameters 269,722 130,000 −51.8%",
        "MACs per sample 40.55 M 20.20 M −50.2%",
        "latency, batch of 128 10.20 ms 5.10 ms −50.0%",
        "accuracy (validation) 92.00% 92.34% +0.34 points",
        "accuracy (test) 91.73% 91.01% −0.72 points",
    ]


def test_what_was_not_measured_is_left_out():
    shown = [
        " ".join(row) for row in rows(Comparison(parameters=(10, 5), macs=(900, 0), metric_name="loss", val=(2, 3)))
    ]
    assert shown[2:] == ["parameters 10 5 −50.0%", "MACs per sample 900 0 −100.0%", "loss (validation) 2 3 +1"]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1500, "1.50 k"), (41_000_000, "41.00 M"), (4.1e9, "4.10 G")]
)
def test_large_numbers(count, text):
    shown = rows(Comparison(parameters=(1, 1), macs=(int(count), 1), metric_name="x", val=(0, 0)))
    assert text in " ".join(shown[3])


def test_plain_numbers():
    assert FULL.to_json()["macs"] == {"before": 40_551_424, "after": 20_200_000}
    assert FULL.to_json()["batch"] == 128
