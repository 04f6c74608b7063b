"""Cut a module as a plan says: slice its tensors, set its attributes, replace the blocks that it removes."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from idap.graph.run import copy_computed, forget_cached
from idap.structure.plan import Plan
from idap.surgery.check_plan import check_fit, tensors_with_names
from idap.surgery.rewritten import SETTINGS_ABOVE, rewrite_
from idap.surgery.stand_ins import LinearMap, Projection, stand_in


def apply_plan(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap] | None = None) -> nn.Module:
    """Cut a copy of a model.

    Args:
        model: the model that the plan was made for, or a freshly built one of the same architecture. It is left as it
            was, and the copy shares no memory with it. Kept tensors of the copy are new and contiguous.
        plan: from `Structure.plan` or a file.
        maps: module path -> the linear map of the projection that replaces it; a projection without a map starts at
            zero.

    Returns:
        A smaller module of the same class.

    Raises:
        PlanError: the plan does not fit the model; names the first tensor, its shape and the expected shape.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> shapes = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
        >>> cut = {"0.weight": {0: (1, 5)}, "0.bias": {0: (1, 5)}, "2.weight": {1: (1, 5)}}
        >>> small = apply_plan(net, Plan(keep={"0": (1, 5)}, tensors=cut, shapes=shapes))
        >>> small[0].weight.shape, net[0].weight.shape
        (torch.Size([2, 4]), torch.Size([8, 4]))
    """
    check_fit(model, plan, maps)
    slices = _slice_tensors(model, plan)
    # Handing the small tensors to deepcopy means that the large ones are never copied.
    memo: dict[int, object] = {**copy_computed(model), **slices}
    small = copy.deepcopy(model, memo)
    _restructure(small, plan, maps or {})
    return small


def apply_plan_(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap] | None = None) -> nn.Module:
    """Cut a model in place; see `apply_plan`. The plan is checked first: after an error the model is unchanged."""
    check_fit(model, plan, maps)
    exchange_(model, _slice_tensors(model, plan))
    _restructure(model, plan, maps or {})
    return model


def exchange_(model: nn.Module, others: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers of a model by other tensors, wherever the model holds them.

    Args:
        model: changed in place.
        others: id of a tensor -> the tensor that replaces it.
    """
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in others:
                    table[name] = others[id(tensor)]  # type: ignore[assignment]
        for held in vars(module).values():  # such as the flat list of weights that a recurrent layer keeps
            if type(held) is list:
                held[:] = [others.get(id(item), item) for item in held]


def _slice_tensors(model: nn.Module, plan: Plan) -> dict[int, Tensor]:
    """The id of each tensor to be cut -> its new tensor; a tensor with several (tied) names is cut once."""
    found = {}
    for name, tensor in tensors_with_names(model):
        if name in plan.tensors:
            small = cut_tensor(tensor.detach(), plan.tensors[name])
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
                vars(small).update(vars(tensor))  # attributes that users set for their optimisers
            found[id(tensor)] = small
    return found


def cut_tensor(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The slots of a tensor that a plan keeps, as a new contiguous tensor.

    >>> cut_tensor(torch.arange(6).reshape(2, 3), {1: (0, 2)})
    tensor([[0, 2],
            [3, 5]])
    """
    for dim, places in kept.items():
        tensor = tensor.index_select(dim, torch.tensor(places, device=tensor.device))
    return tensor.contiguous()


def _restructure(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap]) -> None:
    modules = dict(model.named_modules())
    for path, values in plan.attributes.items():
        for name, value in values.items():
            held = getattr(modules[path], name)
            setattr(modules[path], name, list(value) if isinstance(held, list) and isinstance(value, tuple) else value)
    for path, program in plan.programs.items():
        rewrite_(modules[path], program)
        for above in (module for name, module in modules.items() if name == "" or path.startswith(f"{name}.")):
            for name, value in SETTINGS_ABOVE.get(type(above).__name__, {}).items():
                setattr(above, name, value)
    for module in modules.values():
        forget_cached(module)
    for path in plan.replaced:
        parent, _, name = path.rpartition(".")
        modules[parent]._modules[name] = _stand_in(modules[path], path, plan, maps.get(path))


def _stand_in(old: nn.Module, path: str, plan: Plan, linear_map: LinearMap | None) -> nn.Module:
    projected = plan.projections.get(path)
    new = stand_in(plan.replaced[path], plan.called.get(path), projected).train(old.training)
    like = next((tensor for tensor in old.parameters() if tensor.is_floating_point()), None)
    if projected is None or like is None:
        return new
    new.to(device=like.device, dtype=like.dtype)
    if linear_map is not None and isinstance(new, Projection):
        new.take(linear_map, projected)
    return new
