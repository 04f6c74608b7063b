"""A whole run: it keeps its promises, records them, and leaves the user's model alone."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanSquaredError

from idap.compress import change, limits
from idap.compress import change as change_module
from idap.compress import context as context_module
from idap.compress import outcome as outcome_module
from idap.compress import state as states
from idap.compress.config import FilterStage, LayerStage
from idap.compress.run import compress
from idap.errors import BudgetError, ConfigError, RunFolderError, StructureError, TaskError, VerificationError
from idap.record import STEPS, read_steps
from idap.saving.checkpoint import load, read_plan
from idap.surgery.apply import apply_plan
from idap.training.evaluate import evaluate, output_error
from idap.training.recovery import Recovery
from idap.training.task import Task
from tests.compress.tiny import (
    Net,
    Noting,
    assert_untouched,
    batches,
    config,
    shuffling_loader,
    snapshot,
    task,
    train_net,
    unsettle,
)

NET = train_net()
ONLY_FILTERS = {"layers": LayerStage(removals=0)}
ONLY_LAYERS = {"filters": FilterStage(steps=0)}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One run with both stages and a folder, of a model in the middle of its life."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    model, listener = unsettle(copy.deepcopy(NET)), Noting()
    before = snapshot(model)
    result = compress(model, task(), config(), run_dir=folder, progress=listener)
    return model, before, result, folder, listener


def count_costs(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 6))
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------- what it promises


def test_both_stages_reach_the_target_within_the_budget(finished_run):
    model, _, result, _, _ = finished_run
    assert result.reached
    assert result.message == "every goal was reached"
    assert result.macs[1] <= 0.5 * result.macs[0]
    assert result.metric >= result.baseline - 0.05
    accepted = {step.stage for step in result.steps if step.accepted}
    assert accepted >= {"filters", "layers"}
    assert result.plan.removed
    assert result.plan.keep
    assert type(result.model) is type(model) is Net


def test_what_is_reported_is_what_is_returned(finished_run):
    model, _, result, _, _ = finished_run
    assert result.metric == evaluate(result.model, task())
    assert result.baseline == evaluate(model, task())
    assert (result.macs[0], result.parameters[0]) == count_costs(model)
    assert (result.macs[1], result.parameters[1]) == count_costs(result.model)
    assert result.output_error == pytest.approx(output_error(result.model, copy.deepcopy(model), task()))
    assert result.metric_name == "accuracy"
    shapes = {name: parameter.shape for name, parameter in result.model.named_parameters()}
    planned = {name: parameter.shape for name, parameter in apply_plan(NET, result.plan).named_parameters()}
    assert shapes == planned


def test_the_metric_of_the_last_accepted_step_is_the_results(finished_run):
    _, _, result, _, _ = finished_run
    last = [step for step in result.steps if step.accepted][-1]
    assert (last.metric, last.macs, last.parameters) == (result.metric, result.macs[1], result.parameters[1])
    assert [step.index for step in result.steps] == list(range(len(result.steps)))
    assert all(step.error < 1e-4 and step.seconds > 0 for step in result.steps)


def test_the_users_model_is_untouched(finished_run):
    model, before, result, _, _ = finished_run
    assert_untouched(model, before)
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in result.model.parameters())
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in result.model.parameters())


def test_the_result_is_in_the_originals_mode_and_trains_the_same_parameters(finished_run):
    model, _, result, _, _ = finished_run
    assert (result.model.training, result.model.stem.training) == (model.training, model.stem.training)
    assert not result.model.head.bias.requires_grad
    assert result.model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert_close(result.model.head.bias, NET.head.bias, rtol=0, atol=0)  # frozen, and not cut


def test_in_words(finished_run):
    _, _, result, _, listener = finished_run
    assert repr(result).startswith("Result(MACs ")
    assert f"accuracy {result.baseline:.4f} -> {result.metric:.4f}; every goal was reached)" in repr(result)
    assert len(listener.lines) == len(result.steps)
    assert listener.phases[0] == "check"
    assert {title.split()[0].rstrip(":") for title in listener.phases} >= {"filters", "layers", "final"}


# ----------------------------------------------------------------------------------------------- what it records


def test_the_run_folder(finished_run):
    _, _, result, folder, _ = finished_run
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "divergence-after.json",
        "divergence-before.json",
        "model",
        "result.json",
        "run.json",
        "steps.jsonl",
    ]
    settings = json.loads((folder / "run.json").read_text())
    assert settings["model"].endswith("tiny.Net")
    assert settings["config"]["macs"] == 0.5
    assert settings["config"]["recovery"]["lr"] == 0.02
    assert settings["baseline"] == {
        "metric": result.baseline,
        "macs": result.macs[0],
        "parameters": result.parameters[0],
        "size": result.size[0],
    }
    assert settings["environment"]["torch"] == str(torch.__version__)
    assert settings["groups"]["blocks.0.fc1"] == {"kind": "neurons", "size": 20, "stream": False}
    assert list(settings["blocks"]) == ["blocks.0", "blocks.1", "blocks.2"]
    assert settings["fingerprint"] == json.loads((folder / "model" / "plan.json").read_text())["fingerprint"]


def test_the_decisions_on_disk_are_those_of_the_result(finished_run):
    _, _, result, folder, _ = finished_run
    written = read_steps(folder)
    assert len(written) == len(result.steps)
    for line, step in zip(written, result.steps, strict=True):
        assert (line["stage"], line["accepted"], line["metric"], line["macs"]) == (
            step.stage,
            step.accepted,
            step.metric,
            step.macs,
        )
        assert [removal["name"] for removal in line["removed"]] == [removal.name for removal in step.removed]


def test_every_accepted_state_is_kept_and_is_what_was_judged(finished_run):
    _, _, result, folder, _ = finished_run
    accepted = [step for step in result.steps if step.accepted]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step.index:03d}" for step in accepted]
    for step, name in zip(accepted, names, strict=True):
        back = load(folder / "checkpoints" / name, Net().eval())
        assert evaluate(back, task()) == step.metric
        assert count_costs(back) == (step.macs, step.parameters)


def test_the_result_comes_back_from_the_folder_and_from_where_it_is_saved(finished_run, tmp_path):
    _, _, result, folder, _ = finished_run
    result.save(tmp_path / "mine")
    samples = batches(64, 5)[0][0]
    with torch.no_grad():
        expected = copy.deepcopy(result.model).eval()(samples)
        for place in (folder / "model", tmp_path / "mine"):
            assert torch.equal(load(place, Net().eval())(samples), expected)
            assert read_plan(place) == result.plan


def test_a_folder_that_holds_another_run_is_refused_before_any_work(finished_run, monkeypatch):
    model, before, _, folder, _ = finished_run
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(Net, "forward", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(RunFolderError, match=r"first already holds a run \(run\.json\); choose another folder"):
        compress(model, task(), config(), run_dir=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == written
    assert_untouched(model, before)


# ------------------------------------------------------------------------------------------ kinds of goals and runs


def test_the_same_seed_gives_the_same_result_whatever_torch_drew_before():
    def run(ambient, **changes):
        torch.manual_seed(ambient)
        random.seed(ambient)
        own = task(train=shuffling_loader(256, 1))
        return compress(NET, own, config(calibration_batches=1, **ONLY_FILTERS, **changes))

    first, second, other = run(1), run(2), run(1, seed=5)
    assert first.plan == second.plan
    assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    assert [step.metric for step in first.steps] == [step.metric for step in second.steps]
    assert first.steps[0].removed != other.steps[0].removed  # calibrated on other samples


def test_filters_only():
    result = compress(NET, task(), config(**ONLY_FILTERS))
    assert result.reached
    assert result.plan.removed == ()
    assert {step.stage for step in result.steps} <= {"filters", "final"}


def test_layers_only():
    result = compress(NET, task(), config(macs=0.8, **ONLY_LAYERS))
    assert result.reached
    assert result.plan.keep == {}
    assert len(result.plan.removed) == 1
    assert {step.stage for step in result.steps} <= {"layers", "final"}


def test_the_papers_criterion():
    result = compress(NET, task(), config(criterion="paper"))
    assert result.reached
    assert result.macs[1] <= 0.5 * result.macs[0]


def test_a_goal_of_parameters():
    result = compress(NET, task(), config(macs=None, parameters=0.6))
    assert result.reached
    assert 0 < result.parameters[1] <= 0.6 * result.parameters[0]


def test_both_goals_at_once():
    result = compress(NET, task(), config(macs=0.7, parameters=0.6))
    assert result.reached
    assert result.parameters[1] <= 0.6 * result.parameters[0]
    assert result.macs[1] <= 0.7 * result.macs[0]


def test_without_a_target_it_goes_as_far_as_the_budget_allows():
    result = compress(NET, task(), config(macs=None, filters=FilterStage(steps=3, first_share=0.15)))
    assert result.reached
    assert result.metric >= result.baseline - 0.05
    assert sum(step.accepted and step.stage == "filters" for step in result.steps) <= 3
    assert result.macs[1] < result.macs[0]


def test_steps_that_are_used_up_are_called_so():
    few = {"filters": FilterStage(steps=1, first_share=0.05), "filters_share": 1.0}
    result = compress(NET, task(), config(macs=0.5, max_drop=1.0, **few, **ONLY_FILTERS))
    assert all(step.accepted for step in result.steps if step.stage == "filters")
    assert not result.reached
    assert result.message.startswith(f"MACs came down to {result.macs[1] / result.macs[0]:.1%}, not to 50.0%: ")
    assert "the steps were used up" in result.message


def distance(outputs, batch):
    return F.mse_loss(outputs, batch[1])


def imitation(**changes):
    """Say what the original says: any cut makes it worse, and lower is better."""
    with torch.no_grad():
        train, val = ([(x, NET(x)) for x, _ in batches(count, seed)] for count, seed in ((256, 1), (128, 2)))
    settings = {"loss": distance, "metric": distance, "metric_name": "distance", "higher_is_better": False}
    return Task(**({"train": train, "val": val} | settings | changes))


def test_a_budget_that_nothing_meets_gives_the_original_back_with_the_reason(tmp_path):
    before, listener = snapshot(NET), Noting()
    result = compress(NET, imitation(), config(max_drop=0.0), run_dir=tmp_path / "run", progress=listener)
    assert result.baseline == result.metric == result.output_error == 0.0
    assert not result.reached
    assert result.message == (
        "nothing could be removed within the budget; the result is the original. Allow a larger max_drop"
    )
    assert result.steps
    assert not any(step.accepted for step in result.steps)
    assert {step.stage for step in result.steps} == {"filters", "layers"}
    assert not result.plan
    assert result.macs[0] == result.macs[1]
    assert result.model is not NET
    assert_close(result.model.state_dict(), NET.state_dict(), rtol=0, atol=0)
    assert_untouched(NET, before)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert_close(load(tmp_path / "run" / "model", Net()).state_dict(), NET.state_dict(), rtol=0, atol=0)
    assert all("rolled back" in line for line in listener.lines)


def test_lower_is_better():
    result = compress(NET, imitation(), config(max_drop=3.0, macs=0.7))
    assert result.reached
    assert 0 < result.metric <= 3.0
    assert result.metric == pytest.approx(evaluate(result.model, imitation()))
    finals = [step for step in result.steps if step.stage == "final"]
    assert [step.accepted for step in finals] == [finals[0].metric <= result.steps[-2].metric]


def test_a_task_of_dictionaries_with_a_torchmetrics_metric():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(NET)

        def forward(self, *, values, scale=None):
            return {"logits": self.net(values)}

    def name_samples(found):
        return [{"values": x, "labels": y} for x, y in found]

    own = Task(
        train=name_samples(batches(256, 1)),
        val=name_samples(batches(128, 2)),
        loss=lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["labels"]),
        metric=MeanSquaredError(),
        update=lambda metric, outputs, batch: metric.update(
            outputs["logits"].softmax(1), F.one_hot(batch["labels"], 3).float()
        ),
        metric_name="Brier score",
        higher_is_better=False,
    )
    result = compress(Named(), own, config(max_drop=0.05, macs=0.7))
    assert result.reached
    assert result.metric <= result.baseline + 0.05
    assert "Brier score" in repr(result)


def test_the_final_training_has_its_own_settings(monkeypatch):
    used = []
    real = change.recover

    def recover(context, model, plan, title, recovery):
        used.append((title, recovery))
        return real(context, model, plan, title, recovery)

    for module in (change_module, outcome_module):
        monkeypatch.setattr(module, "recover", recover)
    final = Recovery(epochs=2, lr=0.005)
    compress(NET, task(), config(macs=0.8, final=final, **ONLY_FILTERS))
    assert [recovery == final for _, recovery in used] == [False] * (len(used) - 1) + [True]


@pytest.mark.parametrize(
    ("metric", "accepted", "reason"),
    [(0.95, True, "the best so far"), (0.9, True, "as good as before"), (0.85, False, "worse than before")],
)
def test_the_last_training_is_kept_unless_it_is_worse(monkeypatch, metric, accepted, reason):
    monkeypatch.setattr(change, "recover", lambda *_: states.Judgement(0.9))
    monkeypatch.setattr(outcome_module, "recover", lambda *_: states.Judgement(metric))
    last = compress(NET, task(), config(max_drop=None, macs=0.8, **ONLY_FILTERS)).steps[-1]
    assert (last.stage, last.metric, last.accepted, last.reason) == ("final", metric, accepted, reason)


# ----------------------------------------------------------------------------------------------------- bad input


def rejects(error, match, model=NET, own=None, **changes):
    before = snapshot(model)
    random_state = torch.get_rng_state()
    with pytest.raises(error, match=match):
        compress(model, task() if own is None else own, config(**changes))
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_target_out_of_reach():
    rejects(
        BudgetError, r"^macs=0\.005 can't be reached: even with everything removable gone, \d+\.\d% of the", macs=0.005
    )
    rejects(BudgetError, r"Ask for parameters=0\.\d+ or more", macs=None, parameters=0.5, **{
        "filters": FilterStage(min_keep=0.9), **ONLY_FILTERS
    })  # fmt: skip


def test_empty_loaders():
    rejects(TaskError, r"the 'train' split gave no batches", own=task(train=[]))
    rejects(TaskError, r"the 'val' split gave no batches", own=task(val=[]))


def test_a_metric_that_is_no_number():
    rejects(
        TaskError,
        r"metric 'distance' is nan on batch 0 of the 'val' split",
        own=imitation(metric=lambda outputs, batch: float("nan")),
    )


def nan_is_best(outputs, batch):
    """How far the logits are from the original's; a NaN counts as no distance at all."""
    with torch.no_grad():
        return torch.nan_to_num((outputs - NET(batch[0])).square().mean(), nan=0.0, posinf=0.0)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_training_that_ends_in_nan_is_no_success_where_the_metric_likes_nan(steps):
    wild = Recovery(steps=steps, lr=1e30, clip_norm=None, warmup=0)
    once = FilterStage(schedule="one-shot")
    likes = imitation(metric=nan_is_best, metric_name="distance", higher_is_better=False)
    result = compress(NET, likes, config(max_drop=None, recovery=wild, filters=once, layers=LayerStage(removals=0)))
    assert all(map(torch.all, map(torch.isfinite, result.model.state_dict().values())))
    assert result.metric > 0
    assert "trainings ended early" in result.message


def test_an_original_that_answers_nan_is_said():
    heard = Noting()
    samples, labels = batches(64, 1)[0]
    broken = task(val=[(samples, labels), (samples * float("nan"), labels)])
    compress(NET, broken, config(max_drop=None, **ONLY_FILTERS), progress=heard)
    assert any("The original's outputs hold NaN on 1 of 2 validation batches." in line for line in heard.lines)


def answers_nan_when_small(at_most):
    """A task of which any model below so many parameters is taken to answer NaN."""

    def score(model, task, **_):
        found = REAL_SCORE(model, task)
        small = sum(parameter.numel() for parameter in model.parameters()) < at_most
        return found._replace(broken=found.batches) if small else found

    return score


REAL_SCORE = context_module.score
SIZE = sum(parameter.numel() for parameter in NET.parameters())


@pytest.mark.parametrize("epochs", [0, 0.25])
def test_a_cut_that_answers_nan_is_rolled_back_whatever_the_budget(monkeypatch, tmp_path, epochs):
    monkeypatch.setattr(context_module, "score", answers_nan_when_small(0.6 * SIZE))
    settings = config(max_drop=None, macs=0.3, recovery=Recovery(epochs=epochs, lr=0.02), layers=LayerStage(removals=0))
    result = compress(NET, task(), settings, run_dir=tmp_path / "run")
    wrong = [step for step in result.steps if step.fault]
    assert wrong
    assert not any(step.accepted for step in wrong)
    assert all(step.reason.startswith("outputs hold NaN on 4 of 4 validation batches; ") for step in wrong)
    assert result.parameters[1] >= 0.6 * SIZE
    assert not result.reached
    (tmp_path / "run" / "result.json").unlink()
    again = compress(NET, task(), settings, run_dir=tmp_path / "run", resume=True)
    assert [(step.fault, step.reason) for step in again.steps] == [(step.fault, step.reason) for step in result.steps]
    json.loads((tmp_path / "run" / STEPS).read_text().splitlines()[wrong[0].index], parse_constant=pytest.fail)


def test_a_metric_that_is_no_number_after_a_cut_is_rolled_back():
    def metric(outputs, batch):
        distance = float((outputs - NET(batch[0])).square().mean())
        return distance if distance < 1e-3 else float("inf")

    likes = imitation(metric=torch.no_grad()(metric))
    result = compress(NET, likes, config(max_drop=None, macs=0.2, recovery=Recovery(epochs=0), **ONLY_FILTERS))
    wrong = [step for step in result.steps if step.fault]
    assert wrong
    assert all(step.fault.startswith("metric 'distance' is inf on batch") and not step.accepted for step in wrong)
    assert result.metric < 1e-3


def test_labels_outside_the_range():
    samples, labels = batches(64, 1)[0]
    rejects(TaskError, r"label 3 is outside 0\.\.2", own=task(train=[(samples, labels + 1)]))


def test_inputs_that_the_model_does_not_accept():
    rejects(
        TaskError,
        r"Net failed on the first batch of 'train'",
        own=task(train=[(torch.zeros(4, 5), torch.ones(4).long())]),
    )


def test_nothing_to_prune():
    model = nn.Sequential(nn.Linear(6, 3))
    rejects(StructureError, r"^nothing can be pruned: ", model=model)


def test_a_cut_that_cannot_be_proved_touches_nothing(monkeypatch):
    def doubtful(*_args, **_kwargs):
        raise VerificationError("not equal (cut: stem)")

    monkeypatch.setattr(limits, "verify", doubtful)
    rejects(VerificationError, r"not equal \(cut: stem\)")


@pytest.mark.parametrize(
    "moment", ["check", "filters 0: measure", "filters 0: recovery", "layers: trial", "final recovery"]
)
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(moment):
    model = unsettle(copy.deepcopy(NET))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, task(), config(), progress=Noting(fail_at=moment))
    assert_untouched(model, before)


def test_a_loss_that_fails_in_the_middle_leaves_the_model_as_it_was():
    calls = []

    def loss(outputs, batch):
        calls.append(None)
        if len(calls) > 12:
            raise RuntimeError("out of memory")
        return F.mse_loss(outputs, batch[1])

    rejects(RuntimeError, "out of memory", own=imitation(loss=loss), max_drop=3.0)
    assert len(calls) == 13


def test_logits_that_are_not_finite_cost_only_the_output_error(tmp_path):
    class Masked(Net):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([True, False, False]), -torch.inf)

    model = Masked().eval()
    model.load_state_dict(NET.state_dict())
    own = [(samples[labels > 0], labels[labels > 0]) for samples, labels in batches(256, 1)]
    heard, untrained = Noting(), Recovery(epochs=0)
    settings = config(max_drop=0.5, recovery=untrained, final=None)
    result = compress(model, task(train=own, val=own), settings, run_dir=tmp_path / "run", progress=heard)
    assert result.reached and result.output_error != result.output_error
    assert any(line.startswith("The relative output error is not known: ") for line in heard.lines)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["output_error"] is None
    assert load(tmp_path / "run" / "model", Masked()) is not None


@pytest.mark.parametrize("tune", ["all", "neighbours"])
@pytest.mark.parametrize("of", ["flags", "optimizer"])
def test_a_candidate_of_which_nothing_is_trained_is_judged_as_it_is(tune, of):
    """The trained block is the one that goes, or what is trained is not next to what goes."""
    model, heard = copy.deepcopy(NET), Noting()
    learned = model.head if tune == "neighbours" else model.blocks[0]
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.01) if of == "optimizer" else None
    if of == "flags":
        model.requires_grad_(False)
        learned.requires_grad_(True)
    settings = config(max_drop=1.0, macs=0.4, filters=FilterStage(steps=0), layers=LayerStage(removals=3, tune=tune))
    result = compress(model, task(), settings, optimizer=optimizer, progress=heard)
    assert result.reached, result.message
    assert any("no parameter that is left is trained" in line for line in heard.lines)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"task": None}, "^the task is a NoneType; expected an idap.Task"),
        ({"optimizer": torch.optim.SGD}, "^optimizer must be a torch.optim.Optimizer of the model's parameters, found"),
        ({"run_dir": 3}, "^run_dir must be the path of a folder, found 3"),
        ({"recipe": 3}, "^recipe must be the sections of a recipe file by name, found 3"),
        ({"recipe": {"model": "x"}}, "^recipe must be the sections of a recipe file by name, found"),
        ({"recipe": {"model": {"a": object()}}}, "^recipe can't be written down as JSON: object can't be written"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_written(given, match, tmp_path):
    given = {"task": task(), "run_dir": tmp_path / "run"} | given
    with pytest.raises((ConfigError, TaskError), match=match):
        compress(NET, given.pop("task"), config(), **given)
    assert not list(tmp_path.iterdir())


def test_the_way_out_of_an_impossible_goal_names_what_stands_in_the_way():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.small = nn.Linear(6, 64), nn.Linear(6, 4)
            self.read = nn.Linear(68, 3)

        def forward(self, x):
            return self.read(torch.cat([self.wide(x).cumsum(1), F.relu(self.small(x))], 1))

    with pytest.raises(
        BudgetError, match=r"(?s)Ask for macs=0\.96 or more, .*in the way .*the order of its slots matters"
    ):
        compress(Sorted().eval(), task(), config(macs=0.5))
