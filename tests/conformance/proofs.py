"""What is proved of every architecture, each proof by means that the analysis has no part in."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from idap.errors import VerificationError
from idap.graph.ir import Graph
from idap.graph.labels import Dim
from idap.graph.run import forget_cached
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.layout import Layout
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.conformance.case import Case

SHARE = 0.3
"""How much of every axis a random plan removes."""


@dataclass
class Row:
    """What was found for one architecture.

    Attributes:
        model: ``library:name``.
        nodes: operators in its graph.
        parameters: how many numbers it learns.
        export_s: seconds to export it.
        analysis_s: seconds to analyse the export.
        groups: number of groups; `units` of all of them together.
        crossing: groups over which a norm, a softmax or a reduction runs.
        prunable: share of the parameters with a dimension that can shrink.
        permuted: largest relative change of an output when the units of all groups change places.
        rolled_caught: whether an index list that is off by one was caught; None where no group could tell.
        removed: share of the parameters that the random plan removed.
        cut: largest relative difference between the cut module and the masked original.
        single: the same module with one sample against its results with two; None where inputs have no batch.
        rewritten: classes of modules whose code was written anew, with how often.
        blocks: residual blocks and branches that can go; `blocks_exact` of them equal the original without them.
        sets_exact: whether random sets of them do too.
        blocked: reasons why dimensions can't shrink, with how often.
        failure: the first error, "" if there was none.
        peer: what Torch-Pruning does with the same model.
    """

    model: str
    nodes: int = 0
    parameters: int = 0
    export_s: float = 0.0
    analysis_s: float = 0.0
    groups: int = 0
    units: int = 0
    crossing: int = 0
    prunable: float = 0.0
    permuted: float | None = None
    rolled_caught: bool | None = None
    removed: float = 0.0
    cut: float | None = None
    single: float | None = None
    rewritten: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    blocks_exact: int = 0
    sets_exact: bool | None = None
    blocked: dict[str, int] = field(default_factory=dict)
    failure: str = ""
    peer: str = ""


def examine(case: Case, *, most_blocks: int = 1000) -> Row:
    """Trace, analyse, permute, cut and remove; every failure is a value in the row, not an exception.

    Args:
        case: the architecture.
        most_blocks: how many blocks to remove singly, chosen at random.
    """
    row = Row(case.name)
    try:
        _examine(case, row, most_blocks)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    return row


def _examine(case: Case, row: Row, most_blocks: int) -> None:
    model, args, kwargs = case.made()
    row.parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    graph = trace(model, args, kwargs)
    row.nodes, row.export_s = len(graph.nodes), time.perf_counter() - start
    start = time.perf_counter()
    structure = analyze(graph, contracts=case.contracts)
    row.analysis_s = time.perf_counter() - start
    row.groups, row.prunable = len(structure.groups), structure.prunable
    row.units = sum(group.size for group in structure.groups)
    row.crossing = sum(bool(group.crosses) for group in structure.groups)
    for blocked in structure.blocked:
        reason = blocked.reason.split(", at ")[0]
        row.blocked[reason] = row.blocked.get(reason, 0) + 1
    row.permuted = permutation_error(structure, model, args, kwargs)
    plan = random_plan(structure, SHARE)
    small = apply_plan(model, plan)
    row.removed = 1 - sum(p.numel() for p in small.parameters()) / row.parameters
    for path in plan.programs:
        kind = graph.modules[path].kind.rpartition(".")[2]
        row.rewritten[kind] = row.rewritten.get(kind, 0) + 1
    row.cut = verify(structure, model, small, plan, (args, kwargs), tolerance=math.inf).error
    row.single = single_error(small, args, kwargs)
    row.rolled_caught = rolled_is_caught(structure, model, args, kwargs)
    del small
    _remove_blocks(structure, model, (args, kwargs), row, most_blocks)


def peer_result(case: Case, limited: Callable[[], None]) -> str:
    """What Torch-Pruning does with an architecture; `limited` is called just before it begins."""
    from tests.conformance.peer import result_of_peer

    model, args, kwargs = case.made()
    structure = analyze(trace(model, args, kwargs), contracts=case.contracts)
    limited()
    return result_of_peer(model, structure, args, kwargs)


def random_plan(structure: Structure, share: float, seed: int = 0) -> Plan:
    """Remove about this share of every group."""
    random = np.random.default_rng(seed)
    keep = {}
    for group in structure.groups:
        kept = min(group.size - 1, max(1, math.ceil(group.size * (1 - share))))
        keep[group.name] = sorted(random.permutation(group.size)[: max(1, kept)].tolist())
    return structure.plan(keep)


def _remove_blocks(
    structure: Structure, model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], row: Row, most: int
) -> None:
    random = np.random.default_rng(1)
    names = [block.name for block in structure.blocks]
    chosen = names if len(names) <= most else [names[i] for i in sorted(random.permutation(len(names))[:most])]
    row.blocks = len(chosen)
    for name in chosen:
        row.blocks_exact += _removal_error(structure, model, [name], inputs) <= 1e-4
    if len(names) > 1:
        row.sets_exact = all(
            _removal_error(structure, model, random_set(structure, seed), inputs) <= 1e-4 for seed in range(3)
        )


def random_set(structure: Structure, seed: int) -> list[str]:
    """About half of the blocks and branches, none within another."""
    random = np.random.default_rng(seed)
    chosen = [block for block in structure.blocks if random.random() < 0.5]
    inner = {name for block in chosen for name in block.contains}
    return [block.name for block in chosen if block.name not in inner]


def _removal_error(
    structure: Structure, model: nn.Module, names: Sequence[str], inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> float:
    plan = structure.plan({}, names)
    try:
        return verify(structure, model, apply_plan(model, plan), plan, inputs, tolerance=math.inf).error
    except VerificationError:
        return math.inf


def rolled_is_caught(
    structure: Structure, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool | None:
    """The negative control: one index list, off by one slot, must make the proof fail."""
    groups = [group for group in structure.groups if group.readers and group.size > 3 and not group.crosses]
    for group in sorted(groups, key=lambda group: -group.size)[:1]:
        plan = structure.plan({group.name: range(0, group.size, 2)})
        name, dim = next((name, dim) for name, dim in reversed(group.members) if dim in plan.tensors.get(name, {}))
        size = plan.shapes[name][dim]
        rolled = tuple(sorted((slot + 1) % size for slot in plan.tensors[name][dim]))
        wrong = copy.copy(plan)
        object.__setattr__(wrong, "tensors", {**plan.tensors, name: {**plan.tensors[name], dim: rolled}})
        try:
            verify(structure, model, apply_plan(model, wrong), plan, (args, kwargs))
        except VerificationError:
            return True
        return False
    return None


@torch.no_grad()
def single_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Results for the first sample alone against those for both: the cut module runs at any batch size."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves or any(leaf.dim() == 0 or leaf.shape[0] != 2 for leaf in leaves):
        return None
    first_args, first_kwargs = tree_map_only(Tensor, lambda leaf: leaf[:1], (args, kwargs))
    both, first = tensors_of(model(*args, **kwargs)), tensors_of(model(*first_args, **first_kwargs))
    worst = 0.0
    for wide, narrow in zip(both, first, strict=True):
        if wide.dim() and wide.shape[0] == 2 and narrow.shape == (1, *wide.shape[1:]):
            worst = max(worst, difference(narrow, wide[:1]))
    return worst


def tensors_of(returned: Any) -> list[Tensor]:
    """Every tensor that a model returned."""
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    if mine.shape != theirs.shape:
        return math.inf
    if not mine.is_floating_point():
        return 0.0 if torch.equal(mine, theirs) else math.inf
    gap = torch.where(mine == theirs, 0, (mine - theirs).abs())
    finite = theirs[theirs.isfinite()].abs()
    return float(gap.max() / finite.max().clamp_min(1e-12)) if finite.numel() and gap.numel() else 0.0


@torch.no_grad()
def permutation_error(
    structure: Structure, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0
) -> float:
    """Let the units of every group change places in every weight: no output may move.

    In float64, if the model's own code runs in it: a deep network with random weights may amplify the rounding of
    float32, which differs with the order of summation, until it fills the output.
    """
    model, args, kwargs = _in_float64(model, args, dict(kwargs))
    permuted = copy.deepcopy(model)
    for module in permuted.modules():
        forget_cached(module)
    images = unit_images(structure.layout, seed)
    tensors = dict([*permuted.named_parameters(), *permuted.named_buffers()])
    for name, dims in structure.layout.tensors.items():
        tensors[name].copy_(_moved(tensors[name], dims, images, structure.layout))
    before, after = tensors_of(model(*args, **kwargs)), tensors_of(permuted(*args, **kwargs))
    outputs = _by_node(structure.graph, before)
    worst = 0.0
    for (node, mine), theirs in zip(outputs, after, strict=True):
        expected = _moved(mine, structure.layout.dims[node][0], images, structure.layout) if node else mine
        worst = max(worst, difference(theirs, expected))
    return worst


def _in_float64(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and its inputs in float64; as they are where its code insists on float32."""
    wide = copy.deepcopy(model).double()
    wide_args, wide_kwargs = tree_map_only(
        Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, (args, kwargs)
    )
    try:
        wide(*wide_args, **wide_kwargs)
    except RuntimeError:
        return model, args, kwargs
    return wide, wide_args, wide_kwargs


def _by_node(graph: Graph, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    names = graph.outputs if len(graph.outputs) == len(tensors) else [""] * len(tensors)
    return list(zip(names, tensors, strict=True))


def unit_images(layout: Layout, seed: int) -> NDArray[np.int64]:
    """For each label the label whose place it takes, shape (labels,)."""
    random = np.random.default_rng(seed)
    images = np.arange(len(layout.group_of))
    for group in range(int(layout.group_of.max(initial=-1)) + 1):
        mine = np.flatnonzero(layout.group_of == group)
        ordered = mine[np.argsort(layout.unit_of[mine])]
        images[ordered] = random.permutation(ordered)
    return images


def _moved(tensor: Tensor, dims: Sequence[Dim], images: NDArray[np.int64], layout: Layout) -> Tensor:
    for place, dim in enumerate(dims):
        if dim.size:
            order = _order(np.where(layout.group_of[dim] >= 0, dim, 0), images)
            tensor = tensor.index_select(place, torch.from_numpy(order).to(tensor.device))
    return tensor


def _order(dim: Dim, images: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each slot the one that comes in its place: the slot with the images of its labels."""
    keys = np.random.default_rng(7).integers(1, 2**62, size=len(images), dtype=np.uint64)
    keys[0] = 0
    mine, wanted = keys[dim].sum(axis=0, dtype=np.uint64), keys[images[dim]].sum(axis=0, dtype=np.uint64)
    order = np.empty(dim.shape[1], dtype=np.int64)
    order[np.argsort(wanted, kind="stable")] = np.argsort(mine, kind="stable")
    return order
