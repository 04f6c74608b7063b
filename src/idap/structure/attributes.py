"""Which ints of which modules must change with a plan, found from where the forward pass got its sizes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from idap.graph.ir import Attribute, Expression, Extent, Literal
from idap.graph.labels import Dim
from idap.graph.provenance import evaluate, sources
from idap.structure.layout import Layout, Presence, count


@dataclass(frozen=True, eq=False)
class Demand:
    """Two sizes that must be equal after every cut.

    Attributes:
        found: what the code computes.
        wanted: what it must be; None means as many as `dim` has slots then.
        dim: the dimension that is counted, if one is.
        sign: -1 where the size counts from the end.
        place: where the code says so, for messages.
        node: the operator that is given the size, "" if there is none.
        defines: the attribute that has no meaning but to hold this size, such as ``in_features``.
    """

    found: Expression
    wanted: Expression | None
    dim: Dim | None
    place: str
    sign: int = 1
    node: str = ""
    defines: Attribute | None = None

    def holds(self, values: "Values") -> bool:
        """Whether both sides are equal."""
        return values.of(self.found) == self.target(values)

    def target(self, values: "Values") -> int | None:
        """What the size must be."""
        return self.sign * values.slots(self.dim) if self.dim is not None else values.of(self.wanted)

    def leaves(self) -> set[Expression]:
        """What the code reads on both sides."""
        return sources(self.found) | (sources(self.wanted) if self.wanted is not None else set())

    def attributes(self) -> set[Attribute]:
        """The attributes read on either side."""
        return {leaf for leaf in self.leaves() if isinstance(leaf, Attribute)}

    def dims(self, layout: Layout) -> list[Dim]:
        """The dimensions on which it depends."""
        read = [layout.dims[leaf.node][0][leaf.dim] for leaf in self.leaves() if isinstance(leaf, Extent)]
        return read if self.dim is None else [self.dim, *read]

    def why(self, values: "Values", fixed: Iterable[Expression]) -> str:
        """Why the code can't follow: one line."""
        numbers = sorted(map(str, self.attributes() & set(fixed)))
        if numbers:
            return f"{self.place} comes from {', '.join(numbers)}, which the code also uses as a number"
        if isinstance(self.found, Literal):
            return f"{self.place} is always {self.found}: no attribute of a module and no shape tells it"
        found, wanted = values.of(self.found), self.target(values)
        return f"{self.place} is computed as {self.found}, which gives {found}, not {wanted}"


class Values:
    """What every size is after a cut, as far as it is known.

    Args:
        layout: where units lie.
        present: labels that stay.

    Attributes:
        solved: attributes whose value was found.
    """

    def __init__(self, layout: Layout, present: Presence) -> None:
        self._layout = layout
        self._present = present
        self.solved: dict[Attribute, int] = {}

    def of(self, expression: Expression | None) -> int | None:
        """The value of an expression; None if it divides by zero."""
        try:
            return None if expression is None else evaluate(expression, self._leaf)
        except ArithmeticError:
            return None

    def slots(self, dim: Dim) -> int:
        """How many slots of a dim stay."""
        return count(dim, self._present)

    def _leaf(self, leaf: Expression) -> int:
        if isinstance(leaf, Attribute):
            return self.solved.get(leaf, leaf.value)
        if isinstance(leaf, Extent):
            return self.slots(self._layout.dims[leaf.node][0][leaf.dim])
        assert isinstance(leaf, Literal)
        return leaf.value


def solve_attributes(demands: Sequence[Demand], values: Values, fixed: Iterable[Expression] = ()) -> list[Demand]:
    """Find new values for the attributes that feed sizes, so that every demand is met.

    Args:
        demands: what the code says about sizes.
        values: sizes after the cut; receives the attributes.
        fixed: attributes that must stay as they are.

    Returns:
        The demands that can't be met.
    """
    closed = {leaf for leaf in fixed if isinstance(leaf, Attribute)}
    reading: dict[Attribute, list[Demand]] = {}
    for demand in demands:
        for attribute in demand.attributes():
            reading.setdefault(attribute, []).append(demand)
    # What merely describes a tensor is known at once, unless it takes another attribute, such as the groups.
    plainly = [demand for demand in demands if demand.defines and len(demand.attributes()) == 1]
    lastly = [demand for demand in demands if demand.defines and len(demand.attributes()) > 1]
    used = [demand for demand in demands if not demand.defines]
    for stage in (plainly, used, used, used, lastly):  # twice more: one demand may tell what another lacks
        for demand in stage:
            free = ({demand.defines} if demand.defines else demand.attributes()) - closed - set(values.solved)
            if len(free) != 1:
                continue
            if not demand.holds(values):
                _solve(free.pop(), demand, reading, values, closed)
            elif demand.found in free:  # told to stay
                values.solved[demand.found] = demand.found.value
    return [demand for demand in demands if not demand.holds(values)]


def _solve(
    free: Attribute,
    demand: Demand,
    reading: Mapping[Attribute, Sequence[Demand]],
    values: Values,
    closed: set[Attribute],
) -> None:
    """Give the one attribute that is free the largest value that meets this demand, and if possible all others."""
    known = closed | set(values.solved) | {free}
    others = [other for other in reading[free] if other.attributes() <= known]
    meeting = []
    direct = demand.target(values) if demand.found == free else None
    for value in range(free.value, -1, -1) if direct is None else (direct,):
        values.solved[free] = value
        if demand.holds(values):
            meeting.append(value)
            if all(other.holds(values) for other in others):
                return
    del values.solved[free]
    if meeting:
        values.solved[free] = meeting[0]


def tied_dims(demands: Sequence[Demand], layout: Layout) -> Iterator[tuple[Dim, Dim]]:
    """Dims that the code counts with one and the same expression, so that they can only shrink together."""
    first: dict[tuple[Expression, int], Dim] = {}
    for demand in demands:
        if demand.dim is not None and demand.attributes():
            dim = first.setdefault((demand.found, demand.sign), demand.dim)
            if dim is not demand.dim and dim.shape[1] == demand.dim.shape[1]:
                yield dim, demand.dim
        elif isinstance(demand.found, Extent) and isinstance(demand.wanted, Extent):
            left, right = (layout.dims[leaf.node][0][leaf.dim] for leaf in (demand.found, demand.wanted))
            yield left, right
