"""Which code can be rewritten, what the rewritten code says, and why some code can't be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.errors import PlanError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.code.program import Instruction
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.nets import randomised, sequence


class Inner(nn.Module):
    """A module whose forward is given."""

    def __init__(self, body: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.body = body
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Around(nn.Module):
    """Writes 12 features for each of 5 places, hands them to the inner module, and reads what comes back."""

    def __init__(self, body: Callable[..., Any], call: Callable[["Around", Tensor], Tensor] | None = None, **held: Any):
        super().__init__()
        self.write, self.inner, self.read = nn.Linear(4, 12), Inner(body, **held), nn.LazyLinear(3)
        self.call = call or (lambda self, x: self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.call(self, self.write(x)))


def model_and_structure(model: nn.Module, *, swap: bool = True) -> tuple[nn.Module, Structure]:
    model(sequence(4))
    model = randomised(model.eval())
    return model, analyze(trace(model, (sequence(4),)), swap=swap, required=False)


def sizes(structure: Structure) -> dict[str, int]:
    return {group.name: group.size for group in structure.groups}


def cut_and_verify(model: nn.Module, structure: Structure, keep: dict[str, list[int]]) -> tuple[nn.Module, Plan]:
    """Cut, and compare with the masked original."""
    plan = structure.plan(keep)
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5
    return small, plan


def steps(plan: Plan, path: str = "inner") -> list[Instruction]:
    (routine,) = plan.programs[path].routines
    return list(routine.steps)


def in_rows(_: nn.Module, x: Tensor) -> Tensor:
    """Rows of 4 by numbers in the code."""
    return x.view(x.shape[0], x.shape[1], 3, 4).softmax(-1).flatten(2)


def test_pruned_sizes_become_numbers_and_all_others_stay_free() -> None:
    model, structure = model_and_structure(Around(in_rows))
    assert sizes(structure) == {"write": 3, "write#2": 4}
    small, plan = cut_and_verify(model, structure, {"write": [0, 2], "write#2": [1, 2, 3]})
    view = steps(plan)[0]
    assert view.function == "torch.Tensor.view"
    assert view.args == (("value", 0), ("size", ("value", 0), 0), ("size", ("value", 0), 1), 2, 3)
    assert [step.function.rpartition(".")[2] for step in steps(plan)] == ["view", "softmax", "flatten"]
    for batch, length in ((1, 1), (7, 2)):
        assert small(sequence(4, length, batch)).shape == (batch, length, 3)


def test_a_product_with_the_batch_keeps_the_batch() -> None:
    def body(_: nn.Module, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.reshape(b * n * 3, 4).softmax(-1).reshape(b, n, 12)

    model, structure = model_and_structure(Around(body))
    small, plan = cut_and_verify(model, structure, {"write": [0, 2]})
    batch, length = (("size", ("value", 0), dim) for dim in (0, 1))
    assert steps(plan)[0].args[1:] == (("calc", "*", batch, length, 2), 4)
    assert steps(plan)[-1].args[1:] == (batch, length, 8)
    assert small(sequence(4, batch=7)).shape == (7, 5, 3)


def test_what_the_cut_does_not_touch_is_not_rewritten() -> None:
    _, structure = model_and_structure(Around(in_rows))
    assert structure.plan({}).programs == {}
    assert structure.rewriter.possible("inner") and not structure.rewriter.possible("there is none")


def test_without_rewriting_the_reason_names_the_line() -> None:
    _, structure = model_and_structure(Around(in_rows), swap=False)
    assert sizes(structure) == {}
    (reason,) = {item.reason for item in structure.blocked if (item.tensor, item.dim) == ("write.weight", 0)}
    assert "test_rewrite.py:" in reason and "in module 'inner'" in reason and "is always" in reason
    assert not structure.rewriter.possible("inner")


def test_heads_from_the_width_and_their_number() -> None:
    """``C // num_heads``, as in the first vision transformers: with fewer heads they would become wider."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.scale = (8 // self.num_heads) ** -0.5
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
            return self.proj(x.transpose(1, 2).reshape(b, n, c))

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), Attention(), nn.Linear(8, 3))

    _, fixed = model_and_structure(net(), swap=False)
    assert not any(group.kind == "heads" for group in fixed.groups)
    assert any("test_rewrite.py:" in item.reason for item in fixed.blocked if item.tensor == "1.qkv.weight")
    model, structure = model_and_structure(net())
    kinds = [(group.kind, group.size) for group in structure.groups]
    assert kinds == [("neurons", 8), ("heads", 4), ("head width", 2), ("neurons", 8)]
    width, heads, inside, _ = structure.groups
    for keep in ({heads.name: [3]}, {inside.name: [1]}, {width.name: [0, 5, 6]}, {heads.name: [0, 2], width.name: [1]}):
        small, plan = cut_and_verify(model, structure, keep)
        assert list(plan.programs) == ["1"]
        assert small(sequence(4, 9, 3)).shape == (3, 9, 3)


@pytest.mark.parametrize("scale", [None, "computed"])
def test_the_scale_of_an_attention_stays_what_it_was(scale: str | None) -> None:
    def body(_: nn.Module, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (3, 4)).transpose(1, 2)
        given = None if scale is None else q.shape[-1] ** -0.5
        return F.scaled_dot_product_attention(q, q, q, scale=given).transpose(1, 2).flatten(2)

    model, structure = model_and_structure(Around(body))
    inside = structure.group("write:head-width")
    _, plan = cut_and_verify(model, structure, {inside.name: [1, 3]})
    (attention,) = (step for step in steps(plan) if "scaled_dot" in step.function)
    assert dict(attention.kwargs)["scale"] == 0.5  # one over the root of 4, not of 2
    _, fixed = model_and_structure(Around(body), swap=False)
    assert not any(group.kind == "head width" for group in fixed.groups)


class Radix(nn.Module):
    """As in ResNeSt: another way is taken if there is only one part."""

    def __init__(self) -> None:
        super().__init__()
        self.radix, self.width = 3, 4

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], x.shape[1], self.radix, self.width)
        x = x.softmax(2) if self.radix > 1 else x.sigmoid()
        return x.flatten(2)


def test_a_relation_is_kept_or_the_module_rewritten() -> None:
    model = nn.Sequential(nn.Linear(4, 12), Radix(), nn.Linear(12, 3))
    model, structure = model_and_structure(model)
    assert sizes(structure) == {"0": 3, "0#2": 4}
    _, plan = cut_and_verify(model, structure, {"0": [0, 2]})
    assert not plan.programs and plan.attributes["1"] == {"radix": 2}  # the relation holds: nothing to rewrite
    small, plan = cut_and_verify(model, structure, {"0": [1]})
    assert [step.function.rpartition(".")[2] for step in steps(plan, "1")] == ["view", "softmax", "flatten"]
    assert torch.allclose(small[1](torch.randn(2, 5, 4)), torch.ones(()))  # a softmax over one part, no sigmoid


def test_without_rewriting_a_relation_is_never_broken() -> None:
    model, structure = model_and_structure(nn.Sequential(nn.Linear(4, 12), Radix(), nn.Linear(12, 3)), swap=False)
    assert sizes(structure)["0#2" if "0#2" in sizes(structure) else "0"] == 4
    for group in structure.groups:
        for unit in range(group.size):
            try:
                plan = structure.plan({group.name: [unit]})
            except PlanError as error:
                assert "radix" in str(error) and "test_rewrite.py:" in str(error)
                continue
            small = apply_plan(model, plan)
            assert small[1].radix > 1
            assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5


def scale(_: nn.Module, x: Tensor, factor: float) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 3, 4).mul(factor).softmax(-1).flatten(2)


def test_a_module_that_is_called_twice_in_one_way_is_rewritten_once() -> None:
    model, structure = model_and_structure(Around(scale, lambda self, x: self.inner(self.inner(x, 2.0), 2.0)))
    _, plan = cut_and_verify(model, structure, {"write": [0, 1], "write#2": [1, 3]})
    assert len(plan.programs["inner"].routines) == 1


def test_a_module_that_is_called_twice_in_different_ways_is_refused() -> None:
    _, structure = model_and_structure(Around(scale, lambda self, x: self.inner(self.inner(x, 2.0), 3.0)))
    assert sizes(structure) == {}
    assert structure.rewriter.refused == {"inner": "it does something different each time it is called"}
    assert any("test_rewrite.py:" in item.reason for item in structure.blocked if item.tensor == "write.weight")


ELSEWHERE = torch.ones(12)


@pytest.mark.parametrize(
    ("body", "held", "why"),
    [
        (lambda m, x: in_rows(m, x) * ELSEWHERE.sum(), {}, "passes on a tensor from elsewhere"),
        (lambda m, x: in_rows(m, m.other[0](x)), {"other": [nn.ReLU()]}, None),
        (lambda m, x: (in_rows(m, x), Inner(in_rows))[0], {}, None),
    ],
)
def test_what_the_code_takes_from_elsewhere(body: Callable[..., Any], held: dict[str, Any], why: str | None) -> None:
    model, structure = model_and_structure(Around(body, **held))
    if why is None:
        cut_and_verify(model, structure, {"write": [0, 1], "write#2": [1, 3]})
    else:
        assert sizes(structure) == {}
        assert why in structure.rewriter.refused["inner"]


def test_a_module_that_reaches_for_another_ones_weight_is_refused() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read = nn.Linear(4, 12), nn.Linear(12, 3)
            self.inner = Inner(lambda m, x: in_rows(m, x) * m.other[0].bias.sum(), other=[self.read])

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.inner(self.write(x)))

    _, structure = model_and_structure(Reaches())
    assert "which lies elsewhere" in structure.rewriter.refused["inner"]
    assert sizes(structure) == {}


def test_containers_data_types_and_numbers_are_written_as_they_were() -> None:
    def body(_: nn.Module, x: Tensor, parts: list[Tensor], *, options: dict[str, Any]) -> Tensor:
        mask = torch.full((3, 4), float("-inf"), dtype=x.dtype).triu(2)
        y = (x.view(*x.shape[:2], 3, 4) + mask).softmax(-1)[..., :, 0:4]
        return torch.cat([y.flatten(2).to(torch.float32), *parts], -1) * options["factor"]

    model = Around(body, lambda self, x: self.inner(x, [x.relu()], options={"factor": 2.0, "x": x}))
    model, structure = model_and_structure(model)
    assert sizes(structure) == {}  # the mask is a table for 3 rows and 4 columns
    model = Around(
        lambda m, x, parts, *, options: torch.cat([in_rows(m, x).to(parts[0].dtype), *parts], -1) * options["factor"],
        lambda self, x: self.inner(x, [x.relu()], options={"factor": 2.0, "x": x}),
    )
    model, structure = model_and_structure(model)
    small, plan = cut_and_verify(model, structure, {"write": [0, 1]})
    (routine,) = plan.programs["inner"].routines
    assert routine.args[1][0] == "list" and dict(dict(routine.kwargs)["options"][1:])["factor"] == 2.0
    assert small.double()(sequence(4).double()).dtype == torch.float64
