"""Folders of strangers: nothing in them runs, whatever they name, and nobody is asked by another library."""

import builtins
import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch

from idap.data.tokens import load_tokenizer
from idap.errors import CheckpointError, ConfigError, IdapError, TaskError
from idap.models.pretrained import processor_of
from idap.models.resolve import build_model
from tests.data import small_data

transformers = pytest.importorskip("transformers", reason="transformers is not installed; make installs it")

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig): model_type = "evil"
class Model(BertModel): config_class = Config
class Tokenizer(BertTokenizer): pass
"""
MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForSequenceClassification": "evil.Model"}


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def folder(tmp_path, mark, monkeypatch):
    """A classifier, with code that leaves a mark beside it; whoever asks whether to run it is answered yes."""
    found = small_data.classifier_folder(tmp_path / "model")
    (found / "evil.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return found


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", ["evil", "bert"])
@pytest.mark.parametrize("place", ["evil.", "somebody/model--evil."])
def test_a_model_that_brings_its_code(kind, place, folder, mark):
    named = {key: value.replace("evil.", place) for key, value in MAP.items()}
    edit(folder / "config.json", auto_map=named, model_type=kind)
    for trained in (True, False):
        if kind == "bert":  # what the library knows itself is built by the library
            assert type(build_model(f"hf:{folder}", head="sequence", trained=trained)).__module__.startswith(
                "transformers."
            )
        else:
            with pytest.raises(ConfigError, match="can't be built"):
                build_model(f"hf:{folder}", head="sequence", trained=trained)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["Tokenizer", "Unknown"])
def test_a_tokenizer_that_brings_its_code(kind, folder, mark):
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        tokenizer_class=kind,
    )
    for load in (lambda: load_tokenizer(str(folder)), lambda: processor_of(f"hf:{folder}")):
        try:
            found = load()
        except (TaskError, CheckpointError):
            continue
        assert type(found).__module__.startswith("transformers.")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_a_configuration_that_names_a_kernel_of_the_hub(key, folder, monkeypatch):
    edit(folder / "config.json", **{key: "somebody/kernel"})
    with pytest.raises(ConfigError, match=rf"its config\.json names 'somebody/kernel' as {key}, which is code from"):
        build_model(f"hf:{folder}", head="sequence")


@pytest.mark.parametrize("named", [["pipeline"], ["AutoTokenizer"], ["utils"], [3], "pipeline", {}, None])
def test_a_class_that_is_no_model(named, folder):
    edit(folder / "config.json", architectures=named)
    assert type(build_model(f"hf:{folder}", trained=False)).__name__ == "BertModel"


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_weights_that_hold_code(folder, mark, tmp_path):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"bert.x": Trap(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="can't be built"):
        build_model(f"hf:{folder}", head="sequence")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(mark), protocol=2))
    torch.save(Trap(mark), tmp_path / "zipped.pt")
    for name in ("raw.pt", "zipped.pt"):
        with pytest.raises(CheckpointError, match="idap runs no code from a file"):
            build_model("idap:digits_vit", tmp_path / name)
    assert not mark.exists()
    torch.load(tmp_path / "zipped.pt", weights_only=False)
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("tag", ["hf-hub:x/y", "hf_hub:x/y", "local-dir:/x", "a/b", "../x", "", "a.b"])
def test_timm_builds_what_its_name_says(tag, monkeypatch):
    def create_model(name, **_):
        raise AssertionError(f"{name} was built")

    fake = types.ModuleType("timm")
    fake.create_model, fake.list_models = create_model, lambda: ["resnet18"]
    fake.list_pretrained = lambda: ["resnet18.a1_in1k"]
    monkeypatch.setitem(sys.modules, "timm", fake)
    with pytest.raises(ConfigError, match="timm has no model named"):
        build_model(f"timm:resnet18.{tag}")
    with pytest.raises(ConfigError, match="timm has no model named"):
        build_model("timm:hf-hub:x/y")


@pytest.mark.parametrize("name", ["os.system", "python:os:system", "idap.errors"])
def test_a_criterion_is_a_name_and_nothing_is_imported_for_it(name):
    from idap.recipes.recipe import make_recipe

    table = {"model": {"build": "idap:digits_vit"}, "data": {"name": "digits"}, "compress": {"criterion": name}}
    with pytest.raises(IdapError, match="criterion"):
        make_recipe(table, "here").config()
