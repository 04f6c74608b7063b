"""What a run folder knows: its recipe, whole, and where its model is."""

import json

import pytest

from idap.errors import ConfigError, RunFolderError
from idap.recipes.recipe import make_recipe, read_recipe
from idap.recipes.runs import model_folder, recipe_of_run, settings_of_run

RECIPE = """
[model]
build = "python:net.py:build"
weights = "net.safetensors"
[data]
name = "digits"
batch_size = 32
[train]
epochs = 2
lr = 0.05
[goals]
max_drop = "none"
macs = "40%"
[compress]
criterion = "relative"
[filters]
steps = 3
[layers]
removals = 0
[recovery]
epochs = 0.5
[final]
lr = 0.01
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_run_keeps_its_recipe_whole(run, tmp_path, monkeypatch):
    (tmp_path / "r.toml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "r.toml", ["filters.first_share=0.2"])
    (run / "run.json").write_text(json.dumps({"recipe": recipe.table()}))
    monkeypatch.chdir("/")  # the paths hold in any working folder
    found = recipe_of_run(run)
    assert found.config() == recipe.config()
    assert found.training() == recipe.training()
    assert found.network.weights == str(tmp_path / "net.safetensors")
    assert found.network.build == f"python:{tmp_path}/net.py:build"
    assert found.data == recipe.data
    assert make_recipe(found.table(), "again").table() == found.table()


def test_a_recipe_with_something_else_in_it(run):
    table = {"model": {"build": "idap:digits_vit"}, "data": {"name": "digits"}}
    (run / "run.json").write_text(json.dumps({"recipe": table}))
    found = recipe_of_run(run, {"model.weights": "new.safetensors", "data.path": None})
    assert (found.network.weights, found.network.build) == ("new.safetensors", "idap:digits_vit")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", RunFolderError, "run.json can't be read"),
        ("[]", RunFolderError, "holds a list, expected an object"),
        ("{}", ConfigError, "does not say how its original is built"),
        ('{"recipe": [1]}', RunFolderError, "recipe: Input should be an object"),
        ('{"recipe": {"modle": {}}}', ConfigError, r"no section \[modle\]"),
    ],
)
def test_settings_that_say_nothing(run, content, error, message):
    (run / "run.json").write_text(content)
    with pytest.raises(error, match=message):
        recipe_of_run(run)


def test_no_settings(run):
    assert settings_of_run(run) == {}


def test_where_the_model_is(run):
    with pytest.raises(RunFolderError, match="holds neither a run"):
        model_folder(run)
    (run / "run.json").write_text("{}")
    with pytest.raises(RunFolderError, match="no result yet; it has no accepted state either"):
        model_folder(run)
    (run / "checkpoints/step-003").mkdir(parents=True)
    (run / "checkpoints/step-003/plan.json").touch()
    with pytest.raises(RunFolderError, match=r"such as .*step-003"):
        model_folder(run)
    (run / "model").mkdir()
    (run / "model/plan.json").touch()
    assert model_folder(run) == run / "model" == model_folder(run / "model")
