"""All criteria by name. A criterion is a function of a `Scene`; a user's own function is used the same way."""

from collections.abc import Callable, Mapping

from idap.divergence.gradients import fisher, taylor
from idap.divergence.innovation import innovation
from idap.divergence.paper import activation, paper, share
from idap.divergence.relative import fluctuation, relative
from idap.divergence.scene import Opener, Scorer
from idap.divergence.weights import bn_scale, fpgm, magnitude, magnitude_l1, random
from idap.errors import ConfigError

Criterion = str | Opener
"""A name, or a function of a `Scene`."""

CRITERIA: Mapping[str, Callable[..., Scorer | Mapping[str, object]]] = {
    "relative": relative,
    "fluctuation": fluctuation,
    "innovation": innovation,
    "paper": paper,
    "share": share,
    "activation": activation,
    "taylor": taylor,
    "fisher": fisher,
    "magnitude": magnitude,
    "magnitude_l1": magnitude_l1,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "random": random,
}

WITH_BLOCKS = ("relative", "fluctuation", "paper", "share")
"""Criteria that score branches and blocks too."""

LIKE_PROJECTIONS = ("relative", "fluctuation")
"""Those of them whose scores can be compared with what a projection leaves over: both are relative errors."""

OF_THE_LOSS = ("taylor", "fisher")
"""Criteria that need labels: they go back from the loss."""


def opener_of(criterion: Criterion) -> tuple[str, Opener]:
    """The name of a criterion and the function behind it.

    Raises:
        ConfigError: there is no criterion of this name, or it is no function.
    """
    if callable(criterion):
        return getattr(criterion, "__name__", type(criterion).__name__), criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ConfigError(
            f"there is no criterion {criterion!r}; there are {', '.join(CRITERIA)}, or a function of your own that "
            "takes a scene (idap.divergence.scene.Scene)."
        )
    return criterion, CRITERIA[criterion]  # type: ignore[return-value]
