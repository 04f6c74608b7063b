"""The sections of a recipe: their keys, the types of the values, and the errors for wrong ones.

Sections of settings take their keys and types from the dataclass that they fill, so that a new setting is a new key as
well. The dataclass also holds the defaults: a key that is left out is not passed to it.
"""

import datetime
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from idap.compress.config import Config, FilterStage, LayerStage
from idap.errors import ConfigError
from idap.rebalance.run import Rebalance
from idap.training.recovery import Recovery

GOALS = ("max_drop", "max_relative_drop", "worst_metric", "macs", "parameters", "size", "latency")
NESTED = ("filters", "layers", "recovery", "final", "rebalance")
SHARES = (
    "max_relative_drop",
    "macs",
    "parameters",
    "size",
    "latency",
    "filters_share",
    "first_share",
    "min_share",
    "min_keep",
    "warmup",
    "distil",
    "val_share",
    "test_share",
)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def _parse_value(value: object, *, name: str, hint: Any) -> object:
    """Convert a setting as it may be written in a recipe to its value."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, list):
        return tuple(value)
    if value == "none" and NoneType in kinds:
        return None
    if float in kinds and isinstance(value, str) and (percent := _PERCENT.fullmatch(value)):
        return float(percent[1]) / 100
    if name in SHARES and isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100:
        raise ValueError(f'a share between 0 and 1; for {value:g} percent write {value / 100:g} or "{value:g}%"')
    return value


def share_of(name: str) -> BeforeValidator:
    """A validator that also accepts a share written as a percentage."""
    return BeforeValidator(partial(_parse_value, name=name, hint=float | None))


class Section(BaseModel):
    """One section of a recipe; keys that are not written stay unset."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def as_table(self) -> dict[str, Any]:
        """The keys that are written in the recipe, with their values."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class ModelSection(Section):
    """`[model]`: what is compressed."""

    build: str
    """The model by name: `idap:NAME`, `torchvision:NAME`, `timm:NAME`, `hf:FOLDER_OR_NAME` or `python:FILE.py:NAME`."""
    weights: str | None = None
    """A `.safetensors` file, or a checkpoint without code; a model of `hf:` comes with its weights."""
    classes: int | None = None
    """Number of outputs; if left out, the number of classes of the data. `python:` models ignore it."""


class DataSection(Section):
    """`[data]`: a task by the name of its data; each data set has its own keys."""

    name: str
    """`NAME`, `NAME:PATH`, or `python:FILE.py:FUNCTION`, which returns an `idap.Task` or an object like
    `idap.data.tensors.Splits`."""
    path: str | None = None
    """The file or folder, unless `name` contains it."""
    batch_size: int | None = None
    workers: int | None = None
    val_size: int | None = None
    val_share: Annotated[float | None, share_of("val_share")] = None
    test_share: Annotated[float | None, share_of("test_share")] = None
    val_from: Literal["train", "test"] | None = None
    seed: int | None = None
    augment: bool | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    size: int | list[int] | None = None
    classes: int | None = None
    ignore: int | None = None
    tokenizer: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    split: str | None = None
    labels: list[str] | None = None
    max_length: int | None = None
    pad_to_max: bool | None = None
    length: int | None = None
    metric: Literal["perplexity", "token_accuracy"] | None = None


class TaskSection(Section):
    """`[task]`: a task of the user's own, instead of `[data]`."""

    build: str
    """`python:FILE.py:NAME`: an `idap.Task`, or a function without arguments that returns one."""


class OutputSection(Section):
    """`[output]`: where the run is written."""

    run_dir: str
    """A new folder; if left out, `runs/NAME`."""


def mirror(settings: type, *, only: Collection[str]) -> type[Section]:
    """Make a section whose keys are fields of a dataclass, with their types, all optional.

    Numbers may be written as a percentage, "40%" for 0.4, and "none" means None if the field allows it.

    Args:
        settings: the dataclass.
        only: names of the fields.

    Example:
        >>> mirror(LayerStage, only=("removals", "patience"))(removals=3).as_table()
        {'removals': 3}
    """
    hints = get_type_hints(settings)
    # A recipe can't contain values of Python, such as a criterion that is a function.
    hints = {name: str if name == "criterion" else hint for name, hint in hints.items()}
    keys: dict[str, Any] = {
        name: (Annotated[hints[name], BeforeValidator(partial(_parse_value, name=name, hint=hints[name]))], None)
        for name in only
    }
    return create_model(f"{settings.__name__}Section", __base__=Section, **keys)


def _names(settings: type) -> list[str]:
    return [field.name for field in fields(settings)]


SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "task": TaskSection,
    "train": mirror(Recovery, only=_names(Recovery)),
    "goals": mirror(Config, only=GOALS),
    "compress": mirror(Config, only=[name for name in _names(Config) if name not in (*GOALS, *NESTED)]),
    "filters": mirror(FilterStage, only=_names(FilterStage)),
    "layers": mirror(LayerStage, only=_names(LayerStage)),
    "rebalance": mirror(Rebalance, only=_names(Rebalance)),
    "recovery": mirror(Recovery, only=_names(Recovery)),
    "final": mirror(Recovery, only=_names(Recovery)),
    "output": OutputSection,
}


def read_sections(table: Mapping[str, Any], where: str) -> dict[str, Section]:
    """Check a parsed recipe.

    Args:
        table: section -> key -> value.
        where: name of the recipe, with which every error begins.

    Returns:
        The sections of the recipe, by name.

    Raises:
        ConfigError: a section or key is unknown, or a value has a wrong type; lists every mistake with the nearest
            valid name.
    """
    problems: list[str] = []
    sections: dict[str, Section] = {}
    for name, values in table.items():
        if name not in SECTIONS:
            problems.append(_unknown_section(name, values))
        elif not isinstance(values, dict):
            problems.append(f"{name} is {describe(values)}, expected a section: write [{name}] and its keys below")
        else:
            try:
                sections[name] = SECTIONS[name].model_validate(values)
            except ValidationError as error:
                problems += _problems(name, error.errors(include_url=False))
    if problems:
        raise ConfigError(describe_problems(where, problems))
    return sections


def describe_problems(where: str, problems: Sequence[str]) -> str:
    """Describe the problems of a recipe, as one sentence or as a list."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}."
    return "\n".join([f"{where}: {len(problems)} mistakes:", *(f"  {problem}." for problem in problems)])


def nearest_key(section: str, key: str) -> str:
    """Advise which valid key is nearest to an unknown one."""
    known = list(SECTIONS[section].model_fields) if section in SECTIONS else []
    elsewhere = [other for other in SECTIONS if key in SECTIONS[other].model_fields]
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"the nearest is {section}.{near[0]}"
    if elsewhere:
        return f"the nearest is {elsewhere[0]}.{key}"
    everything = {name: other for other in SECTIONS for name in SECTIONS[other].model_fields}
    near = difflib.get_close_matches(key, everything, n=1)
    if near:
        return f"the nearest is {everything[near[0]]}.{near[0]}"
    return f"the keys of [{section}] are {', '.join(known)}" if known else f"sections are {', '.join(SECTIONS)}"


def describe(value: object) -> str:
    """Describe a TOML value."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value!r}"
        case list():
            return f"the list {value}"
        case dict():
            return "a section"
        case datetime.date() | datetime.time():
            return f"the date or time {value}"
    return f"{value!r}"


def _unknown_section(name: str, values: object) -> str:
    if not isinstance(values, dict):
        return f"{name} is outside every section; {nearest_key('', name)}"
    near = difflib.get_close_matches(name, SECTIONS, n=1)
    advice = f"the nearest is [{near[0]}]" if near else f"sections are {', '.join(SECTIONS)}"
    return f"there is no section [{name}]; {advice}"


def _problems(section: str, items: Sequence[Any]) -> list[str]:
    """Describe the problems of a section; pydantic lists one for each type that a value does not match."""
    expected: dict[str, dict[str, None]] = {}
    for item in items:
        problem, kind = _problem(section, item)
        expected.setdefault(problem, {}).update({kind: None} if kind else {})
    return [f"{problem}, expected {' or '.join(kinds)}" if kinds else problem for problem, kinds in expected.items()]


_TYPES = ("int", "float", "str", "bool", "none")


def _problem(section: str, item: Any) -> tuple[str, str]:
    """Describe one problem, and what was expected; the latter is "" if the description contains it."""
    *outer, last = map(str, item["loc"])
    place = outer if outer and (last in _TYPES or last.startswith("literal[")) else [*outer, last]
    key = f"{section}.{'.'.join(place)}"
    if item["type"] == "extra_forbidden":
        return f"there is no key {key}; {nearest_key(section, str(item['loc'][0]))}", ""
    if item["type"] == "missing":
        return f"{key} is missing", ""
    if key.startswith("data.size"):
        return f"data.size is {describe(item['input'])}", "a whole number, or [height, width]"
    expected = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if key == "data.labels":
        expected = 'a list of texts, as in ["bad", "good"]'
    return f"{key} is {describe(item['input'])}", _plain(expected)


def _plain(expected: str) -> str:
    """Translate what pydantic expects to the words of a recipe."""
    words = {
        "a valid number": "a number",
        "a valid number, unable to parse string as a number": "a number",
        "a valid integer": "a whole number",
        "a valid integer, unable to parse string as an integer": "a whole number",
        "a valid boolean": "true or false",
        "a valid string": "text in quotes",
        "a valid list": "a list of numbers",
    }
    return words.get(expected, expected)
