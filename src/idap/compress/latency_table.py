"""Measure seconds on this machine: of whole models, of blocks, and of layers as a table kept in the run folder."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from idap.cost.latency import LatencyTable, measure_latency, positive_seconds, table_from
from idap.cost.layer_latency import measure_table
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
"""Timed passes of a model with and without a block."""
SECONDS, ROUNDS = 0.6, 3
"""Two models are compared for at least so many seconds, in at least so many rounds."""
LONGEST, MOST_ROUNDS, SURE = 4.0, 20, 0.01
"""More rounds follow, up to so many seconds and rounds, until the median is known to within this share of it."""
FEWEST, MOST = 5, 100
"""Fewest and most timed passes of each model in a round."""
DOUBTS = 4
"""How often a latency that seems out of reach is measured, at most."""

Keep = Mapping[str, Sequence[int]]


def latency_share(original: nn.Module, model: nn.Module, example: Inputs, *, seconds: float = SECONDS) -> float:
    """The latency of a model as a share of the original's; the two are timed in turn.

    Args:
        original: the original model.
        model: the compressed model.
        example: inputs for one pass.
        seconds: about how long they are timed; slow models take longer, as each runs `FEWEST` times in a round.

    Returns:
        The median of the shares of all rounds; the share of a round is the ratio of two medians.
    """
    args, kwargs = example
    both, shares, repeats, spent = {"original": original, "model": model}, list[float](), FEWEST, 0.0
    while len(shares) < ROUNDS or (
        len(shares) < MOST_ROUNDS and spent < max(seconds, LONGEST) and _error(shares) > SURE
    ):
        times = on_main(partial(measure_latency, both, args, kwargs, repeats=repeats, warmup=2))
        shares.append(times["model"].median / times["original"].median)
        pair = times["model"].median + times["original"].median
        spent += repeats * pair  # not read from a clock, which differs between processes
        repeats = int(min(MOST, max(FEWEST, seconds / (ROUNDS * pair))))
    return statistics.median(shares)


def _error(shares: Sequence[float]) -> float:
    """The standard error of the median of some measurements, from their quartiles, as a share of the median.

    >>> _error([0.5, 0.5, 0.5, 0.5, 0.9, 0.5, 0.5])
    0.0
    """
    low, middle, high = statistics.quantiles(shares)
    return 1.25 * (high - low) / (1.35 * math.sqrt(len(shares)) * middle)


def least_share(original: nn.Module, smallest: nn.Module, example: Inputs, wanted: float) -> float:
    """The latency of the smallest model as a share of the original's, measured again while it is above the target.

    A single measurement may be too high because the machine did something else meanwhile. A target is out of reach only
    if every measurement is above it.

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
    """Nodes that are not computed as in the original any more after some branches and blocks were removed."""
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
    """Seconds that each of some branches and blocks takes: what a pass without it saves, both timed in turn.

    Args:
        original: is not changed; its copies are cut and timed.
        structure: of the original.
        example: inputs for one pass.
        keep: group name -> units that it has.
        removed: branches and blocks that are removed already.
        names: the branches and blocks to time.
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
    """The seconds that the layers of a run's original take on this machine, and the steps of the hardware in them.

    Args:
        measure: measures the table; it is called at most once.
        file: where the table is written; None: it is not written.
        least: latency of the smallest model as a share of the original's, written beside the table; None if latency is
            not a goal.
        known: the table, if it was measured before.
        progress: receives a line about the steps.
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
        """Write the least share to its file, unless the file exists. To be called as soon as the run has begun.

        Raises:
            RunFolderError: it can't be written.
        """
        if self._file is not None and self.least is not None:
            on_main(partial(_write_first, self._file, self.least))

    @property
    def table(self) -> LatencyTable:
        """The table; it is measured now unless it was before.

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
        """Group name -> the step of its latency, of which widths should be a multiple; only groups with steps."""
        if self._steps is None:
            found = {name: step_of(self.table.curve(name)) for name in self.table.groups}
            self._steps = {name: step for name, step in found.items() if step > 1}
            self._progress.say(_describe_steps(self._steps, len(found)))
        return self._steps


def load_times(
    folder: RunFolder | None, model: nn.Module, fingerprint: str, progress: Progress, *, resume: bool
) -> tuple[float | None, LatencyTable | None]:
    """The least share of the latency and the table of a run that goes on; None and None if they don't apply here.

    Args:
        folder: of the run.
        model: on the device of this run; a table of another device or number of threads is measured again.
        fingerprint: of the original; what another model's run has measured is not read.
        progress: receives a line if the table is to be measured again.
        resume: whether the run goes on.

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
        progress: receives the progress.
        few: inputs that the model was traced with, used if it can't be traced with `timed`; None: there are none.
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
        f"The latency has steps {told} of {groups} groups." if told else f"The latency has no steps in {groups} groups."
    )


def _read_own(
    folder: RunFolder, fingerprint: str, here: tuple[str, int]
) -> tuple[float | None, LatencyTable | None, str]:
    """What the folder holds for this model and machine, and a line about what can't be used."""
    begun = read_object(folder.path / RUN) if (folder.path / RUN).exists() else {"fingerprint": fingerprint}
    if begun.get("fingerprint") != fingerprint:
        return None, None, ""  # another model's, which is reported when the folder is opened
    least, table = _read(folder.latency)
    finished = (folder.path / RESULT).exists()  # nothing will be measured any more
    if table is None or finished or (table.device, table.threads) == here:
        return least, table, ""
    note = (
        f"The layers are timed anew: {folder.latency.name} was measured on {table.device} with {table.threads} "
        f"threads, and this machine is {here[0]} with {here[1]}."
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
