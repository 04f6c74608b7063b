"""Torch-Pruning's scores are for the channels that idap means, the same each time, and high where it matters."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from benchmarks.subjects import build
from idap.graph.trace import trace
from idap.structure.analysis import analyze

if importlib.util.find_spec("torch_pruning") is None:
    pytest.skip("Torch-Pruning is not installed: it comes with the extra bench", allow_module_level=True)

from benchmarks import peers

DATA_FREE = ("random", "magnitude_l1", "magnitude_l2", "bn_scale", "lamp", "fpgm")


@pytest.fixture(scope="module")
def case(real_data):
    subject = build("resnet20", real_data)
    structure = analyze(trace(subject.model, *subject.example()))
    return subject, structure, subject.calibration(48, 0)


def scores_of(criterion, case, **settings):
    return peers.importance(criterion, *case, **settings)


def test_groups_are_the_channels_between_the_convolutions(case):
    subject, structure, _ = case
    groups = peers.inner_groups(subject.model, structure)
    assert len(groups) == 9
    for path, name in groups.items():
        plan = structure.plan({name: [0, 3, 5]})
        assert plan.tensors == {
            f"{path}.conv1.weight": {0: (0, 3, 5)},
            **{f"{path}.bn1.{part}": {0: (0, 3, 5)} for part in ("weight", "bias", "running_mean", "running_var")},
            f"{path}.conv2.weight": {1: (0, 3, 5)},
        }


@pytest.mark.parametrize("criterion", peers.CRITERIA)
def test_scores_are_finite_repeatable_and_leave_the_model(criterion, case):
    subject, structure, _ = case
    before, state = copy.deepcopy(subject.model.state_dict()), torch.get_rng_state()
    scores, again = scores_of(criterion, case), scores_of(criterion, case)
    assert {name: len(part) for name, part in scores.items()} == {
        name: structure.group(name).size for name in peers.inner_groups(subject.model, structure).values()
    }
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(part.dtype == torch.float64 and (part >= 0).all() and part.std() > 0 for part in scores.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert torch.equal(state, torch.get_rng_state())


# "hessian" reads a single sample here, as it does whatever it is given: see the module's words on it.
@pytest.mark.parametrize("criterion", [name for name in peers.CRITERIA if name not in ("random", "hessian")])
def test_a_high_score_means_important(criterion, case):
    subject, structure, _ = case
    scores = scores_of(criterion, case)
    losses = []
    for largest in (False, True):
        model = copy.deepcopy(subject.model)
        for path, name in peers.inner_groups(subject.model, structure).items():
            gone = scores[name].topk(len(scores[name]) // 4, largest=largest).indices
            norm = model.get_submodule(f"{path}.bn1")
            norm.weight.data[gone], norm.bias.data[gone] = 0.0, 0.0
        with torch.no_grad():
            losses.append(float(subject.loss(subject.run(model, subject.test[0]), subject.test[0])))
    assert losses[0] < losses[1]


def test_only_criteria_with_data_depend_on_it(case):
    subject, structure, _ = case
    other = subject.calibration(16, 1)
    for criterion in peers.CRITERIA:
        scores, changed = scores_of(criterion, case), scores_of(criterion, (subject, structure, other))
        assert all(torch.equal(scores[name], changed[name]) for name in scores) == (criterion in DATA_FREE), criterion


def test_the_seed_draws(case):
    scores, other = scores_of("random", case), scores_of("random", case, seed=1)
    assert not any(torch.equal(scores[name], other[name]) for name in scores)


def test_hessian_keeps_the_last_sample_and_its_mean_keeps_all(case):
    subject, structure, batches = case
    last = [tuple(part[-1:] for part in batches[-1])]
    alone = scores_of("hessian", (subject, structure, last))
    for name, part in scores_of("hessian", case).items():
        torch.testing.assert_close(part, alone[name])
    for name, part in scores_of("hessian_mean", (subject, structure, last)).items():
        torch.testing.assert_close(part, alone[name])
    assert not any(torch.allclose(part, alone[name]) for name, part in scores_of("hessian_mean", case).items())


def test_obdc_squares_the_gradient_of_each_sample(case):
    subject, _, batches = case
    model = copy.deepcopy(subject.model)
    scorer = peers.CRITERIA["obdc"](model, subject, [tuple(part[:1] for part in batches[0])])
    for layer, fisher in scorer.Fisher.items():
        torch.testing.assert_close(fisher, layer.weight.grad.flatten(1).square())


def test_other_names_are_refused(case):
    with pytest.raises(ValueError, match="no criterion 'l1'; criteria are random, magnitude_l1"):
        scores_of("l1", case)


def test_a_network_without_such_groups_is_refused(case):
    subject, structure, _ = case
    fewer = SimpleNamespace(groups=structure.groups[:-1])
    with pytest.raises(LookupError, match=r"the channels that layer3.2.conv1.weight writes are not one group"):
        peers.inner_groups(subject.model, fewer)
