"""What a cut takes beside slicing: new values for the ints of modules, new code for modules that can't follow."""

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass

from idap.graph.ir import Attribute
from idap.structure.attributes import Demand, Values, solve_attributes
from idap.structure.layout import Layout, Presence
from idap.structure.program import Program
from idap.structure.rewrite import CannotRewriteError, Rewriter


@dataclass(frozen=True)
class Settled:
    """How the code follows a cut.

    Attributes:
        values: sizes after the cut, and the attributes that were solved.
        programs: module path -> its new code.
        unmet: demands that can't be met, those first that few groups are to blame for.
        closed: attributes that must stay as they are.
    """

    values: Values
    programs: dict[str, Program]
    unmet: tuple[Demand, ...]
    closed: Set[Attribute]


def settle(
    demands: Sequence[Demand],
    layout: Layout,
    present: Presence,
    rewriter: Rewriter,
    gone: Callable[[str], bool] = lambda _: False,
    *,
    known: Collection[str] = (),
) -> Settled:
    """Find new values for attributes so that every demand is met; where none exist rewrite the code that demands it.

    Args:
        demands: what the code says about sizes.
        layout: where units lie.
        present: labels that stay.
        rewriter: of the same model.
        gone: whether a module is removed.
        known: modules that are taken to be rewritten from the start, without their programs being written.
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
        unmet = least_to_blame(solve_attributes(asked, values, closed), layout)
        able = {d.module for d in unmet if not d.defines and rewriter.possible(d.module)}
        if able:
            rewritten |= able
            continue
        if unmet:
            return Settled(values, {}, tuple(unmet), closed)
        programs: dict[str, Program] = {}
        for path in sorted(rewritten - set(known)):
            try:
                programs[path] = rewriter.program(path, layout, values)
            except CannotRewriteError as error:
                rewriter.refused[path] = str(error)
                rewritten = set(known)
                break
        else:
            return Settled(values, programs, (), closed)


def least_to_blame(unmet: Sequence[Demand], layout: Layout) -> list[Demand]:
    """Those that few groups are to blame for: they may be the cause of the others."""
    blame = [len(set[int]().union(*map(layout.groups_in, demand.dims(layout)))) for demand in unmet]
    return [demand for demand, count in zip(unmet, blame, strict=True) if count == min(blame)]
