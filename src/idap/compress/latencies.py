"""Seconds on this machine: what parts of a model take, and a cut that comes down to a wanted latency.

Of several processes the first one measures for all, so that all decide the same.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from idap.cost.latency import measure_latency
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.training.batch import Inputs
from idap.training.processes import on_main

REPEATS = 15
TRIES = 6
"""Cuts measured at most to come down to a latency."""
TOLERANCE = 0.03
"""How far below the wanted latency a cut may be, as a share of it."""

Keep = Mapping[str, Sequence[int]]


def latency_share(original: nn.Module, model: nn.Module, example: Inputs, *, repeats: int = REPEATS) -> float:
    """The latency of a model as a share of the original's; both take turns."""
    args, kwargs = example
    times = on_main(partial(measure_latency, {"original": original, "model": model}, args, kwargs, repeats=repeats))
    return times["model"].median / times["original"].median


def unit_latencies(
    original: nn.Module,
    structure: Structure,
    example: Inputs,
    keep: Keep,
    removed: Sequence[str],
    *,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """What one unit of each group takes: the time that half of the group saves, divided by the units.

    Args:
        original: is not changed; its copies are cut and timed.
        structure: of the original.
        example: inputs for one pass.
        keep: group name -> units that it has.
        removed: branches and blocks that are gone.
        repeats: timed passes of each variant.

    Returns:
        Group name -> seconds that one unit of it takes; a thousandth of the mean where no difference can be measured.
    """
    units = {group.name: list(keep.get(group.name, range(group.size))) for group in structure.groups}
    halves = {
        name: ({**units, name: mine[: len(mine) // 2]}, tuple(removed)) for name, mine in units.items() if len(mine) > 1
    }
    saved = _saved(original, structure, example, (units, tuple(removed)), halves, repeats=repeats)
    return _positive({name: saved[name] / (len(units[name]) - len(left[name])) for name, (left, _) in halves.items()})


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
    """Seconds that each of some branches and blocks takes; arguments as for `unit_latencies`."""
    without = {name: (keep, (*removed, name)) for name in names}
    return _positive(_saved(original, structure, example, (keep, tuple(removed)), without, repeats=repeats))


def _saved(
    original: nn.Module,
    structure: Structure,
    example: Inputs,
    whole: tuple[Keep, tuple[str, ...]],
    variants: Mapping[str, tuple[Keep, tuple[str, ...]]],
    *,
    repeats: int,
) -> dict[str, float]:
    """Seconds that each variant saves, each measured in turn with the whole."""
    args, kwargs = example
    before = apply_plan(original, structure.plan(*whole))
    found = {}
    for name, variant in variants.items():
        after = apply_plan(original, structure.plan(*variant))
        times = on_main(partial(measure_latency, {"before": before, "after": after}, args, kwargs, repeats=repeats))
        found[name] = times["before"].median - times["after"].median
    return found


def _positive(seconds: Mapping[str, float]) -> dict[str, float]:
    mean = sum(max(0.0, value) for value in seconds.values()) / max(1, len(seconds))
    return {name: max(value, mean / 1000, 1e-12) for name, value in seconds.items()}


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
    for _ in range(tries):
        found = latency_at(cost)
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
    return low[0] if low is not None else cost
