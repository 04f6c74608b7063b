"""Plans with programs: real ones of several networks, changed in a few places."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idap.graph.trace import trace
from idap.saving.checkpoint import fingerprint, load, read_plan, save
from idap.saving.stream import apply_to_checkpoint
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.stand_ins import trial_map
from tests import nets
from tests.fuzz import structural
from tests.fuzz.cases import Broken, Trial, copy_of, first_difference, refuses, same, state_of
from tests.saving.test_checkpoint import IDS, outputs, transformer
from tests.saving.test_hostile import build as encoder
from tests.saving.test_stream import write_checkpoint
from tests.surgery.test_projection_plans import Tall

SEEDS = {
    "encoder": (encoder, (nets.sequence(4),), {"1.self_attn:heads": [0, 2], "0": [0, 1, 5]}, ["2"], {}),
    "transformer": (transformer, (nets.sequence(4),), {}, [], {}),
    "tied": (nets.LanguageModel, (IDS,), {}, [], {"mask": torch.ones(IDS.shape)}),
    "tall": (Tall, (torch.ones(3, 4),), {}, [], {}),
    "shufflenet": (nets.ShuffleNet, (nets.images(),), {}, [], {}),
}
"""Name -> what builds a network, its inputs, units to keep, blocks to remove, keyword inputs."""


class Valid:
    """A network, a plan for it, and the folders that hold both."""

    def __init__(self, name: str, home: Path) -> None:
        make, self.args, keep, removed, self.kwargs = SEEDS[name]
        torch.manual_seed(0)
        self.name, self.model = name, nets.randomised(make(), 0).eval()
        replacement = "projection" if name == "tall" else "identity"
        structure = analyze(trace(self.model, self.args, self.kwargs), replacement=replacement)
        keep, removed = (keep, removed) if keep else _choice(structure)
        self.plan = structure.plan(keep, tuple(removed))
        maps = {path: trial_map(projected) for path, projected in self.plan.projections.items()}
        self.small = apply_plan(self.model, self.plan, maps)
        self.folder, self.original = home / name, home / f"{name}-original"
        save(self.folder, self.small, self.plan)
        write_checkpoint(self.original, self.model)
        self.data: dict[str, Any] = json.loads((self.folder / "plan.json").read_text())
        self.before = state_of(self.model)
        self.state = state_of(load(self.folder, self.model))
        self.outputs = self.run(load(self.folder, self.model))

    def run(self, model: nn.Module) -> Tensor:
        """The outputs of a model."""
        found: Tensor = outputs(model, self.args, self.kwargs)
        return found


def _choice(structure: Structure) -> tuple[dict[str, list[int]], list[str]]:
    """Half of the units of every group, and the first block that can go."""
    keep = {group.name: list(range(0, group.size, 2)) for group in structure.groups}
    return keep, [block.name for block in structure.blocks[:1]]


class Plans:
    """Makes folders of compressed models whose plan was changed."""

    def __init__(self, home: Path) -> None:
        self.valid = [Valid(name, home) for name in SEEDS]
        self.descriptions = [each.data for each in self.valid]

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        valid = dice.choices(self.valid, [4, 2, 1, 1, 1])[0]
        saved = folder / "saved"
        saved.mkdir()
        (saved / "model.safetensors").write_bytes((valid.folder / "model.safetensors").read_bytes())
        file = saved / "plan.json"
        about = self._write(valid, dice, file)
        if dice.random() < 0.03:
            about += f"; {structural.mutate_place(file, dice, folder.parent / 'outside')}"
        actions = {
            "apply": partial(self._apply, valid, saved),
            "load": partial(self._load, valid, saved),
            "files": partial(self._cut_files, valid, saved, folder / "out"),
            "forward": partial(self._forward, valid, saved),
        }
        return Trial(f"{valid.name}: {about}", actions)

    def _write(self, valid: Valid, dice: random.Random, file: Path) -> str:
        data, told = copy_of(valid.data), []
        others = [other["plan"] for other in self.descriptions if other is not valid.data]
        whole = dice.random() < 0.05
        part = data if whole else data["plan"]
        if not whole and dice.random() < 0.5 and part["programs"]:
            part = part["programs"]
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            changed, did = structural.mutate(part, dice, others)
            told.append(did)
            if changed is not part:
                data["plan"] = changed
                break
        if not whole:
            _sign(data)
        content = structural.json_bytes(data)
        if dice.random() < 0.04:
            content, did = structural.mutate_bytes(content, dice)
            told.append(did)
        file.write_bytes(content)
        return "; ".join(told)

    def _apply(self, valid: Valid, folder: Path) -> str:
        plan = read_plan(folder)
        if Plan.from_json(json.loads(json.dumps(plan.to_json()))) != plan:
            raise Broken("changed: the plan is another one after it was written and read")
        try:
            small = apply_plan(valid.model, plan)
        finally:
            if name := first_difference(valid.model.state_dict(), valid.before):
                raise Broken(f"changed: the original's tensor {name!r}")
        if plan != valid.plan:
            return "changed"
        if not plan.projections and first_difference(state_of(small), valid.state):
            raise Broken("changed: an equal plan gives other tensors")
        return "equal"

    def _load(self, valid: Valid, folder: Path) -> str:
        small = load(folder, valid.model)
        name = first_difference(state_of(small), valid.state)
        if name or not same(valid.run(small), valid.outputs):
            raise Broken(f"changed: loaded beside a changed plan, other {name or 'outputs'}")
        return "equal"

    def _cut_files(self, valid: Valid, folder: Path, out: Path) -> str:
        if refuses(lambda: apply_to_checkpoint(folder / "plan.json", valid.original, out)):
            if out.exists():
                raise Broken("untidy: refused, but wrote to the folder")
            return "refused"
        plan = read_plan(folder)
        if refuses(lambda: apply_plan(valid.model, plan)) or refuses(lambda: load(out, valid.model)):
            return "accepted"  # it has no model, which has more to say
        found, expected = state_of(load(out, valid.model)), state_of(apply_plan(valid.model, plan))
        if name := first_difference(found, expected):
            raise Broken(f"changed: files and model are cut differently, tensor {name!r}")
        return "equal" if plan == valid.plan else "changed"

    def _forward(self, valid: Valid, folder: Path) -> str:
        """A network of another plan may fail as any network may; it may not end or change the process."""
        small = apply_plan(valid.model, read_plan(folder))
        try:
            valid.run(small)
        except Exception:
            return "raised"
        finally:
            if name := first_difference(valid.model.state_dict(), valid.before):
                raise Broken(f"changed: the original's tensor {name!r}")
        return "ran"


def _sign(data: dict[str, Any]) -> None:
    """Bring the fingerprint to the changed shapes, so that what lies behind it is reached."""
    try:
        shapes = json.loads(structural.json_text(data["plan"]["shapes"]))
        data["fingerprint"] = fingerprint(shapes)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
