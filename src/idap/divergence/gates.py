"""Gradients of the loss with respect to a gate on each unit: what Taylor and Fisher scores are made of.

A gate z_u = 1 multiplies all slots of unit u wherever they are read, so dL/dz_u is the sum of activation times
gradient over those slots and all positions, and over all readers: coupled layers are counted together. The gradient
is that of one reader's own copy: what else the tensor does, such as going on in a residual stream, is no reading.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from idap.divergence.observe import Arguments, Before, Pass, tensors_in
from idap.errors import TaskError
from idap.graph.ir import CallKey, leaves


@dataclass
class Gates:
    """Per-sample gradients of gates, summed up as they go by.

    Attributes:
        wanted: group name -> the places where its units are read.
        sums: group name + ":first" (sum over samples of |dL/dz|) or ":second" (of its square), shape (size,), and
            "samples".
    """

    wanted: dict[str, list["GatedInput"]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    _seen: list[tuple[str, "GatedInput", Tensor]] = field(default_factory=list)

    def ask(self, group: str, place: "GatedInput") -> tuple[CallKey, Before]:
        """Want a gate at one more place; returns what to look at."""
        self.wanted.setdefault(group, []).append(place)

        def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            x = tensors_in(args, kwargs)[place.argument]
            if not x.requires_grad:
                return None
            with torch.enable_grad():
                own = x.clone()  # no view, since the model may go on to write into x
            self._seen.append((group, place, own))
            replaced: Arguments = tree_map(lambda leaf: own if leaf is x else leaf, (args, kwargs))
            return replaced

        return place.call, look

    def end(self, each: Pass, outputs: Any) -> None:
        """A pass is over: go back from its loss.

        Raises:
            TaskError: the batch has no loss, or one that is not a finite number.
        """
        if each.loss is None:
            raise TaskError("this criterion needs the gradient of the loss, and the calibration data have no loss.")
        with torch.enable_grad():
            loss = each.loss(outputs)
        if loss.numel() != 1 or not bool(torch.isfinite(loss)):
            raise TaskError(f"the loss on a calibration batch is {loss.tolist()!r}; one finite number was expected.")
        seen, self._seen = self._seen, []
        if not seen or not loss.requires_grad:
            raise TaskError("the loss on a calibration batch has no gradient; run the model without torch.no_grad().")
        gradients = torch.autograd.grad(loss, [x for _, _, x in seen], allow_unused=True)
        samples = _samples(outputs, seen[0][2])
        totals: dict[str, Tensor] = {}
        with torch.no_grad():
            for (group, place, x), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    found = _by_sample(place.derivative(x, gradient), samples)
                    totals[group] = totals[group] + found if group in totals else found
            for group, derivative in totals.items():
                self._add(f"{group}:first", derivative.abs().sum(0))
                self._add(f"{group}:second", derivative.square().sum(0))
            self._add("samples", torch.tensor(float(samples), dtype=torch.float64))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value if name not in self.sums else self.sums[name] + value

    def mean(self, group: str, order: str) -> Tensor | None:
        """Mean over the samples of |dL/dz| ("first") or its square ("second"), shape (size,); None if never seen."""
        found = self.sums.get(f"{group}:{order}")
        return None if found is None else found / self.sums["samples"]


@dataclass(frozen=True)
class GatedInput:
    """A place where units are read.

    Attributes:
        call: the call that reads them.
        argument: which of its tensors holds them.
        dim: the dimension of their slots.
        units: unit of each slot, -1 for none.
        size: number of units.
    """

    call: CallKey
    argument: int
    dim: int
    units: Tensor
    size: int

    def derivative(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Sum over slots and positions of value times gradient, shape (samples, size)."""
        product = (x.detach() * gradient).movedim(self.dim, -1)
        by_slot = product.reshape(len(product), -1, product.shape[-1]).sum(1, dtype=torch.float64).cpu()
        mine = self.units >= 0
        return by_slot.new_zeros(len(by_slot), self.size).index_add_(1, self.units[mine], by_slot[:, mine])


def _samples(outputs: Any, read: Tensor) -> int:
    """Number of samples of a batch: by the first tensor of the outputs, or else by one that the model reads."""
    return next((len(x) for x in leaves(outputs) if isinstance(x, Tensor) and x.dim()), len(read))


def _by_sample(derivative: Tensor, samples: int) -> Tensor:
    """Derivative of each sample's own loss, shape (samples, size); the loss is the mean over the samples.

    Rows are those of a sample, or several of each, such as windows. What does not depend on the sample, such as a
    table made from parameters, is the same for all.
    """
    if len(derivative) % samples:
        return derivative.sum(0, keepdim=True).expand(samples, -1)
    return derivative.reshape(samples, -1, derivative.shape[1]).sum(1) * samples


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through all parameters; put back which of them were frozen."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
