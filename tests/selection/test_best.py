"""The power that leaves the lowest loss."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.errors import TaskError
from idap.selection.ranking import best_of

LOSSES = st.lists(st.floats(0, 10) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=5)


@given(LOSSES.filter(lambda losses: any(map(math.isfinite, losses))))
def test_it_is_the_first_of_the_lowest_finite_loss(losses):
    powers = [place / 4 for place in range(len(losses))]
    candidates = {power: {"a": tuple(range(place + 1))} for place, power in enumerate(powers)}
    found = best_of(candidates, lambda keep: losses[len(keep["a"]) - 1])
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert found == powers[losses.index(min(finite))]


def test_equal_candidates_are_measured_once():
    seen = []

    def loss(keep):
        seen.append(keep)
        return -float(keep["a"][0])

    candidates = {0.0: {"a": (1,)}, 0.5: {"a": (2,)}, 1.0: {"a": (2,)}}
    assert best_of(candidates, loss) == 0.5
    assert seen == [{"a": (1,)}, {"a": (2,)}]


def test_no_finite_loss_is_an_error():
    with pytest.raises(TaskError, match=r"^none of the cuts 0\.0, 0\.5 leaves a finite calibration loss; remove less"):
        best_of({0.0: 1, 0.5: 2}, lambda _: math.nan)
