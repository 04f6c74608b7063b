"""Watch tensors while a model runs. Statistics are summed up as the tensors go by; no activation is kept.

A probe names the calls it wants to see (`idap.graph.calls`) and adds up what it sees there. One pass over the
calibration data serves all probes at once.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from idap.errors import StructureError
from idap.graph.calls import intercept
from idap.graph.ir import CallKey, Graph, leaves

Before = Callable[[tuple[Any, ...], dict[str, Any]], None]
After = Callable[[Any], None]


class Probe(Protocol):
    """Something that adds up statistics of one or several calls."""

    def before(self) -> Mapping[CallKey, Before]:
        """What to do with the arguments of a call, before it is made (it may work in place)."""

    def after(self) -> Mapping[CallKey, After]:
        """What to do with the result of a call."""


@torch.no_grad()
def observe(model: nn.Module, probes: Iterable[Probe], passes: Iterable[Callable[[nn.Module], Any]]) -> None:
    """Run the model and let the probes see the calls they asked for.

    Args:
        model: run in eval mode; its modes are put back, and nothing stays attached to it, also after an exception.
        probes: each adds up its own statistics.
        passes: each runs the model on one batch when called with it.

    Raises:
        StructureError: a call that a probe asked for was never made, so the model does not run as it was traced.
    """
    before: dict[CallKey, list[Before]] = {}
    after: dict[CallKey, list[After]] = {}
    for probe in probes:
        for key, look in probe.before().items():
            before.setdefault(key, []).append(look)
        for key, note in probe.after().items():
            after.setdefault(key, []).append(note)
    missing = set(before) | set(after)

    def handle(key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for look in before.get(key, ()):
            look(args, kwargs)
        result = func(*args, **kwargs)
        for note in after.get(key, ()):
            note(result)
        missing.discard(key)
        return result

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        with intercept(model, handle):
            for run in passes:
                run(model)
    if missing:
        path, name, number = sorted(missing)[0]
        raise StructureError(
            f"call {number} of {name!r} in module {path or '(the model itself)'!r} was seen when the model was traced "
            "but not now: its forward takes another way on this data. Trace it on inputs like the calibration data."
        )


def is_result(graph: Graph, name: str) -> bool:
    """Whether what the eager call of a node returns is the value of this node alone."""
    node = graph.nodes[name]
    if node.call is None:
        return False
    made = [other for other in graph.nodes.values() if other.call == node.call]
    if node.op == "getitem":
        return [other.name for other in made if other.op != "getitem"] == [node.args[0].name]
    read = {used for other in made for used in other.inputs()}
    return [other.name for other in made if other.name not in read] == [name]


def result_of(graph: Graph, name: str, result: Any) -> Tensor | None:
    """The value of a node in the result of the eager call that made it; None if the call returned something else."""
    node = graph.nodes[name]
    if node.op == "getitem":
        result = result[node.args[1]]
    if not isinstance(result, Tensor) or result.dim() != len(node.shape):
        return None
    return result


def tensors_given(graph: Graph, name: str) -> list[str] | None:
    """The nodes whose values the eager call of a node was given, in order; None if that can't be told."""
    made = graph.nodes[name]
    if made.call is None or any(
        other.call == made.call and other.name != name and other.op != "getitem" for other in graph.nodes.values()
    ):
        return None  # one call that makes several operators, such as F.multi_head_attention_forward
    return list(made.inputs())


def tensor_argument(graph: Graph, node: str, wanted: str) -> int | None:
    """Which of the tensors given to the eager call of a node is the value of `wanted`; None if that can't be told."""
    given = tensors_given(graph, node)
    return given.index(wanted) if given is not None and wanted in given else None


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, in order."""
    return [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]


class Energy:
    """Mean squared norm of a tensor at one position (one token, one pixel), over all its channels."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._positions = 0

    def add(self, x: Tensor, channels: int) -> None:
        """Add a batch whose positions have so many channels."""
        self._sum += float(x.float().square().sum(dtype=torch.float64))
        self._positions += x.numel() // max(1, channels)

    @property
    def seen(self) -> bool:
        """Whether there was anything to add."""
        return self._positions > 0

    @property
    def mean(self) -> float:
        """The mean so far."""
        return self._sum / max(1, self._positions)
