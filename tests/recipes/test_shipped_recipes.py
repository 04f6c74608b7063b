"""Every recipe that idap brings, and every name of data, runs from its file to a smaller model, on tiny data."""

import json

import numpy as np
import pytest
import torch

from idap.compress.run import compress
from idap.models.nets import cifar_resnet20
from idap.recipes.catalogue import shipped_recipes, summary
from idap.recipes.recipe import make_recipe, read_recipe
from idap.recipes.sources import SOURCES
from idap.record import RUN
from idap.training.evaluate import evaluate
from idap.training.fit import fit
from tests.data import small_data
from tests.data.test_data import write_delta

QUICK = (
    *("compress.calibration_batches=1", "filters.steps=1", "filters.streams=keep", "layers.removals=0"),
    *("recovery.epochs=0", "final.epochs=0.5", "goals.macs=75%", "goals.max_drop=none"),
)
SCRIPT = """
import torch
from torch import nn

import idap

def grey():
    return colours(1)

def colours(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

def pixels():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

def data(path, batch_size=4):
    batches = [(torch.randn(batch_size, 3, 8, 8), torch.tensor([0, 1, 0, 1]))] * 3
    return idap.classification(batches, batches, num_classes=2)
"""


@pytest.fixture
def run_recipe(tmp_path):
    """Run a recipe, or a table of one, and check what it leaves."""
    (tmp_path / "net.py").write_text(SCRIPT)

    def run(recipe, *overrides, model=None, data=None):
        replaced = {"model.build": model, "data.path": data}
        read = read_recipe(recipe, [*QUICK, *overrides], replaced=replaced)
        network, task, training = read.model(), read.task(), read.training()
        if training is not None:
            fit(network, task, training)
        result = compress(network, task, read.config(), run_dir=tmp_path / "run", recipe=read.table())
        assert result.macs[1] < result.macs[0]
        if task.test is not None:
            evaluate(result.model, task, split="test")
        # The run says by itself how its original is built, without the data.
        again = make_recipe(json.loads((tmp_path / "run" / RUN).read_text())["recipe"], "run")
        shapes = {name: tensor.shape for name, tensor in again.model(weights=False).state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in network.state_dict().items()}
        return result, task

    run.script = f"python:{tmp_path / 'net.py'}"
    return run


def test_each_has_a_test_here_and_says_what_it_does():
    assert set(shipped_recipes()) == {
        "cifar10_resnet20", "digits_resnet", "imagefolder_resnet", "language_transformers", "segmentation_torchvision",
        "texts_transformers",
    }  # fmt: skip
    assert all(len(summary(file)) > 30 for file in shipped_recipes().values())


def test_digits_resnet(run_recipe):
    run_recipe("digits_resnet", "train.epochs=0.5", "final.epochs=0.1")


def test_cifar10_resnet20(run_recipe, tmp_path):
    dice = np.random.default_rng(0)
    for name, count in (("train", 32), ("test", 40)):
        images = dice.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        write_delta(tmp_path / f"cifar10_{name}.npz", images, np.arange(count) % 10)
    weights = {f"module.{name}": value for name, value in cifar_resnet20().state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pt")
    _, task = run_recipe(
        "cifar10_resnet20", "data.val_size=20", "data.batch_size=16", f"model.weights={tmp_path / 'w.pt'}",
        data=f"cifar10:{tmp_path}",
    )  # fmt: skip
    assert task.notes == ("20 of the 40 images of test, drawn with seed 0, are for validation",)


def test_imagefolder_resnet(run_recipe, tmp_path):
    images = small_data.image_folder(tmp_path / "images", count=8)
    result, _ = run_recipe(
        "imagefolder_resnet", "data.size=16", "data.batch_size=8", "data.workers=0", "train.epochs=1",
        model="timm:test_resnet", data=f"imagefolder:{images}",
    )  # fmt: skip
    assert result.model.fc.out_features == 2


def test_texts_transformers(run_recipe, tmp_path):
    folder = small_data.classifier_folder(tmp_path / "bert")
    result, task = run_recipe(
        "texts_transformers", "data.batch_size=8", "train.epochs=12", "train.lr=0.01", "train.optimizer=adamw",
        model=f"hf:{folder}", data=small_data.table(tmp_path / "t.tsv"),
    )  # fmt: skip
    assert task.metric_name == "accuracy"
    assert result.baseline > 0.9


def test_language_transformers(run_recipe, tmp_path):
    folder = small_data.language_folder(tmp_path / "gpt")
    result, task = run_recipe(
        "language_transformers", "data.length=16", "data.tokenizer=bytes", "train.epochs=3", "train.lr=0.01",
        "train.optimizer=adamw", "goals.max_relative_drop=none",
        model=f"hf:{folder}", data=f"text:{small_data.text_file(tmp_path / 't.txt')}",
    )  # fmt: skip
    assert task.metric_name == "perplexity"
    assert result.baseline < 20  # 256 without training


def test_segmentation_torchvision(run_recipe, tmp_path):
    result, task = run_recipe(
        "segmentation_torchvision", "data.size=16", "data.workers=0", "train.epochs=20", "train.lr=0.01",
        model=f"{run_recipe.script}:pixels", data=small_data.mask_folder(tmp_path / "masks"),
    )  # fmt: skip
    assert task.metric_name == "mIoU"
    assert result.baseline > 0.8


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_files(run_recipe, tmp_path, name):
    arrays = (*small_data.grey_images(64), *small_data.grey_images(16, 1))
    np.savez(tmp_path / "m.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True)))
    run_recipe(
        None,
        "train.epochs=4",
        "data.batch_size=16",
        model=f"{run_recipe.script}:grey",
        data=f"{name}:{tmp_path / 'm.npz'}",
    )


def test_data_of_a_function(run_recipe):
    run_recipe(None, "train.epochs=1", "data.batch_size=4", "data.path=x", model=f"{run_recipe.script}:colours",
        data=f"{run_recipe.script}:data")  # fmt: skip


def test_every_name_is_tried_in_this_file():
    assert set(SOURCES) == {"digits", "cifar10", "mnist", "fashion_mnist", "imagefolder", "csv", "text", "masks"}
