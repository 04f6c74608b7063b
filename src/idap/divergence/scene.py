"""What a criterion works with: one model, the parts it still has, the places of its units, and gradients of gates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from idap.divergence.observe import Arguments, Before, Pass, tensor_argument, tensors_in
from idap.divergence.ports import Wiring
from idap.divergence.watch import Argument, Watch
from idap.errors import TaskError
from idap.graph.ir import CallKey, Node, leaves
from idap.graph.labels import Dim
from idap.graph.rules import Contraction
from idap.graph.run import tensors_of
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.structure.groups import Group, Port
from idap.structure.layout import Presence, slots


@dataclass
class Gates:
    """Per-sample gradients of gates, summed up during the run.

    Attributes:
        wanted: group name -> the places where its units are read.
        sums: group name + ":first" (sum over samples of |dL/dz|) or ":second" (of its square), shape (size,), and
            "samples".
    """

    wanted: dict[str, list["GatedInput"]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    _seen: list[tuple[str, "GatedInput", Tensor]] = field(default_factory=list)

    def ask(self, group: str, place: "GatedInput") -> tuple[CallKey, Before]:
        """Add a gate at one more place; returns the call to watch and the function that watches it."""
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
        """Add the gradients of the loss at the end of a pass.

        Raises:
            TaskError: the batch has no loss, or a loss that is not a finite number or has no gradient.
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
        """Mean over the samples of |dL/dz| ("first") or its square ("second"), shape (size,); None without data."""
        found = self.sums.get(f"{group}:{order}")
        return None if found is None else found / self.sums["samples"]


@dataclass(frozen=True)
class GatedInput:
    """A place where units are read.

    Attributes:
        call: the call that reads them.
        argument: position of the tensor that holds them among the tensors given to the call.
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
    """Number of samples of a batch: that of the first tensor of the outputs, or else of a tensor that is read."""
    return next((len(x) for x in leaves(outputs) if isinstance(x, Tensor) and x.dim()), len(read))


def _by_sample(derivative: Tensor, samples: int) -> Tensor:
    """Derivative of each sample's own loss, shape (samples, size); the loss is the mean over the samples.

    Each sample has one row, or several, such as windows. A tensor that does not depend on the sample, such as a table
    made from parameters, counts in full for every sample.
    """
    if len(derivative) % samples:
        return derivative.sum(0, keepdim=True).expand(samples, -1)
    return derivative.reshape(samples, -1, derivative.shape[1]).sum(1) * samples


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through all parameters; afterwards, those that were frozen are frozen again."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


Made = TypeVar("Made")


class Scorer(Protocol):
    """Scores of one criterion, available after the pass over the calibration data."""

    def units(self) -> Mapping[str, Tensor]:
        """Group name -> score of each unit in the original's indices, shape (size,); low scores are removed first."""

    def blocks(self) -> Mapping[str, float] | None:
        """Branch or block -> score; None if the criterion does not score them."""


@dataclass(frozen=True)
class Scene:
    """One model as criteria see it.

    Attributes:
        model: the original, or the model that a plan made of it.
        structure: the structure of the original, with projections in their places.
        keep: group name -> units that the model still has; groups that are not named are whole.
        removed: branches and blocks that the model no longer has.
        present: labels that the model still has.
        wiring: the nodes that read each value in the model.
        watch: the tensors that are watched while the model runs.
        gates: gradients of gates on units, for criteria that need them.
        seed: the seed of random criteria.
    """

    model: nn.Module
    structure: Structure
    keep: Mapping[str, Sequence[int]]
    removed: tuple[str, ...]
    present: Presence
    wiring: Wiring
    watch: Watch
    seed: int = 0
    gates: Gates = field(default_factory=Gates)
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        """The groups that the model still has."""
        return [g for g in self.structure.groups if self.alive([*g.readers, *g.writers])]

    @property
    def blocks(self) -> list[Block]:
        """The branches and blocks that the model still has; not those that could only become projections.

        Only a fit can tell how much the flow would change at a projection (`idap.rebalance.projections`).
        """
        gone = {name for other in self.removed for name in (other, *self.structure.block(other).contains)}
        left = [b for b in self.structure.blocks if b.name not in gone and b.exit not in self.wiring.gone]
        return [block for block in left if block.projected is None]

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """Make an object for the first criterion that needs it, and share it with the others."""
        if name not in self._made:
            self._made[name] = make()
        found: Made = self._made[name]
        return found

    def alive(self, ports: Iterable[Port]) -> list[Port]:
        """The ports that the model still has."""
        return [port for port in ports if port.node not in self.wiring.gone]

    def place(self, port: Port) -> "Place":
        """The place where a port writes or reads units."""
        contraction = self.structure.layout.contractions[port.contraction]
        return Place(self, port, contraction, self.structure.graph.nodes[port.node])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return tensors_of(self.model)

    def units_in(self, dim: Dim, group: Group) -> Tensor:
        """The unit of a group that each slot of a dimension belongs to, -1 for none; only slots that are present."""
        return torch.from_numpy(self.structure.layout.units(dim, group.index)[slots(dim, self.present)])


@dataclass(frozen=True)
class Place:
    """A contraction that writes or reads units.

    Attributes:
        scene: the scene that it belongs to.
        port: its port.
        contraction: the contraction.
        node: the operator of the contraction.
    """

    scene: Scene
    port: Port
    contraction: Contraction
    node: Node

    @property
    def input_dim(self) -> Dim:
        """The dimension of the input that is summed over."""
        layout = self.scene.structure.layout
        return layout.dims[self.contraction.input][0][self.contraction.input_dim]

    @property
    def output_dim(self) -> Dim:
        """The dimension of the output that the weights write."""
        return self.scene.structure.layout.dims[self.port.node][0][self.contraction.output_dim]

    @property
    def weight_dim(self) -> Dim:
        """The dimension of the weight that writes."""
        return self.scene.structure.layout.dims[self.contraction.weight][0][self.contraction.write_dim]

    @property
    def input_at(self) -> int | None:
        """Position of the input among the tensors given to the call; None if it can't be determined."""
        return tensor_argument(self.scene.structure.graph, self.port.node, self.contraction.input)

    @property
    def reads(self) -> tuple[CallKey | None, int | None]:
        """The call that reads the input, and the input's position among the call's tensors."""
        return self.node.call, self.input_at

    @property
    def weight_at(self) -> int | None:
        """Position of the weight among the tensors given to the call; None if the node has no call of its own."""
        return tensor_argument(self.scene.structure.graph, self.port.node, self.contraction.weight)

    def weight(self) -> Argument | None:
        """The weight as the call receives it; it may be computed from parameters."""
        place = self.weight_at
        if place is None or self.node.call is None:
            return None
        return self.scene.watch.argument(self.node.call, place)


Opener = Callable[[Scene], "Scorer | Mapping[str, Tensor]"]
"""A criterion: a function that watches tensors of a scene and returns an object that gives the scores after the run.
If the weights alone suffice, it may return the scores at once."""
