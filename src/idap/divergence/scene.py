"""What a criterion may look at: one model, what it still has, and where its units lie."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from idap.divergence.gates import Gates
from idap.divergence.observe import tensor_argument
from idap.divergence.ports import Wiring
from idap.divergence.watch import Argument, Watch
from idap.graph.ir import CallKey, Node
from idap.graph.labels import Dim
from idap.graph.rules import Contraction
from idap.graph.run import tensors_of
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.structure.groups import Group, Port
from idap.structure.layout import Presence, slots

Made = TypeVar("Made")


class Scorer(Protocol):
    """Scores of one criterion, once the calibration data have gone by."""

    def units(self) -> Mapping[str, Tensor]:
        """Group name -> score of each unit in the original's indices, shape (size,); a low one may go first."""

    def blocks(self) -> Mapping[str, float] | None:
        """Branch or block -> score; None where the criterion knows nothing of them."""


@dataclass(frozen=True)
class Scene:
    """One model as criteria see it.

    Attributes:
        model: the original, or what a plan made of it.
        structure: of the original, with projections in their places.
        keep: group name -> units that the model still has; groups that are not named are whole.
        removed: branches and blocks that the model no longer has.
        present: labels that the model still has.
        wiring: who reads whose value in it.
        watch: what is looked at while the model runs.
        gates: gradients of gates on units, for criteria that ask for them.
        seed: of criteria that draw.
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

        How much the flow would change there, a fit alone can say (`idap.rebalance.projections`).
        """
        gone = {name for other in self.removed for name in (other, *self.structure.block(other).contains)}
        left = [b for b in self.structure.blocks if b.name not in gone and b.exit not in self.wiring.gone]
        return [block for block in left if block.projected is None]

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What several criteria need is made for the first of them and shared by the others."""
        if name not in self._made:
            self._made[name] = make()
        found: Made = self._made[name]
        return found

    def alive(self, ports: Iterable[Port]) -> list[Port]:
        """The places that the model still has."""
        return [port for port in ports if port.node not in self.wiring.gone]

    def place(self, port: Port) -> "Place":
        """Everything about a place where units are written or read."""
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
        scene: where it is.
        port: which it is.
        contraction: what it does.
        node: the operator.
    """

    scene: Scene
    port: Port
    contraction: Contraction
    node: Node

    @property
    def read(self) -> Dim:
        """The dimension of the input that is summed over."""
        layout = self.scene.structure.layout
        return layout.dims[self.contraction.input][0][self.contraction.input_dim]

    @property
    def written(self) -> Dim:
        """The dimension of the output that the weights write."""
        return self.scene.structure.layout.dims[self.port.node][0][self.contraction.output_dim]

    @property
    def weight_dim(self) -> Dim:
        """The dimension of the weight that writes."""
        return self.scene.structure.layout.dims[self.contraction.weight][0][self.contraction.write_dim]

    @property
    def input_at(self) -> int | None:
        """Which of the tensors given to the call is the input."""
        return tensor_argument(self.scene.structure.graph, self.port.node, self.contraction.input)

    @property
    def reads(self) -> tuple[CallKey | None, int | None]:
        """The call that reads the input, and as which of its tensors."""
        return self.node.call, self.input_at

    @property
    def weight_at(self) -> int | None:
        """Which of the tensors given to the call is the weight; None if it is not a call of its own."""
        return tensor_argument(self.scene.structure.graph, self.port.node, self.contraction.weight)

    def weight(self) -> Argument | None:
        """The weight as the call is given it, which may be computed from parameters."""
        place = self.weight_at
        if place is None or self.node.call is None:
            return None
        return self.scene.watch.argument(self.node.call, place)


Opener = Callable[[Scene], "Scorer | Mapping[str, Tensor]"]
"""A criterion: says on a scene what it wants to watch, and gives what scores in the end; or, where the weights are
enough, gives the scores at once."""
