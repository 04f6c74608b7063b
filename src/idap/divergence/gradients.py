"""Criteria of the first and second order: how much the loss would move if a gate on a unit closed."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from idap.divergence.gates import GatedInput
from idap.divergence.scene import Scene, Scorer


def taylor(scene: Scene) -> Scorer:
    """E|dL/dz_u| over the calibration samples; z_u is a gate on all slots of a unit, wherever they are read."""
    return GateScores(scene, "first")


def fisher(scene: Scene) -> Scorer:
    """E(dL/dz_u)² over the calibration samples, the diagonal of the empirical Fisher matrix of the gates."""
    return GateScores(scene, "second")


class GateScores:
    """Scores made of the gradients of gates."""

    def __init__(self, scene: Scene, order: Literal["first", "second"]) -> None:
        self._scene, self._order = scene, order
        for group in scene.groups:
            if group.name not in scene.gates.wanted:
                self._ask(group.name)

    def _ask(self, name: str) -> None:
        scene = self._scene
        group = scene.structure.group(name)
        for port in scene.alive(group.readers):
            place = scene.place(port)
            if place.node.call is not None and place.input_at is not None:
                units = scene.units_in(place.read, group)
                wanted = GatedInput(place.node.call, place.input_at, place.contraction.input_dim, units, group.size)
                scene.watch.at(*scene.gates.ask(name, wanted))

    def units(self) -> Mapping[str, Tensor]:
        """Groups whose units the loss depends on."""
        means = {name: self._scene.gates.mean(name, self._order) for name in self._scene.gates.wanted}
        return {name: mean for name, mean in means.items() if mean is not None}

    def blocks(self) -> None:
        """Nothing: it knows no blocks."""
