"""What a kind of input is to the fuzzer: it makes inputs from dice, and says what is tried with each."""

import copy
import importlib
import random
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from idap.errors import IdapError

CHECKED_RUNS = True
"""Whether run folders are protected against changes; the one place to switch it. Until then a changed folder that is
resumed may lead to another result, and is counted as "changed"."""


class Broken(AssertionError):  # noqa: N818 - it is a failed check
    """A promise does not hold for an input; the text begins with the kind of the failure."""


@dataclass(frozen=True)
class Trial:
    """One input, written to a folder.

    Attributes:
        about: what was done to make it.
        actions: what is tried with it, by name. Each returns "equal", "changed" or "accepted", or raises: an
            `IdapError` refuses the input, `Broken` and everything else is a failure.
    """

    about: str
    actions: Mapping[str, Callable[[], str]]


class Kind(Protocol):
    """Makes inputs of one kind."""

    def __init__(self, home: Path) -> None:
        """Make the valid inputs, in a folder that is left alone later."""

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        """Write one input into a new folder, the same for the same number and dice."""


KINDS = {
    "plans": "tests.fuzz.plans:Plans",
    "programs": "tests.fuzz.programs:Programs",
    "weights": "tests.fuzz.weights:Weights",
    "indices": "tests.fuzz.indices:Indices",
    "runs": "tests.fuzz.run_folders:Runs",
    "recipes": "tests.fuzz.recipes:Recipes",
}
"""Name -> what makes inputs of that kind."""
SELF = "misbehaving"
"""A kind whose cases break every promise on purpose, for the test of the fuzzer itself."""


def kind_of(name: str) -> type[Kind]:
    """Import a kind."""
    module, _, attribute = KINDS.get(name, "tests.fuzz.misbehaving:Misbehaving").partition(":")
    found: type[Kind] = getattr(importlib.import_module(module), attribute)
    return found


def dice_of(seed: int, kind: str, number: int) -> random.Random:
    """What decides everything about a case."""
    return random.Random(f"{seed}/{kind}/{number}")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal bit by bit."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    one, other = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return bool(torch.equal(one, other))


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first tensor in which two states differ; "" if there is none."""
    if found.keys() != expected.keys():
        return str(min(found.keys() ^ expected.keys()))
    return next((name for name in expected if not same(found[name], expected[name])), "")


def refuses(action: Callable[[], Any]) -> bool:
    """Whether idap refuses something."""
    try:
        action()
    except IdapError:
        return True
    return False


def command(*words: str) -> str:
    """Run a command of idap in this process.

    Returns:
        "refused" for a wrong input, else "accepted".

    Raises:
        Broken: it ends in another way than is documented.
    """
    from typer.testing import CliRunner

    from idap.cli.main import app

    result = CliRunner().invoke(app, [*words, "--debug"], prog_name="idap")
    if result.exit_code in (0, 1):
        return "accepted"
    if result.exit_code == 2:
        return "refused"
    lines = result.stderr.strip().splitlines()
    told = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)), "")
    raise Broken(f"raw: exit code {result.exit_code}: {told:.200} at {_innermost(lines)} {result.exception!r:.80}")


def _innermost(lines: list[str]) -> str:
    frames = [found for line in lines if (found := re.search(r'File ".*/idap/(.*)", line (\d+), in (\w+)', line))]
    return f"{frames[-1][1]}:{frames[-1][2]} in {frames[-1][3]}" if frames else "?"


def describe_error(error: BaseException) -> str:
    """An exception, and the innermost place in idap that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/idap/" in frame.filename]
    last = frames[-1] if frames else None
    place = "?" if last is None else f"{last.filename.rpartition('/idap/')[2]}:{last.lineno} in {last.name}"
    return f"{type(error).__name__}: {str(error)[:160]} at {place}"


def copy_of(data: Any) -> Any:
    """Plain data that may be changed."""
    return copy.deepcopy(data)
