"""Copies of models and inputs, so that what a forward pass leaves behind never reaches the user's own."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from idap.errors import TraceError


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the module tree and share its parameters: what a forward pass leaves behind never reaches the model."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
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
