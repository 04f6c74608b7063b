"""What new code checks before it goes the way of the old: the sizes that the code compared still compare as they did.

A comparison told the code nothing but its outcome, so only that must stay: `key_padding_mask.shape[0] == bsz` holds for
every batch size. Numbers that the code computed from a size are in the new code as they were, so that size must stay.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from idap.graph.frames import Frame
from idap.graph.ir import Attribute, Comparison, Expression, Extent, Graph, Literal, Operation, Ref, leaves
from idap.graph.provenance import sources
from idap.structure.code.program import Guard, Tree

MIRRORED: Mapping[str, str] = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
"""What holds with both sides exchanged."""


@dataclass(frozen=True)
class Hand:
    """What a module's code has at hand.

    Attributes:
        tensors: node that holds a tensor -> number of the tensor in the new code.
        given: size that came as an argument -> its number.
    """

    tensors: Mapping[str | None, int]
    given: Mapping[Expression, int]

    def has(self, leaf: Expression) -> bool:
        """Whether a size can be read."""
        return leaf in self.given or (isinstance(leaf, Extent) and leaf.node in self.tensors)


def comparisons_by_module(graph: Graph) -> dict[str, list[Comparison]]:
    """By module the sizes that its code compared, or computed with, with what must stay."""
    asked: dict[str, list[Comparison]] = {}
    for leaf, modules in graph.escaped.items():
        for path, place in modules.items():
            asked.setdefault(path, []).append(_as_it_was(leaf, place, path))
    for note in graph.comparisons:
        asked.setdefault(note.module, []).append(note)
    return asked


def ever_at_hand(frames: Iterable[Frame], places: Mapping[str, str], local: Callable[[Expression], Expression]) -> Hand:
    """All that a module has at hand in one of its calls at least; the numbers mean nothing."""
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
    """The guards of one routine, given out as soon as their sizes are at hand.

    Args:
        notes: what the module's code asked of sizes.
        free: whether a size depends on the input and isn't touched by the cut. All others are what they were in the
            original, which took its way by them.
        ever: what the module has at hand in any of its calls.
    """

    def __init__(self, notes: Iterable[Comparison], free: Callable[[Extent], bool], ever: Hand) -> None:
        self._free = free
        asked = [part for note in notes for part in self._as_guards(note, ever)]
        self._waiting = [note for note in asked if self._leaves(note)]
        self._told: set[tuple[Tree, str, Tree]] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take_ready(self, hand: Hand, place: int) -> Iterator[Guard]:
        """The guards whose sizes are at hand by now; they wait no longer."""
        ready = [note for note in self._waiting if all(self._at_hand(side, hand) for side in (note.left, note.right))]
        self._waiting = [note for note in self._waiting if note not in ready]
        for note in ready:
            left, symbol, right = self._tree(note.left, hand), note.symbol, self._tree(note.right, hand)
            if not isinstance(left, tuple):
                left, symbol, right = right, MIRRORED[symbol], left
            if left != right and (left, symbol, right) not in self._told:
                self._told.add((left, symbol, right))
                yield left, symbol, right, place

    def _as_guards(self, note: Comparison, ever: Hand) -> Sequence[Comparison]:
        """The comparison; where a size of it can't be read, all others must be as they were."""
        if note.known and self._at_hand(note.left, ever) and self._at_hand(note.right, ever):
            return [note]
        return [_as_it_was(leaf, note.source, note.module) for leaf in self._leaves(note) if ever.has(leaf)]

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


def _as_it_was(leaf: Expression, place: str, module: str) -> Comparison:
    return Comparison(leaf, Literal(leaf.value), place, module)
