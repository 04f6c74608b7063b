"""Costs, refits and scores of elimination, against least squares by numpy on the rows themselves."""

import numpy as np
import pytest
import torch

from idap.linalg.elimination import Piece, System, divide, eliminate, join

SEEDS = range(5)
ROWS = 60


def consumer(units, width, outputs, seed):
    """Rows that a consumer reads, its weights Vᵀ, and the columns of each unit in a mixed order; all float64."""
    draw = np.random.default_rng(seed)
    columns = units * width
    rows = draw.standard_normal((ROWS, columns)) @ draw.standard_normal((columns, columns))
    return rows, draw.standard_normal((columns, outputs)), draw.permutation(columns).reshape(units, width)


def system_of(rows, weights, columns):
    inverse = np.linalg.inv(rows.T @ rows / ROWS)
    return System(
        torch.from_numpy(inverse),
        torch.from_numpy(weights.copy()),
        torch.arange(len(columns)),
        torch.from_numpy(columns),
    )


def refit(rows, weights, columns, gone):
    """Weights of the other units that come closest to the full output, and the mean squared error that is left."""
    left = np.sort(np.delete(columns, gone, axis=0).ravel())
    wanted = rows @ weights
    new = np.linalg.lstsq(rows[:, left], wanted)[0] if len(left) else np.zeros((0, weights.shape[1]))
    return left, new, ((wanted - rows[:, left] @ new) ** 2).sum() / ROWS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [1, 3])
def test_a_cost_is_the_error_of_least_squares_without_the_unit(seed, width):
    made = consumer(6, width, 4, seed)
    expected = [refit(*made, [unit])[2] for unit in range(6)]
    np.testing.assert_allclose(system_of(*made).costs().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gone", [[2], [0, 4], [1, 2, 3, 4]])
def test_after_a_removal_the_weights_are_those_of_least_squares(seed, gone):
    rows, weights, columns = consumer(6, 2, 4, seed)
    system = system_of(rows, weights, columns)
    system.remove(torch.isin(torch.arange(6), torch.tensor(gone)))
    left, new, _ = refit(rows, weights, columns, gone)
    expected = np.zeros_like(weights)
    expected[left] = new
    stay = np.delete(columns, gone, axis=0)
    np.testing.assert_allclose(system.weights[system.columns].numpy(), expected[stay], rtol=1e-5, atol=1e-7)
    moments = (rows.T @ rows / ROWS)[np.ix_(stay.ravel(), stay.ravel())]
    held = system.columns.ravel()
    np.testing.assert_allclose(system.inverse[held][:, held].numpy(), np.linalg.inv(moments), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_errors_of_least_squares_in_the_greedy_order(seed):
    """The score of a unit is the error once it and all units before it are removed, mean over two consumers."""
    both = [consumer(7, 2, 3, seed), consumer(7, 1, 5, seed + 100)]
    expected, gone = np.zeros(7), []
    while len(gone) < 7:
        after = {
            unit: np.mean([refit(*made, [*gone, unit])[2] for made in both]) for unit in range(7) if unit not in gone
        }
        gone.append(min(after, key=after.__getitem__))
        expected[gone[-1]] = after[gone[-1]]
    found = eliminate([system_of(*made) for made in both], 7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_are_merged_by_the_cheapest_next_unit(seed):
    draw = np.random.default_rng(seed)
    units, costs, pieces = np.array_split(draw.permutation(12), [3, 4]), [], []
    for mine in units:
        costs.append(draw.random(len(mine)))  # in the order in which the units are removed
        order = np.sort(mine)
        scores = dict(zip(mine, costs[-1].cumsum(), strict=True))
        pieces.append(Piece(torch.from_numpy(order), torch.tensor([scores[unit] for unit in order]).double()))
    expected, total, at = np.zeros(13), 0.0, [0] * len(units)
    for _ in range(12):
        piece = min((p for p in range(len(units)) if at[p] < len(units[p])), key=lambda p: costs[p][at[p]])
        total += costs[piece][at[piece]]
        expected[units[piece][at[piece]]] = total
        at[piece] += 1
    np.testing.assert_allclose(join(pieces, 13).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("count", "columns", "widest"), [(10, 40, 12), (7, 7, 2), (3, 300, 10), (5, 5, 5)])
def test_a_group_is_divided_as_numpy_splits_it(count, columns, widest):
    units = np.sort(np.random.default_rng(count).choice(100, count, replace=False))
    number = 1 if columns <= widest else min(count, int(np.ceil(columns / widest)))
    expected = [part.tolist() for part in np.array_split(units, number)]
    assert [part.tolist() for part in divide(torch.from_numpy(units), columns, widest)] == expected
