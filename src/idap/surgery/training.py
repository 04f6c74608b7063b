"""What a cut does to code that only training runs: it is not in the graph, so it is tried."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from idap.graph.copies import own_inputs, skeleton


def training_failure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Run a model forward in training mode.

    Args:
        model: is left as it is, buffers and torch's random state too.
        args: positional example inputs.
        kwargs: keyword example inputs.

    Returns:
        The error that it raised; "" if it runs.

    Example:
        >>> training_failure(nn.Linear(3, 2), (torch.zeros(1, 3),), {})
        ''
    """
    copied = skeleton(model).train()
    given, named = own_inputs(args, kwargs)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            copied(*given, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
