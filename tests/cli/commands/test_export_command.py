"""`idap export`: from a run or a model folder to a file, with the original from a spec, a recipe or the run itself."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import idap
from tests.cli.commands.test_commands import SCRIPT, plain_terminal, text  # noqa: F401 - a fixture
from tests.cli.commands.test_commands import idap as command
from tests.data import small_data

NET = SCRIPT.replace("nn.ReLU()", "nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout()")
MODEL = ("--model", "python:mine.py:build_model", "--input-shape", "2,4")


@pytest.fixture
def run(tmp_path):
    """A run folder with a result: half of the neurons are gone."""
    (tmp_path / "mine.py").write_text(NET)
    original = original_of()
    structure = idap.analyze(idap.trace(original, (torch.zeros(2, 4),)))
    plan = structure.plan({"0": range(0, 16, 2)})
    idap.save("run/model", idap.apply_plan(original, plan), plan)
    Path("run/run.json").write_text('{"model": "mine.Sequential"}')
    return idap.load("run/model", original_of())


def original_of():
    found = {}
    exec(compile(NET, "mine.py", "exec"), found)
    return found["build_model"]().eval()


def test_a_program(run):
    result = command("export", "run", *MODEL, "--to", "pt2", "--out", "out/small.pt2")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"out/small\.pt2: 0\.\d+ MB; any batch size; inputs input; outputs output\.", result.stdout)
    assert "Run at batch sizes 1, 2, 5: differs from the model by at most" in result.stdout
    x = torch.randn(7, 4)
    assert torch.allclose(torch.export.load("out/small.pt2").module()(x), run(x), atol=1e-6)


def test_weights_after_finalizing(run):
    result = command("export", "run/model", *MODEL, "--to", "safetensors", "--finalize", "--out", "small.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "Finalized: 1 batch norms folded, 0 kept; 1 dropouts" in text(result.stdout)
    assert "equal to the model, bit by bit" in result.stdout
    held = load_file("small.safetensors")
    assert set(held) == {"0.weight", "0.bias", "4.weight", "4.bias"} and held["0.weight"].shape == (8, 4)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is missing; make installs it")
def test_onnx_with_the_task_for_machines(run):
    words = ("--model", "python:mine.py:build_model", "--task", "python:mine.py:task", "--static-batch", "--json")
    result = command("export", "run", *words, "--finalize", "--opset", "19", "--out", "small.onnx")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert found["file"] == "small.onnx" and found["opset"] == 19 and found["batches"] == [16]
    assert found["finalized"]["folded"] == {"1": "0"} and Path("small.onnx").is_file()


def test_the_original_from_a_recipe_or_the_run(run, tmp_path):
    recipe = '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n'
    Path("r.toml").write_text(recipe)
    words = ("--to", "pt2", "--quiet", "--out")
    result = command("export", "run", "--model", "r.toml", *words, "a.pt2")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    table = {"model": {"build": "python:mine.py:build_model"}, "task": {"build": "python:mine.py:task"}}
    Path("run/run.json").write_text(json.dumps({"recipe": table}))
    assert command("export", "run", "--trust", *words, "b.pt2").exit_code == 0
    assert Path("a.pt2").is_file() and Path("b.pt2").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "--to", "pt2", "--out", "a.pt2"], "does not say how its original is built. Pass --model"),
        (["nowhere", *MODEL, "--out", "a.onnx"], "nowhere holds neither a run (run.json) nor a compressed model"),
        (
            ["run", *MODEL, "--to", "tflite", "--out", "a"],
            "--to must be onnx, pt2, safetensors or transformers, found 'tflite'",
        ),
        (["run", *MODEL, "--to", "pt2", "--out", "a.onnx"], "a.onnx should end in .pt2"),
        (["run", *MODEL[:2], "--to", "pt2", "--out", "a.pt2"], "are not known; give --input-shape"),
        (["run", *MODEL[:3], "2,5", "--to", "pt2", "--out", "a.pt2"], "does not accept the example inputs"),
        (["run", "--model", "idap:digits_vit", "--to", "pt2", "--out", "a.pt2"], "the plan does not fit this model"),
    ],
)
def test_mistakes_are_one_panel(run, words, expected):
    result = command("export", *words)
    assert result.exit_code == 2
    assert expected in text(result.stderr) and "idap export --help" in text(result.stderr)
    assert "Traceback" not in result.stderr and not list(Path().glob("a*"))


def test_a_run_without_a_result(run, tmp_path):
    Path("run/model/plan.json").rename("run/plan")
    found = text(command("export", "run", *MODEL, "--out", "a.onnx").stderr)
    assert "the run in run has no result yet; it has no accepted state either" in found
    (tmp_path / "run/checkpoints/step-004").mkdir(parents=True)
    Path("run/plan").rename("run/checkpoints/step-004/plan.json")
    found = text(command("export", "run", *MODEL, "--out", "a.onnx").stderr)
    assert "use an accepted state of it, such as run/checkpoints/step-004" in found


# ---------------------------------------------------------------------------------------------- folders of transformers


@pytest.fixture
def bert(tmp_path):
    """The result of a run on a tiny BERT; gives a function that leaves so many neurons to each layer."""

    def make(*left, tokens=True):
        import transformers

        folder = small_data.classifier_folder(tmp_path / "bert", tokens=tokens)
        original = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
        tokens = torch.randint(0, 12, (2, 8))
        structure = idap.analyze(idap.trace(original, (), {"input_ids": tokens, "attention_mask": tokens >= 0}))
        groups = [group.name for group in structure.groups if "intermediate" in group.name]
        plan = structure.plan({name: range(count) for name, count in zip(groups, left, strict=True)})
        idap.save("run/model", idap.apply_plan(original, plan), plan)
        Path("run/run.json").write_text('{"model": "transformers.BertForSequenceClassification"}')
        return ("--model", f"hf:{folder}")

    return make


def test_a_plain_folder_of_transformers(bert):
    from transformers import AutoTokenizer, BertForSequenceClassification

    result = command("export", "run", *bert(16, 16), "--to", "transformers", "--out", "small")
    assert result.exit_code == 0, result.stderr
    told = text(result.stdout)
    assert "small is a plain folder (intermediate_size 32 -> 16); it loads with Bert" in told
    assert "saved with " in told and "Tokenizer" in told
    small = BertForSequenceClassification.from_pretrained("small")
    assert small.config.intermediate_size == 16
    assert len(AutoTokenizer.from_pretrained("small")) == 12


def test_a_folder_with_a_plan_for_machines(bert):
    words = (*bert(16, 20, tokens=False), "--to", "transformers", "--out", "small", "--json")
    found = json.loads(command("export", "run", *words).stdout)
    assert found["to"] == "transformers" and found["bytes"] > 0 and found["difference"] is None
    how = found["pretrained"]
    assert not how["plain"] and how["reason"] and how["tokenizer"] is None
    assert eval(how["loads_with"], {"idap": idap}).bert.encoder.layer[1].intermediate.dense.out_features == 20


def test_a_recipe_knows_the_folder_of_its_model(bert):
    _, build = bert(16, 16)
    table = {"model": {"build": build, "classes": 2}, "data": {"name": "csv:reviews.tsv"}}
    Path("run/run.json").write_text(json.dumps({"recipe": table}))
    result = command("export", "run", "--to", "transformers", "--out", "small", "--json")
    assert result.exit_code == 0, result.stderr
    how = json.loads(result.stdout)["pretrained"]
    assert how["plain"] and "Token" in how["tokenizer"]


def test_heads_that_a_configuration_cannot_divide_are_no_plain_folder(tmp_path):
    """Equal tokens would hide it: the scores of attention are the same whatever the heads."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    original = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    structure = idap.analyze(idap.trace(original, (), {"input_ids": torch.randint(0, 64, (2, 8))}))
    groups = [group for group in structure.groups if group.kind == "head width"]
    plan = structure.plan({group.name: range(group.size // 2) for group in groups})
    small = idap.apply_plan(original, plan)
    idap.save("run/model", small, plan)
    Path("run/run.json").write_text('{"model": "transformers.LlamaForCausalLM"}')
    words = ("--model", f"hf:{tmp_path / 'llama'}", "--to", "transformers", "--out", "small", "--json")
    result = command("export", "run", *words)
    assert result.exit_code == 0, result.stderr
    how = json.loads(result.stdout)["pretrained"]
    saved = eval(how["loads_with"], {"idap": idap, "LlamaForCausalLM": transformers.LlamaForCausalLM}).eval()
    tokens = torch.randint(0, 64, (2, 8))
    assert torch.allclose(saved(tokens).logits, small(tokens).logits, atol=1e-5), how


def test_what_is_said_of_generating_stays(tmp_path):
    import transformers

    folder = small_data.language_folder(tmp_path / "gpt2")
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "max_new_tokens": 7}')
    original = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    original.config.use_cache = False
    structure = idap.analyze(idap.trace(original, (torch.randint(0, 256, (2, 8)),)))
    (first, *_) = [group for group in structure.groups if group.kind == "neurons"]
    plan = structure.plan({first.name: range(first.size // 2)})
    idap.save("run/model", idap.apply_plan(original, plan), plan)
    table = {"model": {"build": f"hf:{folder}"}, "data": {"name": "text:stories.txt", "tokenizer": "bytes"}}
    Path("run/run.json").write_text(json.dumps({"recipe": table}))
    result = command("export", "run", "--to", "transformers", "--out", "small")
    assert result.exit_code == 0, result.stderr
    told = json.loads(Path("small/original/generation_config.json").read_text())
    assert told["eos_token_id"] == 5 and told["max_new_tokens"] == 7
    assert json.loads(Path("small/original/config.json").read_text())["use_cache"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--finalize"], "--finalize changes modules"), (["--static-batch"], "--static-batch is for onnx and pt2"),
     (["--opset", "18"], "--opset is for onnx")],
)  # fmt: skip
def test_what_does_not_go_with_transformers(bert, words, expected):
    result = command("export", "run", *bert(16, 16), "--to", "transformers", "--out", "small", *words)
    assert result.exit_code == 2 and expected in text(result.stderr)
    assert not Path("small").exists()


def test_other_models_are_no_folder_of_transformers(run):
    result = command("export", "run", *MODEL, "--to", "transformers", "--out", "small")
    assert result.exit_code == 2 and "transformers" in text(result.stderr)
    assert not Path("small").exists()


@pytest.mark.parametrize("broken", ["{", "{}", "[]"])
def test_a_broken_tokenizer_is_named(bert, tmp_path, broken):
    words = bert(16, 16)
    (tmp_path / "bert" / "tokenizer.json").write_text(broken)
    result = command("export", "run", *words, "--to", "transformers", "--out", "small")
    assert result.exit_code == 2 and "its tokenizer can't be read" in text(result.stderr)
