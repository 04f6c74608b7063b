"""One architecture that must work: how to build it small, and what to feed it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword example inputs."""


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: ``library:model``, such as ``timm:resnet18``.
        build: makes the model with random weights.
        inputs: makes example inputs, batch size 2 unless the model says otherwise.
        contracts: the outputs that must keep their shape, such as ``logits``; None means all.
        notes: what a reader of the coverage table should know.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    contracts: tuple[str, ...] | None = None
    notes: str = ""

    def made(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The model, perturbed so that nothing is trivially zero, in eval mode, and its inputs."""
        torch.manual_seed(0)
        model = perturbed(self.build()).eval()
        torch.manual_seed(1)
        args, kwargs = self.inputs()
        return settled(model, args, kwargs), args, kwargs


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """Give constant parameters (norms, layer scales, zero initialisations) and norm statistics random values.

    A freshly built network is full of ones and zeros; a cut that mixed up their slots would go unnoticed.
    """
    for parameter in model.parameters():
        if parameter.numel() > 0 and parameter.is_floating_point():
            first = parameter.flatten()[0]
            if bool((parameter == first).all()):
                low, high = (0.5, 1.5) if first > 0.01 else (-0.2, 0.2)
                parameter.copy_(torch.empty_like(parameter).uniform_(low, high))
    return model


@torch.no_grad()
def settled(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """Set the statistics of every batch norm near those of its input, times random factors.

    With any other statistics the signal of a deep random network vanishes or explodes, and a wrong cut in its first
    layers would go unnoticed.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, dim=[dim for dim in range(x.ndim) if dim != 1], correction=0)
        variance = variance.clamp_min(1e-8)
        norm.running_mean.copy_(mean + variance.sqrt() * torch.empty_like(mean).uniform_(-0.2, 0.2))
        norm.running_var.copy_(variance * torch.empty_like(mean).uniform_(0.5, 1.5))

    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        if norms:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def image(size: int, channels: int = 3, batch: int = 2) -> Tensor:
    """Random images, shape (batch, channels, size, size)."""
    return torch.randn(batch, channels, size, size)
