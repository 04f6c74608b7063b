"""What the analysis finds in small nets, what it blocks and why, and what it refuses."""

import pytest
import torch
from torch import nn

from idap.errors import PlanError, StructureError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests import nets


def structure_of(
    model: nn.Module, *args: torch.Tensor, swap: bool = False, required: bool = True, **kwargs: torch.Tensor
) -> Structure:
    return analyze(trace(model.eval(), args, kwargs), swap=swap, required=required)


def groups(structure: Structure) -> dict[str, tuple[str, int]]:
    return {group.name: (group.kind, group.size) for group in structure.groups}


def test_neurons_of_an_mlp() -> None:
    assert groups(structure_of(nets.mlp(), nets.sequence(4))) == {"0": ("neurons", 6), "2": ("neurons", 5)}


def test_a_residual_stream_is_one_group_and_each_block_has_its_own() -> None:
    model = nets.ResNet(nets.Basic(6, 6), nets.Basic(6, 8, 2), stem=6, width=8)
    found = structure_of(model, nets.images())
    assert groups(found) == {
        "conv": ("channels", 6),
        "layers.0.conv1": ("channels", 6),
        "layers.1.conv1": ("channels", 8),
        "layers.1.conv2": ("channels", 8),
    }
    assert [(block.name, block.kind) for block in found.blocks] == [("layers.0", "block")]


def test_heads_and_head_width_are_told_apart() -> None:
    model = nets.Encoder(4, 8, nets.PreNorm(8, nets.WrittenAttention(8, 2, 4), nets.FeedForward(8, 10)))
    found = structure_of(model, nets.sequence(4))
    heads = [group for group in found.groups if group.kind == "heads"]
    assert [group.size for group in heads] == [2]
    kinds = [block.kind for block in found.blocks]
    assert sorted(kinds) == ["block", "branch", "branch"]


def test_a_depthwise_convolution_follows_its_input_and_its_groups_are_mended() -> None:
    model = nets.MobileNet().eval()
    found = structure_of(model, nets.images())
    group = next(group for group in found.groups if group.size == 10)
    small = apply_plan(model, found.plan({group.name: range(0, 10, 3)}))
    depthwise = small.blocks[1].conv[3]
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (4, 4, 4)
    assert depthwise.weight.shape == (4, 1, 3, 3)


def test_amounts_that_the_code_writes_out_block_only_what_they_fix() -> None:
    blocks = (nets.CifarBlock(4, 4), nets.CifarBlock(4, 8, nets.PadLiteral()))
    model = nets.ResNet(*blocks, stem=4, width=8)
    sizes = groups(structure_of(model, nets.images()))
    assert sizes["conv"] == ("channels", 4)  # the stream, with its place in the wider one behind the shortcut
    assert sizes["layers.1.conv1"] == ("channels", 8)
    assert sum(size for _, size in sizes.values()) == 4 + 4 + 8  # the padded channels stay
    rewritten = structure_of(model, nets.images(), swap=True)
    assert groups(rewritten) == sizes | {"layers.1.conv2": ("channels", 2), "layers.1.conv2#2": ("channels", 2)}
    assert list(rewritten.plan({"layers.1.conv2": [1]}).programs) == ["layers.1.shortcut"]


def test_every_blocked_dimension_has_a_reason_with_a_line_or_the_function_of_torch() -> None:
    found = structure_of(nets.TorchEncoder(), nets.sequence(4))
    reasons = {blocked.tensor: blocked.reason for blocked in found.blocked}
    assert "transformer.py:" in reasons["encoder.layers.0.self_attn.in_proj_weight"]
    assert "transformer.py:" in reasons["head.weight"]
    found = structure_of(nets.VGG(), nets.images())
    assert found.blocked
    assert all("nets.py:" in blocked.reason for blocked in found.blocked)


def test_nothing_to_prune_says_what_stands_in_the_way() -> None:
    with pytest.raises(
        StructureError, match=r"nothing can be pruned: [^\n]*\n  weight, dimension 0: the model returns it"
    ):
        structure_of(nn.Linear(4, 2), torch.randn(3, 4))
    graph = trace(nn.Linear(4, 2), (torch.randn(3, 4),))
    assert analyze(graph, required=False).groups == ()


class Noisy(nn.Module):
    """Code that counts its channels by a number, and can't be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.first(x).view(x.shape[0], 2, 3)
        if self.training:
            split = split + torch.randn_like(split)
        return split.reshape(x.shape[0], 6)


def test_the_reason_why_code_cant_be_rewritten_comes_first() -> None:
    model = nn.Sequential(Noisy(), nn.Linear(6, 2))
    held = (
        r"\n  0\.first\.weight, dimension 0 and 1 more: size\[1\] of aten\.view\.default "
        r"in module '0' \([^\n]*\) is always 2:"
        r" it comes from no attribute of a module and from no shape; the code can't be rewritten: "
        r"it does something else in training, which a rewritten forward would not\n"
    )
    with pytest.raises(StructureError, match=rf"nothing can be pruned: [^\n]*{held}"):
        structure_of(model, torch.randn(3, 4), swap=True)


@pytest.fixture(scope="module")
def mlp() -> Structure:
    return structure_of(nets.mlp(), nets.sequence(4))


def test_unknown_names_are_refused_with_the_known_ones(mlp: Structure) -> None:
    with pytest.raises(StructureError, match=r"there is no group named 'fc'; there are: 0, 2"):
        mlp.plan({"fc": [0]})
    with pytest.raises(StructureError, match="there is no block or branch named 'x'"):
        mlp.plan({}, ["x"])


def test_a_group_keeps_at_least_one_unit_and_only_its_own(mlp: Structure) -> None:
    with pytest.raises(PlanError, match=r"group '0' would lose all its 6 units.*; keep at least one"):
        mlp.plan({"0": []})
    with pytest.raises(PlanError, match=r"group '0' has units 0 to 5, asked to keep unit 6"):
        mlp.plan({"0": [1, 6]})


def test_a_plan_survives_json_and_knows_when_it_is_empty(mlp: Structure) -> None:
    plan = mlp.plan({"0": [0, 3], "2": [1]})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan and not mlp.plan({})
    with pytest.raises(PlanError, match="this is not a plan: KeyError: 'keep'"):
        Plan.from_json({})


def test_a_later_plan_can_not_bring_back_what_is_gone(mlp: Structure) -> None:
    with pytest.raises(PlanError, match=r"slot 1 of dimension 0 of '0\.\w+' is kept, but an earlier plan removed it"):
        mlp.plan({"0": [0, 1]}).since(mlp.plan({"0": [0, 2]}))
    with pytest.raises(PlanError, match="the earlier plan cuts dimension"):
        mlp.plan({"2": [0]}).since(mlp.plan({"0": [0, 2]}))


def test_a_plan_that_does_not_fit_names_the_first_tensor(mlp: Structure) -> None:
    plan = mlp.plan({"0": [0, 1]})
    with pytest.raises(PlanError, match=r"tensor '0\.weight' has shape \(7, 4\), the plan expects \(6, 4\)"):
        apply_plan(
            nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.GELU(), nn.Linear(5, 3)), plan
        )
    with pytest.raises(PlanError, match=r"it has no tensor '2\.weight' \(expected shape \(5, 6\)\)"):
        apply_plan(nn.Sequential(nn.Linear(4, 6)), plan)


def test_streams_are_what_enters_blocks():
    from idap.models.nets import cifar_resnet20

    net = cifar_resnet20().eval()
    found = analyze(trace(net, (torch.randn(2, 3, 32, 32),)))
    inside = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    assert {group.name for group in found.groups} - found.streams == inside
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert analyze(trace(plain, (torch.randn(2, 4),))).streams == frozenset()
