"""Find the configuration that describes a compressed model, and verify it on example inputs."""

import copy
import importlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from idap.hugging_face.fields import Edit, Fields, Pairs, Path, Shortened, describe_edit, shorten
from idap.structure.plan import Plan
from idap.surgery.compare import Inputs, largest_difference, outputs_of
from idap.surgery.rewritten import original_class

IN_USE = frozenset({"training", "gradient_checkpointing", "name_or_path"})
"""Attributes that describe how a module is used, not what it computes."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of an output that is allowed, as a share of the output's largest number."""
    return 1e-4 if torch.finfo(dtype).bits >= 32 else 2e-2


def output_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Largest difference between outputs of two models, as a share of the output's largest number."""
    error, _ = largest_difference(other, lambda args, kwargs: outputs_of(model, args, kwargs), inputs)
    return error


def same_code(model: nn.Module, other: nn.Module, name: Callable[[str], str], inputs: Inputs) -> bool:
    """Whether two models compute the same outputs with large random weights.

    The weights of a barely trained model give nearly even attention, so its outputs don't show how it is split into
    heads.

    Args:
        model: a model that keeps the random weights; in half precision, a copy in float32 is compared instead.
        other: the other model; not changed.
        name: gives the name in `model` of a tensor of `other`.
        inputs: inputs of both models.
    """
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    mine, theirs = copy.deepcopy(model).float() if half else model, copy.deepcopy(other)
    if half:
        theirs = theirs.float()
        inputs = tree_map_only(Tensor, lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, inputs)
    dice, state = torch.Generator().manual_seed(0), mine.state_dict()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=dice).to(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * 2 / (parameter.numel() / parameter.shape[0]) ** 0.5)
            else:
                parameter.add_(noise / 10)
        for own, tensor in theirs.state_dict().items():
            state[name(own)].copy_(tensor)
    # Tables that were made in half precision, such as those of rotary embeddings, are inexact in float32 as well.
    return output_difference(mine, theirs, inputs) <= (0.1 if half else 0.01)


def ties(tensors: Mapping[str, Tensor]) -> set[frozenset[str]]:
    """Sets of names that share one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {frozenset(shared) for shared in names.values() if len(shared) > 1}


def different_switch(one: nn.Module, other: nn.Module) -> str:
    """The first setting in which two modules differ, such as local or global attention; sizes are ignored.

    Returns:
        Its name with both values, such as "sliding_window (None, here 64)"; "" if there is none.
    """
    mine, theirs = vars(one), vars(other)
    for name in mine.keys() & theirs.keys() - IN_USE:
        pair = mine[name], theirs[name]
        if name.startswith("_") or not all(value is None or type(value) in (bool, str, int) for value in pair):
            continue
        if type(pair[0]) is not type(pair[1]) or (type(pair[0]) is not int and pair[0] != pair[1]):
            return f"{name} ({pair[1]}, here {pair[0]})"
    return ""


TRIALS = 64
"""Most configurations that are built on the meta device."""
VERIFICATIONS = 8
"""Most configurations that are built with weights, to compare their outputs."""


@dataclass(frozen=True)
class Configured:
    """A model that was built from a configuration alone and equals the compressed model.

    Attributes:
        model: the model, with the weights of the compressed model, in evaluation mode.
        changed: field of the configuration -> its value before and after.
        error: largest relative difference of an output.
    """

    model: Any
    changed: Mapping[str, tuple[Any, Any]]
    error: float


@dataclass(frozen=True)
class Distance:
    """Distance of the tensors of a configuration from those of the compressed model.

    Attributes:
        total: the distance; 0 if all names and shapes agree.
        pairs: (size found, size wanted) of the dimensions that differ, the most frequent first.
        first: the first difference as a sentence.
    """

    total: int
    pairs: Pairs
    first: str


def find_configuration(model: Any, plan: Plan, inputs: Inputs) -> Configured | str:
    """Find a configuration that describes a compressed model.

    Args:
        model: a compressed model of transformers that still has the original's configuration; not changed.
        plan: the plan that led to it.
        inputs: inputs on which the outputs are compared; the model runs on them.

    Returns:
        The model built from that configuration; or the reason why there is none, as a sentence without its full stop.
    """
    short = shorten(model)
    if short.left:
        return f"{short.left} stands in for what was removed, and a configuration can leave out only whole layers"
    search = _Search(model, short)
    edit, distance = search.descend()
    if distance.total:
        return _uneven(search, plan) or "; ".join(filter(None, [distance.first, search.refusal]))
    reason = ""
    for candidate in itertools.islice(search.candidates(edit), VERIFICATIONS):
        found = _verify(search, candidate, model, inputs)
        if not isinstance(found, str):
            built, error = found
            changed = {
                ".".join(map(str, path)): (search.fields.value(path), value) for path, value in candidate.items()
            }
            return Configured(built, changed, error)
        reason = reason or found
    return reason


class _Search:
    """Configurations near the original's, and the distance of their tensors from those of the compressed model."""

    def __init__(self, model: Any, short: Shortened) -> None:
        self.kind = original_class(type(model))
        self.original = model.config
        self.start = model.config.to_dict()
        self.short = short
        self.wanted = {name: tuple(tensor.shape) for name, tensor in short.tensors(model).items()}
        common = importlib.import_module("transformers").PreTrainedConfig().to_dict()
        widths = {value for m in model.modules() if isinstance(value := vars(m).get("head_dim"), int)}
        self.fields = Fields(self.start, tuple(model.config.sub_configs), common, short.lists, widths)
        self.refusal = ""
        self._last = ""  # why the last model could not be built
        self._seen: dict[str, Distance | None] = {}
        self._pairs: dict[tuple[int, int], None] = {}  # all sizes that had to change

    def config(self, edit: Edit) -> Any:
        """The configuration with some fields changed; its class checks it as if it were read from a file.

        Raises:
            Exception: any exception that its class raises for fields that don't fit together.
        """
        fields = copy.deepcopy(self.start)
        for path, value in edit.items():
            held: Any = fields
            for key in path[:-1]:
                held = held[key]
            held[path[-1]] = copy.deepcopy(value)
        return type(self.original).from_dict(fields)

    def is_over(self) -> bool:
        return len(self._seen) >= TRIALS

    def distance(self, edit: Edit) -> Distance | None:
        """Distance of a configuration; None if no model can be built from it."""
        key = repr(sorted(edit.items(), key=repr))
        if key not in self._seen:
            self._seen[key] = self._distance(edit)
        return self._seen[key]

    def _distance(self, edit: Edit) -> Distance | None:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                built = self.kind._from_config(self.config(edit))  # type: ignore[attr-defined]
        except Exception as error:  # classes of configurations raise exceptions of any kind
            line = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
            self._last = line or type(error).__name__
            return None
        found = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        return _distance_between(found, self.wanted)

    def descend(self) -> tuple[dict[Path, Any], Distance]:
        """Change one field after the other as long as the distance falls."""
        best: dict[Path, Any] = {}
        nearest = self.distance(best)
        if nearest is None:
            return {}, Distance(1, (), f"the original's own configuration can't be built: {self._last}")
        refused: list[Edit] = []
        trying = True
        while trying and nearest.total:
            trying = False
            self._pairs |= dict.fromkeys(nearest.pairs)
            for edit in self.fields.edits(best, nearest.pairs, refused):
                if self.is_over():
                    break
                tried = best | dict(edit)
                distance = self.distance(tried)
                if distance is None:
                    refused.append(edit)
                    if not self.refusal and len(edit) == 1 and self._is_size(edit, nearest.pairs):
                        self.refusal = f"the configuration refuses {describe_edit(edit)}: {self._last}"
                elif distance.total < nearest.total:
                    best, nearest, trying = tried, distance, True
                    refused.clear()
                    break
        return self._minimal_edit(best, nearest), nearest

    def _minimal_edit(self, edit: Edit, nearest: Distance) -> dict[Path, Any]:
        """Drop the fields that need not change: some were tried only together with others."""
        needed = {path: value for path, value in edit.items() if value != self.fields.value(path)}
        for path in [path for path, value in needed.items() if not isinstance(value, list)]:
            fewer = {other: value for other, value in needed.items() if other != path}
            distance = self.distance(fewer)
            if distance is not None and distance.total == nearest.total:
                needed = fewer
        return needed

    def candidates(self, edit: Edit) -> Iterator[dict[Path, Any]]:
        """Configurations with the wanted tensors, the given one first; they differ in what shapes don't show."""
        yield dict(edit)
        for other in self.fields.silent_edits(edit, list(self._pairs)):
            if self.is_over():
                return
            tried = dict(edit) | dict(other)
            distance = self.distance(tried)
            if distance is not None and distance.total == 0:
                yield tried

    def _is_size(self, edit: Edit, pairs: Pairs) -> bool:
        """Whether all fields that an edit changes hold sizes that must change."""
        return all(self.fields.value(path) in [size for size, _ in pairs] for path in edit)


def _distance_between(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> Distance:
    """Compare names and shapes."""
    pairs: Counter[tuple[int, int]] = Counter()
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    first = f"no configuration was found without tensor {extra[0]!r}" if extra else ""
    first = f"no configuration was found with tensor {missing[0]!r}" if missing else first
    total = 0
    for name, shape in wanted.items():
        if name not in found or found[name] == shape:
            continue
        first = first or f"no configuration was found that makes tensor {name!r} {shape}; the nearest is {found[name]}"
        if len(found[name]) != len(shape):
            total += len(shape)
            continue
        differ = [(have, want) for have, want in zip(found[name], shape, strict=True) if have != want]
        total += len(differ)
        pairs.update(differ)
    # A missing or an extra name counts more than the shapes of its layer.
    total += 10 * (len(missing) + len(extra))
    return Distance(total, tuple(pair for pair, _ in pairs.most_common()), first)


def _uneven(search: _Search, plan: Plan) -> str:
    """A sentence on the first two layers with equal shapes before the cut and different ones after it; else ""."""
    before = {search.short.name(name): shape for name, shape in plan.shapes.items() if not plan.removes(name)}
    seen: dict[tuple[str, tuple[int, ...] | None], tuple[str, tuple[int, ...]]] = {}
    for name, shape in search.wanted.items():
        place = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), before.get(name)
        other, expected = seen.setdefault(place, (name, shape))
        if shape != expected:
            return f"{other} has shape {expected}, {name} has {shape}, and a configuration has one number for both"
    return ""


def _verify(search: _Search, edit: Edit, model: Any, inputs: Inputs) -> tuple[Any, float] | str:
    """Build the model of a configuration with the weights of the compressed model, and compare their outputs.

    Returns:
        The model, and the largest relative difference of an output; or what differs, as a sentence.
    """
    config = search.config(edit)
    config.dtype = model.dtype
    with torch.random.fork_rng(devices=[]):
        built = search.kind._from_config(config)  # type: ignore[attr-defined]
    tensors = search.short.tensors(model)
    own = built.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if own[name].dtype != tensor.dtype:
            return f"tensor {name!r} is {tensor.dtype}, but the configuration makes it {own[name].dtype}"
    if ties(own) != ties(tensors):
        return "the model ties other tensors than the configuration does"
    built.to(model.device).eval()
    for path, new in search.short.paths.items():
        differs = different_switch(model.get_submodule(path), built.get_submodule(new))
        if differs:
            return f"the layer {new} of the configuration has a different {differs}"
    try:
        alike = same_code(built, model, search.short.name, inputs)
        built.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()})
        error = output_difference(built, model, inputs)
    except Exception as failure:  # tensors may fit where the code does not
        return (
            f"a configuration with {describe_edit(edit) or 'no change'} can't run: {type(failure).__name__}: {failure}"
        )
    if not alike or not error <= tolerance(model.dtype):
        with_this = describe_edit(edit) or "no change"
        return f"a configuration with {with_this} gives tensors of the same shapes, but other outputs"
    return built, error
