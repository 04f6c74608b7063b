"""Linear maps in place of blocks, fitted in closed form: the best there are, from sums alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from idap.divergence.observe import Pass
from idap.errors import StructureError
from idap.graph.trace import trace
from idap.rebalance.projections import FittedMap, fit_projections
from idap.rebalance.run import rebalance_
from idap.structure.analysis import Structure, analyze
from idap.surgery.apply import apply_plan
from tests import nets
from tests.rebalance.cuts import build_net, normal, passes
from tests.surgery.test_projection_plans import Tall, stream_around


def resnet() -> nn.Module:
    return nets.ResNet(nets.Basic(6, 6), nets.Basic(6, 8, 2), nets.Basic(8, 8), stem=6, width=8)


def analyze_net(model: nn.Module, x: Tensor, replacement: str = "auto") -> Structure:
    return analyze(trace(model, (x,)), replacement=replacement)


def fit_maps(model: nn.Module, structure: Structure, *batches: Tensor, **state) -> dict[str, FittedMap]:
    names = [block.name for block in structure.blocks if block.projected]
    present = structure.presence(state.pop("keep", {}))
    return fit_projections(model, structure, passes(*batches), names, present=present, **state)


def rows(model: nn.Module, path: str, x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """What enters and leaves a module, channels last, in float64."""
    inside, outside = stream_around(model, path, (x,))
    inside = inside[:, :, ::stride, ::stride] if stride else inside
    dim = 1 if stride else -1
    return tuple(t.movedim(dim, -1).flatten(0, -2).double() for t in (inside, outside))


@pytest.mark.parametrize(("make", "path", "stride"), [(resnet, "layers.1", 2), (Tall, "steps.1", 0)])
def test_with_many_samples_the_map_is_the_least_squares_solution(make, path, stride):
    model = build_net(make)
    x = normal(256, 3, 8, 8) if stride else normal(256, 5, 4)
    found = fit_maps(model, analyze_net(model, x[:2]), *x.split(64))[path]
    a, y = rows(model, path, x, stride)
    solution = torch.linalg.lstsq(torch.cat([a, a.new_ones(len(a), 1)], 1), y).solution
    best = (y - torch.cat([a, a.new_ones(len(a), 1)], 1) @ solution).square().sum()
    mine = (y - a @ found.map.weight.T - found.map.bias).square().sum()
    assert best <= mine <= best * 1.01
    assert float(best / y.square().sum()) == pytest.approx(found.residual, rel=0.1)
    assert 0 < found.residual < 1 and found.ridge <= 1e-2


def test_a_block_that_is_linear_is_replaced_without_loss():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.short = nn.Conv2d(5, 9, 1), nn.Conv2d(9, 7, 1, 2), nn.Conv2d(5, 7, 1, 2)

        def forward(self, x):
            return self.two(self.one(x)) + self.short(x)

    model = build_net(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), Block(), nn.ReLU(), nn.Conv2d(7, 2, 1)))
    x = normal(64, 3, 10, 10)
    structure = analyze_net(model, x[:2])
    found = fit_maps(model, structure, x)["1"]
    assert found.residual < 1e-6
    small = apply_plan(model, structure.plan({}, ["1"]), {"1": found.map})
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=2e-2)


def test_few_samples_get_a_stronger_ridge_and_do_not_explode():
    model = build_net(Tall)
    x = normal(400, 1, 4)
    structure = analyze_net(model, x[:2])
    few, many = fit_maps(model, structure, x[:12])["steps.0"], fit_maps(model, structure, x)["steps.0"]
    assert few.ridge > many.ridge
    a, y = rows(model, "steps.0", x, 0)
    error = (y - a @ few.map.weight.T - few.map.bias).square().sum() / y.square().sum()
    assert error < 1.5


def test_batches_of_one_sample_serve_too():
    model = build_net(Tall)
    x = normal(40, 1, 4)
    structure = analyze_net(model, x[:2])
    one_by_one, at_once = fit_maps(model, structure, *x.split(1))["steps.1"], fit_maps(model, structure, x)["steps.1"]
    assert one_by_one.residual == pytest.approx(at_once.residual, rel=0.7)
    assert fit_maps(model, structure, x[:1])["steps.1"].residual == 1


def test_on_a_cut_model_the_map_has_zeros_where_channels_are_gone():
    model, x = build_net(resnet), normal(64, 3, 8, 8)
    structure = analyze_net(model, x[:2])
    keep = {group.name: tuple(range(0, group.size, 2)) for group in structure.groups}
    small = apply_plan(model, structure.plan(keep))
    found = fit_maps(small, structure, x, keep=keep)["layers.1"].map
    projected = structure.projection_of("layers.1", structure.presence(keep))
    rest = torch.ones(8, 6, dtype=torch.bool)
    rest[torch.tensor(projected.outputs)[:, None], torch.tensor(projected.inputs)] = False
    assert not found.weight[rest].any() and bool(found.weight[~rest].any())
    a, y = rows(small, "layers.1", x, 2)
    mine = (y - a @ found.weight[list(projected.outputs)][:, list(projected.inputs)].T).sub(
        found.bias[list(projected.outputs)]
    )
    assert mine.square().sum() < 0.5 * (y - y.mean(0)).square().sum() + 0.5 * y.square().sum()


def test_a_map_is_fitted_behind_another_projection():
    model, x = build_net(Tall), normal(64, 5, 4)
    structure = analyze_net(model, x[:2])
    maps = {"steps.0": fit_maps(model, structure, x)["steps.0"].map}
    small = apply_plan(model, structure.plan({}, ["steps.0"]), maps)
    present = structure.presence({})
    again = fit_projections(small, structure, passes(x), ["steps.1"], present=present, removed=["steps.0"])["steps.1"]
    a, y = rows(small, "steps.1", x, 0)
    error = (y - a @ again.map.weight.T - again.map.bias).square().sum() / y.square().sum()
    assert float(error) == pytest.approx(again.residual, rel=0.3)


def test_of_a_block_that_has_lost_a_part_the_rest_is_fitted_and_none_if_its_last_part_is_gone():
    model = build_net(
        lambda: nets.Encoder(4, 8, nets.PreNorm(8, nets.FusedAttention(8, 4, 2), nets.FeedForward(8, 10)))
    )
    x = normal(64, 5, 4)
    structure = analyze_net(model, x[:2], "projection")
    assert [(block.name, block.kind) for block in structure.blocks][-1] == ("blocks.0", "projection")
    whole = fit_maps(model, structure, x)["blocks.0"]
    assert 0 < whole.residual < 1
    for branch, known in (("blocks.0.norm1…attn", True), ("blocks.0.norm2…mlp", False)):
        small = apply_plan(model, structure.plan({}, [branch]))
        found = fit_maps(small, structure, x, removed=[branch])
        assert ("blocks.0" in found) == known
        assert not known or found["blocks.0"].residual != whole.residual


def test_padding_does_not_count_and_the_model_is_left_as_it_was():
    model, x = build_net(Tall), normal(32, 6, 4)
    structure = analyze_net(model, x[:2])
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    padding = torch.ones(32, 6, dtype=torch.bool)
    padding[:, 3:] = False
    spoilt = x.clone()
    spoilt[:, 3:] = 1e3
    present = structure.presence({})
    names = ["steps.0"]
    one, other = (
        fit_projections(model, structure, [Pass(lambda m, t=t: m(t), padding=padding)], names, present=present)
        for t in (x, spoilt)
    )
    assert torch.allclose(one["steps.0"].map.weight, other["steps.0"].map.weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]


def test_sizes_to_which_the_stride_does_not_fit_are_reported():
    class Valid(nn.Sequential):
        pass

    block = Valid(nn.Conv2d(4, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 6, 1))
    model = build_net(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.ReLU(), nn.Conv2d(6, 2, 1)))
    structure = analyze_net(model, normal(2, 3, 8, 8))
    with pytest.raises(StructureError, match=r"'1' gives \(4, 4\) positions .* stride \(2, 2\) gives \(5, 5\)"):
        fit_maps(model, structure, normal(2, 3, 9, 9))


@pytest.mark.parametrize("replacement", ["auto", "projection"])
def test_after_a_later_cut_a_projection_is_corrected_to_what_the_original_gives(replacement):
    model, x = build_net(resnet), normal(128, 3, 8, 8)
    structure = analyze_net(model, x[:2], replacement)
    maps = {"layers.1": fit_maps(model, structure, x)["layers.1"].map}
    stem = structure.groups[0]
    keep = {stem.name: tuple(range(0, stem.size, 2))}
    plan = structure.plan(keep, ["layers.1"])
    cut = apply_plan(model, plan, maps)
    corrected = copy.deepcopy(cut)
    found = {one.weight: one for one in rebalance_(corrected, model, structure, plan, passes(x))}
    mine = found["layers.1.map.weight"]
    assert mine.after < mine.before
    wanted = stream_around(model, "layers.1", (x,))[1]
    before, after = ((stream_around(m, "layers.1", (x,))[1] - wanted).norm() for m in (cut, corrected))
    assert after < 0.9 * before
