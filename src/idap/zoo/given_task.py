"""What a data set or the user's code gave, as a task."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from idap.errors import ConfigError
from idap.training.task import Task, classification


def task_from(found: Any, where: str) -> Task:
    """Make a task of what a data set gave: the task itself, or splits for classification.

    Args:
        found: the task, or an object with train, val, test and num_classes.
        where: the recipe's name, begins every error.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(found, Task):
        return found
    try:
        task = classification(
            found.train,
            found.val,
            test=found.test,
            num_classes=found.num_classes,
            calibration=getattr(found, "calibration", None),
        )
    except AttributeError as error:
        raise ConfigError(
            f"{where}: data.name gave {type(found).__name__} without {error.name!r}; expected an idap.Task, or train, "
            "val, test (or None) and num_classes, as idap.zoo.data.Splits has them."
        ) from error
    return replace(task, notes=tuple(getattr(found, "notes", ())))


def task_of(found: Any) -> Task:
    """Take the task that the user's code is, or returns.

    Raises:
        ConfigError: it is something else.
    """
    task = found() if callable(found) else found
    if not isinstance(task, Task):
        raise ConfigError(f"the task is {type(task).__name__}, expected an idap.Task; build one, or return it.")
    return task


def check_keys(build: Any, keys: Mapping[str, Any], name: str, where: str) -> None:
    """Check that the user's function takes the keys of `[data]`.

    Raises:
        ConfigError: it is no function, or doesn't take one of them.
    """
    if not callable(build):
        raise ConfigError(f"{where}: data.name {name} is {type(build).__name__}, expected a function.")
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in keys:
        if key not in parameters:
            raise ConfigError(
                f"{where}: data.{key} does not suit {name}, which takes {', '.join(parameters) or 'nothing'}."
            )
