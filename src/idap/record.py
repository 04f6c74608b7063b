"""Write and read the run folder: one JSON line per decision, files whole or not at all, one process at a time.

run/
├── original.safetensors    weights of the original, where the recipe trained it first
├── run.json                settings, environment, baseline; written before any work
├── steps.jsonl             one line per decision, in order
├── divergence-before.json  of the original, part by part
├── divergence-after.json   of the result
├── latency.json           if needed: the least latency that can be reached, and the times of layers at several widths
├── result.json             what was reached; a run that has it is finished
├── measured.json           original and result side by side, where `idap compress` measured them
├── checkpoints/            the accepted states
├── model/                  the result: model.safetensors, plan.json
└── .idap-lock              locked by the process that works on the run, which .idap-holder.json names
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from idap.errors import RunFolderError
from idap.files import (
    difference,
    is_leftover,
    json_text,
    load_json,
    nearest,
    number_paths,
    parse_json,
    read_text,
    remove_unfinished,
    write_bytes,
    write_json,
)
from idap.ownership import HOLDER, LOCK, Claim, InUseError
from idap.steps import Step, seal_line

RUN, STEPS, CHECKPOINTS, MODEL = "run.json", "steps.jsonl", "checkpoints", "model"
BEFORE, AFTER = "divergence-before.json", "divergence-after.json"
RESULT, MEASURED = "result.json", "measured.json"
LATENCY, ORIGINAL = "latency.json", "original.safetensors"

_REMEDIES: Mapping[str, str] = {
    STEPS: "Delete the line and all after it to have those decisions taken again, or begin again in another folder.",
    **dict.fromkeys((BEFORE, AFTER), "Delete the file; the report then lacks this measurement."),
    **dict.fromkeys((RESULT, MEASURED, LATENCY), "Delete it to have it measured again (idap resume)."),
}


def remedy(file: Path) -> str:
    """What to do about a file of a run folder that is broken."""
    return _REMEDIES.get(file.name, "Begin the run again in another folder.")


class RunFolder:
    """A folder that holds one run.

    Args:
        path: of the folder; it need not exist yet.

    A process claims the folder before it writes there. The claim is a lock of the operating system, so it ends with the
    process, whatever ends it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._claim = Claim(self.path)

    @classmethod
    def claim_free(cls, first: Path) -> Self:
        """Make and claim the first of NAME, NAME-2, NAME-3, ... that does not exist.

        Two processes that call this at the same time get two folders.

        Args:
            first: the path of NAME.

        Raises:
            RunFolderError: no folder can be made there.
        """
        return next(folder for folder in map(cls, number_paths(first)) if folder._claim_new())

    def _claim_new(self) -> bool:
        try:
            return self._claim.acquire(new=True)
        except (FileExistsError, InUseError):
            if os.path.lexists(self.path):
                return False
            raise RunFolderError(f"{self.path.parent} is not a folder, so no run can be kept in it.") from None
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def claim(self) -> bool:
        """Claim the folder for this object until `release`; it is made if it does not exist.

        Returns:
            Whether this call claimed it; False if this object already holds it.

        Raises:
            RunFolderError: another process or object works on the run; or nothing can be written.
        """
        try:
            return self._claim.acquire()
        except InUseError as error:
            raise RunFolderError(
                f"{self.path} is in use by {error}: only one process may work on a run. Wait until it has ended, or "
                "choose another folder."
            ) from error
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def release(self) -> None:
        """Give up the claim, if there is one; a folder that was made for it and is empty is removed."""
        self._claim.release()

    def check(self, *, size: int = 0) -> None:
        """Check that a run may be written here, without writing anything.

        The folder may already hold the weights of an original that was trained for the run, and what a process left
        that was killed before the run began.

        Args:
            size: bytes for which there must be room.

        Raises:
            RunFolderError: the folder holds another run or other files, or is not a folder; it can't be written, or the
                disk is full.
        """
        try:
            begun = (self.path / RUN).exists()
            broken = next(
                (each for each in (self.path, *self.path.parents) if each.is_symlink() and not each.exists()), None
            )
        except OSError as error:
            raise RunFolderError(f"{self.path} can't be the folder of a run: {error}. Choose another one.") from error
        if broken is not None:
            raise RunFolderError(
                f"{broken} is a link to {broken.readlink()}, which does not exist; make that folder, or choose another "
                "one for the run."
            )
        if begun:
            raise RunFolderError(f"{self.path} already holds a run ({RUN}); choose another folder, or delete this one.")
        if self.path.is_dir():
            others = [each for each in self.path.iterdir() if not _before_a_run(each)]
        if self.path.exists() and (not self.path.is_dir() or others):
            raise RunFolderError(f"{self.path} exists and is not an empty folder; choose another one for the run.")
        near = nearest(self.path)
        if not near.is_dir():
            raise RunFolderError(f"{near} is a file, so no run can be kept in {self.path}; choose another folder.")
        if not os.access(near, os.W_OK | os.X_OK):
            raise RunFolderError(
                f"{near} can't be written, so no run can be kept in {self.path}; choose another folder."
            )
        self.check_room(size)

    def check_room(self, size: int) -> None:
        """Check that the disk has room for so many bytes.

        Raises:
            RunFolderError: the disk is full.
        """
        near = nearest(self.path)
        free = shutil.disk_usage(near).free
        if free < size:
            raise RunFolderError(
                f"the disk of {near} has room for {_bytes(free)}, and the run needs about {_bytes(size)}; "
                "make room, or choose a folder on another disk."
            )

    def reopen(self, settings: Mapping[str, Any]) -> None:
        """Go on with a run that was stopped at any moment, or begin it if its settings were not written yet.

        What a killed process left half-written is removed: unfinished files, and an incomplete last line.

        Args:
            settings: of the run as it is now; all but its environment, recipe, time and calibration data must equal
                those that it was begun with.

        Raises:
            RunFolderError: the folder holds something else, or another run; or can't be written.
        """
        try:
            self._clear()
            if not (self.path / RUN).exists():
                self.open(settings)
                return
        except OSError as error:
            raise RunFolderError(f"cannot go on with the run in {self.path}: {error}") from error
        begun = read_object(self.path / RUN)
        now = json.loads(json_text(settings))
        for name in sorted({*begun, *now} - {"environment", "recipe", "preparation", "calibration"}):
            if begun.get(name) != now.get(name):
                what = difference({name: begun.get(name)}, {name: now.get(name)})
                raise RunFolderError(
                    f"{self.path} holds a different run: {what}. Go on with the settings, model and data "
                    "that it was begun with, or choose another folder."
                )

    def _clear(self) -> None:
        """Remove what a killed process left half-written."""
        if not self.path.is_dir():
            return
        for file in [*self.path.glob(".*"), *self.path.glob("*/.*"), *self.path.glob("*/*/.*")]:
            if is_leftover(file.name):
                remove_unfinished(file)
        if not (self.path / RUN).exists():
            if (self.path / CHECKPOINTS).is_dir() and not any((self.path / CHECKPOINTS).iterdir()):
                (self.path / CHECKPOINTS).rmdir()
            return
        steps = self.path / STEPS
        if steps.is_file():  # anything else is reported when it is read
            data = steps.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                write_bytes(steps, whole)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Create the folder and write the settings.

        Raises:
            RunFolderError: the folder holds another run or other files, or can't be written.
        """
        try:
            self.check()
            self._clear()
            (self.path / CHECKPOINTS).mkdir(parents=True)
            write_json(self.path / RUN, settings)
        except OSError as error:
            raise RunFolderError(f"cannot write the run folder {self.path}: {error}") from error

    def add(self, step: Step) -> None:
        """Append one decision; it is on the disk when this returns.

        Raises:
            RunFolderError: the folder can't be written, or the file is a link.
        """
        try:
            if (self.path / STEPS).is_symlink():  # its target may lie anywhere
                raise OSError("it is a link")
            with (self.path / STEPS).open("a", encoding="utf-8") as steps:
                steps.write(json_text(seal_line(json.loads(json_text(asdict(step))))) + "\n")
                steps.flush()
                os.fsync(steps.fileno())
        except OSError as error:
            raise RunFolderError(f"cannot write decision {step.index} to {self.path / STEPS}: {error}") from error

    def keep(self, name: str, data: Mapping[str, Any]) -> None:
        """Write one of the files beside the decisions; it replaces one of the same name.

        Raises:
            RunFolderError: the folder can't be written.
        """
        try:
            write_json(self.path / name, data)
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / name}: {error}") from error

    def checkpoint(self, index: int) -> Path:
        """Where the state accepted at step `index` is kept."""
        return self.path / CHECKPOINTS / f"step-{index:03d}"

    @property
    def original(self) -> Path:
        """Where the weights of an original that was trained first are kept."""
        return self.path / ORIGINAL

    @property
    def latency(self) -> Path:
        """Where the latency table is kept."""
        return self.path / LATENCY

    @property
    def model(self) -> Path:
        """Where the result is kept."""
        return self.path / MODEL


def read_json(file: Path) -> Any:
    """Read one of the JSON files of a run.

    Raises:
        RunFolderError: the file can't be read, or is broken.
    """
    try:
        return load_json(file)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} can't be read: {error}. {remedy(file)}") from error


def read_object(file: Path) -> dict[str, Any]:
    """Read one of the JSON files of a run that hold an object.

    Raises:
        RunFolderError: the file can't be read, is broken, or holds something else.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise RunFolderError(f"{file} holds a {type(found).__name__}, expected an object. {remedy(file)}")
    return found


def read_steps(folder: str | Path, *, whole: bool = True) -> list[dict[str, Any]]:
    """The decisions of a run as they were written, in order; none if it has not taken one yet.

    Args:
        folder: of the run.
        whole: require that the last line is complete; False leaves out an incomplete one, which is being written.

    Raises:
        RunFolderError: the folder holds no run, or a line is broken.
    """
    file = Path(folder) / STEPS
    try:
        if not os.path.lexists(file) and (Path(folder) / RUN).exists():
            return []
        text = read_text(file)
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} holds no run: {file} can't be read ({error})") from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} can't be read: {error}. {remedy(file)}") from error
    lines = (text if whole else text[: text.rfind("\n") + 1]).split("\n")
    found = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        try:
            step = parse_json(line)
            if not isinstance(step, dict):
                raise ValueError(f"it holds a {type(step).__name__}, expected an object")
        except ValueError as error:
            raise RunFolderError(f"line {number} of {file} is broken: {error}. {remedy(file)}") from error
        found.append(step)
    return found


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path} can't be written, so no run can be kept in it: {error}. Choose another folder.")


def _before_a_run(path: Path) -> bool:
    """Whether a file or folder may lie in a folder in which no run has begun."""
    if path.name == CHECKPOINTS:  # made just before the settings are written
        return path.is_dir() and not any(path.iterdir())
    return path.name in (ORIGINAL, LOCK, HOLDER) or is_leftover(path.name)  # the last: left by a killed process


def _bytes(count: float) -> str:
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.0f} MB"
