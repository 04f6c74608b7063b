"""`idap recipe` writes a recipe that loads and runs, from answers or options, and shows those that come with idap."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idap.cli.main import app
from idap.recipes.recipe import read_recipe

QUICK = ["train.epochs=0.2", "filters.steps=1", "layers.removals=0", "recovery.epochs=0", "final.epochs=0.2"]


def run(*words, answers=None):
    return CliRunner().invoke(app, ["recipe", *map(str, words)], input=answers)


def test_from_options(tmp_path):
    out = tmp_path / "mine.toml"
    result = run("new", "--data", "digits", "--max-drop", "5%", "--macs", "0.6", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"idap compress {out}" in result.output
    config = read_recipe(out).config()
    assert (config.max_drop, config.macs) == (0.05, 0.6)
    assert out.read_text().startswith("# idap:digits_resnet on digits")


@pytest.mark.slow
def test_by_five_questions_and_then_it_runs(tmp_path):
    out = tmp_path / "mine.toml"
    result = run("new", "--out", out, answers="digits\n\n\nnone\n70%\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("?") == 0
    assert all(f"{number}. " in result.output for number in range(1, 6))
    words = ["compress", str(out), "--run-dir", str(tmp_path / "run"), "--json", "--quiet"]
    ran = CliRunner().invoke(app, [*words, *(word for each in QUICK for word in ("--set", each))])
    assert ran.exit_code in (0, 1), ran.output
    assert json.loads(ran.stdout)["macs"]["after"] < json.loads(ran.stdout)["macs"]["before"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--model", "idap:digits_vit"], "--data is missing"),
        (["--data", "pictures:here"], "names no data set; write NAME or NAME:PATH with one of digits, cifar10"),
        (["--data", "python:mine.py:data"], "there is no usual model for python:mine.py:data"),
        (["--data", "digits", "--macs", "40"], 'for 40 percent write 0.4 or "40%"'),
        (["--data", "csv"], "data.path is missing"),
        ([], "no answer was given; use --data"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, words, text):
    result = run("new", *words, "--out", tmp_path / "r.toml", "--json")
    assert result.exit_code == 2
    assert text in result.output.replace('\\"', '"')
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "r.toml").write_text("mine")
    result = run("new", "--data", "digits", "--out", tmp_path / "r.toml", "--json")
    assert result.exit_code == 2
    assert "exists already; name another file with --out" in result.output
    assert (tmp_path / "r.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("data", "section"),
    [("imagefolder:pets", "size = 224"), ("csv:a.tsv", "max_length"), ("text:a.txt", "max_relative_drop"),
     ("masks:roads", "size = [180, 240]"), ("cifar10:data", "augment = true"), ("fashion_mnist:f", "[train]")],
)  # fmt: skip
def test_every_kind_of_data_has_its_keys(tmp_path, data, section):
    out = tmp_path / "r.toml"
    assert run("new", "--data", data, "--out", out).exit_code == 0
    assert section in out.read_text()
    read = read_recipe(out)
    assert read.data.name == data.partition(":")[0]
    assert (read.config().drop is None) == (data.startswith("text"))
    assert ("train" in read.settings) == (not read.network.build.startswith("hf:"))


def test_what_lies_beside_a_recipe_moves_with_it(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--data", "imagefolder:work/pets", "--model", "python:net.py:build", "--weights", "work/net.safetensors"]
    assert run("new", *words, "--out", "work/r.toml").exit_code == 0
    Path("work").rename("elsewhere")
    read = read_recipe("elsewhere/r.toml")
    assert (read.data.path, read.network.weights) == ("elsewhere/pets", "elsewhere/net.safetensors")
    assert read.network.build == f"python:{tmp_path}/net.py:build"


def test_list_and_show(tmp_path):
    listed = json.loads(run("list", "--json").stdout)
    assert {"digits_resnet", "cifar10_resnet20", "imagefolder_resnet", "texts_transformers"} <= set(listed)
    assert all(listed.values())
    assert "digits_resnet" in run("list").stdout
    shown = run("show", "digits_resnet").stdout
    (tmp_path / "copy.toml").write_text(shown)
    assert read_recipe(tmp_path / "copy.toml").config() == read_recipe("digits_resnet").config()
    assert "idap has no recipe 'nothing'; its recipes are cifar10_resnet20" in run("show", "nothing", "--json").output
