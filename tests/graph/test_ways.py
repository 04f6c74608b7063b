"""What tracing tries beside the export: it leaves nothing behind, and what it can't tell is not rewritten."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idap.errors import PlanError, RewrittenModuleError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.code.repair import renumber
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, apply_plan_
from idap.surgery.verify import verify
from tests.nets import sequence


class Written(nn.Module):
    """Its own code writes the width as a number, so that a cut needs new code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def between(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x).view(x.shape[0], x.shape[1], 16)))


class InNoGrad(Written):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = x.sigmoid()
        return x * gate


class OnlyInTraining(Written):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) if self.training else x


class NoiseInTraining(Written):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.training else x


class DropsInPlace(Written):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, inplace=True) if self.training else x


class OtherDropout(Written):
    def between(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, 0.5, training=True) if self.training else x


class DropsAndMore(Written):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5).relu() if self.training else x.sigmoid()


class Dropping(Written):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class MixedTypes(Written):
    def between(self, x: Tensor) -> Tensor:
        kept = x.dtype
        return x.to(torch.float32).square().to(kept)


class ByLength(Written):
    def between(self, x: Tensor) -> Tensor:
        return x[:, :6] if x.shape[1] > 6 else x


class Outer(nn.Module):
    """Holds one of these, so that the model itself is not what is rewritten."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def structure_of(inner: nn.Module) -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = Outer(inner).eval()
    return model, analyze(trace(model, (sequence(4),)))


def cut(model: nn.Module, structure: Structure) -> nn.Module:
    plan = structure.plan({"inner.up": range(9)})
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5
    return small


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (InNoGrad, "unknown to torch"),
        (NoiseInTraining, "something else in training"),
        (DropsInPlace, "something else in training"),
        (OtherDropout, "something else in training"),
        (DropsAndMore, "something else in training"),
        (MixedTypes, "data type of unknown origin"),
    ],
)
def test_code_that_new_code_would_not_follow_stays(inner: type[nn.Module], reason: str) -> None:
    _, structure = structure_of(inner())
    assert "inner.up" not in [group.name for group in structure.groups]
    assert reason in structure.rewriter.refused["inner"]


@pytest.mark.parametrize("inner", [Written, Dropping, OnlyInTraining])
def test_code_that_it_can_follow_is_rewritten(inner: type[nn.Module]) -> None:
    model, structure = structure_of(inner())
    small = cut(model, structure)
    x = torch.randn(3, 7, 4)
    small.train()
    assert torch.equal(small(x), small(x)) == (inner is Written)


def test_a_size_by_which_the_code_takes_its_way_is_guarded() -> None:
    model, structure = structure_of(ByLength())
    small = cut(model, structure)
    for length in (1, 5, 6):  # all that take the way that was traced
        assert small(torch.randn(9, length, 4)).shape == (9, length, 3)
    with pytest.raises(RewrittenModuleError, match="for a size <= 6, found 20"):
        small(torch.randn(2, 20, 4))


def test_code_replaced_on_the_object_and_hooks_are_respected() -> None:
    inner = Written()
    inner.forward = inner.forward
    assert "replaced on the object" in structure_of(inner)[1].rewriter.refused["inner"]
    hooked = Written()
    hooked.up.register_forward_hook(lambda _module, _args, output: output * 2)
    assert "has hooks" in structure_of(hooked)[1].rewriter.refused["inner"]


class Meddling(nn.Module):
    """Changes a parameter in training, its input always, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 3)
        self.seen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        if self.training:
            self.seen.data.add_(1)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_nothing_of_the_users_is_touched() -> None:
    model, x = Meddling().eval(), torch.randn(2, 3, 8)
    before, given, state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    trace(model, (x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, given) and torch.equal(torch.get_rng_state(), state)


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 3)
        self.tables = {"shift": torch.ones(3)}

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x) + self.tables["shift"]


def test_tensors_that_a_module_was_built_with_stay() -> None:
    model, x = Tables(), sequence(4)
    plan = Plan(shapes={name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    assert torch.equal(apply_plan(model, plan)(x), model(x))
    assert apply_plan_(model, plan).tables


def test_layers_are_numbered_anew_only_below_one_that_went() -> None:
    from idap.graph.ir import ModuleInfo

    sparse = {f"layers.{i}.mixer": ModuleInfo("Mixer", "", {"layer_idx": i}, {}) for i in (1, 3, 4)}
    nested = {f"0.layers.{i}.attn": ModuleInfo("Attn", "", {"layer_idx": i}, {}) for i in range(3)}
    assert renumber({**sparse, **nested}, lambda _: False) == {}
    assert renumber({**sparse, **nested}, lambda path: path == "layers.3.mixer") == {"layers.4.mixer": {"layer_idx": 3}}


def test_a_plan_with_a_wrong_attribute_cuts_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    slices = {"0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "2.weight": {1: (1,)}}
    for values in ({"forward": 3}, {"__class__": 4}, {"out_features": (1, 2)}):
        with pytest.raises(PlanError):
            apply_plan_(model, Plan(tensors=slices, shapes=shapes, attributes={"0": values}))
        assert model[0].weight.shape == (8, 4)


def test_no_part_of_a_plan_becomes_source_unchecked(tmp_path) -> None:
    model, target = Outer(Written()), tmp_path / "touched"
    shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    empty = {"keep": {}, "removed": [], "tensors": {}, "attributes": {}, "replaced": {}, "called": {}}
    for number in (f"0=open({str(target)!r}, 'w')", True, -1, 1.5):
        routine = {"args": [["value", number]], "kwargs": [], "steps": [], "output": None, "guards": []}
        with pytest.raises(PlanError, match="means nothing"):
            apply_plan(model, Plan.from_json({**empty, "shapes": shapes, "programs": {"inner": [routine]}}))
    assert not target.exists()
