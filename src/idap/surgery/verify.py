"""Verify a cut: the cut model must compute what the masked original computes, and must still run in training mode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from idap.errors import VerificationError
from idap.graph.ir import Graph, Node, Ref
from idap.graph.labels import Dim
from idap.graph.rules.flow import arguments, operator
from idap.graph.rules.layers import default_scale
from idap.graph.run import own_inputs, run, skeleton, tensors_of
from idap.structure.analysis import Structure
from idap.structure.layout import Presence, count, slots
from idap.structure.plan import Plan
from idap.surgery.compare import difference, outputs_of
from idap.surgery.stand_ins import LinearMap

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Proof:
    """How close a cut model is to the masked original.

    Attributes:
        error: the largest difference of an output, divided by the largest value of that output of the masked
            original; the maximum over all outputs.
        crossed: nodes, such as norms, that the masked original had to compute over the kept slots alone; if there are
            none, it is the original with zeros in its weights, and otherwise unchanged.
    """

    error: float
    crossed: tuple[str, ...]


def verify(
    structure: Structure,
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    since: Plan | None = None,
    maps: Mapping[str, LinearMap] | None = None,
    tolerance: float = TOLERANCE,
) -> Proof:
    """Compare a cut model with the masked original on example inputs.

    Args:
        structure: of the traced original.
        original: the model that was cut. The masked original takes its weights from this model, never from `pruned`.
        pruned: the cut model.
        plan: the cut, in the indices of the traced original.
        inputs: positional and keyword inputs of the shapes that were traced.
        since: the plan that had already been applied to `original`; None: `original` is the traced original.
        maps: the linear maps of the projections that this cut made. Projections of earlier cuts are in `original`.
        tolerance: largest relative difference allowed.

    Returns:
        The largest relative difference, and the nodes that were computed over the kept slots alone.

    Raises:
        VerificationError: the cut model does not run, or its outputs differ; names the groups that were cut.
    """
    args, kwargs = inputs
    leaves = tree_leaves((args, dict(kwargs)))
    reference = masked_outputs(structure, original, plan, leaves, since=since, maps=maps)
    try:
        found = outputs_of(pruned, args, dict(kwargs))
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run: {type(error).__name__}: {error} (cut: {_names(plan)})"
        ) from error
    crossed = tuple(_nodes_across(structure, structure.presence(plan.keep)))
    if len(found) != len(reference):
        raise VerificationError(
            f"the cut model returns {len(found)} tensors, the original {len(reference)} (cut: {_names(plan)})"
        )
    worst = 0.0
    for place, (mine, theirs) in enumerate(zip(found, reference, strict=True)):
        if mine.shape != theirs.shape:
            raise VerificationError(
                f"output {place} of the cut model has shape {tuple(mine.shape)}, that of the masked original "
                f"{tuple(theirs.shape)} (cut: {_names(plan)})"
            )
        worst = max(worst, difference(mine, theirs))
    if not worst <= tolerance:
        raise VerificationError(
            f"the cut model differs from the masked original by {worst:.2g} of its largest output, allowed is "
            f"{tolerance:g} (cut: {_names(plan)})"
        )
    return Proof(worst, crossed)


def masked_outputs(
    structure: Structure,
    original: nn.Module,
    plan: Plan,
    inputs: Sequence[Any],
    *,
    since: Plan | None = None,
    maps: Mapping[str, LinearMap] | None = None,
) -> list[Tensor]:
    """Outputs of the original's graph with the removed slots masked and the removed branches skipped or projected.

    Outputs that may shrink, because they are no contracts, are returned with their kept slots alone.

    Args:
        structure: of the traced original.
        original: gives the weights.
        plan: what is masked and skipped.
        inputs: the leaves of the example inputs, in order.
        since: the plan that had already been applied to `original`.
        maps: module path -> the linear map of a projection that `original` does not have yet.
    """
    structure = structure.after(plan.removed)
    graph = structure.graph
    present = structure.presence(plan.keep)
    fresh = {
        name: tensor
        for path, given in (maps or {}).items()
        if path in plan.projections
        for name, tensor in given.tensors(plan.projections[path], path).items()
    }
    full = _full_size(graph, original, Plan(shapes=graph.shapes) if since is None else since, fresh)
    tensors = {name: _mask(tensor, plan.slots_kept(name).slots) for name, tensor in full.items()}
    special = dict.fromkeys(_nodes_across(structure, present, every=True), _over_kept(structure, present))
    outputs = run(graph, tensors, inputs, special=special, skip_to=structure.skips(plan.removed))
    return [
        _gather(output, structure.layout.dims[name][0], present)
        for name, output in zip(graph.outputs, outputs, strict=True)
    ]


def _full_size(graph: Graph, model: nn.Module, since: Plan, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors in the traced original's shapes, zero where an earlier plan removed slots."""
    held = tensors_of(model)
    like = next((tensor for tensor in held.values() if tensor.is_floating_point()), torch.empty(0))
    full = {}
    for name, shape in graph.shapes.items():
        if name not in held:  # it belongs to a new projection, or to a removed block, where nothing reads it
            full[name] = fresh[name].to(like) if name in fresh else like.new_zeros(shape)
            continue
        small = held[name].detach()
        for dim, kept in since.slots_kept(name).slots.items():
            wide = small.new_zeros([*small.shape[:dim], shape[dim], *small.shape[dim + 1 :]])
            small = wide.index_copy(dim, torch.tensor(kept, device=small.device), small)
        full[name] = small
    return full


def _mask(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The tensor with zeros in all removed slots."""
    for dim, places in kept.items():
        mask = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
        mask[list(places)] = True
        tensor = torch.where(mask.reshape([-1 if d == dim else 1 for d in range(tensor.dim())]), tensor, 0)
    return tensor


def _names(plan: Plan) -> str:
    return ", ".join([*plan.keep, *plan.removed]) or "nothing"


def _nodes_across(structure: Structure, present: Presence, *, every: bool = False) -> list[str]:
    """Nodes that compute across a dimension with removed slots; products of activations only if `every`."""
    found = []
    for name, kind in structure.layout.crossings.items():
        if kind == "contraction" and not every:
            continue
        dims = [dim for used in structure.graph.nodes[name].inputs() for dim in structure.layout.dims[used][0]]
        if any(count(dim, present) != dim.shape[1] for dim in dims):
            found.append(name)
    return found


def _over_kept(structure: Structure, present: Presence) -> Callable[[Node, Callable[[Any], Any]], Any]:
    """A function that computes a node on the kept slots of its inputs, and fills the other slots with zeros."""
    layout = structure.layout
    sizes: dict[tuple[str, str, int | None], int] = {
        (use.node, use.argument, use.index): use.sign * count(use.dim, present) for use in layout.sizes
    }

    def narrow(tree: Any, fetch: Callable[[Any], Any]) -> Any:
        if isinstance(tree, Ref):
            return _gather(fetch(tree), layout.dims[tree.name][0], present)
        if isinstance(tree, tuple | list):
            return [narrow(item, fetch) for item in tree]
        return tree

    def resize(node: Node, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [sizes.get((node.name, name, place), item) for place, item in enumerate(value)]
        return sizes.get((node.name, name, None), value)

    def compute(node: Node, fetch: Callable[[Any], Any]) -> Any:
        function = operator(node)
        given = {name: resize(node, name, narrow(value, fetch)) for name, value in arguments(node).items()}
        scale = default_scale(structure.graph, node)
        given |= {"scale": scale} if scale is not None else {}
        names = [argument.name for argument in function._schema.arguments if not argument.kwarg_only]
        result = function(*[given.pop(name) for name in names], **given)
        if isinstance(result, tuple | list):
            return [_scatter(r, dims, present) for r, dims in zip(result, layout.dims[node.name], strict=True)]
        return _scatter(result, layout.dims[node.name][0], present)

    return compute


def _gather(tensor: Tensor, dims: Sequence[Dim], present: Presence) -> Tensor:
    for place, dim in enumerate(dims):
        if count(dim, present) != dim.shape[1]:
            tensor = tensor.index_select(place, _slot_indices(dim, present, tensor))
    return tensor


def _scatter(tensor: Tensor, dims: Sequence[Dim], present: Presence) -> Tensor:
    for place, dim in enumerate(dims):
        if count(dim, present) != dim.shape[1]:
            shape = [*tensor.shape[:place], dim.shape[1], *tensor.shape[place + 1 :]]
            tensor = tensor.new_zeros(shape).index_copy(place, _slot_indices(dim, present, tensor), tensor)
    return tensor


def _slot_indices(dim: Dim, present: Presence, like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(slots(dim, present))).to(like.device)


def training_failure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Run a model forward in training mode.

    Args:
        model: left as it is, with its buffers; torch's random state does not change either.
        args: positional example inputs.
        kwargs: keyword example inputs.

    Returns:
        The error that the model raised; "" if it runs.

    Example:
        >>> training_failure(nn.Linear(3, 2), (torch.zeros(1, 3),), {})
        ''
    """
    copied = skeleton(model).train()
    given, named = own_inputs(args, kwargs)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            copied(*given, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
