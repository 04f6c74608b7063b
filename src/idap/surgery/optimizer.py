"""Cut a user's optimiser as its model was cut, so that training continues with the same momentum."""

import copy
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from idap.errors import PlanError
from idap.structure.plan import Plan
from idap.surgery.apply import cut_tensor
from idap.surgery.check_plan import check_fit

_OF_TORCH = ("defaults", "state", "param_groups")

Follows = dict[Tensor, tuple[nn.Parameter, dict[int, tuple[int, ...]]] | None]
"""Parameter of the old model -> its counterpart in the cut model, and the kept slots of each dimension; None if it was
removed."""


def slice_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module, plan: Plan) -> Optimizer:
    """Make the optimiser of a cut model from that of the model before the cut.

    Args:
        optimizer: it trains parameters of `before`, and is left as it was. Its state must be per parameter, as that of
            SGD and Adam is: numbers, and tensors that have the parameter's size, or 1, in each dimension.
        before: the model that the plan was made for.
        after: what the plan made of it.
        plan: in the indices of `before`.

    Returns:
        An optimiser of the same class with the same groups and settings, for the parameters of `after`. State that has
        a parameter's shape is cut as the parameter is, other state is copied; removed parameters are left out.
        Hooks, and schedulers that wrap the optimiser, stay with the old one.

    Raises:
        PlanError: plan, models and optimiser do not belong together, or the optimiser keeps other state.

    Example:
        >>> import torch
        >>> from idap.surgery.apply import apply_plan
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> cut = {"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}}
        >>> plan = Plan(tensors=cut, shapes={"0.weight": (3, 4), "0.bias": (3,)})
        >>> small = apply_plan(net, plan)
        >>> sgd = slice_optimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net, small, plan)
        >>> [tuple(parameter.shape) for parameter in sgd.param_groups[0]["params"]], sgd.param_groups[0]["momentum"]
        ([(2, 4), (2,)], 0.9)
    """
    check_fit(before, plan)
    _check_own(optimizer)
    names = _names(before)
    found = dict(after.named_parameters(remove_duplicate=False))
    follows: Follows = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise PlanError(
                    f"group {number} of the {type(optimizer).__name__} holds a parameter of shape "
                    f"{tuple(parameter.shape)} that {type(before).__name__} does not have; build it from the "
                    "parameters of the model that is cut"
                )
            follows[parameter] = _counterpart(names[id(parameter)], found, plan)
    stray = [key for key in optimizer.state if key not in follows]
    if stray:
        raise _other_state(optimizer, "state that belongs to no parameter of its groups")
    small: Optimizer = type(optimizer).__new__(type(optimizer))
    small.__setstate__(
        {
            "defaults": copy.deepcopy(optimizer.defaults),
            "state": _state(optimizer, follows, names),
            "param_groups": [_group(group, follows) for group in optimizer.param_groups],
        }
    )
    for name, value in vars(optimizer).items():
        # Other attributes of torch and of the class, such as flags; hooks and wrapped methods belong to the old one.
        if name not in vars(small) and not hasattr(type(optimizer), name):
            setattr(small, name, type(value)() if "hooks" in name else copy.deepcopy(value))
    return small


def hyperparameters(optimizer: Optimizer) -> dict[str, Any]:
    """Class and settings of an optimiser as plain values, to tell optimisers apart."""
    groups = [
        {
            name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for name, value in group.items()
            if isinstance(value, bool | int | float | str | tuple | Tensor | None) and name != "params"
        }
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def _names(model: nn.Module) -> dict[int, list[str]]:
    """The id of each parameter -> its names; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _counterpart(
    names: list[str], found: dict[str, nn.Parameter], plan: Plan
) -> tuple[nn.Parameter, dict[int, tuple[int, ...]]] | None:
    """The counterpart of a parameter in the cut model, and its kept slots; None if it was removed."""
    kept = next((dict(plan.tensors[name]) for name in names if name in plan.tensors), {})
    left = [name for name in names if not plan.removes(name)]
    if not left:
        return None
    if left[0] not in found:
        raise PlanError(f"the plan keeps parameter {left[0]!r}, but the cut model has none of that name")
    shape = plan.shapes.get(next((name for name in names if name in plan.shapes), ""))
    expected = None if shape is None else [len(kept[dim]) if dim in kept else size for dim, size in enumerate(shape)]
    if expected is not None and expected != list(found[left[0]].shape):
        raise PlanError(
            f"parameter {left[0]!r} of the cut model has shape {tuple(found[left[0]].shape)}, the plan says "
            f"{tuple(expected)}; the model after the cut is not what this plan makes of the model before"
        )
    return found[left[0]], kept


def _group(group: dict[str, Any], follows: Follows) -> dict[str, Any]:
    """A group of the optimiser without the removed parameters, with its settings."""
    left = [place for place, parameter in enumerate(group["params"]) if follows[parameter] is not None]
    settings = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    if "param_names" in settings:
        settings["param_names"] = [settings["param_names"][place] for place in left]
    parameters = [found[0] for parameter in group["params"] if (found := follows[parameter]) is not None]
    return {"params": parameters, **settings}


def _state(optimizer: Optimizer, follows: Follows, names: dict[int, list[str]]) -> dict[Tensor, dict[str, Any]]:
    """The state of the parameters that are kept, cut as they are."""
    found: dict[Tensor, dict[str, Any]] = defaultdict(dict)
    for parameter, held in optimizer.state.items():
        counterpart = follows[parameter]
        if counterpart is None:
            continue
        small, kept = counterpart
        found[small] = {}
        for name, value in held.items():
            if isinstance(value, Tensor):
                what = f"{name!r} of shape {tuple(value.shape)} for {names[id(parameter)][0]!r}"
                found[small][name] = _cut(optimizer, value, parameter, kept, what)
            elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                raise _other_state(optimizer, f"a collection of tensors, {name!r}")
            else:
                found[small][name] = copy.deepcopy(value)
    return found


def _cut(optimizer: Optimizer, value: Tensor, parameter: Tensor, kept: dict[int, tuple[int, ...]], what: str) -> Tensor:
    if value.numel() == 1 or not kept:
        return value.detach().clone()
    sizes = zip(value.shape, parameter.shape, strict=False)
    if value.ndim != parameter.ndim or any(size not in (1, full) for size, full in sizes):
        raise _other_state(optimizer, f"{what}, which has shape {tuple(parameter.shape)}")
    return cut_tensor(value.detach(), {dim: slots for dim, slots in kept.items() if value.shape[dim] > 1}).clone()


def _check_own(optimizer: Optimizer) -> None:
    """Refuse an optimiser that keeps tensors in attributes of its own: they would be those of the old model."""
    for name, value in vars(optimizer).items():
        if name not in _OF_TORCH and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            raise _other_state(optimizer, f"tensors in its attribute {name!r}")


def _other_state(optimizer: Optimizer, what: str) -> PlanError:
    return PlanError(
        f"{type(optimizer).__name__} keeps {what}, which can't be cut with the model; take an optimiser whose state is "
        "per parameter, such as SGD or AdamW, or build a new one for the cut model"
    )
