"""Recipes: TOML files and what the command line changes of them; nothing that they name is run when they are read."""

import json
import math
import random
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from idap.recipes.catalogue import shipped_recipes
from idap.recipes.new import Answers, compose_recipe
from idap.recipes.recipe import make_recipe, read_recipe
from idap.recipes.sections import SECTIONS
from tests.fuzz import structural
from tests.fuzz.cases import Broken, Trial, command, copy_of

VALUES = (
    *(
        "50%",
        "none",
        "1%",
        "1e3%",
        "-5%",
        "innovation",
        "magnitude",
        "paper",
        "auto",
        "digits",
        "csv:x.csv",
        "sgd",
        "adamw",
    ),
    *("idap:digits_resnet", "idap:digits_vit", "idap:mlp", "timm:resnet18", "torchvision:resnet18", "${HOME}/x", "${"),
    *("${IDAP_FUZZ_UNSET}", "text:x.txt", "imagefolder:.", "masks:.", "cifar10:.", "mnist:.", "~/x", "accept", "keep"),
    *(f"python:{structural.CANARY}.py:build", f"python:../{structural.CANARY}.py:f", "python::", "python:os:system"),
    *("interleaved", "layers-filters", "growing", "one-shot", "stream", "cosine", "0.5", "nan", *structural.HARM),
)
NUMBERS = (0, 1, 2, 8, -1, 0.5, 1.5, 100, 1e-9, 2**31, 2**63, 10**30, math.nan, math.inf, -math.inf, True, False)


class Recipes:
    """Makes recipes: those that idap brings, changed, and others made of all keys that there are."""

    def __init__(self, home: Path) -> None:
        self.texts = {name: file.read_text(encoding="utf-8") for name, file in shipped_recipes().items()}
        self.tables = [tomllib.loads(text) for text in self.texts.values()]

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        file, told = folder / "recipe.toml", []
        way = dice.random()
        if way < 0.2:
            name = dice.choice(list(self.texts))
            content, did = structural.mutate_bytes(
                self.texts[name].encode(), dice, dice.choice(list(self.texts.values())).encode()
            )
            told.append(f"{name}: {did}")
        else:
            table = copy_of(dice.choice(self.tables)) if way < 0.6 else draw_table(dice)
            told.append("shipped" if way < 0.6 else "drawn")
            for _ in range(dice.choice((0, 1, 1, 2))):
                table, did = structural.mutate(table, dice, self.tables)
                told.append(did)
                if not isinstance(table, dict) or structural.PAIRS in table:
                    break
            content = toml_bytes(table)
        file.write_bytes(content)
        if dice.random() < 0.03:
            told.append(structural.mutate_place(file, dice, folder.parent / "outside", pipes=False))
        overrides = [draw_override(dice) for _ in range(dice.choice((0, 0, 1, 2)))]
        told += [f"--set {structural.abbreviate(each)}" for each in overrides]
        shown = structural.abbreviate(content.decode("utf-8", "replace"), 300) if told[0] == "drawn" else ""
        actions: dict[str, Callable[[], str]] = {
            "read": partial(_read, file, overrides),
            "parsed": partial(_parse, content),
            "new": partial(_new, dice.choice(VALUES), dice.choice(VALUES), dice.choice(VALUES), file),
        }
        if dice.random() < 0.05:
            words = [word for each in overrides if "\0" not in each for word in ("--set", each)]
            missing = ("--set", f"data.path={folder / 'nothing'}")
            actions["idap compress"] = partial(
                command, "compress", str(file), *words, *missing, "--task", "python:x.py:f"
            )
        return Trial(f"{'; '.join(told)} {shown}", actions)


def _read(file: Path, overrides: list[str]) -> str:
    _use(read_recipe(file, overrides))
    return "accepted"


def _use(recipe: Any) -> None:
    """Everything that a recipe gives without its model and data."""
    config = recipe.config()
    for name, share in config.targets.items():
        if share is not None and not (isinstance(share, float | int) and 0 < share <= 1):
            raise Broken(f"accepted: goal {name} is {share!r}")
    recipe.training()
    if recipe.data is None or recipe.network.classes is not None:
        json.dumps(recipe.table(), default=str)


def _parse(content: bytes) -> str:
    """The same as it comes from a run folder, as plain data."""
    try:
        table = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return "refused"
    _use(make_recipe(table, "here"))
    return "accepted"


def _new(data: str, model: str, share: str, file: Path) -> str:
    """What `idap recipe new` writes can be read."""
    text = compose_recipe(Answers(data=data, model=model, macs=share), file.with_name("new.toml"))
    tomllib.loads(text)
    return "accepted"


def draw_table(dice: random.Random) -> dict[str, Any]:
    """A recipe with keys that there are, and values that they may have or not."""
    table: dict[str, Any] = {"model": {"build": "idap:digits_resnet"}, "data": {"name": "digits"}}
    for section in dice.sample(list(SECTIONS), dice.randrange(1, 6)):
        fields = SECTIONS[section].model_fields
        keys = dice.sample(list(fields), min(len(fields), dice.randrange(1, 5)))
        values = {key: draw_value(fields[key].annotation, dice) for key in keys}
        table[section] = {**table.get(section, {}), **values}
    if "task" in table and dice.random() < 0.8:
        del table[dice.choice(("task", "data"))]
    return table


def draw_value(hint: Any, dice: random.Random) -> Any:
    """Mostly a value of the type, often one that is out of range."""
    if dice.random() < 0.15:
        return dice.choice((*VALUES, *NUMBERS, [], [1, 2], {"a": 1}))
    kinds = {part for kind in get_args(hint) or (hint,) for part in (kind, *get_args(kind))}
    choices: list[Any] = []
    if bool in kinds:
        choices += [True, False]
    if int in kinds:
        choices += [number for number in NUMBERS if type(number) is int]
    if float in kinds:
        choices += [*NUMBERS, "50%", "none"]
    literals = [kind for kind in kinds if isinstance(kind, str)]
    choices += literals or ([] if choices else VALUES)
    return dice.choice(choices)


def draw_override(dice: random.Random) -> str:
    """One `--set`."""
    section = dice.choice(list(SECTIONS))
    key = dice.choice(list(SECTIONS[section].model_fields))
    value = dice.choice((*VALUES, *map(str, NUMBERS), "[1, 2]", "{a = 1}", '"', "1979-05-27", "[" * 500, ""))
    return dice.choice((f"{section}.{key}={value}",) * 6 + (f"{section}={value}", f"{key}", f".{key}=", "=", value))


def toml_bytes(table: Any) -> bytes:
    """Data as TOML, with what it can't say written as it stands."""
    if not isinstance(table, dict):
        return _toml(table).encode("utf-8", "surrogatepass")
    lines = []
    for name, values in table[structural.PAIRS] if structural.PAIRS in table else table.items():
        if isinstance(values, dict):
            lines.append(f"[{_key(name)}]")
            pairs = values[structural.PAIRS] if structural.PAIRS in values else values.items()
            lines += [f"{_key(key)} = {_toml(value)}" for key, value in pairs]
        else:
            lines.insert(0, f"{_key(name)} = {_toml(values)}")
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")


def _key(name: Any) -> str:
    text = str(name)
    return text if text.isascii() and text.replace("_", "").isalnum() else json.dumps(text)


def _toml(value: Any) -> str:
    if isinstance(value, structural.Raw):
        return str(value)
    if isinstance(value, dict):
        pairs = value[structural.PAIRS] if structural.PAIRS in value else value.items()
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return {"nan": "nan", "inf": "inf", "-inf": "-inf"}.get(str(value), str(value))
    return "true" if value is True else "false" if value is False else '""' if value is None else json.dumps(value)
