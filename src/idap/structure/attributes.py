"""Which ints of which modules must change with a plan, found from where the forward pass got its sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from idap.graph.ir import Attribute, Expression, Extent, Literal, ModuleInfo, Node, ints
from idap.graph.provenance import attributes_in, evaluate
from idap.graph.rules import SizeUse
from idap.graph.rules.flow import arguments, operator
from idap.structure.layout import Layout, Presence, count
from idap.structure.plan import Size

SHAPES_OF: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "Linear": {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    "Bilinear": {"in1_features": ("weight", 1), "in2_features": ("weight", 2), "out_features": ("weight", 0)},
    "Conv": {"out_channels": ("weight", 0)},
    "ConvTranspose": {"in_channels": ("weight", 0)},
    "BatchNorm": {"num_features": ("running_mean", 0)},
    "InstanceNorm": {"num_features": ("weight", 0)},
    "GroupNorm": {"num_channels": ("weight", 0)},
    "Embedding": {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    "PReLU": {"num_parameters": ("weight", 0)},
}
"""torch.nn class (without its 1d, 2d, 3d) -> ints that only describe its tensors: attribute -> (tensor, dimension)."""


@dataclass(frozen=True)
class Conflict:
    """A size that the code computes wrongly after a cut and that no attribute can mend."""

    use: SizeUse
    node: Node
    expected: int
    found: int | None
    related: tuple[SizeUse, ...] = ()
    """Uses fed by the same attribute: one number can't follow two dims."""

    def reason(self) -> str:
        """One line: what the code says, where."""
        value = "nothing that a module holds" if self.found is None else f"{self.found}, not {self.expected}"
        return f"the code fixes this size: {self.use.argument} of {self.node.where()} comes from {value}"


def solve_attributes(
    nodes: Mapping[str, Node], layout: Layout, present: Presence, dead: Iterable[str]
) -> tuple[dict[Attribute, int], list[Conflict]]:
    """Find new values for the attributes that feed sizes, so that every size comes out as the dims say.

    Args:
        nodes: of the graph.
        layout: where units lie.
        present: labels that stay.
        dead: nodes that vanish with removed blocks; their sizes don't matter.

    Returns:
        New values of the attributes that must change, and the sizes that no attribute can mend.
    """
    gone = set(dead)
    wanted = [
        (use, nodes[use.node], _source(nodes[use.node], use), use.sign * count(use.dim, present))
        for use in layout.sizes
        if use.node not in gone
    ]
    solved: dict[Attribute, int] = {}

    def value_of(leaf: Expression) -> int:
        if isinstance(leaf, Attribute):
            return solved.get(leaf, leaf.value)
        if isinstance(leaf, Extent):
            return count(layout.dims[leaf.node][0][leaf.dim], present)
        assert isinstance(leaf, Literal)
        return leaf.value

    def now(source: Expression) -> int | None:
        try:
            return evaluate(source, value_of)
        except ArithmeticError:
            return None

    for _ in range(3):  # an expression of two attributes becomes solvable once another has told one of them
        for _use, _node, source, expected in wanted:
            if source is None or now(source) == expected:
                continue
            free = sorted(attributes_in(source) - set(solved) - layout.escaped, key=str)
            if len(free) == 1:
                _solve(source, free[0], expected, solved, now)
    conflicts = [
        Conflict(use, node, expected, now(source) if source is not None else None, _related(source, wanted))
        for use, node, source, expected in wanted
        if (source is None and expected != use.sign * use.dim.shape[1]) or (source is not None and now(source) != expected)
    ]
    return {leaf: value for leaf, value in solved.items() if value != leaf.value}, conflicts


def _related(
    source: Expression | None, wanted: Iterable[tuple[SizeUse, Node, Expression | None, int]]
) -> tuple[SizeUse, ...]:
    shared = attributes_in(source) if source is not None else set()
    return tuple(use for use, _, other, _ in wanted if other is not None and attributes_in(other) & shared)


def _solve(
    source: Expression, free: Attribute, expected: int, solved: dict[Attribute, int], now: object
) -> None:
    """Try all smaller values of the one attribute that is free."""
    assert callable(now)
    for value in range(free.value, -1, -1):
        solved[free] = value
        if now(source) == expected:
            return
    del solved[free]


def _source(node: Node, use: SizeUse) -> Expression | None:
    """Where the eager code got the int that became this argument; None if that can't be told."""
    given = ints((node.args, dict(node.kwargs)))
    place = _place(node, use)
    eager = [size.value for size in node.sizes]
    same = min(len(given), len(eager))
    if place is not None and place < same and given[: place + 1] == eager[: place + 1]:
        return node.sizes[place]
    old = arguments(node)[use.argument]
    old = old[use.index] if use.index is not None else old
    candidates = {size for size in node.sizes if size.value == old}
    return candidates.pop() if len(candidates) == 1 else None


def _place(node: Node, use: SizeUse) -> int | None:
    """Position of the argument among all ints of the node's arguments; None if it was left to its default."""
    names = [argument.name for argument in operator(node)._schema.arguments]
    passed = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    before = 0
    for name, value in passed.items():
        if name == use.argument:
            return before + (len(ints(value[: use.index])) if use.index is not None else 0)
        before += len(ints(value))
    return None


def collect(
    solved: Mapping[Attribute, int], modules: Mapping[str, ModuleInfo], shape_after: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Size]]:
    """New values by module and attribute: the solved ones, and those that describe a layer of torch.nn."""
    values: dict[str, dict[str, Size]] = {}
    for leaf, value in solved.items():
        held = values.setdefault(leaf.module, {}).get(leaf.name, modules[leaf.module].sizes[leaf.name])
        if leaf.index is None:
            values[leaf.module][leaf.name] = value
        else:
            assert isinstance(held, tuple)
            values[leaf.module][leaf.name] = (*held[: leaf.index], value, *held[leaf.index + 1 :])
    for path, info in modules.items():
        for name, size in _descriptions(info, values.get(path, {}), shape_after).items():
            if info.sizes.get(name) != size:
                values.setdefault(path, {})[name] = size
    return values


def _descriptions(
    info: ModuleInfo, changed: Mapping[str, Size], shape_after: Mapping[str, tuple[int, ...]]
) -> dict[str, Size]:
    family = info.kind.rpartition(".")[2].rstrip("d").rstrip("123")
    if not info.kind.startswith("torch.nn.modules.") or family not in SHAPES_OF:
        return {}
    shapes = {name: shape_after[tensor] for name, tensor in info.tensors.items() if tensor in shape_after}
    found: dict[str, Size] = {
        name: shapes[tensor][dim]
        for name, (tensor, dim) in SHAPES_OF[family].items()
        if tensor in shapes and name in info.sizes
    }
    if family in ("Conv", "ConvTranspose") and "weight" in shapes:
        groups = changed.get("groups", info.sizes.get("groups", 1))
        assert isinstance(groups, int)
        found["in_channels" if family == "Conv" else "out_channels"] = shapes["weight"][1] * groups
    return found


