"""Chain two plans into one, so that a model compressed twice is still described in the indices of the original."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from idap.errors import PlanError
from idap.structure.plan import Plan
from idap.structure.replacement import Projected

_Held = TypeVar("_Held")
_Slots = Mapping[int, tuple[int, ...]]
_Units = Mapping[str, tuple[int, ...]]


def chain_plans(earlier: Plan, later: Plan) -> Plan:
    """Make one plan of two plans that are applied one after the other.

    Args:
        earlier: the plan from the original to a smaller model.
        later: the plan from that model to a still smaller one, in the indices of that model.

    Returns:
        The plan from the original to the smallest model. Projections that the later plan makes have the channels of the
        model that they were made in. If both plans rewrite the code of a module, the later program counts, which was
        made from the earlier one. `keep` has the names that the two analyses gave to groups, without the groups whose
        units they count differently.

    Raises:
        PlanError: `later` was not made for the model that `earlier` leads to; the message names the first tensor or
            module that differs.

    Example:
        >>> one = Plan(keep={"fc": (1, 3, 5)}, tensors={"w": {0: (1, 3, 5)}}, shapes={"w": (6, 2)})
        >>> two = Plan(keep={"fc": (0, 2)}, tensors={"w": {0: (0, 2)}}, shapes={"w": (3, 2)})
        >>> chain_plans(one, two).tensors, chain_plans(one, two).keep
        ({'w': {0: (1, 5)}}, {'fc': (1, 5)})
    """
    check_follows(earlier, later)
    replaced = _outermost({**earlier.replaced, **later.replaced})
    both = replace(later, shapes=earlier.shapes, aliases=earlier.aliases, unsaved=earlier.unsaved, replaced=replaced)
    names = dict.fromkeys([*earlier.tensors, *later.tensors])
    attributes = {
        path: {**earlier.attributes.get(path, {}), **later.attributes.get(path, {})}
        for path in dict.fromkeys([*earlier.attributes, *later.attributes])
    }
    return replace(
        both,
        keep=_units(earlier.keep, later.keep),
        removed=tuple(dict.fromkeys([*earlier.removed, *later.removed])),
        tensors={
            name: _compose(earlier.tensors.get(name, {}), later.tensors.get(name, {}))
            for name in names
            if not both.removes(name)
        },
        attributes=_left(both, attributes),
        called={path: called for path, called in {**earlier.called, **later.called}.items() if path in replaced},
        programs=_left(both, {**earlier.programs, **later.programs}),
        projections={
            path: _cut(projected, path, later.tensors)
            for path, projected in {**later.projections, **earlier.projections}.items()
            if path in replaced
        },
    )


def check_follows(earlier: Plan, later: Plan) -> None:
    """Check that a plan was made for the tensors that another plan leaves.

    Raises:
        PlanError: a tensor or module does not fit; the message names the first one.
    """
    for name in later.shapes:
        if name not in earlier.projection_tensors and (name not in earlier.shapes or earlier.removes(name)):
            raise PlanError(f"the later plan names tensor {name!r}, which the model of the earlier plan lacks")
    for name in (*earlier.shapes, *earlier.projection_tensors):
        if earlier.removes(name) and name not in earlier.projection_tensors:
            continue
        expected, found = earlier.shape_after(name), later.shapes.get(name)
        tables = name in earlier.unsaved and name not in {
            **earlier.tensors,
            **later.tensors,
        }  # the model may recompute it
        if expected != found and not tables:
            raise PlanError(
                f"the earlier plan leaves tensor {name!r} with shape {expected}, the later one expects "
                f"{'no such tensor' if found is None else found}: it was made for another model"
            )
    for path in (*later.replaced, *later.programs):
        if earlier.removes(path):
            raise PlanError(f"the later plan changes module {path!r}, which the earlier plan removes")


def _compose(earlier: _Slots, later: _Slots) -> dict[int, tuple[int, ...]]:
    """The slots that both keep, in the indices of the earlier."""
    moved = {dim: tuple(earlier[dim][place] for place in kept) for dim, kept in later.items() if dim in earlier}
    return {**earlier, **later, **moved}


def _cut(projected: Projected, path: str, later: Mapping[str, _Slots]) -> Projected:
    """The projection with the channels that a later plan keeps; a projection of the later plan itself keeps all."""
    (name, _) = next(iter(projected.tensors(path).items()))
    cut = later.get(name, {})
    outputs, inputs = projected.outputs, projected.inputs
    return replace(
        projected,
        outputs=tuple(outputs[place] for place in cut.get(0, range(len(outputs)))),
        inputs=tuple(inputs[place] for place in cut.get(1, range(len(inputs)))),
    )


def _units(earlier: _Units, later: _Units) -> dict[str, tuple[int, ...]]:
    """The units that both plans keep, for groups whose units both count alike."""
    found = {**earlier, **later}
    for name in earlier.keys() & later.keys():
        before, places = earlier[name], later[name]
        if places and places[-1] < len(before):
            found[name] = tuple(before[place] for place in places)
        else:
            del found[name]
    return found


def _outermost(replaced: Mapping[str, str]) -> dict[str, str]:
    return {
        path: kind for path, kind in replaced.items() if not any(path.startswith(f"{other}.") for other in replaced)
    }


def _left(plan: Plan, by_module: Mapping[str, _Held]) -> dict[str, _Held]:
    return {path: held for path, held in by_module.items() if not plan.removes(path)}
