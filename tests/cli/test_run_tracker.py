"""The estimate of the seconds to the target, from the progress so far."""

import pytest

from idap.cli.live import RunTracker, distance_covered
from tests.cli.statuses import status


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def decide(tracker, clock, *, at, step, macs, worked=True, **others):
    if worked:
        tracker.open()
        tracker.close()
    clock.now = at
    tracker.show(status(step=step, macs=macs, **others))


@pytest.fixture
def tracker(clock):
    tracker = RunTracker(clock)
    tracker.open()
    tracker.show(status(step=0, macs=1.0))
    return tracker


def test_unknown_before_anything_is_gained_and_when_the_target_is_reached(tracker, clock):
    assert tracker.seconds_left() is None
    decide(tracker, clock, at=10, step=1, macs=1.0)
    assert tracker.seconds_left() is None
    decide(tracker, clock, at=20, step=2, macs=0.5)
    assert tracker.seconds_left() is None


def test_unknown_without_a_target(clock):
    tracker = RunTracker(clock)
    tracker.show(status(step=0, macs=1.0, target=None))
    decide(tracker, clock, at=10, step=1, macs=0.9, target=None)
    assert tracker.seconds_left() is None


def test_the_pace_so_far(tracker, clock):
    decide(tracker, clock, at=10, step=1, macs=0.9)  # a fifth of the way
    assert tracker.seconds_left() == pytest.approx(40)
    clock.now = 15
    assert tracker.seconds_left() == pytest.approx(35)
    clock.now = 30
    assert tracker.seconds_left() == pytest.approx(
        30
    )  # one decision takes ten seconds; more of them bring the end no closer
    decide(tracker, clock, at=40, step=2, macs=0.9)  # rolled back
    assert tracker.seconds_left() == pytest.approx(160)
    decide(tracker, clock, at=50, step=3, macs=0.75)
    assert tracker.seconds_left() == pytest.approx(50)


def test_a_measurement_between_decisions_changes_nothing(tracker, clock):
    decide(tracker, clock, at=10, step=1, macs=0.9)
    tracker.open()
    clock.now = 12
    tracker.show(status(step=1, macs=0.9))
    tracker.close()
    assert tracker.seconds_left() == pytest.approx(38)


def test_recalled_decisions_say_nothing_about_the_pace(tracker, clock):
    decide(tracker, clock, at=0.1, step=1, macs=0.9)  # the phase of the run itself was opened before it
    decide(tracker, clock, at=0.2, step=2, macs=0.8, worked=False)
    assert tracker.seconds_left() is None
    decide(tracker, clock, at=10.2, step=3, macs=0.7)
    assert tracker.seconds_left() == pytest.approx(20)


def test_the_furthest_target_counts(clock):
    assert distance_covered(status(costs={"a": (0.75, 0.5), "b": (0.9, 0.6), "c": (0.1, None)})) == pytest.approx(0.25)
    assert distance_covered(status(costs={"a": (1.0, 1.0)})) == 1.0


def test_each_run_begins_anew(clock):
    tracker = RunTracker(clock)
    tracker.open()
    clock.now = 5
    tracker.show(status())
    assert tracker.seconds() == 5
    tracker.close()
    assert tracker.status is None
    clock.now = 60
    tracker.open()
    clock.now = 61
    assert tracker.seconds() == 1
    assert tracker.seconds_left() is None
