"""An exported file gives what the model gives, at any batch size, or there is no file."""

import dataclasses
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from idap.deploy import writers
from idap.deploy.export import export, export_weights
from idap.errors import ConfigError, ExportError
from idap.surgery.apply import apply_plan
from idap.surgery.compare import outputs_of
from tests.conformance.proofs import random_plan, random_set
from tests.nets import by_name, randomised, sequence, structure_of

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are missing; make installs them")
FORMS = [pytest.param("onnx", marks=needs_onnx), "pt2"]
every_form = pytest.mark.parametrize("to", FORMS)


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def cut(name):
    """A net with random units and blocks removed, and modules rewritten where it needs that."""
    structure = structure_of(name)
    plan = structure.plan(random_plan(structure, 0.4).keep, random_set(structure, 1))
    return apply_plan(by_name[name].model(), plan)


@pytest.mark.parametrize("name", ["densenet", "torch encoder, swapped", "scale from shape, swapped", "in place"])
def test_cut_nets_as_programs(name, tmp_path):
    net = by_name[name]
    done = export(cut(name), net.args, tmp_path / "net.pt2", kwargs=net.kwargs, to="pt2")
    assert done.difference <= 1e-6 and done.batches[:2] == (1, 2)


@needs_onnx
@pytest.mark.parametrize("name", ["resnet basic", "cifar held", "vision transformer", "recurrent"])
def test_cut_nets_as_onnx(name, tmp_path):
    net = by_name[name]
    done = export(cut(name), net.args, tmp_path / "net.onnx", kwargs=net.kwargs)
    assert done.difference <= 1e-5 and done.batches == (1, 2, 5) and done.bytes == done.file.stat().st_size
    assert files(tmp_path) == ["net.onnx"]


@needs_onnx
def test_an_onnx_file_runs_by_its_names(tmp_path):
    import numpy as np
    import onnxruntime

    net = by_name["language model, swapped"]
    model = cut(net.name)
    done = export(model, net.args, tmp_path / "net.onnx", kwargs=net.kwargs)
    assert done.inputs == ("ids", "mask") and done.outputs[0] == "logits" and done.opset >= 18
    session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 5]
    ids, mask = torch.randint(0, 11, (7, 5)), torch.ones(7, 5)
    found = session.run(["logits"], {"mask": mask.numpy(), "ids": ids.numpy()})[0]
    expected = outputs_of(model, (ids,), {"mask": mask})[0]
    assert np.allclose(found, expected.numpy(), atol=1e-5)


def test_a_program_keeps_the_outputs_as_they_were(tmp_path):
    net = by_name["language model, swapped"]
    model = cut(net.name)
    export(model, net.args, tmp_path / "net.pt2", kwargs=net.kwargs, to="pt2")
    found = torch.export.load(str(tmp_path / "net.pt2")).module()(*net.args, **net.kwargs)
    assert set(found) == set(model(*net.args, **net.kwargs))


class Odd(nn.Module):
    """Does what its name says with a linear layer's output."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how

    def forward(self, x, y=None, *, mask=None, factor=2):
        z = self.layer(x)
        ways = {
            "tensor": lambda: z,
            "nested": lambda: {"q": [z, {"r": (z * 2,)}]},
            "with none": lambda: (z, None, z * 2),
            "twice": lambda: (z, z),
            "its input": lambda: {"x": x, "z": z},
            "keywords": lambda: (z + y) * mask * factor,
            "whole numbers": lambda: z.argmax(1),
            "fixes the batch": lambda: z.reshape(2, 3),
            "random": lambda: z + torch.rand_like(z),
            "an int": lambda: (z, 3),
            "own class": lambda: Pair(z, z),
            "no onnx": lambda: torch.linalg.svdvals(z),
        }
        return ways[self.how]()


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Known(Pair):
    pass


torch.export.register_dataclass(Known, serialized_type_name="tests.Known")


class Registered(Odd):
    def forward(self, x):
        return Known(self.layer(x), x)


@every_form
@pytest.mark.parametrize(
    ("how", "outputs"),
    [
        ("nested", ("q.0", "q.1.r.0")),
        ("with none", ("0", "2")),
        ("twice", ("0", "1")),
        ("whole numbers", ("output",)),
    ],
)
def test_outputs_of_every_kind(how, outputs, to, tmp_path):
    model = randomised(Odd(how).eval())
    done = export(model, (torch.randn(3, 4),), tmp_path / f"net.{to}", to=to)
    assert done.outputs == outputs and done.inputs == ("x",) and done.batches == (1, 2, 3, 5)


@every_form
def test_outputs_of_a_registered_class(to, tmp_path):
    done = export(Registered("").eval(), (torch.randn(2, 4),), tmp_path / f"net.{to}", to=to)
    assert done.outputs == ("first", "second")


@every_form
def test_an_output_that_is_called_as_an_input(to, tmp_path):
    done = export(Odd("its input"), (torch.randn(2, 4),), tmp_path / f"net.{to}", to=to)
    assert done.outputs[0] == {"onnx": "x.output", "pt2": "x"}[to]


@every_form
def test_keyword_inputs_in_any_order(to, tmp_path):
    kwargs = {"factor": 3, "mask": torch.ones(2, 1), "y": torch.randn(2, 3)}
    done = export(Odd("keywords"), (torch.randn(2, 4),), tmp_path / f"net.{to}", kwargs=kwargs, to=to)
    assert set(done.inputs) == {"x", "y", "mask"} and done.difference <= 1e-6
    kwargs = {"mask": torch.ones(1, 1)}  # an input without batch, and a batch of one
    args = (torch.randn(1, 4), torch.randn(3))
    assert export(Odd("keywords"), args, tmp_path / f"net.{to}", kwargs=kwargs, to=to).batches == (1, 2, 5)


def test_the_model_stays_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    x = torch.randn(2, 4)
    before, given = {name: tensor.clone() for name, tensor in model.state_dict().items()}, x.clone()
    export(model, (x,), tmp_path / "net.pt2", to="pt2")
    assert model.training and torch.equal(x, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestRefusals:
    @pytest.fixture(autouse=True)
    def check_folder_is_empty(self, tmp_path):
        yield
        assert files(tmp_path) == []

    @every_form
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("random", r"Odd, exported to net\.\w+, differs from the model with a batch of 1: output 0 differs by"),
            ("fixes the batch", r"the batch size of Odd can't be left open: .*\(2\)\. .*dynamic_batch=False"),
            ("own class", r"Pair.*Register that class with torch\.export\.register_dataclass"),
        ],
    )
    def test_what_no_file_can_hold(self, how, said, to, tmp_path):
        with pytest.raises(ExportError, match=said):
            export(Odd(how), (torch.randn(2, 4),), tmp_path / f"net.{to}", to=to)

    @needs_onnx
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("an int", "returns int beside tensors, which ONNX can't hold"),
            ("no onnx", "torch.onnx cannot write Odd: DispatchError: No ONNX function found for .*svd"),
        ],
    )
    def test_what_onnx_cannot_hold(self, how, said, tmp_path):
        with pytest.raises(ExportError, match=said):
            export(Odd(how), (torch.randn(2, 4),), tmp_path / "net.onnx")

    @needs_onnx
    def test_a_precision_that_cannot_be_checked(self, tmp_path):
        with pytest.raises(ExportError, match=r"onnxruntime cannot run net\.onnx .*export the model in float32"):
            export(Odd("tensor").bfloat16(), (torch.randn(2, 4).bfloat16(),), tmp_path / "net.onnx")

    def test_a_file_that_differs(self, tmp_path, monkeypatch):
        true = writers.program_runner
        monkeypatch.setattr(
            "idap.deploy.export.program_runner",
            lambda file: lambda args, kwargs: [tensor + (len(tensor) == 5) for tensor in true(file)(args, kwargs)],
        )
        with pytest.raises(ExportError, match="differs from the model with a batch of 5: output 0 differs by"):
            export(Odd("tensor"), (torch.randn(2, 4),), tmp_path / "net.pt2", to="pt2")

    def test_a_file_that_does_not_run(self, tmp_path, monkeypatch):
        def load_broken(file):
            return lambda args, kwargs: 1 / 0

        monkeypatch.setattr("idap.deploy.export.program_runner", load_broken)
        with pytest.raises(ExportError, match="does not run with a batch of 1: ZeroDivisionError"):
            export(Odd("tensor"), (torch.randn(2, 4),), tmp_path / "net.pt2", to="pt2")

    @pytest.mark.parametrize(
        ("args", "more", "error", "said"),
        [
            ((torch.randn(2, 5),), {}, ExportError, "does not accept the example inputs: RuntimeError"),
            (torch.randn(2, 4), {}, ExportError, r"must be a tuple, found Tensor; for one input x write \(x,\)"),
            ((torch.randn(2, 4),), {"to": "tflite"}, ConfigError, "'onnx' or 'pt2', found 'tflite'"),
            ((torch.randn(2, 4),), {"to": "onnx"}, ConfigError, r"net\.pt2 should end in \.onnx"),
            ((torch.randn(2, 4),), {"to": "pt2", "opset": 18}, ConfigError, "an opset is a version of ONNX"),
        ],
    )
    def test_wrong_arguments(self, args, more, error, said, tmp_path):
        with pytest.raises(error, match=said):
            export(Odd("tensor"), args, tmp_path / "net.pt2", **{"to": "pt2", **more})

    def test_inputs_without_a_batch(self, tmp_path):
        class Scalar(nn.Module):
            def forward(self, x):
                return x * 2

        with pytest.raises(ExportError, match="no input of Scalar has a batch dimension"):
            export(Scalar(), (torch.ones(()),), tmp_path / "net.pt2", to="pt2")

    def test_a_model_without_weights(self, tmp_path):
        with pytest.raises(ExportError, match="on the meta device and has no weights"):
            export(Odd("tensor").to("meta"), (torch.randn(2, 4),), tmp_path / "net.pt2", to="pt2")

    def test_a_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ExportError, match=r"ONNX needs the package onnx, .*pip install 'idap\[onnx\]'"):
            export(Odd("tensor"), (torch.randn(2, 4),), tmp_path / "net.onnx")


def test_a_file_that_was_there_stays_on_a_mismatch(tmp_path):
    file = tmp_path / "net.pt2"
    export(Odd("tensor"), (torch.randn(2, 4),), file, to="pt2")
    before = file.read_bytes()
    with pytest.raises(ExportError, match="differs"):
        export(Odd("random"), (torch.randn(2, 4),), file, to="pt2")
    assert file.read_bytes() == before
    export(Odd("nested"), (torch.randn(2, 4),), file, to="pt2")
    assert file.read_bytes() != before and files(tmp_path) == ["net.pt2"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write"):
        export(Odd("tensor"), (torch.randn(2, 4),), tmp_path / "file" / "net.pt2", to="pt2")


@every_form
def test_a_fixed_batch_on_request(to, tmp_path):
    args = (torch.randn(2, 4),)
    done = export(Odd("fixes the batch"), args, tmp_path / f"net.{to}", to=to, dynamic_batch=False)
    assert done.batches == (2,) and not done.dynamic_batch


@needs_onnx
def test_large_models_keep_their_weights_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_INLINE_BYTES", 0)
    model = nn.Linear(64, 64)
    done = export(model, (sequence(64),), tmp_path / "net.onnx")
    assert files(tmp_path) == ["net.onnx", "net.onnx.data"]
    run = writers.onnx_runner(tmp_path / "net.onnx")
    x = torch.randn(3, 5, 64)
    assert torch.allclose(run((x,), {})[0], model(x), atol=1e-5) and done.bytes > 64 * 64 * 4


def test_weights_alone(tmp_path):
    model = cut("shared")
    done = export_weights(model, tmp_path / "net.safetensors")
    held = load_file(str(done.file))
    assert done.bytes == done.file.stat().st_size and done.difference == 0
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in held.items())
    with pytest.raises(ConfigError, match=r"should end in \.safetensors"):
        export_weights(model, tmp_path / "net.bin")
