"""The commands as a user types them: texts, exit codes, panels, JSON, and a script of the user's own."""

import errno
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idap.cli.commands.compress import _has_random_weights
from idap.cli.failure import state_of
from idap.cli.main import app
from idap.cli.tables import Comparison
from idap.recipes.recipe import read_recipe

SCRIPT = """
import torch
from torch import nn

import idap


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def task():
    random = torch.Generator().manual_seed(0)
    images = torch.randn(64, 4, generator=random)
    batches = list(zip(images.split(16), (images[:, 0] > 0).long().split(16)))
    return idap.classification(batches, batches, test=batches, num_classes=2)


def broken_task():
    return idap.classification([], [], num_classes=2)


def stopped_task():
    raise KeyboardInterrupt


def unexpected():
    class Net(nn.Linear):
        def forward(self, x):
            raise KeyError("boo")
    return Net(4, 2)
"""
QUICK = ["--set", "filters.steps=5", "--set", "layers.removals=0", "--set", "compress.filters_share=1.0"]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    return "python:mine.py"


def idap(*words):
    return CliRunner().invoke(app, list(words), prog_name="idap")


def text(*streams):
    """What was printed, without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", "".join(streams))


def compress(script, *words):
    return idap(
        *("compress", "--model", f"{script}:build_model", "--task", f"{script}:task"),
        *("--max-drop", "none", "--macs", "60%", *QUICK, *words),
    )


class TestHelp:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], ["demo", "inspect", "compress", "export", "Begin with idap demo", "2 wrong input"]),
            (["demo"], ["--fast", "--seed", "--out", "idap demo --fast"]),
            (["inspect"], ["--input-shape", "--json", "--members", "idap inspect idap:digits_vit"]),
            (
                ["compress"],
                ["--run-dir", "--data", "--weights", "--set", "--model", "--task", "--max-drop", "--macs", "--quiet"],
            ),
            (["compress"], ["--tensorboard", "Log the run for TensorBoard", "--resume"]),
            (
                ["export"],
                ["--to", "--out", "--finalize", "--model", "--task", "--opset", "--static-batch", "idap export"],
            ),
            (["compress"], ["idap compress recipes/digits_resnet.toml --set goals.macs=40%"]),
        ],
    )
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_every_command_has_help_with_an_example(self, words, expected, flag):
        result = idap(*words, flag)
        assert result.exit_code == 0
        for part in expected:
            assert part in text(result.stdout)

    def test_version(self):
        assert idap("--version").stdout.startswith("idap")

    def test_an_unknown_command(self):
        result = idap("compres")
        assert result.exit_code == 2
        assert "compress" in text(result.stderr)


class TestInspect:
    def test_a_tree(self):
        result = idap("inspect", "idap:digits_vit")
        assert result.exit_code == 0
        assert "DigitsViT: 115,450 parameters, " in result.stdout
        assert re.search(r"blocks\.0\.attn\.qkv:heads +4 heads +\d+\.\d% of MACs +3 tensors", result.stdout)
        assert re.search(r"blocks\.5 +block +\d+\.\d% of MACs\n[ │]+├── blocks\.5\.norm1…attn +branch", result.stdout)
        assert "head.weight, dimension 0 of size 10" in result.stdout
        assert "the model returns it" in result.stdout

    def test_json(self):
        found = json.loads(idap("inspect", "idap:digits_resnet", "--json").stdout)
        assert (found["model"], found["parameters"]) == ("DigitsResNet", 174_970)
        stem = found["groups"][0]
        assert (stem["name"], stem["kind"], stem["size"]) == ("stem.0", "channels", 16)
        assert "stem.0.weight[0]" in stem["members"]
        assert 0 < stem["macs_share"] < 1
        assert {block["kind"] for block in found["blocks"]} == {"block"}
        assert found["blocked"][0]["reason"].startswith("the model returns it")

    def test_what_needs_new_code_and_what_does_not_without(self, tmp_path):
        (tmp_path / "heads.py").write_text(
            "from torch import nn\n"
            "class Heads(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)\n"
            "    def forward(self, x):\n"
            "        found = self.attention(x, x, x, need_weights=False)[0]\n"
            "        return {'logits': self.head(found), 'features': found}\n"
        )
        words = ["inspect", "python:heads.py:Heads", "--input-shape", "1,4,8"]
        found = idap(*words, "--contract", "logits").stdout
        assert "1 module whose forward is rewritten when its groups are cut" in found
        assert re.search(r"attention:heads +2 heads", found) and re.search(r"attention\.out_proj +8 neurons", found)
        found = idap(*words, "--no-swap").stdout
        assert "written anew" not in found and "2 heads" not in found and "0 groups" in found
        result = idap(*words, "--contract", "logit")
        assert result.exit_code != 0 and "returns nothing named 'logit'; it returns logits, features" in text(
            result.stderr
        )

    def test_a_type_of_transformers(self):
        pytest.importorskip("transformers", reason="transformers is not installed; make installs it")
        result = idap("inspect", "transformers:bret")
        assert result.exit_code == 2 and "Did you mean bert" in text(result.stderr)

    def test_members(self):
        result = idap("inspect", "idap:digits_resnet", "--members")
        assert "stages.0.0.bn1.weight[0]" in result.stdout

    def test_a_script(self, script):
        result = idap("inspect", f"{script}:build_model", "--input-shape", "1,4")
        assert re.search(r"0 +16 neurons +100\.0% of MACs", result.stdout)
        assert idap("inspect", f"{script}:build_model", "--task", f"{script}:task").stdout == result.stdout

    def test_whole_numbers(self, tmp_path):
        (tmp_path / "words.py").write_text(
            "from torch import nn\ndef build():\n"
            "    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))\n"
        )
        result = idap("inspect", "python:words.py:build", "--input-shape", "1,5:int")
        assert re.search(r"1 +8 neurons", result.stdout)

    def test_a_recipe(self, tmp_path, script):
        recipe = tmp_path / "r.toml"
        recipe.write_text('[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n')
        assert "16 neurons" in idap("inspect", "r.toml").stdout
        recipe.write_text('[model]\nbuild="idap:digits_vit"\n[data]\nname="digits"\n')
        assert "DigitsViT" in idap("inspect", "r.toml").stdout

    def test_a_model_that_cannot_be_pruned_says_why(self, tmp_path):
        (tmp_path / "one.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(3, 2)\n")
        result = idap("inspect", "python:one.py:build", "--input-shape", "1,3")
        assert result.exit_code == 0
        assert "0 groups" in result.stdout
        assert "the model returns it" in result.stdout

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["idap:digits_vi"], "did you mean idap:digits_vit?"),
            (["idap:digits_vit", "--input-shape", "1x3"], "'1x3' is not a shape; write sizes with commas"),
            (["idap:digits_vit", "--input-shape", "1,0"], "write sizes above 0"),
            (["idap:digits_vit", "--input-shape", "1,3,8,8"], "does not accept the example inputs"),
            (["SCRIPT:build_model"], "are not known; give --input-shape 1,3,32,32"),
            (["SCRIPT:build_mode", "--input-shape", "1,4"], "Did you mean 'build_model'?"),
            (["nowhere.toml"], "there is no recipe nowhere.toml"),
        ],
    )
    def test_mistakes_are_one_panel(self, script, words, expected):
        words = [word.replace("SCRIPT", script) for word in words]
        result = idap("inspect", *words)
        assert result.exit_code == 2
        assert expected in text(result.stderr)
        assert f"in {words[0]}" in text(result.stderr)
        assert "idap inspect --help" in text(result.stderr)
        assert "Traceback" not in result.stderr
        assert result.stdout == ""

    def test_latency_of_layers(self):
        shown = idap("inspect", "idap:digits_vit", "--latency", "--batch", "3")
        assert shown.exit_code == 0, shown.stderr
        assert "Latency of layers, batch of 3, cpu" in shown.stdout
        assert re.search(r"blocks\.0\.mlp\.fc1 +96 +\d", shown.stdout)
        found = json.loads(idap("inspect", "idap:digits_vit", "--latency", "--json").stdout)
        assert found["batch"] == 1
        curve = found["groups"]["blocks.0.mlp.fc1"]
        assert curve["widths"][-1] == 96
        assert len(curve["seconds"]) == len(curve["spread"]) == len(curve["widths"])
        assert min(curve["seconds"]) > 0

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--latency", "--divergence"], "--divergence and --latency are two views"),
            (["--batch", "4"], "it needs --latency"),
        ],
    )
    def test_views_that_don_t_go_together(self, words, expected):
        refused = idap("inspect", "idap:digits_vit", *words)
        assert refused.exit_code == 2
        assert expected in text(refused.stderr)

    def test_a_traceback_on_request(self):
        result = idap("inspect", "idap:digits_vi", "--debug")
        assert result.exit_code == 2
        assert "Traceback (most recent call last)" in result.stderr

    def test_errors_for_machines(self):
        result = idap("inspect", "idap:digits_vi", "--json")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["kind"] == "ConfigError"
        assert result.stderr == ""


class TestCompress:
    def test_a_script_of_the_users(self, script, tmp_path):
        result = compress(script)
        assert result.exit_code == 0, result.stderr
        assert "filters 0: removed" in result.stdout
        assert re.search(r"parameters +114 +\d+ +−\d", result.stdout)
        assert "accuracy (test)" in result.stdout
        assert "latency, batch of 16" in result.stdout
        assert "Every goal was reached." in result.stdout
        assert (tmp_path / "runs/build_model/model/model.safetensors").is_file()
        card = (tmp_path / "runs/build_model/model/card.md").read_text(encoding="utf-8")
        found: dict[str, object] = {}
        exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], found)
        assert f"{sum(p.numel() for p in found['model'].parameters()):,} |\n| bytes of the weights" in card
        exported = idap("export", "runs/build_model", "--to", "pt2", "--out", "small.pt2")  # it knows its recipe
        assert exported.exit_code == 0, exported.stderr
        timed = idap("bench", "runs/build_model", "--batch", "1", "--batch", "8", "--repeats", "3", "--json")
        assert timed.exit_code == 0, timed.stderr
        found = json.loads(timed.stdout)
        assert [(row["engine"], row["batch"]) for row in found["rows"]] == [("eager", 1), ("eager", 8)]
        assert found["size"][1] < found["size"][0]

    @pytest.mark.parametrize(
        ("changes", "expected"), [([], True), (["train.epochs=1"], False), (["model.weights=w.safetensors"], False)]
    )
    def test_random_weights_are_no_trained_model(self, changes, expected):
        replaced = {"model.build": "idap:digits_vit", "data.path": "digits"}
        assert _has_random_weights(read_recipe(None, changes, replaced=replaced)) is expected

    def test_random_weights_are_said(self):
        words = ["--model", "idap:digits_resnet", "--data", "digits", "--macs", "90%", "--max-drop", "90%"]
        quick = ["filters.schedule=one-shot", "filters.streams=keep", "layers.removals=0", "recovery.epochs=0"]
        result = idap("compress", *words, *(word for each in quick for word in ("--set", each)))
        assert "idap:digits_resnet has random weights: no file of weights is given (--weights FILE)" in text(
            result.stdout
        )

    def test_every_goal_is_an_option(self, script):
        result = compress(script, "--parameters", "70%", "--size", "0.75", "--latency", "2")
        assert result.exit_code == 2
        assert "goals.latency is" in text(result.stderr)
        assert compress(script, "--parameters", "70%", "--size", "0.75").exit_code == 0

    def test_json_alone_on_the_standard_output(self, script, tmp_path):
        result = compress(script, "--json", "--run-dir", "out")
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["reached"] is True
        assert found["macs"]["after"] <= 0.6 * found["macs"]["before"]
        assert found["steps"][0]["stage"] == "filters"
        assert found["model"] == "out/model"
        assert "filters 0: removed" in result.stderr

    def test_quiet(self, script):
        result = compress(script, "--quiet")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")

    def test_a_goal_that_is_missed(self, script):
        result = compress(script, "--set", "filters.steps=1", "--set", "filters.first_share=0.1")
        assert result.exit_code == 1
        assert "MACs came down to" in text(result.stdout)

    def test_a_recipe_that_trains_first(self, tmp_path, script):
        (tmp_path / "mine.toml").write_text(
            '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n[train]\nepochs=20\n'
            "lr=0.1\n[goals]\nmacs=0.6\n[layers]\nremovals=0\n"
        )
        result = idap("compress", "mine.toml", "--json", "--quiet")
        assert result.exit_code == 0, result.stdout
        assert json.loads(result.stdout)["val"]["before"] > 0.9
        assert (tmp_path / "runs/mine/run.json").is_file()
        judged = json.loads(idap("evaluate", "runs/mine", "--json").stdout)
        assert judged["original"] == json.loads(result.stdout)["val"]["before"]

    def test_a_run_that_goes_on_does_not_train_its_original_again(self, tmp_path, script, monkeypatch):
        (tmp_path / "mine.toml").write_text(
            '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n[train]\nepochs=2\n'
            "[goals]\nmacs=0.6\n[layers]\nremovals=0\n[recovery]\nepochs=0\n"
        )
        whole = json.loads(idap("compress", "mine.toml", "--json", "--run-dir", "whole").stdout)

        def stopped(*args, **settings):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("idap.compress.run"), "compress", stopped)
            ended = idap("compress", "mine.toml", "--run-dir", "part")
        assert ended.exit_code == 130 and "holds the trained original. Go on with" in text(ended.stderr)
        assert "begin one with idap compress RECIPE --run-dir part --resume" in text(idap("resume", "part").stderr)
        half = tmp_path / "part" / f".original.safetensors.{'a' * 32}"  # as a killed process leaves it
        half.touch()
        refused = idap("compress", "mine.toml", "--run-dir", "part")
        assert refused.exit_code == 2 and "was stopped before it began" in text(refused.stderr)
        monkeypatch.setattr(importlib.import_module("idap.training.fit"), "fit", None)  # can't be called
        result = idap("compress", "mine.toml", "--json", "--run-dir", "part", "--resume")
        assert result.exit_code == 0, result.stderr
        assert "The original was trained before" in text(result.stderr)
        assert json.loads(result.stdout)["val"] == whole["val"]
        assert not half.exists()
        assert json.loads(idap("resume", "part", "--json").stdout)["val"] == whole["val"]

    def test_an_original_that_another_recipe_trained_is_refused(self, tmp_path, script, monkeypatch):
        told = '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n[train]\nepochs={}\n'
        (tmp_path / "mine.toml").write_text(told.format(1))
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("idap.compress.run"), "compress", None)
            idap("compress", "mine.toml", "--run-dir", "part")
        assert (tmp_path / "part/original.safetensors").is_file()
        (tmp_path / "mine.toml").write_text(told.format(2))
        result = idap("compress", "mine.toml", "--run-dir", "part", "--resume")
        assert result.exit_code == 2 and "was trained with another [model], [data], [task]" in text(result.stderr)

    def test_the_next_free_folder(self, script, tmp_path):
        (tmp_path / "runs/build_model").mkdir(parents=True)
        assert compress(script, "--quiet").exit_code == 0
        assert (tmp_path / "runs/build_model-2/run.json").is_file()

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--set", "filters.stpes=3"], "there is no key filters.stpes; the nearest is filters.steps."),
            (["--set", "macs=3"], "is not section.key=value"),
            (["--macs", "40"], "for 40 percent write 0.4"),
            (["--macs", "1.5%"], "macs=0.015 can't be reached"),
            (["--task", "python:mine.py:broken_task"], "the 'train' split gave no batches"),
            (["--task", "python:mine.py:tas"], "Did you mean 'task'?"),
            (["--data", "x"], "[task] brings its own data"),
            (["--weights", "x.safetensors"], "the weights x.safetensors do not exist"),
            (["--run-dir", "used"], "used exists and is not an empty folder; choose another one"),
        ],
    )
    def test_mistakes_come_before_any_work(self, script, tmp_path, words, expected):
        (tmp_path / "used").mkdir()
        (tmp_path / "used/file").touch()
        result = compress(script, *words)
        assert result.exit_code == 2
        assert expected in text(result.stderr)
        assert not (tmp_path / "runs").exists()

    def test_no_tensorboard(self, script, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        result = compress(script, "--tensorboard", "logs")
        assert result.exit_code == 2
        assert "Run: pip install 'idap[tensorboard]'" in text(result.stderr)
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "logs").exists()

    def test_each_start_has_its_log_for_tensorboard(self, script, tmp_path):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed; pip install 'idap[tensorboard]'")
        assert compress(script, "--tensorboard", "logs", "--run-dir", "here/mine").exit_code == 0
        assert compress(script, "--tensorboard", "logs", "--run-dir", "here/mine", "--resume").exit_code == 0
        assert sorted(folder.name for folder in (tmp_path / "logs").iterdir()) == ["mine", "mine-2"]
        assert all(any(folder.iterdir()) for folder in (tmp_path / "logs").iterdir())

    @pytest.mark.parametrize("words", [[], ["--model", "idap:digits_vit"], ["--task", "python:mine.py:task"]])
    def test_nothing_to_do(self, words):
        result = idap("compress", *words)
        assert result.exit_code == 2
        assert "a recipe, or --model and either --data or --task" in text(result.stderr)

    def test_what_nobody_expected(self, script, monkeypatch):
        def fail(*args, **kwargs):
            raise KeyError("boo")

        monkeypatch.setattr(sys.modules["idap.compress.run"], "compress", fail)
        result = compress(script)
        assert result.exit_code == 3
        assert "This should not have happened" in result.stderr
        assert "KeyError: 'boo'" in text(result.stderr)

    def test_stopped_before_anything_was_written(self, script):
        result = compress(script, "--task", "python:mine.py:stopped_task")
        assert result.exit_code == 130
        assert "Stopped. Nothing was written to runs/build_model." in text(result.stderr)

    def test_a_disk_that_is_full_is_no_broken_file(self, script, monkeypatch):
        def full(*_args, **_named):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("idap.saving.checkpoint.write_tensors", full)
            result = compress(script)
        assert result.exit_code == 2
        assert "The disk is full" in text(result.stderr)
        assert "cannot write the model to runs/build_model" in text(result.stderr)
        assert "Make room. runs/build_model holds" in text(result.stderr)
        assert "Go on with: idap resume runs/build_model" in text(result.stderr)
        assert idap("resume", "runs/build_model").exit_code == 0

    def test_stopped_in_the_middle(self, script, monkeypatch):
        from idap.record import RunFolder

        add = RunFolder.add

        def add_and_stop(folder, step):
            add(folder, step)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "add", add_and_stop)
            result = compress(script)
        assert result.exit_code == 130
        assert "Stopped. runs/build_model holds 1 finished step, 1 accepted" in text(result.stderr)
        assert "Go on with: idap resume runs/build_model" in text(result.stderr)
        shutil.copytree("runs/build_model", "runs/copy")
        for resumed in (compress(script, "--resume"), idap("resume", "runs/copy", "--trust")):
            assert resumed.exit_code == 0, resumed.stderr
            assert "(recalled)" in text(resumed.output)
        assert "every decision in runs/copy." in text(resumed.output)
        first, second = (Path("runs", name, "model/model.safetensors").read_bytes() for name in ("build_model", "copy"))
        assert first == second

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, "Nothing was written to run."),
            ({"run.json": "{}"}, "run holds the settings of the run and no finished step. Go on with: idap resume run"),
            (
                {"run.json": "{}", "steps.jsonl": '{"index": 0, "accepted": false}\n'},
                "run holds 1 finished step, 0 accepted.",
            ),
            (
                {
                    "run.json": "{}",
                    "steps.jsonl": '{"index": 0, "accepted": true}\n{"index": 1, "accepted": false}\n',
                    "checkpoints/step-000": "",
                },
                "run holds 2 finished steps, 1 accepted; the last accepted model is in run/checkpoints/step-000.",
            ),
            ({"run.json": "{}", "steps.jsonl": '{"index": 0, "acc'}, "in the middle of writing: line 1 of"),
        ],
    )
    def test_what_a_stopped_run_left(self, tmp_path, files, expected):
        for name, content in files.items():
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).write_text(content)
        assert expected in state_of(Path("run"))


def numbers():
    return Comparison(parameters=(2, 1), macs=(2, 1), metric_name="accuracy", val=(0.9, 0.8))


class TestDemo:
    @pytest.mark.parametrize(("reached", "code"), [(True, 0), (False, 1)])
    def test_options_are_handed_on(self, monkeypatch, tmp_path, reached, code):
        from idap.cli import demo

        seen = {}

        def fake(console, progress, **options):
            seen.update(options)
            console.print("the demo")
            return [demo.NetworkResult("net", reached, "done", numbers())]

        monkeypatch.setattr(demo, "run_demo", fake)
        result = idap("demo", "--fast", "--seed", "3", "--out", "here")
        assert result.exit_code == code
        assert "the demo" in result.stdout
        found = json.loads(idap("demo", "--fast", "--seed", "3", "--out", "here", "--json").stdout)
        assert [each["network"] for each in found] == ["net"] and found[0]["reached"] is reached
        assert idap("demo", "--fast", "--seed", "3", "--out", "here", "--quiet").output == ""
        assert {name: str(value) for name, value in seen.items()} == {"fast": "True", "seed": "3", "out": "here"}
