"""A plan applied to files gives what applying it to the model would give, whatever the checkpoint looks like."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from idap import record
from idap.errors import CheckpointError, PlanError
from idap.graph.trace import trace
from idap.progress import Silent
from idap.saving import stream, tensors
from idap.saving.checkpoint import load, plan_document, read_plan, save
from idap.saving.stream import MARKER, apply_to_checkpoint
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests import nets
from tests.saving.test_checkpoint import CASES, Buffered, cut, outputs

ORIGINALS = {name: nets.randomised(make(), 0).eval() for name, (make, _, _) in CASES.items()}
ORIGINALS["buffers"].gain.copy_(Buffered().gain)


def write_checkpoint(
    folder: Path, model: nn.Module, *, shards: int = 1, prefix: str = "", metadata: object = None
) -> Path:
    """The checkpoint of a model as transformers would write it: tied tensors once."""
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[int, str] = {}
    state = {
        prefix + name: tensor.clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if held.setdefault(id(tensor), name) == name
    }
    return store_tensors(folder, {name: tensor.detach() for name, tensor in state.items()}, shards)


def store_tensors(folder: Path, state: Mapping[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        safetensors.torch.save_file(dict(state), folder / "model.safetensors")
        return folder
    places = {name: f"model-{place % shards}.safetensors" for place, name in enumerate(state)}
    for file in set(places.values()):
        safetensors.torch.save_file({n: t for n, t in state.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_files_are_cut_like_the_model(name: str, shards: int, tmp_path: Path) -> None:
    make, args, kwargs = CASES[name]
    small, plan = cut(name)
    original = write_checkpoint(tmp_path / "original", ORIGINALS[name], shards=shards)
    applied = apply_to_checkpoint(plan, original, tmp_path / "small", max_shard_size=100 if shards > 1 else 10**9)
    back = load(tmp_path / "small", make().eval())
    assert_close(back.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert torch.equal(outputs(back, args, kwargs), outputs(small, args, kwargs))
    assert read_plan(tmp_path / "small") == plan
    assert (len(applied.files) > 1) == (shards > 1) and not (tmp_path / "small" / MARKER).exists()
    found = {key for file in applied.files for key in safetensors.torch.load_file(tmp_path / "small" / file)}
    assert len(found) == applied.tensors
    assert not any(plan.removes(key) for key in found)
    if name == "resnet":
        assert applied.dropped and all(plan.removes(key) for key in applied.dropped)


def test_no_shard_is_larger_than_asked(tmp_path: Path) -> None:
    _, plan = cut("vgg")
    apply_to_checkpoint(plan, write_checkpoint(tmp_path / "a", ORIGINALS["vgg"]), tmp_path / "b", max_shard_size=300)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in set(index["weight_map"].values()):
        sizes[file] = [tensor.nbytes for tensor in safetensors.torch.load_file(tmp_path / "b" / file).values()]
    assert len(sizes) > 2 and all(sum(held) <= 300 or len(held) == 1 for held in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_the_type_of_the_checkpoint_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    _, plan = cut("mlp")
    state = {name: tensor.to(dtype) for name, tensor in ORIGINALS["mlp"].state_dict().items()}
    apply_to_checkpoint(plan, store_tensors(tmp_path / "a", state), tmp_path / "b")
    small = apply_plan(ORIGINALS["mlp"], plan).state_dict()
    found = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), small[name].to(dtype).float())


def test_pieces_put_together_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 100)
    held = {"w": torch.randn(41, 3, 2), "one": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    store_tensors(tmp_path, held)
    rows, columns = (0, 1, 2, 7, 20, 38, 39, 40), (0, 2)
    with tensors.TensorFiles(tmp_path) as files:
        parts = list(files.pieces("w", {0: rows, 1: columns}))
        assert len(parts) > 3
        assert torch.equal(torch.cat(parts), held["w"][list(rows)][:, list(columns)])
        assert torch.equal(torch.cat(list(files.pieces("w", {}))), held["w"])
        assert [part.item() for part in files.pieces("one", {})] == [2.5]
        assert [tuple(part.shape) for part in files.pieces("none", {1: (0,)})] == [(0, 1)]


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    store_tensors(tmp_path, {"w": torch.randn(41, 3)})
    with tensors.TensorFiles(tmp_path) as files:
        file = tmp_path / "model.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated; copy or download it again"):
            list(files.pieces("w", {0: (40,)}))


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("prefix", ["model.", "a.b."])
def test_a_prefix_of_the_checkpoint_is_taken_away(prefix: str, tmp_path: Path) -> None:
    small, plan = cut("transformer")
    apply_to_checkpoint(plan, write_checkpoint(tmp_path / "a", ORIGINALS["transformer"], prefix=prefix), tmp_path / "b")
    assert_close(load(tmp_path / "b", CASES["transformer"][0]()).state_dict(), small.state_dict(), rtol=0, atol=0)


def test_a_prefix_that_the_checkpoint_lacks_is_added(tmp_path: Path) -> None:
    model = nn.ModuleDict({"base": nets.mlp()}).eval()
    plan = Plan(
        tensors={"base.0.weight": {0: (1, 4)}, "base.0.bias": {0: (1, 4)}, "base.2.weight": {1: (1, 4)}},
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )
    apply_to_checkpoint(plan, write_checkpoint(tmp_path / "a", model.base), tmp_path / "b")
    found = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    assert_close(found, dict(apply_plan(model, plan).state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("names", [("embed.weight",), ("head.weight",), ("head.weight", "embed.weight")])
def test_a_tied_tensor_may_have_any_of_its_names(names: tuple[str, ...], tmp_path: Path) -> None:
    small, plan = cut("tied")
    state = {
        name: t for name, t in ORIGINALS["tied"].state_dict().items() if name not in ("head.weight", "embed.weight")
    }
    weight = ORIGINALS["tied"].embed.weight.detach()
    applied = apply_to_checkpoint(
        plan, store_tensors(tmp_path / "a", state | {name: weight.clone() for name in names}), tmp_path / "b"
    )
    assert len(applied.dropped) >= len(names) - 1
    assert torch.equal(load(tmp_path / "b", CASES["tied"][0]()).head.weight, small.head.weight)
    if len(names) == 2:
        store_tensors(tmp_path / "a", state | {"head.weight": weight + 1, "embed.weight": weight})
        with pytest.raises(
            CheckpointError,
            match=r"tensors '\w+\.weight' and '\w+\.weight' in .* differ, but the plan is for a model that ties",
        ):
            apply_to_checkpoint(plan, tmp_path / "a", tmp_path / "c")


def test_buffers_that_the_model_does_not_save_may_be_there(tmp_path: Path) -> None:
    small, plan = cut("buffers")
    assert plan.unsaved == ("gain",)
    state = {**ORIGINALS["buffers"].state_dict(), "gain": torch.zeros(6)}
    assert apply_to_checkpoint(plan, store_tensors(tmp_path / "a", state), tmp_path / "b").dropped == ("gain",)
    assert torch.equal(load(tmp_path / "b", Buffered().eval()).gain, small.gain)


# ------------------------------------------------------------------------------------------------- what does not fit


def state_of(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**ORIGINALS["mlp"].state_dict(), **{name.replace("__", "."): t for name, t in changes.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            state_of(__extra=torch.zeros(1)),
            r"holds tensor '\.extra', which the plan does not know; apply a plan to the",
        ),
        (state_of(**{"4__bias": None}), r"lacks tensor '4\.bias' \(expected shape \(3,\)\)"),
        (state_of(**{"4__bias": torch.zeros(7)}), r"tensor '4\.bias' in .* has shape \(7,\), the plan expects \(3,\)"),
        ({"x": torch.zeros(1)}, r"holds tensor 'x', which the plan does not know"),
    ],
)
def test_another_checkpoint_is_refused_and_nothing_written(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    _, plan = cut("mlp")
    with pytest.raises(CheckpointError, match=message):
        apply_to_checkpoint(plan, store_tensors(tmp_path / "a", state), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_other_plans_are_refused(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"])
    _, plan = cut("mlp")
    for wrong, message in (
        (
            Plan(tensors={"0.weight": {0: (0, 6)}}, shapes=plan.shapes),
            r"keeps slot 6 of dimension 0 of tensor '0\.weight'",
        ),
        (Plan(tensors={"0.weight": {0: (2, 1)}}, shapes=plan.shapes), r"twice or not in ascending order"),
        (
            Plan(tensors={"9.weight": {0: (2,)}}, shapes=plan.shapes),
            r"cuts tensor '9\.weight' but",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            apply_to_checkpoint(wrong, original, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"a holds no compressed model: .*plan\.json is missing"):
        apply_to_checkpoint(tmp_path / "a", original, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"max_shard_size must be at least 1 byte, found 0"):
        apply_to_checkpoint(plan, original, tmp_path / "b", max_shard_size=0)
    assert not (tmp_path / "b").exists()


def test_code_that_may_not_be_called_is_refused_without_a_model(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
    net = nets.randomised(nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2))).eval()
    structure = analyze(trace(net, (nets.sequence(4),)))
    plan = structure.plan({"1.self_attn:heads": [0, 2]})
    description = json.loads(json.dumps(stream.plan_document(plan)))
    program = description["plan"]["programs"]["1.self_attn"]
    next(step for step in program[0]["steps"] if step[0])[0] = "os.system"
    (tmp_path / "plan.json").write_text(json.dumps(description))
    with pytest.raises(PlanError, match=r"calls 'os\.system', which is not among"):
        apply_to_checkpoint(tmp_path / "plan.json", write_checkpoint(tmp_path / "a", net), tmp_path / "b")
    apply_to_checkpoint(plan, tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "c").exists()


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = cut("mlp")
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match=r"the compressed checkpoint takes \d+ bytes, but .* has only 10 free"):
        apply_to_checkpoint(plan, write_checkpoint(tmp_path / "a", ORIGINALS["mlp"]), tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------------- folders and crashes


def test_small_files_are_copied_and_other_weights_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = cut("mlp")
    original = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"])
    for name, text in (
        ("config.json", "{}"),
        ("vocab.txt", "a\nb"),
        ("pytorch_model.bin", "x"),
        ("big.txt", "12345678"),
    ):
        (original / name).write_text(text)
    (original / "onnx").mkdir()
    monkeypatch.setattr(stream, "SMALL_FILE", 7)
    applied = apply_to_checkpoint(plan, original, tmp_path / "b")
    assert applied.copied == ("config.json", "vocab.txt") and (tmp_path / "b" / "vocab.txt").read_text() == "a\nb"
    assert applied.left_out == ("big.txt", "onnx", "pytorch_model.bin")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    _, plan = cut("mlp")
    original = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"])
    before = (original / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"a holds other files \(model\.safetensors\); choose another folder"):
        apply_to_checkpoint(plan, original, original)
    assert [path.name for path in original.iterdir()] == ["model.safetensors"]
    assert (original / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint to .*file"):
        apply_to_checkpoint(plan, original, tmp_path / "file")


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_is_killed_leaves_nothing_half_written_and_can_be_run_again(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, plan = cut("mlp")
    original = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"])
    (original / "config.json").write_text("{}")
    left = stop
    move = record.Path.replace

    def replace_or_stop(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return move(self, target)

    out = tmp_path / "b"
    with monkeypatch.context() as patched:
        patched.setattr(record.Path, "replace", replace_or_stop)
        with pytest.raises(KeyboardInterrupt):
            apply_to_checkpoint(plan, original, out, max_shard_size=100)
    (out / f".model-00001-of-00005.safetensors.{'0' * 32}").write_text("half")  # as a killed process leaves it
    assert not (out / "model.safetensors.index.json").exists()
    with pytest.raises(CheckpointError, match=r"is missing"):
        load(out, nets.mlp())
    apply_to_checkpoint(plan, original, out)
    assert_close(load(out, nets.mlp()).state_dict(), small.state_dict(), rtol=0, atol=0)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "plan.json"]


# -------------------------------------------------------------------------------------------------------------- memory

SPARSE = """
import json, os, resource, sys
import torch
torch.set_num_threads(1)
from idap.saving.stream import apply_to_checkpoint
from idap.structure.plan import Plan

folder, columns = sys.argv[1], 1024
rows = {"scattered": 2**15, "narrow": 2**15, "large": 2**20}
header, end = {}, 0
for name, count in rows.items():
    size = count * columns * 4
    header[name] = {"dtype": "F32", "shape": [count, columns], "data_offsets": [end, end + size]}
    end += size
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
os.makedirs(f"{folder}/original")
with open(f"{folder}/original/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
tensors = {"scattered": {0: tuple(range(0, 2**15, 16))}, "narrow": {1: (1, 500, 1000)}}
tensors["large"] = {0: tuple(range(2**19, 2**19 + 2**15))}
plan = Plan(tensors=tensors, shapes={name: (count, columns) for name, count in rows.items()})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
applied = apply_to_checkpoint(plan, f"{folder}/original", f"{folder}/small", max_shard_size=2**26)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"grown": (after - before) * 1024, "size": applied.size, "files": len(applied.files)}))
"""


@pytest.mark.slow
def test_a_checkpoint_of_four_gigabytes_takes_little_memory(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SPARSE, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"][0] == 4 * 2**30 + 2**28 and found["files"] > 1
    assert found["grown"] < 2e8, found


def test_a_folder_saved_at_once_and_one_cut_on_disk_are_the_same(tmp_path: Path) -> None:
    small, plan = cut("vgg")
    save(tmp_path / "saved", small, plan)
    apply_to_checkpoint(plan, write_checkpoint(tmp_path / "original", ORIGINALS["vgg"]), tmp_path / "cut")
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


# ------------------------------------------------------------------------------------------------------- one process


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    """It holds the lock of the folder, from before the first file until after the last one."""
    small, plan = cut("mlp")
    original, out = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"]), tmp_path / "b"
    refused = []

    class During(Silent):
        @contextmanager
        def phase(self, title: str, total: int | None) -> Iterator[Any]:
            with pytest.raises(CheckpointError, match=r"b is in use by process \d+ on .*: only one process may write"):
                apply_to_checkpoint(plan, original, out)
            refused.append(title)
            with super().phase(title, total) as phase:
                yield phase

    apply_to_checkpoint(plan, original, out, progress=During())
    assert refused == ["apply"]
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "plan.json"]
    assert_close(load(out, nets.mlp()).state_dict(), small.state_dict(), rtol=0, atol=0)


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    _, plan = cut("mlp")
    original, out = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"]), tmp_path / "b"
    out.mkdir()
    for name in (".idap-lock", ".idap-holder.json"):
        (out / name).write_text("")
    apply_to_checkpoint(plan, original, out)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "plan.json"]


def test_a_broken_plan_is_named_with_its_file(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "a", ORIGINALS["mlp"])
    document = plan_document(cut("mlp")[1])
    document["plan"]["keep"] = 5
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"plan\.json: this is not a plan"):
        apply_to_checkpoint(tmp_path / "plan.json", original, tmp_path / "b")
