"""Export a module with `torch.export` and turn the result into a `Graph`. The only file that calls the exporter."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from idap.errors import TraceError
from idap.graph.calls import watch_attributes
from idap.graph.convert import Converter, module_names, tensor_names
from idap.graph.frames import Frame
from idap.graph.ir import Graph, ModuleInfo
from idap.graph.modes import Frames, OtherRuns, run_in_other_modes
from idap.graph.provenance import sizes_held
from idap.graph.recording import record_forward
from idap.graph.run import find_lazy, own_inputs, skeleton


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Export a model in eval mode and return its operators as plain data.

    Args:
        model: any module that `torch.export` can export (non-strict); it is not changed. Meta tensors are allowed.
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
    _check_arguments(args)
    if (name := find_lazy(model)) is not None:
        raise TraceError(f"{name!r} of the model is not initialised yet: run the model once on a batch, then trace it.")
    kwargs = dict(kwargs or {})
    paths = module_names(model)
    shared = len(set(paths.values())) < len(paths)
    seen = _try(model, args, kwargs) if _worth_running(model, (args, kwargs), shared=shared) else None
    traced = skeleton(model).eval()
    modules = list(_describe(traced))
    with record_forward(traced) as record:
        try:
            with watch_attributes(traced) as watched:
                program = _export(traced, args, kwargs)
        except TraceError:
            if seen is None:
                _try(model, args, kwargs)  # raises a clearer error if the model refuses the inputs
            raise
        tensors = _tensor_items(traced)
        converter = Converter(program, record, tensor_names(tensors), paths)
    other = run_in_other_modes(model, args, kwargs, record.frames)
    readers, alone = (watched, []) if seen is None else (seen[0], [seen[1], *other.unmasked])
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
        escaped=converter.find_escapes(other.escaped),
        comparisons=converter.comparisons(),
        returned=converter.returned,
        frames=_in_both_modes(_variants([record.frames, *alone]), other),
        places=converter.places,
        dropped=other.dropped,
        unwritable=other.unwritable,
        module_aliases={path: first for path, first in paths.items() if path != first},
        unsaved=_transient_tensors(traced, converter.canonical),
    )


def _transient_tensors(model: nn.Module, canonical: Mapping[str, str]) -> tuple[str, ...]:
    """The tensors that the model's state does not hold under any of their names."""
    saved = {canonical.get(name) for name in model.state_dict(keep_vars=True)}
    return tuple(name for name, first in canonical.items() if name == first and name not in saved)


def _check_arguments(args: object) -> None:
    if not isinstance(args, tuple):
        raise TraceError(
            f"example inputs must be a tuple of positional arguments, found {type(args).__name__}; "
            "for one input x write (x,)."
        )


def _worth_running(model: nn.Module, inputs: Any, *, shared: bool) -> bool:
    """Whether an ordinary run may show more than the export.

    Code that receives whole numbers may branch on their values, and the calls of shared modules can't be followed
    during an export. On the meta device there are no values.
    """
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in (*given, *model.parameters())):
        return False
    return shared or not all(tensor.is_floating_point() for tensor in given)


def _variants(runs: Sequence[Frames]) -> dict[str, tuple[tuple[Frame, ...], ...]]:
    """What each module did in each run, without repetitions; the first run is the exported one."""
    found: dict[str, tuple[tuple[Frame, ...], ...]] = {}
    for path in runs[0]:
        ways: list[tuple[Frame, ...]] = []
        for frames in (tuple(run.get(path, ())) for run in runs):
            if frames and frames not in ways:
                ways.append(frames)
        found[path] = tuple(ways)
    return found


def _in_both_modes(
    variants: Mapping[str, tuple[tuple[Frame, ...], ...]], other: OtherRuns
) -> dict[str, tuple[tuple[Frame, ...], ...]]:
    """The variants, with the dropouts that modules call only in training."""
    found = dict(variants)
    for path, frames in other.training.items():
        if len(variants[path]) == 1:
            found[path] = (frames,)
        else:
            other.unwritable.setdefault(path, "it calls dropout only in training and takes several paths in evaluation")
    return found


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, set[str]], Frames]:
    """Run a copy of the model once.

    Returns:
        For each module, the other modules whose code reads its attributes; and what each module's code did.
    """
    copied = skeleton(model).eval()
    try:
        mine, named = own_inputs(args, kwargs)
        with torch.no_grad(), record_forward(copied) as record, watch_attributes(copied) as readers:
            copied(*mine, **named)
    except Exception as error:
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
        raise TraceError(
            f"{type(model).__name__} does not accept the example inputs (shapes {shapes}): "
            f"{type(error).__name__}: {error}. Pass inputs on which model(*args, **kwargs) runs."
        ) from error
    return readers, record.frames


def _export(traced: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        with fx_traceback.preserve_node_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(traced, args, kwargs, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise TraceError(
            f"torch.export cannot export {type(traced).__name__}: {type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}. {_way_out(str(error))}"
        ) from error


def _way_out(reason: str) -> str:
    if "Cache" in reason:
        return (
            "A model of transformers must not return its cache of keys and values while it is traced: set "
            "model.config.use_cache = False. Text generation can still use the cache: generate(use_cache=True)."
        )
    rest = "or compress a part of the model that does not contain it."
    if "pytree" in reason and "register" in reason:
        return f"Return a tensor, a tuple or a dict, register the class (torch.export.register_dataclass), {rest}"
    if "is not an instance of torch.nn.Parameter" in reason:
        return f"A scripted module can't be exported: build the model with the unscripted module instead, {rest}"
    if any(part in reason.lower() for part in ("data-dependent", "data dependent", "datadependent", "unbacked")):
        return f"Code whose path depends on the values in a tensor cannot be exported: rewrite it, {rest}"
    return f"Rewrite the code that the exporter names, {rest}"


def _describe(model: nn.Module) -> Iterator[tuple[str, ModuleInfo]]:
    canonical = tensor_names(_tensor_items(model))
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {name: canonical[f"{path}.{name}" if path else name] for name, _ in own}
        kinds = type(module).__mro__
        of_torch = (c for c in kinds if getattr(nn, c.__name__, None) is c and c is not nn.Module)
        layer = next((c.__name__ for c in of_torch), "")
        bases = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
        yield path, ModuleInfo(bases[0], layer, sizes_held(module), tensors, bases=bases)


def _tensor_items(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, parameters first."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
