"""Programs made from a grammar: any function of torch, and others, with any arguments that a program can say.

This part tries to break the list of functions and arguments that programs may use. Every case begins with the next
function in the list of those that are accepted, so that some thousand cases have called all of them.
"""

import inspect
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name

from idap.errors import PlanError
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests.fuzz.cases import Broken, Trial, differing, state_of
from tests.fuzz.schemas import Typed, schemas_of
from tests.fuzz.structural import CANARY, HARM, json_text, mutate, shown

SPACES = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.init": torch.nn.init,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
    "torch.sparse": torch.sparse,
    "torch.utils.dlpack": torch.utils.dlpack,
    "torch.autograd": torch.autograd,
    "torch._C": torch._C,
    "torch._C._nn": torch._C._nn,
    "torch.hub": torch.hub,
    "torch.ops": torch.ops,
    "torch.jit": torch.jit,
    "torch.storage": torch.storage,
    "torch.serialization": torch.serialization,
}
FOREIGN = (
    *("eval", "exec", "open", "getattr", "__import__", "builtins.exec", "os.system", "subprocess.run", "torch.load"),
    *("torch.os.system", "torch.Tensor.__class__", "torch.Tensor.__reduce_ex__", "torch.ops.aten.add", "", "calc"),
    *("torch.Tensor.shape.__get__", "torch.Tensor.data.__set__", "torch.Tensor.__init__", "self.inner", "check"),
    *("torch.relu ", "torch..relu", "torch.Tensor.", "relu", "torch.Tensor.relu.__get__", "f0", "v0.relu", *HARM),
)
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


class Net(nn.Module):
    """Something of everything that a program can name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        for name, tensor in tensors().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def candidates() -> list[str]:
    """Names of functions, good and bad, found without idap's own lists."""
    found = {f"{space}.{name}" for space, holder in SPACES.items() for name in dir(holder)}
    found |= {str(resolve_name(function)) for each in get_overridable_functions().values() for function in each}
    found |= {f"{name}.__get__" for name in found if name.startswith("torch.Tensor.")}
    return sorted(found | set(FOREIGN))


def program(steps: list[Any], output: Any) -> list[Any]:
    """A program of one routine with one input, as plain data."""
    return [{"args": [["value", 0]], "kwargs": [], "steps": steps, "output": output, "guards": []}]


def plan_of(code: Any, shapes: dict[str, tuple[int, ...]]) -> Plan:
    """A plan that does nothing but give the network new code."""
    empty = {name: {} for name in ("keep", "tensors", "attributes", "replaced", "called", "aliases", "projections")}
    lists = {"removed": [], "unsaved": []}
    listed = {name: list(shape) for name, shape in shapes.items()}
    return Plan.from_json({**empty, **lists, "shapes": listed, "programs": {"": code}})


class Programs:
    """Makes programs for a small network."""

    def __init__(self, home: Path) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        self.before = state_of(self.net)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.net.state_dict().items()}
        self.names = candidates()
        self.accepted = [name for name in self.names if self._accepts(name)]
        self.keys = {name: _keys(name) for name in self.accepted}
        random.Random(0).shuffle(self.accepted)

    def _accepts(self, name: str) -> bool:
        code = program([[name, "", [["value", 0]], [], [[[], 1]]]], ["value", 1])
        try:
            apply_plan(self.net, plan_of(code, self.shapes))
        except PlanError as error:
            return f"calls {name!r}" not in str(error)
        return True

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        grammar = Grammar(dice, self.keys)
        first = self.accepted[number % len(self.accepted)] if dice.random() < 0.9 else None
        steps = [
            grammar.step(self._name(dice, first if place == 0 else None)) for place in range(dice.choice((1, 1, 1, 2)))
        ]
        output = ["value", dice.randrange(grammar.made)] if dice.random() < 0.9 else grammar.tree(2)
        code: Any = program(steps, output)
        if dice.random() < 0.05:
            code[0]["guards"] = [
                [grammar.size(2), dice.choice(("==", "<", "<=", "!=", "x")), grammar.size(1), len(steps)]
            ]
        told = ""
        if dice.random() < 0.1:
            code, told = mutate(code, dice)
        text = json_text(code)
        (folder / "program.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        actions = {"apply": partial(self._apply, text), "forward": partial(self._forward, text)}
        return Trial(f"{shown(_short(code), 600)} {told}", actions)

    def _name(self, dice: random.Random, first: str | None) -> str:
        if first is not None:
            return first
        return dice.choice(self.accepted if dice.random() < 0.85 else self.names)

    def _applied(self, text: str) -> nn.Module:
        import json

        try:
            code = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(str(error)) from error
        return apply_plan(self.net, plan_of(code, self.shapes))

    def _apply(self, text: str) -> str:
        self._applied(text)
        return "accepted"

    def _forward(self, text: str) -> str:
        """A program may fail as any network may; it may not end or change the process, or what is not its own."""
        net = self._applied(text)
        guard, inputs = torch.arange(4096.0), torch.arange(48.0).reshape(2, 3, 8) / 7
        untouched = guard.clone()
        try:
            with torch.no_grad():
                result = net(inputs)
            _read(result)
        except Exception:
            return "raised"
        finally:
            if not torch.equal(guard, untouched):
                raise Broken("crash: memory of another tensor changed")
            if name := differing(self.net.state_dict(), self.before):
                raise Broken(f"changed: the original's tensor {name!r}")
        return "ran"


def _read(result: Any) -> None:
    """Touch every number of a result, as whoever gets it does: a tensor over foreign memory ends the process here."""
    if isinstance(result, Tensor) and result.layout is torch.strided and result.numel() < 10**6:
        result.detach().clone()
    elif isinstance(result, tuple | list):
        for item in result:
            _read(item)


def _short(code: Any) -> Any:
    """The steps and the output alone, where the rest is as always."""
    if isinstance(code, list) and code and isinstance(code[0], dict) and {"steps", "output"} <= code[0].keys():
        routine = code[0]
        return [routine["steps"], routine["output"], *([routine["guards"]] if routine.get("guards") else [])]
    return code


def _keys(name: str) -> tuple[str, ...]:
    """The names of a function's arguments, where Python knows them."""
    space, _, last = name.removesuffix(".__get__").rpartition(".")
    function: Callable[..., Any] | None = getattr(SPACES.get(space), last, None)
    try:
        found = inspect.signature(function).parameters if callable(function) else {}
    except (ValueError, TypeError):
        found = {}
    return (*found, *KEYS)


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
            return self._numbered(name, args, kwargs)
        args = list(self._args())
        known = self.keys.get(name, KEYS)
        names = dict.fromkeys(
            dice.choice(known[: 12 + len(known) // 2]) for _ in range(dice.choice((0, 0, 0, 0, 1, 2)))
        )
        kwargs = [[key, self.tree(2)] for key in names]
        return self._numbered(name if not module or dice.random() < 0.1 else "", args, kwargs, module)

    def _numbered(self, name: str, args: list[Any], kwargs: list[Any], module: str = "") -> list[Any]:
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
