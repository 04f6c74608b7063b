"""A curve in one line of text: resampled, on the right scale, with gaps."""

import math

import pytest

from idap.cli.live import ASCII, BLOCKS, logarithmic, sparkline


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 10, ""),
        ([3.0], 10, "█"),
        ([0.0], 10, "▁"),
        ([0.0, 0.0], 10, "▁▁"),
        ([2.0, 2.0, 2.0], 10, "███"),
        ([0.0, 2.0, 4.0, 8.0], 10, "▁▃▅█"),
        ([1.0, 8.0], 0, ""),
        ([1.0, math.nan, 8.0], 10, "▂ █"),
        ([math.nan, math.nan], 10, "  "),
        ([-4.0, 0.0, 4.0], 10, "▁▅█"),
        ([0.0, 0.0, 4.0, 4.0, 8.0, 8.0], 3, "▁▅█"),
        ([1.0, math.nan, 8.0, 8.0], 2, "▂█"),
    ],
)
def test_the_height_is_the_share_of_the_largest(values, width, drawn):
    assert sparkline(values, width) == drawn


@pytest.mark.parametrize("width", [1, 7, 64, 199, 200, 500])
def test_many_values_share_characters(width):
    drawn = sparkline([float(value) for value in range(200)], width)
    assert len(drawn) == min(200, width)
    assert list(drawn) == sorted(drawn)


def test_every_value_counts_once_when_they_share():
    for place in range(10):
        values = [0.0] * 10
        values[place] = 1.0
        drawn = sparkline(values, 3)
        assert len(drawn) == 3
        assert drawn.count(BLOCKS[0]) == 2


def test_the_scale_is_logarithmic_where_a_linear_one_would_show_nothing():
    values = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert logarithmic(values)
    drawn = sparkline(values, 5)
    assert len(set(drawn)) == 5
    assert drawn[0] == BLOCKS[0]
    assert drawn[-1] == BLOCKS[-1]
    assert sparkline([0.0, 1e-300, 1e-3, 1.0], 4)[:2] == BLOCKS[0] * 2  # no more than four decades
    assert not logarithmic([1.0, 2.0, 3.0])
    assert not logarithmic([])


def test_ascii():
    assert sparkline([float(value) for value in range(9)], 9, ascii_only=True).startswith(ASCII[:2])
    assert sparkline([0.0, 1.0], 2, ascii_only=True).isascii()
