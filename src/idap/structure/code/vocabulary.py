"""The functions that a program may call, and the arguments that it may pass: `functions.txt`, one function per line.

Plans may come from strangers. So the list holds only functions that compute tensors from tensors and numbers. None of
them reads memory by address, keeps its arguments, calls back, or makes tensors whose size depends on data. The
arguments are those of the function's ATen schema, without `out`, generators, layouts and names of dimensions.

A signature lists its parameters, separated by spaces, as ``name:kind``. ``name=:kind`` may be left out, ``name:kind?``
may be None, and ``a|b`` takes either kind. Parameters after ``*`` are passed by name alone. ``*sizes:int`` takes whole
numbers one by one, or one list of them. `` / `` separates overloads.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from idap.graph.recording import torch_functions
from idap.structure.code.safeguards import SAFEGUARDED

Tree = Any
"""An argument as data; see `idap.structure.code.program`."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature.

    Attributes:
        name: as callers pass it.
        kinds: kinds of arguments that it takes; see `KINDS`. A kind in quotes takes exactly the quoted text.
        required: whether it must be passed.
        by_name: whether it can only be passed by name.
        rest: whether it takes all positional arguments that are left.
    """

    name: str
    kinds: tuple[str, ...]
    required: bool
    by_name: bool = False
    rest: bool = False

    def takes(self, tree: Tree) -> bool:
        """Whether an argument is of one of the kinds."""
        return any(tree == kind[1:-1] if kind[0] == "'" else KINDS[kind](tree) for kind in self.kinds)


Signature = tuple[Parameter, ...]


def read_signatures(text: str) -> tuple[Signature, ...]:
    """Read the overloads of a function.

    >>> [[p.name for p in signature] for signature in read_signatures("self:tensor dim=:int? / self:tensor")]
    [['self', 'dim'], ['self']]
    """
    return tuple(_read_signature(part) for part in text.split(" / "))


def fits(overloads: Iterable[Signature], args: Sequence[Tree], kwargs: Iterable[tuple[str, Tree]]) -> bool:
    """Whether one of the overloads takes the arguments: their number, their names and the kind of each.

    >>> softmax = read_signatures("self:tensor dim:int * dtype=:dtype?")
    >>> fits(softmax, (("value", 0), -1), ())
    True
    >>> fits(softmax, (("value", 0),), [("dim", 1), ("out", ("value", 0))])
    False
    """
    kwargs = tuple(kwargs)
    named = dict(kwargs)
    return len(named) == len(kwargs) and any(_fits(signature, args, named) for signature in overloads)


def _read_signature(text: str) -> Signature:
    found, by_name = [], False
    for word in text.split():
        if word == "*":
            by_name = True
            continue
        match = re.fullmatch(r"(\*?)(\w+)(=?):(\S+)", word)
        if match is None:
            raise ValueError(f"{word!r} is not a parameter")
        rest, name, optional, kinds = match.groups()
        either = tuple(kinds.removesuffix("?").split("|")) + (("none",) if kinds.endswith("?") else ())
        unknown = [kind for kind in either if kind not in KINDS and kind[0] != "'"]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a kind of argument")
        found.append(Parameter(name, either, not optional, by_name, bool(rest)))
    return tuple(found)


def _fits(signature: Signature, args: Sequence[Tree], named: Mapping[str, Tree]) -> bool:
    left, unused = list(args), set(named)
    for parameter in signature:
        if parameter.rest:
            if len(left) == 1 and parameter.name not in named and _all(parameter.takes)(left[0]):
                left = []
            elif left:
                if not all(parameter.takes(tree) for tree in left):
                    return False
                left = []
            elif parameter.name in named and _all(parameter.takes)(named[parameter.name]):
                unused.discard(parameter.name)
            else:
                return False
        elif left and not parameter.by_name:
            if parameter.name in named or not parameter.takes(left.pop(0)):
                return False
        elif parameter.name in named:
            if not parameter.takes(named[parameter.name]):
                return False
            unused.discard(parameter.name)
        elif parameter.required:
            return False
    return not left and not unused


def _tag(tree: Tree) -> str:
    return tree[0] if isinstance(tree, tuple) and tree and isinstance(tree[0], str) else ""


def _int(tree: Tree) -> bool:
    return type(tree) is int or _tag(tree) in ("int", "size", "calc")


def _number(tree: Tree) -> bool:
    return _int(tree) or type(tree) in (float, bool) or _tag(tree) in ("float", "in training")


def _all(takes: Callable[[Tree], bool]) -> Callable[[Tree], bool]:
    """A test whether a tree is a list or tuple, each item of which passes another test."""
    return lambda tree: _tag(tree) in ("list", "tuple") and all(map(takes, tree[1:]))


def _plain(least: int, most: int) -> Callable[[Tree], bool]:
    """A test whether a tree is a number that the plan holds literally, or a list of such numbers, within bounds."""

    def takes(tree: Tree) -> bool:
        numbers = tree[1:] if _tag(tree) in ("list", "tuple") else (tree,)
        return all(type(number) is int and least <= number <= most for number in numbers)

    return takes


def _tensor(tree: Tree) -> bool:
    return _tag(tree) in ("value", "own")


def _index(tree: Tree) -> bool:
    """Whether a tree may stand between the brackets of ``x[...]``."""
    if _tag(tree) == "slice":
        return all(part is None or _int(part) for part in tree[1:])
    return tree is None or type(tree) is bool or _int(tree) or _tensor(tree) or tree == ("ellipsis",)


def _indices(tree: Tree) -> bool:
    """Whether a tree is an index or a tuple of them; lists of numbers are not, since torch makes tensors of them."""
    return _index(tree) or (_tag(tree) == "tuple" and all(map(_index, tree[1:])))


def _equation(tree: Tree) -> bool:
    return type(tree) is str and re.fullmatch(r"[A-Za-z,.> -]{1,200}", tree) is not None


KINDS: Mapping[str, Callable[[Tree], bool]] = {
    "none": lambda tree: tree is None,
    "tensor": _tensor,
    "tensors": _all(_tensor),
    "int": _int,
    "ints": lambda tree: _int(tree) or _all(_int)(tree),
    "counts": _plain(0, 2**31),
    "strides": _plain(1, 128),
    "hops": _plain(1, 4096),
    "number": _number,
    "numbers": lambda tree: _number(tree) or _all(_number)(tree),
    "bool": lambda tree: type(tree) is bool or tree == ("training",),
    "dtype": lambda tree: _tag(tree) == "dtype" or tree == ("same type",),
    "device": lambda tree: tree == ("device",),
    "format": lambda tree: _tag(tree) == "format",
    "index": _indices,
    "equation": _equation,
}
"""Kind of argument -> whether a tree is one."""

FILE = "functions.txt"
_POOL_SIZES = ("padding", "dilation")

_ROIS = "its kernel reads images by numbers in its boxes that it does not check"
UNCHECKED_MODULES: Mapping[str, str] = {
    "torch.nn.modules.sparse.EmbeddingBag": "its kernel reads its tables by offsets that it does not check",
    "torch.nn.modules.loss.CTCLoss": "its kernel reads scores by lengths and labels that it does not check",
    "torchvision.ops.deform_conv.DeformConv2d": "its kernel does not check offsets against the image",
    "torchvision.ops.poolers.MultiScaleRoIAlign": _ROIS,
    "torchvision.ops.ps_roi_align.PSRoIAlign": _ROIS,
    "torchvision.ops.ps_roi_pool.PSRoIPool": _ROIS,
    "torchvision.ops.roi_align.RoIAlign": _ROIS,
    "torchvision.ops.roi_pool.RoIPool": _ROIS,
}
"""Class of a module that a program may not call -> the reason. Modules are the user's own, so the list can't be
complete; docs/security.md says what that means."""


@cache
def vocabulary() -> Mapping[str, tuple[Signature, ...]]:
    """Name of each function that a program may call -> its overloads."""
    found = {}
    for line in files(__package__).joinpath(FILE).read_text(encoding="utf-8").splitlines():
        entry = line.partition("#")[0].strip()
        if entry:
            name, _, signature = entry.partition(" ")
            found[name] = read_signatures(signature)
    return found


@cache
def exclusions() -> frozenset[str]:
    """The functions that models of the coverage call but a program may not; the file gives the reasons."""
    lines = files(__package__).joinpath(FILE).read_text(encoding="utf-8").splitlines()
    refused = [line.partition("(")[0].removeprefix("# refused:") for line in lines if line.startswith("# refused:")]
    return frozenset(name for line in refused for name in line.split())


def module_hazard(bases: Iterable[str], sizes: Mapping[str, int | tuple[int, ...]] | None = None) -> str | None:
    """Why a program may not call a module; None if it may.

    Programs choose the inputs of the modules that they call. The kernels of a few classes use inputs as positions in
    memory without checking them.

    Args:
        bases: the names of the module's class and of all its base classes, with their packages.
        sizes: the whole numbers, and tuples of them, that the module holds.

    >>> module_hazard(["mine.Bag", "torch.nn.modules.sparse.EmbeddingBag"])
    'its kernel reads its tables by offsets that it does not check'
    >>> module_hazard(["torch.nn.modules.sparse.Embedding"]) is None
    True
    >>> module_hazard(["torch.nn.modules.pooling._MaxPoolNd"], {"padding": 1, "dilation": (2, 2)})
    'with padding and a dilation, its gradient may lie outside of a small input'
    """
    bases, sizes = tuple(bases), sizes or {}
    padding, dilation = (max(each) if isinstance(each := sizes.get(name, 0), tuple) else each for name in _POOL_SIZES)
    if "torch.nn.modules.pooling._MaxPoolNd" in bases and padding > 0 and dilation > 1:
        return "with padding and a dilation, its gradient may lie outside of a small input"
    return next((UNCHECKED_MODULES[name] for name in bases if name in UNCHECKED_MODULES), None)


def function_of_name(name: str) -> Callable[..., Any]:
    """The function of the list with this name, or the one that rewritten code calls in its place."""
    if name not in vocabulary():
        raise KeyError(name)
    return SAFEGUARDED.get(name) or torch_functions()[name]


def takes_device(name: str) -> bool:
    """Whether a function of the list takes the device on which it makes a tensor."""
    return any(parameter.name == "device" for signature in vocabulary()[name] for parameter in signature)


def mistake(name: str, args: Sequence[Tree], kwargs: Iterable[tuple[str, Tree]]) -> str:
    """What is wrong with the call of a function by a program; "" if nothing is.

    >>> mistake("os.system", ("ls",), ())
    "calls 'os.system', which is not among the functions that rewritten code may call"
    >>> mistake("torch.Tensor.view", (("value", 0), 2, 3), ())
    ''
    >>> mistake("torch.Tensor.view", (("value", 0), 2, 3), [("cdata", 1)])
    "calls 'torch.Tensor.view' with arguments that rewritten code may not give it: ('value', 0), 2, 3, cdata=1"
    """
    if name not in vocabulary():
        return f"calls {name!r:.80}, which is not among the functions that rewritten code may call"
    kwargs = tuple(kwargs)
    by_place = name.rpartition(".")[2].startswith("__")  # Python's own methods take no names
    if fits(vocabulary()[name], args, kwargs) and not (kwargs and by_place):
        return ""
    given = ", ".join([*map(repr, args), *(f"{key}={tree!r}" for key, tree in kwargs)])
    return f"calls {name!r} with arguments that rewritten code may not give it: {given:.200}"
