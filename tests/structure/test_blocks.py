"""What may be removed without leaving a hole, and what only looks as if it might."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.replacement import alike
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.nets import (
    Basic,
    FeedForward,
    Net,
    PostNorm,
    WrittenAttention,
    every_net,
    randomised,
    sequence,
    structure_of,
)


@every_net
def test_the_blocks_are_those_the_net_expects(net: Net) -> None:
    assert tuple(block.name for block in structure_of(net.name).blocks) == net.blocks


@every_net
def test_a_block_holds_together(net: Net) -> None:
    structure = structure_of(net.name)
    names = {block.name for block in structure.blocks}
    for block in structure.blocks:
        dims = structure.layout.dims
        assert alike(dims[block.entry][0], dims[block.exit][0])
        assert block.entry not in block.nodes and set(block.contains) <= names
        assert (block.kind == "branch") == bool(block.branch) <= (block.addition == block.exit)
        assert block.nodes - {block.branch} <= structure.dead_nodes([block.name]) | {block.exit}
        assert structure.skips([block.name]) == {block.exit: block.entry}


# ------------------------------------------------------------------------------------------------ hand-made cases


class Around(nn.Module):
    """A first and a last layer with something between them."""

    def __init__(self, inner: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.inner = inner
        self.last = nn.Linear(width, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x))))


def check(model: nn.Module, *args: Any, width: int = 4, **kwargs: Any) -> tuple[Structure, list[str]]:
    """Analyse a model, try each removal on it, and return the names of what may go."""
    model = randomised(model.eval())
    args = args or (sequence(width),)
    structure = analyze(trace(model, args, kwargs))
    for block in structure.blocks:
        plan = structure.plan({}, [block.name])
        assert verify(structure, model, apply_plan(model, plan), plan, (args, kwargs)).error <= 1e-5
    return structure, [block.name for block in structure.blocks]


class Residual(nn.Module):
    """One residual branch, written in many ways."""

    def __init__(self, width: int = 6, hidden: int = 5, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(width))

    def branch(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(x)

    def plain(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def reversed_(self, x: Tensor) -> Tensor:
        return self.branch(x) + x

    def in_place(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x

    def scaled(self, x: Tensor) -> Tensor:
        return torch.add(x, F.dropout(self.scale * self.branch(x), 0.1, self.training))

    def two_ends(self, x: Tensor) -> Tensor:
        return x + (self.branch(x) + self.gate(torch.sigmoid(x)))

    def gated(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * self.branch(x)

    def doubled_stream(self, x: Tensor) -> Tensor:
        return torch.add(self.branch(x), x, alpha=2)

    def not_zero(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.branch(x))

    def shifted(self, x: Tensor) -> Tensor:
        return x + (self.branch(x) + self.scale)

    def normed(self, x: Tensor) -> Tensor:
        return x + F.layer_norm(self.branch(x), (6,), self.scale, self.scale)

    def polynomial(self, x: Tensor) -> Tensor:
        return x + 0.1 * x**3

    def weighed(self, x: Tensor) -> Tensor:
        return x + F.linear(F.relu(F.linear(x, self.up.weight)), self.down.weight)

    def leaking(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        return torch.cat([(x + self.down(hidden))[..., :3], hidden[..., :3]], dim=-1)

    def resized(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).view(*x.shape[:-1], 5).flip(1))

    def changes_its_input(self, x: Tensor) -> Tensor:
        view = x[..., :]
        return view + self.branch(F.relu_(x))


@pytest.mark.parametrize("way", ["plain", "reversed_", "in_place", "scaled", "two_ends", "gated"])
def test_the_stream_can_pass_whatever_way_the_branch_is_written(way: str) -> None:
    structure, names = check(Around(Residual(way=way)))
    assert names == ["inner"]
    assert structure.block("inner").kind == "block"


@pytest.mark.parametrize(
    "way", ["doubled_stream", "not_zero", "shifted", "normed", "polynomial", "weighed", "leaking", "resized"]
)
def test_a_branch_in_the_open_is_not_offered_where_stand_ins_would_add_something(way: str) -> None:
    """The same code in the model itself, so that there is no module which is the whole block."""

    class Open(Residual):
        def __init__(self) -> None:
            super().__init__(way=way)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(torch.tanh(self.first(x))))

    assert check(Open())[1] == []


def test_branches_in_the_open() -> None:
    class Open(Residual):
        def __init__(self, way: str) -> None:
            super().__init__(way=way)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(torch.tanh(self.first(x))))

    structure, names = check(Open("two_ends"))
    assert names == ["up…gate"]
    assert structure.blocks[0].replaced == {"up": "identity", "down": "zero", "gate": "zero"}
    structure, names = check(Open("scaled"))
    assert structure.block("up…down").replaced == {"up": "identity", "down": "zero"}
    assert check(Open("changes_its_input"))[1] == []


def test_a_branch_whose_only_tie_to_the_stream_is_a_gate() -> None:
    """x + x * sigmoid(fc(x)): with zeros for fc it would add half of x, so only the whole module may go."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + x * torch.sigmoid(self.fc(x))

    structure, names = check(Around(Gate()))
    assert names == ["inner"] and structure.block("inner").replaced == {"inner": "identity"}


class Options(nn.Module):
    """Calls its inner block in ways that a stand-in must bear, or can't."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.last, self.inner = nn.Linear(4, 6), nn.Linear(6, 3), Optional()
        if way == "tied":
            self.last = nn.Linear(5, 3)
            self.between = nn.Linear(6, 5)
            self.between.weight = self.inner.up.weight

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(getattr(self, self.way)(x, mask))

    def extra(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, mask)

    def by_name(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, mask=mask)

    def stream_by_name(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x=x, mask=mask)

    def twice(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(self.inner(x))

    def looked_into(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) * self.inner.factor

    def looked_deep_into(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) if self.inner.up.in_features else x

    def pair(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, pair=True)[0]

    def by_method(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner.forward(x)

    def tied(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.between(self.inner(x))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.factor = 2.0

    def forward(self, x: Tensor, mask: Tensor | None = None, pair: bool = False) -> Any:
        y = self.down(F.relu(self.up(x)))
        x = x + (y if mask is None else y * mask)
        return (x, mask) if pair else x


@pytest.mark.parametrize("way", ["extra", "by_name", "stream_by_name", "pair"])
def test_a_block_may_be_called_with_more_than_the_stream(way: str) -> None:
    structure, names = check(Options(way), sequence(4), torch.rand(2, 5, 1))
    assert names == ["inner"]
    assert structure.block("inner").nodes


@pytest.mark.parametrize("way", ["twice", "looked_into"])
def test_a_block_that_nothing_can_stand_in_for_is_not_offered_whole(way: str) -> None:
    _, names = check(Options(way), sequence(4), torch.rand(2, 5, 1))
    assert "inner" not in names


@pytest.mark.parametrize("way", ["looked_deep_into", "by_method", "tied"])
def test_what_another_module_needs_stays(way: str) -> None:
    _, names = check(Options(way), sequence(4), torch.rand(2, 5, 1))
    assert "inner" not in names and "inner.up…down" not in names if way != "by_method" else "inner" not in names


def test_an_attention_whose_code_lies_open_goes_with_its_block_only() -> None:
    """With stand-ins for the projections, the reshape into heads would meet the width of the stream."""

    class OpenAttention(WrittenAttention):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert check(Around(OpenAttention(6, 2, 3)))[1] == ["inner"]


def test_a_branch_of_equal_widths_inside_keeps_its_reshape() -> None:
    """The projections in and out of the heads have the stream's size, but not its units."""

    class OpenAttention(WrittenAttention):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + super().forward(x))

    structure, names = check(Around(OpenAttention(6, 2, 3)))
    assert names == ["inner"]
    assert structure.group("inner.q_proj:heads").size == 2


def test_a_model_that_returns_the_stream_may_still_lose_its_last_block() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.blocks = nn.Sequential(Basic(4, 4), Basic(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.stem(x))

    _, names = check(Backbone(), torch.randn(2, 3, 8, 8))
    assert names == ["blocks.0", "blocks.1"]


def test_a_list_of_one_block_is_not_itself_a_block() -> None:
    """A ModuleList is never called, so nothing could stand in for it."""

    class Listed(Around):
        def __init__(self) -> None:
            super().__init__(nn.ModuleList([PostNorm(6, WrittenAttention(6, 2, 3), FeedForward(6, 5))]))

        def middle(self, x: Tensor) -> Tensor:
            for block in self.inner:
                x = block(x)
            return x

    _, names = check(Listed())
    assert names == ["inner.0.attn", "inner.0.mlp", "inner.0"]


def test_attributes_of_removed_modules_are_left_alone() -> None:
    """The head count of a removed attention feeds nothing, so a plan must not touch it, nor fail on it."""
    structure = structure_of("post-norm, fused")
    plan = structure.plan({"blocks.0.attn.qkv:heads": [1], "embed": [0, 2, 5]}, ["blocks.0.attn"])
    assert plan.replaced == {"blocks.0.attn": "zero"}
    assert not any(path.startswith("blocks.0.attn") for path in [*plan.attributes, *plan.tensors])
    assert plan.removes("blocks.0.attn.qkv.weight") and not plan.removes("blocks.0.attn2")
