"""The guards of rewritten code: they check that sizes which the original code compared still compare as in the trace.

A comparison influenced the code only by its outcome, so only the outcome must stay: `key_padding_mask.shape[0] == bsz`
holds for every batch size. A number that the code computed from a size is a constant in the rewritten code, so that
size itself must stay.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from idap.graph.frames import Frame
from idap.graph.ir import Attribute, Comparison, Expression, Extent, Graph, Literal, Operation, Ref, leaves
from idap.graph.provenance import sources
from idap.structure.code.program import Guard, Tree

MIRRORED: Mapping[str, str] = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
"""Relation -> the relation that holds once both sides are exchanged."""


@dataclass(frozen=True)
class Hand:
    """The tensors and sizes that a module's code has at hand.

    Attributes:
        tensors: node that holds a tensor -> number of the tensor in the rewritten code.
        given: size that was passed as an argument -> its number.
    """

    tensors: Mapping[str | None, int]
    given: Mapping[Expression, int]

    def has(self, leaf: Expression) -> bool:
        """Whether a size can be read."""
        return leaf in self.given or (isinstance(leaf, Extent) and leaf.node in self.tensors)


def comparisons_by_module(graph: Graph) -> dict[str, list[Comparison]]:
    """Module path -> the comparisons of its code; a size that the code computed with must equal its traced value."""
    found: dict[str, list[Comparison]] = {}
    for leaf, modules in graph.escaped.items():
        for path, place in modules.items():
            found.setdefault(path, []).append(_equal_to_traced(leaf, place, path))
    for note in graph.comparisons:
        found.setdefault(note.module, []).append(note)
    return found


def ever_at_hand(frames: Iterable[Frame], places: Mapping[str, str], local: Callable[[Expression], Expression]) -> Hand:
    """Everything that a module has at hand in at least one of its calls; the numbers have no meaning."""
    tensors: dict[str | None, int] = {}
    given: dict[Expression, int] = {}
    for frame in frames:
        for leaf in leaves((frame.args, dict(frame.kwargs))):
            if isinstance(leaf, Ref):
                tensors[places.get(leaf.name)] = 0
            elif isinstance(leaf, Attribute | Extent | Operation):
                given[local(leaf)] = 0
        tensors |= {places.get(name): 0 for step in frame.steps for _, name in step.results}
    tensors.pop(None, None)
    return Hand(tensors, given)


class Guards:
    """The guards of one routine; each is taken as soon as its sizes are at hand.

    Args:
        notes: the comparisons of sizes in the module's code.
        free: whether a size depends on the input and isn't changed by the cut. Only such sizes need a guard: all others
            count as in the original, since they decided which branches it took.
        ever: what the module has at hand in any of its calls.
    """

    def __init__(self, notes: Iterable[Comparison], free: Callable[[Extent], bool], ever: Hand) -> None:
        self._free = free
        parts = [part for note in notes for part in self._as_guards(note, ever)]
        self._waiting = [note for note in parts if self._leaves(note)]
        self._taken: set[tuple[Tree, str, Tree]] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take_ready(self, hand: Hand, place: int) -> Iterator[Guard]:
        """Take the guards whose sizes are at hand by now; each is taken once."""
        ready = [note for note in self._waiting if all(self._at_hand(side, hand) for side in (note.left, note.right))]
        self._waiting = [note for note in self._waiting if note not in ready]
        for note in ready:
            left, symbol, right = self._tree(note.left, hand), note.symbol, self._tree(note.right, hand)
            if not isinstance(left, tuple):
                left, symbol, right = right, MIRRORED[symbol], left
            if left != right and (left, symbol, right) not in self._taken:
                self._taken.add((left, symbol, right))
                yield left, symbol, right, place

    def _as_guards(self, note: Comparison, ever: Hand) -> Sequence[Comparison]:
        """The comparison itself; if a size in it can't be read, guards that keep all its other sizes as traced."""
        if note.known and self._at_hand(note.left, ever) and self._at_hand(note.right, ever):
            return [note]
        return [_equal_to_traced(leaf, note.source, note.module) for leaf in self._leaves(note) if ever.has(leaf)]

    def _leaves(self, note: Comparison) -> list[Expression]:
        return sorted(filter(self._varies, sources(note.left) | sources(note.right)), key=str)

    def _varies(self, leaf: Expression) -> bool:
        return isinstance(leaf, Extent) and self._free(leaf)

    def _at_hand(self, expression: Expression, hand: Hand) -> bool:
        if expression in hand.given or not any(map(self._varies, sources(expression))):
            return True
        if isinstance(expression, Operation):
            return all(self._at_hand(part, hand) for part in expression.operands)
        return hand.has(expression)

    def _tree(self, expression: Expression, hand: Hand) -> Tree:
        if not any(map(self._varies, sources(expression))):
            return expression.value
        if expression in hand.given:
            return ("int", hand.given[expression])
        if isinstance(expression, Operation):
            return ("calc", expression.symbol, *(self._tree(part, hand) for part in expression.operands))
        assert isinstance(expression, Extent)
        return ("size", ("value", hand.tensors[expression.node]), expression.dim)


def _equal_to_traced(leaf: Expression, place: str, module: str) -> Comparison:
    return Comparison(leaf, Literal(leaf.value), place, module)
