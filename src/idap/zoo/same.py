"""Whether two models are the same: outputs, tied tensors, and switches that example inputs may not show."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
IN_USE = frozenset({"training", "gradient_checkpointing", "name_or_path"})
"""Attributes that say how a module is used, not what it is."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of an output, as a share of its largest number."""
    return 1e-4 if torch.finfo(dtype).bits >= 32 else 2e-2


def output_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The largest difference between outputs of two models, as a share of the largest number of that output."""
    mine, theirs = _outputs(model, inputs), _outputs(other, inputs)
    if [tensor.shape for tensor in mine] != [tensor.shape for tensor in theirs]:
        return float("inf")
    errors = [0.0]
    for one, two in zip(mine, theirs, strict=True):
        differs = ~torch.isclose(one, two, rtol=0, atol=0, equal_nan=True)  # infinities of masks
        if bool(differs.any()):
            finite = two[two.isfinite()].abs()
            scale = finite.max().clamp_min(1e-12) if finite.numel() else torch.ones(())
            errors.append(float(((one - two).abs()[differs] / scale).nan_to_num(nan=float("inf")).max()))
    return max(errors)


def shaken_difference(model: nn.Module, other: nn.Module, name: Callable[[str], str], inputs: Inputs) -> float:
    """The same with large random weights in both: in a hardly trained model, attention is nearly the same for all.

    Args:
        model: keeps the random weights.
        other: is not changed; a copy is.
        name: the name in `model` of a tensor of `other`.
        inputs: for both.
    """
    dice, copied, mine = torch.Generator().manual_seed(0), copy.deepcopy(other), model.state_dict()
    with torch.no_grad():
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=dice).to(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * 2 / (parameter.numel() / parameter.shape[0]) ** 0.5)
            else:
                parameter.add_(noise / 10)
        for theirs, tensor in copied.state_dict().items():
            mine[name(theirs)].copy_(tensor)
    return output_difference(model, copied, inputs)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), inputs)
    model.eval()
    try:
        with torch.no_grad():
            returned = model(*args, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode
    return [leaf.double() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def ties(tensors: Mapping[str, Tensor]) -> set[frozenset[str]]:
    """Names that share one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {frozenset(shared) for shared in names.values() if len(shared) > 1}


def switch_apart(one: nn.Module, other: nn.Module) -> str:
    """The first switch in which two modules differ, such as local or global attention; sizes are not looked at."""
    mine, theirs = vars(one), vars(other)
    for name in mine.keys() & theirs.keys() - IN_USE:
        pair = mine[name], theirs[name]
        if name.startswith("_") or not all(value is None or type(value) in (bool, str, int) for value in pair):
            continue
        if type(pair[0]) is not type(pair[1]) or (type(pair[0]) is not int and pair[0] != pair[1]):
            return f"{name} ({pair[1]}, here {pair[0]})"
    return ""
