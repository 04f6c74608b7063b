"""Models of transformers by folder: with the head of the task, its weights, and errors where something does not fit."""

import json

import pytest
import torch
import transformers

from idap.errors import CheckpointError, ConfigError
from idap.models.pretrained import labels_of, load_config
from idap.models.resolve import build_model, example_inputs
from tests.data import small_data


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return small_data.classifier_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory, classifier):
    """The same network without a head."""
    folder = tmp_path_factory.mktemp("bare")
    transformers.BertModel.from_pretrained(classifier).save_pretrained(folder)
    return folder


def test_the_weights_are_those_of_the_folder(classifier):
    model = build_model(f"hf:{classifier}", head="sequence", classes=2)
    saved = transformers.BertForSequenceClassification.from_pretrained(classifier)
    assert type(model) is type(saved)
    assert not model.training
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    args, kwargs = example_inputs(f"hf:{classifier}", model)
    assert model(*args, **kwargs).logits.shape == (1, 2)


def test_a_folder_at_home(classifier, monkeypatch):
    monkeypatch.setenv("HOME", str(classifier.parent))
    assert type(build_model(f"hf:~/{classifier.name}")).__name__ == "BertForSequenceClassification"


def test_without_a_task_the_folder_says_what_it_is(classifier):
    assert type(build_model(f"hf:{classifier}")).__name__ == "BertForSequenceClassification"


def test_the_architecture_alone(classifier):
    model = build_model(f"hf:{classifier}", head="sequence", classes=2, trained=False)
    saved = build_model(f"hf:{classifier}", head="sequence")
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)


def test_a_file_of_weights_goes_before_those_of_the_folder(classifier, tmp_path):
    saved = build_model(f"hf:{classifier}", head="sequence").state_dict()
    torch.save({name: value * 2 for name, value in saved.items()}, tmp_path / "w.pt")
    model = build_model(f"hf:{classifier}", tmp_path / "w.pt", head="sequence")
    assert torch.equal(model.classifier.weight, saved["classifier.weight"] * 2)


def test_a_language_model(tmp_path):
    model = build_model(f"hf:{small_data.language_folder(tmp_path)}", head="language", classes=None)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not model.config.use_cache


def test_a_model_of_images(tmp_path):
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, intermediate_size=32, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    model = build_model(f"hf:{tmp_path}", head="image", classes=3)
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)


def test_half_precision_is_read_as_float32(tmp_path, classifier):
    transformers.BertForSequenceClassification.from_pretrained(classifier).half().save_pretrained(tmp_path)
    assert build_model(f"hf:{tmp_path}", head="sequence").classifier.weight.dtype == torch.float32


def test_a_new_head(bare):
    with pytest.raises(CheckpointError, match=r"no weights for 'classifier\.bias' and 1 more: .*\[train\] with epochs"):
        build_model(f"hf:{bare}", head="sequence", classes=3)
    model = build_model(f"hf:{bare}", head="sequence", classes=3, new_head=True)
    assert model.classifier.out_features == 3


def test_another_number_of_classes_is_named(classifier):
    with pytest.raises(ConfigError, match=r"has 2 classes \(negative, positive\), the data 5\. Take the data"):
        build_model(f"hf:{classifier}", head="sequence", classes=5)


def test_what_is_no_model(tmp_path, classifier):
    with pytest.raises(ConfigError, match=r"holds no config\.json; expected what model\.save_pretrained"):
        build_model(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match=r"there is no folder .*none\. Write hf:FOLDER, or hf:NAME"):
        build_model(f"hf:{tmp_path}/none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ConfigError, match="can't be built: ValueError"):
        build_model(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match=r"can't be built: ValueError.*Write hf:FOLDER"):
        build_model(f"hf:{classifier}", head="segmentation", classes=2)


def test_missing_weights(tmp_path, classifier):
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    with pytest.raises(ConfigError, match="can't be built: OSError"):
        build_model(f"hf:{tmp_path}", head="sequence")


def test_names_of_classes(classifier, bare):
    assert labels_of(load_config(f"hf:{classifier}", transformers)) == ["negative", "positive"]
    assert labels_of(transformers.BertConfig(num_labels=3)) is None
