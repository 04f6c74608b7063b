"""Steps of a measured curve: found where there are some, and never invented by noise."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from idap.cost.latency import Curve
from idap.selection.rounding import MULTIPLES, probes, step_of

SIZES = st.integers(1, 2100)
ROOMY = st.sampled_from([64, 96, 128, 200, 256, 384, 512, 1000, 2048])
"""Sizes with several places for multiples of 16."""


def curve(size, seconds, spread=1e-9):
    widths = probes(size)
    return Curve(widths, tuple(map(seconds, widths)), (spread,) * len(widths))


@given(SIZES)
def test_probes_are_ascending_and_end_with_the_whole(size):
    widths = probes(size)
    assert widths == tuple(sorted(set(widths)))
    assert widths[0] >= 1
    assert widths[-1] == size
    assert len(widths) <= 4 + 3 * (2 + len(MULTIPLES))


@given(ROOMY, st.sampled_from([4, 8, 16]), st.floats(0, 10), st.floats(0.1, 10))
def test_padding_is_found_whatever_lies_under_it(size, multiple, fixed, unit):
    assume(unit * multiple > 0.02 * (fixed + unit * size))  # a step that is worth it
    assert step_of(curve(size, lambda width: fixed + unit * -(-width // multiple) * multiple)) == multiple


@given(ROOMY, st.sampled_from([8, 16]), st.floats(0.7, 3))
def test_widths_that_run_slower_are_found(size, multiple, penalty):
    def seconds(width):
        return width + (penalty * multiple if width % multiple else 0)

    assume(multiple > 0.02 * size)
    assert step_of(curve(size, seconds)) == multiple


@given(SIZES, st.floats(0, 1e3), st.floats(0, 10), st.floats(0.8, 1.3))
def test_a_slope_has_no_steps(size, fixed, unit, power):
    assert step_of(curve(size, lambda width: 1e-3 + fixed + unit * width**power)) == 1


@given(SIZES, st.floats(1e-3, 1e3), st.floats(0, 10), st.floats(1e-6, 5), st.data())
def test_noise_within_the_spread_invents_no_steps(size, fixed, unit, spread, data):
    widths = probes(size)
    noise = data.draw(st.lists(st.floats(-0.5, 0.5), min_size=len(widths), max_size=len(widths)))
    seconds = [fixed + 10 * spread + unit * width + spread * off for width, off in zip(widths, noise, strict=True)]
    assert step_of(Curve(widths, tuple(seconds), (spread,) * len(widths))) == 1


@given(ROOMY, st.sampled_from([8, 16]), st.data())
def test_steps_are_found_through_noise_that_is_small_beside_them(size, multiple, data):
    widths, spread = probes(size), multiple / 20
    noise = data.draw(st.lists(st.floats(-0.5, 0.5), min_size=len(widths), max_size=len(widths)))
    seconds = [-(-width // multiple) * multiple + spread * off for width, off in zip(widths, noise, strict=True)]
    assume(multiple > 0.03 * size)
    assert step_of(Curve(widths, tuple(seconds), (spread,) * len(widths))) == multiple


def test_steps_smaller_than_the_spread_are_not_believed():
    stairs = curve(256, lambda width: -(-width // 16) * 16, spread=3.0)
    assert step_of(stairs) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_few_units_have_no_steps(size):
    assert step_of(curve(size, lambda width: float(width**3))) == 1
