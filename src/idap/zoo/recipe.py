"""Recipes: TOML files that say what is compressed, on which data, to which goals, and how."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from idap.compress.config import Config, FilterStage, LayerStage
from idap.errors import ConfigError
from idap.rebalance.run import Rebalance
from idap.training.recovery import Recovery
from idap.training.task import Task, classification
from idap.zoo.data import cifar10, digits
from idap.zoo.recipe_file import Table, absolute, read_changes, read_table, with_changes
from idap.zoo.resolve import build_model
from idap.zoo.script import PREFIX, call_object, is_script
from idap.zoo.sections import (
    DataSection,
    ModelSection,
    OutputSection,
    Section,
    TaskSection,
    in_recipe,
    read_sections,
)

Made = TypeVar("Made")

_DATA: Mapping[str, Callable[..., Any]] = {"digits": digits, "cifar10": cifar10}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; nothing is loaded before it is asked for.

    Attributes:
        where: what errors call it.
        name: a short name, for a folder.
        network: section `[model]`.
        data: section `[data]`; None where there is a `[task]`.
        purpose: section `[task]`; None where there is `[data]`.
        settings: the sections that fill dataclasses, by name.
        run_dir: folder of the run; None where the recipe names none.
    """

    where: str
    name: str
    network: ModelSection
    data: DataSection | None
    purpose: TaskSection | None
    settings: Mapping[str, Section]
    run_dir: Path | None

    def model(self) -> nn.Module:
        """Build the model, with its weights where the recipe names some; random ones follow `compress.seed`.

        Raises:
            ConfigError: the model can't be built.
            CheckpointError: the weights don't fit.
        """
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.config().seed)
            return build_model(self.network.build, self.network.weights)

    def task(self) -> Task:
        """Load the data and build the task.

        Raises:
            ConfigError: the user's code fails or gives something else, or a key does not suit the data set.
            TaskError: the data is missing.
        """
        if self.purpose is not None:
            return call_object(self.purpose.build, _task_of)
        assert self.data is not None  # `make_recipe` saw to it
        splits = self._splits(self.data)
        try:
            return classification(splits.train, splits.val, test=splits.test, num_classes=splits.num_classes)
        except AttributeError as error:
            raise ConfigError(
                f"{self.where}: data.name gave {type(splits).__name__} without {error.name!r}; expected train, val, "
                "test (or None) and num_classes, as idap.zoo.data.Splits has them."
            ) from error

    def table(self) -> Table:
        """Everything that the recipe says, as section -> key -> value, with paths that hold in any working folder.

        `make_recipe` makes the same recipe of it; a run keeps it, so that `idap resume` needs nothing else.
        """
        sections = {"model": self.network, "data": self.data, "task": self.purpose, **self.settings}
        return absolute({name: section.given() for name, section in sections.items() if section is not None})

    def config(self) -> Config:
        """Fill the goals and settings of the compression.

        Raises:
            ConfigError: a setting is out of range.
            BudgetError: a goal is impossible.
        """
        nested = {
            name: self._filled(name, kind)
            for name, kind in (
                ("filters", FilterStage),
                ("layers", LayerStage),
                ("recovery", Recovery),
                ("rebalance", Rebalance),
            )
        }
        if "final" in self.settings:
            # What [final] leaves out is as in [recovery].
            nested["final"] = self._filled("final", Recovery, self._given("recovery"))
        return self._named("", Config, {**self._given("goals"), **self._given("compress"), **nested})

    def training(self) -> Recovery | None:
        """Say how the model is trained before it is compressed; None where the recipe has no `[train]`.

        Raises:
            ConfigError: a setting is out of range.
        """
        return self._filled("train", Recovery) if "train" in self.settings else None

    def _given(self, section: str) -> Table:
        return self.settings[section].given() if section in self.settings else {}

    def _filled(self, section: str, kind: Callable[..., Made], before: Mapping[str, Any] | None = None) -> Made:
        return self._named(section, kind, {**(before or {}), **self._given(section)})

    def _named(self, section: str, kind: Callable[..., Made], values: Table) -> Made:
        try:
            return kind(**values)
        except ConfigError as error:
            prefix = f"[{section}] " if section and not str(error).startswith(f"{section}.") else ""
            raise type(error)(f"{self.where}: {prefix}{error}") from error

    def _splits(self, data: DataSection) -> Any:
        keys = {key: value for key, value in data.given().items() if key != "name"}

        def load(build: Any) -> Any:
            _check_keys(build, keys, data.name, self.where)
            return build(**keys)

        return call_object(data.name, load) if is_script(data.name) else load(_DATA[data.name])


def read_recipe(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    replaced: Mapping[str, str | Path | None] | None = None,
) -> Recipe:
    """Read and check a recipe; loads neither data nor model.

    Paths in the file are relative to the file's folder and may hold `${VARIABLES}`; those given as arguments are
    relative to the working folder.

    Args:
        path: a TOML file; None: the arguments say everything.
        overrides: `section.key=value`, with the value as in TOML; text may go without quotes.
        replaced: `section.key` -> text taken as it is, such as the path of `data.path`; None leaves what the file says.

    Returns:
        The recipe.

    Raises:
        ConfigError: names every unknown key with the nearest valid one, every value of a wrong type, unset variables.
        BudgetError: a goal is impossible.
    """
    changes = read_changes(overrides, replaced or {})
    table = {} if path is None else read_table(Path(path), without=changes.keys())
    return make_recipe(with_changes(table, changes), "the command line" if path is None else str(path))


def make_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """Check a parsed recipe.

    Args:
        table: section -> key -> value.
        where: the recipe's name, begins every error.

    Returns:
        The recipe.

    Raises:
        ConfigError: as for `read_recipe`.
        BudgetError: a goal is impossible.

    Example:
        >>> recipe = make_recipe(
        ...     {"model": {"build": "idap:digits_vit"}, "data": {"name": "digits"}, "goals": {"macs": "50%"}}, "here"
        ... )
        >>> recipe.config().macs
        0.5
    """
    if "task" in table and "data" in table:
        clash = "[task] brings its own data; leave [data], and --data, out, or leave [task] out"
        raise ConfigError(in_recipe(where, [clash]))
    found = read_sections(table, where)
    network, data, purpose, output = (found.pop(name, None) for name in ("model", "data", "task", "output"))
    problems = []
    if not isinstance(network, ModelSection):
        problems.append('there is no model: write [model] with build = "idap:digits_resnet", or another spec')
    if data is None and purpose is None:
        problems.append('there is no task: write [data] with name = "digits", or [task] with build = "python:..."')
    if isinstance(data, DataSection) and data.name not in _DATA and not is_script(data.name):
        problems.append(f"data.name is {data.name!r}, expected {', '.join(_DATA)} or {PREFIX}file.py:function")
    if isinstance(data, DataSection) and data.name == "cifar10" and data.path is None:
        problems.append("data.path is missing: give the folder of the two files, or pass --data PATH")
    if problems:
        raise ConfigError(in_recipe(where, problems))
    assert isinstance(network, ModelSection)
    recipe = Recipe(
        where=where,
        name=Path(where).stem if where.endswith(".toml") else network.build.rpartition(":")[2],
        network=network,
        data=data if isinstance(data, DataSection) else None,
        purpose=purpose if isinstance(purpose, TaskSection) else None,
        settings=found,
        run_dir=Path(output.run_dir) if isinstance(output, OutputSection) else None,
    )
    _check_goals(recipe)
    return recipe


def _check_goals(recipe: Recipe) -> None:
    config = recipe.config()
    recipe.training()
    if recipe.data is not None and config.max_drop is not None and config.max_drop >= 1:
        raise ConfigError(
            f"{recipe.where}: goals.max_drop is {config.max_drop:g}, but the metric is an accuracy between 0 and 1, so "
            f"it would allow anything; for {config.max_drop:g} points write {config.max_drop / 100:g} or "
            f'"{config.max_drop:g}%".'
        )


def _task_of(found: Any) -> Task:
    task = found() if callable(found) else found
    if not isinstance(task, Task):
        raise ConfigError(f"the task is {type(task).__name__}, expected an idap.Task; build one, or return it.")
    return task


def _check_keys(build: Any, keys: Mapping[str, Any], name: str, where: str) -> None:
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
