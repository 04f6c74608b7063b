"""Find the configuration whose model is the cut one, and prove that it is.

No table of models: the fields of a configuration are tried whose value is a size that changed, or divides one, as the
number of heads does. What a trial is worth, the names and shapes of the tensors say; whether it is right, the outputs.
"""

import copy
import importlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from idap.errors import RewrittenModuleError
from idap.structure.plan import Plan
from idap.surgery.rewritten import original_class
from idap.zoo.same import Inputs, output_difference, shaken_difference, switch_apart, ties, tolerance
from idap.zoo.shortened import Shortened, shortened

Path = tuple[str | int, ...]
Edit = Mapping[Path, Any]
"""Fields of a configuration, by the keys that lead to them, and their new values."""

TRIALS = 64
"""Configurations built at most, on the meta device."""
PROOFS = 8
"""Configurations built at most with weights, whose outputs are compared."""


@dataclass(frozen=True)
class Configured:
    """A model built from a configuration alone that equals the cut one.

    Attributes:
        model: with the weights of the cut model, in evaluation mode.
        changed: field of the configuration -> its value before and after.
        error: largest relative difference of an output.
    """

    model: Any
    changed: Mapping[str, tuple[Any, Any]]
    error: float


@dataclass(frozen=True)
class Distance:
    """How far the tensors of a configuration are from those wanted.

    Attributes:
        total: 0 where all names and shapes agree.
        pairs: sizes found and wanted in the same place, the most frequent first.
        first: the first difference, in words.
    """

    total: int
    pairs: tuple[tuple[int, int], ...]
    first: str


def configured(model: Any, plan: Plan, inputs: Inputs) -> Configured | str:
    """Find a configuration that makes the cut model.

    Args:
        model: a cut model of transformers, whose configuration is still the original's. It is not changed.
        plan: that led to it.
        inputs: on which the outputs are compared.

    Returns:
        The model built from that configuration, or why there is none, as a sentence without its full stop.
    """
    short = shortened(model)
    if short.left:
        return f"{short.left} is gone, and a configuration can leave out whole layers of a list only"
    search = _Search(model, short)
    edit, distance = search.down()
    if distance.total:
        return _uneven(search, plan) or "; ".join(filter(None, [distance.first, search.refusal]))
    reason = ""
    for candidate in itertools.islice(search.equals(edit), PROOFS):
        found = _proved(search, candidate, model, inputs)
        if not isinstance(found, str):
            built, error = found
            changed = {".".join(map(str, path)): (search.value(path), value) for path, value in candidate.items()}
            return Configured(built, changed, error)
        reason = reason or found
    return reason


class _Search:
    """Configurations near that of the original, and how far the tensors of their models are from those wanted."""

    def __init__(self, model: Any, short: Shortened) -> None:
        self.kind = original_class(type(model))
        self.original = model.config
        self.start = model.config.to_dict()
        self.sub_configs = tuple(model.config.sub_configs)
        self._common = importlib.import_module("transformers").PreTrainedConfig().to_dict().keys()
        self.short = short
        self.wanted = {name: tuple(tensor.shape) for name, tensor in short.tensors(model).items()}
        self.head_dims = {value for m in model.modules() if isinstance(value := vars(m).get("head_dim"), int)}
        self.refusal = ""
        self._seen: dict[str, Distance | None] = {}
        self._pairs: dict[tuple[int, int], None] = {}  # all sizes that had to change

    def config(self, edit: Edit) -> Any:
        """The configuration with some fields changed; it checks itself as if it were read from a file.

        Raises:
            Exception: whatever its class raises for fields that don't fit.
        """
        fields = copy.deepcopy(self.start)
        for path, value in edit.items():
            held: Any = fields
            for key in path[:-1]:
                held = held[key]
            held[path[-1]] = copy.deepcopy(value)
        config = type(self.original).from_dict(fields)
        config._attn_implementation = self.original._attn_implementation
        if getattr(self.original, "_experts_implementation", None) is not None:
            config._experts_implementation = self.original._experts_implementation
        return config

    def value(self, path: Path) -> Any:
        """The value of a field before any change."""
        held: Any = self.start
        for key in path:
            held = held[key] if isinstance(key, int) else held.get(key)
        return held

    def is_over(self) -> bool:
        return len(self._seen) >= TRIALS

    def distance(self, edit: Edit) -> Distance | None:
        """How far a configuration is; None where no model can be built from it."""
        key = repr(sorted(edit.items(), key=repr))
        if key not in self._seen:
            self._seen[key] = self._distance(edit)
        return self._seen[key]

    def _distance(self, edit: Edit) -> Distance | None:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                built = self.kind._from_config(self.config(edit))  # type: ignore[attr-defined]
        except Exception as error:  # any class may refuse a configuration in its own way
            line = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
            if not self.refusal and all(type(self.value(path)) is int for path in edit):
                self.refusal = f"the configuration refuses {_told(edit)}: {line or type(error).__name__}"
            return None
        found = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        return _apart(found, self.wanted)

    def down(self) -> tuple[dict[Path, Any], Distance]:
        """Change one field after the other as long as the tensors come nearer to those wanted."""
        best: dict[Path, Any] = {}
        nearest = self.distance(best)
        assert nearest is not None  # the original's own configuration
        refused: list[Edit] = []
        trying = True
        while trying and nearest.total:
            trying = False
            self._pairs |= dict.fromkeys(nearest.pairs)
            for edit in self._edits(best, nearest.pairs, refused):
                if self.is_over():
                    break
                tried = best | dict(edit)
                distance = self.distance(tried)
                if distance is None:
                    refused.append(edit)
                elif distance.total < nearest.total:
                    best, nearest, trying = tried, distance, True
                    refused.clear()
                    break
        return {path: value for path, value in best.items() if value != self.value(path)}, nearest

    def equals(self, edit: Edit) -> Iterator[dict[Path, Any]]:
        """Configurations with the tensors wanted, that given first: what tensors don't show, outputs do."""
        yield dict(edit)
        singles = list(_by_share(self._ints({}), list(self._pairs)))
        pairs = (one | two for one, two in itertools.combinations(singles, 2) if not set(one) & set(two))
        for other in itertools.chain(singles, pairs):
            if self.is_over():
                return
            distance = self.distance(dict(edit) | other)
            if distance is not None and distance.total == 0:
                yield dict(edit) | other

    def _edits(self, done: Edit, pairs: Sequence[tuple[int, int]], refused: Sequence[Edit]) -> Iterator[Edit]:
        """What may be tried next, the most plausible first."""
        for before, stays in self.short.lists:
            yield from self._shorter(done, before, stays)
        ints = self._ints(done)
        for size, wanted in pairs:
            yield from ({path: wanted} for path, value in ints.items() if value == size)
        shares = list(_by_share(ints, pairs))
        yield from shares
        # A stream and its heads may have to change together for the configuration to accept either.
        yield from ({**one, **two} for one in list(refused) for two in shares if not set(one) & set(two))
        for size, wanted in pairs:
            yield from self._unset(done, size, wanted)

    def _shorter(self, done: Edit, before: int, stays: Sequence[int]) -> Iterator[Edit]:
        """A number of layers, with what the configuration lists for each of them."""
        for level in self._levels():
            fields = self._fields(level)
            lists = {
                (*level, key): [value[place] for place in stays]
                for key, value in fields.items()
                if isinstance(value, list) and len(value) == before > 1
            }
            for key, value in fields.items():
                path = (*level, key)
                if type(value) is int and value == before and path not in done:
                    yield {path: len(stays), **lists}
                    if lists:
                        yield {path: len(stays)}
            if lists:
                yield lists

    def _unset(self, done: Edit, size: int, wanted: int) -> Iterator[Edit]:
        """Fields that hold None, as long as their value follows from another field."""
        for level in self._levels():
            fields = self._fields(level)
            if self.head_dims and fields.get("head_dim") is None and (*level, "head_dim") not in done:
                yield from ({(*level, "head_dim"): width} for width in sorted(self.head_dims))
            for key, value in fields.items():
                if value is None and (*level, key) not in done:
                    yield {(*level, key): wanted}

    def _levels(self) -> list[Path]:
        """Where fields are: in the configuration, and in those that it holds."""
        return [(), *((name,) for name in self.sub_configs if isinstance(self.start.get(name), dict))]

    def _fields(self, level: Path) -> dict[str, Any]:
        """Those in which models of one kind may differ, without those that every configuration has."""
        fields: dict[str, Any] = self.start if not level else self.start[level[0]]
        return {key: value for key, value in fields.items() if key not in self._common and not _is_id(key)}

    def _ints(self, done: Edit) -> dict[Path, int]:
        """All whole numbers, alone and in lists, with what is changed already."""
        found: dict[Path, int] = {}
        for level in self._levels():
            for key, value in self._fields(level).items():
                path = (*level, key)
                now = done.get(path, value)
                if type(now) is int:
                    found[path] = now
                elif isinstance(now, list):
                    found |= {(*path, place): item for place, item in enumerate(now) if type(item) is int}
        return {path: done.get(path, value) for path, value in found.items()}


def _told(edit: Edit) -> str:
    return ", ".join(f"{'.'.join(map(str, path))}={value}" for path, value in edit.items())


def _is_id(key: str) -> bool:
    """Whether a field names something rather than counting it."""
    return key.endswith(("_id", "_ids"))


def _by_share(ints: Mapping[Path, int], pairs: Sequence[tuple[int, int]]) -> Iterator[dict[Path, Any]]:
    """Fields that divide a size, in proportion to it: numbers of heads, widths of a head."""
    seen = set()
    for size, wanted in pairs:
        for path, value in ints.items():
            if value > 1 and size % value == 0 and size != value and value * wanted % size == 0:
                new = value * wanted // size
                if new != value and (path, new) not in seen:
                    seen.add((path, new))
                    yield {path: new}


def _apart(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> Distance:
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
    # A name too many or too few weighs more than any shape that comes with it.
    total += 10 * (len(missing) + len(extra))
    return Distance(total, tuple(pair for pair, _ in pairs.most_common()), first)


def _uneven(search: _Search, plan: Plan) -> str:
    """The first tensor that had the size of another at the same place of another layer, and has no longer."""
    before = {search.short.name(name): shape for name, shape in plan.shapes.items() if not plan.gone(name)}
    seen: dict[tuple[str, tuple[int, ...] | None], tuple[str, tuple[int, ...]]] = {}
    for name, shape in search.wanted.items():
        place = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), before.get(name)
        other, expected = seen.setdefault(place, (name, shape))
        if shape != expected:
            return f"{other} has shape {expected}, {name} {shape}, and a configuration has one number for both"
    return ""


def _proved(search: _Search, edit: Edit, model: Any, inputs: Inputs) -> tuple[Any, float] | str:
    """The model of a configuration with the weights of the cut one and the error of its outputs, or what differs."""
    config = search.config(edit)
    config.dtype = model.dtype
    with torch.random.fork_rng(devices=[]):
        built = search.kind._from_config(config)  # type: ignore[attr-defined]
    tensors = search.short.tensors(model)
    own = built.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if own[name].dtype != tensor.dtype:
            return f"tensor {name!r} is {tensor.dtype}, and the configuration makes it {own[name].dtype}"
    if ties(own) != ties(tensors):
        return "its tied tensors are others than the configuration ties"
    built.to(model.device).eval()
    for path, new in search.short.paths.items():
        differs = switch_apart(model.get_submodule(path), built.get_submodule(new))
        if differs:
            return f"the layer {new} of the configuration has another {differs}"
    try:
        error = shaken_difference(built, model, search.short.name, inputs)
        if error <= 100 * tolerance(model.dtype):
            built.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()})
            error = output_difference(built, model, inputs)
    except RewrittenModuleError as found:
        return f"the model does not run on the example inputs, so nothing could be proved ({found}); pass inputs"
    if not error <= tolerance(model.dtype):
        told = _told(edit) or "no change"
        return f"a configuration with {told} gives tensors of the same shapes, and other outputs (error {error:.2g})"
    return built, error
