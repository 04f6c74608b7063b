"""The lists of names equal what can be built; nothing heavy is imported for them."""

import subprocess
import sys
from pathlib import Path

import pytest

from idap.divergence import criteria
from idap.errors import ConfigError
from idap.models import resolve
from idap.recipes import catalogue, sources


def test_names_and_what_can_be_built():
    assert set(catalogue.OWN_MODELS) == set(resolve._OWN), "say in OWN_MODELS what each network is"
    assert set(catalogue.DATA_SETS) == set(sources.SOURCES), "say in DATA_SETS what each data set is"
    assert set(catalogue.CRITERIA) == set(criteria.CRITERIA), "say in CRITERIA what each criterion is"
    assert set(catalogue.SCHEMES) == set(resolve.SCHEMES), "say in SCHEMES where models come from"


@pytest.mark.parametrize("name", criteria.WITH_BLOCKS)
def test_criteria_for_whole_blocks_say_so(name):
    assert "also for whole blocks" in catalogue.CRITERIA[name]
    assert {each for each, about in catalogue.CRITERIA.items() if "blocks" in about} == set(criteria.WITH_BLOCKS)
    assert {each for each, about in catalogue.CRITERIA.items() if "labels" in about} == set(criteria.OF_THE_LOSS)


def test_torchvision_is_read_as_it_lists_itself():
    library = pytest.importorskip("torchvision", reason="torchvision is not installed; make installs it")
    found = {entry.name.partition(":")[2]: entry.about for entry in catalogue.models(["torchvision"])}
    assert set(found) == set(library.models.list_models())
    assert found["resnet50"] == "ResNet-50 from Deep Residual Learning for Image Recognition"


def test_timm_is_read_as_it_lists_itself():
    library = pytest.importorskip("timm", reason="timm is not installed; make installs it")
    found = {entry.name.partition(":")[2]: entry.about for entry in catalogue.models(["timm"])}
    assert set(found) == set(library.list_models())
    assert found["resnet18"] == "Constructs a ResNet-18 model"


def test_transformers_is_read_as_it_lists_itself():
    library = pytest.importorskip("transformers", reason="transformers is not installed; make installs it")
    assert {entry.name.partition(":")[2] for entry in catalogue.models(["transformers"])} == set(library.CONFIG_MAPPING)


def test_a_package_that_is_missing_has_no_models(monkeypatch):
    monkeypatch.setattr(catalogue, "PathFinder", catalogue.importlib.util)
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda package: None)
    assert catalogue.models(["timm", "transformers"]) == []
    assert len(catalogue.models()) == len(catalogue.OWN_MODELS)


def test_words_choose():
    assert [entry.name for entry in catalogue.find_entries("models", ["IDAP", "cifar", "56"])] == [
        "idap:cifar_resnet56"
    ]
    assert catalogue.find_entries("data", ["nothing like this"]) == []
    with pytest.raises(ConfigError, match=r"no list of 'criterion'; did you mean criteria\?"):
        catalogue.find_entries("criterion")
    with pytest.raises(ConfigError, match="no list of 'x'; the lists are models, data, criteria, recipes"):
        catalogue.find_entries("x")


def test_recipes_of_ones_own_stand_beside_those_of_idap(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "mine.toml").write_text("# My network.\n[model]\nbuild = 'python:net.py:build'\n")
    (tmp_path / "recipes/other.toml").write_text("[model]\nbuild = 'python:net.py:build'\n")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'no recipe'\n")
    found = {Path(entry.name): entry.about for entry in catalogue.recipes(tmp_path)}
    assert found[tmp_path / "mine.toml"] == "My network."
    assert found[tmp_path / "recipes/other.toml"] == ""
    assert tmp_path / "pyproject.toml" not in found
    assert any(path.name == "digits_resnet.toml" for path in found)


def test_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom idap.recipes import catalogue\n"
        "lists = [read() for read, _ in catalogue.LISTS.values()]\n"
        "heavy = {'torch', 'numpy', 'timm', 'torchvision', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
