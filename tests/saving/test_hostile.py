"""Files from elsewhere: whatever is wrong with them is an idap error that says so, and nothing runs or is written."""

import copy
import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from idap.errors import CheckpointError, IdapError, InsufficientMemoryError, PlanError
from idap.graph.trace import trace
from idap.parsing import LARGEST_PLAN
from idap.saving.checkpoint import digest, fingerprint, load, read_plan, save
from idap.saving.stream import apply_to_checkpoint
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests import nets
from tests.saving.test_stream import store_tensors


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.TransformerEncoderLayer(8, 4, 12, batch_first=True) for _ in range(2))
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 2)).eval()


@cache
def real() -> tuple[nn.Module, Plan, dict[str, Any]]:
    """A model, and a plan for it with rewritten code, as plain data."""
    model = build()
    structure = analyze(trace(model, (nets.sequence(4),)))
    plan = structure.plan({"1.self_attn:heads": [0, 2], "0": [0, 1, 5]}, ["2"])
    assert plan.programs and plan.replaced and plan.attributes
    return model, plan, json.loads(json.dumps(plan.to_json()))


# --------------------------------------------------------------------------------------------------------------- plans


def at(data: Any, *path: Any) -> Any:
    for key in path:
        data = data[key]
    return data


def deep(levels: int = 5000) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def set_key(part: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[part].__setitem__(key, value)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "descending": (set_key("tensors", "0.weight", {"0": [5, 1]}), "expected ascending numbers, found 1 after 5"),
    "twice": (set_key("tensors", "0.weight", {"0": [1, 1]}), "expected ascending numbers, found 1 after 1"),
    "out of range": (
        set_key("tensors", "0.weight", {"0": [1, 8]}),
        r"keeps slot 8 of dimension 0 of tensor '0\.weight'",
    ),
    "negative": (set_key("tensors", "0.weight", {"0": [-1]}), "expected numbers of at least 0, found -1"),
    "nothing kept": (set_key("tensors", "0.weight", {"0": []}), r"keeps no slot of dimension 0 of tensor '0\.weight'"),
    "no such dimension": (set_key("tensors", "0.weight", {"2": [0]}), r"keeps slot 0 of dimension 2 of tensor"),
    "odd dimension": (set_key("tensors", "0.weight", {"00": [0]}), "expected the number of a dimension, found '00'"),
    "no such tensor": (set_key("tensors", "9.weight", {"0": [0]}), r"cuts tensor '9\.weight' but does not give"),
    "a float": (set_key("keep", "0", [1.0]), r"expected a whole number, found 1\.0"),
    "true": (set_key("keep", "0", [True]), "expected a whole number, found True"),
    "a string": (set_key("keep", "0", "12"), "expected a list, found '12'"),
    "huge": (set_key("shapes", "0.weight", [10**30]), "a number is larger than any in a model"),
    "huge attribute": (set_key("attributes", "0", {"in_features": 2**70}), "a number is larger than any in a model"),
    "number as kind": (set_key("replaced", "1", 3), "expected a string, found 3"),
    "takes": (set_key("called", "1", [-1, ["stream"]]), "expected numbers of at least 0, found -1"),
    "gives": (set_key("called", "1", [0, ["exec", "x"]]), r"a stand-in can't return \('exec', 'x'\)"),
    "deep gives": (set_key("called", "1", [0, deep()]), "nested deeper than 64 lists|RecursionError"),
    "aliases": (set_key("aliases", "x", None), "expected a string, found None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_plan_is_said(name: str) -> None:
    change, message = WRONG[name]
    data = copy.deepcopy(real()[2])
    change(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], 3, "plan", {}, {"keep": 3}, {1: 2}])
def test_what_is_no_plan_at_all(data: Any) -> None:
    with pytest.raises(PlanError, match="this is not a plan"):
        Plan.from_json(data)


def test_keys_that_are_no_strings() -> None:
    data = {**real()[2], "keep": {3: [1]}}
    with pytest.raises(PlanError, match="expected a string, found 3"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "function",
    [
        "os.system",
        "eval",
        "torch.load",
        "torch.hub.load",
        "torch.Tensor.apply_",
        "torch.ops.load_library",
        "torch.save",
    ],
)
def test_functions_that_compute_no_tensor_are_never_called(function: str, tmp_path: Path) -> None:
    model, _, data = real()
    data = copy.deepcopy(data)
    (program,) = data["programs"].values()
    next(step for step in program[0]["steps"] if step[0])[0] = function
    with pytest.raises(PlanError, match=r"calls '.*', which is not among the functions"):
        apply_plan(model, Plan.from_json(data))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**70, ["float", 3], ["value", -1], ["code", "x"], deep(60)]
)
def test_numbers_and_tags_in_code_that_mean_nothing(value: Any) -> None:
    data = copy.deepcopy(real()[2])
    (program,) = data["programs"].values()
    program[0]["output"] = value
    with pytest.raises(PlanError, match="which means nothing"):
        Plan.from_json(data)


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model, plan, _ = real()
    save(tmp_path / "saved", apply_plan(model, plan), plan)
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": NaN}', "NaN is not valid JSON"),
        ('{"format": 1, "format": 1}', "the key 'format' appears twice"),
        ("[" * 200_000, "nested too deep"),
        ('{"format": ' + "9" * 5000 + "}", "broken: the whole number 999999999999... has 5000 digits"),
        ('{"format": ' + "9" * 50 + "}", "broken: the whole number 999999999999... has 50 digits"),
        ('{"format": 1, "plan": []}', "this is not a plan"),
    ],
)
def test_json_that_means_harm(text: str, message: str, model_folder: Path) -> None:
    (model_folder / "plan.json").write_text(text)
    with pytest.raises(IdapError, match=message):
        load(model_folder, build())


def enlarge(file: Path, size: int) -> None:
    with file.open("r+b") as held:
        held.truncate(size)  # no byte of it is on the disk


def test_a_plan_that_is_larger_than_any_is_refused_before_it_is_read(model_folder: Path) -> None:
    enlarge(model_folder / "plan.json", 600 * 2**20)
    with pytest.raises(CheckpointError, match=r"plan\.json is broken: its 629,145,600 bytes .* than the 268,435,456"):
        load(model_folder, build())


def test_a_plan_that_may_hold_more_than_memory_is_refused_before_it_is_read(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enlarge(model_folder / "plan.json", 2**27)
    monkeypatch.setenv("IDAP_MEMORY", "4GB")
    message = r"reading .*plan\.json, which has 134\.2 MB .* would take 5\.9 GB of memory on cpu, and 4\.0 GB may"
    with pytest.raises(InsufficientMemoryError, match=message):
        load(model_folder, build())


def test_an_index_that_is_larger_than_any_is_refused_before_it_is_read(sharded_folder: Path) -> None:
    enlarge(sharded_folder / "model.safetensors.index.json", 2**26 + 1)
    rejects(sharded_folder, r"index\.json is broken: its 67,108,865 bytes are more than the 67,108,864")


def test_the_largest_plan_has_room_for_a_model_of_70_billion_parameters() -> None:
    """Bytes of a slot as it is written, times the slots of all dimensions of a Llama of 80 layers and width 8192."""
    slot = len(json.dumps({"plan": {"tensors": {"a": {"0": [28671, 28671]}}}}, indent=1).split("\n")[6]) + 1
    stream, wide, narrow = 8192, 28672, 1024
    layer = 11 * stream + 2 * narrow + 3 * wide  # norms, inputs and outputs of seven matrices
    slots = 80 * (layer + wide + 8) + 4 * stream
    assert 150 * 2**20 < slot * slots < LARGEST_PLAN < 2 * slot * slots


def test_a_folder_in_place_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*plan\.json: it is not a file"):
        read_plan(tmp_path)


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def sharded_folder(tmp_path: Path) -> Path:
    model, plan, _ = real()
    original = store_tensors(tmp_path / "original", model.state_dict())
    apply_to_checkpoint(plan, original, tmp_path / "sharded", max_shard_size=300)
    return tmp_path / "sharded"


def rejects(folder: Path, message: str) -> None:
    fresh = build()
    with pytest.raises(CheckpointError, match=message):
        load(folder, fresh)
    torch.testing.assert_close(fresh.state_dict(), build().state_dict(), rtol=0, atol=0)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name", ["../original/model.safetensors", "/etc/passwd", "", "..", "a/b.safetensors", "c:x", "a\\b", "a\0b"]
)
def test_an_index_may_only_name_files_of_its_folder(name: str, sharded_folder: Path) -> None:
    edit_index(sharded_folder, lambda data: data["weight_map"].update({"0.weight": name}))
    rejects(sharded_folder, "which is not the plain name of a file")


def test_links_out_of_the_folder_are_not_followed(sharded_folder: Path, tmp_path: Path) -> None:
    shard = next(sharded_folder.glob("model-00001*"))
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    rejects(sharded_folder, r"is a link out of the folder, to .*outside\.safetensors; put the file itself there")
    shard.unlink()
    shard.symlink_to(shard.name)
    rejects(sharded_folder, r"cannot follow|is missing|link")


def test_links_into_the_cache_of_hugging_face_are_followed(sharded_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sharded_folder.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    load(snapshot, build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("weight_map"), "it has no weight_map that says in which file"),
        (lambda data: data.update(weight_map={}), "it has no weight_map"),
        (lambda data: data.update(weight_map=[1]), "it has no weight_map"),
        (lambda data: data["weight_map"].update({"0.weight": 3}), r"the file of tensor '0\.weight' is given as 3"),
        (lambda data: data["weight_map"].update({"0.weight": "none.safetensors"}), r"none\.safetensors is missing"),
        (lambda data: data["weight_map"].pop("0.weight"), r"holds tensor '0\.weight', which the index of .* lacks"),
        (
            lambda data: data["weight_map"].update({"new": data["weight_map"]["0.weight"]}),
            r"says that tensor 'new' is in",
        ),
    ],
)
def test_an_index_that_is_wrong(change: Callable[[dict[str, Any]], Any], message: str, sharded_folder: Path) -> None:
    edit_index(sharded_folder, change)
    rejects(sharded_folder, message)


def test_a_tensor_that_comes_twice(sharded_folder: Path) -> None:
    files = sorted(sharded_folder.glob("model-*"))
    first, second = (safetensors.torch.load_file(file) for file in files[:2])
    safetensors.torch.save_file(second | dict(list(first.items())[:1]), files[1])
    rejects(sharded_folder, r"is both in .*00001.* and in .*00002")


def test_a_shard_that_was_cut_short(sharded_folder: Path) -> None:
    shard = next(sharded_folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    rejects(sharded_folder, r"model-00002.* is truncated or not a safetensors file")


def test_a_type_that_torch_lacks(model_folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (model_folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    rejects(model_folder, r"tensor 'x' in .* is of type F4, which can't be read here|truncated or no safetensors")


# ---------------------------------------------------------------------------------------------------------------- fuzz

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["value", "own", "calc", "stream", "0.weight", "1", "identity", "torch.relu", 2**63, -(2**63)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [found for key in keys for found in [(*path, key), *places(data[key], (*path, key))]]


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    data = copy.deepcopy(real()[2])
    for _ in range(draw(st.integers(1, 3))):
        spots = places(data)
        *path, key = spots[draw(st.integers(0, len(spots) - 1))]
        holder = at(data, *path)
        match draw(st.sampled_from(["replace", "replace", "delete", "copy", "nudge"])):
            case "replace":
                holder[key] = draw(PLAIN)
            case "delete":
                del holder[key]
            case "copy":
                holder[key] = copy.deepcopy(at(data, *spots[draw(st.integers(0, len(spots) - 1))]))
            case "nudge":
                if type(holder[key]) is int:
                    holder[key] += draw(st.integers(-2, 2))
    return data


def try_out(action: Callable[[], object]) -> None:
    """Only what idap raises on purpose may come out."""
    with suppress(IdapError):
        action()


FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FUZZ
@given(data=mutations() | PLAIN)
def test_any_plan_is_taken_or_refused(data: Any) -> None:
    model = real()[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try_out(lambda: apply_plan(model, Plan.from_json(data)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@settings(FUZZ, max_examples=60)
@given(data=mutations() | PLAIN)
def test_any_plan_file_is_taken_or_refused(data: Any, tmp_path: Path) -> None:
    model, plan, _ = real()
    if not (tmp_path / "saved").exists():
        save(tmp_path / "saved", apply_plan(model, plan), plan)
        store_tensors(tmp_path / "original", model.state_dict())
    shapes = data.get("shapes") if isinstance(data, dict) else None
    try:
        mark = fingerprint(shapes)
    except (TypeError, AttributeError):
        mark = ""
    file = tmp_path / "saved" / "plan.json"
    try:
        told = {"digest": digest(Plan.from_json(data))}
    except (PlanError, TypeError):
        told = {}
    file.write_text(json.dumps({"format": 1, "fingerprint": mark, "plan": data, **told}))
    try_out(lambda: read_plan(tmp_path / "saved"))
    try_out(lambda: load(tmp_path / "saved", model))
    out = tmp_path / "out"
    try_out(lambda: apply_to_checkpoint(file, tmp_path / "original", out))
    shutil.rmtree(out, ignore_errors=True)


@settings(FUZZ, max_examples=60)
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_any_text_is_a_plan_file_or_refused(text: str | bytes, tmp_path: Path) -> None:
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(IdapError):
        read_plan(tmp_path)


@settings(FUZZ, max_examples=150)
@given(data=st.data())
def test_any_flipped_bytes_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    model, plan, _ = real()
    if not (tmp_path / "whole").exists():
        save(tmp_path / "whole", apply_plan(model, plan), plan)
        store_tensors(tmp_path / "original", model.state_dict())
        (tmp_path / "broken").mkdir()
    for source, action in (
        ("whole", lambda: load(tmp_path / "whole", model)),
        ("original", lambda: apply_to_checkpoint(plan, tmp_path / "broken", tmp_path / "out")),
    ):
        original = (tmp_path / source / "model.safetensors").read_bytes()
        content = bytearray(original)
        header = 8 + int.from_bytes(original[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header + 20))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.sampled_from([len(content), len(content), header, 9, len(content) - 3]))]
        where = tmp_path / ("whole" if source == "whole" else "broken") / "model.safetensors"
        where.write_bytes(content)
        try_out(action)
        if source == "whole":
            where.write_bytes(original)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
