"""A sliced optimiser takes the very steps that the old one would take on what is left."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.compress.run import compress
from idap.errors import PlanError, RunFolderError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.optimizer import slice_optimizer
from tests.compress.tiny import Net, Noting, batches, config, task, train_net

MAKERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99)),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}


def groups_of(net):
    heads = list(net.head.parameters())
    others = [parameter for parameter in net.parameters() if not any(parameter is head for head in heads)]
    return [{"params": others}, {"params": heads, "weight_decay": 0.0, "lr": 0.002}]


def train_briefly(make, net):
    optimizer = make(groups_of(net))
    for samples, labels in batches(96, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(samples), labels).backward()
        optimizer.step()
    return optimizer


def cut(net):
    structure = analyze(trace(net, (batches(4, 1)[0][0],)))
    keep = {group.name: range(1, group.size, 2) for group in structure.groups}
    plan = structure.plan(keep, [block.name for block in structure.blocks[1:2]])
    return apply_plan(net, plan), plan


def cut_as_planned(tensor, name, plan):
    for dim, slots in plan.tensors.get(name, {}).items():
        if tensor.shape[dim] > 1:
            tensor = tensor.index_select(dim, torch.tensor(slots))
    return tensor


@pytest.mark.parametrize("name", MAKERS)
def test_state_is_cut_as_the_parameter_is(name):
    net = Net()
    old = train_briefly(MAKERS[name], net)
    before = copy.deepcopy(old.state_dict())
    small, plan = cut(net)
    new = slice_optimizer(old, net, small, plan)
    named = dict(net.named_parameters())
    assert type(new) is type(old)
    assert old.defaults.items() <= new.defaults.items()
    for found, group in zip(new.param_groups, old.param_groups, strict=True):
        assert {k: v for k, v in found.items() if k != "params"} == {k: v for k, v in group.items() if k != "params"}
    listed = [parameter for group in new.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in listed} == {id(parameter) for parameter in small.parameters()}
    assert len(listed) < len(named)
    for path, parameter in small.named_parameters():
        held = old.state[named[path]]
        assert list(new.state[parameter]) == list(held)
        for key, value in held.items():
            expected = cut_as_planned(value, path, plan) if isinstance(value, torch.Tensor) and value.ndim else value
            assert_close(new.state[parameter][key], expected, rtol=0, atol=0)
    assert_close(old.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "adafactor"])
def test_it_steps_as_the_old_one_would(name):
    """Element-wise optimisers move what is left as they would have moved it in the whole model."""
    net = Net()
    old = train_briefly(MAKERS[name], net)
    small, plan = cut(net)
    new = slice_optimizer(old, net, small, plan)
    for path, parameter in net.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(path)))
    for path, parameter in small.named_parameters():
        parameter.grad = cut_as_planned(dict(net.named_parameters())[path].grad, path, plan)
    old.step()
    new.step()
    large = dict(net.named_parameters())
    for path, parameter in small.named_parameters():
        assert_close(parameter, cut_as_planned(large[path], path, plan))


def test_schedulers_and_hooks_stay_with_the_old_one():
    net = Net()
    old = train_briefly(MAKERS["sgd"], net)
    calls = []
    old.register_step_pre_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.StepLR(old, 1)
    new = slice_optimizer(old, net, *cut(net))
    new.step()
    assert calls == []
    torch.optim.lr_scheduler.StepLR(new, 1)


def test_tied_parameters_stay_one():
    net = Net()
    net.blocks[1].fc1.weight = net.blocks[2].fc1.weight
    small, plan = cut(net)
    new = slice_optimizer(train_briefly(MAKERS["sgd"], net), net, small, plan)
    listed = [id(parameter) for group in new.param_groups for parameter in group["params"]]
    assert id(small.blocks[2].fc1.weight) in listed
    assert len(listed) == len(set(listed))


def test_what_can_not_be_cut_is_refused():
    net = Net()
    small, plan = cut(net)
    with pytest.raises(PlanError, match=r"^LBFGS keeps tensors in its attribute '_params', which can't be cut"):
        slice_optimizer(torch.optim.LBFGS(net.parameters()), net, small, plan)
    strange = train_briefly(MAKERS["sgd"], net)
    strange.state[net.stem.weight]["sketch"] = torch.zeros(5)
    with pytest.raises(PlanError, match=r"SGD keeps 'sketch' of shape \(5,\) for 'stem.weight', which has shape"):
        slice_optimizer(strange, net, small, plan)
    strange.state[net.stem.weight]["sketch"] = [torch.zeros(5)]
    with pytest.raises(PlanError, match="SGD keeps a collection of tensors, 'sketch'"):
        slice_optimizer(strange, net, small, plan)
    with pytest.raises(PlanError, match=r"group 0 of the SGD holds a parameter of shape \(12, 6\) that Net does not"):
        slice_optimizer(train_briefly(MAKERS["sgd"], Net()), net, small, plan)
    with pytest.raises(PlanError, match=r"parameter 'stem\.weight' of the cut model has shape \(12, 6\), the plan"):
        slice_optimizer(MAKERS["sgd"](groups_of(net)), net, copy.deepcopy(net), plan)


class TestCompress:
    """A run with an optimiser of the user's."""

    def run(self, net, optimizer, **options):
        return compress(net, task(), config(max_drop=0.03, macs=0.4), optimizer=optimizer, **options)

    def test_it_is_used_left_alone_and_gives_the_same_again(self):
        net = train_net()
        own = train_briefly(MAKERS["adamw"], net)
        before = copy.deepcopy(own.state_dict())
        first, second = self.run(net, own), self.run(net, own)
        assert_close(own.state_dict(), before, rtol=0, atol=0)
        assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
        plain = compress(net, task(), config(max_drop=0.03, macs=0.4))
        assert any(
            not torch.equal(value, plain.model.state_dict()[name])
            for name, value in first.model.state_dict().items()
            if name in plain.model.state_dict() and value.shape == plain.model.state_dict()[name].shape
        )

    def test_a_stopped_run_goes_on_to_the_same_result(self, tmp_path):
        net = train_net()
        own = train_briefly(MAKERS["sgd"], net)
        whole = self.run(net, own)
        with pytest.raises(KeyboardInterrupt):
            self.run(net, own, run_dir=tmp_path / "run", progress=Noting(fail_at="filters 1: recovery"))
        resumed = self.run(net, own, run_dir=tmp_path / "run", resume=True)
        assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
        other = torch.optim.SGD(net.parameters(), lr=0.3)
        with pytest.raises(RunFolderError, match=r"holds a different run: optimizer\.groups"):
            self.run(net, other, run_dir=tmp_path / "run", resume=True)

    def test_one_that_can_not_be_cut_is_refused_before_any_work(self):
        net = train_net()
        with pytest.raises(PlanError, match="LBFGS keeps tensors"):
            self.run(net, torch.optim.LBFGS(net.parameters()))


def test_without_a_cut_all_stays():
    net = Net()
    old = train_briefly(MAKERS["adam"], net)
    twin = copy.deepcopy(net)
    new = slice_optimizer(old, net, twin, Plan())
    assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
