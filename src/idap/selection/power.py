"""Pick the power of the cost in score / cost^p by what the candidates do to the loss."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import TypeVar

from idap.errors import TaskError

Candidate = TypeVar("Candidate")


def best_power(candidates: Mapping[float, Candidate], loss: Callable[[Candidate], float]) -> float:
    """The power whose candidate has the lowest loss.

    Args:
        candidates: power -> what it would keep; of equal candidates only the first is measured.
        loss: on calibration data.

    Returns:
        The power; the first of those with the lowest loss. One whose loss is not finite is never chosen.

    Raises:
        TaskError: no candidate has a finite loss.

    Example:
        >>> best_power({0.0: {"a": (0, 1)}, 1.0: {"a": (0, 2)}}, lambda keep: 3.0 - sum(keep["a"]))
        1.0
    """
    measured: list[tuple[float, Candidate, float]] = []
    for power, candidate in candidates.items():
        if all(candidate != other for _, other, _ in measured):
            measured.append((power, candidate, loss(candidate)))
    finite = [(value, power) for power, _, value in measured if isfinite(value)]
    if not finite:
        raise TaskError(
            f"none of the powers {', '.join(f'{power:g}' for power in candidates)} leaves a finite calibration loss; "
            "remove less, or look for overflow in the model."
        )
    return min(finite, key=lambda pair: pair[0])[1]
