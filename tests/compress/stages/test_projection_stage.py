"""Stage 2 with projections: blocks whose shapes differ go too, and the run keeps all its promises."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from idap.compress import run as running
from idap.compress.change import make_cut, neighbours, next_state
from idap.compress.config import Config, FilterStage, LayerStage
from idap.compress.context import RunContext
from idap.compress.journal import Journal
from idap.compress.prepare import profile
from idap.compress.run import compress
from idap.compress.stages.cut import loss_without
from idap.compress.stages.filters import filter_stage
from idap.compress.stages.layers import layer_stage
from idap.compress.state import State
from idap.cost.count import CostModel, tensor_bytes
from idap.errors import ConfigError, PlanError
from idap.graph.trace import trace
from idap.models.nets import DigitsResNet
from idap.progress import Silent
from idap.saving.checkpoint import load
from idap.saving.stream import apply_to_checkpoint
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from idap.surgery.stand_ins import Projection
from idap.training.recovery import Recovery
from idap.training.task import Task, classification
from tests.compress.test_resume import Interrupted, StopsAt
from tests.compress.tiny import Noting

CLASSES = 3


def pictures(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """8x8 pictures of one pattern per class, with noise."""
    dice = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, CLASSES, (count,), generator=dice)
    noise = torch.randn(count, 1, 8, 8, generator=dice)
    return list(zip((patterns[labels] + noise).split(32), labels.split(32), strict=True))


def task() -> Task:
    return classification(train=pictures(192, 1), val=pictures(96, 2), num_classes=CLASSES)


def train_net() -> nn.Module:
    torch.manual_seed(0)
    net = DigitsResNet(6, (1, 2, 1), num_classes=CLASSES)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(6):
        for samples, labels in pictures(192, 1):
            optimizer.zero_grad()
            F.cross_entropy(net(samples), labels).backward()
            optimizer.step()
    return net.eval()


NET = train_net()


def config(**changes: object) -> Config:
    settings = {
        "max_drop": 0.1,
        "macs": 0.4,
        "filters": FilterStage(steps=4, first_share=0.15),
        "layers": LayerStage(removals=2, replacement="auto", against="nothing"),
        "filters_share": 0.2,
        "recovery": Recovery(epochs=1, lr=0.01),
        "calibration_batches": 3,
    }
    return Config(**(settings | changes))


def prepare(**changes: object) -> tuple[RunContext, State, list[str]]:
    return running.prepare_run(NET, task(), config(**changes), None, Silent())[:3]


def outcome(result):
    return result.plan, result.metric, [(s.stage, s.metric, s.accepted, s.removed) for s in result.steps]


ONLY_LAYERS = {"filters": FilterStage(steps=0), "macs": None, "layers": LayerStage(removals=3, replacement="auto")}


def test_auto_offers_blocks_whose_shapes_differ_and_identity_does_not():
    _, _, removable = prepare()
    assert {"stages.1.0", "stages.2"} <= set(removable)
    _, _, plain = prepare(layers=LayerStage())
    assert set(removable) - set(plain) >= {"stages.1.0", "stages.2"}
    context, _, _ = prepare(layers=LayerStage(replacement="projection"))
    kinds = {block.name: block.kind for block in context.subject.structure.blocks}
    assert kinds["stages.1.1"] == kinds["stages.1.0"] == "projection"


def test_an_unknown_replacement_is_refused():
    with pytest.raises(ConfigError, match="replacement must be 'identity' or 'projection' or 'auto', found 'mean'"):
        LayerStage(replacement="mean")


def test_trying_a_projection_by_hooks_is_what_replacing_it_does():
    context, state, _ = prepare(**ONLY_LAYERS, rebalance=None)
    fits = context.projections(state, ["stages.1.0", "stages.2"])
    for name, found in fits.items():
        loss = loss_without(context, state, context.subject.structure.block(name), found.map)
        model, _, _ = make_cut(context, state, state.keep, [name])
        setting_loss = loss_by_running(context, model)
        assert loss == pytest.approx(setting_loss, rel=1e-5)
        assert 0 < found.residual < 1


def loss_by_running(context: RunContext, model: nn.Module) -> float:
    total = count = 0
    with torch.no_grad():
        for samples, labels in context.subject.calibration:
            total += float(F.cross_entropy(model(samples), labels)) * len(labels)
            count += len(labels)
    return total / count


def test_what_a_projection_costs_is_counted():
    context, state, _ = prepare(**ONLY_LAYERS)
    keep = {group.name: tuple(range(0, group.size, 2)) for group in context.subject.structure.groups}
    for units in (state.keep, keep):
        model = apply_plan(context.subject.original, context.subject.structure.plan(units, ["stages.1.0"]))
        traced = CostModel(analyze(trace(model, *context.subject.example)), 2, tensor_bytes(model)).cost()
        assert context.subject.costs.cost(units, ["stages.1.0"]) == traced
        saved = context.subject.costs.cost(units).macs - traced.macs
        assert context.subject.costs.block_macs("stages.1.0", units) == saved > 0
    name = context.subject.structure.group("stages.1.0.conv2").name
    for count in (context.subject.costs.unit_macs, context.subject.costs.unit_parameters):
        whole, fewer = state.keep, {**state.keep, name: state.keep[name][:-1]}
        kind = "macs" if count == context.subject.costs.unit_macs else "parameters"
        before, after = (getattr(context.subject.costs.cost(units, ["stages.1.0"]), kind) for units in (whole, fewer))
        assert count(whole, ["stages.1.0"])[name] == before - after


def test_blocks_become_projections_which_later_cuts_go_through():
    context, start, _ = prepare(max_drop=None)
    journal = Journal(context, start.cost)
    projected = layer_stage(context, start, context.goals.budget, journal, ["stages.1.0"])
    assert projected.removed == ("stages.1.0",) and journal.steps[0].removed[0].kind == "projection"
    assert isinstance(projected.model.stages[1][0], Projection)
    layer = projected.model.stages[1][0].get_submodule("map")
    assert layer.weight.shape == (12, 6, 1, 1)
    scores = context.divergence(projected, blocks=False)
    assert "stages.1.0.conv2" in scores.units
    cut = filter_stage(context, projected, context.goals.budget, journal)
    layer = cut.model.stages[1][0].get_submodule("map")
    assert (layer.out_channels, layer.in_channels) == tuple(layer.weight.shape[:2])
    kept = cut.plan.projections["stages.1.0"]
    assert (len(kept.outputs), len(kept.inputs)) == tuple(layer.weight.shape[:2])
    assert layer.weight.numel() < 72
    assert cut.cost.parameters == sum(parameter.numel() for parameter in cut.model.parameters())


@pytest.mark.parametrize("criterion", ["innovation", "paper", "magnitude", "taylor"])
def test_every_kind_of_criterion_sees_the_units_that_only_projections_read(criterion):
    context, start, _ = prepare(criterion=criterion, max_drop=None)
    state = next_state(context, start, start.keep, ["stages.1.0"], "")
    scores = context.divergence(state).units
    assert {"stages.1.0.conv2", "stem.0"} <= set(scores)
    assert all(bool((values[~values.isnan()] > 0).any()) for values in scores.values())


@pytest.fixture(scope="module")
def whole_run():
    result = compress(NET, task(), config())
    assert any(removal.kind == "projection" for step in result.steps if step.accepted for removal in step.removed)
    return result


def test_a_run_with_projections_keeps_its_promises(whole_run, tmp_path):
    whole_run.save(tmp_path)
    fresh = DigitsResNet(6, (1, 2, 1), num_classes=CLASSES).eval()
    loaded = load(tmp_path, fresh)
    assert_close(loaded.state_dict(), whole_run.model.state_dict(), rtol=0, atol=0)
    samples, _ = pictures(32, 3)[0]
    with torch.no_grad():
        assert torch.equal(loaded(samples), whole_run.model(samples))
    assert whole_run.plan.projections
    assert sum(parameter.numel() for parameter in whole_run.model.parameters()) == whole_run.parameters[1]
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("moment", [4, 9, 14, 19])
def test_a_stopped_run_with_projections_goes_on_to_the_same_result(whole_run, tmp_path, moment):
    with pytest.raises(Interrupted):
        compress(NET, task(), config(), run_dir=tmp_path / "run", progress=StopsAt(moment))
    heard = Noting()
    resumed = compress(NET, task(), config(), run_dir=tmp_path / "run", resume=True, progress=heard)
    assert outcome(resumed) == outcome(whole_run)
    assert_close(resumed.model.state_dict(), whole_run.model.state_dict(), rtol=0, atol=0)
    assert_close(load(tmp_path / "run" / "model", NET).state_dict(), resumed.model.state_dict(), rtol=0, atol=0)


def test_the_original_on_disk_has_no_weights_of_projections(whole_run, tmp_path):
    save_file(NET.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="by a projection, whose weights were fitted to data and are in no checkpoint"):
        apply_to_checkpoint(whole_run.plan, tmp_path, tmp_path / "out")


def test_the_result_can_be_exported(whole_run):
    samples, _ = pictures(32, 3)[0]
    exported = torch.export.export(whole_run.model, (samples,)).module()
    with torch.no_grad():
        assert_close(exported(samples), whole_run.model(samples))


def test_a_profile_knows_what_projections_would_leave_over():
    structure, found = profile(NET, task(), config())
    assert {block.name for block in structure.blocks} == set(found.blocks)
    assert 0 < found.blocks["stages.1.0"] < 1


def test_in_one_ranking_projections_go_beside_units():
    settings = {"order": "interleaved", "criterion": "relative", "max_drop": None, "cost_power": 1.0}
    result = compress(NET, task(), config(**settings, layers=LayerStage(removals=3, replacement="auto")))
    gone = {removal.name for step in result.steps if step.accepted for removal in step.removed if not removal.units}
    assert set(result.plan.projections) == gone & {"stages.1.0", "stages.2"} != set()
    assert result.reached
    with pytest.raises(ConfigError, match="compares units with projections"):
        config(**settings | {"criterion": "paper"})


def test_recovery_trains_the_projection_and_its_neighbours():
    context, start, _ = prepare(**ONLY_LAYERS)
    fitted, _, _ = make_cut(context, start, start.keep, ["stages.2"])
    tuned = neighbours(context.subject.structure, context.subject.structure.block("stages.2"), ["stages.2"])
    assert tuned == {"stages.1.1.conv2.weight", "stages.1.1.bn2.weight", "stages.1.1.bn2.bias"} | {
        *("stages.2.map.weight", "stages.2.map.bias", "head.weight", "head.bias")
    }
    state = next_state(context, start, start.keep, ["stages.2"], "", tuned=tuned)
    before = dict(fitted.named_parameters())
    changed = {name for name, tensor in state.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == tuned
