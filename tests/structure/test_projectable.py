"""Which modules a linear map of the channels can stand in for, and what its plan may say."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idap.errors import PlanError, StructureError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.structure.replacement import Projected, alike
from tests.nets import Basic, Bottleneck, Net, ResNet, every_net, images, sequence, structure_of
from tests.surgery.test_projection_plans import Tall


def projections_of(model: nn.Module, *args: Any, replacement: str = "auto") -> dict[str, tuple[int, ...]]:
    """Name of each module that may become a projection -> its stride."""
    structure = analyze(trace(model.eval(), args or (images(),)), replacement=replacement, required=False)
    return {block.name: block.projected.stride for block in structure.blocks if block.projected}


class Unit(nn.Sequential):
    """A convolution with its norm and activation."""

    def __init__(self, inside: int, outside: int, size: int = 3, stride: int = 1, *more: nn.Module) -> None:
        conv = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True), *more)


def net_of(*layers: nn.Module, width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)
    )


# --------------------------------------------------------------------------------------------------------- found


@every_net
def test_what_was_offered_before_stays_and_auto_only_adds(net: Net) -> None:
    plain = structure_of(net.name)
    auto = analyze(plain.graph, swap=net.swap, replacement="auto")
    kept = [replace(block, contains=()) for block in auto.blocks if block.projected is None]
    assert kept == [replace(block, contains=()) for block in plain.blocks]
    for block in auto.blocks:
        if block.projected is None:
            continue
        before, after = (auto.graph.nodes[name].shape for name in (block.entry, block.exit))
        assert block.kind == "projection" and block.replaced == {block.name: "projection"}
        assert not alike(auto.layout.dims[block.entry][0], auto.layout.dims[block.exit][0])
        assert block.projected.sizes == (after[block.projected.dim], before[block.projected.dim])


def test_downsampling_blocks_of_residual_networks() -> None:
    model = ResNet(Basic(4, 4), Basic(4, 8, 2), Basic(8, 8), Bottleneck(8, 4, 12, 2), stem=4, width=12)
    assert projections_of(model) == {"layers.1": (2, 2), "layers.3": (2, 2)}
    everything = {"layers.0": (1, 1), "layers.1": (2, 2), "layers.2": (1, 1), "layers.3": (2, 2)}
    assert projections_of(model, replacement="projection") == everything
    assert projections_of(model, replacement="identity") == {}


def test_units_in_a_list_are_blocks_and_the_list_is_none() -> None:
    assert projections_of(net_of(Unit(4, 6), Unit(6, 8, 3, 2))) == {"1.0": (1, 1), "1.1": (2, 2)}
    assert projections_of(net_of(Unit(4, 6), Unit(6, 8, 3, 1, nn.MaxPool2d(2)))) == {"1.0": (1, 1), "1.1": (2, 2)}


def test_linear_blocks() -> None:
    assert projections_of(Tall(), sequence(4)) == {"steps.0": (), "steps.1": ()}


def test_what_is_no_more_than_a_projection_is_not_offered_but_several_of_them_are() -> None:
    assert projections_of(net_of(Unit(4, 8, 1))) == {}
    assert projections_of(net_of(Unit(4, 6, 1), Unit(6, 8, 1, 2))) == {"1": (2, 2)}


def test_layers_of_torch_are_no_blocks() -> None:
    assert projections_of(net_of(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3))) == {"1": (2, 2)}


def test_shapes_that_a_projection_cannot_make_are_not_offered() -> None:
    class Grows(nn.Sequential):
        pass

    grown = Grows(nn.Conv2d(4, 6, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(6, 8, 3, padding=1))
    assert projections_of(net_of(grown)) == {}
    flat = Grows(nn.Conv2d(4, 6, 3), nn.Flatten(2))
    assert projections_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(flat), nn.Linear(36, 2))) == {}


def test_a_module_whose_inside_is_read_elsewhere_is_not_offered() -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.ModuleList([Unit(3, 4), Unit(4, 6), Unit(6, 8)])
            self.head = nn.Conv2d(14, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.units[0](x)
            inner = self.units[1][0](x)
            return self.head(torch.cat([self.units[2](self.units[1](x)), inner], 1))

    assert set(projections_of(Leaks())) == {"units.0", "units.2"}


def test_tokens_that_are_merged_are_not_offered() -> None:
    class Merge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.reduce = nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            even, odd = x[:, 0::2], x[:, 1::2]
            parts = [t[:, :, step::2] for t in (even, odd) for step in range(2)]
            return self.reduce(self.norm(torch.cat(parts, -1)))

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Merge(), nn.GELU()), nn.Linear(8, 2))
    assert projections_of(model, torch.randn(2, 8, 8, 3)) == {}


# --------------------------------------------------------------------------------------------- in the structure


def conv_structure() -> Structure:
    model = ResNet(Basic(4, 4), Basic(4, 8, 2), Basic(8, 8), stem=4, width=8)
    return analyze(trace(model.eval(), (images(),)), replacement="projection")


def test_a_projection_is_a_layer_of_the_structure_after_it() -> None:
    structure = conv_structure()
    after = structure.after(["layers.1"])
    assert after is structure.after(("layers.1",)) and after.after(["layers.1"]) is after
    assert structure.after([]) is structure and structure.standing == () and after.standing == ("layers.1",)
    block = structure.block("layers.1")
    node = after.graph.nodes[block.exit]
    assert node.op == "aten.conv2d.default" and node.shapes == structure.graph.nodes[block.exit].shapes
    assert node.call == ("layers.1.map", "conv2d", 0)
    alive = set(after.graph.nodes) - after.dead_nodes(["layers.1"])
    assert block.exit in alive and not alive & (block.nodes - {block.exit})
    stream, wide = structure.group("conv"), structure.group("layers.1.conv2")
    mine = [after.groups[stream.index].readers[-1], after.groups[wide.index].writers[-1]]
    assert {port.node for port in mine} == {block.exit}
    assert ("layers.1.map.weight", 1) in after.groups[stream.index].members
    assert ("layers.1.map.weight", 0) in after.groups[wide.index].members
    assert structure.skips(["layers.1"]) == {}


def test_a_group_that_loses_all_units_is_not_held_by_a_projection() -> None:
    structure = conv_structure()
    with pytest.raises(PlanError, match="no residual branch contains the whole group"):
        structure.plan({"layers.1.conv1": []})


def test_only_projections_have_a_linear_map() -> None:
    structure = analyze(conv_structure().graph)
    with pytest.raises(StructureError, match=r"'layers.0' is removed and not replaced by a projection"):
        structure.projection_of("layers.0", structure.presence({}))


# -------------------------------------------------------------------------------------------------- in the plan


def test_a_plan_names_the_channels_of_the_original() -> None:
    structure = conv_structure()
    plan = structure.plan({"conv": [0, 3], "layers.1.conv2": [1, 2, 7]}, ["layers.1"])
    assert plan.projections == {"layers.1": Projected((0, 3), (1, 2, 7), (8, 4), (2, 2))}
    assert plan.shape_after("layers.1.map.weight") == (3, 2, 1, 1) and plan.shape_after("layers.1.map.bias") == (3,)
    assert not any(name.startswith("layers.1.") for name in plan.tensors)
    whole = structure.plan({}, ["layers.1"])
    since = plan.since(whole)
    assert since.tensors["layers.1.map.weight"] == {0: (1, 2, 7), 1: (0, 3)}
    assert since.attributes["layers.1.map"] == {"in_channels": 2, "out_channels": 3}
    assert since.projections == {} and "layers.1" not in since.replaced
    smaller = structure.plan({"conv": [3], "layers.1.conv2": [2, 7]}, ["layers.1"])
    assert smaller.since(plan).tensors["layers.1.map.weight"] == {0: (1, 2), 1: (1,)}
    with pytest.raises(PlanError, match=r"slot 0 of dimension 0 of 'layers.1.map.weight' is kept, but an earlier plan"):
        structure.plan({"conv": [3], "layers.1.conv2": [0]}, ["layers.1"]).since(plan)
    with pytest.raises(PlanError, match=r"the earlier plan removes module 'layers.1', but the later one keeps it"):
        structure.plan({}).since(whole)
    with pytest.raises(PlanError, match=r"replaces module 'layers.0' by projection, but the later one by identity"):
        analyze(structure.graph).plan({}, ["layers.0"]).since(structure.plan({}, ["layers.0"]))


def plan_data(**changes: Any) -> dict[str, Any]:
    plan = conv_structure().plan({"conv": [0, 3]}, ["layers.1"])
    data: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(data) == plan
    data["projections"]["layers.1"].update(changes)
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, r"keeps inputs \[\]; expected ascending numbers from 0 to 3, at least one"),
        ({"inputs": [3, 0]}, r"keeps inputs \[3, 0\]; expected ascending"),
        ({"inputs": [0, 0]}, r"keeps inputs \[0, 0\]"),
        ({"inputs": [-1]}, "not a plan: ValueError: expected numbers of at least 0, found -1"),
        ({"outputs": [8]}, r"keeps outputs \[8\]; expected ascending numbers from 0 to 7"),
        ({"inputs": [True]}, "not a plan: TypeError: expected a whole number, found True"),
        ({"inputs": "01"}, "not a plan: TypeError: expected a list, found"),
        ({"sizes": [8]}, "not a plan: ValueError"),
        ({"stride": [0, 2]}, r"has stride \(0, 2\); expected none, or 1 to 3 numbers from 1 to 4096"),
        ({"stride": [1, 1, 1, 1]}, "expected none, or 1 to 3 numbers"),
        ({"sizes": [8, 10**9]}, r"maps 1000000000 to 8 channels and so has more than the [\d,]+ numbers of the module"),
    ],
)
def test_a_hostile_projection_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(plan_data(**changes))


def test_a_projection_needs_sizes_and_sizes_a_projection() -> None:
    data = plan_data()
    with pytest.raises(PlanError, match=r"module 'layers.1' must be replaced by a projection and have its sizes"):
        Plan.from_json({**data, "replaced": {"layers.1": "zero"}})
    with pytest.raises(PlanError, match=r"module 'layers.1' must be replaced by a projection and have its sizes"):
        Plan.from_json({**data, "projections": {}})
    with pytest.raises(PlanError, match="KeyError: 'projections'"):
        Plan.from_json({name: part for name, part in data.items() if name != "projections"})
