"""Read batch norms as affine maps, and estimate their statistics on new data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from idap.divergence.observe import Pass
from idap.graph.ir import Graph
from idap.graph.rules.flow import arguments
from idap.training.evaluate import keep_modes

SMALLEST_SCALE = 1e-6
"""If a norm scales a channel by less, the layer before it has no effect on this channel and is not corrected there."""


@dataclass(frozen=True)
class Affine:
    """The map y -> scale (y - mean) + shift of a batch norm in eval mode; empty tensors stand for the identity.

    Attributes:
        scale: shape (channels,).
        mean: the running mean, shape (channels,).
        shift: shape (channels,).
    """

    scale: Tensor
    mean: Tensor
    shift: Tensor

    def apply(self, y: Tensor, dim: int) -> Tensor:
        """Apply the map to a tensor with its channels in `dim`."""
        if not self.scale.numel():
            return y
        shape = [-1 if place == dim % y.dim() else 1 for place in range(y.dim())]
        offset = self.shift - self.scale * self.mean
        return y * self.scale.reshape(shape) + offset.reshape(shape)

    def invert(self, rows: Tensor) -> Tensor:
        """Find the rows that the map takes to these rows, both of shape (rows, channels).

        A channel with a scale below `SMALLEST_SCALE` gets its mean.
        """
        if not self.scale.numel():
            return rows
        small = self.scale.abs() < SMALLEST_SCALE
        scale = torch.where(small, torch.ones_like(self.scale), self.scale)
        return torch.where(small, self.mean, (rows - self.shift) / scale + self.mean)


def affine_of(graph: Graph, norm: str, tensors: Mapping[str, Tensor]) -> Affine:
    """The map of a batch norm with its current tensors.

    Args:
        graph: graph of the original.
        norm: name of the batch norm's node; "" gives the identity.
        tensors: tensors of the running model, by canonical name.
    """
    if not norm:
        empty = torch.empty(0)
        return Affine(empty, empty, empty)
    given = arguments(graph.nodes[norm])

    def tensor_of(name: str) -> Tensor | None:
        value = given[name]
        return None if value is None else tensors[graph.nodes[value.name].target].detach()

    mean, variance, weight, bias = (tensor_of(name) for name in ("running_mean", "running_var", "weight", "bias"))
    assert mean is not None and variance is not None
    scale = (variance + float(given["eps"])).rsqrt()
    scale = scale if weight is None else scale * weight
    return Affine(scale, mean.clone(), torch.zeros_like(scale) if bias is None else bias)


def running_mean(graph: Graph, norm: str) -> str:
    """Canonical name of the running mean of a batch norm's node."""
    return graph.nodes[arguments(graph.nodes[norm])["running_mean"].name].target


@torch.no_grad()
def reestimate_norms_(model: nn.Module, passes: Sequence[Pass]) -> None:
    """Re-estimate the running statistics of all batch norms, as the mean over these batches, in place."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    held = [buffer.clone() for buffer in buffers]
    with keep_modes(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True  # not train(), which would also switch modules inside a subclass, such as dropout
            if norms:
                for each in passes:
                    each.run(model)
        except BaseException:
            for buffer, value in zip(buffers, held, strict=True):
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
