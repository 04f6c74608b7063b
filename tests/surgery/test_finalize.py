"""A finalized model computes the same with fewer modules; what can't be folded stays, and the reason is given."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from idap.errors import ExportError
from idap.surgery.apply import apply_plan
from idap.surgery.compare import outputs_of
from idap.surgery.finalize import finalize
from idap.surgery.stand_ins import Pass, Zero
from tests.conformance.proofs import random_plan, random_set
from tests.nets import by_name, every_net, images, randomised, sequence, structure_of


def equal(model, final, args, kwargs=None):
    found = [outputs_of(each, args, kwargs or {}) for each in (model, final)]
    return all(torch.allclose(a, b, atol=1e-4 * float(b.abs().max())) for a, b in zip(*found, strict=True))


@every_net
def test_every_cut_net_stays_equal(net):
    structure = structure_of(net.name)
    plan = structure.plan(random_plan(structure, 0.4).keep, random_set(structure, 1))
    small = apply_plan(net.model(), plan)
    before = copy.deepcopy(small.state_dict())
    final, report = finalize(small, net.args, net.kwargs)
    assert equal(small, final, net.args, net.kwargs) and report.difference <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    left = {name for name, module in final.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert left == set(report.kept)
    kinds = {type(module) for module in final.modules()}
    assert not kinds & {nn.Dropout, nn.Dropout2d}
    for module in final.modules():
        if type(module) is nn.Sequential:
            assert nn.Identity not in map(type, module)


def test_residual_nets_lose_all_their_norms_and_removed_blocks():
    net = by_name["resnet basic"]
    structure = structure_of(net.name)
    small = apply_plan(net.model(), structure.plan(random_plan(structure, 0.4).keep, ["layers.1"]))
    final, report = finalize(small, net.args)
    assert len(report.folded) == 8 and report.folded["layers.2.downsample.1"] == "layers.2.downsample.0"
    assert report.silenced == ("layers.1",) and set(report.gone) == {"layers.2.downsample.1", "layers.1"}
    assert list(dict(final.layers.named_children())) == ["0", "2", "3"]  # the others keep their names
    assert not final.training


def build(*modules):
    return randomised(nn.Sequential(*modules).eval())


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (build(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), images()),
        (build(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False)), images()),
        (build(nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4)), images()),
        (build(nn.Conv1d(5, 4, 1, padding="same"), nn.BatchNorm1d(4)), sequence(7)),
        (build(nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4)), torch.randn(2, 1, 3, 3, 3)),
        (build(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)), torch.randn(3, 4)),
        (build(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), images()),
    ],
    ids=lambda part: type(part[0]).__name__ if isinstance(part, nn.Sequential) else "",
)
def test_layers_that_take_over_a_norm(model, x):
    final, report = finalize(model, (x,))
    assert report.folded == {"1": "0"} and report.gone == ("1",) and len(final) == 1
    assert equal(model, final, (x,)) and final[0].bias is not None


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.other(self.norm(self.conv(x)) + self.norm(x))


class ReadTwice(Twice):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Looks(Twice):
    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.eps


class TiedWeights(Twice):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.sum()


def model_with_hook():
    model = build(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (Twice(), images(), {"norm": "no convolution", "other": "no convolution"}),
        (ReadTwice(), images(), {"norm": "the output of 'conv' is read elsewhere too"}),
        (Looks(), images(), {"norm": "is shared, has hooks"}),
        (TiedWeights(), images(), {"norm": "its tensors are used elsewhere"}),
        (model_with_hook(), images(), {"1": "has hooks"}),
        (build(nn.ReLU(), nn.BatchNorm2d(3)), images(), {"1": "no convolution or linear layer comes before it"}),
        (build(weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), images(), {"1": "its tensors are used elsewhere"}),
        (build(nn.ConvTranspose2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)), images(4), {"1": "transposed"}),
        (build(nn.Linear(4, 6), nn.BatchNorm1d(5)), sequence(4), {"1": "has 3 dimensions"}),
        (build(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), images(), {"1": "no running"}),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, nn.Module) else "",
)
def test_norms_that_stay(model, x, reason):
    model = randomised(model.eval())
    final, report = finalize(model, (x,))
    assert report.folded == {} and set(report.kept) >= set(reason)
    for path, said in reason.items():
        assert said in report.kept[path]
    assert equal(model, final, (x,))


class NormAndReLU(nn.BatchNorm2d):
    """As timm's: a norm that also calls an activation."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.3)

    def forward(self, x):
        y = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(y))


class NormAndMore(NormAndReLU):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_a_norm_calls_afterwards_stays():
    model = build(nn.Conv2d(3, 4, 1), NormAndReLU(4), nn.Conv2d(4, 4, 1), NormAndMore(4))
    final, report = finalize(model, (images(),))
    assert report.folded == {"1": "0"} and report.kept == {"3": "a NormAndMore does more than normalise"}
    assert "LeakyReLU" in str(final[1]) and equal(model, final, (images(),))


def test_dropout_and_stand_ins_go_where_nobody_looks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.looked_at, self.never = nn.Dropout(), nn.Dropout(0.3), nn.Dropout()
            self.parts = nn.Sequential(nn.Dropout(), nn.Linear(4, 4), Pass(), nn.Identity(), Zero())
            self.listed = nn.Sequential(nn.Linear(4, 4), nn.Identity())

        def forward(self, x):
            x = x + self.parts(self.drop(x)) + self.looked_at(x) * self.looked_at.p
            for part in self.listed:
                x = part(x)
            return x

    model = randomised(Net().eval())
    final, report = finalize(model, (sequence(4),))
    assert report.silenced == ("drop", "parts.0", "parts.2") and report.gone == ("parts.0", "parts.2", "parts.3")
    assert type(final.drop) is nn.Identity and final.looked_at.p == 0.3 and type(final.never) is nn.Dropout
    assert list(dict(final.parts.named_children())) == ["1", "4"] and len(final.listed) == 2
    assert equal(model, final, (sequence(4),))


def test_the_original_stays_in_its_mode_and_a_mismatch_names_the_module():
    model = build(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    with pytest.raises(
        ExportError, match=r"module '\d' of Sequential can't be finalized: folding it into '\d' changes"
    ):
        finalize(model, (images(),), tolerance=0)
    assert model.training and all(module.training for module in model)


class DropPath(nn.Module):
    """Has the name of one that only drops in training, but doubles."""

    def forward(self, x):
        return x.mul_(2)


def test_a_module_that_only_looks_like_dropout_is_caught():
    model = build(nn.Linear(4, 4), DropPath())
    with pytest.raises(ExportError, match=r"module '1' of Sequential can't be finalized: taking it out changes"):
        finalize(model, (sequence(4),))
