"""How the code follows a cut: first by new values of attributes, then by rewritten code, else not at all."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from idap.graph.ir import Attribute, Literal
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.code.program import Program
from idap.structure.code.repair import CodeChanges, find_culprits, repair_code
from idap.structure.code.rewrite import CannotRewriteError, Rewriter
from idap.structure.code.sizes import Demand, Values
from idap.structure.layout import Layout
from tests.nets import structure_of


class Part(nn.Module):
    """12 features, seen as rows of `width` in `count` columns, which forward may also use as a number."""

    def __init__(self, body: Callable[["Part", Tensor], Tensor]) -> None:
        super().__init__()
        self.count, self.body = 3, body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def of(*bodies: Callable[[Part, Tensor], Tensor]) -> Structure:
    parts = [nn.Sequential(nn.Linear(12 if place else 4, 12), Part(body)) for place, body in enumerate(bodies)]
    model = nn.Sequential(*parts, nn.Linear(12, 2)).eval()
    return analyze(trace(model, (torch.ones(2, 4),)))


def by_attribute(part: Part, x: Tensor) -> Tensor:
    return x.view(-1, part.count, x.shape[1] // part.count).relu().flatten(1)


def by_literal(_part: Part, x: Tensor) -> Tensor:
    return x.view(-1, 3, 4).relu().flatten(1)


def as_a_number(part: Part, x: Tensor) -> Tensor:
    return x.view(-1, part.count, 12 // 3).relu().flatten(1) / (part.count + 1) ** 0.5


def cut_all(
    structure: Structure, rewriter: Rewriter | None = None, *, gone: str | None = None, count: int = 2
) -> CodeChanges:
    """What a cut of all groups to `count` units takes."""
    keep = {group.name: range(min(count, group.size)) for group in structure.groups}
    return repair_code(
        structure.demands,
        structure.layout,
        structure.presence(keep),
        rewriter or structure.rewriter,
        lambda path: path == gone,
    )


def test_an_attribute_is_told_its_new_value_and_no_code_changes() -> None:
    found = cut_all(of(by_attribute))
    assert not found.programs and not found.unmet
    assert found.values.solved[Attribute("0.1", "count", None, 3)] == 2


def test_only_the_module_that_can_not_follow_gets_new_code() -> None:
    structure = of(by_attribute, by_literal)
    found = cut_all(structure)
    assert list(found.programs) == ["1.1"] and not found.unmet
    assert found.values.solved[Attribute("0.1", "count", None, 3)] == 2


def test_a_cut_that_changes_nothing_takes_nothing() -> None:
    structure = of(by_literal)
    found = cut_all(structure, count=12)
    assert not found.programs and not found.unmet
    assert all(leaf.value == value for leaf, value in found.values.solved.items())


def test_a_number_is_closed_until_its_code_is_rewritten() -> None:
    structure, count = of(as_a_number), Attribute("0.1", "count", None, 3)
    assert list(structure.layout.escaped[count]) == ["0.1"]
    found = cut_all(structure)
    assert list(found.programs) == ["0.1"] and count not in found.closed
    refused = cut_all(structure, Rewriter(structure.graph, enabled=False))
    assert not refused.programs and refused.unmet and count in refused.closed


def test_what_a_removed_module_computes_closes_nothing() -> None:
    structure, count = of(as_a_number), Attribute("0.1", "count", None, 3)
    found = cut_all(structure, Rewriter(structure.graph, enabled=False), gone="0.1")
    assert count not in found.closed


def test_without_rewriting_the_demand_is_unmet_and_says_why() -> None:
    structure = of(by_literal)
    found = cut_all(structure, Rewriter(structure.graph, enabled=False))
    assert {demand.module for demand in found.unmet} == {"0.1"}
    assert any("is always 3" in demand.why(found.values, found.closed) for demand in found.unmet)


class Fails(Rewriter):
    """Finds out late that one module can't be written."""

    def program(self, path: str, layout: Layout, values: Values) -> Program:
        if path == "1.1":
            raise CannotRewriteError("no")
        return super().program(path, layout, values)


def test_a_module_that_turns_out_not_to_be_writable_is_given_up() -> None:
    structure = of(by_literal, by_literal)
    rewriter = Fails(structure.graph)
    found = cut_all(structure, rewriter)
    assert {demand.module for demand in found.unmet} == {"1.1"} and not found.programs
    assert rewriter.refused == {"1.1": "no"}


def test_a_description_of_a_tensor_is_never_met_by_new_code() -> None:
    """`in_features` must hold the size itself: no code could change that."""
    structure = of(by_literal)
    attribute = Attribute("0.0", "out_features", None, 12)
    demand = Demand(attribute, Literal(7), None, "out_features", defines=attribute, module="0.1")
    other = Demand(attribute, Literal(8), None, "again", defines=attribute, module="0.1")
    found = repair_code((demand, other), structure.layout, structure.presence({}), structure.rewriter)
    assert [unmet.place for unmet in found.unmet] == ["again"] and not found.programs


def test_those_that_few_groups_are_to_blame_for_come_first() -> None:
    structure = structure_of("pre-norm, fused")
    layout = structure.layout
    embed = layout.tensors["embed.weight"][0]
    both = layout.tensors["blocks.0.attn.qkv.weight"][0]  # heads and head width
    one, two = Demand(Literal(1), None, embed, "one"), Demand(Literal(1), None, both, "two")
    assert [d.place for d in find_culprits([two, one], layout)] == ["one"]
    assert [d.place for d in find_culprits([two], layout)] == ["two"]
