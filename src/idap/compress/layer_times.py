"""The latency table of a run: measured when it is first needed, kept in the run folder, used again on resuming."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from idap.cost.layers import measure_table
from idap.cost.table import LatencyTable, table_from
from idap.errors import RunFolderError, TraceError
from idap.files import write_json
from idap.progress import Progress, Silent
from idap.record import RESULT, RUN, RunFolder, read_object, remedy
from idap.selection.steps import probes, step_of
from idap.structure.analysis import Structure
from idap.training.batch import Inputs, device_name, device_of
from idap.training.processes import by_itself, on_main

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
            self._table = on_main(partial(by_itself, self._measure))
            if self._file is not None:
                on_main(partial(_write, self._file, self.least, self._table))
        return self._table

    @property
    def steps(self) -> Mapping[str, int]:
        """Group name -> the number that widths worth having are a multiple of; groups without steps are left out."""
        if self._steps is None:
            found = {name: step_of(self.table.curve(name)) for name in self.table.groups}
            self._steps = {name: step for name, step in found.items() if step > 1}
            self._progress.say(_told(self._steps, len(found)))
        return self._steps


def recalled(
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


def measured(
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


def _told(steps: Mapping[str, int], groups: int) -> str:
    """One line for people on where the steps lie.

    >>> _told({"a": 16, "b": 8, "c": 16}, 5)
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
