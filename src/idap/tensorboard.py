"""Log a run for TensorBoard: costs, metric, decisions, the divergence over depth, the losses of recovery."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from idap.errors import ConfigError, RunFolderError
from idap.progress import Phase, Progress, Silent, Status, measurement

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """A `Progress` that logs every report for TensorBoard, and passes it on.

        with TensorBoard("logs/resnet20") as board:
            result = idap.compress(model, task, config, progress=board)

    The horizontal axis counts decisions. For values that are measured at every step of a phase, such as the loss of
    recovery, it counts the steps of all phases of the same title. The divergence is a histogram over depth with a
    bucket for each group, as high as the mean divergence of its units; the bucket is empty if that is not above 0.

    If the log can't be written any further, for example on a full disk, a line says so, and the run goes on without it.

    Args:
        folder: a new or empty folder; it is made when there is something to log.
        progress: receives every report as well.

    Raises:
        ConfigError: the package tensorboard is missing.
        RunFolderError: the folder is not empty.
    """

    def __init__(self, folder: str | Path, progress: Progress | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional extra, slow to import
        except ImportError as error:
            raise ConfigError(
                f"a log for TensorBoard needs the package tensorboard, which can't be imported: {error}. "
                "Run: pip install 'idap[tensorboard]'"
            ) from error
        self._folder, self._progress = Path(folder), progress or Silent()
        if self._folder.exists() and not (self._folder.is_dir() and not any(self._folder.iterdir())):
            raise RunFolderError(
                f"{self._folder} exists and is not an empty folder; TensorBoard would mix two logs. Choose another one."
            )
        self._open = SummaryWriter
        self._made: SummaryWriter | None = None
        self._broken = False
        self._counts: Counter[str] = Counter()
        self._last: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what has not been written yet, and close the file."""
        if self._made is not None:
            self._log(lambda writer: writer.close())

    def _log(self, write: "Callable[[SummaryWriter], None]") -> None:
        """Write to the log, unless an earlier write failed."""
        if self._broken:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._broken = True
            self._progress.say(
                f"The log for TensorBoard in {self._folder} is not written any further: {error}. The run goes on."
            )

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator["_Steps"]:
        """Open a phase; the notes of its steps are logged if they are measurements."""
        with self._progress.phase(title, total) as phase:
            yield _Steps(self, title.rpartition(": ")[2], phase)

    def say(self, line: str) -> None:
        """Log a line as text."""
        # Four spaces make it code: names of modules would otherwise be read as markup.
        place = self._next("decisions")
        self._log(lambda writer: writer.add_text("decisions", f"    {line}", place))
        self._log(lambda writer: writer.flush())
        self._progress.say(line)

    def show(self, status: Status) -> None:
        """Log what is new in a status."""
        last, self._last = self._last, status
        if last is None or last.step != status.step:
            self._log_decision(last, status)
        if status.profile and (last is None or last.profile != status.profile):
            self._profile(status)
        self._log(lambda writer: writer.flush())
        self._progress.show(status)

    def log_value(self, title: str, name: str, value: float) -> None:
        """Log a value that was measured at one step of a phase."""
        tag = f"{name}/{title.replace(' ', '_')}"
        self._log(partial(_scalar, tag, value, self._next(tag)))

    @property
    def _writer(self) -> "SummaryWriter":
        if self._made is None:
            self._made = self._open(str(self._folder))
        return self._made

    def _next(self, tag: str) -> int:
        self._counts[tag] += 1
        return self._counts[tag] - 1

    def _log_decision(self, last: Status | None, status: Status) -> None:
        values = {f"cost/{name}": now for name, (now, _) in status.costs.items()}
        values[f"metric/{status.metric_name}"] = status.metric
        values["accepted/count"] = status.accepted
        for tag, value in values.items():
            self._log(partial(_scalar, tag, value, status.step))
        if last is not None and status.step == last.step + 1:
            self._log(partial(_scalar, "accepted/decision", status.accepted - last.accepted, last.step))

    def _profile(self, status: Status) -> None:
        profile = [value if value > 0 else 0.0 for value in status.profile]
        self._log(
            lambda writer: writer.add_histogram_raw(
                "divergence/over depth",
                min=0,
                max=len(profile),
                num=len(profile),
                sum=sum(profile),
                sum_squares=sum(value * value for value in profile),
                bucket_limits=[index + 1 for index in range(len(profile))],
                bucket_counts=profile,
                global_step=status.step,
            )
        )


def _scalar(tag: str, value: float, step: int, writer: "SummaryWriter") -> None:
    writer.add_scalar(tag, value, step)


class _Steps:
    def __init__(self, board: TensorBoard, title: str, phase: Phase) -> None:
        self._board, self._title, self._phase = board, title, phase

    def advance(self, note: str = "") -> None:
        """Log the measurement of a step, if its note is one."""
        found = measurement(note)
        if found is not None:
            self._board.log_value(self._title, *found)
        self._phase.advance(note)
