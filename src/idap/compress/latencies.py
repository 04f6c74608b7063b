"""Seconds on this machine: of whole models, of blocks, and a cut that comes down to a wanted latency.

Of several processes the first one measures for all, so that all decide the same.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from idap.cost.latency import measure_latency
from idap.cost.table import above_zero
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.training.batch import Inputs
from idap.training.processes import on_main

REPEATS = 15
"""Timed passes where a block is taken out."""
SECONDS, ROUNDS = 0.6, 3
"""How long two models are compared at least, and in how many rounds."""
LONGEST, MOST_ROUNDS, SURE = 4.0, 20, 0.01
"""More rounds follow, up to so many seconds and rounds, until their middle is known to this share of it."""
FEWEST, MOST = 5, 100
"""Timed passes of each model in a round."""
DOUBTS = 4
"""How often a latency that seems out of reach is measured."""
TRIES = 6
"""Cuts measured at most to come down to a latency."""
TOLERANCE = 0.03
"""How far below the wanted latency a cut may be, as a share of it."""

Keep = Mapping[str, Sequence[int]]


def latency_share(original: nn.Module, model: nn.Module, example: Inputs, *, seconds: float = SECONDS) -> float:
    """The latency of a model as a share of the original's; both take turns.

    Args:
        original: the whole.
        model: its successor.
        example: inputs for one pass.
        seconds: about how long is measured at least; slow models take longer, as each passes `FEWEST` times a round.

    Returns:
        The middle one of the shares of all rounds, each the ratio of two medians.
    """
    args, kwargs = example
    both, shares, repeats, spent = {"original": original, "model": model}, list[float](), FEWEST, 0.0
    while len(shares) < ROUNDS or (
        len(shares) < MOST_ROUNDS and spent < max(seconds, LONGEST) and _error(shares) > SURE
    ):
        times = on_main(partial(measure_latency, both, args, kwargs, repeats=repeats, warmup=2))
        shares.append(times["model"].median / times["original"].median)
        pair = times["model"].median + times["original"].median
        spent += repeats * pair  # not by the clock, which says something else to each process
        repeats = int(min(MOST, max(FEWEST, seconds / (ROUNDS * pair))))
    return statistics.median(shares)


def _error(shares: Sequence[float]) -> float:
    """How far the middle of some measurements may be off, as a share of it: its standard error, by the quartiles.

    >>> _error([0.5, 0.5, 0.5, 0.5, 0.9, 0.5, 0.5])
    0.0
    """
    low, middle, high = statistics.quantiles(shares)
    return 1.25 * (high - low) / (1.35 * math.sqrt(len(shares)) * middle)


def least_share(original: nn.Module, smallest: nn.Module, example: Inputs, wanted: float) -> float:
    """The share of the latency that the smallest model has, in doubt for the one who wants it.

    A single measurement that is too high, because the machine did something else meanwhile, is not believed: what is
    wanted is out of reach only if it is so every time.

    Returns:
        The lowest of a few measurements, or the first that is low enough.
    """
    found = math.inf
    for _ in range(DOUBTS):
        found = min(found, latency_share(original, smallest, example))
        if found <= wanted:
            break
    return found


def gone_nodes(structure: Structure, removed: Sequence[str]) -> set[str]:
    """Nodes that are no longer computed as they were in the original once some branches and blocks are removed."""
    replaced = {block.exit for block in map(structure.block, removed) if block.projected is not None}
    return structure.dead_nodes(removed) | set(structure.skips(removed)) | replaced


def block_latencies(
    original: nn.Module,
    structure: Structure,
    example: Inputs,
    keep: Keep,
    removed: Sequence[str],
    names: Sequence[str],
    *,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """Seconds that each of some branches and blocks takes: what a pass without it saves, both measured in turn.

    Args:
        original: is not changed; its copies are cut and timed.
        structure: of the original.
        example: inputs for one pass.
        keep: group name -> units that it has.
        removed: branches and blocks that are gone.
        names: those asked for.
        repeats: timed passes of each variant.

    Returns:
        Name -> seconds above 0; a thousandth of the mean where no difference can be measured.
    """
    args, kwargs = example
    before = apply_plan(original, structure.plan(keep, tuple(removed)))
    found = {}
    for name in names:
        after = apply_plan(original, structure.plan(keep, (*removed, name)))
        times = on_main(partial(measure_latency, {"before": before, "after": after}, args, kwargs, repeats=repeats))
        found[name] = times["before"].median - times["after"].median
    return above_zero(found)


def come_down(
    latency_at: Callable[[float], float],
    start: tuple[float, float],
    wanted: float,
    *,
    least: float = 0.0,
    tries: int = TRIES,
    tolerance: float = TOLERANCE,
) -> float:
    """Find how far a cost must fall for the latency to fall to what is wanted.

    A bracket is narrowed by interpolation, as latency falls about evenly with the cost but not with all of it, and
    its measurement is noisy.

    Args:
        latency_at: measures the latency of a cut down to a cost.
        start: a cost, and the latency there, above what is wanted.
        wanted: the latency wanted at most.
        least: no lower cost is possible.
        tries: measurements at most.
        tolerance: a latency is near enough if it falls short of the wanted one by no more than this share.

    Returns:
        The highest cost found whose latency is as wanted; without any, the lowest tried.

    Example:
        >>> round(come_down(lambda cost: 0.2 + 0.8 * cost, (1.0, 1.0), 0.6), 2)
        0.49
    """
    high, low, cost = start, None, max(least, start[0] * wanted / start[1])
    lowest = cost
    for _ in range(tries):
        found, lowest = latency_at(cost), min(lowest, cost)
        if found <= wanted:
            low = (cost, found)
            if found >= wanted * (1 - tolerance):
                break
        else:
            high = (cost, found)
        if low is None:
            if cost <= least:
                break
            slope = max(start[1] - found, 1e-9) / (start[0] - cost)
            step = max((found - wanted * (1 - tolerance / 2)) / slope, 0.05 * cost)
            cost = max(least, cost - min(step, cost / 2))
        else:
            share = (wanted * (1 - tolerance / 2) - low[1]) / max(high[1] - low[1], 1e-9)
            cost = low[0] + (high[0] - low[0]) * min(0.9, max(0.1, share))
    return low[0] if low is not None else lowest
