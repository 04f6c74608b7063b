"""Recurrent layers, outputs by name, and slots that are picked by their place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idap.errors import StructureError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.surgery.apply import apply_plan, apply_plan_
from idap.surgery.verify import verify
from tests.nets import Recurrent, randomised, sequence

X = sequence(4)


def build_structure(model: nn.Module, *args: Tensor, **settings: Any) -> tuple[nn.Module, Structure]:
    model = randomised(model.eval())
    return model, analyze(trace(model, args or (X,)), **settings)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("settings", [{}, {"bias": False}])
def test_units_of_recurrent_layers_can_go(
    kind: type[nn.RNNBase], layers: int, bidirectional: bool, settings: dict[str, Any]
) -> None:
    model, structure = build_structure(Recurrent(kind, num_layers=layers, bidirectional=bidirectional, **settings))
    assert {group.name: group.size for group in structure.groups} == {"embed": 5, "recurrent": 6}
    for keep in ({"recurrent": [1, 2, 5]}, {"embed": [0, 3]}, {"embed": [4], "recurrent": [0]}):
        plan = structure.plan(keep)
        assert not plan.programs
        small = apply_plan(model, plan)
        assert verify(structure, model, small, plan, ((X,), {})).error <= 1e-5
        assert small.recurrent.hidden_size == len(keep.get("recurrent", range(6)))
        assert small.recurrent.input_size == len(keep.get("embed", range(5)))
        expected = zero_slots(model, plan.tensors)
        for x in (X, sequence(4, 9, 3)):
            torch.testing.assert_close(small(x), expected(x), rtol=1e-4, atol=1e-5)


def zero_slots(model: nn.Module, tensors: Any) -> nn.Module:
    """A copy of the original with zeros where a plan cuts, run by its own code.

    A unit whose gates get nothing keeps the state 0: its candidate is tanh(0), or relu(0).
    """
    copied = type(model)(
        type(model.recurrent),
        num_layers=model.recurrent.num_layers,
        bidirectional=model.recurrent.bidirectional,
        bias=model.recurrent.bias,
    ).eval()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, dims in tensors.items():
            tensor = copied.get_parameter(name)
            for dim, kept in dims.items():
                gone = [slot for slot in range(tensor.shape[dim]) if slot not in kept]
                tensor.index_fill_(dim, torch.tensor(gone), 0.0)
    return copied


def test_a_plain_layer_may_rectify() -> None:
    model, structure = build_structure(Recurrent(nn.RNN, nonlinearity="relu"))
    plan = structure.plan({"recurrent": [0, 4]})
    assert verify(structure, model, apply_plan(model, plan), plan, ((X,), {})).error <= 1e-5


def test_in_place_the_weights_that_the_layer_keeps_in_a_list_are_the_new_ones() -> None:
    model, structure = build_structure(Recurrent(nn.LSTM, num_layers=2))
    plan = structure.plan({"recurrent": [0, 4]})
    expected = apply_plan(model, plan)(X)
    for small in (apply_plan(model, plan), apply_plan_(model, plan)):
        assert [id(weight) for weight in small.recurrent._flat_weights] == [id(p) for p in small.recurrent.parameters()]
        assert torch.equal(small(X), expected)


def test_states_that_come_from_outside_fix_the_units() -> None:
    class Given(Recurrent):
        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return self.head(self.recurrent(self.embed(x), state)[0].mean(1))

    _, structure = build_structure(Given(nn.GRU), X, torch.randn(1, 2, 6))
    assert [group.name for group in structure.groups] == ["embed"]


def test_a_projected_state_stays_but_what_is_around_it_does_not_break() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 5), nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
            self.recurrent = nn.LSTM(5, 6, batch_first=True, proj_size=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(self.embed(x))[0].mean(1))

    _, structure = build_structure(Projected())
    assert [group.name for group in structure.groups] == ["head.0"]
    reason = next(item.reason for item in structure.blocked if item.tensor == "embed.weight" and item.dim == 0)
    assert "a recurrent layer of this kind can't shrink" in reason


def test_the_last_state_of_each_direction_can_be_read() -> None:
    class Last(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            _, (state, _) = self.recurrent(self.embed(x))
            return self.head(torch.cat([state[-2], state[-1]], -1))

    model, structure = build_structure(Last(nn.LSTM, bidirectional=True))
    plan = structure.plan({"recurrent": [2, 3]})
    assert verify(structure, model, apply_plan(model, plan), plan, ((X,), {})).error <= 1e-5


# ------------------------------------------------------------------------------------------------------ outputs by name


class Tells(nn.Module):
    """Returns what it found and all it went through."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        one = self.one(x).relu()
        two = self.two(one).relu()
        return {"logits": self.head(two), "hidden_states": (one, two)}


def test_outputs_have_names() -> None:
    assert trace(Tells(), (X,)).returned == ("logits", "hidden_states.0", "hidden_states.1")


@pytest.mark.parametrize(
    ("contracts", "groups"),
    [
        (["logits"], ["one", "two"]),
        (["hidden_states.0"], ["two", "head"]),
        (["logits", "hidden_states.1"], ["one"]),
        (["hidden_states"], ["head"]),
        ([], ["one", "two", "head"]),
        (None, []),
    ],
)
def test_only_what_is_promised_keeps_its_shape(contracts: list[str] | None, groups: list[str]) -> None:
    model, structure = build_structure(Tells(), contracts=contracts, required=False)
    found = [group.name for group in structure.groups]
    assert found == groups
    plan = structure.plan({name: [0, 2] for name in found})
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, ((X,), {})).error <= 1e-5
    returned = small(X)
    widths = {"one": 6, "two": 5, "head": 3} | dict.fromkeys(found, 2)
    assert returned["logits"].shape[-1] == widths["head"]
    assert [state.shape[-1] for state in returned["hidden_states"]] == [widths["one"], widths["two"]]


@pytest.mark.parametrize("name", ["hidden", "logit", "hidden_states.2", "0"])
def test_a_name_that_is_not_returned_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(
        StructureError, match=rf"returns nothing named '{name}'; it returns logits, hidden_states\.0, hidden_states\.1"
    ):
        analyze(trace(Tells(), (X,)), contracts=[name])


# --------------------------------------------------------------------------------------------- slots picked by place


class Picks(nn.Module):
    """Takes one channel by its place, and uses its values or only its size."""

    def __init__(self, place: int, *, values: bool) -> None:
        super().__init__()
        self.conv, self.head, self.place, self.values = nn.Conv1d(4, 6, 1), nn.Linear(5, 2), place, values

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.mT)
        picked = x[:, self.place]
        table = torch.zeros(picked.shape[0], 1, picked.shape[1])
        y = x.relu().sum(1, keepdim=True) + table
        return self.head(y + picked[:, None] if self.values else y)


@pytest.mark.parametrize(
    ("place", "values", "free"), [(-1, False, True), (0, False, True), (-1, True, False), (0, True, False)]
)
def test_a_slot_whose_value_is_not_used_does_not_block(place: int, values: bool, free: bool) -> None:
    model, structure = build_structure(Picks(place, values=values), required=False)
    assert any(node.op == "aten.select.int" for node in structure.graph.nodes.values())
    assert [group.name for group in structure.groups] == (["conv"] if free else [])
    if free:
        plan = structure.plan({"conv": [1, 4]})
        assert verify(structure, model, apply_plan(model, plan), plan, ((X,), {})).error <= 1e-5
    else:
        reason = next(item.reason for item in structure.blocked if (item.tensor, item.dim) == ("conv.weight", 0))
        assert "a slot of it is picked by its place" in reason


def test_a_slot_in_the_middle_blocks_even_if_it_is_not_used() -> None:
    """After a cut it might not be there."""
    _, structure = build_structure(Picks(3, values=False), required=False)
    assert [group.name for group in structure.groups] == []
