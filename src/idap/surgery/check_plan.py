"""Check that a plan fits a model, before anything is changed: tensors, sizes, code, stand-ins, recurrent weights."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from idap.errors import PlanError
from idap.graph.provenance import sizes_held
from idap.graph.run import copy_computed, find_lazy
from idap.structure.plan import Plan, Size
from idap.surgery.rewritten import original_class, rewritten_class
from idap.surgery.stand_ins import LinearMap, check_stand_in


def check_fit(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap] | None = None) -> None:
    """Check that a model has every tensor and module that a plan names, in the expected shapes, and that maps fit.

    Args:
        model: the model that the plan is for.
        plan: from `Structure.plan` or a file.
        maps: module path -> the linear map of the projection that replaces it.

    Raises:
        PlanError: names the first tensor or module that does not fit.
    """
    if (lazy := find_lazy(model)) is not None:
        raise PlanError(
            f"{lazy!r} of the model is not initialised yet: run the model once on a batch before it is cut."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_with_names(model)}
    learned = {name for name, _ in model.named_parameters()}  # a forward pass may make tables in buffers again
    for name, expected in plan.shapes.items():
        if name not in shapes:
            raise PlanError(f"the plan does not fit this model: it has no tensor {name!r} (expected shape {expected})")
        if shapes[name] != expected and (name in learned or name in plan.tensors):
            raise PlanError(
                f"the plan does not fit this model: tensor {name!r} has shape {shapes[name]}, the plan expects "
                f"{expected}; build the model exactly as it was when it was compressed."
            )
    plan.check_slots()
    modules = dict(model.named_modules())
    for path in [*plan.attributes, *plan.replaced, *plan.programs]:
        if path not in modules:
            raise PlanError(f"the plan does not fit this model: it has no module {path!r}")
    _check_replaced(modules, plan, maps or {})
    for path, values in plan.attributes.items():
        _check_attributes(path, modules[path], values)
    for path, program in plan.programs.items():
        rewritten_class(original_class(type(modules[path])), program, modules[path])
    _check_recurrent(model, plan)


def tensors_with_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model with their names; a tied one is listed once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_replaced(modules: Mapping[str, nn.Module], plan: Plan, maps: Mapping[str, LinearMap]) -> None:
    """Check the stand-ins of removed modules; a projection may not be larger than the module that it replaces."""
    for path, kind in plan.replaced.items():
        if path == "":
            raise PlanError("a plan can't replace the whole model")
        check_stand_in(kind, plan.projections.get(path))
    for path, projected in plan.projections.items():
        if path not in plan.replaced:
            raise PlanError(f"the plan has the sizes of a projection for module {path!r}, which it does not replace")
        most = sum(parameter.numel() for parameter in modules[path].parameters())
        if projected.sizes[0] * projected.sizes[1] > most:
            raise PlanError(
                f"the projection in place of {path!r} maps {projected.sizes[1]} to {projected.sizes[0]} channels "
                f"and so has more than the {most:,} parameters of the module that it replaces"
            )
        if path in maps:
            maps[path].tensors(projected, path)


def _check_attributes(path: str, module: nn.Module, values: Mapping[str, Size]) -> None:
    held = sizes_held(module)
    for name, value in values.items():
        if name not in held:
            raise PlanError(f"the plan does not fit this model: module {path!r} has no attribute {name!r}")
        least = 1 if _is_of_torch(module) else 0
        if not _can_become(held[name], value, least):
            raise PlanError(
                f"the plan does not fit this model: {name!r} of module {path!r} is {held[name]!r} and can't become "
                f"{value!r}; a plan may only make sizes smaller, down to {least}"
            )


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a module derives from a layer of torch, whose kernels may divide by its sizes.

    Other modules may hold their place in the model, which becomes 0 where the ones before them are removed.
    """
    return any(base.__module__.startswith("torch.") and base is not nn.Module for base in type(module).__mro__)


def _can_become(held: Size, value: Size, least: int) -> bool:
    """Whether a plan may change an attribute so: the same count of ints, each unchanged, or smaller down to `least`."""
    before, after = (size if isinstance(size, tuple) else (size,) for size in (held, value))
    if isinstance(held, tuple) != isinstance(value, tuple) or len(before) != len(after):
        return False
    return all(new == old or least <= new <= old for old, new in zip(before, after, strict=True))


def _check_recurrent(model: nn.Module, plan: Plan) -> None:
    """Check that the weights of each recurrent layer fit its sizes, and so each other, after the cut.

    torch's kernels read these weights without checking their shapes.

    Raises:
        PlanError: names the first weight whose shape differs from the one that the layer's sizes give.
    """
    cut = {id(tensor): plan.shape_after(name) for name, tensor in tensors_with_names(model) if name in plan.tensors}
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    for module, paths in names.items():
        if isinstance(module, nn.RNNBase) and not all(map(plan.removes, paths)):
            _check_recurrent_layer(module, paths[0], plan.attributes.get(paths[0], {}), cut)


def _check_recurrent_layer(
    module: nn.RNNBase, path: str, values: Mapping[str, Size], cut: Mapping[int, tuple[int, ...]]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in _weights(module)}
    if not {id(tensor) for _, tensor in tensors_with_names(module)}.isdisjoint(cut):
        shapes = _shapes_after(module, path, cut)
    sizes = {name: getattr(module, name) for name in ("input_size", "hidden_size", "num_layers", "proj_size")}
    sizes |= {name: value for name, value in values.items() if name in sizes}
    if sizes["proj_size"] and sizes["hidden_size"] <= sizes["proj_size"]:
        raise PlanError(
            f"the plan makes the hidden size of the recurrent layer {path!r} {sizes['hidden_size']} and its projection "
            f"{sizes['proj_size']}; torch takes equal ones for a layer without a projection"
        )
    for name, wanted in _recurrent_shapes(module, sizes).items():
        if shapes.get(name, wanted) != wanted:
            raise PlanError(
                f"the plan gives {f'{path}.{name}'.removeprefix('.')!r} the shape {shapes[name]}, but the sizes of its "
                f"recurrent layer require {wanted}; a plan that idap wrote cuts them together"
            )


def _weights(module: nn.RNNBase) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the forward pass of a recurrent layer reads, by name."""
    for name in module._flat_weights_names:
        if isinstance(tensor := getattr(module, name, None), Tensor):
            yield name, tensor


def _shapes_after(module: nn.RNNBase, path: str, cut: Mapping[int, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a recurrent layer's weights after the cut, including weights that it computes from others."""
    memo: dict[int, object] = {**copy_computed(module)}
    for _, tensor in tensors_with_names(module):
        outline = torch.empty(cut.get(id(tensor), tensor.shape), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(outline, False) if isinstance(tensor, nn.Parameter) else outline
    small = copy.deepcopy(module, memo)
    computes = [hook for hook in small._forward_pre_hooks.values() if isinstance(hook, _COMPUTE_WEIGHTS)]
    known = {*module._parameters, *(getattr(module, "parametrizations", None) or ()), *map(_weight_of, computes)}
    if unknown := [name for name, _ in _weights(module) if name not in known]:
        raise PlanError(
            f"the plan cuts the recurrent layer {path!r}, whose {unknown[0]!r} is neither a parameter nor computed by "
            "weight_norm, spectral_norm, pruning or a parametrization of torch. So idap can't know whether it fits the "
            "other weights, and torch does not check it"
        )
    try:
        for hook in computes:
            hook(small, ())
        return {name: tuple(tensor.shape) for name, tensor in _weights(small)}
    except (RuntimeError, ValueError) as error:
        raise PlanError(
            f"after this cut, the weights of the recurrent layer {path!r} can't be computed: {error}"
        ) from error


def _weight_of(hook: Any) -> str:
    """The name of the weight that a hook computes."""
    return str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", ""))


_COMPUTE_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks of torch that compute a weight from others before each forward pass."""


def _recurrent_shapes(module: nn.RNNBase, sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name of each weight of a recurrent layer -> the shape that the layer's sizes require."""
    directions = 2 if module.bidirectional else 1
    written = sizes["proj_size"] or sizes["hidden_size"]
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) * sizes["hidden_size"]
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(sizes["num_layers"]):
        read = sizes["input_size"] if layer == 0 else written * directions
        for suffix in ("", "_reverse")[:directions]:
            end = f"_l{layer}{suffix}"
            found |= {f"weight_ih{end}": (gates, read), f"weight_hh{end}": (gates, written)}
            found |= {f"bias_ih{end}": (gates,), f"bias_hh{end}": (gates,)}
            found[f"weight_hr{end}"] = (written, sizes["hidden_size"])
    return found
