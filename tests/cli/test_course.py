"""How long the rest of a run may take, by the way to the target that was made."""

import pytest

from idap.cli.live import Course, distance_covered
from tests.cli.statuses import status


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def decide(course, clock, *, at, step, macs, worked=True, **others):
    if worked:
        course.open()
        course.close()
    clock.now = at
    course.show(status(step=step, macs=macs, **others))


@pytest.fixture
def course(clock):
    course = Course(clock)
    course.open()
    course.show(status(step=0, macs=1.0))
    return course


def test_unknown_before_anything_is_gained_and_when_the_target_is_reached(course, clock):
    assert course.seconds_left() is None
    decide(course, clock, at=10, step=1, macs=1.0)
    assert course.seconds_left() is None
    decide(course, clock, at=20, step=2, macs=0.5)
    assert course.seconds_left() is None


def test_unknown_without_a_target(clock):
    course = Course(clock)
    course.show(status(step=0, macs=1.0, target=None))
    decide(course, clock, at=10, step=1, macs=0.9, target=None)
    assert course.seconds_left() is None


def test_the_pace_so_far(course, clock):
    decide(course, clock, at=10, step=1, macs=0.9)  # a fifth of the way
    assert course.seconds_left() == pytest.approx(40)
    clock.now = 15
    assert course.seconds_left() == pytest.approx(35)
    clock.now = 30
    assert course.seconds_left() == pytest.approx(
        30
    )  # one decision takes ten seconds; more of them bring the end no closer
    decide(course, clock, at=40, step=2, macs=0.9)  # rolled back
    assert course.seconds_left() == pytest.approx(160)
    decide(course, clock, at=50, step=3, macs=0.75)
    assert course.seconds_left() == pytest.approx(50)


def test_a_measurement_between_decisions_changes_nothing(course, clock):
    decide(course, clock, at=10, step=1, macs=0.9)
    course.open()
    clock.now = 12
    course.show(status(step=1, macs=0.9))
    course.close()
    assert course.seconds_left() == pytest.approx(38)


def test_recalled_decisions_say_nothing_about_the_pace(course, clock):
    decide(course, clock, at=0.1, step=1, macs=0.9)  # the phase of the run itself was opened before it
    decide(course, clock, at=0.2, step=2, macs=0.8, worked=False)
    assert course.seconds_left() is None
    decide(course, clock, at=10.2, step=3, macs=0.7)
    assert course.seconds_left() == pytest.approx(20)


def test_the_furthest_target_counts(clock):
    assert distance_covered(status(costs={"a": (0.75, 0.5), "b": (0.9, 0.6), "c": (0.1, None)})) == pytest.approx(0.25)
    assert distance_covered(status(costs={"a": (1.0, 1.0)})) == 1.0


def test_each_run_begins_anew(clock):
    course = Course(clock)
    course.open()
    clock.now = 5
    course.show(status())
    assert course.seconds() == 5
    course.close()
    assert course.status is None
    clock.now = 60
    course.open()
    clock.now = 61
    assert course.seconds() == 1
    assert course.seconds_left() is None
