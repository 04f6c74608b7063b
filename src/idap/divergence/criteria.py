"""All criteria by name, and the simple ones: those of the weights, those of gradients, and a random one."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from idap.divergence.innovation import innovation
from idap.divergence.paper import activation, by_unit, paper, share
from idap.divergence.relative import fluctuation, relative, squared_norms
from idap.divergence.scene import GatedInput, Opener, Place, Scene, Scorer
from idap.errors import ConfigError
from idap.graph.ir import Ref
from idap.graph.rules.flow import arguments, base_name
from idap.structure.groups import Group
from idap.structure.layout import count

NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")

DISTANCES = 2**25
"""Number of distances between units that are computed at once."""


def magnitude(scene: Scene) -> Mapping[str, Tensor]:
    """L2 norm of all weights that write or read a unit."""
    return _by_group(scene, lambda group: _total(scene, group, torch.square).sqrt())


def magnitude_l1(scene: Scene) -> Mapping[str, Tensor]:
    """L1 norm of all weights that write or read a unit."""
    return _by_group(scene, lambda group: _total(scene, group, torch.abs))


def bn_scale(scene: Scene) -> Mapping[str, Tensor]:
    """Mean |scale| of the norms that a unit passes; groups without a norm get no scores."""
    scales: dict[str, str] = {}
    for node in scene.structure.graph.nodes.values():
        if base_name(node.op) in NORMS and node.name not in scene.wiring.gone:
            weight = arguments(node).get("weight")
            if isinstance(weight, Ref) and scene.structure.graph.nodes[weight.name].op == "parameter":
                scales.setdefault(scene.structure.graph.nodes[weight.name].target, node.name)
    found = {}
    for group in scene.groups:
        parts, counts = [], []
        for name in (name for name, _ in group.members if name in scales):
            units = scene.units_in(scene.structure.layout.tensors[name][0], group)
            values = scene.tensors[name].detach().double().cpu().abs().ravel()
            parts.append(by_unit(values, units, group.size))
            counts.append(by_unit(torch.ones_like(values), units, group.size))
        if parts:
            found[group.name] = torch.stack(parts).sum(0) / torch.stack(counts).sum(0).clamp_min(1)
    return found


def fpgm(scene: Scene) -> Mapping[str, Tensor]:
    """Sum of a unit's distances to the other units of its group, in the weights that write it (geometric median)."""

    def distances(group: Group) -> Tensor:
        total = torch.zeros(group.size, dtype=torch.float64)
        for place in _places(scene, group, readers=False):
            units = scene.units_in(place.weight_dim, group)
            rows = _weight(place).movedim(place.contraction.write_dim, 0).flatten(1)
            mine = torch.nonzero(units >= 0).ravel()
            mine = mine[units[mine].argsort(stable=True)]
            counts = torch.bincount(units[mine])
            present = torch.nonzero(counts).ravel()
            if len(present) and bool((counts[present] == counts[present[0]]).all()):
                vectors = rows[mine].reshape(len(present), -1)
                few = max(1, DISTANCES // len(vectors))  # in parts, as they grow with the square of the units
                total[present] += torch.cat([torch.cdist(part, vectors).sum(1) for part in torch.split(vectors, few)])
        return total

    return _by_group(scene, distances)


def random(scene: Scene) -> Mapping[str, Tensor]:
    """Random scores, drawn with the seed of the scene."""
    draw = np.random.default_rng(scene.seed)
    return {group.name: torch.from_numpy(draw.random(group.size)) for group in scene.groups}


def _by_group(scene: Scene, score: Callable[[Group], Tensor]) -> dict[str, Tensor]:
    return {group.name: score(group) for group in scene.groups}


def _total(scene: Scene, group: Group, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of a function of every weight that writes or reads each unit, shape (size,)."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for place in _places(scene, group, readers=False):
        values = of(_weight(place).movedim(place.contraction.write_dim, 0).flatten(1)).sum(1)
        total += by_unit(values, scene.units_in(place.weight_dim, group), group.size)
    for place in _places(scene, group, readers=True):
        roots = of(_weight(place)).sqrt()
        values = squared_norms(roots, place.contraction, count(place.input_dim, scene.present))
        total += by_unit(values, scene.units_in(place.input_dim, group), group.size)
    return total


def _places(scene: Scene, group: Group, *, readers: bool) -> list[Place]:
    ports = scene.alive(group.readers if readers else group.writers)
    return [scene.place(port) for port in ports if port.weight]


def _weight(place: Place) -> Tensor:
    return place.scene.tensors[place.port.weight].detach().double().cpu()


def taylor(scene: Scene) -> Scorer:
    """E|dL/dz_u| over the calibration samples; z_u is a gate on all slots of a unit, wherever they are read."""
    return GateScores(scene, "first")


def fisher(scene: Scene) -> Scorer:
    """E(dL/dz_u)² over the calibration samples, the diagonal of the empirical Fisher matrix of the gates."""
    return GateScores(scene, "second")


class GateScores:
    """Scores computed from the gradients of gates."""

    def __init__(self, scene: Scene, order: Literal["first", "second"]) -> None:
        self._scene, self._order = scene, order
        for group in scene.groups:
            if group.name not in scene.gates.wanted:
                self._add_gates(group.name)

    def _add_gates(self, name: str) -> None:
        scene = self._scene
        group = scene.structure.group(name)
        for port in scene.alive(group.readers):
            place = scene.place(port)
            if place.node.call is not None and place.input_at is not None:
                units = scene.units_in(place.input_dim, group)
                wanted = GatedInput(place.node.call, place.input_at, place.contraction.input_dim, units, group.size)
                scene.watch.at(*scene.gates.ask(name, wanted))

    def units(self) -> Mapping[str, Tensor]:
        """Scores of the groups whose units the loss depends on."""
        means = {name: self._scene.gates.mean(name, self._order) for name in self._scene.gates.wanted}
        return {name: mean for name, mean in means.items() if mean is not None}

    def blocks(self) -> None:
        """None: the criterion scores no blocks."""


Criterion = str | Opener
"""The name of a criterion, or a function of a `Scene`."""

CRITERIA: Mapping[str, Callable[..., Scorer | Mapping[str, object]]] = {
    "relative": relative,
    "fluctuation": fluctuation,
    "innovation": innovation,
    "paper": paper,
    "share": share,
    "activation": activation,
    "taylor": taylor,
    "fisher": fisher,
    "magnitude": magnitude,
    "magnitude_l1": magnitude_l1,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "random": random,
}
"""Name -> the criterion; a new one also gets a line in `idap.recipes.catalogue.CRITERIA`, for help and completion."""

WITH_BLOCKS = ("relative", "fluctuation", "paper", "share")
"""Criteria that also score branches and blocks."""

LIKE_PROJECTIONS = ("relative", "fluctuation")
"""Criteria of `WITH_BLOCKS` whose scores can be compared with the error of a projection: both are relative errors."""

OF_THE_LOSS = ("taylor", "fisher")
"""Criteria that need labels, as they use the gradient of the loss."""


def opener_of(criterion: Criterion) -> tuple[str, Opener]:
    """The name of a criterion and the function behind it.

    Raises:
        ConfigError: no criterion has this name, or the criterion is not a function.
    """
    if callable(criterion):
        return getattr(criterion, "__name__", type(criterion).__name__), criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ConfigError(
            f"there is no criterion {criterion!r}; there are {', '.join(CRITERIA)}. You can also pass a function of "
            "your own that takes a scene (idap.divergence.scene.Scene)."
        )
    return criterion, CRITERIA[criterion]  # type: ignore[return-value]
