"""What a model's code demands of sizes: which ints it reads, passes on and compares, and which must follow a plan."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from idap.graph.ir import Attribute, Expression, Extent, Graph, Literal, ModuleInfo, Node, Operation, ints
from idap.graph.labels import Dim
from idap.graph.provenance import RELATIONS, evaluate, sources
from idap.graph.rules import SizeUse
from idap.graph.rules.flow import arguments, operator
from idap.structure.layout import Dims, Layout, Presence, count
from idap.structure.plan import Size


@dataclass(frozen=True, eq=False)
class Demand:
    """Two sizes that must be equal, or stand in another relation, after every cut.

    Attributes:
        found: the size that the code computes.
        wanted: the size that it must be; None: the number of slots that `dim` has after the cut.
        dim: the dimension whose slots are counted, if there is one.
        sign: -1 if the size counts from the end.
        place: where the code makes the demand, for messages.
        node: the operator that takes the size, "" if there is none.
        defines: the attribute whose only purpose is to hold this size, such as ``in_features``.
        module: the module whose code makes the demand; "" for a description of a tensor, or for the model itself.
        reason: why the demand can't be met, if that is known from the start.
        symbol: the relation.
    """

    found: Expression
    wanted: Expression | None
    dim: Dim | None
    place: str
    sign: int = 1
    node: str = ""
    defines: Attribute | None = None
    module: str = ""
    reason: str = ""
    symbol: str = "=="

    def holds(self, values: "Values") -> bool:
        """Whether both sides stand in the relation."""
        found, wanted = values.of(self.found), self.target(values)
        if self.symbol == "==":
            return found == wanted
        return found is not None and wanted is not None and bool(getattr(found, RELATIONS[self.symbol])(wanted))

    def target(self, values: "Values") -> int | None:
        """The value that the size must have."""
        return self.sign * values.slots(self.dim) if self.dim is not None else values.of(self.wanted)

    @cached_property
    def leaves(self) -> frozenset[Expression]:
        """Everything from which the code computes either side."""
        return frozenset(sources(self.found) | (sources(self.wanted) if self.wanted is not None else set()))

    @cached_property
    def attributes(self) -> frozenset[Attribute]:
        """The attributes read on either side."""
        return frozenset(leaf for leaf in self.leaves if isinstance(leaf, Attribute))

    def dims(self, layout: Layout) -> list[Dim]:
        """The dimensions on which the demand depends."""
        read = [layout.dims[leaf.node][0][leaf.dim] for leaf in self.leaves if isinstance(leaf, Extent)]
        return read if self.dim is None else [self.dim, *read]

    def why(self, values: "Values", closed: Set[Attribute]) -> str:
        """Why the code can't meet the demand, in one line."""
        if self.reason:
            return self.reason
        if self.symbol != "==":
            return f"{self.place} would no longer give {self.symbol!r}"
        numbers = sorted(map(str, self.attributes & closed))
        if numbers:
            return f"{self.place} comes from {', '.join(numbers)}, which the code also uses as a number"
        if isinstance(self.found, Literal):
            return f"{self.place} is always {self.found}: it comes from no attribute of a module and from no shape"
        found, wanted = values.of(self.found), self.target(values)
        return f"{self.place} is computed as {self.found}, which gives {found}, not {wanted}"


class Values:
    """The value of every size after a cut, as far as it is known.

    Args:
        layout: where units lie.
        present: labels that are kept.

    Attributes:
        solved: attributes whose value was found.
    """

    def __init__(self, layout: Layout, present: Presence) -> None:
        self._layout = layout
        self._present = present
        self.solved: dict[Attribute, int] = {}
        self._counts: dict[int, int] = {}  # by identity: the layout keeps the dims

    def of(self, expression: Expression | None) -> int | None:
        """The value of an expression; None if it divides by zero."""
        try:
            return None if expression is None else evaluate(expression, self._leaf)
        except ArithmeticError:
            return None

    def slots(self, dim: Dim) -> int:
        """How many slots of a dim are kept."""
        if id(dim) not in self._counts:
            self._counts[id(dim)] = count(dim, self._present)
        return self._counts[id(dim)]

    def _leaf(self, leaf: Expression) -> int:
        if isinstance(leaf, Attribute):
            return self.solved.get(leaf, leaf.value)
        if isinstance(leaf, Extent):
            return self.slots(self._layout.dims[leaf.node][0][leaf.dim])
        assert isinstance(leaf, Literal)
        return leaf.value


def solve_attributes(demands: Sequence[Demand], values: Values, closed: Set[Attribute] = frozenset()) -> list[Demand]:
    """Find new values for the attributes from which sizes come, so that every demand is met.

    Args:
        demands: what the code demands of sizes.
        values: sizes after the cut; the solved attributes are added to it.
        closed: attributes that must stay as they are.

    Returns:
        The demands that can't be met.
    """
    reading: dict[Attribute, list[Demand]] = {}
    for demand in demands:
        for attribute in demand.attributes:
            reading.setdefault(attribute, []).append(demand)
    # An attribute that only describes a tensor is known at once, unless it depends on another one, such as the groups.
    first = [demand for demand in demands if demand.defines and len(demand.attributes) == 1]
    last = [demand for demand in demands if demand.defines and len(demand.attributes) > 1]
    used = [demand for demand in demands if not demand.defines and demand.symbol == "==" and demand.attributes]
    for stage in (first, used, used, used, last):  # three times: one demand may give what another lacks
        for demand in stage:
            candidates = (demand.defines,) if demand.defines else demand.attributes
            free = [leaf for leaf in candidates if leaf not in closed and leaf not in values.solved]
            if len(free) != 1:
                continue
            if not demand.holds(values):
                _solve(free[0], demand, reading, values, closed)
            elif demand.found == free[0]:  # the demand says that it stays
                values.solved[demand.found] = demand.found.value
    return [demand for demand in demands if not demand.holds(values)]


def _solve(
    free: Attribute,
    demand: Demand,
    reading: Mapping[Attribute, Sequence[Demand]],
    values: Values,
    closed: Set[Attribute],
) -> None:
    """Set the one free attribute to the largest value that meets this demand and, if possible, all others."""
    known = closed | set(values.solved) | {free}
    others = [other for other in reading[free] if other.attributes <= known]
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


def tied_dims(demands: Sequence[Demand], layout: Dims) -> Iterator[tuple[Dim, Dim]]:
    """Dims that the code counts with one and the same expression, so that they can only shrink together."""
    first: dict[tuple[Expression, int], Dim] = {}
    for demand in demands:
        if demand.symbol != "==":
            continue
        if demand.dim is not None and demand.attributes:
            dim = first.setdefault((demand.found, demand.sign), demand.dim)
            if dim is not demand.dim and dim.shape[1] == demand.dim.shape[1]:
                yield dim, demand.dim
        elif isinstance(demand.found, Extent) and isinstance(demand.wanted, Extent):
            left, right = (layout.dims[leaf.node][0][leaf.dim] for leaf in (demand.found, demand.wanted))
            yield left, right


Places = tuple[tuple[str, int], ...]

SHAPES_OF: Mapping[str, Mapping[str, Places]] = {
    "Linear": {"in_features": (("weight", 1),), "out_features": (("weight", 0),)},
    "Bilinear": {
        "in1_features": (("weight", 1),),
        "in2_features": (("weight", 2),),
        "out_features": (("weight", 0),),
    },
    "Conv": {"in_channels": (("weight", 1),), "out_channels": (("weight", 0),)},
    "ConvTranspose": {"in_channels": (("weight", 0),), "out_channels": (("weight", 1),)},
    "BatchNorm": {"num_features": (("weight", 0), ("running_mean", 0))},
    "InstanceNorm": {"num_features": (("weight", 0), ("running_mean", 0))},
    "GroupNorm": {"num_channels": (("weight", 0),)},
    "Embedding": {"num_embeddings": (("weight", 0),), "embedding_dim": (("weight", 1),)},
    "PReLU": {"num_parameters": (("weight", 0),)},
}
"""Class of torch.nn (without its 1d, 2d, 3d) -> int that describes a tensor -> (tensor, dimension); the first that the
module has counts."""

PER_GROUP = {"Conv": "in_channels", "ConvTranspose": "out_channels"}
"""Class of torch.nn -> the int that is a tensor's size times the number of groups."""


def demands_of(graph: Graph, layout: Dims) -> list[Demand]:
    """All demands of the code on sizes."""
    found = [*_argument_demands(graph, layout.sizes), *_pin_demands(graph, layout), *_module_demands(graph)]
    return [*found, *_comparison_demands(graph, layout, set().union(*(demand.attributes for demand in found)))]


def _argument_demands(graph: Graph, uses: Iterable[SizeUse]) -> Iterator[Demand]:
    for use in uses:
        node = graph.nodes[use.node]
        position = size_position(node, use)
        source = Literal(_old(node, use)) if position is None else node.sizes[position]
        argument = use.argument if use.index is None else f"{use.argument}[{use.index}]"
        yield Demand(source, None, use.dim, f"{argument} of {node.where()}", use.sign, node.name, module=node.module)


def _pin_demands(graph: Graph, layout: Dims) -> Iterator[Demand]:
    """Sizes that must not change, because results depend on them."""
    for pin in layout.pins:
        node = graph.nodes[pin.node]
        why = f"{pin.why}: {node.where()}"
        yield Demand(Literal(pin.dim.shape[1]), None, pin.dim, why, 1, node.name, module=node.module, reason=why)
    for leaf, places in layout.escaped.items():
        for module, place in places.items() if isinstance(leaf, Extent) else ():
            why = f"the code computes another number from this size, at {place}"
            yield Demand(leaf, Literal(leaf.value), None, why, module=module, reason=why)


def _comparison_demands(graph: Graph, layout: Dims, changing: Set[Attribute]) -> Iterator[Demand]:
    """The comparisons of sizes in the code, if one of their sizes may change; their outcomes must stay."""
    for note in graph.comparisons:
        if not any(
            len(layout.dims[leaf.node][0][leaf.dim]) if isinstance(leaf, Extent) else leaf in changing
            for leaf in sources(note.left) | sources(note.right)
        ):
            continue
        place = f"the comparison of {note.left} with {note.right} at {note.source}"
        yield Demand(note.left, note.right, None, place, module=note.module, symbol=note.symbol)


def _module_demands(graph: Graph) -> Iterator[Demand]:
    nodes = {node.target: node.name for node in graph.nodes.values() if node.op in ("parameter", "buffer")}
    for path, info in graph.modules.items():
        family = info.layer.removeprefix("Lazy").removeprefix("Sync").rstrip("d").rstrip("123")
        for name, places in SHAPES_OF.get(family, {}).items():
            size = _size_of(graph, nodes, info, places)
            held = info.sizes.get(name)
            if size is None or not isinstance(held, int):
                continue
            groups = info.sizes.get("groups", 1)
            if name == PER_GROUP.get(family) and isinstance(groups, int) and groups > 1:
                size = Operation("*", (size, Attribute(path, "groups", None, groups)), size.value * groups)
            attribute = Attribute(path, name, None, held)
            if size.value == held:
                yield Demand(attribute, size, None, f"{name} of module {path!r}", defines=attribute)


def _size_of(graph: Graph, nodes: Mapping[str, str], info: ModuleInfo, places: Places) -> Expression | None:
    for name, dim in places:
        if info.tensors.get(name) in nodes:
            tensor = info.tensors[name]
            return Extent(nodes[tensor], dim, graph.shapes[tensor][dim])
    return None


def size_position(node: Node, use: SizeUse) -> int | None:
    """Which of the ints of the eager call became this argument; None if that is not known."""
    given = ints((node.args, dict(node.kwargs)))
    place = _place(node, use)
    eager = [size.value for size in node.sizes]
    if place is not None and place < min(len(given), len(eager)) and given[: place + 1] == eager[: place + 1]:
        return place
    candidates = [position for position, size in enumerate(node.sizes) if size.value == _old(node, use)]
    return candidates[0] if len({node.sizes[position] for position in candidates}) == 1 else None


def _old(node: Node, use: SizeUse) -> int:
    old = arguments(node)[use.argument]
    return int(old[use.index] if use.index is not None else old)


def _place(node: Node, use: SizeUse) -> int | None:
    """Position of the argument among all ints of the node's arguments; None if it has its default value."""
    names = [argument.name for argument in operator(node)._schema.arguments]
    passed = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    before = 0
    for name, value in passed.items():
        if name == use.argument:
            return before + (len(ints(value[: use.index])) if use.index is not None else 0)
        before += len(ints(value))
    return None


def new_values(solved: Mapping[Attribute, int], modules: Mapping[str, ModuleInfo]) -> dict[str, dict[str, Size]]:
    """New values by module and attribute."""
    values: dict[str, dict[str, Size]] = {}
    for leaf, value in solved.items():
        if value == leaf.value:
            continue
        held = values.setdefault(leaf.module, {}).get(leaf.name, modules[leaf.module].sizes[leaf.name])
        if leaf.index is None:
            values[leaf.module][leaf.name] = value
        else:
            assert isinstance(held, tuple)
            values[leaf.module][leaf.name] = (*held[: leaf.index], value, *held[leaf.index + 1 :])
    return values
