"""The grammar of programs: steps with random functions, and any argument that a program can hold."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.schemas import Typed, schemas_of
from tests.fuzz.structural import CANARY, HARM

TEXTS = (
    *(
        "sum",
        "mean",
        "none",
        "reflect",
        "constant",
        "circular",
        "cpu",
        "cuda",
        "meta",
        "ij,jk->ik",
        "...,...->...",
        "trunc",
    ),
    *(
        "floor",
        "bilinear",
        "nearest",
        "fro",
        "nuc",
        "ortho",
        "left",
        "coo",
        "torch.float32",
        "complete",
        "i->",
        "xla:0",
    ),
    *(f"/tmp/{CANARY}", CANARY, *HARM[:8]),
)
SIZES = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    8,
    16,
    -2,
    -100,
    63,
    64,
    2**15,
    2**31,
    2**31 - 1,
    2**40,
    2**62,
    -(2**62),
    71_748_523_458_560,
)
TYPES = tuple(name for name in dir(torch) if isinstance(getattr(torch, name, None), torch.dtype | torch.memory_format))
KEYS = (
    *(
        "dim",
        "out",
        "dtype",
        "device",
        "requires_grad",
        "size",
        "input",
        "other",
        "p",
        "training",
        "inplace",
        "keepdim",
    ),
    *("memory_format", "generator", "cdata", "weight", "bias", "mode", "reduction", "layout", "src", "index", "value"),
    *("copy_", "self", "func", "types", "args", "kwargs", "filename", "shared", "storage_offset", "stride", "names"),
)


def tensors() -> dict[str, Tensor]:
    """Tensors of many shapes and types, with numbers that are no valid index."""
    return {
        "table": torch.arange(16).reshape(4, 4),
        "mask": torch.tensor([True, False] * 4),
        "image": torch.linspace(-1, 1, 72).reshape(1, 2, 6, 6),
        "volume": torch.linspace(-1, 1, 128).reshape(1, 2, 4, 4, 4),
        "kernel": torch.ones(2, 2, 3, 3),
        "nothing": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "index": torch.tensor([0, 2, 5, -7, 10**12, -(2**62)]),
        "offsets": torch.tensor([0, 2, 5]),
        "small": torch.tensor([1, 200, 255], dtype=torch.uint8),
        "numbers": torch.tensor([float("nan"), float("inf"), -1e38, 0.0]),
        "shorts": torch.tensor([1, -5, 100_000], dtype=torch.int32),
        "halves": torch.ones(2, 3, dtype=torch.float16),
        "doubles": torch.eye(4, dtype=torch.float64),
        "complex": torch.eye(4, dtype=torch.complex64),
    }


class Grammar:
    """Draws the parts of one routine."""

    def __init__(self, dice: random.Random, keys: dict[str, tuple[str, ...]]) -> None:
        self.dice, self.keys, self.made = dice, keys, 1
        self.typed = Typed(dice, self.tensor, TEXTS, TYPES)

    def step(self, name: str) -> list[Any]:
        """A call of a function, or of the module below."""
        dice = self.dice
        module = dice.choice(("inner", "inner.weight", "", CANARY)) if dice.random() < 0.05 else ""
        if (schemas := schemas_of(name)) and dice.random() < 0.8:
            args, kwargs = self.typed.call(name.rpartition(".")[0], schemas)
            return self._with_number(name, args, kwargs)
        args = list(self._args())
        known = self.keys.get(name, KEYS)
        names = dict.fromkeys(
            dice.choice(known[: 12 + len(known) // 2]) for _ in range(dice.choice((0, 0, 0, 0, 1, 2)))
        )
        kwargs = [[key, self.tree(2)] for key in names]
        return self._with_number(name if not module or dice.random() < 0.1 else "", args, kwargs, module)

    def _with_number(self, name: str, args: list[Any], kwargs: list[Any], module: str = "") -> list[Any]:
        """The step, with a number for its result."""
        path = [] if self.dice.random() < 0.95 else [self.dice.choice((0, 1, -1, "values", 2**40))]
        self.made += 1
        return [name, module, args, kwargs, [[path, self.made - 1]]]

    def _args(self) -> Iterator[Any]:
        dice = self.dice
        count = dice.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 6))
        for place in range(count):
            yield self.tensor() if dice.random() < (0.9 if place == 0 else 0.35) else self.tree(2)

    def tensor(self) -> Any:
        """A value, or a tensor of the module."""
        if self.dice.random() < 0.7:
            return ["value", self.dice.randrange(self.made)]
        return ["own", self.dice.choice(("scale", "inner.weight", "inner.bias", *tensors()))]

    def size(self, depth: int) -> Any:
        """A number, a size of a tensor, or arithmetic with both."""
        dice = self.dice
        if depth == 0 or dice.random() < 0.4:
            return dice.choice(SIZES)
        if dice.random() < 0.5:
            return ["size", ["value", dice.randrange(self.made)], dice.choice((0, 1, 2, -1, 5))]
        symbol = dice.choice(("+", "-", "*", "//", "%", "**", "neg"))
        return ["calc", symbol, *(self.size(depth - 1) for _ in range(dice.choice((1, 2, 2, 3))))]

    def tree(self, depth: int) -> Any:
        """Any argument."""
        dice = self.dice
        plain: list[Callable[[], Any]] = [
            lambda: dice.choice(SIZES),
            lambda: dice.choice(SIZES[:9]),
            lambda: dice.choice((True, False, None)),
            lambda: dice.choice((0.5, 0.0, -1.5, 1e18, 1e-30)),
            lambda: dice.choice(TEXTS),
            lambda: ["dtype", dice.choice((*TYPES, "load", CANARY))],
            lambda: [dice.choice(("device", "same type", "ellipsis", "training"))],
            lambda: ["float", dice.choice(("inf", "-inf", "nan", "inf", "nan", CANARY))],
            lambda: ["in training", 0.5],
            lambda: ["format", dice.choice(("channels_last", "contiguous_format", "float32"))],
            self.tensor,
            lambda: self.size(depth),
        ]
        if depth and dice.random() < 0.35:
            return self._nested(depth)
        return dice.choice(plain)()

    def _nested(self, depth: int) -> Any:
        dice = self.dice
        match dice.choice(("list", "tuple", "tuple", "sizes", "slice", "dict")):
            case "list" | "tuple" as tag:
                return [tag, *(self.tree(depth - 1) for _ in range(dice.choice((0, 1, 2, 3))))]
            case "sizes":
                return ["tuple", *(dice.choice(SIZES[:9]) for _ in range(dice.choice((1, 2, 3))))]
            case "slice":
                return ["slice", *(dice.choice((None, self.size(1))) for _ in range(3))]
            case _:
                return ["dict", *([dice.choice(("a", 1, CANARY)), self.tree(depth - 1)] for _ in range(2))]
