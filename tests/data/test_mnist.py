"""Sets in the form of MNIST: the same from npz and from idx files, and refused where an array is wrong."""

import gzip

import numpy as np
import pytest
import torch

from idap.data.mnist import mnist, mnist_classes, read_idx
from idap.errors import ConfigError, TaskError
from tests.data import small_data

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def arrays():
    images, labels = small_data.grey_images(40)
    others, answers = small_data.grey_images(10, 1)
    return {"x_train": images, "y_train": labels, "x_test": others, "y_test": answers}


def as_idx(folder, *, packed):
    folder.mkdir()
    for name, array in zip(NAMES, arrays().values(), strict=True):
        content = small_data.idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def test_npz_and_idx_give_the_same(tmp_path):
    np.savez(tmp_path / "m.npz", **arrays())
    sets = [
        mnist(place, val_share=0.25)
        for place in (
            tmp_path / "m.npz",
            tmp_path,
            as_idx(tmp_path / "idx", packed=False),
            as_idx(tmp_path / "gz", packed=True),
        )
    ]
    for found in sets:
        assert (found.num_classes, found.shape) == (2, (1, 8, 8))
        assert [len(part.tensors[0]) for part in (found.train, found.val, found.test)] == [30, 10, 10]
        assert torch.equal(found.val.tensors[0], sets[0].val.tensors[0])
        assert found.train.tensors[0].mean().item() == pytest.approx(0, abs=1e-5)
        assert found.train.tensors[0].std().item() == pytest.approx(1, abs=1e-5)
        assert found.notes[0].startswith("there is no validation data: 10 of the 40 training images")
    assert mnist_classes(tmp_path / "m.npz") == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_test": None}, "lacks the array x_test; it holds x_train, y_train, y_test"),
        ({"x_train": np.zeros((40, 8), dtype=np.uint8)}, r"x_train is torch\.uint8 of shape \(40, 8\), expected grey"),
        ({"y_train": np.zeros(3, dtype=np.uint8)}, r"y_train .* expected one class number from 0 for each of the 40"),
        ({"y_test": np.full(10, 9, dtype=np.uint8)}, "label 9 of y_test is not in y_train"),
    ],
)
def test_wrong_arrays(tmp_path, change, text):
    kept = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "m.npz", **kept)
    with pytest.raises(TaskError, match=text):
        mnist(tmp_path / "m.npz")


def test_wrong_files(tmp_path):
    with pytest.raises(TaskError, match=r"none\.npz does not exist, expected a \.npz file"):
        mnist(tmp_path / "none.npz")
    with pytest.raises(TaskError, match="lacks train-images-idx3-ubyte; expected train-images"):
        mnist(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(TaskError, match=r"bad\.npz can't be read as \.npz"):
        mnist(tmp_path / "bad.npz")
    (tmp_path / "cut").write_bytes(small_data.idx(np.zeros((3, 4)))[:-1])
    with pytest.raises(TaskError, match="cut is truncated, or not an idx file"):
        read_idx(tmp_path / "cut")


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001])
def test_the_share_that_decides_is_checked(tmp_path, share):
    np.savez(tmp_path / "m.npz", **arrays())
    with pytest.raises(ConfigError, match="val_share"):
        mnist(tmp_path / "m.npz", val_share=share)


def test_the_real_digits(real_data):
    found = mnist(real_data / "mnist.npz")
    assert [len(part.tensors[1]) for part in (found.train, found.val, found.test)] == [54000, 6000, 10000]
    assert (found.num_classes, found.shape) == (10, (1, 28, 28))
