"""What the analysis finds in every net is what the net says is in it."""

import re

import pytest
import torch
from torch import Tensor, nn

from idap.errors import StructureError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from tests.nets import Net, by_name, every_net, structure_of


@every_net
def test_the_groups_are_those_the_net_expects(net: Net) -> None:
    found = {group.name: (group.kind, group.size) for group in structure_of(net.name).groups}
    assert found == dict(net.groups)
    assert list(found) == list(net.groups)


@every_net
def test_every_slot_of_a_member_belongs_to_the_group(net: Net) -> None:
    """Members, layout and index agree, and each unit lies in every member as often as any other."""
    structure = structure_of(net.name)
    for place, group in enumerate(structure.groups):
        assert group.index == place
        assert group.members
        for name, dim in group.members:
            units = structure.layout.units(structure.layout.tensors[name][dim], group.index)
            counts = [int((units == unit).sum()) for unit in range(group.size)]
            assert min(counts) > 0 and len(set(counts)) == 1


@every_net
def test_what_is_in_no_group_is_reported_with_a_reason(net: Net) -> None:
    """Each slot that a weight writes or reads can go, or `blocked` says why not."""
    structure = structure_of(net.name)
    blocked = {(item.tensor, item.dim): item for item in structure.blocked}
    for contraction in structure.layout.contractions:
        node = structure.graph.nodes[contraction.weight]
        for dim in (contraction.write_dim, contraction.read_dim):
            free = (structure.layout.group_of[structure.layout.dims[node.name][0][dim]] >= 0).any(axis=0)
            stuck = int((~free).sum()) if node.shape[dim] > 1 else 0
            assert stuck == (blocked[node.target, dim].size if (node.target, dim) in blocked else 0)
    assert all(item.reason for item in structure.blocked)


@pytest.mark.parametrize(
    ("net", "tensor", "dim", "size", "reason"),
    [
        ("resnet basic", "conv.weight", 1, 3, r"can't shrink, at aten.conv2d.default in module 'conv' \(nets.py:\d+:"),
        ("resnet basic", "fc.weight", 0, 3, r"the model returns it, at aten.linear.default in module 'fc' \(nets.py:"),
        ("cifar literal", "layers.1.conv2.weight", 0, 4, r"pad\[\d\] of aten.pad.default .*nets.py:.* is always 2"),
        ("torch encoder", "embed.weight", 0, 8, r"self_attn.num_heads % 2\) with 1 at transformer.py:\d+"),
        ("torch encoder", "encoder.layers.0.self_attn.out_proj.weight", 1, 8, r"num_heads.* at transformer.py:\d+"),
        ("language model", "embed.weight", 0, 11, r"looked up by index, at aten.embedding.default .*nets.py:"),
        ("scale from shape", "fc1.weight", 0, 6, r"computes another number from this size, at nets.py:\d+"),
        ("scale from shape", "fc3.weight", 0, 7, "comes from width, which the code also uses as a number"),
    ],
)
def test_the_reason_can_be_understood(net: str, tensor: str, dim: int, size: int, reason: str) -> None:
    found = {(item.tensor, item.dim): item for item in structure_of(net).blocked}
    assert found[tensor, dim].size == size
    assert re.search(reason, found[tensor, dim].reason), found[tensor, dim].reason


@every_net
def test_no_reason_contradicts_itself(net: Net) -> None:
    """Such as "which gives 1, not 1"."""
    for item in structure_of(net.name).blocked:
        assert not re.search(r"gives (\S+), not \1\b", item.reason), item.reason


@every_net
def test_two_analyses_of_one_net_are_equal(net: Net) -> None:
    assert structure_of(net.name) == analyze(trace(net.model(seed=1), net.args, net.kwargs), swap=net.swap)


def test_writers_and_readers_are_the_weights_on_both_sides() -> None:
    group = structure_of("resnet basic").group("conv")
    assert [port.weight for port in group.writers] == ["conv.weight", "layers.0.conv2.weight", "layers.1.conv2.weight"]
    assert [port.weight for port in group.readers] == [
        *("layers.0.conv1.weight", "layers.1.conv1.weight", "layers.2.conv1.weight", "layers.2.downsample.0.weight"),
    ]
    assert ("bn.running_mean", 0) in group.members and ("fc.weight", 1) not in group.members
    assert not group.crosses


def test_crossings_are_noted() -> None:
    structure = structure_of("pre-norm, fused")
    assert structure.graph.nodes[structure.group("embed").crosses[0]].op == "aten.layer_norm.default"
    assert not structure.group("blocks.0.mlp.fc1").crosses
    assert structure_of("group norm").group("conv2").crosses


def test_the_share_that_can_be_pruned() -> None:
    assert structure_of("resnet basic").prunable > 0.99  # all but the bias of the last layer
    assert 0.3 < structure_of("torch encoder").prunable < 0.4
    assert structure_of("torch encoder, swapped").prunable > 0.99


def test_representation_counts() -> None:
    assert repr(structure_of("resnet basic")) == (
        "Structure(6 groups with 30 units, 3 blocks and branches, 100% of the parameters prunable)"
    )


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    structure = structure_of("resnet basic")
    with pytest.raises(StructureError, match=r"no group named 'stem'; there are: conv, layers.0.conv1"):
        structure.group("stem")
    with pytest.raises(StructureError, match=r"no block or branch named 'layers.9'; there are: layers.0, layers.1"):
        structure.block("layers.9")


def test_nothing_to_prune_says_why() -> None:
    graph = trace(nn.Linear(3, 2), (torch.ones(1, 3),))
    with pytest.raises(StructureError, match=r"nothing can be pruned: .* stands in the way:\n  weight, dimension 0"):
        analyze(graph)
    assert not analyze(graph, required=False).groups


def test_contracts_can_be_fewer_than_all_that_is_returned() -> None:
    """A model that returns hidden states: the caller says that only the second output must keep its shape."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.one(x).relu()
            return hidden, self.two(hidden)

    graph = trace(Two(), (torch.ones(1, 4),))
    with pytest.raises(StructureError, match="the model returns it"):
        analyze(graph)
    assert [group.name for group in analyze(graph, contracts=["1"]).groups] == ["one"]


def test_units_are_numbered_as_their_slots() -> None:
    structure = structure_of("mlp")
    group = structure.group("0")
    assert structure.layout.units(structure.layout.tensors["0.weight"][0], group.index).tolist() == list(range(6))
    assert structure.layout.units(structure.layout.tensors["0.weight"][1], group.index).tolist() == [-1] * 4
    fused = structure_of("pre-norm, fused")
    heads = fused.group("blocks.0.attn.qkv:heads")
    units = fused.layout.units(fused.layout.tensors["blocks.0.attn.qkv.weight"][0], heads.index)
    assert units.tolist() == [0, 0, 0, 1, 1, 1] * 3
    assert by_name["pre-norm, fused"].groups[heads.name] == ("heads", 2)


def test_a_weight_that_an_einsum_multiplies_in_its_own_way_is_told_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4, 6))
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.einsum("...i,kio->...ko", x, self.weight).amax(-2))

    found = {(item.tensor, item.dim): item for item in analyze(trace(Experts(), (torch.ones(2, 4),))).blocked}
    assert found["weight", 0].size == 3
    assert "a product that does not read one whole dimension of it and write the other" in found["weight", 0].reason
    assert found["weight", 1].size == 4  # the model's input
    assert ("weight", 2) not in found
