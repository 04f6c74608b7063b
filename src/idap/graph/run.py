"""Run a graph node by node without its module; copy models, so that no forward pass changes the user's own model."""

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from idap.errors import TraceError
from idap.graph.ir import Graph, Node, Ref
from idap.graph.rules.flow import operator


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the module tree and share its parameters: nothing that a forward pass leaves behind reaches the model."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} | copy_computed(model)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); idap works on a copy, so that your model stays as it "
            "is. Remove what cannot be copied (locks, open files, lambdas bound to C objects) from its attributes."
        ) from error
    for module in copied.modules():
        forget_cached(module)
    return copied


def copy_computed(model: nn.Module) -> dict[int, Tensor]:
    """Detached copies of the computed tensors that modules hold, as in old-style weight norm, by the tensor's id.

    `copy.deepcopy` refuses such tensors; the next forward pass computes them again.
    """
    held = (item for module in model.modules() for item in vars(module).values())
    return {id(item): item.detach().clone() for item in held if isinstance(item, Tensor) and not item.is_leaf}


def find_lazy(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that a lazy layer has not initialised yet; None if there is none."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if is_lazy(tensor)), None)


def forget_cached(module: nn.Module) -> None:
    """Empty each dictionary of a module that has "cache" in its name and holds tensors of earlier calls."""
    for name, held in vars(module).items():
        if type(held) is not dict or not held or "cache" not in name:
            continue
        if all(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in held.values()):
            held.clear()


def own_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of example inputs, so that a model which changes its inputs in place does not change the caller's."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    return copied


Special = Callable[[Node, Callable[[Any], Any]], Any]
"""Computes one node in a special way; its second argument is a function that replaces references by values."""


@torch.no_grad()
def run(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Any],
    *,
    special: Mapping[str, Special] | None = None,
    skip_to: Mapping[str, str] | None = None,
) -> list[Tensor]:
    """Compute what the model returns.

    Args:
        graph: from `trace`.
        tensors: canonical name -> parameter or buffer, in the graph's shapes; they are not changed.
        inputs: the leaves of the example inputs, in order; they are not changed.
        special: node -> the function that computes it instead of its operator.
        skip_to: node -> the node whose value it takes instead of its own (a removed branch or block).

    Returns:
        The tensors that the model returns, flattened, in order.
    """
    special, skip_to = special or {}, skip_to or {}
    live = graph.live(skip_to)
    done_with = _last_uses(graph, live, skip_to)
    values: dict[str, Any] = {}
    feed = iter(inputs)

    def fetch(tree: Any) -> Any:
        if isinstance(tree, Ref):
            return values[tree.name]
        if isinstance(tree, tuple | list):
            return [fetch(item) for item in tree]
        return tree

    for node in graph.nodes.values():
        if node.op == "input":
            value = next(feed)
            values[node.name] = value.clone() if isinstance(value, Tensor) else value
        elif node.name not in live:
            continue
        elif node.name in skip_to:
            values[node.name] = values[skip_to[node.name]]
        elif node.name in special:
            values[node.name] = special[node.name](node, fetch)
        else:
            values[node.name] = _value(graph, node, tensors, fetch)
        for name in done_with.get(node.name, ()):
            values.pop(name, None)
    return [values[name] for name in graph.outputs]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by canonical name, tied ones once."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _last_uses(graph: Graph, live: Set[str], skip_to: Mapping[str, str]) -> dict[str, list[str]]:
    """For each node, the values that no later node reads, so that they can be released."""
    last: dict[str, str] = {}
    for node in graph.nodes.values():
        if node.name in live:
            for used in (skip_to[node.name],) if node.name in skip_to else node.inputs():
                last[used] = node.name
    found: dict[str, list[str]] = {}
    for used, reader in last.items():
        if used not in graph.outputs:
            found.setdefault(reader, []).append(used)
    return found


def _value(graph: Graph, node: Node, tensors: Mapping[str, Tensor], fetch: Callable[[Any], Any]) -> Any:
    if node.op in ("parameter", "buffer"):
        return tensors[node.target].detach().clone()
    if node.op == "constant":
        return graph.constants[node.name].clone()
    if node.op == "getitem":
        return fetch(node.args[0])[node.args[1]]
    if node.op == "aten.view.default":  # a masked tensor may have another memory layout than the original
        return fetch(node.args[0]).reshape(fetch(node.args[1]))
    return operator(node)(*fetch(node.args), **{key: fetch(value) for key, value in node.kwargs.items()})
