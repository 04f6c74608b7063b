"""Measure the divergence of every unit, branch and block of a model in one pass over calibration data."""

import itertools
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from idap.divergence.criteria import Criterion, opener_of
from idap.divergence.observe import MEMORY, Job, Pass, observe, sum_over_processes
from idap.divergence.ports import Wiring
from idap.divergence.scene import Opener, Scene, Scorer, trainable
from idap.divergence.watch import Watch
from idap.errors import ConfigError, StructureError, TaskError
from idap.memory import Room, pack
from idap.progress import Phase, Progress, Silent
from idap.structure.analysis import Structure
from idap.training.batch import device_of
from idap.training.processes import from_main


@dataclass(frozen=True, repr=False)
class Divergence:
    """Scores of one model; a low score says that removing the part would change the flow little.

    Attributes:
        criterion: name of the criterion.
        units: group name -> score of each unit in the original's indices, float64 of shape (group.size,). Units that
            the model no longer has are NaN.
        blocks: name of a branch or block -> score; empty if the criterion scores none.
        unmeasured: groups and blocks of the model that could not be measured: they run inside one opaque call, or no
            weight reads their units.
        notes: what the scores leave out if a group is too large to be measured as a whole, one sentence each.
    """

    criterion: str
    units: Mapping[str, Tensor]
    blocks: Mapping[str, float]
    unmeasured: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        units = sum(int(scores.isfinite().sum()) for scores in self.units.values())
        return f"Divergence({self.criterion!r}, groups={len(self.units)}, units={units}, blocks={len(self.blocks)})"

    def _repr_html_(self) -> str:
        """The table that a notebook shows: mean and range of each group, and the score of each branch and block."""
        from idap.report.numbers import small  # noqa: PLC0415 - needed in notebooks only
        from idap.report.page import table_display  # noqa: PLC0415 - needed in notebooks only

        known = {name: scores[scores.isfinite()] for name, scores in self.units.items()}
        spreads = {
            name: (float(scores.mean()), float(scores.min()), float(scores.max()))
            for name, scores in known.items()
            if len(scores)
        }
        rows = [(name, small(mean), f"{small(low)} – {small(high)}") for name, (mean, low, high) in spreads.items()]
        rows += [(name, small(score), "whole") for name, score in self.blocks.items()]
        means, wholes = [mean for mean, _, _ in spreads.values()], list(self.blocks.values())
        bars = [*_lengths(means), *_lengths(wholes)]  # units and whole parts are scored on different scales
        unseen = (f"Not measured: {', '.join(self.unmeasured)}.",) if self.unmeasured else ()
        note = " ".join((*unseen, *self.notes))
        heads = ("part", "mean divergence", "range")
        return table_display(repr(self), heads, rows, note=note, bars=bars)

    def inside(self, structure: Structure, block: str) -> float:
        """Sum of the divergences of all units that lie entirely within a branch or block.

        With the paper's forms this is D5: the divergence of a transformer block is the sum over its heads and its
        neurons. Units of the width of heads are not added: they are slices of the same heads, which would count twice.
        """
        total = 0.0
        for group in structure.groups_inside(block):
            if group.kind != "head width" and group.name in self.units:
                total += float(self.units[group.name].nansum())
        return total


def _lengths(values: Sequence[float]) -> list[float]:
    """Values as shares of the largest one; negative values give 0, and so do all values if none is positive."""
    longest = max(values, default=0.0)
    return [max(0.0, value / longest) if longest > 0 else 0.0 for value in values]


def measure(
    model: nn.Module,
    structure: Structure,
    passes: Iterable[Pass],
    *,
    criterion: Criterion = "relative",
    keep: Mapping[str, Sequence[int]] | None = None,
    removed: Sequence[str] = (),
    seed: int = 0,
) -> Divergence:
    """Measure everything that may still be removed, with one criterion; `measure_all` describes the arguments."""
    (found,) = measure_all(
        model, structure, passes, criteria=[criterion], keep=keep, removed=removed, seed=seed
    ).values()
    return found


def measure_all(  # noqa: PLR0913 - one argument for each thing that a caller may bring
    model: nn.Module,
    structure: Structure,
    passes: Iterable[Pass],
    *,
    criteria: Sequence[Criterion],
    keep: Mapping[str, Sequence[int]] | None = None,
    removed: Sequence[str] = (),
    seed: int = 0,
    memory: int = MEMORY,
    progress: Progress | None = None,
    title: str = "measure",
) -> dict[str, Divergence]:
    """Measure everything that may still be removed, with several criteria at once.

    Statistics are sums: their memory depends neither on the number of batches nor on the size of images. In a
    distributed run (`torch.distributed` initialised) each process measures its own batches; all get the same scores.

    Args:
        model: the original, or the model that the plan of `keep` and `removed` made of it; it is not changed.
        structure: the structure of the original.
        passes: the calibration batches.
        criteria: names (`idap.divergence.criteria.CRITERIA`) or functions of a `Scene`.
        keep: group name -> units that the model still has; groups that are not named are whole.
        removed: branches and blocks that the model no longer has.
        seed: the seed of random criteria.
        memory: bytes that second moments may take at once ("innovation"), within what `idap.memory` allows; groups that
            do not fit are measured in further passes over the data, for which `passes` is kept.
        progress: advances with each batch, and with each group whose second moments are solved.
        title: title of the progress bar.

    Returns:
        The scores, by the name of the criterion.

    Raises:
        ConfigError: a criterion is unknown, or a criterion of the user returned scores that fit no group.
        TaskError: there is no calibration batch, or one has no loss and a criterion needs it.
        StructureError: the model does not run on this data as it was traced, or its activations are not finite.
        InsufficientMemoryError: a group needs more memory than is allowed; raised before any batch runs.
    """
    openers: dict[str, Opener] = {}
    for name, opener in map(opener_of, criteria):
        if openers.setdefault(name, opener) is not opener:
            raise ConfigError(f"two criteria are called {name!r}; give your own functions different names.")
    keep, structure = keep or {}, structure.after(removed)
    wiring = Wiring(structure, removed)
    watch = Watch(wiring)
    scene = Scene(model, structure, keep, tuple(removed), structure.presence(keep), wiring, watch, seed=seed)
    scorers = {name: _as_scorer(name, opener(scene)) for name, opener in openers.items()}
    rounds = _rounds(jobs := [job for scorer in scorers.values() for job in getattr(scorer, "jobs", ())], memory, model)
    if len(rounds) > 1:
        passes = list(passes)
    steps = len(passes) * len(rounds) + len(jobs) if isinstance(passes, Sized) else None
    with (progress or Silent()).phase(title, steps) as phase:
        _run_shared_pass(scene, passes, rounds[0], phase)
        for further in rounds[1:]:
            probes = [probe for job in further for probe in job.probes]
            observe(model, probes, passes, begin=watch.begin, end=lambda *_: phase.advance())
            _finish(further, phase)
    return {name: _divergence(scene, name, scorer) for name, scorer in scorers.items()}


def _rounds(jobs: Sequence[Job], memory: int, model: nn.Module) -> list[list[Job]]:
    """Divide the jobs among passes over the data, in the same way in all processes.

    Raises:
        InsufficientMemoryError: one job alone does not fit.
    """
    now = Room.now(device_of(model))
    room = Room(now.device, int(from_main(now.there)), int(from_main(now.on_cpu)))
    for job in jobs:
        room.check(
            job.need,
            what=f"the elimination of the units of group {job.name!r}",
            way_out='Measure with another criterion, such as criterion="relative", which keeps no second moments.',
        )
    return pack(jobs, memory, room)


def _run_shared_pass(scene: Scene, passes: Iterable[Pass], jobs: Sequence[Job], phase: Phase) -> None:
    """Make the pass over the data that all criteria share."""
    watch, gradients = scene.watch, bool(scene.gates.wanted)
    passes = iter(passes)
    first = next(passes, None)
    if first is None:
        raise TaskError("there is no calibration batch; the divergence needs at least one.")

    def end(each: Pass, outputs: Any) -> None:
        if gradients:
            scene.gates.end(each, outputs)
        phase.advance()

    with ExitStack() as stack:
        if gradients:
            stack.enter_context(trainable(scene.model))
        probes = [*watch.probes(), *(probe for job in jobs for probe in job.probes)]
        everything = itertools.chain([first], passes)
        observe(scene.model, probes, everything, begin=watch.begin, end=end, gradients=gradients)
    sum_over_processes([*watch.held, scene.gates.sums])
    _finish(jobs, phase)


def _finish(jobs: Sequence[Job], phase: Phase) -> None:
    for job in jobs:
        job.settle()
    for job in jobs:
        sum_over_processes(job.sums)
        job.finish()
        phase.advance()


class _FixedScores:
    """Scores that a criterion returned at once, without watching the running model."""

    def __init__(self, units: Mapping[str, Tensor]) -> None:
        self._units = units

    def units(self) -> Mapping[str, Tensor]:
        return self._units

    def blocks(self) -> None:
        return None


def _as_scorer(name: str, found: "Scorer | Mapping[str, Tensor]") -> Scorer:
    if isinstance(found, Mapping):
        return _FixedScores(found)
    if not all(callable(getattr(found, method, None)) for method in ("units", "blocks")):
        raise ConfigError(
            f"criterion {name!r} returned {found!r:.60}; expected a dict from group to the scores of its units, or an "
            "object with units() and blocks() (idap.divergence.scene.Scorer)."
        )
    return found


def _divergence(scene: Scene, name: str, scorer: Scorer) -> Divergence:
    given, blocks = scorer.units(), scorer.blocks()
    groups = {group.name: group for group in scene.groups}
    strangers = sorted(set(given) - set(groups))
    if strangers:
        raise ConfigError(f"criterion {name!r} gave scores for {strangers[0]!r}, which is not a group of this model.")
    units = {}
    for group in scene.groups:
        if group.name not in given:
            continue
        scores = torch.as_tensor(given[group.name]).detach().double().cpu()
        if scores.shape != (group.size,):
            raise ConfigError(
                f"criterion {name!r} gave scores of shape {tuple(scores.shape)} for group {group.name!r}, which has "
                f"{group.size} units."
            )
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[list(scene.keep.get(group.name, range(group.size)))] = False
        if not bool(scores[~gone].isfinite().all()):
            unit = int(torch.nonzero(~gone & ~scores.isfinite())[0])
            raise StructureError(
                f"the divergence ({name}) of unit {unit} of group {group.name!r} is {float(scores[unit])}; look for "
                "NaN or infinite values in the calibration data and in the model's activations."
            )
        units[group.name] = scores.masked_fill(gone, float("nan"))
    unmeasured = [group for group in groups if group not in units]
    if blocks is not None:
        unmeasured += [block.name for block in scene.blocks if block.name not in blocks]
    return Divergence(name, units, dict(blocks or {}), tuple(unmeasured), tuple(getattr(scorer, "notes", ())))
