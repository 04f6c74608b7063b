"""Pick one of several ways to cut by what each does to the loss."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import TypeVar

from idap.errors import DivergedError

Way = TypeVar("Way")
Candidate = TypeVar("Candidate")


def best_of(candidates: Mapping[Way, Candidate], loss: Callable[[Candidate], float]) -> Way:
    """The way whose candidate has the lowest loss.

    Args:
        candidates: way, such as a power of the cost -> what it would keep; of equal candidates only the first is
            measured.
        loss: on calibration data.

    Returns:
        The way; the first of those with the lowest loss. One whose loss is not finite is never chosen.

    Raises:
        DivergedError: no candidate has a finite loss.

    Example:
        >>> best_of({0.0: {"a": (0, 1)}, 1.0: {"a": (0, 2)}}, lambda keep: 3.0 - sum(keep["a"]))
        1.0
    """
    measured: list[tuple[Way, Candidate, float]] = []
    for way, candidate in candidates.items():
        if all(candidate != other for _, other, _ in measured):
            measured.append((way, candidate, loss(candidate)))
    finite = [(value, way) for way, _, value in measured if isfinite(value)]
    if not finite:
        raise DivergedError(
            f"none of the cuts {', '.join(map(str, candidates))} leaves a finite calibration loss; "
            "remove less, or look for overflow in the model."
        )
    return min(finite, key=lambda pair: pair[0])[1]
