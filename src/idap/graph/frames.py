"""What a module's own code did in one call, step by step, and whose memory it changed."""

import linecache
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SameType:
    """A data type that the code read from a tensor and passes on."""


@dataclass(frozen=True)
class Unseen:
    """An argument of unknown origin: a tensor from elsewhere, or an object of another kind.

    Attributes:
        kind: its class.
    """

    kind: str


@dataclass(frozen=True)
class Built:
    """A container that is neither a plain tuple, list nor dictionary, such as a named tuple.

    Attributes:
        kind: its class.
        items: its items, by key or position.
    """

    kind: str
    items: Mapping[Any, Any]


@dataclass(frozen=True)
class Step:
    """One thing that a module's own code did: call a torch function, or another module.

    Attributes:
        function: name of the function in torch, such as ``torch.Tensor.view``, "" for the call of a module.
        module: path of the module that is called, "" for a function.
        args: positional arguments.
        kwargs: keyword arguments.
        results: for each tensor that is returned, its place in the result and its name.
        place: identifies the eager call, "" for the call of a module.
    """

    function: str
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[tuple[tuple[Any, ...], str], ...]
    place: str = ""


@dataclass(frozen=True)
class Frame:
    """One call of a module: what it was given, what its own code did, what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    steps: tuple[Step, ...]
    output: Any


_NAMED = ("float16", "float32", "float64", "half", "double", "bfloat16")
_IN_TEXT = re.compile(r"torch\.(float|half|double|bfloat)")


def origin_of_type(frame: types.FrameType, dtype: torch.dtype) -> torch.dtype | SameType | Unseen:
    """Find where a data type comes from that code passes on after it has read one from a tensor.

    Args:
        frame: the frame of the code, at the call.
        dtype: the data type that is passed.

    Returns:
        The type itself if it is not a floating-point type or if the call names it among its last arguments, `SameType`
        if the code names no type anywhere, otherwise `Unseen`.
    """
    if not dtype.is_floating_point:
        return dtype
    if _IN_TEXT.search(_last_arguments(frame)):
        return dtype
    names = any(name in _NAMED for name in frame.f_code.co_names)
    return Unseen("a data type of unknown origin") if names else SameType()


def _last_arguments(frame: types.FrameType) -> str:
    """The source of a call from its last opening bracket on, "" if the source is not available."""
    positions = list(frame.f_code.co_positions())
    place = frame.f_lasti // 2
    start, end, _, column = positions[place] if place < len(positions) else (None, None, None, None)
    if start is None or end is None or column is None:
        return ""
    lines = [linecache.getline(frame.f_code.co_filename, line) for line in range(start, end + 1)]
    text = "".join([*lines[:-1], lines[-1].encode()[:column].decode(errors="ignore")])
    return text[text.rfind("(") :]


class Memory:
    """Which nodes share memory, and which change it.

    Args:
        effects: for each node, in execution order, the nodes whose memory its result may share, and those whose
            memory it changes.
    """

    def __init__(self, effects: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
        self._order = {name: place for place, name in enumerate(effects)}
        self._roots: dict[str, frozenset[str]] = {}
        self._writers: dict[str, list[str]] = {}
        for name, (shares, writes) in effects.items():
            shared = frozenset[str]().union(*(self._roots[used] for used in shares))
            self._roots[name] = shared or frozenset([name])
            for root in frozenset[str]().union(*(self._roots[used] for used in writes)):
                self._writers.setdefault(root, []).append(name)

    def writers(self, name: str) -> set[str]:
        """The nodes that change what this node holds, before or after it is made."""
        return {writer for root in self._roots[name] for writer in self._writers.get(root, ())}

    def owners(self, name: str) -> frozenset[str]:
        """The nodes that made the memory which this node changes."""
        return frozenset(root for root, writers in self._writers.items() if name in writers)

    def writers_before(self, names: Sequence[str], before: int) -> list[str]:
        """The nodes that change one of these after it was made and before position `before`, in order."""
        found = {w for name in names for w in self.writers(name) if self._order[name] < self._order[w] < before}
        return sorted(found, key=self._order.__getitem__)
