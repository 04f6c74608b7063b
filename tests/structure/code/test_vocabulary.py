"""The functions that a plan may call: just those that the tracer meets, each with arguments that can do no harm."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from idap.graph.frames import Step
from idap.graph.recording import torch_functions
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.structure.code.rewrite import Rewriter
from idap.structure.code.safeguards import SAFEGUARDED
from idap.structure.code.vocabulary import exclusions, fits, function_of_name, mistake, read_signatures, vocabulary
from tests.conformance.function_calls import FunctionCalls

COVERAGE = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "functions.json"


@pytest.fixture(scope="module")
def calls() -> list[Step]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd pools and channels
        graph = trace(FunctionCalls().eval(), (torch.rand(2, 4, 4),))
    return [step for frames in graph.frames[""] for frame in frames for step in frame.steps]


def test_the_list_is_what_the_tracer_meets(calls: list[Step]) -> None:
    """`python -m tests.conformance.functions` notes what the architectures of the catalogue call."""
    met = {step.function for step in calls} | {
        name for names in json.loads(COVERAGE.read_text())["models"].values() for name in names
    }
    assert sorted(met - set(vocabulary()) - exclusions()) == [], "called by models, and not in functions.txt"
    assert exclusions() <= met and not exclusions() & set(vocabulary())
    assert sorted(set(vocabulary()) - met) == [], "in functions.txt, and called by no model"


def test_every_line_is_a_function_of_torch() -> None:
    assert set(vocabulary()) <= set(torch_functions())
    others = [name for name in vocabulary() if function_of_name(name) is not torch_functions()[name]]
    assert sorted(others) == sorted(SAFEGUARDED)


def test_no_parameter_reaches_out() -> None:
    names = {parameter.name for overloads in vocabulary().values() for each in overloads for parameter in each}
    assert not names & {"generator", "layout", "storage", "cdata", "callable", "func", "file", "filename", "names"}
    kinds = {p.kinds for overloads in vocabulary().values() for each in overloads for p in each if p.name == "out"}
    assert kinds <= {("none",)}


@pytest.mark.parametrize("name", sorted(n for n in vocabulary() if n.startswith("torch.Tensor.")))
def test_methods_have_the_parameters_of_their_schema(name: str) -> None:
    """What the list lets through must be what ATen takes: names, but for those that Python's layer adds."""
    operator = name.removeprefix("torch.Tensor.").removesuffix(".__get__").strip("_") if "__" in name else name[13:]
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{operator}")
    if not schemas:
        pytest.skip("made of other operators in Python")
    known = {argument.name for schema in schemas for argument in schema.arguments}
    python = {"requires_grad", "dtype", "keepdim", "dim", "memory_format", "data"}  # of overloads without a schema
    python |= {"size", "repeats", "sizes", "source", "destination", "indices_or_sections", "other", "key", "value"}
    unknown = {p.name for each in vocabulary()[name] for p in each} - known - python - {"self"}
    assert not unknown


def test_a_function_beyond_the_list_leaves_its_module_as_it_is() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read = torch.nn.Linear(4, 12), torch.nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.write(x).view(-1, 3, 4)
            return self.read(hidden.view(-1, 12) + torch.trapezoid(x).unsqueeze(1))

    graph = trace(Net().eval(), (torch.ones(2, 4),))
    rewriter = Rewriter(graph)
    assert not rewriter.possible("")
    assert re.search(r"calls 'torch\.trapezoid', which is not among the functions", rewriter.refused[""])
    structure = analyze(graph, freeze_unknown=True, required=False)
    assert not structure.groups
    assert any("torch.trapezoid" in reason for reason in map(str, structure.blocked))


VALUE = ("value", 0)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("torch.Tensor.new", (VALUE,), [("cdata", 71748523458560)]),
        ("torch.Tensor._cdata.__get__", (VALUE,), []),
        ("torch.Tensor.const_data_ptr", (VALUE,), []),
        ("torch.quantized_lstm_cell", (VALUE,), []),
        ("torch.Tensor.to_mkldnn", (VALUE,), []),
        ("torch.from_file", ("/etc/passwd",), []),
        ("torch.Tensor.as_strided", (VALUE, ("list", 4), ("list", 1)), []),
        ("torch.Tensor.view", (VALUE, ("dtype", "int64")), []),
        ("torch.Tensor.add", (VALUE, VALUE), [("out", VALUE)]),
        ("torch.Tensor.add", (VALUE, VALUE), [("alpha", 1), ("alpha", 2)]),
        ("torch.Tensor.add", (VALUE, VALUE, 1), []),
        ("torch.Tensor.add", (VALUE, "text"), []),
        ("torch.Tensor.softmax", (VALUE,), []),
        ("torch.Tensor.repeat_interleave", (VALUE, ("tuple", VALUE)), []),
        ("torch.nn.functional.pad", (VALUE, ("tuple", 1, 1), "wrap"), []),
        ("torch.functional.einsum", ("ij->\n", VALUE), []),
        ("torch.zeros", (3,), [("layout", "strided")]),
        ("torch.Tensor.repeat_interleave", (VALUE, VALUE), []),
        ("torch.lstm", (VALUE, ("list", VALUE), ("list", VALUE), False, 1, 0.0, False, False, True), []),
        ("torch.Tensor.narrow", (VALUE, 0, 0, VALUE), []),
        ("torch.Tensor.__getitem__", (VALUE, ("slice", VALUE, None, None)), []),
        ("torch.Tensor.__getitem__", (VALUE, ("tuple", ("list", 0, 1))), []),
    ],
)
def test_what_a_program_may_not_call(name: str, args: tuple[object, ...], kwargs: list[tuple[str, object]]) -> None:
    assert mistake(name, args, kwargs)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("torch.Tensor.view", (VALUE, 2, -1), []),
        ("torch.Tensor.view", (VALUE, ("tuple", 2, ("calc", "*", 2, 3))), []),
        ("torch.Tensor.view", (VALUE,), [("size", ("list", 2, 3))]),
        ("torch.Tensor.__getitem__", (VALUE, ("tuple", ("ellipsis",), ("slice", None, 3, None), None, VALUE)), []),
        ("torch.nn.functional.softmax", (VALUE,), [("dim", -1), ("dtype", ("same type",))]),
        ("torch.arange", (("size", VALUE, 0),), [("device", ("device",))]),
    ],
)
def test_what_a_program_may_call(name: str, args: tuple[object, ...], kwargs: list[tuple[str, object]]) -> None:
    assert mistake(name, args, kwargs) == ""


@pytest.mark.parametrize("text", ["self", "self:thing", "self:'a'|thing", "self tensor"])
def test_signatures_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        read_signatures(text)


def test_required_parameters_are_required_by_name_too() -> None:
    signature = read_signatures("self:tensor * k:int")
    assert fits(signature, (VALUE,), [("k", 3)])
    assert not fits(signature, (VALUE, 3), ()) and not fits(signature, (VALUE,), ())
