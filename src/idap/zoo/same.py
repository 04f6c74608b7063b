"""Whether two models are the same: outputs, tied tensors, and switches that example inputs may not show."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from idap.surgery.compare import Inputs, largest_difference, outputs_of

IN_USE = frozenset({"training", "gradient_checkpointing", "name_or_path"})
"""Attributes that say how a module is used, not what it is."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of an output, as a share of its largest number."""
    return 1e-4 if torch.finfo(dtype).bits >= 32 else 2e-2


def output_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The largest difference between outputs of two models, as a share of the largest number of that output."""
    error, _ = largest_difference(other, lambda args, kwargs: outputs_of(model, args, kwargs), inputs)
    return error


def same_code(model: nn.Module, other: nn.Module, name: Callable[[str], str], inputs: Inputs) -> bool:
    """Whether two models compute the same with large random weights.

    In a hardly trained model attention is nearly even, and outputs don't show how it is split into heads.

    Args:
        model: keeps random weights, unless it is of half precision: then a copy in float32 is compared.
        other: is not changed; a copy is.
        name: the name in `model` of a tensor of `other`.
        inputs: for both.
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
    # Tables of half precision, such as those of rotary embeddings, are a little off in float32 too.
    return output_difference(mine, theirs, inputs) <= (0.1 if half else 0.01)


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
