"""Recipes: TOML files that describe what is compressed, on which data, to which goals, and how."""

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
from idap.recipes.file import Table, apply_changes, make_paths_absolute, read_changes, read_table, split_name
from idap.recipes.sections import (
    DataSection,
    ModelSection,
    OutputSection,
    Section,
    TaskSection,
    describe_problems,
    read_sections,
)
from idap.recipes.sources import SOURCES, Source, call_with, data_problems
from idap.script import call_object
from idap.training.recovery import Recovery
from idap.training.task import Task, check_keys, task_from, task_of

Made = TypeVar("Made")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; the model and the data are loaded only on request.

    Attributes:
        where: the name of the recipe in errors.
        name: a short name, used for the run folder.
        network: section `[model]`.
        data: section `[data]`; None if there is a `[task]`.
        purpose: section `[task]`; None if there is `[data]`.
        settings: the sections that fill dataclasses, by name.
        run_dir: folder of the run; None if the recipe names none.
    """

    where: str
    name: str
    network: ModelSection
    data: DataSection | None
    purpose: TaskSection | None
    settings: Mapping[str, Section]
    run_dir: Path | None

    def model(self, *, weights: bool = True) -> nn.Module:
        """Build the model; its random weights are drawn with `compress.seed`.

        Args:
            weights: whether weights are read from the recipe's file or the model's folder; False: the model keeps its
                random weights.

        Raises:
            ConfigError: the model can't be built.
            CheckpointError: the weights do not fit the model.
            TaskError: the classes must be counted, and the data are missing.
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
        """The number of the model's outputs, from the recipe or the classes of its data; None: the model's own.

        Raises:
            TaskError: the classes must be counted, and the data are missing.
        """
        counts = self.network.build.partition(":")[0] in COUNTED
        return self._class_count if counts and self.network.classes is None else self.network.classes

    @cached_property
    def _class_count(self) -> int | None:
        """The number of classes of the data, counted only once, because that may read every mask."""
        source = self._source
        return None if source is None or source.classes is None else int(call_with(source.classes, self._keys()))

    def example_inputs(self, model: nn.Module) -> Inputs | None:
        """Make one example batch without the data; None if the shape of the inputs is known only from the data."""
        source = self._source
        shape = None if source is None or source.shape is None else call_with(source.shape, self._keys())
        return ((torch.zeros(1, *shape),), {}) if shape is not None else example_inputs(self.network.build, model)

    def task(self) -> Task:
        """Load the data and build the task.

        Raises:
            ConfigError: the user's code fails or returns something else.
            TaskError: the data are missing or broken.
        """
        if self.purpose is not None:
            return call_object(self.purpose.build, task_of)
        assert self.data is not None  # `make_recipe` checked it
        if self._source is not None:
            return task_from(self._source.build(**self._keys()), self.where)
        return call_object(self.data.name, lambda build: task_from(self._from_script(build), self.where))

    def table(self) -> Table:
        """The whole recipe as section -> key -> value, with absolute paths.

        `make_recipe` makes the same recipe from it. A run keeps it, so that `idap resume` needs nothing else, and
        `idap export` builds the model again without the data.

        Raises:
            TaskError: the classes must be counted, and the data are missing.
        """
        sections = {"model": self.network, "data": self.data, "task": self.purpose, **self.settings}
        table = {name: section.as_table() for name, section in sections.items() if section is not None}
        classes = self.classes()
        if classes is not None:
            table["model"]["classes"] = classes
        return make_paths_absolute(table)

    def config(self) -> Config:
        """Build the goals and settings of the compression.

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
            # [final] takes the keys that it leaves out from [recovery].
            nested["final"] = self._fill("final", Recovery, self._table("recovery"))
        return self._build("", Config, {**self._table("goals"), **self._table("compress"), **nested})

    def training(self) -> Recovery | None:
        """The settings for training the model before it is compressed; None if the recipe has no `[train]`.

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
        """The arguments of the data set: the keys of `[data]`, and values from the model for keys that are left out."""
        assert self.data is not None  # called only for a recipe with data
        keys = {key: value for key, value in self.data.as_table().items() if key != "name"}
        if self._source is None:
            return keys
        known = inspect.signature(self._source.build).parameters
        context = context_of(self.network.build) if "tokenizer" in known else {}
        return {key: value for key, value in context.items() if key in known} | keys

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

    Paths in the file are relative to the file's folder and may contain `${VARIABLES}`; paths in the arguments are
    relative to the working folder.

    Args:
        path: a TOML file, or the name of a recipe that comes with idap; None: the arguments are the whole recipe.
        overrides: `section.key=value`, with the value as in TOML; text needs no quotes.
        replaced: `section.key` -> text that is taken as it is; `data.path` may also name the data (`csv:reviews.tsv`).
            None: the value of the file stays.

    Returns:
        The recipe.

    Raises:
        ConfigError: a key is unknown, a value has a wrong type, or a variable is not set; lists every mistake.
        BudgetError: a goal is impossible.
    """
    changes = read_changes(overrides, replaced or {})
    path = None if path is None else recipe_path(path)
    table = {} if path is None else read_table(path, without=changes.keys())
    return make_recipe(apply_changes(table, changes), "the command line" if path is None else str(path))


def make_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """Check a parsed recipe.

    Args:
        table: section -> key -> value.
        where: name of the recipe, with which every error begins.

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
        clash = "[task] brings its own data; leave out [data] and --data, or leave out [task]"
        raise ConfigError(describe_problems(where, [clash]))
    if isinstance(table.get("data"), dict):
        table = {**table, "data": split_name(table["data"], where)}
    sections = read_sections(table, where)
    network, data, purpose, output = (sections.pop(name, None) for name in ("model", "data", "task", "output"))
    problems = []
    if not isinstance(network, ModelSection):
        problems.append('there is no model: write [model] with build = "idap:digits_resnet", or another spec')
    if data is None and purpose is None:
        problems.append('there is no task: write [data] with name = "digits", or [task] with build = "python:..."')
    if isinstance(data, DataSection):
        problems += data_problems(data)
    if problems:
        raise ConfigError(describe_problems(where, problems))
    assert isinstance(network, ModelSection)
    recipe = Recipe(
        where=where,
        name=Path(where).stem if where.endswith(".toml") else network.build.rpartition(":")[2],
        network=network,
        data=data if isinstance(data, DataSection) else None,
        purpose=purpose if isinstance(purpose, TaskSection) else None,
        settings=sections,
        run_dir=Path(output.run_dir) if isinstance(output, OutputSection) else None,
    )
    _check_goals(recipe, table.get("goals", {}).get("max_drop"))
    return recipe


def _check_goals(recipe: Recipe, written: object) -> None:
    """Refuse a budget that can't be intended, such as a percentage of a metric without a highest value.

    Args:
        recipe: a recipe.
        written: its `goals.max_drop`, as it is written.
    """
    config = recipe.config()
    recipe.training()
    data, source = recipe.data, recipe._source
    bounded = source is not None and (source.bounded or (data is not None and data.metric == "token_accuracy"))
    drop = config.drop
    if bounded and drop is not None and drop >= 1:
        raise ConfigError(
            f"{recipe.where}: goals.max_drop is {drop:g}, but the metric lies between 0 and 1, so it would allow "
            f'any result; for {drop:g} points write {drop / 100:g} or "{drop:g}%".'
        )
    if source is not None and not bounded and isinstance(written, str) and "%" in written:
        raise ConfigError(
            f'{recipe.where}: goals.max_drop is "{written}", but it is measured in units of the metric, and this '
            f'metric has no highest value; write goals.max_relative_drop = "{written}" for a share of the original\'s '
            "metric, or max_drop as a number."
        )
