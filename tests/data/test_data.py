"""Loaders yield what they hold; data sets are split without overlap, decoded exactly and the same each time."""

import builtins
import hashlib

import numpy as np
import pytest
import torch

from idap.data.tensors import TensorLoader, cifar10, crop_and_flip, digits, normalise, read_delta_images
from idap.errors import ConfigError, TaskError


class TestTensorLoader:
    x, y = torch.arange(10.0), torch.arange(10) * 2

    def test_batches_in_order_and_again(self):
        loader = TensorLoader((self.x, self.y), 4)
        for _ in range(2):
            batches = list(loader)
            assert [len(first) for first, _ in batches] == [4, 4, 2]
            assert torch.equal(torch.cat([first for first, _ in batches]), self.x)
            assert torch.equal(torch.cat([second for _, second in batches]), self.y)

    @pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
    def test_length_is_the_number_of_batches(self, drop_last, sizes):
        loader = TensorLoader((self.x,), 4, drop_last=drop_last)
        assert [len(batch[0]) for batch in loader] == sizes
        assert len(loader) == len(sizes)

    def test_shuffling_keeps_pairs_and_follows_the_global_seed(self):
        loader = TensorLoader((self.x, self.y), 10, shuffle=True)
        torch.manual_seed(0)
        [(x, y)], [(again, _)] = list(loader), list(loader)
        assert not torch.equal(x, again)
        assert torch.equal(x * 2, y)
        assert torch.equal(x.sort().values, self.x)
        torch.manual_seed(0)
        assert torch.equal(next(iter(loader))[0], x)

    def test_augment_changes_the_first_tensor_only(self):
        [(x, y)] = TensorLoader((self.x, self.y), 10, augment=lambda part: part + 1)
        assert torch.equal(x, self.x + 1)
        assert torch.equal(y, self.y)

    def test_mistakes_are_refused(self):
        with pytest.raises(TaskError, match=r"one or more tensors of equal length, got lengths \[10, 3\]"):
            TensorLoader((self.x, self.y[:3]), 4)
        with pytest.raises(TaskError, match=r"got lengths \[\]"):
            TensorLoader((), 4)
        with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
            TensorLoader((self.x,), 0)


class TestDigits:
    def parts(self, **settings):
        found = digits(**settings)
        return found, [loader.tensors for loader in (found.train, found.val, found.test)]

    def test_shapes_sizes_and_scale(self):
        found, parts = self.parts(batch_size=32)
        assert [tuple(images.shape) for images, _ in parts] == [(1078, 1, 8, 8), (359, 1, 8, 8), (360, 1, 8, 8)]
        assert (found.num_classes, found.shape) == (10, (1, 8, 8))
        images, labels = next(iter(found.train))
        assert (images.shape, images.dtype, labels.dtype) == ((32, 1, 8, 8), torch.float32, torch.int64)
        assert parts[0][0].mean().item() == pytest.approx(0, abs=1e-5)
        assert parts[0][0].std().item() == pytest.approx(1, abs=1e-5)

    def test_every_part_has_the_same_share_of_each_class(self):
        _, parts = self.parts()
        counts = torch.stack([torch.bincount(labels, minlength=10) / len(labels) for _, labels in parts])
        assert (counts - counts.mean(0)).abs().max() < 0.003

    def test_parts_are_disjoint_and_complete(self):
        from sklearn.datasets import load_digits

        _, parts = self.parts()
        kept = torch.cat([images for images, _ in parts]).flatten(1)
        pixels = ((kept - kept.min()) / (kept.max() - kept.min()) * 16).round()
        found, expected = (sorted(map(tuple, rows.tolist())) for rows in (pixels, torch.tensor(load_digits().data)))
        assert found == expected

    def test_the_seed_decides_the_split(self):
        _, first = self.parts()
        _, second = self.parts()
        _, other = self.parts(seed=1)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[1][1], other[1][1])

    def test_missing_scikit_learn_names_the_command(self, monkeypatch):
        real_import = builtins.__import__

        def no_sklearn(name, *args, **kwargs):
            if name.startswith("sklearn"):
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", no_sklearn)
        with pytest.raises(TaskError, match=r"scikit-learn, which is missing\. Run: pip install 'idap\[demo\]'"):
            digits()


def write_delta(file, images, labels):
    """Store uint8 RGB `(N, 3, H, W)` the way the reader expects, by the inverse of its steps."""
    r, g, b = images.transpose(1, 0, 2, 3)
    planes = np.stack([r - g, g, b - g])
    for axis in (3, 2):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0))
    np.savez_compressed(file, delta=planes, labels=labels, classes=np.array(["a"] * 10))


@pytest.fixture
def folder(tmp_path):
    """A CIFAR-10 of 40 training and 12 test images of noise; the label of image i is i modulo 10."""
    noise = np.random.default_rng(0)
    images = {}
    for name, count in (("train", 40), ("test", 12)):
        images[name] = noise.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        write_delta(tmp_path / f"cifar10_{name}.npz", images[name], np.arange(count) % 10)
    return tmp_path, images


class TestCifar10:
    def test_decoding_is_exact(self, folder):
        path, images = folder
        found, labels = read_delta_images(path / "cifar10_test.npz")
        assert np.array_equal(found.numpy(), images["test"])
        assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert labels.dtype == torch.int64

    def test_parts(self, folder):
        path, images = folder
        found = cifar10(path, batch_size=8, val_size=10, augment=False)
        scale = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        assert (len(found.train), len(found.val), len(found.test)) == (4, 2, 2)
        assert (found.num_classes, found.shape) == (10, (3, 32, 32))
        assert torch.equal(found.test.tensors[0], normalise(torch.from_numpy(images["test"]), **scale))
        kept = torch.cat([found.train.tensors[0], found.val.tensors[0]]).flatten(1)
        expected = normalise(torch.from_numpy(images["train"]), **scale).flatten(1)
        assert sorted(map(tuple, kept.tolist())) == sorted(map(tuple, expected.tolist()))

    def test_the_seed_decides_the_split_with_and_without_augmentation(self, folder):
        labels = [
            cifar10(folder[0], val_size=10, seed=seed, augment=augment).val.tensors[1].tolist()
            for seed, augment in ((0, True), (0, False), (1, False))
        ]
        assert labels[0] == labels[1] != labels[2]

    def test_only_training_images_are_augmented(self, folder):
        found = cifar10(folder[0], batch_size=40, val_size=10)
        [(first, _)], [(second, _)] = list(found.train), list(found.train)
        assert first.dtype == torch.float32
        assert first.shape == (30, 3, 32, 32)
        assert not torch.equal(first.sort(0).values, second.sort(0).values)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found.val, found.val, strict=True))

    def test_a_missing_file_is_named(self, folder):
        (folder[0] / "cifar10_test.npz").unlink()
        with pytest.raises(
            TaskError, match=r"cifar10_test\.npz is missing; CIFAR-10 is read from cifar10_train\.npz and"
        ):
            cifar10(folder[0], val_size=10)

    @pytest.mark.parametrize("val_size", [0, 40])
    def test_val_size_is_checked(self, folder, val_size):
        with pytest.raises(ConfigError, match=rf"val_size must be in 1\.\.39, got {val_size}"):
            cifar10(folder[0], val_size=val_size)

    def test_the_real_test_set_is_decoded_to_the_known_bytes(self, real_data):
        images, labels = read_delta_images(real_data / "cifar10_test.npz")
        known = "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56"
        assert hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest() == known
        assert labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]

    def test_the_real_set_loads_whole(self, real_data):
        found = cifar10(real_data)
        assert [len(part.tensors[1]) for part in (found.train, found.val, found.test)] == [45000, 5000, 10000]


def test_crop_and_flip_gives_shifted_or_mirrored_parts_of_the_padded_image():
    torch.manual_seed(0)
    pixels = torch.randint(1, 256, (64, 2, 3, 4), dtype=torch.uint8)
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    moves = set()
    for image, changed in zip(padded, crop_and_flip(pixels, pad=1), strict=True):
        found = [
            (dy, dx, flip)
            for dy in range(3)
            for dx in range(3)
            for flip in (False, True)
            if torch.equal(changed.flip(-1) if flip else changed, image[:, dy : dy + 3, dx : dx + 4])
        ]
        assert len(found) == 1
        moves.update(found)
    assert len(moves) > 12


def test_normalise_scales_each_colour():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    assert normalise(pixels, mean=(0.5, 0.5), std=(0.5, 0.25)).flatten().tolist() == [-1, 2]
