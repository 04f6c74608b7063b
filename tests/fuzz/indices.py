"""Sharded checkpoints: changed indices, and changed places of the files that they name."""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from idap.parsing import INDEX
from idap.saving.checkpoint import load
from idap.saving.stream import apply_to_checkpoint
from tests.fuzz import structural
from tests.fuzz.cases import Broken, Trial, copy_of, first_difference, refuses, state_of
from tests.fuzz.plans import Valid
from tests.saving.test_stream import store_tensors

NAMES = (
    *("", ".", "..", "/", "a/b", "\\", "c:x", "a\0b", "model.safetensors", INDEX, "plan.json", "nothing.safetensors"),
    *(f"../outside/{structural.CANARY}", f"/tmp/{structural.CANARY}", "x" * 300, "é.safetensors", "\ud800.safetensors"),
    *("CON", "model-00001-of-00002.safetensors ", "./model-0.safetensors", "~/x", "$HOME", "*.safetensors"),
)


class Indices:
    """Makes sharded checkpoints of originals and of compressed models."""

    def __init__(self, home: Path) -> None:
        self.valid = [Valid(name, home) for name in ("encoder", "tied")]
        self.small: dict[str, Path] = {}
        self.large: dict[str, Path] = {}
        for each in self.valid:
            self.small[each.name], self.large[each.name] = home / f"{each.name}-s", home / f"{each.name}-l"
            apply_to_checkpoint(each.plan, each.original, self.small[each.name], max_shard_size=400)
            held: dict[int, str] = {}
            state = each.model.state_dict(keep_vars=True)
            own = {k: t.detach() for k, t in state.items() if held.setdefault(id(t), k) == k}
            store_tensors(self.large[each.name], own, shards=4)
        self.indices = [json.loads((each / INDEX).read_text()) for each in (*self.small.values(), *self.large.values())]

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        valid = dice.choice(self.valid)
        small = dice.random() < 0.5
        source = (self.small if small else self.large)[valid.name]
        saved = folder / "saved"
        shutil.copytree(source, saved)
        about = self._change(saved, dice, folder.parent / "outside")
        actions = {"apply": partial(self._cut_files, valid, saved, folder / "out")}
        if small:
            actions = {"load": partial(self._load, valid, saved)}
        return Trial(f"{valid.name}, {'small' if small else 'original'}: {about}", actions)

    def _change(self, saved: Path, dice: random.Random, outside: Path) -> str:
        index = saved / INDEX
        data: Any = json.loads(index.read_text())
        shards = sorted(saved.glob("*.safetensors"))
        way = dice.random()
        if way < 0.35:
            told = []
            for _ in range(dice.choice((1, 1, 2, 3))):
                data, did = structural.mutate(data, dice, self.indices)
                told.append(did)
                if not isinstance(data, dict) or structural.PAIRS in data:
                    break
            index.write_bytes(structural.json_bytes(data))
            return "; ".join(told)
        if way < 0.6:
            return self._rename(index, copy_of(data), dice)
        if way < 0.7:
            content, did = structural.mutate_bytes(index.read_bytes(), dice, json.dumps(self.indices[0]).encode())
            index.write_bytes(content)
            return f"index: {did}"
        if way < 0.95:
            return _change_shard(dice.choice(shards), dice.choice(shards), dice, outside)
        return structural.mutate_place(index, dice, outside)

    def _rename(self, index: Path, data: dict[str, Any], dice: random.Random) -> str:
        places = data["weight_map"]
        tensor = dice.choice(list(places))
        place = dice.choice((*NAMES, *sorted(set(places.values()))))
        some = {name for name, file in places.items() if file == places[tensor]} if dice.random() < 0.4 else {tensor}
        places.update(dict.fromkeys(some, place))
        index.write_bytes(structural.json_bytes(data))
        return f"{len(some)} tensors, of them {tensor}, in {structural.abbreviate(place)}"

    def _load(self, valid: Valid, folder: Path) -> str:
        found = state_of(load(folder, valid.model))
        if name := first_difference(found, valid.state):
            raise Broken(f"changed: loaded with a changed index, other {name!r}")
        return "equal"

    def _cut_files(self, valid: Valid, folder: Path, out: Path) -> str:
        if refuses(lambda: apply_to_checkpoint(valid.plan, folder, out)):
            if out.exists():
                raise Broken("untidy: refused, but wrote to the folder")
            return "refused"
        if name := first_difference(state_of(load(out, valid.model)), valid.state):
            raise Broken(f"changed: cut with a changed index, other {name!r}")
        return "equal"


def _change_shard(shard: Path, other: Path, dice: random.Random, outside: Path) -> str:
    """Put something else in the place of a file with tensors; its bytes are for `weights`."""
    match dice.choice(("place", "place", "swap", "copy", "rename", "cut", "single")):
        case "swap" if shard != other:
            first, second = shard.read_bytes(), other.read_bytes()
            shard.write_bytes(second)
            other.write_bytes(first)
            return f"{shard.name} and {other.name} swapped"
        case "copy" if shard != other:
            shard.write_bytes(other.read_bytes())
            return f"{shard.name} is a copy of {other.name}"
        case "rename":
            shard.rename(shard.with_name(f"x{shard.name}"))
            return f"{shard.name} renamed"
        case "cut":
            shard.write_bytes(shard.read_bytes()[: -dice.choice((1, 4, 100))])
            return f"{shard.name} cut short"
        case "single":
            shutil.copy(shard, shard.with_name("model.safetensors"))
            return f"{shard.name} is model.safetensors too"
        case _:
            return structural.mutate_place(shard, dice, outside)
