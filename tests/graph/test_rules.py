"""Every operator rule against the truth.

A rule says which slots are one unit. If that is right, all units of all groups can change places in every weight at
once and the model's output doesn't move; and what is cut equals what is masked. Each case puts one operator between
a convolution that writes channels and a layer that reads them.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.graph.labels import Dim
from idap.graph.rules.flow import RULES, arguments, base_name, flow_of
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.nets import NETS, Net, every_net, images, randomised, sequence, structure_of

CHANNELS = 8


class Between(nn.Module):
    """A convolution, an operator on (2, 8, 4, 4), and a layer that reads whatever comes out."""

    def __init__(self, operator: Callable[[Tensor], Tensor], inside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        self.operator = operator
        self.read = nn.Linear(inside, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.operator(self.conv(x)).flatten(1))


def normalise_channels(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2)


def gate_halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return one * torch.sigmoid(other)


def write_in_place(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape)
    made[:, :, :2] = x[:, :, 2:]
    made[:, :, 2:].copy_(x[:, :, :2]).mul_(2)
    return made.add_(1)


def attention(x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x.relu(), torch.zeros(16, 16), scale=0.5)


def grouped_queries(x: Tensor) -> Tensor:
    """4 query heads share 2 key heads; 2 channels each."""
    q = x.flatten(2).unflatten(1, (4, -1)).transpose(2, 3)
    k = q.unflatten(1, (2, 2)).sum(2)
    return F.scaled_dot_product_attention(q, k, k.relu(), scale=1.0, enable_gqa=True)


def grid(x: Tensor, indexing: str) -> Tensor:
    """Every channel with every row."""
    one, other = torch.meshgrid(x.mean((0, 2, 3)), x.mean((0, 1, 3)), indexing=indexing)
    made = one * 2 + other
    return x * (made if indexing == "ij" else made.mT)[:, :, None]


ROWS = torch.tensor([0, 3])[:, None]
MASK = torch.tensor([True, False, False, True])
BOARD = MASK[None, :, None].expand(2, 4, 4) & MASK


def put_values(x: Tensor, place: tuple[object, ...], values: Tensor | float) -> Tensor:
    x = x.clone()
    x[place] = values
    return x


CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    # Name: the operator, and how many units there are in each group of the convolution's channels.
    "relu": (F.relu, (8,)),
    "in place": (lambda x: x.relu_().mul_(2).clamp_(0, 1), (8,)),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), (8,)),
    "hardswish, silu, mish": (lambda x: F.mish(F.silu(F.hardswish(x))), (8,)),
    "exp, log1p": (lambda x: x.exp().log1p(), (8,)),
    "dropouts": (lambda x: F.dropout2d(F.alpha_dropout(F.dropout(x, training=False)), training=False), (8,)),
    "with itself": (lambda x: x * x + x.square() - x / (x.abs() + 1), (8,)),
    "broadcast over places": (lambda x: x * x[:, :, :1] + x.mean((2, 3), keepdim=True), (8,)),
    "broadcast over channels": (lambda x: x * x.sum(1, keepdim=True), (8,)),
    "where, masked_fill": (lambda x: torch.where(x > 0, x, 0.1).masked_fill(x > 1, 1.0), (8,)),
    "clamp, maximum, pow": (lambda x: torch.maximum(x.clamp(-1, 1), x.pow(2)), (8,)),
    "lerp, addcmul": (lambda x: torch.addcmul(x.lerp(x.relu(), 0.3), x, x, value=2), (8,)),
    "maximum over channels, places read": (lambda x: x * sum(torch.max(x, 1, keepdim=True)), ()),
    "cast": (lambda x: x.double().to(torch.float32).contiguous().clone().detach(), (8,)),
    "zeros_like, full_like": (lambda x: torch.zeros_like(x) + torch.full_like(x, 2.0) * x, (8,)),
    "made and written": (write_in_place, (8,)),
    "permute": (lambda x: x.permute(0, 2, 3, 1), (8,)),
    "transpose": (lambda x: x.transpose(1, -1).mT.swapaxes(0, 1).swapdims(0, 1), (8,)),
    "movedim": (lambda x: x.movedim(1, -1).movedim((1, 2), (3, 1)), (8,)),
    "squeeze, unsqueeze": (lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(), (8,)),
    "flatten": (lambda x: x.flatten(1, 2), (8,)),
    "reshape": (lambda x: x.reshape(2, -1), (8,)),
    "view and back": (lambda x: x.view(2, x.shape[1], 16).view(*x.shape), (8,)),
    "view into a half and two": (lambda x: x.view(2, x.shape[1] // 2, 2, 16), (4,)),
    "view with literals": (lambda x: x.view(2, 4, 2, 16), ()),
    "unflatten": (lambda x: x.unflatten(1, (2, -1)).sum(1), (4,)),
    "chunk": (gate_halves, (4,)),
    "glu": (lambda x: F.glu(x, 1), (4,)),
    "split by a number": (lambda x: sum(x.split(x.shape[1] // 4, 1)), (2,)),
    "split by a literal": (lambda x: sum(x.split(2, 1)), ()),
    "split by a list": (lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1), ()),
    "unequal parts": (lambda x: torch.cat(x.split(5, 1)[::-1], 1), ()),
    "tensor_split": (lambda x: sum(torch.tensor_split(x, 2, 1)), (4,)),
    "cat": (lambda x: torch.cat([x, x.relu(), x[:, :, :1].expand_as(x)], 1), (8,)),
    "cat of places": (lambda x: torch.cat([x, x], -1), (8,)),
    "meshgrid": (lambda x: grid(x, "ij"), (8,)),
    "meshgrid, first two swapped": (lambda x: grid(x, "xy"), (8,)),
    "stack": (lambda x: torch.stack([x, x * x], 1), (8,)),
    "slice of places": (lambda x: x[:, :, 1:, ::2], (8,)),
    "first four": (lambda x: x[:, :4], (4,)),
    "last two": (lambda x: x[:, -2:], (6,)),
    "first half": (lambda x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :], (4,)),
    "every second": (lambda x: x[:, ::2], (4,)),
    "every third": (lambda x: x[:, ::3], ()),
    "narrow": (lambda x: x.narrow(1, 2, 3), ()),
    "narrow places": (lambda x: x.narrow(2, 1, 2), (8,)),
    "one channel": (lambda x: x[:, 3], ()),
    "one place": (lambda x: x[:, :, 0], (8,)),
    "unbind": (lambda x: sum(x.unbind(1)), ()),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), (8,)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), (8,)),
    "expand": (lambda x: x.unsqueeze(1).expand(2, 3, *x.shape[1:]), (8,)),
    "roll channels": (lambda x: x.roll(1, 1), ()),
    "roll places": (lambda x: x.roll((1, 1), (2, 3)), (8,)),
    "flip, cumsum of places": (lambda x: x.flip(2).cumsum(3), (8,)),
    "sort channels": (lambda x: x.sort(1).values, ()),
    "topk of places": (lambda x: x.topk(2, -1).values, (8,)),
    "index_select channels": (lambda x: x.index_select(1, torch.tensor([0, 2])), ()),
    "index_select places": (lambda x: x.index_select(2, torch.tensor([0, 2])), (8,)),
    "index channels": (lambda x: x[:, torch.tensor([0, 2])], ()),
    "index places": (lambda x: x[..., torch.tensor([0, 2]), torch.tensor([1, 1])], (8,)),
    "gather channels": (lambda x: x.gather(1, torch.zeros(2, 1, 4, 4, dtype=torch.long)), ()),
    "gather places": (lambda x: x.gather(2, ROWS.expand(2, x.shape[1], 2, 4)), (8,)),
    "gather places, by literals": (lambda x: x.gather(2, ROWS.expand(2, 8, 2, 4)), ()),
    "gather some channels": (lambda x: x.gather(2, ROWS.expand(2, 5, 2, 4)), ()),
    "gather by order": (lambda x: x.gather(2, x.argsort(2)), (8,)),
    "take_along_dim": (lambda x: torch.take_along_dim(x, x.argsort(2, descending=True), 2), (8,)),
    "take_along_dim, one index for all": (lambda x: torch.take_along_dim(x, ROWS[None, None], 2), (8,)),
    "scatter": (lambda x: torch.zeros_like(x).scatter(2, ROWS.expand(2, x.shape[1], 2, 4), x[:, :, 2:]), (8,)),
    "scatter a number": (lambda x: x.scatter(2, ROWS.expand(2, x.shape[1], 2, 4), 2.0), (8,)),
    "scatter_add": (lambda x: x.scatter_add(3, x.argsort(3), x.relu()), (8,)),
    "scatter channels": (lambda x: x.scatter_add(1, torch.zeros(2, 8, 4, 4, dtype=torch.long), x), ()),
    "scatter_reduce": (lambda x: x.scatter_reduce(3, x.argsort(3), x.relu(), "amax"), (8,)),
    "index_add": (lambda x: x.index_add(2, torch.tensor([0, 2]), x[:, :, 1:3], alpha=2), (8,)),
    "index_add channels": (lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, 1:3]), ()),
    "index_copy, index_fill": (
        lambda x: x.index_copy(3, torch.tensor([1]), x[..., :1]).index_fill(2, torch.tensor([3]), 0.5),
        (8,),
    ),
    "index_put a number": (lambda x: put_values(x, (slice(None), slice(None), torch.tensor([0, 2])), 2.0), (8,)),
    "index_put by a mask": (lambda x: put_values(x, (slice(None), slice(None), MASK), 2.0), (8,)),
    "index_put by a mask of everything": (lambda x: put_values(x, (x > 0,), 2.0), ()),
    "index_put values": (
        lambda x: put_values(x, (slice(None), slice(None), torch.tensor([0, 2])), x[:, :, 2:].relu()),
        (8,),
    ),
    "index_put a number by a mask and a number": (
        lambda x: put_values(x, (torch.arange(2), slice(None), MASK), 2.0),
        (8,),
    ),
    "index_put a token by a mask": (lambda x: put_values(x.movedim(1, -1), (BOARD,), x[0, :, 0, 0]), (8,)),
    "index_put tokens by a mask": (
        lambda x: put_values(x.movedim(1, -1), (BOARD,), x[0, :, 0, :1].mT.repeat(8, 1)),
        (),
    ),
    "index_put a token of each": (
        lambda x: put_values(x.movedim(1, -1), (torch.arange(2), torch.tensor([1, 3])), x[:, :, 0].mT),
        (8,),
    ),
    "select_scatter, slice_scatter": (
        lambda x: x.select_scatter(x[:, :, 1].relu(), 2, 0).slice_scatter(x[..., 2:].exp(), 3, 1, 3),
        (8,),
    ),
    "index_put channels": (lambda x: put_values(x, (slice(None), torch.tensor([0, 2])), x[:, 2:4]), ()),
    "hstack, vstack": (lambda x: torch.vstack([torch.hstack([x, x.relu()]), torch.hstack([x, x])])[:2], (8,)),
    "hstack, vstack of vectors": (
        lambda x: x * torch.vstack([x[0, :, 0, 0], x[0, :, 1, 1]])[:1, :, None, None] + torch.hstack([x[0, 0, 0]] * 1),
        (),
    ),
    "column_stack": (lambda x: x * torch.column_stack([x[0, :, 0], x[0, :, 1, 1]])[:, 1:, None], (8,)),
    "dstack": (lambda x: torch.dstack([x, x.relu()]), (8,)),
    "dstack of matrices": (lambda x: x * torch.dstack([x[0, :, 0], x[0, :, 1]])[None, ..., :1], (8,)),
    "vstack, column_stack of numbers": (
        lambda x: x * (torch.vstack([x.mean(), x.amax()]) + torch.column_stack([x.mean(), x.amax()])).sum(),
        (8,),
    ),
    "of a number": (
        lambda x: x * x.mean().gather(0, torch.tensor(0)) * x.mean().index_select(0, torch.tensor([0])),
        (8,),
    ),
    "floor_divide": (lambda x: torch.floor_divide(x, 0.5), (8,)),
    "median over places": (lambda x: x - x.flatten(2).median(2).values[..., None, None], (8,)),
    "median over channels": (lambda x: x - x.median(1, keepdim=True).values, (8,)),
    "max_unpool2d": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (8,)),
    "tensordot": (lambda x: torch.tensordot(x, x.mean(0), dims=([2, 3], [1, 2])), (8,)),
    "max_unpool3d": (
        lambda x: F.max_unpool3d(*F.max_pool3d(x[:, :, None], (1, 2, 2), return_indices=True), (1, 2, 2)),
        (8,),
    ),
    "tensordot with itself": (lambda x: x * torch.tensordot(x, x, dims=([2, 3], [2, 3]))[0, 0, 0].mean(), ()),
    "tensordot of what has one slot": (
        lambda x: x * torch.tensordot(x.mean((1, 2, 3))[:1, None], x.sigmoid(), dims=([1], [1]))[0, :1, :1, :1],
        (8,),
    ),
    "einsum of what has one slot": (
        lambda x: torch.einsum("bchw,bchw,bchw->bchw", x.mean(1, keepdim=True), x, x.relu()),
        (8,),
    ),
    "einsum that sums over one slot": (
        lambda x: x * torch.einsum("bchw,bchw->bhw", x.mean(1, keepdim=True), x.sigmoid())[:, None],
        (8,),
    ),
    "tensordot of channels": (lambda x: torch.tensordot(x, x[0], dims=([1], [0])), (8,)),
    "bilinear": (
        lambda x: F.bilinear(x.flatten(2).mT, x.flatten(2).mT, x[0, :, 0, :3].T[:, :, None] * x[0, :, 1, 0]),
        (8,),
    ),
    "affine_grid": (
        lambda x: F.grid_sample(
            x, F.affine_grid(torch.eye(2, 3).repeat(2, 1, 1), [2, 1, 4, 4], align_corners=False), align_corners=False
        ),
        (8,),
    ),
    "embedding_bag": (lambda x: x * F.embedding_bag(torch.tensor([[0, 1]]), x[0, :, 0].T).mean(), (8,)),
    "softmax over channels": (lambda x: x.softmax(1), (8,)),
    "softmax over places": (lambda x: x.flatten(2).softmax(-1), (8,)),
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), (8,)),
    "sum, amax over channels": (lambda x: torch.stack([x.sum(1), x.amax(1), x.logsumexp(1)]).mean(0), (8,)),
    "max with places": (lambda x: x.max(1).values, (8,)),
    "max of two": (lambda x: torch.max(x, x * 2), (8,)),
    "var, std": (lambda x: x.var(1, keepdim=True) + x.std((2, 3), keepdim=True), (8,)),
    "fourier over places": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x, dim=(2, 3)) * 0.5, dim=(2, 3)), (8,)),
    "fourier over channels": (lambda x: torch.fft.fft(torch.fft.fft(x, dim=1), dim=-1).real, ()),
    "fourier over everything": (lambda x: torch.fft.fftn(x).abs(), ()),
    "fftshift": (lambda x: torch.fft.fftshift(x, dim=(2,)) * torch.fft.ifftshift(x, dim=-1), (8,)),
    "complex": (lambda x: torch.complex(x, x * 2).conj().imag + torch.polar(x.abs(), x).real, (8,)),
    "complex view of places": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:3], 2, 2))), (8,)),
    "complex view of channels": (
        lambda x: torch.view_as_complex(x.flatten(2).mT.contiguous().view(2, 16, 4, 2)).abs(),
        (),
    ),
    "outer": (lambda x: x * torch.outer(x.mean((0, 2, 3)), x.mean((0, 1, 3)))[:, :, None], (8,)),
    "norm": (lambda x: x / x.norm(dim=1, keepdim=True) + F.normalize(x, dim=1), (8,)),
    "diff of places": (lambda x: x.diff(dim=2), (8,)),
    "diff of channels": (lambda x: x.diff(dim=1), ()),
    "cdist": (lambda x: torch.cdist(x.flatten(2).mT, x.flatten(2).mT.relu()), (8,)),
    "cdist of channels": (lambda x: torch.cdist(x.flatten(2), x.flatten(2).relu()), (8,)),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, x.relu() + 1, dim=1), (8,)),
    "layer_norm": (normalise_channels, (8,)),
    "rms_norm": (lambda x: F.rms_norm(x.transpose(1, 3), (x.shape[1],)), (8,)),
    "group_norm, groups by a literal": (lambda x: F.group_norm(x, 2), (4,)),
    "instance_norm": (F.instance_norm, (8,)),
    "pad places": (lambda x: F.pad(x, (1, 1, 0, 1)), (8,)),
    "pad places, reflected": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), (8,)),
    "pad channels by literals": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), (8,)),
    "crop channels by padding": (lambda x: F.pad(x, (0, 0, 0, 0, -1, -1)), ()),
    "pools": (lambda x: F.avg_pool2d(F.max_pool2d(x, 2, 1), 2, 1), (8,)),
    "adaptive pools": (lambda x: F.adaptive_max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2), (8,)),
    "pool over channels": (lambda x: F.avg_pool1d(x.flatten(2).transpose(1, 2), 2), ()),
    "pools of three": (lambda x: F.max_pool3d(x.unsqueeze(2), (1, 2, 2)), (8,)),
    "interpolate": (lambda x: F.interpolate(F.interpolate(x, scale_factor=2), size=(3, 3), mode="bilinear"), (8,)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (2,)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (8,)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (4,)),
    "unfold": (lambda x: F.unfold(x, 2), (8,)),
    "fold": (lambda x: F.fold(F.unfold(x.relu(), 2) * 2, 4, 2), (8,)),
    "tril": (lambda x: x.transpose(1, 2).tril(), ()),
    "matmul": (lambda x: x.flatten(2) @ x.flatten(2).mT, (8,)),
    "bmm, baddbmm": (lambda x: torch.baddbmm(torch.ones(4), x[:, :, 0].mT, x[:, :, 0]).bmm(x[:, :, 1].mT), (8,)),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x.relu()), (8,)),
    "einsum over channels": (lambda x: torch.einsum("bchw, bchw -> bhw", x, x.exp()), (8,)),
    "einsum with dots": (lambda x: torch.einsum("...c,...c->...", x.movedim(1, -1), x.movedim(1, -1)), (8,)),
    "einsum without an arrow": (lambda x: torch.einsum("bchw,dhw", x, x[0]), (8,)),
    "attention": (attention, (8,)),
    "grouped queries": (grouped_queries, (2,)),
}

REWRITTEN: dict[str, tuple[int, ...]] = {
    # Name: the units if the operator's ints may be written anew, where that makes a difference.
    "complex view of channels": (4,),
    "view into a half and two": (4, 2),
    "view with literals": (4, 2),
    "unflatten": (2, 4),
    "split by a literal": (2,),
    "split by a list": (2, 6),
    "first four": (4, 4),
    "last two": (6, 2),
    "group_norm, groups by a literal": (2, 4),
    "grouped queries": (2, 2, 2),
}


def net_with(name: str) -> nn.Module:
    operator = CASES[name][0]
    with torch.no_grad():
        inside = operator(torch.randn(2, CHANNELS, 4, 4)).flatten(1).shape[1]
    return randomised(Between(operator, inside).eval())


@pytest.mark.parametrize(
    ("name", "swap", "expected"),
    [
        *((name, False, units) for name, (_, units) in CASES.items()),
        *((name, True, REWRITTEN.get(name, units)) for name, (_, units) in CASES.items()),
    ],
)
def test_a_rule_tells_the_truth(name: str, swap: bool, expected: tuple[int, ...]) -> None:
    model, inputs = net_with(name), (images(),)
    structure = analyze(trace(model, inputs), swap=swap, required=False)
    units = tuple(group.size for group in structure.groups if ("conv.weight", 0) in group.members)
    assert units == expected
    assert_permuted_output_is_the_same(model, structure, *inputs)
    for seed in range(3):
        random = np.random.default_rng(seed)
        keep = {g.name: random.permutation(g.size)[: random.integers(1, g.size)].tolist() for g in structure.groups}
        plan = structure.plan(keep)
        assert verify(structure, model, apply_plan(model, plan), plan, (inputs, {})).error <= 1e-4


@every_net
def test_units_can_change_places(net: Net) -> None:
    assert_permuted_output_is_the_same(net.model(), structure_of(net.name), *net.args, **net.kwargs)


def assert_permuted_output_is_the_same(model: nn.Module, structure: Structure, *args: Tensor, **kwargs: Tensor) -> None:
    before = outputs(model, *args, **kwargs)
    moved = 0
    labels = shuffle_labels(structure)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, dims in structure.layout.tensors.items():
            for place, dim in enumerate(dims):
                order = slot_order(dim, labels)
                moved += int((order != np.arange(len(order))).sum())
                tensors[name].copy_(tensors[name].index_select(place, torch.from_numpy(order)))
    assert moved > 0 or not structure.groups
    for mine, theirs in zip(outputs(model, *args, **kwargs), before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def outputs(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(*(arg.clone() for arg in args), **kwargs)
    return list(found.values()) if isinstance(found, dict) else [found]


def shuffle_labels(structure: Structure) -> np.ndarray:
    """Label -> the label of the same group that takes its place; no unit stays where it is."""
    labels = np.arange(len(structure.layout.group_of))
    for group in structure.groups:
        mine = np.flatnonzero(structure.layout.group_of == group.index)
        labels[mine] = np.random.default_rng(group.index).permutation(mine)
        if group.size > 1 and (labels[mine] == mine).all():
            labels[mine] = np.roll(mine, 1)
    return labels


def slot_order(dim: Dim, labels: np.ndarray) -> np.ndarray:
    """Slot -> the slot that moves there: the same occurrence of what its labels became."""
    seen: dict[tuple[int, ...], int] = {}
    place: dict[tuple[tuple[int, ...], int], int] = {}
    for slot, column in enumerate(dim.T):
        now = tuple(column.tolist())
        seen[now] = seen.get(now, -1) + 1
        place[now, seen[now]] = slot
    return np.array([place[tuple(labels[list(now)].tolist()), occurrence] for now, occurrence in place])


def test_every_rule_takes_part_in_a_test() -> None:
    """A rule that is added without a case here fails."""
    seen = set()
    for name in CASES:
        seen |= {base_name(op) for op in trace(net_with(name), (images(),)).ops()}
    seen |= {base_name(op) for op in trace(weight_norm_net(), (images(),)).ops()}
    for net in NETS:
        seen |= {base_name(op) for op in structure_of(net.name).graph.ops()}
    by_alias = {name for name in RULES if any(RULES[name] is RULES.get(other) for other in seen)}
    assert sorted(set(RULES) - by_alias) == []


@pytest.mark.parametrize(
    ("make", "shape", "channels"),
    [
        (lambda: nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.ConvTranspose3d(6, 2, 2)), (1, 2, 4, 4, 4), 1),
        (lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 2, 2)), (1, 2, 6), 1),
        (lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 2, 2, groups=2)), (2, 6), 0),
        (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 2, groups=6)), (2, 6, 6), 0),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 2, groups=4)), (1, 2, 6, 6), 1),
    ],
)
def test_convolutions_of_every_kind(make: Callable[[], nn.Module], shape: tuple[int, ...], channels: int) -> None:
    """Of every dimension, transposed, grouped, with and without a batch, with a multiplier."""

    class Ended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mean(channels) * self.scale

    model, inputs = randomised(Ended().eval()), (torch.randn(shape),)
    structure = analyze(trace(model, inputs))
    assert_permuted_output_is_the_same(model, structure, *inputs)
    plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups})
    assert verify(structure, model, apply_plan(model, plan), plan, (inputs, {})).error <= 1e-5


def test_a_weight_that_is_computed_shrinks_with_its_parts() -> None:
    """Weight standardisation and weight normalisation: the weight of the operator is no parameter."""

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 1))
            self.conv = nn.Conv1d(6, 5, 1)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.g * self.v / (self.v.norm(dim=1, keepdim=True) + 1e-6)
            x = F.linear(x, weight).mT
            kernel = self.conv.weight
            kernel = (kernel - kernel.mean(1, keepdim=True)) / (kernel.std(1, keepdim=True, unbiased=False) + 1e-5)
            return self.head(F.conv1d(x, kernel, self.conv.bias).mean(-1))

    model, inputs = randomised(Computed().eval()), (sequence(4),)
    structure = analyze(trace(model, inputs))
    assert [(group.name, group.size) for group in structure.groups] == [("g", 6), ("conv", 5)]
    assert_permuted_output_is_the_same(model, structure, *inputs)
    plan = structure.plan({"g": [0, 2, 5], "conv": [1, 3]})
    assert verify(structure, model, apply_plan(model, plan), plan, (inputs, {})).error <= 1e-5


def weight_norm_net() -> nn.Module:
    """Directions and lengths for each output, and for each input."""
    normed = nn.utils.parametrizations.weight_norm
    return nn.Sequential(normed(nn.Conv2d(3, 6, 3)), nn.Tanh(), normed(nn.Conv2d(6, 5, 1), dim=1), nn.Conv2d(5, 2, 3))


def test_weight_norm_of_torch() -> None:
    model, inputs = randomised(weight_norm_net().eval()), (images(),)
    structure = analyze(trace(model, inputs))
    assert [(group.kind, group.size) for group in structure.groups] == [("channels", 6), ("channels", 5)]
    assert_permuted_output_is_the_same(model, structure, *inputs)
    one, other = structure.groups
    for keep in ({one.name: [0, 4]}, {other.name: [1, 2]}, {one.name: [5], other.name: [0, 3, 4]}):
        plan = structure.plan(keep)
        proof = verify(structure, model, apply_plan(model, plan), plan, (inputs, {}))
        assert proof.error <= 1e-5 and proof.crossed


def test_arguments_are_named_and_complete() -> None:
    graph = trace(net_with("softmax over channels"), (images(),))
    (node,) = (node for node in graph.nodes.values() if base_name(node.op) == "softmax")
    assert list(arguments(node)) == ["self", "dim", "dtype"]
    assert arguments(node)["dim"] == 1 and arguments(node)["dtype"] is None


def test_crossings_name_what_is_computed() -> None:
    kinds = {}
    for name in ("softmax over channels", "softmax over places", "mean over channels", "layer_norm", "matmul"):
        flow = flow_of(trace(net_with(name), (images(),)))
        kinds[name] = sorted(set(flow.crossings.values()))
    assert kinds == {
        "softmax over channels": ["softmax"],
        "softmax over places": [],
        "mean over channels": ["reduction"],
        "layer_norm": ["norm"],
        "matmul": [],
    }


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight: F.linear(x, weight.T),
        lambda x, weight: x @ weight,
        lambda x, weight: F.bilinear(x, x, weight.T[:, :, None] * weight[:, 0]),
    ],
)
def test_a_weight_that_is_computed_may_be_zero_nowhere(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The masked original computes it over the kept slots then."""

    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return product(self.fc(x).sigmoid(), F.softplus(self.weight))

    model, inputs = Positive().eval(), (torch.randn(2, 4),)
    structure = analyze(trace(model, inputs))
    assert [group.size for group in structure.groups] == [6]
    plan = structure.plan({structure.groups[0].name: [0, 2, 3]})
    assert verify(structure, model, apply_plan(model, plan), plan, (inputs, {})).error <= 1e-5
