"""The functions that a program may call, each with the arguments that it may hand over: `functions.txt`, a line each.

Plans come from strangers. So the list holds functions that compute tensors from tensors and numbers, and nothing that
reaches memory by address, keeps what it is given, calls back, or makes tensors of a size that data decide. Arguments
are those of the function's ATen schema, without `out`, generators, layouts and names of dimensions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from idap.graph.recording import torch_functions
from idap.structure.signatures import Signature, Tree, fits, read_signatures

FILE = "functions.txt"


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
def refused() -> frozenset[str]:
    """The functions that models of the coverage call and that a program may not, with the reason in the file."""
    lines = files(__package__).joinpath(FILE).read_text(encoding="utf-8").splitlines()
    told = [line.partition("(")[0].removeprefix("# refused:") for line in lines if line.startswith("# refused:")]
    return frozenset(name for line in told for name in line.split())


def function_of_name(name: str) -> Callable[..., Any]:
    """A function of the list."""
    if name not in vocabulary():
        raise KeyError(name)
    return torch_functions()[name]


def takes_device(name: str) -> bool:
    """Whether a function of the list can be told on which device it makes a tensor."""
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
    if fits(vocabulary()[name], args, kwargs):
        return ""
    told = ", ".join([*map(repr, args), *(f"{key}={tree!r}" for key, tree in kwargs)])
    return f"calls {name!r} with arguments that rewritten code may not give it: {told:.200}"
