"""A plan: everything that must be done to a freshly built model to make it small, as plain numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

from idap.errors import PlanError
from idap.parsing import dimension, indices, items, sequence, size, sizes, text, whole
from idap.structure.code.program import Program, check_tuples
from idap.structure.replacement import LAYER, PROJECTION, Kept, Projected

Size = int | tuple[int, ...]

MOST_DIMENSIONS = 64
"""Largest number of dimensions of a tensor in torch."""

MOST_PARTS = 4_000_000
"""The most parts of the arguments of all programs."""


@dataclass(frozen=True)
class CallForm:
    """How a removed module is called, which its stand-in must follow.

    Attributes:
        takes: position or name of the argument that is the stream.
        gives: what it returns, as in `ModuleCall.gives`.
    """

    takes: int | str
    gives: Any


@dataclass(frozen=True, repr=False)
class Plan:
    """What is kept of a model, in the indices of the model it was made for.

    Attributes:
        keep: group name -> units kept, ascending; groups that are not named stay whole.
        removed: names of the branches and blocks that are removed.
        tensors: canonical tensor name -> dimension -> slots kept, ascending.
        shapes: canonical tensor name -> the shape the plan expects, for every tensor of the model.
        attributes: module path -> attribute -> its new value.
        replaced: module path -> "identity", "zero" or "projection".
        called: replaced module -> how it is called, unless the stream is its first argument and its only result.
        programs: module path -> its new code, if its own code can't reach the sizes that are kept.
        aliases: every other name of a tied tensor -> its canonical name.
        unsaved: canonical names of the buffers that the model does not save.
        projections: module path -> the linear map that it becomes, for every module that becomes a projection. Its
            tensors are in `tensors` and `shapes` only in a plan for a model that already has it.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    tensors: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Size]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    called: Mapping[str, CallForm] = field(default_factory=dict)
    programs: Mapping[str, Program] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    unsaved: tuple[str, ...] = ()
    projections: Mapping[str, Projected] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self  # a frozen value; models that remember their plan are copied often

    def __repr__(self) -> str:
        cut = f"{len(self.keep)} group{'' if len(self.keep) == 1 else 's'} and {len(self.tensors)} tensors cut"
        return f"Plan({cut}, removed {', '.join(self.removed) or 'nothing'})"

    def _repr_html_(self) -> str:
        """The table that a notebook shows: the groups that lose units, and the parts that are removed whole."""
        from idap.report.page import table_display  # noqa: PLC0415 - needed in notebooks only

        rows = [(name, f"{len(units):,} units left") for name, units in self.keep.items()]
        rows += [(name, "a linear map" if name in self.projections else "removed") for name in self.removed]
        return table_display(repr(self), ("part", "what stays"), rows)

    def __bool__(self) -> bool:
        return bool(self.keep or self.removed)

    def removes(self, name: str) -> bool:
        """Whether a tensor or module is removed because it lies in a module that is replaced."""
        return any(name == path or name.startswith(f"{path}.") for path in self.replaced)

    def shape_after(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the model, or of a projection, once the plan is applied."""
        return self.slots_kept(name).shape_after

    def slots_kept(self, name: str) -> Kept:
        """What is kept of a tensor of the model, or of a projection."""
        return self.projection_tensors.get(name) or Kept(self.shapes[name], self.tensors.get(name, {}))

    @cached_property
    def projection_tensors(self) -> Mapping[str, Kept]:
        """The tensors that projections add to the model, by name."""
        return {n: kept for path, item in self.projections.items() for n, kept in item.tensors(path).items()}

    def check_slots(self) -> None:
        """Check that every dimension and slot that the plan names exists, and that slots are named once and in order.

        Raises:
            PlanError: a tensor fails the check; the message names the first one.
        """
        for name, dims in self.tensors.items():
            if name not in self.shapes:
                raise PlanError(f"the plan cuts tensor {name!r} but does not give the shape that it expects")
            for dim, kept in dims.items():
                _check_kept(name, dim, kept, self.shapes[name])

    def since(self, earlier: "Plan") -> "Plan":
        """The remaining plan for a model to which `earlier` was already applied.

        Raises:
            PlanError: `earlier` removed something that this plan keeps.
        """
        self._check_follows(earlier)
        held = [name for name in self.shapes if not earlier.removes(name)]
        cut = {name: dims for name, dims in self.tensors.items() if not earlier.removes(name)}
        attributes = {path: values for path, values in self.attributes.items() if not earlier.removes(path)}
        for path in earlier.projections:
            if path in self.projections:
                cut |= {name: kept.slots for name, kept in self.projections[path].tensors(path).items()}
                attributes[f"{path}.{LAYER}"] = self.projections[path].attributes
        tensors: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, dims in cut.items():
            before = earlier.slots_kept(name)
            moved = {d: _places(kept, before.slots[d]) if d in before.slots else kept for d, kept in dims.items()}
            tensors[name] = {d: kept for d, kept in moved.items() if len(kept) != before.shape_after[d]}
        return Plan(
            keep=self.keep,
            removed=self.removed,
            tensors={name: dims for name, dims in tensors.items() if dims},
            shapes={name: earlier.shape_after(name) for name in [*held, *earlier.projection_tensors]},
            attributes=attributes,
            replaced={path: kind for path, kind in self.replaced.items() if not earlier.removes(path)},
            called=self.called,
            programs=self.programs,
            aliases=self.aliases,
            unsaved=self.unsaved,
            projections={path: item for path, item in self.projections.items() if not earlier.removes(path)},
        )

    def _check_follows(self, earlier: "Plan") -> None:
        """Check that this plan removes everything that `earlier` removes.

        Raises:
            PlanError: it keeps something that `earlier` removes.
        """
        for path, kind in earlier.replaced.items():
            if not self.removes(path):
                raise PlanError(f"the earlier plan removes module {path!r}, but the later one keeps it")
            if path in self.replaced and (kind == PROJECTION) != (path in self.projections):
                raise PlanError(
                    f"the earlier plan replaces module {path!r} by {kind}, but the later one by {self.replaced[path]}"
                )
        lasting = {
            name: kept.slots for name, kept in earlier.projection_tensors.items() if name in self.projection_tensors
        }
        lasting |= {name: dims for name, dims in earlier.tensors.items() if not self.removes(name)}
        for name, dims in lasting.items():
            for dim, before in dims.items():
                kept = self.slots_kept(name).slots.get(dim)
                if kept is None:
                    raise PlanError(
                        f"the earlier plan cuts dimension {dim} of {name!r}, but the later one keeps it whole"
                    )
                missing = sorted(set(kept) - set(before))
                if missing:
                    raise PlanError(
                        f"slot {missing[0]} of dimension {dim} of {name!r} is kept, but an earlier plan removed it"
                    )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts; `Plan.from_json` reads them back."""
        return {
            "keep": {name: list(units) for name, units in self.keep.items()},
            "removed": list(self.removed),
            "tensors": {
                name: {str(dim): list(kept) for dim, kept in dims.items()} for name, dims in self.tensors.items()
            },
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
            "replaced": dict(self.replaced),
            "called": {path: [call.takes, call.gives] for path, call in self.called.items()},
            "programs": {path: program.to_json() for path, program in self.programs.items()},
            "aliases": dict(self.aliases),
            "unsaved": list(self.unsaved),
            "projections": {path: projected.to_json() for path, projected in self.projections.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """Read what `to_json` wrote; the plan.json of a folder is read by `idap.saving.checkpoint.read_plan`.

        Raises:
            PlanError: a part is missing, of the wrong type or out of range, or the parts contradict each other.
        """
        try:
            plan = cls(
                keep={name: indices(units) for name, units in items(data["keep"])},
                removed=tuple(text(name) for name in sequence(data["removed"])),
                tensors={
                    name: {dimension(dim): indices(kept) for dim, kept in items(dims)}
                    for name, dims in items(data["tensors"])
                },
                shapes={name: _shape(shape) for name, shape in items(data["shapes"])},
                attributes={
                    path: {name: size(value) for name, value in items(values)}
                    for path, values in items(data["attributes"])
                },
                replaced={path: text(kind) for path, kind in items(data["replaced"])},
                called={path: _read_call(call) for path, call in items(data["called"])},
                programs={path: Program.from_json(program) for path, program in items(data["programs"])},
                aliases={name: text(first) for name, first in items(data["aliases"])},
                unsaved=tuple(text(name) for name in sequence(data["unsaved"])),
                projections={path: Projected.from_json(item) for path, item in items(data["projections"])},
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            raise PlanError(f"this is not a plan: {found}; it must come from Plan.to_json") from error
        plan.check_slots()
        plan._check_projections()
        plan._check_programs()
        return plan

    def _check_projections(self) -> None:
        """Check that every projection has sizes, and that it has no more numbers than the module that it replaces.

        Raises:
            PlanError: a projection has no sizes, sizes have no projection, or a projection is too large.
        """
        expected = {path for path, kind in self.replaced.items() if kind == PROJECTION}
        if expected != set(self.projections):
            wrong = min(expected ^ set(self.projections))
            raise PlanError(f"module {wrong!r} must be replaced by a projection and have its sizes, or neither")
        most = dict.fromkeys(self.projections, 0)
        for name, shape in self.shapes.items():
            for place in (place for place, letter in enumerate(name) if letter == "."):
                if name[:place] in most:
                    most[name[:place]] += prod(shape)
        for path, projected in self.projections.items():
            if prod(projected.sizes) > most[path]:
                raise PlanError(
                    f"the projection in place of {path!r} maps {projected.sizes[1]} to {projected.sizes[0]} channels "
                    f"and so has more than the {most[path]:,} numbers of the module that it replaces"
                )

    def _check_programs(self) -> None:
        """All programs together have a bounded number of parts, as reading them takes time."""
        parts = sum(program.parts for program in self.programs.values())
        if parts > MOST_PARTS:
            raise PlanError(
                f"the code of all rewritten modules has {parts:,} parts, and {MOST_PARTS:,} are the most: the bound "
                "keeps plans of strangers from taking hours to read"
            )


def _shape(data: Any) -> tuple[int, ...]:
    found = sizes(data)
    if len(found) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {len(found)} dimensions")
    return found


def _read_call(call: Any) -> CallForm:
    takes, gives = sequence(call)
    return CallForm(takes if isinstance(takes, str) else sizes([whole(takes)])[0], check_tuples(gives))


def _check_kept(name: str, dim: int, kept: tuple[int, ...], shape: tuple[int, ...]) -> None:
    size = shape[dim] if 0 <= dim < len(shape) else 0
    wrong = [slot for slot in kept if not 0 <= slot < size]
    if wrong or not kept:
        raise PlanError(
            f"the plan keeps {f'slot {wrong[0]}' if wrong else 'no slot'} of dimension {dim} of tensor {name!r}, "
            f"which has shape {shape}"
        )
    if any(after <= before for before, after in pairwise(kept)):
        raise PlanError(
            f"the plan keeps slots of dimension {dim} of tensor {name!r} twice or not in ascending order; name each "
            "slot that is kept once, in ascending order"
        )


def _places(kept: Iterable[int], before: tuple[int, ...]) -> tuple[int, ...]:
    place = {slot: index for index, slot in enumerate(before)}
    return tuple(place[slot] for slot in kept)
