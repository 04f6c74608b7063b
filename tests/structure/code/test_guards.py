"""Rewritten code takes the branch of the original for all sizes that compare as in the trace, and refuses others."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idap
from idap.errors import PlanError, RewrittenModuleError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.code.program import Guard
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.nets import randomised, sequence
from tests.surgery.test_rewritten import Attentive, written_attention


def padding(batch: int, length: int) -> Tensor:
    """True from another place on in each sample, never at the first."""
    return torch.arange(length)[None] >= 1 + torch.arange(batch)[:, None] % length


@pytest.mark.parametrize("heads", [[2], [0, 3]])
def test_a_padded_attention_takes_every_batch_size_and_length(heads: list[int]) -> None:
    model = randomised(Attentive().eval())
    example = (sequence(4, 12, 2), padding(2, 12))
    structure = analyze(trace(model, example))
    plan = Plan.from_json(json.loads(json.dumps(structure.plan({"attn:heads": heads}).to_json())))
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, (example, {})).error <= 1e-5
    for batch, length in ((2, 12), (1, 12), (9, 5), (3, 40), (1, 1)):
        x, mask = sequence(4, length, batch), padding(batch, length)
        expected = written_attention(model, x, heads=heads, mask=mask)
        torch.testing.assert_close(small(x, mask), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RewrittenModuleError, match="sizes with a == b, found a = 7, b = 5"):
        small(sequence(4, 5, 2), padding(2, 7))


def test_a_padded_attention_is_exported_with_free_sizes() -> None:
    model, example = randomised(Attentive().eval()), (sequence(4, 12, 2), padding(2, 12))
    small = apply_plan(model, analyze(trace(model, example)).plan({"attn:heads": [1, 3]}))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(small, example, dynamic_shapes=(free, free)).module()
    x, mask = sequence(4, 7, 5), padding(5, 7)
    torch.testing.assert_close(exported(x, mask), small(x, mask), rtol=1e-4, atol=1e-5)


def test_one_attention_called_twice_keeps_its_sizes_free() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
            self.attn, self.norm = nn.MultiheadAttention(8, 4, batch_first=True), nn.LayerNorm(8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(x)
            for _ in range(2):
                y = self.norm(x)
                x = x + self.attn(y, y, y, key_padding_mask=mask, need_weights=False)[0]
            return self.head(x)

    model, example = randomised(Twice().eval()), (sequence(4, 12, 2), padding(2, 12))
    structure = analyze(trace(model, example))
    plan = structure.plan({"attn:heads": [1]})
    small = apply_plan(model, plan)
    assert len(plan.programs["attn"].routines) == 1
    assert verify(structure, model, small, plan, (example, {})).error <= 1e-5
    assert small(sequence(4, 3, 5), padding(5, 3)).shape == (5, 3, 3)


class Encoder(nn.Module):
    """torch's own encoder behind an embedding, with tokens that are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(x.mean(1))


def batches(count: int) -> list[dict[str, Tensor]]:
    made = []
    for _ in range(count):
        mask = (torch.arange(12)[None] < torch.randint(4, 13, (16, 1))).long()
        ids = torch.randint(2, 30, (16, 12)) * mask
        made.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, (16,))})
    return made


def test_a_padded_encoder_is_compressed_with_default_settings() -> None:
    torch.manual_seed(0)
    model, task = randomised(Encoder().eval()), idap.classification(batches(4), batches(2), num_classes=3)
    found = idap.compress(model, task, idap.Config(max_drop=None, macs=0.6, recovery=idap.Recovery(epochs=0)))
    assert any(path.endswith("self_attn") for path in found.plan.programs)
    batch = task.train[0]
    whole = found.model(batch["input_ids"], batch["attention_mask"])
    for rows in (slice(0, 1), slice(2, 7)):  # another batch size than the one that was traced
        part = found.model(batch["input_ids"][rows], batch["attention_mask"][rows])
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- ways that code may take


class Part(nn.Module):
    """Sees 12 features as 3 rows of 4, by numbers in its code, and takes its way by a size."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way, self.limit = way, 6
        self.table = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor, other: Tensor | None = None, count: int = 0) -> Tensor:
        x = self.way(self, x, other, count)
        return x.view(x.shape[0], x.shape[1], 3, 4).softmax(-1).flatten(2)


class Around(nn.Module):
    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.write, self.part, self.read = nn.Linear(4, 12), Part(way), nn.Linear(12, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.read(self.part(self.write(x), other, other.shape[0]))


def longer(part: Part, x: Tensor, _other: Tensor, _count: int) -> Tensor:
    return x[:, :6] if x.shape[1] > 6 else x * 2


def longer_than_held(part: Part, x: Tensor, _other: Tensor, _count: int) -> Tensor:
    return x[:, :6] if part.limit < x.shape[1] else x * 2


def longer_than_table(part: Part, x: Tensor, _other: Tensor, _count: int) -> Tensor:
    return x[:, :9] if x.shape[1] >= part.table.shape[0] else x * part.table[0]


def same_count(_part: Part, x: Tensor, other: Tensor, _count: int) -> Tensor:
    return x * other[:, None] if x.shape[1] == other.shape[0] else x + other.mean()


def twice_as_long(_part: Part, x: Tensor, other: Tensor, _count: int) -> Tensor:
    return x * 2 if x.shape[1] * 2 > other.shape[0] + 1 else x


def by_count(_part: Part, x: Tensor, _other: Tensor, count: int) -> Tensor:
    return x * 2 if count > 3 else x


def divide_by_root(_part: Part, x: Tensor, _other: Tensor, _count: int) -> Tensor:
    return x / (x.shape[1] ** 0.5)


def model_and_structure(way: Callable[..., Tensor], length: int = 5, others: int = 5) -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = randomised(Around(way).eval())
    return model, analyze(trace(model, (sequence(4, length, 2), torch.ones(others))))


def cut(model: nn.Module, structure: Structure) -> tuple[nn.Module, Plan]:
    plan = structure.plan({"write": [0, 2]})
    small = apply_plan(model, plan)
    assert list(plan.programs) == ["part"]
    return small, plan


def mask_middle_rows(model: nn.Module) -> nn.Module:
    """The original without the middle row of each sample."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.read.weight.view(3, 3, 4)[:, 1] = 0
    return made


SIZES = [(1, 5), (5, 5), (6, 6), (7, 5), (7, 7), (8, 2), (9, 9), (20, 20), (2, 3), (5, 20)]
WAYS: dict[str, tuple[Callable[..., Tensor], Callable[[int, int], bool], str]] = {
    "a number": (longer, lambda n, _: n <= 6, "a size <= 6, found 20"),
    "an attribute": (longer_than_held, lambda n, _: n <= 6, "a size <= 6, found 20"),
    "a parameter": (longer_than_table, lambda n, _: n < 9, "a size < 9, found 20"),
    "another size": (same_count, lambda n, m: n == m, "sizes with a == b, found a = 5, b = 20"),
    "arithmetic": (twice_as_long, lambda n, m: 2 * n > m + 1, "sizes with a > b, found a = 10, b = 21"),
    "a size that was given": (by_count, lambda _, m: m > 3, "a size > 3, found 2"),
    "computed with": (divide_by_root, lambda n, _: n == 5, "a size of 5, found 20"),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_way_that_was_traced_is_taken_for_all_sizes_that_take_it(name: str) -> None:
    way, taken, message = WAYS[name]
    model, structure = model_and_structure(way)
    small, _ = cut(model, structure)
    original, refusals = mask_middle_rows(model), []
    for length, others in SIZES:
        given = (sequence(4, length, 3), torch.randn(others))
        if taken(length, others):
            torch.testing.assert_close(small(*given), original(*given), rtol=1e-4, atol=1e-5)
            continue
        with pytest.raises(
            RewrittenModuleError, match=r"the code of this Part was rewritten for .*swap=False"
        ) as error:
            small(*given)
        refusals.append(str(error.value))
    assert any(message in refusal for refusal in refusals), refusals


def test_the_advice_of_the_message_can_be_followed() -> None:
    model, _ = model_and_structure(longer)
    given = (sequence(4, 20, 3), torch.ones(20))
    again = analyze(trace(model, given))
    small, _ = cut(model, again)
    torch.testing.assert_close(small(*given), mask_middle_rows(model)(*given), rtol=1e-4, atol=1e-5)
    whole = analyze(trace(model, (sequence(4), torch.ones(5))), swap=False, required=False)
    assert not whole.groups  # left as it is, for every length


def test_two_plans_in_a_row_keep_what_the_first_code_checked() -> None:
    model, structure = model_and_structure(same_count)
    small, _ = cut(model, structure)
    again = analyze(trace(small, (sequence(4), torch.ones(5))))
    smaller = apply_plan(small, again.plan({"write": [0]}))
    assert smaller(sequence(4, 7, 3), torch.ones(7)).shape == (3, 7, 3)
    with pytest.raises(RewrittenModuleError, match="sizes with a == b, found a = 7, b = 5"):
        smaller(sequence(4, 7, 3), torch.ones(5))


# ------------------------------------------------------------------------------------------------------- hostile plans

SIZE = ["size", ["value", 0], 1]
HOSTILE: dict[str, Any] = {
    "three parts, as before": [SIZE, 5, 0],
    "no relation": [SIZE, "is", 5, 0],
    "source as a relation": [SIZE, "== 5 or __import__('os').system('true') or", 5, 0],
    "a list as a relation": [SIZE, ["=="], 5, 0],
    "source as a size": ["__import__('os').system('true')", "==", 5, 0],
    "source as a dimension": [["size", ["value", 0], "0) + print("], "==", 5, 0],
    "source as a value": [["size", ["value", "0"], 0], "==", 5, 0],
    "a tensor of the module": [["size", ["own", "table"], 0], "==", 5, 0],
    "no arithmetic": [["calc", "@", SIZE, 2], "==", 5, 0],
    "arithmetic of nothing": [["calc", "+"], "==", 5, 0],
    "a fraction": [SIZE, "==", 5.0, 0],
    "a truth": [SIZE, "==", True, 0],
    "a number too large": [SIZE, "==", 2**70, 0],
    "a step of text": [SIZE, "==", 5, "0"],
    "a step before the first": [SIZE, "==", 5, -1],
    "a step after the last": [SIZE, "==", 5, 1000],
    "no guard": 5,
}


def poison(plan: Plan, guard: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(plan.to_json()))
    data["programs"]["part"][0]["guards"] = [guard]
    return data


@pytest.fixture(scope="module")
def guarded() -> tuple[nn.Module, Plan]:
    model, structure = model_and_structure(same_count)
    return model, cut(model, structure)[1]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_guard_that_means_nothing_is_refused(guarded: tuple[nn.Module, Plan], name: str) -> None:
    with pytest.raises(PlanError, match=r"means nothing|not the code of a module"):
        Plan.from_json(poison(guarded[1], HOSTILE[name]))


@pytest.mark.parametrize("place", [0, 1])
def test_a_guard_reads_only_what_was_made_before(guarded: tuple[nn.Module, Plan], place: int) -> None:
    plan = Plan.from_json(poison(guarded[1], [["size", ["value", 6], 0], "==", 5, place]))
    with pytest.raises(PlanError, match="uses value 6, which nothing makes"):
        apply_plan(guarded[0], plan)


def test_guards_survive_json(guarded: tuple[nn.Module, Plan]) -> None:
    model, plan = guarded
    guards: tuple[Guard, ...] = plan.programs["part"].routines[0].guards
    assert guards == ((("size", ("value", 0), 1), "==", ("int", 2), 0),)  # the size of the other came as an argument
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    with pytest.raises(RewrittenModuleError):
        apply_plan(model, again)(sequence(4), torch.ones(6))
