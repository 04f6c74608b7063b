"""Two models are compared on inputs that are like the example's, and every kind of difference counts."""

import pytest
import torch
from torch import nn

from idap.surgery.compare import batch_size, difference, fresh_inputs, largest_difference, outputs_of, resize_inputs


class Takes(nn.Module):
    def forward(self, x, keep_mask=None, *, ids=None, table=None, scale=1):
        return x


def test_fresh_inputs_are_like_the_example():
    example = (torch.rand(64, 3) * 2 + 1,)
    ids = torch.randint(5, 9, (64, 7))
    named = {"ids": ids, "table": torch.randn(4, 2), "scale": 3}
    (x,), kwargs = fresh_inputs(Takes(), example, named, batch=500, seed=0)
    assert x.shape == (500, 3) and kwargs["ids"].shape == (500, 7)
    assert abs(float(x.mean()) - 2) < 0.1 and abs(float(x.std()) - 0.57) < 0.1
    assert float(x.min()) >= 1 and float(x.max()) <= 3
    assert set(kwargs["ids"].flatten().tolist()) == {5, 6, 7, 8} and kwargs["ids"].dtype is ids.dtype
    assert kwargs["table"].shape == (4, 2) and not torch.equal(kwargs["table"], named["table"])
    assert kwargs["scale"] == 3


def test_fresh_inputs_follow_their_seed():
    example = (torch.randn(2, 3),)
    first, same, other = (fresh_inputs(Takes(), example, {}, batch=None, seed=seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other) and first.shape == (2, 3)


@pytest.mark.parametrize("place", ["by place", "by name", "bool"])
def test_masks_stay(place):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    args = (torch.randn(2, 3), mask) if place == "by place" else (torch.randn(2, 3),)
    named = {"by place": {}, "by name": {"keep_mask": mask}, "bool": {"ids": mask.bool()}}[place]
    args, named = fresh_inputs(Takes(), args, named, batch=3, seed=0)
    found = {"by place": args[-1], "by name": named.get("keep_mask"), "bool": named.get("ids")}[place]
    assert found.tolist() == [mask[0].tolist(), mask[1].tolist(), mask[0].tolist()]


def test_a_constant_example_still_gives_different_samples():
    (x,), _ = fresh_inputs(Takes(), (torch.zeros(1, 3, 4, 4),), {}, batch=2, seed=0)
    assert float(x.std()) > 0.5 and not torch.equal(x[0], x[1])
    (x, y), _ = fresh_inputs(Takes(), (torch.zeros(2, 0), torch.ones(2, dtype=torch.complex64)), {}, batch=None, seed=0)
    assert x.shape == (2, 0) and y.dtype is torch.complex64


def test_batch_sizes():
    assert batch_size((3, torch.ones(()), [torch.ones(5, 2)]), {}) == 5
    assert batch_size((), {"a": 1}) is None
    (x,), named = resize_inputs((torch.arange(2),), {"y": {"z": torch.ones(2, 2)}, "k": torch.ones(3)}, 5)
    assert x.tolist() == [0, 1, 0, 1, 0]
    assert named["y"]["z"].shape == (5, 2) and named["k"].shape == (3,)


def test_differences():
    one = torch.tensor([1.0, float("inf"), float("nan")])
    assert difference(one, one) == 0
    assert difference(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([torch.ones(2, 3), torch.ones(1)], "it returns 2 tensors, the model 1"),
        ([torch.ones(3, 2)], "output 0 is torch.float32 of shape (3, 2), that of the model torch.float32 of shape"),
        ([torch.ones(2, 3).double()], "output 0 is torch.float64"),
        ([torch.full((2, 3), 1.5)], "output 0 differs by 0.5 of its largest value"),
    ],
)
def test_what_differs_is_said(returned, said):
    error, found = largest_difference(nn.Identity(), lambda _args, _kwargs: returned, ((torch.ones(2, 3),), {}))
    assert error >= 0.5 and said in found


def test_running_a_model_leaves_it_and_its_inputs():
    class InPlace(nn.Module):
        def forward(self, x):
            return {"a": x.add_(1), "b": (None, x * 2)}

    model, x = InPlace().train(), torch.zeros(2)
    assert [found.tolist() for found in outputs_of(model, (x,), {})] == [[1, 1], [2, 2]]
    assert model.training and x.tolist() == [0, 0]
