"""Files of weights: safetensors with changed headers and bytes, and checkpoints of torch."""

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idap.models.weights import load_weights, notes_in
from idap.saving.checkpoint import load
from idap.saving.checksums import HEADER, TENSORS
from idap.saving.stream import apply_to_checkpoint
from idap.saving.tensors import CODES
from tests.fuzz import structural
from tests.fuzz.cases import Broken, Trial, copy_of, first_difference, refuses, state_of
from tests.fuzz.plans import Valid

WEIGHTS = "model.safetensors"


class Weights:
    """Makes files of weights: of compressed models, of originals, and of models in other formats."""

    def __init__(self, home: Path) -> None:
        self.valid = [Valid(name, home) for name in ("encoder", "tied", "shufflenet")]
        self.checkpoints = {each.name: checkpoints(each.model) for each in self.valid}

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        valid, folder = dice.choice(self.valid), folder / "saved"
        folder.mkdir()
        match dice.choice(("small", "small", "original", "original", "torch", "torch")):
            case "small":
                return self._small(valid, dice, folder)
            case "original":
                return self._original(valid, dice, folder)
            case _:
                return self._torch(valid, dice, folder)

    def _small(self, valid: Valid, dice: random.Random, folder: Path) -> Trial:
        """A compressed model."""
        (folder / "plan.json").write_bytes((valid.folder / "plan.json").read_bytes())
        about = self._write(valid.folder, dice, folder)
        return Trial(f"{valid.name}, small: {about}", {"load": partial(self._load, valid, folder)})

    def _original(self, valid: Valid, dice: random.Random, folder: Path) -> Trial:
        """The checkpoint of an original."""
        about = self._write(valid.original, dice, folder)
        actions = {
            "apply": partial(self._cut_files, valid, folder / WEIGHTS, folder.with_name("out")),
            "weights": partial(self._weights, valid, folder / WEIGHTS),
            "notes": partial(_notes, folder / WEIGHTS),
        }
        return Trial(f"{valid.name}, original: {about}", actions)

    def _write(self, source: Path, dice: random.Random, folder: Path) -> str:
        content = (source / WEIGHTS).read_bytes()
        others = [(each.folder / WEIGHTS).read_bytes() for each in self.valid]
        file, way = folder / WEIGHTS, dice.random()
        if way < 0.5:
            content, about = change_header(content, dice, [header_of(other)[0] for other in others])
        else:
            content, about = structural.mutate_bytes(content, dice, dice.choice(others))
        file.write_bytes(content)
        if way > 0.97:
            about += f"; {structural.mutate_place(file, dice, folder.parents[1] / 'outside')}"
        return about

    def _torch(self, valid: Valid, dice: random.Random, folder: Path) -> Trial:
        """A checkpoint of torch."""
        held = self.checkpoints[valid.name]
        name = dice.choice(list(held))
        content, about = held[name], "as it is"
        match dice.choice(("bytes", "bytes", "zip", "zip", "pickle", "whole")):
            case "bytes":
                content, about = structural.mutate_bytes(content, dice, dice.choice(list(held.values())))
            case "zip" if name != "legacy":
                content, about = change_zip(content, dice)
            case "pickle":
                content, about = hostile_pickle(dice)
        file = folder / dice.choice(("model.pt", "model.pth", "model.bin", "model"))
        file.write_bytes(content)
        return Trial(f"{valid.name}, {name}: {about}", {"torch": partial(self._checkpoint, valid, file, about, name)})

    def _load(self, valid: Valid, folder: Path) -> str:
        return _judge(state_of(load(folder, valid.model)), valid.state, folder / WEIGHTS)

    def _cut_files(self, valid: Valid, file: Path, out: Path) -> str:
        if refuses(lambda: apply_to_checkpoint(valid.plan, file, out)):
            if out.exists():
                raise Broken("untidy: refused, but wrote to the folder")
            return "refused"
        found = state_of(load(out, valid.model))
        return "changed" if first_difference(found, valid.state) else "equal"

    def _weights(self, valid: Valid, file: Path) -> str:
        made = fresh(valid)
        before = state_of(made)
        if refuses(lambda: load_weights(made, file)):
            if name := first_difference(made.state_dict(), before):
                raise Broken(f"changed: refused, but tensor {name!r} is another")
            return "refused"
        return _judge(state_of(made), valid.before, file)

    def _checkpoint(self, valid: Valid, file: Path, about: str, name: str) -> str:
        made = fresh(valid)
        before = state_of(made)
        if refuses(lambda: load_weights(made, file)):
            if about == "as it is" and name != "odd":
                raise Broken("refused: a checkpoint that is whole")
            if changed := first_difference(made.state_dict(), before):
                raise Broken(f"changed: refused, but tensor {changed!r} is another")
            return "refused"
        return "changed" if first_difference(state_of(made), valid.before) else "equal"


def fresh(valid: Valid) -> nn.Module:
    """A model of the same architecture with other numbers."""
    made = copy_of(valid.model)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.zero_()
    return made


def _notes(file: Path) -> str:
    notes_in(file)
    return "accepted"


def _judge(found: dict[str, Tensor], expected: dict[str, Tensor], file: Path) -> str:
    """What was loaded must be what was saved, or, from a file without checksums, at least what the file says."""
    name = first_difference(found, expected)
    if not name:
        return "equal"
    content = file.read_bytes()
    if TENSORS.encode() in content or HEADER.encode() in content:
        raise Broken(f"changed: the file has checksums and was changed, and tensor {name!r} loaded")
    told = read_plainly(content)
    if told is not None and name in told and (wrong := first_difference({name: found[name]}, {name: told[name]})):
        raise Broken(f"changed: tensor {wrong!r} is not what the file says")
    return "changed"


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the data behind it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def read_plainly(content: bytes) -> dict[str, Tensor] | None:
    """Read a safetensors file by the letter of the format; None for what has no single meaning."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length], object_pairs_hook=once)
        data, found = bytearray(content[8 + length :]), {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                dtype, shape = CODES[entry["dtype"]], entry["shape"]
                flat = torch.frombuffer(data[begin:end], dtype=dtype) if prod(shape) else torch.zeros(0, dtype=dtype)
                found[name] = flat.reshape(shape)
    except (ValueError, KeyError, TypeError, RuntimeError):
        return None
    return found


def change_header(content: bytes, dice: random.Random, others: list[Any]) -> tuple[bytes, str]:
    """Change the header of a safetensors file, sometimes its length too."""
    header, data = header_of(content)
    told = []
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        way = dice.random()
        if way < 0.5:
            header, did = structural.mutate(header, dice, others)
        else:
            did = change_entry(header, dice, len(data))
        told.append(did)
        if not isinstance(header, dict) or structural.PAIRS in header:
            break
    text = structural.json_bytes(header)
    text += b" " * (-len(text) % 8 if dice.random() < 0.7 else dice.randrange(9))
    length = len(text)
    if dice.random() < 0.1:
        length = dice.choice((0, 1, length - 1, length + 1, length + 10**6, 2**31, 2**40, 2**63, 2**64 - 1))
        told.append(f"length {len(text)} -> {length}")
    return length.to_bytes(8, "little") + text + data, "; ".join(told)


def change_entry(header: dict[str, Any], dice: random.Random, size: int) -> str:
    """Change what a header says of one tensor, so that it may still hold together."""
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "shape" in entry]
    if not names:
        return "nothing"
    name, other = dice.choice(names), dice.choice(names)
    entry = header[name]
    match dice.choice(("offsets", "swap", "type", "shape", "name", "overlap", "huge", "metadata")):
        case "offsets" if isinstance(entry.get("data_offsets"), list):
            step = dice.choice((1, 4, -4, 8, 2**40, -(2**40), size))
            entry["data_offsets"] = [each + step for each in entry["data_offsets"] if isinstance(each, int)]
            return f"{name}: offsets by {step}"
        case "swap":
            header[name], header[other] = header[other], header[name]
            return f"entries of {name} and {other} swapped"
        case "type":
            entry["dtype"] = dice.choice((*CODES, "F4", "F8_E8M0", "BOOL", "", "f32", "C64"))
            return f"{name}: type {entry['dtype']}"
        case "shape" if isinstance(entry.get("shape"), list):
            entry["shape"] = dice.choice(([*entry["shape"], 1], entry["shape"][::-1], [0], [], [-1], [2**32, 2**32]))
            return f"{name}: shape {entry['shape']}"
        case "name":
            header[f"{other}.x"] = header.pop(name)
            return f"{name} called {other}.x"
        case "overlap":
            entry["data_offsets"] = header[other].get("data_offsets")
            return f"{name} where {other} is"
        case "huge":
            entry["shape"], entry["data_offsets"] = [2**20, 2**20, 2**20], [0, 2**62]
            return f"{name} huge"
        case _:
            header["__metadata__"] = dice.choice(({}, {"idap_plan": "0" * 16}, {"format": "tf"}, {"x": 1}, None, []))
            return f"metadata {header['__metadata__']}"


def checkpoints(model: nn.Module) -> dict[str, bytes]:
    """Checkpoints of torch as training scripts write them, and some that hold more than tensors."""
    state = state_of(model)
    name = next(iter(state))
    odd = dict(state)
    odd[name] = state[name].to_sparse()
    whole: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (state, {}),
        "nested": ({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, {}),
        "legacy": (state, {"_use_new_zipfile_serialization": False}),
        "odd": (odd, {}),
    }
    found = {}
    for key, (value, settings) in whole.items():
        buffer = io.BytesIO()
        torch.save(value, buffer, **settings)
        found[key] = buffer.getvalue()
    return found


def change_zip(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Write the archive of a checkpoint anew with one member changed."""
    source = zipfile.ZipFile(io.BytesIO(content))
    names = source.namelist()
    name = dice.choice(names if dice.random() < 0.5 else [each for each in names if each.endswith("data.pkl")])
    buffer = io.BytesIO()
    data, did = structural.mutate_bytes(source.read(name), dice)
    ways: list[Callable[[], tuple[str, bytes] | None]] = [
        lambda: (name, data),
        lambda: (name, data),
        lambda: None,
        lambda: (dice.choice((f"../{structural.CANARY}", f"/tmp/{structural.CANARY}", f"x/{name}")), data),
    ]
    found = dice.choice(ways)()
    with zipfile.ZipFile(buffer, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as target:
        for each in names:
            if each != name:
                target.writestr(each, source.read(each))
            elif found is not None:
                target.writestr(*found)
    return buffer.getvalue(), f"{name}: {'removed' if found is None else f'{found[0]}, {did}'}"


class _Calls:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def hostile_pickle(dice: random.Random) -> tuple[bytes, str]:
    """A checkpoint whose pickle calls something."""
    import os
    import subprocess

    function, args = dice.choice(
        (
            (os.system, (f"touch {structural.CANARY}",)),
            (eval, (structural.HARM[1],)),
            (open, (structural.CANARY, "w")),
            (subprocess.Popen, (["touch", structural.CANARY],)),
            (torch.load, (structural.CANARY,)),
            (torch.hub.load, (structural.CANARY, "x")),
            (getattr, ("x", "__class__")),
            (torch.nn.Linear, (4, 4)),
            (torch._utils._rebuild_tensor_v2, (1, 2, 3)),
            (torch.device, ("cuda:9",)),
            (bytearray, (2**33,)),
            (torch.Size, ([2**62],)),
        )
    )
    held = {dice.choice(("0.weight", "state_dict", "x")): _Calls(function, *args)}
    buffer = io.BytesIO()
    if dice.random() < 0.5:
        torch.save(held, buffer)
    else:
        pickle.dump(held, buffer, protocol=dice.choice((0, 2, 4)))
    return buffer.getvalue(), f"a pickle that calls {getattr(function, '__name__', function)}{args}"
