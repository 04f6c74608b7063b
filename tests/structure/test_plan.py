"""Plans as plain data: what they say, how they are read back, and how one follows another."""

import json

import pytest

from idap.errors import PlanError, StructureError
from idap.structure.plan import Plan
from tests.nets import Net, every_net, structure_of


def plan_of(net: Net, *, step: int = 2, blocks: bool = True) -> Plan:
    structure = structure_of(net.name)
    removed = [block.name for block in structure.blocks[:1] if blocks]
    return structure.plan({group.name: range(0, group.size, step) for group in structure.groups}, removed)


@every_net
def test_a_plan_says_all_that_must_be_done(net: Net) -> None:
    structure, plan = structure_of(net.name), plan_of(net)
    assert plan.keep == {group.name: tuple(range(0, group.size, 2)) for group in structure.groups if group.size > 1}
    for group in structure.groups:
        for name, dim in group.members:
            assert plan.removes(name) or dim in plan.tensors[name]
    for name, dims in plan.tensors.items():
        for dim, kept in dims.items():
            assert list(kept) == sorted(set(kept)) and 0 < len(kept) < plan.shapes[name][dim]
        assert plan.shape_after(name) == tuple(
            len(dims[dim]) if dim in dims else size for dim, size in enumerate(plan.shapes[name])
        )
    assert plan.shapes == structure.graph.shapes


@every_net
def test_a_plan_survives_json(net: Net) -> None:
    plan = plan_of(net)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@every_net
def test_a_plan_since_itself_does_nothing(net: Net) -> None:
    plan = plan_of(net)
    rest = plan.since(plan)
    assert not rest.tensors and not rest.replaced
    assert rest.shapes == {name: plan.shape_after(name) for name in plan.shapes if not plan.removes(name)}


@every_net
def test_a_plan_since_nothing_is_itself(net: Net) -> None:
    structure, plan = structure_of(net.name), plan_of(net)
    assert plan.since(structure.plan({})) == plan


def test_a_plan_that_keeps_all_is_empty() -> None:
    structure = structure_of("mlp")
    plan = structure.plan({"0": range(6), "2": [4, 3, 2, 1, 0, 0]})
    assert not plan and plan.keep == {} and plan.tensors == {} and plan.attributes == {}
    assert structure.plan({"0": [3, 0, 3]}).keep == {"0": (0, 3)}


def test_gone_is_the_module_and_what_lies_in_it() -> None:
    plan = Plan(replaced={"layers.1": "identity"})
    assert plan.removes("layers.1") and plan.removes("layers.1.conv.weight")
    assert not plan.removes("layers.10.conv.weight") and not plan.removes("layers")


def test_a_block_that_goes_takes_its_branches_with_it() -> None:
    structure = structure_of("pre-norm, fused")
    plan = structure.plan({}, ["blocks.0.norm1…attn", "blocks.0"])
    assert plan.replaced == {"blocks.0": "identity"}
    assert plan.removed == ("blocks.0.norm1…attn", "blocks.0")


@pytest.mark.parametrize(
    ("keep", "removed", "error", "message"),
    [
        ({"embed": []}, (), PlanError, "group 'embed' would lose all its 8 units.*; keep at least one"),
        ({"embed": [0, 8]}, (), PlanError, "group 'embed' has units 0 to 7, asked to keep unit 8"),
        ({"embed": [-1, 3]}, (), PlanError, "group 'embed' has units 0 to 7, asked to keep unit -1"),
        ({"stem": [0]}, (), StructureError, "there is no group named 'stem'; there are: embed, "),
        ({}, ("blocks",), StructureError, "there is no block or branch named 'blocks'; there are: blocks.0.norm1…attn"),
    ],
)
def test_what_cannot_be_done_is_refused(
    keep: dict[str, list[int]], removed: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        structure_of("pre-norm, fused").plan(keep, removed)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (({"embed": [0, 1]}, ()), ({"embed": [1, 2]}, ()), r"slot 2 of dimension \d of '.*' is kept, but an earlier"),
        (
            ({"embed": [0, 1]}, ()),
            ({}, ()),
            r"the earlier plan cuts dimension \d of '.*', but the later one keeps it whole",
        ),
        (({}, ("blocks.0",)), ({}, ()), r"the earlier plan removes module 'blocks.0', but the later one keeps it"),
        (({}, ("blocks.0",)), ({}, ("blocks.1",)), "the earlier plan removes module 'blocks.0'"),
        (({}, ("blocks.0",)), ({}, ("blocks.0.norm1…attn",)), "the earlier plan removes module 'blocks.0'"),
    ],
)
def test_a_plan_follows_only_what_it_contains(first: tuple, second: tuple, message: str) -> None:
    structure = structure_of("pre-norm, fused")
    with pytest.raises(PlanError, match=message):
        structure.plan(*second).since(structure.plan(*first))


def test_a_later_plan_may_remove_what_an_earlier_one_cut() -> None:
    structure = structure_of("pre-norm, fused")
    earlier = structure.plan({"blocks.0.mlp.fc1": [0, 1]}, ["blocks.0.norm1…attn"])
    later = structure.plan({"blocks.0.mlp.fc1": [0, 1]}, ["blocks.0"])
    rest = later.since(earlier)
    assert rest.replaced == {"blocks.0": "identity"} and not rest.tensors


@pytest.mark.parametrize("part", ["keep", "removed", "tensors", "shapes", "attributes", "replaced"])
def test_what_is_not_a_plan_is_refused(part: str) -> None:
    data = structure_of("mlp").plan({"0": [1]}).to_json()
    with pytest.raises(PlanError, match=rf"this is not a plan: KeyError: '{part}'; it must come from Plan.to_json"):
        Plan.from_json({name: value for name, value in data.items() if name != part})
    with pytest.raises(PlanError, match="this is not a plan: TypeError"):
        Plan.from_json({**data, "removed": None})
