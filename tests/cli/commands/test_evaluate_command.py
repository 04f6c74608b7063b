"""`idap evaluate`: a run, a model beside its recipe, an original alone."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import idap
from idap.errors import UncheckedFileWarning
from idap.models.resolve import build_model
from tests.cli.commands.test_commands import SCRIPT, plain_terminal, text  # noqa: F401 - a fixture
from tests.cli.commands.test_commands import idap as command

RECIPE = '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n'
TASK = ("--model", "python:mine.py:build_model", "--task", "python:mine.py:task")


@pytest.fixture
def small(tmp_path):
    """A compressed model in `small`; gives the accuracies of the original and of itself."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    sys.path.insert(0, str(tmp_path))
    import mine

    original, task = mine.build_model().eval(), mine.task()
    structure = idap.analyze(idap.trace(original, (torch.zeros(2, 4),)))
    plan = structure.plan({"0": range(0, 16, 2)})
    idap.save("small", idap.apply_plan(original, plan), plan)
    yield [idap.evaluate(model, task) for model in (original, idap.load("small", original))]
    sys.path.remove(str(tmp_path))
    del sys.modules["mine"]


def test_a_model_and_its_original(small):
    result = command("evaluate", "small", *TASK)
    assert result.exit_code == 0, result.stderr
    before, after = (f"{value:.2%}" for value in small)
    assert re.search(rf"accuracy \(val\) +{before} +{after} +[+−]\d+\.\d\d points", result.stdout)
    assert command("evaluate", "small", *TASK, "-q").stdout.split() == [repr(value) for value in small]


def test_for_machines(small):
    Path("r.toml").write_text(RECIPE)
    result = command("evaluate", "small", "--recipe", "r.toml", "--split", "test", "--json")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert (found["split"], found["metric"], found["folder"], found["note"]) == ("test", "accuracy", "small", "")
    assert [found["original"], found["compressed"]] == small  # the test data of the script are its validation data


def test_an_original_alone_with_weights(small):
    Path("r.toml").write_text(RECIPE)
    assert json.loads(command("evaluate", *TASK, "--json").stdout)["compressed"] is None
    weights = {"0.weight": torch.zeros(16, 4), "0.bias": torch.zeros(16), "2.weight": torch.zeros(2, 16)}
    save_file(weights | {"2.bias": torch.tensor([1.0, 0.0])}, "zero.safetensors")
    found = json.loads(command("evaluate", "--recipe", "r.toml", "--weights", "zero.safetensors", "--json").stdout)
    negative = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))[:, 0] <= 0
    assert found["original"] == float(negative.float().mean())  # it always answers 0


def test_a_run_knows_everything(small):
    Path("small").rename("model")
    Path("run").mkdir()
    Path("model").rename("run/model")
    table = {"model": {"build": "python:mine.py:build_model"}, "task": {"build": "python:mine.py:task"}}
    Path("run/run.json").write_text(json.dumps({"recipe": table}))  # it does not say where it was made
    found = json.loads(command("evaluate", "run", "--trust", "--json").stdout)
    assert [found["original"], found["compressed"]] == small
    # Weights that came from training in the run are not there, so the original is not measured with others.
    Path("run/run.json").write_text(json.dumps({"recipe": table | {"train": {"epochs": 1}}}))
    found = json.loads(command("evaluate", "run", "--trust", "--json").stdout)
    assert found["original"] is None and found["compressed"] == small[1]
    shown = text(command("evaluate", "run", "--trust").stdout)
    assert "The recipe trains the original, and the trained weights are missing" in shown and "points" not in shown
    save_file(
        {
            "0.weight": torch.ones(16, 4),
            "0.bias": torch.ones(16),
            "2.weight": torch.ones(2, 16),
            "2.bias": torch.ones(2),
        },
        "ones.safetensors",
    )
    found = json.loads(command("evaluate", "run", "--trust", "--weights", "ones.safetensors", "--json").stdout)
    assert found["original"] is not None and found["compressed"] == small[1]
    Path("ones.safetensors").rename("run/original.safetensors")  # as a run keeps them
    with warnings.catch_warnings():
        warnings.simplefilter("always", UncheckedFileWarning)
        ended = command("evaluate", "run", "--trust", "--json")
    assert json.loads(ended.stdout)["original"] == found["original"]
    assert "original.safetensors was written without checksums" in text(ended.stderr)


def test_the_original_has_as_many_outputs_as_in_the_run(small, tmp_path):
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        Path("pets", place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("pets", place, "1.png"))
    original = build_model("idap:cifar_resnet20", classes=2)
    structure = idap.analyze(idap.trace(original, (torch.zeros(2, 3, 8, 8),)))
    plan = structure.plan({structure.groups[0].name: range(4)})
    idap.save("run/model", idap.apply_plan(original, plan), plan)
    table = {"model": {"build": "idap:cifar_resnet20"}, "data": {"name": "imagefolder", "path": "pets", "size": 8}}
    Path("run/run.json").write_text(json.dumps({"recipe": table}))
    result = command("evaluate", "run", "--json")
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)["compressed"] == 0.5  # one picture, two names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the command line does not name a model and data; give --recipe FILE"),
        (["small"], "small does not name a model and data"),
        (["small", *TASK, "--split", "train"], "--split must be val or test, found 'train'"),
        (["nowhere"], "nowhere holds neither a run (run.json) nor a compressed model"),
        (["nowhere", *TASK], "nowhere holds neither a run (run.json) nor a compressed model"),
        (["small", "--model", "idap:digits_vit", *TASK[2:]], "the plan does not fit this model"),
        (["--recipe", "trains.toml"], "trains its model first ([train]), so there is nothing to measure yet"),
        (["--recipe", "no.toml"], "there is no recipe no.toml"),
    ],
)
def test_mistakes_are_one_panel(small, words, expected):
    Path("trains.toml").write_text(f"{RECIPE}[train]\nepochs=1\n")
    result = command("evaluate", *words)
    assert result.exit_code == 2
    assert expected in text(result.stderr) and "idap evaluate --help" in text(result.stderr)


def test_seconds_of_every_phase(small):
    result = command("evaluate", "small", *TASK, "-v")
    assert result.exit_code == 0
    assert len(re.findall(r"evaluate val: \d+\.\d\d s", result.stderr)) == 2
    assert re.search(r"idap evaluate: \d+\.\d s; Python 3\.\S+, torch ", result.stderr)
    assert "evaluate val" not in result.stdout
