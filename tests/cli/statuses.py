"""A made-up status of a run, for the tests of the display."""

from dataclasses import replace

from idap.progress import Status

_SOMEWHERE = Status(
    stage="filters",
    step=3,
    accepted=2,
    profile=(0.0, 2.0, 4.0, 6.0, 8.0),
    costs={},
    metric=0.908,
    metric_name="accuracy",
    baseline=0.91,
    worst=0.9,
)


def status(*, macs=0.8, target=0.5, **others):
    """A run with one cost that has a target and one that has none."""
    return replace(_SOMEWHERE, **{"costs": {"MACs": (macs, target), "parameters": (0.9, None)}, **others})
