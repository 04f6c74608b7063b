"""The recipes travel with the package."""

import tomllib
from pathlib import Path

from idap.recipes.catalogue import FOLDER, recipe_path, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]


def test_the_build_takes_every_recipe_with_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["idap"]
    packed = {file for pattern in patterns for file in (ROOT / "src" / "idap").glob(pattern)}
    assert set(shipped_recipes().values()) <= packed


def test_the_folder_at_the_top_is_the_same():
    assert (ROOT / "recipes").resolve() == FOLDER.resolve()


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("digits_resnet") == FOLDER / "digits_resnet.toml"
    assert recipe_path("other/digits_resnet.toml") == Path("other/digits_resnet.toml")
    (tmp_path / "digits_resnet").touch()
    assert recipe_path("digits_resnet") == Path("digits_resnet")
