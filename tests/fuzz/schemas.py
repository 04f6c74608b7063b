"""Arguments that torch's own schemas describe: of the right types, with numbers that are out of any range."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

PREFIXES = {"torch.linalg": "linalg_", "torch.fft": "fft_", "torch.special": "special_"}
_SMALL = (0, 1, 1, 2, 2, 3, 4, 8, -1, -2)
_ODD = (5, 7, 16, 64, -3, -100, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, -(2**62), -(2**63) + 1, 71_748_523_458_560)
_FLOATS = (0.0, 0.5, 1.0, -1.0, 1e-30, 1e18, 3.7, ("float", "inf"), ("float", "nan"), ("in training", 0.5))


@cache
def _schemas() -> Mapping[str, list[Any]]:
    found: defaultdict[str, list[Any]] = defaultdict(list)
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            found[schema.name.removeprefix("aten::")].append(schema)
    return found


def schemas_of(name: str) -> list[Any]:
    """The schemas of a function that a program names; none if torch has none."""
    space, _, last = name.removesuffix(".__get__").rpartition(".")
    return _schemas().get(PREFIXES.get(space, "") + last) or _schemas().get(last) or []


class Typed:
    """Draws arguments for schemas.

    Args:
        dice: decides.
        tensor: draws a tensor.
        texts: that stand for strings.
        types: names of types.
    """

    def __init__(
        self, dice: random.Random, tensor: Callable[[], Any], texts: tuple[str, ...], types: tuple[str, ...]
    ) -> None:
        self._dice, self._tensor, self._texts, self._types = dice, tensor, texts, types

    def call(self, space: str, schemas: list[Any]) -> tuple[list[Any], list[list[Any]]]:
        """Positional and keyword arguments for one of the schemas."""
        dice, args, kwargs = self._dice, [], []
        for argument in dice.choice(schemas).arguments:
            if argument.is_out:
                if space != "torch.Tensor" and dice.random() < 0.15:
                    kwargs.append(["out", self._tensor()])
                continue
            optional = argument.has_default_value() or str(argument.type).startswith("Optional")
            if argument.kwarg_only or kwargs:
                if not optional or dice.random() < 0.25:
                    kwargs.append([argument.name, self.value(str(argument.type), argument.name)])
            elif optional and dice.random() < 0.4:
                if dice.random() < 0.5:
                    kwargs.append([argument.name, self.value(str(argument.type), argument.name)])
                else:
                    break
            else:
                args.append(self.value(str(argument.type), argument.name))
        return args, kwargs

    def value(self, kind: str, name: str) -> Any:
        """A value of a type, as a program says it."""
        dice = self._dice
        if kind.startswith("Optional["):
            return None if dice.random() < 0.3 else self.value(kind[len("Optional[") : -1], name)
        if kind.startswith("List["):
            inner = kind[len("List[") : -1]
            tag = "list" if dice.random() < 0.5 else "tuple"
            return [tag, *(self.value(inner, name) for _ in range(dice.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 5))))]
        if kind == "int" and "dtype" in name:
            return ["dtype", dice.choice(self._types)]
        if kind == "int" and "memory_format" in name:
            return ["format", dice.choice(("channels_last", "contiguous_format", "preserve_format"))]
        values: Mapping[str, Callable[[], Any]] = {
            "Tensor": self._tensor,
            "t": self._tensor,
            "int": self._whole,
            "number": lambda: self._whole() if dice.random() < 0.5 else self._float(),
            "float": self._float,
            "bool": lambda: dice.random() < 0.5,
            "str": lambda: dice.choice(self._texts),
            "Device": lambda: ["device"] if dice.random() < 0.7 else dice.choice(("cpu", "meta", "cuda", "x")),
        }
        return values.get(kind, lambda: dice.choice((None, 0, 1, *self._texts)))()

    def _whole(self) -> Any:
        dice = self._dice
        draw = dice.random()
        if draw < 0.65:
            return dice.choice(_SMALL)
        return dice.choice(_ODD) if draw < 0.95 else ["size", ["value", 0], dice.choice((0, -1, 9))]

    def _float(self) -> Any:
        found = self._dice.choice(_FLOATS)
        return list(found) if isinstance(found, tuple) else found
