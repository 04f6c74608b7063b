"""A recipe becomes a model, a task and a config; every mistake in it is named, with the nearest valid name."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from idap.compress.config import Config, FilterStage, LayerStage
from idap.errors import BudgetError, ConfigError
from idap.rebalance.run import Rebalance
from idap.recipes.recipe import make_recipe, read_recipe
from idap.recipes.sections import SECTIONS
from idap.recipes.sources import SOURCES
from idap.training.recovery import Recovery

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

PLAIN = """
[model]
build = "idap:digits_resnet"

[data]
name = "digits"

[goals]
macs = "50%"
"""

SCRIPT = """
import torch
from torch import nn

import idap

batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
task = idap.classification(batches, batches, num_classes=2)

def build_task():
    return task

def splits(path, batch_size=2):
    class Splits:
        train = val = test = [(torch.randn(batch_size, 3), torch.tensor([0, 1]))]
        num_classes = 2
    Splits.path = path
    return Splits

def no_splits(path):
    return [1]

def build_model():
    return nn.Linear(3, 2)
"""


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe next to a script of the user's, and read it."""
    (tmp_path / "mine.py").write_text(SCRIPT)

    def read(text, *overrides, **replaced):
        (tmp_path / "r.toml").write_text(text)
        keys = {"data": "data.path", "weights": "model.weights", "run_dir": "output.run_dir"}
        return read_recipe(
            tmp_path / "r.toml", overrides, replaced={keys[key]: value for key, value in replaced.items()}
        )

    return read


def refusal(recipe, text, *overrides, error=ConfigError):
    with pytest.raises(error) as caught:
        recipe(text, *overrides)
    return str(caught.value)


class TestReading:
    def test_what_is_left_out_keeps_its_default(self, recipe):
        assert recipe(PLAIN).config() == Config(macs=0.5)

    def test_every_section_reaches_the_config(self, recipe):
        text = PLAIN + (
            'max_drop = "2.5%"\nparameters = 0.4\n[compress]\ncriterion = "paper"\nseed = 3\ncalibration_batches = 2\n'
            '[filters]\nsteps = 4\nfirst_share = "20 %"\n[layers]\nremovals = 1\n'
            '[recovery]\nepochs = 2\nclip_norm = "none"\n[final]\nepochs = 5\n'
        )
        assert recipe(text).config() == Config(
            macs=0.5,
            max_drop=0.025,
            parameters=0.4,
            criterion="paper",
            seed=3,
            calibration_batches=2,
            filters=FilterStage(steps=4, first_share=0.2),
            layers=LayerStage(removals=1),
            recovery=Recovery(epochs=2.0, clip_norm=None),
            final=Recovery(epochs=5.0, clip_norm=None),
        )

    def test_every_setting_is_a_key(self):
        kinds = {
            "filters": FilterStage,
            "layers": LayerStage,
            "recovery": Recovery,
            "final": Recovery,
            "rebalance": Rebalance,
        }
        for section, kind in kinds.items():
            assert set(SECTIONS[section].model_fields) == {field.name for field in fields(kind)}
        scalars = {field.name for field in fields(Config)} - set(kinds)
        assert set(SECTIONS["goals"].model_fields) | set(SECTIONS["compress"].model_fields) == scalars

    def test_nothing_binds_accuracy(self, recipe):
        assert recipe(PLAIN + 'max_drop = "none"').config().max_drop is None

    @pytest.mark.parametrize(
        ("written", "value"),
        [("0.4", 0.4), ("40%", 0.4), ("'40%'", 0.4), (" 0.4 ", 0.4)],
    )
    def test_overrides(self, recipe, written, value):
        assert recipe(PLAIN, f"goals.macs={written}").config().macs == value

    def test_overrides_of_sections_that_are_not_there(self, recipe):
        config = recipe(PLAIN, "filters.steps=3", "compress.criterion=paper", "recovery.optimizer='adamw'").config()
        assert (config.filters.steps, config.criterion, config.recovery.optimizer) == (3, "paper", "adamw")

    def test_a_recipe_without_a_file(self, tmp_path):
        (tmp_path / "mine.py").write_text(SCRIPT)
        built = {
            "model.build": f"python:{tmp_path}/mine.py:build_model",
            "task.build": f"python:{tmp_path}/mine.py:task",
        }
        read = read_recipe(None, ["goals.macs=0.5"], replaced=built)
        assert (read.where, read.name) == ("the command line", "build_model")
        assert isinstance(read.model(), nn.Linear)

    @pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
    def test_the_recipes_of_the_project(self, file, monkeypatch):
        monkeypatch.setenv("IDAP_DATA", "/data")
        read = read_recipe(file)
        assert 0 < (read.config().macs or 0) < 1
        assert read.run_dir is None


class TestPaths:
    text = (
        '[model]\nbuild="python:mine.py:build_model"\nweights="w/x.safetensors"\n[data]\nname="cifar10"\npath="set"\n'
    )

    def test_paths_are_relative_to_the_recipe(self, recipe, tmp_path):
        read = recipe(self.text + '[output]\nrun_dir="runs/a"')
        assert read.network.weights == str(tmp_path / "w/x.safetensors")
        assert read.network.build == f"python:{tmp_path}/mine.py:build_model"
        assert (read.data.path, read.run_dir) == (str(tmp_path / "set"), tmp_path / "runs/a")

    def test_arguments_replace_them_as_they_are(self, recipe):
        read = recipe(self.text, data="here", weights=Path("1e5"), run_dir="out")
        assert (read.data.path, read.network.weights, read.run_dir) == ("here", "1e5", Path("out"))

    def test_environment_variables(self, recipe, monkeypatch):
        monkeypatch.setenv("IDAP_TEST", "/data")
        read = recipe(self.text.replace('"set"', '"${IDAP_TEST}/set"'))
        assert read.data.path == "/data/set"

    def test_an_unset_variable_is_named(self, recipe, monkeypatch):
        monkeypatch.delenv("IDAP_TEST", raising=False)
        text = self.text.replace('"set"', '"${IDAP_TEST}/set"')
        message = refusal(recipe, text)
        assert "data.path is '${IDAP_TEST}/set', but the environment variable IDAP_TEST is not set" in message
        assert "export IDAP_TEST=..., or pass --data PATH" in message
        assert recipe(text, data="there").data.path == "there"


class TestDataByName:
    def test_name_and_path_in_one(self, recipe, tmp_path):
        text = PLAIN.replace('"digits"', '"cifar10:set"')
        read = recipe(text)
        assert (read.data.name, read.data.path) == ("cifar10", str(tmp_path / "set"))
        assert recipe(PLAIN, "data.name=cifar10:set").data.path == "set"

    def test_the_path_stands_once(self, recipe):
        text = PLAIN.replace('"digits"', '"cifar10:set"\npath = "other"')
        assert "data.name is 'cifar10:set', and data.path is" in refusal(recipe, text)

    def test_the_command_line_may_name_the_data(self, recipe):
        text = PLAIN.replace('"digits"', '"cifar10:${NOT_SET}/set"')
        assert recipe(text, data="digits").data.as_table() == {"name": "digits"}
        read = recipe(text, data="csv:reviews.tsv")
        assert (read.data.name, read.data.path) == ("csv", "reviews.tsv")
        assert recipe(text, data="elsewhere").data.as_table() == {"name": "cifar10", "path": "elsewhere"}

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("imagefolders:pets", "did you mean imagefolder:pets?"),
            ("pets", "did you mean imagefolder:pets?"),
            ("roads", "did you mean masks:roads?"),
            ("reviews.tsv.gz", "did you mean csv:reviews.tsv.gz?"),
            ("books", "did you mean text:books?"),
            ("empty", "write NAME:PATH, one of digits, cifar10:PATH,"),
            ("nowhere", "write NAME:PATH, one of digits, cifar10:PATH,"),
            ("digit", "did you mean digits?"),
        ],
    )
    def test_a_path_alone_without_a_recipe(self, tmp_path, monkeypatch, given, expected):
        monkeypatch.chdir(tmp_path)
        for folder in ("pets/train/cat", "roads/train/masks", "books", "empty"):
            Path(folder).mkdir(parents=True)
        for file in ("reviews.tsv.gz", "books/one.txt"):
            Path(file).touch()
        with pytest.raises(ConfigError) as caught:
            read_recipe(None, replaced={"model.build": "idap:digits_vit", "data.path": given})
        assert f"--data {given!r} names no data set; {expected}" in str(caught.value)

    def test_a_folder_called_like_data_is_a_path(self, recipe, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "digits").mkdir()
        text = PLAIN.replace('"digits"', '"cifar10:set"')
        assert recipe(text, data="digits").data.as_table() == {"name": "cifar10", "path": "digits"}

    @pytest.mark.parametrize(
        ("overrides", "text"),
        [
            (["data.name=imagefolders:x"], "did you mean imagefolder?"),
            (["data.name=digits:x"], "data.path is not a key of digits, which takes seed, batch_size"),
            (["data.name=csv:x", "data.size=3"], "data.size is not a key of csv, which takes path, tokenizer, text,"),
            (
                ["data.name=text"],
                "data.path is missing: give a text file, or a folder of them, or pass --data text:",
            ),
            (["data.name=text:x", "data.metric=bits"], "data.metric is the text 'bits', expected 'perplexity' or"),
            (["data.name=text:x", "data.metric=token_accuracy", "goals.max_drop=5"], "the metric lies between 0 and 1"),
            (["goals.max_drop=-1%"], "goals.max_drop is the text '-1%', expected a number or 'auto'."),
            (["data.name=text:x", "goals.max_drop=50%"], 'write goals.max_relative_drop = "50%" for a share of the'),
            (["data.name=csv:x", "data.val_share=40"], 'for 40 percent write 0.4 or "40%"'),
        ],
    )
    def test_what_does_not_suit(self, recipe, overrides, text):
        assert text in refusal(recipe, PLAIN, *overrides)

    def test_perplexity_may_rise_by_more_than_one(self, recipe):
        assert recipe(PLAIN, "data.name=text:x", "goals.max_drop=5").config().max_drop == 5
        assert recipe(PLAIN, "data.name=csv:x", "data.val_share=40%").data.val_share == 0.4

    def test_folders_of_transformers_are_relative_to_the_recipe(self, recipe, tmp_path):
        (tmp_path / "bert").mkdir()
        text = PLAIN.replace('"idap:digits_resnet"', '"hf:bert"').replace('"digits"', '"csv:x"\ntokenizer = "bert"')
        read = recipe(text)
        assert (read.network.build, read.data.tokenizer) == (f"hf:{tmp_path / 'bert'}", str(tmp_path / "bert"))
        assert recipe(text.replace("hf:bert", "hf:gpt2")).network.build == "hf:gpt2"  # a name on the hub

    def test_the_model_has_as_many_outputs_as_the_data_has_classes(self, recipe):
        assert recipe(PLAIN).classes() == 10
        assert recipe(PLAIN, "model.classes=7").model().head.out_features == 7
        assert recipe(PLAIN, "model.build=python:mine.py:build_model").classes() is None
        assert recipe(PLAIN).table()["model"] == {"build": "idap:digits_resnet", "classes": 10}

    def test_classes_are_counted_once(self, recipe, monkeypatch):
        counted = []
        source = replace(SOURCES["digits"], classes=lambda: counted.append(None) or 4)
        monkeypatch.setitem(SOURCES, "digits", source)
        read = recipe(PLAIN)
        assert (read.classes(), read.table()["model"]["classes"], read.model().head.out_features) == (4, 4, 4)
        assert len(counted) == 1


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "text"),
        [
            ("filters.stpes=3", "r.toml: there is no key filters.stpes; the nearest is filters.steps."),
            ("compress.macs=0.5", "there is no key compress.macs; the nearest is goals.macs."),
            ("compress.finals=1", "no key compress.finals; the keys of [compress] are latency_batch, order,"),
            ("filter.steps=3", "there is no section [filter]; the nearest is [filters]."),
            ("zzz.steps=3", "there is no section [zzz]; sections are model, data, task,"),
            ("filters.steps=ten", "filters.steps is the text 'ten', expected a whole number."),
            ("filters.steps=1.5", "filters.steps is the number 1.5, expected a whole number."),
            ("filters.steps=true", "filters.steps is true, expected a whole number."),
            ("goals.macs=half", "goals.macs is the text 'half', expected a number."),
            ("data.augment=1", "data.augment is the number 1, expected true or false."),
            ("data.size=big", "data.size is the text 'big', expected a whole number, or [height, width]."),
            ("data.labels=good", "data.labels is the text 'good', expected a list of texts"),
            ("data.mean=0.5", "data.mean is the number 0.5, expected a list of numbers."),
            ("model.build=3", "model.build is the number 3, expected text in quotes."),
            ("compress.criterion=best", "there is no criterion 'best'; there are relative,"),
            ("model.build=2020-01-01", "model.build is the date or time 2020-01-01, expected text in quotes."),
            (
                "data.name=imagenet",
                "data.name is 'imagenet', expected digits, cifar10, mnist, fashion_mnist, imagefolder, csv,",
            ),
            (
                "data.name=cifar10",
                "data.path is missing: give the folder of the two files, or pass --data cifar10:PATH.",
            ),
            ("task.build=python:a:b", "[task] brings its own data; leave out [data] and --data"),
            ("goals.max_drop=1", 'it would allow any result; for 1 points write 0.01 or "1%".'),
            ("recovery.lr=-1", "r.toml: [recovery] lr must be above 0 and finite, got -1.0."),
            ("train.lr=-1", "r.toml: [train] lr must be above 0 and finite, got -1.0."),
            ("filters.first_share=1.0", "r.toml: filters.first_share must lie in (0, 1), found 1.0."),
        ],
    )
    def test_each_is_named(self, recipe, override, text):
        assert text in refusal(recipe, PLAIN, override)

    @pytest.mark.parametrize("key", ["goals.macs", "filters.first_share", "compress.filters_share", "data.val_share"])
    def test_a_share_is_no_percentage(self, recipe, key):
        message = refusal(recipe, PLAIN, f"{key}=40")
        assert (
            f'{key} is the number 40, expected a share between 0 and 1; for 40 percent write 0.4 or "40%".' in message
        )

    def test_an_impossible_goal_stays_a_budget_error(self, recipe):
        assert "r.toml: macs is the share" in refusal(recipe, PLAIN, "goals.macs=-0.5", error=BudgetError)

    def test_all_are_listed_at_once(self, recipe):
        message = refusal(recipe, PLAIN, "filters.stpes=3", "goals.macs=half")
        assert message.startswith(message.split(":")[0] + ": 2 mistakes:\n")
        assert message.count("\n") == 2

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("macs = 0.5\n" + PLAIN, "macs is outside every section; the nearest is goals.macs."),
            ("goals = 1\n", "goals is the number 1, expected a section: write [goals] and its keys below."),
            ("[model]\nweights = 'x'\n[data]\nname='digits'", "model.build is missing."),
            ("[data]\nname = 'digits'", "there is no model: write [model] with build ="),
            ("[model]\nbuild = 'idap:digits_vit'", "there is no task: write [data] with name ="),
            ("[model\n", "is not valid TOML"),
            ("size = " + "9" * 5000, "is not valid TOML"),
            ("size = " + "[" * 100_000, "is nested too deep"),
        ],
    )
    def test_wrong_files(self, recipe, text, expected):
        assert expected in refusal(recipe, text)

    @pytest.mark.parametrize("override", ["goals.macs", "macs=0.5", "=3", "goals.=3"])
    def test_overrides_of_another_form(self, recipe, override):
        assert "is not section.key=value, as in --set goals.macs=0.5" in refusal(recipe, PLAIN, override)

    def test_an_override_that_is_nested_too_deep(self, recipe):
        assert "--set goals.macs is nested too deep" in refusal(recipe, PLAIN, "goals.macs=" + "[" * 5000)

    def test_an_override_without_its_section_gets_it(self, recipe):
        assert "(the nearest is goals.macs)" in refusal(recipe, PLAIN, "macs=0.5")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"there is no recipe .*r\.toml.*idap brings cifar10_resnet20, digits"):
            read_recipe(tmp_path / "r.toml")

    def test_a_recipe_of_idap_by_its_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert read_recipe("digits_resnet").name == read_recipe("digits_resnet.toml").name == "digits_resnet"
        (tmp_path / "digits_resnet.toml").write_text(PLAIN + "max_drop = 0.5")
        assert read_recipe("digits_resnet.toml").config().max_drop == 0.5  # a file goes before a name

    def test_a_file_that_is_no_text(self, tmp_path):
        (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="can't be read"):
            read_recipe(tmp_path / "r.toml")


class TestBuilding:
    def test_random_weights_follow_the_seed(self):
        def weights(seed):
            table = {"model": {"build": "idap:digits_vit"}, "data": {"name": "digits"}, "compress": {"seed": seed}}
            return make_recipe(table, "here").model().head.weight

        state = torch.random.get_rng_state()
        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_digits(self, recipe):
        task = recipe(PLAIN, "data.batch_size=10").task()
        images, labels = next(iter(task.batches("test")))
        assert (images.shape, labels.shape) == ((10, 1, 8, 8), (10,))

    def test_training_is_asked_for(self, recipe):
        assert recipe(PLAIN).training() is None
        assert recipe(PLAIN, "train.epochs=3").training() == Recovery(epochs=3.0)

    def test_keys_that_a_data_set_does_not_know(self, recipe):
        with pytest.raises(ConfigError, match=r"data\.val_size is not a key of digits, which takes seed, batch_size"):
            recipe(PLAIN, "data.val_size=3").task()

    @pytest.mark.parametrize("name", ["task", "build_task"])
    def test_a_task_of_the_users(self, recipe, name):
        text = f'[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:{name}"\n'
        read = recipe(text)
        assert read.task().metric_name == "accuracy"
        assert read.model().in_features == 3
        assert not [key for key in sys.path if "test_a_task_of_the_users" in key]

    def test_data_of_the_users(self, recipe, tmp_path):
        text = '[model]\nbuild="python:mine.py:build_model"\n[data]\nname="python:mine.py:splits"\npath="x"\n'
        images, _ = next(iter(recipe(text).task().batches("val")))
        assert images.shape == (2, 3)
        with pytest.raises(ConfigError, match=r"data\.seed is not a key of python:.*, which takes path, batch_size"):
            recipe(text + "seed = 3").task()
        with pytest.raises(
            ConfigError, match=r"gave list without 'train'; expected an idap\.Task, or an object with train, val"
        ):
            recipe(text.replace("splits", "no_splits")).task()

    def test_a_task_that_is_none(self, recipe):
        text = '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:build_model"\n'
        with pytest.raises(ConfigError, match=r"the task is Linear, expected an idap\.Task"):
            recipe(text).task()
