"""The two lines that show the status of a run."""

import io

import pytest
from rich.console import Console

from idap.cli.live import RunTracker, StatusView, in_brief
from tests.cli.statuses import status


def render_status(found, width=120, seconds=0.0):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    now = 0.0
    tracker = RunTracker(lambda: now)
    now = seconds
    if found is not None:
        tracker.show(found)
    console.print(StatusView(tracker))
    return console.file.getvalue().splitlines()


def test_nothing_is_shown_before_anything_is_known():
    assert render_status(None) == []


@pytest.mark.parametrize(
    ("profile", "width", "end"),
    [
        ((), 120, "0:05"),
        ((3.0,), 120, "0:05 | divergence █"),
        ((1e-6, 1e-5, 1e-4, 1e-3, 1e-2), 120, "0:05 | divergence ▁▃▅▇█, log scale"),
        ((1.0,) * 200, 120, f"0:05 | divergence {'█' * 77}"),
        ((1.0,) * 200, 60, f"0:05 | divergence {'█' * 17}"),
        ((1.0,) * 200, 50, f"0:05 | {'█' * 18}"),
        ((1.0,) * 200, 25, f"filters 3 | {'█' * 13}"),
    ],
)
def test_the_curve_takes_the_room_that_is_left(profile, width, end):
    line = render_status(status(profile=profile), width, seconds=5)[0]
    assert line.endswith(end)
    assert len(line) <= width


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (status(), "accuracy 0.9080, at least 0.9000 | 20% of the budget used"),
        (status(worst=None), "accuracy 0.9080"),
        (status(worst=0.91, metric=0.91), "accuracy 0.9100, at least 0.9100"),
        (status(metric=0.95), "accuracy 0.9500, at least 0.9000 | 0% of the budget used"),
        (
            status(metric_name="loss", baseline=2.0, worst=2.5, metric=2.25, higher_is_better=False),
            "loss 2.2500, at most 2.5000 | 50% of the budget used",
        ),
        (
            status(metric_name="loss", baseline=2.0, worst=2.5, metric=1.5, higher_is_better=False),
            "loss 1.5000, at most 2.5000 | 0% of the budget used",
        ),
    ],
)
def test_the_metric_and_its_budget(found, line):
    assert render_status(found)[1] == f"MACs 80.0% → 50.0% | parameters 90.0% | {line}"


def test_no_target():
    assert render_status(status(target=None))[1].startswith("MACs 80.0% | parameters 90.0% | accuracy")
    assert render_status(status(target=None, worst=None), width=30)[1] == "accuracy 0.9080"


def test_costs_with_a_target_stay_longest():
    costs = {"MACs": (0.8, 0.5), "parameters": (0.9, 0.6), "latency": (0.95, None)}
    assert render_status(status(costs=costs), width=66)[1] == (
        "MACs 80.0% → 50.0% | parameters 90.0% → 60.0% | accuracy 0.9080"
    )
    assert render_status(status(costs=costs), width=30)[1] == "MACs 80.0% → 50.0% | paramete…"


def test_a_target_that_is_reached_is_green():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard")
    tracker = RunTracker(lambda: 0.0)
    for macs in (0.8, 0.5):
        tracker.show(status(macs=macs))
        console.print(StatusView(tracker))
    drawn = console.file.getvalue()
    assert "\x1b[1m80.0%\x1b[0m" in drawn
    assert "\x1b[1;32m50.0%\x1b[0m" in drawn


def test_in_brief():
    assert in_brief(status(worst=None), ascii_only=True) == "MACs 80.0% -> 50.0% | parameters 90.0% | accuracy 0.9080"
