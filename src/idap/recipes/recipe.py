"""Recipes: TOML files that say what is compressed, on which data, to which goals, and how."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from idap.compress.config import Config, FilterStage, LayerStage
from idap.errors import ConfigError
from idap.models.pretrained import context_of
from idap.models.resolve import COUNTED, Inputs, build_model, example_inputs
from idap.rebalance.run import Rebalance
from idap.recipes.catalogue import recipe_path
from idap.recipes.file import Table, absolute, read_changes, read_table, split_name, with_changes
from idap.recipes.sections import (
    DataSection,
    ModelSection,
    OutputSection,
    Section,
    TaskSection,
    in_recipe,
    read_sections,
)
from idap.recipes.sources import SOURCES, Source, call_with, data_problems
from idap.script import call_object
from idap.training.recovery import Recovery
from idap.training.task import Task, check_keys, task_from, task_of

Made = TypeVar("Made")


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

    def model(self, *, weights: bool = True) -> nn.Module:
        """Build the model; random weights follow `compress.seed`.

        Args:
            weights: whether weights are read, from the recipe's file or the model's folder; False builds the
                architecture alone.

        Raises:
            ConfigError: the model can't be built.
            CheckpointError: the weights don't fit.
            TaskError: the classes are to be counted, and the data is missing.
        """
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.config().seed)
            return build_model(
                self.network.build,
                self.network.weights if weights else None,
                classes=self.classes(),
                head=self._source.head if self._source is not None else None,
                trained=weights,
                new_head=self.training() is not None,
            )

    def classes(self) -> int | None:
        """Count the model's outputs: those that the recipe says, or the classes of its data; None: the model's own.

        Raises:
            TaskError: the data is missing.
        """
        counts = self.network.build.partition(":")[0] in COUNTED
        return self._class_count if counts and self.network.classes is None else self.network.classes

    @cached_property
    def _class_count(self) -> int | None:
        """The classes of the data, counted once: every mask may have to be read for it."""
        source = self._source
        return None if source is None or source.classes is None else int(call_with(source.classes, self._keys()))

    def example_inputs(self, model: nn.Module) -> Inputs | None:
        """Make one example batch without the data; None where only the data tell what the model takes."""
        source = self._source
        shape = None if source is None or source.shape is None else call_with(source.shape, self._keys())
        return ((torch.zeros(1, *shape),), {}) if shape is not None else example_inputs(self.network.build, model)

    def task(self) -> Task:
        """Load the data and build the task.

        Raises:
            ConfigError: the user's code fails or gives something else.
            TaskError: the data is missing or broken.
        """
        if self.purpose is not None:
            return call_object(self.purpose.build, task_of)
        assert self.data is not None  # `make_recipe` saw to it
        if self._source is not None:
            return task_from(self._source.build(**self._keys()), self.where)
        return call_object(self.data.name, lambda build: task_from(self._from_script(build), self.where))

    def table(self) -> Table:
        """Everything that the recipe says, as section -> key -> value, with paths that hold in any working folder.

        `make_recipe` makes the same recipe of it; a run keeps it, so that `idap resume` needs nothing else, and
        `idap export` builds the model again without the data.

        Raises:
            TaskError: the classes are to be counted, and the data is missing.
        """
        sections = {"model": self.network, "data": self.data, "task": self.purpose, **self.settings}
        told = {name: section.as_table() for name, section in sections.items() if section is not None}
        classes = self.classes()
        if classes is not None:
            told["model"]["classes"] = classes
        return absolute(told)

    def config(self) -> Config:
        """Fill the goals and settings of the compression.

        Raises:
            ConfigError: a setting is out of range.
            BudgetError: a goal is impossible.
        """
        nested = {
            name: self._fill(name, kind)
            for name, kind in (
                ("filters", FilterStage),
                ("layers", LayerStage),
                ("recovery", Recovery),
                ("rebalance", Rebalance),
            )
        }
        if "final" in self.settings:
            # What [final] leaves out is as in [recovery].
            nested["final"] = self._fill("final", Recovery, self._table("recovery"))
        return self._build("", Config, {**self._table("goals"), **self._table("compress"), **nested})

    def training(self) -> Recovery | None:
        """Say how the model is trained before it is compressed; None where the recipe has no `[train]`.

        Raises:
            ConfigError: a setting is out of range.
        """
        return self._fill("train", Recovery) if "train" in self.settings else None

    def _table(self, section: str) -> Table:
        return self.settings[section].as_table() if section in self.settings else {}

    def _fill(self, section: str, kind: Callable[..., Made], before: Mapping[str, Any] | None = None) -> Made:
        return self._build(section, kind, {**(before or {}), **self._table(section)})

    def _build(self, section: str, kind: Callable[..., Made], values: Table) -> Made:
        try:
            return kind(**values)
        except ConfigError as error:
            prefix = f"[{section}] " if section and not str(error).startswith(f"{section}.") else ""
            raise type(error)(f"{self.where}: {prefix}{error}") from error

    @property
    def _source(self) -> Source | None:
        return None if self.data is None else SOURCES.get(self.data.name)

    def _keys(self) -> Table:
        """What the data set is called with: the keys of `[data]`, and what the model says where they don't."""
        assert self.data is not None  # asked where there is data
        keys = {key: value for key, value in self.data.as_table().items() if key != "name"}
        if self._source is None:
            return keys
        known = inspect.signature(self._source.build).parameters
        said = context_of(self.network.build) if {"tokenizer"} & set(known) else {}
        return {key: value for key, value in said.items() if key in known} | keys

    def _from_script(self, build: Any) -> Any:
        assert self.data is not None  # as above
        keys = self._keys()
        check_keys(build, keys, self.data.name, self.where)
        return build(**keys)


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
        path: a TOML file, or the name of a recipe that idap brings; None: the arguments say everything.
        overrides: `section.key=value`, with the value as in TOML; text may go without quotes.
        replaced: `section.key` -> text taken as it is, such as the path of `data.path`, which may name the data too
            (`csv:reviews.tsv`); None leaves what the file says.

    Returns:
        The recipe.

    Raises:
        ConfigError: names every unknown key with the nearest valid one, every value of a wrong type, unset variables.
        BudgetError: a goal is impossible.
    """
    changes = read_changes(overrides, replaced or {})
    path = None if path is None else recipe_path(path)
    table = {} if path is None else read_table(path, without=changes.keys())
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
    if isinstance(table.get("data"), dict):
        table = {**table, "data": split_name(table["data"], where)}
    found = read_sections(table, where)
    network, data, purpose, output = (found.pop(name, None) for name in ("model", "data", "task", "output"))
    problems = []
    if not isinstance(network, ModelSection):
        problems.append('there is no model: write [model] with build = "idap:digits_resnet", or another spec')
    if data is None and purpose is None:
        problems.append('there is no task: write [data] with name = "digits", or [task] with build = "python:..."')
    if isinstance(data, DataSection):
        problems += data_problems(data)
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
    _check_goals(recipe, table.get("goals", {}).get("max_drop"))
    return recipe


def _check_goals(recipe: Recipe, written: object) -> None:
    """Refuse a budget that can't be meant, such as percentages of what has no whole.

    Args:
        recipe: that was read.
        written: its goals.max_drop, as it stands there.
    """
    config = recipe.config()
    recipe.training()
    data, source = recipe.data, recipe._source
    bounded = source is not None and (source.bounded or (data is not None and data.metric == "token_accuracy"))
    drop = config.drop
    if bounded and drop is not None and drop >= 1:
        raise ConfigError(
            f"{recipe.where}: goals.max_drop is {drop:g}, but the metric lies between 0 and 1, so it would allow "
            f'anything; for {drop:g} points write {drop / 100:g} or "{drop:g}%".'
        )
    if source is not None and not bounded and isinstance(written, str) and "%" in written:
        raise ConfigError(
            f'{recipe.where}: goals.max_drop is "{written}", but it counts in units of the metric, and this one has '
            f'no highest value; write goals.max_relative_drop = "{written}" for a share of the original\'s, or '
            "max_drop as a number."
        )
