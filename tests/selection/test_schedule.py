"""The share of each step follows the formula of docs/method.md#filters."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from idap.selection.reach import step_share

SHARES, STEPS, GROWTHS = st.floats(0.001, 0.5), st.integers(1, 30), st.floats(0, 3)


@given(SHARES, STEPS, GROWTHS)
def test_it_starts_at_the_first_share_and_grows_but_never_takes_all(first, steps, growth):
    shares = [step_share(first, step, steps, growth) for step in range(steps + 1)]
    assert shares[0] == first
    assert shares == sorted(shares)
    assert shares[-1] == approx(min(0.9, first * 2**growth))


@given(SHARES, STEPS, GROWTHS)
def test_it_is_the_formula_in_float64(first, steps, growth):
    exact = np.minimum(0.9, first * np.power(1 + np.arange(steps) / np.float64(steps), growth))
    assert [step_share(first, step, steps, growth) for step in range(steps)] == approx(exact.tolist(), rel=1e-12)


@given(SHARES, STEPS)
def test_without_growth_every_step_is_the_same(first, steps):
    assert {step_share(first, step, steps, 0.0) for step in range(steps)} == {first}


def test_the_authors_values():
    assert [round(step_share(0.08, t, 10, 1.5), 4) for t in (0, 5, 10)] == [0.08, 0.147, 0.2263]


def test_a_stage_without_steps_has_a_share_too():
    assert step_share(0.1, 0, 0, 1.5) == 0.1
