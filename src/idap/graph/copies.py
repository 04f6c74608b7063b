"""Copies of models and inputs, so that what a forward pass leaves behind never reaches the user's own."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from idap.errors import TraceError


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the module tree and share its parameters: what a forward pass leaves behind never reaches the model."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} | computed(model)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); idap works on a copy, so that your model stays as it "
            "is. Remove what cannot be copied (locks, open files, lambdas bound to C objects) from its attributes."
        ) from error
    for module in copied.modules():
        forget_cached(module)
    return copied


def computed(model: nn.Module) -> dict[int, Tensor]:
    """The tensors that modules computed with a gradient and keep, as old-style weight norm does: id -> a copy without.

    `copy.deepcopy` refuses them; the next forward pass computes them anew.
    """
    held = (item for module in model.modules() for item in vars(module).values())
    return {id(item): item.detach().clone() for item in held if isinstance(item, Tensor) and not item.is_leaf}


def uninitialised(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that a lazy layer has yet to make."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if is_lazy(tensor)), None)


def forget_cached(module: nn.Module) -> None:
    """Empty the dictionaries called caches in which a module keeps tensors that it computed in earlier calls."""
    for name, held in vars(module).items():
        if type(held) is not dict or not held or "cache" not in name:
            continue
        if all(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in held.values()):
            held.clear()


def own_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of example inputs, so that a model which changes its inputs in place does not change the caller's."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    return copied
