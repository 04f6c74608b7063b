"""How large each step of stage 1 is: a function from progress to a share, which knows no model."""


def step_share(first: float, step: int, steps: int, growth: float) -> float:
    """Share of the remaining units that step t removes: rho_0 (1 + t/T)^alpha (docs/method.md#filters).

    Args:
        first: rho_0, in (0, 1).
        step: t, from 0.
        steps: T, at least 1.
        growth: alpha, at least 0.

    Returns:
        The share, below 1.

    Example:
        >>> [round(step_share(0.1, t, 2, 1.0), 3) for t in range(3)]
        [0.1, 0.15, 0.2]
    """
    share: float = first * (1 + step / max(1, steps)) ** growth
    return min(0.9, share)
