"""What Torch-Pruning does with the same models: its high-level pruner, 50 % of everything but the last layers."""

from typing import Any

import torch
from torch import Tensor, nn

from idap.structure.analysis import Structure
from tests.conformance.proofs import tensors_of

RATIO = 0.5


def result_of_peer(model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Prune a model with Torch-Pruning, as its own documentation does, and say what came of it.

    Args:
        model: is changed.
        structure: tells which layers write what the model returns; Torch-Pruning must be told to leave them alone.
        args: positional inputs.
        kwargs: keyword inputs.

    Returns:
        ``runs, N % of the parameters removed``, or how it failed.
    """
    import torch_pruning

    before = sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    last = [
        modules[blocked.tensor.rpartition(".")[0]]
        for blocked in structure.blocked
        if blocked.reason.startswith("the model returns it")
    ]
    try:
        torch_pruning.pruner.BasePruner(
            model,
            kwargs if kwargs else args if len(args) > 1 else args[0],
            importance=torch_pruning.importance.MagnitudeImportance(),
            pruning_ratio=RATIO,
            ignored_layers=last,
            output_transform=_total,
        ).step()
    except Exception as error:
        return f"fails while pruning: {type(error).__name__}"
    removed = 1 - sum(parameter.numel() for parameter in model.parameters()) / before
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        return f"returns a model that fails: {type(error).__name__}"
    return f"runs, {removed:.0%} removed"


def _total(output: Any) -> Tensor:
    return torch.stack([leaf.float().sum() for leaf in tensors_of(output) if leaf.is_floating_point()]).sum()
