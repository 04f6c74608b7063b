"""Statistics of batch norms on new data."""

import copy

import pytest
import torch
from torch import nn

from idap.divergence.observe import Pass
from idap.rebalance.norms import Affine, reestimate_norms_
from idap.rebalance.run import Rebalance
from tests.rebalance.cuts import Cut, build_net, normal, passes, same_state, structure_of, without


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)
    )


def test_statistics_are_the_mean_over_the_batches():
    model = build_net(net)
    batches = normal(24, 3, 8, 8).chunk(3)
    with torch.no_grad():
        made = [model[0](batch) for batch in batches]
    reestimate_norms_(model, passes(*batches))
    mean = torch.stack([y.mean((0, 2, 3)) for y in made]).mean(0)
    variance = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in made]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert (model[1].momentum, model[4].momentum) == (0.1, None)
    assert int(model[1].num_batches_tracked) == 3


def test_each_module_gets_its_mode_back_and_dropout_never_drops():
    model = build_net(net)
    model[2].train()
    model[1].train()
    other = copy.deepcopy(model)
    other[2] = nn.Identity()
    data = passes(normal(8, 3, 8, 8))
    reestimate_norms_(model, data)
    reestimate_norms_(other, data)
    assert [module.training for module in model] == [False, True, True, False, False]
    torch.testing.assert_close(model[4].running_mean, other[4].running_mean)


class Dropping(nn.BatchNorm2d):
    """A norm that holds a module of its own, as some libraries have it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(super().forward(x))


def test_what_a_norm_holds_stays_in_evaluation_mode():
    model = build_net(lambda: nn.Sequential(Dropping(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    state = torch.get_rng_state()
    reestimate_norms_(model, passes(normal(8, 3, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failure_leaves_the_old_statistics():
    model = build_net(net)
    held = copy.deepcopy(model)

    def fail(m):
        m(normal(4, 3, 8, 8))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reestimate_norms_(model, [Pass(fail)])
    assert same_state(model, held)
    assert (model[1].momentum, model[4].momentum) == (0.1, None)
    assert not any(module.training for module in model.modules())


def test_a_model_without_norms_is_not_even_run():
    def refuse(_model):
        raise AssertionError

    reestimate_norms_(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), [Pass(refuse)])


def test_norms_alone_make_up_for_part_of_a_cut():
    model = build_net(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    x = normal(64, 3, 8, 8)
    reestimate_norms_(model, passes(x))  # as after training
    structure = structure_of(model, 2, 3, 8, 8)
    setting = Rebalance(least_squares=False, means=False, norms=True)
    cut = Cut(model, structure, without(structure, "0", 2, 3), x, setting=setting)
    before, after = cut.errors(normal(64, 3, 8, 8, seed=1))
    assert after < before
    assert cut.corrections == []
    with torch.no_grad():
        made = cut.small[:3](x)
    torch.testing.assert_close(cut.small[3].running_mean, made.mean((0, 2, 3)))
    torch.testing.assert_close(cut.small[3].running_var, made.transpose(0, 1).flatten(1).var(1))


def test_a_norm_is_undone():
    norm = build_net(lambda: nn.BatchNorm2d(4))
    scale = (norm.running_var + norm.eps).rsqrt() * norm.weight.detach()
    affine = Affine(scale, norm.running_mean, norm.bias.detach())
    y = normal(5, 4, 3, 3)
    with torch.no_grad():
        made = norm(y)
    torch.testing.assert_close(affine.apply(y, 1), made)
    rows = made.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(affine.invert(rows), y.movedim(1, -1).reshape(-1, 4), rtol=1e-4, atol=1e-4)
    dead = Affine(scale * torch.tensor([1, 0, 1, 1]), norm.running_mean, norm.bias.detach())
    assert torch.equal(dead.invert(rows)[:, 1], norm.running_mean[1].expand(len(rows)))
