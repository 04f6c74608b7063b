"""Batches of every usual layout are understood, others are refused with the way out."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from idap.errors import TaskError
from idap.training.batch import default_inputs, default_labels, default_logits, default_size, describe, device_of, move

X = torch.zeros(2, 3)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, ((X,), {})),
        ((X, Y), ((X,), {})),
        ([X, Y], ((X,), {})),
        ({"input_ids": X, "mask": Y, "labels": Y}, ((), {"input_ids": X, "mask": Y})),
        ({"pixels": X, "label": Y}, ((), {"pixels": X})),
    ],
)
def test_inputs_of_each_layout(batch, expected):
    args, kwargs = default_inputs(batch)
    assert [id(value) for value in args] == [id(value) for value in expected[0]]
    assert {key: id(value) for key, value in kwargs.items()} == {key: id(value) for key, value in expected[1].items()}


@pytest.mark.parametrize(("batch", "named"), [("text", "a str"), ((), r"a tuple of \(\)")])
def test_unknown_layout_is_refused(batch, named):
    with pytest.raises(TaskError, match=rf"a batch is {named}; expected .* Pass inputs="):
        default_inputs(batch)


@pytest.mark.parametrize("outputs", [X, SimpleNamespace(logits=X), {"logits": X}, (X, Y), [X]])
def test_logits_of_each_layout(outputs):
    assert default_logits(outputs) is X


@pytest.mark.parametrize("outputs", [{"out": X}, (), ("a", X), SimpleNamespace(logits=None), 3])
def test_outputs_without_logits_are_refused(outputs):
    with pytest.raises(TaskError, match=r"no logits found in the model's outputs, which are .* Pass logits="):
        default_logits(outputs)


@pytest.mark.parametrize("batch", [(X, Y), [X, Y, X], {"x": X, "labels": Y}, {"x": X, "label": Y}])
def test_labels_of_each_layout(batch):
    assert default_labels(batch) is Y


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}, (X, [0, 1])])
def test_batch_without_labels_is_refused(batch):
    with pytest.raises(TaskError, match=r"no labels found in a batch, which is .*; expected \(input, labels\)"):
        default_labels(batch)


@pytest.mark.parametrize("batch", [X, (X, Y), {"name": "a", "x": [X]}, ["a", torch.tensor(1.0), {"x": Y}]])
def test_size_is_that_of_the_first_tensor_with_a_dimension(batch):
    assert default_size(batch) == 2


def test_size_of_a_batch_without_tensors_is_refused():
    with pytest.raises(TaskError, match=r"a batch is a list of \(a str\), so its size is not known\. Pass size="):
        default_size(["a"])


def test_move_keeps_the_nesting_and_what_is_no_tensor():
    pair = namedtuple("pair", "x name")
    moved = move({"a": (X, [Y, "text"]), "b": pair(X, None)}, "meta")
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["a"][1][1] == "text"
    assert isinstance(moved["b"], pair)
    assert moved["b"].x.is_meta
    assert moved["b"].name is None


def test_move_leaves_the_batch_alone():
    batch = {"x": X}
    move(batch, "meta")
    assert not batch["x"].is_meta


def test_device_is_that_of_parameters_then_buffers_then_the_cpu():
    assert device_of(torch.nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(torch.nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert device_of(torch.nn.ReLU()).type == "cpu"


def test_long_values_are_described_shortly():
    assert describe([1, "a", 2.0, 3]) == "a list of (an int, a str, a float, ...)"
