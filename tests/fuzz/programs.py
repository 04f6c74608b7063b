"""Programs made from a grammar: any function of torch, and others, with any arguments that a program can say.

This part tries to break the list of functions and arguments that programs may use. Every case begins with the next
function in the list of those that are accepted, so that some thousand cases have called all of them.
"""

import inspect
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name

from idap.errors import PlanError
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests.fuzz.cases import Broken, Trial, first_difference, state_of
from tests.fuzz.grammar import KEYS, Grammar, tensors
from tests.fuzz.structural import HARM, abbreviate, json_text, mutate

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
    """A plan that does nothing but rewrite the code of the network."""
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
        return Trial(f"{abbreviate(_short(code), 600)} {told}", actions)

    def _name(self, dice: random.Random, first: str | None) -> str:
        if first is not None:
            return first
        return dice.choice(self.accepted if dice.random() < 0.85 else self.names)

    def _apply_to_copy(self, text: str) -> nn.Module:
        import json

        try:
            code = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(str(error)) from error
        return apply_plan(self.net, plan_of(code, self.shapes))

    def _apply(self, text: str) -> str:
        self._apply_to_copy(text)
        return "accepted"

    def _forward(self, text: str) -> str:
        """A program may fail as any network may; it may not end or change the process, or what is not its own."""
        net = self._apply_to_copy(text)
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
            if name := first_difference(self.net.state_dict(), self.before):
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
