"""Code that calls dropout only in training, as torch's attention does where it returns its weights, is rewritten."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import idap
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.nets import randomised, sequence
from tests.structure.code.test_guards import padding


class Attentive(nn.Module):
    """torch's attention with its defaults: it makes its weights whether anyone reads them or not."""

    def __init__(self, *, dropout: float = 0.1, weights: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.weights = nn.Linear(4, 8), nn.Linear(8, 3), weights
        self.attn = nn.MultiheadAttention(8, 4, batch_first=True, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        found, weights = self.attn(x, x, x, key_padding_mask=mask)
        return self.head(x + found) + (weights.sum(1).mean(-1)[:, None, None] if self.weights else 0)


def model_and_structure(*given: Tensor, **settings: Any) -> tuple[nn.Module, Structure]:
    model = randomised(Attentive(**settings).eval())
    return model, analyze(trace(model, given or (sequence(4),)))


def without_heads(model: nn.Module, gone: list[int]) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for head in gone:
            made.attn.out_proj.weight[:, 2 * head : 2 * head + 2] = 0
    return made


def narrower(model: nn.Module) -> nn.Module:
    """The original with zeros for the first of the two features of every head."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for part in (made.attn.in_proj_weight, made.attn.in_proj_bias):
            part.view(12, 2, -1)[:, 0] = 0
        made.attn.out_proj.weight.view(8, 4, 2)[..., 0] = 0
    return made


def test_it_is_cut_and_equals_the_masked_original() -> None:
    model, structure = model_and_structure()
    assert {group.name: group.size for group in structure.groups} == {"embed": 8, "attn:heads": 4, "attn:head-width": 2}
    plan = structure.plan({"attn:heads": [0, 3]})
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5
    for x in (sequence(4), sequence(4, 9, 3)):
        assert torch.equal(small(x), small(x))
        torch.testing.assert_close(small(x), without_heads(model, [1, 2])(x), rtol=1e-4, atol=1e-5)


def test_dropout_is_active_in_training_and_right_on_average() -> None:
    model, structure = model_and_structure()
    small = apply_plan(model, structure.plan({"attn:heads": [0, 3]}))
    expected = small(sequence(4))
    torch.manual_seed(0)
    small.train()
    found = torch.stack([small(sequence(4)) for _ in range(1500)])
    assert not torch.equal(found[0], found[1])
    error = found.std(0) / len(found) ** 0.5
    assert bool((error > 0).any()) and bool(((found.mean(0) - expected).abs() <= 6 * error + 1e-5).all())
    small.eval()
    assert torch.equal(small(sequence(4)), expected)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mask", [None, padding(2, 5)])
def test_the_same_is_dropped_as_in_the_original(weights: bool, mask: Tensor | None) -> None:
    """With one seed the same weights go, where the cut leaves as many; those that are returned are dropped, too."""
    given = (sequence(4),) if mask is None else (sequence(4), mask)
    model, structure = model_and_structure(*given, dropout=0.4, weights=weights)
    small, masked = apply_plan(model, structure.plan({"attn:head-width": [1]})).train(), narrower(model).train()
    for seed in range(3):
        torch.manual_seed(seed)
        found = small(*given)
        torch.manual_seed(seed)
        torch.testing.assert_close(found, masked(*given), rtol=1e-4, atol=1e-5)


def test_copies_and_files_drop_as_well(tmp_path: Path) -> None:
    model, structure = model_and_structure(dropout=0.5)
    plan = structure.plan({"attn:heads": [1, 2]})
    small = apply_plan(model, Plan.from_json(plan.to_json()))
    idap.save(tmp_path / "small", small, plan)
    for again in (copy.deepcopy(small), idap.load(tmp_path / "small", Attentive(dropout=0.5))):
        assert torch.equal(again.eval()(sequence(4)), small.eval()(sequence(4)))
        outputs = []
        for net in (again, small):
            torch.manual_seed(0)
            outputs.append(net.train()(sequence(4)))
        assert torch.equal(*outputs) and not torch.equal(outputs[0], again(sequence(4)))


class Part(nn.Module):
    """Sees 12 features as 3 rows of 4, by numbers in its code, and drops only in training."""

    def __init__(self, drops: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drops, self.inner = drops, nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        plain = x.view(x.shape[0], x.shape[1], 3, 4).flatten(2)
        if self.training:
            x = self.drops(x)
        read = x.reshape(-1, x.shape[1], 12)  # a size of what was dropped
        return torch.cat([plain + self.inner(read), read[:, 0:1]], 1)


class Around(nn.Module):
    def __init__(self, drops: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.part, self.read = nn.Linear(4, 12), Part(drops), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.part(self.write(x)))


DROPS: dict[str, Callable[[Tensor], Tensor]] = {
    "default share": F.dropout,
    "by position": lambda x: F.dropout(x, 0.3, True),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "torch.dropout by name": lambda x: torch.dropout(x, p=0.3, train=True),
    "twice": lambda x: F.dropout(F.dropout(x, 0.3), 0.2),
    "method of the class": lambda x: nn.functional.dropout(input=x, p=0.7),
    "layer": nn.Dropout(0.3),
    "layers": nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.2)),
    "layer that gives what it is given": nn.Dropout(0),
}


class Doubled(TorchFunctionMode):
    """Dropout without chance: what it is given times one plus its share."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.dropout, torch.dropout):
            return func(*args, **(kwargs or {}))
        names = ("input", "p", "training") if func is F.dropout else ("input", "p", "train")
        given = {"p": 0.5, "training": True} | dict(zip(names, args, strict=False)) | (kwargs or {})
        active = given.get("train", given["training"])
        self.count += active
        return given["input"] * (1 + given["p"]) if active else given["input"]


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The original with zeros where the plan cuts."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            for dim, kept in plan.tensors.get(name, {}).items():
                gone = [place for place in range(tensor.shape[dim]) if place not in kept]
                tensor.index_fill_(dim, torch.tensor(gone), 0)
    return made


@pytest.mark.parametrize("name", DROPS)
def test_only_what_reads_it_is_dropped(name: str) -> None:
    torch.manual_seed(0)
    model, x = randomised(Around(DROPS[name]).eval()), sequence(4)
    structure = analyze(trace(model, (x,)))
    plan = structure.plan({group.name: range(group.size - 1) for group in structure.groups})
    small, masked = apply_plan(model, plan), mask(model, plan)
    assert "part" in plan.programs
    assert verify(structure, model, small, plan, ((x,), {})).error <= 1e-5
    for given in (x, sequence(4, 7, 3)):
        with Doubled() as calls:
            found = small.train()(given)
        assert calls.count == (2 if name in ("twice", "layers") else 1)
        with Doubled():
            torch.testing.assert_close(found, masked.train()(given), rtol=1e-4, atol=1e-5)
        assert torch.equal(small(given), small(given)) == (name == "layer that gives what it is given")
        assert torch.equal(small.eval()(given), small(given))
