"""Watch tensors while a model runs: statistics are summed up during the run, and no activation is kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from idap.errors import StructureError, TaskError
from idap.graph.calls import intercept
from idap.graph.ir import CallKey, Graph, leaves
from idap.memory import Need
from idap.training.evaluate import keep_modes
from idap.training.processes import process_count

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Before = Callable[[tuple[Any, ...], dict[str, Any]], Arguments | None]
After = Callable[[Any], None]


@dataclass(frozen=True)
class Pass:
    """One calibration batch.

    Attributes:
        run: runs a model on the batch and returns the outputs.
        loss: returns the mean loss of these outputs over the samples; None: there are no labels.
        padding: which positions of a sequence count, bool of shape (samples, positions); None: all positions count.
    """

    run: Callable[[nn.Module], Any]
    loss: Callable[[Any], Tensor] | None = None
    padding: Tensor | None = None


class Probe(Protocol):
    """An object that adds up statistics of one or several calls."""

    def before(self) -> Mapping[CallKey, Before]:
        """Call -> a function that sees its arguments before it is made (it may work in place) and may replace them."""

    def after(self) -> Mapping[CallKey, After]:
        """Call -> a function that sees its result."""


def observe(
    model: nn.Module,
    probes: Iterable[Probe],
    passes: Iterable[Pass],
    *,
    begin: Callable[[Pass], None] = lambda _: None,
    end: Callable[[Pass, Any], None] = lambda _pass, _outputs: None,
    gradients: bool = False,
) -> int:
    """Run the model and let the probes see the calls they asked for.

    Args:
        model: runs in eval mode; afterwards, also after an exception, its modes are restored and all hooks are removed.
        probes: each adds up its own statistics.
        passes: the batches, run in order.
        begin: called before each pass.
        end: called after each pass, with the outputs.
        gradients: keep what a backward pass needs; the probes themselves still run without gradients.

    Returns:
        The number of passes.

    Raises:
        StructureError: a call that a probe asked for was never made, so the model does not run as it was traced.
    """
    before, after = _by_call(probes)
    missing = set(before) | set(after)

    def handle(key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            for look in before.get(key, ()):
                args, kwargs = look(args, kwargs) or (args, kwargs)
        result = func(*args, **kwargs)
        with torch.no_grad():
            for note in after.get(key, ()):
                note(result)
        missing.discard(key)
        return result

    count = 0
    with ExitStack() as stack:
        stack.enter_context(keep_modes(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for each in passes:
            begin(each)
            with intercept(model, handle):
                outputs = each.run(model)
            end(each, outputs)
            count += 1
    if count and missing:
        path, name, number = sorted(missing)[0]
        raise StructureError(
            f"call {number} of {name!r} in module {path or '(the model itself)'!r} was seen when the model was traced "
            "but not now: its forward takes another path on this data. Trace it on inputs like the calibration data."
        )
    return count


def _by_call(probes: Iterable[Probe]) -> tuple[dict[CallKey, list[Before]], dict[CallKey, list[After]]]:
    """The functions that all probes together run before and after each call."""
    before: dict[CallKey, list[Before]] = {}
    after: dict[CallKey, list[After]] = {}
    for probe in probes:
        for key, look in probe.before().items():
            before.setdefault(key, []).append(look)
        for key, note in probe.after().items():
            after.setdefault(key, []).append(note)
    return before, after


def sum_over_processes(sums: Sequence[dict[str, Tensor]]) -> None:
    """Add up statistics over all processes of a distributed run, in place; a single process changes nothing.

    Raises:
        TaskError: another process has seen other tensors.
    """
    if process_count() == 1:
        return
    values = [held[name] for held in sums for name in sorted(held)]
    flat = torch.cat([value.detach().double().cpu().ravel() for value in values]) if values else torch.zeros(0)
    sizes: list[int | None] = [None] * process_count()
    torch.distributed.all_gather_object(sizes, len(flat))
    if len(set(sizes)) > 1:
        raise TaskError(
            f"the processes measured different tensors ({sizes} numbers); each needs at least one calibration batch."
        )
    device = values[0].device if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    flat = flat.to(device)
    torch.distributed.all_reduce(flat)
    start = 0
    for value in values:
        value.copy_(flat[start : start + value.numel()].reshape(value.shape))
        start += value.numel()


def is_result(graph: Graph, name: str) -> bool:
    """Whether the eager call of a node returns the value of this node and nothing else."""
    node = graph.nodes[name]
    if node.call is None:
        return False
    made = graph.call_nodes[node.call]
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
    """The nodes whose values the eager call of a node was given, in order; None if they can't be determined."""
    made = graph.nodes[name]
    if made.call is None or any(other.name != name and other.op != "getitem" for other in graph.call_nodes[made.call]):
        return None  # one call that makes several operators, such as F.multi_head_attention_forward
    return list(made.inputs())


def tensor_argument(graph: Graph, node: str, wanted: str) -> int | None:
    """Position of `wanted` among the tensors given to the eager call of a node; None if it can't be determined."""
    given = tensors_given(graph, node)
    return given.index(wanted) if given is not None and wanted in given else None


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, in order."""
    return [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]


MEMORY = 2 * 2**30
"""Bytes that the second moments of one pass may take."""


@dataclass(frozen=True)
class Job:
    """One measurement that frees its memory when it is finished.

    Attributes:
        name: name of the group that it measures.
        need: the memory that it needs.
        probes: its probes.
        settle: called once, after the pass and before sums are added up over processes.
        sums: the sums to be added up over processes; they are complete after `settle`.
        finish: called once, after the sums are added up.
    """

    name: str
    need: Need
    probes: Sequence[Probe]
    settle: Callable[[], None]
    sums: Sequence[dict[str, Tensor]]
    finish: Callable[[], None]
