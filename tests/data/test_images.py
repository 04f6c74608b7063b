"""Image folders and masks: split honestly, decoded as stored, and refused early where something is wrong."""

import builtins
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from idap.data.images import imagefolder
from idap.data.masks import masks
from idap.errors import ConfigError, TaskError
from idap.training.check import check_task
from idap.training.evaluate import evaluate
from tests.data import small_data

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def concatenate(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


class TestImageFolder:
    def test_parts_classes_and_pixels(self, tmp_path):
        found = imagefolder(small_data.image_folder(tmp_path), size=16, batch_size=5, augment=False, **PLAIN)
        assert (found.num_classes, found.shape, found.notes) == (2, (3, 16, 16), ())
        images, labels = concatenate(found.val)
        assert images.shape == (24, 3, 16, 16)
        assert labels.tolist() == [0] * 12 + [1] * 12
        assert images.dtype == torch.float32
        assert images[0].mean((1, 2)).tolist() == pytest.approx([200 / 255, 40 / 255, 40 / 255], abs=0.03)
        assert sorted(concatenate(found.train)[1].tolist()) == labels.tolist()

    def test_the_middle_is_shown(self, tmp_path):
        folder = small_data.image_folder(tmp_path, count=1)
        pixels = np.zeros((32, 64, 3), dtype=np.uint8)
        pixels[2:30, 18:46] = 255  # 28 = 0.875 * 32 pixels in the middle
        Image.fromarray(pixels).save(folder / "val" / "cat" / "0.png")
        images, _ = concatenate(imagefolder(folder, size=14, **PLAIN).val)
        assert images[0, :, 1:-1, 1:-1].min() == 1
        assert images[0].min() > 0.7  # the filter reaches a little beyond the border

    def test_only_training_images_are_augmented_and_calibration_is_train_as_it_is_judged(self, tmp_path):
        found = imagefolder(small_data.image_folder(tmp_path), size=16, batch_size=24)
        [(first, _)], [(second, _)] = list(found.train), list(found.train)
        assert not torch.equal(first.sort(0).values, second.sort(0).values)
        kept = [concatenate(found.calibration)[0].sort(0).values for _ in range(2)]
        assert torch.equal(*kept)

    def test_scaled_by_mean_and_deviation(self, tmp_path):
        folder = small_data.image_folder(tmp_path)
        plain, _ = concatenate(imagefolder(folder, size=8, **PLAIN).val)
        scaled, _ = concatenate(imagefolder(folder, size=8, mean=(0.5, 0.0, 0.0), std=(1.0, 2.0, 1.0)).val)
        assert torch.allclose(scaled[:, 0], plain[:, 0] - 0.5)
        assert torch.allclose(scaled[:, 1], plain[:, 1] / 2)

    def test_val_is_taken_off_train_and_that_is_said(self, tmp_path):
        folder = small_data.image_folder(tmp_path, parts=("train",))
        found = imagefolder(folder, size=8, val_share=0.25, augment=False)
        assert found.test is None
        assert found.notes == (
            "there is no validation data: 6 of the 24 training images, drawn with seed 0, are used for validation "
            "and not for training",
        )
        train, val = concatenate(found.train)[0], concatenate(found.val)[0]
        assert (len(train), len(val)) == (18, 6)
        assert not {tuple(row) for row in train.flatten(1).tolist()} & {tuple(row) for row in val.flatten(1).tolist()}
        other = imagefolder(folder, size=8, val_share=0.25, seed=1)
        assert [file for file, _ in other.val.dataset.samples] != [file for file, _ in found.val.dataset.samples]

    def test_workers_give_the_same(self, tmp_path):
        folder = small_data.image_folder(tmp_path, count=4)
        assert torch.equal(concatenate(imagefolder(folder, size=8, workers=1).val)[0],
                           concatenate(imagefolder(folder, size=8).val)[0])  # fmt: skip

    def test_other_names_of_val_and_hidden_files(self, tmp_path):
        folder = small_data.image_folder(tmp_path)
        (folder / "val").rename(folder / "valid")
        (folder / "train" / ".cache").mkdir()
        (folder / "train" / "cat" / "notes.txt").write_text("x")
        assert imagefolder(folder, size=8).notes == ()

    def test_what_can_be_wrong(self, tmp_path):
        folder = small_data.image_folder(tmp_path / "data")

        def refused(change, text, **keys):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            bad = shutil.copytree(folder, tmp_path / "bad")
            change(bad)
            with pytest.raises((TaskError, ConfigError), match=text):
                imagefolder(bad, **{"size": 8, **keys})

        refused(shutil.rmtree, r"bad does not exist, expected a folder with train/CLASS")
        refused(lambda at: (at / "train").rename(at / "trian"), r"has no train part.*it has test, trian, val")
        refused(lambda at: (at / "train" / "cat").rename(at / "train" / "kat"),
                "cat is a class that train does not have; its classes are dog, kat")  # fmt: skip
        refused(lambda at: shutil.rmtree(at / "val" / "dog"), "class 'dog' has no images in val: .*is missing")
        refused(lambda at: [f.unlink() for f in (at / "train" / "dog").iterdir()], "class 'dog' .* in train: .*empty")
        refused(lambda at: (at / "val" / "dog" / "3.png").write_bytes(b"no"), r"dog/3\.png can't be read as an image")
        refused(lambda at: shutil.rmtree(at / "train" / "dog"), "holds 1 folders, expected one for each of two")
        refused(lambda at: shutil.copytree(at / "val", at / "validation"), "holds both val and validation")
        refused(lambda at: None, "size must be 1 or more, got 0", size=0)
        refused(lambda at: None, "batch_size must be 1 or more", batch_size=0)
        refused(lambda at: None, "mean has 1 numbers, expected 3", mean=[0.5])

    def test_a_class_may_be_missing_in_test(self, tmp_path):
        folder = small_data.image_folder(tmp_path)
        shutil.rmtree(folder / "test" / "dog")
        assert len(concatenate(imagefolder(folder, size=8).test)[1]) == 12

    def test_an_image_that_breaks_off_is_named_when_it_is_read(self, tmp_path):
        folder = small_data.image_folder(tmp_path)
        file = folder / "val" / "dog" / "3.png"
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(TaskError, match=r"dog/3\.png can't be read as an image"):
            concatenate(imagefolder(folder, size=8).val)

    def test_without_pillow(self, tmp_path, monkeypatch):
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name == "PIL":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        folder = small_data.image_folder(tmp_path)
        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(TaskError, match=r"Pillow, which is missing\. Run: pip install 'idap\[vision\]'"):
            imagefolder(folder)


class TestMasks:
    def test_a_task(self, tmp_path):
        task = masks(small_data.mask_folder(tmp_path), batch_size=4, augment=False)
        assert task.notes == ("the masks of train hold 2 classes",)
        images, mask = next(iter(task.val))
        assert (images.shape, mask.shape, mask.dtype) == ((4, 3, 16, 16), (4, 16, 16), torch.int64)
        assert mask[0, 0].tolist() == [1] * 3 + [0] * 13
        check_task(nn.Conv2d(3, 2, 1), task)

    def test_the_metric_is_the_mean_of_intersection_over_union(self, tmp_path):
        task = masks(small_data.mask_folder(tmp_path), batch_size=3)

        class Everything(nn.Module):
            def forward(self, x):
                return {"out": torch.stack([torch.zeros(len(x), 8, 8), torch.ones(len(x), 8, 8)], 1)}  # class 1

        counted = torch.cat([mask for _, mask in task.val])
        foreground = (counted == 1).sum() / (counted != 255).sum()
        assert evaluate(Everything(), task) == pytest.approx(float(foreground) / 2, abs=1e-6)
        assert task.logits({"out": torch.zeros(1, 2, 4, 5)}).shape == (1, 4, 5, 2)

    def test_images_and_masks_are_resized_alike_and_mirrored_together(self, tmp_path):
        folder = small_data.mask_folder(tmp_path)
        task = masks(folder, size=[8, 12], mean=(0, 0, 0), std=(1, 1, 1), batch_size=8)
        images, mask = next(iter(task.train))
        assert (images.shape, mask.shape) == ((8, 3, 8, 12), (8, 8, 12))
        bright = images[:, 0] > 0.45
        assert ((mask == 1) == bright)[mask != 255].float().mean() > 0.95
        assert {1, 0} <= {int(row) for row in mask[:, 0, 0]}  # some are mirrored

    def test_val_is_taken_off_train(self, tmp_path):
        task = masks(small_data.mask_folder(tmp_path, parts=("train",)), val_share=0.25, classes=2)
        assert task.notes[0].startswith("there is no validation data: 2 of the 8 training images")

    def test_what_can_be_wrong(self, tmp_path):
        folder = small_data.mask_folder(tmp_path / "data")

        def refused(change, text, **keys):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            bad = shutil.copytree(folder, tmp_path / "bad")
            change(bad)
            with pytest.raises((TaskError, ConfigError), match=text):
                masks(bad, **keys)

        def grey(file, value, size=(16, 16)):
            Image.fromarray(np.full(size, value, dtype=np.uint8)).save(file)

        refused(lambda at: grey(at / "val/masks/2.png", 0, (16, 20)),
                r"masks/2\.png has 20x16 pixels, its image .*images/2\.png 16x16")  # fmt: skip
        refused(lambda at: (at / "val/masks/2.png").unlink(), r"images/2\.png has no mask; expected .*masks/2\.png")
        refused(lambda at: (at / "val/images/2.png").unlink(), r"the mask .*2\.png has no image")
        refused(lambda at: grey(at / "val/masks/2.png", 7), r"2\.png holds 7, expected classes 0 to 1, or 255")
        refused(lambda at: shutil.rmtree(at / "train/masks"), "train has no folder masks")
        refused(lambda at: shutil.copy(at / "val/images/2.png", at / "val/masks/2.png"), r"has colours \(RGB\)")
        refused(lambda at: [grey(f, 255) for f in (at / "train/masks").iterdir()], "Store a foreground of 255 as 1")
        refused(lambda at: [Image.new("L", (9, 9)).save(at / f"val/{k}/0.png") for k in ("images", "masks")],
                r"a batch needs one size: set data\.size")  # fmt: skip
        refused(lambda at: None, r"size is \[8\], expected height and width", size=[8])
        refused(lambda at: None, "classes must be 2 or more, got 1", classes=1)

    def test_a_model_with_other_outputs(self, tmp_path):
        with pytest.raises(TaskError, match=r"segmentation with 2 classes expects \(B, 2, H, W\)"):
            evaluate(nn.Conv2d(3, 5, 1), masks(small_data.mask_folder(tmp_path)))
