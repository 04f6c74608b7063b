"""Export a module with `torch.export` and turn the result into a `Graph`. The only file that calls the exporter."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from idap.errors import TraceError
from idap.graph.calls import watch_attributes
from idap.graph.convert import Converter, module_names, tensor_names
from idap.graph.ir import Graph, ModuleInfo
from idap.graph.provenance import sizes_held
from idap.graph.recording import recorded


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the module tree and share its parameters: what a forward pass leaves behind never reaches the model."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); idap works on a copy, so that your model stays as it "
            "is. Remove what cannot be copied (locks, open files, lambdas bound to C objects) from its attributes."
        ) from error


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Export a model in eval mode and return its operators as plain data.

    Args:
        model: any module that `torch.export` can export (non-strict); it is left as it was. Meta tensors are fine.
        args: positional example inputs, always a tuple.
        kwargs: keyword example inputs.

    Returns:
        The graph: every operator with its shapes, owner module, source line and the origin of its sizes.

    Raises:
        TraceError: the inputs are not a tuple, the model refuses them, or it cannot be exported.

    Example:
        >>> graph = trace(nn.Linear(3, 2), (torch.zeros(1, 3),))
        >>> graph.ops()["aten.linear.default"], graph.shapes["weight"]
        (1, (2, 3))
    """
    if not isinstance(args, tuple):
        raise TraceError(
            f"example inputs must be a tuple of positional arguments, found {type(args).__name__}; "
            "for one input x write (x,)."
        )
    kwargs = dict(kwargs or {})
    readers = _try(model, args, kwargs)
    traced = skeleton(model).eval()
    modules = list(_describe(traced))
    with recorded(traced) as record:
        program = _export(traced, args, kwargs)
        tensors = _named_tensors(traced)
        converter = Converter(program, record, tensor_names(tensors), module_names(traced))
    return Graph(
        nodes=converter.nodes,
        outputs=converter.outputs,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors if converter.canonical[name] == name},
        aliases={name: first for name, first in converter.canonical.items() if name != first},
        modules={
            path: replace(info, calls=converter.calls(path), read_by=frozenset(readers.get(path, ())))
            for path, info in modules
        },
        constants=converter.constants,
        escaped=converter.escaped(),
        comparisons=converter.comparisons(),
    )


def own_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of example inputs, so that a model which changes its inputs in place does not change the caller's."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    return copied


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, set[str]]:
    """Run a copy of the model once; returns by module the others whose code reads its attributes."""
    copied = skeleton(model).eval()
    try:
        mine, named = own_inputs(args, kwargs)
        with torch.no_grad(), watch_attributes(copied) as readers:
            copied(*mine, **named)
    except Exception as error:
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
        raise TraceError(
            f"{type(model).__name__} does not accept the example inputs (shapes {shapes}): "
            f"{type(error).__name__}: {error}. Pass inputs on which model(*args, **kwargs) runs."
        ) from error
    return readers


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        with fx_traceback.preserve_node_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise TraceError(
            f"torch.export cannot export {type(model).__name__}: {type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}. Code whose path depends on the values in a tensor cannot "
            "be exported: rewrite it, or compress the part of the model that has none."
        ) from error


def _describe(model: nn.Module) -> Iterator[tuple[str, ModuleInfo]]:
    canonical = tensor_names(_named_tensors(model))
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {name: canonical[f"{path}.{name}" if path else name] for name, _ in own}
        kind = type(module)
        of_torch = (c for c in kind.__mro__ if c.__module__.startswith("torch.nn.modules.") and c is not nn.Module)
        layer = next((c.__name__ for c in of_torch), "")
        yield path, ModuleInfo(f"{kind.__module__}.{kind.__qualname__}", layer, sizes_held(module), tensors)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, parameters first."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
