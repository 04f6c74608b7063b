"""Block outputs of the student and of its teacher are the same places in both, in the same sizes."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.compress.features import BlockOutputs, check_features
from idap.compress.run import compress
from idap.errors import ConfigError, StructureError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.training.distill import feature_distance
from idap.training.fit import fit
from idap.training.recovery import Recovery
from tests import nets
from tests.compress.tiny import Net, batches, config, task, train_net

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def structure_of(net, x=X):
    return analyze(trace(net, (x,)))


def pairs(structure, plan, student, teacher, *args, **kwargs):
    found = BlockOutputs(structure, plan, student, teacher)
    _, ours = found.student(lambda: student(*args, **kwargs))
    _, theirs = found.teacher(lambda: teacher(*args, **kwargs))
    return ours, theirs


@pytest.mark.parametrize("net", [net for net in nets.NETS if net.blocks], ids=lambda net: net.name)
def test_of_every_architecture(net):
    """A copy has the same features; a cut model has features of the same sizes."""
    structure, model = nets.structure_of(net.name), net.model()
    run = lambda plan, student: pairs(structure, plan, student, model, *net.args, **net.kwargs)  # noqa: E731
    with torch.no_grad():
        ours, theirs = run(Plan(), copy.deepcopy(model))
        assert len(ours) > 0
        assert feature_distance(ours, theirs) == 0
        plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups})
        small, large = run(plan, apply_plan(model, plan))
    assert [tensor.shape for tensor in small] == [tensor.shape for tensor in large]
    assert len(small) == len(ours)


def test_the_teacher_is_seen_at_the_slots_that_are_kept():
    net = train_net()
    structure = structure_of(net)
    stream = next(group for group in structure.groups if group.size == 12)
    plan = structure.plan({stream.name: (1, 4, 6, 11)}, [structure.blocks[1].name])
    student = apply_plan(net, plan)
    ours, theirs = pairs(structure, plan, student, net, X)
    whole = [net.stem(X)]
    for block in net.blocks:
        whole.append(block(whole[-1]))
    small = [student.stem(X)]
    for block in student.blocks:
        small.append(block(small[-1]))
    assert_close(theirs, [whole[1][:, [1, 4, 6, 11]], whole[3][:, [1, 4, 6, 11]]], rtol=0, atol=0)
    assert_close(ours, [small[1], small[3]], rtol=0, atol=0)


def test_values_that_are_written_over_are_seen_as_they_were():
    class InPlace(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
                x.relu_()
            return self.head(x)

    net = InPlace(1)
    ours, theirs = pairs(structure_of(net), Plan(), copy.deepcopy(net), net, X)
    assert_close(theirs, [net.blocks[0](net.stem(X))], rtol=0, atol=0)
    assert ours[0].min() < 0


def test_a_model_that_takes_another_way_is_named():
    class Fickle(Net):
        def forward(self, x):
            return self.head(self.blocks(self.stem(x)) if not self.training else self.stem(x))

    net = Fickle(1)
    found = BlockOutputs(structure_of(net), Plan(), net, copy.deepcopy(net))
    net.train()
    with pytest.raises(StructureError, match=r"the output of a block, 'add.*', was seen when the model was traced but"):
        found.student(lambda: net(X))


def test_training_brings_features_near():
    net = train_net()
    structure = structure_of(net)
    plan = structure.plan({group.name: range(group.size // 2) for group in structure.groups})
    distance = {}
    for weight in (0.0, 5.0):
        student = apply_plan(net, plan)
        features = BlockOutputs(structure, plan, student, net)
        fit(student, task(), Recovery(epochs=3, lr=0.02, features=weight), teacher=net, features=features)
        with torch.no_grad():
            distance[weight] = float(feature_distance(*pairs(structure, plan, student, net, batches(64, 3, 64)[0][0])))
    assert distance[5.0] < 0.5 * distance[0.0]


@pytest.mark.parametrize("final", [None, Recovery(epochs=1, lr=0.02, features=1.0)])
def test_a_run_learns_features_until_no_block_is_left(final):
    settings = config(recovery=Recovery(epochs=1, lr=0.02, features=0.5), final=final, max_drop=None, macs=0.3)
    result = compress(train_net(1), task(), settings)
    assert result.plan.removed
    assert result.reached


def test_a_model_without_blocks_is_refused():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    structure = structure_of(net)
    check_features(structure, Recovery(), None)
    with pytest.raises(ConfigError, match=r"features=0\.5 compares the outputs of blocks, and this model has none"):
        compress(net, task(), config(recovery=Recovery(features=0.5)))
