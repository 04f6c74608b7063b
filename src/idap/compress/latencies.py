"""Seconds on this machine: of whole models, of blocks, and of layers as a table that is kept in the run folder."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from idap.cost.latency import LatencyTable, measure_latency, positive_seconds, table_from
from idap.cost.layers import measure_table
from idap.errors import RunFolderError, TraceError
from idap.files import write_json
from idap.progress import Progress, Silent
from idap.record import RESULT, RUN, RunFolder, read_object, remedy
from idap.selection.rounding import probes, step_of
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.training.batch import Inputs, device_name, device_of
from idap.training.processes import call_locally, on_main

REPEATS = 15
"""Timed passes where a block is taken out."""
SECONDS, ROUNDS = 0.6, 3
"""How long two models are compared at least, and in how many rounds."""
LONGEST, MOST_ROUNDS, SURE = 4.0, 20, 0.01
"""More rounds follow, up to so many seconds and rounds, until their middle is known to this share of it."""
FEWEST, MOST = 5, 100
"""Timed passes of each model in a round."""
DOUBTS = 4
"""How often a latency that seems out of reach is measured."""

Keep = Mapping[str, Sequence[int]]


def latency_share(original: nn.Module, model: nn.Module, example: Inputs, *, seconds: float = SECONDS) -> float:
    """The latency of a model as a share of the original's; both take turns.

    Args:
        original: the whole.
        model: its successor.
        example: inputs for one pass.
        seconds: about how long is measured at least; slow models take longer, as each passes `FEWEST` times a round.

    Returns:
        The middle one of the shares of all rounds, each the ratio of two medians.
    """
    args, kwargs = example
    both, shares, repeats, spent = {"original": original, "model": model}, list[float](), FEWEST, 0.0
    while len(shares) < ROUNDS or (
        len(shares) < MOST_ROUNDS and spent < max(seconds, LONGEST) and _error(shares) > SURE
    ):
        times = on_main(partial(measure_latency, both, args, kwargs, repeats=repeats, warmup=2))
        shares.append(times["model"].median / times["original"].median)
        pair = times["model"].median + times["original"].median
        spent += repeats * pair  # not by the clock, which says something else to each process
        repeats = int(min(MOST, max(FEWEST, seconds / (ROUNDS * pair))))
    return statistics.median(shares)


def _error(shares: Sequence[float]) -> float:
    """How far the middle of some measurements may be off, as a share of it: its standard error, by the quartiles.

    >>> _error([0.5, 0.5, 0.5, 0.5, 0.9, 0.5, 0.5])
    0.0
    """
    low, middle, high = statistics.quantiles(shares)
    return 1.25 * (high - low) / (1.35 * math.sqrt(len(shares)) * middle)


def least_share(original: nn.Module, smallest: nn.Module, example: Inputs, wanted: float) -> float:
    """The share of the latency that the smallest model has, in doubt for the one who wants it.

    A single measurement that is too high, because the machine did something else meanwhile, is not believed: what is
    wanted is out of reach only if it is so every time.

    Returns:
        The lowest of a few measurements, or the first that is low enough.
    """
    found = math.inf
    for _ in range(DOUBTS):
        found = min(found, latency_share(original, smallest, example))
        if found <= wanted:
            break
    return found


def inactive_nodes(structure: Structure, removed: Sequence[str]) -> set[str]:
    """Nodes that are no longer computed as they were in the original once some branches and blocks are removed."""
    replaced = {block.exit for block in map(structure.block, removed) if block.projected is not None}
    return structure.dead_nodes(removed) | set(structure.skips(removed)) | replaced


def block_latencies(
    original: nn.Module,
    structure: Structure,
    example: Inputs,
    keep: Keep,
    removed: Sequence[str],
    names: Sequence[str],
    *,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """Seconds that each of some branches and blocks takes: what a pass without it saves, both measured in turn.

    Args:
        original: is not changed; its copies are cut and timed.
        structure: of the original.
        example: inputs for one pass.
        keep: group name -> units that it has.
        removed: branches and blocks that are gone.
        names: those asked for.
        repeats: timed passes of each variant.

    Returns:
        Name -> seconds above 0; a thousandth of the mean where no difference can be measured.
    """
    args, kwargs = example
    before = apply_plan(original, structure.plan(keep, tuple(removed)))
    found = {}
    for name in names:
        after = apply_plan(original, structure.plan(keep, (*removed, name)))
        times = on_main(partial(measure_latency, {"before": before, "after": after}, args, kwargs, repeats=repeats))
        found[name] = times["before"].median - times["after"].median
    return positive_seconds(found)


Measure = Callable[[], LatencyTable]


class LayerTimes:
    """What the layers of a run's original take here, and where the steps of the hardware lie.

    Args:
        measure: the table, once.
        file: where it is kept; None keeps it nowhere.
        least: share of the original's latency that the smallest model has, kept beside it; None where it is no goal.
        known: the table, if it was measured before.
        progress: hears which steps there are.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        file: Path | None = None,
        least: float | None = None,
        known: LatencyTable | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._measure, self._file, self._table = measure, file, known
        self._progress = progress or Silent()
        self.least = least
        self._steps: dict[str, int] | None = None

    def keep_least(self) -> None:
        """Write down the least share as soon as the run has begun, unless its file is there already.

        Raises:
            RunFolderError: it can't be written.
        """
        if self._file is not None and self.least is not None:
            on_main(partial(_write_first, self._file, self.least))

    @property
    def table(self) -> LatencyTable:
        """Measured now if it was not before.

        Raises:
            RunFolderError: the table can't be written.
        """
        if self._table is None:
            self._table = on_main(partial(call_locally, self._measure))
            if self._file is not None:
                on_main(partial(_write, self._file, self.least, self._table))
        return self._table

    @property
    def steps(self) -> Mapping[str, int]:
        """Group name -> the number that widths worth having are a multiple of; groups without steps are left out."""
        if self._steps is None:
            found = {name: step_of(self.table.curve(name)) for name in self.table.groups}
            self._steps = {name: step for name, step in found.items() if step > 1}
            self._progress.say(_describe_steps(self._steps, len(found)))
        return self._steps


def load_times(
    folder: RunFolder | None, model: nn.Module, fingerprint: str, progress: Progress, *, resume: bool
) -> tuple[float | None, LatencyTable | None]:
    """The least share of the latency and the table of a run that goes on; None and None where it has none for us.

    Args:
        folder: of the run.
        model: on the device that counts now; a table of another one, or of other threads, is measured again.
        fingerprint: of the original; what another model's run has measured is not read.
        progress: hears of what is measured again.
        resume: the run goes on.

    Raises:
        RunFolderError: the file is broken.
    """
    if folder is None or not resume:
        return None, None
    here = device_name(device_of(model)), torch.get_num_threads()  # of the first process, which measures for all
    least, table, note = on_main(partial(_read_own, folder, fingerprint, here))
    if note:
        progress.say(note)
    return least, table


def measure_times(
    model: nn.Module, structure: Structure, timed: Inputs, progress: Progress, *, few: Inputs | None = None
) -> LatencyTable:
    """Measure the table of a model.

    Args:
        model: the original.
        structure: of it.
        timed: inputs whose latency counts.
        progress: hears of it.
        few: inputs that the model was traced with, which count where it can't be traced with the others.
    """
    try:
        table = measure_table(model, structure, timed, probes, progress=progress)
    except TraceError as error:
        if few is None:
            raise
        progress.say(f"The layers are timed with the samples of the structure analysis: {error}")
        table = measure_table(model, structure, few, probes, progress=progress)
    if table.unmeasured:
        progress.say(f"Operators that were not timed one by one: {', '.join(table.unmeasured)}.")
    return table


def _describe_steps(steps: Mapping[str, int], groups: int) -> str:
    """One line for people on where the steps lie.

    >>> _describe_steps({"a": 16, "b": 8, "c": 16}, 5)
    'The latency has steps of 8 units in 1, of 16 units in 2 of 5 groups.'
    """
    counts = Counter(steps.values())
    told = ", ".join(f"of {step} units in {counts[step]}" for step in sorted(counts))
    return (
        f"The latency has steps {told} of {groups} groups." if told else f"No steps of the latency in {groups} groups."
    )


def _read_own(
    folder: RunFolder, fingerprint: str, here: tuple[str, int]
) -> tuple[float | None, LatencyTable | None, str]:
    """What the folder holds that is good for this model and machine, and what to say of the rest."""
    begun = read_object(folder.path / RUN) if (folder.path / RUN).exists() else {"fingerprint": fingerprint}
    if begun.get("fingerprint") != fingerprint:
        return None, None, ""  # another model's, which is said when the folder is opened
    least, table = _read(folder.latency)
    finished = (folder.path / RESULT).exists()  # nothing is measured any longer
    if table is None or finished or (table.device, table.threads) == here:
        return least, table, ""
    note = (
        f"The layers are timed anew: {folder.latency.name} was measured on {table.device} with {table.threads} "
        f"threads, this is {here[0]} with {here[1]}."
    )
    return None, None, note


def _read(file: Path) -> tuple[float | None, LatencyTable | None]:
    if not file.exists():
        return None, None
    data = read_object(file)
    try:
        least = data["least"]
        if least is not None and (type(least) not in (int, float) or not 0 < least < float("inf")):
            raise ValueError(f"the least share of the latency is {least!r:.60}")
        return least, None if data["table"] is None else table_from(data["table"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"the latency table {file} can't be read: {error}. {remedy(file)}") from error


def _write_first(file: Path, least: float) -> None:
    if not file.exists():
        _write(file, least, None)


def _write(file: Path, least: float | None, table: LatencyTable | None) -> None:
    try:
        write_json(file, {"least": least, "table": None if table is None else table.to_json()})
    except OSError as error:
        raise RunFolderError(f"cannot write the latency table {file}: {error}") from error
