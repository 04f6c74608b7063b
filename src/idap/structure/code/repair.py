"""Make a model's code follow a cut by new ints or rewritten code; tie or freeze the groups for which neither works."""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from idap.graph.ir import Attribute, ModuleInfo
from idap.graph.rules import Flow
from idap.structure.code.program import Program
from idap.structure.code.rewrite import CannotRewriteError, Rewriter
from idap.structure.code.sizes import Demand, Values, demands_of, solve_attributes, tied_dims
from idap.structure.groups import Group, build_groups
from idap.structure.layout import Layout, Presence
from idap.structure.plan import Size

ORDINALS = ("layer_idx",)
"""Names of ints that number layers: in transformers every attention and state-space layer has one."""


def renumber(modules: Mapping[str, ModuleInfo], gone: Callable[[str], bool]) -> dict[str, dict[str, Size]]:
    """New numbers for the modules that are kept, where they change.

    Args:
        modules: by path.
        gone: whether a module is removed.

    Returns:
        Module path -> attribute -> its new value.

    Example:
        >>> info = {f"layers.{i}.attn": ModuleInfo("Attn", "", {"layer_idx": i}, {}) for i in range(3)}
        >>> renumber(info, lambda path: path == "layers.0.attn")
        {'layers.1.attn': {'layer_idx': 0}, 'layers.2.attn': {'layer_idx': 1}}
    """
    found: dict[str, dict[str, Size]] = {}
    for name in ORDINALS:
        stacks: dict[str, dict[str, int]] = {}
        for path, info in modules.items():
            number = info.sizes.get(name)
            if isinstance(number, int):
                stacks.setdefault(_stack(path, number), {})[path] = number
        for stack in stacks.values():
            kept = {number for path, number in stack.items() if not gone(path)}
            lost = set(stack.values()) - kept
            for path, number in stack.items():
                below = sum(other < number for other in lost)
                if below and not gone(path):
                    found.setdefault(path, {})[name] = number - below
    return found


def _stack(path: str, number: int) -> str:
    """Path of the list of layers in which a module has this number; encoder and decoder are numbered separately."""
    parts = path.split(".")
    places = [place for place, part in enumerate(parts) if part == str(number)]
    return ".".join(parts[: places[-1]]) if places else ""


@dataclass(frozen=True)
class CodeChanges:
    """How the code follows a cut.

    Attributes:
        values: sizes after the cut, and the attributes that were solved.
        programs: module path -> its rewritten code.
        unmet: demands that can't be met; of all, those on which the fewest groups depend.
        closed: attributes that must stay as they are.
    """

    values: Values
    programs: dict[str, Program]
    unmet: tuple[Demand, ...]
    closed: Set[Attribute]


def repair_code(
    demands: Sequence[Demand],
    layout: Layout,
    present: Presence,
    rewriter: Rewriter,
    gone: Callable[[str], bool] = lambda _: False,
    *,
    known: Collection[str] = (),
) -> CodeChanges:
    """Find new values for attributes so that every demand is met; where none exist, rewrite the code that demands it.

    Args:
        demands: what the code demands of sizes.
        layout: where units lie.
        present: labels that are kept.
        rewriter: of the same model.
        gone: whether a module is removed.
        known: modules that count as rewritten from the start; their programs are not written again.
    """
    rewritten = set(known)
    while True:
        closed = {
            leaf
            for leaf, modules in layout.escaped.items()
            if isinstance(leaf, Attribute) and any(m not in rewritten and not gone(m) for m in modules)
        }
        values = Values(layout, present)
        asked = [demand for demand in demands if demand.defines or demand.module not in rewritten]
        unmet = find_culprits(solve_attributes(asked, values, closed), layout)
        able = {d.module for d in unmet if not d.defines and rewriter.possible(d.module)}
        if able:
            rewritten |= able
            continue
        if unmet:
            return CodeChanges(values, {}, tuple(unmet), closed)
        programs: dict[str, Program] = {}
        for path in sorted(rewritten - set(known)):
            try:
                programs[path] = rewriter.program(path, layout, values)
            except CannotRewriteError as error:
                rewriter.refused[path] = str(error)
                rewritten = set(known)
                break
        else:
            return CodeChanges(values, programs, (), closed)


def find_culprits(unmet: Sequence[Demand], layout: Layout) -> list[Demand]:
    """The demands that involve the fewest groups: they may be the cause of the others."""
    blame = [len(set[int]().union(*map(layout.groups_in, demand.dims(layout)))) for demand in unmet]
    return [demand for demand, count in zip(unmet, blame, strict=True) if count == min(blame)]


TRIALS = 4
"""How many random cuts must be expressible: one of all groups at once, the others of about half of them."""


def expressible(
    flow: Flow, rewriter: Rewriter
) -> tuple[tuple[Group, ...], Layout, tuple[Demand, ...], tuple[str, ...]]:
    """Build groups such that the code can express every cut of them: what it can't express is tied or frozen.

    Returns:
        The groups, where their units lie, what the code demands, and the modules that are rewritten.
    """
    given_up: set[tuple[str, str]] = set()
    flow.labels.because("the code counts it with a number that also counts something else")
    for one, other in list(tied_dims(demands_of(flow.graph, flow), flow)):
        flow.labels.unify(one, other)
    while True:
        groups, layout = build_groups(flow)
        demands = [d for d in demands_of(flow.graph, layout) if (d.node, d.place) not in given_up]
        unmet, rewritten = _try_cuts(demands, groups, layout, rewriter)
        if not unmet:
            return groups, layout, tuple(demands), rewritten
        for demand, reason in unmet.items():
            flow.labels.because(reason)
            shared = [other for other in demands if other.attributes & demand.attributes]
            for dim in [dim for other in (demand, *shared) for dim in other.dims(layout)]:
                flow.labels.freeze_dim(dim)
        given_up |= {(demand.node, demand.place) for demand in unmet}


def _try_cuts(
    demands: Sequence[Demand], groups: Sequence[Group], layout: Layout, rewriter: Rewriter
) -> tuple[dict[Demand, str], tuple[str, ...]]:
    """Try random cuts: which demands the code can't meet, and why; and which modules are rewritten."""
    rewritten: dict[str, None] = {}
    for seed in range(TRIALS):
        random = np.random.default_rng(seed)
        kept = {
            group.index: random.permutation(group.size)[: random.integers(1, max(2, group.size))]
            for group in groups
            if seed == 0 or random.random() < 0.5
        }
        settled = repair_code(demands, layout, layout.presence(kept), rewriter, known=rewritten)
        if settled.unmet:
            return {demand: _why(demand, settled, rewriter) for demand in settled.unmet}, ()
        rewritten |= dict.fromkeys(settled.programs)
    return {}, tuple(rewritten)


def _why(demand: Demand, settled: CodeChanges, rewriter: Rewriter) -> str:
    """Why the code can't meet a demand, and why it can't be rewritten either, in one line."""
    why = demand.why(settled.values, settled.closed)
    refusal = None if demand.defines else rewriter.refused.get(demand.module)
    return f"{why}; the code can't be rewritten: {refusal}" if refusal else why
