"""Damaged files: whatever single bit flips, loading is an error or gives exactly what was saved."""

import json
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, repeat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from idap.deploy.export import export_weights
from idap.errors import CheckpointError, IdapError, UncheckedFileWarning
from idap.graph.trace import trace
from idap.models.weights import keep_weights, load_weights
from idap.saving import tensors
from idap.saving.checkpoint import load, read_plan, save
from idap.saving.checksums import HEADER, TENSORS, header_text
from idap.saving.stream import apply_to_checkpoint
from idap.saving.tensors import Entry, TensorFiles, write_tensors
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests.saving.test_stream import store_tensors


class Tiny(nn.Module):
    """Two layers and numbers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 3), nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def cut() -> tuple[nn.Module, Plan]:
    model = build()
    plan = analyze(trace(model, (torch.zeros(2, 2),))).plan({"one": [0, 2]})
    return apply_plan(model, plan), plan


def save_whole(folder: Path) -> Path:
    small, plan = cut()
    save(folder, small, plan)
    return folder


def save_sharded(folder: Path) -> Path:
    _, plan = cut()
    apply_to_checkpoint(
        plan, store_tensors(folder / "original", build().state_dict()), folder / "out", max_shard_size=20
    )
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 1
    return folder / "out"


FOLDERS = {"whole": save_whole, "sharded": save_sharded}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def silent_changes(folder: Path, masks: Iterator[Sequence[int]]) -> tuple[list[str], int]:
    """Flip bits of every byte of every file in turn.

    Args:
        folder: of the model.
        masks: for each byte, the bits that flip: one after the other.

    Returns:
        What was loaded differently without a word, and how many changes were refused.
    """
    expected = load(folder, build()).state_dict()
    plan = read_plan(folder)
    silent, refused = [], 0
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in range(len(content)):
            for mask in next(masks):
                broken = bytearray(content)
                broken[place] ^= mask
                file.write_bytes(broken)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", UncheckedFileWarning)
                        found = load(folder, build())
                        same = equal(found.state_dict(), expected) and read_plan(folder) == plan
                except IdapError:
                    refused += 1
                    continue
                if not same:
                    silent.append(f"{file.name}, byte {place}, bits {mask:08b}")
        file.write_bytes(content)
    return silent, refused


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_bytes_are_noticed(kind: str, tmp_path: Path) -> None:
    """Three bytes of ten; the slow test takes them all."""
    silent, refused = silent_changes(FOLDERS[kind](tmp_path), cycle([[1], [], [], [2**7], [], [], [0xFF], [], [], []]))
    assert silent == []
    assert refused > 200


@pytest.mark.slow
@pytest.mark.timeout(1200)  # twenty thousand folders are loaded
@pytest.mark.parametrize("kind", FOLDERS)
def test_no_flipped_bit_goes_unnoticed(kind: str, tmp_path: Path) -> None:
    silent, refused = silent_changes(FOLDERS[kind](tmp_path), repeat([*(1 << bit for bit in range(8)), 0xFF]))
    assert silent == []
    assert refused > 10_000


def damage(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_damaged_tensor_is_named_with_its_file(device: str, tmp_path: Path) -> None:
    folder = save_whole(tmp_path)
    with torch.device(device):
        fresh = Tiny().eval()
    last = list(safetensors.torch.load_file(folder / "model.safetensors"))[-1]
    damage(folder / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=rf"tensor '{last}' in .*model\.safetensors is not what was written there: its checksum does not match, "
        "so the file was damaged or changed; copy it again from where it was saved",
    ):
        load(folder, fresh)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    file = save_whole(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for changed in (content.replace(b'"pt"', b'"pu"', 1), content.replace(TENSORS.encode(), b"idap_sha255", 1)):
        assert changed != content
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"the header of .*model\.safetensors is not what was written there"):
            load(tmp_path, build())


@pytest.mark.parametrize("checksums", ["[]", "{}", "3", '{"one.weight": null}'])
def test_a_header_that_lacks_checksums_of_its_tensors(checksums: str, tmp_path: Path) -> None:
    file = save_whole(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = header_text(header, json.loads(checksums))
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(CheckpointError, match="does not hold a checksum for each of its tensors"):
        load(tmp_path, build())


def test_tools_that_write_the_header_anew_leave_the_file_readable(tmp_path: Path) -> None:
    """The safetensors library puts the keys in another order."""
    file = save_whole(tmp_path) / "model.safetensors"
    with safetensors.safe_open(file, "pt") as held:
        metadata = held.metadata()
    assert {TENSORS, HEADER} <= metadata.keys()
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=metadata)
    assert equal(load(tmp_path, build()).state_dict(), cut()[0].state_dict())


def test_other_files_of_weights_are_guarded_too(tmp_path: Path) -> None:
    original, exported = tmp_path / "original.safetensors", tmp_path / "net.safetensors"
    keep_weights(build(), original, {"made by": "a recipe"})
    export_weights(build(), exported)
    for file in (original, exported):
        load_weights(build(), file)
        damage(file)
        with pytest.raises(CheckpointError, match=rf"tensor '.*' in .*{file.name} is not what was written there"):
            load_weights(build(), file)


# ------------------------------------------------------------------------------------------------- without checksums


def without_checksums(folder: Path) -> None:
    """The folder as it was before there were checksums."""
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as held:
            metadata = {key: value for key, value in held.metadata().items() if key not in (TENSORS, HEADER)}
        safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=metadata)
    for file in folder.glob("plan.json"):
        description = json.loads(file.read_text())
        del description["digest"]
        file.write_text(json.dumps(description))


@pytest.mark.parametrize("kind", FOLDERS)
def test_old_files_load_and_it_is_said_once(kind: str, tmp_path: Path) -> None:
    folder = FOLDERS[kind](tmp_path)
    without_checksums(folder)
    with pytest.warns(UncheckedFileWarning, match="was written without checksums") as told:
        found = load(folder, build())
    assert len(told) == 1 and told[0].filename == __file__
    assert equal(found.state_dict(), cut()[0].state_dict())
    with pytest.warns(UncheckedFileWarning, match=r"plan\.json was written without checksums") as told:
        read_plan(folder)
    assert len(told) == 1 and told[0].filename == __file__


def test_the_weights_of_a_run_without_checksums_are_told(tmp_path: Path) -> None:
    file = tmp_path / "original.safetensors"
    keep_weights(build(), file, {"made by": "a recipe"})
    load_weights(build(), file, of_run=True)
    without_checksums(tmp_path)
    load_weights(build(), file)
    with pytest.warns(UncheckedFileWarning, match=r"original\.safetensors was written without checksums"):
        load_weights(build(), file, of_run=True)


# ------------------------------------------------------------------------------------------------- a piece at a time


def test_files_with_checksums_are_cut_on_disk_and_damage_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE", 64)
    state = {"a": torch.randn(40, 3), "b": torch.randn(7), "c": torch.tensor(2.0), "d": torch.zeros(0, 3)}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape), lambda t=tensor: [t]) for name, tensor in state.items()]
    file = tmp_path / "original" / "model.safetensors"
    write_tensors(file, entries, {})
    for slots in ((0, 39), (39,), (0,), (17, 18, 30), tuple(range(40)), tuple(range(0, 40, 2))):
        with TensorFiles(file) as files:
            parts = list(files.pieces("a", {0: slots, 1: (0, 2)}))
        assert torch.equal(torch.cat(parts), state["a"][list(slots)][:, [0, 2]])
        assert max(map(len, parts)) <= 64 // 12

    plan = Plan(tensors={"a": {0: (3, 4)}}, shapes={name: tuple(tensor.shape) for name, tensor in state.items()})
    apply_to_checkpoint(plan, file, tmp_path / "whole")
    with TensorFiles(file) as files:
        place = files._begins["a"] + 4 * 3 * 39  # in a row that the plan does not keep
    damage(file, place)
    with pytest.raises(CheckpointError, match=r"tensor 'a' in .*original.* is not what was written there"):
        apply_to_checkpoint(plan, file, tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.safetensors"))
